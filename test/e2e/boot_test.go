package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
	proc *cluster.Process
}

// bootScript becomes systemd's process 1. Of the machine's own it sees what it may not change.
const bootScript = `
for d in /sys/fs/cgroup /sys/fs/cgroup/systemd /sys/fs/cgroup/unified; do
	[ ! -e $d/cgroup.procs ] || { mkdir -p $d/mortar-boot && echo $$ > $d/mortar-boot/cgroup.procs; }
done
exec unshare --cgroup --pid --mount --ipc --fork --kill-child sh -ec '
	mount -t proc proc /proc
	mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys
	if [ -e /sys/fs/cgroup/cgroup.procs ]; then
		umount -R /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup
	else
		umount -R /sys/fs/cgroup; mount -t tmpfs tmpfs /sys/fs/cgroup; mkdir /sys/fs/cgroup/systemd /sys/fs/cgroup/unified
		mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd; mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
	fi
	mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /tmp
	exec env -i PATH="$PATH" container=mortar-test /lib/systemd/systemd --unit=multi-user.target --log-target=console --show-status=no'
`

// boot starts systemd on a host, and waits until all is started that is to be.
func (p *pool) bootSystemd(i int) *booted {
	p.t.Helper()
	proc, err := p.Host(i).Spawn("systemd", "sh", "-ec", bootScript)
	if err != nil {
		p.t.Fatal(err)
	}
	b := &booted{p, i, proc}
	p.within(time.Minute, "the machine is up", func() error {
		select {
		case <-proc.Done():
			p.t.Fatalf("systemd has ended:\n%s", p.Host(i).Log("systemd"))
		default:
		}
		out, err := b.try("systemctl", "is-system-running")
		if state := strings.TrimSpace(out); state != "running" {
			return fmt.Errorf("it is %s, %v\n%s", state, err, p.Host(i).Log("systemd"))
		}
		return nil
	})
	return b
}

// pid is that of systemd, as the machine sees it.
func (b *booted) pid() int {
	for _, proc := range b.p.Host(b.i).Processes() {
		if proc.Name == "systemd" {
			return proc.Pid
		}
	}
	return 0
}

// try runs a program where systemd runs.
func (b *booted) try(argv ...string) (string, error) {
	cmd := exec.CommandContext(b.p.ctx(patience), "nsenter", append([]string{"-t", fmt.Sprint(b.pid()), "-m", "-p", "-n", "-u", "-i", "-C", "--"}, argv...)...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (b *booted) run(argv ...string) string {
	b.p.t.Helper()
	out, err := b.try(argv...)
	if err != nil {
		b.p.t.Fatalf("%q: %v\n%s", argv, err, out)
	}
	return out
}

// ended waits until systemd, and with it everything that it ran, has ended.
func (b *booted) ended(limit time.Duration) {
	b.p.t.Helper()
	ctx := b.p.ctx(limit)
	if b.proc.Wait(ctx); ctx.Err() != nil {
		b.p.t.Fatalf("the machine does not go down:\n%s", b.p.Host(b.i).Log("systemd"))
	}
}

// TestBoot is a machine with systemd and the package: its units as they are installed, enabled as a user does,
// its mounts in fstab, by hand and by mount --enable. At a boot, also one after a power cut, Docker starts when the driver's socket
// and the files are there; a restart of the daemon leaves mounts alone; and the machine goes down without waiting for
// anything. Docker is a unit that writes down what it sees.
func TestBoot(t *testing.T) {
	if !long {
		t.Skip("LEFT OUT without MORTAR_TEST_LONG=1: a machine that systemd boots")
	}
	need(t, "/lib/systemd/systemd")
	need(t, "dpkg")
	p := start(t, setup{hosts: 2, alone: true})
	p.daemons[0].Signal(syscall.SIGTERM)
	if err := p.daemons[0].Wait(p.ctx(patience)); err != nil {
		t.Fatal(err)
	}
	packages := filepath.Join(p.Dir, "packages")
	if out, err := exec.Command("../../packaging/build", "-out", packages, "-binary", mortar).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	deb, err := filepath.Glob(packages + "/*.deb")
	if err != nil || len(deb) != 1 {
		t.Fatal(deb, err)
	}
	defer func() {
		for _, dir := range []string{"/sys/fs/cgroup/mortar-boot", "/sys/fs/cgroup/systemd/mortar-boot", "/sys/fs/cgroup/unified/mortar-boot"} {
			exec.Command("find", dir, "-depth", "-type", "d", "-exec", "rmdir", "{}", "+").Run()
		}
	}()
	p.run(1, "sh", "-ec", `
		rm -rf /var/lib/mortar /run/mortar
		# Of the machine's own units only those that every boot has.
		rm -rf /etc/systemd/system/*.wants /etc/systemd/system/*.requires /lib/systemd/system/*.wants/* /lib/systemd/system/docker.socket
		find /lib/systemd/system-generators /usr/lib/systemd/system-generators -type f -o -type l | grep -v fstab-generator | xargs rm -f
		printf '[Manager]\nDefaultStandardOutput=null\nDefaultStandardError=null\n' > /etc/systemd/system.conf
		: > /etc/fstab
		cat > /lib/systemd/system/docker.service <<-'U'
			[Service]
			Type=oneshot
			RemainAfterExit=yes
			ExecStart=/bin/sh -c 'cat /var/www/html/there /mnt/plain/there > /run/saw 2>&1; ls /run/docker/plugins/mortar.sock >> /run/saw 2>&1; true'
			[Install]
			WantedBy=multi-user.target
		U
		dpkg -i `+deb[0]+`
		mkdir -p /mnt/plain`)
	b := p.bootSystemd(1)
	b.run("systemctl", "enable", "--now", "mortar")
	b.run("systemctl", "enable", "docker")
	var inv struct{ Token string }
	p.json(&inv, 2, "peer", "invite", "--json")
	b.run("mortar", "join", inv.Token, "n2")
	b.run("mortar", "volume", "create", "wp", "replica", "2", "n1:/bricks/wp", "n2:/bricks/wp", "--mode=script")
	b.run("mortar", "volume", "start", "wp")
	b.run("mortar", "mount", "--enable", "localhost:/wp", "/var/www/html")
	b.run("sh", "-ec", "echo there > /var/www/html/there; sync /var/www/html/there; echo 'n1:/wp /mnt/plain mortar defaults,_netdev 0 0' >> /etc/fstab")

	// up boots, and looks at what Docker found.
	up := func(what string) {
		t.Helper()
		begin := time.Now()
		b = p.bootSystemd(1)
		t.Logf("%s: up after %.1f s", what, time.Since(begin).Seconds())
		if got := b.run("cat", "/run/saw"); got != "there\nthere\n/run/docker/plugins/mortar.sock\n" {
			t.Errorf("%s: Docker, when it started, found\n%s", what, got)
		}
	}
	syscall.Kill(b.pid(), syscall.SIGKILL)
	b.ended(20 * time.Second)
	up("after a power cut")
	mount := strings.TrimSpace(b.run("pgrep", "-fo", "mount.*/var/www/html"))
	b.run("systemctl", "restart", "mortar")
	if now := strings.TrimSpace(b.run("pgrep", "-fo", "mount.*/var/www/html")); now != mount {
		t.Errorf("after a restart of the daemon the mount's process is %s, and was %s", now, mount)
	}
	if got := b.run("cat", "/var/www/html/there"); got != "there\n" {
		t.Errorf("after a restart of the daemon it reads %q", got)
	}
	begin := time.Now()
	b.try("systemctl", "poweroff")
	b.ended(60 * time.Second)
	t.Logf("down after %.1f s", time.Since(begin).Seconds())
	if took := time.Since(begin); took > 30*time.Second { // units are given 90 s
		t.Errorf("going down took %v", took)
	}
	up("after a shutdown")
	b.try("systemctl", "poweroff")
	b.ended(60 * time.Second)
	if _, err := os.Stat(p.outside(1, "/bricks/wp/.mortar/brick.json")); err != nil {
		t.Error(err)
	}
}
