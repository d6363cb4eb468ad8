package cluster

import (
	"slices"
	"time"
)

// The times of the replication protocol (doc/replication.md). They are
// constants: a set whose members disagree about a lease is not safe.
const (
	// Heartbeat is the longest silence of a healthy primary towards a backup.
	Heartbeat = 250 * time.Millisecond
	// Lease is how long a grant allows its holder to serve reads (bricks) or to
	// answer from its caches (sessions), from the moment it was asked for.
	Lease = 1500 * time.Millisecond
	// LeaseGuard is how long a grantor waits before it acts as if the lease were
	// over: the lease and 1 % of clock drift.
	LeaseGuard = Lease + Lease/100
	// Suspicion is the silence after which a backup reports its primary, and a
	// primary its backup, to the control plane.
	Suspicion = 700 * time.Millisecond
	// SessionTimeout is how long a session may be silent before its locks are
	// released and its unlinked files are let go.
	SessionTimeout = 10 * time.Second
)

// Outwait is for how long whoever gave a lease, that runs from now or earlier,
// must regard it as held: LeaseGuard for a whole Lease.
func Outwait(lease time.Duration) time.Duration { return lease + lease/100 }

// SetConfig is the configuration of one replica set, as the control plane
// decided it. Only the control plane makes new ones, each with a higher epoch.
type SetConfig struct {
	Set     SetID     `json:"set"`
	Epoch   Epoch     `json:"epoch"`
	Primary BrickID   `json:"primary"` // zero: no member could lead; the set waits
	Members []BrickID `json:"members"` // all bricks of the set, in the order given by the user
	InSync  []BrickID `json:"in_sync"` // subset of Members; Primary is one of them
	// MinInSync is the smallest in-sync set that takes writes. With fewer the
	// set is read-only.
	MinInSync int `json:"min_in_sync"`
	// Floor is the highest position that the control plane knew to be durable
	// on the in-sync set when it made this configuration. A brick whose log ends
	// below it after an unclean stop cannot lead (KIP-966).
	Floor Pos `json:"floor"`
	// Chosen is the newest epoch whose primary the control plane has chosen, alone in sync,
	// although it may lack something: no better was left. In that epoch, and only
	// in that one, the primary may lead without being certain that it has everything.
	Chosen Epoch `json:"chosen,omitempty"`
	// Doubted is set, without a Primary, when the pool was recovered by hand from
	// a copy that may be old: bricks that are in sync here may since have been
	// left behind, so any member may have what the others lack.
	Doubted bool `json:"doubted,omitempty"`
	// Drained are the members on drained peers. They leave the in-sync set, as soon as
	// it is large enough without them, and do not come into it.
	Drained []BrickID `json:"drained,omitempty"`
}

// IsInSync reports whether b is in the in-sync set.
func (c *SetConfig) IsInSync(b BrickID) bool { return slices.Contains(c.InSync, b) }

// IsMember reports whether b belongs to the set.
func (c *SetConfig) IsMember(b BrickID) bool { return slices.Contains(c.Members, b) }

// IsDrained reports whether b is on a drained peer.
func (c *SetConfig) IsDrained(b BrickID) bool { return slices.Contains(c.Drained, b) }

// Spares reports how many bricks of the in-sync set it can do without.
func (c *SetConfig) Spares() int { return len(c.InSync) - max(c.MinInSync, 1) }

// Writable reports whether the in-sync set is large enough to take writes.
func (c *SetConfig) Writable() bool {
	return !c.Primary.IsZero() && len(c.InSync) >= c.MinInSync
}

// Clone returns a copy that shares nothing with c.
func (c SetConfig) Clone() SetConfig {
	c.Members = slices.Clone(c.Members)
	c.InSync = slices.Clone(c.InSync)
	c.Drained = slices.Clone(c.Drained)
	return c
}

// Tick is how often what has to be done again and again is looked at, and UntilTick how
// long it is until the next one. All that ticks in a process, and on machines with right
// clocks in a pool, does so at the same moments: an idle process wakes up once for it all.
const Tick = 100 * time.Millisecond

// UntilTick returns how long it is from now to the next tick, a quarter of one at least: a
// timer that was a moment early does not tick twice.
func UntilTick(now time.Time) time.Duration {
	d := Tick - time.Duration(now.UnixNano())%Tick
	if d < Tick/4 {
		d += Tick
	}
	return d
}
