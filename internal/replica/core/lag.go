package core

// Lag finds the brick that holds up those who sync: the oldest sync waits for it, and another has done its part.
type Lag struct {
	began Instant // the epoch
	seq   uint64  // what the oldest sync wants flushed
	came  Instant // when it came
	since Instant // when it begins to count; 0: no brick is done
	told  BrickID
}

// Begin begins an epoch. What bricks did in another says nothing.
func (l *Lag) Begin(now Instant) { *l = Lag{began: now} }

// None tells the machine that no sync waits.
func (l *Lag) None(m *Machine) { l.tell(m, BrickID{}) }

// Look tells the machine which brick the oldest sync waits for, if another is done: of this one first,
// since to hand over takes longer than to drop a backup. Three times as long as the first took in this epoch is nothing
// to speak of: disks that are all busy do not end together, and may be one. seq is what the sync wants
// flushed, came when it came, and durable up to where a brick has flushed. It returns the brick and since
// when it counts as one that lags, or no brick.
func (l *Lag) Look(m *Machine, now Instant, seq uint64, came Instant, durable func(BrickID) uint64) (behind BrickID, since Instant) {
	if l.seq != seq || l.came != came {
		l.seq, l.came, l.since = seq, came, 0
	}
	done := 0
	for _, b := range m.Counting() { // this one is the last
		if durable(b) >= seq {
			done++
		} else if b == m.self || behind.IsZero() {
			behind = b
		}
	}
	if done == 0 {
		behind = BrickID{}
	} else if l.since == 0 {
		l.since = now + 2*(now-max(came, l.began))
	}
	l.tell(m, behind)
	return behind, l.since
}

func (l *Lag) tell(m *Machine, behind BrickID) {
	if l.told != behind && !l.told.IsZero() {
		m.Lags(l.told, 0)
	}
	if l.told = behind; !behind.IsZero() {
		m.Lags(behind, l.since)
	}
}
