package core

import (
	"testing"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/proto"
)

// follower is a backup under a lease, of a set of three.
func follower(t *testing.T, now Instant, b Brick) (m *Machine, primary BrickID) {
	t.Helper()
	primary, self, third := cluster.NewID(), cluster.NewID(), cluster.NewID()
	all := []BrickID{primary, self, third}
	cfg := cluster.SetConfig{Epoch: 2, Primary: primary, Members: all, InSync: all, MinInSync: 1}
	b.Tail, b.History, b.Whole = cluster.Pos{Epoch: 1, Seq: 1}, []cluster.Pos{{Epoch: 1, Seq: 1}}, true
	m = New(0, self, b)
	m.Probe(now, primary, &proto.Probe{Config: cfg, Round: 1, Tail: b.Tail})
	m.Loaded()
	m.Append(now, primary, &proto.Append{Epoch: 2, Round: 1, Prev: b.Tail})
	m.Applied(0)
	m.Beat(now, primary, &proto.Beat{Epoch: 2, Round: 1, Stamp: 1, Tail: 1, Grant: uint64(cluster.Lease), Echo: uint64(now)}, nil, 0)
	if _, ok := m.Serving(now); !ok {
		t.Fatal("the backup does not serve")
	}
	m.Ready()
	return m, primary
}

// What a brick that leaves says of its leases is true: it says nothing as long as a
// client of its may answer from what it has cached, of a former life too; and it does
// not wait for that for ever.
func TestLeave(t *testing.T) {
	long := 10 * time.Second // after the start
	for _, c := range []struct {
		name     string
		began    Instant
		promised cluster.Epoch
		cached   func(now Instant) bool
		after    time.Duration
		released bool
	}{
		{"nobody has anything cached", long, 1, func(Instant) bool { return false }, 0, true},
		{"its clients say that they dropped it", long, 1, func(now Instant) bool { return now < long+20*time.Millisecond }, 20 * time.Millisecond, true},
		{"a client says nothing", long, 1, func(Instant) bool { return true }, leaveWait, false},
		{"a former life may have had clients", 500 * time.Millisecond, 1, func(Instant) bool { return false }, leaveWait, false},
		{"those are over meanwhile", cluster.LeaseGuard - 10*time.Millisecond, 1, func(Instant) bool { return false }, 10 * time.Millisecond, true},
		{"there was no former life", time.Second, 0, func(Instant) bool { return false }, 0, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, primary := follower(t, c.began, Brick{Promised: c.promised})
			now := c.began
			for ; ; now += time.Millisecond {
				next, again := m.Leave(now, c.cached(now))
				if again {
					if _, ok := m.Serving(now); !ok {
						t.Fatal("it waits, and serves nothing meanwhile")
					}
					continue
				}
				if next == nil || next.IsInSync(m.self) || next.Primary != primary || len(next.InSync) != 2 || next.Epoch != 3 {
					t.Fatalf("it wants %+v", next)
				}
				break
			}
			if d := now - c.began; d != c.after {
				t.Errorf("it left after %v, want %v", d, c.after)
			}
			if n := len(sent[proto.Release](t, m, primary)); n != 0 != c.released {
				t.Errorf("%d releases, want one: %v", n, c.released)
			}
			if _, ok := m.Serving(now); ok {
				t.Error("it serves after it has left")
			}
		})
	}
}

// A backup that is out of touch with its primary does not ask for it to go on.
func TestLeaveOutOfTouch(t *testing.T) {
	m, _ := follower(t, 10*time.Second, Brick{})
	if next, again := m.Leave(10*time.Second+cluster.Lease, false); next != nil || again {
		t.Errorf("it wants %+v of a primary that it has not heard for a lease", next)
	}
}

// A brick on a drained peer wants to leave as soon as the set can do without it, and is
// not taken in again.
func TestDrained(t *testing.T) {
	m, _ := follower(t, 10*time.Second, Brick{})
	now := 10*time.Second + time.Millisecond
	step := func(cfg cluster.SetConfig) bool {
		t.Helper()
		cfg.Epoch = m.cfg.Epoch + 1
		m.Configure(now, cfg)
		m.Tick(now)
		return m.Ready().Leave
	}
	cfg := m.Config()
	if step(cfg) {
		t.Error("it leaves, and nobody wants it to")
	}
	cfg.Drained, cfg.MinInSync = []BrickID{m.self}, len(cfg.InSync)
	if step(cfg) {
		t.Error("it leaves, and the set would be too small")
	}
	cfg.MinInSync--
	if !step(cfg) {
		t.Error("it does not leave")
	}
	cfg.InSync = cfg.InSync[:1]
	if step(cfg) {
		t.Error("it leaves, and is not in sync")
	}
}

// A primary streams to a drained backup, and proposes it only when it is drained no more.
func TestDrainedIsNotAdded(t *testing.T) {
	cfg, m, self, other := pair(t)
	cfg.Epoch, cfg.InSync, cfg.Drained = 2, []BrickID{self}, []BrickID{other}
	now := 10 * time.Second
	follow := func() *cluster.SetConfig {
		t.Helper()
		m.Configure(now, cfg)
		m.Ready()
		m.Lost(other)
		m.Connected(now, other)
		round := sent[proto.Probe](t, m, other)[0].Round
		m.BeatAck(now, other, &proto.BeatAck{Epoch: cfg.Epoch, Round: round, Echo: uint64(now), Stamp: 1})
		m.ProbeAck(now, other, &proto.ProbeAck{Epoch: cfg.Epoch, Round: round, Whole: true})
		if s := m.Ready().Streams; len(s) != 1 || s[0].Upto != 1 {
			t.Fatalf("streams %+v, want what there is", s)
		}
		m.AppendAck(now, other, &proto.AppendAck{Epoch: cfg.Epoch, Round: round, Seq: 1})
		m.SyncAck(other, &proto.SyncAck{Epoch: cfg.Epoch, Seq: 1})
		m.Tick(now)
		return m.Ready().Propose
	}
	if p := follow(); p != nil {
		t.Errorf("a drained brick is proposed: %+v", p)
	}
	cfg.Epoch, cfg.Drained = 3, nil
	if p := follow(); p == nil || !p.IsInSync(other) {
		t.Errorf("undrained, the proposal is %+v", p)
	}
}

// A primary that cannot hand over, because a backup does not answer, goes on when it is
// not to leave any more.
func TestStay(t *testing.T) {
	_, m, _, b := pair(t)
	now := 10 * time.Second
	m.Connected(now, b)
	if next, again := m.Leave(now, false); next != nil || !again || !m.Leaving() {
		t.Fatalf("it hands over %v with a change under way, again %v", next, again)
	}
	if _, ok := m.Next(); ok {
		t.Fatal("it orders changes while it hands over")
	}
	m.Stay()
	if _, ok := m.Next(); !ok || m.Leaving() {
		t.Error("it orders no changes though it stays")
	}
}

// The release of the former primary spares its heir the wait for that one's lease, and for
// no other: not for that of a brick which is in sync no more, and nobody else's release does.
func TestReleaseIsThePrimarysOwn(t *testing.T) {
	now := 10 * time.Second
	lead := func(released, dropped bool) (m *Machine, former, third BrickID) {
		t.Helper()
		m, former = follower(t, now, Brick{Promised: 1})
		if released {
			m.Release(now, former, &proto.Release{Epoch: 2})
		}
		next := m.Config().Clone()
		third = next.Members[2]
		next.Epoch, next.Primary, next.InSync = 3, m.self, []BrickID{m.self, third}
		if dropped {
			next.InSync = next.InSync[:1]
		}
		m.Configure(now, next)
		if !m.Ready().Lead {
			t.Fatal("it does not lead")
		}
		m.Loaded()
		m.Appended(now, cluster.Pos{Epoch: 3, Seq: 2})
		m.Cleared(now, 2)
		m.Ready()
		if !dropped {
			m.Connected(now, third)
			round := sent[proto.Probe](t, m, third)[0].Round
			m.ProbeAck(now, third, &proto.ProbeAck{Epoch: 3, Round: round, Whole: true})
			m.BeatAck(now, third, &proto.BeatAck{Epoch: 3, Round: round, Echo: uint64(now), Stamp: 1})
			m.AppendAck(now, third, &proto.AppendAck{Epoch: 3, Round: round, Seq: 2})
		}
		return m, former, third
	}
	if m, _, _ := lead(true, false); m.Commit() != 2 {
		t.Error("with the release, and everybody else in sync, it waits")
	}
	if m, _, _ := lead(true, true); m.Commit() != 0 {
		t.Error("a brick that was dropped may serve reads, and something is committed")
	}
	m, former, third := lead(false, false)
	if m.Release(now, third, &proto.Release{Epoch: 2}); m.Commit() != 0 {
		t.Error("another brick's release is taken for the former primary's")
	}
	if m.Release(now, former, &proto.Release{Epoch: 2}); m.Commit() != 2 {
		t.Error("the former primary's release, which comes late, does not count")
	}
}
