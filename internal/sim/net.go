package sim

import (
	"math/rand/v2"
	"runtime/debug"
	"time"
)

func stack() []byte { return debug.Stack() }

// network carries messages. Every ordered pair of nodes has a connection of
// its own, dialed by the sender, as daemons have: what it carries arrives in
// order or not at all. Two connections, and an old one and the new one after it,
// know no order among each other.
type network struct {
	w     *world
	r     *rand.Rand
	cuts  [nodes][nodes]bool
	links [nodes][nodes]connection
}

const nodes = 20

// connection is the way from one node to another.
type connection struct {
	up      bool
	gen     uint32        // counts connections
	life    int           // of the brick at the other end
	last    time.Duration // when the last message arrives
	held    []func()      // messages that a cut holds up
	left    []func()      // likewise, of former connections
	back    []func()      // answers to calls, likewise
	dialing bool
	doomed  bool // somebody will notice the cut
}

func (n *network) init(w *world) { n.w, n.r = w, w.stream(0) }

// delay is how long a message takes.
func (n *network) delay() time.Duration {
	d := time.Duration(30+n.r.IntN(200)) * time.Microsecond
	if n.w.plan.Slow && !n.w.quiet {
		if d *= 20; n.r.IntN(20) == 0 {
			d *= 10
		}
	} else if n.r.IntN(200) == 0 {
		d += time.Duration(n.r.IntN(20)) * time.Millisecond
	}
	return d
}

// send has f happen at the receiver, if the message arrives.
func (n *network) send(from, to int, f func()) error {
	l := &n.links[from][to]
	if !l.up {
		return errGone
	}
	if n.cuts[from][to] {
		l.held = append(l.held, f)
		return nil
	}
	n.carry(l, f)
	return nil
}

func (n *network) carry(l *connection, f func()) {
	gen := l.gen
	l.last = max(l.last, n.w.now) + n.delay()/4
	l.last = max(l.last, n.w.now+n.delay())
	n.w.at(l.last, func() {
		if l.gen == gen {
			f()
			return
		}
		// Of what was on its way when the connection broke, some is lost and some arrives
		// all the same, perhaps after what a newer one carried, and perhaps long after.
		switch n.r.IntN(4) {
		case 0:
			f()
		case 1:
			n.w.after(time.Duration(n.r.Int64N(int64(time.Second))), f)
		}
	})
}

// rpc has f happen at the receiver, which answers with what is to happen at the
// sender; never, if the connection ends before.
func (n *network) rpc(from, to int, f func(answered func(func()))) error {
	l := &n.links[from][to]
	gen, life := l.gen, l.life
	return n.send(from, to, func() {
		if to < planeNode && n.w.bricks[to].life != life {
			return
		}
		f(func(g func()) {
			switch {
			case l.gen != gen:
			case n.cuts[to][from]:
				l.back = append(l.back, g)
			default:
				n.carryBack(l, g)
			}
		})
	})
}

func (n *network) carryBack(l *connection, f func()) {
	gen := l.gen
	n.w.after(n.delay(), func() {
		if l.gen == gen {
			f()
		}
	})
}

// call sends without connection: each message takes its own time. It is for
// what the control plane and clients say, which is asked again after a while.
func (n *network) call(from, to int, f func()) {
	if !n.cuts[from][to] {
		n.w.after(n.delay(), func() {
			if !n.cuts[from][to] {
				f()
			}
		})
	}
}

// drop ends the connection from one node to another, and what it held up is lost.
func (n *network) drop(from, to int) bool {
	l := &n.links[from][to]
	was := l.up
	l.up, l.held, l.back, l.doomed = false, nil, nil, false
	l.gen++
	l.last = n.w.now
	return was
}

// abandon is drop by the sender. What a cut has held up may arrive all the same when
// that is mended: the sender's machine goes on trying.
func (n *network) abandon(from, to int) {
	l := &n.links[from][to]
	for _, f := range l.held {
		if n.r.IntN(2) == 0 {
			l.left = append(l.left, f)
		}
	}
	n.drop(from, to)
}

// broke ends a connection between bricks of which the sender hears.
func (n *network) broke(from, to int) {
	if n.drop(from, to) {
		b, life := n.w.bricks[from], n.w.bricks[from].life
		n.w.after(time.Duration(n.r.IntN(1000))*time.Microsecond, func() {
			b.doIn(life, func() { b.lost(to) })
		})
	}
	n.dial(from, to, 50*time.Millisecond)
}

// dial connects two bricks as soon as it is possible.
func (n *network) dial(from, to int, pause time.Duration) {
	l := &n.links[from][to]
	if l.dialing {
		return
	}
	l.dialing = true
	n.w.after(pause+time.Duration(n.r.Int64N(int64(pause/2)+1)), func() {
		l.dialing = false
		a, b := n.w.bricks[from], n.w.bricks[to]
		if l.up || !a.up {
			return
		}
		if !b.up || b.paused || n.cuts[from][to] || n.cuts[to][from] {
			n.dial(from, to, min(2*pause, time.Second))
			return
		}
		l.up, l.gen, l.life = true, l.gen+1, b.life
		l.last = n.w.now
		b.let[from] = a.life
		life, gen := a.life, l.gen
		n.w.after(time.Duration(n.r.IntN(500))*time.Microsecond, func() {
			a.doIn(life, func() {
				if l.up && l.gen == gen {
					a.connected(to)
				}
			})
		})
	})
}

func (n *network) cut(from, to int) {
	if n.cuts[from][to] {
		return
	}
	n.cuts[from][to] = true
	if from >= planeNode || to >= planeNode {
		return
	}
	// One way is enough for both connections to stall; somebody notices, or not
	// before it is over.
	for _, p := range [2][2]int{{from, to}, {to, from}} {
		l := &n.links[p[0]][p[1]]
		if l.doomed || !l.up {
			continue
		}
		l.doomed = true
		gen := l.gen
		n.w.after(time.Duration(500+n.r.IntN(4000))*time.Millisecond, func() {
			if l.gen != gen {
				return
			}
			if l.doomed = false; n.cuts[from][to] || n.cuts[to][from] {
				n.broke(p[0], p[1])
			}
		})
	}
}

func (n *network) mend(from, to int) {
	if !n.cuts[from][to] {
		return
	}
	n.cuts[from][to] = false
	l := &n.links[from][to]
	held := l.held
	l.held = nil
	for _, f := range held {
		n.carry(l, f)
	}
	for _, f := range l.left {
		n.w.after(n.delay(), f)
	}
	l.left = nil
	l = &n.links[to][from]
	held = l.back
	l.back = nil
	for _, f := range held {
		n.carryBack(l, f)
	}
}

func (n *network) mendAll() {
	for i := range n.cuts {
		for j := range n.cuts[i] {
			n.mend(i, j)
		}
	}
}

// reset breaks a connection between two bricks.
func (n *network) reset(from, to int) {
	if from < planeNode && to < planeNode && n.links[from][to].up {
		n.broke(from, to)
	}
}

// died ends the connections of a brick. Its peers hear of a process that died
// at once, and of a machine after a while.
func (n *network) died(i int, power bool) {
	for _, b := range n.w.bricks {
		if b.i == i {
			continue
		}
		n.drop(i, b.i)
		l := &n.links[b.i][i]
		if !l.up {
			continue
		}
		gen := l.gen
		wait := time.Duration(n.r.IntN(2)) * time.Millisecond
		if power {
			wait = time.Duration(n.r.IntN(3000)) * time.Millisecond
		}
		n.w.after(wait, func() {
			if l.up && l.gen == gen {
				n.broke(b.i, i)
			}
		})
	}
}

// booted lets a brick's peers find out that it is another process now.
func (n *network) booted(i int) {
	for _, b := range n.w.bricks {
		if b.i == i {
			continue
		}
		if n.links[b.i][i].up { // the old connection means nothing to the new process
			n.broke(b.i, i)
		} else if b.up {
			n.dial(b.i, i, 5*time.Millisecond)
		}
		n.dial(i, b.i, 5*time.Millisecond)
	}
}
