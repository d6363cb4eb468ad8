package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
)

func TestPoolOfThree(t *testing.T) { synctest.Test(t, testPoolOfThree) }

func testPoolOfThree(t *testing.T) {
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

func TestRestartOfAll(t *testing.T) { synctest.Test(t, testRestartOfAll) }

func testRestartOfAll(t *testing.T) {
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

// A peer that comes when the log is gone gets a snapshot.
func TestSnapshot(t *testing.T) { synctest.Test(t, testSnapshot) }

func testSnapshot(t *testing.T) {
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

// A store that does not work any more ends the peer, in order, with its name.
func TestStoreFails(t *testing.T) { synctest.Test(t, testStoreFails) }

func testStoreFails(t *testing.T) {
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
func TestDamageIsNamed(t *testing.T) { synctest.Test(t, testDamageIsNamed) }

func testDamageIsNamed(t *testing.T) {
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

func TestOpenRefuses(t *testing.T) { synctest.Test(t, testOpenRefuses) }

func testOpenRefuses(t *testing.T) {
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

func TestWatch(t *testing.T) { synctest.Test(t, testWatch) }

func testWatch(t *testing.T) {
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
func TestNewerCommand(t *testing.T) { synctest.Test(t, testNewerCommand) }

func testNewerCommand(t *testing.T) {
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
