package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mortar/internal/api"
	"mortar/internal/cli/ui"
	"mortar/internal/cluster"
)

func newVolumeScrub(a *app) *cobra.Command {
	return verb("scrub <VOLNAME> {start | status | pause | resume}", "look for what has rotted on the disks, and repair it", 2, 2,
		func(ctx context.Context, args []string) error { return a.scrub(ctx, "scrub", args[0], args[1]) })
}

// scrub does one of the things that can be done about scrubbing.
func (a *app) scrub(ctx context.Context, noun, volume, what string) error {
	switch word(what, "start", "status", "pause", "resume", "ondemand") {
	case "start", "ondemand":
		return a.scrubStart(ctx, volume)
	case "status":
		return a.scrubStatus(ctx, volume)
	case "pause":
		return a.scrubSet(ctx, noun, volume, cluster.OptScrub, "off")
	case "resume":
		return a.scrubSet(ctx, noun, volume, cluster.OptScrub, "on")
	}
	return errUsage
}

// scrubSet sets an option about scrubbing.
func (a *app) scrubSet(ctx context.Context, noun, volume, key, value string) error {
	return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
		if _, err := c.SetOptions(ctx, volume, []api.Option{{Key: key, Value: value}}); err != nil {
			return failed(fmt.Sprintf("volume %s: failed: ", noun), err)
		}
		return a.done("volume %s: success", noun)
	})
}

func (a *app) scrubStart(ctx context.Context, volume string) error {
	return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
		r, err := c.Scrub(ctx, volume)
		if err != nil {
			return failed("volume scrub: failed: ", err)
		}
		err = a.Show(r, func() {
			for _, b := range r.Missed {
				a.Errorf("Not begun on brick %s", b)
			}
			if len(r.Missed) == 0 {
				a.Printf("volume scrub: success: \"volume scrub %s status\" shows how far it is", volume)
			}
		})
		if err == nil && len(r.Missed) > 0 {
			return &shownError{api.Errorf(api.BrickDown, "scrubbing was not begun on every brick of %s", volume)}
		}
		return err
	})
}

func (a *app) scrubStatus(ctx context.Context, volume string) error {
	return a.ask(ctx, usual, func(ctx context.Context, c *api.Client) error {
		st, err := c.VolumeStatus(ctx, volume, false)
		if err != nil {
			return failed("volume scrub: failed: ", err)
		}
		return a.Show(st, func() {
			for i := range st.Bricks {
				a.scrubBrick(&st.Bricks[i])
			}
		})
	})
}

func when(t *time.Time) string {
	if t == nil {
		return "never"
	}
	return t.Local().Format("2006-01-02 15:04:05")
}

func (a *app) scrubBrick(b *api.BrickStatus) {
	line := func(key, format string, v ...any) { a.Printf("%-28s: %s", key, fmt.Sprintf(format, v...)) }
	a.Printf("%s", rule)
	line("Brick", "%s", b.Name)
	s := b.Scrub
	if s == nil {
		line("State", "not served")
		if b.Problem != "" {
			line("Problem", "%s", b.Problem)
		}
		return
	}
	line("State", "%s", s.State)
	line("Round begun", "%s", when(s.Began))
	line("Last round completed", "%s", when(s.Ended))
	line("Progress", "%.1f%%, %s read", s.Percent, ui.Bytes(s.Bytes))
	line("Blocks checked", "%d", s.Checked)
	line("Blocks given a checksum", "%d", s.Signed)
	line("Blocks found rotten", "%d in this round, %d in all", s.Bad, s.Found)
	line("Blocks repaired", "%d in all", s.Repaired)
	line("Blocks rotten now", "%d", s.Rotten)
	for _, r := range s.Blocks {
		name := r.Path
		if name == "" {
			name = "a file without a name"
		}
		a.Printf("  %s (inode %d), bytes %d to %d, in %s: %s", name, r.Inode, r.From, r.To, r.DataFile, r.Problem)
	}
}

// The words of gluster's "volume bitrot" for what the options say.
var (
	scrubRates     = map[string]string{"lazy": "4MB", "normal": "16MB", "aggressive": "64MB"}
	scrubIntervals = map[string]string{"hourly": "1h", "daily": "24h", "weekly": "168h", "biweekly": "336h", "monthly": "720h"}
)

func newVolumeBitrot(a *app) *cobra.Command {
	c := verb("bitrot <VOLNAME> {enable | disable | scrub {ondemand | status | pause | resume} | scrub-throttle {lazy | normal | aggressive} | scrub-frequency {hourly | daily | weekly | biweekly | monthly} | signing-time <SECONDS>}",
		"what gluster calls scrubbing; see scrub", 2, 3,
		func(ctx context.Context, args []string) error {
			what := word(args[1], "enable", "disable", "scrub", "scrub-throttle", "scrub-frequency", "signing-time")
			if len(args) == 2 && (what == "enable" || what == "disable") {
				return a.scrubSet(ctx, "bitrot", args[0], cluster.OptScrub, map[string]string{"enable": "on", "disable": "off"}[what])
			}
			if len(args) != 3 {
				return errUsage
			}
			switch arg := strings.ToLower(args[2]); what {
			case "scrub":
				return a.scrub(ctx, "bitrot", args[0], arg)
			case "signing-time":
				return a.scrubSet(ctx, "bitrot", args[0], cluster.OptScrubQuiet, arg)
			case "scrub-throttle":
				if rate := scrubRates[arg]; rate != "" {
					return a.scrubSet(ctx, "bitrot", args[0], cluster.OptScrubRate, rate)
				}
			case "scrub-frequency":
				if every := scrubIntervals[arg]; every != "" {
					return a.scrubSet(ctx, "bitrot", args[0], cluster.OptScrubInterval, every)
				}
			}
			return errUsage
		})
	c.Hidden = true
	return c
}
