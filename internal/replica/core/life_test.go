package core

import (
	"testing"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/proto"
)

// A primary and one backup, whose messages the tests carry by hand.

func pair(t *testing.T) (cfg cluster.SetConfig, primary *Machine, self, other BrickID) {
	t.Helper()
	self, other = cluster.NewID(), cluster.NewID()
	members := []BrickID{self, other}
	cfg = cluster.SetConfig{Epoch: 1, Primary: self, Members: members, InSync: members, MinInSync: 1}
	primary = New(0, self, Brick{Whole: true, Trusted: true})
	primary.Configure(0, cfg)
	primary.Ready()
	primary.Loaded()
	primary.Appended(0, cluster.Pos{Epoch: 1, Seq: 1})
	primary.Cleared(0, 1)
	primary.Ready()
	return cfg, primary, self, other
}

func sent[T any](t *testing.T, m *Machine, to BrickID) []*T {
	t.Helper()
	var all []*T
	for _, msg := range m.Ready().Messages {
		if v, ok := msg.Body.(any).(*T); ok && msg.To == to {
			all = append(all, v)
		}
	}
	return all
}

// A stamp that a backup put into a heartbeat's answer in a former life gives
// its next life no lease: that one's clock has shown the same time long after.
func TestStampOfAFormerLife(t *testing.T) {
	_, m, _, b := pair(t)
	const second = time.Second
	life := func(now Instant, stamp Instant) (beats []*proto.Beat, round uint64) {
		t.Helper()
		m.Lost(b)
		m.Connected(now, b)
		probes := sent[proto.Probe](t, m, b)
		if len(probes) != 1 {
			t.Fatalf("%d probes after the connection", len(probes))
		}
		round = probes[0].Round
		m.ProbeAck(now, b, &proto.ProbeAck{Epoch: 1, Round: round, Whole: true})
		m.Ready()
		m.AppendAck(now, b, &proto.AppendAck{Epoch: 1, Round: round, Seq: 1})
		beats = sent[proto.Beat](t, m, b)
		m.BeatAck(now, b, &proto.BeatAck{Epoch: 1, Round: round, Echo: uint64(now), Stamp: uint64(stamp), Applied: 1})
		return beats, round
	}
	life(10*second, 3*second)
	if beats := sent[proto.Beat](t, m, b); len(beats) != 1 || beats[0].Grant == 0 || beats[0].Echo != uint64(3*second) {
		t.Fatalf("after the first life's answer: %+v; want a lease on its stamp", beats)
	}
	// The second life is as old as the first was when it gave its stamp.
	beats, round := life(10*second+time.Second/2, 4*second)
	for _, beat := range beats {
		if beat.Grant != 0 || beat.Echo != 0 {
			t.Errorf("round %d began with %+v; want no lease before this life has answered", round, beat)
		}
	}
	if beats := sent[proto.Beat](t, m, b); len(beats) != 1 || beats[0].Grant == 0 || beats[0].Echo != uint64(4*second) {
		t.Errorf("after the second life's answer: %+v; want a lease on its stamp", beats)
	}
}

// A backup that begins a new life under a connection that holds takes no lease
// that was meant for its former one, and asks for a round of its own.
func TestBeatForAFormerLife(t *testing.T) {
	cfg, _, p, b := pair(t)
	m := New(0, b, Brick{Tail: cluster.Pos{Epoch: 1, Seq: 1}, History: []cluster.Pos{{Epoch: 1, Seq: 1}}, Whole: true})
	m.Configure(0, cfg)
	m.Loaded()
	m.Ready()
	now := 4 * time.Second
	beat := &proto.Beat{Epoch: 1, Round: 7, Stamp: 9, Commit: 1, Tail: 1, Grant: uint64(cluster.Lease), Echo: uint64(3 * time.Second)}
	for range 2 {
		m.Beat(now, p, beat, nil, 0)
		if until, ok := m.Serving(now); ok {
			t.Fatalf("serves until %v under a lease of its former life", until)
		}
		acks := sent[proto.ProbeAck](t, m, p)
		if len(acks) != 1 || acks[0].Round != 7 {
			t.Fatalf("it says %+v; want where its log stands, in the primary's round", acks)
		}
	}
}

// What a backup has from another epoch is not taken for what this primary sent,
// before the first Append has made the logs one.
func TestNoAckBeforeTheLogsMeet(t *testing.T) {
	cfg, _, p, b := pair(t)
	cfg.Epoch = 2
	// The backup's third entry was never committed; the new primary has another there.
	m := New(0, b, Brick{Tail: cluster.Pos{Epoch: 1, Seq: 3}, History: []cluster.Pos{{Epoch: 1, Seq: 1}}, Whole: true})
	m.Configure(0, cfg)
	m.Loaded()
	m.clear = 2 // a client has not yet answered the third's invalidation
	m.Probe(0, p, &proto.Probe{Config: cfg, Round: 1, Tail: cluster.Pos{Epoch: 2, Seq: 4}})
	m.Ready()
	m.Cleared(0, 3)
	m.Beat(0, p, &proto.Beat{Epoch: 2, Round: 1, Stamp: 1}, nil, 0)
	for _, msg := range m.Ready().Messages {
		switch a := msg.Body.(type) {
		case *proto.AppendAck:
			t.Errorf("acknowledged %d, of another log", a.Seq)
		case *proto.BeatAck:
			if a.Acked != 0 {
				t.Errorf("a heartbeat's answer acknowledged %d, of another log", a.Acked)
			}
		}
	}
	m.Append(0, p, &proto.Append{Epoch: 2, Round: 1, Prev: cluster.Pos{Epoch: 1, Seq: 2}})
	r := m.Ready()
	if len(r.Apply) != 1 || r.Apply[0].Rewind == nil || r.Apply[0].Rewind.Seq != 2 {
		t.Fatalf("the first Append leads to %+v; want the third entry undone", r.Apply)
	}
	m.Rewound(cluster.Pos{Epoch: 1, Seq: 2}, []cluster.Pos{{Epoch: 1, Seq: 1}})
	m.Applied(0)
	if acks := sent[proto.AppendAck](t, m, p); len(acks) != 1 || acks[0].Seq != 2 {
		t.Errorf("acknowledged %+v; want 2", acks)
	}
}

// lead makes b the primary of cfg that has replayed its log, and has its first entry.
func lead(t *testing.T, now Instant, m *Machine, cfg cluster.SetConfig) {
	t.Helper()
	m.Configure(now, cfg)
	if m.Role() != Primary {
		t.Fatalf("it is %v in epoch %d", m.Role(), cfg.Epoch)
	}
	m.Loaded()
	pos, ok := m.Next()
	if !ok {
		t.Fatalf("a primary that orders nothing, in epoch %d", cfg.Epoch)
	}
	m.Appended(now, pos)
	m.Cleared(now, pos.Seq)
	m.Ready()
}

// follow has the backup b be in step with the primary m, and gives both their leases.
func follow(t *testing.T, now Instant, m *Machine, b BrickID) (round uint64) {
	t.Helper()
	m.Lost(b)
	m.Connected(now, b)
	epoch := m.Config().Epoch
	for _, p := range sent[proto.Probe](t, m, b) {
		round = p.Round
	}
	m.ProbeAck(now, b, &proto.ProbeAck{Epoch: epoch, Round: round, Whole: true})
	m.AppendAck(now, b, &proto.AppendAck{Epoch: epoch, Round: round, Seq: m.Tail().Seq})
	m.BeatAck(now, b, &proto.BeatAck{Epoch: epoch, Round: round, Echo: uint64(now), Stamp: 1, Applied: m.Tail().Seq})
	return round
}

// A primary that has dropped a backup hands over only when that one's lease is over:
// its successor does not know of it.
func TestLeaveOutwaitsWhoLeft(t *testing.T) {
	a, b, c := cluster.NewID(), cluster.NewID(), cluster.NewID()
	all := []BrickID{a, b, c}
	m := New(0, a, Brick{Whole: true, Trusted: true})
	lead(t, 0, m, cluster.SetConfig{Epoch: 1, Primary: a, Members: all, InSync: all, MinInSync: 1})
	const at = time.Second
	follow(t, at, m, b)
	follow(t, at, m, c)
	now := at + 800*time.Millisecond
	m.Configure(now, cluster.SetConfig{Epoch: 2, Primary: a, Members: all, InSync: all[:2], MinInSync: 1})
	follow(t, now, m, b)
	m.Ready()
	if next, wait := m.Leave(now, false); next != nil || !wait {
		t.Fatalf("while %v may serve: %+v, wait %v; want it to wait", c, next, wait)
	}
	now = at + cluster.LeaseGuard
	next, _ := m.Leave(now, false)
	if next == nil || next.Primary != b {
		t.Fatalf("when the lease is over: %+v; want %v to lead", next, b)
	}
	if n := len(sent[proto.Release](t, m, b)); n != 1 {
		t.Errorf("%d releases, want 1", n)
	}
}

// A primary that leads again after an epoch without one remembers the leases that it
// gave to its backups before.
func TestLeadsAgainAfterNobody(t *testing.T) {
	cfg, m, self, b := pair(t)
	m.Configure(0, cfg)
	at := 10 * time.Second
	follow(t, at, m, b) // has a lease until 11.5 s
	m.Ready()
	nobody := cfg.Clone()
	nobody.Epoch, nobody.Primary = 2, BrickID{}
	m.Configure(at, nobody)
	alone := cfg.Clone()
	alone.Epoch, alone.InSync = 3, []BrickID{self}
	lead(t, at, m, alone)
	if m.Commit() >= m.Tail().Seq {
		t.Fatalf("it commits at once, while %v may serve reads", b)
	}
	m.Tick(at + cluster.LeaseGuard)
	if m.Commit() != m.Tail().Seq {
		t.Errorf("committed %d of %d when the lease is over", m.Commit(), m.Tail().Seq)
	}
}

// A brick that restarted leads only what the control plane says to be its choice among
// bricks that may all lack something. That it was sealed and is alone does not say so: a backup
// that leaves may have proposed the life before it.
func TestLeadsAloneOnlyIfChosen(t *testing.T) {
	for _, chosen := range []cluster.Epoch{0, 2, 3} {
		cfg, _, p, b := pair(t)
		m := New(0, p, Brick{Tail: cluster.Pos{Epoch: 1, Seq: 1}, History: []cluster.Pos{{Epoch: 1, Seq: 1}}, Whole: true, Promised: 2})
		cfg.Epoch = 2
		m.Configure(0, cfg)
		if r := m.Seal(0, proto.Seal{Epoch: 2}); !r.Sealed || r.Trusted {
			t.Fatalf("the seal of a brick that restarted: %+v", r)
		}
		next := cluster.SetConfig{Epoch: 3, Primary: p, Members: []BrickID{p, b}, InSync: []BrickID{p}, MinInSync: 1, Chosen: chosen}
		m.Configure(0, next)
		if leads := m.Role() == Primary; leads != (chosen == 3) {
			t.Errorf("chosen in epoch %d: it is %v in epoch 3", chosen, m.Role())
		}
	}
}

// A backup joins the in-sync set when it has flushed what may have been fsynced without it.
func TestJoinsWithADurableLog(t *testing.T) {
	self, b := cluster.NewID(), cluster.NewID()
	m := New(0, self, Brick{Whole: true, Trusted: true})
	lead(t, 0, m, cluster.SetConfig{Epoch: 1, Primary: self, Members: []BrickID{self, b}, InSync: []BrickID{self}, MinInSync: 1})
	const at = time.Second
	follow(t, at, m, b)
	m.Ready()
	m.Tick(at)
	r := m.Ready()
	if r.Propose != nil {
		t.Fatalf("proposed %+v before it has flushed anything", r.Propose)
	}
	asked := false
	for _, msg := range r.Messages {
		s, is := msg.Body.(*proto.Sync)
		asked = asked || is && msg.To == b && s.Seq == 1
	}
	if !asked {
		t.Fatalf("it was not asked to flush: %+v", r.Messages)
	}
	m.SyncAck(b, &proto.SyncAck{Epoch: 1, Seq: 1})
	m.Tick(at + 100*time.Millisecond)
	if r := m.Ready(); r.Propose == nil || !r.Propose.IsInSync(b) {
		t.Errorf("proposed %+v when it has flushed all", r.Propose)
	}
}

// Nothing counts that is not of this epoch and round: neither entries at a backup, nor
// acknowledgements at a primary.
func TestOfThisEpochAndRound(t *testing.T) {
	now := 10 * time.Second
	backup, from := follower(t, now, Brick{Promised: 1})
	for _, a := range []proto.Append{{Epoch: 1, Round: 1}, {Epoch: 3, Round: 1}, {Epoch: 2, Round: 0}} {
		a.Prev = backup.Tail()
		a.Entries = []proto.AppendEntry{{}}
		backup.Append(now, from, &a)
		if n := len(backup.Ready().Apply); n > 0 {
			t.Errorf("entries of epoch %d and round %d are taken in epoch 2, round 1", a.Epoch, a.Round)
		}
	}
	_, primary, _, b := pair(t)
	primary.Connected(now, b)
	round := sent[proto.Probe](t, primary, b)[0].Round
	primary.ProbeAck(now, b, &proto.ProbeAck{Epoch: 1, Round: round, Whole: true})
	primary.BeatAck(now, b, &proto.BeatAck{Epoch: 1, Round: round, Echo: uint64(now), Stamp: 1})
	for _, a := range []proto.AppendAck{{Epoch: 2, Round: round}, {Round: round}, {Epoch: 1, Round: round - 1}} {
		a.Seq = 1
		primary.AppendAck(now, b, &a)
		if primary.Commit() != 0 {
			t.Fatalf("an answer of epoch %d and round %d commits in epoch 1, round %d", a.Epoch, a.Round, round)
		}
	}
	primary.AppendAck(now, b, &proto.AppendAck{Epoch: 1, Round: round, Seq: 1})
	if primary.Commit() != 1 {
		t.Error("the answer of this epoch and round does not commit")
	}
}

// A brick that starts follows no epoch that is older than the newest its former life has
// taken part in: it may have acknowledged there what would be undone.
func TestOlderThanPromised(t *testing.T) {
	self, other := cluster.NewID(), cluster.NewID()
	members := []BrickID{self, other}
	m := New(0, self, Brick{Whole: true, Promised: 3})
	cfg := cluster.SetConfig{Epoch: 2, Primary: other, Members: members, InSync: members, MinInSync: 1}
	m.Configure(0, cfg)
	if m.Config().Epoch != 0 {
		t.Error("epoch 2 is followed after epoch 3")
	}
	cfg.Epoch = 3
	if m.Configure(0, cfg); m.Config().Epoch != 3 {
		t.Error("epoch 3 is not followed any more")
	}
}

// Two logs that end at the same sequence are not the same log: what follows another epoch's
// entry is not taken.
func TestLogsMeetAtPositions(t *testing.T) {
	now := 10 * time.Second
	m, from := follower(t, now, Brick{Promised: 1})
	m.Append(now, from, &proto.Append{Epoch: 2, Round: 1, Prev: cluster.Pos{Epoch: 2, Seq: m.Tail().Seq}, Entries: []proto.AppendEntry{{}}})
	if r := m.Ready(); len(r.Apply) > 0 {
		t.Errorf("entries after 2.%d are taken at %v", m.Tail().Seq, m.Tail())
	}
}

// A backup in the in-sync set is given no lease before it has what it had missed: it would serve
// reads without it.
func TestNoLeaseBeforeItHasAll(t *testing.T) {
	_, m, _, b := pair(t)
	now := time.Second
	m.Connected(now, b)
	round := sent[proto.Probe](t, m, b)[0].Round
	granted := func() (is bool) {
		for _, beat := range sent[proto.Beat](t, m, b) {
			is = is || beat.Grant > 0
		}
		return is
	}
	for _, say := range []func(){
		func() {},
		func() { m.ProbeAck(now, b, &proto.ProbeAck{Epoch: 1, Round: round, Whole: true}) },
	} {
		say()
		m.BeatAck(now, b, &proto.BeatAck{Epoch: 1, Round: round, Echo: uint64(now), Stamp: 1})
		now += cluster.Heartbeat
		m.Tick(now)
		if granted() {
			t.Fatal("it is given a lease, and has nothing")
		}
	}
	m.AppendAck(now, b, &proto.AppendAck{Epoch: 1, Round: round, Seq: 1})
	if !granted() {
		t.Error("it has everything, and is given no lease")
	}
}

// An acknowledgement that was lost with its connection comes again with the answer to a heartbeat.
func TestAcknowledgedAgain(t *testing.T) {
	_, m, _, b := pair(t)
	now := time.Second
	m.Connected(now, b)
	round := sent[proto.Probe](t, m, b)[0].Round
	m.ProbeAck(now, b, &proto.ProbeAck{Epoch: 1, Round: round, Whole: true})
	if m.Commit() != 0 {
		t.Fatal("committed before anybody has it")
	}
	m.BeatAck(now, b, &proto.BeatAck{Epoch: 1, Round: round, Echo: uint64(now), Stamp: 1, Applied: 1, Acked: 1})
	if m.Commit() != 1 {
		t.Error("the backup has said twice that it has everything, once in vain, and nothing is committed")
	}
}

// A brick on its way back is waited for only when it is near: all changes would wait for what it is still sent.
func TestNotWaitedForWhileFar(t *testing.T) {
	self, b := cluster.NewID(), cluster.NewID()
	m := New(0, self, Brick{Whole: true, Trusted: true})
	lead(t, 0, m, cluster.SetConfig{Epoch: 1, Primary: self, Members: []BrickID{self, b}, InSync: []BrickID{self}, MinInSync: 1})
	const now = time.Second
	change := func() {
		pos, _ := m.Next()
		m.Appended(now, pos)
		m.Cleared(now, pos.Seq)
	}
	for range 2 * joinLag {
		change()
	}
	m.Connected(now, b)
	round := sent[proto.Probe](t, m, b)[0].Round
	m.ProbeAck(now, b, &proto.ProbeAck{Epoch: 1, Round: round, Whole: true})
	m.BeatAck(now, b, &proto.BeatAck{Epoch: 1, Round: round, Echo: uint64(now), Stamp: 1})
	m.AppendAck(now, b, &proto.AppendAck{Epoch: 1, Round: round, Seq: 1})
	m.SyncAck(b, &proto.SyncAck{Epoch: 1, Seq: 1})
	m.Tick(now)
	change()
	if m.Commit() != m.Tail().Seq {
		t.Errorf("%d is committed of %d: a brick that is far behind is waited for", m.Commit(), m.Tail().Seq)
	}
	m.AppendAck(now, b, &proto.AppendAck{Epoch: 1, Round: round, Seq: m.Tail().Seq})
	m.SyncAck(b, &proto.SyncAck{Epoch: 1, Seq: m.Tail().Seq})
	m.Tick(now)
	if p := m.Ready().Propose; p == nil || !p.IsInSync(b) {
		t.Errorf("it is there: proposed %+v", p)
	}
}
