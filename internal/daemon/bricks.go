package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"mortar/internal/api"
	"mortar/internal/brick"
	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/control/state"
	"mortar/internal/proto"
	"mortar/internal/replica"
	"mortar/internal/wire"
)

// bricks serves the bricks of this machine that belong to started volumes.
type bricks struct {
	m   *member
	log *slog.Logger
	wg  sync.WaitGroup // of the runs

	mu   sync.Mutex // guards the fields below
	runs map[cluster.BrickID]*brickRun
	up   [kinds]map[cluster.PeerID]bool // peers that messages can be sent to
	shut bool
}

// brickRun is one brick that shall be served.
type brickRun struct {
	b      *bricks
	id     cluster.BrickID
	set    cluster.SetID
	volume string // name, for logs
	path   string
	stop   context.CancelFunc
	ctx    context.Context
	retry  chan struct{} // holds a token when an administrator wants another try
	// scrubNow holds a token when an administrator wants the brick to be scrubbed.
	scrubNow chan struct{}
	via      kind // of the connections that it uses; guarded by bricks.mu

	mu       sync.Mutex // guards the fields below
	config   cluster.SetConfig
	replica  *replica.Replica // nil while it is not served
	brick    *brick.Brick     // the replica's
	problem  string           // why not
	healPace pace             // of the comparison under way
	rotten   []api.Rotten     // what is shown of what has rotted

	mended time.Time // when it was last made fit to be healed; only loop's
}

// How long to wait before another try to open a brick whose disk is, perhaps,
// not yet mounted.
const (
	reopenFirst = time.Second
	reopenMost  = 30 * time.Second
)

// How long a planned stop may take to hand the bricks over.
const drainTimeout = 2 * time.Second

// recycleMin is the length from which a message's memory is worth using again.
const recycleMin = 16 << 10

func newBricks(m *member) *bricks {
	b := &bricks{m: m, log: m.log.With("part", "bricks"), runs: map[cluster.BrickID]*brickRun{}}
	for k := range b.up {
		b.up[k] = map[cluster.PeerID]bool{}
	}
	return b
}

// set makes the bricks that are served those of a map. It is called from one goroutine.
func (b *bricks) set(next *cluster.Map) {
	self := b.m.keeper.ID()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.shut {
		return
	}
	wanted := map[cluster.BrickID]bool{}
	for _, v := range next.Volumes {
		if v.Status != cluster.VolumeStarted {
			continue
		}
		for i := range v.Bricks {
			if v.Bricks[i].Peer != self {
				continue
			}
			br := &v.Bricks[i]
			wanted[br.ID] = true
			config := v.Sets[i/v.Replica]
			run := b.runs[br.ID]
			if run == nil {
				run = &brickRun{b: b, id: br.ID, set: config.Set, volume: v.Name, path: br.Path, retry: make(chan struct{}, 1), scrubNow: make(chan struct{}, 1), config: config}
				run.via = b.kind(b.m.view.Load(), run.set)
				run.ctx, run.stop = context.WithCancel(b.m.base)
				b.runs[br.ID] = run
				b.wg.Go(run.loop)
				continue
			}
			run.configure(config)
			b.reroute(run)
		}
	}
	for id, run := range b.runs {
		if !wanted[id] {
			run.stop()
			delete(b.runs, id)
		}
	}
}

// close hands over what the bricks do and stops them all. left is called in between.
func (b *bricks) close(left func()) {
	b.mu.Lock()
	b.shut = true
	var runs []*brickRun
	for _, r := range b.runs {
		runs = append(runs, r)
	}
	b.mu.Unlock()
	ctx, cancel := context.WithTimeout(b.m.base, drainTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for _, run := range runs {
		wg.Go(func() {
			if r := run.current(); r != nil {
				if err := r.Drain(ctx); err != nil {
					b.log.Info("a brick was not handed over", "brick", run.id, "error", err)
				}
			}
		})
	}
	wg.Wait()
	left()
	for _, run := range runs {
		run.stop()
	}
	b.wg.Wait()
}

// replica is the replica of a brick; nil while it is not served here.
func (b *bricks) replica(id cluster.BrickID) *replica.Replica {
	if run := b.run(id); run != nil {
		return run.current()
	}
	return nil
}

func (b *bricks) run(id cluster.BrickID) *brickRun {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.runs[id]
}

// ofSet is a replica of the set that is served here, an in-sync one if there is.
func (b *bricks) ofSet(set cluster.SetID) *replica.Replica {
	b.mu.Lock()
	defer b.mu.Unlock()
	var found *replica.Replica
	for _, run := range b.runs {
		if run.set != set {
			continue
		}
		run.mu.Lock()
		r, inSync := run.replica, run.config.IsInSync(run.id)
		run.mu.Unlock()
		if r != nil && (found == nil || inSync) {
			found = r
		}
	}
	return found
}

// served is a brick of the set that is in sync and served here, with its replica; nil: there is none.
func (b *bricks) served(set cluster.SetID) (*replica.Replica, *brick.Brick) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, run := range b.runs {
		if run.set != set {
			continue
		}
		run.mu.Lock()
		r, br, inSync := run.replica, run.brick, run.config.IsInSync(run.id)
		run.mu.Unlock()
		if r != nil && inSync {
			return r, br
		}
	}
	return nil, nil
}

func (r *brickRun) current() *replica.Replica {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.replica
}

func (r *brickRun) configure(config cluster.SetConfig) {
	r.mu.Lock()
	defer r.mu.Unlock()
	same := r.config.Epoch == config.Epoch && r.config.MinInSync == config.MinInSync
	r.config = config
	if r.replica != nil && !same {
		r.replica.Configure(config)
	}
}

// loop serves the brick until it is stopped. A brick that cannot be opened is
// tried again: its disk may be mounted late. One that failed while it was served is not,
// before an administrator says so: what its disk says now may be anything.
func (r *brickRun) loop() {
	pause := reopenFirst
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		opened, err := r.serveApart()
		if r.ctx.Err() != nil {
			return
		}
		if err == nil {
			err = errors.New("it stopped by itself")
		}
		if errors.Is(err, brick.ErrDamaged) {
			if !r.mend(err) {
				return
			}
			continue
		}
		r.unserved(err.Error())
		var again <-chan time.Time
		if !opened {
			timer.Reset(pause)
			pause = min(2*pause, reopenMost)
			again = timer.C
		} else {
			pause = reopenFirst
		}
		select {
		case <-again:
		case <-r.retry:
		case <-r.ctx.Done():
			return
		}
	}
}

// unserved says why the brick is not served, once.
func (r *brickRun) unserved(problem string) {
	r.mu.Lock()
	known := r.problem == problem
	r.problem = problem
	r.mu.Unlock()
	if !known {
		r.b.log.Error("a brick is not served", "volume", r.volume, "path", r.path, "brick", r.id, "error", problem)
	}
}

// again asks for another try, if the brick is not served.
func (r *brickRun) again() {
	select {
	case r.retry <- struct{}{}:
	default:
	}
}

// serveApart is serve in a goroutine of its own: a metadata store that is so
// damaged that it must not go on ends the goroutine that called it.
func (r *brickRun) serveApart() (opened bool, err error) {
	err = fmt.Errorf("the metadata of the brick in %s is damaged and cannot be used (the log of this daemon says where): replace the brick's directory, or look at it with 'mortar brick check'", r.path)
	ended := make(chan struct{})
	go func() { // waited for below
		defer close(ended)
		opened, err = r.serve()
	}()
	<-ended
	return opened, err
}

// serve opens the brick and serves it until it is stopped or fails.
func (r *brickRun) serve() (opened bool, err error) {
	v := r.b.m.view.Load().volume[r.id]
	if v == nil {
		return false, errors.New("its volume is gone")
	}
	o := brickOptions(r.path, r.b.m.pool, v, r.set, r.id, r.b.log)
	o.Alone, o.Others = r.alone, r.others
	b, err := brick.Open(o)
	if err != nil {
		return false, err
	}
	store := store{b}
	log := r.b.m.log.With("part", "replica", "volume", r.volume)
	rep, err := replica.New(replica.Config{
		Set: r.set, Brick: r.id, Store: store, Transport: transport{r.b, r.set}, Control: setControl{r.b.m}, Log: log,
	})
	if err != nil {
		return true, errors.Join(err, store.Close(false))
	}
	r.mu.Lock()
	rep.Configure(r.config)
	r.replica, r.brick, r.problem = rep, b, ""
	r.mu.Unlock()
	r.b.introduce(r)
	scrubbing, stopScrub := context.WithCancel(r.ctx)
	scrubbed := make(chan struct{})
	go func() { // waited for below
		defer close(scrubbed)
		r.scrub(scrubbing, b)
	}()
	err = rep.Run(r.ctx)
	stopScrub()
	<-scrubbed
	r.mu.Lock()
	r.replica, r.brick = nil, nil
	r.mu.Unlock()
	r.b.farewell(r)
	return true, errors.Join(err, store.Close(err == nil && rep.Kept()))
}

// introduce tells a replica that has begun whom it can reach, and its siblings
// on this machine that it is there.
func (b *bricks) introduce(r *brickRun) {
	v := b.m.view.Load()
	b.mu.Lock()
	defer b.mu.Unlock()
	self := b.m.keeper.ID()
	for _, id := range r.members() {
		if id == r.id {
			continue
		}
		if v.owner[id] != self {
			if b.up[r.via][v.owner[id]] {
				r.tell(id, true)
			}
			continue
		}
		if other := b.runs[id]; other != nil && other.current() != nil {
			r.tell(id, true)
			other.tell(r.id, true)
		}
	}
}

// farewell tells the siblings on this machine that a replica has ended.
func (b *bricks) farewell(r *brickRun) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, id := range r.members() {
		if other := b.runs[id]; other != nil && id != r.id {
			other.tell(r.id, false)
		}
	}
}

func (r *brickRun) members() []cluster.BrickID {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.config.Members
}

// tell passes on that another brick of the set can be reached, or not.
func (r *brickRun) tell(other cluster.BrickID, connected bool) {
	rep := r.current()
	switch {
	case rep == nil:
	case connected:
		rep.Connected(other)
	default:
		rep.Lost(other)
	}
}

// reroute changes over to the other kind of connection, if the volume's option
// was changed. Messages on the two kinds overtake each other, so every
// conversation begins anew.
func (b *bricks) reroute(run *brickRun) {
	v := b.m.view.Load()
	k := b.kind(v, run.set)
	if k == run.via {
		return
	}
	run.via = k
	self := b.m.keeper.ID()
	for _, id := range run.members() {
		if peer := v.owner[id]; peer != self {
			run.tell(id, false)
			if b.up[k][peer] {
				run.tell(id, true)
			}
		}
	}
}

// kind is the kind of connection that a set's messages use.
func (b *bricks) kind(v *view, set cluster.SetID) kind {
	if v.clear[set.Volume] {
		return plain
	}
	return secure
}

func (b *bricks) peerUp(peer cluster.PeerID, k kind)   { b.peerIs(peer, k, true) }
func (b *bricks) peerDown(peer cluster.PeerID, k kind) { b.peerIs(peer, k, false) }

// peerIs tells the replicas which of their set's bricks can be reached, or not.
func (b *bricks) peerIs(peer cluster.PeerID, k kind, up bool) {
	v := b.m.view.Load()
	b.mu.Lock()
	defer b.mu.Unlock()
	if up {
		b.up[k][peer] = true
	} else {
		delete(b.up[k], peer)
	}
	for _, run := range b.runs {
		if run.via != k {
			continue
		}
		for _, id := range run.members() {
			if v.owner[id] == peer {
				run.tell(id, up)
			}
		}
	}
}

// peerDied tells the replicas that the process which had the bricks of a peer has
// certainly ended (core.Machine.Died).
func (b *bricks) peerDied(peer cluster.PeerID) {
	v := b.m.view.Load()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, run := range b.runs {
		for _, id := range run.members() {
			if rep := run.current(); rep != nil && v.owner[id] == peer {
				rep.Died(id)
			}
		}
	}
}

// carry takes a replica's message from a peer to the replica it is for.
func (b *bricks) carry(from cluster.PeerID, c *wire.Conn, msg wire.Message) {
	var env proto.Envelope
	body, err := codec.DecodePrefix(msg.Body, &env)
	if err != nil {
		c.Close(fmt.Errorf("%w: kind %d: %w", wire.ErrFrame, msg.Kind, err))
		return
	}
	// A peer speaks for its own bricks. Seal comes from the control plane, for which
	// any peer may speak; a set's epoch protects it.
	v := b.m.view.Load()
	if msg.Kind != proto.KindSeal && v.owner[env.From] != from {
		b.refuse(c, msg, fmt.Errorf("brick %s is not on peer %s as far as this peer knows", env.From, from))
		return
	}
	rep := b.replica(env.To)
	if rep == nil {
		b.refuse(c, msg, errNoReplica)
		return
	}
	if msg.ID == 0 {
		var done func()
		if len(msg.Body) >= recycleMin {
			done = func() { c.Recycle(msg.Body) }
		}
		rep.Message(env, msg.Kind, body, done)
		return
	}
	b.call(c, msg, func(ctx context.Context) ([]byte, error) { return rep.Call(ctx, env, msg.Kind, body) })
}

// call answers a call in a goroutine of its own; how many of them there are the
// connection bounds.
func (b *bricks) call(c *wire.Conn, msg wire.Message, f func(ctx context.Context) ([]byte, error)) {
	b.m.servedMu.Lock()
	defer b.m.servedMu.Unlock()
	if b.m.closed {
		return
	}
	b.m.serving.Go(func() {
		body, err := f(b.m.base)
		c.Reply(msg, proto.Answer(body, err)...)
	})
}

func (b *bricks) refuse(c *wire.Conn, msg wire.Message, err error) {
	if msg.ID != 0 {
		c.Reply(msg, proto.Answer(nil, err)...)
		return
	}
	b.log.Debug("a replica's message was dropped", "kind", msg.Kind, "reason", err)
}

// transport is a set's way to its other bricks. It implements replica.Transport.
type transport struct {
	b   *bricks
	set cluster.SetID
}

var _ replica.Transport = transport{}

// Send implements replica.Transport.
func (t transport) Send(to cluster.BrickID, msg uint8, parts ...[]byte) error {
	v := t.b.m.view.Load()
	peer := v.owner[to]
	if peer == t.b.m.keeper.ID() {
		rep, env, body, err := t.sibling(to, parts)
		if err != nil {
			return err
		}
		rep.Message(env, msg, body, nil)
		return nil
	}
	c := t.b.m.links.conn(peer, t.b.kind(v, t.set))
	if c == nil {
		return errNotConnected
	}
	err := c.Queue(msg, parts...)
	if errors.Is(err, wire.ErrBacklog) {
		// What comes after this message would leave a gap: begin anew.
		c.Close(err)
	}
	return err
}

// Flush implements replica.Transport.
func (t transport) Flush(to cluster.BrickID) {
	v := t.b.m.view.Load()
	// Messages to a brick of this machine do not wait.
	if peer := v.owner[to]; peer != t.b.m.keeper.ID() {
		if c := t.b.m.links.conn(peer, t.b.kind(v, t.set)); c != nil {
			c.Flush()
		}
	}
}

// Call implements replica.Transport.
func (t transport) Call(ctx context.Context, to cluster.BrickID, msg uint8, parts ...[]byte) ([]byte, error) {
	v := t.b.m.view.Load()
	peer := v.owner[to]
	if peer == t.b.m.keeper.ID() {
		rep, env, body, err := t.sibling(to, parts)
		if err != nil {
			return nil, err
		}
		return rep.Call(ctx, env, msg, body)
	}
	return t.b.m.links.call(ctx, peer, t.b.kind(v, t.set), msg, parts...)
}

// sibling is a brick of the set on this very machine, and a copy of what it is sent.
func (t transport) sibling(to cluster.BrickID, parts [][]byte) (*replica.Replica, proto.Envelope, []byte, error) {
	var env proto.Envelope
	rep := t.b.replica(to)
	if rep == nil {
		return nil, env, nil, errNoReplica
	}
	var all []byte
	for _, p := range parts {
		all = append(all, p...)
	}
	body, err := codec.DecodePrefix(all, &env)
	return rep, env, body, err
}

// setControl is the control plane as replicas see it. It implements replica.Control.
type setControl struct{ m *member }

var _ replica.Control = setControl{}

// Propose implements replica.Control.
func (c setControl) Propose(ctx context.Context, next cluster.SetConfig) error {
	err := c.m.propose(ctx, state.Command{SetConfig: &state.SetConfig{Config: next}})
	var refusal *state.Error
	if errors.As(err, &refusal) && refusal.Code != state.CodeNoLeader && refusal.Code != state.CodeStaleEpoch {
		return fmt.Errorf("%w: %w", replica.ErrRefused, err)
	}
	return err
}

// Suspect implements replica.Control.
func (c setControl) Suspect(ctx context.Context, set cluster.SetID, epoch cluster.Epoch, from cluster.BrickID) error {
	plane := c.m.plane.Load()
	if plane == nil {
		return errStarting
	}
	return plane.Suspect(ctx, set, epoch, from)
}
