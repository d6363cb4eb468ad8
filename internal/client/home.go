package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/estate"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/wire"
)

// home is one connection to a daemon. It is born unattached.
type home struct {
	c      *Client
	from   candidate
	as     cluster.SessionID // attached as; set before it is anybody's home
	conn   *wire.Conn
	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup
	invals invals

	inflight atomic.Int64
	goodbye  sync.Once
	serves   bool // it had a brick in sync when it was connected
}

const (
	// pingInterval leaves room for lost and late answers within a lease.
	pingInterval = cluster.Lease / 4
	// silence is how long a home may leave pings unanswered before it is left.
	silence = cluster.Lease * 2 / 3
	// askTimeout bounds dialing and each question before a daemon is home.
	askTimeout = 2 * time.Second
	// sendTimeout bounds the good-bye.
	sendTimeout = 100 * time.Millisecond
)

// newHome makes a home of a network connection, which it owns.
func (c *Client) newHome(from candidate, nc net.Conn) *home {
	h := &home{c: c, from: from}
	h.invals.h = h
	h.ctx, h.cancel = context.WithCancelCause(c.life)
	h.conn = wire.New(nc, wire.Options{Handler: h, Log: c.log})
	h.wg.Go(func() {
		err := h.conn.Run(h.ctx)
		h.cancel(err)
	})
	return h
}

// leave ends the home. Its operations are asked again elsewhere.
func (h *home) leave(why error) {
	h.cancel(why)
	h.conn.Close(why)
}

// close leaves the home and waits for all that was going on there.
func (h *home) close(why error) {
	h.leave(why)
	h.wg.Wait()
}

// Message implements wire.Handler.
func (h *home) Message(_ *wire.Conn, m wire.Message) {
	var err error
	switch m.Kind {
	case proto.KindInval:
		i := new(proto.Inval)
		if err = codec.Decode(m.Body, i); err == nil {
			h.invals.add(i)
		}
	case proto.KindVolumeMap:
		vm := new(proto.VolumeMap)
		if err = codec.Decode(m.Body, vm); err == nil {
			h.c.newMap(vm)
		}
	case proto.KindRecall:
		r := new(proto.Recall)
		if err = codec.Decode(m.Body, r); err == nil && h.c.windows != nil {
			h.c.windows.Recall(r.Ino)
		}
	case proto.KindDetached:
		var d proto.Detached
		if err = codec.Decode(m.Body, &d); err == nil {
			h.sayGoodbye(fmt.Errorf("sent away: %s", d.Text))
		}
	default:
		err = errors.New("unknown kind")
	}
	if err != nil {
		h.conn.Close(fmt.Errorf("%w: kind %d: %w", wire.ErrFrame, m.Kind, err))
	}
}

// sayGoodbye leaves a home that serves the session no longer. What it gave to cache is
// dropped first, and it is told so: it need not wait for the end of the lease.
func (h *home) sayGoodbye(why error) {
	h.goodbye.Do(func() {
		h.c.wg.Go(func() {
			h.c.lapse("the home serves no longer")
			h.tellLapsed()
			h.leave(why)
		})
	})
}

// tellLapsed tells a home that nothing is cached any more of what it gave. If it does not
// hear that, it waits for the end of the lease.
func (h *home) tellLapsed() {
	if h.conn.Send(proto.KindLapsed) == nil {
		ctx, cancel := context.WithTimeout(h.ctx, sendTimeout)
		_ = h.conn.Drain(ctx)
		cancel()
	}
}

// call asks something small.
func (h *home) call(ctx context.Context, kind uint8, q, a codec.Coded) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	body, err := h.conn.Call(ctx, kind, codec.Append(nil, q))
	if err != nil {
		return err
	}
	return codec.Decode(body, a)
}

// holdsPerMessage keeps a message within a frame.
const holdsPerMessage = 32 << 10

// attach makes the daemon's replica the session's home. No operation may be in
// flight, and none is begun meanwhile. All that is cached is dropped.
func (h *home) attach(ctx context.Context, set cluster.SetID) error {
	c := h.c
	c.mu.Lock()
	clear(c.dropped)
	c.mu.Unlock()
	holds := c.cfg.Kernel.Holds()
	if c.windows != nil {
		c.windows.moved(holds)
	}
	for len(holds) > holdsPerMessage {
		if err := h.conn.Send(proto.KindHold, codec.Append(nil, &proto.Forget{Holds: holds[:holdsPerMessage]})); err != nil {
			return err
		}
		holds = holds[holdsPerMessage:]
	}
	// A replica that already was this session's home forgets at once what it gave
	// it to cache, so nothing may be cached any more when it is asked.
	c.leasesFrom(nil, "the session moves")
	ask := &proto.Attach{Version: proto.Version, Set: set, Client: c.cfg.Name, Holds: holds}
	c.mu.Lock()
	c.turn++
	ask.Session, ask.Opened, ask.Turn = c.session, c.opened, c.turn
	c.mu.Unlock()
	var a proto.AttachReply
	if err := h.call(ctx, proto.KindAttach, ask, &a); err != nil {
		return err
	}
	if a.Status == proto.SessionEnded {
		// Nobody knows any more what of it was carried out, so nothing is sent again
		// (see sending); what comes now is another session's.
		c.mu.Lock()
		c.session, c.opened = newSession(), 0
		c.cfg.Estate.SetSession(uint64(c.session), 0)
		c.mu.Unlock()
		c.log.Warn("the session has ended, which was out of touch for too long: its locks are gone, and changes that had no answer fail", "session", ask.Session)
	}
	if a.Status != proto.OK {
		return &refusal{a.Status, a.Text}
	}
	if newest := c.heard(a.Epoch); newest > a.Epoch {
		// What it refuses may be carried out in the epoch that it has not heard of, in which
		// this client has asked (doc/decisions/0042).
		return &refusal{proto.NotServing, fmt.Sprintf("it knows of epoch %d of the set, and this client of %d", a.Epoch, newest)}
	}
	h.as = ask.Session
	c.mu.Lock()
	c.opened = a.Opened
	c.cfg.Estate.SetSession(uint64(ask.Session), a.Opened)
	c.mu.Unlock()
	c.leasesFrom(h, "the session moved")
	return nil
}

// ping renews the lease. false: the replica has none itself.
func (h *home) ping(ctx context.Context) (bool, error) {
	asked := monotonic()
	var p proto.Pong
	if err := h.call(ctx, proto.KindPing, &proto.Ping{Stamp: uint64(asked)}, &p); err != nil {
		return false, err
	}
	if p.Stamp != uint64(asked) {
		return false, fmt.Errorf("answer to another ping: %d, asked %d", p.Stamp, uint64(asked))
	}
	if p.Serving {
		h.c.lease.renew(h, asked, time.Duration(min(p.Lease, uint64(cluster.Lease))))
	}
	return p.Serving, nil
}

// keep renews the lease and tells what was forgotten, until the home is lost or
// left. It returns why.
func (h *home) keep() error {
	tick := time.NewTicker(pingInterval)
	defer tick.Stop()
	heard := monotonic()
	for {
		select {
		case <-h.ctx.Done():
			return context.Cause(h.ctx)
		case <-tick.C:
		}
		h.tellForgotten()
		ctx, cancel := context.WithTimeout(h.ctx, max(silence-(monotonic()-heard), time.Millisecond))
		serving, err := h.ping(ctx)
		cancel()
		now := monotonic()
		switch {
		case err == nil && serving:
			heard = now
		case h.ctx.Err() != nil:
			return context.Cause(h.ctx)
		case now-heard >= silence:
			if err == nil {
				err = errors.New("it is out of touch with its primary")
			}
			return fmt.Errorf("no lease for %v: %w", silence, err)
		}
	}
}

func (h *home) tellForgotten() {
	all := h.c.forgotten()
	for len(all) > 0 {
		n := min(len(all), holdsPerMessage)
		if h.conn.Send(proto.KindForget, codec.Append(nil, &proto.Forget{Holds: all[:n]})) != nil {
			return // the connection ends, and the next home gets what is held
		}
		all = all[n:]
	}
}

// drain waits until no operation is in flight, for a moment at most.
func (h *home) drain(ctx context.Context) {
	for range 100 {
		if h.inflight.Load() == 0 {
			return
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return
		}
	}
}

// closeSession ends the session's locks and its hold on unlinked files.
func (h *home) closeSession() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	a, err := h.c.numbers.Begin(ctx, estate.Change{Session: uint64(h.as)})
	if err == nil {
		_, err = h.do(ctx, &outcome{op: &fsop.CloseSession{Session: uint64(h.as)}, number: a.Number}, h.c.numbers.Acked())
	}
	if err != nil {
		h.c.log.Debug("closing the session", "err", err)
	}
}

// refusal is a daemon's no.
type refusal struct {
	status proto.Status
	text   string
}

func (r *refusal) Error() string {
	if r.text == "" {
		return statusText(r.status)
	}
	return r.text
}
