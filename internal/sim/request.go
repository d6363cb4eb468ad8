package sim

import (
	"slices"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/proto"
	"mortar/internal/replica/core"
)

// order is a request at the primary.
type order struct {
	q     *request
	reply func(answer)
}

// request is a client's wish for a change or an fsync.
type request struct {
	c      *client
	turn   int           // of the client's attach
	epoch  cluster.Epoch // in which the client asks
	number uint64        // 0: an fsync
	acked  uint64
	reg    int
	val    uint64
}

type answer struct {
	status status
	seq    uint64 // of the change, or of what the answer is as of
	val    uint64 // of a read
	epoch  cluster.Epoch
}

type status uint8

const (
	ok         status = iota
	notServing        // it may have been carried out; ask again
	anew              // the same, of the same home, in the epoch that the answer says
	refused           // for want of bricks in sync, or of room
)

type waiting struct {
	seq   uint64
	reply func(answer)
	a     answer
}

type syncWait struct {
	seq   uint64
	reply func(answer)
	came  time.Duration
	asked time.Duration // last
}

// ask is a request that this brick, as home, brings to the primary.
type ask struct {
	q     *request
	reply func(answer)
	try   int
	to    int // the brick that was called, -1 for none
	gen   uint32
	pause time.Duration
	gone  bool
}

// order carries out a request, as primary.
func (b *brick) order(o *order) {
	pos, may := b.m.Next()
	if !may || b.overtaken(o.q) {
		o.reply(answer{status: notServing})
		return
	}
	q := o.q
	if q.number == 0 {
		s := &syncWait{seq: b.disk.st.regs[q.reg].seq, reply: o.reply, came: b.now()}
		b.fsyncs = append(b.fsyncs, s)
		b.askSync(s)
		return
	}
	if cfg := b.m.Config(); !cfg.Writable() {
		switch seq := b.disk.st.answered(q.c.i, q.number); {
		case seq != 0 && seq <= b.m.Acked():
			o.reply(answer{seq: seq})
		case seq != 0:
			b.replies = append(b.replies, waiting{b.m.Tail().Seq, o.reply, answer{seq: seq}})
		case b.now() < b.leanEnd:
			b.lean = append(b.lean, o)
		default:
			o.reply(answer{status: refused})
		}
		return
	}
	if b.refusedBefore(q) {
		b.replies = append(b.replies, waiting{b.m.Tail().Seq, o.reply, answer{status: refused}})
		return
	}
	if b.now() < b.full && b.disk.st.answered(q.c.i, q.number) == 0 {
		b.refused = append(b.refused, numberKey{q.c.i, q.number})
		o.reply(answer{status: refused})
		return
	}
	e := entry{pos: pos, prev: b.disk.last(), session: q.c.i, number: q.number, acked: q.acked, reg: q.reg, val: q.val}
	if !b.disk.st.executed(&e) {
		b.execute(b.w.oracle.make(e))
	}
	seq := b.m.Tail().Seq
	b.replies = append(b.replies, waiting{seq, o.reply, answer{seq: seq}})
}

// overtaken is replica's.
func (b *brick) overtaken(q *request) bool {
	if q.epoch != b.m.Config().Epoch || q.turn < b.turns[q.c.i] {
		return true
	}
	b.turns[q.c.i] = q.turn
	return false
}

// refusedBefore is replica's.
func (b *brick) refusedBefore(q *request) bool {
	b.below[q.c.i] = max(b.below[q.c.i], q.acked)
	b.refused = slices.DeleteFunc(b.refused, func(k numberKey) bool { return k.session == q.c.i && k.number < q.acked })
	return q.number < b.below[q.c.i] || slices.Contains(b.refused, numberKey{q.c.i, q.number})
}

func (b *brick) endLean() {
	cfg := b.m.Config()
	if len(b.lean) == 0 || !cfg.Writable() && b.now() < b.leanEnd {
		return
	}
	lean, life := b.lean, b.life
	b.lean = nil
	b.w.after(0, func() {
		b.doIn(life, func() {
			for _, o := range lean {
				b.order(o)
			}
		})
	})
}

// answer gives the answers whose time has come.
func (b *brick) answer() {
	acked := b.m.Acked()
	for len(b.replies) > 0 && b.replies[0].seq <= acked {
		w := b.replies[0]
		b.replies = b.replies[1:]
		w.reply(w.a)
	}
	b.answerSync(acked)
	if len(b.attaches) > 0 {
		b.answerAttach()
	}
	if len(b.reads) > 0 {
		b.answerReads()
	}
}

func (b *brick) refuseAll() {
	replies, fsyncs, lean := b.replies, b.fsyncs, b.lean
	b.replies, b.fsyncs, b.lean = nil, nil, nil
	for _, w := range replies {
		w.reply(answer{status: notServing})
	}
	for _, s := range fsyncs {
		s.reply(answer{status: notServing})
	}
	for _, o := range lean {
		o.reply(answer{status: notServing})
	}
}

func (b *brick) askSync(s *syncWait) {
	s.asked = b.now()
	cfg := b.m.Config()
	for _, id := range b.m.Counting() {
		o := b.w.brick(id)
		switch {
		case b.durable[o.i] >= s.seq:
		case o == b:
			epoch := cfg.Epoch
			b.syncStore(s.seq, func() { b.syncAck(b.i, &proto.SyncAck{Epoch: epoch, Seq: s.seq}) })
		default:
			b.syncs = append(b.syncs, core.Message{To: id, Kind: proto.KindSync, Body: &proto.Sync{Epoch: cfg.Epoch, Seq: s.seq}})
		}
	}
}

// syncStore flushes the log and then calls then in the loop.
func (b *brick) syncStore(seq uint64, then func()) {
	d := &b.disk
	upto, cuts, life := d.tail().Seq, d.cuts, b.life
	var end func()
	end = func() {
		if b.life != life || !b.up {
			return
		}
		if d.hung > b.w.now {
			b.w.after(min(d.hung-b.w.now, hangLook), end)
			return
		}
		if d.cuts != cuts { // the round proves nothing
			if seq <= d.tail().Seq {
				b.syncStore(seq, then)
			}
			return
		}
		d.synced = max(d.synced, upto)
		b.do(then)
	}
	b.w.after(d.slow+time.Duration(50+b.r.IntN(2000))*time.Microsecond, end)
}

// hangLook is how often a flush that hangs looks whether the disk is well again.
const hangLook = 100 * time.Millisecond

// findLag has the machine told of the brick that holds up those who sync.
func (b *brick) findLag() {
	if len(b.fsyncs) == 0 || b.m.Role() != core.Primary {
		b.lag.None(b.m)
		return
	}
	s := b.fsyncs[0]
	b.lag.Look(b.m, b.now(), s.seq, s.came, func(id cluster.BrickID) uint64 { return b.durable[b.w.brick(id).i] })
}

func (b *brick) sync(from *brick, s *proto.Sync) {
	cfg := b.m.Config()
	if s.Epoch != cfg.Epoch || from.id != cfg.Primary || !b.m.Follows() || s.Seq > b.m.Tail().Seq {
		return
	}
	b.syncStore(s.Seq, func() {
		b.messages = append(b.messages, core.Message{To: from.id, Kind: proto.KindSyncAck, Body: &proto.SyncAck{Epoch: s.Epoch, Seq: s.Seq}})
	})
}

func (b *brick) syncAck(from int, a *proto.SyncAck) {
	if b.m.Role() == core.Primary && a.Epoch == b.m.Config().Epoch {
		b.durable[from] = max(b.durable[from], a.Seq)
	}
	b.m.SyncAck(brickID(from), a)
}

func (b *brick) answerSync(low uint64) {
	if len(b.fsyncs) == 0 {
		return
	}
	for _, id := range b.m.Counting() {
		low = min(low, b.durable[b.w.brick(id).i])
	}
	keep := b.fsyncs[:0]
	for _, s := range b.fsyncs {
		if s.seq > low {
			keep = append(keep, s)
			continue
		}
		s.reply(answer{seq: s.seq})
	}
	b.fsyncs = keep
	if low > 0 {
		b.m.Durable(b.m.At(low))
	}
}

// forward has the primary, wherever it is, carry out a request. It is replica's forwardAsked.
func (b *brick) forward(a *ask) {
	cfg := b.m.Config()
	a.try++
	try := a.try
	a.to = -1
	done := func(r answer) {
		switch {
		case a.gone || a.try != try:
		case r.status == notServing:
			b.again(a)
		default:
			b.finish(a, r)
		}
	}
	q := *a.q
	switch {
	case !cfg.IsInSync(b.id):
		b.finish(a, answer{status: notServing})
	case q.epoch != cfg.Epoch:
		b.finish(a, answer{status: anew, epoch: cfg.Epoch})
	case cfg.Primary.IsZero():
		b.again(a)
	case cfg.Primary == b.id:
		b.order(&order{&q, done})
	default:
		to := b.w.brick(cfg.Primary)
		err := b.w.net.rpc(b.i, to.i, func(answered func(func())) {
			to.do(func() {
				to.order(&order{&q, func(r answer) {
					life := b.life
					answered(func() { b.doIn(life, func() { done(r) }) })
				}})
			})
		})
		if err != nil {
			b.again(a)
			return
		}
		a.to, a.gen = to.i, b.w.net.links[b.i][to.i].gen
	}
}

// again forwards once more after a pause.
func (b *brick) again(a *ask) {
	a.try++
	a.to = -1
	try, life := a.try, b.life
	b.w.after(a.pause, func() {
		b.doIn(life, func() {
			if !a.gone && a.try == try {
				b.forward(a)
			}
		})
	})
	a.pause = min(max(2*a.pause, 5*time.Millisecond), 100*time.Millisecond)
}

func (b *brick) finish(a *ask, r answer) {
	a.gone = true
	b.asks = slices.DeleteFunc(b.asks, func(o *ask) bool { return o == a })
	a.reply(r)
}
