package control

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
)

// Two peers: the first one's vote decides. Without the second all goes on;
// without the first nothing is decided, until an operator recovers the pool on
// the second. What the first decided alone meanwhile counts no more.
func TestTwoPeersAndRecovery(t *testing.T) { synctest.Test(t, testTwoPeersAndRecovery) }

func testTwoPeersAndRecovery(t *testing.T) {
	w := newWorld(t, 2)
	nodes := w.pool()
	one, two := nodes[0], nodes[1]
	v := w.volume("v", one, two)
	w.waitSet(two, "v", func(c *cluster.SetConfig) bool { return c.Epoch == 1 })
	two.kill()
	w.volume("alone", one)
	two.start()
	w.settled(nodes...)
	one.kill()
	w.until("its silence is noticed", func() bool { _, ok := two.c.Leader(); return !ok })
	ctx, cancel := context.WithTimeout(w.ctx(), 500*time.Millisecond)
	defer cancel()
	err := two.c.Propose(ctx, state.Command{StopVolume: &state.StopVolume{Volume: v.ID}})
	if !errors.Is(err, state.ErrNoLeader) || !strings.Contains(err.Error(), "1 of its 1 voting peer(s) (n1)") {
		t.Errorf("without the voter: %v", err)
	}
	if two.c.Map().Volume("alone") == nil {
		t.Error("the map cannot be read without the voter")
	}
	if err := Recover(two.dir, two.id, 1700000000); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("recovery of a store in use: %v", err)
	}
	if silent, err := two.c.PoolRecovery(w.ctx()).Decide(); err != nil || !slices.Equal(silent, []cluster.PeerID{one.id}) {
		t.Errorf("the recovery would give up %v, %v", silent, err)
	}
	two.kill()
	two.start() // and what it knew can be looked at, before any leader is there
	if two.c.Map().Volume("alone") == nil {
		t.Error("after a restart the map cannot be read without the voter")
	}
	two.kill()
	if err := Recover(two.dir, testID(77), 1700000000); err == nil {
		t.Error("recovery for a stranger worked")
	}
	if err := Recover(two.dir, two.id, 1700000000); err != nil {
		t.Fatal(err)
	}
	two.start()
	// Nobody knows what the first decided alone: perhaps that the second's brick was left behind.
	w.until("the set waits for all of its bricks", func() bool { return strings.Contains(w.problem(two, v.Sets[0].Set), "all of them must be there") })
	doubted := w.waitSet(two, "v", func(c *cluster.SetConfig) bool { return c.Epoch > 1<<32 })
	r := state.Recovery{Config: *doubted, Bricks: []state.Standing{{Brick: v.Bricks[1].ID, Answers: true, Whole: true, Tail: cluster.Pos{Epoch: 1, Seq: 100}}}}
	plan, refusal := r.Decide()
	if refusal != nil {
		t.Fatal(refusal)
	}
	if err := two.c.ForcePrimary(w.ctx(), plan, 1700000001); err != nil {
		t.Fatal(err)
	}
	cfg := w.waitSet(two, "v", func(c *cluster.SetConfig) bool { return !c.Primary.IsZero() && c.Epoch > 1<<32 })
	if cfg.Primary != v.Bricks[1].ID || len(cfg.InSync) != 1 || cfg.Doubted {
		t.Errorf("after the recovery: %+v", cfg)
	}
	w.volume("after", two)
	if got := two.c.Map().Recoveries; len(got) != 1 || got[0] != (cluster.PoolRecovery{Generation: 1, At: 1700000000, By: two.id}) {
		t.Errorf("the record of the recovery: %+v", got)
	}

	one.start()
	select {
	case err := <-one.over:
		if !errors.Is(err, state.ErrRecovered) || !strings.Contains(err.Error(), one.dir) {
			t.Errorf("the peer that was left behind ends with %v", err)
		}
		one.over <- nil
	case <-w.ctx().Done():
		t.Fatal("the peer that was left behind never knew")
	}
	if one.control().Map().Volume("after") != nil || two.c.Map().Volume("after") == nil {
		t.Error("the two generations mixed")
	}
	one.kill()
	if _, err := Discard(one.dir); err != nil {
		t.Fatal(err)
	}
	one.start()
	w.settled(nodes...)
	if one.c.Map().Volume("after") == nil {
		t.Error("the fresh copy is not the pool's")
	}
}
