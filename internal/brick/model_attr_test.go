package brick

import (
	"maps"
	"strings"
	"syscall"

	"mortar/internal/fsop"
)

// attrs returns the attributes of an inode as stat would show them.
func (n *mInode) attrs() fsop.Attr {
	a := n.attr
	switch a.Type() {
	case syscall.S_IFDIR:
		a.Size = uint64(len(n.entries))
	case syscall.S_IFREG:
		a.Size = uint64(len(n.data))
		a.Blocks = 8 * uint64(len(n.blocks))
	case syscall.S_IFLNK:
		a.Size = uint64(len(n.target))
	}
	return a
}

func (x *mExec) dropCaps(n *mInode) { delete(n.xattrs, "security.capability") }

func (x *mExec) setattr(op *fsop.Setattr) error {
	n, err := x.get(op.Ino)
	if err != nil {
		return err
	}
	has := func(bit uint32) bool { return op.Valid&bit != 0 }
	if has(fsop.SetSize) {
		if n.attr.IsDir() {
			return fsop.EISDIR
		}
		if !n.attr.IsRegular() {
			return fsop.EINVAL
		}
		if op.Size > fsop.MaxSize {
			return fsop.EFBIG
		}
	}
	if has(fsop.SetMode) && n.attr.Type() == syscall.S_IFLNK {
		return fsop.EOPNOTSUPP
	}
	if op.Valid == 0 {
		x.r.reply.Attr = n.attrs()
		return nil
	}
	if has(fsop.SetSize) && x.fenced(n) {
		return fsop.EIO
	}
	if has(fsop.SetKillPriv) || has(fsop.SetUID|fsop.SetGID) && !n.attr.IsDir() {
		x.kill(n)
	}
	if has(fsop.SetKillSGID) && !n.attr.IsDir() {
		n.attr.Mode &^= syscall.S_ISGID
	}
	if has(fsop.SetUID) {
		n.attr.UID = op.UID
	}
	if has(fsop.SetGID) {
		n.attr.GID = op.GID
	}
	if has(fsop.SetMode) {
		n.attr.Mode = n.attr.Mode&^0o7777 | op.Mode&0o7777
	}
	if has(fsop.SetSize) {
		x.dropCaps(n)
		n.resize(op.Size)
		maps.DeleteFunc(n.blocks, func(b uint64, _ bool) bool { return b*4096 >= op.Size })
		n.attr.Mtime = x.e.Time
	}
	for _, t := range []struct {
		set, now uint32
		p        *int64
		v        int64
	}{
		{fsop.SetAtime, fsop.SetAtimeNow, &n.attr.Atime, op.Atime},
		{fsop.SetMtime, fsop.SetMtimeNow, &n.attr.Mtime, op.Mtime},
	} {
		if has(t.set) {
			*t.p = t.v
		}
		if has(t.now) {
			*t.p = x.now(n)
		}
	}
	x.touch(n, false)
	// A file that grows gets a hole, but its last block was allocated whole.
	x.r.reply.Attr = n.attrs()
	return nil
}

func (x *mExec) xattr() error {
	var ino fsop.Ino
	var name string
	set, isSet := x.e.Op.(*fsop.Setxattr)
	if isSet {
		ino, name = set.Ino, set.Name
	} else {
		op := x.e.Op.(*fsop.Removexattr)
		ino, name = op.Ino, op.Name
	}
	n, err := x.get(ino)
	if err != nil {
		return err
	}
	space, _, _ := strings.Cut(name, ".")
	if space != "user" && space != "trusted" && space != "security" {
		return fsop.EOPNOTSUPP
	}
	_, exists := n.xattrs[name]
	switch {
	case !isSet && !exists:
		return fsop.ENODATA
	case !isSet:
		delete(n.xattrs, name)
	case exists && set.Flags&fsop.XattrCreate != 0:
		return fsop.EEXIST
	case !exists && set.Flags&fsop.XattrReplace != 0:
		return fsop.ENODATA
	default:
		if n.xattrs == nil {
			n.xattrs = map[string]string{}
		}
		n.xattrs[name] = string(set.Value)
	}
	x.touch(n, false)
	x.r.reply.Attr = n.attrs()
	return nil
}
