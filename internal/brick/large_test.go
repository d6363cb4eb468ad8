package brick

import (
	"fmt"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"mortar/internal/fsop"
)

// TestLargeDirectory: what an entry of a directory costs to make, to list and to
// remove does not grow with the directory. Processor time is compared, which
// other processes disturb less than the clock. MORTAR_TEST_ENTRIES is for more
// entries, with which the KV compacts.
func TestLargeDirectory(t *testing.T) {
	large := 8_000
	if n, err := strconv.Atoi(os.Getenv("MORTAR_TEST_ENTRIES")); err == nil {
		large = n
	}
	const times = 8
	few, many := eachEntry(t, large/times), eachEntry(t, large)
	for i, what := range []string{"make", "list", "remove"} {
		t.Logf("%s: %v each of %d, %v each of %d", what, few[i], large/times, many[i], large)
		// Were it in proportion to the directory it would be eight times as much.
		if many[i] > few[i]*times/2 && many[i] > 10*time.Microsecond {
			t.Errorf("%s costs %v for each of %d entries, and %v for each of %d", what, few[i], large/times, many[i], large)
		}
	}
}

// eachEntry returns what it costs for each of n entries of a directory to make, to list and to remove it.
func eachEntry(t *testing.T, n int) (cost [3]time.Duration) {
	// Not what is kept in memory is measured, which the small one fits into.
	o := newBrick(t, func(o *Options) { o.SegmentSize, o.MemTable, o.Cache, o.Inodes = 0, 0, 0, 100 })
	dir := o.mkdir(fsop.RootIno, "large")
	measure := func(i int, f func()) {
		before := processorTime()
		f()
		cost[i] = (processorTime() - before) / time.Duration(n)
	}
	name := func(i int) string { return fmt.Sprintf("entry-%d", i*7919%n) } // in no order; 7919 is prime
	measure(0, func() {
		for i := range n {
			o.Commit(o.Tail().Seq)
			o.create(dir, name(i))
		}
		o.settleAll()
	})
	list := func() (found int) {
		for cookie := uint64(0); ; {
			l := o.get(&fsop.Readdir{Ino: dir, Cookie: cookie, Max: 512, Plus: true}).Entries
			if len(l) == 0 {
				return found
			}
			found += len(l)
			cookie = l[len(l)-1].Cookie
		}
	}
	measure(1, func() {
		if got := list(); got != n {
			t.Errorf("%d of %d entries are listed", got, n)
		}
	})
	measure(2, func() {
		// As rm -r does it: a piece is listed, removed, and the next one listed.
		for cookie := uint64(0); ; {
			l := o.get(&fsop.Readdir{Ino: dir, Cookie: cookie, Max: 4 << 10, Plus: true}).Entries
			if len(l) == 0 {
				break
			}
			for _, e := range l {
				o.must(&fsop.Unlink{Parent: dir, Name: e.Name})
				cookie = e.Cookie
			}
			o.Commit(o.Tail().Seq)
		}
		if got := list(); got != 0 {
			t.Errorf("%d entries are left", got)
		}
		o.must(&fsop.Rmdir{Parent: fsop.RootIno, Name: "large"})
	})
	return cost
}

func processorTime() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
