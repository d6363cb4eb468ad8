package data

import (
	"fmt"
	"slices"

	"mortar/internal/brick/meta"
	"mortar/internal/disk"
	"mortar/internal/oplog"
)

// Log is where the bytes of extents are.
type Log interface {
	OpenSegment(num uint64) (*oplog.Segment, error)
}

// Settle makes file have what the extents say, which are in the order of their
// offsets. length is the end of what the file has that may be other than zero,
// and so is what Settle returns, afterwards; the file is at least as long. It
// syncs nothing.
func Settle(f *File, log Log, exts []meta.Extent, length uint64) (uint64, error) {
	g := gather{f: f, log: log}
	defer g.close()
	for i := range exts {
		e := &exts[i]
		if !e.Zero {
			if err := g.add(e); err != nil {
				return 0, err
			}
			length = max(length, e.End())
			continue
		}
		if err := g.flush(); err != nil { // it may lie behind what is cut off now
			return 0, err
		}
		switch {
		case e.Off >= length:
		case e.End() >= length:
			if err := f.Truncate(int64(e.Off)); err != nil {
				return 0, err
			}
			length = e.Off
		default:
			if err := f.PunchHole(int64(e.Off), int64(e.Len)); err != nil {
				return 0, err
			}
		}
		if e.Alloc {
			if err := f.Allocate(int64(e.Off), int64(e.Len)); err != nil {
				return 0, err
			}
			length = max(length, e.End())
		}
	}
	if err := g.flush(); err != nil {
		return 0, err
	}
	return length, f.Lengthen(length)
}

const (
	// cloneMin is the smallest extent that is shared with the log, not copied.
	cloneMin = 64 << 10
	// gatherMax is the most that is written with one call.
	gatherMax = 256 << 10
)

// gather copies extents to a file, those that touch each other with one write.
type gather struct {
	f   disk.File
	log Log
	seg *oplog.Segment // the one read last
	buf []byte
	off uint64 // of buf in the file
}

func (g *gather) add(e *meta.Extent) error {
	if g.seg == nil || g.seg.Num() != e.Segment {
		g.close()
		var err error
		if g.seg, err = g.log.OpenSegment(e.Segment); err != nil {
			return err
		}
	}
	if e.Len >= cloneMin && e.Off%disk.BlockSize == 0 && e.LogOff%disk.BlockSize == 0 {
		return g.seg.CloneTo(g.f, e.LogOff, int64(e.Off), int64(e.Len))
	}
	if len(g.buf) > 0 && (g.off+uint64(len(g.buf)) != e.Off || uint64(len(g.buf))+e.Len > gatherMax) {
		if err := g.write(); err != nil {
			return err
		}
	}
	if len(g.buf) == 0 {
		g.off = e.Off
	}
	n := len(g.buf)
	g.buf = slices.Grow(g.buf, int(e.Len))[:n+int(e.Len)]
	return g.seg.ReadAt(g.buf[n:], e.LogOff)
}

// write writes what was gathered.
func (g *gather) write() error {
	if len(g.buf) == 0 {
		return nil
	}
	_, err := g.f.WriteAt(g.buf, int64(g.off))
	g.buf = g.buf[:0]
	return err
}

// flush is write, and lets go of the log.
func (g *gather) flush() error {
	g.close()
	return g.write()
}

func (g *gather) close() {
	if g.seg != nil {
		g.seg.Close()
		g.seg = nil
	}
}

// SettleInline is Settle for contents in memory: it returns what base has
// become. base is not changed.
func SettleInline(base []byte, log Log, exts []meta.Extent) ([]byte, error) {
	length := uint64(len(base))
	for i := range exts {
		if e := &exts[i]; !e.Zero || e.Alloc {
			length = max(length, e.End())
		}
	}
	p := make([]byte, length)
	copy(p, base)
	end := uint64(len(base))
	for i := range exts {
		e := &exts[i]
		if e.Zero {
			if e.Off < length {
				clear(p[e.Off:min(e.End(), length)])
			}
			if e.End() >= end {
				end = min(end, e.Off)
			}
			if e.Alloc {
				end = max(end, e.End())
			}
			continue
		}
		seg, err := log.OpenSegment(e.Segment)
		if err != nil {
			return nil, err
		}
		err = seg.ReadAt(p[e.Off:e.End()], e.LogOff)
		seg.Close()
		if err != nil {
			return nil, fmt.Errorf("settling: %w", err)
		}
		end = max(end, e.End())
	}
	return p[:end], nil
}
