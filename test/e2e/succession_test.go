package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"mortar/test/cluster"
)

// holding is a process that holds all that can be held of a mount, and works on (workload hold).
type holding struct {
	p    *pool
	proc *cluster.Process
	host int
}

// hold starts one on a host.
func (p *pool) hold(i int, args ...string) *holding {
	p.t.Helper()
	p.run(i, "mkdir", "/mnt/wp/hold")
	proc, err := p.Host(i).Spawn("hold", append([]string{workload, "hold", "-dir", "/mnt/wp/hold"}, args...)...)
	if err != nil {
		p.t.Fatal(err)
	}
	h := &holding{p, proc, i}
	p.within(10*time.Second, "it holds", func() error {
		select {
		case <-proc.Done():
			p.t.Fatalf("the holder has ended: %s", p.Host(i).Log("hold"))
		default:
		}
		if log := p.Host(i).Log("hold"); !strings.Contains(log, "holding\n") {
			return errors.New(log)
		}
		return nil
	})
	return h
}

type heldVerdict struct {
	Operations int64
	LongestMS  float64
	LongestOp  string
	Lost       int64
	Wrong      []string
}

// end has it look whether all is as it left it.
func (h *holding) end() (v heldVerdict) {
	h.p.t.Helper()
	h.proc.Signal(syscall.SIGTERM)
	if err := h.proc.Wait(h.p.ctx(20 * time.Second)); err != nil {
		h.p.t.Errorf("what was held: %v\n%s", err, h.p.Host(h.host).Log("hold"))
	}
	_, out, _ := strings.Cut(h.p.Host(h.host).Log("hold"), "holding\n")
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&v); err != nil {
		h.p.t.Errorf("what it says: %v: %s", err, out)
	}
	return v
}

// mountProcess is the process that serves the mount of a host: the one that listens for its upgrade.
func (p *pool) mountProcess(i int) (pid int) {
	p.t.Helper()
	return p.mortarProcess(i, "mount")
}

// mortarProcess is a process of mortar's on a host, by the command that it runs.
func (p *pool) mortarProcess(i int, command string) (pid int) {
	p.t.Helper()
	for _, proc := range p.Host(i).Processes() {
		raw, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", proc.Pid))
		argv := strings.Split(string(raw), "\x00")
		if proc.Name == "mortar" && len(argv) > 1 && argv[1] == command {
			pid = proc.Pid
		}
	}
	return pid
}

// A mount becomes another program while its files are open, locked, mapped and worked with: nobody
// sees an error, and no operation takes longer than a moment. A program that cannot go on is refused, and
// the mount goes on as it was.
func TestMountUpgrade(t *testing.T) {
	p := start(t, setup{mounts: 2})
	h := p.hold(1)
	pid := p.mountProcess(1)
	machine := cluster.Share()
	for i := range pick(3, 30) {
		out := p.run(1, mortar, "mount", "--upgrade", "/mnt/wp")
		if !strings.Contains(out, "is served by") {
			t.Errorf("upgrade %d: %s", i, out)
		}
	}
	if now := p.mountProcess(1); now != pid {
		t.Errorf("the mount's process is %d, and was %d", now, pid)
	}
	// The lock is still held for other machines.
	if _, err := p.Host(2).Run(p.ctx(patience), "flock", "-n", "/mnt/wp/hold/flock", "true"); err == nil {
		t.Error("another machine was given a lock that is held")
	}
	for i, bad := range []string{"/bin/false", "/no/such/program", "relative"} {
		if said := p.becomes(1, bad); !strings.Contains(said, bad) {
			t.Errorf("%d: asked to become %s the mount says %q", i, bad, said)
		}
	}
	v := h.end()
	t.Logf("%d operations, the longest (%s) took %.1f ms, with %s", v.Operations, v.LongestOp, v.LongestMS, machine)
	if v.LongestMS > ms(machine.Bound(time.Second)) { // 200 on a machine that has nothing else to do
		t.Errorf("%s took %.1f ms", v.LongestOp, v.LongestMS)
	}
	p.identical(1)
}

// becomes asks the mount of a host to become a program, and returns what it says.
func (p *pool) becomes(i int, program string) string {
	p.t.Helper()
	const ask = `import glob,socket,sys
s=socket.socket(socket.AF_UNIX); s.connect(glob.glob("/run/mortar/mount-*.sock")[0]); s.sendall((sys.argv[1]+"\n").encode())
print(s.makefile().read())`
	return p.run(i, "python3", "-c", ask, program)
}

// The process of a mount is killed again and again, while its files are open, locked, mapped and worked with.
// Every change is carried out once; what was acknowledged and had not arrived is reported by fsync or close.
func TestMountKilled(t *testing.T) {
	p := start(t, setup{mounts: 2})
	h := p.hold(1, "-lossy")
	for range pick(3, 30) {
		pid := p.mountProcess(1)
		syscall.Kill(pid, syscall.SIGKILL)
		p.within(5*time.Second, "another process serves the mount", func() error {
			if now := p.mountProcess(1); now == 0 || now == pid {
				return fmt.Errorf("it is %d, and was %d", now, pid)
			}
			_, err := p.Host(1).Run(p.ctx(patience), "sh", "-c", "echo x > /mnt/wp/probe && rm /mnt/wp/probe")
			return err
		})
		if long {
			time.Sleep(13 * time.Second) // one that is killed too often is given up
		}
	}
	if _, err := p.Host(2).Run(p.ctx(patience), "flock", "-n", "/mnt/wp/hold/flock", "true"); err == nil {
		t.Error("another machine was given a lock that is held")
	}
	v := h.end()
	t.Logf("%d operations, the longest (%s) took %.1f ms; %d times writes were lost, and somebody was told", v.Operations, v.LongestOp, v.LongestMS, v.Lost)
	p.identical(1)
}

// switches is how often the threads of a process have begun to wait.
func switches(t *testing.T, pid int) (n int) {
	t.Helper()
	all, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(all) == 0 {
		t.Fatalf("process %d has no threads: %v", pid, err)
	}
	for _, path := range all {
		text, _ := os.ReadFile(path) // a thread may have ended
		if _, rest, ok := strings.Cut(string(text), "\nvoluntary_ctxt_switches:"); ok {
			var of int
			fmt.Sscan(rest, &of)
			n += of
		}
	}
	return n
}

// A mount's keeper sleeps whatever the mount does. If both are killed the mount is gone, and says so.
func TestMountAndKeeperKilled(t *testing.T) {
	p := start(t, setup{hosts: 1})
	p.run(1, "sh", "-c", "echo there > /mnt/wp/f")
	keeper, serving := p.mortarProcess(1, "mount-keeper"), p.mountProcess(1)
	slept, served := switches(t, keeper), switches(t, serving)
	p.run(1, "sh", "-c", "for i in $(seq 3000); do : < /mnt/wp/f; done")
	slept, served = switches(t, keeper)-slept, switches(t, serving)-served
	t.Logf("3000 opens: the keeper was woken %d times, the mount's process %d times", slept, served)
	if slept > 500 { // its runtime looks around some 60 times before it sleeps
		t.Errorf("the keeper was woken %d times by 3000 opens", slept)
	}
	for _, proc := range p.Host(1).Processes() {
		if proc.Pid == keeper && proc.RSS > 8<<20 { // its own are 2 MB; 16 with what the kernel maps of the program
			t.Errorf("the keeper has %d kB resident", proc.RSS>>10)
		}
	}
	if err := p.Host(1).KillAll(); err != nil {
		t.Fatal(err)
	}
	<-p.daemons[0].Done()
	p.within(5*time.Second, "the mount says that it is gone", func() error {
		r, err := p.Host(1).Run(p.ctx(patience), "cat", "/mnt/wp/f")
		if err == nil || !strings.Contains(r.Stderr, "not connected") {
			return fmt.Errorf("%q, %v", r.Stdout, err)
		}
		return nil
	})
	p.run(1, "umount", "/mnt/wp")
	p.startDaemon(1)
	p.waitDaemon(1)
	p.mount(1)
	if got := p.run(1, "cat", "/mnt/wp/f"); got != "there\n" {
		t.Errorf("read %q", got)
	}
}
