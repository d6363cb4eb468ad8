package brick

import (
	"maps"
	"syscall"

	"mortar/internal/fsop"
)

// mSubvol is a subvolume. What it uses is counted anew each time.
type mSubvol struct {
	size, inodes uint64
	made, used   int64
	token        uint64
	removed      bool
}

// account counts what the subvolumes use.
func (m *model) account() map[fsop.Ino]mUsage {
	all := map[fsop.Ino]mUsage{}
	for _, n := range m.inodes {
		if n.subvol == 0 {
			continue
		}
		u := all[n.subvol]
		u.inodes++
		u.bytes += 512 * n.attrs().Blocks
		for name, v := range n.xattrs {
			u.bytes += uint64(len(name) + len(v))
		}
		all[n.subvol] = u
	}
	return all
}

type mUsage struct{ bytes, inodes uint64 }

// settleAccounts is what happens to subvolumes after every entry.
func (x *mExec) settleAccounts() error {
	before, after := x.before, x.account()
	for ino, s := range x.subvols {
		was, is := before[ino], after[ino]
		if ino == x.adopted {
			continue // what was there is there, whatever the limit
		}
		if is.bytes > was.bytes && s.size > 0 && is.bytes > s.size || is.inodes > was.inodes && s.inodes > 0 && is.inodes > s.inodes {
			return fsop.EDQUOT
		}
		if is != was {
			s.used = x.e.Time
			x.subvols[ino] = s
		}
		if is.inodes == 0 {
			delete(x.subvols, ino)
		}
	}
	return nil
}

// inUse reports whether a session uses the subvolume.
func (x *mExec) inUse(ino fsop.Ino) bool {
	for _, s := range x.sessions {
		if s.uses[ino] && !s.away {
			return true
		}
	}
	return false
}

func (x *mExec) useNow(ino fsop.Ino) {
	s := x.subvols[ino]
	s.used = x.e.Time
	x.subvols[ino] = s
}

func (x *mExec) subvolume() error {
	switch op := x.e.Op.(type) {
	case *fsop.Use:
		n, err := x.get(op.Ino)
		if err != nil {
			return err
		}
		x.r.reply.Attr = n.attrs()
		s := x.sessions[x.e.Session]
		if s == nil {
			return fsop.EINVAL
		}
		v, ok := x.subvols[n.subvol]
		if !ok || s.uses[n.subvol] != op.Done {
			return nil
		}
		if v.removed && !op.Done {
			return fsop.ENOENT
		}
		s.uses = maps.Clone(s.uses)
		if s.uses == nil {
			s.uses = map[fsop.Ino]bool{}
		}
		if s.uses[n.subvol] = true; op.Done {
			delete(s.uses, n.subvol)
		}
		x.useNow(n.subvol)
		x.changed = true
	case *fsop.MakeSubvolume:
		d, err := x.dir(op.Parent)
		if err != nil {
			return err
		}
		if d.subvol != 0 {
			return fsop.EINVAL
		}
		if ino, ok := d.entries[op.Name]; ok && op.Token != 0 && x.subvols[ino].token == op.Token {
			x.r.reply.Attr = x.inodes[ino].attrs()
			return nil
		}
		if err := x.make(&op.Node, syscall.S_IFDIR|op.Mode, 0, ""); err != nil {
			return err
		}
		n := x.inodes[x.r.reply.Attr.Ino]
		n.subvol = n.attr.Ino
		x.subvols[n.subvol] = mSubvol{size: op.Size, inodes: op.Inodes, made: x.e.Time, used: x.e.Time, token: op.Token}
	case *fsop.LimitSubvolume:
		n, err := x.get(op.Ino)
		if err != nil {
			return err
		}
		s, ok := x.subvols[op.Ino]
		if !ok {
			switch {
			case op.Valid&fsop.LimitAdopt == 0 || n.subvol != 0 || op.Ino == fsop.RootIno:
				return fsop.EINVAL
			case !n.attr.IsDir():
				return fsop.ENOTDIR
			case n.attr.Nlink == 0:
				return fsop.ENOENT
			}
			names := map[fsop.Ino]uint32{op.Ino: 1}
			if nested := x.below(n, names); len(names) > fsop.AdoptMost {
				return fsop.E2BIG
			} else if nested {
				return fsop.EINVAL
			}
			for ino, found := range names {
				if a := x.inodes[ino].attr; !a.IsDir() && a.Nlink != found {
					return fsop.EXDEV
				}
			}
			for ino := range names {
				x.inodes[ino].subvol = op.Ino
			}
			s = mSubvol{made: x.e.Time, used: x.e.Time}
			x.adopted = op.Ino
			n.attr.Change = x.e.Pos.Seq
			x.changed = true
		}
		if op.Valid&fsop.LimitSize != 0 && s.size != op.Size {
			s.size, x.changed = op.Size, true
		}
		if op.Valid&fsop.LimitInodes != 0 && s.inodes != op.Inodes {
			s.inodes, x.changed = op.Inodes, true
		}
		x.subvols[op.Ino] = s
		x.r.reply.Attr = n.attrs()
	case *fsop.RemoveSubvolume:
		s, ok := x.subvols[op.Ino]
		if !ok || s.removed {
			return nil
		}
		d, err := x.dir(op.Parent)
		if err != nil {
			return err
		}
		if err := fsop.CheckName(op.Name); err != nil {
			return err
		}
		if d.entries[op.Name] != op.Ino {
			return fsop.ENOENT
		}
		if !op.Force && x.inUse(op.Ino) {
			return fsop.EBUSY
		}
		n := x.inodes[op.Ino]
		delete(d.entries, op.Name)
		d.attr.Nlink--
		x.touch(d, true)
		n.parent = 0
		x.touch(n, false)
		if s.removed, s.used = true, x.e.Time; len(n.entries) == 0 {
			n.attr.Nlink = 0
		}
		x.subvols[op.Ino] = s
		x.r.reply.Attr = n.attrs()
	case *fsop.Sweep:
		if n := x.inodes[op.Ino]; !x.subvols[op.Ino].removed || n == nil || n.attr.Nlink == 0 {
			return nil
		}
		x.empty(x.inodes[op.Ino])
		x.inodes[op.Ino].attr.Nlink = 0
	}
	return nil
}

// below counts the names of everything below d, and reports whether there is a subvolume.
func (x *mExec) below(d *mInode, names map[fsop.Ino]uint32) (nested bool) {
	for _, ino := range d.entries {
		n := x.inodes[ino]
		if n.subvol != 0 {
			nested = true
			continue
		}
		if names[ino]++; n.attr.IsDir() {
			nested = x.below(n, names) || nested
		}
	}
	return nested
}

// empty removes everything below d.
func (x *mExec) empty(d *mInode) {
	for name, ino := range d.entries {
		n := x.inodes[ino]
		if n.attr.IsDir() {
			x.empty(n)
		}
		x.unname(d, n)
		delete(d.entries, name)
		x.touch(d, true)
	}
}
