package sim_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// A disk that crawls at 1 MB/s, under a backup and under the primary, while as much is written as
// goes: no operation takes much longer than the disk itself, or than to do without it. In
// real time, since a bubble of synctest does not see who waits for a lock.
func TestCrawlingDisk(t *testing.T) {
	for _, role := range []string{"a backup's", "the primary's"} {
		t.Run(role, func(t *testing.T) {
			w := newWhole(t)
			k := newWorker(w, rand.New(rand.NewPCG(1, 2)))
			k.create("/f")
			k.write("/f", 0, 4096, true)
			at := w.node(w.config().Primary)
			if role == "a backup's" {
				at = w.nodes[(at.i+1)%3]
			}
			fs := at.life().fs
			fs.Crawl(1 << 20)
			longest, what := time.Duration(0), ""
			do := func(op string, f func()) {
				began := time.Now()
				if f(); time.Since(began) > longest {
					longest, what = time.Since(began), op
				}
			}
			began := time.Now()
			for i := 0; time.Since(began) < 1200*time.Millisecond; i++ {
				name := fmt.Sprintf("/f%d", i%50)
				if i < 50 {
					do("create", func() { k.create(name) })
				}
				do("write", func() { k.write(name, 0, 40<<10, false) })
				if i%10 == 9 {
					do("fsync", func() { k.fsync(name) })
				}
			}
			t.Logf("%d changes, the longest operation was %s: %v; the set is %+v", k.acked, what, longest, w.config())
			if longest < 20*time.Millisecond || longest > 5*time.Second {
				t.Errorf("%s took %v; 40 KiB take such a disk 40 ms, and to do without it takes 2 s", what, longest)
			}
			fs.Crawl(0)
			w.whole()
			w.end()
			for _, n := range w.nodes {
				n.ended()
			}
			w.bg.Wait()
		})
	}
}
