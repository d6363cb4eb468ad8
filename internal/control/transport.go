package control

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"mortar/internal/cluster"
)

// The library's transport is meant for servers that are busy anyway: an idle
// group of three exchanges some hundred messages a second. transport keeps its
// wire format and changes when messages are sent:
//
//   - heartbeats to one peer are paced, one per beatEvery, to all at one time;
//   - an append that says nothing new (no entries, the same commit index) is
//     not sent at all; nothing is faked, the library simply gets no answer to
//     a message whose answer it does not wait for;
//   - in return the commit index is sent at once when it moves, so followers
//     learn of a decision within a round trip and not with the next tick;
//   - appends to a peer whose heartbeats fail wait until one succeeds. Left to
//     itself, the library would back off up to ten seconds, and a peer that
//     comes back would be without news for as long.
//
// A peer that was restarted has to be told the commit index again. Its broken
// heartbeat connection tells: breaks counts those, and a pipeline from before
// the last break sends nothing more, which makes the library begin anew.
type transport struct {
	*raft.NetworkTransport
	stream *stream
	done   chan struct{} // closed at shutdown
	inbox  chan raft.RPC // to the consensus machine
	sorted chan struct{} // closed when the goroutine that fills inbox has ended; nil before it is started

	// amnesia, if set, is asked about every request that arrives before the
	// machine gets it; see amnesia.go.
	amnesia func(raft.RPC) error

	ballot *raft.NetworkTransport // for votes
	later  sync.WaitGroup         // calls of after

	mu       sync.Mutex // guards all below, and the link fields marked so
	links    map[raft.ServerID]*link
	released chan struct{} // closed and replaced to let waiting appends go
	leading  bool
	commit   uint64
	pipes    map[*pipe]struct{}
}

// link is what is known of the way to one peer, as its leader.
type link struct {
	lastBeat time.Time // last one sent; used by the heartbeat goroutine only

	// guarded by transport.mu
	heard  time.Time // when the last heartbeat that was answered was sent
	known  bool      // a heartbeat was answered or failed
	alive  bool      // the last one was answered
	since  time.Time
	breaks uint64
	up     chan struct{} // closed and replaced when alive becomes true
}

const (
	// beatEvery is the time between heartbeats. The leader's lease is 250 ms: one
	// may be late.
	beatEvery = cluster.Tick
	// rpcTimeout bounds one request. A peer that needs longer than that to flush
	// an entry is asked again.
	rpcTimeout = time.Second
	// dialTimeout bounds one attempt to connect: a machine that answers at all
	// does so in far less, and to one that does not the next attempt is soon.
	dialTimeout = 500 * time.Millisecond
)

func newTransport(st *stream, log hclog.Logger) *transport {
	t := &transport{
		stream:   st,
		done:     make(chan struct{}),
		inbox:    make(chan raft.RPC),
		links:    map[raft.ServerID]*link{},
		released: make(chan struct{}),
		pipes:    map[*pipe]struct{}{},
	}
	t.ballot = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{Logger: log, Stream: dialOnly{st}, Timeout: rpcTimeout})
	t.NetworkTransport = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Logger:  log,
		Stream:  st,
		MaxPool: 3,
		// Not 2, the library's choice: with that a sender waits for ever when the
		// reader of the answers has given up and one more request is under way,
		// which a commit index that is sent besides makes likely.
		MaxRPCsInFlight: 130,
		Timeout:         rpcTimeout,
	})
	return t
}

// The connections that the library keeps lie idle between elections, perhaps for
// months. What has become of them meanwhile shows only when one is used, and an
// election that waits for that is lost. So votes are asked for over connections
// of their own: ballot is a second transport, that only dials and keeps nothing.

// RequestVote implements raft.Transport.
func (t *transport) RequestVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	return t.ballot.RequestVote(id, target, args, resp)
}

// RequestPreVote implements raft.WithPreVote.
func (t *transport) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	return t.ballot.RequestPreVote(id, target, args, resp)
}

// TimeoutNow implements raft.Transport.
func (t *transport) TimeoutNow(id raft.ServerID, target raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	return t.ballot.TimeoutNow(id, target, args, resp)
}

// dialOnly is a stream layer that nobody dials.
type dialOnly struct{ *stream }

func (d dialOnly) Accept() (net.Conn, error) {
	<-d.ctx.Done()
	return nil, net.ErrClosed
}

func (d dialOnly) Close() error {
	d.end()
	return nil
}

// start begins to hand requests to the consensus machine.
func (t *transport) start() {
	t.sorted = make(chan struct{})
	go func() {
		defer close(t.sorted)
		for {
			select {
			case rpc := <-t.NetworkTransport.Consumer():
				if err := t.amnesia(rpc); err != nil {
					rpc.Respond(nil, err)
				} else {
					t.inject(rpc)
				}
			case <-t.done:
				return
			}
		}
	}()
}

// after calls f in a while, unless the transport is closed first.
func (t *transport) after(d time.Duration, f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-t.done:
		return
	default:
	}
	t.later.Go(func() {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
			f()
		case <-t.done:
		}
	})
}

// inject hands a request to the consensus machine.
func (t *transport) inject(rpc raft.RPC) {
	select {
	case t.inbox <- rpc:
	case <-t.done:
	}
}

// Consumer implements raft.Transport.
func (t *transport) Consumer() <-chan raft.RPC { return t.inbox }

var (
	_ raft.Transport   = (*transport)(nil)
	_ raft.WithPreVote = (*transport)(nil)
)

// Close ends the transport and every connection, and waits for what serves them.
func (t *transport) Close() error {
	t.mu.Lock()
	select {
	case <-t.done:
	default:
		close(t.done)
	}
	t.mu.Unlock()
	err := errors.Join(t.NetworkTransport.Close(), t.ballot.Close())
	t.NetworkTransport.CloseStreams()
	t.stream.wait()
	t.later.Wait()
	if t.sorted != nil {
		<-t.sorted
	}
	return err
}

func (t *transport) linkLocked(id raft.ServerID) *link {
	l := t.links[id]
	if l == nil {
		l = &link{up: make(chan struct{}), since: time.Now()}
		t.links[id] = l
	}
	return l
}

// setLeading is told when this peer becomes or stops being leader. What is known
// of the links is forgotten: only a leader's heartbeats find out.
func (t *transport) setLeading(leading bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.leading = leading
	clear(t.links)
	t.releaseLocked()
}

// forget lets go what waits for a peer that was taken out of the group.
func (t *transport) forget(id raft.ServerID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.links, id)
	t.releaseLocked()
}

func (t *transport) releaseLocked() {
	close(t.released)
	t.released = make(chan struct{})
}

// reachable reports whether the peer answered the last heartbeat, and since
// when that has been so or not.
func (t *transport) reachable(id raft.ServerID) (alive bool, since time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l := t.links[id]; l != nil {
		return l.alive, l.since
	}
	return false, time.Now()
}

// answeredSince reports whether the peer answered a heartbeat that was sent after t0.
func (t *transport) answeredSince(id raft.ServerID, t0 time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.links[id]
	return l != nil && l.heard.After(t0)
}

var errReleased = errors.New("the peer is unreachable and this peer no longer leads it")

// AppendEntries implements raft.Transport.
func (t *transport) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if len(args.Entries) == 0 && args.PrevLogEntry == 0 && args.PrevLogTerm == 0 && args.LeaderCommitIndex == 0 {
		return t.heartbeat(id, target, args, resp)
	}
	if err := t.awaitAlive(id); err != nil {
		return err
	}
	return t.NetworkTransport.AppendEntries(id, target, args, resp)
}

// heartbeat sends one heartbeat, not before it is due. The library calls it
// from one goroutine per peer.
func (t *transport) heartbeat(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	t.mu.Lock()
	l := t.linkLocked(id)
	due := time.Duration(0)
	if l.alive && time.Since(l.lastBeat) < beatEvery {
		// All peers' heartbeats on one beat, which is a tick: the process wakes once for them.
		due = cluster.UntilTick(time.Now())
	}
	released := t.released
	t.mu.Unlock()
	if due > 0 {
		timer := time.NewTimer(due)
		select {
		case <-timer.C:
		case <-released: // not leader any more: the library decides what now
		case <-t.done:
		}
		timer.Stop()
	}
	sent := time.Now()
	t.mu.Lock()
	l.lastBeat = sent
	t.mu.Unlock()
	err := t.NetworkTransport.AppendEntries(id, target, args, resp)

	t.mu.Lock()
	defer t.mu.Unlock()
	alive := err == nil
	if alive {
		l.heard = sent
	}
	if !l.known || l.alive != alive {
		l.known, l.alive, l.since = true, alive, time.Now()
		if alive {
			close(l.up)
			l.up = make(chan struct{})
		}
	}
	if !alive {
		l.breaks++
	}
	return err
}

// awaitAlive waits while the peer's heartbeats fail and this peer is its leader.
func (t *transport) awaitAlive(id raft.ServerID) error {
	t.mu.Lock()
	for {
		l := t.linkLocked(id)
		if !l.known || l.alive {
			t.mu.Unlock()
			return nil
		}
		if !t.leading {
			t.mu.Unlock()
			return errReleased
		}
		up, released := l.up, t.released
		t.mu.Unlock()
		select {
		case <-up:
		case <-released:
			return errReleased
		case <-t.done:
			return raft.ErrTransportShutdown
		}
		t.mu.Lock()
	}
}

// AppendEntriesPipeline implements raft.Transport.
func (t *transport) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	t.mu.Lock()
	breaks := t.linkLocked(id).breaks
	t.mu.Unlock()
	inner, err := t.NetworkTransport.AppendEntriesPipeline(id, target)
	if err != nil {
		return nil, err
	}
	p := &pipe{AppendPipeline: inner, t: t, id: id, breaks: breaks, wake: make(chan struct{}, 1), stop: make(chan struct{}), stopped: make(chan struct{})}
	t.mu.Lock()
	t.pipes[p] = struct{}{}
	t.mu.Unlock()
	go p.run()
	return p, nil
}

// committed tells the followers that everything up to index is decided. It
// never blocks.
func (t *transport) committed(index uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.commit = max(t.commit, index)
	for p := range t.pipes {
		select {
		case p.wake <- struct{}{}:
		default:
		}
	}
}

// pipe is a pipeline of appends to one peer that leaves out what says nothing
// and adds the commit index when it moves.
type pipe struct {
	raft.AppendPipeline
	t             *transport
	id            raft.ServerID
	breaks        uint64
	wake          chan struct{}
	stop, stopped chan struct{}
	once          sync.Once

	mu   sync.Mutex                // serializes sends
	last raft.AppendEntriesRequest // as sent, with PrevLog moved past its entries
}

var errPipeBroken = errors.New("the connection to the peer was broken since the pipeline began")

func (p *pipe) broken() bool {
	p.t.mu.Lock()
	defer p.t.mu.Unlock()
	l := p.t.links[p.id]
	return l == nil || l.breaks != p.breaks
}

// AppendEntries implements raft.AppendPipeline.
func (p *pipe) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.broken() {
		return nil, errPipeBroken
	}
	if len(args.Entries) == 0 && p.last.Term == args.Term && p.last.PrevLogEntry == args.PrevLogEntry && p.last.LeaderCommitIndex >= min(args.LeaderCommitIndex, args.PrevLogEntry) {
		return nil, nil // the library drops the future
	}
	return p.sendLocked(args, resp)
}

func (p *pipe) sendLocked(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	f, err := p.AppendPipeline.AppendEntries(args, resp)
	if err != nil {
		return nil, err
	}
	p.last = *args
	if n := len(args.Entries); n > 0 {
		p.last.PrevLogEntry, p.last.PrevLogTerm = args.Entries[n-1].Index, args.Entries[n-1].Term
		p.last.Entries = nil
	}
	return f, nil
}

// run sends the commit index when it has moved, as far as the peer is known to
// have this leader's entries: what it may have beyond them is some other
// leader's, and must not count as decided.
func (p *pipe) run() {
	defer close(p.stopped)
	for {
		select {
		case <-p.wake:
		case <-p.stop:
			return
		}
		p.t.mu.Lock()
		commit := p.t.commit
		p.t.mu.Unlock()
		p.mu.Lock()
		commit = min(commit, p.last.PrevLogEntry)
		// Before the library's first append nothing is known to be common.
		if p.last.Term != 0 && commit > p.last.LeaderCommitIndex && !p.broken() {
			req := p.last
			req.LeaderCommitIndex = commit
			// An error shows again at the library's own next append.
			_, _ = p.sendLocked(&req, new(raft.AppendEntriesResponse))
		}
		p.mu.Unlock()
	}
}

// Close implements raft.AppendPipeline.
func (p *pipe) Close() error {
	err := p.AppendPipeline.Close() // fails a send that blocks
	p.once.Do(func() {
		p.t.mu.Lock()
		delete(p.t.pipes, p)
		p.t.mu.Unlock()
		close(p.stop)
	})
	<-p.stopped
	return err
}

// hello is what the dialling side says first on a connection between the
// consensus machines of two peers.
type hello struct {
	Pool        cluster.ID
	Generation  uint64
	From        cluster.PeerID
	Boot        uint64 // random, of the process
	Incarnation uint64 // 0 until it is known
}

const helloLen = 8 + 16 + 8 + 16 + 8 + 8

var helloMagic = [8]byte{'m', 'o', 'r', 't', 'r', 'a', 'f', 1}

func (h *hello) encode() []byte {
	b := append(make([]byte, 0, helloLen), helloMagic[:]...)
	b = append(b, h.Pool[:]...)
	b = binary.LittleEndian.AppendUint64(b, h.Generation)
	b = append(b, h.From[:]...)
	b = binary.LittleEndian.AppendUint64(b, h.Boot)
	return binary.LittleEndian.AppendUint64(b, h.Incarnation)
}

func decodeHello(b []byte) (h hello, err error) {
	if len(b) != helloLen || [8]byte(b[:8]) != helloMagic {
		return h, errors.New("it does not speak this version of the control protocol")
	}
	copy(h.Pool[:], b[8:])
	h.Generation = binary.LittleEndian.Uint64(b[24:])
	copy(h.From[:], b[32:])
	h.Boot = binary.LittleEndian.Uint64(b[48:])
	h.Incarnation = binary.LittleEndian.Uint64(b[56:])
	return h, nil
}

// Identified is implemented by connections whose other end was authenticated.
// The control plane then believes no other name.
type Identified interface{ PeerID() cluster.PeerID }

// stream implements raft.StreamLayer on the daemon's dialer and listener.
type stream struct {
	net.Listener
	self  cluster.PeerID
	dial  func(context.Context, cluster.PeerID) (net.Conn, error)
	hello func() hello      // what to say
	check func(hello) error // whether to believe
	log   *slog.Logger
	ctx   context.Context // ends with the stream
	end   context.CancelFunc
	began time.Time // zero of its clock

	mu     sync.Mutex // guards all below
	conns  map[*conn]struct{}
	heard  map[cluster.PeerID]*heard
	told   map[string]time.Time // refusals that were logged
	served sync.WaitGroup       // accepted connections that are still served
	closed bool
}

func newStream(ln net.Listener, self cluster.PeerID, log *slog.Logger) *stream {
	s := &stream{Listener: ln, self: self, log: log, began: time.Now(), conns: map[*conn]struct{}{}, heard: map[cluster.PeerID]*heard{}, told: map[string]time.Time{}}
	s.ctx, s.end = context.WithCancel(context.Background())
	return s
}

type peerAddr string

func (a peerAddr) Network() string { return "mortar" }
func (a peerAddr) String() string  { return string(a) }

// Addr implements net.Listener: peers are addressed by id.
func (s *stream) Addr() net.Addr { return peerAddr(s.self.String()) }

// Dial implements raft.StreamLayer.
func (s *stream) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	to, err := cluster.ParseID(string(address))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(s.ctx, min(timeout, dialTimeout))
	defer cancel()
	nc, err := s.dial(ctx, to)
	if err != nil {
		return nil, err
	}
	h := s.hello()
	nc.SetDeadline(time.Now().Add(dialTimeout))
	if _, err := nc.Write(h.encode()); err != nil {
		nc.Close()
		return nil, err
	}
	nc.SetDeadline(time.Time{})
	c := &conn{Conn: nc, s: s}
	if !s.track(c) {
		return nil, net.ErrClosed
	}
	return c, nil
}

// Accept implements net.Listener. The other side's hello is read with its first
// request, by the goroutine that serves the connection.
func (s *stream) Accept() (net.Conn, error) {
	for {
		nc, err := s.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &conn{Conn: nc, s: s, accepted: true, expectHello: true}
		if s.track(c) {
			return c, nil
		}
	}
}

func (s *stream) track(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		c.Conn.Close()
		return false
	}
	s.conns[c] = struct{}{}
	if c.accepted {
		s.served.Add(1)
	}
	return true
}

// Close implements net.Listener. It cuts every connection.
func (s *stream) Close() error {
	s.end()
	err := s.Listener.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for c := range s.conns {
		c.Conn.Close()
	}
	return err
}

// wait returns when no accepted connection is served any more.
func (s *stream) wait() { s.served.Wait() }

// refused logs the reason of a refusal, each once a minute: whoever is refused
// comes again at once.
func (s *stream) refused(reason error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	text := reason.Error()
	if time.Since(s.told[text]) < time.Minute {
		return
	}
	if len(s.told) >= 100 {
		clear(s.told)
	}
	s.told[text] = time.Now()
	s.log.Warn("control: a connection was refused", "reason", text)
}

// heard is a process that acts under a peer's identity.
type heard struct {
	boot uint64
	last atomic.Int64 // of the last request, on the stream's clock
}

// aliveFor is how long after its last request a process counts as alive: a
// leader sends heartbeats far more often.
const aliveFor = 500 * time.Millisecond

// now is the time since the stream was made. It grows as time passes, whatever
// becomes of the machine's clock.
func (s *stream) now() int64 { return int64(time.Since(s.began)) }

// admit makes sure that one process at a time acts under an identity. A copy of
// the leader's disk that is started would otherwise be voted for by everybody
// who takes it for the leader.
func (s *stream) admit(h hello) (*heard, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	old := s.heard[h.From]
	if old != nil && old.boot == h.Boot {
		return old, nil
	}
	if old != nil && now-old.last.Load() < int64(aliveFor) {
		return nil, fmt.Errorf("another process with the identity of peer %v is alive: two machines may have the same disk", h.From)
	}
	p := &heard{boot: h.Boot}
	p.last.Store(now)
	s.heard[h.From] = p
	return p, nil
}

// bootOf tells which process acts for a peer, 0 if none has lately.
func (s *stream) bootOf(peer cluster.PeerID) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.heard[peer]
	if h == nil || s.now()-h.last.Load() > int64(aliveFor) {
		return 0
	}
	return h.boot
}

// conn is a connection between two consensus machines.
type conn struct {
	net.Conn
	s           *stream
	accepted    bool
	expectHello bool   // used by the reading goroutine only
	from        *heard // likewise
	once        sync.Once
}

func (c *conn) Read(b []byte) (int, error) {
	if c.expectHello {
		if err := c.readHello(); err != nil {
			c.s.refused(err)
			return 0, io.EOF
		}
		c.expectHello = false
	}
	n, err := c.Conn.Read(b)
	if n > 0 && c.from != nil {
		c.from.last.Store(c.s.now())
	}
	return n, err
}

func (c *conn) readHello() error {
	var b [helloLen]byte
	c.Conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadFull(c.Conn, b[:]); err != nil {
		return fmt.Errorf("no greeting: %w", err)
	}
	c.Conn.SetReadDeadline(time.Time{})
	h, err := decodeHello(b[:])
	if err != nil {
		return err
	}
	if id, ok := c.Conn.(Identified); ok && id.PeerID() != h.From {
		return fmt.Errorf("it calls itself peer %v and has the key of peer %v", h.From, id.PeerID())
	}
	if err := c.s.check(h); err != nil {
		return err
	}
	c.from, err = c.s.admit(h)
	return err
}

func (c *conn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		c.s.mu.Lock()
		delete(c.s.conns, c)
		c.s.mu.Unlock()
		if c.accepted {
			c.s.served.Done()
		}
	})
	return err
}
