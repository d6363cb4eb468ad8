package main

import (
	"encoding/json"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"mortar/bench/figure"
)

// Every group but php and db, which need half a gigabyte of programs and a minute, runs to its
// end on a plain directory, measures something each round, and leaves nothing there.
func TestAllGroups(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: cold reads need root")
	}
	bin := filepath.Join(t.TempDir(), "workload")
	if out, err := exec.Command("go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	dir := t.TempDir()
	cold := filepath.Join(t.TempDir(), "cold")
	cmd := exec.Command(bin, "-dir", dir, "-only", "small,tree,large,sync", "-rounds", "2", "-scale", "0.01", "-cpu", "-json", "-cold", "echo >>"+cold)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var figures []figure.Figure
	if err := json.Unmarshal(out, &figures); err != nil {
		t.Fatal(err)
	}
	if len(figures) < 35 {
		t.Errorf("%d figures, want all", len(figures))
	}
	for _, f := range figures {
		if len(f.Rounds) != 2 || f.Median <= 0 || math.IsInf(f.Median, 0) || len(f.CPURounds) != 2 {
			t.Errorf("%+v", f)
		}
	}
	if b, err := os.ReadFile(cold); err != nil || len(b) < 2*5 {
		t.Errorf("the -cold command ran %d times (%v)", len(b), err)
	}
	if rest, _ := os.ReadDir(dir); len(rest) != 0 {
		t.Errorf("left behind: %v", rest)
	}
	for _, args := range [][]string{{}, {"-dir", dir, "-only", "smal"}, {"-dir", dir, "-rounds", "0"}, {"-dir", dir, "x"}, {"-dir", dir + "/none"}} {
		out, err := exec.Command(bin, args...).CombinedOutput()
		if err == nil || !strings.HasPrefix(string(out), "workload: ") {
			t.Errorf("workload %q: %v, %s", args, err, out)
		}
	}
}
