package client

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// When the set has ended the session, a change whose answer was lost fails: nobody
// knows whether it was carried out, and it is not carried out a second time. What
// comes later is carried out in a new session.
func TestSessionEnded(t *testing.T) { synctest.Test(t, testSessionEnded) }

func testSessionEnded(t *testing.T) {
	s := newSet(t, 2)
	c := newClient(t, s, &fakeKernel{})
	awaitReady(t, c)
	if _, err := c.Do(t.Context(), createOp("before")); err != nil {
		t.Fatal(err)
	}
	old := c.Session()
	s.cutReply = func(do *proto.Do) bool {
		op, ok := do.Op.(*fsop.Create)
		if cut := ok && op.Name == "uncertain"; !cut {
			return false
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.ended = old
		return true
	}
	if _, err := c.Do(t.Context(), createOp("uncertain")); err != fsop.EIO {
		t.Errorf("a change without an answer, of a session that has ended: %v, want EIO", err)
	}
	if _, err := c.Do(t.Context(), createOp("after")); err != nil {
		t.Errorf("a change of the next session: %v", err)
	}
	if c.Session() == old {
		t.Error("the session that has ended is used again")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, want := range map[string]int{"before": 1, "uncertain": 1, "after": 1} {
		if n := s.executed[s.names[name]]; n != want {
			t.Errorf("%s was made %d times, want %d", name, n, want)
		}
	}
	var first, last proto.Attach
	for _, d := range s.daemons {
		d.mu.Lock()
		for _, a := range d.attaches {
			if a.Session == old {
				first = a
			} else {
				last = a
			}
		}
		d.mu.Unlock()
	}
	if first.Opened != 0 || last.Opened != 0 || last.Session == 0 {
		t.Errorf("attached as %+v and as %+v: both are new sessions", first, last)
	}
}

// A session that comes back says as which one it was opened.
func TestSessionSaysWhenItWasOpened(t *testing.T) { synctest.Test(t, testSessionSaysWhenItWasOpened) }

func testSessionSaysWhenItWasOpened(t *testing.T) {
	s := newSet(t, 1)
	c := newClient(t, s, &fakeKernel{})
	awaitReady(t, c)
	s.daemons[0].cut()
	if _, err := c.Do(t.Context(), createOp("f")); err != nil {
		t.Fatal(err)
	}
	d := s.daemons[0]
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := len(d.attaches); n != 2 || d.attaches[0].Opened != 0 || d.attaches[1].Opened == 0 || d.attaches[1].Session != d.attaches[0].Session {
		t.Errorf("attached as %+v", d.attaches)
	}
}

// A lease lasts for as long as the home says, and no longer than any may.
func TestLeaseAsGiven(t *testing.T) {
	for _, given := range []time.Duration{cluster.Lease / 10, cluster.Lease, time.Hour} {
		var l lease
		l.init()
		l.renew(nil, monotonic(), given)
		want := min(given, cluster.Lease)
		if left, ok := l.left(); !ok || left > want || left < want/2 {
			t.Errorf("a lease of %v has %v left, want %v", given, left, want)
		}
	}
}

// While the session moves, whoever has the home from before in hand may still ask it, and is answered.
// That home does not tell any more what others change: what it says is not to be cached, and its
// Pong is no lease.
func TestHomeFromBefore(t *testing.T) { synctest.Test(t, testHomeFromBefore) }

func testHomeFromBefore(t *testing.T) {
	s := newSet(t, 2)
	c := newClient(t, s, &fakeKernel{})
	awaitReady(t, c)
	before, err := c.awaitHome(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ask := func(h *home) *fsop.Reply {
		t.Helper()
		d, granted, err := (&sending{c}).ask(t.Context(), h, &outcome{op: &fsop.Getattr{Ino: 1}})
		if err != nil {
			t.Fatal(err)
		}
		r, err := c.give(d, granted)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if ask(before).Seq == 0 {
		t.Fatal("what the home says is not to be cached: the test shows nothing")
	}
	i := slices.IndexFunc(s.daemons, func(d *fakeDaemon) bool { return d.attachedConns() == 0 })
	now, err := c.connect(t.Context(), candidate{addrs: []string{s.daemons[i].name + ":1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer now.close(errors.New("the test ends"))
	if err := now.attach(t.Context(), c.set()); err != nil {
		t.Fatal(err)
	}
	if _, err := before.ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c.Leased() {
		t.Error("the home from before has given a lease")
	}
	if err := now.firstPing(t.Context()); err != nil || !c.Leased() {
		t.Fatalf("the new home gives no lease: %v", err)
	}
	if ask(now).Seq == 0 {
		t.Error("what the new home says is not to be cached")
	}
	if r := ask(before); r.Seq != 0 {
		t.Errorf("what the home from before says is to be cached: %+v", r)
	}
}
