package brick

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"mortar/internal/brick/meta"
	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
	"mortar/internal/oplog"
	"mortar/internal/proto"
)

// Result is the outcome of an executed entry.
type Result struct {
	Reply   fsop.Reply
	Effects []proto.Effect
	Dup     bool   // executed before; Reply is what was answered then
	Raw     []byte // the entry as logged; nil if nothing was
	// Released are the files on which locks were given up: whoever waits for
	// one may try again.
	Released []fsop.Ino
}

// exec carries out one entry. It plans everything first, reading the state as
// it was before and touching nothing but itself; so an Errno needs no undoing.
// Then the entry is appended to the log, and what was planned becomes visible
// at once.
type exec struct {
	b     *Brick
	e     *proto.Entry
	batch *meta.Batch
	state meta.State
	time  int64 // of what the entry does to its file: e's, or what the holder of a window told

	nodes    []*work
	effects  []proto.Effect
	released []fsop.Ino
	reply    fsop.Reply
	changed  bool // there is something to log

	cut     carving
	cutIno  fsop.Ino       // whose extents cut is about
	extent  *meta.Extent   // to be added; LogOff is within the data of the Write
	data    []byte         // of that extent, the tail of the entry
	gaps    []meta.Extent  // further extents to add
	garbage []incarnation  // data files that nothing refers to afterwards
	edit    *sessionEdit   // of the session's window
	names   []naming       // in the order in which they happen
	usage   []usage        // of subvolumes
	subvols []*subvolWork  // that the entry reads or changes
	fault   error          // found while planning where none can be returned
	commits []func(*Brick) // what else changes in memory
}

// naming is a directory's entry as it is after the entry.
type naming struct {
	dir  fsop.Ino
	name string
	to   entry
}

// incarnation names a data file.
type incarnation struct {
	ino fsop.Ino
	inc uint64
}

// work is an inode that the entry reads or changes.
type work struct {
	node
	dirty, gone, told bool
	rights            bool // as proto.Effect
}

// Execute checks, logs and applies an entry, which must be the next one. It has
// one caller at a time. raw is the encoded entry if the caller has it; then it is
// Result.Raw, too, and otherwise that is new. Nothing else of the entry, nor what
// shares memory with it, is kept.
//
// If the error is an fsop.Errno, nothing was changed and nothing logged; the
// position can be used again. Any other error means that the brick has failed.
// An entry that changes nothing is not logged either: Raw is nil.
func (b *Brick) Execute(e *proto.Entry, raw []byte) (*Result, error) {
	if err := b.Err(); err != nil {
		return nil, err
	}
	switch e.Op.(type) {
	case *fsop.Write, *fsop.Make:
		if err := b.waitForSettling(); err != nil {
			return nil, err
		}
	}
	if err := b.store.Ready(); err != nil {
		return nil, err
	}
	b.wmu.Lock()
	defer b.wmu.Unlock()
	if err := b.next(e); err != nil {
		return nil, fmt.Errorf("%v: %w", e, err)
	}
	res, err := b.apply(e, raw, nil)
	var errno fsop.Errno
	if err != nil && !errors.As(err, &errno) {
		err = b.fail(fmt.Errorf("%v: %w", e, err))
	}
	if b.backlog.load.Load() >= b.opts.Backlog {
		b.settle.behind(b)
	}
	return res, err
}

// next says whether e can be executed now. b.wmu is held.
func (b *Brick) next(e *proto.Entry) error {
	switch {
	case !b.whole:
		return errors.New("the brick has to be compared with another one first")
	case b.log.Tail() != b.state.Pos:
		return fmt.Errorf("the brick stands at %v and its log at %v: Rewind comes first", b.state.Pos, b.log.Tail())
	case e.Pos.Seq != b.state.Pos.Seq+1 || e.Pos.Epoch < b.state.Pos.Epoch || e.Pos.Epoch == 0:
		return fmt.Errorf("its position does not follow %v", b.state.Pos)
	case e.Time <= b.state.Time:
		return fmt.Errorf("its time %d is not after %d", e.Time, b.state.Time)
	}
	return b.unmark()
}

// apply executes e. With loc the entry is in the log already, there. b.wmu is held.
func (b *Brick) apply(e *proto.Entry, raw []byte, loc *oplog.Loc) (*Result, error) {
	x := &b.exec
	x.reset(b, e)
	if res, err := x.session(); res != nil || err != nil {
		return res, err
	}
	if err := x.do(); err != nil {
		return nil, err
	}
	if !x.changed {
		x.reply.Seq = x.state.Pos.Seq
		return &Result{Reply: x.reply}, nil
	}
	return x.commit(raw, loc)
}

func (x *exec) reset(b *Brick, e *proto.Entry) {
	x.batch.Reset()
	clear(x.nodes) // there may have been thousands
	*x = exec{
		b: b, e: e, time: e.Time, batch: x.batch, state: b.state,
		nodes: x.nodes[:0], cut: carving{x.cut.removed[:0], x.cut.added[:0]}, gaps: x.gaps[:0],
		garbage: x.garbage[:0], commits: x.commits[:0], names: x.names[:0], usage: x.usage[:0], subvols: x.subvols[:0],
	}
}

// onCommit has fn run when the entry becomes visible, with b.mu held.
func (x *exec) onCommit(fn func(*Brick)) { x.commits = append(x.commits, fn) }

// session checks that the entry's session may ask and has not asked this before.
func (x *exec) session() (*Result, error) {
	id := x.e.Session
	if id == 0 {
		return nil, nil
	}
	s := x.b.sessions[id]
	if s == nil || s.Away {
		if _, ok := x.e.Op.(*fsop.OpenSession); ok {
			return nil, nil
		}
		return nil, fsop.ENOTCONN
	}
	if x.e.Number == 0 {
		return nil, nil
	}
	known, gone := s.done(x.e.Number, x.e.Op)
	if gone {
		return nil, fsop.ESTALE
	}
	if !known {
		return nil, nil
	}
	r, ok, err := x.b.store.Reply(id, x.e.Number)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fmt.Errorf("%w: the reply to %v#%d is missing", meta.ErrFormat, id, x.e.Number)
	}
	return &Result{Reply: r.Reply, Dup: true}, nil
}

func (x *exec) do() error {
	switch op := x.e.Op.(type) {
	case *fsop.Setattr:
		return x.setattr(op)
	case *fsop.Create:
		return x.create(op)
	case *fsop.Tmpfile:
		return x.tmpfile(op)
	case *fsop.Mkdir:
		return x.mkdir(op)
	case *fsop.Mknod:
		return x.mknod(op)
	case *fsop.Symlink:
		return x.symlink(op)
	case *fsop.Link:
		return x.link(op)
	case *fsop.Unlink:
		return x.unlink(op)
	case *fsop.Rmdir:
		return x.rmdir(op)
	case *fsop.Rename:
		return x.rename(op)
	case *fsop.Write:
		return x.write(op)
	case *fsop.Fallocate:
		return x.fallocate(op)
	case *fsop.Setxattr:
		return x.setxattr(op)
	case *fsop.Removexattr:
		return x.removexattr(op)
	case *fsop.Setlk:
		return x.setlk(op)
	case *fsop.OpenWindow:
		return x.openDirectory(op)
	case *fsop.CloseWindow:
		return x.closeWindow(op)
	case *fsop.Reserve:
		return x.reserveInos()
	case *fsop.Make:
		return x.make(op)
	case *fsop.OpenSession:
		return x.openSession(op)
	case *fsop.CloseSession:
		return x.closeSession(op)
	case *fsop.Reap:
		return x.reap(op)
	case *fsop.Noop:
		x.changed = true
		return nil
	case *fsop.Use:
		return x.use(op)
	case *fsop.MakeSubvolume:
		return x.makeSubvolume(op)
	case *fsop.LimitSubvolume:
		return x.limitSubvolume(op)
	case *fsop.RemoveSubvolume:
		return x.removeSubvolume(op)
	case *fsop.Sweep:
		return x.sweep(op)
	}
	return fsop.EINVAL // a read, which nobody orders
}

// commit logs the entry and makes what was planned visible.
func (x *exec) commit(raw []byte, loc *oplog.Loc) (*Result, error) {
	b, e := x.b, x.e
	if err := x.account(); err != nil {
		return nil, err
	}
	x.state.Pos, x.state.Time = e.Pos, e.Time
	if e.Pos.Seq == 1 {
		if err := x.birth(); err != nil {
			return nil, err
		}
	}
	for _, n := range x.nodes {
		if n.dirty && !n.gone {
			x.batch.SetInode(&n.Inode)
		}
	}
	x.reply.Seq = e.Pos.Seq
	if s := b.sessions[e.Session]; s != nil && e.Number != 0 && !x.closes(e.Session) {
		edit := s.record(e.Number, e.Acked)
		x.edit = &edit
		for _, n := range edit.forget {
			x.batch.DeleteReply(s.ID, n)
		}
		x.batch.SetReply(&meta.Reply{Session: s.ID, Number: e.Number, Acked: edit.acked, Reply: x.reply})
	}
	x.batch.SetState(&x.state)

	if raw == nil {
		raw = codec.Append(make([]byte, 0, 128+len(x.data)), e)
	}
	if loc == nil {
		align := 0
		if len(x.data) >= cloneMin && x.extent.Off%blockSize == 0 {
			align = len(x.data)
		}
		l, err := b.log.Append(e.Pos, raw, align)
		if err != nil {
			return nil, err
		}
		loc = &l
		b.spend(e.Op)
	}
	x.extents(loc, len(raw))
	b.settle.note(e.Pos.Seq, len(raw))

	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.store.Commit(x.batch); err != nil {
		return nil, err
	}
	x.publish()
	return &Result{Reply: x.reply, Effects: x.effects, Raw: raw, Released: x.released}, nil
}

// birth gives the root directory its times: those of the first change.
func (x *exec) birth() error {
	n, err := x.node(fsop.RootIno)
	if err != nil {
		return err
	}
	n.Atime, n.Mtime, n.Ctime = x.e.Time, x.e.Time, x.e.Time
	x.touch(n)
	return nil
}

// extents puts the changed extents into the batch, now that the place of the
// entry in the log is known.
func (x *exec) extents(loc *oplog.Loc, rawLen int) {
	if x.extent != nil {
		x.extent.Segment = loc.Segment
		x.extent.LogOff += loc.Off + int64(rawLen-len(x.data))
		x.gaps = append(x.gaps, *x.extent)
	}
	if x.cutIno == 0 {
		return
	}
	for _, e := range x.cut.removed {
		x.batch.DeleteExtent(x.cutIno, e.Off)
	}
	for i := range x.cut.added {
		x.batch.SetExtent(x.cutIno, &x.cut.added[i])
	}
	for i := range x.gaps {
		x.batch.SetExtent(x.cutIno, &x.gaps[i])
	}
}

// publish changes what is in memory to what was just committed. b.mu is held.
func (x *exec) publish() {
	b := x.b
	b.state = x.state
	b.applied.Store(x.state.Pos.Seq)
	for _, n := range x.nodes {
		switch {
		case n.gone:
			b.cache.remove(n.Ino)
		default:
			c := n.node
			b.cache.put(&c)
		}
	}
	for _, n := range x.names {
		b.names.put(n.dir, n.name, n.to)
	}
	if x.cutIno != 0 {
		b.replaceExtents(x.cutIno, x.cut.removed, x.cut.added)
		b.replaceExtents(x.cutIno, nil, x.gaps)
	}
	for _, g := range x.garbage {
		b.garbage = append(b.garbage, garbage{g, x.state.Pos.Seq})
	}
	if x.edit != nil {
		x.edit.apply()
	}
	for _, fn := range x.commits {
		fn(b)
	}
}

// replaceExtents changes the extents of a file. b.mu is held.
func (b *Brick) replaceExtents(ino fsop.Ino, removed, added []meta.Extent) {
	if len(removed)+len(added) == 0 {
		return
	}
	f := b.extents[ino]
	if f == nil {
		f = &extents{}
		b.extents[ino] = f
	}
	for i := range removed {
		f.remove(removed[i].Off)
		b.backlog.sub(&removed[i])
	}
	for i := range added {
		f.insert(added[i])
		b.backlog.add(&added[i])
	}
	if f.n == 0 {
		delete(b.extents, ino)
	}
}

// node returns an inode to read or to change. ESTALE if there is none: whoever
// asked had it by an older answer.
func (x *exec) node(ino fsop.Ino) (*work, error) {
	for _, n := range x.nodes {
		if n.Ino == ino {
			return n, nil
		}
	}
	n, err := x.b.load(ino)
	if err != nil {
		return nil, err
	}
	if n == nil {
		return nil, fsop.ESTALE
	}
	w := &work{node: *n}
	x.nodes = append(x.nodes, w)
	return w, nil
}

// dir returns a directory in which names can be made: ENOTDIR, or ENOENT if it
// was removed and lives on only because somebody has it open.
func (x *exec) dir(ino fsop.Ino) (*work, error) {
	n, err := x.node(ino)
	switch {
	case err != nil:
		return nil, err
	case !n.IsDir():
		return nil, fsop.ENOTDIR
	case n.Nlink == 0:
		return nil, fsop.ENOENT
	case n.Subvolume != 0:
		if s := x.b.subvols[n.Subvolume]; s != nil && s.Removed {
			return nil, fsop.ENOENT
		}
	}
	return n, nil
}

// load returns an inode as it is now; nil if there is none. b.wmu or b.mu is
// held. It adds nothing to the cache: see cache.
func (b *Brick) load(ino fsop.Ino) (*node, error) {
	if n := b.cache.get(ino); n != nil {
		return n, nil
	}
	n := &node{}
	ok, err := b.store.Inode(ino, &n.Inode)
	if !ok || err != nil {
		return nil, err
	}
	return n, nil
}

// touch marks n as changed by this entry and tells caches.
func (x *exec) touch(n *work) {
	n.dirty = true
	n.Change = x.e.Pos.Seq
	x.changed = true
	if !n.told {
		n.told = true
		x.effects = append(x.effects, proto.Effect{Ino: n.Ino, Rights: n.rights})
	}
}

// renamed tells caches that the entry name of dir is not what it was.
func (x *exec) renamed(dir fsop.Ino, name string) {
	x.effects = append(x.effects, proto.Effect{Ino: dir, Name: name})
}

// lookup finds a name in a directory.
func (x *exec) lookup(dir fsop.Ino, name string) (meta.Dentry, bool, error) {
	return x.b.dentry(dir, name)
}

// addEntry makes an entry of dir and changes dir's attributes.
func (x *exec) addEntry(dir *work, name string, n *work) {
	x.setEntry(dir, name, n)
	dir.Size++
	x.dirChanged(dir, name)
}

// setEntry has an entry of dir lead to n.
func (x *exec) setEntry(dir *work, name string, n *work) {
	x.batch.SetDentry(dir.Ino, &meta.Dentry{Ino: n.Ino, Type: n.Type(), Name: name, Cookie: x.b.cookie(name)})
	x.names = append(x.names, naming{dir.Ino, name, entry{n.Ino, n.Type()}})
}

// dropEntry removes an entry of dir and changes dir's attributes.
func (x *exec) dropEntry(dir *work, name string) {
	x.batch.DeleteDentry(dir.Ino, x.b.cookie(name), name)
	x.names = append(x.names, naming{dir.Ino, name, entry{}})
	dir.Size--
	x.dirChanged(dir, name)
}

func (x *exec) dirChanged(dir *work, name string) {
	dir.Mtime, dir.Ctime = x.e.Time, x.e.Time
	x.touch(dir)
	x.renamed(dir.Ino, name)
}

// dropLink takes one name away from n, which is not in use as a directory any more.
func (x *exec) dropLink(n *work) {
	n.Ctime = x.e.Time
	if n.IsDir() {
		n.Nlink = 0
	} else {
		n.Nlink--
	}
	if n.Nlink == 0 {
		x.batch.SetOrphan(n.Ino)
	}
	x.touch(n)
}

// openSession executes OpenSession.
func (x *exec) openSession(op *fsop.OpenSession) error {
	id := x.e.Session
	if id == 0 {
		return fsop.EINVAL
	}
	s := x.b.sessions[id]
	switch {
	case op.Opened != 0 && (s == nil || s.Opened != op.Opened):
		return fsop.ESTALE // it has ended: what it was answered is forgotten
	case s != nil && s.Owner != op.Owner:
		return fsop.EPERM
	case s != nil && !s.Away:
		return nil
	case s != nil:
		now := s.Session
		now.Since, now.Away = x.e.Time, false
		x.setSession(s, now)
		x.locksReturn(id)
		return nil
	}
	s = &session{Session: meta.Session{ID: id, Client: op.Client, Owner: op.Owner, Opened: x.e.Time, Since: x.e.Time}}
	x.batch.SetSession(&s.Session)
	x.onCommit(func(b *Brick) { b.sessions[id] = s })
	x.forgetAway()
	x.changed = true
	return nil
}

func (x *exec) setSession(s *session, now meta.Session) {
	x.batch.SetSession(&now)
	x.onCommit(func(*Brick) { s.Session = now })
	x.changed = true
}

// How long, and how many, sessions that went away are remembered.
const (
	awayFor  = int64(24 * time.Hour)
	awayMost = 256
)

// forgetAway ends sessions that have been away for too long. It is called when one
// is opened, so that there is always room for those that work.
func (x *exec) forgetAway() {
	var away []*session
	for _, s := range x.b.sessions {
		if s.Away {
			away = append(away, s)
		}
	}
	slices.SortFunc(away, func(a, b *session) int {
		return cmp.Or(cmp.Compare(a.Since, b.Since), cmp.Compare(a.ID, b.ID))
	})
	over := map[cluster.SessionID]bool{}
	for i, s := range away {
		if len(away)-i > awayMost || x.e.Time-s.Since > awayFor {
			x.endSession(s)
			over[s.ID] = true
		}
	}
	if len(over) > 0 {
		x.locksGo(over)
	}
}

// endSession forgets a session, and what it was answered.
func (x *exec) endSession(s *session) {
	if !s.Away {
		x.noteUses(s)
	}
	for _, n := range s.replies {
		x.batch.DeleteReply(s.ID, n)
	}
	x.batch.DeleteSession(s.ID)
	x.onCommit(func(b *Brick) { delete(b.sessions, s.ID) })
	x.changed = true
}

// closes reports whether the entry ends session id.
func (x *exec) closes(id cluster.SessionID) bool {
	op, ok := x.e.Op.(*fsop.CloseSession)
	return ok && cluster.SessionID(op.Session) == id
}

// closeSession executes CloseSession.
func (x *exec) closeSession(op *fsop.CloseSession) error {
	id := cluster.SessionID(op.Session)
	s := x.b.sessions[id]
	if s == nil || op.Away && s.Away {
		return nil
	}
	if op.Away {
		x.locksLeave(id)
		x.noteUses(s)
		now := s.Session
		now.Since, now.Away = x.e.Time, true
		x.setSession(s, now)
		return nil
	}
	x.locksGo(map[cluster.SessionID]bool{id: true})
	x.endSession(s)
	return nil
}
