package replica_test

import (
	"bytes"
	"context"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// Messages that a broken connection took with it, and conversations that have
// to begin anew.

// A change goes on although the backup's word that it has it was lost: the
// backup repeats it with its heartbeats.
func TestLostAppendAck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c := &client{w: w, id: 1}
		if err := c.set(ctx, "k", "0"); err != nil {
			t.Fatal(err)
		}
		for i := range 10 {
			w.losing(w.order[1], proto.KindAppendAck)
			began := time.Now()
			if err := c.set(ctx, "k", strconv.Itoa(i)); err != nil {
				t.Fatal(err)
			}
			if d := time.Since(began); d > cluster.Heartbeat+50*time.Millisecond {
				t.Errorf("the change took %v, a heartbeat is %v", d, cluster.Heartbeat)
			}
		}
		w.losing(cluster.BrickID{}, proto.KindAppendAck)
		w.settled(time.Second)
		if w.cfg.Epoch != 1 {
			t.Errorf("epoch %d: a brick was taken for dead", w.cfg.Epoch)
		}
	})
}

// When the way to its primary is there again, a backup says at once what may
// have been lost on it.
func TestReconnectedBackupSpeaksFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c := &client{w: w, id: 1}
		if err := c.set(ctx, "k", "0"); err != nil {
			t.Fatal(err)
		}
		backup := w.order[1]
		time.Sleep(cluster.Heartbeat / 2)
		w.losing(backup, proto.KindAppendAck, proto.KindBeatAck)
		done := make(chan error, 1)
		go func() { done <- c.set(ctx, "k", "1") }()
		time.Sleep(20 * time.Millisecond)
		w.losing(cluster.BrickID{}, proto.KindAppendAck, proto.KindBeatAck)
		began := time.Now()
		w.connect(backup, w.order[0])
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d > 10*time.Millisecond {
			t.Errorf("the change took %v after the connection was there again", d)
		}
		w.settled(time.Second)
	})
}

// A brick that is opened again while all connections hold finds back into its set.
func TestReopenedUnderItsConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c := &client{w: w, id: 1}
		for i := range 5 {
			if err := c.set(ctx, "k", strconv.Itoa(i)); err != nil {
				t.Fatal(err)
			}
			w.reopen(w.order[1])
			if err := c.set(ctx, "l", strconv.Itoa(i)); err != nil {
				t.Fatal(err)
			}
			w.settled(5 * time.Second)
		}
		if w.nodes[w.order[1]].store.heals != 0 {
			t.Error("the brick was compared")
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.cfg.Epoch != 1 {
			t.Errorf("epoch %d: the brick was taken for dead", w.cfg.Epoch)
		}
	})
}

// Many large changes at once are sent in messages that fit into a frame.
func TestLargeChangesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var clients [8]*client
		for i := range clients {
			clients[i] = &client{w: w, id: cluster.SessionID(i + 1)}
			if err := clients[i].set(ctx, "k", "0"); err != nil {
				t.Fatal(err)
			}
		}
		epoch := w.cfg.Epoch
		var wg sync.WaitGroup
		for i, c := range clients {
			wg.Go(func() {
				if _, err := c.do(ctx, &fsop.Write{Ino: fsop.Ino(i + 2), Data: bytes.Repeat([]byte{byte(i)}, 700<<10)}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		// And one that was away gets them from the log.
		w.isolate(w.order[2], true)
		for i, c := range clients {
			if _, err := c.do(ctx, &fsop.Write{Ino: fsop.Ino(i + 2), Off: 1, Data: make([]byte, 400<<10)}); err != nil {
				t.Fatal(err)
			}
			if i == 0 && w.cfg.Epoch != epoch+1 {
				t.Errorf("epoch %d after %d: a brick was taken for dead before one was", w.cfg.Epoch, epoch)
			}
		}
		w.isolate(w.order[2], false)
		w.settled(5 * time.Second)
	})
}

// A brick that is opened again with its contents lost, while all connections hold,
// is compared, also when the first comparison fails.
func TestReopenedEmpty(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c := &client{w: w, id: 1}
		for i := range 5 {
			if err := c.set(ctx, "k", strconv.Itoa(i)); err != nil {
				t.Fatal(err)
			}
			s := w.nodes[w.order[1]].store
			s.mu.Lock()
			s.whole, s.failHeals = false, i
			s.mu.Unlock()
			w.reopen(w.order[1])
			compared := func() bool {
				s.mu.Lock()
				defer s.mu.Unlock()
				return s.heals == i+1
			}
			for began := time.Now(); !compared(); time.Sleep(50 * time.Millisecond) {
				if time.Since(began) > 5*time.Second {
					t.Fatalf("round %d: not compared within 5 s", i)
				}
			}
			w.settled(5 * time.Second)
		}
	})
}
