package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"mortar/internal/api"
	"mortar/internal/cli/ui"
)

func newVolumeHeal(a *app) *cobra.Command {
	var verify bool
	c := verb("heal <VOLNAME> [full | info [summary | split-brain]]", "heal a volume's bricks, or show what they lack", 1, 5,
		func(ctx context.Context, args []string) error {
			volume, what := args[0], ""
			if len(args) > 1 {
				what = word(args[1], "full", "info", "split-brain", "enable", "disable", "statistics", "granular-entry-heal")
				if what == "" {
					return errUsage
				}
			}
			if verify && what != "full" {
				return &usageError{text: "--verify goes with full"}
			}
			switch {
			case what == "" || what == "full" && len(args) == 2:
				return a.heal(ctx, volume, api.HealRequest{Full: what == "full", Verify: verify})
			case what == "info" && len(args) == 2:
				return a.healInfo(ctx, volume, a.healEntries)
			case what == "info" && len(args) == 3 && word(args[2], "summary", "split-brain") == "summary":
				return a.healInfo(ctx, volume, a.healSummary)
			case what == "info" && len(args) == 3 && word(args[2], "summary", "split-brain") == "split-brain":
				return a.healInfo(ctx, volume, a.healSplitBrain)
			case what == "split-brain":
				return api.Errorf(api.NotSupported, "A mortar volume cannot be in split-brain: the bricks of a set have one primary, and what it did not acknowledge does not stand. There is nothing to resolve.")
			case what == "enable" || what == "disable":
				return api.Errorf(api.NotSupported, "Bricks always heal by themselves, as soon as they can reach their primary. There is nothing to %s.", what)
			case what == "statistics" || what == "granular-entry-heal":
				return api.Errorf(api.NotSupported, "mortar has no %s: \"volume heal %s info\" shows what is left and how fast it goes.", what, volume)
			}
			return errUsage
		})
	c.Flags().BoolVar(&verify, "verify", false, "with full: compare the digests of all replicas and print them")
	return c
}

func (a *app) heal(ctx context.Context, volume string, r api.HealRequest) error {
	what := "index"
	if r.Full {
		what = "full"
	}
	return a.ask(ctx, slow, func(ctx context.Context, c *api.Client) error {
		var reply *api.HealReply
		err := a.While(func() string { return "comparing the replicas of " + volume + "…" }, func() (err error) {
			reply, err = c.Heal(ctx, volume, r)
			return err
		})
		if err != nil {
			return failed(fmt.Sprintf("Launching heal operation to perform %s self heal on volume %s has been unsuccessful:\n", what, volume), err)
		}
		if r.Verify {
			return a.verified(volume, reply)
		}
		return a.Show(reply, func() {
			a.Printf("Launching heal operation to perform %s self heal on volume %s has been successful \nUse heal info commands to check status.", what, volume)
		})
	})
}

// verified shows the digests of all bricks; a difference is a failure.
func (a *app) verified(volume string, r *api.HealReply) error {
	err := a.Show(r, func() {
		var rows [][]string
		for _, d := range r.Digests {
			if d.Problem != "" {
				rows = append(rows, []string{d.Brick, "-", "-", "-", d.Problem})
				continue
			}
			rows = append(rows, []string{d.Brick, d.At, fmt.Sprint(d.Inodes), ui.Bytes(d.Bytes), d.Sum})
		}
		a.Table([]string{"BRICK", "POSITION", "OBJECTS", "SIZE", "DIGEST"}, rows)
		if r.Same {
			a.Printf("The replicas of %s are identical.", volume)
		} else {
			a.Errorf("The replicas of %s are NOT identical.", volume)
		}
	})
	if err == nil && !r.Same {
		return &shownError{api.Errorf(api.Conflict, "the replicas of %s differ", volume)}
	}
	return err
}

func (a *app) healInfo(ctx context.Context, volume string, text func(*api.HealBrick)) error {
	return a.ask(ctx, slow, func(ctx context.Context, c *api.Client) error {
		info, err := c.HealInfo(ctx, volume)
		if err != nil {
			return failed("", err)
		}
		return a.Show(info, func() {
			for i := range info.Bricks {
				text(&info.Bricks[i])
			}
		})
	})
}

func healStatus(b *api.HealBrick) string {
	if b.Connected {
		return "Connected"
	}
	return "Transport endpoint is not connected"
}

// entries writes a number of entries; "-" where nobody knows it.
func entries(n int64) string {
	if n < 0 {
		return "-"
	}
	return fmt.Sprint(n)
}

func (a *app) healEntries(b *api.HealBrick) {
	a.Printf("Brick %s", b.Name)
	if b.Heal != nil {
		a.Printf("Heal: %s", healText(b.Heal))
	}
	a.Printf("Status: %s\nNumber of entries: %s\n", healStatus(b), entries(b.Entries))
}

func (a *app) healSummary(b *api.HealBrick) {
	pending, healing := b.Entries, int64(0)
	if b.Heal != nil {
		pending, healing = 0, b.Entries
	}
	if b.Entries < 0 {
		healing = -1
	}
	a.Printf("Brick %s\nStatus: %s\nTotal Number of entries: %s\nNumber of entries in heal pending: %s\nNumber of entries in split-brain: %s\nNumber of entries possibly healing: %s\n",
		b.Name, healStatus(b), entries(b.Entries), entries(pending), entries(min(b.Entries, 0)), entries(healing))
}

func (a *app) healSplitBrain(b *api.HealBrick) {
	a.Printf("Brick %s\nStatus: %s\nNumber of entries in split-brain: %s\n", b.Name, healStatus(b), entries(min(b.Entries, 0)))
}

// healText is a heal's progress in one line.
func healText(h *api.HealState) string {
	return fmt.Sprintf("%s %.1f%%, %s copied, %s/s, %s left", h.Phase, h.Percent, ui.Bytes(h.Bytes), ui.Bytes(uint64(h.Rate)), ui.Duration(h.ETASeconds))
}
