package disk

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"
)

// OS is the file system of the machine.
var OS FS = &osFS{FS: vfs.Default}

var (
	_ FS   = (*osFS)(nil)
	_ File = (*osFile)(nil)
)

type osFS struct {
	vfs.FS
	flusher flusher
}

func (s *osFS) OpenFile(name string, flag int) (File, error) {
	f, err := os.OpenFile(name, flag|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	return &osFile{f, &s.flusher}, nil
}

func (s *osFS) SyncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	err = (&osFile{d, &s.flusher}).Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}

func (s *osFS) Statfs(name string) (Space, error) {
	var st unix.Statfs_t
	if err := retry(func() error { return unix.Statfs(name, &st) }); err != nil {
		return Space{}, &os.PathError{Op: "statfs", Path: name, Err: err}
	}
	unit := uint64(st.Frsize)
	return Space{
		Total:      st.Blocks * unit,
		Free:       st.Bfree * unit,
		Avail:      st.Bavail * unit,
		Files:      st.Files,
		FilesFree:  st.Ffree,
		ReadOnly:   st.Flags&unix.ST_RDONLY != 0,
		Filesystem: fsName(int64(st.Type)),
	}, nil
}

func (s *osFS) Unwrap() vfs.FS { return vfs.Default }

// The KV's files come from its own file system, but are flushed like all others.

func (s *osFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return s.forKV(s.FS.Create(name, c))
}

func (s *osFS) OpenReadWrite(name string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	return s.forKV(s.FS.OpenReadWrite(name, c, opts...))
}

func (s *osFS) ReuseForWrite(old, name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return s.forKV(s.FS.ReuseForWrite(old, name, c))
}

func (s *osFS) OpenDir(name string) (vfs.File, error) { return s.forKV(s.FS.OpenDir(name)) }

func (s *osFS) forKV(f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &kvFile{f, &s.flusher}, nil
}

// kvFile is a file that the KV writes. The KV does not close one while it syncs it.
type kvFile struct {
	vfs.File
	flusher *flusher
}

func (f *kvFile) Sync() error     { return f.flusher.fsync(int(f.Fd())) }
func (f *kvFile) SyncData() error { return f.flusher.fdatasync(int(f.Fd())) }

// SyncTo is what osFile has. The KV's own knows only ext4, and flushes elsewhere.
func (f *kvFile) SyncTo(length int64) (fullSync bool, err error) {
	return f.flusher.writeOut(int(f.Fd()), length)
}

func fsName(magic int64) string {
	switch magic {
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.EXT4_SUPER_MAGIC:
		return "ext4"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	case unix.TMPFS_MAGIC:
		return "tmpfs"
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "overlay"
	}
	return fmt.Sprintf("%#x", magic)
}

// osFile adds to os.File the calls that package os has not. They go through
// control, which keeps the descriptor from being closed, and reused for another
// file, while the system call runs.
type osFile struct {
	*os.File
	flusher *flusher
}

func (f *osFile) control(op string, call func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var cerr error
	err = c.Control(func(fd uintptr) { cerr = retry(func() error { return call(int(fd)) }) })
	if err == nil {
		err = cerr
	}
	if err != nil {
		return &os.PathError{Op: op, Path: f.Name(), Err: err}
	}
	return nil
}

// retry repeats a system call that a signal interrupted. The Go runtime sends
// signals to itself, so EINTR says nothing about the file.
func retry(call func() error) error {
	for {
		if err := call(); err != syscall.EINTR {
			return err
		}
	}
}

func (f *osFile) Stat() (vfs.FileInfo, error) {
	st, err := f.File.Stat()
	if err != nil {
		return nil, err
	}
	return fileInfo{st}, nil
}

// fileInfo leaves the device unnamed: the KV asks for it only to attribute
// statistics, and its type can be filled by its own package alone.
type fileInfo struct{ os.FileInfo }

func (fileInfo) DeviceID() vfs.DeviceID { return vfs.DeviceID{} }

func (f *osFile) Sync() error     { return f.control("fsync", f.flusher.fsync) }
func (f *osFile) SyncData() error { return f.control("fdatasync", f.flusher.fdatasync) }

// SyncTo starts writing the first length bytes out and does not wait for it.
func (f *osFile) SyncTo(length int64) (fullSync bool, err error) {
	err = f.control("sync_file_range", func(fd int) error {
		fullSync, err = f.flusher.writeOut(fd, length)
		return err
	})
	return fullSync, err
}

func (f *osFile) Prefetch(offset, length int64) error {
	return f.control("fadvise", func(fd int) error {
		return unix.Fadvise(fd, offset, length, unix.FADV_WILLNEED)
	})
}

func (f *osFile) Preallocate(offset, length int64) error {
	return f.control("fallocate", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, offset, length)
	})
}

// unsupported reports whether err says that this file system, or this pair of
// files, cannot do what was asked, and not that it failed.
func unsupported(err error) bool {
	for _, e := range []syscall.Errno{syscall.EOPNOTSUPP, syscall.ENOSYS, syscall.ENOTTY, syscall.EXDEV, syscall.EINVAL, syscall.ETXTBSY} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (f *osFile) Allocate(off, n int64) error {
	if off < 0 || n <= 0 {
		return fmt.Errorf("allocate %s: range %d+%d: %w", f.Name(), off, n, syscall.EINVAL)
	}
	err := f.control("fallocate", func(fd int) error { return unix.Fallocate(fd, 0, off, n) })
	if !unsupported(err) {
		return err
	}
	st, err := f.File.Stat()
	if err != nil {
		return err
	}
	from := max(off, st.Size())
	return writeZeros(f, from, off+n-from)
}

func (f *osFile) PunchHole(off, n int64) error {
	if off < 0 || n <= 0 {
		return fmt.Errorf("punch %s: range %d+%d: %w", f.Name(), off, n, syscall.EINVAL)
	}
	err := f.control("fallocate", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if !unsupported(err) {
		return err
	}
	st, err := f.File.Stat()
	if err != nil {
		return err
	}
	return writeZeros(f, off, min(off+n, st.Size())-off)
}

func (f *osFile) CloneRange(src File, srcOff, dstOff, n int64) error {
	s, ok := base(src).(*osFile)
	if !ok || srcOff < 0 || dstOff < 0 || n < 0 {
		return fmt.Errorf("clone into %s: range %d+%d to %d: %w", f.Name(), srcOff, n, dstOff, syscall.EINVAL)
	}
	whole := n &^ (BlockSize - 1)
	if whole > 0 && srcOff%BlockSize == 0 && dstOff%BlockSize == 0 {
		err := f.control("clone", func(dfd int) error {
			return s.control("clone", func(sfd int) error {
				return unix.IoctlFileCloneRange(dfd, &unix.FileCloneRange{
					Src_fd: int64(sfd), Src_offset: uint64(srcOff), Src_length: uint64(whole), Dest_offset: uint64(dstOff),
				})
			})
		})
		switch {
		case err == nil:
			srcOff, dstOff, n = srcOff+whole, dstOff+whole, n-whole
		case !unsupported(err):
			return err
		}
	}
	return copyRange(f, s, srcOff, dstOff, n)
}

func (f *osFile) Evict(off, n int64) error {
	return f.control("fadvise", func(fd int) error { return unix.Fadvise(fd, off, n, unix.FADV_DONTNEED) })
}

// wrapper is implemented by files that stand in front of another one.
type wrapper interface{ unwrap() File }

// base returns the file behind all wrappers.
func base(f File) File {
	for {
		w, ok := f.(wrapper)
		if !ok {
			return f
		}
		f = w.unwrap()
	}
}
