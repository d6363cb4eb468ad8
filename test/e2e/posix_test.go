package e2e

import (
	"fmt"
	"os"
	"testing"

	"mortar/test/posix"
)

// TestPosix puts the table of POSIX cases to a volume: through one mount, and
// through three, where each call has to see what the one before did on another
// machine. The calls are this process's own, which looks into the hosts.
func TestPosix(t *testing.T) {
	if why := posix.Missing(); why != "" {
		t.Skip("SKIPPED: " + why)
	}
	p := start(t, setup{})
	for _, through := range []int{1, 3} {
		t.Run(fmt.Sprintf("mounts=%d", through), func(t *testing.T) {
			p.as(t)
			var dirs []string
			for i := 1; i <= through; i++ {
				dirs = append(dirs, p.outside(i, fmt.Sprintf("/mnt/wp/through-%d", through)))
			}
			if err := os.Mkdir(dirs[0], 0o755); err != nil {
				t.Fatal(err)
			}
			n := posix.Run(t, posix.Place{FS: "mortar", Dirs: dirs})
			t.Logf("%d expectations", n)
		})
	}
	p.identical(1)
}
