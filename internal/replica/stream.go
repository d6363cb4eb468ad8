package replica

import (
	"errors"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/proto"
	"mortar/internal/replica/core"
)

// Bounds of what is on the way to one backup. The machine bounds the number of
// entries, the shell their bytes.
const (
	maxInflightBytes = 6 << 20  // well below what a connection queues (wire.Options.MaxQueue)
	maxAppendBytes   = 1 << 20  // of the entries of one Append message, but for a single large one: both fit into a frame
	entryHead        = 64       // at least what a stub, or the length of an entry, takes beside its bytes
	flushSize        = 64 << 10 // larger ones leave at once
	stubMin          = 512      // smaller payloads are not worth a stub
	partMin          = 2 << 10  // entries that are sent from where they are: to every backup the same bytes
)

// outbox is what the machine wants streamed to one backup and the connection
// has not taken yet.
type outbox struct {
	round    uint64
	first    uint64 // stubs may stand for entries from here on: ordered in this round
	prev     cluster.Pos
	upto     uint64
	inflight fifo[flight]
	bytes    int
}

type flight struct {
	seq   uint64
	bytes int
}

// joinStream adds s, to the last stream for the same brick if it continues that: what
// leaves together is one message.
func joinStream(all []core.Stream, s core.Stream) []core.Stream {
	for i := len(all) - 1; i >= 0; i-- {
		if l := &all[i]; l.To == s.To {
			if l.Round == s.Round && l.Upto == s.Prev.Seq {
				l.Upto, l.Commit = s.Upto, s.Commit
				return all
			}
			break
		}
	}
	return append(all, s)
}

// stream takes on what the machine wants sent.
func (l *loop) stream(s core.Stream) {
	o := l.outbox[s.To]
	if o == nil || o.round != s.Round || o.upto != s.Prev.Seq {
		o = &outbox{round: s.Round, prev: s.Prev, first: l.m.Tail().Seq + 1}
		l.outbox[s.To] = o
		o.upto = s.Upto
		l.push(s.To, o, true)
		return
	}
	o.upto = s.Upto
	l.push(s.To, o, false)
}

// push sends as much as may be on the way. Even with nothing to send, the first
// message of a round goes out: it tells the backup where the logs meet.
func (l *loop) push(to cluster.BrickID, o *outbox, first bool) {
	for first || o.prev.Seq < o.upto && o.bytes < maxInflightBytes {
		first = false
		msg := &proto.Append{Epoch: l.m.Config().Epoch, Round: o.round, Prev: o.prev, Commit: l.m.Commit()}
		last, size := o.prev, 0
		for last.Seq < o.upto {
			r, ok := l.recent.get(last.Seq + 1)
			if !ok {
				if len(msg.Entries) > 0 {
					break
				}
				var err error
				if last, size, err = l.readLog(msg, o); err != nil {
					l.cannotRead(to, o, err)
					return
				}
				break
			}
			ae := proto.AppendEntry{Raw: r.raw}
			if r.origin == to && r.stub.Pos.Seq >= o.first {
				ae = proto.AppendEntry{Stub: r.stub}
			}
			n := len(ae.Raw) + entryHead
			if len(msg.Entries) > 0 && size+n > maxAppendBytes {
				break // one that is longer than a frame would never arrive
			}
			msg.Entries = append(msg.Entries, ae)
			size += n
			last = r.pos
		}
		if err := l.send(to, proto.KindAppend, codec.Parts(msg, partMin)...); err != nil {
			l.m.Backlogged(to)
			return
		}
		if size >= flushSize {
			l.transport.Flush(to) // and be under way while the next is made
		}
		o.prev = last
		if len(msg.Entries) > 0 {
			o.inflight.push(flight{last.Seq, size})
			o.bytes += size
		}
	}
}

// readLog fills msg from the log, after o.prev.
func (l *loop) readLog(msg *proto.Append, o *outbox) (last cluster.Pos, size int, err error) {
	last = o.prev
	raws, err := l.store.Entries(o.prev.Seq, maxAppendBytes)
	if err != nil {
		return last, 0, err
	}
	for _, raw := range raws {
		var head position
		if _, err := codec.DecodePrefix(raw, &head); err != nil {
			return last, 0, err
		}
		n := len(raw) + entryHead
		if head.Seq > o.upto || len(msg.Entries) > 0 && size+n > maxAppendBytes {
			break
		}
		msg.Entries = append(msg.Entries, proto.AppendEntry{Raw: raw})
		size += n
		last = cluster.Pos(head)
	}
	if len(msg.Entries) == 0 {
		return last, 0, ErrTrimmed
	}
	return last, size, nil
}

// position decodes the head of an encoded entry.
type position cluster.Pos

func (p *position) Code(c *codec.Coder) { proto.Pos(c, (*cluster.Pos)(p)) }

func (l *loop) cannotRead(to cluster.BrickID, o *outbox, err error) {
	delete(l.outbox, to)
	if !errors.Is(err, ErrTrimmed) {
		l.log.Error("reading the log for a backup", "backup", to, "after", o.prev, "err", err)
	}
	l.m.Trimmed(l.now, to)
}

func (l *loop) appendAck(from cluster.BrickID, a *proto.AppendAck) {
	l.m.AppendAck(l.now, from, a)
	if len(l.fsync.waiting) > 0 && l.fsync.durable[from] == 0 {
		// What it was asked before it followed this epoch's log it has ignored.
		l.fsync.reask()
	}
	l.landed(from, a.Round, a.Seq)
}

// landed counts what a backup has as no longer on the way, and sends more.
func (l *loop) landed(from cluster.BrickID, round, seq uint64) {
	if o := l.outbox[from]; o != nil && o.round == round {
		for o.inflight.len() > 0 && o.inflight.front().seq <= seq {
			o.bytes -= o.inflight.pop().bytes
		}
		l.push(from, o, false)
	}
}

func (l *loop) beatAck(from cluster.BrickID, a *proto.BeatAck) {
	l.m.BeatAck(l.now, from, a)
	if a.Epoch != l.m.Config().Epoch {
		return
	}
	l.landed(from, a.Round, a.Acked)
	l.room.report(from, a.Applied, a.Free)
	for _, s := range a.Sessions {
		l.seen[s] = l.now
	}
}

func (l *loop) connected(b cluster.BrickID) {
	delete(l.outbox, b)
	l.m.Connected(l.now, b)
}

func (l *loop) lost(b cluster.BrickID) {
	delete(l.outbox, b)
	l.m.Lost(b)
}

// tickRecent lets go of the last entries when there have been no others for a while, and all have been sent. Who should want
// them again, a backup that was away say, is sent what the log has.
func (l *loop) tickRecent() {
	for _, o := range l.outbox {
		if o.prev.Seq < o.upto {
			return
		}
	}
	l.recent.tick()
}

// ring keeps the last entries that this primary ordered, so that streaming them
// needs no reading of the log.
type ring struct {
	slots [ringSlots]recentEntry
	bytes int
	low   uint64 // oldest kept
	next  uint64 // 0: empty
	idle  int    // ticks since the last one came
}

const (
	ringSlots = 4096
	ringBytes = 8 << 20
	ringTicks = 5 // without a new entry, and the ring is emptied
)

type recentEntry struct {
	pos    cluster.Pos
	raw    []byte
	origin cluster.BrickID // the home that forwarded it, if a stub may stand for it there
	stub   proto.Stub
}

func (r *ring) reset() { *r = ring{} }

// tick empties a ring that gets nothing new.
func (r *ring) tick() {
	if r.idle++; r.next != 0 && r.idle >= ringTicks {
		r.reset()
	}
}

func (r *ring) put(e recentEntry) {
	if r.next != e.pos.Seq {
		r.reset()
		r.low = e.pos.Seq
	}
	r.next, r.idle = e.pos.Seq+1, 0
	for r.next-r.low > ringSlots || r.bytes+len(e.raw) > ringBytes && r.low < e.pos.Seq {
		s := &r.slots[r.low%ringSlots]
		r.bytes -= len(s.raw)
		*s = recentEntry{}
		r.low++
	}
	r.slots[e.pos.Seq%ringSlots] = e
	r.bytes += len(e.raw)
}

func (r *ring) get(seq uint64) (*recentEntry, bool) {
	if seq < r.low || seq >= r.next {
		return nil, false
	}
	return &r.slots[seq%ringSlots], true
}
