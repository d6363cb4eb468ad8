package mount

import (
	"context"
	"slices"
	"sync"
	"time"

	"mortar/internal/fsop"
)

// places are where the kernel may have directories that it knows. Unlike a file
// a directory can be in one place only: when the kernel is told of one that it
// has elsewhere it must move it there first, and needs locks for that which it
// does not wait for (d_splice_alias): that of all renames between directories,
// and that of the old parent. If they are taken the system call begins again,
// once, and finds them taken still.
//
// So whoever looks for a directory that another machine moved has the old name
// taken back, and waits here for what is under way. What is not known is whether
// the kernel still has the directory at a place that it was told of; that it
// does is then assumed until it forgets the directory.
type places struct {
	mu      sync.Mutex
	of      map[fsop.Ino][]place
	renames map[*fsop.Rename]struct{} // between directories, in flight
}

type place struct {
	dirName
	taken bool // the kernel was made to forget the name
}

const (
	// maxPlaces bounds those of one directory.
	maxPlaces = 4
	// movePatience bounds the wait for changes under way. Longer, and they hang.
	movePatience = time.Second
)

// noName is of nothing: to have it taken back is to wait for its directory's lock.
const noName = "\x01"

func newPlaces() *places {
	return &places{of: make(map[fsop.Ino][]place), renames: make(map[*fsop.Rename]struct{})}
}

// begin registers a rename between directories. It is followed by an end.
func (p *places) begin(op *fsop.Rename) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.renames[op] = struct{}{}
}

func (p *places) end(op *fsop.Rename) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.renames, op)
}

// renaming lists a directory of each rename that is under way.
func (p *places) renaming() (dirs []fsop.Ino) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for op := range p.renames {
		dirs = append(dirs, op.NewParent)
	}
	return dirs
}

// told notes that the kernel is told of a directory at a place, and returns the
// others where it may have it.
func (p *places) told(ino fsop.Ino, at dirName) (others []place) {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := p.of[ino]
	if len(all) == 1 && all[0].dirName == at {
		all[0].taken = false
		return nil
	}
	others = slices.DeleteFunc(slices.Clone(all), func(o place) bool { return o.dirName == at })
	keep := slices.Clone(others)
	for i := range keep {
		keep[i].taken = true
	}
	if len(keep) == maxPlaces {
		keep = keep[1:]
	}
	p.of[ino] = append(keep, place{dirName: at})
	return others
}

// elsewhere says whether the kernel may have a directory at another place.
func (p *places) elsewhere(ino fsop.Ino, at dirName) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.ContainsFunc(p.of[ino], func(o place) bool { return o.dirName != at })
}

// moved notes that the kernel itself has moved a directory.
func (p *places) moved(ino fsop.Ino, to dirName) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.of[ino] = []place{{dirName: to}}
}

func (p *places) forget(ino fsop.Ino) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.of, ino)
}

// vacate returns when the kernel can move a directory to the place at which it
// is about to be told of it, as far as that can be known.
func (m *Mount) vacate(ctx context.Context, ino fsop.Ino, at dirName) {
	others := m.places.told(ino, at)
	var names []dirName
	for _, o := range others {
		// Where something else was found since, the directory is not.
		if to := m.nodes.entries.look(o.dir, o.name); !o.taken && (to == ino || to == unsure) {
			names = append(names, o.dirName)
		}
	}
	m.takeBehind(names)
	m.behind.await(ctx) // also for what invalidations have to take back yet
	if len(others) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, max(movePatience, m.o.movePatience))
	defer cancel()
	// Under way here: the locks of a rename are those of its directories, too.
	busy := m.places.renaming()
	for _, o := range others {
		if m.inflight.isChanging(o.dir) {
			busy = append(busy, o.dir)
		}
	}
	names = nil
	for _, dir := range busy {
		if dir == at.dir {
			continue // this very request has its lock; and within it the kernel needs none
		}
		m.inflight.awaitChanges(ctx, dir)
		// Answered is not yet let go of.
		names = append(names, dirName{dir, noName})
	}
	m.takeBehind(names)
	m.behind.await(ctx)
}

// takeBehind has the workers take names back, see behind.
func (m *Mount) takeBehind(names []dirName) {
	if len(names) == 0 {
		return
	}
	g := &entryGroup{exists: true, done: make(chan struct{})}
	g.left.Store(int32(len(names)))
	jobs := make([]*entryJob, len(names))
	for i, n := range names {
		jobs[i] = &entryJob{dir: n.dir, name: n.name, exists: true, group: g}
	}
	m.behind.add(g)
	m.finish(jobs, g)
}
