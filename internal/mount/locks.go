package mount

import (
	"math"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"

	"mortar/internal/fsop"
)

// lockTable knows which owners may hold fcntl locks on which inodes, so that
// closing a file without locks costs nothing, and which lock requests were
// given up by a signal while the cluster may still grant them.
type lockTable struct {
	mu   sync.Mutex
	held map[lockKey]struct{}
	// byHandle has the locks that were taken through an open file, whose close
	// the kernel may not tell (FOPEN_NOFLUSH) but whose end it does.
	byHandle map[uint64]map[lockKey]struct{}
	// waits has the requests of an owner that were given up; another request of
	// that owner waits for them, or their late grant could be taken for its own.
	waits map[lockKey]chan struct{}
}

type lockKey struct {
	ino   fsop.Ino
	owner uint64
	flock bool
}

func newLockTable() *lockTable {
	return &lockTable{
		held:     make(map[lockKey]struct{}),
		byHandle: make(map[uint64]map[lockKey]struct{}),
		waits:    make(map[lockKey]chan struct{}),
	}
}

func (t *lockTable) add(k lockKey, fh uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.held[k] = struct{}{}
	if t.byHandle[fh] == nil {
		t.byHandle[fh] = make(map[lockKey]struct{})
	}
	t.byHandle[fh][k] = struct{}{}
}

// take removes k, and says whether it was there.
func (t *lockTable) take(k lockKey) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.held[k]
	delete(t.held, k)
	return ok
}

// takeHandle removes the locks taken through fh that are still held.
func (t *lockTable) takeHandle(fh uint64) []lockKey {
	t.mu.Lock()
	defer t.mu.Unlock()
	var keys []lockKey
	for k := range t.byHandle[fh] {
		if _, ok := t.held[k]; ok {
			delete(t.held, k)
			keys = append(keys, k)
		}
	}
	delete(t.byHandle, fh)
	return keys
}

// givenUp returns a channel that is closed when no request of k is given up
// and undecided, or nil if there is none.
func (t *lockTable) givenUp(k lockKey) <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c, ok := t.waits[k]; ok {
		return c
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
		l.Start, l.End = 0, math.MaxInt64
	}
	return l
}

// GetLk implements fuse.RawFileSystem.
func (f *fileSystem) GetLk(cancel <-chan struct{}, in *fuse.LkIn, out *fuse.LkOut) fuse.Status {
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
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

func (f *fileSystem) setLk(cancel <-chan struct{}, in *fuse.LkIn, wait bool) fuse.Status {
	if in.Lk.Typ > uint32(fsop.LockUnlock) {
		return fuse.EINVAL
	}
	op := &fsop.Setlk{Ino: fsop.Ino(in.NodeId), Lock: lockOf(in), Wait: wait}
	unlock := op.Lock.Type == fsop.LockUnlock
	k := lockKey{op.Ino, op.Lock.Owner, op.Lock.Flock}
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	if c := f.locks.givenUp(k); c != nil {
		select {
		case <-c:
		case <-cancel:
			return fuse.EINTR
		}
	}
	if !unlock && !op.Lock.Flock { // before it is sent: an answer may never come
		f.locks.add(k, in.Fh)
	}
	if !wait || unlock {
		_, err := f.handler.Do(r, op)
		return f.status(r, err)
	}
	return f.waitForLock(r, op, k)
}

// waitForLock asks for a lock until it is granted or the caller is interrupted.
//
// The request of a caller who gave up may still be granted. It is left to run
// its course, fsop.LockWait at most, and what it gets is unlocked; until then the
// owner's next request waits, so that the late unlock cannot hit a lock that
// was asked for again.
func (f *fileSystem) waitForLock(r *request, op *fsop.Setlk, k lockKey) fuse.Status {
	result := make(chan error, 1)
	gaveUp := make(chan struct{})
	f.start(func() {
		for {
			_, err := f.handler.Do(f.life, op)
			if err == fsop.EAGAIN {
				select {
				case <-gaveUp:
				case <-f.life.Done():
				default:
					continue // whoever wants to wait longer asks again
				}
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
	settled := make(chan struct{})
	f.locks.mu.Lock()
	f.locks.waits[k] = settled
	f.locks.mu.Unlock()
	close(gaveUp)
	f.start(func() {
		if err := <-result; err == nil {
			f.unlock(op.Ino, op.Lock)
		}
		f.locks.mu.Lock()
		delete(f.locks.waits, k)
		f.locks.mu.Unlock()
		close(settled)
	})
	return fuse.EINTR
}

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
	_, err := f.handler.Do(r, &fsop.Flush{Ino: fsop.Ino(in.NodeId)})
	written := f.status(r, err)
	k := lockKey{ino: fsop.Ino(in.NodeId), owner: in.LockOwner}
	if !f.locks.take(k) {
		return written
	}
	unlocked := make(chan struct{})
	f.start(func() {
		f.unlock(k.ino, fsop.Lock{Owner: k.owner, End: math.MaxInt64})
		close(unlocked)
	})
	select {
	case <-unlocked:
	case <-r.Done(): // the closer is being killed, the unlock goes on
	}
	return written
}

// Release implements fuse.RawFileSystem. It comes when nobody has the open file
// any more; its flock goes, and what FLUSH did not get to see. Nobody waits for
// it, so neither does it.
func (f *fileSystem) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	ino := fsop.Ino(in.NodeId)
	var left []fsop.Lock
	if in.ReleaseFlags&fuse.FUSE_RELEASE_FLOCK_UNLOCK != 0 {
		left = append(left, fsop.Lock{Owner: in.LockOwner, Flock: true, End: math.MaxInt64})
	}
	for _, k := range f.locks.takeHandle(in.Fh) {
		left = append(left, fsop.Lock{Owner: k.owner, End: math.MaxInt64})
	}
	if len(left) == 0 {
		return
	}
	f.start(func() {
		for _, l := range left {
			f.unlock(ino, l)
		}
	})
}
