package control

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"mortar/internal/control/state"
)

// A leader that is stopped in order hands over: nobody waits for its silence.
func TestLeaderStops(t *testing.T) { synctest.Test(t, testLeaderStops) }

func testLeaderStops(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	lead := w.settled(nodes...)
	rest := others(nodes, lead)
	if err := lead.kill(); err != nil {
		t.Fatal(err)
	}
	w.until("another leader", func() bool { return rest[0].c.Status().Leading || rest[1].c.Status().Leading })
	w.volume("v", rest[0])
	lead.start()
	w.settled(nodes...)
}

// A leader whose death is certain is replaced at once.
func TestLeaderDies(t *testing.T) { synctest.Test(t, testLeaderDies) }

func testLeaderDies(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	for range 3 {
		lead := w.settled(nodes...)
		rest := others(nodes, lead)
		w.silent(lead, true)
		begin := time.Now()
		for _, nd := range rest {
			nd.c.LeaderDied(lead.id)
		}
		w.until("another leader", func() bool { return rest[0].c.Status().Leading || rest[1].c.Status().Leading })
		took := time.Since(begin)
		t.Logf("another leader after %v", took)
		// Without the news it takes at least as long as no heartbeat may be missing.
		if took >= heartbeatTimeout {
			t.Errorf("another leader after %v, no sooner than without the news", took)
		}
		w.silent(lead, false)
	}
	// It is only about the leader, and not believed of oneself.
	lead := w.settled(nodes...)
	for _, nd := range nodes {
		nd.c.LeaderDied(others(nodes, lead)[0].id)
	}
	lead.c.LeaderDied(lead.id)
	w.volume("v", lead)
	if now := w.settled(nodes...); now != lead {
		t.Errorf("%s leads and %s did, for no reason", now.name, lead.name)
	}
}

// The minority decides nothing and says why.
func TestMinority(t *testing.T) { synctest.Test(t, testMinority) }

func testMinority(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	lead := w.settled(nodes...)
	rest := others(nodes, lead)
	w.silent(lead, true)
	w.until("it steps down", func() bool { return !lead.c.Status().Leading })
	ctx, cancel := context.WithTimeout(w.ctx(), 300*time.Millisecond)
	defer cancel()
	err := lead.c.Propose(ctx, state.Command{RemovePeer: &state.RemovePeer{Peer: rest[0].id}})
	if !errors.Is(err, state.ErrNoLeader) || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "2 of its 3 voting peer(s)") {
		t.Errorf("the minority says: %v", err)
	}
	w.volume("v", rest[0])
	w.silent(lead, false)
	w.settled(nodes...)
	if lead.c.Map().Volume("v") == nil {
		t.Error("what the majority decided is not known")
	}
}

// What was decided through one peer, every other knows that catches up.
func TestCatchUp(t *testing.T) { synctest.Test(t, testCatchUp) }

func testCatchUp(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	w.volume("v", nodes...)
	for i := range 30 {
		by, reader := nodes[i%3].c, nodes[(i+1)%3].c
		name := fmt.Sprintf("name-%d", i)
		cmd := state.Command{UpdatePeer: &state.UpdatePeer{Peer: nodes[0].id, Name: &name}}
		if err := by.Propose(w.ctx(), cmd); err != nil {
			t.Fatal(err)
		}
		if err := reader.CatchUp(w.ctx()); err != nil {
			t.Fatal(err)
		}
		if got := reader.Map().Peer(nodes[0].id).Name; got != name {
			t.Errorf("round %d: a peer that caught up knows %q, not %q", i, got, name)
		}
	}
	// A peer without a majority does not take what it knows for the truth.
	leader := w.settled(nodes...)
	w.silent(leader, true)
	ctx, cancel := context.WithTimeout(w.ctx(), 500*time.Millisecond)
	defer cancel()
	if err := leader.c.CatchUp(ctx); err == nil {
		t.Error("a leader that nobody hears claims to know what was decided")
	}
	w.silent(leader, false)
}
