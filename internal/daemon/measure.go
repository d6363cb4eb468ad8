package daemon

import (
	"context"

	"mortar/internal/metrics"
)

// measure is what the node shows to Prometheus.
func (n *Node) measure(ctx context.Context) metrics.Snapshot {
	s := metrics.Snapshot{Version: version()}
	m := n.current()
	if m == nil {
		return s
	}
	if plane := m.plane.Load(); plane != nil {
		id, ok := plane.Leader()
		s.Quorum, s.Leader = ok, ok && id == m.keeper.ID()
	}
	known := m.latest()
	for _, p := range known.Peers {
		if p.ID != m.keeper.ID() {
			up, _, _ := m.links.state(p.ID)
			s.Peers = append(s.Peers, metrics.Peer{Name: p.Name, Connected: up})
		}
	}
	for _, v := range known.Volumes {
		for _, b := range v.Bricks {
			if b.Peer != m.keeper.ID() {
				continue
			}
			st := m.bricks.status(ctx, b, true)
			mb := metrics.Brick{
				Volume: v.Name, Brick: b.String(), Online: st.Online, Primary: st.Role == "primary",
				InSync: st.InSync, Epoch: st.Epoch, Tail: st.Tail, Commit: st.Commit,
			}
			if st.Disk != nil {
				mb.Free, mb.Total = st.Disk.Free, st.Disk.Total
			}
			s.Bricks = append(s.Bricks, mb)
		}
	}
	m.mounts.mu.Lock()
	s.Mounts = len(m.mounts.all)
	m.mounts.mu.Unlock()
	return s
}
