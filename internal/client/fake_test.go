package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeSet is a replica set as its clients see it: some daemons, one state. It
// remembers the answer to every numbered change, and counts.
type fakeSet struct {
	t       *testing.T
	net     *wire.Network
	volume  cluster.VolumeID
	daemons []*fakeDaemon

	mu       sync.Mutex
	seq      uint64
	answers  map[uint64]proto.DoReply
	given    []fsop.Ino        // whose windows were
	executed map[uint64]int    // by number
	names    map[string]uint64 // made by Create, with the number that made it
	acked    uint64
	closed   bool // CloseSession arrived
	cutReply func(do *proto.Do) bool
	setlk    func(op *fsop.Setlk, number uint64) (errno fsop.Errno, waits bool)
	version  uint64
	options  []proto.Option
	status   proto.Status // of the map
	ended    cluster.SessionID
	useless  bool // no daemon says that it can be home
}

// fakeDaemon is one of the set's daemons.
type fakeDaemon struct {
	s    *fakeSet
	name string
	id   cluster.PeerID

	mu       sync.Mutex
	inSync   bool
	serving  bool // answers pings with a lease
	mute     bool // answers nothing
	epoch    cluster.Epoch
	conns    map[*fakeConn]bool
	attaches []proto.Attach
	pre      []proto.Hold
	forgets  []proto.Hold
	acks     []uint64
	useless  int           // GetMap arrived while it was
	goodbyes int           // Lapsed arrived
	goodbye  func()        // called then
	block    chan struct{} // reads wait for it, if set
	refused  int           // attaches
	ctx      context.Context
	cancel   context.CancelFunc
	wg       sync.WaitGroup
}

type fakeConn struct {
	d        *fakeDaemon
	conn     *wire.Conn
	attached bool
	lapsed   bool
	useless  bool // it was told so
}

func newSet(t *testing.T, n int) *fakeSet {
	s := &fakeSet{
		t: t, net: wire.NewNetwork(1), volume: cluster.NewID(), seq: 1, version: 1,
		answers: map[uint64]proto.DoReply{}, executed: map[uint64]int{}, names: map[string]uint64{},
	}
	for i := range n {
		s.daemons = append(s.daemons, &fakeDaemon{
			s: s, name: fmt.Sprintf("d%d", i), id: cluster.NewID(),
			inSync: true, serving: true, conns: map[*fakeConn]bool{},
		})
	}
	for _, d := range s.daemons {
		d.start()
	}
	t.Cleanup(func() {
		for _, d := range s.daemons {
			d.stop()
		}
	})
	return s
}

func (d *fakeDaemon) start() {
	l, err := d.s.net.Listen(d.name + ":1")
	if err != nil {
		d.s.t.Error(err)
		return
	}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	d.accept(l)
}

// accept serves a listener until the daemon stops.
func (d *fakeDaemon) accept(l net.Listener) {
	ctx := d.ctx
	d.wg.Go(func() {
		<-ctx.Done()
		l.Close()
	})
	d.wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			c := &fakeConn{d: d}
			c.conn = wire.New(nc, wire.Options{Handler: c})
			d.mu.Lock()
			d.conns[c] = true
			d.mu.Unlock()
			d.wg.Go(func() {
				c.conn.Run(ctx)
				d.mu.Lock()
				delete(d.conns, c)
				d.mu.Unlock()
			})
		}
	})
}

// stop ends the daemon; start brings it back.
func (d *fakeDaemon) stop() {
	if d.cancel == nil {
		return
	}
	d.cancel()
	d.cancel = nil
	d.mu.Lock()
	if d.block != nil {
		close(d.block)
		d.block = nil
	}
	d.mu.Unlock()
	d.wg.Wait()
}

func (d *fakeDaemon) set(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
}

// cut ends all connections of the daemon.
func (d *fakeDaemon) cut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for c := range d.conns {
		c.conn.Close(errors.New("cut"))
	}
}

// attachedConns returns how many sessions have their home here.
func (d *fakeDaemon) attachedConns() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for c := range d.conns {
		if c.attached {
			n++
		}
	}
	return n
}

// inval sends an Inval to all sessions attached here.
func (d *fakeDaemon) inval(i *proto.Inval) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for c := range d.conns {
		if c.attached {
			c.conn.Send(proto.KindInval, codec.Append(nil, i))
		}
	}
}

func (s *fakeSet) volumeMap() *proto.VolumeMap {
	s.mu.Lock()
	defer s.mu.Unlock()
	vm := &proto.VolumeMap{Version: s.version, Volume: s.volume, Options: s.options, Status: s.status, Serves: !s.useless}
	for _, d := range s.daemons {
		vm.Bricks = append(vm.Bricks, proto.BrickAddr{Peer: d.id, Brick: d.id, Addrs: []string{d.name + ":1"}, InSync: true})
	}
	return vm
}

// pushMap sends a new version of the map to everybody.
func (s *fakeSet) pushMap() {
	s.mu.Lock()
	s.version++
	s.mu.Unlock()
	vm := codec.Append(nil, s.volumeMap())
	for _, d := range s.daemons {
		d.mu.Lock()
		for c := range d.conns {
			c.conn.Send(proto.KindVolumeMap, vm)
		}
		d.mu.Unlock()
	}
}

// Message implements wire.Handler.
func (c *fakeConn) Message(_ *wire.Conn, m wire.Message) {
	d, s := c.d, c.d.s
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mute {
		return
	}
	decode := func(v codec.Coded) {
		if err := codec.Decode(m.Body, v); err != nil {
			s.t.Errorf("kind %d: %v", m.Kind, err)
		}
	}
	switch m.Kind {
	case proto.KindGetMap:
		decode(new(proto.GetMap))
		vm := s.volumeMap()
		if c.useless = !vm.Serves; c.useless {
			d.useless++
		}
		c.conn.Reply(m, codec.Append(nil, vm))
	case proto.KindHold:
		var f proto.Forget
		decode(&f)
		d.pre = append(d.pre, f.Holds...)
	case proto.KindAttach:
		var a proto.Attach
		decode(&a)
		a.Holds = append(d.pre, a.Holds...)
		d.pre = nil
		r := proto.AttachReply{Seq: 1, Opened: 1 + int64(a.Session>>1), Epoch: d.epoch}
		s.mu.Lock()
		ended := s.ended == a.Session
		s.mu.Unlock()
		if c.useless {
			s.t.Error("it asks a daemon to be home that says that it cannot")
		}
		switch {
		case ended:
			r = proto.AttachReply{Status: proto.SessionEnded, Text: "it was out of touch"}
		case c.attached:
			s.t.Error("attached twice on one connection")
		case !d.inSync:
			d.refused++
			r = proto.AttachReply{Status: proto.NotServing, Text: "not in sync"}
		default:
			c.attached, c.lapsed = true, true
			d.attaches = append(d.attaches, a)
		}
		c.conn.Reply(m, codec.Append(nil, &r))
	case proto.KindPing:
		var p proto.Ping
		decode(&p)
		c.lapsed = c.lapsed && !d.serving
		c.conn.Reply(m, codec.Append(nil, &proto.Pong{Stamp: p.Stamp, Serving: d.serving, Lease: uint64(cluster.Lease)}))
	case proto.KindForget:
		var f proto.Forget
		decode(&f)
		d.forgets = append(d.forgets, f.Holds...)
	case proto.KindInvalAck:
		var a proto.InvalAck
		decode(&a)
		d.acks = append(d.acks, a.Seq)
	case proto.KindDo:
		var do proto.Do
		decode(&do)
		if !c.attached {
			s.t.Error("an operation before Attach")
			return
		}
		if !d.inSync {
			c.conn.Reply(m, codec.Append(nil, &proto.DoReply{Status: proto.NotServing}))
			return
		}
		if block := d.block; block != nil && !do.Op.Kind().Mutates() {
			d.wg.Go(func() {
				<-block
				r := s.do(&do)
				c.conn.Reply(m, codec.Append(nil, &r))
			})
			return
		}
		if op, ok := do.Op.(*fsop.Setlk); ok {
			s.mu.Lock()
			errno, waits := s.setlk(op, do.Number)
			s.mu.Unlock()
			if !waits {
				c.conn.Reply(m, codec.Append(nil, &proto.DoReply{Errno: errno, Reply: fsop.Reply{Seq: 1, Attr: fsop.Attr{Ino: op.Ino}}}))
			}
			return
		}
		r := s.do(&do)
		s.mu.Lock()
		cut := s.cutReply
		s.mu.Unlock()
		if cut != nil && cut(&do) {
			c.conn.Close(errors.New("cut before the reply"))
			return
		}
		c.conn.Reply(m, codec.Append(nil, &r))
	case proto.KindLapsed:
		d.goodbyes++
		if d.goodbye != nil {
			d.goodbye()
		}
	default:
		s.t.Errorf("unexpected kind %d", m.Kind)
	}
}

// do carries out an operation once per number.
func (s *fakeSet) do(do *proto.Do) proto.DoReply {
	s.mu.Lock()
	defer s.mu.Unlock()
	if do.Number != 0 {
		if do.Number < s.acked {
			s.t.Errorf("number %d came after it was acknowledged (%d)", do.Number, s.acked)
		}
		if r, ok := s.answers[do.Number]; ok {
			return r
		}
		s.executed[do.Number]++
		s.acked = max(s.acked, do.Acked)
		for n := range s.answers {
			if n < s.acked {
				delete(s.answers, n)
			}
		}
		s.seq++
	}
	r := proto.DoReply{Reply: fsop.Reply{Seq: s.seq}}
	switch op := do.Op.(type) {
	case *fsop.Create:
		if _, ok := s.names[op.Name]; ok {
			r.Errno = fsop.EEXIST
			break
		}
		s.names[op.Name] = do.Number
		r.Reply.Attr = fsop.Attr{Ino: fsop.Ino(1000 + do.Number)}
	case *fsop.Lookup:
		n, ok := s.names[op.Name]
		if !ok {
			r.Errno = fsop.ENOENT
			break
		}
		r.Reply.Attr = fsop.Attr{Ino: fsop.Ino(1000 + n)}
	case *fsop.Getattr:
		r.Reply.Attr = fsop.Attr{Ino: op.Ino}
	case *fsop.Write:
		r.Reply.Attr = fsop.Attr{Ino: op.Ino, Size: op.Off + uint64(len(op.Data))}
		r.Reply.Data = slices.Clone(op.Data[:min(len(op.Data), 64)])
	case *fsop.Tmpfile:
		r.Reply.Attr = fsop.Attr{Ino: fsop.Ino(1000 + do.Number)}
	case *fsop.CloseWindow:
		s.given = append(s.given, op.Ino)
	case *fsop.CloseSession:
		s.closed = true
	}
	if do.Number != 0 {
		s.answers[do.Number] = r
	}
	return r
}

// fakeKernel records what it is told.
type fakeKernel struct {
	mu        sync.Mutex
	drops     int
	begun     int // calls of Invalidate
	effects   []proto.Effect
	invals    []uint64
	holds     []proto.Hold
	forgot    []proto.Hold
	hold      chan struct{} // Invalidate waits for it, if set
	held      int           // how many Invals waited for hold
	inDrop    chan struct{} // DropAll waits for it, if set
	droppedAt []time.Duration
}

func (k *fakeKernel) Invalidate(ctx context.Context, seq uint64, effects []proto.Effect) error {
	k.mu.Lock()
	k.effects = append(k.effects, effects...)
	hold := k.hold
	k.begun++
	if hold != nil {
		k.held++
	}
	k.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.invals = append(k.invals, seq)
	return nil
}

func (k *fakeKernel) DropAll(context.Context) error {
	k.mu.Lock()
	wait := k.inDrop
	k.drops++
	k.droppedAt = append(k.droppedAt, monotonic())
	k.mu.Unlock()
	if wait != nil {
		<-wait
	}
	return nil
}

func (k *fakeKernel) Holds() []proto.Hold {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.forgot = nil
	return slices.Clone(k.holds)
}

func (k *fakeKernel) Changed(fsop.Ino, uint64)     {}
func (k *fakeKernel) Vacant(fsop.Ino, string) bool { return true }

func (k *fakeKernel) Forgotten() []proto.Hold {
	k.mu.Lock()
	defer k.mu.Unlock()
	f := k.forgot
	k.forgot = nil
	return f
}

func (k *fakeKernel) dropCount() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.drops
}

// newClient runs a client that knows the addresses of the set's daemons.
func newClient(t *testing.T, s *fakeSet, k *fakeKernel, change ...func(*Config)) *Client {
	t.Helper()
	cfg := Config{
		Volume: "v", Name: "test", Kernel: k, Dial: dialerOf(s),
	}
	for _, d := range s.daemons {
		cfg.Addrs = append(cfg.Addrs, d.name+":1")
	}
	for _, f := range change {
		f(&cfg)
	}
	c := New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Error("Run did not return")
		}
	})
	return c
}

func awaitReady(t *testing.T, c *Client) {
	t.Helper()
	select {
	case <-c.Ready():
	case <-time.After(5 * time.Second):
		t.Fatal("no home")
	}
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func dialerOf(s *fakeSet) func(context.Context, cluster.PeerID, string) (net.Conn, error) {
	return func(ctx context.Context, _ cluster.PeerID, addr string) (net.Conn, error) {
		return s.net.Dial(ctx, "client", addr)
	}
}
