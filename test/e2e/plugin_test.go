package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestManagedPlugin: an engine takes the managed plugin on a machine where nothing of
// ours is installed; the plugin joins the pool with a token, as a client, and its volumes are those
// that the driver of the other machines' daemons has. After it was switched off
// and on it has them still. Then, on the same machine as if it were another, it joins as a
// full peer, with a brick.
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
	role := func(client, voter bool) {
		t.Helper()
		p.within(20*time.Second, fmt.Sprintf("n3 is a client (%v), and votes (%v)", client, voter), func() error {
			var pool struct {
				Peers []struct {
					Name                   string
					Client, Witness, Voter bool
				}
			}
			p.json(&pool, 1, "pool", "list", "--json")
			for _, peer := range pool.Peers {
				if peer.Name == p.Host(3).Name && peer.Client == client && peer.Witness == client && peer.Voter == voter {
					return nil
				}
			}
			return fmt.Errorf("%+v", pool)
		})
	}
	role(true, false)
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

	p.mortar(1, "--mode=script", "peer", "detach", "n3", "force")
	p.run(3, "sh", "-c", "rm -rf /var/lib/mortar/*")
	p.json(&inv, 1, "peer", "invite", "--json")
	e.docker(3, "plugin", "set", "mortar", "MORTAR_TOKEN="+inv.Token, "MORTAR_ROLE=peer", "bricks.source=/bricks")
	e.docker(3, "plugin", "enable", "mortar")
	p.within(30*time.Second, "n3 holds a brick", func() error {
		_, err := p.try(1, "volume", "create", "more", "replica", "3", "n1:/bricks/more", "n2:/bricks/more", "n3:/bricks/more")
		return err
	})
	role(false, true)
	p.mortar(1, "volume", "start", "more")
	e.docker(3, "volume", "create", "-d", "mortar", "-o", "volume=more", "-o", "replica=3", "three")
	e.container(1, "three", "echo again from n1 > /data/file", "--rm")
	if got := e.container(3, "three", "cat /data/file", "--rm"); got != "again from n1" {
		t.Errorf("n3 reads %q", got)
	}
	if _, err := os.Stat(e.outside(3, "/bricks/more/.mortar/brick.json")); err != nil {
		t.Errorf("the brick is not on n3's disk: %v", err)
	}
	p.within(30*time.Second, "the brick in the plugin is in sync", func() error {
		var all []status
		p.json(&all, 1, "volume", "status", "more", "--json")
		if len(all) != 1 || len(all[0].Sets) != 1 || all[0].Sets[0].InSync != 3 {
			return fmt.Errorf("%+v", all)
		}
		return nil
	})
	e.docker(3, "volume", "rm", "three") // whose engine else takes the plugin to be in use
	e.docker(3, "plugin", "disable", "-f", "mortar")
	e.docker(3, "plugin", "rm", "mortar")
}
