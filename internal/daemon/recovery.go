package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"mortar/internal/api"
	"mortar/internal/cluster"
	"mortar/internal/control"
	"mortar/internal/control/state"
)

// What an operator may have done when machines are lost for good. Which loss is
// accepted is agreed to first, and then done only if it is still that loss; the
// decisions are package state's.

// VolumeRecovery implements httpd.Volumes.
func (n *Node) VolumeRecovery(ctx context.Context, name, brick string) (*api.VolumeRecovery, error) {
	m, v, err := n.started(ctx, name)
	if err != nil {
		return nil, err
	}
	_, rows, plans, err := m.volumePlans(ctx, v, brick)
	if err != nil {
		return nil, apiError(err)
	}
	r := &api.VolumeRecovery{Volume: v.Name, Sets: []api.SetRecovery{}}
	for _, p := range plans {
		r.Sets = append(r.Sets, setRecovery(v, rows, p))
	}
	return r, nil
}

// volumePlans looks at every brick of a volume, and plans the recovery of its sets
// that cannot go on. If there is none, the error says why not.
func (m *member) volumePlans(ctx context.Context, v *cluster.Volume, brick string) (*cluster.Map, []api.BrickStatus, []*state.Plan, error) {
	plane := m.plane.Load()
	if plane == nil {
		return nil, nil, nil, errStarting
	}
	if _, ok := plane.Leader(); !ok {
		return nil, nil, nil, api.Errorf(api.NoQuorum, "the pool itself has no quorum and can decide nothing, not even this: see \"mortar peer status\", and if its voting peers are lost for good, recover it first with \"mortar peer recover\"")
	}
	known := m.latest()
	if now := known.VolumeByID(v.ID); now != nil {
		v = now
	}
	var chosen *cluster.Brick
	if brick != "" {
		i := slices.IndexFunc(v.Bricks, func(b cluster.Brick) bool { return b.String() == brick })
		if i < 0 {
			return nil, nil, nil, api.Errorf(api.NotFound, "No brick %s in volume %s", brick, v.Name)
		}
		chosen = &v.Bricks[i]
	}
	all, fails := m.gather(ctx, v, false)
	rows := m.statuses(v, all, fails)
	var (
		plans    []*state.Plan
		refusals []string
	)
	for i := range v.Sets {
		r := state.Recovery{Config: v.Sets[i]}
		if chosen != nil {
			if !r.Config.IsMember(chosen.ID) {
				continue
			}
			r.Chosen = chosen.ID
		}
		for k := i * v.Replica; k < (i+1)*v.Replica; k++ {
			r.Bricks = append(r.Bricks, standing(v.Bricks[k].ID, &rows[k]))
		}
		p, refusal := r.Decide()
		if refusal != nil {
			refusals = append(refusals, fmt.Sprintf("set %d of %s: %s", i, v.Name, brickNames(v, refusal.Text)))
			continue
		}
		plans = append(plans, p)
	}
	if len(plans) == 0 {
		return nil, nil, nil, api.Errorf(api.Conflict, "%s", strings.Join(refusals, "; "))
	}
	return known, rows, plans, nil
}

// standing is a brick's row as the decision wants it.
func standing(id cluster.BrickID, row *api.BrickStatus) state.Standing {
	s := state.Standing{
		Brick: id, Answers: row.Online, Whole: row.Whole, Leads: row.Role == "primary",
		Tail: cluster.Pos{Epoch: cluster.Epoch(row.Epoch), Seq: row.Tail},
	}
	if row.Changed != nil {
		s.Time = row.Changed.UnixNano()
	}
	return s
}

// brickNames puts the names of a volume's bricks in place of their ids.
func brickNames(v *cluster.Volume, text string) string {
	for _, b := range v.Bricks {
		text = strings.ReplaceAll(text, b.ID.String(), b.String())
	}
	return text
}

// setRecovery is a plan for people.
func setRecovery(v *cluster.Volume, rows []api.BrickStatus, p *state.Plan) api.SetRecovery {
	index := int(p.Next.Set.Index)
	s := api.SetRecovery{
		Set: index, Epoch: uint64(p.Next.Epoch - 1), Brick: v.Brick(p.Next.Primary).String(),
		Kept: p.Next.Floor.String(), Known: v.Sets[index].Floor.String(), Missing: p.Missing,
		InSync: len(p.Next.InSync), MinInSync: p.Next.MinInSync, Lost: []api.LostBrick{},
	}
	if p.Time != 0 {
		at := time.Unix(0, p.Time)
		s.Changed = &at
	}
	for _, l := range p.Lost {
		name := v.Brick(l.Brick).String()
		row := rows[slices.IndexFunc(rows, func(r api.BrickStatus) bool { return r.ID == l.Brick.String() })]
		s.Lost = append(s.Lost, api.LostBrick{Brick: name, InSync: l.InSync, Online: l.Answers, Ahead: l.Ahead, Problem: row.Problem})
	}
	return s
}

// RecoverVolume implements httpd.Volumes.
func (n *Node) RecoverVolume(ctx context.Context, name string, r api.VolumeRecover) error {
	m, v, err := n.started(ctx, name)
	if err != nil {
		return err
	}
	known, rows, plans, err := m.volumePlans(ctx, v, r.Brick)
	if err != nil {
		return apiError(err)
	}
	v = known.VolumeByID(v.ID)
	var agreed []api.AgreedSet
	for _, p := range plans {
		s := setRecovery(v, rows, p)
		agreed = append(agreed, api.AgreedSet{Set: s.Set, Epoch: s.Epoch, Brick: s.Brick, Kept: s.Kept})
	}
	if !slices.Equal(agreed, r.Agreed) {
		return api.Errorf(api.Conflict, "the bricks of %s stand otherwise than when the loss was agreed to: look again", v.Name)
	}
	plane := m.plane.Load()
	if plane == nil {
		return errStarting
	}
	for _, p := range plans {
		ctx, cancel := context.WithTimeout(ctx, 2*decideTimeout)
		err := plane.ForcePrimary(ctx, p, time.Now().Unix())
		cancel()
		if err != nil {
			return apiError(err)
		}
		var lost []string
		for _, l := range p.Lost {
			lost = append(lost, brickNames(v, l.String()))
		}
		m.log.Warn("a replica set was recovered by hand and goes on with less than everything", "volume", v.Name, "set", p.Next.Set.Index,
			"epoch", p.Next.Epoch, "brick", v.Brick(p.Next.Primary).String(), "kept", p.Next.Floor, "known", v.Sets[p.Next.Set.Index].Floor,
			"missing_at_least", p.Missing, "lost", strings.Join(lost, ", "))
	}
	return nil
}

// recovered are the records of a volume's recoveries for people.
func recovered(known *cluster.Map, v *cluster.Volume) []api.VolumeRecovered {
	var all []api.VolumeRecovered
	for _, r := range v.Recoveries {
		a := api.VolumeRecovered{
			Set: int(r.Set), Epoch: uint64(r.Epoch), Time: time.Unix(r.At, 0), Peer: peerName(known, r.By),
			Brick: r.Brick.String(), Kept: r.Kept.String(), Known: r.Known.String(), Lost: []string{},
		}
		if b := v.Brick(r.Brick); b != nil {
			a.Brick = b.String()
		}
		for _, l := range r.Lost {
			a.Lost = append(a.Lost, brickNames(v, l.String()))
		}
		all = append(all, a)
	}
	return all
}

func peerName(known *cluster.Map, id cluster.PeerID) string {
	if p := known.Peer(id); p != nil {
		return p.Name
	}
	return id.String()
}

// leftBehind reports whether the machine serves nothing because its pool was
// recovered without it.
func (n *Node) leftBehind() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.fault != nil && errors.Is(n.fault, state.ErrRecovered)
}

// PoolRecovery implements httpd.Pool.
func (n *Node) PoolRecovery(ctx context.Context) (*api.PoolRecovery, error) {
	m := n.current()
	if m == nil {
		return nil, api.Errorf(api.Conflict, "this machine belongs to no pool, so there is nothing to recover")
	}
	if n.leftBehind() {
		return &api.PoolRecovery{Rejoin: true, Silent: []string{}, Version: m.view.Load().Version}, nil
	}
	plane := m.plane.Load()
	if plane == nil {
		return nil, errStarting
	}
	r := plane.PoolRecovery(ctx)
	silent, refusal := r.Decide()
	if refusal != nil {
		return nil, api.Errorf(api.Conflict, "%s", refusal.Text)
	}
	p := &api.PoolRecovery{Version: r.Map.Version, Generation: r.Generation, Silent: []string{}}
	for _, id := range silent {
		p.Silent = append(p.Silent, peerName(r.Map, id))
	}
	return p, nil
}

// RecoverPool implements httpd.Pool.
func (n *Node) RecoverPool(ctx context.Context, r api.PoolRecover) error {
	n.joining.Lock()
	defer n.joining.Unlock()
	p, err := n.PoolRecovery(ctx)
	if err != nil {
		return err
	}
	if p.Version != r.Version || p.Generation != r.Generation {
		return api.Errorf(api.Conflict, "the pool has changed since the loss was agreed to: look again")
	}
	old := n.current()
	id := old.keeper.Identity()
	old.end(errReplaced)
	<-old.ended
	dir := n.path(controlDir)
	if p.Rejoin {
		moved, err := control.Discard(dir)
		if err != nil {
			return apiError(err)
		}
		n.log.Warn("this machine takes over a fresh copy of its pool's configuration, which was recovered without it; its own is kept aside", "at", moved)
	} else {
		if err := control.Recover(dir, old.keeper.ID(), time.Now().Unix()); err != nil {
			// What was there still is: it goes on as before, which is with nothing.
			_, again := n.startMember(id)
			return apiError(errors.Join(err, again))
		}
		n.log.Warn("the pool was recovered by hand: this machine is its only voter now", "given_up", strings.Join(p.Silent, ", "), "map", p.Version)
	}
	n.setFault(nil)
	m, err := n.startMember(id)
	if err != nil {
		return apiError(err)
	}
	return apiError(m.ready(ctx, func(context.Context) error { return nil }))
}

// poolProblem says why the pool can decide nothing now, and what to do.
func poolProblem(known *cluster.Map, st control.Status, self cluster.PeerID, connected func(cluster.PeerID) bool) string {
	if !st.Leader.IsZero() || len(st.Voters) == 0 {
		return ""
	}
	var down []string
	for _, v := range st.Voters {
		if v != self && !connected(v) {
			down = append(down, peerName(known, v))
		}
	}
	slices.Sort(down)
	switch need := len(st.Voters)/2 + 1; {
	case len(down) == 0:
		return "" // they are about to elect one
	case len(st.Voters) == 1 && state.MayVote(known) == 2:
		return fmt.Sprintf("%s has the only vote of this pool of two and is not connected, so nothing can be changed, and volumes whose bricks there were in sync wait, until it is back. If it is lost for good, run \"mortar peer recover\" here. With a third machine (\"mortar server --witness\" needs no disk) either of the two may be lost", down[0])
	default:
		return fmt.Sprintf("the pool can decide nothing: %d of its %d voting peers are needed, and %s cannot be reached. Bring them back; if they are lost for good, run \"mortar peer recover\" on the machine that is to go on",
			need, len(st.Voters), strings.Join(down, ", "))
	}
}

// poolRecovered are the records of the pool's recoveries for people.
func poolRecovered(known *cluster.Map) []api.PoolRecovered {
	var all []api.PoolRecovered
	for _, r := range known.Recoveries {
		all = append(all, api.PoolRecovered{Generation: r.Generation, Time: time.Unix(r.At, 0), Peer: peerName(known, r.By)})
	}
	slices.SortFunc(all, func(a, b api.PoolRecovered) int { return cmp.Compare(a.Generation, b.Generation) })
	return all
}
