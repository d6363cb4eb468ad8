package client

import (
	"context"
	"slices"
	"sync"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// numbers gives the session's changes their numbers, and knows below which all
// have been answered. None runs further ahead of one that has no answer than the
// replicas remember (proto.MaxAhead): behind that they could not tell a change that
// was carried out from one that never came, and would have to refuse both. A wait
// for a lock may fall behind, since it can be asked for again.
type numbers struct {
	mu      sync.Mutex
	base    uint64        // all below are answered
	given   []given       // given[i] is base+i
	firm    uint64        // the first that has no answer and must not fall behind, or the next
	changed chan struct{} // closed when firm moves; nil if nobody waits
}

// given is what became of a number.
type given struct{ answered, wait bool }

func (n *numbers) init() { n.base, n.firm = 1, 1 }

// begin returns the next number, as soon as it may be used. wait: it is for a wait
// for a lock.
func (n *numbers) begin(ctx context.Context, wait bool) (uint64, error) {
	for {
		n.mu.Lock()
		next := n.base + uint64(len(n.given))
		if next < n.firm+proto.MaxAhead {
			n.given = append(n.given, given{wait: wait})
			n.pass()
			n.mu.Unlock()
			return next, nil
		}
		if n.changed == nil {
			n.changed = make(chan struct{})
		}
		changed := n.changed
		n.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// end says that the number was answered, or never sent.
func (n *numbers) end(number uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.given[number-n.base].answered = true
	i := 0
	for i < len(n.given) && n.given[i].answered {
		i++
	}
	n.base += uint64(i)
	n.given = slices.Delete(n.given, 0, i)
	n.pass()
}

// pass moves firm past what is answered or may fall behind.
func (n *numbers) pass() {
	was := n.firm
	n.firm = max(n.firm, n.base)
	for end := n.base + uint64(len(n.given)); n.firm < end; n.firm++ {
		if g := n.given[n.firm-n.base]; !g.answered && !g.wait {
			break
		}
	}
	if n.firm != was && n.changed != nil {
		close(n.changed)
		n.changed = nil
	}
}

// acked is the number below which all have been answered.
func (n *numbers) acked() uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.base
}

// outcome is one operation on its way.
type outcome struct {
	op     fsop.Op
	number uint64            // 0: nothing is changed, it need not be answered
	sent   bool              // some replica may have carried it out
	as     cluster.SessionID // whose number it is, once it was sent
}

// sender sends an operation until it is answered or ctx ends.
type sender interface {
	send(ctx context.Context, o *outcome) (*fsop.Reply, error)
}

// numbering numbers changes. A change that was sent and whose caller gives up
// goes on without him: until it is answered nobody knows whether it was carried
// out, and the replicas must remember it.
type numbering struct {
	c    *Client
	next sender
}

// Do implements fsop.Handler.
func (n *numbering) Do(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
	o := &outcome{op: op}
	if op.Kind() == fsop.KindFlush {
		return &fsop.Reply{}, nil // every write has arrived before it was answered
	}
	if !op.Kind().Mutates() {
		return n.next.send(ctx, o)
	}
	lock, _ := op.(*fsop.Setlk)
	number, err := n.c.numbers.begin(ctx, lock != nil && lock.Wait)
	if err != nil {
		return nil, err
	}
	o.number = number
	reply, err := n.next.send(ctx, o)
	if ctx.Err() == nil || !o.sent || answered(err) {
		n.c.numbers.end(o.number)
		return reply, err
	}
	o.op = clone(op)
	n.c.wg.Go(func() {
		// It ends with the session at the latest.
		reply, err := n.next.send(n.c.life, o)
		n.c.numbers.end(o.number)
		if err != nil {
			return
		}
		n.c.unused(op, reply)
		if _, ok := op.(*fsop.Tmpfile); ok { // nobody knows it, so nobody else will
			_, _ = n.Do(n.c.life, &fsop.CloseWindow{Ino: reply.Attr.Ino, Session: uint64(o.as)})
		}
	})
	return nil, err
}

// answered says whether a replica has answered.
func answered(err error) bool {
	if err == nil {
		return true
	}
	_, ok := err.(fsop.Errno)
	return ok
}

// clone returns an op that shares no bytes with the caller.
func clone(op fsop.Op) fsop.Op {
	switch op := op.(type) {
	case *fsop.Write:
		w := *op
		w.Data = slices.Clone(op.Data)
		return &w
	case *fsop.Make:
		m := *op
		m.First.Data = slices.Clone(op.First.Data)
		return &m
	case *fsop.Setxattr:
		x := *op
		x.Value = slices.Clone(op.Value)
		return &x
	}
	return op
}

// unused forgets the inodes that a reply named which nobody waits for any more.
func (c *Client) unused(op fsop.Op, r *fsop.Reply) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if fsop.Introduces(op) {
		c.dropped[r.Attr.Ino]++
	}
	if list, ok := op.(*fsop.Readdir); ok && list.Plus {
		for i := range r.Entries {
			c.dropped[r.Entries[i].Ino]++
		}
	}
}

// forgotten returns and clears what the home is to be told that neither the
// kernel nor anybody else holds.
func (c *Client) forgotten() []proto.Hold {
	all := c.cfg.Kernel.Forgotten()
	c.mu.Lock()
	for ino, n := range c.dropped {
		all = append(all, proto.Hold{Ino: ino, N: n})
	}
	clear(c.dropped)
	c.mu.Unlock()
	if c.windows == nil {
		return all
	}
	// What the home has not counted yet it must not be told to forget.
	return slices.DeleteFunc(all, func(h proto.Hold) bool {
		if !c.windows.isForetold(h.Ino) {
			return false
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.dropped[h.Ino] += h.N
		return true
	})
}
