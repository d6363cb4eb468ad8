package brick

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"syscall"

	"mortar/internal/brick/meta"
	"mortar/internal/fsop"
)

// A subvolume is a directory with limits and an account (doc/subvolumes.md). All of
// it is replicated state like any other: which subvolume an inode is in is written
// in the inode when it is made, from the directory it is made in, or when that becomes one, and then never changes;
// what is used is changed in the batch of the entry that uses it. So the account
// is that of the position, after a crash, an undo or a comparison too.

// usage is what an entry adds to the account of a subvolume, or takes from it.
type usage struct {
	subvol        fsop.Ino
	bytes, inodes int64
}

// subvolWork is a subvolume that the entry changes.
type subvolWork struct {
	meta.Subvolume
	dirty bool
}

// charge counts bytes and inodes for the subvolume of n.
func (x *exec) charge(n *node, bytes, inodes int64) {
	if n.Subvolume != 0 && (bytes != 0 || inodes != 0) {
		x.usage = append(x.usage, usage{n.Subvolume, bytes, inodes})
	}
}

// xattrSize is what an extended attribute counts.
func xattrSize(name string, value []byte) int64 { return int64(len(name) + len(value)) }

// chargeXattr counts that an attribute of n, which it has if had, gets another
// value; gone: it goes.
func (x *exec) chargeXattr(n *work, name string, had bool, value []byte, gone bool) error {
	if n.Subvolume == 0 {
		return nil
	}
	var size int64
	if !gone {
		size = xattrSize(name, value)
	}
	if had {
		old, ok, err := x.b.store.Xattr(n.Ino, name)
		if err != nil {
			return err
		}
		if !ok {
			return fmt.Errorf("%w: %s of inode %d is missing", meta.ErrFormat, name, n.Ino)
		}
		size -= xattrSize(name, old)
	}
	x.charge(&n.node, size, 0)
	return nil
}

// subvol returns a subvolume to read or to change, nil if ino is not the top of one.
func (x *exec) subvol(ino fsop.Ino) *subvolWork {
	for _, w := range x.subvols {
		if w.Ino == ino {
			return w
		}
	}
	s := x.b.subvols[ino]
	if s == nil {
		return nil
	}
	w := &subvolWork{Subvolume: *s}
	x.subvols = append(x.subvols, w)
	return w
}

// account adds up what the entry uses, and plans to write it down. EDQUOT if it is
// more than a limit allows; what gives back is never refused.
func (x *exec) account() error {
	if x.fault != nil {
		return x.fault
	}
	var sums []usage
	for _, u := range x.usage {
		i := slices.IndexFunc(sums, func(s usage) bool { return s.subvol == u.subvol })
		if i < 0 {
			sums, i = append(sums, usage{subvol: u.subvol}), len(sums)
		}
		sums[i].bytes += u.bytes
		sums[i].inodes += u.inodes
	}
	for _, u := range sums {
		if u.bytes == 0 && u.inodes == 0 {
			continue
		}
		w := x.subvol(u.subvol)
		if w == nil {
			return fmt.Errorf("%w: there are inodes of subvolume %d, which does not exist", meta.ErrFormat, u.subvol)
		}
		size, inodes := int64(w.UsedSize)+u.bytes, int64(w.UsedInodes)+u.inodes
		switch {
		case size < 0 || inodes < 0:
			return fmt.Errorf("%w: subvolume %d would use %d bytes and %d inodes", meta.ErrFormat, u.subvol, size, inodes)
		case u.bytes > 0 && w.Size > 0 && uint64(size) > w.Size, u.inodes > 0 && w.Inodes > 0 && uint64(inodes) > w.Inodes:
			return fsop.EDQUOT
		}
		w.UsedSize, w.UsedInodes, w.Used, w.dirty = uint64(size), uint64(inodes), x.e.Time, true
	}
	for _, w := range x.subvols {
		s := w.Subvolume
		switch {
		case !w.dirty:
		case s.UsedInodes == 0: // the last of it went
			x.batch.DeleteSubvolume(s.Ino)
			x.onCommit(func(b *Brick) { delete(b.subvols, s.Ino) })
		default:
			x.batch.SetSubvolume(&s)
			x.onCommit(func(b *Brick) { b.subvols[s.Ino] = &s })
		}
	}
	return nil
}

// isTop reports whether n is the top directory of a subvolume.
func (n *work) isTop() bool { return n.Subvolume == n.Ino }

// used reports whether a session uses a subvolume.
func (b *Brick) used(ino fsop.Ino) bool {
	for _, s := range b.sessions {
		if _, uses := slices.BinarySearch(s.Uses, ino); uses && !s.Away {
			return true
		}
	}
	return false
}

// mayGo says whether the name of n may be taken away: EBUSY for a subvolume that
// somebody uses.
func (x *exec) mayGo(n *work) error {
	if n.isTop() && x.b.used(n.Ino) {
		return fsop.EBUSY
	}
	return nil
}

// use executes Use.
func (x *exec) use(op *fsop.Use) error {
	n, err := x.node(op.Ino)
	if err != nil {
		return err
	}
	x.reply.Attr = n.Attr
	s := x.b.sessions[x.e.Session]
	if s == nil {
		return fsop.EINVAL
	}
	w := x.subvol(n.Subvolume)
	if w == nil {
		return nil
	}
	now := s.Session
	i, uses := slices.BinarySearch(now.Uses, w.Ino)
	switch {
	case uses != op.Done:
		return nil
	case op.Done:
		now.Uses = slices.Delete(slices.Clone(now.Uses), i, i+1)
	case w.Removed:
		return fsop.ENOENT
	case len(now.Uses) >= fsop.MaxUses:
		return fsop.EMFILE
	default:
		now.Uses = slices.Insert(slices.Clone(now.Uses), i, w.Ino)
	}
	w.Used, w.dirty = x.e.Time, true
	x.setSession(s, now)
	return nil
}

// noteUses notes that a session which goes used its subvolumes until now.
func (x *exec) noteUses(s *session) {
	for _, ino := range s.Uses {
		if w := x.subvol(ino); w != nil {
			w.Used, w.dirty = x.e.Time, true
		}
	}
}

// makeSubvolume executes MakeSubvolume.
func (x *exec) makeSubvolume(op *fsop.MakeSubvolume) error {
	dir, err := x.dir(op.Parent)
	if err != nil {
		return err
	}
	if dir.Subvolume != 0 {
		return fsop.EINVAL
	}
	if err := fsop.CheckName(op.Name); err != nil {
		return err
	}
	if d, ok, err := x.lookup(dir.Ino, op.Name); err != nil {
		return err
	} else if w := x.subvol(d.Ino); ok && w != nil && op.Token != 0 && w.Token == op.Token {
		n, err := x.node(d.Ino)
		if err != nil {
			return err
		}
		x.reply.Attr = n.Attr
		return nil
	}
	ino := x.nextIno()
	x.subvols = append(x.subvols, &subvolWork{Subvolume: meta.Subvolume{
		Ino: ino, Size: op.Size, Inodes: op.Inodes, Made: x.e.Time, Used: x.e.Time, Token: op.Token,
	}, dirty: true})
	_, err = x.makeNodeIn(&op.Node, syscall.S_IFDIR|op.Mode&permMask, ino, ino)
	return err
}

// limitSubvolume executes LimitSubvolume.
func (x *exec) limitSubvolume(op *fsop.LimitSubvolume) error {
	n, err := x.node(op.Ino)
	if err != nil {
		return err
	}
	w := x.subvol(op.Ino)
	switch {
	case w != nil:
	case op.Valid&fsop.LimitAdopt == 0 || n.Subvolume != 0 || n.Ino == fsop.RootIno:
		return fsop.EINVAL
	case !n.IsDir():
		return fsop.ENOTDIR
	case n.Nlink == 0:
		return fsop.ENOENT
	default:
		w = &subvolWork{Subvolume: meta.Subvolume{Ino: n.Ino, Made: x.e.Time, Used: x.e.Time}, dirty: true}
		if err := x.adopt(n, &w.Subvolume); err != nil {
			return err
		}
		x.subvols = append(x.subvols, w)
		x.touch(n)
	}
	if op.Valid&fsop.LimitSize != 0 && w.Size != op.Size {
		w.Size, w.dirty = op.Size, true
	}
	if op.Valid&fsop.LimitInodes != 0 && w.Inodes != op.Inodes {
		w.Inodes, w.dirty = op.Inodes, true
	}
	x.changed = x.changed || w.dirty
	x.reply.Attr = n.Attr
	return nil
}

// adopt puts a directory and everything in it into a subvolume, and counts it. Limits say nothing
// of what is there already. Nothing is changed that a client sees, but for the directory itself.
func (x *exec) adopt(top *work, s *meta.Subvolume) error {
	count := func(n *work) error {
		n.Subvolume, n.dirty = s.Ino, true
		s.UsedInodes++
		s.UsedSize += n.Blocks * sectorSize
		if n.Xattrs == 0 {
			return nil
		}
		return x.b.store.Xattrs(n.Ino, func(name string, v []byte) error {
			s.UsedSize += uint64(xattrSize(name, v))
			return nil
		})
	}
	if err := count(top); err != nil {
		return err
	}
	names := map[fsop.Ino]uint32{} // how many of each are in it
	nested := false
	all := []*work{top}
	for at := 0; at < len(all); at++ {
		if !all[at].IsDir() {
			continue
		}
		err := x.b.store.Dentries(all[at].Ino, 0, func(d meta.Dentry) (bool, error) {
			if names[d.Ino]++; names[d.Ino] > 1 {
				return true, nil
			}
			n, err := x.b.load(d.Ino)
			switch {
			case err != nil:
				return false, err
			case n == nil:
				return false, fmt.Errorf("%w: directory %d has %s, which is inode %d, which does not exist", meta.ErrFormat, all[at].Ino, d.Name, d.Ino)
			case n.Subvolume != 0:
				nested = true
				return true, nil
			case len(all) == fsop.AdoptMost:
				return false, fsop.E2BIG
			}
			c := &work{node: *n}
			all = append(all, c)
			return true, count(c)
		})
		if err != nil {
			return err
		}
	}
	if nested {
		return fsop.EINVAL
	}
	for _, n := range all[1:] {
		if !n.IsDir() && n.Nlink != names[n.Ino] {
			return fsop.EXDEV
		}
	}
	x.nodes = append(x.nodes, all[1:]...)
	return nil
}

// removeSubvolume executes RemoveSubvolume.
func (x *exec) removeSubvolume(op *fsop.RemoveSubvolume) error {
	w := x.subvol(op.Ino)
	if w == nil || w.Removed {
		return nil
	}
	dir, n, err := x.victim(op.Parent, op.Name)
	if err != nil {
		return err
	}
	if n.Ino != op.Ino {
		return fsop.ENOENT
	}
	if !op.Force {
		if err := x.mayGo(n); err != nil {
			return err
		}
	}
	x.dropEntry(dir, op.Name)
	dir.Nlink--
	n.Parent, n.Ctime = 0, x.e.Time
	x.touch(n)
	w.Removed, w.Used, w.dirty = true, x.e.Time, true
	if n.Size == 0 {
		x.dropLink(n)
	}
	x.reply.Attr = n.Attr
	return nil
}

// sweep executes Sweep. Everything is removed as unlink and rmdir would: files
// that somebody holds stay until they are let go.
func (x *exec) sweep(op *fsop.Sweep) error {
	w := x.subvol(op.Ino)
	if w == nil || !w.Removed {
		return nil
	}
	n, err := x.node(op.Ino)
	switch {
	case errors.Is(err, fsop.ESTALE):
		return nil // only orphans are left
	case err != nil:
		return err
	case n.Nlink == 0:
		return nil
	}
	left := fsop.SweepMost
	if err := x.empty(n, &left); err != nil {
		return err
	}
	if n.Size == 0 {
		x.dropLink(n)
	}
	return nil
}

// errEnough ends a scan.
var errEnough = errors.New("enough")

// empty removes at most left of the names below dir. The store is as it was
// before the entry, and no name is come across twice.
func (x *exec) empty(dir *work, left *int) error {
	err := x.b.store.Dentries(dir.Ino, 0, func(d meta.Dentry) (bool, error) {
		n, err := x.node(d.Ino)
		if err != nil {
			return false, err
		}
		if n.IsDir() && n.Size > 0 {
			if err := x.empty(n, left); err != nil {
				return false, err
			}
			if n.Size > 0 {
				return false, errEnough
			}
		}
		if *left == 0 {
			return false, errEnough
		}
		*left--
		x.dropEntry(dir, d.Name)
		if n.IsDir() {
			dir.Nlink--
		}
		x.dropLink(n)
		return true, nil
	})
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

// Swept returns the removed subvolumes that still have names to be swept, at most limit.
func (b *Brick) Swept(limit int) (inos []fsop.Ino) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	for ino, s := range b.subvols {
		if !s.Removed || len(inos) == limit {
			continue
		}
		if n, err := b.load(ino); err == nil && n != nil && n.Nlink > 0 {
			inos = append(inos, ino)
		}
	}
	return inos
}

// SubvolumeInfo is a subvolume as it is at this moment.
type SubvolumeInfo struct {
	meta.Subvolume
	Path  string // in the volume, without a slash in front
	Attr  fsop.Attr
	Users []SessionInfo
}

// Subvolumes returns the subvolumes that have a name, by path. With ino it is that one alone.
func (b *Brick) Subvolumes(ino fsop.Ino) ([]SubvolumeInfo, error) {
	if err := b.Err(); err != nil {
		return nil, err
	}
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.closed.Load() {
		return nil, ErrClosed
	}
	users := map[fsop.Ino][]SessionInfo{}
	for _, s := range b.sessions {
		for _, u := range s.Uses {
			if !s.Away {
				users[u] = append(users[u], s.info())
			}
		}
	}
	names := paths{b: b, names: map[fsop.Ino]map[fsop.Ino]string{}}
	var all []SubvolumeInfo
	for _, s := range b.subvols {
		if s.Removed || ino != 0 && s.Ino != ino {
			continue
		}
		n, err := b.load(s.Ino)
		if err != nil {
			return nil, err
		}
		if n == nil || n.Nlink == 0 {
			continue
		}
		p, err := names.path(n)
		if err != nil {
			return nil, err
		}
		us := users[s.Ino]
		slices.SortFunc(us, func(a, b SessionInfo) int { return cmp.Compare(a.ID, b.ID) })
		all = append(all, SubvolumeInfo{Subvolume: *s, Path: p, Attr: b.attr(n), Users: us})
	}
	slices.SortFunc(all, func(a, b SubvolumeInfo) int { return cmp.Compare(a.Path, b.Path) })
	return all, nil
}

// paths finds the paths of directories. It lists every directory above them once.
type paths struct {
	b     *Brick
	names map[fsop.Ino]map[fsop.Ino]string // of the directories in a directory
}

func (t *paths) path(n *node) (string, error) {
	path := ""
	for range maxDepth {
		if n.Ino == fsop.RootIno {
			return path, nil
		}
		in := t.names[n.Parent]
		if in == nil {
			in = map[fsop.Ino]string{}
			if err := t.b.store.Dentries(n.Parent, 0, func(d meta.Dentry) (bool, error) {
				if d.Type == syscall.S_IFDIR {
					in[d.Ino] = d.Name
				}
				return true, nil
			}); err != nil {
				return "", err
			}
			t.names[n.Parent] = in
		}
		name, ok := in[n.Ino]
		if !ok {
			return "", fmt.Errorf("%w: directory %d has no name in directory %d", meta.ErrFormat, n.Ino, n.Parent)
		}
		if path != "" {
			name += "/" + path
		}
		path = name
		parent, err := t.b.load(n.Parent)
		if err != nil {
			return "", err
		}
		if parent == nil {
			return "", fmt.Errorf("%w: directory %d lies in %d, which does not exist", meta.ErrFormat, n.Ino, n.Parent)
		}
		n = parent
	}
	return "", fmt.Errorf("%w: directory %d does not lie below the root", meta.ErrFormat, n.Ino)
}

// narrow makes of what the disk has what the subvolume of ino may have. b.mu is held.
func (b *Brick) narrow(ino fsop.Ino, st *fsop.Statfs) error {
	n, err := b.inode(ino)
	if errors.Is(err, fsop.ESTALE) {
		return nil // what it is asked through is gone; the disk is not
	}
	if err != nil {
		return err
	}
	s := b.subvols[n.Subvolume]
	if s == nil {
		return nil
	}
	if s.Size > 0 {
		st.Total = s.Size
		st.Free = s.Size - min(s.UsedSize, s.Size)
		st.Avail = min(st.Avail, st.Free)
	}
	if s.Inodes > 0 {
		st.Files = s.Inodes
		st.FilesFree = min(st.FilesFree, s.Inodes-min(s.UsedInodes, s.Inodes))
	}
	return nil
}
