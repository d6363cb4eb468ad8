package migrate

import (
	"path"
	"slices"
	"strings"
)

// setting is a line of a unit, with those that go on from it.
type setting struct {
	line, n             int
	section, key, value string
}

// settings reads a unit. A section's own line has no key.
func (t *reader) settings() (all []setting) {
	section := ""
	for i := 0; i < len(t.lines); i++ {
		l := strings.TrimSpace(t.lines[i])
		if l == "" || l[0] == '#' || l[0] == ';' {
			continue
		}
		s := setting{line: i + 1, n: 1, section: section}
		if l[0] == '[' && strings.HasSuffix(l, "]") {
			section = l
			s.section = l
			all = append(all, s)
			continue
		}
		for strings.HasSuffix(l, `\`) && i+1 < len(t.lines) {
			i++
			s.n++
			l = strings.TrimSuffix(l, `\`) + " " + strings.TrimSpace(t.lines[i])
		}
		key, value, ok := strings.Cut(l, "=")
		if !ok {
			continue
		}
		s.key, s.value = strings.TrimSpace(key), strings.TrimSpace(value)
		all = append(all, s)
	}
	return all
}

// glusterUnits are its services, by the names that distributions give them.
var glusterUnits = []string{"glusterd.service", "glusterfs-server.service", "glusterfsd.service", "glustereventsd.service", "glusterfssharedstorage.service"}

// unit explains a unit of systemd: a mount, or what is ordered after GlusterFS.
func (t *reader) unit() {
	all := t.settings()
	get := func(section, key string) *setting {
		for i := range all {
			if all[i].section == section && all[i].key == key {
				return &all[i]
			}
		}
		return nil
	}
	kind := get("[Mount]", "Type")
	ours := kind != nil && IsGluster(kind.value)
	ordered := false
	for _, s := range all {
		switch {
		case s.section == "[Unit]" && slices.ContainsFunc(strings.Fields(s.value), func(w string) bool { return slices.Contains(glusterUnits, w) }):
			ordered = t.dependency(s) || ordered
		case strings.HasPrefix(s.key, "Exec") && strings.Contains(s.value, "gluster"):
			t.command(s)
		}
	}
	if !ours {
		return
	}
	c := t.change(kind.line, kind.n)
	c.Write = []string{"Type=mortar"}
	what, opts := get("[Mount]", "What"), get("[Mount]", "Options")
	if what == nil {
		c.note("there is no What=, which says HOST:/VOLUME")
		return
	}
	s, ok := parseSource(what.value)
	w := t.change(what.line, what.n)
	if !ok {
		w.lost("%s is not HOST:/VOLUME: a mount asks the pool, there are no files that describe a volume", what.value)
		return
	}
	if opts != nil {
		o := t.change(opts.line, opts.n)
		if left := o.mount(&s, strings.Split(opts.value, ",")); len(left) > 0 {
			o.Write = []string{"Options=" + strings.Join(left, ",")}
		}
	}
	w.Write = []string{"What=" + s.String()}
	if !ordered {
		u := t.first(all, "[Unit]", what)
		u.Write = append(u.Write, "After=mortar.service")
		u.note("the daemon is started before; do not require it: the volume would be unmounted whenever it is restarted")
	}
	if where := get("[Mount]", "Where"); where != nil {
		c.note("\"mortar mount --enable %s %s\" is another way: a line in fstab with an automount, and a directory that nobody can write to while nothing is mounted; not both", s.String(), where.value)
	}
}

// first is the line of a section, or else what comes before one that is there.
func (t *reader) first(all []setting, section string, before *setting) *Change {
	for _, s := range all {
		if s.section == section && s.key == "" {
			c := t.change(s.line, 1)
			c.Write = slices.Clone(c.Was)
			return c
		}
	}
	c := t.change(before.line, 0)
	c.Write = []string{section}
	return c
}

// dependency explains a line that names a service of GlusterFS's. It reports
// whether what is written is ordered after the daemon.
func (t *reader) dependency(s setting) bool {
	c := t.change(s.line, s.n)
	var words []string
	for _, w := range strings.Fields(s.value) {
		if slices.Contains(glusterUnits, w) {
			w = "mortar.service"
		}
		if !slices.Contains(words, w) {
			words = append(words, w)
		}
	}
	key := s.key
	switch key {
	case "Requires", "BindsTo", "Requisite", "PartOf":
		key = "Wants"
		c.note("%s becomes Wants: a mount outlives the daemon, which may be restarted", s.key)
		var other []string
		for _, w := range words {
			if w != "mortar.service" {
				other = append(other, w)
			}
		}
		if len(other) > 0 {
			c.Write = append(c.Write, s.key+"="+strings.Join(other, " "))
		}
		words = []string{"mortar.service"}
	}
	c.Write = append(c.Write, key+"="+strings.Join(words, " "))
	return key == "After"
}

// command explains a program of GlusterFS's that a unit runs.
func (t *reader) command(s setting) {
	c := t.change(s.line, s.n)
	prefix := strings.TrimLeft(s.value, "-@:+!|")
	marks := s.value[:len(s.value)-len(prefix)]
	f := strings.Fields(prefix)
	if len(f) == 0 {
		return
	}
	write := func(words ...string) { c.Write = []string{s.key + "=" + marks + strings.Join(words, " ")} }
	switch path.Base(f[0]) {
	case "mount", "mount.glusterfs":
		var src source
		var rest, opts []string
		found := false
		for i := 1; i < len(f); i++ {
			next := ""
			if i+1 < len(f) {
				next = f[i+1]
			}
			switch {
			case f[i] == "-t":
				i++
			case f[i] == "-o":
				opts = append(opts, strings.Split(next, ",")...)
				i++
			case !found:
				if src, found = parseSource(f[i]); !found {
					rest = append(rest, f[i])
				}
			default:
				rest = append(rest, f[i])
			}
		}
		if !found {
			c.lost("%s: no HOST:/VOLUME is in it", s.value)
			return
		}
		words := []string{"/bin/mount", "-t", "mortar"}
		if left := c.mount(&src, opts); len(left) > 0 {
			words = append(words, "-o", strings.Join(left, ","))
		}
		write(append(append(words, src.String()), rest...)...)
	case "glusterfs":
		src, dir, left := volfile(c, f[1:])
		if len(src.hosts) == 0 || src.volume == "" || dir == "" {
			c.lost("%s: it does not say HOST, VOLUME and directory", s.value)
			return
		}
		words := []string{"/usr/bin/mortar", "mount", src.String(), dir}
		if len(left) > 0 {
			words = append(words, "-o", strings.Join(left, ","))
		}
		c.note("the command ends when the volume is mounted: Type=forking, or --foreground and Type=exec")
		write(words...)
	case "gluster":
		f[0] = "/usr/bin/mortar"
		c.note("what mortar has of GlusterFS's commands has the same words")
		write(f...)
	default:
		c.lost("%s: programs of GlusterFS's have no other counterpart than the daemon, mortar.service", f[0])
	}
}

// volfile reads the command line of GlusterFS's client.
func volfile(c *Change, words []string) (s source, dir string, left []string) {
	for i := 0; i < len(words); i++ {
		w := words[i]
		key, value, has := strings.Cut(w, "=")
		if short := map[string]string{"-s": "--volfile-server", "-l": "--log-file", "-L": "--log-level"}[w]; short != "" && i+1 < len(words) {
			i++
			key, value, has = short, words[i], true
		}
		switch {
		case key == "--volfile-server" && has:
			s.addHosts(value)
		case key == "--volfile-id" && has:
			s.volume, s.sub, _ = strings.Cut(strings.Trim(value, "/"), "/")
		case key == "--subdir-mount" && has:
			s.sub = strings.Trim(value, "/")
		case strings.HasPrefix(key, "--"):
			word := strings.TrimPrefix(key, "--")
			if has {
				word += "=" + value
			}
			left = append(left, c.mount(&s, []string{word})...)
		case strings.HasPrefix(w, "-"):
			c.lost("%s: mortar has no such flag", w)
		default:
			dir = w
		}
	}
	return s, dir, left
}
