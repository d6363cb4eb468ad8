package e2e

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

var (
	chanceFor  = flag.Duration("chance.for", time.Hour, "how long TestChance runs")
	chanceSeed = flag.Uint64("chance.seed", 1, "which faults TestChance makes")
)

// An hour of faults that chance chooses, of one machine or two or all, one after the other and
// some at once, while clients on all machines read and change registers, journals, locks
// and names. What they were told has an order; nobody saw an error; nothing leaks; in
// the end the replicas are identical, and each brick's directory is in order.
//
// A full disk is not among them: it is an error that applications see (TestFullDisk). No fault
// lasts for as long as a session's locks do.
func TestChance(t *testing.T) {
	if !long {
		t.Skip("SKIPPED: it takes an hour, or -chance.for; MORTAR_TEST_LONG=1 runs it")
	}
	// Two machines of three may suffer at once, and what is left goes on.
	p := start(t, setup{options: []string{"min-in-sync", "1"}})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	rng := rand.New(rand.NewPCG(*chanceSeed, 0))
	signal := func(s syscall.Signal) func(int) { return func(i int) { must(p.daemons[i-1].Signal(s)) } }
	mend := func(int) { must(p.MendNetwork()) }
	// mounts are the processes of a machine's mount.
	mounts := func(i int) (pids []int) {
		for _, proc := range p.Host(i).Processes() {
			argv := strings.Split(readFile(fmt.Sprintf("/proc/%d/cmdline", proc.Pid)), "\x00")
			if proc.Name == "mortar" && len(argv) > 1 && argv[1] != "server" {
				pids = append(pids, proc.Pid)
			}
		}
		return pids
	}
	mount := func(s syscall.Signal) func(int) {
		return func(i int) {
			for _, pid := range mounts(i) {
				must(syscall.Kill(pid, s))
			}
		}
	}
	descriptors := func(i int) (n int) {
		for _, pid := range mounts(i) {
			all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
			must(err)
			n += len(all)
		}
		return n
	}
	unplug, plug := func(i int) { must(p.Host(i).Unplug()) }, func(i int) { must(p.Host(i).Plug()) }
	faults := []struct {
		name    string
		off, on func(i int)
	}{
		{"kill -9", func(i int) { p.killDaemon(i) }, func(i int) { p.back(i) }},
		{"kill -9, back at once", func(i int) { p.killDaemon(i); p.startDaemon(i) }, func(i int) { p.waitDaemon(i) }},
		{"SIGTERM", func(i int) { signal(syscall.SIGTERM)(i); <-p.daemons[i-1].Done() }, func(i int) { p.back(i) }},
		{"SIGSTOP", signal(syscall.SIGSTOP), signal(syscall.SIGCONT)},
		{"SIGSTOP of the mount", mount(syscall.SIGSTOP), mount(syscall.SIGCONT)},
		{"cable", unplug, plug},
		{"deaf", func(i int) { must(p.Host(i).Deafen()) }, mend},
		{"mute", func(i int) { must(p.Host(i).Mute()) }, mend},
		{"one pair is cut", func(i int) { must(p.Host(i).Part(p.Host(i%3 + 1))) }, mend},
		{"flapping", func(i int) {
			for range 5 {
				unplug(i)
				time.Sleep(time.Duration(rng.IntN(300)) * time.Millisecond)
				plug(i)
				time.Sleep(time.Duration(rng.IntN(300)) * time.Millisecond)
			}
		}, func(int) {}},
	}
	p.run(1, "mkdir", "/mnt/wp/history")
	keep := t.ArtifactDir()
	open := []int{descriptors(1), descriptors(2), descriptors(3)}
	begin := time.Now()
	args := []string{"history", "-clients", "1", "-pace", "2ms", "-seed", fmt.Sprint(*chanceSeed), "-duration", chanceFor.String(), "-keep", keep}
	wait := p.startWorkload(0, *chanceFor+time.Hour, append(args, p.mountsOf("/mnt/wp/history")...)...)
	made := map[string]int{}
	for n := 1; time.Since(begin) < *chanceFor; n++ {
		f := faults[rng.IntN(len(faults))]
		victims := rng.Perm(3)[:[]int{1, 1, 1, 1, 1, 1, 2, 2, 3, 1}[rng.IntN(10)]]
		hold := time.Duration(rng.IntN([]int{200, 1000, 2000, 5000}[rng.IntN(4)])) * time.Millisecond
		t.Logf("%v: %s of %v for %v", time.Since(begin).Round(time.Millisecond), f.name, victims, hold)
		made[f.name]++
		for _, v := range victims {
			f.off(v + 1)
		}
		time.Sleep(hold) // the fault's length is the test's subject
		for _, v := range victims {
			f.on(v + 1)
		}
		for i := 1; i <= 3; i++ { // each session lives, before it suffers again
			p.within(30*time.Second, fmt.Sprintf("n%d goes on", i), func() error {
				_, err := p.Host(i).Run(p.ctx(20*time.Second), "sh", "-c", fmt.Sprintf("echo %d > /mnt/wp/alive-%d", n, i))
				return err
			})
		}
		if rng.IntN(3) > 0 {
			p.healed(1+rng.IntN(3), 60*time.Second)
		}
	}
	p.healed(1, 60*time.Second)
	var h struct {
		Ops   map[string]int
		Parts int
		Worst float64 `json:"worst_ms"`
	}
	if err := wait(&h); err != nil {
		t.Errorf("%v\n(the histories are in %s)", err, keep)
	}
	t.Logf("%v of faults %v: %d objects, longest operation %.0f ms: %v", time.Since(begin).Round(time.Second), made, h.Parts, h.Worst, h.Ops)
	p.identical(1)
	for i := 1; i <= 3; i++ {
		for _, proc := range p.Host(i).Processes() {
			if proc.Name == "mortar" {
				t.Logf("n%d: %d MiB, process %d", i, proc.RSS>>20, proc.Pid)
			}
		}
		// Connections come and go by one or two; a leak has had hundreds of occasions.
		if n := descriptors(i); n > open[i-1]+10 {
			t.Errorf("n%d: the mount has %d descriptors open, and had %d in the beginning", i, n, open[i-1])
		}
	}
	for i := range 3 {
		p.run(i+1, "umount", "/mnt/wp")
	}
	for i, d := range p.daemons {
		must(d.Signal(syscall.SIGTERM))
		must(d.Wait(p.ctx(20 * time.Second)))
		t.Logf("n%d: %s", i+1, p.mortar(i+1, "brick", "check", brickDir))
	}
}
