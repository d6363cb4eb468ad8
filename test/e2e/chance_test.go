package e2e

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"mortar/test/cluster"
)

var (
	chanceFor    = flag.Duration("chance.for", time.Hour, "how long TestChance runs")
	chanceSeed   = flag.Uint64("chance.seed", 1, "which faults TestChance makes")
	chanceOnly   = flag.String("chance.only", "", "a regular expression: TestChance makes only the faults whose names it matches")
	chanceReport = flag.String("chance.report", "", "a file for TestChance's report")
	chancePause  = flag.String("chance.pause", "", "a file: while it is there TestChance leaves the machine in peace, and says so in FILE.idle")
)

// An hour of faults that chance chooses, of one machine or two or all, one after the other and
// some at once, while clients on all machines read and change registers, journals, locks
// and names, and others do everything to names in shared directories. What they were told has
// an order; nobody saw an error; nothing leaks; in the end the replicas are identical, and each
// brick's directory is in order.
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
	mount := func(s syscall.Signal) func(int) {
		return func(i int) {
			for role, pid := range p.programs(i) {
				if role != "server" {
					must(syscall.Kill(pid, s))
				}
			}
		}
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
		{"drain", func(i int) { // of the last that is left it is refused
			_, _ = p.try(p.other(i), "peer", "drain", p.Host(i).Name)
		}, func(i int) { p.mortar(i, "peer", "undrain", p.Host(i).Name) }},
	}

	only, err := regexp.Compile(*chanceOnly)
	must(err)
	kept := faults[:0]
	for _, f := range faults {
		if only.MatchString(f.name) {
			kept = append(kept, f)
		}
	}
	if faults = kept; len(faults) == 0 {
		t.Fatalf("-chance.only=%s leaves no faults", *chanceOnly)
	}

	p.run(1, workload, "stress", "-dir", "/mnt/wp/names", "-make")
	clients := p.startHistories("history", "-pace", "4ms", "-tidy", "-lossy", "-seed", fmt.Sprint(*chanceSeed), "-pause", *chancePause)
	var stress []*cluster.Process
	for i := 1; i <= 3; i++ {
		proc, err := p.Host(i).Spawn("stress", workload, "stress", "-dir", "/mnt/wp/names", "-seed", fmt.Sprint(i), "-workers", "1",
			"-pace", "10ms", "-lossy", "-duration", "24h", "-pause", *chancePause)
		must(err)
		stress = append(stress, proc)
	}

	made := map[string]int{}
	var used usage
	begin, idle, sampled := time.Now(), time.Duration(0), time.Duration(0)
	active := func() time.Duration { return time.Since(begin) - idle }
	for n := 1; active() < *chanceFor; n++ {
		if end, ok := t.Deadline(); ok && time.Until(end) < 4*time.Minute {
			t.Logf("-timeout leaves no more time")
			break
		}
		if d := leaveInPeace(*chancePause); d > 0 {
			t.Logf("%v: left the machine in peace for %v", active().Round(time.Second), d.Round(time.Second))
			idle += d
		}
		f := faults[rng.IntN(len(faults))]
		victims := rng.Perm(3)[:[]int{1, 1, 1, 1, 1, 1, 2, 2, 3, 1}[rng.IntN(10)]]
		hold := time.Duration(rng.IntN([]int{200, 1000, 2000, 5000}[rng.IntN(4)])) * time.Millisecond
		t.Logf("%v: %s of %v for %v", active().Round(time.Millisecond), f.name, victims, hold)
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
		if active()-sampled > 15*time.Second {
			sampled = active()
			used.look(p)
		}
	}
	p.healed(1, 60*time.Second)
	took := active()

	h := clients.end()
	names := 0
	for i, proc := range stress {
		must(proc.Signal(syscall.SIGTERM))
		err := proc.Wait(p.ctx(time.Minute))
		var s struct {
			Ops    map[string]int
			Faults []string
		}
		if out := p.Host(i + 1).Log("stress"); err != nil || json.NewDecoder(strings.NewReader(out)).Decode(&s) != nil {
			t.Errorf("the names on n%d: %v\n%s", i+1, err, out)
		}
		for _, n := range s.Ops {
			names += n
		}
	}
	t.Logf("%v of faults %v: %d objects, and %d not judged, longest operation %.0f ms: %v; %d changes of names", took.Round(time.Second), made, h.Parts, h.Lost, h.Worst, h.Ops, names)
	p.identical(1)
	used.flat(t)
	for i := 1; i <= 3; i++ {
		const idleMount = 200 // of goroutines; a leak has had hundreds of occasions
		n := p.goroutinesOfMount(i)
		if n > idleMount {
			t.Errorf("n%d: the mount has %d goroutines and nothing to do", i, n)
		}
		used.mounts = append(used.mounts, n)
	}
	for i := range 3 {
		p.run(i+1, "umount", "/mnt/wp")
	}
	for i, d := range p.daemons {
		must(d.Signal(syscall.SIGTERM))
		must(d.Wait(p.ctx(20 * time.Second)))
		t.Logf("n%d: %s", i+1, p.mortar(i+1, "brick", "check", brickDir))
	}
	if t.Failed() || *chanceReport == "" {
		return
	}
	var b strings.Builder
	fmt.Fprintf(&b, "# Faults by chance\n\nWritten by `bench/chance/run` on %s: three hosts made of namespaces on one machine (%d cores), %v of faults, seed %d.\n", time.Now().Format(time.DateOnly), runtime.NumCPU(), took.Round(time.Second), *chanceSeed)
	fmt.Fprintf(&b, "Nobody saw an error, every history has an order, the replicas are identical in the end, and `brick check` finds nothing.\n\n")
	fmt.Fprintf(&b, "| fault | times |\n|---|---|\n")
	for _, f := range faults {
		fmt.Fprintf(&b, "| %s | %d |\n", f.name, made[f.name])
	}
	fmt.Fprintf(&b, "\n| what clients did on three mounts | |\n|---|---|\n")
	for _, op := range slices.Sorted(maps.Keys(h.Ops)) {
		fmt.Fprintf(&b, "| %s | %d |\n", op, h.Ops[op])
	}
	fmt.Fprintf(&b, "| objects, each with a history that was judged (and %d that were not, since close said that a mount which had stood still had lost what was written) | %d |\n| changes of names in shared directories | %d |\n| longest operation | %.0f ms |\n", h.Lost, h.Parts, names, h.Worst)
	used.write(&b)
	must(os.WriteFile(*chanceReport, []byte(b.String()), 0o644))
}

// leaveInPeace waits while a file is there, and returns for how long.
func leaveInPeace(file string) time.Duration {
	begin := time.Now()
	there := func() bool { _, err := os.Lstat(file); return file != "" && err == nil }
	if !there() {
		return 0
	}
	time.Sleep(time.Second) // the clients see it as well, after each operation
	os.WriteFile(file+".idle", nil, 0o644)
	for there() {
		time.Sleep(100 * time.Millisecond)
	}
	os.Remove(file + ".idle")
	return time.Since(begin)
}

// programs are mortar's processes on a host, by the command that they carry out.
func (p *pool) programs(i int) map[string]int {
	out := map[string]int{}
	for _, proc := range p.Host(i).Processes() {
		if argv := strings.Split(readFile(fmt.Sprintf("/proc/%d/cmdline", proc.Pid)), "\x00"); proc.Name == "mortar" && len(argv) > 1 {
			out[argv[1]] = proc.Pid
		}
	}
	return out
}

// goroutinesOfDaemon is how many goroutines the daemon of a host has, as it says itself.
func (p *pool) goroutinesOfDaemon(i int) (int, error) {
	c := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", p.outside(i, "/run/mortar/mortar.sock"))
	}}}
	r, err := c.Get("http://mortar/metrics")
	if err != nil {
		return 0, err
	}
	defer r.Body.Close()
	all, err := io.ReadAll(r.Body)
	m := regexp.MustCompile(`(?m)^go_goroutines (\d+)$`).FindSubmatch(all)
	if err != nil || m == nil {
		return 0, errors.Join(err, fmt.Errorf("no go_goroutines: %d %.100s", r.StatusCode, all))
	}
	return strconv.Atoi(string(m[1]))
}

// goroutinesOfMount is how many goroutines the mount of a host had. It is another process after that.
func (p *pool) goroutinesOfMount(i int) (n int) {
	p.t.Helper()
	pid := p.programs(i)["mount"]
	log := p.outside(i, "/var/log/mortar/mnt-wp.log")
	before := len(readFile(log))
	syscall.Kill(pid, syscall.SIGQUIT)
	p.within(10*time.Second, fmt.Sprintf("the mount of n%d says what it does, and another process goes on with it", i), func() error {
		if now := p.programs(i)["mount"]; now == 0 || now == pid {
			return fmt.Errorf("its process is %d, and was %d", now, pid)
		}
		n = len(regexp.MustCompile(`(?m)^goroutine \d+ `).FindAllString(readFile(log)[before:], -1))
		if n == 0 {
			return errors.New("nothing in the log")
		}
		return nil
	})
	return n
}

// usage is what processes took, look by look.
type usage struct {
	looks  []map[string]int // "mount 1 descriptors" and so on
	mounts []int            // goroutines of each, in the end
}

// look takes down what the processes of all hosts take.
func (u *usage) look(p *pool) {
	now := map[string]int{}
	for i := 1; i <= 3; i++ {
		for role, pid := range p.programs(i) {
			role = map[string]string{"server": "daemon", "mount": "mount", "mount-keeper": "keeper"}[role]
			fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
			pages := strings.Fields(readFile(fmt.Sprintf("/proc/%d/statm", pid)))
			if role == "" || len(fds) == 0 || len(pages) < 2 {
				continue // a command, or it has just ended
			}
			rss, _ := strconv.Atoi(pages[1])
			now[fmt.Sprintf("%s %d descriptors", role, i)] = len(fds)
			now[fmt.Sprintf("%s %d MiB", role, i)] = rss * os.Getpagesize() >> 20
		}
		if n, err := p.goroutinesOfDaemon(i); err == nil {
			now[fmt.Sprintf("daemon %d goroutines", i)] = n
		} else {
			p.t.Logf("n%d: %v", i, err)
		}
	}
	u.looks = append(u.looks, now)
}

// medians are those of a quantity in the first and in the last quarter of the looks.
func (u *usage) medians(of string) (first, last int) {
	median := func(looks []map[string]int) int {
		var all []int
		for _, l := range looks {
			if n, ok := l[of]; ok {
				all = append(all, n)
			}
		}
		if len(all) == 0 {
			return -1
		}
		slices.Sort(all)
		return all[len(all)/2]
	}
	n := max(1, len(u.looks)/4)
	return median(u.looks[:n]), median(u.looks[len(u.looks)-n:])
}

func (u *usage) quantities() []string {
	all := map[string]bool{}
	for _, l := range u.looks {
		for of := range l {
			all[of] = true
		}
	}
	return slices.SortedFunc(maps.Keys(all), func(a, b string) int {
		return cmp.Or(cmp.Compare(strings.Fields(a)[2], strings.Fields(b)[2]), cmp.Compare(a, b))
	})
}

// flat demands that nothing grew: a leak has had hundreds of occasions.
func (u *usage) flat(t *testing.T) {
	t.Helper()
	if len(u.looks) < 20 {
		t.Logf("%d looks at memory, descriptors and goroutines: too few to judge", len(u.looks))
		return
	}
	for _, of := range u.quantities() {
		first, last := u.medians(of)
		bound := first + 10 // descriptors: connections come and go by one or two
		switch {
		case strings.HasSuffix(of, "MiB"):
			bound = first + first/4 + 16
		case strings.HasSuffix(of, "goroutines"):
			bound = first + first/4 + 20
		}
		if last > bound {
			t.Errorf("%s: %d in the last quarter, and %d in the first", of, last, first)
		}
	}
}

func (u *usage) write(w io.Writer) {
	fmt.Fprintf(w, "\nMedians of %d looks, in the first quarter and in the last one. A daemon is started again with every kill; mounts and keepers live all the time.\n\n| | first | last |\n|---|---|---|\n", len(u.looks))
	for _, of := range u.quantities() {
		first, last := u.medians(of)
		fmt.Fprintf(w, "| %s | %d | %d |\n", of, first, last)
	}
	fmt.Fprintf(w, "\nGoroutines of the mounts in the end, with nothing to do: %v.\n", u.mounts)
}
