package meta

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/cockroachdb/pebble/v2"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
)

// A View reads the store: as it is, or as it was at a Snapshot. An absent
// record is not an error but ok == false.
type View struct{ r pebble.Reader }

// State reads the position and the counters.
func (v View) State() (s State, ok bool, err error) {
	val, c, err := v.get(stateKey)
	if val == nil || err != nil {
		return s, false, err
	}
	defer c.Close()
	return s, true, getState(val, &s)
}

// Inode reads an inode.
func (v View) Inode(ino fsop.Ino, n *Inode) (ok bool, err error) {
	var k [9]byte
	val, c, err := v.get(putKey1(k[:], tableInode, uint64(ino)))
	if val == nil || err != nil {
		return false, err
	}
	defer c.Close()
	return true, getInode(val, ino, n)
}

// Dentry looks a name up.
func (v View) Dentry(dir fsop.Ino, c Cookie, name string) (d Dentry, ok bool, err error) {
	val, cl, err := v.get(dentryKey(dir, c, name))
	if val == nil || err != nil {
		return d, false, err
	}
	defer cl.Close()
	d.Name, d.Cookie = name, c
	return d, true, getDentry(val, &d)
}

// scan calls fn for the keys from lo to below hi, until it returns false.
func (v View) scan(lo, hi []byte, fn func(k, val []byte) (bool, error)) (err error) {
	defer caught(&err)
	it, err := v.r.NewIter(&pebble.IterOptions{LowerBound: lo, UpperBound: hi})
	if err != nil {
		return err
	}
	defer it.Close()
	for ok := it.First(); ok; ok = it.Next() {
		val, err := it.ValueAndErr()
		if err != nil {
			return err
		}
		if more, err := fn(it.Key(), val); err != nil || !more {
			return err
		}
	}
	return it.Error()
}

// Dentries calls fn for the entries of dir in the order of their cookies, from
// the cookie from on, until fn returns false.
func (v View) Dentries(dir fsop.Ino, from Cookie, fn func(Dentry) (bool, error)) error {
	return v.scan(key2(tableDentry, uint64(dir), uint64(from)), after1(tableDentry, uint64(dir)), func(k, val []byte) (bool, error) {
		if len(k) < 18 {
			return false, fmt.Errorf("%w: key %x of a directory entry", ErrFormat, k)
		}
		d := Dentry{Name: string(k[17:]), Cookie: Cookie(binary.BigEndian.Uint64(k[9:]))}
		if err := getDentry(val, &d); err != nil {
			return false, err
		}
		return fn(d)
	})
}

// Inodes calls fn for all inodes from ino on, in order, until it returns false.
func (v View) Inodes(from fsop.Ino, fn func(*Inode) (bool, error)) error {
	return v.scan(key1(tableInode, uint64(from)), []byte{tableInode + 1}, func(k, val []byte) (bool, error) {
		var n Inode
		if err := getInode(val, keyIno(k), &n); err != nil {
			return false, err
		}
		return fn(&n)
	})
}

// InodesOf calls fn for those of the inodes that exist. inos is in ascending
// order. It is faster than Inode for many that were made together.
func (v View) InodesOf(inos []fsop.Ino, fn func(*Inode) error) error {
	if len(inos) == 0 {
		return nil
	}
	it, err := v.r.NewIter(&pebble.IterOptions{
		LowerBound: key1(tableInode, uint64(inos[0])), UpperBound: after1(tableInode, uint64(inos[len(inos)-1])),
	})
	if err != nil {
		return err
	}
	defer it.Close()
	ok := it.First()
	var k [9]byte
	for _, ino := range inos {
		if ok && keyIno(it.Key()) < ino {
			ok = it.Next()
		}
		if ok && keyIno(it.Key()) < ino {
			ok = it.SeekGE(putKey1(k[:], tableInode, uint64(ino)))
		}
		if !ok {
			break
		}
		if keyIno(it.Key()) != ino {
			continue
		}
		var n Inode
		if err := getInode(it.Value(), ino, &n); err != nil {
			return err
		}
		if err := fn(&n); err != nil {
			return err
		}
	}
	return it.Error()
}

func (v View) blob(k []byte, what string) ([]byte, bool, error) {
	val, c, err := v.get(k)
	if val == nil || err != nil {
		return nil, false, err
	}
	defer c.Close()
	if err := check(val, what, -1); err != nil {
		return nil, false, err
	}
	return bytes.Clone(val[1:]), true, nil
}

// Xattr reads an extended attribute.
func (v View) Xattr(ino fsop.Ino, name string) ([]byte, bool, error) {
	return v.blob(xattrKey(ino, name), "extended attribute")
}

// Xattrs calls fn for the extended attributes of ino, in the order of their
// names. The value is valid only during the call.
func (v View) Xattrs(ino fsop.Ino, fn func(name string, value []byte) error) error {
	return v.scan(key1(tableXattr, uint64(ino)), after1(tableXattr, uint64(ino)), func(k, val []byte) (bool, error) {
		if err := check(val, "extended attribute", -1); err != nil {
			return false, err
		}
		return true, fn(string(k[9:]), val[1:])
	})
}

// Target reads a symbolic link.
func (v View) Target(ino fsop.Ino) ([]byte, bool, error) {
	return v.blob(key1(tableTarget, uint64(ino)), "symbolic link")
}

// Runs calls fn for the allocated runs of a sparse file that end behind block
// from, in order, until it returns false.
func (v View) Runs(ino fsop.Ino, from uint64, fn func(Run) (bool, error)) error {
	// The run that began before from may reach over it.
	it, err := v.r.NewIter(&pebble.IterOptions{LowerBound: key1(tableRun, uint64(ino)), UpperBound: after1(tableRun, uint64(ino))})
	if err != nil {
		return err
	}
	defer it.Close()
	k := key2(tableRun, uint64(ino), from)
	ok := it.SeekLT(k)
	if !ok {
		ok = it.SeekGE(k)
	}
	for ; ok; ok = it.Next() {
		var r Run
		if err := getRun(it.Key(), it.Value(), &r); err != nil {
			return err
		}
		if r.End <= from {
			continue
		}
		if more, err := fn(r); err != nil || !more {
			return err
		}
	}
	return it.Error()
}

// Orphans calls fn for the inodes without a name after one, in order, until it returns false.
func (v View) Orphans(after fsop.Ino, fn func(fsop.Ino) (bool, error)) error {
	return v.scan(key1(tableOrphan, uint64(after)+1), []byte{tableOrphan + 1}, func(k, val []byte) (bool, error) {
		if len(k) != 9 {
			return false, fmt.Errorf("%w: key %x", ErrFormat, k)
		}
		if err := check(val, "orphan", 1); err != nil {
			return false, err
		}
		return fn(keyIno(k))
	})
}

func (v View) has(k []byte) (bool, error) {
	val, c, err := v.get(k)
	if val == nil || err != nil {
		return false, err
	}
	return true, c.Close()
}

// Locks calls fn for all locks.
func (v View) Locks(fn func(Lock) error) error {
	return v.scan([]byte{tableLock}, []byte{tableLock + 1}, func(k, val []byte) (bool, error) {
		var l Lock
		if err := getLock(k, val, &l); err != nil {
			return false, err
		}
		return true, fn(l)
	})
}

// Sessions calls fn for all sessions.
func (v View) Sessions(fn func(Session) error) error {
	return v.scan([]byte{tableSession}, []byte{tableSession + 1}, func(k, val []byte) (bool, error) {
		var s Session
		if err := codec.Decode(val, &s); err != nil || len(k) != 9 {
			return false, fmt.Errorf("%w: session %x: %w", ErrFormat, k, err)
		}
		s.ID = keySession(k)
		return true, fn(s)
	})
}

// Replies calls fn for all replies that are kept, by session and number.
func (v View) Replies(fn func(*Reply) error) error {
	return v.scan([]byte{tableReply}, []byte{tableReply + 1}, func(k, val []byte) (bool, error) {
		var r Reply
		if err := getReply(k, val, &r); err != nil {
			return false, err
		}
		return true, fn(&r)
	})
}

func getReply(k, val []byte, r *Reply) error {
	if len(k) != 17 {
		return fmt.Errorf("%w: key %x of a reply", ErrFormat, k)
	}
	if err := codec.Decode(val, r); err != nil {
		return fmt.Errorf("%w: reply %x: %w", ErrFormat, k, err)
	}
	r.Session, r.Number = keySession(k), binary.BigEndian.Uint64(k[9:])
	return nil
}

// Reply reads the reply to one request.
func (v View) Reply(id cluster.SessionID, number uint64) (r Reply, ok bool, err error) {
	k := key2(tableReply, uint64(id), number)
	val, c, err := v.get(k)
	if val == nil || err != nil {
		return r, false, err
	}
	defer c.Close()
	return r, true, getReply(k, bytes.Clone(val), &r)
}

// Base reads where the settled contents of a file are; BaseNone if nowhere.
// With data false, b.Data is not filled, nor are the contents read.
func (v View) Base(ino fsop.Ino, data bool) (b Base, err error) {
	var k [9]byte
	key := putKey1(k[:], tableBase, uint64(ino))
	if !data {
		return v.baseAlone(key)
	}
	val, c, err := v.get(key)
	if val == nil || err != nil {
		return b, err
	}
	defer c.Close()
	err = getBase(val, &b)
	b.Data = bytes.Clone(b.Data)
	return b, err
}

// baseAlone is Base without the data: its length, which the store has beside the
// key, says all there is to know of inline contents that are longer than other records.
func (v View) baseAlone(key []byte) (b Base, err error) {
	it, err := v.r.NewIter(&pebble.IterOptions{KeyTypes: pebble.IterKeyTypePointsOnly})
	if err != nil {
		return b, err
	}
	defer it.Close()
	if !it.SeekPrefixGE(key) || !bytes.Equal(it.Key(), key) {
		return b, it.Error()
	}
	lazy := it.LazyValue()
	if n := lazy.Len(); n > baseFileLen {
		return Base{Kind: BaseInline, Len: uint64(n - inlineHead)}, nil
	}
	val, err := it.ValueAndErr()
	if err != nil {
		return b, err
	}
	err = getBase(val, &b)
	b.Data = nil
	return b, err
}

// ReadInline copies up to len(p) bytes of inline contents from off, and
// reports how many. ok is false if the file has no inline contents.
func (v View) ReadInline(ino fsop.Ino, p []byte, off uint64) (n int, ok bool, err error) {
	var k [9]byte
	val, c, err := v.get(putKey1(k[:], tableBase, uint64(ino)))
	if val == nil || err != nil {
		return 0, false, err
	}
	defer c.Close()
	var b Base
	if err := getBase(val, &b); err != nil || b.Kind != BaseInline {
		return 0, false, err
	}
	if off < b.Len {
		n = copy(p, b.Data[off:])
	}
	return n, true, nil
}

// Bases calls fn for all files with settled contents, from inode from on. b.Data
// is valid only during the call.
func (v View) Bases(from fsop.Ino, fn func(fsop.Ino, *Base) (bool, error)) error {
	return v.scan(key1(tableBase, uint64(from)), []byte{tableBase + 1}, func(k, val []byte) (bool, error) {
		var b Base
		if len(k) != 9 {
			return false, fmt.Errorf("%w: key %x", ErrFormat, k)
		}
		if err := getBase(val, &b); err != nil {
			return false, err
		}
		return fn(keyIno(k), &b)
	})
}

// BaseKinds calls fn for all files with settled contents, from inode from on, until it
// returns false. With read, contents in the store are read, and n is how many bytes.
func (v View) BaseKinds(from fsop.Ino, read bool, fn func(ino fsop.Ino, kind BaseKind, n int) bool) (err error) {
	defer caught(&err)
	it, err := v.r.NewIter(&pebble.IterOptions{LowerBound: key1(tableBase, uint64(from)), UpperBound: []byte{tableBase + 1}})
	if err != nil {
		return err
	}
	defer it.Close()
	for ok := it.First(); ok; ok = it.Next() {
		if len(it.Key()) != 9 {
			return fmt.Errorf("%w: key %x", ErrFormat, it.Key())
		}
		kind, n := BaseInline, 0
		if lazy := it.LazyValue(); read || lazy.Len() <= baseFileLen { // see baseAlone
			val, err := it.ValueAndErr()
			var b Base
			if err == nil {
				err = getBase(val, &b)
			}
			if err != nil {
				return err
			}
			kind, n = b.Kind, len(val)
		}
		if !fn(keyIno(it.Key()), kind, n) {
			return nil
		}
	}
	return it.Error()
}

// Extents calls fn for all extents, by inode and offset.
func (v View) Extents(fn func(fsop.Ino, Extent) error) error {
	return v.scan([]byte{tableExtent}, []byte{tableExtent + 1}, func(k, val []byte) (bool, error) {
		var ino fsop.Ino
		var e Extent
		if err := getExtent(k, val, &ino, &e); err != nil {
			return false, err
		}
		return true, fn(ino, e)
	})
}

// ExtentsOf calls fn for the extents of one inode by offset.
func (v View) ExtentsOf(ino fsop.Ino, fn func(Extent) error) error {
	return v.scan(key1(tableExtent, uint64(ino)), after1(tableExtent, uint64(ino)), func(k, val []byte) (bool, error) {
		var e Extent
		if err := getExtent(k, val, &ino, &e); err != nil {
			return false, err
		}
		return true, fn(e)
	})
}

// Subvolumes calls fn for all subvolumes, in the order of their inodes.
func (v View) Subvolumes(fn func(*Subvolume) error) error {
	return v.scan([]byte{tableSubvol}, []byte{tableSubvol + 1}, func(k, val []byte) (bool, error) {
		var s Subvolume
		if err := getSubvolume(k, val, &s); err != nil {
			return false, err
		}
		return true, fn(&s)
	})
}

// Garbage calls fn for the data files to remove.
func (v View) Garbage(fn func(ino fsop.Ino, incarnation uint64) (bool, error)) error {
	return v.scan([]byte{tableGarbage}, []byte{tableGarbage + 1}, func(k, val []byte) (bool, error) {
		if len(k) != 17 {
			return false, fmt.Errorf("%w: key %x", ErrFormat, k)
		}
		return fn(keyIno(k), binary.BigEndian.Uint64(k[9:]))
	})
}

// Doubt says whether a heal that did not end may have left the contents of a
// file different from what its inode says.
func (v View) Doubt(ino fsop.Ino) (bool, error) { return v.has(key1(tableDoubt, uint64(ino))) }

// Doubts calls fn for all inodes with contents in doubt.
func (v View) Doubts(fn func(fsop.Ino) error) error {
	return v.scan([]byte{tableDoubt}, []byte{tableDoubt + 1}, func(k, val []byte) (bool, error) {
		if len(k) != 9 {
			return false, fmt.Errorf("%w: key %x", ErrFormat, k)
		}
		return true, fn(keyIno(k))
	})
}
