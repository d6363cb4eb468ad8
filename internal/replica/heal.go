package replica

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/proto"
	"mortar/internal/replica/core"
)

// openSource is a snapshot that a backup compares itself with.
type openSource struct {
	src  Source
	from cluster.BrickID
	used time.Time
	mu   sync.Mutex
}

// sourceIdle is how long a snapshot is kept for a backup that does not use it.
const sourceIdle = time.Minute

// openSource takes a snapshot for a backup. An older one for it is closed.
func (l *loop) openSource(from cluster.BrickID, h proto.HealOpen) proto.HealOpenReply {
	if l.m.Role() != core.Primary || h.Epoch != l.m.Config().Epoch {
		return proto.HealOpenReply{Status: proto.NotServing, Text: "this brick is not the primary of that epoch"}
	}
	for id, o := range l.sources {
		if o.from == from || time.Since(o.used) > sourceIdle {
			l.closeSource(id)
		}
	}
	src, err := l.store.Source()
	if err != nil {
		return proto.HealOpenReply{Status: proto.NotServing, Text: err.Error()}
	}
	l.nextSrc++
	o := &openSource{src: src, from: from, used: time.Now()}
	l.sources[l.nextSrc] = o
	l.sourcesMu.Lock()
	l.served[l.nextSrc] = o
	l.sourcesMu.Unlock()
	return proto.HealOpenReply{Handle: l.nextSrc, Pos: src.Pos()}
}

func (l *loop) closeSource(id uint64) {
	o := l.sources[id]
	delete(l.sources, id)
	l.sourcesMu.Lock()
	delete(l.served, id)
	l.sourcesMu.Unlock()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.src.Close()
	o.src = nil
}

// serveHeal answers one question of a comparison.
func (r *Replica) serveHeal(ctx context.Context, body []byte) ([]byte, error) {
	if len(body) < 8 {
		return nil, fmt.Errorf("a heal request of %d bytes", len(body))
	}
	r.sourcesMu.Lock()
	o := r.served[binary.LittleEndian.Uint64(body)]
	r.sourcesMu.Unlock()
	if o == nil {
		return nil, fmt.Errorf("the snapshot is no longer kept")
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.src == nil {
		return nil, fmt.Errorf("the snapshot is no longer kept")
	}
	o.used = time.Now()
	return o.src.Serve(ctx, body[8:])
}

// heal compares this brick with its primary's, in the background, until both
// are the same or the configuration changes.
func (l *loop) heal() {
	if l.healing != nil {
		return
	}
	ctx, cancel := context.WithCancel(l.ctx)
	l.healing = cancel
	cfg := l.m.Config()
	l.bg.Go(func() error {
		began := time.Now()
		pos, err := l.compare(ctx, cfg)
		cancel()
		if err != nil && l.ctx.Err() == nil {
			l.log.Warn("comparing with the primary", "err", err)
			select { // what is the matter may need a moment
			case <-time.After(healPause):
			case <-l.ctx.Done():
			}
		}
		l.mail.post(func(l *loop) {
			l.healing = nil
			if err == nil {
				l.log.Info("this brick equals its primary's", "at", pos, "took", time.Since(began))
				l.m.Healed(pos, l.store.History())
				l.outwaitSessions()
			} else {
				l.m.SayWhere() // the primary orders the next attempt
			}
		})
		return nil
	})
}

// healPause is between a comparison that failed and the next.
const healPause = 200 * time.Millisecond

func (l *loop) compare(ctx context.Context, cfg cluster.SetConfig) (cluster.Pos, error) {
	to := l.envelope(cfg.Primary)
	body, err := l.transport.Call(ctx, cfg.Primary, proto.KindHealOpen, to, codec.Append(nil, &proto.HealOpen{Epoch: cfg.Epoch}))
	if err != nil {
		return cluster.Pos{}, err
	}
	var open proto.HealOpenReply
	if err := codec.Decode(body, &open); err != nil {
		return cluster.Pos{}, err
	}
	if open.Status != proto.OK {
		return cluster.Pos{}, fmt.Errorf("the primary gave no snapshot: %s", open.Text)
	}
	handle := binary.LittleEndian.AppendUint64(nil, open.Handle)
	call := func(ctx context.Context, request []byte) ([]byte, error) {
		return l.transport.Call(ctx, cfg.Primary, proto.KindHeal, to, handle, request)
	}
	err = l.store.Heal(ctx, open.Pos, call, func(p HealProgress) { l.healed.Store(&p) })
	return open.Pos, err
}
