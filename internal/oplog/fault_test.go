package oplog

import (
	"context"
	"errors"
	"sync"
	"syscall"
	"testing"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

var errBoom = errors.New("boom")

// poisoned checks that a log serves no more and that opening it again does.
func (r *rig) poisoned(fs *disk.Faulty) {
	r.t.Helper()
	if !errors.Is(r.l.Err(), errBoom) {
		r.t.Fatalf("Err: %v", r.l.Err())
	}
	select {
	case <-r.l.Failed():
	default:
		r.t.Fatal("Failed is not closed")
	}
	fs.Clear() // the disk gets well again, which changes nothing
	for name, err := range map[string]error{
		"append": func() error {
			_, err := r.l.Append(cluster.Pos{Epoch: 1, Seq: r.l.Tail().Seq + 1}, nil, 0)
			return err
		}(),
		"flush":    r.l.Flush(),
		"truncate": r.l.TruncateAfter(0),
		"trim":     r.l.TrimBefore(1),
		"reset":    r.l.Reset(cluster.Pos{}, nil),
	} {
		if !errors.Is(err, errBoom) {
			r.t.Errorf("%s of a failed log: %v", name, err)
		}
	}
	if n := r.l.Durable(); n < r.l.Tail().Seq {
		if err := r.l.SyncAll(); !errors.Is(err, errBoom) {
			r.t.Errorf("sync of a failed log: %v", err)
		}
	}
	r.l.Close()
	r.open()
}

func TestFailedSyncEndsTheService(t *testing.T) {
	fs := disk.NewFaulty(disk.NewMem())
	r := newRig(t, fs, 64<<10)
	r.append(1, 100, 0)
	must(t, r.l.SyncAll())
	fs.Add(disk.Fault{Op: disk.OpSync, Path: "*.log", Times: 1, Err: errBoom})
	r.append(1, 100, 0)
	r.append(1, 100, 0)
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			if err := r.l.Sync(t.Context(), 3); !errors.Is(err, errBoom) {
				t.Errorf("sync: %v", err)
			}
		})
	}
	wg.Wait()
	must(t, r.l.Sync(t.Context(), 1)) // what was durable still is
	if got := r.l.Durable(); got != 1 {
		t.Errorf("durable %d after a failed sync, want 1", got)
	}
	r.poisoned(fs)
	r.check()
}

func TestFailedWriteEndsTheService(t *testing.T) {
	for _, size := range []int{100, 80000} {
		for _, torn := range []bool{false, true} {
			fs := disk.NewFaulty(disk.NewMem())
			r := newRig(t, fs, 256<<10)
			r.append(1, 100, 0)
			must(t, r.l.SyncAll())
			fs.Add(disk.Fault{Op: disk.OpWrite, Times: 1, Err: errBoom, Torn: torn})
			_, err := r.l.Append(cluster.Pos{Epoch: 1, Seq: 2}, payload(2, size), 0)
			if err == nil {
				err = r.l.Flush()
			}
			if !errors.Is(err, errBoom) {
				t.Fatalf("%d bytes, torn %v: %v", size, torn, err)
			}
			r.poisoned(fs)
			if tail := r.l.Tail().Seq; tail != 1 && !(torn && tail == 2) {
				t.Errorf("%d bytes, torn %v: tail %d", size, torn, tail)
			}
		}
	}
}

// TestEveryCallFails lets every call that a log makes fail in turn, while it is
// opened and while it is used. It must say so, at the latest at the next sync,
// and lose nothing that was durable.
func TestEveryCallFails(t *testing.T) {
	use := func(l *Log, durable *uint64) error {
		for i := range 60 {
			if _, err := l.Append(cluster.Pos{Epoch: 1, Seq: l.Tail().Seq + 1}, payload(0, 1500), 0); err != nil {
				return err
			}
			if i%7 == 0 {
				if err := l.SyncAll(); err != nil {
					return err
				}
				*durable = l.Tail().Seq
			}
			if i == 30 {
				if err := l.TrimBefore(10); err != nil {
					return err
				}
			}
			if i == 40 {
				if err := l.TruncateAfter(39); err != nil {
					return err
				}
				*durable = 39
			}
		}
		return l.Close()
	}
	for skip := 0; ; skip++ {
		m := disk.NewMem()
		must(t, m.MkdirAll("/brick", 0o700))
		calls := 0
		fs := disk.NewFaulty(m, disk.Fault{Skip: skip, Times: 1, Err: errBoom})
		var mu sync.Mutex
		fs.Observe(func(disk.Op, string) {
			mu.Lock()
			defer mu.Unlock()
			calls++
		})
		durable := uint64(0)
		o := Options{FS: fs, Dir: "/brick/log", SegmentSize: 32 << 10}
		l, err := Open(o)
		if err == nil {
			err = use(l, &durable)
			l.Close()
		}
		if err != nil && !errors.Is(err, errBoom) {
			t.Fatalf("call %d failed, the log said: %v", skip, err)
		}
		if err == nil && l.Tail().Seq != 58 {
			t.Fatalf("call %d failed, the log said nothing and ends at %v", skip, l.Tail())
		}
		mu.Lock()
		reached := calls > skip
		mu.Unlock()
		fs.Clear()
		l, err = Open(o)
		if err != nil {
			t.Fatalf("after call %d had failed: %v", skip, err)
		}
		if l.Tail().Seq < durable {
			t.Fatalf("after call %d had failed: tail %v, %d was durable", skip, l.Tail(), durable)
		}
		must(t, l.Verify(t.Context()))
		must(t, l.Close())
		if !reached {
			t.Logf("%d calls", skip)
			return
		}
	}
}

// TestFullDisk has no room for another segment: the append that needs one
// fails, nothing else changes, and with room again it goes on.
func TestFullDisk(t *testing.T) {
	m := disk.NewMem()
	r := newRig(t, m, 64<<10)
	m.SetLimit(100 << 10)
	var err error
	for err == nil {
		pos := cluster.Pos{Epoch: 1, Seq: r.tail().Seq + 1}
		p := payload(pos.Seq, 3000)
		var loc Loc
		if loc, err = r.l.Append(pos, p, 0); err == nil {
			r.records = append(r.records, entry{pos, p, loc})
		}
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("append on a full disk: %v", err)
	}
	must(t, r.l.Err())
	r.check()
	must(t, r.l.SyncAll())
	if used := m.Used(); used > 64<<10 {
		t.Errorf("%d bytes used: the segment that could not be made takes space", used)
	}
	m.SetLimit(0)
	r.append(1, 3000, 0)
	r.check()
	r.reopen()
	r.check()
}

// TestHungDisk has a sync that does not come back: who waits for it can give
// up, and appends go on.
func TestHungDisk(t *testing.T) {
	fs := disk.NewFaulty(disk.NewMem())
	r := newRig(t, fs, 256<<10)
	until, asked := make(chan struct{}), make(chan struct{}, 10)
	fs.Add(disk.Fault{Op: disk.OpSync, Path: "*.log", Times: 1, Until: until})
	fs.Observe(func(op disk.Op, _ string) {
		if op == disk.OpSync {
			asked <- struct{}{}
		}
	})
	r.append(1, 100, 0)
	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan error)
	go func() { done <- r.l.Sync(ctx, 1) }()
	<-asked
	for range 10 {
		r.append(1, 100, 0)
		r.append(1, 70000/5, 0)
		must(t, r.l.Flush())
	}
	r.check()
	cancel(errBoom)
	if err := <-done; err != errBoom {
		t.Fatalf("sync that was given up: %v", err)
	}
	if r.l.Durable() != 0 {
		t.Fatal("durable without a sync")
	}
	close(until)
	must(t, r.l.SyncAll())
	r.check()
}
