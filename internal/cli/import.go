package cli

import (
	"context"
	"fmt"
	"path/filepath"
	"sync/atomic"

	"github.com/spf13/cobra"

	"mortar/internal/gluster"
	"mortar/internal/mountinfo"
)

const importHelp = `Bring the tree of a GlusterFS volume over, and compare it. SOURCE is a directory on
this machine: a mount of the volume, or one of its bricks. TARGET is a directory in a mount of
a volume of mortar's, /mnt/wp for instance.

Owners, modes, times (to the nanosecond), extended attributes and ACLs, hard links,
symbolic links, devices, pipes, sockets and holes stay as they are. What GlusterFS
keeps of its own in a brick (.glusterfs, trusted.* attributes of its, pointers of
distribution) stays behind. Of a distributed volume, import one brick of each
replica set, one after the other, into the same TARGET; or a mount.

It may be interrupted and begun again: a file gets its name when it is complete, and what is
complete is not copied again. What is newer in TARGET is left alone. In the end
everything is compared: attributes, and contents by their SHA-256. What differs, or was
changed meanwhile, is told, and the exit status is 1.
`

func newImport(a *app) *cobra.Command {
	c := verb("gluster <SOURCE> <TARGET>", "bring a GlusterFS volume's files over, from a mount or a brick", 2, 2, a.importGluster)
	c.Long = importHelp
	return noun("import", "files of other systems", c)
}

func (a *app) importGluster(ctx context.Context, args []string) error {
	source, err := filepath.Abs(args[0])
	if err != nil {
		return err
	}
	target, err := filepath.Abs(args[1])
	if err != nil {
		return err
	}
	mounts, err := mountinfo.Self()
	if err != nil {
		return err
	}
	if m := mountinfo.Under(mounts, target); m == nil || !m.Ours() {
		return fmt.Errorf("%s is not in a mount of mortar's: \"mortar mount HOST:/VOLUME DIR\" first, and import to a directory in it", target)
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
		r, err = gluster.Import(ctx, gluster.Config{Source: source, Target: target, Progress: func(now gluster.Report) {
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
