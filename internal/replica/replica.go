// Package replica runs one brick's part in its replica set: the shell around
// the pure protocol machine of replica/core.
//
// One goroutine, the loop, owns the machine and is the only one that changes
// the store. Everything else that happens (messages, requests of clients,
// configurations, the passing of time) reaches it through a mailbox. What the
// machine wants done is done by the loop at once, if it cannot block, and by a
// goroutine of its own otherwise (fsync, comparisons). Reads do not pass
// through the loop: sessions answer them from the store under the lease that
// the loop publishes.
//
// # From a change to its acknowledgement
//
// The primary's loop gives a request its position and executes it against the
// store, which logs and applies it in one step or refuses it with an errno. It
// then streams the entry to the backups, whose loops execute it too. Every
// replica takes the change back from the caches of its own sessions, and
// acknowledges only when they have all answered or their lease is over; it
// never waits for that in the loop. When every in-sync brick has acknowledged,
// the primary answers the request.
package replica

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica/core"
)

// Result is the outcome of an executed entry.
type Result struct {
	Reply    fsop.Reply
	Effects  []proto.Effect
	Dup      bool       // executed before; Reply is what it answered then
	Raw      []byte     // the entry as logged; nil if nothing was
	Released []fsop.Ino // files on which locks were given up
}

// SessionInfo is a session that the set knows.
type SessionInfo struct {
	ID     cluster.SessionID
	Client string
	Owner  string // who alone may attach it
	Opened int64
	Away   bool // nobody has heard of it for long; its locks and windows are gone
}

// HealProgress says how far a comparison has come.
type HealProgress struct {
	KeysTotal, KeysDone   uint64
	FilesTotal, FilesDone uint64
	BytesTotal, BytesDone uint64
}

// Digest is a checksum of a brick's logical state.
type Digest struct {
	Pos    cluster.Pos
	Sum    [16]byte
	Inodes uint64
	Bytes  uint64
}

// Block is a block of a file as one brick has it, with the file's Content at that
// time, which is zero if the brick does not know it.
type Block struct {
	Content cluster.Pos
	Data    []byte
}

// ErrTooFar is returned by Store.Rewind when the store cannot go back so far.
var ErrTooFar = errors.New("the brick has durably applied later changes")

// ErrTrimmed is returned by Store.Entries when the log no longer has them.
var ErrTrimmed = errors.New("the log no longer goes back so far")

// Source is one side of a comparison, as of one position.
type Source interface {
	Pos() cluster.Pos
	Serve(ctx context.Context, request []byte) ([]byte, error)
	Close()
}

// Store is the brick that the replica speaks for. Execute, Rewind, Promise and Flush
// have a single caller; the rest may be called from anywhere.
type Store interface {
	Tail() cluster.Pos
	History() []cluster.Pos
	Whole() bool
	Clean() bool
	Promised() cluster.Epoch
	LastTime() int64

	// Promise remembers an epoch, durably; Promised returns the last one.
	Promise(e cluster.Epoch) error
	// Rewind makes the log end at pos and the applied state agree with it.
	Rewind(pos cluster.Pos) error
	// Execute checks, logs and applies an entry. An fsop.Errno leaves everything
	// as it was. Any other error means that the store has failed for good.
	// raw is the encoded entry if the caller has it.
	Execute(e *proto.Entry, raw []byte) (*Result, error)
	// Answered returns what a request was answered, if it was executed and that is remembered.
	Answered(session cluster.SessionID, number uint64) (r fsop.Reply, ok bool, err error)
	// Flush hands everything executed to the operating system, so that it
	// survives the death of this process.
	Flush() error
	// Read answers an operation that changes nothing. dep is the sequence number
	// of the last change that the answer, even an errno, depends on.
	Read(ctx context.Context, op fsop.Op) (reply *fsop.Reply, dep uint64, err error)
	Sync(ctx context.Context, seq uint64) error
	Durable() uint64
	Commit(seq uint64)
	Entries(after uint64, maxBytes int) ([][]byte, error)
	Admit(op fsop.Op) error
	Free() uint64
	// SetRoom says how many bytes the rest of the set can take.
	SetRoom(uint64)
	// Orphans returns inodes after one, in order, that have no name and whose window
	// nobody holds.
	Orphans(after fsop.Ino, limit int) []fsop.Ino
	// Swept returns removed subvolumes that still have names.
	Swept(limit int) []fsop.Ino
	Sessions() []SessionInfo

	Source() (Source, error)
	Heal(ctx context.Context, pos cluster.Pos, call func(context.Context, []byte) ([]byte, error), progress func(HealProgress)) error
	Digest(ctx context.Context) (Digest, error)
	// Block reads a block of a file for another brick on which it has rotted.
	Block(ctx context.Context, ino fsop.Ino, k uint64) (Block, error)
	Failed() <-chan struct{}
	Err() error
}

// Transport carries messages to the other bricks of the set. The first part of
// every message is an encoded proto.Envelope.
type Transport interface {
	// Send queues a one-way message, which leaves with the next Flush at the
	// latest. It never blocks, and fails if the brick's peer is not connected or
	// its queue is full; then Replica.Lost will be called.
	Send(to cluster.BrickID, kind uint8, parts ...[]byte) error
	// Flush has everything leave that was queued for a brick. It does not block.
	Flush(to cluster.BrickID)
	Call(ctx context.Context, to cluster.BrickID, kind uint8, parts ...[]byte) ([]byte, error)
}

// ErrRefused is wrapped by what Control.Propose returns when the proposal
// certainly did not take effect and will not. That its epoch has been decided is no refusal: it may have been by an
// earlier proposal whose answer was lost, and the replica will hear by which.
var ErrRefused = errors.New("refused by the control plane")

// Control is the control plane as a replica needs it.
type Control interface {
	Propose(ctx context.Context, next cluster.SetConfig) error
	Suspect(ctx context.Context, set cluster.SetID, epoch cluster.Epoch, from cluster.BrickID) error
}

// Config is what a Replica is made of.
type Config struct {
	Set       cluster.SetID
	Brick     cluster.BrickID
	Store     Store
	Transport Transport
	Control   Control
	Log       *slog.Logger
	// Clock is the wall clock from which files get their times as long as this
	// brick leads; nil: the machine's. It may be wrong and may be set: no lease or
	// order depends on it, and the times of one set never go back.
	Clock func() time.Time
}

// Replica is one brick of a set at work.
type Replica struct {
	set       cluster.SetID
	self      cluster.BrickID
	store     Store
	transport Transport
	control   Control
	log       *slog.Logger
	clock     func() time.Time
	start     time.Time // zero of the monotonic clock

	mail mailbox
	done chan struct{} // closed when Run returns

	// gate makes "execute and see who is interested" one step for those who
	// read and become interested. Lock order: gate, sessionsMu, Session.mu.
	gate sync.RWMutex

	sessionsMu sync.Mutex
	sessions   map[cluster.SessionID]*Session

	// pending are requests with a payload that this brick has forwarded, to fill in stubs.
	pendingMu sync.Mutex
	pending   map[requestKey]fsop.Op

	// served are the snapshots that backups compare themselves with.
	sourcesMu sync.Mutex
	served    map[uint64]*openSource
	healed    atomic.Pointer[HealProgress] // of this brick's last comparison

	// closed is closed, and replaced, whenever the window of a file was closed.
	closed atomic.Pointer[chan struct{}]

	leaving atomic.Bool // no client is taken: what this brick does is being handed over

	// view is what the loop publishes for everybody else.
	view atomic.Pointer[view]

	loop *loop // of the running loop only
	bg   *errgroup.Group
}

// view is a snapshot of what concerns readers. changed is closed when a newer one is published.
type view struct {
	cfg     cluster.SetConfig
	role    core.Role
	serving bool         // as far as the role and the log are concerned
	until   core.Instant // the lease
	commit  uint64
	changed chan struct{}
	epoch   context.Context // done when the configuration or the role is another
}

// New returns a replica that does nothing until Run.
func New(c Config) (*Replica, error) {
	if c.Clock == nil {
		c.Clock = time.Now
	}
	r := &Replica{
		set: c.Set, self: c.Brick, store: c.Store, transport: c.Transport, control: c.Control,
		log:      c.Log.With("set", c.Set.String(), "brick", c.Brick.String()),
		clock:    c.Clock,
		start:    time.Now(),
		done:     make(chan struct{}),
		sessions: map[cluster.SessionID]*Session{},
		pending:  map[requestKey]fsop.Op{},
		served:   map[uint64]*openSource{},
	}
	r.mail.wake = make(chan struct{}, 1)
	r.closed.Store(new(chan struct{}))
	*r.closed.Load() = make(chan struct{})
	r.loop = newLoop(r)
	r.view.Store(&view{changed: make(chan struct{}), epoch: r.loop.nextEpoch()})
	return r, nil
}

// now is the replica's monotonic clock.
func (r *Replica) now() core.Instant { return time.Since(r.start) }

// Run takes part in the set until ctx is done or the store fails. It returns
// the store's error, or nil.
func (r *Replica) Run(ctx context.Context) error {
	defer close(r.done)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	bg, ctx := errgroup.WithContext(ctx)
	r.bg = bg
	var gaveUp error
	bg.Go(func() error {
		returned := false
		defer func() {
			if returned {
				return
			}
			// A store that must not go on ends the goroutine that called it.
			if gaveUp = r.store.Err(); gaveUp == nil {
				gaveUp = errors.New("the store ended the goroutine that called it")
			}
			r.loop.stop(gaveUp)
			cancel()
		}()
		err := r.loop.run(ctx)
		returned = true
		return err
	})
	err := bg.Wait()
	r.detachAll("the brick " + r.self.String() + " is no longer served here")
	r.loop.close()
	switch {
	case gaveUp != nil:
		return gaveUp
	case errors.Is(err, context.Canceled):
		return nil
	}
	return err
}

// Kept reports, after Run has returned, whether the brick certainly has
// everything that it ever acknowledged.
func (r *Replica) Kept() bool { return r.loop.m.Trusted() }

// mailbox is an unbounded queue of events for the loop. What it holds is
// bounded by its writers: requests in flight, the window of a stream, ticks.
type mailbox struct {
	mu    sync.Mutex
	items []event
	shut  bool
	wake  chan struct{}
}

// event is something for the loop to do.
type event func(l *loop)

// post queues an event; it reports false when the loop has ended.
func (m *mailbox) post(e event) bool {
	m.mu.Lock()
	if m.shut {
		m.mu.Unlock()
		return false
	}
	m.items = append(m.items, e)
	first := len(m.items) == 1
	m.mu.Unlock()
	if first {
		select {
		case m.wake <- struct{}{}:
		default:
		}
	}
	return true
}

func (m *mailbox) take(into []event) []event {
	m.mu.Lock()
	defer m.mu.Unlock()
	into, m.items = m.items, into[:0]
	return into
}

func (m *mailbox) close() []event {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.shut = true
	return m.items
}

// Configure gives the replica a configuration of its set.
func (r *Replica) Configure(cfg cluster.SetConfig) {
	r.mail.post(func(l *loop) { l.m.Configure(l.now, cfg) })
}

// Connected tells that messages can be sent to brick b now, and that those
// sent before may be lost.
func (r *Replica) Connected(b cluster.BrickID) {
	r.mail.post(func(l *loop) { l.connected(b) })
}

// Lost tells that messages can no longer be sent to brick b.
func (r *Replica) Lost(b cluster.BrickID) {
	r.mail.post(func(l *loop) { l.lost(b) })
}

// Died tells that the process that was brick b has certainly ended, with all leases that
// it held or had given its clients (core.Machine.Died).
func (r *Replica) Died(b cluster.BrickID) {
	r.mail.post(func(l *loop) { l.m.Died(l.now, b) })
}

// Message takes a one-way message from another replica. It does not block and
// takes the body over. done, if not nil, may be called when nothing refers to
// the body any more.
func (r *Replica) Message(env proto.Envelope, kind uint8, body []byte, done func()) {
	from := env.From
	var err error
	switch kind {
	case proto.KindProbe:
		err = deliver(r, body, func(l *loop, m *proto.Probe) { l.m.Probe(l.now, from, m) })
	case proto.KindProbeAck:
		err = deliver(r, body, func(l *loop, m *proto.ProbeAck) { l.m.ProbeAck(l.now, from, m) })
	case proto.KindAppend:
		err = deliver(r, body, func(l *loop, m *proto.Append) {
			l.flusher.holds = false // somebody may wait for what comes now
			l.m.Append(l.now, from, m)
			l.used = done
		})
	case proto.KindAppendAck:
		err = deliver(r, body, func(l *loop, m *proto.AppendAck) { l.appendAck(from, m) })
	case proto.KindBeat:
		err = deliver(r, body, func(l *loop, m *proto.Beat) {
			l.m.Beat(l.now, from, m, r.heard(), r.store.Free())
			if l.m.Role() == core.Backup && m.Room != 0 {
				r.store.SetRoom(m.Room)
			}
		})
	case proto.KindBeatAck:
		err = deliver(r, body, func(l *loop, m *proto.BeatAck) { l.beatAck(from, m) })
	case proto.KindSync:
		err = deliver(r, body, func(l *loop, m *proto.Sync) { l.sync(from, m) })
	case proto.KindSyncAck:
		err = deliver(r, body, func(l *loop, m *proto.SyncAck) { l.syncAck(from, m) })
	case proto.KindReapAsk:
		err = deliver(r, body, func(l *loop, m *proto.ReapAsk) { l.reapAsk(from, m) })
	case proto.KindReapTell:
		err = deliver(r, body, func(l *loop, m *proto.ReapTell) { l.reapTell(from, m) })
	case proto.KindCommitAsk:
		err = deliver(r, body, func(l *loop, m *proto.CommitAsk) { l.m.CommitAsk(l.now, from, m) })
	case proto.KindHealOrder:
		err = deliver(r, body, func(l *loop, m *proto.HealOrder) { l.m.HealOrder(l.now, from, m) })
	case proto.KindRecallAsk:
		err = deliver(r, body, func(l *loop, m *proto.RecallAsk) { l.recallAsk(m) })
	case proto.KindRecallAll:
		err = deliver(r, body, func(l *loop, m *proto.RecallAll) { l.recallAll(from, m) })
	case proto.KindRecalling:
		err = deliver(r, body, func(l *loop, m *proto.Recalling) { l.recalling(m) })
	case proto.KindRelease:
		err = deliver(r, body, func(l *loop, m *proto.Release) { l.m.Release(l.now, from, m) })
	default:
		err = fmt.Errorf("unknown kind %d", kind)
	}
	if err != nil {
		r.log.Warn("message refused", "from", from, "kind", kind, "err", err)
	}
}

// deliver decodes a message and has the loop act on it.
func deliver[T any, P interface {
	*T
	codec.Coded
}](r *Replica, body []byte, act func(*loop, P)) error {
	msg := P(new(T))
	if err := codec.Decode(body, msg); err != nil {
		return err
	}
	r.mail.post(func(l *loop) { act(l, msg) })
	return nil
}

// Call answers a call from another replica or, for Seal, the control plane.
func (r *Replica) Call(ctx context.Context, env proto.Envelope, kind uint8, body []byte) ([]byte, error) {
	switch kind {
	case proto.KindForward:
		var m proto.Forward
		if err := codec.Decode(body, &m); err != nil {
			return nil, err
		}
		if m.Do.Epoch == 0 {
			return nil, errors.New("a request of no epoch")
		}
		reply := r.order(ctx, &request{from: env.From, session: m.Session, turn: m.Turn, do: m.Do})
		return codec.Append(nil, &reply), nil
	case proto.KindSeal:
		var m proto.Seal
		if err := codec.Decode(body, &m); err != nil {
			return nil, err
		}
		reply, err := ask(ctx, r, func(l *loop) proto.SealReply { return l.m.Seal(l.now, m) })
		if err != nil {
			return nil, err
		}
		return codec.Append(nil, &reply), nil
	case proto.KindHealOpen:
		var m proto.HealOpen
		if err := codec.Decode(body, &m); err != nil {
			return nil, err
		}
		reply, err := ask(ctx, r, func(l *loop) proto.HealOpenReply { return l.openSource(env.From, m) })
		if err != nil {
			return nil, err
		}
		return codec.Append(nil, &reply), nil
	case proto.KindHeal:
		return r.serveHeal(ctx, body)
	case proto.KindBlock:
		var m proto.Block
		if err := codec.Decode(body, &m); err != nil {
			return nil, err
		}
		reply := proto.BlockReply{}
		if b, err := r.store.Block(ctx, m.Ino, m.Block); err != nil {
			reply = proto.BlockReply{Status: proto.NotServing, Text: err.Error()}
		} else {
			reply.Content, reply.Data = b.Content, b.Data
		}
		return codec.Append(nil, &reply), nil
	case proto.KindDigest:
		var m proto.Digest
		if err := codec.Decode(body, &m); err != nil {
			return nil, err
		}
		reply := r.digestAt(ctx, m)
		return codec.Append(nil, &reply), nil
	}
	return nil, fmt.Errorf("call of unknown kind %d", kind)
}

// BlockOf asks another brick of the set for a block of a file. No lease is needed: what
// comes says itself what it is.
func (r *Replica) BlockOf(ctx context.Context, b cluster.BrickID, ino fsop.Ino, k uint64) (Block, error) {
	body, err := r.transport.Call(ctx, b, proto.KindBlock, r.envelope(b), codec.Append(nil, &proto.Block{Ino: ino, Block: k}))
	if err != nil {
		return Block{}, err
	}
	var reply proto.BlockReply
	if err := codec.Decode(body, &reply); err != nil {
		return Block{}, err
	}
	if reply.Status != proto.OK {
		return Block{}, errors.New(reply.Text)
	}
	return Block{reply.Content, reply.Data}, nil
}

// errEnded is returned to those who ask something of a loop that has ended.
var errEnded = errors.New("the brick is no longer served here")

// ask has the loop compute something and waits for it.
func ask[T any](ctx context.Context, r *Replica, f func(*loop) T) (T, error) {
	var zero T
	c := make(chan T, 1)
	if !r.mail.post(func(l *loop) { c <- f(l) }) {
		return zero, errEnded
	}
	select {
	case v := <-c:
		return v, nil
	case <-ctx.Done():
		return zero, context.Cause(ctx)
	case <-r.done:
		return zero, errEnded
	}
}

// envelope encodes the envelope of a message to brick b.
func (r *Replica) envelope(b cluster.BrickID) []byte {
	return codec.Append(nil, &proto.Envelope{Set: r.set, From: r.self, To: b})
}
