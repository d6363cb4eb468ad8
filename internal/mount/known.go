package mount

import (
	"iter"

	"mortar/internal/estate"
	"mortar/internal/fsop"
)

// known is a shard of the inodes that the kernel knows. The next process of the mount has to
// know them too, so they are in its estate, in two words each.
type known struct{ t *estate.Table }

const (
	wordHere  = 32
	wordKind  = 48
	wordMarks = 52
)

func nodeOf(w []uint64) node {
	return node{
		lookups: uint32(w[0]), here: uint16(w[0] >> wordHere),
		kind: uint8(w[0]>>wordKind) & 0xf, marks: marks(w[0] >> wordMarks), inval: w[1],
	}
}

func (k known) get(ino fsop.Ino) (node, bool) {
	if w := k.t.Get(uint64(ino)); w != nil {
		return nodeOf(w), true
	}
	return node{}, false
}

func (k known) set(ino fsop.Ino, n node) {
	k.t.Put(uint64(ino), uint64(n.lookups)|uint64(n.here)<<wordHere|uint64(n.kind&0xf)<<wordKind|uint64(n.marks)<<wordMarks, n.inval)
}

func (k known) delete(ino fsop.Ino) { k.t.Delete(uint64(ino)) }

func (k known) marks(ino fsop.Ino) marks {
	n, _ := k.get(ino)
	return n.marks
}

func (k known) all() iter.Seq2[fsop.Ino, node] {
	return func(yield func(fsop.Ino, node) bool) {
		for ino, w := range k.t.All() {
			if !yield(fsop.Ino(ino), nodeOf(w)) {
				return
			}
		}
	}
}

// inherit takes the inodes that the process before this one knew. What it knew of them
// besides may be out of date.
func (t *nodes) inherit(l *estate.Left) {
	for i := range l.Nodes {
		for _, r := range l.Nodes[i] {
			ino, n := fsop.Ino(r.Key), nodeOf(r.Values)
			n.marks = n.marks&lasting | unsized
			s := t.shard(ino)
			s.known.set(ino, n)
		}
	}
}
