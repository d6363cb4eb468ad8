package client

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
	"mortar/internal/proto"
)

// granter is a set as windows sees it: it gives windows, refuses what relies on
// one that is not held, and takes its time.
type granter struct {
	next fsop.Handler
	mu   sync.Mutex
	held map[fsop.Ino]bool
	rng  *rand.Rand
	fail error // of the next write
	// scarce: windows are not to be had any more, and whoever has one hears of it.
	scarce bool

	writes, setattrs, synced, fsyncs int
}

func (g *granter) Do(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
	g.mu.Lock()
	pause := time.Duration(g.rng.IntN(3000)) * time.Microsecond
	g.mu.Unlock()
	if op.Kind().Mutates() {
		time.Sleep(pause)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch op := op.(type) {
	case *fsop.CloseWindow:
		delete(g.held, op.Ino)
		return &fsop.Reply{}, nil
	case *fsop.Fsync:
		g.fsyncs++
	case *fsop.Write:
		g.writes++
		if op.Sync {
			g.synced++
		}
		if op.Window&fsop.WindowHeld != 0 && !g.held[op.Ino] {
			return nil, fsop.EIO
		}
		if g.fail != nil {
			err := g.fail
			g.fail = nil
			return nil, err
		}
		if op.Window&fsop.WindowDone != 0 {
			delete(g.held, op.Ino)
		}
		r, err := g.next.Do(ctx, op)
		if err == nil && op.Window&fsop.WindowAsk != 0 && !g.scarce {
			g.held[op.Ino], r.Window = true, true
		}
		return r, err
	case *fsop.Setattr:
		if op.Window&fsop.WindowHeld != 0 && !g.held[op.Ino] {
			return nil, fsop.EIO
		}
		if op.Window&fsop.WindowDone != 0 {
			delete(g.held, op.Ino)
		}
		g.setattrs++
		return g.next.Do(ctx, op)
	case *fsop.Tmpfile:
		r, err := g.next.Do(ctx, op)
		if err == nil {
			g.held[r.Attr.Ino], r.Window = true, !g.scarce
		}
		return r, err
	case *fsop.Create:
		r, err := g.next.Do(ctx, op)
		if err == nil && op.Window&fsop.WindowAsk != 0 {
			g.held[r.Attr.Ino], r.Window = true, true
		}
		return r, err
	}
	return g.next.Do(ctx, op)
}

// state returns how many writes came, and whether the window of a file is held.
func (g *granter) state(ino fsop.Ino) (writes int, held bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.writes, g.held[ino]
}

func withWindows(t *testing.T, seed uint64, f func(ctx context.Context, w *windows, g *granter)) {
	synctest.Test(t, func(t *testing.T) {
		g := &granter{next: memfs.New().Session(nil), held: map[fsop.Ino]bool{}, rng: rand.New(rand.NewPCG(seed, 0))}
		w := newWindows(g, func() uint64 { return 1 })
		// Not the test's context, which ends outside of the bubble.
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() { _ = w.Run(ctx) })
		f(ctx, w, g)
		w.drainAll(ctx)
		cancel()
		wg.Wait()
		if len(g.held) != 0 {
			t.Errorf("windows still held: %v", g.held)
		}
	})
}

func mustDo(t *testing.T, h fsop.Handler, op fsop.Op) *fsop.Reply {
	t.Helper()
	r, err := h.Do(context.Background(), op)
	if err != nil {
		t.Fatalf("%s: %v", fsop.String(op), err)
	}
	return r
}

func createFile(t *testing.T, h fsop.Handler, name string) fsop.Ino {
	return mustDo(t, h, &fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: name, Mode: 0o644}, Excl: true}).Attr.Ino
}

func TestSmallFileIsOneWrite(t *testing.T) {
	withWindows(t, 1, func(ctx context.Context, w *windows, g *granter) {
		ino := createFile(t, w, "a")
		began := time.Now()
		mustDo(t, w, &fsop.Write{Ino: ino, Data: make([]byte, 4096)})
		if d := time.Since(began); d != 0 {
			t.Errorf("a write in a window took %v", d)
		}
		mustDo(t, w, &fsop.Flush{Ino: ino})
		if n, held := g.state(ino); n != 1 || held {
			t.Errorf("%d writes, window held: %v; want 1, closed with it", n, held)
		}
		if r := mustDo(t, g.next, &fsop.Getattr{Ino: ino}); r.Attr.Size != 4096 {
			t.Errorf("size %d after the flush", r.Attr.Size)
		}
	})
}

// When room gets scarce a window is given up, and writes wait for their answers.
func TestScarceRoomClosesTheWindow(t *testing.T) {
	withWindows(t, 3, func(ctx context.Context, w *windows, g *granter) {
		ino := createFile(t, w, "a")
		g.mu.Lock()
		g.scarce = true
		g.mu.Unlock()
		off := uint64(0)
		write := func() error {
			_, err := w.Do(ctx, &fsop.Write{Ino: ino, Off: off, Data: make([]byte, 4096)})
			off += 4096
			return err
		}
		if err := write(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond) // of the bubble's time: what was held back is sent, and answered
		if n, held := g.state(ino); n != 1 || held {
			t.Errorf("%d writes arrived, window held: %v", n, held)
		}
		if err := write(); err != nil {
			t.Fatal(err)
		}
		g.mu.Lock()
		g.fail = fsop.EDQUOT
		g.mu.Unlock()
		if err := write(); err != fsop.EDQUOT {
			t.Errorf("a write for which there is no room: %v", err)
		}
		mustDo(t, w, &fsop.Flush{Ino: ino})
	})
}

// The window that keeps a file without a name is given back: when it has been idle
// or, if it is good for nothing, at once.
func TestWindowOfAFileWithoutAName(t *testing.T) {
	for _, scarce := range []bool{false, true} {
		withWindows(t, 4, func(ctx context.Context, w *windows, g *granter) {
			g.scarce = scarce
			ino := mustDo(t, w, &fsop.Tmpfile{Node: fsop.Node{Parent: fsop.RootIno, Mode: 0o600}}).Attr.Ino
			mustDo(t, w, &fsop.Write{Ino: ino, Data: []byte("x")})
			if n, _ := g.state(ino); (n == 1) != scarce {
				t.Errorf("scarce %v: %d writes arrived before the answer", scarce, n)
			}
			mustDo(t, w, &fsop.Link{Ino: ino, Parent: fsop.RootIno, Name: "f"})
			if r := mustDo(t, g.next, &fsop.Read{Ino: ino, Len: 10}); string(r.Data) != "x" {
				t.Errorf("linked with %q", r.Data)
			}
			time.Sleep(windowIdle + 2*holdBack) // of the bubble's time
			if _, held := g.state(ino); held {
				t.Errorf("scarce %v: the window is still held", scarce)
			}
		})
	}
}

// A database's page is one write, which is answered when it is durable.
func TestSyncGoesWithTheWrite(t *testing.T) {
	withWindows(t, 9, func(ctx context.Context, w *windows, g *granter) {
		ino := createFile(t, w, "a")
		for range 5 {
			mustDo(t, w, &fsop.Write{Ino: ino, Data: make([]byte, 8192)})
			mustDo(t, w, &fsop.Fsync{Ino: ino})
		}
		mustDo(t, w, &fsop.Fsync{Ino: ino}) // nothing was written since, but perhaps by others
		if n, _ := g.state(ino); n != 5 || g.synced != 5 || g.fsyncs != 1 {
			t.Errorf("%d writes, %d of them synced, and %d fsyncs", n, g.synced, g.fsyncs)
		}
	})
}

// An archiver's file is one write: contents, owner, mode and times.
func TestAttributesGoWithTheLastWrite(t *testing.T) {
	withWindows(t, 7, func(ctx context.Context, w *windows, g *granter) {
		ino := createFile(t, w, "a")
		mustDo(t, w, &fsop.Write{Ino: ino, Data: make([]byte, 4096)})
		mustDo(t, w, &fsop.Setattr{Ino: ino, Valid: fsop.SetMtime, Mtime: 77})
		mustDo(t, w, &fsop.Setattr{Ino: ino, Valid: fsop.SetUID | fsop.SetGID, UID: 5, GID: 6})
		r := mustDo(t, w, &fsop.Setattr{Ino: ino, Valid: fsop.SetMode, Mode: 0o4755})
		if a := r.Attr; a.Size != 4096 || a.Mtime != 77 || a.UID != 5 || a.Mode&0o7777 != 0o4755 || r.Seq != 0 {
			t.Errorf("foreseen %+v at %d", a, r.Seq)
		}
		mustDo(t, w, &fsop.Flush{Ino: ino})
		if n, held := g.state(ino); n != 1 || held || g.setattrs != 0 {
			t.Errorf("%d writes, %d setattrs, window held: %v", n, g.setattrs, held)
		}
		a := mustDo(t, g.next, &fsop.Getattr{Ino: ino}).Attr
		if a.Size != 4096 || a.Mtime != 77 || a.UID != 5 || a.GID != 6 || a.Mode&0o7777 != 0o4755 {
			t.Errorf("arrived %+v", a)
		}
	})
}

// What a new owner takes away from the mode is not given back by merging.
func TestOwnerAfterModeIsNotMerged(t *testing.T) {
	withWindows(t, 8, func(ctx context.Context, w *windows, g *granter) {
		ino := createFile(t, w, "a")
		mustDo(t, w, &fsop.Setattr{Ino: ino, Valid: fsop.SetMode, Mode: 0o4755})
		mustDo(t, w, &fsop.Setattr{Ino: ino, Valid: fsop.SetUID, UID: 5})
		mustDo(t, w, &fsop.Flush{Ino: ino})
		if g.setattrs != 2 {
			t.Errorf("%d setattrs arrived, want both", g.setattrs)
		}
	})
}

func TestWritesAreJoined(t *testing.T) {
	withWindows(t, 2, func(ctx context.Context, w *windows, g *granter) {
		ino := createFile(t, w, "a")
		for i := range 1024 {
			mustDo(t, w, &fsop.Write{Ino: ino, Off: uint64(i) * 4096, Data: bytes.Repeat([]byte{byte(i)}, 4096)})
		}
		mustDo(t, w, &fsop.Flush{Ino: ino})
		if n, _ := g.state(ino); n > 1024*4096/joinBytes {
			t.Errorf("%d writes for 4 MiB", n)
		}
		if r := mustDo(t, g.next, &fsop.Getattr{Ino: ino}); r.Attr.Size != 4<<20 {
			t.Errorf("size %d", r.Attr.Size)
		}
	})
}

func TestErrorSurfacesOnce(t *testing.T) {
	withWindows(t, 3, func(ctx context.Context, w *windows, g *granter) {
		ino := createFile(t, w, "a")
		g.mu.Lock()
		g.fail = fsop.ENOSPC
		g.mu.Unlock()
		mustDo(t, w, &fsop.Write{Ino: ino, Data: []byte("x")})
		if _, err := w.Do(ctx, &fsop.Fsync{Ino: ino}); err != fsop.ENOSPC {
			t.Errorf("fsync after a lost write: %v", err)
		}
		if _, err := w.Do(ctx, &fsop.Flush{Ino: ino}); err != nil {
			t.Errorf("the error was reported twice: %v", err)
		}
	})
}

func TestLostWindowLosesWritesLoudly(t *testing.T) {
	withWindows(t, 4, func(ctx context.Context, w *windows, g *granter) {
		ino := createFile(t, w, "a")
		mustDo(t, w, &fsop.Write{Ino: ino, Data: []byte("x")})
		g.mu.Lock()
		delete(g.held, ino) // the set has taken it
		g.mu.Unlock()
		var lost []proto.Effect
		w.hooks.lost = func(e []proto.Effect) { lost = append(lost, e...) }
		if _, err := w.Do(ctx, &fsop.Flush{Ino: ino}); err != fsop.EIO {
			t.Errorf("close after the window was lost: %v; want EIO", err)
		}
		if !slices.Contains(lost, proto.Effect{Ino: ino}) {
			t.Errorf("the kernel is to forget %v, and not what it took for written", lost)
		}
		mustDo(t, w, &fsop.Write{Ino: ino, Data: []byte("y")})
		mustDo(t, w, &fsop.Flush{Ino: ino})
	})
}

func TestRecallClosesTheWindow(t *testing.T) {
	withWindows(t, 5, func(ctx context.Context, w *windows, g *granter) {
		ino := createFile(t, w, "a")
		mustDo(t, w, &fsop.Write{Ino: ino, Data: []byte("x")})
		w.Recall(ino)
		time.Sleep(10 * time.Millisecond)
		if n, held := g.state(ino); held || n != 1 {
			t.Errorf("held %v, %d writes after a recall", held, n)
		}
		w.Recall(ino) // nothing is held: the set is told so anyway
		time.Sleep(10 * time.Millisecond)
		mustDo(t, w, &fsop.Write{Ino: ino, Off: 1, Data: []byte("y")})
		mustDo(t, w, &fsop.Write{Ino: ino, Off: 2, Data: []byte("z")})
		if r := mustDo(t, w, &fsop.Read{Ino: ino, Len: 10}); string(r.Data) != "xyz" {
			t.Errorf("read %q", r.Data)
		}
	})
}

// Another session may see a new file, and want it, before its maker hears that it is there.
func TestRecallOvertakesTheReplyToCreate(t *testing.T) {
	withWindows(t, 10, func(ctx context.Context, w *windows, g *granter) {
		inner := w.next
		w.next = fsop.HandlerFunc(func(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
			r, err := inner.Do(ctx, op)
			if op.Kind() == fsop.KindCreate && err == nil {
				w.Recall(r.Attr.Ino)
				time.Sleep(20 * time.Millisecond)
			}
			return r, err
		})
		ino := createFile(t, w, "a")
		mustDo(t, w, &fsop.Write{Ino: ino, Data: []byte("x")})
		mustDo(t, w, &fsop.Flush{Ino: ino})
		if r := mustDo(t, w, &fsop.Read{Ino: ino, Len: 10}); string(r.Data) != "x" {
			t.Errorf("read %q", r.Data)
		}
	})
}

func TestHeldBackWritesGoByThemselves(t *testing.T) {
	withWindows(t, 6, func(ctx context.Context, w *windows, g *granter) {
		ino := createFile(t, w, "a")
		mustDo(t, w, &fsop.Write{Ino: ino, Data: []byte("x")})
		time.Sleep(3 * holdBack)
		if r := mustDo(t, g.next, &fsop.Getattr{Ino: ino}); r.Attr.Size != 1 {
			t.Error("the write was held back for long")
		}
		time.Sleep(windowIdle + 3*holdBack)
		if _, held := g.state(ino); held {
			t.Error("the unused window was kept")
		}
	})
}

// A process that is about to be replaced takes nothing that would be lost with it.
func TestStill(t *testing.T) {
	withWindows(t, 6, func(ctx context.Context, w *windows, g *granter) {
		ino := createFile(t, w, "a")
		write := &fsop.Write{Ino: ino, Data: []byte("x")}
		mustDo(t, w, write)
		if err := w.still(func() error { return nil }); err != ErrUnsent {
			t.Errorf("with a write that is held back: %v", err)
		}
		time.Sleep(3 * holdBack)
		var taken atomic.Bool
		done := make(chan struct{})
		want := errors.New("it was called")
		err := w.still(func() error {
			go func() {
				_, _ = w.Do(ctx, write)
				taken.Store(true)
				close(done)
			}()
			for range 100 {
				runtime.Gosched()
			}
			if taken.Load() {
				t.Error("a write was taken meanwhile")
			}
			return want
		})
		if err != want {
			t.Errorf("with nothing unsent: %v", err)
		}
		<-done
	})
}

// TestRandomAgainstModel does everything that may happen to three files, recalls
// included, and compares what is read with byte slices.
func TestRandomAgainstModel(t *testing.T) {
	for seed := range uint64(20) {
		withWindows(t, seed, func(ctx context.Context, w *windows, g *granter) {
			rng := rand.New(rand.NewPCG(seed, 9))
			var inos []fsop.Ino
			model := make([][]byte, 3)
			modes, mtimes := [3]uint32{0o644, 0o644, 0o644}, [3]int64{}
			for _, n := range []string{"a", "b", "c"} {
				inos = append(inos, createFile(t, w, n))
			}
			put := func(i int, off int, data []byte) {
				if n := off + len(data); n > len(model[i]) {
					model[i] = append(model[i], make([]byte, n-len(model[i]))...)
				}
				copy(model[i][off:], data)
			}
			for range 400 {
				i := rng.IntN(3)
				switch rng.IntN(12) {
				case 0, 1, 2, 3:
					off, data := rng.IntN(2000), make([]byte, 1+rng.IntN(300))
					for k := range data {
						data[k] = byte(rng.Int())
					}
					if rng.IntN(2) == 0 {
						off = len(model[i])
					}
					mustDo(t, w, &fsop.Write{Ino: inos[i], Off: uint64(off), Data: data})
					put(i, off, data)
				case 4:
					data := []byte{byte(rng.Int())}
					if r := mustDo(t, w, &fsop.Write{Ino: inos[i], Append: true, Data: data}); r.Off != uint64(len(model[i])) {
						t.Fatalf("appended at %d of %d", r.Off, len(model[i]))
					}
					put(i, len(model[i]), data)
				case 5:
					n := rng.IntN(1500)
					mustDo(t, w, &fsop.Setattr{Ino: inos[i], Valid: fsop.SetSize, Size: uint64(n)})
					if n > len(model[i]) {
						put(i, n, nil)
					}
					model[i] = model[i][:n:n]
				case 6:
					w.Recall(inos[i])
				case 7:
					mustDo(t, w, &fsop.Flush{Ino: inos[i]})
				case 8:
					r := mustDo(t, w, &fsop.Lookup{Parent: fsop.RootIno, Name: string(rune('a' + i))})
					if r.Attr.Size != uint64(len(model[i])) {
						t.Fatalf("size %d, want %d", r.Attr.Size, len(model[i]))
					}
				case 10:
					modes[i] = uint32(rng.IntN(0o1000))
					mustDo(t, w, &fsop.Setattr{Ino: inos[i], Valid: fsop.SetMode, Mode: modes[i]})
				case 11:
					mtimes[i] = rng.Int64()
					mustDo(t, w, &fsop.Setattr{Ino: inos[i], Valid: fsop.SetMtime, Mtime: mtimes[i]})
					if rng.IntN(2) == 0 {
						mustDo(t, w, &fsop.Flush{Ino: inos[i]})
					}
					if a := mustDo(t, w, &fsop.Getattr{Ino: inos[i]}).Attr; a.Mtime != mtimes[i] || a.Mode&0o7777 != modes[i] {
						t.Fatalf("seed %d: mtime %d, mode %o; want %d, %o", seed, a.Mtime, a.Mode, mtimes[i], modes[i])
					}
				case 9:
					time.Sleep(time.Duration(rng.IntN(30)) * time.Millisecond)
				}
				if rng.IntN(4) > 0 {
					continue
				}
				r := mustDo(t, w, &fsop.Read{Ino: inos[i], Len: 1 << 20})
				if !bytes.Equal(r.Data, model[i]) {
					t.Fatalf("seed %d: file %d differs: %d bytes, want %d", seed, i, len(r.Data), len(model[i]))
				}
			}
		})
	}
}

// The position of an absent name comes through: without it no kernel would keep
// that the name is absent.
func TestAbsentNameHasAPosition(t *testing.T) {
	w := newWindows(fsop.HandlerFunc(func(context.Context, fsop.Op) (*fsop.Reply, error) {
		return &fsop.Reply{Seq: 7}, fsop.ENOENT
	}), func() uint64 { return 1 })
	reply, err := w.Do(t.Context(), &fsop.Lookup{Parent: fsop.RootIno, Name: "absent"})
	if err != fsop.ENOENT || reply == nil || reply.Seq != 7 {
		t.Fatalf("%+v, %v, want position 7 and ENOENT", reply, err)
	}
}

// What a program appends goes through the window as well: only its holder can
// move the file's end.
func TestAppendsAreJoined(t *testing.T) {
	withWindows(t, 11, func(ctx context.Context, w *windows, g *granter) {
		ino := createFile(t, w, "log")
		line := bytes.Repeat([]byte("x"), 1000)
		for i := range uint64(600) {
			if r := mustDo(t, w, &fsop.Write{Ino: ino, Append: true, Off: 7, Data: line}); r.Off != i*1000 {
				t.Fatalf("append %d went to %d", i, r.Off)
			}
		}
		mustDo(t, w, &fsop.Setattr{Ino: ino, Valid: fsop.SetSize, Size: 10})
		if r := mustDo(t, w, &fsop.Write{Ino: ino, Append: true, Data: []byte("after")}); r.Off != 10 {
			t.Errorf("appended to 10 bytes at %d", r.Off)
		}
		mustDo(t, w, &fsop.Flush{Ino: ino})
		if r := mustDo(t, g.next, &fsop.Read{Ino: ino, Len: 100}); string(r.Data) != "xxxxxxxxxxafter" {
			t.Errorf("read %q", r.Data)
		}
		if writes, _ := g.state(ino); writes > 10 {
			t.Errorf("%d writes for 601 appends", writes)
		}
	})
}

// A file that others look at, or append to, is appended to without a window for
// a while: to give it back each time would cost more than it gains.
func TestAppendsAreShy(t *testing.T) {
	withWindows(t, 12, func(ctx context.Context, w *windows, g *granter) {
		ino := createFile(t, w, "log")
		add := func() { mustDo(t, w, &fsop.Write{Ino: ino, Append: true, Data: []byte("line")}) }
		add()
		w.Recall(ino)
		time.Sleep(3 * holdBack)
		for range 5 {
			add()
			add()
			if _, held := g.state(ino); held {
				t.Error("the window was asked for just after it had been wanted back")
			}
		}
		time.Sleep(shyness)
		add()
		add()
		if _, held := g.state(ino); !held {
			t.Error("the window was not asked for any more")
		}
	})
}

// A window may be wanted back while a write waits for room in it.
func TestRecallOfAFullWindow(t *testing.T) {
	for seed := range uint64(20) {
		withWindows(t, seed, func(ctx context.Context, w *windows, g *granter) {
			ino := createFile(t, w, "a")
			var want []byte
			for i := range 24 {
				if i%5 == 4 {
					w.Recall(ino)
				}
				data := bytes.Repeat([]byte{byte(i)}, 1<<20)
				mustDo(t, w, &fsop.Write{Ino: ino, Off: uint64(len(want)), Append: i%2 == 1, Data: data})
				want = append(want, data...)
			}
			mustDo(t, w, &fsop.Flush{Ino: ino})
			var have []byte
			for len(have) < len(want) {
				r := mustDo(t, g.next, &fsop.Read{Ino: ino, Off: uint64(len(have)), Len: 1 << 20})
				if len(r.Data) == 0 {
					break
				}
				have = append(have, r.Data...)
			}
			if !bytes.Equal(have, want) {
				t.Error("the file has other contents than were written")
			}
		})
	}
}

// late hands the reply to the first Lookup over when it is told to.
type late struct {
	next fsop.Handler
	made chan struct{} // closed when the reply is made
	now  chan struct{}
	once sync.Once
}

func (l *late) Do(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
	r, err := l.next.Do(ctx, op)
	if op.Kind() == fsop.KindLookup {
		l.once.Do(func() { close(l.made); <-l.now })
	}
	return r, err
}

// A reply that was made before a write arrived, and gets here after it has,
// does not say what the file was before.
func TestReplyThatAWriteOvertook(t *testing.T) {
	withWindows(t, 1, func(ctx context.Context, w *windows, g *granter) {
		l := &late{next: g, made: make(chan struct{}), now: make(chan struct{})}
		w.next = l
		ino := mustDo(t, w, &fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: "f", Mode: 0o644}}).Attr.Ino
		mustDo(t, w, &fsop.Write{Ino: ino, Data: []byte("contents")})
		looked := make(chan *fsop.Reply, 1)
		go func() { looked <- mustDo(t, w, &fsop.Lookup{Parent: fsop.RootIno, Name: "f"}) }()
		<-l.made
		mustDo(t, w, &fsop.Flush{Ino: ino})
		close(l.now)
		if a := (<-looked).Attr; a.Size != 8 {
			t.Errorf("the file has %d bytes, want 8", a.Size)
		}
	})
}
