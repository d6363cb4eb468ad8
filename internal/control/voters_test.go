package control

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/hashicorp/raft"

	"mortar/internal/control/state"
)

// One, three or five vote, and it becomes so by itself as peers come and go.
func TestVotersAreKept(t *testing.T) { synctest.Test(t, testVotersAreKept) }

func testVotersAreKept(t *testing.T) {
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
		// It may read in the log that it is out before the answer has come.
		if err := gone.c.Propose(w.ctx(), state.Command{RemovePeer: &state.RemovePeer{Peer: gone.id}}); err != nil && !errors.Is(err, state.ErrDetached) {
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
func TestDetachLeader(t *testing.T) { synctest.Test(t, testDetachLeader) }

func testDetachLeader(t *testing.T) {
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

// A peer that was detached and has joined again reads of the first when it reads
// the pool's log; it is not about what it is now.
func TestRejoinReadsOfItsRemoval(t *testing.T) {
	w := newWorld(t, 2)
	nd, other := w.node(2), w.node(1)
	if err := nd.open(); err != nil {
		t.Fatal(err)
	}
	c := nd.control()
	index := uint64(0)
	apply := func(cmd state.Command) {
		t.Helper()
		raw, err := cmd.Encode()
		if err != nil {
			t.Fatal(err)
		}
		index++
		if err, _ := (*fsm)(c).Apply(&raft.Log{Index: index, Data: raw}).(error); err != nil {
			t.Fatal(err)
		}
	}
	// The leader's first word: four commands are decided.
	if err := c.amnesia(raft.RPC{Command: &raft.AppendEntriesRequest{LeaderCommitIndex: 4}}); err != nil {
		t.Fatal(err)
	}
	apply(state.Command{Init: &state.Init{Pool: testID(0xff), Peer: other.peer()}})
	apply(state.Command{AddPeer: &state.AddPeer{Peer: nd.peer()}})
	apply(state.Command{RemovePeer: &state.RemovePeer{Peer: nd.id}})
	if err := c.Detached(); err != nil {
		t.Errorf("on its way to the present: %v", err)
	}
	apply(state.Command{AddPeer: &state.AddPeer{Peer: nd.peer()}})
	if err := c.Detached(); err != nil {
		t.Errorf("in the pool: %v", err)
	}
	apply(state.Command{RemovePeer: &state.RemovePeer{Peer: nd.id}})
	if err := c.Detached(); !errors.Is(err, state.ErrDetached) {
		t.Errorf("detached again: %v", err)
	}
}

// A peer that was away when it was detached is told when it comes back.
func TestDetachedWhileAway(t *testing.T) { synctest.Test(t, testDetachedWhileAway) }

func testDetachedWhileAway(t *testing.T) {
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
