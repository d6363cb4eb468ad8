package brick

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/disk"
	"mortar/internal/fsop"
	"mortar/internal/oplog"
)

// OfflineOptions say which brick to look at, and how.
type OfflineOptions struct {
	FS  disk.FS
	Dir string
	// Salvage shows what can be shown of a brick that is damaged, instead of
	// refusing it: see Offline.Notes for what is missing.
	Salvage bool
	Log     *slog.Logger // nil: none
}

// Offline is a brick without a daemon, a pool or a network: a directory, opened
// to look at what is in it. Nothing in the directory is changed, so it can be
// on a disk that is mounted read-only.
//
// The brick's state is computed as after a crash, from the KV and the log, in
// memory (disk.Overlay). It is the state at the end of the log: changes that
// were made here but never acknowledged to anybody may be among them.
type Offline struct {
	b     *Brick
	over  *disk.Overlay
	lock  io.Closer
	notes []string
}

// OpenOffline opens a brick to look at it. The caller closes it. A brick that a
// daemon serves is refused.
func OpenOffline(o OfflineOptions) (*Offline, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if _, err := readIdentity(o.FS, o.Dir); err != nil {
		return nil, err
	}
	off := &Offline{over: disk.NewOverlay(o.FS)}
	if err := off.lockOut(o); err != nil {
		off.Close()
		return nil, err
	}
	if err := off.open(o); err != nil {
		off.Close()
		return nil, err
	}
	return off, nil
}

// lockOut keeps a daemon from starting to serve the brick, as far as the file
// system lets.
func (off *Offline) lockOut(o OfflineOptions) error {
	lock, err := o.FS.Lock(o.FS.PathJoin(o.Dir, homeName, lockName))
	switch {
	case err == nil:
		off.lock = lock
	case errors.Is(err, syscall.EROFS), errors.Is(err, fs.ErrPermission):
		off.note("the brick could not be locked (%v): make sure that no daemon serves it", err)
	default:
		return fmt.Errorf("brick %s is in use: stop the daemon that serves it first: %w", o.Dir, err)
	}
	return nil
}

func (off *Offline) note(format string, args ...any) {
	off.notes = append(off.notes, fmt.Sprintf(format, args...))
}

// Notes tells what whoever looks at the brick must know about what they see:
// that it is being healed, say, or which changes could not be read.
func (off *Offline) Notes() []string { return off.notes }

func (off *Offline) open(o OfflineOptions) error {
	opts := Options{
		FS: off.over, Dir: o.Dir, Log: o.Log, still: true,
		// A flush in here is memory taken; nothing is settled.
		MemTable: 32 << 20, Backlog: 1 << 60, SettleAfter: time.Duration(1<<63 - 1),
	}
	for {
		err := off.try(opts)
		if err == nil || !o.Salvage || !off.operate(o, err) {
			return err
		}
	}
}

// try opens the brick and replays its log.
func (off *Offline) try(opts Options) error {
	b, err := Open(opts)
	if err != nil {
		return err
	}
	// Settling removes what is not needed any more, which here is not wanted.
	b.interrupt.Add(1)
	b.settling.Lock()
	b.settling.Unlock() //nolint:staticcheck // the cycle that may be running has ended
	off.b = b
	if !b.Whole() {
		off.note("the brick is being compared with another one, or must be: it has parts of different times")
		return nil
	}
	if err := b.Rewind(b.Tail()); err != nil {
		off.b = nil
		b.Close(false)
		return err
	}
	return nil
}

// operate removes from the overlay what keeps the brick from being opened, and
// reports whether it found something to remove.
func (off *Offline) operate(o OfflineOptions, cause error) bool {
	logDir := o.FS.PathJoin(o.Dir, homeName, logName)
	var bad *oplog.ErrCorrupt
	if errors.As(cause, &bad) {
		if err := off.cutLog(logDir, bad); err != nil {
			return false
		}
		off.note("%v; the changes from there on are not shown", bad)
		return true
	}
	// If the log goes back to the beginning the metadata can be made again.
	metaDir := o.FS.PathJoin(o.Dir, homeName, metaName)
	if names, err := off.over.List(metaDir); err != nil || len(names) == 0 {
		return false // that was tried already
	}
	l, err := oplog.Open(oplog.Options{FS: off.over, Dir: logDir, ReadOnly: true})
	if err != nil {
		return false
	}
	base := l.Base()
	l.Close()
	if base != (cluster.Pos{}) {
		return false
	}
	if err := off.over.RemoveAll(metaDir); err != nil {
		return false
	}
	off.note("the metadata cannot be used (%v) and are made again from the log", cause)
	return true
}

// cutLog ends the log before the damage.
func (off *Offline) cutLog(dir string, bad *oplog.ErrCorrupt) error {
	names, err := off.over.List(dir)
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, name := range names {
		if !strings.HasSuffix(name, ".log") || name < path.Base(bad.File) {
			continue
		}
		if name == path.Base(bad.File) && bad.Offset > 0 {
			f, err := off.over.OpenFile(off.over.PathJoin(dir, name), 2)
			if err != nil {
				return err
			}
			err = f.Truncate(bad.Offset)
			f.Close()
			if err != nil {
				return err
			}
			continue
		}
		if err := off.over.Remove(off.over.PathJoin(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// Close forgets everything.
func (off *Offline) Close() error {
	var err error
	if off.b != nil {
		off.b.interrupt.Add(-1)
		err = off.b.Close(false)
	}
	off.over.Close()
	if off.lock != nil {
		if lerr := off.lock.Close(); err == nil {
			err = lerr
		}
	}
	return err
}

// Identity returns what the brick is part of.
func (off *Offline) Identity() Identity { return off.b.Identity() }

// Pos returns the position of the state that is shown.
func (off *Offline) Pos() cluster.Pos { return off.b.Applied() }

// read is Brick.Read for a brick that may be damaged: an error concerns what was
// asked for, and not the brick.
func (off *Offline) read(op fsop.Op) (*fsop.Reply, error) {
	r, _, err := off.b.read(context.Background(), op)
	return r, err
}

// Object is a file, directory or anything else that has a name.
type Object struct {
	Path   string // from the volume's root, which is "/"
	Attr   fsop.Attr
	Target string // of a symbolic link
}

// Stat finds an object. Symbolic links are not followed, on the way neither. The
// error wraps fs.ErrNotExist if there is none.
func (off *Offline) Stat(name string) (Object, error) {
	o := Object{Path: path.Clean("/" + name)}
	ino := fsop.RootIno
	r, err := off.read(&fsop.Getattr{Ino: ino})
	for _, e := range strings.Split(o.Path[1:], "/") {
		if err != nil {
			break
		}
		if e != "" {
			r, err = off.read(&fsop.Lookup{Parent: ino, Name: e})
		}
		if err == nil {
			ino = r.Attr.Ino
		}
	}
	if err != nil {
		return o, pathErr(o.Path, err)
	}
	o.Attr = r.Attr
	return o, off.target(&o)
}

// pathErr names the object that an error is about.
func pathErr(name string, err error) error {
	var errno fsop.Errno
	if errors.As(err, &errno) {
		err = syscall.Errno(errno) // which package os knows
	}
	return &fs.PathError{Op: "brick", Path: name, Err: err}
}

func (off *Offline) target(o *Object) error {
	if o.Attr.Type() != syscall.S_IFLNK {
		return nil
	}
	r, err := off.read(&fsop.Readlink{Ino: o.Attr.Ino})
	if err != nil {
		return pathErr(o.Path, err)
	}
	o.Target = string(r.Data)
	return nil
}

// List calls fn for the entries of a directory in the order of their names, or
// for the object itself if it is none.
func (off *Offline) List(ctx context.Context, name string, fn func(Object) error) error {
	o, err := off.Stat(name)
	if err != nil {
		return err
	}
	if !o.Attr.IsDir() {
		return fn(o)
	}
	entries, err := off.entries(ctx, o.Attr.Ino)
	if err != nil {
		return pathErr(o.Path, err)
	}
	for i := range entries {
		e := Object{Path: path.Join(o.Path, entries[i].Name), Attr: entries[i].Attr}
		if e.Attr.Ino == 0 {
			e.Attr = fsop.Attr{Ino: entries[i].Ino, Mode: entries[i].Type} // all that is known
		} else if err := off.target(&e); err != nil {
			return err
		}
		if err := fn(e); err != nil {
			return err
		}
	}
	return nil
}

// entries returns a directory, sorted by name. An entry whose inode cannot be
// read is there without attributes.
func (off *Offline) entries(ctx context.Context, dir fsop.Ino) (all []fsop.Dirent, err error) {
	for cookie := uint64(0); ; {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		r, err := off.read(&fsop.Readdir{Ino: dir, Cookie: cookie, Max: fsop.MaxData, Plus: true})
		if err != nil { // because of one of the inodes, perhaps
			if r, err = off.read(&fsop.Readdir{Ino: dir, Cookie: cookie, Max: fsop.MaxData}); err != nil {
				return nil, err
			}
			for i := range r.Entries {
				if a, err := off.read(&fsop.Getattr{Ino: r.Entries[i].Ino}); err == nil {
					r.Entries[i].Attr = a.Attr
				}
			}
		}
		if len(r.Entries) == 0 {
			slices.SortFunc(all, func(a, b fsop.Dirent) int { return strings.Compare(a.Name, b.Name) })
			return all, nil
		}
		all = append(all, r.Entries...)
		cookie = r.Entries[len(r.Entries)-1].Cookie
	}
}

// Cat writes the contents of a regular file to w.
func (off *Offline) Cat(ctx context.Context, name string, w io.Writer) error {
	o, err := off.Stat(name)
	if err != nil {
		return err
	}
	if !o.Attr.IsRegular() {
		return pathErr(o.Path, fmt.Errorf("not a regular file: %w", syscall.EINVAL))
	}
	for at := uint64(0); at < o.Attr.Size; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		r, err := off.read(&fsop.Read{Ino: o.Attr.Ino, Off: at, Len: fsop.MaxData})
		if err != nil {
			return pathErr(o.Path, fmt.Errorf("at offset %d: %w", at, err))
		}
		if len(r.Data) == 0 {
			return pathErr(o.Path, fmt.Errorf("ends at %d of %d bytes: %w", at, o.Attr.Size, io.ErrUnexpectedEOF))
		}
		if _, err := w.Write(r.Data); err != nil {
			return err
		}
		at += uint64(len(r.Data))
	}
	return nil
}

// dataRanges calls fn for the ranges of a file that are not holes.
func (off *Offline) dataRanges(a *fsop.Attr, fn func(from, to uint64) error) error {
	for at := uint64(0); at < a.Size; {
		r, err := off.read(&fsop.Seek{Ino: a.Ino, Off: at, Whence: seekData})
		if errors.Is(err, fsop.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		from := r.Off
		if r, err = off.read(&fsop.Seek{Ino: a.Ino, Off: from, Whence: seekHole}); err != nil {
			return err
		}
		if err := fn(from, r.Off); err != nil {
			return err
		}
		at = r.Off
	}
	return nil
}
