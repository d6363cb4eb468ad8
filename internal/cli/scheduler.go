package cli

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
)

// A daemon and a mount wake up for every request and fall asleep after it. Go's
// scheduler pays for that twice: a goroutine that becomes ready wakes another
// thread, on another core, although the one at work would get to it in a
// microsecond; and the monitor thread, which goes to sleep with a process that
// is all idle, is woken by its first system call and then looks around every
// 20 µs. doc/decisions/0013 has what each costs.
//
// GOMAXPROCS is an ordinary setting. The monitor stays awake, at 10 ms, while
// there is a scheduler trace to print; this one is due every 24 days.
const traceInterval = "schedtrace=2147483647"

// gcPercent is how much garbage there may be, in percent of what is in use. Most of
// what is in use are caches and buffers of fixed sizes, of which collecting costs
// little; at the runtime's default of 100 half of a daemon's memory is garbage.
const gcPercent = "50"

// thrifty runs this program again, in this process, under a scheduler that
// suits a long-running one. It returns if that is so already, or where the
// user has decided otherwise by GODEBUG or GOMAXPROCS. In a test's process,
// which is not this program, it does nothing.
func (a *app) thrifty() error {
	debug := os.Getenv("GODEBUG")
	if a.Err != os.Stderr || strings.Contains(debug, "schedtrace=") {
		return nil
	}
	if debug != "" {
		debug += ","
	}
	env := append(os.Environ(), "GODEBUG="+debug+traceInterval)
	if os.Getenv("GOMAXPROCS") == "" {
		// Half of what there is: the other half is for those whom this one serves.
		env = append(env, "GOMAXPROCS="+strconv.Itoa(max(1, runtime.GOMAXPROCS(0)/2)))
	}
	if os.Getenv("GOGC") == "" {
		env = append(env, "GOGC="+gcPercent)
	}
	// By its path, which is what ps and pkill show.
	if err := syscall.Exec(selfPath(), os.Args, env); err != nil {
		return fmt.Errorf("starting again with other scheduler settings: %w", err)
	}
	panic("unreachable: exec has returned without an error")
}
