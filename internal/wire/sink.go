package wire

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// sink writes batches to a connection, without waiting where that is possible.
// Only the owner of a Conn's turn uses it.
type sink interface {
	// hello writes b, waiting if need be, before any batch.
	hello(b []byte) error
	// load makes vec the batch to write. The one before is finished. The sink may
	// change vec's elements.
	load(vec [][]byte)
	// write writes until the batch is finished, which it reports, or, unless it
	// may block, until the socket is full. After an error the sink is useless.
	write(block bool) (done bool, err error)
}

// rawConn is what is under TLS, or nc itself.
func rawConn(nc net.Conn) net.Conn {
	if t, ok := nc.(interface{ NetConn() net.Conn }); ok {
		return t.NetConn()
	}
	return nc
}

func newSink(nc net.Conn, stall time.Duration) sink {
	if t, ok := nc.(*tls.Conn); ok {
		if cork, ok := t.NetConn().(*cork); ok {
			return &tlsSink{tls: t, cork: cork, raw: newRaw(cork.Conn, stall)}
		}
		return &plainSink{raw: newRaw(nc, stall)}
	}
	if p, ok := nc.(*plainConn); ok {
		return &plainSink{raw: newRaw(p.NetConn(), stall)}
	}
	return &plainSink{raw: newRaw(nc, stall)}
}

// raw writes vectors to a net.Conn.
type raw struct {
	nc    net.Conn
	now   func(f func(fd uintptr) bool) error // calls f with the socket; nil if nc is not one: then every write may block
	stall time.Duration
	vec   [][]byte // what is left to write

	// Results of attempt, which is made once so that no write has to allocate it.
	attempt func(fd uintptr) bool
	n       int
	err     error
}

func newRaw(nc net.Conn, stall time.Duration) *raw {
	r := &raw{nc: nc, stall: stall}
	switch nc := nc.(type) {
	case *calm:
		r.now = nc.now
	case *net.TCPConn, *net.UnixConn:
		if rc, err := nc.(syscall.Conn).SyscallConn(); err == nil {
			r.now = rc.Write
		}
	}
	r.attempt = func(fd uintptr) bool {
		for {
			if len(r.vec) == 1 {
				r.n, r.err = syscall.Write(int(fd), r.vec[0])
			} else {
				r.n, r.err = unix.Writev(int(fd), r.vec[:min(len(r.vec), maxVec)])
			}
			if r.err != syscall.EINTR {
				return true
			}
		}
	}
	return r
}

// maxVec is the most that writev takes (UIO_MAXIOV).
const maxVec = 1024

// try writes until vec is empty or the socket is full.
func (r *raw) try() error {
	for len(r.vec) > 0 {
		r.n, r.err = 0, nil
		if err := r.now(r.attempt); err != nil {
			return err
		}
		if r.err == syscall.EAGAIN {
			return nil
		}
		if r.err != nil {
			return &net.OpError{Op: "write", Net: r.nc.RemoteAddr().Network(), Addr: r.nc.RemoteAddr(), Err: r.err}
		}
		r.advance(r.n)
	}
	return nil
}

// advance takes n written bytes off vec.
func (r *raw) advance(n int) {
	for n > 0 && n >= len(r.vec[0]) {
		n -= len(r.vec[0])
		r.vec[0] = nil
		r.vec = r.vec[1:]
	}
	if n > 0 {
		r.vec[0] = r.vec[0][n:]
	}
}

// write writes vec, waiting for the socket if it may.
func (r *raw) write(block bool) (done bool, err error) {
	if r.now != nil {
		if err := r.try(); err != nil || len(r.vec) == 0 {
			return err == nil, err
		}
	}
	if !block {
		return len(r.vec) == 0, nil
	}
	for len(r.vec) > 0 {
		// A piece at a time, each with its own time limit: it is standing still
		// that ends the connection, not being slow.
		b := r.vec[0]
		b = b[:min(len(b), stallUnit)]
		r.nc.SetWriteDeadline(time.Now().Add(r.stall))
		n, err := r.nc.Write(b)
		r.advance(n)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return false, fmt.Errorf("%w reading for %v", ErrStalled, r.stall)
		}
		if err != nil {
			return false, err
		}
		if r.now != nil && len(r.vec) > 0 {
			r.nc.SetWriteDeadline(time.Time{})
			if err := r.try(); err != nil {
				return false, err
			}
		}
	}
	return true, r.nc.SetWriteDeadline(time.Time{})
}

// plainSink writes batches as they are.
type plainSink struct{ *raw }

func (s *plainSink) hello(b []byte) error {
	_, err := s.nc.Write(b)
	return err
}

func (s *plainSink) load(vec [][]byte) { s.vec = vec }

// tlsSink encrypts batches into memory and writes that. Records of several
// frames, and the many records of a long one, leave in one system call.
type tlsSink struct {
	tls  *tls.Conn
	cork *cork
	raw  *raw

	vec     [][]byte  // what is left to encrypt
	records []byte    // being written
	one     [1][]byte // records as a vector
}

// corkFill is how much is encrypted before it is written.
const corkFill = 128 << 10

func (s *tlsSink) hello(b []byte) error {
	_, err := s.tls.Write(b)
	if err != nil {
		return err
	}
	s.cork.hold()
	return nil
}

func (s *tlsSink) load(vec [][]byte) { s.vec = vec }

func (s *tlsSink) write(block bool) (done bool, err error) {
	for {
		if len(s.raw.vec) > 0 {
			done, err := s.raw.write(block)
			if err != nil || !done {
				return false, err
			}
		}
		if len(s.vec) == 0 {
			return true, nil
		}
		for n := 0; len(s.vec) > 0 && n < corkFill; {
			b := s.vec[0]
			b = b[:min(len(b), corkFill-n)]
			if _, err := s.tls.Write(b); err != nil {
				return false, err
			}
			n += len(b)
			if s.vec[0] = s.vec[0][len(b):]; len(s.vec[0]) == 0 {
				s.vec[0] = nil
				s.vec = s.vec[1:]
			}
		}
		s.records = s.cork.take(s.records)
		s.one[0] = s.records
		s.raw.vec = s.one[:]
	}
}
