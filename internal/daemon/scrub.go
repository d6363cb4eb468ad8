package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"mortar/internal/api"
	"mortar/internal/brick"
	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/replica"
)

// A brick is scrubbed by the daemon that serves it, for as long as it does: the data
// are read where they are. What has rotted is repaired from the other bricks of the set.
const (
	// scrubTick is how often a brick is looked after, if nothing calls for it.
	scrubTick = 5 * time.Second
	// scrubFirst is how long after its start a brick is left alone.
	scrubFirst = time.Minute
	// signEvery is how often files that were changed are looked for.
	signEvery = 30 * time.Second
	// blockPatience is how long one brick may take to answer with a block.
	blockPatience = time.Second
	// maxShown is how many rotten blocks are shown of a brick.
	maxShown = 100
	// busyShare is the part of the rate that is used while clients write.
	busyShare = 4
)

var (
	errScrubPaused = errors.New("scrubbing is paused")
	errNotThere    = errors.New("no other brick has it as it should be")
)

// scrubber looks after one served brick.
type scrubber struct {
	run   *brickRun
	b     *brick.Brick
	until time.Time           // of what may have been read so far, at the rate there was
	tail  uint64              // of the log, when it was last seen
	busy  time.Time           // when the log was last seen to grow
	sign  time.Time           // when files that were changed are looked for next
	paths map[fsop.Ino]string // of files that have rotted
}

// scrub looks after b until ctx ends.
func (r *brickRun) scrub(ctx context.Context, b *brick.Brick) {
	s := &scrubber{run: r, b: b, paths: map[fsop.Ino]string{}}
	began := time.Now()
	tick := time.NewTicker(scrubTick)
	defer tick.Stop()
	for {
		asked := false
		select {
		case <-ctx.Done():
			return
		case <-b.Failed():
			return
		case <-tick.C:
		case <-b.RepairWanted():
		case <-r.scrubNow:
			asked = true
		}
		b.Reconsider()
		s.repair(ctx)
		if !r.inSync() || !b.Whole() {
			continue // it has enough to do
		}
		err := s.work(ctx, asked || time.Since(began) > scrubFirst)
		if err != nil && ctx.Err() == nil && b.Err() == nil && !errors.Is(err, errScrubPaused) && !errors.Is(err, errWanted) {
			r.b.log.Warn("scrubbing a brick", "volume", r.volume, "path", r.path, "brick", r.id, "error", err)
		}
	}
}

// errWanted ends a round for a moment, because something else is to be done at once.
var errWanted = errors.New("something is to be repaired")

func (s *scrubber) work(ctx context.Context, may bool) error {
	o := s.run.options()
	if !o.Scrub {
		return nil
	}
	how := brick.ScrubOptions{Wait: s.wait, Quiet: o.ScrubQuiet}
	at := s.b.Scrubbed()
	if due := o.ScrubInterval > 0 && time.Since(at.Ended) >= o.ScrubInterval; !at.Running && due && may {
		if err := s.b.BeginScrub(); err != nil {
			return err
		}
		at.Running = true
	}
	if at.Running {
		return s.b.Scrub(ctx, how)
	}
	if time.Now().Before(s.sign) {
		return nil
	}
	s.sign = time.Now().Add(signEvery)
	return s.b.SignFresh(ctx, how)
}

// wait lets n bytes be read when it is their turn.
func (s *scrubber) wait(ctx context.Context, n int) error {
	o := s.run.options()
	if !o.Scrub {
		return errScrubPaused
	}
	now := time.Now()
	if tail := s.b.Tail().Seq; tail != s.tail {
		s.tail, s.busy = tail, now
	}
	rate := max(o.ScrubRate, 1)
	if now.Sub(s.busy) < time.Second {
		rate = max(rate/busyShare, 1)
	}
	if s.until.Before(now) {
		s.until = now
	}
	s.until = s.until.Add(time.Duration(float64(n) / float64(rate) * float64(time.Second)))
	timer := time.NewTimer(s.until.Sub(now))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-s.b.RepairWanted():
		s.b.WantRepair()
		return errWanted
	case <-s.b.Failed():
		return s.b.Err()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// repair repairs what is rotten, as far as that can be done now.
func (s *scrubber) repair(ctx context.Context) {
	some, count := s.b.Rotten(maxShown)
	if count == 0 {
		s.run.setRotten(nil)
		clear(s.paths)
		return
	}
	left := []api.Rotten{}
	for _, r := range some {
		path, known := s.paths[r.Ino]
		if !known {
			if path, err := s.b.PathOf(ctx, r.Ino); err == nil {
				s.paths[r.Ino] = path
			}
			path = s.paths[r.Ino]
		}
		if ctx.Err() != nil || s.b.Err() != nil {
			return
		}
		log := s.run.b.log.With("volume", s.run.volume, "path", s.run.path, "brick", s.run.id, "file", cmp.Or(path, "without a name"), "inode", r.Ino, "from", r.From, "to", r.To)
		if !known {
			log.Error("a part of a file has rotted on this brick; it is read from the others until it is repaired")
		}
		if err := s.b.Repair(ctx, r); err != nil {
			left = append(left, api.Rotten{Path: path, Inode: uint64(r.Ino), From: r.From, To: r.To, DataFile: r.File, Found: r.Found, Problem: err.Error()})
			continue
		}
		log.Info("a part of a file that had rotted was repaired")
	}
	s.run.setRotten(left)
	if len(left) == 0 && count > len(some) {
		s.b.WantRepair()
	}
}

func (r *brickRun) setRotten(some []api.Rotten) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rotten = some
}

func (r *brickRun) rottenShown() []api.Rotten {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.rotten
}

func (r *brickRun) inSync() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.config.IsInSync(r.id)
}

// options are the volume's as they are now.
func (r *brickRun) options() cluster.VolumeOptions {
	if v := r.b.m.view.Load().volume[r.id]; v != nil {
		return v.EffectiveOptions()
	}
	return cluster.VolumeOptions{}
}

// others asks the other bricks of the set for a block of a file, those that are in sync
// first. It implements brick.Others.
func (r *brickRun) others(ctx context.Context, ino fsop.Ino, k uint64, use func(brick.Block) bool) error {
	rep := r.current()
	if rep == nil {
		return errNoReplica
	}
	r.mu.Lock()
	config := r.config
	r.mu.Unlock()
	var errs []error
	for _, inSync := range []bool{true, false} {
		for _, id := range config.Members {
			if id == r.id || config.IsInSync(id) != inSync {
				continue
			}
			got, err := blockOf(ctx, rep, id, ino, k)
			switch {
			case err != nil:
				errs = append(errs, fmt.Errorf("brick %s: %w", id, err))
			case use(brick.Block(got)):
				return nil
			default:
				errs = append(errs, fmt.Errorf("brick %s has something else there", id))
			}
		}
	}
	if len(errs) == 0 {
		return errors.New("the set has no other brick")
	}
	return fmt.Errorf("%w: %w", errNotThere, errors.Join(errs...))
}

func blockOf(ctx context.Context, rep *replica.Replica, id cluster.BrickID, ino fsop.Ino, k uint64) (replica.Block, error) {
	ctx, cancel := context.WithTimeout(ctx, blockPatience)
	defer cancel()
	return rep.BlockOf(ctx, id, ino, k)
}

// scrubState is what is shown of the scrubbing of a served brick.
func (r *brickRun) scrubState(b *brick.Brick) *api.ScrubState {
	s := b.Scrubbed()
	st := &api.ScrubState{
		State: "idle", Percent: s.Percent, Bytes: s.Bytes, Checked: s.Checked, Signed: s.Made, Bad: s.Bad,
		Found: s.Found, Repaired: s.Repaired, Rotten: s.Rotten, Blocks: r.rottenShown(),
	}
	if !s.Began.IsZero() {
		st.Began = &s.Began
	}
	if !s.Ended.IsZero() {
		st.Ended = &s.Ended
	}
	switch {
	case !r.options().Scrub:
		st.State = "paused"
	case s.Running && (!b.Whole() || !r.inSync()):
		st.State = "waiting"
	case s.Running:
		st.State = "running"
	}
	return st
}

// Scrub implements httpd.Volumes: it has every brick begin a round.
func (n *Node) Scrub(ctx context.Context, name string) (*api.ScrubReply, error) {
	m, v, err := n.started(ctx, name)
	if err != nil {
		return nil, err
	}
	if !v.EffectiveOptions().Scrub {
		return nil, api.Errorf(api.Conflict, "scrubbing of volume %s is paused: \"mortar volume scrub %s resume\" goes on with it", v.Name, v.Name)
	}
	all, fails := askPeers(ctx, m, v, func(ctx context.Context, peer cluster.PeerID) (*api.ScrubReply, error) {
		return at(ctx, m, peer,
			func() (*api.ScrubReply, error) { return m.n.LocalScrub(ctx, v.Name) },
			func(c *api.Client) (*api.ScrubReply, error) { return c.LocalScrub(ctx, v.Name) })
	})
	reply := &api.ScrubReply{}
	for _, b := range v.Bricks {
		if err := fails[b.Peer]; err != nil {
			reply.Missed = append(reply.Missed, fmt.Sprintf("%s: %v", b, err))
		} else if r := all[b.Peer]; r != nil {
			reply.Bricks = append(reply.Bricks, r.Bricks...)
			reply.Missed = append(reply.Missed, r.Missed...)
			delete(all, b.Peer) // it has spoken for all its bricks
		}
	}
	return reply, nil
}

// LocalScrub implements httpd.Local.
func (n *Node) LocalScrub(ctx context.Context, name string) (*api.ScrubReply, error) {
	m, v, err := n.started(ctx, name)
	if err != nil {
		return nil, err
	}
	reply := &api.ScrubReply{}
	for _, br := range v.Bricks {
		if br.Peer != m.keeper.ID() {
			continue
		}
		b := (*brick.Brick)(nil)
		run := m.bricks.run(br.ID)
		if run != nil {
			run.mu.Lock()
			b = run.brick
			run.mu.Unlock()
		}
		if b == nil {
			reply.Missed = append(reply.Missed, br.String()+": it is not served now")
			continue
		}
		if err := b.BeginScrub(); err != nil {
			reply.Missed = append(reply.Missed, fmt.Sprintf("%s: %v", br, err))
			continue
		}
		select {
		case run.scrubNow <- struct{}{}:
		default:
		}
		reply.Bricks = append(reply.Bricks, br.String())
	}
	return reply, nil
}
