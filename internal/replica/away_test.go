package replica_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica"
)

type sink struct {
	detached chan string
	invals   int
}

func (s *sink) Invalidate(*proto.Inval) error { s.invals++; return nil }
func (s *sink) Detached(text string)          { s.detached <- text }

// A session that was out of touch for long comes back as what it was, and one that
// has ended is not opened again; nor is another client's.
func TestSessionsComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		home, other := w.nodes[w.order[0]].live(), w.nodes[w.order[1]].live()
		attach := func(r *replica.Replica, opened int64, owner string) (*replica.Session, proto.AttachReply, *sink) {
			t.Helper()
			k := &sink{detached: make(chan string, 1)}
			s, reply := r.Attach(t.Context(), owner, &proto.Attach{Session: 1, Opened: opened, Client: "c"}, k)
			return s, reply, k
		}
		s, first, k := attach(home, 0, "me")
		if first.Status != proto.OK || first.Opened == 0 {
			t.Fatalf("%+v", first)
		}
		if _, r, _ := attach(other, first.Opened, "another"); r.Status != proto.Refused {
			t.Errorf("another client's attach: %+v, want a refusal", r)
		}
		if _, r, _ := attach(other, 0, "another"); r.Status != proto.Refused {
			t.Errorf("another client's attach as if it were new: %+v, want a refusal", r)
		}
		do := func(s *replica.Session, n uint64, name string) proto.DoReply {
			return ask(t.Context(), s, proto.Do{Number: n, Acked: n, Op: &fsop.Setxattr{Ino: 1, Name: name, Value: []byte("v")}})
		}
		one := do(s, 1, "a")
		if one.Status != proto.OK || one.Errno != 0 {
			t.Fatalf("%+v", one)
		}
		// Its home says nothing of it any more, for longer than a session may be silent.
		s.Detach()
		time.Sleep(cluster.SessionTimeout + time.Second)
		s, back, k2 := attach(other, first.Opened, "me")
		if back.Status != proto.OK || back.Opened != first.Opened {
			t.Fatalf("after %v: %+v, at first %+v", cluster.SessionTimeout, back, first)
		}
		if r := do(s, 1, "a"); r.Status != proto.OK || r.Errno != 0 || r.Reply.Seq != one.Reply.Seq {
			t.Errorf("a change that was carried out before: %+v, want the answer of then: %+v", r, one)
		}
		// It is away again, and its home does not know.
		primary := w.nodes[w.order[0]].live()
		closer, r, _ := func() (*replica.Session, proto.AttachReply, *sink) {
			k := &sink{detached: make(chan string, 1)}
			s, reply := primary.Attach(t.Context(), "me", &proto.Attach{Session: 2, Client: "c"}, k)
			return s, reply, k
		}()
		if r.Status != proto.OK {
			t.Fatalf("%+v", r)
		}
		closer.Detach()
		w.isolate(w.order[1], true)
		time.Sleep(cluster.SessionTimeout + 3*time.Second)
		w.isolate(w.order[1], false)
		w.settled(10 * time.Second)
		s, back, k2 = attach(w.nodes[w.order[1]].live(), first.Opened, "me")
		if back.Status != proto.OK || back.Opened != first.Opened {
			t.Fatalf("after it was cut off with its home: %+v", back)
		}
		// It ends, as at an unmount. Whoever still speaks for it hears so.
		if r := ask(t.Context(), s, proto.Do{Number: 2, Acked: 2, Op: &fsop.CloseSession{Session: 1}}); r.Errno != 0 || r.Status != proto.OK {
			t.Fatalf("%+v", r)
		}
		if _, r, _ := attach(home, first.Opened, "me"); r.Status != proto.SessionEnded {
			t.Errorf("a session that ended: %+v, want SessionEnded", r)
		}
		_, _ = k, k2
	})
}

// A change of a session that the set took for gone while its home was in touch is
// not answered with an error: the client attaches again.
func TestSessionTakenForGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c := &client{w: w, id: 1, home: 1}
		if err := c.set(ctx, "a", "1"); err != nil {
			t.Fatal(err)
		}
		// The home's heartbeats do not tell of the session: it is silent for the primary.
		w.losing(w.order[1], proto.KindBeatAck)
		time.Sleep(300 * time.Millisecond)
		w.losing(cluster.BrickID{}, proto.KindBeatAck)
		for _, id := range w.order {
			w.nodes[id].store.mu.Lock()
			delete(w.nodes[id].store.sess, 1)
			w.nodes[id].store.mu.Unlock()
		}
		if err := c.set(ctx, "a", "2"); err != nil {
			t.Errorf("a change after the session was taken for gone: %v", err)
		}
	})
}

// A client's lease ends with its home's: nobody takes back from its caches what is
// changed after that.
func TestLeaseEndsWithTheHomes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		home := w.nodes[w.order[1]].live()
		k := &sink{detached: make(chan string, 1)}
		s, r := home.Attach(t.Context(), "me", &proto.Attach{Session: 1, Client: "c"}, k)
		if r.Status != proto.OK {
			t.Fatalf("%+v", r)
		}
		time.Sleep(time.Second)
		if p := s.Ping(&proto.Ping{}); !p.Serving || time.Duration(p.Lease) < cluster.Lease/2 || time.Duration(p.Lease) > cluster.Lease {
			t.Fatalf("in touch with its primary: %+v", p)
		}
		w.isolate(w.order[1], true)
		cut := time.Now()
		var last time.Time // when the last lease is over
		for range 40 {
			time.Sleep(50 * time.Millisecond)
			if p := s.Ping(&proto.Ping{}); p.Serving {
				last = time.Now().Add(time.Duration(p.Lease))
			}
		}
		if d := last.Sub(cut); d > cluster.Lease || d < cluster.Lease/2 {
			t.Errorf("its client's last lease ends %v after the home was cut off, a lease is %v", d, cluster.Lease)
		}
		w.isolate(w.order[1], false)
	})
}

// A session that falls silent while the set takes no changes is sent away when it
// takes them again: its locks do not stay for ever.
func TestSilentWhileTheSetTakesNoChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 3)
		primary := w.nodes[w.order[0]].live()
		s, r := primary.Attach(t.Context(), "me", &proto.Attach{Session: 1, Client: "c"}, &sink{detached: make(chan string, 1)})
		if r.Status != proto.OK {
			t.Fatalf("%+v", r)
		}
		w.kill(w.order[2])
		s.Detach()
		time.Sleep(2 * cluster.SessionTimeout)
		w.startNode(w.order[2])
		w.settled(10 * time.Second)
		time.Sleep(cluster.SessionTimeout + time.Second)
		for _, info := range w.nodes[w.order[0]].store.Sessions() {
			if info.ID == 1 && !info.Away {
				t.Errorf("after %v of silence: %+v", 3*cluster.SessionTimeout, info)
			}
		}
	})
}

// An Attach that the same client's next one has overtaken, and one in the name of a
// session that is another client's, are refused and take nothing away: what the session
// has cached is still taken back.
func TestAttachTakesNothingAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		home := w.nodes[w.order[0]].live()
		attach := func(turn uint64, owner string) (*replica.Session, proto.AttachReply, *sink) {
			t.Helper()
			k := &sink{detached: make(chan string, 1)}
			s, reply := home.Attach(t.Context(), owner, &proto.Attach{Session: 1, Turn: turn, Client: "c"}, k)
			return s, reply, k
		}
		s, r, k := attach(2, "me")
		if r.Status != proto.OK || !s.Ping(&proto.Ping{}).Serving {
			t.Fatalf("%+v", r)
		}
		if d := ask(t.Context(), s, proto.Do{Op: &fsop.Getattr{Ino: 1}}); d.Status != proto.OK {
			t.Fatalf("%+v", d)
		}
		if _, r, _ := attach(1, "me"); r.Status != proto.NotServing {
			t.Errorf("an Attach that was overtaken: %+v", r)
		}
		if _, r, _ := attach(3, "another"); r.Status != proto.Refused {
			t.Errorf("another client's: %+v", r)
		}
		writer := &client{w: w, id: 2, home: 1}
		if err := writer.set(t.Context(), "k", "v"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if k.invals != 1 {
			t.Errorf("the session was told %d times of a change of what it has cached", k.invals)
		}
		if _, r, _ := attach(3, "me"); r.Status != proto.OK {
			t.Errorf("the next Attach: %+v", r)
		}
	})
}

// What a client asked through a home that it has left is not carried out any more once it
// has asked through the next one: there it may have been refused, and gone on.
func TestLateForward(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		attach := func(brick int, turn uint64) *replica.Session {
			t.Helper()
			s, r := w.nodes[w.order[brick]].live().Attach(t.Context(), "me", &proto.Attach{Session: 1, Turn: turn, Client: "c"}, &sink{detached: make(chan string, 1)})
			if r.Status != proto.OK {
				t.Fatalf("%+v", r)
			}
			return s
		}
		set := func(s *replica.Session, n uint64, name string) proto.DoReply {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			return ask(ctx, s, proto.Do{Number: n, Acked: 1, Op: &fsop.Setxattr{Ino: 1, Name: name, Value: []byte("v")}})
		}
		for _, left := range []int{0, 1} { // the primary's own, and one that forwards
			turn := uint64(2 * left)
			before := attach(left, turn+1)
			if r := set(before, turn+1, "a"); r.Status != proto.OK || r.Errno != 0 {
				t.Fatalf("%+v", r)
			}
			after := attach(2, turn+2)
			if r := set(before, turn+2, "b"); r.Status != proto.OK || r.Errno != 0 {
				t.Errorf("before anything came through the next home: %+v", r)
			}
			if r := set(after, turn+2, "b"); r.Status != proto.OK || r.Errno != 0 {
				t.Errorf("through the next home: %+v", r)
			}
			if r := set(before, 9, "c"); r.Status != proto.NotServing {
				t.Errorf("after that, through the one that was left: %+v", r)
			}
		}
	})
}

// slowSink has its brick's loop stand still when it is told of a change.
type slowSink struct {
	sink
	takes time.Duration
}

func (s *slowSink) Invalidate(*proto.Inval) error { time.Sleep(s.takes); return nil }

// lockOf asks for the lock of a file, and reports whether the session was given it.
func lockOf(t *testing.T, s *replica.Session, ino fsop.Ino, n uint64) bool {
	t.Helper()
	r := ask(t.Context(), s, proto.Do{Number: n, Acked: n, Op: &fsop.Setlk{Ino: ino, Lock: fsop.Lock{Type: fsop.LockWrite, End: 1<<63 - 1}}})
	if r.Status != proto.OK || r.Errno != 0 && r.Errno != fsop.EAGAIN {
		t.Fatalf("lock of %d: %+v", ino, r)
	}
	return r.Errno == 0
}

// A client that stands still, while its connection holds, is taken for away: its lock goes to
// who waits for it, its home holds nothing for it any more, and sends it to attach again
// when it goes on. One that goes on asking for its lease keeps what it has.
func TestClientStandsStill(t *testing.T) {
	for home, name := range []string{"at the primary", "at a backup"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, 3, 2)
				attach := func(id cluster.SessionID, at int, k replica.Sink) *replica.Session {
					s, r := w.nodes[w.order[at]].live().Attach(t.Context(), "me", &proto.Attach{Session: id, Client: "c", Holds: []proto.Hold{{Ino: fsop.Ino(10 + id), N: 1}}}, k)
					if r.Status != proto.OK || !s.Ping(&proto.Ping{}).Serving {
						t.Fatalf("%+v", r)
					}
					return s
				}
				k := &sink{detached: make(chan string, 8)}
				still, lives, waits := attach(1, home, k), attach(2, home, k), attach(3, 2, k)
				if !lockOf(t, still, 5, 1) || !lockOf(t, lives, 6, 1) {
					t.Fatal("a lock that is free is not given")
				}
				for _, n := range w.nodes {
					n.store.mu.Lock()
					n.store.orphans = []fsop.Ino{11, 12}
					n.store.mu.Unlock()
				}
				began, got := time.Now(), time.Duration(0)
				for n := uint64(1); time.Since(began) < 4*cluster.SessionTimeout; n++ {
					time.Sleep(cluster.Lease / 4)
					if !lives.Ping(&proto.Ping{}).Serving || !waits.Ping(&proto.Ping{}).Serving {
						t.Fatalf("after %v one that asks for its lease gets none", time.Since(began))
					}
					if got == 0 && lockOf(t, waits, 5, n) {
						got = time.Since(began)
					}
				}
				if got < cluster.SessionTimeout || got > cluster.SessionTimeout+2*cluster.Lease {
					t.Errorf("its lock was given to another after %v", got)
				}
				if len(k.detached) != 1 {
					t.Errorf("%d clients were told that they are away", len(k.detached))
				}
				if lockOf(t, waits, 6, 1000) {
					t.Error("the lock of one that lives was given away")
				}
				if p := still.Ping(&proto.Ping{}); p.Serving {
					t.Errorf("it goes on as if nothing had been: %+v", p)
				}
				if left := w.nodes[w.order[0]].store.Orphans(0, 10); len(left) != 1 || left[0] != 12 {
					t.Errorf("inodes %v without a name are left; 12 is held by one that lives", left)
				}
			})
		})
	}
}

// When a brick's own process, or its loop, has stood still, its clients are not to blame:
// none is taken for away before having had the time to be heard of.
func TestHomeStandsStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 1)
		home := w.nodes[w.order[0]].live()
		k := &slowSink{sink{detached: make(chan string, 8)}, 3 * cluster.SessionTimeout}
		attach := func(id cluster.SessionID, k replica.Sink) *replica.Session {
			t.Helper()
			s, r := home.Attach(t.Context(), "me", &proto.Attach{Session: id, Turn: 1, Client: "c"}, k)
			if r.Status != proto.OK || !s.Ping(&proto.Ping{}).Serving {
				t.Fatalf("%+v", r)
			}
			return s
		}
		s := attach(1, k)
		if !lockOf(t, s, 5, 1) {
			t.Fatal("a lock that is free is not given")
		}
		if d := s.Do(t.Context(), &proto.Do{Op: &fsop.Getattr{Ino: 1}}); d.Status != proto.OK {
			t.Fatalf("%+v", d)
		}
		other := attach(2, &k.sink)
		began := time.Now()
		if d := ask(t.Context(), other, proto.Do{Number: 1, Acked: 1, Op: &fsop.Setxattr{Ino: 1, Name: "k", Value: []byte("v")}}); d.Status != proto.OK || time.Since(began) < k.takes {
			t.Fatalf("after %v: %+v", time.Since(began), d)
		}
		time.Sleep(cluster.SessionTimeout / 2)
		if !s.Ping(&proto.Ping{}).Serving || !other.Ping(&proto.Ping{}).Serving {
			t.Error("they were sent away")
		}
		if lockOf(t, other, 5, 2) {
			t.Error("the lock was given away, and its client was there as soon as its home was")
		}
		if len(k.detached) > 0 {
			t.Errorf("sent away: %s", <-k.detached)
		}
	})
}

// What was refused is never carried out: neither a copy of it that comes later in the same
// epoch, nor what a home that its client may have left would ask for in the next one.
func TestRefusedForGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		primary, home := w.nodes[w.order[0]], w.nodes[w.order[1]]
		s, r := home.live().Attach(t.Context(), "me", &proto.Attach{Session: 1, Turn: 1, Client: "c"}, &sink{detached: make(chan string, 8)})
		if r.Status != proto.OK || r.Epoch != 1 {
			t.Fatalf("%+v", r)
		}
		change := func(n, acked uint64) *proto.Do {
			return &proto.Do{Number: n, Acked: acked, Epoch: 1, Op: &fsop.Setxattr{Ino: 1, Name: "k", Value: []byte{byte(n)}}}
		}
		primary.store.setFull(true)
		if d := s.Do(t.Context(), change(1, 1)); d.Errno != fsop.ENOSPC {
			t.Fatalf("without room: %+v", d)
		}
		primary.store.setFull(false)
		copied := func(n, acked uint64) (d proto.DoReply) {
			t.Helper()
			body, err := primary.live().Call(t.Context(), proto.Envelope{Set: w.set, From: w.order[1], To: w.order[0]}, proto.KindForward,
				codec.Append(nil, &proto.Forward{Session: 1, Turn: 1, Do: *change(n, acked)}))
			if err == nil {
				err = codec.Decode(body, &d)
			}
			if err != nil {
				t.Fatal(err)
			}
			return d
		}
		if d := copied(1, 1); d.Errno != fsop.ENOSPC {
			t.Errorf("a copy of what was refused, with room: %+v", d)
		}
		primary.store.setFull(true)
		if d := copied(2, 2); d.Errno != fsop.ENOSPC {
			t.Errorf("the next, without room: %+v", d)
		}
		primary.store.setFull(false)
		if d := copied(1, 1); d.Errno != fsop.ESTALE {
			t.Errorf("a copy of what its client has the answer to: %+v", d)
		}
		if d := copied(3, 3); d.Status != proto.OK || d.Errno != 0 {
			t.Errorf("the one after it: %+v", d)
		}
		// One is under way when the epoch ends.
		w.isolate(w.order[0], true)
		began := time.Now()
		d := s.Do(t.Context(), change(4, 4))
		if d.Status != proto.Anew || d.Epoch != 2 {
			t.Errorf("after %v: %+v, want to be asked again in the next epoch", time.Since(began), d)
		}
		if home.store.text() != "k=\x03;" {
			t.Errorf("%q", home.store.text())
		}
		if d := s.Do(t.Context(), change(4, 4)); d.Status != proto.Anew {
			t.Errorf("asked in an epoch that has ended: %+v", d)
		}
		if d := ask(t.Context(), s, *change(4, 4)); d.Status != proto.OK || d.Errno != 0 || home.store.text() != "k=\x04;" {
			t.Errorf("asked again: %+v, %q", d, home.store.text())
		}
		w.isolate(w.order[0], false)
		w.settled(20 * time.Second)
	})
}
