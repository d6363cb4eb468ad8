package sim_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mortar/internal/brick"
	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/control/state"
	"mortar/internal/disk"
	"mortar/internal/proto"
	"mortar/internal/replica"
)

// whole is a set of three whole nodes in one bubble of synctest: real bricks on disks that lose
// what was not synced, real replicas, a network of queues, and the control plane's own
// decisions. What package sim models, the shells and the disk, is real here; and there
// are thousands of runs there for every one here.
type whole struct {
	t     *testing.T
	vol   cluster.VolumeID
	pool  cluster.ID
	nodes []*wholeNode
	bg    sync.WaitGroup // goroutines that no life waits for
	over  context.Context
	end   context.CancelFunc
	cut   cutter
	dark  atomic.Bool // all have lost their power

	mu       sync.Mutex
	st       *state.State // guarded by mu
	troubled bool         // guarded by mu: a primary is being looked for
}

// wholeNode is a machine: its disk, and the process that serves its brick.
type wholeNode struct {
	w   *whole
	i   int
	id  cluster.BrickID
	mu  sync.Mutex
	mem *disk.Mem // guarded by mu
	now *life     // guarded by mu; nil while it is off
}

// life is one process.
type life struct {
	n     *wholeNode
	rep   *replica.Replica
	brick *brick.Brick
	fs    *disk.Faulty
	stop  context.CancelFunc
	done  chan struct{}
	dead  atomic.Bool // it has lost its power: nothing that it still does reaches anybody

	mu   sync.Mutex
	in   map[*life]chan func() // a link in order for each sender; guarded by mu
	shut bool                  // guarded by mu
}

const (
	wholeHop = 200 * time.Microsecond
	brickAt  = "/b"
)

func (w *whole) identity(n *wholeNode) brick.Identity {
	return brick.Identity{Format: brick.FormatVersion, Pool: w.pool, Volume: w.vol, Brick: n.id}
}

func newWhole(t *testing.T) *whole {
	w := &whole{t: t, vol: cluster.NewID(), pool: cluster.NewID(), st: state.New()}
	w.cut.w = w
	w.over, w.end = context.WithCancel(context.Background())
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	create := &state.CreateVolume{ID: w.vol, Name: "v", Replica: 3, Options: map[string]string{cluster.OptMinInSync: "1"}}
	for i := range 3 {
		n := &wholeNode{w: w, i: i, id: cluster.NewID(), mem: disk.NewMem()}
		w.nodes = append(w.nodes, n)
		must(n.mem.MkdirAll(brickAt, 0o755))
		must(n.mem.SyncDir("/"))
		must(brick.Format(n.mem, brickAt, w.identity(n)))
		name := "n" + strconv.Itoa(i)
		peer := cluster.Peer{ID: cluster.NewID(), Name: name, Addrs: []string{name + ":24007"}}
		if i == 0 {
			must(w.st.Apply(state.Command{Init: &state.Init{Pool: w.pool, Peer: peer}}))
		} else {
			must(w.st.Apply(state.Command{AddPeer: &state.AddPeer{Peer: peer}}))
		}
		create.Bricks = append(create.Bricks, cluster.Brick{ID: n.id, Peer: peer.ID, Host: name, Path: brickAt})
	}
	must(w.st.Apply(state.Command{CreateVolume: create}))
	must(w.st.Apply(state.Command{StartVolume: &state.StartVolume{Volume: w.vol}}))
	for _, n := range w.nodes {
		n.start()
	}
	w.bg.Go(func() { // a set without a primary is looked after
		for w.over.Err() == nil {
			time.Sleep(200 * time.Millisecond)
			if cfg := w.config(); cfg.Primary.IsZero() {
				w.suspect(cfg.Epoch)
			}
		}
	})
	return w
}

func (w *whole) config() cluster.SetConfig {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.st.Map.VolumeByID(w.vol).Sets[0].Clone()
}

func (w *whole) node(id cluster.BrickID) *wholeNode {
	return w.nodes[slices.IndexFunc(w.nodes, func(n *wholeNode) bool { return n.id == id })]
}

func (n *wholeNode) life() *life {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.now
}

// start opens the brick and serves it. What it finds there must be possible.
func (n *wholeNode) start() {
	w := n.w
	l := &life{n: n, done: make(chan struct{}), in: map[*life]chan func(){}}
	n.mu.Lock()
	fs := disk.NewFaulty(n.mem)
	n.mu.Unlock()
	fs.Observe(func(op disk.Op, name string) { w.cut.observe(l, op, name) })
	b, err := brick.Open(brick.Options{
		FS: fs, Dir: brickAt, Identity: w.identity(n), Log: slog.New(slog.DiscardHandler),
		MemTable: 64 << 10, SegmentSize: 64 << 10, Retain: -1, Inline: 4096, SettleAfter: 20 * time.Millisecond, Backlog: 1 << 20,
	})
	if err != nil {
		w.t.Fatalf("n%d cannot be opened: %v", n.i, err)
	}
	l.brick, l.fs = b, fs
	if l.rep, err = replica.New(replica.Config{Set: cluster.SetID{Volume: w.vol}, Brick: n.id, Store: store{b}, Transport: l, Control: l, Log: slog.New(slog.DiscardHandler)}); err != nil {
		w.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	l.stop = stop
	w.bg.Go(func() {
		defer close(l.done)
		err := l.rep.Run(ctx)
		if err != nil && !l.dead.Load() {
			w.t.Errorf("n%d: %v", n.i, err)
		}
		if err := b.Close(err == nil && !l.dead.Load() && l.rep.Kept()); err != nil && !l.dead.Load() {
			w.t.Errorf("n%d closes: %v", n.i, err)
		}
	})
	n.mu.Lock()
	n.now = l
	n.mu.Unlock()
	l.rep.Configure(w.config())
	for _, o := range w.nodes {
		if other := o.life(); other != nil && other != l {
			l.rep.Connected(o.id)
			other.rep.Lost(n.id)
			other.rep.Connected(n.id)
		}
	}
}

// ended takes the process off the network and waits for it.
func (n *wholeNode) ended() {
	l := n.life()
	if l == nil {
		return
	}
	n.mu.Lock()
	n.now = nil
	n.mu.Unlock()
	l.stop()
	<-l.done
	l.mu.Lock()
	l.shut = true
	for _, c := range l.in {
		close(c)
	}
	l.mu.Unlock()
	for _, o := range n.w.nodes {
		if other := o.life(); other != nil {
			other.rep.Lost(n.id)
		}
	}
}

func (l *life) Send(to cluster.BrickID, kind uint8, parts ...[]byte) error {
	t := l.n.w.node(to).life()
	if t == nil || l.dead.Load() {
		return errors.New("not connected")
	}
	var env proto.Envelope
	body, err := codec.DecodePrefix(join(parts), &env)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.shut {
		return errors.New("not connected")
	}
	c := t.in[l]
	if c == nil {
		c = make(chan func(), 1<<16)
		t.in[l] = c
		l.n.w.bg.Go(func() {
			for f := range c {
				time.Sleep(wholeHop)
				if !t.dead.Load() {
					f()
				}
			}
		})
	}
	c <- func() { t.rep.Message(env, kind, body, nil) }
	return nil
}

func (l *life) Flush(cluster.BrickID) {}

func (l *life) Call(ctx context.Context, to cluster.BrickID, kind uint8, parts ...[]byte) ([]byte, error) {
	t := l.n.w.node(to).life()
	if t == nil || l.dead.Load() {
		return nil, errors.New("not connected")
	}
	var env proto.Envelope
	body, err := codec.DecodePrefix(join(parts), &env)
	if err != nil {
		return nil, err
	}
	time.Sleep(wholeHop)
	reply, err := t.rep.Call(ctx, env, kind, body)
	if t.dead.Load() {
		return nil, errors.New("the connection is lost")
	}
	time.Sleep(wholeHop)
	return reply, err
}

func (w *whole) decide(next cluster.SetConfig) error {
	w.mu.Lock()
	err := w.st.Apply(state.Command{SetConfig: &state.SetConfig{Config: next}})
	w.mu.Unlock()
	switch {
	case errors.Is(err, state.ErrStaleEpoch):
		return err
	case err != nil:
		return fmt.Errorf("%w: %w", replica.ErrRefused, err)
	}
	for _, n := range w.nodes {
		if l := n.life(); l != nil {
			l.rep.Configure(w.config())
		}
	}
	return nil
}

func (l *life) Propose(_ context.Context, next cluster.SetConfig) error {
	time.Sleep(wholeHop)
	if l.dead.Load() {
		return errors.New("no answer")
	}
	return l.n.w.decide(next)
}

func (l *life) Suspect(_ context.Context, _ cluster.SetID, epoch cluster.Epoch, _ cluster.BrickID) error {
	if !l.dead.Load() {
		l.n.w.suspect(epoch)
	}
	return nil
}

// suspect looks for a primary.
func (w *whole) suspect(epoch cluster.Epoch) {
	w.mu.Lock()
	busy := w.troubled
	w.troubled = true
	w.mu.Unlock()
	if busy {
		return
	}
	w.bg.Go(func() {
		defer func() {
			w.mu.Lock()
			w.troubled = false
			w.mu.Unlock()
		}()
		f := state.Failover{}
		for began := time.Now(); w.over.Err() == nil; time.Sleep(50 * time.Millisecond) {
			if f.Config = w.config(); f.Config.Epoch != epoch {
				return
			}
			f.Results, f.Elapsed = nil, time.Since(began)
			for _, id := range f.Config.InSync {
				f.Results = append(f.Results, w.seal(id, proto.Seal{Epoch: epoch, Planned: f.Insisted}))
			}
			v := f.Decide()
			if v.Next != nil {
				_ = w.decide(*v.Next) // somebody else was faster
				return
			}
			if !v.Again {
				return
			}
			f.Insisted = v.Insist
		}
	})
}

func (w *whole) seal(id cluster.BrickID, ask proto.Seal) (r state.SealResult) {
	r.Brick = id
	l := w.node(id).life()
	if l == nil {
		return r
	}
	ctx, cancel := context.WithTimeout(w.over, state.SealTimeout)
	defer cancel()
	body, err := l.rep.Call(ctx, proto.Envelope{Set: cluster.SetID{Volume: w.vol}, To: id}, proto.KindSeal, codec.Append(nil, &ask))
	r.Answered = err == nil && !l.dead.Load() && codec.Decode(body, &r.Reply) == nil
	return r
}

// whole waits until all nodes are there, in sync and equal.
func (w *whole) whole() {
	w.t.Helper()
	for began := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		cfg := w.config()
		why := fmt.Sprintf("%+v", cfg)
		if l := w.leader(cfg); l != nil && len(cfg.InSync) == len(w.nodes) {
			ctx, cancel := context.WithTimeout(w.over, 2*time.Second)
			all, err := l.rep.Verify(ctx)
			cancel()
			same := err == nil && len(all) == len(w.nodes)
			for _, d := range all {
				same = same && d.Status == proto.OK && d.Sum == all[cfg.Primary].Sum
			}
			if same {
				return
			}
			why = fmt.Sprintf("%+v, %v", all, err)
		}
		if time.Since(began) > time.Minute {
			for _, n := range w.nodes {
				if l := n.life(); l != nil {
					st, err := l.rep.Status(context.Background())
					w.t.Logf("n%d, dead %v: %+v, %v", n.i, l.dead.Load(), st, err)
				} else {
					w.t.Logf("n%d is off", n.i)
				}
			}
			w.t.Fatalf("not whole after a minute: %s", why)
		}
	}
}

func (w *whole) leader(cfg cluster.SetConfig) *life {
	if cfg.Primary.IsZero() {
		return nil
	}
	return w.node(cfg.Primary).life()
}
