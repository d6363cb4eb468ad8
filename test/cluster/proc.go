package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// process is a process directory of /proc.
type process struct {
	dir string
	pid int
}

type stat struct {
	comm  string
	state byte
	ppid  int
	cpu   time.Duration
	// reaped is what children had that have been waited for, and theirs.
	reaped time.Duration
	start  uint64 // clock ticks after boot
}

func processes(proc string) []process {
	names, err := os.ReadDir(proc)
	if err != nil {
		return nil
	}
	var out []process
	for _, n := range names {
		if pid, err := strconv.Atoi(n.Name()); err == nil {
			out = append(out, process{filepath.Join(proc, n.Name()), pid})
		}
	}
	return out
}

// clockTick is the unit of times in /proc/PID/stat (USER_HZ is 100 on all that Go runs on).
const clockTick = time.Second / 100

// stat reads /proc/PID/stat (proc(5)); of a process that is gone it is zero.
func (p process) stat() stat {
	b, err := os.ReadFile(p.dir + "/stat")
	if err != nil {
		return stat{}
	}
	text := string(b)
	open, shut := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	if open < 0 || shut < 0 {
		return stat{}
	}
	f := strings.Fields(text[shut+1:])
	if len(f) < 22 {
		return stat{}
	}
	num := func(i int) uint64 { n, _ := strconv.ParseUint(f[i], 10, 64); return n }
	span := func(i int) time.Duration { return ticks(f[i]) + ticks(f[i+1]) }
	return stat{
		comm: text[open+1 : shut], state: f[0][0], ppid: int(num(1)),
		cpu: span(11), reaped: span(13), start: num(19),
	}
}

// ticks reads a time of /proc.
func ticks(text string) time.Duration {
	n, _ := strconv.ParseUint(text, 10, 64)
	return time.Duration(n) * clockTick
}

// runs reports whether any thread of the process still runs. The first one of them may have
// ended, and with it what stat says, before the others.
func (p process) runs(st stat) bool {
	if st.state != 0 && st.state != 'Z' && st.state != 'X' {
		return true
	}
	threads, err := os.ReadDir(p.dir + "/task")
	return err == nil && len(threads) > 1
}

func (p process) rss() int64 {
	b, err := os.ReadFile(p.dir + "/statm")
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	n, _ := strconv.ParseInt(f[1], 10, 64)
	return n * int64(os.Getpagesize())
}

// namespaces of interest: those that helpers are started with.
var namespaces = []string{"mnt", "pid", "net", "uts", "ipc"}

// bootTicks is the time since the machine was booted, as it stands in a process's stat.
func bootTicks() uint64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // no kernel is without it
	}
	return uint64(time.Duration(ts.Nano()) / clockTick)
}

// fingerprint is what a helper process owns that could outlive it.
type fingerprint struct {
	pid   int
	start uint64
	ns    map[string]string // kind → "kind:[inode]", only those that are not ours
}

func fingerprintOf(pid int) fingerprint {
	f := fingerprint{pid: pid, start: process{dir: fmt.Sprintf("/proc/%d", pid)}.stat().start, ns: map[string]string{}}
	for _, k := range namespaces {
		theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, k))
		ours, err2 := os.Readlink("/proc/self/ns/" + k)
		if err == nil && err2 == nil && theirs != ours {
			f.ns[k] = theirs
		}
	}
	return f
}

// left names everything that still exists of a cluster: its directory, its
// helpers, processes in its namespaces, mounts below its directory in any
// namespace that a process can see, and loop devices of its images. Processes that began
// after a moment (of bootTicks) are not its: by then it had ended, and the kernel gives the
// numbers of its namespaces to new ones, of other clusters' hosts and containers say.
func left(base string, prints []fingerprint, ended uint64) []string {
	var out []string
	if _, err := os.Lstat(base); err == nil {
		out = append(out, "directory "+base)
	}
	for _, p := range processes("/proc") {
		st := p.stat()
		if st.state == 0 {
			continue
		}
		for _, f := range prints {
			if p.pid == f.pid && st.start == f.start {
				out = append(out, fmt.Sprintf("helper process %d", p.pid))
			}
			for _, k := range namespaces {
				if l, err := os.Readlink(p.dir + "/ns/" + k); err == nil && l == f.ns[k] && st.start <= ended {
					out = append(out, fmt.Sprintf("process %d (%s) in namespace %s", p.pid, st.comm, l))
					break
				}
			}
		}
		if mounts, err := os.ReadFile(p.dir + "/mountinfo"); err == nil && strings.Contains(string(mounts), base) {
			out = append(out, fmt.Sprintf("mount of %s in the namespace of process %d (%s)", base, p.pid, st.comm))
		}
	}
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, l := range loops {
		if b, err := os.ReadFile(l); err == nil && strings.HasPrefix(string(b), base) {
			out = append(out, fmt.Sprintf("loop device %s of %s", strings.Split(l, "/")[3], strings.TrimSpace(string(b))))
		}
	}
	return out
}

// waitGone waits until nothing is left; the kernel takes down mounts and loop
// devices a moment after the last process of a namespace.
func waitGone(base string, prints []fingerprint) error {
	var rest []string
	ended := bootTicks()
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if rest = left(base, prints, ended); len(rest) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.New("still there after 15 s: " + strings.Join(rest, "; "))
		}
	}
}
