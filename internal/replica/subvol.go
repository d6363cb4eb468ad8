package replica

import (
	"context"
	"errors"

	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica/core"
)

// ErrNotServing is returned by System when this brick cannot answer now, and another may.
var ErrNotServing = errors.New("the brick is not in sync, or out of touch with its primary")

// System carries out an operation of the system itself, in nobody's session: a change, or a
// question that is answered with what is committed. A change whose error is not
// an fsop.Errno may have been carried out.
func (r *Replica) System(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
	var d proto.DoReply
	if op.Kind().Mutates() {
		d = r.forward(ctx, 0, 0, proto.Do{Op: op})
	} else {
		d = r.look(ctx, op)
	}
	switch {
	case d.Status != proto.OK:
		return nil, ErrNotServing
	case d.Errno != 0:
		return nil, d.Errno
	}
	return &d.Reply, nil
}

// look answers a question from this replica's store, for somebody who caches nothing.
func (r *Replica) look(ctx context.Context, op fsop.Op) proto.DoReply {
	if _, ok := r.serving(ctx); !ok {
		return proto.DoReply{Status: proto.NotServing}
	}
	reply, dep, err := r.store.Read(ctx, op)
	if !r.waitCommit(ctx, dep) {
		return proto.DoReply{Status: proto.NotServing}
	}
	if err != nil {
		return failure(err)
	}
	return proto.DoReply{Reply: *reply}
}

// tickSweep, as primary, removes what removed subvolumes still have, a step at a
// time: the next when the last is on every in-sync brick. Who leads next goes on.
func (l *loop) tickSweep() {
	if cfg := l.m.Config(); l.m.Role() != core.Primary || l.swept > l.m.Acked() || !cfg.Writable() {
		return
	}
	for _, ino := range l.store.Swept(1) {
		l.order(&request{do: proto.Do{Op: &fsop.Sweep{Ino: ino}}, done: make(chan proto.DoReply, 1)})
		l.swept = l.m.Tail().Seq
	}
}
