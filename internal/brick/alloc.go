package brick

import (
	"mortar/internal/brick/meta"
	"mortar/internal/fsop"
)

// Which blocks of a file are allocated is part of its replicated attributes
// (Attr.Blocks, and holes as Seek finds them), so it cannot be asked of the
// file system below: it follows from the operations alone. A file is dense, with
// the blocks from 0 to its size, or Sparse and its blocks are in M records.

// runs returns the allocated blocks of n.
func (x *exec) runs(n *work) (rs []meta.Run, err error) {
	if n.Flags&meta.Sparse == 0 {
		return denseRuns(n.Size), nil
	}
	err = x.b.store.Runs(n.Ino, 0, func(r meta.Run) (bool, error) {
		rs = append(rs, r)
		return true, nil
	})
	return rs, err
}

func denseRuns(size uint64) []meta.Run {
	if size == 0 {
		return nil
	}
	return []meta.Run{{End: blocksUp(size)}}
}

// setRuns replaces the allocated blocks old of n, which may have another size
// now, by rs.
func (x *exec) setRuns(n *work, old, rs []meta.Run) {
	if n.Flags&meta.Sparse != 0 {
		for _, r := range old {
			x.batch.DeleteRun(n.Ino, r.Start)
		}
	}
	var blocks uint64
	for _, r := range rs {
		blocks += r.End - r.Start
	}
	dense := denseRuns(n.Size)
	if len(rs) == len(dense) && (len(rs) == 0 || rs[0] == dense[0]) {
		n.Flags &^= meta.Sparse
	} else {
		n.Flags |= meta.Sparse
		for _, r := range rs {
			x.batch.SetRun(n.Ino, r)
		}
	}
	x.setBlocks(n, blocks*sectors)
}

func (x *exec) setBlocks(n *work, blocks uint64) {
	x.charge(&n.node, (int64(blocks)-int64(n.Blocks))*sectorSize, 0)
	x.state.Blocks += blocks - n.Blocks
	n.Blocks = blocks
}

// allocate gives n the blocks of the bytes from a to below b, and a size of at
// least b.
func (x *exec) allocate(n *work, a, b uint64) error {
	if n.Flags&meta.Sparse == 0 && blocksDown(a) <= blocksUp(n.Size) {
		n.Size = max(n.Size, b)
		x.setBlocks(n, blocksUp(n.Size)*sectors)
		return nil
	}
	add := meta.Run{Start: blocksDown(a), End: blocksUp(b)}
	if n.Flags&meta.Sparse != 0 {
		// The usual case of a sparse file that is being filled: only the runs
		// around the new blocks change.
		n.Size = max(n.Size, b)
		return x.addRun(n, add)
	}
	old := denseRuns(n.Size)
	n.Size = max(n.Size, b)
	x.setRuns(n, old, addRun(old, add))
	return nil
}

// addRun adds a run to those of a sparse file, touching only its neighbours.
func (x *exec) addRun(n *work, add meta.Run) error {
	blocks := n.Blocks / sectors
	from := add.Start
	if from > 0 {
		from-- // one that ends where add starts is joined
	}
	var near []meta.Run
	err := x.b.store.Runs(n.Ino, from, func(r meta.Run) (bool, error) {
		if r.Start > add.End {
			return false, nil
		}
		near = append(near, r)
		return true, nil
	})
	if err != nil {
		return err
	}
	if len(near) == 1 && near[0].Start <= add.Start && near[0].End >= add.End {
		return x.maybeDense(n, near[0])
	}
	for _, r := range near {
		x.batch.DeleteRun(n.Ino, r.Start)
		blocks -= r.End - r.Start
		add.Start, add.End = min(add.Start, r.Start), max(add.End, r.End)
	}
	blocks += add.End - add.Start
	x.batch.SetRun(n.Ino, add)
	x.setBlocks(n, blocks*sectors)
	return x.maybeDense(n, add)
}

// maybeDense makes n dense if r is its only run and reaches from its start to its end.
func (x *exec) maybeDense(n *work, r meta.Run) error {
	if r.Start == 0 && r.End == blocksUp(n.Size) && n.Blocks/sectors == r.End {
		x.batch.DeleteRun(n.Ino, 0)
		n.Flags &^= meta.Sparse
	}
	return nil
}

// addRun returns rs, in order and apart, with add among them.
func addRun(rs []meta.Run, add meta.Run) (out []meta.Run) {
	i := 0
	for ; i < len(rs) && rs[i].End < add.Start; i++ {
		out = append(out, rs[i])
	}
	for ; i < len(rs) && rs[i].Start <= add.End; i++ {
		add.Start, add.End = min(add.Start, rs[i].Start), max(add.End, rs[i].End)
	}
	out = append(out, add)
	return append(out, rs[i:]...)
}

// cutRuns returns rs without the blocks from a to below b.
func cutRuns(rs []meta.Run, a, b uint64) (out []meta.Run) {
	for _, r := range rs {
		if left := (meta.Run{Start: r.Start, End: min(r.End, a)}); left.Start < left.End {
			out = append(out, left)
		}
		if right := (meta.Run{Start: max(r.Start, b), End: r.End}); right.Start < right.End {
			out = append(out, right)
		}
	}
	return out
}

const noBlock = 1 << 52 // behind the last block of the largest file

// resize gives n another size: blocks behind it are freed, a file that grows
// gets a hole.
func (x *exec) resize(n *work, size uint64) error {
	if n.Flags&meta.Sparse == 0 && (size <= n.Size || blocksUp(size) == blocksUp(n.Size)) {
		n.Size = size
		x.setBlocks(n, blocksUp(size)*sectors)
		return nil
	}
	old, err := x.runs(n)
	if err != nil {
		return err
	}
	rs := cutRuns(old, blocksUp(size), noBlock)
	n.Size = size
	x.setRuns(n, old, rs)
	return nil
}

// punch frees the whole blocks between the bytes a and b. The block with the
// file's end is whole if b is not before it.
func (x *exec) punch(n *work, a, b uint64) error {
	first, last := blocksUp(a), blocksDown(b)
	if b >= n.Size {
		last = max(last, blocksUp(b))
	}
	switch {
	case first >= last:
	case n.Flags&meta.Sparse != 0:
		return x.cutRun(n, first, last)
	default:
		old := denseRuns(n.Size)
		x.setRuns(n, old, cutRuns(old, first, last))
	}
	return nil
}

// cutRun takes the blocks from first to below last away from a sparse file, touching
// only the runs that have some of them.
func (x *exec) cutRun(n *work, first, last uint64) error {
	blocks := n.Blocks / sectors
	var near []meta.Run
	err := x.b.store.Runs(n.Ino, first, func(r meta.Run) (bool, error) {
		if r.Start >= last {
			return false, nil
		}
		near = append(near, r)
		return true, nil
	})
	if err != nil {
		return err
	}
	for _, r := range near {
		x.batch.DeleteRun(n.Ino, r.Start)
		blocks -= r.End - r.Start
	}
	for _, r := range cutRuns(near, first, last) {
		x.batch.SetRun(n.Ino, r)
		blocks += r.End - r.Start
	}
	x.setBlocks(n, blocks*sectors)
	if blocks != blocksUp(n.Size) {
		return nil
	}
	if blocks == 0 {
		n.Flags &^= meta.Sparse
		return nil
	}
	// What reached over the end may be what went.
	return x.b.store.Runs(n.Ino, 0, func(r meta.Run) (bool, error) {
		if left := cutRuns([]meta.Run{r}, first, last); len(left) > 0 {
			return false, x.maybeDense(n, left[0])
		}
		return false, nil
	})
}

// reserve gives n the blocks of the bytes from a to below b, with zeros in those
// that it did not have, and a size of at least b unless keepSize. With gaps,
// disk space is taken for them when the entry is settled.
func (x *exec) reserve(n *work, a, b uint64, keepSize, gaps bool) error {
	old, err := x.runs(n)
	if err != nil {
		return err
	}
	add := meta.Run{Start: blocksDown(a), End: blocksUp(b)}
	if gaps {
		var spans []span
		for _, g := range cutAll([]meta.Run{add}, old) {
			s := span{g.Start * blockSize, min(g.End*blockSize, fsop.MaxSize)}
			spans = append(spans, s)
			x.gaps = append(x.gaps, meta.Extent{Off: s.a, Len: s.b - s.a, Seq: x.e.Pos.Seq, Zero: true, Alloc: true})
		}
		// What is not allocated reads as zeros and has no extents but of zeros.
		x.cutIno = n.Ino
		x.b.extents[n.Ino].carve(&x.cut, spans...)
	}
	if !keepSize {
		n.Size = max(n.Size, b)
	}
	x.setRuns(n, old, addRun(old, add))
	return nil
}

// cutAll returns rs without the blocks of all of cut.
func cutAll(rs, cut []meta.Run) []meta.Run {
	for _, c := range cut {
		rs = cutRuns(rs, c.Start, c.End)
	}
	return rs
}
