package brick

import (
	"cmp"
	"slices"

	"mortar/internal/brick/meta"
	"mortar/internal/cluster"
	"mortar/internal/fsop"
)

const (
	maxInoLocks = 2048 // on one inode: each change looks at all of them
	lockEnd     = 1<<63 - 1
)

// conflict returns a lock of somebody else that l must wait for.
func conflict(held []meta.Lock, l *meta.Lock) *meta.Lock {
	for i := range held {
		h := &held[i]
		if h.State == meta.LockHeld && excludes(h, l) {
			return h
		}
	}
	return nil
}

// excludes says whether two locks cannot both be held.
func excludes(h, l *meta.Lock) bool {
	return h.Flock == l.Flock && !sameOwner(h, l) &&
		h.Start <= l.End && l.Start <= h.End &&
		(h.Type == fsop.LockWrite || l.Type == fsop.LockWrite)
}

func sameOwner(a, b *meta.Lock) bool {
	return a.Session == b.Session && a.Owner == b.Owner && a.Flock == b.Flock
}

// setLock returns held as it is after l's owner set l: what l covers is replaced,
// the owner's locks are split where it cuts them, and joined where they touch
// and are of one type. What others had when they went away, and l would have had
// to wait for, is lost to them. gave says that somebody may have been waiting for what
// was given up. held itself is not changed.
func setLock(held []meta.Lock, l *meta.Lock) (after []meta.Lock, gave bool) {
	var own []meta.Lock
	for i := range held {
		h := held[i]
		if !sameOwner(&h, l) {
			if h.State == meta.LockAway && l.Type != fsop.LockUnlock && excludes(&h, l) {
				h.State = meta.LockLost
			}
			after = append(after, h)
			continue
		}
		if h.End < l.Start || h.Start > l.End {
			own = append(own, h)
			continue
		}
		if h.State == meta.LockHeld && (l.Type == fsop.LockUnlock || l.Type == fsop.LockRead && h.Type == fsop.LockWrite) {
			gave = true
		}
		if h.Start < l.Start {
			left := h
			left.End = l.Start - 1
			own = append(own, left)
		}
		if h.End > l.End {
			right := h
			right.Start = l.End + 1
			own = append(own, right)
		}
	}
	if l.Type != fsop.LockUnlock {
		own = append(own, *l)
	}
	slices.SortFunc(own, func(a, b meta.Lock) int { return cmp.Compare(a.Start, b.Start) })
	for i := range own {
		if n := len(after); i > 0 && after[n-1].Type == own[i].Type && after[n-1].State == own[i].State && after[n-1].End+1 == own[i].Start {
			after[n-1].End = own[i].End
			continue
		}
		after = append(after, own[i])
	}
	return after, gave
}

// setlk executes Setlk.
func (x *exec) setlk(op *fsop.Setlk) error {
	n, err := x.node(op.Ino)
	if err != nil {
		return err
	}
	if x.e.Session == 0 {
		return fsop.EINVAL
	}
	l := meta.Lock{Ino: n.Ino, Session: x.e.Session, Lock: op.Lock}
	if l.Flock {
		l.Start, l.End = 0, lockEnd
	}
	l.End = min(l.End, lockEnd)
	if l.Start > l.End {
		return fsop.EINVAL
	}
	held := x.b.locks[n.Ino]
	if l.Type != fsop.LockUnlock {
		if slices.ContainsFunc(held, func(h meta.Lock) bool { return h.State == meta.LockLost && sameOwner(&h, &l) }) {
			return fsop.EIO // its owner relies on what it has lost
		}
		if conflict(held, &l) != nil {
			return fsop.EAGAIN
		}
		if len(held) >= maxInoLocks {
			return fsop.ENOLCK
		}
	}
	after, gave := setLock(held, &l)
	if len(after) > max(maxInoLocks, len(held)) { // unlocking can make two of one
		return fsop.ENOLCK
	}
	x.reply.Attr = n.Attr
	if sameLocks(held, after) {
		return nil
	}
	x.replaceLocks(n.Ino, held, after)
	x.changed = true
	if gave {
		x.released = append(x.released, n.Ino)
	}
	return nil
}

// lockKey is what tells the locks of one inode apart.
type lockKey struct {
	session cluster.SessionID
	owner   uint64
	flock   bool
	start   uint64
}

func keyOf(l *meta.Lock) lockKey { return lockKey{l.Session, l.Owner, l.Flock, l.Start} }

// replaceLocks plans to have the locks after on ino in place of held.
func (x *exec) replaceLocks(ino fsop.Ino, held, after []meta.Lock) {
	was := make(map[lockKey]meta.Lock, len(held))
	for _, h := range held {
		was[keyOf(&h)] = h
	}
	for i := range after {
		k := keyOf(&after[i])
		if old, ok := was[k]; !ok || old != after[i] {
			x.batch.SetLock(&after[i])
		}
		delete(was, k)
	}
	for i := range held {
		if _, gone := was[keyOf(&held[i])]; gone {
			x.batch.DeleteLock(&held[i])
		}
	}
	x.onCommit(func(b *Brick) {
		if len(after) == 0 {
			delete(b.locks, ino)
		} else {
			b.locks[ino] = after
		}
	})
}

func sameLocks(a, b []meta.Lock) bool {
	if len(a) != len(b) {
		return false
	}
	have := make(map[meta.Lock]bool, len(b))
	for _, l := range b {
		have[l] = true
	}
	return !slices.ContainsFunc(a, func(l meta.Lock) bool { return !have[l] })
}

// fenced returns EIO if the entry's session had a lock on the file that another has
// taken since: whoever relied on it changes nothing any more, late or now.
func (x *exec) fenced(ino fsop.Ino) error {
	for _, h := range x.b.locks[ino] {
		if h.Session == x.e.Session && h.State == meta.LockLost {
			return fsop.EIO
		}
	}
	return nil
}

// locksOf plans what becomes of all locks of some sessions: change says whether a
// lock stays, perhaps in another state, and whether somebody may have waited for it.
func (x *exec) locksOf(sessions map[cluster.SessionID]bool, change func(*meta.Lock) (stays, gave bool)) {
	var inos []fsop.Ino
	for ino, held := range x.b.locks {
		if slices.ContainsFunc(held, func(l meta.Lock) bool { return sessions[l.Session] }) {
			inos = append(inos, ino)
		}
	}
	slices.Sort(inos)
	for _, ino := range inos {
		held, gave := x.b.locks[ino], false
		after := slices.DeleteFunc(slices.Clone(held), func(l meta.Lock) bool { return sessions[l.Session] })
		for _, l := range held {
			if sessions[l.Session] {
				stays, g := change(&l)
				gave = gave || g
				if stays {
					after = append(after, l)
				}
			}
		}
		x.replaceLocks(ino, held, after)
		if gave {
			x.released = append(x.released, ino)
		}
	}
}

// locksGo plans to forget the locks of sessions that end.
func (x *exec) locksGo(sessions map[cluster.SessionID]bool) {
	x.locksOf(sessions, func(l *meta.Lock) (bool, bool) { return false, l.State == meta.LockHeld })
}

// locksLeave and locksReturn are for a session that goes away, and comes back.
func (x *exec) locksLeave(id cluster.SessionID) {
	x.locksOf(map[cluster.SessionID]bool{id: true}, func(l *meta.Lock) (stays, gave bool) {
		if gave = l.State == meta.LockHeld; gave {
			l.State = meta.LockAway
		}
		return true, gave
	})
}

func (x *exec) locksReturn(id cluster.SessionID) {
	x.locksOf(map[cluster.SessionID]bool{id: true}, func(l *meta.Lock) (stays, gave bool) {
		if l.State == meta.LockAway {
			l.State = meta.LockHeld
		}
		return true, false
	})
}

// getlk answers Getlk. The asker is known by its owner number alone, which the
// kernel makes of a secret of each mount. b.mu is held.
func (b *Brick) getlk(op *fsop.Getlk) fsop.Lock {
	l := meta.Lock{Ino: op.Ino, Lock: op.Lock}
	if l.Flock {
		l.Start, l.End = 0, lockEnd
	}
	l.End = min(l.End, lockEnd)
	for _, h := range b.locks[op.Ino] {
		l.Session = h.Session
		if conflict([]meta.Lock{h}, &l) != nil {
			return h.Lock
		}
	}
	return fsop.Lock{Type: fsop.LockUnlock}
}
