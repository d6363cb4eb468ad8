package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// histories are clients on all machines, one on each: what they are told of registers, journals, locks and
// names has to have an order.
//
// One client on each machine: others on the machine of a change that is about to be
// acknowledged can see the state before it (doc/known-gaps.md).
type histories struct {
	p     *pool
	keep  string // for those that have no order
	cmd   *exec.Cmd
	out   strings.Builder
	ended chan error
}

type history struct {
	Ops   map[string]int
	Parts int
	Lost  int
	Worst float64 `json:"worst_ms"`
}

// startHistories begins, in a directory of that name.
func (p *pool) startHistories(name string, flags ...string) *histories {
	p.t.Helper()
	p.run(1, "mkdir", "/mnt/wp/"+name)
	h := &histories{p: p, keep: p.t.ArtifactDir(), ended: make(chan error, 1)}
	args := append([]string{"history", "-clients", "1", "-duration", "24h", "-keep", h.keep}, flags...)
	h.cmd = exec.Command(workload, append(args, p.mountsOf("/mnt/wp/"+name)...)...)
	h.cmd.Stdout, h.cmd.Stderr, h.cmd.WaitDelay = &h.out, os.Stderr, time.Second
	if err := h.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	go func() { h.ended <- h.cmd.Wait() }()
	p.t.Cleanup(func() { h.cmd.Process.Kill() })
	return h
}

// end has them stop, and be judged.
func (h *histories) end() (v history) {
	h.p.t.Helper()
	h.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-h.ended:
		if uerr := json.Unmarshal([]byte(h.out.String()), &v); err != nil || uerr != nil {
			h.p.t.Errorf("the histories: %v, %v (they are in %s)\n%s", err, uerr, h.keep, h.out.String())
		}
	case <-time.After(3 * time.Minute):
		h.p.t.Fatal("the histories do not end")
	}
	h.p.t.Logf("%d objects, longest %.0f ms: %v", v.Parts, v.Worst, v.Ops)
	return v
}

// What clients on all machines are told of registers, journals, locks and names has
// an order: in peace, while daemons are killed, and while one machine after the other is upgraded,
// first its daemon, then its mount.
func TestHistories(t *testing.T) {
	p := start(t, setup{})
	atLeast := pick(2*time.Second, 30*time.Minute)
	next := 0
	for _, c := range []struct {
		name  string
		turns int // at least
		turn  func()
	}{
		{"in peace", 1, func() { time.Sleep(atLeast) }}, // to be looked at for that long is the test
		{"while daemons are killed", 1, func() {
			i := p.primary(1)
			p.killDaemon(i)
			p.startDaemon(i)
			p.waitDaemon(i)
			p.healed(p.other(i), 30*time.Second)
		}},
		{"during a rolling upgrade", 3, func() {
			i := next%3 + 1
			next++
			p.daemons[i-1].Signal(syscall.SIGTERM)
			if err := p.daemons[i-1].Wait(p.ctx(20 * time.Second)); err != nil {
				p.t.Errorf("n%d's daemon, asked to end: %v", i, err)
			}
			p.startDaemon(i)
			p.waitDaemon(i)
			if out := p.run(i, mortar, "mount", "--upgrade", "/mnt/wp"); !strings.Contains(out, "is served by") {
				p.t.Errorf("the upgrade of n%d's mount: %s", i, out)
			}
			p.healed(p.other(i), 30*time.Second)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p.as(t)
			h := p.startHistories(strings.ReplaceAll(c.name, " ", "-"), "-pace", "300us")
			begin := time.Now()
			for n := 0; n < c.turns || time.Since(begin) < atLeast; n++ {
				c.turn()
			}
			if v := h.end(); v.Parts == 0 || v.Ops["read"] == 0 {
				t.Errorf("there is next to no history: %+v", v)
			}
		})
	}
	p.identical(1)
}
