package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"mortar/internal/brick"
	"mortar/internal/cluster"
	"mortar/internal/disk"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica"

	"mortar/internal/api"
)

// store is a brick as a replica wants it. Packages brick and replica do not know
// each other; what they both mean is put from one's words into the other's here.
type store struct{ *brick.Brick }

var _ replica.Store = store{}

// brickOptions says how to open a brick, which must be the one that the map means.
func brickOptions(dir string, pool cluster.ID, v *cluster.Volume, set cluster.SetID, id cluster.BrickID, log *slog.Logger) brick.Options {
	o := v.EffectiveOptions()
	return brick.Options{
		FS: disk.OS, Dir: dir, Log: log,
		Identity: brick.Identity{Format: brick.FormatVersion, Pool: pool, Volume: set.Volume, Set: set.Index, Brick: id},
		Retain:   o.RetentionSize,
		Reserve:  float64(o.Reserve) / 100,
	}
}

// Execute implements replica.Store.
func (s store) Execute(e *proto.Entry, raw []byte) (*replica.Result, error) {
	r, err := s.Brick.Execute(e, raw)
	if r == nil {
		return nil, err
	}
	return (*replica.Result)(r), err
}

// Rewind implements replica.Store.
func (s store) Rewind(pos cluster.Pos) error {
	return translate(s.Brick.Rewind(pos))
}

// Entries implements replica.Store.
func (s store) Entries(after uint64, maxBytes int) ([][]byte, error) {
	all, err := s.Brick.Entries(after, maxBytes)
	return all, translate(err)
}

// translate makes errors that replica acts on its own.
func translate(err error) error {
	switch {
	case errors.Is(err, brick.ErrTooFar):
		return fmt.Errorf("%w: %w", replica.ErrTooFar, err)
	case errors.Is(err, brick.ErrTrimmed):
		return fmt.Errorf("%w: %w", replica.ErrTrimmed, err)
	}
	return err
}

// Sessions implements replica.Store.
func (s store) Sessions() []replica.SessionInfo {
	all := s.Brick.Sessions()
	out := make([]replica.SessionInfo, len(all))
	for i, x := range all {
		out[i] = replica.SessionInfo(x)
	}
	return out
}

// Source implements replica.Store.
func (s store) Source() (replica.Source, error) { return s.Brick.Source() }

// Heal implements replica.Store.
func (s store) Heal(ctx context.Context, pos cluster.Pos, call func(context.Context, []byte) ([]byte, error), progress func(replica.HealProgress)) error {
	return s.Brick.Heal(ctx, pos, call, func(p brick.HealProgress) { progress(replica.HealProgress(p)) })
}

// Block implements replica.Store.
func (s store) Block(ctx context.Context, ino fsop.Ino, k uint64) (replica.Block, error) {
	b, err := s.Brick.Block(ctx, ino, k)
	return replica.Block(b), err
}

// Digest implements replica.Store.
func (s store) Digest(ctx context.Context) (replica.Digest, error) {
	d, err := s.Brick.Digest(ctx)
	return replica.Digest(d), err
}

// brickIdentity reads the identity out of a request of another peer.
func brickIdentity(r api.BrickPrepare) (id brick.Identity, err error) {
	id.Format = brick.FormatVersion
	if id.Pool, err = cluster.ParseID(r.Pool); err != nil {
		return id, err
	}
	if id.Volume, err = cluster.ParseID(r.Volume); err != nil {
		return id, err
	}
	if id.Brick, err = cluster.ParseID(r.Brick); err != nil {
		return id, err
	}
	if r.Set < 0 || r.Set > 1<<16-1 {
		return id, fmt.Errorf("set %d", r.Set)
	}
	id.Set = cluster.SetIndex(r.Set)
	return id, nil
}

func formatBrick(dir string, id brick.Identity) error { return brick.Format(disk.OS, dir, id) }

// newBrick is the age up to which a brick may be taken back: the volume that it was made
// for was refused a moment ago.
const newBrick = 10 * time.Minute

// discardBrick takes back a brick that was made for a volume that is not to be.
// Only that very brick, and only if it is new, is touched.
func discardBrick(dir string, id brick.Identity) error {
	have, err := brick.ReadIdentity(disk.OS, dir)
	if errors.Is(err, brick.ErrNoBrick) {
		return nil
	}
	if err != nil {
		return err
	}
	home := filepath.Join(dir, ".mortar")
	fi, err := os.Stat(filepath.Join(home, "brick.json"))
	if err != nil {
		return err
	}
	if have != id || time.Since(fi.ModTime()) > newBrick {
		return api.Errorf(api.Conflict, "%s is another brick by now", dir)
	}
	return os.RemoveAll(home)
}
