package daemon

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"mortar/internal/api"
	"mortar/internal/cluster"
	"mortar/internal/replica/core"
)

// gather asks every peer that has bricks of the volume about them. A peer that
// does not answer has an error in place of its bricks.
func (m *member) gather(ctx context.Context, v *cluster.Volume, detail bool) (map[cluster.PeerID]*api.LocalBricks, map[cluster.PeerID]error) {
	return askPeers(ctx, m, v, func(ctx context.Context, peer cluster.PeerID) (*api.LocalBricks, error) {
		r, err := at(ctx, m, peer,
			func() (*api.LocalBricks, error) { return m.n.LocalBricks(ctx, v.Name, detail) },
			func(c *api.Client) (*api.LocalBricks, error) { return c.LocalBricks(ctx, v.Name, detail) })
		if err != nil {
			return nil, fmt.Errorf("its peer does not answer: %w", err)
		}
		return r, nil
	})
}

// started finds a volume that must be started.
func (n *Node) started(ctx context.Context, name string) (*member, *cluster.Volume, error) {
	m, v, err := n.volumeFor(ctx, name)
	if err != nil {
		return nil, nil, err
	}
	if v.Status != cluster.VolumeStarted {
		return nil, nil, api.Errorf(api.VolumeStopped, "Volume %s is not started", v.Name)
	}
	return m, v, nil
}

// VolumeStatus implements httpd.Volumes.
func (n *Node) VolumeStatus(ctx context.Context, name string, detail bool) (*api.VolumeStatus, error) {
	m, v, err := n.started(ctx, name)
	if err != nil {
		return nil, err
	}
	known := m.latest()
	all, fails := m.gather(ctx, v, detail)
	st := &api.VolumeStatus{Name: v.Name, Bricks: m.statuses(v, all, fails)}
	st.Peers = append(st.Peers, api.ServiceRow{Host: "localhost", Online: true, PID: os.Getpid()})
	seen := map[cluster.PeerID]bool{m.keeper.ID(): true}
	for _, b := range v.Bricks {
		if seen[b.Peer] {
			continue
		}
		seen[b.Peer] = true
		row := api.ServiceRow{Host: b.Host}
		if p := known.Peer(b.Peer); p != nil {
			row.Host = p.Name
		}
		if a := all[b.Peer]; a != nil {
			row.Online, row.PID = true, a.PID
		}
		st.Peers = append(st.Peers, row)
	}
	waits := m.waits(ctx, v)
	for i := range v.Sets {
		c := &v.Sets[i]
		s := api.SetStatus{Index: i, Epoch: uint64(c.Epoch), InSync: len(c.InSync), Members: len(c.Members), MinInSync: c.MinInSync, Writable: c.Writable()}
		if b := v.Brick(c.Primary); b != nil {
			s.Primary = b.String()
		}
		s.Problem = m.setProblem(v, c, st.Bricks[i*v.Replica:(i+1)*v.Replica], waits[c.Set.Index])
		st.Sets = append(st.Sets, s)
	}
	return st, nil
}

// setProblem says why a set takes no changes now, or serves nothing at all, and
// what to do about it. waits is what the pool's leader knows of the reason.
func (m *member) setProblem(v *cluster.Volume, c *cluster.SetConfig, bricks []api.BrickStatus, waits string) string {
	var silent []string
	answers := 0 // in sync
	for _, b := range bricks {
		switch {
		case b.InSync && b.Online:
			answers++
		case b.InSync:
			silent = append(silent, b.Name)
		}
	}
	plane := m.plane.Load()
	led := true
	if plane != nil {
		_, led = plane.Leader()
	}
	lost := fmt.Sprintf("If they are lost for good, \"mortar volume recover %s\" shows what it would cost to go on without", v.Name)
	switch {
	case len(silent) > 0 && !led:
		voters := len(plane.Status().Voters)
		return fmt.Sprintf("the pool has no quorum (%d of its %d voting peers are needed), so the set cannot go on without %s: reads and writes wait until machines are back (\"mortar peer status\" says which)",
			voters/2+1, voters, strings.Join(silent, ", "))
	case c.Doubted && waits == "":
		return "the pool was recovered by hand: the set asks its bricks how far they are"
	case c.Doubted:
		return fmt.Sprintf("it has no primary: %s. %s", brickNames(v, waits), lost)
	case answers == 0:
		return fmt.Sprintf("none of its in-sync bricks (%s) answers: reads and writes wait until one is back. %s", strings.Join(silent, ", "), lost)
	case c.Primary.IsZero() && waits != "":
		return fmt.Sprintf("it has no primary: %s. %s", brickNames(v, waits), lost)
	case c.Primary.IsZero():
		return "it has no primary: it serves nothing until one of its in-sync bricks leads, which takes a moment"
	case !c.Writable():
		return fmt.Sprintf("it is read-only: %d of %d bricks are in sync, min-in-sync is %d. Bring the others back; if they are lost for good, \"mortar volume set %s min-in-sync %d\" lets it take changes",
			len(c.InSync), len(c.Members), c.MinInSync, v.Name, len(c.InSync))
	}
	return ""
}

// waits is what the pool's leader says of the sets that wait for a primary.
func (m *member) waits(ctx context.Context, v *cluster.Volume) map[cluster.SetIndex]string {
	if !slices.ContainsFunc(v.Sets, func(c cluster.SetConfig) bool { return c.Primary.IsZero() }) {
		return nil
	}
	plane := m.plane.Load()
	if plane == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	problems, err := plane.Problems(ctx)
	if err != nil {
		return nil // nobody leads: that is the reason, and is said
	}
	all := map[cluster.SetIndex]string{}
	for _, p := range problems {
		if p.Set.Volume == v.ID {
			all[p.Set.Index] = p.Reason
		}
	}
	return all
}

// statuses puts what the peers said of their bricks into the volume's order,
// and says of the others why nothing is known.
func (m *member) statuses(v *cluster.Volume, all map[cluster.PeerID]*api.LocalBricks, fails map[cluster.PeerID]error) []api.BrickStatus {
	var list []api.BrickStatus
	for i, b := range v.Bricks {
		config := &v.Sets[i/v.Replica]
		row := api.BrickStatus{Brick: brickOf(b), Role: "out"}
		if a := all[b.Peer]; a != nil {
			if k := slices.IndexFunc(a.Bricks, func(s api.BrickStatus) bool { return s.ID == row.ID }); k >= 0 {
				row = a.Bricks[k]
				row.Brick = brickOf(b)
			} else {
				row.Problem = "its peer does not serve it yet"
			}
		} else if err := fails[b.Peer]; err != nil {
			row.Problem = err.Error()
		}
		row.InSync, row.Drained = config.IsInSync(b.ID), config.IsDrained(b.ID)
		if row.Drained && !row.InSync {
			row.Problem = cmp.Or(row.Problem, "its peer is drained; \"mortar peer undrain "+b.Host+"\" has it take part again")
		}
		if row.Online && !row.InSync && row.Problem == "" {
			row.Problem = "it is not in sync; it is being brought up to date"
		}
		list = append(list, row)
	}
	for i := range list {
		set := list[i/v.Replica*v.Replica:][:v.Replica]
		newest := slices.MaxFunc(set, func(a, b api.BrickStatus) int { return cmp.Compare(a.Epoch, b.Epoch) }).Epoch
		// A peer that has just started may not have heard yet who is in sync now.
		if row := &list[i]; uint64(v.Sets[i/v.Replica].Epoch) < newest && row.Epoch < newest && row.InSync {
			row.InSync = false
			row.Problem = cmp.Or(row.Problem, "whether it is in sync is not known yet on this machine")
		}
	}
	return list
}

// LocalBricks implements httpd.Local.
func (n *Node) LocalBricks(ctx context.Context, name string, detail bool) (*api.LocalBricks, error) {
	m, err := n.need()
	if err != nil {
		return nil, err
	}
	all := &api.LocalBricks{PID: os.Getpid(), Bricks: []api.BrickStatus{}}
	for _, v := range m.latest().Volumes {
		if name != "" && v.Name != name {
			continue
		}
		for _, b := range v.Bricks {
			if b.Peer != m.keeper.ID() {
				continue
			}
			all.Bricks = append(all.Bricks, m.bricks.status(ctx, b, detail))
		}
	}
	return all, nil
}

// status describes one brick of this machine.
func (b *bricks) status(ctx context.Context, br cluster.Brick, detail bool) api.BrickStatus {
	st := api.BrickStatus{Brick: brickOf(br), Role: "out"}
	if detail {
		disk, err := diskStatus(br.Path)
		if err != nil {
			st.Problem = err.Error()
		}
		st.Disk = disk
	}
	run := b.run(br.ID)
	if run == nil {
		return st
	}
	run.mu.Lock()
	rep, served, problem := run.replica, run.brick, run.problem
	run.mu.Unlock()
	if rep == nil {
		st.Problem = cmp.Or(problem, "it is being opened")
		return st
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	s, err := rep.Status(ctx)
	if err != nil {
		st.Problem = err.Error()
		return st
	}
	st.Online, st.Port, st.PID = true, int(b.m.n.port), os.Getpid()
	st.Epoch, st.Tail, st.Commit, st.Whole = uint64(s.Tail.Epoch), s.Tail.Seq, s.Commit, s.Whole
	if s.Changed != 0 {
		at := time.Unix(0, s.Changed)
		st.Changed = &at
	}
	st.InSync = s.Config.IsInSync(br.ID)
	st.Role = roleText(s.Role, st.InSync)
	st.Scrub = run.scrubState(served)
	if s.Healing {
		st.Heal = healState(run.pace(s.Heal), s.Heal)
	}
	return st
}

func roleText(r core.Role, inSync bool) string {
	switch {
	case r == core.Primary:
		return "primary"
	case inSync:
		return "backup"
	}
	return "out"
}
