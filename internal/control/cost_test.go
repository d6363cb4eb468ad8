package control

import (
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
)

func cpuTime() time.Duration {
	var ru syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &ru)
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

// An idle pool must cost next to nothing: its machines are small.
func TestIdleCost(t *testing.T) { synctest.Test(t, testIdleCost) }

func testIdleCost(t *testing.T) {
	if testing.Short() {
		t.Skip("measures for some seconds")
	}
	w := newWorld(t, 3)
	nodes := w.pool()
	w.settled(nodes...)
	const span = 5 * time.Second
	cpu, writes := cpuTime(), w.writes.Load()
	time.Sleep(span)
	cpu, writes = cpuTime()-cpu, w.writes.Load()-writes
	perNode := float64(cpu) / float64(span) / 3
	t.Logf("%.3f %% of a core per peer, %.1f messages/s in the whole pool", 100*perNode, float64(writes)/span.Seconds())
	// Time on a shared machine proves little; the number of messages does: two
	// followers, a heartbeat and its answer every beatEvery, and a margin.
	if limit := int64(1.2 * 2 * 2 * span.Seconds() / beatEvery.Seconds()); writes > limit {
		t.Errorf("an idle pool exchanges %d messages in %v, and more than %d are not needed", writes, span, limit)
	}
}

// TestDecisionTime reports how long a decision takes, at the leader and when it
// is asked for elsewhere.
func TestDecisionTime(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	lead := w.settled(nodes...)
	follower := others(nodes, lead)[0]
	v := w.volume("v", nodes...)
	for _, nd := range []*node{lead, follower} {
		var times []time.Duration
		for i := range 40 {
			value := []string{"30s", "40s"}[i%2]
			begin := time.Now()
			if err := nd.c.Propose(w.ctx(), state.Command{SetOptions: &state.SetOptions{Volume: v.ID, Options: map[string]string{cluster.OptCacheTimeout: value}}}); err != nil {
				t.Fatal(err)
			}
			times = append(times, time.Since(begin))
			if got, _ := nd.c.Map().Volume("v").Option(cluster.OptCacheTimeout); got != value && got != "30s" {
				t.Fatalf("the option is %s after Propose returned", got)
			}
		}
		slices.Sort(times)
		t.Logf("%s (leads: %v): median %v, worst %v", nd.name, nd == lead, times[len(times)/2], times[len(times)-1])
	}
}
