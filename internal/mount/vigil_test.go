package mount

import "testing"

// Who is asked in bursts looks for the next request; who is not soon sleeps at once, nearly always.
func TestVigil(t *testing.T) {
	var v vigil
	kept := func(n int, came bool) (kept int) {
		for range n {
			if v.begins() {
				kept++
				v.ended(came)
			}
		}
		return kept
	}
	if n := kept(1000, true); n != 1000 {
		t.Errorf("%d vigils of 1000 while requests come", n)
	}
	if n := kept(6400, false); n > 110 {
		t.Errorf("%d vigils of 6400 while none comes, want one in %d and a few", n, maxUnkept+1)
	}
	first := 0
	for !v.begins() {
		first++
	}
	v.ended(true)
	if n := kept(1000, true); first > maxUnkept || n != 1000 {
		t.Errorf("%d waits until the first vigil after requests come again, and then %d vigils of 1000", first, n)
	}
}
