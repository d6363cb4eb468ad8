package core

import (
	"time"

	"mortar/internal/cluster"
	"mortar/internal/proto"
)

// State says how far a primary has come with one backup.
type State uint8

const (
	// Lost: no message reaches the backup.
	Lost State = iota
	// Probing: the backup was asked where its log stands; until it has answered
	// it gets heartbeats only.
	Probing
	// Streaming: the backup's log is a prefix of the primary's, and it is sent
	// every entry in order.
	Streaming
	// Healing: the logs do not meet, so the backup compares bricks. It gets
	// heartbeats only, until it says where it stands.
	Healing
)

func (s State) String() string {
	return [...]string{"lost", "probing", "streaming", "healing"}[s]
}

// Progress is what a primary knows of one backup in the current epoch.
type Progress struct {
	state     State
	connected bool
	dead      bool    // the process has ended, and the next one has said nothing yet
	round     uint64  // of the last probe; answers to others are ignored
	probed    Instant // when

	sent  cluster.Pos // last entry handed to the stream
	acked uint64      // logged, applied and cleared by the backup, in this round
	// applied is what the backup last said in a heartbeat; moved is when it last
	// grew or had nothing left to do. Heartbeats that come while nothing moves
	// are the sign of a disk that hangs.
	applied uint64
	moved   Instant
	// durable is what the backup said to have flushed, in this round; asked is up to
	// where it was asked to, while it is to join the in-sync set, and askedAt when.
	durable, asked uint64
	askedAt        Instant
	lags           Instant // since when a sync waits for it alone (Lags); 0: none does
	barred         Instant // not taken in before, if it is not needed
	bars           int     // how often it was barred lately
	known          uint64  // what it certainly had when it was last heard of, in any round
	joins          uint64  // the commit when it was begun to count: to be flushed before it is proposed
	joined         uint64  // the tail when the round began: in sync only from there on
	heard          Instant // when the backup last said anything
	beaten         Instant // when the last Beat went out

	leaseEnd     Instant // until when this backup lets the primary serve reads
	ackStamp     uint64  // Stamp of its last BeatAck
	ackAt        Instant // when that came
	grantedUntil Instant // no lease given to it lasts longer
	wantCommit   uint64  // it asked for a Beat when this is committed
}

// Peer is the state of one backup for people to see.
type Peer struct {
	Brick     cluster.BrickID
	State     State
	Connected bool
	InSync    bool
	Acked     uint64
}

// Peers lists the backups of a primary.
func (m *Machine) Peers() []Peer {
	if m.role != Primary {
		return nil
	}
	var r []Peer
	for _, b := range m.others() {
		p := m.progress[b]
		r = append(r, Peer{b, p.state, p.connected, m.cfg.IsInSync(b), max(p.acked, p.applied, p.known)})
	}
	return r
}

// probe asks b where its log stands and starts a new round with it.
func (m *Machine) probe(now Instant, b BrickID) {
	p := m.progress[b]
	m.rounds++
	p.state, p.round, p.probed, p.moved = Probing, m.rounds, now, now
	p.known = max(p.known, p.acked)
	p.acked, p.applied, p.durable, p.asked = 0, 0, 0, 0
	// The backup may have begun a new life, whose clock knows nothing of a stamp of the
	// former: no lease is given on one.
	p.ackStamp, p.ackAt = 0, 0
	m.send(b, proto.KindProbe, &proto.Probe{Config: m.cfg.Clone(), Round: p.round, Tail: m.tail})
	m.beat(now, b)
}

// beat sends b a heartbeat, with as much of a lease as it may have.
func (m *Machine) beat(now Instant, b BrickID) {
	p := m.progress[b]
	msg := &proto.Beat{
		Epoch: m.cfg.Epoch, Round: p.round, Stamp: uint64(now),
		Commit: m.commit, Tail: m.tail.Seq, Echo: p.ackStamp,
	}
	if m.inSync(b, p) && p.ackAt > 0 && !p.stalled(now, noGrantAfter) && !m.slow(now, p, lagsNoGrant) {
		end := min(p.ackAt+cluster.Lease, m.primaryLease())
		if end > p.ackAt {
			msg.Grant = uint64(end - p.ackAt)
			p.grantedUntil = max(p.grantedUntil, p.ackAt+cluster.LeaseGuard)
		}
	}
	p.beaten = now
	m.send(b, proto.KindBeat, msg)
}

// inSync reports whether b is in the in-sync set and has what it had missed.
func (m *Machine) inSync(b BrickID, p *Progress) bool {
	return m.cfg.IsInSync(b) && p.state == Streaming && p.acked >= p.joined
}

// pump hands b what it may be sent now.
func (m *Machine) pump(now Instant, b BrickID) {
	p := m.progress[b]
	if p.state != Streaming || p.sent.Seq >= m.tail.Seq {
		return
	}
	upto := min(m.tail.Seq, p.acked+maxInflight)
	if upto <= p.sent.Seq {
		return
	}
	if p.applied >= p.sent.Seq {
		p.moved = now // it had nothing to do until now
	}
	m.stream(b, p, upto)
}

func (m *Machine) stream(b BrickID, p *Progress, upto uint64) {
	defer func() { p.sent = m.At(upto) }()
	for i := range m.out.Streams {
		if s := &m.out.Streams[i]; s.To == b && s.Round == p.round {
			s.Upto, s.Commit = upto, m.commit
			return
		}
	}
	m.out.Streams = append(m.out.Streams, Stream{To: b, Round: p.round, Prev: p.sent, Upto: upto, Commit: m.commit})
}

// At returns the position of sequence seq, which the log has.
func (m *Machine) At(seq uint64) cluster.Pos {
	pos := cluster.Pos{Seq: seq}
	for _, h := range m.history {
		if h.Seq <= seq {
			pos.Epoch = h.Epoch
		}
	}
	return pos
}

func (m *Machine) orderHeal(now Instant, b BrickID) {
	p := m.progress[b]
	p.state, p.probed = Healing, now
	m.send(b, proto.KindHealOrder, &proto.HealOrder{Epoch: m.cfg.Epoch, Round: p.round})
}

// fromBackup returns the progress of the sender of a message of this epoch and
// round, or nil if the message is not to be believed.
func (m *Machine) fromBackup(now Instant, from BrickID, epoch cluster.Epoch, round uint64) *Progress {
	if m.role != Primary || epoch != m.cfg.Epoch {
		return nil
	}
	p := m.progress[from]
	if p == nil || !p.connected || round != p.round {
		return nil
	}
	p.heard, p.dead = now, false
	return p
}

// ProbeAck takes a backup's answer to a probe, or its word that it must start over.
func (m *Machine) ProbeAck(now Instant, from BrickID, a *proto.ProbeAck) {
	p := m.fromBackup(now, from, a.Epoch, a.Round)
	if p == nil {
		return
	}
	if p.state != Probing {
		// It has lost the thread, was compared or could not be, or began a new life: what
		// was on the way to it does not fit any more, so a new round begins.
		m.probe(now, from)
		return
	}
	if !a.Whole {
		m.orderHeal(now, from)
		return
	}
	p.state = Streaming
	p.sent, p.joined, p.moved = m.common(a.Tail, a.History), m.tail.Seq, now
	p.acked, p.applied = 0, p.sent.Seq
	// Even with nothing to send, the first Append makes the backup's log end
	// where the two meet.
	m.stream(from, p, min(m.tail.Seq, p.sent.Seq+maxInflight))
}

// AppendAck takes a backup's word that it has everything up to a.Seq.
func (m *Machine) AppendAck(now Instant, from BrickID, a *proto.AppendAck) {
	if p := m.fromBackup(now, from, a.Epoch, a.Round); p != nil {
		m.hasUpTo(now, from, p, a.Seq)
	}
}

// hasUpTo notes that backup b has logged, applied and cleared everything up to seq.
func (m *Machine) hasUpTo(now Instant, b BrickID, p *Progress, seq uint64) {
	if p.state != Streaming || seq > p.sent.Seq {
		return
	}
	if seq > p.acked {
		was := m.inSync(b, p)
		p.acked = seq
		p.applied = max(p.applied, seq)
		p.moved = now
		if !was && m.inSync(b, p) {
			m.beat(now, b) // it may serve reads: let it begin
		}
	}
	m.pump(now, b)
	m.advance(now)
}

// BeatAck takes a backup's answer to a heartbeat.
func (m *Machine) BeatAck(now Instant, from BrickID, a *proto.BeatAck) {
	p := m.fromBackup(now, from, a.Epoch, a.Round)
	if p == nil {
		return
	}
	had := now < m.primaryLease()
	if echo := Instant(a.Echo); echo <= now {
		p.leaseEnd = max(p.leaseEnd, echo+cluster.Lease)
	}
	begins := !had && now < m.primaryLease()
	first := p.ackAt == 0
	p.ackStamp, p.ackAt = a.Stamp, now
	if a.Applied > p.applied || p.applied >= p.sent.Seq {
		p.moved = now
	}
	p.applied = max(p.applied, min(a.Applied, p.sent.Seq))
	for _, b := range m.others() {
		// Those that were in step before this lease began had none to be given.
		if o := m.progress[b]; m.inSync(b, o) && (begins || b == from && first) {
			m.beat(now, b)
		}
	}
	// It says again what an AppendAck said before: that may have been lost.
	m.hasUpTo(now, from, p, a.Acked)
	m.advance(now)
}

// CommitAsk takes a backup's wish to hear when seq is committed.
func (m *Machine) CommitAsk(now Instant, from BrickID, a *proto.CommitAsk) {
	if m.role != Primary || a.Epoch != m.cfg.Epoch || m.progress[from] == nil {
		return
	}
	p := m.progress[from]
	p.wantCommit = max(p.wantCommit, a.Seq)
	m.tellCommit(now, from, p)
}

func (m *Machine) tellCommit(now Instant, b BrickID, p *Progress) {
	if p.wantCommit != 0 && m.commit >= p.wantCommit && p.connected {
		p.wantCommit = 0
		m.beat(now, b)
	}
}

// advance commits what every required brick has, under the lease that they gave:
// later they may have lost their power, and the set gone on with less.
func (m *Machine) advance(now Instant) {
	if m.role != Primary || !m.loaded || now < m.holdUntil || now >= m.primaryLease() {
		return
	}
	seq := m.clear
	for _, b := range m.required() {
		p := m.progress[b]
		if p.state != Streaming {
			return
		}
		seq = min(seq, p.acked)
	}
	if seq > m.commit {
		m.commit = seq
		for _, b := range m.others() {
			m.tellCommit(now, b, m.progress[b])
		}
	}
	if m.cfg.Writable() {
		m.acked = max(m.acked, m.commit)
	}
}

func (m *Machine) tickPrimary(now Instant) {
	for _, b := range m.others() {
		p := m.progress[b]
		if !p.connected {
			continue
		}
		if p.state == Probing && now >= p.probed+probeRetry {
			m.probe(now, b)
		} else if now >= p.beaten+cluster.Heartbeat {
			m.beat(now, b)
		}
	}
	m.advance(now)
	if m.proposing || now < m.nextTry {
		return
	}
	if next, ok := m.reconfigure(now); ok {
		m.proposing = true
		m.out.Propose = &next
	}
}

// silent reports whether b gives no sign of life, or lives without doing its work.
func (m *Machine) silent(now Instant, p *Progress) bool {
	return p.mute(now) || m.slow(now, p, stuckAfter)
}

func (p *Progress) mute(now Instant) bool {
	return p.dead || now >= p.heard+cluster.Suspicion || p.state == Healing || p.stalled(now, stuckAfter)
}

// Lags tells that a sync has waited since then for the flush of b, which may be this brick, and for no other; 0: none
// does. A disk that crawls looks well in every other respect: changes are applied in memory. A brick that the
// others have waited for long enough is dropped, if the set can do without it, and not taken in again at once; a
// primary hands over.
func (m *Machine) Lags(b BrickID, since Instant) {
	if b == m.self {
		m.lags = since
	} else if p := m.progress[b]; p != nil {
		p.lags = since
	}
}

// slow reports whether a sync has waited for d for a backup, and the set can do without that: it always can without
// one that is only being added.
func (m *Machine) slow(now Instant, p *Progress, d time.Duration) bool {
	return p.lags > 0 && now >= p.lags+d && (m.cfg.Spares() > 0 || m.progress[m.adding] == p)
}

// Slow reports whether this brick leads and holds everybody up.
func (m *Machine) Slow(now Instant) bool {
	return m.role == Primary && m.lags > 0 && now >= m.lags+stuckAfter && m.cfg.Spares() > 0
}

// A backup that answers heartbeats, but applies nothing of what it was sent, has
// a disk that hangs. It gets no more leases, and is then taken for dead.
const (
	noGrantAfter = 400 * time.Millisecond
	lagsNoGrant  = 200 * time.Millisecond // of one that lags: that is seen up to 100 ms late
	stuckAfter   = time.Second
)

// bar keeps a brick that was dropped because its disk crawls from being taken in again at once, though it has all: for
// twice as long each time that it is dropped within a minute.
func (p *Progress) bar(now Instant) {
	if now >= p.barred+time.Minute {
		p.bars = 0
	}
	if now >= p.barred {
		p.barred = now + time.Second<<min(p.bars, 6)
		p.bars++
	}
}

// stalled reports whether b has applied nothing for d although there was something to apply.
func (p *Progress) stalled(now Instant, d time.Duration) bool {
	return p.state == Streaming && p.applied < p.sent.Seq && now >= p.moved+d
}

// reconfigure returns the configuration that the primary wishes for, if it is not the present one.
func (m *Machine) reconfigure(now Instant) (cluster.SetConfig, bool) {
	next := m.cfg.Clone()
	next.Epoch++
	next.InSync = next.InSync[:0]
	for _, b := range m.cfg.InSync {
		if b == m.self || !m.silent(now, m.progress[b]) {
			next.InSync = append(next.InSync, b)
		} else if p := m.progress[b]; !p.mute(now) {
			p.bar(now)
		}
	}
	next.Floor = m.floor
	if len(next.InSync) < len(m.cfg.InSync) {
		// A proposal to add a brick may be under way, and take effect; this one
		// then fails for its epoch and is made anew.
		return next, true
	}
	for _, b := range m.others() {
		p := m.progress[b]
		if m.cfg.IsDrained(b) {
			continue // it follows, and does not count
		}
		ready := p.state == Streaming && !m.silent(now, p) && p.acked >= p.joined &&
			p.acked+joinLag >= m.tail.Seq && p.ackAt > 0 && (now >= p.barred || !m.cfg.Writable())
		if b == m.adding && m.hopeless(now, b, p, ready) {
			if m.slowToJoin(now, p) && !p.mute(now) {
				p.bar(now)
			}
			if m.asked {
				// It is waited for, since the proposal may have taken effect, or do so yet. Only another one of
				// the same epoch tells: it comes in its place, or shows that it was decided.
				return next, true
			}
			m.adding = BrickID{} // nobody has heard of it
			m.advance(now)
			continue
		}
		if m.cfg.IsInSync(b) || !ready || !m.adding.IsZero() && m.adding != b {
			continue
		}
		// Most of what it was sent is flushed first, while nobody waits for it.
		if m.adding.IsZero() && !m.flushed(now, b, p, p.acked-min(p.acked, joinLag)) {
			continue
		}
		// From now on nothing commits, and no fsync is answered, without b: the proposal may
		// take effect, and b be chosen as primary, before this brick hears of it. What was
		// committed without it comes first, in this epoch or before it, and
		// since any of that may have been fsynced, also to b's disk.
		if m.adding.IsZero() {
			m.adding, m.addingSince, p.joins = b, now, max(m.commit, p.joined)
		}
		if !m.joined(now, b, p) {
			continue
		}
		m.asked = true
		next.InSync = append(next.InSync, b)
		return next, true
	}
	return cluster.SetConfig{}, false
}

// SyncRetry is after how long a brick is asked again to flush: the question or the
// answer may have been lost.
const SyncRetry = 500 * time.Millisecond

// hopeless reports whether b, which is being added, is to be given up: one that was proposed not for a moment's absence.
func (m *Machine) hopeless(now Instant, b BrickID, p *Progress, ready bool) bool {
	if !m.asked {
		return !ready || m.slowToJoin(now, p)
	}
	return m.silent(now, p) || m.slowToJoin(now, p) && !(ready && m.joined(now, b, p))
}

// slowToJoin reports whether the brick that is being added takes long. A disk that hangs flushes nothing, and keeps out
// whoever else is ready.
func (m *Machine) slowToJoin(now Instant, p *Progress) bool {
	return now >= m.addingSince+stuckAfter || m.slow(now, p, stuckAfter)
}

// joined reports whether b, which is being added, has on its disk what it must have before it is proposed.
func (m *Machine) joined(now Instant, b BrickID, p *Progress) bool {
	return p.acked >= p.joins && m.flushed(now, b, p, p.joins)
}

// flushed reports whether b, whose log meets this one, has flushed it up to seq, and
// has it do so.
func (m *Machine) flushed(now Instant, b BrickID, p *Progress, seq uint64) bool {
	if p.durable >= seq {
		return true
	}
	if p.asked < seq || now >= p.askedAt+SyncRetry {
		p.asked, p.askedAt = p.acked, now
		m.send(b, proto.KindSync, &proto.Sync{Epoch: m.cfg.Epoch, Seq: p.acked})
	}
	return false
}

// SyncAck takes a backup's word that its log is durable up to a.Seq. That stays
// true in whatever round it comes: what was flushed in this epoch is lost only with
// the disk, and a new disk begins with a comparison, which is durable when it ends.
func (m *Machine) SyncAck(from BrickID, a *proto.SyncAck) {
	p := m.progress[from]
	if m.role != Primary || a.Epoch != m.cfg.Epoch || p == nil {
		return
	}
	p.durable = max(p.durable, a.Seq)
}
