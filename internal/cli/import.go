package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"mortar/internal/daemon"
	"mortar/internal/gluster"
	"mortar/internal/mountinfo"
)

const importHelp = `Bring the tree of a GlusterFS volume over, and compare it. SOURCE is a directory on
this machine: a mount of the volume, or one of its bricks, which may be written HOST:/BRICK as
GlusterFS does. A brick is read on its own machine only.

TARGET is a directory in a mount of a volume of mortar's, /mnt/wp for instance, or
VOLUME[/DIR]: then the volume is mounted for the import, below the daemon's run
directory. DIR has to be there ("mortar subvolume create VOLUME/DIR").

Owners, modes, times (to the nanosecond), extended attributes and ACLs, hard links,
symbolic links, devices, pipes, sockets and holes stay as they are. What GlusterFS
keeps of its own in a brick (.glusterfs, trusted.* attributes of its, pointers of
distribution) stays behind. The times of a brick's files are those that a mount of the volume
shows (features.ctime). Of a distributed volume, import one brick of each
replica set, one after the other, into the same TARGET; or a mount.

It may be interrupted and begun again: a file gets its name when it is complete, and what is
complete is not copied again. What is newer in TARGET is left alone. In the end
everything is compared: attributes, and contents by their SHA-256. What differs, or was
changed meanwhile, is told, and the exit status is 1.
`

func newImport(a *app) *cobra.Command {
	var stateDir string
	c := verb("gluster <SOURCE> <TARGET>", "bring a GlusterFS volume's files over, from a mount or a brick", 2, 2, func(ctx context.Context, args []string) error {
		return a.importGluster(ctx, args[0], args[1], stateDir)
	})
	c.Long = importHelp
	c.Flags().StringVar(&stateDir, "state-dir", daemon.DefaultStateDir, "the state `directory` of the daemon on this machine, to mount VOLUME with")
	return noun("import", "files of other systems", c)
}

// importTarget is where an import writes.
type importTarget struct {
	dir  string // in a mount; empty: the volume is to be mounted
	name string // VOLUME[/DIR]
}

// importTarget reads what the command line says. A directory that is there counts more
// than a volume of the same name.
func (a *app) importTarget(arg string) (to importTarget, err error) {
	if to.dir, err = filepath.Abs(arg); err != nil {
		return to, err
	}
	mounts, err := mountinfo.Self()
	if err != nil {
		return to, err
	}
	if m := mountinfo.Under(mounts, to.dir); m != nil && m.Ours() {
		_, volume, sub, err := parseSource(m.Source)
		to.name = path.Join(volume, sub, strings.TrimPrefix(to.dir, m.Dir))
		return to, err
	}
	volume := !strings.HasPrefix(arg, "/") && !strings.HasPrefix(arg, ".") && !strings.Contains(arg, ":")
	if _, err := os.Lstat(arg); !volume || err == nil {
		return to, fmt.Errorf("%s is not in a mount of mortar's: \"mortar mount HOST:/VOLUME DIR\" first, and import to a directory in it; or name the volume, VOLUME[/DIR]", to.dir)
	}
	to.dir, to.name = "", strings.Trim(path.Clean(arg), "/")
	return to, nil
}

// importSource is the directory that is read. HOST:/BRICK is one if HOST is this machine.
func importSource(ctx context.Context, arg string, to importTarget) (string, error) {
	host, brick, ok := strings.Cut(arg, ":/")
	if _, err := os.Lstat(arg); err == nil || !ok || host == "" || strings.Contains(host, "/") {
		return filepath.Abs(arg)
	}
	brick = "/" + brick
	here, err := isThisMachine(ctx, host)
	if err != nil || here {
		return brick, err
	}
	return "", fmt.Errorf("%s is another machine, and a brick is read where it is. Run there:\n  mortar import gluster %s %s\n"+
		"If %s is a volume and not a brick, mount it here, and import that directory:\n  mount -t glusterfs %s DIR", host, brick, to.name, brick, arg)
}

// isThisMachine reports whether a name leads here.
func isThisMachine(ctx context.Context, host string) (bool, error) {
	if name, err := os.Hostname(); err == nil && host == name || host == "localhost" {
		return true, nil
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", strings.Trim(host, "[]"))
	if err != nil {
		return false, fmt.Errorf("%s: %w", host, err)
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(own, func(o net.Addr) bool {
		p, err := netip.ParsePrefix(o.String())
		return err == nil && slices.ContainsFunc(addrs, func(h netip.Addr) bool { return h.Unmap() == p.Addr().Unmap() || h.IsLoopback() })
	}), nil
}

// mountFor mounts a volume for an import. One at a time has it: who is killed leaves a mount
// at a place of its own, which the next one takes away.
func (a *app) mountFor(ctx context.Context, name, stateDir string) (dir string, undo func() error, err error) {
	runDir := filepath.Dir(a.socket)
	dir = filepath.Join(runDir, "import", url.PathEscape(name))
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return "", nil, err
	}
	lock, err := os.OpenFile(dir+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return "", nil, err
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return "", nil, fmt.Errorf("another import into %s is under way on this machine", name)
	}
	there, err := mounted(dir)
	if err == nil && there {
		err = unix.Unmount(dir, 0)
	}
	if err == nil {
		err = os.Mkdir(dir, 0o700)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return "", nil, fmt.Errorf("%s, where %s is to be mounted: %w", dir, name, err)
	}
	self, err := os.Executable()
	if err != nil {
		return "", nil, err
	}
	cmd := exec.CommandContext(ctx, self, "mount", "localhost:/"+name, dir, "--state-dir", stateDir, "--run-dir", runDir)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", nil, errors.Join(errors.New(strings.TrimSpace(string(out))), os.Remove(dir))
	}
	return dir, func() error {
		defer lock.Close()
		if err := unix.Unmount(dir, 0); err != nil {
			return fmt.Errorf("%s stays mounted: %w", dir, err)
		}
		return os.Remove(dir)
	}, nil
}

func (a *app) importGluster(ctx context.Context, from, into, stateDir string) (err error) {
	to, err := a.importTarget(into)
	if err != nil {
		return err
	}
	source, err := importSource(ctx, from, to)
	if err != nil {
		return err
	}
	target := to.dir
	if target == "" {
		var undo func() error
		if target, undo, err = a.mountFor(ctx, to.name, stateDir); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, undo()) }()
	}
	var latest atomic.Pointer[gluster.Report]
	latest.Store(new(gluster.Report))
	var r *gluster.Report
	err = a.While(func() string {
		l := latest.Load()
		if l.Verify {
			return fmt.Sprintf("comparing: %d of %d", l.Verified, l.Entries)
		}
		return fmt.Sprintf("%d names, %d copied, %.1f MB", l.Entries, l.Copied, float64(l.Bytes)/1e6)
	}, func() (err error) {
		r, err = gluster.Import(ctx, gluster.Config{Source: source, Target: target, State: gluster.DefaultState, Progress: func(now gluster.Report) {
			now.Problems = nil
			latest.Store(&now)
		}})
		return err
	})
	if err != nil {
		return fmt.Errorf("%w\nIt is not finished. The same command goes on where it was", err)
	}
	err = a.Show(r, func() {
		for _, p := range r.Problems {
			a.Printf("%s: %s", p.Path, p.What)
		}
		a.Printf("%d names, %d copied (%.1f MB), %d compared and equal, %d problems", r.Entries, r.Copied, float64(r.Bytes)/1e6, r.Verified, len(r.Problems))
	})
	if err == nil && len(r.Problems) > 0 {
		err = &shownError{fmt.Errorf("%d problems", len(r.Problems))}
	}
	return err
}
