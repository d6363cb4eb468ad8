package disk

import (
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// Op names a kind of call that Faulty can fail.
type Op uint8

const (
	OpOpen    Op = iota + 1 // opening or making a file, and locking it
	OpRead                  // Read, ReadAt
	OpWrite                 // Write, WriteAt
	OpSync                  // Sync, SyncData and SyncTo of files
	OpResize                // Truncate, Allocate, Preallocate, PunchHole
	OpClone                 // CloneRange; the path is that of the file written to
	OpRemove                // Remove, RemoveAll
	OpRename                // Rename, Link, ReuseForWrite; the path is the new name
	OpDir                   // MkdirAll, List, OpenDir
	OpSyncDir               // SyncDir, and Sync of a directory
	OpStat                  // Stat, Statfs, GetDiskUsage
)

var opNames = []string{"", "open", "read", "write", "sync", "resize", "clone", "remove", "rename", "dir", "syncdir", "stat"}

func (o Op) String() string {
	if int(o) < len(opNames) && o != 0 {
		return opNames[o]
	}
	return fmt.Sprintf("Op(%d)", uint8(o))
}

// Fault is one thing that goes wrong.
type Fault struct {
	Op    Op     // which calls; 0: all
	Path  string // a pattern of path.Match for the file's last name element; "": all
	Skip  int    // how many matching calls go well before
	Times int    // how many then fail; 0: all

	Err error // what they return
	// Torn makes a failing write write the first half of its bytes before it
	// fails.
	Torn bool
	// Until, if set, makes the call hang until it is closed, as on a disk that
	// does not answer. With a nil Err it then goes well.
	Until <-chan struct{}
}

// Faulty is an FS in front of another one that fails as told.
type Faulty struct {
	fs FS

	mu      sync.Mutex
	faults  []*Fault // guarded by mu, as are their counts
	observe func(op Op, name string)
	files   map[*faultyFile]struct{} // open files, whose names follow renames; guarded by mu
	crawl   int64                    // bytes per second that reach the disk; 0: no limit; guarded by mu
	idle    time.Time                // when the disk has written all that was synced; guarded by mu
}

var (
	_ FS   = (*Faulty)(nil)
	_ File = (*faultyFile)(nil)
)

// NewFaulty returns fs with faults, of which the first that matches a call and
// is not used up decides.
func NewFaulty(fs FS, faults ...Fault) *Faulty {
	f := &Faulty{fs: fs, files: map[*faultyFile]struct{}{}}
	f.Add(faults...)
	return f
}

// Add adds faults.
func (f *Faulty) Add(faults ...Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, ft := range faults {
		f.faults = append(f.faults, &ft)
	}
}

// Clear removes all faults: the disk is well again. Calls that hang go on
// hanging.
func (f *Faulty) Clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = nil
}

// Crawl makes the disk as slow as this, in bytes per second: a sync takes as long as writing what
// the file was written since its last one, behind all other syncs. 0: as fast as it is.
func (f *Faulty) Crawl(rate int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.crawl = rate
}

// crawlFor waits while a slow disk writes n bytes.
func (f *Faulty) crawlFor(n int64) {
	f.mu.Lock()
	if f.crawl == 0 || n == 0 {
		f.mu.Unlock()
		return
	}
	if now := time.Now(); f.idle.Before(now) {
		f.idle = now
	}
	f.idle = f.idle.Add(time.Duration(float64(n) / float64(f.crawl) * float64(time.Second)))
	until := f.idle
	f.mu.Unlock()
	time.Sleep(time.Until(until))
}

// Observe has fn called before every call, whether it fails or not. It may be
// called by several goroutines at once. A test that crashes a Mem in here
// crashes it at every step that its user takes.
func (f *Faulty) Observe(fn func(op Op, name string)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.observe = fn
}

// before decides about one call. The fault is non-nil if the call is to fail.
func (f *Faulty) before(op Op, name string) *Fault {
	f.mu.Lock()
	observe := f.observe
	var hit *Fault
	if i := slices.IndexFunc(f.faults, func(ft *Fault) bool { return ft.matches(op, name) }); i >= 0 {
		ft := f.faults[i]
		if ft.Skip > 0 {
			ft.Skip--
		} else {
			hit = &Fault{Err: ft.Err, Torn: ft.Torn, Until: ft.Until}
			if ft.Times > 0 {
				if ft.Times--; ft.Times == 0 {
					f.faults = slices.Delete(f.faults, i, i+1)
				}
			}
		}
	}
	f.mu.Unlock()
	if observe != nil {
		observe(op, name)
	}
	if hit == nil {
		return nil
	}
	if hit.Until != nil {
		<-hit.Until
	}
	if hit.Err == nil {
		return nil
	}
	hit.Err = &os.PathError{Op: op.String(), Path: name, Err: hit.Err}
	return hit
}

func (ft *Fault) matches(op Op, name string) bool {
	if ft.Op != 0 && ft.Op != op {
		return false
	}
	if ft.Path == "" {
		return true
	}
	ok, err := path.Match(ft.Path, path.Base(name))
	return ok && err == nil
}

func (f *Faulty) fail(op Op, name string) error {
	if ft := f.before(op, name); ft != nil {
		return ft.Err
	}
	return nil
}

// wrap puts the file that open returns behind f.
func (f *Faulty) wrap(op Op, name string, open func() (vfs.File, error)) (vfs.File, error) {
	if err := f.fail(op, name); err != nil {
		return nil, err
	}
	file, err := open()
	if err != nil {
		return nil, err
	}
	ff := &faultyFile{f: f, path: name, vf: file, dir: op == OpDir}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.files[ff] = struct{}{}
	return ff, nil
}

// renamed tells open files their new name.
func (f *Faulty) renamed(oldname, newname string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for ff := range f.files {
		if ff.path == oldname {
			ff.path = newname
		}
	}
}

// OpenFile implements FS.
func (f *Faulty) OpenFile(name string, flag int) (File, error) {
	file, err := f.wrap(OpOpen, name, func() (vfs.File, error) { return f.fs.OpenFile(name, flag) })
	if err != nil {
		return nil, err
	}
	return file.(*faultyFile), nil
}

// SyncDir implements FS.
func (f *Faulty) SyncDir(name string) error {
	if err := f.fail(OpSyncDir, name); err != nil {
		return err
	}
	return f.fs.SyncDir(name)
}

// Statfs implements FS.
func (f *Faulty) Statfs(name string) (Space, error) {
	if err := f.fail(OpStat, name); err != nil {
		return Space{}, err
	}
	return f.fs.Statfs(name)
}

// Create implements vfs.FS.
func (f *Faulty) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return f.wrap(OpOpen, name, func() (vfs.File, error) { return f.fs.Create(name, c) })
}

// Link implements vfs.FS.
func (f *Faulty) Link(oldname, newname string) error {
	if err := f.fail(OpRename, newname); err != nil {
		return err
	}
	return f.fs.Link(oldname, newname)
}

// Open implements vfs.FS.
func (f *Faulty) Open(name string, opts ...vfs.OpenOption) (vfs.File, error) {
	return f.wrap(OpOpen, name, func() (vfs.File, error) { return f.fs.Open(name, opts...) })
}

// OpenReadWrite implements vfs.FS.
func (f *Faulty) OpenReadWrite(name string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	return f.wrap(OpOpen, name, func() (vfs.File, error) { return f.fs.OpenReadWrite(name, c, opts...) })
}

// OpenDir implements vfs.FS.
func (f *Faulty) OpenDir(name string) (vfs.File, error) {
	return f.wrap(OpDir, name, func() (vfs.File, error) { return f.fs.OpenDir(name) })
}

// Remove implements vfs.FS.
func (f *Faulty) Remove(name string) error {
	if err := f.fail(OpRemove, name); err != nil {
		return err
	}
	return f.fs.Remove(name)
}

// RemoveAll implements vfs.FS.
func (f *Faulty) RemoveAll(name string) error {
	if err := f.fail(OpRemove, name); err != nil {
		return err
	}
	return f.fs.RemoveAll(name)
}

// Rename implements vfs.FS.
func (f *Faulty) Rename(oldname, newname string) error {
	if err := f.fail(OpRename, newname); err != nil {
		return err
	}
	if err := f.fs.Rename(oldname, newname); err != nil {
		return err
	}
	f.renamed(oldname, newname)
	return nil
}

// ReuseForWrite implements vfs.FS.
func (f *Faulty) ReuseForWrite(oldname, newname string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return f.wrap(OpRename, newname, func() (vfs.File, error) { return f.fs.ReuseForWrite(oldname, newname, c) })
}

// MkdirAll implements vfs.FS.
func (f *Faulty) MkdirAll(dir string, perm os.FileMode) error {
	if err := f.fail(OpDir, dir); err != nil {
		return err
	}
	return f.fs.MkdirAll(dir, perm)
}

// Lock implements vfs.FS.
func (f *Faulty) Lock(name string) (io.Closer, error) {
	if err := f.fail(OpOpen, name); err != nil {
		return nil, err
	}
	return f.fs.Lock(name)
}

// List implements vfs.FS.
func (f *Faulty) List(dir string) ([]string, error) {
	if err := f.fail(OpDir, dir); err != nil {
		return nil, err
	}
	return f.fs.List(dir)
}

// Stat implements vfs.FS.
func (f *Faulty) Stat(name string) (vfs.FileInfo, error) {
	if err := f.fail(OpStat, name); err != nil {
		return nil, err
	}
	return f.fs.Stat(name)
}

// PathBase implements vfs.FS.
func (f *Faulty) PathBase(p string) string { return f.fs.PathBase(p) }

// PathJoin implements vfs.FS.
func (f *Faulty) PathJoin(elem ...string) string { return f.fs.PathJoin(elem...) }

// PathDir implements vfs.FS.
func (f *Faulty) PathDir(p string) string { return f.fs.PathDir(p) }

// GetDiskUsage implements vfs.FS.
func (f *Faulty) GetDiskUsage(name string) (vfs.DiskUsage, error) {
	if err := f.fail(OpStat, name); err != nil {
		return vfs.DiskUsage{}, err
	}
	return f.fs.GetDiskUsage(name)
}

// Unwrap implements vfs.FS.
func (f *Faulty) Unwrap() vfs.FS { return f.fs }

// faultyFile fails calls on an open file. Only files of OpenFile are asked for
// what vfs.File does not have.
type faultyFile struct {
	f    *Faulty
	path string // guarded by f.mu
	vf   vfs.File
	dir  bool

	unsynced atomic.Int64 // bytes written since the last sync
}

func (f *faultyFile) name() string {
	f.f.mu.Lock()
	defer f.f.mu.Unlock()
	return f.path
}

func (f *faultyFile) unwrap() File {
	file, _ := f.vf.(File)
	return file
}

func (f *faultyFile) Close() error {
	f.f.mu.Lock()
	delete(f.f.files, f)
	f.f.mu.Unlock()
	return f.vf.Close()
}

func (f *faultyFile) Fd() uintptr { return f.vf.Fd() }

func (f *faultyFile) Read(p []byte) (int, error) {
	if err := f.f.fail(OpRead, f.name()); err != nil {
		return 0, err
	}
	return f.vf.Read(p)
}

func (f *faultyFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.f.fail(OpRead, f.name()); err != nil {
		return 0, err
	}
	return f.vf.ReadAt(p, off)
}

func (f *faultyFile) Write(p []byte) (int, error) {
	return f.write(p, f.vf.Write)
}

func (f *faultyFile) WriteAt(p []byte, off int64) (int, error) {
	return f.write(p, func(p []byte) (int, error) { return f.vf.WriteAt(p, off) })
}

func (f *faultyFile) write(p []byte, write func([]byte) (int, error)) (int, error) {
	ft := f.f.before(OpWrite, f.name())
	if ft == nil {
		n, err := write(p)
		f.unsynced.Add(int64(n))
		return n, err
	}
	n := 0
	if ft.Torn {
		n, _ = write(p[:len(p)/2]) // the fault's error is the one to report
	}
	return n, ft.Err
}

func (f *faultyFile) sync(sync func() error) error {
	op := OpSync
	if f.dir {
		op = OpSyncDir
	}
	if err := f.f.fail(op, f.name()); err != nil {
		return err
	}
	f.f.crawlFor(f.unsynced.Swap(0))
	return sync()
}

func (f *faultyFile) Sync() error     { return f.sync(f.vf.Sync) }
func (f *faultyFile) SyncData() error { return f.sync(f.vf.SyncData) }

func (f *faultyFile) SyncTo(length int64) (fullSync bool, err error) {
	err = f.sync(func() error {
		fullSync, err = f.vf.SyncTo(length)
		return err
	})
	return fullSync, err
}

func (f *faultyFile) Stat() (vfs.FileInfo, error) {
	if err := f.f.fail(OpStat, f.name()); err != nil {
		return nil, err
	}
	return f.vf.Stat()
}

func (f *faultyFile) Evict(off, n int64) error    { return f.unwrap().Evict(off, n) }
func (f *faultyFile) Prefetch(off, n int64) error { return f.vf.Prefetch(off, n) }

func (f *faultyFile) resize(call func() error) error {
	if err := f.f.fail(OpResize, f.name()); err != nil {
		return err
	}
	return call()
}

func (f *faultyFile) Preallocate(off, n int64) error {
	return f.resize(func() error { return f.vf.Preallocate(off, n) })
}

func (f *faultyFile) Truncate(size int64) error {
	return f.resize(func() error { return f.unwrap().Truncate(size) })
}

func (f *faultyFile) Allocate(off, n int64) error {
	return f.resize(func() error { return f.unwrap().Allocate(off, n) })
}

func (f *faultyFile) PunchHole(off, n int64) error {
	return f.resize(func() error { return f.unwrap().PunchHole(off, n) })
}

func (f *faultyFile) CloneRange(src File, srcOff, dstOff, n int64) error {
	if err := f.f.fail(OpClone, f.name()); err != nil {
		return err
	}
	return f.unwrap().CloneRange(src, srcOff, dstOff, n)
}
