package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/pki"
	"mortar/internal/proto"
	"mortar/internal/wire"
)

// links keeps this daemon connected to every other peer of the pool. Each pair
// of peers has two connections, one dialed by each: what a peer has to say, and
// the answers to it, travel on the one that it dialed. Where a volume does without
// encryption there is a second pair for it.
type links struct {
	// dependencies, constant
	self   cluster.PeerID
	keeper *pki.Keeper
	hello  proto.Hello // what this side says
	events linkEvents
	log    *slog.Logger

	ctx context.Context
	wg  sync.WaitGroup // of the lines

	mu    sync.Mutex // guards the fields below
	peers map[cluster.PeerID]*link
	gone  map[cluster.PeerID][]string // where those were that were detached: their vote may still be needed
	in    map[cluster.PeerID][]*inbound
	lives map[cluster.PeerID]uint64 // Hello.Boot of whom was let in last
}

// linkEvents is told what happens to connections. Its methods do not block.
type linkEvents interface {
	// Up and Down: messages can be sent to peer, or no longer.
	Up(peer cluster.PeerID, k kind)
	Down(peer cluster.PeerID, k kind)
	// Reached: the peer answered at an address.
	Reached(peer cluster.PeerID, addr string)
	// Cloned: another live machine has this one's identity. Gone: the pool has
	// detached this machine.
	Cloned(text string)
	Gone(text string)
	// Carry takes what a peer sent. The body is Carry's.
	Carry(from cluster.PeerID, c *wire.Conn, m wire.Message)
	// Known reports whether a peer is in the pool, and whether it was detached
	// from it, by the map of that version.
	Known(peer cluster.PeerID) (known, detached bool, version uint64)
}

// kind is a kind of connection.
type kind uint8

const (
	secure kind = iota
	plain
	kinds
)

func (k kind) alpn() string {
	if k == plain {
		return alpnPlain
	}
	return alpnPeer
}

// link is one other peer as this one reaches it.
type link struct {
	id   cluster.PeerID
	stop context.CancelCauseFunc
	ctx  context.Context

	mu      sync.Mutex // guards the fields below
	addrs   []string   // from the map, best first
	learned []string   // where its own connections come from, newest first
	lines   [kinds]*line
}

// line is one connection that is kept up.
type line struct {
	conn    *wire.Conn    // nil while there is none
	problem string        // why
	addr    string        // of the last connection
	wake    chan struct{} // try at once
	tried   chan struct{} // closed after the first try
	once    sync.Once
}

// How long to wait between tries.
const (
	backoffFirst = 50 * time.Millisecond
	backoffMost  = time.Second
	maxLearned   = 4
)

// newLinks makes links that work until ctx ends; then wait waits for them.
func newLinks(ctx context.Context, keeper *pki.Keeper, hello proto.Hello, events linkEvents, log *slog.Logger) *links {
	return &links{
		ctx: ctx, self: keeper.ID(), keeper: keeper, hello: hello, events: events, log: log,
		peers: map[cluster.PeerID]*link{}, gone: map[cluster.PeerID][]string{}, in: map[cluster.PeerID][]*inbound{},
		lives: map[cluster.PeerID]uint64{},
	}
}

// wait returns when everything has ended.
func (l *links) wait() { l.wg.Wait() }

// remember takes over where peers were that were detached in a former life. Those that the
// map has are not among them.
func (l *links) remember(gone map[cluster.PeerID][]string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	maps.Copy(l.gone, gone)
}

// detached is where the peers were that were detached and of which keep is true.
func (l *links) detached(keep func(cluster.PeerID) bool) map[cluster.PeerID][]string {
	l.mu.Lock()
	defer l.mu.Unlock()
	gone := map[cluster.PeerID][]string{}
	for id, addrs := range l.gone {
		if keep(id) {
			gone[id] = addrs
		}
	}
	return gone
}

// set makes the links those of a map. It is called from one goroutine.
func (l *links) set(m *cluster.Map) {
	l.mu.Lock()
	defer l.mu.Unlock()
	plainTo := plainPeers(m, l.self)
	for id, k := range l.peers {
		if m.Peer(id) == nil {
			k.stop(errors.New("no longer in the pool"))
			delete(l.peers, id)
			k.mu.Lock()
			l.gone[id] = k.addrsLocked(k.lines[secure])
			k.mu.Unlock()
		}
	}
	for _, p := range m.Peers {
		if p.ID == l.self {
			continue
		}
		k := l.peers[p.ID]
		delete(l.gone, p.ID)
		if k == nil {
			k = &link{id: p.ID}
			k.ctx, k.stop = context.WithCancelCause(l.ctx)
			l.peers[p.ID] = k
		}
		k.mu.Lock()
		moved := !slices.Equal(k.addrs, p.Addrs)
		k.addrs = p.Addrs
		for _, kd := range []kind{secure, plain} {
			if k.lines[kd] == nil && (kd == secure || plainTo[p.ID]) {
				ln := &line{wake: make(chan struct{}, 1), tried: make(chan struct{})}
				k.lines[kd] = ln
				l.wg.Go(func() { l.keep(k, kd, ln) })
			} else if moved && k.lines[kd] != nil {
				k.lines[kd].poke()
			}
		}
		k.mu.Unlock()
	}
}

// plainPeers are the peers that share with self a started volume whose data
// need not be encrypted.
func plainPeers(m *cluster.Map, self cluster.PeerID) map[cluster.PeerID]bool {
	with := map[cluster.PeerID]bool{}
	for _, v := range m.Volumes {
		if v.Status != cluster.VolumeStarted || v.EffectiveOptions().Encryption ||
			!slices.ContainsFunc(v.Bricks, func(b cluster.Brick) bool { return b.Peer == self }) {
			continue
		}
		for _, b := range v.Bricks {
			with[b.Peer] = true
		}
	}
	return with
}

func (ln *line) poke() {
	select {
	case ln.wake <- struct{}{}:
	default:
	}
}

// keep keeps one line up until its link ends.
func (l *links) keep(k *link, kd kind, ln *line) {
	pause := backoffFirst
	timer := time.NewTimer(0)
	defer timer.Stop()
	defer ln.once.Do(func() { close(ln.tried) })
	for {
		began := time.Now()
		err := l.connect(k, kd, ln)
		ln.once.Do(func() { close(ln.tried) })
		if k.ctx.Err() != nil {
			return
		}
		k.mu.Lock()
		changed := ln.problem != err.Error()
		ln.problem = err.Error()
		k.mu.Unlock()
		if changed {
			l.log.Info("not connected to a peer", "peer", k.id, "reason", err)
		}
		if time.Since(began) > 2*backoffMost {
			pause = backoffFirst // it had been up
		}
		// Not all peers at the same moment.
		timer.Reset(pause + rand.N(pause/2))
		pause = min(2*pause, backoffMost)
		select {
		case <-timer.C:
		case <-ln.wake:
		case <-k.ctx.Done():
			return
		}
	}
}

// connect makes one connection and serves it until it ends, which is the error.
func (l *links) connect(k *link, kd kind, ln *line) error {
	k.mu.Lock()
	addrs := k.addrsLocked(ln)
	k.mu.Unlock()
	tc, addr, err := dialAny(k.ctx, addrs, l.keeper.ClientTo(kd.alpn(), k.id))
	if err != nil {
		return err
	}
	nc := net.Conn(tc)
	if kd == plain {
		if nc, err = wire.Plain(k.ctx, tc, true, true); err != nil {
			return err
		}
	}
	// The answering side has no calls to make here, but to ask whether we live.
	c := wire.New(nc, wire.Options{Log: l.log, MaxCalls: maxPeerCalls, Handler: wire.HandlerFunc(answerAlive)})
	ctx, cancel := context.WithCancel(k.ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }() // waited for on every path
	reply, err := l.introduce(ctx, c)
	if err != nil {
		cancel()
		<-ended
		return fmt.Errorf("%s: %w", addr, err)
	}
	switch reply.Status {
	case proto.Welcome:
	case proto.HelloCloned:
		l.events.Cloned(reply.Text)
	case proto.HelloGone:
		if _, _, version := l.events.Known(l.self); reply.Map >= version {
			l.events.Gone(reply.Text)
		}
	}
	if reply.Status != proto.Welcome {
		cancel()
		<-ended
		return fmt.Errorf("%s: %s", addr, reply.Text)
	}
	k.mu.Lock()
	ln.conn, ln.problem, ln.addr = c, "", addr
	k.mu.Unlock()
	ln.once.Do(func() { close(ln.tried) })
	l.log.Info("connected to a peer", "peer", k.id, "addr", addr, "encrypted", kd == secure)
	l.events.Up(k.id, kd)
	l.events.Reached(k.id, addr)
	err = <-ended
	k.mu.Lock()
	ln.conn = nil
	k.mu.Unlock()
	l.events.Down(k.id, kd)
	return err
}

// introduce says hello.
func (l *links) introduce(ctx context.Context, c *wire.Conn) (*proto.HelloReply, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*dialTimeout, errors.New("it does not answer"))
	defer cancel()
	raw, err := c.Call(ctx, proto.KindHello, codec.Append(nil, &l.hello))
	if err != nil {
		return nil, err
	}
	body, err := proto.ParseAnswer(raw)
	if err != nil {
		return nil, err
	}
	r := new(proto.HelloReply)
	return r, codec.Decode(body, r)
}

// maxPeerCalls bounds the calls of a peer that are not yet answered: requests
// of its clients that this one orders as a primary.
const maxPeerCalls = 16 << 10

func answerAlive(c *wire.Conn, m wire.Message) {
	if m.Kind == proto.KindAlive && m.ID != 0 {
		c.Reply(m, proto.Answer(nil, nil)...)
	}
}

// dialAny connects to the first of the addresses that answers. A later one is
// tried when those before it have failed or kept silent for a while.
func dialAny(ctx context.Context, addrs []string, cfg *tls.Config) (*tls.Conn, string, error) {
	if len(addrs) == 0 {
		return nil, "", errors.New("no address of it is known")
	}
	type result struct {
		tc   *tls.Conn
		addr string
		err  error
	}
	const patience = 300 * time.Millisecond
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan result)
	open, next := 0, 0
	try := func() {
		addr := addrs[next]
		next++
		open++
		go func() {
			tc, err := dial(ctx, addr, cfg)
			results <- result{tc, addr, err}
		}()
	}
	try()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	var errs []error
	for open > 0 {
		select {
		case r := <-results:
			open--
			if r.err == nil {
				cancel()
				for ; open > 0; open-- { // the losers
					if r := <-results; r.err == nil {
						r.tc.NetConn().Close()
					}
				}
				return r.tc, r.addr, nil
			}
			errs = append(errs, r.err)
			if next < len(addrs) {
				try()
				timer.Reset(patience)
			}
		case <-timer.C:
			if next < len(addrs) {
				try()
				timer.Reset(patience)
			}
		}
	}
	return nil, "", errors.Join(errs...)
}

// conn is the connection to a peer; nil if there is none.
func (l *links) conn(peer cluster.PeerID, kd kind) *wire.Conn {
	l.mu.Lock()
	k := l.peers[peer]
	l.mu.Unlock()
	if k == nil {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.lines[kd] == nil {
		return nil
	}
	return k.lines[kd].conn
}

// errNotConnected is why nothing can be sent to a peer now.
var errNotConnected = errors.New("not connected to the peer")

// call asks a peer something over its secure line.
func (l *links) call(ctx context.Context, peer cluster.PeerID, kd kind, msg uint8, parts ...[]byte) ([]byte, error) {
	c := l.conn(peer, kd)
	if c == nil {
		return nil, errNotConnected
	}
	raw, err := c.Call(ctx, msg, parts...)
	if err != nil {
		return nil, err
	}
	return proto.ParseAnswer(raw)
}

// state tells how a peer is connected: since the secure line is always there,
// it is the one that counts.
func (l *links) state(peer cluster.PeerID) (connected bool, addr, problem string) {
	l.mu.Lock()
	k := l.peers[peer]
	l.mu.Unlock()
	if k == nil {
		return false, "", ""
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	ln := k.lines[secure]
	return ln.conn != nil, ln.addr, ln.problem
}

// addrsOf are the addresses at which a peer may be found, best first.
func (l *links) addrsOf(peer cluster.PeerID) []string {
	l.mu.Lock()
	k, gone := l.peers[peer], l.gone[peer]
	l.mu.Unlock()
	if k == nil {
		return gone
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.addrsLocked(k.lines[secure])
}

// addrsLocked are the addresses to try, what worked last first.
func (k *link) addrsLocked(ln *line) []string {
	var addrs []string
	for _, a := range append(append([]string{ln.addr}, k.addrs...), k.learned...) {
		if a != "" && !slices.Contains(addrs, a) {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

// tried waits until every peer was tried once, or ctx ends.
func (l *links) tried(ctx context.Context) {
	l.mu.Lock()
	var wait []<-chan struct{}
	for _, k := range l.peers {
		wait = append(wait, k.lines[secure].tried)
	}
	l.mu.Unlock()
	for _, c := range wait {
		select {
		case <-c:
		case <-ctx.Done():
			return
		}
	}
}

// inbound is a connection that another peer dialed.
type inbound struct {
	l    *links
	peer cluster.PeerID
	conn *wire.Conn
	boot uint64
	from string

	wg    sync.WaitGroup // of greet
	mu    sync.Mutex
	state inState // guarded by mu
}

type inState uint8

const (
	expectHello inState = iota
	greeting
	welcome
)

// serve is the handler of connections from peers.
func (l *links) serve(ctx context.Context, tc *tls.Conn, kd kind) {
	certs := tc.ConnectionState().PeerCertificates
	if len(certs) == 0 {
		return // the rules for these protocols let nobody in without one
	}
	in := &inbound{l: l, peer: pki.PeerIDFromCert(certs[0]), from: tc.RemoteAddr().String()}
	nc := net.Conn(tc)
	if kd == plain {
		var err error
		if nc, err = wire.Plain(ctx, tc, false, true); err != nil {
			l.log.Info("a peer's connection failed", "peer", in.peer, "from", in.from, "error", err)
			return
		}
	}
	in.conn = wire.New(nc, wire.Options{Log: l.log, MaxCalls: maxPeerCalls, Handler: in})
	err := in.conn.Run(ctx)
	in.wg.Wait()
	l.mu.Lock()
	l.in[in.peer] = slices.DeleteFunc(l.in[in.peer], func(o *inbound) bool { return o == in })
	l.mu.Unlock()
	l.log.Debug("a peer's connection ended", "peer", in.peer, "from", in.from, "reason", err)
}

// Message implements wire.Handler.
func (in *inbound) Message(c *wire.Conn, m wire.Message) {
	in.mu.Lock()
	state := in.state
	if state == expectHello && m.Kind == proto.KindHello && m.ID != 0 {
		in.state = greeting
	}
	in.mu.Unlock()
	switch {
	case state == welcome && m.Kind == proto.KindAlive:
		answerAlive(c, m)
	case state == welcome:
		in.l.events.Carry(in.peer, c, m)
	case state == expectHello && m.Kind == proto.KindHello && m.ID != 0:
		in.wg.Go(func() { in.greet(c, m) }) // may ask another connection
	default:
		c.Close(fmt.Errorf("%w: message of kind %d before the hello", wire.ErrFrame, m.Kind))
	}
}

// greet answers a hello.
func (in *inbound) greet(c *wire.Conn, m wire.Message) {
	var h proto.Hello
	if err := codec.Decode(m.Body, &h); err != nil {
		c.Close(fmt.Errorf("%w: hello: %w", wire.ErrFrame, err))
		return
	}
	r := in.l.judge(in, &h)
	r.Version, r.Boot, r.Seen = proto.Version, in.l.hello.Boot, in.from
	if r.Status == proto.Welcome {
		in.mu.Lock()
		in.state = welcome
		in.mu.Unlock()
		in.l.learn(in.peer, in.from, h.Port)
	} else {
		in.l.log.Warn("refused a peer's connection", "peer", in.peer, "from", in.from, "reason", r.Text)
	}
	c.Reply(m, proto.Answer(codec.Append(nil, r), nil)...)
}

// judge decides what becomes of a connection.
func (l *links) judge(in *inbound, h *proto.Hello) *proto.HelloReply {
	known, detached, version := l.events.Known(in.peer)
	switch {
	case h.Version != proto.Version:
		return &proto.HelloReply{Status: proto.HelloRefused, Text: fmt.Sprintf("protocol version %d there and %d here: run the same version of mortar on both machines", h.Version, proto.Version)}
	case h.Pool != l.hello.Pool:
		return &proto.HelloReply{Status: proto.HelloRefused, Text: fmt.Sprintf("it is in pool %s and this machine is in pool %s", h.Pool, l.hello.Pool)}
	case detached:
		return &proto.HelloReply{Status: proto.HelloGone, Map: version, Text: "this machine was detached from the pool (peer detach)"}
	case in.peer == l.self:
		if h.Boot == l.hello.Boot {
			return &proto.HelloReply{Status: proto.HelloRefused, Text: "this is the very same daemon"}
		}
		return l.clone(in.peer, "this machine ("+in.conn.Net().LocalAddr().String()+")")
	case !known:
		return &proto.HelloReply{Status: proto.HelloRefused, Text: "this peer has not yet heard of it; it will be tried again"}
	}
	l.mu.Lock()
	var elder []*inbound
	for _, o := range l.in[in.peer] {
		if o.boot != h.Boot {
			elder = append(elder, o)
		}
	}
	l.mu.Unlock()
	// Connections of an earlier run have ended, or will when they are asked. One
	// that answers is another live machine with the same key.
	for _, o := range elder {
		ctx, cancel := context.WithTimeout(l.ctx, 700*time.Millisecond)
		_, err := o.conn.Call(ctx, proto.KindAlive)
		cancel()
		if err == nil {
			return l.clone(in.peer, o.from)
		}
		o.conn.Close(errors.New("replaced by a connection of a later run"))
	}
	in.boot = h.Boot
	l.mu.Lock()
	l.in[in.peer] = append(l.in[in.peer], in)
	l.lives[in.peer] = h.Boot
	l.mu.Unlock()
	return &proto.HelloReply{}
}

// died calls tell if the life boot of a peer, of which somebody says that it has ended, is the
// last one that was let in here. No connection of a later life is let in meanwhile, so
// tell comes before every word of it. A life that has sent nothing here holds nothing
// from here, and needs no certificate.
func (l *links) died(peer cluster.PeerID, boot uint64, tell func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if last, ok := l.lives[peer]; !ok || last != boot {
		return false
	}
	tell()
	return true
}

// clone refuses a machine that has another's identity.
func (l *links) clone(id cluster.PeerID, other string) *proto.HelloReply {
	return &proto.HelloReply{Status: proto.HelloCloned, Text: fmt.Sprintf("another live machine, %s, has the same identity %s: "+
		"one of the two was made as a copy of the other's disk; run \"mortar server --new-identity\" once on the copy, and let it join as a new peer", other, id)}
}

// learn notes where a peer's connection comes from, and has its lines try at
// once: the peer is up.
func (l *links) learn(peer cluster.PeerID, from string, port uint16) {
	host, _, err := net.SplitHostPort(from)
	if err != nil {
		return
	}
	addr := net.JoinHostPort(host, strconv.Itoa(int(port)))
	l.mu.Lock()
	k := l.peers[peer]
	l.mu.Unlock()
	if k == nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.learned = slices.DeleteFunc(k.learned, func(a string) bool { return a == addr })
	k.learned = append([]string{addr}, k.learned...)
	k.learned = k.learned[:min(len(k.learned), maxLearned)]
	for _, ln := range k.lines {
		if ln != nil && ln.conn == nil {
			ln.poke()
		}
	}
}
