package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
)

// counter counts what reaches the handler.
type counter struct {
	next fsop.Handler
	mu   sync.Mutex
	n    map[string]int
}

func (c *counter) Do(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
	c.mu.Lock()
	c.n[op.Kind().String()]++
	c.mu.Unlock()
	return c.next.Do(ctx, op)
}

// take returns the counts since the last take.
func (c *counter) take() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.n
	c.n = map[string]int{}
	return n
}

// TestRoundTrips counts the operations that common sequences of system calls
// cost: each is a round trip to the home replica.
func TestRoundTrips(t *testing.T) {
	for _, kind := range kinds[:2] {
		t.Run(kind.name, func(t *testing.T) {
			c := &counter{n: map[string]int{}}
			m := newMount(t, memfs.New(), kind.o, func(h fsop.Handler) fsop.Handler { c.next = h; return c })
			node := kind.o.LocksNode
			check := func(what string, want map[string]int) {
				t.Helper()
				got := c.take()
				if node { // closes are not told, and files are made by MKNOD
					delete(want, "flush")
					if n := want["make"]; n > 0 {
						delete(want, "make")
						want["mknod"] = n
					}
				}
				if !maps.Equal(got, want) {
					t.Errorf("%s: %v, want %v", what, got, want)
				}
			}
			do := func(what string, want map[string]int, f func() error) {
				t.Helper()
				c.take()
				if err := f(); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				check(what, want)
			}
			dir := filepath.Join(m.dir, "d")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			os.Stat(dir)
			p := filepath.Join(dir, "f")
			buf := make([]byte, 4096)
			// That nothing is in a directory made here need not be asked.
			do("create, write, close", map[string]int{"make": 1, "write": 1, "flush": 1},
				func() error { return createWorkload(unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY)(p, buf) })
			do("create another, and look at the directory in between", map[string]int{"make": 1, "write": 1, "flush": 1},
				func() error {
					if _, err := os.Stat(dir); err != nil {
						return err
					}
					return createWorkload(unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY)(p+"2", buf)
				})
			do("stat what was just written", map[string]int{},
				func() error { _, err := os.Stat(p); return err })
			do("stat again", map[string]int{},
				func() error { _, err := os.Stat(p); return err })
			do("read what was just written", map[string]int{"read": 1},
				func() error { return readWorkload(p, buf) })
			do("read again", map[string]int{},
				func() error { return readWorkload(p, buf) })
			do("stat what was just read", map[string]int{},
				func() error { _, err := os.Stat(p); return err })
			do("chmod and stat", map[string]int{"setattr": 1},
				func() error {
					if err := os.Chmod(p, 0o600); err != nil {
						return err
					}
					st, err := os.Stat(p)
					if err == nil && st.Mode().Perm() != 0o600 {
						err = fmt.Errorf("mode %v", st.Mode())
					}
					return err
				})
			do("absent", map[string]int{}, func() error { os.Stat(p + "absent"); return nil })
			do("absent again", map[string]int{}, func() error { os.Stat(p + "absent"); return nil })
			do("unlink", map[string]int{"unlink": 1}, func() error { return os.Remove(p) })
			do("unlinked", map[string]int{}, func() error { os.Stat(p); return nil })
			do("rename", map[string]int{"rename": 1}, func() error { return os.Rename(p+"2", p) })
			do("the old name", map[string]int{}, func() error { os.Stat(p + "2"); return nil })
			for range 2 {
				if err := createWorkload(unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY)(p+"2", buf); err != nil {
					t.Fatal(err)
				}
				do("rename over", map[string]int{"rename": 1}, func() error { return os.Rename(p+"2", p) })
				do("what it left", map[string]int{}, func() error {
					os.Stat(p + "2")
					_, err := os.Stat(p)
					return err
				})
			}
			do("make what is there", map[string]int{}, func() error {
				if err := os.Mkdir(p, 0o755); !errors.Is(err, fs.ErrExist) {
					return fmt.Errorf("mkdir: %v", err)
				}
				return nil
			})
			if err := os.Link(p, p+"2"); err != nil {
				t.Fatal(err)
			}
			if err := unix.Rename(p, p+"2"); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(p); err != nil {
				t.Errorf("rename of one name of a file over another: %v", err)
			}
		})
	}
}

// TestRewriteRoundTrips: to write anew what another client made costs the truncation, the write and
// the close, and no question about what a truncation takes away.
func TestRewriteRoundTrips(t *testing.T) {
	fs := memfs.New()
	c := &counter{n: map[string]int{}}
	m := newMount(t, fs, Options{}, func(h fsop.Handler) fsop.Handler { c.next = h; return c })
	if _, err := fs.Session(nil).Do(t.Context(), &fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: "f", Mode: 0o644}}); err != nil {
		t.Fatal(err)
	}
	p := filepath.Join(m.dir, "f")
	for range 2 {
		if _, err := os.Stat(p); err != nil {
			t.Fatal(err)
		}
		c.take()
		if err := createWorkload(unix.O_TRUNC|unix.O_WRONLY)(p, make([]byte, 4096)); err != nil {
			t.Fatal(err)
		}
		if got, want := c.take(), map[string]int{"setattr": 1, "write": 1, "flush": 1}; !maps.Equal(got, want) {
			t.Errorf("rewrite: %v, want %v", got, want)
		}
	}
	// Who gives it a capability is told of it, whatever was remembered.
	if err := unix.Setxattr(p, capability, []byte{0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.Getxattr(p, capability, make([]byte, 100)); err != nil || n != 20 {
		t.Errorf("the capability: %d bytes, %v", n, err)
	}
}
