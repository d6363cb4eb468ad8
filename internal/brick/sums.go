package brick

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"

	"mortar/internal/brick/data"
	"mortar/internal/brick/meta"
	"mortar/internal/cluster"
	"mortar/internal/fsop"
)

// Blocks of data files have checksums, made when a file has been quiet for a while
// (scrub.go). They are of what the data file has, whatever extents lie above it, and
// rest on one rule more than the three of the package:
//
//  4. A block of a data file is changed only after a flush has made it durable that
//     it has no checksum.
//
// So whichever state of the KV a crash leaves, a checksum in it is of the bytes that
// were last written there, and one that does not fit says that the disk has lost them.
// Settling therefore begins by forgetting the checksums of the blocks that it is going
// to change (unsign). Of a block that it will change in part it first sees whether the
// rest is still what it was: otherwise a checksum that is made later would be one of
// what has rotted.
//
// A block that is not what its checksum says is rotten: it is noted, nobody is shown
// it or copies it, and it is repaired from another brick (rot.go).

const sumSize = meta.SumBlock

// blockBuffers is memory for blocks.
type blockBuffers struct{ pool sync.Pool } // of *[sumSize]byte

func (p *blockBuffers) get() *[sumSize]byte {
	if b, ok := p.pool.Get().(*[sumSize]byte); ok {
		return b
	}
	return new([sumSize]byte)
}

func (p *blockBuffers) put(b *[sumSize]byte) { p.pool.Put(b) }

// chunkView is what is known of the blocks of one chunk of a data file.
type chunkView struct {
	ino     fsop.Ino
	chunk   uint64
	name    data.Name
	len     uint64      // of the data file
	content cluster.Pos // of the inode
	changed int64       // when the inode was last changed
	gen     uint64
	sums    meta.Sums
	busy    uint32 // extents lie above them
	rotten  uint32 // known to be
	used    uint32 // have contents other than holes
}

// blocks is how many blocks of the chunk the file has.
func (v *chunkView) blocks() int {
	n := (v.len + sumSize - 1) / sumSize
	first := v.chunk * meta.SumChunk
	return int(min(max(n, first)-first, meta.SumChunk))
}

// block is the number of the i-th block of the chunk.
func (v *chunkView) block(i int) uint64 { return v.chunk*meta.SumChunk + uint64(i) }

// bits are those of the blocks of a chunk that a range of bytes touches.
func chunkBits(chunk, from, to uint64) (bits uint32) {
	lo, hi := chunk*meta.SumChunk, (chunk+1)*meta.SumChunk
	for k := max(from/sumSize, lo); k < hi && k*sumSize < to; k++ {
		bits |= 1 << (k - lo)
	}
	return bits
}

// viewChunk looks at a chunk. ok is false if there is no such block in a data file.
func (b *Brick) viewChunk(ino fsop.Ino, chunk uint64) (v chunkView, ok bool, err error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.closed.Load() {
		return v, false, ErrClosed
	}
	n, err := b.inode(ino)
	if errors.Is(err, fsop.ESTALE) {
		return v, false, nil
	}
	if err != nil || !n.IsRegular() {
		return v, false, err
	}
	base, err := b.knownBase(n)
	if err != nil || base.Kind != meta.BaseFile || chunk*meta.SumChunk*sumSize >= base.Len {
		return v, false, err
	}
	v = chunkView{
		ino: ino, chunk: chunk, name: data.Name{Ino: ino, Incarnation: base.Incarnation}, len: base.Len,
		content: n.Content, changed: n.Ctime, gen: b.gen.Load(),
	}
	if v.sums, err = b.sums(&n.Inode, base.Incarnation, chunk); err != nil {
		return v, false, err
	}
	from, to := chunk*meta.SumChunk*sumSize, (chunk+1)*meta.SumChunk*sumSize
	b.extents[ino].each(from, to, func(e *meta.Extent) bool {
		v.busy |= chunkBits(chunk, e.Off, e.End())
		return true
	})
	for k := range b.rotten[v.name] {
		if k/meta.SumChunk == chunk {
			v.rotten |= 1 << (k % meta.SumChunk)
		}
	}
	if n.Flags&meta.Sparse == 0 {
		v.used = ^uint32(0)
		return v, true, nil
	}
	err = b.store.Runs(ino, blocksDown(from), func(r meta.Run) (bool, error) {
		v.used |= chunkBits(chunk, r.Start*blockSize, r.End*blockSize)
		return r.End*blockSize < to, nil
	})
	return v, true, err
}

// sums reads the checksums of a chunk as far as they may be believed. b.mu or
// b.wmu is held.
func (b *Brick) sums(n *meta.Inode, incarnation, chunk uint64) (meta.Sums, error) {
	s, err := b.store.Sums(n.Ino, incarnation, chunk)
	if n.Content.Compare(s.Made) < 0 {
		s = meta.Sums{} // of a history that was undone
	}
	return s, err
}

// withBlock opens the data file of a chunk for something about its i-th block.
func (b *Brick) withBlock(v *chunkView, i int, do func(f *data.File, off int64) error) error {
	f, err := b.data.Open(v.name)
	if err != nil {
		return err
	}
	defer f.Release()
	return do(f, int64(v.block(i)*sumSize))
}

// readBlock reads the i-th block of a chunk from the data file into buf, less what
// is behind the file's length.
func (b *Brick) readBlock(v *chunkView, i int, buf []byte) ([]byte, error) {
	p := buf[:min(sumSize, v.len-v.block(i)*sumSize)]
	return p, b.withBlock(v, i, func(f *data.File, off int64) error { return readFull(f, p, off) })
}

// evictBlock has the next read of a block come from the disk.
func (b *Brick) evictBlock(v *chunkView, i int) error {
	return b.withBlock(v, i, func(f *data.File, off int64) error { return f.Evict(off, sumSize) })
}

// fetchBlock is evictBlock, and begins to read.
func (b *Brick) fetchBlock(v *chunkView, i int) error {
	return b.withBlock(v, i, func(f *data.File, off int64) error {
		err := f.Evict(off, sumSize)
		if err == nil {
			err = f.Prefetch(off, sumSize)
		}
		return err
	})
}

// fits reports whether the i-th block of a chunk is what its checksum says. A block
// that cannot be read does not; only a file that is gone is an error.
func (b *Brick) fits(v *chunkView, i int, buf []byte) (bool, error) {
	for try := range 2 {
		if try > 0 { // what came from memory may be right on the disk
			if err := b.evictBlock(v, i); err != nil {
				return false, err
			}
		}
		p, err := b.readBlock(v, i, buf)
		if errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
		if err == nil && meta.SumOf(p) == v.sums.Sum[i] {
			return true, nil
		}
	}
	return false, nil
}

// Verdicts about a block.
type verdict int

const (
	blockNone     verdict = iota // there is none in a data file, or it was changed meanwhile
	blockUnsigned                // it has no checksum
	blockGood
	blockRotten
)

// checkBlock says what is to be thought of block k of a file's settled contents.
// Rot that it finds is noted.
func (b *Brick) checkBlock(ino fsop.Ino, k uint64) (verdict, error) {
	v, ok, err := b.viewChunk(ino, k/meta.SumChunk)
	i := int(k % meta.SumChunk)
	switch {
	case err != nil:
		return blockNone, err
	case !ok || i >= v.blocks():
		return blockNone, nil
	case v.rotten>>i&1 != 0:
		return blockRotten, nil
	case v.sums.Has>>i&1 == 0:
		return blockUnsigned, nil
	}
	buf := b.blocks.get()
	defer b.blocks.put(buf)
	good, err := b.fits(&v, i, buf[:])
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return blockNone, b.stillMissing(&v, err)
	case err != nil:
		return blockNone, err
	case good:
		return blockGood, nil
	}
	bad, err := b.condemn(&v, 1<<i)
	if bad == 0 || err != nil {
		return blockNone, err
	}
	return blockRotten, nil
}

// stillMissing is the error of a data file that is not there: none if the file has
// another one by now.
func (b *Brick) stillMissing(v *chunkView, err error) error {
	now, ok, verr := b.viewChunk(v.ino, v.chunk)
	if verr != nil || !ok || now.name != v.name {
		return verr
	}
	return b.missingFile(v.name, err)
}

// current returns what v is of as it is now; nil if that is another data file by
// now. b.wmu and b.mu are held.
func (b *Brick) current(v *chunkView) (*node, error) {
	if b.closed.Load() {
		return nil, ErrClosed
	}
	if b.gen.Load() != v.gen {
		return nil, nil
	}
	n, err := b.inode(v.ino)
	if errors.Is(err, fsop.ESTALE) {
		return nil, nil
	}
	if err != nil || !n.IsRegular() {
		return nil, err
	}
	base, err := b.baseOf(n)
	if err != nil || base.Kind != meta.BaseFile || base.Incarnation != v.name.Incarnation {
		return nil, err
	}
	return n, nil
}

// lockAll locks out everybody who reads or changes the KV, and returns how to let them in again.
func (b *Brick) lockAll() (unlock func()) {
	b.wmu.Lock()
	b.mu.Lock()
	return func() {
		b.mu.Unlock()
		b.wmu.Unlock()
	}
}

// condemn notes that blocks of a chunk are rotten, if the checksums that they did
// not fit are still theirs. It returns those that are. Neither b.wmu nor b.mu is held.
func (b *Brick) condemn(v *chunkView, bad uint32) (uint32, error) {
	defer b.lockAll()()
	n, err := b.current(v)
	if n == nil || err != nil {
		return 0, err
	}
	now, err := b.sums(&n.Inode, v.name.Incarnation, v.chunk)
	if err != nil {
		return 0, err
	}
	found := map[uint64]*meta.Rotten{}
	for i := range meta.SumChunk {
		if bad>>i&1 != 0 && now.Has>>i&1 != 0 && now.Sum[i] == v.sums.Sum[i] {
			found[v.block(i)] = &meta.Rotten{Sum: now.Sum[i], Known: true, Found: time.Now().UnixNano()}
			now.Has &^= 1 << i
		} else {
			bad &^= 1 << i
		}
	}
	if bad == 0 {
		return 0, nil
	}
	return bad, b.commitSums(v.name, v.chunk, &now, found)
}

// commitSums replaces the checksums of a chunk, and notes blocks that were found to be
// rotten. b.wmu and b.mu are held.
func (b *Brick) commitSums(name data.Name, chunk uint64, sums *meta.Sums, found map[uint64]*meta.Rotten) error {
	batch := b.store.NewBatch()
	defer batch.Close()
	batch.SetSums(name.Ino, name.Incarnation, chunk, sums)
	for k, r := range found {
		batch.SetRotten(name.Ino, name.Incarnation, k, *r)
	}
	scrub := b.scrub
	if len(found) > 0 {
		scrub.Found += uint64(len(found))
		batch.SetScrub(&scrub)
	}
	if err := b.store.Commit(batch); err != nil {
		return err
	}
	b.scrub = scrub
	b.setRotten(name, found)
	for k := range found {
		b.clog.Error("a block of a data file is rotten: the disk has other bytes than were written", "inode", name.Ino, "from", k*sumSize, "to", (k+1)*sumSize, "file", b.data.Path(name))
	}
	if len(found) > 0 {
		b.kickRepair()
	}
	return nil
}

// sign gives checksums to the blocks of a chunk, made of what v saw, unless something
// has changed since. It returns how many it gave. Neither b.wmu nor b.mu is held.
func (b *Brick) sign(v *chunkView, made uint32, sums *[meta.SumChunk]uint64) (int, error) {
	defer b.lockAll()()
	n, err := b.current(v)
	if n == nil || err != nil || n.Content != v.content || !b.whole {
		return 0, err
	}
	now, err := b.sums(&n.Inode, v.name.Incarnation, v.chunk)
	if err != nil {
		return 0, err
	}
	count := 0
	for i := range meta.SumChunk {
		if made>>i&1 != 0 && now.Has>>i&1 == 0 && b.rotten[v.name][v.block(i)] == nil {
			now.Has |= 1 << i
			now.Sum[i] = sums[i]
			count++
		}
	}
	if count == 0 {
		return 0, nil
	}
	now.Made = n.Content
	return count, b.commitSums(v.name, v.chunk, &now, nil)
}

// unsign forgets the checksums of all blocks that extents up to the sequence which it
// returns lie above. It is for the flush after which they may be settled; b.settling
// is held.
func (b *Brick) unsign(stop func() bool) (upto uint64, err error) {
	type file struct {
		ino  fsop.Ino
		exts []meta.Extent
	}
	b.wmu.Lock()
	limit := b.state.Pos.Seq
	files := make([]file, 0, len(b.extents))
	for ino, x := range b.extents {
		files = append(files, file{ino, x.all(func(*meta.Extent) bool { return true })})
	}
	b.wmu.Unlock()
	for _, f := range files {
		if len(f.exts) == 0 {
			continue
		}
		if stop() {
			return 0, nil
		}
		if err := b.unsignFile(f.ino, f.exts); err != nil {
			return 0, err
		}
	}
	return limit, nil
}

func (b *Brick) unsignFile(ino fsop.Ino, exts []meta.Extent) error {
	base, err := b.store.Base(ino, false)
	if err != nil || base.Kind != meta.BaseFile {
		return err
	}
	var chunks []uint64
	err = b.store.SumChunks(ino, base.Incarnation, exts[0].Off/(sumSize*meta.SumChunk), func(chunk uint64, _ *meta.Sums) (bool, error) {
		if chunk*meta.SumChunk*sumSize >= exts[len(exts)-1].End() {
			return false, nil
		}
		chunks = append(chunks, chunk)
		return true, nil
	})
	if err != nil {
		return err
	}
	for _, chunk := range chunks {
		if err := b.unsignChunk(ino, base.Incarnation, chunk, exts); err != nil {
			return err
		}
	}
	return nil
}

// unsignChunk sees to the blocks of one chunk that have a checksum and will be changed.
func (b *Brick) unsignChunk(ino fsop.Ino, incarnation, chunk uint64, exts []meta.Extent) error {
	v, ok, err := b.viewChunk(ino, chunk)
	if err != nil || !ok || v.name.Incarnation != incarnation {
		return err
	}
	var touched, bad uint32
	for _, e := range within(exts, chunk*meta.SumChunk*sumSize, (chunk+1)*meta.SumChunk*sumSize) {
		touched |= chunkBits(chunk, e.Off, e.End())
	}
	if touched &= v.sums.Has; touched == 0 {
		return nil
	}
	buf := b.blocks.get()
	defer b.blocks.put(buf)
	for i := range v.blocks() {
		k := v.block(i)
		if touched>>i&1 == 0 || covers(exts, k*sumSize, min((k+1)*sumSize, v.len)) {
			continue
		}
		good, err := b.fits(&v, i, buf[:])
		if errors.Is(err, fs.ErrNotExist) {
			if err = b.stillMissing(&v, err); err == nil {
				return nil // the file was emptied meanwhile
			}
		}
		if err != nil {
			return err
		}
		if !good {
			bad |= 1 << i
		}
	}
	defer b.lockAll()()
	n, err := b.current(&v)
	if n == nil || err != nil {
		return err
	}
	now, err := b.store.Sums(ino, incarnation, chunk)
	if err != nil {
		return err
	}
	found := map[uint64]*meta.Rotten{}
	for i := range meta.SumChunk {
		if bad>>i&1 != 0 {
			// What it shall be is not what the checksum says any more.
			found[v.block(i)] = &meta.Rotten{Found: time.Now().UnixNano()}
		}
	}
	now.Has &^= touched
	return b.commitSums(v.name, chunk, &now, found)
}

// within are those of extents, in order, that overlap a range.
func within(exts []meta.Extent, from, to uint64) []meta.Extent {
	i, _ := slices.BinarySearchFunc(exts, from, func(e meta.Extent, at uint64) int {
		if e.End() <= at {
			return -1
		}
		return 1
	})
	j := i
	for j < len(exts) && exts[j].Off < to {
		j++
	}
	return exts[i:j]
}

// covers reports whether extents, in order, leave nothing of a range.
func covers(exts []meta.Extent, from, to uint64) bool {
	for _, e := range within(exts, from, to) {
		if e.Off > from {
			return false
		}
		from = e.End()
	}
	return from >= to
}

// loadRotten reads what is known to be rotten. b.wmu and b.mu are held, or nobody has b yet.
func (b *Brick) loadRotten() (err error) {
	b.rotten = map[data.Name]map[uint64]*meta.Rotten{}
	err = b.store.Rotten(func(ino fsop.Ino, incarnation, block uint64, r meta.Rotten) error {
		b.setRotten(data.Name{Ino: ino, Incarnation: incarnation}, map[uint64]*meta.Rotten{block: &r})
		return nil
	})
	if err == nil {
		b.scrub, err = b.store.Scrub()
	}
	return err
}

// settledOver has a batch say what becomes of the rotten blocks of a file when exts
// are settled into it. It returns them as they then are, nil for those that are gone. b.wmu is held.
func (b *Brick) settledOver(batch *meta.Batch, name data.Name, length uint64, exts []meta.Extent) map[uint64]*meta.Rotten {
	var changed map[uint64]*meta.Rotten
	for k, r := range b.rotten[name] {
		from, to := k*sumSize, (k+1)*sumSize
		if len(within(exts, from, to)) == 0 {
			continue
		}
		if changed == nil {
			changed = map[uint64]*meta.Rotten{}
		}
		if covers(exts, from, min(to, max(length, from))) {
			batch.DeleteRotten(name.Ino, name.Incarnation, k)
			changed[k] = nil
			continue
		}
		// Another record, so that a repair of what was before is void.
		changed[k] = &meta.Rotten{Found: r.Found}
		batch.SetRotten(name.Ino, name.Incarnation, k, *changed[k])
	}
	return changed
}

// setRotten makes rotten blocks of a file what the KV has of them: nil, not rotten any
// more. b.wmu and b.mu are held.
func (b *Brick) setRotten(name data.Name, changed map[uint64]*meta.Rotten) {
	blocks := b.rotten[name]
	if blocks == nil {
		blocks = map[uint64]*meta.Rotten{}
	}
	for k, r := range changed {
		if r == nil {
			delete(blocks, k)
		} else {
			blocks[k] = r
		}
	}
	if b.rotten[name] = blocks; len(blocks) == 0 {
		delete(b.rotten, name)
	}
}

// A rottenBlock is the error of bytes that no brick can be asked for.
type rottenBlock struct {
	name  data.Name
	path  string
	block uint64
	why   error
}

func (e *rottenBlock) Error() string {
	return fmt.Sprintf("bytes %d to %d of inode %d are rotten in data file %s, and no other brick has them: %v", e.block*sumSize, (e.block+1)*sumSize, e.name.Ino, e.path, e.why)
}

func (e *rottenBlock) Unwrap() error { return e.why }

var errNobody = errors.New("there is nobody to ask")

// Others asks the other bricks of the set for block k of a file, one after the other,
// until use returns true. It returns why no answer was taken, or nil.
type Others func(ctx context.Context, ino fsop.Ino, k uint64, use func(Block) bool) error

// A Block is a block of a file as another brick has it.
type Block struct {
	// Content is the file's Content with which Data goes together. It is zero if the
	// brick does not know: then only a checksum can say whether Data is right.
	Content cluster.Pos
	Data    []byte // less what is behind the end of the file
}
