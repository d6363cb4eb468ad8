package data

import (
	"fmt"

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
// and so is what Settle returns, afterwards. It syncs nothing.
func Settle(f disk.File, log Log, exts []meta.Extent, length uint64) (uint64, error) {
	var buf []byte
	for i := range exts {
		e := &exts[i]
		if !e.Zero {
			if err := copyExtent(f, log, e, &buf); err != nil {
				return 0, err
			}
			length = max(length, e.End())
			continue
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
	return length, nil
}

func copyExtent(f disk.File, log Log, e *meta.Extent, buf *[]byte) error {
	seg, err := log.OpenSegment(e.Segment)
	if err != nil {
		return err
	}
	defer seg.Close()
	// CloneTo shares whole blocks if both sides are aligned, and copies else.
	if e.Off%disk.BlockSize == 0 && e.LogOff%disk.BlockSize == 0 && e.Len >= disk.BlockSize {
		return seg.CloneTo(f, e.LogOff, int64(e.Off), int64(e.Len))
	}
	if uint64(cap(*buf)) < e.Len {
		*buf = make([]byte, e.Len)
	}
	p := (*buf)[:e.Len]
	if err := seg.ReadAt(p, e.LogOff); err != nil {
		return err
	}
	_, err = f.WriteAt(p, int64(e.Off))
	return err
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
