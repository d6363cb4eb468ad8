package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"mortar/internal/api"
	"mortar/internal/cluster"
	"mortar/internal/control/state"
)

// known is the map of the pool, an empty one if there is none.
func (n *Node) known() *cluster.Map {
	if m := n.current(); m != nil {
		return m.latest()
	}
	return new(cluster.Map)
}

// knownNow is known, with all that was decided until now.
func (n *Node) knownNow(ctx context.Context) *cluster.Map {
	if m := n.current(); m != nil {
		m.catchUp(ctx)
	}
	return n.known()
}

// Volumes implements httpd.Volumes.
func (n *Node) Volumes(ctx context.Context) ([]api.Volume, error) {
	vs := []api.Volume{}
	known := n.knownNow(ctx)
	for _, v := range known.Volumes {
		vs = append(vs, *volumeOf(known, v))
	}
	slices.SortFunc(vs, func(a, b api.Volume) int { return cmp.Compare(a.Name, b.Name) })
	return vs, nil
}

// Volume implements httpd.Volumes.
func (n *Node) Volume(ctx context.Context, name string) (*api.Volume, error) {
	known := n.knownNow(ctx)
	v, err := state.FindVolume(known, name)
	if err != nil {
		return nil, apiError(err)
	}
	return volumeOf(known, v), nil
}

func volumeOf(known *cluster.Map, v *cluster.Volume) *api.Volume {
	av := &api.Volume{
		ID: v.ID.String(), Name: v.Name, Type: v.Type(), Status: int(v.Status), StatusText: v.Status.String(),
		Replica: v.Replica, Sets: len(v.Sets), Bricks: []api.Brick{}, Options: []api.Option{}, Recoveries: recovered(known, v),
	}
	for _, b := range v.Bricks {
		av.Bricks = append(av.Bricks, brickOf(b))
	}
	for k, val := range v.Options {
		av.Options = append(av.Options, api.Option{Key: k, Value: val})
	}
	slices.SortFunc(av.Options, func(a, b api.Option) int { return cmp.Compare(a.Key, b.Key) })
	return av
}

func brickOf(b cluster.Brick) api.Brick {
	return api.Brick{ID: b.ID.String(), Name: b.String(), Peer: b.Peer.String()}
}

// CreateVolume implements httpd.Volumes.
func (n *Node) CreateVolume(ctx context.Context, r api.VolumeCreate) (*api.Volume, error) {
	m, err := n.founded(ctx)
	if err != nil {
		return nil, apiError(err)
	}
	known := m.latest()
	cmd := state.CreateVolume{ID: cluster.NewID(), Name: r.Name, Replica: max(r.Replica, 1), Force: r.Force}
	for _, name := range r.Bricks {
		host, path, err := brickName(name)
		if err != nil {
			return nil, err
		}
		if ip := net.ParseIP(host); host == "localhost" || ip != nil && (ip.IsLoopback() || ip.IsUnspecified()) {
			return nil, api.Errorf(api.Invalid, "Please provide a valid hostname/ip other than localhost, 127.0.0.1 or loopback address (0.0.0.0 to 0.255.255.255).")
		}
		p, err := n.findPeer(ctx, known, host)
		if err != nil && n.isSelf(ctx, n.atPort(host)) {
			p, err = known.Peer(m.keeper.ID()), nil
		}
		if err != nil || p == nil {
			return nil, api.Errorf(api.NodeDown, "Host %s is not in 'Peer in Cluster' state", host)
		}
		if up, _, problem := m.links.state(p.ID); p.ID != m.keeper.ID() && !up {
			return nil, api.Errorf(api.NodeDown, "Host %s not connected%s", host, because(problem))
		}
		cmd.Bricks = append(cmd.Bricks, cluster.Brick{ID: cluster.NewID(), Peer: p.ID, Host: host, Path: path})
	}
	if err := state.CheckCreate(known, &cmd); err != nil {
		return nil, apiError(err)
	}
	// Every brick is looked at before the first is made.
	for _, dry := range []bool{true, false} {
		for i, b := range cmd.Bricks {
			err := m.prepare(ctx, &cmd, i, api.BrickPrepare{Force: r.Force, DryRun: dry})
			if err == nil {
				continue
			}
			if !dry {
				m.discard(&cmd, i)
			}
			if errors.Is(err, api.ErrConnect) {
				return nil, api.Errorf(api.NodeDown, "Host %s not connected: %w", b.Host, err)
			}
			return nil, apiError(err)
		}
	}
	if err := m.propose(ctx, state.Command{CreateVolume: &cmd}); err != nil {
		var refusal *state.Error
		if errors.As(err, &refusal) && refusal.Code != state.CodeNoLeader {
			m.discard(&cmd, len(cmd.Bricks)) // else it may yet be decided
		}
		return nil, apiError(err)
	}
	return n.Volume(ctx, r.Name)
}

// atPort is host with the port on which this node listens.
func (n *Node) atPort(host string) string { return net.JoinHostPort(host, fmt.Sprint(n.port)) }

// prepare has the peer of the i-th brick check or make its directory.
func (m *member) prepare(ctx context.Context, cmd *state.CreateVolume, i int, r api.BrickPrepare) error {
	b := cmd.Bricks[i]
	r.Pool, r.Volume, r.Set = m.pool.String(), cmd.ID.String(), i/cmd.Replica
	r.Brick, r.Host, r.Path = b.ID.String(), b.Host, b.Path
	_, err := at(ctx, m, b.Peer,
		func() (struct{}, error) { return struct{}{}, m.n.PrepareBrick(ctx, r) },
		func(c *api.Client) (struct{}, error) { return struct{}{}, c.PrepareBrick(ctx, r) })
	return err
}

// discard takes back the first count bricks of a volume that is not to be.
func (m *member) discard(cmd *state.CreateVolume, count int) {
	ctx, cancel := context.WithTimeout(m.base, 5*time.Second)
	defer cancel()
	for i := range cmd.Bricks[:count] {
		if err := m.prepare(ctx, cmd, i, api.BrickPrepare{Discard: true}); err != nil {
			m.log.Warn("the directory of a brick that was not needed remains", "brick", cmd.Bricks[i].String(), "error", err)
		}
	}
}

// volumeFor finds a volume, as of now.
func (n *Node) volumeFor(ctx context.Context, name string) (*member, *cluster.Volume, error) {
	v, err := state.FindVolume(n.knownNow(ctx), name)
	if err != nil {
		return nil, nil, apiError(err)
	}
	m, err := n.need()
	return m, v, err
}

// change has the pool decide a command about a volume; see decide.
func (n *Node) change(ctx context.Context, name string, command func(m *member, v *cluster.Volume) state.Command) (m *member, v *cluster.Volume, err error) {
	m, err = n.decide(ctx, func(known *cluster.Map) (cmd state.Command, err error) {
		if v, err = state.FindVolume(known, name); err != nil {
			return cmd, err
		}
		m, err := n.need()
		if err != nil {
			return cmd, err
		}
		return command(m, v), nil
	})
	return m, v, err
}

// DeleteVolume implements httpd.Volumes.
func (n *Node) DeleteVolume(ctx context.Context, name string) error {
	_, _, err := n.change(ctx, name, func(_ *member, v *cluster.Volume) state.Command {
		return state.Command{DeleteVolume: &state.DeleteVolume{Volume: v.ID}}
	})
	return err
}

// StartVolume implements httpd.Volumes. It returns when every set has a primary
// that serves, or says which has none.
func (n *Node) StartVolume(ctx context.Context, name string, force bool) error {
	m, v, err := n.change(ctx, name, func(m *member, v *cluster.Volume) state.Command {
		cmd := &state.StartVolume{Volume: v.ID, Force: force}
		for i := range v.Sets {
			cmd.Primary = append(cmd.Primary, m.firstReachable(v, i))
		}
		if v.Status == cluster.VolumeStarted {
			cmd.Primary = nil
		}
		return state.Command{StartVolume: cmd}
	})
	if err != nil {
		return err
	}
	if force {
		m.retry(ctx, v)
	}
	m.awaitServed(ctx, v.Name)
	return nil
}

// awaitServed waits a while for the bricks of a volume that was just started: a
// mount that comes next shall find them. One that does not come up shows in the status.
func (m *member) awaitServed(ctx context.Context, name string) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		v := m.latest().Volume(name)
		if v == nil || v.Status != cluster.VolumeStarted {
			return
		}
		all, fails := m.gather(ctx, v, false)
		waiting := false
		for _, row := range m.statuses(v, all, fails) {
			peer, _ := cluster.ParseID(row.Peer)
			waiting = waiting || !row.Online && fails[peer] == nil
		}
		if !waiting {
			return
		}
		if !pause(ctx, 50*time.Millisecond) {
			return
		}
	}
}

// firstReachable is the first brick of a set whose peer is connected; the first
// of all if none is.
func (m *member) firstReachable(v *cluster.Volume, set int) cluster.BrickID {
	members := v.Bricks[set*v.Replica : (set+1)*v.Replica]
	for _, b := range members {
		if up, _, _ := m.links.state(b.Peer); up || b.Peer == m.keeper.ID() {
			return b.ID
		}
	}
	return members[0].ID
}

// StopVolume implements httpd.Volumes.
func (n *Node) StopVolume(ctx context.Context, name string, force bool) error {
	_, _, err := n.change(ctx, name, func(_ *member, v *cluster.Volume) state.Command {
		return state.Command{StopVolume: &state.StopVolume{Volume: v.ID, Force: force}}
	})
	return err
}

// Options implements httpd.Volumes.
func (n *Node) Options(ctx context.Context, name string) ([]api.Option, error) {
	v, err := state.FindVolume(n.knownNow(ctx), name)
	if err != nil {
		return nil, apiError(err)
	}
	all := []api.Option{}
	for _, o := range cluster.Options() {
		value, isDefault := v.Option(o.Name)
		all = append(all, api.Option{Key: o.Name, Value: value, Default: isDefault})
	}
	return all, nil
}

// SetOptions implements httpd.Volumes.
func (n *Node) SetOptions(ctx context.Context, name string, options []api.Option) (*api.OptionsReply, error) {
	wanted := map[string]string{}
	reply := new(api.OptionsReply)
	for _, o := range options {
		if _, twice := wanted[o.Key]; twice {
			return nil, api.Errorf(api.Invalid, "option %s is given twice", o.Key)
		}
		wanted[o.Key] = o.Value
		if d, err := cluster.FindOption(o.Key); err == nil && d.Ignored != "" {
			reply.Notes = append(reply.Notes, fmt.Sprintf("%s is accepted and has no effect: %s", o.Key, d.Ignored))
		}
	}
	_, _, err := n.change(ctx, name, func(_ *member, v *cluster.Volume) state.Command {
		return state.Command{SetOptions: &state.SetOptions{Volume: v.ID, Options: wanted}}
	})
	return reply, err
}

// ResetOptions implements httpd.Volumes.
func (n *Node) ResetOptions(ctx context.Context, name string, keys []string) error {
	_, _, err := n.change(ctx, name, func(_ *member, v *cluster.Volume) state.Command {
		return state.Command{ResetOptions: &state.ResetOptions{Volume: v.ID, Names: keys}}
	})
	return err
}

// OptionHelp implements httpd.Volumes.
func (n *Node) OptionHelp() []api.OptionHelp {
	var help []api.OptionHelp
	for _, o := range cluster.Options() {
		d := o.Description
		if o.Ignored != "" {
			d = "Accepted and without effect: " + o.Ignored + "."
		}
		help = append(help, api.OptionHelp{Key: o.Name, Default: o.Default, Description: d})
	}
	return help
}

// --- what peers ask

// PrepareBrick implements httpd.Local.
func (n *Node) PrepareBrick(_ context.Context, r api.BrickPrepare) error {
	m, err := n.need()
	if err != nil {
		return err
	}
	id, err := brickIdentity(r)
	if err != nil {
		return api.Errorf(api.Invalid, "%w", err)
	}
	if id.Pool != m.pool {
		return api.Errorf(api.Conflict, "this machine belongs to another pool")
	}
	p := place{host: r.Host, path: filepath.Clean(r.Path), force: r.Force, state: n.cfg.StateDir}
	switch {
	case r.Discard:
		return discardBrick(p.path, id)
	case n.cfg.Witness:
		self := cluster.Peer{Witness: true, NoVote: n.cfg.Client}
		return api.Errorf(api.Invalid, "Host %s is a %s and holds no bricks", r.Host, self.Role())
	}
	if err := p.check(); err != nil || r.DryRun {
		return err
	}
	made, err := p.make()
	if err != nil {
		return err
	}
	if err := formatBrick(p.path, id); err != nil {
		if made != "" {
			removeEmpty(p.path, made)
		}
		return api.Errorf(api.Invalid, "Failed to create brick directory for brick %s:%s. Reason : %w ", p.host, p.path, err)
	}
	return nil
}

// removeEmpty removes the directories from path up to top that are empty.
func removeEmpty(path, top string) {
	for inside(path, top) && os.Remove(path) == nil {
		path = filepath.Dir(path)
	}
}
