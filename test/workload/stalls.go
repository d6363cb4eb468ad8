package main

import (
	"context"
	"sync"
	"time"
)

// stalls are the times during which this very machine did not run who was due: a
// virtual machine whose host took its processors away. They say nothing about the
// file system, and are taken off what operations took that were under way.
type stalls struct {
	mu    sync.Mutex // guards spans
	spans []span
}

type span struct{ from, to time.Time }

const (
	stallTick = 10 * time.Millisecond
	stallMin  = 30 * time.Millisecond // shorter delays are everyday life
)

// watch notes stalls until ctx ends: when it wakes up late, others did too.
func (s *stalls) watch(ctx context.Context) {
	tick := time.NewTimer(stallTick)
	defer tick.Stop()
	for {
		due := time.Now().Add(stallTick)
		tick.Reset(stallTick)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s.woke(due, time.Now())
	}
}

func (s *stalls) woke(due, now time.Time) {
	if now.Sub(due) < stallMin {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spans = append(s.spans, span{due, now})
}

// during is for how long the machine was stalled between two moments.
func (s *stalls) during(from, to time.Time) (d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.spans {
		begin, end := x.from, x.to
		if begin.Before(from) {
			begin = from
		}
		if end.After(to) {
			end = to
		}
		d += max(end.Sub(begin), 0)
	}
	return d
}
