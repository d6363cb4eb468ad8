// Package brick is one replica's storage: it applies the entries of the op log
// to a file system on this disk, and reads from it.
//
// Three things make up a brick, below <dir>/.mortar:
//
//   - log/, the op log (package oplog): the only place where a change is written
//     first;
//   - meta/, a KV (package meta) with inodes, names, attributes, sessions and
//     locks as they are after the last entry applied;
//   - data/, the contents of larger files (package data).
//
// What a Write brought stays in the log, and the KV has an extent that points
// there, until it is settled: moved into the KV (small files) or into a data
// file, in the background. So the state at a position is a function of the
// entries up to it alone: nothing is ever half written from a reader's view.
//
// # What a crash leaves
//
// The KV has no log of its own. A crash takes it back to its last flush, which
// is its state at some position F. Three rules keep everything else in line:
//
//  1. The log is synced before a part of the KV is (meta.Options.BeforeSync). So
//     F is never behind the log's durable end, and replay goes from F on.
//  2. Only extents of committed entries at or before F are settled, and a data
//     file is changed only where such an extent covers it. So what the KV at F
//     reads from a data file was not touched, and what was touched it reads from
//     the log.
//  3. The log is trimmed, and data files are removed, only when a flush has made
//     it durable that nothing refers to them.
//
// A fourth is about the checksums of data files: see sums.go.
//
// Undoing entries that were never committed is the same as a crash: the KV is
// opened again without a flush, the log is cut, and what is left is replayed
// (Rewind). Because of rule 2 nothing on disk has to be undone; if F is beyond
// the cut, that fails with ErrTooFar and the brick has to be compared with
// another one (Heal).
package brick

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"mortar/internal/brick/data"
	"mortar/internal/brick/meta"
	"mortar/internal/cluster"
	"mortar/internal/disk"
	"mortar/internal/fsop"
	"mortar/internal/oplog"
)

var (
	// ErrTooFar is returned by Rewind when the brick cannot go back so far, or
	// does not know what it has: only Heal can help.
	ErrTooFar = errors.New("the brick cannot be taken back to this position")
	// ErrTrimmed is returned by Entries when the log no longer has them.
	ErrTrimmed = oplog.ErrTrimmed
	// ErrClosed is returned by a brick that was closed.
	ErrClosed = errors.New("the brick is closed")
)

// Options says how to open a brick.
type Options struct {
	FS  disk.FS
	Dir string
	// Alone, if set, says whether no other brick has the same contents. Such a
	// brick goes on with what it has, whatever is damaged, as far as it can. It is
	// called without locks held and must not block.
	Alone func() bool
	// Others, if set, asks the other bricks of the set for a block of a file that has
	// rotted here. It is called without locks held.
	Others Others
	// Identity is what the brick must be; the zero Identity accepts any.
	Identity Identity
	Log      *slog.Logger // nil: none

	MemTable    int64 // bytes of the KV's write buffer, of which there may be several; default 8 MiB
	Cache       int64 // bytes of the KV's block cache; default 16 MiB
	Inodes      int   // inodes kept in memory; default 8192
	Names       int   // names kept in memory, absent ones too; default 8192
	SegmentSize int64 // bytes of a log segment; default the log's own

	// Inline is the size in bytes up to which contents are kept in the KV.
	// Default 32 KiB (doc/decisions/0017); negative: none.
	Inline int
	// Backlog is how many bytes wait in the log before they are settled. Writes
	// are held up at four times as many. Default 64 MiB, or 1/64 of a smaller disk.
	Backlog int64
	// SettleAfter is how long anything waits to be settled. Default 5 s.
	SettleAfter time.Duration
	// Retain is how many bytes of the log are kept for replicas that were away,
	// as long as the disk has room. Default 1 GiB, or 1/16 of a smaller disk;
	// negative: none.
	Retain int64
	// Reserve is the part of the disk that ordinary writes may not use, so that
	// there is always room to delete something. Default 0.01.
	Reserve float64

	group uint64 // bytes settled together
	still bool   // do nothing that is not needed to look at the brick
}

func (o *Options) defaults() {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Inodes == 0 {
		o.Inodes = 8192
	}
	if o.Names == 0 {
		o.Names = 8192
	}
	if o.Inline == 0 {
		o.Inline = 32 << 10
	}
	if o.group == 0 {
		o.group = groupBytes
	}
	if o.SettleAfter == 0 {
		o.SettleAfter = 5 * time.Second
	}
	if o.Reserve == 0 {
		o.Reserve = 0.01
	}
}

// Brick is an open brick.
//
// Execute, Rewind and Heal have one caller at a time. Everything else may be
// called concurrently.
//
// Lock order: settling, wmu, held.mu, mu, and then those of cache, names, backlog and space.
type Brick struct {
	opts   Options
	id     Identity
	set    uint16
	salt   uint64 // of cookies
	home   string
	clog   *slog.Logger
	lock   io.Closer
	anchor io.Closer // of the directory
	log    *oplog.Log
	data   *data.Files

	reading readBuffers
	blocks  blockBuffers

	clean     bool // see Clean
	promised  cluster.Epoch
	logLost   bool        // the log is not the one that the KV refers to; guarded by wmu
	marked    atomic.Bool // the clean mark is still on disk
	applied   atomic.Uint64
	committed atomic.Uint64
	gen       atomic.Uint64 // counts Rewinds and Heals
	began     time.Time
	synced    atomic.Int64 // when a Sync was last asked for, after began

	failOnce sync.Once
	failed   chan struct{}
	err      error // set before failed is closed
	closed   atomic.Bool
	said     atomic.Int64 // when it was last said that a file is lost, Unix nanoseconds

	waiters atomic.Int32 // for a commit
	waitMu  sync.Mutex
	waitc   chan struct{} // closed and replaced when committed grows; guarded by waitMu

	// settling is held for a cycle of settling, and by those who need that none
	// runs. interrupt asks a running cycle to end early.
	settling  sync.Mutex
	interrupt atomic.Int32
	settle    settler

	// wmu is held by whoever changes the KV.
	wmu   sync.Mutex
	exec  exec                  // guarded by wmu
	fresh map[fsop.Ino]struct{} // files that may lack checksums; guarded by wmu

	// mu guards what readers see. It is held for writing only while a batch is
	// committed that was prepared before. Changes are also made under wmu, so
	// either lock is enough to read.
	mu        sync.RWMutex
	store     *meta.Store
	state     meta.State
	whole     bool
	cache     *cache
	names     *names
	extents   map[fsop.Ino]*extents
	sessions  map[cluster.SessionID]*session
	locks     map[fsop.Ino][]meta.Lock
	subvols   map[fsop.Ino]*meta.Subvolume // replaced, never changed
	garbage   []garbage
	jobs      map[fsop.Ino]*job // what is being settled
	held      map[*held]struct{}
	logDamage atomic.Pointer[oplog.ErrCorrupt]      // where whoever needed old entries found the log damaged
	rotten    map[data.Name]map[uint64]*meta.Rotten // blocks; records are replaced, never changed
	scrub     meta.ScrubState

	repairWanted chan struct{}
	repairsMu    sync.Mutex
	repairs      []*repair // for the settler; guarded by repairsMu

	backlog backlog
	space   space
}

// garbage is a data file that nothing refers to since an entry.
type garbage struct {
	incarnation
	seq uint64
}

// Open opens a brick. It does not replay the log: the state is that of the last
// flush of the KV until Rewind is called, and Execute is refused as long as it
// is behind the log.
func Open(o Options) (*Brick, error) {
	o.defaults()
	home := o.FS.PathJoin(o.Dir, homeName)
	anchored, anchor, err := disk.Anchor(o.FS, home)
	if err != nil {
		if _, err := readIdentity(o.FS, o.Dir); err != nil {
			return nil, err // which says what is missing
		}
		return nil, fmt.Errorf("opening brick %s: %w", o.Dir, err)
	}
	o.FS = anchored
	b, err := openIn(o, home)
	if err != nil {
		anchor.Close()
		return nil, err
	}
	b.anchor = anchor
	return b, nil
}

// openIn is Open in a directory that stays what it is.
func openIn(o Options, home string) (*Brick, error) {
	id, err := readIdentity(o.FS, o.Dir)
	if err != nil {
		return nil, err
	}
	if err := o.fit(); err != nil {
		return nil, err
	}
	if err := id.check(o.Identity, o.Dir); err != nil {
		return nil, err
	}
	b := &Brick{
		opts: o, id: id, set: uint16(id.Set), home: home,
		salt:   binary.BigEndian.Uint64(id.Volume[:8]),
		clog:   o.Log.With("brick", o.Dir),
		began:  time.Now(),
		failed: make(chan struct{}),
		waitc:  make(chan struct{}),
		space:  space{room: math.MaxUint64},
		cache:  newCache(o.Inodes),
		names:  newNames(o.Names),
		jobs:   map[fsop.Ino]*job{}, held: map[*held]struct{}{}, fresh: map[fsop.Ino]struct{}{},
	}
	b.settle.wake = make(chan struct{}, 1)
	b.repairWanted = make(chan struct{}, 1)
	b.data = data.New(o.FS, b.path(dataName), 128)
	b.lock, err = o.FS.Lock(b.path(lockName))
	if err != nil {
		return nil, fmt.Errorf("brick %s is in use: %w", o.Dir, err)
	}
	if err := b.open(); err != nil {
		b.closeFiles()
		select {
		case <-b.failed: // the KV knows better which file it is
			err = b.err
		default:
		}
		return nil, fmt.Errorf("opening brick %s: %w", o.Dir, damage(err))
	}
	b.settle.start(b)
	return b, nil
}

// fit sets what depends on the size of the disk.
func (o *Options) fit() error {
	d, err := o.FS.Statfs(o.Dir)
	if err != nil {
		return fmt.Errorf("opening brick %s: %w", o.Dir, err)
	}
	if o.SegmentSize == 0 {
		// Two segments are always taken.
		o.SegmentSize = oplog.DefaultSegmentSize
		for o.SegmentSize > 1<<20 && uint64(o.SegmentSize) > d.Total/64 {
			o.SegmentSize /= 2
		}
	}
	if o.Backlog == 0 {
		o.Backlog = int64(min(64<<20, max(4<<20, d.Total/64)))
	}
	if o.Retain == 0 {
		o.Retain = int64(min(1<<30, d.Total/16))
	}
	return nil
}

func (b *Brick) path(name string) string { return b.opts.FS.PathJoin(b.home, name) }

func (b *Brick) open() (err error) {
	if !b.opts.still {
		if err := b.upgrade(); err != nil {
			return err
		}
	}
	b.log, err = oplog.Open(oplog.Options{FS: b.opts.FS, Dir: b.path(logName), SegmentSize: b.opts.SegmentSize, Log: b.clog})
	if err != nil {
		return err
	}
	if err := b.openStore(); err != nil {
		return err
	}
	if err := b.readPromise(); err != nil {
		return err
	}
	mark, marked, err := b.readMark()
	if err != nil {
		return err
	}
	b.marked.Store(marked)
	b.clean = marked && mark.Pos == b.log.Tail() && mark.Pos == b.state.Pos
	if b.clean && mark.Promised != nil && *mark.Promised != b.promised {
		b.clean = false
		b.clog.Error("the brick's promise is not the one with which it was closed: its file was replaced", "has", b.promised, "had", *mark.Promised)
		if err := b.Promise(*mark.Promised); err != nil {
			return err
		}
	}
	healing, err := b.exists(healingName)
	if err != nil {
		return err
	}
	b.whole = !healing
	if err := b.checkStart(); err != nil {
		b.logLost = true
		if b.whole {
			b.clog.Error("the brick must be compared with another one", "err", err)
			if err := b.distrust(); err != nil {
				return err
			}
		}
	}
	b.settle.sweep = !b.clean
	return nil
}

// checkStart says whether replay can go on from the state of the KV.
func (b *Brick) checkStart() error {
	pos, base, tail := b.state.Pos, b.log.Base(), b.log.Tail()
	switch {
	case pos.Seq < base.Seq:
		return fmt.Errorf("the metadata stands at %v, the op log begins only after %v", pos, base)
	case pos.Seq > tail.Seq:
		return fmt.Errorf("the metadata stands at %v, the op log ends at %v", pos, tail)
	case !b.onLog(pos):
		return fmt.Errorf("the metadata stands at %v, which is not in the op log", pos)
	}
	return nil
}

// onLog reports whether the log has the position, between its base and its tail.
func (b *Brick) onLog(p cluster.Pos) bool {
	if p == b.log.Base() || p == b.log.Tail() {
		return true
	}
	if p.Seq < b.log.Base().Seq || p.Seq > b.log.Tail().Seq {
		return false
	}
	var epoch cluster.Epoch
	for _, h := range b.log.History() {
		if h.Seq <= p.Seq {
			epoch = h.Epoch
		}
	}
	return epoch == p.Epoch
}

// openStore opens the KV and loads what is kept in memory of it.
func (b *Brick) openStore() error {
	store, err := meta.Open(meta.Options{
		FS: b.opts.FS, Dir: b.path(metaName), MemTable: b.opts.MemTable, Cache: b.opts.Cache, Log: b.clog,
		BeforeSync: b.log.SyncAll,
		Flushed:    b.settle.kick,
		Failed:     func(err error) { b.fail(err) },

		NoCompactions: b.opts.still,
	})
	if err != nil {
		return err
	}
	b.store = store
	b.exec = exec{batch: store.NewBatch()}
	return b.loadMemory()
}

// loadMemory fills memory from the KV, which gets its first state if it has none.
func (b *Brick) loadMemory() error {
	st, ok, err := b.store.State()
	if err != nil {
		return err
	}
	if !ok {
		if st, err = b.genesis(); err != nil {
			return err
		}
	}
	b.state = st
	b.applied.Store(st.Pos.Seq)
	b.cache.clear()
	b.names.clear()
	b.extents = map[fsop.Ino]*extents{}
	b.sessions = map[cluster.SessionID]*session{}
	b.locks = map[fsop.Ino][]meta.Lock{}
	b.subvols = map[fsop.Ino]*meta.Subvolume{}
	b.garbage = nil
	b.backlog.reset()
	if err := b.loadRotten(); err != nil {
		return err
	}
	err = b.store.Extents(func(ino fsop.Ino, e meta.Extent) error {
		b.replaceExtents(ino, nil, []meta.Extent{e})
		return nil
	})
	if err != nil {
		return err
	}
	err = b.store.Sessions(func(s meta.Session) error {
		b.sessions[s.ID] = &session{Session: s}
		return nil
	})
	if err != nil {
		return err
	}
	err = b.store.Replies(func(r *meta.Reply) error {
		s := b.sessions[r.Session]
		if s == nil {
			return fmt.Errorf("%w: a reply to session %v, which is not open", meta.ErrFormat, r.Session)
		}
		s.acked = max(s.acked, r.Acked)
		s.replies = append(s.replies, r.Number)
		return nil
	})
	if err != nil {
		return err
	}
	for _, s := range b.sessions {
		if len(s.replies) >= maxReplies {
			s.floor = s.replies[0]
		}
	}
	err = b.store.Subvolumes(func(s *meta.Subvolume) error {
		b.subvols[s.Ino] = s
		return nil
	})
	if err != nil {
		return err
	}
	err = b.store.Locks(func(l meta.Lock) error {
		b.locks[l.Ino] = append(b.locks[l.Ino], l)
		return nil
	})
	if err != nil {
		return err
	}
	return b.store.Garbage(func(ino fsop.Ino, inc uint64) (bool, error) {
		b.garbage = append(b.garbage, garbage{incarnation{ino, inc}, 0})
		return true, nil
	})
}

// genesis writes the state before any change: an empty root directory, without
// a time of its own until the first entry gives it one.
func (b *Brick) genesis() (meta.State, error) {
	st := meta.State{NextIno: uint64(fsop.RootIno) + 1, Inodes: 1}
	root := meta.Inode{Attr: fsop.Attr{Ino: fsop.RootIno, Mode: 0o40755, Nlink: 2}}
	batch := b.exec.batch
	batch.SetInode(&root)
	batch.SetState(&st)
	if err := b.store.Commit(batch); err != nil {
		return st, err
	}
	return st, b.store.Flush(context.Background())
}

// Close ends the brick's service. With clean, everything is made durable and
// the brick will be known to have been closed so. Whoever reads at this time
// gets an error or an answer, but Execute must not be running.
func (b *Brick) Close(clean bool) error {
	if b.closed.Swap(true) {
		return nil
	}
	b.settle.stop(b)
	b.closeHeld(ErrClosed)
	var err error
	if clean {
		if err = b.Err(); err == nil || errors.Is(err, ErrClosed) {
			err = b.makeClean()
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if cerr := b.closeFiles(); err == nil {
		err = cerr
	}
	if b.Err() != nil {
		return err
	}
	b.fail(ErrClosed)
	return err
}

func (b *Brick) closeFiles() (err error) {
	keep := func(e error) {
		if err == nil {
			err = e
		}
	}
	if b.store != nil {
		if b.exec.batch != nil {
			b.exec.batch.Close()
		}
		keep(b.store.Close())
	}
	if b.log != nil {
		keep(b.log.Close())
	}
	b.data.CloseAll()
	keep(b.lock.Close())
	if b.anchor != nil {
		b.anchor.Close()
	}
	return err
}

// makeClean flushes all and leaves the mark.
func (b *Brick) makeClean() error {
	b.wmu.Lock()
	defer b.wmu.Unlock()
	if !b.whole || b.state.Pos != b.log.Tail() {
		return b.log.SyncAll() // it was never made ready: as it was found, so it is left
	}
	if err := b.log.SyncAll(); err != nil {
		return err
	}
	if err := b.store.Flush(context.Background()); err != nil {
		return err
	}
	m, err := json.Marshal(cleanMark{b.state.Pos, &b.promised})
	if err != nil {
		return err
	}
	if err := disk.WriteFile(b.opts.FS, b.path(cleanName), m); err != nil {
		return err
	}
	b.marked.Store(true)
	return nil
}

// cleanMark says with what a brick was closed in order. It is believed only of a brick
// that has the same still: one of its files may have been replaced by an older copy.
type cleanMark struct {
	cluster.Pos
	Promised *cluster.Epoch `json:",omitempty"` // nil: from a time when it was not said
}

func (b *Brick) readMark() (m cleanMark, ok bool, err error) {
	raw, err := disk.ReadFile(b.opts.FS, b.path(cleanName), 4096)
	if errors.Is(err, fs.ErrNotExist) {
		return m, false, nil
	}
	if err != nil {
		return m, false, err
	}
	if json.Unmarshal(raw, &m) != nil {
		return cleanMark{}, true, nil // says nothing, and goes with the first change
	}
	return m, true, nil
}

// unmark takes the clean mark away, before the first change.
func (b *Brick) unmark() error {
	if !b.marked.Load() {
		return nil
	}
	if err := b.opts.FS.Remove(b.path(cleanName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := b.opts.FS.SyncDir(b.home); err != nil {
		return err
	}
	b.marked.Store(false)
	return nil
}

func (b *Brick) exists(name string) (bool, error) {
	_, err := b.opts.FS.Stat(b.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Distrust declares the contents of the brick unknown, durably, until a Heal
// has ended. A disk that replaces a lost one begins so.
func (b *Brick) Distrust() error {
	b.wmu.Lock()
	defer b.wmu.Unlock()
	return b.distrust()
}

func (b *Brick) distrust() error {
	if err := b.unmark(); err != nil {
		return err
	}
	if err := writeHealing(b.opts.FS, b.path(healingName)); err != nil {
		return fmt.Errorf("marking the brick as not whole: %w", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.whole = false
	return nil
}

// fail ends the brick's service, with the first reason there was, which it returns.
func (b *Brick) fail(err error) error {
	b.failOnce.Do(func() {
		err = damage(err)
		if errors.Is(err, disk.ErrMoved) {
			err = fmt.Errorf("%w: put the right one back, and run 'mortar volume start VOLUME force'", err)
		}
		if meta.Damaged(err) && !strings.Contains(err.Error(), b.home) {
			err = fmt.Errorf("%s: %w", b.path(metaName), err) // the KV does not always say where it is
		}
		b.err = err
		close(b.failed)
		if !errors.Is(err, ErrClosed) && !errors.Is(err, oplog.ErrClosed) {
			b.clog.Error("the brick failed and serves no more", "err", err)
		}
		b.backlog.wake()
	})
	return b.err
}

// Failed returns a channel that is closed when the brick has failed, or was closed.
func (b *Brick) Failed() <-chan struct{} { return b.failed }

// Err returns why the brick has failed, nil if it has not.
func (b *Brick) Err() error {
	select {
	case <-b.failed:
		return b.err
	default:
	}
	if err := b.log.Err(); err != nil {
		return b.fail(err)
	}
	return nil
}

// Identity returns what the brick is part of.
func (b *Brick) Identity() Identity { return b.id }

// Clean reports whether the brick was closed cleanly before it was opened, so
// that nothing that it ever acknowledged is missing.
func (b *Brick) Clean() bool { return b.clean }

// Whole reports whether the brick's contents are what its position says. They
// are not while a comparison with another brick is needed or was interrupted.
func (b *Brick) Whole() bool {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.whole
}

// Tail returns the position of the last entry in the log.
func (b *Brick) Tail() cluster.Pos { return b.log.Tail() }

// Applied returns the position of the last entry applied.
func (b *Brick) Applied() cluster.Pos {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.state.Pos
}

// History returns the first position of each epoch in the log, oldest first.
func (b *Brick) History() []cluster.Pos { return b.log.History() }

// First returns the sequence of the oldest entry in the log, 0 if it is empty.
func (b *Brick) First() uint64 { return b.log.First() }

// LastTime returns the time of the last entry applied.
func (b *Brick) LastTime() int64 {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.state.Time
}

// Flush hands everything executed to the operating system: it survives the end
// of this process, not that of the machine.
func (b *Brick) Flush() error { return b.log.Flush() }

// Sync returns when all entries up to seq are durable.
func (b *Brick) Sync(ctx context.Context, seq uint64) error {
	b.synced.Store(int64(time.Since(b.began)))
	return b.log.Sync(ctx, seq)
}

// Durable returns the sequence up to which all entries are durable.
func (b *Brick) Durable() uint64 { return b.log.Durable() }

// Commit says that all entries up to seq are committed: they will never be
// undone, and may be settled.
func (b *Brick) Commit(seq uint64) {
	for {
		old := b.committed.Load()
		if seq <= old {
			return
		}
		if b.committed.CompareAndSwap(old, seq) {
			break
		}
	}
	b.settle.committed(b)
	if b.waiters.Load() > 0 {
		b.waitMu.Lock()
		close(b.waitc)
		b.waitc = make(chan struct{})
		b.waitMu.Unlock()
	}
}

// waitCommitted returns when the entries up to seq are committed.
func (b *Brick) waitCommitted(ctx context.Context, seq uint64) error {
	if seq <= b.committed.Load() {
		return nil
	}
	b.waiters.Add(1)
	defer b.waiters.Add(-1)
	for {
		b.waitMu.Lock()
		c := b.waitc
		b.waitMu.Unlock()
		if seq <= b.committed.Load() {
			return nil
		}
		select {
		case <-c:
		case <-b.failed:
			return b.err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Entries returns encoded entries after sequence after, oldest first, of about
// maxBytes together but at least one if there is one. The caller owns them.
func (b *Brick) Entries(after uint64, maxBytes int) ([][]byte, error) {
	raws, _, _, err := b.log.Read(after, maxBytes)
	var bad *oplog.ErrCorrupt
	if errors.As(err, &bad) {
		b.logDamage.Store(bad)
	}
	return raws, err
}

// Reconsider ends the service of a brick whose directory is not the one any more that was opened, and of
// one that knows its log to be damaged, once it is not alone any more: then the log can be made anew. As long
// as it was, it was better than nothing.
func (b *Brick) Reconsider() {
	if _, err := b.opts.FS.Stat(b.home); errors.Is(err, disk.ErrMoved) {
		b.fail(err)
	}
	if bad := b.logDamage.Load(); bad != nil && !b.alone() {
		b.fail(bad)
	}
}

// Orphans returns up to limit inodes after one, in order, that have no name: they go when
// nobody has them open. Of files, nobody holds the window either; that of a
// directory without a name is good for nothing any more (its subvolume was removed).
func (b *Brick) Orphans(after fsop.Ino, limit int) (inos []fsop.Ino) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if limit <= 0 || b.closed.Load() {
		return nil
	}
	err := b.store.Orphans(after, func(ino fsop.Ino) (bool, error) {
		n, err := b.load(ino)
		if err == nil && n != nil && (n.IsDir() || b.holder(n) == 0) {
			inos = append(inos, ino)
		}
		return len(inos) < limit, err
	})
	if err != nil {
		b.fail(err)
	}
	return inos
}

func (b *Brick) cookie(name string) meta.Cookie { return meta.Hash(b.salt, name) }
