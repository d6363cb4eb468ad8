package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"mortar/internal/api"
)

// acceptLoss are the words without which nothing is given up where nobody can be
// asked.
const acceptLoss = "accept-loss"

func newVolumeRecover(a *app) *cobra.Command {
	c := verb("recover <VOLNAME> [<BRICK>] [accept-loss]", "go on with what is left of a volume whose in-sync bricks are lost", 1, 3,
		func(ctx context.Context, args []string) error {
			args, agreed := flagged(args, acceptLoss)
			if len(args) < 1 || len(args) > 2 {
				return errUsage
			}
			brick := ""
			if len(args) == 2 {
				if brick = args[1]; !strings.Contains(brick, ":/") {
					return wrongBrick(brick)
				}
			}
			return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
				return a.recoverVolume(ctx, c, args[0], brick, agreed)
			})
		})
	c.Long = `A volume serves nothing while none of its in-sync bricks, those that have every
acknowledged change, can be reached: another brick may lack changes, and mortar
never decides by itself to lose them. If the in-sync bricks are lost for good,
this command makes the set go on with the brick that has most, or with the one
that is named. It says first what would be lost, and asks.

What the lost bricks had more is gone, also if they return: they are then healed
from the brick that went on. So see to it that their machines are off, and not
merely cut off from here. The decision is recorded: "volume info" shows it.

If the pool itself has lost its quorum, "peer recover" comes first.`
	return c
}

func (a *app) recoverVolume(ctx context.Context, c *api.Client, volume, brick string, agreed bool) error {
	prefix := fmt.Sprintf("volume recover: %s: failed: ", volume)
	plan, err := c.VolumeRecovery(ctx, volume, brick)
	if err != nil {
		return failed(prefix, err)
	}
	for _, s := range plan.Sets {
		for _, line := range lossOf(plan.Volume, &s) {
			a.Errorf("%s", line)
		}
	}
	if !agreed {
		yes, err := a.Agree("Do you want to go on, and lose that?", acceptLoss)
		if err != nil {
			return failed(prefix, err)
		}
		if !yes {
			return nil
		}
	}
	r := api.VolumeRecover{Brick: brick}
	for _, s := range plan.Sets {
		r.Agreed = append(r.Agreed, api.AgreedSet{Set: s.Set, Epoch: s.Epoch, Brick: s.Brick, Kept: s.Kept})
	}
	if err := c.RecoverVolume(ctx, volume, r); err != nil {
		return failed(prefix, err)
	}
	return a.Show(plan, func() { a.Printf("volume recover: %s: success", volume) })
}

// lossOf says what recovering a set would lose.
func lossOf(volume string, s *api.SetRecovery) []string {
	when := ""
	if s.Changed != nil {
		when = ", which was made on " + s.Changed.Local().Format("2 Jan 2006 at 15:04:05")
	}
	lines := []string{fmt.Sprintf("Set %d of %s would go on with brick %s, whose last change is %s%s.", s.Set, volume, s.Brick, s.Kept, when)}
	if s.Missing > 0 {
		lines = append(lines, fmt.Sprintf("It certainly lacks %s that the set had made durable, up to %s.", count(int(s.Missing), "change"), s.Known))
	}
	lines = append(lines, "LOST: every change after that, whether an application was told that it succeeded or not.")
	for _, l := range s.Lost {
		what := "was in sync and had every acknowledged change"
		switch {
		case l.Ahead > 0 && !l.InSync:
			what = fmt.Sprintf("has %s more", count(int(l.Ahead), "change"))
		case l.Ahead > 0:
			what = fmt.Sprintf("was in sync and has %s more", count(int(l.Ahead), "change"))
		case !l.InSync:
			what = "may have been in sync, and have changes that nobody else has"
		}
		if l.Problem != "" {
			what += " (" + l.Problem + ")"
		}
		lines = append(lines, fmt.Sprintf("  Brick %s %s. If it returns, that is taken back from it. See to it that its daemon does not run somewhere out of reach.", l.Brick, what))
	}
	if s.InSync < s.MinInSync {
		lines = append(lines, fmt.Sprintf("Then %d of the %d bricks that min-in-sync asks for is in sync: it stays read-only until another brick is, or until \"mortar volume set %s min-in-sync %d\".", s.InSync, s.MinInSync, volume, s.InSync))
	}
	return lines
}

func newPeerRecover(a *app) *cobra.Command {
	c := verb("recover [accept-loss]", "let this machine decide alone for a pool that has lost its quorum", 0, 1,
		func(ctx context.Context, args []string) error {
			args, agreed := flagged(args, acceptLoss)
			if len(args) != 0 {
				return errUsage
			}
			return a.ask(ctx, slow, func(ctx context.Context, c *api.Client) error { return a.recoverPool(ctx, c, agreed) })
		})
	c.Long = `A pool decides with the majority of its voting peers: one of one (in a pool of
two machines the first one's vote), two of three, three of five. If so many of
them are lost for good that no majority can be had, this command, run on ONE
machine that is left, makes that the only voter; the others vote again as soon
as they have joined it.

What the lost voters decided and this machine has not heard of is lost: volumes
that were made, options that were set, machines that joined. If they are alive
and merely cut off from here, they go on deciding without this machine, and that
is lost, too. So see to it that they are off.

A machine that was away while the pool was recovered is told so, and takes no
part. Run the same command there: it takes over a fresh copy of the pool's
configuration, and its bricks are healed.

The configuration that is kept may be older than the last changes of the volumes,
and not know any more which bricks have everything. So a volume goes on by itself
only when all of its bricks answer; for the others "volume recover" comes next.`
	return c
}

func (a *app) recoverPool(ctx context.Context, c *api.Client, agreed bool) error {
	const prefix = "peer recover: failed: "
	plan, err := c.PoolRecovery(ctx)
	if err != nil {
		return failed(prefix, err)
	}
	if plan.Rejoin {
		a.Errorf("The pool was recovered on another machine while this one was away. This machine would take over a fresh copy of the configuration (its own, version %d, is kept aside), and its bricks would be healed from the others.", plan.Version)
		a.Errorf("LOST: what this machine decided or acknowledged while the others did without it.")
	} else {
		a.Errorf("This machine would be the only voter of the pool, with the configuration as it knows it, version %d.", plan.Version)
		a.Errorf("LOST: whatever was decided after that. These voting peers do not answer and would be given up:")
		for _, name := range plan.Silent {
			a.Errorf("  %s. See to it that its daemon does not run somewhere out of reach: it would go on deciding, and that would be lost.", name)
		}
	}
	if !agreed {
		yes, err := a.Agree("Do you want to go on?", acceptLoss)
		if err != nil {
			return failed(prefix, err)
		}
		if !yes {
			return nil
		}
	}
	if err := c.RecoverPool(ctx, api.PoolRecover{Version: plan.Version, Generation: plan.Generation}); err != nil {
		return failed(prefix, err)
	}
	return a.Show(plan, func() { a.Printf("peer recover: success") })
}
