// Package cli is the command line: nouns and verbs of the gluster command, in
// the same order and with the same texts where scripts parse them, spoken to
// the daemon on this machine. One file per noun; constructors only.
//
// Exit status: 0 done, 1 it failed, 2 the command line makes no sense, 3 there
// is no daemon to ask. Called as "gluster" it is 0 or 1, as the original's.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"mortar/internal/api"
	"mortar/internal/cli/ui"
)

// Exit statuses.
const (
	exitFailure = 1
	exitUsage   = 2
	exitConnect = 3
)

// app is what the commands share. Commands are built anew for each run.
type app struct {
	*ui.UI
	args    []string // the whole command line
	name    string   // the name that the program was called by, for messages
	gluster bool     // called as gluster
	helper  bool     // called by mount(8)

	// flags of all commands
	socket  string
	mode    string
	timeout int // seconds
	xml     bool
	remote  string
}

// Main runs a command line, args[0] being the program's name, until it is done
// or the process is asked to end, and returns the exit status.
func Main(args []string, in io.Reader, out, errOut io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return Run(ctx, args, in, out, errOut)
}

// Run is Main with the caller's context in place of signals.
func Run(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) int {
	a := &app{UI: &ui.UI{In: in, Out: out, Err: errOut}, name: "mortar"}
	if len(args) == 0 {
		args = []string{a.name}
	}
	words := a.called(args)
	root := newRoot(a)
	err := func() error {
		words, err := resolve(root, words)
		if err != nil {
			return err
		}
		root.SetArgs(words)
		return root.ExecuteContext(ctx)
	}()
	return a.status(err)
}

// called notes by what name the program was called, and returns the words of the command.
func (a *app) called(args []string) (words []string) {
	a.args, words = args, args[1:]
	switch base := filepath.Base(args[0]); base {
	case "gluster":
		a.name, a.gluster = base, true
	case "mount.mortar", "mount.glusterfs":
		if len(words) > 0 && (words[0] == askerCommand || words[0] == keeperCommand) {
			break // a mount has started it, under its own name
		}
		a.helper = true
		words = append([]string{"mount"}, words...)
	}
	return words
}

// status reports err and returns the exit status for it.
func (a *app) status(err error) int {
	if err == nil {
		return 0
	}
	code := exitFailure
	var (
		usage *usageError
		shown *shownError
	)
	switch {
	case errors.As(err, &shown): // the command has said it all
	case errors.As(err, &usage):
		code = exitUsage
		a.Errorf("%s", usage.Error())
	default:
		if errors.Is(err, api.ErrConnect) {
			code = exitConnect
		}
		if a.JSON {
			a.Show(api.AsError(err), nil)
		} else {
			a.Errorf("%s", err)
		}
	}
	if a.gluster {
		code = exitFailure
	}
	return code
}

// usageError is a command line that makes no sense.
type usageError struct {
	text  string
	usage string // pattern to show; empty: none
}

func (e *usageError) Error() string {
	switch {
	case e.usage == "":
		return e.text
	case e.text == "":
		return "\nUsage:\n" + e.usage
	}
	return e.text + "\n\nUsage:\n" + e.usage
}

// shownError is a failure whose text is on the screen already.
type shownError struct{ err error }

func (e *shownError) Error() string { return e.err.Error() }

// failed puts the words in front of an error that gluster has there.
// An error of the connection has no such words.
func failed(prefix string, err error) error {
	if err == nil || errors.Is(err, api.ErrConnect) || errors.Is(err, errTimeout) {
		return err
	}
	e := *api.AsError(err)
	e.Message = prefix + e.Message
	return &e
}

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:           a.name,
		Short:         "mortar holds bricks together: a replicated file system for small clusters",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          func(cmd *cobra.Command, args []string) error { return nil },
		RunE: func(cmd *cobra.Command, args []string) error {
			return cmd.Help()
		},
		PersistentPreRunE: func(cmd *cobra.Command, args []string) error { return a.checkFlags() },
	}
	root.SetIn(a.In)
	root.SetOut(a.Out)
	root.SetErr(a.Err)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &usageError{text: err.Error(), usage: cmd.UseLine()}
	})
	f := root.PersistentFlags()
	socket := os.Getenv("MORTAR_SOCKET")
	if socket == "" {
		socket = api.DefaultSocket
	}
	f.StringVar(&a.socket, "socket", socket, "unix `path` of the daemon to ask; $MORTAR_SOCKET")
	f.BoolVar(&a.JSON, "json", false, "print JSON")
	f.StringVar(&a.mode, "mode", "interactive", "interactive, or script: answer every question with yes")
	f.IntVar(&a.timeout, "timeout", 0, "`seconds` to wait for the daemon (default 120, long commands 600)")
	// What the gluster command knows besides and mortar has no use for.
	f.StringVar(&a.socket, "glusterd-sock", socket, "the same as --socket")
	f.StringVar(&a.remote, "remote-host", "", "only localhost")
	f.BoolVar(&a.xml, "xml", false, "not supported, see --json")
	for _, name := range []string{"nolog", "wignore", "wignore-partition", "inet6"} {
		f.Bool(name, false, "ignored")
	}
	for _, name := range []string{"log-level", "log-file", "secure-mgmt"} {
		if f.Lookup(name) == nil {
			f.String(name, "", "ignored")
		}
	}
	for _, name := range []string{"glusterd-sock", "remote-host", "xml", "nolog", "wignore", "wignore-partition", "inet6", "log-level", "log-file", "secure-mgmt"} {
		f.MarkHidden(name)
	}
	root.AddCommand(
		newServer(a),
		newPeer(a), newJoin(a), newPool(a),
		newVolume(a), newSubvolume(a),
		newMount(a), newMountAsker(), newMountKeeper(), newUmount(a), newFile(a), newBrick(a),
		newDoctor(a), newImport(a), newMigrate(a), newDemo(a), newManual(a),
		newVersion(a),
	)
	help := newHelp(a)
	root.SetHelpCommand(help)
	root.AddCommand(help)
	root.CompletionOptions.HiddenDefaultCmd = true
	root.InitDefaultCompletionCmd()
	return root
}

// checkFlags looks at the flags of all commands once they are parsed.
func (a *app) checkFlags() error {
	switch a.mode {
	case "script":
		a.Script = true
	case "interactive":
	default:
		return &usageError{text: fmt.Sprintf("--mode=%s: want script or interactive", a.mode)}
	}
	if a.xml {
		return &usageError{text: "--xml is not supported; --json prints the same facts on every command"}
	}
	if a.remote != "" && a.remote != "localhost" && a.remote != "127.0.0.1" {
		return &usageError{text: fmt.Sprintf("--remote-host=%s: mortar takes commands on the machine itself only; run it there, for instance with ssh", a.remote)}
	}
	return nil
}

// noun makes a command that only has other commands below it.
func noun(use, short string, verbs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use:   use,
		Short: short,
		RunE: func(cmd *cobra.Command, args []string) error {
			return &usageError{text: "unrecognized command", usage: patterns(cmd)}
		},
	}
	c.AddCommand(verbs...)
	c.AddCommand(&cobra.Command{
		Use:    "help",
		Short:  "display help for " + use + " commands",
		Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			title := use + " commands"
			fmt.Fprintf(cmd.OutOrStdout(), "\n%s\n%s\n\n%s\n", title, strings.Repeat("=", len(title)), patterns(c))
			return nil
		},
	})
	return c
}

// patterns lists the verbs below a noun as gluster's help does.
func patterns(c *cobra.Command) string {
	var b strings.Builder
	for _, v := range c.Commands() {
		if !v.Hidden {
			fmt.Fprintf(&b, " %s %s - %s\n", c.Name(), v.Use, v.Short)
		}
	}
	return b.String()
}

// verb makes a command that does something. It takes at least min arguments and
// at most max (−1: any number).
func verb(use, short string, min, max int, run func(ctx context.Context, args []string) error) *cobra.Command {
	return &cobra.Command{
		Use:   use,
		Short: short,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < min || max >= 0 && len(args) > max {
				return misuse(cmd, "")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			err := run(cmd.Context(), args)
			if err == errUsage {
				return misuse(cmd, "")
			}
			var u *usageError
			if errors.As(err, &u) && u.usage == "" {
				return misuse(cmd, u.text)
			}
			return err
		},
	}
}

// errUsage makes a verb print its pattern and nothing else.
var errUsage = errors.New("usage")

func misuse(cmd *cobra.Command, text string) error {
	path := strings.TrimPrefix(cmd.CommandPath(), cmd.Root().Name()+" ")
	if i := strings.IndexByte(cmd.Use, ' '); i >= 0 {
		path += cmd.Use[i:]
	}
	return &usageError{text: text, usage: path}
}

// errTimeout is the client's patience with the daemon running out.
var errTimeout = errors.New("Error : Request timed out")

// The patience of commands, in seconds; gluster's.
const (
	usual = 120
	slow  = 600
)

// ask runs one conversation with the daemon on this machine.
func (a *app) ask(ctx context.Context, patience int, talk func(ctx context.Context, c *api.Client) error) error {
	if a.timeout > 0 {
		patience = a.timeout
	}
	ctx, cancel := context.WithTimeoutCause(ctx, time.Duration(patience)*time.Second, errTimeout)
	defer cancel()
	c := api.Unix(a.socket)
	defer c.Close()
	err := talk(ctx, c)
	if err != nil && context.Cause(ctx) == errTimeout {
		return errTimeout
	}
	if !errors.Is(err, api.ErrConnect) {
		return err
	}
	return fmt.Errorf("%s%w", a.noDaemon(err), silent{err})
}

// silent keeps an error in the chain and out of the text.
type silent struct{ error }

func (silent) Error() string   { return "" }
func (s silent) Unwrap() error { return s.error }

// noDaemon says what to do about a daemon that does not answer.
func (a *app) noDaemon(err error) string {
	if a.gluster {
		return "Connection failed. Please check if gluster daemon is operational."
	}
	const first = "Connection failed. Please check if the mortar daemon is operational.\n"
	switch {
	case errors.Is(err, fs.ErrPermission):
		return first + fmt.Sprintf("This user may not open %s: use sudo, or join the group mortar to look at things.", a.socket)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return first + fmt.Sprintf("Nothing listens on %s: start it with \"systemctl start mortar\" or \"mortar server\" "+
			"(a daemon with another --run-dir is found with --socket or $MORTAR_SOCKET).", a.socket)
	}
	return first + err.Error()
}

// word reports whether s is one of the words, or the beginning of only one, and which.
func word(s string, words ...string) string {
	var found string
	for _, w := range words {
		if w == s {
			return w
		}
		if s != "" && strings.HasPrefix(w, s) {
			if found != "" {
				return "" // ambiguous
			}
			found = w
		}
	}
	return found
}

// flagged takes a trailing word, such as force, off args.
func flagged(args []string, w string) (rest []string, on bool) {
	if n := len(args); n > 0 && word(args[n-1], w) == w {
		return args[:n-1], true
	}
	return args, false
}
