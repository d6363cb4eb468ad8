package mount

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
)

// lockWith takes or gives up a lock on a whole file.
func lockWith(t *testing.T, how string, f *os.File, typ int16) {
	t.Helper()
	var err error
	switch how {
	case "flock":
		err = unix.Flock(int(f.Fd()), map[int16]int{unix.F_WRLCK: unix.LOCK_EX, unix.F_RDLCK: unix.LOCK_SH, unix.F_UNLCK: unix.LOCK_UN}[typ])
	case "fcntl":
		err = unix.FcntlFlock(f.Fd(), unix.F_SETLKW, &unix.Flock_t{Type: typ})
	case "ofd":
		err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLKW, &unix.Flock_t{Type: typ})
	}
	if err != nil {
		t.Fatalf("%s, type %d: %v", how, typ, err)
	}
}

// TestStoresUnderLocks: what is stored through a shared mapping under a lock is there for
// whoever takes the lock next on another mount, in his mapping, too; and that costs nobody his pages.
func TestStoresUnderLocks(t *testing.T) {
	for _, how := range []string{"fcntl", "ofd", "flock"} {
		for _, typ := range []int16{unix.F_UNLCK, unix.F_RDLCK} {
			for _, asker := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s/type=%d/asker=%v", how, typ, asker), func(t *testing.T) {
					storesUnderLocks(t, how, typ, asker)
				})
			}
		}
	}
}

func storesUnderLocks(t *testing.T, how string, typ int16, asker bool) {
	mem := memfs.New()
	var reads atomic.Int32
	counted := func(h fsop.Handler) fsop.Handler {
		return fsop.HandlerFunc(func(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
			if _, ok := op.(*fsop.Read); ok {
				reads.Add(1)
			}
			return h.Do(ctx, op)
		})
	}
	mounts := [2]*mounted{newMount(t, mem, Options{}, counted), newMount(t, mem, Options{})}
	if !asker {
		mounts[0].asker.command = nil
	}
	if err := os.WriteFile(filepath.Join(mounts[0].dir, "f"), make([]byte, 3*os.Getpagesize()), 0o644); err != nil {
		t.Fatal(err)
	}
	var files [2]*os.File
	var maps [2][]byte
	for i, m := range mounts {
		f, err := os.OpenFile(filepath.Join(m.dir, "f"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		p, err := unix.Mmap(int(f.Fd()), 0, 3*os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Munmap(p)
		files[i], maps[i] = f, p
		if p[0] != 0 || p[2*os.Getpagesize()] != 0 { // the pages are there from now on
			t.Fatal("the file is not empty")
		}
	}
	for round := byte(1); round < 20; round++ {
		lockWith(t, how, files[0], unix.F_WRLCK)
		maps[0][0], maps[0][2*os.Getpagesize()+7] = round, round
		lockWith(t, how, files[0], typ)
		before := reads.Load()
		if got := maps[0][0]; got != round {
			t.Fatalf("round %d: the mapping that was stored to has %d", round, got)
		}
		if n := reads.Load() - before; asker && n != 0 {
			t.Errorf("round %d: %d pages were read again after the unlock", round, n)
		}
		next := int16(unix.F_WRLCK)
		if typ == unix.F_RDLCK {
			next = typ
		}
		lockWith(t, how, files[1], next)
		if a, b := maps[1][0], maps[1][2*os.Getpagesize()+7]; a != round || b != round {
			t.Fatalf("round %d: under the lock, the other mount's mapping has %d and %d", round, a, b)
		}
		lockWith(t, how, files[1], unix.F_UNLCK)
	}
}
