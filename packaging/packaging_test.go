package main

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

func TestPackageVersion(t *testing.T) {
	for v, want := range map[string]string{
		"v1.2.3": "1.2.3", "v1.3.0-rc.1": "1.3.0~rc.1", "(devel)": "0.0.0~devel", "devel": "0.0.0~devel",
		"v0.0.0-20261129104747-8936c5fabcde":       "0.0.0~20261129104747.8936c5fabcde",
		"v0.0.0-20261129104747-8936c5fabcde+dirty": "0.0.0~20261129104747.8936c5fabcde+dirty",
	} {
		if got := packageVersion(v); got != want {
			t.Errorf("%s: %s, want %s", v, got, want)
		}
	}
}

// scratch is for what all tests share.
var scratch string

func TestMain(m *testing.M) {
	os.Setenv("SOURCE_DATE_EPOCH", "1796000000") // so that the tests need no repository
	os.Exit(func() int {
		var err error
		if scratch, err = os.MkdirTemp("", "mortar-packaging-"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(scratch)
		return m.Run()
	}())
}

// program is what goes into the packages, built once.
var program = sync.OnceValues(func() (string, error) {
	if p := os.Getenv("MORTAR_TEST_BINARY"); p != "" {
		return p, nil
	}
	tree, err := treeRoot()
	if err != nil {
		return "", err
	}
	// As the end-to-end tests build it, so that it is compiled once for both.
	program := filepath.Join(scratch, "mortar")
	cmd := exec.Command("go", "build", "-trimpath", "-o", program, "./cmd/mortar")
	cmd.Dir = tree
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %v\n%s", err, out)
	}
	return program, nil
})

func testProgram(t *testing.T) string {
	t.Helper()
	p, err := program()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// packagesOf makes the packages with a revision and returns the .deb and the .rpm.
func packagesOf(t *testing.T, program, revision string) (deb, rpm string) {
	t.Helper()
	paths, err := build(options{out: t.TempDir(), arch: "amd64", binary: program, revision: revision})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(paths) // mortar- before mortar_
	return paths[1], paths[0]
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// need skips a test that cannot run here.
func need(t *testing.T, programs ...string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs /dev/fuse")
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s", p)
		}
	}
}

// root makes the tree of a machine with next to nothing on it: a shell, and
// what makes a group.
func root(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	sh(t, `cd "$1"
		mkdir -p usr/bin usr/sbin usr/lib usr/lib64 etc tmp dev proc run mnt var/log var/lib/dpkg/info var/lib/dpkg/updates
		ln -s usr/bin usr/sbin usr/lib usr/lib64 .
		echo root:x:0:0:root:/root:/bin/sh >etc/passwd
		echo root:x:0: >etc/group
		: >var/lib/dpkg/status
		mknod -m 666 dev/null c 1 3
		mknod -m 666 dev/fuse c 10 229
		cp "$(command -v busybox)" usr/bin/busybox
		for p in sh cat echo find grep hostname ip kill ln ls mkdir mount mv readlink rm sed sleep tar test touch true umount; do ln -s busybox usr/bin/$p; done
		cp "$(command -v groupadd)" usr/sbin/
		ldd "$(command -v groupadd)" | grep -o '/[^ ]*' | while read -r lib; do mkdir -p ".${lib%/*}"; cp -L "$lib" ".$lib"; done`, dir)
	return dir
}

func sh(t *testing.T, script string, args ...string) string {
	t.Helper()
	cmd := exec.Command("sh", append([]string{"-ec", script, "sh"}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, script, out)
	}
	return string(out)
}

// tree lists what is in a root, apart from the package manager's own.
func tree(t *testing.T, root string) (all []string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		switch name := strings.TrimPrefix(path, root); {
		case name == "/var/lib/dpkg", name == "/usr/lib/sysimage", name == "/var/lib/rpm", name == "/root/.rpmdb":
			return filepath.SkipDir
		case name == "/etc/group-", name == "/etc/gshadow", name == "/etc/gshadow-", strings.HasPrefix(name, "/etc/.") && !d.IsDir():
		default:
			all = append(all, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// use runs a daemon and mounts a volume of its in the root, on a machine of its own as
// far as the kernel can have one: what it leaves ends with the shell.
func use(t *testing.T, root string) {
	t.Helper()
	const script = `set -e
		mount -t tmpfs tmp /run
		mount -t proc proc /proc
		ip link set lo up
		hostname clean
		mkdir -p /bricks /mnt/a /mnt/b
		mortar server >/tmp/log 2>&1 &
		i=0
		until mortar pool list >/dev/null 2>&1; do
			i=$((i+1)); [ $i -lt 600 ] || { cat /tmp/log; exit 1; }
			sleep 0.05
		done
		mortar volume info v 2>/dev/null | grep -q Started || {
			mortar volume create v clean:/bricks/v force
			mortar volume start v
		}
		mount.mortar localhost:/v /mnt/a -o rw,_netdev
		/sbin/mount.glusterfs localhost:/v /mnt/b -o backupvolfile-server=localhost,log-level=WARNING
		echo "$1" >>/mnt/a/file
		cat /mnt/b/file
		umount /mnt/a
		umount /mnt/b`
	cmd := exec.Command("unshare", "--mount", "--pid", "--net", "--uts", "--fork", "--kill-child",
		"chroot", root, "/bin/sh", "-c", script, "sh", "hello")
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasSuffix(string(out), "hello\n") {
		t.Fatalf("%v\n%s", err, out)
	}
}

// TestInstall installs, uses, upgrades, uses and removes the packages in clean
// roots. Nothing stays but bricks.
func TestInstall(t *testing.T) {
	need(t, "dpkg", "busybox", "unshare", "groupadd")
	program := testProgram(t)
	deb1, rpm1 := packagesOf(t, program, "1")
	deb2, rpm2 := packagesOf(t, program, "2")

	// manager is how dpkg or rpm is told.
	type manager struct {
		first, second string
		install       []string
		remove, purge []string
		program       string
	}
	for name, m := range map[string]manager{
		"deb": {first: deb1, second: deb2, program: "dpkg",
			install: []string{"--root=ROOT", "--force-unsafe-io", "--install"},
			remove:  []string{"--root=ROOT", "--force-unsafe-io", "--remove", "mortar"}, purge: []string{"--root=ROOT", "--force-unsafe-io", "--purge", "mortar"}},
		"rpm": {first: rpm1, second: rpm2, program: "rpm",
			install: []string{"--root=ROOT", "--nodeps", "--nosignature", "-U"},
			remove:  []string{"--root=ROOT", "--nodeps", "-e", "mortar"}},
	} {
		t.Run(name, func(t *testing.T) {
			need(t, m.program)
			dir := root(t)
			manage := func(args []string, more ...string) string {
				t.Helper()
				args = append(slices.Clone(args), more...)
				for i := range args {
					args[i] = strings.ReplaceAll(args[i], "ROOT", dir)
				}
				out, err := exec.Command(m.program, args...).CombinedOutput()
				if err != nil {
					t.Fatalf("%s %q: %v\n%s", m.program, args, err, out)
				}
				return string(out)
			}
			before := tree(t, dir)
			if out := manage(m.install, m.first); !strings.Contains(out, "systemctl enable --now mortar") {
				t.Errorf("the first installation says\n%s", out)
			}
			if g := read(t, dir+"/etc/group"); !strings.Contains(string(g), "\nmortar:x:") {
				t.Errorf("group:\n%s", g)
			}
			if to, err := os.Readlink(dir + "/usr/sbin/mount.glusterfs"); err != nil || to != "../bin/mortar" {
				t.Errorf("mount.glusterfs: %q, %v", to, err)
			}
			use(t, dir)

			changed := []byte("log-level = \"debug\"\n")
			if err := os.WriteFile(dir+"/etc/mortar/mortar.toml", changed, 0o644); err != nil {
				t.Fatal(err)
			}
			// GlusterFS has come, and has taken its helper.
			if err := os.Remove(dir + "/usr/sbin/mount.glusterfs"); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(dir+"/usr/sbin/mount.glusterfs", []byte("#!/bin/sh\nexec mount.mortar \"$@\"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			if out := manage(m.install, m.second); !strings.Contains(out, "the daemon is the old version until it is restarted") {
				t.Errorf("the upgrade says\n%s", out)
			}
			if b := read(t, dir+"/etc/mortar/mortar.toml"); !bytes.Equal(b, changed) {
				t.Errorf("the upgrade made of the configuration\n%s", b)
			}
			use(t, dir)

			manage(m.remove)
			if _, err := os.Stat(dir + "/var/lib/mortar"); err != nil {
				t.Errorf("removing it took the identity of the machine: %v", err)
			}
			if _, err := os.Lstat(dir + "/usr/bin/mortar"); err == nil {
				t.Error("it is still there")
			}
			if b := read(t, dir+"/usr/sbin/mount.glusterfs"); !strings.Contains(string(b), "#!/bin/sh") {
				t.Errorf("GlusterFS's helper is now %q", b)
			}
			// What the test has made may stay, and of an .rpm, which is never purged, what the machine's own is.
			stays := []string{"/bricks", "/mnt/", "/tmp/log", "/usr/sbin/mount.glusterfs"}
			if m.purge != nil {
				manage(m.purge)
			} else {
				stays = append(stays, "/var/lib/mortar", "/var/log/mortar", "/etc/mortar/mortar.toml.rpmsave")
				if b := read(t, dir+"/etc/mortar/mortar.toml.rpmsave"); !bytes.Equal(b, changed) {
					t.Errorf("the changed configuration is kept as\n%s", b)
				}
			}
			for _, name := range tree(t, dir) {
				ours := m.purge == nil && name == "/etc/mortar" || slices.ContainsFunc(stays, func(s string) bool { return strings.HasPrefix(name, s) })
				// Of the directories an .rpm removes those that are its own; the root has no distribution that has the others.
				fi, err := os.Lstat(dir + name)
				other := m.purge == nil && err == nil && fi.IsDir() && !strings.Contains(name, "mortar") && !strings.Contains(name, "docker.service.d")
				if !ours && !other && !slices.Contains(before, name) {
					t.Errorf("it leaves %s", name)
				}
			}
			if _, err := os.Stat(dir + "/bricks/v/.mortar/brick.json"); err != nil {
				t.Errorf("the brick: %v", err)
			}
		})
	}
}

// TestPurgeKeepsBricks: also those that somebody has put where the package keeps its own.
func TestPurgeKeepsBricks(t *testing.T) {
	need(t, "dpkg", "busybox", "groupadd")
	dir := root(t)
	script := read(t, "files/maintainer.sh")
	run := func() string {
		return sh(t, `chroot "$1" /bin/sh -c "$2"`, dir, string(script)+"\npurge")
	}
	sh(t, `mkdir -p "$1/var/lib/mortar/bricks/v/.mortar" "$1/var/log/mortar"`, dir)
	if out := run(); !strings.Contains(out, "left alone") {
		t.Errorf("it says %q", out)
	}
	if _, err := os.Stat(dir + "/var/lib/mortar/bricks/v/.mortar"); err != nil {
		t.Fatal(err)
	}
	sh(t, `rm -r "$1/var/lib/mortar/bricks"`, dir)
	run()
	if _, err := os.Stat(dir + "/var/lib/mortar"); err == nil {
		t.Error("without bricks it stays too")
	}
}

// TestProtocolChange: a daemon is not restarted under mounts that it would not understand.
func TestProtocolChange(t *testing.T) {
	need(t, "busybox", "groupadd")
	dir := root(t)
	script := string(read(t, "files/maintainer.sh"))
	for before, want := range map[string]string{
		"mortar v1 (go1, protocol 4)": "the daemon is the old version until it is restarted",
		"mortar v0 (go1, protocol 3)": "speaks another protocol",
	} {
		sh(t, `printf '#!/bin/sh\necho "%s"\n' "$2" >"$1/usr/bin/mortar"; chmod +x "$1/usr/bin/mortar"; chroot "$1" /bin/sh -c "$3"`, dir, before, script+"\nbefore_unpacking")
		sh(t, `printf '#!/bin/sh\necho "mortar v1 (go1, protocol 4)"\n' >"$1/usr/bin/mortar"`, dir)
		if out := sh(t, `chroot "$1" /bin/sh -c "$2"`, dir, script+"\nafter_unpacking 1"); !strings.Contains(out, want) {
			t.Errorf("%s: it says\n%s", before, out)
		}
	}
}

// TestReproducible: what goes in decides what comes out.
func TestReproducible(t *testing.T) {
	need(t)
	program := testProgram(t)
	deb1, rpm1 := packagesOf(t, program, "1")
	deb2, rpm2 := packagesOf(t, program, "1")
	for _, pair := range [][2]string{{deb1, deb2}, {rpm1, rpm2}} {
		if !bytes.Equal(read(t, pair[0]), read(t, pair[1])) {
			t.Errorf("%s is not the same twice", filepath.Base(pair[0]))
		}
	}
	if os.Getenv("MORTAR_TEST_LONG") == "" {
		return // the compiler's part takes a minute: MORTAR_TEST_LONG=1
	}
	here, err := treeRoot()
	if err != nil {
		t.Fatal(err)
	}
	var sums [2][]byte
	for i := range sums {
		at := filepath.Join(t.TempDir(), strings.Repeat("x", 10*(i+1)))
		sh(t, `git clone -q "$1" "$2"`, here, at)
		out := sh(t, `cd "$1" && GOFLAGS= GOCACHE="$1/cache" packaging/build -out "$1/dist" >/dev/null && cd dist && sha256sum *`, at)
		sums[i] = []byte(out)
		sh(t, `chmod -R u+w "$1"`, at)
	}
	if !bytes.Equal(sums[0], sums[1]) || len(sums[0]) == 0 {
		t.Errorf("two clones give\n%s\nand\n%s", sums[0], sums[1])
	}
}

// TestUnits has systemd judge the units, and what it makes of a line in fstab
// that mount --enable writes.
func TestUnits(t *testing.T) {
	need(t, "systemd-analyze", "busybox", "groupadd")
	const generator = "/usr/lib/systemd/system-generators/systemd-fstab-generator"
	if _, err := os.Stat(generator); err != nil {
		t.Skip("needs ", generator)
	}
	dir := t.TempDir()
	sh(t, `cp files/mortar.service "$1"; mkdir "$1/docker.service.d"; cp files/docker.conf "$1/docker.service.d/mortar.conf"
		printf '[Service]\nExecStart=/bin/true\n' >"$1/docker.service"
		sed -i 's,/usr/bin/mortar,/bin/true,' "$1/mortar.service"
		grep -q 'ExecStart=/bin/true server' "$1/mortar.service"`, dir)
	cmd := exec.Command("systemd-analyze", "verify", "--man=no", dir+"/mortar.service", dir+"/docker.service")
	cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":")
	if out, err := cmd.CombinedOutput(); err != nil || strings.Contains(string(out), dir) {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}

	table := filepath.Join(dir, "fstab")
	const line = `localhost:/wp /var/www/html mortar ro,_netdev,x-systemd.automount,x-systemd.after=mortar.service,x-systemd.mount-timeout=2min 0 0`
	if err := os.WriteFile(table, []byte(line+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "generated")
	sh(t, `mkdir "$1" && SYSTEMD_FSTAB="$2" `+generator+` "$1" "$1" "$1"`, out, table)
	mount, auto := string(read(t, out+"/var-www-html.mount")), string(read(t, out+"/var-www-html.automount"))
	for _, want := range []string{"After=mortar.service", "Type=mortar", "What=localhost:/wp", "Options=ro,_netdev"} {
		if !strings.Contains(mount, want) {
			t.Errorf("the mount unit lacks %s:\n%s", want, mount)
		}
	}
	if !strings.Contains(auto, "Where=/var/www/html") {
		t.Errorf("the automount unit:\n%s", auto)
	}
	if _, err := os.Lstat(out + "/remote-fs.target.requires/var-www-html.automount"); err != nil {
		t.Error(err)
	}
}

// TestManualPages has every page formatted without a warning.
func TestManualPages(t *testing.T) {
	need(t, "groff")
	dir := t.TempDir()
	if _, err := run(testProgram(t), "manual", dir); err != nil {
		t.Fatal(err)
	}
	pages, err := filepath.Glob(dir + "/man/*")
	if err != nil || len(pages) < 10 {
		t.Fatal(pages, err)
	}
	out, err := exec.Command("groff", append([]string{"-man", "-Tutf8", "-wall", "-z"}, pages...)...).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("groff: %v\n%s", err, out)
	}
}
