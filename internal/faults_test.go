package internal_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The table of faults names tests. They must exist.
func TestFaultTable(t *testing.T) {
	doc, err := os.ReadFile("../doc/faults.md")
	if err != nil {
		t.Fatal(err)
	}
	exists := map[string]bool{}
	define := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)[A-Z]\w*)\(`)
	err = filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		src, err := os.ReadFile(path)
		for _, m := range define.FindAllSubmatch(src, -1) {
			exists[string(m[1])] = true
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
		if !strings.Contains(row, "`Test") {
			t.Errorf("no test is named in %.60s…", row)
		}
	}
	for _, m := range regexp.MustCompile("`((?:Test|Fuzz)[A-Z]\\w*)`").FindAllSubmatch(doc, -1) {
		if name := string(m[1]); !exists[name] {
			t.Errorf("doc/faults.md names %s, which is no test of the tree", name)
		}
	}
}
