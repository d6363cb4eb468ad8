package client

import (
	"sync"

	"mortar/internal/codec"
	"mortar/internal/proto"
)

// invals carries out what the home takes back from caches. Each Inval is
// acknowledged under its own Seq when the kernel has done it, so their order
// among each other does not matter: the Kernel keeps the highest Seq per inode.
// They run beside each other because one may have to wait, for a lock in the
// kernel, for an operation whose answer depends on another being acknowledged.
type invals struct {
	h       *home
	mu      sync.Mutex
	queue   []*proto.Inval
	workers int
}

// invalWorkers bounds the goroutines at work for one home.
const invalWorkers = 64

// add takes an Inval from the read loop.
func (v *invals) add(i *proto.Inval) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.queue = append(v.queue, i)
	if v.workers < invalWorkers {
		v.workers++
		v.h.wg.Go(v.run)
	}
}

func (v *invals) run() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for len(v.queue) > 0 && v.h.ctx.Err() == nil {
		i := v.queue[0]
		v.queue = v.queue[1:]
		v.mu.Unlock()
		v.carryOut(i)
		v.mu.Lock()
	}
	if len(v.queue) == 0 {
		v.queue = nil
	}
	v.workers--
}

func (v *invals) carryOut(i *proto.Inval) {
	h := v.h
	if err := h.c.cfg.Kernel.Invalidate(h.ctx, i.Seq, i.Effects); err != nil {
		// Not acknowledged: the home waits for the end of the lease, and so does
		// this side, with the same result.
		if h.ctx.Err() == nil {
			h.c.log.Warn("invalidation failed", "seq", i.Seq, "err", err)
		}
		return
	}
	h.conn.Send(proto.KindInvalAck, codec.Append(nil, &proto.InvalAck{Seq: i.Seq}))
}
