package cli

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"path/filepath"
	"runtime"
	"strconv"

	"github.com/spf13/cobra"

	"mortar/internal/api"
	"mortar/internal/daemon"
	"mortar/internal/doctor"
	"mortar/internal/proto"
)

const doctorHelp = `Look at this machine, and through the daemon at its pool: whether all machines
reach each other, in both directions; clocks; the disks of bricks, and how fast they flush; kernel
and FUSE; memory; host names; Docker's volume driver; mounts at boot. It changes nothing, and works without a daemon
too, for what concerns the machine itself.

Every line begins with ok, note (good to know), warn (will hurt some day) or bad
(does not work). The exit status is 1 if anything is bad.
`

func newDoctor(a *app) *cobra.Command {
	var config, table string
	c := verb("doctor", "say what is wrong with this machine and its pool, and how to mend it", 0, 0, nil)
	c.Long = doctorHelp
	c.Flags().StringVar(&config, "config", daemon.DefaultConfig, "configuration `file` of the daemon")
	c.Flags().StringVar(&table, "fstab", defaultFstab, "the `file` that says what is mounted at boot")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		cfg := doctor.Config{
			Socket: a.socket, Port: api.DefaultPort, Fstab: table,
			Program: api.Version{Version: daemon.Version(), Go: runtime.Version(), Protocol: proto.Version},
		}
		var settings daemon.Config
		err := settings.ReadConfig(config)
		if err != nil && (cmd.Flags().Changed("config") || !errors.Is(err, fs.ErrNotExist)) {
			return err
		}
		if _, port, err := net.SplitHostPort(settings.Listen); err == nil {
			if n, err := strconv.Atoi(port); err == nil {
				cfg.Port = n
			}
		}
		settings.RunDir = filepath.Dir(a.socket) // of the daemon that is asked
		cfg.Plugin = settings.DriverSocket()
		return a.examine(cmd.Context(), cfg)
	}
	return c
}

func (a *app) examine(ctx context.Context, cfg doctor.Config) error {
	var facts *doctor.Facts
	err := a.While(func() string { return "looking…" }, func() error {
		facts = doctor.Gather(ctx, cfg)
		return nil
	})
	if err != nil {
		return err
	}
	found := doctor.Examine(facts)
	count := map[doctor.Level]int{}
	for _, f := range found {
		count[f.Level]++
	}
	err = a.Show(found, func() {
		for _, f := range found {
			a.Printf("%-5s%-8s%s", f.Level, f.Check, f.What)
			if f.Mend != "" {
				a.Printf("%13s→ %s", "", f.Mend)
			}
		}
		a.Printf("\n%d bad, %d to be warned of", count[doctor.Bad], count[doctor.Warn])
	})
	if err == nil && count[doctor.Bad] > 0 {
		err = &shownError{errors.New("something is bad")}
	}
	return err
}
