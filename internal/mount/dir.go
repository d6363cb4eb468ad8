package mount

import (
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"

	"mortar/internal/fsop"
)

// OpenDir implements fuse.RawFileSystem. An open directory needs nothing of us,
// not even for locks, which the kernel keeps to itself for directories. So it
// sends neither OPENDIR nor RELEASEDIR from then on, and caches listings.
func (f *fileSystem) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status {
	return fuse.ENOSYS
}

// ReleaseDir implements fuse.RawFileSystem.
func (f *fileSystem) ReleaseDir(*fuse.ReleaseIn) {}

// ReadDir implements fuse.RawFileSystem.
func (f *fileSystem) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.readDir(cancel, in, out, false)
}

// ReadDirPlus implements fuse.RawFileSystem.
func (f *fileSystem) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.readDir(cancel, in, out, true)
}

// Cookies of the entries that every directory has; those of fsop begin above.
const (
	cookieDot    = 1
	cookieDotDot = 2
)

// readahead is about how many bytes of entries are asked for at once. The
// kernel asks for a page at a time, at least until Linux 6.13.
const readahead = 64 << 10

func (f *fileSystem) readDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList, plus bool) fuse.Status {
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	dir := fsop.Ino(in.NodeId)
	cookie := in.Offset
	for _, dot := range []struct {
		name   string
		cookie uint64
	}{{".", cookieDot}, {"..", cookieDotDot}} {
		if cookie >= dot.cookie {
			continue
		}
		e := fuse.DirEntry{Name: dot.name, Mode: s_IFDIR << 12, Off: dot.cookie}
		if dot.cookie == cookieDot || dir == fsop.RootIno {
			e.Ino = uint64(dir)
		}
		// With plus, a node id of 0 says that this is not a lookup.
		if plus && out.AddDirLookupEntry(e) == nil || !plus && !out.AddDirEntry(e) {
			return fuse.OK
		}
	}
	if cookie <= cookieDotDot {
		cookie = 0
	}
	list, err := f.list(r, dir, cookie, plus)
	if err != nil {
		return f.status(r, err)
	}
	given := 0
	var told []toldEntry
	for i := range list.entries {
		d := &list.entries[i]
		if fsop.CheckName(d.Name) != nil || d.Cookie <= cookieDotDot || plus && !plausible(&d.Attr) {
			f.log.Error("mount: implausible directory entry", "dir", uint64(dir), "name", d.Name)
			f.unused(list.after(given))
			if given == 0 {
				return fuse.EIO
			}
			return fuse.OK
		}
		e := fuse.DirEntry{Name: d.Name, Ino: uint64(d.Ino), Mode: d.Type, Off: d.Cookie}
		if !plus {
			if !out.AddDirEntry(e) {
				break
			}
		} else {
			eo := out.AddDirLookupEntry(e)
			if eo == nil {
				break
			}
			// The kernel would believe outdated attributes, since it asked for them just
			// now, stop at a name that is being looked up, and not always be able to move
			// a directory. Without an inode it takes the entry for a name alone.
			at := dirName{dir, d.Name}
			if f.nodes.outdated(d.Ino, list.seq, r.began) || f.lookings.under(dir, d.Name) ||
				d.Attr.IsDir() && f.places.elsewhere(d.Ino, at) {
				f.nodes.unused(d.Ino)
			} else {
				f.found(r, &d.Attr, list.seq, dir, d.Name, eo)
				told = append(told, toldEntry{d.Ino, d.Name})
				if d.Attr.IsDir() {
					f.places.told(d.Ino, at)
				}
			}
		}
		given++
	}
	f.lookings.tell(dir, told)
	if left := list.after(given); left != nil {
		f.unused(f.listings.keep(left))
	}
	if plus && f.o.telling != nil {
		f.o.telling()
	}
	return fuse.OK
}

// listing is a part of a directory as it was at seq.
type listing struct {
	dir     fsop.Ino
	cookie  uint64 // of the entry before the first
	plus    bool
	seq     uint64
	began   began
	entries []fsop.Dirent
	end     bool // nothing comes after the entries
}

// after is what is left of l when n entries are taken, nil if the rest has to
// be asked for.
func (l *listing) after(n int) *listing {
	if n == len(l.entries) && !l.end || len(l.entries) == 0 {
		return nil
	}
	left := *l
	if n > 0 {
		left.cookie = l.entries[n-1].Cookie
	}
	left.entries = l.entries[n:]
	return &left
}

// unused says that the rest of a listing will not be given to the kernel.
func (m *Mount) unused(l *listing) {
	if l == nil || !l.plus {
		return
	}
	for i := range l.entries {
		m.nodes.unused(l.entries[i].Ino)
	}
}

// dropListings forgets leftovers of dir, which this mount has changed.
func (m *Mount) dropListings(dir fsop.Ino) {
	for _, l := range m.listings.drop(func(l *listing) bool { return l.dir == dir }) {
		m.unused(l)
	}
}

// list returns entries that follow cookie: what the last reply left over, or
// else the handler's. Leftovers may have been overtaken by changes, which a
// listing that was begun before them need not show; but the kernel may not cache
// them then, see nodes.fresh, nor be told what a file was before, see nodes.outdated.
func (f *fileSystem) list(r *request, dir fsop.Ino, cookie uint64, plus bool) (*listing, error) {
	if cookie != 0 {
		if l := f.listings.take(dir, cookie, plus); l != nil {
			r.began = l.began
			return l, nil
		}
	}
	l := &listing{dir: dir, cookie: cookie, plus: plus, began: r.began}
	// Most directories fit into one reply, and the next one only says so. It is
	// asked for at once: the kernel would.
	for i := range 2 {
		reply, err := f.handler.Do(r, &fsop.Readdir{Ino: dir, Cookie: cookie, Max: readahead, Plus: plus})
		if err != nil {
			f.unused(l)
			return nil, err
		}
		if len(reply.Entries) == 0 {
			l.end = true
		}
		if i == 0 || reply.Seq < l.seq {
			l.seq = reply.Seq
		}
		l.entries = append(l.entries, reply.Entries...)
		if l.end || len(l.entries) >= enough {
			break
		}
		cookie = l.entries[len(l.entries)-1].Cookie
	}
	return l, nil
}

// enough entries are a sign that a directory is large.
const enough = 256

// listings are leftovers of the last few Readdir replies.
type listings struct {
	mu   sync.Mutex
	kept [8]*listing
	next int
}

func newListings() *listings { return new(listings) }

func (s *listings) take(dir fsop.Ino, cookie uint64, plus bool) *listing {
	found := s.drop(func(l *listing) bool { return l.dir == dir && l.cookie == cookie && l.plus == plus })
	if found == nil {
		return nil
	}
	return found[0]
}

// keep keeps l, and returns what has to make room for it or is replaced by it.
func (s *listings) keep(l *listing) *listing {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := s.next
	for i, k := range s.kept {
		if k != nil && k.dir == l.dir && k.cookie == l.cookie && k.plus == l.plus {
			at = i
		}
	}
	if at == s.next {
		s.next = (s.next + 1) % len(s.kept)
	}
	old := s.kept[at]
	s.kept[at] = l
	return old
}

// drop removes and returns those that f wants.
func (s *listings) drop(f func(*listing) bool) (dropped []*listing) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, l := range s.kept {
		if l != nil && f(l) {
			s.kept[i] = nil
			dropped = append(dropped, l)
		}
	}
	return dropped
}
