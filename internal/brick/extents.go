package brick

import (
	"slices"
	"sort"

	"mortar/internal/brick/meta"
)

// extents are the parts of one file whose contents are in the op log: disjoint
// ranges in the order of their offsets. The same are in the KV; here they are
// for speed. There are as many as the bounded backlog of settling has.
//
// They are kept in chunks, so that random writes to a large file do not move
// all of them each time.
type extents struct {
	chunks [][]meta.Extent // none is empty
	n      int
}

const maxChunk = 256

// seek returns the place of the first extent that ends behind off.
func (x *extents) seek(off uint64) (c, i int) {
	c = sort.Search(len(x.chunks), func(c int) bool {
		last := x.chunks[c]
		return last[len(last)-1].End() > off
	})
	if c == len(x.chunks) {
		return c, 0
	}
	ch := x.chunks[c]
	return c, sort.Search(len(ch), func(i int) bool { return ch[i].End() > off })
}

// each calls fn for the extents that overlap the range from a to below b, in
// order, until it returns false.
func (x *extents) each(a, b uint64, fn func(*meta.Extent) bool) {
	if x == nil {
		return
	}
	for c, i := x.seek(a); c < len(x.chunks); c, i = c+1, 0 {
		for ; i < len(x.chunks[c]); i++ {
			e := &x.chunks[c][i]
			if e.Off >= b || !fn(e) {
				return
			}
		}
	}
}

// all returns a copy of the extents that fn selects.
func (x *extents) all(fn func(*meta.Extent) bool) (es []meta.Extent) {
	if x == nil {
		return nil
	}
	for _, ch := range x.chunks {
		for i := range ch {
			if fn(&ch[i]) {
				es = append(es, ch[i])
			}
		}
	}
	return es
}

// insert adds e, which must not overlap any other.
func (x *extents) insert(e meta.Extent) {
	x.n++
	c, i := x.seek(e.Off)
	if c == len(x.chunks) {
		if c == 0 {
			x.chunks = append(x.chunks, []meta.Extent{e})
			return
		}
		c--
		i = len(x.chunks[c])
	}
	ch := slices.Insert(x.chunks[c], i, e)
	if len(ch) <= maxChunk {
		x.chunks[c] = ch
		return
	}
	half := maxChunk / 2
	if i == len(ch)-1 && c == len(x.chunks)-1 {
		half = maxChunk // appending: leave full chunks behind
	}
	x.chunks[c] = ch[:half:half]
	x.chunks = slices.Insert(x.chunks, c+1, slices.Clone(ch[half:]))
}

// remove takes the extent at exactly off away.
func (x *extents) remove(off uint64) {
	c, i := x.seek(off)
	if c == len(x.chunks) || x.chunks[c][i].Off != off {
		return
	}
	x.n--
	if len(x.chunks[c]) == 1 {
		x.chunks = slices.Delete(x.chunks, c, c+1)
		return
	}
	x.chunks[c] = slices.Delete(x.chunks[c], i, i+1)
}

// keep drops the extents for which fn is false.
func (x *extents) keep(fn func(*meta.Extent) bool) {
	x.n = 0
	chunks := x.chunks[:0]
	for _, ch := range x.chunks {
		ch = slices.DeleteFunc(ch, func(e meta.Extent) bool { return !fn(&e) })
		if len(ch) > 0 {
			chunks = append(chunks, ch)
			x.n += len(ch)
		}
	}
	clear(x.chunks[len(chunks):])
	x.chunks = chunks
}

// A span is a range of bytes from a to below b.
type span struct{ a, b uint64 }

// A carving is what has to change so that no extent covers certain spans.
type carving struct {
	removed []meta.Extent // whole, as they were
	added   []meta.Extent // what is left of them outside of the spans
}

// carve plans to free the spans, which are in order and apart, without doing it.
func (x *extents) carve(c *carving, spans ...span) {
	if x == nil || len(spans) == 0 {
		return
	}
	x.each(spans[0].a, spans[len(spans)-1].b, func(e *meta.Extent) bool {
		from, hit := e.Off, false
		for _, s := range spans {
			if s.b <= e.Off || s.a >= e.End() {
				continue
			}
			hit = true
			if from < s.a {
				c.added = append(c.added, e.Sub(from, s.a))
			}
			from = s.b
		}
		if !hit {
			return true
		}
		c.removed = append(c.removed, *e)
		if from < e.End() {
			c.added = append(c.added, e.Sub(from, e.End()))
		}
		return true
	})
}
