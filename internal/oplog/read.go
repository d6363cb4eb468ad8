package oplog

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"sort"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

func checksum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// Read returns records after sequence after, oldest first: at least one, if
// there is any, and as many more as have maxBytes of payload. It sees records
// that were not flushed yet. The caller owns what it gets. ErrTrimmed says that
// the records after that sequence are no longer here; *ErrCorrupt that one of
// them is damaged.
func (l *Log) Read(after uint64, maxBytes int) (payloads [][]byte, poss []cluster.Pos, locs []Loc, err error) {
	for {
		l.mu.Lock()
		cuts, base, tail, closed := l.cuts, l.base, l.tail, l.closed
		l.mu.Unlock()
		switch {
		case closed:
			return nil, nil, nil, ErrClosed
		case after < base.Seq:
			return nil, nil, nil, fmt.Errorf("reading changes after %d, the op log begins after %v: %w", after, base, ErrTrimmed)
		case after >= tail.Seq:
			return nil, nil, nil, nil
		}
		payloads, poss, locs, err = l.read(after, tail.Seq, maxBytes)
		if err != nil {
			// What was read may have been trimmed or undone under our eyes. If
			// that is still going on, see its end.
			l.write.Lock()
			l.write.Unlock() //nolint:staticcheck // it is only waited for
		}
		l.mu.Lock()
		undone, trimmed := l.cuts != cuts, l.base != base
		l.mu.Unlock()
		// Records of before and after an undoing do not go together.
		if !undone && (err == nil || !trimmed) {
			return payloads, poss, locs, err
		}
	}
}

func (l *Log) read(after, tail uint64, maxBytes int) (payloads [][]byte, poss []cluster.Pos, locs []Loc, err error) {
	total := 0
	for after < tail {
		seg := l.find(after)
		if seg.base.Seq > after {
			return nil, nil, nil, ErrTrimmed // meanwhile
		}
		s, err := l.open(seg)
		if err != nil {
			return nil, nil, nil, err
		}
		full, err := func() (full bool, err error) {
			defer s.Close()
			sc, err := s.scanFrom(after+1, maxBytes-total)
			if err != nil {
				return false, err
			}
			for after < tail {
				payload, ok := sc.next()
				if !ok {
					break
				}
				if len(payloads) > 0 && total+len(payload) > maxBytes {
					return true, nil
				}
				total += len(payload)
				payloads = append(payloads, payload)
				poss = append(poss, sc.rec.pos)
				locs = append(locs, Loc{s.seg.num, sc.rec.payload(sc.at), len(payload)})
				after = sc.rec.pos.Seq
			}
			return total >= maxBytes, sc.end()
		}()
		if err != nil {
			return nil, nil, nil, err
		}
		if full {
			break
		}
	}
	return payloads, poss, locs, nil
}

// find returns the segment that has the record after sequence after, which is
// not before the base, or the active one.
func (l *Log) find(after uint64) *segment {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := sort.Search(len(l.segments), func(i int) bool { return l.segments[i].base.Seq > after })
	return l.segments[max(i-1, 0)]
}

// locate returns where the record seq starts in seg, which has it, and the
// position of the record before it.
func (l *Log) locate(seg *segment, seq uint64) (off int64, before cluster.Pos, err error) {
	s, err := l.open(seg)
	if err != nil {
		return 0, cluster.Pos{}, err
	}
	defer s.Close()
	// From one record earlier: its position is wanted too.
	from := max(seq-1, seg.base.Seq+1)
	sc, err := s.scanFrom(from, indexStep)
	if err != nil {
		return 0, cluster.Pos{}, err
	}
	before = seg.base
	for {
		if _, ok := sc.next(); !ok {
			if err := sc.end(); err != nil {
				return 0, cluster.Pos{}, err
			}
			return 0, cluster.Pos{}, &ErrCorrupt{seg.name, sc.off, fmt.Sprintf("record %d is missing", seq)}
		}
		if sc.rec.pos.Seq == seq {
			return sc.at, before, nil
		}
		before = sc.rec.pos
	}
}

// Segment is one file of the log, kept readable: also after the log has
// trimmed it.
type Segment struct {
	l    *Log
	seg  *segment
	done bool
}

// OpenSegment returns segment number num. The caller closes it.
func (l *Log) OpenSegment(num uint64) (*Segment, error) {
	l.mu.Lock()
	i := slices.IndexFunc(l.segments, func(s *segment) bool { return s.num == num })
	if i < 0 {
		l.mu.Unlock()
		return nil, fmt.Errorf("op log segment %s: %w", segmentName(num), ErrTrimmed)
	}
	seg := l.segments[i]
	l.mu.Unlock()
	return l.open(seg)
}

func (l *Log) open(seg *segment) (*Segment, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if seg.refs == 0 {
		if l.closed {
			return nil, ErrClosed
		}
		return nil, fmt.Errorf("op log segment %s: %w", seg.name, ErrTrimmed)
	}
	seg.refs++
	return &Segment{l: l, seg: seg}, nil
}

// Close gives the segment back.
func (s *Segment) Close() {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	if !s.done {
		s.done = true
		s.l.unref(s.seg)
	}
}

// Num returns the segment's number.
func (s *Segment) Num() uint64 { return s.seg.num }

// ReadAt fills p from offset off, written out or not. Checksums are not looked
// at: they cover whole payloads.
func (s *Segment) ReadAt(p []byte, off int64) error {
	n, err := s.readAt(p, off)
	if err != nil || n < len(p) {
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("reading %d bytes at %d of op log segment %s: %w", len(p), off, s.seg.name, err)
	}
	return nil
}

// readAt is ReadAt that may stop at the end of the records.
func (s *Segment) readAt(p []byte, off int64) (int, error) {
	l, seg := s.l, s.seg
	if off < 0 {
		return 0, errors.New("negative offset")
	}
	l.mu.Lock()
	p = p[:max(0, min(int64(len(p)), seg.end-off))]
	inFile := max(0, min(int64(len(p)), seg.flushed-off))
	rest, from := p[inFile:], int(max(0, off-seg.flushed)) // only the active segment has a rest
	for _, unwritten := range [][]byte{l.flight, l.buffered} {
		if from < len(unwritten) {
			n := copy(rest, unwritten[from:])
			rest = rest[n:]
		}
		from = max(0, from-len(unwritten))
	}
	l.mu.Unlock()
	if inFile > 0 {
		n, err := seg.file.ReadAt(p[:inFile], off)
		if errors.Is(err, io.EOF) && inFile-int64(n) < recordAlign {
			// A record that is larger than a segment ends the file, which then
			// lacks the bytes that round its end up.
			clear(p[n:inFile])
			err = nil
		}
		if err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// CloneTo makes n bytes from dstOff of dst equal to n bytes from off of the
// segment, sharing whole blocks where the file system can. Records not yet
// written out are written first. On a segment that still takes appends they
// wait for it, so clone what was synced already: then it is quick.
func (s *Segment) CloneTo(dst disk.File, off, dstOff, n int64) error {
	l := s.l
	l.mu.Lock()
	unwritten, beyond := off+n > s.seg.flushed, off < 0 || n < 0 || off+n > s.seg.end
	l.mu.Unlock()
	if beyond {
		return fmt.Errorf("cloning %d bytes at %d of op log segment %s: %w", n, off, s.seg.name, io.ErrUnexpectedEOF)
	}
	if unwritten {
		if err := l.Flush(); err != nil {
			return err
		}
	}
	return dst.CloneRange(s.seg.file, off, dstOff, n)
}

// ReadAt fills p from offset off of segment number num. See Segment.ReadAt.
func (l *Log) ReadAt(num uint64, p []byte, off int64) error {
	s, err := l.OpenSegment(num)
	if err != nil {
		return err
	}
	defer s.Close()
	return s.ReadAt(p, off)
}
