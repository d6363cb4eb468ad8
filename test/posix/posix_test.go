package posix

import "testing"

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
