package brick

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sync/errgroup"

	"mortar/internal/brick/data"
	"mortar/internal/brick/meta"
	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
	"mortar/internal/oplog"
)

// HealProgress says how far a comparison has come. Totals grow while it goes on:
// what differs is known only when it was compared.
type HealProgress struct {
	KeysTotal, KeysDone   uint64 // records compared
	FilesTotal, FilesDone uint64 // files whose contents differ, or may
	BytesTotal, BytesDone uint64 // of their contents; compared, and copied where they differ
}

const (
	// smallFile is the size up to which a file is copied whole.
	smallFile = 64 << 10
	// healWorkers is how many requests for contents are under way at once.
	healWorkers = 4
	// healBatch is about how many bytes are committed to the KV at once.
	healBatch = 1 << 20
	// doubtGroup is how many large files are declared in doubt with one flush.
	doubtGroup = 64
)

// Heal makes this brick equal to the Source that call leads to, which stands at
// pos. Afterwards the brick is whole and its log is empty and ends at pos. If
// Heal fails or the process dies, the brick is not whole; another Heal, from the
// same source or another, copies only what still differs. progress, if not nil,
// is called now and then, by one goroutine at a time.
//
// It is one of the calls of which one may run at a time, with Execute and Rewind.
func (b *Brick) Heal(ctx context.Context, pos cluster.Pos, call func(ctx context.Context, req []byte) ([]byte, error), progress func(HealProgress)) error {
	if err := b.Err(); err != nil {
		return err
	}
	h := &healing{b: b, call: call, report: progress, seed: rand.Uint64()}
	var hello helloReply
	err := h.ask(ctx, &healRequest{Kind: healHello, Hello: helloRequest{healVersion, b.id.Volume, b.id.Set}}, &hello)
	if err != nil {
		return fmt.Errorf("comparing brick %s: %w", b.opts.Dir, err)
	}
	var st meta.State
	if err := meta.DecodeState(hello.State, &st); err != nil {
		return fmt.Errorf("comparing brick %s: %w", b.opts.Dir, err)
	}
	if hello.Pos != pos || st.Pos != pos {
		return fmt.Errorf("comparing brick %s: the source stands at %v, expected was %v", b.opts.Dir, hello.Pos, pos)
	}
	h.progress.KeysTotal = 2 * st.Inodes

	b.pauseSettling()
	defer b.resumeSettling()
	b.closeHeld(errors.New("the brick is being healed"))
	if err := h.begin(ctx); err != nil {
		return h.ended(ctx, err)
	}
	if err := h.compare(ctx); err != nil {
		return h.ended(ctx, err)
	}
	if err := h.finish(ctx, &st, hello.History); err != nil {
		return h.ended(ctx, err)
	}
	h.tell(func(p *HealProgress) { p.KeysDone = p.KeysTotal })
	return nil
}

// healing is a Heal at work.
type healing struct {
	b      *Brick
	call   func(context.Context, []byte) ([]byte, error)
	report func(HealProgress)
	seed   uint64

	mu       sync.Mutex
	progress HealProgress // guarded by mu
}

// ownDisk marks the errors of this brick's own disk.
type ownDisk struct{ error }

func (e ownDisk) Unwrap() error { return e.error }

func own(err error) error {
	if err == nil {
		return nil
	}
	return ownDisk{err}
}

// ended turns the reason why a heal stopped into its error. If it was this
// brick's disk, the brick has failed.
func (h *healing) ended(ctx context.Context, err error) error {
	var l ownDisk
	if errors.As(err, &l) && ctx.Err() == nil {
		return h.b.fail(fmt.Errorf("healing brick %s: %w", h.b.opts.Dir, l.error))
	}
	return fmt.Errorf("healing brick %s: %w", h.b.opts.Dir, err)
}

func (h *healing) tell(change func(*HealProgress)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change(&h.progress)
	if h.report != nil {
		h.report(h.progress)
	}
}

func (h *healing) ask(ctx context.Context, q *healRequest, r codec.Coded) error {
	raw, err := h.call(ctx, codec.Append(nil, q))
	if err != nil {
		return err
	}
	return codec.Decode(raw, r)
}

// begin declares the brick not whole and makes it independent of its log.
func (h *healing) begin(ctx context.Context) error {
	b := h.b
	b.wmu.Lock()
	err := b.distrust()
	b.wmu.Unlock()
	if err != nil {
		return own(err)
	}
	if !b.logLost {
		// What the inodes say of their contents is true for the settled contents, too.
		err = b.settleNow(ctx, true, 1<<64-1, func() bool { return false })
	}
	var corrupt *oplog.ErrCorrupt
	if errors.Is(err, oplog.ErrTrimmed) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &corrupt) || errors.Is(err, ErrDamagedFile) {
		b.clog.Warn("contents that this brick has lost will be copied", "err", err)
		err = nil
	}
	if err == nil {
		err = h.doubtUnsettled()
	}
	if err == nil {
		err = b.store.Flush(ctx)
	}
	return own(err)
}

// doubtUnsettled gives up the extents that could not be settled.
func (h *healing) doubtUnsettled() error {
	b := h.b
	b.wmu.Lock()
	defer b.wmu.Unlock()
	batch := b.store.NewBatch()
	defer batch.Close()
	for ino, x := range b.extents {
		batch.SetDoubt(ino)
		for _, e := range x.all(func(*meta.Extent) bool { return true }) {
			batch.DeleteExtent(ino, e.Off)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.store.Commit(batch); err != nil {
		return err
	}
	b.extents = map[fsop.Ino]*extents{}
	b.backlog.reset()
	b.cache.clear()
	b.names.clear()
	return nil
}

// commit applies a batch made by fill.
func (h *healing) commit(fill func(*meta.Batch) error) error {
	b := h.b
	if err := b.store.Ready(); err != nil {
		return own(err)
	}
	b.wmu.Lock()
	defer b.wmu.Unlock()
	batch := b.store.NewBatch()
	defer batch.Close()
	if err := fill(batch); err != nil {
		return own(err)
	}
	if batch.Empty() {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cache.clear()
	b.names.clear()
	return own(b.store.Commit(batch))
}

// dropContents has the batch forget what this brick has of a file's contents.
// b.wmu is held.
func (h *healing) dropContents(batch *meta.Batch, ino fsop.Ino) error {
	b := h.b
	base, err := b.store.Base(ino, false)
	if err != nil {
		return err
	}
	if base.Kind != meta.BaseNone {
		batch.SetBase(ino, &meta.Base{})
	}
	if base.Kind == meta.BaseFile {
		// Removed at the next cycle of settling, which comes after the flush
		// that ends the heal.
		batch.SetGarbage(ino, base.Incarnation)
	}
	batch.DeleteDoubt(ino)
	return nil
}

// compare walks over all replicated records and repairs what differs.
func (h *healing) compare(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(healWorkers)
	q := &copies{h: h, g: g, ctx: ctx, queued: map[fsop.Ino]bool{}}
	err := h.walk(ctx, q)
	if err == nil {
		err = q.flush()
	}
	if gerr := g.Wait(); gerr != nil && (err == nil || errors.Is(err, context.Canceled)) {
		err = gerr
	}
	return err
}

func (h *healing) walk(ctx context.Context, q *copies) error {
	lo := meta.Replicated.Lo
	for bytes.Compare(lo, meta.Replicated.Hi) < 0 {
		var r sumsReply
		if err := h.ask(ctx, &healRequest{Kind: healSums, Seed: h.seed, Lo: lo}, &r); err != nil {
			return err
		}
		if len(r.Chunks) == 0 {
			return fmt.Errorf("%w: no sums", codec.ErrMalformed)
		}
		for _, k := range r.Chunks {
			if bytes.Compare(k.End, lo) <= 0 || !meta.InReplicated(lo, k.End) {
				return fmt.Errorf("%w: sums from %q to %q", codec.ErrMalformed, lo, k.End)
			}
			sum := summing{h: xxhash.NewWithSeed(h.seed)}
			counted := uint64(0)
			err := h.b.store.Records(lo, k.End, func(key, val []byte) (bool, error) {
				sum.add(key, val)
				return true, nil
			})
			if err != nil {
				return own(err)
			}
			if t := meta.RecordTable(lo); t == meta.TableDentry || t == meta.TableInode {
				counted = uint64(k.Count)
			}
			if sum.count != k.Count || sum.h.Sum64() != k.Sum {
				if err := h.repair(ctx, q, lo, k.End); err != nil {
					return err
				}
			}
			h.tell(func(p *HealProgress) { p.KeysDone = min(p.KeysDone+counted, p.KeysTotal) })
			lo = k.End
		}
	}
	// Contents in doubt whose records are equal.
	var doubts []fsop.Ino
	if err := h.b.store.Doubts(func(ino fsop.Ino) error {
		doubts = append(doubts, ino)
		return nil
	}); err != nil {
		return own(err)
	}
	for _, ino := range doubts {
		if err := q.doubt(ino); err != nil {
			return err
		}
	}
	return nil
}

// repair makes the records from lo to below hi equal to the source's. Inodes
// whose contents differ come later, with their contents.
func (h *healing) repair(ctx context.Context, q *copies, lo, hi []byte) error {
	for bytes.Compare(lo, hi) < 0 {
		var r recordsReply
		if err := h.ask(ctx, &healRequest{Kind: healRecords, Lo: lo, Hi: hi}, &r); err != nil {
			return err
		}
		if bytes.Compare(r.End, lo) <= 0 || bytes.Compare(r.End, hi) > 0 {
			return fmt.Errorf("%w: records from %q to %q", codec.ErrMalformed, lo, r.End)
		}
		want := make(map[string][]byte, len(r.Records))
		for _, rec := range r.Records {
			if err := meta.CheckRecord(rec.Key, rec.Value); err != nil {
				return err
			}
			if bytes.Compare(rec.Key, lo) < 0 || bytes.Compare(rec.Key, r.End) >= 0 {
				return fmt.Errorf("%w: record %q, asked for %q to %q", codec.ErrMalformed, rec.Key, lo, r.End)
			}
			want[string(rec.Key)] = rec.Value
		}
		if err := h.apply(q, lo, r.End, want); err != nil {
			return err
		}
		lo = r.End
	}
	return nil
}

func (h *healing) apply(q *copies, lo, hi []byte, want map[string][]byte) error {
	b := h.b
	type change struct {
		key, val  []byte // nil val: remove
		forget    bool   // the contents
		ino       fsop.Ino
		had, have *meta.Inode
	}
	var changes []change
	var files []change
	err := b.store.Records(lo, hi, func(k, val []byte) (bool, error) {
		w, ok := want[string(k)]
		if ok && bytes.Equal(w, val) {
			delete(want, string(k))
			return true, nil
		}
		had, isInode, err := meta.RecordInode(k, val)
		if err != nil {
			// Damaged here, whatever it was: the source knows.
			had = nil
		}
		c := change{key: bytes.Clone(k), val: w, had: had}
		delete(want, string(k))
		if ok && isInode {
			c.have, _, _ = meta.RecordInode(k, w)
			c.ino = c.have.Ino
			files = append(files, c)
			return true, nil
		}
		if !ok && isInode {
			c.forget, c.ino = true, meta.RecordIno(k)
		}
		changes = append(changes, c)
		return true, nil
	})
	if err != nil {
		return own(err)
	}
	for k, w := range want {
		c := change{key: []byte(k), val: w}
		if n, ok, _ := meta.RecordInode(c.key, w); ok {
			c.have, c.ino = n, n.Ino
			files = append(files, c)
			continue
		}
		changes = append(changes, c)
	}
	var jobs []change
	err = h.commit(func(batch *meta.Batch) error {
		for _, c := range changes {
			if c.val == nil {
				batch.DeleteRecord(c.key)
			} else {
				batch.SetRecord(c.key, c.val)
			}
			if c.forget {
				if err := h.dropContents(batch, c.ino); err != nil {
					return err
				}
			}
		}
		for _, c := range files {
			n, had := c.have, c.had
			switch {
			case !n.IsRegular() || n.Size == 0 && n.Blocks == 0:
				if err := h.dropContents(batch, n.Ino); err != nil {
					return err
				}
			default:
				doubt, err := b.store.Doubt(n.Ino)
				if err != nil {
					return err
				}
				if had == nil || doubt || !had.IsRegular() || had.Content != n.Content {
					jobs = append(jobs, c)
					continue
				}
			}
			batch.SetRecord(c.key, c.val)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, c := range jobs {
		if err := q.add(toCopy{c.have, c.key, c.val}); err != nil {
			return err
		}
	}
	return nil
}

// toCopy is a file whose contents are to be made the source's.
type toCopy struct {
	n        *meta.Inode
	key, val []byte // its record, which is written when the contents are there
}

// copies collects files to copy into requests of a good size.
type copies struct {
	h   *healing
	g   *errgroup.Group
	ctx context.Context

	small []toCopy
	bytes uint64
	large []toCopy
	// queued are the large files whose copying has begun.
	queued map[fsop.Ino]bool
}

func (q *copies) add(c toCopy) error {
	q.h.tell(func(p *HealProgress) { p.FilesTotal++; p.BytesTotal += c.n.Size })
	if c.n.Size <= smallFile {
		if q.bytes+c.n.Size > healReply || len(q.small) == maxFiles {
			if err := q.flushSmall(); err != nil {
				return err
			}
		}
		q.small = append(q.small, c)
		q.bytes += c.n.Size
		return nil
	}
	if q.large = append(q.large, c); len(q.large) == doubtGroup {
		return q.flushLarge()
	}
	return nil
}

// doubt adds a file whose record is as it should be.
func (q *copies) doubt(ino fsop.Ino) error {
	is := func(c toCopy) bool { return c.n.Ino == ino }
	if q.queued[ino] || slices.ContainsFunc(q.large, is) || slices.ContainsFunc(q.small, is) {
		return nil
	}
	var n meta.Inode
	ok, err := q.h.b.store.Inode(ino, &n)
	if err != nil {
		return own(err)
	}
	if !ok || !n.IsRegular() {
		return q.h.commit(func(batch *meta.Batch) error { return q.h.dropContents(batch, ino) })
	}
	key, val := meta.InodeRecord(&n)
	return q.add(toCopy{&n, key, val})
}

func (q *copies) flush() error {
	if err := q.flushSmall(); err != nil {
		return err
	}
	return q.flushLarge()
}

func (q *copies) flushSmall() error {
	files := q.small
	q.small, q.bytes = nil, 0
	if len(files) == 0 {
		return nil
	}
	q.g.Go(func() error { return q.h.copySmall(q.ctx, files) })
	return q.ctx.Err()
}

func (q *copies) flushLarge() error {
	files := q.large
	q.large = nil
	if len(files) == 0 {
		return nil
	}
	bases, err := q.h.beginLarge(q.ctx, files)
	if err != nil {
		return err
	}
	for i, c := range files {
		q.queued[c.n.Ino] = true
		q.g.Go(func() error { return q.h.copyLarge(q.ctx, c, bases[i]) })
	}
	return q.ctx.Err()
}

// beginLarge gives every file a data file of the length that it will have, and
// declares its contents in doubt: they are going to be changed in place. Should
// the heal end before they are what the record says, the next one finds what is
// there already.
func (h *healing) beginLarge(ctx context.Context, files []toCopy) (bases []meta.Base, err error) {
	b := h.b
	bases = make([]meta.Base, len(files))
	fresh := make([]bool, len(files))
	var names []data.Name
	for i, c := range files {
		base, err := b.store.Base(c.n.Ino, false)
		if err != nil {
			return nil, own(err)
		}
		f := (*data.File)(nil)
		if base.Kind == meta.BaseFile {
			f, err = b.data.Open(data.Name{Ino: c.n.Ino, Incarnation: base.Incarnation})
			if err == nil {
				err = f.Shorten(base.Len)
			} else if errors.Is(err, os.ErrNotExist) {
				base, err = meta.Base{}, nil // lost; it will be made again
			}
		}
		if f == nil && err == nil {
			fresh[i] = true
			base = meta.Base{Kind: meta.BaseFile, Incarnation: rand.Uint64()}
			f, err = b.data.Create(data.Name{Ino: c.n.Ino, Incarnation: base.Incarnation})
		}
		if f != nil && err == nil {
			err = f.Lengthen(max(base.Len, c.n.Size))
		}
		if f != nil {
			if fresh[i] {
				names = append(names, f.Name())
			}
			f.Release()
		}
		if err != nil {
			return nil, own(err)
		}
		base.Len = max(base.Len, c.n.Size)
		bases[i] = base
	}
	if err := b.data.SyncDirs(names); err != nil {
		return nil, own(err)
	}
	var forget []data.Name
	err = h.commit(func(batch *meta.Batch) error {
		for i, c := range files {
			if fresh[i] {
				if err := h.dropContents(batch, c.n.Ino); err != nil {
					return err
				}
			}
			batch.SetBase(c.n.Ino, &bases[i])
			batch.SetDoubt(c.n.Ino)
			// It is changed in place from now on (sums.go, rule 4).
			if err := batch.DropSums(b.store.View, c.n.Ino, bases[i].Incarnation); err != nil {
				return err
			}
			forget = append(forget, data.Name{Ino: c.n.Ino, Incarnation: bases[i].Incarnation})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	for _, name := range forget {
		delete(b.rotten, name)
	}
	b.mu.Unlock()
	if err := b.store.Flush(ctx); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, own(err)
	}
	return bases, nil
}

// copySmall copies whole files.
func (h *healing) copySmall(ctx context.Context, files []toCopy) error {
	for len(files) > 0 {
		q := &healRequest{Kind: healContents}
		for _, c := range files {
			q.Inos = append(q.Inos, c.n.Ino)
		}
		var r contentsReply
		if err := h.ask(ctx, q, &r); err != nil {
			return err
		}
		if len(r.Files) == 0 || len(r.Files) > len(files) {
			return fmt.Errorf("%w: %d files for %d", codec.ErrMalformed, len(r.Files), len(files))
		}
		if err := h.writeSmall(files[:len(r.Files)], r.Files); err != nil {
			return err
		}
		files = files[len(r.Files):]
	}
	return nil
}

// writeSmall replaces the contents of files, and then writes their records.
func (h *healing) writeSmall(files []toCopy, contents [][]byte) error {
	b := h.b
	bases := make([]meta.Base, len(files))
	var names []data.Name
	var opened []*data.File
	defer func() {
		for _, f := range opened {
			f.Release()
		}
	}()
	var g errgroup.Group
	g.SetLimit(8)
	for i := range files {
		// What the file got after it was recorded is not taken: it comes with the
		// entries that follow.
		p := contents[i]
		for len(p) > 0 && p[len(p)-1] == 0 && allZero(p[len(p)-min(len(p), blockSize):]) {
			p = p[:len(p)-min(len(p), blockSize)] // reads as zeros anyway
		}
		if len(p) == 0 {
			continue
		}
		if len(p) <= max(b.opts.Inline, 0) {
			bases[i] = meta.Base{Kind: meta.BaseInline, Len: uint64(len(p)), Data: p}
			continue
		}
		name := data.Name{Ino: files[i].n.Ino, Incarnation: rand.Uint64()}
		f, err := b.data.Create(name)
		if err != nil {
			return own(err)
		}
		opened = append(opened, f)
		names = append(names, name)
		bases[i] = meta.Base{Kind: meta.BaseFile, Len: uint64(len(p)), Incarnation: name.Incarnation}
		if err := writeSparse(f, p, 0); err != nil {
			return own(err)
		}
		if err := f.Lengthen(uint64(len(p))); err != nil {
			return own(err)
		}
		g.Go(f.SyncData)
	}
	if err := g.Wait(); err != nil {
		return own(err)
	}
	if err := b.data.SyncDirs(names); err != nil {
		return own(err)
	}
	total := uint64(0)
	err := h.commit(func(batch *meta.Batch) error {
		for i, c := range files {
			if err := h.dropContents(batch, c.n.Ino); err != nil {
				return err
			}
			if bases[i].Kind != meta.BaseNone {
				batch.SetBase(c.n.Ino, &bases[i])
			}
			batch.SetRecord(c.key, c.val)
			total += c.n.Size
		}
		return nil
	})
	if err != nil {
		return err
	}
	h.tell(func(p *HealProgress) { p.FilesDone += uint64(len(files)); p.BytesDone += total })
	return nil
}

// writeSparse writes p at off, less its blocks of zeros, which must be holes.
func writeSparse(f *data.File, p []byte, off int64) error {
	for len(p) > 0 {
		n := min(len(p), blockSize)
		if allZero(p[:n]) {
			p, off = p[n:], off+int64(n)
			continue
		}
		for n < len(p) && !allZero(p[n:min(n+blockSize, len(p))]) {
			n = min(n+blockSize, len(p))
		}
		if _, err := f.WriteAt(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// copyLarge makes a data file equal to the source's, block by block, and then
// writes the file's record.
func (h *healing) copyLarge(ctx context.Context, c toCopy, base meta.Base) error {
	f, err := h.b.data.Open(data.Name{Ino: c.n.Ino, Incarnation: base.Incarnation})
	if err != nil {
		return own(err)
	}
	defer f.Release()
	base.Len, err = h.copyBlocks(ctx, c.n.Ino, f, base.Len)
	if err != nil {
		return err
	}
	if err := f.Lengthen(base.Len); err != nil {
		return own(err)
	}
	if err := f.SyncData(); err != nil {
		return own(err)
	}
	err = h.commit(func(batch *meta.Batch) error {
		batch.DeleteDoubt(c.n.Ino)
		batch.SetBase(c.n.Ino, &base)
		batch.SetRecord(c.key, c.val)
		return nil
	})
	if err != nil {
		return err
	}
	h.tell(func(p *HealProgress) { p.FilesDone++ })
	return nil
}

// copyBlocks compares the blocks of a data file of length bytes with the
// source's, and copies those that differ. It returns the new length.
func (h *healing) copyBlocks(ctx context.Context, ino fsop.Ino, f *data.File, length uint64) (uint64, error) {
	buf := make([]byte, healBlock)
	for first := uint64(0); ; {
		var r blockSumsReply
		err := h.ask(ctx, &healRequest{Kind: healBlockSum, Seed: h.seed, Ino: ino, First: first, Count: sumsAtOnce}, &r)
		if err != nil {
			return 0, err
		}
		if len(r.Sums) > sumsAtOnce || r.Size > fsop.MaxSize {
			return 0, fmt.Errorf("%w: %d sums of a file of %d bytes", codec.ErrMalformed, len(r.Sums), r.Size)
		}
		var differ []uint64
		for i, want := range r.Sums {
			n := first + uint64(i)
			off := n * healBlock
			if off >= length && want == zeroSum {
				continue
			}
			p := buf[:min(healBlock, max(r.Size, off)-off)]
			if off < length {
				if err := readFull(f, p, int64(off)); err != nil {
					return 0, own(err)
				}
				if sumBlock(h.seed, p) == want {
					continue
				}
			}
			if want == zeroSum {
				if err := f.PunchHole(int64(off), healBlock); err != nil {
					return 0, own(err)
				}
				continue
			}
			differ = append(differ, n)
		}
		if err := h.fetchBlocks(ctx, ino, f, differ, &length); err != nil {
			return 0, err
		}
		first += uint64(len(r.Sums))
		done := min(uint64(len(r.Sums))*healBlock, r.Size)
		h.tell(func(p *HealProgress) { p.BytesDone = min(p.BytesDone+done, p.BytesTotal) })
		if len(r.Sums) < sumsAtOnce {
			// The end. What this brick has behind it goes.
			if length > r.Size {
				if err := f.Truncate(int64(r.Size)); err != nil {
					return 0, own(err)
				}
				length = r.Size
			}
			return length, nil
		}
	}
}

// sumsAtOnce is how many blocks are compared with one request: 64 MiB.
const sumsAtOnce = 512

func (h *healing) fetchBlocks(ctx context.Context, ino fsop.Ino, f *data.File, blocks []uint64, length *uint64) error {
	for len(blocks) > 0 {
		q := &healRequest{Kind: healBlocks, Ino: ino, Blocks: blocks[:min(len(blocks), healReply/healBlock)]}
		var r blocksReply
		if err := h.ask(ctx, q, &r); err != nil {
			return err
		}
		if len(r.Blocks) == 0 || len(r.Blocks) > len(q.Blocks) {
			return fmt.Errorf("%w: %d blocks for %d", codec.ErrMalformed, len(r.Blocks), len(q.Blocks))
		}
		for i, p := range r.Blocks {
			off := blocks[i] * healBlock
			// What is behind a short block is behind the source's end.
			if off+uint64(len(p)) < *length {
				if err := f.PunchHole(int64(off), healBlock); err != nil {
					return own(err)
				}
			}
			if len(p) == 0 {
				continue
			}
			if _, err := f.WriteAt(p, int64(off)); err != nil {
				return own(err)
			}
			*length = max(*length, off+uint64(len(p)))
		}
		blocks = blocks[len(r.Blocks):]
	}
	return nil
}

// finish declares the brick whole and at the source's position.
func (h *healing) finish(ctx context.Context, st *meta.State, history []cluster.Pos) error {
	b := h.b
	b.wmu.Lock()
	defer b.wmu.Unlock()
	batch := b.store.NewBatch()
	batch.SetState(st)
	err := b.store.Commit(batch)
	batch.Close()
	if err != nil {
		return own(err)
	}
	// From the flush on, position and contents belong together; the mark says
	// so only after the log does, too.
	if err := b.store.Flush(ctx); err != nil {
		return own(err)
	}
	if err := b.log.Reset(st.Pos, history); err != nil {
		return own(err)
	}
	fs := b.opts.FS
	if err := fs.Remove(b.path(healingName)); err != nil {
		return own(err)
	}
	if err := fs.SyncDir(b.home); err != nil {
		return own(err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.gen.Add(1)
	if err := b.loadMemory(); err != nil {
		return own(err)
	}
	b.committed.Store(min(b.committed.Load(), st.Pos.Seq))
	b.settle.restart()
	b.logLost = false
	b.whole = true
	return nil
}
