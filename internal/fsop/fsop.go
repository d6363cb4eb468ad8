// Package fsop has the nouns and verbs of a POSIX file system as data.
//
// Every operation is a struct (Lookup, Create, Write, …), and the whole file
// system is one method: Handler.Do. Handlers are to operations what
// http.RoundTripper is to requests, so the same value is sent, logged, applied,
// retried, traced and fuzzed, each by a small wrapper around a Handler.
//
// Operations know neither paths nor sessions nor replicas. Objects are named
// by inode number, names are single path components, and access was checked
// by whoever made the operation (the kernel, by default_permissions).
package fsop

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"time"
)

// LockWait is how long one Setlk with Wait waits for its lock.
const LockWait = 2 * time.Second

// Handler executes operations. The error is an Errno when the file system said
// no, and anything else (a context's error, say) when it could not be asked.
type Handler interface {
	Do(ctx context.Context, op Op) (*Reply, error)
}

// HandlerFunc makes a Handler of a function.
type HandlerFunc func(ctx context.Context, op Op) (*Reply, error)

// Do implements Handler.
func (f HandlerFunc) Do(ctx context.Context, op Op) (*Reply, error) { return f(ctx, op) }

// Resolve finds what a path leads to from the root, as h sees it, without following
// symbolic links. Empty parts of the path count for nothing. The error is that of the
// Lookup that failed.
func Resolve(ctx context.Context, h Handler, path string) (Attr, error) {
	at := Attr{Ino: RootIno}
	asked := false
	for part := range strings.SplitSeq(path, "/") {
		if part == "" {
			continue
		}
		r, err := h.Do(ctx, &Lookup{Parent: at.Ino, Name: part})
		if err != nil {
			return Attr{}, err
		}
		at, asked = r.Attr, true
	}
	if asked {
		return at, nil
	}
	r, err := h.Do(ctx, &Getattr{Ino: RootIno})
	if err != nil {
		return Attr{}, err
	}
	return r.Attr, nil
}

// Limits, those of Linux where it has one (limits.h, xattr.h).
const (
	MaxName    = 255
	MaxTarget  = 4095
	MaxXattr   = 64 << 10
	MaxData    = 1 << 20 // of one Read or Write
	MaxSize    = 1<<63 - 1
	MaxLinks   = 65000
	MaxEntries = 1 << 16 // in one Readdir reply
)

// Ino is an inode number. The upper 16 bits are the replica set that keeps the
// inode, the lower 48 count up from RootIno and are never reused, so an inode
// number alone is a stable handle and needs no generation.
type Ino uint64

// RootIno is the root directory of a volume; FUSE's FUSE_ROOT_ID.
const RootIno Ino = 1

// MakeIno is the n-th inode of a set.
func MakeIno(set uint16, n uint64) Ino { return Ino(uint64(set)<<48 | n&(1<<48-1)) }

// Set is the replica set that keeps the inode.
func (i Ino) Set() uint16 { return uint16(i >> 48) }

// Attr is what stat shows, and the inode's version. Times are nanoseconds since 1970.
type Attr struct {
	Ino    Ino
	Mode   uint32 // type and permission bits, as st_mode
	Nlink  uint32
	UID    uint32
	GID    uint32
	Rdev   uint32 // in the kernel's encoding (new_encode_dev)
	Size   uint64 // bytes; of a directory, the number of its entries
	Blocks uint64 // of 512 bytes; holes do not count
	Atime  int64
	Mtime  int64
	Ctime  int64
	// Change is the sequence number of the last change to the inode, its
	// contents or, for a directory, its entries. Two attributes of one inode
	// with equal Change are equal.
	Change uint64
	Flags  Flag
	// Window is the session that holds the window of the file or directory, 0 for none. It is
	// for the replica that answers, and does not cross the wire.
	Window uint64
}

// Flag is a property of an inode that is not in its mode.
type Flag uint32

// Flags. Those that programs set have the numbers of FS_IOC_SETFLAGS.
const (
	FlagImmutable  Flag = 0x10    // nothing of it changes
	FlagAppend     Flag = 0x20    // it only grows
	FlagNoDump     Flag = 0x40    // kept for programs, and means nothing here
	FlagNoAtime    Flag = 0x80    // likewise: reading never changes access times
	FlagACL        Flag = 1 << 24 // it has an access ACL that says more than its mode
	FlagDefaultACL Flag = 1 << 25 // what is made in the directory inherits an ACL

	// UserFlags are those that programs set.
	UserFlags = FlagImmutable | FlagAppend | FlagNoDump | FlagNoAtime
)

// Type is the S_IFMT part of the mode.
func (a *Attr) Type() uint32 { return a.Mode & syscall.S_IFMT }

// IsDir reports whether the inode is a directory.
func (a *Attr) IsDir() bool { return a.Type() == syscall.S_IFDIR }

// IsRegular reports whether the inode is a regular file.
func (a *Attr) IsRegular() bool { return a.Type() == syscall.S_IFREG }

// Dirent is one directory entry.
type Dirent struct {
	Ino    Ino
	Name   string
	Type   uint32 // S_IFMT bits
	Cookie uint64 // continues a listing after this entry; stable for the entry's life
	Attr   Attr   // filled for Readdir with Plus only
}

// Statfs is what statfs shows. Sizes are in bytes.
type Statfs struct {
	Total, Free, Avail uint64
	Files, FilesFree   uint64
}

// LockType is a kind of advisory lock; the values are those of struct flock.
type LockType uint8

const (
	LockRead   LockType = syscall.F_RDLCK
	LockWrite  LockType = syscall.F_WRLCK
	LockUnlock LockType = syscall.F_UNLCK
)

// Lock is an advisory lock on the bytes Start to End, both included; End is
// 1<<63-1 for "to the end". Owner is the kernel's lock owner, unique within a
// session. Flock locks and POSIX locks do not see each other.
type Lock struct {
	Owner uint64
	Flock bool
	Type  LockType
	Start uint64
	End   uint64
	PID   uint32 // for F_GETLK to report; 0 where it means nothing to the asker
}

// Reply is the answer to any operation; which fields mean something is said at each Op.
type Reply struct {
	Attr Attr
	// Dir has the parent directory's attributes after an operation that changed
	// its entries, if whoever answers has them at hand (of a Rename, only if both
	// names are in one directory): they save the asker a Getattr.
	Dir     Attr
	Data    []byte
	Off     uint64
	Entries []Dirent
	Statfs  Statfs
	Lock    Lock
	Window  bool // the window that was asked for is the session's
	// Seq is the sequence number at which the reply was true. A cache must not
	// keep a reply that is older than the last invalidation of what it is about.
	Seq uint64

	// Short, of a Write of which only a part was written because there was no room for
	// more, is how many bytes that was. It does not cross the wire.
	Short Short

	// Free, if there is one, takes Data back for the next reply. It is called at
	// most once, when nobody looks at Data any more; whoever does not call it leaves
	// Data to the garbage collector. It does not cross the wire.
	Free func()
}

// Short is a number of bytes, 0 for all.
type Short uint32

// Errno is an error number of Linux (asm-generic/errno.h), which is also what
// crosses the wire. The zero Errno is no error and is never returned as one.
type Errno uint16

const (
	EPERM        = Errno(syscall.EPERM)
	ENOENT       = Errno(syscall.ENOENT)
	EINTR        = Errno(syscall.EINTR)
	EIO          = Errno(syscall.EIO)
	E2BIG        = Errno(syscall.E2BIG)
	EBADF        = Errno(syscall.EBADF)
	EAGAIN       = Errno(syscall.EAGAIN)
	EACCES       = Errno(syscall.EACCES)
	EBUSY        = Errno(syscall.EBUSY)
	EEXIST       = Errno(syscall.EEXIST)
	EXDEV        = Errno(syscall.EXDEV)
	ENOTDIR      = Errno(syscall.ENOTDIR)
	EISDIR       = Errno(syscall.EISDIR)
	EINVAL       = Errno(syscall.EINVAL)
	EMFILE       = Errno(syscall.EMFILE)
	EFBIG        = Errno(syscall.EFBIG)
	ENOSPC       = Errno(syscall.ENOSPC)
	EROFS        = Errno(syscall.EROFS)
	EMLINK       = Errno(syscall.EMLINK)
	ERANGE       = Errno(syscall.ERANGE)
	EDEADLK      = Errno(syscall.EDEADLK)
	ENAMETOOLONG = Errno(syscall.ENAMETOOLONG)
	ENOLCK       = Errno(syscall.ENOLCK)
	ENOSYS       = Errno(syscall.ENOSYS)
	ENOTEMPTY    = Errno(syscall.ENOTEMPTY)
	ENODATA      = Errno(syscall.ENODATA)
	EOPNOTSUPP   = Errno(syscall.EOPNOTSUPP)
	ENXIO        = Errno(syscall.ENXIO)
	ESTALE       = Errno(syscall.ESTALE)
	EDQUOT       = Errno(syscall.EDQUOT)
	ENOTCONN     = Errno(syscall.ENOTCONN)
)

// Error implements error with the text of the C library.
func (e Errno) Error() string { return syscall.Errno(e).Error() }

// CheckName says whether s can name a directory entry: EINVAL for a name that
// is empty, ".", ".." or holds '/' or NUL; ENAMETOOLONG beyond MaxName bytes.
// Servers check names from clients and clients names from servers.
func CheckName(s string) error {
	switch {
	case len(s) > MaxName:
		return ENAMETOOLONG
	case s == "", s == ".", s == "..", strings.ContainsAny(s, "/\x00"):
		return EINVAL
	}
	return nil
}

// Op is one operation. The set of its implementations is this package's, and closed.
type Op interface {
	coded
	// Kind is the operation's stable number and name.
	Kind() Kind
}

// Kind numbers the operations on wire and disk; a number is never reused.
type Kind uint8

func (k Kind) String() string {
	if int(k) < len(kinds) && kinds[k].name != "" {
		return kinds[k].name
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// Mutates reports whether operations of the kind change the file system: they
// are ordered by the primary and logged. All others are answered by any
// replica that holds a lease, but Fsync, which is the primary's and not logged.
func (k Kind) Mutates() bool { return k >= firstMutation }
