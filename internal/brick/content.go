package brick

import (
	"mortar/internal/brick/meta"
	"mortar/internal/disk"
	"mortar/internal/fsop"
)

const (
	blockSize = disk.BlockSize
	// cloneMin is the smallest payload that settling shares instead of copying.
	// The log pads a record so that the payload lies on whole blocks.
	cloneMin = 64 << 10
	sectors  = blockSize / sectorSize // of Attr.Blocks in a block
	// sectorSize is the unit of Attr.Blocks.
	sectorSize = 512
)

func blocksDown(n uint64) uint64 { return n / blockSize }
func blocksUp(n uint64) uint64   { return (n + blockSize - 1) / blockSize }

// baseOf returns where the settled contents of n are, less the contents.
// b.wmu or b.mu is held.
func (b *Brick) baseOf(n *node) (meta.Base, error) {
	if n.baseKnown {
		return n.base, nil
	}
	return b.store.Base(n.Ino, false)
}

func (x *exec) base(n *work) (meta.Base, error) {
	if !n.baseKnown {
		base, err := x.b.baseOf(&n.node)
		if err != nil {
			return base, err
		}
		n.base, n.baseKnown = base, true
	}
	return n.base, nil
}

// dropBase plans to forget the settled contents of a file.
func (x *exec) dropBase(ino fsop.Ino, base meta.Base) {
	if base.Kind == meta.BaseNone {
		return
	}
	x.batch.SetBase(ino, &meta.Base{})
	if base.Kind == meta.BaseFile {
		x.batch.SetGarbage(ino, base.Incarnation)
		x.garbage = append(x.garbage, incarnation{ino, base.Incarnation})
	}
}

// contentChanged marks the contents of n as changed by this entry.
func (x *exec) contentChanged(n *work) {
	n.Content = x.e.Pos
	n.Mtime, n.Ctime = x.time, x.time
	x.touch(n)
}

// cutRange plans to have no extents of n from a to below b.
func (x *exec) cutRange(n *work, a, b uint64) {
	x.cutIno = n.Ino
	x.b.extents[n.Ino].carve(&x.cut, span{a, b})
}

// zeroRange plans that n reads as zeros from a to below b, whatever its settled
// contents are.
func (x *exec) zeroRange(n *work, a, b uint64) error {
	x.cutRange(n, a, b)
	base, err := x.base(n)
	if err != nil {
		return err
	}
	// What is being settled at this moment may reach further than what is.
	if b = min(b, max(base.Len, x.b.settlingLen(n.Ino))); a < b {
		x.gaps = append(x.gaps, meta.Extent{Off: a, Len: b - a, Seq: x.e.Pos.Seq, Zero: true})
	}
	return nil
}

func (x *exec) write(op *fsop.Write) error {
	n, err := x.node(op.Ino)
	switch {
	case err != nil:
		return err
	case n.IsDir():
		return fsop.EISDIR
	case !n.IsRegular():
		return fsop.EINVAL
	}
	off, size := op.Off, uint64(len(op.Data))
	if op.Append {
		off = n.Size
	}
	if op.Then.Valid&(fsop.SetSize|fsop.SetFlags) != 0 || op.Then.Valid != 0 && size == 0 {
		return fsop.EINVAL
	}
	switch {
	case n.Attr.Flags&fsop.FlagImmutable != 0, n.Attr.Flags&fsop.FlagAppend != 0 && off < n.Size:
		return fsop.EPERM
	}
	if size > 0 && (off >= fsop.MaxSize || size > fsop.MaxSize-off) {
		return fsop.EFBIG
	}
	if op.Window&fsop.WindowHeld != 0 {
		x.tell(op.Told, n.Ctime)
	}
	if err := x.window(n, op.Window); err != nil {
		return err
	}
	if err := x.fenced(n.Ino); err != nil {
		return err
	}
	x.reply.Off = off
	if size == 0 {
		x.reply.Attr = n.Attr
		return nil
	}
	if op.KillPriv {
		x.killPriv(n)
	}
	x.dropCaps(n)
	x.cutRange(n, off, off+size)
	x.extent = &meta.Extent{Off: off, Len: size, Seq: x.e.Pos.Seq}
	x.data = op.Data
	if err := x.allocate(n, off, off+size); err != nil {
		return err
	}
	x.contentChanged(n)
	if op.Then.Valid != 0 {
		if err := x.setOwner(n, &op.Then); err != nil {
			return err
		}
		x.setTimes(n, &op.Then)
	}
	x.reply.Attr = n.Attr
	return nil
}

// truncate plans to give n another size.
func (x *exec) truncate(n *work, size uint64) error {
	switch {
	case size == 0 && n.Size == 0 && n.Blocks == 0:
		return nil
	case size == 0:
		// The whole contents go: nothing of them need be kept apart.
		base, err := x.base(n)
		if err != nil {
			return err
		}
		x.cutRange(n, 0, fsop.MaxSize)
		x.dropBase(n.Ino, base)
		n.base = meta.Base{}
		ino := n.Ino
		x.onCommit(func(b *Brick) { b.cancelSettling(ino) })
	case size < n.Size || n.Flags&meta.Sparse != 0: // a sparse file may have blocks behind its end
		if err := x.zeroRange(n, size, fsop.MaxSize); err != nil {
			return err
		}
	}
	if err := x.resize(n, size); err != nil {
		return err
	}
	x.contentChanged(n)
	return nil
}

func (x *exec) fallocate(op *fsop.Fallocate) error {
	n, err := x.node(op.Ino)
	switch {
	case err != nil:
		return err
	case op.Len == 0:
		return fsop.EINVAL
	case n.IsDir():
		return fsop.EISDIR
	case !n.IsRegular():
		return fsop.Errno(19) // ENODEV, as fallocate(2) has it
	case op.Off >= fsop.MaxSize || op.Len > fsop.MaxSize-op.Off:
		return fsop.EFBIG
	case n.Attr.Flags&fsop.FlagImmutable != 0, n.Attr.Flags&fsop.FlagAppend != 0 && op.Mode&^fsop.FallocKeepSize != 0:
		return fsop.EPERM
	}
	if err := x.fenced(n.Ino); err != nil {
		return err
	}
	end := op.Off + op.Len
	switch op.Mode {
	case fsop.FallocPunchHole | fsop.FallocKeepSize:
		if err := x.zeroRange(n, op.Off, end); err != nil {
			return err
		}
		if err := x.punch(n, op.Off, end); err != nil {
			return err
		}
	case fsop.FallocZeroRange, fsop.FallocZeroRange | fsop.FallocKeepSize:
		if err := x.zeroRange(n, op.Off, end); err != nil {
			return err
		}
		if err := x.reserve(n, op.Off, end, op.Mode&fsop.FallocKeepSize != 0, false); err != nil {
			return err
		}
	case 0, fsop.FallocKeepSize:
		if err := x.reserve(n, op.Off, end, op.Mode != 0, true); err != nil {
			return err
		}
	default:
		return fsop.EOPNOTSUPP
	}
	x.contentChanged(n)
	x.reply.Attr = n.Attr
	return nil
}
