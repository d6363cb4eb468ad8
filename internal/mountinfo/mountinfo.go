// Package mountinfo is what is mounted, as the kernel tells it (proc_pid_mountinfo(5)).
package mountinfo

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Mount is a line of it.
type Mount struct {
	ID      int
	Parent  int    // the ID of the mount that it is on
	Device  string // major:minor
	Root    string // the directory of its file system that is mounted
	Shared  bool   // what is mounted on it is mounted elsewhere too
	Dir     string
	Type    string
	Source  string
	Options []string // of the mount, and then of its file system
}

// Ours reports whether mortar serves it.
func (m *Mount) Ours() bool { return m.Type == "fuse.mortar" }

// Ours reports whether mortar serves the file system with that number, if this process sees it.
func Ours(dev uint64) bool {
	all, err := Self()
	return err == nil && slices.ContainsFunc(all, func(m Mount) bool { return m.Ours() && m.Device == device(dev) })
}

func device(dev uint64) string { return fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev)) }

// unescape undoes how the kernel writes what is not to be taken for the end of a field.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// Parse returns the mounts of a table, of several at one place the topmost last.
func Parse(table string) (all []Mount) {
	for line := range strings.Lines(table) {
		left, right, ok := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 6 || len(r) < 2 {
			continue
		}
		m := Mount{Device: l[2], Dir: unescape.Replace(l[4]), Type: r[0], Source: unescape.Replace(r[1]), Options: strings.Split(l[5], ",")}
		m.ID, _ = strconv.Atoi(l[0])
		m.Parent, _ = strconv.Atoi(l[1])
		m.Root = unescape.Replace(l[3])
		m.Shared = slices.ContainsFunc(l[6:], func(s string) bool { return strings.HasPrefix(s, "shared:") })
		if len(r) > 2 {
			m.Options = append(m.Options, strings.Split(r[2], ",")...)
		}
		all = append(all, m)
	}
	return all
}

// Self reads what this process sees.
func Self() ([]Mount, error) { return read("/proc/self/mountinfo") }

// Of reads what a process sees.
func Of(pid int) ([]Mount, error) {
	return read(filepath.Join("/proc", strconv.Itoa(pid), "mountinfo"))
}

func read(path string) ([]Mount, error) {
	table, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return Parse(string(table)), nil
}

// Under is the mount that a path is on: the topmost of those with the longest directory.
func Under(mounts []Mount, path string) (best *Mount) {
	for i := range mounts {
		m := &mounts[i]
		within := m.Dir == "/" || path == m.Dir || strings.HasPrefix(path, m.Dir+"/")
		if within && (best == nil || len(m.Dir) >= len(best.Dir)) {
			best = m
		}
	}
	return best
}
