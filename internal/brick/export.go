package brick

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
)

// Exported says what an Export did.
type Exported struct {
	Objects uint64 // files, directories and all else
	Bytes   uint64 // of contents
	// Problems is how many objects are not, or not entirely, what they were in
	// the brick.
	Problems uint64
}

// A Problem is something that is wrong with an object of a brick, or that kept
// it from being exported as it is.
type Problem struct {
	Path string // of the object, if it has one; else what it is called in the brick
	Err  error
}

func (p Problem) String() string { return fmt.Sprintf("%s: %v", p.Path, p.Err) }

// Export copies the tree below src in the brick, "/" for all, to the directory
// dest, which is made and must not have anything in it. Contents, holes, hard
// links, owners, modes, times, extended attributes and special files are kept
// where the file system and the rights of the process allow; problem is told of
// everything that is not as it was, and the export goes on. done, if not nil, is
// told about what was done after each object. An error means that the export
// ended early.
func (off *Offline) Export(ctx context.Context, src, dest string, problem func(Problem), done func(Exported)) (Exported, error) {
	x := &exporter{off: off, problem: problem, done: done, linked: map[fsop.Ino]string{}}
	root, err := off.Stat(src)
	if err != nil {
		return x.Exported, err
	}
	if !root.Attr.IsDir() {
		return x.Exported, fmt.Errorf("%s is not a directory of the volume; use cat for files", root.Path)
	}
	if err := os.Mkdir(dest, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return x.Exported, err
	}
	if names, err := os.ReadDir(dest); err != nil {
		return x.Exported, err
	} else if len(names) > 0 {
		return x.Exported, fmt.Errorf("%s is not empty: export into a new directory", dest)
	}
	x.top, err = unix.Open(dest, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return x.Exported, &os.PathError{Op: "open", Path: dest, Err: err}
	}
	defer unix.Close(x.top)
	x.root = root.Path
	err = x.directory(ctx, x.top, root.Path, &root.Attr)
	return x.Exported, err
}

// exporter carries an Export out. Names are made relative to the directory's
// descriptor: nobody who writes to dest meanwhile can lead it elsewhere.
type exporter struct {
	Exported
	off     *Offline
	problem func(Problem)
	done    func(Exported)
	root    string              // what is exported
	top     int                 // descriptor of the destination
	linked  map[fsop.Ino]string // where inodes with several names were made, below top
}

// trouble reports what is not as it was.
func (x *exporter) trouble(at string, err error) {
	x.Problems++
	x.problem(Problem{at, err})
}

// full reports whether err means that nothing more can be written.
func full(err error) bool {
	for _, e := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EROFS, syscall.EIO} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// errDest marks an error of the destination, which ends the export.
type errDest struct{ error }

func (e errDest) Unwrap() error { return e.error }

// directory fills the directory open as dir with the brick's at, whose
// attributes it gets when all is in it.
func (x *exporter) directory(ctx context.Context, dir int, at string, a *fsop.Attr) error {
	entries, err := x.off.entries(ctx, a.Ino)
	if err != nil {
		if ctx.Err() != nil {
			return err
		}
		x.trouble(at, err)
	}
	for i := range entries {
		e := &entries[i]
		if err := fsop.CheckName(e.Name); err != nil {
			x.trouble(path.Join(at, fmt.Sprintf("%q", e.Name)), err)
			continue
		}
		err := x.object(ctx, dir, path.Join(at, e.Name), e)
		var dest errDest
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.As(err, &dest) && full(dest.error):
			return fmt.Errorf("exporting %s: %w", path.Join(at, e.Name), dest.error)
		default:
			x.trouble(path.Join(at, e.Name), err)
		}
	}
	x.attributes(dir, ".", at, a)
	x.count()
	return nil
}

func (x *exporter) count() {
	x.Objects++
	if x.done != nil {
		x.done(x.Exported)
	}
}

// object makes one entry.
func (x *exporter) object(ctx context.Context, dir int, at string, e *fsop.Dirent) error {
	a := &e.Attr
	if a.Ino == 0 {
		return fmt.Errorf("its inode %d cannot be read", e.Ino)
	}
	if !a.IsDir() && a.Nlink > 1 {
		if first, ok := x.linked[a.Ino]; ok {
			if err := unix.Linkat(x.top, first, dir, e.Name, 0); err == nil {
				x.count()
				return nil
			}
			x.trouble(at, fmt.Errorf("could not be linked to %s, and was copied", first))
		} else {
			x.linked[a.Ino] = strings.TrimPrefix(strings.TrimPrefix(at, x.root), "/")
		}
	}
	switch a.Type() {
	case syscall.S_IFDIR:
		if err := unix.Mkdirat(dir, e.Name, 0o700); err != nil {
			return errDest{err}
		}
		fd, err := unix.Openat(dir, e.Name, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if err != nil {
			return errDest{err}
		}
		defer unix.Close(fd)
		return x.directory(ctx, fd, at, a)
	case syscall.S_IFREG:
		if err := x.file(ctx, dir, at, e); err != nil {
			return err
		}
	case syscall.S_IFLNK:
		r, err := x.off.read(&fsop.Readlink{Ino: a.Ino})
		if err != nil {
			return err
		}
		if err := unix.Symlinkat(string(r.Data), dir, e.Name); err != nil {
			return errDest{err}
		}
	default:
		// The encoding of device numbers in Rdev is the one that mknod takes.
		if err := unix.Mknodat(dir, e.Name, a.Type()|0o600, int(a.Rdev)); err != nil {
			return errDest{err}
		}
	}
	x.attributes(dir, e.Name, at, a)
	x.count()
	return nil
}

// file writes the contents of a regular file.
func (x *exporter) file(ctx context.Context, dir int, at string, e *fsop.Dirent) (err error) {
	fd, err := unix.Openat(dir, e.Name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return errDest{err}
	}
	f := os.NewFile(uintptr(fd), e.Name)
	defer func() {
		if cerr := f.Close(); err == nil && cerr != nil {
			err = errDest{cerr}
		}
	}()
	if err := f.Truncate(int64(e.Attr.Size)); err != nil {
		return errDest{err}
	}
	lost := uint64(0)
	var why error
	err = x.off.dataRanges(&e.Attr, func(from, to uint64) error {
		for from < to {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			n := min(to-from, fsop.MaxData)
			missing, err := x.copy(f, e.Attr.Ino, from, n)
			if missing > 0 && why == nil {
				why = err
			} else if err != nil && missing == 0 {
				return err
			}
			lost += missing
			from += n
		}
		return nil
	})
	if err != nil {
		return err
	}
	if lost > 0 {
		x.trouble(at, fmt.Errorf("%d bytes could not be read and are zeros: %w", lost, why))
	}
	return nil
}

// copy copies n bytes. What cannot be read is halved until it is a block that
// is given up: lost counts those bytes, and err tells why.
func (x *exporter) copy(f *os.File, ino fsop.Ino, off, n uint64) (lost uint64, err error) {
	r, err := x.off.read(&fsop.Read{Ino: ino, Off: off, Len: uint32(n)})
	if err == nil {
		if _, err := f.WriteAt(r.Data, int64(off)); err != nil {
			return 0, errDest{err}
		}
		x.Bytes += uint64(len(r.Data))
		return 0, nil
	}
	if n <= blockSize {
		return n, err
	}
	half := (n/2 + blockSize - 1) &^ (blockSize - 1)
	a, errA := x.copy(f, ino, off, half)
	if errA != nil && a == 0 {
		return 0, errA
	}
	b, errB := x.copy(f, ino, off+half, n-half)
	if errB != nil && b == 0 {
		return 0, errB
	}
	if errA == nil {
		errA = errB
	}
	if a+b == 0 {
		return 0, nil // it went well this time
	}
	return a + b, errA
}

// attributes gives name in dir what a says, as far as possible. Each step would
// undo something of a later one.
func (x *exporter) attributes(dir int, name, at string, a *fsop.Attr) {
	if err := unix.Fchownat(dir, name, int(a.UID), int(a.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		x.trouble(at, fmt.Errorf("owner %d:%d: %w", a.UID, a.GID, err))
	}
	if a.Type() != syscall.S_IFLNK {
		if err := unix.Fchmodat(dir, name, a.Mode&permMask, 0); err != nil {
			x.trouble(at, fmt.Errorf("mode %o: %w", a.Mode&permMask, err))
		}
	}
	x.xattrs(dir, name, at, a)
	times := []unix.Timespec{unix.NsecToTimespec(a.Atime), unix.NsecToTimespec(a.Mtime)}
	if err := unix.UtimesNanoAt(dir, name, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		x.trouble(at, fmt.Errorf("times: %w", err))
	}
}

func (x *exporter) xattrs(dir int, name, at string, a *fsop.Attr) {
	r, err := x.off.read(&fsop.Listxattr{Ino: a.Ino})
	if err != nil {
		x.trouble(at, fmt.Errorf("extended attributes: %w", err))
		return
	}
	// There is no setxattrat on older kernels; a path through the descriptor is
	// the same.
	file := fmt.Sprintf("/proc/self/fd/%d/%s", dir, name)
	for _, key := range strings.Split(strings.TrimSuffix(string(r.Data), "\x00"), "\x00") {
		if key == "" {
			continue
		}
		v, err := x.off.read(&fsop.Getxattr{Ino: a.Ino, Name: key})
		if err == nil {
			err = unix.Lsetxattr(file, key, v.Data, 0)
		}
		if err != nil {
			x.trouble(at, fmt.Errorf("extended attribute %s: %w", key, err))
		}
	}
}
