package brick

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"mortar/internal/brick/data"
	"mortar/internal/brick/meta"
	"mortar/internal/fsop"
)

// backlog counts what waits to be settled.
type backlog struct {
	load     atomic.Int64 // bytes in the log, and something for each extent
	promised atomic.Int64 // bytes that settling will take on the disk

	mu   sync.Mutex
	more chan struct{} // closed and replaced when load falls or idle changes
	// idle is true while settling has nothing that it may settle: waiting for
	// it would be waiting for ever.
	idle bool
}

const extentCost = 128 // of an extent in memory and KV, bytes

func (l *backlog) reset() {
	l.load.Store(0)
	l.promised.Store(0)
}

func (l *backlog) count(e *meta.Extent, sign int64) {
	n := int64(extentCost)
	if !e.Zero {
		n += int64(e.Len)
	}
	l.load.Add(sign * n)
	if !e.Zero || e.Alloc {
		l.promised.Add(sign * int64(e.Len))
	}
}

func (l *backlog) add(e *meta.Extent) { l.count(e, 1) }
func (l *backlog) sub(e *meta.Extent) { l.count(e, -1) }

func (l *backlog) setIdle(idle bool) {
	l.mu.Lock()
	l.idle = idle
	l.mu.Unlock()
	l.wake()
}

func (l *backlog) wake() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.more != nil {
		close(l.more)
		l.more = nil
	}
}

// wait returns a channel that is closed at the next change, and whether there
// is anything to wait for.
func (l *backlog) wait() (<-chan struct{}, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.more == nil {
		l.more = make(chan struct{})
	}
	return l.more, !l.idle
}

func (l *backlog) moving() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.idle
}

// waitForSettling holds a write up while settling is far behind and moving.
func (b *Brick) waitForSettling() error {
	for b.backlog.load.Load() > 4*b.opts.Backlog {
		more, moving := b.backlog.wait()
		if !moving || b.backlog.load.Load() <= 4*b.opts.Backlog {
			return nil
		}
		b.settle.kick()
		select {
		case <-more:
		case <-b.failed:
			return b.err
		}
	}
	return nil
}

// job is the settling of one file, from the moment its extents were read until
// the KV has forgotten them.
type job struct {
	ino       fsop.Ino
	exts      []meta.Extent
	to        uint64    // extents from here on are left for another job
	base      meta.Base // as it was
	required  uint64    // of the data file
	length    uint64    // what the file being written may reach
	cancelled bool      // the contents it is about are gone; guarded by wmu

	after meta.Base // as it will be
	file  *data.File
	fresh bool // file is new
}

// settlingLen returns how far what is being settled of ino reaches. b.wmu is held.
func (b *Brick) settlingLen(ino fsop.Ino) uint64 {
	if j := b.jobs[ino]; j != nil && !j.cancelled {
		return j.length
	}
	return 0
}

// cancelSettling makes what is being settled of ino void. b.wmu is held.
func (b *Brick) cancelSettling(ino fsop.Ino) {
	if j := b.jobs[ino]; j != nil {
		j.cancelled = true
	}
}

// settler is the goroutine that settles.
type settler struct {
	wake  chan struct{}
	quit  context.CancelFunc
	done  chan struct{}
	tight atomic.Bool // the disk is nearly full: keep no log that is not needed
	force atomic.Bool // settle all that may be settled
	keep  atomic.Bool // flush the KV for what scrubbing has done

	// Guarded by Brick.settling.
	sweep     bool   // look for data files that nothing refers to
	steps     []step // oldest first
	settledTo uint64 // the durable KV has no extents up to this sequence
	owed      bool   // there is log that is only kept because nothing was flushed since
	squeezed  time.Time
	full      time.Time // when it was last said that there is no room

	// Guarded by Brick.wmu.
	marks  []mark // oldest first
	logged uint64 // bytes appended to the log since it was opened
}

// step says that the KV had no extents up to limit any more when entry at had
// been applied. Once a later entry is durable in the KV, so is that.
type step struct{ limit, at uint64 }

// mark says how many bytes had been logged when an entry was.
type mark struct{ seq, logged uint64 }

const markEvery = 8 << 20

// note counts what is appended to the log. b.wmu is held.
func (s *settler) note(seq uint64, n int) {
	s.logged += uint64(n)
	if len(s.marks) == 0 || s.logged-s.marks[len(s.marks)-1].logged >= markEvery {
		s.marks = append(s.marks, mark{seq, s.logged})
	}
}

// cut forgets the entries behind seq. Brick.wmu is held.
func (s *settler) cut(seq uint64) {
	for n := len(s.marks); n > 0 && s.marks[n-1].seq > seq; n-- {
		s.marks = s.marks[:n-1]
	}
}

// restart forgets what was known of a log that is no longer there. Both
// Brick.settling and Brick.wmu are held.
func (s *settler) restart() {
	s.steps, s.settledTo, s.marks, s.logged = nil, 0, nil, 0
}

const (
	// squeezeEvery is how often the log is shortened while the disk is nearly full.
	squeezeEvery = time.Second
	// sayFull is how often it is said that the disk is full.
	sayFull = time.Minute
)

func (s *settler) start(b *Brick) {
	ctx, cancel := context.WithCancel(context.Background())
	s.quit, s.done = cancel, make(chan struct{})
	go func() {
		defer close(s.done)
		s.run(ctx, b)
	}()
}

func (s *settler) stop(b *Brick) {
	b.interrupt.Add(1)
	s.quit()
	<-s.done
}

// kick has the settler look whether there is something to do.
func (s *settler) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// committed is called when more may be settled.
func (s *settler) committed(b *Brick) {
	if b.backlog.load.Load() < b.opts.Backlog {
		return
	}
	b.backlog.setIdle(false)
	s.kick()
}

// aside is how long after the last sync settling stands aside. A file that is settled
// costs flushes of its own, and holds the log's segment while its blocks are
// shared; who waits for a sync would wait for that, too.
const aside = 50 * time.Millisecond

// due reports whether there is so much to settle that it is done before its time, and
// when to look again if it stands aside for somebody who syncs. It does so up to twice
// the backlog: what a bulk write has left is not then in the way of a database.
func (b *Brick) due() (due bool, again time.Duration) {
	load := b.backlog.load.Load()
	if !b.backlog.moving() || load < b.opts.Backlog {
		return false, 0
	}
	if load < 2*b.opts.Backlog {
		again = aside - (time.Since(b.began) - time.Duration(b.synced.Load()))
	}
	return again <= 0, max(again, 0)
}

// squeeze has the log shortened to what is needed.
func (s *settler) squeeze() {
	if !s.tight.Swap(true) {
		s.kick()
	}
}

// behind is called when the backlog is larger than it should be.
func (s *settler) behind(b *Brick) {
	if b.backlog.moving() {
		s.kick()
	}
}

func (s *settler) run(ctx context.Context, b *Brick) {
	tick := time.NewTicker(b.opts.SettleAfter)
	defer tick.Stop()
	again := time.NewTimer(time.Hour)
	defer again.Stop()
	for {
		force := false
		select {
		case <-ctx.Done():
			return
		case <-b.failed:
			return
		case <-tick.C:
			force = b.untidy()
		case <-s.wake:
		case <-again.C:
		}
		due, wait := b.due()
		if force = s.force.Swap(false) || force || due; wait > 0 && !force && !s.tight.Load() {
			again.Reset(wait)
			continue // what else there is to do waits, too, for tick at the most
		}
		b.measure()
		if s.tight.Load() {
			if wait := squeezeEvery - time.Since(s.squeezed); wait > 0 {
				again.Reset(wait)
			} else {
				s.squeezed = time.Now()
				force = true
			}
		}
		err := b.settleCycle(ctx, force)
		switch {
		case err == nil, ctx.Err() != nil:
		case errors.Is(err, syscall.ENOSPC):
			// What was not settled stays where it is, in the log.
			if time.Since(s.full) >= sayFull {
				s.full = time.Now()
				b.clog.Warn("no room to settle", "err", err)
			}
			s.tight.Store(true)
			b.backlog.setIdle(true)
		default:
			b.failWith(fmt.Errorf("settling: %w", err))
			return
		}
	}
}

// untidy reports whether something waits for a forced cycle: contents to be
// settled, files to be removed, log to be let go.
func (b *Brick) untidy() bool {
	if b.backlog.load.Load() > 0 {
		return true
	}
	b.settling.Lock()
	owed := b.settle.owed
	b.settling.Unlock()
	b.mu.RLock()
	defer b.mu.RUnlock()
	return owed || len(b.garbage) > 0
}

// measure has the KV look how far behind it is.
func (b *Brick) measure() {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if !b.closed.Load() {
		b.store.Measure()
	}
}

// pauseSettling ends the running cycle and lets none begin.
func (b *Brick) pauseSettling() {
	b.interrupt.Add(1)
	b.settling.Lock()
}

func (b *Brick) resumeSettling() {
	b.settling.Unlock()
	b.interrupt.Add(-1)
	b.settle.kick()
}

// settleCycle removes what is not needed any more, and with force settles all
// that may be settled.
func (b *Brick) settleCycle(ctx context.Context, force bool) error {
	b.settling.Lock()
	defer b.settling.Unlock()
	if b.interrupt.Load() > 0 || b.pinned() {
		b.backlog.setIdle(true)
		return nil
	}
	stop := func() bool { return b.interrupt.Load() > 0 }
	b.makeRepairs(stop)
	if b.settle.keep.Swap(false) {
		if err := b.store.Flush(ctx); err != nil {
			return err
		}
	}
	return b.settleNow(ctx, force, b.committed.Load(), stop)
}

// settleNow is settleCycle with b.settling held. Nothing behind sequence upto
// is settled.
func (b *Brick) settleNow(ctx context.Context, force bool, upto uint64, stop func() bool) error {
	s := &b.settle
	unsigned := uint64(0)
	if force {
		var err error
		if unsigned, err = b.unsign(func() bool { return stop() || ctx.Err() != nil }); err != nil {
			return err
		}
		if stop() || ctx.Err() != nil {
			return nil
		}
		if err := b.store.Flush(ctx); err != nil {
			return err
		}
	}
	st, _, err := b.store.DurableState()
	if err != nil {
		return err
	}
	durable := st.Pos.Seq
	if err := b.dropGarbage(durable); err != nil {
		return err
	}
	if s.sweep {
		if err := b.sweepFiles(stop); err != nil {
			return err
		}
		s.sweep = false
	}
	tight := force && s.tight.Swap(false)
	if err := b.trim(durable, force, tight); err != nil {
		return err
	}
	if force {
		limit := min(upto, durable, unsigned)
		inos := b.settleable(limit)
		for len(inos) > 0 {
			if stop() || ctx.Err() != nil {
				return nil
			}
			n, err := b.settleGroup(inos[:min(len(inos), groupFiles)], limit)
			if err != nil {
				return err
			}
			inos = inos[n:]
			b.backlog.setIdle(false)
		}
		b.rest(upto)
	}
	b.takeStep()
	if !tight {
		return nil
	}
	// Make durable what was settled, so that its log can go at once.
	durable = b.applied.Load()
	if err := b.store.Flush(ctx); err != nil {
		return err
	}
	if err := b.dropGarbage(durable); err != nil {
		return err
	}
	return b.trim(durable, true, true)
}

// rest notes that all that was committed up to upto is settled: as long as
// nothing more is, waiting for the settler is in vain.
func (b *Brick) rest(upto uint64) {
	b.backlog.setIdle(true)
	if b.committed.Load() > upto && b.backlog.load.Load() >= b.opts.Backlog {
		b.backlog.setIdle(false)
		b.settle.kick()
	}
}

// takeStep notes up to where the KV has no extents now.
func (b *Brick) takeStep() {
	b.wmu.Lock()
	defer b.wmu.Unlock()
	at := b.state.Pos.Seq
	limit := at
	for _, x := range b.extents {
		x.each(0, 1<<63, func(e *meta.Extent) bool {
			limit = min(limit, e.Seq-1)
			return true
		})
	}
	s := &b.settle
	if n := len(s.steps); n > 0 && s.steps[n-1].at == at {
		s.steps = s.steps[:n-1]
	}
	s.steps = append(s.steps, step{limit, at})
}

// What is settled together: little enough not to hold up writers, nor those who
// wait for settling to pause, and enough to share flushes of the disk.
const (
	groupFiles = 64
	groupBytes = 8 << 20 // default of Options.group
)

// settleable returns the files that have something to settle.
func (b *Brick) settleable(limit uint64) (inos []fsop.Ino) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	for ino, x := range b.extents {
		some := false
		x.each(0, 1<<63, func(e *meta.Extent) bool {
			some = e.Seq <= limit
			return !some
		})
		if some {
			inos = append(inos, ino)
		}
	}
	slices.Sort(inos)
	return inos
}

// settleGroup settles the first of the files, and returns how many it is done
// with. If not even the first was small enough, that is none.
func (b *Brick) settleGroup(inos []fsop.Ino, limit uint64) (done int, err error) {
	if err := b.store.Ready(); err != nil {
		return 0, err
	}
	jobs, done, err := b.beginJobs(inos, limit)
	if err != nil {
		return 0, err
	}
	defer b.endJobs(jobs)
	var names []data.Name
	var g errgroup.Group
	g.SetLimit(8)
	for _, j := range jobs {
		if err = b.runJob(j); err != nil {
			break
		}
		if j.file == nil {
			continue
		}
		if j.fresh {
			names = append(names, j.file.Name())
		}
		g.Go(j.file.SyncData)
	}
	if gerr := g.Wait(); err == nil {
		err = gerr
	}
	if err == nil {
		err = b.data.SyncDirs(names)
	}
	if err != nil {
		return 0, err
	}
	return done, b.commitJobs(jobs, limit)
}

// beginJobs reads what is to be settled, up to Options.group bytes. The last job may be
// for a part of a file; then it does not count as done.
func (b *Brick) beginJobs(inos []fsop.Ino, limit uint64) (jobs []*job, done int, err error) {
	b.wmu.Lock()
	defer b.wmu.Unlock()
	size := uint64(0)
	for _, ino := range inos {
		if size >= b.opts.group {
			break
		}
		j := &job{ino: ino, to: 1 << 63}
		full := false
		b.extents[ino].each(0, 1<<63, func(e *meta.Extent) bool {
			if e.Seq > limit {
				return true
			}
			if full = size >= b.opts.group; full {
				j.to = e.Off
				return false
			}
			if !e.Zero {
				size += e.Len
			}
			j.exts = append(j.exts, *e)
			return true
		})
		if !full {
			done++
		}
		if len(j.exts) == 0 {
			continue // overwritten meanwhile
		}
		// Of a new file it is known that it has none; the KV would have to look everywhere.
		if n := b.cache.get(ino); n == nil || !n.baseKnown || n.base.Kind != meta.BaseNone {
			if j.base, err = b.store.Base(ino, true); err != nil {
				return jobs, 0, err
			}
		}
		j.length = max(j.base.Len, j.exts[len(j.exts)-1].End())
		j.required = required(&j.base, slices.Values(b.extents[ino].all(func(*meta.Extent) bool { return true })))
		b.jobs[ino] = j
		jobs = append(jobs, j)
	}
	return jobs, done, nil
}

// endJobs lets go of what the jobs used. A new file that nothing refers to goes.
func (b *Brick) endJobs(jobs []*job) {
	b.wmu.Lock()
	for _, j := range jobs {
		if b.jobs[j.ino] == j {
			delete(b.jobs, j.ino)
		}
	}
	b.wmu.Unlock()
	for _, j := range jobs {
		if j.file == nil {
			continue
		}
		name := j.file.Name()
		j.file.Release()
		if !j.fresh {
			continue
		}
		if err := b.data.Remove(name); err != nil {
			b.clog.Warn("a data file that is not needed stays", "file", b.data.Path(name), "err", err)
		}
	}
}

// runJob writes where the contents stay. Only what extents cover is touched.
func (b *Brick) runJob(j *job) (err error) {
	if j.base.Kind != meta.BaseFile && j.to == 1<<63 && j.length <= uint64(max(b.opts.Inline, 0)) {
		p, err := data.SettleInline(j.base.Data, b.log, j.exts)
		j.after = meta.Base{Kind: meta.BaseInline, Len: uint64(len(p)), Data: p}
		return err
	}
	name := data.Name{Ino: j.ino, Incarnation: j.base.Incarnation}
	if j.base.Kind == meta.BaseFile {
		if j.file, err = b.data.Open(name); err != nil {
			return b.missingFile(name, err)
		}
		st, serr := j.file.Stat()
		switch {
		case serr != nil:
			err = serr
		case uint64(st.Size()) < j.required:
			err = b.shortFile(name, j.file, j.required)
		default:
			// No state of the KV, neither this one nor the durable one, reads
			// what is behind; but it would, once the file grows over it.
			err = j.file.Shorten(j.base.Len)
		}
	} else {
		// A number never used before: what an earlier crash or another life of
		// the inode left behind is not found again.
		name.Incarnation = rand.Uint64()
		j.file, err = b.data.Create(name)
		j.fresh = err == nil
	}
	if err != nil {
		return err
	}
	if j.base.Kind == meta.BaseInline {
		if _, err := j.file.WriteAt(j.base.Data, 0); err != nil {
			return err
		}
	}
	n, err := data.Settle(j.file, b.log, j.exts, j.base.Len)
	j.after = meta.Base{Kind: meta.BaseFile, Len: n, Incarnation: name.Incarnation}
	return err
}

// commitJobs has the KV forget the extents that were settled.
func (b *Brick) commitJobs(jobs []*job, limit uint64) error {
	b.wmu.Lock()
	defer b.wmu.Unlock()
	batch := b.store.NewBatch()
	defer batch.Close()
	drop := map[fsop.Ino][]meta.Extent{}
	rotten := map[*job]map[uint64]*meta.Rotten{}
	for _, j := range jobs {
		if j.cancelled {
			continue
		}
		if j.after.Kind == meta.BaseFile {
			b.freshFile(j.ino)
		}
		if j.base.Kind == meta.BaseFile {
			rotten[j] = b.settledOver(batch, j.file.Name(), j.base.Len, j.exts)
		}
		// Entries since then may have cut the extents. What they wrote
		// themselves is younger than limit and stays.
		for _, e := range b.extents[j.ino].all(func(e *meta.Extent) bool { return e.Seq <= limit && e.Off < j.to }) {
			batch.DeleteExtent(j.ino, e.Off)
			drop[j.ino] = append(drop[j.ino], e)
		}
		batch.SetBase(j.ino, &j.after)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.store.Commit(batch); err != nil {
		return err
	}
	for _, j := range jobs {
		if j.cancelled {
			continue
		}
		b.replaceExtents(j.ino, drop[j.ino], nil)
		j.fresh = false // it is referred to
		if rotten[j] != nil {
			b.setRotten(j.file.Name(), rotten[j])
		}
		if n := b.cache.get(j.ino); n != nil {
			c := *n
			c.base, c.baseKnown = j.after, true
			c.base.Data = nil
			b.cache.put(&c)
		}
	}
	b.backlog.wake()
	return nil
}

// dropGarbage removes the data files that the durable KV does not know any more.
func (b *Brick) dropGarbage(durable uint64) error {
	b.mu.RLock()
	var gone []garbage
	for _, g := range b.garbage {
		if g.seq <= durable {
			gone = append(gone, g)
		}
	}
	b.mu.RUnlock()
	if len(gone) == 0 {
		return nil
	}
	for _, g := range gone {
		if err := b.data.Remove(data.Name{Ino: g.ino, Incarnation: g.inc}); err != nil {
			return err
		}
	}
	b.wmu.Lock()
	defer b.wmu.Unlock()
	batch := b.store.NewBatch()
	defer batch.Close()
	done := map[incarnation]bool{}
	for _, g := range gone {
		batch.DeleteGarbage(g.ino, g.inc)
		if err := batch.DropSums(b.store.View, g.ino, g.inc); err != nil {
			return err
		}
		done[g.incarnation] = true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.store.Commit(batch); err != nil {
		return err
	}
	b.garbage = slices.DeleteFunc(b.garbage, func(g garbage) bool { return done[g.incarnation] })
	for g := range done {
		delete(b.rotten, data.Name{Ino: g.ino, Incarnation: g.inc})
	}
	return nil
}

// sweepFiles removes the data files that a crash has left before the KV knew
// about them.
func (b *Brick) sweepFiles(stop func() bool) error {
	errStop := errors.New("stop")
	err := b.data.List(func(n data.Name) error {
		if stop() {
			return errStop
		}
		b.wmu.Lock()
		defer b.wmu.Unlock()
		if b.jobs[n.Ino] != nil || slices.ContainsFunc(b.garbage, func(g garbage) bool {
			return g.incarnation == incarnation{n.Ino, n.Incarnation}
		}) {
			return nil
		}
		base, err := b.store.Base(n.Ino, false)
		if err != nil || base.Kind == meta.BaseFile && base.Incarnation == n.Incarnation {
			return err
		}
		return b.data.Remove(n)
	})
	if err == errStop {
		return nil
	}
	return err
}

// trim drops log that is not needed. durable is the KV's durable position;
// flushed says that everything settled before this cycle is durable, too; tight,
// that nothing is to be kept for others.
func (b *Brick) trim(durable uint64, flushed, tight bool) error {
	s := &b.settle
	for len(s.steps) > 0 && (flushed || s.steps[0].at < durable) {
		s.settledTo = max(s.settledTo, s.steps[0].limit)
		s.steps = s.steps[1:]
	}
	seq := min(s.settledTo, durable)
	retain := uint64(max(b.opts.Retain, 0))
	if tight {
		retain = 0
	}
	b.wmu.Lock()
	keep := uint64(0)
	for len(s.marks) > 0 && s.logged-s.marks[0].logged >= retain {
		keep = s.marks[0].seq
		if len(s.marks) == 1 || s.logged-s.marks[1].logged < retain {
			break
		}
		s.marks = s.marks[1:]
	}
	b.wmu.Unlock()
	s.owed = seq < keep
	if tight {
		keep = seq
	}
	if seq = min(seq, keep); seq == 0 {
		return nil
	}
	return b.log.TrimBefore(seq + 1)
}
