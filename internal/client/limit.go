package client

import (
	"context"
	"errors"
	"time"

	"mortar/internal/fsop"
)

// limit fails operations with EIO that the volume's io-timeout ends, if it has
// one. Waiting for a lock is not waiting for the set.
type limit struct {
	c    *Client
	next fsop.Handler
}

var errLimit = errors.New("io-timeout")

// Do implements fsop.Handler.
func (l *limit) Do(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
	d := time.Duration(l.c.ioLimit.Load())
	if d <= 0 {
		return l.next.Do(ctx, op)
	}
	if lk, ok := op.(*fsop.Setlk); ok && lk.Wait {
		d += fsop.LockWait
	}
	limited, cancel := context.WithTimeoutCause(ctx, d, errLimit)
	defer cancel()
	reply, err := l.next.Do(limited, op)
	if err != nil && !answered(err) && ctx.Err() == nil && context.Cause(limited) == errLimit {
		l.c.log.Warn("operation given up", "op", op.Kind().String(), "after", d)
		return nil, fsop.EIO
	}
	return reply, err
}
