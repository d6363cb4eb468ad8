package sim

import (
	"math/rand/v2"
	"time"

	"mortar/internal/cluster"
)

// page is what a daemon leaves behind of its life (package daemon): until when each of its
// clients may answer from a cache, by the clock of its machine.
type page struct {
	life  int
	lease [maxSessions]time.Duration
	// former is the same for the clients of the lives before it.
	former time.Duration
	// guarded tells whether somebody is there to certify its end, local which clients are on its
	// own machine, and late how much later than others each hears of the end: those that stand still.
	guarded bool
	local   [maxSessions]bool
	late    [maxSessions]time.Duration
}

func newPage(b *brick) *page {
	r := rand.New(rand.NewPCG(b.w.plan.Seed, uint64(2000+100*b.i+b.life)))
	p := &page{life: b.life, former: b.clock() + cluster.LeaseGuard, guarded: r.IntN(4) > 0}
	for c := range p.local {
		p.local[c] = r.IntN(3) > 0
		if r.IntN(4) == 0 {
			p.late[c] = time.Duration(r.IntN(2000)) * time.Millisecond
		}
	}
	return p
}

// clock is that of the brick's machine, which goes on when a process ends.
func (b *brick) clock() time.Duration { return time.Duration(float64(b.w.now) * b.rate) }

// gives notes a lease before its client hears of it.
func (p *page) gives(b *brick, c *client, lease time.Duration) {
	p.lease[c.i] = max(p.lease[c.i], b.clock()+cluster.Outwait(lease))
}

// lost is when a client hears that its home has ended. One on the same machine drops its
// cache at once, and notes that.
func (p *page) lost(c *client) {
	if p.local[c.i] {
		c.lapse()
		p.lease[c.i] = 0
	}
}

func (p *page) over(b *brick) bool {
	last := p.former
	for _, end := range p.lease {
		last = max(last, end)
	}
	return b.clock() >= last
}

// watch certifies the death of a brick's process to the others, once no client of it can
// answer from a cache. What it says may be late, and some may not hear it.
func (w *world) watch(b *brick, p *page) {
	if !p.guarded {
		return
	}
	r := w.stream(3000 + 100*b.i + p.life)
	var look func()
	look = func() {
		if !p.over(b) {
			w.after(5*time.Millisecond, look)
			return
		}
		for _, o := range w.bricks {
			if o == b || w.net.cuts[b.i][o.i] || w.net.cuts[o.i][b.i] {
				continue
			}
			late := time.Duration(r.IntN(20_000)) * time.Microsecond
			if r.IntN(10) == 0 {
				late *= 100
			}
			life := o.life
			w.after(late, func() { o.doIn(life, func() { o.died(b, p.life) }) })
		}
	}
	w.after(time.Duration(r.IntN(20_000))*time.Microsecond, look)
}

// died takes a certificate of the death of another brick's process, if that is the one that
// it has heard of last.
func (b *brick) died(o *brick, life int) {
	if b.let[o.i] == life {
		b.w.say("%v knows that %v is dead", b, o)
		b.m.Died(b.now(), o.id)
	}
}
