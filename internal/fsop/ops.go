package fsop

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

// What a Lookup can have for a name besides names.
const (
	Self  = "."
	Above = ".."
)

// ByNumber says whether o asks for an inode by number: Parent, or what that is in.
func (o *Lookup) ByNumber() bool { return o.Name == Self || o.Name == Above }

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
	SetKillSGID // clear set-group-id, also if not group-executable: the caller is not in the group
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

// OpenWindow asks for the window of a directory that is there already. When it is
// answered with Window, no other session has anything of the directory in its
// caches, names that are absent included. Reply: Attr, and Window, which is not
// set, and nothing changed, if another session holds it or a limit is near.
// ENOTDIR if it is no directory, ENOENT if it has been removed.
type OpenWindow struct {
	Ino Ino
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
