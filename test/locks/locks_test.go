package locks

import (
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

// TestLocal puts the table to the local disk. What fails here is wrong in the table.
func TestLocal(t *testing.T) {
	n, wake := Run(t, Place{Dirs: []string{t.TempDir()}})
	t.Logf("%d lines, the slowest waiter woke after %v", n, wake)
}
