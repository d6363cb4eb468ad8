package mount

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
)

// Notification codes of linux/fuse.h. In a notification the header's error
// field holds the code and its unique field is 0.
const (
	notifyInvalInode = 2
	notifyInvalEntry = 3
	notifyResend     = 7 // Linux 6.9; header only
	notifyIncEpoch   = 8 // Linux 6.16; header only
)

const expireOnly = 1 << 0 // FUSE_EXPIRE_ONLY

const outHeaderSize = 16 // struct fuse_out_header

// device is the /dev/fuse descriptor of one mounted file system.
//
// The descriptor is opened and mounted here rather than by go-fuse, because
// notifications that go-fuse has no call for are written to it directly.
// go-fuse gets its own descriptor of the same open file.
type device struct {
	// mu is held for reading while the descriptors are used, which may be until a request
	// in flight is answered. So nobody waits for it to write before the kernel has
	// ended all requests: who came after him would wait for him, also who answers them.
	mu    sync.RWMutex
	fd    int // -1 when closed
	serve int // the server's descriptor of the same open file
	// second is another open file of the same device, for apart. -1 if there is none,
	// and where this process uses the mount itself: the thread has copies of all
	// that is open, and what is open in the mount could not be closed meanwhile.
	second int

	shrinkMu  sync.Mutex // held by reconfigure
	shrinking sync.WaitGroup

	placeMu sync.Mutex // guards the fields below
	dir     string     // where it is mounted
	beside  []int      // descriptors whose end says that this process has ended
}

// openDevice opens /dev/fuse and mounts it on dir. serve is a second descriptor,
// for go-fuse, which owns it from then on.
func openDevice(dir string, o *Options) (d *device, serve int, err error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, -1, fmt.Errorf("mount point %s: %w", dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, -1, fmt.Errorf("mount point %s: %w", dir, unix.ENOTDIR)
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, -1, fmt.Errorf("open /dev/fuse: %w (is the fuse module loaded, and does a container get the device?)", err)
	}
	flags := o.Flags
	if o.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	data := []string{
		fmt.Sprintf("fd=%d", fd),
		"rootmode=40000",
		fmt.Sprintf("user_id=%d", os.Geteuid()),
		fmt.Sprintf("group_id=%d", os.Getegid()),
		fmt.Sprintf("max_read=%d", fsop.MaxData),
		"default_permissions",
	}
	if o.AllowOther {
		data = append(data, "allow_other")
	}
	if err := unix.Mount(o.FsName, dir, "fuse.mortar", flags, strings.Join(data, ",")); err != nil {
		unix.Close(fd)
		return nil, -1, fmt.Errorf("mount fuse.mortar on %s: %w", dir, err)
	}
	d, serve, err = newDevice(dir, fd, o)
	if err != nil {
		unix.Unmount(dir, unix.MNT_DETACH)
		unix.Close(fd)
	}
	return d, serve, err
}

// newDevice makes a device of a descriptor of /dev/fuse that is mounted on dir.
func newDevice(dir string, fd int, o *Options) (d *device, serve int, err error) {
	serve, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, -1, fmt.Errorf("duplicate /dev/fuse: %w", err)
	}
	d = &device{dir: dir, fd: fd, serve: serve, second: -1}
	if o.OwnProcess {
		d.second = openSecond(fd)
	}
	return d, serve, nil
}

// openSecond opens the device that fd is of once more, -1 if that cannot be.
func openSecond(fd int) int {
	const devIocClone = 0x8004e500 // FUSE_DEV_IOC_CLONE of linux/fuse.h
	second, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1
	}
	if err := unix.IoctlSetPointerInt(second, devIocClone, fd); err != nil {
		unix.Close(second)
		return -1
	}
	return second
}

// apart runs a notification that may have to wait for a request in flight, on a
// thread of its own that has the device open as d.second only.
//
// When this process is killed, the thread cannot end before its wait does, and
// that ends when the request is answered, which nobody does any more. But the
// descriptor from which the request was read is closed with the last of the
// other threads, and with it the kernel ends the request. Were it this
// thread's too, process, request and its caller would wait for each other for ever.
func (d *device) apart(notify func(fd int) error) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.fd < 0 {
		return unix.ENOTCONN
	}
	if d.second < 0 {
		return notify(d.fd)
	}
	d.placeMu.Lock()
	beside := slices.Clone(d.beside)
	d.placeMu.Unlock()
	done := make(chan error, 1)
	go onOwnThread(func() { // waited for below
		fd := d.second
		if err := unix.Unshare(unix.CLONE_FILES); err != nil {
			done <- notify(d.fd)
			return
		}
		// Everything else stays: this thread runs Go's runtime, which has its own.
		unix.Close(d.fd)
		unix.Close(d.serve)
		for _, other := range beside {
			unix.Close(other)
		}
		done <- notify(fd)
	})
	return <-done
}

// onOwnThread runs f on a thread that ends with it. That is never the process's
// first: it cannot end, and what it has open is what /proc shows of the process.
func onOwnThread(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		f()
		return // still locked: the thread ends
	}
	ran := make(chan struct{})
	go func() { // cannot get the thread that is locked here
		defer close(ran)
		runtime.LockOSThread()
		f()
	}()
	<-ran
	runtime.UnlockOSThread()
}

// notify writes one notification. EINVAL means that the kernel does not know
// the code; ENOENT that it does not know the object, which is what the caller
// wants of it; ENOTCONN that the file system is unmounted or was aborted.
func (d *device) notify(code int32, payload []byte) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.fd < 0 {
		return unix.ENOTCONN
	}
	return notify(d.fd, code, payload)
}

func notify(fd int, code int32, payload []byte) error {
	var buf [outHeaderSize + 16 + fsop.MaxName + 1]byte
	msg := append(buf[:outHeaderSize], payload...)
	binary.NativeEndian.PutUint32(msg[0:], uint32(len(msg)))
	binary.NativeEndian.PutUint32(msg[4:], uint32(code))

	for {
		_, err := unix.Write(fd, msg)
		switch err {
		case nil:
			return nil
		case unix.EINTR:
		case unix.ENODEV, unix.EPERM:
			return unix.ENOTCONN
		default:
			return err
		}
	}
}

// invalAttr makes the kernel forget an inode's attributes. It takes no lock
// that a request in flight could hold.
func (d *device) invalAttr(ino fsop.Ino) error {
	return d.notify(notifyInvalInode, invalInode(ino, -1, 0))
}

// invalPages makes the kernel forget an inode's attributes and pages. It waits
// for pages that are being read or written, so for requests in flight; busy
// says that there are some.
func (d *device) invalPages(ino fsop.Ino, busy bool) error {
	p := invalInode(ino, 0, 0)
	if busy {
		return d.apart(func(fd int) error { return notify(fd, notifyInvalInode, p) })
	}
	return d.notify(notifyInvalInode, p)
}

func invalInode(ino fsop.Ino, off, n int64) []byte {
	var p [24]byte
	binary.NativeEndian.PutUint64(p[0:], uint64(ino))
	binary.NativeEndian.PutUint64(p[8:], uint64(off))
	binary.NativeEndian.PutUint64(p[16:], uint64(n))
	return p[:]
}

// invalEntry makes the kernel forget a name, existing or not, and with it what is
// mounted on it or below. It waits for the directory's lock, so for requests in
// flight in that directory; busy says that there are some.
func (d *device) invalEntry(dir fsop.Ino, name string, busy bool) error {
	return d.entry(dir, name, 0, busy)
}

// expireEntry makes the kernel ask again for a name before it uses it. What is mounted
// there stays if the answer is what it was. It waits like invalEntry, and does the
// same before Linux 6.2.
func (d *device) expireEntry(dir fsop.Ino, name string, busy bool) error {
	return d.entry(dir, name, expireOnly, busy)
}

func (d *device) entry(dir fsop.Ino, name string, flags uint32, busy bool) error {
	var buf [16 + fsop.MaxName + 1]byte
	p := buf[:16]
	binary.NativeEndian.PutUint64(p[0:], uint64(dir))
	binary.NativeEndian.PutUint32(p[8:], uint32(len(name)))
	binary.NativeEndian.PutUint32(p[12:], flags)
	p = append(append(p, name...), 0)
	if busy {
		return d.apart(func(fd int) error { return notify(fd, notifyInvalEntry, p) })
	}
	return d.notify(notifyInvalEntry, p)
}

// incEpoch makes the kernel ask again for every name it knows before it uses
// it, and detach what is mounted on it or below, see Mount.epochs. It takes no
// lock. EINVAL before Linux 6.16.
func (d *device) incEpoch() error { return d.notify(notifyIncEpoch, nil) }

// resend makes the kernel send all requests again that were read and not answered.
func (d *device) resend() error { return d.notify(notifyResend, nil) }

// shrink makes the kernel drop every name that is not in use at this moment,
// absent ones above all. It is a side effect of reconfiguring the file system
// (Linux 5.2), here to what it is already, and takes no directory's lock. The
// kernel goes on to write what was stored through mappings. That is waited for
// no longer than shrinkPatience: the write may wait for whoever calls this.
func (d *device) shrink() error {
	done := make(chan error, 1)
	d.shrinking.Go(func() { done <- d.reconfigure() })
	patience := time.NewTimer(shrinkPatience)
	defer patience.Stop()
	select {
	case err := <-done:
		return err
	case <-patience.C:
		return nil
	}
}

// shrinkPatience is what a kernel takes to drop a million names, and more.
const shrinkPatience = time.Second

func (d *device) reconfigure() error {
	d.shrinkMu.Lock()
	defer d.shrinkMu.Unlock()
	dir := d.place()
	fd, err := unix.Fspick(unix.AT_FDCWD, dir, unix.FSPICK_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fspick %s: %w", dir, err)
	}
	defer unix.Close(fd)
	if err := unix.FsconfigReconfigure(fd); err != nil {
		return fmt.Errorf("reconfigure %s: %w", dir, err)
	}
	return nil
}

// dead reports whether the kernel has ended the connection.
func (d *device) dead() bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.fd < 0 {
		return true
	}
	p := []unix.PollFd{{Fd: int32(d.fd)}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0 && p[0].Revents&(unix.POLLERR|unix.POLLNVAL) != 0
}

// place is where it is mounted now.
func (d *device) place() string {
	d.placeMu.Lock()
	defer d.placeMu.Unlock()
	return d.dir
}

// unmount takes the file system out of the tree. While it is in use elsewhere
// the connection is ended too, and those who use it get ENOTCONN.
func (d *device) unmount() error {
	dir := d.place()
	err := unix.Unmount(dir, 0)
	if err == unix.EBUSY {
		err = unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

func (d *device) close() {
	d.shrinking.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fd >= 0 {
		unix.Close(d.fd)
		if d.second >= 0 {
			unix.Close(d.second)
		}
		d.fd, d.second = -1, -1
	}
}

// setReadahead raises the file system's read-ahead, which INIT can only lower
// from the kernel's default of 128 KiB. Without write access to /sys it stays.
func setReadahead(dir string, bytes int) error {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return err
	}
	path := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev))
	return os.WriteFile(path, fmt.Appendf(nil, "%d", bytes>>10), 0)
}
