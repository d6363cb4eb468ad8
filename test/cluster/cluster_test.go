package cluster

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	Main()
	if os.Getenv("CLUSTER_TEST_SINK") != "" {
		sink()
	}
	if how := os.Getenv("CLUSTER_TEST_VICTIM"); how != "" {
		victim(how)
	}
	os.Exit(m.Run())
}

// victim is a test process that does not clean up: it makes a cluster with
// all that a cluster can have, says so, and ends badly.
func victim(how string) {
	c, err := New(Options{Hosts: 2, Disk: XFS, DiskBytes: 512 << 20})
	if err == nil {
		_, err = c.Host(1).Spawn("daemon", "sleep", "1000")
	}
	if err == nil {
		_, err = c.Host(2).Run(context.Background(), "mount", "-t", "tmpfs", "tmpfs", "/mnt")
	}
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	fmt.Println(c.base)
	for _, f := range c.prints {
		fmt.Println(f.pid)
	}
	fmt.Println("ready")
	switch how {
	case "panic":
		panic("as tests do")
	case "exit":
		os.Exit(3)
	}
	select {}
}

// sink takes one connection and swallows what comes.
func sink() {
	l, err := net.Listen("tcp", ":9999")
	if err != nil {
		panic(err)
	}
	fmt.Println("listening")
	conn, err := l.Accept()
	if err != nil {
		panic(err)
	}
	io.Copy(io.Discard, conn)
	os.Exit(0)
}

func run1(t *testing.T, h *Host, argv ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	r, err := h.Run(ctx, argv...)
	if err != nil {
		t.Fatal(err)
	}
	return r.Stdout
}

func pings(h *Host, to string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	// Without ping: a TCP connection is answered, with a refusal if nothing else.
	r, _ := h.Run(ctx, "timeout", "0.4", "bash", "-c", "</dev/tcp/"+to+"/9")
	return strings.Contains(r.Stderr, "refused")
}

func TestHostsAreMachines(t *testing.T) {
	for _, o := range []Options{{Hosts: 3}, {Hosts: 2, Disk: XFS, DiskBytes: 512 << 20}, {Hosts: 2, Disk: Tmpfs, DiskBytes: 1 << 20}} {
		t.Run(string(o.Disk), func(t *testing.T) {
			c := Start(t, o)
			for i, h := range c.Hosts() {
				if got := strings.TrimSpace(run1(t, h, "hostname")); got != h.Name || h.Name != fmt.Sprintf("n%d", i+1) {
					t.Errorf("host name %q of %s", got, h.Name)
				}
				run1(t, h, "sh", "-c", "echo "+h.Name+" | tee /etc/who /var/lib/who /run/who /mnt/who /bricks/who /tmp/who "+c.Dir+"/"+h.Name)
				if got := run1(t, h, "cat", "/etc/who", "/bricks/who", "/tmp/who"); got != strings.Repeat(h.Name+"\n", 3) {
					t.Errorf("%s reads %q", h.Name, got)
				}
				if got := run1(t, h, "sh", "-c", "ls /proc | grep -c '^[0-9]'"); len(strings.TrimSpace(got)) > 1 {
					t.Errorf("%s sees %s processes", h.Name, got)
				}
				for _, other := range c.Hosts() {
					waitFor(t, h.Name+" reaches "+other.Name, func() bool { return pings(h, other.Name) })
				}
			}
			if got := run1(t, c.Host(1), "cat", c.Dir+"/n2"); got != "n2\n" {
				t.Errorf("shared directory: %q", got)
			}
			for _, name := range []string{"/etc/who", "/var/lib/who", "/run/who", "/mnt/who", "/bricks"} {
				if _, err := os.Lstat(name); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s on the machine itself: %v", name, err)
				}
			}
		})
	}
}

func TestProcesses(t *testing.T) {
	c := Start(t, Options{Hosts: 2})
	h := c.Host(1)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()

	r, err := h.Run(ctx, "sh", "-c", "echo out; echo err >&2; exit 7")
	if err == nil || r.Code != 7 || r.Stdout != "out\n" || r.Stderr != "err\n" || !strings.Contains(err.Error(), "n1") {
		t.Errorf("failing command: %+v, %v", r, err)
	}
	if _, err := h.Run(ctx, "no-such-program"); err == nil {
		t.Error("a program that does not exist ran")
	}
	if r, err := h.RunInput(ctx, "text", "cat"); err != nil || r.Stdout != "text" {
		t.Errorf("input: %+v, %v", r, err)
	}
	short, stop := context.WithTimeout(ctx, 100*time.Millisecond)
	defer stop()
	if _, err := h.Run(short, "sleep", "1000"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a command past its time: %v", err)
	}

	p, err := h.Spawn("daemon", "sh", "-c", "echo started; (sleep 999 &); exec sleep 1000")
	if err != nil {
		t.Fatal(err)
	}
	other, err := c.Host(2).Spawn("daemon", "sleep", "1000")
	if err != nil {
		t.Fatal(err)
	}
	for range 5 { // with memory, which takes the kernel a moment to take back
		if _, err := h.Spawn("large", "sh", "-c", `x=$(head -c 40000000 /dev/zero | tr '\0' x); echo large; sleep 1000; echo $x`); err != nil {
			t.Fatal(err)
		}
	}
	waitFor(t, "all have begun", func() bool {
		return h.Log("daemon") == "started\n" && strings.Count(h.Log("large"), "large") == 5 && len(h.Processes()) == 2+2*5
	})
	p.Signal(syscall.SIGSTOP)
	waitFor(t, "it is stopped", func() bool { return process{dir: fmt.Sprintf("/proc/%d", p.Pid())}.stat().state == 'T' })
	p.Signal(syscall.SIGCONT)
	if err := h.KillAll(); err != nil {
		t.Fatal(err)
	}
	if left := h.Processes(); len(left) > 0 {
		t.Errorf("after all were killed: %+v", left)
	}
	if err := p.Wait(ctx); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("killed process: %v", err)
	}
	// The orphan was adopted by process 1, which must not keep its remains.
	waitFor(t, "no remains", func() bool {
		n, _ := strconv.Atoi(strings.TrimSpace(run1(t, h, "sh", "-c", "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l")))
		return n == 0
	})
	select {
	case <-other.Done():
		t.Error("the other host's process died too")
	default:
	}
	run1(t, h, "true") // the host lives on
}

func TestCables(t *testing.T) {
	for name, o := range map[string]Options{"bridge": {Hosts: 3}, "wire": {Hosts: 3, Delay: time.Millisecond}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := Start(t, o)
			a, b, d := c.Host(1), c.Host(2), c.Host(3)
			check := func(what string, ab, ad, bd bool) {
				t.Helper()
				for _, l := range []struct {
					from, to *Host
					want     bool
				}{{a, b, ab}, {b, a, ab}, {a, d, ad}, {b, d, bd}} {
					got := pings(l.from, l.to.Addr)
					for try := 0; l.want && !got && try < 10; try++ { // a busy machine is slow to answer
						got = pings(l.from, l.to.Addr)
					}
					if got != l.want {
						t.Errorf("%s: %s reaches %s: %v, want %v", what, l.from.Name, l.to.Name, got, l.want)
					}
				}
			}
			do := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			mend := func() {
				t.Helper()
				do(c.MendNetwork())
				// Neighbours that were given up are asked for again in a moment.
				waitFor(t, "all are there again", func() bool { return pings(a, b.Addr) && pings(b, a.Addr) && pings(a, d.Addr) })
			}
			check("at first", true, true, true)
			do(a.Unplug())
			check("unplugged", false, false, true)
			do(a.Plug())
			waitFor(t, "the cable carries", func() bool { return pings(a, b.Addr) && pings(a, d.Addr) })
			check("plugged in", true, true, true)
			do(a.Isolate())
			check("isolated", false, false, true)
			mend()
			do(a.Part(b))
			check("parted", false, true, true)
			mend()

			do(a.Mute())
			check("mute", false, false, true)
			mend()
			do(a.Deafen())
			check("deaf", false, false, true)
			mend()
			check("at last", true, true, true)
		})
	}
}

func TestDiskLosesPower(t *testing.T) {
	c := Start(t, Options{Hosts: 1, Disk: XFS, DiskBytes: 512 << 20})
	h := c.Host(1)
	run1(t, h, "sh", "-c", "echo kept > /bricks/kept && sync -f /bricks && echo lost > /bricks/lost")
	if err := h.CutPower(); err != nil {
		t.Fatal(err)
	}
	if got := run1(t, h, "ls", "/bricks"); got != "" {
		t.Errorf("the disk is still there: %q", got)
	}
	if err := h.MountDisk(); err != nil {
		t.Fatal(err)
	}
	if got := run1(t, h, "sh", "-c", "cd /bricks && grep -H . *"); got != "kept:kept\n" {
		t.Errorf("after the power cut: %q, want only what was flushed", got)
	}
	if err := h.UnmountDisk(); err != nil {
		t.Fatal(err)
	}
	if err := h.MountDisk(); err != nil {
		t.Fatal(err)
	}
}

// The wire's delay and rate are what was asked for.
func TestWireTimes(t *testing.T) {
	c := Start(t, Options{Hosts: 2, Delay: 20 * time.Millisecond, Rate: 80e6})
	run1(t, c.Host(1), "bash", "-c", "</dev/tcp/n2/9; true") // addresses resolved
	var begin time.Time
	waitFor(t, "a connection over the wire", func() bool {
		begin = time.Now()
		return pings(c.Host(1), "n2")
	})
	if took := time.Since(begin); took < 40*time.Millisecond {
		t.Errorf("a round trip took %v, want at least 40 ms", took)
	}
	const size = 5 << 20 // 0.52 s at 10 MB/s
	self := c.Dir + "/sink"
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", exe, self).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p, err := c.Host(2).Spawn("sink", "env", "CLUSTER_TEST_SINK=1", self)
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "somebody listens", func() bool { return strings.Contains(c.Host(2).Log("sink"), "listening") })
	begin, machine := time.Now(), Share()
	run1(t, c.Host(1), "bash", "-c", fmt.Sprintf("head -c %d /dev/zero >/dev/tcp/n2/9999", size))
	<-p.Done()
	if took := time.Since(begin); took < 500*time.Millisecond || took > machine.Bound(3*time.Second) {
		t.Errorf("5 MiB over 80 Mbit/s took %v, want a little over 0.5 s; with %s", took, machine)
	}
}

// Whatever way the test's process ends, nothing of its clusters stays.
func TestNothingStays(t *testing.T) {
	if why := Missing(); why != "" {
		t.Skip("SKIPPED: " + why)
	}
	for _, how := range []string{"panic", "exit", "kill"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "CLUSTER_TEST_VICTIM="+how)
			var words bytes.Buffer
			cmd.Stderr = &words
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var base string
			var prints []fingerprint
			for in := bufio.NewScanner(out); in.Scan() && in.Text() != "ready"; {
				if base == "" {
					base = in.Text()
					continue
				}
				pid, _ := strconv.Atoi(in.Text())
				if f := fingerprintOf(pid); f.start != 0 {
					prints = append(prints, f)
				}
			}
			if !filepath.IsAbs(base) {
				t.Fatalf("the victim made no cluster: %s %s", base, &words)
			}
			if how == "kill" {
				if len(prints) != 3 || len(left(base, prints, bootTicks())) < 6 {
					t.Errorf("the search for what is left finds too little: %q", left(base, prints, bootTicks()))
				}
				cmd.Process.Kill()
			}
			cmd.Wait()
			if err := waitGone(base, prints); err != nil {
				t.Error(err)
			}
		})
	}
}

// A namespace of somebody who began when all had ended has a number that was free again.
func TestNumbersOfNamespacesComeBack(t *testing.T) {
	if why := Missing(); why != "" {
		t.Skip("SKIPPED: " + why)
	}
	cmd := exec.Command("unshare", "--mount", "sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	var f fingerprint
	waitFor(t, "it has a namespace of its own", func() bool { f = fingerprintOf(cmd.Process.Pid); return f.ns["mnt"] != "" })
	began := f.start
	f.pid = 0 // somebody else's process is in it
	if got := left("/nowhere", []fingerprint{f}, began); len(got) != 1 || !strings.Contains(got[0], "(sleep) in namespace mnt") && !strings.Contains(got[0], "(unshare) in namespace mnt") {
		t.Errorf("a process from before the end: %q", got)
	}
	if got := left("/nowhere", []fingerprint{f}, began-1); len(got) != 0 {
		t.Errorf("a process from after the end: %q", got)
	}
}

func waitFor(t *testing.T, what string, cond func() bool) {
	t.Helper()
	const patience = time.Minute // nothing here has a bound of its own
	for deadline := time.Now().Add(patience); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}
