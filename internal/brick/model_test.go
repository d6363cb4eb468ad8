package brick

import (
	"bytes"
	"maps"
	"slices"
	"strings"
	"syscall"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// model is a file system in memory, written from the manual pages and with no
// regard to speed: what a brick does is compared with it. It keeps contents as
// bytes, allocation as a set of blocks, and locks as one lock per byte and owner.
type model struct {
	set      uint16
	pos      cluster.Pos
	time     int64
	next     uint64
	inodes   map[fsop.Ino]*mInode
	sessions map[cluster.SessionID]*mSession
	subvols  map[fsop.Ino]mSubvol
}

type mInode struct {
	subvol   fsop.Ino
	linkable bool      // never had a name, may get one
	attr     fsop.Attr // but for Blocks, Size of directories and files
	data     []byte
	blocks   map[uint64]bool
	xattrs   map[string]string
	target   string
	entries  map[string]fsop.Ino
	parent   fsop.Ino
	posix    map[mOwner]map[uint64]mHeld // byte (of the few that tests lock) → lock
	flock    map[mOwner]mHeld
}

type mOwner struct {
	session cluster.SessionID
	owner   uint64
}

type mHeld struct {
	typ   fsop.LockType
	pid   uint32
	state string // "": held; "away", "lost"
}

// locks goes through the locks of a session on a file; each becomes what change returns.
func (n *mInode) locks(id cluster.SessionID, change func(mHeld) mHeld) {
	for o, l := range n.posix {
		for b, h := range l {
			if o.session == id {
				l[b] = change(h)
			}
		}
	}
	for o, h := range n.flock {
		if o.session == id {
			n.flock[o] = change(h)
		}
	}
}

// fenced says whether the entry's session has lost a lock on the file.
func (x *mExec) fenced(n *mInode) (lost bool) {
	n.locks(x.e.Session, func(h mHeld) mHeld { lost = lost || h.state == "lost"; return h })
	return lost
}

type mSession struct {
	client  string
	owner   string
	opened  int64
	away    bool
	uses    map[fsop.Ino]bool
	free    [][]fsop.Ino // of each Reserve that counts, what was not used
	acked   uint64
	replies map[uint64]fsop.Reply
}

// lockBytes is the range in which tests lock; everything behind it counts as
// the last byte.
const lockBytes = 12

func newModel() *model {
	m := &model{next: 2, inodes: map[fsop.Ino]*mInode{}, sessions: map[cluster.SessionID]*mSession{}, subvols: map[fsop.Ino]mSubvol{}}
	m.inodes[fsop.RootIno] = &mInode{attr: fsop.Attr{Ino: 1, Mode: 0o40755, Nlink: 2}, entries: map[string]fsop.Ino{}}
	return m
}

func (m *model) clone() *model {
	c := *m
	c.inodes = map[fsop.Ino]*mInode{}
	for i, n := range m.inodes {
		k := *n
		k.data = bytes.Clone(n.data)
		k.blocks, k.xattrs, k.entries, k.flock = maps.Clone(n.blocks), maps.Clone(n.xattrs), maps.Clone(n.entries), maps.Clone(n.flock)
		k.posix = map[mOwner]map[uint64]mHeld{}
		for o, l := range n.posix {
			k.posix[o] = maps.Clone(l)
		}
		c.inodes[i] = &k
	}
	c.subvols = maps.Clone(m.subvols)
	c.sessions = map[cluster.SessionID]*mSession{}
	for id, s := range m.sessions {
		k := *s
		k.replies = maps.Clone(s.replies)
		k.free = slices.Clone(s.free)
		c.sessions[id] = &k
	}
	return &c
}

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

// mResult is what a model says of an entry.
type mResult struct {
	reply    fsop.Reply
	changed  bool
	dup      bool
	released []fsop.Ino
}

// do applies an entry, all or nothing.
func (m *model) do(e *proto.Entry) (mResult, error) {
	if s := m.sessions[e.Session]; e.Session != 0 {
		if s == nil || s.away {
			if _, ok := e.Op.(*fsop.OpenSession); !ok {
				return mResult{}, fsop.ENOTCONN
			}
		} else if r, ok := s.replies[e.Number]; ok {
			return mResult{reply: r, dup: true}, nil
		} else if e.Number != 0 && e.Number < s.acked {
			return mResult{}, fsop.ESTALE
		}
	}
	next := m.clone()
	x := &mExec{model: next, e: e, before: m.account()}
	if err := x.op(); err != nil {
		return mResult{}, err
	}
	if err := x.settleAccounts(); err != nil {
		return mResult{}, err
	}
	if !x.changed {
		x.r.reply.Seq = m.pos.Seq
		return x.r, nil
	}
	next.pos, next.time = e.Pos, e.Time
	if e.Pos.Seq == 1 {
		root := next.inodes[fsop.RootIno]
		root.attr.Atime, root.attr.Mtime, root.attr.Ctime, root.attr.Change = e.Time, e.Time, e.Time, 1
	}
	x.r.changed = true
	x.r.reply.Seq = e.Pos.Seq
	closing, ok := e.Op.(*fsop.CloseSession)
	closes := ok && closing.Session == uint64(e.Session)
	if s := next.sessions[e.Session]; s != nil && e.Number != 0 && !closes {
		if _, opening := e.Op.(*fsop.OpenSession); !opening || m.sessions[e.Session] != nil {
			s.acked = max(s.acked, min(e.Acked, e.Number))
			maps.DeleteFunc(s.replies, func(n uint64, _ fsop.Reply) bool { return n < s.acked })
			s.replies[e.Number] = x.r.reply
		}
	}
	*m = *next
	return x.r, nil
}

type mExec struct {
	*model
	e       *proto.Entry
	r       mResult
	changed bool
	before  map[fsop.Ino]mUsage
}

func (x *mExec) get(ino fsop.Ino) (*mInode, error) {
	if n := x.inodes[ino]; n != nil {
		return n, nil
	}
	return nil, fsop.ESTALE
}

func (x *mExec) dir(ino fsop.Ino) (*mInode, error) {
	n, err := x.get(ino)
	if err != nil {
		return nil, err
	}
	if !n.attr.IsDir() {
		return nil, fsop.ENOTDIR
	}
	if n.attr.Nlink == 0 || x.subvols[n.subvol].removed {
		return nil, fsop.ENOENT
	}
	return n, nil
}

func (x *mExec) touch(n *mInode, mtime bool) {
	n.attr.Ctime, n.attr.Change = x.e.Time, x.e.Pos.Seq
	if mtime {
		n.attr.Mtime = x.e.Time
	}
	x.changed = true
}

func (x *mExec) op() error {
	switch op := x.e.Op.(type) {
	case *fsop.Create:
		if d, err := x.dir(op.Parent); err == nil && !op.Excl {
			if ino, ok := d.entries[op.Name]; ok {
				if x.inodes[ino].attr.IsDir() {
					return fsop.EISDIR
				}
				x.r.reply.Attr = x.inodes[ino].attrs()
				return nil
			}
		}
		return x.make(&op.Node, syscall.S_IFREG|op.Mode, 0, "")
	case *fsop.Tmpfile:
		return x.tmpfile(op)
	case *fsop.Mkdir:
		if err := x.make(&op.Node, syscall.S_IFDIR|op.Mode, 0, ""); err != nil {
			return err
		}
		x.ask(x.r.reply.Attr.Ino, op.Window)
		return nil
	case *fsop.Reserve:
		s := x.sessions[x.e.Session]
		if s == nil {
			return fsop.EINVAL
		}
		var free []fsop.Ino
		for range fsop.ReserveCount {
			free = append(free, fsop.MakeIno(x.set, x.next))
			x.next++
		}
		s.free = append(s.free, free)
		if len(s.free) > fsop.ReserveKept {
			s.free = s.free[1:]
		}
		x.r.reply.Off = uint64(free[0])
		x.changed = true
		return nil
	case *fsop.Make:
		return x.foretold(op)
	case *fsop.CloseWindow:
		id := cluster.SessionID(op.Session)
		if x.e.Session != 0 && x.e.Session != id {
			return fsop.EPERM
		}
		n, err := x.get(op.Ino)
		if err != nil {
			return err
		}
		if id != 0 && n.attr.Window == uint64(id) {
			n.attr.Window = 0
			x.changed = true
			x.r.released = append(x.r.released, op.Ino)
		}
		return nil
	case *fsop.Mknod:
		switch op.Mode & syscall.S_IFMT {
		case syscall.S_IFCHR, syscall.S_IFBLK:
			return x.make(&op.Node, op.Mode, op.Rdev, "")
		case 0:
			return x.make(&op.Node, op.Mode|syscall.S_IFREG, 0, "")
		case syscall.S_IFREG, syscall.S_IFIFO, syscall.S_IFSOCK:
			return x.make(&op.Node, op.Mode, 0, "")
		case syscall.S_IFDIR:
			return fsop.EPERM
		}
		return fsop.EINVAL
	case *fsop.Symlink:
		if op.Target == "" {
			return fsop.ENOENT
		}
		return x.make(&op.Node, syscall.S_IFLNK|0o777, 0, op.Target)
	case *fsop.Link:
		return x.link(op)
	case *fsop.Unlink:
		return x.remove(op.Parent, op.Name, false)
	case *fsop.Rmdir:
		return x.remove(op.Parent, op.Name, true)
	case *fsop.Rename:
		return x.rename(op)
	case *fsop.Setattr:
		return x.setattr(op)
	case *fsop.Write:
		return x.write(op)
	case *fsop.Fallocate:
		return x.fallocate(op)
	case *fsop.Setxattr, *fsop.Removexattr:
		return x.xattr()
	case *fsop.Setlk:
		return x.setlk(op)
	case *fsop.OpenSession:
		if x.e.Session == 0 {
			return fsop.EINVAL
		}
		s := x.sessions[x.e.Session]
		switch {
		case op.Opened != 0 && (s == nil || s.opened != op.Opened):
			return fsop.ESTALE
		case s != nil && s.owner != op.Owner:
			return fsop.EPERM
		case s == nil:
			x.sessions[x.e.Session] = &mSession{client: op.Client, owner: op.Owner, opened: x.e.Time, replies: map[uint64]fsop.Reply{}}
		case !s.away:
			return nil
		default:
			s.away = false
			for _, n := range x.inodes {
				n.locks(x.e.Session, func(h mHeld) mHeld {
					if h.state == "away" {
						h.state = ""
					}
					return h
				})
			}
		}
		x.changed = true
		return nil
	case *fsop.CloseSession:
		id := cluster.SessionID(op.Session)
		s := x.sessions[id]
		if s == nil || op.Away && s.away {
			return nil
		}
		if !s.away {
			for ino := range s.uses {
				if _, ok := x.subvols[ino]; ok {
					x.useNow(ino)
				}
			}
		}
		if s.away = true; !op.Away {
			delete(x.sessions, id)
		}
		x.changed = true
		for ino, n := range x.inodes {
			if n.attr.Window == op.Session {
				n.attr.Window = 0
			}
			had := false
			n.locks(id, func(h mHeld) mHeld {
				if h.state == "" {
					had, h.state = true, "away"
				}
				return h
			})
			if !op.Away {
				maps.DeleteFunc(n.posix, func(o mOwner, _ map[uint64]mHeld) bool { return o.session == id })
				maps.DeleteFunc(n.flock, func(o mOwner, _ mHeld) bool { return o.session == id })
			}
			if had {
				x.r.released = append(x.r.released, ino)
			}
		}
		return nil
	case *fsop.Reap:
		for _, ino := range op.Inos {
			if n := x.inodes[ino]; n != nil && n.attr.Nlink == 0 {
				if len(n.flock) > 0 || slices.ContainsFunc(slices.Collect(maps.Values(n.posix)), func(l map[uint64]mHeld) bool { return len(l) > 0 }) {
					x.r.released = append(x.r.released, ino)
				}
				delete(x.inodes, ino)
				x.changed = true
			}
		}
		return nil
	case *fsop.Noop:
		x.changed = true
		return nil
	case *fsop.Use, *fsop.MakeSubvolume, *fsop.LimitSubvolume, *fsop.RemoveSubvolume, *fsop.Sweep:
		return x.subvolume()
	}
	return fsop.EINVAL
}

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
		x.inodes[ino].attr.Window = uint64(x.e.Session)
		x.r.reply.Window = true
	}
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
		Ino: fsop.MakeIno(x.set, x.next), Mode: mode, Nlink: 1, UID: p.UID, GID: p.GID, Atime: x.e.Time,
	}}
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

func (x *mExec) dropCaps(n *mInode) { delete(n.xattrs, "security.capability") }

func (x *mExec) kill(n *mInode) {
	n.attr.Mode &^= syscall.S_ISUID
	if n.attr.Mode&syscall.S_IXGRP != 0 {
		n.attr.Mode &^= syscall.S_ISGID
	}
	x.dropCaps(n)
}

func (n *mInode) resize(size uint64) {
	if size <= uint64(len(n.data)) {
		n.data = n.data[:size:size]
	} else {
		n.data = append(n.data, make([]byte, size-uint64(len(n.data)))...)
	}
}

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
			*t.p = x.e.Time
		}
	}
	x.touch(n, false)
	// A file that grows gets a hole, but its last block was allocated whole.
	x.r.reply.Attr = n.attrs()
	return nil
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

func (x *mExec) setlk(op *fsop.Setlk) error {
	n, err := x.get(op.Ino)
	if err != nil {
		return err
	}
	if x.e.Session == 0 {
		return fsop.EINVAL
	}
	me := mOwner{x.e.Session, op.Lock.Owner}
	x.r.reply.Attr = n.attrs()
	gave := false
	// clash says whether h keeps the lock out; if nobody hears of who has it, he loses it.
	clash := func(h *mHeld) bool {
		if h.typ != fsop.LockWrite && op.Lock.Type != fsop.LockWrite {
			return false
		}
		if h.state == "away" {
			h.state = "lost"
		}
		return h.state == ""
	}
	if op.Lock.Flock {
		was, held := n.flock[me]
		if op.Lock.Type == fsop.LockUnlock {
			if !held {
				return nil
			}
			delete(n.flock, me)
			gave = was.state == ""
		} else {
			if held && was.state == "lost" {
				return fsop.EIO
			}
			for o, h := range n.flock {
				if o != me && clash(&h) {
					return fsop.EAGAIN
				}
				n.flock[o] = h
			}
			if held && was.typ == op.Lock.Type && was.pid == op.Lock.PID {
				return nil
			}
			if n.flock == nil {
				n.flock = map[mOwner]mHeld{}
			}
			n.flock[me] = mHeld{typ: op.Lock.Type, pid: op.Lock.PID}
			gave = held && was.typ == fsop.LockWrite && op.Lock.Type == fsop.LockRead
		}
	} else {
		if op.Lock.Start > op.Lock.End {
			return fsop.EINVAL
		}
		own := n.posix[me]
		same := true
		for _, h := range own {
			if h.state == "lost" && op.Lock.Type != fsop.LockUnlock {
				return fsop.EIO
			}
		}
		for b := op.Lock.Start; b <= min(op.Lock.End, lockBytes-1); b++ {
			if op.Lock.Type != fsop.LockUnlock {
				for o, l := range n.posix {
					if h, ok := l[b]; ok && o != me {
						if clash(&h) {
							return fsop.EAGAIN
						}
						l[b] = h
					}
				}
			}
			h, held := own[b]
			if op.Lock.Type == fsop.LockUnlock && held && h.state == "" || held && h.typ == fsop.LockWrite && op.Lock.Type == fsop.LockRead {
				gave = true
			}
			if held != (op.Lock.Type != fsop.LockUnlock) || held && h.typ != op.Lock.Type {
				same = false
			}
		}
		if same {
			return nil
		}
		if own == nil {
			own = map[uint64]mHeld{}
			if n.posix == nil {
				n.posix = map[mOwner]map[uint64]mHeld{}
			}
			n.posix[me] = own
		}
		for b := op.Lock.Start; b <= min(op.Lock.End, lockBytes-1); b++ {
			if op.Lock.Type == fsop.LockUnlock {
				delete(own, b)
			} else {
				own[b] = mHeld{typ: op.Lock.Type, pid: op.Lock.PID}
			}
		}
	}
	x.changed = true
	if gave {
		x.r.released = append(x.r.released, op.Ino)
	}
	return nil
}
