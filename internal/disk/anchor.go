package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// ErrMoved says that a directory is not where it was, or that another one is there.
var ErrMoved = errors.New("the directory was moved, removed or replaced while it was in use")

// Anchor returns fsys for as long as dir is the directory that it is now. Whoever keeps files
// open and finds others by their paths would mix two directories if one took the other's
// place, and destroy both. So every path is refused with ErrMoved from then on: a
// directory is looked at before a file in it is opened, made, renamed or removed, and again
// after it was opened.
//
// The Closer ends the watch. A file system that is not the machine's own is returned as it is.
func Anchor(fsys FS, dir string) (FS, io.Closer, error) {
	if _, ok := fsys.(*osFS); !ok {
		return fsys, closerFunc(func() error { return nil }), nil
	}
	f, err := os.Open(dir) // as long as it is open, its number is given to no other directory
	if err != nil {
		return nil, nil, err
	}
	was, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return &anchored{FS: fsys, dir: dir, was: was}, f, nil
}

type anchored struct {
	FS
	dir string
	was os.FileInfo
}

var _ FS = (*anchored)(nil)

// there returns ErrMoved if the directory is not the one that it was.
func (a *anchored) there() error {
	now, err := os.Stat(a.dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(a.was, now) {
		return fmt.Errorf("%s: %w", a.dir, ErrMoved) // not as ErrNotExist: of the file asked for nothing is known
	}
	return err
}

// opened opens a file between two looks.
func opened[F io.Closer](a *anchored, open func() (F, error)) (f F, err error) {
	if err = a.there(); err == nil {
		f, err = open()
	}
	if merr := a.there(); merr != nil {
		if err == nil {
			f.Close() // nothing was done with it
		}
		var none F
		return none, merr
	}
	return f, err
}

func (a *anchored) OpenFile(name string, flag int) (File, error) {
	return opened(a, func() (File, error) { return a.FS.OpenFile(name, flag) })
}

func (a *anchored) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return opened(a, func() (vfs.File, error) { return a.FS.Create(name, c) })
}

func (a *anchored) Open(name string, opts ...vfs.OpenOption) (vfs.File, error) {
	return opened(a, func() (vfs.File, error) { return a.FS.Open(name, opts...) })
}

func (a *anchored) OpenReadWrite(name string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	return opened(a, func() (vfs.File, error) { return a.FS.OpenReadWrite(name, c, opts...) })
}

func (a *anchored) OpenDir(name string) (vfs.File, error) {
	return opened(a, func() (vfs.File, error) { return a.FS.OpenDir(name) })
}

func (a *anchored) ReuseForWrite(oldname, newname string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return opened(a, func() (vfs.File, error) { return a.FS.ReuseForWrite(oldname, newname, c) })
}

func (a *anchored) Lock(name string) (io.Closer, error) {
	return opened(a, func() (io.Closer, error) { return a.FS.Lock(name) })
}

// looked does something that has no file, between two looks.
func looked[T any](a *anchored, do func() (T, error)) (v T, err error) {
	if err = a.there(); err == nil {
		v, err = do()
	}
	if merr := a.there(); merr != nil {
		return v, merr
	}
	return v, err
}

func (a *anchored) do(f func() error) error {
	_, err := looked(a, func() (struct{}, error) { return struct{}{}, f() })
	return err
}

func (a *anchored) SyncDir(name string) error {
	return a.do(func() error { return a.FS.SyncDir(name) })
}

func (a *anchored) Link(oldname, newname string) error {
	return a.do(func() error { return a.FS.Link(oldname, newname) })
}

func (a *anchored) Remove(name string) error { return a.do(func() error { return a.FS.Remove(name) }) }

func (a *anchored) RemoveAll(name string) error {
	return a.do(func() error { return a.FS.RemoveAll(name) })
}

func (a *anchored) Rename(oldname, newname string) error {
	return a.do(func() error { return a.FS.Rename(oldname, newname) })
}

func (a *anchored) MkdirAll(dir string, perm os.FileMode) error {
	return a.do(func() error { return a.FS.MkdirAll(dir, perm) })
}

func (a *anchored) List(dir string) ([]string, error) {
	return looked(a, func() ([]string, error) { return a.FS.List(dir) })
}

func (a *anchored) Stat(name string) (vfs.FileInfo, error) {
	return looked(a, func() (vfs.FileInfo, error) { return a.FS.Stat(name) })
}

func (a *anchored) Statfs(name string) (Space, error) {
	return looked(a, func() (Space, error) { return a.FS.Statfs(name) })
}

func (a *anchored) GetDiskUsage(name string) (vfs.DiskUsage, error) {
	return looked(a, func() (vfs.DiskUsage, error) { return a.FS.GetDiskUsage(name) })
}
