package sim

import (
	"slices"
	"time"
)

// Minimise returns a shorter plan that fails as well: it leaves out actions as
// long as what remains still fails, for at most that long.
func Minimise(p *Plan, limit time.Duration) *Plan {
	end := time.Now().Add(limit)
	best := *p
	try := func(q Plan) bool {
		if time.Now().After(end) || Run(&q, nil).Err == nil {
			return false
		}
		best = q
		return true
	}
	for shorter := true; shorter; {
		shorter = false
		for n := max(1, len(best.Actions)/2); ; n /= 2 {
			for i := 0; i < len(best.Actions); {
				q := best
				q.Actions = slices.Delete(slices.Clone(best.Actions), i, min(i+n, len(best.Actions)))
				if try(q) {
					shorter = true
				} else {
					i += n
				}
			}
			if n <= 1 {
				break
			}
		}
	}
	// Less of everything.
	for best.Clients > 0 {
		q := best
		q.Clients--
		if slices.ContainsFunc(q.Actions, func(a Action) bool { return a.mentions(q.Clients) }) || !try(q) {
			break
		}
	}
	if n := len(best.Actions); n > 0 {
		q := best
		q.For = best.Actions[n-1].At + time.Millisecond
		try(q)
	}
	return &best
}

// mentions reports whether the action is about that client.
func (a Action) mentions(client int) bool {
	i := 0
	for _, k := range verbs[a.Verb] {
		if k == 'd' {
			continue
		}
		if k == 'c' && a.Args[i] == client || k == 'n' && a.Args[i] == firstClient+client {
			return true
		}
		i++
	}
	return false
}
