package oplog

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"slices"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

// nextName is the segment being prepared, and what becomes of it until it has a name of its own (settle).
const nextName = "next.tmp"

// aheadStep is how far beyond its records a write to fresh blocks goes on with
// zeros. The first write to a preallocated block changes file system metadata,
// which the next fdatasync must write to the file system's journal; so one sync
// per aheadStep pays for that instead of every one
// (doc/decisions/0012-log-preallocation.md).
const aheadStep = 256 << 10

// ahead appends zeros to b, which is about to be written at off, if it reaches
// blocks that were never written. l.write is held.
func (s *segment) ahead(b []byte, off, size int64) []byte {
	end := off + int64(len(b))
	if end <= s.zeroed {
		return b
	}
	s.zeroed = max(end, min(roundUp(end, aheadStep), size))
	n := len(b)
	b = slices.Grow(b, int(s.zeroed-end))[:n+int(s.zeroed-end)]
	clear(b[n:])
	return b
}

// writebackStep is after how many bytes the kernel is asked to start writing
// them to the disk, so that the sync of a full segment finds little to do.
const writebackStep = 1 << 20

// wake has the keeper look, if the write of the active segment's bytes from off
// to end made work for it. l.mu is held.
func (l *Log) wake(off, end int64) {
	if off/writebackStep == end/writebackStep && (off >= l.size/2 || end < l.size/2) {
		return
	}
	select {
	case l.kick <- struct{}{}:
	default: // it has not even begun with the last one
	}
}

// A stream of large records is dropped from memory step by step, evictLag behind
// its end, when it is on the disk. Nobody reads it from there: it is shared with
// data files and not copied, and a data file has its own place in the kernel's
// cache. Kept, each GiB of log would push a GiB of somebody's files out; and memory
// that is used again at once is cheaper than memory that is not.
const (
	evictStep = 4 << 20
	evictLag  = 8 << 20
)

// streamed reports whether large records are nearly all of n bytes of log.
func streamed(large, n int64) bool { return large >= n-n/8 }

// keeper does in the background what would otherwise hold up an append: it
// prepares the next segment's file when the active one is half full, has the
// kernel start writing, and drop what is written of a stream.
func (l *Log) keeper() {
	var done, evicted, large int64 // of last
	var last *segment
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if last != nil {
			l.unref(last)
		}
	}()
	for range l.kick {
		l.mu.Lock()
		seg, flushed, largeNow := l.active(), l.active().flushed, l.active().large
		seg.refs++
		prepare := l.usable() == nil && l.prepared == nil && l.nextBusy == nil && flushed >= l.size/2
		if prepare {
			l.nextBusy = make(chan struct{})
		}
		l.mu.Unlock()

		if seg != last {
			l.mu.Lock()
			if last != nil {
				l.unref(last)
			}
			last = seg
			last.refs++
			l.mu.Unlock()
			done, evicted, large = 0, 0, 0
		}
		if flushed/writebackStep > done/writebackStep {
			done = flushed
			// An error here is one that a later sync might not be told again.
			if _, err := seg.file.SyncTo(flushed); err != nil {
				l.poisonLock("writing back", err)
			}
		}
		if to := (flushed - evictLag) / disk.BlockSize * disk.BlockSize; to-evicted >= evictStep {
			if streamed(largeNow-large, to-evicted) {
				l.evict(seg, evicted, to-evicted)
			}
			evicted, large = to, largeNow
		}
		if prepare {
			if err := l.prepare(); err != nil {
				// roll tries again, and has somebody to tell.
				l.logger.Warn("op log: preparing the next segment failed", "dir", l.dir, "err", err)
			}
		}
		l.mu.Lock()
		l.unref(seg)
		l.mu.Unlock()
	}
}

// evict drops n bytes of a segment from memory. It is only a hint.
func (l *Log) evict(s *segment, off, n int64) {
	if err := s.file.Evict(off, n); err != nil {
		l.logger.Debug("op log: dropping a segment from memory", "segment", s.name, "err", err)
	}
}

// prepare makes l.prepared. The caller has set l.nextBusy. Appends go on
// meanwhile; begin waits for it.
func (l *Log) prepare() error {
	f, err := l.allocate()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.prepared = f
	l.nextDone()
	return err
}

// nextDone lets others use nextName. l.mu is held.
func (l *Log) nextDone() {
	close(l.nextBusy)
	l.nextBusy = nil
}

// allocate makes the file of a new segment under nextName. An existing one is
// the rest of a crash and is replaced.
func (l *Log) allocate() (disk.File, error) {
	name := l.fs.PathJoin(l.dir, nextName)
	f, err := l.fs.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return nil, fmt.Errorf("making an op log segment: %w", err)
	}
	if err := f.Allocate(0, l.size); err != nil { // it is synced when it gets its name
		f.Close()
		l.fs.Remove(name) // gives the space back if there was too little of it
		return nil, fmt.Errorf("making an op log segment of %d bytes: %w", l.size, err)
	}
	return f, nil
}

// roll ends the active segment and begins the next one, which has no name yet. Nobody waits here for a
// disk to write: settle does that, in a round of syncs, and only a roll that follows before that is done
// has to wait for it. l.write is held.
func (l *Log) roll() error {
	if err := l.flushLocked(); err != nil {
		return err
	}
	seg, err := l.create(l.active().num, l.Tail())
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unnamed = seg
	l.add(seg)
	l.startRounds()
	return nil
}

// settle gives the active segment its name, if it has none yet, when what was before it and its own header are
// synced: only the last segment that has a name may end in records that were not, since what a crash leaves in
// the middle of the log would look like corruption. One goroutine does it and others wait for it; it does not
// need l.write.
func (l *Log) settle() error {
	l.mu.Lock()
	for l.naming != nil {
		done := l.naming
		l.mu.Unlock()
		<-done
		l.mu.Lock()
	}
	seg, err := l.unnamed, l.usable()
	if seg == nil || err != nil {
		l.mu.Unlock()
		return err
	}
	old, written, dirty := l.segments[len(l.segments)-2], l.written, l.durable < seg.base.Seq // TrimBefore leaves it there
	old.refs++
	seg.refs++
	l.naming = make(chan struct{})
	l.mu.Unlock()

	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.unref(old)
		l.unref(seg)
		close(l.naming)
		l.naming = nil
	}()
	if dirty {
		if err := old.file.SyncData(); err != nil {
			return l.poisonLock("syncing "+segmentName(old.num), err)
		}
	}
	l.mu.Lock()
	l.proven(seg.base.Seq)
	stream := streamed(old.large, old.flushed)
	l.mu.Unlock()
	if stream {
		l.evict(old, 0, 0)
	}
	if err := l.name(seg); err != nil {
		return l.poisonLock("naming "+segmentName(seg.num), err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unnamed = nil
	l.nextDone()
	l.proven(written)
	return nil
}

// proven says that every record up to seq is synced, in segments that have their names. l.mu is held.
func (l *Log) proven(seq uint64) {
	if seq > l.durable {
		l.durable = seq
		l.wakeSyncs()
	}
}

// name makes a segment's header, and what else is in it, durable under its name.
func (l *Log) name(seg *segment) error {
	if err := seg.file.Sync(); err != nil {
		return err
	}
	if err := l.fs.Rename(l.fs.PathJoin(l.dir, nextName), seg.name); err != nil {
		return err
	}
	return l.fs.SyncDir(l.dir)
}

// begin makes a new active segment that continues segment prev after base. What
// prev has after base, and the segments after prev, are void from the moment
// that the new one has its name; with prev 0 everything is. l.write is held, and the
// active segment, if there is one, has its name.
func (l *Log) begin(prev uint64, base cluster.Pos) error {
	seg, err := l.create(prev, base)
	if err != nil {
		return err
	}
	err = l.name(seg)
	l.mu.Lock()
	l.nextDone()
	l.mu.Unlock()
	if err != nil {
		seg.file.Close()
		return l.poisonLock("naming "+segmentName(seg.num), err)
	}
	if err := l.reopen(seg); err != nil {
		return l.poisonLock("opening a segment", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.add(seg)
	return nil
}

// reopen opens a segment's file under the name that it has got, so that its errors say where it can be found.
func (l *Log) reopen(seg *segment) error {
	seg.file.Close() // it was synced
	f, err := l.fs.OpenFile(seg.name, os.O_RDWR)
	if err == nil {
		seg.file = f
	}
	return err
}

// create makes a segment that is to continue segment prev after base: a file under nextName, with a header, of which
// nothing is synced. The caller has l.nextBusy set if it succeeds, and l.write.
func (l *Log) create(prev uint64, base cluster.Pos) (*segment, error) {
	if err := l.settle(); err != nil { // nextName may still be the active segment's
		return nil, err
	}
	l.mu.Lock()
	for l.nextBusy != nil {
		done := l.nextBusy
		l.mu.Unlock()
		<-done
		l.mu.Lock()
	}
	l.nextBusy = make(chan struct{})
	f := l.prepared
	l.prepared = nil
	seg := &segment{
		segmentHeader: segmentHeader{num: l.next, prev: prev, base: base, history: slices.Clone(l.history)},
		refs:          1,
	}
	l.mu.Unlock()
	var salt [8]byte
	rand.Read(salt[:]) // never fails, crypto/rand
	seg.salt = le.Uint64(salt[:])
	seg.setSeed()
	seg.name = l.fs.PathJoin(l.dir, segmentName(seg.num))
	err := error(nil)
	if f == nil {
		f, err = l.allocate()
	}
	if err == nil {
		if _, err = f.WriteAt(seg.encode(), 0); err != nil {
			f.Close() // a file that means nothing
			err = fmt.Errorf("making op log segment %s: %w", seg.name, err)
		}
	}
	if err != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.nextDone()
		return nil, err
	}
	seg.file = f
	seg.flushed, seg.end, seg.alloc = seg.size(), seg.size(), max(l.size, seg.size())
	seg.zeroed = seg.size()
	return seg, nil
}

// add makes a segment the active one. l.mu is held.
func (l *Log) add(seg *segment) {
	l.next = seg.num + 1
	l.segments = append(slices.Clip(l.segments), seg)
	l.tracked += seg.alloc
}

// remove deletes a segment's file. Whoever has it open can go on reading.
func (l *Log) remove(seg *segment) error {
	if err := l.fs.Remove(seg.name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.segments = slices.DeleteFunc(slices.Clone(l.segments), func(s *segment) bool { return s == seg })
	l.tracked -= seg.alloc
	l.unref(seg)
	return nil
}

// TrimBefore drops the segments of which every record is older than seq. The
// active segment stays, and the one before it as long as that has no name.
func (l *Log) TrimBefore(seq uint64) error {
	l.write.Lock()
	defer l.write.Unlock()
	trimmed := false
	for {
		l.mu.Lock()
		if err := l.writable(); err != nil {
			l.mu.Unlock()
			return err
		}
		if len(l.segments) < 2 || l.segments[1].base.Seq >= seq || l.segments[1] == l.unnamed {
			l.mu.Unlock()
			break
		}
		oldest := l.segments[0]
		// From here on nobody reads there, whether the file goes or not.
		l.setBase(l.segments[1].base)
		l.mu.Unlock()
		if err := l.remove(oldest); err != nil {
			return l.poisonLock("trimming", err)
		}
		trimmed = true
	}
	if !trimmed {
		return nil
	}
	// A trimmed segment that comes back after a crash harms nobody, but the
	// ones after it must not be lost before it.
	if err := l.fs.SyncDir(l.dir); err != nil {
		return l.poisonLock("trimming", err)
	}
	return nil
}

// setBase moves the log's start forward. l.mu is held.
func (l *Log) setBase(base cluster.Pos) {
	l.base = base
	h := l.history
	for len(h) > 1 && h[1].Seq <= base.Seq {
		h = h[1:]
	}
	l.history = slices.Clone(h)
}

// writable is usable for those who change files. l.mu is held.
func (l *Log) writable() error {
	if l.ro {
		return ErrReadOnly
	}
	return l.usable()
}

// TruncateAfter removes every record after seq, durably and at once: they were
// never committed. It fails with ErrTrimmed if seq is before the base.
//
// Nothing is overwritten. A new segment that continues the log after seq is
// what makes the records after it void; see doc.go.
func (l *Log) TruncateAfter(seq uint64) error {
	l.write.Lock()
	defer l.write.Unlock()
	l.mu.Lock()
	err, base, tail := l.writable(), l.base, l.tail
	l.mu.Unlock()
	switch {
	case err != nil:
		return err
	case seq >= tail.Seq:
		return nil
	case seq < base.Seq:
		return fmt.Errorf("undoing the changes after %d, the op log begins after %v: %w", seq, base, ErrTrimmed)
	}
	if err := l.flushLocked(); err != nil {
		return err
	}
	if err := l.settle(); err != nil {
		return err
	}
	seg := l.find(seq)
	at, pos, err := l.locate(seg, seq+1)
	if err != nil {
		return err
	}
	// A segment that is continued must be durable as far as it is. If it is not
	// the active one, roll has seen to that.
	if seg == l.active() && l.Durable() < seq {
		if err := seg.file.SyncData(); err != nil {
			return l.poisonLock("syncing", err)
		}
	}
	l.mu.Lock()
	before := l.history
	l.history = slices.DeleteFunc(slices.Clone(before), func(p cluster.Pos) bool { return p.Seq > seq })
	l.mu.Unlock()
	if err := l.begin(seg.num, pos); err != nil {
		l.mu.Lock()
		l.history = before
		l.mu.Unlock()
		return err
	}
	l.mu.Lock()
	l.cuts++ // readers of the tail learn that it is gone; a sync that runs proves nothing
	l.tail = pos
	l.durable, l.written = seq, seq
	for n := len(seg.index); n > 0 && seg.index[n-1].off >= at; n-- {
		seg.index = seg.index[:n-1]
	}
	l.tracked += at - seg.alloc
	seg.flushed, seg.end, seg.alloc = at, at, at
	i := slices.Index(l.segments, seg)
	void := l.segments[i+1 : len(l.segments)-1]
	l.mu.Unlock()
	if err := seg.file.Truncate(at); err != nil { // only for the space
		return l.poisonLock("undoing changes", err)
	}
	return l.removeAll(void)
}

// removeAll deletes segments that are no longer part of the log, durably.
func (l *Log) removeAll(segs []*segment) error {
	for _, seg := range slices.Clone(segs) {
		if err := l.remove(seg); err != nil {
			return l.poisonLock("removing a segment", err)
		}
	}
	if err := l.fs.SyncDir(l.dir); err != nil {
		return l.poisonLock("removing a segment", err)
	}
	return nil
}

// Reset empties the log, durably and at once; it goes on after base. history is
// what History shall return: the first position of each epoch up to base's, of
// which it may have as many or as few as are known, base's at least.
func (l *Log) Reset(base cluster.Pos, history []cluster.Pos) error {
	if err := checkHistory(base, history); err != nil {
		return fmt.Errorf("reset of the op log: %w", err)
	}
	l.write.Lock()
	defer l.write.Unlock()
	l.mu.Lock()
	if err := l.writable(); err != nil {
		l.mu.Unlock()
		return err
	}
	l.mu.Unlock()
	if err := l.flushLocked(); err != nil { // nobody needs it, but the buffer must be empty
		return err
	}
	l.mu.Lock()
	before := l.history
	l.history = slices.Clone(history)
	l.mu.Unlock()
	if err := l.begin(0, base); err != nil {
		l.mu.Lock()
		l.history = before
		l.mu.Unlock()
		return err
	}
	l.mu.Lock()
	old := l.segments[:len(l.segments)-1]
	l.cuts++
	l.base, l.tail = base, base
	l.durable, l.written = base.Seq, base.Seq
	l.mu.Unlock()
	return l.removeAll(old)
}

// Close writes and syncs what was appended and closes the files. Open Segments
// stay usable. A log that failed is only closed, and the failure returned.
func (l *Log) Close() error {
	err := error(nil)
	if !l.ro {
		err = l.SyncAll()
		if serr := l.settle(); err == nil {
			err = serr
		}
	}
	l.write.Lock()
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		l.write.Unlock()
		return nil
	}
	l.closed = true
	if !l.ro {
		close(l.kick) // whoever sends holds l.write and has seen the log open
	}
	l.mu.Unlock()
	l.write.Unlock()
	l.keeping.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, seg := range l.segments {
		l.unref(seg)
	}
	if l.prepared != nil {
		l.prepared.Close()
		l.prepared = nil
	}
	return err
}
