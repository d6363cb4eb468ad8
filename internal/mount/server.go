package mount

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"mortar/internal/estate"
	"mortar/internal/fsop"
)

// server brings the kernel's requests to go-fuse's protocol server, and its
// answers back.
//
// go-fuse's own loop has a thread wait in read(2) for the next request. While
// it does, it holds what Go needs to run anything else, and the runtime's
// monitor has to come and take that away, for nearly every request
// (doc/decisions/0019 has what that costs). Here the descriptor does not block
// and the runtime waits for it together with the connection to the daemon.
//
// One goroutine at a time has the turn: it reads a request, passes the turn on,
// and then serves what it read, however long that takes. There are as many
// goroutines as requests that take long, and a few in reserve.
type server struct {
	file  *os.File // /dev/fuse; owned
	fd    int      // file's, which is open for as long as anybody is served
	conn  syscall.RawConn
	proto *fuse.ProtocolServer   // what was agreed upon
	other []*fuse.ProtocolServer // what earlier versions agreed upon
	log   *slog.Logger

	in      []byte // where the next request is read to, by whoever has the turn
	large   sync.Pool
	turn    chan struct{} // passes the turn to a goroutine in reserve
	reserve atomic.Int32
	dead    chan struct{} // closed when the kernel has ended the connection
	workers sync.WaitGroup
	estate  *estate.Estate
	pausing atomic.Pointer[pause]
	// again has the requests that were sent again, until one comes that was not. It
	// is of whoever has the turn; nil: none come.
	again   map[uint64]bool
	vigil   vigil       // of whoever has the turn
	fs      *fileSystem // answers quick; nil: nothing is
	quickly uint        // how many requests quick has answered; of whoever has the turn

	mu      sync.Mutex
	serving map[uint64]uint32 // the requests being served, by their unique number, and of what kind they are
}

const (
	inHeaderSize = 40 // struct fuse_in_header
	// largeBuffer holds any request and any reply.
	largeBuffer = fsop.MaxData + 8<<10
	// smallBuffer holds all but those that bring or ask for much.
	smallBuffer = 12 << 10
	// maxReserve is how many goroutines wait for the turn at most.
	maxReserve = 4
)

// Operation codes of linux/fuse.h that the server looks at.
const (
	opForget      = 2
	opRead        = 15
	opGetxattr    = 22
	opListxattr   = 23
	opInit        = 26
	opSetlkw      = 33
	opReaddir     = 28
	opInterrupt   = 36
	opIoctl       = 39
	opBatchForget = 42
	opReaddirplus = 44
)

// newServer makes a server of a /dev/fuse descriptor, which it owns from then on. It agrees with
// the kernel upon the first of protocols, and goes on with any of them.
func newServer(fd int, protocols []*fuse.ProtocolServer, log *slog.Logger) (*server, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("/dev/fuse: %w", err)
	}
	s := &server{
		file: os.NewFile(uintptr(fd), "/dev/fuse"), fd: fd, log: log,
		proto: protocols[0], other: protocols[1:],
		turn: make(chan struct{}), dead: make(chan struct{}),
		serving: map[uint64]uint32{},
	}
	s.large.New = func() any { b := make([]byte, largeBuffer); return &b }
	s.in = *s.large.Get().(*[]byte)
	var err error
	if s.conn, err = s.file.SyscallConn(); err != nil {
		s.file.Close()
		return nil, fmt.Errorf("/dev/fuse: %w", err)
	}
	return s, nil
}

// init answers the kernel's first request, which says what it can do.
func (s *server) init() (minor uint32, flags uint64, err error) {
	n, err := s.read(s.in)
	if err != nil {
		return 0, 0, fmt.Errorf("the kernel's first request: %w", err)
	}
	in := s.in[:n]
	if n < inHeaderSize+16 || opcode(in) != opInit {
		return 0, 0, fmt.Errorf("the kernel's first request is %d bytes of kind %d, not INIT", n, opcode(in))
	}
	answer, minor, flags := s.greet(in)
	if err := s.write(answer); err != nil {
		return 0, 0, fmt.Errorf("answering the kernel's first request: %w", err)
	}
	return minor, flags, s.estate.SetInit(in, answer)
}

// greet answers the kernel's first request.
func (s *server) greet(in []byte) (answer []byte, minor uint32, flags uint64) {
	p := in[inHeaderSize:]
	minor, flags = binary.NativeEndian.Uint32(p[4:]), uint64(binary.NativeEndian.Uint32(p[12:]))
	if len(p) >= 20 && flags&fuse.CAP_INIT_EXT != 0 {
		flags |= uint64(binary.NativeEndian.Uint32(p[16:])) << 32
	}
	out := make([]byte, smallBuffer)
	n, _ := s.proto.HandleRequest([][]byte{in}, [][]byte{out})
	return out[:n], minor, flags
}

// run serves requests until the file system is unmounted, and returns when the
// last of them was answered.
func (s *server) run() {
	s.workers.Go(s.work)
	s.workers.Wait()
	s.file.Close()
}

// work is a goroutine that has the turn.
func (s *server) work() {
	small, out := make([]byte, smallBuffer), make([]byte, smallBuffer)
	for {
		n, err := s.read(s.in)
		if err != nil {
			s.end(err)
			return
		}
		if s.quick(s.in[:n], out) {
			continue
		}
		var in, own []byte
		if n <= len(small) {
			in = small[:n]
			copy(in, s.in)
		} else {
			own = s.in
			in, s.in = own[:n], *s.large.Get().(*[]byte)
		}
		s.begin(in)
		select {
		case s.turn <- struct{}{}:
		default:
			s.workers.Go(s.work)
		}
		s.serve(in, out)
		if own != nil {
			s.large.Put(&own)
		}
		if s.reserve.Add(1) > maxReserve {
			s.reserve.Add(-1)
			return
		}
		select {
		case <-s.turn:
			s.reserve.Add(-1)
		case <-s.dead:
			return
		}
	}
}

// read waits for a request. ENODEV: the file system is unmounted.
func (s *server) read(p []byte) (n int, err error) {
	for {
		werr := s.conn.Read(func(fd uintptr) bool {
			n, err = unix.Read(int(fd), p)
			if err == unix.EAGAIN && s.alone() && s.vigil.begins() {
				for begin := time.Now(); err == unix.EAGAIN && time.Since(begin) < vigilTime; {
					n, err = unix.Read(int(fd), p)
				}
				s.vigil.ended(err != unix.EAGAIN)
			}
			if err == unix.EAGAIN && s.again != nil {
				s.noneAgain()
			}
			return err != unix.EAGAIN
		})
		switch {
		case errors.Is(werr, os.ErrDeadlineExceeded):
			if p := s.pausing.Load(); p != nil {
				close(p.parked)
				<-p.resume
			}
			continue
		case werr != nil:
			return 0, werr
		case err == unix.EINTR, err == unix.ENOENT: // the request was taken back
			continue
		case err == nil && n < inHeaderSize:
			return 0, fmt.Errorf("a request of %d bytes", n)
		}
		if err == nil && s.again != nil {
			s.comesAgain(p)
		}
		return n, err
	}
}

// alone says whether no request is being served but the one that whoever has the turn may be about to read.
func (s *server) alone() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.serving) == 0
}

// end is called by who has the turn when there are no more requests. Whoever is
// still being served is interrupted: nobody waits for the answer.
func (s *server) end(err error) {
	if !errors.Is(err, unix.ENODEV) {
		s.log.Error("mount: reading from /dev/fuse", "err", err)
	}
	s.mu.Lock()
	var left []uint64
	for u := range s.serving {
		left = append(left, u)
	}
	s.mu.Unlock()
	close(s.dead)
	var msg [inHeaderSize + 8]byte
	binary.NativeEndian.PutUint32(msg[0:], uint32(len(msg)))
	binary.NativeEndian.PutUint32(msg[4:], opInterrupt)
	for _, u := range left {
		binary.NativeEndian.PutUint64(msg[inHeaderSize:], u)
		s.proto.HandleRequest([][]byte{msg[:]}, [][]byte{make([]byte, smallBuffer)})
	}
}

// write gives the kernel an answer.
func (s *server) write(answer []byte) error {
	for {
		if _, err := unix.Write(s.fd, answer); err != unix.EINTR {
			return err
		}
	}
}

func opcode(in []byte) uint32 { return binary.NativeEndian.Uint32(in[4:]) }
func unique(in []byte) uint64 { return binary.NativeEndian.Uint64(in[8:]) }
func answered(in []byte) bool { op := opcode(in); return op != opForget && op != opBatchForget }
func argument(in []byte, off int) int {
	if len(in) < inHeaderSize+off+4 {
		return 0
	}
	return int(binary.NativeEndian.Uint32(in[inHeaderSize+off:]))
}

// wanted is how many bytes of payload a request asks for.
func wanted(in []byte) int {
	switch opcode(in) {
	case opRead, opReaddir, opReaddirplus:
		return argument(in, 16)
	case opGetxattr, opListxattr:
		return argument(in, 0)
	case opIoctl:
		return argument(in, 28)
	}
	return 0
}

// begin notes that a request is being served, by who has the turn: who gets it next may be told to
// pause, and then all that was read counts.
func (s *server) begin(in []byte) {
	if answered(in) {
		s.mu.Lock()
		s.serving[unique(in)] = opcode(in)
		s.mu.Unlock()
	}
}

// serve answers one request, which has begun. small is memory for a short answer.
func (s *server) serve(in, small []byte) {
	out := small
	if n := wanted(in); n > len(small)-1024 {
		b := s.large.Get().(*[]byte)
		defer s.large.Put(b)
		out = *b
	}
	u := unique(in)
	if answered(in) {
		defer func() {
			s.estate.Numbers.Answered(u)
			s.mu.Lock()
			delete(s.serving, u)
			s.mu.Unlock()
		}()
	}
	n, st := s.proto.HandleRequest([][]byte{in}, [][]byte{out})
	if !st.Ok() {
		// It could not even be read as a request. The caller must not wait for ever.
		s.log.Warn("mount: a request that is not understood", "opcode", opcode(in), "bytes", len(in), "status", st)
		if !answered(in) {
			return
		}
		binary.NativeEndian.PutUint32(out[0:], outHeaderSize)
		failed := -int32(unix.EIO)
		binary.NativeEndian.PutUint32(out[4:], uint32(failed))
		binary.NativeEndian.PutUint64(out[8:], u)
		n = outHeaderSize
	}
	if n == 0 {
		return // wants no answer
	}
	s.answer(in, out[:n])
}

// answer gives the kernel the answer to a request.
func (s *server) answer(in, out []byte) {
	// ENOENT: the caller was killed meanwhile, or the file system unmounted.
	if err := s.write(out); err != nil && err != unix.ENOENT && err != unix.ENODEV {
		s.log.Warn("mount: answering the kernel", "opcode", opcode(in), "bytes", len(out), "err", err)
	}
}
