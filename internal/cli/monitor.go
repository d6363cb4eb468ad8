package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mortar/internal/cluster"
)

// The monitor thread that thrifty keeps awake looks around 100 times a second, which is
// most of what an idle mount takes and a third of what an idle daemon does. While there
// is next to nothing to look at it is given a long timer slack (timerslack_ns in proc(5)):
// the kernel may then let it sleep longer, to wake it together with others or, at the
// latest, when the slack is over.
const (
	calmSlack   = cluster.Tick          // of an idle process's monitor
	usualSlack  = 50 * time.Microsecond // the kernel's default
	calmAfter   = 5                     // looks at which the process was idle
	idlePart    = 50                    // idle is who takes less than one of so many parts of a core
	lookAtUsage = 2 * cluster.Tick      // how often that is looked at: with the ticks, so that nothing wakes up for it
)

// monitor is the monitor thread of this process.
type monitor struct{ slack string } // the file that says how much slack it has

// findMonitor finds the one thread that sleeps as only the monitor does.
func findMonitor() (monitor, error) {
	tasks, err := filepath.Glob("/proc/self/task/*/syscall")
	if err != nil {
		return monitor{}, err
	}
	var found []string
	for _, file := range tasks {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		number, _, _ := strings.Cut(string(text), " ")
		if number == strconv.Itoa(unix.SYS_NANOSLEEP) {
			found = append(found, filepath.Base(filepath.Dir(file)))
		}
	}
	if len(found) != 1 {
		return monitor{}, fmt.Errorf("%d of %d threads sleep like a monitor", len(found), len(tasks))
	}
	return monitor{"/proc/" + found[0] + "/timerslack_ns"}, nil
}

func (m monitor) set(d time.Duration) error {
	return os.WriteFile(m.slack, []byte(strconv.FormatInt(d.Nanoseconds(), 10)), 0)
}

// usage is what a process has used up: processor time, and blocks read and written.
type usage struct {
	cpu    time.Duration
	blocks int64
}

func used() (usage, error) {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		return usage{}, err
	}
	return usage{time.Duration(r.Utime.Nano() + r.Stime.Nano()), r.Inblock + r.Oublock}, nil
}

// idle reports whether next to nothing was done between two looks. Who waits for a disk
// is not idle, however little of the processor that takes: the monitor has to see that.
func idle(before, after usage, between time.Duration) bool {
	return after.blocks == before.blocks && (after.cpu-before.cpu)*idlePart < between
}

// easeMonitor lets this process's monitor thread sleep longer while the process is idle,
// until the function that it returns is called. It does nothing where thrifty did not
// start the program again, or the kernel does not let it: that takes CAP_SYS_NICE.
func easeMonitor(ctx context.Context) (stop func()) {
	if !strings.Contains(os.Getenv("GODEBUG"), traceInterval) {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { attend(ctx) })
	return func() { cancel(); wg.Wait() }
}

// What a process that has come to rest gives back to the machine, if it is this much and it has not done so within that
// time. Collecting what there is takes some 10 ms of a processor.
const (
	spareBytes = 4 << 20
	spareEvery = 10 * time.Second
)

// spare is how much memory of the heap nothing is in: free, but not given back, or garbage.
func spare() uint64 {
	s := []metrics.Sample{
		{Name: "/memory/classes/heap/free:bytes"}, {Name: "/memory/classes/heap/objects:bytes"}, {Name: "/gc/heap/live:bytes"},
	}
	metrics.Read(s)
	for _, m := range s {
		if m.Value.Kind() != metrics.KindUint64 {
			return 0 // a runtime without it
		}
	}
	garbage := max(0, int64(s[1].Value.Uint64())-int64(s[2].Value.Uint64())) // and what is new, which may be in use
	return s[0].Value.Uint64() + uint64(garbage)
}

// attend looks at what the process uses up, and gives the monitor slack or takes it. When the process has
// come to rest it gives back what memory it does not need: a daemon that has worked has half as much again.
func attend(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var m monitor
	var gave time.Time
	var last time.Time
	var before usage
	looks, calm := 0, false
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		now := time.Now()
		timer.Reset(cluster.UntilTick(now) + lookAtUsage - cluster.Tick)
		after, err := used()
		if err != nil {
			return
		}
		if looks++; last.IsZero() || !idle(before, after, now.Sub(last)) {
			looks = 0
		}
		last, before = now, after
		if looks > 0 && looks%calmAfter == 0 && now.Sub(gave) > spareEvery && spare() > spareBytes {
			gave = now
			debug.FreeOSMemory()
			// Its own work is not to count.
			if before, err = used(); err != nil {
				return
			}
		}
		if want := looks >= calmAfter; want != calm {
			if m.slack == "" {
				if m, err = findMonitor(); err != nil {
					continue
				}
			}
			slack := usualSlack
			if want {
				slack = calmSlack
			}
			if err := m.set(slack); errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
				return // a kernel without it, or not allowed
			} else if err == nil {
				calm = want
			}
		}
	}
}
