package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
)

const (
	// lonelyAfter is how long a peer of a pool may hear nothing of a leader before
	// it asks the others whether it still belongs to them.
	lonelyAfter = 3 * time.Second
	askEvery    = 5 * time.Second
)

// askStatus asks another peer about itself.
func (c *Control) askStatus(ctx context.Context, to cluster.PeerID) (*peerStatus, error) {
	raw, err := json.Marshal(request{Status: true, Boot: c.boot})
	if err != nil {
		return nil, err
	}
	b, err := c.cfg.Call(ctx, to, raw)
	if err != nil {
		return nil, err
	}
	var a answer
	if err := json.Unmarshal(b, &a); err != nil {
		return nil, fmt.Errorf("control: an answer that is none: %w", err)
	}
	if a.Err != nil {
		return nil, a.Err
	}
	if a.Status == nil {
		return nil, errors.New("control: an answer without a status")
	}
	return a.Status, nil
}

// incarnate announces the start of this process to the pool, once.
func (c *Control) incarnate(ctx context.Context) error {
	for after := uint64(0); ; {
		m, err := c.Wait(ctx, after)
		if err != nil {
			return nil // ctx ended, or the Control failed
		}
		self := m.Peer(c.cfg.Self)
		if self == nil {
			after = m.Version
			continue
		}
		err = c.Propose(ctx, state.Command{Incarnate: &state.Incarnate{Peer: c.cfg.Self, Past: self.Incarnation}})
		switch {
		case err == nil:
			c.mu.Lock()
			c.incarnation = self.Incarnation + 1
			if p := c.st.Map.Peer(c.cfg.Self); p != nil && p.Incarnation > c.incarnation {
				c.fail(clonedError(p))
			}
			c.wakeLocked()
			c.mu.Unlock()
			return nil
		case errors.Is(err, state.ErrCloned):
			return err
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, state.ErrConflict), errors.Is(err, state.ErrNoPeer), errors.Is(err, state.ErrDetached):
			after = m.Version // this copy is late, or somebody else's start came in between; or Run ends soon
		default:
			c.log.Warn("this peer's start could not be announced to the pool", "error", err)
			return nil
		}
	}
}

// checkClone refuses the start of a peer whose identity is alive elsewhere.
// boot is of the process that asks.
func (c *Control) checkClone(ctx context.Context, id cluster.PeerID, boot uint64) error {
	p := c.Map().Peer(id)
	if p == nil || id == c.cfg.Self {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, electionTimeout)
	defer cancel()
	st, err := c.askStatus(ctx, id)
	// Who does not answer is not alive; who answers with the same boot is the
	// one that asks.
	if err != nil || st.Boot == boot || st.Incarnation != p.Incarnation {
		return nil
	}
	return clonedError(p)
}

// findOut asks the other peers what has become of the pool when no leader is
// heard of for long, and notices when this peer is out of it.
func (c *Control) findOut(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	heard := time.Now()
	var asked time.Time
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		c.recalled()
		detached := c.Detached()
		// A detached peer stays until the others can do without its vote.
		if detached != nil && !c.Member(c.cfg.Self) {
			return detached
		}
		if !c.Bootstrapped() || !c.lonely() {
			heard = time.Now()
			continue
		}
		if time.Since(heard) < lonelyAfter || time.Since(asked) < askEvery {
			continue
		}
		asked = time.Now()
		if err := c.askAround(ctx); err != nil {
			return err
		}
	}
}

// lonely reports whether this peer hears of no leader, or leads and does not
// reach everybody: then what it takes for the pool may be a part that was left
// behind.
func (c *Control) lonely() bool {
	if c.raft.State() != raft.Leader {
		_, ok := c.Leader()
		return !ok
	}
	for _, p := range c.Map().Peers {
		if alive, _ := c.trans.reachable(serverID(p.ID)); !alive && p.ID != c.cfg.Self {
			return true
		}
	}
	return false
}

// Member reports whether a peer is in the consensus group. One that was detached
// is for a while: a leader hands its office over, and the others must be able to
// do without a voter before it goes.
func (c *Control) Member(id cluster.PeerID) bool {
	return slices.ContainsFunc(c.raft.GetConfiguration().Configuration().Servers, func(s raft.Server) bool { return s.ID == serverID(id) })
}

// peerAnswer is what one peer said of itself.
type peerAnswer struct {
	peer   *cluster.Peer
	status *peerStatus
	err    error
}

// askAll asks every other peer of the map about itself, at once.
func (c *Control) askAll(ctx context.Context) []peerAnswer {
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	var all []peerAnswer
	for _, p := range c.Map().Peers {
		if p.ID != c.cfg.Self {
			all = append(all, peerAnswer{peer: p})
		}
	}
	var wg sync.WaitGroup
	for i := range all {
		wg.Go(func() { all[i].status, all[i].err = c.askStatus(ctx, all[i].peer.ID) })
	}
	wg.Wait()
	return all
}

// askAround asks every other peer for its view. The error, if any, ends this
// Control.
func (c *Control) askAround(ctx context.Context) error {
	other, err := c.askViews(ctx)
	if err != nil || !other {
		return err
	}
	// It may be this peer's former life, which has died just now: a machine of two leads again sooner
	// than the other one counts it as dead. Who lives is heard again.
	again := time.NewTimer(2 * aliveFor)
	defer again.Stop()
	select {
	case <-again.C:
	case <-ctx.Done():
		return nil
	}
	if other, err = c.askViews(ctx); err != nil || !other {
		return err
	}
	if self := c.Map().Peer(c.cfg.Self); self != nil {
		return clonedError(self)
	}
	return nil
}

// askViews asks once. other is whether somebody has just heard another process lead
// in this one's name.
func (c *Control) askViews(ctx context.Context) (other bool, err error) {
	for _, a := range c.askAll(ctx) {
		switch {
		case errors.Is(a.err, state.ErrDetached):
			c.log.Warn("this peer was detached from the pool while it was away", "told_by", a.peer.Name)
			c.mu.Lock()
			defer c.mu.Unlock()
			c.detached = true
			c.wakeLocked()
			return false, c.detachedLocked()
		case a.err != nil:
		case a.status.Generation > c.generation():
			return false, state.Refusal(state.CodeRecovered, "the pool was recovered by hand while this peer was away (generation %d; this copy has %d), so what this peer knows of it counts no more: \"mortar peer recover\" here puts it (%s) aside and fetches a fresh copy", a.status.Generation, c.generation(), c.cfg.Dir)
		case a.status.Leader == c.cfg.Self && a.status.LeaderBoot != 0 && a.status.LeaderBoot != c.boot:
			other = true
		}
	}
	return other, nil
}

func (c *Control) generation() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pooled.Generation
}
