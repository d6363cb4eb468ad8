package disk

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// TestAnchor puts another directory in the place of one that is in use: whatever is asked for is refused, and
// the other one stays as it is. So is one that is made anew where the first was removed.
func TestAnchor(t *testing.T) {
	top := t.TempDir()
	dir, other := filepath.Join(top, "dir"), filepath.Join(top, "other")
	for _, d := range []string{dir, other} {
		if err := os.MkdirAll(filepath.Join(d, "sub"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(d, "file"), []byte(d), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	fs, anchor, err := Anchor(OS, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer anchor.Close()
	path := func(name string) string { return filepath.Join(dir, name) }
	calls := map[string]func() error{
		"open":   func() error { f, err := fs.OpenFile(path("file"), os.O_RDWR); return closed(f, err) },
		"create": func() error { f, err := fs.Create(path("new"), vfs.WriteCategoryUnspecified); return closed(f, err) },
		"truncate": func() error {
			f, err := fs.OpenFile(path("new"), os.O_RDWR|os.O_CREATE|os.O_TRUNC)
			return closed(f, err)
		},
		"read": func() error { f, err := fs.Open(path("file")); return closed(f, err) },
		"read write": func() error {
			f, err := fs.OpenReadWrite(path("file"), vfs.WriteCategoryUnspecified)
			return closed(f, err)
		},
		"open dir":   func() error { f, err := fs.OpenDir(path("sub")); return closed(f, err) },
		"lock":       func() error { f, err := fs.Lock(path("lock")); return closed(f, err) },
		"sync dir":   func() error { return fs.SyncDir(dir) },
		"link":       func() error { return errors.Join(fs.Link(path("file"), path("linked")), fs.Remove(path("linked"))) },
		"mkdir":      func() error { return fs.MkdirAll(path("sub/sub"), 0o700) },
		"remove all": func() error { return fs.RemoveAll(path("sub/sub")) },
		"rename": func() error {
			return errors.Join(fs.Rename(path("file"), path("x")), fs.Rename(path("x"), path("file")))
		},
		"reuse": func() error {
			f, err := fs.ReuseForWrite(path("new"), path("newer"), vfs.WriteCategoryUnspecified)
			return errors.Join(closed(f, err), fs.Rename(path("newer"), path("new")))
		},
		"remove": func() error { return errors.Join(fs.Link(path("file"), path("l")), fs.Remove(path("l"))) },
		"list":   func() error { _, err := fs.List(dir); return err },
		"stat":   func() error { _, err := fs.Stat(path("file")); return err },
		"statfs": func() error { _, err := fs.Statfs(dir); return err },
		"usage":  func() error { _, err := fs.GetDiskUsage(dir); return err },
	}
	try := func(when string, want error) {
		t.Helper()
		for name, call := range calls {
			if name == "reuse" {
				if err := calls["create"](); want == nil && err != nil {
					t.Fatal(err)
				}
			}
			if err := call(); !errors.Is(err, want) || errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s, %s: %v", when, name, err)
			}
		}
	}
	try("in its place", nil)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Rename(dir, filepath.Join(top, "away")))
	try("moved", ErrMoved)
	must(os.Rename(other, dir))
	try("replaced", ErrMoved)
	for _, name := range []string{"new", "newer", "linked", "l", "x", "lock", "sub/sub"} {
		if _, err := os.Lstat(path(name)); err == nil {
			t.Errorf("%s is in the other directory", name)
		}
	}
	if b, err := os.ReadFile(path("file")); string(b) != other || err != nil {
		t.Errorf("the other directory's file: %q, %v", b, err)
	}
	must(os.RemoveAll(dir))
	must(os.RemoveAll(filepath.Join(top, "away")))
	for range 100 { // numbers of directories are used again
		must(os.Mkdir(dir, 0o700))
		try("made anew", ErrMoved)
		must(os.Remove(dir))
	}
}

func closed[F interface{ Close() error }](f F, err error) error {
	if err == nil {
		err = f.Close()
	}
	return err
}
