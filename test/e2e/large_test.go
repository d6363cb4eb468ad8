package e2e

import (
	"fmt"
	"testing"
	"time"
)

// A directory with very many entries takes as long for each of the last as for each of
// the first: to make, to list where they were made and on another machine, to remove. In
// short only that they are all there, once, and then gone: of so few the times say nothing
// (internal/brick has a test of what they cost, by processor time).
func TestLargeDirectory(t *testing.T) {
	p := start(t, setup{})
	n := pick(1000, 1_000_000)
	for _, c := range []struct {
		on int
		do string
	}{{1, "make"}, {1, "list"}, {2, "list"}, {2, "list"}, {3, "remove"}} {
		var r struct {
			Seconds float64
			Tenths  []float64
		}
		p.workload(c.on, pick(time.Minute, time.Hour), &r, "large", "-dir", "/mnt/wp/large", "-do", c.do, "-n", fmt.Sprint(n))
		t.Logf("%s on n%d: %.1f s, %.0f µs each; tenths %.1f", c.do, c.on, r.Seconds, r.Seconds*1e6/float64(n), r.Tenths)
		if first, last := r.Tenths[0], r.Tenths[len(r.Tenths)-1]; long && last > 4*first {
			t.Errorf("%s: the first tenth took %.1f s, the last %.1f s", c.do, first, last)
		}
	}
	p.identical(1)
}
