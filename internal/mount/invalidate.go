package mount

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
	"mortar/internal/proto"
)

const (
	// entryPatience is how long an invalidation of names may wait for the
	// directories' locks before all names of the mount are invalidated instead.
	entryPatience = 3 * time.Millisecond
	// entryWorkers bounds the threads that wait for directories' locks.
	entryWorkers = 16
	// appearLimit is how long an inode that the kernel was told of may take to
	// appear there, see Mount.invalAttr.
	appearLimit = 2 * time.Second
)

// Invalidate returns when no system call that begins later can see what the
// effects of the change at seq made untrue. It may be called concurrently and
// in any order of seq. Pages mapped into memory follow within milliseconds.
//
// The error is that of ctx, or that the file system is not mounted any more;
// in both cases caches may be left as they were.
func (m *Mount) Invalidate(ctx context.Context, seq uint64, effects []proto.Effect) error {
	// First the record, so that replies which are not written yet are not
	// cached; then what the kernel has already.
	var names []*entryJob
	var late []fsop.Ino
	var group *entryGroup
	var pages []<-chan struct{}
	urgent, rights := false, false
	var wholly []fsop.Ino
	for i := range effects {
		e := &effects[i]
		known, kind := m.nodes.invalidated(e, seq)
		if !known {
			continue // nor does the kernel know names in it
		}
		if !m.mounted() {
			continue
		}
		if i == 0 || effects[i-1].Ino != e.Ino {
			switch err := m.dev.invalAttr(e.Ino); err {
			case nil:
			case unix.ENOENT:
				late = append(late, e.Ino)
			default:
				return err
			}
			if kind == s_IFREG || kind == s_IFDIR {
				done := m.pages.add(m.dev, e.Ino)
				if kind == s_IFDIR || !m.inflight.isChanging(e.Ino) {
					pages = append(pages, done)
				}
			}
		}
		if e.Rights {
			// For the new owner's chmod the kernel compares with the owner it knows, and
			// asks for attributes only on the way to the file. So the way begins anew.
			rights = true
			for _, n := range m.names.of(e.Ino) {
				if group == nil {
					group = &entryGroup{done: make(chan struct{})}
				}
				group.left.Add(1)
				group.exists = true
				names = append(names, &entryJob{dir: n.dir, name: n.name, same: true, group: group})
				urgent = urgent || m.inflight.isChanging(n.dir)
			}
		}
		if e.Names {
			wholly = append(wholly, e.Ino)
		}
		if e.Name == "" {
			continue
		}
		if cached, exists := m.given.has(e.Ino, e.Name); cached {
			if group == nil {
				group = &entryGroup{done: make(chan struct{})}
			}
			group.left.Add(1)
			group.exists = group.exists || exists
			names = append(names, &entryJob{dir: e.Ino, name: e.Name, exists: exists, group: group})
			urgent = urgent || m.inflight.isChanging(e.Ino)
		}
	}
	for _, ino := range late {
		if err := m.invalAttr(ctx, ino); err != nil {
			return err
		}
	}
	if rights {
		if err := m.expiring(ctx, names); err != nil {
			return err
		}
	}
	if len(wholly) > 0 {
		if err := m.forgetNames(ctx, wholly); err != nil {
			return err
		}
	}
	if len(names) > 0 {
		if err := m.invalNames(ctx, names, group, urgent); err != nil {
			return err
		}
	}
	if len(pages) == 0 {
		return nil
	}
	// Pages that no request has locked go at once. Should one have locked them
	// just now, they go soon enough, see GetAttr.
	patience := time.NewTimer(pagePatience)
	defer patience.Stop()
	for _, done := range pages {
		select {
		case <-done:
		case <-patience.C:
			return nil
		}
	}
	return nil
}

// pagePatience is how long Invalidate waits for pages that nobody has locked.
const pagePatience = 2 * time.Millisecond

func (m *Mount) mounted() bool {
	select {
	case <-m.ready:
		return true
	default:
		return false
	}
}

// invalAttr invalidates an inode's attributes also if the kernel has only just
// been told of the inode: the reply may be written, but the system call that
// asked may not have got to read it. Then the kernel says ENOENT now, and would
// cache the reply's attributes a moment later.
func (m *Mount) invalAttr(ctx context.Context, ino fsop.Ino) error {
	pause := 10 * time.Microsecond
	for began := time.Now(); ; {
		err := m.dev.invalAttr(ino)
		if err != unix.ENOENT {
			return err
		}
		if !m.nodes.knows(ino) {
			return nil
		}
		waited := time.Since(began)
		if waited > entryPatience {
			m.lookings.cut(ino)
		}
		if waited > appearLimit {
			m.log.Warn("mount: the kernel neither has nor forgets an inode it was told of", "ino", uint64(ino))
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
		pause = min(2*pause, 5*time.Millisecond)
	}
}

// entryGroup is the names of one Invalidate.
type entryGroup struct {
	exists  bool // some of the names exist, as far as the kernel knows
	left    atomic.Int32
	skip    atomic.Bool   // no longer needed, but for names that exist
	done    chan struct{} // closed when left gets to 0
	errOnce sync.Once
	err     error
}

type entryJob struct {
	dir    fsop.Ino
	name   string
	exists bool // as far as the kernel knows
	same   bool // it may lead to what it led to
	expire bool // it is to be asked for again, and nothing more, see Mount.expiring
	group  *entryGroup
}

func (j *entryJob) run(m *Mount) {
	if j.exists || !j.group.skip.Load() {
		take := m.dev.invalEntry
		if j.expire {
			take = m.dev.expireEntry
		}
		if err := take(j.dir, j.name, m.inflight.isChanging(j.dir)); err == unix.ENOTCONN {
			j.group.errOnce.Do(func() { j.group.err = err })
		}
	}
	j.leave()
}

// expiring says of names that may lead to what they led to how they are taken back. As long as nothing is
// mounted inside the kernel forgets them. Otherwise it would detach what is mounted on them
// or below, for no reason. So they expire, when nobody can have an answer on hand
// any more by which they would count again.
func (m *Mount) expiring(ctx context.Context, names []*entryJob) error {
	if !m.nestedMay() {
		return nil
	}
	for _, j := range names {
		j.expire = j.same
	}
	return m.digested(ctx, names)
}

func (j *entryJob) leave() {
	if j.group.left.Add(-1) == 0 {
		close(j.group.done)
	}
}

// runEntries is one of the workers that wait for directories' locks.
func (m *Mount) runEntries() {
	for {
		select {
		case <-m.stop:
			return
		case j := <-m.entries:
			j.run(m)
		}
	}
}

// invalNames has the workers invalidate names. If that takes longer than a
// healthy kernel needs, some request in flight holds a directory's lock, and
// that request may itself be waiting, through other mounts, for this very call
// to return. Then all names are invalidated in a way that needs no lock.
//
// Without epochs, see Mount.epochs, the kernel can drop all names that are not in use, which absent
// names never are. A name that exists and is in use (the file is open, or it is
// a working directory) can lead to the old file for a moment longer, until what
// holds the directory's lock has been answered; that does not wait for it now.
func (m *Mount) invalNames(ctx context.Context, jobs []*entryJob, g *entryGroup, urgent bool) error {
	if urgent && m.epochs() {
		m.behind.add(g)
		m.finish(jobs, g)
		return m.dev.incEpoch()
	}
	began := time.Now()
	patience := time.NewTimer(entryPatience)
	defer patience.Stop()
	for sent := 0; ; {
		queue := m.entries
		if sent == len(jobs) {
			queue = nil
		}
		var next *entryJob
		if queue != nil {
			next = jobs[sent]
		}
		select {
		case queue <- next:
			sent++
			continue
		case <-g.done:
			return g.err
		case <-patience.C:
		case <-m.stop:
			return unix.ENOTCONN
		case <-ctx.Done():
			g.skip.Store(true)
			return ctx.Err()
		}
		if m.epochs() {
			m.behind.add(g)
			m.finish(jobs[sent:], g)
			return m.dev.incEpoch()
		}
		if sent == len(jobs) && (!g.exists || time.Since(began) >= existsPatience) {
			return m.dev.shrink() // the workers go on
		}
		patience.Reset(entryPatience)
	}
}

// finish has the workers take back names behind an increment of the epoch. That
// has made the kernel ask before it uses the names, and left them in their
// places; but a directory can be in one place only. A system call that finds a
// directory at its new name while the kernel has it at the old one must move it
// there, needs locks for that which it does not wait for, and fails with ESTALE
// if they are taken. A rename(2) has taken them itself.
func (m *Mount) finish(jobs []*entryJob, g *entryGroup) {
	g.skip.Store(true)
	for _, j := range jobs {
		if j.exists {
			select {
			case m.entries <- j:
				continue
			default: // far behind: these stay until somebody looks
			}
		}
		j.leave()
	}
}

// behind are the names that are being taken back behind an increment of the epoch.
type behind struct {
	mu     sync.Mutex
	groups []*entryGroup
}

func (b *behind) add(g *entryGroup) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.groups = append(b.unfinished(), g)
}

func (b *behind) unfinished() []*entryGroup {
	b.groups = slices.DeleteFunc(b.groups, func(g *entryGroup) bool { return g.left.Load() == 0 })
	return b.groups
}

// await waits until all is taken back that was to be when it was called, or for
// behindPatience: the caller's request may itself hold the lock that is needed.
func (b *behind) await(ctx context.Context) {
	b.mu.Lock()
	groups := slices.Clone(b.unfinished())
	b.mu.Unlock()
	if len(groups) == 0 {
		return
	}
	patience := time.NewTimer(behindPatience)
	defer patience.Stop()
	for _, g := range groups {
		select {
		case <-g.done:
		case <-patience.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

const behindPatience = 5 * time.Millisecond

// existsPatience is entryPatience for names that exist, without epochs.
const existsPatience = 15 * time.Millisecond

// DropAll returns when the kernel uses nothing that it was told before the call
// without asking again.
func (m *Mount) DropAll(ctx context.Context) error {
	known := m.nodes.drop()
	for _, l := range m.listings.drop(func(*listing) bool { return true }) {
		m.unused(l)
	}
	if !m.mounted() {
		return nil
	}
	late, err := m.dropKernels(ctx, known, m.epochs())
	if err != nil {
		return err
	}
	for _, ino := range late {
		if err := m.invalAttr(ctx, ino); err != nil {
			return err
		}
	}
	return nil
}

// forgetNames has the kernel ask for every name in directories before it uses it.
func (m *Mount) forgetNames(ctx context.Context, dirs []fsop.Ino) error {
	if m.epochs() {
		return m.dev.incEpoch()
	}
	return m.dropNames(ctx, func(dir fsop.Ino) bool { return slices.Contains(dirs, dir) })
}

// dropNames is what is done without epochs, with the directories that in says. A name
// in use, in a directory whose lock is held by a change in flight, goes when that
// change is answered, which may be later.
func (m *Mount) dropNames(ctx context.Context, in func(dir fsop.Ino) bool) error {
	if err := m.dev.shrink(); err != nil {
		return err
	}
	names := slices.DeleteFunc(m.names.all(), func(n dirName) bool { return !in(n.dir) })
	if len(names) == 0 {
		return nil
	}
	g := &entryGroup{done: make(chan struct{}), exists: true}
	g.left.Store(int32(len(names)))
	jobs := make([]*entryJob, len(names))
	for i, n := range names {
		jobs[i] = &entryJob{dir: n.dir, name: n.name, same: true, group: g}
	}
	if err := m.expiring(ctx, jobs); err != nil {
		return err
	}
	return m.invalNames(ctx, jobs, g, false)
}

// Holds returns the inodes that the kernel knows and how often it was told of
// each, in no order. What Forgotten would return before is accounted for.
func (m *Mount) Holds() []proto.Hold { return m.nodes.holds() }

// Forgotten returns what the kernel forgot since the last call of Forgotten or
// Holds, in no order.
func (m *Mount) Forgotten() []proto.Hold { return m.nodes.takeForgotten() }

// Vacant reports whether a name that this mount is asking to be made was absent
// before, and no change of it by others has come since: with the directory's
// window held, nobody else can have made it.
func (m *Mount) Vacant(dir fsop.Ino, name string) bool { return m.nodes.entries.vacant(dir, name) }

// Changed notes that a directory was changed at seq by a change of this mount that the
// kernel was told of before: what is older of its attributes is not to be cached.
func (m *Mount) Changed(dir fsop.Ino, seq uint64) { m.nodes.touched(dir, seq) }

// pageQueue invalidates the pages of inodes, in the background: that waits for
// pages under READ and WRITE, so nobody else must wait for it but those whose
// wait those requests do not depend on.
type pageQueue struct {
	mu      sync.Mutex
	jobs    map[fsop.Ino]*pageJob // queued or running
	queue   []fsop.Ino
	workers int
	wg      sync.WaitGroup
	busy    func(fsop.Ino) bool // whether pages may be locked by a request in flight
}

type pageJob struct {
	running bool
	again   bool // asked for again while running
	done    chan struct{}
}

const pageWorkers = 32

func newPageQueue(busy func(fsop.Ino) bool) *pageQueue {
	return &pageQueue{jobs: make(map[fsop.Ino]*pageJob), busy: busy}
}

// add returns a channel that is closed when the pages are gone.
func (q *pageQueue) add(d *device, ino fsop.Ino) <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	if j := q.jobs[ino]; j != nil {
		j.again = j.running
		return j.done
	}
	j := &pageJob{done: make(chan struct{})}
	q.jobs[ino] = j
	q.queue = append(q.queue, ino)
	if q.workers < pageWorkers {
		q.workers++
		q.wg.Go(func() { q.run(d) })
	}
	return j.done
}

func (q *pageQueue) run(d *device) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.queue) > 0 {
		ino := q.queue[0]
		q.queue = q.queue[1:]
		j := q.jobs[ino]
		j.running = true
		q.mu.Unlock()
		d.invalPages(ino, q.busy(ino)) // its errors all mean that there are no pages
		q.mu.Lock()
		if j.again {
			j.again, j.running = false, false
			q.queue = append(q.queue, ino)
			continue
		}
		delete(q.jobs, ino)
		close(j.done)
	}
	q.queue = nil
	q.workers--
}

// await returns when the invalidations of ino's pages that were asked for
// before are done, or ctx ends.
func (q *pageQueue) await(ctx context.Context, ino fsop.Ino) {
	q.mu.Lock()
	j := q.jobs[ino]
	q.mu.Unlock()
	if j == nil {
		return
	}
	select {
	case <-j.done:
	case <-ctx.Done():
	}
}

// wait returns when the queue is empty.
func (q *pageQueue) wait() { q.wg.Wait() }
