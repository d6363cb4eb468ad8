package brick

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"syscall"

	"mortar/internal/brick/data"
	"mortar/internal/brick/meta"
	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/oplog"
)

// Read answers an operation that changes nothing, as of one position, which is
// the reply's Seq. dep is the sequence of the last entry that the answer depends
// on; until that is committed, the answer must not be told to anybody. It counts
// for an errno too: what is not there may be because of an entry. Any error but
// an fsop.Errno means that the brick has failed.
func (b *Brick) Read(ctx context.Context, op fsop.Op) (reply *fsop.Reply, dep uint64, err error) {
	if err := b.Err(); err != nil {
		return nil, 0, err
	}
	if err := ctx.Err(); err != nil {
		return nil, 0, context.Cause(ctx)
	}
	reply, dep, err = b.read(ctx, op)
	if err == nil {
		return reply, dep, nil
	}
	var errno fsop.Errno
	if !errors.As(err, &errno) {
		if cause := b.Err(); cause != nil {
			return nil, dep, cause
		}
		if b.lost(err) || b.onlyRotten(err) {
			return nil, dep, fsop.EIO
		}
		if ctx.Err() != nil {
			return nil, dep, context.Cause(ctx)
		}
		return nil, dep, b.failWith(fmt.Errorf("%s: %w", fsop.String(op), err))
	}
	return nil, dep, errno
}

func (b *Brick) read(ctx context.Context, op fsop.Op) (*fsop.Reply, uint64, error) {
	if op, ok := op.(*fsop.Read); ok {
		return b.readData(ctx, op)
	}
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.closed.Load() {
		return nil, 0, ErrClosed
	}
	r := &fsop.Reply{Seq: b.state.Pos.Seq}
	var dep uint64
	var err error
	switch op := op.(type) {
	case *fsop.Lookup:
		dep, err = b.lookup(op, r)
	case *fsop.Getattr:
		dep, err = b.getattr(op.Ino, r)
	case *fsop.Readlink:
		dep, err = b.readlink(op, r)
	case *fsop.Readdir:
		dep, err = b.readdir(op, r)
	case *fsop.StatfsOp:
		err = b.statfs(op, r)
	case *fsop.Getxattr:
		dep, err = b.getxattr(op, r)
	case *fsop.Listxattr:
		dep, err = b.listxattr(op, r)
	case *fsop.Seek:
		dep, err = b.seek(op, r)
	case *fsop.Getlk:
		var n *node
		if n, err = b.inode(op.Ino); err == nil {
			dep = r.Seq // locks have no version of their own
			r.Attr = b.attr(n)
			r.Lock = b.getlk(op)
		}
	default:
		err = fsop.EINVAL
	}
	if err != nil {
		return nil, dep, err
	}
	return r, dep, nil
}

// inode returns an inode for reading, ESTALE if there is none. b.mu is held.
func (b *Brick) inode(ino fsop.Ino) (*node, error) {
	if n := b.cache.get(ino); n != nil {
		return n, nil
	}
	n, err := b.load(ino)
	if err != nil {
		return nil, err
	}
	if n == nil {
		return nil, fsop.ESTALE
	}
	b.cache.put(n)
	return n, nil
}

// gone is the dep of an answer about an inode that does not exist: nothing is
// left that could tell when it went. b.mu is held.
func (b *Brick) gone(err error) (uint64, error) {
	if errors.Is(err, fsop.ESTALE) {
		return b.state.Pos.Seq, err
	}
	return 0, err
}

func (b *Brick) getattr(ino fsop.Ino, r *fsop.Reply) (uint64, error) {
	n, err := b.inode(ino)
	if err != nil {
		return b.gone(err)
	}
	r.Attr = b.attr(n)
	return n.Change, nil
}

func (b *Brick) lookup(op *fsop.Lookup, r *fsop.Reply) (uint64, error) {
	if op.ByNumber() {
		return b.find(op, r)
	}
	d, ok, err := b.dentry(op.Parent, op.Name)
	if err != nil {
		return 0, err
	}
	if ok {
		n, err := b.inode(d.Ino)
		if errors.Is(err, fsop.ESTALE) {
			return 0, fmt.Errorf("%w: entry %q of directory %d is inode %d, which does not exist", meta.ErrFormat, op.Name, op.Parent, d.Ino)
		}
		if err != nil {
			return 0, err
		}
		// Getting a name changes an inode, so the entry is not younger.
		r.Attr = b.attr(n)
		return n.Change, nil
	}
	dir, err := b.inode(op.Parent)
	switch {
	case err != nil:
		return b.gone(err)
	case !dir.IsDir():
		return dir.Change, fsop.ENOTDIR
	case len(op.Name) > fsop.MaxName:
		return dir.Change, fsop.ENAMETOOLONG
	}
	return dir.Change, fsop.ENOENT
}

// find answers a Lookup by number. What has lost its last name lives for those only who
// hold it already: whoever is to remove it may be asking them.
func (b *Brick) find(op *fsop.Lookup, r *fsop.Reply) (uint64, error) {
	n, err := b.inode(op.Parent)
	if err != nil {
		return b.gone(err)
	}
	dep := n.Change
	if op.Name == fsop.Above {
		if !n.IsDir() {
			return dep, fsop.ENOTDIR
		}
		if op.Parent != fsop.RootIno && n.Nlink > 0 {
			if n, err = b.inode(n.Parent); err != nil {
				return b.gone(err)
			}
			dep = max(dep, n.Change)
		}
	}
	if n.Nlink == 0 {
		return dep, fsop.ESTALE
	}
	r.Attr = b.attr(n)
	return dep, nil
}

func (b *Brick) readlink(op *fsop.Readlink, r *fsop.Reply) (uint64, error) {
	n, err := b.inode(op.Ino)
	if err != nil {
		return b.gone(err)
	}
	if n.Type() != syscall.S_IFLNK {
		return n.Change, fsop.EINVAL
	}
	t, ok, err := b.store.Target(op.Ino)
	if err != nil {
		return 0, err
	}
	if !ok {
		return 0, fmt.Errorf("%w: symbolic link %d has no target", meta.ErrFormat, op.Ino)
	}
	r.Data = t
	return n.Change, nil
}

// The encoded sizes of a directory entry beside its name, without and with
// attributes, for Readdir's Max.
const (
	direntSize     = 8 + 4 + 4 + 8
	direntPlusSize = direntSize + 80
)

func (b *Brick) readdir(op *fsop.Readdir, r *fsop.Reply) (uint64, error) {
	dir, err := b.inode(op.Ino)
	if err != nil {
		return b.gone(err)
	}
	if !dir.IsDir() {
		return dir.Change, fsop.ENOTDIR
	}
	r.Attr = b.attr(dir)
	dep := dir.Change
	size, limit := 0, int(min(op.Max, fsop.MaxData))
	each := direntSize
	if op.Plus {
		each = direntPlusSize
	}
	if op.Cookie >= 1<<63-1 {
		return dep, nil
	}
	err = b.store.Dentries(op.Ino, meta.Cookie(op.Cookie+1), func(d meta.Dentry) (bool, error) {
		size += each + len(d.Name)
		if n := len(r.Entries); n > 0 && (size > limit || n >= fsop.MaxEntries) && r.Entries[n-1].Cookie != uint64(d.Cookie) {
			return false, nil // entries of one cookie are never torn apart
		}
		r.Entries = append(r.Entries, fsop.Dirent{Ino: d.Ino, Name: d.Name, Type: d.Type, Cookie: uint64(d.Cookie)})
		return true, nil
	})
	if err != nil || !op.Plus {
		return dep, err
	}
	if err := b.addAttrs(r.Entries); err != nil {
		return 0, err
	}
	for i := range r.Entries {
		e := &r.Entries[i]
		if e.Attr.Ino == 0 {
			return 0, fmt.Errorf("%w: entry %q of directory %d is inode %d, which does not exist", meta.ErrFormat, e.Name, op.Ino, e.Ino)
		}
		dep = max(dep, e.Attr.Change)
	}
	return dep, nil
}

// addAttrs fills in the attributes of entries, in the order of the inodes: those
// of a directory are often neighbours. b.mu is held.
func (b *Brick) addAttrs(entries []fsop.Dirent) error {
	var missing []fsop.Ino
	for i := range entries {
		if n := b.cache.get(entries[i].Ino); n != nil {
			entries[i].Attr = b.attr(n)
		} else {
			missing = append(missing, entries[i].Ino)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	slices.Sort(missing)
	missing = slices.Compact(missing)
	found := make(map[fsop.Ino]*node, len(missing))
	err := b.store.InodesOf(missing, func(n *meta.Inode) error {
		c := &node{Inode: *n}
		found[n.Ino] = c
		b.cache.put(c)
		return nil
	})
	for i := range entries {
		if n := found[entries[i].Ino]; n != nil {
			entries[i].Attr = b.attr(n)
		}
	}
	return err
}

func (b *Brick) getxattr(op *fsop.Getxattr, r *fsop.Reply) (uint64, error) {
	n, err := b.inode(op.Ino)
	if err != nil {
		return b.gone(err)
	}
	if n.Xattrs == 0 {
		return n.Change, fsop.ENODATA
	}
	v, ok, err := b.store.Xattr(op.Ino, op.Name)
	if err != nil {
		return 0, err
	}
	if !ok {
		return n.Change, fsop.ENODATA
	}
	r.Data = v
	return n.Change, nil
}

func (b *Brick) listxattr(op *fsop.Listxattr, r *fsop.Reply) (uint64, error) {
	n, err := b.inode(op.Ino)
	if err != nil {
		return b.gone(err)
	}
	if n.Xattrs == 0 {
		return n.Change, nil
	}
	r.Data = make([]byte, 0, n.XattrNames)
	err = b.store.Xattrs(op.Ino, func(name string, _ []byte) error {
		r.Data = append(append(r.Data, name...), 0)
		return nil
	})
	return n.Change, err
}

// Values of Seek's Whence (SEEK_DATA, SEEK_HOLE).
const (
	seekData = 3
	seekHole = 4
)

func (b *Brick) seek(op *fsop.Seek, r *fsop.Reply) (uint64, error) {
	n, err := b.inode(op.Ino)
	if err != nil {
		return b.gone(err)
	}
	r.Attr = b.attr(n)
	switch {
	case !n.IsRegular() || op.Whence != seekData && op.Whence != seekHole:
		return n.Change, fsop.EINVAL
	case op.Off >= n.Size:
		return n.Change, fsop.ENXIO
	}
	if n.Flags&meta.Sparse == 0 {
		r.Off = op.Off
		if op.Whence == seekHole {
			r.Off = n.Size
		}
		return n.Change, nil
	}
	at, found := op.Off, false
	err = b.store.Runs(op.Ino, blocksDown(op.Off), func(run meta.Run) (bool, error) {
		start, end := run.Start*blockSize, run.End*blockSize
		if op.Whence == seekData {
			at, found = max(at, start), true
			return false, nil
		}
		if start > at {
			return false, nil // at is in a hole
		}
		at = end
		return true, nil
	})
	if err != nil {
		return 0, err
	}
	if op.Whence == seekHole {
		r.Off = min(at, n.Size)
		return n.Change, nil
	}
	if !found || at >= n.Size {
		return n.Change, fsop.ENXIO
	}
	r.Off = at
	return n.Change, nil
}

// readBuffers is memory for large replies. It is cleared between two uses, as new
// memory is: holes are not read from anywhere.
type readBuffers struct{ pool sync.Pool } // of *[fsop.MaxData]byte

// pooledRead is the length from which a reply's data is taken from the pool.
const pooledRead = 128 << 10

// get returns n zeros, at most fsop.MaxData, and what gives them back.
func (p *readBuffers) get(n int) (b []byte, free func()) {
	if n < pooledRead {
		return make([]byte, n), nil
	}
	full, ok := p.pool.Get().(*[fsop.MaxData]byte)
	if !ok {
		full = new([fsop.MaxData]byte)
	} else {
		clear(full[:n])
	}
	return full[:n:n], func() { p.pool.Put(full) }
}

// piece is a part of what a Read wants, and where it is.
type piece struct {
	p      []byte // where it goes
	seg    *oplog.Segment
	off    int64        // in the segment, or in the data file
	rotten *meta.Rotten // of a block of the data file that is not to be read
}

// maxTries is how often a read of a data file is repeated because the file was
// written meanwhile, before writers are made to wait.
const maxTries = 4

func (b *Brick) readData(ctx context.Context, op *fsop.Read) (*fsop.Reply, uint64, error) {
	if op.Len > fsop.MaxData {
		return nil, 0, fsop.EINVAL
	}
	for try := 1; ; try++ {
		if ctx.Err() != nil {
			return nil, 0, context.Cause(ctx)
		}
		r, dep, again, err := b.tryRead(ctx, op, try >= maxTries)
		if !again {
			return r, dep, err
		}
	}
}

// tryRead reads once. It plans under the lock and reads without it, because the
// disk may be slow; again says that the plan was overtaken. With exclusive it
// keeps the lock, but not while another brick is asked for what has rotted here.
func (b *Brick) tryRead(ctx context.Context, op *fsop.Read, exclusive bool) (r *fsop.Reply, dep uint64, again bool, err error) {
	b.mu.RLock()
	locked := true
	unlock := func() {
		if locked {
			locked = false
			b.mu.RUnlock()
		}
	}
	defer unlock()
	if b.closed.Load() {
		return nil, 0, false, ErrClosed
	}
	r = &fsop.Reply{Seq: b.state.Pos.Seq}
	n, err := b.inode(op.Ino)
	if err != nil {
		dep, err = b.gone(err)
		return nil, dep, false, err
	}
	switch {
	case n.IsDir():
		return nil, n.Change, false, fsop.EISDIR
	case !n.IsRegular():
		return nil, n.Change, false, fsop.EINVAL
	}
	r.Attr.Ino, r.Attr.Window = n.Ino, uint64(b.holder(n))
	if op.Off >= n.Size || op.Len == 0 {
		return r, n.Change, false, nil
	}
	r.Data, r.Free = b.reading.get(int(min(uint64(op.Len), n.Size-op.Off)))
	gen := b.gen.Load()
	name, pieces, err := b.plan(n, r.Data, op.Off)
	defer func() {
		for i := range pieces {
			if pieces[i].seg != nil {
				pieces[i].seg.Close()
			}
		}
	}()
	if err != nil {
		return nil, 0, false, err
	}
	if len(pieces) == 0 {
		return r, n.Change, false, nil
	}
	exclusive = exclusive && !slices.ContainsFunc(pieces, func(p piece) bool { return p.rotten != nil })
	if !exclusive {
		unlock()
	}
	err = b.readPieces(ctx, n.Content, name, pieces)
	if exclusive {
		return r, n.Change, false, err
	}
	if name == (data.Name{}) && err == nil && b.gen.Load() == gen {
		return r, n.Change, false, nil // what is in the log does not change
	}
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.closed.Load() {
		return nil, 0, false, ErrClosed
	}
	now, err2 := b.inode(op.Ino)
	if b.gen.Load() != gen || err2 != nil || now.Content != n.Content {
		return nil, 0, true, nil
	}
	return r, n.Change, false, err
}

// plan finds out where p, the bytes of n from off on, is, and reads at once what
// is in the KV. If a data file is needed its name is returned. b.mu is held.
func (b *Brick) plan(n *node, p []byte, off uint64) (name data.Name, pieces []piece, err error) {
	base, err := b.knownBase(n)
	if err != nil {
		return name, nil, err
	}
	end := off + uint64(len(p))
	if base.Kind == meta.BaseInline {
		// All of it: what extents cover is overwritten below.
		if _, _, err := b.store.ReadInline(n.Ino, p, off); err != nil {
			return name, nil, err
		}
	}
	at := off
	fill := func(to uint64) {
		if to = min(to, end); base.Kind == meta.BaseFile && at < min(to, base.Len) {
			name = data.Name{Ino: n.Ino, Incarnation: base.Incarnation}
			pieces = b.filePieces(pieces, name, p[at-off:min(to, base.Len)-off], at)
		}
	}
	b.extents[n.Ino].each(off, end, func(e *meta.Extent) bool {
		if e.Off > at {
			fill(e.Off)
		}
		from, to := max(e.Off, off), min(e.End(), end)
		at = to
		if e.Zero {
			clear(p[from-off : to-off])
			return true
		}
		var seg *oplog.Segment
		if seg, err = b.log.OpenSegment(e.Segment); err != nil {
			return false
		}
		pieces = append(pieces, piece{p: p[from-off : to-off], seg: seg, off: e.LogOff + int64(from-e.Off)})
		return true
	})
	if err == nil && at < end {
		fill(end)
	}
	return name, pieces, err
}

// filePieces plans to read p from off on of a data file. b.mu is held.
func (b *Brick) filePieces(pieces []piece, name data.Name, p []byte, off uint64) []piece {
	if len(b.rotten) > 0 {
		if blocks := b.rotten[name]; blocks != nil {
			for len(p) > 0 {
				n := min(uint64(len(p)), sumSize-off%sumSize)
				pieces = append(pieces, piece{p: p[:n], off: int64(off), rotten: blocks[off/sumSize]})
				p, off = p[n:], off+n
			}
			return pieces
		}
	}
	return append(pieces, piece{p: p, off: int64(off)})
}

// knownBase is baseOf that remembers. b.mu is held.
func (b *Brick) knownBase(n *node) (meta.Base, error) {
	if n.baseKnown {
		return n.base, nil
	}
	base, err := b.store.Base(n.Ino, false)
	if err != nil {
		return base, err
	}
	c := *n
	c.base, c.baseKnown = base, true
	b.cache.put(&c)
	return base, nil
}

// readPieces carries out a plan for a file with that Content.
func (b *Brick) readPieces(ctx context.Context, content cluster.Pos, name data.Name, pieces []piece) error {
	var f *data.File
	if name != (data.Name{}) {
		var err error
		if f, err = b.data.Open(name); err != nil {
			return b.missingFile(name, err)
		}
		defer f.Release()
	}
	for _, p := range pieces {
		if p.seg != nil {
			if err := p.seg.ReadAt(p.p, p.off); err != nil {
				return logCut(err)
			}
			continue
		}
		if p.rotten != nil {
			if err := b.readElsewhere(ctx, content, name, &p); err != nil {
				return err
			}
			continue
		}
		m, err := f.ReadAt(p.p, p.off)
		if errors.Is(err, io.EOF) && m == len(p.p) {
			err = nil
		}
		if errors.Is(err, io.EOF) {
			return b.shortFile(name, f, uint64(p.off)+uint64(len(p.p)))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// readFull reads p, of which what is behind the file's end is zero.
func readFull(f io.ReaderAt, p []byte, off int64) error {
	m, err := f.ReadAt(p, off)
	if err == io.EOF || errors.Is(err, io.EOF) {
		clear(p[m:])
		return nil
	}
	return err
}
