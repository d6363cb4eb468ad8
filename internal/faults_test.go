package internal_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The table of faults names tests. They must exist, and a name that more than one package has
// must say of which it is.
func TestFaultTable(t *testing.T) {
	doc, err := os.ReadFile("../doc/faults.md")
	if err != nil {
		t.Fatal(err)
	}
	in := map[string][]string{} // by name, the packages that have such a test
	define := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)[A-Z]\w*)\(`)
	err = filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		src, err := os.ReadFile(path)
		for _, m := range define.FindAllSubmatch(src, -1) {
			in[string(m[1])] = append(in[string(m[1])], filepath.Base(filepath.Dir(path)))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range strings.Split(string(doc), "\n") {
		if !strings.HasPrefix(row, "| F") {
			continue
		}
		if !regexp.MustCompile("`(\\w+\\.)?Test").MatchString(row) {
			t.Errorf("no test is named in %.60s…", row)
		}
	}
	for _, m := range regexp.MustCompile("`(?:([a-z0-9]+)\\.)?((?:Test|Fuzz)[A-Z]\\w*)`").FindAllSubmatch(doc, -1) {
		switch pkg, name := string(m[1]), string(m[2]); {
		case pkg == "" && len(in[name]) == 0 || pkg != "" && !slices.Contains(in[name], pkg):
			t.Errorf("doc/faults.md names %s, which is no test of the tree", m[0])
		case pkg == "" && len(in[name]) > 1:
			t.Errorf("doc/faults.md names %s, which may be that of any of the packages %v", m[0], in[name])
		}
	}
}
