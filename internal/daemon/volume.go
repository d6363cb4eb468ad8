package daemon

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"mortar/internal/api"
	"mortar/internal/cluster"
	"mortar/internal/control/state"
	"mortar/internal/proto"
	"mortar/internal/replica"
	"mortar/internal/replica/core"
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

// peerAPI returns a client of another peer's REST API, over the connection's TLS.
func (m *member) peerAPI(id cluster.PeerID) *api.Client {
	return api.New("http://mortar", func(ctx context.Context) (net.Conn, error) {
		tc, _, err := dialAny(ctx, m.links.addrsOf(id), m.keeper.ClientTo(alpnHTTP, id))
		if err != nil {
			return nil, err
		}
		return tc, nil
	})
}

// at asks one peer, this one or another, as a peer.
func at[T any](ctx context.Context, m *member, id cluster.PeerID, here func() (T, error), there func(c *api.Client) (T, error)) (T, error) {
	if id == m.keeper.ID() {
		return here()
	}
	c := m.peerAPI(id)
	defer c.Close()
	return there(c)
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

func because(problem string) string {
	if problem == "" {
		return ""
	}
	return ": " + problem
}

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

// change has the pool decide a command about a volume. The command is made of the
// volume as this peer knows it. Where that is old, because another peer was asked to
// change the volume a moment ago, or somebody was faster, it is made again of
// what is true now: it is a mistake of this peer's and not of who asks.
func (n *Node) change(ctx context.Context, name string, command func(m *member, v *cluster.Volume) state.Command) (*member, *cluster.Volume, error) {
	ctx, cancel := context.WithTimeout(ctx, decideTimeout)
	defer cancel()
	for {
		known := n.known()
		v, err := state.FindVolume(known, name)
		if err != nil {
			known = n.knownNow(ctx)
			if v, err = state.FindVolume(known, name); err != nil {
				return nil, nil, apiError(err)
			}
		}
		m, err := n.need()
		if err != nil {
			return nil, nil, err
		}
		cmd := command(m, v)
		cmd.Seen = known.Version
		err = m.propose(ctx, cmd)
		if !errors.Is(err, state.ErrConflict) || ctx.Err() != nil {
			return m, v, apiError(err)
		}
		m.catchUp(ctx)
	}
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
		m.bricks.retryAll(v)
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

// askTimeout is how long another peer may take to tell of its bricks.
const askTimeout = 2 * time.Second

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

// askPeers asks every peer that has bricks of a volume once, all at the same time. One
// that cannot be asked has an error in place of an answer.
func askPeers[T any](ctx context.Context, m *member, v *cluster.Volume, ask func(context.Context, cluster.PeerID) (*T, error)) (map[cluster.PeerID]*T, map[cluster.PeerID]error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var (
		mu    sync.Mutex
		wg    sync.WaitGroup
		all   = map[cluster.PeerID]*T{}
		fails = map[cluster.PeerID]error{}
	)
	asked := map[cluster.PeerID]bool{}
	for _, b := range v.Bricks {
		if asked[b.Peer] {
			continue
		}
		asked[b.Peer] = true
		wg.Go(func() {
			up, _, problem := m.links.state(b.Peer)
			var r *T
			err := fmt.Errorf("its peer is not connected%s", because(problem))
			if up || b.Peer == m.keeper.ID() {
				r, err = ask(ctx, b.Peer)
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				fails[b.Peer] = err
				return
			}
			all[b.Peer] = r
		})
	}
	wg.Wait()
	return all, fails
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

// HealInfo implements httpd.Volumes.
func (n *Node) HealInfo(ctx context.Context, name string) (*api.HealInfo, error) {
	m, v, err := n.started(ctx, name)
	if err != nil {
		return nil, err
	}
	if v.Replica < 2 {
		return nil, api.Errorf(api.Invalid, "Volume %s is not of type replicate or disperse", v.Name)
	}
	all, fails := m.gather(ctx, v, false)
	rows := m.statuses(v, all, fails)
	info := &api.HealInfo{Volume: v.Name}
	for i, row := range rows {
		hb := api.HealBrick{Name: row.Name, Connected: row.Online, InSync: row.InSync, Heal: row.Heal, Problem: row.Problem, Entries: -1}
		// What a brick lacks is the distance to what its set has acknowledged,
		// which the primary knows.
		first := i / v.Replica * v.Replica
		for _, p := range rows[first : first+v.Replica] {
			if p.Role != "primary" || !row.Online {
				continue
			}
			hb.Entries = max(0, int64(p.Commit)-int64(row.Tail))
			if row.InSync && row.Heal == nil {
				hb.Entries = 0 // what is under way is not lacking
			} else if hb.Entries == 0 && !row.InSync && !row.Drained {
				hb.Entries = 1 // not yet trusted to have everything
			}
		}
		switch {
		case hb.Entries < 0:
			info.Pending = -1
		case info.Pending >= 0:
			info.Pending += hb.Entries
		}
		info.Bricks = append(info.Bricks, hb)
	}
	return info, nil
}

// Heal implements httpd.Volumes. Bricks heal by themselves; asking for it makes
// those that gave up try again at once. A full heal compares the replicas.
func (n *Node) Heal(ctx context.Context, name string, r api.HealRequest) (*api.HealReply, error) {
	m, v, err := n.started(ctx, name)
	if err != nil {
		return nil, err
	}
	if v.Replica < 2 {
		return nil, api.Errorf(api.Invalid, "Volume %s is not of type replicate or disperse", v.Name)
	}
	m.bricks.retryAll(v)
	reply := &api.HealReply{Same: true}
	if !r.Verify && !r.Full {
		return reply, nil
	}
	for i := range v.Sets {
		part, err := m.verify(ctx, v, i)
		if err != nil {
			return nil, apiError(err)
		}
		reply.Digests = append(reply.Digests, part.Digests...)
		reply.Same = reply.Same && part.Same
	}
	if !r.Verify && !reply.Same {
		return nil, api.Errorf(api.Conflict, "the replicas differ; \"volume heal %s full --verify\" shows where", v.Name)
	}
	return reply, nil
}

// verify has the primary of a set compare its bricks. Around a fail-over it
// takes a moment until everybody agrees who that is.
func (m *member) verify(ctx context.Context, v *cluster.Volume, set int) (*api.HealReply, error) {
	const patience = 5 * time.Second
	for began := time.Now(); ; {
		reply, err := m.verifyOnce(ctx, v, set)
		if err == nil || !api.IsCode(err, api.BrickDown) || time.Since(began) > patience {
			return reply, err
		}
		if v = m.later(ctx, v, 200*time.Millisecond); v == nil {
			return nil, err
		}
	}
}

// later is a volume as it is known after a while, as before if it is not any more; nil if
// ctx has ended.
func (m *member) later(ctx context.Context, v *cluster.Volume, after time.Duration) *cluster.Volume {
	if !pause(ctx, after) {
		return nil
	}
	if now := m.view.Load().VolumeByID(v.ID); now != nil {
		return now
	}
	return v
}

// pause waits between two attempts; false: ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (m *member) verifyOnce(ctx context.Context, v *cluster.Volume, set int) (*api.HealReply, error) {
	b := v.Brick(v.Sets[set].Primary)
	if b == nil {
		return nil, api.Errorf(api.BrickDown, "set %d of volume %s has no primary now", set, v.Name)
	}
	return at(ctx, m, b.Peer,
		func() (*api.HealReply, error) { return m.n.LocalVerify(ctx, v.Name) },
		func(c *api.Client) (*api.HealReply, error) { return c.LocalVerify(ctx, v.Name) })
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
		return api.Errorf(api.Invalid, "Host %s is a witness and holds no bricks", r.Host)
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

// LocalVerify implements httpd.Local.
func (n *Node) LocalVerify(ctx context.Context, name string) (*api.HealReply, error) {
	m, v, err := n.started(ctx, name)
	if err != nil {
		return nil, err
	}
	reply := &api.HealReply{Same: true}
	for i := range v.Sets {
		config := &v.Sets[i]
		b := v.Brick(config.Primary)
		if b == nil || b.Peer != m.keeper.ID() {
			return nil, api.Errorf(api.BrickDown, "another machine leads set %d of volume %s now", i, v.Name)
		}
		rep := m.bricks.replica(b.ID)
		if rep == nil {
			return nil, api.Errorf(api.BrickDown, "brick %s is not served now", b)
		}
		digests, err := rep.Verify(ctx)
		if err != nil {
			return nil, api.Errorf(api.BrickDown, "%w", err)
		}
		part := compare(v, config, digests)
		reply.Digests = append(reply.Digests, part.Digests...)
		reply.Same = reply.Same && part.Same
	}
	return reply, nil
}

// compare puts the digests of a set side by side.
func compare(v *cluster.Volume, config *cluster.SetConfig, digests map[cluster.BrickID]proto.DigestReply) *api.HealReply {
	reply := &api.HealReply{Same: true}
	want, known := digests[config.Primary]
	known = known && want.Status == proto.OK
	for _, id := range config.Members {
		d := api.BrickDigest{Brick: v.Brick(id).String()}
		switch r, ok := digests[id]; {
		case !ok:
			d.Problem = "not in sync"
			reply.Same = false
		case r.Status != proto.OK:
			d.Problem = r.Text
			reply.Same = false
		default:
			d.At, d.Sum, d.Inodes, d.Bytes = r.At.String(), hex.EncodeToString(r.Sum[:]), r.Inodes, r.Bytes
			reply.Same = reply.Same && known && r.Sum == want.Sum
		}
		reply.Digests = append(reply.Digests, d)
	}
	return reply
}

// pace is how fast a comparison goes.
type pace struct {
	began time.Time
	start uint64 // bytes done then
	at    time.Time
	bytes uint64
	rate  float64 // bytes per second
}

// pace notes how far a comparison has come and returns its rate.
func (r *brickRun) pace(p replica.HealProgress) pace {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	h := &r.healPace
	if h.began.IsZero() || p.BytesDone < h.bytes {
		*h = pace{began: now, start: p.BytesDone, at: now, bytes: p.BytesDone}
	}
	if dt := now.Sub(h.began).Seconds(); dt > 0 {
		h.rate = float64(p.BytesDone-h.start) / dt
	}
	h.at, h.bytes = now, p.BytesDone
	return *h
}

// healState is a comparison's progress for people.
func healState(at pace, p replica.HealProgress) *api.HealState {
	h := &api.HealState{Phase: "compare", Bytes: p.BytesDone, Rate: at.rate, ETASeconds: -1}
	done, total := p.KeysDone+p.FilesDone, p.KeysTotal+p.FilesTotal
	switch {
	case p.BytesTotal > 0:
		h.Percent = 100 * float64(p.BytesDone) / float64(p.BytesTotal)
		if at.rate > 0 {
			h.ETASeconds = float64(p.BytesTotal-min(p.BytesDone, p.BytesTotal)) / at.rate
		}
	case total > 0:
		h.Percent = 100 * float64(done) / float64(total)
	}
	h.Percent = min(h.Percent, 100)
	return h
}

// retryAll has the volume's bricks on this machine that are not served tried again.
func (b *bricks) retryAll(v *cluster.Volume) {
	for _, br := range v.Bricks {
		if run := b.run(br.ID); run != nil && run.current() == nil {
			run.again()
		}
	}
}
