package brick

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"syscall"

	"mortar/internal/brick/data"
	"mortar/internal/brick/meta"
	"mortar/internal/codec"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// Checked says what a Check has looked at.
type Checked struct {
	Entries  uint64 // of the log
	Inodes   uint64
	Names    uint64
	Bytes    uint64 // of contents that were read
	Problems uint64
	// Stray is how many data files nothing refers to. A brick that was not closed
	// cleanly may have some; they are removed when it is served again.
	Stray uint64
}

// Check looks for everything that contradicts itself in a brick: records of the
// log against their checksums, the KV's records against their format and
// against each other, data files against the KV. With contents, all contents
// are read too. problem is told of what is wrong; an error means that the check
// ended early.
//
// That a brick's replica has the same contents is not to be found out here; the
// digests of volume heal V full --verify do that.
func (off *Offline) Check(ctx context.Context, contents bool, problem func(Problem)) (Checked, error) {
	c := &checker{off: off, v: off.b.store.View, problem: problem, nodes: map[fsop.Ino]*checkNode{}, files: map[data.Name]bool{}, subvols: map[fsop.Ino]meta.Subvolume{}}
	steps := []func(context.Context) error{c.log, c.inodes, c.records, c.names, c.sums, c.accounts, c.dataFiles}
	if contents {
		steps = append(steps, c.contents, c.blocks)
	}
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return c.Checked, err
		}
	}
	return c.Checked, nil
}

// checkNode is what an inode says, and what was found of it.
type checkNode struct {
	mode, nlink, xattrs  uint32
	parent               fsop.Ino
	subvol               fsop.Ino
	size, blocks         uint64
	xattrBytes           uint64 // found
	links, subdirs, attr uint32 // found
	entries, runs        uint64 // found
	orphan, target       bool   // found
	sparse, linkable     bool
}

func (n *checkNode) typ() uint32 { return n.mode & syscall.S_IFMT }
func (n *checkNode) isDir() bool { return n.typ() == syscall.S_IFDIR }

type checker struct {
	Checked
	off     *Offline
	v       meta.View
	problem func(Problem)
	nodes   map[fsop.Ino]*checkNode
	files   map[data.Name]bool // that should exist
	order   []fsop.Ino
	subvols map[fsop.Ino]meta.Subvolume
	used    uint64 // blocks of all inodes, of 512 bytes
}

func (c *checker) bad(at string, format string, args ...any) {
	c.Problems++
	c.problem(Problem{at, fmt.Errorf(format, args...)})
}

func inodeName(ino fsop.Ino) string { return fmt.Sprintf("inode %d", ino) }

// log reads all entries.
func (c *checker) log(ctx context.Context) error {
	l := c.off.b.log
	after := l.Base().Seq
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		raws, poss, _, err := l.Read(after, replayBytes)
		if err != nil {
			c.bad("log", "%w", err)
			return nil
		}
		if len(raws) == 0 {
			return nil
		}
		for i, raw := range raws {
			after = poss[i].Seq
			c.Entries++
			var e proto.Entry
			if err := codec.Decode(raw, &e); err != nil {
				c.bad("log", "entry %v: %w", poss[i], err)
			} else if e.Pos != poss[i] {
				c.bad("log", "entry %v calls itself %v", poss[i], e.Pos)
			}
		}
	}
}

// inodes reads all inodes.
func (c *checker) inodes(ctx context.Context) error {
	return c.v.Records(meta.Replicated.Lo, meta.Replicated.Hi, func(k, val []byte) (bool, error) {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		n, ok, err := meta.RecordInode(k, val)
		if err != nil {
			c.bad(fmt.Sprintf("record %x", k), "%w", err)
			return true, nil
		}
		if !ok {
			return true, nil
		}
		c.Inodes++
		c.used += n.Blocks
		c.nodes[n.Ino] = &checkNode{
			mode: n.Mode, nlink: n.Nlink, xattrs: n.Xattrs, parent: n.Parent,
			size: n.Size, blocks: n.Blocks, subvol: n.Subvolume, sparse: n.Flags&meta.Sparse != 0, linkable: n.Flags&meta.Linkable != 0,
		}
		c.order = append(c.order, n.Ino)
		return true, nil
	})
}

// records reads all records but inodes, and counts what belongs to inodes.
func (c *checker) records(ctx context.Context) error {
	return c.v.Records(meta.Replicated.Lo, meta.Replicated.Hi, func(k, val []byte) (bool, error) {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		if _, ok, _ := meta.RecordInode(k, val); ok {
			return true, nil
		}
		if err := meta.CheckRecord(k, val); err != nil {
			c.bad(fmt.Sprintf("record %x", k), "%w", err)
			return true, nil
		}
		r := meta.Parse(k, val)
		n := c.nodes[r.Ino]
		if n == nil && r.Table != meta.TableReply && r.Table != meta.TableSession && r.Table != meta.TableSubvol {
			c.bad(inodeName(r.Ino), "does not exist, but a record of table %c is about it", r.Table)
			return true, nil
		}
		switch r.Table {
		case meta.TableDentry:
			c.name(r.Ino, n, &r.Dentry)
		case meta.TableXattr:
			n.attr++
			n.xattrBytes += r.Xattr
		case meta.TableSubvol:
			c.subvols[r.Ino] = r.Subvol
		case meta.TableTarget:
			n.target = true
			if n.typ() != syscall.S_IFLNK {
				c.bad(inodeName(r.Ino), "has a target and is no symbolic link")
			}
		case meta.TableOrphan:
			n.orphan = true
		case meta.TableRun:
			n.runs += r.Run.End - r.Run.Start
		}
		return true, nil
	})
}

// name checks an entry of directory dir, which is d.
func (c *checker) name(dir fsop.Ino, d *checkNode, e *meta.Dentry) {
	c.Names++
	at := fmt.Sprintf("name %q in directory %d", e.Name, dir)
	if !d.isDir() {
		c.bad(at, "inode %d is no directory", dir)
		return
	}
	d.entries++
	if want := c.off.b.cookie(e.Name); e.Cookie != want {
		c.bad(at, "is filed under %x and not under %x", e.Cookie, want)
	}
	n := c.nodes[e.Ino]
	switch {
	case n == nil:
		c.bad(at, "is inode %d, which does not exist", e.Ino)
		return
	case n.typ() != e.Type:
		c.bad(at, "is of type %o, inode %d of %o", e.Type, e.Ino, n.typ())
	}
	if top := n.subvol == e.Ino && d.subvol == 0; n.subvol != d.subvol && !top {
		c.bad(at, "is inode %d of subvolume %d, its directory is of %d", e.Ino, n.subvol, d.subvol)
	}
	n.links++
	if n.isDir() {
		d.subdirs++
		if n.parent != dir {
			c.bad(at, "is directory %d, which says that it lies in %d", e.Ino, n.parent)
		}
	}
}

// names compares what inodes say with what was found.
func (c *checker) names(ctx context.Context) error {
	for _, ino := range c.order {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, at := c.nodes[ino], inodeName(ino)
		switch {
		case n.isDir():
			want, links := n.subdirs+2, uint32(1)
			if n.orphan {
				want, links = 0, 0
			}
			if s, ok := c.subvols[ino]; ino == fsop.RootIno || ok && s.Removed {
				if links = 0; n.parent != 0 {
					c.bad(at, "has no name and says that it lies in %d", n.parent)
				}
			}
			if n.nlink != want {
				c.bad(at, "is a directory with link count %d, found %d", n.nlink, want)
			}
			if n.links != links {
				c.bad(at, "is a directory with %d names", n.links)
			}
			if n.size != n.entries {
				c.bad(at, "is a directory of %d entries, found %d", n.size, n.entries)
			}
			if links == 1 && !c.reaches(ino) {
				c.bad(at, "is a directory that does not lie below the root")
			}
		case n.nlink != n.links:
			c.bad(at, "has link count %d, found %d", n.nlink, n.links)
		}
		if n.linkable && (n.nlink != 0 || n.typ() != syscall.S_IFREG) {
			c.bad(at, "is marked as a file that never had a name, with link count %d and mode %o", n.nlink, n.mode)
		}
		if n.orphan != (n.nlink == 0) {
			c.bad(at, "has link count %d; on the list of those without a name: %v", n.nlink, n.orphan)
		}
		if n.attr != n.xattrs {
			c.bad(at, "has %d extended attributes, found %d", n.xattrs, n.attr)
		}
		if n.typ() == syscall.S_IFLNK && !n.target {
			c.bad(at, "is a symbolic link without a target")
		}
		if n.typ() == syscall.S_IFREG {
			runs := n.runs
			if !n.sparse {
				if runs > 0 {
					c.bad(at, "has runs of blocks and is not sparse")
				}
				runs = blocksUp(n.size)
			}
			if n.blocks != runs*sectors {
				c.bad(at, "has %d blocks, found %d", n.blocks, runs*sectors)
			}
		}
	}
	return nil
}

// reaches reports whether the way up from directory ino ends at the root.
func (c *checker) reaches(ino fsop.Ino) bool {
	for range maxDepth {
		if s, ok := c.subvols[ino]; ino == fsop.RootIno || ok && s.Removed {
			return true
		}
		n := c.nodes[ino]
		if n == nil {
			return false
		}
		ino = n.parent
	}
	return false
}

// sums compares the counters.
func (c *checker) sums(context.Context) error {
	st, ok, err := c.v.State()
	if err != nil {
		return err
	}
	if !ok {
		c.bad("metadata", "no position")
		return nil
	}
	if st.Inodes != c.Inodes || st.Blocks != c.used {
		c.bad("metadata", "counts %d inodes and %d blocks, found %d and %d", st.Inodes, st.Blocks, c.Inodes, c.used)
	}
	return nil
}

// accounts compares what subvolumes say they use with what is in them.
func (c *checker) accounts(context.Context) error {
	found := map[fsop.Ino]*meta.Subvolume{}
	for _, ino := range c.order {
		n := c.nodes[ino]
		if n.subvol == 0 {
			continue
		}
		f := found[n.subvol]
		if f == nil {
			if _, ok := c.subvols[n.subvol]; !ok {
				c.bad(inodeName(ino), "is of subvolume %d, which does not exist", n.subvol)
			}
			f = new(meta.Subvolume)
			found[n.subvol] = f
		}
		f.UsedInodes++
		f.UsedSize += n.blocks*sectorSize + n.xattrBytes
	}
	for _, ino := range slices.Sorted(maps.Keys(c.subvols)) {
		s, f, at := c.subvols[ino], found[ino], fmt.Sprintf("subvolume %d", ino)
		switch {
		case f == nil:
			c.bad(at, "has no inodes")
		case f.UsedSize != s.UsedSize || f.UsedInodes != s.UsedInodes:
			c.bad(at, "counts %d bytes and %d inodes, found %d and %d", s.UsedSize, s.UsedInodes, f.UsedSize, f.UsedInodes)
		}
		if n := c.nodes[ino]; n != nil && (!n.isDir() || n.subvol != ino) {
			c.bad(at, "is not its own top directory")
		}
	}
	return nil
}

// dataFiles looks for the contents that inodes should have.
func (c *checker) dataFiles(ctx context.Context) error {
	err := c.v.Bases(0, func(ino fsop.Ino, b *meta.Base) (bool, error) {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		n, at := c.nodes[ino], inodeName(ino)
		if n == nil || n.typ() != syscall.S_IFREG {
			c.bad(at, "has contents and is no file")
			return true, nil
		}
		if b.Kind != meta.BaseFile {
			return true, nil
		}
		name := data.Name{Ino: ino, Incarnation: b.Incarnation}
		c.files[name] = true
		st, err := c.off.over.Stat(c.off.b.data.Path(name))
		switch {
		case errors.Is(err, os.ErrNotExist):
			c.bad(at, "its data file %s is missing", c.off.b.data.Path(name))
		case err != nil:
			return false, err
		case uint64(st.Size()) < b.Len:
			var exts []meta.Extent
			if err := c.v.ExtentsOf(ino, func(e meta.Extent) error { exts = append(exts, e); return nil }); err != nil {
				return false, err
			}
			if want := required(b, slices.Values(exts)); uint64(st.Size()) < want {
				c.bad(at, "its data file %s has %d of %d bytes", c.off.b.data.Path(name), st.Size(), want)
			}
		}
		return true, nil
	})
	if err != nil {
		return err
	}
	if err := c.v.Garbage(func(ino fsop.Ino, incarnation uint64) (bool, error) {
		c.files[data.Name{Ino: ino, Incarnation: incarnation}] = true
		return true, nil
	}); err != nil {
		return err
	}
	err = c.v.Extents(func(ino fsop.Ino, e meta.Extent) error {
		if n := c.nodes[ino]; n == nil || n.typ() != syscall.S_IFREG {
			c.bad(inodeName(ino), "has contents and is no file")
			return nil
		}
		if e.Zero {
			return nil
		}
		s, err := c.off.b.log.OpenSegment(e.Segment)
		if err == nil {
			var last [1]byte
			err = s.ReadAt(last[:], e.LogOff+int64(e.Len)-1)
			s.Close()
		}
		if err != nil {
			c.bad(inodeName(ino), "its bytes %d to %d are not in the log: %w", e.Off, e.End(), err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return c.off.b.data.List(func(n data.Name) error {
		if !c.files[n] {
			c.Stray++
		}
		return ctx.Err()
	})
}

// blocks compares the blocks of data files with their checksums.
func (c *checker) blocks(ctx context.Context) error {
	buf := make([]byte, sumSize)
	for _, ino := range c.order {
		for chunk := uint64(0); ; chunk++ {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			v, ok, err := c.off.b.viewChunk(ino, chunk)
			if err != nil {
				c.bad(inodeName(ino), "%w", err)
			}
			if !ok {
				break
			}
			for i := range v.blocks() {
				good := v.rotten>>i&1 == 0
				if v.sums.Has>>i&1 != 0 {
					if good, err = c.off.b.fits(&v, i, buf); err != nil {
						break // it is missing, which was said
					}
				}
				if !good {
					c.bad(inodeName(ino), "bytes %d to %d have rotted in its data file %s", v.block(i)*sumSize, (v.block(i)+1)*sumSize, c.off.b.data.Path(v.name))
				}
			}
		}
	}
	return nil
}

// contents reads all files.
func (c *checker) contents(ctx context.Context) error {
	for _, ino := range c.order {
		n := c.nodes[ino]
		if n.typ() != syscall.S_IFREG {
			continue
		}
		err := c.off.dataRanges(&fsop.Attr{Ino: ino, Size: n.size}, func(from, to uint64) error {
			for from < to {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				r, err := c.off.read(&fsop.Read{Ino: ino, Off: from, Len: uint32(min(to-from, fsop.MaxData))})
				if err != nil {
					return fmt.Errorf("bytes from %d on: %w", from, err)
				}
				c.Bytes += uint64(len(r.Data))
				from += uint64(max(len(r.Data), 1))
			}
			return nil
		})
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			c.bad(inodeName(ino), "%w", err)
		}
	}
	return nil
}
