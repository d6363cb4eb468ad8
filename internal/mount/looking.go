package mount

import (
	"sync"
	"time"

	"mortar/internal/fsop"
)

// lookings keeps LOOKUP and READDIRPLUS out of each other's way.
//
// While the kernel waits for the answer to a LOOKUP of a name that it does not
// have, nobody else can give that name an inode: a thread that digests a
// listing with attributes stops at it, and the inodes of the names that follow
// do not appear. The LOOKUP may be waiting for a change to be committed, the
// change for this mount to take back what the listing said of one of those
// inodes, and that for the inode to appear (Mount.invalAttr): a ring.
//
// So a listing says nothing of names that are being looked up. Should such a
// LOOKUP come after the listing was put together, and before it is digested, and
// not be answered from memory, then it gives way as soon as an invalidation
// waits: it is answered ESTALE, and the kernel begins the system call again.
type lookings struct {
	mu     sync.Mutex
	flight map[dirName][]*looking
	clock  uint64 // counts what is begun and told
	told   [32]toldListing
	next   int
	cuts   map[fsop.Ino]time.Time // by directory, when LOOKUPs gave way last
}

type dirName struct {
	dir  fsop.Ino
	name string
}

// looking is one LOOKUP in flight.
type looking struct {
	at    dirName
	r     *request
	clock uint64
}

// toldListing is what a listing told the kernel, of a directory's names.
type toldListing struct {
	dir     fsop.Ino
	entries []toldEntry
	clock   uint64
}

type toldEntry struct {
	ino  fsop.Ino
	name string
}

// cutAgain is how long the thread that digests a listing has to get past a name
// after a LOOKUP gave way, before another of that directory has to.
const cutAgain = 50 * time.Millisecond

func newLookings() *lookings {
	return &lookings{flight: make(map[dirName][]*looking), cuts: make(map[fsop.Ino]time.Time)}
}

// begin registers a LOOKUP that will have to be asked. Every begin is followed by an end.
func (s *lookings) begin(r *request, dir fsop.Ino, name string) *looking {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clock++
	l := &looking{dirName{dir, name}, r, s.clock}
	s.flight[l.at] = append(s.flight[l.at], l)
	return l
}

func (s *lookings) end(l *looking) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.flight[l.at]
	if len(all) == 1 {
		delete(s.flight, l.at)
		return
	}
	for i := range all {
		if all[i] == l {
			all[i] = all[len(all)-1]
			s.flight[l.at] = all[:len(all)-1]
			return
		}
	}
}

// under says whether name is being looked up.
func (s *lookings) under(dir fsop.Ino, name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.flight[dirName{dir, name}]) > 0
}

// tell notes what a listing is about to tell the kernel.
func (s *lookings) tell(dir fsop.Ino, entries []toldEntry) {
	if len(entries) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clock++
	s.told[s.next] = toldListing{dir: dir, entries: entries, clock: s.clock}
	s.next = (s.next + 1) % len(s.told)
}

// cut has those LOOKUPs give way at which a listing may be stopped that told of ino.
func (s *lookings) cut(ino fsop.Ino) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.flight) == 0 {
		return
	}
	for dir, at := range s.cuts {
		if time.Since(at) >= cutAgain {
			delete(s.cuts, dir)
		}
	}
	for i := range s.told {
		t := &s.told[i]
		if _, lately := s.cuts[t.dir]; lately || !t.names(ino) {
			continue
		}
		for _, e := range t.entries {
			for _, l := range s.flight[dirName{t.dir, e.name}] {
				if l.clock > t.clock {
					l.r.giveWay()
					s.cuts[t.dir] = time.Now()
				}
			}
		}
	}
}

func (t *toldListing) names(ino fsop.Ino) bool {
	for i := range t.entries {
		if t.entries[i].ino == ino {
			return true
		}
	}
	return false
}
