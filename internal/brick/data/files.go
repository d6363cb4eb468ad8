// Package data keeps the contents of files that are too large for the KV: one
// sparse file of the brick's disk for each, named by inode and incarnation.
//
// A data file is never the newest truth. The op log is: what was written is
// read from there until it was settled, copied to where it stays. That happens
// only to what the KV durably says is still in the log, so whatever is half
// written here after a crash is covered by it (see brick, settle.go).
package data

import (
	"container/list"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"mortar/internal/disk"
	"mortar/internal/fsop"
)

// Files is the data files of a brick. Its methods may be called concurrently.
type Files struct {
	fs   disk.FS
	dir  string
	idle int // open files kept that nobody uses

	mu   sync.Mutex
	open map[Name]*File
	lru  list.List // of *File that nobody uses, the longest unused in front
	dirs map[string]bool
}

// Name names a data file. Two incarnations of one inode are two files.
type Name struct {
	Ino         fsop.Ino
	Incarnation uint64
}

// A File is an open data file. Release gives it back.
type File struct {
	disk.File
	name Name
	fs   *Files
	refs int           // guarded by Files.mu
	elem *list.Element // in Files.lru, if refs is 0
	gone bool          // removed; guarded by Files.mu
}

// New returns the data files below directory dir, which need not exist. Up to
// idle of them are kept open unused.
func New(fs disk.FS, dir string, idle int) *Files {
	return &Files{fs: fs, dir: dir, idle: idle, open: map[Name]*File{}, dirs: map[string]bool{}}
}

func (f *Files) dirOf(n Name) string {
	return f.fs.PathJoin(f.dir, fmt.Sprintf("%02x", byte(n.Ino)))
}

// Path is where a data file is.
func (f *Files) Path(n Name) string {
	return f.fs.PathJoin(f.dirOf(n), fmt.Sprintf("%016x.%016x", uint64(n.Ino), n.Incarnation))
}

func parseName(s string) (n Name, ok bool) {
	a, b, ok := strings.Cut(s, ".")
	if !ok || len(a) != 16 || len(b) != 16 {
		return Name{}, false
	}
	ino, err1 := strconv.ParseUint(a, 16, 64)
	inc, err2 := strconv.ParseUint(b, 16, 64)
	return Name{fsop.Ino(ino), inc}, err1 == nil && err2 == nil
}

// Open opens a data file for reading and writing. The error wraps
// os.ErrNotExist if there is none.
func (f *Files) Open(n Name) (*File, error) { return f.get(n, os.O_RDWR) }

// OpenReadOnly opens a data file of a brick that must not be changed.
func (f *Files) OpenReadOnly(n Name) (*File, error) { return f.get(n, os.O_RDONLY) }

// Create makes a data file, empty whatever was there. It is durable after its
// own Sync and SyncDirs.
func (f *Files) Create(n Name) (*File, error) {
	dir := f.dirOf(n)
	f.mu.Lock()
	known := f.dirs[dir]
	f.mu.Unlock()
	if !known {
		if err := f.fs.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		if err := f.fs.SyncDir(f.dir); err != nil {
			return nil, err
		}
		f.mu.Lock()
		f.dirs[dir] = true
		f.mu.Unlock()
	}
	return f.get(n, os.O_RDWR|os.O_CREATE|os.O_TRUNC)
}

func (f *Files) get(n Name, flag int) (*File, error) {
	f.mu.Lock()
	if d := f.open[n]; d != nil {
		f.use(d)
		f.mu.Unlock()
		if flag&os.O_TRUNC != 0 {
			if err := d.Truncate(0); err != nil {
				d.Release()
				return nil, err
			}
		}
		return d, nil
	}
	f.mu.Unlock()
	file, err := f.fs.OpenFile(f.Path(n), flag)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if d := f.open[n]; d != nil { // somebody was faster
		f.use(d)
		file.Close()
		return d, nil
	}
	d := &File{File: file, name: n, fs: f, refs: 1}
	f.open[n] = d
	return d, nil
}

// Shorten cuts off what the file has behind length, if anything: an attempt to
// settle or to heal that did not end may have left it there.
func (d *File) Shorten(length uint64) error {
	st, err := d.Stat()
	if err != nil || uint64(st.Size()) <= length {
		return err
	}
	return d.Truncate(int64(length))
}

// Lengthen has the file end at length or later, with zeros: what is shorter than
// the KV says was cut by somebody else.
func (d *File) Lengthen(length uint64) error {
	st, err := d.Stat()
	if err != nil || uint64(st.Size()) >= length {
		return err
	}
	return d.Truncate(int64(length))
}

// use counts a user of d. f.mu is held.
func (f *Files) use(d *File) {
	if d.elem != nil {
		f.lru.Remove(d.elem)
		d.elem = nil
	}
	d.refs++
}

// Close hides the underlying file's: a File may have other users. See Release.
func (d *File) Close() error {
	d.Release()
	return nil
}

// Release ends this use of the file.
func (d *File) Release() {
	f := d.fs
	f.mu.Lock()
	defer f.mu.Unlock()
	d.refs--
	if d.refs > 0 {
		return
	}
	if d.gone {
		d.File.Close() // removed: there is nothing to lose
		return
	}
	d.elem = f.lru.PushBack(d)
	for f.lru.Len() > f.idle {
		f.drop(f.lru.Front().Value.(*File))
	}
}

// drop closes an unused file. f.mu is held.
func (f *Files) drop(d *File) {
	f.lru.Remove(d.elem)
	d.elem = nil
	delete(f.open, d.name)
	d.File.Close() // what matters was synced by whoever wrote it
}

// Name returns the file's name.
func (d *File) Name() Name { return d.name }

// Remove removes a data file, if it exists. Those who have it open keep it.
func (f *Files) Remove(n Name) error {
	f.mu.Lock()
	if d := f.open[n]; d != nil {
		delete(f.open, n)
		d.gone = true
		if d.refs == 0 {
			f.lru.Remove(d.elem)
			d.elem = nil
			d.File.Close()
		}
	}
	f.mu.Unlock()
	if err := f.fs.Remove(f.Path(n)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// SyncDirs makes the names of these files durable.
func (f *Files) SyncDirs(names []Name) error {
	done := map[string]bool{}
	for _, n := range names {
		dir := f.dirOf(n)
		if done[dir] {
			continue
		}
		done[dir] = true
		if err := f.fs.SyncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

// List calls fn for every data file there is, until it returns an error. What
// is not called like a data file is left alone.
func (f *Files) List(fn func(Name) error) error {
	dirs, err := f.fs.List(f.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, d := range dirs {
		if len(d) != 2 {
			continue
		}
		names, err := f.fs.List(f.fs.PathJoin(f.dir, d))
		if err != nil {
			return err
		}
		for _, s := range names {
			if n, ok := parseName(s); ok {
				if err := fn(n); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// CloseAll closes the files that nobody uses; the others follow when they are
// released.
func (f *Files) CloseAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.lru.Len() > 0 {
		f.drop(f.lru.Front().Value.(*File))
	}
	f.idle = 0
}
