package e2e

import (
	"fmt"
	"os"
	"testing"

	"mortar/test/locks"
)

// TestLocks puts the table of locks between processes to a volume: with all
// processes on one mount, and with each on another machine's.
func TestLocks(t *testing.T) {
	p := start(t, setup{})
	for _, through := range []int{1, 3} {
		t.Run(fmt.Sprintf("mounts=%d", through), func(t *testing.T) {
			var dirs []string
			for i := 1; i <= through; i++ {
				dirs = append(dirs, p.outside(i, fmt.Sprintf("/mnt/wp/through-%d", through)))
			}
			if err := os.Mkdir(dirs[0], 0o755); err != nil {
				t.Fatal(err)
			}
			n, wake := locks.Run(t, locks.Place{Mortar: true, Dirs: dirs})
			t.Logf("%d lines, the slowest waiter woke after %v", n, wake)
		})
	}
}
