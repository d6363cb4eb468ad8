package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"mortar/internal/api"
	"mortar/internal/cluster"
	"mortar/internal/control/state"
	"mortar/internal/pki"
)

// Pool implements httpd.Pool.
func (n *Node) Pool(ctx context.Context) (*api.Pool, error) {
	n.mu.Lock()
	m, fault, id := n.member, n.faultLocked(), n.identity.ID()
	n.mu.Unlock()
	if m == nil {
		return &api.Pool{Self: id.String(), Peers: []api.Peer{{
			ID: id.String(), Name: n.cfg.Name, Addrs: n.cfg.Advertise, Self: true, Connected: true,
			State: api.PeerInCluster, StateText: api.PeerInCluster.String(), Witness: n.cfg.Witness, Client: n.cfg.Client,
		}}}, nil
	}
	v := m.latest()
	p := &api.Pool{ID: m.pool.String(), Version: v.Version, Self: id.String(), Peers: []api.Peer{}, Recoveries: poolRecovered(v)}
	var voters []cluster.PeerID
	if plane := m.plane.Load(); plane != nil {
		st := plane.Status()
		voters = st.Voters
		if !st.Leader.IsZero() {
			p.Leader = st.Leader.String()
		}
		if fault == nil {
			p.Problem = poolProblem(v, st, id, func(peer cluster.PeerID) bool { up, _, _ := m.links.state(peer); return up })
		}
	}
	for _, peer := range v.Peers {
		ap := api.Peer{
			ID: peer.ID.String(), Name: peer.Name, Addrs: peer.Addrs, Self: peer.ID == id,
			State: api.PeerInCluster, Witness: peer.Witness, Client: peer.NoVote, Voter: slices.Contains(voters, peer.ID), Drained: peer.Drained,
		}
		if peer.Drained {
			ap.Holds = holds(v, peer.ID)
		}
		if ap.Self {
			ap.Connected = fault == nil
			if fault != nil {
				ap.State, ap.Problem = api.PeerRejected, fault.Error()
			}
		} else {
			ap.Connected, _, ap.Problem = m.links.state(peer.ID)
		}
		ap.StateText = ap.State.String()
		p.Peers = append(p.Peers, ap)
	}
	slices.SortFunc(p.Peers, func(a, b api.Peer) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return p, nil
}

// founded returns the membership, and makes a pool of this machine alone if it
// has none.
func (n *Node) founded(ctx context.Context) (*member, error) {
	n.joining.Lock()
	defer n.joining.Unlock()
	n.mu.Lock()
	m, fault, id := n.member, n.faultLocked(), n.identity
	n.mu.Unlock()
	if fault != nil {
		return nil, apiError(fault)
	}
	if m != nil {
		return m, nil
	}
	now := time.Now()
	pool := cluster.NewID()
	ca, err := pki.NewCA(pool, now)
	if err != nil {
		return nil, err
	}
	csr, err := id.CSR()
	if err != nil {
		return nil, err
	}
	cert, err := ca.Sign(csr, pki.Subject{Role: pki.RolePeer}, now)
	if err != nil {
		return nil, err
	}
	whole, err := id.With(cert, ca.Cert)
	if err != nil {
		return nil, err
	}
	if m, err = n.startMember(whole); err != nil {
		return nil, err
	}
	n.log.Info("a new pool begins with this machine", "pool", pool)
	err = m.ready(ctx, func(ctx context.Context) error {
		return m.plane.Load().Bootstrap(ctx, state.Init{
			Pool: pool, Authority: ca.PEM(),
			Peer: cluster.Peer{ID: id.ID(), Name: n.cfg.Name, Addrs: n.cfg.Advertise, Witness: n.cfg.Witness, NoVote: n.cfg.Client},
		})
	})
	if err == nil {
		err = whole.Save(n.path(identityFile))
	}
	if err != nil {
		m.end(errReplaced)
		<-m.ended
		return nil, errors.Join(err, n.leave(m))
	}
	return m, nil
}

// ready waits until the control plane of a membership that has just begun is
// open, has f done, and waits until this machine is in the map.
func (m *member) ready(ctx context.Context, f func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	stop := context.AfterFunc(m.ctx, cancel)
	defer stop()
	select {
	case <-m.opened:
	case <-ctx.Done():
		return cmp.Or(context.Cause(m.ctx), context.Cause(ctx))
	}
	if err := f(ctx); err != nil {
		return err
	}
	select {
	case <-m.mapped:
		return nil
	case <-ctx.Done():
		return cmp.Or(context.Cause(m.ctx), context.Cause(ctx))
	}
}

// latest is the newest map that this peer has applied.
func (m *member) latest() *cluster.Map {
	if plane := m.plane.Load(); plane != nil {
		if next := plane.Map(); !next.Pool.IsZero() {
			return next
		}
	}
	return m.view.Load().Map
}

// catchUp brings what this peer knows of the pool up to date, so that it answers
// as a peer that was asked a moment ago. Without a leader, what it knows must do.
func (m *member) catchUp(ctx context.Context) {
	plane := m.plane.Load()
	if plane == nil {
		return
	}
	if _, led := plane.Leader(); !led {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, catchUpTimeout)
	defer cancel()
	if err := plane.CatchUp(ctx); err != nil {
		m.log.Debug("what this peer knows of the pool may be old", "error", err)
	}
}

// catchUpTimeout bounds catchUp: a question that a peer can answer itself is not held up for long.
const catchUpTimeout = time.Second

// decide has the pool decide a command, which is made of the pool as this peer
// knows it. Where that is old, because another peer was asked for a change a moment
// ago, or somebody was faster, it is made again of what is true now: it is a mistake
// of this peer's and not of who asks.
func (n *Node) decide(ctx context.Context, command func(known *cluster.Map) (state.Command, error)) (*member, error) {
	ctx, cancel := context.WithTimeout(ctx, decideTimeout)
	defer cancel()
	for {
		known := n.known()
		cmd, err := command(known)
		if err != nil {
			known = n.knownNow(ctx)
			if cmd, err = command(known); err != nil {
				return nil, apiError(err)
			}
		}
		m, err := n.need()
		if err != nil {
			return nil, err
		}
		cmd.Seen = known.Version
		err = m.propose(ctx, cmd)
		if !errors.Is(err, state.ErrConflict) || ctx.Err() != nil {
			return m, apiError(err)
		}
		m.catchUp(ctx)
	}
}

// Invite implements httpd.Pool.
func (n *Node) Invite(ctx context.Context, r api.InviteRequest) (*api.Invitation, error) {
	const most = 30 * 24 * time.Hour
	if r.TTL == 0 {
		r.TTL = int(time.Hour / time.Second)
	}
	if r.Uses == 0 {
		r.Uses = 1
	}
	if r.TTL < 1 || time.Duration(r.TTL)*time.Second > most {
		return nil, api.Errorf(api.Invalid, "a token works for 1 second to %d days, not for %d seconds", most/(24*time.Hour), r.TTL)
	}
	if r.Uses < 1 || r.Uses > 1000 {
		return nil, api.Errorf(api.Invalid, "a token is for 1 to 1000 machines, not for %d", r.Uses)
	}
	m, err := n.founded(ctx)
	if err != nil {
		return nil, apiError(err)
	}
	ttl := time.Duration(r.TTL) * time.Second
	token, err := m.newToken(ctx, ttl, r.Uses)
	if err != nil {
		return nil, apiError(err)
	}
	hosts := n.hosts(m)
	return &api.Invitation{
		Token: token.String(), Hosts: hosts, Expires: time.Now().Add(ttl).Truncate(time.Second), Uses: r.Uses,
		Command: "mortar join " + token.String() + " " + cmp.Or(strings.Join(hosts, ","), "HOST"),
	}, nil
}

// newToken makes a token and registers it with the pool.
func (m *member) newToken(ctx context.Context, ttl time.Duration, uses int) (pki.JoinToken, error) {
	token := pki.NewJoinToken(m.keeper.Identity().CA)
	now := time.Now()
	return token, m.propose(ctx, state.Command{AddToken: &state.AddToken{
		Token: state.Token{Hash: token.Hash(), Role: string(pki.RolePeer), Expires: now.Add(ttl).Unix(), Uses: uses, By: m.keeper.ID()},
		Now:   now.Unix(),
	}})
}

// hosts are addresses under which another machine may reach this one, best
// first: those that an administrator gave, those that have worked, and those of the
// network interface that leads to the outside.
func (n *Node) hosts(m *member) []string {
	var hosts []string
	add := func(addr string) {
		if h, p, err := net.SplitHostPort(addr); err == nil && p == strconv.Itoa(api.DefaultPort) && net.ParseIP(h).To4() != nil {
			addr = h
		}
		if !slices.Contains(hosts, addr) {
			hosts = append(hosts, addr)
		}
	}
	for _, a := range n.cfg.Advertise {
		add(a)
	}
	if p := m.view.Load().Peer(m.keeper.ID()); p != nil {
		for _, a := range p.Addrs {
			add(a)
		}
	}
	if len(hosts) > 0 {
		return hosts
	}
	host, _, err := net.SplitHostPort(n.tcp.Addr().String())
	if ip := net.ParseIP(host); err == nil && ip != nil && !ip.IsUnspecified() {
		add(n.tcp.Addr().String())
		return hosts
	}
	ips := outside()
	if len(ips) == 0 {
		ips = inside4()
	}
	for _, ip := range ips {
		add(net.JoinHostPort(ip, strconv.Itoa(int(n.port))))
	}
	return hosts
}

// inside4 are this machine's IPv4 addresses, less those that only its own
// containers and virtual machines can reach.
func inside4() []string {
	all, err := net.Interfaces()
	if err != nil {
		return nil
	}
	var ips []string
	for _, i := range all {
		internal := slices.ContainsFunc([]string{"docker", "br-", "veth", "virbr", "cni", "flannel"}, func(p string) bool { return strings.HasPrefix(i.Name, p) })
		if i.Flags&net.FlagUp == 0 || i.Flags&net.FlagLoopback != 0 || internal {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && n.IP.IsGlobalUnicast() {
				ips = append(ips, n.IP.String())
			}
		}
	}
	return ips[:min(len(ips), maxAddrs)]
}

// outside are this machine's addresses on the way to other networks. Nothing is sent.
func outside() []string {
	var ips []string
	for _, probe := range []string{"192.0.2.1:9", "[2001:db8::1]:9"} { // RFC 5737, RFC 3849: nobody's
		c, err := net.Dial("udp", probe)
		if err != nil {
			continue
		}
		if host, _, err := net.SplitHostPort(c.LocalAddr().String()); err == nil && !net.ParseIP(host).IsLoopback() {
			ips = append(ips, host)
		}
		c.Close()
	}
	return ips
}

// isSelf reports whether addr, host:port, is where this very node listens.
func (n *Node) isSelf(ctx context.Context, addr string) bool {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || port != strconv.Itoa(int(n.port)) {
		return false
	}
	if h, err := os.Hostname(); err == nil && h == host {
		return true
	}
	ips, err := net.DefaultResolver.LookupHost(ctx, host)
	if err != nil {
		return false
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, a := range own {
		if ipn, ok := a.(*net.IPNet); ok && slices.Contains(ips, ipn.IP.String()) {
			return true
		}
	}
	return false
}

// Detach implements httpd.Pool.
func (n *Node) Detach(ctx context.Context, host string, force bool) error {
	m, err := n.need()
	if err != nil {
		if api.IsCode(err, api.Conflict) {
			return api.Errorf(api.NotFound, "%s is not part of cluster", host)
		}
		return err
	}
	_, err = n.decide(ctx, func(known *cluster.Map) (cmd state.Command, err error) {
		p, err := n.findPeer(ctx, known, host)
		if err != nil {
			return cmd, err
		}
		if p.ID == m.keeper.ID() {
			return cmd, api.Errorf(api.Conflict, "%s is localhost", host)
		}
		if up, _, _ := m.links.state(p.ID); !up && !force {
			return cmd, api.Errorf(api.NodeDown, "Peer %s is down, and would not hear that it is detached. Use force to detach it all the same; if it comes back it is refused", host)
		}
		return state.Command{RemovePeer: &state.RemovePeer{Peer: p.ID}}, nil
	})
	return err
}

// drainWait is how long a drain is waited for.
const drainWait = 10 * time.Second

// Drain implements httpd.Pool.
func (n *Node) Drain(ctx context.Context, host string) (*api.DrainReply, error) {
	m, p, err := n.drain(ctx, host, false)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, drainWait)
	defer cancel()
	for {
		v := m.latest()
		r := &api.DrainReply{Peer: p.Name, Holds: holds(v, p.ID)}
		if len(r.Holds) == 0 {
			return r, nil
		}
		select {
		case <-m.plane.Load().Watch(v.Version):
		case <-ctx.Done():
			return r, nil
		case <-m.ctx.Done():
			return r, nil
		}
	}
}

// Undrain implements httpd.Pool.
func (n *Node) Undrain(ctx context.Context, host string) error {
	_, _, err := n.drain(ctx, host, true)
	return err
}

func (n *Node) drain(ctx context.Context, host string, undo bool) (m *member, p *cluster.Peer, err error) {
	if m, err = n.need(); err != nil {
		if api.IsCode(err, api.Conflict) {
			return nil, nil, api.Errorf(api.NotFound, "%s is not part of cluster", host)
		}
		return nil, nil, err
	}
	m, err = n.decide(ctx, func(known *cluster.Map) (cmd state.Command, err error) {
		if p, err = n.findPeer(ctx, known, host); err != nil {
			return cmd, err
		}
		return state.Command{DrainPeer: &state.DrainPeer{Peer: p.ID, Undo: undo}}, nil
	})
	return m, p, err
}

// holds says which bricks of a drained peer are still in sync, and why.
func holds(v *cluster.Map, peer cluster.PeerID) []string {
	all := []string{}
	for _, vol := range v.Volumes {
		for i := range vol.Sets {
			c := &vol.Sets[i]
			for _, id := range c.InSync {
				b := vol.Brick(id)
				switch {
				case b == nil || b.Peer != peer:
				case vol.Status != cluster.VolumeStarted:
					all = append(all, fmt.Sprintf("volume %s is stopped: %s leaves when it is started", vol.Name, b))
				case c.Spares() <= 0:
					all = append(all, fmt.Sprintf("volume %s: %s stays until another brick is in sync: without it %d would be, and min-in-sync is %d", vol.Name, b, len(c.InSync)-1, c.MinInSync))
				default:
					all = append(all, fmt.Sprintf("volume %s: %s has not handed over yet", vol.Name, b))
				}
			}
		}
	}
	return all
}

// Leave implements httpd.Pool.
func (n *Node) Leave(ctx context.Context) error {
	n.joining.Lock()
	defer n.joining.Unlock()
	m := n.current()
	if m == nil {
		return api.Errorf(api.Conflict, "this machine belongs to no pool")
	}
	known := m.latest()
	if len(known.Peers) > 1 {
		err := m.propose(ctx, state.Command{RemovePeer: &state.RemovePeer{Peer: m.keeper.ID()}})
		var refusal *state.Error
		if err != nil && !(errors.As(err, &refusal) && (refusal.Code == state.CodeDetached || refusal.Code == state.CodeNoPeer)) {
			return apiError(err)
		}
		// The others may need its vote until they have arranged themselves without it.
		m.unneeded(ctx)
	} else if len(known.Volumes) > 0 {
		return api.Errorf(api.Conflict, "this machine is the only one of its pool, which has %d volume(s): delete them first", len(known.Volumes))
	}
	m.end(errReplaced)
	<-m.ended
	return apiError(n.leave(m))
}

// unneeded waits until the consensus group does without this machine, which was
// taken out of the pool, or for so long that the others cannot be in order.
func (m *member) unneeded(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*decideTimeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for plane := m.plane.Load(); plane != nil && plane.Member(m.keeper.ID()); {
		select {
		case <-tick.C:
		case <-m.ctx.Done():
			return
		case <-ctx.Done():
			m.log.Warn("this machine leaves its pool, which still counts on its vote: its voters are not all there")
			return
		}
	}
}

// findPeer finds the peer that an administrator means: by name, id or address,
// or by a name that resolves to one of its addresses.
func (n *Node) findPeer(ctx context.Context, known *cluster.Map, host string) (*cluster.Peer, error) {
	p, err := state.FindPeer(known, host)
	if err == nil || net.ParseIP(host) != nil {
		return p, err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	ips, rerr := net.DefaultResolver.LookupHost(ctx, host)
	if rerr != nil {
		return nil, err
	}
	for _, ip := range ips {
		if net.ParseIP(ip).IsLoopback() {
			continue // says nothing about who it is
		}
		if p, err := state.FindPeer(known, ip); err == nil {
			return p, nil
		}
	}
	return nil, err
}
