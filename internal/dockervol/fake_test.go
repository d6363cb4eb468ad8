package dockervol

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// world is all that outlives a daemon: the pool, what is mounted, and the file.
type world struct {
	mu       sync.Mutex // guards mounts where calls overlap
	volumes  map[string]*Volume
	backings []Backing
	mounts   map[string]Seen // by directory
	prepared map[string]bool
	fail     error           // of the next mount
	blind    bool            // engines do not see mounts
	engine   string          // the process that asks
	shown    map[string]bool // directories that containers have
	steps    int             // left until the daemon dies; negative: it lives
	boot     string          // of the machine
	dir      string
	made     []Volume
	buried   []string // directories of mounts whose end the pool was told
	poolless error    // the machine is in no pool
}

// errDied ends whatever a daemon that dies was doing.
var errDied = errors.New("the daemon has died")

// live counts a step of the daemon, and reports whether it dies before it.
func (w *world) live() error {
	if w.steps == 0 {
		return errDied
	}
	w.steps--
	return nil
}

func newWorld(dir string) *world {
	return &world{volumes: map[string]*Volume{}, mounts: map[string]Seen{}, prepared: map[string]bool{}, steps: -1, boot: "first", engine: "1@1", shown: map[string]bool{}, dir: dir,
		backings: []Backing{{Name: "wp", Replica: 3, Started: true}}}
}

func (w *world) Find(name string) *Volume {
	if v := w.volumes[name]; v != nil {
		c := *v
		return &c
	}
	return nil
}

func (w *world) List() (all []Volume) {
	for _, v := range w.volumes {
		all = append(all, *v)
	}
	return all
}
func (w *world) Backings() ([]Backing, error) { return w.backings, w.poolless }
func (w *world) Refresh(context.Context)      {}
func (w *world) Create(_ context.Context, v Volume) error {
	v.State = Ready
	w.volumes[v.Name] = &v
	w.made = append(w.made, v)
	return nil
}
func (w *world) Remove(_ context.Context, name string) error {
	delete(w.volumes, name)
	return nil
}

func (w *world) Mount(ctx context.Context, v *Volume, dir string) error {
	if err := w.live(); err != nil {
		return err
	}
	if points, _ := w.Mounts(); points[dir] {
		return fmt.Errorf("%s is a mount already", dir)
	}
	if !w.prepared[dir] {
		return fmt.Errorf("%s is not prepared", dir)
	}
	if err := w.fail; err != nil {
		w.fail = nil
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mounts[dir] = alive
	return nil
}

func (w *world) Ended(_ context.Context, v *Volume, dir string) error {
	if points, _ := w.Mounts(); points[dir] {
		return fmt.Errorf("%s is buried and there", dir)
	}
	w.buried = append(w.buried, dir)
	return errors.New("the pool may not hear of it")
}

func (w *world) Mounts() (map[string]bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	points := map[string]bool{}
	for dir := range w.mounts {
		points[dir] = true
	}
	return points, nil
}

func (w *world) Lives(dir string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.mounts[dir] == alive
}

func (w *world) Prepare(dir string) error {
	w.prepared[dir] = true
	return w.live()
}
func (w *world) Unmount(dir string) error {
	if err := w.live(); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.mounts, dir)
	delete(w.prepared, dir)
	return nil
}
func (w *world) Shows(pid int, dir string) error {
	if w.blind {
		return errors.New("it does not see it")
	}
	return nil
}

// daemon starts one in the world.
func (w *world) daemon(t interface{ Fatal(...any) }) *Driver {
	d, err := New(Config{Pool: w, Mounter: w, Kernel: w, Engine: new(lazy), Dir: "/mnt", File: filepath.Join(w.dir, "docker.json"), Boot: w.boot,
		Patience: time.Second, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	write := d.write
	d.write = func(u *uses) error {
		if err := w.live(); err != nil {
			return err
		}
		return write(u)
	}
	return d
}

func testWorld(t *testing.T, names ...string) *world {
	w := newWorld(t.TempDir())
	for _, n := range names {
		w.volumes[n] = &Volume{Name: n, Volume: "wp", Dir: n, Own: true, Mode: 0o755, State: Ready, Created: time.Unix(0, 0)}
	}
	return w
}

func (w *world) Process(pid int) string {
	if pid == 0 {
		return ""
	}
	return w.engine
}
func (w *world) Gone(process string) bool           { return process != w.engine }
func (w *world) Elsewhere(dir string) (bool, error) { return w.shown[dir], nil }
