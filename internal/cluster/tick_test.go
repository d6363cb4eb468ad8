package cluster

import (
	"testing"
	"time"
)

// Everything ticks at the same moments, whenever it asks, and never twice at one.
func TestUntilTick(t *testing.T) {
	base := time.Unix(1e9, 0)
	for off := time.Duration(0); off < 3*Tick; off += 7 * time.Millisecond / 3 {
		now := base.Add(off)
		d := UntilTick(now)
		if at := now.Add(d).Sub(base); at%Tick != 0 {
			t.Errorf("%v after a tick the next one is in %v, which is none", off, d)
		}
		if d < Tick/4 || d >= Tick+Tick/4 {
			t.Errorf("%v after a tick the next one is in %v", off, d)
		}
	}
}
