package brick

import (
	"fmt"
	"syscall"

	"mortar/internal/brick/meta"
	"mortar/internal/fsop"
)

// The flags of chattr(1) are kept here, because the kernels do not know them.

// frozen says whether what is there must stay as it is.
func frozen(n *work) bool { return n.Attr.Flags&(fsop.FlagImmutable|fsop.FlagAppend) != 0 }

// mayChange says whether the flags of n let a Setattr of valid through. The flags
// themselves are the kernel's to guard: whoever changes them needs CAP_LINUX_IMMUTABLE.
func mayChange(n *work, valid uint32) error {
	const touch = fsop.SetAtimeNow | fsop.SetMtimeNow
	switch {
	case valid&^fsop.SetFlags == 0:
	case n.Attr.Flags&fsop.FlagImmutable != 0:
		return fsop.EPERM
	case n.Attr.Flags&fsop.FlagAppend != 0 && valid&^(fsop.SetFlags|touch|fsop.SetKillPriv|fsop.SetKillSGID) != 0:
		return fsop.EPERM
	}
	return nil
}

func isACL(name string) bool { return name == fsop.XattrACL || name == fsop.XattrDefaultACL }

// aclFlag says that the attribute is there.
func aclFlag(name string) fsop.Flag {
	if name == fsop.XattrACL {
		return fsop.FlagACL
	}
	return fsop.FlagDefaultACL
}

// acl reads a list that is there.
func (x *exec) acl(n *work, name string) (fsop.ACL, error) {
	v, ok, err := x.b.store.Xattr(n.Ino, name)
	if err != nil {
		return nil, err
	}
	a, err := fsop.ParseACL(v)
	if err != nil || !ok || len(a) == 0 {
		return nil, fmt.Errorf("%w: %s of inode %d", meta.ErrFormat, name, n.Ino)
	}
	return a, nil
}

// putACL keeps a list, or takes it away if there is nothing in it.
func (x *exec) putACL(n *work, name string, a fsop.ACL) {
	had := n.Attr.Flags&aclFlag(name) != 0
	if had || len(a) > 0 {
		if err := x.chargeXattr(n, name, had, a.Append(nil), len(a) == 0); err != nil {
			x.fault = err
		}
	}
	if len(a) == 0 {
		if had {
			x.batch.DeleteXattr(n.Ino, name)
			x.dropXattr(n, name)
			n.Attr.Flags &^= aclFlag(name)
		}
		return
	}
	if !had {
		n.Xattrs++
		n.XattrNames += uint32(len(name) + 1)
		n.Attr.Flags |= aclFlag(name)
	}
	x.batch.SetXattr(n.Ino, name, a.Append(nil))
}

// inherit gives a new inode its permissions: the mode it was asked for less the
// umask, or what the directory's default ACL makes of that mode.
func (x *exec) inherit(dir, n *work, umask uint32) error {
	if n.Type() == syscall.S_IFLNK {
		return nil
	}
	if dir.Attr.Flags&fsop.FlagDefaultACL == 0 {
		n.Mode &^= umask & 0o777
		return nil
	}
	a, err := x.acl(dir, fsop.XattrDefaultACL)
	if err != nil {
		return err
	}
	if n.IsDir() {
		x.putACL(n, fsop.XattrDefaultACL, a)
	}
	n.Mode = n.Mode&^0o777 | a.Inherit(n.Mode)
	if _, simple := a.Mode(); !simple {
		x.putACL(n, fsop.XattrACL, a)
	}
	return nil
}

// setACL executes Setxattr of an access control list. One of access changes the
// mode, and is not kept if that says all of it.
func (x *exec) setACL(n *work, op *fsop.Setxattr) error {
	a, err := fsop.ParseACL(op.Value)
	switch {
	case err != nil:
		return err
	case n.Type() == syscall.S_IFLNK:
		return fsop.EOPNOTSUPP
	case op.Name == fsop.XattrDefaultACL && !n.IsDir():
		if len(a) == 0 {
			x.reply.Attr = n.Attr
			return nil
		}
		return fsop.EACCES
	}
	if op.Name == fsop.XattrACL && len(a) > 0 {
		mode, simple := a.Mode()
		n.Mode = n.Mode&^0o777 | mode
		if op.Flags&fsop.XattrKillSGID != 0 {
			n.Mode &^= syscall.S_ISGID
		}
		if simple {
			a = nil
		}
	}
	x.putACL(n, op.Name, a)
	n.Ctime = x.e.Time
	x.touch(n)
	x.reply.Attr = n.Attr
	return nil
}

// chmodACL brings the access list to the new mode.
func (x *exec) chmodACL(n *work) error {
	a, err := x.acl(n, fsop.XattrACL)
	if err != nil {
		return err
	}
	a.Chmod(n.Mode)
	x.putACL(n, fsop.XattrACL, a)
	return nil
}
