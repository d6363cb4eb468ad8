package cli

import (
	"runtime"
	"runtime/debug"
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

func TestSpare(t *testing.T) {
	const size = 32 << 20
	debug.FreeOSMemory()
	before := spare()
	kept := make([]byte, size)
	runtime.GC() // it is in use
	used := spare()
	runtime.KeepAlive(kept)
	runtime.GC() // it is free, and not given back yet
	free := spare()
	debug.FreeOSMemory()
	after := spare()
	t.Logf("spare: %d at first, %d with 32 MiB in use, %d when they are not, %d when all is given back", before, used, free, after)
	if before > size/4 || used > size/4 || free < size/2 || after > size/4 {
		t.Error("that is not what is spare")
	}
}
