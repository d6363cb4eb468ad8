package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mortar/test/cluster"
)

// mountsOf are the paths by which one process sees a directory through all mounts.
func (p *pool) mountsOf(path string) []string {
	var out []string
	for i := range p.Hosts() {
		out = append(out, p.outside(i+1, path))
	}
	return out
}

// A change acknowledged on one mount is seen on the others by the very next
// system call: names, absences, sizes, modes, contents, in every direction.
func TestCoherence(t *testing.T) {
	for _, opts := range []string{"", "locks=node"} {
		t.Run("mounted with "+opts, func(t *testing.T) {
			p := start(t, setup{mountOpts: opts})
			p.run(1, "mkdir", "/mnt/wp/coherence")
			var c struct {
				Rounds int
				Kinds  map[string]int
				Worst  float64 `json:"worst_ms"`
			}
			rounds := pick(2000, 10000)
			p.workload(0, 10*time.Minute, &c, append([]string{"coherence", "-rounds", fmt.Sprint(rounds)}, p.mountsOf("/mnt/wp/coherence")...)...)
			t.Logf("%d rounds, longest %.0f ms: %v", c.Rounds, c.Worst, c.Kinds)
			if c.Rounds != rounds {
				t.Errorf("%d rounds, want %d", c.Rounds, rounds)
			}
			p.identical(1)
		})
	}
}

// The same while the primary and a home replica die and return.
func TestCoherenceAcrossFailOver(t *testing.T) {
	p := start(t, setup{})
	p.run(1, "mkdir", "/mnt/wp/coherence")
	wait := p.startWorkload(0, 5*time.Minute, append([]string{"coherence", "-rounds", fmt.Sprint(pick(3000, 20000))}, p.mountsOf("/mnt/wp/coherence")...)...)
	for range pick(2, 10) {
		i := p.primary(1)
		p.killDaemon(i)
		p.within(10*time.Second, "another brick leads", func() error {
			st, err := p.status(p.other(i))
			if err == nil && (st.Sets[0].Primary == "" || st.Sets[0].Primary == fmt.Sprintf("n%d:%s", i, brickDir)) {
				err = fmt.Errorf("primary is %q", st.Sets[0].Primary)
			}
			return err
		})
		p.startDaemon(i)
		p.waitDaemon(i)
		p.healed(p.other(i), 30*time.Second)
	}
	var c struct{ Rounds int }
	if err := wait(&c); err != nil {
		t.Error(err)
	}
	p.identical(1)
}

// A machine makes files in a directory that the others know, names that are absent
// included, and is given its window for that: they see each file as soon as its maker does, and it
// sees what they make.
func TestDirectoryThatOthersKnow(t *testing.T) {
	p := start(t, setup{})
	m := p.mountsOf("/mnt/wp")
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	rng := rand.New(rand.NewPCG(1, 52))
	for round := range pick(60, 2000) {
		d := fmt.Sprintf("d%d", round)
		maker, writer, third := m[round%3], m[(round+1)%3], m[(round+2)%3]
		check(os.Mkdir(filepath.Join(maker, d), 0o755))
		check(os.WriteFile(filepath.Join(maker, d, "old"), nil, 0o644))
		name := func(i int) string { return filepath.Join(d, fmt.Sprint("f", i)) }
		x := filepath.Join(d, "x")
		for _, at := range m {
			for _, known := range []string{d, filepath.Join(d, "old")} {
				_, err := os.Lstat(filepath.Join(at, known))
				check(err)
			}
			for i := range 11 {
				if _, err := os.Lstat(filepath.Join(at, name(i))); !os.IsNotExist(err) {
					t.Fatalf("%s: %v", name(i), err)
				}
			}
			if _, err := os.Lstat(filepath.Join(at, x)); !os.IsNotExist(err) {
				t.Fatalf("%s: %v", x, err)
			}
		}
		n := 3 + rng.IntN(7)
		for i := range n {
			check(os.WriteFile(filepath.Join(writer, name(i)), make([]byte, i), 0o644))
		}
		// Not closed, perhaps not even made: but whoever looks sees it.
		f, err := os.Create(filepath.Join(writer, name(n)))
		check(err)
		if _, err := os.Lstat(filepath.Join(third, name(n))); err != nil {
			t.Fatalf("round %d: %s, which is open elsewhere: %v", round, name(n), err)
		}
		check(f.Close())
		switch rng.IntN(3) {
		case 0:
			check(os.Remove(filepath.Join(third, d, "old")))
			if _, err := os.Lstat(filepath.Join(writer, d, "old")); !os.IsNotExist(err) {
				t.Fatalf("round %d: what was removed elsewhere: %v", round, err)
			}
		case 1:
			f, err := os.OpenFile(filepath.Join(third, x), os.O_CREATE|os.O_EXCL, 0o600)
			check(err)
			check(f.Close())
			if f, err := os.OpenFile(filepath.Join(writer, x), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600); !os.IsExist(err) {
				t.Fatalf("round %d: what was made elsewhere is made again: %v, %v", round, f, err)
			}
		}
		for _, at := range []string{maker, third} {
			for i := range n {
				if st, err := os.Lstat(filepath.Join(at, name(i))); err != nil || st.Size() != int64(i) {
					t.Fatalf("round %d: %s, which was closed elsewhere: %v, %v", round, name(i), st, err)
				}
			}
		}
	}
	p.identical(1)
	check(p.daemons[0].Signal(syscall.SIGTERM))
	check(p.daemons[0].Wait(p.ctx(20 * time.Second)))
	if log := p.run(1, mortar, "brick", "dump", brickDir); strings.Count(log, "open-window") == 0 {
		t.Error("nobody was given the window of a directory: the test shows nothing")
	}
}

// Two mounts that have each other's new name cached as absent create at once.
func TestCreateRing(t *testing.T) {
	p := start(t, setup{})
	p.run(1, "mkdir", "/mnt/wp/ring")
	var r struct {
		Rounds int
		Worst  float64 `json:"worst_ms"`
	}
	machine := cluster.Share()
	p.workload(0, 5*time.Minute, &r, append([]string{"ring", "-rounds", fmt.Sprint(pick(300, 3000))}, p.mountsOf("/mnt/wp/ring")...)...)
	t.Logf("%d rounds, longest %.0f ms, with %s", r.Rounds, r.Worst, machine)
	if limit := machine.Bound(time.Second); r.Worst > ms(limit) {
		t.Errorf("making a name took %.0f ms, want %.0f at most", r.Worst, ms(limit))
	}
}

// A counter incremented under a lock from three mounts loses nothing, with
// read and write or through shared mappings.
func TestCounters(t *testing.T) {
	p := start(t, setup{})
	each := pick(200, 1000)
	for _, c := range [][]string{{"flock"}, {"fcntl"}, {"ofd"}, {"flock", "-mapped"}, {"fcntl", "-mapped"}} {
		lock := strings.Join(c, "")
		args := append([]string{"counter", "-file", "/mnt/wp/" + lock, "-rounds", fmt.Sprint(each), "-lock"}, c...)
		begin := time.Now()
		var waits []func(any) error
		for i := 1; i <= 3; i++ {
			waits = append(waits, p.startWorkload(i, 5*time.Minute, args...))
		}
		for _, wait := range waits {
			if err := wait(nil); err != nil {
				t.Error(err)
			}
		}
		t.Logf("%s: %d increments in %v", lock, 3*each, time.Since(begin))
		for i := 1; i <= 3; i++ {
			if got := strings.TrimSpace(p.run(i, "cat", "/mnt/wp/"+lock)); got != fmt.Sprint(3*each) {
				t.Errorf("%s: counted to %s on n%d, want %d", lock, got, i, 3*each)
			}
		}
	}
}

// A lock outlives its holder's machine by its lease, and not by more.
func TestLockOfADeadMachine(t *testing.T) {
	p := start(t, setup{})
	p.leadElsewhereThan(2)
	p.run(1, "touch", "/mnt/wp/lock")
	if _, err := p.Host(2).Spawn("holder", "flock", "/mnt/wp/lock", "sh", "-c", "echo held; sleep 1000"); err != nil {
		t.Fatal(err)
	}
	p.within(5*time.Second, "n2 holds the lock", func() error {
		if log := p.Host(2).Log("holder"); log != "held\n" {
			return fmt.Errorf("%q", log)
		}
		return nil
	})
	if _, err := p.Host(1).Run(p.ctx(patience), "flock", "-n", "/mnt/wp/lock", "true"); err == nil {
		t.Error("n1 got a lock that n2 holds")
	}
	// Fail-over keeps the lock.
	at := p.primary(1)
	p.killDaemon(at)
	p.startDaemon(at)
	p.waitDaemon(at)
	p.healed(1, 30*time.Second)
	if _, err := p.Host(1).Run(p.ctx(patience), "flock", "-n", "/mnt/wp/lock", "true"); err == nil {
		t.Error("n1 got, after a fail-over, a lock that n2 holds")
	}
	// And n3's mount stands still, while its daemon lives.
	still := p.gripLocks(3, 1)
	silent := time.Now()
	p.signalMount(3, syscall.SIGSTOP)
	if err := p.Host(2).KillAll(); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	p.run(1, "flock", "-w", "40", "/mnt/wp/lock", "true")
	took := time.Since(begin)
	t.Logf("the lock was free %v after its holder's machine died", took)
	if took < time.Second || took > 20*time.Second {
		t.Errorf("the lock was free after %v, want after the session's time of 10 s or so", took)
	}
	still.passOn(silent)
	p.signalMount(3, syscall.SIGCONT)
	still.areLost(1, 3)
	p.run(2, "umount", "/mnt/wp")
	p.startDaemon(2)
	p.waitDaemon(2)
	p.healed(1, 30*time.Second)
	// A holder that just dies lets go at once.
	holder, err := p.Host(3).Spawn("holder", "flock", "-o", "/mnt/wp/lock", "sleep", "1000")
	if err != nil {
		t.Fatal(err)
	}
	p.within(5*time.Second, "n3 holds the lock", func() error {
		if _, err := p.Host(1).Run(p.ctx(patience), "flock", "-n", "/mnt/wp/lock", "true"); err == nil {
			return fmt.Errorf("it is free")
		}
		return nil
	})
	for _, proc := range p.Host(3).Processes() {
		if proc.Name == "sleep" || proc.Name == "flock" {
			syscall.Kill(proc.Pid, syscall.SIGKILL)
		}
	}
	<-holder.Done()
	p.run(1, "flock", "-w", "5", "/mnt/wp/lock", "true")
}

// Records appended from three mounts are all there, whole and in order.
func TestAppend(t *testing.T) {
	p := start(t, setup{})
	each := fmt.Sprint(pick(1000, 10000))
	var waits []func(any) error
	for i := range 3 {
		waits = append(waits, p.startWorkload(i+1, 5*time.Minute, "append", "-file", "/mnt/wp/records", "-id", fmt.Sprint(i), "-n", each))
	}
	for _, wait := range waits {
		if err := wait(nil); err != nil {
			t.Error(err)
		}
	}
	for i := 1; i <= 3; i++ {
		p.workload(i, time.Minute, nil, "append", "-file", "/mnt/wp/records", "-check", "3", "-n", each)
	}
}

// Mounts create, rename and remove in one directory at full speed: no deadlock,
// no stall over the lease, the same listing on all.
func TestRace(t *testing.T) { race(t, pick(8*time.Second, time.Minute)) }

// The same with directories that are filled, and may be another's a moment later:
// no file that was opened fails to be written and closed.
func TestNamespace(t *testing.T) { race(t, pick(6*time.Second, time.Minute), "-deep", "-names", "6") }

func race(t *testing.T, duration time.Duration, args ...string) {
	p := start(t, setup{})
	p.run(1, "mkdir", "/mnt/wp/race")
	machine := cluster.Share()
	var waits []func(any) error
	for i := 1; i <= 3; i++ {
		waits = append(waits, p.startWorkload(i, duration+30*time.Second, append([]string{"race", "-dir", "/mnt/wp/race",
			"-duration", duration.String(), "-seed", fmt.Sprint(i)}, args...)...))
	}
	for i, wait := range waits {
		var r struct {
			Ops, Lost map[string]int
			Worst     float64 `json:"worst_ms"`
		}
		if err := wait(&r); err != nil {
			t.Error(err)
		}
		total := 0
		for _, n := range r.Ops {
			total += n
		}
		t.Logf("n%d: %d operations, longest %.0f ms; lost races %v; with %s", i+1, total, r.Worst, r.Lost, machine)
		if float64(total) < 100*machine.Given() {
			t.Errorf("n%d did %d operations only", i+1, total)
		}
		if limit := machine.Bound(1500 * time.Millisecond); r.Worst > ms(limit) {
			t.Errorf("n%d: an operation took %.0f ms, want %.0f at most", i+1, r.Worst, ms(limit))
		}
	}
	want := strings.Join(p.manifest(1, "/mnt/wp/race"), "\n")
	for i := 2; i <= 3; i++ {
		if got := strings.Join(p.manifest(i, "/mnt/wp/race"), "\n"); got != want {
			t.Errorf("n%d has\n%s\nn1 has\n%s", i, got, want)
		}
	}
	p.identical(1)
}

// lookBeforeClose does what git does: it looks at each file between the last write and close.
// What it saw is what is there, on all machines; and make finds every file newer than
// the one before.
func lookBeforeClose(p *pool) {
	p.t.Helper()
	own := "/mnt/wp/own"
	if err := os.Mkdir(p.outside(1, own), 0o755); err != nil {
		p.t.Fatal(err)
	}
	last := time.Time{}
	for i := range 60 {
		dir := []string{own, "/mnt/wp"}[i%2] // in one that this machine has made, and in one that others know
		path := fmt.Sprintf("%s/looked-at-%d", dir, i)
		f, err := os.OpenFile(p.outside(1, path), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o640)
		if err != nil {
			p.t.Fatal(err)
		}
		if _, err := f.Write(make([]byte, 1000*i)); err != nil {
			p.t.Fatal(err)
		}
		if i%3 == 0 {
			time.Sleep(time.Duration(i) * time.Millisecond) // some are sent by then
		}
		var told, is unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &told); err != nil {
			p.t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			p.t.Fatal(err)
		}
		for m := 1; m <= 3; m++ {
			if err := unix.Stat(p.outside(m, path), &is); err != nil {
				p.t.Fatal(err)
			}
			is.Dev = told.Dev
			if is != told {
				p.t.Errorf("%s: before it was closed\n%+v, on machine %d now\n%+v", path, told, m, is)
			}
		}
		at := time.Unix(is.Mtim.Unix())
		if !at.After(last) {
			p.t.Errorf("%s is of %v, the file that was made before it of %v", path, at, last)
		}
		if d := time.Since(at); d < -time.Millisecond || d > time.Minute {
			p.t.Errorf("%s is of %v, %v ago", path, at, d)
		}
		last = at
	}
}

// What programs may expect of files that are open while others remove them, and of
// those that never had a name.
func TestOpenAndRemoved(t *testing.T) {
	p := start(t, setup{})
	lookBeforeClose(p)
	p.run(1, "sh", "-c", "echo contents > /mnt/wp/file")
	reader, err := p.Host(2).Spawn("reader", "sh", "-c", "exec 3</mnt/wp/file; echo open; until [ -e /run/go ]; do sleep 0.05; done; cat <&3")
	if err != nil {
		t.Fatal(err)
	}
	p.within(5*time.Second, "the file is open on n2", func() error {
		if log := p.Host(2).Log("reader"); log != "open\n" {
			return fmt.Errorf("%q", log)
		}
		return nil
	})
	p.run(1, "rm", "/mnt/wp/file")
	p.run(3, "sh", "-c", "! test -e /mnt/wp/file")
	dir := p.outside(2, "/mnt/wp")
	inodes := func() uint64 { _, _, all, free := p.df(dir); return all - free }
	before := inodes()
	nameless := func(text string) *os.File {
		t.Helper()
		fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "a file without a name")
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
		return f
	}
	kept, gone := nameless("kept"), nameless("gone")
	defer kept.Close()
	at := p.primary(1) // and it lives through a fail-over
	p.killDaemon(at)
	p.startDaemon(at)
	p.waitDaemon(at)
	p.healed(1, 30*time.Second)
	p.run(2, "touch", "/run/go")
	if err := reader.Wait(p.ctx(20 * time.Second)); err != nil {
		t.Error(err)
	}
	if log := p.Host(2).Log("reader"); log != "open\ncontents\n" {
		t.Errorf("the removed file reads %q", log)
	}
	if _, err := kept.WriteString(" through a fail-over"); err != nil {
		t.Error(err)
	}
	if err := unix.Linkat(int(kept.Fd()), "", unix.AT_FDCWD, filepath.Join(dir, "linked"), unix.AT_EMPTY_PATH); err != nil {
		t.Error(err)
	}
	if out := p.run(3, "cat", "/mnt/wp/linked"); out != "kept through a fail-over" {
		t.Errorf("the file that was linked reads %q on another machine", out)
	}
	gone.Close()
	p.within(15*time.Second, "what nobody has open any more is gone", func() error {
		// The linked file stays, the removed one was still there before.
		if n := inodes(); n != before {
			return fmt.Errorf("%d inodes are in use, %d before", n, before)
		}
		return nil
	})
	p.identical(1)
}
