package dockervol

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestCrashes: whatever an engine asks, whichever step a daemon dies before, and
// whatever becomes of mounts meanwhile: what the engine was told is mounted stays so
// until it says that it is done; and once it is done with everything and a daemon has
// started, nothing is mounted, and nothing is written down.
func TestCrashes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp("", "mortar-uses-")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		w := newWorld(dir)
		names := []string{"demo", "app"}
		for _, n := range names {
			w.volumes[n] = &Volume{Name: n, Volume: "wp", Dir: n, State: Ready}
		}
		d := w.daemon(t)
		ctx := t.Context()
		type use struct{ name, id string }
		told := map[use]bool{} // mounts that the engine was told of
		open := map[use]bool{} // and those where it has had no answer, or an error
		ask := func(n int, do func() error) bool {
			w.steps = n
			err := do()
			died := w.steps == 0 && errors.Is(err, errDied)
			w.steps = -1
			if died { // and another is started, with what is on the disk
				d = w.daemon(t)
			}
			return err == nil
		}
		for range rapid.IntRange(1, 25).Draw(t, "requests") {
			u := use{rapid.SampledFrom(names).Draw(t, "name"), fmt.Sprint(rapid.IntRange(1, 3).Draw(t, "id"))}
			life := rapid.SampledFrom([]int{-1, -1, 0, 1, 2, 3}).Draw(t, "steps until death")
			switch rapid.IntRange(0, 9).Draw(t, "what") {
			case 0, 1, 2, 3:
				open[u] = true
				if ask(life, func() error { _, err := d.Mount(ctx, u.name, u.id, 1); return err }) {
					told[u] = true
				}
			case 4, 5, 6:
				delete(told, u)
				if ask(life, func() error { return d.Unmount(ctx, u.name, u.id) }) {
					delete(open, u)
				}
			case 7: // the mount's process is killed
				for dir := range w.mounts {
					w.mounts[dir] = dead
				}
				clear(told) // what it was told is true no more, and it will say that it is done
			case 8: // the machine is started again: containers have ended
				w.boot += "x"
				clear(w.mounts)
				clear(told)
				clear(open)
				d = w.daemon(t)
			case 9:
				d = w.daemon(t)
			}
			for u := range told {
				if w.mounts["/mnt/"+u.name] != alive {
					t.Fatalf("%v was told that it is mounted, and it is not", u)
				}
				if !d.uses.has(u.name, u.id) {
					t.Fatalf("%v was told that it is mounted, and it is not written down", u)
				}
			}
		}
		for u := range maps.Clone(open) {
			if err := d.Unmount(ctx, u.name, u.id); err != nil {
				t.Fatal(err)
			}
		}
		d = w.daemon(t)
		if len(w.mounts) > 0 || len(d.uses.Held) > 0 {
			t.Fatalf("at the end: mounts %v, uses %v", w.mounts, d.uses.Held)
		}
	})
}

// TestDiskFull: what cannot be written down is not told, and leaves no mount.
func TestDiskFull(t *testing.T) {
	w := testWorld(t, "demo")
	d := w.daemon(t)
	d.write = func(u *uses) error { return u.write(w.dir + "/absent/docker.json") }
	if _, err := d.Mount(t.Context(), "demo", "a", 0); err == nil {
		t.Fatal("mounted")
	}
	if len(w.mounts) > 0 || len(d.uses.Held) > 0 {
		t.Fatalf("mounts %v, uses %v", w.mounts, d.uses.Held)
	}
}

// TestDamagedUses: what cannot be read is not taken for nothing.
func TestDamagedUses(t *testing.T) {
	w := testWorld(t, "demo")
	file := w.dir + "/docker.json"
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Kernel: w, File: file}); err == nil {
		t.Fatal("started")
	}
}

// TestBuried: of a mount whose process has ended the pool is told, once, when it is not there any
// more and the next one is not yet; of one that is unmounted in order it hears by itself.
func TestBuried(t *testing.T) {
	w := testWorld(t, "demo")
	d := w.daemon(t)
	mount := func(id string) {
		t.Helper()
		if _, err := d.Mount(t.Context(), "demo", id, 1); err != nil {
			t.Fatal(err)
		}
	}
	unmount := func(id string) {
		t.Helper()
		if err := d.Unmount(t.Context(), "demo", id); err != nil {
			t.Fatal(err)
		}
	}
	buried := func(want int) {
		t.Helper()
		if len(w.buried) != want {
			t.Fatalf("told of %q, want %d", w.buried, want)
		}
	}
	mount("a")
	unmount("a")
	buried(0)
	mount("a")
	w.mounts["/mnt/demo"] = dead
	mount("b") // the next one
	buried(1)
	unmount("a")
	buried(1)
	w.mounts["/mnt/demo"] = dead
	unmount("b")
	buried(2)
	mount("a")
	w.mounts["/mnt/demo"] = dead
	w.engine = "2@2" // who asked is gone too
	d.sweep(t.Context())
	buried(3)
	if len(w.mounts) > 0 {
		t.Errorf("mounted: %v", w.mounts)
	}
}

// TestNoPool: where there is no pool, that is said, and not that it has no volume.
func TestNoPool(t *testing.T) {
	w := testWorld(t)
	w.backings, w.poolless = nil, errors.New("join one")
	if err := w.daemon(t).Create(t.Context(), "demo", nil); err == nil || err.Error() != "Docker volume demo: join one" {
		t.Errorf("%v", err)
	}
}

// TestAbandoned: uses whose end no engine tells end when no container has the
// volume and their engine is gone, or has had time enough to start one; no sooner.
func TestAbandoned(t *testing.T) {
	w := testWorld(t, "demo")
	d := w.daemon(t)
	mounted := func(want bool) {
		t.Helper()
		d.sweep(t.Context())
		if (len(w.mounts) > 0) != want || (d.InUse("demo") > 0) != want {
			t.Fatalf("mounts %v, uses %v", w.mounts, d.uses.Held)
		}
	}
	mount := func(id string, engine int) {
		t.Helper()
		if _, err := d.Mount(t.Context(), "demo", id, engine); err != nil {
			t.Fatal(err)
		}
	}
	mount("a", 1)
	mounted(true) // its container is about to be started
	w.shown["/mnt/demo"] = true
	w.engine = "2@2"
	mounted(true) // the engine died, the container runs
	w.shown["/mnt/demo"] = false
	mount("b", 2)
	mounted(true) // the next engine is about to start one
	w.shown["/mnt/demo"] = true
	if err := d.Unmount(t.Context(), "demo", "b"); err != nil {
		t.Fatal(err)
	}
	mounted(true)
	w.shown["/mnt/demo"] = false
	mounted(false)

	// The same use, asked for by the next engine, is that one's.
	mount("a", 2)
	w.engine = "3@3"
	mount("a", 3)
	mounted(true)
	w.engine = "4@4"
	mounted(false)

	mount("a", 4)
	x := d.uses.Held["demo"][0]
	x.Since -= int64(grace / time.Second)
	d.uses.Held["demo"][0] = x
	mounted(false)

	mount("a", 0) // nobody knows by whom
	w.engine = "5@5"
	mounted(true)
}
