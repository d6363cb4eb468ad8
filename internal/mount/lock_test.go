package mount

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
)

// helperEnv has the test binary be a program that locks or looks:
// fcntl|flock FILE (take an exclusive lock, say so, wait for standard input to
// end), stat FILE, mapped FILE (see runMapped).
const helperEnv = "MORTAR_MOUNT_HELPER"

func runHelper(arg string) error {
	f := strings.Fields(arg)
	if f[0] == "serve" {
		return serveAndHang(f[1])
	}
	if f[0] == "stat" {
		var st unix.Stat_t
		fmt.Println("begin")
		return unix.Stat(f[1], &st)
	}
	fd, err := unix.Open(f[1], unix.O_RDWR, 0)
	if err != nil {
		return err
	}
	if f[0] == "mapped" {
		return runMapped(fd)
	}
	fmt.Println("begin")
	if f[0] == "flock" {
		err = unix.Flock(fd, unix.LOCK_EX)
	} else {
		err = unix.FcntlFlock(uintptr(fd), unix.F_SETLKW, &unix.Flock_t{Type: unix.F_WRLCK})
	}
	if err != nil {
		return err
	}
	fmt.Println("locked")
	io.Copy(io.Discard, os.Stdin)
	return nil
}

type helper struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *lines
}

// lines are what a helper says, as it comes.
type lines struct {
	mu   sync.Mutex
	text string
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text += string(b)
	return len(b), nil
}

func (l *lines) has(s string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.text, s)
}

func (l *lines) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text, s)
}

func startHelper(t *testing.T, args ...string) *helper {
	t.Helper()
	h := &helper{cmd: exec.Command("/proc/self/exe"), out: new(lines)}
	h.cmd.Env = append(os.Environ(), helperEnv+"="+strings.Join(args, " "))
	h.cmd.Stdout, h.cmd.Stderr = h.out, h.out
	var err error
	if h.in, err = h.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := h.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.cmd.Process.Kill(); h.cmd.Wait() })
	return h
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// TestLocksBetweenMounts passes a lock from process to process on two mounts:
// when its holder ends, closes, or is killed.
func TestLocksBetweenMounts(t *testing.T) {
	for _, how := range []string{"fcntl", "flock"} {
		t.Run(how, func(t *testing.T) {
			mem := memfs.New()
			a := newMount(t, mem, Options{})
			b := newMount(t, mem, Options{})
			if err := os.WriteFile(filepath.Join(a.dir, "f"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			first := startHelper(t, how, filepath.Join(a.dir, "f"))
			eventually(t, "the first lock", func() bool { return first.out.has("locked") })
			second := startHelper(t, how, filepath.Join(b.dir, "f"))
			third := startHelper(t, how, filepath.Join(a.dir, "f"))
			eventually(t, "both wait", func() bool { return second.out.has("begin") && third.out.has("begin") })
			time.Sleep(50 * time.Millisecond) // long enough to get what they must not get
			if second.out.has("locked") || third.out.has("locked") {
				t.Fatal("two have the lock")
			}
			third.cmd.Process.Signal(syscall.SIGTERM) // a waiter dies
			third.cmd.Wait()
			first.in.Close() // it ends, and closes the file
			first.cmd.Wait()
			eventually(t, "the second lock", func() bool { return second.out.has("locked") })
			fourth := startHelper(t, how, filepath.Join(a.dir, "f"))
			eventually(t, "the fourth waits", func() bool { return fourth.out.has("begin") })
			second.cmd.Process.Kill()
			second.cmd.Wait()
			eventually(t, "the fourth lock", func() bool { return fourth.out.has("locked") })
			fourth.in.Close()
			fourth.cmd.Wait()
			eventually(t, "no lock is left", func() bool { return mem.Locks() == 0 })
		})
	}
}

// TestLockLeftByReader takes a read lock through a file that was opened
// read-only, whose close the kernel does not tell.
func TestLockLeftByReader(t *testing.T) {
	mem := memfs.New()
	m := newMount(t, mem, Options{})
	p := filepath.Join(m.dir, "f")
	if err := os.WriteFile(p, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_RDLCK}); err != nil {
		t.Fatal(err)
	}
	if mem.Locks() != 1 {
		t.Fatalf("%d locks", mem.Locks())
	}
	f.Close()
	eventually(t, "the lock is gone", func() bool { return mem.Locks() == 0 })
}

// TestLocksOfOneMachine keeps locks=node locks away from the cluster.
func TestLocksOfOneMachine(t *testing.T) {
	mem := memfs.New()
	m := newMount(t, mem, Options{LocksNode: true})
	p := filepath.Join(m.dir, "f")
	if err := os.WriteFile(p, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	first := startHelper(t, "flock", p)
	eventually(t, "the first lock", func() bool { return first.out.has("locked") })
	second := startHelper(t, "flock", p)
	eventually(t, "the second waits", func() bool { return second.out.has("begin") })
	if second.out.has("locked") || mem.Locks() != 0 {
		t.Errorf("two have the lock, or the cluster knows: %d", mem.Locks())
	}
	first.in.Close()
	eventually(t, "the second lock", func() bool { return second.out.has("locked") })
}

// Locks that belong to an open file go when it is closed, and whoever is told of that on the same
// machine finds them gone, although close does not wait for it.
func TestLocksGoWithClose(t *testing.T) {
	g := &gate{}
	m := newMount(t, memfs.New(), Options{}, gated(g))
	p := filepath.Join(m.dir, "f")
	if err := os.WriteFile(p, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	ofd := unix.Flock_t{Type: unix.F_WRLCK}
	for name, lock := range map[string]func(fd int) error{
		"flock":     func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) },
		"open file": func(fd int) error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &ofd) },
		"it is looked": func(fd int) error {
			what := ofd
			if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &what); err != nil || what.Type == unix.F_UNLCK {
				return errors.Join(err, unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &ofd))
			}
			return fmt.Errorf("locked by %d", what.Pid)
		},
	} {
		a, err := unix.Open(p, unix.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		b, err := unix.Open(p, unix.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := lock(a); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		held, release := holdOnce(g, func(op fsop.Op) bool {
			l, ok := op.(*fsop.Setlk)
			return ok && l.Lock.Type == fsop.LockUnlock
		})
		unix.Close(a)
		locked := make(chan error, 1)
		go func() { locked <- lock(b) }()
		<-held
		select {
		case err := <-locked:
			t.Errorf("%s: did not wait for what the close left: %v", name, err)
			locked <- err
		case <-time.After(20 * time.Millisecond): // so late it has certainly asked
		}
		release()
		if err := <-locked; err != nil {
			t.Errorf("%s: %v", name, err)
		}
		unix.Close(b)
	}
}

// TestCounter has processes' worth of goroutines on two mounts count in one file
// under flock: no increment may be lost.
func TestCounter(t *testing.T) {
	mem := memfs.New()
	dirs := []string{newMount(t, mem, Options{}).dir, newMount(t, mem, Options{}).dir}
	if err := os.WriteFile(filepath.Join(dirs[0], "n"), []byte("0"), 0o644); err != nil {
		t.Fatal(err)
	}
	const workers, each = 4, 50
	holders.Store(0)
	counted.Store(0)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for range each {
				if err := count(filepath.Join(dirs[w%2], "n")); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	got, _ := os.ReadFile(filepath.Join(dirs[0], "n"))
	if string(got) != fmt.Sprint(workers*each) {
		t.Errorf("counted %s, want %d", got, workers*each)
	}
}

func count(p string) error {
	f, err := os.OpenFile(p, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close() // and unlock
	for {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return err
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	var n int
	if _, err := fmt.Sscan(string(b), &n); err != nil {
		return fmt.Errorf("read %q: %w", b, err)
	}
	h := holders.Add(1)
	defer holders.Add(-1)
	if h != 1 {
		return fmt.Errorf("%d have the lock", h)
	}
	if want := int(counted.Load()); n != want {
		return fmt.Errorf("%s: read %d, want %d", p, n, want)
	}
	if _, err := f.WriteAt(fmt.Append(nil, n+1), 0); err != nil {
		return err
	}
	counted.Add(1)
	return nil // closing it unlocks
}

// The truth, of TestCounter.
var holders, counted atomic.Int64

// TestKill has processes wait for an operation that is not answered: a signal
// that they handle leaves them waiting, one that kills them does not.
func TestKill(t *testing.T) {
	mem := memfs.New()
	g := &gate{}
	m := newMount(t, mem, Options{}, gated(g))
	never := make(chan struct{})
	defer close(never)
	g.set(func(op fsop.Op, _ bool) <-chan struct{} {
		if l, ok := op.(*fsop.Lookup); ok && strings.HasPrefix(l.Name, "stuck") {
			return never
		}
		return nil
	})
	for _, sig := range []os.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			h := startHelper(t, "stat", filepath.Join(m.dir, "stuck"+sig.String()))
			eventually(t, "it waits", func() bool { return h.out.has("begin") })
			time.Sleep(20 * time.Millisecond)
			h.cmd.Process.Signal(syscall.SIGURG) // Go handles it
			time.Sleep(300 * time.Millisecond)
			if h.cmd.Process.Signal(syscall.Signal(0)) != nil {
				t.Fatal("a handled signal ended it")
			}
			died := make(chan error, 1)
			h.cmd.Process.Signal(syscall.SIGKILL)
			go func() { died <- h.cmd.Wait() }()
			select {
			case err := <-died:
				var exit *exec.ExitError
				if !errors.As(err, &exit) {
					t.Error(err)
				}
			case <-time.After(time.Minute):
				t.Error("it cannot be killed")
			}
		})
	}
}

// TestUnmountWhileStuck ends Serve although an operation is never answered.
func TestUnmountWhileStuck(t *testing.T) {
	mem := memfs.New()
	g := &gate{}
	never := make(chan struct{})
	g.set(func(op fsop.Op, _ bool) <-chan struct{} {
		if l, ok := op.(*fsop.Lookup); ok && l.Name == "stuck" {
			return never
		}
		return nil
	})
	m := newMount(t, mem, Options{}, gated(g))
	h := startHelper(t, "stat", filepath.Join(m.dir, "stuck"))
	eventually(t, "it waits", func() bool { return h.out.has("begin") })
	time.Sleep(20 * time.Millisecond)
	// The clean-up unmounts, and fails the test if Serve does not return.
}

// TestAppends has two mounts append records to one file: all are there, whole,
// and every reader sees them in one order.
func TestAppends(t *testing.T) {
	for _, kind := range []struct {
		name string
		o    Options
	}{{"locks=cluster", Options{}}, {"no epoch", Options{noEpoch: true}}} {
		t.Run(kind.name, func(t *testing.T) {
			mem := memfs.New()
			dirs := []string{newMount(t, mem, kind.o).dir, newMount(t, mem, kind.o).dir}
			const each = 150
			var wg sync.WaitGroup
			for w := range 4 {
				wg.Go(func() {
					flags := os.O_APPEND | os.O_CREATE | os.O_WRONLY
					if w%2 == 0 {
						flags = os.O_APPEND | os.O_CREATE | os.O_RDWR
					}
					f, err := os.OpenFile(filepath.Join(dirs[w/2], "log"), flags, 0o644)
					if err != nil {
						t.Error(err)
						return
					}
					defer f.Close()
					for i := range each {
						line := fmt.Sprintf("%d-%d %s\n", w, i, strings.Repeat("x", rand.IntN(3000)))
						if _, err := f.WriteString(line); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			var was string
			for _, d := range dirs {
				b, err := os.ReadFile(filepath.Join(d, "log"))
				if err != nil {
					t.Fatal(err)
				}
				next := [4]int{}
				for _, line := range strings.SplitAfter(string(b), "\n") {
					if line == "" {
						continue
					}
					var w, i int
					if _, err := fmt.Sscanf(line, "%d-%d", &w, &i); err != nil || w > 3 || i != next[w] {
						t.Fatalf("%s: line %.40q, want record %v", d, line, next)
					}
					next[w]++
				}
				if next != [4]int{each, each, each, each} {
					t.Errorf("%s: records %v", d, next)
				}
				if was != "" && was != string(b) {
					t.Error("the mounts read different files")
				}
				was = string(b)
			}
		})
	}
}

// TestCopyFileRange copies within the file system, from and to the middle.
func TestCopyFileRange(t *testing.T) {
	m := newMount(t, memfs.New(), Options{})
	data := make([]byte, 3<<20+123)
	for i := range data {
		data[i] = byte(rand.Int())
	}
	src, dst := filepath.Join(m.dir, "src"), filepath.Join(m.dir, "dst")
	if err := os.WriteFile(src, data, 0o644); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(src)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(dst)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	from, to := int64(1000), int64(5)
	for {
		n, err := unix.CopyFileRange(int(in.Fd()), &from, int(out.Fd()), &to, 1<<30, 0)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break
		}
	}
	got, err := os.ReadFile(dst)
	if err != nil || string(got) != string(make([]byte, 5))+string(data[1000:]) {
		t.Errorf("copied %d bytes, %v; want %d", len(got), err, len(data)-995)
	}
}
