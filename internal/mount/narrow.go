package mount

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Narrow shows a directory of the mounted file system at dir, and the whole of
// it, which was mounted elsewhere for the purpose, nowhere any more. The mount ends
// when dir is unmounted. It is called once, when the Mount is ready.
//
// sub is looked up below the file system's root: no "..", and no symbolic link
// on the way, leads out of it, whoever changes names at the same time.
//
// use, if not nil, is called with the inode number of the directory before dir shows it.
func (m *Mount) Narrow(sub, dir string, use func(ino uint64) error) error {
	root := m.dir()
	at, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", root, err)
	}
	defer unix.Close(at)
	fd, err := unix.Openat2(at, sub, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("directory %q of the volume does not exist: make it in a mount of the whole volume", sub)
		}
		return fmt.Errorf("directory %q of the volume: %w", sub, err)
	}
	defer unix.Close(fd)
	if use != nil {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return fmt.Errorf("directory %q of the volume: %w", sub, err)
		}
		if err := use(st.Ino); err != nil {
			return fmt.Errorf("directory %q of the volume: %w", sub, err)
		}
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", fd), dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %q to %s: %w", sub, dir, err)
	}
	m.dev.placeMu.Lock()
	m.dev.dir = dir
	m.dev.placeMu.Unlock()
	if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", root, err)
	}
	return os.Remove(root)
}
