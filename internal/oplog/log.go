package oplog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

var (
	// ErrTrimmed says that the log no longer has what was asked for: the
	// records were dropped by TrimBefore, or never came here (Reset).
	ErrTrimmed = errors.New("the op log does not reach back that far")
	// ErrClosed says that the log was closed.
	ErrClosed = errors.New("the op log is closed")
	// ErrReadOnly says that the log was opened for reading.
	ErrReadOnly = errors.New("the op log was opened read-only")
	// ErrPosition says that a record's position does not follow the log's tail.
	ErrPosition = errors.New("the position does not continue the op log")
)

// ErrCorrupt says that bytes which were once durable are not what they were.
// The brick must not be used before it was healed from another one.
type ErrCorrupt struct {
	File   string
	Offset int64 // in File, bytes
	Reason string
}

func (e *ErrCorrupt) Error() string {
	return fmt.Sprintf("op log file %s is damaged at offset %d: %s", e.File, e.Offset, e.Reason)
}

// DefaultSegmentSize is the size of a segment file in bytes.
const DefaultSegmentSize = 64 << 20

// maxSegmentSize keeps offsets within 32 bits, which record checksums rely on.
const maxSegmentSize = 1 << 30

// Options say how to open a log.
type Options struct {
	FS  disk.FS
	Dir string // of the segments; made if it does not exist
	// SegmentSize is the size of new segments in bytes; 0: DefaultSegmentSize.
	// A single record that is larger gets a larger segment.
	SegmentSize int64
	// ReadOnly opens the log as it is and changes nothing on disk: a torn tail
	// is ignored and not cut.
	ReadOnly bool
	Log      *slog.Logger // nil: none
}

// Loc says where a payload lies: Len bytes from offset Off of segment number
// Segment. It is valid until the segment is trimmed or the record truncated.
type Loc struct {
	Segment uint64
	Off     int64
	Len     int
}

// Log is an op log on disk.
//
// Appends come from one goroutine at a time, in the order of their positions.
// Everything else may be called concurrently with them and with itself.
//
// Lock order: write before mu.
type Log struct {
	fs      disk.FS
	dir     string
	size    int64 // of new segments
	ro      bool
	logger  *slog.Logger
	keeping sync.WaitGroup // the keeper and the running sync round
	kick    chan struct{}  // wakes the keeper

	// write is held by whoever writes to the active segment's file or changes
	// the list of segments. Readers and syncs do not need it.
	write sync.Mutex
	spare []byte // the buffer not in use; guarded by write

	// mu guards what follows. It is never held over a system call.
	mu       sync.Mutex
	err      error         // why the log serves no more; never reset
	failed   chan struct{} // closed with err set
	closed   bool
	segments []*segment // oldest first, at least one; the last is the active one
	next     uint64     // the number that the next new segment gets
	base     cluster.Pos
	tail     cluster.Pos
	history  []cluster.Pos
	tracked  int64 // size of all segment files, bytes

	// The active segment's bytes from flushed to end are in flight, which a
	// write call is about to make part of the file, followed by buffered.
	flight   []byte
	buffered []byte
	written  uint64 // every record up to it was handed to the kernel

	durable uint64        // every record up to it was synced
	wanted  uint64        // the highest sequence that a Sync waits for
	syncing bool          // a round is running
	round   chan struct{} // closed and replaced when a round ends
	cuts    uint64        // counts TruncateAfter and Reset: a round that spans one proves nothing

	prepared disk.File     // the next segment's file, allocated, under nextName; nil: none
	nextBusy chan struct{} // set while somebody makes or renames nextName, closed afterwards
	unnamed  *segment      // the active one, if it is still nextName; then nextBusy is set
	naming   chan struct{} // set while somebody gives it its name, closed afterwards
}

// segment is one file of the log.
type segment struct {
	segmentHeader
	name string // path
	file disk.File
	// index has the place of a record about every indexStep bytes. Guarded by
	// Log.mu; of the sealed segments found at open it is nil until somebody reads.
	index   []mark
	flushed int64 // the file has everything before it; guarded by Log.mu
	end     int64 // where the next record goes; guarded by Log.mu
	alloc   int64 // size of the file; guarded by Log.mu
	zeroed  int64 // the blocks before it were written once; guarded by Log.write
	large   int64 // bytes of records that were written each by itself; guarded by Log.mu
	refs    int   // the log and open Segments and syncs; guarded by Log.mu
}

// mark says where the record of a sequence starts.
type mark struct {
	seq uint64
	off int64
}

const (
	indexStep = 64 << 10
	// flushAt is how much is buffered before an append writes it out itself.
	flushAt = 1 << 20
	// directSize is the payload size from which copying into the buffer costs
	// more than a write call of its own.
	directSize = 64 << 10
)

// Tail returns the position of the last record, or Base if there is none.
func (l *Log) Tail() cluster.Pos {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.tail
}

// First returns the sequence of the oldest record, 0 if the log is empty.
func (l *Log) First() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tail.Seq == l.base.Seq {
		return 0
	}
	return l.base.Seq + 1
}

// Base returns the position just before the first record.
func (l *Log) Base() cluster.Pos {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.base
}

// History returns the first position of each epoch that the log has records of,
// and of the base's epoch, oldest first. The base's epoch may have begun long
// before the base.
func (l *Log) History() []cluster.Pos {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.history)
}

// Durable returns the highest sequence known to be synced.
func (l *Log) Durable() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.durable
}

// Size returns the disk space that the segments take, in bytes.
func (l *Log) Size() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.tracked
}

// Err returns why the log serves no more: ErrClosed, or the first failure of a
// write or sync. There is no way back but to open it again, which reads from
// the disk what really arrived there.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.usable()
}

// Failed returns a channel that is closed when a write or sync has failed.
func (l *Log) Failed() <-chan struct{} { return l.failed }

// usable returns an error if the log must not be written. l.mu is held.
func (l *Log) usable() error {
	switch {
	case l.err != nil:
		return l.err
	case l.closed:
		return ErrClosed
	}
	return nil
}

// poison ends the service of the log for good. l.mu is held.
func (l *Log) poison(doing string, err error) error {
	if l.err == nil {
		l.err = fmt.Errorf("op log %s failed while %s, its brick serves no more until it was opened and checked again: %w", l.dir, doing, err)
		close(l.failed)
		l.wakeSyncs()
		l.logger.Error("op log failed", "dir", l.dir, "doing", doing, "err", err)
	}
	return l.err
}

func (l *Log) poisonLock(doing string, err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.poison(doing, err)
}

// active returns the segment that takes appends. l.mu or l.write is held.
func (l *Log) active() *segment { return l.segments[len(l.segments)-1] }

// Append adds a record. pos must follow the tail: the next sequence, and an
// epoch that is not older. With align > 0 the last align bytes of payload start
// on a multiple of disk.BlockSize in the file, so that they can be shared with
// other files (Segment.CloneTo). Append keeps nothing of payload.
//
// A payload of directSize or more has been handed to the kernel when Append
// returns, a smaller one after the next Flush: then it survives the end of the
// process. What survives the end of the machine is decided by Sync alone.
//
// An error leaves the log as it was, unless Err reports one too.
func (l *Log) Append(pos cluster.Pos, payload []byte, align int) (Loc, error) {
	if len(payload) > MaxPayload || align < 0 || align > len(payload) {
		return Loc{}, fmt.Errorf("append of %d bytes, %d of them aligned, to the op log: the limit is %d", len(payload), align, MaxPayload)
	}
	rec := record{pos: pos, length: uint32(len(payload)), sum: checksum(payload)}
	if len(payload) >= directSize {
		return l.appendDirect(rec, payload, align)
	}
	for {
		loc, full, err := l.buffer(rec, payload, align)
		switch {
		case err != nil:
			return Loc{}, err
		case loc.Segment == 0:
			l.write.Lock()
			err := l.roll()
			l.write.Unlock()
			if err != nil {
				return Loc{}, err
			}
			continue
		case full:
			return loc, l.Flush()
		}
		return loc, nil
	}
}

// buffer appends a record to the buffer. It returns a zero Loc if the segment
// has no room for it, and whether it is time to write the buffer out.
func (l *Log) buffer(rec record, payload []byte, align int) (loc Loc, full bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.place(&rec, align); err != nil {
		return Loc{}, false, err
	}
	seg := l.active()
	if !l.fits(rec) {
		return Loc{}, false, nil
	}
	at, size := len(l.buffered), int(rec.end(seg.end)-seg.end)
	l.buffered = slices.Grow(l.buffered, size)[:at+size]
	b := l.buffered[at:]
	rec.put(b, &seg.segmentHeader, seg.end)
	in := recordHeader + int(rec.pad)
	clear(b[recordHeader:in])
	clear(b[in+copy(b[in:], payload):])
	return l.appended(rec), len(l.buffered) >= flushAt, nil
}

// appendDirect writes a large record without copying it into the buffer.
func (l *Log) appendDirect(rec record, payload []byte, align int) (Loc, error) {
	l.write.Lock()
	defer l.write.Unlock()
	var seg *segment
	for {
		if err := l.flushLocked(); err != nil {
			return Loc{}, err
		}
		l.mu.Lock()
		err := l.place(&rec, align)
		seg = l.active()
		fits := l.fits(rec)
		l.mu.Unlock()
		if err != nil {
			return Loc{}, err
		}
		if fits {
			break
		}
		if err := l.roll(); err != nil {
			return Loc{}, err
		}
	}
	off := seg.end // l.write keeps it
	head := make([]byte, recordHeader+int(rec.pad))
	rec.put(head, &seg.segmentHeader, off)
	_, err := seg.file.WriteAt(head, off)
	if err == nil {
		_, err = seg.file.WriteAt(payload, rec.payload(off))
	}
	if err != nil {
		return Loc{}, l.poisonLock("writing a record", err)
	}
	seg.zeroed = max(seg.zeroed, rec.payload(off)+int64(len(payload)))
	l.mu.Lock()
	defer l.mu.Unlock()
	loc := l.appended(rec)
	seg.flushed = seg.end
	seg.large += int64(len(payload))
	l.written = rec.pos.Seq
	l.wake(off, seg.end)
	return loc, nil
}

// place fills in what depends on where rec will lie, which is at the end of the
// active segment. It refuses a record that does not continue the log. l.mu is
// held.
func (l *Log) place(rec *record, align int) error {
	if err := l.writable(); err != nil {
		return err
	}
	if rec.pos.Seq != l.tail.Seq+1 || rec.pos.Epoch < l.tail.Epoch || rec.pos.Epoch == 0 {
		return fmt.Errorf("%w: %v after %v", ErrPosition, rec.pos, l.tail)
	}
	if rec.pad = 0; align > 0 {
		tail := l.active().end + recordHeader + int64(rec.length) - int64(align)
		rec.pad = uint16(-tail & (disk.BlockSize - 1))
	}
	rec.durable = l.durable
	return nil
}

// fits reports whether rec has room in the active segment. An empty segment
// takes any record. l.mu is held.
func (l *Log) fits(rec record) bool {
	seg := l.active()
	return rec.end(seg.end) <= l.size || seg.end == seg.size()
}

// appended moves the tail behind rec, which starts at the active segment's end.
// l.mu is held.
func (l *Log) appended(rec record) Loc {
	seg := l.active()
	loc := Loc{seg.num, rec.payload(seg.end), int(rec.length)}
	seg.mark(rec.pos.Seq, seg.end)
	seg.end = rec.end(seg.end)
	if seg.end > seg.alloc {
		l.tracked += seg.end - seg.alloc
		seg.alloc = seg.end
	}
	if n := len(l.history); n == 0 || l.history[n-1].Epoch != rec.pos.Epoch {
		l.history = append(l.history, rec.pos)
	}
	l.tail = rec.pos
	return loc
}

// mark remembers the place of a record if the last one remembered is far away.
func (s *segment) mark(seq uint64, off int64) {
	if n := len(s.index); n == 0 || off-s.index[n-1].off >= indexStep {
		s.index = append(s.index, mark{seq, off})
	}
}

// Flush hands every appended record to the kernel, in one write call: after it
// they survive the end of the process.
func (l *Log) Flush() error {
	l.mu.Lock()
	if len(l.buffered) == 0 && len(l.flight) == 0 {
		err := l.usable()
		l.mu.Unlock()
		return err
	}
	l.mu.Unlock()
	l.write.Lock()
	defer l.write.Unlock()
	return l.flushLocked()
}

// flushLocked is Flush with l.write held.
func (l *Log) flushLocked() error {
	l.mu.Lock()
	if err := l.usable(); err != nil || len(l.buffered) == 0 {
		l.mu.Unlock()
		return err
	}
	seg, off, through := l.active(), l.active().flushed, l.tail.Seq
	l.flight, l.buffered, l.spare = l.buffered, l.spare[:0], nil
	b := l.flight
	l.mu.Unlock()

	n := len(b)
	b = seg.ahead(b, off, l.size)
	_, err := seg.file.WriteAt(b, off)

	l.mu.Lock()
	defer l.mu.Unlock()
	l.flight, l.spare = nil, b[:0]
	if err != nil {
		return l.poison("writing records", err)
	}
	seg.flushed += int64(n)
	l.written = through
	l.wake(off, seg.flushed)
	return nil
}

// SyncAll makes everything appended so far durable, but for what is undone meanwhile.
func (l *Log) SyncAll() error {
	seq := l.Tail().Seq
	for {
		err := l.Sync(context.Background(), seq)
		if err == nil || l.Err() != nil {
			return err
		}
		seq = min(seq, l.Tail().Seq) // the rest was undone, and nobody can want it; the log may have grown again since
	}
}

// Sync returns when every record up to seq is durable. One flush of the disk
// serves all that wait, and appends go on meanwhile. When ctx ends it returns
// ctx's cause; the flush itself cannot be taken back and goes on.
func (l *Log) Sync(ctx context.Context, seq uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if seq > l.tail.Seq {
		return fmt.Errorf("sync of the op log up to %d, it ends at %v", seq, l.tail)
	}
	for {
		if seq <= l.durable {
			return nil
		}
		if err := l.usable(); err != nil {
			return err
		}
		if seq > l.tail.Seq {
			return fmt.Errorf("change %d was undone while it was being synced: %w", seq, ErrTrimmed)
		}
		l.wanted = max(l.wanted, seq)
		l.startRounds()
		round := l.round
		l.mu.Unlock()
		var err error
		select {
		case <-round:
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		l.mu.Lock()
		if err != nil {
			return err
		}
	}
}

// startRounds has rounds run. l.mu is held.
func (l *Log) startRounds() {
	if !l.syncing {
		l.syncing = true
		l.keeping.Go(l.syncRounds)
	}
}

// syncRounds flushes the disk until nobody waits any more, and every segment has its name.
func (l *Log) syncRounds() {
	for again := true; again; again = l.endRound() {
		if err := l.Flush(); err != nil { // has poisoned the log or found it so
			continue
		}
		l.syncRound()
	}
}

// syncRound makes everything durable that was handed to the kernel.
func (l *Log) syncRound() {
	l.mu.Lock()
	for l.unnamed != nil {
		l.mu.Unlock()
		if err := l.settle(); err != nil { // has poisoned the log or found it so
			return
		}
		l.mu.Lock()
	}
	seg, target, cuts := l.active(), l.written, l.cuts
	if target <= l.durable {
		l.mu.Unlock()
		return
	}
	seg.refs++
	l.mu.Unlock()

	err := seg.file.SyncData()

	l.mu.Lock()
	defer l.mu.Unlock()
	l.unref(seg)
	switch {
	case err != nil:
		l.poison("syncing "+segmentName(seg.num), err)
	case cuts == l.cuts:
		l.durable = max(l.durable, target)
	}
}

// endRound tells the waiters and reports whether another round is needed.
func (l *Log) endRound() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wakeSyncs()
	l.wanted = min(l.wanted, l.tail.Seq)
	l.syncing = l.usable() == nil && (l.wanted > l.durable || l.unnamed != nil)
	return l.syncing
}

// wakeSyncs has everybody who waits in Sync look again. l.mu is held.
func (l *Log) wakeSyncs() {
	close(l.round)
	l.round = make(chan struct{})
}

func (l *Log) unref(s *segment) {
	if s.refs--; s.refs == 0 {
		s.file.Close() // read and synced: closing can lose nothing
	}
}
