package wire

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// calm is a unix socket that does not hear of room that it does not want.
//
// The runtime waits for every descriptor to become readable or writable, whatever is asked
// for. And whenever somebody reads from a unix socket, however little was in it, the kernel
// tells the other side that there is room to write. So each message woke who had sent it, for
// nothing: a call and its reply four threads instead of two, each at the price of an interrupt
// to a processor that sleeps, paid by who was reading. (TCP tells only who found no room.)
//
// So the runtime does not know this socket. It waits for an epoll descriptor that waits for
// the socket to become readable, and for another one to which the socket is given while there
// is no room.
type calm struct {
	local, remote net.Addr

	mu     sync.RWMutex // held for reading while fd is used, never while waiting
	fd     int          // does not block; -1 when closed
	wanted *epoll       // readable when fd is
	room   *epoll       // readable when fd is given to it and writable

	readMu, writeMu sync.Mutex // one reader, and one who waits for room
	read            transfer
}

// transfer is one attempt after the other to move bytes. Its function is made once.
type transfer struct {
	p    []byte
	n    int
	err  error
	once func(uintptr) bool
}

// calmed makes a calm socket of a unix socket, which it owns from then on, and returns
// anything else as it is.
func calmed(nc net.Conn) net.Conn {
	u, ok := nc.(*net.UnixConn)
	if !ok {
		return nc
	}
	c, err := newCalm(u)
	if err != nil {
		return nc // works as well
	}
	u.Close() // c has a descriptor of its own
	return c
}

func newCalm(u *net.UnixConn) (*calm, error) {
	c := &calm{local: u.LocalAddr(), remote: u.RemoteAddr(), fd: -1}
	rc, err := u.SyscallConn()
	if err != nil {
		return nil, err
	}
	cerr := rc.Control(func(fd uintptr) { c.fd, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) })
	if err := errors.Join(cerr, err); err != nil {
		return nil, err
	}
	if c.wanted, err = newEpoll(); err == nil {
		if c.room, err = newEpoll(); err == nil {
			err = c.wanted.watch(c.fd, unix.EPOLLIN|unix.EPOLLRDHUP)
		}
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	c.read.once = func(uintptr) bool {
		c.read.n, c.read.err = c.try(unix.Read, c.read.p)
		return c.read.err != unix.EAGAIN
	}
	return c, nil
}

// try makes one system call that does not wait.
func (c *calm) try(call func(int, []byte) (int, error), p []byte) (n int, err error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.fd < 0 {
		return 0, net.ErrClosed
	}
	for {
		if n, err = call(c.fd, p); err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// Read implements net.Conn.
func (c *calm) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	c.readMu.Lock()
	defer c.readMu.Unlock()
	c.read.p = p
	err := c.wanted.wait(c.read.once)
	c.read.p = nil
	if err == nil {
		err = c.read.err
	}
	switch {
	case err != nil:
		return 0, c.failed("read", err)
	case c.read.n == 0:
		return 0, io.EOF
	}
	return c.read.n, nil
}

// Write implements net.Conn.
func (c *calm) Write(p []byte) (done int, err error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	for done < len(p) {
		n, err := c.try(unix.Write, p[done:])
		done += n
		if err == unix.EAGAIN {
			n, err = c.writeWaiting(p[done:])
			done += n
		}
		if err != nil {
			return done, c.failed("write", err)
		}
	}
	return done, nil
}

// writeWaiting waits for room, and writes something.
func (c *calm) writeWaiting(p []byte) (n int, err error) {
	c.mu.RLock()
	if err = net.ErrClosed; c.fd >= 0 {
		err = c.room.watch(c.fd, unix.EPOLLOUT)
	}
	c.mu.RUnlock()
	if err != nil {
		return 0, err
	}
	defer func() {
		c.mu.RLock()
		defer c.mu.RUnlock()
		if c.fd >= 0 {
			c.room.unwatch(c.fd)
		}
	}()
	werr := c.room.wait(func(uintptr) bool {
		n, err = c.try(unix.Write, p)
		return err != unix.EAGAIN
	})
	if werr != nil {
		return 0, werr
	}
	return n, err
}

func (c *calm) failed(op string, err error) error {
	return &net.OpError{Op: op, Net: c.remote.Network(), Source: c.local, Addr: c.remote, Err: err}
}

// now calls f, which must not wait, with the descriptor.
func (c *calm) now(f func(fd uintptr) bool) error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.fd < 0 {
		return c.failed("write", net.ErrClosed)
	}
	f(uintptr(c.fd))
	return nil
}

// Close implements net.Conn. Who waits is told.
func (c *calm) Close() error {
	c.mu.Lock()
	fd := c.fd
	c.fd = -1
	c.mu.Unlock()
	if fd < 0 {
		return net.ErrClosed
	}
	err := unix.Close(fd) // the last descriptor of it: it leaves the epolls by itself
	for _, e := range []*epoll{c.wanted, c.room} {
		if e != nil {
			e.file.Close()
		}
	}
	return err
}

func (c *calm) LocalAddr() net.Addr  { return c.local }
func (c *calm) RemoteAddr() net.Addr { return c.remote }

func (c *calm) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}
func (c *calm) SetReadDeadline(t time.Time) error  { return c.wanted.file.SetReadDeadline(t) }
func (c *calm) SetWriteDeadline(t time.Time) error { return c.room.file.SetReadDeadline(t) }

// epoll is an epoll descriptor for which the runtime waits.
type epoll struct {
	file *os.File
	rc   syscall.RawConn
	fd   int
}

func newEpoll() (*epoll, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil { // or the runtime would not wait for it
		unix.Close(fd)
		return nil, err
	}
	e := &epoll{file: os.NewFile(uintptr(fd), "epoll"), fd: fd}
	if e.rc, err = e.file.SyscallConn(); err == nil {
		err = e.file.SetDeadline(time.Time{}) // fails if it does not
	}
	if err != nil {
		e.file.Close()
		return nil, err
	}
	return e, nil
}

func (e *epoll) watch(fd int, events uint32) error {
	return unix.EpollCtl(e.fd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

func (e *epoll) unwatch(fd int) { _ = unix.EpollCtl(e.fd, unix.EPOLL_CTL_DEL, fd, nil) }

// wait calls once until it returns true, each time after something was ready.
func (e *epoll) wait(once func(uintptr) bool) error { return e.rc.Read(once) }
