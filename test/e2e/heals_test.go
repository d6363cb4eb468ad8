package e2e

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"mortar/test/cluster"
)

// Daemons are killed again and again under load: the primary's, a backup's, and
// one that has just been started and is being healed. However often that
// happened before, each brick is in sync again within the same time.
func TestHealsEnd(t *testing.T) {
	p := start(t, setup{})
	p.run(1, workload, "stress", "-dir", "/mnt/wp/names", "-make")
	rounds := pick(5, 20)
	l := p.startLoad("heals", stall)
	var waits []func(any) error
	for i := 2; i <= 3; i++ {
		waits = append(waits, p.startWorkload(i, time.Minute+time.Duration(rounds)*time.Minute, "stress", "-dir", "/mnt/wp/names",
			"-duration", (time.Duration(rounds)*2*time.Second).String(), "-seed", fmt.Sprint(i), "-workers", "1"))
	}
	const bound = 20 * time.Second
	var worst time.Duration
	rng := rand.New(rand.NewPCG(uint64(rounds), 1))
	for round := range rounds {
		i := p.primary(1)
		kind := "the primary"
		if round%2 == 1 {
			kind = "a backup"
			if other := p.other(i); rng.IntN(2) == 0 {
				i = other
			} else {
				i = p.other(i, other)
			}
		}
		p.killDaemon(i)
		l.goesOn(10 * time.Second)
		p.startDaemon(i)
		p.waitDaemon(i)
		if round%3 == 2 {
			kind += ", twice"
			time.Sleep(time.Duration(rng.IntN(800)) * time.Millisecond) // anywhere on the way back
			p.killDaemon(i)
			p.startDaemon(i)
			p.waitDaemon(i)
		}
		took := p.healed(p.other(i), bound)
		worst = max(worst, took)
		t.Logf("round %d: %s on n%d, in sync %v after it answered", round, kind, i, took.Round(time.Millisecond))
	}
	for _, wait := range waits {
		if err := wait(nil); err != nil {
			t.Error(err)
		}
	}
	l.end()
	l.check(1, 2, 3)
	t.Logf("the longest heal took %v", worst)
}

// A machine that was away while 100,000 small files were made is in sync again in 30 s, and applications feel
// little of it.
func TestHealsOfMany(t *testing.T) {
	if !long {
		t.Skip("SKIPPED: it takes five minutes; MORTAR_TEST_LONG=1 runs it")
	}
	p := start(t, setup{disk: cluster.XFS, diskBytes: 6 << 30})
	p.leadElsewhereThan(3)
	p.killDaemon(3)
	if _, err := p.Host(1).Run(p.ctx(15*time.Minute), workload, "files", "-dir", "/mnt/wp/many", "-n", "100000"); err != nil {
		t.Fatal(err)
	}
	calm := p.startLoad("calm", stall)
	time.Sleep(10 * time.Second) // for as long as it is looked at
	before := calm.end()
	l := p.startLoad("during", stall)
	machine := cluster.Share()
	p.back(3)
	took := p.healed(1, 2*time.Minute)
	during := l.end()
	t.Logf("100,000 files: in sync after %v, with %s", took, machine)
	if took > machine.Bound(30*time.Second) {
		t.Errorf("the heal of 100,000 files took %v, want 30 s; with %s", took, machine)
	}
	for kind, b := range before.Kinds {
		d := during.Kinds[kind]
		t.Logf("%s: p99 %.1f ms before (%d), %.1f ms during the heal (%d)", kind, b.P99, b.Count, d.P99, d.Count)
		if d.Count > 500 && d.P99 > 2*b.P99+5 {
			t.Errorf("%s: p99 went from %.1f to %.1f ms", kind, b.P99, d.P99)
		}
	}
	p.identical(1)
}

// A machine that was away while three files changed, in a volume of 100,000 files whose logs do not reach back to
// when it left, is in sync again in 5 s.
func TestHealsOfThree(t *testing.T) {
	if !long {
		t.Skip("SKIPPED: it takes five minutes; MORTAR_TEST_LONG=1 runs it")
	}
	p := start(t, setup{disk: cluster.XFS, diskBytes: 6 << 30, options: []string{"log-retention-size", "64MB"}})
	p.leadElsewhereThan(3)
	var made struct{ Seconds float64 }
	p.workload(1, 20*time.Minute, &made, "files", "-dir", "/mnt/wp/many", "-n", "100000")
	t.Logf("100,000 files were made in %.0f s", made.Seconds)
	p.healed(1, time.Minute)
	p.leadElsewhereThan(3)
	segments := func(i int) []string {
		return strings.Fields(p.run(i, "sh", "-c", "cd "+brickDir+"/.mortar/log && ls | grep -v tmp"))
	}
	compared := func() int { return strings.Count(p.Host(3).Log("mortar"), "this brick equals its primary's") }
	before := compared()
	p.killDaemon(3)
	end1, end2 := slices.Max(segments(1)), slices.Max(segments(2)) // where the logs end that n3 has
	p.run(1, "sh", "-c", "cd /mnt/wp/many && echo changed > 0/1 && echo new > 500/new && rm 999/99999")
	// It comes back when the logs have been trimmed beyond that.
	for i := 0; ; i++ {
		p.run(1, "sh", "-c", "dd if=/dev/zero of=/mnt/wp/large bs=1M count=64 conv=fsync status=none && rm /mnt/wp/large && sync /mnt/wp")
		if slices.Min(segments(1)) > end1 && slices.Min(segments(2)) > end2 {
			break
		}
		if i == 100 {
			t.Fatalf("after %d × 64 MiB the logs of n1 and n2 still have what they had when n3 left: %v, %v", i, segments(1), segments(2))
		}
	}
	p.startDaemon(3)
	p.waitDaemon(3)
	took := p.healed(1, time.Minute)
	t.Logf("three of 100,000 files: in sync %v after the daemon answered", took)
	if took > 5*time.Second {
		t.Errorf("the heal of three files took %v, want 5 s", took)
	}
	if compared() == before {
		t.Error("the bricks were not compared: the log reached back after all")
	}
	p.identical(1)
}
