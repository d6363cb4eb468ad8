package cli

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"mortar/internal/api"
	"mortar/internal/cli/ui"
	"mortar/internal/daemon"
	"mortar/internal/disk"
	"mortar/internal/mount"
	"mortar/internal/wire/wiretest"
)

// leakless fails tests that leave goroutines behind.
type leakless struct{ m *testing.M }

func (l leakless) Run() int {
	code := l.m.Run()
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

func TestMain(m *testing.M) {
	run := func() { os.Exit(Main(os.Args, os.Stdin, os.Stdout, os.Stderr)) }
	testscript.Main(leakless{m}, map[string]func(){"mortar": run, "gluster": run, "mount.mortar": run})
}

// TestScripts runs the command line, as processes of their own, against daemons
// in this process. The scripts have these commands of their own:
//
//	node NAME [accept-probe] [witness] [client]  starts a daemon
//	halt NAME                           stops it; node NAME starts it again
//	use NAME                            the commands that follow ask this daemon
//	join NAME                           the daemon in use joins that one's pool
//	golden FILE                         the last output is that of FILE; what
//	                                    differs between runs is masked
//	until REGEXP mortar ARGS...         runs it until what it prints matches
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			// The path of a socket is short, and that of a brick in a table always
			// of the same length.
			dir := fmt.Sprintf("/tmp/mortar-cli-%08x", rand.Uint32())
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			c := &machines{dir: dir, nodes: map[string]*node{}}
			env.Values[clusterKey{}] = c
			env.Setenv("DIR", dir)
			env.Setenv("PATH", os.Getenv("PATH"))
			env.Defer(c.close)
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"node":   cmdNode,
			"halt":   cmdHalt,
			"use":    cmdUse,
			"golden": cmdGolden,
			"join":   cmdJoin,
			"until":  cmdUntil,
		},
		Condition: func(cond string) (bool, error) {
			if cond != "fuse" {
				return false, fmt.Errorf("unknown condition %s", cond)
			}
			return canMount(), nil
		},
	})
}

type clusterKey struct{}

// machines are what a script has started.
type machines struct {
	dir      string
	nodes    map[string]*node
	reserved []func() // releases of addresses
}

// reserve returns an address that nobody else is given before the script ends, also while its
// machine is halted.
func (c *machines) reserve(ts *testscript.TestScript) string {
	addr, release, err := wiretest.Reserve()
	ts.Check(err)
	c.reserved = append(c.reserved, release)
	return addr
}

type node struct {
	cfg  daemon.Config
	stop context.CancelFunc // nil while it does not run
	done chan error
}

func (c *machines) close() {
	// What a script that failed has left mounted must not be removed as if it
	// were files.
	dirs, _ := filepath.Glob(filepath.Join(c.dir, "m[0-9]"))
	imports, _ := filepath.Glob(filepath.Join(c.dir, "*/import/*"))
	dirs = append(dirs, imports...)
	for _, d := range dirs {
		unix.Unmount(d, unix.MNT_DETACH)
		disk.SetImmutable(d, false)
	}
	for _, n := range c.nodes {
		n.halt()
	}
	for _, release := range c.reserved {
		release()
	}
	os.RemoveAll(c.dir)
}

func (n *node) halt() error {
	if n.stop == nil {
		return nil
	}
	n.stop()
	n.stop = nil
	return <-n.done
}

func cmdNode(ts *testscript.TestScript, neg bool, args []string) {
	c := ts.Value(clusterKey{}).(*machines)
	if neg || len(args) == 0 {
		ts.Fatalf("usage: node NAME [accept-probe] [witness] [client]")
	}
	name := args[0]
	n := c.nodes[name]
	if n == nil {
		n = &node{cfg: daemon.Config{
			StateDir: filepath.Join(c.dir, name, "state"), RunDir: filepath.Join(c.dir, name), Name: name,
			Listen: c.reserve(ts), Log: slog.New(slog.DiscardHandler),
		}}
		for _, a := range args[1:] {
			n.cfg.AcceptProbe = n.cfg.AcceptProbe || a == "accept-probe"
			n.cfg.Witness = n.cfg.Witness || a == "witness"
			n.cfg.Client = n.cfg.Client || a == "client"
		}
		c.nodes[name] = n
	}
	d, err := daemon.New(n.cfg)
	ts.Check(err)
	n.cfg.Listen = d.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	n.stop, n.done = cancel, make(chan error, 1)
	go func() { n.done <- d.Run(ctx) }()
	ts.Setenv(strings.ToUpper(name), n.cfg.Listen)
	cmdUse(ts, false, args[:1])
}

func cmdHalt(ts *testscript.TestScript, neg bool, args []string) {
	ts.Check(ts.Value(clusterKey{}).(*machines).nodes[args[0]].halt())
}

func cmdUse(ts *testscript.TestScript, neg bool, args []string) {
	ts.Setenv("MORTAR_SOCKET", ts.Value(clusterKey{}).(*machines).nodes[args[0]].cfg.APISocket())
}

func cmdJoin(ts *testscript.TestScript, neg bool, args []string) {
	n := ts.Value(clusterKey{}).(*machines).nodes[args[0]]
	there, here := api.Unix(n.cfg.APISocket()), api.Unix(ts.Getenv("MORTAR_SOCKET"))
	defer there.Close()
	defer here.Close()
	inv, err := there.Invite(context.Background(), api.InviteRequest{})
	ts.Check(err)
	_, err = here.Join(context.Background(), api.JoinRequest{Token: inv.Token, Hosts: inv.Hosts})
	ts.Check(err)
}

func cmdUntil(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: until REGEXP mortar ARGS...")
	}
	want := regexp.MustCompile("(?m)" + args[0])
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) { // between two looks
		ts.Exec(args[1], args[2:]...) // may fail
		text := ts.ReadFile("stdout") + ts.ReadFile("stderr")
		if want.MatchString(text) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%s never printed %s, but\n%s", strings.Join(args[1:], " "), args[0], text)
		}
	}
}

var uuid = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)

func cmdGolden(ts *testscript.TestScript, neg bool, args []string) {
	c := ts.Value(clusterKey{}).(*machines)
	got := strings.ReplaceAll(ts.ReadFile("stdout"), c.dir, "$DIR")
	got = uuid.ReplaceAllString(got, "UUID")
	for name, n := range c.nodes {
		_, port, _ := net.SplitHostPort(n.cfg.Listen)
		got = strings.ReplaceAll(got, n.cfg.Listen, "$"+strings.ToUpper(name))
		got = regexp.MustCompile(`\b`+port+`\b`).ReplaceAllString(got, "PORT"+strings.Repeat("_", len(port)-4))
	}
	got = regexp.MustCompile(fmt.Sprintf(`\b%d\b`, os.Getpid())).ReplaceAllString(got, "PID")
	want := ts.ReadFile(args[0])
	if diff := cmp.Diff(trimLines(want), trimLines(got)); diff != "" {
		ts.Fatalf("not %s:\n%s", args[0], diff)
	}
}

// trimLines removes the blanks at line ends, which an editor would.
func trimLines(s string) string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return strings.Join(lines, "\n")
}

// run runs a command line in this process.
func run(args ...string) (status int, out, errOut string) {
	var o, e bytes.Buffer
	status = Run(context.Background(), args, strings.NewReader(""), &o, &e)
	return status, o.String(), e.String()
}

func TestResolve(t *testing.T) {
	for _, c := range []struct{ line, want, wrong string }{
		{line: "volume info wp", want: "volume info wp"},
		{line: "v info", want: "volume info"},
		{line: "vol inf wp", want: "volume info wp"},
		{line: "--mode script peer prob gluster-2", want: "--mode script peer probe gluster-2"},
		{line: "--mode=script pee stat", want: "--mode=script peer status"},
		{line: "--json vol list", want: "--json volume list"},
		{line: "pool li", want: "pool list"},
		{line: "volume create vol re 2 a:/b", want: "volume create vol re 2 a:/b"},
		{line: "volume", want: "volume"},
		{line: "help volume", want: "help volume"},
		{line: "__complete vol", want: "__complete vol"},
		{line: "p status", wrong: "ambiguous word: p (position 0): peer, pool"},
		{line: "volume st wp", wrong: "ambiguous word: st (position 1): start, status, stop"},
		{line: "volumes info", wrong: "unrecognized word: volumes (position 0)\nDid you mean volume?"},
		{line: "volume inof", wrong: "unrecognized word: inof (position 1)\nDid you mean info?"},
		{line: "frobnicate", wrong: "unrecognized word: frobnicate (position 0)"},
		{line: "volume geo-replication x", wrong: "unrecognized word: geo-replication (position 1)\nmortar replicates within one pool only."},
	} {
		got, err := resolve(newRoot(&app{UI: &ui.UI{}, name: "mortar"}), strings.Fields(c.line))
		switch {
		case c.wrong == "" && (err != nil || strings.Join(got, " ") != c.want):
			t.Errorf("%s: %q, %v; want %q", c.line, got, err, c.want)
		case c.wrong != "" && (err == nil || err.Error() != c.wrong):
			t.Errorf("%s: %v; want %s", c.line, err, c.wrong)
		}
	}
}

func TestParseCreate(t *testing.T) {
	for _, c := range []struct {
		line  string
		want  *api.VolumeCreate
		wrong string
	}{
		{line: "wp replica 3 a:/b b:/b c:/b", want: &api.VolumeCreate{Name: "wp", Replica: 3, Bricks: []string{"a:/b", "b:/b", "c:/b"}}},
		{line: "wp rep 2 transport tcp a:/b b:/b force", want: &api.VolumeCreate{Name: "wp", Replica: 2, Bricks: []string{"a:/b", "b:/b"}, Force: true}},
		{line: "wp a:/b", want: &api.VolumeCreate{Name: "wp", Bricks: []string{"a:/b"}}},
		{line: "wp [::1]:/b", want: &api.VolumeCreate{Name: "wp", Bricks: []string{"[::1]:/b"}}},
		{line: "wp replica 1 a:/b", wrong: "replica count should be greater than 1"},
		{line: "wp replica three a:/b", wrong: "replica count should be greater than 1"},
		{line: "wp replica 3", wrong: "No bricks specified"},
		{line: "wp force", wrong: "No bricks specified"},
		{line: "wp nonsense a:/b", wrong: "Wrong brick type: nonsense, use <HOSTNAME>:<export-dir-abs-path>"},
		{line: "wp a:b", wrong: "Wrong brick type: a:b, use <HOSTNAME>:<export-dir-abs-path>"},
		{line: "wp /b", wrong: "Wrong brick type: /b, use <HOSTNAME>:<export-dir-abs-path>"},
		{line: "wp stripe 2 a:/b b:/b", wrong: "stripe is not supported: files are kept whole; leave it out, or use replica"},
		{line: "wp replica 2 arbiter 1 a:/b b:/b c:/b", wrong: "mortar needs no arbiter bricks"},
		{line: "wp transport rdma a:/b", wrong: "transport rdma is not supported: only tcp"},
		{line: "wp replica", wrong: errUsage.Error()},
	} {
		got, err := parseCreate(strings.Fields(c.line))
		switch {
		case c.wrong == "" && (err != nil || !reflect.DeepEqual(got, c.want)):
			t.Errorf("%s: %+v, %v; want %+v", c.line, got, err, c.want)
		case c.wrong != "" && (err == nil || !strings.HasPrefix(err.Error(), c.wrong)):
			t.Errorf("%s: %v; want %s", c.line, err, c.wrong)
		}
	}
}

func TestParseSource(t *testing.T) {
	for _, c := range []struct {
		source string
		hosts  string
		volume string
		sub    string
		bad    bool
	}{
		{source: "localhost:/staging-gfs", hosts: "localhost", volume: "staging-gfs"},
		{source: "gfs1,gfs2:24008,[::1]:24007:/wp", hosts: "gfs1 gfs2:24008 [::1]:24007", volume: "wp"},
		{source: "gfs2:wp", hosts: "gfs2", volume: "wp"},
		{source: "gfs2:/wp/", hosts: "gfs2", volume: "wp"},
		{source: "gfs2:/wp/sub/dir/", hosts: "gfs2", volume: "wp", sub: "sub/dir"},
		{source: "gfs2:/wp/a/../../b", bad: true},
		{source: "gfs2", bad: true},
		{source: ":/wp", bad: true},
		{source: "a,,b:/wp", bad: true},
		{source: "gfs2:/", bad: true},
		{source: "", bad: true},
	} {
		hosts, volume, sub, err := parseSource(c.source)
		if (err != nil) != c.bad || !c.bad && (strings.Join(hosts, " ") != c.hosts || volume != c.volume || sub != c.sub) {
			t.Errorf("%s: %q, %q, %q, %v", c.source, hosts, volume, sub, err)
		}
	}
}

func TestParseMountOptions(t *testing.T) {
	base := mount.Options{AllowOther: true}
	with := func(change func(*mount.Options)) mount.Options {
		o := base
		change(&o)
		return o
	}
	for _, c := range []struct {
		options string
		want    mountOptions
		wrong   string
	}{
		{options: "defaults,_netdev,backupvolfile-server=localhost", want: mountOptions{mount: base, hosts: []string{"localhost"}}},
		{options: "backup-volfile-servers=a:b:c,log-level=WARNING,log-file=/x", want: mountOptions{mount: base, hosts: []string{"a", "b", "c"}, level: slog.LevelWarn, logFile: "/x"}},
		{options: "ro,nodev,nosuid,noexec,exec", want: mountOptions{mount: with(func(o *mount.Options) {
			o.ReadOnly = true
			o.Flags = unix.MS_NODEV | unix.MS_NOSUID
		})}},
		{options: "locks=node,cache-timeout=5", want: mountOptions{mount: with(func(o *mount.Options) { o.LocksNode, o.CacheTimeout = true, 5*time.Second })}},
		{options: "cache-timeout=0", want: mountOptions{mount: with(func(o *mount.Options) { o.CacheTimeout = -1 })}},
		{options: "attribute-timeout=600,use-readdirp=no,x-systemd.automount,halo-enabled=yes,fetch-attempts=3", want: mountOptions{mount: base}},
		{options: "sync,acl", want: mountOptions{mount: base, warnings: []string{"warning: option sync is not handled", "warning: option acl is not handled"}}},
		{options: "frob", wrong: "Invalid option frob"},
		{options: "subdir-mount=/x", wrong: "Invalid option subdir-mount=/x"},
		{options: "locks=maybe", wrong: "Invalid value for option locks: want node or cluster"},
		{options: "log-level=loud", wrong: "Invalid value for option log-level"},
		{options: "cache-timeout=-1", wrong: "Invalid value for option cache-timeout"},
	} {
		got, err := parseMountOptions([]string{c.options}, false)
		switch {
		case c.wrong != "":
			if err == nil || !strings.HasPrefix(err.Error(), c.wrong) {
				t.Errorf("%s: %v; want %s", c.options, err, c.wrong)
			}
		case err != nil || !reflect.DeepEqual(*got, c.want):
			t.Errorf("%s: %+v, %v; want %+v", c.options, got, err, c.want)
		}
	}
	if o, err := parseMountOptions([]string{"frob,ro"}, true); err != nil || len(o.warnings) != 1 || !o.mount.ReadOnly {
		t.Errorf("sloppy: %+v, %v", o, err)
	}
}

// TestExitStatus: 2 for what makes no sense, 3 without a daemon; gluster has 1 for all.
func TestExitStatus(t *testing.T) {
	t.Setenv("MORTAR_SOCKET", filepath.Join(t.TempDir(), "none"))
	for _, c := range []struct {
		line string
		want int
		says string
	}{
		{"mortar version", 0, ""},
		{"mortar help", 0, ""},
		{"mortar volume", exitUsage, "unrecognized command"},
		{"mortar volume start", exitUsage, "\nUsage:\nvolume start <VOLNAME> [force]\n"},
		{"mortar volume start a b c", exitUsage, "Usage:"},
		{"mortar peer status --frob", exitUsage, "unknown flag: --frob"},
		{"mortar volume info --mode=loud", exitUsage, "--mode=loud: want script or interactive"},
		{"mortar volume info --xml", exitUsage, "--json"},
		{"mortar --remote-host=gfs2 volume info", exitUsage, "on the machine itself"},
		{"mortar volume info", exitConnect, "Connection failed. Please check if the mortar daemon is operational."},
		{"mortar volume info --glusterd-sock=/nowhere/x", exitConnect, "Nothing listens on /nowhere/x"},
		{"gluster volume info", exitFailure, "Connection failed. Please check if gluster daemon is operational.\n"},
		{"gluster volume frob", exitFailure, "unrecognized word: frob (position 1)\n"},
		{"mortar volume heal wp split-brain latest-mtime /f", exitFailure, "cannot be in split-brain"},
		{"mortar mount a:/b", exitUsage, "Usage:"},
		{"mount.mortar localhost:/v / -o ro -n -v -f", 0, ""},
	} {
		status, _, errOut := run(strings.Fields(c.line)...)
		if status != c.want || !strings.Contains(errOut, c.says) {
			t.Errorf("%s: status %d, %q; want %d, %q", c.line, status, errOut, c.want, c.says)
		}
	}
	// The JSON twin of a failure.
	_, out, _ := run("mortar", "volume", "info", "--json")
	if !strings.Contains(out, `"message": "Connection failed.`) {
		t.Errorf("--json of a failure: %q", out)
	}
}

// TestHelp: every command is listed, with one line on what it does.
func TestHelp(t *testing.T) {
	_, out, _ := run("mortar", "help")
	for _, want := range []string{
		" volume create <NEW-VOLNAME> [replica <COUNT>]", " peer probe { <HOSTNAME> | <IP-address> } - ", " pool list - ",
		" mount HOST[,HOST...]:/VOLUME DIR", " brick export <DIR> <DEST> - ", " demo - ", " server [flags] - ",
	} {
		if !strings.Contains(out, "\n"+want) && !strings.HasPrefix(out, want) {
			t.Errorf("help does not list %q", want)
		}
	}
	_, out, _ = run("mortar", "volume", "help")
	if !strings.HasPrefix(out, "\nvolume commands\n===============\n\n volume create ") {
		t.Errorf("volume help: %q", out)
	}
	_, out, _ = run("mortar", "help", "vol", "crea")
	if !strings.Contains(out, "mortar volume create <NEW-VOLNAME>") {
		t.Errorf("help vol crea: %q", out)
	}
}

func TestDistance(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "abc", 3}, {"info", "inof", 1}, {"start", "strat", 1}, {"stop", "start", 3}, {"same", "same", 0}} {
		if got := distance(c.a, c.b); got != c.want {
			t.Errorf("distance(%q, %q) = %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("volume create wp replica 3 a:/b")
	f.Add("v -- st --json=")
	f.Add("mount a,b:/c /d -o ro,locks=")
	f.Fuzz(func(t *testing.T, line string) {
		args := strings.Fields(line)
		resolve(newRoot(&app{UI: &ui.UI{}, name: "mortar"}), args)
		if len(args) > 0 {
			parseCreate(args)
			parseSource(args[0])
			parseMountOptions(args, false)
		}
	})
}
