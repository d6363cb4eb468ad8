package client

import (
	"context"
	"sync"
	"time"

	"mortar/internal/cluster"
)

// lease is for how long what is cached may be trusted.
//
// It is one home's: that tells what others change. What another one answers, the last
// home perhaps, while the session moves, may be used and not kept, and its Pongs prolong nothing.
type lease struct {
	mu      sync.Mutex
	of      *home  // nil: nobody's
	grant   uint64 // number of the current uninterrupted grant, 0: none
	grants  uint64
	until   time.Duration // monotonic; of no meaning without a grant
	granted chan struct{} // holds a token after a grant
}

func (l *lease) init() { l.granted = make(chan struct{}, 1) }

// current returns the number of the grant that h has given, 0 if there is none.
func (l *lease) current(h *home) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.of != h {
		return 0
	}
	return l.grant
}

// holds says whether the grant of that number has lasted without a gap.
func (l *lease) holds(grant uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return grant != 0 && l.grant == grant
}

// over says whether there is a grant whose time is over.
func (l *lease) over() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.grant != 0 && monotonic() >= l.until
}

// renew prolongs the grant, or begins one, for d from when h was asked.
func (l *lease) renew(h *home, asked, d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.of != h {
		return
	}
	until := asked + min(d, cluster.Lease)
	if l.grant == 0 {
		l.grants++
		l.grant, l.until = l.grants, until
	}
	l.until = max(l.until, until)
	select {
	case l.granted <- struct{}{}:
	default:
	}
}

// end ends the grant, and says whether there was one.
func (l *lease) end() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	was := l.grant != 0
	l.grant = 0
	return was
}

// move ends the grant, and says whether there was one. From now on h gives them.
func (l *lease) move(h *home) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	was := l.grant != 0
	l.of, l.grant = h, 0
	return was
}

// left returns how long the grant lasts.
func (l *lease) left() (d time.Duration, granted bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.until - monotonic(), l.grant != 0
}

// Leased says whether the lease holds at this moment, under which what was read
// earlier may be believed.
func (c *Client) Leased() bool {
	d, granted := c.lease.left()
	return granted && d > 0
}

// lapse drops what is cached, before anything else is answered.
func (c *Client) lapse(why string) { c.endLease(why, (*lease).end) }

// leasesFrom is lapse, and from then on h gives the leases; nil: nobody does.
func (c *Client) leasesFrom(h *home, why string) {
	c.endLease(why, func(l *lease) bool { return l.move(h) })
}

func (c *Client) endLease(why string, end func(*lease) bool) {
	c.gate.Lock()
	defer c.gate.Unlock()
	if !end(&c.lease) {
		return // nothing is cached, or somebody was faster
	}
	c.log.Info("caches dropped", "why", why)
	c.dropAll()
}

// dropAll is called with gate held for writing.
func (c *Client) dropAll() {
	if err := c.cfg.Kernel.DropAll(c.life); err != nil && c.life.Err() == nil {
		c.log.Warn("dropping caches", "err", err)
	}
}

// watchLease drops what is cached when the lease runs out.
func (c *Client) watchLease(ctx context.Context) {
	timer := time.NewTimer(cluster.Lease)
	defer timer.Stop()
	for {
		d, granted := c.lease.left()
		if granted && d <= 0 {
			c.lapse("the lease ran out")
			continue
		}
		if granted {
			timer.Reset(d)
		} else {
			timer.Stop()
		}
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-c.lease.granted:
		}
	}
}
