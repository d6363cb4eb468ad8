package brick

import (
	"strings"
	"sync"

	"mortar/internal/brick/meta"
	"mortar/internal/fsop"
)

// names keeps what directories have under the names used last, nothing included,
// in two generations like cache, and by its rules: it never says anything that
// the KV does not. Changes are put where they become visible, under Brick.mu;
// what was only read is put by whoever holds Brick.wmu, or mu.
//
// To save the reading is the lesser reason. A name that comes and goes, as that of a
// temporary file does, leaves a trace of every life in the KV until that is
// flushed, and to find the name absent the KV walks along all of them.
type names struct {
	mu         sync.Mutex
	limit      int // of one generation
	young, old map[nameKey]entry
}

type nameKey struct {
	dir  fsop.Ino
	name string
}

// entry is what a name leads to; ino 0: nothing.
type entry struct {
	ino fsop.Ino
	typ uint32
}

func newNames(limit int) *names {
	return &names{limit: max(limit/2, 1), young: map[nameKey]entry{}, old: map[nameKey]entry{}}
}

// get returns what dir has under a name, if that is known.
func (c *names) get(dir fsop.Ino, name string) (e entry, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := nameKey{dir, name}
	if e, known = c.young[k]; known {
		return e, true
	}
	if e, known = c.old[k]; known {
		c.put1(k, e)
	}
	return e, known
}

// put notes what dir has under a name.
func (c *names) put(dir fsop.Ino, name string, e entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.put1(nameKey{dir, name}, e)
}

func (c *names) put1(k nameKey, e entry) {
	if _, known := c.young[k]; !known {
		if len(c.young) >= c.limit {
			c.young, c.old = c.old, c.young
			clear(c.young)
		}
		k.name = strings.Clone(k.name) // it may be part of a message
	}
	c.young[k] = e
}

func (c *names) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.young)
	clear(c.old)
}

// dentry finds a name in a directory. b.wmu or b.mu is held.
func (b *Brick) dentry(dir fsop.Ino, name string) (meta.Dentry, bool, error) {
	if e, known := b.names.get(dir, name); known {
		return meta.Dentry{Ino: e.ino, Type: e.typ, Name: name, Cookie: b.cookie(name)}, e.ino != 0, nil
	}
	d, ok, err := b.store.Dentry(dir, b.cookie(name), name)
	if err != nil {
		return d, false, err
	}
	e := entry{}
	if ok {
		e = entry{d.Ino, d.Type}
	}
	b.names.put(dir, name, e)
	return d, ok, nil
}
