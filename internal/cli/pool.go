package cli

import (
	"context"

	"github.com/spf13/cobra"

	"mortar/internal/api"
)

func newPool(a *app) *cobra.Command {
	return noun("pool", "the pool as a whole", newPoolList(a), newPoolLeave(a))
}

func newPoolLeave(a *app) *cobra.Command {
	return verb("leave", "take this machine out of its pool", 0, 0, func(ctx context.Context, _ []string) error {
		yes, err := a.Confirm("This machine can come back only with a new invitation. Do you want to proceed?")
		if err != nil || !yes {
			return err
		}
		return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
			if err := c.Leave(ctx); err != nil {
				return failed("pool leave: failed: ", err)
			}
			return a.done("pool leave: success")
		})
	})
}

func newPoolList(a *app) *cobra.Command {
	return verb("list", "list all the nodes in the pool (including localhost)", 0, 0, func(ctx context.Context, _ []string) error {
		return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
			pool, err := c.Pool(ctx)
			if err != nil {
				return failed("pool list: failed: ", err)
			}
			return a.Show(pool, func() {
				width := 8
				for _, p := range pool.Peers {
					if !p.Self {
						width = max(width, len(p.Name))
					}
				}
				width = max(width, len("localhost"))
				a.Printf("UUID\t\t\t\t\t%-*s\tState", width, "Hostname")
				row := func(p api.Peer, name string) { a.Printf("%s\t%-*s\t%s ", p.ID, width, name, connected(p.Connected)) }
				for _, p := range pool.Peers {
					if !p.Self {
						row(p, p.Name)
					}
				}
				for _, p := range pool.Peers {
					if p.Self {
						row(p, "localhost")
					}
				}
			})
		})
	})
}
