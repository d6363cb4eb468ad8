package e2e

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
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
