package e2e

import (
	"testing"
	"time"
)

// What clients on three mounts are told of registers, journals, locks and names
// is explained by one order of all their operations (package porcupine), in peace
// and while the primary is killed, a backup is cut off, and both return.
func TestHistory(t *testing.T) {
	p := start(t, setup{})
	p.run(1, "mkdir", "/mnt/wp/history")
	duration := pick(10*time.Second, 2*time.Minute)
	wait := p.startWorkload(0, duration+3*time.Minute, append([]string{"history", "-duration", duration.String()}, p.mountsOf("/mnt/wp/history")...)...)
	for range pick(1, 8) {
		p.restart(p.primary(1))
		i := p.other(p.primary(1))
		if err := p.Host(i).Unplug(); err != nil {
			t.Fatal(err)
		}
		p.within(10*time.Second, "the others go on", func() error {
			_, err := p.Host(p.primary(p.other(i))).Run(p.ctx(patience), "touch", "/mnt/wp/on")
			return err
		})
		if err := p.Host(i).Plug(); err != nil {
			t.Fatal(err)
		}
		p.healed(p.other(i), 30*time.Second)
	}
	var h struct {
		Ops   map[string]int
		Parts int
		Worst float64 `json:"worst_ms"`
	}
	if err := wait(&h); err != nil {
		t.Error(err)
	}
	t.Logf("%d objects, longest %.0f ms: %v", h.Parts, h.Worst, h.Ops)
	if h.Parts < 20 || h.Ops["read"] < 100 || h.Ops["look"] < 100 {
		t.Errorf("too little was judged")
	}
	p.identical(1)
}
