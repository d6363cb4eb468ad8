package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	"mortar/internal/client"
	"mortar/internal/estate"
	"mortar/internal/mount"
)

// MountBefore is what a process of a mount has from the one before it.
type MountBefore struct {
	Fuse int // descriptor of /dev/fuse, which is the process's own from then on
	Left *estate.Left
}

// MountServing is a mount that is served and can be handed on.
type MountServing struct {
	m *mount.Mount
	c *client.Client
	e *estate.Estate
}

// adopt makes the mount of the process before this one that of this one.
func adopt(cfg MountConfig, c *client.Client, k *lateKernel, e *estate.Estate) (*mount.Mount, error) {
	o := mountOptions(cfg, c, k, e)
	k.follows.Store(cfg.Mount.CacheTimeout == 0)
	m := mount.New(o)
	k.mount.Store(m)
	if err := m.Adopt(cfg.Before.Fuse, cfg.Dir, cfg.Before.Left); err != nil {
		return nil, err
	}
	return m, nil
}

// Survives reports whether another process can go on with the mount if this one is
// killed: the kernel has to send again what was not answered.
func (s *MountServing) Survives() bool { return s.m.Resends() && s.e.Fd() >= 0 }

// Fuse is the descriptor of /dev/fuse; see mount.Mount.Fuse.
func (s *MountServing) Fuse(beside int) int { return s.m.Fuse(beside) }

// Estate is the descriptor of what this process leaves.
func (s *MountServing) Estate() int { return s.e.Fd() }

// ErrNotNow is returned when a mount cannot give way at this moment, but may at a later one.
var ErrNotNow = errors.New("try again when the volume is well")

// yieldPatience is how long a mount stands still before it gives up giving way.
const yieldPatience = 100 * time.Millisecond

// Yield has leave replace this process by another one, at a moment when all that was acknowledged
// to applications has arrived. If it returns, the mount goes on as if nothing had been asked.
func (s *MountServing) Yield(ctx context.Context, leave func(fuse, estate int) error) error {
	if s.e.Fd() < 0 {
		return errors.New("this mount cannot be handed on to another process: its log says why")
	}
	// What takes long is done while the mount goes on.
	settled, cancel := context.WithTimeout(ctx, time.Second)
	s.c.Settle(settled)
	cancel()
	ctx, cancel = context.WithTimeout(ctx, yieldPatience)
	defer cancel()
	resume, err := s.m.Pause(ctx)
	if err != nil {
		return err
	}
	defer resume()
	if !s.c.Settle(ctx) {
		return fmt.Errorf("writes that were acknowledged do not arrive within %v: %w", yieldPatience, ErrNotNow)
	}
	err = s.m.Yield(ctx, func(fuse int) error {
		// A request that was being served when the patience ended may have been a write.
		return s.c.Still(func() error { return leave(fuse, s.e.Fd()) })
	})
	if errors.Is(err, mount.ErrWaits) || errors.Is(err, client.ErrUnsent) {
		return fmt.Errorf("%w: %w", err, ErrNotNow)
	}
	return err
}
