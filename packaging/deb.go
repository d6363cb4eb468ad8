package main

import (
	"archive/tar"
	"bytes"
	"crypto/md5"
	"fmt"
	"path"
	"strings"
)

// The scripts that dpkg calls, and with which words: deb-preinst(5) and the other three.
var debScripts = map[string]string{
	"preinst":  `case "$1" in install | upgrade) before_unpacking ;; esac`,
	"postinst": `case "$1" in configure) after_unpacking "$2" ;; esac`,
	"prerm":    `case "$1" in remove) before_removal ;; esac`,
	"postrm":   `case "$1" in remove) after_removal ;; purge) purge ;; esac`,
}

// deb is the package for dpkg: an ar(5) archive of two compressed tar archives, as
// deb(5) describes it.
func (p *pkg) deb(arch string) ([]byte, error) {
	var control, data tarball
	size := 0
	var sums, conffiles strings.Builder
	for _, f := range p.files {
		if !f.in("deb") {
			continue
		}
		data.add(p, f)
		size += (len(f.body) + 1023) / 1024
		if f.link == "" {
			fmt.Fprintf(&sums, "%x  %s\n", md5.Sum(f.body), strings.TrimPrefix(f.name, "/"))
		}
		if f.config {
			fmt.Fprintln(&conffiles, f.name)
		}
	}
	var c strings.Builder
	fmt.Fprintf(&c, "Package: mortar\nVersion: %s-%s\nArchitecture: %s\nMaintainer: mortar <root@localhost>\n", p.version, p.revision, arch)
	fmt.Fprintf(&c, "Installed-Size: %d\nSection: admin\nPriority: optional\nDescription: %s\n", size, summary)
	for line := range strings.SplitSeq(description, "\n") {
		fmt.Fprintf(&c, " %s\n", line)
	}
	control.add(p, file{name: "/control", mode: 0o644, body: []byte(c.String())})
	control.add(p, file{name: "/md5sums", mode: 0o644, body: []byte(sums.String())})
	control.add(p, file{name: "/conffiles", mode: 0o644, body: []byte(conffiles.String())})
	for _, name := range []string{"preinst", "postinst", "prerm", "postrm"} {
		control.add(p, file{name: "/" + name, mode: 0o755, body: p.script(debScripts[name])})
	}

	var out bytes.Buffer
	out.WriteString("!<arch>\n")
	for _, member := range []struct {
		name string
		body func() ([]byte, error)
	}{
		{"debian-binary", func() ([]byte, error) { return []byte("2.0\n"), nil }},
		{"control.tar.gz", control.close},
		{"data.tar.gz", data.close},
	} {
		b, err := member.body()
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&out, "%-16s%-12d%-6d%-6d%-8s%-10d`\n", member.name, p.when.Unix(), 0, 0, "100644", len(b))
		out.Write(b)
		if len(b)%2 == 1 {
			out.WriteByte('\n')
		}
	}
	return out.Bytes(), nil
}

// tarball is a tar archive in the making. Directories come by themselves.
type tarball struct {
	raw  bytes.Buffer
	w    *tar.Writer
	dirs map[string]bool
	err  error
}

func (t *tarball) add(p *pkg, f file) {
	if t.w == nil {
		t.w, t.dirs = tar.NewWriter(&t.raw), make(map[string]bool)
	}
	t.dir(p, path.Dir(f.name))
	h := &tar.Header{Typeflag: tar.TypeReg, Name: "." + f.name, Mode: int64(f.mode), Size: int64(len(f.body)), ModTime: p.when, Uname: "root", Gname: "root", Format: tar.FormatGNU}
	if f.link != "" {
		h.Typeflag, h.Linkname = tar.TypeSymlink, f.link
	}
	t.head(h)
	if t.err == nil {
		_, t.err = t.w.Write(f.body)
	}
}

func (t *tarball) dir(p *pkg, name string) {
	if t.dirs[name] {
		return
	}
	t.dirs[name] = true
	if name != "/" {
		t.dir(p, path.Dir(name))
	}
	t.head(&tar.Header{Typeflag: tar.TypeDir, Name: "." + strings.TrimSuffix(name, "/") + "/", Mode: 0o755, ModTime: p.when, Uname: "root", Gname: "root", Format: tar.FormatGNU})
}

func (t *tarball) head(h *tar.Header) {
	if t.err == nil {
		t.err = t.w.WriteHeader(h)
	}
}

func (t *tarball) close() ([]byte, error) {
	if t.err == nil {
		t.err = t.w.Close()
	}
	return compress(t.raw.Bytes()), t.err
}
