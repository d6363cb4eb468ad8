package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mortar/internal/api"
	"mortar/internal/fstab"
	"mortar/internal/mountinfo"
)

// Config says where to look.
type Config struct {
	Socket  string // of the daemon
	Port    int    // that it is to listen on
	Plugin  string // where Docker looks for the driver
	Fstab   string
	Program api.Version // what runs this
}

// lookupTimeout bounds the search for one host name.
const lookupTimeout = 5 * time.Second

// Gather finds out what it can. What it cannot is left out, or is a fact itself.
func Gather(ctx context.Context, c Config) *Facts {
	f := &Facts{Daemon: Daemon{Socket: c.Socket, Program: c.Program, Port: c.Port}}
	f.Name, _ = os.Hostname()
	gatherDaemon(ctx, c, f)
	f.Mounts = make(map[string]string)
	mounts, _ := mountinfo.Self()
	for _, m := range mounts {
		f.Mounts[m.Dir] = m.Type
	}
	flushed := make(map[string]Flush) // by mount: bricks that share a disk share its speed
	for i := range f.Bricks {
		b := &f.Bricks[i]
		gatherBrick(b, mounts)
		if b.Error != "" {
			continue
		}
		if _, known := flushed[b.Mount]; !known {
			flushed[b.Mount] = gatherFlush(b.Path)
		}
		b.Flush = flushed[b.Mount]
	}
	gatherMachine(f)
	text, _ := os.ReadFile(c.Fstab)
	f.Fstab = fstab.Parse(string(text))
	gatherDocker(ctx, c, f)
	gatherNames(ctx, c, f)
	return f
}

func gatherDaemon(ctx context.Context, c Config, f *Facts) {
	client := api.Unix(c.Socket)
	defer client.Close()
	v, err := client.Version(ctx)
	if err != nil {
		f.Daemon.Error = err.Error()
		if f.Daemon.Denied = errors.Is(err, unix.EACCES); f.Daemon.Denied {
			return // whoever has the port may well be the daemon
		}
		ln, err := net.Listen("tcp", net.JoinHostPort("", strconv.Itoa(c.Port)))
		if err == nil {
			ln.Close()
		}
		f.Daemon.PortUsed = errors.Is(err, unix.EADDRINUSE)
		f.Daemon.Glusterd = running("glusterd")
		return
	}
	f.Daemon.Version = v
	if f.Pool, err = client.Pool(ctx); err != nil {
		f.Daemon.Error = err.Error()
		return
	}
	f.Exam, _ = client.Examine(ctx) // an older daemon does not know it
	volumes, _ := client.Volumes(ctx)
	for _, v := range volumes {
		for _, b := range v.Bricks {
			if _, path, ok := strings.Cut(b.Name, ":/"); ok && b.Peer == f.Pool.Self {
				f.Bricks = append(f.Bricks, Brick{Volume: v.Name, Path: "/" + path})
			}
		}
	}
}

// running reports whether a program of that name runs.
func running(name string) bool {
	dirs, _ := filepath.Glob("/proc/[0-9]*/comm")
	return slices.ContainsFunc(dirs, func(path string) bool {
		b, _ := os.ReadFile(path)
		return strings.TrimSpace(string(b)) == name
	})
}

func gatherBrick(b *Brick, mounts []mountinfo.Mount) {
	if _, err := os.Stat(filepath.Join(b.Path, ".mortar", "brick.json")); err != nil && !errors.Is(err, unix.EACCES) {
		b.Error = err.Error()
		return
	}
	var st unix.Statfs_t
	if err := unix.Statfs(b.Path, &st); err != nil {
		b.Error = err.Error()
		return
	}
	b.Total, b.Free = st.Blocks*uint64(st.Bsize), st.Bavail*uint64(st.Bsize)
	b.Inodes, b.InodesFree = st.Files, st.Ffree
	real, err := filepath.EvalSymlinks(b.Path)
	if err != nil {
		real = b.Path
	}
	if m := mountinfo.Under(mounts, real); m != nil {
		b.FSType, b.Device, b.Mount, b.Options = m.Type, m.Source, m.Dir, m.Options
		// A partition's disk is the directory above it.
		for _, queue := range []string{"queue/rotational", "../queue/rotational"} {
			if raw, err := os.ReadFile(filepath.Join("/sys/dev/block", m.Device) + "/" + queue); err == nil {
				b.Rotational = strings.TrimSpace(string(raw)) == "1"
				break
			}
		}
	}
}

func gatherMachine(f *Facts) {
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		f.Kernel.Release = unix.ByteSliceToString(uts.Release[:])
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		f.Kernel.FUSEError = err.Error()
	} else {
		unix.Close(fd)
	}
	if governor, _ := os.ReadFile("/sys/devices/system/cpu/cpuidle/current_governor"); strings.TrimSpace(string(governor)) == "haltpoll" {
		poll, err := os.ReadFile("/sys/module/haltpoll/parameters/guest_halt_poll_ns")
		f.Kernel.NoHaltPoll = err == nil && strings.TrimSpace(string(poll)) == "0"
	}
	known, _ := os.ReadFile("/proc/filesystems")
	f.Kernel.FUSE = bytes.Contains(known, []byte("\tfuse\n"))
	if mem, err := os.ReadFile("/proc/meminfo"); err == nil {
		f.Memory = parseMemory(string(mem))
	}
	var tx unix.Timex
	if state, err := unix.Adjtimex(&tx); err == nil {
		const unsynced = 0x40 // STA_UNSYNC
		f.Clock = Clock{Known: true, Synced: tx.Status&unsynced == 0 && state != unix.TIME_ERROR}
	}
	if _, err := os.Stat("/sbin/mount.mortar"); err == nil {
		f.Helpers.Mortar = true
	}
	if _, err := os.Stat("/sbin/mount.glusterfs"); err == nil {
		f.Helpers.Gluster, _ = filepath.EvalSymlinks("/sbin/mount.glusterfs")
	}
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		f.Systemd = true
	}
}

func parseMemory(text string) (m Memory) {
	for line := range strings.Lines(text) {
		w := strings.Fields(line)
		if len(w) < 2 {
			continue
		}
		n, _ := strconv.ParseUint(w[1], 10, 50)
		switch w[0] {
		case "MemTotal:":
			m.Total = n << 10
		case "MemAvailable:":
			m.Available = n << 10
		}
	}
	return m
}

// unitDirs are where systemd looks for units and what is added to them.
var unitDirs = []string{"/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

func gatherDocker(ctx context.Context, c Config, f *Facts) {
	if _, err := exec.LookPath("dockerd"); err != nil {
		if _, err := os.Stat("/run/docker.sock"); err != nil {
			return
		}
	}
	f.Docker = Docker{Installed: true, Plugin: c.Plugin}
	for _, dir := range unitDirs {
		files, _ := filepath.Glob(filepath.Join(dir, "docker.service.d", "*.conf"))
		for _, name := range append(files, filepath.Join(dir, "docker.service")) {
			b, _ := os.ReadFile(name)
			f.Docker.Ordered = f.Docker.Ordered || ordered(string(b))
		}
	}
	if c.Plugin == "" {
		return
	}
	client := &http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", c.Plugin)
		},
	}}
	r, err := http.NewRequestWithContext(ctx, "POST", "http://plugin/Plugin.Activate", nil)
	if err != nil {
		f.Docker.Error = err.Error()
		return
	}
	answer, err := client.Do(r)
	if err != nil {
		f.Docker.Error = errors.Unwrap(err).Error()
		return
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		f.Docker.Error = fmt.Sprintf("what listens there says %s", answer.Status)
	}
}

// ordered reports whether a unit file has its unit start after network file systems.
func ordered(unit string) bool {
	for line := range strings.Lines(unit) {
		if after, ok := strings.CutPrefix(strings.TrimSpace(line), "After="); ok && slices.Contains(strings.Fields(after), "remote-fs.target") {
			return true
		}
	}
	return false
}

// gatherNames looks up the host names of the pool's addresses and of fstab.
func gatherNames(ctx context.Context, c Config, f *Facts) {
	add := func(host, from string, self bool) {
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		if _, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil || host == "" || host == "localhost" {
			return
		}
		if !slices.ContainsFunc(f.Names, func(n Name) bool { return n.Host == host }) {
			f.Names = append(f.Names, Name{Host: host, From: from, Self: self || host == f.Name})
		}
	}
	if f.Pool != nil {
		for _, p := range f.Pool.Peers {
			for _, a := range p.Addrs {
				add(a, "the pool", p.Self)
			}
		}
	}
	for _, e := range f.Fstab {
		if hosts, _, ok := strings.Cut(e.Source, ":/"); ok && e.Ours() {
			for h := range strings.SplitSeq(hosts, ",") {
				add(h, c.Fstab, false)
			}
		}
	}
	for i := range f.Names {
		n := &f.Names[i]
		ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
		begun := time.Now()
		addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", n.Host)
		n.Took = time.Since(begun)
		cancel()
		var dns *net.DNSError
		switch {
		case errors.As(err, &dns):
			n.Error = dns.Err
		case err != nil:
			n.Error = err.Error()
		}
		for _, a := range addrs {
			n.Addrs = append(n.Addrs, a.Unmap())
		}
	}
}
