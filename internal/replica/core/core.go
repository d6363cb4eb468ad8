// Package core is the replication protocol of one replica set as a pure machine.
//
// Primary-backup with an in-sync set, after PacificA (Lin, Yang, Zhang, Zhou:
// "PacificA: Replication in Log-Based Distributed Storage Systems", MSR-TR-2008-25):
// the primary gives every change the next position, streams it to all members,
// and may acknowledge it once every brick of the in-sync set has it. Who is
// primary and who is in sync is decided elsewhere, by the control plane, and
// arrives here as a cluster.SetConfig with an epoch.
//
// A Machine has no clock, goroutine, lock or I/O. Its shell (package replica)
// tells it what happened, and when, by calling a method; the machine answers
// through Ready with what to send, apply, propose. It never sees the contents
// of an entry, only positions. All instants are durations on one monotonic
// clock of the shell's; instants of two machines are never compared.
//
// # Leases
//
// Reads are served from a brick only under a lease, so that no brick serves
// what a newer configuration has overtaken. A backup gives the primary its lease by
// answering a Beat: the lease runs from when the Beat was sent. The primary gives a
// backup its lease by echoing the BeatAck: the lease runs from when the BeatAck
// was sent, and never beyond the primary's own, which is the earliest of
// those that its backups gave. So a member of the in-sync set that outwaits
// the lease it gave last has outwaited every lease of that epoch. It is what a
// new primary does before it commits anything (holdUntil).
package core

import (
	"fmt"
	"slices"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/proto"
)

// Instant is a moment on the shell's monotonic clock.
type Instant = time.Duration

// Role is what the brick does in its set.
type Role uint8

const (
	// Waiting: no part in the set until a configuration, or a newer one, gives one.
	// So is a brick that was sealed, and a primary that restarted.
	Waiting Role = iota
	// Backup follows the primary of the configuration, in sync or on its way to be.
	Backup
	// Primary orders changes.
	Primary
)

func (r Role) String() string { return [...]string{"waiting", "backup", "primary"}[r] }

// Limits of what is on the way to one backup.
const (
	maxInflight    = 4096 // entries sent and not yet acknowledged
	joinLag        = 256  // a backup this close to the tail may join the in-sync set
	probeRetry     = 500 * time.Millisecond
	suspectRetry   = 300 * time.Millisecond
	proposeRetry   = 300 * time.Millisecond
	primaryIsAlive = 400 * time.Millisecond // a backup that heard its primary within this does not let itself be sealed
)

// Brick is what the machine must know of the storage it speaks for.
type Brick struct {
	Tail    cluster.Pos   // end of the log
	History []cluster.Pos // first position of each epoch in the log
	Whole   bool          // the contents are known
	Trusted bool          // nothing acknowledged can be missing: cleanly stopped
	// Promised is the newest epoch that the brick has ever been configured with
	// (Ready.Promise).
	Promised cluster.Epoch
}

// Message is something to send to another replica.
type Message struct {
	To   cluster.BrickID
	Kind uint8
	Body codec.Coded
}

// Stream asks the shell to send the entries after Prev up to Upto, in order,
// as one or more Append messages.
type Stream struct {
	To     cluster.BrickID
	Round  uint64
	Prev   cluster.Pos
	Upto   uint64
	Commit uint64
}

// Apply asks the shell to make the log end at Rewind, if set, and then to
// append and apply the entries.
type Apply struct {
	Rewind  *cluster.Pos
	Entries []proto.AppendEntry
}

// Ready is what the machine wants done. The shell does it in the order of the
// fields before it tells the machine of anything else.
type Ready struct {
	// Promise, if not 0, is an epoch that the brick must remember, whatever
	// happens to the process or the machine: it takes part in none before it any more.
	Promise  cluster.Epoch
	Apply    []Apply
	Lead     bool // replay the log if need be, then append a Noop
	Heal     bool // compare this brick with the primary's
	Leave    bool // hand over what this brick does (Machine.Leave)
	Messages []Message
	Streams  []Stream
	Propose  *cluster.SetConfig
	Suspect  cluster.Epoch // if not 0, tell the control plane that this epoch has no primary
}

// Machine is one brick's part in the protocol. It is not safe for concurrent use.
type Machine struct {
	self BrickID
	out  Ready

	cfg    cluster.SetConfig // Epoch 0: none yet
	role   Role
	sealed cluster.Epoch // nothing of this epoch or an older one is accepted
	past   cluster.Epoch // the newest that a former life of the brick took part in

	// The brick.
	tail    cluster.Pos
	history []cluster.Pos
	whole   bool
	loaded  bool // the log has been replayed up to tail
	trusted bool

	commit uint64 // every in-sync brick has everything up to here
	acked  uint64 // commit, as far as it may be told to clients: frozen while the set is too small to take writes
	clear  uint64 // no cache of this brick's sessions contradicts anything up to here
	own    uint64 // the same without the sessions of a former life, which have their caches until former
	former Instant
	floor  cluster.Pos

	// Leases that this brick gave, and took as a backup.
	lastGrant   Instant // when it last gave a primary a lease
	gave        Instant // no lease that it gave to a backup in an epoch before this lasts longer
	memberSince Instant // when it came into the in-sync set
	lease       Instant // as backup: may serve reads before this
	holdUntil   Instant // as primary: nothing commits before this
	heirTo      BrickID // as primary: the former one, if there is no lease to outwait but its own
	afterHeir   Instant // and those of bricks that it had dropped: until then
	strays      Instant // no brick that a primary which this one has heard had dropped before may serve after this
	strayed     bool    // some brick was dropped, and the primary has not been heard since

	// As backup.
	primarySeen Instant
	round       uint64 // of the primary's probe
	fresh       bool   // no Append has come in this round: the first may ask for a Rewind
	fits        bool   // the log is a prefix of the primary's: an Append of this round was applied
	deaf        bool   // this round cannot go on; the primary has been told
	nextSuspect Instant
	epochSeen   Instant       // when the configuration arrived
	ackDue      bool          // the primary is owed an AppendAck
	released    cluster.Epoch // its primary said that it holds no lease any more, nor does any brick that it dropped
	met         cluster.Epoch // its primary has been heard
	bereft      cluster.Epoch // its primary is dead: it holds no lease, and is given none

	links map[BrickID]bool // which bricks messages can reach, whatever the role

	lags Instant // since when a sync waits for this brick alone (Lags)

	// Of Leave.
	leaving bool
	leftAt  Instant
	closed  bool // as primary: no more changes are ordered

	// As primary.
	progress map[BrickID]*Progress
	rounds   uint64
	nextBeat Instant
	adding   BrickID // proposed for the in-sync set: counts as if it were in it
	asked    bool    // adding was proposed, and may take effect
	// addingSince is when that began: what is missing is to be flushed soon.
	addingSince Instant
	proposing   bool
	nextTry     Instant
}

// BrickID is cluster.BrickID.
type BrickID = cluster.BrickID

// New returns the machine of brick self. Until Configure is called it waits.
func New(now Instant, self BrickID, b Brick) *Machine {
	m := &Machine{
		self: self, tail: b.Tail, history: slices.Clone(b.History), whole: b.Whole, trusted: b.Trusted,
		past: b.Promised,
		// A former life of this brick may have given leases up to this moment.
		lastGrant: now, memberSince: now, primarySeen: now,
		links: map[BrickID]bool{}, progress: map[BrickID]*Progress{},
	}
	if b.Promised != 0 || !b.Whole {
		m.former = now + cluster.LeaseGuard
	}
	return m
}

// Ready returns what is to be done and forgets it.
func (m *Machine) Ready() Ready {
	if m.ackDue && m.acknowledges() > 0 {
		m.send(m.cfg.Primary, proto.KindAppendAck, &proto.AppendAck{Epoch: m.cfg.Epoch, Round: m.round, Seq: m.acknowledges()})
	}
	m.ackDue = false
	r := m.out
	m.out = Ready{}
	return r
}

// Config returns the configuration the machine works under.
func (m *Machine) Config() cluster.SetConfig { return m.cfg }

// Role returns what the brick does now.
func (m *Machine) Role() Role { return m.role }

// Tail returns the end of the log.
func (m *Machine) Tail() cluster.Pos { return m.tail }

// Commit returns how far changes are decided: they will survive any fail-over.
func (m *Machine) Commit() uint64 { return m.commit }

// Acked returns how far changes may be acknowledged to clients.
func (m *Machine) Acked() uint64 { return m.acked }

// Whole reports whether the brick's contents are known.
func (m *Machine) Whole() bool { return m.whole }

// Trusted reports whether the brick certainly has everything that it ever
// acknowledged. One that stops without that has not stopped cleanly.
func (m *Machine) Trusted() bool { return m.trusted }

// Serving reports whether the brick may answer reads at this moment, and until when.
func (m *Machine) Serving(now Instant) (until Instant, ok bool) {
	if m.cfg.Epoch == 0 || m.sealed >= m.cfg.Epoch || !m.cfg.IsInSync(m.self) || !m.loaded || !m.whole {
		return 0, false
	}
	switch m.role {
	case Primary:
		until = m.primaryLease()
	case Backup:
		until = m.lease
	}
	return until, now < until
}

// forever is later than any instant.
const forever = Instant(1<<63 - 1)

// primaryLease is the earliest end of the leases that the backups gave.
func (m *Machine) primaryLease() Instant {
	end := forever
	for _, b := range m.required() {
		end = min(end, m.progress[b].leaseEnd)
	}
	return end
}

// required lists the backups without whose acknowledgement nothing commits.
func (m *Machine) required() []BrickID {
	var r []BrickID
	for _, b := range m.cfg.InSync {
		if b != m.self {
			r = append(r, b)
		}
	}
	if !m.adding.IsZero() && !slices.Contains(r, m.adding) {
		r = append(r, m.adding)
	}
	return r
}

// Counting lists the bricks without which nothing is acknowledged: this one, the
// others in sync, and one that was proposed to be.
func (m *Machine) Counting() []BrickID { return append(m.required(), m.self) }

// Next returns the position for the next change, if this brick may order one.
func (m *Machine) Next() (cluster.Pos, bool) {
	if m.role != Primary || !m.loaded || m.sealed >= m.cfg.Epoch || m.closed {
		return cluster.Pos{}, false
	}
	return cluster.Pos{Epoch: m.cfg.Epoch, Seq: m.tail.Seq + 1}, true
}

// Configure gives the machine a configuration. Older ones than it has are ignored.
func (m *Machine) Configure(now Instant, cfg cluster.SetConfig) {
	if cfg.Epoch <= m.cfg.Epoch || cfg.Epoch < m.past {
		return
	}
	old := m.cfg
	defer m.stray(old)
	m.cfg = cfg.Clone()
	m.out.Promise = cfg.Epoch
	m.epochSeen = now
	if cfg.IsInSync(m.self) && !old.IsInSync(m.self) {
		m.memberSince = now
	}
	if cfg.Floor.Compare(m.floor) > 0 {
		m.floor = cfg.Floor
	}
	m.adding, m.asked, m.proposing, m.nextTry = BrickID{}, false, false, 0
	m.lease, m.primarySeen, m.nextSuspect = 0, now, 0
	m.leaving, m.closed = false, false
	if m.sealed >= cfg.Epoch || !cfg.IsMember(m.self) {
		m.retire()
		return
	}
	if cfg.Primary != m.self {
		m.role, m.round = Backup, 0
		if cfg.Primary.IsZero() {
			m.role = Waiting
		}
		m.forget()
		return
	}
	m.lead(now, old)
}

// retire makes the machine wait for a newer configuration.
func (m *Machine) retire() {
	m.role, m.round, m.lease = Waiting, 0, 0
	m.forget()
}

// forget forgets the backups, but not for how long they may serve.
func (m *Machine) forget() {
	for _, p := range m.progress {
		m.gave = max(m.gave, p.grantedUntil)
	}
	clear(m.progress)
}

// lead makes the machine the primary of m.cfg.
func (m *Machine) lead(now Instant, old cluster.SetConfig) {
	fresh := m.tail == (cluster.Pos{}) && m.cfg.Epoch == 1
	m.heirTo = BrickID{}
	var granted Instant // no lease that another primary gave lasts longer
	// The control plane lets a brick lead that may lack something only alone, saying so,
	// and knowing what it has: having sealed this very life.
	chosen := fresh || m.trusted || m.cfg.Chosen == m.cfg.Epoch && m.sealed+1 == m.cfg.Epoch && m.tail.Compare(m.cfg.Floor) >= 0
	switch {
	case m.role == Primary:
		// The same primary goes on under a new epoch. It outwaits the leases of those that left.
		for _, b := range old.InSync {
			if p := m.progress[b]; p != nil && !m.cfg.IsInSync(b) {
				m.holdUntil = max(m.holdUntil, p.grantedUntil)
			}
		}
	case !m.whole || m.past >= m.cfg.Epoch || !chosen:
		// It does not know its contents; or a former life may have led this epoch, and
		// what that promised it cannot know; or it was a former life that was chosen,
		// which may have had more than this one. The control plane must choose anew.
		m.role = Waiting
		return
	default:
		// No lease of an older epoch outlasts the one that this brick gave last. Those of
		// bricks that stay in sync need not be outwaited: nothing commits without them.
		if !fresh {
			granted = max(m.gave, max(m.lastGrant, m.memberSince)+cluster.LeaseGuard)
			if old.Epoch+1 == m.cfg.Epoch && !slices.ContainsFunc(old.InSync, func(b BrickID) bool {
				return b != old.Primary && !m.cfg.IsInSync(b)
			}) {
				m.heirTo = old.Primary
			}
			m.afterHeir = max(m.holdUntil, m.strays)
			switch {
			case !m.heirTo.IsZero() && m.released+1 == m.cfg.Epoch:
			case !m.heirTo.IsZero() && m.bereft+1 == m.cfg.Epoch:
				m.holdUntil = m.afterHeir
			default:
				m.holdUntil = granted
			}
		}
		m.role = Primary
		m.trusted = true
		m.out.Lead = true
	}
	m.lags = 0
	keep := m.progress
	m.progress = map[BrickID]*Progress{}
	for _, b := range m.cfg.Members {
		if b == m.self {
			continue
		}
		p := &Progress{state: Lost, connected: m.links[b], heard: now, moved: now}
		if m.cfg.IsInSync(b) {
			p.grantedUntil = granted
		}
		if k := keep[b]; k != nil {
			p.grantedUntil, p.known, p.dead = k.grantedUntil, max(k.known, k.acked), k.dead
			p.barred, p.bars = k.barred, k.bars
		} else if old.IsInSync(b) {
			p.known = m.commit
		}
		m.progress[b] = p
		if p.connected {
			m.probe(now, b)
		}
	}
	m.nextBeat = now
	m.advance(now)
}

// stray notes that a brick may serve which was in sync in the old epoch and is no more: for
// no longer than a lease after its primary was heard in the new one, where it
// gives it none. The primary outwaits that, and says so when it leaves in order; when it
// dies, nobody does but who leads next.
func (m *Machine) stray(old cluster.SetConfig) {
	m.strayed = m.strayed || m.cfg.Epoch != old.Epoch+1 || // who knows what was in between
		slices.ContainsFunc(old.InSync, func(b BrickID) bool { return b != m.self && !m.cfg.IsInSync(b) })
}

// Connected tells that messages can reach brick b now. Whatever was on the way
// to it before may be lost.
func (m *Machine) Connected(now Instant, b BrickID) {
	m.links[b] = true
	if p := m.progress[b]; p != nil {
		p.connected = true
		m.probe(now, b)
	}
	if m.role == Backup && m.round != 0 && b == m.cfg.Primary {
		m.sayAgain()
	}
}

// sayAgain repeats to the primary what it may not have heard: where the log stands if
// the round has yet to begin or cannot go on, and else how far it has come.
func (m *Machine) sayAgain() {
	if m.fresh || m.deaf {
		m.sendProbeAck()
		return
	}
	m.ackDue = true
}

// Lost tells that messages can no longer reach brick b.
func (m *Machine) Lost(b BrickID) {
	delete(m.links, b)
	if p := m.progress[b]; p != nil {
		p.connected, p.state = false, Lost
	}
}

// Retire makes the brick do nothing more in its epoch: it orders, acknowledges
// and serves nothing, and gives no lease.
func (m *Machine) Retire() {
	m.sealed = max(m.sealed, m.cfg.Epoch)
	m.retire()
}

// Floor returns up to where the in-sync set is known to be durable.
func (m *Machine) Floor() cluster.Pos { return m.floor }

// Loaded tells that the log has been replayed up to its tail.
func (m *Machine) Loaded() { m.loaded = true }

// Rewound tells that the log now ends at pos, is replayed to there, and has this history.
func (m *Machine) Rewound(pos cluster.Pos, history []cluster.Pos) {
	m.tail, m.history, m.loaded = pos, slices.Clone(history), true
	m.clear, m.own = min(m.clear, pos.Seq), min(m.own, pos.Seq)
}

// RewindFailed tells that the brick cannot go back as far as asked; it is no
// longer of use until it has been compared.
func (m *Machine) RewindFailed() {
	m.whole, m.loaded, m.trusted, m.fits, m.lease = false, false, false, false, 0
}

// Healed tells that the brick equals the primary's at pos.
func (m *Machine) Healed(pos cluster.Pos, history []cluster.Pos) {
	m.whole = true
	m.Rewound(pos, history)
	// The primary may not have committed all of it yet; and what this brick took for
	// committed may be what it had to give up.
	m.commit, m.acked = 0, 0
	if m.role == Backup && m.round != 0 {
		m.fresh, m.fits, m.deaf = true, false, false
		m.sendProbeAck()
	}
}

// Appended tells that the entry at pos is logged and applied.
func (m *Machine) Appended(now Instant, pos cluster.Pos) {
	if pos.Seq != m.tail.Seq+1 {
		panic(fmt.Sprintf("replica/core: position %v after %v", pos, m.tail))
	}
	if len(m.history) == 0 || m.history[len(m.history)-1].Epoch != pos.Epoch {
		m.history = append(m.history, pos)
	}
	m.tail = pos
	if m.role == Primary {
		for _, b := range m.others() {
			m.pump(now, b)
		}
	}
}

// Cleared tells that no cache of the brick's own sessions contradicts anything up to seq.
func (m *Machine) Cleared(now Instant, seq uint64) {
	m.own = max(m.own, min(seq, m.tail.Seq))
	m.clearUp(now)
}

// clearUp counts what is cleared, once the sessions of a former life of the brick,
// of which this one knows nothing, have certainly dropped what they had cached.
func (m *Machine) clearUp(now Instant) {
	if m.clear >= m.own || now < m.former {
		return
	}
	m.clear = m.own
	switch {
	case m.role == Primary:
		m.advance(now)
	case m.role == Backup:
		m.ackDue = true
	}
}

// Durable tells up to where the in-sync set is known to be durable.
func (m *Machine) Durable(pos cluster.Pos) {
	if pos.Compare(m.floor) > 0 {
		m.floor = pos
	}
}

// Trimmed tells that the log no longer has what b needs next.
func (m *Machine) Trimmed(now Instant, b BrickID) {
	if p := m.progress[b]; p != nil && p.state == Streaming {
		m.orderHeal(now, b)
	}
}

// Backlogged tells that the connection to b could take no more: b starts over
// when it is connected again.
func (m *Machine) Backlogged(b BrickID) { m.Lost(b) }

// ProposeDone tells how the last proposal ended. Refused: it certainly did not
// and will not take effect, nor did an earlier one of its epoch.
func (m *Machine) ProposeDone(now Instant, epoch cluster.Epoch, refused bool) {
	if epoch != m.cfg.Epoch+1 {
		return // of a configuration that is history
	}
	m.proposing = false
	m.nextTry = now + proposeRetry
	if refused {
		m.adding, m.asked = BrickID{}, false
		m.advance(now)
	}
}

// Seal asks the brick to accept nothing more of epoch. See proto.Seal.
func (m *Machine) Seal(now Instant, s proto.Seal) proto.SealReply {
	no := func(format string, args ...any) proto.SealReply {
		return proto.SealReply{Text: fmt.Sprintf(format, args...), Tail: m.tail, Trusted: m.trusted}
	}
	switch {
	case s.Epoch < m.cfg.Epoch:
		return no("epoch %d is past; this brick is in epoch %d", s.Epoch, m.cfg.Epoch)
	case !m.whole:
		r := no("this brick is being compared and its contents are not complete")
		r.Unfit = true
		return r
	case s.Planned || m.sealed >= s.Epoch || m.cfg.Epoch < s.Epoch:
	case m.role == Primary && now < m.primaryLease() && m.primaryLease() != forever:
		return no("this brick is the primary and in touch with its backups")
	case m.role == Primary && m.primaryLease() == forever && m.loaded:
		return no("this brick is the primary and alone in sync")
	case m.role == Backup && m.round != 0 && now < m.primarySeen+primaryIsAlive:
		return no("the primary was heard %v ago", now-m.primarySeen)
	}
	m.sealed = max(m.sealed, s.Epoch)
	m.retire()
	return proto.SealReply{Sealed: true, Tail: m.tail, Trusted: m.trusted}
}

// Tick tells that time has passed. It is called every 100 ms or so.
func (m *Machine) Tick(now Instant) {
	if m.cfg.Epoch == 0 {
		return
	}
	m.clearUp(now)
	if m.cfg.IsDrained(m.self) && m.cfg.IsInSync(m.self) && m.cfg.Spares() > 0 && m.role != Waiting || m.Slow(now) {
		m.out.Leave = true
	}
	if m.role == Primary {
		m.tickPrimary(now)
		return
	}
	m.suspect(now)
}

// suspect tells the control plane that the epoch has no primary, if it seems so.
func (m *Machine) suspect(now Instant) {
	if !m.cfg.IsInSync(m.self) || !m.whole || now < m.nextSuspect {
		return
	}
	if m.role == Waiting && now >= m.epochSeen+suspectRetry/2 || now >= m.primarySeen+cluster.Suspicion {
		m.nextSuspect = now + suspectRetry
		m.out.Suspect = m.cfg.Epoch
	}
}

// others lists the members but this one, in the order of the configuration.
func (m *Machine) others() []BrickID {
	r := make([]BrickID, 0, len(m.cfg.Members))
	for _, b := range m.cfg.Members {
		if b != m.self {
			r = append(r, b)
		}
	}
	return r
}

func (m *Machine) send(to BrickID, kind uint8, body codec.Coded) {
	m.out.Messages = append(m.out.Messages, Message{To: to, Kind: kind, Body: body})
}

// span returns the first and last sequence of epoch e in the log.
func (m *Machine) span(e cluster.Epoch) (first, last uint64, ok bool) {
	for i, h := range m.history {
		if h.Epoch != e {
			continue
		}
		last = m.tail.Seq
		if i+1 < len(m.history) {
			last = m.history[i+1].Seq - 1
		}
		return h.Seq, last, true
	}
	return 0, 0, false
}

// has reports whether the log has, or once had, an entry at p.
func (m *Machine) has(p cluster.Pos) bool {
	if p == (cluster.Pos{}) {
		return true
	}
	first, last, ok := m.span(p.Epoch)
	return ok && p.Seq >= first && p.Seq <= last
}

// common returns the last position that this log shares with one that ends at
// tail and has the given history. An epoch has one primary and its entries one
// order, so two logs agree on every position that both have (KIP-101, KIP-279).
func (m *Machine) common(tail cluster.Pos, history []cluster.Pos) cluster.Pos {
	end := tail.Seq
	for _, h := range slices.Backward(history) {
		if first, last, ok := m.span(h.Epoch); ok {
			if s := min(end, last); s >= first && s >= h.Seq {
				return cluster.Pos{Epoch: h.Epoch, Seq: s}
			}
		}
		end = min(end, h.Seq-1)
	}
	return cluster.Pos{}
}
