// Package memfs is a whole file system in memory behind one mutex.
//
// It exists for tests: as something to mount, and as the oracle that other
// implementations of the same operations are compared with. It favours the
// obvious over the fast. Several sessions can share one FS; each is a
// fsop.Handler, and what one of them changes is taken back from the caches of
// the others before the change is acknowledged, as a replica set does it.
package memfs

import (
	"context"
	"math"
	"slices"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"

	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// Cache is what a session has to tell of changes by other sessions.
type Cache interface {
	Invalidate(ctx context.Context, seq uint64, effects []proto.Effect) error
}

// FS is the file system.
type FS struct {
	mu     sync.Mutex
	nodes  map[fsop.Ino]*node
	last   fsop.Ino
	seq    uint64
	now    int64
	locks  []lock
	unlock chan struct{} // closed and replaced when a lock is released

	sessions  []*Session
	committed map[uint64]chan struct{} // changes whose invalidations are under way
}

type node struct {
	attr     fsop.Attr
	data     []byte
	target   string
	xattrs   map[string][]byte
	entries  map[string]entry // of a directory
	parent   fsop.Ino         // of a directory
	cookie   uint64           // the last one given
	linkable bool             // never had a name, may get one
}

type entry struct {
	ino    fsop.Ino
	cookie uint64
}

type lock struct {
	session *Session
	ino     fsop.Ino
	fsop.Lock
}

// New returns a file system with an empty root directory that anybody may write to.
func New() *FS {
	f := &FS{nodes: map[fsop.Ino]*node{}, unlock: make(chan struct{}), committed: map[uint64]chan struct{}{}}
	f.seq = 1
	f.last = fsop.RootIno
	t := f.tick()
	f.nodes[fsop.RootIno] = &node{
		attr:    fsop.Attr{Ino: fsop.RootIno, Mode: syscall.S_IFDIR | 0o777, Nlink: 2, Atime: t, Mtime: t, Ctime: t, Change: f.seq},
		entries: map[string]entry{}, parent: fsop.RootIno, cookie: 2,
	}
	return f
}

// tick returns the time, which grows strictly.
func (f *FS) tick() int64 {
	f.now = max(time.Now().UnixNano(), f.now+1)
	return f.now
}

// Session is one client.
type Session struct {
	fs    *FS
	cache Cache
}

var _ fsop.Handler = (*Session)(nil)

// Session returns a new session. cache may be nil.
func (f *FS) Session(cache Cache) *Session {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := &Session{f, cache}
	f.sessions = append(f.sessions, s)
	return s
}

// Do implements fsop.Handler. A read waits until the changes that it saw are
// acknowledged, and a change until it is in no other session's cache.
func (s *Session) Do(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
	f := s.fs
	for {
		f.mu.Lock()
		before := f.seq
		c := &call{FS: f, s: s}
		if op.Kind().Mutates() {
			f.seq++
		}
		reply, err := c.do(op)
		if err != nil {
			f.seq = before
		}
		if l, ok := op.(*fsop.Setlk); ok && err == fsop.EAGAIN && l.Wait {
			released := f.unlock
			f.mu.Unlock()
			select {
			case <-released:
				continue
			case <-time.After(fsop.LockWait):
				return nil, fsop.EAGAIN
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		if reply == nil {
			reply = new(fsop.Reply)
		}
		reply.Seq = f.seq
		var pending []chan struct{}
		var mine chan struct{}
		for _, ch := range f.committed {
			pending = append(pending, ch)
		}
		others := slices.Clone(f.sessions)
		if len(c.effects) > 0 {
			mine = make(chan struct{})
			f.committed[f.seq] = mine
		}
		f.mu.Unlock()

		if mine != nil {
			var wg sync.WaitGroup
			for _, o := range others {
				if o != s && o.cache != nil {
					wg.Go(func() { o.cache.Invalidate(ctx, reply.Seq, c.effects) })
				}
			}
			wg.Wait()
		}
		for _, ch := range pending {
			if mine != nil {
				<-ch
				continue
			}
			select {
			case <-ch:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		if mine != nil {
			close(mine)
			f.mu.Lock()
			delete(f.committed, reply.Seq)
			f.mu.Unlock()
		}
		return reply, err
	}
}

// call is one operation under the mutex.
type call struct {
	told int64 // the time that the holder of a window told; 0: none
	*FS
	s       *Session
	effects []proto.Effect
}

func (c *call) do(op fsop.Op) (*fsop.Reply, error) {
	switch op := op.(type) {
	case *fsop.Lookup:
		if op.ByNumber() {
			return attrReply(c.find(op))
		}
		n, err := c.child(op.Parent, op.Name)
		return attrReply(n, err)
	case *fsop.Getattr:
		n, err := c.node(op.Ino)
		return attrReply(n, err)
	case *fsop.Readlink:
		n, err := c.node(op.Ino)
		if err == nil && n.attr.Type() != syscall.S_IFLNK {
			err = fsop.EINVAL
		}
		if err != nil {
			return nil, err
		}
		return &fsop.Reply{Data: []byte(n.target)}, nil
	case *fsop.Read:
		return c.read(op)
	case *fsop.Readdir:
		return c.readdir(op)
	case *fsop.StatfsOp:
		return &fsop.Reply{Statfs: fsop.Statfs{Total: 1 << 40, Free: 1 << 39, Avail: 1 << 39, Files: 1 << 32, FilesFree: 1 << 31}}, nil
	case *fsop.Getxattr:
		n, err := c.node(op.Ino)
		if err != nil {
			return nil, err
		}
		v, ok := n.xattrs[op.Name]
		if !ok {
			return nil, fsop.ENODATA
		}
		return &fsop.Reply{Data: slices.Clone(v)}, nil
	case *fsop.Listxattr:
		return c.listxattr(op)
	case *fsop.Seek:
		return c.seek(op)
	case *fsop.Getlk:
		return c.getlk(op)
	case *fsop.Fsync, *fsop.Flush, *fsop.Noop:
		return new(fsop.Reply), nil
	case *fsop.Setattr:
		return c.setattr(op)
	case *fsop.Create:
		if n, err := c.child(op.Parent, op.Name); err == nil && !op.Excl {
			return attrReply(n, nil)
		}
		return c.make(&op.Node, syscall.S_IFREG, nil)
	case *fsop.Make:
		return c.foretold(op)
	case *fsop.Tmpfile:
		return c.tmpfile(op)
	case *fsop.Reserve:
		first := c.last + 1
		c.last += fsop.ReserveCount
		return &fsop.Reply{Off: uint64(first)}, nil
	case *fsop.Mkdir:
		return c.make(&op.Node, syscall.S_IFDIR, nil)
	case *fsop.Mknod:
		return c.make(&op.Node, op.Mode&syscall.S_IFMT, func(n *node) { n.attr.Rdev = op.Rdev })
	case *fsop.Symlink:
		return c.make(&op.Node, syscall.S_IFLNK, func(n *node) {
			n.target = op.Target
			n.attr.Size = uint64(len(op.Target))
			n.attr.Mode = syscall.S_IFLNK | 0o777
		})
	case *fsop.Link:
		return c.link(op)
	case *fsop.Unlink:
		return c.unlinkName(op.Parent, op.Name)
	case *fsop.Rmdir:
		return c.rmdir(op)
	case *fsop.Rename:
		return c.rename(op)
	case *fsop.Write:
		return c.write(op)
	case *fsop.Fallocate:
		return c.fallocate(op)
	case *fsop.Setxattr:
		return c.setxattr(op)
	case *fsop.Removexattr:
		n, err := c.node(op.Ino)
		if err != nil {
			return nil, err
		}
		if _, ok := n.xattrs[op.Name]; !ok {
			return nil, fsop.ENODATA
		}
		delete(n.xattrs, op.Name)
		c.touch(n, false)
		return attrReply(n, nil)
	case *fsop.Setlk:
		return new(fsop.Reply), c.setlk(op)
	}
	return nil, fsop.ENOSYS
}

func attrReply(n *node, err error) (*fsop.Reply, error) {
	if err != nil {
		return nil, err
	}
	return &fsop.Reply{Attr: n.attr}, nil
}

func (c *call) node(ino fsop.Ino) (*node, error) {
	n := c.nodes[ino]
	if n == nil {
		return nil, fsop.ESTALE
	}
	return n, nil
}

func (c *call) dir(ino fsop.Ino) (*node, error) {
	n, err := c.node(ino)
	if err == nil && n.entries == nil {
		err = fsop.ENOTDIR
	}
	return n, err
}

func (c *call) regular(ino fsop.Ino) (*node, error) {
	n, err := c.node(ino)
	switch {
	case err != nil:
		return nil, err
	case n.attr.IsDir():
		return nil, fsop.EISDIR
	case !n.attr.IsRegular():
		return nil, fsop.EINVAL
	}
	return n, nil
}

// find is Lookup by number.
func (c *call) find(op *fsop.Lookup) (*node, error) {
	n, err := c.node(op.Parent)
	if err == nil && op.Name == fsop.Above && n.attr.Nlink > 0 {
		if n, err = c.dir(op.Parent); err == nil && op.Parent != fsop.RootIno {
			n, err = c.node(n.parent)
		}
	}
	if err == nil && n.attr.Nlink == 0 {
		err = fsop.ESTALE
	}
	return n, err
}

func (c *call) child(dir fsop.Ino, name string) (*node, error) {
	d, err := c.dir(dir)
	if err != nil {
		return nil, err
	}
	if err := fsop.CheckName(name); err != nil {
		return nil, err
	}
	e, ok := d.entries[name]
	if !ok {
		return nil, fsop.ENOENT
	}
	return c.node(e.ino)
}

// touch marks a change of an inode.
func (c *call) touch(n *node, contents bool) {
	t := c.time(n)
	n.attr.Ctime, n.attr.Change = t, c.seq
	if contents {
		n.attr.Mtime = t
	}
	c.effects = append(c.effects, proto.Effect{Ino: n.attr.Ino})
}

// time is that of what is done to n: of now, or what the window's holder told.
func (c *call) time(n *node) int64 {
	t := c.tick()
	if c.told == 0 || n.attr.IsDir() {
		return t
	}
	return max(n.attr.Ctime, min(t, c.told))
}

// renamed marks a change of a name.
func (c *call) renamed(d *node, name string) {
	c.touch(d, true)
	d.attr.Size = uint64(len(d.entries))
	c.effects = append(c.effects, proto.Effect{Ino: d.attr.Ino, Name: name})
}

func (d *node) put(name string, ino fsop.Ino) {
	e, ok := d.entries[name]
	if !ok {
		d.cookie++
		e.cookie = d.cookie
	}
	e.ino = ino
	d.entries[name] = e
}

func (c *call) make(a *fsop.Node, typ uint32, set func(*node)) (*fsop.Reply, error) {
	d, err := c.dir(a.Parent)
	if err != nil {
		return nil, err
	}
	if err := fsop.CheckName(a.Name); err != nil {
		return nil, err
	}
	if _, ok := d.entries[a.Name]; ok {
		return nil, fsop.EEXIST
	}
	if d.attr.Nlink == 0 {
		return nil, fsop.ENOENT
	}
	n := c.born(d, a, typ)
	if typ == syscall.S_IFDIR {
		n.entries, n.parent, n.cookie = map[string]entry{}, a.Parent, 2
		n.attr.Nlink = 2
		d.attr.Nlink++
	}
	if set != nil {
		set(n)
	}
	d.put(a.Name, n.attr.Ino)
	c.renamed(d, a.Name)
	return &fsop.Reply{Attr: n.attr, Dir: d.attr}, nil
}

// born makes an inode that has no name yet.
func (c *call) born(d *node, a *fsop.Node, typ uint32) *node {
	c.last++
	n := &node{attr: fsop.Attr{
		Ino: c.last, Mode: typ | a.Mode&0o7777&^a.Umask, Nlink: 1, UID: a.UID, GID: a.GID, Change: c.seq,
	}}
	t := c.time(n)
	n.attr.Atime, n.attr.Mtime, n.attr.Ctime = t, t, t
	if d.attr.Mode&syscall.S_ISGID != 0 {
		n.attr.GID = d.attr.GID
		if typ == syscall.S_IFDIR {
			n.attr.Mode |= syscall.S_ISGID
		}
	}
	c.nodes[n.attr.Ino] = n
	return n
}

func (c *call) tmpfile(op *fsop.Tmpfile) (*fsop.Reply, error) {
	d, err := c.dir(op.Parent)
	if err != nil {
		return nil, err
	}
	n := c.born(d, &op.Node, syscall.S_IFREG)
	n.attr.Nlink, n.linkable = 0, !op.Excl
	return &fsop.Reply{Attr: n.attr}, nil
}

// foretold makes a file of the number that it was told of under. Windows, and what
// was reserved for whom, are for who passes it on.
func (c *call) foretold(op *fsop.Make) (*fsop.Reply, error) {
	if op.First.Ino == 0 { // nobody did
		return c.make(&op.Node, syscall.S_IFREG, nil)
	}
	c.told = op.First.Told
	last := c.last
	c.last = op.First.Ino - 1
	reply, err := c.make(&op.Node, syscall.S_IFREG, nil)
	c.last = last
	if err != nil {
		return nil, err
	}
	if len(op.First.Data) > 0 || op.First.Then.Valid != 0 {
		if reply, err = c.write(&op.First); err != nil {
			return nil, err
		}
	}
	reply.Attr, reply.Dir = c.nodes[op.First.Ino].attr, c.nodes[op.Parent].attr
	return reply, nil
}

func (c *call) link(op *fsop.Link) (*fsop.Reply, error) {
	n, err := c.node(op.Ino)
	if err != nil {
		return nil, err
	}
	d, err := c.dir(op.Parent)
	if err != nil {
		return nil, err
	}
	switch {
	case fsop.CheckName(op.Name) != nil:
		return nil, fsop.CheckName(op.Name)
	case n.attr.IsDir():
		return nil, fsop.EPERM
	case n.attr.Nlink == 0 && !n.linkable || d.attr.Nlink == 0:
		return nil, fsop.ENOENT
	case n.attr.Nlink >= fsop.MaxLinks:
		return nil, fsop.EMLINK
	}
	if _, ok := d.entries[op.Name]; ok {
		return nil, fsop.EEXIST
	}
	n.attr.Nlink++
	n.linkable = false
	c.touch(n, false)
	d.put(op.Name, op.Ino)
	c.renamed(d, op.Name)
	return &fsop.Reply{Attr: n.attr, Dir: d.attr}, nil
}

// unlinked takes a name from an inode. Inodes without names stay: nobody
// counts who still knows them.
func (c *call) unlinked(n *node) {
	if n.attr.IsDir() {
		n.attr.Nlink = 0
	} else {
		n.attr.Nlink--
	}
	c.touch(n, false)
}

func (c *call) unlinkName(dir fsop.Ino, name string) (*fsop.Reply, error) {
	n, err := c.child(dir, name)
	if err != nil {
		return nil, err
	}
	if n.attr.IsDir() {
		return nil, fsop.EISDIR
	}
	d := c.nodes[dir]
	delete(d.entries, name)
	c.unlinked(n)
	c.renamed(d, name)
	return &fsop.Reply{Attr: n.attr, Dir: d.attr}, nil
}

func (c *call) rmdir(op *fsop.Rmdir) (*fsop.Reply, error) {
	n, err := c.child(op.Parent, op.Name)
	if err != nil {
		return nil, err
	}
	if !n.attr.IsDir() {
		return nil, fsop.ENOTDIR
	}
	if len(n.entries) > 0 {
		return nil, fsop.ENOTEMPTY
	}
	d := c.nodes[op.Parent]
	delete(d.entries, op.Name)
	d.attr.Nlink--
	c.unlinked(n)
	c.renamed(d, op.Name)
	return &fsop.Reply{Attr: n.attr, Dir: d.attr}, nil
}

func (c *call) rename(op *fsop.Rename) (*fsop.Reply, error) {
	n, err := c.child(op.Parent, op.Name)
	if err != nil {
		return nil, err
	}
	from := c.nodes[op.Parent]
	to, err := c.dir(op.NewParent)
	if err != nil {
		return nil, err
	}
	old, err := c.child(op.NewParent, op.NewName)
	if err != nil && err != fsop.ENOENT {
		return nil, err
	}
	if op.Flags&fsop.RenameWhiteout != 0 || op.Flags == fsop.RenameNoReplace|fsop.RenameExchange {
		return nil, fsop.EINVAL
	}
	if to.attr.Nlink == 0 {
		return nil, fsop.ENOENT
	}
	exchange := op.Flags&fsop.RenameExchange != 0
	switch {
	case exchange && old == nil:
		return nil, fsop.ENOENT
	case old != nil && op.Flags&fsop.RenameNoReplace != 0:
		return nil, fsop.EEXIST
	case old == n:
		return &fsop.Reply{Attr: n.attr}, nil
	case n.attr.IsDir() && c.isBelow(to, n), exchange && old.attr.IsDir() && c.isBelow(from, old):
		return nil, fsop.EINVAL
	case old != nil && !exchange && old.attr.IsDir() && !n.attr.IsDir():
		return nil, fsop.EISDIR
	case old != nil && !exchange && !old.attr.IsDir() && n.attr.IsDir():
		return nil, fsop.ENOTDIR
	case old != nil && !exchange && len(old.entries) > 0:
		return nil, fsop.ENOTEMPTY
	}
	delete(from.entries, op.Name)
	if exchange {
		from.put(op.Name, old.attr.Ino)
		c.moved(old, to, from)
	} else if old != nil {
		if old.attr.IsDir() {
			to.attr.Nlink--
		}
		c.unlinked(old)
	}
	to.put(op.NewName, n.attr.Ino)
	c.moved(n, from, to)
	c.renamed(from, op.Name)
	c.renamed(to, op.NewName)
	reply := &fsop.Reply{Attr: n.attr}
	if from == to {
		reply.Dir = to.attr
	}
	return reply, nil
}

func (c *call) moved(n, from, to *node) {
	c.touch(n, false)
	if n.attr.IsDir() && from != to {
		n.parent = to.attr.Ino
		from.attr.Nlink--
		to.attr.Nlink++
	}
}

// isBelow says whether d is dir or somewhere below it.
func (c *call) isBelow(d, dir *node) bool {
	for d != dir {
		if d.attr.Ino == fsop.RootIno {
			return false
		}
		d = c.nodes[d.parent]
	}
	return true
}

func (c *call) killPriv(n *node) {
	if n.attr.IsDir() {
		return
	}
	n.attr.Mode &^= syscall.S_ISUID
	if n.attr.Mode&0o010 != 0 {
		n.attr.Mode &^= syscall.S_ISGID
	}
}

func (c *call) setattr(op *fsop.Setattr) (*fsop.Reply, error) {
	n, err := c.node(op.Ino)
	if err != nil {
		return nil, err
	}
	if op.Valid&fsop.SetSize != 0 {
		if n, err = c.regular(op.Ino); err != nil {
			return nil, err
		}
		if op.Size > 1<<32 {
			return nil, fsop.EFBIG
		}
		n.resize(op.Size)
	}
	was := n.attr
	c.touch(n, op.Valid&fsop.SetSize != 0)
	touched := &c.effects[len(c.effects)-1]
	if op.Valid&fsop.SetKillPriv != 0 {
		c.killPriv(n)
	}
	if op.Valid&fsop.SetKillSGID != 0 && !n.attr.IsDir() {
		n.attr.Mode &^= syscall.S_ISGID
	}
	if op.Valid&fsop.SetMode != 0 {
		n.attr.Mode = n.attr.Mode&syscall.S_IFMT | op.Mode&0o7777
	}
	if op.Valid&fsop.SetUID != 0 {
		n.attr.UID = op.UID
	}
	if op.Valid&fsop.SetGID != 0 {
		n.attr.GID = op.GID
	}
	if op.Valid&fsop.SetAtime != 0 {
		n.attr.Atime = op.Atime
	}
	if op.Valid&fsop.SetMtime != 0 {
		n.attr.Mtime = op.Mtime
	}
	if op.Valid&fsop.SetAtimeNow != 0 {
		n.attr.Atime = n.attr.Ctime
	}
	if op.Valid&fsop.SetMtimeNow != 0 {
		n.attr.Mtime = n.attr.Ctime
	}
	touched.Rights = n.attr.UID != was.UID || n.attr.GID != was.GID || (n.attr.Mode^was.Mode)&syscall.S_ISVTX != 0
	return attrReply(n, nil)
}

func (n *node) resize(size uint64) {
	old := uint64(len(n.data))
	if size > uint64(cap(n.data)) {
		grown := make([]byte, size, size+size/2)
		copy(grown, n.data)
		n.data = grown
	}
	n.data = n.data[:size]
	if size > old {
		clear(n.data[old:])
	}
	n.attr.Size = size
	n.attr.Blocks = (size + 4095) / 4096 * 8
}

func (c *call) read(op *fsop.Read) (*fsop.Reply, error) {
	n, err := c.regular(op.Ino)
	if err != nil {
		return nil, err
	}
	off := min(op.Off, n.attr.Size)
	end := min(off+uint64(min(op.Len, fsop.MaxData)), n.attr.Size)
	return &fsop.Reply{Data: slices.Clone(n.data[off:end])}, nil
}

func (c *call) write(op *fsop.Write) (*fsop.Reply, error) {
	n, err := c.regular(op.Ino)
	if err != nil {
		return nil, err
	}
	off := op.Off
	if op.Append {
		off = n.attr.Size
	}
	end := off + uint64(len(op.Data))
	if end < off || end > 1<<32 {
		return nil, fsop.EFBIG
	}
	if end > n.attr.Size {
		n.resize(end)
	}
	copy(n.data[off:], op.Data)
	if op.KillPriv {
		c.killPriv(n)
	}
	c.told = op.Told
	if len(op.Data) > 0 {
		c.touch(n, true)
	}
	if op.Then.Valid != 0 {
		set := op.Then
		set.Ino = op.Ino
		if _, err := c.setattr(&set); err != nil {
			return nil, err
		}
	}
	return &fsop.Reply{Attr: n.attr, Off: off}, nil
}

func (c *call) fallocate(op *fsop.Fallocate) (*fsop.Reply, error) {
	n, err := c.regular(op.Ino)
	if err != nil {
		return nil, err
	}
	end := op.Off + op.Len
	if end < op.Off || end > 1<<32 {
		return nil, fsop.EFBIG
	}
	if op.Mode&(fsop.FallocPunchHole|fsop.FallocZeroRange) != 0 && op.Off < n.attr.Size {
		clear(n.data[op.Off:min(end, n.attr.Size)])
	}
	if op.Mode&fsop.FallocKeepSize == 0 && end > n.attr.Size {
		n.resize(end)
	}
	c.touch(n, true)
	return attrReply(n, nil)
}

func (c *call) seek(op *fsop.Seek) (*fsop.Reply, error) {
	n, err := c.regular(op.Ino)
	if err != nil {
		return nil, err
	}
	if op.Off >= n.attr.Size {
		return nil, fsop.ENXIO
	}
	if op.Whence == 4 { // SEEK_HOLE: the only hole is the end
		return &fsop.Reply{Off: n.attr.Size}, nil
	}
	return &fsop.Reply{Off: op.Off}, nil
}

func (c *call) readdir(op *fsop.Readdir) (*fsop.Reply, error) {
	d, err := c.dir(op.Ino)
	if err != nil {
		return nil, err
	}
	reply := &fsop.Reply{Attr: d.attr}
	names := make([]string, 0, len(d.entries))
	for name, e := range d.entries {
		if e.cookie > op.Cookie {
			names = append(names, name)
		}
	}
	sort.Slice(names, func(i, j int) bool { return d.entries[names[i]].cookie < d.entries[names[j]].cookie })
	size := 0
	for _, name := range names {
		if size += len(name) + 24; size > int(op.Max) && len(reply.Entries) > 0 {
			break
		}
		e := d.entries[name]
		n := c.nodes[e.ino]
		de := fsop.Dirent{Ino: e.ino, Name: name, Type: n.attr.Type(), Cookie: e.cookie}
		if op.Plus {
			size += 128
			de.Attr = n.attr
		}
		reply.Entries = append(reply.Entries, de)
	}
	return reply, nil
}

func (c *call) setxattr(op *fsop.Setxattr) (*fsop.Reply, error) {
	n, err := c.node(op.Ino)
	if err != nil {
		return nil, err
	}
	_, ok := n.xattrs[op.Name]
	switch {
	case op.Flags&fsop.XattrCreate != 0 && ok:
		return nil, fsop.EEXIST
	case op.Flags&fsop.XattrReplace != 0 && !ok:
		return nil, fsop.ENODATA
	}
	if n.xattrs == nil {
		n.xattrs = map[string][]byte{}
	}
	n.xattrs[op.Name] = slices.Clone(op.Value)
	c.touch(n, false)
	return attrReply(n, nil)
}

func (c *call) listxattr(op *fsop.Listxattr) (*fsop.Reply, error) {
	n, err := c.node(op.Ino)
	if err != nil {
		return nil, err
	}
	var names []string
	for name := range n.xattrs {
		names = append(names, name+"\x00")
	}
	slices.Sort(names)
	return &fsop.Reply{Data: []byte(strings.Join(names, ""))}, nil
}

// --- locks

func (c *call) conflict(ino fsop.Ino, l *fsop.Lock) *lock {
	for i := range c.locks {
		h := &c.locks[i]
		if h.ino != ino || h.Flock != l.Flock || h.session == c.s && h.Owner == l.Owner {
			continue
		}
		if h.Start <= l.End && l.Start <= h.End && (h.Type == fsop.LockWrite || l.Type == fsop.LockWrite) {
			return h
		}
	}
	return nil
}

func (c *call) getlk(op *fsop.Getlk) (*fsop.Reply, error) {
	if h := c.conflict(op.Ino, &op.Lock); h != nil {
		l := h.Lock
		if h.session != c.s {
			l.PID = 0
		}
		return &fsop.Reply{Lock: l}, nil
	}
	return &fsop.Reply{Lock: fsop.Lock{Type: fsop.LockUnlock, End: math.MaxInt64}}, nil
}

func (c *call) setlk(op *fsop.Setlk) error {
	if _, err := c.node(op.Ino); err != nil {
		return err
	}
	l := op.Lock
	if l.Type != fsop.LockUnlock && c.conflict(op.Ino, &l) != nil {
		return fsop.EAGAIN
	}
	var kept []lock
	for _, h := range c.locks {
		if h.ino != op.Ino || h.Flock != l.Flock || h.session != c.s || h.Owner != l.Owner || h.Start > l.End || l.Start > h.End {
			kept = append(kept, h)
			continue
		}
		if h.Start < l.Start {
			left := h
			left.End = l.Start - 1
			kept = append(kept, left)
		}
		if h.End > l.End {
			right := h
			right.Start = l.End + 1
			kept = append(kept, right)
		}
	}
	c.locks = kept
	if l.Type != fsop.LockUnlock {
		c.locks = append(c.locks, lock{c.s, op.Ino, l})
	}
	close(c.unlock)
	c.unlock = make(chan struct{})
	return nil
}

// Locks returns how many locks are held.
func (f *FS) Locks() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.locks)
}
