package fsx

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"
)

// The local file system is what the model was made after.
func TestLocal(t *testing.T) {
	for _, c := range []struct {
		name string
		o    Options
	}{
		{"one path", Options{}},
		{"verified through another", Options{Dirs: make([]string, 2)}},
		{"in turn", Options{Dirs: make([]string, 3), Turns: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			for seed := uint64(1); seed <= 12; seed++ {
				o := c.o
				o.Dirs = []string{dir}
				for len(o.Dirs) < len(c.o.Dirs) {
					o.Dirs = append(o.Dirs, dir)
				}
				o.Seed, o.Ops, o.Shrink = seed, 1000, 20*time.Second
				res, err := Run(o)
				if err != nil {
					t.Fatal(err)
				}
				if res.Ops != o.Ops || res.Kinds["write"] == 0 {
					t.Fatalf("%+v", res)
				}
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

// A file system that is wrong now and then is found out, and the sequence gets short.
func TestFailure(t *testing.T) {
	flip := func(path string, off int64) {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b := make([]byte, 1)
		if _, err := f.ReadAt(b, off); err == nil {
			b[0] ^= 4
			f.WriteAt(b, off)
		}
	}
	grow := func(path string) {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		os.Truncate(path, st.Size()+1)
	}
	for _, c := range []struct {
		name  string
		paths int
		after func(op Op, path string)
		words string
	}{
		{"a byte of a copy", 1, func(op Op, path string) {
			if op.Kind == Copy {
				flip(path, int64(op.Off))
			}
		}, "differ"},
		{"a byte next to a hole, seen elsewhere", 2, func(op Op, path string) {
			if op.Kind == Punch && op.Off > 0 {
				flip(path, int64(op.Off-1))
			}
		}, "differ, from"},
		{"the size after a truncate", 1, func(op Op, path string) {
			if op.Kind == TruncatePath {
				grow(path)
			}
		}, "stat through mount 0 says"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			o := Options{Dirs: []string{dir, dir}[:c.paths], Seed: 3, Ops: 3000, MaxSize: 100 << 10, Shrink: 20 * time.Second, after: c.after}
			_, err := Run(o)
			var f *Failure
			if !errors.As(err, &f) {
				t.Fatalf("the fault was not found: %v", err)
			}
			if !f.Short || len(f.Sequence) > 5 || !strings.Contains(f.What, c.words) {
				t.Errorf("%v", err)
			}
		})
	}
}
