package meta

import (
	"bytes"
	"fmt"

	"mortar/internal/codec"
	"mortar/internal/fsop"
)

// What follows treats records as the bytes they are. It is for comparing and
// copying whole bricks.

// Records calls fn for all keys from lo to below hi with their values, which
// are valid only during the call, until it returns false.
func (v View) Records(lo, hi []byte, fn func(k, val []byte) (bool, error)) error {
	return v.scan(lo, hi, fn)
}

// RecordInode returns the inode that a record is; ok is false if it is another
// kind of record.
func RecordInode(k, val []byte) (n *Inode, ok bool, err error) {
	if len(k) != 9 || k[0] != tableInode {
		return nil, false, nil
	}
	n = new(Inode)
	return n, true, getInode(val, keyIno(k), n)
}

// RecordIno returns the inode that the key of an inode's record is about.
func RecordIno(k []byte) fsop.Ino { return keyIno(k) }

// InodeRecord returns the key and the value of an inode.
func InodeRecord(n *Inode) (k, v []byte) {
	v = make([]byte, inodeSize(n))
	putInode(v, n)
	return key1(tableInode, uint64(n.Ino)), v
}

// RecordTable returns the letter of the table that a key is of.
func RecordTable(k []byte) byte { return k[0] }

// Tables that are counted to tell how far a comparison has come.
const (
	TableDentry = tableDentry
	TableInode  = tableInode
)

// CheckRecord says whether a record could be of this version's making, for
// those that come from somewhere else.
func CheckRecord(k, val []byte) error {
	if err := checkKey(k); err != nil {
		return err
	}
	switch k[0] {
	case tableInode:
		return getInode(val, keyIno(k), new(Inode))
	case tableDentry:
		return getDentry(val, new(Dentry))
	case tableLock:
		return getLock(k, val, new(Lock))
	case tableRun:
		return getRun(k, val, new(Run))
	case tableReply:
		return getReply(k, val, new(Reply))
	case tableSession:
		if err := codec.Decode(val, new(Session)); err != nil {
			return fmt.Errorf("%w: session %x: %w", ErrFormat, k, err)
		}
		return nil
	case tableSubvol:
		return getSubvolume(k, val, new(Subvolume))
	case tableOrphan:
		return check(val, "orphan", 1)
	case tableXattr:
		if len(val) > 1+fsop.MaxXattr {
			return fmt.Errorf("%w: extended attribute of %d bytes", ErrFormat, len(val)-1)
		}
		return check(val, "extended attribute", -1)
	case tableTarget:
		if len(val) > 1+fsop.MaxTarget {
			return fmt.Errorf("%w: symbolic link of %d bytes", ErrFormat, len(val)-1)
		}
		return check(val, "symbolic link", -1)
	}
	return fmt.Errorf("%w: key %q", ErrFormat, k)
}

// SetRecord writes a record that CheckRecord has let pass.
func (b *Batch) SetRecord(k, val []byte) {
	key, v := b.set(len(k), len(val))
	copy(key, k)
	copy(v, val)
}

// DeleteRecord removes a record.
func (b *Batch) DeleteRecord(k []byte) { b.b.Delete(k, nil) }

// InReplicated reports whether lo and hi bound a range of replicated keys.
func InReplicated(lo, hi []byte) bool {
	return bytes.Compare(Replicated.Lo, lo) <= 0 && bytes.Compare(lo, hi) <= 0 && bytes.Compare(hi, Replicated.Hi) <= 0
}
