package disk

import (
	"errors"
	"os"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A flusher has files flushed by the kernel's own workers while the thread that
// asked does something else. A thread that blocks in fdatasync takes its share
// of the scheduler with it until the runtime notices, which is as long as the
// flush itself; a daemon with one such share would stand still
// (doc/decisions/0025).
//
// It uses the kernel's asynchronous I/O. Where that is refused, or cannot flush
// such a file, the thread blocks after all.
type flusher struct {
	mu    sync.Mutex
	free  []*ring
	rings int // that exist
}

// maxRings is how many flushes may be under way; those beyond it block.
const maxRings = 32

// ring is an I/O context for one flush at a time, and the eventfd that tells
// the runtime's poller of its end.
type ring struct {
	ctx uintptr
	efd *os.File
	raw syscall.RawConn
	cb  iocb
}

// iocb and ioEvent are the kernel's structs of these names, linux/aio_abi.h.
type iocb struct {
	data     uint64
	key      uint32
	rwFlags  uint32
	opcode   uint16
	reqPrio  int16
	fd       uint32
	buf      uint64
	nbytes   uint64
	offset   int64
	reserved uint64
	flags    uint32
	resFD    uint32
}

type ioEvent struct {
	data, obj uint64
	res, res2 int64
}

const (
	iocbFsync     = 2
	iocbFdatasync = 3
	iocbFlagResFD = 1
)

// fsync flushes a file with its metadata.
func (f *flusher) fsync(fd int) error { return f.flush(fd, iocbFsync, unix.Fsync) }

// fdatasync flushes a file's contents and what reading them takes.
func (f *flusher) fdatasync(fd int) error { return f.flush(fd, iocbFdatasync, unix.Fdatasync) }

// writeOut starts writing the first length bytes of a file and does not wait for
// it; where that cannot be, it flushes the file.
func (f *flusher) writeOut(fd int, length int64) (flushed bool, err error) {
	err = retry(func() error { return unix.SyncFileRange(fd, 0, length, unix.SYNC_FILE_RANGE_WRITE) })
	if errors.Is(err, syscall.ENOSYS) || errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ESPIPE) {
		return true, f.fdatasync(fd)
	}
	return false, err
}

// flush flushes fd, which must stay open until it returns.
func (f *flusher) flush(fd int, op uint16, block func(fd int) error) error {
	if r := f.take(); r != nil {
		asked, err := r.flush(fd, op)
		f.give(r)
		if asked {
			return err
		}
	}
	return retry(func() error { return block(fd) })
}

// take returns a ring that nobody uses; nil if there can be none.
func (f *flusher) take() *ring {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := len(f.free); n > 0 {
		r := f.free[n-1]
		f.free = f.free[:n-1]
		return r
	}
	if f.rings >= maxRings {
		return nil
	}
	f.rings++
	r, err := newRing()
	if err != nil {
		f.rings = maxRings // it will not be any better the next time
		return nil
	}
	return r
}

func (f *flusher) give(r *ring) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.free = append(f.free, r)
}

func newRing() (*ring, error) {
	r := &ring{}
	if _, _, e := unix.Syscall(unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(&r.ctx)), 0); e != 0 {
		return nil, os.NewSyscallError("io_setup", e)
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Syscall(unix.SYS_IO_DESTROY, r.ctx, 0, 0)
		return nil, os.NewSyscallError("eventfd", err)
	}
	r.efd = os.NewFile(uintptr(fd), "eventfd of flushes")
	if r.raw, err = r.efd.SyscallConn(); err != nil {
		r.efd.Close()
		unix.Syscall(unix.SYS_IO_DESTROY, r.ctx, 0, 0)
		return nil, err
	}
	r.cb.flags, r.cb.resFD = iocbFlagResFD, uint32(fd)
	return r, nil
}

// flush reports whether the kernel took the flush on, and then how it ended.
func (r *ring) flush(fd int, op uint16) (asked bool, err error) {
	r.cb.opcode, r.cb.fd = op, uint32(fd)
	called, ended := false, false
	// The poller is told to look before the kernel can be done, or it would miss it.
	r.raw.Read(func(uintptr) bool {
		if !called {
			called = true
			asked = r.submit()
			return !asked
		}
		ended, err = r.reap(0)
		return ended
	})
	if asked && !ended { // the poller cannot wait for it
		_, err = r.reap(1)
	}
	return asked, err
}

// submit hands the request to the kernel.
func (r *ring) submit() bool {
	cb := &r.cb
	n, _, e := unix.Syscall(unix.SYS_IO_SUBMIT, r.ctx, 1, uintptr(unsafe.Pointer(&cb)))
	return e == 0 && n == 1
}

// reap takes the result if it is there, and waits for it if atLeast is 1.
func (r *ring) reap(atLeast uintptr) (ended bool, err error) {
	var ev ioEvent
	var none unix.Timespec
	wait := &none
	if atLeast > 0 {
		wait = nil
	}
	for {
		n, _, e := unix.Syscall6(unix.SYS_IO_GETEVENTS, r.ctx, atLeast, 1, uintptr(unsafe.Pointer(&ev)), uintptr(unsafe.Pointer(wait)), 0)
		switch {
		case errors.Is(e, unix.EINTR):
			continue
		case e != 0: // cannot be, for a context and memory that are right
			return true, os.NewSyscallError("io_getevents", e)
		case n == 0:
			return false, nil
		case ev.res < 0:
			return true, syscall.Errno(-ev.res)
		}
		return true, nil
	}
}
