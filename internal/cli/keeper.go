package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"mortar/internal/daemon"
	"mortar/internal/estate"
	"mortar/internal/footprint"
	"mortar/internal/mount"
)

// A mount survives its process. Beside it runs a keeper, this program again, that does nothing but
// have open what the process has (/dev/fuse and its estate) and wait for its end. If
// that comes unannounced, it starts the next process of the mount. The process in turn
// starts another keeper if that ends. Every process has a keeper of its own: the one that
// comes next dismisses the keeper that started it.
//
// A process that gives way to another program (mortar mount --upgrade) becomes it, by exec, and
// its keeper goes on watching until the new program has one of its own. If the new
// program fails before, the old one, which the keeper is of, goes on.

// heirEnv has the process be the next one of a mount: descriptors of /dev/fuse, of the estate, of the
// keeper's connection, and of somebody who waits to hear how it went; −1 for none.
const heirEnv = "MORTAR_MOUNT_HEIR"

// deathsEnv is when the processes before ended unannounced lately, in Unix seconds.
const deathsEnv = "MORTAR_MOUNT_DEATHS"

// checkEnv has the program say whether it could be the next process.
const checkEnv = "MORTAR_MOUNT_CHECK"

const (
	keeperCommand = "mount-keeper"
	// maxDeaths within deathsWithin, and the keeper lets the mount go.
	maxDeaths    = 5
	deathsWithin = time.Minute

	wordKeeping = "k" // from the keeper: it has what it needs
	wordWatch   = "w" // to it: the mount is its own from now on
	wordBye     = "b" // to it: the mount has ended, or has another keeper
)

// heir is what a process has from the one before it.
type heir struct {
	before *daemon.MountBefore
	estate int
	keeper *os.File // nil: none
	asked  *os.File // nil: nobody
}

// readHeir returns what heirEnv says, nil if nothing.
func readHeir() (*heir, error) {
	value := os.Getenv(heirEnv)
	if value == "" {
		return nil, nil
	}
	os.Unsetenv(heirEnv)
	var fd [4]int
	if _, err := fmt.Sscanf(value, "%d,%d,%d,%d", &fd[0], &fd[1], &fd[2], &fd[3]); err != nil {
		return nil, fmt.Errorf("%s=%s: %w", heirEnv, value, err)
	}
	file := func(fd int, name string) *os.File {
		if fd < 0 {
			return nil
		}
		syscall.CloseOnExec(fd)
		return os.NewFile(uintptr(fd), name)
	}
	syscall.CloseOnExec(fd[0])
	left, err := estate.Read(fd[1])
	unix.Close(fd[1])
	if err != nil {
		return nil, err
	}
	return &heir{before: &daemon.MountBefore{Fuse: fd[0], Left: left}, keeper: file(fd[2], "keeper"), asked: file(fd[3], "asked")}, nil
}

// succession is the part of a mount's process that sees to the next one.
type succession struct {
	a    *app
	cfg  daemon.MountConfig
	heir *heir // nil: this is the first process

	life context.Context // until the mount has ended
	end  context.CancelFunc
	wg   sync.WaitGroup

	mu     sync.Mutex
	keeper *os.File // nil: none
}

// serving is daemon.MountConfig.Serving.
func (s *succession) serving(m *daemon.MountServing) (ended func()) {
	if m.Survives() {
		if err := s.keep(m); err != nil {
			s.cfg.Log.Warn("the mount has no keeper: it ends if its process is killed", "error", err)
		}
	}
	if s.heir != nil {
		dismiss(s.heir.keeper)
	}
	s.mu.Lock()
	tell(s.keeper, wordWatch)
	s.mu.Unlock()
	ln, err := s.listen()
	if err != nil {
		s.cfg.Log.Warn("the mount cannot be upgraded in place", "error", err)
	} else {
		s.wg.Go(func() { s.serve(ln, m) })
	}
	return func() {
		s.end()
		s.mu.Lock()
		dismiss(s.keeper)
		s.mu.Unlock()
		if ln != nil {
			ln.Close()
		}
		s.wg.Wait()
	}
}

// tell sends a keeper a word, if there is one.
func tell(keeper *os.File, word string) {
	if keeper != nil {
		keeper.WriteString(word)
	}
}

// dismiss has a keeper end, if there is one.
func dismiss(keeper *os.File) {
	if keeper != nil {
		tell(keeper, wordBye)
		keeper.Close()
	}
}

// keep starts a keeper, and another one should it end.
func (s *succession) keep(m *daemon.MountServing) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	theirs := os.NewFile(uintptr(fds[1]), "keeper")
	defer theirs.Close()
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return err
	}
	ours := os.NewFile(uintptr(fds[0]), "keeper")
	dup := func(fd int) (*os.File, error) {
		d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		return os.NewFile(uintptr(d), "inherited"), err
	}
	fuse, err := dup(m.Fuse(fds[0]))
	if err != nil {
		ours.Close()
		return err
	}
	defer fuse.Close()
	left, err := dup(m.Estate())
	if err != nil {
		ours.Close()
		return err
	}
	defer left.Close()
	cmd := exec.Command(selfPath(), append([]string{keeperCommand, "--"}, s.a.args...)...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { // its own process and those it starts choose again
		return strings.HasPrefix(v, "GOMAXPROCS=") || strings.HasPrefix(v, "GODEBUG=") || strings.HasPrefix(v, "GOGC=")
	})
	cmd.Env = append(cmd.Env, "GOMAXPROCS=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{theirs, fuse, left}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		ours.Close()
		return err
	}
	theirs.Close()
	word := make([]byte, 1)
	ours.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := ours.Read(word); err != nil || string(word) != wordKeeping {
		ours.Close()
		cmd.Process.Kill()
		cmd.Wait()
		return fmt.Errorf("the keeper does not answer: %w", err)
	}
	ours.SetReadDeadline(time.Time{})
	s.mu.Lock()
	s.keeper = ours
	s.mu.Unlock()
	s.wg.Go(func() {
		ours.Read(word) // it says nothing more
		cmd.Wait()
		s.mu.Lock()
		again := s.life.Err() == nil && s.keeper == ours
		if again {
			s.keeper = nil
			ours.Close()
		}
		s.mu.Unlock()
		if !again {
			return
		}
		s.cfg.Log.Warn("the mount's keeper has ended, and gets a successor")
		if !s.pause(keeperPause) {
			return
		}
		if err := s.keep(m); err != nil {
			s.cfg.Log.Warn("the mount has no keeper: it ends if its process is killed", "error", err)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.life.Err() != nil {
			dismiss(s.keeper)
			return
		}
		tell(s.keeper, wordWatch)
	})
	return nil
}

// keeperPause keeps a keeper that cannot live from taking the machine's time.
const keeperPause = 100 * time.Millisecond

// pause waits, and reports whether the mount goes on.
func (s *succession) pause(d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-s.life.Done():
		return false
	}
}

// selfPath is a path of the program that this process runs, also when another one was put in its place.
func selfPath() string {
	const proc = "/proc/self/exe"
	path, err := os.Executable()
	if err != nil {
		return proc
	}
	a, err := os.Stat(path)
	b, berr := os.Stat(proc)
	if err != nil || berr != nil || !os.SameFile(a, b) {
		return proc
	}
	return path
}

// socketOf is where a mount hears of an upgrade.
func socketOf(runDir string, device uint64) string {
	return filepath.Join(runDir, fmt.Sprintf("mount-%d-%d.sock", unix.Major(device), unix.Minor(device)))
}

// listen opens the socket on which the mount is told of a newer program.
func (s *succession) listen() (net.Listener, error) {
	device, err := mount.DeviceOf(s.cfg.Dir)
	if err != nil {
		return nil, err
	}
	path := socketOf(s.cfg.RunDir, device)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := os.MkdirAll(s.cfg.RunDir, 0o755); err != nil {
		return nil, err
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false)
	l := &ownListener{UnixListener: ln, path: path}
	if err = os.Chmod(path, 0o600); err == nil {
		l.own, err = os.Stat(path)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// ownListener takes its socket away with it, unless another mount has put its own there: the number of a
// device that is unmounted is given again at once.
type ownListener struct {
	*net.UnixListener
	path string
	own  os.FileInfo
}

// Close implements net.Listener.
func (l *ownListener) Close() error {
	if now, err := os.Stat(l.path); err == nil && os.SameFile(now, l.own) {
		os.Remove(l.path)
	}
	return l.UnixListener.Close()
}

// maxProgram is the longest path of a program that the mount is told.
const maxProgram = 4096

// serve answers those who want the mount to become another program.
func (s *succession) serve(ln net.Listener, m *daemon.MountServing) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		s.answer(conn.(*net.UnixConn), m)
	}
}

func (s *succession) answer(conn *net.UnixConn, m *daemon.MountServing) {
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	heard := context.AfterFunc(s.life, func() { conn.SetReadDeadline(time.Now()) })
	program, err := bufio.NewReader(io.LimitReader(conn, maxProgram)).ReadString('\n')
	heard()
	if err == nil {
		err = s.become(m, strings.TrimSuffix(program, "\n"), conn)
	}
	if s.life.Err() != nil {
		err = errEnds
	} else {
		s.cfg.Log.Warn("the mount goes on with the program that it has", "error", err)
	}
	fmt.Fprintln(conn, err)
}

var errEnds = errors.New("the mount ends")

// become replaces this process by another program. It returns if it cannot.
func (s *succession) become(m *daemon.MountServing, program string, asked *net.UnixConn) error {
	if !filepath.IsAbs(program) {
		return fmt.Errorf("%q is not the path of a program", program)
	}
	if err := s.check(m, program); err != nil {
		return err
	}
	f, err := asked.File() // the new program says how it went
	if err != nil {
		return err
	}
	defer f.Close()
	for until := time.Now().Add(becomeFor); ; {
		err := s.exec(m, program, int(f.Fd()))
		if !errors.Is(err, daemon.ErrNotNow) || time.Now().After(until) || !s.pause(becomePause) {
			return err
		}
	}
}

// A moment at which a busy mount can give way may not be the first that is tried. Each try holds up whoever
// works with it; in between he goes on.
const (
	becomeFor   = 5 * time.Second
	becomePause = 200 * time.Millisecond
)

// exec replaces this process by another program, which tells the descriptor asked how it went. It
// returns if it cannot.
func (s *succession) exec(m *daemon.MountServing, program string, asked int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.life.Err() != nil {
		return errEnds
	}
	return m.Yield(s.life, func(fuse, left int) error {
		fds := []int{fuse, left, -1, asked}
		if s.keeper != nil {
			conn, err := s.keeper.SyscallConn()
			if err != nil {
				return err
			}
			conn.Control(func(fd uintptr) { fds[2] = int(fd) })
		}
		syscall.ForkLock.Lock() // nobody else is to inherit them
		defer syscall.ForkLock.Unlock()
		for _, fd := range fds {
			if fd >= 0 {
				unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0)
			}
		}
		env := append(os.Environ(), fmt.Sprintf("%s=%d,%d,%d,%d", heirEnv, fds[0], fds[1], fds[2], fds[3]))
		err := syscall.Exec(program, s.a.args, env)
		for _, fd := range fds {
			if fd >= 0 {
				syscall.CloseOnExec(fd)
			}
		}
		return fmt.Errorf("run %s: %w", program, err)
	})
}

// check has a program say whether it can go on with the mount. The mount goes on meanwhile.
func (s *succession) check(m *daemon.MountServing, program string) error {
	d, err := unix.FcntlInt(uintptr(m.Estate()), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return err
	}
	left := os.NewFile(uintptr(d), "estate")
	defer left.Close()
	ctx, cancel := context.WithTimeout(s.life, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, s.a.args[1:]...)
	cmd.Args[0] = s.a.args[0]
	cmd.Env = append(os.Environ(), checkEnv+"=1")
	cmd.ExtraFiles = []*os.File{left}
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if said := strings.TrimSpace(string(out)); err != nil || said != checkOK {
		return fmt.Errorf("%s cannot go on with this mount: %w: %s", program, errors.Join(err, errors.New("it was asked")), said)
	}
	return nil
}

const checkOK = "this program can go on with the mount"

// checked answers check.
func (a *app) checked(o mount.Options) error {
	greeting, err := estate.Greeting(readyFD)
	if err != nil {
		return err
	}
	if err := mount.Check(o, greeting); err != nil {
		return err
	}
	fmt.Fprintln(a.Out, checkOK)
	return nil
}

// upgrade has a mount become this very program.
func (a *app) upgrade(ctx context.Context, dir, runDir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	there, err := mounted(dir)
	if err != nil {
		return err
	}
	if !there {
		return fmt.Errorf("%s: no mortar volume is mounted here", dir)
	}
	device, err := mount.DeviceOf(dir)
	if err != nil {
		return err
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", socketOf(runDir, device))
	if err != nil {
		return fmt.Errorf("the process that serves %s does not listen: %w (was it mounted with another --run-dir, or by a program that cannot be upgraded in place?)", dir, err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if _, err := fmt.Fprintln(conn, program); err != nil {
		return err
	}
	answer, err := io.ReadAll(io.LimitReader(conn, 64<<10))
	switch said := strings.TrimSpace(string(answer)); {
	case said == strings.TrimSpace(readyOK):
		return a.done("%s is served by %s", dir, program)
	case said != "":
		return fmt.Errorf("%s is served as before: %s", dir, said)
	case err != nil:
		return err
	}
	return fmt.Errorf("%s: %s has ended before it could go on; the mount's keeper goes on with the program before it: see the mount's log", dir, program)
}

func newMountKeeper() *cobra.Command {
	return &cobra.Command{
		Use:    keeperCommand,
		Hidden: true,
		RunE:   func(_ *cobra.Command, args []string) error { return keepMount(args) },
	}
}

// keepMount is the keeper. argv is how the mount's process was started.
func keepMount(argv []string) error {
	const conn, fuse, left = 3, 4, 5
	for fd := conn; fd <= left; fd++ {
		syscall.CloseOnExec(fd)
	}
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP) // the mount's end is this one's
	os.WriteFile("/proc/self/comm", []byte("mortar"), 0)
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if len(argv) == 0 {
		return errors.New("the words of the mount's command line are missing")
	}
	if _, err := unix.Write(conn, []byte(wordKeeping)); err != nil {
		return err
	}
	k := &keeper{argv: argv, fuse: os.NewFile(fuse, "fuse"), left: os.NewFile(left, "estate"), log: log}
	for _, word := range strings.Split(os.Getenv(deathsEnv), ",") {
		if at, err := strconv.ParseInt(word, 10, 64); err == nil {
			k.deaths = append(k.deaths, time.Unix(at, 0))
		}
	}
	return k.run(os.NewFile(conn, "mount"))
}

type keeper struct {
	argv       []string
	fuse, left *os.File
	log        *slog.Logger
	deaths     []time.Time
}

// run waits for the end of the mount, and of its processes.
func (k *keeper) run(conn *os.File) error {
	watching := false
	for {
		var (
			dead bool
			word string
		)
		if watching { // which is all that most keepers ever do
			if err := footprint.Sleep(func() { dead, word = k.await(conn) }); err != nil {
				k.log.Warn("the mount's keeper takes more memory than it needs", "error", err)
			}
		} else {
			dead, word = k.await(conn)
		}
		switch {
		case word == wordWatch:
			watching = true
			continue
		case dead || word == wordBye:
			return nil
		case !watching: // it has ended before it said so; whoever watched before still does
			return nil
		}
		conn.Close()
		now := time.Now()
		k.deaths = slices.DeleteFunc(append(k.deaths, now), func(at time.Time) bool { return now.Sub(at) > deathsWithin })
		if len(k.deaths) > maxDeaths {
			k.log.Error("the process that serves the mount has ended again and again: the mount is given up", "times", len(k.deaths), "within", deathsWithin)
			return nil
		}
		k.log.Error("the process that serves the mount has ended: another one goes on")
		for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
			next, err := k.next()
			if err == nil {
				conn = next
				break
			}
			k.log.Error("the mount's next process cannot be started", "error", err)
			if k.gone(pause) {
				return nil
			}
		}
	}
}

// gone waits for the end of the mount, for so long at most.
func (k *keeper) gone(within time.Duration) bool {
	p := []unix.PollFd{{Fd: int32(k.fuse.Fd())}}
	for end := time.Now().Add(within); ; {
		n, err := unix.Poll(p, int(max(0, time.Until(end)).Milliseconds()))
		if err != unix.EINTR {
			return n > 0
		}
	}
}

// await returns when the mount's process has said something: nothing, if it has ended. dead is whether the
// mount is gone then. Nobody waits for that: who waits for anything of /dev/fuse is woken by every request
// of the mount, and would cost as much as it costs to read them.
func (k *keeper) await(conn *os.File) (dead bool, word string) {
	buf := make([]byte, 1)
	n, err := unix.Read(int(conn.Fd()), buf) // blocks
	for err == unix.EINTR {
		n, err = unix.Read(int(conn.Fd()), buf)
	}
	return k.gone(0), string(buf[:max(n, 0)])
}

// next starts the next process of the mount, and returns the connection to it.
func (k *keeper) next() (*os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "mount"), os.NewFile(uintptr(fds[1]), "keeper")
	defer theirs.Close()
	cmd := exec.Command(selfPath(), k.argv[1:]...)
	cmd.Args[0] = k.argv[0]
	var deaths []string
	for _, at := range k.deaths {
		deaths = append(deaths, strconv.FormatInt(at.Unix(), 10))
	}
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "GOMAXPROCS=") || strings.HasPrefix(v, deathsEnv+"=")
	})
	cmd.Env = append(cmd.Env, heirEnv+"=4,5,3,-1", deathsEnv+"="+strings.Join(deaths, ","))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{theirs, k.fuse, k.left}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		ours.Close()
		return nil, err
	}
	go cmd.Wait() // it ends with the process, which this one's end does not wait for
	return ours, nil
}
