package replica_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica"
	"mortar/internal/wire"
)

// memStore is a Store in memory whose file system is the extended attributes
// of the root directory. It survives the death of its replica.
type memStore struct {
	mu        sync.Mutex
	entries   []proto.Entry
	applied   int // entries applied; flushed ≤ applied
	flushed   int // what a rewind cannot go behind
	xattr     map[string]string
	replies   map[string]*fsop.Reply
	sess      map[cluster.SessionID]replica.SessionInfo
	locks     map[fsop.Ino]lockHolder
	windows   map[fsop.Ino]cluster.SessionID
	whole     bool
	base      cluster.Pos
	image     *memSource // the state at base, if that is not the beginning
	failed    chan struct{}
	giveUp    bool // the next Execute ends its goroutine, as a store does that must not go on
	err       error
	heals     int
	epoch     cluster.Epoch // promised
	failHeals int           // so many comparisons fail first
	full      bool          // there is no room
	taken     uint64        // of 1 TiB
	room      uint64        // what the rest of the set can take, as it was told
	orphans   []fsop.Ino    // in order
	disk      slowDisk
	handing   time.Duration // that Flush takes
}

// slowDisk is what a store flushes to. The zero value flushes at once.
type slowDisk struct {
	takes   time.Duration // a flush
	durable uint64        // if takes is set
	flushes int
}

type lockHolder struct {
	session cluster.SessionID
	owner   uint64
}

func newMemStore() *memStore {
	s := &memStore{whole: true, failed: make(chan struct{})}
	s.clear()
	return s
}

// clear goes back to the state at base.
func (s *memStore) clear() {
	s.applied, s.windows = 0, map[fsop.Ino]cluster.SessionID{}
	if i := s.image; i != nil {
		s.xattr, s.sess, s.replies, s.locks = maps.Clone(i.xattr), maps.Clone(i.sess), maps.Clone(i.reply), maps.Clone(i.locks)
		return
	}
	s.xattr, s.replies = map[string]string{}, map[string]*fsop.Reply{}
	s.sess, s.locks = map[cluster.SessionID]replica.SessionInfo{}, map[fsop.Ino]lockHolder{}
}

func (s *memStore) Tail() cluster.Pos {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tail()
}

func (s *memStore) tail() cluster.Pos {
	if len(s.entries) == 0 {
		return s.base
	}
	return s.entries[len(s.entries)-1].Pos
}

func (s *memStore) History() []cluster.Pos {
	s.mu.Lock()
	defer s.mu.Unlock()
	var h []cluster.Pos
	if s.base != (cluster.Pos{}) {
		h = append(h, s.base)
	}
	for _, e := range s.entries {
		if len(h) == 0 || h[len(h)-1].Epoch != e.Pos.Epoch {
			h = append(h, e.Pos)
		}
	}
	return h
}
func (s *memStore) Whole() bool { return s.whole }
func (s *memStore) Clean() bool { return len(s.entries) == 0 && s.base == cluster.Pos{} }
func (s *memStore) Flush() error {
	s.mu.Lock()
	d := s.handing
	s.mu.Unlock()
	time.Sleep(d)
	return nil
}
func (s *memStore) Durable() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.disk.takes == 0 {
		return s.tail().Seq
	}
	return s.disk.durable
}
func (s *memStore) Commit(uint64)           {}
func (s *memStore) Promised() cluster.Epoch { return s.epoch }
func (s *memStore) Promise(e cluster.Epoch) error {
	s.epoch = e
	return nil
}
func (s *memStore) Admit(op fsop.Op) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if op.Kind() == fsop.KindSetxattr && s.full {
		return fsop.ENOSPC
	}
	return nil
}
func (s *memStore) Free() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return 1<<40 - s.taken
}
func (s *memStore) SetRoom(n uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.room = n
}
func (s *memStore) Swept(int) []fsop.Ino    { return nil }
func (s *memStore) Failed() <-chan struct{} { return s.failed }
func (s *memStore) Err() error              { return s.err }
func (s *memStore) Orphans(after fsop.Ino, limit int) []fsop.Ino {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, _ := slices.BinarySearch(s.orphans, after+1)
	return slices.Clone(s.orphans[i:min(i+limit, len(s.orphans))])
}
func (s *memStore) LastTime() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.entries) == 0 {
		return 0
	}
	return s.entries[len(s.entries)-1].Time
}
func (s *memStore) Sync(ctx context.Context, seq uint64) error {
	s.mu.Lock()
	takes, tail := s.disk.takes, s.tail().Seq
	s.disk.flushes++
	s.mu.Unlock()
	select {
	case <-time.After(takes):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.disk.durable = max(s.disk.durable, tail)
	return nil
}
func (s *memStore) Sessions() []replica.SessionInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	var r []replica.SessionInfo
	for _, i := range s.sess {
		r = append(r, i)
	}
	return r
}

func (s *memStore) Rewind(pos cluster.Pos) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := int(pos.Seq - s.base.Seq)
	if pos.Seq < s.base.Seq || n < s.flushed {
		return replica.ErrTooFar
	}
	s.entries = s.entries[:n]
	s.clear()
	for i := range s.entries {
		if _, err := s.do(&s.entries[i]); err != nil {
			return err
		}
	}
	return nil
}

func (s *memStore) Execute(e *proto.Entry, raw []byte) (*replica.Result, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.giveUp {
		s.err = errors.New("gave up")
		runtime.Goexit()
	}
	if e.Number != 0 {
		if r := s.replies[key(e)]; r != nil {
			return &replica.Result{Reply: *r, Dup: true}, nil
		}
	}
	if _, opens := e.Op.(*fsop.OpenSession); e.Session != 0 && !opens {
		if i, known := s.sess[e.Session]; !known || i.Away {
			return nil, fsop.ENOTCONN
		}
	}
	if e.Pos.Seq != s.tail().Seq+1 {
		return nil, fmt.Errorf("%v after %v", e.Pos, s.tail())
	}
	res, err := s.do(e)
	if err != nil {
		return nil, err
	}
	res.Raw = codec.Append(nil, e)
	kept := new(proto.Entry)
	if err := codec.Decode(bytes.Clone(res.Raw), kept); err != nil {
		return nil, err
	}
	s.entries = append(s.entries, *kept)
	return res, nil
}

func (s *memStore) Answered(session cluster.SessionID, number uint64) (fsop.Reply, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.replies[key(&proto.Entry{Session: session, Number: number})]; r != nil {
		return *r, true, nil
	}
	return fsop.Reply{}, false, nil
}

func key(e *proto.Entry) string { return fmt.Sprint(e.Session, e.Number) }

func (s *memStore) do(e *proto.Entry) (*replica.Result, error) {
	res := &replica.Result{Reply: fsop.Reply{Seq: e.Pos.Seq}}
	switch op := e.Op.(type) {
	case *fsop.Setxattr:
		s.xattr[op.Name] = string(op.Value)
		res.Effects = []proto.Effect{{Ino: op.Ino}}
	case *fsop.Write:
		s.xattr[fmt.Sprintf("%d@%d", op.Ino, op.Off)] = string(op.Data)
		res.Effects = []proto.Effect{{Ino: op.Ino}}
		if op.Window&fsop.WindowAsk != 0 && s.windows[op.Ino] == 0 {
			s.windows[op.Ino], res.Reply.Window = e.Session, true
		}
	case *fsop.Create: // as much of it as concerns windows
		res.Effects = []proto.Effect{{Ino: op.Parent}, {Ino: op.Parent, Name: op.Name}}
	case *fsop.Rmdir:
		res.Effects = []proto.Effect{{Ino: op.Parent}, {Ino: op.Parent, Name: op.Name}}
	case *fsop.Rename:
		res.Effects = []proto.Effect{{Ino: op.Parent, Name: op.Name}, {Ino: op.NewParent, Name: op.NewName}}
	case *fsop.OpenWindow:
		if s.windows[op.Ino] == 0 {
			s.windows[op.Ino], res.Reply.Window = e.Session, true
			res.Effects = []proto.Effect{{Ino: op.Ino, Names: true}}
		}
	case *fsop.CloseWindow:
		if s.windows[op.Ino] == cluster.SessionID(op.Session) {
			delete(s.windows, op.Ino)
			res.Released = []fsop.Ino{op.Ino}
		}
	case *fsop.OpenSession:
		i, known := s.sess[e.Session]
		switch {
		case op.Opened != 0 && i.Opened != op.Opened:
			return nil, fsop.ESTALE
		case known && i.Owner != op.Owner:
			return nil, fsop.EPERM
		case !known:
			i = replica.SessionInfo{ID: e.Session, Client: op.Client, Owner: op.Owner, Opened: e.Time}
		}
		i.Away = false
		s.sess[e.Session] = i
	case *fsop.CloseSession:
		id := cluster.SessionID(op.Session)
		if i, known := s.sess[id]; known && op.Away {
			i.Away = true
			s.sess[id] = i
		} else {
			delete(s.sess, id)
		}
		for ino, h := range s.locks {
			if h.session == cluster.SessionID(op.Session) {
				delete(s.locks, ino)
				res.Released = append(res.Released, ino)
			}
		}
	case *fsop.Setlk:
		h, held := s.locks[op.Ino]
		me := lockHolder{e.Session, op.Lock.Owner}
		switch {
		case op.Lock.Type == fsop.LockUnlock:
			if held && h == me {
				delete(s.locks, op.Ino)
				res.Released = []fsop.Ino{op.Ino}
			}
		case held && h != me:
			return nil, fsop.EAGAIN
		default:
			s.locks[op.Ino] = me
		}
	case *fsop.Reap:
		s.orphans = slices.DeleteFunc(s.orphans, func(ino fsop.Ino) bool { return slices.Contains(op.Inos, ino) })
	case *fsop.Noop:
	default:
		return nil, fsop.EOPNOTSUPP
	}
	if e.Number != 0 {
		r := res.Reply
		s.replies[key(e)] = &r
	}
	return res, nil
}

func (s *memStore) Read(_ context.Context, op fsop.Op) (*fsop.Reply, uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	seq := s.tail().Seq
	switch op := op.(type) {
	case *fsop.Getxattr:
		v, ok := s.xattr[op.Name]
		if !ok {
			return &fsop.Reply{Seq: seq}, seq, fsop.ENODATA
		}
		return &fsop.Reply{Seq: seq, Data: []byte(v)}, seq, nil
	case *fsop.Getattr:
		return &fsop.Reply{Seq: seq, Attr: fsop.Attr{Ino: op.Ino, Change: seq, Window: uint64(s.windows[op.Ino])}}, seq, nil
	case *fsop.Lookup:
		if op.Name == "directory 5" {
			return &fsop.Reply{Seq: seq, Attr: fsop.Attr{Ino: 5, Mode: syscall.S_IFDIR, Change: seq}}, seq, nil
		}
		return nil, seq, fsop.ENOENT
	}
	return nil, 0, fsop.EOPNOTSUPP
}

func (s *memStore) Entries(after uint64, _ int) ([][]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if after < s.base.Seq {
		return nil, replica.ErrTrimmed
	}
	var r [][]byte
	for i := range s.entries[after-s.base.Seq:] {
		r = append(r, codec.Append(nil, &s.entries[after-s.base.Seq:][i]))
		if len(r) == 10 {
			break
		}
	}
	return r, nil
}

type memSource struct {
	pos   cluster.Pos
	xattr map[string]string
	sess  map[cluster.SessionID]replica.SessionInfo
	reply map[string]*fsop.Reply
	locks map[fsop.Ino]lockHolder
}

func (m *memSource) Pos() cluster.Pos                                    { return m.pos }
func (m *memSource) Close()                                              {}
func (m *memSource) Serve(_ context.Context, req []byte) ([]byte, error) { return req, nil }

// sources stands for the bytes that a comparison would move.
var _ replica.Source = (*memSource)(nil)

func (s *memStore) Source() (replica.Source, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &memSource{s.tail(), maps.Clone(s.xattr), maps.Clone(s.sess), maps.Clone(s.replies), maps.Clone(s.locks)}, nil
}

func (s *memStore) Digest(context.Context) (replica.Digest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := replica.Digest{Pos: s.tail()}
	copy(d.Sum[:], s.text())
	return d, nil
}

func (s *memStore) Block(context.Context, fsop.Ino, uint64) (replica.Block, error) {
	return replica.Block{}, errors.New("nothing has blocks here")
}

func (s *memStore) text() string {
	var b bytes.Buffer
	for _, k := range slices.Sorted(maps.Keys(s.xattr)) {
		fmt.Fprintf(&b, "%s=%s;", k, s.xattr[k])
	}
	return b.String()
}

func (s *memStore) Heal(ctx context.Context, pos cluster.Pos, call func(context.Context, []byte) ([]byte, error), _ func(replica.HealProgress)) error {
	s.mu.Lock()
	s.whole = false
	if s.failHeals > 0 {
		s.failHeals--
		s.mu.Unlock()
		return errors.New("the comparison fails")
	}
	s.heals++
	s.mu.Unlock()
	if _, err := call(ctx, []byte("all")); err != nil {
		return err
	}
	src := ctx.Value(peerKey{}).(*world).store(pos)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.image = src
	s.clear()
	s.base, s.entries, s.flushed, s.whole = pos, nil, 0, true
	return nil
}

type peerKey struct{}

// world is a set of bricks with a network and a control plane between them.
type world struct {
	writers int // that stall has run
	t       *testing.T
	set     cluster.SetID
	mu      sync.Mutex
	cfg     cluster.SetConfig
	nodes   map[cluster.BrickID]*node
	order   []cluster.BrickID
	cut     map[[2]cluster.BrickID]bool // frames that vanish, from → to
	lose    map[uint8]cluster.BrickID   // messages of a kind that vanish when that brick sends them
	away    map[cluster.BrickID]bool    // no way to the control plane
	wg      sync.WaitGroup
}

type node struct {
	w     *world
	id    cluster.BrickID
	store *memStore
	wrong atomic.Int64 // by how much its wall clock is
	mu    sync.Mutex
	r     *replica.Replica // nil while dead
	stop  func()
	in    map[cluster.BrickID]chan func(*replica.Replica) // one ordered link per sender

	outMu sync.Mutex
	out   map[cluster.BrickID][]func(*replica.Replica) // sent and not flushed
	sent  map[uint8]int                                // messages of each kind
}

func newWorld(t *testing.T, n, min int) *world {
	w := &world{t: t, set: cluster.SetID{Volume: cluster.NewID()}, nodes: map[cluster.BrickID]*node{},
		cut: map[[2]cluster.BrickID]bool{}, lose: map[uint8]cluster.BrickID{}, away: map[cluster.BrickID]bool{}}
	for range n {
		id := cluster.NewID()
		w.order = append(w.order, id)
		w.nodes[id] = &node{w: w, id: id, store: newMemStore(), sent: map[uint8]int{}}
	}
	w.cfg = cluster.SetConfig{Set: w.set, Epoch: 1, Primary: w.order[0], Members: w.order, InSync: w.order, MinInSync: min}
	for _, id := range w.order {
		w.startNode(id)
	}
	t.Cleanup(func() {
		for _, id := range w.order {
			w.kill(id)
		}
		w.wg.Wait()
	})
	return w
}

func (w *world) store(pos cluster.Pos) *memSource {
	for _, n := range w.nodes {
		n.store.mu.Lock()
		ok := n.store.whole && int(pos.Seq)-int(n.store.base.Seq) <= len(n.store.entries) && pos.Seq > n.store.base.Seq &&
			n.store.entries[pos.Seq-n.store.base.Seq-1].Pos == pos
		if ok {
			tmp := newMemStore()
			base := n.store
			// replay a copy up to pos
			tmp.xattr, tmp.sess, tmp.replies, tmp.locks = map[string]string{}, map[cluster.SessionID]replica.SessionInfo{}, map[string]*fsop.Reply{}, map[fsop.Ino]lockHolder{}
			if base.base == (cluster.Pos{}) {
				for i := range base.entries[:pos.Seq] {
					if _, err := tmp.do(&base.entries[i]); err != nil {
						panic(err)
					}
				}
				base.mu.Unlock()
				return &memSource{pos, tmp.xattr, tmp.sess, tmp.replies, tmp.locks}
			}
		}
		n.store.mu.Unlock()
	}
	panic("no store has " + pos.String())
}

func (w *world) startNode(id cluster.BrickID) {
	w.open(id)
	for _, other := range w.order {
		if other != id {
			w.connect(id, other)
			w.connect(other, id)
		}
	}
}

// reopen gives the brick a new life under connections that hold: the others hear nothing of it.
func (w *world) reopen(id cluster.BrickID) {
	n := w.nodes[id]
	n.mu.Lock()
	stop := n.stop
	for _, c := range n.in {
		close(c)
	}
	n.r, n.stop, n.in = nil, nil, nil
	n.mu.Unlock()
	stop()
	w.open(id)
	for _, other := range w.order {
		if other != id {
			w.connect(id, other)
		}
	}
}

// open runs the brick's replica, which is connected to nobody yet.
func (w *world) open(id cluster.BrickID) {
	n := w.nodes[id]
	ctx, cancel := context.WithCancel(context.WithValue(context.Background(), peerKey{}, w))
	r, err := replica.New(replica.Config{Set: w.set, Brick: id, Store: n.store, Transport: n, Control: n, Log: slog.New(slog.DiscardHandler),
		Clock: func() time.Time { return time.Now().Add(time.Duration(n.wrong.Load())) }})
	if err != nil {
		w.t.Fatal(err)
	}
	n.mu.Lock()
	n.r = r
	n.in = map[cluster.BrickID]chan func(*replica.Replica){}
	n.outMu.Lock()
	n.out = map[cluster.BrickID][]func(*replica.Replica){}
	n.outMu.Unlock()
	done := make(chan struct{})
	n.stop = func() { cancel(); <-done }
	n.mu.Unlock()
	w.wg.Go(func() {
		defer close(done)
		if err := r.Run(ctx); err != nil && err != n.store.err {
			w.t.Errorf("brick %v: %v", id, err)
		}
	})
	w.mu.Lock()
	cfg := w.cfg.Clone()
	w.mu.Unlock()
	r.Configure(cfg)
}

func (w *world) connect(from, to cluster.BrickID) {
	f, t := w.nodes[from].live(), w.nodes[to].live()
	if f != nil && t != nil {
		f.Lost(to)
		f.Connected(to)
	}
}

func (n *node) live() *replica.Replica {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.r
}

// kill ends the replica as kill -9 would; its store stays.
func (w *world) kill(id cluster.BrickID) {
	n := w.nodes[id]
	n.mu.Lock()
	stop := n.stop
	for _, c := range n.in {
		close(c)
	}
	n.r, n.stop, n.in = nil, nil, nil
	n.mu.Unlock()
	if stop != nil {
		stop()
	}
	for _, other := range w.order {
		if r := w.nodes[other].live(); r != nil && other != id {
			r.Lost(id)
		}
	}
}

func (w *world) severed(from, to cluster.BrickID) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cut[[2]cluster.BrickID{from, to}]
}

// loses reports whether what brick from sends of a kind vanishes.
func (w *world) loses(from cluster.BrickID, kind uint8) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lose[kind] == from
}

// losing has what brick from sends of these kinds vanish, the zero brick: nothing.
func (w *world) losing(from cluster.BrickID, kinds ...uint8) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, k := range kinds {
		w.lose[k] = from
	}
}

// isolate cuts a node off from everything, or connects it again.
func (w *world) isolate(id cluster.BrickID, off bool) {
	w.mu.Lock()
	w.away[id] = off
	for _, o := range w.order {
		w.cut[[2]cluster.BrickID{o, id}], w.cut[[2]cluster.BrickID{id, o}] = off, off
	}
	w.mu.Unlock()
	if !off {
		for _, o := range w.order {
			if o != id {
				w.connect(id, o)
				w.connect(o, id)
			}
		}
		if r := w.nodes[id].live(); r != nil {
			w.mu.Lock()
			cfg := w.cfg.Clone()
			w.mu.Unlock()
			r.Configure(cfg)
		}
	}
}

const hop = 200 * time.Microsecond

// Send queues a message for Flush, with which all that was queued arrives at once.
func (n *node) Send(to cluster.BrickID, kind uint8, parts ...[]byte) error {
	if n.w.nodes[to].live() == nil {
		return fmt.Errorf("%v is not connected", to)
	}
	body := bytes.Join(parts, nil)
	if len(body) > wire.MaxBody {
		return fmt.Errorf("%w: %d bytes", wire.ErrTooLong, len(body))
	}
	if n.w.loses(n.id, kind) {
		return nil
	}
	n.outMu.Lock()
	defer n.outMu.Unlock()
	n.sent[kind]++
	n.out[to] = append(n.out[to], func(r *replica.Replica) {
		var env proto.Envelope
		rest, err := codec.DecodePrefix(body, &env)
		if err != nil {
			panic(err)
		}
		r.Message(env, kind, rest, func() { clear(rest) }) // whoever still looks gets to see that
	})
	return nil
}

func (n *node) Flush(to cluster.BrickID) {
	n.outMu.Lock()
	all := n.out[to]
	delete(n.out, to)
	n.outMu.Unlock()
	t := n.w.nodes[to]
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.r == nil || len(all) == 0 {
		return
	}
	c := t.in[n.id]
	if c == nil {
		c = make(chan func(*replica.Replica), 100000)
		t.in[n.id] = c
		r := t.r
		n.w.wg.Go(func() {
			for f := range c {
				time.Sleep(hop)
				f(r)
			}
		})
	}
	if n.w.severed(n.id, to) {
		return
	}
	c <- func(r *replica.Replica) {
		if n.w.severed(n.id, to) {
			return
		}
		for _, f := range all {
			f(r)
		}
	}
}

func (n *node) Call(ctx context.Context, to cluster.BrickID, kind uint8, parts ...[]byte) ([]byte, error) {
	var env proto.Envelope
	rest, err := codec.DecodePrefix(bytes.Join(parts, nil), &env)
	if err != nil {
		return nil, err
	}
	time.Sleep(hop)
	r := n.w.nodes[to].live()
	if r == nil {
		return nil, fmt.Errorf("%v is not connected", to)
	}
	if n.w.severed(n.id, to) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	reply, err := r.Call(ctx, env, kind, rest)
	time.Sleep(hop)
	if n.w.severed(to, n.id) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return reply, err
}

func (n *node) Propose(ctx context.Context, next cluster.SetConfig) error {
	w := n.w
	w.mu.Lock()
	if w.away[n.id] {
		w.mu.Unlock()
		<-ctx.Done()
		return ctx.Err()
	}
	defer w.mu.Unlock()
	return w.commitLocked(next)
}

func (w *world) commitLocked(next cluster.SetConfig) error {
	if next.Epoch != w.cfg.Epoch+1 {
		return fmt.Errorf("epoch %d after %d", next.Epoch, w.cfg.Epoch)
	}
	if !w.cfg.IsInSync(next.Primary) {
		w.t.Errorf("primary %v of epoch %d was not in sync", next.Primary, next.Epoch)
	}
	w.cfg = next.Clone()
	for _, id := range w.order {
		if !w.away[id] {
			w.wg.Go(func() {
				time.Sleep(3 * hop)
				if r := w.nodes[id].live(); r != nil {
					r.Configure(next)
				}
			})
		}
	}
	return nil
}

// Suspect is the fail-over of the control plane, without its finer points.
func (n *node) Suspect(ctx context.Context, set cluster.SetID, epoch cluster.Epoch, from cluster.BrickID) error {
	w := n.w
	w.mu.Lock()
	cfg, away := w.cfg.Clone(), w.away[n.id]
	w.mu.Unlock()
	if away {
		<-ctx.Done()
		return ctx.Err()
	}
	if epoch != cfg.Epoch {
		return nil
	}
	next := cfg.Clone()
	next.Epoch++
	next.InSync, next.Primary = nil, cluster.BrickID{}
	var best cluster.Pos
	trusted := false
	for _, id := range cfg.InSync {
		w.mu.Lock()
		away := w.away[id]
		w.mu.Unlock()
		r := w.nodes[id].live()
		if away || r == nil {
			continue
		}
		body, err := r.Call(ctx, proto.Envelope{Set: set, To: id}, proto.KindSeal, codec.Append(nil, &proto.Seal{Epoch: epoch}))
		if err != nil {
			continue
		}
		var s proto.SealReply
		if err := codec.Decode(body, &s); err != nil {
			return err
		}
		if !s.Sealed {
			return fmt.Errorf("%v: %s", id, s.Text)
		}
		switch {
		case s.Trusted && !trusted:
			trusted, best, next.Primary = true, s.Tail, id
			next.InSync = nil
		case s.Trusted == trusted && (next.Primary.IsZero() || s.Tail.Compare(best) > 0):
			best, next.Primary = s.Tail, id
		}
		if s.Trusted == trusted {
			next.InSync = append(next.InSync, id)
		}
	}
	if next.Primary.IsZero() {
		return fmt.Errorf("nobody can lead")
	}
	if !trusted {
		next.InSync, next.Chosen = []cluster.BrickID{next.Primary}, next.Epoch
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.commitLocked(next)
}

func (s *memStore) setFull(full bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.full = full
}
