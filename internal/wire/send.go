package wire

import (
	"context"
	"fmt"
)

// copyLimit is the length up to which a part is copied into the queue; a
// longer one is written from where it is.
const copyLimit = 8 << 10

// Batches are gathered in chunks of chunkSize bytes. keepChunks of them are kept
// for the next batches; a connection that is kept up with needs two.
const (
	chunkSize  = 32 << 10
	keepChunks = 4
)

// batch is a run of frames on their way to the network.
type batch struct {
	vec    [][]byte // in the order of the stream: runs of short pieces in chunks, and long parts
	tail   []byte   // the chunk that short pieces go to
	from   int      // tail[from:] is not in vec yet
	chunks [][]byte // the chunks before tail
	size   int      // bytes in all
}

// add puts a frame of size bytes at the end. Chunks come from free if it has any.
func (b *batch) add(head *[headerSize]byte, parts [][]byte, size int, free *[][]byte) {
	b.short(head[:], free)
	for _, p := range parts {
		if len(p) <= copyLimit {
			b.short(p, free)
		} else {
			b.close()
			b.vec = append(b.vec, p)
		}
	}
	b.size += size
}

// short copies a piece of at most copyLimit bytes.
func (b *batch) short(p []byte, free *[][]byte) {
	if len(p) > cap(b.tail)-len(b.tail) {
		b.close()
		if b.tail != nil {
			b.chunks = append(b.chunks, b.tail)
		}
		if n := len(*free); n > 0 {
			b.tail, *free = (*free)[n-1], (*free)[:n-1]
		} else {
			b.tail = make([]byte, 0, chunkSize)
		}
		b.from = 0
	}
	b.tail = append(b.tail, p...)
}

// close completes vec.
func (b *batch) close() {
	if len(b.tail) > b.from {
		b.vec = append(b.vec, b.tail[b.from:])
		b.from = len(b.tail)
	}
}

// reset empties the batch and gives its chunks back. It keeps vec's memory.
func (b *batch) reset(free *[][]byte) {
	if b.tail != nil {
		b.chunks = append(b.chunks, b.tail)
	}
	for _, c := range b.chunks {
		if len(*free) < keepChunks {
			*free = append(*free, c[:0])
		}
	}
	clear(b.vec)
	clear(b.chunks)
	*b = batch{vec: b.vec[:0], chunks: b.chunks[:0]}
	if cap(b.vec) > 1024 {
		b.vec = nil
	}
}

// when says what a sender does after it has queued a message.
type when uint8

const (
	later when = iota // somebody will flush
	soon              // have it written by the writer goroutine
	now               // write it, unless somebody else does already
)

// Send sends a one-way message whose body is the parts put together. It never
// waits for the network: it is the writer goroutine that writes, together with
// everything else that was queued meanwhile. ErrBacklog or the connection's
// cause say that the message was not queued.
//
// Parts of up to 8 KiB are copied before Send returns. Longer ones are not:
// they must not change any more, ever, as nobody says when they have been sent.
func (c *Conn) Send(kind uint8, parts ...[]byte) error {
	_, err := c.queue(header{kind: kind}, parts, soon)
	return err
}

// Push is Send that writes at once what can be written without waiting, before
// it returns; the writer goroutine does the rest. It is for messages that
// somebody else, or this process itself, is about to act upon.
func (c *Conn) Push(kind uint8, parts ...[]byte) error {
	_, err := c.queue(header{kind: kind}, parts, now)
	return err
}

// Queue is Send for a burst: nothing is written before the next Flush, Call or
// Reply on the connection.
func (c *Conn) Queue(kind uint8, parts ...[]byte) error {
	_, err := c.queue(header{kind: kind}, parts, later)
	return err
}

// Flush writes what is queued, as far as that goes without waiting; the writer
// goroutine does the rest.
func (c *Conn) Flush() {
	c.mu.Lock()
	if c.takeLocked(caller) {
		c.mu.Unlock()
		c.push()
		return
	}
	c.mu.Unlock()
}

// Reply answers m, which must have come from this connection and is answered
// once. It does not wait for the network, and owns parts like Send. If the
// reply cannot be queued the connection ends, since the caller would wait for ever:
// whoever makes large replies asks for Room before.
func (c *Conn) Reply(m Message, parts ...[]byte) error {
	if m.ID == 0 {
		return fmt.Errorf("reply to a one-way message of kind %d", m.Kind)
	}
	c.inCalls.Add(-1)
	c.inBytes.Add(-int64(m.size))
	_, err := c.queue(header{kind: m.Kind, id: m.ID, flags: flagReply}, parts, now)
	if err != nil {
		c.Close(fmt.Errorf("reply of kind %d: %w", m.Kind, err))
	}
	return err
}

// ReplySent is Reply for parts that are to be used again: it waits until they were
// given to the operating system. After an error they must be left alone.
func (c *Conn) ReplySent(ctx context.Context, m Message, parts ...[]byte) error {
	c.inCalls.Add(-1)
	c.inBytes.Add(-int64(m.size))
	turn, err := c.queue(header{kind: m.Kind, id: m.ID, flags: flagReply}, parts, now)
	if err != nil {
		c.Close(fmt.Errorf("reply of kind %d: %w", m.Kind, err))
		return err
	}
	c.mu.Lock()
	return c.waitBatchLocked(ctx, turn)
}

// Room waits until n bytes fit into the queue, or nothing is queued at all.
// The room is not reserved; a caller that finds it gone asks again.
func (c *Conn) Room(ctx context.Context, n int) error {
	c.mu.Lock()
	for {
		switch {
		case c.err != nil:
			err := c.err
			c.mu.Unlock()
			return err
		case c.queued == 0 || c.queued+n <= c.o.MaxQueue:
			c.mu.Unlock()
			return nil
		}
		wait := c.waitLocked()
		c.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		c.mu.Lock()
	}
}

// Drain waits until everything queued so far was given to the operating
// system. It is what comes before Close when the last words matter.
func (c *Conn) Drain(ctx context.Context) error {
	c.mu.Lock()
	last := c.turn
	if c.out.size > 0 {
		last++
	}
	return c.waitBatchLocked(ctx, last)
}

// waitBatchLocked waits until the batch with that number is gone, and unlocks mu.
func (c *Conn) waitBatchLocked(ctx context.Context, turn uint64) error {
	for c.finished < turn && c.err == nil {
		wait := c.waitLocked()
		c.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		c.mu.Lock()
	}
	err := c.err
	if c.finished >= turn {
		err = nil
	}
	c.mu.Unlock()
	return err
}

// queue puts a frame into the queue, sees to its being written, and returns
// the number of its batch.
func (c *Conn) queue(h header, parts [][]byte, w when) (turn uint64, err error) {
	for _, p := range parts {
		h.length += len(p)
	}
	if h.length > MaxBody {
		return 0, fmt.Errorf("%w: %d bytes, %d allowed", ErrTooLong, h.length, MaxBody)
	}
	if c.o.Integrity {
		h.crc = h.sum(parts...)
	}
	var head [headerSize]byte
	h.encode(&head)
	size := headerSize + h.length

	c.mu.Lock()
	switch {
	case c.err != nil:
		err = c.err
		c.mu.Unlock()
		return 0, err
	case c.queued > 0 && c.queued+size > c.o.MaxQueue:
		c.mu.Unlock()
		return 0, ErrBacklog
	}
	c.out.add(&head, parts, size, &c.free)
	c.queued += size
	turn = c.turn + 1
	if w == now && c.takeLocked(caller) {
		c.mu.Unlock()
		c.push()
		return turn, nil
	}
	wake := w != later && c.owner == nobody && c.ready
	c.mu.Unlock()
	if wake {
		c.kick()
	}
	return turn, nil
}

// kick makes the writer goroutine look at the queue.
func (c *Conn) kick() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// takeLocked makes the queue the current batch of a new owner, if there is
// something to write and nobody writes.
func (c *Conn) takeLocked(o owner) bool {
	if c.owner != nobody || !c.ready || c.err != nil || c.out.size == 0 {
		return false
	}
	c.owner = o
	c.cur, c.out = c.out, c.cur
	c.cur.close()
	c.turn++
	c.sink.load(c.cur.vec)
	return true
}

// finishLocked ends the owner's turn with the current batch.
func (c *Conn) finishLocked() {
	c.owner = nobody
	c.finished = c.turn
	c.queued -= c.cur.size
	c.cur.reset(&c.free)
	c.changedLocked()
}

// push writes the current batch and those that gather behind it, without
// blocking; the caller has made itself the owner. It leaves the rest to the
// writer goroutine, soon enough not to become one.
func (c *Conn) push() {
	for round := 0; ; round++ {
		done, err := c.sink.write(false)
		if err != nil {
			c.Close(explain(err))
		}
		c.mu.Lock()
		if !done {
			break // the writer finds the sink as this write left it
		}
		c.finishLocked()
		if !c.takeLocked(caller) {
			c.mu.Unlock()
			return
		}
		if round == 3 {
			break
		}
		c.mu.Unlock()
	}
	if c.err != nil { // there may be no writer any more
		c.finishLocked()
		c.mu.Unlock()
		return
	}
	c.owner = writer
	c.mu.Unlock()
	c.kick()
}

// writeLoop is the writer goroutine: it writes what others left.
func (c *Conn) writeLoop() {
	for ended := false; !ended; {
		select {
		case <-c.wake:
		case <-c.done:
			ended = true
		}
		c.mu.Lock()
		for c.owner == writer || c.takeLocked(writer) {
			c.mu.Unlock()
			if _, err := c.sink.write(true); err != nil {
				c.Close(explain(err))
			}
			c.mu.Lock()
			c.finishLocked()
		}
		c.mu.Unlock()
	}
}
