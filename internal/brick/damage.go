package brick

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"strings"
	"time"

	"mortar/internal/brick/data"
	"mortar/internal/brick/meta"
	"mortar/internal/disk"
	"mortar/internal/fsop"
	"mortar/internal/oplog"
)

// What a brick finds damaged on its own disk it neither believes nor repairs: it
// ends its service with an error that wraps ErrDamaged, and is made equal to its
// peers again (doc/decisions/0018). A disk that is full or returns errors is
// something else.
var (
	// ErrDamaged says that files of the brick are not what was once written
	// durably: the log or the KV, unless it is an ErrDamagedFile. Renew makes the
	// brick fit to be healed.
	ErrDamaged = errors.New("the brick is damaged")
	// ErrDamagedFile says that a data file is missing or too short. The brick has
	// noted which one: opened again, it is not whole, and Heal copies the file.
	ErrDamagedFile = errors.New("a data file is damaged")
)

// damagedFile is an ErrDamagedFile, and so an ErrDamaged.
type damagedFile struct {
	ino  fsop.Ino
	path string
	why  string
}

func (e *damagedFile) Error() string {
	return fmt.Sprintf("data file %s of inode %d is damaged: %s", e.path, e.ino, e.why)
}

func (e *damagedFile) Is(target error) bool { return target == ErrDamaged || target == ErrDamagedFile }

// missingFile is the error of a data file that should be there. err is returned
// as it is if it says something else.
func (b *Brick) missingFile(name data.Name, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return &damagedFile{name.Ino, b.data.Path(name), "it is missing"}
	}
	return err
}

// shortFile is the error of a data file that ends before something that the KV
// says it has.
func (b *Brick) shortFile(name data.Name, f disk.File, want uint64) error {
	has := "less"
	if st, err := f.Stat(); err == nil {
		has = fmt.Sprint(st.Size())
	}
	return &damagedFile{name.Ino, b.data.Path(name), fmt.Sprintf("it has %s of at least %d bytes", has, want)}
}

// required is how long the data file of base must be if exts, in the order of
// their offsets, are read from elsewhere. What settling has begun and a crash
// undone may have cut the file where an extent says that there is nothing.
func required(base *meta.Base, exts iter.Seq[meta.Extent]) uint64 {
	end := uint64(0) // of what the extents seen so far leave
	at := uint64(0)
	for e := range exts {
		if e.Off >= base.Len {
			break
		}
		if e.Off > at {
			end = e.Off
		}
		at = max(at, e.End())
	}
	if at < base.Len {
		return base.Len
	}
	return end
}

// damage has err wrap ErrDamaged if it says that the log or the KV is.
func damage(err error) error {
	var log *oplog.ErrCorrupt
	if err == nil || errors.Is(err, ErrDamaged) || !errors.As(err, &log) && !meta.Damaged(err) {
		return err
	}
	return &damaged{err}
}

// damaged is an ErrDamaged in one line.
type damaged struct{ error }

func (e *damaged) Error() string {
	text := strings.ReplaceAll(e.error.Error(), "\n<corruption detail carrier>", "")
	return fmt.Sprintf("%v: %s", ErrDamaged, strings.ReplaceAll(text, "\n", " "))
}

func (e *damaged) Unwrap() []error { return []error{ErrDamaged, e.error} }

// logCut is the error of an extent whose bytes the log does not have; err as it
// is if it says something else.
func logCut(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, fs.ErrNotExist) {
		return &damaged{err}
	}
	return err
}

// markTime is how long a brick that is about to fail may take to note why.
const markTime = 5 * time.Second

// alone reports whether nobody can help this brick.
func (b *Brick) alone() bool { return b.opts.Alone != nil && b.opts.Alone() }

// sayDamaged is how often it is said that a data file is damaged.
const sayDamaged = time.Minute

// lost reports whether err is about a data file that no other brick has either:
// then only that file cannot be read. Neither b.wmu nor b.mu is held.
func (b *Brick) lost(err error) bool {
	if !errors.Is(err, ErrDamagedFile) || !b.alone() {
		return false
	}
	if now := time.Now().UnixNano(); now >= b.said.Load()+int64(sayDamaged) {
		b.said.Store(now)
		b.clog.Error("a file cannot be read, and no other brick has it", "err", err)
	}
	return true
}

// failWith is fail. If the error is about a data file that another brick has, it
// is first noted durably which one. Neither b.wmu nor b.mu is held.
func (b *Brick) failWith(err error) error {
	var file *damagedFile
	if errors.As(err, &file) && b.Err() == nil && !b.alone() {
		if merr := b.doubt(file.ino); merr != nil {
			err = fmt.Errorf("%w; and it could not be noted: %w", err, merr)
		}
	}
	return b.fail(err)
}

// doubt notes durably that the contents of a file are unknown.
func (b *Brick) doubt(ino fsop.Ino) error {
	b.wmu.Lock()
	defer b.wmu.Unlock()
	if b.closed.Load() {
		return ErrClosed
	}
	// The mark comes first: if that is all that gets done, a comparison finds the
	// file again when it is read.
	if err := b.distrust(); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed.Load() {
		return ErrClosed
	}
	batch := b.store.NewBatch()
	defer batch.Close()
	batch.SetDoubt(ino)
	if err := b.store.Commit(batch); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), markTime)
	defer cancel()
	return b.store.Flush(ctx)
}

// Renew empties a brick that is not open and whose log or KV is damaged. It stays
// the brick that it is, and is opened empty and not whole: a Heal makes it equal
// to another one. What it had is lost.
func Renew(o Options) error {
	o.defaults()
	id, err := readIdentity(o.FS, o.Dir)
	if err != nil {
		return err
	}
	if err := id.check(o.Identity, o.Dir); err != nil {
		return err
	}
	home := o.FS.PathJoin(o.Dir, homeName)
	path := func(name string) string { return o.FS.PathJoin(home, name) }
	lock, err := o.FS.Lock(path(lockName))
	if err != nil {
		return fmt.Errorf("brick %s is in use: %w", o.Dir, err)
	}
	defer lock.Close()
	// From here on it is trusted no more, wherever this ends.
	if err := writeHealing(o.FS, path(healingName)); err != nil {
		return fmt.Errorf("renewing brick %s: %w", o.Dir, err)
	}
	if err := o.FS.Remove(path(cleanName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("renewing brick %s: %w", o.Dir, err)
	}
	// The promise stays, unless nobody can tell what it was. A brick that is not whole leads
	// nothing, and the set has gone on in an epoch without it before this is called.
	if raw, err := disk.ReadFile(o.FS, path(epochName), 64); !errors.Is(err, fs.ErrNotExist) {
		if _, ok := decodePromise(string(raw)); err == nil && !ok {
			err = o.FS.Remove(path(epochName))
		}
		if err != nil {
			return fmt.Errorf("renewing brick %s: %w", o.Dir, err)
		}
	}
	for _, name := range []string{logName, metaName, dataName} {
		if err := o.FS.RemoveAll(path(name)); err != nil {
			return fmt.Errorf("renewing brick %s: %w", o.Dir, err)
		}
	}
	for _, name := range []string{logName, metaName, dataName} {
		if err := o.FS.MkdirAll(path(name), 0o700); err != nil {
			return fmt.Errorf("renewing brick %s: %w", o.Dir, err)
		}
	}
	if err := o.FS.SyncDir(home); err != nil {
		return fmt.Errorf("renewing brick %s: %w", o.Dir, err)
	}
	return nil
}

// writeHealing makes the mark of a brick that is not whole, durably.
func writeHealing(fsys disk.FS, name string) error {
	return disk.WriteFile(fsys, name, []byte("compare with another brick\n"))
}
