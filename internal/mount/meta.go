package mount

import (
	"math"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"mortar/internal/fsop"
)

// fileSystem is the Mount as go-fuse wants it: a method per request of the
// kernel. What is not here is answered ENOSYS, upon which the kernel does
// without: ACCESS (default_permissions), BMAP, STATX.
type fileSystem struct {
	fuse.RawFileSystem
	*Mount
}

// generation is that of all inodes: no inode number is used again.
const generation = 1

// blockSize is the I/O size that stat recommends. A write is a round trip to
// every replica whatever its size, so it is larger than a page.
const blockSize = 64 << 10

// Init implements fuse.RawFileSystem.
func (f *fileSystem) Init(*fuse.Server) {}

// String implements fuse.RawFileSystem.
func (f *fileSystem) String() string { return "mortar" }

// status is the kernel's form of an error from the handler.
func (m *Mount) status(r *request, err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	if e, ok := err.(fsop.Errno); ok {
		return fuse.Status(e)
	}
	if r.gaveWay() {
		return fuse.Status(syscall.ESTALE)
	}
	if r.Err() != nil {
		return fuse.EINTR
	}
	m.log.Warn("mount: operation failed", "err", err)
	return fuse.EIO
}

// seqOf is the position of a reply that may be missing, as with an error.
func seqOf(reply *fsop.Reply) uint64 {
	if reply == nil {
		return 0
	}
	return reply.Seq
}

// plausible says whether the kernel will take these attributes. It refuses
// some, and then does not count the lookup that came with them.
func plausible(a *fsop.Attr) bool {
	switch a.Type() {
	case syscall.S_IFREG, syscall.S_IFDIR, syscall.S_IFLNK, syscall.S_IFCHR, syscall.S_IFBLK, syscall.S_IFIFO, syscall.S_IFSOCK:
		return a.Ino != 0 && a.Size <= math.MaxInt64
	}
	return false
}

func fillAttr(out *fuse.Attr, a *fsop.Attr) {
	out.Ino = uint64(a.Ino)
	out.Size = a.Size
	out.Blocks = a.Blocks
	out.Atime, out.Atimensec = splitTime(a.Atime)
	out.Mtime, out.Mtimensec = splitTime(a.Mtime)
	out.Ctime, out.Ctimensec = splitTime(a.Ctime)
	out.Mode = a.Mode
	out.Nlink = a.Nlink
	out.Uid, out.Gid = a.UID, a.GID
	out.Rdev = a.Rdev
	out.Blksize = blockSize
}

func splitTime(ns int64) (sec uint64, nsec uint32) {
	s, n := ns/1e9, ns%1e9
	if n < 0 {
		s, n = s-1, n+1e9
	}
	return uint64(s), uint32(n)
}

func joinTime(sec uint64, nsec uint32) int64 {
	s := int64(sec)
	// Outside 1678 to 2262 an int64 of nanoseconds does not reach.
	const limit = math.MaxInt64 / int64(time.Second)
	s = max(-limit, min(limit-1, s))
	return s*1e9 + int64(nsec)
}

// found fills the answer to a request that found the inode of a under a name.
// The reply is counted as one of the kernel's lookups, so it must be sent.
func (m *Mount) found(r *request, a *fsop.Attr, seq uint64, parent fsop.Ino, name string, out *fuse.EntryOut) fuse.Status {
	if !plausible(a) {
		m.log.Error("mount: implausible attributes", "parent", uint64(parent), "name", name, "attr", *a)
		m.nodes.unused(a.Ino)
		return fuse.EIO
	}
	fresh := m.nodes.named(a, seq, r.began)
	m.names.add(a.Ino, parent, name)
	timeout := m.cacheTimeout()
	out.NodeId = uint64(a.Ino)
	out.Generation = generation
	fillAttr(&out.Attr, a)
	m.given.add(parent, name, true, timeout)
	// A name that is to be asked for because of what it leads to is kept as little
	// as its attributes are.
	if m.nodes.leads(parent, name, a.Ino, seq, r.began) && m.nodes.fresh(a.Ino, seq, r.began) {
		out.SetEntryTimeout(timeout)
	}
	if fresh {
		out.SetAttrTimeout(timeout)
	}
	return fuse.OK
}

// foundAgain answers a request for a name from what this mount knows, and says
// whether it could.
//
// Directories are looked for all the same. The kernel may have one at another
// name still (see finish); while it cannot move it the system call fails with
// ESTALE, and whoever tries again should not do so at this speed.
//
// The name is noted before it is looked for: an invalidation that finds the name
// still known here finds it among those given, too. A change in flight, of the
// directory or of what the name leads to, may have been carried out already, and
// only the replica knows whether anybody has seen it.
func (m *Mount) foundAgain(r *request, dir fsop.Ino, name string, out *fuse.EntryOut) bool {
	to := m.nodes.entries.look(dir, name)
	if to != nothing && m.nodes.isDir(to) {
		return false
	}
	if to == unsure || !m.leased() || m.inflight.isChanging(dir) || to != nothing && m.inflight.isChanging(to) {
		return false
	}
	timeout := m.cacheTimeout()
	m.given.add(dir, name, to != nothing, timeout)
	var a fsop.Attr
	if to != nothing {
		var ok bool
		if a, ok = m.nodes.again(to); !ok {
			return false
		}
	}
	if m.nodes.entries.look(dir, name) != to || r.began.drop != m.nodes.dropGen.Load() {
		if to != nothing {
			m.forget(to, 1)
		}
		return false
	}
	out.SetEntryTimeout(timeout)
	if to == nothing {
		return true // NodeId 0: the name's absence is cached
	}
	m.names.add(to, dir, name)
	out.NodeId, out.Generation = uint64(to), generation
	fillAttr(&out.Attr, &a)
	out.SetAttrTimeout(timeout)
	return true
}

// made is found for an inode that a change made or linked. The kernel applies
// the attributes of such a reply even over an invalidation that came later, so
// it must not keep them, unless the inode is new: then it has none that could be
// invalidated, and Invalidate waits until it does.
func (m *Mount) made(r *request, reply *fsop.Reply, parent fsop.Ino, name string, link bool, out *fuse.EntryOut) fuse.Status {
	m.changedDir(r, reply, parent)
	st := m.found(r, &reply.Attr, reply.Seq, parent, name, out)
	if st == fuse.OK {
		if link {
			out.SetAttrTimeout(0)
		}
		m.nodes.changed(reply.Attr.Ino, &reply.Attr, reply.Seq, r.began)
		if !link {
			m.nodes.setNoCap(reply.Attr.Ino, reply.Seq, r.began)
		}
		if reply.Attr.IsDir() {
			m.places.moved(reply.Attr.Ino, dirName{parent, name})
			m.nodes.empty(reply.Attr.Ino, reply.Seq, r.began)
		}
	}
	return st
}

// foretold is found for a new file that no replica knows of yet (fsop.Make). Nobody
// else knows its name, and whoever comes to know it has this mount told before he
// changes anything; what its times will be is not known.
func (m *Mount) foretold(r *request, a *fsop.Attr, parent fsop.Ino, name string, out *fuse.EntryOut) fuse.Status {
	if !plausible(a) {
		m.log.Error("mount: implausible attributes", "parent", uint64(parent), "name", name, "attr", *a)
		return fuse.EIO
	}
	m.nodes.touched(parent, 0) // nobody knows its attributes yet
	m.dropListings(parent)
	m.nodes.foretold(a)
	m.names.add(a.Ino, parent, name)
	out.NodeId = uint64(a.Ino)
	out.Generation = generation
	fillAttr(&out.Attr, a)
	if r.began.drop == m.nodes.dropGen.Load() {
		out.SetEntryTimeout(m.cacheTimeout())
	}
	return fuse.OK
}

// changedDir is told of every change of a directory's entries by this mount.
func (m *Mount) changedDir(r *request, reply *fsop.Reply, dir fsop.Ino) {
	m.nodes.touched(dir, reply.Seq)
	m.dropListings(dir)
	if reply.Dir.Ino == dir {
		m.nodes.changed(dir, &reply.Dir, reply.Seq, r.began)
	}
}

// tooLong says whether no file system of ours can have the name. The kernel
// itself stops only at 1024 bytes.
func tooLong(name string) bool { return len(name) > fsop.MaxName }

// Lookup implements fuse.RawFileSystem.
func (f *fileSystem) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if tooLong(name) {
		return fuse.Status(syscall.ENAMETOOLONG)
	}
	r := f.begin(cancel, h)
	defer f.inflight.remove(r)
	dir := fsop.Ino(h.NodeId)
	if name == fsop.Self || name == fsop.Above {
		if f.asker.is(h.Pid) {
			return fuse.Status(syscall.ESTALE) // it asks about what the kernel has, and waits for nobody
		}
		return f.lookupHandle(r, &fsop.Lookup{Parent: dir, Name: name}, out)
	}
	f.answers.add(dir, name)
	if f.foundAgain(r, dir, name, out) {
		return fuse.OK
	}
	defer f.lookings.end(f.lookings.begin(r, dir, name))
	reply, err := f.handler.Do(r, &fsop.Lookup{Parent: dir, Name: name})
	if err == fsop.ENOENT {
		timeout := f.cacheTimeout()
		f.given.add(dir, name, false, timeout)
		if f.nodes.leads(dir, name, nothing, seqOf(reply), r.began) {
			out.SetEntryTimeout(timeout) // NodeId 0, as in foundAgain
			return fuse.OK
		}
		return fuse.ENOENT
	}
	if err != nil {
		return f.status(r, err)
	}
	if reply.Attr.IsDir() {
		f.vacate(r, reply.Attr.Ino, dirName{dir, name})
	}
	f.answers.add(dir, name)
	return f.found(r, &reply.Attr, reply.Seq, dir, name, out)
}

// lookupHandle answers the kernel when it has a handle of an inode that it does not know any
// more, or of a directory whose place it does not know. It is told of no name.
func (f *fileSystem) lookupHandle(r *request, op *fsop.Lookup, out *fuse.EntryOut) fuse.Status {
	reply, err := f.handler.Do(r, op)
	if err != nil {
		return f.status(r, err)
	}
	a := &reply.Attr
	if !plausible(a) {
		f.log.Error("mount: implausible attributes of a handle's inode", "ino", uint64(op.Parent), "attr", *a)
		f.nodes.unused(a.Ino)
		return fuse.EIO
	}
	if f.nodes.named(a, reply.Seq, r.began) {
		out.SetAttrTimeout(f.cacheTimeout())
	}
	out.NodeId, out.Generation = uint64(a.Ino), generation
	fillAttr(&out.Attr, a)
	return fuse.OK
}

// leased says whether what was cached may still be believed.
func (m *Mount) leased() bool { return m.o.Leased == nil || m.o.Leased() }

// Forget implements fuse.RawFileSystem.
func (f *fileSystem) Forget(nodeid, nlookup uint64) {
	f.forget(fsop.Ino(nodeid), nlookup)
}

// forget takes lookups back that were counted.
func (m *Mount) forget(ino fsop.Ino, n uint64) {
	if m.nodes.forgot(ino, n) {
		m.names.forget(ino)
		m.places.forget(ino)
	}
}

// GetAttr implements fuse.RawFileSystem.
//
// The kernel asks before it reads from a page whose inode was invalidated. If
// another invalidation comes in between it ignores the answer and reads the
// page up to the size that it has, so pages that are known to be old must be gone
// before the answer, and the size must be right (see sizes).
func (f *fileSystem) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	ino := fsop.Ino(in.NodeId)
	var z *sizing
	switch {
	case in.Flags()&fuse.FUSE_GETATTR_FH != 0 && f.nodes.unsized(ino):
		z = f.sizes.begin(ino)
		defer f.sizes.end(ino, z)
	case f.asker.is(in.Pid):
		if a, fresh, ok := f.answerSize(ino); ok {
			fillAttr(&out.Attr, &a)
			if fresh {
				out.SetTimeout(f.cacheTimeout())
			}
			return fuse.OK
		}
	}
	f.pages.await(r, ino)
	own := f.inflight.resized(ino)
	attr, seq, ok := f.nodes.attr(ino)
	if !ok || !f.leased() || f.inflight.isChanging(ino) {
		reply, err := f.handler.Do(r, &fsop.Getattr{Ino: ino})
		if err != nil {
			return f.status(r, err)
		}
		attr, seq = reply.Attr, reply.Seq
	}
	if !plausible(&attr) {
		f.log.Error("mount: implausible attributes", "ino", uint64(ino), "attr", attr)
		return fuse.EIO
	}
	if z != nil {
		f.settleSize(r, z, &attr, seq, own)
	}
	fillAttr(&out.Attr, &attr)
	if f.nodes.read(&attr, seq, r.began) {
		out.SetTimeout(f.cacheTimeout())
	}
	return fuse.OK
}

// SetAttr implements fuse.RawFileSystem.
func (f *fileSystem) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	ino := fsop.Ino(in.NodeId)
	op := &fsop.Setattr{Ino: ino}
	for _, b := range []struct{ from, to uint32 }{
		{fuse.FATTR_MODE, fsop.SetMode},
		{fuse.FATTR_UID, fsop.SetUID},
		{fuse.FATTR_GID, fsop.SetGID},
		{fuse.FATTR_SIZE, fsop.SetSize},
		{fuse.FATTR_ATIME, fsop.SetAtime},
		{fuse.FATTR_MTIME, fsop.SetMtime},
		{fuse.FATTR_ATIME_NOW, fsop.SetAtimeNow},
		{fuse.FATTR_MTIME_NOW, fsop.SetMtimeNow},
		{fuse.FATTR_KILL_SUIDGID, fsop.SetKillPriv},
	} {
		if in.Valid&b.from != 0 {
			op.Valid |= b.to
		}
	}
	if op.Valid&fsop.SetAtimeNow != 0 {
		op.Valid &^= fsop.SetAtime
	}
	if op.Valid&fsop.SetMtimeNow != 0 {
		op.Valid &^= fsop.SetMtime
	}
	dir := f.nodes.isDir(ino)
	// A change of owner clears the set-id bits of anything but a directory, and
	// since HANDLE_KILLPRIV_V2 that is the file system's to do. chown(-1, -1),
	// the one request with nothing in it, does so as well.
	if !dir && (op.Valid&(fsop.SetUID|fsop.SetGID) != 0 || op.Valid == 0) {
		op.Valid |= fsop.SetKillPriv
	}
	if op.Valid&fsop.SetKillPriv != 0 {
		op.Valid |= f.killSGID(r, ino, &in.InHeader)
	}
	op.Mode = in.Mode & 0o7777
	op.UID, op.GID = in.Uid, in.Gid
	op.Size = in.Size
	op.Atime = joinTime(in.Atime, in.Atimensec)
	op.Mtime = joinTime(in.Mtime, in.Mtimensec)
	if dir {
		f.inflight.changing(ino)
		defer f.inflight.doneChanging(ino)
	} else {
		f.inflight.resizing(ino)
		defer f.inflight.doneResizing(ino)
	}
	reply, err := f.handler.Do(r, op)
	if err != nil {
		return f.status(r, err)
	}
	f.nodes.changed(ino, &reply.Attr, reply.Seq, r.began)
	fillAttr(&out.Attr, &reply.Attr) // not to be kept, like those of made
	return fuse.OK
}

// change carries out an operation that changes dir's entries.
func (m *Mount) change(r *request, dir fsop.Ino, op fsop.Op) (*fsop.Reply, error) {
	m.inflight.changing(dir)
	defer m.inflight.doneChanging(dir)
	return m.handler.Do(r, op)
}

func newNode(h *fuse.InHeader, name string, mode, umask uint32) fsop.Node {
	return fsop.Node{Parent: fsop.Ino(h.NodeId), Name: name, Mode: mode & 0o7777, Umask: umask & 0o777, UID: h.Uid, GID: h.Gid}
}

// Mkdir implements fuse.RawFileSystem.
func (f *fileSystem) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return f.make(cancel, &in.InHeader, name, &fsop.Mkdir{Node: newNode(&in.InHeader, name, in.Mode, in.Umask)}, out)
}

// Symlink implements fuse.RawFileSystem.
func (f *fileSystem) Symlink(cancel <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	if len(target) > fsop.MaxTarget {
		return fuse.Status(syscall.ENAMETOOLONG)
	}
	return f.make(cancel, h, name, &fsop.Symlink{Node: newNode(h, name, 0o777, 0), Target: target}, out)
}

// Mknod implements fuse.RawFileSystem.
//
// With locks=node the kernel has no CREATE, and makes regular files with MKNOD
// whether open was called with O_EXCL or not. When the name turns out to exist,
// EEXIST would be wrong without O_EXCL, so it gets ESTALE: the kernel looks the
// name up again and does what open asked for.
func (f *fileSystem) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	op := &fsop.Mknod{Node: newNode(&in.InHeader, name, in.Mode, in.Umask), Rdev: in.Rdev}
	op.Mode = in.Mode & (syscall.S_IFMT | 0o7777)
	st := f.make(cancel, &in.InHeader, name, op, out)
	if st == fuse.Status(syscall.EEXIST) && f.o.LocksNode && in.Mode&syscall.S_IFMT == syscall.S_IFREG {
		return fuse.Status(syscall.ESTALE)
	}
	return st
}

// Link implements fuse.RawFileSystem.
func (f *fileSystem) Link(cancel <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	return f.make(cancel, &in.InHeader, name,
		&fsop.Link{Ino: fsop.Ino(in.Oldnodeid), Parent: fsop.Ino(in.NodeId), Name: name}, out)
}

// make carries out an operation that gives an inode a name.
func (f *fileSystem) make(cancel <-chan struct{}, h *fuse.InHeader, name string, op fsop.Op, out *fuse.EntryOut) fuse.Status {
	if tooLong(name) {
		return fuse.Status(syscall.ENAMETOOLONG)
	}
	r := f.begin(cancel, h)
	defer f.inflight.remove(r)
	dir := fsop.Ino(h.NodeId)
	f.nodes.entries.doubt(dir, name)
	reply, err := f.change(r, dir, op)
	if err != nil {
		return f.status(r, err)
	}
	_, link := op.(*fsop.Link)
	return f.made(r, reply, dir, name, link, out)
}

// Unlink implements fuse.RawFileSystem.
func (f *fileSystem) Unlink(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return f.remove(cancel, h, name, &fsop.Unlink{Parent: fsop.Ino(h.NodeId), Name: name})
}

// Rmdir implements fuse.RawFileSystem.
func (f *fileSystem) Rmdir(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return f.remove(cancel, h, name, &fsop.Rmdir{Parent: fsop.Ino(h.NodeId), Name: name})
}

func (f *fileSystem) remove(cancel <-chan struct{}, h *fuse.InHeader, name string, op fsop.Op) fuse.Status {
	if tooLong(name) {
		return fuse.Status(syscall.ENAMETOOLONG)
	}
	r := f.begin(cancel, h)
	defer f.inflight.remove(r)
	dir := fsop.Ino(h.NodeId)
	f.nodes.entries.doubt(dir, name)
	reply, err := f.change(r, dir, op)
	if err != nil {
		return f.status(r, err)
	}
	f.changedDir(r, reply, dir)
	f.nodes.leads(dir, name, nothing, reply.Seq, r.began)
	if reply.Attr.Ino == 0 {
		f.nodes.replaced(r.began)
		return fuse.OK
	}
	f.nodes.changed(reply.Attr.Ino, &reply.Attr, reply.Seq, r.began)
	return fuse.OK
}

// Rename implements fuse.RawFileSystem.
func (f *fileSystem) Rename(cancel <-chan struct{}, in *fuse.RenameIn, name, newName string) fuse.Status {
	if tooLong(name) || tooLong(newName) {
		return fuse.Status(syscall.ENAMETOOLONG)
	}
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	op := &fsop.Rename{
		Parent: fsop.Ino(in.NodeId), Name: name,
		NewParent: fsop.Ino(in.Newdir), NewName: newName,
		Flags: in.Flags,
	}
	if op.Flags&^(fsop.RenameNoReplace|fsop.RenameExchange|fsop.RenameWhiteout) != 0 {
		return fuse.EINVAL
	}
	// The kernel moves what it has cached along with the name, its time included.
	f.given.add(op.NewParent, newName, true, f.cacheTimeout())
	f.given.add(op.Parent, name, true, f.cacheTimeout())
	over := f.nodes.entries.doubt(op.NewParent, newName)
	f.nodes.entries.doubt(op.Parent, name)
	if op.NewParent != op.Parent {
		f.inflight.changing(op.NewParent)
		defer f.inflight.doneChanging(op.NewParent)
		f.places.begin(op)
		defer f.places.end(op)
	}
	reply, err := f.change(r, op.Parent, op)
	if err != nil {
		return f.status(r, err)
	}
	// What was there before has changed as well.
	switch {
	case over == unsure:
		r.began = f.nodes.replaced(r.began)
	case over != nothing:
		f.nodes.touched(over, reply.Seq)
	}
	f.changedDir(r, reply, op.Parent)
	f.changedDir(r, reply, op.NewParent)
	f.nodes.leads(op.NewParent, newName, reply.Attr.Ino, reply.Seq, r.began)
	// Two names of one file both stay.
	moved := reply.Attr.IsDir() || reply.Attr.Nlink == 1 && (op.Parent != op.NewParent || name != newName)
	if moved && op.Flags&(fsop.RenameExchange|fsop.RenameWhiteout) == 0 {
		f.nodes.leads(op.Parent, name, nothing, reply.Seq, r.began)
	}
	f.nodes.changed(reply.Attr.Ino, &reply.Attr, reply.Seq, r.began)
	f.names.add(reply.Attr.Ino, op.NewParent, newName)
	if op.Flags&fsop.RenameExchange != 0 {
		f.names.exchanged(reply.Attr.Ino, dirName{op.Parent, name}, dirName{op.NewParent, newName})
	}
	if moved {
		f.names.remove(reply.Attr.Ino, op.Parent, name)
	}
	if reply.Attr.IsDir() {
		f.places.moved(reply.Attr.Ino, dirName{op.NewParent, newName})
	}
	return fuse.OK
}

// Readlink implements fuse.RawFileSystem.
func (f *fileSystem) Readlink(cancel <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	r := f.begin(cancel, h)
	defer f.inflight.remove(r)
	reply, err := f.handler.Do(r, &fsop.Readlink{Ino: fsop.Ino(h.NodeId)})
	if err != nil {
		return nil, f.status(r, err)
	}
	return reply.Data, fuse.OK
}

// StatFs implements fuse.RawFileSystem.
func (f *fileSystem) StatFs(cancel <-chan struct{}, h *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	r := f.begin(cancel, h)
	defer f.inflight.remove(r)
	reply, err := f.handler.Do(r, &fsop.StatfsOp{Ino: fsop.Ino(h.NodeId)})
	if err != nil {
		return f.status(r, err)
	}
	const unit = 4096
	s := &reply.Statfs
	out.Blocks, out.Bfree, out.Bavail = s.Total/unit, s.Free/unit, s.Avail/unit
	out.Files, out.Ffree = s.Files, s.FilesFree
	out.Bsize, out.Frsize = unit, unit
	out.NameLen = fsop.MaxName
	return fuse.OK
}
