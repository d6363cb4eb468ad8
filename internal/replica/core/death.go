package core

import "mortar/internal/cluster"

// Died tells that the process which was brick b has certainly ended, and that no client of
// it answers from a cache any more. The shell answers for both, and that no word of a
// later life of b has come before this one.
//
// It says of a dead process what Release says of one that leaves in order, with two
// differences. What that one had sent has come before its Release, and what the dead one
// had sent may come after this: none of it counts any more. And that one had outwaited
// whom it dropped before; the dead one no longer does.
func (m *Machine) Died(now Instant, b BrickID) {
	if p := m.progress[b]; p != nil {
		p.dead = true
		p.grantedUntil = min(p.grantedUntil, now)
		if p.connected {
			// Perhaps to its next life already. In a new round nothing counts that the dead one said.
			m.probe(now, b)
		}
	}
	switch {
	case b == m.cfg.Primary && b != m.self:
		if m.met != m.cfg.Epoch {
			return // it may be the next life that leads, of which nothing has come yet
		}
		m.bereft = m.cfg.Epoch
		m.primarySeen, m.nextSuspect = now-cluster.Suspicion, 0
		m.suspect(now)
	case m.role == Primary:
		if b == m.heirTo {
			m.holdUntil = min(m.holdUntil, max(now, m.afterHeir))
		}
		m.tickPrimary(now)
	}
}
