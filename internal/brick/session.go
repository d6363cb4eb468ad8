package brick

import (
	"slices"

	"mortar/internal/brick/meta"
	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// maxReplies bounds the replies that are kept for a session. The oldest are forgotten,
// which nobody asks for again: those that a client may still want are the last
// proto.MaxAhead, and as many waits for locks have room beside them. A forgotten one
// of these is carried out once more.
const maxReplies = 2 * proto.MaxAhead

// session is what the brick has in memory of a session. The rest is in the KV.
type session struct {
	meta.Session
	acked   uint64   // replies below were received
	floor   uint64   // replies below are forgotten
	replies []uint64 // numbers whose replies are kept, ascending
}

// done reports whether the session's request was executed before: known with
// the reply still there, or gone so that nobody can still want it.
func (s *session) done(number uint64, op fsop.Op) (known, gone bool) {
	if _, ok := slices.BinarySearch(s.replies, number); ok {
		return true, false
	}
	if number < s.acked {
		return false, true
	}
	_, lock := op.(*fsop.Setlk)
	return false, number < s.floor && !lock
}

// Answered returns what a session's request was answered, if it was executed and the
// answer is remembered.
func (b *Brick) Answered(id cluster.SessionID, number uint64) (r fsop.Reply, ok bool, err error) {
	b.mu.RLock()
	s := b.sessions[id]
	if s != nil && !s.Away {
		_, ok = slices.BinarySearch(s.replies, number)
	}
	b.mu.RUnlock()
	if !ok {
		return r, false, nil
	}
	kept, ok, err := b.store.Reply(id, number)
	return kept.Reply, ok, err
}

// sessionEdit is what an entry changes in a session's window.
type sessionEdit struct {
	s      *session
	acked  uint64
	number uint64
	forget []uint64 // numbers, a prefix of s.replies
}

// record plans to keep the reply to number and to forget what is acknowledged.
func (s *session) record(number, acked uint64) sessionEdit {
	e := sessionEdit{s: s, acked: max(s.acked, min(acked, number)), number: number}
	i, _ := slices.BinarySearch(s.replies, e.acked)
	if left := len(s.replies) - i; left >= maxReplies {
		i = len(s.replies) - maxReplies + 1
	}
	e.forget = s.replies[:i]
	return e
}

// apply does what record planned.
func (e *sessionEdit) apply() {
	s := e.s
	s.acked = e.acked
	if n := len(e.forget); n > 0 {
		if last := e.forget[n-1]; last >= e.acked {
			s.floor = last + 1
		}
		s.replies = slices.Delete(s.replies, 0, n)
	}
	i, _ := slices.BinarySearch(s.replies, e.number)
	s.replies = slices.Insert(s.replies, i, e.number)
}

// SessionInfo is a session that the set knows.
type SessionInfo struct {
	ID     cluster.SessionID
	Client string // host and mount point, for people
	Owner  string
	Opened int64
	Away   bool
}

func (s *session) info() SessionInfo { return SessionInfo{s.ID, s.Client, s.Owner, s.Opened, s.Away} }

// Sessions returns the sessions, those that are away too, in the order of their ids.
func (b *Brick) Sessions() []SessionInfo {
	b.mu.RLock()
	defer b.mu.RUnlock()
	infos := make([]SessionInfo, 0, len(b.sessions))
	for _, s := range b.sessions {
		infos = append(infos, s.info())
	}
	slices.SortFunc(infos, func(x, y SessionInfo) int {
		if x.ID < y.ID {
			return -1
		}
		return 1
	})
	return infos
}
