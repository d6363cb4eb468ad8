package brick

import (
	"syscall"

	"mortar/internal/fsop"
)

func (x *mExec) make(p *fsop.Node, mode, rdev uint32, target string) error {
	d, err := x.dir(p.Parent)
	if err != nil {
		return err
	}
	if err := fsop.CheckName(p.Name); err != nil {
		return err
	}
	if _, ok := d.entries[p.Name]; ok {
		return fsop.EEXIST
	}
	n := x.child(d, p, mode)
	n.target, n.attr.Rdev = target, rdev
	if n.attr.IsDir() {
		n.attr.Nlink = 2
		n.attr.Mode |= d.attr.Mode & syscall.S_ISGID
		n.entries = map[string]fsop.Ino{}
		n.parent = p.Parent
		d.attr.Nlink++
	}
	d.entries[p.Name] = n.attr.Ino
	x.touch(d, true)
	x.r.reply.Attr = n.attrs()
	return nil
}

// child makes an inode with what it has of its directory but a name.
func (x *mExec) child(d *mInode, p *fsop.Node, mode uint32) *mInode {
	n := &mInode{subvol: d.subvol, attr: fsop.Attr{
		Ino: fsop.MakeIno(x.set, x.next), Mode: mode, Nlink: 1, UID: p.UID, GID: p.GID,
	}}
	n.attr.Atime = x.now(n)
	x.next++
	if d.attr.Mode&syscall.S_ISGID != 0 {
		n.attr.GID = d.attr.GID
	}
	x.inodes[n.attr.Ino] = n
	x.touch(n, true)
	return n
}

func (x *mExec) tmpfile(op *fsop.Tmpfile) error {
	d, err := x.dir(op.Parent)
	if err != nil {
		return err
	}
	n := x.child(d, &op.Node, syscall.S_IFREG|op.Mode)
	n.attr.Nlink, n.linkable = 0, !op.Excl
	if x.e.Session != 0 {
		n.attr.Window = uint64(x.e.Session)
		x.r.reply.Window = !x.scarce(n)
	}
	x.r.reply.Attr = n.attrs()
	return nil
}

func (x *mExec) link(op *fsop.Link) error {
	d, err := x.dir(op.Parent)
	if err != nil {
		return err
	}
	if err := fsop.CheckName(op.Name); err != nil {
		return err
	}
	if _, ok := d.entries[op.Name]; ok {
		return fsop.EEXIST
	}
	n, err := x.get(op.Ino)
	if err != nil {
		return err
	}
	if n.attr.IsDir() {
		return fsop.EPERM
	}
	if n.attr.Nlink == 0 && !n.linkable {
		return fsop.ENOENT
	}
	if n.subvol != d.subvol {
		return fsop.EXDEV
	}
	n.attr.Nlink++
	n.linkable = false
	d.entries[op.Name] = op.Ino
	x.touch(d, true)
	x.touch(n, false)
	x.r.reply.Attr = n.attrs()
	return nil
}

func (x *mExec) remove(parent fsop.Ino, name string, dir bool) error {
	d, err := x.dir(parent)
	if err != nil {
		return err
	}
	if err := fsop.CheckName(name); err != nil {
		return err
	}
	ino, ok := d.entries[name]
	if !ok {
		return fsop.ENOENT
	}
	n := x.inodes[ino]
	switch {
	case !dir && n.attr.IsDir():
		return fsop.EISDIR
	case dir && !n.attr.IsDir():
		return fsop.ENOTDIR
	case dir && len(n.entries) > 0:
		return fsop.ENOTEMPTY
	case n.subvol == ino && x.inUse(ino):
		return fsop.EBUSY
	}
	delete(d.entries, name)
	x.unname(d, n)
	x.touch(d, true)
	x.r.reply.Attr = n.attrs()
	return nil
}

// unname takes one name, in d, from n.
func (x *mExec) unname(d, n *mInode) {
	if n.attr.IsDir() {
		n.attr.Nlink = 0
		d.attr.Nlink--
	} else {
		n.attr.Nlink--
	}
	x.touch(n, false)
}

func (x *mExec) above(top, ino fsop.Ino) bool {
	for ; ino != 0; ino = x.inodes[ino].parent { // a removed subvolume lies in 0
		if ino == top {
			return true
		}
	}
	return false
}

func (x *mExec) rename(op *fsop.Rename) error {
	noreplace, exchange, whiteout := op.Flags&1 != 0, op.Flags&2 != 0, op.Flags&4 != 0
	if op.Flags > 7 || exchange && (noreplace || whiteout) {
		return fsop.EINVAL
	}
	from, err := x.dir(op.Parent)
	if err != nil {
		return err
	}
	to, err := x.dir(op.NewParent)
	if err != nil {
		return err
	}
	if err := fsop.CheckName(op.Name); err != nil {
		return err
	}
	if err := fsop.CheckName(op.NewName); err != nil {
		return err
	}
	si, ok := from.entries[op.Name]
	if !ok {
		return fsop.ENOENT
	}
	ti, exists := to.entries[op.NewName]
	if exists && noreplace {
		return fsop.EEXIST
	}
	if !exists && exchange {
		return fsop.ENOENT
	}
	if from.subvol != to.subvol {
		return fsop.EXDEV
	}
	s, t := x.inodes[si], x.inodes[ti]
	if x.above(si, op.NewParent) {
		return fsop.EINVAL
	}
	if exists && x.above(ti, op.Parent) {
		if exchange {
			return fsop.EINVAL
		}
		return fsop.ENOTEMPTY
	}
	x.r.reply.Attr = s.attrs()
	if si == ti {
		return nil
	}
	if exists && !exchange {
		switch {
		case s.attr.IsDir() && !t.attr.IsDir():
			return fsop.ENOTDIR
		case !s.attr.IsDir() && t.attr.IsDir():
			return fsop.EISDIR
		case t.attr.IsDir() && len(t.entries) > 0:
			return fsop.ENOTEMPTY
		case t.subvol == ti && x.inUse(ti):
			return fsop.EBUSY
		}
		x.unname(to, t)
	}
	move := func(n *mInode, from, to *mInode) {
		if n.attr.IsDir() {
			from.attr.Nlink--
			to.attr.Nlink++
			n.parent = to.attr.Ino
		}
		x.touch(n, false)
	}
	delete(from.entries, op.Name)
	to.entries[op.NewName] = si
	move(s, from, to)
	if exchange {
		from.entries[op.Name] = ti
		move(t, to, from)
	}
	x.touch(from, true)
	x.touch(to, true)
	if whiteout {
		w := &mInode{subvol: from.subvol, attr: fsop.Attr{Ino: fsop.MakeIno(x.set, x.next), Mode: syscall.S_IFCHR, Nlink: 1, Atime: x.e.Time}}
		x.next++
		x.inodes[w.attr.Ino] = w
		from.entries[op.Name] = w.attr.Ino
		x.touch(w, true)
	}
	x.r.reply.Attr = s.attrs()
	return nil
}

func (x *mExec) kill(n *mInode) {
	n.attr.Mode &^= syscall.S_ISUID
	if n.attr.Mode&syscall.S_IXGRP != 0 {
		n.attr.Mode &^= syscall.S_ISGID
	}
	x.dropCaps(n)
}
