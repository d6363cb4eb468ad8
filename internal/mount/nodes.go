package mount

import (
	"sync"
	"sync/atomic"

	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// nodes is what the mount knows of the inodes that the kernel knows: how often
// it was told of each, and the highest invalidation of each. It is the place
// where replies and invalidations meet, and so where the order between them is
// decided; the package documentation has the argument.
//
// It is sharded by inode number. A known inode costs about 50 bytes.
//
// Lock order: forgetMu, then a shard's mu, then whole.mu.
type nodes struct {
	shards [nodeShards]nodeShard

	// ownGen counts changes by this mount of inodes that the reply did not name,
	// such as what a rename replaced. Own attributes from before are not used.
	ownGen atomic.Uint64

	// dropGen counts the calls of DropAll. A reply to a request that began
	// before the last one must not be cached.
	dropGen atomic.Uint64

	whole wholeDirs

	forgetMu  sync.Mutex
	forgotten map[fsop.Ino]uint64 // lookups taken back, for Mount.Forgotten
}

const (
	nodeShards   = 64
	recentInvals = 32 // per shard, of inodes that the kernel does not know
)

type nodeShard struct {
	mu    sync.Mutex
	known map[fsop.Ino]node

	// recent are the last invalidations of inodes that are not known, for
	// replies about them that are on their way. What falls out raises floor,
	// which counts for all inodes that are in neither place.
	recent [recentInvals]recentInval
	next   int
	floor  uint64

	own map[fsop.Ino]ownAttr // see nodes.changed
}

type node struct {
	lookups uint32 // how many replies named it less what the kernel forgot
	kind    uint8  // S_IFMT bits >> 12
	watched bool   // the replica tells of the next change by others
	noCap   bool   // it has no security.capability
	inval   uint64 // highest sequence number of an invalidation
}

type recentInval struct {
	ino fsop.Ino
	seq uint64
}

// ownAttr are attributes from the reply to one of this mount's own changes.
type ownAttr struct {
	attr fsop.Attr
	seq  uint64
	gen  uint64 // ownGen when the change was asked for
}

// ownPerShard bounds the remembered attributes: 64 shards of 16, some 150 KiB.
const ownPerShard = 16

func newNodes() *nodes {
	t := &nodes{forgotten: make(map[fsop.Ino]uint64), whole: newWholeDirs()}
	for i := range t.shards {
		s := &t.shards[i]
		s.known = make(map[fsop.Ino]node)
		s.own = make(map[fsop.Ino]ownAttr)
	}
	root := t.shard(fsop.RootIno)
	root.known[fsop.RootIno] = node{lookups: 1, kind: s_IFDIR}
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
type began struct{ drop, own uint64 }

func (t *nodes) begin() began {
	return began{t.dropGen.Load(), t.ownGen.Load()}
}

// freshLocked says whether a reply about ino may be cached. Position 0 is what a
// replica gives a reply that was overtaken before it was sent.
func (t *nodes) freshLocked(s *nodeShard, ino fsop.Ino, seq uint64, b began) bool {
	return seq != 0 && seq >= s.invalLocked(ino) && b.drop == t.dropGen.Load()
}

// invalLocked returns the highest invalidation that may concern ino.
func (s *nodeShard) invalLocked(ino fsop.Ino) uint64 {
	if n, ok := s.known[ino]; ok {
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
	fresh = t.freshLocked(s, a.Ino, seq, b)
	n, known := s.known[a.Ino]
	if !known {
		n.inval = s.invalLocked(a.Ino)
	}
	n.kind = uint8(a.Type() >> 12)
	n.lookups++
	n.watched = n.watched || fresh
	s.known[a.Ino] = n
	return fresh
}

// fresh says whether what was read about ino at seq may be cached.
func (t *nodes) fresh(ino fsop.Ino, seq uint64, b began) bool {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	return t.freshLocked(s, ino, seq, b)
}

// read is fresh for a reply that is the inode's attributes: from then on the
// replica tells of its next change.
func (t *nodes) read(ino fsop.Ino, seq uint64, b began) bool {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	if !t.freshLocked(s, ino, seq, b) {
		return false
	}
	if n, ok := s.known[ino]; ok {
		n.watched = true
		s.known[ino] = n
	}
	return true
}

// empty says that this mount has just made directory ino, and that at seq there
// was nothing in it; see wholeDirs.
func (t *nodes) empty(ino fsop.Ino, seq uint64, b began) {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.freshLocked(s, ino, seq, b) {
		t.whole.begin(ino)
	}
}

// setNoCap says that ino had no security.capability at seq. That is remembered
// until the inode changes, if the replica tells of that.
func (t *nodes) setNoCap(ino fsop.Ino, seq uint64, b began) {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := s.known[ino]; ok && n.watched && t.freshLocked(s, ino, seq, b) {
		n.noCap = true
		s.known[ino] = n
	}
}

// noCap says whether ino certainly has no security.capability.
func (t *nodes) noCap(ino fsop.Ino) bool {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.known[ino].noCap
}

// setXattr says that this mount changes extended attributes of ino.
func (t *nodes) setXattr(ino fsop.Ino) {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := s.known[ino]; ok {
		n.noCap = false
		s.known[ino] = n
	}
}

// isDir says whether the kernel knows ino as a directory.
func (t *nodes) isDir(ino fsop.Ino) bool {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.known[ino].kind == s_IFDIR
}

// invalidated records an invalidation, and says whether the kernel may know
// the inode: if not, there is nothing in it to invalidate.
func (t *nodes) invalidated(ino fsop.Ino, seq uint64) (known bool, kind uint8) {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	n, known := s.known[ino]
	if !known {
		s.rememberLocked(ino, seq)
		return false, 0
	}
	n.inval = max(n.inval, seq)
	n.watched, n.noCap = false, false
	s.known[ino] = n
	if n.kind == s_IFDIR {
		t.whole.spoil(ino)
	}
	return true, n.kind
}

// knows says whether the kernel may know the inode.
func (t *nodes) knows(ino fsop.Ino) bool {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	_, known := s.known[ino]
	return known
}

// changed remembers the attributes that one of this mount's own changes left.
// The kernel does not keep those of a reply to a change (the package
// documentation says why), so it asks for them soon, and is answered from here.
func (t *nodes) changed(a *fsop.Attr, seq uint64, b began) {
	if a.Ino == 0 || seq == 0 {
		t.ownGen.Add(1)
		return
	}
	s := t.shard(a.Ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	n, known := s.known[a.Ino]
	if !known || seq < n.inval {
		return
	}
	n.inval = seq
	n.watched = n.watched || b.drop == t.dropGen.Load()
	s.known[a.Ino] = n
	if b.drop != t.dropGen.Load() || b.own != t.ownGen.Load() {
		return
	}
	if _, ok := s.own[a.Ino]; !ok && len(s.own) >= ownPerShard {
		for i := range s.own { // any: Go starts at random
			delete(s.own, i)
			break
		}
	}
	s.own[a.Ino] = ownAttr{*a, seq, b.own}
}

// written says that ino was written to and that its attributes are not known. No
// reply to an older change can be on its way: the kernel makes changes of one
// file one after the other.
func (t *nodes) written(ino fsop.Ino) {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.own, ino)
}

// touched says that one of this mount's own changes, at seq, changed ino in a
// way that the reply did not tell. Whatever is older is not to be cached.
func (t *nodes) touched(ino fsop.Ino, seq uint64) {
	if seq == 0 {
		t.ownGen.Add(1)
		return
	}
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := s.known[ino]; ok {
		n.inval = max(n.inval, seq)
		s.known[ino] = n
	}
}

// replaced says that one of this mount's own changes, which began at b, changed
// an inode that the reply did not name, or at a position that it did not tell.
// What the reply did name may be remembered under the began that is returned, if
// there was no other such change meanwhile.
func (t *nodes) replaced(b began) began {
	if own := t.ownGen.Add(1); own == b.own+1 {
		b.own = own
	}
	return b
}

// ownAttr returns attributes of ino that are still true, if there are any.
func (t *nodes) ownAttr(ino fsop.Ino) (fsop.Attr, uint64, bool) {
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := s.own[ino]
	if !ok {
		return fsop.Attr{}, 0, false
	}
	if o.seq < s.known[ino].inval || o.gen != t.ownGen.Load() {
		delete(s.own, ino)
		return fsop.Attr{}, 0, false
	}
	return o.attr, o.seq, true
}

// drop forgets everything that was remembered of inodes but that they are
// known, and lets no reply be cached to a request that began before. It returns
// the inodes that the kernel knows.
func (t *nodes) drop() []fsop.Ino {
	t.dropGen.Add(1)
	t.whole.clear()
	var all []fsop.Ino
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		clear(s.own)
		for ino, n := range s.known {
			n.watched, n.noCap = false, false
			s.known[ino] = n
			all = append(all, ino)
		}
		s.mu.Unlock()
	}
	return all
}

// forgot takes n of the kernel's lookups of ino back, and says whether the
// kernel does not know it any more.
func (t *nodes) forgot(ino fsop.Ino, n uint64) (unknown bool) {
	t.forgetMu.Lock()
	defer t.forgetMu.Unlock()
	t.forgotten[ino] += n
	s := t.shard(ino)
	s.mu.Lock()
	defer s.mu.Unlock()
	k, ok := s.known[ino]
	if !ok || ino == fsop.RootIno {
		return false
	}
	if uint64(k.lookups) > n {
		k.lookups -= uint32(n)
		s.known[ino] = k
		return false
	}
	delete(s.known, ino)
	delete(s.own, ino)
	if k.kind == s_IFDIR {
		t.whole.spoil(ino)
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
		for ino, n := range s.known {
			all = append(all, proto.Hold{Ino: ino, N: uint64(n.lookups)})
		}
		s.mu.Unlock()
	}
	return all
}
