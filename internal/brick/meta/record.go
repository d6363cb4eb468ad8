package meta

import (
	"encoding/binary"
	"errors"
	"fmt"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
)

// ErrFormat is wrapped by the errors about keys and values that this program
// did not write: damage, or a newer program's format.
var ErrFormat = errors.New("not in a format that this version of mortar knows")

// version is the first byte of every value. What came later has its own, which is
// used only where it is needed, so that there is one way to write a value down.
const (
	version       = 1
	versionSubvol = 2 // of an inode that is in a subvolume, and of a session that uses one
)

// An Inode is what is known of one file, directory or other object.
type Inode struct {
	fsop.Attr
	// Parent is the directory that has a directory's only name. 0 for all else.
	Parent fsop.Ino
	// Content is the position of the last change to a regular file's contents:
	// two bricks that have the same Content for an inode have the same bytes.
	Content cluster.Pos
	// Xattrs and XattrNames are the number of extended attributes and the bytes
	// of their names as Listxattr would list them.
	Xattrs, XattrNames uint32
	Flags              Flag
	// WindowSince is when Attr.Window was given its window: the time of that entry.
	WindowSince int64
	// Subvolume is the one that the inode is in, once it is, for all its life; 0 for none. Its
	// name is the inode of its top directory, which is in it.
	Subvolume fsop.Ino
}

// Flag is a property of an inode.
type Flag uint8

const (
	// Sparse files have their allocated blocks in M records. The blocks of all
	// others are those from 0 to their size.
	Sparse Flag = 1 << iota
	// Caps says that there is a security.capability attribute, which writing
	// takes away.
	Caps
	// Linkable is a file that never had a name and may be given one.
	Linkable

	allFlags = Sparse | Caps | Linkable
)

const (
	inodeLen       = 1 + 1 + 5*4 + 2*8 + 3*8 + 8 + 8 + 2*8 + 2*4 + 2*8 + 4
	inodeSubvolLen = inodeLen + 8
)

// inodeSize is the length of n's value.
func inodeSize(n *Inode) int {
	if n.Subvolume != 0 {
		return inodeSubvolLen
	}
	return inodeLen
}

// putInode writes n into v, which has inodeSize bytes.
func putInode(v []byte, n *Inode) {
	le := binary.LittleEndian
	_ = v[inodeLen-1]
	v[0], v[1] = version, byte(n.Flags)
	if n.Subvolume != 0 {
		v[0] = versionSubvol
		le.PutUint64(v[inodeLen:], uint64(n.Subvolume))
	}
	le.PutUint32(v[2:], n.Mode)
	le.PutUint32(v[6:], n.Nlink)
	le.PutUint32(v[10:], n.UID)
	le.PutUint32(v[14:], n.GID)
	le.PutUint32(v[18:], n.Rdev)
	le.PutUint64(v[22:], n.Size)
	le.PutUint64(v[30:], n.Blocks)
	le.PutUint64(v[38:], uint64(n.Atime))
	le.PutUint64(v[46:], uint64(n.Mtime))
	le.PutUint64(v[54:], uint64(n.Ctime))
	le.PutUint64(v[62:], n.Change)
	le.PutUint64(v[70:], uint64(n.Parent))
	le.PutUint64(v[78:], uint64(n.Content.Epoch))
	le.PutUint64(v[86:], n.Content.Seq)
	le.PutUint32(v[94:], n.Xattrs)
	le.PutUint32(v[98:], n.XattrNames)
	le.PutUint64(v[102:], n.Window)
	le.PutUint64(v[110:], uint64(n.WindowSince))
	le.PutUint32(v[118:], uint32(n.Attr.Flags))
}

func check(v []byte, what string, length int) error {
	if len(v) < 1 || v[0] != version {
		return fmt.Errorf("%w: %s %x", ErrFormat, what, v[:min(len(v), 8)])
	}
	if length >= 0 && len(v) != length {
		return fmt.Errorf("%w: %s of %d bytes", ErrFormat, what, len(v))
	}
	return nil
}

func getInode(v []byte, ino fsop.Ino, n *Inode) error {
	le := binary.LittleEndian
	n.Subvolume = 0
	if len(v) == inodeSubvolLen && v[0] == versionSubvol {
		if n.Subvolume = fsop.Ino(le.Uint64(v[inodeLen:])); n.Subvolume == 0 {
			return fmt.Errorf("%w: inode %d of subvolume 0", ErrFormat, ino)
		}
	} else if err := check(v, "inode", inodeLen); err != nil {
		return err
	}
	n.Flags = Flag(v[1])
	n.Ino = ino
	n.Mode = le.Uint32(v[2:])
	n.Nlink = le.Uint32(v[6:])
	n.UID = le.Uint32(v[10:])
	n.GID = le.Uint32(v[14:])
	n.Rdev = le.Uint32(v[18:])
	n.Size = le.Uint64(v[22:])
	n.Blocks = le.Uint64(v[30:])
	n.Atime = int64(le.Uint64(v[38:]))
	n.Mtime = int64(le.Uint64(v[46:]))
	n.Ctime = int64(le.Uint64(v[54:]))
	n.Change = le.Uint64(v[62:])
	n.Parent = fsop.Ino(le.Uint64(v[70:]))
	n.Content = cluster.Pos{Epoch: cluster.Epoch(le.Uint64(v[78:])), Seq: le.Uint64(v[86:])}
	n.Xattrs = le.Uint32(v[94:])
	n.XattrNames = le.Uint32(v[98:])
	n.Window = le.Uint64(v[102:])
	n.WindowSince = int64(le.Uint64(v[110:]))
	n.Attr.Flags = fsop.Flag(le.Uint32(v[118:]))
	if n.Flags&^allFlags != 0 || n.Size > fsop.MaxSize {
		return fmt.Errorf("%w: inode %d with flags %x and size %d", ErrFormat, ino, n.Flags, n.Size)
	}
	return nil
}

// A Dentry is an entry of a directory.
type Dentry struct {
	Ino    fsop.Ino
	Type   uint32 // S_IFMT bits
	Name   string
	Cookie Cookie
}

const dentryLen = 1 + 8 + 1

func putDentry(v []byte, d *Dentry) {
	_ = v[dentryLen-1]
	v[0] = version
	binary.LittleEndian.PutUint64(v[1:], uint64(d.Ino))
	v[9] = byte(d.Type >> 12)
}

func getDentry(v []byte, d *Dentry) error {
	if err := check(v, "directory entry", dentryLen); err != nil {
		return err
	}
	d.Ino = fsop.Ino(binary.LittleEndian.Uint64(v[1:]))
	d.Type = uint32(v[9]) << 12
	if v[9] > 15 {
		return fmt.Errorf("%w: directory entry of type %d", ErrFormat, v[9])
	}
	return nil
}

// A State is where a brick stands. But for the position it is replicated.
type State struct {
	Pos     cluster.Pos
	Time    int64  // of the entry at Pos
	NextIno uint64 // the number of the next new inode, without the set
	Inodes  uint64 // inodes there are
	Blocks  uint64 // the sum of their Blocks
}

const stateLen = 1 + 6*8

func putState(v []byte, s *State) {
	le := binary.LittleEndian
	_ = v[stateLen-1]
	v[0] = version
	le.PutUint64(v[1:], uint64(s.Pos.Epoch))
	le.PutUint64(v[9:], s.Pos.Seq)
	le.PutUint64(v[17:], uint64(s.Time))
	le.PutUint64(v[25:], s.NextIno)
	le.PutUint64(v[33:], s.Inodes)
	le.PutUint64(v[41:], s.Blocks)
}

func getState(v []byte, s *State) error {
	if err := check(v, "position", stateLen); err != nil {
		return err
	}
	le := binary.LittleEndian
	s.Pos = cluster.Pos{Epoch: cluster.Epoch(le.Uint64(v[1:])), Seq: le.Uint64(v[9:])}
	s.Time = int64(le.Uint64(v[17:]))
	s.NextIno = le.Uint64(v[25:])
	s.Inodes = le.Uint64(v[33:])
	s.Blocks = le.Uint64(v[41:])
	return nil
}

// EncodeState is the value of a State, for those who keep it elsewhere.
func EncodeState(s *State) []byte {
	v := make([]byte, stateLen)
	putState(v, s)
	return v
}

// DecodeState reads what EncodeState wrote.
func DecodeState(v []byte, s *State) error { return getState(v, s) }

// A Lock is one advisory lock that a session has, or had when it went away.
type Lock struct {
	Ino     fsop.Ino
	Session cluster.SessionID
	fsop.Lock
	State LockState
}

// LockState says what has become of a lock.
type LockState uint8

const (
	LockHeld LockState = iota
	// LockAway keeps nobody out: nobody hears of its session. It is held again if the
	// session comes back before anybody took a lock that it would have kept out.
	LockAway
	// LockLost was taken by another meanwhile. Its owner does not know yet. Until it
	// unlocks the range its session cannot change the file.
	LockLost

	lockStates = 3
)

const lockLen = 1 + 1 + 8 + 4

func putLock(v []byte, l *Lock) {
	_ = v[lockLen-1]
	v[0], v[1] = version, byte(l.Type)|byte(l.State)<<4
	binary.LittleEndian.PutUint64(v[2:], l.End)
	binary.LittleEndian.PutUint32(v[10:], l.PID)
}

func getLock(k, v []byte, l *Lock) error {
	if err := check(v, "lock", lockLen); err != nil {
		return err
	}
	if err := checkKey(k); err != nil || k[0] != tableLock {
		return fmt.Errorf("%w: lock key %x", ErrFormat, k)
	}
	be := binary.BigEndian
	l.Ino, l.Flock = keyIno(k), k[9] == 1
	l.Session = cluster.SessionID(be.Uint64(k[10:]))
	l.Owner, l.Start = be.Uint64(k[18:]), be.Uint64(k[26:])
	l.Type, l.State = fsop.LockType(v[1]&15), LockState(v[1]>>4)
	l.End = binary.LittleEndian.Uint64(v[2:])
	l.PID = binary.LittleEndian.Uint32(v[10:])
	if l.Type != fsop.LockRead && l.Type != fsop.LockWrite || l.State >= lockStates || l.End < l.Start {
		return fmt.Errorf("%w: lock of type %d, state %d, from %d to %d", ErrFormat, l.Type, l.State, l.Start, l.End)
	}
	return nil
}

// A Session is a client's registration.
type Session struct {
	ID     cluster.SessionID
	Client string
	Owner  string // who opened it: no other may use it
	Opened int64  // ns since 1970; with the ID, it names the session for ever
	Since  int64  // when it was last opened or went away: windows from before are closed
	Away   bool   // nobody has heard of it for long; it is kept for its replies
	// Reserved are the inode numbers that are set aside for it (fsop.Reserve), oldest first.
	Reserved []Reserved
	// Uses are the subvolumes that it uses (fsop.Use), in ascending order.
	Uses []fsop.Ino
}

// Reserved are fsop.ReserveCount inode numbers from First on, without the set.
type Reserved struct {
	First uint64
	Used  [fsop.ReserveCount / 64]uint64 // a bit for each
}

// Take marks the number n as used, and reports whether it was one of them and was not.
func (r *Reserved) Take(n uint64) bool {
	i := n - r.First
	if n < r.First || i >= fsop.ReserveCount || r.Used[i/64]>>(i%64)&1 != 0 {
		return false
	}
	r.Used[i/64] |= 1 << (i % 64)
	return true
}

// Code implements codec.Coded.
func (s *Session) Code(c *codec.Coder) {
	v := uint8(version)
	if len(s.Uses) > 0 {
		v = versionSubvol
	}
	if c.U8(&v); v != version && v != versionSubvol && c.Err() == nil {
		c.Fail("session of version %d", v)
	}
	c.I64(&s.Opened)
	c.I64(&s.Since)
	c.Bool(&s.Away)
	c.String(&s.Client, 1024)
	c.String(&s.Owner, 255)
	codec.Slice(c, &s.Reserved, fsop.ReserveKept, func(c *codec.Coder, r *Reserved) {
		c.U64(&r.First)
		for i := range r.Used {
			c.U64(&r.Used[i])
		}
	})
	if v == version {
		return
	}
	codec.Slice(c, &s.Uses, fsop.MaxUses, func(c *codec.Coder, i *fsop.Ino) { i.Code(c) })
	if len(s.Uses) == 0 && c.Err() == nil {
		c.Fail("session of version %d without uses", v)
	}
}

// A Subvolume is a directory with an account of its own. Its name is where it is
// in the tree, and nowhere else.
type Subvolume struct {
	Ino fsop.Ino // of its top directory
	// Size and Inodes are the limits, 0 for none, in bytes and inodes.
	Size, Inodes uint64
	// UsedSize and UsedInodes are what its inodes have: of bytes, those of their
	// blocks and those of the names and values of their extended attributes.
	UsedSize, UsedInodes uint64
	Made                 int64 // when, ns since 1970
	Used                 int64 // when it was last known to be used
	Token                uint64
	Removed              bool // it has no name any more, and is being emptied
}

const subvolLen = 1 + 7*8 + 1

func putSubvolume(v []byte, s *Subvolume) {
	le := binary.LittleEndian
	_ = v[subvolLen-1]
	v[0] = version
	le.PutUint64(v[1:], s.Size)
	le.PutUint64(v[9:], s.Inodes)
	le.PutUint64(v[17:], s.UsedSize)
	le.PutUint64(v[25:], s.UsedInodes)
	le.PutUint64(v[33:], uint64(s.Made))
	le.PutUint64(v[41:], uint64(s.Used))
	le.PutUint64(v[49:], s.Token)
	v[57] = 0
	if s.Removed {
		v[57] = 1
	}
}

func getSubvolume(k, v []byte, s *Subvolume) error {
	if err := check(v, "subvolume", subvolLen); err != nil {
		return err
	}
	if len(k) != 9 || v[57] > 1 {
		return fmt.Errorf("%w: subvolume %x with flags %d", ErrFormat, k, v[57])
	}
	le := binary.LittleEndian
	*s = Subvolume{
		Ino: keyIno(k), Size: le.Uint64(v[1:]), Inodes: le.Uint64(v[9:]), UsedSize: le.Uint64(v[17:]), UsedInodes: le.Uint64(v[25:]),
		Made: int64(le.Uint64(v[33:])), Used: int64(le.Uint64(v[41:])), Token: le.Uint64(v[49:]), Removed: v[57] == 1,
	}
	return nil
}

// A Reply is what was answered to a request that changed something.
type Reply struct {
	Session cluster.SessionID
	Number  uint64
	Acked   uint64 // the session's, when it asked
	Reply   fsop.Reply
}

// Code implements codec.Coded.
func (r *Reply) Code(c *codec.Coder) {
	codeVersion(c, "reply")
	c.U64(&r.Acked)
	r.Reply.Code(c)
}

func codeVersion(c *codec.Coder, what string) {
	v := uint8(version)
	if c.U8(&v); v != version && c.Err() == nil {
		c.Fail("%s of version %d", what, v)
	}
}

// BaseKind says where settled contents are.
type BaseKind uint8

const (
	BaseNone   BaseKind = 0 // nowhere: nothing was settled
	BaseInline BaseKind = 1 // in the KV
	BaseFile   BaseKind = 2 // in a data file
)

// A Base is the settled contents of a file, below the extents in the log.
// What it does not reach reads as zeros.
type Base struct {
	Kind BaseKind
	// Len is the end of what may be other than zero.
	Len uint64
	// Incarnation, of a BaseFile, tells data files of one inode apart.
	Incarnation uint64
	// Data, of a BaseInline, has Len bytes.
	Data []byte
}

const (
	inlineHead  = 1 + 1 // before the data
	baseFileLen = 1 + 1 + 8 + 8
)

func baseLen(b *Base) int {
	if b.Kind == BaseInline {
		return inlineHead + len(b.Data)
	}
	return baseFileLen
}

func putBase(v []byte, b *Base) {
	v[0], v[1] = version, byte(b.Kind)
	if b.Kind == BaseInline {
		copy(v[inlineHead:], b.Data)
		return
	}
	binary.LittleEndian.PutUint64(v[2:], b.Len)
	binary.LittleEndian.PutUint64(v[10:], b.Incarnation)
}

// getBase decodes v. b.Data aliases v.
func getBase(v []byte, b *Base) error {
	if err := check(v, "contents", -1); err != nil {
		return err
	}
	if len(v) >= 2 {
		switch BaseKind(v[1]) {
		case BaseInline:
			*b = Base{Kind: BaseInline, Len: uint64(len(v) - inlineHead), Data: v[inlineHead:]}
			return nil
		case BaseFile:
			if len(v) == baseFileLen {
				*b = Base{Kind: BaseFile, Len: binary.LittleEndian.Uint64(v[2:]), Incarnation: binary.LittleEndian.Uint64(v[10:])}
				if b.Len <= fsop.MaxSize {
					return nil
				}
			}
		}
	}
	return fmt.Errorf("%w: contents %x of %d bytes", ErrFormat, v[:min(len(v), 18)], len(v))
}

// An Extent is a range of a file whose bytes are in the log, or are zero
// whatever the Base has there.
type Extent struct {
	Off, Len uint64
	Seq      uint64 // of the entry that wrote it
	Zero     bool
	Alloc    bool   // of zeros: with disk space of their own
	Segment  uint64 // of the log
	LogOff   int64  // of the first byte, in the segment
}

// End is the offset behind the last byte.
func (e *Extent) End() uint64 { return e.Off + e.Len }

// Sub returns the part of e from a to below b, which must lie within it.
func (e *Extent) Sub(a, b uint64) Extent {
	s := *e
	s.Off, s.Len = a, b-a
	if !e.Zero {
		s.LogOff += int64(a - e.Off)
	}
	return s
}

const extentLen = 1 + 1 + 4*8

func putExtent(v []byte, e *Extent) {
	le := binary.LittleEndian
	_ = v[extentLen-1]
	v[0], v[1] = version, 0
	if e.Zero {
		v[1] |= 1
	}
	if e.Alloc {
		v[1] |= 2
	}
	le.PutUint64(v[2:], e.Len)
	le.PutUint64(v[10:], e.Seq)
	le.PutUint64(v[18:], e.Segment)
	le.PutUint64(v[26:], uint64(e.LogOff))
}

func getExtent(k, v []byte, ino *fsop.Ino, e *Extent) error {
	if err := check(v, "extent", extentLen); err != nil {
		return err
	}
	if len(k) != 17 {
		return fmt.Errorf("%w: extent key %x", ErrFormat, k)
	}
	le := binary.LittleEndian
	*ino = keyIno(k)
	*e = Extent{
		Off: binary.BigEndian.Uint64(k[9:]), Len: le.Uint64(v[2:]), Seq: le.Uint64(v[10:]),
		Zero: v[1]&1 != 0, Alloc: v[1]&2 != 0, Segment: le.Uint64(v[18:]), LogOff: int64(le.Uint64(v[26:])),
	}
	if v[1] > 3 || v[1] == 2 || e.Len == 0 || e.Off > fsop.MaxSize || e.Len > fsop.MaxSize-e.Off || e.LogOff < 0 {
		return fmt.Errorf("%w: extent of inode %d at %d", ErrFormat, *ino, e.Off)
	}
	return nil
}

// A Run is a run of allocated blocks, from Start to below End.
type Run struct{ Start, End uint64 }

const runLen = 1 + 8

func putRun(v []byte, r Run) {
	v[0] = version
	binary.LittleEndian.PutUint64(v[1:], r.End)
}

func getRun(k, v []byte, r *Run) error {
	if err := check(v, "run of blocks", runLen); err != nil {
		return err
	}
	if len(k) != 17 {
		return fmt.Errorf("%w: key %x of a run of blocks", ErrFormat, k)
	}
	r.Start, r.End = binary.BigEndian.Uint64(k[9:]), binary.LittleEndian.Uint64(v[1:])
	if r.End <= r.Start {
		return fmt.Errorf("%w: run of blocks from %d to %d", ErrFormat, r.Start, r.End)
	}
	return nil
}
