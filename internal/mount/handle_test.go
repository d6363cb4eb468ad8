package mount

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
)

// TestHandles opens handles on a mount whose kernel has never heard of what they are of: of a
// file, of a directory whose place it has to find out, and of what is gone.
func TestHandles(t *testing.T) {
	mem := memfs.New()
	h := &holdCounter{n: map[fsop.Ino]int64{1: 1}}
	a := newMount(t, mem, Options{})
	b := newMount(t, mem, Options{}, func(next fsop.Handler) fsop.Handler { h.next = next; return h })
	if err := os.MkdirAll(filepath.Join(a.dir, "x", "y"), 0o755); err != nil {
		t.Fatal(err)
	}
	handle := func(name string) unix.FileHandle {
		t.Helper()
		p := filepath.Join(a.dir, name)
		if filepath.Ext(name) != "" {
			if err := os.WriteFile(p, []byte(name), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		fh, _, err := unix.NameToHandleAt(unix.AT_FDCWD, p, 0)
		if err != nil {
			t.Fatal(err)
		}
		return fh
	}
	root, err := unix.Open(b.dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(root)
	open := func(fh unix.FileHandle) (*os.File, error) {
		fd, err := unix.OpenByHandleAt(root, fh, unix.O_RDONLY)
		return os.NewFile(uintptr(fd), "by handle"), err
	}

	file, gone, dir := handle("x/y/f.txt"), handle("x/y/g.txt"), handle("x/y")
	f, err := open(file)
	if err != nil {
		t.Fatal("a file: ", err)
	}
	defer f.Close()
	got := make([]byte, 64)
	if n, err := f.ReadAt(got, 0); string(got[:n]) != "x/y/f.txt" {
		t.Errorf("the file holds %q, %v", got[:n], err)
	}
	d, err := open(dir)
	if err != nil {
		t.Fatal("a directory: ", err)
	}
	defer d.Close()
	if at, err := os.Readlink(filepath.Join("/proc/self/fd", strconv.Itoa(int(d.Fd())))); err != nil || at != filepath.Join(b.dir, "x", "y") {
		t.Errorf("the directory is at %q, %v", at, err)
	}
	if err := os.Remove(filepath.Join(a.dir, "x/y/g.txt")); err != nil {
		t.Fatal(err)
	}
	if _, err := open(gone); err != unix.ESTALE {
		t.Errorf("what is gone: %v", err)
	}
	for _, k := range b.Holds() {
		h.mu.Lock()
		if n := h.n[k.Ino]; n != int64(k.N) {
			t.Errorf("inode %d: replies say %d, held %d", k.Ino, n, k.N)
		}
		h.mu.Unlock()
	}
}
