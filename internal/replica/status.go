package replica

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/proto"
	"mortar/internal/replica/core"
)

// Status is what people may want to know of a replica.
type Status struct {
	Config  cluster.SetConfig
	Role    core.Role
	Serving bool // reads are answered
	Whole   bool // the brick's contents are known
	Tail    cluster.Pos
	Commit  uint64
	Changed int64        // time of the last change in the log, in nanoseconds since 1970; 0: none
	Peers   []core.Peer  // as primary: the other bricks
	Healing bool         // a comparison is under way on this brick
	Heal    HealProgress // of the last comparison
}

// Status returns the replica's state.
func (r *Replica) Status(ctx context.Context) (Status, error) {
	return ask(ctx, r, func(l *loop) Status {
		_, serving := l.m.Serving(l.now)
		s := Status{
			Config: l.m.Config(), Role: l.m.Role(), Serving: serving, Whole: l.m.Whole(),
			Tail: l.m.Tail(), Commit: l.m.Commit(), Peers: l.m.Peers(), Healing: l.healing != nil,
			Changed: l.store.LastTime(),
		}
		if p := l.healed.Load(); p != nil {
			s.Heal = *p
		}
		return s
	})
}

// Drain hands over what this brick does in its set, so that its end stalls nobody:
// it sends its clients elsewhere, gives up its lease, says so, and has the control
// plane make a configuration without it.
func (r *Replica) Drain(ctx context.Context) error {
	return r.leave(ctx, func(*cluster.SetConfig) bool { return true })
}

// leave is Drain as long as it is wanted.
func (r *Replica) leave(ctx context.Context, wanted func(*cluster.SetConfig) bool) error {
	type step struct {
		next  *cluster.SetConfig
		again bool
	}
	for {
		s, err := ask(ctx, r, func(l *loop) (s step) {
			if cfg := l.m.Config(); !wanted(&cfg) {
				l.stay()
				return s
			}
			s.next, s.again = l.m.Leave(l.now, l.cached())
			l.leaving.Store(l.m.Leaving())
			if s.again {
				l.detachAll("the brick hands over what it does")
			}
			return s
		})
		switch {
		case err != nil:
			r.mail.post((*loop).stay)
			return err
		case s.next != nil:
			return r.control.Propose(ctx, *s.next)
		case !s.again:
			return nil
		}
		// The clients' word or entries are still on their way.
		select {
		case <-time.After(2 * time.Millisecond):
		case <-ctx.Done():
			r.mail.post((*loop).stay)
			return context.Cause(ctx)
		}
	}
}

// stay has this brick go on with what it was handing over.
func (l *loop) stay() {
	l.m.Stay()
	l.leaving.Store(l.m.Leaving())
}

// Verify has every in-sync brick compute the digest of its state at one
// position. Changes wait until all have answered.
func (r *Replica) Verify(ctx context.Context) (map[cluster.BrickID]proto.DigestReply, error) {
	cfg, err := r.freeze(ctx)
	defer r.mail.post(func(l *loop) { l.thaw() })
	if err != nil {
		return nil, err
	}
	at, err := ask(ctx, r, func(l *loop) uint64 { return l.m.Tail().Seq })
	if err != nil {
		return nil, err
	}
	var (
		mu  sync.Mutex
		all = map[cluster.BrickID]proto.DigestReply{}
		wg  sync.WaitGroup
	)
	for _, b := range cfg.InSync {
		wg.Go(func() {
			d := r.digestOf(ctx, b, proto.Digest{Epoch: cfg.Epoch, At: at})
			mu.Lock()
			all[b] = d
			mu.Unlock()
		})
	}
	wg.Wait()
	return all, nil
}

// freeze makes requests wait, and returns when everything ordered so far is acknowledged.
func (r *Replica) freeze(ctx context.Context) (cluster.SetConfig, error) {
	type state struct {
		cfg cluster.SetConfig
		ok  bool
	}
	for {
		s, err := ask(ctx, r, func(l *loop) state {
			if l.m.Role() != core.Primary {
				return state{}
			}
			l.frozen = true
			return state{l.m.Config(), l.m.Acked() == l.m.Tail().Seq}
		})
		if err != nil {
			return s.cfg, err
		}
		if s.cfg.Epoch == 0 {
			return s.cfg, errors.New("this brick is not the primary of its set")
		}
		if s.ok {
			return s.cfg, nil
		}
		select {
		case <-time.After(2 * time.Millisecond):
		case <-ctx.Done():
			return s.cfg, fmt.Errorf("the set does not come to rest: %w", context.Cause(ctx))
		}
	}
}

func (l *loop) thaw() {
	l.frozen = false
	for _, q := range l.iced {
		l.order(q)
	}
	l.iced = nil
}

func (r *Replica) digestOf(ctx context.Context, b cluster.BrickID, d proto.Digest) proto.DigestReply {
	if b == r.self {
		return r.digestAt(ctx, d)
	}
	var reply proto.DigestReply
	body, err := r.transport.Call(ctx, b, proto.KindDigest, r.envelope(b), codec.Append(nil, &d))
	if err == nil {
		err = codec.Decode(body, &reply)
	}
	if err != nil {
		return proto.DigestReply{Status: proto.NotServing, Text: err.Error()}
	}
	return reply
}

// digestAt computes this brick's digest, which must be at the position asked for.
func (r *Replica) digestAt(ctx context.Context, d proto.Digest) proto.DigestReply {
	sum, err := r.store.Digest(ctx)
	switch {
	case err != nil:
		return proto.DigestReply{Status: proto.NotServing, Text: err.Error()}
	case sum.Pos.Seq != d.At:
		return proto.DigestReply{Status: proto.NotServing, At: sum.Pos,
			Text: fmt.Sprintf("this brick is at %v, not at %d", sum.Pos, d.At)}
	}
	return proto.DigestReply{At: sum.Pos, Sum: sum.Sum, Inodes: sum.Inodes, Bytes: sum.Bytes}
}
