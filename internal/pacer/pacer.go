// Package pacer tells tests the time that their process was given, so that a bound on it is
// kept or missed by what is tested, and not by what else the machine does.
package pacer

import (
	"sync/atomic"
	"testing"
	"time"
)

// Pacer tells the time that this process was given: how often a goroutine that sleeps
// and sleeps came to it, so that what others do on the machine counts for little. What
// is bounded by it waits for something, if it is late, and not for its turn.
type Pacer struct{ n atomic.Int64 }

const step = 5 * time.Millisecond

// New begins to tell the time, until the test ends.
func New(t testing.TB) *Pacer {
	p := new(Pacer)
	over, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-over:
				return
			case <-time.After(step):
				p.n.Add(1)
			}
		}
	}()
	t.Cleanup(func() { close(over); <-ended })
	return p
}

// Now is the time since New, in steps of 5 ms.
func (p *Pacer) Now() time.Duration { return time.Duration(p.n.Load()) * step }

// After returns a channel that is closed when d has passed.
func (p *Pacer) After(t testing.TB, d time.Duration) <-chan struct{} {
	until, c, over := p.Now()+d, make(chan struct{}), make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for p.Now() < until {
			select {
			case <-over:
				return
			case <-time.After(step):
			}
		}
		close(c)
	}()
	t.Cleanup(func() { close(over); <-ended })
	return c
}
