package daemon

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"mortar/internal/api"
	"mortar/internal/cluster"
	"mortar/internal/control/state"
	"mortar/internal/httpd"
	"mortar/internal/pki"
	"mortar/internal/proto"
)

// How machines come into a pool.
//
// "join TOKEN HOST" on the new machine: it connects to HOST, which it knows by
// the digest of the pool's CA in the token, and asks to be enrolled. The peer there looks
// whether the token is good, connects back to the new machine at the address that
// it came from, and only if that works takes it into the map and signs its key.
//
// "peer probe HOST" on a peer: it connects to the new machine, which must have
// been started to accept that, and hands it a token made for the purpose; the new machine
// then joins as above. So whichever way, each side has reached the other before
// anything is changed.

// Join implements httpd.Pool.
func (n *Node) Join(ctx context.Context, r api.JoinRequest) (*api.JoinReply, error) {
	name := r.Name
	if name == "" {
		name = n.cfg.Name
	}
	if err := checkName(name); err != nil {
		return nil, api.Errorf(api.Invalid, "the name %q: %w", name, err)
	}
	reply, err := n.join(ctx, r.Token, r.Hosts, name)
	return reply, apiError(err)
}

// Invited implements httpd.Pool.
func (n *Node) Invited(ctx context.Context, conn httpd.Ends, r api.InvitedRequest) (*api.JoinReply, error) {
	if !n.cfg.AcceptProbe {
		return nil, api.Errorf(api.Forbidden, "this machine was not started with --accept-probe")
	}
	if n.current() != nil {
		return nil, api.Errorf(api.Conflict, "%s is either already part of another cluster or having volumes configured", n.cfg.Name)
	}
	name := n.cfg.Name
	if !n.named && net.ParseIP(r.Name) == nil && checkName(r.Name) == nil {
		name = r.Name
	}
	n.log.Info("probed by a peer of a pool", "from", conn.Remote.String())
	reply, err := n.join(ctx, r.Token, r.Hosts, name)
	return reply, apiError(err)
}

func (n *Node) join(ctx context.Context, text string, hosts []string, name string) (*api.JoinReply, error) {
	token, err := pki.ParseJoinToken(text)
	if err != nil {
		return nil, api.Errorf(api.Invalid, "%w", err)
	}
	if len(hosts) == 0 || len(hosts) > 32 {
		return nil, api.Errorf(api.Invalid, "give the address of a machine of the pool")
	}
	var addrs []string
	for _, h := range hosts {
		a, err := hostPort(h, "")
		if err != nil {
			return nil, api.Errorf(api.Invalid, "%w", err)
		}
		addrs = append(addrs, a)
	}
	n.joining.Lock()
	defer n.joining.Unlock()
	n.mu.Lock()
	old, id := n.member, n.identity
	n.mu.Unlock()
	again := old != nil && pki.Digest(id.CA) == token.CA // a new certificate for an old peer
	if old != nil && !again {
		v := old.latest()
		if len(v.Peers) > 1 || len(v.Volumes) > 0 {
			return nil, api.Errorf(api.Conflict, "%s is either already part of another cluster or having volumes configured", n.cfg.Name)
		}
	}
	csr, err := id.CSR()
	if err != nil {
		return nil, err
	}
	req := api.EnrollRequest{
		Token: token.String(), CSR: csr, Name: name, Port: int(n.port), Addrs: n.cfg.Advertise,
		Witness: n.cfg.Witness, Client: n.cfg.Client, Version: proto.Version,
	}
	if old != nil && !again {
		// The pool of this machine alone gives way before the other one looks at it.
		old.end(errReplaced)
		<-old.ended
		if err := n.leave(old); err != nil {
			return nil, err
		}
		id = &pki.Identity{Key: id.Key}
	}
	reply, err := n.enrollAt(ctx, addrs, token, req)
	if err != nil {
		return nil, err
	}
	whole, known, err := accept(id, token, reply)
	if err != nil {
		return nil, err
	}
	if again {
		if err := old.keeper.Replace(whole); err != nil {
			return nil, err
		}
		n.mu.Lock()
		n.identity, n.fault = whole, nil
		n.mu.Unlock()
		return &api.JoinReply{Pool: reply.Pool, Peer: id.ID().String(), Name: reply.Name}, nil
	}
	// From here on the machine is a peer, whatever happens.
	if err := saveMap(n.path(mapFile), known); err != nil {
		return nil, err
	}
	if err := whole.Save(n.path(identityFile)); err != nil {
		return nil, err
	}
	m, err := n.startMember(whole)
	if err != nil {
		return nil, err
	}
	if err := m.ready(ctx, func(context.Context) error { return nil }); err != nil {
		return nil, api.Errorf(api.NoQuorum, "this machine is in the pool as %s, and has not yet heard from the peer that leads it (%w); it goes on trying", reply.Name, err)
	}
	n.log.Info("joined a pool", "pool", reply.Pool, "name", reply.Name)
	m.waitVoters(ctx)
	return &api.JoinReply{Pool: reply.Pool, Peer: id.ID().String(), Name: reply.Name}, nil
}

// votersTime is how long a join waits for the pool to be as strong as its machines make it.
const votersTime = 3 * time.Second

// waitVoters waits until the machines of the pool that should vote do: who has
// been told that a machine has joined may rely on it. It is not an error if that
// takes longer, because other machines are away.
func (m *member) waitVoters(ctx context.Context) {
	plane := m.plane.Load()
	if plane == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, votersTime)
	defer cancel()
	if err := plane.WaitVoters(ctx); err != nil {
		m.log.Info("the pool's voters are not complete yet", "error", err)
	}
}

// enrollAt asks the first of the addresses that can be reached for membership.
func (n *Node) enrollAt(ctx context.Context, addrs []string, token pki.JoinToken, req api.EnrollRequest) (*api.EnrollReply, error) {
	var errs []string
	for _, addr := range addrs {
		tc, err := dial(ctx, addr, pki.JoinClient(token.CA, alpnJoin, nil))
		if err != nil {
			errs = append(errs, err.Error())
			continue
		}
		reply, err := func() (*api.EnrollReply, error) {
			c, done := over(tc)
			defer done()
			return c.Enroll(ctx, req)
		}()
		if err != nil {
			return nil, err // the pool has been asked
		}
		return reply, nil
	}
	return nil, api.Errorf(api.NodeDown, "from this machine (%s) the pool cannot be reached: %s", n.cfg.Name, strings.Join(errs, "; "))
}

// over is an API client for one connection that is there already.
func over(nc net.Conn) (c *api.Client, done func()) {
	used := false
	c = api.New("http://mortar", func(context.Context) (net.Conn, error) {
		if used {
			return nil, errors.New("the connection has ended")
		}
		used = true
		return nc, nil
	})
	return c, func() {
		c.Close()
		nc.Close()
	}
}

// accept checks what an enrolling peer gave.
func accept(id *pki.Identity, token pki.JoinToken, reply *api.EnrollReply) (*pki.Identity, *cluster.Map, error) {
	ca, err := x509.ParseCertificate(reply.CA)
	if err != nil {
		return nil, nil, err
	}
	if pki.Digest(ca) != token.CA {
		return nil, nil, errors.New("the pool's CA is not the one that the token names")
	}
	cert, err := x509.ParseCertificate(reply.Cert)
	if err != nil {
		return nil, nil, err
	}
	whole, err := id.With(cert, ca)
	if err != nil {
		return nil, nil, err
	}
	if err := whole.Check(time.Now()); err != nil {
		return nil, nil, err
	}
	known := new(cluster.Map)
	return whole, known, json.Unmarshal(reply.Map, known)
}

// Enroll implements httpd.Pool.
func (n *Node) Enroll(ctx context.Context, conn httpd.Ends, r api.EnrollRequest) (*api.EnrollReply, error) {
	// Few at a time, and a bad token costs its sender time.
	select {
	case n.enrolls <- struct{}{}:
		defer func() { <-n.enrolls }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	reply, err := n.enroll(ctx, conn, r)
	if api.IsCode(apiError(err), api.Forbidden) {
		n.log.Warn("refused to enroll a machine", "from", conn.Remote.String(), "error", err)
		pause(ctx, 250*time.Millisecond)
	}
	return reply, apiError(err)
}

func (n *Node) enroll(ctx context.Context, conn httpd.Ends, r api.EnrollRequest) (*api.EnrollReply, error) {
	m, err := n.need()
	if err != nil {
		return nil, err
	}
	plane := m.plane.Load()
	if plane == nil {
		return nil, errStarting
	}
	if r.Version != proto.Version {
		return nil, api.Errorf(api.NotSupported, "the joining machine speaks protocol version %d and the pool %d: install the same version of mortar on both", r.Version, proto.Version)
	}
	token, err := pki.ParseJoinToken(r.Token)
	if err != nil {
		return nil, api.Errorf(api.Forbidden, "%w", err)
	}
	now := time.Now()
	if t, ok := plane.Token(token.Hash()); !ok || t.Role != string(pki.RolePeer) || t.Expires <= now.Unix() || t.Uses < 1 {
		return nil, api.Errorf(api.Forbidden, "the token is not known to the pool, was used, or has expired: make a new one with \"mortar peer invite\"")
	}
	if err := checkName(r.Name); err != nil {
		return nil, api.Errorf(api.Invalid, "the name %q: %w", r.Name, err)
	}
	if r.Port < 1 || r.Port > 65535 {
		return nil, api.Errorf(api.Invalid, "port %d", r.Port)
	}
	raw, _ := plane.Authority()
	ca, err := pki.ParseCA(raw)
	if err != nil {
		return nil, err
	}
	cert, err := ca.Sign(r.CSR, pki.Subject{Role: pki.RolePeer}, now)
	if err != nil {
		return nil, api.Errorf(api.Invalid, "%w", err)
	}
	id := pki.PeerIDFromCert(cert)
	addrs, err := n.reachBack(ctx, conn, id, r)
	if err != nil {
		return nil, err
	}
	// The newcomer will look for this peer where it found it.
	if self := plane.Map().Peer(m.keeper.ID()); self != nil {
		if a := n.selfAddr(conn.Local); a != "" && !slices.Contains(self.Addrs, a) {
			own := append(slices.Clone(self.Addrs), a)
			own = own[:min(len(own), maxAddrs)]
			if err := m.propose(ctx, state.Command{UpdatePeer: &state.UpdatePeer{Peer: self.ID, Addrs: own}}); err != nil {
				return nil, err
			}
		}
	}
	known := plane.Map()
	name := r.Name
	if p := known.Peer(id); p != nil { // a peer that has lost its certificate
		if err := m.propose(ctx, state.Command{UseToken: &state.UseToken{Hash: token.Hash(), Role: string(pki.RolePeer), Now: now.Unix()}}); err != nil {
			return nil, err
		}
		name = p.Name
	} else if err := m.propose(ctx, state.Command{AddPeer: &state.AddPeer{
		Peer:  cluster.Peer{ID: id, Name: name, Addrs: addrs, Witness: r.Witness || r.Client, NoVote: r.Client},
		Token: token.Hash(), Now: now.Unix(),
	}}); err != nil {
		return nil, err
	}
	rawMap, err := json.Marshal(plane.Map())
	if err != nil {
		return nil, err
	}
	n.log.Info("a machine has joined the pool", "peer", id, "name", name, "addrs", addrs)
	return &api.EnrollReply{Cert: cert.Raw, CA: ca.Cert.Raw, Pool: m.pool.String(), Name: name, Map: rawMap}, nil
}

// reachBack finds out at which of its addresses a joining machine can be
// reached from here.
func (n *Node) reachBack(ctx context.Context, conn httpd.Ends, id cluster.PeerID, r api.EnrollRequest) ([]string, error) {
	tries := slices.Clone(r.Addrs)
	if len(tries) > maxAddrs {
		tries = tries[:maxAddrs]
	}
	if host, _, err := net.SplitHostPort(conn.Remote.String()); err == nil {
		from := net.JoinHostPort(host, strconv.Itoa(r.Port))
		if !slices.Contains(tries, from) {
			tries = append(tries, from)
		}
	}
	var good []string
	var errs []string
	for _, addr := range tries {
		if _, _, err := net.SplitHostPort(addr); err != nil {
			continue
		}
		switch there, err := whoIs(ctx, addr); {
		case err != nil:
			errs = append(errs, err.Error())
		case there != id:
			errs = append(errs, fmt.Sprintf("at %s another machine (%s) answers", addr, there))
		default:
			good = append(good, addr)
		}
	}
	if len(good) == 0 {
		return nil, api.Errorf(api.NodeDown, "%s can reach %s, and not the other way round: from %s (%s): %s. Open TCP port %d of %s for the other machines of the pool; if it is reached by another address, start it with --advertise ADDRESS",
			r.Name, n.cfg.Name, n.cfg.Name, conn.Local, strings.Join(errs, "; "), r.Port, r.Name)
	}
	return good, nil
}

// whoIs asks for the identity of the machine at an address.
func whoIs(ctx context.Context, addr string) (cluster.PeerID, error) {
	var there cluster.PeerID
	cfg := pki.ProbeClient(alpnIdentity)
	// Whether it is in a pool does not matter, only that it has the key.
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) == 0 {
			return pki.ErrNoCert
		}
		there = pki.PeerIDFromCert(cs.PeerCertificates[0])
		return nil
	}
	tc, err := dial(ctx, addr, cfg)
	if err != nil {
		return there, err
	}
	return there, tc.Close()
}

// Probe implements httpd.Pool.
func (n *Node) Probe(ctx context.Context, r api.ProbeRequest) (*api.ProbeReply, error) {
	addr, err := hostPort(r.Host, "")
	if err != nil || strings.ContainsAny(r.Host, "/ ") {
		return nil, api.Errorf(api.Invalid, "%s is an invalid address", fmt.Sprintf("%.100q", r.Host))
	}
	host, portText, _ := net.SplitHostPort(addr)
	port, _ := strconv.Atoi(portText)
	reply := &api.ProbeReply{Host: host, Port: port}
	if n.isSelf(ctx, addr) {
		reply.Result, reply.Peer = api.ProbeLocalhost, n.ID().String()
		return reply, nil
	}
	m, err := n.founded(ctx)
	if err != nil {
		return nil, apiError(err)
	}
	var there cluster.PeerID
	cfg := pki.ProbeClient(alpnProbe)
	verify := cfg.VerifyConnection
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) > 0 {
			there = pki.PeerIDFromCert(cs.PeerCertificates[0])
		}
		return verify(cs)
	}
	tc, err := dial(ctx, addr, cfg)
	reply.Peer = there.String()
	switch {
	case err == nil:
	case there == n.ID():
		reply.Result = api.ProbeLocalhost
		return reply, nil
	case errors.Is(err, pki.ErrMember) && m.latest().Peer(there) != nil:
		reply.Result = api.ProbeAlready
		return reply, nil
	case errors.Is(err, pki.ErrMember):
		return nil, api.Errorf(api.Conflict, "%s is either already part of another cluster or having volumes configured", host)
	case strings.Contains(err.Error(), "no application protocol"):
		return nil, api.Errorf(api.Forbidden, "mortar on %s was not started to be probed. Start it there with \"mortar server --accept-probe\", or run \"mortar peer invite\" here and what it prints there", host)
	default:
		return nil, api.Errorf(api.NodeDown, "Probe returned with Transport endpoint is not connected (from this machine, %s: %w)", n.cfg.Name, err)
	}
	c, done := over(tc)
	defer done()
	token, err := m.newToken(ctx, 5*time.Minute, 1)
	if err != nil {
		return nil, apiError(err)
	}
	hosts := slices.Clone(n.cfg.Advertise)
	if a := n.selfAddr(tc.LocalAddr()); a != "" && !slices.Contains(hosts, a) {
		hosts = append(hosts, a)
	}
	if _, err := c.Invited(ctx, api.InvitedRequest{Token: token.String(), Hosts: hosts, Name: host}); err != nil {
		// The token must not lie about; if this fails too, it expires soon.
		_ = m.propose(ctx, state.Command{DropToken: &state.DropToken{Hash: token.Hash()}})
		var told *api.Error
		if errors.As(err, &told) {
			return nil, api.Errorf(told.Code, "%s says: %s", host, told.Message)
		}
		return nil, api.Errorf(api.NodeDown, "%s did not finish: %w", host, err)
	}
	reply.Result = api.ProbeAdded
	return reply, nil
}

// signPeer renews the certificate of this peer, which has the pool's CA itself.
func (m *member) signPeer(_ context.Context, csr []byte) (*x509.Certificate, error) {
	plane := m.plane.Load()
	if plane == nil {
		return nil, errStarting
	}
	raw, _ := plane.Authority()
	ca, err := pki.ParseCA(raw)
	if err != nil {
		return nil, err
	}
	return ca.Sign(csr, pki.Subject{Role: pki.RolePeer}, time.Now())
}
