package wire

import (
	"errors"
	"fmt"
	"io"
	"net"
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

// reader cuts the stream into frames.
type reader struct {
	nc      net.Conn
	buf     []byte
	r, w    int // buf[r:w] was read and not yet used
	stall   time.Duration
	limited bool // a read deadline is set
}

// need makes at least n bytes available in buf. n is at most len(buf).
func (r *reader) need(n int) error {
	if r.w-r.r >= n {
		return nil
	}
	if r.r == r.w {
		r.r, r.w = 0, 0
	} else if r.r > 0 && len(r.buf)-r.r < max(n, len(r.buf)/2) {
		r.w = copy(r.buf, r.buf[r.r:r.w])
		r.r = 0
	}
	for r.w-r.r < n {
		// In the middle of a frame the rest is due; between frames nothing is.
		if r.w > r.r {
			r.deadline()
		}
		k, err := r.nc.Read(r.buf[r.w:])
		r.w += k
		if err != nil && r.w-r.r < n {
			return r.failed(err)
		}
	}
	return r.met()
}

// deadline starts the clock for the rest of a frame.
func (r *reader) deadline() {
	r.limited = true
	r.nc.SetReadDeadline(time.Now().Add(r.stall))
}

// met stops the clock.
func (r *reader) met() error {
	if !r.limited {
		return nil
	}
	r.limited = false
	return r.nc.SetReadDeadline(time.Time{})
}

func (r *reader) failed(err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%w in the middle of a frame for %v", ErrStalled, r.stall)
	case errors.Is(err, io.EOF) && r.w > r.r:
		return fmt.Errorf("%w in the middle of a frame", ErrPeerClosed)
	}
	return explain(err)
}

// body reads the rest of a frame into memory of its own.
func (r *reader) body(n int, from *Buffers) ([]byte, error) {
	if n == 0 {
		return nil, nil
	}
	if n-(r.w-r.r) < directRead && n <= len(r.buf) {
		if err := r.need(n); err != nil {
			return nil, err
		}
		b := from.get(n)
		copy(b, r.buf[r.r:])
		r.r += n
		return b, nil
	}
	b := from.get(n)
	k := copy(b, r.buf[r.r:r.w])
	r.r += k
	for k < n {
		r.deadline()
		m, err := io.ReadFull(r.nc, b[k:min(n, k+stallUnit)])
		k += m
		if err != nil {
			from.put(b)
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, r.failed(err)
		}
	}
	return b, r.met()
}

// readLoop hands out what arrives until the connection ends.
func (c *Conn) readLoop() error {
	r := reader{nc: c.nc, buf: make([]byte, readBuffer), stall: c.o.StallTimeout}
	canceler, _ := c.o.Handler.(Canceler)
	for {
		if err := r.need(headerSize); err != nil {
			return err
		}
		h, err := parseHeader(r.buf[r.r:], c.o.Integrity)
		if err != nil {
			return err
		}
		r.r += headerSize
		body, err := r.body(h.length, c.o.Buffers)
		if err != nil {
			return err
		}
		if c.o.Integrity {
			if err := h.check(body); err != nil {
				return err
			}
		}
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
	}
}
