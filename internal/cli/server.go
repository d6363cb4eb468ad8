package cli

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

	"mortar/internal/daemon"
)

func newServer(a *app) *cobra.Command {
	var (
		path  string
		flags daemon.Config
	)
	c := verb("server [flags]", "run the daemon of this machine", 0, 0, nil)
	f := c.Flags()
	f.StringVar(&path, "config", daemon.DefaultConfig, "configuration `file`; its keys are the names of the flags below")
	f.StringVar(&flags.StateDir, "state-dir", daemon.DefaultStateDir, "`directory` of this machine's identity and its copy of the pool's state")
	f.StringVar(&flags.RunDir, "run-dir", daemon.DefaultRunDir, "`directory` of the sockets for programs on this machine")
	f.StringVar(&flags.Listen, "listen", ":24007", "the one TCP `address` for everything between machines")
	f.StringSliceVar(&flags.Advertise, "advertise", nil, "`addresses` where others reach this machine, if not where its connections come from")
	f.StringVar(&flags.Name, "name", "", "what the pool shall call this machine (default: the host name)")
	f.BoolVar(&flags.Witness, "witness", false, "vote, and hold no bricks")
	f.BoolVar(&flags.Client, "client", false, "neither vote nor hold bricks, but mount volumes and serve Docker")
	f.BoolVar(&flags.AcceptProbe, "accept-probe", false, "let a peer of another pool bring this machine in with \"peer probe\"")
	f.BoolVar(&flags.NewIdentity, "new-identity", false, "on the copy of a cloned machine, once: become another machine")
	f.StringVar(&flags.LogLevel, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&flags.MemoryLimit, "memory-limit", "", "how much memory to do with, `size` such as 96MB; near it processor time is spent on keeping it (default: no limit)")
	f.StringVar(&flags.DockerSocket, "docker-socket", "", "where the volume driver listens for Docker, `path` or off (default: "+daemon.DefaultDockerSocket+", with the usual --run-dir)")
	f.StringVar(&flags.DockerVolume, "docker-volume", "", "the `volume` for Docker volumes that name none (default: the only one of the pool)")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if err := a.thrifty(); err != nil {
			return err
		}
		defer easeMonitor(cmd.Context())()
		var cfg daemon.Config
		err := cfg.ReadConfig(path)
		if err != nil && (cmd.Flags().Changed("config") || !errors.Is(err, fs.ErrNotExist)) {
			return err
		}
		// What was said on the command line counts more than the file.
		for name, set := range map[string]func(){
			"state-dir":     func() { cfg.StateDir = flags.StateDir },
			"run-dir":       func() { cfg.RunDir = flags.RunDir },
			"listen":        func() { cfg.Listen = flags.Listen },
			"advertise":     func() { cfg.Advertise = flags.Advertise },
			"name":          func() { cfg.Name = flags.Name },
			"witness":       func() { cfg.Witness = flags.Witness },
			"client":        func() { cfg.Client = flags.Client },
			"accept-probe":  func() { cfg.AcceptProbe = flags.AcceptProbe },
			"new-identity":  func() { cfg.NewIdentity = flags.NewIdentity },
			"log-level":     func() { cfg.LogLevel = flags.LogLevel },
			"memory-limit":  func() { cfg.MemoryLimit = flags.MemoryLimit },
			"docker-socket": func() { cfg.DockerSocket = flags.DockerSocket },
			"docker-volume": func() { cfg.DockerVolume = flags.DockerVolume },
		} {
			if cmd.Flags().Changed(name) {
				set()
			}
		}
		return a.serve(cmd.Context(), cfg)
	}
	return c
}

func (a *app) serve(ctx context.Context, cfg daemon.Config) error {
	var level slog.Level
	if cfg.LogLevel != "" {
		if err := level.UnmarshalText([]byte(cfg.LogLevel)); err != nil {
			return &usageError{text: "--log-level: want debug, info, warn or error"}
		}
	}
	limit, err := cfg.MemoryBytes()
	if err != nil {
		return &usageError{text: err.Error()}
	}
	if limit > 0 {
		debug.SetMemoryLimit(limit)
	}
	cfg.Log = slog.New(slog.NewTextHandler(a.Err, &slog.HandlerOptions{Level: level}))
	cfg.Ready = func() {
		if err := notifyReady(os.Getenv("NOTIFY_SOCKET")); err != nil {
			cfg.Log.Warn("systemd was not told that this daemon is up", "error", err)
		}
	}
	n, err := daemon.New(cfg)
	if err != nil {
		return err
	}
	return n.Run(ctx)
}

// notifyReady tells systemd, at the socket that it names in $NOTIFY_SOCKET, that
// the daemon is up: what is ordered after it, such as Docker, may start.
func notifyReady(socket string) error {
	if socket == "" {
		return nil
	}
	if socket[0] == '@' { // an abstract one
		socket = "\x00" + socket[1:]
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write([]byte("READY=1"))
	return err
}
