package oplog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

// Open opens the log in o.Dir, or makes an empty one there that begins after
// the zero position.
//
// It syncs what a process that was killed left unsynced, and reads the last
// segment from the disk, not from memory: after a failed sync these differ. If that
// process had begun another segment, which has no name yet, that gets one now. A
// torn tail, which is what a power cut leaves of records that were not synced,
// is cut off. Bytes that are wrong although they once were durable are an
// *ErrCorrupt. Of the other segments only the headers are read now, their
// records when somebody wants them.
func Open(o Options) (*Log, error) {
	switch {
	case o.SegmentSize == 0:
		o.SegmentSize = DefaultSegmentSize
	case o.SegmentSize < 2*disk.BlockSize || o.SegmentSize > maxSegmentSize:
		return nil, fmt.Errorf("op log segments of %d bytes: %d to %d are possible", o.SegmentSize, 2*disk.BlockSize, maxSegmentSize)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	l := &Log{
		fs: o.FS, dir: o.Dir, size: o.SegmentSize, ro: o.ReadOnly, logger: o.Log,
		failed: make(chan struct{}), round: make(chan struct{}), kick: make(chan struct{}, 1),
		next: 1,
	}
	if err := l.load(); err != nil {
		for _, seg := range l.segments {
			seg.file.Close()
		}
		return nil, err
	}
	if !l.ro {
		l.keeping.Go(l.keeper)
	}
	return l, nil
}

func (l *Log) load() error {
	nums, err := l.list()
	if err != nil {
		return err
	}
	if len(nums) == 0 {
		if l.ro {
			return fmt.Errorf("%s: no op log here: %w", l.dir, os.ErrNotExist)
		}
		return l.begin(0, cluster.Pos{})
	}
	l.next = nums[len(nums)-1] + 1
	void, err := l.chain(nums)
	if err != nil {
		return err
	}
	if err := l.loadTail(); err != nil || l.ro {
		return err
	}
	for _, num := range void {
		if err := l.fs.Remove(l.fs.PathJoin(l.dir, segmentName(num))); err != nil {
			return fmt.Errorf("op log: %w", err)
		}
	}
	// What a crash left of a segment being prepared, or of one whose turn never came: that must not come back when
	// the log has come to where it was to go on.
	err = l.fs.Remove(l.fs.PathJoin(l.dir, nextName))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("op log: %w", err)
	}
	if err == nil || len(void) > 0 {
		if err := l.fs.SyncDir(l.dir); err != nil {
			return fmt.Errorf("op log: %w", err)
		}
	}
	return nil
}

// chain opens the segments of the log: the last one, the one that it
// continues, and so on. It returns the others, which a TruncateAfter or Reset
// made void and a crash kept from being removed.
func (l *Log) chain(nums []uint64) (void []uint64, err error) {
	for num := nums[len(nums)-1]; num != 0; {
		i, ok := slices.BinarySearch(nums, num)
		if !ok {
			if i == 0 {
				break // it was trimmed
			}
			return nil, &ErrCorrupt{l.segments[0].name, 0, fmt.Sprintf("it continues segment %s, which is missing", segmentName(num))}
		}
		seg, err := l.openSegment(num)
		if err != nil {
			return nil, err
		}
		if len(l.segments) > 0 {
			if after := l.segments[0]; seg.base.Seq > after.base.Seq || seg.base.Epoch > after.base.Epoch {
				err = &ErrCorrupt{seg.name, 0, fmt.Sprintf("it begins after %v, segment %s behind it after %v", seg.base, segmentName(after.num), after.base)}
			}
		}
		if seg.prev >= seg.num {
			err = &ErrCorrupt{seg.name, 0, fmt.Sprintf("it continues segment %s", segmentName(seg.prev))}
		}
		l.segments = slices.Insert(l.segments, 0, seg)
		l.tracked += seg.alloc
		if err != nil {
			return nil, err
		}
		void = append(void, nums[i+1:]...)
		nums, num = nums[:i], seg.prev
	}
	return append(void, nums...), nil
}

// list returns the numbers of the segments in the directory, in order. It makes
// the directory.
func (l *Log) list() ([]uint64, error) {
	if !l.ro {
		if err := l.fs.MkdirAll(l.dir, 0o700); err != nil {
			return nil, fmt.Errorf("op log: %w", err)
		}
		if err := l.fs.SyncDir(l.fs.PathDir(l.dir)); err != nil {
			return nil, fmt.Errorf("op log: %w", err)
		}
	}
	names, err := l.fs.List(l.dir)
	if err != nil {
		return nil, fmt.Errorf("op log: %w", err)
	}
	var nums []uint64
	for _, name := range names {
		if num := parseSegmentName(name); num != 0 {
			nums = append(nums, num)
		}
	}
	slices.Sort(nums)
	return nums, nil
}

// openSegment opens a segment and reads its header.
func (l *Log) openSegment(num uint64) (*segment, error) {
	seg, err := l.openFile(segmentName(num))
	if err == nil && seg.num != num {
		err = &ErrCorrupt{seg.name, 0, fmt.Sprintf("the header is that of %s: the file was renamed or copied", segmentName(seg.num))}
		seg.file.Close()
	}
	return seg, err
}

// openNext opens the segment that has no name yet, if there is one. Without a header it never had a record, or none
// that was ever called durable.
func (l *Log) openNext() (*segment, error) {
	seg, err := l.openFile(nextName)
	var corrupt *ErrCorrupt
	if errors.As(err, &corrupt) || errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return seg, err
}

func (l *Log) openFile(name string) (*segment, error) {
	seg := &segment{name: l.fs.PathJoin(l.dir, name), refs: 1}
	flag := os.O_RDWR
	if l.ro {
		flag = os.O_RDONLY
	}
	f, err := l.fs.OpenFile(seg.name, flag)
	if err != nil {
		return nil, fmt.Errorf("op log: %w", err)
	}
	seg.file = f
	if err := seg.readHeader(); err != nil {
		f.Close()
		return nil, err
	}
	return seg, nil
}

func (s *segment) readHeader() error {
	st, err := s.file.Stat()
	if err != nil {
		return fmt.Errorf("op log: %w", err)
	}
	block := make([]byte, disk.BlockSize)
	n, err := s.file.ReadAt(block, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("op log: %w", err)
	}
	size, reason := headerSize(block[:n])
	if reason == "" && size > st.Size() {
		reason = "the file is shorter than its header"
	}
	if reason != "" {
		return &ErrCorrupt{s.name, 0, reason}
	}
	b := make([]byte, size)
	if _, err := s.file.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("op log: %w", err)
	}
	if reason := s.decode(b); reason != "" {
		return &ErrCorrupt{s.name, 0, reason}
	}
	// How far the records of a sealed segment reach is found out when it is
	// read; until then all of the file may be.
	s.alloc, s.end, s.flushed = st.Size(), st.Size(), st.Size()
	return nil
}

// ending is where the records of a segment end, as far as they can be read.
type ending struct {
	off  int64
	pos  cluster.Pos
	stop string // why there; "": it is the end of the file
	// found is how many records are behind it, and durable the highest sequence that one of them says was durable.
	found   int
	durable uint64
}

// loadTail reads the last segment, and the one without a name that may go on from it, and finds the tail. If a
// crash left anything behind it, the log goes on in a new segment, which makes that void.
func (l *Log) loadTail() error {
	seg := l.active()
	l.history = slices.Clone(seg.history)
	end, err := l.findEnd(seg)
	if err != nil {
		return err
	}
	next, err := l.openNext()
	if err != nil {
		return err
	}
	switch {
	case next == nil:
	case end.found == 0 && next.prev == seg.num && next.num >= l.next && next.base == end.pos:
		// A process was killed before the segment had its name.
		l.segments, l.next, l.tracked = append(l.segments, next), next.num+1, l.tracked+next.alloc
		if seg = next; !l.ro {
			if err := l.settleNext(next); err != nil {
				return fmt.Errorf("op log: naming %s: %w", segmentName(next.num), err)
			}
		}
		if end, err = l.findEnd(next); err != nil {
			return err
		}
	default:
		// The power went before all that it goes on from was on the disk. What it says was durable was.
		if next.prev == seg.num {
			sc := l.scanner(next)
			sc.pos = end.pos
			_, durable := sc.after()
			end.durable, err = max(end.durable, durable), sc.err
		}
		next.file.Close()
		if err != nil {
			return fmt.Errorf("reading op log segment %s: %w", next.name, err)
		}
	}
	if end.durable > end.pos.Seq {
		return &ErrCorrupt{seg.name, end.off, fmt.Sprintf("%s, but a later record says that %d was durable", end.stop, end.durable)}
	}
	l.tail = end.pos
	l.durable, l.written = l.tail.Seq, l.tail.Seq
	l.setBase(l.segments[0].base)
	if end.found == 0 || l.ro {
		return nil
	}
	l.logger.Warn("op log: cutting a torn tail", "file", seg.name, "offset", end.off, "tail", l.tail, "records", end.found, "reason", end.stop)
	if err := l.begin(seg.num, l.tail); err != nil {
		return fmt.Errorf("op log: cutting a torn tail: %w", err)
	}
	return nil
}

// settleNext gives a segment that was found without a name the one that is due to it.
func (l *Log) settleNext(seg *segment) error {
	seg.name = l.fs.PathJoin(l.dir, segmentName(seg.num))
	if err := l.name(seg); err != nil {
		return err
	}
	return l.reopen(seg)
}

func (l *Log) scanner(seg *segment) *scanner {
	return &scanner{
		read: (&Segment{l: l, seg: seg}).readAt, h: &seg.segmentHeader, name: seg.name,
		chunk: maxChunk, reuse: true, off: seg.size(), pos: seg.base,
	}
}

// findEnd reads a segment from the disk, learns where its records are and where epochs begin, and returns its end.
func (l *Log) findEnd(seg *segment) (end ending, err error) {
	if !l.ro {
		if err := seg.file.SyncData(); err != nil {
			return end, fmt.Errorf("op log: %w", err)
		}
		if err := seg.file.Evict(0, 0); err != nil {
			return end, fmt.Errorf("op log: %w", err)
		}
	}
	sc := l.scanner(seg)
	for {
		if _, ok := sc.next(); !ok {
			break
		}
		seg.mark(sc.rec.pos.Seq, sc.at)
		if n := len(l.history); n == 0 || l.history[n-1].Epoch != sc.rec.pos.Epoch {
			l.history = append(l.history, sc.rec.pos)
		}
	}
	end.stop = sc.stop
	if sc.stop != "" {
		end.found, end.durable = sc.after()
	}
	if sc.err != nil {
		return end, sc.end()
	}
	end.off, end.pos = sc.off, sc.pos
	seg.flushed, seg.end, seg.zeroed = sc.off, sc.off, sc.off
	return end, nil
}

// Verify reads every record and compares it with its checksum. It returns the
// first *ErrCorrupt, or ctx's cause when that ends first.
func (l *Log) Verify(ctx context.Context) error {
	after := l.Base().Seq
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		_, poss, _, err := l.Read(after, maxChunk)
		switch {
		case errors.Is(err, ErrTrimmed):
			after = l.Base().Seq
		case err != nil:
			return err
		case len(poss) == 0:
			return nil
		default:
			after = poss[len(poss)-1].Seq
		}
	}
}
