// Compare runs the workloads of bench/workload on the local disk, on GlusterFS
// and on mortar, in three machines made of namespaces, one product at a time on
// the same disks, round after round, and prints medians and ratios.
//
//	go run ./bench/compare                                  everything, 5 rounds
//	go run ./bench/compare -targets local,mortar -rounds 1 -only small
//	go run ./bench/compare -delay 350us -rate 1e9           over 0.7 ms and 1 Gbit/s links
//
// It needs root, FUSE, and for GlusterFS the Debian packages glusterfs-server
// and glusterfs-client. Only ratios within one run mean anything: three
// machines share this one's cores.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"mortar/bench/figure"
	"mortar/test/cluster"
	"mortar/test/tree"
)

// target is a file system to be measured.
type target struct {
	name  string
	about string
	up    func(*lab) error // starts it and mounts it on n1
	down  func(*lab) error // stops it altogether
	dir   string           // on n1
	cold  string           // command that empties its own caches
	only  string           // groups that make sense for it; "" for all
}

const hosts = 3

var targets = []*target{
	{name: "local", about: "XFS on the loop device that is the others' brick",
		up:   func(l *lab) error { return l.sh(1, "mkdir -p /bricks/local") },
		down: func(*lab) error { return nil }, dir: "/bricks/local"},
	{name: "gluster", about: "GlusterFS as installed, replica 3", up: (*lab).glusterUp, down: (*lab).glusterDown, dir: "/mnt/gluster",
		cold: "umount /mnt/gluster && mount -t glusterfs n1:/vol /mnt/gluster"},
	mortarTarget("mortar", "replica 3, transport.encryption off", "plain", ""),
	mortarTarget("mortar+tls", "replica 3, transport.encryption on (the default)", "wp", ""),
	mortarTarget("mortar,node", "replica 3, transport.encryption off, mounted with locks=node", "plain", "locks=node"),
}

func mortarTarget(name, about, volume, options string) *target {
	mount := "mount " + map[bool]string{true: "-o " + options + " "}[options != ""] + "n1:/" + volume + " /mnt/" + volume
	t := &target{name: name, about: about, down: (*lab).mortarDown, dir: "/mnt/" + volume}
	t.up = func(l *lab) error {
		if err := l.mortarUp(); err != nil {
			return err
		}
		return l.sh(1, "mkdir -p /mnt/"+volume+" && "+l.mortar+" "+mount)
	}
	t.cold = "umount /mnt/" + volume + " && MORTAR " + mount
	if options != "" {
		t.only = "small,tree"
	}
	return t
}

// lab is the machines and what is installed on them.
type lab struct {
	*cluster.Cluster
	ctx      context.Context
	bin      string // shared directory of programs
	mortar   string
	workload string
	volumes  map[string]bool // made so far
	daemons  []*cluster.Process
}

func main() {
	cluster.Main()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		os.Exit(1)
	}
}

func run() (err error) {
	var (
		rounds  = flag.Int("rounds", 5, "how often each target is measured")
		names   = flag.String("targets", "local,gluster,mortar,mortar+tls,mortar,node", "which: "+targetNames())
		only    = flag.String("only", "", "groups of workloads (see go run ./bench/workload -list)")
		scale   = flag.Float64("scale", 1, "multiplies the numbers of operations")
		delay   = flag.Duration("delay", 0, "time that a packet takes from one machine to another")
		rate    = flag.Float64("rate", 0, "bits per second of each machine's link")
		disk    = flag.Float64("disk", 10, "GiB of each machine's disk (a sparse file in the temporary directory)")
		results = flag.String("results", "", "also write the tables to this file, as bench/RESULTS.md")
	)
	flag.Parse()
	if why := cluster.Missing(); why != "" {
		return errors.New(why)
	}
	chosen, err := choose(*names)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	l := &lab{ctx: ctx, volumes: map[string]bool{}}
	if err := l.build(chosen); err != nil {
		return err
	}
	defer os.RemoveAll(l.bin)
	share := []string{l.bin}
	wp := tree.WordPress()
	if wp != "" {
		share = append(share, wp)
	}
	l.Cluster, err = cluster.New(cluster.Options{Hosts: hosts, Disk: cluster.XFS, DiskBytes: int64(*disk * (1 << 30)),
		Delay: *delay, Rate: int64(*rate), Share: share})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()

	t := table{delay: *delay, rate: *rate, rounds: *rounds, targets: chosen}
	for r := range *rounds {
		for _, target := range order(chosen, r) {
			begin := time.Now()
			figures, use, err := l.measure(target, wp, *only, *scale, r == *rounds-1)
			if err != nil {
				return fmt.Errorf("%s: %w", target.name, err)
			}
			t.add(target.name, figures, use)
			fmt.Fprintf(os.Stderr, "round %d of %d: %s took %.0f s\n", r+1, *rounds, target.name, time.Since(begin).Seconds())
		}
	}
	text := t.markdown()
	fmt.Print(text)
	if *results != "" {
		return os.WriteFile(*results, []byte(text), 0o644)
	}
	return nil
}

// order is who is measured after whom in a round: who comes first changes from round to round, and so does
// who follows whom, since what one product leaves behind (dirty pages, a disk's credit) is the next one's burden.
// Of a prime number of targets each follows every other once in as many rounds less one.
func order(targets []*target, round int) []*target {
	n := len(targets)
	var strides []int
	for s := 1; s < max(n, 2); s++ {
		if coprime(s, n) {
			strides = append(strides, s)
		}
	}
	out := make([]*target, n)
	for i := range out {
		out[i] = targets[(round+i*strides[round%len(strides)])%n]
	}
	return out
}

func coprime(a, b int) bool {
	for b != 0 {
		a, b = b, a%b
	}
	return a == 1
}

func targetNames() string {
	var out []string
	for _, t := range targets {
		out = append(out, t.name)
	}
	return strings.Join(out, " ")
}

// choose finds targets by name; "mortar,node" is one of them in spite of its comma.
func choose(names string) ([]*target, error) {
	var out []*target
	for rest := names; rest != ""; {
		best := -1
		for i, t := range targets {
			if tail, ok := strings.CutPrefix(rest, t.name); ok && (tail == "" || tail[0] == ',') && (best < 0 || len(t.name) > len(targets[best].name)) {
				best = i
			}
		}
		if best < 0 {
			return nil, fmt.Errorf("no target at %q; there are: %s", rest, targetNames())
		}
		out = append(out, targets[best])
		rest = strings.TrimPrefix(strings.TrimPrefix(rest, targets[best].name), ",")
	}
	if len(out) == 0 {
		return nil, errors.New("no targets")
	}
	return out, nil
}

// build compiles the programs.
func (l *lab) build(chosen []*target) (err error) {
	if l.bin, err = os.MkdirTemp("", "mortar-bench-"); err != nil {
		return err
	}
	l.mortar, l.workload = filepath.Join(l.bin, "mortar"), filepath.Join(l.bin, "workload")
	programs := map[string]string{l.workload: "mortar/bench/workload"}
	if slices.ContainsFunc(chosen, func(t *target) bool { return strings.HasPrefix(t.name, "mortar") }) {
		programs[l.mortar] = "mortar/cmd/mortar"
	}
	for out, pkg := range programs {
		cmd := exec.Command("go", "build", "-o", out, pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if text, err := cmd.CombinedOutput(); err != nil {
			return errors.Join(fmt.Errorf("go build %s: %w: %s", pkg, err, text), os.RemoveAll(l.bin))
		}
	}
	return nil
}

// measure runs the workloads once on a target, and looks at what it uses.
func (l *lab) measure(t *target, wp, only string, scale float64, last bool) (figures []figure.Figure, use usage, err error) {
	if err := t.up(l); err != nil {
		return nil, use, err
	}
	defer func() { err = errors.Join(err, t.down(l)) }()
	argv := []string{l.workload, "-dir", t.dir, "-json", "-cpu", "-scale", fmt.Sprint(scale)}
	if wp != "" {
		argv = append(argv, "-tree", wp)
	}
	if t.cold != "" {
		argv = append(argv, "-cold", strings.ReplaceAll(t.cold, "MORTAR", l.mortar))
	}
	if groups := both(only, t.only); groups != "" {
		argv = append(argv, "-only", groups)
	} else if only != "" || t.only != "" {
		return nil, use, nil
	}
	if err := rest(l.ctx, time.Minute); err != nil {
		return nil, use, err
	}
	r, err := l.Host(1).Run(l.ctx, argv...)
	if err != nil {
		return nil, use, err
	}
	if err := json.Unmarshal([]byte(r.Stdout), &figures); err != nil {
		return nil, use, err
	}
	if last && t.name != "local" {
		use = l.usage(10 * time.Second)
	}
	return figures, use, nil
}

// both is the groups that two lists have in common; an empty list has all.
func both(a, b string) string {
	if a == "" || b == "" {
		return a + b
	}
	var out []string
	for _, g := range strings.Split(a, ",") {
		if slices.Contains(strings.Split(b, ","), g) {
			out = append(out, g)
		}
	}
	return strings.Join(out, ",")
}

// usage is what the processes of a product take on one machine when the work is done.
type usage struct {
	rss  int64   // bytes, on n1 where it is mounted
	idle float64 // processor time as a fraction of one core, mean of the machines
}

// usage measures for a while in which nobody asks for anything.
func (l *lab) usage(during time.Duration) usage {
	var u usage
	cpu := func() (sum time.Duration) {
		for _, h := range l.Hosts() {
			for _, p := range h.Processes() {
				sum += p.CPU
			}
		}
		return sum
	}
	time.Sleep(2 * time.Second) // what is left to be written out is not idleness
	before, begin := cpu(), time.Now()
	time.Sleep(during)
	u.idle = (cpu() - before).Seconds() / time.Since(begin).Seconds() / hosts
	for _, p := range l.Host(1).Processes() {
		u.rss += p.RSS
	}
	return u
}

func (l *lab) run(i int, argv ...string) error {
	ctx, cancel := context.WithTimeout(l.ctx, 2*time.Minute)
	defer cancel()
	_, err := l.Host(i).Run(ctx, argv...)
	return err
}

func (l *lab) sh(i int, script string) error { return l.run(i, "sh", "-ec", script) }

// until repeats a command until it succeeds.
func (l *lab) until(i int, script string) error {
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		err := l.sh(i, script)
		if err == nil || time.Now().After(deadline) || l.ctx.Err() != nil {
			return err
		}
	}
}

// all runs a script on every host.
func (l *lab) all(script string) error {
	for i := range hosts {
		if err := l.sh(i+1, script); err != nil {
			return err
		}
	}
	return nil
}

// glusterUp starts GlusterFS, with its volume as the Administrator Guide makes one.
func (l *lab) glusterUp() error {
	if _, err := exec.LookPath("glusterd"); err != nil {
		return errors.New("GlusterFS is not installed: apt-get install glusterfs-server glusterfs-client, or leave it out of -targets")
	}
	if err := l.all("mkdir -p /run/gluster /var/log/glusterfs /mnt/gluster && glusterd"); err != nil {
		return err
	}
	g := "gluster --mode=script "
	for i := range hosts {
		if err := l.until(i+1, g+"volume list"); err != nil {
			return err
		}
	}
	if !l.volumes["gluster"] {
		var bricks []string
		for i := 1; i <= hosts; i++ {
			if i > 1 {
				if err := l.sh(1, fmt.Sprintf(g+"peer probe n%d", i)); err != nil {
					return err
				}
			}
			bricks = append(bricks, fmt.Sprintf("n%d:/bricks/gluster", i))
		}
		connected := fmt.Sprintf("[ $(%speer status | grep -c 'Peer in Cluster (Connected)') = %d ]", g, hosts-1)
		for i := range hosts {
			if err := l.until(i+1, connected); err != nil {
				return err
			}
		}
		if err := l.sh(1, fmt.Sprintf("%svolume create vol replica %d %s", g, hosts, strings.Join(bricks, " "))); err != nil {
			return err
		}
		if err := l.sh(1, g+"volume start vol"); err != nil {
			return err
		}
		l.volumes["gluster"] = true
	}
	online := fmt.Sprintf("[ $(%svolume status vol | grep -c '^Brick.* Y ') = %d ]", g, hosts)
	if err := l.until(1, online); err != nil {
		return err
	}
	return l.until(1, "mount -t glusterfs n1:/vol /mnt/gluster && stat /mnt/gluster")
}

// down unmounts and ends every process of every machine.
func (l *lab) down(script string) error {
	err := l.sh(1, script)
	for _, h := range l.Hosts() {
		err = errors.Join(err, h.KillAll())
	}
	for _, h := range l.Hosts() {
		for deadline := time.Now().Add(10 * time.Second); len(h.Processes()) > 0 && time.Now().Before(deadline); {
			time.Sleep(10 * time.Millisecond)
		}
	}
	return errors.Join(err, exec.Command("sync").Run())
}

func (l *lab) glusterDown() error { return l.down("umount /mnt/gluster") }

// mortarUp starts mortar, with one volume that is encrypted on its way and one that is not.
func (l *lab) mortarUp() error {
	for i, h := range l.Hosts() {
		if _, err := h.Spawn("mortar", l.mortar, "server", "--state-dir", "/bricks/mortar-state", "--name", h.Name); err != nil {
			return err
		}
		if err := l.until(i+1, l.mortar+" pool list"); err != nil {
			return err
		}
	}
	if !l.volumes["mortar"] {
		for i := 2; i <= hosts; i++ {
			r, err := l.Host(1).Run(l.ctx, l.mortar, "peer", "invite", "--json")
			if err != nil {
				return err
			}
			var inv struct{ Token string }
			if err := json.Unmarshal([]byte(r.Stdout), &inv); err != nil {
				return err
			}
			if err := l.run(i, l.mortar, "join", inv.Token, "n1"); err != nil {
				return err
			}
		}
		for _, v := range []string{"wp", "plain"} {
			argv := []string{l.mortar, "volume", "create", v, "replica", fmt.Sprint(hosts)}
			for i := 1; i <= hosts; i++ {
				argv = append(argv, fmt.Sprintf("n%d:/bricks/mortar-%s", i, v))
			}
			if err := l.run(1, argv...); err != nil {
				return err
			}
			if v == "plain" {
				if err := l.run(1, l.mortar, "volume", "set", v, "transport.encryption", "off"); err != nil {
					return err
				}
			}
			if err := l.run(1, l.mortar, "volume", "start", v); err != nil {
				return err
			}
		}
		l.volumes["mortar"] = true
	}
	for _, v := range []string{"wp", "plain"} {
		if err := l.until(1, fmt.Sprintf(`%s volume heal %s info --json | grep -Eq '"pending": *0\b'`, l.mortar, v)); err != nil {
			return err
		}
	}
	return nil
}

func (l *lab) mortarDown() error {
	return l.down("for m in $(awk '$3 == \"fuse.mortar\" {print $2}' /proc/self/mounts); do umount $m; done")
}
