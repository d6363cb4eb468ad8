// Package internal_test keeps the arrows between the packages pointing the way
// the design has them. A program of this size stays understandable as long as
// every package can be read with nothing in mind but the packages below it; each
// arrow the wrong way takes that from two packages at once, and never looks worth an
// argument when it is drawn. So it is argued here, once, with a reason per row.
package internal_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	module = "mortar/"
	inside = module + "internal/"
)

// packages has a row for every package of internal: what of ours it may
// import, and why that and no more.
var packages = []struct {
	name string
	may  []string // packages of internal; every package may import codec
	why  string
}{
	// Leaves.
	{"codec", nil, "bytes and structs: what everything that is sent or stored stands on"},
	{"fsop", nil, "the nouns and verbs of a file system know neither paths nor replicas nor how they travel"},
	{"cluster", nil, "the words of the cluster are the same whoever decides, stores or sends them"},
	{"disk", nil, "the seam under everything durable knows no format"},
	{"wire", nil, "bytes between processes do not know what a kind of message means"},
	{"mountinfo", nil, "what the kernel tells of mounts, read"},
	{"crew", nil, "goroutines do not know what they work on"},
	{"footprint", nil, "how to take little memory, whatever one is"},
	{"metrics", nil, "packages are given what they increment and never reach for it"},

	// One step up.
	{"estate", nil, "what one process of a mount leaves to the next is known to the two that fill it, and knows neither"},
	{"proto", []string{"fsop", "cluster"}, "the dictionary of messages has no behaviour"},
	{"pki", []string{"cluster"}, "who is who can be decided without a network"},
	{"oplog", []string{"disk", "cluster"}, "a log of opaque records knows neither operations nor peers"},

	// The engines. None of brick, replica, control and client knows another: they
	// meet in daemon, through interfaces that each defines for itself.
	{"brick/meta", []string{"disk", "fsop", "cluster"}, "tables over the key-value store, and the only place that knows it"},
	{"brick/data", []string{"disk", "fsop", "oplog", "brick/meta"}, "contents of files, and where their bytes are"},
	{"brick", []string{"brick/meta", "brick/data", "oplog", "disk", "fsop", "cluster", "proto"}, "one replica's storage knows neither peers nor sockets"},
	{"replica/core", []string{"proto", "fsop", "cluster"}, "the protocol is a pure machine: messages in, decisions out"},
	{"replica", []string{"replica/core", "proto", "fsop", "cluster", "wire", "oplog", "crew"}, "the shell of that machine names the storage and the transport that it needs"},
	{"control/state", []string{"cluster", "proto"}, "what the pool decides is a pure function of the commands"},
	{"control", []string{"control/state", "cluster", "proto", "pki", "wire"}, "it decides placement and never moves or sees file data"},
	{"client", []string{"proto", "wire", "fsop", "cluster", "estate", "crew"}, "a chain of handlers knows neither FUSE nor NFS"},
	{"gluster", nil, "it copies from one directory to another, and knows of GlusterFS only what is to be left behind"},
	{"fstab", nil, "a text of mount(8)'s, read and written"},
	{"migrate", []string{"fstab", "mountinfo"}, "what to write in place of a text is a function of the text, and of what is mounted"},
	{"doctor", []string{"api", "fstab", "mountinfo"}, "what is wrong is a function of facts, which come from the kernel and the daemon's REST interface"},
	{"api", []string{"cluster"}, "the language of the REST interface serves programs that have nothing else of ours"},

	// The doors see an fsop.Handler, or an interface that they define.
	{"mount", []string{"fsop", "proto", "estate", "mountinfo", "footprint"}, "FUSE in, operations out; proto only for the effects that it takes back from the kernel, and mountinfo for what it must not take from under somebody's mount"},
	{"nfs", []string{"fsop", "proto"}, "NFS in, operations out"},
	{"dockervol", []string{"disk", "mountinfo"}, "nine calls of Docker's over two interfaces of its own; disk protects its mount points, mountinfo has them"},
	{"httpd", []string{"api", "httpd/web", "metrics"}, "handlers over interfaces of its own"},
	{"httpd/web", nil, "an embedded page that uses nothing but the REST interface"},

	// The program.
	{"daemon", []string{
		"fsop", "cluster", "disk", "wire", "metrics", "proto", "pki", "oplog",
		"brick", "replica", "replica/core", "control", "control/state", "client", "api",
		"mount", "estate", "nfs", "dockervol", "httpd", "httpd/web", "mountinfo", "crew",
	}, "the one place where packages meet"},
	{"cli/ui", nil, "how to talk to people, whatever it is about"},
	{"cli", []string{"cli/ui", "api", "daemon", "cluster", "fsop", "proto", "mount", "estate", "footprint", "brick", "disk", "doctor", "fstab", "gluster", "migrate", "mountinfo"},
		"words into calls of the REST interface; mount and estate are for the command line and the life of its process, brick and disk for the tools that work on a brick's directory alone"},

	// For tests.
	{"codec/codectest", nil, "what is asked of every coded type"},
	{"pacer", nil, "the time that a test's process was given, whatever is tested"},
	{"wire/wiretest", nil, "addresses for whoever listens"},
	{"fsop/memfs", []string{"fsop", "proto"}, "the oracle: a file system in memory"},
	{"sim", []string{
		"fsop", "fsop/memfs", "cluster", "disk", "wire", "metrics", "proto", "pki", "oplog",
		"brick", "replica", "replica/core", "control", "control/state", "client", "api", "daemon",
	}, "whole clusters under one seed"},
}

// testOnly are packages that only tests, and each other, may import.
var testOnly = []string{"codec/codectest", "fsop/memfs", "pacer", "sim", "wire/wiretest"}

// libraries has a row for every library. What a library costs in size, in
// change and in understanding is paid by one package, which hides it.
var libraries = []struct {
	prefix string
	in     []string // packages of the module; "*" for all, "x tests" for the tests of x
	why    string
}{
	{"github.com/hanwen/go-fuse/v2", []string{"internal/mount"}, "FUSE"},
	{"github.com/hashicorp/raft", []string{"internal/control"}, "consensus"},
	{"github.com/hashicorp/raft-boltdb/v2", []string{"internal/control"}, "consensus"},
	{"github.com/hashicorp/go-hclog", []string{"internal/control"}, "what raft logs through"},
	{"go.etcd.io/bbolt", []string{"internal/control"}, "consensus"},
	{"github.com/cockroachdb/pebble/v2", []string{"internal/brick/meta", "internal/disk tests"}, "the key-value store"},
	{"github.com/cockroachdb/pebble/v2/vfs", []string{"internal/brick/meta", "internal/disk"}, "its disk is the seam for crash tests"},
	{"github.com/cespare/xxhash/v2", []string{"internal/brick", "internal/brick/meta", "internal/brick/data"}, "hashes of names and contents"},
	{"github.com/klauspost/compress", []string{"internal/brick", "internal/oplog", "internal/wire"}, "compression"},
	{"github.com/spf13/cobra", []string{"internal/cli"}, "the tree of commands"},
	{"github.com/spf13/pflag", []string{"internal/cli"}, "their flags"},
	{"github.com/prometheus/client_golang", []string{"internal/metrics"}, "metrics"},
	{"github.com/prometheus/client_model", []string{"internal/metrics"}, "metrics"},
	{"github.com/prometheus/common", []string{"internal/metrics"}, "metrics"},
	{"github.com/anishathalye/porcupine", []string{"test/workload"}, "the judge of histories"},
	{"github.com/BurntSushi/toml", []string{"internal/daemon"}, "the configuration file"},
	{"go.yaml.in/yaml/v3", []string{"internal/migrate"}, "compose files, with the lines that things stand on"},
	{"golang.org/x/sys", []string{"*"}, "system calls"},
	{"golang.org/x/sync", []string{"*"}, "errgroup"},
}

// testLibraries are for tests and for the packages of testOnly.
var testLibraries = []string{
	"github.com/google/go-cmp", "go.uber.org/goleak", "pgregory.net/rapid", "github.com/anishathalye/porcupine",
	"github.com/cockroachdb/datadriven", "github.com/rogpeppe/go-internal", "github.com/chromedp",
}

// standardOnly import nothing but ours and the standard library: the words
// that everything else is written in.
var standardOnly = []string{"codec", "fsop", "cluster", "proto", "pki", "api", "replica/core", "control/state", "client", "oplog", "httpd"}

// pure are the machines that run in a simulator by the million steps: time,
// identities and randomness come in with the input.
var pure = []string{"replica/core", "control/state"}

// What a pure package does without: imports (and what is below them), and
// names in packages that are otherwise welcome.
var (
	impureImports = []string{"os", "net", "sync", "math/rand", "crypto/rand", "context", "runtime", "syscall", "log", "unsafe", "io/ioutil"}
	impureNames   = map[string][]string{
		"time":    {"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTicker", "NewTimer"},
		"cluster": {"NewID"},
	}
	// These are functions of their arguments, whatever else their package does.
	pureNames = map[string][]string{
		"net":       {"SplitHostPort", "JoinHostPort"},
		"net/netip": nil, // all of it
	}
)

// badNames say nothing about what is in a package.
var badNames = []string{"util", "utils", "common", "helper", "helpers", "types", "base", "manager", "managers", "misc", "lib", "shared"}

// pkg is what the go command knows of a package.
type pkg struct {
	ImportPath, Dir, Name, Doc         string
	GoFiles, TestGoFiles, XTestGoFiles []string
	Imports, TestImports, XTestImports []string
}

// list asks the go command for all packages of the module.
func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Dir,Name,Doc,GoFiles,TestGoFiles,XTestGoFiles,Imports,TestImports,XTestImports", "./...")
	cmd.Dir = ".."
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	var all []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if len(all) < 10 {
		t.Fatalf("go list found %d packages", len(all))
	}
	return all
}

// ours returns the packages of internal among imports, by their name there.
func ours(imports []string) (names []string) {
	for _, i := range imports {
		if name, ok := strings.CutPrefix(i, inside); ok {
			names = append(names, name)
		}
	}
	return names
}

// within reports whether an import path is the prefix or below it.
func within(importPath, prefix string) bool {
	return importPath == prefix || strings.HasPrefix(importPath, prefix+"/")
}

func TestArrows(t *testing.T) {
	rows := make(map[string]int)
	for i, row := range packages {
		rows[row.name] = i
		if row.why == "" {
			t.Errorf("%s: no reason given", row.name)
		}
	}
	for _, p := range list(t) {
		name, ok := strings.CutPrefix(p.ImportPath, inside)
		if !ok || len(p.GoFiles) == 0 {
			continue
		}
		i, ok := rows[name]
		if !ok {
			t.Errorf("internal/%s is new: give it a row in the table of packages that says what it may import and why", name)
			continue
		}
		for _, dep := range ours(p.Imports) {
			if dep != "codec" && !slices.Contains(packages[i].may, dep) && !slices.Contains(testOnly, dep) {
				t.Errorf("internal/%s imports internal/%s. It is not to: %s", name, dep, packages[i].why)
			}
		}
	}
}

// TestOutside: the command does nothing but call cli, and the tests and
// benchmarks of the whole see the program as its users do.
func TestOutside(t *testing.T) {
	for _, p := range list(t) {
		if strings.HasPrefix(p.ImportPath, inside) {
			continue
		}
		may := []string{"api"} // a public interface, too
		if p.ImportPath == module+"cmd/mortar" {
			may = []string{"cli"}
		}
		for _, dep := range ours(p.Imports) {
			if !slices.Contains(may, dep) {
				t.Errorf("%s imports internal/%s: it may import %v", p.ImportPath, dep, may)
			}
		}
		for _, dep := range p.Imports {
			if within(p.ImportPath, module+"cmd") && (within(dep, module+"test") || within(dep, module+"bench")) {
				t.Errorf("%s imports %s, which is for tests", p.ImportPath, dep)
			}
		}
	}
}

func TestTestOnly(t *testing.T) {
	for _, p := range list(t) {
		if name, ok := strings.CutPrefix(p.ImportPath, inside); !ok || slices.Contains(testOnly, name) {
			continue
		}
		for _, dep := range p.Imports {
			if name, ok := strings.CutPrefix(dep, inside); ok && slices.Contains(testOnly, name) || within(dep, module+"test") || within(dep, module+"bench") {
				t.Errorf("%s imports %s outside its tests", p.ImportPath, dep)
			}
		}
	}
}

func TestLibraries(t *testing.T) {
	for _, p := range list(t) {
		rel := strings.TrimPrefix(p.ImportPath, module)
		inTests := slices.Contains(testOnly, strings.TrimPrefix(rel, "internal/")) || within(rel, "test") || within(rel, "bench")
		check := func(imports []string, test bool) {
			for _, dep := range imports {
				if first, _, _ := strings.Cut(dep, "/"); !strings.Contains(first, ".") {
					continue // ours or the standard library's
				}
				if slices.ContainsFunc(testLibraries, func(l string) bool { return within(dep, l) }) {
					if !test && !inTests {
						t.Errorf("%s imports %s, which is for tests", p.ImportPath, dep)
					}
					continue
				}
				// The longest row that fits says who may.
				best := -1
				for i, l := range libraries {
					if within(dep, l.prefix) && (best < 0 || len(l.prefix) > len(libraries[best].prefix)) {
						best = i
					}
				}
				switch {
				case best < 0:
					t.Errorf("%s imports %s: libraries are in the table of libraries, with who may use them and what for", p.ImportPath, dep)
				case test && slices.Contains(libraries[best].in, rel+" tests"):
				case !slices.Contains(libraries[best].in, "*") && !slices.Contains(libraries[best].in, rel):
					t.Errorf("%s imports %s (%s), which is for %v alone", p.ImportPath, dep, libraries[best].why, libraries[best].in)
				}
			}
		}
		check(p.Imports, false)
		check(p.TestImports, true)
		check(p.XTestImports, true)
	}
}

func TestStandardOnly(t *testing.T) {
	for _, p := range list(t) {
		if name, ok := strings.CutPrefix(p.ImportPath, inside); !ok || !slices.Contains(standardOnly, name) {
			continue
		}
		for _, dep := range p.Imports {
			if first, _, _ := strings.Cut(dep, "/"); strings.Contains(first, ".") && !within(dep, "golang.org/x/sync") {
				t.Errorf("%s imports %s", p.ImportPath, dep)
			}
		}
	}
}

func TestPure(t *testing.T) {
	found := 0
	for _, p := range list(t) {
		if name, ok := strings.CutPrefix(p.ImportPath, inside); !ok || !slices.Contains(pure, name) {
			continue
		}
		found++
		fset := token.NewFileSet()
		for _, file := range p.GoFiles {
			f, err := parser.ParseFile(fset, filepath.Join(p.Dir, file), nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			names := make(map[string]string) // of imports in this file
			for _, i := range f.Imports {
				dep, _ := strconv.Unquote(i.Path.Value)
				name := path.Base(dep)
				if i.Name != nil {
					name = i.Name.Name
				}
				names[name] = strings.TrimPrefix(dep, inside)
				if _, some := pureNames[dep]; !some && slices.ContainsFunc(impureImports, func(bad string) bool { return within(dep, bad) }) {
					t.Errorf("%v: a pure package imports %s", fset.Position(i.Pos()), dep)
				}
			}
			ast.Inspect(f, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.GoStmt:
					t.Errorf("%v: a pure package starts a goroutine", fset.Position(n.Pos()))
				case *ast.SelectStmt, *ast.ChanType, *ast.SendStmt:
					t.Errorf("%v: a pure package has to do with channels", fset.Position(n.Pos()))
				case *ast.SelectorExpr:
					x, ok := n.X.(*ast.Ident)
					if !ok {
						break
					}
					from := names[x.Name]
					if some := pureNames[from]; slices.Contains(impureNames[from], n.Sel.Name) || some != nil && !slices.Contains(some, n.Sel.Name) {
						t.Errorf("%v: a pure package uses %s.%s: that comes in with the input", fset.Position(n.Pos()), x.Name, n.Sel.Name)
					}
				}
				return true
			})
		}
	}
	if found != len(pure) {
		t.Errorf("%d of the %d pure packages were found", found, len(pure))
	}
}

// TestDocs: every package says what it is and why, where one looks for it.
func TestDocs(t *testing.T) {
	for _, p := range list(t) {
		if len(p.GoFiles) == 0 {
			continue
		}
		want := "Package " + p.Name + " "
		if p.Name == "main" {
			want = ""
		}
		if len(p.Doc) < len(want)+10 || !strings.HasPrefix(p.Doc, want) {
			t.Errorf("%s has the package doc %q", p.ImportPath, p.Doc)
		}
	}
}

func TestNames(t *testing.T) {
	for _, p := range list(t) {
		rel := strings.TrimPrefix(p.ImportPath, module)
		for _, e := range strings.Split(rel, "/") {
			if slices.Contains(badNames, e) {
				t.Errorf("%s: %q says nothing about what is in it", p.ImportPath, e)
			}
		}
		if n := strings.Count(rel, "/"); within(rel, "internal") && n > 2 {
			t.Errorf("%s is deeper than two levels", p.ImportPath)
		}
		if dir := path.Base(rel); len(p.GoFiles) > 0 && p.Name != "main" && p.Name != dir {
			t.Errorf("%s is package %s", p.ImportPath, p.Name)
		}
	}
}

// TestNoInit: nothing happens because a package was imported. What a program
// has, it was given, so that ten nodes live in one process.
func TestNoInit(t *testing.T) {
	fset := token.NewFileSet()
	for _, p := range list(t) {
		if !strings.HasPrefix(p.ImportPath, inside) {
			continue
		}
		for _, file := range p.GoFiles {
			f, err := parser.ParseFile(fset, filepath.Join(p.Dir, file), nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range f.Decls {
				if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
					t.Errorf("%v: func init", fset.Position(fn.Pos()))
				}
			}
		}
	}
}

// TestTable: the tables speak of packages in the right order and without
// contradiction, also of those that do not exist yet.
func TestTable(t *testing.T) {
	seen := make(map[string]bool)
	for _, row := range packages {
		if seen[row.name] {
			t.Errorf("%s has two rows", row.name)
		}
		seen[row.name] = true
	}
	for _, row := range packages {
		for _, dep := range row.may {
			if !seen[dep] {
				t.Errorf("%s may import %s, which has no row", row.name, dep)
			}
		}
	}
	engines := []string{"brick", "replica", "control", "client"}
	doors := []string{"mount", "nfs", "dockervol", "httpd"}
	for _, row := range packages {
		for _, dep := range row.may {
			switch {
			case slices.Contains(engines, row.name) && slices.Contains(engines, dep):
				t.Errorf("%s may import %s: the engines do not know each other", row.name, dep)
			case slices.Contains(doors, row.name) && slices.Contains(engines, dep):
				t.Errorf("%s may import %s: a door sees a handler, or an interface of its own", row.name, dep)
			case dep == "daemon" && row.name != "cli" && row.name != "sim":
				t.Errorf("%s may import daemon: only cli does", row.name)
			case dep == "cli":
				t.Errorf("%s may import cli: only the command does", row.name)
			}
		}
	}
	for _, name := range slices.Concat(testOnly, standardOnly, pure) {
		if !seen[name] {
			t.Errorf("%s has no row", name)
		}
	}
}
