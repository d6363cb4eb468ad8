package mount

import (
	"math"
	"sync"
	"sync/atomic"
	"syscall"

	"mortar/internal/estate"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// nodes is what the mount knows of the inodes that the kernel knows: how often
// it was told of each, the highest invalidation of each, the attributes that
// were told last. It is the place where replies and invalidations meet, and so
// where the order between them is decided; the package documentation has the
// argument.
//
// It is sharded by inode number. A known inode costs about 50 bytes, one whose
// attributes are remembered 170 more; its names cost 66 bytes besides (nameCache).
//
// Lock order: forgetMu, then a shard's mu, then entries.mu.
type nodes struct {
	shards [nodeShards]nodeShard

	// replaceGen counts changes by this mount of inodes that nobody could name,
	// such as what a rename replaced. Attributes from before are not used.
	replaceGen atomic.Uint64

	// clock counts changes whose attributes are not known; see told.unknown.
	clock atomic.Uint64

	// dropGen counts the calls of DropAll. A reply to a request that began
	// before the last one must not be cached.
	dropGen atomic.Uint64

	entries entries

	forgetMu  sync.Mutex
	forgotten map[fsop.Ino]uint64 // lookups taken back, for Mount.Forgotten
}

const (
	nodeShards   = 64
	recentInvals = 32 // per shard, of inodes that the kernel does not know
)

type nodeShard struct {
	mu    sync.Mutex
	known known

	// recent are the last invalidations of inodes that are not known, for
	// replies about them that are on their way. What falls out raises floor,
	// which counts for all inodes that are in neither place.
	recent [recentInvals]recentInval
	next   int
	floor  uint64

	told map[fsop.Ino]told
	// unknown is at least told.unknown of all inodes that are not in told.
	unknown uint64
}

type node struct {
	lookups uint32 // how many answers named it less what the kernel forgot
	here    uint16 // those of them that were given without asking the replica, which counts the others
	kind    uint8  // S_IFMT bits >> 12
	marks   marks
	inval   uint64 // highest sequence number of an invalidation
}

// marks are what else is known of an inode.
type marks uint16

const (
	watched    marks = 1 << iota // the replica tells of the next change by others
	noCap                        // it has no security.capability
	noACL                        // it has no access control lists
	immutable                    // as it was told last
	appendOnly                   // likewise
	unsized                      // of a file that was invalidated: the kernel's idea of its size may be old, see sizes
	storable                     // it was opened for reading and writing: programs may store to it through mappings
	lockable                     // somebody here asked for an fcntl lock of it
	setID                        // it had set-id bits as it was told last
	paged                        // pages of it were read since they were dropped last; see wroteAround
)

// lasting are the marks that stay whatever others change.
const lasting = immutable | appendOnly | storable | lockable | setID | paged

// flagged brings the marks that come from attributes up to date.
func (m *marks) flagged(a *fsop.Attr) {
	*m &^= noACL | immutable | appendOnly | setID
	if a.Flags&(fsop.FlagACL|fsop.FlagDefaultACL) == 0 {
		*m |= noACL
	}
	if a.Mode&(syscall.S_ISUID|syscall.S_ISGID) != 0 {
		*m |= setID
	}
	if a.Flags&fsop.FlagImmutable != 0 {
		*m |= immutable
	}
	if a.Flags&fsop.FlagAppend != 0 {
		*m |= appendOnly
	}
}

type recentInval struct {
	ino fsop.Ino
	seq uint64
}

// told is the attributes of an inode as they were told last. The kernel keeps
// those of a reply to a change not at all (the package documentation says why),
// and gives up others sooner than it would have to: when it has read the file,
// for its access time. So it asks for them often, and is answered from here.
type told struct {
	attr fsop.Attr // Ino 0: not known
	seq  uint64    // at which they were true
	gen  uint64    // replaceGen when they were asked for
	// unknown is the time, by nodes.clock, of the last change of this mount that
	// was answered without them, because it was answered before it was carried out.
	// Attributes that were asked for earlier may be from before it.
	unknown uint64
}

// toldPerShard bounds the remembered attributes: 64 shards of 256, some 3 MiB.
const toldPerShard = 256

func newNodes(e *estate.Estate) *nodes {
	t := &nodes{forgotten: make(map[fsop.Ino]uint64), entries: newEntries()}
	for i := range t.shards {
		s := &t.shards[i]
		s.known = known{e.Nodes[i]}
		s.told = make(map[fsop.Ino]told)
	}
	root := t.shard(fsop.RootIno)
	root.known.set(fsop.RootIno, node{lookups: 1, kind: s_IFDIR})
	return t
}

const (
	s_IFDIR = 0o040000 >> 12
	s_IFREG = 0o100000 >> 12
)

func (t *nodes) shard(ino fsop.Ino) *nodeShard {
	return &t.shards[uint64(ino)*0x9e3779b97f4a7c15>>58]
}

// began is taken before a request is sent, and goes with its reply.
type began struct{ drop, replace, clock uint64 }

func (t *nodes) begin() began {
	return began{t.dropGen.Load(), t.replaceGen.Load(), t.clock.Load()}
}

// freshLocked says whether a reply about ino may be cached. Position 0 is what a
// replica gives a reply that was overtaken before it was sent.
func (t *nodes) freshLocked(s *nodeShard, ino fsop.Ino, seq uint64, b began) bool {
	return seq != 0 && seq >= s.invalLocked(ino) && b.drop == t.dropGen.Load()
}

// attrFreshLocked is freshLocked for attributes: they are not to be cached either if
// they were asked for before a change of this mount that was answered before it was
// carried out, as that of a directory in which a file was foretold.
func (t *nodes) attrFreshLocked(s *nodeShard, ino fsop.Ino, seq uint64, b began) bool {
	unknown := s.unknown
	if o, ok := s.told[ino]; ok {
		unknown = o.unknown
	}
	return unknown <= b.clock && t.freshLocked(s, ino, seq, b)
}

// invalLocked returns the highest invalidation that may concern ino.
func (s *nodeShard) invalLocked(ino fsop.Ino) uint64 {
	if n, ok := s.known.get(ino); ok {
		return n.inval
	}
	for i := range s.recent {
		if s.recent[i].ino == ino {
			return max(s.recent[i].seq, s.floor)
		}
	}
	return s.floor
}

// rememberLocked keeps an invalidation of an inode that is not known.
func (s *nodeShard) rememberLocked(ino fsop.Ino, seq uint64) {
	if seq == 0 {
		return
	}
	for i := range s.recent {
		if s.recent[i].ino == ino {
			s.recent[i].seq = max(s.recent[i].seq, seq)
			return
		}
	}
	s.floor = max(s.floor, s.recent[s.next].seq)
	s.recent[s.next] = recentInval{ino, seq}
	s.next = (s.next + 1) % recentInvals
}

// named counts a reply that tells the kernel of the inode of a, before the
// reply is written, and says whether its attributes may be cached.
func (t *nodes) named(a *fsop.Attr, seq uint64, b began) (fresh bool) {
	s := t.shard(a.Ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	fresh = t.attrFreshLocked(s, a.Ino, seq, b)
	n, known := s.known.get(a.Ino)
	if !known {
		n.inval = s.invalLocked(a.Ino)
	}
	n.kind = uint8(a.Type() >> 12)
	n.lookups++
	if fresh {
		n.marks |= watched
		n.marks.flagged(a)
	}
	s.known.set(a.Ino, n)
	if fresh {
		t.tellLocked(s, a, seq, b)
	}
	return fresh
}

// again counts an answer that names ino and is given without asking anybody: the
// attributes that were told last, if they are still true.
func (t *nodes) again(ino fsop.Ino) (a fsop.Attr, ok bool) {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := t.recallLocked(s, ino)
	if !ok {
		return fsop.Attr{}, false
	}
	n, _ := s.known.get(ino)
	if n.here == math.MaxUint16 {
		return fsop.Attr{}, false
	}
	n.lookups++
	n.here++
	s.known.set(ino, n)
	return o.attr, true
}

// recallLocked returns what was told of ino, if it is still true and the replica
// would say otherwise. The kernel knows the inode then.
func (t *nodes) recallLocked(s *nodeShard, ino fsop.Ino) (told, bool) {
	o, ok := s.told[ino]
	n, known := s.known.get(ino)
	if !ok || !known || n.marks&watched == 0 || o.attr.Ino == 0 || o.seq < n.inval || o.gen != t.replaceGen.Load() {
		return told{}, false
	}
	return o, true
}

// tellLocked remembers attributes that were true at seq, unless others are known
// to have come later.
func (t *nodes) tellLocked(s *nodeShard, a *fsop.Attr, seq uint64, b began) {
	o, ok := s.told[a.Ino]
	if !ok {
		o.unknown = s.unknown
	}
	if o.unknown > b.clock || b.replace != t.replaceGen.Load() || b.drop != t.dropGen.Load() ||
		o.attr.Ino != 0 && o.gen == b.replace && o.seq > seq {
		return
	}
	s.putLocked(a.Ino, told{*a, seq, b.replace, o.unknown})
}

func (s *nodeShard) putLocked(ino fsop.Ino, o told) {
	if _, ok := s.told[ino]; !ok && len(s.told) >= toldPerShard {
		for other := range s.told { // any: Go starts at random
			s.untellLocked(other)
			break
		}
	}
	s.told[ino] = o
}

func (s *nodeShard) untellLocked(ino fsop.Ino) {
	s.unknown = max(s.unknown, s.told[ino].unknown)
	delete(s.told, ino)
}

// foretold counts an answer that tells the kernel of a new file of which no replica
// knows yet. It has no extended attribute before another mount makes one, of
// which the replica tells.
func (t *nodes) foretold(a *fsop.Attr) {
	s := t.shard(a.Ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	n, _ := s.known.get(a.Ino)
	n.kind = uint8(a.Type() >> 12)
	n.lookups++
	n.marks |= noCap
	s.known.set(a.Ino, n)
}

// fresh says whether what was read about ino at seq may be cached.
func (t *nodes) fresh(ino fsop.Ino, seq uint64, b began) bool {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	return t.freshLocked(s, ino, seq, b)
}

// outdated says whether ino was changed, by this mount or by others, since an
// answer about it was asked for that was true at seq.
func (t *nodes) outdated(ino fsop.Ino, seq uint64, b began) bool {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.known.get(ino); !known {
		return false // nor does the kernel have attributes that are better
	}
	return !t.attrFreshLocked(s, ino, seq, b)
}

// read is fresh for a reply that is the inode's attributes: from then on the
// replica tells of its next change.
func (t *nodes) read(a *fsop.Attr, seq uint64, b began) bool {
	s := t.shard(a.Ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	if !t.attrFreshLocked(s, a.Ino, seq, b) {
		return false
	}
	if n, ok := s.known.get(a.Ino); ok {
		n.marks |= watched
		n.marks.flagged(a)
		s.known.set(a.Ino, n)
		t.tellLocked(s, a, seq, b)
	}
	return true
}

// empty says that this mount has just made directory ino, and that at seq there
// was nothing in it; see entries.
func (t *nodes) empty(ino fsop.Ino, seq uint64, b began) {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.known.get(ino); known && t.freshLocked(s, ino, seq, b) {
		t.entries.begin(ino)
	}
}

// leads says that name in dir led to an inode, or nothing, at seq, and whether
// that is still so. If it is not, nothing is known of the name.
func (t *nodes) leads(dir fsop.Ino, name string, to fsop.Ino, seq uint64, b began) (fresh bool) {
	s := t.shard(dir)
	s.mu.Lock()
	defer s.mu.Unlock()
	fresh = t.freshLocked(s, dir, seq, b)
	if _, known := s.known.get(dir); fresh && known {
		t.entries.set(dir, name, to)
	}
	return fresh
}

// setNoCap says that ino had no security.capability at seq. That is remembered
// until the inode changes, if the replica tells of that.
func (t *nodes) setNoCap(ino fsop.Ino, seq uint64, b began) {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := s.known.get(ino); ok && n.marks&watched != 0 && t.freshLocked(s, ino, seq, b) {
		n.marks |= noCap
		s.known.set(ino, n)
	}
}

// noCap says whether ino certainly has no security.capability.
func (t *nodes) noCap(ino fsop.Ino) bool {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.known.marks(ino)&noCap != 0
}

// marksOf returns what else is known of ino.
func (t *nodes) marksOf(ino fsop.Ino) marks {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.known.marks(ino)
}

// setXattr says that this mount changes extended attributes of ino.
func (t *nodes) setXattr(ino fsop.Ino) {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := s.known.get(ino); ok {
		n.marks &^= noCap | noACL
		s.known.set(ino, n)
	}
}

// mark adds lasting marks of ino, which stay as long as the kernel knows it.
func (t *nodes) mark(ino fsop.Ino, add marks) {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := s.known.get(ino); ok && n.marks&add != add {
		n.marks |= add
		s.known.set(ino, n)
	}
}

// unmark takes a mark of ino away, and says whether it had it.
func (t *nodes) unmark(ino fsop.Ino, gone marks) bool {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.known.get(ino)
	if !ok || n.marks&gone == 0 {
		return false
	}
	n.marks &^= gone
	s.known.set(ino, n)
	return true
}

// unsized says whether the kernel's idea of ino's size may be old, whatever it is
// told in answer to a question that is under way.
func (t *nodes) unsized(ino fsop.Ino) bool { return t.marksOf(ino)&unsized != 0 }

// sized says that the kernel has the size of ino that was true at seq.
func (t *nodes) sized(ino fsop.Ino, seq uint64) {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := s.known.get(ino); ok && seq >= n.inval {
		n.marks &^= unsized
		s.known.set(ino, n)
	}
}

// isDir says whether the kernel knows ino as a directory.
func (t *nodes) isDir(ino fsop.Ino) bool {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	n, _ := s.known.get(ino)
	return n.kind == s_IFDIR
}

// invalidated records an invalidation of an inode, or of names in it, and says
// whether the kernel may know the inode: if not, there is nothing to invalidate.
func (t *nodes) invalidated(e *proto.Effect, seq uint64) (known bool, kind uint8) {
	ino := e.Ino
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	n, known := s.known.get(ino)
	if !known {
		s.rememberLocked(ino, seq)
		return false, 0
	}
	n.inval = max(n.inval, seq)
	n.marks = n.marks&lasting | unsized
	s.known.set(ino, n)
	switch {
	case e.Names:
		t.entries.forget(ino)
	case n.kind == s_IFDIR:
		t.entries.spoil(ino, e.Name)
	}
	return true, n.kind
}

// knows says whether the kernel may know the inode.
func (t *nodes) knows(ino fsop.Ino) bool {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	_, known := s.known.get(ino)
	return known
}

// changed notes what one of this mount's own changes left of ino: a, at seq. If
// a is of no inode, or seq is 0, its attributes are not known from then on.
func (t *nodes) changed(ino fsop.Ino, a *fsop.Attr, seq uint64, b began) {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	n, known := s.known.get(ino)
	if a.Ino != ino || seq == 0 {
		if known && a.Ino == ino && a.Mode&(syscall.S_ISUID|syscall.S_ISGID) != 0 {
			n.marks |= setID // it was told, and will be carried out
			s.known.set(ino, n)
		}
		t.doubtLocked(s, ino)
		return
	}
	if !known || seq < n.inval {
		return
	}
	n.inval = seq
	if b.drop == t.dropGen.Load() {
		n.marks |= watched
		n.marks.flagged(a)
	}
	s.known.set(ino, n)
	t.tellLocked(s, a, seq, b)
}

// touched says that one of this mount's own changes, at seq, changed ino in a
// way that the reply did not tell. Whatever is older is not to be cached.
func (t *nodes) touched(ino fsop.Ino, seq uint64) {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := s.known.get(ino); ok && seq != 0 {
		n.inval = max(n.inval, seq)
		s.known.set(ino, n)
		return
	}
	t.doubtLocked(s, ino)
}

// doubtLocked notes that the attributes of ino are not known, nor by any reply
// that is on its way.
func (t *nodes) doubtLocked(s *nodeShard, ino fsop.Ino) {
	now := t.clock.Add(1)
	if _, known := s.known.get(ino); known {
		s.putLocked(ino, told{unknown: now})
	} else {
		s.unknown = now
	}
}

// replaced says that one of this mount's own changes, which began at b, changed
// an inode that nobody can name. What the reply did name may be remembered under
// the began that is returned, if there was no other such change meanwhile.
func (t *nodes) replaced(b began) began {
	if gen := t.replaceGen.Add(1); gen == b.replace+1 {
		b.replace = gen
	}
	return b
}

// attr returns the attributes of ino that were told last, if they are still true.
func (t *nodes) attr(ino fsop.Ino) (a fsop.Attr, seq uint64, ok bool) {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := t.recallLocked(s, ino)
	return o.attr, o.seq, ok
}

// drop forgets everything that was remembered of inodes but that they are
// known, and lets no reply be cached to a request that began before. It returns
// the inodes that the kernel knows.
func (t *nodes) drop() []fsop.Ino {
	t.dropGen.Add(1)
	var all []fsop.Ino
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		clear(s.told)
		s.unknown = t.clock.Load()
		for ino, n := range s.known.all() {
			n.marks = n.marks&lasting | unsized
			s.known.set(ino, n)
			all = append(all, ino)
		}
		s.mu.Unlock()
	}
	t.entries.clear() // nobody sets one any more for a reply from before
	return all
}

// forgot takes n of the kernel's lookups of ino back, and says whether the
// kernel does not know it any more.
func (t *nodes) forgot(ino fsop.Ino, n uint64) (unknown bool) {
	t.forgetMu.Lock()
	defer t.forgetMu.Unlock()
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	k, ok := s.known.get(ino)
	// The replica counted the first answer that named the inode, so those of here
	// are taken back before the last of those that it counted.
	here := min(n, uint64(k.here))
	if n > here {
		t.forgotten[ino] += n - here
	}
	if !ok || ino == fsop.RootIno {
		return false
	}
	if uint64(k.lookups) > n {
		k.lookups -= uint32(n)
		k.here -= uint16(here)
		s.known.set(ino, k)
		return false
	}
	s.known.delete(ino)
	s.untellLocked(ino)
	if k.kind == s_IFDIR {
		t.entries.forget(ino)
	}
	s.rememberLocked(ino, k.inval)
	return true
}

// unused says that a reply named an inode and that the kernel is not told.
func (t *nodes) unused(ino fsop.Ino) {
	t.forgetMu.Lock()
	defer t.forgetMu.Unlock()
	t.forgotten[ino]++
}

// takeForgotten returns and clears what was forgotten.
func (t *nodes) takeForgotten() []proto.Hold {
	t.forgetMu.Lock()
	defer t.forgetMu.Unlock()
	if len(t.forgotten) == 0 {
		return nil
	}
	all := make([]proto.Hold, 0, len(t.forgotten))
	for ino, n := range t.forgotten {
		all = append(all, proto.Hold{Ino: ino, N: n})
	}
	t.forgotten = make(map[fsop.Ino]uint64) // a map that was once large stays so
	return all
}

// holds returns the inodes that the kernel knows, and clears what was
// forgotten: it is not in there.
func (t *nodes) holds() []proto.Hold {
	t.forgetMu.Lock()
	defer t.forgetMu.Unlock()
	t.forgotten = make(map[fsop.Ino]uint64)
	var all []proto.Hold
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		for ino, n := range s.known.all() {
			all = append(all, proto.Hold{Ino: ino, N: uint64(n.lookups) - uint64(n.here)})
		}
		s.mu.Unlock()
	}
	return all
}
