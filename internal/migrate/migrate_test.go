package migrate

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"

	"mortar/internal/fstab"
	"mortar/internal/mountinfo"
)

// known are the mounts of the machine of the examples.
var known = []mountinfo.Mount{{Dir: "/mnt/gv0", Source: "gfs1:/gv0"}, {Dir: "/srv/glusterfs", Source: "localhost:/staging-gfs"}}

// show is a report as the command line prints it.
func show(r *Report) string {
	var b strings.Builder
	for _, c := range r.Changes {
		fmt.Fprintf(&b, "line %d\n", c.Line)
		lines := func(mark string, all []string) {
			for _, l := range all {
				fmt.Fprintf(&b, "%s %s\n", mark, l)
			}
		}
		if c.Stays() {
			lines("=", c.Was)
		} else {
			lines("-", c.Was)
			lines("+", c.Write)
		}
		lines("   ", c.Notes)
		lines("  !", c.Lost)
	}
	if b.Len() == 0 {
		return "nothing\n"
	}
	return b.String()
}

// TestExplain runs the examples of testdata: "explain NAME", a file, and what is said of it.
func TestExplain(t *testing.T) {
	datadriven.Walk(t, "testdata/examples", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			r, err := Explain(d.CmdArgs[0].Key, "", []byte(d.Input), known)
			if err != nil {
				return err.Error() + "\n"
			}
			return show(r)
		})
	})
}

// What is written is a file in which there is nothing more to change.
func TestSettled(t *testing.T) {
	const table = "gfs1:/gv0 /mnt/gv0 glusterfs defaults,_netdev,backup-volfile-servers=gfs2:gfs3 0 0\n/mnt/gv0/www /var/www none bind 0 0\nUUID=1 / ext4 defaults 0 1"
	const unit = "[Unit]\nRequires=glusterd.service\n[Mount]\nWhat=gfs1:gv0\nWhere=/mnt/gv0\nType=glusterfs\nOptions=_netdev,acl"
	const compose = "services:\n  a:\n    image: nginx\nvolumes:\n  x:\n    driver: glusterfs\n    driver_opts:\n      servers: a,b\n      volname: gv0\n  y:\n    labels: {a: b}\n"
	for name, text := range map[string]string{"fstab": table, "gv0.mount": unit, "compose.yml": compose} {
		r, err := Explain(name, "", []byte(text), nil)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Explain(name, "", []byte(apply(text, r)), nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range again.Changes {
			if !c.Stays() {
				t.Errorf("of what was written:\n%s", show(again))
			}
		}
		if len(r.Changes) == 0 {
			t.Errorf("%s: nothing", name)
		}
	}
}

// apply makes the changes.
func apply(text string, r *Report) string {
	lines := strings.Split(text, "\n")
	for _, c := range slices.Backward(r.Changes) {
		lines = slices.Replace(lines, c.Line-1, c.Line-1+len(c.Was), c.Write...)
	}
	return strings.Join(lines, "\n")
}

func TestRefused(t *testing.T) {
	for name, want := range map[string][2]string{
		"a.yml":    {"services: [a", "a.yml is not YAML"},
		"b.yml":    {"colours: {}", "neither services nor volumes"},
		"c":        {"hello", "none of what this understands"},
		"d":        {"", "none of what this understands"},
		"e":        {"\x00\x01", "is not a text"},
		"f.yml":    {"- a\n- b", "neither services nor volumes"},
		"g.yml":    {"a: *b", "is not YAML"},
		"fstab.gz": {"\x1f\x8b\x00", "is not a text"},
	} {
		if _, err := Explain(name, "", []byte(want[0]), nil); err == nil || !strings.Contains(err.Error(), want[1]) {
			t.Errorf("%s: %v, want %q", name, err, want[1])
		}
	}
	if _, err := Explain("x", "toml", nil, nil); err == nil || !strings.Contains(err.Error(), "toml") {
		t.Errorf("an unknown kind: %v", err)
	}
}

// FuzzExplain: whatever the text, what is said is about lines that are there, and a
// line for an fstab is one.
func FuzzExplain(f *testing.F) {
	files, err := filepath.Glob("testdata/examples/*")
	if err != nil || len(files) == 0 {
		f.Fatal("no examples", err)
	}
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		for part := range strings.SplitSeq(string(raw), "\nexplain ") {
			name, text, _ := strings.Cut(part, "\n")
			text, _, _ = strings.Cut(text, "\n----\n")
			f.Add(name, text)
		}
	}
	f.Add("a.yml", "volumes: &a\n  x: *a\n")
	f.Add("a.yml", "volumes:\n  x: &b\n    driver: gluster\n    <<: *b\n")
	f.Fuzz(func(t *testing.T, name, text string) {
		r, err := Explain(name, "", []byte(text), known)
		if err != nil {
			return
		}
		lines := strings.Split(strings.ReplaceAll(text, "\r\n", "\n"), "\n")
		for _, c := range r.Changes {
			if c.Line < 1 || c.Line-1+len(c.Was) > len(lines) {
				t.Fatalf("%+v of %d lines", c, len(lines))
			}
			for _, l := range c.Write {
				if r.Kind == Fstab && !c.Stays() && len(fstab.Parse(l)) != 1 {
					t.Errorf("%q is no line of an fstab", l)
				}
			}
		}
	})
}
