package posix

import (
	"os"
	"path/filepath"
	"testing"
)

// TestLocal puts the table to the local disk. What fails here is wrong in the
// table.
func TestLocal(t *testing.T) {
	if why := Missing(); why != "" {
		t.Skip("SKIPPED: " + why)
	}
	dir := t.TempDir()
	kind, err := FSType(dir)
	if err != nil {
		t.Fatal(err)
	}
	if kind == "" || kind == "btrfs" {
		t.Skipf("SKIPPED: %s is on a file system whose differences from ext4 are not in the table", dir)
	}
	n := Run(t, Place{FS: kind, Dirs: []string{dir}})
	t.Logf("%d expectations on %s (%q)", n, dir, kind)
	if n < 1500 {
		t.Errorf("the table has %d expectations, want 1500", n)
	}
}

// TestMounts puts the table to a volume that is mounted already, for a try by hand:
// MORTAR_TEST_MOUNTS has the mount points, with : between.
func TestMounts(t *testing.T) {
	mounts := filepath.SplitList(os.Getenv("MORTAR_TEST_MOUNTS"))
	if len(mounts) == 0 {
		t.Skip("SKIPPED: MORTAR_TEST_MOUNTS names no mounts (test/e2e makes its own)")
	}
	first, err := os.MkdirTemp(mounts[0], "posix-")
	if err != nil {
		t.Fatal(err)
	}
	p := Place{FS: "mortar"}
	for _, m := range mounts {
		p.Dirs = append(p.Dirs, filepath.Join(m, filepath.Base(first)))
	}
	n := Run(t, p)
	t.Logf("%d expectations", n)
}
