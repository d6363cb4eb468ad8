package sim

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/replica/core"
)

// world is one run. Everything that happens is an event at a time of the true
// clock, which nobody in the world can see.
type world struct {
	plan  *Plan
	now   time.Duration
	queue queue
	steps uint64
	bad   error // the first violation
	trace func(format string, args ...any)

	net     network
	plane   *plane
	bricks  []*brick
	clients []*client
	oracle  *oracle
	quiet   bool // no more faults
	wiped   bool // a disk was replaced
}

// Result is what came of a run.
type Result struct {
	Steps   uint64
	Virtual time.Duration // how long it took for those in it
	Acked   int           // changes that were acknowledged
	Reads   int
	Lost    int   // acknowledged, not synced, and lost with the power of all who had them
	Epochs  int   // configurations
	Err     error // the violation; nil if there is none
}

// calmed is how long a set may take, once the faults have stopped, until it is
// whole again.
const calmed = 60 * time.Second

// Run runs a plan. trace, if not nil, is told of everything that happens.
func Run(p *Plan, trace func(format string, args ...any)) (res Result) {
	w := &world{plan: p, trace: trace}
	defer func() {
		if r := recover(); r != nil {
			if _, ours := r.(stop); !ours {
				w.bad = fmt.Errorf("panic at %v: %v\n%s", w.now, r, stack())
			}
		}
		res = Result{Steps: w.steps, Virtual: w.now, Err: w.bad}
		if w.oracle != nil {
			res.Acked, res.Reads, res.Lost = w.oracle.acks, w.oracle.reads, w.oracle.lost
		}
		if w.plane != nil {
			res.Epochs = len(w.plane.decided)
		}
	}()
	w.build()
	for _, a := range p.Actions {
		w.at(a.At, func() { w.act(a) })
	}
	for w.now < p.For && w.step() {
	}
	w.settle()
	return
}

// stop is panicked with to leave the run after a violation.
type stop struct{}

// fail notes a violation and ends the run.
func (w *world) fail(format string, args ...any) {
	if w.bad == nil {
		w.bad = fmt.Errorf("at %v: %s", w.now, fmt.Sprintf(format, args...))
		w.say("VIOLATION: %v", w.bad)
	}
	panic(stop{})
}

func (w *world) say(format string, args ...any) {
	if w.trace != nil {
		w.trace("%10.6f "+format+"\n", append([]any{w.now.Seconds()}, args...)...)
	}
}

// stream is a source of chance of its own, so that what is left out of a plan
// changes as little as possible of the rest.
func (w *world) stream(n int) *rand.Rand { return rand.New(rand.NewPCG(w.plan.Seed, uint64(1000+n))) }

func (w *world) build() {
	w.net.init(w)
	w.oracle = newOracle(w)
	w.plane = newPlane(w)
	for i := range w.plan.Bricks {
		w.bricks = append(w.bricks, newBrick(w, i))
	}
	for i := range w.plan.Clients {
		w.clients = append(w.clients, newClient(w, i))
	}
	w.plane.begin()
	for _, b := range w.bricks {
		b.start()
	}
	for _, c := range w.clients {
		c.begin()
	}
}

func brickID(i int) cluster.BrickID { return cluster.ID{0: 0xb, 15: byte(i + 1)} }

// at has f happen at a time.
func (w *world) at(t time.Duration, f func()) { w.queue.push(max(t, w.now), f) }

// after has f happen after a while.
func (w *world) after(d time.Duration, f func()) { w.queue.push(w.now+d, f) }

// step has the next event happen.
func (w *world) step() bool {
	t, f, ok := w.queue.pop()
	if !ok {
		return false
	}
	w.now = t
	w.steps++
	f()
	return true
}

// act carries out an action of the plan.
func (w *world) act(a Action) {
	if w.quiet {
		return
	}
	w.say("-- %s", a)
	arg := func(i int) int { return a.Args[i] }
	switch a.Verb {
	case "write", "read", "fsync":
		w.clients[arg(0)].ask(a.Verb, arg(1))
	case "move":
		w.clients[arg(0)].move(arg(1))
	case "kill":
		w.bricks[arg(0)].die(false)
	case "power":
		w.bricks[arg(0)].die(true)
	case "blackout":
		for _, b := range w.bricks {
			b.die(true)
		}
	case "start":
		w.bricks[arg(0)].start()
	case "stop":
		w.bricks[arg(0)].leave()
	case "wipe":
		w.wipe(w.bricks[arg(0)])
	case "pause":
		w.bricks[arg(0)].pause(a.D)
	case "cut":
		w.net.cut(arg(0), arg(1))
	case "mend":
		w.net.mend(arg(0), arg(1))
	case "reset":
		w.net.reset(arg(0), arg(1))
	case "slow":
		w.bricks[arg(0)].disk.slow = a.D
	case "hang":
		w.bricks[arg(0)].disk.hung = w.now + a.D
	case "full":
		b := w.bricks[arg(0)]
		b.full = b.now() + a.D
	case "flushkv":
		w.bricks[arg(0)].flushKV()
	case "trim":
		w.bricks[arg(0)].trim()
	case "sync":
		w.bricks[arg(0)].syncDisk()
	case "leader":
		w.plane.newLeader(a.D)
	case "min":
		w.plane.setMin(arg(0))
	case "halt":
		w.plane.halt(a.D)
	case "drain":
		w.plane.drain(arg(0), false)
	case "undrain":
		w.plane.drain(arg(0), true)
	}
}

// wipe replaces the disk of a brick, if there is another that certainly has
// what this one has: whoever replaces the last disk has lost his data.
func (w *world) wipe(b *brick) {
	cfg := w.plane.config()
	for _, o := range w.bricks {
		if o != b && o.up && !o.paused && cfg.IsInSync(o.id) && o.hasAll() {
			b.die(true)
			b.disk.wipe()
			b.powerless = cfg.Epoch // it may have been dead already
			w.wiped = true
			return
		}
	}
}

// settle ends the faults and expects the set to be as if nothing had happened.
func (w *world) settle() {
	w.quiet = true
	w.say("-- the faults stop")
	w.net.mendAll()
	w.plane.quiet()
	for _, b := range w.bricks {
		b.disk.slow, b.full = 0, 0
		b.resume()
		b.start()
	}
	if w.spared() {
		w.say("-- but for disks that hang")
		const waits = "somebody waits, and the set can do without the disks that hang"
		if w.calm(waits, w.waited); w.ruined() {
			return
		}
		for _, c := range w.clients {
			c.last()
		}
		if w.calm(waits, w.waited); w.ruined() {
			return
		}
	}
	for _, b := range w.bricks {
		b.disk.hung = 0
	}
	if w.plane.config().Drained != nil {
		if w.calm("the drained bricks have not left", w.drained); w.ruined() {
			return
		}
		for i := range w.bricks {
			w.plane.drain(i, true)
		}
	}
	if w.calm("the set is not whole", w.unsettled); w.ruined() {
		return
	}
	for _, c := range w.clients {
		c.last()
	}
	w.calm("somebody waits", w.unanswered)
	w.oracle.end()
}

// calm lets time pass until nothing is wrong any more, or the set ruined.
func (w *world) calm(what string, wrong func() error) {
	deadline := w.now + calmed
	for next := w.now; ; next += 100 * time.Millisecond {
		for w.now < next && w.step() {
		}
		w.now = max(w.now, next)
		for _, b := range w.bricks {
			b.start() // the last to stop do so only now
		}
		if w.ruined() {
			return
		}
		why := wrong()
		if why == nil {
			return
		}
		if w.now >= deadline {
			w.fail("%v after the faults stopped %s: %v", calmed, what, why)
		}
	}
}

// spared reports whether disks hang, and the set can do without all of them, since a brick that is in sync runs, and goes on doing so.
func (w *world) spared() bool {
	cfg := w.plane.config()
	hung, well, open := 0, 0, false
	for _, b := range w.bricks {
		open = open || b.up && !b.stopping && b.disk.whole && cfg.IsInSync(b.id)
		if b.disk.hung > w.now {
			hung++
		} else if !cfg.IsDrained(b.id) {
			well++
		}
	}
	return open && hung > 0 && well >= max(1, cfg.MinInSync)
}

// waited says who waits for an answer.
func (w *world) waited() error {
	for _, c := range w.clients {
		if n := len(c.ops); n > 0 {
			return fmt.Errorf("%v waits for %d answers, first of %s; home %v, attached %v", c, n, c.ops[0], c.home, c.s != nil)
		}
	}
	return nil
}

// drained says what is missing for the set to depend on no drained brick that it can do without.
func (w *world) drained() error {
	cfg := w.plane.config()
	for _, id := range cfg.Members {
		switch drained, in := cfg.IsDrained(id), cfg.IsInSync(id); {
		case !drained && !in:
			return fmt.Errorf("%s is not in sync in epoch %d", w.name(id), cfg.Epoch)
		case drained && in && cfg.Spares() > 0:
			return fmt.Errorf("%s is drained, and in sync in epoch %d with %s", w.name(id), cfg.Epoch, w.names(cfg.InSync))
		}
	}
	if cfg.Primary.IsZero() {
		return fmt.Errorf("epoch %d has no primary", cfg.Epoch)
	}
	return nil
}

// ruined reports whether only a person can help: the disks of all in-sync bricks
// were replaced. When one was, another was there that had everything, and left at
// the same moment.
func (w *world) ruined() bool {
	return !slices.ContainsFunc(w.plane.config().InSync, func(id cluster.BrickID) bool { return w.brick(id).disk.whole })
}

// unsettled says what is missing for the set to be whole.
func (w *world) unsettled() error {
	cfg := w.plane.config()
	if len(cfg.InSync) != w.plan.Bricks || cfg.Primary.IsZero() {
		return fmt.Errorf("epoch %d has primary %v and %d of %d bricks in sync", cfg.Epoch, w.name(cfg.Primary), len(cfg.InSync), w.plan.Bricks)
	}
	for _, b := range w.bricks {
		switch {
		case !b.up:
			return fmt.Errorf("%v is down", b)
		case b.m.Config().Epoch != cfg.Epoch:
			return fmt.Errorf("%v is in epoch %d of %d", b, b.m.Config().Epoch, cfg.Epoch)
		case !b.m.Whole():
			return fmt.Errorf("%v is not whole", b)
		}
		if _, ok := b.m.Serving(b.now()); !ok {
			return fmt.Errorf("%v does not serve", b)
		}
	}
	return nil
}

// unanswered says who waits.
func (w *world) unanswered() error {
	if err := w.waited(); err != nil {
		return err
	}
	var first *brick
	for _, b := range w.bricks {
		if first == nil {
			first = b
		}
		if b.m.Tail() != first.m.Tail() || b.disk.st.pos != first.disk.st.pos {
			return fmt.Errorf("%v ends at %v and %v at %v", b, b.m.Tail(), first, first.m.Tail())
		}
		if b.m.Role() == core.Primary && b.m.Acked() < b.m.Tail().Seq {
			return fmt.Errorf("%v leads, ends at %v, and has acknowledged %d", b, b.m.Tail(), b.m.Acked())
		}
	}
	return nil
}

func (w *world) name(id cluster.BrickID) string {
	if id.IsZero() {
		return "nobody"
	}
	return fmt.Sprintf("b%d", id[15]-1)
}

func (w *world) names(ids []cluster.BrickID) (s string) {
	for _, id := range ids {
		s += w.name(id)
	}
	return s
}

func (w *world) brick(id cluster.BrickID) *brick { return w.bricks[id[15]-1] }

var errGone = errors.New("not connected")

// queue holds events in order of time; equals in the order in which they were pushed.
type queue struct {
	heap []event
	n    uint64
}

type event struct {
	at time.Duration
	n  uint64
	f  func()
}

func (a *event) before(b *event) bool { return a.at < b.at || a.at == b.at && a.n < b.n }

func (q *queue) push(at time.Duration, f func()) {
	q.n++
	q.heap = append(q.heap, event{at, q.n, f})
	h := q.heap
	i := len(h) - 1
	for i > 0 {
		up := (i - 1) / 4
		if !h[i].before(&h[up]) {
			break
		}
		h[i], h[up] = h[up], h[i]
		i = up
	}
}

func (q *queue) pop() (time.Duration, func(), bool) {
	h := q.heap
	if len(h) == 0 {
		return 0, nil, false
	}
	top := h[0]
	last := len(h) - 1
	h[0] = h[last]
	h[last] = event{}
	h = h[:last]
	q.heap = h
	i := 0
	for {
		least := i
		for c := 4*i + 1; c <= 4*i+4 && c < last; c++ {
			if h[c].before(&h[least]) {
				least = c
			}
		}
		if least == i {
			break
		}
		h[i], h[least] = h[least], h[i]
		i = least
	}
	return top.at, top.f, true
}
