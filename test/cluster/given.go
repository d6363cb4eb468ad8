package cluster

import (
	"fmt"
	"os"
	"strings"
	"time"
)

// Shared is a look at what the machine's processors have done so far, and for whom. By it a test learns how much
// of their time it was given since then: a bound on how long something takes is one on a machine that has
// nothing else to do.
type Shared struct {
	all   time.Duration // the processors' time, idle or not
	taken time.Duration // what processes had of it, and what a machine's own host took away
	own   time.Duration // what this process, all that it started, and the kernel for itself had of that
}

// Share looks at the machine.
func Share() Shared {
	var s Shared
	text, _ := os.ReadFile("/proc/stat")
	line, _, _ := strings.Cut(string(text), "\n")
	// proc(5): user, nice, system, idle, iowait, irq, softirq, steal. Interrupts are everybody's.
	for i, f := range strings.Fields(line) {
		if i == 0 || i > 8 {
			continue
		}
		t := ticks(f)
		s.all += t
		if i <= 3 || i == 8 {
			s.taken += t
		}
	}
	s.own = family(processes("/proc"), os.Getpid(), 2)
	return s
}

// Given is the part of the processors' time since the look that nobody else had, from 1 down to a tenth.
func (s Shared) Given() float64 { return s.given(Share()) }

func (s Shared) given(now Shared) float64 {
	all := now.all - s.all
	if all <= 0 {
		return 1
	}
	others := now.taken - s.taken - (now.own - s.own)
	return min(1, max(0.1, 1-float64(others)/float64(all)))
}

// Bound is what a bound of d comes to on the machine as it was since the look: twice as much if
// others had half of it.
func (s Shared) Bound(d time.Duration) time.Duration { return time.Duration(float64(d) / s.Given()) }

// String is for messages of tests.
func (s Shared) String() string { return fmt.Sprintf("%.0f %% of the machine", 100*s.Given()) }

// family is the processor time of processes and of all that they started, those that have ended included.
func family(all []process, heads ...int) (sum time.Duration) {
	stats := map[int]stat{}
	for _, p := range all {
		stats[p.pid] = p.stat()
	}
	member := map[int]bool{0: false}
	for _, h := range heads {
		member[h] = true
	}
	var belongs func(pid int) bool
	belongs = func(pid int) bool {
		is, known := member[pid]
		if !known {
			is = belongs(stats[pid].ppid)
			member[pid] = is
		}
		return is
	}
	for pid, st := range stats {
		if belongs(pid) {
			sum += st.cpu + st.reaped
		}
	}
	return sum
}
