package replica

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica/core"
)

// Sink is the way to a session's client. Its methods queue and never block.
type Sink interface {
	Invalidate(m *proto.Inval) error
	Detached(text string)
}

// Session is one client session whose home is this replica.
//
// The replica remembers what the session's client may have cached, and before
// it acknowledges a change it takes that back and waits for the client's
// word, no longer than the client's cache lease.
type Session struct {
	r      *Replica
	id     cluster.SessionID
	client string
	turn   uint64 // of its Attach
	sink   Sink

	mu sync.Mutex
	// known says of each inode how often the client was given it (proto.Hold)
	// and what it may have cached of it.
	known map[fsop.Ino]interest
	// leaseEnd is when the client's caches are certainly dropped: when the longest
	// lease that a Pong gave is over, by any clock.
	leaseEnd core.Instant
	pinged   core.Instant         // when the client was last heard of
	waits    map[uint64]*clearing // by the Seq of the Inval that was sent
	gone     bool                 // detached: no more requests; kept until leaseEnd
	lapsed   bool                 // the lease ran out: nothing is cached, nothing is given to cache before a new Ping
}

// interest packs the count of proto.Hold above two bits.
type interest uint64

const (
	cachesAttr  interest = 1 << iota // attributes and contents
	cachesNames                      // names in the directory, also that they do not exist
	oneHold
)

// clearing is an entry whose effects some sessions have not yet confirmed.
type clearing struct {
	seq   uint64
	waits atomic.Int32
}

// ID is the session's.
func (s *Session) ID() cluster.SessionID { return s.id }

// Attach makes this replica the home of a session. What the session had here
// before is replaced: its client has dropped its caches before it asked. If it had
// given that up since, and asked again, and that came first, it is refused. owner is
// the key that the client proved to have; a session is its owner's alone.
func (r *Replica) Attach(ctx context.Context, owner string, a *proto.Attach, sink Sink) (*Session, proto.AttachReply) {
	refuse := func(s proto.Status, text string) (*Session, proto.AttachReply) {
		return nil, proto.AttachReply{Status: s, Text: text}
	}
	if a.Session == 0 {
		return refuse(proto.Refused, "session 0 is the system's own")
	}
	if r.leaving.Load() {
		return refuse(proto.NotServing, "this brick hands over what it does")
	}
	v, ok := r.serving(ctx)
	if !ok {
		return refuse(proto.NotServing, "this brick is not in sync, or out of touch with its primary")
	}
	if info, known := r.session(a.Session); known && info.Owner != owner {
		return refuse(proto.Refused, "the session belongs to another client")
	}
	s := &Session{
		r: r, id: a.Session, client: a.Client, turn: a.Turn, sink: sink,
		known: make(map[fsop.Ino]interest, len(a.Holds)), waits: map[uint64]*clearing{}, lapsed: true,
		pinged: r.now(),
	}
	for _, h := range a.Holds {
		s.known[h.Ino] = interest(h.N) * oneHold
	}
	r.sessionsMu.Lock()
	old := r.sessions[a.Session]
	if old != nil && a.Turn < old.turn {
		r.sessionsMu.Unlock()
		return refuse(proto.NotServing, "the session's client has asked again since")
	}
	r.sessions[a.Session] = s
	r.sessionsMu.Unlock()
	if old != nil {
		old.lapse()
	}
	info, err := r.open(ctx, owner, a)
	switch {
	case errors.Is(err, fsop.EPERM):
		r.drop(s)
		return refuse(proto.Refused, "the session belongs to another client")
	case errors.Is(err, fsop.ESTALE):
		r.drop(s)
		return refuse(proto.SessionEnded, "the session has ended: it was out of touch for too long")
	case err != nil:
		r.drop(s)
		return refuse(proto.NotServing, err.Error())
	}
	// Everything that was acknowledged to anybody is applied here: this brick is in sync.
	return s, proto.AttachReply{Seq: max(v.commit, 1), Opened: info.Opened, Epoch: v.cfg.Epoch}
}

// open makes sure that the set knows the session of a. A set that takes no
// changes may not know it yet; then it is opened when its client comes again,
// with its first change. ESTALE: the session has ended. EPERM: it is not a's.
func (r *Replica) open(ctx context.Context, owner string, a *proto.Attach) (SessionInfo, error) {
	info, known := r.session(a.Session)
	switch {
	case known && info.Owner != owner:
		return info, fsop.EPERM
	case a.Opened != 0 && (!known || info.Opened != a.Opened):
		return info, fsop.ESTALE
	case known && !info.Away:
		return info, nil
	}
	d := r.forward(ctx, a.Session, a.Turn, proto.Do{Op: &fsop.OpenSession{Client: a.Client, Owner: owner, Opened: a.Opened}})
	switch {
	case d.Status != proto.OK:
		return info, errors.New("the set has no primary that could open the session")
	case d.Errno == fsop.EROFS:
		return info, nil
	case d.Errno != 0:
		return info, d.Errno
	}
	info, _ = r.session(a.Session)
	return info, nil
}

// session is what this brick knows of a session of the set.
func (r *Replica) session(id cluster.SessionID) (SessionInfo, bool) {
	for _, s := range r.store.Sessions() {
		if s.ID == id {
			return s, true
		}
	}
	return SessionInfo{}, false
}

// drop forgets a session that never was.
func (r *Replica) drop(s *Session) {
	r.sessionsMu.Lock()
	if r.sessions[s.id] == s {
		delete(r.sessions, s.id)
	}
	r.sessionsMu.Unlock()
}

// Detach tells that the client is out of reach. What it has cached counts until its lease is over.
func (s *Session) Detach() {
	s.mu.Lock()
	s.gone = true
	s.mu.Unlock()
}

// detachAll sends all clients elsewhere.
func (r *Replica) detachAll(why string) {
	r.sessionsMu.Lock()
	all := slices.Collect(maps.Values(r.sessions))
	r.sessionsMu.Unlock()
	for _, s := range all {
		s.sendAway(why)
	}
}

// sendAway has the client look for a home, if it believes that this is one.
func (s *Session) sendAway(why string) {
	s.mu.Lock()
	was := s.gone
	s.gone = true
	s.mu.Unlock()
	if !was {
		s.sink.Detached(why)
	}
}

// cached reports whether a client may still answer from what it has cached.
func (r *Replica) cached() bool {
	r.sessionsMu.Lock()
	defer r.sessionsMu.Unlock()
	for _, s := range r.sessions {
		s.mu.Lock()
		lapsed := s.lapsed
		s.mu.Unlock()
		if !lapsed {
			return true
		}
	}
	return false
}

// dropCaches is called when the store went back to an earlier state: what the
// clients have seen of the later one, they must see again.
func (r *Replica) dropCaches() {
	if len(r.sessions) > 0 {
		r.detachAll("the brick went back to its primary's state")
	}
}

// outwaitSessions is called when a comparison has changed the store: nobody has
// told the clients, so whatever they have cached must be gone, or their leases over,
// before this brick acknowledges what it has now.
func (l *loop) outwaitSessions() {
	l.dropCaches()
	c := &clearing{seq: l.m.Tail().Seq}
	c.waits.Store(1)
	l.sessionsMu.Lock()
	for _, s := range l.sessions {
		s.mu.Lock()
		if !s.lapsed {
			c.waits.Add(1)
			s.waits[c.seq] = c
		}
		s.mu.Unlock()
	}
	l.sessionsMu.Unlock()
	l.clearing = fifo[*clearing]{}
	l.clearing.push(c)
	c.waits.Add(-1)
	l.clearUp()
}

// attached lists the sessions whose home this is: it speaks for what they hold.
func (r *Replica) attached() []cluster.SessionID { return r.heardSince(0) }

// heard lists the sessions whose home this is and whose client was heard of within the time
// of a lease. That its connection stands says nothing: its process may have been stopped.
func (r *Replica) heard() []cluster.SessionID { return r.heardSince(r.now() - cluster.Lease) }

func (r *Replica) heardSince(t core.Instant) []cluster.SessionID {
	r.sessionsMu.Lock()
	defer r.sessionsMu.Unlock()
	var ids []cluster.SessionID
	for id, s := range r.sessions {
		s.mu.Lock()
		if !s.gone && s.pinged >= t {
			ids = append(ids, id)
		}
		s.mu.Unlock()
	}
	return ids
}

// Ping renews the client's cache lease.
func (s *Session) Ping(p *proto.Ping) *proto.Pong {
	until, ok := s.r.servingNow()
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.r.now()
	s.pinged = now
	// What others change when this brick's lease is over, nobody takes back from its
	// clients: their leases end with it.
	lease := min(cluster.Lease, until-now)
	if s.gone || !ok || lease <= 0 {
		return &proto.Pong{Stamp: p.Stamp}
	}
	s.lapsed = false
	s.leaseEnd = max(s.leaseEnd, now+cluster.Outwait(lease))
	return &proto.Pong{Stamp: p.Stamp, Serving: true, Lease: uint64(lease)}
}

// Forget takes away from what the client was given.
func (s *Session) Forget(holds []proto.Hold) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range holds {
		k := s.known[h.Ino]
		if uint64(k/oneHold) <= h.N {
			delete(s.known, h.Ino)
			continue
		}
		s.known[h.Ino] = k - interest(h.N)*oneHold
	}
}

// InvalAck takes the client's word that it carried out the Inval of seq.
func (s *Session) InvalAck(seq uint64) {
	s.mu.Lock()
	c := s.waits[seq]
	delete(s.waits, seq)
	s.mu.Unlock()
	if c != nil {
		s.r.cleared(c)
	}
}

// cleared counts one session less that an entry waits for.
func (r *Replica) cleared(c *clearing) {
	if c.waits.Add(-1) == 0 {
		r.mail.post(func(l *loop) { l.clearUp() })
	}
}

// Lapsed takes the word of a client that leaves: it has dropped all that it had cached.
func (s *Session) Lapsed() {
	s.Detach()
	s.lapse()
}

// lapse is called when the client certainly has nothing cached any more.
func (s *Session) lapse() {
	s.mu.Lock()
	s.lapsed = true
	waits := s.waits
	s.waits = map[uint64]*clearing{}
	for ino, k := range s.known {
		if k &= ^(cachesAttr | cachesNames); k == 0 {
			delete(s.known, ino)
		} else {
			s.known[ino] = k
		}
	}
	s.mu.Unlock()
	for _, c := range waits {
		s.r.cleared(c)
	}
}

// tickSessions lets sessions lapse whose lease is over, and as primary ends
// those that nobody has seen for long.
func (l *loop) tickSessions() {
	l.sessionsMu.Lock()
	var over []*Session
	for id, s := range l.sessions {
		s.mu.Lock()
		if l.now >= s.leaseEnd && (!s.lapsed || len(s.waits) > 0) {
			over = append(over, s)
		} else if s.gone && s.lapsed {
			delete(l.sessions, id)
		}
		s.mu.Unlock()
	}
	l.sessionsMu.Unlock()
	for _, s := range over {
		s.lapse()
	}
	if l.m.Role() != core.Primary || len(l.seen) == 0 {
		return
	}
	for _, id := range l.heard() {
		l.seen[id] = l.now
	}
	if _, ok := l.m.Serving(l.now); !ok || l.stoodStill() {
		// It is the set that is out of touch, or this process: nobody could be heard of. Sessions
		// keep what they have, and above all the memory of what was done for them.
		for id := range l.seen {
			l.seen[id] = l.now
		}
		return
	}
	if cfg := l.m.Config(); !cfg.Writable() {
		return // it could not be ordered; they are still there when it can
	}
	for id, at := range l.seen {
		if l.now < at+cluster.SessionTimeout {
			continue
		}
		delete(l.seen, id)
		l.log.Info("session is away: nobody has heard of it", "session", id, "for", cluster.SessionTimeout)
		l.order(&request{do: proto.Do{Op: &fsop.CloseSession{Session: uint64(id), Away: true}}, done: make(chan proto.DoReply, 1)})
	}
}

// stoodStill reports whether this process, or its loop, was not there to hear anything since
// the last tick: what others have said meanwhile still waits for it.
func (l *loop) stoodStill() bool { return l.now > l.ticked+cluster.Suspicion }

// sessionClosed has the client of a session that the set closed attach it again, if this is its
// home and it lives after all; and nothing is held for it any more.
func (l *loop) sessionClosed(id cluster.SessionID) {
	l.sessionsMu.Lock()
	s := l.sessions[id]
	l.sessionsMu.Unlock()
	if s != nil {
		s.sendAway("the session was out of touch for long")
	}
}

// takeBack tells the sessions that have cached what an entry made untrue, but
// not the one that asked for it: its kernel knows. It is called with gate held,
// and returns nil if nobody must be waited for.
func (r *Replica) takeBack(e *proto.Entry, effects []proto.Effect) *clearing {
	r.sessionsMu.Lock()
	defer r.sessionsMu.Unlock()
	var c *clearing
	for id, s := range r.sessions {
		if id == e.Session {
			continue
		}
		if inval := s.affected(e.Pos.Seq, effects); inval != nil {
			if c == nil {
				c = &clearing{seq: e.Pos.Seq}
				c.waits.Store(1) // until all have been told
			}
			c.waits.Add(1)
			s.mu.Lock()
			s.waits[e.Pos.Seq] = c
			s.mu.Unlock()
			// If it cannot be sent, the session's lease decides.
			_ = s.sink.Invalidate(inval)
		}
	}
	if c == nil || c.waits.Add(-1) == 0 {
		return nil
	}
	return c
}

// affected returns what the session must drop of its caches, or nil.
func (s *Session) affected(seq uint64, effects []proto.Effect) *proto.Inval {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lapsed {
		return nil
	}
	var inval *proto.Inval
	for _, e := range effects {
		k := s.known[e.Ino]
		switch {
		case e.Name == "" && (k&cachesAttr != 0 || e.Rights && k >= oneHold || e.Names && k&cachesNames != 0):
			s.known[e.Ino] = k &^ cachesAttr
		case e.Name != "" && k&cachesNames != 0:
		default:
			continue
		}
		if inval == nil {
			inval = &proto.Inval{Seq: seq}
		}
		inval.Effects = append(inval.Effects, e)
	}
	return inval
}

// Do carries out one operation for the session.
func (s *Session) Do(ctx context.Context, do *proto.Do) proto.DoReply {
	s.mu.Lock()
	gone := s.gone
	s.mu.Unlock()
	if gone {
		return proto.DoReply{Status: proto.NotServing}
	}
	switch k := do.Op.Kind(); {
	case k == fsop.KindCloseSession && do.Op.(*fsop.CloseSession).Session == uint64(s.id):
		s.Detach()
		s.lapse()
		return s.r.forward(ctx, s.id, s.turn, *do) // nothing comes after it
	case k >= fsop.KindOpenSession:
		return proto.DoReply{Errno: fsop.EPERM}
	case k.Mutates():
		return s.backToAttach(s.mutate(ctx, do))
	case k == fsop.KindFsync:
		return s.backToAttach(s.r.forwardAsked(ctx, s.id, s.turn, *do))
	}
	return s.read(ctx, do.Op)
}

// backToAttach sends a client whose session the set does not know, or no longer, to attach
// it again: there it hears what became of it.
func (s *Session) backToAttach(reply proto.DoReply) proto.DoReply {
	if reply.Status != proto.OK || reply.Errno != fsop.ENOTCONN {
		return reply
	}
	s.sendAway("the session was out of touch for long")
	return proto.DoReply{Status: proto.NotServing}
}

// mutate has the primary carry out a mutation, and notes what the client may
// keep of the answer.
func (s *Session) mutate(ctx context.Context, do *proto.Do) proto.DoReply {
	places := fsop.Places(do.Op) // whose names the client may have cached afterwards
	for _, p := range places {
		s.note(p.Dir, cachesNames, 0)
	}
	reply := s.r.forwardAsked(ctx, s.id, s.turn, *do)
	if reply.Status != proto.OK || reply.Errno != 0 || reply.Reply.Attr.Ino == 0 {
		return reply
	}
	// The answer is as old as its position. Only if nothing has happened to the
	// inode since may the client keep it; likewise what is said of the directory.
	var hold uint64
	if fsop.Introduces(do.Op) {
		hold = 1
	}
	r := &reply.Reply
	s.r.gate.RLock()
	defer s.r.gate.RUnlock()
	if n := len(places); n > 0 && places[0].Dir == places[n-1].Dir {
		dir := places[0].Dir
		s.note(dir, cachesAttr, 0)
		if now, _, err := s.r.store.Read(ctx, &fsop.Getattr{Ino: dir}); err == nil && now.Attr.Change == r.Seq {
			r.Dir = now.Attr
		}
	}
	what := cachesAttr
	if do.Op.Kind() == fsop.KindMkdir {
		what |= cachesNames // the client knows that it is empty
	}
	s.note(r.Attr.Ino, what, hold)
	if now, _, err := s.r.store.Read(ctx, &fsop.Getattr{Ino: r.Attr.Ino}); err != nil || now.Attr.Change != r.Attr.Change {
		r.Seq = 0
	}
	return reply
}

// note adds to what the client may have cached, and to its holds.
func (s *Session) note(ino fsop.Ino, what interest, holds uint64) {
	s.mu.Lock()
	s.known[ino] = (s.known[ino] | what) + interest(holds)*oneHold
	s.mu.Unlock()
}

// read answers an operation that changes nothing from this replica's store.
func (s *Session) read(ctx context.Context, op fsop.Op) proto.DoReply {
	for {
		if _, ok := s.r.serving(ctx); !ok {
			return proto.DoReply{Status: proto.NotServing}
		}
		closed := *s.r.closed.Load()
		var shut []fsop.Ino
		reply, dep, given, err := s.readStore(ctx, op, &shut)
		if shut = append(shut, s.closedTo(op, reply, err)...); len(shut) > 0 {
			s.Forget(given)
			if !s.r.waitWindows(ctx, shut, closed) {
				return proto.DoReply{Status: proto.NotServing}
			}
			continue
		}
		// What was read may not be committed yet. A reader that saw it and a
		// fail-over that loses it would be two truths.
		committed := s.r.waitCommit(ctx, dep)
		// The lease must still hold, now that the answer is known.
		if until, ok := s.r.servingNow(); !committed || !ok || s.r.now() >= until {
			s.Forget(given)
			if ctx.Err() != nil || s.r.ended() {
				return proto.DoReply{Status: proto.NotServing}
			}
			continue
		}
		var errno fsop.Errno
		switch {
		case err == nil:
			if op.Kind() == fsop.KindRead {
				reply.Attr = fsop.Attr{} // it was for closedTo
			}
			return proto.DoReply{Reply: *reply}
		case errors.As(err, &errno):
			return proto.DoReply{Errno: errno, Reply: fsop.Reply{Seq: reply.Seq}}
		default:
			// The brick has failed, and has said so. Another one can answer.
			return proto.DoReply{Status: proto.NotServing}
		}
	}
}

// readStore reads and notes what the client may cache, as one step with respect
// to changes. If op looks for a name in a directory whose window another session
// holds, that is added to shut, and nothing else means anything.
func (s *Session) readStore(ctx context.Context, op fsop.Op, shut *[]fsop.Ino) (reply *fsop.Reply, dep uint64, given []proto.Hold, err error) {
	var ino fsop.Ino
	switch op := op.(type) {
	case *fsop.Getattr:
		ino = op.Ino
	case *fsop.Readdir:
		ino = op.Ino
	case *fsop.Readlink:
		ino = op.Ino
	case *fsop.Getxattr:
		ino = op.Ino // kernels keep access control lists as long as attributes
	case *fsop.Read:
		// Contents are known by the attributes: noted before, they need no gate.
		s.note(op.Ino, cachesAttr, 0)
		if reply, dep, err = s.r.store.Read(ctx, op); err != nil {
			reply = &fsop.Reply{Seq: s.r.store.Tail().Seq}
		}
		return reply, dep, nil, err
	}
	s.r.gate.RLock()
	defer s.r.gate.RUnlock()
	if l, ok := op.(*fsop.Lookup); ok {
		if h := s.r.holder(ctx, l.Parent); h != 0 && h != s.id {
			*shut = append(*shut, l.Parent)
			return &fsop.Reply{}, 0, nil, nil
		}
	}
	reply, dep, err = s.r.store.Read(ctx, op)
	if ino != 0 {
		s.note(ino, cachesAttr, 0)
	}
	for _, p := range fsop.Places(op) {
		s.note(p.Dir, cachesNames, 0)
	}
	if err != nil {
		// What is not there may be cached too, as of now.
		return &fsop.Reply{Seq: s.r.store.Tail().Seq}, dep, nil, err
	}
	if fsop.Introduces(op) {
		s.note(reply.Attr.Ino, cachesAttr, 1)
		given = append(given, proto.Hold{Ino: reply.Attr.Ino, N: 1})
	}
	if d, ok := op.(*fsop.Readdir); ok && d.Plus {
		s.note(d.Ino, cachesNames, 0)
		for i := range reply.Entries {
			s.note(reply.Entries[i].Ino, cachesAttr, 1)
			given = append(given, proto.Hold{Ino: reply.Entries[i].Ino, N: 1})
		}
	}
	return reply, dep, given, nil
}

// servingNow returns the lease under which reads may be answered at this moment.
func (r *Replica) servingNow() (until core.Instant, ok bool) {
	v := r.view.Load()
	return v.until, v.serving && r.now() < v.until && !r.ended()
}

// ended reports whether Run has returned: nothing published is true any more.
func (r *Replica) ended() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// serveWait is how long a read waits for its replica to hold a lease again
// before the client is told to look elsewhere.
const serveWait = time.Second

// serving waits until reads may be answered.
func (r *Replica) serving(ctx context.Context) (*view, bool) {
	var deadline <-chan time.Time
	for {
		v := r.view.Load()
		if v.serving && r.now() < v.until && !r.ended() {
			return v, true
		}
		if deadline == nil {
			deadline = time.After(serveWait)
		}
		if v.cfg.Epoch != 0 && !v.cfg.IsInSync(r.self) {
			return v, false
		}
		select {
		case <-v.changed:
		case <-deadline:
			return v, false
		case <-ctx.Done():
			return v, false
		case <-r.done:
			return v, false
		}
	}
}

// waitCommit waits until seq is committed; false if it may never be.
func (r *Replica) waitCommit(ctx context.Context, seq uint64) bool {
	v := r.view.Load()
	if seq <= v.commit {
		return true
	}
	r.mail.post(func(l *loop) { l.askCommit(seq) })
	again := time.NewTicker(cluster.Heartbeat)
	defer again.Stop()
	for epoch := v.cfg.Epoch; seq > v.commit; v = r.view.Load() {
		if v.cfg.Epoch != epoch {
			return false
		}
		select {
		case <-v.changed:
		case <-again.C:
			r.mail.post(func(l *loop) { l.askCommit(seq) })
		case <-ctx.Done():
			return false
		case <-r.done:
			return false
		}
	}
	return true
}

// askCommit has the primary tell this backup when seq is committed.
func (l *loop) askCommit(seq uint64) {
	if l.m.Role() == core.Backup && l.m.Commit() < seq {
		cfg := l.m.Config()
		l.kept.Messages = append(l.kept.Messages, core.Message{
			To: cfg.Primary, Kind: proto.KindCommitAsk, Body: &proto.CommitAsk{Epoch: cfg.Epoch, Seq: seq},
		})
	}
}
