package dockervol

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

// uses are who uses what on this machine, and the decisions that follow from
// it. They are pure: a request and what the kernel shows come in, the steps to
// take come out, in an order that may end after any of them. For a use, the
// mount is made first and the use written down last, and the other way round at its end.
// So a crash leaves at most a mount without a use, which the next start sees and ends.
type uses struct {
	// Boot names the time since the machine was started: no use outlives it.
	Boot string `json:"boot"`
	// Held are the ids of the uses, sorted, by volume.
	Held map[string][]string `json:"held"`
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
	doHold         // write down a use
	doDrop         // write down its end
	doReset        // write down that there are none, in a new boot
)

// step is one thing to do.
type step struct {
	what what
	name string
	id   string // doHold, doDrop; the boot of doReset
}

// mount decides what a request for a mount takes.
func (u *uses) mount(name, id string, seen Seen) (plan []step) {
	if seen == dead {
		plan = append(plan, step{what: doUnmount, name: name})
	}
	if seen != alive {
		plan = append(plan, step{what: doMount, name: name})
	}
	if !slices.Contains(u.Held[name], id) {
		plan = append(plan, step{doHold, name, id})
	}
	return plan
}

// unmount decides what the end of a use takes.
func (u *uses) unmount(name, id string, seen Seen) (plan []step) {
	held := u.Held[name]
	if slices.Contains(held, id) {
		plan = append(plan, step{doDrop, name, id})
		if len(held) > 1 {
			return plan
		}
	} else if len(held) > 0 {
		return nil
	}
	if seen != absent {
		plan = append(plan, step{what: doUnmount, name: name})
	}
	return plan
}

// start decides what to do when the daemon starts and finds these volumes mounted.
func (u *uses) start(boot string, mounted []string) (plan []step) {
	held := u.Held
	if u.Boot != boot {
		held = nil
		plan = append(plan, step{what: doReset, id: boot})
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
		next.Held = map[string][]string{}
	}
	ids := slices.Clone(next.Held[s.name])
	switch s.what {
	case doReset:
		return &uses{Boot: s.id, Held: map[string][]string{}}
	case doHold:
		ids = append(ids, s.id)
	case doDrop:
		ids = slices.DeleteFunc(ids, func(id string) bool { return id == s.id })
	}
	slices.Sort(ids)
	if next.Held[s.name] = ids; len(ids) == 0 {
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
	temp := path + ".new"
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(raw, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("what containers use cannot be written down: %w", err), os.Remove(temp))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
