package fsop

import (
	"fmt"

	"mortar/internal/codec"
)

type coded = codec.Coded

// The kinds. Reads are below firstMutation.
const (
	KindLookup    Kind = 1
	KindGetattr   Kind = 2
	KindReadlink  Kind = 3
	KindRead      Kind = 4
	KindReaddir   Kind = 5
	KindStatfs    Kind = 6
	KindGetxattr  Kind = 7
	KindListxattr Kind = 8
	KindSeek      Kind = 9
	KindGetlk     Kind = 10
	KindFsync     Kind = 11
	KindFlush     Kind = 12

	firstMutation Kind = 32

	KindSetattr     Kind = 32
	KindCreate      Kind = 33
	KindMkdir       Kind = 34
	KindMknod       Kind = 35
	KindSymlink     Kind = 36
	KindLink        Kind = 37
	KindUnlink      Kind = 38
	KindRmdir       Kind = 39
	KindRename      Kind = 40
	KindWrite       Kind = 41
	KindFallocate   Kind = 42
	KindSetxattr    Kind = 43
	KindRemovexattr Kind = 44
	KindSetlk       Kind = 45
	KindCloseWindow Kind = 46
	KindReserve     Kind = 47
	KindMake        Kind = 48
	KindUse         Kind = 49
	KindTmpfile     Kind = 50

	// Operations of the system itself, never accepted from a mount.
	KindOpenSession  Kind = 64
	KindCloseSession Kind = 65
	KindReap         Kind = 66
	KindNoop         Kind = 67

	KindMakeSubvolume   Kind = 68
	KindLimitSubvolume  Kind = 69
	KindRemoveSubvolume Kind = 70
	KindSweep           Kind = 71
)

var kinds = [...]struct {
	name string
	make func() Op
}{
	KindLookup:       {"lookup", func() Op { return new(Lookup) }},
	KindGetattr:      {"getattr", func() Op { return new(Getattr) }},
	KindReadlink:     {"readlink", func() Op { return new(Readlink) }},
	KindRead:         {"read", func() Op { return new(Read) }},
	KindReaddir:      {"readdir", func() Op { return new(Readdir) }},
	KindStatfs:       {"statfs", func() Op { return new(StatfsOp) }},
	KindGetxattr:     {"getxattr", func() Op { return new(Getxattr) }},
	KindListxattr:    {"listxattr", func() Op { return new(Listxattr) }},
	KindSeek:         {"seek", func() Op { return new(Seek) }},
	KindGetlk:        {"getlk", func() Op { return new(Getlk) }},
	KindFsync:        {"fsync", func() Op { return new(Fsync) }},
	KindFlush:        {"flush", func() Op { return new(Flush) }},
	KindSetattr:      {"setattr", func() Op { return new(Setattr) }},
	KindCreate:       {"create", func() Op { return new(Create) }},
	KindMkdir:        {"mkdir", func() Op { return new(Mkdir) }},
	KindMknod:        {"mknod", func() Op { return new(Mknod) }},
	KindSymlink:      {"symlink", func() Op { return new(Symlink) }},
	KindLink:         {"link", func() Op { return new(Link) }},
	KindUnlink:       {"unlink", func() Op { return new(Unlink) }},
	KindRmdir:        {"rmdir", func() Op { return new(Rmdir) }},
	KindRename:       {"rename", func() Op { return new(Rename) }},
	KindWrite:        {"write", func() Op { return new(Write) }},
	KindFallocate:    {"fallocate", func() Op { return new(Fallocate) }},
	KindSetxattr:     {"setxattr", func() Op { return new(Setxattr) }},
	KindRemovexattr:  {"removexattr", func() Op { return new(Removexattr) }},
	KindSetlk:        {"setlk", func() Op { return new(Setlk) }},
	KindCloseWindow:  {"close-window", func() Op { return new(CloseWindow) }},
	KindReserve:      {"reserve", func() Op { return new(Reserve) }},
	KindMake:         {"make", func() Op { return new(Make) }},
	KindUse:          {"use", func() Op { return new(Use) }},
	KindTmpfile:      {"tmpfile", func() Op { return new(Tmpfile) }},
	KindOpenSession:  {"open-session", func() Op { return new(OpenSession) }},
	KindCloseSession: {"close-session", func() Op { return new(CloseSession) }},
	KindReap:         {"reap", func() Op { return new(Reap) }},
	KindNoop:         {"noop", func() Op { return new(Noop) }},

	KindMakeSubvolume:   {"make-subvolume", func() Op { return new(MakeSubvolume) }},
	KindLimitSubvolume:  {"limit-subvolume", func() Op { return new(LimitSubvolume) }},
	KindRemoveSubvolume: {"remove-subvolume", func() Op { return new(RemoveSubvolume) }},
	KindSweep:           {"sweep", func() Op { return new(Sweep) }},
}

// Code codes an operation with its kind in front.
func Code(c *codec.Coder, op *Op) {
	var k uint8
	if !c.Decoding() {
		k = uint8((*op).Kind())
	}
	c.U8(&k)
	if c.Decoding() {
		if c.Err() != nil {
			return
		}
		if int(k) >= len(kinds) || kinds[k].make == nil {
			c.Fail("unknown operation %d", k)
			return
		}
		*op = kinds[k].make()
	}
	(*op).Code(c)
}

// Any is an Op as a codec.Coded value, kind included.
type Any struct{ Op Op }

// Code implements codec.Coded.
func (a *Any) Code(c *codec.Coder) { Code(c, &a.Op) }

// Append appends op, kind included, to b.
func Append(b []byte, op Op) []byte { return codec.Append(b, &Any{op}) }

// Decode reads an operation that fills b exactly. Its byte slices alias b.
func Decode(b []byte) (Op, error) {
	var a Any
	if err := codec.Decode(b, &a); err != nil {
		return nil, err
	}
	return a.Op, nil
}

// --- reads

// Lookup finds a name. Reply: Attr. ENOENT may be cached, with Seq, like any reply.
//
// Self and Above are no names of a directory: they ask for an inode by its number, as
// whoever kept a handle of it does (open_by_handle_at), and for the directory that a directory is in.
// ESTALE if there is none, or it has no name left.
type Lookup struct {
	Parent Ino
	Name   string
}

// Getattr reads attributes. Reply: Attr.
type Getattr struct{ Ino Ino }

// Readlink reads a symbolic link. Reply: Data.
type Readlink struct{ Ino Ino }

// Read reads at most Len bytes at Off, fewer at the end of the file. Reply: Data.
type Read struct {
	Ino Ino
	Off uint64
	Len uint32
}

// Readdir lists a directory from after Cookie (0: from the start) until about
// Max bytes of entries. Reply: Entries, without "." and ".."; none at the end;
// Attr, the directory's own.
type Readdir struct {
	Ino    Ino
	Cookie uint64
	Max    uint32
	Plus   bool // with attributes
}

// StatfsOp asks for the room in the file system. Reply: Statfs.
type StatfsOp struct{ Ino Ino }

// Getxattr reads an extended attribute. Reply: Data. ENODATA without one.
type Getxattr struct {
	Ino  Ino
	Name string
}

// Listxattr lists the names of the extended attributes. Reply: Data, each name ended by NUL.
type Listxattr struct{ Ino Ino }

// Seek finds data or a hole, as lseek with SEEK_DATA (3) or SEEK_HOLE (4).
// Reply: Off. ENXIO past the end.
type Seek struct {
	Ino    Ino
	Off    uint64
	Whence uint32
}

// Getlk tests for a lock that would block this one. Reply: Lock, of type
// LockUnlock if there is none.
type Getlk struct {
	Ino  Ino
	Lock Lock
}

// Fsync returns when everything that was acknowledged for the inode before it
// is durable on every in-sync brick.
type Fsync struct{ Ino Ino }

// Flush comes with every close of a file that was written. It returns when
// everything that was written to the file through this handler is acknowledged
// by the set, with the first error that any of it met. Reply: Attr and Dir, with
// Seq, where they are at hand. It is answered where
// writes wait (the client's window) and never sent.
type Flush struct{ Ino Ino }

// --- mutations

// What of Setattr counts.
const (
	SetMode uint32 = 1 << iota
	SetUID
	SetGID
	SetSize
	SetAtime
	SetMtime
	SetAtimeNow // the primary's time instead of Atime
	SetMtimeNow
	SetKillPriv // clear set-user-id, and set-group-id if group-executable
	SetFlags    // those of UserFlags; EOPNOTSUPP for others
)

// Setattr changes attributes. Reply: Attr.
type Setattr struct {
	Ino   Ino
	Valid uint32 // Set… bits
	Mode  uint32 // permission bits; the type cannot change
	UID   uint32
	GID   uint32
	Size  uint64
	Atime int64
	Mtime int64
	Flags Flag
	// Window: see Write.
	Window Window
}

// Node is what every operation that makes an inode has.
type Node struct {
	Parent Ino
	Name   string
	Mode   uint32 // permission bits
	Umask  uint32 // is taken from Mode, unless the parent has a default ACL
	UID    uint32
	GID    uint32 // replaced by the parent's if that is set-group-id
}

// Create makes a regular file. With Excl an existing name is EEXIST, else the
// existing file is the reply. Reply: Attr, and Window if the file is new and
// WindowAsk was set.
type Create struct {
	Node
	Excl   bool
	Window Window
}

// Tmpfile makes a regular file without a name, as O_TMPFILE does: in Parent's
// subvolume, with what Parent lets its files inherit. Name does not count. Unless
// Excl, one Link may give it a name.
//
// Until somebody holds it, which is when the answer has arrived, nothing would keep
// such a file from being reaped. So its session has its window from the start,
// always, and nobody reaps a file whose window is held. Reply: Attr, and Window if
// the session may acknowledge writes to it; otherwise it gives the window up at once.
type Tmpfile struct {
	Node
	Excl bool
}

// Mkdir makes a directory. Reply: Attr, and Window if WindowAsk was set, which is
// all that counts of Window: nobody else knows the directory yet.
type Mkdir struct {
	Node
	Window Window
}

// ReserveCount is how many inode numbers Reserve sets aside, and ReserveKept for
// how many calls of a session they stay so.
const (
	ReserveCount = 256
	ReserveKept  = 2
)

// Reserve sets inode numbers aside for files that the session will Make: the
// next ReserveCount from Reply's Off on. What the last call but one set aside is
// given up.
type Reserve struct{}

// Make makes a regular file that an application was told of before: it is valid
// only if the session holds the window of the directory (EIO otherwise), and
// First.Ino is one of the numbers that were reserved for the session. First is
// what was written to the file by now, done in the same step: of its Window only
// WindowAsk counts, and it may have a Then without Data. Reply: as to First, but Window
// says that more files can be told of before they are made: no limit is near.
//
// Without First.Ino it is from somebody who knows that the name is absent, unless
// another session has changed the directory, and asks that the file be foretold.
// It is answered where writes wait and never sent: with Attr whose Change is 0
// if the file was foretold, and like a Create with Excl otherwise.
type Make struct {
	Node
	First Write
}

// Mknod makes a regular file, device, pipe or socket; Mode has the type. Reply: Attr.
type Mknod struct {
	Node
	Rdev uint32
}

// Symlink makes a symbolic link. Reply: Attr.
type Symlink struct {
	Node
	Target string
}

// Link gives an inode another name, or its first if it is from a Tmpfile. ENOENT if it
// has none any more. Reply: Attr.
type Link struct {
	Ino    Ino
	Parent Ino
	Name   string
}

// Unlink removes a name that is not a directory's. Reply: Attr of the inode, Nlink after.
type Unlink struct {
	Parent Ino
	Name   string
}

// Rmdir removes an empty directory. Reply: Attr of it.
type Rmdir struct {
	Parent Ino
	Name   string
}

// Flags of Rename, as renameat2(2).
const (
	RenameNoReplace uint32 = 1
	RenameExchange  uint32 = 2
	RenameWhiteout  uint32 = 4
)

// Rename moves a name, replacing what the new name had. Reply: Attr of the moved inode.
type Rename struct {
	Parent    Ino
	Name      string
	NewParent Ino
	NewName   string
	Flags     uint32
}

// Window is what an operation says of the window of a file or a directory.
//
// The session that holds the window of a file may acknowledge writes to it to
// its applications before it sends them: nobody else is shown or may change the
// file before the holder has sent everything and closed the window. Whoever
// wants to makes the holder do so, and after the time of a lease it is done to
// it: what it had not sent is then refused, and lost with an error.
//
// The window of a directory is the same for its names: its holder may tell its
// applications of new files before it sends their Make. Nobody else is shown the
// directory, its attributes included, or may change it.
type Window uint8

const (
	// WindowAsk asks for the window. The reply has Window if it was given; it is
	// not while another session holds it.
	WindowAsk Window = 1 << iota
	// WindowHeld: the operation is only valid if the session holds the window
	// (EIO otherwise): it was acknowledged to an application on that condition.
	WindowHeld
	// WindowDone gives the window up with this operation.
	WindowDone
)

// Write writes Data at Off, or at the end of the file if Append. Reply: Attr
// after it, Off where the data went.
type Write struct {
	Ino      Ino
	Off      uint64
	Append   bool
	KillPriv bool // clear set-id bits, as SetKillPriv
	Window   Window
	Sync     bool // reply only when it is durable, as after a Fsync
	// Told is what the window's holder has told its applications that the file's times of
	// change are, if that is not 0: it takes the place of the primary's time, of which it is no
	// guess, but one that the holder knows to be over. What is later than that, or older than
	// the file's last change, is not believed.
	Told int64
	// Then are attributes to set after the data is written, in the same step, if
	// its Valid is not 0. Its Ino and Window do not count, and SetSize is EINVAL.
	Then Setattr
	Data []byte
}

// CloseWindow gives up the window that Session holds of a file or directory, if it does:
// its own, or, from the system, anybody's.
type CloseWindow struct {
	Ino     Ino
	Session uint64
}

// Modes of Fallocate, as fallocate(2).
const (
	FallocKeepSize  uint32 = 1
	FallocPunchHole uint32 = 2
	FallocZeroRange uint32 = 16
)

// Fallocate reserves, zeroes or punches a range. Reply: Attr.
type Fallocate struct {
	Ino  Ino
	Mode uint32
	Off  uint64
	Len  uint64
}

// Flags of Setxattr, as setxattr(2).
const (
	XattrCreate  uint32 = 1
	XattrReplace uint32 = 2
	// XattrKillSGID, beside those: an access ACL takes the set-group-id bit away,
	// because whoever sets it is not in the file's group.
	XattrKillSGID uint32 = 1 << 31
)

// Setxattr sets an extended attribute. Reply: Attr.
type Setxattr struct {
	Ino   Ino
	Name  string
	Value []byte
	Flags uint32
}

// Removexattr removes an extended attribute. Reply: Attr. ENODATA without one.
type Removexattr struct {
	Ino  Ino
	Name string
}

// Setlk takes or releases a lock for the session. EAGAIN if another holds a
// conflicting one. With Wait the primary keeps the request for up to LockWait
// and grants it as soon as it can; whoever wants to wait longer asks again,
// under a new number.
type Setlk struct {
	Ino  Ino
	Lock Lock
	Wait bool
}

// OpenSession registers the session that sends it, or says that a session which
// was away (CloseSession) is there again.
type OpenSession struct {
	Client string // host and mount point, for people
	Owner  string // the key that the client proved to have; nobody else may use the session
	Opened int64  // when the session was opened, as its client was told; 0: it is new
}

// CloseSession ends a session, its locks and its hold on unlinked files. One that
// is only Away, since nobody has heard of it for long, loses the same; but what
// it was answered is remembered, for when it is there again.
type CloseSession struct {
	Session uint64
	Away    bool
}

// Reap removes unlinked inodes that no session holds any more.
type Reap struct{ Inos []Ino }

// MaxUses is how many subvolumes a session may use at once.
const MaxUses = 1024

// Use says that the session uses the subvolume that Ino belongs to, or, with
// Done, that it does not any more. What somebody uses is not removed by mistake.
// An inode of no subvolume is no error. Reply: Attr.
type Use struct {
	Ino  Ino
	Done bool
}

// MakeSubvolume makes a directory that is a subvolume: it, and everything that
// is made below it, counts against limits of its own. The parent must be in no
// subvolume (EINVAL). Token, if it is not 0, is drawn by whoever asks: a name
// that is there already is no error if it was made with it. Reply: Attr.
type MakeSubvolume struct {
	Node
	Size   uint64 // bytes; 0: no limit
	Inodes uint64 // 0: no limit
	Token  uint64
}

// What of LimitSubvolume counts.
const (
	LimitSize uint32 = 1 << iota
	LimitInodes
	// LimitAdopt makes the directory a subvolume, with all that is in it, if it is none
	// yet. It is one change, so that is bounded: E2BIG if it is more than AdoptMost inodes. EINVAL if the directory is
	// in a subvolume or has one in it, EXDEV if a file in it has a name outside.
	LimitAdopt
)

// AdoptMost is how many inodes one LimitSubvolume puts into a subvolume.
const AdoptMost = 10000

// LimitSubvolume sets limits of the subvolume whose top directory is Ino; EINVAL
// if there is none. A limit may be below what is used: then it only shrinks. Reply: Attr.
type LimitSubvolume struct {
	Ino    Ino
	Valid  uint32 // Limit… bits
	Size   uint64
	Inodes uint64
}

// RemoveSubvolume takes the name of a subvolume away; from then on nothing can be
// made in it, and Sweep removes what it has. ENOENT if the name is not Ino's, EBUSY if a
// session uses it, unless Force. That it was removed before is no error.
type RemoveSubvolume struct {
	Parent Ino
	Name   string
	Ino    Ino
	Force  bool
}

// SweepMost is how many names one Sweep removes.
const SweepMost = 512

// Sweep removes some of what a removed subvolume still has: at most SweepMost names.
type Sweep struct{ Ino Ino }

// Noop changes nothing. A new primary begins its epoch with one.
type Noop struct{}

// --- kinds and codes

// What a Lookup can have for a name besides names.
const (
	Self  = "."
	Above = ".."
)

// ByNumber says whether o asks for an inode by number: Parent, or what that is in.
func (o *Lookup) ByNumber() bool { return o.Name == Self || o.Name == Above }

func (*Lookup) Kind() Kind       { return KindLookup }
func (*Getattr) Kind() Kind      { return KindGetattr }
func (*Readlink) Kind() Kind     { return KindReadlink }
func (*Read) Kind() Kind         { return KindRead }
func (*Readdir) Kind() Kind      { return KindReaddir }
func (*StatfsOp) Kind() Kind     { return KindStatfs }
func (*Getxattr) Kind() Kind     { return KindGetxattr }
func (*Listxattr) Kind() Kind    { return KindListxattr }
func (*Seek) Kind() Kind         { return KindSeek }
func (*Getlk) Kind() Kind        { return KindGetlk }
func (*Fsync) Kind() Kind        { return KindFsync }
func (*Flush) Kind() Kind        { return KindFlush }
func (*CloseWindow) Kind() Kind  { return KindCloseWindow }
func (*Reserve) Kind() Kind      { return KindReserve }
func (*Make) Kind() Kind         { return KindMake }
func (*Setattr) Kind() Kind      { return KindSetattr }
func (*Create) Kind() Kind       { return KindCreate }
func (*Mkdir) Kind() Kind        { return KindMkdir }
func (*Mknod) Kind() Kind        { return KindMknod }
func (*Symlink) Kind() Kind      { return KindSymlink }
func (*Link) Kind() Kind         { return KindLink }
func (*Unlink) Kind() Kind       { return KindUnlink }
func (*Rmdir) Kind() Kind        { return KindRmdir }
func (*Rename) Kind() Kind       { return KindRename }
func (*Write) Kind() Kind        { return KindWrite }
func (*Fallocate) Kind() Kind    { return KindFallocate }
func (*Setxattr) Kind() Kind     { return KindSetxattr }
func (*Removexattr) Kind() Kind  { return KindRemovexattr }
func (*Setlk) Kind() Kind        { return KindSetlk }
func (*OpenSession) Kind() Kind  { return KindOpenSession }
func (*CloseSession) Kind() Kind { return KindCloseSession }
func (*Reap) Kind() Kind         { return KindReap }
func (*Noop) Kind() Kind         { return KindNoop }
func (*Use) Kind() Kind          { return KindUse }
func (*Tmpfile) Kind() Kind      { return KindTmpfile }

func (*MakeSubvolume) Kind() Kind   { return KindMakeSubvolume }
func (*LimitSubvolume) Kind() Kind  { return KindLimitSubvolume }
func (*RemoveSubvolume) Kind() Kind { return KindRemoveSubvolume }
func (*Sweep) Kind() Kind           { return KindSweep }

func (o *Lookup) Code(c *codec.Coder)   { o.Parent.Code(c); c.String(&o.Name, MaxName) }
func (o *Getattr) Code(c *codec.Coder)  { o.Ino.Code(c) }
func (o *Readlink) Code(c *codec.Coder) { o.Ino.Code(c) }
func (o *Read) Code(c *codec.Coder)     { o.Ino.Code(c); c.U64(&o.Off); c.U32(&o.Len) }
func (o *Readdir) Code(c *codec.Coder) {
	o.Ino.Code(c)
	c.U64(&o.Cookie)
	c.U32(&o.Max)
	c.Bool(&o.Plus)
}
func (o *StatfsOp) Code(c *codec.Coder)    { o.Ino.Code(c) }
func (o *Getxattr) Code(c *codec.Coder)    { o.Ino.Code(c); c.String(&o.Name, MaxName) }
func (o *Listxattr) Code(c *codec.Coder)   { o.Ino.Code(c) }
func (o *Seek) Code(c *codec.Coder)        { o.Ino.Code(c); c.U64(&o.Off); c.U32(&o.Whence) }
func (o *Getlk) Code(c *codec.Coder)       { o.Ino.Code(c); o.Lock.Code(c) }
func (o *Fsync) Code(c *codec.Coder)       { o.Ino.Code(c) }
func (o *Flush) Code(c *codec.Coder)       { o.Ino.Code(c) }
func (o *CloseWindow) Code(c *codec.Coder) { o.Ino.Code(c); c.U64(&o.Session) }
func (w *Window) code(c *codec.Coder) {
	c.U8((*uint8)(w))
	w.check(c)
}

func (w *Window) check(c *codec.Coder) {
	if *w&^(WindowAsk|WindowHeld|WindowDone) != 0 {
		c.Fail("window %d", *w)
	}
}

func (o *Setattr) Code(c *codec.Coder) {
	o.Ino.Code(c)
	c.U32(&o.Valid)
	c.U32(&o.Mode)
	c.U32(&o.UID)
	c.U32(&o.GID)
	c.U64(&o.Size)
	c.I64(&o.Atime)
	c.I64(&o.Mtime)
	c.U32((*uint32)(&o.Flags))
	o.Window.code(c)
}
func (n *Node) code(c *codec.Coder) {
	n.Parent.Code(c)
	c.String(&n.Name, MaxName)
	c.U32(&n.Mode)
	c.U32(&n.Umask)
	c.U32(&n.UID)
	c.U32(&n.GID)
}
func (o *Create) Code(c *codec.Coder)  { o.code(c); c.Bool(&o.Excl); o.Window.code(c) }
func (o *Tmpfile) Code(c *codec.Coder) { o.code(c); c.Bool(&o.Excl) }
func (o *Mkdir) Code(c *codec.Coder)   { o.code(c); o.Window.code(c) }
func (o *Reserve) Code(*codec.Coder)   {}
func (o *Make) Code(c *codec.Coder)    { o.code(c); o.First.Code(c) }
func (o *Mknod) Code(c *codec.Coder)   { o.code(c); c.U32(&o.Rdev) }
func (o *Symlink) Code(c *codec.Coder) { o.code(c); c.String(&o.Target, MaxTarget) }
func (o *Link) Code(c *codec.Coder)    { o.Ino.Code(c); o.Parent.Code(c); c.String(&o.Name, MaxName) }
func (o *Unlink) Code(c *codec.Coder)  { o.Parent.Code(c); c.String(&o.Name, MaxName) }
func (o *Rmdir) Code(c *codec.Coder)   { o.Parent.Code(c); c.String(&o.Name, MaxName) }
func (o *Rename) Code(c *codec.Coder) {
	o.Parent.Code(c)
	c.String(&o.Name, MaxName)
	o.NewParent.Code(c)
	c.String(&o.NewName, MaxName)
	c.U32(&o.Flags)
}

// Code puts the data last, so that a log record's payload is its tail.
func (o *Write) Code(c *codec.Coder) {
	o.Ino.Code(c)
	c.U64(&o.Off)
	c.Bool(&o.Append)
	c.Bool(&o.KillPriv)
	o.codeTold(c)
	c.Bool(&o.Sync)
	o.Then.Code(c)
	c.Bytes(&o.Data, MaxData)
}

// hasTold is set in the byte of Window if Told follows: it is rare, and logs from
// before there was such a thing are read as ever.
const hasTold = 0x80

func (o *Write) codeTold(c *codec.Coder) {
	b := uint8(o.Window)
	if o.Told != 0 {
		b |= hasTold
	}
	c.U8(&b)
	if w := Window(b &^ hasTold); w != o.Window { // whoever encodes shares it with others
		o.Window = w
	}
	o.Window.check(c)
	if b&hasTold != 0 {
		c.I64(&o.Told)
		if o.Told == 0 {
			c.Fail("a time that was told is missing")
		}
	}
}

func (o *Fallocate) Code(c *codec.Coder) {
	o.Ino.Code(c)
	c.U32(&o.Mode)
	c.U64(&o.Off)
	c.U64(&o.Len)
}
func (o *Setxattr) Code(c *codec.Coder) {
	o.Ino.Code(c)
	c.String(&o.Name, MaxName)
	c.Bytes(&o.Value, MaxXattr)
	c.U32(&o.Flags)
}
func (o *Removexattr) Code(c *codec.Coder) { o.Ino.Code(c); c.String(&o.Name, MaxName) }
func (o *Setlk) Code(c *codec.Coder)       { o.Ino.Code(c); o.Lock.Code(c); c.Bool(&o.Wait) }
func (o *OpenSession) Code(c *codec.Coder) {
	c.String(&o.Client, 1024)
	c.String(&o.Owner, 255)
	c.I64(&o.Opened)
}
func (o *CloseSession) Code(c *codec.Coder) { c.U64(&o.Session); c.Bool(&o.Away) }
func (o *Reap) Code(c *codec.Coder) {
	codec.Slice(c, &o.Inos, 1<<16, func(c *codec.Coder, i *Ino) { i.Code(c) })
}
func (o *Noop) Code(*codec.Coder) {}

func (o *Use) Code(c *codec.Coder) { o.Ino.Code(c); c.Bool(&o.Done) }
func (o *MakeSubvolume) Code(c *codec.Coder) {
	o.code(c)
	c.U64(&o.Size)
	c.U64(&o.Inodes)
	c.U64(&o.Token)
}
func (o *LimitSubvolume) Code(c *codec.Coder) {
	o.Ino.Code(c)
	c.U32(&o.Valid)
	c.U64(&o.Size)
	c.U64(&o.Inodes)
}
func (o *RemoveSubvolume) Code(c *codec.Coder) {
	o.Parent.Code(c)
	c.String(&o.Name, MaxName)
	o.Ino.Code(c)
	c.Bool(&o.Force)
}
func (o *Sweep) Code(c *codec.Coder) { o.Ino.Code(c) }

// Code implements codec.Coded.
func (i *Ino) Code(c *codec.Coder) { c.U64((*uint64)(i)) }

// Code implements codec.Coded.
func (l *Lock) Code(c *codec.Coder) {
	c.U64(&l.Owner)
	c.Bool(&l.Flock)
	c.U8((*uint8)(&l.Type))
	if l.Type > LockUnlock {
		c.Fail("lock type %d", l.Type)
	}
	c.U64(&l.Start)
	c.U64(&l.End)
	c.U32(&l.PID)
}

// Code implements codec.Coded.
func (a *Attr) Code(c *codec.Coder) {
	a.Ino.Code(c)
	c.U32(&a.Mode)
	c.U32(&a.Nlink)
	c.U32(&a.UID)
	c.U32(&a.GID)
	c.U32(&a.Rdev)
	c.U64(&a.Size)
	c.U64(&a.Blocks)
	c.I64(&a.Atime)
	c.I64(&a.Mtime)
	c.I64(&a.Ctime)
	c.U64(&a.Change)
	c.U32((*uint32)(&a.Flags))
}

// Which parts of a Reply are present on the wire.
const (
	hasAttr uint8 = 1 << iota
	hasEntries
	hasPlus
	hasStatfs
	hasLock
	hasDir
	hasWindow
	hasAll = 1<<iota - 1
)

// Code implements codec.Coded. Parts that are zero take no bytes; Data is last.
func (r *Reply) Code(c *codec.Coder) {
	var has uint8
	if !c.Decoding() {
		if r.Attr.Ino != 0 {
			has |= hasAttr
		}
		if len(r.Entries) > 0 {
			has |= hasEntries
			if r.Entries[0].Attr.Ino != 0 {
				has |= hasPlus
			}
		}
		if r.Statfs != (Statfs{}) {
			has |= hasStatfs
		}
		if r.Lock != (Lock{}) {
			has |= hasLock
		}
		if r.Dir.Ino != 0 {
			has |= hasDir
		}
		if r.Window {
			has |= hasWindow
		}
	}
	c.U8(&has)
	if has > hasAll {
		c.Fail("reply with parts %#x", has)
	}
	r.Window = has&hasWindow != 0
	c.U64(&r.Seq)
	c.U64(&r.Off)
	if has&hasAttr != 0 {
		r.Attr.Code(c)
	}
	if has&hasDir != 0 {
		r.Dir.Code(c)
	}
	if has&hasEntries != 0 {
		codec.Slice(c, &r.Entries, MaxEntries, func(c *codec.Coder, d *Dirent) {
			d.Ino.Code(c)
			c.String(&d.Name, MaxName)
			c.U32(&d.Type)
			c.U64(&d.Cookie)
			if has&hasPlus != 0 {
				d.Attr.Code(c)
			}
		})
	}
	if has&hasStatfs != 0 {
		s := &r.Statfs
		for _, p := range []*uint64{&s.Total, &s.Free, &s.Avail, &s.Files, &s.FilesFree} {
			c.U64(p)
		}
	}
	if has&hasLock != 0 {
		r.Lock.Code(c)
	}
	c.Bytes(&r.Data, MaxData)
}

// Introduces says whether the reply to op tells of an inode, in Attr, as looking it
// up does: whoever gets it holds the inode from then on.
func Introduces(op Op) bool {
	switch op.(type) {
	case *Lookup, *Create, *Make, *Tmpfile, *Mkdir, *Mknod, *Symlink, *Link:
		return true
	}
	return false
}

// Place is a name in a directory.
type Place struct {
	Dir  Ino
	Name string
}

// Places lists the names that op looks up, makes or takes away; of a rename the old one, then the new one.
func Places(op Op) []Place {
	switch op := op.(type) {
	case *Lookup:
		if op.ByNumber() {
			return nil
		}
		return []Place{{op.Parent, op.Name}}
	case *Create:
		return []Place{{op.Parent, op.Name}}
	case *Make:
		return []Place{{op.Parent, op.Name}}
	case *Mkdir:
		return []Place{{op.Parent, op.Name}}
	case *Mknod:
		return []Place{{op.Parent, op.Name}}
	case *Symlink:
		return []Place{{op.Parent, op.Name}}
	case *Link:
		return []Place{{op.Parent, op.Name}}
	case *Unlink:
		return []Place{{op.Parent, op.Name}}
	case *Rmdir:
		return []Place{{op.Parent, op.Name}}
	case *Rename:
		return []Place{{op.Parent, op.Name}, {op.NewParent, op.NewName}}
	}
	return nil
}

// String prints an operation the way traces and test scripts show it.
func String(op Op) string {
	if m, ok := op.(*Make); ok {
		return fmt.Sprintf("make {Parent:%d Name:%q Ino:%d %d bytes}", m.Parent, m.Name, m.First.Ino, len(m.First.Data))
	}
	if w, ok := op.(*Write); ok {
		return fmt.Sprintf("write {Ino:%d Off:%d Append:%v %d bytes}", w.Ino, w.Off, w.Append, len(w.Data))
	}
	return fmt.Sprintf("%v %+v", op.Kind(), op)
}

// opSpace is what an operation without payload takes at most in a brick's log
// and metadata, in bytes.
const opSpace = 4096

// Space says how many bytes of a brick's disk op takes at most, and whether it
// helps to give some back.
func Space(op Op) (need uint64, frees bool) {
	switch op := op.(type) {
	case *Write:
		// Once in the log, once where it is settled. Both are whole blocks.
		blocks := (uint64(len(op.Data)) + opSpace - 1) / opSpace
		return (2*blocks + 1) * opSpace, false
	case *Make:
		need, _ = Space(&op.First)
		return need + opSpace, false
	case *Fallocate:
		if op.Mode&(FallocPunchHole|FallocZeroRange) != 0 {
			return opSpace, true
		}
		return op.Len + opSpace, false
	case *Setxattr:
		return 4*uint64(len(op.Value)) + opSpace, false
	case *Symlink:
		return 4*uint64(len(op.Target)) + opSpace, false
	case *Create, *Tmpfile, *Mkdir, *Mknod, *Link, *MakeSubvolume:
		return opSpace, false
	}
	return opSpace, true
}
