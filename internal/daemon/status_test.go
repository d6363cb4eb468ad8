package daemon

import (
	"testing"

	"mortar/internal/api"
	"mortar/internal/cluster"
)

// TestStatusesOfAnOldMap: a peer that does not know of the last fail-over does not
// say of the brick that it left behind that it is in sync.
func TestStatusesOfAnOldMap(t *testing.T) {
	v := &cluster.Volume{Replica: 3, Sets: make([]cluster.SetConfig, 1)}
	all := map[cluster.PeerID]*api.LocalBricks{}
	for i := range 3 {
		b := cluster.Brick{ID: cluster.NewID(), Peer: cluster.NewID()}
		v.Bricks = append(v.Bricks, b)
		v.Sets[0].InSync = append(v.Sets[0].InSync, b.ID)
		st := api.BrickStatus{Brick: brickOf(b), Online: true, Role: "backup", Epoch: 2}
		switch i {
		case 0:
			st.Role, st.Epoch = "waiting", 1
		case 1:
			st.Role = "primary"
		}
		all[b.Peer] = &api.LocalBricks{Bricks: []api.BrickStatus{st}}
	}
	for epoch, want := range map[cluster.Epoch][3]bool{1: {false, true, true}, 2: {true, true, true}} {
		v.Sets[0].Epoch = epoch
		for i, row := range new(member).statuses(v, all, nil) {
			if row.InSync != want[i] {
				t.Errorf("this machine knows of epoch %d: brick %d in sync %v (%s)", epoch, i, row.InSync, row.Problem)
			}
		}
	}
}
