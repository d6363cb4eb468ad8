package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"mortar/internal/fstab"
	"mortar/internal/migrate"
	"mortar/internal/mountinfo"
)

const migrateHelp = `Say what to write in place of what names GlusterFS. FILE is an fstab, a compose or
stack file, or a unit of systemd (a mount, or one that is ordered after glusterd); with -,
standard input. Nothing is changed, and no daemon is asked.

What is printed are the lines that are there, marked with -, and those that take their place,
marked with +; lines marked with = are right as they are. Below them stand the reasons, and, marked
with !, what has no counterpart.

Bind mounts of a directory in a volume of GlusterFS's are known by what is mounted
on this machine and by its fstab.
`

// largestText is more than anybody writes by hand.
const largestText = 4 << 20

func newMigrate(a *app) *cobra.Command {
	var as, table string
	c := verb("explain <FILE>", "say what to write in place of what names GlusterFS", 1, 1, func(ctx context.Context, args []string) error {
		return a.explain(args[0], migrate.Kind(as), table)
	})
	c.Long = migrateHelp
	c.Flags().StringVar(&as, "as", "", "what FILE `is`: fstab, compose or unit; else its name and contents tell")
	c.Flags().StringVar(&table, "fstab", defaultFstab, "the `file` that says what this machine mounts at boot")
	c.RegisterFlagCompletionFunc("as", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		var words []string
		for _, k := range migrate.Kinds {
			words = append(words, string(k))
		}
		return words, cobra.ShellCompDirectiveNoFileComp
	})
	return noun("migrate", "configurations that were made for GlusterFS", c)
}

func (a *app) explain(file string, as migrate.Kind, table string) error {
	in := a.In
	name := "standard input"
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		in, name = f, file
	}
	text, err := io.ReadAll(io.LimitReader(in, largestText+1))
	if err != nil {
		return err
	}
	if len(text) > largestText {
		return fmt.Errorf("%s has more than %d MB: that is no configuration", name, largestText>>20)
	}
	mounts, err := glusterMounts(table)
	if err != nil {
		return err
	}
	r, err := migrate.Explain(name, as, text, mounts)
	if err != nil {
		return err
	}
	return a.Show(r, func() {
		for _, c := range r.Changes {
			a.Printf("%s, line %d:", name, c.Line)
			show := func(mark string, lines []string) {
				for _, l := range lines {
					a.Printf("%s %s", mark, l)
				}
			}
			if c.Stays() {
				show("=", c.Was)
			} else {
				show("-", c.Was)
				show("+", c.Write)
			}
			for _, n := range c.Notes {
				a.Printf("      %s", n)
			}
			for _, l := range c.Lost {
				a.Printf("    ! no counterpart: %s", l)
			}
			a.Printf("")
		}
		what := map[migrate.Kind]string{migrate.Fstab: "an fstab", migrate.Compose: "a compose file", migrate.Unit: "a unit of systemd"}[r.Kind]
		if len(r.Changes) == 0 {
			a.Printf("%s, read as %s, has nothing of GlusterFS in it; nothing is to be changed", name, what)
			return
		}
		a.Printf("%s, read as %s, was not changed", name, what)
	})
}

// glusterMounts are the mounts of GlusterFS's that this machine has at boot, and then those that it has now.
func glusterMounts(table string) (all []mountinfo.Mount, err error) {
	text, err := readFstab(table)
	if err != nil && !errors.Is(err, fs.ErrPermission) {
		return nil, err
	}
	for _, e := range fstab.Parse(text) {
		all = append(all, mountinfo.Mount{Dir: e.Dir, Source: e.Source, Type: e.Type})
	}
	now, err := mountinfo.Self()
	all = slices.DeleteFunc(append(all, now...), func(m mountinfo.Mount) bool { return !migrate.IsGluster(m.Type) })
	return all, err
}
