package oplog

import (
	"testing"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

// TestOversize reads records that are larger than a segment and whose length is
// no multiple of the alignment of records: nothing follows them in their file.
func TestOversize(t *testing.T) {
	for _, size := range []int{directSize, directSize + 1, directSize + 7, 3*directSize + 3} {
		fs := disk.NewMem()
		if err := fs.MkdirAll("/l", 0o700); err != nil {
			t.Fatal(err)
		}
		l, err := Open(Options{FS: fs, Dir: "/l", SegmentSize: directSize})
		if err != nil {
			t.Fatal(err)
		}
		for seq := range uint64(3) {
			if _, err := l.Append(cluster.Pos{Epoch: 1, Seq: seq + 1}, make([]byte, size), 0); err != nil {
				t.Fatal(err)
			}
		}
		raws, _, _, err := l.Read(0, 1<<20)
		if err != nil || len(raws) != 3 || len(raws[2]) != size {
			t.Errorf("records of %d bytes: %d, %v", size, len(raws), err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
