package mount

import (
	"hash/maphash"
	"sync"

	"mortar/internal/fsop"
)

// wholeDirs are directories of which this mount knows all names, because it
// made them and nobody else has changed them since: the replica would have said
// so. That a name is not among them is known without asking, and a program that
// unpacks or copies a tree asks so for every file before it makes it.
//
// It keeps hashes. To have a name too many only costs the question.
type wholeDirs struct {
	seed maphash.Seed

	mu    sync.Mutex
	dirs  map[fsop.Ino]map[uint64]struct{}
	names int // in all of dirs
}

const (
	maxWholeDirs  = 4096
	maxWholeNames = 128 << 10 // some 3 MiB
)

func newWholeDirs() wholeDirs {
	return wholeDirs{seed: maphash.MakeSeed(), dirs: make(map[fsop.Ino]map[uint64]struct{})}
}

// begin adds an empty directory.
func (w *wholeDirs) begin(dir fsop.Ino) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.dirs) >= maxWholeDirs {
		w.evictLocked()
	}
	w.dirs[dir] = make(map[uint64]struct{})
}

// evictLocked gives up any directory.
func (w *wholeDirs) evictLocked() {
	for dir, names := range w.dirs { // Go starts at random
		w.names -= len(names)
		delete(w.dirs, dir)
		return
	}
}

// look finds the names of dir, nil if not all are known, and whether name is among
// them, under the hash h. w.mu is held.
func (w *wholeDirs) look(dir fsop.Ino, name string) (names map[uint64]struct{}, h uint64, there bool) {
	if names = w.dirs[dir]; names == nil {
		return nil, 0, false
	}
	h = maphash.String(w.seed, name)
	_, there = names[h]
	return names, h, there
}

// add notes that name may from now on be in dir. It is called before the change
// that makes it is asked for.
func (w *wholeDirs) add(dir fsop.Ino, name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	names, h, there := w.look(dir, name)
	if names == nil || there {
		return
	}
	names[h] = struct{}{}
	for w.names++; w.names > maxWholeNames; {
		w.evictLocked()
	}
}

// remove notes that this mount took name out of dir. It is called after that
// was done and before the kernel, which lets nobody else make the name here
// meanwhile, is told.
func (w *wholeDirs) remove(dir fsop.Ino, name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if names, h, there := w.look(dir, name); there {
		delete(names, h)
		w.names--
	}
}

// absent says whether name is certainly not in dir.
func (w *wholeDirs) absent(dir fsop.Ino, name string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	names, _, there := w.look(dir, name)
	return names != nil && !there
}

// spoil is called when somebody else may have changed dir.
func (w *wholeDirs) spoil(dir fsop.Ino) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if names, ok := w.dirs[dir]; ok {
		w.names -= len(names)
		delete(w.dirs, dir)
	}
}

// clear is spoil for all.
func (w *wholeDirs) clear() {
	w.mu.Lock()
	defer w.mu.Unlock()
	clear(w.dirs)
	w.names = 0
}
