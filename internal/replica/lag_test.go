package replica_test

import (
	"errors"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"mortar/internal/fsop"
)

// A disk that takes 20 s for a flush, and everything else as ever: who syncs waits no longer than for a brick
// that is silent, if the set can do without it; and longer if it cannot. When the disk is well again the
// brick is in sync again.
func TestFlushThatLags(t *testing.T) {
	const crawl = 20 * time.Second
	for _, c := range []struct {
		name    string
		primary bool
		min     int
		longest time.Duration
	}{
		{"a backup's disk", false, 2, 2 * time.Second},
		{"the primary's disk", true, 2, 2 * time.Second},
		{"a backup's disk, and all are needed", false, 3, crawl + time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, 3, c.min)
				client := &client{w: w, id: 1, home: 2}
				synced := func(i int) time.Duration {
					t.Helper()
					began := time.Now()
					if err := client.set(t.Context(), "k", strconv.Itoa(i)); err != nil {
						t.Fatal(err)
					}
					if _, err := client.do(t.Context(), &fsop.Fsync{Ino: 1}); err != nil {
						t.Fatal(err)
					}
					return time.Since(began)
				}
				for _, id := range w.order {
					w.slow(id, 2*time.Millisecond)
				}
				synced(0)
				time.Sleep(2 * time.Second)
				who := w.order[1]
				if c.primary {
					who = w.order[0]
				}
				w.slow(who, crawl)
				took := synced(1)
				t.Logf("the sync took %v", took)
				if took > c.longest || took < time.Second {
					t.Errorf("the sync took %v, want at most %v", took, c.longest)
				}
				if c.min == 3 {
					return
				}
				// It is tried now and then whether the disk is well again.
				var worst, all time.Duration
				for i := range 2000 {
					took := synced(2 + i)
					worst, all = max(worst, took), all+took
				}
				t.Logf("2000 syncs took %v, the longest %v", all, worst)
				if worst > c.longest || all > 30*time.Second {
					t.Errorf("without that disk 2000 syncs took %v, one of them %v", all, worst)
				}
				w.mu.Lock()
				if w.cfg.IsInSync(who) || w.cfg.Primary == who {
					t.Errorf("the set is %+v", w.cfg)
				}
				w.mu.Unlock()
				w.slow(who, 2*time.Millisecond)
				w.settled(crawl + 15*time.Second)
			})
		})
	}
}

// How long a sync waited in an epoch in which the set could not do without the disk that hangs is no measure
// for the next one, in which it can.
func TestFlushThatLagsIntoAnotherEpoch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 3)
		client := &client{w: w, id: 1, home: 2}
		if err := client.set(t.Context(), "k", "1"); err != nil {
			t.Fatal(err)
		}
		w.slow(w.order[1], 5*time.Minute)
		synced := make(chan error, 1)
		go func() {
			_, err := client.do(t.Context(), &fsop.Fsync{Ino: 1})
			synced <- err
		}()
		time.Sleep(30 * time.Second) // how long it waits is the test's subject
		w.mu.Lock()
		next := w.cfg.Clone()
		next.Epoch++
		next.MinInSync = 2
		err := w.commitLocked(next)
		w.mu.Unlock()
		began := time.Now()
		if err := errors.Join(err, <-synced); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("the sync took %v from when the set could do without that disk", took)
		}
		w.slow(w.order[1], time.Millisecond)
		w.settled(6 * time.Minute)
	})
}

// Disks that are all busy, and do not end together, are none that lags.
func TestFlushesThatAllTakeLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		for i, id := range w.order {
			w.slow(id, time.Duration(2000+2000*i)*time.Millisecond)
		}
		client := &client{w: w, id: 1, home: 2}
		for i := range 5 {
			if err := client.set(t.Context(), "k", strconv.Itoa(i)); err != nil {
				t.Fatal(err)
			}
			if _, err := client.do(t.Context(), &fsop.Fsync{Ino: 1}); err != nil {
				t.Fatal(err)
			}
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.cfg.Epoch != 1 {
			t.Errorf("the set is %+v", w.cfg)
		}
	})
}
