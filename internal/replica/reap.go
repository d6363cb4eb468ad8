package replica

import (
	"time"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica/core"
)

// reaper is the primary's side of removing unlinked inodes: those that no
// session's client holds any more. Only the homes know what their clients
// hold, so all in-sync bricks are asked, and only when every session of the set
// has been spoken for does an inode go.
type reaper struct {
	next     core.Instant
	round    uint64
	after    fsop.Ino // where the last batch ended; many may be held for long
	inos     []fsop.Ino
	held     map[fsop.Ino]bool
	sessions map[cluster.SessionID]bool
	missing  map[cluster.BrickID]bool
}

const (
	reapEvery = 500 * time.Millisecond
	reapBatch = 1024 // few enough that a change which comes meanwhile does not feel it
)

// tickReap starts a round.
func (l *loop) tickReap() {
	p := &l.reap
	if l.m.Role() != core.Primary || l.now < p.next {
		return
	}
	p.next = l.now + reapEvery
	cfg := l.m.Config()
	p.inos = l.store.Orphans(p.after, reapBatch)
	if len(p.inos) == 0 || !cfg.Writable() {
		p.after = 0
		return
	}
	p.round++
	p.held, p.sessions, p.missing = map[fsop.Ino]bool{}, map[cluster.SessionID]bool{}, map[cluster.BrickID]bool{}
	for _, b := range cfg.InSync {
		if b != l.self {
			p.missing[b] = true
			l.kept.Messages = append(l.kept.Messages, core.Message{
				To: b, Kind: proto.KindReapAsk, Body: &proto.ReapAsk{Epoch: cfg.Epoch, Round: p.round, Inos: p.inos},
			})
		}
	}
	l.reapCount(l.attached(), l.heldOf(p.inos))
}

// heldOf returns which of the inodes this replica's sessions hold, those that
// are detached but not over included.
func (r *Replica) heldOf(inos []fsop.Ino) []fsop.Ino {
	r.sessionsMu.Lock()
	defer r.sessionsMu.Unlock()
	var held []fsop.Ino
	for _, s := range r.sessions {
		s.mu.Lock()
		for _, ino := range inos {
			if s.known[ino] >= oneHold {
				held = append(held, ino)
			}
		}
		s.mu.Unlock()
	}
	return held
}

// reapAsk answers the primary. It comes after all entries that the primary had
// ordered before, so whoever could look the inodes up has been counted.
func (l *loop) reapAsk(from cluster.BrickID, a *proto.ReapAsk) {
	if l.m.Role() != core.Backup || a.Epoch != l.m.Config().Epoch {
		return
	}
	l.kept.Messages = append(l.kept.Messages, core.Message{To: from, Kind: proto.KindReapTell, Body: &proto.ReapTell{
		Epoch: a.Epoch, Round: a.Round, Sessions: l.attached(), Held: l.heldOf(a.Inos),
	}})
}

func (l *loop) reapTell(from cluster.BrickID, t *proto.ReapTell) {
	if t.Epoch != l.m.Config().Epoch || t.Round != l.reap.round || !l.reap.missing[from] {
		return
	}
	delete(l.reap.missing, from)
	l.reapCount(t.Sessions, t.Held)
}

// reapCount adds one brick's answer and reaps when it was the last.
func (l *loop) reapCount(sessions []cluster.SessionID, held []fsop.Ino) {
	p := &l.reap
	for _, s := range sessions {
		p.sessions[s] = true
	}
	for _, ino := range held {
		p.held[ino] = true
	}
	if len(p.missing) > 0 {
		return
	}
	for _, s := range l.store.Sessions() {
		if !s.Away && !p.sessions[s.ID] {
			return // it is between two homes, or about to end
		}
	}
	p.after = 0
	if len(p.inos) == reapBatch {
		p.after = p.inos[reapBatch-1]
		p.next = l.now // there may be more
	}
	free := p.inos[:0]
	for _, ino := range p.inos {
		if !p.held[ino] {
			free = append(free, ino)
		}
	}
	if len(free) == 0 {
		return
	}
	l.order(&request{do: proto.Do{Op: &fsop.Reap{Inos: free}}, done: make(chan proto.DoReply, 1)})
}
