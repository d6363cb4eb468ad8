package oplog

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

func TestPositions(t *testing.T) {
	r := newRig(t, disk.NewMem(), 64<<10)
	r.append(2, 10, 0)
	r.append(2, 10, 0)
	for _, pos := range []cluster.Pos{{}, {Epoch: 2, Seq: 2}, {Epoch: 2, Seq: 4}, {Epoch: 1, Seq: 3}, {Epoch: 0, Seq: 3}} {
		if _, err := r.l.Append(pos, nil, 0); !errors.Is(err, ErrPosition) {
			t.Errorf("%v after %v: %v", pos, r.tail(), err)
		}
	}
	for name, c := range map[string]struct{ n, align int }{"too large": {MaxPayload + 1, 0}, "aligns too much": {10, 11}, "aligns less than nothing": {10, -1}} {
		if _, err := r.l.Append(cluster.Pos{Epoch: 2, Seq: 3}, make([]byte, c.n), c.align); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := r.l.Sync(t.Context(), 3); err == nil {
		t.Error("sync of a record that is not there: no error")
	}
	r.check()
	r.append(2, MaxPayload, 0) // larger than a segment
	r.append(2, MaxPayload, MaxPayload)
	for n := range 9 {
		r.append(2, 100_000+n, n*1001)
	}
	r.check()
	r.reopen()
	r.check()
	for _, o := range []Options{{SegmentSize: 100}, {SegmentSize: 2 << 30}, {SegmentSize: -1}} {
		o.FS, o.Dir = r.fs, "/x"
		if _, err := Open(o); err == nil {
			t.Errorf("segments of %d bytes: no error", o.SegmentSize)
		}
	}
}

func TestHistory(t *testing.T) {
	r := newRig(t, disk.NewMem(), 32<<10)
	want := func(base cluster.Pos, history ...cluster.Pos) {
		t.Helper()
		for range 2 {
			if got := r.l.Base(); got != base {
				t.Errorf("base %v, want %v", got, base)
			}
			if got := r.l.History(); !slices.Equal(got, history) {
				t.Errorf("history %v, want %v", got, history)
			}
			r.reopen()
		}
	}
	want(cluster.Pos{})
	for _, epoch := range []cluster.Epoch{1, 1, 3, 3, 7} {
		for range 10 {
			r.append(epoch, 1000, 0)
		}
	}
	one, three, seven := cluster.Pos{Epoch: 1, Seq: 1}, cluster.Pos{Epoch: 3, Seq: 21}, cluster.Pos{Epoch: 7, Seq: 41}
	want(cluster.Pos{}, one, three, seven)
	if len(r.l.segments) != 2 {
		t.Fatalf("%d segments", len(r.l.segments))
	}
	must(t, r.l.TrimBefore(27)) // nothing: the first segment has 27
	want(cluster.Pos{}, one, three, seven)
	must(t, r.l.TrimBefore(28))
	base := cluster.Pos{Epoch: 3, Seq: 27}
	want(base, three, seven)
	if r.l.First() != 28 {
		t.Errorf("first %d", r.l.First())
	}
	if _, _, _, err := r.l.Read(26, 100); !errors.Is(err, ErrTrimmed) {
		t.Errorf("reading what was trimmed: %v", err)
	}
	if err := r.l.TruncateAfter(26); !errors.Is(err, ErrTrimmed) {
		t.Errorf("undoing what was trimmed: %v", err)
	}
	must(t, r.l.TruncateAfter(40))
	r.records = r.records[:40]
	want(base, three)
	r.append(9, 10, 0)
	r.check()
	want(base, three, cluster.Pos{Epoch: 9, Seq: 41})
	must(t, r.l.TruncateAfter(27))
	want(base, three)
	must(t, r.l.TrimBefore(1000)) // never the active segment
	if tail := r.l.Tail(); tail != base || r.l.First() != 0 {
		t.Errorf("tail %v, first %d", tail, r.l.First())
	}
}

func TestReset(t *testing.T) {
	r := newRig(t, disk.NewMem(), 32<<10)
	for range 40 {
		r.append(1, 1000, 0)
	}
	for _, bad := range []struct {
		base    cluster.Pos
		history []cluster.Pos
	}{
		{cluster.Pos{Epoch: 4, Seq: 10}, nil},
		{cluster.Pos{Epoch: 4, Seq: 10}, []cluster.Pos{{Epoch: 3, Seq: 1}}},
		{cluster.Pos{Epoch: 4, Seq: 10}, []cluster.Pos{{Epoch: 4, Seq: 11}}},
		{cluster.Pos{Epoch: 4, Seq: 10}, []cluster.Pos{{Epoch: 2, Seq: 5}, {Epoch: 4, Seq: 5}}},
		{cluster.Pos{}, []cluster.Pos{{Epoch: 1, Seq: 1}}},
	} {
		if err := r.l.Reset(bad.base, bad.history); err == nil {
			t.Errorf("reset to %v with history %v: no error", bad.base, bad.history)
		}
	}
	r.check()
	base := cluster.Pos{Epoch: 5, Seq: 1000}
	history := []cluster.Pos{{Epoch: 2, Seq: 300}, {Epoch: 5, Seq: 900}}
	must(t, r.l.Reset(base, history))
	r.base, r.records = base, nil
	check := func() {
		t.Helper()
		r.check()
		if r.l.Base() != base || r.l.Durable() < 1000 || !slices.Equal(r.l.History(), history[1:]) && !slices.Equal(r.l.History(), history) {
			t.Fatalf("base %v, durable %d, history %v", r.l.Base(), r.l.Durable(), r.l.History())
		}
	}
	check()
	r.reopen()
	check()
	r.append(5, 10, 0)
	check()
	r.reopen()
	check()
	must(t, r.l.Reset(cluster.Pos{}, nil))
	r.base, r.records = cluster.Pos{}, nil
	r.check()
	if names, err := r.fs.List(r.opt.Dir); err != nil || len(names) != 1 {
		t.Errorf("files %q, %v", names, err)
	}
}

// TestSegmentOutlivesTrim reads a segment that the log has dropped.
func TestSegmentOutlivesTrim(t *testing.T) {
	for _, fs := range []struct {
		fs  disk.FS
		dir string
	}{{disk.NewMem(), "/log"}, {disk.OS, t.TempDir()}} {
		l, err := Open(Options{FS: fs.fs, Dir: fs.dir, SegmentSize: 256 << 10})
		must(t, err)
		data := payload(1, 100<<10)
		loc, err := l.Append(cluster.Pos{Epoch: 1, Seq: 1}, append([]byte("head"), data...), len(data))
		must(t, err)
		must(t, l.SyncAll())
		if _, err := l.OpenSegment(99); !errors.Is(err, ErrTrimmed) {
			t.Fatalf("opening a segment that never was: %v", err)
		}
		s, err := l.OpenSegment(loc.Segment)
		must(t, err)
		for seq := uint64(2); l.First() == 1; seq++ {
			_, err := l.Append(cluster.Pos{Epoch: 1, Seq: seq}, make([]byte, 10000), 0)
			must(t, err)
			must(t, l.TrimBefore(seq))
		}
		if err := l.ReadAt(loc.Segment, make([]byte, 1), loc.Off); !errors.Is(err, ErrTrimmed) {
			t.Fatalf("reading what was trimmed: %v", err)
		}
		dst, err := fs.fs.OpenFile(fs.fs.PathJoin(fs.fs.PathDir(fs.dir), "clone"), os.O_RDWR|os.O_CREATE)
		must(t, err)
		must(t, s.CloneTo(dst, loc.Off+4, 8192, int64(len(data))))
		got := make([]byte, len(data))
		_, err = dst.ReadAt(got, 8192)
		must(t, err)
		if !bytes.Equal(got, data) {
			t.Fatal("the clone differs")
		}
		must(t, l.Close())
		if err := s.ReadAt(got, loc.Off+4); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("after the log was closed: %v", err)
		}
		if err := s.ReadAt(got, 1<<30); err == nil {
			t.Fatal("reading beyond the end: no error")
		}
		if err := s.CloneTo(dst, 0, 0, 1<<30); err == nil {
			t.Fatal("cloning beyond the end: no error")
		}
		s.Close()
		s.Close()
		must(t, dst.Close())
	}
}

// TestCloneUnwritten clones from records that are still in the buffer.
func TestCloneUnwritten(t *testing.T) {
	r := newRig(t, disk.NewMem(), 256<<10)
	r.append(1, 5000, 4096)
	loc := r.records[0].loc
	s, err := r.l.OpenSegment(loc.Segment)
	must(t, err)
	defer s.Close()
	dst, err := r.fs.OpenFile("/clone", os.O_RDWR|os.O_CREATE)
	must(t, err)
	defer dst.Close()
	must(t, s.CloneTo(dst, loc.Off+904, 0, 4096))
	got := make([]byte, 4096)
	_, err = dst.ReadAt(got, 0)
	must(t, err)
	if !bytes.Equal(got, r.records[0].payload[904:]) {
		t.Fatal("the clone differs")
	}
}

// TestKilled opens the log of a process that ended without closing it: what was
// flushed is there.
func TestKilled(t *testing.T) {
	r := newRig(t, disk.NewMem(), 64<<10)
	killed := r.l
	for range 30 {
		r.append(1, 1500, 0)
	}
	must(t, r.l.Flush())
	flushed := len(r.records)
	r.append(1, 10, 0)
	r.open()
	r.records = r.records[:flushed]
	r.check()
	if r.l.Durable() != uint64(flushed) {
		t.Errorf("durable %d of %d", r.l.Durable(), flushed)
	}
	must(t, r.l.Close())
	killed.Close()
}

func TestOneSyncServesMany(t *testing.T) {
	fs := disk.NewFaulty(disk.NewMem())
	var syncs atomic.Int64
	gate := make(chan struct{})
	r := newRig(t, fs, 4<<20)
	fs.Observe(func(op disk.Op, _ string) {
		if op == disk.OpSync {
			syncs.Add(1)
			<-gate
		}
	})
	const many = 64
	var mu sync.Mutex
	var wg, waiting sync.WaitGroup
	waiting.Add(many)
	for range many {
		wg.Go(func() {
			mu.Lock()
			r.append(1, 100, 0)
			seq := r.tail().Seq
			mu.Unlock()
			waiting.Done()
			if err := r.l.Sync(t.Context(), seq); err != nil {
				t.Error(err)
			}
			if r.l.Durable() < seq {
				t.Errorf("sync of %d returned with %d durable", seq, r.l.Durable())
			}
		})
	}
	waiting.Wait() // all have appended; the first sync still hangs
	close(gate)
	wg.Wait()
	// One took those who came before it, at most one more the others, and a
	// waiter may have come between two.
	if n := syncs.Load(); n > 4 {
		t.Errorf("%d syncs for %d waiters", n, many)
	}
	r.check()
}

// TestSyncAllMeanwhile syncs all that there is while it is undone.
func TestSyncAllMeanwhile(t *testing.T) {
	r := newRig(t, disk.NewMem(), 64<<10)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := r.l.SyncAll(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for i := 0; i < 2000 && !t.Failed(); i++ {
		r.append(cluster.Epoch(1+i), 100, 0)
		r.append(cluster.Epoch(1+i), 100, 0)
		seq := r.tail().Seq - 1
		must(t, r.l.TruncateAfter(seq))
		r.records = r.records[:seq]
	}
	stop()
	wg.Wait()
	must(t, r.l.SyncAll())
	if got := r.l.Durable(); got != r.tail().Seq {
		t.Errorf("durable up to %d of %d", got, r.tail().Seq)
	}
	r.check()
}

// TestReadersMeanwhile reads while records are appended, undone and trimmed.
func TestReadersMeanwhile(t *testing.T) {
	r := newRig(t, disk.NewMem(), 64<<10)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var reads atomic.Int64
	for i := range 3 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for ctx.Err() == nil {
				base, tail := r.l.Base().Seq, r.l.Tail().Seq
				after := base + rng.Uint64N(tail-min(base, tail)+1)
				ps, poss, locs, err := r.l.Read(after, 20_000)
				if err != nil && !errors.Is(err, ErrTrimmed) {
					t.Errorf("read after %d: %v", after, err)
					return
				}
				for i, p := range ps {
					if poss[i].Seq != after+uint64(i)+1 || !bytes.Equal(p, payload(poss[i].Seq, len(p))) {
						t.Errorf("read after %d: %v at %d", after, poss[i], i)
						return
					}
				}
				reads.Add(int64(len(ps)))
				if len(locs) > 0 {
					if s, err := r.l.OpenSegment(locs[0].Segment); err == nil {
						got := make([]byte, locs[0].Len)
						// The record may have been undone since.
						if err := s.ReadAt(got, locs[0].Off); err == nil && !bytes.Equal(got, ps[0]) && len(got) > 0 {
							t.Errorf("record %v reads differently now", poss[0])
						}
						s.Close()
					}
				}
			}
		})
	}
	rng := rand.New(rand.NewPCG(5, 5))
	epoch := cluster.Epoch(1)
	for i := 0; !t.Failed() && (i < 3000 || reads.Load() < 1000); i++ {
		switch rng.IntN(30) {
		case 0:
			must(t, r.l.SyncAll())
		case 1:
			seq := max(r.l.Base().Seq, r.tail().Seq-min(r.tail().Seq, 5))
			must(t, r.l.TruncateAfter(seq))
			r.records = r.records[:seq]
			epoch++
		case 2:
			if tail := r.l.Tail().Seq; tail > 50 {
				must(t, r.l.TrimBefore(tail-50))
			}
		case 3:
			must(t, r.l.Flush())
		default:
			r.append(epoch, rng.IntN(3000), 0)
		}
	}
	stop()
	wg.Wait()
	r.check()
}

func TestClosed(t *testing.T) {
	r := newRig(t, disk.NewMem(), 64<<10)
	r.append(1, 10, 0)
	must(t, r.l.Close())
	must(t, r.l.Close())
	if err := r.l.Flush(); !errors.Is(err, ErrClosed) {
		t.Errorf("flush: %v", err)
	}
	if _, err := r.l.Append(cluster.Pos{Epoch: 1, Seq: 2}, nil, 0); !errors.Is(err, ErrClosed) {
		t.Errorf("append: %v", err)
	}
	if _, _, _, err := r.l.Read(0, 10); !errors.Is(err, ErrClosed) {
		t.Errorf("read: %v", err)
	}
	if _, err := r.l.OpenSegment(1); !errors.Is(err, ErrClosed) {
		t.Errorf("open segment: %v", err)
	}
	must(t, r.l.Sync(t.Context(), 1)) // it is durable, so there is nothing to refuse
}

// TestOSDisk lives a little on the real file system.
func TestOSDisk(t *testing.T) {
	r := &rig{t: t, fs: disk.OS, opt: Options{FS: disk.OS, Dir: t.TempDir() + "/log", SegmentSize: 1 << 20}}
	r.open()
	t.Cleanup(func() { r.l.Close() })
	rng := rand.New(rand.NewPCG(1, 1))
	for range 200 {
		r.append(1, rng.IntN(40000), 0)
		if rng.IntN(20) == 0 {
			must(t, r.l.SyncAll())
		}
	}
	r.check()
	must(t, r.l.TruncateAfter(150))
	r.records = r.records[:150]
	r.append(2, 100000, 100000)
	r.reopen()
	r.check()
	must(t, r.l.TrimBefore(140))
	r.reopen()
	r.check()
	var onDisk int64
	names, err := disk.OS.List(r.opt.Dir)
	must(t, err)
	for _, name := range names {
		st, err := os.Stat(r.opt.Dir + "/" + name)
		must(t, err)
		onDisk += st.Size()
	}
	if got := r.l.Size(); got != onDisk {
		t.Errorf("size %d, the files have %d", got, onDisk)
	}
}
