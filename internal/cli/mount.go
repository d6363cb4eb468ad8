package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"mortar/internal/daemon"
	"mortar/internal/mount"
	"mortar/internal/mountinfo"
)

func newMount(a *app) *cobra.Command {
	var (
		foreground, sloppy, fake, verbose bool
		noMtab, enable, upgrade           bool
		table                             string
		options                           []string
		namespace, fsType                 string
		wait                              time.Duration
		cfg                               daemon.MountConfig
	)
	c := verb("mount HOST[,HOST...]:/VOLUME DIR [-o OPTIONS]", "mount a volume", 1, 2, nil)
	c.Long = mountHelp
	f := c.Flags()
	f.StringArrayVarP(&options, "options", "o", nil, "mount `options`, separated by commas; see above")
	f.DurationVar(&wait, "wait", time.Minute, "how long to wait for the volume; 0: for ever")
	f.StringVar(&cfg.StateDir, "state-dir", daemon.DefaultStateDir, "the state `directory` of the daemon on this machine")
	f.StringVar(&cfg.RunDir, "run-dir", daemon.DefaultRunDir, "the `directory` of its sockets")
	if a.helper {
		// mount(8) calls its helpers with these.
		f.BoolVarP(&fake, "fake", "f", false, "do everything but mount")
		f.BoolVarP(&sloppy, "sloppy", "s", false, "ignore options that are not known")
		f.BoolVarP(&noMtab, "no-mtab", "n", false, "ignored")
		f.BoolVarP(&verbose, "verbose", "v", false, "ignored")
		f.StringVarP(&namespace, "namespace", "N", "", "not supported")
		f.StringVarP(&fsType, "type", "t", "", "ignored")
	} else {
		f.BoolVarP(&foreground, "foreground", "f", false, "stay in the foreground and log to standard error")
		c.Long += enableHelp
		f.BoolVar(&enable, "enable", false, "mount at each boot too; see above")
		f.StringVar(&table, "fstab", defaultFstab, "the `file` that --enable writes to")
		f.BoolVar(&upgrade, "upgrade", false, "have the mount on DIR, which goes on, served by this program; no other argument")
	}
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if upgrade {
			if len(args) != 1 {
				return &usageError{text: "mount --upgrade DIR: the directory of one mount"}
			}
			return a.upgrade(cmd.Context(), args[0], cfg.RunDir)
		}
		if len(args) != 2 {
			return &usageError{usage: cmd.UseLine()}
		}
		// Only the process that serves the mount, not the one that starts it.
		if os.Getenv(checkEnv) == "" && (foreground || os.Getenv(readyEnv) != "" || os.Getenv(heirEnv) != "") {
			if err := a.thrifty(); err != nil {
				return err
			}
			defer easeMonitor(cmd.Context())()
		}
		if namespace != "" {
			return &usageError{text: "mount -N is not supported: use nsenter(1)"}
		}
		cfg.Dir = args[1]
		var err error
		if cfg.Hosts, cfg.Volume, cfg.Subdir, err = parseSource(args[0]); err != nil {
			return err
		}
		o, err := parseMountOptions(options, sloppy)
		if err != nil {
			return err
		}
		for _, w := range o.warnings {
			a.Errorf("%s", w)
		}
		cfg.Hosts = append(cfg.Hosts, o.hosts...)
		cfg.Mount = o.mount
		cfg.Mount.OwnProcess = true
		cfg.Mount.Asker = []string{"/proc/self/exe", askerCommand}
		cfg.Mount.FsName = args[0]
		cfg.Wait = wait
		if o.stateDir != "" {
			cfg.StateDir = o.stateDir
		}
		if o.runDir != "" {
			cfg.RunDir = o.runDir
		}
		if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
			return err
		}
		if fake {
			return nil
		}
		if os.Getenv(checkEnv) != "" {
			return a.checked(cfg.Mount)
		}
		heir, err := readHeir()
		if err != nil {
			return err
		}
		if heir != nil {
			return a.mountHeir(cmd.Context(), cfg, heir, o.level)
		}
		if pipe := readyPipe(); pipe != nil {
			return a.mountChild(cmd.Context(), cfg, pipe, o.level)
		}
		if foreground {
			cfg.Log = slog.New(slog.NewTextHandler(a.Err, &slog.HandlerOptions{Level: o.level}))
			if enable {
				return &usageError{text: "--enable and --foreground do not go together"}
			}
			a.succeeds(&cfg, nil)
			return mountFailed(cfg, "", daemon.RunMount(cmd.Context(), cfg))
		}
		mount := func() error { return a.mountInBackground(cmd.Context(), cfg, o.logFile) }
		if enable {
			return a.enableMount(table, args[0], cfg.Dir, options, mount)
		}
		return mount()
	}
	return c
}

// askerCommand is what a mount has this program do beside it.
const askerCommand = "mount-asker"

func newMountAsker() *cobra.Command {
	return &cobra.Command{
		Use:    askerCommand,
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(*cobra.Command, []string) error { return mount.Ask() },
	}
}

const mountHelp = `Mount a volume. The command returns when the mount answers; what serves it goes
on in the background until "umount DIR". With --upgrade DIR a volume that is
mounted goes on, served by this program instead of the one that mounted it.

HOST is any machine of the pool. The daemon of this very machine is asked first;
the others count while it is down.

In /etc/fstab:  HOST:/VOLUME  DIR  mortar  defaults,_netdev  0 0

Options:
  ro, rw, noatime, nodiratime, relatime, nodev, nosuid, noexec   as mount(8) says
  locks=cluster     file locks hold on all machines (the default)
  locks=node        file locks hold on this machine only; in return files open at
                    the speed of a local disk. Right for web servers and PHP,
                    wrong for databases and mail boxes that several machines use
  cache-timeout=60  for how many seconds the kernel may use names and attributes
                    without asking (default: the volume's option)
  backup-volfile-servers=HOST:HOST, backupvolfile-server=HOST   more HOSTs
  log-file=FILE, log-level=INFO
  state-dir=DIR, run-dir=DIR     of a daemon that has others than the usual ones

Other options of mount.glusterfs are accepted and have no effect.
`

const enableHelp = `
With --enable it is mounted now and at each boot. DIR has to be empty, and is
made if it does not exist. It becomes immutable (chattr +i), so that nothing can be
written to it while the volume is not mounted. The line in /etc/fstab makes
systemd mount it after the daemon and before Docker, and on first use, so that a bind mount
waits for the volume in place of seeing an empty directory. "mortar umount
--disable DIR" takes all that back.
`

// parseSource reads HOST[,HOST...]:/VOLUME[/SUBDIR]. The first slash may be missing.
func parseSource(s string) (hosts []string, volume, sub string, err error) {
	i := strings.LastIndex(s, ":/")
	rest := ""
	if i >= 0 {
		rest = s[i+2:]
	} else if i = strings.LastIndex(s, ":"); i >= 0 {
		rest = s[i+1:]
	}
	if i < 1 || rest == "" {
		return nil, "", "", &usageError{text: fmt.Sprintf("%s: want HOST:/VOLUME, for instance localhost:/data", s)}
	}
	volume, sub, _ = strings.Cut(strings.TrimRight(rest, "/"), "/")
	if slices.Contains(strings.Split(sub, "/"), "..") {
		return nil, "", "", &usageError{text: fmt.Sprintf("%s: a directory of the volume cannot have .. in it", s)}
	}
	for h := range strings.SplitSeq(s[:i], ",") {
		if h = strings.TrimSpace(h); h == "" {
			return nil, "", "", &usageError{text: fmt.Sprintf("%s: an empty host name", s)}
		}
		hosts = append(hosts, h)
	}
	return hosts, volume, strings.Trim(sub, "/"), nil
}

// mountOptions are what -o says.
type mountOptions struct {
	mount            mount.Options
	hosts            []string
	logFile          string
	level            slog.Level
	stateDir, runDir string
	warnings         []string
}

// mountFlags are passed to the kernel as they are; false takes one back.
var mountFlags = map[string]struct {
	flag uintptr
	on   bool
}{
	"noatime": {unix.MS_NOATIME, true}, "atime": {unix.MS_NOATIME, false},
	"nodiratime": {unix.MS_NODIRATIME, true}, "diratime": {unix.MS_NODIRATIME, false},
	"relatime": {unix.MS_RELATIME, true}, "norelatime": {unix.MS_RELATIME, false}, "strictatime": {unix.MS_STRICTATIME, true},
	"nodev": {unix.MS_NODEV, true}, "dev": {unix.MS_NODEV, false},
	"nosuid": {unix.MS_NOSUID, true}, "suid": {unix.MS_NOSUID, false},
	"noexec": {unix.MS_NOEXEC, true}, "exec": {unix.MS_NOEXEC, false},
	"dirsync": {unix.MS_DIRSYNC, true},
}

// Words that are for others, or that mortar has no need of.
var (
	ignoredFlags = []string{"_netdev", "auto", "noauto", "defaults", "rw", "user", "users", "nouser", "owner", "group", "remount",
		"allow_other", "enable-ino32", "mem-accounting", "aux-gfid-mount", "thin-client", "resolve-gids",
		"global-threading", "localtime-logging", "no-root-squash", "mand", "nomand", "loud", "silent"}
	unhandledFlags = []string{"async", "sync", "nofail", "acl", "selinux", "worm", "root-squash"}
	ignoredValues  = []string{"fetch-attempts", "transport", "direct-io-mode", "server-port",
		"attribute-timeout", "entry-timeout", "negative-timeout", "gid-timeout", "lru-limit", "inode-table-size", "invalidate-limit",
		"background-qlen", "congestion-threshold", "use-readdirp", "reader-thread-count", "auto-invalidation", "kernel-writeback-cache",
		"attr-times-granularity", "fopen-keep-cache", "xlator-option", "fuse-mountopts", "oom-score-adj", "event-history",
		"dump-fuse", "process-name", "io-engine", "context", "fscontext", "defcontext", "rootcontext", "comment"}
)

var logLevels = map[string]slog.Level{
	"TRACE": slog.LevelDebug, "DEBUG": slog.LevelDebug, "INFO": slog.LevelInfo, "WARNING": slog.LevelWarn,
	"ERROR": slog.LevelError, "CRITICAL": slog.LevelError, "NONE": slog.LevelError + 4,
}

// parseMountOptions reads the values of -o.
func parseMountOptions(values []string, sloppy bool) (*mountOptions, error) {
	o := &mountOptions{mount: mount.Options{AllowOther: true}}
	for word := range strings.SplitSeq(strings.Join(values, ","), ",") {
		key, value, hasValue := strings.Cut(word, "=")
		if f, ok := mountFlags[key]; ok && !hasValue {
			if f.on {
				o.mount.Flags |= f.flag
			} else {
				o.mount.Flags &^= f.flag
			}
			continue
		}
		bad := func(want string) error {
			return &usageError{text: fmt.Sprintf("Invalid value for option %s: want %s", key, want)}
		}
		switch {
		case word == "" || strings.HasPrefix(word, "x-"):
		case word == "ro":
			o.mount.ReadOnly = true
		case slices.Contains(ignoredFlags, word):
		case slices.Contains(unhandledFlags, word):
			o.warnings = append(o.warnings, fmt.Sprintf("warning: option %s is not handled", word))
		case key == "locks" && (value == "node" || value == "cluster"):
			o.mount.LocksNode = value == "node"
		case key == "locks":
			return nil, bad("node or cluster")
		case key == "cache-timeout":
			d, err := time.ParseDuration(value)
			if err != nil {
				d, err = time.ParseDuration(value + "s")
			}
			if err != nil || d < 0 {
				return nil, bad("seconds")
			}
			if o.mount.CacheTimeout = d; d == 0 {
				o.mount.CacheTimeout = -1
			}
		case key == "backup-volfile-servers" && value != "":
			o.hosts = append(o.hosts, strings.Split(value, ":")...)
		case key == "backupvolfile-server" && value != "":
			o.hosts = append(o.hosts, value)
		case key == "log-file" && value != "":
			o.logFile = value
		case key == "log-level":
			level, ok := logLevels[strings.ToUpper(value)]
			if !ok {
				return nil, bad("TRACE, DEBUG, INFO, WARNING, ERROR, CRITICAL or NONE")
			}
			o.level = level
		case key == "state-dir" && value != "":
			o.stateDir = value
		case key == "run-dir" && value != "":
			o.runDir = value
		case hasValue && (slices.Contains(ignoredValues, key) || strings.HasPrefix(key, "halo-")):
		case sloppy:
			o.warnings = append(o.warnings, fmt.Sprintf("warning: option %s is not known and ignored", word))
		default:
			return nil, &usageError{text: "Invalid option " + word}
		}
	}
	return o, nil
}

// mountFailed says as mount.glusterfs does that a mount failed, and why.
func mountFailed(cfg daemon.MountConfig, logFile string, err error) error {
	if err == nil {
		return nil
	}
	text := fmt.Sprintf("%v\nMounting mortar on %s failed.", err, cfg.Dir)
	if logFile != "" {
		text += fmt.Sprintf("\nMount failed. Check the log file %s for more details.", logFile)
	}
	return errors.New(text)
}

// A mount in the background is a process of its own: this program, started
// again with the same words, and a pipe on which it says how it went.
const (
	readyEnv = "MORTAR_MOUNT_READY"
	readyFD  = 3
	readyOK  = "ok\n"
)

// readyPipe is the pipe, in the process that was started so.
func readyPipe() *os.File {
	if os.Getenv(readyEnv) == "" {
		return nil
	}
	os.Unsetenv(readyEnv)
	syscall.CloseOnExec(readyFD)
	return os.NewFile(readyFD, "ready")
}

// mountChild serves the mount in the process that stays.
func (a *app) mountChild(ctx context.Context, cfg daemon.MountConfig, pipe *os.File, level slog.Level) error {
	cfg.Log = slog.New(slog.NewTextHandler(a.Err, &slog.HandlerOptions{Level: level}))
	a.succeeds(&cfg, nil)
	told := false
	cfg.Ready = func() {
		told = true
		if _, err := syscall.Setsid(); err != nil { // what ends the terminal and its processes does not end this one
			cfg.Log.Warn("the mount's process has no session of its own", "dir", cfg.Dir, "error", err)
		}
		io.WriteString(pipe, readyOK)
		pipe.Close()
	}
	err := daemon.RunMount(ctx, cfg)
	if !told {
		if err == nil {
			err = errors.New("it was ended before it was mounted")
		}
		io.WriteString(pipe, err.Error())
		pipe.Close()
	}
	if err != nil {
		cfg.Log.Error("the mount has ended", "dir", cfg.Dir, "error", err)
	} else {
		cfg.Log.Info("unmounted", "dir", cfg.Dir)
	}
	return err
}

// succeeds has a mount be handed on to the next process.
func (a *app) succeeds(cfg *daemon.MountConfig, h *heir) {
	if cfg.Log == nil || a.Err != os.Stderr {
		return // in a test's process, which is not this program
	}
	s := &succession{a: a, cfg: *cfg, heir: h}
	s.life, s.end = context.WithCancel(context.Background())
	cfg.Serving = s.serving
}

// mountHeir goes on with the mount of the process before this one.
func (a *app) mountHeir(ctx context.Context, cfg daemon.MountConfig, h *heir, level slog.Level) error {
	cfg.Log = slog.New(slog.NewTextHandler(a.Err, &slog.HandlerOptions{Level: level}))
	cfg.Before = h.before
	a.succeeds(&cfg, h)
	cfg.Ready = func() {
		if h.asked != nil {
			io.WriteString(h.asked, readyOK)
			h.asked.Close()
		}
	}
	err := daemon.RunMount(ctx, cfg)
	if err != nil {
		cfg.Log.Error("the mount has ended", "dir", cfg.Dir, "error", err)
	} else {
		cfg.Log.Info("unmounted", "dir", cfg.Dir)
	}
	return err
}

// mountInBackground starts the process that serves the mount, and waits for its word.
func (a *app) mountInBackground(ctx context.Context, cfg daemon.MountConfig, logFile string) error {
	if logFile == "" {
		logFile = filepath.Join("/var/log/mortar", strings.ReplaceAll(strings.Trim(cfg.Dir, "/"), "/", "-")+".log")
	}
	out, err := openLog(logFile)
	if err != nil {
		a.Errorf("warning: %v; nothing will be logged", err)
		if out, err = os.OpenFile(os.DevNull, os.O_WRONLY, 0); err != nil {
			return err
		}
		logFile = ""
	}
	defer out.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self)
	cmd.Args = slices.Clone(a.args) // with the name that tells how to read them
	cmd.Env = append(os.Environ(), readyEnv+"=1")
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = []*os.File{w}
	// Until it is mounted it stays in this process's group, which is systemd's where that mounts because somebody looked
	// at the directory: the kernel takes everybody else who looks at that for one who has to wait for the mount.
	err = cmd.Start()
	w.Close()
	if err != nil {
		return mountFailed(cfg, logFile, err)
	}
	word := make(chan []byte, 1)
	go func() {
		b, _ := io.ReadAll(io.LimitReader(r, 64<<10))
		word <- b
	}()
	select {
	case b := <-word:
		if string(b) == readyOK {
			return cmd.Process.Release()
		}
		cmd.Wait()
		text := string(bytes.TrimSpace(b))
		if text == "" {
			text = "the process that serves the mount has died"
		}
		return mountFailed(cfg, logFile, errors.New(text))
	case <-ctx.Done():
		cmd.Process.Signal(syscall.SIGTERM)
		<-word
		cmd.Wait()
		return context.Cause(ctx)
	}
}

func openLog(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
}

func newUmount(a *app) *cobra.Command {
	var (
		lazy, disable bool
		table         string
	)
	c := verb("umount DIR", "unmount a volume", 1, 1, func(ctx context.Context, args []string) error {
		dir, err := filepath.Abs(args[0])
		if err != nil {
			return err
		}
		if disable {
			a.stopAutomount(table, dir)
		}
		there, err := mounted(dir)
		if err != nil {
			return err
		}
		if !there {
			if disable {
				return a.disableMount(table, dir)
			}
			return fmt.Errorf("%s: no mortar volume is mounted here", dir)
		}
		flags := 0
		if lazy {
			flags = unix.MNT_DETACH
		}
		switch err := unix.Unmount(dir, flags); {
		case errors.Is(err, unix.EBUSY):
			return fmt.Errorf("%s is in use; \"fuser -vm %s\" shows by whom, and \"mortar umount -l %s\" unmounts as soon as nobody uses it", dir, dir, dir)
		case errors.Is(err, unix.EPERM):
			return fmt.Errorf("%s: only root may unmount it", dir)
		case err != nil:
			return fmt.Errorf("%s: %w", dir, err)
		}
		if disable {
			return a.disableMount(table, dir)
		}
		return a.done("%s is unmounted", dir)
	})
	c.Flags().BoolVar(&disable, "disable", false, "take back \"mortar mount --enable\": do not mount it at boot any more")
	c.Flags().StringVar(&table, "fstab", defaultFstab, "the `file` that --disable writes to")
	c.Flags().BoolVarP(&lazy, "lazy", "l", false, "unmount as soon as nobody uses it any more")
	return c
}

// mounted reports whether a volume of ours is mounted at dir.
func mounted(dir string) (bool, error) {
	mounts, err := mountinfo.Self()
	return slices.ContainsFunc(mounts, func(m mountinfo.Mount) bool { return m.Dir == dir && m.Ours() }), err
}
