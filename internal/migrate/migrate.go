// Package migrate says what to write in place of what names GlusterFS: in an fstab, in
// a compose or stack file, in a unit of systemd. It is a function of texts; it opens
// no file and changes none.
package migrate

import (
	"bytes"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"mortar/internal/mountinfo"
)

// Kind is what a text is.
type Kind string

// The kinds of text that are understood.
const (
	Fstab   Kind = "fstab"
	Compose Kind = "compose"
	Unit    Kind = "unit"
)

// Kinds are all of them.
var Kinds = []Kind{Fstab, Compose, Unit}

// Change is a place of the text and what to write there.
type Change struct {
	Line  int      `json:"line"` // from 1
	Was   []string `json:"was"`  // this line and those below it
	Write []string `json:"write"`
	Notes []string `json:"notes"`
	// Lost is what the text asks for and mortar does not have.
	Lost []string `json:"lost"`
}

// Stays reports whether the lines are right as they are.
func (c *Change) Stays() bool { return slices.Equal(c.Was, c.Write) }

// Report is everything there is to say about a text.
type Report struct {
	Kind    Kind      `json:"kind"`
	Changes []*Change `json:"changes"`
}

// Explain reads a text. Its name counts for what it is if kind is empty. mounts are where
// volumes of GlusterFS's are, or were, mounted on this machine; of two at one place the last one counts.
func Explain(name string, kind Kind, text []byte, mounts []mountinfo.Mount) (*Report, error) {
	if bytes.IndexByte(text, 0) >= 0 {
		return nil, fmt.Errorf("%s is not a text", name)
	}
	t := &reader{name: name, lines: strings.Split(strings.ReplaceAll(string(text), "\r\n", "\n"), "\n"), mounts: mounts}
	if kind == "" {
		if kind = t.kind(); kind == "" {
			return nil, fmt.Errorf("%s is none of what this understands: an fstab, a compose or stack file, a unit of systemd; --as says which one it is", name)
		}
	}
	t.report = &Report{Kind: kind, Changes: []*Change{}}
	var err error
	switch kind {
	case Fstab:
		err = t.fstab(string(text))
	case Compose:
		err = t.compose(text)
	case Unit:
		t.unit()
	default:
		err = fmt.Errorf("no kind of file is called %q: there are %q", kind, Kinds)
	}
	t.report.Changes = slices.DeleteFunc(t.report.Changes, func(c *Change) bool { return c.Stays() && len(c.Notes)+len(c.Lost) == 0 })
	slices.SortStableFunc(t.report.Changes, func(a, b *Change) int { return a.Line - b.Line })
	return t.report, err
}

// reader is one text being read.
type reader struct {
	name   string
	lines  []string
	mounts []mountinfo.Mount
	report *Report
}

// kind says what a text is, by its name, or else by what is in it.
func (t *reader) kind() Kind {
	base := path.Base(filepath.ToSlash(t.name))
	switch ext := path.Ext(base); {
	case ext == ".mount" || ext == ".automount" || ext == ".service" || ext == ".conf" && strings.Contains(t.name, ".d/"):
		return Unit
	case ext == ".yml" || ext == ".yaml" || ext == ".json":
		return Compose
	case base == "fstab" || strings.HasPrefix(base, "fstab."):
		return Fstab
	}
	for _, l := range t.lines {
		l = strings.TrimSpace(l)
		switch {
		case l == "" || l[0] == '#' || l[0] == ';':
		case l[0] == '[' && strings.HasSuffix(l, "]"):
			return Unit
		case l[0] == '{' || l == "---" || strings.HasSuffix(strings.Fields(l)[0], ":"):
			return Compose
		case len(strings.Fields(l)) >= 3:
			return Fstab
		}
	}
	return ""
}

// change notes that there is something to say about n lines.
func (t *reader) change(line, n int) *Change {
	c := &Change{Line: line, Was: slices.Clone(t.lines[line-1 : line-1+n]), Write: []string{}, Notes: []string{}, Lost: []string{}}
	t.report.Changes = append(t.report.Changes, c)
	return c
}

func (c *Change) note(format string, args ...any) {
	c.Notes = append(c.Notes, fmt.Sprintf(format, args...))
}
func (c *Change) lost(format string, args ...any) {
	c.Lost = append(c.Lost, fmt.Sprintf(format, args...))
}

// under is the mount of GlusterFS's that a path is in, nil if it is in none.
func (t *reader) under(p string) *mountinfo.Mount { return mountinfo.Under(t.mounts, path.Clean(p)) }

// source is what GlusterFS mounts: HOST[,HOST]:[/]VOLUME[/SUBDIR].
type source struct {
	hosts       []string
	volume, sub string
}

func (s source) String() string {
	return strings.TrimSuffix(strings.Join(s.hosts, ",")+":/"+s.volume+"/"+s.sub, "/")
}

// parseSource reads one.
func parseSource(text string) (s source, ok bool) {
	at := strings.LastIndex(text, ":/")
	if at < 0 {
		at = strings.LastIndexByte(text, ':')
	}
	if at < 1 || strings.ContainsRune(text[at:], '}') { // within ${NAME:-VALUE}
		return s, false
	}
	for h := range strings.SplitSeq(text[:at], ",") {
		if h = strings.TrimSpace(h); h != "" {
			s.hosts = append(s.hosts, h)
		}
	}
	s.volume, s.sub, _ = strings.Cut(strings.Trim(text[at+1:], "/"), "/")
	return s, len(s.hosts) > 0 && s.volume != ""
}

// addHosts adds those that are not there yet.
func (s *source) addHosts(hosts ...string) {
	for _, h := range hosts {
		if h != "" && !slices.Contains(s.hosts, h) {
			s.hosts = append(s.hosts, h)
		}
	}
}

// IsGluster reports whether a type of mount(8)'s is GlusterFS's.
func IsGluster(fsType string) bool { return fsType == "glusterfs" || fsType == "fuse.glusterfs" }
