package client

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"mortar/internal/crew"
	"mortar/internal/estate"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// windows is the Handler that lets a program go on before its writes have
// reached the bricks.
//
// It holds the window of a file (fsop.Window) from its creation, or from the
// second of a row of writes, until the file is flushed by close or another
// session wants to see it. While it holds it, it answers writes at once, joins
// those that follow each other, and sends them side by side. Whatever this
// machine asks about such a file waits until everything before it has arrived,
// so within the machine nothing can be told apart from writing through; other
// machines are kept from looking by the window itself. An error is reported by
// the next write, fsync or close of the file.
//
// It is the one place where an acknowledged write is on no brick yet. close
// and fsync wait until all are.
type windows struct {
	next    fsop.Handler
	session func() uint64

	mu sync.Mutex
	foretelling
	landed chan struct{} // closed when a flight has landed or a window was closed; nil: nobody waits for that
	files  map[fsop.Ino]*written
	bytes  int // held back or in flight, of all files
	wake   chan struct{}
	life   context.Context // of Run
	wg     *crew.Crew

	// closings counts how often a window was begun to be given up, and forgot is the
	// last one of a file that is not in files any more. See trustedLocked.
	closings, forgot uint64

	buffers buffers
	clock   *clock
}

const (
	windowBytes = 4 << 20  // of one file, held back or in flight: a few full requests of the kernel are under way while the next one is taken
	totalBytes  = 16 << 20 // of all files
	joinBytes   = 512 << 10
	holdBack    = 20 * time.Millisecond // the longest that a write is held back
	flightsKept = 4                     // goroutines that wait to send the next write
	windowIdle  = time.Second           // after which an unused window is given back
	shyness     = time.Second           // after somebody else wanted to see a file, appends do not ask for its window
)

func newWindows(next fsop.Handler, session func() uint64) *windows {
	w := &windows{clock: new(clock), session: session, files: map[fsop.Ino]*written{}, wake: make(chan struct{}, 1), life: context.Background(), wg: crew.New(flightsKept)}
	w.next = &hearing{next, w.clock}
	w.dirs, w.wishes, w.pending = map[fsop.Ino]*directory{}, map[fsop.Ino]*wish{}, map[*written]struct{}{}
	w.hooks = hooks{
		vacant: func(fsop.Ino, string) bool { return true },
		made:   func(fsop.Ino, uint64) {},
		unused: func(fsop.Ino) {}, lost: func([]proto.Effect) {}, unsent: func(fsop.Ino, bool) {},
		taken: func(context.Context) {}, took: func(context.Context) bool { return false },
	}
	return w
}

// Run sends what is held back for long and gives unused windows back, until ctx
// is done; then it waits for everything in flight.
func (w *windows) Run(ctx context.Context) error {
	w.mu.Lock()
	w.life = ctx
	w.mu.Unlock()
	defer w.wg.Wait()
	tick := time.NewTicker(holdBack)
	tick.Stop()
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-w.wake:
		}
		tick.Reset(holdBack)
		for w.tend(time.Now()) {
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-tick.C:
			}
		}
		tick.Stop() // an idle mount does not wake up
	}
}

// tend does what time asks for, and reports whether anything is left to tend.
func (w *windows) tend(now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	left := false
	for _, f := range w.files {
		switch {
		case f.waits() && now.Sub(f.born) >= holdBack && !f.closing:
			w.sendLocked(f)
		case now.Sub(f.used) < windowIdle || f.dirty() || f.closing:
		case f.held:
			w.giveUpLater(f)
		case f.err == nil:
			w.forgetLocked(f)
			continue
		default:
			continue // an error waits to be told, and time changes nothing about it
		}
		left = true
	}
	return left
}

// forgetLocked takes f, of which nothing is left to do, out of files.
func (w *windows) forgetLocked(f *written) {
	w.forgot = max(w.forgot, f.closed)
	delete(w.files, f.ino)
}

// trustedLocked reports whether a window of ino that was given to a question
// which was asked when closings was asked is certainly held: whether none was
// given up since. Which came last, nobody here can tell.
func (w *windows) trustedLocked(ino fsop.Ino, asked uint64) bool {
	if f := w.files[ino]; f != nil {
		return f.closed <= asked
	}
	return w.forgot <= asked
}

func (w *windows) stir() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Do implements fsop.Handler.
func (w *windows) Do(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
	switch op := op.(type) {
	case *fsop.Write:
		if w.hooks.took(ctx) {
			return &fsop.Reply{Off: op.Off}, nil // close will say what has become of it
		}
		return w.write(ctx, op)
	case *fsop.Flush:
		return w.flush(ctx, op.Ino)
	case *fsop.Make:
		return w.make(ctx, op)
	case *fsop.Getattr:
		if reply := w.foreseen(op.Ino); reply != nil {
			return reply, nil
		}
	}
	told, err := w.settle(ctx, op)
	if err != nil {
		return nil, err
	}
	reply, err := w.do(ctx, op)
	return w.unsure(reply, told), err
}

// do carries out what depends on no foretold file any more.
func (w *windows) do(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
	switch op := op.(type) {
	case *fsop.Fsync:
		synced, err := w.fsync(ctx, op.Ino)
		if synced || err != nil {
			return &fsop.Reply{}, err
		}
		return w.next.Do(ctx, op)
	case *fsop.Create:
		return w.create(ctx, op)
	case *fsop.Tmpfile:
		return w.tmpfile(ctx, op)
	case *fsop.Mkdir:
		return w.mkdir(ctx, op)
	case *fsop.Setattr:
		if reply, ok := w.setattr(op); ok {
			return reply, nil
		}
	}
	ino := subject(op)
	if ino != 0 {
		if err := w.drain(ctx, ino); err != nil {
			return nil, err
		}
	}
	if resizes(op) {
		return w.resize(ctx, ino, op)
	}
	before := w.underWay()
	reply, err := w.next.Do(ctx, op)
	if err != nil {
		return reply, err // with an Errno goes the position, at which a name was absent
	}
	if op.Kind() == fsop.KindSetlk {
		return reply, nil // nobody looks at its attributes, and the lock is held even if its caller has gone
	}
	return w.refresh(ctx, reply, before)
}

// subject is the inode that op is about, if it may be a file with writes in its window.
func subject(op fsop.Op) fsop.Ino {
	switch op := op.(type) {
	case *fsop.Lookup:
		if op.ByNumber() {
			return op.Parent
		}
	case *fsop.Getattr:
		return op.Ino
	case *fsop.Read:
		return op.Ino
	case *fsop.Seek:
		return op.Ino
	case *fsop.Setattr:
		return op.Ino
	case *fsop.Fallocate:
		return op.Ino
	case *fsop.Setxattr:
		return op.Ino
	case *fsop.Removexattr:
		return op.Ino
	case *fsop.Getxattr:
		return op.Ino
	case *fsop.Listxattr:
		return op.Ino
	case *fsop.Link:
		return op.Ino
	case *fsop.Setlk:
		return op.Ino
	case *fsop.Getlk:
		return op.Ino
	}
	return 0
}

// resizes reports whether op may change a file's size otherwise than by writing.
func resizes(op fsop.Op) bool {
	switch op := op.(type) {
	case *fsop.Setattr:
		return op.Valid&fsop.SetSize != 0
	case *fsop.Fallocate:
		return true
	}
	return false
}

// resize carries out an operation that changes the size of a file whose window
// may be held. Until its answer is here nobody knows where an append would go.
func (w *windows) resize(ctx context.Context, ino fsop.Ino, op fsop.Op) (*fsop.Reply, error) {
	w.mu.Lock()
	f := w.files[ino]
	closed := uint64(0)
	if f != nil {
		f.sized, closed = false, f.closed
	}
	w.mu.Unlock()
	reply, err := w.next.Do(ctx, op)
	if err == nil && f != nil && reply.Attr.Ino == ino {
		w.mu.Lock()
		if f.held && !f.closing && f.closed == closed && reply.Attr.Change > f.attr.Change {
			f.attr, f.sized, f.dense = reply.Attr, true, false
		}
		w.mu.Unlock()
	}
	if err != nil {
		return nil, err
	}
	return w.refresh(ctx, reply, nil)
}

// underWay returns the files with writes that have not arrived. An answer that is
// asked for now may be from before these writes, and get here after they have arrived.
// Writes that are acknowledged later are no matter: the kernel ignores what an
// answer says of a file that was written to since it asked.
func (w *windows) underWay() []fsop.Ino {
	w.mu.Lock()
	defer w.mu.Unlock()
	var inos []fsop.Ino
	for _, f := range w.files {
		if f.dirty() {
			inos = append(inos, f.ino)
		}
	}
	return inos
}

// refresh replaces attributes that a reply has of files with writes that it
// cannot know of: those that have not arrived, and those that had not when it
// was asked for (before).
func (w *windows) refresh(ctx context.Context, reply *fsop.Reply, before []fsop.Ino) (*fsop.Reply, error) {
	stale := func(a *fsop.Attr) error {
		if a.Ino == 0 || !slices.Contains(before, a.Ino) && !w.dirty(a.Ino) {
			return nil
		}
		if err := w.drain(ctx, a.Ino); err != nil {
			return err
		}
		now, err := w.next.Do(ctx, &fsop.Getattr{Ino: a.Ino})
		if err == nil {
			*a = now.Attr
		}
		return err
	}
	if err := stale(&reply.Attr); err != nil {
		return nil, err
	}
	for i := range reply.Entries {
		if err := stale(&reply.Entries[i].Attr); err != nil {
			return nil, err
		}
	}
	return reply, nil
}

func (w *windows) dirty(ino fsop.Ino) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.files[ino]
	return f != nil && f.dirty()
}

func (w *windows) fileLocked(ino fsop.Ino) *written {
	f := w.files[ino]
	if f == nil {
		f = &written{ino: ino}
		w.files[ino] = f
		w.stir()
	}
	f.used = time.Now()
	return f
}

// create asks for the window of the file that it makes.
func (w *windows) create(ctx context.Context, op *fsop.Create) (*fsop.Reply, error) {
	ask := *op
	ask.Window = fsop.WindowAsk
	w.mu.Lock()
	asked := w.closings
	w.mu.Unlock()
	reply, err := w.next.Do(ctx, &ask)
	if err != nil {
		return reply, err
	}
	w.mu.Lock()
	if d := w.dirs[op.Parent]; d != nil {
		d.room(reply.Window)
	}
	if !reply.Window {
		w.mu.Unlock()
		return w.refresh(ctx, reply, nil)
	}
	defer w.mu.Unlock()
	// The name is there for all to see before this reply is: a recall may have
	// come first, and then the window is given up already.
	w.givenLocked(&reply.Attr, asked)
	return reply, nil
}

// tmpfile makes a file without a name, whose window comes with it. It is given up
// when the file is not used for a while; by then the home has counted the answer.
func (w *windows) tmpfile(ctx context.Context, op *fsop.Tmpfile) (*fsop.Reply, error) {
	w.mu.Lock()
	asked := w.closings
	w.mu.Unlock()
	reply, err := w.next.Do(ctx, op)
	if err != nil {
		return reply, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.givenLocked(&reply.Attr, asked)
	if f := w.files[reply.Attr.Ino]; !reply.Window && !f.closing {
		w.giveUpLater(f)
	}
	return reply, nil
}

// givenLocked is called when the window of a file was given to a question that
// was asked when closings was asked.
func (w *windows) givenLocked(a *fsop.Attr, asked uint64) {
	trusted := w.trustedLocked(a.Ino, asked)
	f := w.fileLocked(a.Ino)
	switch {
	case trusted:
		f.hold(a)
	case !f.closing:
		f.held = false
		w.giveUpLater(f)
	}
}

// setattr puts attributes off until what was written before them is sent, if the
// window of the file is held: archivers set them on every file just before they
// close it. Its reply is not to be cached, because the times are not known yet.
func (w *windows) setattr(op *fsop.Setattr) (*fsop.Reply, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.files[op.Ino]
	const owner = fsop.SetUID | fsop.SetGID | fsop.SetKillPriv | fsop.SetKillSGID
	if f == nil || !f.held || f.closing || f.err != nil || op.Valid == 0 || op.Valid&(fsop.SetSize|fsop.SetFlags) != 0 ||
		op.Valid&owner != 0 && f.then.Valid&fsop.SetMode != 0 { // a new owner would take bits of the mode away
		return nil, false
	}
	if !f.waits() {
		f.born = time.Now()
	}
	f.used = time.Now()
	f.pin()
	merge(&f.then, op)
	w.noteLocked(f)
	foresee(&f.attr, op, f.used.UnixNano())
	return &fsop.Reply{Attr: f.attr}, true
}

// write answers a write as soon as it may.
func (w *windows) write(ctx context.Context, op *fsop.Write) (*fsop.Reply, error) {
	w.mu.Lock()
	f := w.fileLocked(op.Ino)
	off, n := op.Off, len(op.Data)
	for {
		if err := w.takeErrorLocked(f); err != nil {
			w.mu.Unlock()
			return nil, err
		}
		if !f.held || f.closing || op.Append && !f.sized {
			if err := w.drainLocked(ctx, f); err != nil {
				w.mu.Unlock()
				return nil, err
			}
			return w.writeThrough(ctx, f, op)
		}
		if op.Append {
			off = f.attr.Size // nobody else can move the end while the window is held
		}
		joins := f.then.Valid == 0 && (len(f.data) == 0 || off == f.off+uint64(len(f.data)) && len(f.data)+n <= joinBytes)
		if f.waits() && !joins {
			w.sendLocked(f)
		}
		if (f.bytes == 0 || f.bytes+n <= windowBytes) && (w.bytes == 0 || w.bytes+n <= totalBytes) {
			break
		}
		if len(f.flights) == 0 {
			w.sendLocked(f)
		}
		if err := w.waitLocked(ctx); err != nil { // the window may be gone afterwards
			w.mu.Unlock()
			return nil, err
		}
	}
	defer w.mu.Unlock()
	if len(f.data) == 0 {
		f.off, f.kill = off, false
		if f.made == nil || f.made.sent {
			f.born = time.Now()
		}
		room := max(n, min(joinBytes, 4*n))
		if f.streams {
			room = max(n, joinBytes)
		}
		f.data = w.buffers.get(room)
	}
	w.hooks.taken(ctx)
	f.data = append(f.data, op.Data...)
	w.noteLocked(f)
	f.kill = f.kill || op.KillPriv
	f.bytes += n
	w.bytes += n
	f.grow(off, n)
	f.told = 0 // it has another time now
	if op.KillPriv {
		f.attr.Mode = killed(f.attr.Mode)
	}
	if len(f.data)+n > joinBytes { // no room for another like this one
		f.streams = true
		w.sendLocked(f)
	}
	return &fsop.Reply{Off: off}, nil
}

// writeThrough sends a write and waits for it. It is called with mu held and releases it.
func (w *windows) writeThrough(ctx context.Context, f *written, op *fsop.Write) (*fsop.Reply, error) {
	through := *op
	if f.asked && !f.closing && !(op.Append && time.Since(f.recalled) < shyness) {
		through.Window = fsop.WindowAsk
	}
	f.asked = true
	asked := w.closings
	w.mu.Unlock()
	reply, err := w.next.Do(ctx, &through)
	if err == nil && reply.Window {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.givenLocked(&reply.Attr, asked)
	}
	return reply, err
}

// giveUpLater gives a window back without waiting for it.
func (w *windows) giveUpLater(f *written) {
	f.closing = true
	w.closings++
	f.closed = w.closings
	w.wg.Go(func() { w.giveUp(f) })
}

// sendLocked sends what is held back of f, as soon as nothing in flight overlaps it.
func (w *windows) sendLocked(f *written) {
	for f.waits() { // twice if too much was written for one Make
		w.sendOneLocked(f)
	}
}

func (w *windows) sendOneLocked(f *written) {
	// The answer says whether the window is still to be had: it is not when a limit
	// is near, so that writes then wait and hear of it.
	op, t, n := f.take(fsop.WindowHeld | fsop.WindowAsk)
	f.flights = append(f.flights, t)
	w.wg.Go(func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		for f.overtakes(t) {
			_ = w.waitLocked(context.Background()) // each that it waits for lands
		}
		w.mu.Unlock()
		reply, err := w.next.Do(w.life, op)
		w.buffers.put(op)
		w.mu.Lock()
		if op.Kind() == fsop.KindMake {
			w.madeLocked(f, reply, err)
		}
		f.flights = slices.DeleteFunc(f.flights, func(o *flight) bool { return o == t })
		w.landLocked(f, n, err)
		if k := op.Kind(); err == nil && k != fsop.KindSetattr && !reply.Window && f.held && !f.closing {
			_ = w.closeLocked(w.life, f) // ends with the session at the latest
		}
	})
}

// fsync sends everything written to a file and waits for it. If the last of it
// could be sent as a write that is answered when it is durable, which a log then
// is as a whole, it is synced and nothing is left to do.
func (w *windows) fsync(ctx context.Context, ino fsop.Ino) (synced bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.files[ino]
	if f == nil {
		return false, nil
	}
	f.used = time.Now()
	for len(f.flights) > 0 && !f.closing {
		if err := w.waitLocked(ctx); err != nil {
			return false, err
		}
	}
	if f.held && !f.closing && (len(f.data) > 0 || f.made != nil) {
		f.sync, synced = true, true
		w.sendLocked(f)
	}
	if err := w.drainLocked(ctx, f); err != nil {
		return false, err
	}
	return synced, w.takeErrorLocked(f)
}

// waitLocked waits for something to land, or for ctx to end.
func (w *windows) waitLocked(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if w.landed == nil {
		w.landed = make(chan struct{})
	}
	landed := w.landed
	w.mu.Unlock()
	select {
	case <-landed:
	case <-ctx.Done():
	}
	w.mu.Lock()
	return ctx.Err()
}

// wakeLocked wakes who waits for something to land.
func (w *windows) wakeLocked() {
	if w.landed != nil {
		close(w.landed)
		w.landed = nil
	}
}

// landLocked counts n bytes that are held back or in flight no longer.
func (w *windows) landLocked(f *written, n int, err error) {
	f.bytes -= n
	w.bytes -= n
	if err != nil {
		// The kernel has taken for written what is not there, and no home knows that it has.
		w.hooks.lost([]proto.Effect{{Ino: f.ino}})
		if f.err == nil {
			f.err = errnoOf(err)
		}
		if f.held && !f.closing {
			f.held = false // perhaps it was taken; if not, it is given back
			w.giveUpLater(f)
		}
	}
	w.noteLocked(f)
	w.wakeLocked()
}

// noteLocked notes whether something of f would be lost with this process.
func (w *windows) noteLocked(f *written) {
	if is := f.dirty() || f.err != nil; is != f.noted {
		f.noted = is
		w.hooks.unsent(f.ino, is)
	}
}

func (w *windows) takeErrorLocked(f *written) error {
	err := f.takeError()
	w.noteLocked(f)
	return err
}

// lose has the next write, fsync or close of files say that writes to them are lost: the
// process before this one had acknowledged them.
func (w *windows) lose(files []estate.Record) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range files {
		f := w.fileLocked(fsop.Ino(r.Key))
		f.err = fsop.EIO
		w.noteLocked(f)
	}
}

// errnoOf is what an application is told about a write that it was told had succeeded.
func errnoOf(err error) error {
	var errno fsop.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return fsop.EIO
}

// drainLocked waits until everything written to f has arrived.
func (w *windows) drainLocked(ctx context.Context, f *written) error {
	for f.dirty() {
		if f.waits() && !f.closing {
			w.sendLocked(f)
		}
		if err := w.waitLocked(ctx); err != nil {
			return err
		}
	}
	return nil
}

// drain waits until everything written to a file has arrived, or failed to.
func (w *windows) drain(ctx context.Context, ino fsop.Ino) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.files[ino]
	if f == nil {
		return nil
	}
	f.used = time.Now()
	return w.drainLocked(ctx, f)
}

// flush has everything sent and the window given up, if possible with the last
// write, and waits until everything has arrived.
func (w *windows) flush(ctx context.Context, ino fsop.Ino) (*fsop.Reply, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.files[ino]
	if f == nil {
		return &fsop.Reply{}, nil
	}
	if err := w.closeLocked(ctx, f); err != nil {
		return nil, err
	}
	if err := w.drainLocked(ctx, f); err != nil {
		return nil, err
	}
	if err := w.takeErrorLocked(f); err != nil {
		return nil, err
	}
	left := f.left
	f.left = fsop.Reply{}
	if f.bytes == 0 && !f.held && !f.closing && !f.dirty() && w.files[ino] == f {
		w.forgetLocked(f)
	} else {
		left = fsop.Reply{} // somebody writes to it meanwhile
	}
	if len(w.pending) > 0 {
		left.Dir = fsop.Attr{} // perhaps of files in the same directory
	}
	return &left, nil
}

// Recall sends everything written to a file and gives its window up, because
// another session wants to see it.
func (w *windows) Recall(ino fsop.Ino) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.life.Err() != nil {
		return
	}
	if d := w.dirs[ino]; d != nil {
		if !d.closing {
			w.recalledLocked(ino, d.given)
		}
		w.giveBackLocked(d)
		return
	}
	if x := w.wishes[ino]; x != nil && x.asking {
		w.recalledLocked(ino, time.Now())
	}
	f := w.fileLocked(ino)
	f.recalled = time.Now()
	switch {
	case f.closing:
	case f.held:
		w.wg.Go(func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			_ = w.closeLocked(w.life, f) // ends with the session at the latest
		})
	default:
		// The set thinks that this session holds it: the answer is on its way, or
		// nobody waited for it. It is given up from now on, for that answer may be
		// the next thing that comes.
		w.giveUpLater(f)
	}
}

// closeLocked has everything sent and the window given up: when it returns, both
// are under way.
func (w *windows) closeLocked(ctx context.Context, f *written) error {
	for {
		if f.made != nil && !f.made.sent && len(f.data) > makeBytes && !f.closing {
			w.sendOneLocked(f)
		}
		// The last write gives the window up, so the others come before it.
		if len(f.flights) == 0 && !(f.closing && f.dirty()) {
			break
		}
		if err := w.waitLocked(ctx); err != nil {
			return err
		}
	}
	switch {
	case f.closing:
	case !f.held:
		w.sendLocked(f)
	case !f.waits():
		w.giveUpLater(f)
	default:
		f.closing, f.last = true, true
		w.closings++
		f.closed = w.closings
		op, _, n := f.take(fsop.WindowHeld | fsop.WindowDone)
		w.wg.Go(func() { w.sendLast(f, op, n) })
	}
	return nil
}

// sendLast sends the write that gives the window up.
func (w *windows) sendLast(f *written, op fsop.Op, n int) {
	reply, err := w.next.Do(w.life, op)
	w.buffers.put(op)
	w.mu.Lock()
	defer w.mu.Unlock()
	made := op.Kind() == fsop.KindMake
	if made {
		w.madeLocked(f, reply, err)
	}
	if err == nil {
		f.left = fsop.Reply{Attr: reply.Attr, Dir: reply.Dir, Seq: reply.Seq}
	}
	f.held, f.closing, f.last = false, false, false
	w.landLocked(f, n, err)
	if err != nil && !made {
		w.giveUpLater(f) // it did not go with the write
	}
}

// giveUp gives the window of f, whose closing is set, back to the set.
func (w *windows) giveUp(f *written) {
	_, err := w.next.Do(w.life, &fsop.CloseWindow{Ino: f.ino, Session: w.session()})
	w.mu.Lock()
	defer w.mu.Unlock()
	f.held, f.closing = false, false
	if err != nil && f.err == nil && f.dirty() {
		f.err = errnoOf(err)
	}
	w.wakeLocked()
}

// drainAll waits until everything written has arrived and all windows are given
// up, or ctx ends. It reports whether that is so.
func (w *windows) drainAll(ctx context.Context) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range slices.Collect(maps.Values(w.files)) {
		for f.held || f.closing || f.dirty() {
			if w.closeLocked(ctx, f) != nil {
				return false
			}
			if f.held || f.closing || f.dirty() {
				if w.waitLocked(ctx) != nil {
					return false
				}
			}
		}
	}
	return true
}

// still calls f if everything written has arrived. Nothing is taken until it returns.
func (w *windows) still(f func() error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, o := range w.files {
		if o.dirty() {
			return ErrUnsent
		}
	}
	return f()
}
