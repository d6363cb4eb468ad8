package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/anishathalye/porcupine"
	"golang.org/x/sys/unix"
)

var bin string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "mortar-workload-test-")
	if err == nil {
		bin = filepath.Join(dir, "workload")
		var out []byte
		if out, err = exec.Command("go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
	}
	code := 1
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		code = m.Run()
	}
	os.RemoveAll(dir)
	os.Exit(code)
}

// workload runs the program and returns its exit code, and its answer in v.
func workload(t *testing.T, v any, args ...string) (int, string) {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd := exec.Command(bin, args...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if v != nil && out.Len() > 0 {
		if err := json.Unmarshal(out.Bytes(), v); err != nil {
			t.Fatalf("%v: %s%s", err, &out, &errOut)
		}
	}
	return cmd.ProcessState.ExitCode(), errOut.String()
}

// A local file system is right; what record logs there, verify confirms.
func TestRecordAndVerify(t *testing.T) {
	for _, fsync := range []string{"-fsync=false", "-fsync=true"} {
		var dir, log, not string
		for _, duration := range []string{"700ms", "7s", "70s"} { // a slow machine takes longer to do everything
			dir, log, not = filepath.Join(t.TempDir(), "d"), filepath.Join(t.TempDir(), "log"), ""
			var r Recording
			if code, text := workload(t, &r, "record", "-dir", dir, "-log", log, "-duration", duration, "-pace", "100us", fsync); code != 0 {
				t.Fatalf("record: %d %s", code, text)
			}
			for _, kind := range []string{"create", "replace", "overwrite", "extend", "remove", "read", "stat", "mkdir"} {
				if r.Kinds[kind] == nil || r.Kinds[kind].Count == 0 {
					not += " " + kind
				}
			}
			if files, _ := filepath.Glob(dir + "/w0/f*"); len(files) < 4 {
				not += " four files that are left"
			}
			if not == "" {
				break
			}
		}
		if not != "" {
			t.Errorf("record did no%s", not)
		}
		var v Verification
		if code, text := workload(t, &v, "verify", "-dir", dir, "-log", log); code != 0 || v.Uncertain != 0 || v.Steps == 0 || v.Files == 0 {
			t.Fatalf("verify: %d %s %+v", code, text, v)
		}
		// Every kind of damage is seen.
		files, err := filepath.Glob(dir + "/w0/f*")
		if err != nil || len(files) < 4 {
			t.Fatal(files, err)
		}
		os.Remove(files[0])
		b, _ := os.ReadFile(files[1])
		b[100] ^= 1
		os.WriteFile(files[1], b, 0o644)
		os.WriteFile(dir+"/w1/surprise", nil, 0o644)
		os.Truncate(dir+"/w1/blocks", 5)
		code, text := workload(t, &v, "verify", "-dir", dir, "-log", log)
		for _, want := range []string{" is missing", " wrong contents: differs at 100", "surprise is there", "wrong contents: 5 bytes"} {
			if code != 1 || !strings.Contains(text, want) {
				t.Errorf("damage %q is not reported: %d %s", want, code, text)
			}
		}
	}
}

// A change that was begun and not acknowledged may have happened or not.
func TestVerifyAllowsTheUncertain(t *testing.T) {
	dir, log := t.TempDir(), filepath.Join(t.TempDir(), "log")
	old, young := contents(1, 4096), contents(2, 4096)
	steps := `{"op":"mkdir","path":"w"}
{"op":"mkdir","path":"w","ack":true}
{"op":"create","path":"w/f","seed":1,"size":4096}
{"op":"create","path":"w/f","seed":1,"size":4096,"ack":true}
{"op":"replace","path":"w/f","seed":2,"size":4096}
{"op":"create","path":"w/g","seed":3,"size":4096}
{"op":"rem`
	os.WriteFile(log, []byte(steps), 0o644)
	os.Mkdir(dir+"/w", 0o755)
	for name, c := range map[string]struct {
		f, g []byte
		ok   bool
	}{
		"neither happened":  {old, nil, true},
		"both happened":     {young, contents(3, 4096), true},
		"made, not written": {old, []byte{}, true},
		"half of each":      {append(bytes.Clone(young[:2048]), old[2048:]...), nil, false},
		"lost":              {nil, nil, false},
	} {
		for file, data := range map[string][]byte{"f": c.f, "g": c.g} {
			os.Remove(dir + "/w/" + file)
			if data != nil {
				os.WriteFile(dir+"/w/"+file, data, 0o644)
			}
		}
		var v Verification
		code, text := workload(t, &v, "verify", "-dir", dir, "-log", log)
		if (code == 0) != c.ok || v.Uncertain != 2 {
			t.Errorf("%s: %d %s %+v", name, code, text, v)
		}
	}
}

func TestCoherenceOfOneDirectory(t *testing.T) {
	dir := t.TempDir()
	var c Coherence
	if code, text := workload(t, &c, "coherence", "-rounds", "600", dir, dir, dir); code != 0 || c.Rounds != 600 || len(c.Kinds) != len(turns) {
		t.Errorf("%d %s %+v", code, text, c)
	}
	if rest, _ := os.ReadDir(dir); len(rest) != 0 {
		t.Errorf("left behind: %v", rest)
	}
	// Two directories are not one.
	if code, _ := workload(t, nil, "coherence", "-rounds", "50", dir, t.TempDir()); code == 0 {
		t.Error("two different directories were found coherent")
	}
	for kind := range turns {
		if code, _ := workload(t, nil, "coherence", "-rounds", "5", "-only", kind, dir, t.TempDir()); code == 0 {
			t.Errorf("%s: two different directories were found coherent", kind)
		}
	}
}

func TestSharedFiles(t *testing.T) {
	dir := t.TempDir()
	together := func(args func(i int) []string) {
		t.Helper()
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() {
				if code, text := workload(t, nil, args(i)...); code != 0 {
					t.Errorf("%q: %d %s", args(i), code, text)
				}
			})
		}
		wg.Wait()
	}
	for _, lock := range []string{"flock", "fcntl", "ofd"} {
		file := filepath.Join(dir, lock)
		together(func(int) []string { return []string{"counter", "-file", file, "-lock", lock, "-rounds", "300"} })
		if b, _ := os.ReadFile(file); strings.TrimSpace(string(b)) != "900" {
			t.Errorf("%s: counted to %s, want 900", lock, b)
		}
	}
	file := filepath.Join(dir, "records")
	together(func(i int) []string { return []string{"append", "-file", file, "-id", fmt.Sprint(i), "-n", "500"} })
	var a Appending
	if code, text := workload(t, &a, "append", "-file", file, "-check", "3", "-n", "500"); code != 0 || a.Records != 1500 {
		t.Errorf("append: %d %s %+v", code, text, a)
	}
	b, _ := os.ReadFile(file)
	lines := bytes.SplitAfter(b, []byte("\n"))
	for name, damaged := range map[string][]byte{
		"lost":      bytes.Join(append(append([][]byte{}, lines[:70]...), lines[71:]...), nil),
		"torn":      append(bytes.Clone(b[:1000]), b[1010:]...),
		"twice":     append(bytes.Clone(b), lines[len(lines)-2]...),
		"swapped":   bytes.Join(append([][]byte{lines[1], lines[0]}, lines[2:]...), nil),
		"truncated": b[:len(b)-3],
	} {
		os.WriteFile(file, damaged, 0o644)
		if code, _ := workload(t, nil, "append", "-file", file, "-check", "3", "-n", "500"); code != 1 && name != "swapped" {
			t.Errorf("records %s: not seen", name)
		}
	}
	var ring Ringing
	if code, text := workload(t, &ring, "ring", "-rounds", "60", dir, dir, dir); code != 0 || ring.Rounds != 60 {
		t.Errorf("ring: %d %s %+v", code, text, ring)
	}
	if code, _ := workload(t, &ring, "ring", "-rounds", "6", dir, t.TempDir()); code != 1 {
		t.Error("ring took two directories for one")
	}
	many := filepath.Join(dir, "many")
	if code, text := workload(t, nil, "files", "-dir", many, "-n", "250", "-size", "10"); code != 0 {
		t.Errorf("files: %d %s", code, text)
	}
	if l, _ := filepath.Glob(many + "/*/*"); len(l) != 250 {
		t.Errorf("%d files made, want 250", len(l))
	}
	race := filepath.Join(dir, "race")
	os.Mkdir(race, 0o755)
	together(func(i int) []string {
		return []string{"race", "-dir", race, "-duration", "300ms", "-seed", fmt.Sprint(i)}
	})
}

func TestFillANearlyFullDisk(t *testing.T) {
	var f Filling
	if code, text := workload(t, &f, "fill", "-file", filepath.Join(t.TempDir(), "f"), "-most", "1000000"); code != 1 || f.Bytes < 1000000 {
		t.Errorf("a disk with room: %d %s %+v", code, text, f)
	}
}

// A local file system explains all errors that stress meets.
func TestStress(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	if code, words := workload(t, nil, "stress", "-dir", dir, "-make", "-anchors", "50"); code != 0 {
		t.Fatal(words)
	}
	var wg sync.WaitGroup
	for seed := range 3 {
		wg.Go(func() {
			var s Stressing
			code, words := workload(t, &s, "stress", "-dir", dir, "-anchors", "50", "-duration", "1s", "-seed", fmt.Sprint(seed+1))
			if code != 0 || s.Held == 0 || s.Lists == 0 {
				t.Errorf("exit code %d: %s\n%+v", code, words, &s)
			}
		})
	}
	wg.Wait()
	// What is not there, and must be, is missed.
	if err := os.Remove(filepath.Join(dir, "a", anchorName(7))); err != nil {
		t.Fatal(err)
	}
	if code, words := workload(t, nil, "stress", "-dir", dir, "-anchors", "50", "-duration", "1s"); code != 1 || !strings.Contains(words, "missing in the listing") {
		t.Errorf("exit code %d: %s", code, words)
	}
}

// A history is not judged if close said that some of it is lost, which it may say only where a mount stood still.
func TestHistoryWithLosses(t *testing.T) {
	for _, c := range []struct {
		lossy        bool
		err          error
		faults, lost int
	}{{true, unix.EIO, 0, 1}, {true, nil, 1, 0}, {true, unix.ENOSPC, 2, 0}, {false, unix.EIO, 2, 0}} {
		l := &ledger{h: &History{Ops: map[string]int{}}, lossy: c.lossy, open: map[int]map[string][]porcupine.Operation{},
			lost: map[string]bool{}, at: make([]atomic.Int64, 1), shut: make([]atomic.Int64, 1)}
		l.add(porcupine.Operation{Input: deed{object: "r", op: "write", a: 7}, Output: answer{}, Call: 1, Return: 2})
		l.add(porcupine.Operation{Input: deed{object: "r", op: "read"}, Output: answer{}, Call: 3, Return: 4})
		l.closed("r", c.err)
		l.at[0].Store(1)
		if err := l.judge(); err != nil || l.h.Parts+l.h.Lost > 0 {
			t.Errorf("judged before all files are closed: %+v, %v", l.h, err)
		}
		l.shut[0].Store(1)
		if err := l.judge(); err != nil || len(l.h.Faults) != c.faults || l.h.Lost != c.lost || l.h.Parts+l.h.Lost != 1 {
			t.Errorf("lossy %v, close says %v: %+v, %v", c.lossy, c.err, l.h, err)
		}
	}
}

// A local file system's answers are explained by an order; false ones are not.
func TestHistory(t *testing.T) {
	dir := t.TempDir()
	var h History
	if code, words := workload(t, &h, "history", "-duration", "1s", dir, dir); code != 0 || h.Parts == 0 || h.Ops["look"] == 0 {
		t.Errorf("exit code %d: %s\n%+v", code, words, h)
	}
	if code, words := workload(t, nil, "history", "-duration", "1s", "-spoil", "50", t.TempDir()); code != 1 || !strings.Contains(words, "no order explains") {
		t.Errorf("exit code %d: %s", code, words)
	}
}
