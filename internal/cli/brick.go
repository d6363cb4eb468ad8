package cli

import (
	"context"
	"fmt"
	"path"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"mortar/internal/api"
	"mortar/internal/brick"
	"mortar/internal/cli/ui"
	"mortar/internal/disk"
)

// newBrick is what can be done with a brick's directory alone: no daemon, no
// pool and no network are needed, and nothing in the directory is changed.
func newBrick(a *app) *cobra.Command {
	var salvage, contents, logOnly bool
	var after uint64
	var from string
	open := func(dir string, f func(*brick.Offline) error) error {
		off, err := brick.OpenOffline(brick.OfflineOptions{FS: disk.OS, Dir: dir, Salvage: salvage})
		if err != nil {
			return err
		}
		defer off.Close()
		for _, n := range off.Notes() {
			a.Errorf("note: %s", n)
		}
		return f(off)
	}
	export := verb("export <DIR> <DEST>", "copy everything in a brick to a directory of plain files", 2, 2, func(ctx context.Context, args []string) error {
		return open(args[0], func(off *brick.Offline) error { return a.brickExport(ctx, off, from, args[1]) })
	})
	export.Flags().StringVar(&from, "from", "/", "the `directory` of the volume to begin with")
	check := verb("check <DIR>", "look for damage in a brick", 1, 1, func(ctx context.Context, args []string) error {
		return open(args[0], func(off *brick.Offline) error { return a.brickCheck(ctx, off, contents) })
	})
	check.Flags().BoolVar(&contents, "contents", false, "read all contents too")
	dump := verb("dump <DIR>", "print the log and the metadata of a brick", 1, 1, func(ctx context.Context, args []string) error {
		if err := brick.DumpLog(ctx, disk.OS, args[0], after, a.Out); err != nil || logOnly {
			return err
		}
		return open(args[0], func(off *brick.Offline) error { return off.DumpMeta(ctx, a.Out) })
	})
	dump.Flags().Uint64Var(&after, "after", 0, "begin behind this `sequence` number of the log")
	dump.Flags().BoolVar(&logOnly, "log", false, "only the log")
	c := noun("brick", "the directory of a brick, without a daemon",
		export, check, dump,
		verb("ls <DIR> [<PATH>]", "list a directory of the volume", 1, 2, func(ctx context.Context, args []string) error {
			return open(args[0], func(off *brick.Offline) error { return a.brickList(ctx, off, at(args, 1)) })
		}),
		verb("cat <DIR> <PATH>", "print a file of the volume", 2, 2, func(ctx context.Context, args []string) error {
			return open(args[0], func(off *brick.Offline) error { return off.Cat(ctx, args[1], a.Out) })
		}),
	)
	c.PersistentFlags().BoolVar(&salvage, "salvage", false, "show what can be shown of a damaged brick, instead of refusing it")
	return c
}

func (a *app) brickList(ctx context.Context, off *brick.Offline, name string) error {
	list := []entry{}
	err := off.List(ctx, name, func(o brick.Object) error {
		list = append(list, entryOf(path.Base(o.Path), &o.Attr))
		return nil
	})
	if err != nil {
		return err
	}
	return a.Show(list, func() {
		var rows [][]string
		for _, e := range list {
			rows = append(rows, []string{e.Mode, fmt.Sprintf("%d:%d", e.UID, e.GID), fmt.Sprint(e.Size), e.Mtime.Format(time.DateTime), e.Name})
		}
		a.Table([]string{"MODE", "OWNER", "SIZE", "CHANGED", "NAME"}, rows)
	})
}

// problems prints what a tool finds wrong, as it is found.
func (a *app) problems(p brick.Problem) { a.Errorf("%s", p) }

func (a *app) brickExport(ctx context.Context, off *brick.Offline, from, dest string) error {
	var objects, bytes atomic.Uint64
	var result brick.Exported
	err := a.While(func() string {
		return fmt.Sprintf("exporting: %d objects, %s", objects.Load(), ui.Bytes(bytes.Load()))
	}, func() (err error) {
		result, err = off.Export(ctx, from, dest, a.problems, func(x brick.Exported) {
			objects.Store(x.Objects)
			bytes.Store(x.Bytes)
		})
		return err
	})
	if err != nil {
		return err
	}
	if err := a.Show(result, func() {
		a.Printf("brick export: %d objects, %s, %d problems", result.Objects, ui.Bytes(result.Bytes), result.Problems)
	}); err != nil || result.Problems == 0 {
		return err
	}
	return &shownError{api.Errorf(api.Conflict, "%d objects are not as they were in the brick", result.Problems)}
}

func (a *app) brickCheck(ctx context.Context, off *brick.Offline, contents bool) error {
	var result brick.Checked
	err := a.While(func() string { return "checking…" }, func() (err error) {
		result, err = off.Check(ctx, contents, a.problems)
		return err
	})
	if err != nil {
		return err
	}
	if err := a.Show(result, func() {
		a.Printf("brick check: %d log entries, %d inodes, %d names, %d problems", result.Entries, result.Inodes, result.Names, result.Problems)
	}); err != nil || result.Problems == 0 {
		return err
	}
	return &shownError{api.Errorf(api.Conflict, "%d problems", result.Problems)}
}
