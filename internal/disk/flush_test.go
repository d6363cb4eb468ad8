package disk

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// ask has a flusher of its own flush a file and reports whether the kernel took
// that on.
func ask(t *testing.T, fd int) (asked bool, err error) {
	t.Helper()
	r, err := newRing()
	if err != nil {
		t.Skipf("no asynchronous I/O here, flushes block: %v", err)
	}
	defer func() {
		r.efd.Close()
		unix.Syscall(unix.SYS_IO_DESTROY, r.ctx, 0, 0)
	}()
	return r.flush(fd, iocbFdatasync)
}

func TestFlush(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	must(t, err)
	defer f.Close()
	_, err = f.WriteString("x")
	must(t, err)
	fl := &flusher{}
	for _, flush := range []func(int) error{fl.fsync, fl.fdatasync} {
		must(t, flush(int(f.Fd())))
	}
	if asked, err := ask(t, int(f.Fd())); !asked || err != nil {
		t.Errorf("the kernel was not asked (%v), or failed: %v", asked, err)
	}
	if len(fl.free) != 1 || fl.rings != 1 {
		t.Errorf("two flushes in turn left %d of %d rings free, one would do", len(fl.free), fl.rings)
	}

	// Of what cannot be flushed the kernel says so at once, and the answer is that
	// of the call that blocks.
	p, w, err := os.Pipe()
	must(t, err)
	defer p.Close()
	defer w.Close()
	if asked, _ := ask(t, int(w.Fd())); asked {
		t.Error("a pipe was flushed")
	}
	if err := fl.fsync(int(w.Fd())); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("fsync of a pipe: %v", err)
	}
	if err := fl.fsync(-1); !errors.Is(err, syscall.EBADF) {
		t.Errorf("fsync of nothing: %v", err)
	}
}

// Where the kernel has no asynchronous I/O for this process, flushes block.
func TestFlushBlocks(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	must(t, err)
	defer f.Close()
	fl := &flusher{rings: maxRings}
	must(t, fl.fdatasync(int(f.Fd())))
	if len(fl.free) > 0 {
		t.Error("it did not")
	}
}

func TestFlushesAtOnce(t *testing.T) {
	dir := t.TempDir()
	fl := &flusher{}
	var wg sync.WaitGroup
	for i := range 2 * maxRings {
		wg.Go(func() {
			f, err := os.Create(filepath.Join(dir, string(rune('A'+i))))
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			for range 20 {
				if _, err := f.WriteString("x"); err != nil {
					t.Error(err)
				}
				if err := fl.fdatasync(int(f.Fd())); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if fl.rings > maxRings || len(fl.free) > fl.rings {
		t.Errorf("%d rings, %d of them free", fl.rings, len(fl.free))
	}
}
