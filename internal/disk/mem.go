package disk

import (
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// sector is what a disk writes whole or not at all.
const sector = 512

// Mem is a disk in memory that can lose power.
//
// Crash returns the disk as it could be found after a power cut: what was
// synced is there; of what was not, a random part is, independently
//
//   - for every sector of 512 bytes written, truncated or punched since the
//     file's last Sync or SyncData,
//   - for the size of every file, and
//   - for the names of every directory: a random prefix of the changes since
//     its last SyncDir. A rename within one directory is one change. A rename
//     from one directory to another is taken to be durable at once.
//
// So Mem is at least as unkind as the file systems that it stands for, except
// that a sync never fails and never hangs: see Faulty.
type Mem struct {
	mu   sync.Mutex // guards the tree: every node's names and pending
	root *memNode
	held map[string]bool // names locked with Lock; guarded by mu

	used  atomic.Int64 // bytes in pages of all files that have a name
	limit atomic.Int64 // 0: none
}

var (
	_ FS   = (*Mem)(nil)
	_ File = (*memFile)(nil)
)

// NewMem returns an empty disk.
func NewMem() *Mem {
	return &Mem{root: newMemDir(), held: map[string]bool{}}
}

// SetLimit makes the disk bytes large: what would exceed it fails with ENOSPC.
// 0 removes the limit.
func (m *Mem) SetLimit(bytes int64) { m.limit.Store(bytes) }

// Used returns the bytes that files occupy, in whole blocks.
func (m *Mem) Used() int64 { return m.used.Load() }

type page [BlockSize]byte

// zeroPage stands for allocated space that nobody wrote to.
var zeroPage = new(page)

// memNode is a file or a directory.
type memNode struct {
	// Directories. Guarded by Mem.mu.
	dir     bool
	names   map[string]*memNode
	synced  map[string]*memNode // the names that are durable
	pending []memChange         // what happened to names since
	links   int                 // files: the number of names

	mu sync.Mutex // guards what follows, of files
	memData
	durable memData // its pages are shared with memData unless dirty
	// dirty has the pages that may differ from the durable ones. A page that is
	// not dirty belongs to both and is never written in place.
	dirty   map[int64]bool
	freed   bool // has no name any more: its pages no longer count as used
	modTime time.Time
}

type memData struct {
	pages map[int64]*page // holes are absent
	size  int64
}

// memChange is one atomic change of names; a nil node removes the name.
type memChange []struct {
	name string
	node *memNode
}

func newMemDir() *memNode {
	return &memNode{dir: true, names: map[string]*memNode{}, synced: map[string]*memNode{}, modTime: time.Now()}
}

func newMemFile() *memNode {
	return &memNode{
		memData: memData{pages: map[int64]*page{}},
		durable: memData{pages: map[int64]*page{}},
		dirty:   map[int64]bool{},
		modTime: time.Now(),
	}
}

// change applies c to directory d and remembers it as not yet durable.
func (d *memNode) change(c memChange) {
	for _, e := range c {
		if e.node == nil {
			delete(d.names, e.name)
		} else {
			d.names[e.name] = e.node
		}
	}
	d.pending = append(d.pending, c)
	d.modTime = time.Now()
}

func (d *memNode) set(name string, n *memNode) {
	d.change(memChange{{name, n}})
}

// Crash returns the disk as a power cut at this moment would leave it, with
// chance decided by rng. m itself goes on unharmed, so its users can be shut
// down in an orderly way; nothing that they still do reaches the new disk.
func (m *Mem) Crash(rng *rand.Rand) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	// It is one moment for all files: what is synced later than this is not there.
	files := map[*memNode]bool{}
	m.root.files(files)
	for f := range files {
		f.mu.Lock()
		defer f.mu.Unlock()
	}
	n := NewMem()
	n.limit.Store(m.limit.Load())
	n.root = m.root.crash(rng, n, map[*memNode]*memNode{})
	return n
}

// files collects the files that a crash may leave in or below a directory. Mem.mu is held.
func (d *memNode) files(into map[*memNode]bool) {
	visit := func(n *memNode) {
		switch {
		case n == nil:
		case n.dir:
			n.files(into)
		default:
			into[n] = true
		}
	}
	for _, n := range d.synced {
		visit(n)
	}
	for _, c := range d.pending {
		for _, e := range c {
			visit(e.node)
		}
	}
}

func (d *memNode) crash(rng *rand.Rand, m *Mem, seen map[*memNode]*memNode) *memNode {
	if n := seen[d]; n != nil {
		n.links++
		return n
	}
	if !d.dir {
		n := d.crashFile(rng)
		n.links = 1
		m.used.Add(n.allocated())
		seen[d] = n
		return n
	}
	names := maps.Clone(d.synced)
	for _, c := range d.pending[:rng.IntN(len(d.pending)+1)] {
		for _, e := range c {
			if e.node == nil {
				delete(names, e.name)
			} else {
				names[e.name] = e.node
			}
		}
	}
	n := newMemDir()
	for _, name := range slices.Sorted(maps.Keys(names)) { // in order, so that a seed repeats
		n.names[name] = names[name].crash(rng, m, seen)
	}
	n.synced = maps.Clone(n.names)
	return n
}

// crashFile is called with f.mu held.
func (f *memNode) crashFile(rng *rand.Rand) *memNode {
	n := newMemFile()
	n.modTime = f.modTime
	n.pages = maps.Clone(f.durable.pages)
	n.size = f.durable.size
	if f.size != f.durable.size {
		switch lo, hi := min(f.size, f.durable.size), max(f.size, f.durable.size); rng.IntN(3) {
		case 0:
			n.size = f.size
		case 1:
			n.size = lo + rng.Int64N(hi-lo+1)
		}
	}
	// All, none or some of the sectors: with a fair coin for each alone, the
	// disks that kept everything or nothing would never be seen.
	chance := []float64{0, 1, rng.Float64(), rng.Float64()}[rng.IntN(4)]
	for _, i := range slices.Sorted(maps.Keys(f.dirty)) {
		old, cur := orZero(f.durable.pages[i]), orZero(f.pages[i])
		mixed := *old
		for s := 0; s < BlockSize; s += sector {
			if rng.Float64() < chance {
				copy(mixed[s:s+sector], cur[s:s+sector])
			}
		}
		n.pages[i] = &mixed
	}
	n.trim(n.size)
	n.durable = memData{maps.Clone(n.pages), n.size}
	clear(n.dirty)
	return n
}

func orZero(p *page) *page {
	if p == nil {
		return zeroPage
	}
	return p
}

func (f *memNode) allocated() int64 { return int64(len(f.pages)) * BlockSize }

// trim drops what lies beyond size and clears the rest of the last block.
func (f *memNode) trim(size int64) {
	for i := range f.pages {
		if i*BlockSize >= size {
			delete(f.pages, i)
			f.dirty[i] = true
		}
	}
	if in := size % BlockSize; in != 0 && f.pages[size/BlockSize] != nil {
		clear(f.own(size / BlockSize)[in:])
	}
}

// own returns page i for writing, as a copy if the durable file has it too.
func (f *memNode) own(i int64) *page {
	p := f.pages[i]
	if p == nil || p == zeroPage || !f.dirty[i] {
		q := *orZero(p)
		p = &q
		f.pages[i] = p
		f.dirty[i] = true
	}
	return p
}

// grow reports whether pages of f may be added, n of them, and counts them.
func (m *Mem) grow(f *memNode, n int64) error {
	if f.freed || n == 0 {
		return nil
	}
	used := m.used.Add(n * BlockSize)
	if limit := m.limit.Load(); n > 0 && limit > 0 && used > limit {
		m.used.Add(-n * BlockSize)
		return syscall.ENOSPC
	}
	return nil
}

// missing counts the blocks of the range that have no page.
func (f *memNode) missing(off, n int64) (blocks int64) {
	for i := off / BlockSize; i*BlockSize < off+n; i++ {
		if f.pages[i] == nil {
			blocks++
		}
	}
	return blocks
}

// split returns the elements of a name; the root has none.
func split(name string) []string {
	name = strings.Trim(path.Clean("/"+name), "/")
	if name == "" {
		return nil
	}
	return strings.Split(name, "/")
}

func pathError(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: op, Path: name, Err: err}
}

// find returns the node called name. The caller holds m.mu.
func (m *Mem) find(name string) (*memNode, error) {
	n := m.root
	for _, e := range split(name) {
		if !n.dir {
			return nil, syscall.ENOTDIR
		}
		if n = n.names[e]; n == nil {
			return nil, syscall.ENOENT
		}
	}
	return n, nil
}

// parent returns the directory of name and its last element.
func (m *Mem) parent(name string) (*memNode, string, error) {
	elems := split(name)
	if len(elems) == 0 {
		return nil, "", syscall.EINVAL
	}
	d, err := m.find(path.Dir("/" + strings.Join(elems, "/")))
	if err != nil {
		return nil, "", err
	}
	if !d.dir {
		return nil, "", syscall.ENOTDIR
	}
	return d, elems[len(elems)-1], nil
}

// unlinked accounts for a name that n lost.
func (m *Mem) unlinked(n *memNode) {
	if n.dir {
		for _, c := range n.names {
			m.unlinked(c)
		}
		return
	}
	if n.links--; n.links > 0 {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.freed = true
	m.used.Add(-n.allocated())
}

// OpenFile implements FS.
func (m *Mem) OpenFile(name string, flag int) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, last, err := m.parent(name)
	if err != nil {
		return nil, pathError("open", name, err)
	}
	n := d.names[last]
	switch {
	case n == nil && flag&os.O_CREATE == 0:
		return nil, pathError("open", name, syscall.ENOENT)
	case n == nil:
		n = newMemFile()
		n.links = 1
		d.set(last, n)
	case flag&os.O_CREATE != 0 && flag&os.O_EXCL != 0:
		return nil, pathError("open", name, syscall.EEXIST)
	case n.dir:
		return nil, pathError("open", name, syscall.EISDIR)
	}
	f := &memFile{m: m, n: n, name: name, writable: flag&os.O_RDWR != 0}
	if flag&os.O_TRUNC != 0 {
		if err := f.Truncate(0); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// SyncDir implements FS.
func (m *Mem) SyncDir(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.find(name)
	if err == nil && !d.dir {
		err = syscall.ENOTDIR
	}
	if err != nil {
		return pathError("sync", name, err)
	}
	d.sync()
	return nil
}

func (d *memNode) sync() {
	d.synced, d.pending = maps.Clone(d.names), nil
}

// Statfs implements FS. A disk without a limit has 1 TiB.
func (m *Mem) Statfs(name string) (Space, error) {
	m.mu.Lock()
	_, err := m.find(name)
	m.mu.Unlock()
	if err != nil {
		return Space{}, pathError("statfs", name, err)
	}
	total := m.limit.Load()
	if total == 0 {
		total = 1 << 40
	}
	free := uint64(max(total-m.used.Load(), 0))
	return Space{Total: uint64(total), Free: free, Avail: free, Filesystem: "mem"}, nil
}

// Create implements vfs.FS.
func (m *Mem) Create(name string, _ vfs.DiskWriteCategory) (vfs.File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, last, err := m.parent(name)
	if err != nil {
		return nil, pathError("create", name, err)
	}
	if old := d.names[last]; old != nil {
		if old.dir {
			return nil, pathError("create", name, syscall.EISDIR)
		}
		m.unlinked(old)
	}
	n := newMemFile()
	n.links = 1
	d.set(last, n)
	return &memFile{m: m, n: n, name: name, writable: true}, nil
}

// Link implements vfs.FS.
func (m *Mem) Link(oldname, newname string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find(oldname)
	if err != nil {
		return &os.LinkError{Op: "link", Old: oldname, New: newname, Err: err}
	}
	d, last, err := m.parent(newname)
	switch {
	case err != nil:
	case n.dir:
		err = syscall.EPERM
	case d.names[last] != nil:
		err = syscall.EEXIST
	}
	if err != nil {
		return &os.LinkError{Op: "link", Old: oldname, New: newname, Err: err}
	}
	n.links++
	d.set(last, n)
	return nil
}

// Open implements vfs.FS.
func (m *Mem) Open(name string, opts ...vfs.OpenOption) (vfs.File, error) {
	m.mu.Lock()
	n, err := m.find(name)
	m.mu.Unlock()
	if err != nil {
		return nil, pathError("open", name, err)
	}
	f := &memFile{m: m, n: n, name: name}
	for _, o := range opts {
		o.Apply(f)
	}
	return f, nil
}

// OpenReadWrite implements vfs.FS.
func (m *Mem) OpenReadWrite(name string, _ vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	f, err := m.OpenFile(name, os.O_RDWR|os.O_CREATE)
	if err != nil {
		return nil, err
	}
	for _, o := range opts {
		o.Apply(f)
	}
	return f, nil
}

// OpenDir implements vfs.FS.
func (m *Mem) OpenDir(name string) (vfs.File, error) {
	f, err := m.Open(name)
	if err == nil && !f.(*memFile).n.dir {
		return nil, pathError("open", name, syscall.ENOTDIR)
	}
	return f, err
}

// Remove implements vfs.FS.
func (m *Mem) Remove(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, last, err := m.parent(name)
	if err != nil {
		return pathError("remove", name, err)
	}
	switch n := d.names[last]; {
	case n == nil:
		return pathError("remove", name, syscall.ENOENT)
	case n.dir && len(n.names) > 0:
		return pathError("remove", name, syscall.ENOTEMPTY)
	default:
		d.set(last, nil)
		m.unlinked(n)
	}
	return nil
}

// RemoveAll implements vfs.FS.
func (m *Mem) RemoveAll(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, last, err := m.parent(name)
	if err == syscall.ENOENT {
		return nil
	}
	if err != nil {
		return pathError("removeall", name, err)
	}
	if n := d.names[last]; n != nil {
		d.set(last, nil)
		m.unlinked(n)
	}
	return nil
}

// Rename implements vfs.FS.
func (m *Mem) Rename(oldname, newname string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.rename(oldname, newname); err != nil {
		return &os.LinkError{Op: "rename", Old: oldname, New: newname, Err: err}
	}
	return nil
}

func (m *Mem) rename(oldname, newname string) error {
	from, oldLast, err := m.parent(oldname)
	if err != nil {
		return err
	}
	to, newLast, err := m.parent(newname)
	if err != nil {
		return err
	}
	n, over := from.names[oldLast], to.names[newLast]
	switch {
	case n == nil:
		return syscall.ENOENT
	case n == over:
		return nil
	case over != nil && over.dir && !n.dir:
		return syscall.EISDIR
	case over != nil && !over.dir && n.dir:
		return syscall.ENOTDIR
	case over != nil && over.dir && len(over.names) > 0:
		return syscall.ENOTEMPTY
	}
	if over != nil {
		m.unlinked(over)
	}
	if from == to {
		from.change(memChange{{oldLast, nil}, {newLast, n}})
		return nil
	}
	from.set(oldLast, nil)
	to.set(newLast, n)
	from.sync()
	to.sync()
	return nil
}

// ReuseForWrite implements vfs.FS.
func (m *Mem) ReuseForWrite(oldname, newname string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if err := m.Rename(oldname, newname); err != nil {
		return nil, err
	}
	return m.OpenReadWrite(newname, c)
}

// MkdirAll implements vfs.FS.
func (m *Mem) MkdirAll(name string, _ os.FileMode) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.root
	for _, e := range split(name) {
		if !d.dir {
			return pathError("mkdir", name, syscall.ENOTDIR)
		}
		next := d.names[e]
		if next == nil {
			next = newMemDir()
			d.set(e, next)
		}
		d = next
	}
	if !d.dir {
		return pathError("mkdir", name, syscall.ENOTDIR)
	}
	return nil
}

// Lock implements vfs.FS. The lock is gone after a Crash, as its holder is.
func (m *Mem) Lock(name string) (io.Closer, error) {
	key := path.Clean("/" + name)
	m.mu.Lock()
	held := m.held[key]
	m.held[key] = true
	m.mu.Unlock()
	if held {
		return nil, pathError("lock", name, syscall.EAGAIN)
	}
	f, err := m.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		m.unlock(key)
		return nil, err
	}
	return closerFunc(func() error { m.unlock(key); return f.Close() }), nil
}

func (m *Mem) unlock(key string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.held, key)
}

type closerFunc func() error

func (c closerFunc) Close() error { return c() }

// List implements vfs.FS. The names are sorted.
func (m *Mem) List(name string) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.find(name)
	if err == nil && !d.dir {
		err = syscall.ENOTDIR
	}
	if err != nil {
		return nil, pathError("list", name, err)
	}
	return slices.Sorted(maps.Keys(d.names)), nil
}

// Stat implements vfs.FS.
func (m *Mem) Stat(name string) (vfs.FileInfo, error) {
	f, err := m.Open(name)
	if err != nil {
		return nil, pathError("stat", name, err.(*os.PathError).Err)
	}
	return f.Stat()
}

// PathBase implements vfs.FS.
func (*Mem) PathBase(p string) string { return path.Base(p) }

// PathJoin implements vfs.FS.
func (*Mem) PathJoin(elem ...string) string { return path.Join(elem...) }

// PathDir implements vfs.FS.
func (*Mem) PathDir(p string) string { return path.Dir(p) }

// GetDiskUsage implements vfs.FS.
func (m *Mem) GetDiskUsage(name string) (vfs.DiskUsage, error) {
	s, err := m.Statfs(name)
	return vfs.DiskUsage{AvailBytes: s.Avail, TotalBytes: s.Total, UsedBytes: s.Total - s.Free}, err
}

// Unwrap implements vfs.FS.
func (*Mem) Unwrap() vfs.FS { return nil }

// String says what is on the disk; for the failure messages of tests.
func (m *Mem) String() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var b strings.Builder
	m.root.print(&b, "/")
	return b.String()
}

func (d *memNode) print(b *strings.Builder, at string) {
	for _, name := range slices.Sorted(maps.Keys(d.names)) {
		n := d.names[name]
		if n.dir {
			fmt.Fprintf(b, "%s%s/\n", at, name)
			n.print(b, at+name+"/")
			continue
		}
		n.mu.Lock()
		fmt.Fprintf(b, "%s%s %d bytes (%d synced), %d dirty blocks\n", at, name, n.size, n.durable.size, len(n.dirty))
		n.mu.Unlock()
	}
}
