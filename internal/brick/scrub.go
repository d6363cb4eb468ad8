package brick

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io/fs"
	"maps"
	"slices"
	"time"

	"mortar/internal/brick/meta"
	"mortar/internal/fsop"
)

// ScrubOptions say how a brick is scrubbed.
type ScrubOptions struct {
	// Wait is called before so many bytes are read, and returns when they may be.
	// Required.
	Wait func(ctx context.Context, bytes int) error
	// Quiet is how long a file must not have been changed before its blocks get checksums.
	Quiet time.Duration
}

// Scrubbed says how far scrubbing has come.
type Scrubbed struct {
	Running bool
	Began   time.Time // of the round that runs or was the last; zero: none yet
	Ended   time.Time // of the last round that ended; zero: none yet
	// Percent is how far the round has come, by inodes.
	Percent float64
	// Of the round: bytes of data files that were read, blocks that were checked,
	// blocks that got a checksum, and blocks that were found to be rotten.
	Bytes, Checked, Made, Bad uint64
	// Since the brick was made: blocks found to be rotten, by whomever, and repaired.
	Found, Repaired uint64
	Rotten          int // blocks that are rotten now
}

// Scrubbed returns how far scrubbing has come.
func (b *Brick) Scrubbed() Scrubbed {
	b.mu.RLock()
	s, next := b.scrub, b.state.NextIno
	rotten := 0
	for _, blocks := range b.rotten {
		rotten += len(blocks)
	}
	b.mu.RUnlock()
	r := Scrubbed{
		Running: s.Running, Bytes: s.Bytes, Checked: s.Checked, Made: s.Made, Bad: s.Bad, Found: s.Found, Repaired: s.Repaired, Rotten: rotten,
	}
	if s.Began != 0 {
		r.Began = time.Unix(0, s.Began)
	}
	if s.Ended != 0 {
		r.Ended = time.Unix(0, s.Ended)
	}
	switch {
	case s.Running && next > 0:
		r.Percent = min(100, 100*float64(s.Next&(1<<48-1))/float64(next))
	case s.Ended != 0:
		r.Percent = 100
	}
	return r
}

// BeginScrub begins a round, which Scrub then carries out. One that is under way goes on.
func (b *Brick) BeginScrub() error {
	// What waits in the log is not looked at there.
	b.settle.force.Store(true)
	defer b.settle.kick()
	return b.noteScrub(func(s *meta.ScrubState) {
		if !s.Running {
			*s = meta.ScrubState{Running: true, Began: time.Now().UnixNano(), Ended: s.Ended, Found: s.Found, Repaired: s.Repaired}
		}
	})
}

func (b *Brick) noteScrub(change func(*meta.ScrubState)) error {
	defer b.lockAll()()
	if b.closed.Load() {
		return ErrClosed
	}
	s := b.scrub
	change(&s)
	batch := b.store.NewBatch()
	defer batch.Close()
	batch.SetScrub(&s)
	if err := b.store.Commit(batch); err != nil {
		return err
	}
	b.scrub = s
	return nil
}

const (
	// scrubKeep is how much of a round a crash may cost.
	scrubKeep = 30 * time.Second
	// scrubBases is how many files are looked for in one go, scrubValues how many bytes
	// of their contents.
	scrubBases  = 256
	scrubValues = 1 << 20
)

// Scrub goes on with the round that BeginScrub began, where it stopped, until the end
// or until ctx ends; then the next call goes on. It compares the blocks of data files
// with their checksums, makes those that are missing, and reads what the KV and
// the log have, which have checksums of their own: what is wrong there ends the service
// of a brick that has peers (ErrDamaged). It has one caller at a time.
func (b *Brick) Scrub(ctx context.Context, o ScrubOptions) error {
	b.mu.RLock()
	s := b.scrub
	b.mu.RUnlock()
	if !s.Running {
		return nil
	}
	kept := time.Now()
	for at := s.Next; ; {
		files, next, err := b.nextFiles(ctx, at, o)
		if err != nil {
			return b.scrubFailed(ctx, err)
		}
		for _, ino := range files {
			from := uint64(0)
			if ino == s.Next {
				from = s.Block
			}
			if err := b.scrubFile(ctx, ino, from, o, &kept); err != nil {
				return b.scrubFailed(ctx, err)
			}
		}
		if err := b.noteScrub(func(s *meta.ScrubState) { s.Next, s.Block = next, 0 }); err != nil {
			return err
		}
		if at = next; at == 0 {
			break
		}
	}
	if !b.alone() { // nobody could help, and what is read by nobody does no harm
		if err := b.scrubRecords(ctx, o); err != nil {
			return b.scrubFailed(ctx, err)
		}
	}
	err := b.noteScrub(func(s *meta.ScrubState) { s.Running, s.Ended = false, time.Now().UnixNano() })
	b.KeepScrub()
	return err
}

// scrubFailed is the end of a round that met err.
func (b *Brick) scrubFailed(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if cause := b.Err(); cause != nil {
		return cause
	}
	if err = damage(err); errors.Is(err, ErrDamaged) && !b.lost(err) {
		return b.failWith(err)
	}
	return err
}

// KeepScrub has the settler make durable how far scrubbing has come, and the checksums
// that it made.
func (b *Brick) KeepScrub() {
	b.settle.keep.Store(true)
	b.settle.kick()
}

// nextFiles returns files with a data file from inode at on, and where to go on
// looking; 0: nowhere. Contents that are in the KV are read on the way.
func (b *Brick) nextFiles(ctx context.Context, at fsop.Ino, o ScrubOptions) (files []fsop.Ino, next fsop.Ino, err error) {
	read := !b.alone()
	seen, size := 0, 0
	err = b.glance(ctx, func(v meta.View) error {
		return v.BaseKinds(at, read, func(ino fsop.Ino, kind meta.BaseKind, n int) bool {
			if seen == scrubBases || size > scrubValues {
				next = ino
				return false
			}
			seen++
			size += n
			if kind == meta.BaseFile {
				files = append(files, ino)
			}
			return true
		})
	})
	if err == nil && read {
		err = o.Wait(ctx, size)
	}
	return files, next, err
}

// scrubFile looks at all blocks of one file.
func (b *Brick) scrubFile(ctx context.Context, ino fsop.Ino, from uint64, o ScrubOptions, kept *time.Time) error {
	for chunk := from / meta.SumChunk; ; chunk++ {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		v, ok, err := b.viewChunk(ino, chunk)
		if err != nil || !ok {
			return err
		}
		did, err := b.scrubChunk(ctx, &v, o, true)
		if err != nil {
			return err
		}
		err = b.noteScrub(func(s *meta.ScrubState) {
			s.Next, s.Block = ino, (chunk+1)*meta.SumChunk
			s.Bytes += did.bytes
			s.Checked += did.checked
			s.Made += did.made
			s.Bad += did.bad
		})
		if err != nil {
			return err
		}
		if time.Since(*kept) > scrubKeep {
			*kept = time.Now()
			b.KeepScrub()
		}
	}
}

// quiet reports whether the file has not been changed for so long. A change that is still
// to come, by this clock, is an old one.
func (v *chunkView) quiet(since time.Duration) bool {
	age := time.Duration(time.Now().UnixNano() - v.changed)
	return age < 0 || age >= since
}

type chunkScrubbed struct{ bytes, checked, made, bad uint64 }

// scrubChunk compares the blocks of a chunk with their checksums, if check, and
// makes those that are missing.
func (b *Brick) scrubChunk(ctx context.Context, v *chunkView, o ScrubOptions, check bool) (did chunkScrubbed, err error) {
	buf := b.blocks.get()
	defer b.blocks.put(buf)
	var sums [meta.SumChunk]uint64
	var made, bad uint32
	unsigned := v.used &^ (v.busy | v.rotten | v.sums.Has)
	if !v.quiet(o.Quiet) {
		unsigned = 0
	}
	for i := range v.blocks() {
		signed := check && v.sums.Has>>i&1 != 0
		if !signed && unsigned>>i&1 == 0 {
			continue
		}
		if signed {
			// What the disk has, not what memory has of it. The disk is at work while
			// this waits for its turn: a thread that waits for a disk holds others up.
			if err := b.fetchBlock(v, i); err != nil {
				return did, b.notThere(v, err)
			}
		}
		if err := o.Wait(ctx, sumSize); err != nil {
			return did, err
		}
		did.bytes += min(sumSize, v.len-v.block(i)*sumSize)
		if signed {
			good, err := b.fits(v, i, buf[:])
			if err == nil {
				err = b.evictBlock(v, i) // whoever works here needs the memory more
			}
			if err != nil {
				return did, b.notThere(v, err)
			}
			did.checked++
			if !good {
				bad |= 1 << i
			}
			continue
		}
		p, err := b.readBlock(v, i, buf[:]) // what was written, not what the disk has made of it
		if errors.Is(err, fs.ErrNotExist) {
			return did, b.notThere(v, err)
		}
		if err != nil {
			// Nobody knows what it should be, so whoever reads it finds that out.
			b.clog.Error("a block of a data file cannot be read", "inode", v.ino, "from", v.block(i)*sumSize, "file", b.data.Path(v.name), "err", err)
			did.bad++
			continue
		}
		made |= 1 << i
		sums[i] = meta.SumOf(p)
	}
	if bad != 0 {
		if bad, err = b.condemn(v, bad); err != nil {
			return did, err
		}
		for ; bad != 0; bad &= bad - 1 {
			did.bad++
		}
	}
	if made != 0 {
		n, err := b.sign(v, made, &sums)
		did.made = uint64(n)
		return did, err
	}
	return did, nil
}

// notThere is the error of a data file that is gone, none if it may be.
func (b *Brick) notThere(v *chunkView, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return b.stillMissing(v, err)
	}
	return err
}

// maxFresh is how many files that were settled are remembered until they are quiet. The
// others get their checksums in the next round.
const maxFresh = 1 << 14

// freshFile notes that blocks of a file have lost their checksums, or never had any.
// b.wmu is held.
func (b *Brick) freshFile(ino fsop.Ino) {
	if len(b.fresh) < maxFresh {
		b.fresh[ino] = struct{}{}
	}
}

// SignFresh makes the checksums of files that were changed and have been quiet since.
// It has one caller at a time, who does not call Scrub meanwhile.
func (b *Brick) SignFresh(ctx context.Context, o ScrubOptions) error {
	b.wmu.Lock()
	all := slices.Sorted(maps.Keys(b.fresh))
	b.wmu.Unlock()
	for _, ino := range all {
		quiet, err := b.signFile(ctx, ino, o)
		if err != nil {
			return b.scrubFailed(ctx, err)
		}
		if quiet {
			b.wmu.Lock()
			delete(b.fresh, ino)
			b.wmu.Unlock()
		}
	}
	return nil
}

// signFile makes the checksums that a file lacks. quiet is false if it was changed
// lately, or is being changed.
func (b *Brick) signFile(ctx context.Context, ino fsop.Ino, o ScrubOptions) (quiet bool, err error) {
	for chunk := uint64(0); ; chunk++ {
		if err := context.Cause(ctx); err != nil {
			return false, err
		}
		v, ok, err := b.viewChunk(ino, chunk)
		if err != nil || !ok {
			return true, err
		}
		if !v.quiet(o.Quiet) || v.busy != 0 {
			return false, nil
		}
		if _, err := b.scrubChunk(ctx, &v, o, false); err != nil {
			return false, err
		}
	}
}

// scrubRecords reads all that the KV and the log have. Both find by themselves what
// is not as it was written.
func (b *Brick) scrubRecords(ctx context.Context, o ScrubOptions) error {
	err := b.eachRecord(ctx, meta.Replicated.Lo, meta.Replicated.Hi, func(_, _ []byte) (bool, error) { return true, nil },
		func(n int) error { return o.Wait(ctx, n) })
	if err != nil {
		return err
	}
	first := b.log.First()
	if first == 0 {
		return nil
	}
	for after := first - 1; ; {
		if err := o.Wait(ctx, scrubValues); err != nil {
			return err
		}
		raws, poss, _, err := b.log.Read(after, scrubValues)
		if errors.Is(err, ErrTrimmed) {
			after = max(after, b.log.First()-1)
			continue
		}
		if err != nil || len(raws) == 0 {
			return err
		}
		after = poss[len(poss)-1].Seq
	}
}

// PathOf finds a name of an inode, by looking through all names. It returns "" if it has none.
func (b *Brick) PathOf(ctx context.Context, ino fsop.Ino) (string, error) {
	path := ""
	for range maxDepth {
		if ino == fsop.RootIno {
			return cmp.Or(path, "/"), nil
		}
		dir, name, err := b.nameOf(ctx, ino)
		if err != nil || name == "" {
			return "", err
		}
		path = "/" + name + path
		ino = dir
	}
	return "", nil
}

// nameOf finds an entry of inode ino and the directory that has it.
func (b *Brick) nameOf(ctx context.Context, ino fsop.Ino) (dir fsop.Ino, name string, err error) {
	err = b.eachRecord(ctx, meta.Names.Lo, meta.Names.Hi, func(k, val []byte) (bool, error) {
		p := meta.Parse(k, val)
		if p.Dentry.Ino == ino {
			dir, name = p.Ino, p.Dentry.Name
		}
		return name == "", nil
	}, func(int) error { return nil })
	return dir, name, err
}

// glance calls fn with the KV as it is, for as little as is looked at in one go: the KV
// keeps what changes meanwhile. Nobody waits for a disk that is slow to answer.
func (b *Brick) glance(ctx context.Context, fn func(meta.View) error) error {
	h, err := b.hold(false)
	if err != nil {
		return err
	}
	defer h.close(ErrClosed)
	return h.use(ctx, func(_ context.Context, v meta.View) error { return fn(v) })
}

// eachRecord calls fn for the records from lo to below hi, until it returns false.
// Records that change meanwhile may be missed. pause is called now and then.
func (b *Brick) eachRecord(ctx context.Context, lo, hi []byte, fn func(k, val []byte) (bool, error), pause func(bytes int) error) error {
	for lo != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var next []byte
		size := 0
		err := b.glance(ctx, func(v meta.View) error {
			return v.Records(lo, hi, func(k, val []byte) (bool, error) {
				if size > scrubValues {
					next = bytes.Clone(k)
					return false, nil
				}
				size += len(k) + len(val) + recordCost
				return fn(k, val)
			})
		})
		if err == nil {
			err = pause(size)
		}
		if err != nil {
			return err
		}
		lo = next
	}
	return nil
}

// recordCost is what to read a record costs, as if it were bytes.
const recordCost = 256
