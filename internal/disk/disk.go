// Package disk is the seam between the storage engine and the file system
// below it: everything that a brick keeps on disk, its log, its KV and its
// data files, goes through an FS of this package.
//
// The seam exists for the tests. Three implementations behave alike while all
// is well and differ in how they fail:
//
//   - OS is the machine's file system;
//   - Mem is a disk in memory that loses power on demand (Mem.Crash): what was
//     synced is kept, of the rest a random part;
//   - Faulty wraps another FS and fails, tears or hangs chosen calls.
//
// A fourth, Overlay, shows another FS and keeps changes to itself, for those who
// look at the files of a brick that must stay as they are.
//
// FS contains the KV's own interface (pebble's vfs.FS), so that log, KV and
// data files of one brick live on one disk and lose power together.
package disk

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// BlockSize is the unit in which file systems allocate, share and punch. The
// offsets of a range that is to be shared by CloneRange must be multiples of it.
const BlockSize = 4096

// FS is a file system as a brick needs it. Names are paths of the FS's own
// root, separated by '/'. All methods may be called concurrently. Errors wrap
// those of package os (os.ErrNotExist, os.ErrExist) and syscall.Errno.
//
// Nothing but Sync, SyncData and SyncDir makes anything durable: not Close, not
// Rename. A new, renamed or removed name is durable after SyncDir of its
// directory.
type FS interface {
	vfs.FS

	// OpenFile opens a file as os.OpenFile does. Of the flags, O_RDONLY or
	// O_RDWR, O_CREATE, O_EXCL and O_TRUNC have a meaning. A new file has mode
	// 0600.
	OpenFile(name string, flag int) (File, error)

	// SyncDir makes the names in directory name durable.
	SyncDir(name string) error

	// Statfs tells the size of the file system that holds name.
	Statfs(name string) (Space, error)
}

// File is an open file. ReadAt, WriteAt, SyncData and CloneRange may be called
// concurrently with each other; none but Close depends on the file position.
type File interface {
	// File is the part that the KV knows. Its comment asks that writes and
	// syncs do not overlap; files of this package have no such rule. Its
	// Preallocate reserves space beyond the end without changing the size and
	// is allowed to do nothing; see Allocate.
	vfs.File

	// Truncate sets the size. A file that grows reads as zeros in its new part.
	Truncate(size int64) error

	// Allocate makes the n bytes from off part of the file and gives them disk
	// space: the size grows if needed, what had no space reads as zeros, and
	// writing there does not fail for want of space. Where the file system
	// cannot reserve (EOPNOTSUPP), zeros are written beyond the current end.
	Allocate(off, n int64) error

	// PunchHole frees the space of n bytes from off, which then read as zeros.
	// The size does not change. Where the file system cannot, zeros are written.
	PunchHole(off, n int64) error

	// CloneRange makes n bytes from dstOff equal to n bytes from srcOff of src,
	// which must be of the same FS and reach that far. Whole blocks are shared
	// and not copied where the file system can (XFS, btrfs), both offsets are
	// multiples of BlockSize and the files are on one file system; the rest is
	// copied. The ranges must not overlap within one file.
	CloneRange(src File, srcOff, dstOff, n int64) error

	// Evict drops what memory has of n bytes from off and need not be written, so
	// that it is read from the disk again; n 0 means all that follows. After a
	// failed sync the kernel may show data that the disk never got: Sync, then
	// Evict, then look.
	Evict(off, n int64) error
}

// Space is what a file system has, in bytes and files.
type Space struct {
	Total      uint64 // bytes
	Free       uint64 // bytes not in use
	Avail      uint64 // bytes that this process may still use
	Files      uint64 // inodes that can exist; 0 if the file system has no such limit
	FilesFree  uint64
	ReadOnly   bool
	Filesystem string // "xfs", "ext4", "btrfs", "tmpfs", "overlay" or a magic number
}

// ReadFile returns the contents of a file of at most limit bytes.
func ReadFile(fs FS, name string, limit int64) ([]byte, error) {
	f, err := fs.OpenFile(name, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() > limit {
		return nil, fmt.Errorf("%s: %d bytes, expected at most %d", name, st.Size(), limit)
	}
	b := make([]byte, st.Size())
	if _, err := f.ReadAt(b, 0); err != nil && !(errors.Is(err, io.EOF) && len(b) == 0) {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}

// WriteFile replaces or makes the file name with contents b, durably and at
// once: after a crash it has its old contents or the new ones. It uses
// name+".tmp" on the way.
func WriteFile(fs FS, name string, b []byte) error {
	tmp := name + ".tmp"
	f, err := fs.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, 0)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = fs.Rename(tmp, name)
	}
	if err != nil {
		fs.Remove(tmp) // nothing depends on it; the first error is the one that matters
		return err
	}
	return fs.SyncDir(fs.PathDir(name))
}

// copyRange is CloneRange for those who cannot share.
func copyRange(dst, src File, srcOff, dstOff, n int64) error {
	if n <= 0 {
		return nil
	}
	buf := make([]byte, min(n, 256<<10))
	for n > 0 {
		p := buf[:min(n, int64(len(buf)))]
		if m, err := src.ReadAt(p, srcOff); err != nil && !(errors.Is(err, io.EOF) && m == len(p)) {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("copying a range: %w", err)
		}
		if _, err := dst.WriteAt(p, dstOff); err != nil {
			return fmt.Errorf("copying a range: %w", err)
		}
		srcOff, dstOff, n = srcOff+int64(len(p)), dstOff+int64(len(p)), n-int64(len(p))
	}
	return nil
}

// writeZeros writes n zeros from off.
func writeZeros(f File, off, n int64) error {
	if n <= 0 {
		return nil
	}
	buf := make([]byte, min(n, 256<<10))
	for n > 0 {
		p := buf[:min(n, int64(len(buf)))]
		if _, err := f.WriteAt(p, off); err != nil {
			return err
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}
