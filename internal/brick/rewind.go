package brick

import (
	"errors"
	"fmt"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
	"mortar/internal/oplog"
	"mortar/internal/proto"
)

// Rewind makes the log end at to and the state be the one at to. Entries behind
// it are undone; they must never have been committed. Rewind(Tail()) replays the
// log after Open. If the brick cannot go back so far the error wraps ErrTooFar,
// and the brick is as it was.
func (b *Brick) Rewind(to cluster.Pos) error {
	if err := b.Err(); err != nil {
		return err
	}
	if b.standsAt(to) {
		return nil
	}
	b.pauseSettling()
	defer b.resumeSettling()
	b.wmu.Lock()
	defer b.wmu.Unlock()

	switch {
	case !b.whole:
		return fmt.Errorf("%w %v: what it has is unknown", ErrTooFar, to)
	case to.Seq < b.log.Base().Seq:
		return fmt.Errorf("%w %v: its log begins only after %v", ErrTooFar, to, b.log.Base())
	case !b.onLog(to):
		return fmt.Errorf("rewinding to %v: the log, which ends at %v, has no such position", to, b.log.Tail())
	}
	if to.Seq < b.state.Pos.Seq {
		durable, ok, err := b.store.DurableState()
		if err != nil {
			return b.fail(err)
		}
		if ok && durable.Pos.Seq > to.Seq {
			return fmt.Errorf("%w %v: it is durably at %v", ErrTooFar, to, durable.Pos)
		}
		if err := b.reopen(); err != nil {
			return b.fail(fmt.Errorf("rewinding to %v: %w", to, err))
		}
	}
	tooFar := error(nil)
	if b.state.Pos.Seq > to.Seq {
		// A flush has slipped in. Nothing is lost: the log is still whole.
		tooFar = fmt.Errorf("%w %v: it is durably at %v", ErrTooFar, to, b.state.Pos)
		to = b.log.Tail()
	}
	if to != b.log.Tail() {
		if err := b.unmark(); err != nil {
			return b.fail(err)
		}
		if err := b.log.TruncateAfter(to.Seq); err != nil {
			return b.fail(err)
		}
		b.settle.cut(to.Seq)
	}
	if err := b.replay(to); err != nil {
		return b.fail(fmt.Errorf("replaying the log up to %v: %w", to, err))
	}
	return tooFar
}

// standsAt reports whether there is nothing to rewind or replay.
func (b *Brick) standsAt(p cluster.Pos) bool {
	b.wmu.Lock()
	defer b.wmu.Unlock()
	return b.whole && p == b.state.Pos && p == b.log.Tail()
}

// reopen takes the KV back to its last flush. b.settling and b.wmu are held.
func (b *Brick) reopen() error {
	b.closeHeld(errors.New("the brick was taken back to an earlier position"))
	b.mu.Lock()
	defer b.mu.Unlock()
	b.gen.Add(1)
	b.exec.batch.Close()
	if err := b.store.Close(); err != nil {
		return err
	}
	b.settle.steps = nil // what was not flushed is not settled any more
	return b.openStore()
}

const replayBytes = 4 << 20

// replay applies what the log has up to to. b.wmu is held.
func (b *Brick) replay(to cluster.Pos) error {
	b.gen.Add(1)
	for b.state.Pos.Seq < to.Seq {
		if err := b.store.Ready(); err != nil {
			return err
		}
		raws, poss, locs, err := b.log.Read(b.state.Pos.Seq, replayBytes)
		if err != nil {
			return err
		}
		if len(raws) == 0 {
			return fmt.Errorf("the log ends after %v", b.state.Pos)
		}
		for i := range raws {
			if poss[i].Seq > to.Seq {
				return nil
			}
			if err := b.replayOne(raws[i], poss[i], &locs[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *Brick) replayOne(raw []byte, pos cluster.Pos, loc *oplog.Loc) error {
	var e proto.Entry
	if err := codec.Decode(raw, &e); err != nil {
		return fmt.Errorf("entry %v: %w", pos, err)
	}
	if e.Pos != pos {
		return fmt.Errorf("entry %v calls itself %v", pos, e.Pos)
	}
	res, err := b.apply(&e, raw, loc)
	var errno fsop.Errno
	switch {
	case errors.As(err, &errno):
		return fmt.Errorf("entry %v was accepted before and is refused now (%w): log and metadata do not belong together", &e, err)
	case err != nil:
		return fmt.Errorf("entry %v: %w", &e, err)
	case res.Raw == nil:
		return fmt.Errorf("entry %v changed something before and changes nothing now: log and metadata do not belong together", &e)
	}
	return nil
}
