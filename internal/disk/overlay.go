package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// Overlay is an FS that shows another one, the lower, and keeps every change to
// itself, in memory. So a program that must write in order to read, to recover
// after a crash for instance, can look at files without changing them. They
// must not be changed by anybody else meanwhile.
//
// What it does not do: link or rename directories of the lower FS, and lock
// them against other programs.
type Overlay struct {
	lower FS
	upper *Mem // what was made since

	mu   sync.Mutex      // guards what follows, and changes of names
	gone map[string]bool // names of the lower FS that are hidden, with all below
	cows map[string]*cow // files of the lower FS that are open or were changed
}

var (
	_ FS   = (*Overlay)(nil)
	_ File = (*cowFile)(nil)
)

// NewOverlay returns an overlay over lower. It holds files open until Close.
func NewOverlay(lower FS) *Overlay {
	return &Overlay{lower: lower, upper: NewMem(), gone: map[string]bool{}, cows: map[string]*cow{}}
}

// Close forgets all changes.
func (o *Overlay) Close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, c := range o.cows {
		c.lower.Close()
	}
	o.cows = nil
}

// cow is a file of the lower FS with its changes (copy on write).
type cow struct {
	name  string
	lower File
	refs  int // open files; guarded by Overlay.mu

	mu    sync.RWMutex
	low   int64 // the bytes of lower before it are seen where there is no page
	size  int64
	pages map[int64]*page
	dirty bool
}

func clean(name string) string { return path.Clean("/" + name) }

// below returns what the lower FS has under name, os.ErrNotExist if that is
// nothing or hidden. o.mu is held.
func (o *Overlay) below(name string) (vfs.FileInfo, error) {
	for at := clean(name); ; at = path.Dir(at) {
		if o.gone[at] {
			return nil, pathError("stat", name, syscall.ENOENT)
		}
		if at == "/" {
			return o.lower.Stat(name)
		}
	}
}

// above reports whether name is, or is in, the upper FS.
func (o *Overlay) above(name string) bool {
	_, err := o.upper.Stat(name)
	return err == nil
}

// stat is Stat with o.mu held.
func (o *Overlay) stat(name string) (vfs.FileInfo, error) {
	if st, err := o.upper.Stat(name); err == nil && !st.IsDir() {
		return st, nil
	}
	st, err := o.below(name)
	if errors.Is(err, fs.ErrNotExist) {
		return o.upper.Stat(name) // a directory, or nothing
	}
	if c := o.cows[clean(name)]; err == nil && c != nil {
		c.mu.RLock()
		defer c.mu.RUnlock()
		return memInfo{name: st.Name(), size: c.size, mode: st.Mode(), modTime: st.ModTime()}, nil
	}
	return st, err
}

// mkParent makes sure that the upper FS has the directory of name, if there is
// one at all. o.mu is held.
func (o *Overlay) mkParent(name string) error {
	dir := path.Dir(clean(name))
	st, err := o.stat(dir)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return pathError("open", name, syscall.ENOTDIR)
	}
	return o.upper.MkdirAll(dir, 0o700)
}

// OpenFile implements FS.
func (o *Overlay) OpenFile(name string, flag int) (File, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.open(name, flag)
}

func (o *Overlay) open(name string, flag int) (File, error) {
	if o.above(name) {
		if st, err := o.upper.Stat(name); err != nil || !st.IsDir() {
			return o.upper.OpenFile(name, flag)
		}
	}
	st, err := o.below(name)
	switch {
	case errors.Is(err, fs.ErrNotExist) && flag&os.O_CREATE != 0:
		if err := o.mkParent(name); err != nil {
			return nil, err
		}
		return o.upper.OpenFile(name, flag)
	case err != nil:
		return nil, err
	case flag&os.O_CREATE != 0 && flag&os.O_EXCL != 0:
		return nil, pathError("open", name, syscall.EEXIST)
	case st.IsDir():
		return nil, pathError("open", name, syscall.EISDIR)
	}
	key := clean(name)
	c := o.cows[key]
	if c == nil {
		lower, err := o.lower.OpenFile(name, os.O_RDONLY)
		if err != nil {
			return nil, err
		}
		c = &cow{name: name, lower: lower, low: st.Size(), size: st.Size(), pages: map[int64]*page{}}
		o.cows[key] = c
	}
	c.refs++
	f := &cowFile{o: o, c: c, writable: flag&os.O_RDWR != 0}
	if flag&os.O_TRUNC != 0 {
		if err := f.Truncate(0); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// release ends a use of c. One that was not changed need not be kept.
func (o *Overlay) release(c *cow) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c.refs--
	c.mu.Lock()
	defer c.mu.Unlock()
	current := o.cows[clean(c.name)] == c
	if c.refs == 0 && (!current || !c.dirty) {
		c.lower.Close()
		if current {
			delete(o.cows, clean(c.name))
		}
	}
}

// hide takes the name away from the lower FS. o.mu is held.
func (o *Overlay) hide(name string) {
	key := clean(name)
	o.gone[key] = true
	if c := o.cows[key]; c != nil {
		delete(o.cows, key)
		if c.refs == 0 {
			c.lower.Close()
		}
	}
}

// SyncDir implements FS. It does nothing: the changes are gone with the process.
func (o *Overlay) SyncDir(name string) error {
	_, err := o.Stat(name)
	return err
}

// Statfs implements FS.
func (o *Overlay) Statfs(name string) (Space, error) {
	if _, err := o.Stat(name); err != nil {
		return Space{}, err
	}
	for at := name; ; at = o.PathDir(at) { // up to what the lower FS has
		s, err := o.lower.Statfs(at)
		if err == nil || !errors.Is(err, fs.ErrNotExist) || at == o.PathDir(at) {
			return s, err
		}
	}
}

// Create implements vfs.FS.
func (o *Overlay) Create(name string, _ vfs.DiskWriteCategory) (vfs.File, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if err := o.remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return o.open(name, os.O_RDWR|os.O_CREATE)
}

// Link implements vfs.FS, by copying.
func (o *Overlay) Link(oldname, newname string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, err := o.stat(oldname); err != nil {
		return err
	}
	if _, err := o.stat(newname); err == nil {
		return &os.LinkError{Op: "link", Old: oldname, New: newname, Err: syscall.EEXIST}
	}
	if err := o.lift(oldname); err != nil {
		return err
	}
	if err := o.mkParent(newname); err != nil {
		return err
	}
	return o.upper.Link(oldname, newname)
}

// lift copies a file into the upper FS, if it is not there. o.mu is held.
func (o *Overlay) lift(name string) error {
	if o.above(name) {
		return nil
	}
	f, err := o.open(name, os.O_RDONLY)
	if err != nil {
		return err
	}
	src := f.(*cowFile)
	defer func() { src.c.refs-- }() // Close wants o.mu; an unchanged file is forgotten by the next to close it
	if err := o.mkParent(name); err != nil {
		return err
	}
	dst, err := o.upper.OpenFile(name, os.O_RDWR|os.O_CREATE)
	if err != nil {
		return err
	}
	defer dst.Close()
	if err := copyRange(dst, src, 0, 0, src.c.size); err != nil {
		o.upper.Remove(name) // the lower one is to be seen as before
		return err
	}
	o.gone[clean(name)] = true
	delete(o.cows, clean(name))
	if src.c.refs == 1 {
		return src.c.lower.Close()
	}
	return nil
}

// Open implements vfs.FS.
func (o *Overlay) Open(name string, opts ...vfs.OpenOption) (vfs.File, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	st, err := o.stat(name)
	if err != nil {
		return nil, err
	}
	if st.IsDir() {
		if err := o.upper.MkdirAll(name, 0o700); err != nil {
			return nil, err
		}
		return o.upper.Open(name)
	}
	return o.open(name, os.O_RDONLY)
}

// OpenReadWrite implements vfs.FS.
func (o *Overlay) OpenReadWrite(name string, _ vfs.DiskWriteCategory, _ ...vfs.OpenOption) (vfs.File, error) {
	return o.OpenFile(name, os.O_RDWR|os.O_CREATE)
}

// OpenDir implements vfs.FS.
func (o *Overlay) OpenDir(name string) (vfs.File, error) {
	st, err := o.Stat(name)
	if err == nil && !st.IsDir() {
		err = pathError("open", name, syscall.ENOTDIR)
	}
	if err != nil {
		return nil, err
	}
	return o.Open(name)
}

// Remove implements vfs.FS.
func (o *Overlay) Remove(name string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.remove(name)
}

func (o *Overlay) remove(name string) error {
	st, err := o.stat(name)
	if err != nil {
		return err
	}
	if st.IsDir() {
		if names, err := o.list(name); err != nil || len(names) > 0 {
			return pathError("remove", name, syscall.ENOTEMPTY)
		}
	}
	return o.removeAll(name)
}

// RemoveAll implements vfs.FS.
func (o *Overlay) RemoveAll(name string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.removeAll(name)
}

func (o *Overlay) removeAll(name string) error {
	if _, err := o.below(name); err == nil {
		o.hide(name)
	}
	return o.upper.RemoveAll(name)
}

// Rename implements vfs.FS.
func (o *Overlay) Rename(oldname, newname string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if st, err := o.stat(oldname); err != nil {
		return err
	} else if st.IsDir() {
		return &os.LinkError{Op: "rename", Old: oldname, New: newname, Err: syscall.EOPNOTSUPP}
	}
	if clean(oldname) == clean(newname) {
		return nil
	}
	if st, err := o.stat(newname); err == nil && st.IsDir() {
		return &os.LinkError{Op: "rename", Old: oldname, New: newname, Err: syscall.EISDIR}
	}
	if err := o.lift(oldname); err != nil {
		return err
	}
	if err := o.mkParent(newname); err != nil {
		return err
	}
	if _, err := o.below(newname); err == nil {
		o.hide(newname)
	}
	return o.upper.Rename(oldname, newname)
}

// ReuseForWrite implements vfs.FS.
func (o *Overlay) ReuseForWrite(oldname, newname string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if err := o.Rename(oldname, newname); err != nil {
		return nil, err
	}
	return o.OpenReadWrite(newname, c)
}

// MkdirAll implements vfs.FS.
func (o *Overlay) MkdirAll(name string, perm os.FileMode) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for at := clean(name); at != "/"; at = path.Dir(at) {
		if st, err := o.stat(at); err == nil && !st.IsDir() {
			return pathError("mkdir", name, syscall.ENOTDIR)
		}
	}
	return o.upper.MkdirAll(name, perm)
}

// Lock implements vfs.FS, among the users of this overlay.
func (o *Overlay) Lock(name string) (io.Closer, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if err := o.mkParent(name); err != nil {
		return nil, err
	}
	return o.upper.Lock(name)
}

// List implements vfs.FS.
func (o *Overlay) List(name string) ([]string, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.list(name)
}

func (o *Overlay) list(name string) ([]string, error) {
	names, err := o.upper.List(name)
	st, lerr := o.below(name)
	if lerr != nil {
		return names, err
	}
	if !st.IsDir() {
		return nil, pathError("list", name, syscall.ENOTDIR)
	}
	low, err := o.lower.List(name)
	if err != nil {
		return nil, err
	}
	for _, n := range low {
		if !o.gone[path.Join(clean(name), n)] {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// Stat implements vfs.FS.
func (o *Overlay) Stat(name string) (vfs.FileInfo, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.stat(name)
}

// PathBase implements vfs.FS.
func (o *Overlay) PathBase(p string) string { return o.lower.PathBase(p) }

// PathJoin implements vfs.FS.
func (o *Overlay) PathJoin(elem ...string) string { return o.lower.PathJoin(elem...) }

// PathDir implements vfs.FS.
func (o *Overlay) PathDir(p string) string { return o.lower.PathDir(p) }

// GetDiskUsage implements vfs.FS.
func (o *Overlay) GetDiskUsage(name string) (vfs.DiskUsage, error) {
	s, err := o.Statfs(name)
	return vfs.DiskUsage{AvailBytes: s.Avail, TotalBytes: s.Total, UsedBytes: s.Total - s.Free}, err
}

// Unwrap implements vfs.FS. The lower FS must not be found: it must not be written.
func (*Overlay) Unwrap() vfs.FS { return nil }

// page returns block i for writing. c.mu is held.
func (c *cow) page(i int64) (*page, error) {
	p := c.pages[i]
	if p == nil {
		p = new(page)
		if at := i * BlockSize; at < c.low {
			n := min(BlockSize, c.low-at)
			if m, err := c.lower.ReadAt(p[:n], at); err != nil && !(errors.Is(err, io.EOF) && int64(m) == n) {
				return nil, err
			}
		}
	} else if p == zeroPage {
		p = new(page)
	}
	c.pages[i] = p
	c.dirty = true
	return p, nil
}

// cowFile is an open file of the lower FS.
type cowFile struct {
	o        *Overlay
	c        *cow
	writable bool

	mu     sync.Mutex
	pos    int64
	closed bool
}

func (f *cowFile) check(op string, write bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return pathError(op, f.c.name, os.ErrClosed)
	}
	if write && !f.writable {
		return pathError(op, f.c.name, syscall.EBADF)
	}
	return nil
}

func (f *cowFile) Close() error {
	if err := f.check("close", false); err != nil {
		return err
	}
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.o.release(f.c)
	return nil
}

func (f *cowFile) Read(p []byte) (int, error) {
	f.mu.Lock()
	pos := f.pos
	f.mu.Unlock()
	n, err := f.ReadAt(p, pos)
	f.mu.Lock()
	f.pos += int64(n)
	f.mu.Unlock()
	if n > 0 && errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

func (f *cowFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.check("read", false); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, pathError("read", f.c.name, syscall.EINVAL)
	}
	c := f.c
	c.mu.RLock()
	defer c.mu.RUnlock()
	done := 0
	for done < len(p) && off < c.size {
		n := min(int64(len(p)-done), c.size-off)
		if len(c.pages) > 0 || off+n > c.low {
			n = min(n, BlockSize-off%BlockSize)
		}
		q := p[done : done+int(n)]
		if page := c.pages[off/BlockSize]; page != nil {
			copy(q, page[off%BlockSize:])
		} else {
			low := max(0, min(n, c.low-off))
			if low > 0 {
				if m, err := c.lower.ReadAt(q[:low], off); err != nil && !(errors.Is(err, io.EOF) && int64(m) == low) {
					return done, err
				}
			}
			clear(q[low:])
		}
		done, off = done+int(n), off+n
	}
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}

func (f *cowFile) Write(p []byte) (int, error) {
	f.mu.Lock()
	pos := f.pos
	f.pos += int64(len(p))
	f.mu.Unlock()
	return f.WriteAt(p, pos)
}

func (f *cowFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.check("write", true); err != nil {
		return 0, err
	}
	if off < 0 || off+int64(len(p)) < off {
		return 0, pathError("write", f.c.name, syscall.EFBIG)
	}
	c := f.c
	c.mu.Lock()
	defer c.mu.Unlock()
	done := 0
	for done < len(p) {
		at := off + int64(done)
		page, err := c.page(at / BlockSize)
		if err != nil {
			return done, err
		}
		done += copy(page[at%BlockSize:], p[done:])
	}
	if done > 0 {
		c.size = max(c.size, off+int64(done))
	}
	return done, nil
}

func (f *cowFile) Truncate(size int64) error {
	if err := f.check("truncate", true); err != nil {
		return err
	}
	if size < 0 {
		return pathError("truncate", f.c.name, syscall.EINVAL)
	}
	c := f.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if size < c.size {
		for i := range c.pages {
			if i*BlockSize >= size {
				delete(c.pages, i)
			}
		}
		if in := size % BlockSize; in != 0 {
			page, err := c.page(size / BlockSize)
			if err != nil {
				return err
			}
			clear(page[in:])
		}
		c.low = min(c.low, size)
	}
	c.size, c.dirty = size, true
	return nil
}

func (f *cowFile) Allocate(off, n int64) error {
	if err := f.check("allocate", true); err != nil {
		return err
	}
	if off < 0 || n <= 0 || off+n < off {
		return pathError("allocate", f.c.name, syscall.EINVAL)
	}
	f.c.mu.Lock()
	defer f.c.mu.Unlock()
	f.c.size, f.c.dirty = max(f.c.size, off+n), true
	return nil
}

func (f *cowFile) PunchHole(off, n int64) error {
	if err := f.check("punch", true); err != nil {
		return err
	}
	if off < 0 || n <= 0 || off+n < off {
		return pathError("punch", f.c.name, syscall.EINVAL)
	}
	c := f.c
	c.mu.Lock()
	defer c.mu.Unlock()
	end := min(off+n, c.size)
	for off < end {
		in := off % BlockSize
		k := min(BlockSize-in, end-off)
		if k == BlockSize {
			c.pages[off/BlockSize] = zeroPage
		} else {
			page, err := c.page(off / BlockSize)
			if err != nil {
				return err
			}
			clear(page[in : in+k])
		}
		off += k
	}
	c.dirty = true
	return nil
}

func (f *cowFile) CloneRange(src File, srcOff, dstOff, n int64) error {
	if srcOff < 0 || dstOff < 0 || n < 0 {
		return pathError("clone", f.c.name, syscall.EINVAL)
	}
	return copyRange(f, src, srcOff, dstOff, n)
}

func (f *cowFile) Stat() (vfs.FileInfo, error) {
	f.c.mu.RLock()
	defer f.c.mu.RUnlock()
	return memInfo{name: path.Base(f.c.name), size: f.c.size, mode: 0o600, modTime: time.Time{}}, nil
}

func (f *cowFile) Sync() error                             { return f.check("sync", false) }
func (f *cowFile) SyncData() error                         { return f.check("sync", false) }
func (f *cowFile) SyncTo(int64) (fullSync bool, err error) { return false, f.check("sync", false) }
func (f *cowFile) Preallocate(_, _ int64) error            { return f.check("preallocate", true) }
func (f *cowFile) Prefetch(_, _ int64) error               { return nil }
func (f *cowFile) Evict(_, _ int64) error                  { return nil }
func (f *cowFile) Fd() uintptr                             { return vfs.InvalidFd }

// String says how much was changed; for the failure messages of tests.
func (o *Overlay) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return fmt.Sprintf("%d names hidden, %d files open or changed, new:\n%v", len(o.gone), len(o.cows), o.upper)
}
