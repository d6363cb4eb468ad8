package brick

import (
	"context"
	"slices"
	"sync"

	"mortar/internal/brick/data"
	"mortar/internal/brick/meta"
	"mortar/internal/oplog"
)

// held is a snapshot of the KV that somebody works with for long. It ends when
// its user closes it, or when the KV goes away under it (Rewind, Close).
type held struct {
	b      *Brick
	pinned bool // the contents of files stay readable as they were, too
	state  meta.State

	ctx    context.Context // ends with the snapshot
	cancel context.CancelCauseFunc

	// mu is held (shared) while the snapshot is used.
	mu   sync.RWMutex
	snap *meta.Snapshot // nil: closed
}

// hold takes a snapshot. With pin, nothing is settled, trimmed or removed for
// its life.
func (b *Brick) hold(pin bool) (*held, error) {
	if pin {
		// Let the cycle that may be running end: it does not know of us.
		b.pauseSettling()
		defer b.resumeSettling()
	}
	b.wmu.Lock()
	defer b.wmu.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed.Load() {
		return nil, ErrClosed
	}
	h := &held{b: b, pinned: pin, state: b.state, snap: b.store.Snapshot()}
	h.ctx, h.cancel = context.WithCancelCause(context.Background())
	b.held[h] = struct{}{}
	return h, nil
}

// pinned reports whether a pinned snapshot exists.
func (b *Brick) pinned() bool {
	b.mu.RLock()
	defer b.mu.RUnlock()
	for h := range b.held {
		if h.pinned {
			return true
		}
	}
	return false
}

// use runs fn with the snapshot, which does not go away meanwhile. The context
// fn gets ends when the snapshot is wanted back.
func (h *held) use(ctx context.Context, fn func(ctx context.Context, v meta.View) error) error {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if h.snap == nil {
		return context.Cause(h.ctx)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(h.ctx, func() { cancel(context.Cause(h.ctx)) })
	defer stop()
	return fn(ctx, h.snap.View)
}

// close ends the snapshot, after those who use it have let go.
func (h *held) close(cause error) {
	h.cancel(cause)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.snap == nil {
		return
	}
	h.b.mu.Lock()
	delete(h.b.held, h)
	h.b.mu.Unlock()
	if err := h.snap.Close(); err != nil {
		h.b.fail(err)
	}
	h.snap = nil
	if h.pinned {
		h.b.settle.kick()
	}
}

// closeHeld ends all snapshots. Neither b.mu nor b.wmu need be held; b.mu must not.
func (b *Brick) closeHeld(cause error) {
	b.mu.RLock()
	hs := make([]*held, 0, len(b.held))
	for h := range b.held {
		hs = append(hs, h)
	}
	b.mu.RUnlock()
	for _, h := range hs {
		h.close(cause)
	}
}

// pinnedContents reads the contents of a file as they were when a pinned
// snapshot v was taken, in order and without its holes.
type pinnedContents struct {
	b    *Brick
	n    *meta.Inode
	base meta.Base
	ext  []meta.Extent
	file *data.File
}

func (b *Brick) pinnedContents(v meta.View, n *meta.Inode) (c *pinnedContents, err error) {
	c = &pinnedContents{b: b, n: n}
	if c.base, err = v.Base(n.Ino, true); err != nil {
		return nil, err
	}
	err = v.ExtentsOf(n.Ino, func(e meta.Extent) error {
		c.ext = append(c.ext, e)
		return nil
	})
	if err == nil && c.base.Kind == meta.BaseFile {
		name := data.Name{Ino: n.Ino, Incarnation: c.base.Incarnation}
		if c.file, err = b.data.Open(name); err != nil {
			return c, b.missingFile(name, err)
		}
		st, err := c.file.Stat()
		if want := required(&c.base, slices.Values(c.ext)); err == nil && uint64(st.Size()) < want {
			err = b.shortFile(name, c.file, want)
		}
		if err != nil {
			c.close()
			return c, err
		}
	}
	return c, err
}

func (c *pinnedContents) close() {
	if c.file != nil {
		c.file.Release()
	}
}

// readAt fills p with the bytes from off on.
func (c *pinnedContents) readAt(p []byte, off uint64) error {
	clear(p)
	switch {
	case off >= c.base.Len:
	case c.base.Kind == meta.BaseInline:
		copy(p, c.base.Data[off:])
	case c.base.Kind == meta.BaseFile:
		if err := readFull(c.file, p[:min(uint64(len(p)), c.base.Len-off)], int64(off)); err != nil {
			return err
		}
	}
	end := off + uint64(len(p))
	for i := range c.ext {
		e := &c.ext[i]
		from, to := max(e.Off, off), min(e.End(), end)
		if from >= to {
			continue
		}
		q := p[from-off : to-off]
		if e.Zero {
			clear(q)
			continue
		}
		if err := readLog(c.b.log, e.Segment, q, e.LogOff+int64(from-e.Off)); err != nil {
			return logCut(err)
		}
	}
	return nil
}

func readLog(log *oplog.Log, segment uint64, p []byte, off int64) error {
	s, err := log.OpenSegment(segment)
	if err != nil {
		return err
	}
	defer s.Close()
	return s.ReadAt(p, off)
}

// allocated returns the runs of blocks of n up to its size.
func allocated(v meta.View, n *meta.Inode) (rs []meta.Run, err error) {
	rs = denseRuns(n.Size)
	if n.Flags&meta.Sparse != 0 {
		rs = nil
		err = v.Runs(n.Ino, 0, func(r meta.Run) (bool, error) {
			rs = append(rs, r)
			return true, nil
		})
		rs = cutRuns(rs, blocksUp(n.Size), noBlock)
	}
	return rs, err
}
