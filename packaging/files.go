package main

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// pkg is what both kinds of package are made of.
type pkg struct {
	version, revision string
	when              time.Time
	files             []file
	maintainer        []byte
}

// What it is, for people.
const (
	summary     = "replicated file system for small clusters"
	description = `mortar makes directories of some machines one file system, which every machine
mounts, and which stays up, correct and fast when a machine dies. One program, one
TCP port, with the words of GlusterFS and a volume driver for Docker.`
)

// file is one of the package, owned by root.
type file struct {
	name   string // absolute
	mode   uint32
	body   []byte
	link   string // of a symbolic link
	config bool   // kept as it is when somebody has changed it
	only   string // the kind of package that has it, "deb" or "rpm"; empty: both
}

func (f *file) in(kind string) bool { return f.only == "" || f.only == kind }

// collect reads the files of a package, sorted by name.
func collect(tree, program, manual string) ([]file, error) {
	var (
		all  []file
		fail error
	)
	add := func(from string, f file) {
		b, err := os.ReadFile(from)
		if err != nil && fail == nil {
			fail = err
		}
		if f.mode == 0 {
			f.mode = 0o644
		}
		f.body = b
		all = append(all, f)
	}
	ours := func(name string) string { return filepath.Join(tree, "packaging/files", name) }

	add(program, file{name: "/usr/bin/mortar", mode: 0o755})
	all = append(all, file{name: "/usr/sbin/mount.mortar", mode: 0o777, link: "../bin/mortar"})
	add(ours("mortar.service"), file{name: "/usr/lib/systemd/system/mortar.service"})
	add(ours("docker.conf"), file{name: "/usr/lib/systemd/system/docker.service.d/mortar.conf"})
	add(ours("sysusers.conf"), file{name: "/usr/lib/sysusers.d/mortar.conf"})
	add(ours("logrotate"), file{name: "/etc/logrotate.d/mortar", config: true})
	add(filepath.Join(manual, "mortar.toml"), file{name: "/etc/mortar/mortar.toml", config: true})
	add(filepath.Join(tree, "LICENSE"), file{name: "/usr/share/doc/mortar/copyright"})
	add(filepath.Join(tree, "README.md"), file{name: "/usr/share/doc/mortar/README.md"})
	add(filepath.Join(manual, "completion/mortar.bash"), file{name: "/usr/share/bash-completion/completions/mortar"})
	add(filepath.Join(manual, "completion/_mortar"), file{name: "/usr/share/zsh/vendor-completions/_mortar", only: "deb"})
	add(filepath.Join(manual, "completion/_mortar"), file{name: "/usr/share/zsh/site-functions/_mortar", only: "rpm"})
	add(filepath.Join(manual, "completion/mortar.fish"), file{name: "/usr/share/fish/vendor_completions.d/mortar.fish"})

	docs, err := filepath.Glob(filepath.Join(tree, "doc/*.md"))
	if err != nil {
		return nil, err
	}
	for _, from := range docs {
		add(from, file{name: "/usr/share/doc/mortar/" + filepath.Base(from)})
	}
	pages, err := filepath.Glob(filepath.Join(manual, "man/*"))
	if err != nil {
		return nil, err
	}
	for _, from := range pages {
		b, err := os.ReadFile(from)
		if err != nil {
			return nil, err
		}
		section := strings.TrimPrefix(filepath.Ext(from), ".")
		all = append(all, file{name: "/usr/share/man/man" + section + "/" + filepath.Base(from) + ".gz", mode: 0o644, body: compress(b)})
	}
	if fail != nil {
		return nil, fail
	}
	slices.SortFunc(all, func(a, b file) int { return strings.Compare(a.name, b.name) })
	return all, nil
}

// compress is gzip with nothing in its head that is not of the contents.
func compress(b []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(b) // to memory
	w.Close()
	return out.Bytes()
}

// script is one of the scripts of a package: what all have, and then its own lines.
func (p *pkg) script(lines string) []byte {
	return fmt.Appendf(nil, "%s%s\n", p.maintainer, strings.TrimSpace(lines))
}
