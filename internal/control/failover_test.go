package control

import (
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
	"mortar/internal/proto"
)

// The worst single failure: the machine that leads the pool and holds the
// primary falls silent. The surviving backup reports it after
// cluster.Suspicion, and everybody must have the new configuration before the
// old primary's lease has run out: then the control plane adds nothing to it.
func TestSilentLeaderAndPrimary(t *testing.T) { synctest.Test(t, testSilentLeaderAndPrimary) }

func testSilentLeaderAndPrimary(t *testing.T) {
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

// What the bricks answer decides, and reports that come twice cost nothing.
func TestFailover(t *testing.T) {
	in := func(name string, f func(t *testing.T, w *world, nodes []*node)) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, 3)
				f(t, w, w.pool())
			})
		})
	}
	at := func(seq uint64, trusted bool) proto.SealReply {
		return proto.SealReply{Sealed: true, Trusted: trusted, Tail: cluster.Pos{Epoch: 1, Seq: seq}}
	}
	epoch := func(n cluster.Epoch) func(*cluster.SetConfig) bool {
		return func(c *cluster.SetConfig) bool { return c.Epoch == n }
	}
	in("duplicates", func(t *testing.T, w *world, nodes []*node) {
		v := w.volume("dup", nodes...)
		w.brick(nodes[1], v.Bricks[1].ID, at(10, true))
		w.brick(nodes[2], v.Bricks[2].ID, at(12, true))
		w.brick(nodes[0], v.Bricks[0].ID, at(11, true))
		var wg sync.WaitGroup
		for _, nd := range nodes {
			for range 20 {
				wg.Go(func() {
					if err := nd.c.Suspect(w.ctx(), v.Sets[0].Set, 1, v.Bricks[1].ID); err != nil {
						t.Error(err)
					}
				})
			}
		}
		wg.Wait()
		cfg := w.waitSet(nodes[0], "dup", func(c *cluster.SetConfig) bool { return c.Epoch > 1 })
		if cfg.Epoch != 2 || cfg.Primary != v.Bricks[2].ID || len(cfg.InSync) != 3 {
			t.Errorf("configuration %+v", cfg)
		}
		// Old news, and news from nobody.
		for _, from := range []cluster.BrickID{v.Bricks[0].ID, testID(99)} {
			if err := nodes[0].c.Suspect(w.ctx(), v.Sets[0].Set, 1, from); err != nil {
				t.Error(err)
			}
		}
		if err := nodes[0].c.Suspect(w.ctx(), cluster.SetID{Volume: testID(98)}, 1, testID(99)); err != nil {
			t.Error(err)
		}
		if got := nodes[0].c.Map().Volume("dup").Sets[0].Epoch; got != 2 {
			t.Errorf("epoch %d", got)
		}
	})
	in("unclean", func(t *testing.T, w *world, nodes []*node) {
		v := w.volume("unclean", nodes...)
		for i, nd := range nodes {
			w.brick(nd, v.Bricks[i].ID, at(uint64(10+i), i == 0))
		}
		if err := nodes[1].c.Suspect(w.ctx(), v.Sets[0].Set, 1, v.Bricks[1].ID); err != nil {
			t.Fatal(err)
		}
		cfg := w.waitSet(nodes[1], "unclean", epoch(2))
		if cfg.Primary != v.Bricks[0].ID || len(cfg.InSync) != 1 {
			t.Errorf("configuration %+v", cfg)
		}
	})
	in("waits", func(t *testing.T, w *world, nodes []*node) {
		v := w.volume("waits", nodes[0], nodes[1])
		w.mu.Lock()
		nodes[0].bricks[v.Bricks[0].ID].err = errors.New("disk not mounted")
		nodes[1].bricks[v.Bricks[1].ID].err = errors.New("disk not mounted")
		w.mu.Unlock()
		if err := nodes[1].c.Suspect(w.ctx(), v.Sets[0].Set, 1, v.Bricks[1].ID); err != nil {
			t.Fatal(err)
		}
		lead := w.settled(nodes...)
		w.until("the reason is shown", func() bool {
			return strings.Contains(w.problem(nodes[2], v.Sets[0].Set), "none of the 2 in-sync brick(s) can be reached")
		})
		w.brick(nodes[1], v.Bricks[1].ID, at(5, true))
		cfg := w.waitSet(nodes[1], "waits", epoch(2)) // nobody had to report again
		if cfg.Primary != v.Bricks[1].ID {
			t.Errorf("configuration %+v", cfg)
		}
		w.until("the reason is gone", func() bool { return len(lead.c.Status().Problems) == 0 })
	})
	in("false alarm", func(t *testing.T, w *world, nodes []*node) {
		v := w.volume("alarm", nodes...)
		w.brick(nodes[0], v.Bricks[0].ID, proto.SealReply{Text: "this brick is the primary and in touch with its backups"})
		if err := nodes[1].c.Suspect(w.ctx(), v.Sets[0].Set, 1, v.Bricks[1].ID); err != nil {
			t.Fatal(err)
		}
		lead := w.settled(nodes...)
		w.until("it is over", func() bool {
			l := lead.c.leading()
			l.mu.Lock()
			defer l.mu.Unlock()
			return len(l.troubles) == 0
		})
		if got := nodes[0].c.Map().Volume("alarm").Sets[0].Epoch; got != 1 {
			t.Errorf("epoch %d", got)
		}
	})
	in("stop and start", func(t *testing.T, w *world, nodes []*node) {
		v := w.volume("again", nodes...)
		for _, cmd := range []state.Command{{StopVolume: &state.StopVolume{Volume: v.ID}}, {StartVolume: &state.StartVolume{Volume: v.ID}}} {
			if err := nodes[2].c.Propose(w.ctx(), cmd); err != nil {
				t.Fatal(err)
			}
		}
		cfg := w.waitSet(nodes[2], "again", epoch(3)) // 2 was without a primary
		if cfg.Primary != v.Bricks[0].ID || len(cfg.InSync) != 3 {
			t.Errorf("configuration %+v", cfg)
		}
	})
	in("hand-over", func(t *testing.T, w *world, nodes []*node) {
		v := w.volume("hand", nodes...)
		set := v.Sets[0].Set
		for _, nd := range nodes {
			w.waitSet(nd, "hand", epoch(1))
		}
		if err := nodes[0].c.Handover(w.ctx(), set, 1, v.Bricks[0].ID); err != nil {
			t.Fatal(err)
		}
		cfg := w.waitSet(nodes[0], "hand", epoch(2))
		if cfg.Primary != v.Bricks[1].ID || cfg.IsInSync(v.Bricks[0].ID) || len(cfg.InSync) != 2 {
			t.Errorf("configuration %+v", cfg)
		}
		// A brick that nobody counts on may go at any time; the last may not.
		if err := nodes[0].c.Handover(w.ctx(), set, 2, v.Bricks[0].ID); err != nil {
			t.Error(err)
		}
		if err := nodes[0].c.Handover(w.ctx(), set, 1, v.Bricks[1].ID); !errors.Is(err, state.ErrStaleEpoch) {
			t.Errorf("an old epoch: %v", err)
		}
		if err := nodes[1].c.Handover(w.ctx(), set, 2, v.Bricks[1].ID); err != nil {
			t.Fatal(err)
		}
		err := nodes[2].c.Handover(w.ctx(), set, 3, v.Bricks[2].ID)
		if !errors.Is(err, state.ErrUnsafe) || !strings.Contains(err.Error(), "no other brick is in sync") {
			t.Errorf("the last one: %v", err)
		}
	})
	in("forced", func(t *testing.T, w *world, nodes []*node) {
		v := w.volume("forced", nodes...)
		set := v.Sets[0].Set
		next := v.Sets[0].Clone()
		next.Epoch, next.InSync, next.Floor = 2, next.InSync[:1], cluster.Pos{Epoch: 1, Seq: 500}
		if err := nodes[0].c.Propose(w.ctx(), state.Command{SetConfig: &state.SetConfig{Config: next}}); err != nil {
			t.Fatal(err)
		}
		w.brick(nodes[0], v.Bricks[0].ID, at(400, false)) // its disk has lost something
		if err := nodes[0].c.Suspect(w.ctx(), set, 2, v.Bricks[0].ID); err != nil {
			t.Fatal(err)
		}
		lead := w.settled(nodes...)
		w.until("nobody may lead", func() bool { return strings.Contains(w.problem(nodes[1], set), "durable up to 1.500") })
		now := w.waitSet(nodes[2], "forced", epoch(2))
		plan := func(seq uint64) *state.Plan {
			r := state.Recovery{Config: *now, Bricks: []state.Standing{{Brick: v.Bricks[0].ID, Answers: true, Whole: true, Tail: cluster.Pos{Epoch: 1, Seq: seq}}}}
			p, err := r.Decide()
			if err != nil {
				t.Fatal(err)
			}
			return p
		}
		stranger := plan(400)
		stranger.Next.Primary = testID(99)
		if err := nodes[2].c.ForcePrimary(w.ctx(), stranger, 1700000000); err == nil {
			t.Error("a stranger was forced")
		}
		// Somebody agreed to another loss than there is by now.
		if err := nodes[2].c.ForcePrimary(w.ctx(), plan(399), 1700000000); !errors.Is(err, state.ErrConflict) {
			t.Errorf("a plan that is outdated: %v", err)
		}
		if err := nodes[2].c.ForcePrimary(w.ctx(), plan(400), 1700000000); err != nil {
			t.Fatal(err)
		}
		cfg := w.waitSet(nodes[2], "forced", epoch(3))
		if cfg.Primary != v.Bricks[0].ID || cfg.Floor.Seq != 400 {
			t.Errorf("configuration %+v", cfg)
		}
		want := []cluster.Recovery{{Epoch: 3, At: 1700000000, By: nodes[2].id, Brick: v.Bricks[0].ID, Kept: cluster.Pos{Epoch: 1, Seq: 400}, Known: cluster.Pos{Epoch: 1, Seq: 500}}}
		if diff := cmp.Diff(want, nodes[2].c.Map().Volume("forced").Recoveries); diff != "" {
			t.Errorf("the record of it:\n%s", diff)
		}
		w.until("all is well", func() bool { return len(lead.c.Status().Problems) == 0 })
	})
}

// A new leader goes on with what the old one had begun.
func TestFailoverOutlivesLeader(t *testing.T) { synctest.Test(t, testFailoverOutlivesLeader) }

func testFailoverOutlivesLeader(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	lead := w.settled(nodes...)
	v := w.volume("v", nodes...)
	w.waitSet(lead, "v", func(c *cluster.SetConfig) bool { return c.Epoch == 1 })
	if err := lead.c.Propose(w.ctx(), state.Command{StopVolume: &state.StopVolume{Volume: v.ID}}); err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	for i, nd := range nodes {
		nd.bricks[v.Bricks[i].ID].err = errors.New("not yet open")
	}
	w.mu.Unlock()
	if err := lead.c.Propose(w.ctx(), state.Command{StartVolume: &state.StartVolume{Volume: v.ID}}); err != nil {
		t.Fatal(err)
	}
	w.until("it is being worked on", func() bool { return len(lead.c.Status().Problems) == 1 })
	lead.kill()
	rest := others(nodes, lead)
	w.until("another leader works on it", func() bool {
		return len(rest[0].c.Status().Problems)+len(rest[1].c.Status().Problems) == 1
	})
	w.mu.Lock()
	for i, nd := range nodes {
		nd.bricks[v.Bricks[i].ID].err = nil
	}
	w.mu.Unlock()
	cfg := w.waitSet(rest[0], "v", func(c *cluster.SetConfig) bool { return !c.Primary.IsZero() })
	if len(cfg.InSync) != 2 {
		t.Errorf("configuration %+v", cfg)
	}
}
