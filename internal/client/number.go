package client

import (
	"context"
	"slices"

	"mortar/internal/cluster"
	"mortar/internal/estate"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

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
	change := estate.Change{Request: estate.RequestOf(ctx), Session: uint64(n.c.Session()), Wait: lock != nil && lock.Wait}
	if w := contents(op); w != nil {
		change.Ino = uint64(w.Ino)
	}
	a, err := n.c.numbers.Begin(ctx, change)
	if err != nil {
		return nil, err
	}
	o.number, o.as, o.sent = a.Number, cluster.SessionID(a.Session), a.Again
	reply, err := n.next.send(ctx, o)
	if ctx.Err() == nil || !o.sent || answered(err) {
		n.c.numbers.End(o.number, err == nil)
		return reply, err
	}
	if lock != nil && lock.Wait && context.Cause(ctx) != errLimit {
		return n.takeBack(ctx, o, lock)
	}
	o.op = clone(op)
	n.c.wg.Go(func() {
		// It ends with the session at the latest.
		reply, err := n.next.send(n.c.life, o)
		n.c.numbers.End(o.number, err == nil)
		if err != nil {
			return
		}
		// A request that ended tells the kernel, and whoever remembers for it, nothing of
		// what came of it; nobody else does, for it is this client's own change.
		_ = n.c.cfg.Kernel.Invalidate(n.c.life, reply.Seq, effects(o.op, reply.Attr.Ino))
		n.c.unused(op, reply)
		if _, ok := op.(*fsop.Tmpfile); ok { // nobody knows it, so nobody else will
			_, _ = n.Do(n.c.life, &fsop.CloseWindow{Ino: reply.Attr.Ino, Session: uint64(o.as)})
		}
	})
	return nil, err
}

// takeBack ends a wait for a lock that was sent and whose caller gave it up: the same is asked
// for without waiting, under the same number. If it was granted, that is the answer;
// if it is refused, then so is for ever what waits at the primary, or is still on
// its way there. So whoever asks for the lock next does not meet with a wait of nobody.
func (n *numbering) takeBack(ctx context.Context, o *outcome, lock *fsop.Setlk) (*fsop.Reply, error) {
	o.op = &fsop.Setlk{Ino: lock.Ino, Lock: lock.Lock}
	reply, err := n.next.send(n.c.life, o)
	n.c.numbers.End(o.number, err == nil)
	if err == nil {
		return reply, nil
	}
	return nil, ctx.Err()
}

// effects lists what op made untrue, whose reply was about ino. What a rename
// replaced nobody can tell; it has a name less.
func effects(op fsop.Op, ino fsop.Ino) (all []proto.Effect) {
	for _, p := range fsop.Places(op) {
		all = append(all, proto.Effect{Ino: p.Dir, Name: p.Name})
	}
	if ino != 0 {
		all = append(all, proto.Effect{Ino: ino, Rights: op.Kind() == fsop.KindSetattr})
	}
	return all
}

// inherit goes on with the session of the process before this one.
func (c *Client) inherit(l *estate.Left) {
	c.session, c.opened = cluster.SessionID(l.Session), l.Opened
	c.cfg.Estate.SetSession(l.Session, l.Opened)
	c.heard(cluster.Epoch(l.Epoch))
	if l.Use != 0 {
		c.uses, c.usedAs = []fsop.Ino{fsop.Ino(l.Use)}, c.session
		c.cfg.Estate.SetUse(l.Use)
	}
	if c.windows != nil && len(l.Unsent) > 0 {
		c.windows.lose(l.Unsent)
		c.log.Error("writes are lost that had been acknowledged and not yet been sent when the mount's process ended: fsync and close say so", "files", len(l.Unsent))
	}
	c.numbers.Inherit(l, func(number uint64, a estate.Again) {
		c.wg.Go(func() { c.void(number, a) })
	})
}

// void has the set carry out nothing under a number that the process before this one had
// given to a change which nobody asks for again: that may be under way still. If it
// has been carried out, it was. Else this takes its number, and the window
// that a write under way relies on.
func (c *Client) void(number uint64, a estate.Again) {
	as := cluster.SessionID(a.Session)
	o := &outcome{op: &fsop.CloseWindow{Ino: fsop.Ino(a.Ino), Session: a.Session}, number: number, sent: true, as: as}
	if _, err := (&sending{c}).send(c.life, o); err != nil && !answered(err) && c.life.Err() == nil {
		c.log.Warn("a number that nobody needs", "number", number, "err", err)
	}
	c.numbers.End(number, false)
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
