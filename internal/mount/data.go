package mount

import (
	"errors"
	"math"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"mortar/internal/fsop"
)

// Open implements fuse.RawFileSystem. Permission was checked by the kernel, and
// an open file needs nothing of the cluster: its inode lives while the kernel
// knows it. So OPEN is answered here.
func (f *fileSystem) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	ino := fsop.Ino(in.NodeId)
	if in.Flags&syscall.O_TRUNC == 0 {
		return f.openKept(ino, in.Flags, in.Pid, out)
	}
	if st := f.mayOpen(ino, in.Flags); st != fuse.OK {
		return st
	}
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	if st := f.truncate(r, ino, &in.InHeader, in.Mode&fuse.OPEN_KILL_SUIDGID != 0); st != fuse.OK {
		return st
	}
	f.openedBy(in.Pid, ino, in.Flags, out)
	return fuse.OK
}

// openKept answers OPEN of a file that keeps its contents. It waits for nobody.
func (f *fileSystem) openKept(ino fsop.Ino, flags, pid uint32, out *fuse.OpenOut) fuse.Status {
	if st := f.mayOpen(ino, flags); st != fuse.OK {
		return st
	}
	f.openedBy(pid, ino, flags, out)
	return fuse.OK
}

func (f *fileSystem) mayOpen(ino fsop.Ino, flags uint32) fuse.Status {
	switch {
	case f.o.LocksNode:
		return fuse.ENOSYS
	case !f.mayOpenFlagged(ino, flags):
		return fuse.EPERM
	}
	return fuse.OK
}

// openedBy fills the answer to OPEN by a thread.
func (f *fileSystem) openedBy(tid uint32, ino fsop.Ino, flags uint32, out *fuse.OpenOut) {
	f.opened(ino, flags, out)
	if f.asker.is(tid) {
		out.OpenFlags |= fuse.FOPEN_NOFLUSH
	}
}

// opened fills the answer to OPEN and CREATE; what names the inode is counted already.
func (f *fileSystem) opened(ino fsop.Ino, flags uint32, out *fuse.OpenOut) {
	if flags&syscall.O_ACCMODE == syscall.O_RDWR {
		f.nodes.mark(ino, storable)
	}
	out.Fh = f.estate.NextHandle()
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	switch access := flags & syscall.O_ACCMODE; {
	case access == syscall.O_RDONLY && f.nodes.marksOf(ino)&lockable == 0:
		// Its close is of no interest. Should somebody take a lock later, and through
		// it, that goes with RELEASE, see locks.go.
		out.OpenFlags |= fuse.FOPEN_NOFLUSH
	case access == syscall.O_WRONLY:
		// Nothing is read through it, so nothing need be kept: the next reader would
		// find the pages older than the file's new time and drop them. Writes come
		// as they are, without a question for security.capability before each, which
		// the file system takes away with every write.
		out.OpenFlags |= fuse.FOPEN_DIRECT_IO
	case flags&syscall.O_APPEND != 0:
		// Through the page cache, an append would put the data where the kernel
		// believes the file's end to be, which another mount may have moved; and
		// the kernel would make two of one that crosses a page it does not have.
		out.OpenFlags |= fuse.FOPEN_DIRECT_IO
	}
}

func (f *fileSystem) truncate(r *request, ino fsop.Ino, h *fuse.InHeader, killPriv bool) fuse.Status {
	op := &fsop.Setattr{Ino: ino, Valid: fsop.SetSize}
	if killPriv {
		op.Valid |= fsop.SetKillPriv | f.killSGID(r, ino, h)
	}
	f.inflight.resizing(ino)
	defer f.inflight.doneResizing(ino)
	setID := killPriv && f.nodes.marksOf(ino)&setID != 0
	reply, err := f.handler.Do(r, op)
	if err != nil {
		return f.status(r, err)
	}
	f.nodes.changed(ino, &reply.Attr, reply.Seq, r.began)
	f.nodes.setNoCap(ino, reply.Seq, r.began) // it went with the contents; the kernel is about to ask for it
	if setID {
		f.lostSetID(ino)
	}
	return fuse.OK
}

// Create implements fuse.RawFileSystem.
//
// It always asks for a new file. Should there be one by now although the kernel
// believed that there is none, and O_EXCL was not given, then this caller may
// not be allowed to open it, and it is too late for the kernel to check. The
// owner and root are let in; for others, ESTALE makes the kernel start over.
func (f *fileSystem) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	if f.o.LocksNode {
		return fuse.ENOSYS // the kernel goes on with MKNOD, and needs no RELEASE
	}
	if tooLong(name) {
		return fuse.Status(syscall.ENAMETOOLONG)
	}
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	dir := fsop.Ino(in.NodeId)
	f.inflight.changing(dir)
	defer f.inflight.doneChanging(dir)
	op := &fsop.Create{Node: newNode(&in.InHeader, name, in.Mode, in.Umask), Excl: true}
	was := f.nodes.entries.doubt(dir, name)
	// Only the close of a file that can be written to is heard of (FOPEN_NOFLUSH).
	if was == nothing && in.Flags&syscall.O_ACCMODE != syscall.O_RDONLY && f.leased() {
		// The name is noted before it is there: whoever is shown it may change it.
		f.given.add(dir, name, true, f.cacheTimeout())
		reply, err := f.handler.Do(r, &fsop.Make{Node: op.Node})
		switch {
		case err == nil && reply.Attr.Change == 0:
			st := f.foretold(r, &reply.Attr, dir, name, &out.EntryOut)
			f.opened(reply.Attr.Ino, in.Flags, &out.OpenOut)
			return st
		case err == nil:
			st := f.made(r, reply, dir, name, false, &out.EntryOut)
			f.opened(reply.Attr.Ino, in.Flags, &out.OpenOut)
			return st
		case err != fsop.EEXIST:
			return f.status(r, err)
		}
	}
	for range 3 {
		reply, err := f.handler.Do(r, op)
		if err == nil {
			st := f.made(r, reply, dir, name, false, &out.EntryOut)
			f.opened(reply.Attr.Ino, in.Flags, &out.OpenOut)
			return st
		}
		if err != fsop.EEXIST || in.Flags&syscall.O_EXCL != 0 {
			return f.status(r, err)
		}
		reply, err = f.handler.Do(r, &fsop.Lookup{Parent: dir, Name: name})
		if err == fsop.ENOENT {
			continue // and gone again
		}
		if err != nil {
			return f.status(r, err)
		}
		if !reply.Attr.IsRegular() || !mayOpen(&reply.Attr, &in.Caller, in.Flags) {
			f.nodes.unused(reply.Attr.Ino)
			break
		}
		if in.Flags&syscall.O_TRUNC != 0 {
			if st := f.truncate(r, reply.Attr.Ino, &in.InHeader, in.OpenFlags&fuse.OPEN_KILL_SUIDGID != 0); st != fuse.OK {
				f.nodes.unused(reply.Attr.Ino)
				return st
			}
		}
		st := f.found(r, &reply.Attr, reply.Seq, dir, name, &out.EntryOut)
		out.SetAttrTimeout(0)
		f.opened(reply.Attr.Ino, in.Flags, &out.OpenOut)
		return st
	}
	return fuse.Status(syscall.ESTALE)
}

// Tmpfile implements fuse.RawFileSystem: O_TMPFILE. The kernel itself refuses to
// link what was opened with O_EXCL.
func (f *fileSystem) Tmpfile(cancel <-chan struct{}, in *fuse.CreateIn, out *fuse.CreateOut) fuse.Status {
	if f.o.LocksNode {
		return fuse.ENOSYS // as CREATE; there is nothing to go on with, so open says EOPNOTSUPP
	}
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	reply, err := f.handler.Do(r, &fsop.Tmpfile{
		Node: newNode(&in.InHeader, "", in.Mode, in.Umask), Excl: in.Flags&syscall.O_EXCL != 0,
	})
	if err != nil {
		return f.status(r, err)
	}
	a := &reply.Attr
	if !plausible(a) {
		f.log.Error("mount: implausible attributes of a new file", "directory", in.NodeId, "attr", *a)
		f.nodes.unused(a.Ino)
		return fuse.EIO
	}
	if f.nodes.named(a, reply.Seq, r.began) {
		out.SetAttrTimeout(f.cacheTimeout())
	}
	f.nodes.setNoCap(a.Ino, reply.Seq, r.began)
	out.NodeId, out.Generation = uint64(a.Ino), generation
	fillAttr(&out.Attr, a)
	f.opened(a.Ino, in.Flags, &out.OpenOut)
	return fuse.OK
}

// mayOpen says whether the caller certainly may open a file: it does not know
// of groups and capabilities.
func mayOpen(a *fsop.Attr, c *fuse.Caller, flags uint32) bool {
	if c.Uid == 0 {
		return true
	}
	if c.Uid != a.UID {
		return false
	}
	need := map[uint32]uint32{syscall.O_RDONLY: 0o400, syscall.O_WRONLY: 0o200, syscall.O_RDWR: 0o600}[flags&syscall.O_ACCMODE]
	return need != 0 && a.Mode&need == need
}

// Read implements fuse.RawFileSystem.
func (f *fileSystem) Read(cancel <-chan struct{}, in *fuse.ReadIn, _ []byte) (fuse.ReadResult, fuse.Status) {
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	f.inflight.changing(fsop.Ino(in.NodeId))
	defer f.inflight.doneChanging(fsop.Ino(in.NodeId))
	if in.ReadFlags&fuse.READ_LOCKOWNER == 0 { // see Write
		f.nodes.mark(fsop.Ino(in.NodeId), paged)
	}
	reply, err := f.handler.Do(r, &fsop.Read{
		Ino: fsop.Ino(in.NodeId), Off: in.Offset, Len: min(in.Size, fsop.MaxData),
	})
	if err != nil {
		return nil, f.status(r, err)
	}
	data := reply.Data[:min(len(reply.Data), int(in.Size))]
	if reply.Free == nil {
		return fuse.ReadResultData(data), fuse.OK
	}
	return &freedResult{data, reply.Free}, fuse.OK
}

// freedResult is a result whose memory is used again.
type freedResult struct {
	data []byte
	free func()
}

// Slices is what makes go-fuse copy the data before it calls Done.
func (r *freedResult) Slices() ([][]byte, fuse.Status) { return [][]byte{r.data}, fuse.OK }

// Bytes implements fuse.ReadResult.
func (r *freedResult) Bytes(buf []byte) ([]byte, fuse.Status) {
	return buf[:copy(buf, r.data)], fuse.OK
}

// Size implements fuse.ReadResult.
func (r *freedResult) Size() int { return len(r.data) }

// Done implements fuse.ReadResult.
func (r *freedResult) Done() {
	if r.free != nil {
		r.free()
		r.data, r.free = nil, nil
	}
}

// Write implements fuse.RawFileSystem.
func (f *fileSystem) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	n, st := f.write(cancel, in, data)
	// The kernel names a lock owner when it writes past its pages. An O_DIRECT descriptor can have
	// to use them all the same; then they are locked until this is answered.
	if st == fuse.OK && in.Flags&syscall.O_DIRECT != 0 && in.WriteFlags&fuse.WRITE_LOCKOWNER != 0 {
		f.wroteAround(fsop.Ino(in.NodeId))
	}
	return n, st
}

// wroteAround has the kernel drop the pages of a file that was written to past them. It drops
// them itself, before such a write and once more afterwards, but not after an asynchronous one
// (io_submit): then pages stay that somebody read meanwhile, and so do the attributes
// that would show that they are old.
//
// So the write is not answered before they are gone. Should a READ have locked one just now,
// it goes before whoever reads next is let to (GetAttr). A READ that comes later is told of the
// write. Whoever reads a file past its pages, too, as databases do, has none to drop.
func (m *Mount) wroteAround(ino fsop.Ino) {
	if !m.nodes.unmark(ino, paged) {
		return
	}
	if err := m.dev.invalAttr(ino); err != nil {
		return // the kernel does not have the inode, or it is being unmounted
	}
	patience := time.NewTimer(pagePatience)
	defer patience.Stop()
	select {
	case <-m.pages.add(m.dev, ino):
	case <-patience.C:
	}
}

func (f *fileSystem) write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	ino := fsop.Ino(in.NodeId)
	f.inflight.changing(ino)
	defer f.inflight.doneChanging(ino)
	f.inflight.resizing(ino)
	defer f.inflight.doneResizing(ino)
	op := &fsop.Write{
		Ino:      ino,
		Off:      in.Offset,
		Append:   in.Flags&syscall.O_APPEND != 0 && in.WriteFlags&fuse.WRITE_CACHE == 0,
		KillPriv: in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0,
		Data:     data,
	}
	setID := op.KillPriv && f.nodes.marksOf(ino)&setID != 0
	if setID {
		// A Write does not say it: that is for files which hardly exist. On a local disk, too, the
		// bits go before what is written comes.
		if kill := f.killSGID(r, ino, &in.InHeader); kill != 0 {
			if _, err := f.handler.Do(r, &fsop.Setattr{Ino: ino, Valid: fsop.SetKillPriv | kill}); err != nil {
				return 0, f.status(r, err)
			}
		}
	}
	reply, err := f.handler.Do(r, op)
	if errors.Is(err, fsop.EDQUOT) && in.WriteFlags&fuse.WRITE_CACHE != 0 {
		err = fsop.ENOSPC // of pages written back, the kernel tells EDQUOT to nobody but as EIO
	}
	if err != nil {
		return 0, f.status(r, err)
	}
	if reply.Short != 0 {
		data = data[:reply.Short]
	}
	f.nodes.changed(ino, &reply.Attr, reply.Seq, r.began)
	if setID {
		f.lostSetID(ino)
	}
	if op.Append && reply.Off != in.Offset {
		// With locks=node there is no OPEN to say DIRECT_IO to, and the kernel put
		// the data in its page cache at in.Offset. It has to ask for the size before
		// it reads, which drops the page; mapped pages and a reader who is past that
		// question are for the queue.
		f.pages.add(f.dev, ino)
	}
	return uint32(len(data)), fuse.OK
}

// Writev implements fuse.RawFileSystem.
func (f *fileSystem) Writev(cancel <-chan struct{}, in *fuse.WriteIn, data [][]byte) (uint32, fuse.Status) {
	if len(data) == 1 {
		return f.Write(cancel, in, data[0])
	}
	var joined []byte
	for _, d := range data {
		joined = append(joined, d...)
	}
	return f.Write(cancel, in, joined)
}

// Fsync implements fuse.RawFileSystem.
func (f *fileSystem) Fsync(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	if f.asker.is(in.Pid) {
		return fuse.OK // what was asked for was written before, see writeOut
	}
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	_, err := f.handler.Do(r, &fsop.Fsync{Ino: fsop.Ino(in.NodeId)})
	return f.status(r, err)
}

// FsyncDir implements fuse.RawFileSystem.
func (f *fileSystem) FsyncDir(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	f.inflight.changing(fsop.Ino(in.NodeId)) // the kernel holds the directory's lock
	defer f.inflight.doneChanging(fsop.Ino(in.NodeId))
	return f.Fsync(cancel, in)
}

// Fallocate implements fuse.RawFileSystem.
func (f *fileSystem) Fallocate(cancel <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	switch in.Mode {
	case 0, fsop.FallocKeepSize, fsop.FallocKeepSize | fsop.FallocPunchHole,
		fsop.FallocZeroRange, fsop.FallocZeroRange | fsop.FallocKeepSize:
	default:
		return fuse.Status(syscall.EOPNOTSUPP)
	}
	if in.Length == 0 || in.Offset > math.MaxInt64-in.Length {
		return fuse.EINVAL
	}
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	ino := fsop.Ino(in.NodeId)
	f.inflight.resizing(ino)
	defer f.inflight.doneResizing(ino)
	reply, err := f.handler.Do(r, &fsop.Fallocate{
		Ino: ino, Mode: in.Mode, Off: in.Offset, Len: in.Length,
	})
	if err != nil {
		return f.status(r, err)
	}
	f.nodes.changed(ino, &reply.Attr, reply.Seq, r.began)
	return fuse.OK
}

// copyChunk is the most that one COPY_FILE_RANGE copies: it cannot be
// interrupted, and whoever copies a file asks again for the rest anyway.
const copyChunk = 8 << 20

// CopyFileRange implements fuse.RawFileSystem.
func (f *fileSystem) CopyFileRange(cancel <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	if in.Flags != 0 {
		return 0, fuse.EINVAL
	}
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	var done uint64
	for want := min(in.Len, copyChunk); done < want; {
		n, err := f.copyOnce(r, in, done, uint32(min(want-done, fsop.MaxData)))
		if err != nil && done == 0 {
			return 0, f.status(r, err)
		}
		if err != nil || n == 0 {
			break
		}
		done += n
	}
	return uint32(done), fuse.OK
}

func (f *fileSystem) copyOnce(r *request, in *fuse.CopyFileRangeIn, done uint64, n uint32) (uint64, error) {
	read, err := f.handler.Do(r, &fsop.Read{Ino: fsop.Ino(in.NodeId), Off: in.OffIn + done, Len: n})
	if err != nil || len(read.Data) == 0 {
		return 0, err
	}
	out := fsop.Ino(in.NodeIdOut)
	f.inflight.resizing(out)
	defer f.inflight.doneResizing(out)
	wrote, err := f.handler.Do(r, &fsop.Write{Ino: out, Off: in.OffOut + done, Data: read.Data})
	if err != nil {
		return 0, err
	}
	f.nodes.changed(out, &wrote.Attr, wrote.Seq, r.began)
	return uint64(len(read.Data)), nil
}

// Lseek implements fuse.RawFileSystem, for SEEK_DATA and SEEK_HOLE.
//
// The kernel does not write out what programs stored through shared mappings
// before it asks where there is data. Dropping the pages does.
func (f *fileSystem) Lseek(cancel <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	select {
	case <-f.pages.add(f.dev, fsop.Ino(in.NodeId)):
	case <-r.Done():
		return fuse.EINTR
	}
	reply, err := f.handler.Do(r, &fsop.Seek{Ino: fsop.Ino(in.NodeId), Off: in.Offset, Whence: in.Whence})
	if err != nil {
		return f.status(r, err)
	}
	out.Offset = reply.Off
	return fuse.OK
}
