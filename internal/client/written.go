package client

import (
	"sync"
	"syscall"
	"time"

	"mortar/internal/fsop"
)

// written is a file that this client has written to lately.
type written struct {
	ino     fsop.Ino
	held    bool
	asked   bool   // a write went through without a window: the next one asks for it
	closing bool   // the window is being given up
	last    bool   // with what was held back
	closed  uint64 // windows.closings when it last was
	used    time.Time

	recalled time.Time // when somebody else wanted to see it

	// held back: not yet sent
	made *made      // to be done before data; nil: the set knows the file
	left fsop.Reply // what the change that closed it left of it, for flush
	data []byte
	off  uint64
	kill bool
	sync bool         // an fsync waits for it
	then fsop.Setattr // to be done after data; Valid 0: nothing
	born time.Time    // when the first of it came

	streams bool // so much was written at a time that there will be more

	// attr is what the file's attributes will be, but for times, while the window is held.
	attr  fsop.Attr
	sized bool  // and its size is certain, so that what is appended has a place
	dense bool  // it was foretold, and has no holes, so that the number of its blocks is certain
	told  int64 // the time of its last write, if an application was told

	flights []*flight
	bytes   int   // held back or in flight
	err     error // of a write that was acknowledged; reported once
	noted   bool  // that something would be lost with this process
}

// waits reports whether something is held back.
func (f *written) waits() bool {
	return len(f.data) > 0 || f.then.Valid != 0 || f.made != nil && !f.made.sent
}

// dirty reports whether something has not arrived.
func (f *written) dirty() bool { return f.waits() || len(f.flights) > 0 || f.bytes > 0 || f.last }

// flight is a write on its way. Attributes are a write to all of the file: they
// change its times, so nothing may overtake them.
type flight struct{ off, end uint64 }

// hold notes that the session holds the window of f, which had these attributes
// when it was given.
func (f *written) hold(a *fsop.Attr) {
	size := a.Size
	if f.held {
		if a.Change <= f.attr.Change {
			return // answers to writes side by side come in any order
		}
		if f.sized {
			size = max(size, f.attr.Size)
		}
	}
	f.held, f.sized, f.attr, f.dense = true, true, *a, false
	f.attr.Size = size
}

// grow notes that n bytes are written at off.
func (f *written) grow(off uint64, n int) {
	f.dense = f.dense && blocks(off&^(blockSize-1)) <= blocks(f.attr.Size)
	f.attr.Size = max(f.attr.Size, off+uint64(n))
	if f.dense {
		f.attr.Blocks = blocks(f.attr.Size)
	}
}

const blockSize = 4096 // of a brick's files

// blocks is how many blocks a file without holes has, as Attr.Blocks counts them.
func blocks(size uint64) uint64 { return (size + blockSize - 1) / blockSize * (blockSize / 512) }

// foretells reports whether all that is not known of f is its time, and that can be told: the set
// has not heard of it, and the operation to come carries it. Of one that the set knows, names
// can be added and removed under any name, here and elsewhere, whoever holds its window.
func (f *written) foretells() bool {
	return f.made != nil && !f.made.sent && f.held && f.sized && f.dense && !f.closing && f.err == nil && len(f.flights) == 0
}

// tell makes t the time of what is held back of f, if an application was not told another
// one, and returns the attributes that f will have.
func (f *written) tell(t int64) fsop.Attr {
	if f.told == 0 {
		f.told = t
	}
	f.attr.Ctime = f.told
	if f.then.Valid&fsop.SetMtime == 0 {
		f.attr.Mtime = f.told
	}
	if f.then.Valid&fsop.SetAtime == 0 {
		f.attr.Atime = f.told
	}
	return f.attr
}

// pin keeps what was told of when f was written, while its attributes change later.
func (f *written) pin() {
	if f.told == 0 {
		return
	}
	set := &fsop.Setattr{Valid: fsop.SetMtime, Mtime: f.attr.Mtime}
	if f.made != nil {
		set.Valid |= fsop.SetAtime
		set.Atime = f.attr.Atime
	}
	merge(&f.then, set)
	f.told = 0
}

func (f *written) takeError() error {
	err := f.err
	f.err = nil
	return err
}

// take makes an operation of what is held back of f: n bytes of data.
func (f *written) take(window fsop.Window) (op fsop.Op, t *flight, n int) {
	n = len(f.data)
	t = &flight{f.off, f.off + uint64(n)}
	if f.then.Valid != 0 {
		t = &flight{0, fsop.MaxSize}
	}
	if f.made != nil && !f.made.sent {
		return f.takeMake(window)
	}
	if n > 0 {
		op = &fsop.Write{Ino: f.ino, Off: f.off, Data: f.data, KillPriv: f.kill, Window: window, Then: f.then, Sync: f.sync, Told: f.told}
	} else {
		set := f.then
		set.Ino, set.Window = f.ino, window
		op = &set
	}
	f.data, f.then, f.sync, f.told = nil, fsop.Setattr{}, false, 0
	return op, t, n
}

// takeMake is take for the Make of f. Contents that are too large for it stay.
func (f *written) takeMake(window fsop.Window) (op fsop.Op, t *flight, n int) {
	f.made.sent = true
	m := &fsop.Make{Node: f.made.Node, First: fsop.Write{Ino: f.ino, Told: f.told}}
	if window&fsop.WindowDone == 0 {
		m.First.Window = fsop.WindowAsk
	}
	t = &flight{0, fsop.MaxSize}
	if len(f.data) > makeBytes {
		return m, t, 0
	}
	n = len(f.data)
	m.First.Off, m.First.Data, m.First.KillPriv, m.First.Then, m.First.Sync = f.off, f.data, f.kill, f.then, f.sync
	f.data, f.then, f.sync, f.told = nil, fsop.Setattr{}, false, 0
	return m, t, n
}

// overtakes reports whether a flight that began before t has bytes in common with it.
func (f *written) overtakes(t *flight) bool {
	for _, o := range f.flights {
		if o == t {
			break
		}
		if o.off < t.end && t.off < o.end {
			return true
		}
	}
	return false
}

// buffers are for what is held back. A stream of writes goes through a few of
// them; made anew each would have to be cleared first and collected after.
type buffers struct {
	page sync.Pool // of *[pageBytes]byte
	join sync.Pool // of *[joinBytes]byte
	full sync.Pool // of *[fsop.MaxData]byte
}

// pageBytes is room for a database's page, which is written and synced before the next
// one is, and for some that follow it.
const pageBytes = 32 << 10

// get returns an empty slice with room for n bytes.
func (p *buffers) get(n int) []byte {
	switch {
	case n <= pageBytes/4: // not worth keeping
		return make([]byte, 0, n)
	case n <= pageBytes:
		if b, ok := p.page.Get().(*[pageBytes]byte); ok {
			return b[:0]
		}
		return make([]byte, 0, pageBytes)
	case n < joinBytes:
		return make([]byte, 0, n)
	case n == joinBytes:
		if b, ok := p.join.Get().(*[joinBytes]byte); ok {
			return b[:0]
		}
		return make([]byte, 0, joinBytes)
	}
	if b, ok := p.full.Get().(*[fsop.MaxData]byte); ok {
		return b[:0]
	}
	return make([]byte, 0, fsop.MaxData)
}

// put takes back the data of an operation that was carried out.
func (p *buffers) put(op fsop.Op) {
	w := contents(op)
	if w == nil {
		return
	}
	switch cap(w.Data) {
	case pageBytes:
		p.page.Put((*[pageBytes]byte)(w.Data[:pageBytes]))
	case joinBytes:
		p.join.Put((*[joinBytes]byte)(w.Data[:joinBytes]))
	case fsop.MaxData:
		p.full.Put((*[fsop.MaxData]byte)(w.Data[:fsop.MaxData]))
	}
	w.Data = nil
}

// merge adds what a later Setattr sets.
func merge(s, later *fsop.Setattr) {
	if later.Valid&fsop.SetMode != 0 {
		s.Mode = later.Mode
	}
	if later.Valid&fsop.SetUID != 0 {
		s.UID = later.UID
	}
	if later.Valid&fsop.SetGID != 0 {
		s.GID = later.GID
	}
	if later.Valid&(fsop.SetAtime|fsop.SetAtimeNow) != 0 {
		s.Atime = later.Atime
		s.Valid &^= fsop.SetAtime | fsop.SetAtimeNow
	}
	if later.Valid&(fsop.SetMtime|fsop.SetMtimeNow) != 0 {
		s.Mtime = later.Mtime
		s.Valid &^= fsop.SetMtime | fsop.SetMtimeNow
	}
	s.Valid |= later.Valid
}

// foresee changes attributes as a Setattr will; times of the primary's clock
// are guessed.
func foresee(a *fsop.Attr, s *fsop.Setattr, now int64) {
	if s.Valid&fsop.SetUID != 0 {
		a.UID = s.UID
	}
	if s.Valid&fsop.SetGID != 0 {
		a.GID = s.GID
	}
	if s.Valid&(fsop.SetUID|fsop.SetGID|fsop.SetKillPriv) != 0 {
		a.Mode = killed(a.Mode)
	}
	if s.Valid&fsop.SetKillSGID != 0 {
		a.Mode &^= syscall.S_ISGID
	}
	if s.Valid&fsop.SetMode != 0 {
		a.Mode = a.Type() | s.Mode&0o7777
	}
	if s.Valid&fsop.SetAtime != 0 {
		a.Atime = s.Atime
	}
	if s.Valid&fsop.SetMtime != 0 {
		a.Mtime = s.Mtime
	}
	if s.Valid&fsop.SetAtimeNow != 0 {
		a.Atime = now
	}
	if s.Valid&fsop.SetMtimeNow != 0 {
		a.Mtime = now
	}
	a.Ctime = now
}

// killed is a mode without what a change of contents or owner takes away.
func killed(mode uint32) uint32 {
	mode &^= syscall.S_ISUID
	if mode&syscall.S_IXGRP != 0 {
		mode &^= syscall.S_ISGID
	}
	return mode
}
