package core

import (
	"testing"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/proto"
)

// A backup that came into step before another has given the primary its lease
// gets its own as soon as there is one to give, not with the next heartbeat.
func TestLeasesBeginTogether(t *testing.T) {
	self, a, b := cluster.NewID(), cluster.NewID(), cluster.NewID()
	all := []BrickID{self, a, b}
	m := New(0, self, Brick{Whole: true, Trusted: true})
	m.Configure(0, cluster.SetConfig{Epoch: 1, Primary: self, Members: all, InSync: all, MinInSync: 1})
	m.Loaded()
	m.Appended(0, cluster.Pos{Epoch: 1, Seq: 1})
	m.Cleared(0, 1)
	m.Ready()
	now := time.Second
	inStep := func(to BrickID) {
		t.Helper()
		m.Connected(now, to)
		probes := sent[proto.Probe](t, m, to)
		if len(probes) != 1 {
			t.Fatalf("%d probes after the connection", len(probes))
		}
		round := probes[0].Round
		m.BeatAck(now, to, &proto.BeatAck{Epoch: 1, Round: round, Echo: uint64(now), Stamp: 1})
		m.ProbeAck(now, to, &proto.ProbeAck{Epoch: 1, Round: round, Whole: true})
		m.AppendAck(now, to, &proto.AppendAck{Epoch: 1, Round: round, Seq: 1})
	}
	granted := func(r Ready, to BrickID) (n int) {
		for _, msg := range r.Messages {
			if beat, ok := msg.Body.(*proto.Beat); ok && msg.To == to && beat.Grant > 0 {
				n++
			}
		}
		return n
	}
	inStep(a)
	if n := granted(m.Ready(), a); n != 0 {
		t.Fatalf("%d leases given while the primary has none", n)
	}
	now += 10 * time.Millisecond
	inStep(b)
	r := m.Ready()
	if granted(r, a) != 1 || granted(r, b) != 1 {
		t.Errorf("%d and %d leases were given when the primary got its own; want one each", granted(r, a), granted(r, b))
	}
	if _, ok := m.Serving(now); !ok {
		t.Error("the primary holds no lease")
	}
}

// A primary that was stopped for longer than its lease commits nothing by what it was
// told before: meanwhile those who said it may have lost that with their power, and a
// new primary gone on without it.
func TestCommitNeedsALease(t *testing.T) {
	_, m, _, b := pair(t)
	now := time.Second
	m.Connected(now, b)
	round := sent[proto.Probe](t, m, b)[0].Round
	m.ProbeAck(now, b, &proto.ProbeAck{Epoch: 1, Round: round, Whole: true})
	asked := now
	m.BeatAck(now, b, &proto.BeatAck{Epoch: 1, Round: round, Echo: uint64(asked), Stamp: 1})
	now += cluster.Lease
	m.AppendAck(now, b, &proto.AppendAck{Epoch: 1, Round: round, Seq: 1})
	m.Tick(now)
	if m.Commit() != 0 || m.Acked() != 0 {
		t.Fatalf("committed up to %d after the lease", m.Commit())
	}
	m.BeatAck(now, b, &proto.BeatAck{Epoch: 1, Round: round, Echo: uint64(now) - 1, Stamp: 2})
	if m.Commit() != 1 || m.Acked() != 1 {
		t.Errorf("committed up to %d under the new lease, want 1", m.Commit())
	}
}
