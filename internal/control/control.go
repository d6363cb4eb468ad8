// Package control is the control plane of a pool: every peer runs one Control,
// together they agree on one state.State, and whichever of them leads keeps the
// replica sets led and the voters right.
//
// What is decided, and how, is in package state, without clock or network. Here
// is what must touch the world: the consensus machine (hashicorp/raft) with its
// store on disk and its connections, the forwarding of proposals to the leader,
// and the loops that only the leader runs:
//
//   - failover: a set whose primary is suspected is sealed, and the brick that
//     state.Failover picks becomes its primary;
//   - voters: peers of the map are members of the consensus group, and the
//     number of voters follows state.Voters.
//
// Identity is the peer's id everywhere, in the consensus group too; addresses
// are looked up in the Map when a connection is made, so a peer that moves needs
// no change of membership.
package control

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
	"mortar/internal/proto"
)

// Sealer takes an epoch away from a brick, wherever that is served. It returns
// an error if the brick cannot be asked; a brick that refuses says so in the
// reply.
type Sealer interface {
	Seal(ctx context.Context, b cluster.Brick, set cluster.SetID, epoch cluster.Epoch, planned bool) (proto.SealReply, error)
}

// Config is what a Control needs.
type Config struct {
	// Dir is where the control store lives; it is made if absent, mode 0700.
	Dir  string
	Self cluster.PeerID
	// Dial connects to the control plane of another peer (ALPN "mortar-raft/1"),
	// whose addresses are in the Map. Listener accepts such connections; Control
	// closes it. Both give connections that are authenticated already; one that
	// implements Identified is held to its word.
	Dial     func(ctx context.Context, to cluster.PeerID) (net.Conn, error)
	Listener net.Listener
	// Call carries a request to Control.Handle of another peer and brings back
	// its answer. An error means that the other side may not have got it.
	Call func(ctx context.Context, to cluster.PeerID, req []byte) ([]byte, error)
	Sets Sealer
	// Log gets what an administrator may want to know. The consensus library's
	// own messages go to it at debug level.
	Log *slog.Logger
}

func (c *Config) validate() error {
	switch {
	case c.Dir == "":
		return errors.New("control: Config.Dir is empty")
	case c.Self.IsZero():
		return errors.New("control: Config.Self is zero")
	case c.Dial == nil || c.Listener == nil || c.Call == nil || c.Sets == nil:
		return errors.New("control: Config needs Dial, Listener, Call and Sets")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// The times of the consensus group. With them a machine that was leader and
// primary at once costs less than the primary's lease: see doc/replication.md.
const (
	heartbeatTimeout = 250 * time.Millisecond
	electionTimeout  = 500 * time.Millisecond
	leaderLease      = 250 * time.Millisecond
	// commitTick is how often the library looks whether followers know the
	// commit index. They do: transport tells them at once. It is only a net.
	commitTick = 200 * time.Millisecond

	// snapshotEvery and trailing bound the log: the state is small, and so is a
	// snapshot; a peer that was away for less than trailing commands catches up
	// from the log.
	snapshotEvery = 1024
	trailing      = 1024
)

// Control is one peer's part of the control plane.
type Control struct {
	cfg   Config
	log   *slog.Logger
	boot  uint64 // random, tells two processes with one identity apart
	store *store
	trans *transport
	raft  *raft.Raft

	failOnce sync.Once
	failed   chan struct{} // closed by fail
	failErr  error         // set before failed is closed

	closeOnce sync.Once
	closeErr  error

	// forgetful is set while the peer may have forgotten what it promised; see
	// amnesia.go.
	forgetful atomic.Bool
	behind    atomic.Uint64 // the highest commit index heard of while forgetful; stays
	abstained atomic.Uint64 // requests for votes that were refused for it

	// moved is closed and replaced when another leader, or none, is known. It has
	// a lock of its own, which is the last in order: the library reports from
	// wherever it finds out.
	movedMu sync.Mutex
	moved   chan struct{}

	mu          sync.Mutex    // guards all below
	st          *state.State  // what everybody sees: live, or ahead of it after a start
	applied     uint64        // index of the last command in st
	live        *state.State  // the consensus machine's
	liveIndex   uint64        // index of the last command in live
	pooled      pooled        // as stored
	changed     chan struct{} // closed and replaced when st or applied changes
	incarnation uint64        // of this process; 0 until it is known
	detached    bool
	lastAsked   time.Time // when hearsay last went round
	lead        *leader   // while this peer leads
}

// Open opens the control plane's store in cfg.Dir and joins the group that is
// recorded there. A machine with an empty store belongs to no pool: it waits to
// be made one (Bootstrap), or to be added to one by a peer of it.
//
// Run must be called next, or Close if it is not to be run.
func Open(cfg Config) (*Control, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	c := &Control{
		cfg:     cfg,
		log:     cfg.Log,
		failed:  make(chan struct{}),
		live:    state.New(),
		changed: make(chan struct{}),
		moved:   make(chan struct{}),
	}
	var b [8]byte
	rand.Read(b[:])
	c.boot = binary.LittleEndian.Uint64(b[:])

	st, err := openStore(cfg.Dir, c.fail)
	if err != nil {
		cfg.Listener.Close()
		return nil, err
	}
	c.st = c.live
	c.store = st
	c.forgetful.Store(st.forgetful())
	snaps, err := openSnapshots(cfg.Dir)
	if err != nil {
		cfg.Listener.Close()
		st.close()
		return nil, err
	}
	sl := newStream(cfg.Listener, cfg.Self, cfg.Log)
	sl.dial, sl.hello, sl.check = cfg.Dial, c.hello, c.checkHello
	c.trans = newTransport(sl, newRaftLog(cfg.Log))
	c.trans.amnesia = c.amnesia
	c.raft, err = raft.NewRaft(c.raftConfig(), (*fsm)(c), st, st, snaps, c.trans)
	if err != nil {
		c.trans.Close()
		st.close()
		return nil, fmt.Errorf("control store %s: %w", cfg.Dir, err)
	}
	c.raft.RegisterObserver(raft.NewObserver(nil, false, func(o *raft.Observation) bool {
		if _, ok := o.Data.(raft.LeaderObservation); ok {
			c.movedMu.Lock()
			close(c.moved)
			c.moved = make(chan struct{})
			c.movedMu.Unlock()
		}
		return false
	}))
	c.mu.Lock()
	err = c.preview()
	c.mu.Unlock()
	c.trans.start()
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("control store %s: %w", cfg.Dir, err)
	}
	return c, nil
}

func (c *Control) raftConfig() *raft.Config {
	rc := raft.DefaultConfig()
	rc.LocalID = serverID(c.cfg.Self)
	rc.HeartbeatTimeout = heartbeatTimeout
	rc.ElectionTimeout = electionTimeout
	rc.LeaderLeaseTimeout = leaderLease
	rc.CommitTimeout = commitTick
	rc.SnapshotThreshold = snapshotEvery
	rc.TrailingLogs = trailing
	rc.SnapshotInterval = time.Minute
	rc.ShutdownOnRemove = false
	rc.NoLegacyTelemetry = true
	rc.Logger = newRaftLog(c.log)
	return rc
}

func serverID(id cluster.PeerID) raft.ServerID { return raft.ServerID(id.String()) }

// openSnapshots opens the snapshots and makes sure that the newest can be read:
// the library would silently take an older one, whose log is gone.
func openSnapshots(dir string) (raft.SnapshotStore, error) {
	snaps, err := raft.NewFileSnapshotStoreWithLogger(dir, 2, newRaftLog(slog.New(slog.DiscardHandler)))
	if err != nil {
		return nil, fmt.Errorf("control store %s: %w", dir, err)
	}
	names, err := filepath.Glob(filepath.Join(dir, "snapshots", "*"))
	if err != nil {
		return nil, err
	}
	whole := 0
	for _, n := range names {
		if filepath.Ext(n) != ".tmp" {
			whole++
		}
	}
	list, err := snaps.List()
	if err != nil {
		return nil, fmt.Errorf("control store %s: %w", dir, err)
	}
	if len(list) < min(whole, 2) {
		return nil, &DamageError{filepath.Join(dir, "snapshots"), "a snapshot has no readable description"}
	}
	if len(list) == 0 {
		return snaps, nil
	}
	where := filepath.Join(dir, "snapshots", list[0].ID)
	_, r, err := snaps.Open(list[0].ID) // checks the checksum
	if err != nil {
		return nil, &DamageError{where, err.Error()}
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, &DamageError{where, err.Error()}
	}
	if _, _, err := decodeSnapshot(b); err != nil {
		return nil, fmt.Errorf("%s: %w", where, err)
	}
	return snaps, nil
}

// fail ends the Control: Run returns err.
func (c *Control) fail(err error) {
	c.failOnce.Do(func() {
		c.failErr = err
		close(c.failed)
	})
}

// Run runs the control plane until ctx ends (then it returns nil) or it can go
// on no more: the store failed, the identity is in use elsewhere (CodeCloned),
// this peer was taken out of the pool (CodeDetached), or its copy belongs to a
// pool that was recovered without it (CodeRecovered). When it returns, all is
// closed. A leader hands its office over before it goes.
func (c *Control) Run(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.watchLeadership(gctx) })
	g.Go(func() error { return c.incarnate(gctx) })
	g.Go(func() error { return c.findOut(gctx) })
	g.Go(func() error {
		select {
		case <-c.failed:
			return c.failErr
		case <-gctx.Done():
			return nil
		}
	})
	err := g.Wait()
	if err != nil {
		c.fail(err) // so that whoever else is waiting hears why
	}
	if cerr := c.Close(); err == nil {
		err = cerr
	}
	return err
}

// Close ends the Control and waits for everything it started. It may be called
// twice.
func (c *Control) Close() error {
	c.closeOnce.Do(func() {
		if c.raft.State() == raft.Leader && len(c.raft.GetConfiguration().Configuration().Servers) > 1 {
			select {
			case <-c.failed:
			default:
				_ = c.raft.LeadershipTransfer().Error() // they would elect one anyway
			}
		}
		c.trans.Close()
		c.store.release()
		c.closeErr = c.raft.Shutdown().Error()
		c.store.close()
		c.fail(errors.New("control: closed"))
		c.mu.Lock()
		c.wakeLocked()
		c.mu.Unlock()
	})
	return c.closeErr
}

// wakeLocked wakes everybody who waits for a change.
func (c *Control) wakeLocked() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// Bootstrapped reports whether this machine belongs to a pool, as far as it
// knows.
func (c *Control) Bootstrapped() bool { return !c.Map().Pool.IsZero() }

// Bootstrap makes this machine the first peer of a new pool. init.Peer.ID is
// Config.Self. Run must be running.
func (c *Control) Bootstrap(ctx context.Context, init state.Init) error {
	if init.Peer.ID != c.cfg.Self {
		return state.Refusal(state.CodeBadCommand, "the first peer of a new pool is this machine, %v, and not %v", c.cfg.Self, init.Peer.ID)
	}
	if m := c.Map(); !m.Pool.IsZero() {
		return state.Refusal(state.CodePoolExists, "this machine belongs to pool %v already", m.Pool)
	}
	// Nobody else is there whom anything could have been promised.
	if err := c.remember(); err != nil {
		return err
	}
	err := c.raft.BootstrapCluster(raft.Configuration{Servers: []raft.Server{{ID: serverID(c.cfg.Self), Address: raft.ServerAddress(serverID(c.cfg.Self))}}}).Error()
	if err != nil && !errors.Is(err, raft.ErrCantBootstrap) {
		return fmt.Errorf("control: new pool: %w", err)
	}
	// ErrCantBootstrap: an earlier attempt got this far, or the machine is in a
	// group already; then the command is refused.
	return c.Propose(ctx, state.Command{Init: &init})
}

// Map returns the pool's configuration as this peer knows it. It is never nil
// and never changes; without a pool it is empty.
func (c *Control) Map() *cluster.Map {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.st.Map
}

// Watch returns a channel that is closed when Map().Version is above after, or
// may have become so: look, and watch again.
func (c *Control) Watch(after uint64) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.st.Map.Version > after {
		done := make(chan struct{})
		close(done)
		return done
	}
	return c.changed
}

// Wait returns the first Map with a version above after, or the context's error.
func (c *Control) Wait(ctx context.Context, after uint64) (*cluster.Map, error) {
	for {
		c.mu.Lock()
		m, changed := c.st.Map, c.changed
		c.mu.Unlock()
		if m.Version > after {
			return m, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-c.failed:
			return nil, c.failErr
		}
	}
}

// Token returns the join token with that hash.
func (c *Control) Token(hash string) (state.Token, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.st.Token(hash); t != nil {
		return *t, true
	}
	return state.Token{}, false
}

// Tokens returns the outstanding tokens.
func (c *Control) Tokens() []state.Token {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]state.Token(nil), c.st.Tokens...)
}

// Authority returns the pool's certificate authority and its version. The bytes
// are shared: read only.
func (c *Control) Authority() ([]byte, uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.st.Authority, c.st.AuthorityVersion
}

// Leader returns the peer that leads the control plane, if one is known. It may
// be this one.
func (c *Control) Leader() (cluster.PeerID, bool) {
	_, id := c.raft.LeaderWithID()
	p, err := cluster.ParseID(string(id))
	return p, err == nil
}

// leaderMoves returns a channel that is closed when another leader, or none, is
// known.
func (c *Control) leaderMoves() <-chan struct{} {
	c.movedMu.Lock()
	defer c.movedMu.Unlock()
	return c.moved
}

// Incarnation returns the number of this daemon start, 0 until the pool has
// given it one.
func (c *Control) Incarnation() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.incarnation
}

// WasDetached reports whether the peer was taken out of the pool, has not come
// back, and is not needed any more: whoever tells it so makes it go, and before the
// consensus group does without its vote the others might not elect a leader.
func (c *Control) WasDetached(peer cluster.PeerID) bool {
	c.mu.Lock()
	detached := slices.Contains(c.st.Detached, peer)
	c.mu.Unlock()
	return detached && !c.Member(peer)
}

// Detached returns a refusal with CodeDetached if this peer was taken out of its
// pool, else nil.
func (c *Control) Detached() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.detached {
		return c.detachedLocked()
	}
	return nil
}

func (c *Control) detachedLocked() error {
	return state.Refusal(state.CodeDetached, "this peer was detached from pool %v: to use the machine again, stop mortar, move %s away, and let it join a pool with \"mortar join\"", c.st.Map.Pool, c.cfg.Dir)
}

// Status is the health of the control plane as one peer sees it.
type Status struct {
	Leader  cluster.PeerID // zero: none is known
	Leading bool           // it is this peer
	Voters  []cluster.PeerID
	Term    uint64
	Applied uint64 // index of the last command applied here
	// Unreachable are the peers that do not answer, known to the leader only.
	Unreachable []cluster.PeerID
	// Problems are the sets that wait for a primary, known to the leader only;
	// see Control.Problems.
	Problems []Problem
}

// Problem is a replica set that waits for a primary.
type Problem struct {
	Set    cluster.SetID `json:"set"`
	Since  time.Time     `json:"since"` // when the present leader began to look for one
	Reason string        `json:"reason"`
}

// WaitVoters returns when as many peers vote, as far as this one knows, as the
// pool should have voters. A pool that has just grown needs a moment for that,
// in which it is as weak as it was.
func (c *Control) WaitVoters(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if m := c.Map(); m.Peer(c.cfg.Self) != nil && len(c.Status().Voters) >= state.VotersOf(m) {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Status returns the state of the control plane.
func (c *Control) Status() Status {
	s := Status{Term: c.raft.CurrentTerm()}
	s.Leader, _ = c.Leader()
	for _, srv := range c.raft.GetConfiguration().Configuration().Servers {
		id, err := cluster.ParseID(string(srv.ID))
		if err == nil && srv.Suffrage == raft.Voter {
			s.Voters = append(s.Voters, id)
		}
	}
	c.mu.Lock()
	s.Applied = c.applied
	lead := c.lead
	m := c.st.Map
	c.mu.Unlock()
	if lead != nil && c.raft.State() == raft.Leader {
		s.Leading = true
		for _, p := range m.Peers {
			if alive, since := c.trans.reachable(serverID(p.ID)); p.ID != c.cfg.Self && !alive && time.Since(since) > time.Second {
				s.Unreachable = append(s.Unreachable, p.ID)
			}
		}
		s.Problems = lead.problems()
	}
	return s
}

// hello is what this peer says first on a connection to another.
func (c *Control) hello() hello {
	c.mu.Lock()
	defer c.mu.Unlock()
	return hello{Pool: c.pooled.Pool, Generation: c.pooled.Generation, From: c.cfg.Self, Boot: c.boot, Incarnation: c.incarnation}
}

// checkHello decides whether to let a peer take part in the consensus. A peer
// that this one does not know is let in: it may be new, and this one late.
func (c *Control) checkHello(h hello) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pooled.Pool.IsZero() {
		return nil // about to join
	}
	if h.Pool != c.pooled.Pool {
		return fmt.Errorf("peer %v belongs to pool %v and this one to %v", h.From, h.Pool, c.pooled.Pool)
	}
	if h.Generation != c.pooled.Generation {
		return fmt.Errorf("peer %v has generation %d of the pool and this one %d: one of them was left out of a recovery", h.From, h.Generation, c.pooled.Generation)
	}
	if slices.Contains(c.st.Detached, h.From) && !c.Member(h.From) {
		return fmt.Errorf("peer %v was detached from the pool", h.From)
	}
	if p := c.st.Map.Peer(h.From); p != nil && h.Incarnation != 0 && h.Incarnation < p.Incarnation {
		return fmt.Errorf("peer %v was started again since (%d, now %d): two machines may have the same identity", h.From, h.Incarnation, p.Incarnation)
	}
	return nil
}
