package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"mortar/internal/cluster"
)

const (
	maxRegs     = 4
	maxSessions = 8
	maxWindow   = 4 // what one client waits for at once
	maxAhead    = 8 // proto.MaxAhead, here
)

// entry is a change, or the noop with which an epoch begins. Every entry that
// was ever made is kept once (oracle.entries); logs hold its number there.
type entry struct {
	pos     cluster.Pos
	prev    int32 // the entry before it, -1 for none
	session int   // -1: the system's own
	number  uint64
	acked   uint64
	reg     int    // -1: none
	val     uint64 // unique
}

// contents is what a brick has applied.
type contents struct {
	pos  cluster.Pos
	sum  uint64 // of all that was applied, in order
	regs [maxRegs]register
	sess [maxSessions]memory
}

type register struct {
	val uint64
	seq uint64 // of its last change
}

// memory is what is remembered of a session's changes.
type memory struct {
	acked uint64 // those below have been answered
	n     int
	done  [maxAhead]done
}

type done struct{ number, seq uint64 }

// executed reports whether a change was carried out before.
func (s *contents) executed(e *entry) bool {
	return e.session >= 0 && (s.answered(e.session, e.number) != 0 || e.number < s.sess[e.session].acked)
}

// answered returns where a session's change was carried out, if that is remembered; 0 if not.
func (s *contents) answered(session int, number uint64) uint64 {
	m := &s.sess[session]
	for _, d := range m.done[:m.n] {
		if d.number == number {
			return d.seq
		}
	}
	return 0
}

// apply carries out an entry. It must be the next.
func (s *contents) apply(e *entry) {
	if e.pos.Seq != s.pos.Seq+1 || e.pos.Epoch < s.pos.Epoch {
		panic(fmt.Sprintf("entry %v applied after %v", e.pos, s.pos))
	}
	s.pos = e.pos
	s.sum = (s.sum ^ e.val ^ uint64(e.pos.Epoch)<<32 ^ e.pos.Seq) * 0x9e3779b97f4a7c15
	if e.reg >= 0 {
		s.regs[e.reg] = register{e.val, e.pos.Seq}
	}
	if e.session < 0 {
		return
	}
	m := &s.sess[e.session]
	m.acked = max(m.acked, min(e.acked, e.number))
	keep := 0
	for _, d := range m.done[:m.n] {
		if d.number >= m.acked {
			m.done[keep] = d
			keep++
		}
	}
	if keep == len(m.done) {
		panic("a session has too many changes under way")
	}
	m.done[keep] = done{e.number, e.pos.Seq}
	m.n = keep + 1
}

// disk is what a brick keeps: a log, and a key-value store without a log of its
// own, whose flushes are rare. What is not synced is lost with the power, from
// the log's end; what was written to it in part is no entry.
type disk struct {
	entries *[]entry      // all that there are
	slow    time.Duration // what a flush takes
	hung    time.Duration // no flush ends before this, by the true clock

	base    cluster.Pos   // the log begins after it
	baseN   int32         // the entry there, -1 for none
	log     []int32       // numbers of entries
	history []cluster.Pos // first position of every epoch
	synced  uint64        // of the log
	cuts    int           // counts truncations and resets

	st contents // in memory; as of kv after a start, until the log is replayed
	kv contents // flushed

	whole  bool
	marked bool // the mark of a clean stop
	mark   cluster.Pos
	epoch  cluster.Epoch // promised, see core.Brick
}

func (d *disk) wipe() {
	*d = disk{entries: d.entries, baseN: -1, cuts: d.cuts + 1}
}

func (d *disk) tail() cluster.Pos {
	if n := len(d.log); n > 0 {
		return (*d.entries)[d.log[n-1]].pos
	}
	return d.base
}

// last returns the number of the last entry, -1 if there is none.
func (d *disk) last() int32 {
	if n := len(d.log); n > 0 {
		return d.log[n-1]
	}
	return d.baseN
}

// find returns the number of the entry at seq, in the log or before it.
func (d *disk) find(seq uint64) int32 {
	if seq > d.base.Seq {
		return d.at(seq)
	}
	n := d.baseN
	for n >= 0 && (*d.entries)[n].pos.Seq > seq {
		n = (*d.entries)[n].prev
	}
	return n
}

// at returns the number of the entry at seq, -1 if the log does not have it.
func (d *disk) at(seq uint64) int32 {
	if seq <= d.base.Seq || seq > d.base.Seq+uint64(len(d.log)) {
		return -1
	}
	return d.log[seq-d.base.Seq-1]
}

// posAt returns the position of seq, between base and tail.
func (d *disk) posAt(seq uint64) cluster.Pos {
	if i := d.at(seq); i >= 0 {
		return (*d.entries)[i].pos
	}
	return d.base
}

// append logs and applies an entry.
func (d *disk) append(n int32) {
	e := &(*d.entries)[n]
	d.st.apply(e)
	d.log = append(d.log, n)
	if h := len(d.history); h == 0 || d.history[h-1].Epoch != e.pos.Epoch {
		d.history = append(d.history, e.pos)
	}
	d.marked = false
}

func (d *disk) cutAfter(pos cluster.Pos) {
	d.log = d.log[:pos.Seq-d.base.Seq]
	d.history = slices.DeleteFunc(d.history, func(h cluster.Pos) bool { return h.Seq > pos.Seq })
	d.synced = min(d.synced, pos.Seq)
	d.cuts++
}

type rewound uint8

const (
	rewindDone rewound = iota
	rewindTooFar
	rewindNonsense // the log has no such position: a bug of whoever asks
)

// rewind makes the log end at pos and the state agree with it.
func (d *disk) rewind(to cluster.Pos) rewound {
	if d.whole && to == d.st.pos && to == d.tail() {
		return rewindDone
	}
	switch {
	case !d.whole || to.Seq < d.base.Seq:
		return rewindTooFar
	case to.Seq > d.tail().Seq || d.posAt(to.Seq) != to:
		return rewindNonsense
	}
	if to.Seq < d.st.pos.Seq {
		if d.kv.pos.Seq > to.Seq {
			return rewindTooFar
		}
		d.st = d.kv
	}
	if to != d.tail() {
		d.marked = false
		d.cutAfter(to)
	}
	for d.st.pos.Seq < to.Seq {
		d.st.apply(&(*d.entries)[d.at(d.st.pos.Seq+1)])
	}
	return rewindDone
}

// reset makes the disk that of another brick at one position.
func (d *disk) reset(st *contents, last int32, history []cluster.Pos) {
	d.st, d.kv = *st, *st
	d.baseN = last
	d.base, d.log, d.history = st.pos, d.log[:0], slices.Clone(history)
	d.synced, d.whole = st.pos.Seq, true
	d.cuts++
}

// crash takes what the machine, or only the process, loses. It reports whether
// that is anything.
func (d *disk) crash(power bool, r *rand.Rand) bool {
	tail := d.tail().Seq
	if power && d.synced < tail {
		keep := d.synced
		switch r.IntN(3) {
		case 0: // whatever reached the disk
			keep += r.Uint64N(tail - d.synced + 1)
		case 1:
			keep = tail
		}
		d.cutAfter(d.posAt(max(keep, d.base.Seq)))
	}
	d.st = d.kv
	return d.tail().Seq < tail
}

// flushKV makes the state durable, after the log.
func (d *disk) flushKV() {
	if d.whole {
		d.synced = d.tail().Seq
		d.kv = d.st
	}
}

// trim lets go of the log up to what the key-value store has.
func (d *disk) trim(upto uint64) {
	if upto = min(upto, d.kv.pos.Seq, d.synced); upto > d.base.Seq && d.whole {
		base := d.posAt(upto)
		d.baseN = d.at(upto)
		d.log = slices.Delete(d.log, 0, int(upto-d.base.Seq))
		d.base = base
	}
}
