package brick

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

// Promise has the brick remember, durably, that it takes part in no epoch
// before e any more. It has the same single caller as Execute.
func (b *Brick) Promise(e cluster.Epoch) error {
	if e <= b.promised {
		return nil
	}
	if err := disk.WriteFile(b.opts.FS, b.path(epochName), fmt.Appendln(nil, uint64(e))); err != nil {
		return b.fail(fmt.Errorf("remembering epoch %d: %w", e, err))
	}
	b.promised = e
	return nil
}

// Promised returns the epoch of the last Promise, 0 if there was none.
func (b *Brick) Promised() cluster.Epoch { return b.promised }

func (b *Brick) readPromise() error {
	raw, err := disk.ReadFile(b.opts.FS, b.path(epochName), 64)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	e, err := strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 64)
	if err != nil {
		return fmt.Errorf("%s does not hold the number of an epoch: %w", b.path(epochName), ErrDamagedFile)
	}
	b.promised = cluster.Epoch(e)
	return nil
}
