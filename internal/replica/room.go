package replica

import (
	"errors"
	"math"
	"slices"
	"sort"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica/core"
)

// room knows, as primary, how many bytes each backup can still take: what it
// said last, less what was ordered since the position at which it said so. A
// change is refused with ENOSPC before it has a position, or not at all.
type room struct {
	of      map[cluster.BrickID]report
	charged uint64   // bytes ordered since this brick began to lead
	marks   []charge // of the past, oldest first

	waiting []*request   // for room, in the order in which they came
	vain    core.Instant // when a request last waited in vain, 0 if nothing is known
	use     uint64       // charged, when waiting was last of use
	used    core.Instant // when that was, 0 if nothing is known
}

// report is what a backup said.
type report struct {
	free uint64
	at   uint64 // charged, when the backup's last applied entry was ordered
}

// charge says what charged was when an entry had been ordered.
type charge struct{ seq, charged uint64 }

// chargeStep is how exactly the past is remembered, in bytes.
const chargeStep = 256 << 10

func (r *room) reset() {
	clear(r.of)
	r.charged, r.marks, r.vain, r.used = 0, nil, 0, 0
}

// ordered counts an entry that every in-sync brick will take.
func (r *room) ordered(seq uint64, op fsop.Op) {
	n, frees := fsop.Space(op)
	if frees {
		if op.Kind() == fsop.KindReap {
			r.vain, r.used = 0, 0
		}
		return
	}
	r.charged += n
	if k := len(r.marks); k == 0 || r.charged-r.marks[k-1].charged >= chargeStep {
		r.marks = append(r.marks, charge{seq, r.charged})
	}
}

// report takes a backup's word that with everything up to applied it has free
// bytes left.
func (r *room) report(b cluster.BrickID, applied, free uint64) {
	i := sort.Search(len(r.marks), func(i int) bool { return r.marks[i].seq > applied })
	at := uint64(0)
	if i > 0 {
		at = r.marks[i-1].charged
	}
	r.of[b] = report{free: free, at: at}
	oldest := r.charged
	for _, o := range r.of {
		oldest = min(oldest, o.at)
	}
	drop := 0
	for drop+1 < len(r.marks) && r.marks[drop+1].charged <= oldest {
		drop++
	}
	r.marks = r.marks[drop:]
}

// fits reports whether a backup that has said what it can take can take n bytes more.
func (r *room) fits(b cluster.BrickID, n uint64) bool {
	o, known := r.of[b]
	return !known || r.charged-o.at+n <= o.free
}

// least is what all of the bricks that have said what they can take can take.
func (r *room) least(bricks []cluster.BrickID) uint64 {
	least := uint64(math.MaxUint64)
	for _, b := range bricks {
		if o, known := r.of[b]; known {
			least = min(least, o.free-min(o.free, r.charged-o.at))
		}
	}
	return least
}

// admit refuses what some in-sync brick has no room for, before it has a position.
func (l *loop) admit(op fsop.Op) error {
	if err := l.store.Admit(op); err != nil {
		return err
	}
	need, frees := fsop.Space(op)
	if frees {
		return nil
	}
	cfg := l.m.Config()
	for _, b := range cfg.InSync {
		if !l.room.fits(b, need) {
			return fsop.ENOSPC
		}
	}
	return nil
}

// A brick that is nearly full finds room by settling: what was written is then
// no longer in the log as well. So changes that find none wait for it, unless
// that was in vain a moment ago or gave very little.
const (
	roomWait  = core.Instant(2 * time.Second)
	roomAgain = core.Instant(10 * time.Second)
	roomStep  = 4 << 20
)

// parkRoom keeps a request that was refused with err, if it may wait for room.
func (l *loop) parkRoom(q *request, err error) bool {
	r := &l.room
	switch {
	case !errors.Is(err, fsop.ENOSPC):
		return false
	case slices.ContainsFunc(l.touches(q.do.Op), func(i fsop.Ino) bool { return l.recalls[i] != nil }):
		return false // somebody waits for the window, which is lost if this takes long
	case q.roomEnd == 0:
		little := r.used != 0 && l.now < r.used+roomAgain && r.charged < r.use+roomStep
		if little || r.vain != 0 && l.now < r.vain+roomAgain {
			return false
		}
		q.roomEnd = l.now + roomWait
	case l.now >= q.roomEnd:
		r.vain = l.now
		return false
	}
	r.waiting = append(r.waiting, q)
	return true
}

// behindRoom keeps a request behind those of its session that wait for room.
func (l *loop) behindRoom(q *request) bool {
	r := &l.room
	if len(r.waiting) == 0 || q.session == 0 ||
		!slices.ContainsFunc(r.waiting, func(o *request) bool { return o.session == q.session }) {
		return false
	}
	r.waiting = append(r.waiting, q)
	return true
}

// tickRoom tries again what waits for room.
func (l *loop) tickRoom() {
	r := &l.room
	if len(r.waiting) == 0 {
		return
	}
	waiting, before := r.waiting, r.charged
	r.waiting = nil
	for _, q := range waiting {
		l.order(q)
	}
	if r.charged > before {
		r.use, r.used = r.charged, l.now
	}
}

// refuse sends those who wait for room elsewhere, and returns how many they are.
func (r *room) refuse() int {
	n := len(r.waiting)
	for _, q := range r.waiting {
		q.finish(proto.DoReply{Status: proto.NotServing})
	}
	r.waiting = nil
	return n
}
