package main

import (
	"testing"
	"time"
)

// What the machine itself was stalled for is taken off the operations that were
// under way, and off no others.
func TestStallsAreTakenOff(t *testing.T) {
	start := time.Now()
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	var s stalls
	s.woke(at(0), at(20))      // no stall yet
	s.woke(at(1000), at(3000)) // two seconds
	s.woke(at(5000), at(5100))
	for _, c := range []struct{ from, to, want int }{
		{0, 900, 0}, {0, 1500, 500}, {1200, 1300, 100}, {2900, 3500, 100}, {0, 6000, 2100}, {3000, 5000, 0},
	} {
		if got := s.during(at(c.from), at(c.to)); got != time.Duration(c.want)*time.Millisecond {
			t.Errorf("between %d and %d ms: %v, want %d ms", c.from, c.to, got, c.want)
		}
	}
	h := &histogram{}
	h.add(at(900), 2200*time.Millisecond)
	h.add(at(3200), 700*time.Millisecond)
	h.add(at(4000), 10*time.Millisecond)
	h.finish(&s)
	if h.Max != 700 || h.MaxFrom != at(3200).Format("15:04:05.000") || h.Count != 3 {
		t.Errorf("%+v; want the longest to be 700 ms", h)
	}
}
