package disk

import (
	"io"
	"os"
	"path"
	"sync"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// memFile is an open file or directory.
type memFile struct {
	m        *Mem
	n        *memNode
	name     string
	writable bool

	mu     sync.Mutex
	pos    int64
	closed bool
}

// check refuses a call on a closed file, on a directory, or for writing on a
// file opened for reading.
func (f *memFile) check(op string, write bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.closed:
		return pathError(op, f.name, os.ErrClosed)
	case f.n.dir:
		return pathError(op, f.name, syscall.EISDIR)
	case write && !f.writable:
		return pathError(op, f.name, syscall.EBADF)
	}
	return nil
}

func (f *memFile) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return pathError("close", f.name, os.ErrClosed)
	}
	f.closed = true
	return nil
}

func (f *memFile) Read(p []byte) (int, error) {
	f.mu.Lock()
	pos := f.pos
	f.mu.Unlock()
	n, err := f.ReadAt(p, pos)
	f.mu.Lock()
	f.pos += int64(n)
	f.mu.Unlock()
	if n > 0 {
		err = nil
	}
	return n, err
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.check("read", false); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, pathError("read", f.name, syscall.EINVAL)
	}
	f.n.mu.Lock()
	defer f.n.mu.Unlock()
	done := 0
	for done < len(p) && off < f.n.size {
		in := off % BlockSize
		k := min(int64(len(p)-done), BlockSize-in, f.n.size-off)
		copy(p[done:done+int(k)], orZero(f.n.pages[off/BlockSize])[in:])
		done, off = done+int(k), off+k
	}
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}

func (f *memFile) Write(p []byte) (int, error) {
	f.mu.Lock()
	pos := f.pos
	f.pos += int64(len(p))
	f.mu.Unlock()
	return f.WriteAt(p, pos)
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.check("write", true); err != nil {
		return 0, err
	}
	if off < 0 || off+int64(len(p)) < off {
		return 0, pathError("write", f.name, syscall.EFBIG)
	}
	f.n.mu.Lock()
	defer f.n.mu.Unlock()
	if err := f.m.grow(f.n, f.n.missing(off, int64(len(p)))); err != nil {
		return 0, pathError("write", f.name, err)
	}
	done := 0
	for done < len(p) {
		at := off + int64(done)
		done += copy(f.n.own(at / BlockSize)[at%BlockSize:], p[done:])
	}
	if done > 0 {
		f.n.size = max(f.n.size, off+int64(done))
		f.n.modTime = time.Now()
	}
	return done, nil
}

func (f *memFile) Truncate(size int64) error {
	if err := f.check("truncate", true); err != nil {
		return err
	}
	if size < 0 {
		return pathError("truncate", f.name, syscall.EINVAL)
	}
	f.n.mu.Lock()
	defer f.n.mu.Unlock()
	before := f.n.allocated()
	if size < f.n.size {
		f.n.trim(size)
	}
	f.n.size = size
	f.n.modTime = time.Now()
	return f.m.grow(f.n, (f.n.allocated()-before)/BlockSize)
}

func (f *memFile) Allocate(off, n int64) error {
	if err := f.check("allocate", true); err != nil {
		return err
	}
	if off < 0 || n <= 0 || off+n < off {
		return pathError("allocate", f.name, syscall.EINVAL)
	}
	f.n.mu.Lock()
	defer f.n.mu.Unlock()
	if err := f.m.grow(f.n, f.n.missing(off, n)); err != nil {
		return pathError("allocate", f.name, err)
	}
	for i := off / BlockSize; i*BlockSize < off+n; i++ {
		if f.n.pages[i] == nil {
			f.n.pages[i] = zeroPage
			f.n.dirty[i] = true
		}
	}
	f.n.size = max(f.n.size, off+n)
	return nil
}

func (f *memFile) PunchHole(off, n int64) error {
	if err := f.check("punch", true); err != nil {
		return err
	}
	if off < 0 || n <= 0 || off+n < off {
		return pathError("punch", f.name, syscall.EINVAL)
	}
	f.n.mu.Lock()
	defer f.n.mu.Unlock()
	before := f.n.allocated()
	end := min(off+n, f.n.size)
	for off < end {
		in := off % BlockSize
		k := min(BlockSize-in, end-off)
		if i := off / BlockSize; f.n.pages[i] != nil {
			if k == BlockSize {
				delete(f.n.pages, i)
				f.n.dirty[i] = true
			} else {
				clear(f.n.own(i)[in : in+k])
			}
		}
		off += k
	}
	return f.m.grow(f.n, (f.n.allocated()-before)/BlockSize)
}

func (f *memFile) CloneRange(src File, srcOff, dstOff, n int64) error {
	if srcOff < 0 || dstOff < 0 || n < 0 {
		return pathError("clone", f.name, syscall.EINVAL)
	}
	return copyRange(f, base(src), srcOff, dstOff, n)
}

func (f *memFile) Stat() (vfs.FileInfo, error) {
	f.n.mu.Lock()
	defer f.n.mu.Unlock()
	st := memInfo{name: path.Base(f.name), size: f.n.size, mode: 0o600, modTime: f.n.modTime}
	if f.n.dir {
		st.mode = os.ModeDir | 0o755
	}
	return st, nil
}

func (f *memFile) Sync() error {
	if f.n.dir {
		f.m.mu.Lock()
		defer f.m.mu.Unlock()
		f.n.sync()
		return nil
	}
	return f.SyncData()
}

func (f *memFile) SyncData() error {
	if f.n.dir {
		return f.Sync()
	}
	if err := f.check("sync", false); err != nil {
		return err
	}
	f.n.mu.Lock()
	defer f.n.mu.Unlock()
	for i := range f.n.dirty {
		if p := f.n.pages[i]; p != nil {
			f.n.durable.pages[i] = p
		} else {
			delete(f.n.durable.pages, i)
		}
	}
	clear(f.n.dirty)
	f.n.durable.size = f.n.size
	return nil
}

// SyncTo promises nothing, so it does nothing.
func (f *memFile) SyncTo(int64) (fullSync bool, err error) { return false, f.check("sync", false) }

func (f *memFile) Preallocate(_, _ int64) error { return f.check("preallocate", true) }
func (f *memFile) Evict(_, _ int64) error       { return nil } // shows nothing that was lost
func (f *memFile) Prefetch(_, _ int64) error    { return nil }
func (f *memFile) Fd() uintptr                  { return vfs.InvalidFd }

type memInfo struct {
	name    string
	size    int64
	mode    os.FileMode
	modTime time.Time
}

func (i memInfo) Name() string           { return i.name }
func (i memInfo) Size() int64            { return i.size }
func (i memInfo) Mode() os.FileMode      { return i.mode }
func (i memInfo) ModTime() time.Time     { return i.modTime }
func (i memInfo) IsDir() bool            { return i.mode.IsDir() }
func (i memInfo) Sys() any               { return nil }
func (i memInfo) DeviceID() vfs.DeviceID { return vfs.DeviceID{} }
