package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// everyFS runs a test on every implementation, in a directory of its own.
func everyFS(t *testing.T, test func(t *testing.T, fs FS, dir string)) {
	t.Run("OS", func(t *testing.T) { test(t, OS, t.TempDir()) })
	over := NewOverlay(NewMem())
	defer over.Close()
	for name, fs := range map[string]FS{"Mem": NewMem(), "Faulty": NewFaulty(NewMem()), "Overlay": over} {
		t.Run(name, func(t *testing.T) {
			if err := fs.MkdirAll("/d", 0o700); err != nil {
				t.Fatal(err)
			}
			test(t, fs, "/d")
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, fs FS, name string, flag int) File {
	t.Helper()
	f, err := fs.OpenFile(name, flag)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func size(t *testing.T, f File) int64 {
	t.Helper()
	st, err := f.Stat()
	must(t, err)
	return st.Size()
}

func contents(t *testing.T, f File) []byte {
	t.Helper()
	b := make([]byte, size(t, f))
	if n, err := f.ReadAt(b, 0); n != len(b) {
		t.Fatalf("read %d of %d bytes: %v", n, len(b), err)
	}
	return b
}

func TestOpenFlags(t *testing.T) {
	everyFS(t, func(t *testing.T, fs FS, dir string) {
		name := fs.PathJoin(dir, "f")
		if _, err := fs.OpenFile(name, os.O_RDWR); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("opening what is not there: %v", err)
		}
		f := open(t, fs, name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
		if _, err := fs.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL); !errors.Is(err, os.ErrExist) {
			t.Fatalf("making what is there: %v", err)
		}
		_, err := f.WriteAt([]byte("hello"), 0)
		must(t, err)
		r := open(t, fs, name, os.O_RDONLY)
		if got := contents(t, r); string(got) != "hello" {
			t.Fatalf("contents %q", got)
		}
		if _, err := r.WriteAt([]byte("x"), 0); !errors.Is(err, syscall.EBADF) {
			t.Fatalf("writing a file opened for reading: %v", err)
		}
		if n, err := r.ReadAt(make([]byte, 3), 4); n != 1 || err != io.EOF {
			t.Fatalf("reading over the end: %d, %v", n, err)
		}
		tr := open(t, fs, name, os.O_RDWR|os.O_TRUNC)
		if n := size(t, tr); n != 0 {
			t.Fatalf("size %d after O_TRUNC", n)
		}
		must(t, tr.Close())
		if _, err := tr.ReadAt(make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) {
			t.Fatalf("reading a closed file: %v", err)
		}
		if err := tr.Close(); !errors.Is(err, os.ErrClosed) {
			t.Fatalf("closing twice: %v", err)
		}
	})
}

// TestFileModel compares random operations with a byte slice.
func TestFileModel(t *testing.T) {
	everyFS(t, func(t *testing.T, fs FS, dir string) {
		rng := rand.New(rand.NewPCG(1, 2))
		src := open(t, fs, fs.PathJoin(dir, "src"), os.O_RDWR|os.O_CREATE)
		pattern := make([]byte, 64<<10)
		for i := range pattern {
			pattern[i] = byte(rng.Uint32())
		}
		_, err := src.WriteAt(pattern, 0)
		must(t, err)

		f := open(t, fs, fs.PathJoin(dir, "f"), os.O_RDWR|os.O_CREATE)
		var model []byte
		grow := func(n int) {
			if n > len(model) {
				model = append(model, make([]byte, n-len(model))...)
			}
		}
		for range 400 {
			off, n := rng.IntN(60<<10), 1+rng.IntN(20<<10)
			if rng.IntN(2) == 0 {
				off = off &^ (BlockSize - 1)
			}
			switch rng.IntN(6) {
			case 0:
				from := rng.IntN(len(pattern) - n)
				_, err := f.WriteAt(pattern[from:from+n], int64(off))
				must(t, err)
				grow(off + n)
				copy(model[off:], pattern[from:from+n])
			case 1:
				must(t, f.Truncate(int64(off)))
				grow(off)
				model = model[:off]
			case 2:
				must(t, f.PunchHole(int64(off), int64(n)))
				if off < len(model) {
					clear(model[off:min(off+n, len(model))])
				}
			case 3:
				must(t, f.Allocate(int64(off), int64(n)))
				grow(off + n)
			case 4:
				from := rng.IntN((len(pattern)-n)/BlockSize+1) * BlockSize
				must(t, f.CloneRange(src, int64(from), int64(off), int64(n)))
				grow(off + n)
				copy(model[off:], pattern[from:from+n])
			case 5:
				must(t, f.SyncData())
			}
			if got := contents(t, f); !bytes.Equal(got, model) {
				t.Fatalf("contents differ from the model's: %d and %d bytes", len(got), len(model))
			}
		}
		must(t, f.Evict(BlockSize, 3*BlockSize))
		must(t, f.Evict(0, 0))
		if got := contents(t, f); !bytes.Equal(got, model) {
			t.Fatal("contents differ after Evict")
		}
	})
}

func TestBadRanges(t *testing.T) {
	everyFS(t, func(t *testing.T, fs FS, dir string) {
		f := open(t, fs, fs.PathJoin(dir, "f"), os.O_RDWR|os.O_CREATE)
		_, err := f.WriteAt([]byte("abc"), 0)
		must(t, err)
		for name, err := range map[string]error{
			"truncate to a negative size": f.Truncate(-1),
			"allocate nothing":            f.Allocate(0, 0),
			"allocate before the start":   f.Allocate(-1, 5),
			"punch nothing":               f.PunchHole(0, 0),
			"punch before the start":      f.PunchHole(-1, 5),
			"clone from before the start": f.CloneRange(f, -1, 0, 5),
			"clone from beyond the end":   f.CloneRange(f, 0, 8192, 4096),
		} {
			if err == nil {
				t.Errorf("%s: no error", name)
			}
		}
		if _, err := f.WriteAt([]byte("x"), -1); err == nil {
			t.Error("write before the start: no error")
		}
		if got := contents(t, f); !bytes.HasPrefix(got, []byte("abc")) {
			t.Errorf("contents %q", got)
		}
	})
}

func TestNames(t *testing.T) {
	everyFS(t, func(t *testing.T, fs FS, dir string) {
		at := func(name string) string { return fs.PathJoin(dir, name) }
		must(t, WriteFile(fs, at("a"), []byte("one")))
		must(t, WriteFile(fs, at("a"), []byte("two")))
		if b, err := ReadFile(fs, at("a"), 10); err != nil || string(b) != "two" {
			t.Fatalf("%q, %v", b, err)
		}
		if _, err := ReadFile(fs, at("a"), 2); err == nil {
			t.Fatal("a file larger than its limit was read")
		}
		must(t, WriteFile(fs, at("empty"), nil))
		if b, err := ReadFile(fs, at("empty"), 10); err != nil || len(b) != 0 {
			t.Fatalf("%q, %v", b, err)
		}
		must(t, fs.MkdirAll(at("x/y"), 0o700))
		must(t, fs.Link(at("a"), at("x/b")))
		must(t, fs.Rename(at("a"), at("x/c")))
		f := open(t, fs, at("x/c"), os.O_RDWR)
		must(t, fs.Remove(at("x/c")))
		must(t, fs.Remove(at("x/b")))
		if got := contents(t, f); string(got) != "two" {
			t.Fatalf("an open file without a name has %q", got)
		}
		if err := fs.Remove(at("x")); err == nil {
			t.Fatal("a directory with entries was removed")
		}
		names, err := fs.List(dir)
		must(t, err)
		slices.Sort(names)
		if want := []string{"empty", "x"}; !slices.Equal(names, want) {
			t.Fatalf("names %q, want %q", names, want)
		}
		must(t, fs.RemoveAll(at("x")))
		must(t, fs.RemoveAll(at("x")))
		if _, err := fs.Stat(at("x")); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("stat of what was removed: %v", err)
		}
		for name, err := range map[string]error{
			"rename": fs.Rename(at("no"), at("way")),
			"remove": fs.Remove(at("no")),
			"sync":   fs.SyncDir(at("no")),
			"list":   func() error { _, err := fs.List(at("no")); return err }(),
			"statfs": func() error { _, err := fs.Statfs(at("no")); return err }(),
		} {
			if !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s of what is not there: %v", name, err)
			}
		}
		if s, err := fs.Statfs(dir); err != nil || s.Total < s.Free || s.Free < s.Avail || s.Avail == 0 || s.Filesystem == "" {
			t.Errorf("statfs %+v, %v", s, err)
		}
	})
}

func TestLock(t *testing.T) {
	everyFS(t, func(t *testing.T, fs FS, dir string) {
		name := fs.PathJoin(dir, "LOCK")
		l, err := fs.Lock(name)
		must(t, err)
		if _, err := fs.Lock(name); err == nil {
			t.Fatal("locked twice")
		}
		must(t, l.Close())
		l, err = fs.Lock(name)
		must(t, err)
		must(t, l.Close())
	})
}

// quiet keeps the KV from printing what it does.
type quiet struct{}

func (quiet) Infof(string, ...any)              {}
func (quiet) Errorf(string, ...any)             {}
func (quiet) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }

// TestKV runs the KV on every FS.
func TestKV(t *testing.T) {
	everyFS(t, func(t *testing.T, fs FS, dir string) {
		dir = fs.PathJoin(dir, "kv")
		for round := range 2 {
			db, err := pebble.Open(dir, &pebble.Options{FS: fs, Logger: quiet{}})
			must(t, err)
			for i := range 1000 {
				k := []byte{byte(i >> 8), byte(i)}
				if round == 1 {
					v, c, err := db.Get(k)
					must(t, err)
					if !bytes.Equal(v, k) {
						t.Fatalf("%x has %x", k, v)
					}
					must(t, c.Close())
				}
				must(t, db.Set(k, k, pebble.NoSync))
			}
			must(t, db.Flush())
			must(t, db.Compact(t.Context(), []byte{0}, []byte{255}, false))
			must(t, db.Close())
		}
	})
}

// TestCloneShares needs a file system that can share blocks; where TMPDIR is
// none, CloneRange copies, which TestFileModel has checked.
func TestCloneShares(t *testing.T) {
	dir := t.TempDir()
	a := open(t, OS, filepath.Join(dir, "a"), os.O_RDWR|os.O_CREATE)
	_, err := a.WriteAt(bytes.Repeat([]byte("block"), 1<<20), 0)
	must(t, err)
	must(t, a.Sync())
	b := open(t, OS, filepath.Join(dir, "b"), os.O_RDWR|os.O_CREATE)
	before, err := OS.Statfs(dir)
	must(t, err)
	must(t, b.CloneRange(a, 0, 0, 5<<20))
	must(t, b.Sync())
	after, err := OS.Statfs(dir)
	must(t, err)
	t.Logf("%s: cloning %d bytes took %d bytes of space", after.Filesystem, 5<<20, int64(before.Free)-int64(after.Free))
	if !bytes.Equal(contents(t, a), contents(t, b)) {
		t.Fatal("the clone differs")
	}
}

// TestOverlayOverFiles changes files that the lower FS has, and compares with a
// disk that was changed alike.
func TestOverlayOverFiles(t *testing.T) {
	lower, model := NewMem(), NewMem()
	for _, m := range []*Mem{lower, model} {
		must(t, m.MkdirAll("/d/sub", 0o700))
		for i := range 6 {
			b := bytes.Repeat([]byte{byte('a' + i)}, 3000*i)
			must(t, WriteFile(m, "/d/"+string(rune('a'+i)), b))
			must(t, WriteFile(m, "/d/sub/"+string(rune('a'+i)), b))
		}
	}
	before := lower.String()
	over := NewOverlay(lower)
	defer over.Close()
	rng := rand.New(rand.NewPCG(3, 4))
	for step := range 1500 {
		dir := []string{"/d", "/d/sub"}[rng.IntN(2)]
		name, other := dir+"/"+string(rune('a'+rng.IntN(8))), "/d/"+string(rune('a'+rng.IntN(8)))
		off, n := rng.Int64N(20000), 1+rng.Int64N(9000)
		op := rng.IntN(9)
		do := func(fs FS) error {
			switch op {
			case 0:
				return fs.Remove(name)
			case 1:
				return fs.Rename(name, other)
			case 2:
				return fs.Link(name, other)
			case 3:
				f, err := fs.Create(name, vfs.WriteCategoryUnspecified)
				if err == nil {
					_, err = f.Write([]byte("created"))
					f.Close()
				}
				return err
			}
			f, err := fs.OpenFile(name, os.O_RDWR)
			if err != nil {
				return err
			}
			defer f.Close()
			switch op {
			case 4:
				return f.Truncate(off)
			case 5:
				return f.PunchHole(off, n)
			case 6:
				return f.Allocate(off, n)
			case 7:
				return f.CloneRange(f, 0, 10000, min(n, size(t, f)))
			}
			_, err = f.WriteAt(bytes.Repeat([]byte("w"), int(n)), off)
			return err
		}
		got, want := do(over), do(model)
		if (got == nil) != (want == nil) || errors.Is(got, os.ErrNotExist) != errors.Is(want, os.ErrNotExist) {
			t.Fatalf("step %d, op %d on %s: %v, want %v", step, op, name, got, want)
		}
		for _, dir := range []string{"/d", "/d/sub"} {
			got, err := over.List(dir)
			must(t, err)
			want, err := model.List(dir)
			must(t, err)
			if !slices.Equal(got, want) {
				t.Fatalf("step %d: %s has %q, want %q", step, dir, got, want)
			}
		}
		if want, err := ReadFile(model, name, 1<<20); err == nil {
			if got, err := ReadFile(over, name, 1<<20); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("step %d, op %d: %s has %d bytes, want %d: %v", step, op, name, len(got), len(want), err)
			}
		}
	}
	must(t, over.RemoveAll("/d"))
	if _, err := over.List("/d"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("list of a removed directory: %v", err)
	}
	must(t, over.MkdirAll("/d", 0o700))
	if names, err := over.List("/d"); err != nil || len(names) != 0 {
		t.Errorf("a removed directory that was made again has %q, %v", names, err)
	}
	if after := lower.String(); after != before {
		t.Errorf("the lower disk was changed from\n%sto\n%s", before, after)
	}
}

// TestOverlayKV uses a KV of the lower FS, and leaves it as it is.
func TestOverlayKV(t *testing.T) {
	dir := t.TempDir()
	db, err := pebble.Open(dir, &pebble.Options{FS: OS, Logger: quiet{}})
	must(t, err)
	must(t, db.Set([]byte("k"), []byte("lower"), pebble.Sync))
	must(t, db.Close())
	for range 2 {
		over := NewOverlay(OS)
		db, err = pebble.Open(dir, &pebble.Options{FS: over, Logger: quiet{}})
		must(t, err)
		v, c, err := db.Get([]byte("k"))
		must(t, err)
		if string(v) != "lower" {
			t.Fatalf("%q", v)
		}
		must(t, c.Close())
		must(t, db.Set([]byte("k"), []byte("upper"), pebble.Sync))
		must(t, db.Flush())
		must(t, db.Close())
		over.Close()
	}
}

func TestMemLimit(t *testing.T) {
	m := NewMem()
	m.SetLimit(10 * BlockSize)
	f := open(t, m, "/f", os.O_RDWR|os.O_CREATE)
	must(t, f.Allocate(0, 6*BlockSize))
	g := open(t, m, "/g", os.O_RDWR|os.O_CREATE)
	_, err := g.WriteAt(make([]byte, 4*BlockSize), 100) // five blocks
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("writing over the limit: %v", err)
	}
	if size(t, g) != 0 || m.Used() != 6*BlockSize {
		t.Fatalf("after ENOSPC: size %d, %d bytes used", size(t, g), m.Used())
	}
	_, err = g.WriteAt(make([]byte, 4*BlockSize), 0)
	must(t, err)
	_, err = f.WriteAt(make([]byte, 6*BlockSize), 0) // has its space already
	must(t, err)
	if err := f.Allocate(0, 7*BlockSize); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("allocating over the limit: %v", err)
	}
	must(t, f.PunchHole(0, 2*BlockSize))
	must(t, g.Truncate(BlockSize+1))
	if s, err := m.Statfs("/"); err != nil || s.Free != 4*BlockSize {
		t.Fatalf("%+v, %v", s, err)
	}
	must(t, m.Remove("/g"))
	must(t, f.Truncate(0))
	if m.Used() != 0 {
		t.Fatalf("%d bytes used by nothing", m.Used())
	}
	_, err = g.WriteAt(make([]byte, 20*BlockSize), 0) // has no name: as if on another disk
	must(t, err)
	if m.Used() != 0 {
		t.Fatalf("%d bytes used by a file without a name", m.Used())
	}
}

func TestMemCrash(t *testing.T) {
	seen := map[string]int{}
	for seed := range uint64(200) {
		m := NewMem()
		must(t, m.MkdirAll("/d", 0o700))
		must(t, m.SyncDir("/"))
		f := open(t, m, "/d/f", os.O_RDWR|os.O_CREATE)
		must(t, m.SyncDir("/d"))
		old := bytes.Repeat([]byte("o"), 3*BlockSize)
		_, err := f.WriteAt(old, 0)
		must(t, err)
		must(t, f.SyncData())
		_, err = f.WriteAt(bytes.Repeat([]byte("n"), 2*BlockSize), BlockSize+100)
		must(t, err)
		lost := open(t, m, "/d/lost", os.O_RDWR|os.O_CREATE)
		_, err = lost.WriteAt([]byte("synced, but its name is not"), 0)
		must(t, err)
		must(t, lost.Sync())
		must(t, m.Rename("/d/lost", "/d/renamed"))

		c := m.Crash(rand.New(rand.NewPCG(seed, 0)))
		g := open(t, c, "/d/f", os.O_RDWR)
		got := contents(t, g)
		if len(got) < 3*BlockSize || len(got) > 3*BlockSize+100 {
			t.Fatalf("seed %d: size %d", seed, len(got))
		}
		if !bytes.Equal(got[:BlockSize+100], old[:BlockSize+100]) {
			t.Fatalf("seed %d: synced bytes have changed", seed)
		}
		n := bytes.Count(got[BlockSize+100:3*BlockSize], []byte("n"))
		if n+bytes.Count(got[BlockSize+100:3*BlockSize], []byte("o")) != 2*BlockSize-100 {
			t.Fatalf("seed %d: bytes that nobody wrote", seed)
		}
		switch n {
		case 0:
			seen["nothing"]++
		case 2*BlockSize - 100:
			seen["all"]++
		default:
			seen["some"]++
		}
		names, err := c.List("/d")
		must(t, err)
		switch {
		case slices.Contains(names, "lost") && slices.Contains(names, "renamed"):
			t.Fatalf("seed %d: names %q", seed, names)
		case slices.Contains(names, "lost"):
			seen["lost"]++
		case slices.Contains(names, "renamed"):
			seen["renamed"]++
		default:
			seen["no name"]++
		}
		// The new disk is all synced: crashing it again changes nothing.
		cc := c.Crash(rand.New(rand.NewPCG(seed, 1)))
		if again := contents(t, open(t, cc, "/d/f", os.O_RDONLY)); !bytes.Equal(got, again) {
			t.Fatalf("seed %d: the second crash lost something", seed)
		}
		// And the old one is as it was.
		if n := bytes.Count(contents(t, f), []byte("n")); n != 2*BlockSize {
			t.Fatalf("seed %d: the crash changed the disk that it was asked of", seed)
		}
		// The two share nothing.
		_, err = g.WriteAt([]byte("zzzz"), 0)
		must(t, err)
		if contents(t, f)[0] != 'o' {
			t.Fatal("a write after the crash reached the old disk")
		}
	}
	for _, what := range []string{"nothing", "all", "some", "lost", "renamed", "no name"} {
		if seen[what] == 0 {
			t.Errorf("200 crashes never left %s: %v", what, seen)
		}
	}
	one := NewMem()
	f := open(t, one, "/f", os.O_RDWR|os.O_CREATE)
	_, err := f.WriteAt(make([]byte, 100<<10), 0)
	must(t, err)
	must(t, one.SyncDir("/"))
	a := one.Crash(rand.New(rand.NewPCG(7, 7))).String()
	if b := one.Crash(rand.New(rand.NewPCG(7, 7))).String(); a != b {
		t.Errorf("one seed, two crashes:\n%s%s", a, b)
	}
}

func TestFaults(t *testing.T) {
	boom := errors.New("boom")
	t.Run("which calls", func(t *testing.T) {
		fs := NewFaulty(NewMem(), Fault{Op: OpWrite, Path: "*.log", Skip: 1, Times: 2, Err: boom})
		log := open(t, fs, "/1.log", os.O_RDWR|os.O_CREATE)
		other := open(t, fs, "/other", os.O_RDWR|os.O_CREATE)
		for i, want := range []error{nil, boom, boom, nil} {
			_, err := other.WriteAt([]byte("x"), 0)
			must(t, err)
			if _, err := log.WriteAt([]byte("x"), int64(i)); !errors.Is(err, want) {
				t.Errorf("write %d: %v, want %v", i, err, want)
			}
		}
		fs.Add(Fault{Err: syscall.EIO})
		for name, err := range map[string]error{
			"sync": log.Sync(), "fdatasync": log.SyncData(), "syncdir": fs.SyncDir("/"), "rename": fs.Rename("/1.log", "/2.log"),
			"remove": fs.Remove("/1.log"), "truncate": log.Truncate(0), "clone": log.CloneRange(other, 0, 0, 1),
			"mkdir": fs.MkdirAll("/d", 0o700), "read": func() error { _, err := log.ReadAt(make([]byte, 1), 0); return err }(),
		} {
			if !errors.Is(err, syscall.EIO) {
				t.Errorf("%s on a dead disk: %v", name, err)
			}
		}
		fs.Clear()
		must(t, log.Sync())
		must(t, fs.Rename("/1.log", "/2.old"))
		fs.Add(Fault{Path: "*.old", Err: boom})
		if err := log.Sync(); !errors.Is(err, boom) {
			t.Errorf("sync of a file that was renamed while open: %v", err)
		}
	})
	t.Run("torn write", func(t *testing.T) {
		fs := NewFaulty(NewMem(), Fault{Op: OpWrite, Err: boom, Torn: true})
		f := open(t, fs, "/f", os.O_RDWR|os.O_CREATE)
		if n, err := f.WriteAt([]byte("abcdef"), 0); n != 3 || !errors.Is(err, boom) {
			t.Fatalf("%d, %v", n, err)
		}
		if got := contents(t, f); string(got) != "abc" {
			t.Fatalf("contents %q", got)
		}
	})
	t.Run("hanging disk", func(t *testing.T) {
		until, asked := make(chan struct{}), make(chan struct{})
		fs := NewFaulty(NewMem(), Fault{Op: OpSync, Until: until})
		fs.Observe(func(op Op, name string) {
			if op == OpSync {
				close(asked)
			}
		})
		f := open(t, fs, "/f", os.O_RDWR|os.O_CREATE)
		done := make(chan error)
		go func() { done <- f.Sync() }()
		<-asked
		select {
		case err := <-done:
			t.Fatalf("the sync did not hang: %v", err)
		default:
		}
		close(until)
		must(t, <-done)
	})
	t.Run("the KV's files", func(t *testing.T) {
		fs := NewFaulty(NewMem(), Fault{Op: OpWrite, Path: "*.sst", Err: boom})
		f, err := fs.Create("/1.sst", vfs.WriteCategoryUnspecified)
		must(t, err)
		defer f.Close()
		if _, err := f.Write([]byte("x")); !errors.Is(err, boom) {
			t.Fatalf("%v", err)
		}
	})
}
