package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/proto"
	"mortar/internal/replica/core"
)

// brick is one brick's machine, its disk, and a model of the shell around the
// machine (package replica) that does the same things in the same order.
type brick struct {
	w  *world
	i  int
	id cluster.BrickID
	r  *rand.Rand

	disk   disk
	up     bool
	paused bool
	late   []func() // what happened while it was paused
	life   int
	booted time.Duration
	rate   float64       // of its clock
	seen   cluster.Epoch // the newest configuration that its machine's control plane knows
	// powerless is the newest epoch there was when its machine last lost power, or its disk:
	// what it has acknowledged before is not certain to be there.
	powerless cluster.Epoch

	m        *core.Machine
	epoch    cluster.Epoch // as of the last event
	role     core.Role
	config   cluster.SetConfig
	commit   uint64 // that the oracle knows of
	acked    uint64 // likewise
	messages []core.Message
	streams  []core.Stream
	syncs    []core.Message

	replies  []waiting
	clearing []*clearing
	fsyncs   []*syncWait
	lag      core.Lag
	durable  [5]uint64 // of the bricks, in this epoch
	lean     []*order
	leanEnd  time.Duration
	out      [5]outbox
	asks     []*ask
	reads    []*reading
	attaches []*attach
	sessions [maxSessions]*session
	turns    [maxSessions]int    // as primary: the newest that a client has asked under
	refused  []numberKey         // likewise, in this epoch: for want of room
	below    [maxSessions]uint64 // likewise: the client has had its answers to all numbers below it
	full     time.Duration       // until when it has no room, by its clock
	healing  int                 // number of the comparison under way, 0 if there is none
	heals    int
	ahead    bool // of the machine, which has yet to hear of the end of a comparison
	stopping bool
	leaving  bool   // what it does is being handed over
	page     *page  // of this life
	let      [5]int // the life of each brick that was last heard of as such
	wanted   bool   // to be up, but the volume is stopped
	opening  bool   // its log, on a disk that hangs
}

type clearing struct {
	seq   uint64
	waits int
}

// outbox is what is streamed to one backup.
type outbox struct {
	open     bool
	round    uint64
	prev     cluster.Pos
	upto     uint64
	inflight []uint64
}

const (
	maxInflight = 24 // messages
	maxBatch    = 8  // entries
)

func newBrick(w *world, i int) *brick {
	b := &brick{w: w, i: i, id: brickID(i), r: w.stream(10 + i)}
	b.rate = 1 + (b.r.Float64()-0.5)*0.0099 // any two differ by less than 1 %
	b.disk.entries = &w.oracle.entries
	b.disk.whole, b.disk.baseN = true, -1
	return b
}

func (b *brick) String() string { return fmt.Sprintf("b%d", b.i) }

// now is the brick's own clock, which begins with its process.
func (b *brick) now() time.Duration { return b.local(b.w.now) }

func (b *brick) local(t time.Duration) time.Duration {
	return time.Millisecond + time.Duration(float64(t-b.booted)*b.rate)
}

func (b *brick) start() {
	if b.up {
		return
	}
	if b.wanted = b.w.plane.stopped; b.wanted {
		return
	}
	d := &b.disk
	if left := d.hung - b.w.now; left > 0 { // a log is synced when it is opened
		if !b.opening {
			b.opening = true
			b.w.after(min(left, hangLook), func() { b.opening = false; b.start() })
		}
		return
	}
	b.up, b.paused, b.late = true, false, nil
	b.life++
	b.booted = b.w.now
	clean := d.marked && d.mark == d.tail() && d.mark == d.kv.pos
	d.st = d.kv
	d.synced = d.tail().Seq
	b.m = core.New(b.now(), b.id, core.Brick{Tail: d.tail(), History: d.history, Whole: d.whole, Trusted: clean, Promised: d.epoch})
	b.w.say("%v starts at %v, whole %v, clean %v", b, d.tail(), d.whole, clean)
	b.epoch, b.role, b.config, b.commit, b.acked = 0, core.Waiting, cluster.SetConfig{}, 0, 0
	b.messages, b.streams, b.syncs = nil, nil, nil
	b.replies, b.clearing, b.fsyncs, b.lean, b.asks, b.reads, b.attaches = nil, nil, nil, nil, nil, nil, nil
	b.sessions, b.turns, b.full = [maxSessions]*session{}, [maxSessions]int{}, 0
	b.refused, b.below = nil, [maxSessions]uint64{}
	b.durable, b.out, b.lag = [5]uint64{}, [5]outbox{}, core.Lag{}
	b.healing, b.ahead, b.stopping, b.leaving = 0, false, false, false
	b.page, b.let = newPage(b), [5]int{}
	if cfg, known := b.w.plane.atStart(b); known {
		b.do(func() { b.m.Configure(b.now(), cfg) })
	}
	b.tickAfter(time.Duration(b.r.IntN(100)) * time.Millisecond)
	b.w.net.booted(b.i)
}

func (b *brick) tickAfter(d time.Duration) {
	life := b.life
	b.w.after(time.Duration(float64(d)/b.rate), func() {
		if b.life != life || !b.up {
			return
		}
		b.do(b.tick)
		b.tickAfter(100 * time.Millisecond)
	})
}

// die ends the process, and with it what is only in memory.
func (b *brick) die(power bool) {
	if !b.up {
		return
	}
	b.up = false
	lost := b.disk.crash(power, b.r)
	if power {
		b.powerless = b.w.plane.config().Epoch
	}
	b.w.say("%v dies, power %v, lost entries %v, ends at %v", b, power, lost, b.disk.tail())
	b.ended(power)
	if !power {
		b.w.watch(b, b.page)
	}
}

func (b *brick) ended(power bool) {
	b.late = nil
	b.w.net.died(b.i, power)
	for _, c := range b.w.clients {
		c.homeDied(b, power)
	}
}

// leave is a planned stop: what the brick does is handed over first.
func (b *brick) leave() {
	if !b.up || b.stopping {
		return
	}
	b.stopping = true
	b.giveUp(func() bool { return true }, b.close)
}

// giveUp has the brick hand over what it does as long as that is wanted, and then is called
// when it has ended, in whatever way, or has taken too long; perhaps twice. It is replica's leave.
func (b *brick) giveUp(wanted func() bool, then func()) {
	life := b.life
	end := b.w.now + 2*time.Second
	ended := func() {
		if b.life == life && b.up {
			then()
		}
	}
	var try func()
	try = func() {
		if b.life != life || !b.up {
			return
		}
		if b.w.now > end {
			b.do(b.m.Stay)
			ended()
			return
		}
		b.do(func() {
			if !wanted() {
				b.m.Stay()
				ended()
				return
			}
			next, again := b.handOver()
			switch {
			case again:
				b.w.after(2*time.Millisecond, try)
			case next == nil:
				ended()
			default:
				b.w.plane.propose(b, *next, func(answered, _ bool) {
					ended()
				})
				b.w.at(end, ended)
			}
		})
		if b.paused {
			b.w.after(100*time.Millisecond, try)
		}
	}
	try()
}

// close ends the process as planned: everything is made durable, and marked so.
func (b *brick) close() {
	d := &b.disk
	if d.hung > b.w.now { // it does not end until it is killed
		b.die(false)
		return
	}
	b.up = false
	if d.whole && d.st.pos == d.tail() && b.m.Trusted() {
		d.flushKV()
		d.marked, d.mark = true, d.st.pos
	} else {
		d.synced = d.tail().Seq
	}
	d.st = d.kv
	b.w.say("%v stopped cleanly at %v, marked %v", b, d.tail(), d.marked)
	b.ended(false)
}

// handOver is replica's.
func (b *brick) handOver() (next *cluster.SetConfig, again bool) {
	cached := func() bool {
		return slices.ContainsFunc(b.sessions[:], func(s *session) bool { return s != nil && !s.lapsed })
	}
	next, again = b.m.Leave(b.now(), cached())
	if again {
		b.detachAll()
	}
	return next, again
}

func (b *brick) pause(d time.Duration) {
	if !b.up || b.paused {
		return
	}
	b.paused = true
	life := b.life
	b.w.after(d, func() {
		if b.life == life {
			b.resume()
		}
	})
}

func (b *brick) resume() {
	if !b.paused {
		return
	}
	b.paused = false
	late := b.late
	b.late = nil
	for _, f := range late {
		b.do(f)
	}
}

// do has an event happen in the brick's loop.
func (b *brick) do(f func()) {
	if !b.up {
		return
	}
	if b.paused {
		b.late = append(b.late, f)
		return
	}
	f()
	if b.up {
		b.act()
	}
}

// doIn is do, unless the process is another by then.
func (b *brick) doIn(life int, f func()) {
	if b.life == life {
		b.do(f)
	}
}

// goIn is doIn a moment later, in any order with others.
func (b *brick) goIn(life int, f func()) {
	b.doIn(life, func() {
		b.w.after(time.Duration(b.r.IntN(300))*time.Microsecond, func() { b.doIn(life, f) })
	})
}

// act does what the machine wants done, in the order of replica's loop.
func (b *brick) act() {
	for b.applyReady(); ; b.applyReady() {
		messages, streams, syncs := b.messages, b.streams, b.syncs
		if len(messages)+len(streams)+len(syncs) == 0 {
			break
		}
		b.messages, b.streams, b.syncs = nil, nil, nil
		for _, m := range messages {
			b.send(m)
		}
		for _, s := range streams {
			b.stream(s)
		}
		for _, m := range syncs {
			b.send(m)
		}
	}
	b.publish()
	b.answer()
	b.w.oracle.look(b)
	if len(b.messages)+len(b.syncs) > 0 {
		b.act()
	}
}

func (b *brick) applyReady() {
	r := b.m.Ready()
	b.disk.epoch = max(b.disk.epoch, r.Promise)
	b.messages = append(b.messages, r.Messages...)
	b.streams = append(b.streams, r.Streams...)
	if r.Propose != nil {
		next := *r.Propose
		b.w.say("%v proposes epoch %d, in sync %s", b, next.Epoch, b.w.names(next.InSync))
		life := b.life
		b.w.plane.propose(b, next, func(accepted, refused bool) {
			b.doIn(life, func() {
				if accepted {
					b.m.Configure(b.now(), next)
				}
				b.m.ProposeDone(b.now(), next.Epoch, refused)
			})
		})
	}
	if r.Suspect != 0 {
		b.w.say("%v suspects epoch %d", b, r.Suspect)
		b.w.net.call(b.i, planeNode, func() { b.w.plane.suspect(r.Suspect) })
	}
	for _, a := range r.Apply {
		b.apply(a)
	}
	if r.Heal {
		b.heal()
	}
	if r.Leave && !b.leaving && !b.stopping {
		b.leaving = true
		life := b.life
		b.w.after(0, func() {
			if b.life == life {
				wanted := func() bool { cfg := b.m.Config(); return cfg.IsDrained(b.id) || b.m.Slow(b.now()) }
				b.giveUp(wanted, func() { b.leaving = false })
			}
		})
	}
	if r.Lead {
		b.lead()
	}
}

func (b *brick) apply(a core.Apply) {
	if a.Rewind != nil {
		b.w.say("%v goes back from %v to %v", b, b.disk.tail(), *a.Rewind)
		if b.load(*a.Rewind) == rewindTooFar {
			b.m.RewindFailed()
			b.m.SayWhere()
			return
		}
	}
	for i := range a.Entries {
		n := int32(a.Entries[i].Stub.Time)
		e := &b.w.oracle.entries[n]
		if e.pos.Seq != b.disk.tail().Seq+1 {
			b.w.fail("%v was sent %v after %v", b, e.pos, b.disk.tail())
		}
		if b.disk.st.executed(e) {
			b.w.fail("%v takes %v for a repetition, which its primary did not", b, e.pos)
		}
		b.execute(n)
	}
	b.m.Applied(0)
}

// execute logs and applies an entry, and takes it back from caches.
func (b *brick) execute(n int32) {
	e := &b.w.oracle.entries[n]
	b.disk.append(n)
	if c := b.takeBack(e); c != nil {
		b.clearing = append(b.clearing, c)
	}
	b.m.Appended(b.now(), e.pos)
	b.clearUp()
}

func (b *brick) clearUp() {
	for len(b.clearing) > 0 && b.clearing[0].waits == 0 {
		b.clearing = b.clearing[1:]
	}
	seq := b.m.Tail().Seq
	if len(b.clearing) > 0 {
		seq = b.clearing[0].seq - 1
	}
	b.m.Cleared(b.now(), seq)
}

// load makes the log end at pos and the state agree with it.
func (b *brick) load(pos cluster.Pos) rewound {
	back := pos != b.m.Tail()
	r := b.disk.rewind(pos)
	switch r {
	case rewindTooFar:
		return r
	case rewindNonsense:
		b.w.fail("%v is to go back to %v, which its log does not have: it ends at %v", b, pos, b.disk.tail())
	}
	b.clearing = slices.DeleteFunc(b.clearing, func(c *clearing) bool { return c.seq > pos.Seq })
	b.m.Rewound(pos, b.disk.history)
	if back {
		b.detachAll()
	}
	b.clearUp()
	return r
}

func (b *brick) lead() {
	if b.load(b.m.Tail()) != rewindDone {
		b.w.fail("%v is to lead epoch %d and cannot replay its log", b, b.m.Config().Epoch)
	}
	b.w.oracle.leads(b)
	if pos, may := b.m.Next(); may {
		b.execute(b.w.oracle.make(entry{pos: pos, prev: b.disk.last(), session: -1, reg: -1}))
	}
}

// send sends a message of the machine's.
func (b *brick) send(m core.Message) {
	to := b.w.brick(m.To)
	body := m.Body
	if a, is := body.(*proto.ProbeAck); is { // it shares the machine's history
		a.History = slices.Clone(a.History)
	}
	life := b.w.net.links[b.i][to.i].life
	err := b.w.net.send(b.i, to.i, func() { to.doIn(life, func() { to.take(b, body) }) })
	if err != nil {
		b.m.Backlogged(m.To)
	}
}

// take is what a message does.
func (b *brick) take(from *brick, body codec.Coded) {
	now := b.now()
	switch m := body.(type) {
	case *proto.Probe:
		b.m.Probe(now, from.id, m)
	case *proto.ProbeAck:
		b.m.ProbeAck(now, from.id, m)
	case *proto.Append:
		b.m.Append(now, from.id, m)
	case *proto.AppendAck:
		b.appendAck(from, m)
	case *proto.Beat:
		b.m.Beat(now, from.id, m, nil, 0)
	case *proto.BeatAck:
		b.m.BeatAck(now, from.id, m)
		if m.Epoch == b.m.Config().Epoch {
			b.landed(from, m.Round, m.Acked)
		}
	case *proto.CommitAsk:
		b.m.CommitAsk(now, from.id, m)
	case *proto.HealOrder:
		b.m.HealOrder(now, from.id, m)
	case *proto.Release:
		b.m.Release(now, from.id, m)
	case *proto.Sync:
		b.sync(from, m)
	case *proto.SyncAck:
		b.syncAck(from.i, m)
	default:
		panic(fmt.Sprintf("a message %T", body))
	}
}

func (b *brick) stream(s core.Stream) {
	to := b.w.brick(s.To)
	o := &b.out[to.i]
	if !o.open || o.round != s.Round || o.upto != s.Prev.Seq {
		*o = outbox{open: true, round: s.Round, prev: s.Prev, upto: s.Upto}
		b.push(to, o, true)
		return
	}
	o.upto = s.Upto
	b.push(to, o, false)
}

func (b *brick) push(to *brick, o *outbox, first bool) {
	for first || o.prev.Seq < o.upto && len(o.inflight) < maxInflight {
		first = false
		msg := &proto.Append{Epoch: b.m.Config().Epoch, Round: o.round, Prev: o.prev, Commit: b.m.Commit()}
		last := o.prev
		for last.Seq < o.upto && len(msg.Entries) < maxBatch {
			n := b.disk.at(last.Seq + 1)
			if n < 0 {
				o.open = false
				b.m.Trimmed(b.now(), to.id)
				return
			}
			msg.Entries = append(msg.Entries, proto.AppendEntry{Stub: proto.Stub{Time: int64(n)}})
			last = b.w.oracle.entries[n].pos
		}
		life := b.w.net.links[b.i][to.i].life
		if b.w.net.send(b.i, to.i, func() { to.doIn(life, func() { to.take(b, msg) }) }) != nil {
			b.m.Backlogged(to.id)
			return
		}
		o.prev = last
		if len(msg.Entries) > 0 {
			o.inflight = append(o.inflight, last.Seq)
		}
	}
}

func (b *brick) appendAck(from *brick, a *proto.AppendAck) {
	b.m.AppendAck(b.now(), from.id, a)
	b.landed(from, a.Round, a.Seq)
}

func (b *brick) landed(from *brick, round, seq uint64) {
	if o := &b.out[from.i]; o.open && o.round == round {
		for len(o.inflight) > 0 && o.inflight[0] <= seq {
			o.inflight = o.inflight[1:]
		}
		b.push(from, o, false)
	}
}

func (b *brick) connected(to int) {
	b.out[to] = outbox{}
	b.m.Connected(b.now(), brickID(to))
}

func (b *brick) lost(to int) {
	b.out[to] = outbox{}
	b.m.Lost(brickID(to))
	for _, a := range b.asks {
		if a.to == to && a.gen != b.w.net.links[b.i][to].gen {
			b.again(a)
		}
	}
}

// publish does what a new role or epoch makes necessary.
func (b *brick) publish() {
	role := b.m.Role()
	if b.m.Config().Epoch == b.epoch && role == b.role {
		return
	}
	cfg := b.m.Config()
	oldRole, old := b.role, b.config
	b.epoch, b.role, b.config = cfg.Epoch, role, cfg.Clone()
	b.w.say("%v is %v in epoch %d, primary %s, in sync %s, at %v", b, role, cfg.Epoch, b.w.name(cfg.Primary), b.w.names(cfg.InSync), b.m.Tail())
	if b.healing != 0 && cfg.Primary != old.Primary {
		b.healing = 0
		b.m.SayWhere()
	}
	if role != core.Primary {
		b.refuseAll()
	}
	now := b.now()
	if was := oldRole == core.Primary && !old.Writable(); role == core.Primary && !cfg.Writable() && !was {
		b.leanEnd = now + 2*time.Second
	}
	b.endLean()
	b.refused, b.below = nil, [maxSessions]uint64{}
	b.durable = [5]uint64{}
	b.lag.Begin(b.now())
	for _, s := range b.fsyncs {
		s.asked = -time.Hour
	}
	if !cfg.IsInSync(b.id) {
		b.detachAll()
	}
	for _, a := range b.asks {
		a.pause = 0
		b.again(a)
		a.pause = 5 * time.Millisecond
	}
}

func (b *brick) tick() {
	now := b.now()
	b.m.Tick(now)
	for _, s := range b.sessions {
		if s != nil && now >= s.leaseEnd && (!s.lapsed || len(s.waits) > 0) {
			s.lapse()
		}
	}
	b.endLean()
	b.findLag()
	for _, s := range b.fsyncs {
		if now >= s.asked+500*time.Millisecond {
			b.askSync(s)
		}
	}
}

// --- disk ---

func (b *brick) heal() {
	if b.healing != 0 {
		return
	}
	b.heals++
	b.healing = b.heals
	n, life := b.healing, b.life
	from := b.w.brick(b.m.Config().Primary)
	epoch := b.m.Config().Epoch
	b.w.say("%v compares itself with %v", b, from)
	ended := func(f func()) {
		b.doIn(life, func() {
			if b.healing == n {
				b.healing = 0
				f()
			}
		})
	}
	failed := func() {
		b.w.after(200*time.Millisecond, func() { ended(func() { b.m.SayWhere() }) })
	}
	gen := b.w.net.links[b.i][from.i].gen
	err := b.w.net.rpc(b.i, from.i, func(answered func(func())) {
		from.do(func() {
			if from.m.Role() != core.Primary || from.m.Config().Epoch != epoch || from.disk.st.pos != from.disk.tail() {
				answered(failed)
				return
			}
			st, last, history, flife := from.disk.st, from.disk.last(), slices.Clone(from.disk.history), from.life
			answered(func() {
				b.doIn(life, func() {
					if b.healing != n {
						return
					}
					b.disk.whole, b.disk.marked = false, false
					long := time.Duration(1+b.r.IntN(1000)) * time.Millisecond
					if b.w.quiet {
						long /= 5
					}
					b.w.after(long, func() {
						if b.life != life || !b.up || b.healing != n {
							return
						}
						if b.w.net.links[b.i][from.i].gen != gen || from.life != flife {
							failed()
							return
						}
						b.disk.reset(&st, last, history)
						b.ahead = true
						b.doIn(life, func() {
							b.healing, b.ahead = 0, false
							b.m.Healed(st.pos, history)
							b.healed()
						})
					})
				})
			})
		})
	})
	if err != nil {
		b.w.after(time.Millisecond, failed)
		return
	}
	// A call ends with its connection.
	var watch func()
	watch = func() {
		if b.life != life || b.healing != n {
			return
		}
		if b.w.net.links[b.i][from.i].gen != gen {
			failed()
			return
		}
		b.w.after(100*time.Millisecond, watch)
	}
	b.w.after(100*time.Millisecond, watch)
}

// healed waits for the sessions that have cached what the comparison changed:
// nobody has told them.
func (b *brick) healed() {
	b.detachAll()
	c := &clearing{seq: b.m.Tail().Seq}
	for _, s := range b.sessions {
		if s != nil && !s.lapsed {
			c.waits++
			s.waits[c.seq] = c
		}
	}
	b.clearing = []*clearing{c}
	b.clearUp()
}

func (b *brick) flushKV() {
	if b.up && b.disk.st.pos == b.disk.tail() && b.disk.hung <= b.w.now {
		b.disk.flushKV()
	}
}

func (b *brick) trim() {
	if b.up {
		b.disk.trim(b.m.Commit())
	}
}

func (b *brick) syncDisk() {
	if b.up && b.disk.hung <= b.w.now {
		b.disk.synced = b.disk.tail().Seq
	}
}

// hasAll reports whether the brick has everything that was acknowledged.
func (b *brick) hasAll() bool {
	o := b.w.oracle
	d := &b.disk
	return d.whole && d.tail().Seq >= o.committed() && (o.committed() < d.base.Seq || d.posAt(o.committed()) == o.posAt(o.committed()))
}
