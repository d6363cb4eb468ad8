package cli

import (
	"cmp"
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"mortar/internal/api"
)

func newVolume(a *app) *cobra.Command {
	c := noun("volume", "the file systems",
		newVolumeCreate(a), newVolumeStart(a), newVolumeStop(a), newVolumeDelete(a),
		newVolumeInfo(a), newVolumeStatus(a), newVolumeList(a),
		newVolumeSet(a), newVolumeGet(a), newVolumeReset(a),
		newVolumeHeal(a), newVolumeScrub(a), newVolumeBitrot(a), newVolumeRecover(a), newVolumeQuota(a),
	)
	c.Aliases = []string{"v"} // as short as with gluster, which has no "version"
	return c
}

func newVolumeCreate(a *app) *cobra.Command {
	return verb("create <NEW-VOLNAME> [replica <COUNT>] [transport tcp] <NEW-BRICK>... [force]",
		"create a new volume of specified type with mentioned bricks", 2, -1,
		func(ctx context.Context, args []string) error {
			r, err := parseCreate(args)
			if err != nil {
				return err
			}
			return a.ask(ctx, slow, func(ctx context.Context, c *api.Client) error {
				v, err := c.CreateVolume(ctx, *r)
				if err != nil {
					return failed(fmt.Sprintf("volume create: %s: failed: ", r.Name), err)
				}
				return a.Show(v, func() {
					a.Printf("volume create: %s: success: please start the volume to access data", v.Name)
				})
			})
		})
}

// parseCreate reads what follows "volume create".
func parseCreate(args []string) (*api.VolumeCreate, error) {
	r := &api.VolumeCreate{Name: args[0]}
	args, r.Force = flagged(args[1:], "force")
	for len(args) > 0 && !strings.Contains(args[0], ":") && !strings.HasPrefix(args[0], "/") {
		w := word(args[0], "replica", "transport", "stripe", "disperse", "disperse-data", "redundancy", "arbiter", "thin-arbiter")
		switch w {
		case "replica", "transport":
		case "stripe":
			return nil, &usageError{text: "stripe is not supported: files are kept whole; leave it out, or use replica"}
		case "arbiter", "thin-arbiter":
			return nil, &usageError{text: "mortar needs no arbiter bricks: use replica 2, and for the vote any third machine in the pool (\"mortar server --witness\")"}
		case "disperse", "disperse-data", "redundancy":
			return nil, &usageError{text: w + " is not supported: use replica"}
		default:
			return nil, wrongBrick(args[0])
		}
		if len(args) < 2 {
			return nil, errUsage
		}
		value := args[1]
		args = args[2:]
		if w == "transport" {
			if value != "tcp" {
				return nil, &usageError{text: fmt.Sprintf("transport %s is not supported: only tcp", value)}
			}
			continue
		}
		n, err := strconv.Atoi(value)
		if err != nil || n < 2 {
			return nil, &usageError{text: "replica count should be greater than 1"}
		}
		r.Replica = n
	}
	for _, b := range args {
		if !strings.Contains(b, ":/") {
			return nil, wrongBrick(b)
		}
	}
	if len(args) == 0 {
		return nil, &usageError{text: "No bricks specified"}
	}
	r.Bricks = args
	return r, nil
}

func wrongBrick(s string) error {
	return &usageError{text: fmt.Sprintf("Wrong brick type: %s, use <HOSTNAME>:<export-dir-abs-path>", s)}
}

func newVolumeStart(a *app) *cobra.Command {
	return verb("start <VOLNAME> [force]", "start volume specified by <VOLNAME>", 1, 2, func(ctx context.Context, args []string) error {
		args, force := flagged(args, "force")
		if len(args) != 1 {
			return errUsage
		}
		return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
			if err := c.StartVolume(ctx, args[0], force); err != nil {
				return failed(fmt.Sprintf("volume start: %s: failed: ", args[0]), err)
			}
			return a.done("volume start: %s: success", args[0])
		})
	})
}

func newVolumeStop(a *app) *cobra.Command {
	return verb("stop <VOLNAME> [force]", "stop volume specified by <VOLNAME>", 1, 2, func(ctx context.Context, args []string) error {
		args, force := flagged(args, "force")
		if len(args) != 1 {
			return errUsage
		}
		yes, err := a.Confirm("Stopping volume will make its data inaccessible. Do you want to continue?")
		if err != nil || !yes {
			return err
		}
		return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
			if err := c.StopVolume(ctx, args[0], force); err != nil {
				return failed(fmt.Sprintf("volume stop: %s: failed: ", args[0]), err)
			}
			return a.done("volume stop: %s: success", args[0])
		})
	})
}

func newVolumeDelete(a *app) *cobra.Command {
	return verb("delete <VOLNAME>", "delete volume specified by <VOLNAME>", 1, 1, func(ctx context.Context, args []string) error {
		yes, err := a.Confirm("Deleting volume will erase all information about the volume. Do you want to continue?")
		if err != nil || !yes {
			return err
		}
		return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
			if err := c.DeleteVolume(ctx, args[0]); err != nil {
				return failed(fmt.Sprintf("volume delete: %s: failed: ", args[0]), err)
			}
			return a.done("volume delete: %s: success", args[0])
		})
	})
}

func newVolumeList(a *app) *cobra.Command {
	return verb("list", "list all volumes in cluster", 0, 0, func(ctx context.Context, _ []string) error {
		return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
			vs, err := c.Volumes(ctx)
			if err != nil {
				return failed("volume list: failed: ", err)
			}
			names := []string{}
			for _, v := range vs {
				names = append(names, v.Name)
			}
			return a.Show(names, func() {
				if len(names) == 0 {
					a.Printf("No volumes present in cluster")
				}
				for _, n := range names {
					a.Printf("%s", n)
				}
			})
		})
	})
}

func newVolumeInfo(a *app) *cobra.Command {
	return verb("info [all|<VOLNAME>]", "list information of all volumes", 0, 1, func(ctx context.Context, args []string) error {
		return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
			vs, err := a.volumes(ctx, c, args)
			if err != nil {
				return err
			}
			return a.Show(vs, func() {
				if len(vs) == 0 {
					a.Printf("No volumes present")
				}
				for _, v := range vs {
					a.volumeInfo(&v)
				}
			})
		})
	})
}

// volumes fetches the one named volume, or all of them.
func (a *app) volumes(ctx context.Context, c *api.Client, args []string) ([]api.Volume, error) {
	if len(args) == 0 || args[0] == "all" {
		return c.Volumes(ctx)
	}
	v, err := c.Volume(ctx, args[0])
	if err != nil {
		return nil, err
	}
	return []api.Volume{*v}, nil
}

// volumeInfo prints what scripts parse by "^Field: " and "^Brick[0-9]+: ".
func (a *app) volumeInfo(v *api.Volume) {
	a.Printf(" ")
	a.Printf("Volume Name: %s", v.Name)
	a.Printf("Type: %s", v.Type)
	a.Printf("Volume ID: %s", v.ID)
	a.Printf("Status: %s", v.StatusText)
	a.Printf("Snapshot Count: %d", v.Snapshots)
	if v.Replica > 1 {
		a.Printf("Number of Bricks: %d x %d = %d", v.Sets, v.Replica, len(v.Bricks))
	} else {
		a.Printf("Number of Bricks: %d", len(v.Bricks))
	}
	a.Printf("Transport-type: tcp")
	for _, r := range v.Recoveries {
		a.Printf("Recovered: %s on %s: set %d went on with %s at %s, known durable up to %s, without %s", r.Time.Local().Format("2006-01-02 15:04:05"), r.Peer,
			r.Set, r.Brick, r.Kept, r.Known, cmp.Or(strings.Join(r.Lost, ", "), "what its disk had lost"))
	}
	a.Printf("Bricks:")
	for i, b := range v.Bricks {
		a.Printf("Brick%d: %s", i+1, b.Name)
	}
	if len(v.Options) > 0 {
		a.Printf("Options Reconfigured:")
	}
	for _, o := range v.Options {
		a.Printf("%s: %s", o.Key, o.Value)
	}
}

func newVolumeSet(a *app) *cobra.Command {
	return verb("set <VOLNAME> <KEY> <VALUE> [<KEY> <VALUE>...] | set help", "set options for volume <VOLNAME>", 1, -1,
		func(ctx context.Context, args []string) error {
			if len(args) == 1 && word(args[0], "help") != "" {
				return a.optionHelp(ctx)
			}
			if len(args) < 3 || len(args)%2 == 0 {
				return errUsage
			}
			volume := args[0]
			var options []api.Option
			for i := 1; i < len(args); i += 2 {
				options = append(options, api.Option{Key: args[i], Value: args[i+1]})
			}
			return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
				r, err := c.SetOptions(ctx, volume, options)
				if err != nil {
					return failed("volume set: failed: ", err)
				}
				return a.Show(r, func() {
					for _, n := range r.Notes {
						a.Errorf("%s", n)
					}
					a.Printf("volume set: success")
				})
			})
		})
}

func (a *app) optionHelp(ctx context.Context) error {
	return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
		options, err := c.OptionHelp(ctx)
		if err != nil {
			return failed("volume set: failed: ", err)
		}
		return a.Show(options, func() {
			for _, o := range options {
				a.Printf("Option: %s\nDefault Value: %s\nDescription: %s\n", o.Key, o.Default, o.Description)
			}
		})
	})
}

func newVolumeGet(a *app) *cobra.Command {
	return verb("get <VOLNAME> <KEY|all>", "get the value of all options or of the option KEY of volume <VOLNAME>", 2, 2,
		func(ctx context.Context, args []string) error {
			return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
				all, err := c.Options(ctx, args[0])
				if err != nil {
					return failed("volume get option: failed: ", err)
				}
				chosen := all
				if args[1] != "all" {
					if chosen, err = pick(all, args[1]); err != nil {
						return failed("volume get option: failed: ", err)
					}
				}
				return a.Show(chosen, func() {
					row := func(key, value string) { a.Printf("%-40s %-39s", key, value) }
					row("Option", "Value")
					row("------", "-----")
					for _, o := range chosen {
						value := o.Value
						if o.Default {
							value += " (DEFAULT)"
						}
						row(o.Key, value)
					}
				})
			})
		})
}

// pick finds the option that key names; the part before the dot may be left out.
func pick(all []api.Option, key string) ([]api.Option, error) {
	var names []string
	for _, o := range all {
		_, short, _ := strings.Cut(o.Key, ".")
		if o.Key == key || short == key {
			return []api.Option{o}, nil
		}
		names = append(names, o.Key)
	}
	text := fmt.Sprintf("Option %s does not exist", key)
	if near := nearest(key, names); near != "" {
		text += fmt.Sprintf("\nDid you mean %s?", near)
	}
	return nil, api.Errorf(api.NotFound, "%s", text)
}

func newVolumeReset(a *app) *cobra.Command {
	return verb("reset <VOLNAME> [option] [force]", "reset all the reconfigured options", 1, 3,
		func(ctx context.Context, args []string) error {
			args, _ = flagged(args, "force") // no option here is protected
			if len(args) < 1 || len(args) > 2 {
				return errUsage
			}
			keys := args[1:]
			if len(keys) == 1 && keys[0] == "all" {
				keys = nil
			}
			return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
				if err := c.ResetOptions(ctx, args[0], keys); err != nil {
					return failed("volume reset: failed: ", err)
				}
				return a.done("volume reset: success: reset volume successful")
			})
		})
}
