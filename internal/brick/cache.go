package brick

import (
	"sync"

	"mortar/internal/brick/meta"
	"mortar/internal/fsop"
)

// A node is an inode as the brick has it in memory. It is never changed once
// others can see it.
type node struct {
	meta.Inode
	// base is where the settled contents of a regular file are, without the
	// contents themselves; only if baseKnown.
	base      meta.Base
	baseKnown bool
}

// cache keeps the nodes used last, in two generations: when the young one is
// full it becomes the old one, and the old one is dropped. What is used again
// is young again.
//
// Only those who change the KV put nodes that differ from what they read
// there, and they do it holding Brick.mu; readers add what they have read, also
// holding it (shared). So the cache never has anything that the KV has not.
type cache struct {
	mu         sync.Mutex
	limit      int // of one generation
	young, old map[fsop.Ino]*node
}

func newCache(limit int) *cache {
	return &cache{limit: max(limit/2, 1), young: map[fsop.Ino]*node{}, old: map[fsop.Ino]*node{}}
}

func (c *cache) get(ino fsop.Ino) *node {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := c.young[ino]; n != nil {
		return n
	}
	n := c.old[ino]
	if n != nil {
		c.put1(n)
	}
	return n
}

// put adds or replaces a node.
func (c *cache) put(n *node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.put1(n)
}

func (c *cache) put1(n *node) {
	if len(c.young) >= c.limit && c.young[n.Ino] == nil {
		c.young, c.old = c.old, c.young
		clear(c.young)
	}
	c.young[n.Ino] = n
}

func (c *cache) remove(ino fsop.Ino) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.young, ino)
	delete(c.old, ino)
}

func (c *cache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.young)
	clear(c.old)
}
