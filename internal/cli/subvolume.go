package cli

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mortar/internal/api"
	"mortar/internal/cli/ui"
	"mortar/internal/cluster"
)

func newSubvolume(a *app) *cobra.Command {
	return noun("subvolume", "directories of a volume with limits of their own",
		newSubvolumeCreate(a), newSubvolumeList(a), newSubvolumeInfo(a), newSubvolumeResize(a), newSubvolumeRename(a), newSubvolumeDelete(a))
}

// subvolumeName takes VOLUME/NAME apart.
func subvolumeName(s string) (volume, name string, err error) {
	volume, name, ok := strings.Cut(strings.TrimPrefix(s, "/"), "/")
	if !ok || volume == "" || name == "" {
		return "", "", &usageError{text: fmt.Sprintf("%s: want VOLUME/NAME", s)}
	}
	return volume, strings.TrimSuffix(name, "/"), nil
}

// sizeLimit reads a limit in bytes: a size, or none.
func sizeLimit(s string) (uint64, error) {
	if s == "none" {
		return 0, nil
	}
	n, ok := cluster.ParseSize(s)
	if !ok || n <= 0 {
		return 0, &usageError{text: fmt.Sprintf("size %s: want a number of bytes such as 10GB, or none", s)}
	}
	return uint64(n), nil
}

// countLimit reads a limit in inodes: a number, or none.
func countLimit(s string) (uint64, error) {
	if s == "none" {
		return 0, nil
	}
	n, err := strconv.ParseUint(s, 10, 63)
	if err != nil || n == 0 {
		return 0, &usageError{text: fmt.Sprintf("%s: want a number of inodes, or none", s)}
	}
	return n, nil
}

func newSubvolumeCreate(a *app) *cobra.Command {
	var (
		r                  api.SubvolumeCreate
		size, inodes, mode string
	)
	c := verb("create <VOLNAME>/<NAME> [--size <SIZE>] [--inodes <NUMBER>] [--uid <UID>] [--gid <GID>] [--mode <MODE>]", "make a subvolume", 1, 1, func(ctx context.Context, args []string) error {
		volume, name, err := subvolumeName(args[0])
		if err != nil {
			return err
		}
		r.Name = name
		if r.Size, err = sizeLimit(size); err != nil {
			return err
		}
		if r.Inodes, err = countLimit(inodes); err != nil {
			return err
		}
		m, err := strconv.ParseUint(mode, 8, 32)
		if err != nil || m > 0o7777 {
			return &usageError{text: fmt.Sprintf("mode %s: want an octal number, at most 7777", mode)}
		}
		perm := uint32(m)
		r.Mode = &perm
		return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
			s, err := c.CreateSubvolume(ctx, volume, r)
			if err != nil {
				return failed(fmt.Sprintf("subvolume create: %s/%s: failed: ", volume, name), err)
			}
			return a.Show(s, func() { a.Printf("subvolume create: %s/%s: success", volume, s.Name) })
		})
	})
	f := c.Flags()
	f.StringVar(&size, "size", "none", "limit of `bytes`, such as 10GB")
	f.StringVar(&inodes, "inodes", "none", "limit of files, directories and all else: a `number`")
	f.Uint32Var(&r.UID, "uid", 0, "`owner` of its directory")
	f.Uint32Var(&r.GID, "gid", 0, "`group` of its directory")
	f.StringVar(&mode, "mode", "0755", "permissions of its directory, `octal`")
	c.ValidArgsFunction = a.completeVolumes
	return c
}

func newSubvolumeList(a *app) *cobra.Command {
	c := verb("list [<VOLNAME>]", "list subvolumes, with their limits and what they use", 0, 1, func(ctx context.Context, args []string) error {
		return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
			volumes := args
			if len(args) == 0 {
				all, err := c.Volumes(ctx)
				if err != nil {
					return failed("subvolume list: failed: ", err)
				}
				for _, v := range all {
					if v.Status == int(cluster.VolumeStarted) {
						volumes = append(volumes, v.Name)
					}
				}
			}
			list := []api.Subvolume{}
			for _, v := range volumes {
				some, err := c.Subvolumes(ctx, v)
				if err != nil {
					return failed("subvolume list: failed: ", err)
				}
				list = append(list, some...)
			}
			return a.Show(list, func() {
				if len(list) == 0 {
					a.Printf("No subvolumes present")
					return
				}
				now := time.Now()
				var rows [][]string
				for i := range list {
					s := &list[i]
					rows = append(rows, []string{s.Volume + "/" + s.Name, limitText(s.Size), ui.Bytes(s.UsedSize), room(s),
						inodesText(s.Inodes), fmt.Sprint(s.UsedInodes), lastUse(s, now)})
				}
				a.Table([]string{"NAME", "SIZE", "USED", "AVAIL", "INODES", "USED", "LAST USE"}, rows)
			})
		})
	})
	c.ValidArgsFunction = a.completeVolumes
	return c
}

// limitText writes a limit in bytes.
func limitText(n uint64) string {
	if n == 0 {
		return "none"
	}
	return ui.Bytes(n)
}

func inodesText(n uint64) string {
	if n == 0 {
		return "none"
	}
	return fmt.Sprint(n)
}

// room is what may still be written.
func room(s *api.Subvolume) string {
	if s.Size == 0 {
		return "-"
	}
	return ui.Bytes(s.Size - min(s.UsedSize, s.Size))
}

// lastUse says when it was last used; one that is mounted is in use now.
func lastUse(s *api.Subvolume, now time.Time) string {
	if len(s.Users) > 0 {
		return "in use"
	}
	return ago(now.Sub(s.Used))
}

// ago is how long something is over, for people.
func ago(d time.Duration) string {
	switch {
	case d < time.Minute:
		return "now"
	case d < time.Hour:
		return fmt.Sprintf("%dm ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh ago", int(d.Hours()))
	}
	return fmt.Sprintf("%dd ago", int(d.Hours()/24))
}

func newSubvolumeInfo(a *app) *cobra.Command {
	c := verb("info <VOLNAME>/<NAME>", "show all of a subvolume", 1, 1, func(ctx context.Context, args []string) error {
		volume, name, err := subvolumeName(args[0])
		if err != nil {
			return err
		}
		return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
			s, err := c.Subvolume(ctx, volume, name)
			if err != nil {
				return failed("subvolume info: failed: ", err)
			}
			return a.Show(s, func() {
				const day = "2006-01-02 15:04:05"
				a.Printf("Subvolume Name: %s", ui.Clean(s.Name))
				a.Printf("Volume: %s", s.Volume)
				a.Printf("Inode: %d", s.Inode)
				a.Printf("Owner: %d:%d", s.UID, s.GID)
				a.Printf("Mode: %04o", s.Mode)
				a.Printf("Size: %s", limitText(s.Size))
				a.Printf("Used: %s (%d bytes)", ui.Bytes(s.UsedSize), s.UsedSize)
				a.Printf("Available: %s", room(s))
				a.Printf("Inodes: %s", inodesText(s.Inodes))
				a.Printf("Used Inodes: %d", s.UsedInodes)
				a.Printf("Created: %s", s.Created.Local().Format(day))
				a.Printf("Last Use: %s", s.Used.Local().Format(day))
				for _, u := range s.Users {
					where := ui.Clean(u.Client)
					if u.Peer != "" {
						where += " on " + u.Peer
					}
					a.Printf("In Use By: %s", where)
				}
			})
		})
	})
	c.ValidArgsFunction = a.completeSubvolumes
	return c
}

func newSubvolumeResize(a *app) *cobra.Command {
	var size, inodes string
	c := verb("resize <VOLNAME>/<NAME> [<SIZE>] [--size <SIZE>] [--inodes <NUMBER>]", "change the limits of a subvolume", 1, 2, func(ctx context.Context, args []string) error {
		volume, name, err := subvolumeName(args[0])
		if err != nil {
			return err
		}
		if len(args) == 2 {
			if size != "" {
				return errUsage
			}
			size = args[1]
		}
		if size == "" && inodes == "" {
			return &usageError{text: "say the new limit: a size, or --inodes"}
		}
		var r api.SubvolumeChange
		if size != "" {
			n, err := sizeLimit(size)
			if err != nil {
				return err
			}
			r.Size = &n
		}
		if inodes != "" {
			n, err := countLimit(inodes)
			if err != nil {
				return err
			}
			r.Inodes = &n
		}
		return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
			s, err := c.ChangeSubvolume(ctx, volume, name, r)
			if err != nil {
				return failed(fmt.Sprintf("subvolume resize: %s/%s: failed: ", volume, name), err)
			}
			return a.Show(s, func() {
				if s.Size > 0 && s.UsedSize > s.Size || s.Inodes > 0 && s.UsedInodes > s.Inodes {
					a.Errorf("It uses more than that already: nothing can be added until enough is removed.")
				}
				a.Printf("subvolume resize: %s/%s: success", volume, name)
			})
		})
	})
	c.Flags().StringVar(&size, "size", "", "limit of `bytes`, such as 10GB, or none")
	c.Flags().StringVar(&inodes, "inodes", "", "limit of inodes: a `number`, or none")
	c.ValidArgsFunction = a.completeSubvolumes
	return c
}

func newSubvolumeRename(a *app) *cobra.Command {
	c := verb("rename <VOLNAME>/<NAME> <NEW-NAME>", "give a subvolume another name", 2, 2, func(ctx context.Context, args []string) error {
		volume, name, err := subvolumeName(args[0])
		if err != nil {
			return err
		}
		to := args[1]
		if v, rest, ok := strings.Cut(to, "/"); ok && v == volume && !strings.Contains(name, "/") {
			to = rest // the volume may be said again
		}
		return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
			s, err := c.ChangeSubvolume(ctx, volume, name, api.SubvolumeChange{Name: to})
			if err != nil {
				return failed(fmt.Sprintf("subvolume rename: %s/%s: failed: ", volume, name), err)
			}
			return a.Show(s, func() { a.Printf("subvolume rename: %s/%s: success", volume, s.Name) })
		})
	})
	c.ValidArgsFunction = a.completeSubvolumes
	return c
}

func newSubvolumeDelete(a *app) *cobra.Command {
	var force bool
	c := verb("delete <VOLNAME>/<NAME> [force]", "delete a subvolume and everything in it", 1, 2, func(ctx context.Context, args []string) error {
		args, word := flagged(args, "force")
		if len(args) != 1 {
			return errUsage
		}
		volume, name, err := subvolumeName(args[0])
		if err != nil {
			return err
		}
		yes, err := a.Confirm(fmt.Sprintf("Deleting subvolume %s/%s will erase everything in it. Do you want to continue?", volume, name))
		if err != nil || !yes {
			return err
		}
		return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
			if err := c.DeleteSubvolume(ctx, volume, name, force || word); err != nil {
				return failed(fmt.Sprintf("subvolume delete: %s/%s: failed: ", volume, name), err)
			}
			return a.done("subvolume delete: %s/%s: success", volume, name)
		})
	})
	c.Flags().BoolVar(&force, "force", false, "delete it although it is mounted somewhere")
	c.ValidArgsFunction = a.completeSubvolumes
	return c
}

// completeTimeout is how long a shell waits for names.
const completeTimeout = 2 * time.Second

// complete offers for the first argument what list finds within the shell's patience.
func (a *app) complete(args []string, list func(ctx context.Context, c *api.Client) ([]string, error)) []string {
	if len(args) > 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), completeTimeout)
	defer cancel()
	c := api.Unix(a.socket)
	defer c.Close()
	names, err := list(ctx, c)
	if err != nil {
		cobra.CompDebugln(err.Error(), false)
	}
	return names
}

// completeVolumes offers the names of volumes.
func (a *app) completeVolumes(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	directive, suffix := cobra.ShellCompDirectiveNoFileComp, ""
	if cmd.Name() == "create" { // the name of what is to be made follows
		directive, suffix = directive|cobra.ShellCompDirectiveNoSpace, "/"
	}
	names := a.complete(args, func(ctx context.Context, c *api.Client) ([]string, error) {
		vs, err := c.Volumes(ctx)
		var names []string
		for _, v := range vs {
			names = append(names, v.Name+suffix)
		}
		return names, err
	})
	return names, directive
}

// completeSubvolumes offers VOLUME/NAME.
func (a *app) completeSubvolumes(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	names := a.complete(args, func(ctx context.Context, c *api.Client) ([]string, error) {
		vs, err := c.Volumes(ctx)
		var names []string
		for _, v := range vs {
			if v.Status != int(cluster.VolumeStarted) {
				continue
			}
			some, serr := c.Subvolumes(ctx, v.Name)
			err = errors.Join(err, serr)
			for _, s := range some {
				names = append(names, v.Name+"/"+s.Name)
			}
		}
		return names, err
	})
	return names, cobra.ShellCompDirectiveNoFileComp
}
