package core

import (
	"slices"
	"testing"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/proto"
)

// alone has the primary begin an epoch in which nobody else is in sync.
func alone(m *Machine, now Instant, min int) {
	cfg := m.cfg.Clone()
	cfg.Epoch, cfg.InSync, cfg.MinInSync = cfg.Epoch+1, []BrickID{m.self}, min
	m.Configure(now, cfg)
	m.Ready()
}

// meets has a brick begin a round with all that the primary has, and returns the round.
func meets(t *testing.T, m *Machine, now Instant, to BrickID) (round uint64) {
	t.Helper()
	m.Connected(now, to)
	round = sent[proto.Probe](t, m, to)[0].Round
	m.ProbeAck(now, to, &proto.ProbeAck{Epoch: m.cfg.Epoch, Round: round, Tail: m.tail, History: m.history, Whole: true})
	m.AppendAck(now, to, &proto.AppendAck{Epoch: m.cfg.Epoch, Round: round, Seq: m.tail.Seq})
	return round
}

// A backup for whose flush everybody waits gets no leases, then it is dropped, and it is not taken in again
// at once: each time later. A set that cannot do without it waits.
func TestLags(t *testing.T) {
	now := 10 * time.Second
	m, a, b, rounds := trio(t, now)
	live := func() (granted bool, p *cluster.SetConfig) {
		for _, to := range []BrickID{a, b} {
			m.BeatAck(now, to, &proto.BeatAck{Epoch: m.cfg.Epoch, Round: rounds[to], Echo: uint64(now), Stamp: uint64(now), Applied: m.tail.Seq, Acked: m.tail.Seq})
		}
		now += cluster.Heartbeat
		m.Tick(now)
		r := m.Ready()
		for _, msg := range r.Messages {
			beat, ok := msg.Body.(*proto.Beat)
			granted = granted || ok && msg.To == b && beat.Grant > 0
		}
		return granted, r.Propose
	}
	// configure has the next configuration begin, in which both have all entries at once.
	configure := func(inSync ...BrickID) {
		cfg := m.cfg.Clone()
		cfg.Epoch, cfg.InSync = cfg.Epoch+1, inSync
		m.Configure(now, cfg)
		m.Ready()
		for _, to := range []BrickID{a, b} {
			rounds[to] = meets(t, m, now, to)
		}
	}
	began := now
	m.Lags(b, began)
	for {
		granted, p := live()
		if want := now < began+lagsNoGrant; granted != want {
			t.Fatalf("%v after it began to lag it is given a lease: %v", now-began, granted)
		}
		if p != nil {
			if p.IsInSync(b) || !p.IsInSync(a) || p.Epoch != 2 {
				t.Fatalf("proposed: %+v", p)
			}
			break
		}
		if now > began+2*time.Second {
			t.Fatal("it is not dropped")
		}
	}
	if now < began+stuckAfter {
		t.Errorf("dropped after %v", now-began)
	}

	// It has everything, and flushed, a moment later.
	for _, bar := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second} {
		dropped := now
		configure(m.self, a)
		for _, to := range []BrickID{a, b} {
			m.SyncAck(to, &proto.SyncAck{Epoch: m.cfg.Epoch, Seq: m.tail.Seq})
		}
		for {
			if _, p := live(); p != nil {
				if !p.IsInSync(b) {
					t.Fatalf("proposed: %+v", p)
				}
				break
			}
			if now > dropped+time.Minute {
				t.Fatal("it is not taken in again")
			}
		}
		if now < dropped+bar || now > dropped+bar+2*cluster.Heartbeat {
			t.Errorf("it is taken in again after %v, want %v", now-dropped, bar)
		}
		m.ProposeDone(now, m.cfg.Epoch+1, true)
		configure(m.self, a, b)
		m.Lags(b, now-stuckAfter)
		if _, p := live(); p == nil || p.IsInSync(b) {
			t.Fatalf("proposed: %+v", p)
		}
	}
}

// A brick that is near, and whose disk flushes nothing, is given up after a moment for another that is ready: also
// where nobody syncs, as in a set that takes no changes.
func TestHangsBeforeItIsAdded(t *testing.T) {
	now := 10 * time.Second
	m, a, b, _ := trio(t, now)
	alone(m, now, 2)
	for _, to := range []BrickID{a, b} {
		meets(t, m, now, to)
	}
	began := now
	for now < began+10*time.Second {
		now += 100 * time.Millisecond
		for _, to := range []BrickID{a, b} {
			m.BeatAck(now, to, &proto.BeatAck{Epoch: 2, Round: m.progress[to].round, Echo: uint64(now), Stamp: 1, Applied: m.tail.Seq, Acked: m.tail.Seq})
		}
		m.Tick(now)
		r := m.Ready()
		for _, msg := range r.Messages {
			if s, ok := msg.Body.(*proto.Sync); ok && msg.To == b { // the other one's disk hangs
				m.SyncAck(b, &proto.SyncAck{Epoch: 2, Seq: s.Seq})
			}
		}
		if p := r.Propose; p != nil {
			if !p.IsInSync(b) || p.IsInSync(a) {
				t.Fatalf("proposed: %+v", p)
			}
			if now > began+2*stuckAfter {
				t.Errorf("proposed after %v", now-began)
			}
			return
		}
	}
	t.Fatal("the one that is ready is not proposed")
}

// A brick dies whose proposal may have taken effect. It is waited for until the same epoch is asked for without it: one of the
// two comes to be, and which is known then.
func TestProposalInDoubt(t *testing.T) {
	for _, how := range []string{"it dies", "its disk hangs"} {
		t.Run(how, func(t *testing.T) {
			now := 10 * time.Second
			m, a, _, _ := trio(t, now)
			alone(m, now, 1)
			round := meets(t, m, now, a)
			flushes, beats := true, true
			proposal := func() *cluster.SetConfig {
				t.Helper()
				for limit := now + 5*time.Second; now < limit; {
					now += 100 * time.Millisecond
					if beats {
						m.BeatAck(now, a, &proto.BeatAck{Epoch: m.cfg.Epoch, Round: round, Echo: uint64(now), Stamp: 1, Applied: m.tail.Seq, Acked: m.tail.Seq})
					}
					m.Tick(now)
					r := m.Ready()
					for _, msg := range r.Messages {
						if s, ok := msg.Body.(*proto.Sync); ok && flushes {
							m.SyncAck(a, &proto.SyncAck{Epoch: m.cfg.Epoch, Seq: s.Seq})
						}
					}
					if r.Propose != nil {
						return r.Propose
					}
				}
				return nil
			}
			first := proposal()
			if first == nil || !first.IsInSync(a) {
				t.Fatalf("proposed: %+v", first)
			}
			m.ProposeDone(now, first.Epoch, false)
			if again := proposal(); again == nil || !again.IsInSync(a) { // it is well
				t.Fatalf("proposed again: %+v", again)
			}
			m.ProposeDone(now, first.Epoch, false)
			switch how {
			case "it dies":
				beats = false
			default: // and it was started again: what it has flushed is to be asked for anew
				flushes = false
				m.Lost(a)
				round = meets(t, m, now, a)
			}
			doubt := now
			without := proposal()
			for without != nil && without.IsInSync(a) && now < doubt+cluster.Suspicion { // nobody knows yet
				m.ProposeDone(now, without.Epoch, false)
				without = proposal()
			}
			if without == nil || without.IsInSync(a) || without.Epoch != first.Epoch || !slices.Equal(without.InSync, m.cfg.InSync) {
				t.Fatalf("proposed: %+v", without)
			}
			if !slices.Contains(m.Counting(), a) {
				t.Error("it does not count, though the first proposal may have taken effect")
			}
			if now > doubt+cluster.Suspicion+2*stuckAfter {
				t.Errorf("proposed after %v", now-doubt)
			}
			m.Configure(now, *without)
			m.ProposeDone(now, without.Epoch, false)
			if slices.Contains(m.Counting(), a) {
				t.Error("it still counts")
			}
		})
	}
}

// A set that cannot do without a brick waits for it, and its primary does not hand over; one that can does.
func TestLagsAndIsNeeded(t *testing.T) {
	for _, needed := range []bool{true, false} {
		now := 10 * time.Second
		m, a, b, rounds := trio(t, now)
		if needed {
			m.cfg.MinInSync = 3
		}
		for range 2 {
			for _, to := range []BrickID{a, b} {
				m.BeatAck(now, to, &proto.BeatAck{Epoch: 1, Round: rounds[to], Echo: uint64(now), Stamp: uint64(now), Applied: 1, Acked: 1})
			}
		}
		m.Lags(b, now-stuckAfter)
		m.Tick(now)
		if p := m.Ready().Propose; p != nil == needed {
			t.Errorf("needed %v: proposed %+v", needed, p)
		}
		m.Lags(b, 0)
		m.Lags(m.self, now-stuckAfter+1)
		m.Tick(now)
		if m.Ready().Leave || m.Slow(now) {
			t.Error("it hands over too soon")
		}
		m.Tick(now + 1)
		if leaves := m.Ready().Leave; leaves == needed || leaves != m.Slow(now+1) {
			t.Errorf("needed %v: it hands over: %v", needed, leaves)
		}
	}
}
