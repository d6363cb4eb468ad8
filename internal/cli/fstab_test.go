package cli

import (
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"mortar/internal/cli/ui"
	"mortar/internal/daemon"
)

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
