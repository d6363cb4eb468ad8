package mount

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
	"mortar/internal/proto"
)

// deaf passes on what it is told to take back, but for what it is to miss.
type deaf struct {
	m      *Mount
	misses atomic.Bool
}

func (d *deaf) Invalidate(ctx context.Context, seq uint64, effects []proto.Effect) error {
	if d.misses.Load() {
		return nil
	}
	return d.m.Invalidate(ctx, seq, effects)
}

// TestNamesOfADirectory: when another session gets the window of a directory, this mount knows
// nothing of its names any more, absent ones included. What is done to them then it is not told.
func TestNamesOfADirectory(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			mem := memfs.New()
			var ear *deaf
			var inos atomic.Uint64
			m := mountHandler(t, kind.o, func(m *Mount) fsop.Handler {
				ear = &deaf{m: m}
				h := mem.Session(ear)
				return fsop.HandlerFunc(func(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
					r, err := h.Do(ctx, op)
					if _, ok := op.(*fsop.Mkdir); ok && err == nil {
						inos.Store(uint64(r.Attr.Ino))
					}
					return r, err
				})
			})
			other := newMount(t, mem, Options{})
			d := m.sub(t)
			dir := fsop.Ino(inos.Load())
			there := filepath.Join(other.dir, filepath.Base(d))
			for _, name := range []string{"goes", "stays", "open"} {
				if err := os.WriteFile(filepath.Join(there, name), nil, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			names := func() (n int) {
				t.Helper()
				all, err := os.ReadDir(d)
				if err != nil {
					t.Fatal(err)
				}
				return len(all)
			}
			lstat := func(name string, want error) {
				t.Helper()
				if _, err := os.Lstat(filepath.Join(d, name)); !errors.Is(err, want) {
					t.Errorf("%s: %v, want %v", name, err, want)
				}
			}
			for range 2 { // so that they are cached
				names()
				lstat("goes", nil)
				lstat("stays", nil)
				lstat("comes", unix.ENOENT)
			}
			f, err := os.Open(filepath.Join(d, "open"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			m.nodes.entries.set(dir, "made", nothing)
			m.nodes.entries.doubt(dir, "made")
			if !m.Vacant(dir, "made") {
				t.Error("a name that was absent when it was asked to be made may have been made by somebody")
			}

			ear.misses.Store(true)
			for _, name := range []string{"goes", "open"} {
				if err := os.Remove(filepath.Join(there, name)); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(filepath.Join(there, "comes"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			lstat("goes", nil) // or nothing is shown
			lstat("comes", unix.ENOENT)
			if err := m.Invalidate(t.Context(), 1<<40, []proto.Effect{{Ino: dir, Names: true}}); err != nil {
				t.Fatal(err)
			}
			lstat("goes", unix.ENOENT)
			lstat("open", unix.ENOENT)
			lstat("stays", nil)
			lstat("comes", nil)
			if n := names(); n != 2 {
				t.Errorf("the listing has %d names, want 2", n)
			}
			if m.Vacant(dir, "made") {
				t.Error("a name that somebody may have made counts as absent")
			}
		})
	}
}
