// Package locks is a table of what POSIX and Linux's manual pages say of file locks
// between processes: fcntl's, which a process has, and flock's and F_OFD_SETLK's, which
// an open file has.
//
// A case is a script. Each line is a process, named by a capital letter, a call,
// and what is expected of it:
//
//	A open x f                  # opens file f for reading and writing as x; "r", "w" and "a" follow for other modes
//	A dup x y                   # y is the same open file
//	A close x
//	A flock x ex                # ex, sh or un; must succeed at once
//	B flock x sh = EAGAIN       # must fail so, at once
//	A fcntl x w 0 10            # w, r or u; start and length, 0: to the end
//	A ofd x w 0 10              # the same for the open file
//	B getlk x w 0 0 = w 0 10    # who is in the way: kind, start and length; or free
//	B wait flock x ex = blocks  # waits for the lock, and has not got it yet
//	B wakes                     # gets it now
//	B wakes = EDEADLK           # its wait ends so
//	B signal                    # a signal that it handles interrupts its wait
//	A fork C                    # C has A's descriptors from now on
//	A exec                      # A is another program, with its descriptors
//	A exit
//	A kill
//	soon B flock x ex           # tried again until it is as expected
//
// "@mortar" in front of a line has it run on volumes alone, "@!mortar" elsewhere.
// Processes run on the mounts of a Place in turn, A on the first; a forked one on its parent's.
package locks

import (
	"bufio"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"mortar/test/cluster"
)

//go:embed cases.txt
var cases string

// A Place is a directory to try the table in.
type Place struct {
	Mortar bool
	Dirs   []string // as seen through each of one or more mounts
}

const (
	// blocked is how long a call must not have returned to be taken for waiting.
	blocked = 60 * time.Millisecond
	// wakeLimit is how soon a waiter must have the lock that was let go. One of the
	// table's may miss it: so long can a busy machine make anybody wait.
	wakeLimit = 100 * time.Millisecond
	// patience is how long anything may take.
	patience = 10 * time.Second
)

// Run puts the table to a place. It returns how many lines were run, and how long
// the slowest waiter took to wake.
func Run(t *testing.T, p Place) (lines int, wake time.Duration) {
	t.Helper()
	machine := cluster.Share()
	var wakes []time.Duration
	var title string
	var script []string
	flush := func() {
		if title == "" {
			return
		}
		n := 0
		t.Run(strings.ReplaceAll(title, " ", "_"), func(t *testing.T) {
			r := &run{t: t, p: p, dir: strings.ReplaceAll(title, " ", "-"), procs: map[string]*proc{}}
			defer r.end()
			if err := os.Mkdir(filepath.Join(p.Dirs[0], r.dir), 0o755); err != nil {
				t.Fatal(err)
			}
			for _, l := range script {
				if err := r.line(l); err != nil {
					t.Fatalf("%s: %v", l, err)
				}
				n++
			}
			wakes = append(wakes, r.wakes...)
		})
		lines += n
	}
	for l := range strings.Lines(cases) {
		l, _, _ = strings.Cut(strings.TrimSpace(l), "#")
		if l = strings.TrimSpace(l); l == "" {
			continue
		}
		if rest, ok := strings.CutPrefix(l, "case "); ok {
			flush()
			title, script = rest, nil
			continue
		}
		only, rest, _ := strings.Cut(l, " ")
		switch only {
		case "@mortar", "@!mortar":
			if p.Mortar != (only == "@mortar") {
				continue
			}
			l = rest
		}
		script = append(script, l)
	}
	flush()
	late, limit := 0, machine.Bound(wakeLimit)
	for _, took := range wakes {
		wake = max(wake, took)
		if took > limit {
			late++
		}
	}
	if late > 1 {
		t.Errorf("%d waiters had to wait for longer than %v, one for %v; with %s", late, limit, wake, machine)
	}
	return lines, wake
}

// run is one case.
type run struct {
	t       *testing.T
	p       Place
	dir     string
	procs   map[string]*proc
	started int
	last    time.Time       // when the line before had its answer
	wakes   []time.Duration // how long waiters took
}

// proc is a process, and where its answers come from.
type proc struct {
	cmd     *exec.Cmd // nil: a forked one
	in      *os.File
	answers chan string
	at      int // which mount
	tid     int // of the thread that makes the calls
}

func (r *run) end() {
	for _, p := range r.procs {
		p.in.Close()
		if p.cmd != nil {
			p.cmd.Process.Kill()
			p.cmd.Wait()
		}
	}
}

func (r *run) line(l string) error {
	l, soon := strings.CutPrefix(l, "soon ")
	call, want, _ := strings.Cut(l, " = ")
	name, call, _ := strings.Cut(call, " ")
	p := r.procs[name]
	if p == nil {
		var err error
		if p, err = r.start(r.started % len(r.p.Dirs)); err != nil {
			return err
		}
		r.procs[name] = p
		r.started++
	}
	begun := r.last
	defer func() { r.last = time.Now() }()
	verb, rest, _ := strings.Cut(call, " ")
	switch verb {
	case "kill", "exit", "signal":
		if verb == "signal" {
			return unix.Tgkill(p.cmd.Process.Pid, p.tid, unix.SIGUSR1)
		}
		if verb == "kill" {
			p.cmd.Process.Kill()
		} else {
			p.send("exit")
		}
		p.cmd.Wait()
		p.in.Close()
		delete(r.procs, name)
		return nil
	case "wakes":
		got, err := p.answer(patience)
		if err != nil {
			return err
		}
		if got == "ok" {
			r.wakes = append(r.wakes, time.Since(begun))
		}
		return compare(got, want)
	case "fork":
		child := &proc{at: p.at}
		theirs, err := child.connect()
		if err != nil {
			return err
		}
		defer theirs[0].Close()
		defer theirs[1].Close()
		// The parent opens the pipes by way of /proc, and passes them on.
		got, err := p.ask(fmt.Sprintf("fork /proc/%d/fd/%d /proc/%d/fd/%d", os.Getpid(), theirs[0].Fd(), os.Getpid(), theirs[1].Fd()))
		if err != nil {
			return err
		}
		r.procs[rest] = child
		if err := compare(got, want); err != nil {
			return err
		}
		return child.ready()
	case "exec":
		p.send("exec")
		return p.ready()
	}
	if want == "blocks" {
		p.send(call)
		return p.waits()
	}
	for begin := time.Now(); ; {
		got, err := p.ask(call)
		if err != nil {
			return err
		}
		err = compare(got, want)
		if err == nil || !soon || time.Since(begin) > patience {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

func compare(got, want string) error {
	if want == "" {
		want = "ok"
	}
	if got != want {
		return fmt.Errorf("answered %q, want %q", got, want)
	}
	return nil
}

func (p *proc) send(call string) { fmt.Fprintln(p.in, call) }

func (p *proc) ask(call string) (string, error) {
	p.send(call)
	return p.answer(patience)
}

func (p *proc) answer(limit time.Duration) (string, error) {
	select {
	case got, ok := <-p.answers:
		if !ok {
			return "", errors.New("the process has ended")
		}
		return got, nil
	case <-time.After(limit):
		return "", fmt.Errorf("no answer for %v", limit)
	}
}

// waits returns when a call that was sent has begun to wait. A busy machine may take its time before the
// process makes it, and a signal that came first would end nothing.
func (p *proc) waits() error {
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		// proc(5): the number of the call that a thread sleeps in.
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", p.tid))
		number, _, _ := strings.Cut(string(text), " ")
		if n, err := strconv.Atoi(number); err == nil && (n == unix.SYS_FLOCK || n == unix.SYS_FCNTL) {
			break
		}
		if len(p.answers) > 0 {
			break
		}
		if time.Since(begin) > patience {
			return fmt.Errorf("not made for %v: the thread is in %q", patience, text)
		}
	}
	select {
	case got := <-p.answers:
		return fmt.Errorf("answered %q, want it to wait", got)
	case <-time.After(blocked):
		return nil
	}
}

// connect makes the pipes to a process, and returns its ends.
func (p *proc) connect() (theirs [2]*os.File, err error) {
	in, ours, err := os.Pipe()
	if err != nil {
		return theirs, err
	}
	from, out, err := os.Pipe()
	if err != nil {
		return theirs, err
	}
	p.in, p.answers = ours, make(chan string, 16)
	go func() { // ends with the process
		defer close(p.answers)
		defer from.Close()
		for s := bufio.NewScanner(from); s.Scan(); {
			p.answers <- s.Text()
		}
	}()
	return [2]*os.File{in, out}, nil
}

func (r *run) start(at int) (*proc, error) {
	p := &proc{at: at}
	theirs, err := p.connect()
	if err != nil {
		return nil, err
	}
	defer theirs[0].Close()
	defer theirs[1].Close()
	p.cmd = exec.Command("/proc/self/exe")
	p.cmd.Env = append(os.Environ(), agentEnv+"="+filepath.Join(r.p.Dirs[at], r.dir))
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = theirs[0], theirs[1], os.Stderr
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	return p, p.ready()
}

// ready waits until a new program says that it is.
func (p *proc) ready() error {
	got, err := p.answer(patience)
	if err != nil {
		return err
	}
	_, err = fmt.Sscanf(got, "ready %d", &p.tid)
	return err
}

// agentEnv has a test binary be a process of the table, see Main. It is the directory.
const agentEnv = "MORTAR_LOCKS_AGENT"

// heldEnv has the descriptors that a process begins with, name=number.
const heldEnv = "MORTAR_LOCKS_HELD"

// Main is to be called first by the TestMain of whoever calls Run. In a
// process of the table it does not return.
func Main() {
	if dir := os.Getenv(agentEnv); dir != "" {
		os.Exit(agent(dir))
	}
}

func agent(dir string) int {
	runtime.LockOSThread()
	if err := interruptible(unix.SIGUSR1); err != nil {
		fmt.Println(err)
		return 1
	}
	fds := map[string]int{}
	for _, s := range strings.Fields(os.Getenv(heldEnv)) {
		name, number, _ := strings.Cut(s, "=")
		fds[name], _ = strconv.Atoi(number)
	}
	fmt.Println("ready", unix.Gettid())
	for s := bufio.NewScanner(os.Stdin); s.Scan(); {
		f := strings.Fields(s.Text())
		if f[0] == "exit" {
			return 0
		}
		answer, err := do(dir, fds, f)
		var e unix.Errno
		switch {
		case errors.As(err, &e):
			answer = unix.ErrnoName(e)
		case err != nil:
			answer = err.Error()
		case answer == "":
			answer = "ok"
		}
		fmt.Println(answer)
	}
	return 0
}

// interruptible has a signal end the system call that it arrives in. Go
// has system calls go on after all signals.
func interruptible(sig unix.Signal) error {
	signal.Notify(make(chan os.Signal, 1), sig)
	var action struct {
		handler  uintptr
		flags    uint64
		restorer uintptr
		mask     uint64
	}
	const saRestart = 0x10000000
	if _, _, e := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), 0, uintptr(unsafe.Pointer(&action)), 8, 0, 0); e != 0 {
		return fmt.Errorf("sigaction: %w", e)
	}
	action.flags &^= saRestart
	if _, _, e := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&action)), 0, 8, 0, 0); e != 0 {
		return fmt.Errorf("sigaction: %w", e)
	}
	return nil
}

func do(dir string, fds map[string]int, f []string) (string, error) {
	wait := f[0] == "wait"
	if wait {
		f = f[1:]
	}
	held := func() string {
		var b strings.Builder
		for name, fd := range fds {
			unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0)
			fmt.Fprintf(&b, " %s=%d", name, fd)
		}
		return heldEnv + "=" + b.String()
	}
	switch f[0] {
	case "open":
		mode := unix.O_RDWR
		if len(f) > 3 {
			mode = map[string]int{"r": unix.O_RDONLY, "w": unix.O_WRONLY, "a": unix.O_RDWR | unix.O_APPEND}[f[3]]
		}
		fd, err := unix.Open(filepath.Join(dir, f[2]), mode|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return "", err
		}
		fds[f[1]] = fd
		return "", nil
	case "dup":
		fd, err := unix.FcntlInt(uintptr(fds[f[1]]), unix.F_DUPFD_CLOEXEC, 3)
		fds[f[2]] = fd
		return "", err
	case "close":
		fd := fds[f[1]]
		delete(fds, f[1])
		return "", unix.Close(fd)
	case "fork":
		in, err := os.Open(f[1])
		if err != nil {
			return "", err
		}
		defer in.Close()
		out, err := os.OpenFile(f[2], os.O_WRONLY, 0)
		if err != nil {
			return "", err
		}
		defer out.Close()
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), held())
		cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, os.Stderr
		return "", cmd.Start()
	case "exec":
		return "", unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), held()))
	}
	fd, ok := fds[f[1]]
	if !ok {
		return "", fmt.Errorf("no descriptor %s", f[1])
	}
	if f[0] == "flock" {
		how := map[string]int{"ex": unix.LOCK_EX, "sh": unix.LOCK_SH, "un": unix.LOCK_UN}[f[2]]
		if !wait {
			how |= unix.LOCK_NB
		}
		return "", unix.Flock(fd, how)
	}
	kinds := map[string]int16{"r": unix.F_RDLCK, "w": unix.F_WRLCK, "u": unix.F_UNLCK}
	start, err1 := strconv.ParseInt(f[3], 10, 64)
	length, err2 := strconv.ParseInt(f[4], 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return "", err
	}
	l := unix.Flock_t{Type: kinds[f[2]], Whence: io.SeekStart, Start: start, Len: length}
	cmd := 0
	switch f[0] {
	case "fcntl":
		cmd = unix.F_SETLK
		if wait {
			cmd = unix.F_SETLKW
		}
	case "ofd":
		cmd = unix.F_OFD_SETLK
		if wait {
			cmd = unix.F_OFD_SETLKW
		}
	case "getlk":
		cmd = unix.F_GETLK
	default:
		return "", fmt.Errorf("no call %q", f[0])
	}
	if err := unix.FcntlFlock(uintptr(fd), cmd, &l); err != nil || f[0] != "getlk" {
		return "", err
	}
	if l.Type == unix.F_UNLCK {
		return "free", nil
	}
	for k, v := range kinds {
		if v == l.Type {
			return fmt.Sprintf("%s %d %d", k, l.Start, l.Len), nil
		}
	}
	return "", fmt.Errorf("a lock of type %d", l.Type)
}
