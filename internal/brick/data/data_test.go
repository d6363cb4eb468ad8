package data

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"go.uber.org/goleak"

	"mortar/internal/brick/meta"
	"mortar/internal/cluster"
	"mortar/internal/disk"
	"mortar/internal/fsop"
	"mortar/internal/oplog"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newFiles(t *testing.T, idle int) (*Files, *disk.Mem) {
	t.Helper()
	fs := disk.NewMem()
	if err := fs.MkdirAll("/data", 0o700); err != nil {
		t.Fatal(err)
	}
	f := New(fs, "/data", idle)
	t.Cleanup(f.CloseAll)
	return f, fs
}

func TestFiles(t *testing.T) {
	fs, _ := newFiles(t, 2)
	if _, err := fs.Open(Name{1, 1}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("opening nothing: %v", err)
	}
	list := func() (names []Name) {
		if err := fs.List(func(n Name) error { names = append(names, n); return nil }); err != nil {
			t.Fatal(err)
		}
		return names
	}
	if got := list(); len(got) != 0 {
		t.Errorf("files before any: %v", got)
	}
	for i := range 10 {
		f, err := fs.Create(Name{fsop.Ino(i), 7})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte(fmt.Sprint("file ", i)), 0); err != nil {
			t.Fatal(err)
		}
		f.Release()
	}
	if got := list(); len(got) != 10 {
		t.Errorf("files: %v", got)
	}
	if n := len(fs.open); n > 2 {
		t.Errorf("%d unused files are open", n)
	}
	a, err := fs.Open(Name{3, 7})
	if err != nil {
		t.Fatal(err)
	}
	b, err := fs.Open(Name{3, 7})
	if err != nil {
		t.Fatal(err)
	}
	if a != b {
		t.Error("one file is open twice")
	}
	if err := fs.Remove(Name{3, 7}); err != nil {
		t.Fatal(err)
	}
	a.Release()
	p := make([]byte, 6)
	if _, err := b.ReadAt(p, 0); err != nil || string(p) != "file 3" {
		t.Errorf("a removed file that is still open: %q, %v", p, err)
	}
	b.Release()
	if _, err := fs.Open(Name{3, 7}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("opening a removed file: %v", err)
	}
	if err := fs.Remove(Name{3, 7}); err != nil {
		t.Errorf("removing twice: %v", err)
	}
	// Making a file again makes it empty.
	c, err := fs.Create(Name{4, 7})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Release()
	if st, err := c.Stat(); err != nil || st.Size() != 0 {
		t.Errorf("a file made again: %v, %v", st, err)
	}
}

func TestNames(t *testing.T) {
	f := New(disk.NewMem(), "d", 1)
	for _, n := range []Name{{0, 0}, {0xab, 1}, {1<<64 - 1, 1<<64 - 1}} {
		base := f.fs.PathBase(f.Path(n))
		if got, ok := parseName(base); !ok || got != n {
			t.Errorf("%v: %q is read as %v, %v", n, base, got, ok)
		}
	}
	for _, s := range []string{"", "x", "1.2", "000000000000000g.0000000000000000", "0000000000000000-0000000000000000"} {
		if n, ok := parseName(s); ok {
			t.Errorf("%q is read as %v", s, n)
		}
	}
}

// TestSettle settles random extents, in several steps, into a file and into
// memory, and compares both with a byte slice.
func TestSettle(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 1))
		files, fs := newFiles(t, 1)
		log, err := oplog.Open(oplog.Options{FS: fs, Dir: "/log", SegmentSize: 64 << 10})
		if err != nil {
			t.Fatal(err)
		}
		f, err := files.Create(Name{1, 1})
		if err != nil {
			t.Fatal(err)
		}
		const size = 64 << 10
		want := make([]byte, size)
		var length uint64
		var inline []byte
		for range 1 + rng.IntN(4) {
			var exts []meta.Extent
			for at := uint64(rng.IntN(9000)); at < size; {
				n := uint64(1 + rng.IntN(9000))
				if rng.IntN(2) == 0 {
					at, n = at/4096*4096+4096, (n/4096+1)*4096
				}
				if at+n > size {
					break
				}
				e := meta.Extent{Off: at, Len: n}
				switch rng.IntN(4) {
				case 0:
					e.Zero = true
					clear(want[at : at+n])
				case 1:
					e.Zero, e.Alloc = true, true
					clear(want[at : at+n])
				default:
					p := make([]byte, n)
					for i := range p {
						p[i] = byte(rng.IntN(255) + 1)
					}
					copy(want[at:], p)
					loc, err := log.Append(cluster.Pos{Epoch: 1, Seq: log.Tail().Seq + 1}, p, int(n)*rng.IntN(2))
					if err != nil {
						t.Fatal(err)
					}
					e.Segment, e.LogOff = loc.Segment, loc.Off
				}
				exts = append(exts, e)
				at += n + uint64(rng.IntN(9000))
			}
			if length, err = Settle(f, log, exts, length); err != nil {
				t.Fatal(err)
			}
			if inline, err = SettleInline(inline, log, exts); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, size)
			if _, err := f.ReadAt(got, 0); err != nil && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("seed %d: the file differs", seed)
			}
			if !bytes.Equal(append(bytes.Clone(inline), make([]byte, size-len(inline))...), want) {
				t.Fatalf("seed %d: the contents in memory differ", seed)
			}
			if uint64(len(inline)) != length || !bytes.Equal(want[length:], make([]byte, size-length)) {
				t.Fatalf("seed %d: length %d of the file, %d in memory", seed, length, len(inline))
			}
		}
		f.Release()
		files.CloseAll()
		if err := log.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestShorten(t *testing.T) {
	files, _ := newFiles(t, 1)
	f, err := files.Create(Name{1, 1})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Release()
	for _, c := range []struct{ size, length, want int64 }{{100, 50, 50}, {100, 100, 100}, {100, 200, 100}, {0, 5, 0}} {
		if err := f.Truncate(c.size); err != nil {
			t.Fatal(err)
		}
		if err := f.Shorten(uint64(c.length)); err != nil {
			t.Fatal(err)
		}
		if st, err := f.Stat(); err != nil || st.Size() != c.want {
			t.Errorf("%d bytes shortened to %d: %d, %v", c.size, c.length, st.Size(), err)
		}
	}
}
