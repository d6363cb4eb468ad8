package e2e

import (
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestManagedPlugin: an engine takes the managed plugin on a machine where nothing of
// ours is installed; the plugin joins the pool with a token, and its volumes are those
// that the driver of the other machines' daemons has. After it was switched off
// and on it has them still.
func TestManagedPlugin(t *testing.T) {
	if !long {
		t.Skip("LEFT OUT without MORTAR_TEST_LONG=1: the managed plugin in an engine")
	}
	p := start(t, setup{alone: true})
	p.join(2)
	p.setup.replica = 2
	p.createVolume()
	p.daemons[2].Signal(syscall.SIGTERM) // n3 has none
	if err := p.daemons[2].Wait(p.ctx(patience)); err != nil {
		t.Fatal(err)
	}
	p.run(3, "sh", "-c", "rm -rf /var/lib/mortar/* /run/mortar /run/docker/plugins/mortar.sock")
	e := startEngines(t, p)
	defer e.stopEngines()
	dir := filepath.Join(p.Dir, "plugin")
	if out, err := exec.Command("../../packaging/docker-plugin/build", dir, mortar).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	e.docker(3, "plugin", "create", "mortar", dir)
	e.refuseDocker(3, []string{"plugin", "set", "mortar", "COLOUR=red"}, "COLOUR")
	var inv struct{ Token string }
	p.json(&inv, 1, "peer", "invite", "--json")
	e.docker(3, "plugin", "set", "mortar", "MORTAR_TOKEN="+inv.Token, "MORTAR_HOSTS="+p.Host(1).Addr)
	e.docker(3, "plugin", "enable", "mortar")
	p.within(30*time.Second, "n3 is a peer", func() error {
		_, err := p.Host(3).Run(p.ctx(patience), "docker", "volume", "create", "-d", "mortar", "-o", "size=20MB", "demo")
		return err
	})
	e.container(1, "demo", "echo from n1 > /data/file", "--rm")
	if got := e.container(3, "demo", "cat /data/file; echo from n3 > /data/other; df -k /data | grep -c 20480", "--rm"); got != "from n1\n1" {
		t.Errorf("n3 reads %q", got)
	}
	if got := e.container(2, "demo", "cat /data/other", "--rm"); got != "from n3" {
		t.Errorf("n2 reads %q", got)
	}
	// In use, on a machine whose plugin is switched off and on again.
	e.container(3, "demo", "sleep 1000", "-d", "--name", "user")
	e.refuseDocker(1, []string{"volume", "rm", "demo"}, "in use by", "n3:")
	e.docker(3, "rm", "-f", "user")
	e.docker(3, "plugin", "disable", "-f", "mortar")
	e.docker(3, "plugin", "enable", "mortar")
	p.within(30*time.Second, "n3 has the volume again", func() error {
		_, err := p.Host(3).Run(p.ctx(patience), "docker", "run", "--rm", "--network", "none", "-v", "demo:/data", dockerImage, "cat", "/data/other")
		return err
	})
	p.within(15*time.Second, "the volume can be removed", func() error {
		_, err := p.Host(3).Run(p.ctx(patience), "docker", "volume", "rm", "demo")
		return err
	})
	e.docker(3, "plugin", "disable", "-f", "mortar")
	e.docker(3, "plugin", "rm", "mortar")
}
