package mount

import (
	"hash/maphash"
	"slices"
	"sync"
	"time"

	"mortar/internal/fsop"
)

// givenNames is the set of names that the kernel may have cached, existing or
// not. Forgetting a name takes the directory's lock in the kernel, or all names
// of the mount; most names that another mount makes were never asked for here,
// and cost nothing.
//
// It keeps hashes; two names with one hash are forgotten for each other. A name
// stays for at least as long as the kernel may use it without asking again.
type givenNames struct {
	seed   maphash.Seed
	shards [16]givenShard
}

type givenShard struct {
	mu       sync.Mutex
	now, old map[uint64]bool // true: an existing name
	turned   time.Time       // when now became old and a new one began
	all      time.Time       // until when the kernel may have any name
}

// givenSlack is for clocks and ticks that are not the kernel's.
const givenSlack = 5 * time.Second

func newGivenNames() *givenNames {
	g := &givenNames{seed: maphash.MakeSeed()}
	for i := range g.shards {
		g.shards[i].now = make(map[uint64]bool)
		g.shards[i].turned = time.Now()
	}
	return g
}

func (g *givenNames) hash(dir fsop.Ino, name string) (uint64, *givenShard) {
	h := maphash.String(g.seed, name) ^ uint64(dir)*0x9e3779b97f4a7c15
	return h, &g.shards[h>>60]
}

// add is called before it is decided for how long the kernel may keep the name;
// see the package documentation for why before.
func (g *givenNames) add(dir fsop.Ino, name string, exists bool, timeout time.Duration) {
	if timeout <= 0 {
		return
	}
	h, s := g.hash(dir, name)
	s.mu.Lock()
	defer s.mu.Unlock()
	if was, ok := s.now[h]; ok && (was || !exists) {
		return
	}
	if t := time.Now(); t.Sub(s.turned) > timeout+givenSlack {
		s.old, s.now, s.turned = s.now, make(map[uint64]bool), t
	}
	s.now[h] = s.now[h] || exists
}

// has says whether the kernel may have the name cached, and whether it may have
// it as existing.
func (g *givenNames) has(dir fsop.Ino, name string) (cached, exists bool) {
	h, s := g.hash(dir, name)
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.all.IsZero() && time.Now().Before(s.all) {
		return true, true
	}
	now, ok := s.now[h]
	old, was := s.old[h]
	return ok || was, now || old
}

// all notes that the kernel may have any name cached, from the process before this one.
func (g *givenNames) all(timeout time.Duration) {
	for i := range g.shards {
		s := &g.shards[i]
		s.mu.Lock()
		s.all = time.Now().Add(timeout + givenSlack)
		s.mu.Unlock()
	}
}

// nameCache has the names of known inodes, on kernels that can only forget
// names one by one.
type nameCache struct {
	enabled bool
	mu      sync.Mutex
	names   map[fsop.Ino][]nameKey
}

type nameKey struct {
	dir  fsop.Ino
	name string
}

func newNameCache() *nameCache { return &nameCache{names: make(map[fsop.Ino][]nameKey)} }

func (c *nameCache) add(ino, dir fsop.Ino, name string) {
	if !c.enabled || ino == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	k := nameKey{dir, name}
	for _, have := range c.names[ino] {
		if have == k {
			return
		}
	}
	c.names[ino] = append(c.names[ino], k)
}

func (c *nameCache) forget(ino fsop.Ino) {
	if !c.enabled {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.names, ino)
}

// of returns the names of an inode, none where they are not needed.
func (c *nameCache) of(ino fsop.Ino) []nameKey {
	if !c.enabled {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.names[ino])
}

func (c *nameCache) all() []nameKey {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []nameKey
	for _, names := range c.names {
		all = append(all, names...)
	}
	return all
}
