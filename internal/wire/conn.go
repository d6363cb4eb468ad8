package wire

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Message is one frame that arrived.
type Message struct {
	Kind uint8
	// ID is not 0 if the sender waits for a Reply.
	ID uint64
	// Body belongs to whoever gets the Message. Conn.Recycle takes it back.
	Body []byte

	size int // of the body as it arrived, for the account of unanswered calls
}

// Handler gets the messages of a connection.
type Handler interface {
	// Message is called from the read loop, in the order of arrival. It must not
	// block: nothing else of the connection is read meanwhile, not even the reply
	// to a Call.
	Message(c *Conn, m Message)
}

// HandlerFunc makes a Handler of a function.
type HandlerFunc func(c *Conn, m Message)

// Message implements Handler.
func (f HandlerFunc) Message(c *Conn, m Message) { f(c, m) }

// Canceler is a Handler that wants to know when a caller gives up. A call that
// was canceled must still be replied to, with anything; it counts until then.
type Canceler interface {
	// Cancel is called from the read loop and must not block. The call may have
	// been replied to already.
	Cancel(c *Conn, id uint64)
}

// Options says how a Conn behaves. The zero value is complete but for the Handler.
type Options struct {
	// Handler gets what arrives and is not a reply. Without one, anything but a
	// reply is a bad frame.
	Handler Handler
	Log     *slog.Logger // nil: discard
	// MaxQueue bounds the bytes that wait to be sent (16 MiB). One message may
	// always wait.
	MaxQueue int
	// MaxCalls and MaxCallBytes bound the calls of the other side that were not
	// yet replied to (1024), and their bodies (64 MiB). A well-behaved other side
	// waits; one that does not is disconnected.
	MaxCalls     int
	MaxCallBytes int
	// Integrity makes frames carry a CRC. Connections that Plain took out of TLS
	// have it in any case. Both sides must agree.
	Integrity bool
	// HelloTimeout bounds the exchange of hellos (5 s).
	HelloTimeout time.Duration
	// StallTimeout is how long the other side may take for the next 64 KiB of a
	// frame that it has begun, or to make room in its socket (15 s). An idle
	// connection never stalls; noticing a silent peer is its user's business.
	StallTimeout time.Duration
	// Buffers recycles bodies. nil: the connection has its own.
	Buffers *Buffers
}

func (o *Options) setDefaults() {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.MaxQueue <= 0 {
		o.MaxQueue = 16 << 20
	}
	if o.MaxCalls <= 0 {
		o.MaxCalls = 1024
	}
	if o.MaxCallBytes <= 0 {
		o.MaxCallBytes = 64 << 20
	}
	o.MaxCalls = max(o.MaxCalls, leastCalls)
	o.MaxCallBytes = max(o.MaxCallBytes, MaxBody)
	if o.HelloTimeout <= 0 {
		o.HelloTimeout = 5 * time.Second
	}
	if o.StallTimeout <= 0 {
		o.StallTimeout = 15 * time.Second
	}
	if o.Buffers == nil {
		o.Buffers = new(Buffers)
	}
}

// Conn is a connection that carries messages both ways. All methods may be
// called by many goroutines at once, and before Run, when messages wait for it.
//
// Lock order: calls.mu and mu are never held together.
type Conn struct {
	nc   net.Conn
	sink sink
	o    Options

	wake chan struct{} // holds a token when the writer goroutine has to look
	done chan struct{} // closed with err set

	mu       sync.Mutex // guards the fields below
	err      error      // why the connection ended; sticks
	ready    bool       // hellos were exchanged: writing may begin
	owner    owner      // who may touch sink and cur
	out      batch      // queued and in nobody's hands
	free     [][]byte   // chunks for the next batches
	queued   int        // bytes in out and cur
	turn     uint64     // batches taken so far; out will be number turn+1
	finished uint64     // batches written or dropped
	changed  chan struct{}
	cur      batch // being written by the owner, who alone changes it; else empty

	calls calls

	inCalls, inBytes atomic.Int64 // calls of the other side not replied to
}

// owner says who writes.
type owner uint8

const (
	nobody owner = iota
	caller       // a goroutine that queued something is in a write that cannot block
	writer       // the writer goroutine's turn
)

// New makes a Conn of nc, which it owns from then on. Run brings it to life;
// a Conn that is never run has to be closed.
func New(nc net.Conn, o Options) *Conn {
	o.setDefaults()
	widen(nc)
	nc = calmed(nc)
	c := &Conn{
		nc:   nc,
		o:    o,
		wake: make(chan struct{}, 1),
		done: make(chan struct{}),
	}
	if _, ok := nc.(*plainConn); ok {
		c.o.Integrity = true
	}
	c.sink = newSink(nc, o.StallTimeout)
	c.calls.init()
	return c
}

// Net returns the underlying connection, for its addresses and TLS state.
func (c *Conn) Net() net.Conn { return c.nc }

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err returns why the connection ended, nil while it has not.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the connection at once: calls in flight fail with cause, what is
// queued is dropped (see Drain). nil stands for ErrClosed. Only the first Close counts.
// It does not wait for Run.
func (c *Conn) Close(cause error) {
	if cause == nil {
		cause = ErrClosed
	}
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = cause
	c.out = batch{}
	c.free = nil
	if c.owner == nobody {
		c.finished = c.turn + 1
	}
	c.changedLocked()
	close(c.done)
	c.mu.Unlock()
	rawConn(c.nc).Close()
	c.calls.fail(cause)
}

// changedLocked wakes who waits for room in the queue, or for a batch to be gone.
func (c *Conn) changedLocked() {
	if c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
}

// waitLocked returns a channel that is closed at the next change of the queue.
func (c *Conn) waitLocked() <-chan struct{} {
	if c.changed == nil {
		c.changed = make(chan struct{})
	}
	return c.changed
}

// Run exchanges hellos, reads until the connection ends, and returns its
// cause. When ctx ends, so does the connection, with ctx's cause. Run waits for
// everything it started.
func (c *Conn) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-ctx.Done():
			c.Close(context.Cause(ctx))
		case <-c.done:
		}
	})
	err := c.hello()
	if err == nil {
		wg.Go(c.writeLoop)
		err = c.readLoop()
	}
	c.Close(err)
	wg.Wait()
	err = c.Err()
	if errors.Is(err, ErrFrame) || errors.Is(err, ErrVersion) {
		c.o.Log.Warn("connection refused", "remote", c.nc.RemoteAddr(), "reason", err)
	}
	return err
}

// hello exchanges hellos and applies what they say.
func (c *Conn) hello() error {
	c.nc.SetDeadline(time.Now().Add(c.o.HelloTimeout))
	mine := hello{
		version:  Version,
		crc:      c.o.Integrity,
		maxCalls: uint32(c.o.MaxCalls),
		maxBytes: uint32(c.o.MaxCallBytes),
		maxBody:  MaxBody,
	}
	// The other side does the same, and 24 bytes fit into any socket.
	if err := c.sink.hello(mine.encode()); err != nil {
		return fmt.Errorf("sending hello: %w", explain(err))
	}
	var b [helloSize]byte
	if _, err := io.ReadFull(c.nc, b[:]); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("%w: no hello within %v", ErrStalled, c.o.HelloTimeout)
		}
		return fmt.Errorf("waiting for hello: %w", explain(err))
	}
	theirs, err := parseHello(b[:])
	if err != nil {
		return err
	}
	if theirs.crc != mine.crc {
		return fmt.Errorf("%w: one side wants checksums (here %v, there %v)", ErrVersion, mine.crc, theirs.crc)
	}
	if err := c.nc.SetDeadline(time.Time{}); err != nil {
		return explain(err)
	}
	c.calls.limit(int(theirs.maxCalls), int(theirs.maxBytes))
	c.mu.Lock()
	c.ready = true
	c.mu.Unlock()
	c.kick()
	return nil
}

// explain turns what the operating system says of a broken connection into
// what it means.
func explain(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "remote error" { // crypto/tls
		return fmt.Errorf("the other side refused this machine (%w); the log there says why", err)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return ErrPeerClosed
	}
	return err
}

// Recycle takes back the body of a Message or of a Call's reply for another to
// use. Nobody may look at it any more. Recycling is never needed; it pays for
// bodies of 16 KiB and more.
func (c *Conn) Recycle(body []byte) { c.o.Buffers.put(body) }
