package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
	"mortar/internal/proto"
)

func TestPoolOfThree(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	// Any peer takes proposals, and knows their effect when Propose returns.
	for i, nd := range nodes {
		v := w.volume(fmt.Sprintf("v%d", i), nd)
		if v == nil || v.Status != cluster.VolumeStarted || v.Sets[0].Epoch != 1 {
			t.Fatalf("%s: volume is %+v", nd.name, v)
		}
	}
	// Refusals arrive as they were made, wherever they are asked for.
	for _, nd := range nodes {
		err := nd.c.Propose(w.ctx(), state.Command{AddPeer: &state.AddPeer{Peer: nodes[0].peer()}})
		var e *state.Error
		if !errors.As(err, &e) || e.Code != state.CodePeerExists || e.Text != "Host n1 port 24007 already in peer list" || !errors.Is(err, state.ErrPeerExists) {
			t.Errorf("%s: %v", nd.name, err)
		}
		if err := nd.c.Propose(w.ctx(), state.Command{}); !errors.Is(err, &state.Error{Code: state.CodeBadCommand}) {
			t.Errorf("%s: an empty command: %v", nd.name, err)
		}
	}
	if err := nodes[1].c.Bootstrap(w.ctx(), state.Init{Pool: testID(9), Peer: nodes[1].peer()}); !errors.Is(err, &state.Error{Code: state.CodePoolExists}) {
		t.Errorf("a second pool: %v", err)
	}
}

// Everybody proposes at once: all that is not contradictory happens, and of what
// is, one thing.
func TestConcurrentProposals(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	v := w.volume("v", nodes...)
	seen := nodes[0].c.Map().Version
	for _, nd := range nodes {
		w.waitSet(nd, "v", func(c *cluster.SetConfig) bool { return c.Epoch == 1 })
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for i, nd := range nodes {
		wg.Go(func() {
			// Each has seen the same version: one of them was first.
			err := nd.c.Propose(w.ctx(), state.Command{Seen: seen, SetOptions: &state.SetOptions{Volume: v.ID, Options: map[string]string{cluster.OptReserve: fmt.Sprint(i + 2)}}})
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
			} else if !errors.Is(err, state.ErrConflict) {
				t.Errorf("%s: %v", nd.name, err)
			}
		})
		for k := range 10 {
			wg.Go(func() {
				tok := state.Token{Hash: fmt.Sprintf("%064x", 1000*i+k), Role: "peer", Expires: 100, Uses: 1}
				if err := nd.c.Propose(w.ctx(), state.Command{AddToken: &state.AddToken{Token: tok, Now: 1}}); err != nil {
					t.Errorf("%s: token %d: %v", nd.name, k, err)
				}
			})
		}
	}
	wg.Wait()
	if won != 1 {
		t.Errorf("%d of three contradictory commands were carried out", won)
	}
	w.until("all know all tokens", func() bool {
		for _, nd := range nodes {
			if len(nd.c.Tokens()) != 30 {
				return false
			}
		}
		return true
	})
	// A set's configuration: one epoch, one winner.
	next := nodes[0].c.Map().Volume("v").Sets[0].Clone()
	next.Epoch++
	won = 0
	for i, nd := range nodes {
		wg.Go(func() {
			mine := next.Clone()
			mine.InSync = slices.Delete(mine.InSync, 1+i%2, 2+i%2)
			err := nd.c.Propose(w.ctx(), state.Command{SetConfig: &state.SetConfig{Config: mine}})
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
			} else if !errors.Is(err, state.ErrStaleEpoch) {
				t.Errorf("%s: %v", nd.name, err)
			}
		})
	}
	wg.Wait()
	if won != 1 {
		t.Errorf("epoch 2 was decided %d times", won)
	}
}

// Commands are carried out once, however leaders come and go meanwhile.
func TestExactlyOnce(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	accepted := 0
	for i, nd := range nodes {
		wg.Go(func() {
			for k := 0; ; k++ {
				select {
				case <-stop:
					return
				default:
				}
				// A token that is there twice is refused: a command that was carried
				// out again would show.
				tok := state.Token{Hash: fmt.Sprintf("%064x", 100000*i+k), Role: "peer", Expires: 100, Uses: 1}
				if err := nd.c.Propose(w.ctx(), state.Command{AddToken: &state.AddToken{Token: tok, Now: 1}}); err != nil {
					t.Errorf("%s: command %d: %v", nd.name, k, err)
					return
				}
				mu.Lock()
				accepted++
				mu.Unlock()
			}
		})
	}
	for round := range 4 {
		lead := w.settled(nodes...)
		if round%2 == 0 {
			_ = lead.c.raft.LeadershipTransfer().Error()
		} else {
			w.silent(lead, true)
			rest := others(nodes, lead)
			w.until("another leader", func() bool { return rest[0].c.Status().Leading || rest[1].c.Status().Leading })
			w.silent(lead, false)
		}
		w.until("commands after it", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return accepted > 20*(round+1)
		})
	}
	close(stop)
	wg.Wait()
	w.until("all know all", func() bool {
		for _, nd := range nodes {
			if len(nd.c.Tokens()) != accepted {
				return false
			}
		}
		return true
	})
}

func TestRestartOfAll(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	w.volume("v", nodes...)
	for round := range uint64(3) {
		w.settled(nodes...)
		version := nodes[0].c.Map().Version
		for _, nd := range nodes {
			if got := nd.c.Incarnation(); got != round+1 {
				t.Errorf("%s: start %d has number %d", nd.name, round+1, got)
			}
			if err := nd.kill(); err != nil {
				t.Fatalf("%s: %v", nd.name, err)
			}
		}
		for _, nd := range nodes {
			nd.start()
		}
		w.until("the map is back", func() bool {
			for _, nd := range nodes {
				if m := nd.c.Map(); m.Version < version || m.Volume("v") == nil {
					return false
				}
			}
			return true
		})
	}
}

// A leader that is stopped in order hands over: nobody waits for its silence.
func TestLeaderStops(t *testing.T) {
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
func TestLeaderDies(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	fast := 0
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
		// Without the news it takes at least as long as no heartbeat may be missing;
		// the machine that the test runs on may be slow, but not every time.
		if took < heartbeatTimeout {
			fast++
		}
		w.silent(lead, false)
	}
	if fast == 0 {
		t.Error("no election was faster than without the news")
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
func TestMinority(t *testing.T) {
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

// One, three or five vote, and it becomes so by itself as peers come and go.
func TestVotersAreKept(t *testing.T) {
	w := newWorld(t, 6)
	all := w.sorted()
	first := all[0].start()
	if err := first.c.Bootstrap(w.ctx(), state.Init{Pool: testID(0xff), Peer: first.peer()}); err != nil {
		t.Fatal(err)
	}
	for n := 2; n <= 6; n++ {
		nd := all[n-1].start()
		p := nd.peer()
		p.Witness = n == 3 // witnesses vote like everybody
		if err := all[n%2].c.Propose(w.ctx(), state.Command{AddPeer: &state.AddPeer{Peer: p}}); err != nil {
			t.Fatal(err)
		}
		w.settled(all[:n]...)
		if got := len(first.c.Status().Voters); got != state.Voters(n) {
			t.Fatalf("%d peers and %d voters", n, got)
		}
	}
	for n := 5; n >= 1; n-- {
		gone := all[n]
		if err := gone.c.Propose(w.ctx(), state.Command{RemovePeer: &state.RemovePeer{Peer: gone.id}}); err != nil {
			t.Fatal(err)
		}
		w.settled(all[:n]...)
		select {
		case err := <-gone.over:
			if !errors.Is(err, state.ErrDetached) || !strings.Contains(err.Error(), "this peer was detached from pool ff") {
				t.Errorf("%s ends with %v", gone.name, err)
			}
			gone.over <- nil
		case <-w.ctx().Done():
			t.Fatalf("%s does not know that it was detached", gone.name)
		}
	}
	if n := len(first.c.raft.GetConfiguration().Configuration().Servers); n != 1 {
		t.Errorf("%d machines are left in the group", n)
	}
}

// The leader is detached, by somebody else: its office goes first.
func TestDetachLeader(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	lead := w.settled(nodes...)
	rest := others(nodes, lead)
	if err := rest[0].c.Propose(w.ctx(), state.Command{RemovePeer: &state.RemovePeer{Peer: lead.id}}); err != nil {
		t.Fatal(err)
	}
	w.settled(rest...)
	if err := <-lead.over; !errors.Is(err, state.ErrDetached) {
		t.Errorf("the old leader ends with %v", err)
	}
	lead.over <- nil
	w.volume("v", rest[0])
	// Again, with one voter: another must be made before the office can go.
	lead = w.settled(rest...)
	last := others(rest, lead)
	id := lead.c.Map().Volume("v").ID
	for _, cmd := range []state.Command{{StopVolume: &state.StopVolume{Volume: id}}, {DeleteVolume: &state.DeleteVolume{Volume: id}}, {RemovePeer: &state.RemovePeer{Peer: lead.id}}} {
		if err := last[0].c.Propose(w.ctx(), cmd); err != nil {
			t.Fatal(err)
		}
	}
	w.settled(last...)
	if err := <-lead.over; !errors.Is(err, state.ErrDetached) {
		t.Errorf("the second leader ends with %v", err)
	}
	lead.over <- nil
	w.volume("w", last[0])
}

// A peer that was away when it was detached is told when it comes back.
func TestDetachedWhileAway(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	lead := w.settled(nodes...)
	rest := others(nodes, lead)
	away := rest[1]
	away.kill()
	if err := rest[0].c.Propose(w.ctx(), state.Command{RemovePeer: &state.RemovePeer{Peer: away.id}}); err != nil {
		t.Fatal(err)
	}
	w.until("the group is without it", func() bool {
		// Who hears that it is not in the pool any more goes; so long as its vote is needed, nobody may say so.
		if lead.c.WasDetached(away.id) && lead.c.Member(away.id) {
			t.Error("the peer is told to go while its vote is needed")
		}
		return len(lead.c.raft.GetConfiguration().Configuration().Servers) == 2
	})
	away.start()
	select {
	case err := <-away.over:
		if !errors.Is(err, state.ErrDetached) {
			t.Errorf("it ends with %v", err)
		}
		away.over <- nil
	case <-w.ctx().Done():
		t.Fatal("it was never told")
	}
	if err := away.control().Detached(); err == nil || !strings.Contains(err.Error(), away.dir) {
		t.Errorf("Detached says %v", err)
	}
	if !lead.c.WasDetached(away.id) || lead.c.WasDetached(lead.id) {
		t.Error("WasDetached")
	}
	// With an empty store it may join again.
	away.kill()
	moved, err := Discard(away.dir)
	if err != nil || !strings.HasSuffix(moved, ".old-1") {
		t.Fatalf("discard: %q, %v", moved, err)
	}
	away.start()
	if err := lead.c.Propose(w.ctx(), state.Command{AddPeer: &state.AddPeer{Peer: away.peer()}}); err != nil {
		t.Fatal(err)
	}
	w.settled(nodes...)
}

// A peer that comes when the log is gone gets a snapshot.
func TestSnapshot(t *testing.T) {
	w := newWorld(t, 4)
	all := w.sorted()
	first := all[0].start()
	if err := first.c.Bootstrap(w.ctx(), state.Init{Pool: testID(0xff), Peer: first.peer(), Authority: []byte("the authority")}); err != nil {
		t.Fatal(err)
	}
	w.volume("v", first)
	compact := func() {
		t.Helper()
		rc := first.c.raft.ReloadableConfig()
		rc.TrailingLogs = 1
		if err := first.c.raft.ReloadConfig(rc); err != nil {
			t.Fatal(err)
		}
		var err error
		w.until("a snapshot can be taken", func() bool { // a change of the group may be under way
			err = first.c.raft.Snapshot().Error()
			return err == nil || errors.Is(err, raft.ErrNothingNewToSnapshot)
		})
	}
	compact()
	if i, _ := first.c.store.FirstIndex(); i < 5 {
		t.Fatalf("the log still begins at %d", i)
	}
	for _, nd := range all[1:3] {
		nd.start()
		if err := first.c.Propose(w.ctx(), state.Command{AddPeer: &state.AddPeer{Peer: nd.peer()}}); err != nil {
			t.Fatal(err)
		}
	}
	w.settled(all[:3]...)
	for _, nd := range all[:3] {
		if a, n := nd.c.Authority(); string(a) != "the authority" || n != 1 {
			t.Errorf("%s: authority %q %d", nd.name, a, n)
		}
		if nd.c.Map().Volume("v") == nil {
			t.Errorf("%s does not know the volume", nd.name)
		}
	}
	// Everybody restarts from snapshot and log.
	compact()
	for _, nd := range all[:3] {
		nd.kill()
	}
	for _, nd := range all[:3] {
		nd.start()
	}
	w.settled(all[:3]...)
	if err := all[1].c.Propose(w.ctx(), state.Command{StopVolume: &state.StopVolume{Volume: first.c.Map().Volume("v").ID}}); err != nil {
		t.Fatal(err)
	}
}

// Two peers: the first one's vote decides. Without the second all goes on;
// without the first nothing is decided, until an operator recovers the pool on
// the second. What the first decided alone meanwhile counts no more.
func TestTwoPeersAndRecovery(t *testing.T) {
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

// A store that does not work any more ends the peer, in order, with its name.
func TestStoreFails(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	for _, what := range []string{"follower", "leader"} {
		lead := w.settled(nodes...)
		nd := lead
		if what == "follower" {
			nd = others(nodes, lead)[0]
		}
		nd.c.store.mu.Lock()
		nd.c.store.f.Close()
		nd.c.store.mu.Unlock()
		rest := others(nodes, nd)
		w.volume("v-"+what, rest[0])
		select {
		case err := <-nd.over:
			if err == nil || !strings.Contains(err.Error(), filepath.Join(nd.dir, "log.mortar")) {
				t.Errorf("the %s ends with %v", what, err)
			}
			nd.over <- nil
		case <-w.ctx().Done():
			t.Fatalf("the %s goes on without a store", what)
		}
		nd.kill()
		nd.start()
		w.settled(nodes...)
		if nd.c.Map().Volume("v-"+what) == nil {
			t.Errorf("the %s has not caught up", what)
		}
	}
}

// Every file of a control store, damaged: it is refused by name, with the way
// out, and never taken for an empty one.
func TestDamageIsNamed(t *testing.T) {
	w := newWorld(t, 1)
	nd := w.pool()[0]
	w.volume("v", nd)
	if err := nd.c.raft.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	nd.kill()
	var files []string
	err := filepath.WalkDir(nd.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && d.Name() != "lock" && d.Name() != "commit.mortar" {
			files = append(files, path)
		}
		return err
	})
	if err != nil || len(files) < 3 {
		t.Fatalf("files %v, %v", files, err)
	}
	for _, file := range files {
		good, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for what, bad := range map[string][]byte{
			"flipped": append(append(slices.Clone(good[:20]), good[20]^0x10), good[21:]...),
			"short":   good[:len(good)/2],
			"empty":   nil,
			"zeros":   make([]byte, len(good)),
		} {
			if err := os.WriteFile(file, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			err := nd.open()
			var damage *DamageError
			if !errors.As(err, &damage) {
				t.Errorf("%s %s: %v", filepath.Base(file), what, err)
				nd.kill()
				continue
			}
			if !strings.Contains(err.Error(), nd.dir) || !strings.Contains(err.Error(), "move the directory") {
				t.Errorf("%s %s: %v", filepath.Base(file), what, err)
			}
		}
		if err := os.WriteFile(file, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	nd.start()
	w.settled(nd)
	if nd.c.Map().Volume("v") == nil {
		t.Error("the volume is gone")
	}
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

// What the bricks answer decides, and reports that come twice cost nothing.
func TestFailover(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	at := func(seq uint64, trusted bool) proto.SealReply {
		return proto.SealReply{Sealed: true, Trusted: trusted, Tail: cluster.Pos{Epoch: 1, Seq: seq}}
	}
	epoch := func(n cluster.Epoch) func(*cluster.SetConfig) bool {
		return func(c *cluster.SetConfig) bool { return c.Epoch == n }
	}
	t.Run("duplicates", func(t *testing.T) {
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
	t.Run("unclean", func(t *testing.T) {
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
	t.Run("waits", func(t *testing.T) {
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
	t.Run("false alarm", func(t *testing.T) {
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
	t.Run("stop and start", func(t *testing.T) {
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
	t.Run("hand-over", func(t *testing.T) {
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
	t.Run("forced", func(t *testing.T) {
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
func TestFailoverOutlivesLeader(t *testing.T) {
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

// What a stranger asks is refused, and so is what is no request.
func TestHandleRefuses(t *testing.T) {
	w := newWorld(t, 1)
	nd := w.pool()[0]
	for _, req := range []string{"", "{", "[]", `{"propose":5}`, `{"propose":{"nonsense":1}}`, `{}`, `{"suspect":{}}`, `{"handover":{}}`, strings.Repeat("x", maxRequest+1)} {
		b, err := nd.c.Handle(w.ctx(), nd.id, []byte(req))
		if err == nil && !strings.Contains(string(b), `"code"`) && req != `{"suspect":{}}` {
			t.Errorf("%.30q: %s", req, b)
		}
	}
	b, err := nd.c.Handle(w.ctx(), testID(66), []byte(`{"status":true}`))
	if err != nil || !strings.Contains(string(b), string(state.CodeNoPeer)) {
		t.Errorf("a stranger gets %s, %v", b, err)
	}
	b, err = nd.c.Handle(w.ctx(), testID(66), []byte(`{"propose":{"incarnate":{"peer":"`+nd.id.String()+`","past":1}}}`))
	if err != nil || !strings.Contains(string(b), `"code"`) {
		t.Errorf("a stranger gets %s, %v", b, err)
	}
}

// FuzzHandle: whatever another peer asks of the leader is answered, and what it
// proposes leaves a state that can be saved and loaded.
func FuzzHandle(f *testing.F) {
	w := newWorld(f, 1)
	nd := w.pool()[0]
	for _, cmd := range []state.Command{
		{UpdatePeer: &state.UpdatePeer{Peer: nd.id, Addrs: []string{"n1:1"}}}, {RemovePeer: &state.RemovePeer{Peer: nd.id}},
		{Incarnate: &state.Incarnate{Peer: nd.id, Past: 1}}, {SetConfig: &state.SetConfig{Force: true}}, {AddToken: &state.AddToken{}},
	} {
		raw, err := cmd.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(append(append([]byte(`{"propose":`), raw...), '}'))
	}
	f.Add([]byte(`{"status":true}`))
	f.Add([]byte(`{"problems":true,"boot":18446744073709551615}`))
	f.Add([]byte(`{"suspect":{"epoch":1},"handover":{"epoch":1}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if b, err := nd.c.Handle(ctx, nd.id, raw); err == nil && !json.Valid(b) {
			t.Errorf("answered with %q", b)
		}
		nd.c.mu.Lock()
		saved := nd.c.live.Encode()
		nd.c.mu.Unlock()
		if _, err := state.Decode(saved); err != nil {
			t.Error(err)
		}
	})
}

func TestOpenRefuses(t *testing.T) {
	if _, err := Open(Config{}); err == nil {
		t.Error("an empty Config was taken")
	}
	w := newWorld(t, 1)
	nd := w.node(1).start()
	if err := nd.open(); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("opened twice: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if err := nd.c.Propose(ctx, state.Command{RemovePeer: &state.RemovePeer{}}); !errors.Is(err, state.ErrNoPool) {
		t.Errorf("a machine without a pool says %v", err)
	}
	if nd.c.Bootstrapped() {
		t.Error("it believes to be in a pool")
	}
	if err := nd.c.Bootstrap(w.ctx(), state.Init{Pool: testID(1), Peer: cluster.Peer{ID: testID(2), Name: "x"}}); err == nil {
		t.Error("a pool of another machine was made")
	}
}

func TestWatch(t *testing.T) {
	w := newWorld(t, 1)
	nd := w.pool()[0]
	version := nd.c.Map().Version
	select {
	case <-nd.c.Watch(version - 1):
	default:
		t.Error("an old version is not past")
	}
	ch := nd.c.Watch(version)
	w.volume("v", nd)
	<-ch
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("enough")
	cancel(why)
	if _, err := nd.c.Wait(ctx, 1<<60); !errors.Is(err, why) {
		t.Errorf("Wait: %v", err)
	}
	nd.w.mu.Lock()
	c := nd.c
	nd.w.mu.Unlock()
	nd.kill()
	if _, err := c.Wait(context.Background(), 1<<60); err == nil {
		t.Error("Wait on a closed Control")
	}
	if err := c.Propose(context.Background(), state.Command{DropToken: &state.DropToken{}}); err == nil {
		t.Error("Propose on a closed Control")
	}
	if err := c.Close(); err != nil {
		t.Errorf("closed twice: %v", err)
	}
}

// A command of a newer version is not skipped: this copy would differ from the
// others. The peer ends and says what to do.
func TestNewerCommand(t *testing.T) {
	w := newWorld(t, 1)
	nd := w.pool()[0]
	if err := nd.c.Propose(w.ctx(), state.Command{DropToken: &state.DropToken{}}); err != nil {
		t.Fatal(err)
	}
	before := nd.c.Map().Version
	if _, err := nd.c.apply([]byte(`{"invent":{"something":1}}`)); err == nil {
		t.Error("an unknown command was applied")
	}
	if err := <-nd.over; err == nil || !strings.Contains(err.Error(), "update mortar on this machine") {
		t.Errorf("it ends with %v", err)
	}
	nd.over <- nil
	if got := nd.control().Map().Version; got != before {
		t.Errorf("map %d, was %d", got, before)
	}
}

// What was decided through one peer, every other knows that catches up.
func TestCatchUp(t *testing.T) {
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
