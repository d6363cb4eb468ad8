package meta

import (
	"github.com/cockroachdb/pebble/v2"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
)

// A Batch is a set of changes that Store.Commit makes at once. It is used
// again after Commit or Reset, by one goroutine at a time.
type Batch struct {
	b   *pebble.Batch
	buf []byte
}

// NewBatch makes an empty batch.
func (s *Store) NewBatch() *Batch { return &Batch{b: s.db.NewBatch()} }

// Reset forgets what the batch has.
func (b *Batch) Reset() { b.b.Reset() }

// Close ends the batch for good.
func (b *Batch) Close() { b.b.Close() }

// Empty reports whether the batch changes nothing.
func (b *Batch) Empty() bool { return b.b.Empty() }

// Len is the size of the batch in bytes.
func (b *Batch) Len() int { return b.b.Len() }

func (b *Batch) set(keyLen, valLen int) (k, v []byte) {
	op := b.b.SetDeferred(keyLen, valLen)
	op.Finish() // only rewinds the index, of which there is none
	return op.Key, op.Value
}

func (b *Batch) del1(table byte, a uint64) {
	op := b.b.DeleteDeferred(9)
	putKey1(op.Key, table, a)
	op.Finish()
}

func (b *Batch) del2(table byte, x, y uint64) {
	op := b.b.DeleteDeferred(17)
	putKey2(op.Key, table, x, y)
	op.Finish()
}

// SetState writes the position and counters.
func (b *Batch) SetState(s *State) {
	k, v := b.set(1, stateLen)
	k[0] = tableState
	putState(v, s)
}

// SetInode writes an inode.
func (b *Batch) SetInode(n *Inode) {
	k, v := b.set(9, inodeSize(n))
	putKey1(k, tableInode, uint64(n.Ino))
	putInode(v, n)
}

// DeleteInode removes an inode's record and its target. Extended attributes and
// runs have keys of their own, which the caller removes one by one: deleting
// whole ranges would slow every later read of the store down.
func (b *Batch) DeleteInode(n *Inode) {
	b.del1(tableInode, uint64(n.Ino))
	if n.Type() == typeSymlink {
		b.del1(tableTarget, uint64(n.Ino))
	}
}

const typeSymlink = 0o120000

// SetDentry writes a directory entry.
func (b *Batch) SetDentry(dir fsop.Ino, d *Dentry) {
	k, v := b.set(17+len(d.Name), dentryLen)
	putKey2(k, tableDentry, uint64(dir), uint64(d.Cookie))
	copy(k[17:], d.Name)
	putDentry(v, d)
}

// DeleteDentry removes a directory entry.
func (b *Batch) DeleteDentry(dir fsop.Ino, c Cookie, name string) {
	op := b.b.DeleteDeferred(17 + len(name))
	putKey2(op.Key, tableDentry, uint64(dir), uint64(c))
	copy(op.Key[17:], name)
	op.Finish()
}

func putBlob(v, data []byte) {
	v[0] = version
	copy(v[1:], data)
}

// SetXattr writes an extended attribute.
func (b *Batch) SetXattr(ino fsop.Ino, name string, value []byte) {
	k, v := b.set(9+len(name), 1+len(value))
	putKey1(k, tableXattr, uint64(ino))
	copy(k[9:], name)
	putBlob(v, value)
}

// DeleteXattr removes an extended attribute.
func (b *Batch) DeleteXattr(ino fsop.Ino, name string) { b.b.Delete(xattrKey(ino, name), nil) }

// SetTarget writes a symbolic link's target.
func (b *Batch) SetTarget(ino fsop.Ino, target string) {
	k, v := b.set(9, 1+len(target))
	putKey1(k, tableTarget, uint64(ino))
	v[0] = version
	copy(v[1:], target)
}

// SetOrphan notes an inode without a name.
func (b *Batch) SetOrphan(ino fsop.Ino) { b.mark(tableOrphan, ino) }

// DeleteOrphan takes the note back.
func (b *Batch) DeleteOrphan(ino fsop.Ino) { b.del1(tableOrphan, uint64(ino)) }

func (b *Batch) mark(table byte, ino fsop.Ino) {
	k, v := b.set(9, 1)
	putKey1(k, table, uint64(ino))
	v[0] = version
}

// SetDoubt notes that an inode's contents may not be what the inode says.
func (b *Batch) SetDoubt(ino fsop.Ino) { b.mark(tableDoubt, ino) }

// DeleteDoubt takes the note back.
func (b *Batch) DeleteDoubt(ino fsop.Ino) { b.del1(tableDoubt, uint64(ino)) }

// SetRun writes a run of allocated blocks.
func (b *Batch) SetRun(ino fsop.Ino, r Run) {
	k, v := b.set(17, runLen)
	putKey2(k, tableRun, uint64(ino), r.Start)
	putRun(v, r)
}

// DeleteRun removes the run that starts at block start.
func (b *Batch) DeleteRun(ino fsop.Ino, start uint64) { b.del2(tableRun, uint64(ino), start) }

// SetLock writes a lock.
func (b *Batch) SetLock(l *Lock) {
	key := lockKey(l)
	k, v := b.set(len(key), lockLen)
	copy(k, key)
	putLock(v, l)
}

// DeleteLock removes the lock with l's inode, kind, session, owner and start.
func (b *Batch) DeleteLock(l *Lock) { b.b.Delete(lockKey(l), nil) }

// SetSession writes a session.
func (b *Batch) SetSession(s *Session) {
	b.buf = codec.Append(b.buf[:0], s)
	k, v := b.set(9, len(b.buf))
	putKey1(k, tableSession, uint64(s.ID))
	copy(v, b.buf)
}

// SetSubvolume writes a subvolume.
func (b *Batch) SetSubvolume(s *Subvolume) {
	k, v := b.set(9, subvolLen)
	putKey1(k, tableSubvol, uint64(s.Ino))
	putSubvolume(v, s)
}

// DeleteSubvolume removes a subvolume's record.
func (b *Batch) DeleteSubvolume(ino fsop.Ino) { b.del1(tableSubvol, uint64(ino)) }

// DeleteSession removes a session, but not its replies.
func (b *Batch) DeleteSession(id cluster.SessionID) { b.del1(tableSession, uint64(id)) }

// SetReply writes the reply to a request. A session's number has one reply.
func (b *Batch) SetReply(r *Reply) {
	b.buf = codec.Append(b.buf[:0], r)
	k, v := b.set(17, len(b.buf))
	putKey2(k, tableReply, uint64(r.Session), r.Number)
	copy(v, b.buf)
}

// DeleteReply removes the reply to a request.
func (b *Batch) DeleteReply(id cluster.SessionID, number uint64) {
	b.del2(tableReply, uint64(id), number)
}

// SetBase writes where the settled contents of a file are.
func (b *Batch) SetBase(ino fsop.Ino, base *Base) {
	if base.Kind == BaseNone {
		b.del1(tableBase, uint64(ino))
		return
	}
	k, v := b.set(9, baseLen(base))
	putKey1(k, tableBase, uint64(ino))
	putBase(v, base)
}

// SetExtent writes an extent.
func (b *Batch) SetExtent(ino fsop.Ino, e *Extent) {
	k, v := b.set(17, extentLen)
	putKey2(k, tableExtent, uint64(ino), e.Off)
	putExtent(v, e)
}

// DeleteExtent removes the extent at offset off.
func (b *Batch) DeleteExtent(ino fsop.Ino, off uint64) { b.del2(tableExtent, uint64(ino), off) }

// SetGarbage notes a data file to remove.
func (b *Batch) SetGarbage(ino fsop.Ino, incarnation uint64) {
	k, v := b.set(17, 1)
	putKey2(k, tableGarbage, uint64(ino), incarnation)
	v[0] = version
}

// DeleteGarbage takes the note back.
func (b *Batch) DeleteGarbage(ino fsop.Ino, incarnation uint64) {
	b.del2(tableGarbage, uint64(ino), incarnation)
}

var _ pebble.Reader = (*pebble.Snapshot)(nil)
