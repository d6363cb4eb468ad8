// Package crew runs short functions side by side in goroutines that are used again.
//
// A goroutine begins with a small stack. A function that calls as deep as answering a
// request does has it grown several times, each time copied, and gives it back at its end:
// a twentieth of the processor time of a mount and its daemon under a load of small
// requests. One that waits for the next function keeps its stack until the garbage
// collector finds most of it unused.
package crew

import (
	"sync"
	"sync/atomic"
)

// Crew is a [sync.WaitGroup] of which some goroutines stay.
type Crew struct {
	stay int32

	wg      sync.WaitGroup
	work    chan func() // received from by who rests
	resting atomic.Int32
	once    sync.Once
	end     chan struct{}
}

// New returns a crew of which at most stay goroutines wait for work.
func New(stay int) *Crew {
	return &Crew{stay: int32(stay), work: make(chan func()), end: make(chan struct{})}
}

// Go calls f in a goroutine. It does not wait for one to be free.
func (c *Crew) Go(f func()) {
	select {
	case c.work <- f:
	default:
		c.wg.Go(func() { c.run(f) })
	}
}

func (c *Crew) run(f func()) {
	for {
		f()
		if c.resting.Add(1) > c.stay {
			c.resting.Add(-1)
			return
		}
		select {
		case f = <-c.work:
			c.resting.Add(-1)
		case <-c.end:
			return
		}
	}
}

// Wait returns when all functions have returned, and ends the goroutines. It may be
// called more than once; what is given to Go after that still runs. As with a WaitGroup, Go and
// Wait may only overlap while a function runs.
func (c *Crew) Wait() {
	c.once.Do(func() { close(c.end) })
	c.wg.Wait()
}
