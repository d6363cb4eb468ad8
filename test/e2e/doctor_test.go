package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// finding is a line of mortar doctor.
type finding struct{ Check, Level, What, Mend string }

// doctor is what mortar doctor finds on a host, and its exit status.
func (p *pool) doctor(i int) (all []finding, code int, err error) {
	r, err := p.Host(i).Run(p.ctx(patience), mortar, "doctor", "--json")
	if r.Stdout == "" {
		return nil, r.Code, err
	}
	return all, r.Code, json.Unmarshal([]byte(r.Stdout), &all)
}

// TestDoctor: on a machine with which nothing is wrong, doctor finds nothing bad. Then everything is put wrong
// that can be put wrong in a test, as it goes wrong for people, and each is found and named.
func TestDoctor(t *testing.T) {
	p := start(t, setup{hosts: 2, mounts: -1})
	_, err := exec.LookPath("dockerd")
	docker := err == nil
	if !docker {
		t.Log("LEFT OUT: what doctor says of Docker: dockerd is not installed (test/install-packages installs it)")
	}
	p.run(1, "ln", "-s", mortar, "/sbin/mount.mortar")
	p.run(1, "sh", "-c", ": > /etc/fstab")                    // the machine's own says nothing of this one's
	p.within(10*time.Second, "nothing is bad", func() error { // both have to have found each other first
		all, code, err := p.doctor(1)
		for _, f := range all {
			// The file system below the tests is the machine's own, and nobody's fault.
			if f.Level == "bad" && f.Check != "disk" {
				err = fmt.Errorf("%+v", f)
			}
		}
		if !slices.ContainsFunc(all, func(f finding) bool { // whatever this machine's disk is like
			return f.Check == "disk" && (strings.HasPrefix(f.What, "to flush a small write to the disk of brick /bricks/wp of volume wp takes ") || strings.Contains(f.What, " hangs: "))
		}) {
			err = errors.Join(err, fmt.Errorf("nothing is said of how fast the disk flushes: %+v", all))
		}
		if err == nil && len(all) < 8 {
			err = fmt.Errorf("exit status %d, %d findings: %+v", code, len(all), all)
		}
		return err
	})

	p.run(1, "sh", "-ec", `
		# A firewall that lets this machine out and nobody in.
		nft add table inet wall
		nft add chain inet wall in '{ type filter hook input priority 0; }'
		nft add rule inet wall in iifname eth0 tcp dport 24007 'tcp flags & (syn|ack) == syn' reject with tcp reset
		# A brick in memory.
		mkdir -p /mem; mount -t tmpfs tmpfs /mem
		`+mortar+` volume create mem n1:/mem/b
		# Little memory, and a device that may not be opened.
		sed 's/^\(MemAvailable:\).*/\1 51200 kB/' /proc/meminfo > /run/meminfo; mount --bind /run/meminfo /proc/meminfo
		mkdir /run/nodev; mount -t tmpfs -o nodev tmpfs /run/nodev; mknod /run/nodev/fuse c 10 229; mount --bind /run/nodev/fuse /dev/fuse
		rm /sbin/mount.mortar
		# Names that lead nowhere, or back here; an entry of fstab that is too early, and not mounted.
		: > /etc/resolv.conf
		echo '127.0.1.1 gfs9' >> /etc/hosts
		echo 'nowhere.invalid,gfs9:/wp /srv mortar defaults 0 0' >> /etc/fstab
		# systemd, and Docker without the driver's socket.
		mkdir -p /run/systemd/system; rm /run/docker/plugins/mortar.sock`)
	want := map[string]string{ // check and beginning, and the level
		"ports n2 does not reach n1 at " + p.Host(1).Addr + ":24007":            "bad",
		"disk brick /mem/b of volume mem is in memory (tmpfs)":                  "bad",
		"kernel /dev/fuse cannot be opened":                                     "bad",
		"kernel there is no /sbin/mount.mortar":                                 "warn",
		"memory ":                                                               "warn",
		"dns nowhere.invalid (in /etc/fstab) cannot be resolved":                "bad",
		"dns gfs9 (in /etc/fstab) is 127.0.1.1 here":                            "bad",
		"fstab line 1, nowhere.invalid,gfs9:/wp at /srv: without _netdev":       "warn",
		"fstab line 1, nowhere.invalid,gfs9:/wp at /srv: it is not mounted now": "warn",
	}
	if docker {
		want["docker Docker finds no volume driver at /run/docker/plugins/mortar.sock"] = "bad"
	}
	all, code, err := p.doctor(1)
	if err != nil || code != 1 {
		t.Errorf("exit status %d, %v", code, err)
	}
	for begins, level := range want {
		found := false
		for _, f := range all {
			found = found || f.Level == level && strings.HasPrefix(f.Check+" "+f.What, begins) && f.Mend != ""
		}
		if !found {
			t.Errorf("not found: %s %s", level, begins)
		}
	}
	for _, f := range all {
		if f.Check == "ports" && f.Level == "bad" && strings.HasPrefix(f.What, "n1 does not reach") {
			t.Errorf("the way out is open: %s", f.What)
		}
	}
	if t.Failed() {
		t.Logf("%+v", all)
	}
	// A disk that is not mounted, and a machine that is gone.
	p.run(1, "umount", "-l", "/mem")
	p.killDaemon(2)
	p.within(10*time.Second, "they are missed", func() error {
		all, _, err := p.doctor(1)
		var disk, pool bool
		for _, f := range all {
			disk = disk || f.Check == "disk" && f.Level == "bad" && strings.HasPrefix(f.What, "brick /mem/b of volume mem: ")
			pool = pool || f.Check == "pool" && f.Level == "bad" && strings.HasPrefix(f.What, "n2 is not connected")
		}
		if err == nil && !(disk && pool) {
			err = fmt.Errorf("%+v", all)
		}
		return err
	})
	p.run(1, "sh", "-ec", "nft delete table inet wall; umount /dev/fuse; umount /proc/meminfo")
	p.startDaemon(2)
	p.waitDaemon(2)
}
