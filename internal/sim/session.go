package sim

import (
	"time"

	"mortar/internal/cluster"
	"mortar/internal/proto"
	"mortar/internal/replica/core"
)

// reading is a read on its way.
type reading struct {
	s      *session
	reg    int
	reply  func(answer)
	since  time.Duration
	read   bool // phase two: wait for what was read to be committed
	epoch  cluster.Epoch
	dep    uint64
	val    uint64
	at     uint64 // position at which it was read
	asking time.Duration
}

type attach struct {
	c     *client
	gen   int
	since time.Duration
	reply func(*session)
}

// session is a client's at its home.
type session struct {
	b        *brick
	c        *client
	gen      int // of the client's home
	known    [maxRegs]bool
	leaseEnd time.Duration
	waits    map[uint64]*clearing
	gone     bool
	lapsed   bool
}

func (b *brick) answerAttach() {
	_, serving := b.m.Serving(b.now())
	all := b.attaches
	b.attaches = nil
	for _, a := range all {
		switch cfg := b.m.Config(); {
		case b.m.Leaving():
			a.reply(nil)
		case serving:
			old := b.sessions[a.c.i]
			if old != nil && a.gen < old.gen {
				a.reply(nil)
				continue
			}
			s := &session{b: b, c: a.c, gen: a.gen, waits: map[uint64]*clearing{}, lapsed: true}
			b.sessions[a.c.i] = s
			if old != nil {
				old.lapse()
			}
			a.reply(s)
		case b.now() >= a.since+time.Second || cfg.Epoch != 0 && !cfg.IsInSync(b.id):
			a.reply(nil)
		default:
			b.attaches = append(b.attaches, a)
		}
	}
}

// change carries a change or an fsync of the session's to the primary.
func (s *session) change(q *request, reply func(answer)) {
	if s.gone {
		reply(answer{status: notServing})
		return
	}
	a := &ask{q: q, reply: reply, pause: 5 * time.Millisecond, to: -1}
	s.b.asks = append(s.b.asks, a)
	s.b.forward(a)
}

func (s *session) read(reg int, reply func(answer)) {
	if s.gone {
		reply(answer{status: notServing})
		return
	}
	s.b.reads = append(s.b.reads, &reading{s: s, reg: reg, reply: reply, since: s.b.now()})
}

func (b *brick) answerReads() {
	now := b.now()
	cfg := b.m.Config()
	until, serving := b.m.Serving(now)
	commit := b.m.Commit()
	keep := b.reads[:0]
	for _, r := range b.reads {
		if r.read && r.epoch != cfg.Epoch {
			r.read, r.since = false, now
		}
		if !r.read {
			if !serving {
				if now >= r.since+time.Second || cfg.Epoch != 0 && !cfg.IsInSync(b.id) {
					r.reply(answer{status: notServing})
				} else {
					keep = append(keep, r)
				}
				continue
			}
			// To read and to become interested is one step with respect to changes.
			reg := b.disk.st.regs[r.reg]
			r.s.known[r.reg] = true
			r.read, r.epoch, r.dep, r.val, r.at = true, cfg.Epoch, reg.seq, reg.val, b.disk.st.pos.Seq
			r.asking = -time.Hour
		}
		if r.dep > commit {
			if b.m.Role() == core.Backup && now >= r.asking+cluster.Heartbeat {
				r.asking = now
				b.messages = append(b.messages, core.Message{To: cfg.Primary, Kind: proto.KindCommitAsk, Body: &proto.CommitAsk{Epoch: cfg.Epoch, Seq: r.dep}})
			}
			keep = append(keep, r)
			continue
		}
		if !serving || now >= until {
			r.read, r.since = false, now
			keep = append(keep, r)
			continue
		}
		r.reply(answer{val: r.val, seq: r.at, epoch: cfg.Epoch})
	}
	b.reads = keep
}

// ping renews the client's cache lease, and returns for how long: no longer
// than the home may serve itself.
func (s *session) ping() time.Duration {
	now := s.b.now()
	until, serving := s.b.m.Serving(now)
	if s.gone || !serving {
		return 0
	}
	s.lapsed = false
	s.leaseEnd = now + cluster.LeaseGuard
	lease := min(cluster.Lease, until-now)
	s.b.page.gives(s.b, s.c, lease)
	return lease
}

func (s *session) invalAck(seq uint64) {
	if c := s.waits[seq]; c != nil {
		delete(s.waits, seq)
		c.waits--
		s.b.clearUp()
	}
}

func (s *session) lapse() {
	s.lapsed = true
	waits := s.waits
	s.waits = map[uint64]*clearing{}
	s.known = [maxRegs]bool{}
	for _, c := range waits {
		c.waits--
	}
	if len(waits) > 0 {
		s.b.clearUp()
	}
}

func (b *brick) detachAll() {
	for _, s := range b.sessions {
		if s != nil && !s.gone {
			s.gone = true
			s.c.detached(s)
		}
	}
}

func (b *brick) takeBack(e *entry) *clearing {
	if e.reg < 0 {
		return nil
	}
	var c *clearing
	for i, s := range b.sessions {
		if s == nil || i == e.session || s.lapsed || !s.known[e.reg] {
			continue
		}
		s.known[e.reg] = false
		if c == nil {
			c = &clearing{seq: e.pos.Seq}
		}
		c.waits++
		s.waits[e.pos.Seq] = c
		s.c.invalidate(s, e.pos.Seq, e.reg)
	}
	return c
}
