package brick

import "sync"

// Source is this brick as another one compares itself with.
type Source struct {
	b  *Brick
	mu sync.RWMutex
}

// pin keeps settling, trimming and removing away for its life.
type pin struct{}

func (b *Brick) pinned() bool {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return len(b.pins) > 0
}

func (b *Brick) closeSources(cause error) {}
