package wire

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

const (
	readBuffer = 32 << 10
	// directRead is how much of a body must be missing for it to be read straight
	// into its place; less comes through the buffer, with what follows it.
	directRead = 8 << 10
	// stallUnit is how many bytes have to arrive per StallTimeout.
	stallUnit = 64 << 10
)

// reader cuts the stream into frames. Bytes are read to where next says, and
// got hands out the messages that they complete.
type reader struct {
	c        *Conn
	canceler Canceler
	buf      []byte
	r, w     int // buf[r:w] was read and not yet used

	// Of a frame whose header was read:
	head header
	body []byte
	have int // bytes of body that are there
	open bool

	limited bool // a read deadline is set
	since   int  // bytes since it was
}

// next says where to read to.
func (r *reader) next() []byte {
	if r.open && len(r.body)-r.have >= directRead {
		return r.body[r.have:]
	}
	if r.r == r.w {
		r.r, r.w = 0, 0
	} else if len(r.buf)-r.w < directRead {
		r.w = copy(r.buf, r.buf[r.r:r.w])
		r.r = 0
	}
	return r.buf[r.w:]
}

// got takes n bytes that were read to where next said.
func (r *reader) got(n int) error {
	r.since += n
	if r.open && len(r.body)-r.have >= directRead {
		if r.have += n; r.have < len(r.body) {
			return nil
		}
		if err := r.deliver(); err != nil {
			return err
		}
	} else {
		r.w += n
	}
	for {
		if !r.open {
			if r.w-r.r < headerSize {
				return nil
			}
			h, err := parseHeader(r.buf[r.r:], r.c.o.Integrity)
			if err != nil {
				return err
			}
			r.r += headerSize
			r.head, r.body, r.have, r.open = h, nil, 0, true
			if h.length > 0 {
				r.body = r.c.o.Buffers.get(h.length)
			}
		}
		k := copy(r.body[r.have:], r.buf[r.r:r.w])
		r.r += k
		if r.have += k; r.have < len(r.body) {
			return nil
		}
		if err := r.deliver(); err != nil {
			return err
		}
	}
}

// deliver hands out the frame that is complete.
func (r *reader) deliver() error {
	body := r.body
	r.body, r.open = nil, false
	if r.c.o.Integrity {
		if err := r.head.check(body); err != nil {
			return err
		}
	}
	return r.c.arrived(&r.head, body, r.canceler)
}

// partial reports whether a frame has begun to arrive. In the middle of a frame
// the rest is due; between frames nothing is.
func (r *reader) partial() bool { return r.open || r.w > r.r }

// clock sets or clears the time by which more has to arrive.
func (r *reader) clock() error {
	switch {
	case r.partial() && (!r.limited || r.since >= stallUnit):
		r.limited, r.since = true, 0
		return r.c.nc.SetReadDeadline(time.Now().Add(r.c.o.StallTimeout))
	case !r.partial() && r.limited:
		r.limited = false
		return r.c.nc.SetReadDeadline(time.Time{})
	}
	return nil
}

func (r *reader) failed(err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%w in the middle of a frame for %v", ErrStalled, r.c.o.StallTimeout)
	case errors.Is(err, io.EOF) && r.partial():
		return fmt.Errorf("%w in the middle of a frame", ErrPeerClosed)
	}
	return explain(err)
}

// readLoop hands out what arrives until the connection ends.
func (c *Conn) readLoop() error {
	r := &reader{c: c, buf: make([]byte, readBuffer)}
	r.canceler, _ = c.o.Handler.(Canceler)
	for {
		if err := r.clock(); err != nil {
			return explain(err)
		}
		n, err := c.nc.Read(r.next())
		if gerr := r.got(n); gerr != nil {
			return gerr
		}
		if err != nil {
			return r.failed(err)
		}
	}
}

// arrived hands out one message.
func (c *Conn) arrived(h *header, body []byte, canceler Canceler) error {
	switch {
	case h.flags == flagReply:
		w := c.calls.end(h.id)
		if w == nil {
			if err := c.Err(); err != nil {
				return err
			}
			return fmt.Errorf("%w: reply of kind %d to no call (id %d)", ErrFrame, h.kind, h.id)
		}
		w.give(body, nil)
	case c.o.Handler == nil:
		return fmt.Errorf("%w: kind %d, and nothing but replies is expected", ErrFrame, h.kind)
	case h.flags == flagCancel:
		if canceler != nil {
			canceler.Cancel(c, h.id)
		}
	default:
		m := Message{Kind: h.kind, ID: h.id, Body: body, size: h.length}
		if m.ID != 0 {
			if n := c.inCalls.Add(1); n > int64(c.o.MaxCalls) {
				return fmt.Errorf("%w: more than %d calls at once", ErrFrame, c.o.MaxCalls)
			}
			if n := c.inBytes.Add(int64(m.size)); n > int64(c.o.MaxCallBytes) {
				return fmt.Errorf("%w: calls of more than %d bytes at once", ErrFrame, c.o.MaxCallBytes)
			}
		}
		c.o.Handler.Message(c, m)
	}
	return nil
}
