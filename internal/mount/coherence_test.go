package mount

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"mortar/internal/fsop/memfs"
	"mortar/internal/pacer"
)

// kinds are the ways in which coherence must hold.
var kinds = []struct {
	name string
	o    Options
}{
	{"locks=cluster", Options{}},
	{"locks=node", Options{LocksNode: true}},
	{"no epoch", Options{noEpoch: true}},
	{"something mounted inside", Options{FsName: nestedName}},
}

// TestCoherence changes things through one mount that another has cached, and
// looks at once: nothing may be as it was.
func TestCoherence(t *testing.T) {
	rounds := 1500
	if testing.Short() {
		rounds = 200
	}
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			mem := memfs.New()
			a := newMount(t, mem, kind.o)
			b := newMount(t, mem, kind.o)
			rng := rand.New(rand.NewPCG(1, 2))
			dir := ""
			for i := range rounds {
				x, y := a.dir, b.dir
				if rng.IntN(2) == 0 {
					x, y = y, x
				}
				// Of a directory that it made itself a mount knows more than of others.
				if i%20 == 0 {
					dir = fmt.Sprint("dir", i)
					if err := os.Mkdir(filepath.Join(x, dir), 0o755); err != nil {
						t.Fatal(err)
					}
				}
				x, y = filepath.Join(x, dir), filepath.Join(y, dir)
				name := fmt.Sprint("f", rng.IntN(20))
				coherenceRound(t, rng, i, x, y, name, func() {
					// What the kernel dropped it asks for, and it is the mount that knows.
					if rng.IntN(2) == 0 {
						if err := errors.Join(a.dev.shrink(), b.dev.shrink()); err != nil {
							t.Fatal(err)
						}
					}
				})
				if t.Failed() {
					t.Fatalf("round %d", i)
				}
			}
		})
	}
}

// coherenceRound has y look at something, x change it, and y look again. In
// between it calls drop.
func coherenceRound(t *testing.T, rng *rand.Rand, i int, x, y, name string, drop func()) {
	px, py := filepath.Join(x, name), filepath.Join(y, name)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	absent := func(p string) {
		t.Helper()
		if _, err := os.Lstat(p); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v, want absent", p, err)
		}
	}
	holds := func(p string, want []byte) {
		t.Helper()
		got, err := os.ReadFile(p)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes %.20q, %v; want %d bytes %.20q", p, len(got), got, err, len(want), want)
		}
	}
	content := func() []byte { return fmt.Appendf(nil, "%d-%s", i, bytes.Repeat([]byte("x"), rng.IntN(9000))) }
	must(os.RemoveAll(px))
	switch what := rng.IntN(9); what {
	case 0: // absent, then made
		absent(py)
		drop()
		c := content()
		must(os.WriteFile(px, c, 0o644))
		holds(py, c)
	case 1: // overwritten in place, same size
		c := bytes.Repeat([]byte("a"), 1+rng.IntN(20000))
		must(os.WriteFile(px, c, 0o644))
		holds(py, c)
		f, err := os.OpenFile(px, os.O_WRONLY, 0)
		must(err)
		off := rng.IntN(len(c))
		c[off] = 'b'
		_, err = f.WriteAt([]byte("b"), int64(off))
		must(err)
		must(f.Close())
		holds(py, c)
	case 2: // removed
		must(os.WriteFile(px, content(), 0o644))
		_, err := os.Stat(py)
		must(err)
		drop()
		must(os.Remove(px))
		absent(py)
	case 3: // renamed over
		must(os.WriteFile(px, content(), 0o644))
		_, err := os.ReadFile(py)
		must(err)
		drop()
		absent(py + ".new")
		c := content()
		must(os.WriteFile(px+".new", c, 0o644))
		must(os.Rename(px+".new", px))
		holds(py, c)
		absent(py + ".new")
	case 4: // a directory renamed
		must(os.MkdirAll(filepath.Join(px, "sub"), 0o755))
		c := content()
		must(os.WriteFile(filepath.Join(px, "sub", "f"), c, 0o644))
		holds(filepath.Join(py, "sub", "f"), c)
		drop()
		must(os.Rename(px, px+".moved"))
		absent(filepath.Join(py, "sub", "f"))
		holds(filepath.Join(py+".moved", "sub", "f"), c)
		must(os.RemoveAll(px + ".moved"))
		absent(py + ".moved")
	case 5: // grown and cut
		must(os.WriteFile(px, []byte("1"), 0o644))
		st, err := os.Stat(py)
		must(err)
		drop()
		size := int64(rng.IntN(100000))
		must(os.Truncate(px, size))
		if st, err = os.Stat(py); err != nil || st.Size() != size {
			t.Errorf("size of %s: %v, want %d", py, st, size)
		}
	case 6: // listed
		must(os.Mkdir(px, 0o755))
		_, err := os.ReadDir(py)
		must(err)
		n := rng.IntN(5)
		for k := range n {
			must(os.WriteFile(filepath.Join(px, fmt.Sprint(k)), nil, 0o644))
		}
		list, err := os.ReadDir(py)
		if err != nil || len(list) != n {
			t.Errorf("%s lists %d, %v; want %d", py, len(list), err, n)
		}
	case 7: // mode and target
		must(os.Symlink("one", px))
		if to, err := os.Readlink(py); to != "one" {
			t.Errorf("%s → %q, %v", py, to, err)
		}
		must(os.Remove(px))
		must(os.Symlink("two", px))
		if to, err := os.Readlink(py); to != "two" {
			t.Errorf("%s → %q, %v", py, to, err)
		}
		must(os.Remove(px))
		must(os.WriteFile(px, nil, 0o600))
		_, err := os.Stat(py)
		must(err)
		drop()
		must(os.Chmod(px, 0o640))
		if st, err := os.Stat(py); err != nil || st.Mode().Perm() != 0o640 {
			t.Errorf("mode of %s: %v %v", py, st, err)
		}
	case 8: // renamed over by both in turn, and the one that was replaced is looked at
		must(os.WriteFile(px, content(), 0o644))
		for range 3 {
			must(os.RemoveAll(py + ".kept"))
			must(os.Link(py, py+".kept"))
			if st, err := os.Stat(px + ".kept"); err != nil || st.Sys().(*syscall.Stat_t).Nlink != 2 {
				t.Errorf("%s.kept: %v, %v; want 2 links", px, st, err)
			}
			c := content()
			must(os.WriteFile(py+".new", c, 0o644))
			drop()
			must(os.Rename(py+".new", py))
			for _, p := range []string{px, py} {
				holds(p, c)
				if st, err := os.Stat(p + ".kept"); err != nil || st.Sys().(*syscall.Stat_t).Nlink != 1 {
					t.Errorf("%s.kept: %v, %v; want 1 link", p, st, err)
				}
			}
			px, py = py, px
		}
		must(os.Remove(px + ".kept"))
		absent(py + ".kept")
	}
}

// TestRing has two mounts each make a name in one directory that the other has
// cached as absent, at once: each change waits for the other mount to forget
// the name, whose lock the other's change holds.
func TestRing(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			mem := memfs.New()
			a := newMount(t, mem, kind.o)
			b := newMount(t, mem, kind.o)
			var worst time.Duration
			given := pacer.New(t)
			for i := range 300 {
				na, nb := fmt.Sprint("a", i), fmt.Sprint("b", i)
				os.Lstat(filepath.Join(a.dir, nb))
				os.Lstat(filepath.Join(b.dir, na))
				began := given.Now()
				var wg sync.WaitGroup
				start := make(chan struct{})
				for _, p := range []string{filepath.Join(a.dir, na), filepath.Join(b.dir, nb)} {
					wg.Go(func() {
						<-start
						var err error
						if i%2 == 0 {
							err = os.Mkdir(p, 0o755)
						} else {
							err = os.WriteFile(p, []byte("x"), 0o644)
						}
						if err != nil {
							t.Error(err)
						}
					})
				}
				close(start)
				wg.Wait()
				worst = max(worst, given.Now()-began)
				for _, p := range []string{filepath.Join(a.dir, nb), filepath.Join(b.dir, na)} {
					if _, err := os.Lstat(p); err != nil {
						t.Errorf("round %d: %v", i, err)
					}
				}
			}
			t.Logf("worst ring: %v", worst)
			if worst > time.Second {
				t.Errorf("a ring took %v", worst)
			}
		})
	}
}

// TestConcurrent has several processes' worth of goroutines work on few files
// through two mounts, each file under its own mutex: whoever has it sees what
// the last one left, wherever that was done.
func TestConcurrent(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			mem := memfs.New()
			dirs := []string{newMount(t, mem, kind.o).dir, newMount(t, mem, kind.o).dir}
			const files = 6
			var mu [files]sync.Mutex
			var want [files][]byte // nil: absent
			var wg sync.WaitGroup
			for w := range 6 {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(w), 3))
					for range 300 {
						i := rng.IntN(files)
						p := filepath.Join(dirs[rng.IntN(2)], fmt.Sprint("c", i))
						mu[i].Lock()
						got, err := os.ReadFile(p)
						switch {
						case want[i] == nil && !errors.Is(err, fs.ErrNotExist):
							t.Errorf("%s: %v, want absent", p, err)
						case want[i] != nil && !bytes.Equal(got, want[i]):
							t.Errorf("%s: %.10q (%d), %v; want %.10q (%d)", p, got, len(got), err, want[i], len(want[i]))
						}
						switch rng.IntN(3) {
						case 0:
							want[i] = nil
							os.Remove(p)
						case 1:
							want[i] = bytes.Repeat([]byte{byte('a' + rng.IntN(26))}, 1+rng.IntN(10000))
							if err := os.WriteFile(p, want[i], 0o644); err != nil {
								t.Error(err)
							}
						case 2:
							c := bytes.Repeat([]byte{byte('a' + rng.IntN(26))}, 1+rng.IntN(10000))
							tmp := fmt.Sprint(p, ".", w)
							if err := os.WriteFile(tmp, c, 0o644); err != nil {
								t.Error(err)
							}
							if err := os.Rename(tmp, p); err != nil {
								t.Error(err)
							}
							want[i] = c
						}
						mu[i].Unlock()
						if t.Failed() {
							return
						}
					}
				})
			}
			wg.Wait()
		})
	}
}
