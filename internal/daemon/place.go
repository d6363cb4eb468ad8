package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"mortar/internal/api"
	"mortar/internal/mountinfo"
)

// place is a directory that shall become a brick, and the questions that can be
// asked of it only on its own machine. The sentences are gluster's.
type place struct {
	host  string // as the user wrote it
	path  string
	force bool   // accept what is merely unwise
	state string // the daemon's own directory
}

func refuse(format string, args ...any) error { return api.Errorf(api.Invalid, format, args...) }

// checkPath says what is wrong with path as the path of a brick, wherever it is.
func checkPath(path string) error {
	switch {
	case !filepath.IsAbs(path):
		return refuse("Wrong brick type: %s, use <HOSTNAME>:<export-dir-abs-path>", path)
	case len(path) > 3800: // room for what is below it
		return refuse("The path of a brick can have 3800 bytes, this has %d", len(path))
	case strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return refuse("The path %q has control characters in it", path)
	case filepath.Clean(path) == "/":
		return refuse("The root directory cannot be a brick. Please use a sub-directory of a disk of its own.")
	}
	return nil
}

// check looks at the place and changes nothing.
func (p place) check() error {
	if err := checkPath(p.path); err != nil {
		return err
	}
	path := filepath.Clean(p.path)
	if inside(path, p.state) || inside(p.state, path) {
		return refuse("Brick isn't allowed to be created inside mortar's working directory.")
	}
	fi, err := os.Lstat(path)
	switch {
	case err == nil && fi.Mode().Type() == os.ModeSymlink:
		return refuse("The provided path %s is a symbolic link. Please give the directory that it points to.", p.path)
	case err == nil && !fi.IsDir():
		return refuse("The provided path %s which is already present, is not a directory", p.path)
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return p.failed(err)
	}
	if isBrick(path) {
		return refuse("%s is already part of a volume", p.path)
	}
	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		if isBrick(dir) {
			return refuse("parent directory %s is already part of a volume", dir)
		}
		if dir == "/" {
			break
		}
	}
	if p.force {
		return nil
	}
	const override = "Or use 'force' at the end of the command if you want to override this behavior."
	parent, err := nearest(path)
	if err != nil {
		return p.failed(err)
	}
	st, err := statx(parent)
	if err != nil {
		return p.failed(err)
	}
	root, err := statx("/")
	if err != nil {
		return p.failed(err)
	}
	switch {
	case parent == path && st.mountPoint:
		return refuse("The brick %s:%s is a mount point. Please create a sub-directory under the mount point and use that as the brick directory. %s", p.host, p.path, override)
	case st.device == root.device:
		return refuse("The brick %s:%s is being created in the root partition. It is recommended that you don't use the system's root partition for storage backend. %s", p.host, p.path, override)
	}
	above := parent
	if above == path {
		above = filepath.Dir(path)
	}
	if fi, err := os.Stat(above); err == nil && fi.Mode().Perm()&0o002 != 0 && fi.Mode()&os.ModeSticky == 0 {
		return refuse("The brick %s:%s is in %s, where every user can replace it. Please use a directory that only root can write to. %s", p.host, p.path, above, override)
	}
	return nil
}

// make creates the directory; made is the topmost one that did not exist, "" if all did.
func (p place) make() (made string, err error) {
	path := filepath.Clean(p.path)
	there, err := nearest(path)
	if err != nil {
		return "", p.failed(err)
	}
	if there == path {
		return "", nil
	}
	rest := strings.TrimPrefix(strings.TrimPrefix(path, there), "/")
	first, _, _ := strings.Cut(rest, "/")
	if err := os.MkdirAll(path, 0o755); err != nil {
		return "", p.failed(err)
	}
	return filepath.Join(there, first), nil
}

func (p place) failed(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return refuse("Failed to create brick directory for brick %s:%s. Reason : %v ", p.host, p.path, err)
}

// inside reports whether path is dir or below it.
func inside(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// nearest is path, or the nearest directory above it that exists.
func nearest(path string) (string, error) {
	for {
		_, err := os.Stat(path)
		if err == nil || path == "/" {
			return path, err
		}
		if !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
		path = filepath.Dir(path)
	}
}

// isBrick reports whether dir has been made a brick, of whatever volume.
func isBrick(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, ".mortar", "brick.json"))
	return err == nil
}

// spot is where in the machine's file systems a directory is.
type spot struct {
	device     uint64
	mountPoint bool
}

func statx(path string) (spot, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_BASIC_STATS, &st); err != nil {
		return spot{}, &os.PathError{Op: "statx", Path: path, Err: err}
	}
	s := spot{device: uint64(st.Dev_major)<<32 | uint64(st.Dev_minor)}
	if st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		s.mountPoint = st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
		return s, nil
	}
	// Linux before 5.8: a mount point is what its parent's file system has not.
	var up unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, filepath.Dir(path), 0, unix.STATX_BASIC_STATS, &up); err != nil {
		return spot{}, &os.PathError{Op: "statx", Path: filepath.Dir(path), Err: err}
	}
	s.mountPoint = path == "/" || up.Dev_major != st.Dev_major || up.Dev_minor != st.Dev_minor
	return s, nil
}

// diskStatus describes the file system under a directory.
func diskStatus(path string) (*api.DiskStatus, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	d := &api.DiskStatus{
		Free:       fs.Bavail * uint64(fs.Bsize),
		Total:      fs.Blocks * uint64(fs.Bsize),
		Inodes:     fs.Files,
		FreeInodes: fs.Ffree,
	}
	mounts, err := mountinfo.Self()
	if err != nil {
		return nil, err
	}
	mountOf(mounts, path, d)
	return d, nil
}

// mountOf fills in what is known of the mount that path is on.
func mountOf(mounts []mountinfo.Mount, path string, d *api.DiskStatus) {
	if m := mountinfo.Under(mounts, path); m != nil {
		d.FileSystem, d.Device, d.MountOptions = m.Type, m.Source, strings.Join(m.Options, ",")
	}
}

// brickName takes HOST:/path apart. An IPv6 host may stand in brackets.
func brickName(s string) (host, path string, err error) {
	host, path, ok := strings.Cut(s, ":/")
	if !ok || host == "" {
		return "", "", refuse("Wrong brick type: %s, use <HOSTNAME>:<export-dir-abs-path>", s)
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	path = filepath.Clean("/" + path)
	if err := checkPath(path); err != nil {
		return "", "", err
	}
	if err := checkName(host); err != nil {
		return "", "", refuse("internet address '%s' does not conform to standards", fmt.Sprintf("%.100q", host))
	}
	return host, path, nil
}
