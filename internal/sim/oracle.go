package sim

import (
	"fmt"
	"slices"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/replica/core"
)

// oracle sees everything and checks after every step what must always be true.
type oracle struct {
	w       *world
	entries []entry
	byPos   map[cluster.Pos]int32
	byVal   map[uint64]int32
	log     []int32 // committed, from sequence 1
	leaders map[cluster.Epoch]leadership
	led     cluster.Epoch // the newest that had a primary
	numbers map[numberKey]uint64
	no      map[numberKey]bool // changes that were refused

	// newest is the last change of each register that anybody was told of, or
	// has read: nobody may read an older one.
	newest  [maxRegs]uint64
	durable uint64 // all up to here was fsynced
	lastAck uint64

	// A loss of power that takes acknowledged changes with it begins a new era.
	era      int
	eraEpoch cluster.Epoch
	history  [maxRegs]history

	acks, reads, lost int
}

type leadership struct {
	b    *brick
	life int
}

type numberKey struct {
	session int
	number  uint64
}

func newOracle(w *world) *oracle {
	return &oracle{w: w, byPos: map[cluster.Pos]int32{}, byVal: map[uint64]int32{}, leaders: map[cluster.Epoch]leadership{}, numbers: map[numberKey]uint64{}, no: map[numberKey]bool{}}
}

func (o *oracle) committed() uint64 { return uint64(len(o.log)) }

// posAt is the position of a committed sequence.
func (o *oracle) posAt(seq uint64) cluster.Pos {
	if seq == 0 || seq > o.committed() {
		return cluster.Pos{}
	}
	return o.entries[o.log[seq-1]].pos
}

// make registers an entry that a primary has made. A position has one entry, for ever.
func (o *oracle) make(e entry) int32 {
	if _, twice := o.byPos[e.pos]; twice {
		o.w.fail("two different entries at %v (invariant 1)", e.pos)
	}
	n := int32(len(o.entries))
	o.entries = append(o.entries, e)
	o.byPos[e.pos] = n
	return n
}

// leads is called when a brick has replayed its log to begin an epoch.
func (o *oracle) leads(b *brick) {
	cfg := b.m.Config()
	if was, led := o.leaders[cfg.Epoch]; led {
		o.w.fail("epoch %d has a second primary: %v, process %d, after %v, process %d (invariant 1)", cfg.Epoch, b, b.life, was.b, was.life)
	}
	o.leaders[cfg.Epoch] = leadership{b, b.life}
	newer := cfg.Epoch > o.led
	o.led = max(o.led, cfg.Epoch)
	d := &b.disk
	kept := o.committed()
	for kept > 0 && (kept > d.tail().Seq || d.find(kept) != o.log[kept-1]) {
		kept--
	}
	if kept == o.committed() || !newer {
		return // who is outdated already commits nothing
	}
	blind := false
	for _, c := range o.w.plane.decided {
		if o.w.plane.blind[c.Epoch] && c.Epoch > o.eraEpoch && c.Epoch <= cfg.Epoch {
			blind = true
		}
	}
	if !blind {
		o.w.fail("%v leads epoch %d from %v and lacks what was committed after %d, up to %d (invariants 2 and 3)", b, cfg.Epoch, d.tail(), kept, o.committed())
	}
	if o.durable > kept {
		o.w.fail("%v leads epoch %d from %v and lacks what was fsynced up to %d (I2, I6)", b, cfg.Epoch, d.tail(), o.durable)
	}
	o.newEra(kept, cfg.Epoch)
}

// newEra forgets what was lost with the power of everybody who had it.
func (o *oracle) newEra(kept uint64, epoch cluster.Epoch) {
	o.w.say("what was acknowledged and not synced is lost after %d, up to %d", kept, o.committed())
	o.era++
	o.eraEpoch = epoch
	for _, n := range o.log[kept:] {
		e := &o.entries[n]
		delete(o.numbers, numberKey{e.session, e.number})
		if e.pos.Seq <= o.lastAck {
			o.lost++
		}
	}
	o.log = o.log[:kept]
	o.lastAck = min(o.lastAck, kept)
	o.newest = [maxRegs]uint64{}
	inLog := map[uint64]bool{}
	for _, n := range o.log {
		if e := &o.entries[n]; e.reg >= 0 {
			o.newest[e.reg] = e.pos.Seq
			inLog[e.val] = true
		}
	}
	for i := range o.history {
		o.history[i].cut(inLog)
	}
	for _, b := range o.w.bricks {
		b.commit = min(b.commit, kept)
	}
}

// look checks what a brick claims after a step.
func (o *oracle) look(b *brick) {
	d := &b.disk
	if b.ahead {
		return
	}
	if b.m.Tail() != d.tail() {
		o.w.fail("%v's machine is at %v and its log at %v", b, b.m.Tail(), d.tail())
	}
	was := b.acked
	b.acked = b.m.Acked()
	if cfg := b.m.Config(); b.acked > was && b.m.Role() == core.Primary && !cfg.Writable() {
		o.w.fail("%v acknowledges %d, after %d, with %d bricks in sync of at least %d (invariant 7)", b, b.acked, was, len(cfg.InSync), cfg.MinInSync)
	}
	tail := d.tail().Seq
	b.commit = min(b.commit, tail)
	claim := min(b.m.Commit(), tail)
	if claim <= b.commit {
		return
	}
	cfg := b.m.Config()
	if o.era > 0 && (cfg.Epoch < o.eraEpoch || !cfg.IsInSync(b.id)) {
		return // it knows what was lost
	}
	primary := b.m.Role() == core.Primary
	for seq := b.commit + 1; seq <= claim; seq++ {
		n := d.find(seq)
		if seq <= o.committed() {
			if o.log[seq-1] != n {
				o.w.fail("%v takes %v for committed, and %v was", b, o.entries[n].pos, o.posAt(seq))
			}
			continue
		}
		if !primary {
			o.w.fail("%v takes %v for committed, which nobody has committed", b, o.entries[n].pos)
		}
		o.commit(b, &cfg, n)
	}
	b.commit = claim
}

// commit is called when a primary commits an entry.
func (o *oracle) commit(b *brick, cfg *cluster.SetConfig, n int32) {
	e := &o.entries[n]
	for _, id := range cfg.InSync {
		other := o.w.brick(id)
		if other.powerless >= cfg.Epoch {
			continue // it may have had it
		}
		if other.disk.find(e.pos.Seq) != n {
			o.w.fail("%v commits %v in epoch %d and %v, in sync, does not have it (invariant 2)", b, e.pos, cfg.Epoch, other)
		}
	}
	o.log = append(o.log, n)
	if e.session >= 0 {
		key := numberKey{e.session, e.number}
		if was := o.numbers[key]; was != 0 {
			o.w.fail("change %d of c%d is carried out at %v, and was at %d (invariant 8)", e.number, e.session, e.pos, was)
		}
		if o.no[key] {
			o.w.fail("change %d of c%d is carried out at %v, and was refused", e.number, e.session, e.pos)
		}
		o.numbers[key] = e.pos.Seq
		o.byVal[e.val] = n
	}
	for _, other := range o.w.bricks {
		if !other.up {
			continue
		}
		if _, serving := other.m.Serving(other.now()); serving && other.m.Config().Epoch >= o.eraEpoch &&
			(other.disk.st.pos.Seq < e.pos.Seq || other.disk.find(e.pos.Seq) != n) {
			o.w.fail("%v commits %v while %v serves reads as of %v in epoch %d (invariants 4 and 5)", b, e.pos, other, other.disk.st.pos, other.m.Config().Epoch)
		}
	}
	if e.reg < 0 {
		return
	}
	for _, c := range o.w.clients {
		if have := &c.cache[e.reg]; c.i != e.session && c.leased && c.now() < c.until && have.ok && have.seq < e.pos.Seq && have.epoch >= o.eraEpoch {
			o.w.fail("%v commits %v while %v has what it changes cached as of %d", b, e.pos, c, have.seq)
		}
	}
}

// --- what clients do ---

func (o *oracle) wrote(c *client, p *op) { o.history[p.reg].write(p.val, p.began) }

// acked is called when a change is acknowledged to its client.
func (o *oracle) acked(c *client, p *op) {
	o.acks++
	if p.era != o.era {
		return
	}
	n, known := o.byVal[p.val]
	if !known {
		o.w.fail("change %d of %v is acknowledged and not committed (invariant 2)", p.number, c)
	}
	seq := o.entries[n].pos.Seq
	if seq > o.committed() || o.log[seq-1] != n {
		o.w.fail("change %d of %v is acknowledged at %d, where something else was committed", p.number, c, seq)
	}
	o.newest[p.reg] = max(o.newest[p.reg], seq)
	o.lastAck = max(o.lastAck, seq)
	o.history[p.reg].wrote(p.val, o.w.now)
}

// refused is called when a client hears that a change was not carried out. It never is.
func (o *oracle) refused(c *client, p *op) {
	if was := o.numbers[numberKey{c.i, p.number}]; was != 0 {
		o.w.fail("change %d of %v is refused, and was carried out at %d", p.number, c, was)
	}
	o.no[numberKey{c.i, p.number}] = true
}

// synced is called when an fsync is answered: what anybody knew of the register
// when it was asked for survives whatever comes.
func (o *oracle) synced(c *client, p *op) {
	if p.era == o.era {
		o.durable = max(o.durable, p.floor)
	}
}

// read is called when a client has the answer to a read.
func (o *oracle) read(c *client, p *op, val uint64, epoch cluster.Epoch, cached bool) {
	o.reads++
	if p.era != o.era || epoch < o.eraEpoch {
		return // it may be what was lost
	}
	var seq uint64
	if val != 0 {
		n, known := o.byVal[val]
		if known {
			seq = o.entries[n].pos.Seq
		}
		if !known || seq > o.committed() || o.log[seq-1] != n {
			o.w.fail("%v reads %x of r%d, which is not committed (cached %v)", c, val, p.reg, cached)
		}
	}
	if seq < p.floor {
		o.w.fail("%v reads r%d as of %d, and its change at %d was known when it asked (cached %v; invariant 5)", c, p.reg, seq, p.floor, cached)
	}
	o.newest[p.reg] = max(o.newest[p.reg], seq)
	o.history[p.reg].read(val, p.began, o.w.now)
}

// end checks what must be true when everything has come to rest.
func (o *oracle) end() {
	var st contents
	for _, n := range o.log {
		st.apply(&o.entries[n])
	}
	for _, b := range o.w.bricks {
		if b.disk.st.sum != st.sum || b.disk.st.pos != st.pos || b.disk.st.regs != st.regs {
			o.w.fail("%v is at %v with digest %x; what was committed is %v, %x", b, b.disk.st.pos, b.disk.st.sum, st.pos, st.sum)
		}
	}
	for i := range o.history {
		if err := o.history[i].check(); err != nil {
			o.w.fail("register %d is not linearizable: %v", i, err)
		}
	}
}

// --- linearizability ---

// history is what clients saw of one register. Every value is written once, so
// whether there is an order in which all of it makes sense can be decided from
// the zones of the values (Gibbons and Korach, "Testing Shared Memories", 1997):
// a zone spans from the first end to the last beginning of the operations on a
// value. If it runs forwards, the value was there throughout; two such zones do
// not overlap, and one that runs backwards does not lie within one that runs
// forwards.
type history struct {
	zones map[uint64]*zone
}

type zone struct {
	val      uint64
	wrote    time.Duration // when the write began
	firstEnd time.Duration
	lastBeg  time.Duration
	seen     bool // acknowledged, or read
}

const never = time.Duration(1<<63 - 1)

func (h *history) zone(val uint64) *zone {
	if h.zones == nil {
		h.zones = map[uint64]*zone{0: {seen: true}}
	}
	z := h.zones[val]
	if z == nil {
		z = &zone{val: val, wrote: never, firstEnd: never}
		h.zones[val] = z
	}
	return z
}

func (h *history) write(val uint64, began time.Duration) {
	z := h.zone(val)
	z.wrote, z.lastBeg = began, max(z.lastBeg, began)
}

func (h *history) wrote(val uint64, ended time.Duration) {
	z := h.zone(val)
	z.firstEnd, z.seen = min(z.firstEnd, ended), true
}

func (h *history) read(val uint64, began, ended time.Duration) {
	z := h.zone(val)
	z.firstEnd, z.lastBeg, z.seen = min(z.firstEnd, ended), max(z.lastBeg, began), true
	if z.wrote > ended {
		z.wrote = never
	}
}

// cut forgets what was read before, and what was written and is not in the log.
func (h *history) cut(inLog map[uint64]bool) {
	h.zone(0)
	for val, z := range h.zones {
		switch {
		case val == 0:
			*z = zone{seen: true}
		case inLog[val]:
			// It is in the past, or its answer is still to come.
			z.lastBeg = z.wrote
			z.seen = false
			z.firstEnd = never
		default:
			z.lastBeg, z.seen, z.firstEnd = z.wrote, false, never
		}
	}
	// The state that remains is where everybody begins: old values may still be
	// read if nothing newer was acknowledged, which newest checks.
	h.zones[0].firstEnd = 0
}

func (h *history) check() error {
	var forward, backward []*zone
	for _, z := range h.zones {
		if !z.seen {
			continue // not known to have happened
		}
		if z.wrote == never {
			return fmt.Errorf("%x was read and never written", z.val)
		}
		if z.firstEnd < z.wrote {
			return fmt.Errorf("%x was read before it was written", z.val)
		}
		if z.firstEnd < z.lastBeg {
			forward = append(forward, z)
		} else {
			backward = append(backward, z)
		}
	}
	slices.SortFunc(forward, func(a, b *zone) int { return int(min(1, max(-1, a.firstEnd-b.firstEnd))) })
	for i := 1; i < len(forward); i++ {
		if a, b := forward[i-1], forward[i]; b.firstEnd < a.lastBeg {
			return fmt.Errorf("%x was there from %v to %v and %x from %v to %v", a.val, a.firstEnd, a.lastBeg, b.val, b.firstEnd, b.lastBeg)
		}
	}
	for _, z := range backward {
		i, _ := slices.BinarySearchFunc(forward, z, func(f, z *zone) int { return int(min(1, max(-1, f.firstEnd-z.lastBeg))) })
		if i > 0 && z.firstEnd < forward[i-1].lastBeg && z.lastBeg > forward[i-1].firstEnd {
			return fmt.Errorf("%x was written between %v and %v, when %x was there", z.val, z.lastBeg, z.firstEnd, forward[i-1].val)
		}
	}
	return nil
}
