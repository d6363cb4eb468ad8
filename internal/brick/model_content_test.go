package brick

import (
	"maps"
	"syscall"

	"mortar/internal/fsop"
)

func (n *mInode) resize(size uint64) {
	if size <= uint64(len(n.data)) {
		n.data = n.data[:size:size]
	} else {
		n.data = append(n.data, make([]byte, size-uint64(len(n.data)))...)
	}
}

// own allocates the blocks of a range.
func (n *mInode) own(a, b uint64) {
	if n.blocks == nil {
		n.blocks = map[uint64]bool{}
	}
	for i := a / 4096; i*4096 < b; i++ {
		n.blocks[i] = true
	}
}

func (x *mExec) write(op *fsop.Write) error {
	n, err := x.get(op.Ino)
	if err != nil {
		return err
	}
	if n.attr.IsDir() {
		return fsop.EISDIR
	}
	if !n.attr.IsRegular() {
		return fsop.EINVAL
	}
	off := op.Off
	if op.Append {
		off = uint64(len(n.data))
	}
	end := off + uint64(len(op.Data))
	if len(op.Data) > 0 && (end > fsop.MaxSize || off > fsop.MaxSize) {
		return fsop.EFBIG
	}
	if x.fenced(n) {
		return fsop.EIO
	}
	x.r.reply.Off = off
	if len(op.Data) > 0 {
		if op.KillPriv {
			x.kill(n)
		}
		x.dropCaps(n)
		n.resize(max(end, uint64(len(n.data))))
		copy(n.data[off:], op.Data)
		n.own(off, end)
		x.touch(n, true)
	}
	x.r.reply.Attr = n.attrs()
	return nil
}

func (x *mExec) fallocate(op *fsop.Fallocate) error {
	n, err := x.get(op.Ino)
	if err != nil {
		return err
	}
	switch {
	case op.Len == 0:
		return fsop.EINVAL
	case n.attr.IsDir():
		return fsop.EISDIR
	case !n.attr.IsRegular():
		return fsop.Errno(syscall.ENODEV)
	}
	if x.fenced(n) {
		return fsop.EIO
	}
	end := op.Off + op.Len
	keep := op.Mode&fsop.FallocKeepSize != 0
	zero := func() {
		for i := op.Off; i < min(end, uint64(len(n.data))); i++ {
			n.data[i] = 0
		}
	}
	switch op.Mode {
	case fsop.FallocPunchHole | fsop.FallocKeepSize:
		zero()
		size := uint64(len(n.data))
		for i := range maps.Keys(n.blocks) {
			last := (i + 1) * 4096
			if i*4096 >= op.Off && (last <= end || end >= size && i*4096 < end) {
				delete(n.blocks, i)
			}
		}
	case fsop.FallocZeroRange, fsop.FallocZeroRange | fsop.FallocKeepSize:
		zero()
		n.own(op.Off, end)
	case 0, fsop.FallocKeepSize:
		n.own(op.Off, end)
	default:
		return fsop.EOPNOTSUPP
	}
	if !keep {
		n.resize(max(end, uint64(len(n.data))))
	}
	x.touch(n, true)
	x.r.reply.Attr = n.attrs()
	return nil
}
