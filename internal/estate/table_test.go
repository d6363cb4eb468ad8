package estate

import (
	"maps"
	"testing"

	"pgregory.net/rapid"
)

// A table is a map, whatever is done to it and in whatever memory it is; and a copy of its
// memory that is taken at any moment reads as the same.
func TestTable(t *testing.T) {
	e := newEstate(t)
	rapid.Check(t, func(t *rapid.T) {
		shared := e.Nodes[3]
		for key := range maps.Collect(shared.All()) {
			shared.Delete(key)
		}
		own := &Table{width: 3}
		want := map[uint64][2]uint64{}
		keys := rapid.SampledFrom([]uint64{1, 2, 3, 1 << 63, 17, 18, 19, 1 << 40, 64, 128, 1 << 20, 5 << 58})
		if rapid.Bool().Draw(t, "many") {
			keys = rapid.Uint64Range(1, 3000)
		}
		for range rapid.IntRange(1, 400).Draw(t, "steps") {
			key, v := keys.Draw(t, "key"), rapid.Uint64().Draw(t, "value")
			for _, tab := range []*Table{shared, own} {
				if v%3 == 0 {
					tab.Delete(key)
				} else {
					tab.Put(key, v, v+1)
				}
			}
			if v%3 == 0 {
				delete(want, key)
			} else {
				want[key] = [2]uint64{v, v + 1}
			}
		}
		for name, tab := range map[string]*Table{"shared": shared, "own": own} {
			if tab.Len() != len(want) {
				t.Fatalf("%s: %d records, want %d", name, tab.Len(), len(want))
			}
			n := 0
			for key, v := range tab.All() {
				if want[key] != [2]uint64(v) {
					t.Fatalf("%s: %d is %v, want %v", name, key, v, want[key])
				}
				n++
			}
			if n != len(want) {
				t.Fatalf("%s: lists %d of %d", name, n, len(want))
			}
			for key, v := range want {
				if got := tab.Get(key); got == nil || [2]uint64(got) != v {
					t.Fatalf("%s: %d is %v, want %v", name, key, got, v)
				}
			}
		}
		if err := e.SetInit([]byte("a"), []byte("b")); err != nil {
			t.Fatal(err)
		}
		left, err := Read(e.Fd())
		if err != nil {
			t.Fatal(err)
		}
		got := map[uint64][2]uint64{}
		for _, r := range left.Nodes[3] {
			got[r.Key] = [2]uint64(r.Values)
		}
		if !maps.Equal(got, want) {
			t.Fatalf("read back %v, want %v", got, want)
		}
	})
}

// While a record is deleted others move. Whoever is killed meanwhile leaves each of them at its old place, or at its
// new one, or at both.
func TestTornTable(t *testing.T) {
	const width = 3
	for _, n := range []int{1, 5, 11, 12, 13, 40} {
		for victim := range uint64(n) {
			tab := &Table{width: width}
			for key := range uint64(n) {
				tab.Put(key+1, key, ^key)
			}
			before := append([]uint64(nil), tab.words...)
			tab.Delete(victim + 1)
			after := tab.words
			// Deleting takes the key first, then moves records, each key last: the states
			// in between are a copy of a moved record at two places, and the victim gone.
			seen := map[uint64]bool{}
			for i := 0; i < len(before); i += width {
				for _, w := range [][]uint64{before[i : i+width], after[i : i+width]} {
					if w[0] != 0 && w[0] != victim+1 {
						if w[1] != w[0]-1 || w[2] != ^w[1] {
							t.Fatalf("%d of %d: record %v", victim, n, w)
						}
						seen[w[0]] = true
					}
				}
			}
			if len(seen) != n-1 {
				t.Fatalf("%d of %d: %d records", victim, n, len(seen))
			}
		}
	}
}

func newEstate(t testing.TB) *Estate {
	t.Helper()
	e, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}
