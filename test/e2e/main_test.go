// Package e2e tests mortar as its users have it: the program, in three machines
// made of namespaces (package cluster), with real FUSE mounts and real faults.
//
// The tests need root and /dev/fuse, and say so where they are skipped.
// MORTAR_TEST_LONG=1 gives faults, races and rounds their full length;
// MORTAR_TEST_BINARY names a program to test instead of building one.
package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mortar/test/cluster"
	"mortar/test/locks"
)

// What all tests run, built once. The directory is shared with every host.
var (
	binDir   string
	mortar   string
	workload string
)

// long is whether tests take their full length; what they prove is the same.
var long = os.Getenv("MORTAR_TEST_LONG") != ""

func TestMain(m *testing.M) {
	cluster.Main()
	locks.Main()
	os.Exit(func() int {
		if why := cluster.Missing(); why != "" {
			return m.Run() // every test skips itself, with the reason
		}
		var err error
		if binDir, err = os.MkdirTemp("", "mortar-e2e-"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(binDir)
		mortar, workload = filepath.Join(binDir, "mortar"), filepath.Join(binDir, "workload")
		programs := map[string]string{mortar: "mortar/cmd/mortar", workload: "mortar/test/workload"}
		if ready := os.Getenv("MORTAR_TEST_BINARY"); ready != "" {
			delete(programs, mortar)
			if out, err := exec.Command("cp", ready, mortar).CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "MORTAR_TEST_BINARY: %s", out)
				return 1
			}
		}
		for out, pkg := range programs {
			cmd := exec.Command("go", "build", "-trimpath", "-o", out, pkg) // as for packages (packaging), so that it is compiled once
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
			if text, err := cmd.CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "go build %s: %v\n%s", pkg, err, text)
				return 1
			}
		}
		return m.Run()
	}())
}

// pick chooses between the short and the long version of a number.
func pick[T any](short, full T) T {
	if long {
		return full
	}
	return short
}

// setup says what a pool is to have before the test begins.
type setup struct {
	hosts     int          // default 3
	disk      cluster.Disk // default Dir
	diskBytes int64
	stateDir  string   // of the daemons; default /var/lib/mortar
	replica   int      // bricks of volume wp, one on each of the first hosts; default hosts; −1: no volume
	options   []string // key, value, … of the volume
	mounts    int      // hosts that mount the volume at /mnt/wp; default hosts; −1: none
	mountOpts string   // -o
	alone     bool     // the daemons run, and are not joined
	witness   int      // the host whose daemon is a witness; default none
}

// pool is a running pool of machines.
type pool struct {
	*cluster.Cluster
	t       *testing.T
	setup   setup
	daemons []*cluster.Process // by host, from 0
}

// brickDir is where each host's brick of volume wp is.
const brickDir = "/bricks/wp"

// start makes the machines, and on them what the setup says. At the end of a
// test that passed, everything is stopped as an administrator would, and must stop.
func start(t *testing.T, s setup) *pool {
	t.Helper()
	if s.hosts == 0 {
		s.hosts = 3
	}
	if s.replica == 0 {
		s.replica = s.hosts
	}
	if s.mounts == 0 {
		s.mounts = s.hosts
	}
	if s.stateDir == "" {
		s.stateDir = "/var/lib/mortar"
	}
	c := cluster.Start(t, cluster.Options{Hosts: s.hosts, Disk: s.disk, DiskBytes: s.diskBytes, Share: []string{binDir}})
	p := &pool{Cluster: c, t: t, setup: s, daemons: make([]*cluster.Process, s.hosts)}
	for i := 1; i <= s.hosts; i++ {
		p.startDaemon(i)
	}
	for i := 1; i <= s.hosts; i++ {
		p.waitDaemon(i)
	}
	if !s.alone {
		for i := 2; i <= s.hosts; i++ {
			p.join(i)
		}
		if s.hosts > 2 { // of two the first one votes, from the beginning
			p.voters(min(5, (s.hosts-1)|1)) // an odd number
		}
	}
	if s.replica > 0 && !s.alone {
		p.createVolume()
		for i := 1; i <= s.mounts; i++ {
			p.mount(i)
		}
	}
	t.Cleanup(func() {
		if !t.Failed() {
			p.shutDown()
		}
	})
	return p
}

// createVolume makes and starts volume wp on the first hosts.
func (p *pool) createVolume() {
	p.t.Helper()
	argv := []string{"volume", "create", "wp"}
	if p.setup.replica > 1 {
		argv = append(argv, "replica", fmt.Sprint(p.setup.replica))
	}
	for i := 1; i <= p.setup.replica; i++ {
		argv = append(argv, p.Host(i).Name+":"+brickDir)
	}
	p.mortar(1, argv...)
	if len(p.setup.options) > 0 {
		p.mortar(1, append([]string{"volume", "set", "wp"}, p.setup.options...)...)
	}
	p.mortar(1, "volume", "start", "wp")
}

// startDaemon starts the daemon of a host, again if need be.
func (p *pool) startDaemon(i int, flags ...string) {
	p.t.Helper()
	argv := append([]string{mortar, "server", "--state-dir", p.setup.stateDir, "--listen", ":24007", "--name", p.Host(i).Name}, flags...)
	if i == p.setup.witness {
		argv = append(argv, "--witness")
	}
	d, err := p.Host(i).Spawn("mortar", argv...)
	if err != nil {
		p.t.Fatal(err)
	}
	p.daemons[i-1] = d
}

// waitDaemon waits until a host's daemon answers.
func (p *pool) waitDaemon(i int) {
	p.t.Helper()
	p.within(15*time.Second, fmt.Sprintf("the daemon of n%d answers", i), func() error {
		select {
		case <-p.daemons[i-1].Done():
			p.t.Fatalf("the daemon of n%d ended: %v\n%s", i, p.daemons[i-1].Wait(context.Background()), p.Host(i).Log("mortar"))
		default:
		}
		_, err := p.try(i, "pool", "list")
		return err
	})
}

// join brings a host into n1's pool, with the words of the invitation.
func (p *pool) join(i int) {
	p.t.Helper()
	var inv struct {
		Token, Command string
		Expires        time.Time
	}
	p.json(&inv, 1, "peer", "invite", "--json")
	p.mortar(i, "join", inv.Token, p.Host(1).Name)
}

// voters waits until as many peers vote as should. A join waits for that only for a while, and who has no vote yet
// is not missed, nor is the pool as strong as it will be.
func (p *pool) voters(want int) {
	p.t.Helper()
	p.within(20*time.Second, fmt.Sprintf("%d vote", want), func() error {
		if out := p.mortar(1, "pool", "list", "--json"); strings.Count(out, `"voter": true`) != want {
			return errors.New(out)
		}
		return nil
	})
}

// mount mounts volume wp at /mnt/wp of a host.
func (p *pool) mount(i int) {
	p.t.Helper()
	argv := []string{"mount"}
	if p.setup.mountOpts != "" {
		argv = append(argv, "-o", p.setup.mountOpts)
	}
	p.run(i, "mkdir", "-p", "/mnt/wp")
	p.mortar(i, append(argv, p.Host(i).Name+":/wp", "/mnt/wp")...)
}

// shutDown unmounts and stops everything, each within a few seconds and without a word of trouble.
func (p *pool) shutDown() {
	p.t.Helper()
	for i, h := range p.Hosts() {
		mounts, _ := h.Run(p.ctx(5*time.Second), "sh", "-c", "grep -c ' fuse.mortar ' /proc/self/mounts")
		if strings.TrimSpace(mounts.Stdout) != "0" {
			p.run(i+1, "umount", "/mnt/wp")
		}
	}
	for i, d := range p.daemons {
		d.Signal(syscall.SIGCONT)
		d.Signal(syscall.SIGTERM)
		if err := d.Wait(p.ctx(10 * time.Second)); err != nil {
			p.t.Errorf("the daemon of n%d, asked to end: %v", i+1, err)
		}
	}
	for i, h := range p.Hosts() {
		p.within(5*time.Second, fmt.Sprintf("no process is left on n%d", i+1), func() error {
			if rest := h.Processes(); len(rest) > 0 {
				return fmt.Errorf("%+v", rest)
			}
			return nil
		})
		if log := h.Log("mortar"); strings.Contains(log, "panic:") || strings.Contains(log, "DATA RACE") {
			p.t.Errorf("n%d's daemon panicked:\n%s", i+1, log)
		}
	}
}

func (p *pool) ctx(limit time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	p.t.Cleanup(cancel)
	return ctx
}

// patience is how long a command may take that has nothing to wait for, on the slowest machine.
const patience = 3 * time.Minute

// run runs a program on a host; it must succeed.
func (p *pool) run(i int, argv ...string) string {
	p.t.Helper()
	r, err := p.Host(i).Run(p.ctx(patience), argv...)
	if err != nil {
		p.t.Fatal(err)
	}
	return r.Stdout
}

// mortar runs a mortar command on a host; it must succeed.
func (p *pool) mortar(i int, args ...string) string {
	p.t.Helper()
	return p.run(i, append([]string{mortar}, args...)...)
}

// try runs a mortar command that may fail.
func (p *pool) try(i int, args ...string) (cluster.Result, error) {
	return p.Host(i).Run(p.ctx(patience), append([]string{mortar}, args...)...)
}

// json runs a mortar command and reads its answer.
func (p *pool) json(v any, i int, args ...string) {
	p.t.Helper()
	if err := json.Unmarshal([]byte(p.mortar(i, args...)), v); err != nil {
		p.t.Fatalf("mortar %s: %v", strings.Join(args, " "), err)
	}
}

// refuse runs a mortar command that must fail with words that contain all of the parts.
func (p *pool) refuse(i int, args []string, parts ...string) {
	p.t.Helper()
	p.refuseProgram(i, mortar, args, parts...)
}

// refuseProgram is refuse for any program.
func (p *pool) refuseProgram(i int, program string, args []string, parts ...string) {
	p.t.Helper()
	r, err := p.Host(i).Run(p.ctx(patience), append([]string{program}, args...)...)
	command := filepath.Base(program) + " " + strings.Join(args, " ")
	if err == nil {
		p.t.Errorf("%s succeeded:\n%s", command, r.Stdout)
		return
	}
	text := r.Stdout + r.Stderr
	for _, part := range parts {
		if !strings.Contains(text, part) {
			p.t.Errorf("%s: the message lacks %q:\n%s", command, part, text)
		}
	}
}

// within waits for a condition and fails with its last words. The limit is that of a machine with nothing else to do.
func (p *pool) within(limit time.Duration, what string, cond func() error) time.Duration {
	p.t.Helper()
	begin, machine := time.Now(), sync.OnceValue(cluster.Share)
	for {
		err := cond()
		if err == nil {
			return time.Since(begin)
		}
		if machine(); time.Since(begin) > limit {
			if took := time.Since(begin); took > machine().Bound(limit) {
				p.t.Fatalf("not within %v, nor after %v with %s: %s: %v", limit, took, machine(), what, err)
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// outside is a path in a host as the machine itself sees it: how one process
// looks through the mounts of several hosts.
func (p *pool) outside(i int, path string) string { return p.Host(i).Outside(path) }

// workload runs the test workload on a host (0: on the machine itself) and
// fails the test with what it found wrong.
func (p *pool) workload(i int, limit time.Duration, v any, args ...string) {
	p.t.Helper()
	if err := p.startWorkload(i, limit, args...)(v); err != nil {
		p.t.Fatal(err)
	}
}

// startWorkload starts it, and returns a function that waits for its end.
func (p *pool) startWorkload(i int, limit time.Duration, args ...string) func(v any) error {
	p.t.Helper()
	type outcome struct {
		out string
		err error
	}
	done := make(chan outcome, 1)
	go func() {
		argv := append([]string{workload}, args...)
		if i > 0 {
			r, err := p.Host(i).Run(p.ctx(limit), argv...)
			done <- outcome{r.Stdout, err}
			return
		}
		cmd := exec.CommandContext(p.ctx(limit), argv[0], argv[1:]...)
		cmd.WaitDelay = time.Second
		out, err := cmd.Output()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("workload %s: %w\n%s%s", args[0], err, out, exit.Stderr)
		}
		done <- outcome{string(out), err}
	}()
	return func(v any) error {
		o := <-done
		if v != nil && o.out != "" {
			if err := json.Unmarshal([]byte(o.out), v); err != nil {
				return errors.Join(o.err, err)
			}
		}
		return o.err
	}
}

// manifest is the tree at a path of a host, to the last bit.
func (p *pool) manifest(i int, path string) []string {
	p.t.Helper()
	return strings.Split(strings.TrimSpace(p.run(i, workload, "manifest", path)), "\n")
}

// status is what volume status says, as far as tests care.
type status struct {
	Bricks []struct {
		Name    string
		Online  bool
		Role    string
		InSync  bool `json:"in_sync"`
		Problem string
		Heal    *struct {
			Phase      string
			Percent    float64
			Rate       float64
			ETASeconds float64 `json:"eta_seconds"`
		}
	}
	Sets []struct {
		Epoch    uint64
		Primary  string
		InSync   int `json:"in_sync"`
		Members  int
		Writable bool
	}
}

func (p *pool) status(i int) (status, error) {
	var all []status
	r, err := p.try(i, "volume", "status", "wp", "--json")
	if err != nil {
		return status{}, err
	}
	if err := json.Unmarshal([]byte(r.Stdout), &all); err != nil {
		return status{}, err
	}
	if len(all) != 1 || len(all[0].Sets) != 1 {
		return status{}, fmt.Errorf("not the status of one volume with one set: %s", r.Stdout)
	}
	return all[0], nil
}

// primary is the number of the host whose brick leads, as the daemon of host i knows it.
func (p *pool) primary(i int) int {
	p.t.Helper()
	var out int
	p.within(10*time.Second, "the set has a primary", func() error {
		st, err := p.status(i)
		if err != nil {
			return err
		}
		for k, h := range p.Hosts() {
			if st.Sets[0].Primary == h.Name+":"+brickDir {
				out = k + 1
				return nil
			}
		}
		return fmt.Errorf("primary %q", st.Sets[0].Primary)
	})
	return out
}

// pending is what heal info says is still to be healed; 0 only when every brick is in sync.
func (p *pool) pending(i int) (int64, error) {
	r, err := p.try(i, "volume", "heal", "wp", "info", "--json")
	if err != nil {
		return -1, err
	}
	var info struct {
		Pending *int64
		Bricks  []struct {
			InSync bool `json:"in_sync"`
		}
	}
	if err := json.Unmarshal([]byte(r.Stdout), &info); err != nil {
		return -1, err
	}
	if info.Pending != nil {
		return *info.Pending, nil
	}
	for _, b := range info.Bricks { // TestHeal demands the field
		if !b.InSync {
			return 1, nil
		}
	}
	return 0, nil
}

// healed waits until every brick is in sync and heal info agrees, and returns how long that took.
func (p *pool) healed(i int, limit time.Duration) time.Duration {
	p.t.Helper()
	return p.within(limit, "all bricks are in sync again", func() error {
		st, err := p.status(i)
		if err != nil {
			return err
		}
		if s := st.Sets[0]; s.InSync != s.Members {
			return fmt.Errorf("%d of %d bricks are in sync: %+v", s.InSync, s.Members, st.Bricks)
		}
		for _, b := range st.Bricks { // a daemon that has just been started knows of the set what it knew before
			if !b.InSync || !b.Online {
				return fmt.Errorf("%+v", b)
			}
		}
		n, err := p.pending(i)
		if err == nil && n != 0 {
			err = fmt.Errorf("%d pending, and all bricks in sync", n)
		}
		return err
	})
}

// identical demands that the bricks' digests are equal. A set that changes meanwhile, as it does when what was
// proposed during a fault is decided after it, or a brick is left out that a busy machine holds up, is asked
// again; a brick that differs is not.
func (p *pool) identical(i int) {
	p.t.Helper()
	p.within(30*time.Second, "the bricks' digests are made", func() error {
		var v struct {
			Same    bool
			Digests []struct{ Brick, At, Sum, Problem string }
		}
		r, err := p.try(i, "volume", "heal", "wp", "full", "--verify", "--json")
		if jerr := json.Unmarshal([]byte(r.Stdout), &v); jerr != nil {
			return fmt.Errorf("volume heal full --verify on n%d: %w", i, errors.Join(err, jerr))
		}
		for _, d := range v.Digests {
			for _, e := range v.Digests {
				if d.Sum != "" && e.Sum != "" && d.Sum != e.Sum {
					p.t.Fatalf("the replicas are not identical: %+v", v)
				}
			}
			if d.Sum == "" && err == nil {
				err = errors.New("a digest is missing")
			}
		}
		if err != nil || !v.Same || len(v.Digests) != p.setup.replica {
			return fmt.Errorf("%+v, %v", v, err)
		}
		return nil
	})
}
