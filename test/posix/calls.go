package posix

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// call is a statement being carried out, on its worker's thread and as its user.
// What is wrong with the statement itself panics.
type call struct {
	*runner
	worker *worker
	mount  int // of the worker
	*statement
	more int // expectations looked at beside the call's own
}

func (k *call) arg(i int) string {
	if i >= len(k.args) {
		panic(fmt.Sprintf("argument %d is missing", i+1))
	}
	return k.args[i]
}

func (k *call) has(i int) bool { return i < len(k.args) }

// opt is an argument that may be missing.
func (k *call) opt(i int, otherwise string) string {
	if k.has(i) {
		return k.args[i]
	}
	return otherwise
}

func number(s string) int64 {
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil {
		panic(err.Error())
	}
	return n
}

func (k *call) num(i int) int64   { return number(k.arg(i)) }
func (k *call) mode(i int) uint32 { return uint32(number(k.arg(i))) }

// id is a user or group by name or number.
func id(s string, group bool) int {
	if u, ok := users[s]; ok {
		if group {
			return u.gid
		}
		return u.uid
	}
	if s == "staff" {
		return staff
	}
	return int(number(s))
}

// fd is a descriptor by name.
func (k *call) fd(i int) int {
	if k.arg(i) == "none" {
		return -1
	}
	fd, ok := k.fds[k.arg(i)]
	if !ok {
		panic("no descriptor " + k.arg(i))
	}
	return fd.fd
}

// keep gives a new descriptor its name, or closes it.
func (k *call) keep(fd int, err error) (string, error) {
	if err != nil {
		return "", err
	}
	if k.as == "" {
		return "", unix.Close(fd)
	}
	if old, ok := k.fds[k.as]; ok {
		unix.Close(old.fd)
	}
	k.fds[k.as] = descriptor{fd, k.mount}
	return "", nil
}

// flags is a set of names with | between, or a number.
func flags(s string, names map[string]int) int {
	all := 0
	for part := range strings.SplitSeq(s, "|") {
		if v, ok := names[part]; ok {
			all |= v
		} else {
			all |= int(number(part))
		}
	}
	return all
}

func status(err error) (string, error) { return "", err }

const cwd = unix.AT_FDCWD

// calls are what a statement can call, by name.
var calls map[string]func(*call) (string, error)

func init() {
	calls = map[string]func(*call) (string, error){
		// Names.
		"open": func(k *call) (string, error) {
			mode := uint32(0o644)
			if k.has(2) {
				mode = k.mode(2)
			}
			return k.keep(unix.Openat(cwd, k.arg(0), flags(k.opt(1, "0"), openFlags)|unix.O_CLOEXEC, mode))
		},
		"create": func(k *call) (string, error) { // a new file
			mode := uint32(0o644)
			if k.has(1) {
				mode = k.mode(1)
			}
			return k.keep(unix.Openat(cwd, k.arg(0), unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC, mode))
		},
		"tmpfile": func(k *call) (string, error) {
			return k.keep(unix.Openat(cwd, k.arg(0), unix.O_TMPFILE|flags(k.opt(2, "O_RDWR"), openFlags)|unix.O_CLOEXEC, k.mode(1)))
		},
		"close": func(k *call) (string, error) {
			fd := k.fd(0)
			delete(k.fds, k.arg(0))
			return status(unix.Close(fd))
		},
		"mkdir": func(k *call) (string, error) {
			mode := uint32(0o755)
			if k.has(1) {
				mode = k.mode(1)
			}
			return status(unix.Mkdirat(cwd, k.arg(0), mode))
		},
		"mknod": func(k *call) (string, error) { // name, type, mode, major, minor
			dev := 0
			if k.has(4) {
				dev = int(unix.Mkdev(uint32(k.num(3)), uint32(k.num(4))))
			}
			return status(unix.Mknodat(cwd, k.arg(0), fileType(k.arg(1))|k.mode(2), dev))
		},
		"make": func(k *call) (string, error) { return status(k.make(k.arg(0), k.arg(1))) }, // a type, a name
		"symlink": func(k *call) (string, error) {
			return status(unix.Symlinkat(k.arg(0), cwd, k.arg(1)))
		},
		"readlink": func(k *call) (string, error) {
			buf := make([]byte, 8192)
			n, err := unix.Readlinkat(cwd, k.arg(0), buf)
			return string(buf[:max(n, 0)]), err
		},
		"link": func(k *call) (string, error) {
			f := 0
			if k.opt(2, "") == "follow" {
				f = unix.AT_SYMLINK_FOLLOW
			}
			return status(unix.Linkat(cwd, k.arg(0), cwd, k.arg(1), f))
		},
		"linkfd": func(k *call) (string, error) {
			return status(unix.Linkat(k.fd(0), "", cwd, k.arg(1), unix.AT_EMPTY_PATH))
		},
		"unlink": func(k *call) (string, error) { return status(unix.Unlinkat(cwd, k.arg(0), 0)) },
		"rmdir":  func(k *call) (string, error) { return status(unix.Unlinkat(cwd, k.arg(0), unix.AT_REMOVEDIR)) },
		"rename": func(k *call) (string, error) {
			if !k.has(2) {
				return status(unix.Renameat(cwd, k.arg(0), cwd, k.arg(1)))
			}
			return status(unix.Renameat2(cwd, k.arg(0), cwd, k.arg(1), uint(flags(k.arg(2), renameFlags))))
		},
		"ls": func(k *call) (string, error) { return list(k.arg(0)) }, // sorted, without . and ..
		"cd": func(k *call) (string, error) { // all workers, as they are
			for _, w := range k.workers {
				if w == k.worker {
					if err := unix.Chdir(k.arg(0)); err != nil {
						return "", err
					}
				}
			}
			for _, w := range k.workers {
				if w != k.worker {
					if err := w.do(func() error { return unix.Chdir(k.arg(0)) }); err != nil {
						return "", err
					}
				}
			}
			return "", nil
		},
		"fchdir": func(k *call) (string, error) { return status(unix.Fchdir(k.fd(0))) },

		// Attributes.
		"stat":  func(k *call) (string, error) { return k.stat(statx(cwd, k.arg(0), 0)) },
		"lstat": func(k *call) (string, error) { return k.stat(statx(cwd, k.arg(0), unix.AT_SYMLINK_NOFOLLOW)) },
		"fstat": func(k *call) (string, error) { return k.stat(statx(k.fd(0), "", unix.AT_EMPTY_PATH)) },
		"same": func(k *call) (string, error) { // two names of one inode?
			a, err := statx(cwd, k.arg(0), unix.AT_SYMLINK_NOFOLLOW)
			if err != nil {
				return "", err
			}
			b, err := statx(cwd, k.arg(1), unix.AT_SYMLINK_NOFOLLOW)
			if err != nil {
				return "", err
			}
			if a.Ino == b.Ino {
				return "yes", nil
			}
			return "no", nil
		},
		"mark":  func(k *call) (string, error) { return "", k.mark(k.args...) },
		"moved": func(k *call) (string, error) { return "", k.moved(k.arg(0), k.arg(1)) },
		"chmod": func(k *call) (string, error) { return status(unix.Fchmodat(cwd, k.arg(0), k.mode(1), 0)) },
		"fchmod": func(k *call) (string, error) {
			return status(unix.Fchmod(k.fd(0), k.mode(1)))
		},
		"chown":  func(k *call) (string, error) { return status(k.chown(0)) },
		"lchown": func(k *call) (string, error) { return status(k.chown(unix.AT_SYMLINK_NOFOLLOW)) },
		"fchown": func(k *call) (string, error) {
			return status(unix.Fchown(k.fd(0), id(k.arg(1), false), id(k.arg(2), true)))
		},
		"utimens": func(k *call) (string, error) {
			return status(unix.UtimesNanoAt(cwd, k.arg(0), k.times(1), 0))
		},
		"lutimens": func(k *call) (string, error) {
			return status(unix.UtimesNanoAt(cwd, k.arg(0), k.times(1), unix.AT_SYMLINK_NOFOLLOW))
		},
		"access": func(k *call) (string, error) {
			return status(faccessat(k.arg(0), flags(k.arg(1), accessModes), flags(k.opt(2, "0"), map[string]int{"eaccess": unix.AT_EACCESS})))
		},
		"umask": func(k *call) (string, error) {
			mask := int(k.num(0))
			setUmask(mask)
			for _, w := range k.workers {
				if w != k.worker {
					w.do(func() error { setUmask(mask); return nil })
				}
			}
			return "", nil
		},
		"chattr": func(k *call) (string, error) { return "", k.chattr(k.arg(0), k.arg(1)) },
		"lsattr": func(k *call) (string, error) { return k.lsattr(k.arg(0)) },
		"statfs": func(k *call) (string, error) { return k.statfs() },

		// Extended attributes.
		"setxattr": func(k *call) (string, error) {
			return status(unix.Setxattr(k.arg(0), k.arg(1), []byte(k.opt(2, "")), flags(k.opt(3, "0"), xattrFlags)))
		},
		"lsetxattr": func(k *call) (string, error) {
			return status(unix.Lsetxattr(k.arg(0), k.arg(1), []byte(k.opt(2, "")), flags(k.opt(3, "0"), xattrFlags)))
		},
		"fsetxattr": func(k *call) (string, error) {
			return status(unix.Fsetxattr(k.fd(0), k.arg(1), []byte(k.opt(2, "")), flags(k.opt(3, "0"), xattrFlags)))
		},
		"getxattr": func(k *call) (string, error) {
			buf := make([]byte, number(k.opt(2, "70000")))
			n, err := unix.Getxattr(k.arg(0), k.arg(1), buf)
			return string(buf[:max(min(n, len(buf)), 0)]), err
		},
		"lgetxattr": func(k *call) (string, error) {
			buf := make([]byte, number(k.opt(2, "70000")))
			n, err := unix.Lgetxattr(k.arg(0), k.arg(1), buf)
			return string(buf[:max(min(n, len(buf)), 0)]), err
		},
		"fgetxattr": func(k *call) (string, error) {
			buf := make([]byte, 70000)
			n, err := unix.Fgetxattr(k.fd(0), k.arg(1), buf)
			return string(buf[:max(n, 0)]), err
		},
		"xattrsize": func(k *call) (string, error) {
			n, err := unix.Getxattr(k.arg(0), k.arg(1), nil)
			return strconv.Itoa(n), err
		},
		"listxattr": func(k *call) (string, error) { return listxattr(k.arg(0)) },
		"removexattr": func(k *call) (string, error) {
			return status(unix.Removexattr(k.arg(0), k.arg(1)))
		},
		"lremovexattr": func(k *call) (string, error) {
			return status(unix.Lremovexattr(k.arg(0), k.arg(1)))
		},
		"setacl": func(k *call) (string, error) { // name, access or default, entries
			return status(unix.Setxattr(k.arg(0), "system.posix_acl_"+k.arg(1), encodeACL(k.arg(2)), 0))
		},
		"getacl": func(k *call) (string, error) {
			buf := make([]byte, 4096)
			n, err := unix.Getxattr(k.arg(0), "system.posix_acl_"+k.arg(1), buf)
			if err != nil {
				return "", err
			}
			return decodeACL(buf[:n]), nil
		},
		"delacl": func(k *call) (string, error) {
			return status(unix.Removexattr(k.arg(0), "system.posix_acl_"+k.arg(1)))
		},
		"setcap": func(k *call) (string, error) { // CAP_NET_RAW, permitted, revision 2
			var v [20]byte
			binary.LittleEndian.PutUint32(v[0:], 0x02000000)
			binary.LittleEndian.PutUint32(v[4:], 1<<unix.CAP_NET_RAW)
			return status(unix.Setxattr(k.arg(0), "security.capability", v[:], 0))
		},

		// Contents.
		"put": func(k *call) (string, error) { // what an open, a write and a close do
			fd, err := unix.Openat(cwd, k.arg(0), unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
			if err != nil {
				return "", err
			}
			_, err = unix.Write(fd, []byte(k.arg(1)))
			if e := unix.Close(fd); err == nil {
				err = e
			}
			return "", err
		},
		"cat": func(k *call) (string, error) {
			b, err := os.ReadFile(k.arg(0))
			return string(b), err
		},
		"write": func(k *call) (string, error) {
			n, err := unix.Write(k.fd(0), []byte(k.arg(1)))
			return strconv.Itoa(n), err
		},
		"pwrite": func(k *call) (string, error) {
			n, err := unix.Pwrite(k.fd(0), []byte(k.arg(2)), k.num(1))
			return strconv.Itoa(n), err
		},
		"read": func(k *call) (string, error) {
			buf := make([]byte, k.num(1))
			n, err := unix.Read(k.fd(0), buf)
			return string(buf[:max(n, 0)]), err
		},
		"pread": func(k *call) (string, error) {
			buf := make([]byte, k.num(2))
			n, err := unix.Pread(k.fd(0), buf, k.num(1))
			return string(buf[:max(n, 0)]), err
		},
		"seek": func(k *call) (string, error) {
			n, err := unix.Seek(k.fd(0), k.num(1), flags(k.arg(2), whences))
			return strconv.FormatInt(n, 10), err
		},
		"truncate":  func(k *call) (string, error) { return status(unix.Truncate(k.arg(0), k.num(1))) },
		"ftruncate": func(k *call) (string, error) { return status(unix.Ftruncate(k.fd(0), k.num(1))) },
		"fallocate": func(k *call) (string, error) {
			return status(unix.Fallocate(k.fd(0), uint32(flags(k.arg(1), fallocModes)), k.num(2), k.num(3)))
		},
		"copy": func(k *call) (string, error) { // from, offset, to, offset, length
			in, out := k.num(1), k.num(3)
			n, err := unix.CopyFileRange(k.fd(0), &in, k.fd(2), &out, int(k.num(4)), int(number(k.opt(5, "0"))))
			return strconv.Itoa(n), err
		},
		"fsync":     func(k *call) (string, error) { return status(unix.Fsync(k.fd(0))) },
		"fdatasync": func(k *call) (string, error) { return status(unix.Fdatasync(k.fd(0))) },
		"syncfs":    func(k *call) (string, error) { return status(unix.Syncfs(k.fd(0))) },

		// Locks: whole files by flock, ranges by the open file's own locks (F_OFD_SETLK).
		"flock": func(k *call) (string, error) {
			return status(unix.Flock(k.fd(0), flags(k.arg(1), flockModes)|unix.LOCK_NB))
		},
		"lock": func(k *call) (string, error) {
			return status(unix.FcntlFlock(uintptr(k.fd(0)), fOFDSetlk, k.flock()))
		},
		"getlk": func(k *call) (string, error) {
			l := k.flock()
			if err := unix.FcntlFlock(uintptr(k.fd(0)), fOFDGetlk, l); err != nil {
				return "", err
			}
			if l.Type == unix.F_UNLCK {
				return "free", nil
			}
			return fmt.Sprintf("%s %d %d", map[int16]string{unix.F_RDLCK: "read", unix.F_WRLCK: "write"}[l.Type], l.Start, l.Len), nil
		},

		// Handles.
		"handle": func(k *call) (string, error) {
			h, _, err := unix.NameToHandleAt(cwd, k.arg(0), 0)
			if err == nil {
				k.handles[k.as] = h
			}
			return "", err
		},
		"openhandle": func(k *call) (string, error) {
			return k.keep(unix.OpenByHandleAt(k.worker.dir, k.handles[k.arg(0)], flags(k.opt(1, "0"), openFlags)|unix.O_CLOEXEC))
		},
	}
}

const (
	fOFDGetlk = 36
	fOFDSetlk = 37
)

// flock is the lock in the arguments after the descriptor: read, write or
// unlock, start, length.
func (k *call) flock() *unix.Flock_t {
	return &unix.Flock_t{
		Type:   map[string]int16{"read": unix.F_RDLCK, "write": unix.F_WRLCK, "unlock": unix.F_UNLCK}[k.arg(1)],
		Whence: 0, Start: k.num(2), Len: k.num(3),
	}
}

func (k *call) make(kind, name string) error {
	switch kind {
	case "dir":
		return unix.Mkdirat(cwd, name, 0o755)
	case "full": // a directory with something in it
		if err := unix.Mkdirat(cwd, name, 0o755); err != nil {
			return err
		}
		return unix.Mkdirat(cwd, name+"/in", 0o755)
	case "sym":
		return unix.Symlinkat("nowhere", cwd, name)
	case "chr", "blk":
		return unix.Mknodat(cwd, name, fileType(kind)|0o644, int(unix.Mkdev(1, 3)))
	}
	return unix.Mknodat(cwd, name, fileType(kind)|0o644, 0)
}

func (k *call) chown(f int) error {
	return unix.Fchownat(cwd, k.arg(0), id(k.arg(1), false), id(k.arg(2), true), f)
}

// times reads access and modification time: seconds.nanoseconds, now or omit.
func (k *call) times(i int) []unix.Timespec {
	var ts []unix.Timespec
	for _, s := range []string{k.arg(i), k.arg(i + 1)} {
		switch s {
		case "now":
			ts = append(ts, unix.Timespec{Nsec: unix.UTIME_NOW})
		case "omit":
			ts = append(ts, unix.Timespec{Nsec: unix.UTIME_OMIT})
		default:
			sec, nsec, _ := strings.Cut(s, ".")
			if nsec == "" {
				nsec = "0"
			}
			ns, err := strconv.ParseInt(nsec, 10, 64) // not a fraction: 5.7 is 5 s and 7 ns
			if err != nil {
				panic(err.Error())
			}
			ts = append(ts, unix.Timespec{Sec: number(sec), Nsec: ns})
		}
	}
	return ts
}

// faccessat is the system call, which the library's function only imitates.
func faccessat(path string, mode, f int) error {
	p, err := unix.BytePtrFromString(path)
	if err != nil {
		return err
	}
	at := cwd
	_, _, e := unix.Syscall6(unix.SYS_FACCESSAT2, uintptr(at), uintptr(unsafe.Pointer(p)), uintptr(mode), uintptr(f), 0, 0)
	if e != 0 {
		return e
	}
	return nil
}

func setGroups(groups []uint32) error {
	var p unsafe.Pointer
	if len(groups) > 0 {
		p = unsafe.Pointer(&groups[0])
	}
	if _, _, e := syscall.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(p), 0); e != 0 {
		return e
	}
	return nil
}

func list(dir string) (string, error) {
	fd, err := unix.Openat(cwd, dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var names []string
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.ReadDirent(fd, buf)
		if err != nil {
			return "", err
		}
		if n == 0 {
			break
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
	sort.Strings(names)
	return strings.Join(names, " "), nil
}

func listxattr(path string) (string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return "", err
	}
	var names []string
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		// What a security module or xfs adds of its own is not the table's.
		if name != "" && name != "security.selinux" && !strings.HasPrefix(name, "trusted.SGI_") {
			names = append(names, name)
		}
	}
	sort.Strings(names)
	return strings.Join(names, " "), nil
}

// statx is stat with everything: it is always asked of the file system.
func statx(dir int, path string, f int) (*unix.Statx_t, error) {
	var st unix.Statx_t
	err := unix.Statx(dir, path, f, unix.STATX_BASIC_STATS, &st)
	return &st, err
}

func stamp(t unix.StatxTimestamp) string { return fmt.Sprintf("%d.%d", t.Sec, t.Nsec) }

// stat compares each of the statement's arguments after the first, key and
// value with =, !=, < or > between, with what there is.
func (k *call) stat(st *unix.Statx_t, err error) (string, error) {
	if err != nil {
		return "", err
	}
	names := map[uint16]string{}
	for name, t := range fileTypes {
		names[uint16(t)] = name
	}
	for _, arg := range k.args[1:] {
		at := strings.IndexAny(arg, "=<>!")
		if at < 0 {
			panic("no comparison in " + arg)
		}
		key, op, want := arg[:at], arg[at:at+1], arg[at+1:]
		if op == "!" {
			want = want[1:]
		}
		k.more++
		var got string
		switch key {
		case "type":
			got = names[st.Mode&unix.S_IFMT]
		case "mode":
			got, want = fmt.Sprintf("%#o", st.Mode&0o7777), fmt.Sprintf("%#o", number(want))
		case "nlink":
			got = strconv.Itoa(int(st.Nlink))
		case "uid":
			got, want = strconv.Itoa(int(st.Uid)), strconv.Itoa(id(want, false))
		case "gid":
			got, want = strconv.Itoa(int(st.Gid)), strconv.Itoa(id(want, true))
		case "size":
			got = strconv.FormatUint(st.Size, 10)
		case "blocks":
			got = strconv.FormatUint(st.Blocks, 10)
		case "rdev":
			got = fmt.Sprintf("%d:%d", st.Rdev_major, st.Rdev_minor)
		case "atime":
			got = stamp(st.Atime)
		case "mtime":
			got = stamp(st.Mtime)
		case "ctime":
			got = stamp(st.Ctime)
		default:
			panic("no attribute " + key)
		}
		var ok bool
		switch op {
		case "=":
			ok = got == want
		case "!":
			ok = got != want
		case "<":
			ok = number(got) < number(want)
		case ">":
			ok = number(got) > number(want)
		}
		if !ok {
			return "", mismatch(fmt.Sprintf("got %s=%s, want %s", key, got, arg))
		}
	}
	return "", nil
}

// times are those of an inode: access, modification and change.
type times map[byte]string

func timesOf(path string) (times, int64, error) {
	st, err := statx(cwd, path, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return nil, 0, err
	}
	at := max(st.Mtime.Sec*1e9+int64(st.Mtime.Nsec), st.Ctime.Sec*1e9+int64(st.Ctime.Nsec))
	return times{'a': stamp(st.Atime), 'm': stamp(st.Mtime), 'c': stamp(st.Ctime)}, at, nil
}

// mark remembers the times of objects, and returns when a change would show in them.
func (k *call) mark(paths ...string) error {
	for _, p := range paths {
		ts, at, err := timesOf(p)
		if err != nil {
			return err
		}
		k.marks[p] = ts
		// File systems of the kernel stamp with a clock that moves every few milliseconds.
		for {
			var now unix.Timespec
			if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &now); err != nil {
				return err
			}
			if at > time.Now().Add(time.Hour).UnixNano() || now.Nano() > at {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
	return nil
}

// moved compares the times of an object with those that were remembered: want
// has the letters of those that must be different, "-" if none. All others must be
// the same; a "?" in want excepts the access time.
func (k *call) moved(path, want string) error {
	old := k.marks[path]
	if old == nil {
		panic("not marked: " + path)
	}
	now, _, err := timesOf(path)
	if err != nil {
		return err
	}
	got := ""
	for _, c := range []byte("amc") {
		if c == 'a' && strings.Contains(want, "?") {
			continue
		}
		k.more++
		if now[c] != old[c] {
			got += string(c)
		}
	}
	if w := strings.Trim(want, "-?"); got != w {
		return mismatch(fmt.Sprintf("the times that changed are %q, want %q", got, w))
	}
	return k.mark(path)
}

// Flags of FS_IOC_SETFLAGS that the table knows, by lsattr's letter.
var inodeFlags = map[byte]int{'i': 0x10, 'a': 0x20, 'A': 0x80, 'd': 0x40, 'S': 0x08, 'c': 0x04}

func (k *call) inodeFlags(path string) (fd, f int, err error) {
	fd, err = unix.Openat(cwd, path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, 0, err
	}
	f, err = unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	if err != nil {
		unix.Close(fd)
		return -1, 0, err
	}
	return fd, int(uint32(f)), nil
}

// chattr changes flags: +i, -ai.
func (k *call) chattr(path, change string) error {
	fd, f, err := k.inodeFlags(path)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, c := range []byte(change[1:]) {
		bit, ok := inodeFlags[c]
		if !ok {
			panic("no flag " + string(c))
		}
		if f &^= bit; change[0] == '+' {
			f |= bit
		}
	}
	return unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, f)
}

func (k *call) lsattr(path string) (string, error) {
	fd, f, err := k.inodeFlags(path)
	if err != nil {
		return "", err
	}
	unix.Close(fd)
	var set []byte
	for c, bit := range inodeFlags {
		if f&bit != 0 {
			set = append(set, c)
		}
	}
	slices.Sort(set)
	if set == nil {
		return "-", nil
	}
	return string(set), nil
}

func (k *call) statfs() (string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(k.arg(0), &st); err != nil {
		return "", err
	}
	for _, want := range []struct {
		what string
		ok   bool
	}{
		{"names of 255 bytes", st.Namelen == 255},
		{"a block size", st.Bsize >= 512 && st.Frsize >= 512},
		{"no more free than there is", st.Bfree <= st.Blocks && st.Bavail <= st.Bfree && st.Blocks > 0},
		{"no more free inodes than there are", st.Ffree <= st.Files},
	} {
		k.more++
		if !want.ok {
			return "", mismatch(fmt.Sprintf("want %s, got %+v", want.what, st))
		}
	}
	return "", nil
}

var aclTags = map[string]uint16{"u:": 1, "u": 2, "g:": 4, "g": 8, "m:": 16, "o:": 32}

// encodeACL makes the value of an ACL's attribute of u::rwx,u:alice:r--,….
func encodeACL(text string) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	if text == "" {
		return b
	}
	for entry := range strings.SplitSeq(text, ",") {
		part := strings.Split(entry, ":")
		if len(part) != 3 {
			panic("no entry of an ACL: " + entry)
		}
		tag, who := aclTags[part[0]], uint32(1<<32-1)
		if part[1] == "" {
			tag = aclTags[part[0]+":"]
		} else {
			who = uint32(id(part[1], part[0] == "g"))
		}
		var perm uint16
		for i, c := range "rwx" {
			if strings.ContainsRune(part[2], c) {
				perm |= 4 >> i
			}
		}
		b = binary.LittleEndian.AppendUint16(b, tag)
		b = binary.LittleEndian.AppendUint16(b, perm)
		b = binary.LittleEndian.AppendUint32(b, who)
	}
	return b
}

func decodeACL(b []byte) string {
	if len(b) < 4 {
		return fmt.Sprintf("%x", b)
	}
	var entries []string
	for b = b[4:]; len(b) >= 8; b = b[8:] {
		tag, perm, who := binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint16(b[2:]), binary.LittleEndian.Uint32(b[4:])
		name := "?"
		for n, t := range aclTags {
			if t == tag {
				name = n
			}
		}
		if !strings.HasSuffix(name, ":") {
			what := strconv.Itoa(int(who))
			for n, u := range users {
				if tag == 2 && u.uid == int(who) || tag == 8 && u.gid == int(who) {
					what = n
				}
			}
			if tag == 8 && who == staff {
				what = "staff"
			}
			name += ":" + what
		}
		rwx := []byte("---")
		for i, c := range []byte("rwx") {
			if perm&(4>>i) != 0 {
				rwx[i] = c
			}
		}
		entries = append(entries, name+":"+string(rwx))
	}
	return strings.Join(entries, ",")
}
