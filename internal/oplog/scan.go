package oplog

import (
	"bytes"
	"fmt"
	"sort"

	"mortar/internal/cluster"
)

// scanner walks over the records of a segment.
type scanner struct {
	read  func(p []byte, off int64) (int, error) // may stop short at the end
	h     *segmentHeader
	name  string
	chunk int  // bytes to read at a time
	reuse bool // payloads may be overwritten by the next call of next

	off  int64       // where the next record is expected
	pos  cluster.Pos // of the record before it
	stop string      // why next returned false; "" at the end
	err  error       // of read

	rec record // the last record
	at  int64  // and where it starts

	buf    []byte
	bufOff int64 // of buf[0]
	short  bool  // buf ends where the segment ends
}

const maxChunk = 1 << 20

// window returns n bytes from off, or fewer at the end of the segment. The
// slice is good until the next call, and for ever if reuse is not set.
func (s *scanner) window(off int64, n int) []byte {
	from := off - s.bufOff
	if s.buf == nil || from < 0 || from+int64(n) > int64(len(s.buf)) && !(s.short && from <= int64(len(s.buf))) {
		size := max(n, s.chunk)
		b := s.buf[:0]
		if !s.reuse || cap(b) < size {
			b = make([]byte, size)
		}
		b = b[:size]
		m, err := s.read(b, off)
		if err != nil {
			s.err = err
			m = 0
		}
		s.buf, s.bufOff, s.short, from = b[:m], off, m < size, 0
	}
	return s.buf[from:min(from+int64(n), int64(len(s.buf)))]
}

// header looks for a record's header at off.
func (s *scanner) header(off int64) (record, bool) {
	var r record
	ok := r.get(s.window(off, recordHeader), s.h, off)
	return r, ok
}

// next returns the payload of the next record, or false at the first place
// that has none; stop and err then say why.
func (s *scanner) next() ([]byte, bool) {
	s.stop = ""
	r, ok := s.header(s.off)
	switch {
	case s.err != nil:
		return nil, false
	case !ok && len(s.window(s.off, 1)) == 0:
		return nil, false // the end
	case !ok:
		s.stop = "no record header"
		return nil, false
	case r.pos.Seq != s.pos.Seq+1 || r.pos.Epoch < s.pos.Epoch:
		s.stop = fmt.Sprintf("record %v follows %v", r.pos, s.pos)
		return nil, false
	}
	head := recordHeader + int(r.pad)
	b := s.window(s.off, head+int(r.length))
	if s.err != nil {
		return nil, false
	}
	if len(b) < head+int(r.length) || checksum(b[head:]) != r.sum {
		s.stop = fmt.Sprintf("the checksum of record %v is wrong", r.pos)
		return nil, false
	}
	s.rec, s.at = r, s.off
	s.off, s.pos = r.end(s.off), r.pos
	return b[head:len(b):len(b)], true
}

// end returns what the last next met as an error, if it was one; the end of the
// records is none.
func (s *scanner) end() error {
	switch {
	case s.err != nil:
		return fmt.Errorf("reading op log segment %s: %w", s.name, s.err)
	case s.stop != "":
		return &ErrCorrupt{s.name, s.off, s.stop}
	}
	return nil
}

// after looks for what was written behind the place where next stopped: for
// record headers with a sequence beyond it. It returns how many there are and
// the highest sequence that one of them says was durable.
func (s *scanner) after() (found int, durable uint64) {
	mark := [2]byte{recordMagic & 0xff, recordMagic >> 8}
	for off := s.off; s.err == nil; {
		b := s.window(off, maxChunk)
		if len(b) < recordHeader {
			break
		}
		// Headers start on multiples of recordAlign, as off does.
		for i := 0; i+recordHeader <= len(b); {
			j := bytes.Index(b[i:len(b)-recordHeader+2], mark[:])
			if j < 0 {
				break
			}
			i += j
			var r record
			if i%recordAlign == 0 && r.get(b[i:], s.h, off+int64(i)) && r.pos.Seq > s.pos.Seq {
				found++
				durable = max(durable, r.durable)
			}
			i++
		}
		off += int64(len(b)-recordHeader+1) / recordAlign * recordAlign
		if len(b) < maxChunk {
			break
		}
	}
	return found, durable
}

// scanFrom returns a scanner that stands before record seq of the segment. It
// reads about want bytes at a time.
func (s *Segment) scanFrom(seq uint64, want int) (*scanner, error) {
	l, seg := s.l, s.seg
	l.mu.Lock()
	from := mark{seg.base.Seq + 1, seg.size()}
	if i := sort.Search(len(seg.index), func(i int) bool { return seg.index[i].seq > seq }); i > 0 {
		from = seg.index[i-1]
	}
	unindexed := seg.index == nil && seg.end > seg.size()
	l.mu.Unlock()
	if unindexed {
		if err := s.buildIndex(); err != nil {
			return nil, err
		}
		return s.scanFrom(seq, want)
	}
	sc := &scanner{
		read: s.readAt, h: &seg.segmentHeader, name: seg.name,
		chunk: min(max(want, 4<<10)+4<<10, maxChunk),
		off:   from.off,
	}
	if sc.pos = seg.base; from.off > seg.size() {
		// The index has no epochs: any that follows the base's will do.
		sc.pos.Seq = from.seq - 1
	}
	for sc.pos.Seq+1 < seq {
		r, ok := sc.header(sc.off)
		if sc.err != nil || !ok || r.pos.Seq != sc.pos.Seq+1 {
			sc.stop = fmt.Sprintf("no header of record %d", sc.pos.Seq+1)
			return nil, sc.end()
		}
		sc.off, sc.pos = r.end(sc.off), r.pos
	}
	return sc, nil
}

// buildIndex reads a sealed segment once, to know where its records are.
func (s *Segment) buildIndex() error {
	l, seg := s.l, s.seg
	sc := &scanner{
		read: s.readAt, h: &seg.segmentHeader, name: seg.name, chunk: maxChunk, reuse: true,
		off: seg.size(), pos: seg.base,
	}
	l.mu.Lock()
	last := l.tail.Seq
	for i, s := range l.segments {
		if s == seg && i+1 < len(l.segments) {
			last = l.segments[i+1].base.Seq
		}
	}
	l.mu.Unlock()
	var ix segment
	for sc.pos.Seq < last {
		if _, ok := sc.next(); !ok {
			if err := sc.end(); err != nil {
				return err
			}
			return &ErrCorrupt{seg.name, sc.off, fmt.Sprintf("the segment ends after record %v, the next one begins after %d", sc.pos, last)}
		}
		ix.mark(sc.rec.pos.Seq, sc.at)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if seg.index == nil {
		seg.index, seg.end = ix.index, sc.off
	}
	return nil
}
