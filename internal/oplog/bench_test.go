package oplog

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

// The benchmarks write to TMPDIR: point it at the kind of disk to be measured.

func benchLog(b *testing.B) *Log {
	l, err := Open(Options{FS: disk.OS, Dir: b.TempDir() + "/log"})
	must(b, err)
	b.Cleanup(func() { l.Close() })
	return l
}

func BenchmarkAppend(b *testing.B) {
	for _, c := range []struct{ size, align, batch int }{
		{150, 0, 1}, {150, 0, 16}, {4200, 4096, 1}, {131200, 131072, 1}, {1<<20 + 120, 1 << 20, 1},
	} {
		b.Run(fmt.Sprintf("size=%d/flush=%d", c.size, c.batch), func(b *testing.B) {
			l := benchLog(b)
			p := make([]byte, c.size)
			b.SetBytes(int64(c.size))
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				if _, err := l.Append(cluster.Pos{Epoch: 1, Seq: uint64(i + 1)}, p, c.align); err != nil {
					b.Fatal(err)
				}
				if i%c.batch == 0 {
					must(b, l.Flush())
				}
				if i%(1+(16<<20)/c.size) == 0 {
					must(b, l.TrimBefore(uint64(i)))
				}
			}
		})
	}
}

func BenchmarkAppendAndSync(b *testing.B) {
	for _, writers := range []int{1, 16} {
		b.Run(fmt.Sprintf("size=8192/writers=%d", writers), func(b *testing.B) {
			l := benchLog(b)
			p := make([]byte, 8192)
			next := make(chan uint64)
			go func() {
				defer close(next)
				for i := range b.N {
					l.Append(cluster.Pos{Epoch: 1, Seq: uint64(i + 1)}, p, 0)
					next <- uint64(i + 1)
				}
			}()
			b.SetParallelism(max(1, writers/2)) // for two processors
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := l.Sync(b.Context(), <-next); err != nil {
						b.Error(err)
					}
				}
			})
		})
	}
}

func BenchmarkRead(b *testing.B) {
	l := benchLog(b)
	p := make([]byte, 300)
	const n = 100_000
	for i := range uint64(n) {
		_, err := l.Append(cluster.Pos{Epoch: 1, Seq: i + 1}, p, 0)
		must(b, err)
	}
	b.SetBytes(300)
	b.ResetTimer()
	after := uint64(0)
	for done := 0; done < b.N; {
		ps, poss, _, err := l.Read(after, 256<<10)
		must(b, err)
		if done += len(ps); len(ps) > 0 {
			after = poss[len(poss)-1].Seq
		}
		after %= n
	}
}

// BenchmarkPreallocation measures what doc/decisions/0012-log-preallocation.md
// rests on: a write of 8 KiB and fdatasync, in a file of a segment's size that
// was made in different ways. It takes turns, since disks have moods, and
// reports the median of each.
func BenchmarkPreallocation(b *testing.B) {
	dir := b.TempDir()
	const size, rec = DefaultSegmentSize, 8192 + recordHeader
	fill := func(f disk.File) error {
		for off := int64(0); off < size; off += 1 << 20 {
			if _, err := f.WriteAt(make([]byte, 1<<20), off); err != nil {
				return err
			}
		}
		return nil
	}
	ways := []struct {
		name  string
		make  func(f disk.File) error
		ahead int64
	}{
		{"append", func(disk.File) error { return nil }, 0},
		{"fallocate", func(f disk.File) error { return f.Allocate(0, size) }, 0},
		{"ahead=64k", func(f disk.File) error { return f.Allocate(0, size) }, 64 << 10},
		{"ahead=256k", func(f disk.File) error { return f.Allocate(0, size) }, 256 << 10},
		{"ahead=1m", func(f disk.File) error { return f.Allocate(0, size) }, 1 << 20},
		{"zeros", fill, 0}, // or the blocks of an old segment
		{"shared", func(f disk.File) error { // an old segment, reflinked into a data file
			if err := fill(f); err != nil {
				return err
			}
			g, err := disk.OS.OpenFile(filepath.Join(dir, "data"), os.O_RDWR|os.O_CREATE|os.O_TRUNC)
			if err != nil {
				return err
			}
			defer g.Close()
			if err := g.CloneRange(f, 0, 0, size); err != nil {
				return err
			}
			return g.Sync()
		}, 0},
	}
	times := make([][]time.Duration, len(ways))
	for b.Loop() {
		for i, way := range ways {
			name := filepath.Join(dir, "segment")
			f, err := disk.OS.OpenFile(name, os.O_RDWR|os.O_CREATE)
			must(b, err)
			must(b, way.make(f))
			must(b, f.Sync())
			must(b, disk.OS.SyncDir(dir))
			seg := segment{}
			p := make([]byte, rec)
			off := int64(disk.BlockSize)
			for range 128 {
				w := p
				if end := off + rec; way.ahead > 0 && end > seg.zeroed {
					seg.zeroed = roundUp(end, way.ahead)
					w = make([]byte, seg.zeroed-off)
				}
				start := time.Now()
				_, err := f.WriteAt(w, off)
				must(b, err)
				must(b, f.SyncData())
				times[i] = append(times[i], time.Since(start))
				off += rec
			}
			must(b, f.Close())
			must(b, os.Remove(name))
		}
	}
	for i, way := range ways {
		slices.Sort(times[i])
		n := len(times[i])
		sum := time.Duration(0)
		for _, d := range times[i] {
			sum += d
		}
		b.Logf("%-12s mean %7v  p50 %7v  p90 %7v  p99 %7v", way.name, (sum / time.Duration(n)).Round(time.Microsecond),
			times[i][n/2].Round(time.Microsecond), times[i][n*9/10].Round(time.Microsecond), times[i][n*99/100].Round(time.Microsecond))
	}
}
