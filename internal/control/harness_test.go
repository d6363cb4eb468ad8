package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
	"mortar/internal/proto"
	"mortar/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is some machines in one process: their control planes, the network
// between them (which can be cut) and their bricks. It works in a bubble of
// testing/synctest, and is used in one where it can be: time passes there only
// while everybody waits, so that no machine is too slow for what is tested.
type world struct {
	t     testing.TB
	log   *slog.Logger
	net   *wire.Network
	ports atomic.Int64 // of the listeners; none is used again
	mu    sync.Mutex   // guards all below
	nodes map[cluster.PeerID]*node
	mute  map[cluster.PeerID]bool // silent machines: nothing in, nothing out, no reset

	writes atomic.Int64 // on connections between control planes
}

// node is one machine. Its Control comes and goes.
type node struct {
	w    *world
	id   cluster.PeerID
	name string
	dir  string

	// guarded by world.mu
	c      *Control
	addr   string
	cancel context.CancelFunc
	over   chan error // Run's result
	bricks map[cluster.BrickID]*fakeBrick
	seals  int
}

// fakeBrick answers seals.
type fakeBrick struct {
	reply proto.SealReply
	err   error
}

func newWorld(t testing.TB, n int) *world {
	w := &world{t: t, net: wire.NewNetwork(1), nodes: map[cluster.PeerID]*node{}, mute: map[cluster.PeerID]bool{}, log: slog.New(slog.DiscardHandler)}
	if os.Getenv("CONTROL_TEST_LOG") != "" {
		w.log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	dir := t.TempDir()
	for i := range n {
		id := testID(byte(i + 1))
		w.nodes[id] = &node{w: w, id: id, name: fmt.Sprintf("n%d", i+1), dir: filepath.Join(dir, fmt.Sprintf("n%d", i+1)), bricks: map[cluster.BrickID]*fakeBrick{}}
	}
	t.Cleanup(func() {
		for _, nd := range w.sorted() {
			nd.kill()
		}
	})
	return w
}

func testID(b byte) cluster.ID { return cluster.ID{0: b, 15: b} }

func (w *world) sorted() []*node {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []*node
	for _, nd := range w.nodes {
		all = append(all, nd)
	}
	slices.SortFunc(all, func(a, b *node) int { return slices.Compare(a.id[:], b.id[:]) })
	return all
}

func (w *world) node(i int) *node { return w.sorted()[i-1] }

// silent makes machines fall silent (or speak again): packets are lost, nothing
// is refused or reset.
func (w *world) silent(nd *node, mute bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mute[nd.id] = mute
}

func (w *world) cut(a, b cluster.PeerID) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.mute[a] || w.mute[b]
}

// cable is a connection whose packets can be lost. Once one was, the stream is
// dead, and stays open.
type cable struct {
	net.Conn
	w        *world
	from, to cluster.PeerID
	mu       sync.Mutex
	dead     bool
}

func (c *cable) Write(b []byte) (int, error) {
	c.w.writes.Add(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead = c.dead || c.w.cut(c.from, c.to); c.dead {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// accepted is the listening end: it learns whom it talks to from the address, as
// a daemon does from a certificate.
type accepted struct {
	*cable
}

func (c accepted) PeerID() cluster.PeerID { return c.to }

// listener hands out accepted connections with the identity of who dialled.
type listener struct {
	net.Listener
	nd *node
}

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(c.RemoteAddr().String())
	if err != nil {
		return nil, err
	}
	from, err := cluster.ParseID(host)
	if err != nil {
		return nil, err
	}
	return accepted{&cable{Conn: c, w: l.nd.w, from: l.nd.id, to: from}}, nil
}

func (nd *node) dial(ctx context.Context, to cluster.PeerID) (net.Conn, error) {
	if nd.w.cut(nd.id, to) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	nd.w.mu.Lock()
	other := nd.w.nodes[to]
	addr := ""
	if other != nil {
		addr = other.addr
	}
	nd.w.mu.Unlock()
	if addr == "" {
		return nil, errors.New("connection refused")
	}
	c, err := nd.w.net.Dial(ctx, nd.id.String(), addr)
	if err != nil {
		return nil, err
	}
	return &cable{Conn: c, w: nd.w, from: nd.id, to: to}, nil
}

func (nd *node) call(ctx context.Context, to cluster.PeerID, req []byte) ([]byte, error) {
	if nd.w.cut(nd.id, to) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	nd.w.mu.Lock()
	other := nd.w.nodes[to]
	var c *Control
	if other != nil {
		c = other.c
	}
	nd.w.mu.Unlock()
	if c == nil {
		return nil, errors.New("connection refused")
	}
	b, err := c.Handle(ctx, nd.id, req)
	if nd.w.cut(nd.id, to) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return b, err
}

// Seal implements Sealer: it reaches the fake bricks of machines that are there.
func (nd *node) Seal(ctx context.Context, b cluster.Brick, set cluster.SetID, epoch cluster.Epoch, planned bool) (proto.SealReply, error) {
	if nd.w.cut(nd.id, b.Peer) {
		<-ctx.Done()
		return proto.SealReply{}, ctx.Err()
	}
	nd.w.mu.Lock()
	defer nd.w.mu.Unlock()
	other := nd.w.nodes[b.Peer]
	if other == nil || other.c == nil {
		return proto.SealReply{}, errors.New("connection refused")
	}
	other.seals++
	fb := other.bricks[b.ID]
	if fb == nil {
		return proto.SealReply{}, errors.New("brick is not open")
	}
	return fb.reply, fb.err
}

// open starts the node's Control, without running it.
func (nd *node) open() error {
	ln, err := nd.w.net.Listen(fmt.Sprint(nd.id, ":", nd.w.ports.Add(1)))
	if err != nil {
		return err
	}
	log := nd.w.log.With("node", nd.name)
	c, err := Open(Config{Dir: nd.dir, Self: nd.id, Dial: nd.dial, Listener: listener{ln, nd}, Call: nd.call, Sets: nd, Log: log})
	if err != nil {
		return err
	}
	nd.w.mu.Lock()
	defer nd.w.mu.Unlock()
	nd.c, nd.addr = c, ln.Addr().String()
	return nil
}

// start opens and runs the node's Control.
func (nd *node) start() *node {
	nd.w.t.Helper()
	if err := nd.open(); err != nil {
		nd.w.t.Fatalf("start %s: %v", nd.name, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan error, 1)
	nd.w.mu.Lock()
	nd.cancel, nd.over = cancel, over
	c := nd.c
	nd.w.mu.Unlock()
	go func() { over <- c.Run(ctx) }()
	return nd
}

// kill ends the node's Control, as abruptly as Close is, and returns what Run
// returned.
func (nd *node) kill() error {
	nd.w.mu.Lock()
	c, cancel, over := nd.c, nd.cancel, nd.over
	nd.c, nd.addr, nd.cancel, nd.over = nil, "", nil, nil
	nd.w.mu.Unlock()
	if c == nil {
		return nil
	}
	if cancel == nil {
		return c.Close()
	}
	cancel()
	return <-over
}

func (nd *node) control() *Control {
	nd.w.mu.Lock()
	defer nd.w.mu.Unlock()
	return nd.c
}

func (nd *node) peer() cluster.Peer {
	return cluster.Peer{ID: nd.id, Name: nd.name, Addrs: []string{nd.name + ":24007"}}
}

// ctx is long enough for anything that works and short enough for a test.
func (w *world) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	w.t.Cleanup(cancel)
	return ctx
}

// until waits for a condition.
func (w *world) until(what string, cond func() bool) {
	w.t.Helper()
	deadline := time.Now().Add(25 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			w.t.Fatalf("never happened: %s", what)
		}
		time.Sleep(5 * time.Millisecond) // between two looks at the condition
	}
}

// pool starts all nodes as one pool, founded by the first, and waits until they
// all know it and as many vote as should.
func (w *world) pool() []*node {
	w.t.Helper()
	nodes := w.sorted()
	first := nodes[0].start()
	if err := first.c.Bootstrap(w.ctx(), state.Init{Pool: testID(0xff), Peer: first.peer()}); err != nil {
		w.t.Fatalf("bootstrap: %v", err)
	}
	for _, nd := range nodes[1:] {
		nd.start()
		if err := first.c.Propose(w.ctx(), state.Command{AddPeer: &state.AddPeer{Peer: nd.peer()}}); err != nil {
			w.t.Fatalf("add %s: %v", nd.name, err)
		}
	}
	w.settled(nodes...)
	return nodes
}

// settled waits until the nodes agree on one leader, on the map, and on the
// voters that the rule asks for, and have announced themselves.
func (w *world) settled(nodes ...*node) *node {
	w.t.Helper()
	var leader *node
	agreed := false
	defer func() {
		if !agreed {
			for _, nd := range nodes {
				c := nd.control()
				w.t.Logf("%s: start %d, map %d, %+v, raft %v", nd.name, c.Incarnation(), c.Map().Version, c.Status(), c.raft.Stats())
			}
		}
	}()
	w.until("agreement on leader, map and voters", func() bool {
		leader = nil
		for _, nd := range nodes {
			c := nd.control()
			st := c.Status()
			m := c.Map()
			if c.Incarnation() == 0 || st.Leader.IsZero() || m.Version != nodes[0].control().Map().Version || len(st.Voters) != state.VotersOf(m) {
				return false
			}
			if st.Leader != nodes[0].control().Status().Leader {
				return false
			}
			if st.Leading {
				leader = nd
			}
		}
		agreed = leader != nil
		return agreed
	})
	return leader
}

// others returns the nodes but those.
func others(nodes []*node, not ...*node) []*node {
	return slices.DeleteFunc(slices.Clone(nodes), func(nd *node) bool { return slices.Contains(not, nd) })
}

// volume creates and starts a volume with one brick per node, led by that of
// the first.
func (w *world) volume(name string, nodes ...*node) *cluster.Volume {
	w.t.Helper()
	c := nodes[0].control()
	cv := state.CreateVolume{ID: cluster.NewID(), Name: name, Replica: len(nodes)}
	for _, nd := range nodes {
		b := cluster.Brick{ID: cluster.NewID(), Peer: nd.id, Host: nd.name, Path: "/bricks/" + name}
		cv.Bricks = append(cv.Bricks, b)
		w.brick(nd, b.ID, proto.SealReply{Sealed: true, Trusted: true, Tail: cluster.Pos{Epoch: 1, Seq: 100}})
	}
	if err := c.Propose(w.ctx(), state.Command{CreateVolume: &cv}); err != nil {
		w.t.Fatalf("create %s: %v", name, err)
	}
	if err := c.Propose(w.ctx(), state.Command{StartVolume: &state.StartVolume{Volume: cv.ID}}); err != nil {
		w.t.Fatalf("start %s: %v", name, err)
	}
	return c.Map().Volume(name)
}

func (w *world) brick(nd *node, id cluster.BrickID, reply proto.SealReply) {
	w.mu.Lock()
	defer w.mu.Unlock()
	nd.bricks[id] = &fakeBrick{reply: reply}
}

// problem is what the node is told about a set that waits for a primary.
func (w *world) problem(nd *node, set cluster.SetID) string {
	w.t.Helper()
	all, err := nd.control().Problems(w.ctx())
	if err != nil {
		w.t.Fatalf("%s: %v", nd.name, err)
	}
	for _, p := range all {
		if p.Set == set {
			return p.Reason
		}
	}
	return ""
}

// waitSet waits until the node knows a configuration that satisfies cond.
func (w *world) waitSet(nd *node, volume string, cond func(*cluster.SetConfig) bool) *cluster.SetConfig {
	w.t.Helper()
	ctx := w.ctx()
	c := nd.control()
	for m := c.Map(); ; {
		if v := m.Volume(volume); v != nil && cond(&v.Sets[0]) {
			return &v.Sets[0]
		}
		next, err := c.Wait(ctx, m.Version)
		if err != nil {
			w.t.Fatalf("%s never knew the configuration: %v", nd.name, err)
		}
		m = next
	}
}
