package state

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/proto"
)

// The times of a failover.
const (
	// SealTimeout is how long one round of seals is waited for.
	SealTimeout = 300 * time.Millisecond
	// TrustWait is how long a failover waits for more of the in-sync bricks when
	// none of those that answered has certainly kept everything.
	TrustWait = 3 * time.Second
	// InsistAfter is how long a brick may refuse its seal because it still hears
	// a primary that the control plane itself cannot reach.
	InsistAfter = 2 * time.Second
)

// SealResult is what became of the seal of one brick.
type SealResult struct {
	Brick cluster.BrickID
	// Answered is false if the brick could not be reached, or not in time.
	Answered bool
	Reply    proto.SealReply // if Answered
}

// Failover is everything that the choice of a new primary depends on.
type Failover struct {
	Config  cluster.SetConfig
	Results []SealResult  // of the in-sync bricks (of all, if they are Doubted), in any order; one missing did not answer
	Elapsed time.Duration // since the first round of seals
	// Insisted tells that the bricks were to be sealed even if they hear their
	// primary; so it is in every planned failover.
	Insisted bool
	// Leaving is a brick that goes away by intent: it neither leads nor stays in
	// sync. Zero in an unplanned failover.
	Leaving cluster.BrickID
}

// Verdict is what to do about a set.
type Verdict struct {
	// Next, if not nil, is the configuration to propose.
	Next *cluster.SetConfig
	// Again asks for another round of seals. With neither Next nor Again the
	// failover is refused until something changes.
	Again bool
	// Insist asks that the next round seals bricks that still hear their primary.
	Insist bool
	// Reason says in a sentence why there is no Next.
	Reason string
}

// Decide chooses the next configuration of a set whose in-sync bricks were
// sealed, that is, accept nothing more of the present epoch.
//
// A brick that does not know its own contents counts for nothing, neither as a
// candidate nor as one that keeps its primary.
//
// Every acknowledged change is on every in-sync brick, so any sealed one that
// has certainly kept what it had (Trusted) may lead; the one with the highest
// position undoes the least. Whoever did not answer leaves the in-sync set: it
// may have missed what comes now.
//
// A brick that restarted uncleanly has everything that was ever flushed, and
// perhaps not the last changes. If there are only such, as after a power cut of
// everything, the others are waited for a while; then the highest position
// leads, alone, for the rest may differ from it in anything that was not
// flushed. It must reach Floor, which the control plane knows to have been
// durable; if it does not, its disk has lost data and an operator decides.
func (f *Failover) Decide() Verdict {
	cfg := &f.Config
	if cfg.Doubted {
		return f.decideAll()
	}
	var trusted, sealed []SealResult
	answered := 0
	var refusal, unfit *SealResult
	primary := f.result(cfg.Primary)
	for _, id := range f.order() {
		r := f.result(id)
		if !r.Answered {
			continue
		}
		answered++
		switch {
		case r.Reply.Unfit:
			unfit = &r
		case !r.Reply.Sealed:
			if refusal == nil {
				refusal = &r
			}
		case id == f.Leaving:
		// One that claims to have kept everything, and ends below what it once had
		// made durable, is an older image of itself.
		case r.Reply.Trusted && r.Reply.Tail.Compare(cfg.Floor) >= 0:
			trusted = append(trusted, r)
			sealed = append(sealed, r)
		default:
			sealed = append(sealed, r)
		}
	}
	if refusal != nil && !f.Insisted {
		reason := fmt.Sprintf("brick %v keeps its primary: %s", refusal.Brick, refusal.Reply.Text)
		switch {
		case primary.Answered && !primary.Reply.Sealed && !primary.Reply.Unfit:
			return Verdict{Reason: reason}
		case primary.Answered || cfg.Primary.IsZero():
			return Verdict{Again: true, Insist: true, Reason: reason}
		}
		return Verdict{Again: true, Insist: f.Elapsed >= InsistAfter, Reason: reason}
	}
	candidates := len(cfg.InSync)
	if cfg.IsInSync(f.Leaving) {
		candidates--
	}
	if candidates == 0 {
		return Verdict{Reason: "no other brick is in sync to take over"}
	}
	if best, ok := highest(trusted); ok {
		var inSync []cluster.BrickID
		for _, r := range trusted {
			inSync = append(inSync, r.Brick)
		}
		return f.next(best, inSync)
	}
	if left := f.result(f.Leaving); left.Answered && left.Reply.Sealed && left.Reply.Trusted && cfg.IsInSync(f.Leaving) {
		return Verdict{Reason: "only the brick that is to go away has certainly kept everything: wait until the others have healed"}
	}
	if len(sealed) == 0 {
		reason := fmt.Sprintf("none of the %d in-sync brick(s) can be reached", candidates)
		if refusal == nil {
			refusal = unfit
		}
		if refusal != nil {
			reason = fmt.Sprintf("none of the %d in-sync brick(s) can lead; brick %v: %s", candidates, refusal.Brick, refusal.Reply.Text)
		}
		return Verdict{Again: true, Reason: reason}
	}
	if answered < len(cfg.InSync) && f.Elapsed < TrustWait {
		return Verdict{Again: true, Reason: fmt.Sprintf("the bricks that can be reached stopped uncleanly; waiting for the other in-sync brick(s), %d of %d answered", answered, len(cfg.InSync))}
	}
	best, _ := highest(f.primaryFirst(sealed))
	if best.Reply.Tail.Compare(cfg.Floor) < 0 {
		return Verdict{Again: true, Reason: fmt.Sprintf("brick %v reaches %v and the set was durable up to %v: data would be lost. Bring back the brick(s) that do not answer, or decide to go on with less", best.Brick, best.Reply.Tail, cfg.Floor)}
	}
	return f.alone(best)
}

// decideAll chooses for a set of which nobody knows which bricks have everything:
// the one that has most, and only if all have said what they have.
func (f *Failover) decideAll() Verdict {
	var all []SealResult
	var missing []string
	for _, id := range f.Config.Members {
		switch r := f.result(id); {
		case !r.Answered:
			missing = append(missing, fmt.Sprintf("brick %v does not answer", id))
		case !r.Reply.Sealed:
			missing = append(missing, fmt.Sprintf("brick %v: %s", id, r.Reply.Text))
		default:
			all = append(all, r)
		}
	}
	if len(missing) > 0 {
		return Verdict{Again: true, Insist: true, Reason: "the pool was recovered by hand and may not know which bricks have every change, so all of them must be there: " + strings.Join(missing, "; ")}
	}
	best, _ := highest(all)
	if best.Reply.Tail.Compare(f.Config.Floor) < 0 {
		return Verdict{Again: true, Insist: true, Reason: fmt.Sprintf("brick %v reaches %v and the set was durable up to %v: data would be lost", best.Brick, best.Reply.Tail, f.Config.Floor)}
	}
	return f.alone(best)
}

// order lists the in-sync bricks in the order in which equals are preferred: as
// the user gave them, but the primary last, since something was wrong with it,
// or first, if it is another brick that goes away; and those on drained peers behind all.
func (f *Failover) order() []cluster.BrickID {
	var ids []cluster.BrickID
	if !f.Leaving.IsZero() && f.Config.IsInSync(f.Config.Primary) {
		ids = append(ids, f.Config.Primary)
	}
	for _, b := range f.Config.Members {
		if f.Config.IsInSync(b) && b != f.Config.Primary {
			ids = append(ids, b)
		}
	}
	if f.Leaving.IsZero() && f.Config.IsInSync(f.Config.Primary) {
		ids = append(ids, f.Config.Primary)
	}
	slices.SortStableFunc(ids, func(a, b cluster.BrickID) int {
		switch ad, bd := f.Config.IsDrained(a), f.Config.IsDrained(b); {
		case ad == bd:
			return 0
		case ad:
			return 1
		}
		return -1
	})
	return ids
}

// primaryFirst is for bricks that have all stopped uncleanly: that tells no more against
// the primary than against the others, so it goes on among equals.
func (f *Failover) primaryFirst(rs []SealResult) []SealResult {
	i := slices.IndexFunc(rs, func(r SealResult) bool { return r.Brick == f.Config.Primary })
	if i < 0 || f.Config.IsDrained(f.Config.Primary) {
		return rs
	}
	return append([]SealResult{rs[i]}, slices.Delete(slices.Clone(rs), i, i+1)...)
}

func (f *Failover) result(id cluster.BrickID) SealResult {
	i := slices.IndexFunc(f.Results, func(r SealResult) bool { return r.Brick == id })
	if i < 0 {
		return SealResult{Brick: id}
	}
	return f.Results[i]
}

// highest returns the first result with the highest position.
func highest(rs []SealResult) (best SealResult, ok bool) {
	for _, r := range rs {
		if !ok || r.Reply.Tail.Compare(best.Reply.Tail) > 0 {
			best, ok = r, true
		}
	}
	return best, ok
}

func (f *Failover) next(best SealResult, inSync []cluster.BrickID) Verdict {
	n := f.Config.Clone()
	n.Epoch++
	n.Primary = best.Brick
	n.InSync = inSync
	n.Doubted = false
	return Verdict{Next: &n}
}

// alone lets a brick lead that may lack what others have had.
func (f *Failover) alone(best SealResult) Verdict {
	v := f.next(best, []cluster.BrickID{best.Brick})
	v.Next.Chosen = v.Next.Epoch
	return v
}
