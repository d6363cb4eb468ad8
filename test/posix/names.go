package posix

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// The names that scripts use for numbers.

var openFlags = map[string]int{
	"O_RDONLY": unix.O_RDONLY, "O_WRONLY": unix.O_WRONLY, "O_RDWR": unix.O_RDWR, "O_CREAT": unix.O_CREAT,
	"O_EXCL": unix.O_EXCL, "O_TRUNC": unix.O_TRUNC, "O_APPEND": unix.O_APPEND, "O_NONBLOCK": unix.O_NONBLOCK,
	"O_DIRECTORY": unix.O_DIRECTORY, "O_NOFOLLOW": unix.O_NOFOLLOW, "O_NOATIME": unix.O_NOATIME, "O_PATH": unix.O_PATH,
	"O_SYNC": unix.O_SYNC, "O_DSYNC": unix.O_DSYNC, "O_DIRECT": unix.O_DIRECT, "O_ACCMODE": unix.O_ACCMODE, "O_TMPFILE": unix.O_TMPFILE,
}

var renameFlags = map[string]int{
	"NOREPLACE": unix.RENAME_NOREPLACE, "EXCHANGE": unix.RENAME_EXCHANGE, "WHITEOUT": unix.RENAME_WHITEOUT,
}

var xattrFlags = map[string]int{"CREATE": unix.XATTR_CREATE, "REPLACE": unix.XATTR_REPLACE}

var accessModes = map[string]int{"F": unix.F_OK, "R": unix.R_OK, "W": unix.W_OK, "X": unix.X_OK}

var whences = map[string]int{
	"SET": unix.SEEK_SET, "CUR": unix.SEEK_CUR, "END": unix.SEEK_END, "DATA": unix.SEEK_DATA, "HOLE": unix.SEEK_HOLE,
}

var fallocModes = map[string]int{
	"ALLOC": 0, "KEEP_SIZE": unix.FALLOC_FL_KEEP_SIZE, "PUNCH": unix.FALLOC_FL_PUNCH_HOLE, "ZERO": unix.FALLOC_FL_ZERO_RANGE,
	"COLLAPSE": unix.FALLOC_FL_COLLAPSE_RANGE, "INSERT": unix.FALLOC_FL_INSERT_RANGE,
}

var flockModes = map[string]int{"EX": unix.LOCK_EX, "SH": unix.LOCK_SH, "UN": unix.LOCK_UN}

var fileTypes = map[string]uint32{
	"reg": unix.S_IFREG, "dir": unix.S_IFDIR, "fifo": unix.S_IFIFO, "sock": unix.S_IFSOCK, "sym": unix.S_IFLNK,
	"chr": unix.S_IFCHR, "blk": unix.S_IFBLK,
}

func fileType(name string) uint32 {
	t, ok := fileTypes[name]
	if !ok {
		panic("no type of file " + name)
	}
	return t
}

// errnos are the errors by name.
var errnos = func() map[string]syscall.Errno {
	all := map[string]syscall.Errno{"EOPNOTSUPP": unix.EOPNOTSUPP}
	for e := syscall.Errno(1); e < 134; e++ {
		if name := unix.ErrnoName(e); name != "" {
			all[name] = e
		}
	}
	return all
}()

func errnoName(e syscall.Errno) string {
	if e == 0 {
		return "OK"
	}
	if e == unix.EOPNOTSUPP {
		return "EOPNOTSUPP"
	}
	if name := unix.ErrnoName(e); name != "" {
		return name
	}
	return fmt.Sprintf("errno %d", int(e))
}
