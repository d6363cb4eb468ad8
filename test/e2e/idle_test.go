package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The monitor threads of a daemon and a mount may sleep longer while nothing is asked of
// them, and may not while they work (doc/decisions/0013).
func TestIdleMonitors(t *testing.T) {
	p := start(t, setup{hosts: 1})
	const calm = "100000000" // ns
	eased := func(want int) {
		t.Helper()
		for what, pid := range map[string]int{"the daemon": p.daemons[0].Pid(), "the mount": p.mountProcess(1)} {
			p.within(20*time.Second, fmt.Sprintf("%d threads of %s have slack", want, what), func() error {
				tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
				if err != nil || len(tasks) == 0 {
					return fmt.Errorf("no threads: %v", err)
				}
				n := 0
				for _, task := range tasks {
					if slack, _ := os.ReadFile("/proc/" + filepath.Base(task) + "/timerslack_ns"); strings.TrimSpace(string(slack)) == calm {
						n++
					}
				}
				if n != want {
					return fmt.Errorf("%d of %d", n, len(tasks))
				}
				return nil
			})
		}
	}
	eased(1)
	l := p.startLoad("busy", time.Minute)
	eased(0)
	l.end()
	eased(1)
}
