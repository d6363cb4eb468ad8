package migrate

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// compose explains a compose or stack file.
func (t *reader) compose(text []byte) error {
	for d := yaml.NewDecoder(bytes.NewReader(text)); ; {
		var doc yaml.Node
		if err := d.Decode(&doc); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("%s is not YAML: %w", t.name, err)
		}
		root := resolved(doc.Content[0])
		services, volumes := lookup(root, "services"), lookup(root, "volumes")
		if root.Kind != yaml.MappingNode || services == nil && volumes == nil {
			return fmt.Errorf("%s has neither services nor volumes at its top: a compose or stack file (version 2 or later) has", t.name)
		}
		for _, v := range entries(volumes) {
			t.volume(v)
		}
		for _, s := range entries(services) {
			t.service(s)
		}
	}
}

// pair is a key of a mapping and what it has.
type pair struct {
	key, value *yaml.Node
	flow       bool // on the lines of the mapping that has it
}

// resolved is what an alias stands for.
func resolved(n *yaml.Node) *yaml.Node {
	for range 10 {
		if n == nil || n.Kind != yaml.AliasNode {
			break
		}
		n = n.Alias
	}
	return n
}

// entries are the pairs of a mapping, without those that are merged into it.
func entries(n *yaml.Node) (all []pair) {
	if n = resolved(n); n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		all = append(all, pair{n.Content[i], n.Content[i+1], n.Style&yaml.FlowStyle != 0})
	}
	return all
}

// lookup finds a key in a mapping, and in what is merged into it.
func lookup(n *yaml.Node, key string) *yaml.Node { return lookupDeep(n, key, 10) }

func lookupDeep(n *yaml.Node, key string, depth int) *yaml.Node {
	if depth == 0 {
		return nil
	}
	var merged []*yaml.Node
	for _, p := range entries(n) {
		switch p.key.Value {
		case key:
			return resolved(p.value)
		case "<<":
			if v := resolved(p.value); v.Kind == yaml.SequenceNode {
				merged = append(merged, v.Content...)
			} else {
				merged = append(merged, v)
			}
		}
	}
	for _, m := range merged {
		if v := lookupDeep(m, key, depth-1); v != nil {
			return v
		}
	}
	return nil
}

// text is a scalar's.
func text(n *yaml.Node) string {
	if n == nil || n.Kind != yaml.ScalarNode {
		return ""
	}
	return n.Value
}

// last is the last line that a node has something on.
func (t *reader) last(p pair) int {
	end := p.key.Line
	if p.flow {
		var walk func(n *yaml.Node)
		walk = func(n *yaml.Node) {
			end = max(end, n.Line)
			for _, c := range n.Content {
				walk(c)
			}
		}
		walk(p.value)
		return min(end, len(t.lines))
	}
	for i := p.key.Line; i < len(t.lines); i++ {
		l := strings.TrimLeft(t.lines[i], " ")
		in := len(t.lines[i]) - len(l)
		switch {
		case l == "" || l[0] == '#' && in >= p.key.Column:
		case in >= p.key.Column: // columns are from 1
			end = i + 1
		default:
			return end
		}
	}
	return end
}

// put writes a pair as YAML where it stands.
func (t *reader) put(p pair, value *yaml.Node) []string {
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	key := *p.key
	key.HeadComment, key.FootComment = "", ""
	m := &yaml.Node{Kind: yaml.MappingNode, Content: []*yaml.Node{&key, value}}
	if p.flow {
		m.Style = yaml.FlowStyle
	}
	if err := e.Encode(m); err != nil {
		return []string{"# " + err.Error()}
	}
	out := strings.TrimRight(b.String(), "\n")
	if p.flow {
		out = strings.TrimSuffix(strings.TrimPrefix(out, "{"), "}")
		out = strings.Join(strings.Fields(out), " ")
	}
	lines := strings.Split(out, "\n")
	indent := t.lines[p.key.Line-1]
	indent = indent[:len(indent)-len(strings.TrimLeft(indent, " "))]
	for i := range lines {
		lines[i] = indent + lines[i]
	}
	return lines
}

// scalar is a text in a document, in the style of another one.
func scalar(value string, like *yaml.Node) *yaml.Node {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: value, Style: like.Style & yaml.DoubleQuotedStyle}
}

// isDriver reports whether a volume driver is one for GlusterFS. Plugins are mostly
// installed under an alias, which says so.
func isDriver(name string) bool {
	name = strings.ToLower(name)
	return strings.Contains(name, "gluster") || name == "gfs" || strings.HasPrefix(name, "gfs:")
}

// volume explains a volume at the top of a file.
func (t *reader) volume(p pair) {
	v := resolved(p.value)
	driver, opts := text(lookup(v, "driver")), map[string]string{}
	var order []string
	for n, depth := lookup(v, "driver_opts"), 0; n != nil && depth < 10; depth++ {
		next := (*yaml.Node)(nil)
		for _, o := range entries(n) {
			if o.key.Value == "<<" {
				next = resolved(o.value)
				continue
			}
			if _, there := opts[o.key.Value]; !there {
				opts[o.key.Value] = text(resolved(o.value))
				order = append(order, o.key.Value)
			}
		}
		n = next
	}
	local := driver == "" || driver == "local"
	switch kind := opts["type"]; {
	case isDriver(driver):
	case local && IsGluster(kind):
	case local && (kind == "none" || kind == "") && strings.Contains(opts["o"], "bind"):
		if m := t.under(opts["device"]); m != nil {
			c := t.change(p.key.Line, t.last(p)-p.key.Line+1)
			c.Write = c.Was
			c.note("it shows a part of %s, and stays. While nothing is mounted there, containers see what is below, so have %s mounted with \"mortar mount --enable\", which keeps Docker waiting; or, without a mount: driver: mortar", m.Dir, m.Dir)
		}
		return
	case local && strings.HasPrefix(kind, "nfs") && strings.HasPrefix(opts["device"], ":/") &&
		(strings.Contains(opts["o"], "vers=3") || strings.Contains(opts["o"], "mountproto=")):
	default:
		return
	}
	name := text(lookup(v, "name"))
	c := t.change(p.key.Line, t.last(p)-p.key.Line+1)
	to := t.backing(c, driver, p.key.Value, name, opts, order)
	t.renewed(c, p, v, to)
}

// backing is where a Docker volume's files are to be.
type backing struct {
	volume, sub string
	name        string // of the Docker volume, if it has to be another one
	ro          bool
}

// Names that plugins have for the same things.
var (
	volumeKeys = []string{"volname", "volume-name", "volumename", "volume_name", "vname", "volume", "vol"}
	subKeys    = []string{"subdir", "sub-dir", "path", "subdir-mount"}
	serverKeys = []string{"servers", "server", "hosts", "glusterfs.servers"}
)

// backing reads the options of a volume driver.
func (t *reader) backing(c *Change, driver, key, name string, opts map[string]string, order []string) (b backing) {
	take := func(src source) { b.volume, b.sub = src.volume, src.sub }
	for _, o := range order {
		value := opts[o]
		switch low := strings.ToLower(o); {
		case value == "" || low == "type":
		case slices.Contains(volumeKeys, low):
			b.volume = value
		case slices.Contains(subKeys, low):
			b.sub = strings.Trim(value, "/")
		case slices.Contains(serverKeys, low):
			c.note("%s goes: each engine asks the daemon of its machine", o)
		case low == "device" || low == "voluri":
			at := value
			if strings.HasPrefix(at, ":") { // the host is in o
				at = "HOST" + at
			}
			if src, ok := parseSource(at); ok {
				take(src)
			} else {
				c.lost("%s: %s: the volume cannot be told from it, which is HOST:/VOLUME", o, value)
			}
		case low == "glusteropts":
			src, _, _ := volfile(c, append(strings.Fields(value), "."))
			if src.volume != "" {
				take(src)
			}
		case low == "o":
			src := source{}
			for _, w := range strings.Split(value, ",") {
				switch {
				case w == "ro":
					b.ro = true
				case w == "rw" || w == "" || strings.HasPrefix(w, "addr="):
				case strings.HasPrefix(opts["type"], "nfs"):
					c.note("%s goes: it is NFS's", w)
				default:
					if left := c.mount(&src, []string{w}); len(left) > 0 {
						c.note("%s goes: the driver mounts with options of its own", w)
					}
				}
			}
		default:
			c.lost("%s: mortar's driver has no such option; it has volume, replica, size, uid, gid, mode, subdir, ro", o)
		}
	}
	if strings.HasPrefix(opts["type"], "nfs") {
		c.note("only if its server is one of GlusterFS's (its own NFS, or Ganesha); otherwise the volume stays")
	}
	if b.volume == "" && strings.Contains(name, "/") { // the plugin takes the path for the name
		b.volume, b.sub, _ = strings.Cut(strings.Trim(name, "/"), "/")
		b.name = strings.ReplaceAll(strings.Trim(name, "/"), "/", "-")
		c.note("the name was the path as well: it is in volume and subdir now, and a name has no / in it")
	} else if b.volume == "" && name != "" && isDriver(driver) && len(c.Lost) == 0 {
		b.volume = name
		c.note("the name was the volume of GlusterFS's as well; if it was not (the plugin was set to one): volume is what the volume of mortar's is called")
	}
	called := name
	if b.name != "" {
		called = b.name
	}
	if called == "" {
		called = "PROJECT_" + key
	}
	switch {
	case b.sub != "":
		c.note("subdir is a directory that exists: import the volume's tree into %s first (mortar help import gluster)", orVolume(b.volume))
	case b.volume != "":
		c.note("a Docker volume is a directory of its own in volume %s, %s. Make it (docker volume create -d mortar -o volume=%s %s), then import into that directory of a mount of %s", b.volume, called, b.volume, called, b.volume)
	default:
		c.note("volume: VOLUME in driver_opts says which volume of mortar's it is in; without, the daemon's docker-volume, or the only one. It is a directory of its own there, %s: make it (docker volume create -d mortar %s), then import into it", called, called)
	}
	return b
}

func orVolume(name string) string {
	if name == "" {
		return "mortar's"
	}
	return name
}

// renewed writes a volume's entry with the driver and options that it is to have.
func (t *reader) renewed(c *Change, p pair, v *yaml.Node, b backing) {
	out := &yaml.Node{Kind: yaml.MappingNode, Style: v.Style & yaml.FlowStyle, Anchor: p.value.Anchor}
	add := func(key string, value *yaml.Node) {
		out.Content = append(out.Content, scalar(key, p.key), value)
	}
	add("driver", scalar("mortar", p.key))
	opts := &yaml.Node{Kind: yaml.MappingNode, Style: out.Style}
	for _, o := range [][2]string{{"volume", b.volume}, {"subdir", b.sub}, {"ro", map[bool]string{true: "true"}[b.ro]}} {
		if o[1] != "" {
			value := scalar(o[1], p.key)
			if o[0] == "ro" {
				value.Style = yaml.DoubleQuotedStyle
			}
			opts.Content = append(opts.Content, scalar(o[0], p.key), value)
		}
	}
	if len(opts.Content) > 0 {
		add("driver_opts", opts)
	}
	external := false
	for _, e := range entries(v) {
		switch e.key.Value {
		case "driver", "driver_opts", "<<":
			continue
		case "name":
			if b.name != "" {
				add("name", scalar(b.name, p.key))
				continue
			}
		case "external":
			external = text(e.value) != "false"
		}
		value := *resolved(e.value)
		value.Anchor = ""
		out.Content = append(out.Content, e.key, &value)
	}
	if p.value.Kind == yaml.AliasNode || slices.ContainsFunc(entries(v), func(e pair) bool { return e.key.Value == "<<" }) {
		c.note("what stood elsewhere in the file is written out")
	}
	if external {
		c.note("it is external: made by hand, with docker volume create, and these options")
	}
	c.Write = t.put(p, out)
}

// service explains what a service has of GlusterFS's.
func (t *reader) service(p pair) {
	s := resolved(p.value)
	for _, e := range entries(s) {
		switch v := resolved(e.value); e.key.Value {
		case "image":
			if strings.Contains(strings.ToLower(v.Value), "gluster") {
				c := t.change(e.key.Line, 1)
				c.lost("service %s runs GlusterFS in a container: mortar's daemon runs on the machine itself, or as a managed plugin of the engine; the service goes", p.key.Value)
			}
		case "volume_driver":
			if isDriver(v.Value) {
				c := t.change(e.key.Line, 1)
				c.Write = t.put(e, scalar("mortar", e.key))
				c.note("the service's named volumes are directories of the daemon's docker-volume, or of the only volume there is")
			}
		case "volumes":
			for _, item := range v.Content {
				item = resolved(item)
				from := ""
				switch item.Kind {
				case yaml.ScalarNode:
					from, _, _ = strings.Cut(item.Value, ":")
				case yaml.MappingNode:
					if text(lookup(item, "type")) == "bind" {
						from = text(lookup(item, "source"))
					}
				}
				if !strings.HasPrefix(from, "/") {
					continue
				}
				if m := t.under(from); m != nil {
					c := t.change(item.Line, 1)
					c.Write = c.Was
					c.note("%s is in %s, where %s is mounted, and stays once mortar's volume is mounted there; with \"mortar mount --enable\", so that Docker waits for it and nobody makes an empty directory there", from, m.Dir, m.Source)
				}
			}
		}
	}
}
