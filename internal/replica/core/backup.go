package core

import (
	"mortar/internal/cluster"
	"mortar/internal/proto"
)

// fromPrimary reports whether a message comes from the primary of the epoch
// that this brick follows.
func (m *Machine) fromPrimary(now Instant, from BrickID, epoch cluster.Epoch) bool {
	if m.role != Backup || epoch != m.cfg.Epoch || epoch <= max(m.sealed, m.bereft) || from != m.cfg.Primary {
		return false
	}
	m.primarySeen, m.met = now, epoch
	if m.strayed {
		m.strayed, m.strays = false, now+cluster.LeaseGuard
	}
	return true
}

// Probe takes a primary's question where this log stands.
func (m *Machine) Probe(now Instant, from BrickID, p *proto.Probe) {
	if p.Config.Set != m.cfg.Set && m.cfg.Epoch != 0 || p.Config.Primary != from || p.Config.Epoch <= m.sealed {
		return
	}
	m.Configure(now, p.Config)
	if !m.fromPrimary(now, from, p.Config.Epoch) || p.Round <= m.round {
		return
	}
	m.round, m.fresh, m.fits, m.deaf = p.Round, true, false, false
	m.sendProbeAck()
}

func (m *Machine) sendProbeAck() {
	m.send(m.cfg.Primary, proto.KindProbeAck, &proto.ProbeAck{
		Epoch: m.cfg.Epoch, Round: m.round, Tail: m.tail, History: m.history, Whole: m.whole,
	})
}

// SayWhere tells the primary where the log stands, so that it starts over from there.
func (m *Machine) SayWhere() {
	if m.role == Backup && m.round != 0 && !m.deaf {
		m.deaf = true // what is on the way in this round does not fit
		m.sendProbeAck()
	}
}

// Follows reports whether this log is known to have nothing but what the primary's
// has, as a backup of this epoch.
func (m *Machine) Follows() bool {
	return m.role == Backup && m.round != 0 && m.fits
}

// Append takes entries from the primary. Ready tells the shell which to apply.
func (m *Machine) Append(now Instant, from BrickID, a *proto.Append) {
	if !m.fromPrimary(now, from, a.Epoch) || a.Round != m.round || !m.whole || m.deaf {
		return
	}
	first := m.fresh
	m.fresh = false
	switch {
	case a.Prev.Seq < m.commit && a.Prev != m.tail:
		// The primary lacks what was committed here: impossible while all invariants
		// hold, so this brick's own memory is what cannot be trusted.
		m.RewindFailed()
		m.SayWhere()
		return
	case a.Prev == m.tail && m.loaded:
		m.out.Apply = append(m.out.Apply, Apply{Entries: a.Entries})
	case first && m.has(a.Prev):
		prev := a.Prev
		m.out.Apply = append(m.out.Apply, Apply{Rewind: &prev, Entries: a.Entries})
	default:
		m.SayWhere() // something was lost on the way; the primary looks again
		return
	}
	m.seeCommit(min(a.Commit, a.Prev.Seq)) // what is behind it is yet to be cut
}

// Applied tells that everything the last Ready asked to apply has been.
func (m *Machine) Applied(commit uint64) {
	if m.role != Backup || m.round == 0 {
		return
	}
	m.seeCommit(commit)
	m.fits, m.ackDue = true, true
}

// acknowledges returns up to where this backup has what the primary sent in this
// round, 0 for nothing. What an earlier round left in its log it does not answer for:
// the primary's log may be another there.
func (m *Machine) acknowledges() uint64 {
	if m.role != Backup || m.round == 0 || !m.fits {
		return 0
	}
	return m.clear
}

// seeCommit takes the primary's word of how far changes are committed.
func (m *Machine) seeCommit(seq uint64) {
	m.commit = max(m.commit, min(seq, m.tail.Seq))
	m.acked = m.commit
}

// Beat takes a heartbeat. free and sessions go into the answer, see proto.BeatAck.
func (m *Machine) Beat(now Instant, from BrickID, b *proto.Beat, sessions []cluster.SessionID, free uint64) {
	if !m.fromPrimary(now, from, b.Epoch) {
		return
	}
	if b.Round > m.round && m.role == Backup {
		// This brick was opened again under a connection that has held, and the round was
		// begun with its former life. The primary begins another; nothing in this
		// message is meant for this life, least of all the lease.
		m.send(from, proto.KindProbeAck, &proto.ProbeAck{
			Epoch: m.cfg.Epoch, Round: b.Round, Tail: m.tail, History: m.history, Whole: m.whole,
		})
	}
	if b.Round != m.round {
		return
	}
	if m.fits {
		m.seeCommit(b.Commit)
	}
	if b.Grant > 0 && Instant(b.Echo) <= now {
		m.lease = max(m.lease, Instant(b.Echo)+min(Instant(b.Grant), cluster.Lease))
		m.trusted = true
	}
	m.lastGrant = now
	m.send(from, proto.KindBeatAck, &proto.BeatAck{
		Epoch: m.cfg.Epoch, Round: m.round, Echo: b.Stamp, Stamp: uint64(now),
		Applied: m.tail.Seq, Acked: m.acknowledges(), Sessions: sessions, Free: free,
	})
}

// HealOrder takes the primary's word that only a comparison helps.
func (m *Machine) HealOrder(now Instant, from BrickID, h *proto.HealOrder) {
	if !m.fromPrimary(now, from, h.Epoch) || h.Round != m.round {
		return
	}
	m.RewindFailed()
	m.out.Heal = true
}

// Release takes the word of another brick that it holds no lease up to an epoch.
func (m *Machine) Release(now Instant, from BrickID, r *proto.Release) {
	if p := m.progress[from]; p != nil && r.Epoch == m.cfg.Epoch {
		p.grantedUntil = now // a backup that leaves
		return
	}
	switch {
	case r.Epoch == m.cfg.Epoch && from == m.cfg.Primary:
		m.released = r.Epoch // this brick may be to lead the next
	case m.role == Primary && r.Epoch+1 == m.cfg.Epoch && from == m.heirTo:
		m.holdUntil = min(m.holdUntil, now)
		m.advance(now)
	}
}
