package cli

import (
	"testing"
	"time"
)

func TestIdle(t *testing.T) {
	const look = 200 * time.Millisecond
	for _, c := range []struct {
		name   string
		cpu    time.Duration
		blocks int64
		want   bool
	}{
		{"asleep", 0, 0, true},
		{"ticking", 2 * time.Millisecond, 0, true},
		{"working", 10 * time.Millisecond, 0, false},
		{"waiting for a disk", time.Millisecond, 8, false},
	} {
		before := usage{time.Hour, 1000}
		if got := idle(before, usage{before.cpu + c.cpu, before.blocks + c.blocks}, look); got != c.want {
			t.Errorf("%s: idle is %v", c.name, got)
		}
	}
}
