package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"mortar/test/tree"
)

// W1, steps 2 to 4: a pool by invitation, a volume, and what every machine says of them.
func TestThreeMachinesBecomeAPool(t *testing.T) {
	p := start(t, setup{replica: -1, mounts: -1})
	for i := 1; i <= 3; i++ {
		p.within(10*time.Second, "everybody is connected", func() error {
			out := p.mortar(i, "peer", "status")
			if !strings.HasPrefix(out, "Number of Peers: 2\n") || strings.Count(out, "State: Peer in Cluster (Connected)") != 2 {
				return fmt.Errorf("n%d says\n%s", i, out)
			}
			return nil
		})
		list := p.mortar(i, "pool", "list")
		if !regexp.MustCompile(`^UUID\t{5}Hostname +\tState\n`).MatchString(list) || strings.Count(list, "Connected") != 3 ||
			!strings.Contains(list, "localhost") {
			t.Errorf("pool list on n%d:\n%s", i, list)
		}
	}
	create := []string{"volume", "create", "wp", "replica", "3", "n1:/bricks/b1/wp", "n2:/bricks/b1/wp", "n3:/bricks/b1/wp"}
	if got, want := p.mortar(2, create...), "volume create: wp: success: please start the volume to access data\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := p.mortar(3, "volume", "info", "wp"); !strings.Contains(got, "\nType: Replicate\n") || !strings.Contains(got, "\nStatus: Created\n") {
		t.Errorf("volume info:\n%s", got)
	}
	p.refuse(1, []string{"mount", "n1:/wp", "/mnt"}, "not started")
	if got, want := p.mortar(3, "volume", "start", "wp"), "volume start: wp: success\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for i := 1; i <= 3; i++ {
		info := p.mortar(i, "volume", "info", "wp")
		for _, want := range []string{" \nVolume Name: wp\n", "\nVolume ID: ", "\nStatus: Started\n", "\nNumber of Bricks: 1 x 3 = 3\n",
			"\nTransport-type: tcp\n", "\nBrick1: n1:/bricks/b1/wp\n", "\nBrick3: n3:/bricks/b1/wp\n"} {
			if !strings.Contains(info, want) {
				t.Errorf("volume info on n%d lacks %q:\n%s", i, want, info)
			}
		}
		p.within(10*time.Second, "all bricks are online", func() error {
			out := p.mortar(i, "volume", "status", "wp")
			for k := 1; k <= 3; k++ {
				if !regexp.MustCompile(fmt.Sprintf(`(?m)^Brick n%d:/bricks/b1/wp +24007 +0 +Y +\d+ *$`, k)).MatchString(out) {
					return fmt.Errorf("n%d's brick on n%d:\n%s", k, i, out)
				}
			}
			if strings.Count(out, "\nSelf-heal Daemon on ") != 3 || strings.Count(out, "\nNFS Server on ") != 3 || !strings.Contains(out, "There are no active volume tasks") {
				return fmt.Errorf("status:\n%s", out)
			}
			return nil
		})
		if got := p.mortar(i, "volume", "list"); got != "wp\n" {
			t.Errorf("volume list on n%d: %q", i, got)
		}
	}
}

// Probing a machine that was started to accept it works as in the tutorials.
func TestProbe(t *testing.T) {
	p := start(t, setup{hosts: 3, alone: true})
	d := p.daemons[2]
	d.Signal(15)
	<-d.Done()
	p.run(3, "sh", "-c", "rm -rf /var/lib/mortar/*")
	p.startDaemon(3, "--accept-probe")
	p.waitDaemon(3)
	p.refuse(1, []string{"peer", "probe", "n2"}, "--accept-probe")
	if got, want := p.mortar(1, "peer", "probe", "n3"), "peer probe: success\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := p.mortar(1, "peer", "probe", "n3"); !strings.Contains(got, "already in peer list") {
		t.Errorf("probe again: %q", got)
	}
	if got := p.mortar(1, "peer", "probe", "n1"); !strings.Contains(got, "Probe on localhost not needed") {
		t.Errorf("probe of itself: %q", got)
	}
	p.within(10*time.Second, "n3 sees n1", func() error {
		if out := p.mortar(3, "peer", "status"); !strings.Contains(out, "Peer in Cluster (Connected)") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
}

// wordpress puts the tree as a tar archive where all hosts see it, and its
// manifest as unpacked on a local file system.
func (p *pool) wordpress() (archive string, want []string) {
	p.t.Helper()
	src := tree.WordPress()
	if src == "" {
		p.t.Log("no WordPress package here: a tree of its shape is made up")
		src = filepath.Join(p.t.TempDir(), "wordpress")
		if err := tree.Make(src, 1); err != nil {
			p.t.Fatal(err)
		}
	}
	// A copy with owners, odd modes, hard links and extended attributes, which the package has none of.
	own := filepath.Join(p.Dir, "wordpress")
	p.run(1, "cp", "-a", src, own)
	p.run(1, "sh", "-ec", `cd `+own+`
		chown -R 33:33 wp-content
		chmod 2775 wp-content; chmod 600 wp-admin/$(ls wp-admin | head -1); chmod 4755 $(ls *.php | head -1)
		ln $(ls *.php | head -2 | tail -1) hard-link; ln -s nowhere dangling; mkfifo fifo; mkdir -m 1777 sticky
		touch -d '1999-12-31 23:59:59.123456789' $(ls *.php | head -3 | tail -1)`)
	files, err := filepath.Glob(own + "/*.php")
	if err != nil || len(files) == 0 {
		p.t.Fatal(files, err)
	}
	if err := setXattr(files[0], "user.mortar.test", "a value\x00with a zero"); err != nil {
		p.t.Fatal(err)
	}
	archive = filepath.Join(p.Dir, "wordpress.tar")
	f, err := os.Create(archive)
	if err != nil {
		p.t.Fatal(err)
	}
	defer f.Close()
	if err := tree.Tar(f, own); err != nil {
		p.t.Fatal(err)
	}
	if want, err = tree.Manifest(own); err != nil {
		p.t.Fatal(err)
	}
	return archive, want
}

// W1 step 5 and the first of the proofs: unpacked on machine 1, identical on 2
// and 3 the moment tar ends.
func TestWordPressIsTheSameEverywhere(t *testing.T) {
	p := start(t, setup{})
	archive, want := p.wordpress()
	p.run(1, "mkdir", "/mnt/wp/wordpress")
	begin := time.Now()
	p.run(1, "tar", "--xattrs", "--xattrs-include=*", "-xpf", archive, "-C", "/mnt/wp/wordpress")
	t.Logf("tar took %v for %d objects", time.Since(begin), len(want))
	for _, i := range []int{2, 3, 1} {
		got := p.manifest(i, "/mnt/wp/wordpress")
		// The root is mkdir's work, not tar's.
		if d := tree.Diff(want[1:], got[1:], 20); d != nil {
			t.Errorf("the tree on n%d differs:\n%s", i, strings.Join(d, "\n"))
		}
	}
	p.identical(2)
	// And away again, from another machine.
	p.run(3, "rm", "-r", "/mnt/wp/wordpress")
	for i := 1; i <= 3; i++ {
		if out := p.run(i, "ls", "-A", "/mnt/wp"); out != "" {
			t.Errorf("n%d still lists %q", i, out)
		}
	}
	p.identical(1)
}

// fstab's way, by hand: mount -t mortar, and a clean umount.
func TestMountHelperAndRemount(t *testing.T) {
	p := start(t, setup{mounts: 1})
	p.run(1, "sh", "-c", "echo one > /mnt/wp/file")
	p.run(2, "sh", "-ec", "ln -s "+mortar+" /sbin/mount.mortar; mkdir -p /mnt/wp; echo 'n1:/wp /mnt/wp mortar defaults,_netdev 0 0' >> /etc/fstab; mount -a")
	if got := p.run(2, "cat", "/mnt/wp/file"); got != "one\n" {
		t.Errorf("through fstab: %q", got)
	}
	// W2, step 1: by the machine's own daemon, with another one to ask.
	p.run(3, "sh", "-ec", "ln -s "+mortar+" /sbin/mount.mortar; mkdir -p /mnt/gfs; echo 'localhost:/wp /mnt/gfs mortar defaults,_netdev,backupvolfile-server=localhost 0 0' >> /etc/fstab; mount -a")
	if got := p.run(3, "sh", "-c", "cat /mnt/gfs/file && umount /mnt/gfs"); got != "one\n" {
		t.Errorf("through fstab, with a backupvolfile-server: %q", got)
	}
	p.run(1, "umount", "/mnt/wp")
	p.within(5*time.Second, "the mount process ends with its mount", func() error {
		for _, proc := range p.Host(1).Processes() {
			if proc.Pid != p.daemons[0].Pid() && proc.Name == "mortar" {
				return fmt.Errorf("%+v", proc)
			}
		}
		return nil
	})
	p.mount(1)
	if got := p.run(1, "cat", "/mnt/wp/file"); got != "one\n" {
		t.Errorf("after a remount: %q", got)
	}
	p.refuse(3, []string{"mount", "n1:/nothing", "/mnt"}, "nothing", "does not exist")
	p.refuse(3, []string{"mount", "n1:/wp", "/mnt/nowhere"}, "/mnt/nowhere")
	p.refuse(3, []string{"mount", "-o", "no-such-option", "n1:/wp", "/mnt"}, "no-such-option")
	p.run(1, "mkdir", "-p", "/mnt/wp/sub/dir")
	p.run(1, "sh", "-c", "echo below > /mnt/wp/sub/dir/f")
	p.run(3, "mkdir", "-p", "/mnt/wp")
	p.mortar(3, "mount", "n2,n1:/wp/sub", "/mnt/wp")
	if got := p.run(3, "cat", "/mnt/wp/dir/f"); got != "below\n" {
		t.Errorf("through a mount of a sub-directory: %q", got)
	}
}

func TestGitInTheVolume(t *testing.T) {
	p := start(t, setup{})
	need(t, "git")
	repo := filepath.Join(p.Dir, "repo")
	src := tree.WordPress()
	if src == "" {
		src = filepath.Join(t.TempDir(), "wordpress")
		if err := tree.Make(src, 1); err != nil {
			t.Fatal(err)
		}
	}
	git := "git -c user.name=tester -c user.email=tester@example.org -c safe.directory=* "
	p.run(1, "sh", "-ec", "cp -r "+src+" "+repo+"; cd "+repo+"; git init -q -b main; git add -A -f; "+git+"commit -q -m all")
	p.run(1, "git", "clone", "-q", "--no-hardlinks", repo, "/mnt/wp/clone")
	for _, i := range []int{2, 3, 1} {
		if out := p.run(i, "sh", "-c", "cd /mnt/wp/clone && git -c safe.directory=* fsck --full 2>&1 && git -c safe.directory=* status --short"); strings.TrimSpace(out) != "" {
			t.Errorf("git on n%d:\n%s", i, out)
		}
	}
	// Everybody commits, one after the other and at once; index.lock keeps them apart.
	for i := 1; i <= 3; i++ {
		p.run(i, "sh", "-ec", fmt.Sprintf("cd /mnt/wp/clone; echo %d > by-n%d; %s add -A; %s commit -q -m n%d", i, i, git, git, i))
	}
	for i := 1; i <= 3; i++ {
		out := p.run(i, "sh", "-c", "cd /mnt/wp/clone && "+git+"gc -q && "+git+"fsck --full 2>&1 && "+git+"log --format=%s | head -3 | tr '\\n' ' '")
		if strings.TrimSpace(out) != "n3 n2 n1" {
			t.Errorf("git on n%d says %q", i, out)
		}
	}
}

func TestSqliteInTheVolume(t *testing.T) {
	p := start(t, setup{})
	need(t, "sqlite3")
	var sql strings.Builder
	sql.WriteString("CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT);\n")
	for i := range 1000 {
		fmt.Fprintf(&sql, "BEGIN; INSERT INTO t VALUES (%d, 'value %d'); COMMIT;\n", i, i)
	}
	begin := time.Now()
	if _, err := p.Host(1).RunInput(p.ctx(2*time.Minute), sql.String(), "sqlite3", "-bail", "/mnt/wp/db"); err != nil {
		t.Fatal(err)
	}
	t.Logf("1,000 transactions took %v", time.Since(begin))
	for i := 1; i <= 3; i++ {
		out := p.run(i, "sqlite3", "/mnt/wp/db", "PRAGMA integrity_check; SELECT count(*), sum(id), max(v) FROM t;")
		if want := "ok\n1000|499500|value 999\n"; out != want {
			t.Errorf("sqlite3 on n%d says %q, want %q", i, out, want)
		}
	}
	// Writers on three machines at once: SQLite's locks are fcntl locks.
	n := pick(30, 200)
	var waits []func() error
	for i := 1; i <= 3; i++ {
		waits = append(waits, p.async(i, 3*time.Minute, "sh", "-ec",
			fmt.Sprintf("for k in $(seq %d); do sqlite3 -bail -cmd '.timeout 60000' /mnt/wp/db \"INSERT INTO t(v) VALUES ('n%d');\"; done", n, i)))
	}
	for _, wait := range waits {
		if err := wait(); err != nil {
			t.Error(err)
		}
	}
	out := p.run(2, "sqlite3", "/mnt/wp/db", "PRAGMA integrity_check; SELECT count(*) FROM t;")
	if want := fmt.Sprintf("ok\n%d\n", 1000+3*n); out != want {
		t.Errorf("after three writers: %q, want %q", out, want)
	}
}

// W2, step 2.
func TestDD(t *testing.T) {
	p := start(t, setup{})
	p.run(1, "dd", "if=/dev/zero", "of=/mnt/wp/output.dat", "bs=24M", "count=1")
	p.run(2, "dd", "if=/dev/urandom", "of=/mnt/wp/random.dat", "bs=2M", "count=1")
	sums := p.run(3, "sh", "-c", "cd /mnt/wp && sha256sum *.dat")
	for i := 1; i <= 2; i++ {
		if got := p.run(i, "sh", "-c", "cd /mnt/wp && sha256sum *.dat"); got != sums {
			t.Errorf("n%d has\n%sn3 has\n%s", i, got, sums)
		}
	}
	if got := strings.TrimSpace(p.run(3, "sh", "-c", "head -c 25165824 /dev/zero | cmp - /mnt/wp/output.dat && stat -c %s /mnt/wp/output.dat /mnt/wp/random.dat | tr '\\n' ' '")); got != "25165824 2097152" {
		t.Errorf("sizes %q", got)
	}
}

// Every command prints JSON that parses, on every machine.
func TestJSONEverywhere(t *testing.T) {
	p := start(t, setup{mounts: -1})
	for i := 1; i <= 3; i++ {
		for _, c := range []string{"peer status", "pool list", "peer invite", "volume info", "volume info wp", "volume status wp",
			"volume status wp detail", "volume list", "volume get wp all", "volume set help", "volume heal wp info", "volume heal wp info summary", "version"} {
			out := p.mortar(i, append(strings.Fields(c), "--json")...)
			if !json.Valid([]byte(out)) {
				t.Errorf("mortar %s --json on n%d:\n%s", c, i, out)
			}
		}
	}
	var inv struct{ Token, Command, Expires string }
	p.json(&inv, 2, "peer", "invite", "--json")
	if !strings.HasPrefix(inv.Token, "MORTAR-1-") || !strings.HasPrefix(inv.Command, "mortar join "+inv.Token+" ") || inv.Expires == "" {
		t.Errorf("invitation: %+v", inv)
	}
}

// Several volumes on one disk, one brick each, and volumes of every replica count.
func TestSeveralVolumes(t *testing.T) {
	p := start(t, setup{hosts: 5, replica: -1, mounts: -1})
	for n := 1; n <= 5; n++ {
		name := fmt.Sprintf("v%d", n)
		argv := []string{"volume", "create", name}
		if n > 1 {
			argv = append(argv, "replica", fmt.Sprint(n))
		}
		for i := 1; i <= n; i++ {
			argv = append(argv, fmt.Sprintf("n%d:/bricks/%s", i, name))
		}
		p.mortar(5, append(argv, "--mode=script")...)
		p.mortar(4, "volume", "start", name)
		for _, i := range []int{1, 5} { // with a brick of the volume, and mostly without
			p.run(i, "mkdir", "-p", "/mnt/"+name)
			p.mortar(i, "mount", fmt.Sprintf("n%d:/%s", i, name), "/mnt/"+name)
		}
		p.run(1, "sh", "-c", "echo "+name+" > /mnt/"+name+"/file")
		if got := p.run(5, "cat", "/mnt/"+name+"/file"); got != name+"\n" {
			t.Errorf("%s reads %q on n5", name, got)
		}
	}
	if got := p.mortar(3, "volume", "list"); got != "v1\nv2\nv3\nv4\nv5\n" {
		t.Errorf("volume list: %q", got)
	}
	p.refuse(2, []string{"volume", "create", "two-sets", "replica", "2", "n1:/bricks/s", "n2:/bricks/s", "n3:/bricks/s", "n4:/bricks/s"}, "set")
	p.refuse(2, []string{"volume", "delete", "v3", "--mode=script"}, "Volume v3 has been started.Volume needs to be stopped before deletion.")
	for _, i := range []int{1, 5} {
		for n := 1; n <= 5; n++ {
			p.run(i, "umount", fmt.Sprintf("/mnt/v%d", n))
		}
	}
	p.mortar(2, "volume", "stop", "v3", "--mode=script")
	p.mortar(3, "volume", "delete", "v3", "--mode=script")
	// The data of a deleted volume stay, and are not taken for another's.
	p.refuse(2, []string{"volume", "create", "again", "n1:/bricks/v3"}, "/bricks/v3 is already part of a volume")
	p.refuse(2, []string{"volume", "create", "again", "n1:/bricks/v3", "force"}, "/bricks/v3 is already part of a volume")
}
