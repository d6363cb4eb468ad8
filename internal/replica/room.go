package replica

import (
	"sort"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
)

// room knows, as primary, how many bytes each backup can still take: what it
// said last, less what was ordered since the position at which it said so. A
// change is refused with ENOSPC before it has a position, or not at all.
type room struct {
	of      map[cluster.BrickID]report
	charged uint64   // bytes ordered since this brick began to lead
	marks   []charge // of the past, oldest first
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
	r.charged, r.marks = 0, nil
}

// ordered counts an entry that every in-sync brick will take.
func (r *room) ordered(seq uint64, op fsop.Op) {
	n, frees := fsop.Space(op)
	if frees {
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
