package replica_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica"
)

// client is a session that finds a home as package client does: it moves on
// when told NotServing, and asks again under the same number.
type client struct {
	w       *world
	id      cluster.SessionID
	home    int // index in w.order where it begins
	number  uint64
	s       atomic.Pointer[replica.Session] // replicas that it has left still ask for it
	invals  atomic.Int64
	ignores atomic.Bool // never acknowledges an Inval
}

func (c *client) Invalidate(m *proto.Inval) error {
	c.invals.Add(1)
	if s := c.s.Load(); s != nil && !c.ignores.Load() {
		go s.InvalAck(m.Seq)
	}
	return nil
}
func (c *client) Detached(string) {}

func (c *client) attach(ctx context.Context) bool {
	for i := range c.w.order {
		r := c.w.nodes[c.w.order[(c.home+i)%len(c.w.order)]].live()
		if r == nil {
			continue
		}
		s, reply := r.Attach(ctx, "", &proto.Attach{Version: proto.Version, Set: c.w.set, Session: c.id, Client: "test"}, c)
		if reply.Status == proto.OK {
			c.s.Store(s)
			s.Ping(&proto.Ping{})
			return true
		}
	}
	return false
}

// ask asks as a client does that stays: in every epoch again.
func ask(ctx context.Context, s *replica.Session, do proto.Do) proto.DoReply {
	for {
		d := s.Do(ctx, &do)
		if d.Status != proto.Anew {
			return d
		}
		do.Epoch = d.Epoch
	}
}

func (c *client) do(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
	var n uint64
	if op.Kind().Mutates() {
		c.number++
		n = c.number
	}
	for ctx.Err() == nil {
		if c.s.Load() == nil && !c.attach(ctx) {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		d := ask(ctx, c.s.Load(), proto.Do{Number: n, Acked: n, Op: op})
		switch {
		case d.Status != proto.OK:
			c.s.Swap(nil).Detach()
		case d.Errno != 0:
			return nil, d.Errno
		default:
			return &d.Reply, nil
		}
	}
	return nil, ctx.Err()
}

func (c *client) set(ctx context.Context, k, v string) error {
	_, err := c.do(ctx, &fsop.Setxattr{Ino: 1, Name: k, Value: []byte(v)})
	return err
}

func (c *client) get(ctx context.Context, k string) (string, error) {
	r, err := c.do(ctx, &fsop.Getxattr{Ino: 1, Name: k})
	if err != nil {
		return "", err
	}
	return string(r.Data), nil
}

// settled waits until all live bricks are in sync and equal.
func (w *world) settled(limit time.Duration) {
	w.t.Helper()
	deadline := time.Now().Add(limit)
	for {
		w.mu.Lock()
		n, primary := len(w.cfg.InSync), w.cfg.Primary
		w.mu.Unlock()
		if r := w.nodes[primary].live(); n == len(w.order) && r != nil {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			all, err := r.Verify(ctx)
			cancel()
			same := err == nil && len(all) == n
			for _, d := range all {
				same = same && d.Status == proto.OK && d.Sum == all[primary].Sum
			}
			if same {
				return
			}
			if time.Now().After(deadline) {
				w.t.Fatalf("bricks differ: %v %v", all, err)
			}
		} else if time.Now().After(deadline) {
			for _, id := range w.order {
				if r := w.nodes[id].live(); r != nil {
					s, err := r.Status(context.Background())
					w.t.Logf("%v: %+v %v", id, s, err)
				}
			}
			w.t.Fatalf("in sync: %d of %d, epoch %d", n, len(w.order), w.cfg.Epoch)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func TestWriteIsSeenEverywhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		ctx := t.Context()
		for i := range 30 {
			a, b := &client{w: w, id: 1, home: i % 3}, &client{w: w, id: 2, home: (i + 1) % 3}
			a.number = uint64(i * 10)
			v := strconv.Itoa(i)
			if err := a.set(ctx, "k", v); err != nil {
				t.Fatal(err)
			}
			if got, err := b.get(ctx, "k"); err != nil || got != v {
				t.Fatalf("got %q, %v; want %q", got, err, v)
			}
		}
		w.settled(time.Second)
	})
}

// stall runs one writer on the brick that survives and returns the longest time
// that a single write took while fault was in force.
func stall(t *testing.T, w *world, home int, fault func()) time.Duration {
	ctx, cancel := context.WithCancel(t.Context())
	var worst time.Duration
	var wg sync.WaitGroup
	w.writers++
	c := &client{w: w, id: 6 + cluster.SessionID(w.writers), home: home}
	if err := c.set(ctx, "w", "0"); err != nil {
		t.Fatal(err)
	}
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			began := time.Now()
			if err := c.set(ctx, "w", strconv.Itoa(i)); err != nil {
				if ctx.Err() == nil {
					t.Error(err)
				}
				return
			}
			worst = max(worst, time.Since(began))
		}
	})
	time.Sleep(2 * time.Second)
	fault()
	time.Sleep(8 * time.Second)
	cancel()
	wg.Wait()
	return worst
}

func TestStallOfSilentBackup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		d := stall(t, w, 0, func() { w.isolate(w.order[1], true) })
		if d > 2*time.Second || d < time.Second {
			t.Errorf("stall %v; want the lease, about 1.5 s", d)
		}
		w.isolate(w.order[1], false)
		w.settled(10 * time.Second)
	})
}

func TestStallOfSilentPrimary(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		d := stall(t, w, 1, func() { w.isolate(w.order[0], true) })
		if d > 2*time.Second || d < time.Second {
			t.Errorf("stall %v; want the lease, about 1.5 s", d)
		}
		w.isolate(w.order[0], false)
		w.settled(10 * time.Second)
	})
}

func TestStallOfDrain(t *testing.T) {
	for _, who := range []int{0, 1} {
		t.Run(fmt.Sprint(who), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, 3, 2)
				d := stall(t, w, 2, func() {
					if err := w.nodes[w.order[who]].live().Drain(t.Context()); err != nil {
						t.Error(err)
					}
					w.kill(w.order[who])
				})
				if d > 200*time.Millisecond {
					t.Errorf("stall %v", d)
				}
				w.startNode(w.order[who])
				w.settled(10 * time.Second)
			})
		})
	}
}

// Clocks that are set back and forth by an hour, differently on every machine, and
// a fail-over from one that is ahead to one that is behind: no lease is broken or
// lost, nothing waits longer than a lease, and the times of a set never go back.
func TestClocksAreSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		d := stall(t, w, 2, func() {
			for i, wrong := range []time.Duration{time.Hour, -time.Hour, -2 * time.Hour, 3 * time.Hour, 0} {
				for k, id := range w.order {
					w.nodes[id].wrong.Store(int64(wrong) * int64(1-k))
				}
				time.Sleep(time.Duration(i) * 300 * time.Millisecond)
			}
		})
		if d > 50*time.Millisecond {
			t.Errorf("a write took %v because clocks were set", d)
		}
		w.nodes[w.order[0]].wrong.Store(int64(time.Hour))
		w.nodes[w.order[1]].wrong.Store(-int64(time.Hour))
		w.nodes[w.order[2]].wrong.Store(-int64(time.Hour))
		if d := stall(t, w, 2, func() { w.isolate(w.order[0], true) }); d > 2*time.Second {
			t.Errorf("a fail-over to a clock that is two hours behind took %v", d)
		}
		w.isolate(w.order[0], false)
		w.settled(10 * time.Second)
		for _, n := range w.nodes {
			var last int64
			for _, e := range n.store.entries {
				if e.Time <= last {
					t.Errorf("brick %v: the time of %v is %d, after %d", n.id, e.Pos, e.Time, last)
				}
				last = e.Time
			}
		}
	})
}

func TestTooFewInSyncRefusesWritesAndServesReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		c := &client{w: w, id: 1, home: 0}
		if err := c.set(t.Context(), "k", "v"); err != nil {
			t.Fatal(err)
		}
		w.isolate(w.order[1], true)
		w.isolate(w.order[2], true)
		time.Sleep(3 * time.Second)
		if err := c.set(t.Context(), "k", "w"); err != fsop.EROFS {
			t.Errorf("write with one of three: %v; want EROFS", err)
		}
		if v, err := c.get(t.Context(), "k"); v != "v" || err != nil {
			t.Errorf("read with one of three: %q, %v", v, err)
		}
		w.isolate(w.order[1], false)
		w.isolate(w.order[2], false)
		w.settled(10 * time.Second)
		if err := c.set(t.Context(), "k", "w"); err != nil {
			t.Error(err)
		}
	})
}

// All bricks crash at once, as in a power cut. The first to come back leads
// alone, with fewer in sync than the set needs; writers wait for the others
// and hear nothing of it.
func TestAllRestartedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var acked [3]atomic.Int64
		for k := range acked {
			wg.Go(func() {
				c := &client{w: w, id: cluster.SessionID(1 + k), home: k}
				for i := int64(1); ctx.Err() == nil; i++ {
					began := time.Now()
					err := c.set(ctx, fmt.Sprint("k", k), strconv.FormatInt(i, 10))
					if err != nil {
						if ctx.Err() == nil {
							t.Errorf("write %d of k%d, after %v: %v", i, k, time.Since(began), err)
						}
						return
					}
					acked[k].Store(i)
				}
			})
		}
		for range 3 {
			time.Sleep(time.Second)
			for _, id := range w.order {
				w.kill(id)
			}
			var before [3]int64
			for k := range acked {
				before[k] = acked[k].Load()
			}
			for _, id := range w.order {
				w.startNode(id)
			}
			w.mu.Lock()
			epoch := w.cfg.Epoch
			w.mu.Unlock()
			alone := false // for some time one brick led and could take no changes
			for range 500 {
				time.Sleep(10 * time.Millisecond)
				w.mu.Lock()
				alone = alone || w.cfg.Epoch > epoch && !w.cfg.Writable()
				w.mu.Unlock()
			}
			if !alone {
				t.Error("no brick led alone: this test tests nothing")
			}
			for k := range acked {
				if n := acked[k].Load(); n <= before[k] {
					t.Errorf("the writer of k%d stands at %d", k, n)
				}
			}
		}
		cancel()
		wg.Wait()
		w.settled(10 * time.Second)
	})
}

// A set that stays too small refuses changes, after it has waited for others.
func TestLeanWaitEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		c := &client{w: w, id: 1, home: 0}
		if err := c.set(t.Context(), "k", "v"); err != nil {
			t.Fatal(err)
		}
		for _, id := range w.order {
			w.kill(id)
		}
		w.startNode(w.order[0])
		began := time.Now()
		err := c.set(t.Context(), "k", "w")
		if d := time.Since(began); err != fsop.EROFS || d < 2*time.Second || d > 6*time.Second {
			t.Errorf("a write with one of three: %v after %v; want EROFS after the fail-over and 2 s", err, d)
		}
		began = time.Now()
		if err := c.set(t.Context(), "k", "w"); err != fsop.EROFS || time.Since(began) > 100*time.Millisecond {
			t.Errorf("the next: %v after %v; want EROFS at once", err, time.Since(began))
		}
		for _, id := range w.order[1:] {
			w.startNode(id)
		}
		w.settled(10 * time.Second)
		if err := c.set(t.Context(), "k", "w"); err != nil {
			t.Error(err)
		}
	})
}

// A set that is out of touch with itself ends no session: its clients could not
// be heard of, and retries must be recognised when it is back.
func TestSessionsOutliveTheirSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		c := &client{w: w, id: 1, home: 0}
		if err := c.set(t.Context(), "k", "1"); err != nil {
			t.Fatal(err)
		}
		// A client that looks for another home when its own stops serving.
		moving := &client{w: w, id: 2, home: 0}
		if err := moving.set(t.Context(), "m", "1"); err != nil {
			t.Fatal(err)
		}
		for _, id := range w.order {
			w.isolate(id, true)
		}
		moving.s.Load().Detach()
		done := make(chan error, 1)
		go func() { done <- c.set(t.Context(), "k", "2") }()
		time.Sleep(3 * cluster.SessionTimeout)
		select {
		case err := <-done:
			t.Errorf("a write without the set: %v", err)
		default:
		}
		for _, id := range w.order {
			w.isolate(id, false)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		w.settled(10 * time.Second)
		for _, id := range w.order {
			ended := slices.ContainsFunc(w.nodes[id].store.entries, func(e proto.Entry) bool { return e.Op.Kind() == fsop.KindCloseSession })
			if ended {
				t.Errorf("brick %v has ended the session", id)
			}
		}
	})
}

// What finds no room waits a moment for it, once; when that is in vain, others
// are refused at once.
func TestWaitForRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		c := &client{w: w, id: 1, home: 1}
		store := w.nodes[w.order[0]].store
		full := func(is bool) {
			store.mu.Lock()
			defer store.mu.Unlock()
			store.full = is
		}
		if err := c.set(t.Context(), "k", "1"); err != nil {
			t.Fatal(err)
		}
		for _, step := range []struct {
			room     time.Duration // when there is, 0: never
			pause    time.Duration // before
			want     error
			min, max time.Duration
		}{
			{room: time.Second, min: time.Second, max: 1200 * time.Millisecond},
			{want: fsop.ENOSPC, max: 10 * time.Millisecond}, // waiting gave very little
			{room: time.Second, pause: 11 * time.Second, min: time.Second, max: 1200 * time.Millisecond},
		} {
			time.Sleep(step.pause)
			full(true)
			if step.room > 0 {
				timer := time.AfterFunc(step.room, func() { full(false) })
				defer timer.Stop()
			}
			began := time.Now()
			err := c.set(t.Context(), "k", "2")
			if d := time.Since(began); err != step.want || d < step.min || d > step.max {
				t.Errorf("%+v: %v after %v", step, err, d)
			}
		}
		// In vain.
		w2 := newWorld(t, 3, 2)
		d := &client{w: w2, id: 1, home: 1}
		w2.nodes[w2.order[0]].store.full = true
		for i, want := range []time.Duration{2 * time.Second, 0} {
			began := time.Now()
			if err := d.set(t.Context(), "k", "1"); err != fsop.ENOSPC || time.Since(began).Round(500*time.Millisecond) != want {
				t.Errorf("attempt %d: %v after %v", i, err, time.Since(began))
			}
		}
	})
}

// Every brick knows what the fullest of the set can take.
func TestRoomIsTheLeast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 1)
		c := &client{w: w, id: 1, home: 1}
		for _, full := range []int{0, 2} {
			for i, id := range w.order {
				store := w.nodes[id].store
				store.mu.Lock()
				store.taken = 1 << 30
				if i == full {
					store.taken = 1 << 39
				}
				store.mu.Unlock()
			}
			if err := c.set(t.Context(), "k", fmt.Sprint(full)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			for i, id := range w.order {
				store := w.nodes[id].store
				store.mu.Lock()
				room := min(store.room, 1<<40-store.taken)
				store.mu.Unlock()
				if want := uint64(1 << 39); room > want || room < want-1<<20 {
					t.Errorf("brick %d is full, and %d may give %d bytes, want about %d", full, i, room, want)
				}
			}
		}
	})
}

// A client that does not acknowledge delays others no longer than its lease.
func TestDeafClientCostsItsLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2, 1)
		a, b := &client{w: w, id: 1, home: 0}, &client{w: w, id: 2, home: 1}
		if err := a.set(t.Context(), "k", "1"); err != nil {
			t.Fatal(err)
		}
		if _, err := b.do(t.Context(), &fsop.Getattr{Ino: 1}); err != nil {
			t.Fatal(err)
		}
		b.ignores.Store(true)
		began := time.Now()
		if err := a.set(t.Context(), "k", "2"); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d < time.Second || d > 2*time.Second {
			t.Errorf("write took %v; want the lease of the deaf client", d)
		}
		if b.invals.Load() == 0 {
			t.Error("the deaf client was not told")
		}
		began = time.Now()
		if err := a.set(t.Context(), "k", "3"); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d > 100*time.Millisecond {
			t.Errorf("the next write took %v; the client has lapsed", d)
		}
	})
}

// However many removed files are open, those behind them that are not go.
func TestReapsBehindHeldFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		const first, held, free = 100, 3000, 20
		var holds []proto.Hold
		for i := range held {
			holds = append(holds, proto.Hold{Ino: fsop.Ino(first + i), N: 1})
		}
		for _, n := range w.nodes {
			n.store.mu.Lock()
			for i := range held + free {
				n.store.orphans = append(n.store.orphans, fsop.Ino(first+i))
			}
			n.store.mu.Unlock()
		}
		c := &client{w: w, id: 1, home: 1}
		s, reply := w.nodes[w.order[1]].live().Attach(t.Context(), "", &proto.Attach{Version: proto.Version, Set: w.set, Session: 1, Client: "test", Holds: holds}, c)
		if reply.Status != proto.OK {
			t.Fatal(reply)
		}
		s.Ping(&proto.Ping{})
		left := func() int {
			st := w.nodes[w.order[0]].store
			st.mu.Lock()
			defer st.mu.Unlock()
			return len(st.orphans)
		}
		for range 40 {
			time.Sleep(100 * time.Millisecond)
			s.Ping(&proto.Ping{})
		}
		if n := left(); n != held {
			t.Errorf("%d are left, of which %d are held", n, held)
		}
	})
}

func TestLockWaiterIsWoken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		lock := func(ty fsop.LockType, wait bool) *fsop.Setlk {
			return &fsop.Setlk{Ino: 5, Wait: wait, Lock: fsop.Lock{Type: ty, End: 1<<63 - 1}}
		}
		a, b := &client{w: w, id: 1, home: 1}, &client{w: w, id: 2, home: 2}
		if _, err := a.do(t.Context(), lock(fsop.LockWrite, false)); err != nil {
			t.Fatal(err)
		}
		if _, err := b.do(t.Context(), lock(fsop.LockWrite, false)); err != fsop.EAGAIN {
			t.Fatalf("second lock: %v", err)
		}
		began := time.Now()
		if _, err := b.do(t.Context(), lock(fsop.LockWrite, true)); err != fsop.EAGAIN || time.Since(began) < fsop.LockWait {
			t.Fatalf("waiting lock: %v after %v", err, time.Since(began))
		}
		var at time.Duration
		var wg sync.WaitGroup
		wg.Go(func() {
			began := time.Now()
			if _, err := b.do(t.Context(), lock(fsop.LockWrite, true)); err != nil {
				t.Error(err)
			}
			at = time.Since(began)
		})
		time.Sleep(time.Second)
		if _, err := a.do(t.Context(), lock(fsop.LockUnlock, false)); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		if at < time.Second || at > time.Second+50*time.Millisecond {
			t.Errorf("granted after %v; want about 1 s", at)
		}
	})
}

// A brick that has durably applied what its set never committed cannot go back;
// it is compared with the primary, once, and follows it again.
func TestAppliedTooFarIsCompared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		for i := range 5 {
			a := &client{w: w, id: cluster.SessionID(1 + i), home: 0}
			if err := a.set(t.Context(), "k", strconv.Itoa(i)); err != nil {
				t.Fatal(err)
			}
		}
		w.isolate(w.order[0], true)
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		lost := &client{w: w, id: 50, home: 0}
		_ = lost.set(ctx, "k", "lost")
		cancel()
		time.Sleep(3 * time.Second)
		b := &client{w: w, id: 60, home: 1}
		if err := b.set(t.Context(), "k", "kept"); err != nil {
			t.Fatal(err)
		}
		s := w.nodes[w.order[0]].store
		s.mu.Lock()
		s.flushed = len(s.entries)
		s.mu.Unlock()
		w.isolate(w.order[0], false)
		w.settled(5 * time.Second)
		if n := s.heals; n != 1 {
			t.Errorf("compared %d times", n)
		}
	})
}

// A store that ends the goroutine that calls it ends its replica, and nothing hangs.
func TestStoreThatGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		a := &client{w: w, id: 1, home: 1}
		if err := a.set(t.Context(), "k", "1"); err != nil {
			t.Fatal(err)
		}
		s := w.nodes[w.order[0]].store
		s.mu.Lock()
		s.giveUp = true
		s.mu.Unlock()
		began := time.Now()
		if err := a.set(t.Context(), "k", "2"); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d > 2*time.Second {
			t.Errorf("the others needed %v", d)
		}
		w.kill(w.order[0]) // it has ended; Run returned the store's error
	})
}

// TestRandomFaults lets clients write and read one register each while bricks
// die, return, and are cut off, and checks that no read is older than the last
// write acknowledged before it began, on any brick.
func TestRandomFaults(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { randomFaults(t, seed) })
		})
	}
}

func randomFaults(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	w := newWorld(t, 3, 1+int(seed%2))
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	const keys = 3
	var acked [keys]atomic.Int64
	for k := range keys {
		name := fmt.Sprint("k", k)
		wg.Go(func() { // the only writer of its key
			c := &client{w: w, id: cluster.SessionID(100 + k), home: k}
			for i := int64(1); ctx.Err() == nil; i++ {
				err := c.set(ctx, name, strconv.FormatInt(i, 10))
				if err == fsop.EROFS {
					time.Sleep(50 * time.Millisecond)
					continue
				}
				if err == nil {
					acked[k].Store(i)
				}
				time.Sleep(time.Millisecond)
			}
		})
		for h := range 3 {
			wg.Go(func() {
				c := &client{w: w, id: cluster.SessionID(200 + 10*k + h), home: h}
				var last int64
				for ctx.Err() == nil {
					floor := max(acked[k].Load(), last)
					v, err := c.get(ctx, name)
					if err == nil {
						got, _ := strconv.ParseInt(v, 10, 64)
						if got < floor {
							t.Errorf("read %d of %s, although %d was acknowledged or read before", got, name, floor)
						}
						last = got
					} else if err == fsop.ENODATA && floor > 0 {
						t.Errorf("%s is gone, although %d was acknowledged", name, floor)
					}
					time.Sleep(time.Millisecond)
				}
			})
		}
	}
	time.Sleep(time.Second)
	for range 8 {
		id := w.order[rng.IntN(3)]
		pause := time.Duration(rng.IntN(4000)) * time.Millisecond
		switch rng.IntN(3) {
		case 0:
			w.isolate(id, true)
			time.Sleep(pause)
			w.isolate(id, false)
		case 1:
			w.kill(id)
			time.Sleep(pause)
			w.startNode(id)
		case 2:
			a, b := id, w.order[rng.IntN(3)]
			w.mu.Lock()
			w.cut[[2]cluster.BrickID{a, b}] = true // one way
			w.mu.Unlock()
			time.Sleep(pause)
			w.isolate(a, false)
		}
		time.Sleep(time.Duration(rng.IntN(3000)) * time.Millisecond)
	}
	time.Sleep(5 * time.Second)
	cancel()
	wg.Wait()
	w.settled(20 * time.Second)
	c := &client{w: w, id: 999}
	for k := range keys {
		v, err := c.get(t.Context(), fmt.Sprint("k", k))
		got, _ := strconv.ParseInt(v, 10, 64)
		if err != nil || got < acked[k].Load() {
			t.Errorf("k%d is %d, %v; %d was acknowledged", k, got, err, acked[k].Load())
		}
	}
}

// What was carried out and is sent again, because the answer was lost, is answered and
// not refused, while the set takes no changes or has no room: when the change was
// acknowledged before, at once, and else with the answer that it would have had.
func TestRefusedIsNotCarriedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		c := &client{w: w, id: 1, home: 0}
		if err := c.set(t.Context(), "k", "v"); err != nil {
			t.Fatal(err)
		}
		ask := func(n uint64) proto.DoReply {
			return ask(t.Context(), c.s.Load(), proto.Do{Number: n, Acked: 1, Op: &fsop.Setxattr{Ino: 1, Name: "k", Value: []byte{byte(n)}}})
		}
		acked := ask(2)
		store := w.nodes[w.order[0]].store
		store.setFull(true)
		if again := ask(2); again.Errno != 0 || again.Reply.Seq != acked.Reply.Seq {
			t.Errorf("without room: %+v, at first %+v", again, acked)
		}
		if other := ask(9); other.Errno != fsop.ENOSPC {
			t.Errorf("another without room: %+v", other)
		}
		store.setFull(false)
		w.isolate(w.order[1], true)
		w.isolate(w.order[2], true)
		begun := make(chan proto.DoReply, 2)
		go func() { begun <- ask(3) }()
		time.Sleep(3 * time.Second)
		if again := ask(2); again.Status != proto.OK || again.Errno != 0 || again.Reply.Seq != acked.Reply.Seq {
			t.Errorf("with one of three: %+v, at first %+v", again, acked)
		}
		if other := ask(4); other.Errno != fsop.EROFS {
			t.Errorf("another with one of three: %+v", other)
		}
		go func() { begun <- ask(3) }()
		time.Sleep(time.Second)
		if len(begun) > 0 {
			t.Fatalf("answered %+v while nothing may be acknowledged", <-begun)
		}
		w.isolate(w.order[1], false)
		w.isolate(w.order[2], false)
		if a, b := <-begun, <-begun; a.Status != proto.OK || a.Errno != 0 || a.Reply.Seq <= acked.Reply.Seq || a.Reply.Seq != b.Reply.Seq {
			t.Errorf("what was under way: %+v and %+v", a, b)
		}
		w.settled(10 * time.Second)
	})
}
