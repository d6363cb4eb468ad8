package core

import (
	"slices"
	"testing"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/proto"
)

// trio is the primary of three bricks, with both backups in step and under leases.
func trio(t *testing.T, now Instant) (m *Machine, a, b BrickID, rounds map[BrickID]uint64) {
	t.Helper()
	self := cluster.NewID()
	a, b = cluster.NewID(), cluster.NewID()
	all := []BrickID{self, a, b}
	m = New(0, self, Brick{Whole: true, Trusted: true})
	m.Configure(0, cluster.SetConfig{Epoch: 1, Primary: self, Members: all, InSync: all, MinInSync: 1})
	m.Loaded()
	m.Appended(0, cluster.Pos{Epoch: 1, Seq: 1})
	m.Cleared(0, 1)
	m.Ready()
	rounds = map[BrickID]uint64{}
	for _, to := range []BrickID{a, b} {
		m.Connected(now, to)
		round := sent[proto.Probe](t, m, to)[0].Round
		rounds[to] = round
		m.ProbeAck(now, to, &proto.ProbeAck{Epoch: 1, Round: round, Whole: true})
		m.AppendAck(now, to, &proto.AppendAck{Epoch: 1, Round: round, Seq: 1})
	}
	for range 2 { // the answers to the first heartbeats give the primary its lease, those to the next have one to give
		for _, to := range []BrickID{a, b} {
			m.BeatAck(now, to, &proto.BeatAck{Epoch: 1, Round: rounds[to], Echo: uint64(now), Stamp: 1, Applied: 1, Acked: 1})
		}
	}
	if _, ok := m.Serving(now); !ok || m.Commit() != 1 || m.progress[a].grantedUntil <= now {
		t.Fatalf("the set is not at work: commit %d", m.Commit())
	}
	m.Ready()
	return m, a, b, rounds
}

// change has the primary order a change, which both backups acknowledge, or one.
func change(m *Machine, now Instant, rounds map[BrickID]uint64, by ...BrickID) {
	pos := cluster.Pos{Epoch: m.cfg.Epoch, Seq: m.tail.Seq + 1}
	m.Appended(now, pos)
	m.Cleared(now, pos.Seq)
	m.Ready()
	for _, b := range by {
		m.AppendAck(now, b, &proto.AppendAck{Epoch: m.cfg.Epoch, Round: rounds[b], Seq: pos.Seq})
	}
}

// A primary drops a backup that is certainly dead at once, and has no lease to outwait.
func TestBackupDied(t *testing.T) {
	for _, dead := range []bool{true, false} {
		now := 10 * time.Second
		m, a, b, rounds := trio(t, now)
		now += 100 * time.Millisecond
		change(m, now, rounds, a)
		m.Lost(b)
		if dead {
			m.Died(now, b)
			next := m.Ready().Propose
			if next == nil || next.IsInSync(b) || !next.IsInSync(a) || next.Epoch != 2 {
				t.Fatalf("it wants %+v", next)
			}
			m.Configure(now, *next)
		} else {
			m.Tick(now)
			if next := m.Ready().Propose; next != nil {
				t.Fatalf("of a lost connection it makes %+v", next)
			}
			cfg := m.Config().Clone()
			cfg.Epoch, cfg.InSync = 2, []BrickID{m.self, a}
			m.Configure(now, cfg)
		}
		round := sent[proto.Probe](t, m, a)[0].Round
		m.ProbeAck(now, a, &proto.ProbeAck{Epoch: 2, Round: round, Tail: m.tail, History: m.history, Whole: true})
		m.AppendAck(now, a, &proto.AppendAck{Epoch: 2, Round: round, Seq: 2})
		lease := func() {
			m.BeatAck(now, a, &proto.BeatAck{Epoch: 2, Round: round, Echo: uint64(now), Stamp: 3, Applied: 2, Acked: 2})
		}
		lease()
		if committed := m.Commit() == 2; committed != dead {
			t.Errorf("dead %v: committed at once: %v", dead, committed)
		}
		now += cluster.LeaseGuard
		lease()
		if m.Commit() != 2 {
			t.Errorf("dead %v: not committed when all leases are over", dead)
		}
	}
}

// What the dead process had sent comes late, and is nothing that its next life said: no
// change counts as acknowledged by it, and no lease is given.
func TestBackupDiedAndWasSlow(t *testing.T) {
	now := 10 * time.Second
	m, a, b, rounds := trio(t, now)
	change(m, now, rounds, a)
	m.Died(now, b) // while the link, perhaps to its next life, is up
	m.AppendAck(now, b, &proto.AppendAck{Epoch: 1, Round: rounds[b], Seq: 2})
	m.BeatAck(now, b, &proto.BeatAck{Epoch: 1, Round: rounds[b], Echo: uint64(now), Stamp: 2, Applied: 2, Acked: 2})
	if m.Commit() != 1 {
		t.Error("a dead brick's acknowledgement counts")
	}
	if p := m.progress[b]; p.grantedUntil > now || !p.dead {
		t.Errorf("after what the dead one said: granted until %v, dead %v", p.grantedUntil, p.dead)
	}
	// The next life answers.
	round := sent[proto.Probe](t, m, b)[0].Round
	m.ProbeAck(now, b, &proto.ProbeAck{Epoch: 1, Round: round, Tail: cluster.Pos{Epoch: 1, Seq: 1}, History: m.history, Whole: true})
	if m.progress[b].dead {
		t.Error("the next life, which answers, is dead as well")
	}
}

// A backup whose primary is certainly dead says so at once, lets itself be sealed, and takes
// nothing of it any more; as the next primary it waits for no lease.
func TestPrimaryDied(t *testing.T) {
	began := 10 * time.Second
	for _, c := range []struct {
		name string
		do   func(m *Machine, primary BrickID, now Instant)
		lost []int // of the three in sync, who are not in the next epoch
		hold bool
	}{
		{"the primary died", func(m *Machine, p BrickID, now Instant) { m.Died(now, p) }, []int{0}, false},
		{"a connection broke", func(m *Machine, p BrickID, now Instant) { m.Lost(p) }, []int{0}, true},
		{"another one died", func(m *Machine, _ BrickID, now Instant) { m.Died(now, m.cfg.Members[2]) }, []int{0}, true},
		{"the third is silent", func(m *Machine, p BrickID, now Instant) { m.Died(now, p) }, []int{0, 2}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, primary := follower(t, began, Brick{})
			now := began + cluster.LeaseGuard + time.Millisecond // it has been in the set for long
			beat := func(stamp uint64) {
				m.Beat(now, primary, &proto.Beat{Epoch: 2, Round: 1, Stamp: stamp, Tail: 1}, nil, 0)
			}
			beat(2)
			m.Ready()
			c.do(m, primary, now)
			died := m.bereft == 2
			if r := m.Ready(); (r.Suspect == 2) != died {
				t.Errorf("it suspects epoch %d", r.Suspect)
			}
			beat(3)
			if n := len(sent[proto.BeatAck](t, m, primary)); (n == 0) != died {
				t.Errorf("%d leases given after it died: %v", n, died)
			}
			if r := m.Seal(now, proto.Seal{Epoch: 2}); r.Sealed != died {
				t.Errorf("sealed: %+v", r)
			}
			m.Seal(now, proto.Seal{Epoch: 2, Planned: true})
			cfg := m.Config().Clone()
			cfg.Epoch, cfg.Primary, cfg.InSync = 3, m.self, nil
			for i, b := range cfg.Members {
				if !slices.Contains(c.lost, i) {
					cfg.InSync = append(cfg.InSync, b)
				}
			}
			m.Configure(now, cfg)
			if hold := m.holdUntil > now; hold != c.hold {
				t.Errorf("it waits: %v", hold)
			}
		})
	}
}

// Word that comes when the next primary leads already ends its waiting.
func TestFormerPrimaryDied(t *testing.T) {
	began := 10 * time.Second
	m, primary := follower(t, began, Brick{})
	now := began + cluster.LeaseGuard + time.Millisecond
	m.Beat(now, primary, &proto.Beat{Epoch: 2, Round: 1, Stamp: 2, Tail: 1}, nil, 0)
	m.Seal(now, proto.Seal{Epoch: 2, Planned: true})
	cfg := m.Config().Clone()
	cfg.Epoch, cfg.Primary, cfg.InSync = 3, m.self, cfg.Members[1:]
	m.Configure(now, cfg)
	if m.holdUntil <= now {
		t.Fatal("it does not wait for leases")
	}
	if m.Died(now, cfg.Members[2]); m.holdUntil <= now {
		t.Error("another one's death ends the waiting")
	}
	if m.Died(now, primary); m.holdUntil > now {
		t.Error("it waits for the lease of one that is dead")
	}
}

// A primary had dropped a brick, which may still serve, and died. It no longer outwaits that
// one's lease, so who leads next does.
func TestDeadPrimaryHadDropped(t *testing.T) {
	began := 10 * time.Second
	m, primary := follower(t, began, Brick{})
	now := began + cluster.LeaseGuard + time.Millisecond
	m.Beat(now, primary, &proto.Beat{Epoch: 2, Round: 1, Stamp: 2, Tail: 1}, nil, 0)
	cfg := m.Config().Clone()
	cfg.Epoch, cfg.InSync = 3, cfg.Members[:2]
	m.Probe(now, primary, &proto.Probe{Config: cfg, Round: 2, Tail: m.tail})
	m.Died(now, primary)
	m.Seal(now, proto.Seal{Epoch: 3})
	cfg = m.Config().Clone()
	cfg.Epoch, cfg.Primary, cfg.InSync = 4, m.self, cfg.Members[1:2]
	m.Configure(now, cfg)
	if m.holdUntil < now+cluster.LeaseGuard {
		t.Errorf("it commits after %v, and the third may serve for %v", m.holdUntil-now, cluster.LeaseGuard)
	}
	if m.Died(now, primary); m.holdUntil < now+cluster.LeaseGuard {
		t.Error("the same word a second time ends the waiting")
	}
}

// A death is not held against a life of the primary that has yet to be heard.
func TestDeathBeforeThePrimaryIsHeard(t *testing.T) {
	now := 10 * time.Second
	m, primary := follower(t, now, Brick{})
	cfg := m.Config().Clone()
	cfg.Epoch = 3
	m.Configure(now, cfg)
	m.Died(now, primary)
	m.Probe(now, primary, &proto.Probe{Config: cfg, Round: 2, Tail: m.tail})
	if n := len(sent[proto.ProbeAck](t, m, primary)); n != 1 {
		t.Errorf("%d answers to the primary, want one", n)
	}
}
