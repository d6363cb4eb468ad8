// Package cluster makes a handful of machines out of one, for tests and
// benchmarks: each host is a set of Linux namespaces (network, mounts,
// processes, host name) with an address of its own on a private switch, a file
// system of its own, and a disk of its own at /bricks. Commands run in a host
// as they would on a real one; whole hosts lose their power and their cable.
//
// Nothing may stay behind, so the kernel does the cleaning: every host hangs
// on a process that ends when the test's process does, however that ends, and
// with it go the host's processes, mounts, loop devices and links. A keeper
// process, which also holds the switch, outlives the test's process for as
// long as it takes to see that happen, and removes the directory.
//
// The package needs root, and knows nothing of what is tested with it.
package cluster

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Disk is what a host has at /bricks.
type Disk string

const (
	// Dir is a directory of the machine's own disk.
	Dir Disk = "dir"
	// XFS is a new XFS file system on a loop device, with unbuffered access to
	// its image, so caches are not kept twice.
	XFS Disk = "xfs"
	// Tmpfs is memory, for tests that want a small disk to fill.
	Tmpfs Disk = "tmpfs"
)

// Options say what to build.
type Options struct {
	// Hosts is how many, called n1 to nN, with the addresses 10.77.0.11 and up.
	Hosts int
	// Disk is what is mounted at /bricks of each host; default Dir.
	Disk Disk
	// DiskBytes is the size of an XFS (at least 300 MiB) or Tmpfs disk; default 8 GiB.
	DiskBytes int64
	// Delay is the time a packet takes from one host to another, and Rate the
	// bits per second that a host's port carries in each direction. If either
	// is set, a switch in user space carries the packets, else the kernel's.
	Delay time.Duration
	Rate  int64
	// Share lists directories of the machine that every host sees at the same
	// path. Cluster.Dir is always one of them.
	Share []string
}

// Cluster is a running set of hosts. Its methods may be called from several goroutines.
type Cluster struct {
	// Dir is a directory that the machine and all hosts see at the same path.
	// It ends with the cluster.
	Dir string

	opts   Options
	base   string // parent of Dir; all that the cluster leaves on disk
	hosts  []*Host
	keeper *helper
	prints []fingerprint // of the helper processes, to look for what stays

	closeOnce sync.Once
	closeErr  error
}

// Missing says in a sentence why clusters cannot be made here, or returns "".
func Missing() string {
	if os.Geteuid() != 0 {
		return "making network namespaces and FUSE mounts needs root"
	}
	for _, tool := range []string{"ip", "nft", "mount", "umount"} {
		if _, err := exec.LookPath(tool); err != nil {
			return "the program " + tool + " is not installed (test/install-packages installs it)"
		}
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		return "there is no /dev/fuse"
	}
	return ""
}

// Start makes a cluster for a test and ends it with the test, which fails if
// anything stays behind. A test that cannot have one is skipped with the reason.
func Start(t testing.TB, o Options) *Cluster {
	t.Helper()
	if why := Missing(); why != "" {
		t.Skip("SKIPPED: " + why)
	}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			c.logTails(t)
		}
		if err := c.Close(); err != nil {
			t.Errorf("cluster left something behind: %v", err)
		}
	})
	return c
}

// New makes a cluster. The caller closes it.
func New(o Options) (_ *Cluster, err error) {
	if o.Hosts < 1 || o.Hosts > 100 {
		return nil, fmt.Errorf("a cluster of %d hosts: want 1 to 100", o.Hosts)
	}
	if o.Disk == "" {
		o.Disk = Dir
	}
	if o.DiskBytes == 0 {
		o.DiskBytes = 8 << 30
	}
	c := &Cluster{opts: o}
	if c.base, err = os.MkdirTemp("", "mortar-cluster-"); err != nil {
		return nil, err
	}
	c.Dir = filepath.Join(c.base, "share")
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	if err := os.Mkdir(c.Dir, 0o755); err != nil {
		return nil, err
	}
	c.keeper, err = c.start("keeper", spec{Role: roleKeeper, Dir: c.base, Delay: o.Delay, Rate: o.Rate},
		syscall.CLONE_NEWNET)
	if err != nil {
		return nil, err
	}
	for i := 1; i <= o.Hosts; i++ {
		h := &Host{Name: fmt.Sprintf("n%d", i), Addr: addr(i), c: c, dir: filepath.Join(c.base, fmt.Sprintf("n%d", i))}
		if err := os.MkdirAll(h.dir, 0o755); err != nil {
			return nil, err
		}
		s := spec{Role: roleInit, Dir: h.dir, Name: h.Name, Hosts: o.Hosts, Addr: h.Addr,
			Share: append([]string{c.Dir}, o.Share...), Disk: o.Disk, DiskBytes: o.DiskBytes}
		h.init, err = c.start(h.Name, s,
			syscall.CLONE_NEWNS|syscall.CLONE_NEWPID|syscall.CLONE_NEWUTS|syscall.CLONE_NEWIPC|syscall.CLONE_NEWNET)
		if err != nil {
			return nil, err
		}
		c.hosts = append(c.hosts, h)
		if err := c.keeper.ask(request{Verb: "port", Host: h.Name, Pid: h.init.cmd.Process.Pid}); err != nil {
			return nil, err
		}
		if err := h.init.ask(request{Verb: "network"}); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func addr(i int) string { return fmt.Sprintf("10.77.0.%d", 10+i) }

// Host returns the i-th host, from 1.
func (c *Cluster) Host(i int) *Host { return c.hosts[i-1] }

// Hosts returns all hosts in order.
func (c *Cluster) Hosts() []*Host { return c.hosts }

// Close ends every process of every host, takes the hosts down, and waits until
// no process, mount, namespace, loop device or directory of the cluster is
// left; the error names what is. Closing again does nothing more.
func (c *Cluster) Close() error {
	c.closeOnce.Do(func() {
		var errs []error
		for _, h := range c.hosts {
			errs = append(errs, h.init.stop())
		}
		if c.keeper != nil {
			errs = append(errs, c.keeper.stop())
		} else {
			errs = append(errs, os.RemoveAll(c.base))
		}
		errs = append(errs, waitGone(c.base, c.prints))
		c.closeErr = errors.Join(errs...)
	})
	return c.closeErr
}

// logTails shows the end of every log file that processes of the hosts wrote.
func (c *Cluster) logTails(t testing.TB) {
	logs, _ := filepath.Glob(filepath.Join(c.base, "n*", "*.log"))
	for _, name := range logs {
		b, err := os.ReadFile(name)
		if err != nil || len(b) == 0 {
			continue
		}
		const max = 6000
		if len(b) > max {
			b = append([]byte("...\n"), b[len(b)-max:]...)
		}
		t.Logf("---- %s/%s\n%s", filepath.Base(filepath.Dir(name)), filepath.Base(name), b)
	}
}

// helper is a process of ours, started from this very program, that holds
// namespaces. It answers requests over a socket and ends when that closes.
type helper struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when the process was waited for

	mu   sync.Mutex // one conversation at a time
	conn net.Conn
	in   *bufio.Reader
}

// request is what helpers are asked; the answer is a reply.
type request struct {
	Verb string
	Host string `json:",omitempty"`
	Peer string `json:",omitempty"`
	Pid  int    `json:",omitempty"`
	Arg  string `json:",omitempty"`
}

type reply struct{ Err string }

const envRole = "MORTAR_TEST_CLUSTER_HELPER"

func (c *Cluster) start(name string, s spec, flags uintptr) (*helper, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name)
	defer ours.Close()
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(s.Dir, "helper.log"))
	if err != nil {
		conn.Close()
		return nil, err
	}
	defer log.Close()
	text, err := json.Marshal(s)
	if err != nil {
		conn.Close()
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envRole+"="+string(text))
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Setsid: true}
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, fmt.Errorf("cannot start host %s: %w", name, err)
	}
	h := &helper{name: name, cmd: cmd, conn: conn, in: bufio.NewReader(conn), done: make(chan struct{})}
	c.prints = append(c.prints, fingerprintOf(cmd.Process.Pid))
	go func() {
		cmd.Wait()
		close(h.done)
	}()
	if err := h.hear(); err != nil { // it says when it is ready
		text, _ := os.ReadFile(log.Name())
		return nil, errors.Join(fmt.Errorf("%w\n%s", err, text), h.stop())
	}
	return h, nil
}

func (h *helper) ask(r request) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := json.NewEncoder(h.conn).Encode(r); err != nil {
		return fmt.Errorf("%s: %s: %w", h.name, r.Verb, err)
	}
	if err := h.hear(); err != nil {
		return fmt.Errorf("%s: %w", r.Verb, err)
	}
	return nil
}

func (h *helper) hear() error {
	line, err := h.in.ReadBytes('\n')
	if err == io.EOF {
		err = errors.New("its helper process ended")
	}
	if err != nil {
		return fmt.Errorf("%s: %w", h.name, err)
	}
	var r reply
	if err := json.Unmarshal(line, &r); err != nil {
		return fmt.Errorf("%s: %w", h.name, err)
	}
	if r.Err != "" {
		return fmt.Errorf("%s: %s", h.name, r.Err)
	}
	return nil
}

// stop ends the helper and waits for its end, which is also that of every
// process in its process namespace.
func (h *helper) stop() error {
	h.conn.Close()
	select {
	case <-h.done:
		return nil
	case <-time.After(20 * time.Second):
		h.cmd.Process.Kill()
		return fmt.Errorf("%s: helper process %d did not end within 20 s", h.name, h.cmd.Process.Pid)
	}
}

// The main goroutine keeps the main thread, so that threads which entered a
// host's namespaces are always ones that the runtime can throw away.
func init() { runtime.LockOSThread() }
