// Package doctor says what is wrong with a machine that mortar runs on, or is to run
// on, and how to mend it. Examine is a function of facts, which Gather collects.
package doctor

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"mortar/internal/api"
	"mortar/internal/fstab"
)

// Level is how bad a finding is.
type Level string

const (
	OK   Level = "ok"
	Note Level = "note" // good to know
	Warn Level = "warn" // will hurt some day, or in some circumstances
	Bad  Level = "bad"  // does not work
)

// Finding is one answer of the examination.
type Finding struct {
	Check string `json:"check"` // what was looked at, one word
	Level Level  `json:"level"`
	What  string `json:"what"`
	Mend  string `json:"mend,omitempty"` // what to do about it
}

// Facts are what is known of the machine. What could not be found out is zero, and
// nothing is concluded from it.
type Facts struct {
	Name    string // of the machine
	Daemon  Daemon
	Pool    *api.Pool        // nil: the daemon does not answer
	Exam    *api.Examination // likewise
	Bricks  []Brick          // of this machine
	Kernel  Kernel
	Memory  Memory
	Clock   Clock
	Names   []Name // host names that the configuration uses
	Docker  Docker
	Fstab   []fstab.Entry
	Mounts  map[string]string // types of what is mounted, by mount point
	Helpers Helpers
	Systemd bool
}

// Daemon is the daemon of this machine, or what is in its place.
type Daemon struct {
	Socket   string
	Error    string       // why it does not answer; empty: it does
	Denied   bool         // because whoever asks may not
	Version  *api.Version // of the one that runs
	Program  api.Version  // of the program that asks
	Port     int          // that it listens on, or would
	PortUsed bool         // somebody listens there; looked at only if the daemon does not answer
	Glusterd bool         // GlusterFS's daemon runs
}

// Brick is a brick of this machine and the file system that it is on.
type Brick struct {
	Volume, Path          string
	Error                 string // why its directory could not be looked at
	FSType, Device, Mount string
	Options               []string
	Rotational            bool
	Total, Free           uint64 // bytes
	Inodes, InodesFree    uint64
	Flush                 Flush
}

// Kernel is the kernel and its FUSE.
type Kernel struct {
	Release   string
	FUSE      bool   // it has the file system
	FUSEError string // of opening /dev/fuse
	// NoHaltPoll: a guest whose governor for idle processors is the one that polls before it halts, and polls for no time at all.
	NoHaltPoll bool
}

// Memory is in bytes.
type Memory struct{ Total, Available uint64 }

// Clock is this machine's.
type Clock struct {
	Known  bool
	Synced bool // something keeps it right, as far as the kernel knows
}

// Name is a host name and what became of looking it up.
type Name struct {
	Host  string
	From  string // what has it: a file, the pool
	Self  bool   // it is this machine's
	Addrs []netip.Addr
	Error string
	Took  time.Duration
}

// Docker is the engine of this machine and the driver's socket.
type Docker struct {
	Installed bool
	Plugin    string // path of the socket; empty: there is to be none
	Error     string // why the driver does not answer there
	Ordered   bool   // a unit file has the engine start after network file systems
}

// Helpers are what mount(8) calls.
type Helpers struct {
	Mortar  bool
	Gluster string // what mount.glusterfs leads to; empty: there is none
}

// Examine draws the conclusions, the worst of each check first.
func Examine(f *Facts) []Finding {
	var all []Finding
	for _, check := range []struct {
		name string
		run  func(*Facts, say)
	}{
		{"daemon", daemonCheck},
		{"pool", poolCheck},
		{"ports", portsCheck},
		{"clock", clockCheck},
		{"disk", diskCheck},
		{"kernel", kernelCheck},
		{"memory", memoryCheck},
		{"dns", namesCheck},
		{"docker", dockerCheck},
		{"fstab", fstabCheck},
	} {
		var found []Finding
		check.run(f, func(l Level, what, mend string) {
			found = append(found, Finding{Check: check.name, Level: l, What: what, Mend: mend})
		})
		rank := map[Level]int{Bad: 0, Warn: 1, Note: 2, OK: 3}
		slices.SortStableFunc(found, func(a, b Finding) int { return cmp.Compare(rank[a.Level], rank[b.Level]) })
		all = append(all, found...)
	}
	return all
}

type say = func(Level, string, string)

func daemonCheck(f *Facts, say say) {
	d := &f.Daemon
	switch {
	case d.Error == "":
		say(OK, fmt.Sprintf("it answers at %s", d.Socket), "")
		if v := d.Version; v != nil && v.Version != d.Program.Version {
			level := Warn
			if v.Protocol != d.Program.Protocol {
				level = Bad
			}
			say(level, fmt.Sprintf("the daemon is version %s (protocol %d), this program is %s (protocol %d)", v.Version, v.Protocol, d.Program.Version, d.Program.Protocol),
				"restart the daemon: systemctl restart mortar; mounts go on meanwhile if the protocol is the same")
		}
	case d.Denied:
		say(Bad, fmt.Sprintf("the daemon at %s may not be asked: %s", d.Socket, d.Error), "ask as root, or as a member of the group mortar")
	default:
		say(Bad, fmt.Sprintf("no daemon answers at %s: %s", d.Socket, d.Error), "start it: systemctl start mortar, or mortar server; journalctl -u mortar says why it stopped")
		switch {
		case d.PortUsed && d.Glusterd:
			say(Bad, fmt.Sprintf("GlusterFS's daemon has TCP port %d, which mortar needs", d.Port), "stop it (systemctl disable --now glusterd), or give mortar another port while both are in use: listen in /etc/mortar/mortar.toml")
		case d.PortUsed:
			say(Bad, fmt.Sprintf("another program listens on TCP port %d, which mortar needs", d.Port), fmt.Sprintf("\"ss -ltnp sport = :%d\" shows which; stop it, or set listen in /etc/mortar/mortar.toml", d.Port))
		}
	}
}

func poolCheck(f *Facts, say say) {
	p := f.Pool
	if p == nil {
		return
	}
	if p.ID == "" {
		say(Note, "this machine is in no pool yet", "mortar peer invite on a machine of the pool, and here what it prints; or make a volume, which makes a pool")
		return
	}
	if p.Problem != "" {
		say(Bad, p.Problem, "")
	}
	up := 0
	for _, peer := range p.Peers {
		switch {
		case peer.Connected:
			up++
		case peer.Problem != "":
			say(Bad, fmt.Sprintf("%s is not connected: %s", peer.Name, peer.Problem), "")
		default:
			say(Bad, fmt.Sprintf("%s is not connected", peer.Name), "is it up, and does mortar run there? mortar doctor on that machine tells more")
		}
	}
	voting := slices.DeleteFunc(slices.Clone(p.Peers), func(p api.Peer) bool { return p.Client })
	if len(voting) == 2 && !slices.ContainsFunc(voting, func(p api.Peer) bool { return p.Witness }) {
		say(Note, "there are two machines: if the first is lost, the other only reads", "a third that only votes lets either be lost: mortar server --witness, on a machine of any size")
	}
	say(OK, fmt.Sprintf("%d of %d machines are connected", up, len(p.Peers)), "")
}

func portsCheck(f *Facts, say say) {
	if f.Exam == nil {
		return
	}
	tried := 0
	for _, p := range f.Exam.Peers {
		// A peer is reached if one of its addresses is.
		reached := make(map[string]bool)
		for _, r := range p.Reach {
			reached[r.Peer] = reached[r.Peer] || r.Problem == ""
		}
		for _, r := range p.Reach {
			tried++
			switch {
			case r.Problem == "":
			case reached[r.Peer]:
				say(Note, fmt.Sprintf("%s reaches %s, but not at %s: %s", p.Name, r.Peer, r.Addr, r.Problem), "")
			default:
				_, port, _ := net.SplitHostPort(r.Addr)
				say(Bad, fmt.Sprintf("%s does not reach %s at %s: %s", p.Name, r.Peer, r.Addr, r.Problem),
					fmt.Sprintf("let TCP port %s of %s through to %s; every machine has to reach every other", cmp.Or(port, strconv.Itoa(api.DefaultPort)), r.Peer, p.Name))
			}
		}
		if p.Protocol != 0 && p.Protocol != f.Daemon.Program.Protocol && f.Daemon.Program.Protocol != 0 {
			say(Bad, fmt.Sprintf("%s speaks protocol %d, this machine %d", p.Name, p.Protocol, f.Daemon.Program.Protocol), "install the same version on all machines")
		}
	}
	if tried > 0 {
		say(OK, fmt.Sprintf("%d connections between the machines were tried, in both directions", tried), "")
	}
}

// Clocks this far from each other matter: modification times are those of the
// machine that has written, and tools such as make and rsync compare them.
const (
	clockWarn = time.Second
	clockBad  = time.Minute
)

func clockCheck(f *Facts, say say) {
	const mend = "have one thing keep it right on every machine: apt install chrony, or timedatectl set-ntp true"
	if f.Clock.Known && !f.Clock.Synced {
		say(Warn, "nothing keeps this machine's clock right, as far as its kernel knows", mend)
	} else if f.Clock.Known {
		say(OK, "this machine's clock is kept right", "")
	}
	if f.Exam == nil {
		return
	}
	for _, p := range f.Exam.Peers {
		if p.Problem != "" || p.Name == f.Exam.Self {
			continue
		}
		off := time.Duration(p.Ahead) * time.Millisecond
		side := "ahead of"
		if off < 0 {
			off, side = -off, "behind"
		}
		// What the question took is not held against the clock.
		sure := off - time.Duration(p.Trip)*time.Millisecond
		what := fmt.Sprintf("the clock of %s is %v %s this machine's", p.Name, off.Round(time.Millisecond), side)
		switch {
		case sure >= clockBad:
			say(Bad, what, mend)
		case sure >= clockWarn:
			say(Warn, what, mend)
		}
	}
}

// Shares of a disk that are left.
const (
	freeWarn = 0.10
	freeBad  = 0.02
)

// fileSystems are those that bricks are known to do well on.
var fileSystems = []string{"xfs", "ext4", "btrfs", "ext3", "f2fs", "zfs"}

func diskCheck(f *Facts, say say) {
	for _, b := range f.Bricks {
		name := fmt.Sprintf("brick %s of volume %s", b.Path, b.Volume)
		if b.Error != "" {
			say(Bad, fmt.Sprintf("%s: %s", name, b.Error), "is its disk mounted? An empty directory in its place is never used")
			continue
		}
		has := func(words ...string) string {
			for _, w := range words {
				if slices.Contains(b.Options, w) {
					return w
				}
			}
			return ""
		}
		switch {
		case b.FSType == "tmpfs" || b.FSType == "ramfs":
			say(Bad, fmt.Sprintf("%s is in memory (%s)", name, b.FSType), "move it to a disk: what was synced is gone with the power")
		case b.FSType == "overlay":
			say(Bad, fmt.Sprintf("%s is on overlay, a container's own layer", name), "put it on a volume or a directory of the host: it goes with the container")
		case strings.HasPrefix(b.FSType, "nfs") || strings.HasPrefix(b.FSType, "fuse") || b.FSType == "cifs":
			say(Warn, fmt.Sprintf("%s is on %s", name, b.FSType), "a brick belongs on a disk of its machine: else one failure takes several replicas, and an fsync may be none")
		case b.FSType != "" && !slices.Contains(fileSystems, b.FSType):
			say(Note, fmt.Sprintf("%s is on %s, with which mortar has not been tried", name, b.FSType), "")
		}
		if w := has("nobarrier", "barrier=0"); w != "" {
			say(Bad, fmt.Sprintf("the disk of %s is mounted with %s: what was synced can be lost with the power", name, w), fmt.Sprintf("mount %s without it", b.Mount))
		}
		if has("ro") != "" {
			say(Bad, fmt.Sprintf("the disk of %s is mounted read-only", name), fmt.Sprintf("dmesg says why, if it was the kernel; mount -o remount,rw %s once that is mended", b.Mount))
		}
		if b.Mount == "/" {
			say(Warn, name+" is on the root file system", "what fills one of them fills both; a file system of its own is better")
		}
		if b.Total > 0 {
			left := float64(b.Free) / float64(b.Total)
			what := fmt.Sprintf("%s has %s of %s left", name, size(b.Free), size(b.Total))
			switch {
			case left < freeBad:
				say(Bad, what, "make room: a brick that is full leaves its set")
			case left < freeWarn:
				say(Warn, what, "make room before it is full")
			}
		}
		if b.Inodes > 0 && float64(b.InodesFree)/float64(b.Inodes) < freeBad {
			say(Bad, fmt.Sprintf("the disk of %s has %d of %d inodes left", name, b.InodesFree, b.Inodes), "remove small files from it, or make the file system anew with more inodes")
		}
		if b.Rotational {
			say(Note, fmt.Sprintf("the kernel takes the disk of %s for one that turns (%s)", name, b.Device), "if it is, every fsync costs a turn, about 10 ms, and databases want another; virtual disks often say so of themselves, and are not")
		}
		flushCheck(&b, name, say)
		say(OK, fmt.Sprintf("%s is on %s, mounted at %s", name, b.FSType, b.Mount), "")
	}
	// Two bricks of one volume on one disk are lost together.
	type place struct{ volume, device string }
	seen := make(map[place]string)
	for _, b := range f.Bricks {
		at := place{b.Volume, b.Device}
		if other := seen[at]; other != "" && b.Device != "" {
			say(Warn, fmt.Sprintf("the bricks %s and %s of volume %s are on one disk (%s)", other, b.Path, b.Volume, b.Device), "they are lost together; put one of them elsewhere")
		}
		seen[at] = b.Path
	}
}

// A disk that turns takes 10 ms; a set leaves a brick behind that holds a sync up for a second alone.
const (
	flushNote = 5 * time.Millisecond
	flushWarn = 20 * time.Millisecond
	flushLate = time.Second
)

func flushCheck(b *Brick, name string, say say) {
	const mend = "iostat -x 1 shows whether others keep it busy, dmesg whether it fails; give the brick another disk if it is neither: every fsync of the volume waits for the brick, until the set leaves it out"
	round := func(d time.Duration) time.Duration { return d.Round(max(d/100, time.Microsecond)) }
	f := &b.Flush
	if f.Hangs > 0 {
		say(Bad, fmt.Sprintf("the disk of %s hangs: a write of %d bytes was not safe after %v", name, flushBlock, f.Hangs), mend)
		return
	}
	if f.Writes == 0 {
		return
	}
	what := fmt.Sprintf("to flush a small write to the disk of %s takes %v, and took %v at most (%d tried)", name, round(f.Median), round(f.Slowest), f.Writes)
	switch {
	case f.Median >= flushWarn || f.Slowest >= flushLate:
		say(Warn, what, mend)
	case f.Median >= flushNote:
		say(Note, what, "every fsync of the volume waits for it; databases want a disk that takes less than 1 ms")
	default:
		say(OK, what, "")
	}
}

// kernels are what newer ones add; the oldest first.
var kernels = []struct{ major, minor int }{{5, 15}, {6, 6}, {6, 13}, {6, 16}}

func kernelCheck(f *Facts, say say) {
	k := &f.Kernel
	if major, minor, ok := release(k.Release); ok {
		at := 0
		for at < len(kernels) && (major > kernels[at].major || major == kernels[at].major && minor >= kernels[at].minor) {
			at++
		}
		switch {
		case at == 0:
			say(Bad, fmt.Sprintf("Linux %s is older than 5.15, the oldest with which mortar works", k.Release), "install a newer kernel")
		case at < len(kernels):
			say(OK, fmt.Sprintf("Linux %s; from %d.%d on there is something more for mounts (doc/mount.md, Kernels)", k.Release, kernels[at].major, kernels[at].minor), "")
		default:
			say(OK, "Linux "+k.Release+" has all that mounts can use", "")
		}
	}
	switch {
	case k.FUSEError != "" && !k.FUSE:
		say(Bad, fmt.Sprintf("there is no FUSE, so nothing can be mounted here: %s", k.FUSEError), "modprobe fuse; in a container, give it the device: --device /dev/fuse --cap-add SYS_ADMIN")
	case k.FUSEError != "":
		say(Bad, fmt.Sprintf("/dev/fuse cannot be opened, so nothing can be mounted here: %s", k.FUSEError), "as root; in a container, give it the device: --device /dev/fuse --cap-add SYS_ADMIN")
	}
	if k.NoHaltPoll {
		say(Note, "this virtual machine halts its processors at once when they are idle (guest_halt_poll_ns is 0), so each wait for another machine goes through the hypervisor twice",
			"echo 200000 > /sys/module/haltpoll/parameters/guest_halt_poll_ns, the kernel's own default: waits get shorter, for some processor time while idle (docs.kernel.org/virt/guest-halt-polling.html)")
	}
	if !f.Helpers.Mortar {
		say(Warn, "there is no /sbin/mount.mortar, so mount(8) and /etc/fstab do not know the type mortar", "ln -s \"$(command -v mortar)\" /sbin/mount.mortar; the packages have it")
	}
}

// release takes major and minor from what uname says.
func release(s string) (major, minor int, ok bool) {
	first, rest, _ := strings.Cut(s, ".")
	second := rest
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		second = rest[:i]
	}
	major, err1 := strconv.Atoi(first)
	minor, err2 := strconv.Atoi(second)
	return major, minor, err1 == nil && err2 == nil
}

// A daemon, a mount, and room for the kernel's own.
const (
	memoryTotal = 450 << 20
	memoryFree  = 100 << 20
)

func memoryCheck(f *Facts, say say) {
	m := f.Memory
	if m.Total == 0 {
		return
	}
	what := fmt.Sprintf("%s of memory, %s available", size(m.Total), size(m.Available))
	switch {
	case m.Available < memoryFree:
		say(Warn, what, "a daemon and a mount want 130 MB together under load: stop something, add swap, or set memory-limit in /etc/mortar/mortar.toml")
	case m.Total < memoryTotal:
		say(Warn, what, "little for bricks; as a witness (mortar server --witness) the machine does well")
	default:
		say(OK, what, "")
	}
}

func namesCheck(f *Facts, say say) {
	good := 0
	for _, n := range f.Names {
		loop := slices.IndexFunc(n.Addrs, func(a netip.Addr) bool { return a.IsLoopback() })
		switch {
		case n.Error != "":
			say(Bad, fmt.Sprintf("%s (in %s) cannot be resolved: %s", n.Host, n.From, n.Error), "add it to DNS or /etc/hosts, or use an address")
		case loop >= 0 && !n.Self:
			say(Bad, fmt.Sprintf("%s (in %s) is %s here, which is this machine itself", n.Host, n.From, n.Addrs[loop]), "correct its line in /etc/hosts")
		case n.Took > time.Second:
			say(Warn, fmt.Sprintf("looking up %s (in %s) took %v", n.Host, n.From, n.Took.Round(10*time.Millisecond)), "a server in /etc/resolv.conf does not answer; mounts wait for it too")
		default:
			good++
		}
	}
	if good > 0 {
		say(OK, fmt.Sprintf("%d of %d host names that the configuration uses are resolved", good, len(f.Names)), "")
	}
}

func dockerCheck(f *Facts, say say) {
	d := &f.Docker
	if !d.Installed {
		return
	}
	if f.Daemon.Error == "" && d.Plugin != "" {
		if d.Error != "" {
			say(Bad, fmt.Sprintf("Docker finds no volume driver at %s: %s", d.Plugin, d.Error), "docker-socket in /etc/mortar/mortar.toml says where it listens; journalctl -u mortar says why it does not")
		} else {
			say(OK, "the volume driver answers at "+d.Plugin, "")
		}
	}
	if f.Systemd && !d.Ordered {
		say(Warn, "nothing makes Docker start after mounts of volumes: at boot a container may see the empty directory below one", "the packages' /usr/lib/systemd/system/docker.service.d/mortar.conf does: [Unit] After=mortar.service remote-fs.target")
	}
}

func fstabCheck(f *Facts, say say) {
	good := 0
	for _, e := range f.Fstab {
		at := fmt.Sprintf("line %d, %s at %s", e.Line, e.Source, e.Dir)
		if e.Type == "glusterfs" || e.Type == "fuse.glusterfs" {
			if filepath.Base(f.Helpers.Gluster) == "mortar" {
				say(Note, at+": type glusterfs is mounted by mortar here, because GlusterFS's own helper is not installed", "type mortar in its place, with the same options, says what it is")
			}
			continue
		}
		if !e.Ours() {
			continue
		}
		fine := true
		complain := func(l Level, what, mend string) {
			fine = false
			say(l, at+": "+what, mend)
		}
		if !e.Has("_netdev") {
			complain(Warn, "without _netdev it is mounted before the network is up", "add _netdev to its options")
		}
		for _, unit := range []string{"mortar.service", "mortar"} {
			if e.Has("x-systemd.requires=" + unit) {
				complain(Bad, "x-systemd.requires unmounts it each time the daemon is restarted", "x-systemd.after=mortar.service in its place")
			}
		}
		if e.Has("noauto") {
			complain(Note, "noauto: it is not mounted at boot", "")
		}
		if f.Docker.Installed && f.Systemd && !f.Docker.Ordered && !e.Has("x-systemd.automount") && !e.Has("x-systemd.before=docker.service") {
			complain(Warn, "Docker may start before it is mounted", "add x-systemd.automount, as mortar mount --enable does")
		}
		if kind, mounted := f.Mounts[e.Dir]; !e.Has("noauto") && !e.Has("x-systemd.automount") {
			switch {
			case !mounted:
				complain(Warn, "it is not mounted now", "mount "+e.Dir+" says why")
			case kind != "fuse.mortar" && kind != "autofs":
				complain(Bad, fmt.Sprintf("something else (%s) is mounted there", kind), "umount "+e.Dir+" && mount "+e.Dir)
			}
		}
		if fine {
			good++
		}
	}
	if good > 0 {
		say(OK, fmt.Sprintf("%d mounts of volumes are as they should be", good), "")
	}
}

// size is for people.
func size(n uint64) string {
	for _, u := range []struct {
		name string
		at   uint64
	}{{"TB", 1 << 40}, {"GB", 1 << 30}, {"MB", 1 << 20}} {
		if n >= u.at {
			return fmt.Sprintf("%.1f %s", float64(n)/float64(u.at), u.name)
		}
	}
	return fmt.Sprintf("%d bytes", n)
}
