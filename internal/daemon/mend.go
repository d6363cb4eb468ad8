package daemon

import (
	"errors"
	"fmt"
	"time"

	"mortar/internal/brick"
	"mortar/internal/cluster"
)

// A brick that is damaged is healed from its peers without anybody's help
// (doc/decisions/0018): it waits until the set goes on without it, gives up what
// is damaged, and is served again, to be compared with the primary. What is not
// elsewhere is never given up.
const (
	// mendEvery is how often that is done. A disk that damages a brick again so
	// soon is something for a person to see.
	mendEvery = 10 * time.Minute
	mendTick  = 200 * time.Millisecond
)

// mend waits until the damaged brick can be healed, or an administrator wants it
// to be tried as it is, and makes it fit to be. It returns false if the brick is
// to be stopped.
func (r *brickRun) mend(damage error) bool {
	tick := time.NewTicker(mendTick)
	defer tick.Stop()
	since := time.Since(r.mended)
	often := !r.mended.IsZero() && since < mendEvery
	for {
		switch {
		case often:
			r.unserved(fmt.Sprintf("%v. It is the second time within %v: check the disk that %s is on. Then have the brick made anew with 'mortar volume start %s force'",
				damage, mendEvery, r.path, r.volume))
		case r.alone():
			r.unserved(fmt.Sprintf("%v. No other brick is in sync with it, so nothing was removed: see what is left with 'mortar brick check %s', and save it with 'mortar brick export %s DEST'",
				damage, r.path, r.path))
		case !r.replaceable():
			r.unserved(fmt.Sprintf("%v. It is healed from its peers as soon as one of them leads and can be reached. To see what is left of it run 'mortar brick check %s'",
				damage, r.path))
		default:
			err := r.renew(damage)
			if err == nil {
				r.mended = time.Now()
				return true
			}
			r.unserved(fmt.Sprintf("%v; making it anew failed: %v", damage, err))
			tick.Reset(reopenMost)
		}
		select {
		case <-tick.C:
		case <-r.retry:
			if !often {
				return true // as it is
			}
			often = false
		case <-r.ctx.Done():
			return false
		}
	}
}

// renew makes a damaged brick fit to be healed.
func (r *brickRun) renew(damage error) error {
	if errors.Is(damage, brick.ErrDamagedFile) {
		r.b.log.Warn("a brick has a damaged file, which is healed from its peers", "volume", r.volume, "path", r.path, "brick", r.id, "damage", damage)
		return nil // it knows which one
	}
	v := r.b.m.view.Load().volume[r.id]
	if v == nil {
		return errors.New("its volume is gone")
	}
	if err := brick.Renew(brickOptions(r.path, r.b.m.pool, v, r.set, r.id, r.b.log)); err != nil {
		return err
	}
	r.b.log.Warn("a damaged brick was emptied, and is healed from its peers", "volume", r.volume, "path", r.path, "brick", r.id, "damage", damage)
	return nil
}

// alone reports whether no other brick has what this one has.
func (r *brickRun) alone() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.config.Members) == 1 || len(r.config.InSync) == 1 && r.config.IsInSync(r.id)
}

// replaceable reports whether the committed configuration goes on without this
// brick, under a primary that it can be healed from now.
func (r *brickRun) replaceable() bool {
	r.mu.Lock()
	config := r.config
	r.mu.Unlock()
	if config.IsInSync(r.id) || config.Primary.IsZero() || !config.IsInSync(config.Primary) {
		return false
	}
	return r.b.reaches(r, config.Primary)
}

// reaches reports whether messages of a run's set reach another brick.
func (b *bricks) reaches(r *brickRun, other cluster.BrickID) bool {
	peer := b.m.view.Load().owner[other]
	b.mu.Lock()
	defer b.mu.Unlock()
	if peer != b.m.keeper.ID() {
		return b.up[r.via][peer]
	}
	sibling := b.runs[other]
	return sibling != nil && sibling.current() != nil
}
