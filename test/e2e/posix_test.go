package e2e

import (
	"os"
	"strings"
	"testing"
	"time"

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
	for _, c := range []struct {
		name    string
		through int
		deaths  bool
	}{{"mounts=1", 1, false}, {"mounts=3", 3, false}, {"mounts=3, daemons are killed", 3, true}} {
		t.Run(c.name, func(t *testing.T) {
			if c.deaths && !long {
				t.Skip("the table takes a minute while daemons are killed: MORTAR_TEST_LONG=1 has it done")
			}
			p.as(t)
			dir := strings.NewReplacer(" ", "-", ",", "").Replace(c.name)
			var dirs []string
			for i := 1; i <= c.through; i++ {
				dirs = append(dirs, p.outside(i, "/mnt/wp/"+dir))
			}
			if err := os.Mkdir(dirs[0], 0o755); err != nil {
				t.Fatal(err)
			}
			end := func() int { return 0 }
			if c.deaths {
				end = p.deaths()
			}
			n := posix.Run(t, posix.Place{FS: "mortar", Dirs: dirs, Unseen: true})
			t.Logf("%d expectations, %d daemons killed", n, end())
		})
	}
	p.identical(1)
}

// The set-group-id bit without execution by the group stays when a member of the group writes, by
// whatever group he is one, and goes when somebody else does: the mount sees who it is.
func TestSetGroupIDOfMembers(t *testing.T) {
	need(t, "setpriv")
	p := start(t, setup{})
	for _, c := range []struct{ groups, want string }{{"--groups=700,701", "2666"}, {"--groups=700", "666"}, {"--clear-groups", "666"}} {
		p.run(1, "sh", "-c", "rm -f /mnt/wp/f && touch /mnt/wp/f && chgrp 701 /mnt/wp/f && chmod 2666 /mnt/wp/f")
		p.run(1, "setpriv", "--reuid=700", "--regid=702", c.groups, "sh", "-c", "echo x >> /mnt/wp/f")
		for i := 1; i <= 2; i++ {
			if got := strings.TrimSpace(p.run(i, "stat", "-c", "%a", "/mnt/wp/f")); got != c.want {
				t.Errorf("n%d: written with %s, its mode is %s, want %s", i, c.groups, got, c.want)
			}
		}
	}
}

// deaths has a backup's daemon and the primary's be killed in turn, each when all are well
// again. end waits for the last one's return, and says how many there were.
func (p *pool) deaths() (end func() int) {
	stop, n := make(chan struct{}), make(chan int, 1)
	go func() {
		killed := 0
		defer func() { n <- killed }() // if it fails, too
		for {
			select {
			case <-stop:
				return
			default:
			}
			i := p.primary(1)
			if killed%2 == 0 {
				i = p.other(i)
			}
			p.killDaemon(i)
			killed++
			p.startDaemon(i)
			p.waitDaemon(i)
			p.healed(p.other(i), 30*time.Second)
		}
	}()
	return func() int { close(stop); return <-n }
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
