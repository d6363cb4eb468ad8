package core

import (
	"time"

	"mortar/internal/cluster"
	"mortar/internal/proto"
)

// leaveWait is how long a brick that leaves in order waits for the word of its
// clients that they have dropped their caches. The set works on meanwhile.
const leaveWait = 700 * time.Millisecond

// Leave gives up, in order, what the brick does in its set, so that its end stalls
// nobody: its clients have been sent elsewhere, it takes no more changes if it is the
// primary, gives up its leases, says so, and wants a configuration without it.
// cached tells whether some client may still answer from what it has cached here.
//
// next is to be proposed. again: everything that is under way comes first, so Leave
// is to be called again in a moment. With neither there is nothing to hand over: the
// others do not count on this brick, or it is the last that they have, or it is out
// of touch with them, so that they have to decide without it.
func (m *Machine) Leave(now Instant, cached bool) (next *cluster.SetConfig, again bool) {
	if m.cfg.Epoch == 0 || !m.cfg.IsInSync(m.self) || len(m.cfg.InSync) == 1 || m.role == Waiting {
		m.leaving = false
		return nil, false
	}
	if !m.leaving {
		m.leaving, m.leftAt = true, now
	}
	// Of the clients of a former life nobody knows; they have their caches until then.
	cached = cached || now < m.former
	if cached && now < m.leftAt+leaveWait {
		return nil, true
	}
	n := m.cfg.Clone()
	n.Epoch++
	n.InSync = n.InSync[:0]
	for _, b := range m.cfg.InSync {
		if b != m.self {
			n.InSync = append(n.InSync, b)
		}
	}
	n.Floor = m.floor
	heir := m.cfg.Primary
	switch m.role {
	case Backup:
		if now >= m.lease || m.bereft == m.cfg.Epoch {
			return nil, false // the primary is dead or may be, and not the one to go on with
		}
	case Primary:
		if now < m.holdUntil {
			return nil, true // a brick that is no longer in sync may still serve reads, and the heir does not know
		}
		m.closed = true
		if m.acked < m.tail.Seq {
			return nil, true
		}
		heir = BrickID{}
		for _, b := range m.others() {
			if p := m.progress[b]; m.inSync(b, p) && p.acked >= m.tail.Seq && (heir.IsZero() || m.cfg.IsDrained(heir)) {
				heir = b
			}
		}
		if heir.IsZero() {
			m.Stay()
			return nil, false
		}
		n.Primary = heir
	}
	m.Retire()
	if !cached {
		m.send(heir, proto.KindRelease, &proto.Release{Epoch: m.cfg.Epoch})
	}
	return &n, false
}

// Stay ends an attempt to leave that is not wanted any more, or has taken too long: the
// brick goes on with what it does. After Leave has returned next it changes nothing.
func (m *Machine) Stay() { m.leaving, m.closed = false, false }

// Leaving reports whether the brick gives up what it does: it takes no new clients.
func (m *Machine) Leaving() bool { return m.leaving }
