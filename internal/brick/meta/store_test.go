package meta

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"mortar/internal/cluster"
	"mortar/internal/disk"
	"mortar/internal/fsop"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, fs disk.FS, change ...func(*Options)) *Store {
	t.Helper()
	o := Options{
		FS: fs, Dir: "/m", MemTable: 256 << 10, Cache: 1 << 20, Log: slog.New(slog.DiscardHandler),
		BeforeSync: func() error { return nil }, Failed: func(error) {},
	}
	for _, c := range change {
		c(&o)
	}
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func commit(t *testing.T, s *Store, fill func(*Batch)) {
	t.Helper()
	b := s.NewBatch()
	defer b.Close()
	fill(b)
	if err := s.Commit(b); err != nil {
		t.Fatal(err)
	}
}

func (s *Store) mustClose(t *testing.T) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestCloseForgets checks what undoing entries rests upon: closing the store
// does not flush it, and reopening goes back to the last flush, whole.
func TestCloseForgets(t *testing.T) {
	fs := disk.NewMem()
	s := open(t, fs)
	set := func(seq uint64) {
		commit(t, s, func(b *Batch) {
			b.SetState(&State{Pos: cluster.Pos{Epoch: 1, Seq: seq}})
			b.SetInode(&Inode{Attr: fsop.Attr{Ino: 1, Size: seq}})
		})
	}
	set(1)
	if _, ok, err := s.DurableState(); ok || err != nil {
		t.Errorf("durable before the first flush: %v, %v", ok, err)
	}
	if err := s.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	set(2)
	if st, ok, err := s.State(); st.Pos.Seq != 2 || !ok || err != nil {
		t.Errorf("state %+v, %v, %v", st, ok, err)
	}
	if st, ok, err := s.DurableState(); st.Pos.Seq != 1 || !ok || err != nil {
		t.Errorf("durable state %+v, %v, %v", st, ok, err)
	}
	s.mustClose(t)
	s = open(t, fs)
	defer s.mustClose(t)
	var n Inode
	st, _, err := s.State()
	if err != nil || st.Pos.Seq != 1 {
		t.Errorf("after reopening: %+v, %v", st, err)
	}
	if _, err := s.Inode(1, &n); err != nil || n.Size != 1 {
		t.Errorf("after reopening: %+v, %v", n, err)
	}
}

// TestCrashIsAPrefix cuts the power at random points of many batches: what is
// found is the state after one of them, all tables together, and no older than
// what was reported durable.
func TestCrashIsAPrefix(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		fs := disk.NewMem()
		var synced atomic.Uint64 // what the log has durable
		var seq uint64
		s := open(t, fs, func(o *Options) {
			o.MemTable = 64 << 10
			o.BeforeSync = func() error { synced.Store(atomic.LoadUint64(&seq)); return nil }
		})
		steps := rng.IntN(3000)
		for range steps {
			next := seq + 1
			atomic.StoreUint64(&seq, next) // logged first
			commit(t, s, func(b *Batch) {
				b.SetState(&State{Pos: cluster.Pos{Epoch: 1, Seq: next}})
				for i := range fsop.Ino(3) {
					b.SetInode(&Inode{Attr: fsop.Attr{Ino: i + 1 + fsop.Ino(next%50)*10, Size: next}})
				}
				b.SetXattr(1, "user.x", make([]byte, rng.IntN(1000)))
			})
			if rng.IntN(500) == 0 {
				if err := s.Flush(context.Background()); err != nil {
					t.Fatal(err)
				}
			}
		}
		durable, _, err := s.DurableState()
		if err != nil {
			t.Fatal(err)
		}
		crashed := fs.Crash(rng)
		logged := synced.Load()
		s.mustClose(t)
		s = open(t, crashed)
		st, ok, err := s.State()
		if err != nil {
			t.Fatal(err)
		}
		if st.Pos.Seq < durable.Pos.Seq || st.Pos.Seq > logged {
			t.Errorf("seed %d: found %v, durable was %v, the log %d", seed, st.Pos, durable.Pos, logged)
		}
		if ok {
			var newest uint64
			groups := map[fsop.Ino][]uint64{}
			if err := s.Inodes(0, func(n *Inode) (bool, error) {
				newest = max(newest, n.Size)
				groups[n.Ino/10] = append(groups[n.Ino/10], n.Size)
				return true, nil
			}); err != nil {
				t.Fatal(err)
			}
			if newest != st.Pos.Seq {
				t.Errorf("seed %d: position %v, newest inode of %d", seed, st.Pos, newest)
			}
			for g, sizes := range groups {
				if slices.Min(sizes) != slices.Max(sizes) {
					t.Errorf("seed %d: half a batch: inodes %d have %v", seed, g, sizes)
				}
			}
		}
		s.mustClose(t)
	}
}

// TestNeverAheadOfTheLog checks that no table is synced unless the log could be.
func TestNeverAheadOfTheLog(t *testing.T) {
	fs := disk.NewMem()
	broken := errors.New("log broken")
	fail := atomic.Bool{}
	failed := make(chan error, 1)
	s := open(t, fs, func(o *Options) {
		o.BeforeSync = func() error {
			if fail.Load() {
				return broken
			}
			return nil
		}
		o.Failed = func(err error) { failed <- err }
	})
	commit(t, s, func(b *Batch) { b.SetState(&State{Pos: cluster.Pos{Epoch: 1, Seq: 1}}) })
	if err := s.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	fail.Store(true)
	commit(t, s, func(b *Batch) { b.SetState(&State{Pos: cluster.Pos{Epoch: 1, Seq: 2}}) })
	if err := s.Flush(context.Background()); !errors.Is(err, broken) {
		t.Errorf("flush without a log: %v", err)
	}
	if err := <-failed; !errors.Is(err, broken) {
		t.Errorf("failed with %v", err)
	}
	if st, _, err := s.DurableState(); err != nil || st.Pos.Seq != 1 {
		t.Errorf("durable: %+v, %v", st, err)
	}
	if err := s.Flush(context.Background()); !errors.Is(err, broken) {
		t.Errorf("flush of a failed store: %v", err)
	}
	s.mustClose(t)
}

// TestDiskFails lets writes and syncs fail and expects to hear of it.
func TestDiskFails(t *testing.T) {
	for _, op := range []disk.Op{disk.OpWrite, disk.OpSync, disk.OpSyncDir} {
		fs := disk.NewFaulty(disk.NewMem())
		failed := make(chan error, 1)
		s := open(t, fs, func(o *Options) { o.Failed = func(err error) { failed <- err } })
		commit(t, s, func(b *Batch) { b.SetState(&State{Pos: cluster.Pos{Epoch: 1, Seq: 1}}) })
		fs.Add(disk.Fault{Op: op, Err: syscall.EIO})
		if err := s.Flush(context.Background()); !errors.Is(err, syscall.EIO) {
			t.Errorf("%v: %v", op, err)
		}
		if err := <-failed; !errors.Is(err, syscall.EIO) {
			t.Errorf("%v: failed with %v", op, err)
		}
		fs.Clear()
		s.Close() // may complain
	}
}

func TestRuns(t *testing.T) {
	s := open(t, disk.NewMem())
	defer s.mustClose(t)
	commit(t, s, func(b *Batch) {
		for _, r := range []Run{{2, 4}, {6, 8}, {10, 20}} {
			b.SetRun(7, r)
		}
		b.SetRun(6, Run{0, 100})
		b.SetRun(8, Run{0, 100})
	})
	for from, want := range map[uint64]int{0: 3, 2: 3, 3: 3, 4: 2, 5: 2, 7: 2, 8: 1, 19: 1, 20: 0, 99: 0} {
		n := 0
		if err := s.Runs(7, from, func(Run) (bool, error) { n++; return true, nil }); err != nil || n != want {
			t.Errorf("runs behind %d: %d, %v; want %d", from, n, err, want)
		}
	}
}

func TestInodesOf(t *testing.T) {
	s := open(t, disk.NewMem())
	defer s.mustClose(t)
	commit(t, s, func(b *Batch) {
		for i := range 100 {
			b.SetInode(&Inode{Attr: fsop.Attr{Ino: fsop.Ino(3 * i)}})
		}
	})
	rng := rand.New(rand.NewPCG(1, 1))
	for range 200 {
		var ask, want, got []fsop.Ino
		for range rng.IntN(20) {
			ask = append(ask, fsop.Ino(rng.IntN(310)))
		}
		slices.Sort(ask)
		ask = slices.Compact(ask)
		for _, i := range ask {
			if i%3 == 0 && i < 300 {
				want = append(want, i)
			}
		}
		if err := s.InodesOf(ask, func(n *Inode) error { got = append(got, n.Ino); return nil }); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got, want) {
			t.Errorf("asked for %v: %v, want %v", ask, got, want)
		}
	}
}

// Where contents are is known without reading them: in memory, in tables, and in
// the files that tables keep long values in.
func TestBaseWithoutData(t *testing.T) {
	s := open(t, disk.NewMem())
	defer s.mustClose(t)
	bases := map[fsop.Ino]Base{1: {}, 2: {Kind: BaseFile, Len: 1 << 40, Incarnation: 7}}
	for i, n := range []uint64{0, 1, 15, 16, 17, 100, 600, 32 << 10} {
		bases[fsop.Ino(10+i)] = Base{Kind: BaseInline, Len: n, Data: make([]byte, n)}
	}
	commit(t, s, func(b *Batch) {
		for ino, base := range bases {
			b.SetBase(ino, &base)
		}
	})
	check := func(where string) {
		t.Helper()
		for ino, want := range bases {
			full, err := s.Base(ino, true)
			if err != nil {
				t.Fatal(err)
			}
			got, err := s.Base(ino, false)
			if err != nil {
				t.Fatal(err)
			}
			if full.Data = nil; got.Data != nil || got.Kind != want.Kind || got.Len != want.Len || got.Incarnation != want.Incarnation || got.Kind != full.Kind {
				t.Errorf("%s, inode %d: %+v, want %+v less the data", where, ino, got, want)
			}
		}
	}
	check("in memory")
	if err := s.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	check("in tables")
	commit(t, s, func(b *Batch) {
		for ino := range bases {
			b.SetBase(ino, &Base{})
		}
	})
	for ino := range bases {
		bases[ino] = Base{}
	}
	check("removed")
}
