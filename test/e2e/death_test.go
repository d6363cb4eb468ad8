package e2e

import (
	"fmt"
	"testing"
	"time"
)

// A daemon that is killed costs no lease: the mount of its machine certifies its death to the
// others, once its clients have dropped what they had cached.
func TestCertifiedDeath(t *testing.T) {
	// A lease takes 1.2 to 1.5 s. Other work on this machine may take its part of one trial, and not of
	// three; the figures are in bench/stall/REPORT.md.
	const bound, trials = 700 * time.Millisecond, 3
	p := start(t, setup{})
	for _, c := range []struct {
		name    string
		primary bool
	}{{"backup", false}, {"primary", true}} {
		t.Run(c.name, func(t *testing.T) {
			p.as(t)
			for n := 1; ; n++ {
				i := p.primary(1)
				writer := p.other(i)
				if !c.primary {
					i, writer = writer, i
				}
				l := p.startLoadOn(writer, fmt.Sprintf("%s-%d", c.name, n), 10*time.Second)
				p.killDaemon(i)
				l.goesOn(10 * time.Second)
				worst := time.Duration(l.end().Worst * float64(time.Millisecond))
				bound := l.machine.Bound(bound)
				if worst > bound && n == trials {
					t.Errorf("the longest operation took %v in the last of %d trials, want at most %v\nthe mount of n%d:\n%s",
						worst, n, bound, i, p.run(i, "tail", "-n", "12", "/var/log/mortar/mnt-wp.log"))
				}
				p.back(i)
				p.healed(p.other(i), 30*time.Second)
				if worst <= bound || n == trials {
					return
				}
			}
		})
	}
	p.identical(1)
}
