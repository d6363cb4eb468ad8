package wire

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"unsafe"
)

// calls are this side's calls that were not yet replied to.
type calls struct {
	mu       sync.Mutex // guards the fields below
	err      error      // set when the connection has ended: no more calls
	next     uint64     // the last id given
	open     map[uint64]*waiter
	bytes    int // in the bodies of open
	maxCalls int // what the other side puts up with; the least until it has said so
	maxBytes int
	room     chan struct{} // closed when a call ends, if somebody waits for that
	free     []*waiter
}

// waiter is one open call.
type waiter struct {
	size   int // of the body that was sent
	result chan result
	done   func([]byte, error) // instead of result, for Go
	gone   bool                // nobody waits any more
}

type result struct {
	body []byte
	err  error
}

func (s *calls) init() {
	s.open = make(map[uint64]*waiter)
	s.maxCalls, s.maxBytes = leastCalls, MaxBody
}

// limit sets how many calls may be open.
func (s *calls) limit(calls, bytes int) {
	s.mu.Lock()
	s.maxCalls, s.maxBytes = calls, bytes
	s.roomLocked()
	s.mu.Unlock()
}

func (s *calls) roomLocked() {
	if s.room != nil {
		close(s.room)
		s.room = nil
	}
}

// begin opens a call with a body of size bytes. With wait it waits for its
// turn, otherwise no turn is ErrBacklog.
func (s *calls) begin(ctx context.Context, size int, done func([]byte, error)) (uint64, *waiter, error) {
	s.mu.Lock()
	for {
		if err := s.err; err != nil {
			s.mu.Unlock()
			return 0, nil, err
		}
		if len(s.open) < s.maxCalls && (len(s.open) == 0 || s.bytes+size <= s.maxBytes) {
			break
		}
		if done != nil {
			s.mu.Unlock()
			return 0, nil, ErrBacklog
		}
		if s.room == nil {
			s.room = make(chan struct{})
		}
		room := s.room
		s.mu.Unlock()
		select {
		case <-room:
		case <-ctx.Done():
			return 0, nil, context.Cause(ctx)
		}
		s.mu.Lock()
	}
	var w *waiter
	if n := len(s.free); n > 0 {
		w, s.free = s.free[n-1], s.free[:n-1]
	} else {
		w = &waiter{result: make(chan result, 1)}
	}
	w.size, w.done, w.gone = size, done, false
	s.next++
	id := s.next
	s.open[id] = w
	s.bytes += size
	s.mu.Unlock()
	return id, w, nil
}

// end closes the call with that id and returns its waiter; nil if no call is
// open under it. Whoever closes it gives the result.
func (s *calls) end(id uint64) *waiter {
	s.mu.Lock()
	w := s.open[id]
	if w != nil {
		delete(s.open, id)
		s.bytes -= w.size
		s.roomLocked()
	}
	s.mu.Unlock()
	return w
}

// abandon says that nobody waits for the call any more. It is false if the
// call has ended: its result is there or about to be.
func (s *calls) abandon(id uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.open[id]
	if w != nil {
		w.gone = true
	}
	return w != nil
}

// reuse keeps a waiter whose result was received for another call.
func (s *calls) reuse(w *waiter) {
	s.mu.Lock()
	if len(s.free) < 256 {
		s.free = append(s.free, w)
	}
	s.mu.Unlock()
}

// fail ends all calls.
func (s *calls) fail(err error) {
	s.mu.Lock()
	s.err = err
	open := s.open
	s.open = nil
	s.roomLocked()
	s.mu.Unlock()
	for _, w := range open {
		w.give(nil, err)
	}
}

// give delivers the result of a call that was ended.
func (w *waiter) give(body []byte, err error) {
	switch {
	case w.done != nil:
		w.done(body, err)
	case !w.gone:
		w.result <- result{body, err} // has room for the only one
	}
}

// Call sends a request whose body is the parts put together and waits for its
// reply, which belongs to the caller. It first waits, if need be, until the other
// side takes another call and the queue has room. When the connection ends, it
// fails with the connection's cause; when ctx does, with ctx's, and the other side is
// told that nobody waits.
//
// Parts are Call's until it returns, whatever their length.
func (c *Conn) Call(ctx context.Context, kind uint8, parts ...[]byte) ([]byte, error) {
	size, long := 0, false
	for _, p := range parts {
		size += len(p)
		long = long || len(p) > copyLimit
	}
	if size > MaxBody {
		return nil, fmt.Errorf("%w: %d bytes, %d allowed", ErrTooLong, size, MaxBody)
	}
	id, w, err := c.calls.begin(ctx, size, nil)
	if err != nil {
		return nil, err
	}
	var turn uint64
	for {
		turn, err = c.queue(header{kind: kind, id: id}, parts, now)
		if err != ErrBacklog {
			break
		}
		if err = c.Room(ctx, headerSize+size); err != nil {
			break
		}
	}
	if err != nil {
		// Never sent; unless the connection's end closed the call before.
		if c.calls.end(id) == nil {
			<-w.result
		}
		c.calls.reuse(w)
		return nil, err
	}
	var r result
	select {
	case r = <-w.result:
	case <-ctx.Done():
		if c.calls.abandon(id) {
			c.queue(header{kind: kind, id: id, flags: flagCancel}, nil, soon)
			if long {
				c.reclaim(turn, parts)
			}
			return nil, context.Cause(ctx)
		}
		r = <-w.result
	}
	c.calls.reuse(w)
	if long { // whatever ended the call, it need not have been its being sent
		c.reclaim(turn, parts)
	}
	return r.body, r.err
}

// Go is Call for those who do not want to wait. done is called once: from the
// read loop with the reply, so it must not block, or with the error when the connection
// ends. Go does not wait for anything itself: ErrBacklog says that the other side
// does not take another call now. After any error done is not called.
// Parts are owned as by Send until done is called.
func (c *Conn) Go(kind uint8, done func(body []byte, err error), parts ...[]byte) error {
	size := 0
	for _, p := range parts {
		size += len(p)
	}
	id, w, err := c.calls.begin(nil, size, done)
	if err != nil {
		return err
	}
	if _, err = c.queue(header{kind: kind, id: id}, parts, now); err != nil {
		if c.calls.end(id) == nil {
			return nil // the connection's end called done
		}
		c.calls.reuse(w)
	}
	return err
}

// reclaim returns when nothing refers any more to parts, which were queued for
// the batch with that number.
func (c *Conn) reclaim(turn uint64, parts [][]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if turn > c.turn { // still queued
		for i, v := range c.out.vec {
			for _, p := range parts {
				if len(v) == len(p) && unsafe.SliceData(v) == unsafe.SliceData(p) {
					c.out.vec[i] = bytes.Clone(p)
				}
			}
		}
		return
	}
	// Its owner is in a write that ends, with the connection if not before.
	for c.finished < turn && c.owner != nobody {
		wait := c.waitLocked()
		c.mu.Unlock()
		<-wait
		c.mu.Lock()
	}
}
