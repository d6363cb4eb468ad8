package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
)

const (
	// scanEvery is how often the leader looks for sets without a primary that
	// nobody reported, and for changes that the consensus group needs.
	scanEvery = time.Second
	// hurryEvery is how often it looks while the group is growing, for hurryFor:
	// until the new peers are up to date and vote, the pool is as weak as before.
	hurryEvery = 50 * time.Millisecond
	hurryFor   = 5 * time.Second
	// roundPause is the time between two rounds of seals of one set, which grows
	// to maxRoundPause while nothing comes of them.
	roundPause    = 50 * time.Millisecond
	maxRoundPause = time.Second
	// lostAfter is how long a voter must be silent before another peer votes in
	// its place.
	lostAfter = 10 * time.Second
	// farewell is how long a detached peer stays in the consensus group, so that
	// it hears of it.
	farewell = time.Second
	// sealLimit bounds the sets that are sealed at a time.
	sealLimit = 64
)

// leader is what only the leader does, for as long as it leads.
type leader struct {
	c     *Control
	group *errgroup.Group
	ctx   context.Context
	ready chan struct{} // closed when everything decided before is applied
	slots chan struct{}
	gone  map[cluster.PeerID]time.Time // keeper's own: when a member was first missed in the map
	mute  map[cluster.PeerID]bool      // keeper's own: peers complained about

	mu       sync.Mutex // guards all below
	troubles map[cluster.SetID]*trouble
	ended    bool // no more work is begun
}

// trouble is one set that needs another configuration, in one epoch. A
// goroutine works on it; duplicate reports wake that.
type trouble struct {
	set     cluster.SetID
	epoch   cluster.Epoch
	planned bool
	leaving cluster.BrickID
	since   time.Time
	kick    chan struct{} // capacity 1
	done    chan struct{} // closed when it is over; err says how
	err     error
	reason  string // guarded by leader.mu: why it lasts
}

// leading returns the running leader loops, or nil.
func (c *Control) leading() *leader {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lead
}

// watchLeadership runs the leader's loops while this peer leads.
func (c *Control) watchLeadership(ctx context.Context) error {
	stop := func() {}
	defer func() { stop() }()
	for {
		select {
		case leads := <-c.raft.LeaderCh():
			stop()
			stop = func() {}
			c.trans.setLeading(leads)
			if leads {
				c.log.Info("this peer leads the pool", "term", c.raft.CurrentTerm())
				stop = c.startLeader(ctx)
			} else {
				c.log.Info("this peer no longer leads the pool")
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// startLeader starts the leader's loops. stop ends them and waits for them.
func (c *Control) startLeader(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	over := make(chan struct{})
	go func() {
		defer close(over)
		c.runLeader(ctx)
	}()
	return func() {
		cancel()
		<-over
	}
}

func (c *Control) runLeader(ctx context.Context) {
	l := &leader{
		c: c, ready: make(chan struct{}), slots: make(chan struct{}, sealLimit),
		gone: map[cluster.PeerID]time.Time{}, mute: map[cluster.PeerID]bool{}, troubles: map[cluster.SetID]*trouble{},
	}
	l.group, l.ctx = errgroup.WithContext(ctx)
	c.mu.Lock()
	c.lead = l
	c.mu.Unlock()
	l.group.Go(l.run)
	l.group.Go(func() error {
		// A leader of peers that a recovery left behind must know it at once.
		if err := c.askAround(l.ctx); err != nil {
			c.fail(err)
		}
		return nil
	})
	_ = l.group.Wait() // its functions log what they meet
	c.mu.Lock()
	c.lead = nil
	c.mu.Unlock()
}

// recent returns where the log stood when it was called, or later; false if this
// peer does not lead after all.
func (l *leader) recent(ctx context.Context) (index uint64, ok bool) {
	select {
	case <-l.ready:
	case <-l.ctx.Done():
		return 0, false
	case <-ctx.Done():
		return 0, false
	}
	l.c.mu.Lock()
	index = l.c.applied
	l.c.mu.Unlock()
	// Only now: whoever leads after this moment, led when the index was read. The
	// library counts answers to what it had sent before, too.
	for read := time.Now(); ctx.Err() == nil && l.c.raft.VerifyLeader().Error() == nil; {
		if l.heardSince(read) {
			return index, true
		}
	}
	return 0, false
}

// heardSince reports whether most voters have answered what was sent after t0.
func (l *leader) heardSince(t0 time.Time) bool {
	voters, heard := 0, 0
	for _, s := range l.c.raft.GetConfiguration().Configuration().Servers {
		if s.Suffrage != raft.Voter {
			continue
		}
		voters++
		if s.ID == serverID(l.c.cfg.Self) || l.c.trans.answeredSince(s.ID, t0) {
			heard++
		}
	}
	return heard > voters/2
}

// end lets no more work begin.
func (l *leader) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
}

// run waits until this peer has applied all that earlier leaders decided, and
// then looks after sets and voters. It starts everything else in the group.
func (l *leader) run() error {
	for l.c.raft.Barrier(electionTimeout).Error() != nil {
		select {
		case <-l.ctx.Done():
			l.end()
			return nil
		case <-time.After(retryEvery):
		}
	}
	close(l.ready)
	// Work is begun only while this function, which is of the group itself, runs:
	// nothing may join a group that is being waited for.
	defer l.end()
	l.group.Go(l.keepGroup)
	tick := time.NewTicker(scanEvery)
	defer tick.Stop()
	for {
		l.scan()
		select {
		case <-tick.C:
		case <-l.c.Watch(l.c.Map().Version):
		case <-l.ctx.Done():
			return nil
		}
	}
}

// --- replica sets ---

// scan finds the sets that should have a primary and have none.
func (l *leader) scan() {
	for _, v := range l.c.Map().Volumes {
		if v.Status != cluster.VolumeStarted {
			continue
		}
		for i := range v.Sets {
			if cfg := &v.Sets[i]; cfg.Primary.IsZero() && cfg.Epoch > 0 {
				l.begin(&trouble{set: cfg.Set, epoch: cfg.Epoch})
			}
		}
	}
}

// config returns the configuration of a set of a started volume, or nil.
func (l *leader) config(set cluster.SetID) (*cluster.Volume, *cluster.SetConfig) {
	v := l.c.Map().VolumeByID(set.Volume)
	if v == nil || v.Status != cluster.VolumeStarted || int(set.Index) >= len(v.Sets) {
		return nil, nil
	}
	return v, &v.Sets[set.Index]
}

// suspect takes note of a report.
func (l *leader) suspect(s *suspicion) {
	_, cfg := l.config(s.Set)
	if cfg != nil && (cfg.Epoch > s.Epoch || !cfg.IsMember(s.From)) {
		return // outdated, or from nobody
	}
	// A report may be about a configuration that this leader has still to apply;
	// work on it begins when it has.
	l.begin(&trouble{set: s.Set, epoch: s.Epoch})
}

// handover works on a planned change and waits for it.
func (l *leader) handover(ctx context.Context, h *handover) error {
	select {
	case <-l.ready:
	case <-l.ctx.Done():
		return errAgain
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	v, cfg := l.config(h.Set)
	switch {
	case cfg == nil:
		return state.Refusal(state.CodeNotStarted, "set %v is not one of a started volume", h.Set)
	case cfg.Epoch != h.Epoch:
		return state.Refusal(state.CodeStaleEpoch, "volume %s, set %d has epoch %d by now", v.Name, h.Set.Index, cfg.Epoch)
	case !cfg.IsInSync(h.Leaving):
		return nil // nobody counts on it
	case len(cfg.InSync) == 1:
		return state.Refusal(state.CodeUnsafe, "volume %s: no other brick is in sync to take over", v.Name)
	}
	t := l.begin(&trouble{set: h.Set, epoch: h.Epoch, planned: true, leaving: h.Leaving})
	if !t.planned || t.leaving != h.Leaving {
		return state.Refusal(state.CodeConflict, "the set is being given another primary already")
	}
	select {
	case <-t.done:
		return t.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// begin starts work on t, or wakes the work that is under way for the same set
// and returns that.
func (l *leader) begin(t *trouble) *trouble {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old := l.troubles[t.set]; old != nil && old.epoch >= t.epoch {
		select {
		case old.kick <- struct{}{}:
		default:
		}
		return old
	}
	t.since = time.Now()
	t.kick, t.done = make(chan struct{}, 1), make(chan struct{})
	if l.ended {
		t.err = errAgain
		close(t.done)
		return t
	}
	l.troubles[t.set] = t
	l.group.Go(func() error {
		err := l.resolve(t)
		l.mu.Lock()
		defer l.mu.Unlock()
		l.finishLocked(t, err)
		return nil
	})
	return t
}

func (l *leader) finishLocked(t *trouble, err error) {
	t.err = err
	close(t.done)
	if l.troubles[t.set] == t {
		delete(l.troubles, t.set)
	}
}

// problems returns the sets that wait, with the reasons.
func (l *leader) problems() []Problem {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []Problem
	for set, t := range l.troubles {
		if t.reason != "" {
			all = append(all, Problem{Set: set, Since: t.since, Reason: t.reason})
		}
	}
	slices.SortFunc(all, func(a, b Problem) int { return strings.Compare(a.Set.String(), b.Set.String()) })
	return all
}

// resolve finds the set another configuration. It returns nil when the set has
// one, whoever decided it.
func (l *leader) resolve(t *trouble) error {
	select {
	case <-l.ready:
	case <-l.ctx.Done():
		return errAgain
	}
	pause := roundPause
	planned := t.planned
	for {
		v, cfg := l.config(t.set)
		if cfg == nil || cfg.Epoch > t.epoch {
			return nil
		}
		if cfg.Epoch < t.epoch {
			return state.Refusal(state.CodeStaleEpoch, "epoch %d of set %v was never decided", t.epoch, t.set)
		}
		results := l.seal(v, cfg, planned)
		if l.ctx.Err() != nil {
			return errAgain
		}
		f := state.Failover{Config: *cfg, Results: results, Elapsed: time.Since(t.since), Insisted: planned, Leaving: t.leaving}
		verdict := f.Decide()
		if verdict.Next != nil {
			return l.configure(v, t, verdict.Next)
		}
		l.mu.Lock()
		news := t.reason != verdict.Reason
		t.reason = verdict.Reason
		l.mu.Unlock()
		if news {
			l.c.log.Warn("a replica set waits for a primary", "volume", v.Name, "set", t.set.Index, "epoch", t.epoch, "reason", verdict.Reason)
		}
		if !verdict.Again {
			return state.Refusal(state.CodeUnsafe, "volume %s: %s", v.Name, verdict.Reason)
		}
		planned = t.planned || verdict.Insist
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
			pause = min(2*pause, maxRoundPause)
		case <-t.kick:
			// Not sooner than the shortest pause, however many reports come.
			timer.Reset(roundPause)
			select {
			case <-timer.C:
			case <-l.ctx.Done():
			}
		case <-l.ctx.Done():
		}
		timer.Stop()
		if l.ctx.Err() != nil {
			return errAgain
		}
	}
}

// seal asks every in-sync brick at once, all bricks if they are in doubt, and waits for no answer longer than
// state.SealTimeout.
func (l *leader) seal(v *cluster.Volume, cfg *cluster.SetConfig, planned bool) []state.SealResult {
	select {
	case l.slots <- struct{}{}:
		defer func() { <-l.slots }()
	case <-l.ctx.Done():
		return nil
	}
	ctx, cancel := context.WithTimeout(l.ctx, state.SealTimeout)
	defer cancel()
	asked := cfg.InSync
	if cfg.Doubted {
		asked = cfg.Members
	}
	results := make([]state.SealResult, len(asked))
	var wg sync.WaitGroup
	for i, id := range asked {
		results[i].Brick = id
		b := v.Brick(id)
		if b == nil {
			continue
		}
		wg.Go(func() {
			r, err := l.c.cfg.Sets.Seal(ctx, *b, cfg.Set, cfg.Epoch, planned)
			if err != nil {
				l.c.log.Debug("a brick was not sealed", "volume", v.Name, "brick", b.String(), "error", err)
				return
			}
			results[i].Answered, results[i].Reply = true, r
		})
	}
	wg.Wait()
	return results
}

// configure has a configuration decided.
func (l *leader) configure(v *cluster.Volume, t *trouble, next *cluster.SetConfig) error {
	cmd := state.Command{ID: cluster.NewID(), SetConfig: &state.SetConfig{Config: *next}}
	raw, err := cmd.Encode()
	if err != nil {
		return err
	}
	if _, err := l.c.apply(raw); err != nil {
		if errors.Is(err, state.ErrStaleEpoch) {
			return nil // somebody else's change came first; who is not content reports again
		}
		return err
	}
	brick := next.Primary.String()
	if b := v.Brick(next.Primary); b != nil {
		brick = b.String()
	}
	l.c.log.Info("a replica set has a new primary", "volume", v.Name, "set", t.set.Index, "epoch", next.Epoch, "primary", brick,
		"in_sync", len(next.InSync), "of", len(next.Members), "took", time.Since(t.since).Round(time.Millisecond))
	return nil
}

// --- the consensus group ---

// keepGroup makes the consensus group follow the map, one step at a time.
func (l *leader) keepGroup() error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var hurry time.Time
	for {
		changed := l.c.Watch(l.c.Map().Version)
		if step := l.nextStep(); step.Kind != state.StepNone {
			err := l.take(step)
			name := step.Peer.String()
			if p := l.c.Map().Peer(step.Peer); p != nil {
				name = p.Name
			}
			if err != nil {
				l.c.log.Warn("the consensus group was not changed", "step", step.Kind.String(), "peer", name, "error", err)
			} else {
				l.c.log.Info("the consensus group was changed", "step", step.Kind.String(), "peer", name)
				if step.Kind == state.StepAdd {
					hurry = time.Now().Add(hurryFor)
				}
				continue
			}
		}
		timer.Reset(scanEvery)
		if time.Now().Before(hurry) && len(l.c.Status().Voters) < state.VotersOf(l.c.Map()) {
			timer.Reset(hurryEvery)
		}
		select {
		case <-timer.C:
		case <-changed:
		case <-l.ctx.Done():
		}
		if l.ctx.Err() != nil {
			return nil
		}
	}
}

func (l *leader) nextStep() state.Step {
	m := l.c.Map()
	if m.Pool.IsZero() {
		return state.Step{}
	}
	var servers []state.Server
	for _, s := range l.c.raft.GetConfiguration().Configuration().Servers {
		id, err := cluster.ParseID(string(s.ID))
		if err != nil {
			continue
		}
		servers = append(servers, state.Server{Peer: id, Voter: s.Suffrage == raft.Voter})
		if m.Peer(id) != nil {
			delete(l.gone, id)
		} else if _, ok := l.gone[id]; !ok {
			l.gone[id] = time.Now()
		}
	}
	g := state.Group{
		Map: m, Servers: servers, Leader: l.c.cfg.Self,
		Reachable: func(id cluster.PeerID) bool {
			alive, _ := l.c.trans.reachable(serverID(id))
			return alive
		},
		Lost: func(id cluster.PeerID) bool {
			alive, since := l.c.trans.reachable(serverID(id))
			return !alive && time.Since(since) > lostAfter
		},
		Ready: l.caughtUp,
	}
	step := g.NextStep()
	if step.Kind == state.StepRemove {
		// It is told of its removal first, if it listens.
		if alive, _ := l.c.trans.reachable(serverID(step.Peer)); alive && time.Since(l.gone[step.Peer]) < farewell {
			return state.Step{}
		}
	}
	return step
}

// caughtUp asks a peer whether it has applied about as much as this one, and may
// vote: a voter that is forgetful by birth would be one too few after a restart.
func (l *leader) caughtUp(id cluster.PeerID) bool {
	ctx, cancel := context.WithTimeout(l.ctx, electionTimeout)
	defer cancel()
	l.c.mu.Lock()
	applied := l.c.applied
	l.c.mu.Unlock()
	st, err := l.c.askStatus(ctx, id)
	if err != nil {
		if !l.mute[id] {
			l.mute[id] = true
			l.c.log.Warn("a peer cannot become a voter: it does not answer requests", "peer", id, "error", err)
		}
		return false
	}
	delete(l.mute, id)
	return st.Applied+16 >= applied && !st.Forgetful
}

func (l *leader) take(step state.Step) error {
	id := serverID(step.Peer)
	r := l.c.raft
	var f interface{ Error() error }
	switch step.Kind {
	case state.StepAdd:
		f = r.AddNonvoter(id, raft.ServerAddress(id), 0, rpcTimeout)
	case state.StepPromote:
		f = r.AddVoter(id, raft.ServerAddress(id), 0, rpcTimeout)
	case state.StepDemote:
		f = r.DemoteVoter(id, 0, rpcTimeout)
	case state.StepRemove:
		f = r.RemoveServer(id, 0, rpcTimeout)
		defer l.c.trans.forget(id)
	case state.StepTransfer:
		f = r.LeadershipTransfer()
	default:
		return fmt.Errorf("unknown step %v", step.Kind)
	}
	return f.Error()
}
