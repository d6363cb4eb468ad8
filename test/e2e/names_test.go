package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"mortar/test/cluster"
)

// Three mounts do everything to the names of common directories. Errors are
// those that the others' changes explain, files that are held open stay what
// they are without a name, names that stay are in every listing, once: in peace,
// and while the primary and a backup die. In the end all mounts list the same, the
// replicas are identical, and each brick is sound on its own.
func TestNames(t *testing.T) {
	p := start(t, setup{})
	p.run(1, workload, "stress", "-dir", "/mnt/wp/names", "-make")
	for k, c := range []struct {
		name   string
		faults bool
	}{{"in peace", false}, {"while daemons die", true}} {
		t.Run(c.name, func(t *testing.T) {
			p.as(t)
			duration := pick(2*time.Second, 10*time.Minute)
			limit := 1500 * time.Millisecond
			if c.faults {
				duration, limit = pick(5*time.Second, 10*time.Minute), stall // most of which they wait
			}
			machine := cluster.Share()
			var waits []func(any) error
			for i := 1; i <= 3; i++ {
				waits = append(waits, p.startWorkload(i, duration+30*time.Second, "stress", "-dir", "/mnt/wp/names",
					"-duration", duration.String(), "-seed", fmt.Sprint(10*k+i)))
			}
			if c.faults {
				for _, whom := range []func() int{func() int { return p.primary(1) }, func() int { return p.other(p.primary(1)) }} {
					p.restart(whom())
				}
			}
			held := 0
			for i, wait := range waits {
				var r struct {
					Ops, Lost          map[string]int
					Stale, Held, Lists int
					Worst              float64 `json:"worst_ms"`
					From               string  `json:"worst_of"`
				}
				if err := wait(&r); err != nil {
					t.Error(err)
				}
				ops, lost := 0, 0
				for _, n := range r.Ops {
					ops += n
				}
				for _, n := range r.Lost {
					lost += n
				}
				t.Logf("n%d: %d operations, %d lost races, %d stale, %d looks at held files, %d listings, longest %.0f ms (%s)", i+1, ops, lost, r.Stale, r.Held, r.Lists, r.Worst, r.From)
				if limit := machine.Bound(limit); r.Worst > ms(limit) {
					t.Errorf("n%d: %s took %.0f ms, want %.0f at most; with %s", i+1, r.From, r.Worst, ms(limit), machine)
				}
				if r.Stale > (ops+lost)/50 {
					t.Errorf("n%d: %d of %d operations met ESTALE", i+1, r.Stale, ops+lost)
				}
				if ops < 10 || lost < 20 || r.Lists == 0 {
					t.Errorf("n%d did too little: %+v", i+1, r)
				}
				held += r.Held
			}
			if held == 0 {
				t.Error("nobody looked at a file that he held")
			}
			p.healed(1, 30*time.Second)
			want := strings.Join(p.manifest(1, "/mnt/wp/names"), "\n")
			for i := 2; i <= 3; i++ {
				if got := strings.Join(p.manifest(i, "/mnt/wp/names"), "\n"); got != want {
					t.Errorf("n%d has\n%s\nn1 has\n%s", i, got, want)
				}
			}
			p.identical(1)
		})
	}
	p.sound()
}

// restart kills a daemon as kill -9 does, starts it again, and waits until its brick is in sync.
func (p *pool) restart(i int) {
	p.t.Helper()
	p.killDaemon(i)
	p.startDaemon(i)
	p.waitDaemon(i)
	p.healed(p.other(i), 30*time.Second)
}

// sound stops all daemons and checks each brick on its own.
func (p *pool) sound() {
	p.t.Helper()
	for i := range p.Hosts() {
		p.run(i+1, "umount", "/mnt/wp")
	}
	for i, d := range p.daemons {
		d.Signal(syscall.SIGTERM)
		if err := d.Wait(p.ctx(10 * time.Second)); err != nil {
			p.t.Errorf("the daemon of n%d, asked to end: %v", i+1, err)
		}
	}
	for i := range p.Hosts() {
		p.mortar(i+1, "brick", "check", brickDir)
	}
}
