package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"mortar/internal/estate"
	"mortar/internal/fsop"
)

// One process of a mount comes after another on the same connection to the kernel. What the
// one before knew is in its estate. What it had read from the kernel and not answered
// the kernel sends again (FUSE_NOTIFY_RESEND). So it is the same whether it
// gives way to a newer program (Pause) or was killed.

// errGreeting is returned when a program would have agreed upon something else with the kernel.
var errGreeting = errors.New("this program answers the kernel's first request in another way than the one that mounted the file system: unmount it, and mount it again")

// Adopt makes m the next process of the mount on dir that has /dev/fuse open as fd, which
// m owns from then on, whose process before this one left l. Nothing that the kernel
// was told counts any more when it returns. Serve goes on, and must follow.
func (m *Mount) Adopt(fd int, dir string, l *estate.Left) error {
	dev, serve, err := newDevice(dir, fd, &m.o)
	if err != nil {
		return err
	}
	srv, err := m.newServer(serve)
	if err != nil {
		dev.close()
		return err
	}
	fail := func(err error) error {
		srv.file.Close()
		dev.close()
		return fmt.Errorf("take over the mount on %s: %w", dir, err)
	}
	minor, flags, err := srv.agrees(l)
	if err != nil {
		return fail(err)
	}
	m.dev, m.srv = dev, srv
	m.can(minor, flags)
	m.nodes.inherit(l)
	m.estate.SetHandle(l.Handle)
	m.loose = m.locks.inherit(l)
	epochs := m.epochs()
	if !epochs {
		m.given.all(m.cacheTimeout())
	}
	m.late, err = m.dropKernels(context.Background(), m.nodes.drop(), epochs)
	if err != nil {
		return fail(err)
	}
	if err := m.estate.SetInit(l.Init, l.InitAnswer); err != nil {
		return fail(err)
	}
	srv.again = make(map[uint64]bool)
	return nil
}

// agrees reports what the kernel can do, or why this program cannot go on with what the one before it agreed upon.
func (s *server) agrees(l *estate.Left) (minor uint32, flags uint64, err error) {
	if len(l.Init) < inHeaderSize+16 || opcode(l.Init) != opInit {
		return 0, 0, errors.New("the kernel's first request is not there")
	}
	for _, s.proto = range append([]*fuse.ProtocolServer{s.proto}, s.other...) {
		answer, minor, flags := s.greet(l.Init)
		if bytes.Equal(answer, l.InitAnswer) {
			return minor, flags, nil
		}
	}
	return 0, 0, errGreeting
}

// Check reports why this program could not go on with a mount whose process before it left l, of
// which only the greeting counts.
func Check(o Options, l *estate.Left) error {
	all := New(o).protocols()
	s := &server{proto: all[0], other: all[1:]}
	_, _, err := s.agrees(l)
	return err
}

// goOn begins where the process before this one ended.
func (m *Mount) goOn() {
	for _, k := range m.loose {
		m.locks.loosen(k)
		m.unlockLater(k)
	}
	m.start(func() {
		// The kernel may be about to have them; or the answer that named them was never given.
		for _, ino := range m.late {
			if m.invalAttr(m.life, ino) == nil && m.dev.invalAttr(ino) == unix.ENOENT {
				m.log.Debug("mount: an inode that the kernel does not know", "ino", uint64(ino))
			}
		}
	})
	if err := m.dev.resend(); err != nil {
		m.log.Warn("mount: what the process before this one had begun stays unanswered", "err", err)
	}
}

// comesAgain notes a request that was read, and whether it has come for a second time. Those that do
// come first.
func (s *server) comesAgain(in []byte) {
	switch op := opcode(in); {
	case estate.IsResent(unique(in)):
		s.again[unique(in)&^(1<<63)] = true
	case op != opForget && op != opBatchForget && op != opInterrupt:
		s.noneAgain()
	}
}

// noneAgain is called when no request comes a second time any more.
func (s *server) noneAgain() {
	s.estate.Numbers.ResentAre(s.again)
	s.again = nil
}

// pause is a stop of reading requests.
type pause struct{ parked, resume chan struct{} }

// Pause has m read no more requests, and returns when those that it has read are answered, but for
// those that wait for a lock, or when ctx ends. They stay unanswered until resume is
// called, or the next process has come. Nobody else may pause meanwhile.
func (m *Mount) Pause(ctx context.Context) (resume func(), err error) {
	select {
	case <-m.ready:
	default:
		return nil, errors.New("the mount is not ready")
	}
	s := m.srv
	p := &pause{parked: make(chan struct{}), resume: make(chan struct{})}
	s.pausing.Store(p)
	if err := s.file.SetReadDeadline(time.Unix(1, 0)); err != nil {
		return nil, err
	}
	resume = func() {
		s.pausing.Store(nil)
		s.file.SetReadDeadline(time.Time{})
		close(p.resume)
	}
	select {
	case <-p.parked:
	case <-s.dead:
		return nil, unix.ENODEV
	}
	for tick := 100 * time.Microsecond; s.busy() && ctx.Err() == nil; tick = min(2*tick, 2*time.Millisecond) {
		select {
		case <-time.After(tick):
		case <-ctx.Done():
		}
	}
	return resume, nil
}

// busy reports whether a request is being served that does not wait for a lock.
func (s *server) busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, op := range s.serving {
		if op != opSetlkw {
			return true
		}
	}
	return false
}

// unanswered reports whether the kernel waits for an answer.
func (s *server) unanswered() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.serving) > 0
}

// ErrWaits is returned when a process cannot give way.
var ErrWaits = errors.New("operations are under way that wait for the volume")

// Yield calls leave, of a Mount that is paused, at a moment when no thread waits in the kernel for a request to be
// answered: such a thread can neither be ended nor replaced. leave is given the
// descriptor of /dev/fuse, and returns only if the process has not been replaced.
func (m *Mount) Yield(ctx context.Context, leave func(fd int) error) error {
	if !m.features.Resend && m.srv.unanswered() {
		return ErrWaits // nobody could answer it later
	}
	for _, mu := range []interface {
		TryLock() bool
		Unlock()
	}{&m.dev.shrinkMu, &m.dev.mu} {
		for !mu.TryLock() {
			select {
			case <-time.After(time.Millisecond):
			case <-ctx.Done():
				return ErrWaits
			}
		}
		defer mu.Unlock()
	}
	return leave(m.dev.fd)
}

// Fuse is the descriptor of /dev/fuse, for whoever keeps the connection if this process
// ends. beside is one whose end tells him that it did.
func (m *Mount) Fuse(beside int) (fd int) {
	m.dev.placeMu.Lock()
	m.dev.beside = append(m.dev.beside, beside)
	m.dev.placeMu.Unlock()
	m.dev.mu.RLock()
	defer m.dev.mu.RUnlock()
	return m.dev.fd
}

// Resends reports whether the kernel sends requests again. It is known once m has a connection.
func (m *Mount) Resends() bool { return m.features.Resend }

// dropKernels has the kernel forget what it was told of the inodes that it knows, and of all names; of these
// by incrementing the epoch if that may be. It returns those inodes of which the kernel says that it does not know them, or not yet.
func (m *Mount) dropKernels(ctx context.Context, known []fsop.Ino, epochs bool) (late []fsop.Ino, err error) {
	if epochs {
		if err := m.dev.incEpoch(); err != nil {
			return nil, err
		}
	}
	for _, ino := range known {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		switch err := m.dev.invalAttr(ino); err {
		case nil:
			m.pages.add(m.dev, ino)
		case unix.ENOENT:
			late = append(late, ino)
		default:
			return nil, err
		}
	}
	if !epochs {
		return late, m.dropNames(ctx, func(fsop.Ino) bool { return true })
	}
	return late, nil
}
