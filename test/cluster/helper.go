package cluster

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	roleInit   = "init"
	roleKeeper = "keeper"
)

// spec is what a helper process is started with.
type spec struct {
	Role string
	Dir  string

	// of a host
	Name      string
	Addr      string
	Hosts     int
	Share     []string
	Disk      Disk
	DiskBytes int64

	// of the keeper
	Delay time.Duration
	Rate  int64
}

// Main must be the first thing that a program does which makes clusters: in
// processes that were started as a cluster's helper it does the helper's work
// and does not return. Elsewhere it does nothing.
func Main() {
	text := os.Getenv(envRole)
	if text == "" {
		return
	}
	os.Unsetenv(envRole)
	var s spec
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		fmt.Fprintln(os.Stderr, "cluster helper:", err)
		os.Exit(2)
	}
	f := os.NewFile(3, "socket")
	conn, err := net.FileConn(f)
	if err != nil {
		fmt.Fprintln(os.Stderr, "cluster helper:", err)
		os.Exit(2)
	}
	f.Close()
	// Ctrl-C reaches the test's process; what it ends, ends us.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	switch s.Role {
	case roleInit:
		runInit(s, conn)
	case roleKeeper:
		runKeeper(s, conn)
	}
	os.Exit(0)
}

// serve says whether the helper is ready, and answers requests until the other
// end is gone.
func serve(conn net.Conn, ready error, do func(request) error) {
	out := json.NewEncoder(conn)
	say := func(err error) {
		var r reply
		if err != nil {
			r.Err = err.Error()
		}
		out.Encode(r) // if nobody hears it, the next read ends the loop
	}
	say(ready)
	if ready != nil {
		return
	}
	in := bufio.NewScanner(conn)
	for in.Scan() {
		var r request
		if err := json.Unmarshal(in.Bytes(), &r); err != nil {
			say(err)
			continue
		}
		say(do(r))
	}
}

// run executes a program and turns a failure into an error with its words.
func run(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// runInit is process 1 of a host: it builds the host's file tree, reaps
// orphans, and by ending ends the host.
func runInit(s spec, conn net.Conn) {
	d := disk{kind: s.Disk, dir: s.Dir, bytes: s.DiskBytes}
	err := buildRoot(s, &d)
	go reapOrphans()
	serve(conn, err, func(r request) error {
		switch r.Verb {
		case "network":
			if err := run("ip", "link", "set", "lo", "up"); err != nil {
				return err
			}
			if err := run("ip", "addr", "add", s.Addr+"/24", "dev", "eth0"); err != nil {
				return err
			}
			return run("ip", "link", "set", "eth0", "up")
		case "kill":
			return killAll()
		case "mount-disk":
			return d.mount("/bricks")
		case "unmount-disk":
			return d.unmount("/bricks")
		case "fail-disk":
			return d.fail("/bricks")
		case "cut-power":
			return d.cutPower("/bricks", killAll)
		}
		return fmt.Errorf("unknown request %q", r.Verb)
	})
}

// killLimit is how long the kernel may take to end what was killed: a process that waits for
// a FUSE mount goes when the one that serves that has gone.
const killLimit = 10 * time.Second

// killAll ends every process of the host but this one, which is process 1, and returns when
// those that there were run no more. Whoever started one may not have waited for it yet.
func killAll() error {
	before := map[process]uint64{}
	for _, p := range processes("/proc") {
		if p.pid != 1 {
			before[p] = p.stat().start
		}
	}
	if err := syscall.Kill(-1, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
		return err
	}
	for deadline := time.Now().Add(killLimit); ; time.Sleep(time.Millisecond) {
		var names []string
		for p, start := range before {
			if st := p.stat(); st.start == start && p.runs(st) {
				names = append(names, fmt.Sprintf("%d (%s)", p.pid, st.comm))
			}
		}
		if len(names) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("killed %v ago and still there: %s", killLimit, strings.Join(names, ", "))
		}
	}
}

// reapOrphans waits, for ever, for children that process 1 did not start: those
// whose parents ended before them. What run starts it waits for itself, at once;
// so only what has been dead for a second is nobody's.
func reapOrphans() {
	var before map[int]bool
	for range time.Tick(time.Second) {
		now := map[int]bool{}
		for _, pid := range zombies() {
			if before[pid] {
				var ws syscall.WaitStatus
				syscall.Wait4(pid, &ws, syscall.WNOHANG, nil)
				continue
			}
			now[pid] = true
		}
		before = now
	}
}

// zombies lists the dead children of process 1.
func zombies() []int {
	var out []int
	for _, p := range processes("/proc") {
		if st := p.stat(); st.state == 'Z' && st.ppid == 1 {
			out = append(out, p.pid)
		}
	}
	return out
}

// buildRoot gives the host a file tree of its own: the machine's, with every
// change kept in memory, and without the parts that belong to the machine alone.
func buildRoot(s spec, d *disk) error {
	if err := unix.Sethostname([]byte(s.Name)); err != nil {
		return fmt.Errorf("sethostname: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	layer := filepath.Join(s.Dir, "layer")
	if err := mountAt("tmpfs", "tmpfs", layer, 0, "mode=755"); err != nil {
		return err
	}
	upper, work, root := layer+"/upper", layer+"/work", layer+"/root"
	for _, d := range []string{upper, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	if err := mountAt("overlay", "overlay", root, 0, "lowerdir=/,upperdir="+upper+",workdir="+work); err != nil {
		return err
	}
	for _, d := range []string{"/dev", "/sys"} {
		if err := mountAt(d, "", root+d, unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return err
		}
	}
	if err := mountAt("proc", "proc", root+"/proc", 0, ""); err != nil {
		return err
	}
	for _, d := range []string{"/run", "/mnt", "/tmp", "/var/tmp", "/var/lib/mortar", "/etc/mortar"} {
		if err := mountAt("tmpfs", "tmpfs", root+d, 0, "mode=1777"); err != nil {
			return err
		}
	}
	for _, d := range []string{"/run", "/mnt", "/var/lib/mortar", "/etc/mortar"} {
		if err := os.Chmod(root+d, 0o755); err != nil {
			return err
		}
	}
	for _, d := range s.Share {
		if err := mountAt(d, "", root+d, unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return err
		}
	}
	if err := d.make(root + "/run/disk"); err != nil {
		return err
	}
	var hosts strings.Builder
	hosts.WriteString("127.0.0.1 localhost\n")
	for i := 1; i <= s.Hosts; i++ {
		fmt.Fprintf(&hosts, "%s n%d\n", addr(i), i)
	}
	for name, text := range map[string]string{"hosts": hosts.String(), "hostname": s.Name + "\n"} {
		os.Remove(root + "/etc/" + name) // a bind mount or link below must not be written through
		if err := os.WriteFile(root+"/etc/"+name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	old := root + "/run/old"
	if err := os.Mkdir(old, 0o700); err != nil {
		return err
	}
	if err := unix.PivotRoot(root, old); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Unmount("/run/old", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the machine's root: %w", err)
	}
	if err := os.Remove("/run/old"); err != nil {
		return err
	}
	d.source = strings.TrimPrefix(d.source, root)
	return d.mount("/bricks")
}

func mountAt(source, fstype, target string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", source, target, err)
	}
	return nil
}
