// Package fstab is the table of what a machine mounts at boot, as text: read,
// with an entry more, with one less. It touches no file.
package fstab

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
)

// Entry is a line of fstab(5) that mounts something.
type Entry struct {
	Line    int      `json:"line"` // from 1
	Source  string   `json:"source"`
	Dir     string   `json:"dir"`
	Type    string   `json:"type"`
	Options []string `json:"options"`
}

// Has reports whether one of the options is word, or begins with it if it ends in =.
func (e *Entry) Has(word string) bool {
	return slices.ContainsFunc(e.Options, func(o string) bool {
		return o == word || strings.HasSuffix(word, "=") && strings.HasPrefix(o, word)
	})
}

// Ours reports whether mortar mounts it.
func (e *Entry) Ours() bool { return e.Type == "mortar" || e.Type == "fuse.mortar" }

// A field of fstab cannot have these in it as they are.
var (
	escape   = strings.NewReplacer(`\`, `\134`, " ", `\040`, "\t", `\011`, "\n", `\012`, "#", `\043`)
	unescape = strings.NewReplacer(`\134`, `\`, `\040`, " ", `\011`, "\t", `\012`, "\n", `\043`, "#")
)

// Parse returns the entries of a file; lines that are none are left out, as mount(8) does.
func Parse(text string) []Entry {
	var all []Entry
	n := 0
	for line := range strings.Lines(text) {
		n++
		f := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == '\t' || r == '\n' })
		if len(f) < 3 || strings.HasPrefix(f[0], "#") {
			continue
		}
		e := Entry{Line: n, Source: unescape.Replace(f[0]), Dir: filepath.Clean(unescape.Replace(f[1])), Type: f[2]}
		if len(f) > 3 {
			e.Options = strings.Split(f[3], ",")
		}
		all = append(all, e)
	}
	return all
}

// bootOptions are what an entry has besides what its user wants: the network is
// up and the daemon asked to run before it is mounted. With the automount,
// whoever looks at the directory before that waits, a bind mount of Docker's
// included, in place of seeing it empty. It does not end with the daemon, which may be restarted.
var bootOptions = []string{"_netdev", "x-systemd.automount", "x-systemd.after=mortar.service", "x-systemd.mount-timeout=2min"}

// Line is the entry that mounts source at dir at boot.
func Line(source, dir string, options []string) string {
	var words []string
	for w := range strings.SplitSeq(strings.Join(options, ","), ",") {
		if w != "" && w != "defaults" && !slices.Contains(words, w) {
			words = append(words, w)
		}
	}
	if len(words) == 0 {
		words = []string{"defaults"}
	}
	for _, b := range bootOptions {
		if !slices.Contains(words, b) {
			words = append(words, b)
		}
	}
	return strings.Join([]string{escape.Replace(source), escape.Replace(dir), "mortar", escape.Replace(strings.Join(words, ",")), "0", "0"}, " ") + "\n"
}

// Add returns text with line at its end. Without a change if it has it
// already; what else is to be mounted at the place is not overridden.
func Add(path, text, line string) (string, error) {
	want := Parse(line)[0]
	for _, e := range Parse(text) {
		switch {
		case e.Dir != want.Dir:
		case e.Source == want.Source && e.Type == want.Type && slices.Equal(e.Options, want.Options):
			return text, nil
		default:
			return "", fmt.Errorf("%s, line %d: %s is to be mounted at %s already; take that line out first (\"mortar umount --disable %s\" if it is mortar's)", path, e.Line, e.Source, e.Dir, e.Dir)
		}
	}
	if text != "" && !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	return text + line, nil
}

// Remove returns text without mortar's entries for dir, and whether there were any.
func Remove(text, dir string) (string, bool) {
	gone := make(map[int]bool)
	for _, e := range Parse(text) {
		if e.Ours() && e.Dir == dir {
			gone[e.Line] = true
		}
	}
	var b strings.Builder
	n := 0
	for line := range strings.Lines(text) {
		if n++; !gone[n] {
			b.WriteString(line)
		}
	}
	return b.String(), len(gone) > 0
}
