package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// held is what came of holding everything that a process can hold of a mount, and working on,
// while the mount's process changed.
type held struct {
	Operations int64
	LongestMS  float64
	LongestOp  string
	Lost       int64 // fsync or close said that what was written is lost
	Wrong      []string
}

func (h *held) wrong() []string { return h.Wrong }

// holder is one such process.
type holder struct {
	dir   string
	lossy bool
	mu    sync.Mutex
	held
}

func (h *holder) fail(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.Wrong) < 20 {
		h.Wrong = append(h.Wrong, fmt.Sprintf(format, args...))
	}
}

// do times an operation.
func (h *holder) do(what string, f func() error) error {
	began := time.Now()
	err := f()
	took := float64(time.Since(began).Microseconds()) / 1000
	h.mu.Lock()
	defer h.mu.Unlock()
	h.Operations++
	if took > h.LongestMS {
		h.LongestMS, h.LongestOp = took, what
	}
	return err
}

// must is do for what has to succeed.
func (h *holder) must(what string, f func() error) bool {
	err := h.do(what, f)
	if err != nil {
		h.fail("%s: %v", what, err)
	}
	return err == nil
}

// synced is do for what may say that acknowledged writes are lost, if the mount was killed.
func (h *holder) synced(what string, f func() error) (lost bool) {
	err := h.do(what, f)
	if h.lossy && errors.Is(err, unix.EIO) {
		h.mu.Lock()
		h.Lost++
		h.mu.Unlock()
		return true
	}
	if err != nil {
		h.fail("%s: %v", what, err)
	}
	return false
}

// hold holds files of a directory until it is told to finish, works meanwhile, and looks
// whether all is as it left it. It prints "holding" once it holds everything.
func hold(fs *flag.FlagSet, args []string) (verdict, error) {
	dir := fs.String("dir", "", "an empty directory on the mount")
	lossy := fs.Bool("lossy", false, "the mount is killed: fsync and close may say that writes are lost")
	fs.Parse(args)
	h := &holder{dir: *dir, lossy: *lossy}
	var still []func()
	for _, begin := range []func() (func(), error){h.open, h.unlinked, h.locked, h.mapped, h.listing} {
		check, err := begin()
		if err != nil {
			return nil, err
		}
		still = append(still, check)
	}
	fmt.Fprintln(os.Stderr, "holding")
	var done atomic.Bool
	var wg sync.WaitGroup
	for _, work := range []func(done *atomic.Bool){h.names, h.append, h.counter, h.small} {
		wg.Go(func() { work(&done) })
	}
	<-stopped()
	done.Store(true)
	wg.Wait()
	for _, check := range still {
		check()
	}
	return &h.held, nil
}

func (h *holder) path(name string) string { return filepath.Join(h.dir, name) }

// open holds a file that is open, with an offset.
func (h *holder) open() (func(), error) {
	f, err := os.OpenFile(h.path("open"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if _, err := f.WriteString("before, "); err != nil {
		return nil, err
	}
	if err := f.Sync(); err != nil {
		return nil, err
	}
	return func() {
		h.must("write to a file that was open", func() error { _, err := f.WriteString("after"); return err })
		h.must("fsync of it", f.Sync)
		h.must("close of it", f.Close)
		if got, err := os.ReadFile(h.path("open")); err != nil || string(got) != "before, after" {
			h.fail("the file that was open has %q, %v", got, err)
		}
	}, nil
}

// unlinked holds a file without a name.
func (h *holder) unlinked() (func(), error) {
	f, err := os.OpenFile(h.path("unlinked"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	want := bytes.Repeat([]byte("no name "), 32<<10)
	if _, err := f.Write(want); err != nil {
		return nil, err
	}
	if err := f.Sync(); err != nil {
		return nil, err
	}
	if err := os.Remove(h.path("unlinked")); err != nil {
		return nil, err
	}
	return func() {
		got := make([]byte, len(want))
		h.must("read of a file without a name", func() error { _, err := f.ReadAt(got, 0); return err })
		if !bytes.Equal(got, want) {
			h.fail("the file without a name has other contents")
		}
		h.must("write to it", func() error { _, err := f.WriteAt([]byte("x"), 7); return err })
		h.must("close of it", f.Close)
	}, nil
}

// locked holds locks of both kinds, and has somebody wait for one of them.
func (h *holder) locked() (func(), error) {
	open := func(name string) (*os.File, error) { return os.OpenFile(h.path(name), os.O_RDWR|os.O_CREATE, 0o600) }
	f, err := open("flock")
	if err != nil {
		return nil, err
	}
	g, err := open("fcntl")
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, err
	}
	whole := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(g.Fd(), unix.F_SETLK, &whole); err != nil {
		return nil, err
	}
	waiter, err := open("flock")
	if err != nil {
		return nil, err
	}
	granted := make(chan error, 1)
	go func() { granted <- unix.Flock(int(waiter.Fd()), unix.LOCK_EX) }()
	return func() {
		defer f.Close()
		defer waiter.Close()
		other, err := open("flock")
		if err != nil {
			h.fail("open: %v", err)
			return
		}
		defer other.Close()
		if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK {
			h.fail("the flock is not held any more: %v", err)
		}
		probe := unix.Flock_t{Type: unix.F_WRLCK}
		// Another open file description asks for it as another owner does.
		another, err := open("fcntl")
		if err != nil {
			h.fail("open: %v", err)
			return
		}
		defer another.Close()
		if err := unix.FcntlFlock(another.Fd(), unix.F_OFD_GETLK, &probe); err != nil || probe.Type == unix.F_UNLCK {
			h.fail("the fcntl lock is not held any more: %+v, %v", probe, err)
		}
		select {
		case err := <-granted:
			h.fail("who waited for the lock has it, or an error, while it is held: %v", err)
			return
		default:
		}
		h.must("unlock", func() error { return unix.Flock(int(f.Fd()), unix.LOCK_UN) })
		select {
		case err := <-granted:
			if err != nil {
				h.fail("who waited for the lock: %v", err)
			}
		case <-time.After(5 * time.Second):
			h.fail("who waited for the lock has not got it 5 s after it was free")
		}
		h.must("close of the file with the fcntl lock", g.Close)
		probe = unix.Flock_t{Type: unix.F_WRLCK}
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			err := unix.FcntlFlock(another.Fd(), unix.F_OFD_SETLK, &probe)
			if err == nil {
				return
			}
			if time.Now().After(end) {
				h.fail("the fcntl lock of a file that was closed stays: %v", err)
				return
			}
		}
	}, nil
}

// mapped holds a shared map.
func (h *holder) mapped() (func(), error) {
	f, err := os.OpenFile(h.path("mapped"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if _, err := f.Write(make([]byte, 16<<10)); err != nil {
		return nil, err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, 16<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	copy(m, "before")
	if err := unix.Msync(m, unix.MS_SYNC); err != nil {
		return nil, err
	}
	return func() {
		if string(m[:6]) != "before" {
			h.fail("the map has %q", m[:6])
		}
		copy(m[8<<10:], "after")
		h.must("msync", func() error { return unix.Msync(m, unix.MS_SYNC) })
		h.must("close of the mapped file", f.Close)
		got, err := os.ReadFile(h.path("mapped"))
		if err != nil || !bytes.HasPrefix(got, []byte("before")) || !bytes.HasPrefix(got[8<<10:], []byte("after")) {
			h.fail("the mapped file is not what was written to the map: %v", err)
		}
	}, nil
}

// listing holds a directory that is read in part.
func (h *holder) listing() (func(), error) {
	if err := os.Mkdir(h.path("many"), 0o700); err != nil {
		return nil, err
	}
	const n = 700
	for i := range n {
		f, err := os.Create(fmt.Sprintf("%s/%d", h.path("many"), i))
		if err != nil {
			return nil, err
		}
		f.Close()
	}
	d, err := os.Open(h.path("many"))
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	note := func(names []string) {
		for _, name := range names {
			if seen[name] {
				h.fail("%s is listed twice", name)
			}
			seen[name] = true
		}
	}
	names, err := d.Readdirnames(100)
	if err != nil {
		return nil, err
	}
	note(names)
	return func() {
		var names []string
		h.must("the rest of a listing", func() (err error) { names, err = d.Readdirnames(-1); return err })
		note(names)
		if len(seen) != n {
			h.fail("%d of %d names are listed", len(seen), n)
		}
		h.must("close of the directory", d.Close)
	}, nil
}

// names makes, moves and removes names. What is carried out twice says so: the second time it fails.
func (h *holder) names(done *atomic.Bool) {
	for i := 0; !done.Load(); i++ {
		a, b := h.path(fmt.Sprintf("name-%d", i)), h.path(fmt.Sprintf("moved-%d", i))
		ok := h.must("mkdir", func() error { return os.Mkdir(a, 0o700) }) &&
			h.must("rename", func() error { return unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_NOREPLACE) }) &&
			h.must("symlink", func() error { return os.Symlink("nowhere", a) }) &&
			h.must("unlink", func() error { return unix.Unlink(a) }) &&
			h.must("rmdir", func() error { return unix.Rmdir(b) })
		if !ok {
			return
		}
	}
}

// append appends records, each of which must be there once.
func (h *holder) append(done *atomic.Bool) {
	f, err := os.OpenFile(h.path("records"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		h.fail("open: %v", err)
		return
	}
	maybe := map[string]bool{}
	var want []string
	for i := 0; !done.Load(); i++ {
		record := fmt.Sprintf("record %d\n", i)
		err := h.do("append", func() error { _, err := f.WriteString(record); return err })
		lost := h.lossy && errors.Is(err, unix.EIO) // of the record before
		if err != nil && !lost {
			h.fail("append: %v", err)
			return
		}
		if h.synced("fsync of what was appended", f.Sync) || lost {
			maybe[record] = true
		} else {
			want = append(want, record)
		}
	}
	h.synced("close of what was appended to", f.Close)
	raw, err := os.ReadFile(h.path("records"))
	if err != nil {
		h.fail("read: %v", err)
		return
	}
	count := map[string]int{}
	for line := range strings.Lines(string(raw)) {
		count[line]++
	}
	for _, record := range want {
		if count[record] != 1 {
			h.fail("%q is there %d times", record, count[record])
		}
		delete(count, record)
	}
	for record, n := range count {
		if !maybe[record] || n != 1 {
			h.fail("%q is there %d times, and was not acknowledged", record, n)
		}
	}
}

// counter rewrites a file in place.
func (h *holder) counter(done *atomic.Bool) {
	f, err := os.OpenFile(h.path("counter"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		h.fail("open: %v", err)
		return
	}
	defer f.Close()
	buf := make([]byte, 64<<10)
	for i := 0; !done.Load(); i++ {
		copy(buf, fmt.Sprintf("%-20d", i))
		err := h.do("pwrite", func() error { _, err := f.WriteAt(buf, 0); return err })
		if err != nil && !(h.lossy && errors.Is(err, unix.EIO)) {
			h.fail("pwrite: %v", err)
			return
		}
		if err != nil || h.synced("fsync", f.Sync) {
			continue
		}
		got := make([]byte, len(buf))
		if h.must("pread", func() error { _, err := f.ReadAt(got, 0); return err }) && !bytes.Equal(got, buf) {
			h.fail("read %q, wrote %q", got[:20], buf[:20])
			return
		}
	}
}

// small makes small files, as most programs do: it writes and closes them.
func (h *holder) small(done *atomic.Bool) {
	for i := 0; !done.Load(); i++ {
		path := h.path(fmt.Sprintf("small-%d", i%50))
		var f *os.File
		if !h.must("open of a small file", func() (err error) { f, err = os.Create(path); return err }) {
			return
		}
		text := fmt.Sprintf("the %d. small file", i)
		// The name may be lost as well: then whoever made it is told by his first write.
		lost := h.synced("write of a small file", func() error { _, err := io.WriteString(f, text); return err })
		if h.synced("close of it", f.Close) || lost {
			continue
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != text {
			h.fail("%s has %q, %v; want %q", path, got, err, text)
			return
		}
	}
}
