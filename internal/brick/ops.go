package brick

import (
	"strings"
	"syscall"

	"mortar/internal/brick/meta"
	"mortar/internal/fsop"
)

const permMask = 0o7777

// makeNode makes an inode with one name. mode has the type.
func (x *exec) makeNode(p *fsop.Node, mode uint32) (n *work, err error) {
	return x.makeNodeAs(p, mode, 0)
}

// makeNodeAs is makeNode for an inode of the number ino; 0: the next one.
func (x *exec) makeNodeAs(p *fsop.Node, mode uint32, ino fsop.Ino) (n *work, err error) {
	return x.makeNodeIn(p, mode, ino, 0)
}

// makeNodeIn is makeNodeAs for an inode of a subvolume; 0: its directory's.
func (x *exec) makeNodeIn(p *fsop.Node, mode uint32, ino, subvol fsop.Ino) (n *work, err error) {
	dir, err := x.dir(p.Parent)
	if err != nil {
		return nil, err
	}
	if err := fsop.CheckName(p.Name); err != nil {
		return nil, err
	}
	if _, ok, err := x.lookup(dir.Ino, p.Name); err != nil {
		return nil, err
	} else if ok {
		return nil, fsop.EEXIST
	}
	if n, err = x.child(dir, p, mode, ino, subvol); err != nil {
		return nil, err
	}
	if n.IsDir() {
		n.Nlink = 2
		n.Parent = dir.Ino
		dir.Nlink++
	}
	x.addEntry(dir, p.Name, n)
	x.reply.Attr = n.Attr
	return n, nil
}

// child makes an inode with what it has of dir but a name.
func (x *exec) child(dir *work, p *fsop.Node, mode uint32, ino, subvol fsop.Ino) (*work, error) {
	if dir.Attr.Flags&fsop.FlagImmutable != 0 {
		return nil, fsop.EPERM
	}
	if ino == 0 {
		ino = x.nextIno()
	}
	if subvol == 0 {
		subvol = dir.Subvolume
	}
	n := x.newNode(ino, subvol, mode, p.UID, p.GID)
	if dir.Mode&syscall.S_ISGID != 0 {
		n.GID = dir.GID
		if n.IsDir() {
			n.Mode |= syscall.S_ISGID
		}
	}
	return n, x.inherit(dir, n, p.Umask)
}

func (x *exec) tmpfile(op *fsop.Tmpfile) error {
	dir, err := x.dir(op.Parent)
	if err != nil {
		return err
	}
	n, err := x.child(dir, &op.Node, syscall.S_IFREG|op.Mode&permMask, 0, 0)
	if err != nil {
		return err
	}
	n.Nlink = 0
	x.batch.SetOrphan(n.Ino)
	if !op.Excl {
		n.Flags |= meta.Linkable
	}
	if x.e.Session != 0 {
		x.openWindow(n)
		x.reply.Window = !x.scarce(n)
	}
	x.reply.Attr = n.Attr
	return nil
}

func (x *exec) nextIno() fsop.Ino {
	ino := fsop.MakeIno(x.b.set, x.state.NextIno)
	x.state.NextIno++
	return ino
}

func (x *exec) newNode(ino, subvol fsop.Ino, mode, uid, gid uint32) *work {
	n := &work{}
	n.Subvolume = subvol
	n.Attr = fsop.Attr{
		Ino: ino, Mode: mode, Nlink: 1, UID: uid, GID: gid,
		Atime: x.time, Mtime: x.time, Ctime: x.time,
	}
	n.baseKnown = true
	x.state.Inodes++
	x.charge(&n.node, 0, 1)
	x.nodes = append(x.nodes, n)
	x.touch(n)
	return n
}

func (x *exec) create(op *fsop.Create) error {
	if !op.Excl {
		dir, err := x.dir(op.Parent)
		if err != nil {
			return err
		}
		d, ok, err := x.lookup(dir.Ino, op.Name)
		if err != nil {
			return err
		}
		if ok {
			if d.Type == syscall.S_IFDIR {
				return fsop.EISDIR
			}
			n, err := x.node(d.Ino)
			if err != nil {
				return err
			}
			x.reply.Attr = n.Attr
			return nil
		}
	}
	n, err := x.makeNode(&op.Node, syscall.S_IFREG|op.Mode&permMask)
	if err != nil {
		return err
	}
	return x.window(n, op.Window)
}

func (x *exec) mkdir(op *fsop.Mkdir) error {
	n, err := x.makeNode(&op.Node, syscall.S_IFDIR|op.Mode&permMask)
	if err != nil {
		return err
	}
	return x.window(n, op.Window&fsop.WindowAsk)
}

func (x *exec) mknod(op *fsop.Mknod) error {
	mode := op.Mode & (syscall.S_IFMT | permMask)
	rdev := op.Rdev
	switch mode & syscall.S_IFMT {
	case 0:
		mode |= syscall.S_IFREG
		rdev = 0
	case syscall.S_IFREG, syscall.S_IFIFO, syscall.S_IFSOCK:
		rdev = 0
	case syscall.S_IFCHR, syscall.S_IFBLK:
	case syscall.S_IFDIR:
		return fsop.EPERM
	default:
		return fsop.EINVAL
	}
	n, err := x.makeNode(&op.Node, mode)
	if err != nil {
		return err
	}
	n.Rdev = rdev
	x.reply.Attr = n.Attr
	return nil
}

func (x *exec) symlink(op *fsop.Symlink) error {
	switch {
	case op.Target == "":
		return fsop.ENOENT
	case len(op.Target) > fsop.MaxTarget:
		return fsop.ENAMETOOLONG
	case strings.IndexByte(op.Target, 0) >= 0:
		return fsop.EINVAL
	}
	n, err := x.makeNode(&op.Node, syscall.S_IFLNK|0o777)
	if err != nil {
		return err
	}
	n.Size = uint64(len(op.Target))
	x.batch.SetTarget(n.Ino, op.Target)
	x.reply.Attr = n.Attr
	return nil
}

func (x *exec) link(op *fsop.Link) error {
	dir, err := x.dir(op.Parent)
	if err != nil {
		return err
	}
	if err := fsop.CheckName(op.Name); err != nil {
		return err
	}
	if _, ok, err := x.lookup(dir.Ino, op.Name); err != nil {
		return err
	} else if ok {
		return fsop.EEXIST
	}
	n, err := x.node(op.Ino)
	switch {
	case err != nil:
		return err
	case n.IsDir():
		return fsop.EPERM
	case n.Nlink == 0 && n.Flags&meta.Linkable == 0:
		return fsop.ENOENT
	case frozen(n), dir.Attr.Flags&fsop.FlagImmutable != 0:
		return fsop.EPERM
	case n.Nlink >= fsop.MaxLinks:
		return fsop.EMLINK
	case n.Subvolume != dir.Subvolume:
		return fsop.EXDEV
	}
	if n.Nlink == 0 {
		n.Flags &^= meta.Linkable
		x.batch.DeleteOrphan(n.Ino)
	}
	n.Nlink++
	n.Ctime = x.e.Time
	x.touch(n)
	x.addEntry(dir, op.Name, n)
	x.reply.Attr = n.Attr
	return nil
}

// victim finds the entry that Unlink or Rmdir names.
func (x *exec) victim(parent fsop.Ino, name string) (dir, n *work, err error) {
	dir, err = x.dir(parent)
	if err != nil {
		return nil, nil, err
	}
	if err := fsop.CheckName(name); err != nil {
		return nil, nil, err
	}
	d, ok, err := x.lookup(dir.Ino, name)
	if err != nil {
		return nil, nil, err
	}
	if !ok {
		return nil, nil, fsop.ENOENT
	}
	n, err = x.node(d.Ino)
	return dir, n, err
}

func (x *exec) unlink(op *fsop.Unlink) error {
	dir, n, err := x.victim(op.Parent, op.Name)
	if err != nil {
		return err
	}
	switch {
	case n.IsDir():
		return fsop.EISDIR
	case frozen(dir), frozen(n):
		return fsop.EPERM
	}
	x.dropEntry(dir, op.Name)
	x.dropLink(n)
	x.reply.Attr = n.Attr
	return nil
}

func (x *exec) rmdir(op *fsop.Rmdir) error {
	dir, n, err := x.victim(op.Parent, op.Name)
	switch {
	case err != nil:
		return err
	case !n.IsDir():
		return fsop.ENOTDIR
	case frozen(dir), frozen(n):
		return fsop.EPERM
	case n.Size > 0:
		return fsop.ENOTEMPTY
	}
	if err := x.mayGo(n); err != nil {
		return err
	}
	x.dropEntry(dir, op.Name)
	dir.Nlink--
	x.dropLink(n)
	x.reply.Attr = n.Attr
	return nil
}

// maxDepth bounds the walk towards the root; a path of PATH_MAX bytes has fewer
// components, and a loop in damaged metadata ends here.
const maxDepth = 1 << 16

// inside reports whether dir is n or lies below it.
func (x *exec) inside(dir, n fsop.Ino) (bool, error) {
	for range maxDepth {
		if dir == n {
			return true, nil
		}
		if dir == fsop.RootIno {
			return false, nil
		}
		w, err := x.b.load(dir)
		if err != nil {
			return false, err
		}
		if w == nil || w.Parent == 0 {
			return false, nil // the directory was removed
		}
		dir = w.Parent
	}
	return false, fsop.EINVAL
}

func (x *exec) rename(op *fsop.Rename) error {
	const known = fsop.RenameNoReplace | fsop.RenameExchange | fsop.RenameWhiteout
	exchange := op.Flags&fsop.RenameExchange != 0
	if op.Flags&^known != 0 || exchange && op.Flags != fsop.RenameExchange {
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
	sd, ok, err := x.lookup(from.Ino, op.Name)
	if err != nil {
		return err
	}
	if !ok {
		return fsop.ENOENT
	}
	td, exists, err := x.lookup(to.Ino, op.NewName)
	if err != nil {
		return err
	}
	switch {
	case exists && op.Flags&fsop.RenameNoReplace != 0:
		return fsop.EEXIST
	case !exists && exchange:
		return fsop.ENOENT
	case from.Subvolume != to.Subvolume:
		return fsop.EXDEV // and a subvolume does not get into another one
	}
	src, err := x.node(sd.Ino)
	if err != nil {
		return err
	}
	var dst *work
	if exists {
		if dst, err = x.node(td.Ino); err != nil {
			return err
		}
	}
	if from.Ino != to.Ino {
		if src.IsDir() {
			if in, err := x.inside(to.Ino, src.Ino); err != nil {
				return err
			} else if in {
				return fsop.EINVAL
			}
		}
		if dst != nil && dst.IsDir() {
			if in, err := x.inside(from.Ino, dst.Ino); err != nil {
				return err
			} else if in && exchange {
				return fsop.EINVAL
			} else if in {
				return fsop.ENOTEMPTY
			}
		}
	}
	switch {
	case frozen(from), frozen(src), to.Attr.Flags&fsop.FlagImmutable != 0:
		return fsop.EPERM
	case dst != nil && (frozen(to) || frozen(dst)):
		return fsop.EPERM
	}
	if dst != nil && dst.Ino == src.Ino {
		x.reply.Attr = src.Attr // two names of one inode: both stay
		return nil
	}
	if exchange {
		x.exchange(op, from, to, src, dst)
		return nil
	}
	if dst != nil {
		switch {
		case src.IsDir() && !dst.IsDir():
			return fsop.ENOTDIR
		case !src.IsDir() && dst.IsDir():
			return fsop.EISDIR
		case dst.IsDir() && dst.Size > 0:
			return fsop.ENOTEMPTY
		}
		if err := x.mayGo(dst); err != nil {
			return err
		}
		if dst.IsDir() {
			to.Nlink--
		}
		to.Size-- // addEntry counts the name again
		x.dropLink(dst)
	}
	x.dropEntry(from, op.Name)
	x.addEntry(to, op.NewName, src)
	if src.IsDir() && from.Ino != to.Ino {
		from.Nlink--
		to.Nlink++
		src.Parent = to.Ino
	}
	src.Ctime = x.e.Time
	x.touch(src)
	if op.Flags&fsop.RenameWhiteout != 0 {
		x.addEntry(from, op.Name, x.newNode(x.nextIno(), from.Subvolume, syscall.S_IFCHR, 0, 0))
	}
	x.reply.Attr = src.Attr
	return nil
}

// exchange swaps two entries.
func (x *exec) exchange(op *fsop.Rename, from, to, src, dst *work) {
	x.setEntry(from, op.Name, dst)
	x.setEntry(to, op.NewName, src)
	if from.Ino != to.Ino {
		if src.IsDir() {
			from.Nlink--
			to.Nlink++
			src.Parent = to.Ino
		}
		if dst.IsDir() {
			to.Nlink--
			from.Nlink++
			dst.Parent = from.Ino
		}
	}
	x.dirChanged(from, op.Name)
	x.dirChanged(to, op.NewName)
	src.Ctime, dst.Ctime = x.e.Time, x.e.Time
	x.touch(src)
	x.touch(dst)
	x.reply.Attr = src.Attr
}

func (x *exec) setattr(op *fsop.Setattr) error {
	n, err := x.node(op.Ino)
	if err != nil {
		return err
	}
	valid := op.Valid
	if valid&fsop.SetSize != 0 {
		switch {
		case n.IsDir():
			return fsop.EISDIR
		case !n.IsRegular():
			return fsop.EINVAL
		case op.Size > fsop.MaxSize:
			return fsop.EFBIG
		}
	}
	if valid&fsop.SetMode != 0 && n.Type() == syscall.S_IFLNK {
		return fsop.EOPNOTSUPP
	}
	if valid&fsop.SetFlags != 0 && op.Flags&^fsop.UserFlags != 0 {
		return fsop.EOPNOTSUPP
	}
	if err := mayChange(n, valid); err != nil {
		return err
	}
	if err := x.window(n, op.Window); err != nil {
		return err
	}
	if valid == 0 {
		x.reply.Attr = n.Attr
		return nil
	}
	if err := x.setOwner(n, op); err != nil {
		return err
	}
	if valid&fsop.SetSize != 0 {
		if err := x.fenced(n.Ino); err != nil {
			return err
		}
		x.dropCaps(n)
		if err := x.truncate(n, op.Size); err != nil {
			return err
		}
		n.Mtime = x.e.Time
	}
	if valid&fsop.SetFlags != 0 {
		n.Attr.Flags = n.Attr.Flags&^fsop.UserFlags | op.Flags
	}
	x.setTimes(n, op)
	x.touch(n)
	x.reply.Attr = n.Attr
	return nil
}

// setOwner sets whose n is and who may do what with it.
func (x *exec) setOwner(n *work, op *fsop.Setattr) error {
	valid := op.Valid
	kill := valid&fsop.SetKillPriv != 0
	if valid&(fsop.SetUID|fsop.SetGID) != 0 && !n.IsDir() {
		kill = true // whoever changes the owner does not hand privileges on
	}
	was := n.Attr
	if valid&fsop.SetUID != 0 {
		n.UID = op.UID
	}
	if valid&fsop.SetGID != 0 {
		n.GID = op.GID
	}
	if kill {
		x.killPriv(n)
	}
	if valid&fsop.SetKillSGID != 0 && !n.IsDir() {
		n.Mode &^= syscall.S_ISGID
	}
	if valid&fsop.SetMode != 0 {
		n.Mode = n.Mode&^permMask | op.Mode&permMask
	}
	n.rights = n.UID != was.UID || n.GID != was.GID || n.IsDir() && (n.Mode^was.Mode)&syscall.S_ISVTX != 0
	if valid&fsop.SetMode != 0 && n.Attr.Flags&fsop.FlagACL != 0 {
		return x.chmodACL(n)
	}
	return nil
}

func (x *exec) setTimes(n *work, op *fsop.Setattr) {
	valid := op.Valid
	if valid&fsop.SetAtime != 0 {
		n.Atime = op.Atime
	}
	if valid&fsop.SetAtimeNow != 0 {
		n.Atime = x.time
	}
	if valid&fsop.SetMtime != 0 {
		n.Mtime = op.Mtime
	}
	if valid&fsop.SetMtimeNow != 0 {
		n.Mtime = x.time
	}
	n.Ctime = x.time
}

// killPriv takes away what lets a program run with other rights than its
// caller's. The set-group-id bit without group execution is not such: it was
// once the mark of mandatory locks.
func (x *exec) killPriv(n *work) {
	n.Mode &^= syscall.S_ISUID
	if n.Mode&syscall.S_IXGRP != 0 {
		n.Mode &^= syscall.S_ISGID
	}
	x.dropCaps(n)
}

const capsXattr = "security.capability"

func (x *exec) dropCaps(n *work) {
	if n.Flags&meta.Caps == 0 {
		return
	}
	if err := x.chargeXattr(n, capsXattr, true, nil, true); err != nil {
		x.fault = err
	}
	x.batch.DeleteXattr(n.Ino, capsXattr)
	x.dropXattr(n, capsXattr)
}

func (x *exec) dropXattr(n *work, name string) {
	n.Xattrs--
	n.XattrNames -= uint32(len(name) + 1)
	if name == capsXattr {
		n.Flags &^= meta.Caps
	}
}

// maxXattrNames is what listxattr(2) can return (XATTR_LIST_MAX).
const maxXattrNames = 64 << 10

// checkXattr says whether an attribute of that name can exist.
func checkXattr(name string) error {
	prefix, rest, ok := strings.Cut(name, ".")
	switch {
	case name == "" || len(name) > fsop.MaxName:
		return fsop.ERANGE
	case strings.IndexByte(name, 0) >= 0:
		return fsop.EINVAL
	case name == fsop.XattrACL, name == fsop.XattrDefaultACL:
		return nil
	case !ok, prefix != "user" && prefix != "trusted" && prefix != "security":
		// What would be kept but not obeyed is better refused.
		return fsop.EOPNOTSUPP
	case rest == "":
		return fsop.EINVAL
	}
	return nil
}

func (x *exec) setxattr(op *fsop.Setxattr) error {
	n, err := x.node(op.Ino)
	if err != nil {
		return err
	}
	if op.Flags&^(fsop.XattrCreate|fsop.XattrReplace|fsop.XattrKillSGID) != 0 {
		return fsop.EINVAL
	}
	if err := checkXattr(op.Name); err != nil {
		return err
	}
	if frozen(n) {
		return fsop.EPERM
	}
	if isACL(op.Name) {
		return x.setACL(n, op)
	}
	if len(op.Value) > fsop.MaxXattr {
		return fsop.E2BIG
	}
	exists := false
	if n.Xattrs > 0 {
		if _, exists, err = x.b.store.Xattr(n.Ino, op.Name); err != nil {
			return err
		}
	}
	switch {
	case exists && op.Flags&fsop.XattrCreate != 0:
		return fsop.EEXIST
	case !exists && op.Flags&fsop.XattrReplace != 0:
		return fsop.ENODATA
	case !exists && int(n.XattrNames)+len(op.Name)+1 > maxXattrNames:
		return fsop.ENOSPC
	}
	if err := x.chargeXattr(n, op.Name, exists, op.Value, false); err != nil {
		return err
	}
	if !exists {
		n.Xattrs++
		n.XattrNames += uint32(len(op.Name) + 1)
	}
	if op.Name == capsXattr {
		n.Flags |= meta.Caps
	}
	x.batch.SetXattr(n.Ino, op.Name, op.Value)
	n.Ctime = x.e.Time
	x.touch(n)
	x.reply.Attr = n.Attr
	return nil
}

func (x *exec) removexattr(op *fsop.Removexattr) error {
	n, err := x.node(op.Ino)
	if err != nil {
		return err
	}
	if err := checkXattr(op.Name); err != nil {
		return err
	}
	if frozen(n) {
		return fsop.EPERM
	}
	if isACL(op.Name) {
		return x.setACL(n, &fsop.Setxattr{Ino: op.Ino, Name: op.Name})
	}
	exists := false
	if n.Xattrs > 0 {
		if _, exists, err = x.b.store.Xattr(n.Ino, op.Name); err != nil {
			return err
		}
	}
	if !exists {
		return fsop.ENODATA
	}
	if err := x.chargeXattr(n, op.Name, true, nil, true); err != nil {
		return err
	}
	x.batch.DeleteXattr(n.Ino, op.Name)
	x.dropXattr(n, op.Name)
	n.Ctime = x.e.Time
	x.touch(n)
	x.reply.Attr = n.Attr
	return nil
}

// reap executes Reap: it forgets those of the inodes that have no name.
func (x *exec) reap(op *fsop.Reap) error {
	seen := make(map[fsop.Ino]bool, len(op.Inos))
	for _, ino := range op.Inos {
		if seen[ino] {
			continue
		}
		seen[ino] = true
		n, err := x.b.load(ino)
		if err != nil {
			return err
		}
		if n == nil || n.Nlink > 0 {
			continue // it is gone, or was never without a name
		}
		if err := x.reapOne(n); err != nil {
			return err
		}
		x.changed = true
	}
	return nil
}

func (x *exec) reapOne(n *node) error {
	b, ino := x.b, n.Ino
	x.batch.DeleteOrphan(ino)
	x.batch.DeleteInode(&n.Inode)
	size := int64(n.Blocks) * sectorSize
	if n.Xattrs > 0 {
		if err := b.store.Xattrs(ino, func(name string, v []byte) error {
			size += xattrSize(name, v)
			x.batch.DeleteXattr(ino, name)
			return nil
		}); err != nil {
			return err
		}
	}
	if n.Flags&meta.Sparse != 0 {
		if err := b.store.Runs(ino, 0, func(r meta.Run) (bool, error) {
			x.batch.DeleteRun(ino, r.Start)
			return true, nil
		}); err != nil {
			return err
		}
	}
	x.charge(n, -size, -1)
	x.state.Inodes--
	x.state.Blocks -= n.Blocks
	if held := b.locks[ino]; len(held) > 0 {
		x.replaceLocks(ino, held, nil)
		x.released = append(x.released, ino)
	}
	var ext []meta.Extent
	if n.IsRegular() {
		base, err := b.baseOf(n)
		if err != nil {
			return err
		}
		x.dropBase(ino, base)
		ext = b.extents[ino].all(func(*meta.Extent) bool { return true })
		for i := range ext {
			x.batch.DeleteExtent(ino, ext[i].Off)
		}
	}
	x.onCommit(func(b *Brick) {
		b.cache.remove(ino)
		b.replaceExtents(ino, ext, nil)
		b.cancelSettling(ino)
	})
	return nil
}
