package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"mortar/test/cluster"
)

// engines are Docker engines, one on each machine of a pool.
type engines struct {
	*pool
	procs []*cluster.Process
}

// dockerImage is an image with nothing but a shell.
const dockerImage = "shell"

// startEngines starts an engine on every machine, and gives it an image. Where no
// engine runs, the test is skipped with the reason.
func startEngines(t *testing.T, p *pool) *engines {
	t.Helper()
	for _, program := range []string{"dockerd", "docker", "containerd", "runc", "busybox"} {
		need(t, program)
	}
	e := &engines{pool: p, procs: make([]*cluster.Process, len(p.Hosts()))}
	image := filepath.Join(p.Dir, "image")
	if err := os.MkdirAll(image+"/bin", 0o755); err != nil {
		t.Fatal(err)
	}
	busybox, err := exec.LookPath("busybox")
	if err == nil {
		err = exec.Command("cp", busybox, image+"/bin/busybox").Run()
	}
	for _, tool := range []string{"sh", "cat", "sleep", "id", "stat", "touch", "dd", "df", "mkdir", "rm", "ls", "true", "head"} {
		err = errors.Join(err, os.Symlink("busybox", image+"/bin/"+tool))
	}
	if err := errors.Join(err, exec.Command("tar", "-C", image, "-cf", image+".tar", ".").Run()); err != nil {
		t.Fatal(err)
	}
	for i := range p.Hosts() {
		e.startEngine(i + 1)
	}
	for i := range p.Hosts() {
		e.waitEngine(i + 1)
		p.run(i+1, "docker", "import", image+".tar", dockerImage)
	}
	return e
}

// startEngine starts the engine of a machine.
func (e *engines) startEngine(i int) {
	e.t.Helper()
	p, err := e.Host(i).Spawn("dockerd", "dockerd", "--data-root", "/run/docker-data", "--exec-root", "/run/docker", "--pidfile", "/run/docker.pid",
		"--storage-driver", "vfs", "--iptables=false", "--bridge", "none", "--cgroup-parent", "/mortar-"+e.Host(i).Name, "--log-level", "warn")
	if err != nil {
		e.t.Fatal(err)
	}
	e.procs[i-1] = p
}

// waitEngine waits until an engine answers.
func (e *engines) waitEngine(i int) {
	e.t.Helper()
	e.within(30*time.Second, fmt.Sprintf("the engine of n%d answers", i), func() error {
		select {
		case <-e.procs[i-1].Done():
			e.t.Skipf("SKIPPED: Docker's engine does not run here:\n%s", e.Host(i).Log("dockerd"))
		default:
		}
		_, err := e.Host(i).Run(e.ctx(10*time.Second), "docker", "info")
		return err
	})
}

// docker runs a command of the engine of a machine; it must succeed.
func (e *engines) docker(i int, args ...string) string {
	e.t.Helper()
	return strings.TrimSpace(e.run(i, append([]string{"docker"}, args...)...))
}

// container runs a shell in a container with a volume at /data.
func (e *engines) container(i int, volume, script string, flags ...string) string {
	e.t.Helper()
	args := append([]string{"run", "--network", "none", "-v", volume + ":/data"}, flags...)
	return e.docker(i, append(args, dockerImage, "/bin/sh", "-c", script)...)
}

// refuseDocker runs a command that must fail with words that contain all of the parts.
func (e *engines) refuseDocker(i int, args []string, parts ...string) {
	e.t.Helper()
	r, err := e.Host(i).Run(e.ctx(patience), append([]string{"docker"}, args...)...)
	if err == nil {
		e.t.Errorf("docker %s succeeded:\n%s", strings.Join(args, " "), r.Stdout)
		return
	}
	for _, part := range parts {
		if !strings.Contains(r.Stdout+r.Stderr, part) {
			e.t.Errorf("docker %s: the message lacks %q:\n%s", strings.Join(args, " "), part, r.Stdout+r.Stderr)
		}
	}
}

// uses are the uses of Docker volumes that the daemon of a machine has written down.
func (e *engines) uses(i int) map[string][]string {
	e.t.Helper()
	var kept struct{ Held map[string][]string }
	raw, err := os.ReadFile(e.outside(i, e.setup.stateDir+"/docker.json"))
	if err == nil {
		err = json.Unmarshal(raw, &kept)
	}
	if err != nil {
		e.t.Fatal(err)
	}
	return kept.Held
}

// nothingMounted waits until a machine has no mount of ours, no use and no process of one.
func (e *engines) nothingMounted(i int) {
	e.t.Helper()
	e.within(10*time.Second, fmt.Sprintf("nothing is mounted on n%d", i), func() error {
		if rest := e.Host(i).Processes(); slices.ContainsFunc(rest, func(p cluster.Proc) bool { return p.Name == "mortar" && p.Pid != e.daemons[i-1].Pid() }) {
			return fmt.Errorf("a mount's process is left: %+v", rest)
		}
		if text := readFile(fmt.Sprintf("/proc/%d/mountinfo", e.daemons[i-1].Pid())); strings.Contains(text, " fuse.mortar ") {
			return errors.New(text)
		}
		if u := e.uses(i); len(u) > 0 {
			return fmt.Errorf("uses: %v", u)
		}
		if _, err := os.Lstat(e.outside(i, "/run/mortar/docker/demo")); err == nil {
			return errors.New("its mount point is left")
		}
		return nil
	})
}

// stopEngines ends everything of Docker's, and what it leaves of the machine's own.
func (e *engines) stopEngines() {
	for i, p := range e.procs {
		p.Signal(syscall.SIGTERM)
		if p.Wait(e.ctx(20*time.Second)) != nil {
			p.Kill()
		}
		for _, parent := range []string{"/sys/fs/cgroup/mortar-", "/sys/fs/cgroup/*/mortar-"} {
			dirs, _ := filepath.Glob(parent + e.Host(i+1).Name)
			for _, dir := range dirs {
				inner, _ := filepath.Glob(dir + "/*")
				for _, d := range append(inner, dir) {
					syscall.Rmdir(d)
				}
			}
		}
	}
}

// TestDocker: a volume that is made through the engine of one machine serves
// containers on all; it is used by as many mounts as there are machines; the engine and
// the daemon may die while containers use it; it is removed when nobody does.
func TestDocker(t *testing.T) {
	p := start(t, setup{mounts: -1})
	e := startEngines(t, p)
	defer e.stopEngines()

	e.docker(1, "volume", "create", "-d", "mortar", "-o", "size=20MB", "-o", "mode=1777", "demo")
	for i := range p.Hosts() {
		if ls := e.docker(i+1, "volume", "ls", "--format", "{{.Driver}} {{.Name}}"); ls != "mortar demo" {
			t.Errorf("volume ls on n%d says %q", i+1, ls)
		}
	}
	if got := e.docker(2, "volume", "inspect", "demo", "--format", "{{.Driver}} {{.Scope}} {{.Status.volume}} {{.Status.directory}} {{.Mountpoint}}"); got != "mortar global wp /demo" {
		t.Errorf("inspect says %q", got)
	}
	e.refuseDocker(1, []string{"volume", "create", "-d", "mortar", "-o", "colour=red", "other"}, `no option "colour"`, "replica")

	e.container(1, "demo", "echo from n1 > /data/file; exec touch /data/touched", "--rm")
	if got := e.container(2, "demo", "cat /data/file; stat -c %a /data", "--rm"); got != "from n1\n1777" {
		t.Errorf("n2 reads %q", got)
	}
	e.nothingMounted(1)
	e.nothingMounted(2)
}
