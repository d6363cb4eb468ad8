package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// lockState makes the state directory and takes it for this process, whose life has the
// number boot. The lock ends with the returned file, or with the process. former is
// the number of the life before it, 0 if none is known.
func lockState(dir string, boot uint64) (_ *os.File, former uint64, _ error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, 0, fmt.Errorf("state directory: %w", err)
	}
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, 0, fmt.Errorf("state directory: %w", err)
	}
	for deadline := time.Now().Add(dying); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, 0, fmt.Errorf("locking %s: %w", path, err)
		}
		pid, _ := holder(f)
		if pid != "" && ended(pid) && time.Now().Before(deadline) {
			continue
		}
		f.Close()
		who := "another mortar daemon"
		if pid != "" {
			who += " (pid " + pid + ")"
		}
		return nil, 0, fmt.Errorf("%s already runs on %s: stop it first, or give this one its own --state-dir", who, dir)
	}
	_, former = holder(f)
	f.Truncate(0)
	f.WriteAt(fmt.Appendf(nil, "%d\n%x\n", os.Getpid(), boot), 0)
	return f, former, nil
}

// dying is how long a daemon waits for one that was killed to let go: a process
// is gone for whoever waits for it, or a zombie, while a thread of it that waits
// for the disk still has its files open.
const dying = 10 * time.Second

// holder is the process that the lock file names, and its life; empty and 0 if none.
func holder(f *os.File) (pid string, life uint64) {
	var b [64]byte
	n, _ := f.ReadAt(b[:], 0)
	pid, rest, _ := strings.Cut(string(b[:n]), "\n")
	life, _ = strconv.ParseUint(strings.TrimSpace(rest), 16, 64)
	return pid, life
}

// ended reports whether a process runs no more, though threads of it may.
func ended(pid string) bool {
	stat, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	// The state follows the name, which is in parentheses and may contain any.
	_, rest, _ := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " ")
	return strings.HasPrefix(rest, "Z") || strings.HasPrefix(rest, "X")
}

// listenUnix makes a socket at path, only for this user and, with share, for
// the group mortar where there is one. What a daemon that died has left there is
// replaced; anything else, a symbolic link above all, is not touched.
func listenUnix(path string, share bool) (net.Listener, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if fi, err := os.Lstat(dir); err != nil {
		return nil, err
	} else if !fi.IsDir() {
		return nil, fmt.Errorf("%s is not a directory: refused", dir)
	}
	switch fi, err := os.Lstat(path); {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	case fi.Mode().Type() != os.ModeSocket:
		return nil, fmt.Errorf("%s exists and is no socket: refused; remove it", path)
	default:
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return nil, fmt.Errorf("another daemon listens on %s: give this one its own --run-dir", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	// The umask is the process's: instead, the socket is born under another
	// name in a directory of its own and moved when its mode is right.
	birth, err := os.MkdirTemp(dir, ".new-*")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(birth)
	temp := filepath.Join(birth, "s")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: temp, Net: "unix"})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false)
	mode := os.FileMode(0o600)
	if share && os.Geteuid() == 0 {
		if g, err := user.LookupGroup("mortar"); err == nil {
			if gid, err := strconv.Atoi(g.Gid); err == nil && os.Lchown(temp, 0, gid) == nil {
				mode = 0o660
			}
		}
	}
	err = os.Chmod(temp, mode)
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		ln.Close()
		return nil, err
	}
	return &unixListener{Listener: ln, path: path}, nil
}

// unixListener removes its socket when it is closed.
type unixListener struct {
	net.Listener
	path string
}

func (l *unixListener) Close() error {
	os.Remove(l.path)
	return l.Listener.Close()
}

// peerUID is the user at the other end of a unix socket; ok is false for any
// other connection.
func peerUID(c net.Conn) (uid uint32, ok bool) {
	uc, isUnix := c.(*net.UnixConn)
	if !isUnix {
		return 0, false
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return 0, false
	}
	err = raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			uid, ok = cred.Uid, true
		}
	})
	return uid, ok && err == nil
}

// trusted reports whether the process at the other end of a unix socket may do
// everything: root, and whoever runs the daemon.
func trusted(c net.Conn) bool {
	uid, ok := peerUID(c)
	return ok && (uid == 0 || uid == uint32(os.Geteuid()))
}
