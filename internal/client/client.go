// Package client is one session of a volume: the way from a mount to the
// replica that answers it.
//
// A Client is a fsop.Handler. It talks to one replica at a time, its home: the
// brick on its own machine if that is in sync, else any that is. What it adds to
// a connection is what makes a lost connection invisible: every change has a number,
// and is sent under that number until it is answered, to whatever replica is
// home by then; the replicated state remembers the answers, so nothing is
// carried out twice.
//
// An operation passes, in this order,
//
//	limit     fails it after the volume's io-timeout        limit.go
//	windows   answers writes before they are sent, if the
//	          set lets it, and joins them                   window.go
//	partial   writes what a limit leaves room for   partial.go
//	numbering numbers a change, keeps it going if its
//	          caller gives up                               number.go
//	sending   sends it to the home, waits for a home        send.go
//
// and a home is found, kept and left by Run:
//
//	choose    which replica is asked to be home             choose.go
//	home      one connection, attached                      home.go
//	lease     for how long caches may be trusted            lease.go
//	inval     changes by others                             inval.go
//
// # Caches
//
// The Kernel that the replies are for caches them, and the home takes back what
// changes. That works while the home knows of the session, so the Client holds a
// lease from it: cluster.Lease from when it sent the last Ping that was
// answered. When the lease is over, and when it comes to a new home, everything
// cached is dropped before anything else is answered. A reply that was asked for
// before the home's first Pong (or before a Pong that follows a lapse) gets Seq 0,
// which means: not to be cached.
package client

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/estate"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// Kernel is who caches the replies. Package mount implements it.
type Kernel interface {
	// Invalidate returns when no later system call can see what the effects of
	// the change at seq made untrue. It is called concurrently.
	Invalidate(ctx context.Context, seq uint64, effects []proto.Effect) error
	// DropAll returns when nothing that was cached before is used any more.
	DropAll(ctx context.Context) error
	// Holds returns the inodes that the kernel knows, counted as proto.Hold says.
	// What Forgotten would return before is accounted for.
	Holds() []proto.Hold
	// Forgotten returns what the kernel forgot since the last call of Forgotten or Holds.
	Forgotten() []proto.Hold
	// Changed tells that a directory was changed at seq by something that this session
	// was told had succeeded before: what is older of its attributes is not to be
	// cached. It does not block.
	Changed(dir fsop.Ino, seq uint64)
	// Vacant reports whether a name for which a fsop.Make is under way was absent when
	// that was asked for, and no change of it by others came since. It does not block.
	Vacant(dir fsop.Ino, name string) bool
}

// Config says whose session of what volume a Client is.
type Config struct {
	Volume string
	// Name is the session's name for people: host and mount point.
	Name string
	// Local is the unix socket of the daemon on this machine; empty if there is none.
	Local string
	// Addrs are host:port of peers to begin with when there is no local daemon, or
	// it does not answer. More come with the volume's map.
	Addrs []string
	// Dial connects to a peer's address and authenticates it; peer is zero for
	// one of Addrs, which may be any peer. nil: only Local is used.
	Dial func(ctx context.Context, peer cluster.PeerID, addr string) (net.Conn, error)
	// Kernel caches what is answered. nil: nobody caches.
	Kernel Kernel
	// Options is called with the volume's options that concern clients, once
	// they are known and when they change. nil: nobody wants to know.
	Options func(map[string]string)
	// HomeLost, if not nil, is called when the session has lost its home on this machine, and
	// everything that it had cached is dropped, before it looks for another.
	HomeLost func(cluster.SessionID)
	// Windows lets writes be answered before they are sent (fsop.Window), and files before
	// they are made (fsop.Make). Whoever sets it sends a Flush with every close of a
	// file that was written.
	Windows bool
	// Estate is what the next process of the mount is left; nil: there is none.
	Estate *estate.Estate
	// Left is what the process before this one left: the session is its. nil: there was none.
	Left *estate.Left
	// Log gets what happens to the connection; nil: nothing does.
	Log *slog.Logger
}

// ErrClosed is returned for operations after Run has returned.
var ErrClosed = errors.New("the session is closed")

// Client is one session.
//
// Lock order: gate, then mu.
type Client struct {
	cfg     Config
	log     *slog.Logger
	chain   fsop.Handler
	numbers *estate.Numbers
	windows *windows     // nil if there are none
	ioLimit atomic.Int64 // io-timeout in nanoseconds, 0: none

	// gate is held for reading while a reply is given out, and for writing while
	// caches are dropped: what is given out later must not be older.
	gate sync.RWMutex

	mu      sync.Mutex // guards the fields below
	session cluster.SessionID
	opened  int64  // when the set opened it, 0: it has not
	turn    uint64 // of the last Attach
	home    *home  // nil while there is none
	changed chan struct{}
	closed  error            // set when Run has returned
	vm      *proto.VolumeMap // newest known, nil at first
	mapped  chan struct{}    // holds a token when vm is new
	dropped map[fsop.Ino]uint64
	uses    []fsop.Ino        // as Use said
	usedAs  cluster.SessionID // the session that said so

	lease lease

	ready     chan struct{}
	readyOnce sync.Once
	run       atomic.Bool
	wg        sync.WaitGroup // goroutines that outlive an operation
	life      context.Context
	end       context.CancelCauseFunc
}

var _ fsop.Handler = (*Client)(nil)

// New returns a Client with a new session. It does nothing before Run.
func New(cfg Config) *Client {
	if cfg.Estate == nil {
		cfg.Estate = estate.Private()
	}
	c := &Client{
		cfg:     cfg,
		log:     cfg.Log,
		changed: make(chan struct{}),
		mapped:  make(chan struct{}, 1),
		dropped: make(map[fsop.Ino]uint64),
		ready:   make(chan struct{}),
	}
	c.session = newSession()
	cfg.Estate.SetSession(uint64(c.session), 0)
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if c.cfg.Kernel == nil {
		c.cfg.Kernel = noKernel{}
	}
	c.log = c.log.With("volume", cfg.Volume)
	c.life, c.end = context.WithCancelCause(context.Background())
	c.numbers = cfg.Estate.Numbers
	c.numbers.Ahead = proto.MaxAhead
	c.lease.init()
	c.chain = &partial{&numbering{c, &sending{c}}}
	if cfg.Windows {
		c.windows = newWindows(c.chain, func() uint64 { return uint64(c.Session()) })
		c.windows.hooks = hooks{
			vacant: c.cfg.Kernel.Vacant,
			made:   c.cfg.Kernel.Changed,
			unused: func(ino fsop.Ino) {
				c.mu.Lock()
				defer c.mu.Unlock()
				c.dropped[ino]++
			},
			lost: func(effects []proto.Effect) {
				c.wg.Go(func() { _ = c.cfg.Kernel.Invalidate(c.life, 0, effects) }) // ends with the session at the latest
			},
			unsent: func(ino fsop.Ino, is bool) { cfg.Estate.SetUnsent(uint64(ino), is) },
			taken:  func(ctx context.Context) { c.numbers.Take(estate.RequestOf(ctx)) },
			took:   func(ctx context.Context) bool { return c.numbers.Took(estate.RequestOf(ctx)) },
		}
		c.chain = c.windows
	}
	c.chain = &limit{c, c.chain}
	if cfg.Left != nil {
		c.inherit(cfg.Left)
	}
	return c
}

// newSession returns the id of a session that never was.
func newSession() (id cluster.SessionID) {
	for id == 0 {
		id = cluster.SessionID(rand.Uint64())
	}
	return id
}

// Session returns the session's id. It is another when the set has ended the
// session, because it was out of touch for too long.
func (c *Client) Session() cluster.SessionID {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.session
}

// Ready is closed when the session has had a home.
func (c *Client) Ready() <-chan struct{} { return c.ready }

// Do implements fsop.Handler. Operations wait while there is no home, until ctx
// ends or the volume's io-timeout is over. A change whose caller gave up after
// it was sent is carried out or not.
func (c *Client) Do(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
	if m, ok := op.(*fsop.Make); ok && c.windows == nil {
		op = &fsop.Create{Node: m.Node, Excl: true} // nobody foretells it
	}
	if _, ok := op.(*fsop.Tmpfile); ok && c.windows == nil {
		return nil, fsop.EOPNOTSUPP // nobody would give up its window
	}
	return c.chain.Do(ctx, op)
}

// Use tells the set that the session uses the subvolume that an inode belongs to,
// for as long as it lives (fsop.Use). Nothing is used if it belongs to none.
func (c *Client) Use(ctx context.Context, ino fsop.Ino) error {
	as := c.Session()
	if _, err := c.Do(ctx, &fsop.Use{Ino: ino}); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.uses, c.usedAs = append(c.uses, ino), as
	c.cfg.Estate.SetUse(uint64(ino))
	return nil
}

// Settle sends all that was acknowledged and not sent, and reports whether nothing of the kind is left. It ends with ctx.
func (c *Client) Settle(ctx context.Context) bool {
	return c.windows == nil || c.windows.drainAll(ctx)
}

// ErrUnsent is returned when something was acknowledged that has not arrived.
var ErrUnsent = errors.New("client: writes that were acknowledged have not arrived")

// Still calls f if all that was acknowledged has arrived, and lets nothing be acknowledged before it
// is sent until f returns.
func (c *Client) Still(f func() error) error {
	if c.windows == nil {
		return f()
	}
	return c.windows.still(f)
}

// Run keeps the session alive until ctx ends, then closes it, which ends its
// locks. Its error is ctx's cause, or, before Ready, why the volume cannot be
// mounted at all.
func (c *Client) Run(ctx context.Context) error {
	if !c.run.CompareAndSwap(false, true) {
		return errors.New("client: run before")
	}
	inner, stop := context.WithCancelCause(ctx)
	c.wg.Go(func() { c.watchLease(inner) })
	if c.windows != nil {
		c.wg.Go(func() { _ = c.windows.Run(c.life) })
	}
	err := c.keepHome(inner)
	c.mu.Lock()
	c.closed = ErrClosed
	c.home = nil
	close(c.changed)
	c.changed = make(chan struct{})
	c.mu.Unlock()
	stop(ErrClosed)
	c.end(ErrClosed)
	c.wg.Wait()
	return err
}

// setHome makes h the home that operations are sent to; nil: none.
func (c *Client) setHome(h *home) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.home = h
	close(c.changed)
	c.changed = make(chan struct{})
	if h != nil && len(c.uses) > 0 && h.as != c.usedAs {
		c.usedAs = h.as // the set has forgotten what the session before it used
		for _, ino := range c.uses {
			c.wg.Go(func() {
				if _, err := c.Do(c.life, &fsop.Use{Ino: ino}); err != nil {
					c.log.Warn("the set does not know that this mount uses its subvolume", "inode", ino, "err", err)
				}
			})
		}
	}
	if h != nil {
		c.readyOnce.Do(func() { close(c.ready) })
	}
}

// awaitHome returns the home, as soon as there is one.
func (c *Client) awaitHome(ctx context.Context) (*home, error) {
	for {
		c.mu.Lock()
		h, changed, closed := c.home, c.changed, c.closed
		c.mu.Unlock()
		switch {
		case closed != nil:
			return nil, closed
		case h != nil:
			return h, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// noKernel is for clients that cache nothing.
type noKernel struct{}

func (noKernel) Invalidate(context.Context, uint64, []proto.Effect) error { return nil }
func (noKernel) DropAll(context.Context) error                            { return nil }
func (noKernel) Holds() []proto.Hold                                      { return nil }
func (noKernel) Forgotten() []proto.Hold                                  { return nil }
func (noKernel) Changed(fsop.Ino, uint64)                                 {}
func (noKernel) Vacant(fsop.Ino, string) bool                             { return false }

// monotonic returns the time for comparisons within this process.
func monotonic() time.Duration { return time.Since(processStart) }

var processStart = time.Now()
