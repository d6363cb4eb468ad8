package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// What is mounted inside a volume, for all of a machine or in a container's mount namespace, stays there whatever
// other machines change and whoever fails; and the volume below is coherent meanwhile.
func TestMountedInside(t *testing.T) {
	p := start(t, setup{})
	const here, there = "/mnt/wp/www/uploads", "/mnt/wp/www/there"
	p.run(1, "sh", "-c", "mkdir -p "+here+" "+there+" && echo 1 >/mnt/wp/www/file && ln /mnt/wp/www/file /mnt/wp/www/link")
	p.run(2, "ls", "-lR", "/mnt/wp")

	p.run(2, "mount", "-t", "tmpfs", "inside", here)
	p.run(2, "sh", "-c", "echo inside >"+here+"/mark")
	const pid = "/run/container.pid"
	container, err := p.Host(2).Spawn("container", "unshare", "-m", "sh", "-c",
		"mount -t tmpfs inside "+there+" && echo inside >"+there+"/mark && echo $$ >"+pid+" && exec sleep 1000000")
	if err != nil {
		t.Fatal(err)
	}
	end := func() {
		container.Kill()
		p.Host(2).Run(p.ctx(patience), "umount", here)
	}
	defer end()
	p.within(10*time.Second, "the container runs", func() error {
		_, err := p.Host(2).Run(p.ctx(patience), "test", "-s", pid)
		return err
	})
	// What a look finds is judged with what is written where it looked.
	stays := func(after string) {
		t.Helper()
		p.run(2, "sh", "-c", "ls -l /mnt/wp/www /mnt/wp/www/file >/dev/null && touch "+here+"/more")
		inner := p.run(2, "cat", here+"/mark") + p.run(2, "sh", "-c", "nsenter -m -t $(cat "+pid+") cat "+there+"/mark")
		if inner != "inside\ninside\n" {
			t.Errorf("after %s: %q", after, inner)
		}
		if below := p.run(1, "ls", here, there); strings.Contains(below, "more") || strings.Contains(below, "mark") {
			t.Fatalf("after %s the volume below has %q", after, below)
		}
	}
	stays("nothing")

	for i, path := range []string{"file", "link", "uploads", "there", "", "file"} {
		p.run(1, "chown", fmt.Sprint(1000+i), "/mnt/wp/www/"+path)
		stays("chown of " + path)
	}
	if owner := p.run(2, "stat", "-c", "%u", "/mnt/wp/www/file"); owner != "1005\n" {
		t.Errorf("the file is %q's", owner)
	}

	// Both change the directory that has the mount points, so that each has its lock while it is to forget names.
	const names = "for i in $(seq 100); do echo $0 >/mnt/wp/www/$0.$i; mv /mnt/wp/www/$0.$i /mnt/wp/www/now.$i; ls /mnt/wp/www >/dev/null; done"
	one, two := p.async(1, patience, "sh", "-c", names, "one"), p.async(2, patience, "sh", "-c", names, "two")
	if err := errors.Join(one(), two()); err != nil {
		t.Error(err)
	}
	stays("both machines' changes")

	p.killDaemon(2)
	p.run(1, "chown", "2000", "/mnt/wp/www")
	stays("the death of its daemon")
	p.back(2)
	p.healed(1, 30*time.Second)
	p.killDaemon(p.primary(1))
	stays("the death of the primary")
	for i, d := range p.daemons {
		select {
		case <-d.Done():
			p.back(i + 1)
		default:
		}
	}
	p.healed(1, 30*time.Second)

	p.mortar(2, "mount", "--upgrade", "/mnt/wp")
	stays("an upgrade of the mount")
	end()
	p.within(10*time.Second, "the container has ended", func() error {
		select {
		case <-container.Done():
			return nil
		default:
			return errors.New("it runs")
		}
	})
	p.run(2, "umount", "/mnt/wp")
	p.mount(2)
	p.identical(1)
}

// A Docker volume inside another one's directory stays there, whatever containers of other machines do with the outer one.
func TestDockerVolumeInside(t *testing.T) {
	p := start(t, setup{mounts: -1})
	e := startEngines(t, p)
	defer e.stopEngines()
	for _, volume := range []string{"site", "uploads"} {
		e.docker(1, "volume", "create", "-d", "mortar", "-o", "mode=1777", volume)
	}
	e.container(2, "site", "echo inside >/data/uploads/mark; exec sleep 1000000", "-d", "--name", "web", "-v", "uploads:/data/uploads")
	stays := func(after string) {
		t.Helper()
		if got := e.docker(2, "exec", "web", "sh", "-c", "ls -l /data >/dev/null; echo >>/data/uploads/more; cat /data/uploads/mark"); got != "inside" {
			t.Errorf("after %s: %q", after, got)
		}
		if below := e.container(1, "site", "ls /data/uploads", "--rm"); below != "" {
			t.Fatalf("after %s the volume below has %q", after, below)
		}
	}
	stays("nothing")
	e.container(1, "site", "echo 1 >/data/file", "--rm")
	stays("a new file")
	for _, path := range []string{"file", "uploads", ""} {
		e.container(1, "site", "busybox chown 4711 /data/"+path, "--rm")
		stays("chown of " + path)
	}
	p.killDaemon(2)
	stays("the death of its daemon")
	p.back(2)
	p.healed(1, 30*time.Second)
	if at := p.primary(1); at != 1 {
		p.killDaemon(at)
		stays("the death of the primary")
		p.back(at)
		p.healed(1, 30*time.Second)
	}
	e.docker(2, "rm", "-f", "web")
	e.nothingMounted(2)
}
