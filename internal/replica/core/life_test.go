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
