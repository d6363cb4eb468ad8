package replica

import (
	"testing"

	"mortar/internal/cluster"
)

// The last entries are there for who is to be sent them, and not for ever; what comes after is there again.
func TestRing(t *testing.T) {
	r := new(ring)
	put := func(seq uint64, size int) {
		r.put(recentEntry{pos: cluster.Pos{Epoch: 1, Seq: seq}, raw: make([]byte, size)})
	}
	has := func(seq uint64) bool {
		e, ok := r.get(seq)
		return ok && e.pos.Seq == seq
	}
	tick := func(n int) {
		for range n {
			r.tick()
		}
	}
	tick(2 * ringTicks) // empty
	for seq := uint64(7); seq < 10; seq++ {
		put(seq, 100)
		tick(ringTicks - 1)
	}
	if !has(7) || !has(9) || has(6) || has(10) || r.bytes != 300 {
		t.Errorf("7 to 9 are not what is there: %d to %d, %d bytes", r.low, r.next, r.bytes)
	}
	tick(1)
	if has(7) || has(9) || has(0) || r.bytes != 0 || r.slots[9].raw != nil {
		t.Errorf("nothing came for a while, and %d bytes are there", r.bytes)
	}
	put(10, ringBytes)
	put(11, 100)
	if has(10) || !has(11) || r.bytes != 100 {
		t.Errorf("%d to %d, %d bytes", r.low, r.next, r.bytes)
	}
	for seq := uint64(12); seq < 12+ringSlots; seq++ {
		put(seq, 1)
	}
	if has(11) || !has(12) || r.bytes != ringSlots {
		t.Errorf("%d to %d, %d bytes", r.low, r.next, r.bytes)
	}
}
