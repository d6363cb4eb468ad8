package replica

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica/core"
)

// loop is the state of the goroutine that owns the machine. Nothing in it is
// touched by anybody else.
type loop struct {
	*Replica
	ctx context.Context
	m   *core.Machine
	now core.Instant // as of the event in hand

	endEpoch context.CancelFunc // of the view's context

	used      func() // gives back the memory of the message in hand; nil: it is not wanted
	unflushed uint64 // the first entry that was executed and waits for Flush; 0: none
	stopped   bool

	// Replies that wait for their position to be acknowledged, in order of seq.
	replies fifo[waiting]
	// Entries whose effects are still in somebody's caches, in order of seq.
	clearing fifo[*clearing]

	frozen bool       // requests wait in iced
	iced   []*request // in the order in which they came

	handingOver bool // a goroutine does it

	// After a change of configuration that left too few bricks in sync to take
	// changes, requests wait in lean until leanEnd for others to come back.
	lean    []*request
	leanEnd core.Instant

	outbox  map[cluster.BrickID]*outbox
	recent  ring
	parked  map[fsop.Ino][]*request // wait for a lock, or for a window to be closed
	recalls map[fsop.Ino]*recall
	unsent  []cluster.BrickID // to which messages are queued
	fsync   syncer
	flusher flusher
	reap    reaper
	swept   uint64                             // position of this primary's last Sweep
	ticked  core.Instant                       // the last time
	seen    map[cluster.SessionID]core.Instant // as primary: when a session's client was last known to be alive
	turns   map[cluster.SessionID]uint64       // as primary: the newest that a session has asked under (Attach.Turn)
	refused map[cluster.SessionID]*refusals    // as primary, in this epoch
	room    room

	sources  map[uint64]*openSource
	nextSrc  uint64
	healing  context.CancelFunc // of the comparison under way
	kept     core.Ready         // messages and streams that wait for act
	lastTime int64
}

// waiting is a reply that waits for seq to be acknowledged.
type waiting struct {
	seq   uint64
	req   *request
	reply proto.DoReply
}

func newLoop(r *Replica) *loop {
	return &loop{
		Replica: r,
		m: core.New(r.now(), r.self, core.Brick{
			Tail: r.store.Tail(), History: r.store.History(), Whole: r.store.Whole(), Trusted: r.store.Clean(),
			Promised: r.store.Promised(),
		}),
		outbox:  map[cluster.BrickID]*outbox{},
		parked:  map[fsop.Ino][]*request{},
		recalls: map[fsop.Ino]*recall{},
		seen:    map[cluster.SessionID]core.Instant{},
		turns:   map[cluster.SessionID]uint64{},
		refused: map[cluster.SessionID]*refusals{},
		room:    room{of: map[cluster.BrickID]report{}},
		sources: map[uint64]*openSource{},
		fsync:   syncer{durable: map[cluster.BrickID]uint64{}},
	}
}

// run is the loop.
func (l *loop) run(ctx context.Context) error {
	l.ctx = ctx
	ticks := time.NewTimer(cluster.UntilTick(time.Now()))
	defer ticks.Stop()
	var batch []event
	for {
		select {
		case <-ctx.Done():
			return l.stop(context.Cause(ctx))
		case <-l.store.Failed():
			return l.stop(l.store.Err())
		case <-ticks.C:
			ticks.Reset(cluster.UntilTick(time.Now()))
			l.now = l.Replica.now()
			l.tick()
		case <-l.mail.wake:
			batch = l.mail.take(batch)
			for i, e := range batch {
				batch[i] = nil
				l.now = l.Replica.now()
				e(l)
				// What an event makes the machine want is done before the next is heard:
				// the machine relies on it.
				if err := l.applyReady(); err != nil {
					return l.stop(err)
				}
				if l.used != nil {
					l.used()
					l.used = nil
				}
			}
		}
		if err := l.act(); err != nil {
			return l.stop(err)
		}
	}
}

// stop answers everybody who still waits.
func (l *loop) stop(err error) error {
	l.stopped = true
	if l.healing != nil {
		l.healing()
	}
	for _, e := range l.mail.close() {
		e(l) // asks are answered, requests refused: Next says no after retire
	}
	l.refuseAll("the brick stopped")
	for id := range l.sources {
		l.closeSource(id)
	}
	return err
}

// close is called after every goroutine of the replica has ended.
func (l *loop) close() { l.endEpoch() }

// tick tells the machine that time has passed. Beats and suspicions are coarser by far.
func (l *loop) tick() {
	l.m.Tick(l.now)
	l.tickSessions()
	l.tickLocks()
	l.tickRecalls()
	l.endLean()
	l.tickRoom()
	if l.m.Role() == core.Primary {
		l.store.SetRoom(l.room.least(l.m.Config().InSync))
	}
	l.tickReap()
	l.tickSweep()
	l.tickSync()
	l.tickRecent()
	l.ticked = l.now
}

// applyReady carries out the part of Ready that changes the store, which the
// machine must hear of before anything else. The rest is kept for act.
func (l *loop) applyReady() error {
	r := l.m.Ready()
	l.kept.Messages = append(l.kept.Messages, r.Messages...)
	for _, s := range r.Streams {
		l.kept.Streams = joinStream(l.kept.Streams, s)
	}
	if r.Promise != 0 {
		if err := l.store.Promise(r.Promise); err != nil {
			return err
		}
	}
	if r.Propose != nil {
		l.propose(*r.Propose)
	}
	if r.Suspect != 0 {
		l.suspect(r.Suspect)
	}
	for _, a := range r.Apply {
		if err := l.apply(a); err != nil {
			return err
		}
	}
	if r.Heal {
		l.heal()
	}
	if r.Leave {
		l.handOver()
	}
	if r.Lead {
		return l.lead()
	}
	return nil
}

// act does everything that the events so far made necessary, in the order that
// keeps promises: flush, then send; then answer. A primary's entries are no promise
// as long as nobody has them, and they leave first.
func (l *loop) act() error {
	for range 64 { // every round reacts to what the one before made the machine want
		if err := l.applyReady(); err != nil {
			return err
		}
		kept := l.kept
		l.kept = core.Ready{}
		kept.Streams = l.holdBack(kept.Streams)
		if len(kept.Messages) == 0 && len(kept.Streams) == 0 && l.fsync.ask == 0 {
			break
		}
		err := l.flushAnd(func() {
			l.sendAll(kept.Messages)
			l.sendEntries(kept.Streams)
		})
		if err != nil {
			return err
		}
	}
	if !l.holding() {
		if err := l.flush(); err != nil {
			return err
		}
	}
	l.publish()
	l.answer()
	if l.fsync.ask > 0 { // those who were answered made room for the next round of syncs
		streams := l.holdBack(nil)
		return l.flushAnd(func() { l.sendEntries(streams) })
	}
	return nil
}

// flushAnd flushes, and sends, in the order that is right: the bricks that are sent entries
// begin with them while this one writes its own log. Only what says that something is
// committed, or here, comes after the log has it.
func (l *loop) flushAnd(send func()) error {
	if l.m.Role() == core.Primary && l.m.Commit() < l.unflushed {
		send()
		return l.flush()
	}
	if err := l.flush(); err != nil {
		return err
	}
	send()
	return nil
}

// sendEntries sends entries, and right behind them the wish that they be durable.
func (l *loop) sendEntries(streams []core.Stream) {
	for _, s := range streams {
		l.stream(s)
	}
	l.askSyncs()
	l.flushSent()
}

func (l *loop) sendAll(messages []core.Message) {
	for _, msg := range messages {
		if msg.Kind == proto.KindAppendAck && l.flusher.keep(msg) {
			continue
		}
		if b, ok := msg.Body.(*proto.Beat); ok {
			b.Room = max(1, min(l.store.Free(), l.room.least(l.m.Config().InSync)))
		}
		if err := l.send(msg.To, msg.Kind, codec.Append(nil, msg.Body)); err != nil {
			l.m.Backlogged(msg.To)
		}
	}
}

// send queues a message; flushSent has it leave.
func (l *loop) send(to cluster.BrickID, kind uint8, body ...[]byte) error {
	if !slices.Contains(l.unsent, to) {
		l.unsent = append(l.unsent, to)
	}
	return l.transport.Send(to, kind, append([][]byte{l.envelope(to)}, body...)...)
}

// flushSent has everything leave that was queued: what one act has for one brick
// costs one system call here, and one wake-up there.
func (l *loop) flushSent() {
	for _, b := range l.unsent {
		l.transport.Flush(b)
	}
	l.unsent = l.unsent[:0]
}

func (l *loop) flush() error {
	if l.unflushed == 0 {
		return nil
	}
	l.unflushed = 0
	return l.store.Flush()
}

// publish makes what readers must know visible to them.
func (l *loop) publish() {
	old := l.view.Load()
	until, _ := l.m.Serving(l.now)
	cfg := l.m.Config()
	v := &view{
		cfg: old.cfg, role: l.m.Role(), until: until, serving: until != 0, commit: l.m.Commit(),
		changed: old.changed, epoch: old.epoch,
	}
	if v.role == old.role && v.until == old.until && v.commit == old.commit && cfg.Epoch == old.cfg.Epoch {
		return
	}
	if cfg.Epoch != old.cfg.Epoch {
		v.cfg = cfg.Clone()
	}
	turn := v.role != old.role || cfg.Epoch != old.cfg.Epoch
	v.changed = make(chan struct{})
	if turn {
		v.epoch = l.nextEpoch()
	}
	l.view.Store(v)
	close(old.changed)
	if v.commit != old.commit {
		l.store.Commit(v.commit)
	}
	if turn {
		if l.healing != nil && cfg.Primary != old.cfg.Primary {
			l.healing() // its source is no longer the truth
		}
		l.roleChanged(old, v.role)
	}
}

// nextEpoch ends the context of the last view's epoch and returns one for the next.
func (l *loop) nextEpoch() context.Context {
	if l.endEpoch != nil {
		l.endEpoch()
	}
	ctx, cancel := context.WithCancel(context.Background())
	l.endEpoch = cancel
	return ctx
}

// roleChanged does what a new role or epoch makes necessary.
func (l *loop) roleChanged(old *view, to core.Role) {
	from, cfg := old.role, l.m.Config()
	l.log.Info("configuration", "epoch", cfg.Epoch, "role", to, "was", from,
		"primary", cfg.Primary, "in_sync", cfg.InSync, "tail", l.m.Tail())
	if to != core.Primary {
		l.refuseAll("this brick is no longer the primary")
	}
	l.leaving.Store(l.m.Leaving())
	if was := from == core.Primary && !old.cfg.Writable(); to == core.Primary && !cfg.Writable() && !was {
		l.leanEnd = l.now + leanWait
	}
	if from != core.Primary {
		l.room.reset()
	}
	l.endLean()
	clear(l.recalls)
	clear(l.refused)
	l.fsync.reset(l.now)
	if to == core.Primary && from != core.Primary {
		clear(l.seen)
		for _, s := range l.store.Sessions() {
			if !s.Away {
				l.seen[s.ID] = l.now
			}
		}
		maps.DeleteFunc(l.turns, func(id cluster.SessionID, _ uint64) bool { return l.seen[id] == 0 })
	}
	if !cfg.IsInSync(l.self) {
		l.detachAll("the brick is not in sync")
	}
}

// execute runs one entry against the store and takes its effects back from the
// caches of this replica's sessions.
func (l *loop) execute(e *proto.Entry, raw []byte) (*Result, error) {
	res, c, err := l.executeAlone(e, raw)
	if err != nil || res.Dup || res.Raw == nil {
		return res, err
	}
	if l.unflushed == 0 {
		l.unflushed = e.Pos.Seq
	}
	l.lastTime = e.Time
	if c != nil {
		l.clearing.push(c)
	}
	l.m.Appended(l.now, e.Pos)
	l.clearUp()
	l.released(e.Op, res.Released)
	if o, ok := e.Op.(*fsop.CloseSession); ok {
		l.sessionClosed(cluster.SessionID(o.Session))
	}
	return res, nil
}

// executeAlone is the part of execute during which nobody reads and becomes
// interested in what it changes.
func (l *loop) executeAlone(e *proto.Entry, raw []byte) (*Result, *clearing, error) {
	l.gate.Lock()
	defer l.gate.Unlock()
	res, err := l.store.Execute(e, raw)
	if err != nil || res.Dup || res.Raw == nil {
		return res, nil, err
	}
	return res, l.takeBack(e, res.Effects), nil
}

// clearUp tells the machine how far no cache is stale.
func (l *loop) clearUp() {
	for l.clearing.len() > 0 && l.clearing.front().waits.Load() == 0 {
		l.clearing.pop()
	}
	seq := l.m.Tail().Seq
	if l.clearing.len() > 0 {
		seq = l.clearing.front().seq - 1
	}
	l.m.Cleared(l.now, seq)
}

// lead makes the store ready for this brick to order changes, and begins the epoch.
func (l *loop) lead() error {
	if err := l.load(l.m.Tail()); err != nil {
		return fmt.Errorf("replaying the log to lead epoch %d: %w", l.m.Config().Epoch, err)
	}
	l.lastTime = l.store.LastTime()
	l.recent.reset()
	pos, ok := l.m.Next()
	if !ok {
		return nil
	}
	_, err := l.execute(&proto.Entry{Pos: pos, Time: l.time(), Op: &fsop.Noop{}}, nil)
	return err
}

// load makes the log end at pos and the state agree with it.
func (l *loop) load(pos cluster.Pos) error {
	back := pos != l.m.Tail()
	if err := l.store.Rewind(pos); err != nil {
		return err
	}
	// What stays in the log is in caches as before.
	var kept fifo[*clearing]
	for l.clearing.len() > 0 {
		if c := l.clearing.pop(); c.seq <= pos.Seq {
			kept.push(c)
		}
	}
	l.clearing = kept
	l.m.Rewound(pos, l.store.History())
	if back {
		l.dropCaches()
	}
	l.clearUp()
	return nil
}

// time is the time of the next entry: the clock's, but always later than the last.
func (l *loop) time() int64 { return max(l.clock().UnixNano(), l.lastTime+1) }

// apply executes what the primary sent.
func (l *loop) apply(a core.Apply) error {
	if a.Rewind != nil {
		err := l.load(*a.Rewind)
		if errors.Is(err, ErrTooFar) {
			l.log.Info("the log cannot be continued; comparing instead", "to", *a.Rewind, "err", err)
			l.m.RewindFailed()
			l.m.SayWhere()
			return nil
		}
		if err != nil {
			return fmt.Errorf("going back to %v: %w", *a.Rewind, err)
		}
	}
	for i := range a.Entries {
		e, raw, ok := l.entry(&a.Entries[i])
		if !ok {
			l.m.SayWhere() // a stub that cannot be filled: the primary sends it again, whole
			return nil
		}
		if e.Pos.Seq != l.m.Tail().Seq+1 {
			return fmt.Errorf("the primary sent %v after %v", e.Pos, l.m.Tail())
		}
		res, err := l.execute(e, raw)
		var errno fsop.Errno
		switch {
		case errors.As(err, &errno):
			return fmt.Errorf("this brick refuses %v with %q, which the primary accepted: the two have diverged; compare them with 'mortar volume heal VOLUME full'", e, errno)
		case err != nil:
			return err
		case res.Raw == nil:
			return fmt.Errorf("this brick took %v for a repetition, which the primary did not: the two have diverged; compare them with 'mortar volume heal VOLUME full'", e)
		}
	}
	l.m.Applied(0)
	return nil
}

// entry decodes an entry as it was streamed, or makes it of its stub and the
// request that this brick forwarded.
func (l *loop) entry(a *proto.AppendEntry) (e *proto.Entry, raw []byte, ok bool) {
	e = new(proto.Entry)
	if a.Raw != nil {
		if err := codec.Decode(a.Raw, e); err != nil {
			l.log.Error("the primary sent an entry that cannot be read", "err", err)
			return nil, nil, false
		}
		return e, a.Raw, true
	}
	s := &a.Stub
	l.pendingMu.Lock()
	w := l.pending[requestKey{s.Session, s.Number}]
	l.pendingMu.Unlock()
	if w == nil {
		return nil, nil, false
	}
	*e = proto.Entry{Pos: s.Pos, Time: s.Time, Session: s.Session, Number: s.Number, Acked: s.Acked, Op: w}
	return e, nil, true
}

// propose asks the control plane for a configuration.
func (l *loop) propose(next cluster.SetConfig) {
	l.log.Info("proposing a configuration", "epoch", next.Epoch, "in_sync", next.InSync)
	l.bg.Go(func() error {
		ctx, cancel := context.WithTimeout(l.ctx, 2*time.Second)
		defer cancel()
		err := l.control.Propose(ctx, next)
		if err != nil && l.ctx.Err() == nil {
			l.log.Info("configuration not accepted", "epoch", next.Epoch, "err", err)
		}
		if err == nil {
			l.Configure(next) // the control plane's own copy may take longer
		}
		l.mail.post(func(l *loop) { l.m.ProposeDone(l.now, next.Epoch, errors.Is(err, ErrRefused)) })
		return nil
	})
}

// handOver has this brick give up what it does, unless that is under way.
func (l *loop) handOver() {
	if l.handingOver {
		return
	}
	l.handingOver = true
	l.bg.Go(func() error {
		ctx, cancel := context.WithTimeout(l.ctx, handOverTimeout)
		defer cancel()
		if err := l.leave(ctx, func(cfg *cluster.SetConfig) bool { return cfg.IsDrained(l.self) || l.m.Slow(l.now) }); err != nil && l.ctx.Err() == nil {
			l.log.Info("not handed over yet", "err", err)
		}
		l.mail.post(func(l *loop) { l.handingOver = false })
		return nil
	})
}

// handOverTimeout is for how long a drained brick, or one whose disk crawls, tries at a time.
const handOverTimeout = 2 * time.Second

// suspect tells the control plane that the epoch has no primary.
func (l *loop) suspect(e cluster.Epoch) {
	l.bg.Go(func() error {
		ctx, cancel := context.WithTimeout(l.ctx, time.Second)
		defer cancel()
		if err := l.control.Suspect(ctx, l.set, e, l.self); err != nil && l.ctx.Err() == nil {
			l.log.Debug("suspicion not taken", "epoch", e, "err", err)
		}
		return nil
	})
}

// fifo is a queue.
type fifo[T any] struct {
	items []T
	head  int
}

func (q *fifo[T]) len() int { return len(q.items) - q.head }
func (q *fifo[T]) push(v T) {
	if q.head > 64 && q.head*2 > len(q.items) {
		n := copy(q.items, q.items[q.head:])
		clear(q.items[n:])
		q.items, q.head = q.items[:n], 0
	}
	q.items = append(q.items, v)
}
func (q *fifo[T]) front() T { return q.items[q.head] }
func (q *fifo[T]) pop() T {
	v := q.items[q.head]
	var zero T
	q.items[q.head] = zero
	q.head++
	return v
}
