package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mortar/test/cluster"
)

// booted is a machine that systemd runs on, in namespaces of its own within a host: what it mounts, starts and
// leaves in /run ends with it, and its disk stays.
type booted struct {
	p    *pool
	i    int
	proc *cluster.Process // the parent of its process 1
}

// bootGroup is the control group of a machine's, in each hierarchy that there is.
func bootGroup(i int) string { return fmt.Sprint("mortar-boot-", i) }

// bootTree takes from a host what of its tree is the machine's own: units that some package enabled, and
// generators. Its devices are the few that it needs, so that nothing of it reaches the machine's.
const bootTree = `
	find /etc/systemd/system /lib/systemd/system -path "*.wants/*" -type l ! -name remote-fs.target ! -name systemd-journald.s* -delete
	find /lib/systemd/system-generators -type f -o -type l | grep -v fstab-generator | xargs rm -f
	tr -d - < /proc/sys/kernel/random/uuid > /etc/machine-id
	: > /etc/fstab
	mkdir /run/dev
	mount -t tmpfs -o mode=755 tmpfs /run/dev
	for d in null zero full random urandom tty ptmx fuse autofs kmsg; do cp -a /dev/$d /run/dev/; done
	for d in pts shm net; do mkdir /run/dev/$d; mount --rbind /dev/$d /run/dev/$d; done
	ln -s /proc/self/fd /run/dev/fd
	mount --move /run/dev /dev`

// bootScript becomes systemd's process 1, with control groups of its own.
const bootScript = `
for d in /sys/fs/cgroup /sys/fs/cgroup/*; do
	[ -e $d/cgroup.procs ] || continue
	mkdir -p $d/GROUP
	for f in cpuset.cpus cpuset.mems; do [ ! -e $d/$f ] || cat $d/$f > $d/GROUP/$f; done
	echo $$ > $d/GROUP/cgroup.procs
done
exec unshare --cgroup --pid --mount --uts --ipc --fork --kill-child sh -ec '
	hostname NAME; mount --make-rshared / # as systemd does where it is not told that it is in a container
	mount -t proc proc /proc
	mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys
	mount -t tmpfs -o mode=755 tmpfs /run; mount -t tmpfs tmpfs /tmp
	grep "^[^ ]* /sys/fs/cgroup[^ ]* cgroup" /proc/mounts > /tmp/groups
	umount -R /sys/fs/cgroup
	[ $(grep -c . /tmp/groups) = 1 ] || mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
	while read -r _ dir type options _; do
		mkdir -p $dir
		case $type in
		cgroup2) mount -t cgroup2 cgroup2 $dir ;;
		*) mount -t cgroup -o $(echo $options | sed "s/^rw,relatime,//; s/^name=/none,name=/") cgroup $dir ;;
		esac
	done < /tmp/groups
	exec env -i PATH="$PATH" container=mortar-test /lib/systemd/systemd --unit=multi-user.target --log-target=journal --show-status=no'
`

// bootSystemd starts systemd on a host.
func (p *pool) bootSystemd(i int) *booted {
	p.t.Helper()
	script := strings.NewReplacer("GROUP", bootGroup(i), "NAME", fmt.Sprint("gfs", i)).Replace(bootScript)
	proc, err := p.Host(i).Spawn("systemd", "sh", "-ec", script)
	if err != nil {
		p.t.Fatal(err)
	}
	return &booted{p, i, proc}
}

// up waits until all is started that is to be.
func (b *booted) up() {
	b.p.t.Helper()
	b.p.within(3*time.Minute, fmt.Sprintf("gfs%d is up", b.i), func() error {
		select {
		case <-b.proc.Done():
			b.p.t.Fatalf("systemd has ended:\n%s", b.p.Host(b.i).Log("systemd"))
		default:
		}
		out, err := b.try("systemctl", "is-system-running")
		if state := strings.TrimSpace(out); state != "running" {
			failed, _ := b.try("systemctl", "--failed", "--no-legend")
			jobs, _ := b.try("systemctl", "list-jobs", "--no-legend")
			return fmt.Errorf("it is %s, %v\nfailed: %s\njobs: %s\n%s", state, err, failed, jobs, b.journal())
		}
		return nil
	})
}

// pid is that of systemd, as the machine sees it; 0 when there is none.
func (b *booted) pid() int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		text := readFile(name)
		f := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
		if len(f) > 1 && f[1] == strconv.Itoa(b.proc.Pid()) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			return pid
		}
	}
	return 0
}

// try runs a program where systemd runs.
func (b *booted) try(argv ...string) (string, error) {
	pid := b.pid()
	if pid == 0 {
		return "", errors.New("it does not run")
	}
	cmd := exec.CommandContext(b.p.ctx(patience), "nsenter", append([]string{"-t", fmt.Sprint(pid), "-m", "-p", "-n", "-u", "-i", "-C", "--"}, argv...)...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (b *booted) run(argv ...string) string {
	b.p.t.Helper()
	out, err := b.try(argv...)
	if err != nil {
		b.p.t.Fatalf("gfs%d: %q: %v\n%s\n%s", b.i, argv, err, out, b.journal())
	}
	return out
}

// journal is the end of what the machine has written down since it was booted.
func (b *booted) journal() string {
	out, _ := b.try("journalctl", "--no-pager", "-n", "60", "-o", "cat")
	return out
}

// sh types a line.
func (b *booted) sh(line string) string {
	b.p.t.Helper()
	return strings.TrimSpace(b.run("sh", "-ec", line))
}

// refuses types a line that must fail, with words that contain all of the parts.
func (b *booted) refuses(line string, parts ...string) {
	b.p.t.Helper()
	out, err := b.try("sh", "-ec", line)
	for _, part := range parts {
		if err == nil || !strings.Contains(out, part) {
			b.p.t.Errorf("gfs%d: %s: %v, and the message lacks %q:\n%s", b.i, line, err, part, out)
		}
	}
}

// powerCut ends everything at once.
func (b *booted) powerCut() {
	b.p.t.Helper()
	syscall.Kill(b.pid(), syscall.SIGKILL)
	b.ended(20 * time.Second)
}

// ended waits until systemd, and with it everything that it ran, has ended.
func (b *booted) ended(limit time.Duration) {
	b.p.t.Helper()
	ctx := b.p.ctx(limit)
	if b.proc.Wait(ctx); ctx.Err() != nil {
		b.p.t.Fatalf("gfs%d does not go down:\n%s", b.i, b.p.Host(b.i).Log("systemd"))
	}
}

// debPackage makes the .deb with a revision.
func (p *pool) debPackage(revision string) string {
	p.t.Helper()
	dir := filepath.Join(p.Dir, "packages"+revision)
	if out, err := exec.Command("../../packaging/build", "-out", dir, "-binary", mortar, "-revision", revision).CombinedOutput(); err != nil {
		p.t.Fatalf("%v\n%s", err, out)
	}
	deb, err := filepath.Glob(dir + "/*.deb")
	if err != nil || len(deb) != 1 {
		p.t.Fatal(deb, err)
	}
	return deb[0]
}

// TestBoot is the walkthrough of three machines (W1) from the package to a machine that is switched off, on machines that
// systemd boots, with the units of mortar's and of Docker's packages as they are, and typed as it stands
// there. Docker's containers, which come back by themselves after a boot, find what is mounted and never the empty directory
// below, after a power cut, an orderly shutdown, and when all machines begin at once; an upgrade of the package leaves
// mounts and containers alone.
func TestBoot(t *testing.T) {
	if !long {
		t.Skip("LEFT OUT without MORTAR_TEST_LONG=1: machines that systemd boots")
	}
	for _, program := range []string{"/lib/systemd/systemd", "dpkg", "dockerd", "docker", "containerd", "runc", "busybox", "nsenter"} {
		need(t, program)
	}
	const machines = 3
	t.Cleanup(func() { // when the cluster is gone
		for i := 1; i <= machines; i++ {
			for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
				groups, _ := filepath.Glob(pattern + bootGroup(i))
				for _, g := range groups {
					exec.Command("find", g, "-depth", "-type", "d", "-exec", "rmdir", "{}", "+").Run()
				}
			}
		}
	})
	p := &pool{Cluster: cluster.Start(t, cluster.Options{Hosts: machines, Share: []string{binDir}}), t: t, setup: setup{hosts: machines}}
	t.Cleanup(func() { // what mount --enable has made immutable could not be removed, if the test ends before it has taken that back
		for k := range machines {
			exec.Command("chattr", "-i", p.outside(k+1, "/bricks/site")).Run()
		}
	})
	deb := p.debPackage("1")
	image := shellImage(t, p.Dir)
	ms := make([]*booted, machines)
	// each does something on every machine, on all at once.
	each := func(do func(k int)) {
		var all sync.WaitGroup
		for k := range machines {
			all.Go(func() { do(k) })
		}
		all.Wait()
		if t.Failed() {
			t.FailNow()
		}
	}
	for k := range machines {
		// The engine of a machine without a network of its own for containers, as in the other tests.
		p.run(k+1, "sh", "-ec", bootTree+`
			sed "s/ n\([0-9]\)$/ gfs\1/" /etc/hosts > /tmp/hosts && cat /tmp/hosts > /etc/hosts; echo gfs`+fmt.Sprint(k+1)+` > /etc/hostname
			mkdir -p /etc/docker /bricks/docker
			echo '{"storage-driver": "vfs", "iptables": false, "ip-forward": false, "log-level": "warn", "bridge": "none", "data-root": "/bricks/docker"}' > /etc/docker/daemon.json
			: > /etc/default/docker`)
		ms[k] = p.bootSystemd(k + 1)
	}
	each(func(k int) { ms[k].up() })
	m := ms[0]

	// Step 1.
	for _, m := range ms {
		m.sh("dpkg -i " + deb)
		m.sh("systemctl enable --now mortar")
		m.sh("systemctl enable --now containerd docker.socket docker")
		m.sh("docker import " + image + " " + dockerImage)
	}
	// Step 2.
	for _, m := range ms[1:] {
		out, err := ms[0].try("mortar", "peer", "invite")
		var line string
		for l := range strings.Lines(out) {
			if l = strings.TrimSpace(l); strings.HasPrefix(l, "mortar join ") {
				line = l
			}
		}
		if err != nil || line == "" {
			t.Fatalf("peer invite: %v\n%s", err, out)
		}
		m.sh(line)
	}
	for _, m := range ms {
		p.within(20*time.Second, "all are connected", func() error {
			status, err := m.try("mortar", "peer", "status")
			list, err2 := m.try("mortar", "pool", "list")
			if strings.Count(status, "(Connected)") != machines-1 || strings.Count(list, "Connected") != machines {
				return fmt.Errorf("%v %v\n%s\n%s", err, err2, status, list)
			}
			return nil
		})
	}
	// Steps 3 and 4.
	m.refuses("mortar --mode=script volume create wp replica 3 gfs1:/bricks gfs2:/bricks gfs3:/bricks", "mount point", "force")
	m.refuses("mortar --mode=script volume create wp replica 3 gfs1:/b1/wp gfs2:/b1/wp gfs3:/b1/wp", "root partition", "force")
	m.sh("mortar volume create wp replica 3 gfs1:/bricks/b1/wp gfs2:/bricks/b1/wp gfs3:/bricks/b1/wp")
	m.refuses("mortar volume create other gfs1:/bricks/b1/wp force", "already part of a volume")
	if out := m.sh("mortar volume info wp"); !strings.Contains(out, "Brick3: gfs3:/bricks/b1/wp") {
		t.Errorf("volume info:\n%s", out)
	}
	m.sh("mortar volume start wp")
	p.within(20*time.Second, "all bricks are online", func() error {
		out, err := m.try("mortar", "volume", "status", "wp")
		if strings.Count(out, " Y ") < machines {
			return fmt.Errorf("%v\n%s", err, out)
		}
		return nil
	})
	// Step 5.
	for _, m := range ms {
		m.sh("mkdir -p /var/www/html; echo 'gfs2:/wp /var/www/html mortar defaults,_netdev 0 0' >> /etc/fstab; systemctl daemon-reload; mount -a")
	}
	const there = "/var/www/html/there"
	m.sh("echo there > " + there + "; chmod 640 " + there + "; chown 33:34 " + there)
	same := func() {
		t.Helper()
		for _, m := range ms {
			if got := m.sh("cat " + there + "; stat -c '%a %u %g' " + there); got != "there\n640 33 34" {
				t.Errorf("gfs%d reads %q", m.i, got)
			}
		}
	}
	same()

	// Containers of each machine, one with a bind mount and one with a Docker volume; each writes down what it finds whenever it starts.
	m.sh("docker volume create -d mortar demo")
	m.sh("docker run --rm --network none -v demo:/data " + dockerImage + " /bin/sh -c 'echo there > /data/there'")
	apps := map[string]string{"bound": "/var/www/html", "enabled": "/bricks/site", "volume": "demo"}
	for _, m := range ms {
		m.sh("mortar mount --enable localhost:/wp /bricks/site")
		for name, source := range apps {
			m.sh("docker run -d --name " + name + " --restart always --network none --stop-signal KILL -v " + source + ":/data " + dockerImage +
				" /bin/sh -c 'cat /data/there >> /found 2>&1; exec sleep 100000'")
		}
	}
	starts := func(m *booted, want int) {
		t.Helper()
		for name := range apps {
			p.within(time.Minute, fmt.Sprintf("the container %s of gfs%d runs", name, m.i), func() error {
				out, err := m.try("docker", "exec", name, "/bin/sh", "-c", "cat /data/there /found")
				if err != nil {
					ps, _ := m.try("docker", "ps", "-a")
					return fmt.Errorf("%v: %s\n%s", err, out, ps)
				}
				if out != strings.Repeat("there\n", want+1) {
					t.Fatalf("gfs%d: the container %s, which began %d times, finds and has found:\n%s", m.i, name, want, out)
				}
				return nil
			})
		}
	}
	boots := make([]int, machines)
	for k := range ms {
		boots[k]++
		starts(ms[k], boots[k])
	}
	// found demands, of a machine that has booted, that its container has found everything.
	found := func(what string, k int) {
		t.Helper()
		begin := time.Now()
		ms[k].up()
		up := time.Since(begin)
		boots[k]++
		starts(ms[k], boots[k])
		t.Logf("%s: gfs%d is up after %.1f s, its containers go on %.1f s later", what, k+1, up.Seconds(), (time.Since(begin) - up).Seconds())
	}
	ms[1].powerCut()
	if got := ms[0].sh("cat " + there); got != "there" { // step 7
		t.Errorf("without gfs2, gfs1 reads %q", got)
	}
	m.sh("echo more > /var/www/html/more")
	gone := regexp.MustCompile(`(?m)^Brick gfs2:/bricks/b1/wp +N/A +N/A +N +N/A`)
	p.within(10*time.Second, "the status table shows that gfs2 is gone", func() error {
		if out, err := m.try("mortar", "volume", "status", "wp"); !gone.MatchString(out) {
			return fmt.Errorf("%v\n%s", err, out)
		}
		return nil
	})
	ms[1] = p.bootSystemd(2)
	found("after a power cut", 1)
	p.within(30*time.Second, "nothing is left to be healed", func() error {
		if out, err := m.try("mortar", "volume", "heal", "wp", "info"); strings.Count(out, "Number of entries: 0\n") != machines {
			return fmt.Errorf("%v\n%s", err, out)
		}
		return nil
	})

	// An upgrade, while containers run.
	process := func(m *booted) string { return m.sh("pgrep -fo 'mount.*/var/www/html'") }
	deb2 := p.debPackage("2")
	for _, m := range ms {
		before, daemon := process(m), m.sh("systemctl show -p MainPID mortar")
		m.sh("dpkg -i " + deb2)
		if now := process(m); now != before {
			t.Errorf("after an upgrade the mount's process is %s, and was %s", now, before)
		}
		if now := m.sh("systemctl show -p MainPID mortar"); now == daemon {
			t.Errorf("after an upgrade the daemon is the old one, %s", now)
		}
		starts(m, boots[m.i-1])
	}

	down := func(k int) {
		t.Helper()
		begin := time.Now()
		ms[k].try("systemctl", "poweroff")
		ms[k].ended(90 * time.Second)
		t.Logf("gfs%d is down after %.1f s", k+1, time.Since(begin).Seconds())
		if took := time.Since(begin); took > 30*time.Second { // units are given 90 s
			t.Errorf("going down took %v", took)
		}
	}
	down(2)
	ms[2] = p.bootSystemd(3)
	found("after a shutdown", 2)
	same()
	// All go down together. The first one that is switched on waits for the others, and Docker with it.
	each(down)
	ms[0] = p.bootSystemd(1)
	p.within(time.Minute, "gfs1 waits for the volume", func() error {
		var err error
		for unit, want := range map[string]string{"mortar": "active", "containerd": "active", "network-online.target": "active", "var-www-html.mount": "activating"} {
			if got, _ := ms[0].try("systemctl", "is-active", unit); strings.TrimSpace(got) != want {
				err = errors.Join(err, fmt.Errorf("%s is %s", unit, got))
			}
		}
		return err
	})
	if got, _ := ms[0].try("systemctl", "is-active", "docker"); got != "inactive\n" {
		t.Errorf("while gfs1 waits for the volume, Docker is %s", got)
	}
	for k := range machines - 1 {
		ms[k+1] = p.bootSystemd(k + 2)
	}
	each(func(k int) { found("after all were down", k) })
	same()
	// Nothing was written in place of the volume.
	for k := range ms {
		if left, err := os.ReadDir(p.outside(k+1, "/var/www/html")); err != nil || len(left) > 0 {
			t.Errorf("below the mount gfs%d has %v, %v", k+1, left, err)
		}
	}
	// A machine that stays alone: what was mounted with --enable is an error for whoever looks at it, not an
	// empty directory, for Docker too, and is there when the others are.
	m = ms[0]
	m.sh("docker rm -f bound volume")
	each(down)
	ms[0] = p.bootSystemd(1)
	m = ms[0]
	p.within(4*time.Minute, "gfs1 has given up waiting for the volume, and runs Docker", func() error {
		if got, _ := m.try("systemctl", "is-active", "docker"); got != "active\n" {
			return errors.New(got)
		}
		return nil
	})
	m.refuses("touch /bricks/site/there", "/bricks/site/there")
	if out := m.sh("ls /bricks/site/ 2>&1 || true"); !strings.Contains(out, "cannot") {
		t.Errorf("without the volume /bricks/site has %q", out)
	}
	if out := m.sh("docker ps --format {{.Names}}"); out != "" {
		t.Errorf("without the volume %s runs", out)
	}
	for k := range machines - 1 {
		ms[k+1] = p.bootSystemd(k + 2)
	}
	p.within(3*time.Minute, "the volume is there", func() error {
		out, err := m.try("cat", "/bricks/site/there")
		if err != nil || out != "there\n" {
			return fmt.Errorf("%v: %s", err, out)
		}
		return nil
	})
	m.sh("mount /var/www/html; docker start enabled")
	if out, want := m.sh("docker exec enabled /bin/sh -c 'cat /found'"), strings.TrimSpace(strings.Repeat("there\n", boots[0]+1)); out != want {
		t.Errorf("the container has found\n%s\nwant\n%s", out, want)
	}
	for k := range machines - 1 {
		found("after gfs1 was alone", k+1)
	}
	out := ms[0].sh("mortar doctor || true")
	for _, want := range []string{"ok   docker", "ok   fstab   2 mounts", "0 bad"} {
		if !strings.Contains(out, want) {
			t.Errorf("doctor says nothing of %q:\n%s", want, out)
		}
	}
	// And away again: the package leaves what is the pool's.
	for k := range ms {
		ms[k].sh("docker rm -f $(docker ps -aq); mortar umount --disable /bricks/site; umount /var/www/html; dpkg --purge mortar")
		down(k)
		if _, err := os.Stat(p.outside(k+1, "/bricks/b1/wp/.mortar/brick.json")); err != nil {
			t.Error(err)
		}
	}
}
