package brick

import (
	"slices"
	"syscall"

	"mortar/internal/brick/meta"
	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// holder returns the session that holds the window of n (fsop.Window), 0 for
// none. A window ends with its session, and when that goes away; it does not come
// back with it. b.wmu or b.mu is held.
func (b *Brick) holder(n *node) cluster.SessionID {
	if n.Attr.Window == 0 {
		return 0
	}
	id := cluster.SessionID(n.Attr.Window)
	if s := b.sessions[id]; s == nil || s.Away || n.WindowSince < s.Since {
		return 0
	}
	return id
}

// attr is n's attributes as replies show them.
func (b *Brick) attr(n *node) fsop.Attr {
	a := n.Attr
	a.Window = uint64(b.holder(n))
	return a
}

// window gives or takes the window of n as an operation of the entry's session
// wishes. EIO if the operation relies on a window that the session does not hold.
func (x *exec) window(n *work, w fsop.Window) error {
	if w == 0 || x.e.Session == 0 {
		return nil
	}
	held := x.b.holder(&n.node) == x.e.Session
	switch {
	case w&fsop.WindowHeld != 0 && !held:
		return fsop.EIO
	case w&fsop.WindowDone != 0 && held:
		x.closeTheWindow(n)
	case w&fsop.WindowAsk != 0 && x.scarce(n):
	case w&fsop.WindowAsk != 0 && !held && x.b.holder(&n.node) == 0:
		x.openWindow(n)
		x.reply.Window = true
	case w&fsop.WindowAsk != 0 && held:
		x.reply.Window = true
	}
	return nil
}

// What clients may hold back of a subvolume, all together, before they hear of its limit
// too late, which is when an error comes with close and not with write or create.
const (
	scarceRoom   = 64 << 20 // of writes, or a quarter of the limit if that is less
	scarceInodes = 4096     // of new files, or a quarter of the limit, but
	fewInodes    = 256      // as many as a few sessions foretell at the least
)

// scarce reports whether a limit of the subvolume of n, a file or a directory, is so near that
// whoever writes to it, or makes files in it, has to wait for the answer.
func (x *exec) scarce(n *work) bool {
	s := x.b.subvols[n.Subvolume]
	return s != nil && (s.Size > 0 && (n.IsRegular() || n.IsDir()) && s.UsedSize+min(scarceRoom, s.Size/4) > s.Size ||
		s.Inodes > 0 && n.IsDir() && s.UsedInodes+max(fewInodes, min(scarceInodes, s.Inodes/4)) > s.Inodes)
}

// tell makes what a window's holder told its applications the time of what the entry
// does to its file: no later than now, and no earlier than since, at which the file, or
// the directory that gets it, was as the set knows it.
func (x *exec) tell(told, since int64) {
	if told != 0 {
		x.time = max(min(told, x.e.Time), since)
	}
}

func (x *exec) openWindow(n *work) {
	n.Attr.Window, n.WindowSince = uint64(x.e.Session), x.e.Time
}

// openDirectory executes OpenWindow. As with CloseWindow, the inode's Change stays;
// but what others know of the directory they are not told any more, so they have to
// forget it.
func (x *exec) openDirectory(op *fsop.OpenWindow) error {
	if x.e.Session == 0 {
		return fsop.EINVAL
	}
	dir, err := x.dir(op.Ino)
	if err != nil {
		return err
	}
	held := x.b.holder(&dir.node) == x.e.Session
	if err := x.window(dir, fsop.WindowAsk); err != nil {
		return err
	}
	if x.reply.Window && !held {
		dir.dirty, x.changed = true, true
		x.effects = append(x.effects, proto.Effect{Ino: dir.Ino, Names: true})
	}
	x.reply.Attr = dir.Attr
	return nil
}

func (x *exec) closeTheWindow(n *work) {
	n.Attr.Window, n.WindowSince = 0, 0
	n.dirty, x.changed = true, true
	x.released = append(x.released, n.Ino)
}

// closeWindow executes CloseWindow. The inode's Change stays: nothing of it
// that is shown to anybody changes.
func (x *exec) closeWindow(op *fsop.CloseWindow) error {
	id := cluster.SessionID(op.Session)
	if x.e.Session != 0 && x.e.Session != id {
		return fsop.EPERM
	}
	n, err := x.node(op.Ino)
	if err != nil {
		return err
	}
	if id != 0 && x.b.holder(&n.node) == id {
		x.closeTheWindow(n)
	}
	return nil
}

// reserveInos executes Reserve.
func (x *exec) reserveInos() error {
	s := x.b.sessions[x.e.Session]
	if s == nil {
		return fsop.EINVAL // the system needs none
	}
	first := x.state.NextIno
	x.state.NextIno += fsop.ReserveCount
	r := append(slices.Clone(s.Reserved), meta.Reserved{First: first})
	x.setReserved(s, r[max(0, len(r)-fsop.ReserveKept):])
	x.reply.Off = uint64(fsop.MakeIno(x.b.set, first))
	x.changed = true
	return nil
}

// takeIno plans to use an inode number that was set aside for the entry's session.
func (x *exec) takeIno(ino fsop.Ino) bool {
	s := x.b.sessions[x.e.Session]
	if s == nil || ino.Set() != x.b.set {
		return false
	}
	r := slices.Clone(s.Reserved)
	n := uint64(ino - fsop.MakeIno(x.b.set, 0))
	for i := range r {
		if r[i].Take(n) {
			x.setReserved(s, r)
			return true
		}
	}
	return false
}

func (x *exec) setReserved(s *session, r []meta.Reserved) {
	rec := s.Session
	rec.Reserved = r
	x.batch.SetSession(&rec)
	x.onCommit(func(*Brick) { s.Reserved = r })
}

// make executes Make.
func (x *exec) make(op *fsop.Make) error {
	dir, err := x.dir(op.Parent)
	if err != nil {
		return err
	}
	w := op.First
	if w.Append || w.Then.Valid&(fsop.SetSize|fsop.SetFlags) != 0 {
		return fsop.EINVAL
	}
	if x.e.Session == 0 || x.b.holder(&dir.node) != x.e.Session || !x.takeIno(w.Ino) {
		return fsop.EIO
	}
	x.tell(w.Told, dir.WindowSince)
	n, err := x.makeNodeAs(&op.Node, syscall.S_IFREG|op.Mode&permMask, w.Ino)
	if err != nil {
		return err
	}
	if w.Window&fsop.WindowAsk != 0 { // its maker may have written more than this already
		x.openWindow(n)
	}
	x.reply.Window = !x.scarce(dir)
	w.Window = 0
	if len(w.Data) > 0 {
		return x.write(&w)
	}
	if w.Then.Valid != 0 {
		if err := x.setOwner(n, &w.Then); err != nil {
			return err
		}
		x.setTimes(n, &w.Then)
	}
	x.reply.Attr = n.Attr
	return nil
}
