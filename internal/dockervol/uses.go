package dockervol

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"mortar/internal/disk"
)

// uses are who uses what on this machine, and the decisions that follow from
// it. They are pure: a request and what the kernel shows come in, the steps to
// take come out, in an order that may end after any of them. For a use, the
// mount is made first and the use written down last, and the other way round at its end.
// So a crash leaves at most a mount without a use, which the next start sees and ends.
type uses struct {
	// Boot names the time since the machine was started: no use outlives it.
	Boot string `json:"boot"`
	// Held are the uses by volume, each sorted by id.
	Held map[string][]use `json:"held"`
}

// use is one container's use of a volume, from the answer to the engine's request
// on. An engine that is killed, or gives up while no daemon answers, does not always
// say that it is done.
type use struct {
	ID     string `json:"id"`     // the engine's
	Engine string `json:"engine"` // the process that asked; empty: not known
	Since  int64  `json:"since"`  // Unix seconds
}

// grace is for how long an engine may take to start a container once it has a volume:
// another one of it may have to wait for its pool.
const grace = 5 * time.Minute

// doubtful reports whether the uses of a volume count no more if no container
// shows it: those who asked for them have ended, or had time enough.
func (u *uses) doubtful(name string, now time.Time, gone func(engine string) bool) bool {
	held := u.Held[name]
	return len(held) > 0 && !slices.ContainsFunc(held, func(x use) bool {
		return x.Engine == "" || !gone(x.Engine) && now.Sub(time.Unix(x.Since, 0)) < grace
	})
}

// abandon decides what to do about a volume that nobody uses any more.
func (u *uses) abandon(name string, seen Seen) (plan []step) {
	for _, x := range u.Held[name] {
		plan = append(plan, step{what: doDrop, name: name, use: x})
	}
	return append(plan, end(name, seen)...)
}

// end decides what to do about what is at a mount point that nobody uses any more.
func end(name string, seen Seen) (plan []step) {
	if seen != absent {
		plan = append(plan, step{what: doUnmount, name: name})
	}
	if seen == dead {
		plan = append(plan, step{what: doBury, name: name})
	}
	return plan
}

// has reports whether a volume has the use with that id.
func (u *uses) has(name, id string) bool {
	return slices.ContainsFunc(u.Held[name], func(x use) bool { return x.ID == id })
}

// Seen is what the kernel shows at a mount point.
type Seen uint8

const (
	absent Seen = iota // nothing
	alive              // a mount
	dead               // a mount whose process has ended
)

// what is a kind of step.
type what uint8

const (
	doMount   what = iota
	doUnmount      // also of a dead one
	doBury         // let the pool know of the death of one that is unmounted
	doHold         // write down a use
	doDrop         // write down its end
	doReset        // write down that there are none, in a new boot
)

// step is one thing to do.
type step struct {
	what what
	name string
	use  use    // doHold, doDrop
	boot string // doReset
}

// mount decides what a request for a mount takes.
func (u *uses) mount(name string, x use, seen Seen) (plan []step) {
	if seen == dead {
		plan = end(name, seen)
	}
	if seen != alive {
		plan = append(plan, step{what: doMount, name: name})
	}
	if !slices.Contains(u.Held[name], x) {
		plan = append(plan, step{what: doHold, name: name, use: x})
	}
	return plan
}

// unmount decides what the end of a use takes.
func (u *uses) unmount(name, id string, seen Seen) (plan []step) {
	held := u.Held[name]
	if u.has(name, id) {
		plan = append(plan, step{what: doDrop, name: name, use: use{ID: id}})
		if len(held) > 1 {
			return plan
		}
	} else if len(held) > 0 {
		return nil
	}
	return append(plan, end(name, seen)...)
}

// start decides what to do when the daemon starts and finds these volumes mounted.
func (u *uses) start(boot string, mounted []string) (plan []step) {
	held := u.Held
	if u.Boot != boot {
		held = nil
		plan = append(plan, step{what: doReset, boot: boot})
	}
	for _, name := range mounted {
		if len(held[name]) == 0 {
			plan = append(plan, step{what: doUnmount, name: name})
		}
	}
	return plan
}

// after returns the uses after a step that writes.
func (u *uses) after(s step) *uses {
	next := &uses{Boot: u.Boot, Held: maps.Clone(u.Held)}
	if next.Held == nil {
		next.Held = map[string][]use{}
	}
	// The same use asked for again counts once, for who asked last.
	held := slices.DeleteFunc(slices.Clone(next.Held[s.name]), func(x use) bool { return x.ID == s.use.ID })
	switch s.what {
	case doReset:
		return &uses{Boot: s.boot, Held: map[string][]use{}}
	case doHold:
		held = append(held, s.use)
	}
	slices.SortFunc(held, func(a, b use) int { return strings.Compare(a.ID, b.ID) })
	if next.Held[s.name] = held; len(held) == 0 {
		delete(next.Held, s.name)
	}
	return next
}

// readUses reads the file, which need not exist.
func readUses(path string) (*uses, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &uses{}, nil
	}
	if err != nil {
		return nil, err
	}
	u := new(uses)
	if err := json.Unmarshal(raw, u); err != nil {
		return nil, fmt.Errorf("%s, which tells what containers use, cannot be read: %w; if no container on this machine uses a volume of mortar, remove it", path, err)
	}
	return u, nil
}

// write replaces the file, and returns when that is on the disk.
func (u *uses) write(path string) error {
	raw, err := json.MarshalIndent(u, "", "\t")
	if err != nil {
		return err
	}
	if err := disk.WriteFile(disk.OS, path, append(raw, '\n')); err != nil {
		return fmt.Errorf("what containers use cannot be written down: %w", err)
	}
	return nil
}
