package brick

import (
	"sync"
	"time"

	"mortar/internal/brick/meta"
	"mortar/internal/disk"
	"mortar/internal/fsop"
)

// space knows how much room the disk has. Asking the file system costs little,
// but not so little that every write should.
type space struct {
	mu    sync.Mutex
	at    time.Time // of the sample
	disk  disk.Space
	spent uint64 // by entries executed since the sample, bytes
	room  uint64 // what the bricks of the set can take, as the primary knows
}

const (
	sampleAge = time.Second
	// compactRoom is what the KV may need on the way to needing less.
	compactRoom = 16 << 20
)

// sample returns the disk's space, at most a second old if there is plenty. need
// is what the caller is about to spend. b.space.mu is held.
func (b *Brick) sample(need uint64) (disk.Space, error) {
	s := &b.space
	fresh := time.Since(s.at) < sampleAge
	if plenty := s.disk.Avail > 4*b.reserve(s.disk.Total)+s.spent+need; !fresh || !plenty {
		d, err := b.opts.FS.Statfs(b.home)
		if err != nil {
			return d, err
		}
		s.disk, s.at, s.spent = d, time.Now(), 0
	}
	return s.disk, nil
}

// reserve is what ordinary writes may not use: the room for what was executed
// and is still in memory only, for the next segment of the log, and for tidying up.
func (b *Brick) reserve(total uint64) uint64 {
	r := uint64(float64(total) * b.opts.Reserve)
	return max(r, min(uint64(meta.MaxUnflushed(b.opts.MemTable)+compactRoom+b.opts.SegmentSize), total/8))
}

// free returns the bytes that ordinary writes may still use, and those that
// deletions may. b.space.mu is held.
func (b *Brick) free(need uint64) (ordinary, all uint64, d disk.Space, err error) {
	d, err = b.sample(need)
	if err != nil {
		return 0, 0, d, err
	}
	promised := uint64(max(b.backlog.promised.Load(), 0)) + b.space.spent
	if promised < d.Avail {
		all = d.Avail - promised
	}
	if r := b.reserve(d.Total); r < all {
		ordinary = all - r
	}
	if ordinary < d.Total/16 {
		// The log need not be longer than it must. Better now than when it is full.
		b.settle.squeeze()
	}
	return ordinary, all, d, nil
}

// Admit says whether there is room for op: fsop.ENOSPC if not. What frees space
// is admitted as long as there is any room at all.
func (b *Brick) Admit(op fsop.Op) error {
	need, frees := fsop.Space(op)
	b.space.mu.Lock()
	defer b.space.mu.Unlock()
	ordinary, all, d, err := b.free(need)
	if err != nil {
		return b.fail(err)
	}
	if frees && all > b.reserve(d.Total)/8 || !frees && ordinary >= need {
		return nil
	}
	return fsop.ENOSPC
}

// spend counts an entry that was executed.
func (b *Brick) spend(op fsop.Op) {
	need, _ := fsop.Space(op)
	b.space.mu.Lock()
	b.space.spent += need
	b.space.mu.Unlock()
}

// Free returns how many bytes of ordinary writes the brick can still take.
func (b *Brick) Free() uint64 {
	b.space.mu.Lock()
	defer b.space.mu.Unlock()
	ordinary, _, _, err := b.free(0)
	if err != nil {
		b.fail(err)
		return 0
	}
	return ordinary
}

// inodeSpace is about what an empty file takes in the KV.
const inodeSpace = 512

// SetRoom says how many bytes the other bricks of the set can take: what they cannot,
// this one is not given either.
func (b *Brick) SetRoom(n uint64) {
	b.space.mu.Lock()
	b.space.room = n
	b.space.mu.Unlock()
}

// statfs answers Statfs. Less is said to be available than is given: what statfs said is
// reserved a moment later (fallocate), and meanwhile a segment of the log may have been
// begun, or another brick's be known to be, and others write to the disks. b.mu is held.
func (b *Brick) statfs(op *fsop.StatfsOp, r *fsop.Reply) error {
	b.space.mu.Lock()
	ordinary, all, d, err := b.free(0)
	ordinary = min(ordinary, b.space.room)
	b.space.mu.Unlock()
	if err != nil {
		return err
	}
	ordinary -= min(ordinary, b.reserve(d.Total)/4)
	files := ordinary / inodeSpace
	if d.Files > 0 {
		files = min(files, d.FilesFree)
	}
	r.Statfs = fsop.Statfs{
		Total: d.Total, Free: all, Avail: ordinary,
		Files: b.state.Inodes + files, FilesFree: files,
	}
	return b.narrow(op.Ino, &r.Statfs)
}
