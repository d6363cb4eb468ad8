package cli

import (
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mortar/internal/cli/ui"
	"mortar/internal/daemon"
)

func TestFstab(t *testing.T) {
	const table = "# comment\nUUID=1 / ext4 errors=remount-ro 0 1\n\n" +
		`gfs2:/wp /var/www/my\040site/ mortar defaults,_netdev 0 0` + "\nhalf"
	got := parseFstab(table)
	want := []fstabEntry{
		{line: 2, source: "UUID=1", dir: "/", kind: "ext4", options: []string{"errors=remount-ro"}},
		{line: 4, source: "gfs2:/wp", dir: "/var/www/my site", kind: "mortar", options: []string{"defaults", "_netdev"}},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(fstabEntry{})); diff != "" {
		t.Fatal(diff)
	}

	// What is added is read as it was meant, once, and taken out again.
	line := fstabLine("a,b:/v", "/mnt/two words#1", []string{"ro,_netdev", "defaults"})
	if want := `a,b:/v /mnt/two\040words\0431 mortar ro,_netdev,x-systemd.automount,x-systemd.after=mortar.service,x-systemd.mount-timeout=2min 0 0` + "\n"; line != want {
		t.Errorf("line %q, want %q", line, want)
	}
	if e := parseFstab(line); len(e) != 1 || e[0].dir != "/mnt/two words#1" || !e[0].ours() || !e[0].has("ro") || e[0].has("rw") || !e[0].has("x-systemd.after=") {
		t.Errorf("read as %+v", e)
	}
	added, err := fstabAdd("fstab", table, line)
	if err != nil || added != table+"\n"+line {
		t.Errorf("added: %q, %v", added, err)
	}
	if again, err := fstabAdd("fstab", added, line); err != nil || again != added {
		t.Errorf("added twice: %q, %v", again, err)
	}
	if _, err := fstabAdd("fstab", added, fstabLine("c:/v", "/mnt/two words#1", nil)); err == nil || !strings.Contains(err.Error(), "fstab, line 6: a,b:/v is to be mounted at /mnt/two words#1 already") {
		t.Errorf("another source: %v", err)
	}
	if removed, found := fstabRemove(added, "/mnt/two words#1"); !found || removed != table+"\n" {
		t.Errorf("removed: %v, %q", found, removed)
	}
	if same, found := fstabRemove(added, "/"); found || same != added {
		t.Errorf("another's entry was removed: %q", same)
	}
}

func TestWriteFstab(t *testing.T) {
	dir := t.TempDir()
	real, link := filepath.Join(dir, "real"), filepath.Join(dir, "fstab")
	if err := os.WriteFile(real, []byte("old\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("real", link); err != nil {
		t.Fatal(err)
	}
	if err := writeFstab(link, "new\n"); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Lstat(real)
	if err != nil || fi.Mode() != 0o600 {
		t.Errorf("mode %v, %v", fi, err)
	}
	if b, _ := os.ReadFile(link); string(b) != "new\n" {
		t.Errorf("read %q", b)
	}
	if fi, err := os.Lstat(link); err != nil || fi.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link is %v, %v", fi, err)
	}
	if names, _ := os.ReadDir(dir); len(names) != 2 {
		t.Errorf("left behind: %v", names)
	}
}

func TestUnitName(t *testing.T) {
	// As systemd-escape -p has it.
	for dir, want := range map[string]string{
		"/": "-", "/var/www/html": "var-www-html", "/mnt/a-b": `mnt-a\x2db`, "/.x/y.z": `\x2ex-y.z`, "/mnt/ä b": `mnt-\xc3\xa4\x20b`,
	} {
		if got := unitName(dir); got != want {
			t.Errorf("%s: %s, want %s", dir, got, want)
		}
	}
}

// TestManual: every command has its page, and the example of the configuration
// can be read with every line of it in force.
func TestManual(t *testing.T) {
	a := &app{UI: &ui.UI{}, name: "mortar"}
	files, err := manual(a)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range newRoot(a).Commands() {
		page := files["man/mortar-"+c.Name()+".8"]
		if c.Hidden != (page == "") {
			t.Errorf("%s (hidden: %v) has the page %q", c.Name(), c.Hidden, page)
		}
		if !c.Hidden && !strings.Contains(files["man/mortar.8"], "\\-"+c.Name()+" (8)\n") {
			t.Errorf("mortar(8) does not list %s", c.Name())
		}
		for _, v := range c.Commands() {
			if !c.Hidden && !v.Hidden && !strings.Contains(page, ".SS "+roff("mortar "+c.Name()+" "+v.Name())) {
				t.Errorf("the page of %s does not have %s", c.Name(), v.Name())
			}
		}
	}
	if helper := files["man/mount.mortar.8"]; !strings.Contains(helper, "mount.mortar HOST") || !strings.Contains(helper, "locks=node") || strings.Contains(helper, "enable") {
		t.Errorf("mount.mortar(8):\n%s", helper)
	}
	for _, name := range []string{"completion/mortar.bash", "completion/_mortar", "completion/mortar.fish"} {
		if !strings.Contains(files[name], "__complete") {
			t.Errorf("%s: %.100q", name, files[name])
		}
	}

	path := filepath.Join(t.TempDir(), "mortar.toml")
	all := regexp.MustCompile(`(?m)^#([a-z-]+ = )`).ReplaceAllString(files["mortar.toml"], "$1")
	if err := os.WriteFile(path, []byte(all), 0o600); err != nil {
		t.Fatal(err)
	}
	var cfg daemon.Config
	if err := cfg.ReadConfig(path); err != nil {
		t.Fatalf("%v in\n%s", err, all)
	}
	if cfg.StateDir != daemon.DefaultStateDir || cfg.Listen != ":24007" {
		t.Errorf("read as %+v", cfg)
	}
	if strings.Contains(all, "new-identity") || strings.Count(all, " = ") < 10 {
		t.Errorf("the example is\n%s", all)
	}
}

func TestRoff(t *testing.T) {
	if got, want := roff(".a -b\n'c \\d"), "\\&.a \\-b\n\\&'c \\ed"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestNotifyReady(t *testing.T) {
	if err := notifyReady(""); err != nil {
		t.Error(err)
	}
	path := filepath.Join(t.TempDir(), "notify")
	for _, name := range []string{path, "@mortar-" + strings.ReplaceAll(path, "/", "-")} {
		bound := name
		if bound[0] == '@' {
			bound = "\x00" + bound[1:]
		}
		c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: bound, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		if err := notifyReady(name); err != nil {
			t.Error(err)
		}
		b := make([]byte, 64)
		if n, err := c.Read(b); err != nil || string(b[:n]) != "READY=1" {
			t.Errorf("%s: %q, %v", name, b[:n], err)
		}
		c.Close()
	}
	if err := notifyReady(path + "-gone"); err == nil {
		t.Error("nobody listens, and no error")
	}
}
