package replica

import (
	"context"
	"errors"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica/core"
)

// syncer is the primary's side of fsync: a request waits until every in-sync
// brick has its log on disk up to the position that the request is about. Each
// brick joins all who wait into one flush (oplog).
//
// One round is under way at a time, and serves everybody who came before it
// began. With several writers that alone would make rounds of one and of the
// rest in turn; so a round also waits for as many as there were at once lately,
// for a moment, if they are not all there yet. A lone writer never waits.
type syncer struct {
	waiting []*syncRequest
	durable map[cluster.BrickID]uint64 // in this epoch

	gathered int  // of waiting, the last ones, that no round was begun for
	crowd    int  // how many waited at once lately
	timer    bool // runs, for gathered
	rounds   uint64
}

// gatherWait is how long a round waits for the usual crowd.
const gatherWait = 200 * time.Microsecond

type syncRequest struct {
	seq   uint64
	req   *request
	reply proto.DoReply
	asked core.Instant
}

// orderFsync makes everything that was done to the inode durable on every in-sync brick.
func (l *loop) orderFsync(q *request) {
	ino := q.do.Op.(*fsop.Fsync).Ino
	seq := l.m.Tail().Seq
	if reply, _, err := l.store.Read(l.ctx, &fsop.Getattr{Ino: ino}); err == nil {
		seq = reply.Attr.Change
	}
	l.waitSync(&syncRequest{seq: seq, req: q})
}

// waitSync answers s when every in-sync brick is durable so far.
func (l *loop) waitSync(s *syncRequest) {
	y := &l.fsync
	s.asked = l.now
	y.waiting = append(y.waiting, s)
	y.gathered++
	y.crowd = max(y.crowd, len(y.waiting))
	l.gatherSync()
}

// gatherSync begins a round if it is time.
func (l *loop) gatherSync() {
	y := &l.fsync
	switch {
	case y.gathered == 0 || y.gathered < len(y.waiting):
	case y.gathered >= y.crowd:
		l.beginSync()
	case !y.timer:
		y.timer = true
		round := y.rounds
		time.AfterFunc(gatherWait, func() {
			l.mail.post(func(l *loop) {
				y.timer = false
				if y.rounds == round && y.gathered > 0 && y.gathered == len(y.waiting) {
					y.crowd = y.gathered // the others stay away
					l.beginSync()
				} else {
					l.gatherSync()
				}
			})
		})
	}
}

// beginSync asks for everybody who has gathered, at once.
func (l *loop) beginSync() {
	y := &l.fsync
	round := y.waiting[len(y.waiting)-y.gathered:]
	y.gathered = 0
	y.rounds++
	last := round[0]
	for _, s := range round {
		s.asked = l.now
		if s.seq > last.seq {
			last = s
		}
	}
	l.askSync(last)
}

// askSync asks every in-sync brick that is not yet known to be durable so far.
func (l *loop) askSync(s *syncRequest) {
	s.asked = l.now
	cfg := l.m.Config()
	for _, b := range cfg.InSync {
		switch {
		case l.fsync.durable[b] >= s.seq:
		case b == l.self:
			l.syncOwn(s.seq)
		default:
			// After the entries that it is about.
			l.syncs = append(l.syncs, core.Message{
				To: b, Kind: proto.KindSync, Body: &proto.Sync{Epoch: cfg.Epoch, Seq: s.seq},
			})
		}
	}
}

// syncOwn flushes this brick's log and then counts it.
func (l *loop) syncOwn(seq uint64) {
	epoch := l.m.Config().Epoch
	l.syncStore(seq, func(l *loop) {
		l.syncAck(l.self, &proto.SyncAck{Epoch: epoch, Seq: seq})
	})
}

// syncStore flushes this brick's log up to seq and then calls then in the loop.
func (l *loop) syncStore(seq uint64, then func(*loop)) {
	l.bg.Go(func() error {
		err := l.store.Sync(l.ctx, seq)
		if err == nil {
			l.mail.post(then)
		} else if !errors.Is(err, context.Canceled) {
			l.log.Error("the log cannot be made durable; this brick ends its service", "err", err)
		}
		return nil
	})
}

// sync takes the primary's wish for durability.
func (l *loop) sync(from cluster.BrickID, s *proto.Sync) {
	cfg := l.m.Config()
	if l.m.Role() != core.Backup || s.Epoch != cfg.Epoch || from != cfg.Primary || s.Seq > l.m.Tail().Seq {
		return
	}
	l.syncStore(s.Seq, func(l *loop) {
		l.kept.Messages = append(l.kept.Messages, core.Message{
			To: from, Kind: proto.KindSyncAck, Body: &proto.SyncAck{Epoch: s.Epoch, Seq: s.Seq},
		})
	})
}

func (l *loop) syncAck(from cluster.BrickID, a *proto.SyncAck) {
	if l.m.Role() == core.Primary && a.Epoch == l.m.Config().Epoch {
		l.fsync.durable[from] = max(l.fsync.durable[from], a.Seq)
	}
}

// answerFsync answers those whose wish is fulfilled.
func (l *loop) answerFsync() {
	if len(l.fsync.waiting) == 0 {
		return
	}
	cfg := l.m.Config()
	low := l.m.Acked()
	for _, b := range cfg.InSync {
		low = min(low, l.fsync.durable[b])
	}
	keep := l.fsync.waiting[:0]
	for _, s := range l.fsync.waiting {
		if s.seq > low {
			keep = append(keep, s)
			continue
		}
		s.req.finish(s.reply)
	}
	clear(l.fsync.waiting[len(keep):])
	l.fsync.waiting = keep
	l.fsync.gathered = min(l.fsync.gathered, len(keep))
	l.gatherSync()
	if low > 0 {
		l.m.Durable(l.m.At(low))
	}
}

// syncRetry is after how long a brick is asked again: the question or the
// answer may have been lost with a connection.
const syncRetry = 500 * time.Millisecond

func (l *loop) tickSync() {
	for _, s := range l.fsync.waiting {
		if l.now >= s.asked+syncRetry {
			l.askSync(s)
		}
	}
}

// reset forgets what is known of other epochs, and asks anew.
func (y *syncer) reset(l *loop) {
	clear(y.durable)
	y.gathered, y.crowd = 0, 0
	for _, s := range y.waiting {
		s.asked = 0
	}
}

// refuse sends everybody elsewhere.
func (y *syncer) refuse() int {
	n := len(y.waiting)
	for _, s := range y.waiting {
		s.req.finish(proto.DoReply{Status: proto.NotServing})
	}
	y.waiting, y.gathered, y.crowd = nil, 0, 0
	return n
}
