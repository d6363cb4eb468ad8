// Package gluster brings the tree of a GlusterFS volume over: from a mount of it, or
// from a brick's directory, with everything that a file has but what GlusterFS keeps of
// its own, and then compares what was read with what was written.
//
// It can be interrupted and begun again: a file gets its name when it is complete, and one
// that is complete is not copied twice. So there is no journal; the target is it.
package gluster

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Config says what to bring where.
type Config struct {
	Source, Target string
	// State is where GlusterFS's daemon of this machine keeps its volumes, see DefaultState.
	State string
	// Progress is told from time to time, in the goroutine that works. It may be nil.
	Progress func(Report)
}

// Report is what has been done so far.
type Report struct {
	Brick    bool      `json:"brick"` // the source is a brick, not a mount
	Verify   bool      `json:"-"`     // it compares now
	Entries  int       `json:"entries"`
	Copied   int       `json:"copied"` // of them; the others were there
	Bytes    int64     `json:"bytes"`  // copied
	Verified int       `json:"verified"`
	Problems []Problem `json:"problems"`
}

// Problem is something that is not in the target as it is in the source.
type Problem struct {
	Path string `json:"path"` // below the source
	What string `json:"what"`
}

// temporary is the name of a file that is not complete.
const temporary = ".mortar-import.tmp"

// job is one import under way.
type job struct {
	Config
	Report
	ctx     context.Context
	begun   time.Time
	links   map[inode]string // first name in the target of what has more names
	flagged map[string]bool  // paths with a problem already: they are not compared
	times   bool             // a brick's files have the times that a mount shows in an attribute
}

type inode struct{ dev, ino uint64 }

// Import copies and compares. The error says why it could not go on; what is wrong
// with single files is in the report.
func Import(ctx context.Context, c Config) (*Report, error) {
	j := &job{Config: c, ctx: ctx, begun: time.Now(), links: make(map[inode]string), flagged: make(map[string]bool)}
	j.Problems = []Problem{}
	if fi, err := os.Stat(c.Source); err != nil {
		return nil, err
	} else if !fi.IsDir() {
		return nil, fmt.Errorf("%s is not a directory: want a brick's or a mount's", c.Source)
	}
	_, err := os.Stat(filepath.Join(c.Source, ".glusterfs"))
	j.Brick = err == nil
	if j.Brick {
		if os.Getuid() != 0 {
			return nil, fmt.Errorf("%s is a brick: only root can read all of it", c.Source)
		}
		v, err := xattrs(c.Source)
		if err != nil {
			return nil, err
		}
		if j.times, err = keepsTimes(c.State, v[volumeID]); err != nil {
			return nil, err
		}
		if v["trusted.ec.version"] != nil {
			return nil, fmt.Errorf("%s is a brick of a dispersed volume: its files are there in parts only; mount the volume, and import the mount", c.Source)
		}
	}
	if fi, err := os.Stat(c.Target); err != nil {
		return nil, err
	} else if !fi.IsDir() {
		return nil, fmt.Errorf("%s is not a directory", c.Target)
	}
	if err := j.copyDir(""); err != nil {
		return &j.Report, err
	}
	if err := flush(c.Target); err != nil {
		return &j.Report, err
	}
	j.Report.Verify = true
	clear(j.links)
	return &j.Report, j.compareDir("")
}

// flush returns when all that was written is on disks. A volume's changes are kept in the
// order in which they were made, so a name that a power cut leaves leads to what was
// written before it got the name, and one flush for all of them is enough.
func flush(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func (j *job) problem(path, format string, args ...any) {
	j.flagged[path] = true
	j.Problems = append(j.Problems, Problem{Path: path, What: fmt.Sprintf(format, args...)})
}

// Own attributes of GlusterFS's, on bricks and mounts.
var own = []string{"trusted.gfid", "trusted.glusterfs.", "trusted.afr.", "trusted.pgfid.", "trusted.gfid2path.", "trusted.bit-rot.", "trusted.ec.",
	"trusted.distribute.", "glusterfs.", "user.glusterfs.", "trusted.SGI_ACL_"}

// kept reports whether an attribute is the user's.
func kept(name string) bool {
	return !slices.ContainsFunc(own, func(o string) bool { return strings.HasPrefix(name, o) })
}

// xattrs reads all attributes of what is at path itself.
func xattrs(path string) (map[string][]byte, error) {
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, list)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	all := make(map[string][]byte)
	for name := range bytes.SplitSeq(bytes.TrimSuffix(list[:n], []byte{0}), []byte{0}) {
		if len(name) == 0 {
			continue
		}
		v := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, string(name), v)
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s of %s: %w", name, path, err)
		}
		all[string(name)] = v[:n]
	}
	return all, nil
}

// entry is a name in the source.
type entry struct {
	path string // below the source
	st   unix.Stat_t
	x    map[string][]byte
}

func (e *entry) kind() uint32 { return e.st.Mode & unix.S_IFMT }

// read looks at a name. ok is false for what is GlusterFS's own.
func (j *job) read(path string) (e *entry, ok bool, err error) {
	e = &entry{path: path}
	at := filepath.Join(j.Source, path)
	if err := unix.Lstat(at, &e.st); err != nil {
		return nil, false, &fs.PathError{Op: "lstat", Path: at, Err: err}
	}
	if e.x, err = xattrs(at); err != nil {
		return nil, false, err
	}
	if m, ok := parseTimes(e.x[timesAttr]); ok && j.times {
		e.st.Mtim, e.st.Atim = m.mtime, m.atime
	}
	// A pointer of distribution's to another brick: only the sticky bit, nothing in it.
	if j.Brick && e.kind() == unix.S_IFREG && e.x["trusted.glusterfs.dht.linkto"] != nil && e.st.Mode&0o7777 == 0o1000 {
		return nil, false, nil
	}
	return e, true, nil
}

// names are the entries of a directory that are looked at.
func (j *job) names(dir string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(j.Source, dir))
	if err != nil {
		return nil, err
	}
	var all []string
	for _, e := range entries {
		n := e.Name()
		if dir == "" && (n == ".trashcan" || j.Brick && (n == ".glusterfs" || strings.HasPrefix(n, ".glusterfs-anonymous-inode"))) {
			continue
		}
		all = append(all, n)
	}
	return all, nil
}

// each visits what is in a directory.
func (j *job) each(dir string, visit func(*entry) error) error {
	names, err := j.names(dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := context.Cause(j.ctx); err != nil {
			return err
		}
		path := filepath.Join(dir, n)
		if dir == "" && n == ".shard" {
			if !j.Report.Verify {
				j.problem(path, "the volume keeps large files in shards: they are incomplete in a brick; mount the volume, and import the mount")
			}
			continue
		}
		e, ok, err := j.read(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			if !j.flagged[path] {
				j.problem(path, "it went while it was read")
			}
			continue
		case err != nil:
			return err
		case !ok:
			continue
		}
		if err := visit(e); err != nil {
			return err
		}
	}
	return nil
}

func (j *job) copyDir(dir string) error {
	e, _, err := j.read(dir)
	if err != nil {
		return err
	}
	to := filepath.Join(j.Target, dir)
	if err := os.Remove(filepath.Join(to, temporary)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err = j.each(dir, func(e *entry) error {
		if j.Progress != nil && j.Entries%64 == 0 {
			j.Progress(j.Report)
		}
		j.Entries++
		to := filepath.Join(j.Target, e.path)
		if e.kind() != unix.S_IFDIR {
			return j.copyEntry(e, to)
		}
		switch err := os.Mkdir(to, 0o700); {
		case err == nil:
			j.Copied++
		case !errors.Is(err, fs.ErrExist):
			return err
		default:
			if fi, err := os.Lstat(to); err != nil {
				return err
			} else if !fi.IsDir() {
				j.problem(e.path, "it is a directory, and something else is in its place")
				return nil
			}
		}
		return j.copyDir(e.path)
	})
	if err != nil {
		return err
	}
	return dress(to, e) // after what is in it, which changes its times
}

// same reports whether what is in the target is, by its attributes, e complete.
func same(a, b *unix.Stat_t) bool {
	return a.Mode == b.Mode && a.Uid == b.Uid && a.Gid == b.Gid && a.Mtim == b.Mtim && (a.Mode&unix.S_IFMT != unix.S_IFREG || a.Size == b.Size) && a.Rdev == b.Rdev
}

func (j *job) copyEntry(e *entry, to string) error {
	if j.Brick && e.x["trusted.glusterfs.shard.file-size"] != nil && e.x["trusted.glusterfs.shard.block-size"] != nil {
		j.problem(e.path, "its contents are in shards: mount the volume, and import the mount")
		return nil
	}
	for name, v := range e.x {
		if j.Brick && strings.HasPrefix(name, "trusted.afr.") && len(bytes.Trim(v, "\x00")) > 0 {
			j.problem(e.path, "another brick has missed changes of it (%s): heal the volume first, or import the mount", name)
			return nil
		}
	}
	id := inode{e.st.Dev, e.st.Ino}
	first, more := j.links[id]
	var st unix.Stat_t
	switch err := unix.Lstat(to, &st); {
	case errors.Is(err, unix.ENOENT):
	case err != nil:
		return &fs.PathError{Op: "lstat", Path: to, Err: err}
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		j.problem(e.path, "a directory is in its place")
		return nil
	case more:
		var f unix.Stat_t
		if err := unix.Lstat(first, &f); err == nil && f.Ino == st.Ino {
			return nil
		}
	case same(&st, &e.st):
		j.links[id] = to
		return nil
	case st.Mtim.Nano() > e.st.Mtim.Nano():
		j.problem(e.path, "the target has a newer one, which was left alone")
		return nil
	}
	tmp := filepath.Join(filepath.Dir(to), temporary)
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err := func() error {
		switch kind := e.kind(); {
		case more:
			return os.Link(first, tmp)
		case kind == unix.S_IFREG:
			return j.copyData(e, tmp)
		case kind == unix.S_IFLNK:
			target, err := os.Readlink(filepath.Join(j.Source, e.path))
			if err != nil {
				return err
			}
			return os.Symlink(target, tmp)
		default:
			return unix.Mknod(tmp, kind|0o600, int(e.st.Rdev))
		}
	}()
	if errors.Is(err, fs.ErrNotExist) {
		j.problem(e.path, "it went while it was read")
		return nil
	}
	if err == nil && !more {
		err = dress(tmp, e)
	}
	if err == nil {
		err = os.Rename(tmp, to)
	}
	if err != nil {
		os.Remove(tmp)
		return fmt.Errorf("%s: %w", e.path, err)
	}
	j.Copied++
	if !more {
		j.links[id] = to
	}
	return nil
}

// copyData copies what a file has in it, holes as holes.
func (j *job) copyData(e *entry, tmp string) error {
	in, err := os.OpenFile(filepath.Join(j.Source, e.path), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	for off := int64(0); off < e.st.Size; {
		begin, err := unix.Seek(int(in.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // nothing but a hole
			break
		}
		end := e.st.Size
		if err != nil { // it cannot tell
			begin = off
		} else if end, err = unix.Seek(int(in.Fd()), begin, unix.SEEK_HOLE); err != nil {
			return err
		}
		n, err := io.Copy(io.NewOffsetWriter(out, begin), io.NewSectionReader(in, begin, end-begin))
		j.Bytes += n
		if err != nil {
			return err
		}
		if n < end-begin {
			break // it became shorter; the comparison tells
		}
		off = end
		if err := context.Cause(j.ctx); err != nil {
			return err
		}
	}
	if err := out.Truncate(e.st.Size); err != nil {
		return err
	}
	return out.Close()
}

// dress gives what is at a path everything but its contents.
func dress(path string, e *entry) error {
	fail := func(what string, err error) error { return fmt.Errorf("%s %s: %w", what, path, err) }
	if err := unix.Lchown(path, int(e.st.Uid), int(e.st.Gid)); err != nil {
		return fail("chown", err)
	}
	if e.kind() != unix.S_IFLNK {
		if err := unix.Chmod(path, e.st.Mode&0o7777); err != nil {
			return fail("chmod", err)
		}
	}
	for name, v := range e.x {
		if !kept(name) {
			continue
		}
		if err := unix.Lsetxattr(path, name, v, 0); err != nil {
			return fail("setxattr "+name, err)
		}
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{e.st.Atim, e.st.Mtim}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fail("utimens", err)
	}
	return nil
}

func (j *job) compareDir(dir string) error {
	e, _, err := j.read(dir)
	if err != nil {
		return err
	}
	err = j.each(dir, func(e *entry) error {
		if j.flagged[e.path] {
			return nil
		}
		if e.kind() == unix.S_IFDIR {
			return j.compareDir(e.path)
		}
		return j.compare(e)
	})
	if err != nil {
		return err
	}
	return j.compare(e)
}

// compare looks at one name on both sides.
func (j *job) compare(e *entry) error {
	if j.Progress != nil && j.Verified%64 == 0 {
		j.Progress(j.Report)
	}
	what, err := j.difference(e)
	if err != nil {
		return err
	}
	if what == "" {
		j.Verified++
		return nil
	}
	// File systems take their times from a clock that ticks some hundred times a second.
	var now unix.Stat_t
	if err := unix.Lstat(filepath.Join(j.Source, e.path), &now); err != nil || now.Ctim.Nano() >= j.begun.Add(-10*time.Millisecond).UnixNano() {
		what += "; the source was changed during the import: import again"
	}
	j.problem(e.path, "%s", what)
	return nil
}

func (j *job) difference(e *entry) (string, error) {
	from, to := filepath.Join(j.Source, e.path), filepath.Join(j.Target, e.path)
	var st unix.Stat_t
	if err := unix.Lstat(to, &st); errors.Is(err, unix.ENOENT) {
		return "it is not in the target", nil
	} else if err != nil {
		return "", &fs.PathError{Op: "lstat", Path: to, Err: err}
	}
	if !same(&st, &e.st) {
		return fmt.Sprintf("mode, owner, size or time differ: %o %d:%d %d %d, want %o %d:%d %d %d", st.Mode, st.Uid, st.Gid, st.Size, st.Mtim.Nano(),
			e.st.Mode, e.st.Uid, e.st.Gid, e.st.Size, e.st.Mtim.Nano()), nil
	}
	x, err := xattrs(to)
	if err != nil {
		return "", err
	}
	for name, v := range e.x {
		if kept(name) && !bytes.Equal(x[name], v) {
			return "its attribute " + name + " differs", nil
		}
	}
	switch e.kind() {
	case unix.S_IFREG:
		id := inode{e.st.Dev, e.st.Ino}
		if first := j.links[id]; first != "" {
			var f unix.Stat_t
			if err := unix.Lstat(first, &f); err != nil || f.Ino != st.Ino {
				return "it is a file of its own in the target, and another name of one in the source", nil
			}
			return "", nil // compared already
		}
		j.links[id] = to
		a, err := sum(j.ctx, from)
		if err != nil {
			return "", err
		}
		b, err := sum(j.ctx, to)
		if err != nil {
			return "", err
		}
		if !bytes.Equal(a, b) {
			return "its contents differ", nil
		}
	case unix.S_IFLNK:
		a, err := os.Readlink(from)
		if err != nil {
			return "", err
		}
		if b, err := os.Readlink(to); err != nil || a != b {
			return "it leads elsewhere", err
		}
	}
	return "", nil
}

func sum(ctx context.Context, path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h := sha256.New()
	for {
		if _, err := io.CopyN(h, f, 16<<20); errors.Is(err, io.EOF) {
			return h.Sum(nil), nil
		} else if err != nil {
			return nil, err
		}
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
	}
}
