package mount

import (
	"sync"
	"time"

	"mortar/internal/fsop"
)

// sizes has the kernel know how long a file is before it reads it.
//
// Before a read(2) from the page cache the kernel asks for the file's attributes if they
// were invalidated. An invalidation that overtakes the answer has it ignored, and the read goes by
// the size that the kernel had before. That may be from before changes that were
// acknowledged before the read began: it would end early, or go on, with zeros, beyond
// the end. The mount cannot know whether the answer will be ignored: what overtakes it
// may have done so before the question was read here, or do so before the
// thread that asked has run again.
//
// So before it answers, the mount has the kernel ask once more (asker), which answers that
// with what it is about to answer to the first, and looks whether that was taken; if not, it
// tries again. From then on the kernel has the size that was true at some moment
// after the read began, or a later one: answers to questions that began earlier are ignored now, those
// to questions that begin later are not older, and the mount's own changes
// tell the kernel of the size that they leave.
//
// The second question is answered at once, without the replica: otherwise it would take as
// long as the first, and under a stream of changes never overtake them. That answer is
// as good as a new one unless this mount has changed the size since, which the
// kernel may know already (inflight.resized); then the replica is asked.
type sizes struct {
	mu sync.Mutex
	of map[fsop.Ino]*sizing
}

// sizing is what the kernel is told of the size of one file. It stays as long as anybody
// is being told: of two who asked the replica, the one who was answered
// earlier may come here later, and must not undo what the other has done.
type sizing struct {
	users int
	turn  chan struct{} // held by who has the kernel ask

	// Guarded by sizes.mu, and by the turn.
	attr  fsop.Attr // what is to be told; Ino 0: nothing
	seq   uint64    // at which it was true
	began began     // when it was asked for
	own   uint64    // what resized returned then
	told  uint64    // fsop.Attr.Change of what the kernel has taken
}

func (z *sizes) begin(ino fsop.Ino) *sizing {
	z.mu.Lock()
	defer z.mu.Unlock()
	s := z.of[ino]
	if s == nil {
		s = &sizing{turn: make(chan struct{}, 1)}
		z.of[ino] = s
	}
	s.users++
	return s
}

func (z *sizes) end(ino fsop.Ino, s *sizing) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if s.users--; s.users == 0 {
		delete(z.of, ino)
	}
}

// answer is the answer to the second question about ino, if there is one; fresh
// says whether the kernel may keep it.
func (m *Mount) answerSize(ino fsop.Ino) (a fsop.Attr, fresh, ok bool) {
	m.sizes.mu.Lock()
	defer m.sizes.mu.Unlock()
	s := m.sizes.of[ino]
	if s == nil || s.attr.Ino == 0 || s.own == 0 || s.own != m.inflight.resized(ino) {
		return fsop.Attr{}, false, false
	}
	return s.attr, m.nodes.fresh(ino, s.seq, s.began), true
}

// sizePatience is how long the kernel is asked to take a size. It takes none while a
// write of this mount makes the file longer, or one of its own truncates it.
const sizePatience = 2 * time.Second

// settleSize returns when the kernel has the size of a, which was true at seq, or a
// later one. own is what resized returned before a was asked for.
func (m *Mount) settleSize(r *request, s *sizing, a *fsop.Attr, seq, own uint64) {
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-r.Done():
		return
	}
	if s.told >= a.Change && s.told > 0 {
		return
	}
	m.sizes.mu.Lock()
	s.attr, s.seq, s.began, s.own = *a, seq, r.began, own
	m.sizes.mu.Unlock()
	defer func() {
		m.sizes.mu.Lock()
		s.attr = fsop.Attr{}
		m.sizes.mu.Unlock()
	}()
	pause := 20 * time.Microsecond
	for began := time.Now(); ; {
		asked, err := m.asker.ask(r.Done(), forSize, a.Ino)
		switch {
		case err == errAskerBusy:
		case err != nil:
			if err != errNoAsker {
				m.log.Warn("mount: a file's size", "ino", uint64(a.Ino), "err", err)
			}
			return
		case asked.err != nil: // it does not have the inode, or the file system is being unmounted
			m.log.Debug("mount: a file's size", "ino", uint64(a.Ino), "err", asked.err)
			return
		case asked.taken:
			s.told = a.Change
			m.nodes.sized(a.Ino, max(seq, a.Change))
			return
		}
		if time.Since(began) > sizePatience {
			m.log.Debug("mount: the kernel takes no size", "ino", uint64(a.Ino))
			return
		}
		select {
		case <-time.After(pause):
		case <-r.Done():
			return
		}
		pause = min(2*pause, 5*time.Millisecond)
	}
}
