package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"mortar/test/posix"
)

// TestPosix puts the table of POSIX cases to a volume: through one mount, and
// through three, where each call has to see what the one before did on another
// machine. The calls are this process's own, which looks into the hosts.
func TestPosix(t *testing.T) {
	if why := posix.Missing(); why != "" {
		t.Skip("SKIPPED: " + why)
	}
	p := start(t, setup{})
	for _, through := range []int{1, 3} {
		t.Run(fmt.Sprintf("mounts=%d", through), func(t *testing.T) {
			p.as(t)
			var dirs []string
			for i := 1; i <= through; i++ {
				dirs = append(dirs, p.outside(i, fmt.Sprintf("/mnt/wp/through-%d", through)))
			}
			if err := os.Mkdir(dirs[0], 0o755); err != nil {
				t.Fatal(err)
			}
			n := posix.Run(t, posix.Place{FS: "mortar", Dirs: dirs})
			t.Logf("%d expectations", n)
		})
	}
	p.identical(1)
}

// TestRightsTools: what administrators set on one machine is shown and obeyed on
// another, and comes back from a backup of it as it was.
func TestRightsTools(t *testing.T) {
	need(t, "setfacl")
	need(t, "chattr")
	p := start(t, setup{hosts: 2})
	p.run(1, "mkdir", "-p", "/mnt/wp/tree/sub")
	p.run(1, "sh", "-c", "echo secret >/mnt/wp/tree/file; chmod 600 /mnt/wp/tree/file")
	p.run(1, "setfacl", "-R", "-m", "u:64501:rwX,g:64600:r-X", "/mnt/wp/tree")
	p.run(1, "setfacl", "-d", "-m", "u:64501:rwx", "/mnt/wp/tree/sub")
	p.run(1, "sh", "-c", "umask 077; echo new >/mnt/wp/tree/sub/new")

	list := func(i int) string { return p.run(i, "getfacl", "-R", "--absolute-names", "--numeric", "/mnt/wp/tree") }
	before := list(1)
	for _, want := range []string{"user:64501:rw-", "default:user:64501:rwx", "group:64600:r-x"} {
		if !strings.Contains(before, want) {
			t.Errorf("getfacl lacks %q:\n%s", want, before)
		}
	}
	if got := list(2); got != before {
		t.Errorf("another machine's getfacl:\n%s\nwant\n%s", got, before)
	}
	p.run(1, "sh", "-c", "getfacl -R --absolute-names /mnt/wp/tree >/tmp/acls")
	p.run(2, "setfacl", "-R", "-b", "/mnt/wp/tree")
	if got := list(1); strings.Contains(got, "64501") {
		t.Errorf("after setfacl -b on another machine:\n%s", got)
	}
	p.run(1, "setfacl", "--restore=/tmp/acls")
	if got := list(2); got != before {
		t.Errorf("after setfacl --restore:\n%s\nwant\n%s", got, before)
	}

	p.run(1, "chattr", "+i", "/mnt/wp/tree/file")
	if out := p.run(2, "lsattr", "/mnt/wp/tree/file"); !strings.Contains(strings.Fields(out)[0], "i") {
		t.Errorf("lsattr on another machine: %s", out)
	}
	for _, argv := range [][]string{
		{"rm", "-f", "/mnt/wp/tree/file"}, {"mv", "/mnt/wp/tree/file", "/mnt/wp/tree/other"},
		{"sh", "-c", "echo x >>/mnt/wp/tree/file"}, {"chmod", "644", "/mnt/wp/tree/file"},
	} {
		if r, err := p.Host(2).Run(p.ctx(patience), argv...); err == nil {
			t.Errorf("%s of an immutable file succeeded: %s", strings.Join(argv, " "), r.Stdout)
		}
	}
	p.run(2, "chattr", "-i", "/mnt/wp/tree/file")
	p.run(1, "rm", "-r", "/mnt/wp/tree")
}
