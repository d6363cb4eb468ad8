package daemon

import (
	"testing"

	"mortar/internal/cluster"
)

// Where a detached peer was, whose vote still counts, is known after a restart too.
func TestDetachedPeersAreRemembered(t *testing.T) {
	self, other, former := cluster.NewID(), cluster.NewID(), cluster.NewID()
	dir := t.TempDir()
	life := func() *member {
		m := &member{n: &Node{cfg: Config{StateDir: dir}}}
		var err error
		if m.gone, err = loadGone(m.n.path(goneFile)); err != nil {
			t.Fatal(err)
		}
		m.links = &links{self: self, peers: map[cluster.PeerID]*link{}, gone: map[cluster.PeerID][]string{}}
		m.links.remember(m.gone)
		return m
	}
	m := life()
	for _, id := range []cluster.PeerID{other, former} {
		m.links.peers[id] = &link{id: id, addrs: []string{"10.0.0.2:24007"}, stop: func(error) {}}
		m.links.peers[id].lines[secure] = new(line)
	}
	m.links.set(&cluster.Map{Peers: []*cluster.Peer{{ID: self}}})
	if err := m.saveGone(func(id cluster.PeerID) bool { return id != former }); err != nil {
		t.Fatal(err)
	}
	m = life()
	if got := m.links.addrsOf(other); len(got) != 1 || got[0] != "10.0.0.2:24007" {
		t.Errorf("after a restart the detached peer is at %v", got)
	}
	if got := m.links.addrsOf(former); got != nil {
		t.Errorf("one whose vote counts no more is at %v", got)
	}
}
