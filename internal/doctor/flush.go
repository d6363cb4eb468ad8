package doctor

import (
	"errors"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Flush is what it takes a disk to have a small write safe, which is what every fsync waits for.
// It is zero if that could not be tried.
type Flush struct {
	Writes          int
	Median, Slowest time.Duration
	Hangs           time.Duration // the write under way was not safe after that long
}

// What is tried: so many writes, no third one after flushLong, and nobody waits longer than flushHangs for one.
const (
	flushWrites = 20
	flushLong   = time.Second
	flushHangs  = 5 * time.Second
	flushBlock  = 4 << 10
)

// gatherFlush measures a disk below a directory. It leaves nothing there: the file has no name at any time.
func gatherFlush(dir string) Flush {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil { // not allowed, or the file system has no files without names
		return Flush{}
	}
	f := os.NewFile(uintptr(fd), dir)
	block := make([]byte, flushBlock)
	return flushes(func() error {
		_, err := f.WriteAt(block, 0)
		return errors.Join(err, unix.Fdatasync(fd))
	}, func() { f.Close() }, flushLong, flushHangs)
}

// flushes times safe writes. The first, which makes room for the others as a log's preparation does, is not counted
// unless it hangs.
func flushes(write func() error, end func(), long, hangs time.Duration) Flush {
	took := make(chan time.Duration) // closed after the last one
	done := make(chan struct{})
	defer close(done)
	// A disk that hangs keeps whoever waits for it, and nothing can take him away: he is left behind.
	go func() {
		defer end()
		defer close(took)
		begun := time.Now()
		for n := 0; n <= 1 || n <= flushWrites && time.Since(begun) < long; n++ {
			at := time.Now()
			if write() != nil {
				return
			}
			if n == 0 {
				continue
			}
			select {
			case took <- time.Since(at):
			case <-done:
				return
			}
		}
	}()
	var all []time.Duration
	limit := time.NewTimer(hangs)
	defer limit.Stop()
	for {
		select {
		case d, more := <-took:
			if more {
				all = append(all, d)
				limit.Reset(hangs)
				continue
			}
			return summary(all, 0)
		case <-limit.C:
			return summary(all, hangs)
		}
	}
}

func summary(all []time.Duration, hangs time.Duration) Flush {
	f := Flush{Writes: len(all), Hangs: hangs}
	if len(all) > 0 {
		slices.Sort(all)
		f.Median, f.Slowest = all[len(all)/2], all[len(all)-1]
	}
	return f
}
