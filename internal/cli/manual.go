package cli

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// manualCommand writes what a package has besides the program. It is made from the
// commands themselves, so that it says what they do.
const manualCommand = "manual"

func newManual(a *app) *cobra.Command {
	c := verb(manualCommand+" <DIR>", "write manual pages, shell completions and an example of the configuration", 1, 1,
		func(ctx context.Context, args []string) error {
			files, err := manual(a)
			if err != nil {
				return err
			}
			for name, text := range files {
				path := filepath.Join(args[0], name)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					return err
				}
				if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
					return err
				}
			}
			return nil
		})
	c.Hidden = true
	return c
}

// manual returns the files by their names.
func manual(a *app) (map[string]string, error) {
	plain := *a
	plain.gluster, plain.helper, plain.name = false, false, "mortar"
	root := newRoot(&plain)
	files := map[string]string{"man/mortar.8": rootPage(root)}
	var server *cobra.Command
	for _, c := range root.Commands() {
		if c.Hidden {
			continue
		}
		if c.Name() == "server" {
			server = c
		}
		files["man/mortar-"+c.Name()+".8"] = commandPage("mortar-"+c.Name(), c, "mortar")
	}
	helper := plain
	helper.helper = true
	mount := newMount(&helper)
	mount.Use = strings.Replace(mount.Use, "mount ", "mount.mortar ", 1)
	files["man/mount.mortar.8"] = commandPage("mount.mortar", mount, "mortar", "mortar-mount", "mount")
	files["man/mortar.toml.5"] = settingsPage(server)
	files["mortar.toml"] = exampleConfig(server)

	for name, write := range map[string]func(*strings.Builder) error{
		"completion/mortar.bash": func(b *strings.Builder) error { return root.GenBashCompletionV2(b, true) },
		"completion/_mortar":     func(b *strings.Builder) error { return root.GenZshCompletion(b) },
		"completion/mortar.fish": func(b *strings.Builder) error { return root.GenFishCompletion(b, true) },
	} {
		var b strings.Builder
		if err := write(&b); err != nil {
			return nil, err
		}
		files[name] = b.String()
	}
	return files, nil
}

// roff escapes text for a manual page.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			lines[i] = `\&` + l
		}
	}
	return strings.Join(lines, "\n")
}

// page begins a manual page.
func page(b *strings.Builder, name string, section int, short string) {
	fmt.Fprintf(b, ".TH \"%s\" %d \"\" \"mortar\" \"mortar\"\n", strings.ToUpper(roff(name)), section)
	fmt.Fprintf(b, ".SH NAME\n%s \\- %s\n", roff(name), roff(short))
}

// verbatim is text with its line ends, as help shows it.
func verbatim(b *strings.Builder, text string) {
	fmt.Fprintf(b, ".nf\n%s\n.fi\n", roff(strings.TrimRight(text, "\n")))
}

func seeAlso(b *strings.Builder, names ...string) {
	fmt.Fprint(b, ".SH SEE ALSO\n")
	for i, n := range names {
		if i > 0 {
			fmt.Fprint(b, ",\n")
		}
		fmt.Fprintf(b, ".BR %s (8)", roff(n))
	}
	fmt.Fprint(b, "\n")
}

// flagName is a flag as it is written on the command line.
func flagName(f *pflag.Flag) (name, usage string) {
	value, usage := pflag.UnquoteUsage(f)
	name = "--" + f.Name
	if f.Shorthand != "" {
		name = "-" + f.Shorthand + ", " + name
	}
	if value != "" {
		name += " " + value
	}
	return name, usage
}

func flagList(b *strings.Builder, flags *pflag.FlagSet) {
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		name, usage := flagName(f)
		if d := f.DefValue; d != "" && d != "false" && d != "[]" && d != "0" && !strings.Contains(usage, "default") {
			usage += " (default " + d + ")"
		}
		fmt.Fprintf(b, ".TP\n.B %s\n%s\n", roff(name), roff(usage))
	})
}

// verbs are the commands below c that do something, each with its words before it.
func verbs(c *cobra.Command, path string) (all []struct {
	path string
	c    *cobra.Command
}) {
	for _, v := range c.Commands() {
		if v.Hidden {
			continue
		}
		if v.HasAvailableSubCommands() {
			all = append(all, verbs(v, path+" "+v.Name())...)
			continue
		}
		all = append(all, struct {
			path string
			c    *cobra.Command
		}{path + " " + v.Use, v})
	}
	return all
}

// commandPage is the page of a noun with its verbs, or of a verb that stands alone.
func commandPage(name string, c *cobra.Command, also ...string) string {
	var b strings.Builder
	page(&b, name, 8, c.Short)
	path := strings.TrimSuffix(c.CommandPath(), c.Name())
	fmt.Fprint(&b, ".SH SYNOPSIS\n.nf\n")
	below := verbs(c, path+c.Name())
	if len(below) == 0 {
		fmt.Fprintf(&b, ".B %s\n", roff(path+c.Use))
	}
	for _, v := range below {
		fmt.Fprintf(&b, ".B %s\n", roff(v.path))
	}
	fmt.Fprint(&b, ".fi\n.SH DESCRIPTION\n")
	long := c.Long
	if long == "" {
		long = strings.ToUpper(c.Short[:1]) + c.Short[1:] + "."
	}
	verbatim(&b, long)
	for i, v := range below {
		if i == 0 {
			fmt.Fprint(&b, ".SH COMMANDS\n")
		}
		fmt.Fprintf(&b, ".SS %s\n%s\n", roff(v.path), roff(v.c.Short))
		if v.c.Long != "" {
			verbatim(&b, v.c.Long)
		}
		flagList(&b, v.c.LocalNonPersistentFlags())
	}
	if f := c.LocalFlags(); f.HasAvailableFlags() {
		var list strings.Builder
		if flagList(&list, f); list.Len() > 0 {
			fmt.Fprint(&b, ".SH OPTIONS\n", list.String())
		}
	}
	seeAlso(&b, also...)
	return b.String()
}

func rootPage(root *cobra.Command) string {
	var b strings.Builder
	page(&b, "mortar", 8, root.Short[strings.Index(root.Short, ": ")+2:])
	fmt.Fprint(&b, ".SH SYNOPSIS\n.B mortar\n.I command\n[\\fIargument\\fR ...]\n.SH DESCRIPTION\n")
	fmt.Fprint(&b, roff("Every beginning of a command that fits only one is understood. Commands ask the daemon of this machine, and say what to do if there is none.")+"\n.SH COMMANDS\n")
	var names []string
	for _, c := range root.Commands() {
		if c.Hidden {
			continue
		}
		fmt.Fprintf(&b, ".TP\n.BR mortar\\-%s (8)\n%s\n", roff(c.Name()), roff(c.Short))
		names = append(names, "mortar-"+c.Name())
	}
	fmt.Fprint(&b, ".SH OPTIONS\nThese go with every command.\n")
	flagList(&b, root.PersistentFlags())
	fmt.Fprint(&b, ".SH EXIT STATUS\n0: done. 1: it failed. 2: the command line makes no sense. 3: there is no daemon to ask.\n")
	seeAlso(&b, append(names, "mount.mortar")...)
	return b.String()
}

// settings are the flags of the server that its configuration file has as well.
func settings(server *cobra.Command) (all []*pflag.Flag) {
	server.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
		if f.Name != "config" && f.Name != "help" && !slices.Contains(flagsOnly, f.Name) {
			all = append(all, f)
		}
	})
	return all
}

// flagsOnly are said once, on the command line.
var flagsOnly = []string{"new-identity"}

func settingsPage(server *cobra.Command) string {
	var b strings.Builder
	page(&b, "mortar.toml", 5, "configuration of the mortar daemon")
	fmt.Fprint(&b, ".SH SYNOPSIS\n.I /etc/mortar/mortar.toml\n.SH DESCRIPTION\n")
	fmt.Fprint(&b, roff("What the daemon of this machine is told when it starts. The file need not exist. A flag of \"mortar server\" counts more than the file; a key that is not known is refused. What concerns the whole pool is not here but an option of its volumes (\"mortar volume set\").")+"\n.SH KEYS\n")
	for _, f := range settings(server) {
		_, usage := flagName(f)
		fmt.Fprintf(&b, ".TP\n.B %s\n%s\n", roff(f.Name), roff(usage))
	}
	seeAlso(&b, "mortar-server")
	return b.String()
}

// exampleConfig has every setting, none of them set.
func exampleConfig(server *cobra.Command) string {
	var b strings.Builder
	fmt.Fprint(&b, "# Settings of the mortar daemon on this machine, see mortar.toml(5).\n# Every one is shown with its default, and none has to be set.\n")
	for _, f := range settings(server) {
		value := fmt.Sprintf("%q", f.DefValue)
		switch f.Value.Type() {
		case "bool":
			value = f.DefValue
		case "stringSlice":
			value = "[]"
		}
		_, usage := flagName(f)
		fmt.Fprintf(&b, "\n# %s\n#%s = %s\n", usage, f.Name, value)
	}
	return b.String()
}
