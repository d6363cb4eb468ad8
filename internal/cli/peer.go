package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mortar/internal/api"
)

func newPeer(a *app) *cobra.Command {
	return noun("peer", "the machines of the pool", newPeerInvite(a), newPeerProbe(a), newPeerStatus(a), newPeerDetach(a), newPeerDrain(a), newPeerUndrain(a), newPeerRecover(a))
}

func newPeerInvite(a *app) *cobra.Command {
	var (
		ttl  time.Duration
		uses int
	)
	c := verb("invite", "print the command with which another machine joins this pool", 0, 0,
		func(ctx context.Context, _ []string) error {
			return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
				inv, err := c.Invite(ctx, api.InviteRequest{TTL: int(ttl.Seconds()), Uses: uses})
				if err != nil {
					return failed("peer invite: failed: ", err)
				}
				return a.Show(inv, func() {
					if len(inv.Hosts) == 0 {
						a.Errorf("Run this on the machine that is to join, with this machine's address in place of HOST:")
					} else {
						a.Errorf("Run this on the machine that is to join:")
					}
					a.Printf("%s", inv.Command)
					a.Errorf("It works until %s, for %s.", inv.Expires.Local().Format("15:04:05 on 2 Jan 2006"), count(inv.Uses, "machine"))
				})
			})
		})
	c.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long the token works")
	c.Flags().IntVar(&uses, "uses", 1, "`machines` that may use the token")
	return c
}

func count(n int, what string) string {
	if n == 1 {
		return "one " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func newPeerProbe(a *app) *cobra.Command {
	return verb("probe { <HOSTNAME> | <IP-address> }", "bring a machine that was started with --accept-probe into the pool", 1, 1,
		func(ctx context.Context, args []string) error {
			return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
				r, err := c.Probe(ctx, api.ProbeRequest{Host: args[0]})
				if err != nil {
					return failed("peer probe: failed: ", err)
				}
				return a.Show(r, func() {
					switch r.Result {
					case api.ProbeLocalhost:
						a.Printf("peer probe: Probe on localhost not needed")
					case api.ProbeAlready:
						a.Printf("peer probe: Host %s port %d already in peer list", r.Host, r.Port)
					default:
						a.Printf("peer probe: success")
					}
				})
			})
		})
}

func newPeerStatus(a *app) *cobra.Command {
	return verb("status", "list status of peers", 0, 0, func(ctx context.Context, _ []string) error {
		return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
			pool, err := c.Pool(ctx)
			if err != nil {
				return failed("peer status: failed: ", err)
			}
			var others []api.Peer
			for _, p := range pool.Peers {
				if !p.Self {
					others = append(others, p)
				}
			}
			return a.Show(others, func() {
				a.Printf("Number of Peers: %d", len(others))
				for _, p := range others {
					a.Printf("\nHostname: %s\nUuid: %s\nState: %s (%s)", p.Name, p.ID, p.StateText, connected(p.Connected))
				}
				for _, p := range pool.Peers {
					if p.Drained {
						a.Errorf("%s is drained%s.", p.Name, still(p.Holds))
					}
				}
				for _, p := range pool.Peers {
					if p.Problem != "" {
						a.Errorf("%s: %s", p.Name, p.Problem)
					}
				}
				if pool.Problem != "" {
					a.Errorf("%s.", pool.Problem)
				}
			})
		})
	})
}

func connected(is bool) string {
	if is {
		return "Connected"
	}
	return "Disconnected"
}

func newPeerDetach(a *app) *cobra.Command {
	return verb("detach { <HOSTNAME> | <IP-address> } [force]", "take a machine out of the pool", 1, 2,
		func(ctx context.Context, args []string) error {
			args, force := flagged(args, "force")
			if len(args) != 1 {
				return errUsage
			}
			yes, err := a.Confirm("The machine can come back only with a new invitation. Mounts that were made through it go on with the other peers they know. Do you want to proceed?")
			if err != nil || !yes {
				return err
			}
			return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
				if err := c.Detach(ctx, args[0], force); err != nil {
					return failed("peer detach: failed: ", err)
				}
				return a.done("peer detach: success")
			})
		})
}

// still tells of what a drained peer has not handed over.
func still(holds []string) string {
	if len(holds) == 0 {
		return ""
	}
	return ", but " + strings.Join(holds, "; ")
}

func newPeerDrain(a *app) *cobra.Command {
	c := verb("drain { <HOSTNAME> | <IP-address> }", "have a machine hand over what its bricks do, before it is stopped", 1, 1,
		func(ctx context.Context, args []string) error {
			return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
				var r *api.DrainReply
				err := a.While(func() string { return "handing over…" }, func() (err error) {
					r, err = c.Drain(ctx, args[0])
					return err
				})
				if err != nil {
					return failed("peer drain: failed: ", err)
				}
				if len(r.Holds) > 0 {
					return failed("peer drain: ", fmt.Errorf("%s is drained%s", r.Peer, still(r.Holds)))
				}
				return a.Show(r, func() { a.Printf("peer drain: success") })
			})
		})
	c.Long = `Its bricks lead nothing any more, leave the in-sync sets one after the other, and
its mounts are served by other machines, so that it can be stopped or restarted
without anybody waiting. It goes on voting, and its bricks go on being brought
up to date; they just do not count. That lasts until "mortar peer undrain",
whatever is restarted. It is refused where a volume would be left with fewer
bricks in sync than its min-in-sync.`
	return c
}

func newPeerUndrain(a *app) *cobra.Command {
	return verb("undrain { <HOSTNAME> | <IP-address> }", "have a drained machine take part again", 1, 1,
		func(ctx context.Context, args []string) error {
			return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
				if err := c.Undrain(ctx, args[0]); err != nil {
					return failed("peer undrain: failed: ", err)
				}
				return a.done("peer undrain: success")
			})
		})
}

// done shows the success of a command that has nothing else to say.
func (a *app) done(format string, args ...any) error {
	return a.Show(struct {
		OK bool `json:"ok"`
	}{true}, func() { a.Printf(format, args...) })
}

func newJoin(a *app) *cobra.Command {
	var name string
	c := verb("join TOKEN HOST[,HOST...]", "make this machine a peer of another machine's pool", 2, 2,
		func(ctx context.Context, args []string) error {
			return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
				var r *api.JoinReply
				err := a.While(func() string { return "joining…" }, func() (err error) {
					r, err = c.Join(ctx, api.JoinRequest{Token: args[0], Hosts: strings.Split(args[1], ","), Name: name})
					return err
				})
				if err != nil {
					return failed("join: failed: ", err)
				}
				return a.Show(r, func() { a.Printf("join: success: this machine is %s in pool %s", r.Name, r.Pool) })
			})
		})
	c.Flags().StringVar(&name, "name", "", "what the pool shall call this machine (default: the name the daemon was given, or the host name)")
	return c
}
