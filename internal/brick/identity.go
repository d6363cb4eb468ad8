package brick

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

// FormatVersion is the version of a brick's layout on disk, which a brick has from the
// day on that it is made, or first served by a program that knows it. A newer one is
// refused, so that nobody serves a brick without knowing the rules that hold for it:
//
//	2  blocks of data files have no checksums
//	3  they may have, and rule 4 holds (sums.go)
const FormatVersion = 3

// oldestFormat is the first one that is understood.
const oldestFormat = 2

// Identity says what a brick is part of. It is written once, to brick.json.
type Identity struct {
	Format int              `json:"format"` // FormatVersion; 0 in a call stands for it
	Pool   cluster.ID       `json:"pool"`
	Volume cluster.VolumeID `json:"volume"`
	Set    cluster.SetIndex `json:"set"`
	Brick  cluster.BrickID  `json:"brick"`
}

var (
	// ErrNoBrick says that a directory has no brick in it.
	ErrNoBrick = errors.New("there is no brick here")
	// ErrOtherBrick says that a directory has another brick than the one expected.
	ErrOtherBrick = errors.New("this is another brick")
	// ErrExists says that a directory has a brick already.
	ErrExists = errors.New("there is a brick here already")
)

// The names below a brick's directory.
const (
	homeName    = ".mortar"
	identity    = "brick.json"
	logName     = "log"
	metaName    = "meta"
	dataName    = "data"
	cleanName   = "clean"   // see Brick.Clean
	healingName = "healing" // see Brick.Whole
	epochName   = "epoch"   // see Brick.Promise
	lockName    = "lock"
)

// Format makes an empty brick in directory dir, which exists. Its contents are
// known: it stands at the zero position. To have it filled by a comparison
// instead, open it and call Distrust.
func Format(fsys disk.FS, dir string, id Identity) error {
	if id.Format == 0 {
		id.Format = FormatVersion
	}
	if id.Format != FormatVersion {
		return fmt.Errorf("brick format %d, this version of mortar makes %d", id.Format, FormatVersion)
	}
	if st, err := fsys.Stat(dir); err != nil {
		return fmt.Errorf("making a brick: %w", err)
	} else if !st.IsDir() {
		return fmt.Errorf("making a brick: %s is not a directory", dir)
	}
	home := fsys.PathJoin(dir, homeName)
	file := fsys.PathJoin(home, identity)
	if old, err := readIdentity(fsys, dir); err == nil {
		return fmt.Errorf("%w: %s belongs to volume %s of pool %s; use another directory, or remove %s if its data is not needed",
			ErrExists, dir, old.Volume, old.Pool, home)
	} else if !errors.Is(err, ErrNoBrick) {
		return fmt.Errorf("%w: %s cannot be read as one: %w", ErrExists, file, err)
	}
	// Without brick.json there is no brick: what else lies here is what an
	// earlier attempt left.
	if err := fsys.RemoveAll(home); err != nil {
		return fmt.Errorf("making a brick: %w", err)
	}
	for _, d := range []string{home, fsys.PathJoin(home, logName), fsys.PathJoin(home, metaName), fsys.PathJoin(home, dataName)} {
		if err := fsys.MkdirAll(d, 0o700); err != nil {
			return fmt.Errorf("making a brick: %w", err)
		}
	}
	if err := writeIdentity(fsys, dir, id); err != nil {
		return fmt.Errorf("making a brick: %w", err)
	}
	if err := fsys.SyncDir(dir); err != nil {
		return fmt.Errorf("making a brick: %w", err)
	}
	return nil
}

func writeIdentity(fsys disk.FS, dir string, id Identity) error {
	b, err := json.MarshalIndent(id, "", "  ")
	if err != nil {
		return err
	}
	return disk.WriteFile(fsys, fsys.PathJoin(dir, homeName, identity), append(b, '\n'))
}

// upgrade gives a brick of an older format that of this program, before anything is
// done in it that the older one's programs do not know.
func (b *Brick) upgrade() error {
	if b.id.Format == FormatVersion {
		return nil
	}
	old := b.id.Format
	b.id.Format = FormatVersion
	if err := writeIdentity(b.opts.FS, b.opts.Dir, b.id); err != nil {
		return fmt.Errorf("raising its format from %d to %d: %w", old, FormatVersion, err)
	}
	b.clog.Info("the brick has a newer format now, older versions of mortar refuse it", "from", old, "to", FormatVersion)
	return nil
}

// ReadIdentity reads what the brick in directory dir is part of. The error
// wraps ErrNoBrick if there is none.
func ReadIdentity(fsys disk.FS, dir string) (Identity, error) { return readIdentity(fsys, dir) }

func readIdentity(fsys disk.FS, dir string) (id Identity, err error) {
	file := fsys.PathJoin(dir, homeName, identity)
	b, err := disk.ReadFile(fsys, file, 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		return id, fmt.Errorf("%w: %s is missing; is the disk mounted at %s?", ErrNoBrick, file, dir)
	}
	if err != nil {
		return id, fmt.Errorf("reading %s: %w", file, err)
	}
	var v struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return id, fmt.Errorf("%s is damaged: %w", file, err)
	}
	if v.Format < oldestFormat || v.Format > FormatVersion {
		return id, fmt.Errorf("%s has brick format %d, this version of mortar knows %d to %d: it was written by another version", file, v.Format, oldestFormat, FormatVersion)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&id); err != nil {
		return id, fmt.Errorf("%s is damaged: %w", file, err)
	}
	return id, nil
}

// check says whether id is the brick that was expected.
func (id Identity) check(want Identity, dir string) error {
	switch {
	case want == Identity{}:
	case id.Pool != want.Pool:
		return fmt.Errorf("%w: %s belongs to pool %s, not to %s", ErrOtherBrick, dir, id.Pool, want.Pool)
	case id.Volume != want.Volume:
		return fmt.Errorf("%w: %s belongs to volume %s, not to %s", ErrOtherBrick, dir, id.Volume, want.Volume)
	case id.Set != want.Set:
		return fmt.Errorf("%w: %s belongs to replica set %d of the volume, not to %d", ErrOtherBrick, dir, id.Set, want.Set)
	case id.Brick != want.Brick:
		return fmt.Errorf("%w: %s is brick %s, not %s; were two disks swapped?", ErrOtherBrick, dir, id.Brick, want.Brick)
	}
	return nil
}
