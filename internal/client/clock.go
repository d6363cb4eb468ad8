package client

import (
	"context"
	"sync"
	"time"

	"mortar/internal/fsop"
)

// clock is what the session knows of the primary's clock, from the times of changes. What
// it tells has certainly begun there, and is not before anything that the session has been
// shown: so a file can be given that time before the primary has heard of it, and nobody
// finds it newer than what was changed after it, whatever this machine's own clock says.
type clock struct {
	mu    sync.Mutex
	heard int64     // the newest time of a change
	at    time.Time // when it was heard of
	told  int64
}

// hear takes the time that the primary has given to a change.
func (c *clock) hear(t int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t > c.heard {
		c.heard, c.at = t, time.Now()
	}
}

// tell returns a time for what is changed now, later than any that was told or heard of; 0
// if nothing was heard yet.
func (c *clock) tell() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.heard != 0 {
		c.told = max(c.told+1, c.heard+1, c.heard+int64(time.Since(c.at)))
	}
	return c.told
}

// hearing is a Handler that hears the times of what it changes.
type hearing struct {
	next fsop.Handler
	c    *clock
}

// Do implements fsop.Handler.
func (h *hearing) Do(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
	reply, err := h.next.Do(ctx, op)
	if err == nil && op.Kind().Mutates() {
		h.c.hear(reply.Dir.Ctime)
		if w := contents(op); w == nil || w.Told == 0 { // else it is no news
			h.c.hear(reply.Attr.Ctime)
		}
	}
	return reply, err
}
