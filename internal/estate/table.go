package estate

import (
	"iter"
	"sync/atomic"
)

// Table is records of a few words under a key that is not 0, in the memory of an
// Estate. It is not safe for concurrent use.
//
// Whoever is killed in the middle of a change leaves the record as it was before
// or as it is after, or, of a record that was being moved, two copies that are alike: the
// key is written last, and taken away first.
type Table struct {
	e     *Estate // nil: in memory that nobody else sees
	dir   int     // where the header says where the table is
	width int
	place uint64
	words []uint64 // nil: none yet
	n     int
}

// How the header says where a table is.
const (
	recordsAt = 8
	placeAt   = 40
)

// minRecords is the size of a table with the first record in it.
const minRecords = 16

func (t *Table) records() int { return len(t.words) / t.width }

// home is where a record would be if no other were in its way.
func home(key uint64, records int) int {
	key = (key ^ key>>32) * 0xd6e8feb86659fd93 // another one than what divides the inodes into shards
	return int((key ^ key>>32) & 0xffffffff * uint64(records) >> 32)
}

// behind is how far a place is behind another, going round.
func behind(at, from, records int) int {
	if at < from {
		at += records
	}
	return at - from
}

// find returns where a key is, or where it belongs.
func (t *Table) find(key uint64) (at int, found bool) {
	n := t.records()
	if n == 0 {
		return 0, false
	}
	for at = home(key, n); ; at = after(at, n) {
		switch t.words[at*t.width] {
		case key:
			return at, true
		case 0:
			return at, false
		}
	}
}

// Len is how many records there are.
func (t *Table) Len() int { return t.n }

// Has reports whether there is a record under a key.
func (t *Table) Has(key uint64) bool {
	_, found := t.find(key)
	return found
}

// Get returns the record under a key, without the key; nil if there is none. It is good until the
// next change of the table, and not to be changed.
func (t *Table) Get(key uint64) []uint64 {
	at, found := t.find(key)
	if !found {
		return nil
	}
	return t.words[at*t.width+1 : (at+1)*t.width : (at+1)*t.width]
}

// Put makes or replaces the record under a key.
func (t *Table) Put(key uint64, values ...uint64) {
	if key == 0 || len(values) != t.width-1 {
		panic("estate: a record that does not fit its table")
	}
	at, found := t.find(key)
	if !found {
		if 5*(t.n+1) > 4*t.records() {
			t.resize(max(minRecords, t.records()*3/2))
			at, _ = t.find(key)
		}
		t.n++
	}
	t.write(at, key, values)
}

func (t *Table) write(at int, key uint64, values []uint64) {
	w := t.words[at*t.width : (at+1)*t.width]
	for i, v := range values {
		atomic.StoreUint64(&w[i+1], v)
	}
	atomic.StoreUint64(&w[0], key)
}

// Delete removes the record under a key, if there is one.
func (t *Table) Delete(key uint64) {
	hole, found := t.find(key)
	if !found {
		return
	}
	t.n--
	n := t.records()
	atomic.StoreUint64(&t.words[hole*t.width], 0)
	// What was pushed behind the hole moves up, so that it is found.
	for at := after(hole, n); t.words[at*t.width] != 0; at = after(at, n) {
		w := t.words[at*t.width : (at+1)*t.width]
		if behind(at, home(w[0], n), n) < behind(at, hole, n) {
			continue
		}
		t.write(hole, w[0], w[1:])
		atomic.StoreUint64(&w[0], 0)
		hole = at
	}
	if n > 16*minRecords && 8*t.n < n {
		t.resize(n / 4)
	}
}

// Clear removes all records.
func (t *Table) Clear() {
	for i := 0; i < len(t.words); i += t.width {
		atomic.StoreUint64(&t.words[i], 0)
	}
	t.n = 0
}

// All are the records, in no order, without their keys. No record may be made or
// deleted meanwhile.
func (t *Table) All() iter.Seq2[uint64, []uint64] {
	return func(yield func(uint64, []uint64) bool) {
		for i := 0; i < len(t.words); i += t.width {
			if t.words[i] != 0 && !yield(t.words[i], t.words[i+1:i+t.width:i+t.width]) {
				return
			}
		}
	}
}

// resize moves the table to a place with room for that many records.
func (t *Table) resize(records int) {
	old, place := t.words, t.place
	if t.e == nil {
		t.words = make([]uint64, records*t.width)
	} else {
		t.words, t.place = t.e.allocate(records * t.width)
	}
	for i := 0; i < len(old); i += t.width {
		if old[i] != 0 {
			at, _ := t.find(old[i])
			t.write(at, old[i], old[i+1:i+t.width])
		}
	}
	if t.e == nil {
		return
	}
	t.e.store(t.dir, t.place<<placeAt|uint64(records)<<recordsAt|uint64(t.width))
	t.e.release(place, len(old))
}

// after is the place behind another, going round.
func after(at, records int) int {
	if at++; at < records {
		return at
	}
	return 0
}
