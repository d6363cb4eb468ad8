package mount

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"mortar/internal/footprint"
	"mortar/internal/fsop"
)

// An asker has the kernel ask something of this mount, by a system call. Whoever
// makes that is blocked until the mount has answered, in the kernel where nothing
// ends its wait but that answer. So it is another process: a thread of this one
// would keep the others from running until the runtime notices
// (doc/decisions/0013), and keep the file system alive for as long as it waits
// if this process is killed.
//
// The process is there while it is needed.
type asker struct {
	command []string // that runs Ask; none: nobody can be asked
	dir     func() string
	dev     uint64 // the file system's number

	mu      sync.Mutex
	conn    *os.File // nil: the process does not run
	last    uint64
	waiting map[uint64]chan asked
	idle    *time.Timer
	failed  time.Time // when it could not be started
	closed  bool
	wg      sync.WaitGroup

	// threads are those that ask; nil: none. Every open is looked up in them, also one that the start of the
	// process waits for while mu is held, so this takes no lock. What it points to does not change.
	threads atomic.Pointer[map[uint32]bool]
}

// question is what the kernel is to ask.
type question uint64

const (
	// forSize asks for the attributes, by a statx that insists on it.
	forSize question = iota
	// toStore asks to take what programs stored through shared mappings, by an fsync.
	toStore
)

// asked is what came of a question.
type asked struct {
	taken bool // forSize: the kernel has what it was told in answer
	err   error
}

const (
	// askerIdle is how long the process stays without work.
	askerIdle = time.Minute
	// askerRest is after how long without work it gives back what memory it can.
	askerRest = time.Second
	// askerThreads is how many questions are asked at once.
	askerThreads = 4
	// askRequest and askReply are the lengths of messages; the directory follows the former.
	askRequest = 32
	askReply   = 16
	// maxAsked is how many questions may wait: fewer than fit into the socket, so
	// that to send one never waits.
	maxAsked = 64
)

var (
	errNoAsker   = errors.New("nobody to ask the kernel")
	errAskerBusy = errors.New("the process that asks the kernel has much to ask")
	errAskerGone = errors.New("the process that asks the kernel has ended")
)

// ask has the kernel ask q about ino, and returns when it has been answered.
func (a *asker) ask(done <-chan struct{}, q question, ino fsop.Ino) (asked, error) {
	c := make(chan asked, 1)
	id, err := a.send(q, ino, c)
	if err != nil {
		return asked{}, err
	}
	select {
	case r, ok := <-c:
		if !ok {
			return asked{}, errAskerGone
		}
		return r, nil
	case <-done:
		a.mu.Lock()
		delete(a.waiting, id)
		a.mu.Unlock()
		return asked{}, unix.EINTR
	}
}

func (a *asker) send(q question, ino fsop.Ino, c chan asked) (id uint64, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.conn == nil {
		if err := a.startLocked(); err != nil {
			return 0, err
		}
	}
	if len(a.waiting) >= maxAsked {
		return 0, errAskerBusy
	}
	a.last++
	msg := binary.NativeEndian.AppendUint64(make([]byte, 0, 256), a.last)
	msg = binary.NativeEndian.AppendUint64(msg, uint64(ino))
	msg = binary.NativeEndian.AppendUint64(msg, a.dev)
	msg = binary.NativeEndian.AppendUint64(msg, uint64(q))
	msg = append(msg, a.dir()...)
	a.waiting[a.last] = c
	a.idle.Reset(askerIdle)
	if _, err := a.conn.Write(msg); err != nil {
		delete(a.waiting, a.last)
		return 0, err
	}
	return a.last, nil
}

// startLocked starts the process.
func (a *asker) startLocked() error {
	if len(a.command) == 0 || a.closed || time.Since(a.failed) < askerIdle {
		return errNoAsker
	}
	fail := func(err error) error {
		a.failed = time.Now()
		return fmt.Errorf("start %s: %w", a.command[0], err)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "asker")
	defer theirs.Close()
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return fail(err)
	}
	conn := os.NewFile(uintptr(fds[0]), "asker")
	cmd := exec.Command(a.command[0], a.command[1:]...)
	cmd.Args[0] = os.Args[0] // which is what ps shows
	cmd.Env = slices.DeleteFunc(os.Environ(), func(s string) bool {
		return strings.HasPrefix(s, "GOMAXPROCS=") || strings.HasPrefix(s, "GODEBUG=")
	})
	cmd.Env = append(cmd.Env, fmt.Sprint("GOMAXPROCS=", askerThreads)) // each of them blocks
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // also where the mount's process has none of its own yet
	if err := cmd.Start(); err != nil {
		conn.Close()
		return fail(err)
	}
	a.conn, a.waiting = conn, map[uint64]chan asked{}
	a.idle = time.AfterFunc(askerIdle, func() { a.stop(conn) })
	a.wg.Go(func() {
		a.receive(conn)
		cmd.Process.Kill() // it has nothing to end
		cmd.Wait()
	})
	return nil
}

// receive hands on what comes from the process until it has ended.
func (a *asker) receive(conn *os.File) {
	defer a.stop(conn)
	var buf [askReply]byte
	for {
		n, err := conn.Read(buf[:])
		if err != nil || n != len(buf) {
			return
		}
		id, value := binary.NativeEndian.Uint64(buf[:]), binary.NativeEndian.Uint64(buf[8:])
		a.mu.Lock()
		if a.conn != conn {
			a.mu.Unlock()
			return
		}
		if id == 0 {
			threads := map[uint32]bool{uint32(value): true}
			if was := a.threads.Load(); was != nil {
				maps.Copy(threads, *was)
			}
			a.threads.Store(&threads)
		} else if c := a.waiting[id]; c != nil {
			delete(a.waiting, id)
			r := asked{taken: value == 0}
			if value > 1 {
				r.err = unix.Errno(value)
			}
			c <- r
		}
		a.mu.Unlock()
	}
}

// stop ends the process; who waits for it is told.
func (a *asker) stop(conn *os.File) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.conn != conn {
		return
	}
	conn.Close()
	a.idle.Stop()
	for _, c := range a.waiting {
		close(c)
	}
	a.conn, a.waiting = nil, nil
	a.threads.Store(nil)
}

// close ends the process for good.
func (a *asker) close() {
	a.mu.Lock()
	a.closed = true
	conn := a.conn
	a.mu.Unlock()
	if conn != nil {
		a.stop(conn)
	}
	a.wg.Wait()
}

// is says whether a thread is one of the process that asks.
func (a *asker) is(tid uint32) bool {
	threads := a.threads.Load()
	return threads != nil && (*threads)[tid]
}

// Ask is what the program of Options.Asker does. It returns when the mount has
// no use for it any more.
func Ask() error {
	const conn = 3
	rest := time.AfterFunc(askerRest, func() { footprint.Shed() }) // it works as well with more memory
	defer rest.Stop()
	ended := make(chan error, askerThreads)
	for range askerThreads {
		go func() { ended <- askLoop(conn, rest) }()
	}
	return <-ended
}

func askLoop(conn int, rest *time.Timer) error {
	runtime.LockOSThread() // by which the mount knows the questions
	var reply [askReply]byte
	binary.NativeEndian.PutUint64(reply[8:], uint64(unix.Gettid()))
	if _, err := unix.Write(conn, reply[:]); err != nil {
		return err
	}
	buf := make([]byte, 8<<10)
	for {
		n, err := unix.Read(conn, buf)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return fmt.Errorf("read from the mount: %w", err)
		case n == 0:
			return nil
		case n < askRequest:
			return fmt.Errorf("a request of %d bytes", n)
		}
		rest.Reset(askerRest)
		ino := binary.NativeEndian.Uint64(buf[8:])
		dev := binary.NativeEndian.Uint64(buf[16:])
		q := question(binary.NativeEndian.Uint64(buf[24:]))
		taken, err := put(q, string(buf[askRequest:n]), dev, ino)
		result := uint64(0)
		if err != nil {
			var e unix.Errno
			if !errors.As(err, &e) || e <= 1 {
				e = unix.EIO
			}
			result = uint64(e)
		} else if !taken {
			result = 1
		}
		copy(reply[:8], buf)
		binary.NativeEndian.PutUint64(reply[8:], result)
		if _, err := unix.Write(conn, reply[:]); err != nil {
			return err
		}
	}
}

// put has the kernel ask q about inode ino of the file system of number dev that is
// mounted on dir. ESTALE: the kernel does not have the inode.
func put(q question, dir string, dev, ino uint64) (taken bool, err error) {
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0) // a handle is not opened by way of O_PATH
	if err != nil {
		return false, err
	}
	defer unix.Close(root)
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return false, err
	}
	if st.Dev != dev {
		return false, unix.ESTALE // something else is mounted there
	}
	how := unix.O_PATH
	if q == toStore {
		how = unix.O_RDONLY
	}
	const inoAndGeneration = 0x81 // FILEID_INO64_GEN of linux/exportfs.h
	fh := binary.NativeEndian.AppendUint32(nil, uint32(ino>>32))
	fh = binary.NativeEndian.AppendUint32(fh, uint32(ino))
	fh = binary.NativeEndian.AppendUint32(fh, generation)
	fd, err := unix.OpenByHandleAt(root, unix.NewFileHandle(inoAndGeneration, fh), how|unix.O_CLOEXEC)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	if q == toStore {
		return true, unix.Fsync(fd)
	}
	return insist(fd)
}

// insist has the kernel ask for the attributes of the inode that fd is of, and says
// whether the size that it then has is the one that it was told.
func insist(fd int) (taken bool, err error) {
	var told, has unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS, &told); err != nil {
		return false, err
	}
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_BASIC_STATS, &has); err != nil {
		return false, err
	}
	return told.Size == has.Size, nil
}
