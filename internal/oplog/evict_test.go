package oplog

import (
	"sync"
	"testing"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

// evictions is a disk that notes what is dropped from memory.
type evictions struct {
	disk.FS
	mu   sync.Mutex
	upTo int64
	all  int // whole files
}

func (e *evictions) OpenFile(name string, flag int) (disk.File, error) {
	f, err := e.FS.OpenFile(name, flag)
	if err != nil {
		return nil, err
	}
	return &evictedFile{f, e}, nil
}

type evictedFile struct {
	disk.File
	e *evictions
}

func (f *evictedFile) Evict(off, n int64) error {
	f.e.mu.Lock()
	defer f.e.mu.Unlock()
	if n == 0 {
		f.e.all++
	} else {
		f.e.upTo = max(f.e.upTo, off+n)
	}
	return f.File.Evict(off, n)
}

// A stream of large records does not stay in memory, nor does it go before the
// kernel had time to write it; what small records made is left alone.
func TestStreamsLeaveMemory(t *testing.T) {
	const segment = 32 << 20
	for _, c := range []struct {
		name          string
		record, bytes int
		upTo          bool
		all           int
	}{
		{"large records", 512 << 10, 24 << 20, true, 0},
		{"large records, several segments", 512 << 10, 70 << 20, true, 2},
		{"small records", 8 << 10, 24 << 20, false, 0},
		{"few", 512 << 10, 4 << 20, false, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := &evictions{FS: disk.NewMem()}
			r := newRig(t, e, segment)
			opened := e.all
			data := make([]byte, c.record)
			for i := range c.bytes / c.record {
				if _, err := r.l.Append(cluster.Pos{Epoch: 1, Seq: uint64(i) + 1}, data, 0); err != nil {
					t.Fatal(err)
				}
			}
			if err := r.l.Close(); err != nil { // waits for the keeper
				t.Fatal(err)
			}
			if (e.upTo > 0) != c.upTo || e.upTo > segment-evictLag {
				t.Errorf("dropped up to %d", e.upTo)
			}
			if got := e.all - opened; got > c.all || c.all > 0 && got == 0 {
				t.Errorf("%d segments dropped as a whole, want %d", got, c.all)
			}
		})
	}
}
