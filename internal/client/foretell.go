package client

import (
	"context"
	"slices"
	"syscall"
	"time"

	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// Foretold files.
//
// While the session holds the window of a directory, nobody else sees or changes
// its names. So a new file can be told of before any brick knows it: its inode
// number comes from those that the set reserved for the session, and its name,
// attributes and first contents follow as one operation (fsop.Make) when it is
// closed or synced, when anybody is to see it, or a moment later.
//
// A Make must not fail for any reason that the application could have been told
// of at once. That is so because
//
//   - nothing is foretold once the window is being given back, and it is given
//     back only after every Make in the directory has been answered;
//   - whatever this session asks that depends on a foretold file, on its name or on
//     its directory (settle), is sent after its Make has been answered;
//   - the name is known to be absent (hooks.vacant) while the window is held, so only
//     this session could have made it since;
//   - its number is of one of the last two ranges that were reserved, and the next
//     one is not asked for before all numbers of the older one have been used;
//   - the set said a moment ago that no limit of the directory's subvolume is near.
//
// What is left is what befalls a write, too: no room, a set that takes no changes,
// a window that was lost with the lease. That is reported by close or fsync.

// directory is a directory whose window this session holds.
type directory struct {
	ino     fsop.Ino
	attr    fsop.Attr           // owner and mode, for what is made in it
	pending map[string]*written // foretold, and their Make not answered, by name
	closing bool                // the window is being given back: nothing is foretold
	roomy   time.Time           // when the set last said that no limit is near
	given   time.Time           // when the window was
	used    time.Time
}

// made is what a file that was foretold has until its Make is answered.
type made struct {
	fsop.Node
	sent    bool // the Make is under way
	dir     *directory
	from    *numberRange
	counted bool // the home knows from the kernel that it is held
}

// foretelling is what windows knows of directories.
type foretelling struct {
	dirs    map[fsop.Ino]*directory
	wishes  map[fsop.Ino]*wish
	pending map[*written]struct{} // those of all dirs
	told    uint64                // how many files were foretold
	failed  time.Time             // when a Make was
	stock   inoStock
	lives   uint64 // counts the ends of the session's life at the set, as far as known here
	hooks   hooks
}

// hooks are called with mu held.
type hooks struct {
	// vacant reports whether name was absent when the caller asked to make it, and nobody
	// else is known to have made it since.
	vacant func(dir fsop.Ino, name string) bool
	made   func(dir fsop.Ino, seq uint64) // a Make changed it
	unused func(fsop.Ino)                 // the home counts the inode once more than the kernel holds it
	lost   func([]proto.Effect)           // the kernel was told of what is not so

	unsent func(fsop.Ino, bool)       // something is, or is not, acknowledged of a file and on no brick
	taken  func(context.Context)      // a write is about to be acknowledged before it is sent
	took   func(context.Context) bool // that was done by the process before this one
}

// numberRange is what one Reserve set aside.
type numberRange struct {
	next, end fsop.Ino
	out       int // foretold, and their Make not answered
}

func (r *numberRange) left() int {
	if r == nil {
		return 0
	}
	return int(r.end - r.next)
}

// inoStock are the inode numbers at hand.
type inoStock struct {
	// The set keeps two ranges: before it is asked for another one, all but now
	// must be done with.
	old       []*numberRange
	now, next *numberRange
	asking    bool
	refused   time.Time // when it last gave none
}

// retire takes no more numbers of the range at hand.
func (s *inoStock) retire() {
	if s.now != nil {
		s.old, s.now = append(s.old, s.now), nil
	}
}

const (
	maxForetold    = 64       // files whose Make is not answered
	maxDirectories = 1024     // windows of directories that are held
	makeBytes      = 64 << 10 // of contents that go with a Make
)

// mkdir asks for the window of the directory that it makes.
func (w *windows) mkdir(ctx context.Context, op *fsop.Mkdir) (*fsop.Reply, error) {
	ask := *op
	ask.Window = fsop.WindowAsk
	w.mu.Lock()
	asked := w.closings
	w.mu.Unlock()
	reply, err := w.next.Do(ctx, &ask)
	if err != nil || !reply.Window {
		return reply, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.directoryLocked(&reply.Attr, asked)
	return reply, nil
}

// directoryLocked is called when the window of a directory was given to a question that
// was asked when closings was asked.
func (w *windows) directoryLocked(a *fsop.Attr, asked uint64) {
	if !w.trustedLocked(a.Ino, asked) {
		w.disownLocked(a.Ino)
		return
	}
	if len(w.dirs) >= maxDirectories {
		w.dropOldestLocked()
	}
	now := time.Now()
	w.dirs[a.Ino] = &directory{ino: a.Ino, attr: *a, pending: map[string]*written{}, roomy: now, given: now, used: now}
	w.stockLocked()
}

// disownLocked gives the window of a directory back that is not certain to be held.
func (w *windows) disownLocked(dir fsop.Ino) {
	if f := w.fileLocked(dir); !f.closing {
		w.giveUpLater(f)
	}
}

// room notes what the set says of limits: whether one is near, in an answer of now.
func (d *directory) room(is bool) {
	d.roomy = time.Time{}
	if is {
		d.roomy = time.Now()
	}
}

// dropOldestLocked makes no more use of the window of the directory that was not
// used for longest. It is given back when somebody asks for it.
func (w *windows) dropOldestLocked() {
	var oldest *directory
	for _, d := range w.dirs {
		if !d.closing && len(d.pending) == 0 && (oldest == nil || d.used.Before(oldest.used)) {
			oldest = d
		}
	}
	if oldest != nil {
		delete(w.dirs, oldest.ino)
	}
}

// moved is called when the session comes to another home, before that is asked
// anything. Perhaps the set has ended the session meanwhile, and opened it again:
// nothing more is foretold on the strength of what it had before.
func (w *windows) moved(holds []proto.Hold) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.countedLocked(holds)
	w.forsakeLocked()
}

func (w *windows) forsakeLocked() {
	for _, d := range w.dirs {
		if len(d.pending) > 0 {
			w.giveBackLocked(d)
		} else if !d.closing {
			delete(w.dirs, d.ino)
		}
	}
	w.lives++
	w.stock.retire()
	w.stock.next = nil
}

// make answers a Make that nobody has given an inode number.
func (w *windows) make(ctx context.Context, op *fsop.Make) (*fsop.Reply, error) {
	if reply := w.foretell(op); reply != nil {
		return reply, nil
	}
	create := &fsop.Create{Node: op.Node, Excl: true}
	told, err := w.settle(ctx, create)
	if err != nil {
		return nil, err
	}
	reply, err := w.create(ctx, create)
	return w.unsure(reply, told), err
}

// foretell tells of a file before it is made, if that is possible.
func (w *windows) foretell(op *fsop.Make) *fsop.Reply {
	if fsop.CheckName(op.Name) != nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	d := w.dirs[op.Parent]
	if d == nil {
		w.wishLocked(op.Parent)
		return nil
	}
	if d.closing || d.pending[op.Name] != nil || len(w.pending) >= maxForetold ||
		w.bytes >= totalBytes || w.life.Err() != nil || time.Since(w.failed) < shyness {
		return nil
	}
	if d.attr.Flags&(fsop.FlagDefaultACL|fsop.FlagImmutable) != 0 {
		return nil // only the brick knows what the file will be
	}
	if time.Since(d.roomy) >= windowIdle {
		return nil // only the brick knows whether there is room for it
	}
	if !w.hooks.vacant(op.Parent, op.Name) {
		return nil // somebody may have made it before the window was given
	}
	from := w.stockLocked()
	if from == nil {
		return nil
	}
	now := time.Now()
	a := fsop.Attr{
		Ino: from.next, Mode: syscall.S_IFREG | op.Mode&0o7777&^op.Umask, Nlink: 1, UID: op.UID, GID: op.GID,
		Atime: now.UnixNano(), Mtime: now.UnixNano(), Ctime: now.UnixNano(),
	}
	if d.attr.Mode&syscall.S_ISGID != 0 {
		a.GID = d.attr.GID
	}
	from.next++
	from.out++
	f := w.fileLocked(a.Ino)
	f.made, f.born = &made{Node: op.Node, dir: d, from: from}, now
	f.held, f.sized, f.dense, f.attr = true, true, true, a
	d.pending[op.Name] = f
	d.used = now
	w.pending[f] = struct{}{}
	w.told++
	w.noteLocked(f)
	return &fsop.Reply{Attr: a}
}

// foreseen returns the attributes that a foretold file will have, when what is held back of it
// has been sent; nil if that is not certain. What is told here stays, unless something is
// done to the file; it is not to be cached.
func (w *windows) foreseen(ino fsop.Ino) *fsop.Reply {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.files[ino]
	if f == nil || !f.foretells() {
		return nil
	}
	now := w.clock.tell()
	if now == 0 {
		return nil
	}
	return &fsop.Reply{Attr: f.tell(now)}
}

// stockLocked returns the range from which the next number is taken, nil if there
// is none, and sees to it that there will be.
func (w *windows) stockLocked() *numberRange {
	s := &w.stock
	if s.now.left() == 0 && s.next != nil {
		s.retire()
		s.now, s.next = s.next, nil
	}
	s.old = slices.DeleteFunc(s.old, func(r *numberRange) bool { return r.out == 0 })
	if s.next == nil && !s.asking && s.now.left() <= fsop.ReserveCount/2 && len(s.old) == 0 &&
		time.Since(s.refused) >= shyness && w.life.Err() == nil {
		s.asking = true
		w.wg.Go(w.reserve)
	}
	if s.now.left() == 0 {
		return nil
	}
	return s.now
}

// reserve has the set reserve more numbers.
func (w *windows) reserve() {
	w.mu.Lock()
	lives := w.lives
	w.mu.Unlock()
	reply, err := w.next.Do(w.life, &fsop.Reserve{})
	w.mu.Lock()
	defer w.mu.Unlock()
	s := &w.stock
	s.asking = false
	if err != nil || reply.Off == 0 || lives != w.lives {
		s.refused = time.Now()
		return
	}
	s.next = &numberRange{next: fsop.Ino(reply.Off), end: fsop.Ino(reply.Off) + fsop.ReserveCount}
	w.stockLocked()
}

// settle waits for the Makes that op depends on. It returns what unsure wants.
func (w *windows) settle(ctx context.Context, op fsop.Op) (told uint64, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	told = w.told
	if len(w.pending) == 0 {
		return told, nil
	}
	var wanted []*written
	for f := range w.pending {
		if needs(op, f.made.dir.ino, f.made.Name) {
			wanted = append(wanted, f)
			if !f.closing {
				w.sendLocked(f)
			}
		}
	}
	for _, f := range wanted {
		for f.made != nil {
			if err := w.waitLocked(ctx); err != nil {
				return told, err
			}
		}
	}
	return told, nil
}

// needs reports whether op depends on there being a file of that name in dir.
func needs(op fsop.Op, dir fsop.Ino, name string) bool {
	switch op := op.(type) {
	case *fsop.Rmdir:
		// What it removes must be empty, and may be dir, whose own name is not known
		// here.
		if op.Parent != dir {
			return true
		}
	case *fsop.Rename:
		// It may replace dir, but not one that it moves from or to.
		if op.Parent != dir && op.NewParent != dir {
			return true
		}
	case *fsop.Readdir:
		return op.Ino == dir
	case *fsop.Fsync:
		return op.Ino == dir
	}
	return subject(op) == dir || slices.Contains(fsop.Places(op), fsop.Place{Dir: dir, Name: name})
}

// unsure learns from a reply what directories are like now, and takes away what is
// not to be cached because files have been foretold since it was asked for, or
// their Makes are not answered: attributes of their directories.
func (w *windows) unsure(reply *fsop.Reply, told uint64) *fsop.Reply {
	if reply == nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if d := w.dirs[reply.Attr.Ino]; d != nil && reply.Attr.Change > d.attr.Change {
		d.attr = reply.Attr
	}
	if len(w.pending) == 0 && w.told == told {
		return reply
	}
	if w.dirs[reply.Dir.Ino] != nil {
		reply.Dir = fsop.Attr{}
	}
	is := w.dirs[reply.Attr.Ino] != nil
	for i := range reply.Entries {
		is = is || w.dirs[reply.Entries[i].Attr.Ino] != nil
	}
	if is {
		reply.Seq = 0
	}
	return reply
}

// madeLocked is called with the answer to the Make of f.
func (w *windows) madeLocked(f *written, reply *fsop.Reply, err error) {
	m := f.made
	f.made = nil
	delete(w.pending, f)
	delete(m.dir.pending, m.Name)
	m.from.out--
	if err == nil {
		m.dir.room(reply.Window)
		// Before it counts as made: an answer that is older may be on its way, and
		// nothing is pending any more to tell (unsure) that it is.
		w.hooks.made(m.Parent, reply.Attr.Change)
		f.attr.Change = reply.Attr.Change
		if m.counted {
			w.hooks.unused(f.ino)
		}
		return
	}
	f.held = false
	w.failed = time.Now()
	w.hooks.lost([]proto.Effect{{Ino: m.Parent}, {Ino: m.Parent, Name: m.Name}}) // of the file itself landLocked says it
	if errno := errnoOf(err); errno == fsop.EIO || errno == fsop.ENOTCONN || errno == fsop.ESTALE {
		w.forsakeLocked() // the session was taken for dead, and has neither windows nor numbers
	}
}

// giveBackLocked gives the window of a directory back, once every Make in it has
// been answered.
func (w *windows) giveBackLocked(d *directory) {
	if d.closing || w.life.Err() != nil {
		return
	}
	d.closing = true
	w.wg.Go(func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		for len(d.pending) > 0 {
			for _, f := range d.pending {
				if !f.closing {
					w.sendLocked(f)
				}
			}
			if w.waitLocked(w.life) != nil {
				return // the session ends, and its windows with it
			}
		}
		w.closings++
		w.fileLocked(d.ino).closed = w.closings
		w.mu.Unlock()
		_, _ = w.next.Do(w.life, &fsop.CloseWindow{Ino: d.ino, Session: w.session()})
		w.mu.Lock()
		delete(w.dirs, d.ino)
	})
}

// countedLocked is told what the session's next home knows of what the kernel
// holds: a foretold file that is among it is counted again when it is made.
func (w *windows) countedLocked(holds []proto.Hold) {
	if len(w.pending) == 0 {
		return
	}
	pending := map[fsop.Ino]*made{}
	for f := range w.pending {
		f.made.counted = false
		pending[f.ino] = f.made
	}
	for _, h := range holds {
		if m := pending[h.Ino]; m != nil {
			m.counted = true
		}
	}
}

// isForetold reports whether the set may not know of the inode yet.
func (w *windows) isForetold(ino fsop.Ino) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.files[ino]
	return f != nil && f.made != nil
}
