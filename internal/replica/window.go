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
// session holds one, every replica shows the file, or the directory and its
// names, to nobody else, and the primary orders nobody else's changes of it; both
// first have the holder send what it has. The primary asks for it, again and
// again, through whichever replica is the holder's home.
//
// A holder that is out of touch has lost the right to have acknowledged what it
// did not send: when its lease is certainly over, the primary closes the window
// itself. One whose home says that it is alive gets more time, for it may have
// much to send over a slow network or to a busy disk, and what it cannot send
// any more is an error in some application.

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
	alive  core.Instant // when the holder's home last said that it is
	asked  core.Instant
}

const (
	// recallRetry is after how long a holder is asked again; it may have found a new home.
	recallRetry = 200 * time.Millisecond
	// recallLimit is how long a holder that is alive may take.
	recallLimit = cluster.SessionTimeout
)

// over reports whether the holder has no right to the window any more.
func (c *recall) over(now core.Instant) bool {
	return now >= max(c.since, c.alive)+cluster.LeaseGuard || now >= c.since+recallLimit
}

// parkWindow keeps a request for what another session holds the window of.
func (l *loop) parkWindow(q *request) bool {
	if q.session == 0 || q.do.Op.Kind() == fsop.KindMake { // Make is its holder's or is refused
		return false
	}
	gone := l.victims(q.do.Op)
	for i, ino := range append(gone, l.touches(q.do.Op)...) {
		holder := l.holder(l.ctx, ino)
		// The holder itself does not know which directory its own request removes: the
		// name may lead to another one by now. In that it goes on to tell of files.
		if holder == 0 || holder == q.session && i >= len(gone) {
			continue
		}
		if q.since == 0 {
			q.since = l.now
		}
		l.parked[ino] = append(l.parked[ino], q)
		l.recall(ino, holder)
		return true
	}
	return false
}

// touches lists the files whose contents or attributes an ordered operation sees
// or changes, and the directories whose names it does.
func (l *loop) touches(op fsop.Op) []fsop.Ino {
	switch op := op.(type) {
	case *fsop.Write:
		return []fsop.Ino{op.Ino}
	case *fsop.Setattr:
		return []fsop.Ino{op.Ino}
	case *fsop.Setxattr:
		return []fsop.Ino{op.Ino}
	case *fsop.Removexattr:
		return []fsop.Ino{op.Ino}
	case *fsop.Fallocate:
		return []fsop.Ino{op.Ino}
	case *fsop.Fsync:
		return []fsop.Ino{op.Ino}
	case *fsop.Setlk:
		if op.Lock.Type != fsop.LockUnlock {
			return []fsop.Ino{op.Ino} // who locks a file is about to look at it
		}
	case *fsop.Link:
		return []fsop.Ino{op.Parent, op.Ino}
	case *fsop.Rename:
		inos := directories(op)
		if op.Flags&fsop.RenameExchange != 0 {
			inos = append(inos, l.child(op.Parent, op.Name)...)
			inos = append(inos, l.child(op.NewParent, op.NewName)...)
		}
		return inos
	}
	return directories(op)
}

// directories lists those whose names op looks at or changes.
func directories(op fsop.Op) (inos []fsop.Ino) {
	for _, p := range fsop.Places(op) {
		inos = append(inos, p.Dir)
	}
	return inos
}

// victims lists the directory that op removes if it is empty. Whether it is, its
// window's holder knows.
func (l *loop) victims(op fsop.Op) []fsop.Ino {
	switch op := op.(type) {
	case *fsop.Rmdir:
		return l.child(op.Parent, op.Name)
	case *fsop.Rename:
		if op.Flags&fsop.RenameExchange == 0 {
			return l.child(op.NewParent, op.NewName)
		}
	}
	return nil
}

// child finds a directory that may have names which its window's holder has not sent.
func (l *loop) child(dir fsop.Ino, name string) []fsop.Ino {
	reply, _, err := l.store.Read(l.ctx, &fsop.Lookup{Parent: dir, Name: name})
	if err != nil || !reply.Attr.IsDir() {
		return nil
	}
	return []fsop.Ino{reply.Attr.Ino}
}

// holder returns the session that holds the window of an inode, or 0.
func (r *Replica) holder(ctx context.Context, ino fsop.Ino) cluster.SessionID {
	reply, _, err := r.store.Read(ctx, &fsop.Getattr{Ino: ino})
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
		// A holder that nobody has heard of for the time of a lease needs not be asked. Its lease is
		// over: a home's clients have none after the home's own, which ends a lease after it last
		// told of them. It may be on its way back, perhaps this very moment; what it was out of touch for is lost.
		if at, ok := l.seen[holder]; ok && l.now >= at+cluster.LeaseGuard && !l.stoodStill() {
			c.since = at
			l.mail.post(func(l *loop) { l.closeOver(ino, c) })
			return
		}
		l.tellRecall(ino, c)
	}
}

// tellRecall tells the holder, wherever its home is.
func (l *loop) tellRecall(ino fsop.Ino, c *recall) {
	c.asked = l.now
	cfg := l.m.Config()
	if l.recallHere(ino, c.holder) {
		c.alive = l.now
	}
	for _, b := range cfg.InSync {
		if b != l.self {
			l.kept.Messages = append(l.kept.Messages, core.Message{
				To: b, Kind: proto.KindRecallAll, Body: &proto.RecallAll{Epoch: cfg.Epoch, Ino: ino, Session: c.holder},
			})
		}
	}
}

// recallHere tells the holder if this replica is its home, and reports whether
// it is and the holder is alive.
func (r *Replica) recallHere(ino fsop.Ino, holder cluster.SessionID) bool {
	r.sessionsMu.Lock()
	s := r.sessions[holder]
	r.sessionsMu.Unlock()
	if s == nil {
		return false
	}
	if sink, ok := s.sink.(Recaller); ok {
		_ = sink.Recall(&proto.Recall{Ino: ino}) // if it cannot be sent, it will be again
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.gone && r.now() < s.leaseEnd
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
		if h := l.holder(l.ctx, ino); h != 0 {
			l.recall(ino, h)
		}
	case core.Backup:
		l.kept.Messages = append(l.kept.Messages, core.Message{
			To: cfg.Primary, Kind: proto.KindRecallAsk, Body: &proto.RecallAsk{Epoch: cfg.Epoch, Ino: ino},
		})
	}
}

func (l *loop) recallAll(from cluster.BrickID, m *proto.RecallAll) {
	if m.Epoch == l.m.Config().Epoch && from == l.m.Config().Primary && l.recallHere(m.Ino, m.Session) {
		l.kept.Messages = append(l.kept.Messages, core.Message{
			To: from, Kind: proto.KindRecalling, Body: &proto.Recalling{Epoch: m.Epoch, Ino: m.Ino, Session: m.Session},
		})
	}
}

// recalling takes a home's word that a holder is alive and was told.
func (l *loop) recalling(m *proto.Recalling) {
	if c := l.recalls[m.Ino]; c != nil && c.holder == m.Session && m.Epoch == l.m.Config().Epoch {
		c.alive = l.now
	}
}

// tickRecalls asks again, and closes what its holder does not.
func (l *loop) tickRecalls() {
	for ino, c := range l.recalls {
		if !l.closeOver(ino, c) && l.now >= c.asked+recallRetry {
			l.tellRecall(ino, c)
		}
	}
}

// closeOver closes a window that its holder has no right to any more.
func (l *loop) closeOver(ino fsop.Ino, c *recall) bool {
	if l.recalls[ino] != c || !c.over(l.now) {
		return false
	}
	delete(l.recalls, ino)
	l.log.Warn("a session did not give a window back and has lost it", "session", c.holder, "inode", ino)
	l.order(&request{
		do:   proto.Do{Op: &fsop.CloseWindow{Ino: ino, Session: uint64(c.holder)}},
		done: make(chan proto.DoReply, 1),
	})
	return true
}

// closedTo lists what the answer to op shows and whose window another session holds.
func (s *Session) closedTo(op fsop.Op, reply *fsop.Reply, err error) (shut []fsop.Ino) {
	if err != nil {
		return nil
	}
	see := func(a *fsop.Attr) {
		if a.Window != 0 && a.Window != uint64(s.id) {
			shut = append(shut, a.Ino)
		}
	}
	switch op := op.(type) {
	case *fsop.Read, *fsop.Lookup, *fsop.Getattr, *fsop.Seek:
		see(&reply.Attr)
	case *fsop.Readdir:
		see(&reply.Attr)
		for i := range reply.Entries {
			if op.Plus {
				see(&reply.Entries[i].Attr)
			}
		}
	}
	return shut
}

// waitWindows has windows closed and waits until closed, which was current before
// the caller looked, tells that some window was; the caller looks again.
func (r *Replica) waitWindows(ctx context.Context, inos []fsop.Ino, closed chan struct{}) bool {
	r.mail.post(func(l *loop) {
		for _, ino := range inos {
			l.wantClosed(ino)
		}
	})
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
