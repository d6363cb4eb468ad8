package control

import (
	"testing"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
)

func TestPoolOfThree(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	// Any peer takes proposals, and knows their effect when Propose returns.
	for i, nd := range nodes {
		name := []string{"a", "b", "c"}[i]
		v := w.volume(name, nd)
		if v == nil || v.Status != cluster.VolumeStarted || v.Sets[0].Epoch != 1 {
			t.Fatalf("%s: volume %s is %+v", nd.name, name, v)
		}
	}
	_ = state.Format
	_ = time.Second
}

// The worst single failure: the machine that leads the pool and holds the
// primary falls silent. The surviving backup reports it after
// cluster.Suspicion, and everybody must have the new configuration before the
// old primary's lease has run out: then the control plane adds nothing to it.
func TestSilentLeaderAndPrimary(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	for round := range 3 {
		lead := w.settled(nodes...)
		rest := others(nodes, lead)
		v := w.volume(string(rune('a'+round)), append([]*node{lead}, rest...)...)
		w.waitSet(rest[0], v.Name, func(c *cluster.SetConfig) bool { return c.Epoch == 1 })
		w.waitSet(rest[1], v.Name, func(c *cluster.SetConfig) bool { return c.Epoch == 1 })

		begin := time.Now()
		w.silent(lead, true)
		time.Sleep(cluster.Suspicion) // a backup's own patience, which is part of the time
		suspected := make(chan time.Duration, 1)
		go func() {
			if err := rest[0].c.Suspect(w.ctx(), v.Sets[0].Set, 1, v.Bricks[1].ID); err != nil {
				t.Errorf("suspect: %v", err)
			}
			suspected <- time.Since(begin)
		}()
		for _, nd := range rest {
			cfg := w.waitSet(nd, v.Name, func(c *cluster.SetConfig) bool { return c.Epoch == 2 })
			if cfg.Primary == v.Bricks[0].ID || len(cfg.InSync) != 2 {
				t.Fatalf("%s: configuration %+v", nd.name, cfg)
			}
		}
		took := time.Since(begin)
		t.Logf("round %d: suspicion heard after %v, new primary known to all after %v", round, (<-suspected).Round(time.Millisecond), took.Round(time.Millisecond))
		if took > cluster.LeaseGuard+300*time.Millisecond {
			t.Errorf("the new primary was known after %v", took)
		}
		w.silent(lead, false)
	}
}
