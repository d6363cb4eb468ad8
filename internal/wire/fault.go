package wire

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Network is a network in memory for tests: hosts that listen and dial, and
// links between them that can be slow, lossy or cut. Its connections behave like
// TCP's: bytes arrive in order or not at all, a cut is noticed by nobody until it is
// mended, when everything under way arrives, and a write succeeds as long as
// there is room. It starts no goroutines and waits on channels and timers alone, so
// it works in a testing/synctest bubble.
type Network struct {
	mu        sync.Mutex // guards everything in the network and its connections
	rng       *rand.Rand
	changed   chan struct{} // closed and replaced whenever a waiter may have to look again
	links     map[[2]string]Fault
	listeners map[string]*memListener
	conns     map[*memConn]struct{}
	port      int
}

// Fault is the state of one direction of a link. The zero Fault is a perfect link.
type Fault struct {
	Cut   bool          // nothing arrives
	Delay time.Duration // of every byte
	// Loss is the probability that a write is delayed by another RetransmitDelay,
	// which is what a stream makes of a lost packet.
	Loss float64
}

// RetransmitDelay is Linux's TCP_RTO_MIN.
const RetransmitDelay = 200 * time.Millisecond

// memWindow is how many bytes fit between a writer and a reader.
const memWindow = 256 << 10

// NewNetwork makes a network without hosts. seed decides which writes are lost.
func NewNetwork(seed uint64) *Network {
	return &Network{
		rng:       rand.New(rand.NewPCG(seed, 0)),
		changed:   make(chan struct{}),
		links:     make(map[[2]string]Fault),
		listeners: make(map[string]*memListener),
		conns:     make(map[*memConn]struct{}),
	}
}

// Pipe returns the two ends of a connection between the hosts "a" and "b" of a
// network of their own.
func Pipe() (a, b net.Conn, n *Network) {
	n = NewNetwork(1)
	n.mu.Lock()
	defer n.mu.Unlock()
	x, y := n.connectLocked("a", "b", "b")
	return x, y, n
}

// changedLocked makes everybody who waits look again.
func (n *Network) changedLocked() {
	close(n.changed)
	n.changed = make(chan struct{})
}

// Set makes f the state of the direction between two hosts. A host can be any
// name, or "*" for all of them. A cut cuts whoever it matches; delay and loss are
// those of the closest match.
func (n *Network) Set(from, to string, f Fault) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.links[[2]string{from, to}] = f
	n.changedLocked()
}

// SetBoth is Set for both directions.
func (n *Network) SetBoth(a, b string, f Fault) {
	n.Set(a, b, f)
	n.Set(b, a, f)
}

// Isolate cuts a host off from all others, or mends that.
func (n *Network) Isolate(host string, cut bool) {
	n.SetBoth(host, "*", Fault{Cut: cut})
}

func (n *Network) faultLocked(from, to string) (f Fault) {
	if from == to {
		return Fault{}
	}
	found := false
	for _, k := range [][2]string{{from, to}, {from, "*"}, {"*", to}, {"*", "*"}} {
		g, ok := n.links[k]
		if ok && !found {
			f.Delay, f.Loss, found = g.Delay, g.Loss, true
		}
		f.Cut = f.Cut || g.Cut
	}
	return f
}

// Kill ends all listeners and connections of a host, as the kernel does when
// their process dies: the other sides see a reset, unless the link is cut.
func (n *Network) Kill(host string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for addr, l := range n.listeners {
		if l.host == host {
			delete(n.listeners, addr)
			l.closed = true
		}
	}
	for c := range n.conns {
		if c.local.host == host {
			c.reset = true
			c.peer.peerReset = true
			delete(n.conns, c)
		}
	}
	n.changedLocked()
}

// memAddr is a host and port of a Network.
type memAddr struct {
	host, port string
}

func (a memAddr) Network() string { return "mem" }
func (a memAddr) String() string  { return net.JoinHostPort(a.host, a.port) }

// Listen listens on a "host:port" of the network.
func (n *Network) Listen(addr string) (net.Listener, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners[addr] != nil {
		return nil, &net.OpError{Op: "listen", Net: "mem", Addr: memAddr{host, port}, Err: syscall.EADDRINUSE}
	}
	l := &memListener{n: n, host: host, port: port}
	n.listeners[addr] = l
	return l, nil
}

// Dial connects a host to a "host:port". While the link is cut it waits.
func (n *Network) Dial(ctx context.Context, from, addr string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "mem", Addr: memAddr{host, port}, Err: err}
	}
	for n.faultLocked(from, host).Cut || n.faultLocked(host, from).Cut {
		wait := n.changed
		n.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
		}
		n.mu.Lock()
		if ctx.Err() != nil {
			return fail(context.Cause(ctx))
		}
	}
	l := n.listeners[addr]
	if l == nil {
		return fail(syscall.ECONNREFUSED)
	}
	x, y := n.connectLocked(from, host, port)
	l.queue = append(l.queue, y)
	n.changedLocked()
	return x, nil
}

func (n *Network) connectLocked(from, to, port string) (x, y *memConn) {
	n.port++
	x = &memConn{n: n, local: memAddr{from, fmt.Sprint(n.port)}, remote: memAddr{to, port}}
	y = &memConn{n: n, local: x.remote, remote: x.local}
	x.peer, y.peer = y, x
	n.conns[x], n.conns[y] = struct{}{}, struct{}{}
	return x, y
}

type memListener struct {
	n          *Network
	host, port string

	queue  []*memConn // guarded by n.mu
	closed bool
}

func (l *memListener) Addr() net.Addr { return memAddr{l.host, l.port} }

func (l *memListener) Accept() (net.Conn, error) {
	l.n.mu.Lock()
	defer l.n.mu.Unlock()
	for {
		if l.closed {
			return nil, &net.OpError{Op: "accept", Net: "mem", Addr: l.Addr(), Err: net.ErrClosed}
		}
		if len(l.queue) > 0 {
			c := l.queue[0]
			l.queue = l.queue[1:]
			return c, nil
		}
		wait := l.n.changed
		l.n.mu.Unlock()
		<-wait
		l.n.mu.Lock()
	}
}

func (l *memListener) Close() error {
	l.n.mu.Lock()
	defer l.n.mu.Unlock()
	if !l.closed {
		l.closed = true
		delete(l.n.listeners, l.Addr().String())
		l.n.changedLocked()
	}
	return nil
}

// memConn is one end of a connection.
type memConn struct {
	n             *Network
	local, remote memAddr
	peer          *memConn

	// Guarded by n.mu.
	in           []segment // what the other end wrote and this one has not read
	inSize       int
	last         time.Time // when the last of in is due
	closed       bool      // by this end
	reset        bool      // this end's host has dropped the connection
	peerReset    bool      // the other end's host has, which shows when the link is not cut
	rdead, wdead time.Time
}

// segment is what one write sent.
type segment struct {
	due time.Time
	b   []byte // empty: the end of the stream
}

func (c *memConn) LocalAddr() net.Addr  { return c.local }
func (c *memConn) RemoteAddr() net.Addr { return c.remote }

func (c *memConn) fail(op string, err error) error {
	return &net.OpError{Op: op, Net: "mem", Source: c.local, Addr: c.remote, Err: err}
}

// brokenLocked returns why the connection cannot be used any more.
func (c *memConn) brokenLocked(deadline time.Time) error {
	switch {
	case c.closed:
		return net.ErrClosed
	case c.reset, c.peerReset && !c.n.faultLocked(c.remote.host, c.local.host).Cut:
		return syscall.ECONNRESET
	case !deadline.IsZero() && !time.Now().Before(deadline):
		return os.ErrDeadlineExceeded
	}
	return nil
}

// waitLocked waits until something changed or one of the times (zero: none) has come.
func (c *memConn) waitLocked(times ...time.Time) {
	wait := c.n.changed
	var first time.Time
	for _, t := range times {
		if !t.IsZero() && (first.IsZero() || t.Before(first)) {
			first = t
		}
	}
	c.n.mu.Unlock()
	defer c.n.mu.Lock()
	if first.IsZero() {
		<-wait
		return
	}
	timer := time.NewTimer(time.Until(first))
	defer timer.Stop()
	select {
	case <-wait:
	case <-timer.C:
	}
}

func (c *memConn) Read(b []byte) (int, error) {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	for {
		if err := c.brokenLocked(c.rdead); err != nil {
			return 0, c.fail("read", err)
		}
		var due time.Time
		if len(c.in) > 0 && !c.n.faultLocked(c.remote.host, c.local.host).Cut {
			s := &c.in[0]
			due = s.due
			switch {
			case time.Now().Before(due):
			case len(s.b) == 0:
				return 0, io.EOF
			default:
				k := copy(b, s.b)
				if s.b = s.b[k:]; len(s.b) == 0 {
					c.in = c.in[1:]
				}
				c.inSize -= k
				c.n.changedLocked()
				return k, nil
			}
		}
		c.waitLocked(due, c.rdead)
	}
}

func (c *memConn) Write(b []byte) (int, error) {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	for n := 0; ; {
		if err := c.brokenLocked(c.wdead); err != nil {
			return n, c.fail("write", err)
		}
		if c.peer.closed && !c.n.faultLocked(c.local.host, c.remote.host).Cut {
			return n, c.fail("write", syscall.EPIPE)
		}
		if n == len(b) {
			return n, nil
		}
		if room := memWindow - c.peer.inSize; room > 0 {
			k := min(room, len(b)-n)
			c.sendLocked(bytes.Clone(b[n : n+k]))
			n += k
			continue
		}
		c.waitLocked(c.wdead)
	}
}

// sendLocked puts a segment on its way. It never overtakes the one before.
func (c *memConn) sendLocked(b []byte) {
	f := c.n.faultLocked(c.local.host, c.remote.host)
	due := time.Now().Add(f.Delay)
	if f.Loss > 0 && c.n.rng.Float64() < f.Loss {
		due = due.Add(RetransmitDelay)
	}
	if due.Before(c.peer.last) {
		due = c.peer.last
	}
	c.peer.last = due
	c.peer.in = append(c.peer.in, segment{due, b})
	c.peer.inSize += len(b)
	c.n.changedLocked()
}

// Close ends the connection. The other end reads what is under way, and then
// its end, after the link's delay and not before a cut is mended.
func (c *memConn) Close() error {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	if c.closed {
		return c.fail("close", net.ErrClosed)
	}
	c.closed = true
	delete(c.n.conns, c)
	c.sendLocked(nil)
	return nil
}

func (c *memConn) SetDeadline(t time.Time) error {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	c.rdead, c.wdead = t, t
	c.n.changedLocked()
	return nil
}

func (c *memConn) SetReadDeadline(t time.Time) error {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	c.rdead = t
	c.n.changedLocked()
	return nil
}

func (c *memConn) SetWriteDeadline(t time.Time) error {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	c.wdead = t
	c.n.changedLocked()
	return nil
}

var _ net.Conn = (*memConn)(nil)
