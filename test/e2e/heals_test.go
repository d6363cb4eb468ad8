package e2e

import (
	"fmt"
	"math/rand/v2"
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
	p.back(3)
	took := p.healed(1, 2*time.Minute)
	during := l.end()
	t.Logf("100,000 files: in sync after %v", took)
	if took > 30*time.Second {
		t.Errorf("the heal of 100,000 files took %v, want 30 s", took)
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
