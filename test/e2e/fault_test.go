package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mortar/test/cluster"
)

// A writer and a reader work on machine 1 while the others suffer. Nothing of
// that may reach them but a pause.

// stall is the longest pause that an application may see; the goal is 2 s.
const stall = 3 * time.Second

// recording is what the workload "record" reports.
type recording struct {
	Seconds float64
	Kinds   map[string]struct {
		Count   int
		P99     float64 `json:"p99_ms"`
		Max     float64 `json:"max_ms"`
		MaxFrom string  `json:"max_from"`
	}
	Errors  []string
	NErrors int     `json:"n_errors"`
	Worst   float64 `json:"worst_ms"`
}

// load is a recording in progress.
type load struct {
	p       *pool
	host    int
	name    string
	proc    *cluster.Process
	limit   time.Duration // of a single operation, on a machine with nothing else to do
	machine cluster.Shared
}

// startLoad begins to record on machine 1, in a directory of that name.
func (p *pool) startLoad(name string, limit time.Duration, flags ...string) *load {
	p.t.Helper()
	return p.startLoadOn(1, name, limit, flags...)
}

// startLoadOn begins to record on machine i, in a directory of that name.
func (p *pool) startLoadOn(i int, name string, limit time.Duration, flags ...string) *load {
	p.t.Helper()
	argv := append([]string{workload, "record", "-dir", "/mnt/wp/" + name, "-log", filepath.Join(p.Dir, name+".log")}, flags...)
	machine := cluster.Share()
	proc, err := p.Host(i).Spawn("record-"+name, argv...)
	if err != nil {
		p.t.Fatal(err)
	}
	l := &load{p, i, name, proc, limit, machine}
	p.within(15*time.Second, "the writer works", func() error {
		select {
		case <-proc.Done():
			p.t.Fatalf("the writer ended:\n%s", l.output())
		default:
		}
		if n := strings.Count(readFile(filepath.Join(p.Dir, name+".log")), `"ack":true`); n < 50 {
			return fmt.Errorf("%d steps acknowledged", n)
		}
		return nil
	})
	return l
}

func (l *load) output() string { return l.p.Host(l.host).Log("record-" + l.name) }

// acked is how many steps were acknowledged so far.
func (l *load) acked() int {
	return strings.Count(readFile(filepath.Join(l.p.Dir, l.name+".log")), `"ack":true`)
}

// goesOn waits until more steps are acknowledged.
func (l *load) goesOn(limit time.Duration) time.Duration {
	l.p.t.Helper()
	before := l.acked()
	return l.p.within(limit, "the writer goes on", func() error {
		if n := l.acked(); n < before+20 {
			return fmt.Errorf("%d steps acknowledged, %d before", n, before)
		}
		return nil
	})
}

// end stops the recording; no operation may have failed or taken too long.
func (l *load) end() recording {
	l.p.t.Helper()
	l.proc.Signal(syscall.SIGTERM)
	err := l.proc.Wait(l.p.ctx(30 * time.Second))
	out := l.output()
	var r recording
	if i := strings.Index(out, "{"); i < 0 || json.NewDecoder(strings.NewReader(out[i:])).Decode(&r) != nil {
		l.p.t.Fatalf("the writer said nothing (%v):\n%s", err, out)
	}
	worst, kind := 0.0, ""
	for k, h := range r.Kinds {
		if h.Max > worst {
			worst, kind = h.Max, k+" at "+h.MaxFrom
		}
	}
	l.p.t.Logf("%s: %d steps in %.1f s, longest %.0f ms (%s), %d errors; with %s", l.name, l.acked(), r.Seconds, worst, kind, r.NErrors, l.machine)
	if longest := time.Duration(worst * float64(time.Millisecond)); longest > l.machine.Bound(l.limit) {
		l.p.t.Errorf("the application on machine %d saw an operation take %v (%s), want at most %v; with %s", l.host, longest, kind, l.limit, l.machine)
	}
	if err != nil {
		l.p.t.Errorf("the application on machine %d saw trouble: %v\n%s", l.host, err, out[strings.LastIndex(out, "}")+1:])
	}
	return r
}

// check demands that nothing acknowledged is missing or different on any of the
// mounts, and that the bricks are equal.
func (l *load) check(mounts ...int) {
	l.p.t.Helper()
	for _, i := range mounts {
		var v struct{ Steps, Files int }
		l.p.workload(i, 2*time.Minute, &v, "verify", "-dir", "/mnt/wp/"+l.name, "-log", filepath.Join(l.p.Dir, l.name+".log"))
		if v.Steps < 50 {
			l.p.t.Errorf("verified %d steps only", v.Steps)
		}
	}
	l.p.identical(mounts[0])
}

// killDaemon ends a daemon as kill -9 does.
func (p *pool) killDaemon(i int) {
	p.daemons[i-1].Kill()
}

// other is a host that is none of these.
func (p *pool) other(not ...int) int {
	for i := 1; ; i++ {
		if !slices.Contains(not, i) {
			return i
		}
	}
}

// leadElsewhereThan sees to it that none of these hosts leads, and returns who does.
func (p *pool) leadElsewhereThan(hosts ...int) int {
	p.t.Helper()
	for {
		at := p.primary(1)
		if !slices.Contains(hosts, at) {
			return at
		}
		p.killDaemon(at)
		p.within(10*time.Second, "another brick leads", func() error {
			st, err := p.status(p.other(at))
			if err == nil && (st.Sets[0].Primary == "" || st.Sets[0].Primary == fmt.Sprintf("n%d:%s", at, brickDir)) {
				err = fmt.Errorf("primary is %q", st.Sets[0].Primary)
			}
			return err
		})
		p.startDaemon(at)
		p.waitDaemon(at)
		p.healed(1, 30*time.Second)
	}
}

// Kill -9 of one daemon after the other: the primary's on the writer's own
// machine or elsewhere, a backup's on the writer's own machine or elsewhere.
func TestDaemonsKilled(t *testing.T) {
	p := start(t, setup{})
	for _, c := range []struct {
		name string
		whom func() int
	}{
		{"the primary's at home", func() int { return p.leadElsewhereThan(2, 3) }},
		{"the primary's elsewhere", func() int { return p.leadElsewhereThan(1) }},
		{"a backup's elsewhere", func() int { return p.other(1, p.primary(1)) }},
		{"a backup's at home", func() int { p.leadElsewhereThan(1); return 1 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			p.as(t)
			i := c.whom()
			l := p.startLoad(strings.ReplaceAll(c.name, " ", "-"), stall)
			p.killDaemon(i)
			l.goesOn(10 * time.Second)
			p.startDaemon(i)
			p.waitDaemon(i)
			p.healed(p.other(i), 30*time.Second)
			l.goesOn(10 * time.Second)
			l.end()
			l.check(1, 2, 3)
		})
	}
}

// Every process of a machine dies at once, its mount too.
func TestMachineKilled(t *testing.T) {
	p := start(t, setup{})
	for _, role := range []string{"backup", "primary"} {
		t.Run(role, func(t *testing.T) {
			p.as(t)
			i := p.leadElsewhereThan(1)
			if role == "backup" {
				i = p.other(1, i)
			}
			l := p.startLoad("machine-"+role, stall)
			if err := p.Host(i).KillAll(); err != nil {
				t.Fatal(err)
			}
			l.goesOn(10 * time.Second)
			p.run(i, "umount", "/mnt/wp")
			p.startDaemon(i)
			p.waitDaemon(i)
			p.mount(i)
			p.healed(1, 30*time.Second)
			l.goesOn(10 * time.Second)
			l.end()
			l.check(1, 2, 3)
		})
	}
}

// A machine that is silent, and one that comes back after it was silent and
// does not know.
func TestSilence(t *testing.T) {
	p := start(t, setup{})
	must := func(err error) {
		p.t.Helper()
		if err != nil {
			p.t.Fatal(err)
		}
	}
	silence := pick(6*time.Second, time.Minute)
	for _, c := range []struct {
		name string
		off  func(*cluster.Host, *cluster.Process)
		on   func(*cluster.Host, *cluster.Process)
	}{
		{"cable pulled",
			func(h *cluster.Host, _ *cluster.Process) { must(h.Unplug()) },
			func(h *cluster.Host, _ *cluster.Process) { must(h.Plug()) }},
		{"packets dropped",
			func(h *cluster.Host, _ *cluster.Process) { must(h.Isolate()) },
			func(*cluster.Host, *cluster.Process) { must(p.MendNetwork()) }},
		{"daemon stopped",
			func(_ *cluster.Host, d *cluster.Process) { d.Signal(syscall.SIGSTOP) },
			func(_ *cluster.Host, d *cluster.Process) { d.Signal(syscall.SIGCONT) }},
		{"deaf",
			func(h *cluster.Host, _ *cluster.Process) { must(h.Deafen()) },
			func(*cluster.Host, *cluster.Process) { must(p.MendNetwork()) }},
		{"mute",
			func(h *cluster.Host, _ *cluster.Process) { must(h.Mute()) },
			func(*cluster.Host, *cluster.Process) { must(p.MendNetwork()) }},
	} {
		for _, role := range []string{"backup", "primary"} {
			t.Run(c.name+", "+role, func(t *testing.T) {
				p.as(t)
				i := p.leadElsewhereThan(1)
				if role == "backup" {
					i = p.other(1, i)
				}
				l := p.startLoad(strings.NewReplacer(" ", "-", ",", "").Replace(c.name+"-"+role), stall)
				c.off(p.Host(i), p.daemons[i-1])
				begin := time.Now()
				l.goesOn(10 * time.Second)
				if role == "primary" { // the writer may have had its steps answered just before
					p.within(10*time.Second, "the silent machine does not lead", func() error {
						if p.primary(1) == i {
							return errors.New("it does")
						}
						return nil
					})
				}
				time.Sleep(silence - time.Since(begin)) // the fault's length is the test's subject
				if n, err := p.pending(1); n == 0 && err == nil {
					t.Error("heal info says that nothing is pending while a brick is away")
				}
				c.on(p.Host(i), p.daemons[i-1])
				p.healed(1, 30*time.Second)
				l.goesOn(10 * time.Second)
				l.end()
				l.check(1, 2, 3)
			})
		}
	}
}

// The writer's own machine is cut off: it waits, without an error, and goes on.
func TestWriterCutOff(t *testing.T) {
	p := start(t, setup{})
	cut := pick(5*time.Second, time.Minute)
	for _, at := range []string{"home is a backup", "home leads"} {
		t.Run(at, func(t *testing.T) {
			p.as(t)
			if at == "home leads" {
				p.leadElsewhereThan(2, 3)
			} else {
				p.leadElsewhereThan(1)
			}
			l := p.startLoad(strings.ReplaceAll("cut off "+at, " ", "-"), time.Hour) // judged below
			begin, machine := time.Now(), cluster.Share()
			if err := p.Host(1).Unplug(); err != nil {
				t.Fatal(err)
			}
			p.within(10*time.Second, "the other two go on", func() error {
				st, err := p.status(2)
				if err == nil && (st.Sets[0].Primary == "n1:"+brickDir || st.Sets[0].InSync != 2 || !st.Sets[0].Writable) {
					err = fmt.Errorf("%+v", st.Sets[0])
				}
				return err
			})
			p.run(2, "sh", "-c", "echo meanwhile > /mnt/wp/meanwhile")
			time.Sleep(cut) // the fault's length is the test's subject
			if err := p.Host(1).Plug(); err != nil {
				t.Fatal(err)
			}
			away := time.Since(begin)
			l.goesOn(stall + 5*time.Second)
			if got := p.run(1, "cat", "/mnt/wp/meanwhile"); got != "meanwhile\n" {
				t.Errorf("what was written meanwhile reads %q on the machine that was cut off", got)
			}
			p.healed(1, 30*time.Second)
			if worst := time.Duration(l.end().Worst * float64(time.Millisecond)); worst > away+machine.Bound(stall) {
				t.Errorf("the longest operation took %v, and the machine was cut off for %v; with %s", worst, away, machine)
			}
			l.check(1, 2, 3)
		})
	}
}

// All daemons die at once and are started again.
func TestAllDaemonsKilled(t *testing.T) {
	p := start(t, setup{})
	const back = 10 * time.Second
	for round := range pick(1, 5) {
		l := p.startLoad(fmt.Sprintf("all-%d", round), back+stall, "-fsync")
		for _, d := range p.daemons {
			d.Signal(syscall.SIGKILL)
		}
		for _, d := range p.daemons {
			<-d.Done()
		}
		begin := time.Now()
		for i := 1; i <= 3; i++ {
			p.startDaemon(i)
		}
		l.goesOn(back)
		t.Logf("back after %v", time.Since(begin))
		p.healed(1, 30*time.Second)
		l.end()
		l.check(1, 2, 3)
	}
}

// The rack's power goes: every machine loses what its disk had not written out,
// and nothing that was fsynced is lost.
func TestPowerCut(t *testing.T) {
	p := start(t, setup{disk: cluster.XFS, diskBytes: 2 << 30, stateDir: "/bricks/state"})
	for round := range pick(2, 10) {
		l := p.startLoad(fmt.Sprintf("power-%d", round), stall, "-fsync", "-pace", "100us", "-writers", "4")
		l.goesOn(10 * time.Second)
		var wg sync.WaitGroup
		errs := make([]error, 3)
		for i, h := range p.Hosts() {
			wg.Go(func() { errs[i] = h.CutPower() })
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
		for i, h := range p.Hosts() {
			p.run(i+1, "umount", "/mnt/wp")
			if err := h.MountDisk(); err != nil {
				t.Fatal(err)
			}
			p.startDaemon(i + 1)
		}
		for i := range p.Hosts() {
			p.waitDaemon(i + 1)
			p.within(10*time.Second, "the daemon knows the volume", func() error {
				_, err := p.try(i+1, "volume", "info", "wp")
				return err
			})
			p.mount(i + 1)
		}
		p.healed(1, 30*time.Second)
		l.check(1, 2, 3)
	}
}

// A mount that is asked for while its daemon has only just been started, and the
// pool with it, waits; as it must at boot.
func TestMountAtBoot(t *testing.T) {
	p := start(t, setup{mounts: -1, disk: cluster.XFS, diskBytes: 1 << 30, stateDir: "/bricks/state"})
	for _, h := range p.Hosts() {
		if err := h.CutPower(); err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range p.Hosts() {
		if err := h.MountDisk(); err != nil {
			t.Fatal(err)
		}
	}
	var mounts []func() error
	for i := range p.Hosts() {
		p.startDaemon(i + 1)
		p.run(i+1, "mkdir", "-p", "/mnt/wp")
		mounts = append(mounts, p.async(i+1, time.Minute, mortar, "mount", p.Host(i+1).Name+":/wp", "/mnt/wp"))
	}
	begin := time.Now()
	for _, wait := range mounts {
		if err := wait(); err != nil {
			t.Error(err)
		}
	}
	t.Logf("mounted %v after the daemons were started", time.Since(begin))
}

// As long as a mount is being made, its process is in the group of whoever asked for it: where systemd mounts what somebody has
// looked at (x-systemd.automount), all others wait for the mount when they look at its directory, and it would
// wait for itself. Then it has a session of its own.
func TestMountsInTheGroupOfWhoAsks(t *testing.T) {
	p := start(t, setup{hosts: 2, mounts: -1})
	p.killDaemon(1) // without its vote a mount waits
	p.run(2, "mkdir", "-p", "/mnt/wp")
	done := p.async(2, time.Minute, mortar, "mount", "n2:/wp", "/mnt/wp")
	mounts := func() (lines []string) {
		return strings.Split(strings.TrimSpace(p.run(2, "sh", "-c", "ps -ww -eo pid,pgid,sid,args | grep '[0-9] [^ ]*/mortar mount n2' || true")), "\n")
	}
	p.within(20*time.Second, "two processes in one group", func() error {
		all := mounts()
		if len(all) != 2 {
			return fmt.Errorf("%q", all)
		}
		a, b := strings.Fields(all[0]), strings.Fields(all[1])
		if a[1] != b[1] || a[2] != b[2] || a[0] == b[0] {
			return fmt.Errorf("%q", all)
		}
		return nil
	})
	p.back(1)
	if err := done(); err != nil {
		t.Fatal(err)
	}
	if all := mounts(); len(all) != 1 {
		t.Errorf("%q", all)
	} else if f := strings.Fields(all[0]); f[0] != f[1] || f[0] != f[2] {
		t.Errorf("it has no session of its own: %q", all)
	}
}

// Daemons that end as asked (SIGTERM), one after the other, cost next to nothing.
func TestRollingRestart(t *testing.T) {
	p := start(t, setup{})
	l := p.startLoad("rolling", time.Second)
	for i := 1; i <= 3; i++ {
		p.daemons[i-1].Signal(syscall.SIGTERM)
		if err := p.daemons[i-1].Wait(p.ctx(10 * time.Second)); err != nil {
			t.Errorf("n%d's daemon: %v", i, err)
		}
		l.goesOn(10 * time.Second)
		p.startDaemon(i)
		p.waitDaemon(i)
		p.healed(p.other(i), 30*time.Second)
	}
	l.end()
	l.check(1, 2, 3)
}

// What a machine missed comes back to it quickly, and heal info tells the truth
// all the while.
func TestHeal(t *testing.T) {
	p := start(t, setup{})
	for _, c := range []struct {
		name  string
		write []string
		limit time.Duration
	}{
		{"10,000 files of 4 KiB", []string{workload, "files", "-dir", "/mnt/wp/many", "-n", "10000"}, 15 * time.Second},
		{"one large file", []string{"dd", "if=/dev/urandom", "of=/mnt/wp/large", "bs=1M", "count=" + pick("256", "1024"), "conv=fsync"}, 10 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			p.as(t)
			p.leadElsewhereThan(3)
			p.killDaemon(3)
			if _, err := p.Host(1).Run(p.ctx(5*time.Minute), c.write...); err != nil {
				t.Fatal(err)
			}
			if n, err := p.pending(1); n == 0 && err == nil {
				t.Error("heal info says that nothing is pending while a brick is away")
			}
			p.startDaemon(3)
			p.waitDaemon(3)
			begin, machine := time.Now(), cluster.Share()
			var last int64 = -1
			for done := false; !done; {
				var info struct {
					Pending int64
					Bricks  []struct {
						Name    string
						InSync  bool `json:"in_sync"`
						Entries int64
						Heal    *struct {
							Percent, Rate float64
							ETASeconds    float64 `json:"eta_seconds"`
						}
					}
				}
				p.json(&info, 1, "volume", "heal", "wp", "info", "--json")
				done = true
				for _, b := range info.Bricks {
					done = done && b.InSync
					if h := b.Heal; h != nil && (h.Percent < 0 || h.Percent > 100 || h.Rate < 0 || h.ETASeconds < -1) {
						t.Errorf("heal info of %s: %+v", b.Name, *h)
					}
				}
				if done != (info.Pending == 0) {
					t.Errorf("heal info says %d pending, and of the bricks %+v", info.Pending, info.Bricks)
				}
				last = info.Pending
				if time.Since(begin) > machine.Bound(2*c.limit+30*time.Second) {
					t.Fatalf("not healed after %v: %d pending", time.Since(begin), last)
				}
			}
			took := time.Since(begin)
			t.Logf("healed in %v, with %s", took, machine)
			if took > machine.Bound(c.limit) {
				t.Errorf("the heal took %v, want less than %v; with %s", took, c.limit, machine)
			}
			p.identical(2)
		})
	}
}

// A brick that lost everything is made anew from the others.
func TestHealOfAnEmptyBrick(t *testing.T) {
	p := start(t, setup{})
	p.leadElsewhereThan(3)
	p.run(1, workload, "files", "-dir", "/mnt/wp/many", "-n", "2000")
	p.run(1, "sh", "-c", "head -c 50000000 /dev/urandom > /mnt/wp/large; truncate -s 1G /mnt/wp/sparse")
	want := p.manifest(1, "/mnt/wp")
	p.run(3, "umount", "/mnt/wp")
	p.killDaemon(3)
	// An in-sync set of two goes on; n3's log is too old in the end.
	p.run(1, "sh", "-c", "rm -r /mnt/wp/many/1*; echo more > /mnt/wp/more")
	p.run(3, "sh", "-c", "rm -rf "+brickDir+"/.mortar/log "+brickDir+"/.mortar/meta "+brickDir+"/.mortar/data")
	p.startDaemon(3)
	p.waitDaemon(3)
	p.healed(1, time.Minute)
	p.identical(1)
	p.mount(3)
	if got := p.manifest(3, "/mnt/wp"); len(got) >= len(want) || strings.Join(got, "\n") != strings.Join(p.manifest(1, "/mnt/wp"), "\n") {
		t.Error("the tree on n3 is not that of n1")
	}
}

// Two of three machines are away: nothing is written, nothing is lost, and
// whoever waits goes on when one returns.
func TestTwoOfThreeAway(t *testing.T) {
	p := start(t, setup{})
	l := p.startLoad("alone", pick(20*time.Second, time.Minute))
	for _, i := range []int{2, 3} {
		if err := p.Host(i).Unplug(); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(5 * time.Second) // the fault's length is the test's subject
	if err := p.Host(3).Plug(); err != nil {
		t.Fatal(err)
	}
	l.goesOn(15 * time.Second)
	if err := p.Host(2).Plug(); err != nil {
		t.Fatal(err)
	}
	p.healed(1, 30*time.Second)
	l.end()
	l.check(1, 2, 3)
}

// W2, step 4: of five machines two may die and nothing is felt; of four that died
// the last one says what it refuses and why, harms nothing, and all is well when
// they are back.
func TestFourOfFiveDie(t *testing.T) {
	p := start(t, setup{hosts: 5})
	kill := func(hosts ...int) {
		t.Helper()
		for _, i := range hosts {
			if err := p.Host(i).KillAll(); err != nil {
				t.Fatal(err)
			}
		}
	}
	const away = 30 * time.Second
	l := p.startLoad("five", away)
	kill(5, 4)
	l.goesOn(10 * time.Second)
	p.within(10*time.Second, "the three that are left agree", func() error {
		st, err := p.status(1)
		if err == nil && (st.Sets[0].InSync != 3 || !st.Sets[0].Writable) {
			err = fmt.Errorf("%+v", st.Sets[0])
		}
		return err
	})
	if got := p.run(3, "sh", "-c", "echo three > /mnt/wp/three; cat /mnt/wp/three"); got != "three\n" {
		t.Errorf("n3 reads %q", got)
	}
	kill(3, 2)
	p.within(10*time.Second, "the last machine says that it cannot go on", func() error {
		r, err := p.try(1, "volume", "status", "wp")
		for _, part := range []string{"no quorum", "3 of its 5 voting peers", "n2:" + brickDir, "n3:" + brickDir, "reads and writes wait"} {
			if text := r.Stdout + r.Stderr; !strings.Contains(text, part) {
				err = errors.Join(err, fmt.Errorf("volume status does not speak of %q:\n%s", part, text))
			}
		}
		return err
	})
	p.refuse(1, []string{"volume", "set", "wp", "cache-timeout", "30"}, "Quorum not met", "3 of its 5 voting peer(s) (n1, n2, n3, n4, n5)")
	p.refuse(1, []string{"volume", "create", "more", "n1:/bricks/more"}, "Quorum not met")
	if got := p.mortar(1, "volume", "info", "wp"); !strings.Contains(got, "Number of Bricks: 1 x 5 = 5") { // what it knows it tells
		t.Errorf("volume info:\n%s", got)
	}
	// Nothing is acknowledged that could be lost; who waits can be killed.
	before := l.acked()
	if r, err := p.Host(1).Run(p.ctx(patience), "timeout", "-s", "KILL", "2", "sh", "-c", "echo x > /mnt/wp/waits"); err == nil || r.Code != 137 && r.Code != -1 {
		t.Errorf("a write on the last machine: %+v, %v; want it to wait", r, err)
	}
	if n := l.acked(); n != before {
		t.Errorf("%d steps were acknowledged by the last machine alone", n-before)
	}
	for _, i := range []int{2, 3, 4, 5} {
		p.run(i, "umount", "/mnt/wp")
		p.startDaemon(i)
	}
	for _, i := range []int{2, 3, 4, 5} {
		p.waitDaemon(i)
		p.mount(i)
	}
	l.goesOn(10 * time.Second)
	p.healed(1, 30*time.Second)
	l.end()
	l.check(1, 2, 3, 4, 5)
}
