package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"mortar/internal/fsop/memfs"
)

// TestRightsMove gives a file and a directory away through one mount. What only
// an owner may, the kernel of another mount grants to the new one at once and to
// the old one no more, whatever it had cached.
func TestRightsMove(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			mem := memfs.New()
			a, b := newMount(t, mem, kind.o), newMount(t, mem, kind.o)
			root, err := unix.Open(b.dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(root)
			if err := os.Mkdir(filepath.Join(a.dir, "d"), 0o777); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(a.dir, "d/f"), nil, 0o666); err != nil {
				t.Fatal(err)
			}
			const first = 64700
			for i := range 20 {
				now, before := first+i%2, first+(i+1)%2
				for _, name := range []string{"d/f", "d"} {
					chmod := func(uid int) error {
						return as(uid, func() error { return unix.Fchmodat(root, name, 0o777, 0) })
					}
					if err := os.Chown(filepath.Join(a.dir, name), now, now); err != nil {
						t.Fatal(err)
					}
					if err := chmod(now); err != nil {
						t.Errorf("round %d: %s: chmod by the new owner: %v", i, name, err)
					}
					if err := chmod(before); err != unix.EPERM {
						t.Errorf("round %d: %s: chmod by the old owner: %v, want %v", i, name, err, unix.EPERM)
					}
				}
				// In a sticky directory of root's a file is its owner's to remove.
				d := filepath.Join(a.dir, "d")
				if err := os.Chown(d, 0, 0); err != nil {
					t.Fatal(err)
				}
				if err := os.Chmod(d, 0o777|os.ModeSticky); err != nil {
					t.Fatal(err)
				}
				name := fmt.Sprintf("d/g%d", i)
				if err := os.WriteFile(filepath.Join(a.dir, name), nil, 0o666); err != nil {
					t.Fatal(err)
				}
				unlink := func() error { return unix.Unlinkat(root, name, 0) }
				if err := as(now, unlink); err != unix.EPERM {
					t.Errorf("round %d: unlink of root's file in a sticky directory: %v, want %v", i, err, unix.EPERM)
				}
				if err := os.Chmod(d, 0o777); err != nil {
					t.Fatal(err)
				}
				if err := as(now, unlink); err != nil {
					t.Errorf("round %d: unlink when the directory is sticky no more: %v", i, err)
				}
			}
		})
	}
}

// TestSetIDWritten: whoever asks for nothing but the mode of a file, as stat -c %A does, is
// told that its set-id bits went when its owner wrote to it or cut it.
func TestSetIDWritten(t *testing.T) {
	const owner = 4321
	m := newMount(t, memfs.New(), Options{})
	root, err := unix.Open(m.dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0) // the way there is root's
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(root)
	for _, c := range []struct {
		name  string
		flags int
	}{{"write", unix.O_WRONLY}, {"both", unix.O_RDWR}, {"append", unix.O_WRONLY | unix.O_APPEND}, {"truncate", unix.O_WRONLY | unix.O_TRUNC}} {
		path := filepath.Join(m.dir, c.name)
		if err := errors.Join(os.WriteFile(path, []byte("text"), 0o644), os.Chown(path, owner, owner), unix.Chmod(path, 0o6755)); err != nil {
			t.Fatal(err)
		}
		mode := func() uint16 {
			var st unix.Statx_t
			if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MODE, &st); err != nil {
				t.Fatal(err)
			}
			return st.Mode & 0o7777
		}
		if got := mode(); got != 0o6755 {
			t.Fatalf("%s: mode %o before", c.name, got)
		}
		err := as(owner, func() error {
			fd, err := unix.Openat(root, c.name, c.flags|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if c.flags&unix.O_TRUNC == 0 {
				_, err = unix.Write(fd, []byte("x"))
			}
			return err
		})
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if got := mode(); got != 0o755 {
			t.Errorf("%s: the mode is told as %o, want 755", c.name, got)
		}
	}
}

// as runs f with the file system rights of a user, which Linux keeps per thread.
func as(uid int, f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	syscall.RawSyscall(unix.SYS_SETFSUID, uintptr(uid), 0, 0)
	defer syscall.RawSyscall(unix.SYS_SETFSUID, 0, 0, 0)
	return f()
}
