package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// disk is what a host has at /bricks. It lives in the host's process 1.
type disk struct {
	kind  Disk
	dir   string // of the machine, where images and directories lie
	bytes int64

	source string   // device, or the directory to bind
	loop   *os.File // keeps the loop device from clearing itself while unmounted
}

// make creates the disk. hidden is where a disk that is a directory is kept
// within the host's root while it is not mounted.
func (d *disk) make(hidden string) error {
	switch d.kind {
	case Dir:
		store := filepath.Join(d.dir, "bricks")
		if err := os.Mkdir(store, 0o755); err != nil {
			return err
		}
		d.source = hidden
		return mountAt(store, "", hidden, unix.MS_BIND, "")
	case Tmpfs:
		d.source = hidden
		return mountAt("tmpfs", "tmpfs", hidden, 0, fmt.Sprintf("mode=755,size=%d", d.bytes))
	case XFS:
		image := filepath.Join(d.dir, "disk.img")
		f, err := os.OpenFile(image, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := f.Truncate(d.bytes); err != nil {
			return err
		}
		if err := run("mkfs.xfs", "-q", "-f", "-i", "size=512", image); err != nil {
			return err
		}
		return d.attach(f, image)
	}
	return fmt.Errorf("unknown kind of disk %q", d.kind)
}

// attach makes a loop device of the image that the kernel clears by itself
// when the last user is gone.
func (d *disk) attach(image *os.File, name string) error {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer control.Close()
	for try := 0; ; try++ {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return fmt.Errorf("no free loop device: %w", err)
		}
		dev := fmt.Sprintf("/dev/loop%d", n)
		loop, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		c := unix.LoopConfig{Fd: uint32(image.Fd())}
		c.Info.Flags = unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
		copy(c.Info.File_name[:], name)
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &c)
		if err == unix.EINVAL { // the disk below cannot do unbuffered access
			c.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
			err = unix.IoctlLoopConfigure(int(loop.Fd()), &c)
		}
		if err == nil {
			d.source, d.loop = dev, loop
			return nil
		}
		loop.Close()
		if err != unix.EBUSY || try == 20 { // somebody else took it
			return fmt.Errorf("%s: %w", dev, err)
		}
	}
}

func (d *disk) mount(target string) error {
	if d.kind == XFS {
		return mountAt(d.source, "xfs", target, unix.MS_NOATIME, "inode64")
	}
	return mountAt(d.source, "", target, unix.MS_BIND, "")
}

// unmount waits for processes that are just ending.
func (d *disk) unmount(target string) (err error) {
	for deadline := time.Now().Add(5 * time.Second); ; {
		err = unix.Unmount(target, 0)
		if err != unix.EBUSY || time.Now().After(deadline) {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

// XFS_IOC_GOINGDOWN and its flag for not even writing the journal (xfs_fs.h).
const (
	xfsGoingDown       = 0x8004587d
	xfsGoingNoLogFlush = 2
)

// cutPower loses what was not flushed to the disk: the file system is shut down
// first, then the processes are ended, and the disk is left unmounted, with its
// journal to be replayed.
func (d *disk) cutPower(target string, kill func() error) error {
	if err := d.fail(target); err != nil {
		return err
	}
	if err := kill(); err != nil {
		return err
	}
	return d.unmount(target)
}

// fail shuts the file system down: every access from now on is an I/O error, until
// the disk was unmounted and mounted again.
func (d *disk) fail(target string) error {
	if d.kind != XFS {
		return errors.New("only an XFS disk can fail, or lose its power")
	}
	f, err := os.Open(target)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.IoctlSetPointerInt(int(f.Fd()), xfsGoingDown, xfsGoingNoLogFlush); err != nil {
		return fmt.Errorf("shut down %s: %w", target, err)
	}
	return nil
}
