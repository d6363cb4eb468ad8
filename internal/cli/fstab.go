package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"mortar/internal/disk"
	"mortar/internal/fstab"
)

// defaultFstab is where mount(8) and systemd look.
const defaultFstab = "/etc/fstab"

// readFstab reads a file that need not exist.
func readFstab(path string) (string, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return string(b), err
}

// writeFstab replaces a file in one step: a machine with half an fstab does not
// come up. A symbolic link stays one.
func writeFstab(path, text string) error {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	mode := fs.FileMode(0o644)
	uid, gid := 0, 0
	if fi, err := os.Stat(path); err == nil {
		mode = fi.Mode().Perm()
		st := fi.Sys().(*syscall.Stat_t)
		uid, gid = int(st.Uid), int(st.Gid)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".fstab-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := io.WriteString(f, text); err != nil {
		return err
	}
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if err := f.Chown(uid, gid); err != nil && os.Getuid() == 0 {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// unitName is what systemd calls the unit of a path, without the suffix.
func unitName(dir string) string {
	dir = strings.Trim(dir, "/")
	if dir == "" {
		return "-"
	}
	var b strings.Builder
	for i := range len(dir) {
		switch c := dir[i]; {
		case c == '/':
			b.WriteByte('-')
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == ':', c == '_', c == '.' && i > 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, `\x%02x`, c)
		}
	}
	return b.String()
}

// systemdReads reports whether systemd runs here, and makes units of the table.
func systemdReads(table string) bool {
	_, err := os.Stat("/run/systemd/system")
	return err == nil && table == defaultFstab
}

// stopAutomount has systemd no longer wait for somebody who looks at dir: else
// whoever does would mount it again.
func (a *app) stopAutomount(table, dir string) {
	if !systemdReads(table) {
		return
	}
	unit := unitName(dir) + ".automount"
	if exec.Command("systemctl", "is-active", "--quiet", unit).Run() != nil {
		return
	}
	if out, err := exec.Command("systemctl", "stop", unit).CombinedOutput(); err != nil {
		a.Errorf("warning: systemctl stop %s: %v: %s", unit, err, strings.TrimSpace(string(out)))
	}
}

// reloadUnits has systemd read the table again, where systemd runs.
func (a *app) reloadUnits(path string) {
	if !systemdReads(path) {
		return
	}
	if out, err := exec.Command("systemctl", "daemon-reload").CombinedOutput(); err != nil {
		a.Errorf("warning: systemctl daemon-reload: %v: %s", err, strings.TrimSpace(string(out)))
	}
}

// prepareMountPoint makes dir a place where nothing can be written as long as
// nothing is mounted there. undo is the way back.
func (a *app) prepareMountPoint(dir string) (undo func(), err error) {
	created := false
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		created = true
	}
	names, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	if len(names) > 0 {
		return nil, fmt.Errorf("%s is not empty: it has %q in it, which nobody would see below the mount; move what is in it away first, into the volume if that is where it belongs", dir, names[0].Name())
	}
	switch err := disk.SetImmutable(dir, true); {
	case errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPERM):
		a.Errorf("warning: %s cannot be made immutable (%v): what is written there while the volume is not mounted ends up on the local disk", dir, err)
	case err != nil:
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return func() {
		disk.SetImmutable(dir, false)
		if created {
			os.Remove(dir)
		}
	}, nil
}

// enableMount mounts with the function it is given, and sees to it that
// it is mounted at each boot.
func (a *app) enableMount(table, source, dir string, options []string, mount func() error) error {
	text, err := readFstab(table)
	if err != nil {
		return err
	}
	text, err = fstab.Add(table, text, fstab.Line(source, dir, options))
	if err != nil {
		return err
	}
	there, err := mounted(dir)
	if err != nil {
		return err
	}
	if there {
		return fmt.Errorf("%s is mounted, so the directory below it cannot be looked after: \"mortar umount %s\" first, this command mounts it again", dir, dir)
	}
	undo, err := a.prepareMountPoint(dir)
	if err != nil {
		return err
	}
	if err := mount(); err != nil {
		undo()
		return err
	}
	if err := writeFstab(table, text); err != nil {
		return fmt.Errorf("%s is mounted, but not at the next boot: %w", dir, err)
	}
	a.reloadUnits(table)
	return a.done("%s is mounted, and will be at each boot (%s)", dir, table)
}

// disableMount takes back what enableMount did, of a directory where nothing is
// mounted any more.
func (a *app) disableMount(table, dir string) error {
	text, err := readFstab(table)
	if err != nil {
		return err
	}
	text, found := fstab.Remove(text, dir)
	if !found {
		return fmt.Errorf("%s has no mount of mortar's at %s", table, dir)
	}
	if err := writeFstab(table, text); err != nil {
		return err
	}
	a.reloadUnits(table)
	if err := disk.SetImmutable(dir, false); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTTY) && !errors.Is(err, unix.EOPNOTSUPP) {
		a.Errorf("warning: %s: %v", dir, err)
	}
	return a.done("%s is not mounted at boot any more", dir)
}
