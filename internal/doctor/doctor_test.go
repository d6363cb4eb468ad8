package doctor

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mortar/internal/api"
	"mortar/internal/fstab"
	"mortar/internal/mountinfo"
)

// fine are the facts of a machine that nothing is wrong with.
func fine() *Facts {
	v := api.Version{Version: "v1.0.0", Protocol: 4}
	return &Facts{
		Name:   "gfs1",
		Daemon: Daemon{Socket: "/run/mortar/mortar.sock", Version: &v, Program: v, Port: 24007},
		Pool: &api.Pool{ID: "p", Self: "1", Peers: []api.Peer{
			{ID: "1", Name: "gfs1", Self: true, Connected: true}, {ID: "2", Name: "gfs2", Connected: true}, {ID: "3", Name: "gfs3", Connected: true},
		}},
		Exam: &api.Examination{Self: "gfs1", Peers: []api.PeerExamination{
			{Name: "gfs1", Protocol: 4, Reach: []api.Reach{{Peer: "gfs2", Addr: "10.0.0.2:24007"}}},
			{Name: "gfs2", Protocol: 4, Ahead: 900, Reach: []api.Reach{{Peer: "gfs1", Addr: "10.0.0.1:24007"}}},
		}},
		Bricks: []Brick{{Volume: "wp", Path: "/bricks/wp", FSType: "xfs", Device: "/dev/sdb1", Mount: "/bricks", Options: []string{"rw"},
			Total: 100 << 30, Free: 50 << 30, Inodes: 1000, InodesFree: 900,
			Flush: Flush{Writes: 20, Median: 200 * time.Microsecond, Slowest: 3 * time.Millisecond}}},
		Kernel:  Kernel{Release: "6.18.1-amd64", FUSE: true},
		Memory:  Memory{Total: 2 << 30, Available: 1 << 30},
		Clock:   Clock{Known: true, Synced: true},
		Names:   []Name{{Host: "gfs2", From: "/etc/fstab", Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.2")}}},
		Docker:  Docker{Installed: true, Plugin: "/run/docker/plugins/mortar.sock", Ordered: true},
		Fstab:   fstab.Parse(fstab.Line("gfs1:/wp", "/var/www", nil) + "UUID=1 / ext4 defaults 0 1\n"),
		Mounts:  map[string]string{"/": "ext4", "/var/www": "autofs"},
		Helpers: Helpers{Mortar: true, Gluster: "/usr/sbin/mount.glusterfs"},
		Systemd: true,
	}
}

func TestExamine(t *testing.T) {
	peer := func(f *Facts, i int) *api.PeerExamination { return &f.Exam.Peers[i] }
	for _, c := range []struct {
		name   string
		change func(f *Facts)
		want   []string // the beginnings of the findings that are neither ok nor note; in order
	}{
		{"fine", func(f *Facts) {}, nil},
		{"nothing known", func(f *Facts) { *f = Facts{Helpers: Helpers{Mortar: true}} }, nil},

		{"no daemon", func(f *Facts) {
			*f = *fine()
			f.Daemon.Error = "connection refused"
			f.Pool, f.Exam, f.Bricks = nil, nil, nil
		},
			[]string{"bad daemon no daemon answers at /run/mortar/mortar.sock: connection refused"}},
		{"glusterd", func(f *Facts) {
			f.Daemon.Error, f.Daemon.PortUsed, f.Daemon.Glusterd = "x", true, true
		}, []string{"bad daemon no daemon", "bad daemon GlusterFS's daemon has TCP port 24007"}},
		{"port", func(f *Facts) { f.Daemon.Error, f.Daemon.PortUsed = "x", true },
			[]string{"bad daemon no daemon", "bad daemon another program listens on TCP port 24007"}},
		{"not allowed", func(f *Facts) { f.Daemon.Error, f.Daemon.Denied, f.Pool, f.Exam = "permission denied", true, nil, nil },
			[]string{"bad daemon the daemon at /run/mortar/mortar.sock may not be asked: permission denied"}},
		{"upgraded", func(f *Facts) { f.Daemon.Program.Version = "v1.0.1" }, []string{"warn daemon the daemon is version v1.0.0 (protocol 4), this program is v1.0.1"}},
		{"new protocol", func(f *Facts) {
			f.Daemon.Program = api.Version{Version: "v2", Protocol: 5}
			f.Exam.Peers = nil
		}, []string{"bad daemon the daemon is version v1.0.0 (protocol 4), this program is v2 (protocol 5)"}},

		{"no pool", func(f *Facts) { f.Pool = &api.Pool{} }, nil},
		{"disconnected", func(f *Facts) { f.Pool.Peers[1].Connected = false }, []string{"bad pool gfs2 is not connected"}},
		{"why", func(f *Facts) { f.Pool.Peers[1].Connected, f.Pool.Peers[1].Problem = false, "refused" }, []string{"bad pool gfs2 is not connected: refused"}},
		{"no quorum", func(f *Facts) { f.Pool.Problem = "no quorum" }, []string{"bad pool no quorum"}},

		{"firewall", func(f *Facts) { peer(f, 1).Reach[0].Problem = "no answer" },
			[]string{"bad ports gfs2 does not reach gfs1 at 10.0.0.1:24007: no answer"}},
		{"another address is enough", func(f *Facts) {
			peer(f, 1).Reach = append(peer(f, 1).Reach, api.Reach{Peer: "gfs1", Addr: "[fe80::1]:24007", Problem: "no way"})
		}, nil},
		{"other version", func(f *Facts) { peer(f, 1).Protocol = 3 }, []string{"bad ports gfs2 speaks protocol 3, this machine 4"}},

		{"clock", func(f *Facts) { peer(f, 1).Ahead = -1500 }, []string{"warn clock the clock of gfs2 is 1.5s behind this machine's"}},
		{"slow answer", func(f *Facts) { peer(f, 1).Ahead, peer(f, 1).Trip = -1500, 600 }, nil},
		{"far off", func(f *Facts) { peer(f, 1).Ahead = 61_000 }, []string{"bad clock the clock of gfs2 is 1m1s ahead of this machine's"}},
		{"not asked", func(f *Facts) { peer(f, 1).Ahead, peer(f, 1).Problem = 61_000, "not connected" }, nil},
		{"free running", func(f *Facts) { f.Clock.Synced = false }, []string{"warn clock nothing keeps"}},

		{"brick gone", func(f *Facts) { f.Bricks[0].Error = "no such file" }, []string{"bad disk brick /bricks/wp of volume wp: no such file"}},
		{"tmpfs", func(f *Facts) { f.Bricks[0].FSType = "tmpfs" }, []string{"bad disk brick /bricks/wp of volume wp is in memory"}},
		{"container", func(f *Facts) { f.Bricks[0].FSType = "overlay" }, []string{"bad disk brick /bricks/wp of volume wp is on overlay"}},
		{"nfs", func(f *Facts) { f.Bricks[0].FSType = "nfs4" }, []string{"warn disk brick /bricks/wp of volume wp is on nfs4"}},
		{"barrier", func(f *Facts) { f.Bricks[0].Options = []string{"rw", "nobarrier"} }, []string{"bad disk the disk of brick /bricks/wp of volume wp is mounted with nobarrier"}},
		{"read-only", func(f *Facts) { f.Bricks[0].Options = []string{"ro"} }, []string{"bad disk the disk of brick /bricks/wp of volume wp is mounted read-only"}},
		{"root", func(f *Facts) { f.Bricks[0].Mount = "/" }, []string{"warn disk brick /bricks/wp of volume wp is on the root"}},
		{"filling", func(f *Facts) { f.Bricks[0].Free = 9 << 30 }, []string{"warn disk brick /bricks/wp of volume wp has 9.0 GB of 100.0 GB left"}},
		{"full", func(f *Facts) { f.Bricks[0].Free = 1 << 30 }, []string{"bad disk brick /bricks/wp of volume wp has 1.0 GB"}},
		{"inodes", func(f *Facts) { f.Bricks[0].InodesFree = 3 }, []string{"bad disk the disk of brick /bricks/wp of volume wp has 3 of 1000 inodes left"}},
		{"btrfs counts no inodes", func(f *Facts) { f.Bricks[0].Inodes, f.Bricks[0].InodesFree = 0, 0 }, nil},
		{"slow", func(f *Facts) {
			f.Bricks[0].Flush.Median, f.Bricks[0].Flush.Slowest = 30*time.Millisecond, 65*time.Millisecond
		},
			[]string{"warn disk to flush a small write to the disk of brick /bricks/wp of volume wp takes 30ms, and took 65ms at most (20 tried)"}},
		{"a disk that turns", func(f *Facts) { f.Bricks[0].Flush.Median = 10 * time.Millisecond }, nil},
		{"slow at times", func(f *Facts) { f.Bricks[0].Flush.Slowest = 1200 * time.Millisecond },
			[]string{"warn disk to flush a small write to the disk of brick /bricks/wp of volume wp takes 200µs, and took 1.2s at most"}},
		{"hangs", func(f *Facts) { f.Bricks[0].Flush = Flush{Hangs: 5 * time.Second} },
			[]string{"bad disk the disk of brick /bricks/wp of volume wp hangs: a write of 4096 bytes was not safe after 5s"}},
		{"not tried", func(f *Facts) { f.Bricks[0].Flush = Flush{} }, nil},
		{"one disk", func(f *Facts) { f.Bricks = append(f.Bricks, f.Bricks[0]); f.Bricks[1].Path = "/bricks/b" },
			[]string{"warn disk the bricks /bricks/wp and /bricks/b of volume wp are on one disk"}},
		{"one disk, two volumes", func(f *Facts) { f.Bricks = append(f.Bricks, f.Bricks[0]); f.Bricks[1].Volume = "other" }, nil},

		{"old kernel", func(f *Facts) { f.Kernel.Release = "5.10.0-28-amd64" }, []string{"bad kernel Linux 5.10.0-28-amd64 is older than 5.15"}},
		{"Ubuntu's kernel", func(f *Facts) { f.Kernel.Release = "5.15.0-91-generic" }, nil},
		{"guest", func(f *Facts) { f.Kernel.NoHaltPoll = true }, nil},
		{"no device", func(f *Facts) { f.Kernel.FUSEError = "no such file or directory" }, []string{"bad kernel /dev/fuse cannot be opened"}},
		{"no FUSE", func(f *Facts) { f.Kernel = Kernel{Release: "6.18", FUSEError: "no such device"} }, []string{"bad kernel there is no FUSE"}},
		{"no helper", func(f *Facts) { f.Helpers.Mortar = false }, []string{"warn kernel there is no /sbin/mount.mortar"}},

		{"short of memory", func(f *Facts) { f.Memory.Available = 50 << 20 }, []string{"warn memory 2.0 GB of memory, 50.0 MB available"}},
		{"little memory", func(f *Facts) { f.Memory = Memory{Total: 256 << 20, Available: 200 << 20} }, []string{"warn memory 256.0 MB"}},

		{"unknown name", func(f *Facts) { f.Names[0].Error = "no such host" }, []string{"bad dns gfs2 (in /etc/fstab) cannot be resolved: no such host"}},
		{"Debian's line", func(f *Facts) { f.Names[0].Addrs = []netip.Addr{netip.MustParseAddr("127.0.1.1")} }, []string{"bad dns gfs2 (in /etc/fstab) is 127.0.1.1 here"}},
		{"Debian's line for itself", func(f *Facts) {
			f.Names[0].Addrs, f.Names[0].Self = []netip.Addr{netip.MustParseAddr("127.0.1.1")}, true
		}, nil},
		{"slow DNS", func(f *Facts) { f.Names[0].Took = 5 * time.Second }, []string{"warn dns looking up gfs2 (in /etc/fstab) took 5s"}},

		{"no driver", func(f *Facts) { f.Docker.Error = "connection refused" }, []string{"bad docker Docker finds no volume driver"}},
		{"driver off", func(f *Facts) { f.Docker.Plugin, f.Docker.Error = "", "" }, nil},
		{"no Docker", func(f *Facts) { f.Docker = Docker{} }, nil},
		{"Docker first", func(f *Facts) { f.Docker.Ordered = false }, []string{"warn docker nothing makes Docker start after"}},
		{"no systemd", func(f *Facts) { f.Docker.Ordered, f.Systemd = false, false }, nil},

		{"bare line", func(f *Facts) {
			f.Fstab = fstab.Parse("gfs1:/wp /var/www mortar\n")
			f.Mounts["/var/www"] = "fuse.mortar"
		}, []string{"warn fstab line 1, gfs1:/wp at /var/www: without _netdev"}},
		{"not mounted", func(f *Facts) {
			f.Fstab = fstab.Parse("gfs1:/wp /srv mortar defaults,_netdev 0 0\n")
		}, []string{"warn fstab line 1, gfs1:/wp at /srv: it is not mounted now"}},
		{"something else", func(f *Facts) {
			f.Fstab = fstab.Parse("gfs1:/wp /srv mortar defaults,_netdev 0 0\n")
			f.Mounts["/srv"] = "fuse.glusterfs"
		}, []string{"bad fstab line 1, gfs1:/wp at /srv: something else (fuse.glusterfs)"}},
		{"requires", func(f *Facts) {
			f.Fstab[0].Options = append(f.Fstab[0].Options, "x-systemd.requires=mortar.service")
		}, []string{"bad fstab line 1, gfs1:/wp at /var/www: x-systemd.requires unmounts it"}},
		{"before Docker", func(f *Facts) {
			f.Docker.Ordered = false
			f.Fstab = fstab.Parse("gfs1:/wp /srv mortar _netdev 0 0\n")
			f.Mounts["/srv"] = "fuse.mortar"
		}, []string{"warn docker nothing", "warn fstab line 1, gfs1:/wp at /srv: Docker may start before"}},
		{"GlusterFS's line", func(f *Facts) {
			f.Fstab = fstab.Parse("gfs1:/wp /srv glusterfs defaults 0 0\n")
		}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := fine()
			c.change(f)
			var got []string
			for _, x := range Examine(f) {
				if x.What == "" {
					t.Errorf("%+v says nothing", x)
				}
				if x.Level == OK || x.Level == Note {
					continue
				}
				got = append(got, string(x.Level)+" "+x.Check+" "+x.What)
				if x.Mend == "" && x.Check != "pool" {
					t.Errorf("%s: nothing says how to mend it", x.What)
				}
			}
			ok := len(got) == len(c.want)
			for i := 0; ok && i < len(got); i++ {
				ok = strings.HasPrefix(got[i], c.want[i])
			}
			if !ok {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
		})
	}
}

func TestParse(t *testing.T) {
	if got := parseMemory("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:   500 kB\nx"); got != (Memory{1000 << 10, 500 << 10}) {
		t.Errorf("memory %+v", got)
	}
	for s, want := range map[string]bool{"[Unit]\nAfter=mortar.service remote-fs.target\n": true, "After=network.target": false, "# After=remote-fs.target": false} {
		if ordered(s) != want {
			t.Errorf("ordered(%q) = %v", s, !want)
		}
	}
	for s, want := range map[string][2]int{"6.18.44-fc": {6, 18}, "5.15-rc1": {5, 15}, "6.1.0": {6, 1}, "7.0+": {7, 0}} {
		if major, minor, ok := release(s); !ok || major != want[0] || minor != want[1] {
			t.Errorf("release %s: %d.%d, %v", s, major, minor, ok)
		}
	}
	if _, _, ok := release("strange"); ok {
		t.Error("a strange release is a number")
	}
}

// TestGather: without a daemon there is still what the machine tells.
func TestGather(t *testing.T) {
	dir := t.TempDir()
	table := filepath.Join(dir, "fstab")
	if err := os.WriteFile(table, []byte("nowhere.invalid:/v /mnt mortar _netdev 0 0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	port := ln.Addr().(*net.TCPAddr).Port
	f := Gather(t.Context(), Config{Socket: filepath.Join(dir, "none"), Port: port, Fstab: table, Program: api.Version{Version: "v1"}})
	if f.Daemon.Error == "" || !f.Daemon.PortUsed || f.Pool != nil || f.Exam != nil {
		t.Errorf("the daemon: %+v", f.Daemon)
	}
	if _, _, ok := release(f.Kernel.Release); !ok || f.Memory.Total == 0 || f.Memory.Available == 0 || f.Mounts["/"] == "" {
		t.Errorf("the machine: %+v, %+v, root %q", f.Kernel, f.Memory, f.Mounts["/"])
	}
	if len(f.Fstab) != 1 || len(f.Names) != 1 || f.Names[0].Error == "" || f.Names[0].From != table {
		t.Errorf("fstab %+v, names %+v", f.Fstab, f.Names)
	}
	// A brick is found with its disk, or with what is wrong with it.
	mounts := []mountinfo.Mount{{Device: "0:0", Dir: "/", Type: "ext4", Source: "/dev/root", Options: []string{"rw"}}}
	brick := Brick{Path: dir}
	if gatherBrick(&brick, mounts); brick.Error == "" {
		t.Error("an empty directory is a brick")
	}
	if err := os.MkdirAll(filepath.Join(dir, ".mortar"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, ".mortar/brick.json"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	brick = Brick{Path: dir}
	if gatherBrick(&brick, mounts); brick.Error != "" || brick.Total == 0 || brick.FSType != "ext4" || brick.Mount != "/" {
		t.Errorf("the brick: %+v", brick)
	}
}
