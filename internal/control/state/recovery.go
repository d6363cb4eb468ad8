package state

import (
	"fmt"
	"slices"

	"mortar/internal/cluster"
)

// This file decides what an operator may have decided: going on with less than
// everything. Nothing here happens by itself. What would be lost is said first,
// so that somebody can agree to exactly that.

// Standing is how one brick of a set stands before a recovery.
type Standing struct {
	Brick cluster.BrickID
	// Answers is false if the brick is not served, or its peer cannot be reached.
	Answers bool
	Whole   bool        // its contents are known: it is not in the middle of a comparison
	Leads   bool        // it works as the primary of the present epoch
	Tail    cluster.Pos // the end of its log
	Time    int64       // of its last change, in nanoseconds since 1970 by the clock of the primary of that time; 0: none
}

// Recovery is what it depends on whether, and with which brick, a set may be
// made to go on although its in-sync bricks are lost.
type Recovery struct {
	Config cluster.SetConfig
	Bricks []Standing // one missing does not answer
	// Chosen is the brick that the operator wants to go on with; zero: the one
	// that has most.
	Chosen cluster.BrickID
}

// Plan is a recovery to agree to.
type Plan struct {
	// Next is the configuration to propose, with Force, once the chosen brick
	// was sealed and found to be still at Next.Floor.
	Next cluster.SetConfig
	Time int64 // of the last change that is kept; 0: not known
	// Missing is how many changes are certainly lost: the set was known to be
	// durable that much further. More may be.
	Missing uint64
	// Lost are the bricks that have, or may have, what the chosen one lacks. If
	// they return, that is taken back from them.
	Lost []LostBrick
}

// LostBrick is a brick whose last changes are given up.
type LostBrick struct {
	Brick  cluster.BrickID
	InSync bool // it had everything that was acknowledged, as far as the configuration says
	// Ahead is by how many changes it is known to be ahead; 0 with Answers false
	// means that nobody knows.
	Ahead   uint64
	Answers bool
}

// Decide makes the plan, or says why there is nothing to recover, or nothing to
// recover from. A set that can go on by itself, with everything, is never
// recovered.
func (r *Recovery) Decide() (*Plan, *Error) {
	no := func(format string, args ...any) (*Plan, *Error) { return nil, Refusal(CodeUnsafe, format, args...) }
	cfg := &r.Config
	if cfg.Epoch == 0 {
		return no("it was never started, so there is nothing to recover")
	}
	var best, chosen *Standing
	standing := 0
	for _, id := range cfg.Members {
		s := r.standing(id)
		if !s.Answers {
			continue
		}
		// Were the primary to be asked only whether it answers, one that waits for
		// the lease of a lost backup would be taken for one that works; it is, in a moment.
		if s.Leads && id == cfg.Primary {
			return no("brick %v leads it, so there is nothing to recover", id)
		}
		if !s.Whole {
			continue
		}
		standing++
		if !cfg.Doubted && cfg.IsInSync(id) && s.Tail.Compare(cfg.Floor) >= 0 {
			return no("brick %v is in sync and answers, so the set goes on by itself, with everything, as soon as the pool can decide it", id)
		}
		if best == nil || s.Tail.Compare(best.Tail) > 0 {
			best = &s
		}
		if id == r.Chosen {
			chosen = &s
		}
	}
	switch {
	case cfg.Doubted && standing == len(cfg.Members) && best.Tail.Compare(cfg.Floor) >= 0:
		return no("all of its bricks answer, so the set goes on by itself, with what the furthest of them has")
	case !r.Chosen.IsZero() && !cfg.IsMember(r.Chosen):
		return no("brick %v is not one of the set", r.Chosen)
	case !r.Chosen.IsZero() && chosen == nil:
		return no("brick %v does not answer, or its contents are not complete: it cannot lead", r.Chosen)
	case best == nil:
		return no("none of its %d brick(s) answers with complete contents. Bring one back first; what is left on a disk shows \"mortar brick check\" and saves \"mortar brick export\"", len(cfg.Members))
	case chosen == nil:
		chosen = best
	}
	p := &Plan{Next: cfg.Clone(), Time: chosen.Time}
	p.Next.Epoch++
	p.Next.Doubted = false
	p.Next.Chosen = p.Next.Epoch
	p.Next.Primary, p.Next.InSync, p.Next.Floor = chosen.Brick, []cluster.BrickID{chosen.Brick}, chosen.Tail
	if cfg.Floor.Seq > chosen.Tail.Seq {
		p.Missing = cfg.Floor.Seq - chosen.Tail.Seq
	}
	for _, id := range cfg.Members {
		s := r.standing(id)
		l := LostBrick{Brick: id, InSync: cfg.IsInSync(id), Answers: s.Answers}
		if s.Answers && s.Tail.Compare(chosen.Tail) > 0 {
			l.Ahead = max(s.Tail.Seq, chosen.Tail.Seq+1) - chosen.Tail.Seq
		}
		if id != chosen.Brick && (l.Ahead > 0 || !s.Answers && (l.InSync || cfg.Doubted)) {
			p.Lost = append(p.Lost, l)
			p.Missing = max(p.Missing, l.Ahead)
		}
	}
	return p, nil
}

func (r *Recovery) standing(id cluster.BrickID) Standing {
	if i := slices.IndexFunc(r.Bricks, func(s Standing) bool { return s.Brick == id }); i >= 0 {
		return r.Bricks[i]
	}
	return Standing{Brick: id}
}

// record notes a forced configuration in the volume, for whoever wonders later
// where something went.
func record(v *cluster.Volume, old, next *cluster.SetConfig, at int64, by cluster.PeerID) {
	r := cluster.Recovery{
		Set: next.Set.Index, Epoch: next.Epoch, At: at, By: by,
		Brick: next.Primary, Kept: next.Floor, Known: old.Floor,
	}
	had := old.InSync
	if old.Doubted {
		had = old.Members
	}
	for _, b := range had {
		if b != next.Primary {
			r.Lost = append(r.Lost, b)
		}
	}
	v.Recoveries = append(slices.Clone(v.Recoveries), r)
	if n := len(v.Recoveries) - maxRecoveries; n > 0 {
		v.Recoveries = slices.Delete(v.Recoveries, 0, n)
	}
}

// maxRecoveries bounds what is remembered of recoveries, the latest.
const maxRecoveries = 16

// PeerCopy is how far another peer's copy of the pool's configuration goes.
type PeerCopy struct {
	Peer       cluster.PeerID
	Applied    uint64
	Generation uint64
}

// PoolRecovery is what it depends on whether a peer may be made the only voter of
// a pool that can decide nothing.
type PoolRecovery struct {
	Map        *cluster.Map
	Self       cluster.PeerID
	Voters     []cluster.PeerID
	Leader     cluster.PeerID // zero: none is known
	Applied    uint64         // of this peer's own copy
	Generation uint64
	Heard      []PeerCopy // what the peers that answer say
}

// Decide returns the voters that are given up, or why the pool must not be
// recovered here.
func (r *PoolRecovery) Decide() (silent []cluster.PeerID, refusal *Error) {
	name := func(id cluster.PeerID) string {
		if p := r.Map.Peer(id); p != nil {
			return p.Name
		}
		return id.String()
	}
	if r.Map.Peer(r.Self) == nil {
		return nil, Refusal(CodeNoPool, "this machine is not in a pool, so there is nothing to recover")
	}
	if r.Map.Peer(r.Self).NoVote {
		return nil, Refusal(CodeUnsafe, "this machine is a client, which never votes: recover the pool on a machine that may")
	}
	if !r.Leader.IsZero() {
		return nil, Refusal(CodeUnsafe, "the pool can decide, and %s leads it: there is nothing to recover", name(r.Leader))
	}
	alive := 0
	for _, v := range r.Voters {
		heard := slices.ContainsFunc(r.Heard, func(c PeerCopy) bool { return c.Peer == v })
		if v == r.Self || heard {
			alive++
			continue
		}
		silent = append(silent, v)
	}
	if alive > len(r.Voters)/2 {
		return nil, Refusal(CodeUnsafe, "%d of the %d voting peers answer and are enough: they elect a leader in a moment", alive, len(r.Voters))
	}
	for _, c := range r.Heard {
		switch {
		case c.Generation > r.Generation:
			return nil, Refusal(CodeRecovered, "the pool was recovered already, and %s is in it", name(c.Peer))
		case c.Applied > r.Applied:
			return nil, Refusal(CodeUnsafe, "%s answers and knows more of the pool than this machine (%d decisions, here %d): recover the pool there", name(c.Peer), c.Applied, r.Applied)
		}
	}
	return silent, nil
}

// String is the record as a sentence for a log.
func (l LostBrick) String() string {
	switch {
	case l.Ahead > 0:
		return fmt.Sprintf("%v is ahead by %d", l.Brick, l.Ahead)
	case l.InSync:
		return fmt.Sprintf("%v was in sync", l.Brick)
	}
	return fmt.Sprintf("%v may have more", l.Brick)
}
