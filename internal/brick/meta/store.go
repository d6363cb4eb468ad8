// Package meta keeps a brick's metadata in a key-value store, and is the only
// package that knows which one.
//
// The store has no write-ahead log of its own: the op log is the only log. So
// a crash takes the store back to its last flush, a state that it had at one
// position in the past, all tables together, because every entry of the op log
// is one Batch and the position is part of it. Closing does not flush either;
// reopening is therefore the way to undo entries (see brick.Rewind).
//
// The store must never be durable ahead of the op log. It syncs its tables
// only after Options.BeforeSync has returned, where the brick syncs its log.
//
// doc/on-disk.md has the tables for people; keys.go and record.go for programs.
package meta

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/vfs"

	"mortar/internal/disk"
)

// format is the version of the store's own files. A store of a newer one is
// refused, an older one is converted when it is opened.
const format = pebble.FormatValueSeparation

// ErrDamaged is wrapped by errors that say that the store's files are not what
// they once were: another store has to take its place.
var ErrDamaged = errors.New("the metadata store is damaged")

// Damaged reports whether err comes from files that are not what they were.
// Disks that are full or fail are something else, and so are files of a newer
// version.
func Damaged(err error) bool {
	return errors.Is(err, ErrDamaged) || pebble.IsCorruptionError(err)
}

// damage has err wrap ErrDamaged if it comes from files that are missing, or not what they were.
func damage(err error) error {
	if err == nil || errors.Is(err, ErrDamaged) || !missing(err) && !Damaged(err) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrDamaged, err)
}

// missing reports whether err is about a file of the store that is gone or was cut.
func missing(err error) bool {
	// A store that is "not pristine" has lost the file that says of which format it is.
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, pebble.ErrDBNotPristine) || strings.Contains(err.Error(), "object size mismatch") // the library has no better sign
}

// errStuck is what a store gets that has given up and still tries to write.
var errStuck = errors.New("this store has given up")

// Options says where a Store is and what it may use.
type Options struct {
	FS  disk.FS
	Dir string
	// BeforeSync is called before a table is made durable. Required.
	BeforeSync func() error
	// Flushed, if set, is called after a part of the store became durable. It
	// must not block nor call the store, but have somebody else call Measure.
	Flushed func()
	// Failed is called once, with the first error that the store cannot get
	// over. Required.
	Failed   func(error)
	ReadOnly bool
	// NoCompactions keeps the store from tidying itself up. It is for those who
	// open it for a short time to look.
	NoCompactions bool
	MemTable      int64 // bytes; default 8 MiB
	Cache         int64 // bytes; default 16 MiB
	Log           *slog.Logger
}

// A Store is an open key-value store. Its methods may be called concurrently,
// but the caller orders its commits.
type Store struct {
	View
	db     *pebble.DB
	opts   Options
	failed chan struct{}
	once   sync.Once
	err    error // set before failed is closed
	stuck  atomic.Bool
	lock   *pebble.Lock // of the directory; nil if it is only read

	closing chan struct{} // closed when Close begins
	full    atomic.Int64  // when it was last said that the disk is full, Unix seconds

	// How far flushing and compacting are behind. The library would make
	// commits wait, with locks of the brick held and for ever if the disk fails;
	// so it is told never to, and Ready makes those wait who hold no locks yet.
	committed atomic.Uint64 // bytes, as they are in memory
	flushing  atomic.Uint64 // what committed was when the last flush began
	flushed   atomic.Uint64 // what it was when the last flush that has ended began
	layers    atomic.Int32  // of tables not yet compacted, when last measured
	easedMu   sync.Mutex
	eased     chan struct{} // closed and replaced when any of these has improved
}

const (
	defaultMemTable = 8 << 20

	maxMemTables = 4  // of unflushed commits before Ready waits
	maxLayers    = 40 // before Ready waits
	keyCost      = 64 // bytes of memory for a key, beside itself
)

// MaxUnflushed is about how many bytes may have been committed and not yet be
// in tables, with that Options.MemTable.
func MaxUnflushed(memTable int64) int64 {
	if memTable == 0 {
		memTable = defaultMemTable
	}
	return maxMemTables * memTable
}

// Open opens the store in o.Dir, or makes one.
func Open(o Options) (*Store, error) {
	if o.MemTable == 0 {
		o.MemTable = defaultMemTable
	}
	if o.Cache == 0 {
		o.Cache = 16 << 20
	}
	s := &Store{opts: o, failed: make(chan struct{}), closing: make(chan struct{}), eased: make(chan struct{})}
	po := &pebble.Options{
		FS:                          hookFS{o.FS, s},
		DisableWAL:                  true,
		ErrorIfNotExists:            o.ReadOnly,
		ReadOnly:                    o.ReadOnly,
		DisableAutomaticCompactions: o.NoCompactions,
		FormatMajorVersion:          format,
		MemTableSize:                uint64(o.MemTable),
		MemTableStopWritesThreshold: 1000, // see Ready
		// The library takes write buffers out of its cache; there are two as a rule.
		CacheSize:                  o.Cache + 2*o.MemTable,
		MaxOpenFiles:               500,
		L0CompactionThreshold:      4,
		L0StopWritesThreshold:      1 << 20, // see Ready
		LBaseMaxBytes:              64 << 20,
		BytesPerSync:               1 << 20,
		CompactionConcurrencyRange: func() (int, int) { return 1, 1 },
		Logger:                     logger{s},
		EventListener: &pebble.EventListener{
			BackgroundError: func(err error) {
				if errors.Is(err, syscall.ENOSPC) {
					// A compaction; it will be tried again. If it was a flush, FlushEnd says so.
					if now := time.Now().Unix(); now >= s.full.Load()+60 {
						s.full.Store(now)
						o.Log.Warn("no room to compact the metadata", "dir", o.Dir)
					}
					return
				}
				s.fail(err)
			},
			// What reads it gets an error as well. Without this the library calls
			// Fatalf in the middle of the read.
			DataCorruption: func(i pebble.DataCorruptionInfo) {
				s.fail(fmt.Errorf("%w: %s: %w", ErrDamaged, i.Path, i.Details))
			},
			FlushBegin: func(pebble.FlushInfo) { s.flushing.Store(s.committed.Load()) },
			FlushEnd: func(i pebble.FlushInfo) {
				// Of other errors BackgroundError hears; of a flush that had nothing to
				// write, which is one too, it does not.
				if errors.Is(i.Err, syscall.ENOSPC) {
					s.fail(i.Err)
					return
				}
				s.flushed.Store(s.flushing.Load())
				s.ease()
				if o.Flushed != nil {
					o.Flushed()
				}
			},
			CompactionEnd: func(pebble.CompactionInfo) {
				if s.layers.Load() > maxLayers && o.Flushed != nil {
					o.Flushed()
				}
			},
		},
	}
	po.Experimental.FileCacheShards = 2
	// The library's usual one looks ten times a second whether more may be merged at once,
	// for which an idle daemon woke up twenty times, and here that never changes. The next
	// merge is begun by the end of the one before in both.
	po.Experimental.CompactionScheduler = pebble.NewConcurrencyLimitSchedulerWithNoPeriodicGrantingForTest()
	// The contents of small files go to files of their own: the tables stay small
	// enough to be cached, and merging them does not copy contents again and again.
	po.Experimental.ValueSeparationPolicy = func() pebble.ValueSeparationPolicy {
		return pebble.ValueSeparationPolicy{
			Enabled:               true,
			MinimumSize:           512,
			MaxBlobReferenceDepth: 10,
			RewriteMinimumAge:     time.Minute,
			TargetGarbageRatio:    0.3,
		}
	}
	for i := range po.Levels {
		po.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
	}
	if !o.ReadOnly {
		if err := o.FS.MkdirAll(o.Dir, 0o700); err != nil {
			return nil, err
		}
		// Held here, the lock can be let go even if the library has given up.
		var err error
		if s.lock, err = pebble.LockDirectory(o.Dir, o.FS); err != nil {
			return nil, fmt.Errorf("locking the metadata in %s: %w", o.Dir, err)
		}
		po.Lock = s.lock
	}
	before := map[string]bool{}
	if err := s.blobs(before); err != nil {
		s.unlock()
		return nil, fmt.Errorf("opening the metadata in %s: %w", o.Dir, err)
	}
	var db *pebble.DB
	var err error
	ended := make(chan struct{})
	go func() { // the library may end it, see Fatalf
		defer close(ended)
		db, err = pebble.Open(o.Dir, po)
	}()
	<-ended
	if err == nil && db == nil {
		err = s.err
	}
	if err != nil {
		s.unlock()
		return nil, fmt.Errorf("opening the metadata in %s: %w", o.Dir, damage(err))
	}
	s.db, s.View = db, View{db}
	if err := s.missingBlobs(before); err != nil {
		s.Close()
		return nil, fmt.Errorf("opening the metadata in %s: %w", o.Dir, err)
	}
	return s, nil
}

// fail remembers the first error.
func (s *Store) fail(err error) {
	s.once.Do(func() {
		s.err = fmt.Errorf("metadata in %s: %w", s.opts.Dir, damage(err))
		close(s.failed)
		s.opts.Failed(s.err)
	})
}

// Close closes the store without flushing it: what was committed since the
// last flush is forgotten. All snapshots must be closed before.
func (s *Store) Close() error {
	close(s.closing)
	defer s.unlock()
	if s.stuck.Load() {
		// The library gave up in the middle of something and left its own locks
		// behind. Nothing more will be written; the memory is lost.
		return s.err
	}
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("closing the metadata in %s: %w", s.opts.Dir, err)
	}
	return nil
}

func (s *Store) unlock() {
	if s.lock != nil {
		if err := s.lock.Close(); err != nil {
			s.opts.Log.Warn("unlocking the metadata", "dir", s.opts.Dir, "err", err)
		}
	}
}

// Flush makes everything committed so far durable.
func (s *Store) Flush(ctx context.Context) error {
	select {
	case <-s.failed:
		return s.err
	default:
	}
	done, err := s.db.AsyncFlush()
	if err != nil {
		return fmt.Errorf("flushing the metadata in %s: %w", s.opts.Dir, err)
	}
	select {
	case <-done:
		return nil
	case <-s.failed:
		return s.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *Store) ease() {
	s.easedMu.Lock()
	defer s.easedMu.Unlock()
	close(s.eased)
	s.eased = make(chan struct{})
}

// Measure looks how far compacting is behind.
func (s *Store) Measure() {
	if s.stuck.Load() {
		return
	}
	if !s.opts.NoCompactions { // else waiting would be for ever
		s.layers.Store(s.db.Metrics().Levels[0].Sublevels)
	}
	s.ease()
}

// Ready returns when the store has caught up with what was committed, so far
// that another commit is welcome; or with the error that makes it useless.
func (s *Store) Ready() error {
	for {
		s.easedMu.Lock()
		eased := s.eased
		s.easedMu.Unlock()
		behind := s.committed.Load() - s.flushed.Load()
		if behind < maxMemTables*uint64(s.opts.MemTable) && s.layers.Load() <= maxLayers {
			return nil
		}
		select {
		case <-eased:
		case <-s.failed:
			return s.err
		}
	}
}

// DurableState returns the State that a crash at this moment would leave.
// ok is false if there is none yet.
func (s *Store) DurableState() (st State, ok bool, err error) {
	it, err := s.db.NewIter(&pebble.IterOptions{
		LowerBound: stateKey, UpperBound: []byte{tableState + 1}, OnlyReadGuaranteedDurable: true,
	})
	if err != nil {
		return State{}, false, err
	}
	defer it.Close()
	if !it.First() {
		return State{}, false, it.Error()
	}
	return st, true, getState(it.Value(), &st)
}

// Commit applies b at once from the point of view of every reader, and ends b.
func (s *Store) Commit(b *Batch) error {
	s.committed.Add(uint64(b.b.Len()) + keyCost*uint64(b.b.Count()))
	if err := s.db.Apply(b.b, pebble.NoSync); err != nil {
		return fmt.Errorf("metadata in %s: %w", s.opts.Dir, err)
	}
	b.b.Reset()
	return nil
}

// Size is the disk space that the store occupies, in bytes.
func (s *Store) Size() uint64 { return s.db.Metrics().DiskSpaceUsage() }

// Snapshot is a View that later commits do not change.
type Snapshot struct {
	View
	s *pebble.Snapshot
}

// Snapshot makes one. It must be closed before the store is.
func (s *Store) Snapshot() *Snapshot {
	sn := s.db.NewSnapshot()
	return &Snapshot{View{sn}, sn}
}

// Close releases the snapshot.
func (s *Snapshot) Close() error { return s.s.Close() }

// hookFS calls BeforeSync ahead of every sync of a table, and slows down
// whoever writes tables to a full disk: the library tries a compaction that
// failed again at once.
type hookFS struct {
	vfs.FS
	s *Store
}

// fullPause is how long a failed attempt to write a table takes at least.
const fullPause = time.Second

func isTable(name string) bool {
	return strings.HasSuffix(name, ".sst") || strings.HasSuffix(name, ".blob")
}

func (s *Store) pause(err error) error {
	if errors.Is(err, syscall.ENOSPC) {
		select {
		case <-time.After(fullPause):
		case <-s.closing:
		case <-s.failed:
		}
	}
	return err
}

// may refuses what a store that has given up would still write: another one may
// have taken its place by then.
func (fs hookFS) may() error {
	if fs.s.stuck.Load() {
		return errStuck
	}
	return nil
}

func (fs hookFS) wrap(name string, f vfs.File, err error) (vfs.File, error) {
	if !isTable(name) {
		return f, err
	}
	if err != nil {
		return f, fs.s.pause(err)
	}
	return hookFile{f, fs.s}, nil
}

func (fs hookFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if err := fs.may(); err != nil {
		return nil, err
	}
	f, err := fs.FS.Create(name, c)
	return fs.wrap(name, f, err)
}

func (fs hookFS) OpenReadWrite(name string, c vfs.DiskWriteCategory, o ...vfs.OpenOption) (vfs.File, error) {
	if err := fs.may(); err != nil {
		return nil, err
	}
	f, err := fs.FS.OpenReadWrite(name, c, o...)
	return fs.wrap(name, f, err)
}

func (fs hookFS) ReuseForWrite(old, name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if err := fs.may(); err != nil {
		return nil, err
	}
	f, err := fs.FS.ReuseForWrite(old, name, c)
	return fs.wrap(name, f, err)
}

func (fs hookFS) Remove(name string) error {
	if err := fs.may(); err != nil {
		return err
	}
	return fs.FS.Remove(name)
}

func (fs hookFS) Unwrap() vfs.FS { return fs.FS }

type hookFile struct {
	vfs.File
	s *Store
}

func (f hookFile) Write(p []byte) (int, error) {
	n, err := f.File.Write(p)
	return n, f.s.pause(err)
}

func (f hookFile) Sync() error {
	if err := f.s.opts.BeforeSync(); err != nil {
		return err
	}
	return f.s.pause(f.File.Sync())
}

func (f hookFile) SyncData() error {
	if err := f.s.opts.BeforeSync(); err != nil {
		return err
	}
	return f.s.pause(f.File.SyncData())
}

func (f hookFile) SyncTo(n int64) (bool, error) {
	// Starts writing back early and promises nothing, unless the file system can
	// only sync it all.
	if err := f.s.opts.BeforeSync(); err != nil {
		return false, err
	}
	return f.File.SyncTo(n)
}

// logger passes on what the library says. Its informational lines, several per
// flush, are for debugging only.
type logger struct{ s *Store }

func (l logger) Infof(f string, a ...any) { l.s.opts.Log.Debug("kv: " + fmt.Sprintf(f, a...)) }

func (l logger) Errorf(f string, a ...any) {
	l.s.opts.Log.Warn("metadata store: "+fmt.Sprintf(f, a...), "dir", l.s.opts.Dir)
}

// Fatalf is called by the library when it cannot go on, with its locks held,
// and must not return. The process has other bricks to serve: the store is
// declared failed and the goroutine ends.
func (l logger) Fatalf(f string, a ...any) {
	l.s.stuck.Store(true)
	err := fmt.Errorf("the metadata store gave up: "+f, a...)
	for _, x := range a {
		if cause, ok := x.(error); ok && (missing(cause) || Damaged(cause)) {
			err = fmt.Errorf("%w: %w", ErrDamaged, err)
			break
		}
	}
	l.s.fail(err)
	runtime.Goexit()
}

// Get returns nil for a key that is not there.
func (v View) get(k []byte) (_ []byte, _ io.Closer, err error) {
	defer caught(&err)
	val, c, err := v.r.Get(k)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, nil, nil
	}
	return val, c, err
}
