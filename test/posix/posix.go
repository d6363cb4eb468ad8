// Package posix is a table of what POSIX and Linux's manual pages say of a file
// system, and the program that puts it to one.
//
// The table is in testdata, a file per call or subject. It holds for a local
// disk, where it is checked first, and for a mounted volume: through one mount, and
// through several in turn, so that each call has to see what the one before it
// did on another machine.
//
// A file has cases, a case has statements, and a statement is one system call
// with what is expected of it:
//
//	case a directory is not unlinked     # everything up to the next case
//	mkdir d 0755                         # must succeed
//	unlink d = EISDIR|EPERM              # must fail, in one of these ways
//	alice: open d/f O_CREAT = EACCES     # made by alice instead of root
//	open d O_RDONLY -> x                 # the descriptor is called x from here on
//	stat d type=dir mode=0755 nlink=2    # each part is looked at
//	read x 10 = "abc"                    # a value, as the call returns it
//	soon flock y EX                      # tried again until it is as expected
//
// Every case runs in a directory of its own, which everybody may write to, with
// umask 0. "for A B in x:y z:w" repeats what follows up to "end" with $A and $B put in.
// {ab*3} is ababab. "@ext4" in front of a statement or title has it run on that
// file system alone, "@!ext4" on all others; a comment says why. The file system
// of a volume is called mortar, "@!several" is for what only holds as long as
// everything goes through one mount, "@!unseen" for what holds if whoever serves the file
// system sees who calls, and "@linux6.2" for what that kernel began with.
//
// The users are root; alice, of her own group and of staff; bob, of his and of
// staff; and carol, of hers alone. They are threads of the test's process, whose credentials
// Linux keeps per thread, so a change of user costs nothing and paths that only
// root can reach do not matter: a thread stands in the case's directory.
package posix

import (
	"cmp"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed testdata/*.txt
var testdata embed.FS

// A Place is a directory to try the table in.
type Place struct {
	// FS is the kind of file system, for statements that are not for all.
	FS string
	// Dirs are the directory as seen through each of one or more mounts. The
	// statements of a case take turns.
	Dirs []string
	// Unseen: whoever serves the file system does not see the threads of this process,
	// since he is in a PID namespace below another.
	Unseen bool
}

// FSType names the file system that a directory is on as the table does, "" if
// it does not know it.
func FSType(dir string) (string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "", fmt.Errorf("statfs %s: %w", dir, err)
	}
	return map[int64]string{
		unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs",
		unix.TMPFS_MAGIC: "tmpfs", unix.OVERLAYFS_SUPER_MAGIC: "overlay",
	}[int64(st.Type)], nil
}

// Run puts the whole table to a place, and returns how many expectations were
// looked at. It needs root.
func Run(t *testing.T, p Place) (expectations int) {
	t.Helper()
	files, err := fs.Glob(testdata, "testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no table: %v", err)
	}
	r := &runner{place: p, fds: make(map[string]descriptor)}
	for _, dir := range p.Dirs {
		w, err := startWorker(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer w.end()
		r.workers = append(r.workers, w)
	}
	for _, f := range files {
		text, err := testdata.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		name := path.Base(f)
		cases, err := parse(name, string(text))
		if err != nil {
			t.Fatal(err)
		}
		t.Run(strings.TrimSuffix(name, ".txt"), func(t *testing.T) {
			for i := range cases {
				if !r.run(t, &cases[i]) {
					return
				}
			}
		})
	}
	return r.looked
}

// A user of the table.
type user struct {
	uid, gid int
	groups   []uint32
}

const staff = 64600

var users = map[string]user{
	"root":  {0, 0, nil},
	"alice": {64501, 64501, []uint32{staff}},
	"bob":   {64502, 64502, []uint32{staff}},
	"carol": {64503, 64503, nil},
}

// runner carries out cases, one after the other.
type runner struct {
	place   Place
	workers []*worker
	turn    int
	cases   int
	looked  int

	// Of the case.
	fds     map[string]descriptor
	handles map[string]unix.FileHandle
	marks   map[string]times
}

// descriptor is an open file, and the mount that it was opened through.
type descriptor struct{ fd, mount int }

// patience is how long one call may take. None of the table has to wait.
const patience = 60 * time.Second

// soon is how long the outcome of a statement with that word may take.
const soon = 10 * time.Second

// run carries out a case. It returns false if there is no going on after it.
func (r *runner) run(t *testing.T, c *testCase) bool {
	t.Helper()
	if !r.applies(c.only) {
		return true
	}
	r.cases++
	dir := fmt.Sprintf("case-%d", r.cases)
	r.handles, r.marks = make(map[string]unix.FileHandle), make(map[string]times)
	for i, w := range r.workers {
		err := w.do(func() (err error) {
			if i == 0 {
				if err := unix.Mkdirat(w.root, dir, 0o777); err != nil {
					return err
				}
			}
			w.dir, err = unix.Openat(w.root, dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			return unix.Fchdir(w.dir)
		})
		if err != nil {
			t.Errorf("%s: the case's directory: %v", c.where, err)
			return false
		}
	}
	defer func() {
		for name, fd := range r.fds {
			unix.Close(fd.fd)
			delete(r.fds, name)
		}
		for _, w := range r.workers {
			unix.Close(w.dir)
			w.do(func() error { setUmask(0); return unix.Fchdir(w.root) })
		}
	}()
	for i := range c.statements {
		st := &c.statements[i]
		if !r.applies(st.only) {
			continue
		}
		n := r.turn % len(r.workers)
		if fd, ok := r.fds[first(st.args)]; ok && st.call == "linkfd" {
			n = fd.mount // of which the new name has to be, too
		}
		w := r.workers[n]
		through := ""
		if len(r.workers) > 1 {
			through = fmt.Sprintf(" (mount %d)", n+1)
		}
		r.turn++
		k := &call{runner: r, worker: w, mount: n, statement: st}
		wrong, answered := r.carryOut(k)
		for until := time.Now().Add(soon); answered && wrong != "" && st.soon && time.Now().Before(until); {
			time.Sleep(10 * time.Millisecond)
			wrong, answered = r.carryOut(k)
		}
		if !answered {
			t.Errorf("%s: %s: %s%s: not answered within %v", st.where, c.title, st.text, through, patience)
			return false
		}
		r.looked += 1 + k.more
		if wrong != "" {
			t.Errorf("%s: %s: %s%s: %s", st.where, c.title, st.text, through, wrong)
		}
	}
	return true
}

// carryOut makes the call and says what is wrong with its outcome.
func (r *runner) carryOut(k *call) (wrong string, answered bool) {
	done := make(chan struct{})
	var got string
	var err error
	go func() {
		defer close(done)
		err = k.worker.do(func() (err error) {
			defer func() {
				if p := recover(); p != nil {
					err = fmt.Errorf("the statement is wrong: %v", p)
				}
			}()
			if err := become(users[k.user]); err != nil {
				return fmt.Errorf("becoming %s: %w", k.user, err)
			}
			defer become(users["root"])
			got, err = calls[k.call](k)
			return err
		})
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-done:
		return k.judge(got, err), true
	case <-timer.C:
		return "", false
	}
}

func first(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}

// applies says whether what is marked with only is for this place.
func (r *runner) applies(only []string) bool {
	here, elsewhere := false, false
	for _, o := range only {
		name, not := strings.CutPrefix(o, "!")
		is := name == r.place.FS || name == "several" && len(r.workers) > 1 || name == "unseen" && r.place.Unseen || sinceLinux(name)
		switch {
		case not && is:
			return false
		case is:
			here = true
		case !not:
			elsewhere = true
		}
	}
	return here || !elsewhere
}

// sinceLinux says whether this kernel is the named one, such as linux6.2, or a later one.
func sinceLinux(name string) bool {
	var major, minor, hasMajor, hasMinor int
	if _, err := fmt.Sscanf(name, "linux%d.%d", &major, &minor); err != nil {
		return false
	}
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &hasMajor, &hasMinor); err != nil {
		return false
	}
	return hasMajor > major || hasMajor == major && hasMinor >= minor
}

// judge compares an outcome with what the statement wants.
func (st *statement) judge(got string, err error) string {
	var errno syscall.Errno
	var wrong mismatch
	switch {
	case errors.As(err, &wrong):
		return err.Error()
	case err != nil && !errors.As(err, &errno):
		return err.Error()
	case !st.value && !slices.Contains(strings.Split(cmp.Or(st.want, "OK"), "|"), errnoName(errno)):
		return fmt.Sprintf("got %s, want %s", errnoName(errno), cmp.Or(st.want, "OK"))
	case st.value && err != nil:
		return fmt.Sprintf("got %s, want %.80q", errnoName(errno), st.want)
	case st.value && got != st.want:
		return fmt.Sprintf("got %.200q, want %.200q", got, st.want)
	}
	return ""
}

// mismatch is the error of a call that succeeded and returned something else
// than was expected.
type mismatch string

func (m mismatch) Error() string { return string(m) }

// worker is a thread with a working directory, umask and credentials of its own.
type worker struct {
	root  int // the place, through this worker's mount
	dir   int // the case's directory
	jobs  chan func()
	ended chan struct{}
}

func startWorker(dir string) (*worker, error) {
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", dir, err)
	}
	w := &worker{root: root, jobs: make(chan func()), ended: make(chan struct{})}
	ready := make(chan error)
	go func() {
		defer close(w.ended)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			ready <- fmt.Errorf("unshare: %w", err)
			return
		}
		setUmask(0)
		ready <- nil
		for f := range w.jobs {
			f()
		}
	}()
	if err := <-ready; err != nil {
		unix.Close(root)
		return nil, err
	}
	return w, nil
}

func (w *worker) do(f func() error) (err error) {
	done := make(chan struct{})
	w.jobs <- func() {
		defer close(done)
		err = f()
	}
	<-done
	return err
}

func (w *worker) end() {
	close(w.jobs)
	<-w.ended
	unix.Close(w.root)
}

func setUmask(mask int) { syscall.RawSyscall(unix.SYS_UMASK, uintptr(mask), 0, 0) }

// become changes the calling thread's user. The saved user id stays root's, so
// that the way back is open; capabilities follow the effective one.
func become(u user) error {
	const root = 0
	if _, _, e := syscall.RawSyscall(unix.SYS_SETRESUID, root, root, root); e != 0 {
		return e
	}
	if _, _, e := syscall.RawSyscall(unix.SYS_SETRESGID, uintptr(u.gid), uintptr(u.gid), root); e != 0 {
		return e
	}
	if err := setGroups(u.groups); err != nil {
		return err
	}
	if _, _, e := syscall.RawSyscall(unix.SYS_SETRESUID, uintptr(u.uid), uintptr(u.uid), root); e != 0 {
		return e
	}
	return nil
}

// Missing says why the table cannot be tried here, or returns "".
func Missing() string {
	if os.Geteuid() != 0 {
		return "the table of POSIX cases changes users and makes devices, which needs root"
	}
	return ""
}
