package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
	"mortar/internal/pacer"
	"mortar/internal/proto"
)

// gate lets tests hold operations up: before they are sent or, with a reply
// already made, before it is handed over.
type gate struct {
	next fsop.Handler
	mu   sync.Mutex
	stop func(op fsop.Op, replied bool) <-chan struct{}
	ctxs map[fsop.Kind]error // of the last context that ended in a hold, by kind
}

func (g *gate) Do(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
	if err := g.wait(ctx, op, false); err != nil {
		return nil, err
	}
	r, err := g.next.Do(ctx, op)
	if werr := g.wait(ctx, op, true); werr != nil {
		return nil, werr
	}
	return r, err
}

func (g *gate) wait(ctx context.Context, op fsop.Op, replied bool) error {
	g.mu.Lock()
	stop := g.stop
	g.mu.Unlock()
	if stop == nil {
		return nil
	}
	c := stop(op, replied)
	if c == nil {
		return nil
	}
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.ctxs == nil {
			g.ctxs = map[fsop.Kind]error{}
		}
		g.ctxs[op.Kind()] = ctx.Err()
		return ctx.Err()
	}
}

func (g *gate) set(stop func(op fsop.Op, replied bool) <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stop = stop
}

func gated(g *gate) func(fsop.Handler) fsop.Handler {
	return func(h fsop.Handler) fsop.Handler { g.next = h; return g }
}

// holdOnce holds the first operation that is, after its reply was made, and
// reports when it is held.
func holdOnce(g *gate, is func(fsop.Op) bool) (held <-chan struct{}, release func()) {
	h, r := make(chan struct{}), make(chan struct{})
	var once sync.Once
	g.set(func(op fsop.Op, replied bool) <-chan struct{} {
		if !replied || !is(op) {
			return nil
		}
		var c <-chan struct{}
		once.Do(func() { c = r; close(h) })
		return c
	})
	return h, func() { close(r) }
}

func kindIs(k fsop.Kind) func(fsop.Op) bool { return func(op fsop.Op) bool { return op.Kind() == k } }

func size(p string) int64 {
	st, err := os.Lstat(p)
	if errors.Is(err, fs.ErrNotExist) {
		return -1
	}
	if err != nil {
		return -2
	}
	return st.Size()
}

// TestOvertaken has a change overtake a reply that was made before it: the
// change's invalidation is carried out before the reply reaches the kernel, which
// must then not use it for anything but the system call that asked.
func TestOvertaken(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			for _, tc := range []struct {
				name   string
				held   fsop.Kind
				before func(t *testing.T, p string)
				ask    func(p string)
				change func(t *testing.T, o fsop.Handler, p string)
				want   int64
			}{
				{name: "size at lookup", held: fsop.KindLookup,
					ask:    func(p string) { size(p) },
					change: func(t *testing.T, o fsop.Handler, p string) { writeVia(t, o, p, "longer") }, want: 6},
				{name: "size at getattr", held: fsop.KindGetattr,
					before: func(t *testing.T, p string) { size(p) },
					ask:    func(p string) { size(p) },
					change: func(t *testing.T, o fsop.Handler, p string) { writeVia(t, o, p, "longer") }, want: 6},
				{name: "size at readdirplus", held: fsop.KindReaddir,
					ask:    func(p string) { os.ReadDir(filepath.Dir(p)) },
					change: func(t *testing.T, o fsop.Handler, p string) { writeVia(t, o, p, "longer") }, want: 6},
				{name: "size at setattr", held: fsop.KindSetattr,
					before: func(t *testing.T, p string) { size(p) },
					ask:    func(p string) { os.Chmod(p, 0o600) },
					change: func(t *testing.T, o fsop.Handler, p string) { writeVia(t, o, p, "longer") }, want: 6},
				{name: "name at setattr", held: fsop.KindSetattr,
					before: func(t *testing.T, p string) { size(p) },
					ask:    func(p string) { os.Chmod(p, 0o600) },
					change: func(t *testing.T, o fsop.Handler, p string) { unlinkVia(t, o, p) }, want: -1},
			} {
				t.Run(tc.name, func(t *testing.T) {
					mem := memfs.New()
					g := &gate{}
					m := newMount(t, mem, kind.o, gated(g))
					other := mem.Session(nil)
					p := filepath.Join(m.dir, "f")
					if err := os.WriteFile(p, []byte("1"), 0o644); err != nil {
						t.Fatal(err)
					}
					if err := m.DropAll(t.Context()); err != nil {
						t.Fatal(err)
					}
					if tc.before != nil {
						tc.before(t, p)
						m.Invalidate(t.Context(), 0, []proto.Effect{{Ino: inoOf(t, other, p)}})
					}
					held, release := holdOnce(g, kindIs(tc.held))
					asked := make(chan struct{})
					go func() { tc.ask(p); close(asked) }()
					select {
					case <-held:
					case <-asked:
						t.Fatal("the kernel did not ask")
					}
					changed := make(chan struct{})
					go func() { tc.change(t, other, p); close(changed) }()
					select {
					case <-changed:
					case <-time.After(100 * time.Millisecond): // it waits for the reply: also right
					}
					release()
					<-asked
					<-changed
					g.set(nil)
					if got := size(p); got != tc.want {
						t.Errorf("size %d, want %d (-1: absent)", got, tc.want)
					}
				})
			}
		})
	}
}

func inoOf(t *testing.T, h fsop.Handler, p string) fsop.Ino {
	t.Helper()
	r, err := h.Do(t.Context(), &fsop.Lookup{Parent: fsop.RootIno, Name: filepath.Base(p)})
	if err != nil {
		t.Fatal(err)
	}
	return r.Attr.Ino
}

func writeVia(t *testing.T, h fsop.Handler, p, data string) {
	if _, err := h.Do(t.Context(), &fsop.Write{Ino: inoOf(t, h, p), Data: []byte(data)}); err != nil {
		t.Error(err)
	}
}

func unlinkVia(t *testing.T, h fsop.Handler, p string) {
	if _, err := h.Do(t.Context(), &fsop.Unlink{Parent: fsop.RootIno, Name: filepath.Base(p)}); err != nil {
		t.Error(err)
	}
}

// TestOvertakenListing lists a large directory while names come and go behind
// the reader's back: what is listed from a reply made earlier must not be cached.
func TestOvertakenListing(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			mem := memfs.New()
			m := newMount(t, mem, kind.o)
			other := mem.Session(nil)
			const n = 600
			for i := range n {
				_, err := other.Do(t.Context(), &fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: fmt.Sprintf("f%03d", i), Mode: 0o644}})
				if err != nil {
					t.Fatal(err)
				}
			}
			d, err := os.Open(m.dir)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			seen, err := d.ReadDir(20) // the mount has more by now
			if err != nil {
				t.Fatal(err)
			}
			last := filepath.Join(m.dir, fmt.Sprintf("f%03d", n-1))
			unlinkVia(t, other, last)
			rest, err := d.ReadDir(-1)
			if err != nil {
				t.Fatal(err)
			}
			if got := len(seen) + len(rest); got != n && got != n-1 {
				t.Errorf("listed %d names", got)
			}
			if size(last) != -1 {
				t.Error("a name that was gone is back")
			}
			// What the kernel was told is held, and nothing else.
			held := m.Holds()
			known := map[fsop.Ino]uint64{}
			for _, h := range held {
				known[h.Ino] += h.N
			}
			if len(known) > n+1 {
				t.Errorf("%d inodes held, there were %d", len(known), n+1)
			}
		})
	}
}

// TestHolds counts as the replica does: what replies named, less what was
// forgotten, is what is held.
func TestHolds(t *testing.T) {
	for _, kind := range kinds[:2] {
		t.Run(kind.name, func(t *testing.T) {
			mem := memfs.New()
			h := &holdCounter{n: map[fsop.Ino]int64{1: 1}}
			m := newMount(t, mem, kind.o, func(next fsop.Handler) fsop.Handler { h.next = next; return h })
			for i := range 300 {
				p := filepath.Join(m.dir, fmt.Sprint("f", i))
				if err := os.WriteFile(p, []byte("x"), 0o644); err != nil {
					t.Fatal(err)
				}
				if i%3 == 0 {
					os.Link(p, p+".link")
				}
				if i%5 == 0 {
					os.Remove(p)
				}
			}
			os.ReadDir(m.dir)
			list, _ := os.Open(m.dir)
			list.ReadDir(3) // and leave the rest
			list.Close()
			for range 2 {
				if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0); err != nil {
					t.Log("cannot drop the kernel's caches:", err)
				}
				filepath.Walk(m.dir, func(string, fs.FileInfo, error) error { return nil })
			}
			os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0)
			if err := m.DropAll(t.Context()); err != nil {
				t.Fatal(err)
			}
			check := func() string {
				h.mu.Lock()
				defer h.mu.Unlock()
				for _, f := range m.Forgotten() {
					h.n[f.Ino] -= int64(f.N)
				}
				for _, k := range m.Holds() {
					if h.n[k.Ino] != int64(k.N) {
						return fmt.Sprintf("inode %d: replies say %d, held %d", k.Ino, h.n[k.Ino], k.N)
					}
				}
				held := 0
				for _, n := range h.n {
					if n != 0 {
						held++
					}
				}
				if n := len(m.Holds()); held != n {
					return fmt.Sprintf("%d inodes counted, %d held", held, n)
				}
				return ""
			}
			deadline := time.Now().Add(time.Minute)
			for check() != "" && time.Now().Before(deadline) {
				time.Sleep(5 * time.Millisecond)
			}
			if bad := check(); bad != "" {
				t.Error(bad)
			}
		})
	}
}

// holdCounter counts as proto.Hold says.
type holdCounter struct {
	next fsop.Handler
	mu   sync.Mutex
	n    map[fsop.Ino]int64
}

func (h *holdCounter) Do(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
	r, err := h.next.Do(ctx, op)
	if err != nil {
		return r, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if fsop.Introduces(op) {
		h.n[r.Attr.Ino]++
	}
	if list, ok := op.(*fsop.Readdir); ok && list.Plus {
		for i := range r.Entries {
			h.n[r.Entries[i].Ino]++
		}
	}
	return r, nil
}

// TestDropAll changes everything behind the mount's back, as while a lease is
// lost, and then drops all: nothing of before may be seen, files in use included.
func TestDropAll(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			mem := memfs.New()
			m := mountHandler(t, kind.o, func(*Mount) fsop.Handler { return mem.Session(nil) })
			other := mem.Session(nil)
			names := []string{"a", "b", "c"}
			for _, n := range names {
				if err := os.WriteFile(filepath.Join(m.dir, n), []byte(n), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			inUse, err := os.Open(filepath.Join(m.dir, "c"))
			if err != nil {
				t.Fatal(err)
			}
			defer inUse.Close()
			dir := filepath.Join(m.dir, "dir")
			os.Mkdir(dir, 0o755)
			os.WriteFile(filepath.Join(dir, "in"), []byte("in"), 0o644)
			cwd, err := os.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer cwd.Close()
			for range 2 { // the second time from the kernel's caches
				for _, n := range names {
					os.ReadFile(filepath.Join(m.dir, n))
				}
				size(filepath.Join(m.dir, "absent"))
				size(filepath.Join(m.dir, "new"))
				os.ReadDir(m.dir)
				size(filepath.Join(dir, "in"))
			}
			ctx := t.Context()
			do := func(op fsop.Op) {
				t.Helper()
				if _, err := other.Do(ctx, op); err != nil {
					t.Fatal(err)
				}
			}
			writeVia(t, other, "a", "changed")
			do(&fsop.Unlink{Parent: 1, Name: "b"})
			do(&fsop.Create{Node: fsop.Node{Parent: 1, Name: "absent", Mode: 0o644}})
			do(&fsop.Rename{Parent: 1, Name: "absent", NewParent: 1, NewName: "c"}) // over the file in use
			do(&fsop.Rename{Parent: 1, Name: "dir", NewParent: 1, NewName: "moved"})
			do(&fsop.Create{Node: fsop.Node{Parent: 1, Name: "new", Mode: 0o644}})
			do(&fsop.Create{Node: fsop.Node{Parent: inoOf(t, other, "moved"), Name: "in too", Mode: 0o644}})
			if err := m.DropAll(ctx); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(filepath.Join(m.dir, "a")); string(got) != "changed" {
				t.Errorf("a: %q, %v", got, err)
			}
			if size(filepath.Join(m.dir, "b")) != -1 {
				t.Error("b is still there")
			}
			if got := size(filepath.Join(m.dir, "c")); got != 0 {
				t.Errorf("c has %d bytes, want those of the empty file renamed over it", got)
			}
			if size(filepath.Join(dir, "in")) != -1 {
				t.Error("dir is still there")
			}
			if got := size(filepath.Join(m.dir, "moved", "in")); got != 2 {
				t.Errorf("moved/in: %d", got)
			}
			for _, n := range []string{"new", "moved/in too"} {
				if size(filepath.Join(m.dir, n)) != 0 {
					t.Errorf("%s is not there", n)
				}
			}
			list, err := os.ReadDir(m.dir)
			if err != nil || len(list) != 4 {
				t.Errorf("listed %v, %v", list, err)
			}
		})
	}
}

// TestRingWithoutEpoch looks names up in a directory in which another mount
// makes names that this one has cached as absent: the lookup's answer waits for
// the change to be acknowledged, and the change for this mount to forget the
// name, whose directory the lookup has locked.
func TestRingWithoutEpoch(t *testing.T) {
	mem := memfs.New()
	a := newMount(t, mem, Options{noEpoch: true})
	b := newMount(t, mem, Options{noEpoch: true})
	stop := make(chan struct{})
	var looking sync.WaitGroup
	for w := range 2 {
		looking.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				var st unix.Stat_t
				if err := unix.Lstat(filepath.Join(b.dir, fmt.Sprint("look", w, "-", i)), &st); err != unix.ENOENT {
					t.Errorf("lookup: %v", err)
					return
				}
			}
		})
	}
	var worst time.Duration
	given := pacer.New(t)
	for i := range 200 {
		name := fmt.Sprint("made", i)
		size(filepath.Join(b.dir, name))
		began := given.Now()
		if err := os.Mkdir(filepath.Join(a.dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		worst = max(worst, given.Now()-began)
		if size(filepath.Join(b.dir, name)) < 0 {
			t.Errorf("%s is absent", name)
		}
	}
	close(stop)
	looking.Wait()
	t.Logf("worst: %v", worst)
	if worst > time.Second {
		t.Errorf("a change waited %v for lookups", worst)
	}
}

// TestUnknownNames makes names in a directory where another mount is busy
// without ever having asked for them: it is not disturbed, and nobody waits.
func TestUnknownNames(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			mem := memfs.New()
			a := newMount(t, mem, kind.o)
			b := newMount(t, mem, kind.o)
			warm := filepath.Join(b.dir, "warm")
			if err := os.WriteFile(warm, nil, 0o644); err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for i, m := range []*mounted{a, b} {
				wg.Go(func() {
					for k := range 300 {
						if err := os.Mkdir(filepath.Join(m.dir, fmt.Sprint(i, "-", k)), 0o755); err != nil {
							t.Error(err)
							return
						}
						if k%20 == 0 {
							os.ReadDir(m.dir)
						}
					}
				})
			}
			began := time.Now()
			wg.Wait()
			t.Logf("600 names: %v", time.Since(began))
			for i := range 2 {
				for k := range 300 {
					if size(filepath.Join([]string{a.dir, b.dir}[1-i], fmt.Sprint(i, "-", k))) < 0 {
						t.Fatalf("%d-%d is absent", i, k)
					}
				}
			}
		})
	}
}

// A directory that another mount moved is renamed here, by a process that has
// not looked at it since. The kernel had it at its old name when it was told, and
// could not take that away: something was under way in the old parent.
func TestMovedDirectory(t *testing.T) {
	mem := memfs.New()
	g := &gate{}
	a := newMount(t, mem, Options{}, gated(g))
	b := newMount(t, mem, Options{})
	in := func(m *mounted, p string) string { return filepath.Join(m.dir, p) }
	for _, d := range []string{"p2", "p3"} {
		if err := os.Mkdir(in(a, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 20 {
		x, y, z := fmt.Sprint("x", i), fmt.Sprint("p2/y", i), fmt.Sprint("p3/z", i)
		if err := os.Mkdir(in(a, x), 0o755); err != nil {
			t.Fatal(err)
		}
		held, release := holdOnce(g, kindIs(fsop.KindMkdir))
		made := make(chan error, 1)
		go func() { made <- os.Mkdir(in(a, fmt.Sprint("slow", i)), 0o755) }()
		<-held // it has the lock of a's root in the kernel
		if err := os.Rename(in(b, x), in(b, y)); err != nil {
			t.Fatal(err)
		}
		release()
		g.set(nil)
		if err := <-made; err != nil {
			t.Fatal(err)
		}
		if err := unix.Rename(in(a, y), in(a, z)); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(in(b, z)); err != nil {
			t.Fatal(err)
		}
	}
}

// A listing that goes on does not bring back what a file was when it began.
func TestListingGoesOn(t *testing.T) {
	for _, own := range []bool{true, false} {
		t.Run(fmt.Sprint("changed by this mount: ", own), func(t *testing.T) {
			mem := memfs.New()
			maker := newMount(t, mem, Options{})
			// So many that the kernel asks several times, and the handler is asked once.
			const n = 200
			name := func(i int) string { return fmt.Sprintf("%0200d", i) }
			for i := range n {
				if err := os.WriteFile(filepath.Join(maker.dir, name(i)), nil, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			m := newMount(t, mem, Options{})
			writer := maker
			if own {
				writer = m
			}
			d, err := unix.Open(m.dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(d)
			list := func() bool {
				got, err := unix.Getdents(d, make([]byte, 8192)) // takes all that one answer has
				if err != nil {
					t.Fatal(err)
				}
				return got > 0
			}
			list()
			for i := range n {
				path := filepath.Join(m.dir, name(i))
				if err := os.WriteFile(filepath.Join(writer.dir, name(i)), []byte("contents"), 0o644); err != nil {
					t.Fatal(err)
				}
				if got := size(path); got != 8 {
					t.Fatalf("file %d has %d bytes, want 8", i, got)
				}
				size(filepath.Join(m.dir, name(0))) // a sign for the kernel that attributes are wanted with names
			}
			for list() {
				for i := range n {
					// What the kernel has, without a question: a read under way ends there.
					var st unix.Statx_t
					path := filepath.Join(m.dir, name(i))
					if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_SIZE, &st); err != nil || st.Size != 8 {
						t.Fatalf("the kernel takes file %d for %d bytes long, want 8: %v", i, st.Size, err)
					}
				}
			}
		})
	}
}
