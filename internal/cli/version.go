package cli

import (
	"context"
	"fmt"
	"runtime"
	"strings"

	"github.com/spf13/cobra"

	"mortar/internal/api"
	"mortar/internal/daemon"
	"mortar/internal/proto"
)

func newVersion(a *app) *cobra.Command {
	return verb("version", "print the version of this program", 0, 0, func(context.Context, []string) error {
		v := api.Version{Version: daemon.Version(), Go: runtime.Version(), Protocol: proto.Version}
		return a.Show(v, func() { a.Printf("mortar %s (%s, protocol %d)", v.Version, v.Go, v.Protocol) })
	})
}

// newHelp is "help", which lists every command with its arguments, and "help
// COMMAND", which tells more of one.
func newHelp(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "help [command]",
		Short: "display command options",
		RunE: func(cmd *cobra.Command, args []string) error {
			root := cmd.Root()
			if len(args) > 0 {
				words, err := resolve(root, args)
				if err != nil {
					return err
				}
				target, rest, err := root.Find(words)
				if err != nil || len(rest) > 0 {
					return &usageError{text: "there is no command " + strings.Join(args, " ")}
				}
				return target.Help()
			}
			for _, c := range root.Commands() {
				switch {
				case c.Hidden:
				case c.HasAvailableSubCommands():
					fmt.Fprint(a.Out, patterns(c))
				default:
					fmt.Fprintf(a.Out, " %s - %s\n", c.Use, c.Short)
				}
			}
			return nil
		},
	}
}
