package replica_test

import (
	"context"
	"log/slog"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica"
)

// slow makes every flush of a brick's log take d.
func (w *world) slow(id cluster.BrickID, d time.Duration) {
	s := w.nodes[id].store
	s.mu.Lock()
	defer s.mu.Unlock()
	s.disk = slowDisk{takes: d}
}

// syncs has several writers make changes that are synced, one after the other each, on slow
// disks. When one is answered every brick has it on its disk.
func (w *world) syncs(t *testing.T, writers, times int, change func(c *client, k, i int) (*fsop.Reply, error)) {
	t.Helper()
	for _, id := range w.order {
		w.slow(id, 2*time.Millisecond)
	}
	var wg sync.WaitGroup
	for k := range writers {
		wg.Go(func() {
			c := &client{w: w, id: cluster.SessionID(k + 1)}
			time.Sleep(time.Duration(k) * 100 * time.Microsecond) // virtual, as all that follow
			for i := range times {
				r, err := change(c, k, i)
				if err != nil {
					t.Error(err)
					return
				}
				for _, id := range w.order {
					if d := w.nodes[id].store.Durable(); d < r.Seq {
						t.Errorf("a change was answered as synced, and brick %v has change %d not on disk but %d", id, r.Seq, d)
					}
				}
			}
		})
	}
	wg.Wait()
}

// Several writers that sync at once share flushes, and none is answered before
// every brick has what it wrote.
func TestSyncsShareFlushes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		const writers, times = 4, 25
		w.syncs(t, writers, times, func(c *client, k, i int) (*fsop.Reply, error) {
			r, err := c.do(t.Context(), &fsop.Setxattr{Ino: 1, Name: "k" + strconv.Itoa(k), Value: []byte(strconv.Itoa(i))})
			if err == nil {
				_, err = c.do(t.Context(), &fsop.Fsync{Ino: 1})
			}
			return r, err
		})
		for _, id := range w.order {
			s := w.nodes[id].store
			s.mu.Lock()
			n := s.disk.flushes
			s.mu.Unlock()
			if n > writers*times/3 {
				t.Errorf("%d syncs cost brick %v %d flushes", writers*times, id, n)
			}
		}
	})
}

// Writes that several writers want durable leave together with the wish for it.
func TestSyncedWritesLeaveTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		const writers, times = 4, 25
		w.syncs(t, writers, times, func(c *client, k, i int) (*fsop.Reply, error) {
			return c.do(t.Context(), &fsop.Write{Ino: fsop.Ino(k + 1), Off: uint64(i), Data: []byte("x"), Sync: true})
		})
		primary := w.nodes[w.order[0]]
		primary.outMu.Lock()
		defer primary.outMu.Unlock()
		if n := primary.sent[proto.KindAppend]; n > 2*writers*times/2 { // the opening of sessions, too
			t.Errorf("%d synced writes went to two bricks in %d messages", writers*times, n)
		}
	})
}

// What is held back for the next round leaves when somebody waits for more than
// that round, and at the next tick in any case.
func TestHeldWritesGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		backup := w.nodes[w.order[2]].store
		before := &client{w: w, id: 9}
		if err := before.set(t.Context(), "before", "x"); err != nil {
			t.Fatal(err)
		}
		var cs []*client
		for id := range 4 {
			cs = append(cs, &client{w: w, id: cluster.SessionID(id + 1)})
			if !cs[id].attach(t.Context()) {
				t.Fatal("cannot attach")
			}
		}
		w.slow(w.order[1], 5*time.Second)
		var wg sync.WaitGroup
		write := func(id int) (gone func() bool) {
			tail := backup.Tail().Seq
			wg.Go(func() {
				if _, err := cs[id].do(t.Context(), &fsop.Write{Ino: 1, Data: []byte("x"), Sync: true}); err != nil {
					t.Error(err)
				}
			})
			time.Sleep(2 * time.Millisecond)
			return func() bool { return backup.Tail().Seq > tail }
		}
		time.Sleep(7*time.Millisecond - time.Duration(time.Now().UnixNano())%(100*time.Millisecond) + 100*time.Millisecond)
		if gone := write(1); !gone() {
			t.Error("a lone synced write waits")
		}
		gone := write(2)
		if gone() {
			t.Error("a write that can be durable only with the next round did not wait for it")
		}
		began := time.Now()
		if err := before.set(t.Context(), "meanwhile", "x"); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d > 20*time.Millisecond || !gone() {
			t.Errorf("a change took %v behind a write that is held back; that is gone: %v", d, gone())
		}
		gone = write(3)
		if gone() {
			t.Error("a write after that did not wait for the next round")
		}
		time.Sleep(100 * time.Millisecond) // a tick
		if !gone() {
			t.Error("a write is held back for longer than a tick")
		}
		wg.Wait()
	})
}

// While a backup's disk is busy with a flush that took its acknowledgement of
// entries along, that of others does not wait for it, nor does the set take the
// brick for one that does not answer. (It cannot do without it, see TestFlushThatLags.)
func TestAcknowledgementsDoNotWaitForTheDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 3)
		c, other := &client{w: w, id: 1}, &client{w: w, id: 2}
		for _, c := range []*client{c, other} {
			if err := c.set(t.Context(), "before", "x"); err != nil {
				t.Fatal(err)
			}
		}
		w.slow(w.order[1], 5*time.Second)
		synced := make(chan error, 1)
		go func() {
			_, err := c.do(t.Context(), &fsop.Fsync{Ino: 1})
			synced <- err
		}()
		time.Sleep(50 * time.Millisecond)
		began := time.Now()
		if err := other.set(t.Context(), "meanwhile", "x"); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d > 20*time.Millisecond {
			t.Errorf("a change took %v while a disk was busy", d)
		}
		select {
		case err := <-synced:
			t.Fatalf("the fsync did not wait for the disk: %v", err)
		default:
		}
		if err := <-synced; err != nil {
			t.Fatal(err)
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.cfg.Epoch != 1 {
			t.Errorf("a disk that was busy for 5 s cost the set an epoch: %+v", w.cfg)
		}
	})
}

// An acknowledgement that a backup holds back for a flush is not held back longer
// than until its next tick: the primary would take the brick for a dead one.
func TestHeldAcknowledgementsGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		c := &client{w: w, id: 1}
		if err := c.set(t.Context(), "before", "x"); err != nil {
			t.Fatal(err)
		}
		w.slow(w.order[1], 5*time.Second)
		synced := make(chan error, 1)
		go func() {
			_, err := c.do(t.Context(), &fsop.Write{Ino: 1, Data: []byte("x"), Sync: true})
			synced <- err
		}()
		time.Sleep(150 * time.Millisecond) // a tick, and not yet a heartbeat, which says it too
		st, err := w.nodes[w.order[0]].live().Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if st.Commit != st.Tail.Seq {
			t.Errorf("committed up to %d of %v while a disk is busy", st.Commit, st.Tail)
		}
		if err := <-synced; err != nil {
			t.Fatal(err)
		}
	})
}

// recorder is a Transport that keeps what is sent.
type recorder struct {
	mu    sync.Mutex
	kinds []uint8
}

func (r *recorder) Send(_ cluster.BrickID, kind uint8, _ ...[]byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.kinds = append(r.kinds, kind)
	return nil
}
func (r *recorder) Flush(cluster.BrickID) {}
func (r *recorder) Call(ctx context.Context, _ cluster.BrickID, _ uint8, _ ...[]byte) ([]byte, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}
func (r *recorder) Propose(context.Context, cluster.SetConfig) error { return replica.ErrRefused }
func (r *recorder) Suspect(context.Context, cluster.SetID, cluster.Epoch, cluster.BrickID) error {
	return nil
}

func (r *recorder) count(kind uint8) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range r.kinds {
		if k == kind {
			n++
		}
	}
	return n
}

// A backup whose log may differ from the primary's says of nothing that it is
// durable: it may have another change at that place.
func TestSyncOfALogThatMayDiffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		set, self, primary := cluster.SetID{Volume: cluster.NewID()}, cluster.NewID(), cluster.NewID()
		s := newMemStore()
		for i := range uint64(5) {
			pos := cluster.Pos{Epoch: 1, Seq: i + 1}
			if _, err := s.Execute(&proto.Entry{Pos: pos, Time: int64(i) + 1, Op: &fsop.Setxattr{Ino: 1, Name: "k", Value: []byte("x")}}, nil); err != nil {
				t.Fatal(err)
			}
		}
		out := &recorder{}
		r, err := replica.New(replica.Config{Set: set, Brick: self, Store: s, Transport: out, Control: out, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- r.Run(ctx) }()
		defer func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}()
		cfg := cluster.SetConfig{Set: set, Epoch: 2, Primary: primary, Members: []cluster.BrickID{primary, self}, InSync: []cluster.BrickID{primary, self}, MinInSync: 1}
		r.Configure(cfg)
		r.Connected(primary)
		tell := func(kind uint8, m codec.Coded) {
			r.Message(proto.Envelope{Set: set, From: primary, To: self}, kind, codec.Append(nil, m), nil)
			synctest.Wait()
		}
		ask := &proto.Sync{Epoch: 2, Seq: 4}
		tell(proto.KindProbe, &proto.Probe{Config: cfg, Round: 7})
		tell(proto.KindSync, ask)
		if n := out.count(proto.KindSyncAck); n != 0 {
			t.Fatal("the brick vouches for entries that the primary may have otherwise")
		}
		// The two logs meet after the third entry; the others are the old epoch's.
		tell(proto.KindAppend, &proto.Append{Epoch: 2, Round: 7, Prev: cluster.Pos{Epoch: 1, Seq: 3}})
		tell(proto.KindSync, ask)
		if n := out.count(proto.KindSyncAck); n != 0 {
			t.Fatal("the brick vouches for entries that it does not have")
		}
		ask.Seq = 3
		tell(proto.KindSync, ask)
		if n := out.count(proto.KindSyncAck); n != 1 {
			t.Fatalf("%d acknowledgements of what both have", n)
		}
	})
}

// The bricks begin with an entry while their primary writes its own log. Nobody is told of
// anything before the log of who tells it has it: neither the client by the primary nor the
// primary by a backup.
func TestEntriesLeaveFirst(t *testing.T) {
	for slow, name := range []string{"the primary", "a backup"} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, 3, 2)
			c := &client{w: w, id: 1}
			if err := c.set(t.Context(), "before", "x"); err != nil {
				t.Fatal(err)
			}
			s, backup := w.nodes[w.order[slow]].store, w.nodes[w.order[2]].store
			s.mu.Lock()
			s.handing = 300 * time.Millisecond
			s.mu.Unlock()
			tail, began := backup.Tail().Seq, time.Now()
			done := make(chan error, 1)
			go func() { done <- c.set(t.Context(), "a", "x") }()
			time.Sleep(20 * time.Millisecond)
			if backup.Tail().Seq == tail {
				t.Errorf("%s takes long to write its log: a backup has no entry after %v", name, time.Since(began))
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			if d := time.Since(began); d < s.handing {
				t.Errorf("%s takes %v to write its log: the client was answered after %v", name, s.handing, d)
			}
		})
	}
}
