package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// TestStaging is the walkthrough of shared storage under a Swarm of five machines (W2), as it stands there: a volume with five
// bricks, mounted by fstab, and what dd writes is on all of them. In its long form the data of a service is on a
// bind mount of it; the service's machine dies, and it starts on another with all that it had.
// That four of the five die is TestFourOfFiveDie.
func TestStaging(t *testing.T) {
	const machines = 5
	p := start(t, setup{hosts: machines, replica: -1, mounts: -1})
	create := []string{"volume", "create", "staging-gfs", "replica", "5"}
	for _, h := range p.Hosts() {
		create = append(create, h.Name+":/bricks/staging")
	}
	p.mortar(1, create...)
	p.mortar(2, "volume", "start", "staging-gfs")
	for i := range p.Hosts() {
		p.run(i+1, "sh", "-ec", "ln -s "+mortar+" /sbin/mount.mortar; echo 'localhost:/staging-gfs /mnt mortar defaults,_netdev,backupvolfile-server=localhost 0 0' >> /etc/fstab; mount -a")
	}
	p.run(1, "dd", "if=/dev/zero", "of=/mnt/output.dat", "bs=24M", "count=1")
	p.run(2, "dd", "if=/dev/urandom", "of=/mnt/random.dat", "bs=2M", "count=1")
	want := p.run(1, "sh", "-ec", "cd /mnt; sha256sum output.dat random.dat; stat -c '%s' output.dat random.dat")
	if !strings.HasSuffix(want, "\n25165824\n2097152\n") {
		t.Errorf("n1 has\n%s", want)
	}
	for i := range p.Hosts() {
		if got := p.run(i+1, "sh", "-ec", "cd /mnt; sha256sum output.dat random.dat; stat -c '%s' output.dat random.dat"); got != want {
			t.Errorf("n%d has\n%sn1 has\n%s", i+1, got, want)
		}
	}
	if long {
		p.serviceMoves()
	} else {
		t.Log("without MORTAR_TEST_LONG=1 no Swarm has its data there")
	}
	for i := range p.Hosts() {
		p.run(i+1, "umount", "/mnt")
	}
}

// serviceMoves has a Swarm of all machines run a service with its data in a directory of /mnt, and kills its machine.
func (p *pool) serviceMoves() {
	p.t.Helper()
	e := startEngines(p.t, p)
	defer e.stopEngines()
	e.swarm(15 * time.Second)
	p.run(1, "mkdir", "/mnt/couchdb")
	// The test looks from n1.
	e.docker(1, "service", "create", "--detach", "--name", "couchdb", "--no-resolve-image", "--network", "host", "--constraint", "node.hostname!=n1", "--stop-signal", "KILL",
		"--mount", "type=bind,src=/mnt/couchdb,dst=/opt/couchdb/data", dockerImage, "/bin/sh", "-c",
		"cd /opt/couchdb/data; echo begun >> begun; n=0; while :; do echo $n >> rows || exit 1; n=$((n+1)); sleep 0.1; done")
	on, _ := e.settles(time.Minute, "couchdb", 1)
	rows := func() string { return readFile(p.outside(1, "/mnt/couchdb/rows")) }
	more := func(what string, than int) time.Duration {
		return p.within(time.Minute, what, func() error {
			if n := len(rows()); n <= than {
				return fmt.Errorf("%d bytes, %d before", n, than)
			}
			return nil
		})
	}
	more("it writes", 20)
	var at int
	for i, h := range p.Hosts() {
		if h.Name == on[0] {
			at = i + 1
		}
	}
	if err := errors.Join(p.Host(at).Unplug(), p.Host(at).KillAll()); err != nil {
		p.t.Fatal(err)
	}
	before, died := rows(), time.Now()
	now, _ := e.settles(2*time.Minute, "couchdb", 1, on...)
	more("it writes where it is now", len(before))
	p.t.Logf("%s died; on %s it goes on after %.1f s", on[0], now[0], time.Since(died).Seconds())
	if after := rows(); !strings.HasPrefix(after, before) || strings.Count(after, "0\n") < 2 {
		p.t.Errorf("it had written\n%s\nand now there is\n%s", before, after)
	}
	if got := readFile(p.outside(1, "/mnt/couchdb/begun")); got != "begun\nbegun\n" {
		p.t.Errorf("it began %q", got)
	}
	// The machine comes back.
	if err := p.Host(at).Plug(); err != nil {
		p.t.Fatal(err)
	}
	p.run(at, "umount", "/mnt")
	e.boot(at)
	p.run(at, "mount", "-a")
	e.docker(1, "service", "rm", "couchdb")
	p.within(time.Minute, "all bricks are in sync again", func() error {
		var all []status
		r, err := p.try(1, "volume", "status", "staging-gfs", "--json")
		if err == nil {
			err = json.Unmarshal([]byte(r.Stdout), &all)
		}
		if err == nil && (len(all) != 1 || len(all[0].Sets) != 1 || all[0].Sets[0].InSync != len(p.Hosts())) {
			err = fmt.Errorf("%+v", all)
		}
		return err
	})
	p.within(20*time.Second, fmt.Sprintf("n%d has all rows", at), func() error {
		if got, err := os.ReadFile(p.outside(at, "/mnt/couchdb/rows")); err != nil || string(got) != rows() {
			return fmt.Errorf("%d bytes, %v; n1 has %d", len(got), err, len(rows()))
		}
		return nil
	})
}
