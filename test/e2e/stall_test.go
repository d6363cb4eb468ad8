package e2e

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"mortar/test/cluster"
)

// The longest time that a single operation of a writer and a reader takes while a
// fault happens on another machine, over many trials of each kind. It is a
// measurement and takes its time: bench/stall/run runs it and writes the report.
func TestStalls(t *testing.T) {
	trials, err := strconv.Atoi(os.Getenv("MORTAR_TEST_STALL"))
	if err != nil {
		t.Skip("SKIPPED: a measurement, which bench/stall/run makes (MORTAR_TEST_STALL is the number of trials)")
	}
	p := start(t, setup{disk: cluster.XFS, diskBytes: 2 << 30})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	restart := func(i int) { p.back(i) }
	kill := func(i int) { p.killDaemon(i) }
	signal := func(s syscall.Signal) func(int) { return func(i int) { must(p.daemons[i-1].Signal(s)) } }
	term := func(i int) { must(p.daemons[i-1].Signal(syscall.SIGTERM)); <-p.daemons[i-1].Done() }
	unplug, plug := func(i int) { must(p.Host(i).Unplug()) }, func(i int) { must(p.Host(i).Plug()) }
	drain := func(i int) { p.mortar(p.other(i), "peer", "drain", p.Host(i).Name) }
	undrain := func(i int) { p.mortar(p.other(i), "peer", "undrain", p.Host(i).Name) }
	var undo func()
	crawl := func(i int) {
		var err error
		undo, err = p.crawl(i, 1<<20)
		must(err)
	}
	const lets = 2500 * time.Millisecond // how long a silent one stays so: longer than its lease
	for _, c := range []struct {
		name    string
		primary bool
		off, on func(i int)
		silent  bool
		home    bool // the writer is at home on the machine itself
	}{
		{"kill -9 of a backup", false, kill, restart, false, false},
		{"kill -9 of the primary", true, kill, restart, false, false},
		{"kill -9 of all on a backup's machine", false, func(i int) { must(p.Host(i).KillAll()) }, func(i int) { p.run(i, "umount", "/mnt/wp"); p.back(i); p.mount(i) }, false, false},
		{"kill -9 of all on the primary's machine", true, func(i int) { must(p.Host(i).KillAll()) }, func(i int) { p.run(i, "umount", "/mnt/wp"); p.back(i); p.mount(i) }, false, false},
		{"cable of a backup", false, unplug, plug, true, false},
		{"cable of the primary", true, unplug, plug, true, false},
		{"SIGSTOP of a backup", false, signal(syscall.SIGSTOP), signal(syscall.SIGCONT), true, false},
		{"SIGSTOP of the primary", true, signal(syscall.SIGSTOP), signal(syscall.SIGCONT), true, false},
		{"SIGTERM of a backup", false, term, restart, false, false},
		{"SIGTERM of the primary", true, term, restart, false, false},
		{"SIGTERM of a backup, at home", false, term, restart, false, true},
		{"SIGTERM of the primary, at home", true, term, restart, false, true},
		{"drain of a backup's peer", false, drain, undrain, false, false},
		{"drain of the primary's peer", true, drain, undrain, false, false},
		{"drain of the primary's peer, at home", true, drain, undrain, false, true},
		{"a backup's disk hangs", false, func(i int) { p.run(i, "fsfreeze", "-f", "/bricks") }, func(i int) { p.run(i, "fsfreeze", "-u", "/bricks") }, true, false},
		{"a backup's disk takes 1 MB/s", false, crawl, func(int) { undo() }, true, false},
		{"the primary's disk takes 1 MB/s", true, crawl, func(int) { undo() }, true, false},
		{"the primary's disk hangs", true, func(i int) { p.run(i, "fsfreeze", "-f", "/bricks") }, func(i int) { p.run(i, "fsfreeze", "-u", "/bricks") }, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			p.as(t)
			var worst []float64
			for n := range trials {
				i := p.primary(1)
				writer := p.other(i)
				if !c.primary {
					i, writer = writer, i
					if n%2 == 1 { // the writer's own machine has the primary, or the other backup
						writer = p.other(i, writer)
					}
				}
				if c.home {
					writer = i
				}
				l := p.startLoadOn(writer, fmt.Sprintf("%s-%d", t.Name()[len("TestStalls/"):], n), 10*time.Second, "-fsync")
				c.off(i)
				begin := time.Now()
				l.goesOn(10 * time.Second)
				if c.silent {
					time.Sleep(lets - time.Since(begin))
				}
				c.on(i)
				p.healed(p.other(i), 60*time.Second)
				l.goesOn(10 * time.Second)
				worst = append(worst, l.end().Worst)
			}
			p.identical(1)
			slices.Sort(worst)
			fmt.Fprintf(os.Stdout, "STALL | %s | %d | %.0f | %.0f |\n", c.name, trials, worst[len(worst)/2], worst[len(worst)-1])
		})
	}
}
