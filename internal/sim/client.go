package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"mortar/internal/cluster"
)

// client is a session: it has a home, a window of changes under way, and a
// cache under a lease.
type client struct {
	w    *world
	i    int
	node int
	r    *rand.Rand
	rate float64

	number uint64
	ops    []*op // not yet answered, in the order in which they were begun

	home  *brick
	epoch cluster.Epoch // the newest that any home said
	s     *session
	life  int // of the home
	gen   int // counts homes
	want  int // where it wishes to go, -1 for anywhere
	heard time.Duration

	leased bool
	grants uint64 // counts the times that a lease began
	until  time.Duration
	cache  [maxRegs]cached
	// older answers than these are not for the cache
	inval [maxRegs]uint64
}

type cached struct {
	ok    bool
	val   uint64
	seq   uint64
	epoch cluster.Epoch // of the brick that said so
}

// op is something that the client was asked to do.
type op struct {
	verb   string
	reg    int
	number uint64
	val    uint64
	began  time.Duration
	floor  uint64 // the newest change of the register that anybody knew of then
	era    int
	gen    int    // of the home that it was sent to
	grant  uint64 // the lease that held then, 0 for none
}

func (o *op) String() string { return fmt.Sprintf("%s r%d, begun at %v", o.verb, o.reg, o.began) }

func newClient(w *world, i int) *client {
	c := &client{w: w, i: i, node: firstClient + i, r: w.stream(100 + i), want: -1}
	c.rate = 1 + (c.r.Float64()-0.5)*0.0099
	return c
}

func (c *client) String() string { return fmt.Sprintf("c%d", c.i) }

func (c *client) now() time.Duration { return time.Duration(float64(c.w.now) * c.rate) }

func (c *client) begin() {
	c.attach()
	c.keep()
}

// ask has the client do something, unless too much is under way.
func (c *client) ask(verb string, reg int) {
	if len(c.ops) >= maxWindow || verb == "write" && c.number+1 >= c.answered()+maxAhead {
		return
	}
	o := &op{verb: verb, reg: reg, began: c.w.now, floor: c.w.oracle.newest[reg], era: c.w.oracle.era}
	switch verb {
	case "write":
		c.number++
		o.number = c.number
		o.val = uint64(c.i+1)<<48 | o.number
		c.cache[reg].ok = false
		c.w.oracle.wrote(c, o)
	case "read":
		if c.expire(); c.leased && c.cache[reg].ok && !c.writes(reg) {
			c.w.oracle.read(c, o, c.cache[reg].val, c.cache[reg].epoch, true)
			return
		}
	}
	c.ops = append(c.ops, o)
	c.issue(o)
}

// writes reports whether a change of the register is under way.
func (c *client) writes(reg int) bool {
	return slices.ContainsFunc(c.ops, func(o *op) bool { return o.verb == "write" && o.reg == reg })
}

// answered returns the number below which all changes have been answered.
func (c *client) answered() uint64 {
	acked := c.number + 1
	for _, o := range c.ops {
		if o.number != 0 {
			acked = min(acked, o.number)
		}
	}
	return acked
}

// issue sends the op to the home.
func (c *client) issue(o *op) {
	if c.s == nil {
		return
	}
	c.expire()
	if o.gen, o.grant = c.gen, 0; c.leased {
		o.grant = c.grants
	}
	gen, epoch := c.gen, c.epoch
	acked := c.answered()
	c.tell(func(s *session) {
		b := s.b
		answer := func(a answer) { b.toClient(c, gen, func() { c.take(o, a) }) }
		switch o.verb {
		case "read":
			s.read(o.reg, answer)
		default:
			s.change(&request{c: c, turn: s.gen, epoch: epoch, number: o.number, acked: acked, reg: o.reg, val: o.val}, answer)
		}
	})
}

// tell has f happen at the home, if the message arrives.
func (c *client) tell(f func(*session)) {
	s, life := c.s, c.life
	_ = c.w.net.send(c.node, s.b.i, func() { s.b.doIn(life, func() { f(s) }) })
}

// toClient has f happen at the client, if the message arrives while it is at home here.
func (b *brick) toClient(c *client, gen int, f func()) {
	_ = b.w.net.send(b.i, c.node, func() {
		if c.gen == gen {
			f()
		}
	})
}

func (c *client) take(o *op, a answer) {
	if !slices.Contains(c.ops, o) {
		return
	}
	switch {
	case a.status == notServing:
		c.leave()
		return
	case a.status == anew:
		c.epoch = max(c.epoch, a.epoch)
		c.issue(o)
		return
	case a.status == refused:
		c.w.oracle.refused(c, o)
	case o.verb == "write":
		c.cache[o.reg].ok = false
		c.inval[o.reg] = max(c.inval[o.reg], a.seq)
		c.w.oracle.acked(c, o)
	case o.verb == "fsync":
		c.w.oracle.synced(c, o)
	default:
		c.expire()
		// Under the lease that held when it was asked: before, the home tells nothing of changes.
		if c.leased && o.grant == c.grants && a.seq >= c.inval[o.reg] && !c.writes(o.reg) {
			c.cache[o.reg] = cached{true, a.val, a.seq, a.epoch}
		}
		c.w.oracle.read(c, o, a.val, a.epoch, false)
	}
	c.ops = slices.DeleteFunc(c.ops, func(x *op) bool { return x == o })
}

// expire drops what is cached when the lease is over.
func (c *client) expire() {
	if c.leased && c.now() >= c.until {
		c.lapse()
	}
}

func (c *client) lapse() {
	c.leased, c.until = false, 0
	c.cache = [maxRegs]cached{}
}

func (c *client) move(to int) {
	c.want = to
	if c.home == nil || c.home.i != to {
		c.leave()
	}
}

// leave looks for another home.
func (c *client) leave() {
	c.w.say("%v leaves %v", c, c.home)
	if c.home != nil {
		c.w.net.abandon(c.node, c.home.i)
		c.w.net.drop(c.home.i, c.node)
	}
	c.home, c.s = nil, nil
	c.gen++
	gen := c.gen
	c.w.after(time.Duration(1+c.r.IntN(50))*time.Millisecond, func() {
		if c.gen == gen {
			c.attach()
		}
	})
}

// attach makes a brick the home. All that is cached is dropped before.
func (c *client) attach() {
	to := c.want
	if c.want = -1; to < 0 {
		to = c.r.IntN(len(c.w.bricks))
	}
	c.lapse()
	c.gen++
	gen := c.gen
	b := c.w.bricks[to]
	c.home, c.life = b, b.life
	for _, p := range [2][2]int{{c.node, to}, {to, c.node}} {
		c.w.net.drop(p[0], p[1])
		c.w.net.links[p[0]][p[1]].up = true
	}
	c.w.after(2*time.Second, func() {
		if c.gen == gen && c.s == nil {
			c.leave()
		}
	})
	if !b.up {
		c.w.after(time.Millisecond, func() {
			if c.gen == gen {
				c.leave()
			}
		})
		return
	}
	life := b.life
	_ = c.w.net.send(c.node, to, func() {
		// Each is taken in a goroutine of its own, so that the next may overtake it.
		b.goIn(life, func() {
			b.attaches = append(b.attaches, &attach{c: c, gen: gen, since: b.now(), reply: func(s *session) {
				epoch := b.m.Config().Epoch
				b.toClient(c, gen, func() {
					if s == nil {
						c.leave()
						return
					}
					if epoch < c.epoch {
						c.leave() // it would refuse what may be carried out in an epoch that it has not heard of
						return
					}
					c.lapse()
					c.s, c.heard, c.epoch = s, c.now(), epoch
					c.w.say("%v is at home at %v", c, b)
					c.ping()
					for _, o := range slices.Clone(c.ops) {
						c.issue(o)
					}
				})
			}})
		})
	})
}

// keep renews the lease for ever.
func (c *client) keep() {
	c.w.after(time.Duration(float64(cluster.Lease/4)/c.rate), func() {
		c.expire()
		if c.s != nil {
			if c.now()-c.heard >= cluster.Lease*2/3 {
				c.leave()
			} else {
				c.ping()
			}
		}
		c.keep()
	})
}

func (c *client) ping() {
	asked, gen := c.now(), c.gen
	c.tell(func(s *session) {
		grant := s.ping()
		s.b.toClient(c, gen, func() {
			c.expire()
			if now := c.now(); grant > 0 && now < asked+grant {
				if !c.leased {
					c.grants++
				}
				c.leased, c.until = true, max(c.until, asked+grant)
				c.heard = now
			}
		})
	})
}

// invalidate takes a register back from the client's cache.
func (c *client) invalidate(s *session, seq uint64, reg int) {
	s.b.toClient(c, s.gen, func() {
		c.cache[reg].ok = false
		c.inval[reg] = max(c.inval[reg], seq)
		c.tell(func(s *session) { s.invalAck(seq) })
	})
}

// detached tells the client to look elsewhere.
func (c *client) detached(s *session) {
	s.b.toClient(c, s.gen, func() {
		if c.s == s {
			life := c.life
			c.lapse()
			c.w.net.call(c.node, s.b.i, func() { s.b.doIn(life, s.lapse) })
			c.leave()
		}
	})
}

// homeDied ends the connection to a brick that died.
func (c *client) homeDied(b *brick, power bool) {
	if c.home != b {
		return
	}
	c.w.net.drop(b.i, c.node)
	c.w.net.drop(c.node, b.i)
	if power {
		return // nobody says so
	}
	gen, page := c.gen, b.page
	c.w.after(page.late[c.i]+time.Duration(c.r.IntN(2000))*time.Microsecond, func() {
		if c.gen == gen {
			page.lost(c)
			c.leave()
		}
	})
}

// last has the client do something with every register once more.
func (c *client) last() {
	for reg := range c.w.plan.Regs {
		if len(c.ops) >= maxWindow {
			break
		}
		c.ask([]string{"write", "fsync", "read"}[(reg+c.i)%3], reg)
	}
}
