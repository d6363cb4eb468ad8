package brick

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"mortar/internal/brick/data"
	"mortar/internal/brick/meta"
	"mortar/internal/cluster"
	"mortar/internal/fsop"
)

// What becomes of blocks that are known to be rotten. Nobody reads them: other bricks
// are asked for what they should be. The block that is accepted is the one that fits
// the checksum which the rotten one does not fit, so it makes no difference how many
// bricks there are or who is the primary. A block that lost its checksum, because it
// was written to in part after it had rotted, can only be told by the file's Content:
// equal there means equal bytes.

// patience is how long a reader waits for other bricks. One that is silent leaves
// the set within two seconds, and then somebody else is asked.
const patience = 3 * time.Second

// readElsewhere fills a piece of a rotten block with what another brick has. The reader
// sees afterwards whether the file's Content is still content, and tries again otherwise.
func (b *Brick) readElsewhere(ctx context.Context, content cluster.Pos, name data.Name, p *piece) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	k := uint64(p.off) / sumSize
	for {
		got, err := b.borrow(ctx, name, k, p.rotten, content)
		if err == nil {
			clear(p.p)
			if from := uint64(p.off) % sumSize; from < uint64(len(got.Data)) {
				copy(p.p, got.Data[from:])
			}
			return nil
		}
		if b.opts.Others == nil || b.alone() || ctx.Err() != nil {
			return &rottenBlock{name, b.data.Path(name), k, err}
		}
		select {
		case <-time.After(borrowPause):
		case <-ctx.Done():
		}
	}
}

// borrowPause is between two attempts to find a brick that has a block.
const borrowPause = 50 * time.Millisecond

// borrow asks other bricks for what rotten block k should be, of a file that had
// Content content here a moment ago.
func (b *Brick) borrow(ctx context.Context, name data.Name, k uint64, r *meta.Rotten, content cluster.Pos) (got Block, err error) {
	if b.opts.Others == nil {
		return got, errNobody
	}
	err = b.opts.Others(ctx, name.Ino, k, func(o Block) bool {
		switch {
		case len(o.Data) > sumSize:
			return false
		case r.Known && meta.SumOf(o.Data) != r.Sum:
			return false
		case !r.Known && (o.Content == cluster.Pos{} || o.Content.Compare(content) < 0):
			return false
		}
		got = o
		return true
	})
	if err == nil && !r.Known {
		// It has what was changed here up to content, and perhaps more. What is
		// committed there will have been applied here when it is known to be here.
		err = b.waitCommitted(ctx, got.Content.Seq)
	}
	return got, err
}

// Block returns block k of a file for another brick on which it has rotted. What is
// rotten here, too, is an error.
func (b *Brick) Block(ctx context.Context, ino fsop.Ino, k uint64) (Block, error) {
	if err := b.Err(); err != nil {
		return Block{}, err
	}
	if k >= fsop.MaxSize/sumSize {
		return Block{}, fsop.EINVAL
	}
	found, err := b.checkBlock(ino, k)
	if err != nil {
		return Block{}, err
	}
	if found == blockRotten {
		return Block{}, fmt.Errorf("block %d of inode %d has rotted here, too", k, ino)
	}
	if !b.Whole() {
		// What the file should have is not known here, but what it has may be right.
		v, ok, err := b.viewChunk(ino, k/meta.SumChunk)
		if err != nil || !ok || int(k%meta.SumChunk) >= v.blocks() {
			return Block{}, errors.Join(err, fsop.ESTALE)
		}
		p, err := b.readBlock(&v, int(k%meta.SumChunk), make([]byte, sumSize))
		return Block{Data: p}, err
	}
	p, n, err := b.readCommitted(ctx, ino, k*sumSize, sumSize)
	if err != nil {
		return Block{}, err
	}
	if n == nil {
		return Block{}, fsop.ESTALE
	}
	return Block{Content: n.Content, Data: p}, nil
}

// onlyRotten reports whether err is about a block that nobody has: then only that
// cannot be read, and it is said which one it is.
func (b *Brick) onlyRotten(err error) bool {
	var r *rottenBlock
	if !errors.As(err, &r) {
		return false
	}
	if now := time.Now().UnixNano(); now >= b.said.Load()+int64(sayDamaged) {
		b.said.Store(now)
		b.clog.Error("a part of a file cannot be read", "err", err)
	}
	return true
}

// WantRepair has RepairWanted tell once more.
func (b *Brick) WantRepair() { b.kickRepair() }

// kickRepair has Repair called, by whoever has asked for that with RepairWanted.
func (b *Brick) kickRepair() {
	select {
	case b.repairWanted <- struct{}{}:
	default:
	}
}

// RepairWanted returns a channel that tells when blocks were found to be rotten, or
// when what was in the way of their repair may be gone.
func (b *Brick) RepairWanted() <-chan struct{} { return b.repairWanted }

// RottenBlock is a block that is known to be rotten.
type RottenBlock struct {
	Ino      fsop.Ino
	From, To uint64 // bytes of the file
	File     string // the data file
	Found    time.Time

	name data.Name
	k    uint64
}

// Rotten returns the blocks that are known to be rotten, at most limit of them, and how many there are.
func (b *Brick) Rotten(limit int) (some []RottenBlock, count int) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	for name, blocks := range b.rotten {
		for k, r := range blocks {
			if count++; len(some) < limit {
				some = append(some, RottenBlock{
					Ino: name.Ino, From: k * sumSize, To: (k + 1) * sumSize, File: b.data.Path(name), Found: time.Unix(0, r.Found), name: name, k: k,
				})
			}
		}
	}
	return some, count
}

// errLater says that a block cannot be repaired now, for a reason that passes.
var errLater = errors.New("it is being written")

// Repair repairs a rotten block, which Rotten returned. A block that was overwritten
// or removed meanwhile needs none.
func (b *Brick) Repair(ctx context.Context, r RottenBlock) error {
	v, ok, err := b.viewChunk(r.Ino, r.k/meta.SumChunk)
	if err != nil {
		return err
	}
	i := int(r.k % meta.SumChunk)
	b.mu.RLock()
	record := b.rotten[r.name][r.k]
	b.mu.RUnlock()
	if record == nil {
		return nil
	}
	fix := &repair{name: r.name, k: r.k, record: record}
	if !ok || v.name != r.name || i >= v.blocks() {
		return b.repair(ctx, fix) // nobody reads it any more
	}
	if record.Known {
		err := b.evictBlock(&v, i)
		p := make([]byte, sumSize)
		if err == nil {
			p, err = b.readBlock(&v, i, p)
		}
		if err == nil && meta.SumOf(p) == record.Sum {
			fix.data = p // it came back, as if the disk had only been out of order
			return b.repair(ctx, fix)
		} else if errors.Is(err, fs.ErrNotExist) {
			return b.missing(&v, err)
		}
	} else if v.busy>>i&1 != 0 {
		b.settle.kick()
		return errLater
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	got, err := b.borrow(ctx, r.name, r.k, record, v.content)
	if err != nil {
		return err
	}
	fix.data = make([]byte, min(sumSize, v.len-r.k*sumSize))
	copy(fix.data, got.Data)
	return b.repair(ctx, fix)
}

// missing is what a data file that is gone does to the brick.
func (b *Brick) missing(v *chunkView, err error) error {
	if err = b.stillMissing(v, err); err == nil || b.lost(err) {
		return err
	}
	return b.failWith(err)
}

// repair is a block that the settler is to write, because nobody else changes data
// files while it does.
type repair struct {
	name   data.Name
	k      uint64
	record *meta.Rotten
	data   []byte // nil: there is no such block any more
	done   chan error
}

// repair hands a block to the settler and waits.
func (b *Brick) repair(ctx context.Context, r *repair) error {
	r.done = make(chan error, 1)
	b.repairsMu.Lock()
	b.repairs = append(b.repairs, r)
	b.repairsMu.Unlock()
	b.settle.kick()
	select {
	case err := <-r.done:
		return err
	case <-b.failed:
		return b.err
	case <-b.settle.done:
		return ErrClosed
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// makeRepairs writes what is to be repaired. b.settling is held.
func (b *Brick) makeRepairs(stop func() bool) {
	for !stop() {
		b.repairsMu.Lock()
		if len(b.repairs) == 0 {
			b.repairsMu.Unlock()
			return
		}
		r := b.repairs[0]
		b.repairs = b.repairs[1:]
		b.repairsMu.Unlock()
		r.done <- b.makeRepair(r)
	}
}

func (b *Brick) makeRepair(r *repair) error {
	v, ok, err := b.viewChunk(r.name.Ino, r.k/meta.SumChunk)
	if err != nil {
		return err
	}
	i := int(r.k % meta.SumChunk)
	if ok = ok && v.name == r.name && i < v.blocks(); !ok {
		return b.repaired(r, nil)
	}
	b.mu.RLock()
	same := b.rotten[r.name][r.k] == r.record
	b.mu.RUnlock()
	if !same || r.data == nil || !r.record.Known && v.busy>>i&1 != 0 {
		return errLater
	}
	// The record is still the one that was asked about, so nothing was settled into
	// the block since, and nothing is going to be now: what is written here is what every
	// state of the KV that a crash may leave has there, or has an extent above.
	f, err := b.data.Open(r.name)
	if errors.Is(err, fs.ErrNotExist) {
		return b.missing(&v, err)
	}
	if err != nil {
		return err
	}
	defer f.Release()
	want := r.data[:min(uint64(len(r.data)), v.len-r.k*sumSize)]
	if _, err := f.WriteAt(want, int64(r.k*sumSize)); err != nil {
		return err
	}
	if err := f.SyncData(); err != nil {
		return err
	}
	if err := b.evictBlock(&v, i); err != nil {
		return err
	}
	got, err := b.readBlock(&v, i, make([]byte, sumSize))
	if err != nil {
		return err
	}
	if !bytes.Equal(bytes.TrimRight(got, "\x00"), bytes.TrimRight(want, "\x00")) {
		return fmt.Errorf("block %d of data file %s was written anew and is rotten again: check the disk", r.k, b.data.Path(r.name))
	}
	return b.repaired(r, &v)
}

// repaired takes back the note of a rotten block. v is nil if the block is no more.
func (b *Brick) repaired(r *repair, v *chunkView) error {
	defer b.lockAll()()
	if b.closed.Load() {
		return ErrClosed
	}
	if b.rotten[r.name][r.k] != r.record {
		return errLater
	}
	batch := b.store.NewBatch()
	defer batch.Close()
	batch.DeleteRotten(r.name.Ino, r.name.Incarnation, r.k)
	scrub := b.scrub
	if v != nil {
		scrub.Repaired++
		batch.SetScrub(&scrub)
		// It has its checksum again, unless it is about to be changed.
		n, err := b.current(v)
		if err != nil {
			return err
		}
		chunk, i := r.k/meta.SumChunk, r.k%meta.SumChunk
		busy := false
		b.extents[r.name.Ino].each(r.k*sumSize, (r.k+1)*sumSize, func(*meta.Extent) bool { busy = true; return false })
		if n != nil && !busy {
			sums, err := b.sums(&n.Inode, r.name.Incarnation, chunk)
			if err != nil {
				return err
			}
			sums.Made, sums.Has = n.Content, sums.Has|1<<i
			sums.Sum[i] = meta.SumOf(r.data[:min(uint64(len(r.data)), v.len-r.k*sumSize)])
			batch.SetSums(r.name.Ino, r.name.Incarnation, chunk, &sums)
		}
	}
	if err := b.store.Commit(batch); err != nil {
		return err
	}
	b.scrub = scrub
	b.setRotten(r.name, map[uint64]*meta.Rotten{r.k: nil})
	return nil
}
