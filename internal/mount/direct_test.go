package mount

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
)

// aioContext is a context of io_setup(2).
type aioContext struct {
	t  *testing.T
	id uintptr
}

func newAIO(t *testing.T) *aioContext {
	t.Helper()
	a := &aioContext{t: t}
	if _, _, e := unix.Syscall(unix.SYS_IO_SETUP, 8, uintptr(unsafe.Pointer(&a.id)), 0); e != 0 {
		t.Fatal("io_setup: ", e)
	}
	t.Cleanup(func() { unix.Syscall(unix.SYS_IO_DESTROY, a.id, 0, 0) })
	return a
}

// write begins to write a page at the beginning of fd's file.
func (a *aioContext) write(fd int, page []byte) {
	a.t.Helper()
	const pwrite = 1
	iocb := struct { // of linux/aio_abi.h
		data        uint64
		key, flags  uint32
		op, prio    uint16
		fd          uint32
		buf, length uint64
		off         int64
		_           [2]uint64
	}{op: pwrite, fd: uint32(fd), buf: uint64(uintptr(unsafe.Pointer(&page[0]))), length: uint64(len(page))}
	all := [1]uintptr{uintptr(unsafe.Pointer(&iocb))}
	if n, _, e := unix.Syscall(unix.SYS_IO_SUBMIT, a.id, 1, uintptr(unsafe.Pointer(&all[0]))); e != 0 || n != 1 {
		a.t.Fatalf("io_submit: %d, %v", n, e)
	}
}

// await returns what the write that ends next returns.
func (a *aioContext) await() int64 {
	a.t.Helper()
	var event struct{ data, obj, res, res2 int64 }
	for {
		n, _, e := unix.Syscall6(unix.SYS_IO_GETEVENTS, a.id, 1, 1, uintptr(unsafe.Pointer(&event)), 0, 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 || n != 1 {
			a.t.Fatalf("io_getevents: %d, %v", n, e)
		}
		return event.res
	}
}

// TestWrittenPastPages has a file be read through the page cache while it is written to past
// it (O_DIRECT): when the write has ended nobody is shown the old pages any more.
func TestWrittenPastPages(t *testing.T) {
	size := os.Getpagesize()
	for _, c := range []struct {
		name  string
		async bool
		// during reads while the write is under way; after goes on when it has been answered.
		during func(t *testing.T, g *gate, release func(), read func() byte) (after func())
	}{
		{"asynchronous", true, func(t *testing.T, _ *gate, release func(), read func() byte) func() {
			for range 2 {
				if b := read(); b != 'a' {
					t.Errorf("read %q of a write that was not carried out", b)
				}
			}
			release()
			return func() {}
		}},
		{"asynchronous, answered while a page is being read", true, func(t *testing.T, g *gate, release func(), read func() byte) func() {
			held, goOn := holdOnce(g, kindIs(fsop.KindRead))
			done := make(chan struct{})
			go func() { defer close(done); read() }()
			<-held
			release()
			return func() { goOn(); <-done }
		}},
		{"synchronous", false, func(t *testing.T, _ *gate, release func(), read func() byte) func() {
			read()
			release()
			return func() {}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := new(gate)
			m := newMount(t, memfs.New(), Options{}, gated(g))
			p := filepath.Join(m.dir, "f")
			if err := os.WriteFile(p, bytes.Repeat([]byte("a"), 2*size), 0o644); err != nil {
				t.Fatal(err)
			}
			fd, err := unix.Open(p, unix.O_RDWR|unix.O_DIRECT, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			reader, err := os.Open(p)
			if err != nil {
				t.Fatal(err)
			}
			defer reader.Close()
			read := func() byte {
				b := make([]byte, 1)
				if _, err := reader.ReadAt(b, 0); err != nil {
					t.Error(err)
				}
				return b[0]
			}
			page, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Munmap(page)
			for i := range page {
				page[i] = 'b'
			}

			begun, carryOut := make(chan struct{}), make(chan struct{})
			g.set(func(op fsop.Op, replied bool) <-chan struct{} {
				if op.Kind() != fsop.KindWrite || replied {
					return nil
				}
				close(begun)
				return carryOut
			})
			var aio *aioContext
			wrote := make(chan error, 1)
			if c.async {
				aio = newAIO(t)
				aio.write(fd, page)
			} else {
				go func() { _, err := unix.Pwrite(fd, page, 0); wrote <- err }()
			}
			<-begun
			after := c.during(t, g, func() { close(carryOut) }, read)
			if c.async {
				if n := aio.await(); n != int64(size) {
					t.Fatalf("the write ended with %d", n)
				}
			} else if err := <-wrote; err != nil {
				t.Fatal(err)
			}
			after()
			for range 2 {
				if b := read(); b != 'b' {
					t.Errorf("read %q after the write", b)
				}
			}
		})
	}
}
