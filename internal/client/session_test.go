package client

import (
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
		l.renew(monotonic(), given)
		want := min(given, cluster.Lease)
		if left, ok := l.left(); !ok || left > want || left < want/2 {
			t.Errorf("a lease of %v has %v left, want %v", given, left, want)
		}
	}
}
