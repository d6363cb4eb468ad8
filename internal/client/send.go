package client

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/wire"
)

// sending sends operations to the home, whichever that is, until one answers.
type sending struct{ c *Client }

// send implements sender.
func (s *sending) send(ctx context.Context, o *outcome) (*fsop.Reply, error) {
	c := s.c
	for {
		h, err := c.awaitHome(ctx)
		if err != nil {
			return nil, err
		}
		if o.number != 0 && o.sent && o.as != h.as {
			// Its session has ended, and with it the memory of whether it was carried out.
			return nil, fsop.EIO
		}
		d, granted, err := s.ask(ctx, h, o)
		switch {
		case err == nil && d.Status == proto.OK:
			return c.give(d, granted)
		case err == nil && d.Status == proto.NotServing, err == nil && d.Status == proto.UnknownSet:
			h.sayGoodbye(fmt.Errorf("the replica does not serve: %s", statusText(d.Status)))
		case err == nil:
			h.leave(fmt.Errorf("the replica refuses: %s", statusText(d.Status)))
		case ctx.Err() != nil:
			return nil, ctx.Err()
		}
		// The connection is lost. Whether the home is another now or the same
		// again, it is asked under the same number.
		if err := c.awaitOther(ctx, h); err != nil {
			return nil, err
		}
	}
}

// ask asks a home. Its answer may be cached under the lease that is returned.
func (s *sending) ask(ctx context.Context, h *home, o *outcome) (d *proto.DoReply, granted uint64, err error) {
	granted = s.c.lease.current(h)
	d, err = h.do(ctx, o, s.c.numbers.Acked())
	return d, granted, err
}

func statusText(s proto.Status) string {
	switch s {
	case proto.Refused:
		return "refused"
	case proto.NotServing:
		return "not serving"
	case proto.UnknownSet:
		return "unknown set"
	case proto.WrongVersion:
		return "another version"
	case proto.SessionEnded:
		return "the session has ended"
	}
	return fmt.Sprintf("status %d", s)
}

// awaitOther returns when h is not the home any more.
func (c *Client) awaitOther(ctx context.Context, h *home) error {
	for {
		c.mu.Lock()
		is, changed, closed := c.home == h, c.changed, c.closed
		c.mu.Unlock()
		if closed != nil {
			return closed
		}
		if !is {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// give hands out an answer. Only if the lease of the home that was asked held without
// a gap from before the question until now may the answer be cached.
func (c *Client) give(d *proto.DoReply, granted uint64) (*fsop.Reply, error) {
	if c.lease.over() {
		c.lapse("the lease ran out")
	}
	c.gate.RLock()
	defer c.gate.RUnlock()
	if !c.lease.holds(granted) {
		d.Reply.Seq = 0
	}
	if d.Errno != 0 {
		return &d.Reply, d.Errno
	}
	return &d.Reply, nil
}

// do asks the home, once in every epoch of the set until it answers: a change is carried out
// in the epoch in which it was asked for, and only its client knows whether it still wants it.
func (h *home) do(ctx context.Context, o *outcome, acked uint64) (*proto.DoReply, error) {
	h.inflight.Add(1)
	defer h.inflight.Add(-1)
	for {
		epoch := cluster.Epoch(h.c.cfg.Estate.Epoch())
		d, err := h.doIn(ctx, epoch, o, acked)
		if err != nil || d.Status != proto.Anew {
			return d, err
		}
		if d.Epoch <= epoch {
			err := fmt.Errorf("%w: asked in epoch %d, the answer is to ask in %d", wire.ErrFrame, epoch, d.Epoch)
			h.leave(err)
			return nil, err
		}
		h.c.heard(d.Epoch)
	}
}

// heard notes that there is an epoch of the set, and returns the newest that any home has said, to this
// process or to one before it: what those asked for may still be carried out.
func (c *Client) heard(e cluster.Epoch) cluster.Epoch {
	return cluster.Epoch(c.cfg.Estate.RaiseEpoch(uint64(e)))
}

func (h *home) doIn(ctx context.Context, epoch cluster.Epoch, o *outcome, acked uint64) (*proto.DoReply, error) {
	parts := encode(&proto.Do{Number: o.number, Acked: acked, Epoch: epoch, Op: o.op})
	var body []byte
	var err error
	o.sent, o.as = true, h.as
	if holds(o.op) {
		body, err = h.ask(ctx, o, parts)
	} else {
		body, err = h.conn.Call(ctx, proto.KindDo, parts...)
	}
	if err != nil {
		return nil, err
	}
	d := new(proto.DoReply)
	if err := codec.Decode(body, d); err != nil {
		h.leave(err)
		return nil, err
	}
	if len(d.Reply.Data) >= largeData {
		d.Reply.Free = func() { h.conn.Recycle(body) }
	}
	return d, nil
}

// largeData is from which length on it pays to use a body again.
const largeData = 16 << 10

// holds reports whether the answer counts as a hold, or several (proto.Hold).
func holds(op fsop.Op) bool {
	list, ok := op.(*fsop.Readdir)
	return ok && list.Plus || fsop.Introduces(op)
}

// ask is Call for operations whose answer must not get lost when the caller
// gives up: the home has counted what it named.
func (h *home) ask(ctx context.Context, o *outcome, parts [][]byte) ([]byte, error) {
	type answer struct {
		body []byte
		err  error
	}
	got := make(chan answer, 1)
	for {
		err := h.conn.Go(proto.KindDo, func(body []byte, err error) { got <- answer{body, err} }, parts...)
		if err == nil {
			break
		}
		if err != wire.ErrBacklog {
			return nil, err
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-h.conn.Done():
			return nil, h.conn.Err()
		}
	}
	select {
	case a := <-got:
		return a.body, a.err
	case <-ctx.Done():
	}
	if o.number != 0 {
		return nil, ctx.Err() // it will be asked again, and the answer repeated
	}
	h.c.wg.Go(func() {
		a := <-got // at the latest when the connection ends
		var d proto.DoReply
		if a.err == nil && codec.Decode(a.body, &d) == nil && d.Status == proto.OK && d.Errno == 0 {
			h.c.unused(o.op, &d.Reply)
		}
	})
	return nil, ctx.Err()
}

// contents returns what op writes, nil if nothing.
func contents(op fsop.Op) *fsop.Write {
	switch op := op.(type) {
	case *fsop.Write:
		return op
	case *fsop.Make:
		return &op.First
	}
	return nil
}

// encode encodes a request. The data of a write, which comes last, is not copied.
func encode(d *proto.Do) [][]byte {
	w := contents(d.Op)
	if w == nil || len(w.Data) < 4096 {
		return [][]byte{codec.Append(nil, d)}
	}
	empty := *w
	empty.Data = nil
	without := *d
	switch op := d.Op.(type) {
	case *fsop.Make:
		without.Op = &fsop.Make{Node: op.Node, First: empty}
	default:
		without.Op = &empty
	}
	head := codec.Append(nil, &without)
	binary.LittleEndian.PutUint32(head[len(head)-4:], uint32(len(w.Data)))
	return [][]byte{head, w.Data}
}
