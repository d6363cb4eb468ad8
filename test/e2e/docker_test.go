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
	procs     []*cluster.Process
	contained []*cluster.Process // what runs their containers
	ran       bool               // they have run, so they can
	nodes     map[string]string  // machines by the id that the Swarm has given them
	storage   string             // driver for images
}

// dockerImage is an image with nothing but a shell.
const dockerImage = "shell"

// startEngines starts an engine on every machine, and gives it an image. Where no
// engine runs, the test is skipped with the reason.
func startEngines(t *testing.T, p *pool) *engines {
	t.Helper()
	return startEnginesWith(t, p, "vfs")
}

// startEnginesWith is startEngines with a driver for images. "overlay2" is for large
// ones: "vfs" copies the image for every container.
func startEnginesWith(t *testing.T, p *pool, storage string) *engines {
	t.Helper()
	for _, program := range []string{"dockerd", "docker", "containerd", "runc", "busybox"} {
		need(t, program)
	}
	e := &engines{pool: p, storage: storage, procs: make([]*cluster.Process, len(p.Hosts())), contained: make([]*cluster.Process, len(p.Hosts()))}
	image := shellImage(t, p.Dir)
	for i := range p.Hosts() {
		e.startContainerd(i + 1)
		e.startEngine(i + 1)
	}
	for i := range p.Hosts() {
		e.waitEngine(i + 1)
		p.run(i+1, "docker", "import", image, dockerImage)
	}
	e.ran = true
	return e
}

// shellImage makes, in a directory, an archive of an image with nothing but a shell and its tools.
func shellImage(t *testing.T, dir string) (archive string) {
	t.Helper()
	image := filepath.Join(dir, "image")
	if err := os.MkdirAll(image+"/bin", 0o755); err != nil {
		t.Fatal(err)
	}
	busybox, err := exec.LookPath("busybox")
	if err == nil {
		err = exec.Command("cp", busybox, image+"/bin/busybox").Run()
	}
	for _, tool := range []string{"sh", "cat", "sleep", "id", "stat", "touch", "dd", "df", "mkdir", "rm", "ls", "date"} {
		err = errors.Join(err, os.Symlink("busybox", image+"/bin/"+tool))
	}
	if err := errors.Join(err, exec.Command("tar", "-C", image, "-cf", image+".tar", ".").Run()); err != nil {
		t.Fatal(err)
	}
	return image + ".tar"
}

// startContainerd starts what engines run containers with, as its own service, as
// distributions have it: it goes on when an engine dies.
func (e *engines) startContainerd(i int) {
	e.t.Helper()
	config := filepath.Join(e.Dir, "containerd.toml")
	if err := os.WriteFile(config, []byte("version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n"), 0o644); err != nil {
		e.t.Fatal(err)
	}
	p, err := e.Host(i).Spawn("containerd", "containerd", "--config", config, "--root", "/run/containerd-data", "--log-level", "warn")
	if err != nil {
		e.t.Fatal(err)
	}
	e.contained[i-1] = p
}

// startEngine starts the engine of a machine.
func (e *engines) startEngine(i int) {
	e.t.Helper()
	p, err := e.Host(i).Spawn("dockerd", "dockerd", "--data-root", "/run/docker-data", "--exec-root", "/run/docker", "--containerd", "/run/containerd/containerd.sock", "--pidfile", "/run/docker.pid",
		"--storage-driver", e.storage, "--iptables=false", "--bridge", "none", "--cgroup-parent", "/mortar-"+e.Host(i).Name, "--log-level", "warn")
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
			text := fmt.Sprintf("Docker's engine does not run here:\n%s\n%s", e.Host(i).Log("containerd"), e.Host(i).Log("dockerd"))
			if e.ran {
				e.t.Fatal(text)
			}
			e.t.Skip("SKIPPED: " + text)
		default:
		}
		_, err := e.Host(i).Run(e.ctx(10*time.Second), "docker", "info")
		return err
	})
}

// boot starts the daemon and the engine of a machine on which everything has died.
func (e *engines) boot(i int) {
	e.t.Helper()
	e.startDaemon(i)
	e.waitDaemon(i)
	e.startContainerd(i)
	e.startEngine(i)
	e.waitEngine(i)
}

// docker runs a command of the engine of a machine; it must succeed.
func (e *engines) docker(i int, args ...string) string {
	e.t.Helper()
	return strings.TrimSpace(e.run(i, append([]string{"docker"}, args...)...))
}

// container runs a shell in a container with a volume at /data.
func (e *engines) container(i int, volume, script string, flags ...string) string {
	e.t.Helper()
	args := append([]string{"run", "--network", "none", "--stop-signal", "KILL", "-v", volume + ":/data"}, flags...)
	return e.docker(i, append(args, dockerImage, "/bin/sh", "-c", script)...)
}

// refuseDocker runs a command that must fail with words that contain all of the parts.
func (e *engines) refuseDocker(i int, args []string, parts ...string) {
	e.t.Helper()
	e.refuseProgram(i, "docker", args, parts...)
}

// uses are the uses of Docker volumes that the daemon of a machine has written down.
func (e *engines) uses(i int) map[string][]any {
	e.t.Helper()
	var kept struct{ Held map[string][]any }
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
	e.within(15*time.Second, fmt.Sprintf("nothing is mounted on n%d", i), func() error {
		if rest := e.Host(i).Processes(); slices.ContainsFunc(rest, func(p cluster.Proc) bool { return p.Name == "mortar" && p.Pid != e.daemons[i-1].Pid() }) {
			return fmt.Errorf("a mount's process is left: %+v", rest)
		}
		if m := e.mounts(i); len(m) > 0 {
			return fmt.Errorf("mounts: %q", m)
		}
		if u := e.uses(i); len(u) > 0 {
			return fmt.Errorf("uses: %v", u)
		}
		if left, _ := filepath.Glob(e.outside(i, "/run/mortar/docker/*")); len(left) > 0 {
			return fmt.Errorf("mount points are left: %q", left)
		}
		return nil
	})
}

// stopEngines ends everything of Docker's, and what it leaves of the machine's own.
func (e *engines) stopEngines() {
	for _, group := range [][]*cluster.Process{e.procs, e.contained} {
		for _, p := range group {
			p.Signal(syscall.SIGTERM)
		}
		for _, p := range group {
			if p.Wait(e.ctx(20*time.Second)) != nil {
				p.Kill()
			}
		}
	}
	for i := range e.procs {
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
	listed := func(i int, want string) { // of what another machine has done just now, a machine's own copy of the map hears a moment later
		t.Helper()
		p.within(10*time.Second, fmt.Sprintf("the engine of n%d lists %q", i, want), func() error {
			if ls := e.docker(i, "volume", "ls", "--format", "{{.Driver}} {{.Name}}"); ls != want {
				return fmt.Errorf("it lists %q", ls)
			}
			return nil
		})
	}
	for i := range p.Hosts() {
		listed(i+1, "mortar demo")
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
	if r, err := p.Host(1).Run(p.ctx(patience), "docker", "run", "--rm", "--network", "none", "-v", "demo:/data", dockerImage, "dd", "if=/dev/zero", "of=/data/big", "bs=1M", "count=40"); err == nil || !strings.Contains(r.Stderr, "quota") {
		t.Errorf("40 MB into a volume of 20 MB: %v %s", err, r.Stderr)
	}
	e.container(1, "demo", "rm /data/big", "--rm")

	// Two containers of a machine share one mount.
	const beat = "while :; do date +%s >> /data/beat || exit 1; sleep 0.1; done"
	for _, name := range []string{"one", "two"} {
		e.container(2, "demo", strings.Replace(beat, "beat", name, 1), "-d", "--name", name)
	}
	if n := len(e.mounts(2)); n != 1 {
		t.Errorf("%d mounts for two containers", n)
	}
	if n := len(e.uses(2)["demo"]); n != 2 {
		t.Errorf("%d uses for two containers", n)
	}
	e.refuseDocker(1, []string{"volume", "rm", "demo"}, "in use by", "n2:")
	beats := func(name string) {
		t.Helper()
		size := func() int { return len(e.container(1, "demo", "cat /data/"+name, "--rm")) }
		before := size()
		p.within(20*time.Second, name+" writes", func() error {
			if size() <= before {
				return errors.New("it does not")
			}
			return nil
		})
	}
	// The daemon dies; the mount does not.
	p.daemons[1].Kill()
	beats("one")
	p.startDaemon(2)
	p.waitDaemon(2)
	beats("one")
	// The mount's process dies; the next one goes on with the mount.
	pid := p.mountProcess(2)
	syscall.Kill(pid, syscall.SIGKILL)
	beats("one")
	if now := p.mountProcess(2); now == 0 || now == pid {
		t.Errorf("the mount's process is %d, and was %d", now, pid)
	}
	e.docker(2, "rm", "-f", "one")
	p.within(10*time.Second, "one use for one container", func() error {
		if n := len(e.uses(2)["demo"]); n != 1 {
			return fmt.Errorf("there are %d", n)
		}
		return nil
	})
	e.docker(2, "rm", "-f", "two")
	e.nothingMounted(1)
	e.nothingMounted(2)
	if long {
		e.deaths(beat, beats)
		// The bricks believe for a while that the mount that was killed comes back.
		p.within(20*time.Second, "the volume can be removed", func() error {
			_, err := p.Host(3).Run(p.ctx(patience), "docker", "volume", "rm", "demo")
			return err
		})
	} else {
		t.Log("without MORTAR_TEST_LONG=1 neither the engine nor everything on a machine is killed")
		e.docker(3, "volume", "rm", "demo")
	}
	for i := range p.Hosts() {
		listed(i+1, "")
		if subs := p.mortar(i+1, "subvolume", "list", "wp"); strings.Contains(subs, "demo") {
			t.Errorf("subvolume list on n%d:\n%s", i+1, subs)
		}
	}

	// W4, step 2: a volume that lives on one machine only is chosen by its number of copies.
	p.mortar(1, "volume", "create", "here", "n2:/bricks/here")
	p.mortar(1, "volume", "start", "here")
	e.docker(1, "volume", "create", "-d", "mortar", "-o", "replica=1", "-o", "size=20MB", "scratch")
	if got := e.container(1, "scratch", "echo x > /data/f; cat /data/f", "--rm") + e.docker(3, "volume", "inspect", "scratch", "--format", "{{.Status.volume}}"); got != "xhere" {
		t.Errorf("a volume of one copy: %q", got)
	}
	e.nothingMounted(1)
	e.docker(3, "volume", "rm", "scratch")

	// W2, step 3: a bind mount of a directory in a mounted volume serves containers too.
	p.mount(1)
	p.mount(2)
	p.run(1, "mkdir", "/mnt/wp/couch")
	e.container(1, "/mnt/wp/couch", "echo row > /data/doc; exec sleep 1000", "-d", "--name", "couch")
	p.within(20*time.Second, "n2 has what the container wrote", func() error {
		_, err := os.Stat(e.outside(2, "/mnt/wp/couch/doc"))
		return err
	})
	e.docker(1, "rm", "-f", "couch")
	if got := e.container(2, "/mnt/wp/couch", "cat /data/doc", "--rm"); got != "row" {
		t.Errorf("elsewhere the container finds %q", got)
	}

	// The same directory as a Docker volume: it is in use wherever a container has it, and stays.
	e.docker(1, "volume", "create", "-d", "mortar", "-o", "volume=wp", "-o", "subdir=couch", "shared")
	e.container(2, "shared", "exec sleep 1000", "-d", "--name", "holder")
	e.refuseDocker(1, []string{"volume", "rm", "shared"}, "in use by n2 (1)")
	e.docker(2, "rm", "-f", "holder")
	e.docker(1, "volume", "rm", "shared")
	if _, err := os.Stat(e.outside(1, "/mnt/wp/couch/doc")); err != nil {
		t.Errorf("the directory went with the Docker volume: %v", err)
	}
	e.buried(2, 3)
}

// buried kills a mount together with its keeper. The container that had it is removed, and then nothing is in
// the way of removing the volume: it is not believed that the mount comes back.
func (e *engines) buried(at, from int) {
	e.t.Helper()
	e.docker(from, "volume", "create", "-d", "mortar", "-o", "volume=wp", "grave")
	e.container(at, "grave", "exec sleep 1000", "-d", "--name", "grave")
	var before []int
	for _, h := range e.Hosts() {
		before = append(before, len(h.Log("mortar")))
	}
	var mounts []int // a mount of the whole volume there may stay
	for _, proc := range e.Host(at).Processes() {
		if line := readFile(fmt.Sprintf("/proc/%d/cmdline", proc.Pid)); proc.Name == "mortar" && strings.Contains(line, "/docker/grave\x00") {
			mounts = append(mounts, proc.Pid)
			syscall.Kill(proc.Pid, syscall.SIGSTOP) // neither is to replace the other
		}
	}
	if len(mounts) != 2 {
		e.t.Fatalf("processes of the mount: %v", mounts)
	}
	for _, pid := range mounts {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	e.within(5*time.Second, "they are gone", func() error {
		for _, pid := range mounts {
			if readFile(fmt.Sprintf("/proc/%d/cmdline", pid)) != "" {
				return fmt.Errorf("%d is there", pid)
			}
		}
		return nil
	})
	e.docker(at, "rm", "-f", "grave")
	took := e.within(20*time.Second, "the volume can be removed", func() error {
		_, err := e.Host(from).Run(e.ctx(patience), "docker", "volume", "rm", "grave")
		return err
	})
	// Without that word the set waits ten seconds, and says so.
	unheard := strings.Contains(e.Host(at).Log("mortar")[before[at-1]:], "the pool has not heard that a mount has ended")
	for i, h := range e.Hosts() {
		if log := h.Log("mortar")[before[i]:]; !unheard && strings.Contains(log, "session is away") {
			e.t.Errorf("the set has waited for a mount that was dead:\n%s", log)
		}
	}
	e.t.Logf("removed %.1f s after its mount had been killed (heard of: %v)", took.Seconds(), !unheard)
}

// mounts are the lines of a machine's mounts of ours.
func (e *engines) mounts(i int) (lines []string) {
	for line := range strings.Lines(readFile(fmt.Sprintf("/proc/%d/mountinfo", e.daemons[i-1].Pid()))) {
		if strings.Contains(line, " fuse.mortar ") {
			lines = append(lines, line)
		}
	}
	return lines
}

// deaths kills the engine of n2, and all that runs on n3, while containers write.
func (e *engines) deaths(beat string, beats func(name string)) {
	e.t.Helper()
	p := e.pool
	e.container(2, "demo", strings.Replace(beat, "beat", "three", 1), "-d", "--name", "three")
	// The engine dies, and with it, when it starts again, its containers.
	e.procs[1].Kill()
	beats("three")
	e.startEngine(2)
	e.waitEngine(2)
	e.docker(2, "rm", "-f", "three")
	e.nothingMounted(2)
	// Everything dies.
	e.container(3, "demo", beat, "-d", "--name", "four")
	if err := p.Host(3).KillAll(); err != nil {
		e.t.Fatal(err)
	}
	e.boot(3)
	e.docker(3, "start", "four")
	beats("beat")
	e.docker(3, "rm", "-f", "four")
	e.nothingMounted(3)
}
