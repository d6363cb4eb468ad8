package dockervol

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mortar/internal/disk"
	"mortar/internal/mountinfo"
)

// Kernel is what the driver asks of the kernel.
type Kernel interface {
	// Mounts are the mount points of mortar's on this machine; it asks none of them.
	Mounts() (map[string]bool, error)
	// Lives reports whether the mount at dir has a process.
	Lives(dir string) bool
	// Prepare makes dir a place to mount at, in which nobody can write until then.
	Prepare(dir string) error
	// Unmount ends the mount at dir, and removes dir.
	Unmount(dir string) error
	// Shows says why the process with that id does not see the mount at dir; 0 is nobody.
	Shows(pid int, dir string) error
	// Process names a process so that no other is called the same, empty if it is
	// not to be seen; Gone reports whether it has ended.
	Process(pid int) string
	Gone(process string) bool
	// Elsewhere reports whether what is mounted at dir is mounted in any other
	// place, too, by any process's account: as containers have it.
	Elsewhere(dir string) (bool, error)
}

// Linux is the kernel of this machine, as this process sees it.
type Linux struct{ Log *slog.Logger }

var _ Kernel = Linux{}

// patience is how long a mount may take to show that its process lives. One
// whose pool does not answer says nothing, and lives.
const patience = 2 * time.Second

// ours are the mount points of mortar's among mounts.
func ours(mounts []mountinfo.Mount) map[string]bool {
	all := map[string]bool{}
	for _, m := range mounts {
		if m.Ours() {
			all[m.Dir] = true
		}
	}
	return all
}

// Mounts implements Kernel.
func (k Linux) Mounts() (map[string]bool, error) {
	mounts, err := mountinfo.Self()
	return ours(mounts), err
}

// Lives implements Kernel.
func (k Linux) Lives(dir string) bool {
	answer := make(chan error, 1)
	go func() { // ends at the latest with the mount
		// Attributes the kernel may have kept; room it asks for each time.
		var st unix.Statfs_t
		answer <- unix.Statfs(dir, &st)
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case err := <-answer:
		return !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED)
	case <-timer.C:
		return true
	}
}

// Prepare implements Kernel.
func (k Linux) Prepare(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o711); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := disk.SetImmutable(dir, true); err != nil {
		k.Log.Debug("the mount point cannot be made immutable; it is removed when it is not in use", "dir", dir, "error", err)
	}
	return nil
}

// Unmount implements Kernel.
func (k Linux) Unmount(dir string) error {
	for {
		err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			// Somebody on this machine stands in it. He may stay; nobody else comes.
			err = unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // nothing is mounted, any more
			break
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
	}
	if err := disk.SetImmutable(dir, false); err != nil && !errors.Is(err, fs.ErrNotExist) {
		k.Log.Debug("the mount point stays immutable", "dir", dir, "error", err)
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		k.Log.Warn("the mount point stays", "dir", dir, "error", err)
	}
	return nil
}

// Shows implements Kernel.
func (k Linux) Shows(pid int, dir string) error {
	if pid == 0 {
		return nil
	}
	mounts, err := mountinfo.Of(pid)
	if err != nil || ours(mounts)[dir] {
		return nil // who asked may have ended
	}
	return fmt.Errorf("the engine (process %d) does not see the mount at %s, and would give containers an empty directory: it runs in another mount namespace than mortar; "+
		"have both see the machine's mounts (of systemd's settings PrivateMounts, PrivateTmp and ProtectSystem separate them, in either unit)", pid, dir)
}

// Process implements Kernel.
func (k Linux) Process(pid int) string {
	if pid == 0 {
		return ""
	}
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return ""
	}
	// The name, in parentheses, may have anything in it. The 22nd field is the time of its start.
	f := strings.Fields(string(raw[strings.LastIndexByte(string(raw), ')')+1:]))
	if len(f) < 20 {
		return ""
	}
	return strconv.Itoa(pid) + "@" + f[19]
}

// Gone implements Kernel.
func (k Linux) Gone(process string) bool {
	pid, _, _ := strings.Cut(process, "@")
	n, err := strconv.Atoi(pid)
	return err == nil && k.Process(n) != process
}

// Elsewhere implements Kernel.
func (k Linux) Elsewhere(dir string) (bool, error) {
	mounts, err := mountinfo.Self()
	if err != nil {
		return false, err
	}
	device := deviceAt(mounts, dir)
	if device == "" {
		return false, nil
	}
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return false, err
	}
	seen := map[string]bool{} // mount namespaces
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		ns, err := os.Readlink(filepath.Join("/proc", p.Name(), "ns/mnt"))
		if err != nil || seen[ns] {
			continue // it has ended, or is a zombie
		}
		mounts, err := mountinfo.Of(pid)
		if err != nil {
			continue
		}
		seen[ns] = true
		if shownElsewhere(mounts, device, dir) {
			return true, nil
		}
	}
	return false, nil
}

// deviceAt is the device of what is mounted at dir, on top.
func deviceAt(mounts []mountinfo.Mount, dir string) (device string) {
	for _, m := range mounts {
		if m.Dir == dir {
			device = m.Device
		}
	}
	return device
}

// shownElsewhere reports whether the device is mounted at another place than dir.
func shownElsewhere(mounts []mountinfo.Mount, device, dir string) bool {
	return slices.ContainsFunc(mounts, func(m mountinfo.Mount) bool { return m.Device == device && m.Dir != dir })
}
