package replica

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica/core"
)

type requestKey struct {
	session cluster.SessionID
	number  uint64
}

// request is a client's wish to change something (or to fsync) on its way
// through the primary.
type request struct {
	from    cluster.BrickID // the home that forwarded it; zero if it is this brick
	session cluster.SessionID
	turn    uint64   // of the session's Attach through which it came
	do      proto.Do // Epoch 0: this primary's own wish

	since   core.Instant // when it began to wait for a lock
	roomEnd core.Instant // until when it waits for room, 0 if it does not
	done    chan proto.DoReply
}

// finish answers the request. It is called once.
func (q *request) finish(r proto.DoReply) { q.done <- r }

// order has this brick, as primary, carry out a request and waits for the
// answer. Status NotServing means that it may or may not be carried out, and
// is to be asked again.
func (r *Replica) order(ctx context.Context, q *request) proto.DoReply {
	q.done = make(chan proto.DoReply, 1)
	if !r.mail.post(func(l *loop) { l.order(q) }) {
		return proto.DoReply{Status: proto.NotServing}
	}
	select {
	case d := <-q.done:
		return d
	case <-ctx.Done():
	case <-r.done:
	}
	return proto.DoReply{Status: proto.NotServing}
}

// order carries out a request as far as can be done at once.
func (l *loop) order(q *request) {
	pos, ok := l.m.Next()
	if !ok || l.stopped || l.overtaken(q) {
		q.finish(proto.DoReply{Status: proto.NotServing})
		return
	}
	if l.frozen {
		l.iced = append(l.iced, q)
		return
	}
	if errno := l.refusedBefore(q); errno != 0 {
		l.reply(q, l.m.Tail().Seq, proto.DoReply{Errno: errno, Reply: fsop.Reply{Seq: l.m.Tail().Seq}})
		return
	}
	if l.parkWindow(q) || l.behindRoom(q) {
		return
	}
	if q.do.Op.Kind() == fsop.KindFsync {
		l.orderFsync(q)
		return
	}
	cfg := l.m.Config()
	if !cfg.Writable() {
		if l.repeat(q) {
			return
		}
		if l.now < l.leanEnd {
			l.lean = append(l.lean, q)
			return
		}
		q.finish(proto.DoReply{Errno: fsop.EROFS})
		return
	}
	if err := l.admit(q.do.Op); err != nil {
		if !l.repeat(q) && !l.parkRoom(q, err) {
			l.refuse(q, err)
			q.finish(failure(err))
		}
		return
	}
	e := &proto.Entry{
		Pos: pos, Time: l.time(), Session: q.session, Number: q.do.Number, Acked: q.do.Acked, Op: q.do.Op,
	}
	res, err := l.execute(e, nil)
	var errno fsop.Errno
	switch {
	case errors.As(err, &errno):
		if errno == fsop.EAGAIN && l.parkLock(q) {
			return
		}
		l.refuse(q, errno)
		l.reply(q, l.m.Tail().Seq, proto.DoReply{Errno: errno, Reply: fsop.Reply{Seq: l.m.Tail().Seq}})
	case err != nil:
		l.log.Error("the brick failed", "err", err)
		q.finish(proto.DoReply{Status: proto.NotServing})
	default:
		if res.Raw != nil {
			l.room.ordered(e.Pos.Seq, q.do.Op)
			l.recent.put(recentOf(q, e, res.Raw))
			if o, ok := q.do.Op.(*fsop.CloseSession); ok {
				delete(l.seen, cluster.SessionID(o.Session))
				delete(l.turns, cluster.SessionID(o.Session))
				delete(l.refused, cluster.SessionID(o.Session))
			} else if q.session != 0 {
				l.seen[q.session] = l.now
			}
		}
		if w := written(q.do.Op); w != nil && w.Sync && res.Raw != nil {
			l.fsync.hold(e.Pos.Seq, len(res.Raw))
		}
		l.executed(q, l.m.Tail().Seq, res.Reply)
	}
}

// overtaken reports whether a request was made in an older epoch than this, or comes through
// a home that its client has left since. Its client asks again, under the same number, and
// may have been refused already: then it must not be carried out late. Turns are known in
// this epoch only, and that is enough: what was asked in another is carried out in none.
func (l *loop) overtaken(q *request) bool {
	if q.do.Epoch == 0 {
		return false
	}
	if q.do.Epoch != l.m.Config().Epoch || q.turn < l.turns[q.session] {
		return true
	}
	if q.session != 0 {
		l.turns[q.session] = q.turn
	}
	return false
}

// refusals are what a session was refused in this epoch.
type refusals struct {
	below uint64 // the client has had its answers to all numbers below it: they are not in list
	list  []refusal
}

// refusal is the answer to a change that was not carried out.
type refusal struct {
	number uint64
	errno  fsop.Errno
}

// maxRefusals bounds what is remembered of a session's refusals. A client has fewer under way.
const maxRefusals = 2 * proto.MaxAhead

// refuse remembers that a change was refused, for as long as a copy of it may come in this
// epoch: one that went to a connection which broke, and was sent again. That the set takes
// no changes (EROFS) needs not be remembered, since it is so for a whole epoch.
func (l *loop) refuse(q *request, err error) {
	var errno fsop.Errno
	if q.do.Number == 0 || !errors.As(err, &errno) || errno == fsop.ENOTCONN { // a session that is away comes back and asks again
		return
	}
	known := l.refused[q.session]
	if known == nil {
		known = new(refusals)
		l.refused[q.session] = known
	}
	if len(known.list) >= maxRefusals {
		known.list = known.list[1:]
	}
	known.list = append(known.list, refusal{q.do.Number, errno})
}

// refusedBefore returns with what a change was refused, 0 if it was not. Of those that the
// client has the answers to it is forgotten which they were: a copy of one of them is out of
// date (ESTALE), refused or not. In the log is nothing that would say so, if all that came after it
// was refused as well.
func (l *loop) refusedBefore(q *request) fsop.Errno {
	known := l.refused[q.session]
	if known == nil {
		return 0
	}
	if q.do.Acked > known.below {
		known.below = q.do.Acked
		known.list = slices.DeleteFunc(known.list, func(r refusal) bool { return r.number < known.below })
	}
	if q.do.Number != 0 && q.do.Number < known.below {
		return fsop.ESTALE
	}
	for _, r := range known.list {
		if r.number == q.do.Number {
			return r.errno
		}
	}
	return 0
}

// executed answers a request that was executed at seq, now or before, when that may be told.
func (l *loop) executed(q *request, seq uint64, r fsop.Reply) {
	if w := written(q.do.Op); w != nil && w.Sync {
		l.waitSync(&syncRequest{seq: seq, req: q, reply: proto.DoReply{Reply: r}})
		return
	}
	l.reply(q, l.m.Tail().Seq, proto.DoReply{Reply: r})
}

// repeat answers a request that is to be refused, for want of room or of bricks in sync,
// if it was executed before and only the answer was lost: a refusal would not be true.
func (l *loop) repeat(q *request) bool {
	if q.do.Number == 0 {
		return false
	}
	r, ok, err := l.store.Answered(q.session, q.do.Number)
	switch w := written(q.do.Op); {
	case err != nil:
		l.log.Error("the brick failed", "err", err)
		q.finish(proto.DoReply{Status: proto.NotServing})
	case !ok:
		return false
	case r.Seq <= l.m.Acked() && (w == nil || !w.Sync):
		// What comes after it may not be acknowledged for long. It is in the log already, but
		// perhaps of this very round, and that flushes before it answers.
		l.mail.post(func(*loop) { q.finish(proto.DoReply{Reply: r}) })
	default:
		l.executed(q, r.Seq, r)
	}
	return true
}

// written returns what op writes, nil if nothing.
func written(op fsop.Op) *fsop.Write {
	switch op := op.(type) {
	case *fsop.Write:
		return op
	case *fsop.Make:
		return &op.First
	}
	return nil
}

// recentOf keeps an executed entry for streaming. The home that forwarded a
// large write has its payload already.
func recentOf(q *request, e *proto.Entry, raw []byte) recentEntry {
	r := recentEntry{pos: e.Pos, raw: raw}
	if w := written(e.Op); w != nil && len(w.Data) >= stubMin && !q.from.IsZero() {
		r.origin = q.from
		r.stub = proto.Stub{Pos: e.Pos, Time: e.Time, Session: e.Session, Number: e.Number, Acked: e.Acked}
	}
	return r
}

// leanWait is how long changes wait, after a fail-over that left fewer bricks
// in sync than the set needs, before they are refused. When all machines come
// back from a power cut one of them leads first, and the others need a moment
// to agree with it: no application has to hear of that.
const leanWait = core.Instant(2 * time.Second)

// endLean orders again what waited for the set to become writable, if it is now
// or if that has taken long enough.
func (l *loop) endLean() {
	cfg := l.m.Config()
	if len(l.lean) == 0 || !cfg.Writable() && l.now < l.leanEnd {
		return
	}
	waiting := l.lean
	l.lean = nil
	l.mail.post(func(l *loop) {
		for _, q := range waiting {
			l.order(q)
		}
	})
}

// reply answers q as soon as seq is acknowledged.
func (l *loop) reply(q *request, seq uint64, r proto.DoReply) {
	l.replies.push(waiting{seq, q, r})
}

// answer gives the replies whose time has come.
func (l *loop) answer() {
	acked := l.m.Acked()
	for l.replies.len() > 0 && l.replies.front().seq <= acked {
		w := l.replies.pop()
		w.req.finish(w.reply)
	}
	l.answerFsync()
}

// refuseAll sends everybody who waits for this primary elsewhere.
func (l *loop) refuseAll(why string) {
	n := l.replies.len()
	for l.replies.len() > 0 {
		l.replies.pop().req.finish(proto.DoReply{Status: proto.NotServing})
	}
	for ino, qs := range l.parked {
		for _, q := range qs {
			q.finish(proto.DoReply{Status: proto.NotServing})
		}
		n += len(qs)
		delete(l.parked, ino)
	}
	for _, q := range l.iced {
		q.finish(proto.DoReply{Status: proto.NotServing})
	}
	for _, q := range l.lean {
		q.finish(proto.DoReply{Status: proto.NotServing})
	}
	n += len(l.iced) + len(l.lean) + l.room.refuse() + l.fsync.refuse()
	l.iced, l.frozen, l.lean = nil, false, nil
	if n > 0 {
		l.log.Info("requests sent elsewhere", "count", n, "why", why)
	}
}

// parkLock keeps a request whose lock is taken, if it wishes to wait.
func (l *loop) parkLock(q *request) bool {
	op, ok := q.do.Op.(*fsop.Setlk)
	if !ok || !op.Wait {
		return false
	}
	if q.since == 0 {
		q.since = l.now
	} else if l.now >= q.since+fsop.LockWait {
		return false
	}
	l.parked[op.Ino] = append(l.parked[op.Ino], q)
	return true
}

// released lets those who waited for locks or windows of these files try
// again, in the order in which they came.
func (l *loop) released(op fsop.Op, inos []fsop.Ino) {
	_, ended := op.(*fsop.CloseSession) // and with it all its windows
	if len(inos) == 0 && !ended {
		return
	}
	again := make(chan struct{})
	close(*l.closed.Swap(&again))
	if ended {
		inos = slices.Collect(maps.Keys(l.parked))
		clear(l.recalls)
	}
	for _, ino := range inos {
		delete(l.recalls, ino)
		if qs := l.parked[ino]; len(qs) > 0 {
			delete(l.parked, ino)
			l.mail.post(func(l *loop) {
				for _, q := range qs {
					l.order(q)
				}
			})
		}
	}
}

// tickLocks answers those who have waited long enough; they may ask again.
func (l *loop) tickLocks() {
	for ino, qs := range l.parked {
		keep := qs[:0]
		for _, q := range qs {
			if q.do.Op.Kind() != fsop.KindSetlk || l.now < q.since+fsop.LockWait {
				keep = append(keep, q)
				continue
			}
			l.refuse(q, fsop.EAGAIN)
			l.reply(q, l.m.Tail().Seq, proto.DoReply{Errno: fsop.EAGAIN})
		}
		if l.parked[ino] = keep; len(keep) == 0 {
			delete(l.parked, ino)
		}
	}
}

// failure is the reply for an error of the file system or of anything else.
func failure(err error) proto.DoReply {
	var errno fsop.Errno
	if errors.As(err, &errno) {
		return proto.DoReply{Errno: errno}
	}
	return proto.DoReply{Status: proto.NotServing}
}

// forward has the primary, wherever it is, carry out a wish of this brick's own, through
// fail-overs, until ctx is done or this replica is no longer in sync. It may be carried out twice.
func (r *Replica) forward(ctx context.Context, session cluster.SessionID, turn uint64, do proto.Do) proto.DoReply {
	for {
		do.Epoch = r.view.Load().cfg.Epoch
		if reply := r.forwardAsked(ctx, session, turn, do); reply.Status != proto.Anew {
			return reply
		}
	}
}

// forwardAsked has the primary carry out what one of this replica's clients asked for, in the
// epoch in which it did, until that ends (Anew), ctx is done or this replica is no
// longer in sync. The client may be elsewhere by then, and have been refused there: what it
// still wants after a fail-over only the client itself knows.
func (r *Replica) forwardAsked(ctx context.Context, session cluster.SessionID, turn uint64, do proto.Do) proto.DoReply {
	if w := written(do.Op); w != nil && len(w.Data) >= stubMin {
		key := requestKey{session, do.Number}
		r.pendingMu.Lock()
		r.pending[key] = do.Op
		r.pendingMu.Unlock()
		defer func() {
			r.pendingMu.Lock()
			delete(r.pending, key)
			r.pendingMu.Unlock()
		}()
	}
	pause := 5 * time.Millisecond
	for {
		v := r.view.Load()
		if !v.cfg.IsInSync(r.self) {
			return proto.DoReply{Status: proto.NotServing}
		}
		if do.Epoch != v.cfg.Epoch {
			return proto.DoReply{Status: proto.Anew, Epoch: v.cfg.Epoch}
		}
		reply := proto.DoReply{Status: proto.NotServing}
		switch {
		case v.cfg.Primary.IsZero():
		case v.cfg.Primary == r.self:
			reply = r.order(ctx, &request{session: session, turn: turn, do: do})
		default:
			msg := &proto.Forward{Session: session, Turn: turn, Do: do}
			body, err := r.callPrimary(ctx, v, codec.Append(nil, msg))
			if err == nil {
				if err = codec.Decode(body, &reply); err != nil {
					r.log.Error("the primary's answer cannot be read", "err", err)
					reply = proto.DoReply{Status: proto.NotServing}
				}
			}
		}
		if reply.Status != proto.NotServing {
			return reply
		}
		select {
		case <-v.epoch.Done():
		case <-time.After(pause):
			pause = min(2*pause, 100*time.Millisecond)
		case <-ctx.Done():
			return reply
		case <-r.done:
			return reply
		}
	}
}

// callPrimary calls the primary of a view, and gives up when the view's epoch ends.
func (r *Replica) callPrimary(ctx context.Context, v *view, body []byte) ([]byte, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(v.epoch, cancel)()
	return r.transport.Call(ctx, v.cfg.Primary, proto.KindForward, r.envelope(v.cfg.Primary), body)
}
