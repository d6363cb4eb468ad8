package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Host is one machine of a cluster.
type Host struct {
	Name string // n1, n2, …
	Addr string // its IPv4 address

	c    *Cluster
	dir  string
	init *helper
}

// Process is a program that was started in a host. Its output goes to the
// host's log files.
type Process struct {
	Cmd *exec.Cmd

	done chan struct{}
	err  error // of Wait; valid once done is closed
}

// Result is what a finished command left.
type Result struct {
	Stdout, Stderr string
	Code           int // exit code; −1 if a signal ended it
	User, System   time.Duration
}

// environment of commands in a host: nothing of the machine's user leaks in.
var environment = []string{
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	"HOME=/run", "LANG=C.UTF-8", "TMPDIR=/tmp",
}

// start starts cmd within the host: a thread enters the host's namespaces,
// forks, and is thrown away.
func (h *Host) start(cmd *exec.Cmd) (*Process, error) {
	if cmd.Env == nil {
		cmd.Env = environment
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	}
	res := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		res <- func() error {
			if err := enter(h.init.cmd.Process.Pid); err != nil {
				return fmt.Errorf("enter %s: %w", h.Name, err)
			}
			if filepath.Base(cmd.Path) == cmd.Path { // looked for on the machine, where it need not be
				path, err := exec.LookPath(cmd.Path)
				if err != nil {
					return err
				}
				cmd.Path, cmd.Err = path, nil
			}
			return cmd.Start()
		}()
	}()
	if err := <-res; err != nil {
		return nil, err
	}
	p := &Process{Cmd: cmd, done: make(chan struct{})}
	go func() {
		// Waited for at once, whoever asks: a process namespace does not end
		// while a zombie in it belongs to a parent outside.
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// enter moves the calling thread into the namespaces of a process.
func enter(pid int) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Setns(fd, unix.CLONE_NEWNS|unix.CLONE_NEWPID|unix.CLONE_NEWUTS|unix.CLONE_NEWIPC|unix.CLONE_NEWNET)
}

// Spawn starts a program that runs on, a daemon say. What it prints is appended
// to a log file called after name.
func (h *Host) Spawn(name string, argv ...string) (*Process, error) {
	log, err := os.OpenFile(filepath.Join(h.dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := &exec.Cmd{Path: argv[0], Args: argv, Dir: "/", Stdout: log, Stderr: log}
	return h.start(cmd)
}

// Log returns everything that programs spawned under that name have printed.
func (h *Host) Log(name string) string {
	b, _ := os.ReadFile(filepath.Join(h.dir, name+".log"))
	return string(b)
}

// Run runs a program to its end. The error says which command failed and with
// what words, the Result is valid nevertheless.
func (h *Host) Run(ctx context.Context, argv ...string) (Result, error) {
	return h.RunInput(ctx, "", argv...)
}

// RunInput is Run with text for the program's standard input.
func (h *Host) RunInput(ctx context.Context, stdin string, argv ...string) (Result, error) {
	var out, errOut bytes.Buffer
	cmd := &exec.Cmd{Path: argv[0], Args: argv, Dir: "/", Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &errOut}
	cmd.WaitDelay = time.Second // a background child that keeps the pipes must not keep us
	p, err := h.start(cmd)
	if err != nil {
		return Result{Code: -1}, fmt.Errorf("%s: %s: %w", h.Name, strings.Join(argv, " "), err)
	}
	err = p.Wait(ctx)
	if ctx.Err() != nil {
		p.Signal(syscall.SIGKILL)
		err = fmt.Errorf("still running: %w", context.Cause(ctx))
		select {
		case <-p.done:
		case <-time.After(2 * time.Second): // stuck in the kernel; its host's end will free it
			return Result{Code: -1}, fmt.Errorf("%s: %s: %w, and SIGKILL does not end it", h.Name, strings.Join(argv, " "), err)
		}
	}
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	r := Result{Stdout: out.String(), Stderr: errOut.String(), Code: cmd.ProcessState.ExitCode(),
		User: cmd.ProcessState.UserTime(), System: cmd.ProcessState.SystemTime()}
	if err != nil {
		return r, fmt.Errorf("%s: %s: %w\n%s%s", h.Name, strings.Join(argv, " "), err, r.Stdout, r.Stderr)
	}
	return r, nil
}

// Dial connects to a TCP address, numbers only, as a process of the host does. It
// gives up after a few seconds.
func (h *Host) Dial(addr string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	res := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked, as in start
		fd, err := unix.PidfdOpen(h.init.cmd.Process.Pid, 0)
		if err == nil {
			err = errors.Join(unix.Setns(fd, unix.CLONE_NEWNET), unix.Close(fd))
		}
		if err != nil {
			res <- result{nil, fmt.Errorf("enter %s: %w", h.Name, err)}
			return
		}
		conn, err := net.DialTimeout("tcp", addr, 5*time.Second) // the socket is made by this thread
		res <- result{conn, err}
	}()
	r := <-res
	return r.conn, r.err
}

// Signal sends a signal, SIGKILL, SIGSTOP or SIGCONT say.
func (p *Process) Signal(s syscall.Signal) error { return p.Cmd.Process.Signal(s) }

// Pid is the process's number as the machine sees it.
func (p *Process) Pid() int { return p.Cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the process's end and returns how it ended, or the context's cause.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Kill ends the process as kill -9 does and waits until it is gone.
func (p *Process) Kill() {
	p.Signal(syscall.SIGKILL)
	<-p.done
}

// KillAll ends every process of the host at once, as a crash of the machine's
// user space does, and returns when they are gone. Mounts stay, without servers.
func (h *Host) KillAll() error { return h.init.ask(request{Verb: "kill"}) }

// FailDisk makes every access to the (XFS) disk an I/O error, while the processes
// go on, until UnmountDisk and MountDisk. What was not flushed is lost.
func (h *Host) FailDisk() error { return h.init.ask(request{Verb: "fail-disk"}) }

// CutPower ends every process and loses what was not flushed to the (XFS)
// disk, which is left unmounted until MountDisk.
func (h *Host) CutPower() error { return h.init.ask(request{Verb: "cut-power"}) }

// UnmountDisk takes /bricks away, as a disk that does not come up at boot does.
func (h *Host) UnmountDisk() error { return h.init.ask(request{Verb: "unmount-disk"}) }

// MountDisk brings /bricks back.
func (h *Host) MountDisk() error { return h.init.ask(request{Verb: "mount-disk"}) }

// Unplug pulls the host's cable: its link goes down.
func (h *Host) Unplug() error { return h.net("unplug", "") }

// Plug puts the cable back.
func (h *Host) Plug() error { return h.net("plug", "") }

// Isolate drops every packet to and from the host; its link stays up.
func (h *Host) Isolate() error { return h.net("isolate", "") }

// Deafen drops every packet to the host, which can still send.
func (h *Host) Deafen() error { return h.net("deafen", "") }

// Mute drops every packet from the host, which can still hear.
func (h *Host) Mute() error { return h.net("mute", "") }

// Part drops every packet between two hosts, in both directions.
func (h *Host) Part(from *Host) error { return h.net("part", from.Name) }

// MendNetwork undoes Isolate, Deafen, Mute and Part for every host.
func (c *Cluster) MendNetwork() error { return c.keeper.ask(request{Verb: "mend"}) }

func (h *Host) net(verb, peer string) error {
	return h.c.keeper.ask(request{Verb: verb, Host: h.Name, Peer: peer})
}

// Processes lists the host's living processes, its process 1 left out.
func (h *Host) Processes() []Proc {
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", h.init.cmd.Process.Pid))
	if err != nil {
		return nil
	}
	var out []Proc
	for _, p := range processes("/proc") {
		if l, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", p.pid)); err != nil || l != ns || p.pid == h.init.cmd.Process.Pid {
			continue
		}
		if st := p.stat(); p.runs(st) { // it may have ended since the link was read
			out = append(out, Proc{Pid: p.pid, Name: st.comm, CPU: st.cpu, RSS: p.rss()})
		}
	}
	return out
}

// Proc is a look at one process.
type Proc struct {
	Pid  int // as the machine sees it
	Name string
	CPU  time.Duration // user and system so far
	RSS  int64         // bytes
}

// Outside is a path in the host as the machine itself reaches it, mounts of the
// host included. What hangs there hangs the caller.
func (h *Host) Outside(path string) string {
	return fmt.Sprintf("/proc/%d/root%s", h.init.cmd.Process.Pid, path)
}
