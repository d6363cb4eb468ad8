package mount

import (
	"context"
	"errors"
	"math"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"mortar/internal/estate"
	"mortar/internal/fsop"
)

// lockTable knows which owners may hold fcntl locks on which inodes, so that
// closing a file without locks costs nothing, and whose locks are still being
// released although nobody waits for it.
type lockTable struct {
	mu   sync.Mutex
	held map[lockKey]uint64 // through which open file, at last
	// byHandle has the locks that were taken through an open file, whose close
	// the kernel may not tell (FOPEN_NOFLUSH) but whose end it does.
	byHandle map[uint64]map[lockKey]struct{}
	// exclusive has those of held who may have a lock that nobody shares, and as
	// the how manieth they were granted one at last.
	exclusive map[lockKey]uint64
	grants    uint64
	// loose has what goes on for an owner without anybody waiting: the release
	// of what he left behind, and requests that he gave up but may be granted.
	// The kernel gives an owner's number to the next one at once, so another
	// request of that number waits, or would lose its lock to such a release.
	loose map[lockKey]*looseEnds

	// The next process has to release them all, so they are written down.
	estate *estate.Table
	serial map[lockKey]uint64 // under what
	last   uint64
}

type looseEnds struct {
	n    int
	tied chan struct{} // closed when n gets to 0
	left bool          // by a close that has returned
}

type lockKey struct {
	ino   fsop.Ino
	owner uint64
	flock bool
}

// What is said of a lock in the estate.
const (
	lockFlock = 1 << iota
	lockLoose // nobody has it any more
)

// noteLocked writes down what is known of k.
func (t *lockTable) noteLocked(k lockKey) {
	fh, held := t.held[k]
	loose := t.loose[k] != nil
	serial, noted := t.serial[k]
	if !held {
		delete(t.exclusive, k)
	}
	switch {
	case !held && !loose:
		if noted {
			t.estate.Delete(serial)
			delete(t.serial, k)
		}
		return
	case !noted:
		t.last++
		serial = t.last
		t.serial[k] = serial
	}
	kind := uint64(0)
	if k.flock {
		kind |= lockFlock
	}
	if !held {
		kind |= lockLoose
	}
	t.estate.Put(serial, uint64(k.ino), k.owner, fh, kind)
}

// inherit takes the locks of the process before this one, and returns those that nobody has any more.
func (t *lockTable) inherit(l *estate.Left) (loose []lockKey) {
	for _, r := range l.Locks {
		k := lockKey{fsop.Ino(r.Values[0]), r.Values[1], r.Values[3]&lockFlock != 0}
		if r.Values[3]&lockLoose != 0 {
			loose = append(loose, k)
		} else {
			t.add(k, r.Values[2])
			t.granted(k) // perhaps
		}
	}
	return loose
}

func newLockTable(e *estate.Estate) *lockTable {
	return &lockTable{
		held:      make(map[lockKey]uint64),
		byHandle:  make(map[uint64]map[lockKey]struct{}),
		exclusive: make(map[lockKey]uint64),
		loose:     make(map[lockKey]*looseEnds),
		estate:    e.Locks,
		serial:    make(map[lockKey]uint64),
	}
}

func (t *lockTable) add(k lockKey, fh uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.held[k] = fh
	if t.byHandle[fh] == nil {
		t.byHandle[fh] = make(map[lockKey]struct{})
	}
	t.byHandle[fh][k] = struct{}{}
	t.noteLocked(k)
}

// granted says that k was granted a lock that nobody shares.
func (t *lockTable) granted(k lockKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, held := t.held[k]; held {
		t.grants++
		t.exclusive[k] = t.grants
	}
}

// exclusiveSince returns which grant of all was the last that gave k a lock that
// nobody shares, 0 if it certainly has none.
func (t *lockTable) exclusiveSince(k lockKey) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.exclusive[k]
}

// released says that what k was granted up to a grant is released. Another thread of
// the owner may have been granted more meanwhile.
func (t *lockTable) released(k lockKey, since uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.exclusive[k] == since {
		delete(t.exclusive, k)
	}
}

// take says whether k is there. If so it is loose from then on, until tie is called.
func (t *lockTable) take(k lockKey) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.held[k]
	if ok {
		delete(t.held, k)
		t.loosenLocked(k)
	}
	return ok
}

// takeHandle returns the locks taken through fh that are still held. They are loose from then on, until tie is called.
func (t *lockTable) takeHandle(fh uint64) []lockKey {
	t.mu.Lock()
	defer t.mu.Unlock()
	var keys []lockKey
	for k := range t.byHandle[fh] {
		if t.held[k] == fh { // else somebody locked through another file since
			delete(t.held, k)
			t.loosenLocked(k)
			t.loose[k].left = true
			keys = append(keys, k)
		}
	}
	delete(t.byHandle, fh)
	return keys
}

// loosen says that something goes on for k until tie is called.
func (t *lockTable) loosen(k lockKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.loosenLocked(k)
}

// leave is loosen for what a close left behind.
func (t *lockTable) leave(k lockKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.loosenLocked(k)
	t.loose[k].left = true
}

// left returns a channel that is closed when a lock of ino is released that a close left behind, or nil.
func (t *lockTable) left(ino fsop.Ino) <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, l := range t.loose {
		if k.ino == ino && l.left {
			return l.tied
		}
	}
	return nil
}

func (t *lockTable) loosenLocked(k lockKey) {
	l := t.loose[k]
	if l == nil {
		l = &looseEnds{tied: make(chan struct{})}
		t.loose[k] = l
	}
	l.n++
	t.noteLocked(k)
}

func (t *lockTable) tie(k lockKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.loose[k]
	if l.n--; l.n == 0 {
		delete(t.loose, k)
		close(l.tied)
		t.noteLocked(k)
	}
}

// tied returns a channel that is closed when nothing goes on for k, or nil.
func (t *lockTable) tied(k lockKey) <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l := t.loose[k]; l != nil {
		return l.tied
	}
	return nil
}

func lockOf(in *fuse.LkIn) fsop.Lock {
	l := fsop.Lock{
		Owner: in.Owner,
		Flock: in.LkFlags&fuse.LK_FLOCK != 0,
		Type:  fsop.LockType(in.Lk.Typ),
		Start: in.Lk.Start,
		End:   in.Lk.End,
		PID:   in.Lk.Pid,
	}
	if l.Flock {
		// The open file is the owner. The kernel's number of an owner is used again
		// as soon as the file is closed, maybe before RELEASE arrives here; ours of
		// the open file is not.
		l.Owner, l.Start, l.End = in.Fh, 0, math.MaxInt64
	}
	return l
}

// GetLk implements fuse.RawFileSystem.
func (f *fileSystem) GetLk(cancel <-chan struct{}, in *fuse.LkIn, out *fuse.LkOut) fuse.Status {
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	f.awaitLeft(r, fsop.Ino(in.NodeId))
	reply, err := f.handler.Do(r, &fsop.Getlk{Ino: fsop.Ino(in.NodeId), Lock: lockOf(in)})
	if err != nil {
		return f.status(r, err)
	}
	l := &reply.Lock
	out.Lk = fuse.FileLock{Start: l.Start, End: l.End, Typ: uint32(l.Type), Pid: l.PID}
	return fuse.OK
}

// SetLk implements fuse.RawFileSystem.
func (f *fileSystem) SetLk(cancel <-chan struct{}, in *fuse.LkIn) fuse.Status {
	return f.setLk(cancel, in, false)
}

// SetLkw implements fuse.RawFileSystem.
func (f *fileSystem) SetLkw(cancel <-chan struct{}, in *fuse.LkIn) fuse.Status {
	return f.setLk(cancel, in, true)
}

// awaitLeft returns when the locks of ino are released whose files were closed on this machine before
// the request came. The kernel tells of the last close of a file by a request that close does not
// wait for; but it has sent that one when close returns, so it is read before
// what comes of whoever was told of the close.
func (f *fileSystem) awaitLeft(r *request, ino fsop.Ino) {
	for c := f.locks.left(ino); c != nil; c = f.locks.left(ino) {
		select {
		case <-c:
		case <-r.Done():
			return
		}
	}
}

func (f *fileSystem) setLk(cancel <-chan struct{}, in *fuse.LkIn, wait bool) fuse.Status {
	if in.Lk.Typ > uint32(fsop.LockUnlock) {
		return fuse.EINVAL
	}
	op := &fsop.Setlk{Ino: fsop.Ino(in.NodeId), Lock: lockOf(in), Wait: wait}
	unlock := op.Lock.Type == fsop.LockUnlock
	k := lockKey{op.Ino, op.Lock.Owner, op.Lock.Flock}
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	for c := f.locks.tied(k); c != nil; c = f.locks.tied(k) {
		select {
		case <-c:
		case <-cancel:
			return fuse.EINTR
		}
	}
	if !unlock {
		f.awaitLeft(r, op.Ino)
	}
	// Of those with flock nobody keeps account.
	since := f.locks.exclusiveSince(k)
	if (since != 0 || k.flock) && op.Lock.Type != fsop.LockWrite && f.nodes.marksOf(op.Ino)&storable != 0 {
		f.writeOut(r, op.Ino)
	}
	if !unlock && !op.Lock.Flock { // before it is sent: an answer may never come
		f.nodes.mark(op.Ino, lockable)
		f.locks.add(k, in.Fh)
	}
	var st fuse.Status
	if !wait || unlock {
		_, err := f.handler.Do(r, op)
		st = f.status(r, err)
	} else {
		st = f.waitForLock(r, op, k)
	}
	if st != fuse.OK {
		return st
	}
	switch op.Lock.Type {
	case fsop.LockUnlock:
		if op.Lock.Start == 0 && op.Lock.End == math.MaxInt64 {
			f.locks.released(k, since)
		}
		return st
	case fsop.LockWrite:
		f.locks.granted(k)
	}
	// What the one before wrote took pages back here, and Invalidate does not
	// wait long for that (see pagePatience): a mapping must not show them now.
	f.pages.await(r, op.Ino)
	return st
}

// writeOut returns when what programs stored through shared mappings of ino was
// written: whoever locks it next expects to see that, and the kernel would write it when it
// likes. It has the kernel do what msync does, which keeps the pages. Where nobody can do that
// the pages are dropped, which writes them, too. What cannot be
// written, msync or fsync says to the program, as ever.
func (m *Mount) writeOut(r *request, ino fsop.Ino) {
	asked, err := m.asker.ask(r.Done(), toStore, ino)
	if err == nil && (asked.err == nil || asked.err == unix.ESTALE) || r.Err() != nil {
		return
	}
	m.log.Debug("mount: pages are dropped before an unlock", "ino", uint64(ino), "err", errors.Join(err, asked.err))
	select {
	case <-m.pages.add(m.dev, ino):
	case <-r.Done():
	}
}

// waitForLock asks for a lock until it is granted or the caller is interrupted.
//
// The handler takes the request of a caller who gives up back, and says whether it had
// been granted: then it is the caller's. He waits for that for takeBackPatience; should it take
// longer, or he be killed, he is told EINTR, and what he had been granted is unlocked when that is
// known. Until then the owner's next request waits, so that the late unlock cannot hit
// a lock that was asked for again.
func (f *fileSystem) waitForLock(r *request, op *fsop.Setlk, k lockKey) fuse.Status {
	result := make(chan error, 1)
	ctx, giveUp := context.WithCancel(context.WithValue(f.life, estate.RequestKey{}, r))
	f.start(func() {
		defer giveUp()
		for {
			_, err := f.handler.Do(ctx, op)
			if err == fsop.EAGAIN && ctx.Err() == nil {
				continue // whoever wants to wait longer asks again
			}
			result <- err
			return
		}
	})
	select {
	case err := <-result:
		return f.status(r, err)
	case <-r.cancel:
	}
	giveUp()
	patience := time.NewTimer(takeBackPatience)
	defer patience.Stop()
	select {
	case err := <-result:
		if err == nil {
			return fuse.OK
		}
		return fuse.EINTR
	case <-patience.C:
	case <-r.Done():
	}
	f.locks.loosen(k)
	f.start(func() {
		defer f.locks.tie(k)
		if err := <-result; err == nil {
			f.unlock(op.Ino, op.Lock)
		}
	})
	return fuse.EINTR
}

// takeBackPatience is how long a caller who was interrupted waits to hear whether he has the
// lock, unless he is being killed: as long as a fail-over may take.
const takeBackPatience = 2 * time.Second

// unlock releases a lock whose owner is not there to be told of a failure. The
// handler tries for as long as it takes, or until the file system is unmounted,
// which ends all locks.
func (m *Mount) unlock(ino fsop.Ino, l fsop.Lock) {
	l.Type = fsop.LockUnlock
	if _, err := m.handler.Do(m.life, &fsop.Setlk{Ino: ino, Lock: l}); err != nil && m.life.Err() == nil {
		m.log.Warn("mount: unlock", "ino", uint64(ino), "err", err)
	}
}

// Flush implements fuse.RawFileSystem. It comes with every close of a file that
// was opened for writing: what was written to it has to arrive, and the closing
// process's fcntl locks on it go.
func (f *fileSystem) Flush(cancel <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	if f.o.LocksNode {
		return fuse.ENOSYS
	}
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	// Errors of writes that were answered before they were carried out surface
	// here, and before the lock that guarded them is given up.
	ino := fsop.Ino(in.NodeId)
	reply, err := f.handler.Do(r, &fsop.Flush{Ino: ino})
	if err == nil && reply.Attr.Ino == ino {
		f.nodes.changed(ino, &reply.Attr, reply.Seq, r.began)
	}
	if err == nil && reply.Dir.Ino != 0 {
		f.nodes.changed(reply.Dir.Ino, &reply.Dir, reply.Seq, r.began)
	}
	written := f.status(r, err)
	k := lockKey{ino: fsop.Ino(in.NodeId), owner: in.LockOwner}
	if !f.locks.take(k) {
		return written
	}
	select {
	case <-f.unlockLater(k):
	case <-r.Done(): // the closer is being killed, the unlock goes on
	}
	return written
}

// unlockLater releases all that k has, which is loose, and returns a channel that is closed
// when that is done.
func (f *Mount) unlockLater(k lockKey) <-chan struct{} {
	unlocked := make(chan struct{})
	f.start(func() {
		f.unlock(k.ino, fsop.Lock{Owner: k.owner, Flock: k.flock, End: math.MaxInt64})
		f.locks.tie(k)
		close(unlocked)
	})
	return unlocked
}

// Release implements fuse.RawFileSystem.
func (f *fileSystem) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	f.released(fsop.Ino(in.NodeId), in.Fh, in.ReleaseFlags)
}

// released is told when nobody has an open file any more; its flock goes, and what FLUSH did not get to see.
// Nobody waits for it, so neither does it.
func (f *fileSystem) released(ino fsop.Ino, fh uint64, flags uint32) {
	if flags&fuse.FUSE_RELEASE_FLOCK_UNLOCK != 0 {
		k := lockKey{ino, fh, true}
		f.locks.leave(k)
		f.unlockLater(k)
	}
	for _, k := range f.locks.takeHandle(fh) {
		f.unlockLater(k)
	}
}
