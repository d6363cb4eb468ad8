package doctor

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"
)

// TestFlushes: a disk that answers is measured, one that fails is not, and one that hangs is not waited for.
func TestFlushes(t *testing.T) {
	ended := make(chan struct{})
	end := func() { ended <- struct{}{} }
	n := 0
	f := measured(t, func() error { n++; return nil }, end, time.Hour, time.Hour)
	<-ended
	if f.Writes != flushWrites || n != flushWrites+1 || f.Hangs != 0 || f.Median < 0 || f.Slowest < f.Median {
		t.Errorf("%d writes: %+v", n, f)
	}

	n = 0
	f = measured(t, func() error {
		if n++; n == 4 {
			return errors.New("full")
		}
		return nil
	}, end, time.Hour, time.Hour)
	<-ended
	if f.Writes != 2 || f.Hangs != 0 {
		t.Errorf("it failed after 2 that count: %+v", f)
	}

	n = 0
	f = measured(t, func() error { n++; return nil }, end, 0, time.Hour)
	<-ended
	if n != 2 || f.Writes != 1 {
		t.Errorf("no time is left after the first write: %d writes, %+v", n, f)
	}

	for _, at := range []int{1, 3} {
		n = 0
		free := make(chan struct{})
		f = measured(t, func() error {
			if n++; n == at {
				<-free
			}
			return nil
		}, end, time.Hour, time.Second)
		if f.Hangs != time.Second || f.Writes > max(0, at-2) {
			t.Errorf("write %d hangs: %+v", at, f)
		}
		close(free) // who was left behind ends, and writes no more than what was under way
		<-ended
		if n > at+1 {
			t.Errorf("%d writes, left behind at write %d", n, at)
		}
	}
}

// measured is flushes, which must come back.
func measured(t *testing.T, write func() error, end func(), long, hangs time.Duration) (f Flush) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f = flushes(write, end, long, hangs)
	}()
	select {
	case <-done:
	case <-time.After(5 * time.Minute):
		t.Fatal("it waits for the disk")
	}
	return f
}

// TestGatherFlush: a real directory's disk is measured, and nothing is left in it; that of one that is not there is not.
func TestGatherFlush(t *testing.T) {
	dir := t.TempDir()
	f := gatherFlush(dir)
	if f.Writes == 0 && f.Hangs == 0 {
		t.Skipf("SKIPPED: no files without names in %s", dir)
	}
	if f.Writes > flushWrites || f.Median <= 0 && f.Hangs == 0 || f.Slowest < f.Median {
		t.Errorf("%+v", f)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left there: %v, %v", left, err)
	}
	if f := gatherFlush(dir + "/none"); f != (Flush{}) {
		t.Errorf("a directory that is not there: %+v", f)
	}
	// What is found becomes a finding, with its time.
	facts := fine()
	facts.Bricks[0].Flush = f
	said := false
	for _, x := range Examine(facts) {
		said = said || x.Check == "disk" && (strings.Contains(x.What, "flush") || strings.Contains(x.What, "hangs"))
	}
	if !said {
		t.Error("nothing is said of it")
	}
}
