package replica

import (
	"time"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica/core"
)

// syncer is the primary's side of fsync: a request waits until every in-sync
// brick has its log on disk up to the position that the request is about.
//
// One round is under way at a time, and serves everybody who came before it
// began. With several writers that alone would make rounds of one and of the
// rest in turn; so a round also waits for as many as there were at once lately,
// for a moment, if they are not all there yet. A lone writer never waits. Fewer
// rounds mean fewer flushes of every disk and fewer messages: on busy machines
// that is worth more than beginning at once.
//
// A round is asked of the other bricks right behind the entries that it is about,
// in the same message on the wire, and before this brick's own disk is busy. Small
// entries of which nobody waits for more than their round even leave with it: one
// write of this log, one message to each brick, one write of its log, however many
// they are.
type syncer struct {
	waiting []*syncRequest
	durable map[cluster.BrickID]uint64 // in this epoch

	gathered int          // of waiting, the last ones, that no round was begun for
	crowd    int          // how many waited at once lately
	timer    *time.Timer  // runs, for gathered; nil: none does
	rounds   uint64       // begun
	took     core.Instant // the last one that ended
	ask      uint64       // what the loop is to ask for when it acts; 0: nothing

	slow   core.Lag     // whom the oldest of waiting waits for
	warned *syncRequest // it was said that this one waits for one brick

	first uint64        // the first entry that is held back for the next round; 0: none
	bytes int           // of those
	held  []core.Stream // what the machine wants sent of them
}

// gatherWait is the longest that a round waits for the usual crowd. It does not wait
// longer than the round before took, either: to wait in vain then costs no more than to
// have come just after a round had begun.
const gatherWait = 500 * time.Microsecond

// holdBytes is how much is held back. More is better on its way while the disks are
// busy with the round before.
const holdBytes = 64 << 10

type syncRequest struct {
	seq   uint64
	req   *request
	reply proto.DoReply
	came  core.Instant
	asked core.Instant // last
}

// flusher makes this brick's log durable. One flush is under way at a time.
type flusher struct {
	want    uint64 // 0: nobody wants anything
	running bool
	// held is the acknowledgement of entries that nobody waits for but those who
	// wait for the flush under way: it goes with the flush's, so that both cost one
	// message. holds says that there may be one. Neither outlives the next tick,
	// lest a slow disk look like a brick that does not answer.
	holds bool
	held  *core.Message
}

// keep holds back an acknowledgement of entries, if that may be. One that is sent
// says all that the one held before it would have said.
func (f *flusher) keep(ack core.Message) bool {
	if f.held = nil; f.holds {
		f.held = &ack
	}
	return f.holds
}

// releaseAck sends the acknowledgement that was held back, and holds none from now on.
func (l *loop) releaseAck() {
	f := &l.flusher
	if f.held != nil {
		l.kept.Messages = append(l.kept.Messages, *f.held)
	}
	f.holds, f.held = false, nil
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
	s.came, s.asked = l.now, l.now
	y.waiting = append(y.waiting, s)
	y.gathered++
	y.crowd = max(y.crowd, len(y.waiting))
	l.gatherSync()
}

// hold notes that nobody waits for the entry at seq but for a round.
func (y *syncer) hold(seq uint64, n int) {
	if y.first == 0 {
		y.first, y.bytes = seq, 0
	}
	y.bytes += n
}

// holding reports whether the entries from l.fsync.first on are to stay here for now,
// not even handed to the operating system.
func (l *loop) holding() bool {
	y := &l.fsync
	return y.first > 0 && y.gathered > 0 && y.ask == 0 && y.bytes <= holdBytes && l.replies.len() == 0 && l.m.Commit() < y.first
}

// holdBack returns what is to be sent now of the streams that the machine wants
// sent, and of those that were held back.
func (l *loop) holdBack(streams []core.Stream) []core.Stream {
	y := &l.fsync
	if !l.holding() {
		var now []core.Stream
		for _, s := range y.held {
			if o := l.outbox[s.To]; o != nil && o.round == s.Round && o.upto == s.Prev.Seq { // not begun anew since
				now = append(now, s)
			}
		}
		y.first, y.held = 0, y.held[:0]
		for _, s := range streams {
			now = joinStream(now, s)
		}
		return now
	}
	now := streams[:0]
	for _, s := range streams {
		// One that catches up, or begins, is about more than what is held.
		if o := l.outbox[s.To]; o == nil || o.round != s.Round || s.Prev.Seq+1 < y.first {
			now = append(now, s)
			continue
		}
		y.held = joinStream(y.held, s)
	}
	return now
}

// gatherSync begins a round if it is time.
func (l *loop) gatherSync() {
	y := &l.fsync
	switch {
	case y.gathered == 0 || y.gathered < len(y.waiting):
	case y.gathered >= y.crowd:
		y.begin(l.now)
	case y.timer == nil:
		round := y.rounds
		y.timer = time.AfterFunc(min(gatherWait, y.took), func() {
			l.mail.post(func(l *loop) {
				if y.rounds != round {
					return // it was begun just then
				}
				y.timer = nil
				if y.gathered > 0 && y.gathered == len(y.waiting) {
					y.crowd = y.gathered // the others stay away
					y.begin(l.now)
				} else {
					l.gatherSync()
				}
			})
		})
	}
}

// begin asks for everybody who has gathered, at once.
func (y *syncer) begin(now core.Instant) {
	for _, s := range y.waiting[len(y.waiting)-y.gathered:] {
		s.asked = now
		y.ask = max(y.ask, s.seq)
	}
	y.gathered = 0
	y.rounds++
	if y.timer != nil {
		y.timer.Stop()
		y.timer = nil
	}
}

// askSyncs asks every in-sync brick that is not yet known to be durable as far
// as somebody wants.
func (l *loop) askSyncs() {
	seq := l.fsync.ask
	if l.fsync.ask = 0; seq == 0 || l.m.Role() != core.Primary {
		return
	}
	cfg := l.m.Config()
	var messages []core.Message
	for _, b := range l.m.Counting() {
		if b != l.self && l.fsync.durable[b] < seq {
			messages = append(messages, core.Message{
				To: b, Kind: proto.KindSync, Body: &proto.Sync{Epoch: cfg.Epoch, Seq: seq, Alone: l.replies.len() == 0},
			})
		}
	}
	l.sendAll(messages)
	if l.fsync.durable[l.self] < seq {
		l.flushLog(seq)
	}
}

// flushLog has this brick's log flushed up to seq, and flushed called then.
func (l *loop) flushLog(seq uint64) {
	f := &l.flusher
	f.want = max(f.want, seq)
	if f.running || f.want == 0 {
		return
	}
	f.running = true
	seq, f.want = f.want, 0
	l.bg.Go(func() error {
		err := l.store.Sync(l.ctx, seq)
		l.mail.post(func(l *loop) {
			f.running = false
			switch {
			case err == nil:
				l.flushed()
			case l.store.Err() != nil:
				l.log.Error("the log cannot be made durable; this brick ends its service", "err", err)
			default: // it was undone meanwhile, and nobody needs it
			}
			if f.want <= l.store.Durable() {
				f.want = 0
			}
			l.flushLog(f.want)
		})
		return nil
	})
}

// flushed notes, or tells the primary, how far this brick's log is durable. What
// it says is true of the log as it is now: an earlier flush may have been about
// entries that were undone since.
func (l *loop) flushed() {
	switch cfg, seq := l.m.Config(), l.store.Durable(); {
	case l.m.Role() == core.Primary:
		l.syncAck(l.self, &proto.SyncAck{Epoch: cfg.Epoch, Seq: seq})
	case l.m.Follows():
		l.releaseAck()
		l.kept.Messages = append(l.kept.Messages, core.Message{
			To: cfg.Primary, Kind: proto.KindSyncAck, Body: &proto.SyncAck{Epoch: cfg.Epoch, Seq: seq},
		})
	}
}

// sync takes the primary's wish for durability. As long as this log may differ
// from the primary's the wish is about something else than what is here; the
// primary repeats it.
func (l *loop) sync(from cluster.BrickID, s *proto.Sync) {
	cfg := l.m.Config()
	if s.Epoch != cfg.Epoch || from != cfg.Primary || !l.m.Follows() || s.Seq > l.m.Tail().Seq {
		return
	}
	if s.Seq <= l.store.Durable() {
		l.flushed()
		return
	}
	l.flusher.holds = s.Alone
	l.flushLog(s.Seq)
}

func (l *loop) syncAck(from cluster.BrickID, a *proto.SyncAck) {
	if l.m.Role() == core.Primary && a.Epoch == l.m.Config().Epoch {
		l.fsync.durable[from] = max(l.fsync.durable[from], a.Seq)
	}
	l.m.SyncAck(from, a)
}

// answerFsync answers those whose wish is fulfilled.
func (l *loop) answerFsync() {
	if len(l.fsync.waiting) == 0 {
		return
	}
	low := l.m.Acked()
	for _, b := range l.m.Counting() {
		low = min(low, l.fsync.durable[b])
	}
	keep := l.fsync.waiting[:0]
	for _, s := range l.fsync.waiting {
		if s.seq > low {
			keep = append(keep, s)
			continue
		}
		l.fsync.took = l.now - s.asked
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

// findLag tells the machine of the brick that holds up those who sync, and the log if that lasts.
func (l *loop) findLag() {
	y := &l.fsync
	s := y.oldest()
	if s == nil || l.m.Role() != core.Primary {
		y.slow.None(l.m)
		return
	}
	behind, since := y.slow.Look(l.m, l.now, s.seq, s.came, func(b cluster.BrickID) uint64 { return y.durable[b] })
	if !behind.IsZero() && l.now >= since+time.Second && y.warned != s {
		y.warned = s
		l.log.Warn("everybody who syncs waits for the disk of one brick: if the set can do without it, it leaves the in-sync set for a while",
			"brick", behind, "waiting", (l.now - s.came).Round(time.Millisecond))
	}
}

func (y *syncer) oldest() *syncRequest {
	if len(y.waiting) == 0 {
		return nil
	}
	return y.waiting[0]
}

func (l *loop) tickSync() {
	l.releaseAck()
	l.findLag()
	l.fsync.first = 0 // a round may take long
	for _, s := range l.fsync.waiting {
		if l.now >= s.asked+core.SyncRetry {
			s.asked = l.now
			l.fsync.ask = max(l.fsync.ask, s.seq)
		}
	}
}

// reset forgets what is known of other epochs, and asks anew.
func (y *syncer) reset(now core.Instant) {
	clear(y.durable)
	y.gathered, y.crowd = 0, 0
	y.first, y.held = 0, nil // every stream begins anew
	y.slow.Begin(now)
	y.warned = nil
	y.reask()
}

// reask has everybody asked again who may not have heard.
func (y *syncer) reask() {
	for _, s := range y.waiting {
		y.ask = max(y.ask, s.seq)
	}
}

// refuse sends everybody elsewhere.
func (y *syncer) refuse() int {
	n := len(y.waiting)
	for _, s := range y.waiting {
		s.req.finish(proto.DoReply{Status: proto.NotServing})
	}
	y.waiting, y.gathered, y.crowd, y.ask = nil, 0, 0, 0
	return n
}
