package mount

import (
	"sync"

	"mortar/internal/fsop"
)

// entries is what names lead to, as far as this mount was told or made it so. A
// name stays until the replica says that somebody else changed it.
//
// The kernel keeps the same in its own cache, and asks all the same: for the
// target of every rename, for every name that it is to make, and for what it had
// to drop. Of a directory that the mount made itself, and that nobody else has
// changed since, it knows all names: that one is not among them is known without
// asking, and a program that unpacks or copies a tree asks so for every file.
type entries struct {
	mu    sync.Mutex
	dirs  map[fsop.Ino]*dirEntries
	names int // in all of dirs
}

// dirEntries are names of one directory.
type dirEntries struct {
	whole bool // names that are not among them do not exist
	leads map[string]fsop.Ino
}

// What a name can lead to besides an inode.
const (
	nothing fsop.Ino = 0         // the name does not exist
	unsure  fsop.Ino = 1<<64 - 1 // it may or may not
	// This mount asks for it to be made, before which it did not exist, and as far as
	// others are concerned still does not: whoever makes it spoils it.
	vacant fsop.Ino = 1<<64 - 2
)

const (
	maxDirs  = 4096
	maxNames = 64 << 10 // some 4 MiB
)

func newEntries() entries { return entries{dirs: make(map[fsop.Ino]*dirEntries)} }

// begin adds an empty directory.
func (e *entries) begin(dir fsop.Ino) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.dirLocked(dir).whole = true
}

func (e *entries) dirLocked(dir fsop.Ino) *dirEntries {
	d := e.dirs[dir]
	if d == nil {
		if len(e.dirs) >= maxDirs {
			e.evictLocked(dir)
		}
		d = &dirEntries{leads: make(map[string]fsop.Ino)}
		e.dirs[dir] = d
	}
	return d
}

// evictLocked gives up any directory but one.
func (e *entries) evictLocked(but fsop.Ino) {
	for dir := range e.dirs { // Go starts at random
		if dir != but {
			e.forgetLocked(dir)
			return
		}
	}
	e.forgetLocked(but)
}

func (e *entries) forgetLocked(dir fsop.Ino) {
	if d := e.dirs[dir]; d != nil {
		e.names -= len(d.leads)
		delete(e.dirs, dir)
	}
}

// doubt notes that a change of name by this mount is about to be asked for. It
// returns what the name led to until now.
func (e *entries) doubt(dir fsop.Ino, name string) (was fsop.Ino) {
	e.mu.Lock()
	defer e.mu.Unlock()
	d := e.dirs[dir]
	if d == nil {
		return unsure
	}
	was, there := d.leads[name]
	if !there && !d.whole {
		return unsure
	}
	if was == vacant {
		was = unsure // what was asked for before is not answered
	}
	switch {
	case was == nothing:
		e.setLocked(dir, name, vacant)
	case d.whole:
		e.setLocked(dir, name, unsure)
	default:
		delete(d.leads, name)
		e.names--
	}
	return was
}

// vacant reports whether name did not exist when it was last doubted, and nobody else
// may have made it since.
func (e *entries) vacant(dir fsop.Ino, name string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	d := e.dirs[dir]
	return d != nil && d.leads[name] == vacant
}

// set notes what name leads to.
func (e *entries) set(dir fsop.Ino, name string, to fsop.Ino) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.setLocked(dir, name, to)
}

func (e *entries) setLocked(dir fsop.Ino, name string, to fsop.Ino) {
	d := e.dirLocked(dir)
	was, there := d.leads[name]
	switch {
	case d.whole && to == nothing: // said by its absence
		if there {
			delete(d.leads, name)
			e.names--
		}
		return
	case there && was == to:
		return
	case !there:
		e.names++
	}
	d.leads[name] = to
	for e.names > maxNames {
		e.evictLocked(dir)
	}
}

// look says what name leads to; unsure if that is not known.
func (e *entries) look(dir fsop.Ino, name string) fsop.Ino {
	e.mu.Lock()
	defer e.mu.Unlock()
	d := e.dirs[dir]
	if d == nil {
		return unsure
	}
	if to, there := d.leads[name]; (there || d.whole) && to != vacant {
		return to
	}
	return unsure
}

// spoil is called when somebody else may have changed name in dir, or, without
// a name, dir itself. That it was empty once says nothing from then on.
func (e *entries) spoil(dir fsop.Ino, name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	d := e.dirs[dir]
	if d == nil {
		return
	}
	d.whole = false
	if _, there := d.leads[name]; there {
		delete(d.leads, name)
		e.names--
	}
	if len(d.leads) == 0 {
		delete(e.dirs, dir)
	}
}

// forget is called when nobody tells any more of changes of dir.
func (e *entries) forget(dir fsop.Ino) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.forgetLocked(dir)
}

// clear is forget for all.
func (e *entries) clear() {
	e.mu.Lock()
	defer e.mu.Unlock()
	clear(e.dirs)
	e.names = 0
}
