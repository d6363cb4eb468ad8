// Packaging makes the .deb and the .rpm of the tree that it is in. It is a module
// of its own, so that what it needs is no business of the product's.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"
)

func main() {
	var o options
	flag.StringVar(&o.out, "out", "", "`directory` for the packages (default: dist in the tree)")
	flag.StringVar(&o.arch, "arch", runtime.GOARCH, "for which machines, as Go calls them")
	flag.StringVar(&o.binary, "binary", "", "a `program` that is built already, for this machine")
	flag.StringVar(&o.revision, "revision", "1", "`number` of the package among those of one version")
	flag.Parse()
	paths, err := build(o)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for _, p := range paths {
		fmt.Println(p)
	}
}

type options struct{ out, arch, binary, revision string }

// arches are what dpkg and rpm call what Go calls so.
var arches = map[string]struct{ deb, rpm string }{
	"amd64": {"amd64", "x86_64"}, "arm64": {"arm64", "aarch64"}, "arm": {"armhf", "armv7hl"}, "riscv64": {"riscv64", "riscv64"},
}

// build makes the packages, and returns their paths.
func build(o options) ([]string, error) {
	arch, ok := arches[o.arch]
	if !ok {
		return nil, fmt.Errorf("-arch %s: there are no packages for it", o.arch)
	}
	if !regexp.MustCompile(`^[0-9]+$`).MatchString(o.revision) {
		return nil, fmt.Errorf("-revision %s: want a number", o.revision)
	}
	tree, err := treeRoot()
	if err != nil {
		return nil, err
	}
	if o.out == "" {
		o.out = filepath.Join(tree, "dist")
	}
	when, err := buildTime(tree)
	if err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp("", "mortar-packaging-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)

	// native is the same program for this machine, which tells about itself.
	program, native := o.binary, o.binary
	if program == "" {
		program, native = filepath.Join(tmp, "mortar"), filepath.Join(tmp, "mortar")
		if err := compile(tree, program, o.arch); err != nil {
			return nil, err
		}
		if o.arch != runtime.GOARCH {
			native = filepath.Join(tmp, "native")
			if err := compile(tree, native, runtime.GOARCH); err != nil {
				return nil, err
			}
		}
	}
	version, err := versionOf(native)
	if err != nil {
		return nil, err
	}
	manual := filepath.Join(tmp, "manual")
	if _, err := run(native, "manual", manual); err != nil {
		return nil, err
	}
	p := &pkg{version: version, revision: o.revision, when: when}
	if p.files, err = collect(tree, program, manual); err != nil {
		return nil, err
	}
	if p.maintainer, err = os.ReadFile(filepath.Join(tree, "packaging/files/maintainer.sh")); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return nil, err
	}
	var paths []string
	for _, kind := range []struct {
		name, arch string
		write      func(arch string) ([]byte, error)
	}{
		{fmt.Sprintf("mortar_%s-%s_%s.deb", version, o.revision, arch.deb), arch.deb, p.deb},
		{fmt.Sprintf("mortar-%s-%s.%s.rpm", version, o.revision, arch.rpm), arch.rpm, p.rpm},
	} {
		b, err := kind.write(kind.arch)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", kind.name, err)
		}
		path := filepath.Join(o.out, kind.name)
		if err := os.WriteFile(path, b, 0o644); err != nil {
			return nil, err
		}
		paths = append(paths, path)
	}
	return paths, nil
}

// compile builds the program so that the place of the tree and the compiler's
// cache leave no trace in it.
func compile(tree, out, arch string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, "./cmd/mortar")
	cmd.Dir = tree
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOFLAGS=")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %v\n%s", err, text)
	}
	return nil
}

func run(name string, args ...string) ([]byte, error) {
	cmd := exec.Command(name, args...)
	// Defaults that the manual tells of are not those of whoever builds it.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent"}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %v\n%s", name, strings.Join(args, " "), err, &stderr)
	}
	return out, nil
}

// treeRoot is the directory of the module mortar that this one is in.
func treeRoot() (string, error) {
	dir, err := os.Getwd()
	for ; err == nil && dir != "/"; dir = filepath.Dir(dir) {
		if b, _ := os.ReadFile(filepath.Join(dir, "go.mod")); strings.HasPrefix(string(b), "module mortar\n") {
			return dir, nil
		}
	}
	return "", errors.Join(err, errors.New("this is not within the tree of mortar"))
}

// buildTime is the time of everything in the packages: that of the commit, or $SOURCE_DATE_EPOCH.
func buildTime(tree string) (time.Time, error) {
	text := os.Getenv("SOURCE_DATE_EPOCH")
	if text == "" {
		cmd := exec.Command("git", "log", "-1", "--format=%ct")
		cmd.Dir = tree
		out, err := cmd.Output()
		if err != nil {
			return time.Time{}, fmt.Errorf("git log: %w; outside of a repository, $SOURCE_DATE_EPOCH says what time it is", err)
		}
		text = strings.TrimSpace(string(out))
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH=%s: want seconds since 1970", text)
	}
	return time.Unix(n, 0).UTC(), nil
}

// versionOf asks the program.
func versionOf(program string) (string, error) {
	out, err := run(program, "version", "--json")
	if err != nil {
		return "", err
	}
	var v struct{ Version string }
	if err := json.Unmarshal(out, &v); err != nil {
		return "", fmt.Errorf("%s version --json: %w", program, err)
	}
	return packageVersion(v.Version), nil
}

// packageVersion writes a version of Go's as dpkg and rpm sort it: what comes
// before a release has a tilde, and there is no dash.
func packageVersion(v string) string {
	v, ok := strings.CutPrefix(v, "v")
	if !ok {
		return "0.0.0~devel"
	}
	v, build, dirty := strings.Cut(v, "+")
	number, pre, _ := strings.Cut(v, "-")
	if pre != "" {
		number += "~" + strings.ReplaceAll(pre, "-", ".")
	}
	if dirty {
		number += "+" + strings.ReplaceAll(build, "-", ".")
	}
	return number
}
