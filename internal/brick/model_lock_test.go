package brick

import (
	"mortar/internal/cluster"
	"mortar/internal/fsop"
)

type mOwner struct {
	session cluster.SessionID
	owner   uint64
}

type mHeld struct {
	typ   fsop.LockType
	pid   uint32
	state string // "": held; "away", "lost"
}

// lockBytes is the range in which tests lock; everything behind it counts as
// the last byte.
const lockBytes = 12

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
