// Package dockervol is the volume driver of Docker engines: the nine calls of their
// plugin protocol, on a unix socket.
//
// A Docker volume is a directory of a volume, and the pool knows which there
// are (Pool). What is of this machine alone is which containers use one: the engine
// names each use by an id when it asks for a mount, and again when it is done. As
// long as there is a use, the directory is mounted, once, by a process of its
// own (Mounter), so that neither the daemon nor the engine takes it along when
// it ends. The uses are kept in a file that is written before the engine is told.
//
// A path that is told to an engine shows the volume or cannot be used: what is
// below a mount is a directory that nobody can write in, and it is gone when the
// mount is.
package dockervol

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// State is the life of a Docker volume.
type State uint8

const (
	Making   State = iota // its directory may not be there yet
	Ready                 // it may be mounted
	Removing              // it may not any more
)

func (s State) String() string { return [...]string{"making", "ready", "removing"}[s] }

// Volume is a Docker volume as the pool knows it.
type Volume struct {
	Name     string
	Volume   string // of the pool
	Dir      string // of that
	Own      bool   // Dir was made for it, and goes with it
	Size     uint64 // bytes; 0: no limit
	UID, GID uint32
	Mode     uint32
	ReadOnly bool
	Created  time.Time
	State    State
}

// Backing is a volume of the pool, in which Docker volumes may be.
type Backing struct {
	Name    string
	Replica int
	Started bool
}

// Pool is what the driver asks of the rest of the program.
type Pool interface {
	// Find and List answer from this machine's copy of the configuration, at
	// once. Find returns nil if there is none of that name.
	Find(name string) *Volume
	List() []Volume
	// Backings says why there are none where the machine is in no pool.
	Backings() ([]Backing, error)
	// Refresh brings the copy up to date, if that can be had in a moment.
	Refresh(ctx context.Context)
	// Create makes a volume, or finishes one that is being made. It waits for the
	// pool. One of that name that is there is an error.
	Create(ctx context.Context, v Volume) error
	// Remove removes a volume that no machine uses; InUse is asked here.
	Remove(ctx context.Context, name string) error
}

// Mounter mounts a Docker volume at a directory, and returns when that shows it,
// or with the reason why it does not.
type Mounter interface {
	Mount(ctx context.Context, v *Volume, dir string) error
	// Ended lets the pool know that the process of the mount that was at dir has
	// ended without a word and will not come back, so that it is not waited for.
	Ended(ctx context.Context, v *Volume, dir string) error
}

// Config is what a Driver is made of.
type Config struct {
	Pool    Pool
	Mounter Mounter
	Kernel  Kernel
	Engine  Engine
	// Dir is where the mount points are.
	Dir string
	// File keeps the uses.
	File string
	// Boot names the time since the machine was started.
	Boot string
	// Default is the volume of the pool for those who name none; empty: the only one.
	Default string
	// Patience is how long Create and Mount wait for the pool.
	Patience time.Duration
	Log      *slog.Logger
}

// Patience is what engines allow Create and Mount, less the time to say why not.
const Patience = 110 * time.Second

// brief is what engines allow all other calls, less the same.
const brief = 50 * time.Second

// Driver answers engines.
type Driver struct {
	cfg   Config
	write func(*uses) error // returns when they are on the disk

	mu    sync.Mutex // guards the fields below
	uses  *uses
	slots map[string]*slot
}

// slot is a name that requests are about.
type slot struct {
	turn  chan struct{} // held by the request that is being carried out
	count int           // of requests
	mount int           // of these, for a mount
}

// New reads what was kept, and ends mounts that nobody uses.
func New(cfg Config) (*Driver, error) {
	u, err := readUses(cfg.File)
	if err != nil {
		return nil, err
	}
	d := &Driver{cfg: cfg, uses: u, slots: map[string]*slot{}, write: func(u *uses) error { return u.write(cfg.File) }}
	points, err := cfg.Kernel.Mounts()
	if err != nil {
		return nil, err
	}
	var mounted []string
	for _, dir := range slices.Sorted(maps.Keys(points)) {
		if filepath.Dir(dir) == cfg.Dir {
			mounted = append(mounted, filepath.Base(dir))
		}
	}
	d.carry(context.Background(), nil, u.start(cfg.Boot, mounted), func(s step, err error) {
		cfg.Log.Warn("a mount that no container uses could not be ended", "volume", s.name, "error", err)
	})
	return d, nil
}

// enter waits for the turn of a request about name.
func (d *Driver) enter(ctx context.Context, name string, mount bool) (leave func(), err error) {
	d.mu.Lock()
	s := d.slots[name]
	if s == nil {
		s = &slot{turn: make(chan struct{}, 1)}
		d.slots[name] = s
	}
	s.count++
	if mount {
		s.mount++
	}
	d.mu.Unlock()
	out := func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if mount {
			s.mount--
		}
		if s.count--; s.count == 0 {
			delete(d.slots, name)
		}
	}
	select {
	case s.turn <- struct{}{}:
		return func() { <-s.turn; out() }, nil
	case <-ctx.Done():
		out()
		return nil, fmt.Errorf("Docker volume %s: an earlier request about it has not ended yet; try again in a moment", name)
	}
}

// InUse says how many containers of this machine use a volume, or are about to.
func (d *Driver) InUse(name string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := len(d.uses.Held[name])
	if s := d.slots[name]; s != nil {
		n += s.mount
	}
	return n
}

// find looks for a volume, also for one that another machine has made just now.
func (d *Driver) find(ctx context.Context, name string) (*Volume, error) {
	v := d.cfg.Pool.Find(name)
	if v == nil {
		d.cfg.Pool.Refresh(ctx)
		v = d.cfg.Pool.Find(name)
	}
	if v == nil {
		return nil, fmt.Errorf("there is no Docker volume %s: make it with \"docker volume create -d mortar %s\"", name, name)
	}
	return v, nil
}

// Create makes a volume.
func (d *Driver) Create(ctx context.Context, name string, options map[string]string) error {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.Patience)
	defer cancel()
	w, err := parseOptions(name, options)
	if err != nil {
		return err
	}
	leave, err := d.enter(ctx, name, false)
	if err != nil {
		return err
	}
	defer leave()
	d.cfg.Pool.Refresh(ctx)
	have := d.cfg.Pool.Find(name)
	if have != nil && have.State == Ready {
		return w.same(have)
	}
	v := w.Volume
	if have != nil {
		if err := w.same(have); err != nil {
			return err
		}
		v = *have
	} else {
		all, err := d.cfg.Pool.Backings()
		if err != nil {
			return fmt.Errorf("Docker volume %s: %w", name, err)
		}
		if v.Volume, err = w.choose(all, d.cfg.Default); err != nil {
			return err
		}
	}
	return d.cfg.Pool.Create(ctx, v)
}

// Remove removes a volume.
func (d *Driver) Remove(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, brief)
	defer cancel()
	leave, err := d.enter(ctx, name, false)
	if err != nil {
		return err
	}
	defer leave()
	if _, err := d.find(ctx, name); err != nil {
		return err
	}
	return d.cfg.Pool.Remove(ctx, name)
}

// Mount mounts a volume for the container that id stands for, and returns where.
func (d *Driver) Mount(ctx context.Context, name, id string, engine int) (dir string, err error) {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.Patience)
	defer cancel()
	if id == "" {
		return "", errors.New("the engine gave no id for the mount")
	}
	// From here on the volume is in use, and so cannot be removed. What is known
	// of it is looked at after that.
	leave, err := d.enter(ctx, name, true)
	if err != nil {
		return "", err
	}
	defer leave()
	v, err := d.find(ctx, name)
	if err != nil {
		return "", err
	}
	switch v.State {
	case Removing:
		return "", fmt.Errorf("Docker volume %s is being removed", name)
	case Making: // somebody died over it
		if err := d.cfg.Pool.Create(ctx, *v); err != nil {
			return "", err
		}
	}
	dir = d.dir(name)
	seen, err := d.look(dir)
	if err != nil {
		return "", err
	}
	err = d.act(ctx, v, func(u *uses) []step {
		return u.mount(name, use{ID: id, Engine: d.cfg.Kernel.Process(engine), Since: time.Now().Unix()}, seen)
	})
	if err == nil {
		err = d.cfg.Kernel.Shows(engine, dir)
	}
	if err != nil {
		d.undo(ctx, name, id)
		return "", err
	}
	return dir, nil
}

// undo takes back a use that the engine was not told of, as far as that can be done:
// what is left is ended with the next use, or when the daemon starts.
func (d *Driver) undo(ctx context.Context, name, id string) {
	if err := d.release(ctx, name, id); err != nil {
		d.cfg.Log.Warn("what is left of a mount that failed remains for now", "volume", name, "error", err)
	}
}

// Unmount ends the use that id stands for. One that is not known has ended.
func (d *Driver) Unmount(ctx context.Context, name, id string) error {
	ctx, cancel := context.WithTimeout(ctx, brief)
	defer cancel()
	leave, err := d.enter(ctx, name, false)
	if err != nil {
		return err
	}
	defer leave()
	return d.release(ctx, name, id)
}

// release ends a use within the turn of the name.
func (d *Driver) release(ctx context.Context, name, id string) error {
	seen, err := d.look(d.dir(name))
	if err != nil {
		return err
	}
	return d.act(ctx, nil, func(u *uses) []step { return u.unmount(name, id, seen) })
}

// tendEvery is how often the driver looks for uses whose end it was not told.
const tendEvery = 5 * time.Second

// tend ends, until ctx does, uses whose end no engine tells.
func (d *Driver) tend(ctx context.Context) {
	tick := time.NewTicker(tendEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			d.sweep(ctx)
		case <-ctx.Done():
			return
		}
	}
}

// sweep ends the uses of volumes that no container has, where who asked for them
// is gone or had time enough. Were it wrong, a container that is being started would fail
// to start; those that run have what they have.
func (d *Driver) sweep(ctx context.Context) {
	d.mu.Lock()
	u := d.uses
	d.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(u.Held)) {
		if !u.doubtful(name, time.Now(), d.cfg.Kernel.Gone) {
			continue
		}
		if err := d.check(ctx, name); err != nil {
			d.cfg.Log.Warn("whether a container still uses a volume is not known", "volume", name, "error", err)
		}
	}
}

// check ends the uses of a volume if no container has it.
func (d *Driver) check(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, tendEvery)
	defer cancel()
	leave, err := d.enter(ctx, name, false)
	if err != nil {
		return err
	}
	defer leave()
	if shown, err := d.cfg.Kernel.Elsewhere(d.dir(name)); err != nil || shown {
		return err
	}
	seen, err := d.look(d.dir(name))
	if err != nil {
		return err
	}
	return d.act(ctx, nil, func(u *uses) (plan []step) {
		if u.doubtful(name, time.Now(), d.cfg.Kernel.Gone) {
			plan = u.abandon(name, seen)
		}
		if len(plan) > 0 {
			d.cfg.Log.Info("no container uses the volume any more, and the engine did not say so", "volume", name)
		}
		return plan
	})
}

// act carries out what is planned on the uses as they are now, within the turn of the name.
func (d *Driver) act(ctx context.Context, v *Volume, plan func(*uses) []step) error {
	d.mu.Lock()
	steps := plan(d.uses)
	d.mu.Unlock()
	return d.carry(ctx, v, steps, nil)
}

// carry carries out a plan, up to the first step that fails. With skip, the
// others are carried out nevertheless.
func (d *Driver) carry(ctx context.Context, v *Volume, plan []step, skip func(step, error)) error {
	for _, s := range plan {
		err := d.step(ctx, v, s)
		if err != nil && skip == nil {
			return err
		}
		if err != nil {
			skip(s, err)
		}
	}
	return nil
}

func (d *Driver) step(ctx context.Context, v *Volume, s step) error {
	dir := d.dir(s.name)
	switch s.what {
	case doMount:
		if err := d.cfg.Kernel.Prepare(dir); err != nil {
			return err
		}
		if err := d.cfg.Mounter.Mount(ctx, v, dir); err != nil {
			// What is not mounted has no place either.
			return errors.Join(fmt.Errorf("Docker volume %s: %w", s.name, err), d.cfg.Kernel.Unmount(dir))
		}
		return nil
	case doUnmount:
		return d.cfg.Kernel.Unmount(dir)
	case doBury:
		d.bury(ctx, s.name)
		return nil
	default:
		d.mu.Lock()
		defer d.mu.Unlock()
		next := d.uses.after(s)
		if err := d.write(next); err != nil {
			return err
		}
		d.uses = next
		return nil
	}
}

// buryLimit bounds what the pool's hearing of a death may cost the container that comes next. What it
// does not hear it finds out after a while.
const buryLimit = 2 * time.Second

// bury lets the pool know of a mount whose process has ended, within the turn of the name: the next mount is
// not there yet.
func (d *Driver) bury(ctx context.Context, name string) {
	ctx, cancel := context.WithTimeout(ctx, buryLimit)
	defer cancel()
	v := d.cfg.Pool.Find(name)
	if v == nil {
		return
	}
	if err := d.cfg.Mounter.Ended(ctx, v, d.dir(name)); err != nil {
		d.cfg.Log.Info("the pool has not heard that a mount has ended, and waits for it a while", "volume", name, "error", err)
	}
}

func (d *Driver) dir(name string) string { return d.cfg.Dir + "/" + name }

// look asks the kernel what is at a mount point.
func (d *Driver) look(dir string) (Seen, error) {
	points, err := d.cfg.Kernel.Mounts()
	switch {
	case err != nil || !points[dir]:
		return absent, err
	case !d.cfg.Kernel.Lives(dir):
		return dead, nil
	}
	return alive, nil
}

// Path is where the volume is mounted.
func (d *Driver) Path(ctx context.Context, name string) (string, error) {
	if _, err := d.find(ctx, name); err != nil {
		return "", err
	}
	points, err := d.cfg.Kernel.Mounts()
	if err != nil {
		return "", err
	}
	dir := d.dir(name)
	if !points[dir] {
		return "", fmt.Errorf("Docker volume %s is not mounted on this machine: no container here uses it", name)
	}
	return dir, nil
}

// Get describes a volume.
func (d *Driver) Get(ctx context.Context, name string) (*description, error) {
	v, err := d.find(ctx, name)
	if err != nil {
		return nil, err
	}
	points, err := d.cfg.Kernel.Mounts()
	if err != nil {
		return nil, err
	}
	return d.describe(v, points), nil
}

// List describes all volumes.
func (d *Driver) List() ([]*description, error) {
	points, err := d.cfg.Kernel.Mounts()
	if err != nil {
		return nil, err
	}
	var all []*description
	for _, v := range d.cfg.Pool.List() {
		all = append(all, d.describe(&v, points))
	}
	slices.SortFunc(all, func(a, b *description) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

func (d *Driver) describe(v *Volume, points map[string]bool) *description {
	status := map[string]any{"volume": v.Volume, "directory": "/" + v.Dir, "state": v.State.String(), "containers": d.InUse(v.Name)}
	if v.ReadOnly {
		status["ro"] = true
	}
	if v.Size > 0 {
		status["size"] = v.Size
	}
	out := &description{Name: v.Name, CreatedAt: v.Created.UTC().Format(time.RFC3339), Status: status}
	if dir := d.dir(v.Name); points[dir] {
		out.Mountpoint = dir
	}
	return out
}
