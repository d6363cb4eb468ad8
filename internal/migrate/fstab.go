package migrate

import (
	"slices"
	"strings"

	"mortar/internal/fstab"
	"mortar/internal/mountinfo"
)

// fstab explains the lines of a table of mounts.
func (t *reader) fstab(text string) error {
	entries := fstab.Parse(text)
	for _, e := range entries {
		if IsGluster(e.Type) {
			t.mounts = append(t.mounts, mountinfo.Mount{Dir: e.Dir, Source: e.Source})
		}
	}
	for _, e := range entries {
		switch m := t.under(e.Source); {
		case IsGluster(e.Type):
			t.mountLine(&e)
		case e.Has("bind") && m != nil:
			t.bindLine(&e, m)
		case strings.HasPrefix(e.Type, "nfs") && (e.Has("mountproto=") || e.Has("vers=3") || e.Has("nfsvers=3")):
			t.nfsLine(&e)
		}
	}
	return nil
}

func (t *reader) mountLine(e *fstab.Entry) {
	c := t.change(e.Line, 1)
	s, ok := parseSource(e.Source)
	if !ok {
		c.lost("%s is not HOST:/VOLUME: a mount asks the pool, there are no files that describe a volume", e.Source)
		return
	}
	var words []string
	for _, w := range e.Options {
		unit := strings.TrimPrefix(w, "x-systemd.requires=")
		switch {
		case strings.HasPrefix(w, "x-systemd.") && strings.Contains(w, "gluster") && unit != w:
			c.note("%s goes: with it the volume would be unmounted whenever the daemon is restarted, and a mount outlives its daemon", w)
		case strings.HasPrefix(w, "x-systemd.") && strings.Contains(w, "gluster"):
			c.note("%s: it is mortar.service that it comes after", w)
		default:
			words = append(words, w)
		}
	}
	left := c.mount(&s, words)
	if slices.Contains(left, "x-systemd.automount") || slices.Contains(left, "noauto") {
		c.note("x-systemd.after: the daemon is started before")
	} else {
		c.note("x-systemd.automount: who looks at %s before it is mounted waits, a bind mount of Docker's too, and does not see it empty", e.Dir)
	}
	c.Write = []string{strings.TrimSuffix(fstab.Line(s.String(), e.Dir, left), "\n")}
}

func (t *reader) bindLine(e *fstab.Entry, m *mountinfo.Mount) {
	c := t.change(e.Line, 1)
	c.note("it shows a part of %s, and stays", m.Dir)
	want := "x-systemd.requires-mounts-for=" + m.Dir
	if e.Has("x-systemd.requires-mounts-for=") {
		c.Write = c.Was
		return
	}
	c.note("%s: systemd mounts it after that", want)
	f := strings.Fields(c.Was[0])
	f[3] += "," + want // it has options, bind among them
	c.Write = []string{strings.Join(f, " ")}
}

func (t *reader) nfsLine(e *fstab.Entry) {
	s, ok := parseSource(e.Source)
	if !ok {
		return
	}
	c := t.change(e.Line, 1)
	c.note("only if %s is a server of GlusterFS's (its own NFS, or Ganesha): mortar serves no NFS, its own mount takes the place; otherwise the line stays", s.hosts[0])
	var left []string
	for _, w := range e.Options {
		if slices.Contains(kept, w) || strings.HasPrefix(w, "x-") {
			left = append(left, w)
		} else {
			c.note("%s goes: it is NFS's", w)
		}
	}
	c.Write = []string{strings.TrimSuffix(fstab.Line(s.String(), e.Dir, left), "\n")}
}
