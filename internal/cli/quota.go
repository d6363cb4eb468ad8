package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"mortar/internal/api"
	"mortar/internal/cli/ui"
)

// newVolumeQuota has gluster's words for the limits of subvolumes. A directory that
// gets a limit becomes a subvolume, with all that is in it.
func newVolumeQuota(a *app) *cobra.Command {
	return verb("quota <VOLNAME> {enable|disable|list [<path> ...]|list-objects [<path> ...]|remove <path>|remove-objects <path>} | "+
		"quota <VOLNAME> {limit-usage <path> <size>|limit-objects <path> <number>}",
		"quota translator specific operations", 2, -1, func(ctx context.Context, args []string) error {
			volume, rest := args[0], args[2:]
			what := word(args[1], "enable", "disable", "list", "list-objects", "remove", "remove-objects", "limit-usage", "limit-objects",
				"default-soft-limit", "alert-time", "soft-timeout", "hard-timeout")
			switch {
			case what == "enable" && len(rest) == 0:
				return a.quota(ctx, func(ctx context.Context, c *api.Client) error {
					_, err := c.Subvolumes(ctx, volume) // limits always count; there is nothing to enable
					return err
				})
			case what == "disable" && len(rest) == 0:
				return a.quotaDisable(ctx, volume)
			case what == "list":
				return a.quotaList(ctx, volume, rest, false)
			case what == "list-objects":
				return a.quotaList(ctx, volume, rest, true)
			case what == "remove" && len(rest) == 1:
				return a.quotaLimit(ctx, volume, rest[0], api.SubvolumeChange{Size: new(uint64)})
			case what == "remove-objects" && len(rest) == 1:
				return a.quotaLimit(ctx, volume, rest[0], api.SubvolumeChange{Inodes: new(uint64)})
			case what == "limit-usage" && (len(rest) == 2 || len(rest) == 3):
				n, err := sizeLimit(rest[1])
				if err != nil {
					return err
				}
				a.noSoftLimit(rest[2:])
				return a.quotaLimit(ctx, volume, rest[0], api.SubvolumeChange{Size: &n, Adopt: true})
			case what == "limit-objects" && (len(rest) == 2 || len(rest) == 3):
				n, err := countLimit(rest[1])
				if err != nil {
					return err
				}
				a.noSoftLimit(rest[2:])
				return a.quotaLimit(ctx, volume, rest[0], api.SubvolumeChange{Inodes: &n, Adopt: true})
			case what == "default-soft-limit", what == "alert-time", what == "soft-timeout", what == "hard-timeout":
				return api.Errorf(api.NotSupported, "quota command failed : %s does not exist here: limits are exact at every moment, and a soft limit is only shown", what)
			}
			return errUsage
		})
}

// softLimit is the part of a limit that lists show as the soft limit, in percent; gluster's default.
const softLimit = 80

func (a *app) noSoftLimit(percent []string) {
	if len(percent) > 0 && strings.TrimSuffix(percent[0], "%") != fmt.Sprint(softLimit) {
		a.Errorf("A soft limit of %s is not kept: lists show %d%%.", percent[0], softLimit)
	}
}

// quota does something and says how it went in gluster's words.
func (a *app) quota(ctx context.Context, do func(ctx context.Context, c *api.Client) error) error {
	return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
		if err := do(ctx, c); err != nil {
			return failed("quota command failed : ", err)
		}
		return a.done("volume quota : success")
	})
}

// quotaPath is the name of the subvolume that a path in the volume means.
func quotaPath(path string) (string, error) {
	if !strings.HasPrefix(path, "/") {
		return "", &usageError{text: fmt.Sprintf("Please enter absolute path: %s", path)}
	}
	name := strings.Trim(path, "/")
	if name == "" {
		return "", api.Errorf(api.NotSupported, "quota command failed : the whole volume has no limit of its own: its bricks' disks are the limit")
	}
	return name, nil
}

func (a *app) quotaLimit(ctx context.Context, volume, path string, r api.SubvolumeChange) error {
	name, err := quotaPath(path)
	if err != nil {
		return err
	}
	return a.quota(ctx, func(ctx context.Context, c *api.Client) error {
		_, err := c.ChangeSubvolume(ctx, volume, name, r)
		return err
	})
}

func (a *app) quotaDisable(ctx context.Context, volume string) error {
	yes, err := a.Confirm("Disabling quota will delete all the quota configuration. Do you want to continue?")
	if err != nil || !yes {
		return err
	}
	return a.quota(ctx, func(ctx context.Context, c *api.Client) error {
		all, err := c.Subvolumes(ctx, volume)
		if err != nil {
			return err
		}
		for _, s := range all {
			if s.Size == 0 && s.Inodes == 0 {
				continue
			}
			if _, err := c.ChangeSubvolume(ctx, volume, s.Name, api.SubvolumeChange{Size: new(uint64), Inodes: new(uint64)}); err != nil && !api.IsCode(err, api.NotFound) {
				return err
			}
		}
		return nil
	})
}

func (a *app) quotaList(ctx context.Context, volume string, paths []string, objects bool) error {
	var names []string
	for _, p := range paths {
		name, err := quotaPath(p)
		if err != nil {
			return err
		}
		names = append(names, name)
	}
	return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
		all, err := c.Subvolumes(ctx, volume)
		if err != nil {
			return failed("quota command failed : ", err)
		}
		list := []api.Subvolume{}
		for _, s := range all {
			limited := s.Size > 0
			if objects {
				limited = s.Inodes > 0
			}
			if limited && (len(names) == 0 || slices.Contains(names, s.Name)) {
				list = append(list, s)
			}
		}
		return a.Show(list, func() {
			if len(list) == 0 {
				a.Printf("quota: No quota configured on volume %s", volume)
				return
			}
			if objects {
				a.quotaTable(list,
					func(s *api.Subvolume) (limit, used uint64) { return s.Inodes, s.UsedInodes },
					func(n uint64) string { return fmt.Sprint(n) })
				return
			}
			a.quotaTable(list,
				func(s *api.Subvolume) (limit, used uint64) { return s.Size, s.UsedSize }, ui.Bytes)
		})
	})
}

// quotaTable prints what scripts parse by the path in front of each row.
func (a *app) quotaTable(list []api.Subvolume, of func(*api.Subvolume) (limit, used uint64), text func(uint64) string) {
	const format = "%-40s %12s %16s %12s %12s %22s %20s"
	head := fmt.Sprintf(format, "                  Path", "Hard-limit", "Soft-limit", "Used", "Available", "Soft-limit exceeded?", "Hard-limit exceeded?")
	a.Printf("%s\n%s", head, strings.Repeat("-", len(head)))
	yes := func(b bool) string {
		if b {
			return "Yes"
		}
		return "No"
	}
	for i := range list {
		limit, used := of(&list[i])
		soft := limit / 100 * softLimit
		a.Printf("%s", ui.Clean(fmt.Sprintf(format, "/"+list[i].Name, text(limit), fmt.Sprintf("%d%%(%s)", softLimit, text(soft)), text(used),
			text(limit-min(used, limit)), yes(used > soft), yes(used >= limit))))
	}
}
