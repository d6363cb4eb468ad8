package mount

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"mortar/internal/estate"
	"mortar/internal/fsop"
)

// inflight is the register of requests that are being served. It knows which
// directories' locks they hold in the kernel, and ends the wait of requests
// whose caller is being killed.
type inflight struct {
	shards [16]inflightShard
	next   atomic.Uint32

	dirs [16]dirShard

	// The watch goroutine sleeps while nothing is in flight; idle is then true.
	idle atomic.Bool
	wake chan struct{}
}

type inflightShard struct {
	mu  sync.Mutex
	ops map[*request]struct{}
}

// dirShard counts the requests in flight that hold an inode's lock: the changes
// of a directory, the reads and writes of a file's pages.
type dirShard struct {
	mu      sync.Mutex
	changes map[fsop.Ino]int
	ended   map[fsop.Ino]chan struct{} // closed when there are none; made when first asked for
	resizes map[fsop.Ino]int           // those that may change a file's size
	resized uint64                     // how many of those there were
}

// request is one request of the kernel in flight, and its context.
//
// A process that waits for a FUSE reply is interrupted by any signal, and the
// kernel tells the server so once. To answer EINTR then would surprise a program
// that got a SIGCHLD while it called stat, and to answer it to a change that was
// already sent would be a lie half of the time. So only waits for locks end with
// the first interrupt; anything else goes on unless the signal is killing the
// caller, who will not see the answer.
type request struct {
	cancel <-chan struct{} // closed by the kernel's INTERRUPT
	pid    uint32          // of the calling thread, 0 if it is out of sight
	unique uint64          // the kernel's number of it
	began  began
	shard  *inflightShard

	interrupted time.Time // when sweep first saw that it was; sweep's only

	mu   sync.Mutex
	done chan struct{} // made when first asked for
	err  error
	way  bool // it ended because it has to give way
}

var _ context.Context = (*request)(nil)

// Deadline implements context.Context.
func (r *request) Deadline() (time.Time, bool) { return time.Time{}, false }

// Value implements context.Context.
func (r *request) Value(key any) any {
	if key == (estate.RequestKey{}) {
		return r
	}
	return nil
}

// KernelRequest implements estate.KernelRequest.
func (r *request) KernelRequest() uint64 { return r.unique }

// Done implements context.Context.
func (r *request) Done() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.done == nil {
		r.done = make(chan struct{})
		if r.err != nil {
			close(r.done)
		}
	}
	return r.done
}

// Err implements context.Context.
func (r *request) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// end ends the request's context.
func (r *request) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.endLocked()
}

// giveWay ends the request's context so that its caller begins again, see lookings.
func (r *request) giveWay() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.way = r.way || r.err == nil
	r.endLocked()
}

// gaveWay says whether giveWay is why the request ended.
func (r *request) gaveWay() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.way
}

func (r *request) endLocked() {
	if r.err != nil {
		return
	}
	r.err = context.Canceled
	if r.done != nil {
		close(r.done)
	}
}

func newInflight() *inflight {
	f := &inflight{wake: make(chan struct{}, 1)}
	for i := range f.shards {
		f.shards[i].ops = make(map[*request]struct{})
	}
	for i := range f.dirs {
		f.dirs[i].changes = make(map[fsop.Ino]int)
		f.dirs[i].ended = make(map[fsop.Ino]chan struct{})
		f.dirs[i].resizes = make(map[fsop.Ino]int)
	}
	return f
}

func (f *inflight) dir(ino fsop.Ino) *dirShard {
	return &f.dirs[uint64(ino)*0x9e3779b97f4a7c15>>60]
}

// add registers a request. Every add is followed by a remove.
func (f *inflight) add(r *request) {
	r.shard = &f.shards[f.next.Add(1)%uint32(len(f.shards))]
	r.shard.mu.Lock()
	r.shard.ops[r] = struct{}{}
	r.shard.mu.Unlock()
	if f.idle.Load() && f.idle.CompareAndSwap(true, false) {
		f.wake <- struct{}{}
	}
}

func (f *inflight) remove(r *request) {
	r.shard.mu.Lock()
	delete(r.shard.ops, r)
	r.shard.mu.Unlock()
}

// changing registers that a change in flight holds dir's lock in the kernel, or
// a read or write the locks of a file's pages.
func (f *inflight) changing(dir fsop.Ino) {
	d := f.dir(dir)
	d.mu.Lock()
	d.changes[dir]++
	d.mu.Unlock()
}

func (f *inflight) doneChanging(dir fsop.Ino) {
	d := f.dir(dir)
	d.mu.Lock()
	if d.changes[dir]--; d.changes[dir] == 0 {
		delete(d.changes, dir)
		if c := d.ended[dir]; c != nil {
			close(c)
			delete(d.ended, dir)
		}
	}
	d.mu.Unlock()
}

// isChanging says whether a request holds dir's lock, or a file's pages', in the kernel.
func (f *inflight) isChanging(dir fsop.Ino) bool {
	d := f.dir(dir)
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changes[dir] > 0
}

// awaitChanges returns at a moment without changes of dir, or when ctx ends.
func (f *inflight) awaitChanges(ctx context.Context, dir fsop.Ino) {
	d := f.dir(dir)
	d.mu.Lock()
	if d.changes[dir] == 0 {
		d.mu.Unlock()
		return
	}
	c := d.ended[dir]
	if c == nil {
		c = make(chan struct{})
		d.ended[dir] = c
	}
	d.mu.Unlock()
	select {
	case <-c:
	case <-ctx.Done():
	}
}

// resizing registers a request that may change a file's size.
func (f *inflight) resizing(ino fsop.Ino) {
	d := f.dir(ino)
	d.mu.Lock()
	d.resizes[ino]++
	d.resized++
	d.mu.Unlock()
}

func (f *inflight) doneResizing(ino fsop.Ino) {
	d := f.dir(ino)
	d.mu.Lock()
	if d.resizes[ino]--; d.resizes[ino] == 0 {
		delete(d.resizes, ino)
	}
	d.mu.Unlock()
}

// resized returns a mark. If it is the same later, and not 0, no request of this
// mount was changing ino's size at any moment in between.
func (f *inflight) resized(ino fsop.Ino) (mark uint64) {
	d := f.dir(ino)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.resizes[ino] > 0 {
		return 0
	}
	return d.resized + 1
}

// watchInterval is how soon after a signal a killed caller is let go.
const watchInterval = 200 * time.Millisecond

// watch ends requests whose callers are being killed, and all of them when the
// connection is dead. It returns when stop is closed.
func (f *inflight) watch(stop <-chan struct{}, dead func() bool) {
	tick := time.NewTimer(watchInterval)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		tick.Reset(watchInterval)
		if f.sweep(dead) {
			continue
		}
		f.idle.Store(true)
		// A request may have been added before it could see idle.
		if f.busy() && f.idle.CompareAndSwap(true, false) {
			continue
		}
		select {
		case <-stop:
			return
		case <-f.wake:
		}
	}
}

func (f *inflight) busy() bool {
	for i := range f.shards {
		s := &f.shards[i]
		s.mu.Lock()
		n := len(s.ops)
		s.mu.Unlock()
		if n > 0 {
			return true
		}
	}
	return false
}

// sweep looks at all requests once, and says whether there were any.
func (f *inflight) sweep(dead func() bool) bool {
	busy := false
	var interrupted []*request
	for i := range f.shards {
		s := &f.shards[i]
		s.mu.Lock()
		for r := range s.ops {
			busy = true
			select {
			case <-r.cancel:
				interrupted = append(interrupted, r)
			default:
			}
		}
		s.mu.Unlock()
	}
	if len(interrupted) == 0 {
		return busy
	}
	all := dead()
	for _, r := range interrupted {
		if all || r.pid != 0 && dying(r.pid) || r.pid == 0 && r.overdue() {
			r.end()
		}
	}
	return busy
}

// patience is how long after an interrupt a request of a thread in another PID
// namespace ends: whether it is dying cannot be seen, and it must not be
// impossible to kill.
const patience = 10 * time.Second

// overdue says whether r was interrupted long ago. It is called by sweep only.
func (r *request) overdue() bool {
	if r.interrupted.IsZero() {
		r.interrupted = time.Now()
	}
	return time.Since(r.interrupted) >= patience
}

// dying says whether a thread is gone or has a SIGKILL pending, which is also
// what the kernel makes of any other signal that nobody handles and that ends
// the process.
func dying(tid uint32) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return os.IsNotExist(err)
	}
	const sigkill = 1 << (9 - 1)
	for _, key := range []string{"\nSigPnd:\t", "\nShdPnd:\t"} {
		if _, rest, ok := bytes.Cut(b, []byte(key)); ok {
			line, _, _ := bytes.Cut(rest, []byte("\n"))
			if set, err := strconv.ParseUint(string(line), 16, 64); err == nil && set&sigkill != 0 {
				return true
			}
		}
	}
	return bytes.Contains(b, []byte("\nState:\tZ")) || bytes.Contains(b, []byte("\nState:\tX"))
}

// begin registers a request of the kernel.
func (m *Mount) begin(cancel <-chan struct{}, h *fuse.InHeader) *request {
	r := &request{cancel: cancel, pid: h.Pid, unique: h.Unique, began: m.nodes.begin()}
	m.inflight.add(r)
	return r
}
