package brick

import (
	"slices"
	"syscall"

	"mortar/internal/fsop"
)

// scarce reports whether a limit is near.
func (x *mExec) scarce(n *mInode) bool {
	s, ok := x.subvols[n.subvol]
	if !ok {
		return false
	}
	was := x.before[n.subvol]
	return s.size > 0 && was.bytes+min(64<<20, s.size/4) > s.size ||
		s.inodes > 0 && n.attr.IsDir() && was.inodes+max(256, min(4096, s.inodes/4)) > s.inodes
}

// ask gives the window of a new inode.
func (x *mExec) ask(ino fsop.Ino, w fsop.Window) {
	if x.scarce(x.inodes[ino]) {
		return
	}
	if w&fsop.WindowAsk != 0 && x.e.Session != 0 {
		x.inodes[ino].attr.Window, x.inodes[ino].since = uint64(x.e.Session), x.e.Time
		x.r.reply.Window = true
	}
}

// openDirectory gives the window of a directory that is there already.
func (x *mExec) openDirectory(op *fsop.OpenWindow) error {
	if x.e.Session == 0 {
		return fsop.EINVAL
	}
	d, err := x.dir(op.Ino)
	if err != nil {
		return err
	}
	if d.attr.Window == 0 {
		x.ask(op.Ino, fsop.WindowAsk)
		x.changed = x.r.reply.Window
	} else {
		x.r.reply.Window = d.attr.Window == uint64(x.e.Session) && !x.scarce(d)
	}
	x.r.reply.Attr = d.attrs()
	return nil
}

// foretold makes a file whose number was reserved: as a Create, a Write and a
// Setattr would.
func (x *mExec) foretold(op *fsop.Make) error {
	d, err := x.dir(op.Parent)
	if err != nil {
		return err
	}
	w := op.First
	if w.Append || w.Then.Valid&fsop.SetSize != 0 {
		return fsop.EINVAL
	}
	if x.e.Session == 0 || d.attr.Window != uint64(x.e.Session) {
		return fsop.EIO
	}
	s, found := x.sessions[x.e.Session], false
	for i, free := range s.free {
		if at := slices.Index(free, w.Ino); at >= 0 {
			s.free[i], found = slices.Delete(slices.Clone(free), at, at+1), true
		}
	}
	if !found {
		return fsop.EIO
	}
	if w.Told != 0 {
		x.told = max(d.since, min(x.e.Time, w.Told))
	}
	next := x.next
	x.next = uint64(w.Ino)
	err = x.make(&op.Node, syscall.S_IFREG|op.Mode, 0, "")
	if x.next = next; err != nil {
		return err
	}
	if len(w.Data) > 0 {
		w.Window = 0
		if err := x.write(&w); err != nil {
			return err
		}
	}
	if w.Then.Valid != 0 {
		then := w.Then
		then.Ino = w.Ino
		if err := x.setattr(&then); err != nil {
			return err
		}
	}
	x.r.reply.Attr = x.inodes[w.Ino].attrs()
	if op.First.Window&fsop.WindowAsk != 0 {
		x.inodes[w.Ino].attr.Window = uint64(x.e.Session)
		x.r.reply.Attr.Window = uint64(x.e.Session)
	}
	x.r.reply.Window = !x.scarce(d)
	return nil
}
