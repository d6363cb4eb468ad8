package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// What others take of the machine makes a bound longer, what a test takes itself does not.
func TestGiven(t *testing.T) {
	const s = time.Second
	for _, c := range []struct {
		all, taken, own time.Duration
		want            float64
	}{
		{10 * s, 0, 0, 1}, {10 * s, 10 * s, 10 * s, 1}, {10 * s, 10 * s, 5 * s, 0.5}, {10 * s, 5 * s, 0, 0.5},
		{10 * s, 10 * s, 0, 0.1}, {10 * s, 4 * s, 5 * s, 1}, {0, 0, 0, 1},
	} {
		was := Shared{all: 3 * s, taken: 2 * s, own: s}
		if got := was.given(Shared{all: was.all + c.all, taken: was.taken + c.taken, own: was.own + c.own}); got != c.want {
			t.Errorf("of %v, %v taken and %v by itself: given %v, want %v", c.all, c.taken, c.own, got, c.want)
		}
	}

	proc := t.TempDir()
	for pid, of := range map[int]struct{ parent, user, system, reaped int }{
		1: {0, 1000, 1000, 1000}, 2: {0, 1, 0, 0}, 7: {2, 2, 0, 0}, 20: {1, 10, 20, 30}, 21: {20, 100, 0, 0}, 22: {21, 0, 200, 0}, 30: {1, 1000, 0, 0},
	} {
		dir := filepath.Join(proc, fmt.Sprint(pid))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprintf("%d (a name) S %d 0 0 0 0 0 0 0 0 0 %d %d %d 0 20 0 1 0 5 0 0 0\n", pid, of.parent, of.user, of.system, of.reaped)
		if err := os.WriteFile(filepath.Join(dir, "stat"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := family(processes(proc), 20, 2), 363*clockTick; got != want {
		t.Errorf("the family has had %v, want %v", got, want)
	}
}

// What a child has had, alive or not, is this process's own.
func TestShareOfChildren(t *testing.T) {
	before := Share()
	if out, err := exec.Command("sh", "-c", "i=0; while [ $i -lt 400000 ]; do i=$((i+1)); done").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	now := Share()
	if had := now.own - before.own; had < 2*clockTick {
		t.Errorf("it had %v", had)
	}
	if now.all <= before.all || now.taken <= before.taken || now.taken > now.all {
		t.Errorf("from %+v to %+v", before, now)
	}
}
