package daemon

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"mortar/internal/api"
	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/control"
	"mortar/internal/control/state"
	"mortar/internal/disk"
	"mortar/internal/pki"
	"mortar/internal/proto"
	"mortar/internal/wire"
)

// member is this machine as a peer of a pool, from joining to leaving or to the
// end of the process.
type member struct {
	// constant after newMember
	n      *Node
	log    *slog.Logger
	pool   cluster.ID
	keeper *pki.Keeper
	tls    *tls.Config // of incoming connections
	links  *links
	bricks *bricks
	mounts *mounts
	raft   *handoff

	// ctx ends when the membership shall end; base, in which everything of it
	// lives, only after the bricks were handed over.
	ctx     context.Context
	end     context.CancelCauseFunc
	base    context.Context
	endBase context.CancelFunc
	ended   chan struct{} // closed when run returns

	plane  atomic.Pointer[control.Control] // nil until it is open
	opened chan struct{}                   // closed then
	mapped chan struct{}                   // closed when the pool has told this peer of itself

	// serving counts connections that Node's doors have handed in.
	serving  sync.WaitGroup
	servedMu sync.Mutex // guards closed and Add against Wait
	closed   bool

	view atomic.Pointer[view]
	gone map[cluster.PeerID][]string // as saved; follow's own
}

// view is a map with what is looked up in it all the time.
type view struct {
	*cluster.Map
	owner  map[cluster.BrickID]cluster.PeerID
	volume map[cluster.BrickID]*cluster.Volume
	clear  map[cluster.VolumeID]bool // data need not be encrypted
}

func newView(m *cluster.Map) *view {
	v := &view{
		Map:    m,
		owner:  map[cluster.BrickID]cluster.PeerID{},
		volume: map[cluster.BrickID]*cluster.Volume{},
		clear:  map[cluster.VolumeID]bool{},
	}
	for _, vol := range m.Volumes {
		v.clear[vol.ID] = !vol.EffectiveOptions().Encryption
		for _, b := range vol.Bricks {
			v.owner[b.ID] = b.Peer
			v.volume[b.ID] = vol
		}
	}
	return v
}

// goneError ends a membership for good: the pool has detached this machine.
type goneError struct{ text string }

func (e *goneError) Error() string { return e.text }

// faultError ends a membership until an administrator has done something.
type faultError struct{ err error }

func (e *faultError) Error() string { return e.err.Error() }
func (e *faultError) Unwrap() error { return e.err }

// errReplaced ends a membership because another takes its place.
var errReplaced = errors.New("replaced by another membership")

func newMember(n *Node, id *pki.Identity) (*member, error) {
	m := &member{n: n, log: n.log, ended: make(chan struct{}), opened: make(chan struct{}), mapped: make(chan struct{})}
	m.ctx, m.end = context.WithCancelCause(n.ctx)
	m.base, m.endBase = context.WithCancel(context.WithoutCancel(n.ctx))
	pool, err := cluster.ParseID(id.CA.Subject.CommonName)
	if err != nil {
		return nil, fmt.Errorf("the pool's CA certificate: %w", err)
	}
	m.pool = pool
	m.keeper, err = pki.NewKeeper(id, pki.KeeperOptions{Path: n.path(identityFile), Log: n.log})
	if err != nil {
		return nil, err
	}
	m.tls = m.keeper.Server(rules...)
	known := new(cluster.Map)
	if raw, err := os.ReadFile(n.path(mapFile)); err == nil {
		if err := json.Unmarshal(raw, known); err != nil || known.Pool != pool {
			n.log.Warn("the saved map is not used", "file", n.path(mapFile), "error", err)
			known = new(cluster.Map)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	m.view.Store(newView(known))
	hello := proto.Hello{Version: proto.Version, Pool: pool, Boot: n.boot, Port: n.port}
	m.links = newLinks(m.base, m.keeper, hello, m, n.log.With("part", "links"))
	if m.gone, err = loadGone(n.path(goneFile)); err != nil {
		n.log.Warn("where detached peers were is not known", "file", n.path(goneFile), "error", err)
	}
	m.links.remember(m.gone)
	m.bricks = newBricks(m)
	m.mounts = newMounts()
	m.raft = newHandoff(n.tcp.Addr())
	return m, nil
}

// run takes part in the pool until the node stops, the machine is detached, or
// something that cannot be mended here happens. The error says which, nil the
// first.
func (m *member) run() (err error) {
	defer close(m.ended)
	defer func() { m.end(err) }() // whoever waits for it hears why
	defer m.links.wait()
	defer m.shut()
	defer m.raft.Close()
	defer m.endBase()

	m.links.set(m.view.Load().Map)
	// A copy of another machine must not vote: the others are asked first
	// whether they know somebody else by this name.
	wait, cancel := context.WithTimeout(m.ctx, dialTimeout)
	m.links.tried(wait)
	cancel()
	if m.ctx.Err() != nil {
		return endedBy(m.ctx)
	}
	plane, err := control.Open(control.Config{
		Dir: m.n.path(controlDir), Self: m.keeper.ID(),
		Dial: m.dialRaft, Listener: m.raft, Call: m.callControl, Sets: m,
		Log: m.log.With("part", "control"),
	})
	if err != nil {
		return err
	}
	m.plane.Store(plane)
	close(m.opened)
	g, gctx := errgroup.WithContext(m.base)
	g.Go(func() error { return plane.Run(gctx) })
	g.Go(func() error { return m.follow(gctx, plane) })
	g.Go(func() error { return m.keepCert(gctx) })
	select {
	case <-m.ctx.Done():
	case <-gctx.Done():
	}
	m.mounts.close()
	m.bricks.close(func() { m.mounts.end("the daemon stops") })
	m.endBase()
	err = g.Wait()
	var refusal *state.Error
	switch {
	case errors.As(err, &refusal) && refusal.Code == state.CodeDetached:
		return &goneError{refusal.Text}
	case errors.As(err, &refusal) && (refusal.Code == state.CodeCloned || refusal.Code == state.CodeRecovered):
		return &faultError{err}
	case m.ctx.Err() != nil:
		return endedBy(m.ctx)
	}
	return err
}

// endedBy is why a membership ended, nil if the process ends.
func endedBy(ctx context.Context) error {
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// serveAs runs f for a connection that belongs to this membership.
func serveAs[C net.Conn](m *member, ctx context.Context, c C, f func(m *member, ctx context.Context, c C)) {
	m.servedMu.Lock()
	if m.closed {
		m.servedMu.Unlock()
		return
	}
	m.serving.Add(1)
	m.servedMu.Unlock()
	defer m.serving.Done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(m.base, cancel)
	defer stop()
	f(m, ctx, c)
}

// shut lets no more connections in and waits for those that are.
func (m *member) shut() {
	m.servedMu.Lock()
	m.closed = true
	m.servedMu.Unlock()
	m.serving.Wait()
}

// follow does what each new map asks for.
func (m *member) follow(ctx context.Context, plane *control.Control) error {
	told := false
	for version := uint64(0); ; {
		next, err := plane.Wait(ctx, version)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		version = next.Version
		if next.Peer(m.keeper.ID()) == nil {
			continue // not yet added: an old map that is being brought up to date
		}
		m.view.Store(newView(next))
		m.links.set(next)
		m.bricks.set(next)
		m.mounts.changed()
		// Before the map in which they are not any more.
		if err := m.saveGone(plane.Member); err != nil {
			m.log.Warn("where detached peers were cannot be saved; after a restart this machine may not find one whose vote is needed", "error", err)
		}
		// Only now: a fail-over does not wait for this disk.
		if err := m.save(next); err != nil {
			m.log.Warn("the map cannot be saved; mounts on this machine may not find the pool while the daemon is down", "error", err)
		}
		if !told {
			close(m.mapped)
			told = true
		}
	}
}

// save keeps a copy of the map for the next start, and for mounts while the
// daemon is down.
func (m *member) save(next *cluster.Map) error { return saveMap(m.n.path(mapFile), next) }

func saveMap(path string, next *cluster.Map) error {
	raw, err := json.Marshal(next)
	if err != nil {
		return err
	}
	return disk.WriteFile(disk.OS, path, raw)
}

// loadMap reads what saveMap has kept.
func loadMap(path string) (*cluster.Map, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	known := new(cluster.Map)
	return known, json.Unmarshal(raw, known)
}

// saveGone keeps where the detached peers were whose votes still count, for a start before
// they no longer do: the pool could decide nothing any more without them.
func (m *member) saveGone(votes func(cluster.PeerID) bool) error {
	gone := m.links.detached(votes)
	if maps.EqualFunc(gone, m.gone, slices.Equal) {
		return nil
	}
	raw, err := json.Marshal(gone)
	if err != nil {
		return err
	}
	if err := disk.WriteFile(disk.OS, m.n.path(goneFile), raw); err != nil {
		return err
	}
	m.gone = gone
	return nil
}

// loadGone reads what saveGone has kept.
func loadGone(path string) (map[cluster.PeerID][]string, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var gone map[cluster.PeerID][]string
	return gone, json.Unmarshal(raw, &gone)
}

// keepCert renews this machine's certificate. Every peer has the pool's CA.
func (m *member) keepCert(ctx context.Context) error {
	err := m.keeper.Run(ctx, m.signPeer)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// decideTimeout is how long the pool may take to decide something: enough for
// it to elect a leader a few times, and to tell that it cannot.
const decideTimeout = 5 * time.Second

// propose has the pool decide, and returns when this peer knows.
func (m *member) propose(ctx context.Context, cmd state.Command) error {
	plane := m.plane.Load()
	if plane == nil {
		return errStarting
	}
	ctx, cancel := context.WithTimeout(ctx, decideTimeout)
	defer cancel()
	return plane.Propose(ctx, cmd)
}

// errStarting is what a daemon that is not ready answers.
var errStarting = api.Errorf(api.Unavailable, "the daemon is starting; try again in a moment")

// dialRaft connects the control planes of two peers.
func (m *member) dialRaft(ctx context.Context, to cluster.PeerID) (net.Conn, error) {
	tc, _, err := dialAny(ctx, m.links.addrsOf(to), m.keeper.ClientTo(alpnRaft, to))
	if err != nil {
		return nil, err
	}
	return tc, nil
}

// callControl carries what control planes say to each other.
func (m *member) callControl(ctx context.Context, to cluster.PeerID, req []byte) ([]byte, error) {
	return m.links.call(ctx, to, secure, proto.KindControl, req)
}

// Seal implements control.Sealer.
func (m *member) Seal(ctx context.Context, b cluster.Brick, set cluster.SetID, epoch cluster.Epoch, planned bool) (proto.SealReply, error) {
	env := proto.Envelope{Set: set, To: b.ID}
	seal := proto.Seal{Epoch: epoch, Planned: planned}
	var (
		body []byte
		err  error
	)
	if b.Peer == m.keeper.ID() {
		r := m.bricks.replica(b.ID)
		if r == nil {
			return proto.SealReply{}, errNoReplica
		}
		body, err = r.Call(ctx, env, proto.KindSeal, codec.Append(nil, &seal))
	} else {
		body, err = m.links.call(ctx, b.Peer, secure, proto.KindSeal, codec.Append(nil, &env), codec.Append(nil, &seal))
	}
	if err != nil {
		return proto.SealReply{}, err
	}
	var reply proto.SealReply
	return reply, codec.Decode(body, &reply)
}

var errNoReplica = errors.New("the brick is not served here")

// --- linkEvents

// Up implements linkEvents.
func (m *member) Up(peer cluster.PeerID, k kind) { m.bricks.peerUp(peer, k) }

// Down implements linkEvents.
func (m *member) Down(peer cluster.PeerID, k kind) { m.bricks.peerDown(peer, k) }

// Reached implements linkEvents: an address that is proven to be a peer's
// becomes known to all.
func (m *member) Reached(peer cluster.PeerID, addr string) {
	p := m.view.Load().Peer(peer)
	if p == nil || slices.Contains(p.Addrs, addr) {
		return
	}
	addrs := append([]string{addr}, p.Addrs...)
	addrs = addrs[:min(len(addrs), maxAddrs)]
	m.background(5*time.Second, func(ctx context.Context) {
		if err := m.propose(ctx, state.Command{UpdatePeer: &state.UpdatePeer{Peer: peer, Addrs: addrs}}); err != nil {
			m.log.Info("a peer's new address could not be recorded", "peer", peer, "addr", addr, "error", err)
			return
		}
		m.log.Info("a peer has a new address", "peer", peer, "addr", addr)
	})
}

// maxAddrs bounds the addresses that are remembered of a peer.
const maxAddrs = 4

// background runs f, which has so much time, until the membership ends.
func (m *member) background(limit time.Duration, f func(ctx context.Context)) {
	m.servedMu.Lock()
	defer m.servedMu.Unlock()
	if m.closed {
		return
	}
	m.serving.Go(func() {
		ctx, cancel := context.WithTimeout(m.base, limit)
		defer cancel()
		f(ctx)
	})
}

// Cloned implements linkEvents.
func (m *member) Cloned(text string) {
	m.end(&faultError{state.Refusal(state.CodeCloned, "%s", text)})
}

// Gone implements linkEvents.
func (m *member) Gone(text string) { m.end(&goneError{text}) }

// Known implements linkEvents.
func (m *member) Known(peer cluster.PeerID) (known, detached bool, version uint64) {
	v := m.latest()
	if v.Peer(peer) != nil {
		return true, false, v.Version
	}
	plane := m.plane.Load()
	return false, plane != nil && plane.WasDetached(peer), v.Version
}

// Carry implements linkEvents.
func (m *member) Carry(from cluster.PeerID, c *wire.Conn, msg wire.Message) {
	if msg.Kind == proto.KindControl && msg.ID != 0 {
		plane := m.plane.Load()
		if plane == nil {
			c.Reply(msg, proto.Answer(nil, errStarting)...)
			return
		}
		m.background(time.Minute, func(ctx context.Context) {
			body, err := plane.Handle(ctx, from, msg.Body)
			c.Reply(msg, proto.Answer(body, err)...)
		})
		return
	}
	if msg.Kind >= proto.KindHello {
		c.Close(fmt.Errorf("%w: unexpected message of kind %d", wire.ErrFrame, msg.Kind))
		return
	}
	m.bricks.carry(from, c, msg)
}

// handoff is the listener that control gets its connections from.
type handoff struct {
	addr   net.Addr
	ch     chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func newHandoff(addr net.Addr) *handoff {
	return &handoff{addr: addr, ch: make(chan net.Conn), closed: make(chan struct{})}
}

// raftConn is a control connection whose other end is known by its certificate.
type raftConn struct {
	*tls.Conn
	peer   cluster.PeerID
	once   sync.Once
	closed chan struct{}
}

var _ control.Identified = (*raftConn)(nil)

func (c *raftConn) PeerID() cluster.PeerID { return c.peer }

func (c *raftConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { close(c.closed) })
	return err
}

// serve hands one connection to control and waits for its end.
func (h *handoff) serve(ctx context.Context, c *tls.Conn) {
	certs := c.ConnectionState().PeerCertificates
	if len(certs) == 0 {
		return
	}
	rc := &raftConn{Conn: c, peer: pki.PeerIDFromCert(certs[0]), closed: make(chan struct{})}
	select {
	case h.ch <- rc:
	case <-h.closed:
		return
	case <-ctx.Done():
		return
	}
	select {
	case <-rc.closed:
	case <-ctx.Done():
	}
}

func (h *handoff) Accept() (net.Conn, error) {
	select {
	case c := <-h.ch:
		return c, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

func (h *handoff) Close() error {
	h.once.Do(func() { close(h.closed) })
	return nil
}

func (h *handoff) Addr() net.Addr { return h.addr }

// selfAddr is this machine as somebody at the other end of a connection with
// the local address ip sees it.
func (n *Node) selfAddr(local net.Addr) string {
	host, _, err := net.SplitHostPort(local.String())
	if err != nil {
		return ""
	}
	return net.JoinHostPort(host, strconv.Itoa(int(n.port)))
}
