package brick

import (
	"bytes"
	"maps"
	"slices"
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
	since    int64     // when its window was given
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
	told    int64 // by a window's holder, of its file; 0: nothing
	adopted fsop.Ino
}

// now is what becomes the time of what is done to n.
func (x *mExec) now(n *mInode) int64 {
	if x.told != 0 && !n.attr.IsDir() {
		return x.told
	}
	return x.e.Time
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
	n.attr.Ctime, n.attr.Change = x.now(n), x.e.Pos.Seq
	if mtime {
		n.attr.Mtime = x.now(n)
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
	case *fsop.OpenWindow:
		return x.openDirectory(op)
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
