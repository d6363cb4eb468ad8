package replica

import (
	"context"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica/core"
)

// Windows (fsop.Window) are replicated state, kept with the inode. While a
// session holds one, every replica shows the file to nobody else, and the
// primary orders nobody else's changes of it; both first have the holder send
// what it has. The primary asks for it, again and again, through whichever
// replica is the holder's home, and closes the window itself when the holder's
// lease is certainly over: a holder that is out of touch has lost the right to
// have acknowledged what it did not send.

// Recaller is implemented by Sinks whose client may hold windows.
type Recaller interface {
	// Recall tells the client to send what it has of the file and to close the
	// window. It queues and never blocks.
	Recall(m *proto.Recall) error
}

// recall is a window that somebody waits to be closed.
type recall struct {
	holder cluster.SessionID
	since  core.Instant
	asked  core.Instant
}

// recallRetry is after how long a holder is asked again; it may have found a new home.
const recallRetry = 200 * time.Millisecond

// parkWindow keeps a request for a file whose window another session holds.
func (l *loop) parkWindow(q *request) bool {
	ino := touches(q.do.Op)
	if ino == 0 || q.session == 0 {
		return false
	}
	holder := l.holder(ino)
	if holder == 0 || holder == q.session {
		return false
	}
	if q.since == 0 {
		q.since = l.now
	}
	l.parked[ino] = append(l.parked[ino], q)
	l.recall(ino, holder)
	return true
}

// touches returns the file whose contents or attributes an ordered operation
// sees or changes, or 0.
func touches(op fsop.Op) fsop.Ino {
	switch op := op.(type) {
	case *fsop.Write:
		return op.Ino
	case *fsop.Setattr:
		return op.Ino
	case *fsop.Fallocate:
		return op.Ino
	case *fsop.Fsync:
		return op.Ino
	case *fsop.Link:
		return op.Ino
	case *fsop.Setlk:
		if op.Lock.Type != fsop.LockUnlock {
			return op.Ino // who locks a file is about to look at it
		}
	}
	return 0
}

// holder returns the session that holds the window of a file, or 0.
func (l *loop) holder(ino fsop.Ino) cluster.SessionID {
	reply, _, err := l.store.Read(l.ctx, &fsop.Getattr{Ino: ino})
	if err != nil {
		return 0
	}
	return cluster.SessionID(reply.Attr.Window)
}

// recall has the holder of a window close it.
func (l *loop) recall(ino fsop.Ino, holder cluster.SessionID) {
	c := l.recalls[ino]
	if c == nil || c.holder != holder {
		c = &recall{holder: holder, since: l.now}
		l.recalls[ino] = c
		l.tellRecall(ino, c)
	}
}

// tellRecall tells the holder, wherever its home is.
func (l *loop) tellRecall(ino fsop.Ino, c *recall) {
	c.asked = l.now
	cfg := l.m.Config()
	l.recallHere(ino, c.holder)
	for _, b := range cfg.InSync {
		if b != l.self {
			l.kept.Messages = append(l.kept.Messages, core.Message{
				To: b, Kind: proto.KindRecallAll, Body: &proto.RecallAll{Epoch: cfg.Epoch, Ino: ino, Session: c.holder},
			})
		}
	}
}

// recallHere tells the holder if this replica is its home.
func (r *Replica) recallHere(ino fsop.Ino, holder cluster.SessionID) {
	r.sessionsMu.Lock()
	s := r.sessions[holder]
	r.sessionsMu.Unlock()
	if s == nil {
		return
	}
	if sink, ok := s.sink.(Recaller); ok {
		_ = sink.Recall(&proto.Recall{Ino: ino}) // if it cannot be sent, it will be again
	}
}

// recallAsk takes a backup's wish that a window be closed.
func (l *loop) recallAsk(m *proto.RecallAsk) {
	if l.m.Role() == core.Primary && m.Epoch == l.m.Config().Epoch {
		l.wantClosed(m.Ino)
	}
}

// wantClosed has a window closed, through the primary.
func (l *loop) wantClosed(ino fsop.Ino) {
	cfg := l.m.Config()
	switch l.m.Role() {
	case core.Primary:
		if h := l.holder(ino); h != 0 {
			l.recall(ino, h)
		}
	case core.Backup:
		l.kept.Messages = append(l.kept.Messages, core.Message{
			To: cfg.Primary, Kind: proto.KindRecallAsk, Body: &proto.RecallAsk{Epoch: cfg.Epoch, Ino: ino},
		})
	}
}

func (l *loop) recallAll(from cluster.BrickID, m *proto.RecallAll) {
	if m.Epoch == l.m.Config().Epoch && from == l.m.Config().Primary {
		l.recallHere(m.Ino, m.Session)
	}
}

// tickRecalls asks again, and closes what its holder does not.
func (l *loop) tickRecalls() {
	for ino, c := range l.recalls {
		switch {
		case l.now >= c.since+cluster.LeaseGuard:
			delete(l.recalls, ino)
			l.log.Warn("a session did not give a file's window back and has lost it", "session", c.holder, "inode", ino)
			l.order(&request{
				do:   proto.Do{Op: &fsop.CloseWindow{Ino: ino, Session: uint64(c.holder)}},
				done: make(chan proto.DoReply, 1),
			})
		case l.now >= c.asked+recallRetry:
			l.tellRecall(ino, c)
		}
	}
}

// closedTo returns a file that the answer to op shows and whose window another
// session holds, or 0.
func (s *Session) closedTo(op fsop.Op, reply *fsop.Reply, err error) fsop.Ino {
	if err != nil {
		return 0
	}
	other := func(a *fsop.Attr) bool { return a.Window != 0 && a.Window != uint64(s.id) }
	switch op := op.(type) {
	case *fsop.Read, *fsop.Lookup, *fsop.Getattr, *fsop.Seek:
		if other(&reply.Attr) {
			return reply.Attr.Ino
		}
	case *fsop.Readdir:
		for i := range reply.Entries {
			if op.Plus && other(&reply.Entries[i].Attr) {
				return reply.Entries[i].Ino
			}
		}
	}
	return 0
}

// waitWindow has the window of a file closed and waits until closed, which was
// current before the caller looked, tells that some window was; the caller looks again.
func (r *Replica) waitWindow(ctx context.Context, ino fsop.Ino, closed chan struct{}) bool {
	r.mail.post(func(l *loop) { l.wantClosed(ino) })
	t := time.NewTimer(recallRetry)
	defer t.Stop()
	select {
	case <-closed:
	case <-t.C: // the question may have been lost with its primary
	case <-ctx.Done():
		return false
	case <-r.done:
		return false
	}
	return true
}
