package tree

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestTarKeepsTheManifest(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	if err := Make(src, 7); err != nil {
		t.Fatal(err)
	}
	odd := filepath.Join(src, "wp-admin", "odd")
	if err := os.WriteFile(odd, []byte("x"), 0o4711); err != nil {
		t.Fatal(err)
	}
	os.Chmod(odd, 0o4711|os.ModeSetuid)
	os.Chtimes(odd, time.Unix(1, 5), time.Unix(1234567890, 123456789))
	if err := os.Link(odd, filepath.Join(src, "zlink")); err != nil {
		t.Fatal(err)
	}
	before, err := Manifest(src)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(before); n < 1900 || n > 3500 {
		t.Errorf("a tree of %d objects is not WordPress's shape", n)
	}
	var archive bytes.Buffer
	if err := Tar(&archive, src); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("tar", "-xpf", "-", "-C", dst)
	cmd.Stdin = &archive
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	after, err := Manifest(dst)
	if err != nil {
		t.Fatal(err)
	}
	// The root directories were made by TempDir, both alike.
	if d := Diff(before, after, 10); d != nil {
		t.Errorf("unpacked tree differs:\n%s", strings.Join(d, "\n"))
	}
	if other := t.TempDir(); true {
		if err := Make(other, 7); err != nil {
			t.Fatal(err)
		}
		a, _ := os.ReadFile(filepath.Join(src, "wp-includes", "certificates", first(t, filepath.Join(src, "wp-includes", "certificates"))))
		b, _ := os.ReadFile(filepath.Join(other, "wp-includes", "certificates", first(t, filepath.Join(other, "wp-includes", "certificates"))))
		if !bytes.Equal(a, b) || len(a) == 0 {
			t.Error("one seed made two trees")
		}
	}
}

func first(t *testing.T, dir string) string {
	t.Helper()
	l, err := os.ReadDir(dir)
	if err != nil || len(l) == 0 {
		t.Fatal(dir, err)
	}
	return l[0].Name()
}

func TestDiffSeesEveryBit(t *testing.T) {
	for name, change := range map[string]func(string) error{
		"contents": func(f string) error { return os.WriteFile(f, []byte("abd"), 0o644) },
		"size":     func(f string) error { return os.Truncate(f, 2) },
		"mode":     func(f string) error { return os.Chmod(f, 0o600) },
		"time":     func(f string) error { return os.Chtimes(f, time.Time{}, time.Unix(5, 6)) },
		"link":     func(f string) error { return os.Link(f, f+"2") },
		"gone":     os.Remove,
	} {
		dir := t.TempDir()
		f := filepath.Join(dir, "file")
		if err := os.WriteFile(f, []byte("abc"), 0o644); err != nil {
			t.Fatal(err)
		}
		os.Chtimes(f, time.Unix(1, 1), time.Unix(1, 1))
		before, err := Manifest(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := change(f); err != nil {
			t.Fatal(err)
		}
		if name != "time" && name != "gone" {
			os.Chtimes(f, time.Unix(1, 1), time.Unix(1, 1))
		}
		after, err := Manifest(dir)
		if err != nil {
			t.Fatal(err)
		}
		if Diff(before, after, 10) == nil {
			t.Errorf("%s: not seen", name)
		}
	}
}
