package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"mortar/internal/disk"
)

// defaultFstab is where mount(8) and systemd look.
const defaultFstab = "/etc/fstab"

// fstabEntry is a line of fstab(5) that mounts something.
type fstabEntry struct {
	line    int // from 1
	source  string
	dir     string
	kind    string
	options []string
}

// has reports whether one of the options is word, or begins with it if it ends in =.
func (e *fstabEntry) has(word string) bool {
	return slices.ContainsFunc(e.options, func(o string) bool {
		return o == word || strings.HasSuffix(word, "=") && strings.HasPrefix(o, word)
	})
}

// ours reports whether mortar mounts it.
func (e *fstabEntry) ours() bool { return e.kind == "mortar" || e.kind == "fuse.mortar" }

// A field of fstab cannot have these in it as they are.
var (
	fstabEscape   = strings.NewReplacer(`\`, `\134`, " ", `\040`, "\t", `\011`, "\n", `\012`, "#", `\043`)
	fstabUnescape = strings.NewReplacer(`\134`, `\`, `\040`, " ", `\011`, "\t", `\012`, "\n", `\043`, "#")
)

// parseFstab returns the entries of a file; lines that are none are left out, as mount(8) does.
func parseFstab(text string) []fstabEntry {
	var all []fstabEntry
	n := 0
	for line := range strings.Lines(text) {
		n++
		f := strings.Fields(line)
		if len(f) < 3 || strings.HasPrefix(f[0], "#") {
			continue
		}
		e := fstabEntry{line: n, source: fstabUnescape.Replace(f[0]), dir: filepath.Clean(fstabUnescape.Replace(f[1])), kind: f[2]}
		if len(f) > 3 {
			e.options = strings.Split(f[3], ",")
		}
		all = append(all, e)
	}
	return all
}

// bootOptions are what an entry has besides what its user wants: the network is
// up and the daemon asked to run before it is mounted. With the automount,
// whoever looks at the directory before that waits, a bind mount of Docker's
// included, in place of seeing it empty. It does not end with the daemon, which may be restarted.
var bootOptions = []string{"_netdev", "x-systemd.automount", "x-systemd.after=mortar.service", "x-systemd.mount-timeout=2min"}

// fstabLine is the entry that mounts source at dir at boot.
func fstabLine(source, dir string, options []string) string {
	var words []string
	for w := range strings.SplitSeq(strings.Join(options, ","), ",") {
		if w != "" && w != "defaults" && !slices.Contains(words, w) {
			words = append(words, w)
		}
	}
	if len(words) == 0 {
		words = []string{"defaults"}
	}
	for _, b := range bootOptions {
		if !slices.Contains(words, b) {
			words = append(words, b)
		}
	}
	return strings.Join([]string{fstabEscape.Replace(source), fstabEscape.Replace(dir), "mortar", fstabEscape.Replace(strings.Join(words, ",")), "0", "0"}, " ") + "\n"
}

// fstabAdd returns text with line at its end. Without a change if it has it
// already; what else is to be mounted at the place is not overridden.
func fstabAdd(path, text, line string) (string, error) {
	want := parseFstab(line)[0]
	for _, e := range parseFstab(text) {
		switch {
		case e.dir != want.dir:
		case e.source == want.source && e.kind == want.kind && slices.Equal(e.options, want.options):
			return text, nil
		default:
			return "", fmt.Errorf("%s, line %d: %s is to be mounted at %s already; take that line out first (\"mortar umount --disable %s\" if it is mortar's)", path, e.line, e.source, e.dir, e.dir)
		}
	}
	if text != "" && !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	return text + line, nil
}

// fstabRemove returns text without mortar's entries for dir, and whether there were any.
func fstabRemove(text, dir string) (string, bool) {
	gone := make(map[int]bool)
	for _, e := range parseFstab(text) {
		if e.ours() && e.dir == dir {
			gone[e.line] = true
		}
	}
	var b strings.Builder
	n := 0
	for line := range strings.Lines(text) {
		if n++; !gone[n] {
			b.WriteString(line)
		}
	}
	return b.String(), len(gone) > 0
}

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

// stopAutomount has systemd no longer wait for somebody who looks at dir: else
// whoever does would mount it again.
func (a *app) stopAutomount(fstab, dir string) {
	if _, err := os.Stat("/run/systemd/system"); err != nil || fstab != defaultFstab {
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
	if _, err := os.Stat("/run/systemd/system"); err != nil || path != defaultFstab {
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
func (a *app) enableMount(fstab, source, dir string, options []string, mount func() error) error {
	text, err := readFstab(fstab)
	if err != nil {
		return err
	}
	text, err = fstabAdd(fstab, text, fstabLine(source, dir, options))
	if err != nil {
		return err
	}
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if mounted(string(raw), dir) {
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
	if err := writeFstab(fstab, text); err != nil {
		return fmt.Errorf("%s is mounted, but not at the next boot: %w", dir, err)
	}
	a.reloadUnits(fstab)
	return a.done("%s is mounted, and will be at each boot (%s)", dir, fstab)
}

// disableMount takes back what enableMount did, of a directory where nothing is
// mounted any more.
func (a *app) disableMount(fstab, dir string) error {
	text, err := readFstab(fstab)
	if err != nil {
		return err
	}
	text, found := fstabRemove(text, dir)
	if !found {
		return fmt.Errorf("%s has no mount of mortar's at %s", fstab, dir)
	}
	if err := writeFstab(fstab, text); err != nil {
		return err
	}
	a.reloadUnits(fstab)
	if err := disk.SetImmutable(dir, false); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTTY) && !errors.Is(err, unix.EOPNOTSUPP) {
		a.Errorf("warning: %s: %v", dir, err)
	}
	return a.done("%s is not mounted at boot any more", dir)
}
