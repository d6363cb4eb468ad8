package wire

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"
)

// MuxOptions bounds what strangers and friends can take of a Mux.
type MuxOptions struct {
	Log *slog.Logger // nil: discard
	// MaxHandshakes bounds the connections whose TLS handshake is not complete
	// (512), and MaxHandshakesPerAddr those of them from one address (64).
	// More are closed at once.
	MaxHandshakes        int
	MaxHandshakesPerAddr int
	// MaxConns bounds the connections after the handshake (8192), and
	// MaxConnsPerPeer those of them with one client certificate key (512), or from
	// one address if there is none. More are closed.
	MaxConns        int
	MaxConnsPerPeer int
}

func (o *MuxOptions) setDefaults() {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	for _, d := range []struct {
		p *int
		n int
	}{{&o.MaxHandshakes, 512}, {&o.MaxHandshakesPerAddr, 64}, {&o.MaxConns, 8192}, {&o.MaxConnsPerPeer, 512}} {
		if *d.p <= 0 {
			*d.p = d.n
		}
	}
}

// Mux shares one listener among protocols that are told apart by TLS ALPN.
type Mux struct {
	l   net.Listener
	cfg *tls.Config
	o   MuxOptions

	mu        sync.Mutex // guards the fields below
	handlers  map[string]func(context.Context, *tls.Conn)
	listeners []*muxListener
	conns     map[net.Conn]struct{}
	shaking   bound // in their handshake, by address
	settled   bound // after it, by key or address
	refused   map[string]int
	logged    time.Time
}

// bound counts things in all and by key.
type bound struct {
	n   int
	key map[string]int
}

func (b *bound) add(key string, max, maxKey int) bool {
	if b.n >= max || b.key[key] >= maxKey {
		return false
	}
	if b.key == nil {
		b.key = make(map[string]int)
	}
	b.n++
	b.key[key]++
	return true
}

func (b *bound) remove(key string) {
	b.n--
	if b.key[key]--; b.key[key] == 0 {
		delete(b.key, key)
	}
}

// NewMux makes a Mux of a listener, which it owns. cfg is that of every
// connection; the protocols that it offers (NextProtos) are those that were
// given to Handle when Run begins.
func NewMux(l net.Listener, cfg *tls.Config, o MuxOptions) *Mux {
	o.setDefaults()
	return &Mux{
		l: l, cfg: cfg, o: o,
		handlers: make(map[string]func(context.Context, *tls.Conn)),
		conns:    make(map[net.Conn]struct{}),
		refused:  make(map[string]int),
	}
}

// Addr is the listener's address.
func (m *Mux) Addr() net.Addr { return m.l.Addr() }

// Handle has f called, in a goroutine of its own, for each connection that
// agreed on protocol alpn. When f returns, the connection is closed; when ctx
// ends it is closed, too, and f has to return. It must be called before Run.
func (m *Mux) Handle(alpn string, f func(ctx context.Context, c *tls.Conn)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.handlers[alpn] = f
}

// Listener returns the connections of protocol alpn as a net.Listener, for
// servers that want one. They are of type *tls.Conn. Accept ends with Run.
func (m *Mux) Listener(alpn string) net.Listener {
	l := &muxListener{addr: m.l.Addr(), ch: make(chan net.Conn), closed: make(chan struct{})}
	m.Handle(alpn, l.serve)
	m.mu.Lock()
	m.listeners = append(m.listeners, l)
	m.mu.Unlock()
	return l
}

// Run accepts connections until ctx ends, or the listener fails, which is the
// error. It closes the listener and every connection, and waits for the handlers.
func (m *Mux) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer m.closeAll()
	defer cancel()
	defer m.l.Close()
	stop := context.AfterFunc(ctx, func() { m.l.Close() })
	defer stop()

	cfg := m.cfg.Clone()
	cfg.NextProtos = nil
	m.mu.Lock()
	for alpn := range m.handlers {
		cfg.NextProtos = append(cfg.NextProtos, alpn)
	}
	m.mu.Unlock()

	for pause := time.Duration(0); ; {
		nc, err := m.l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			// Out of descriptors, or the connection was gone already: the listener
			// itself is well.
			pause = min(max(2*pause, time.Millisecond), time.Second)
			m.o.Log.Warn("accepting a connection", "err", err, "next_try_in", pause)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
			continue
		}
		pause = 0
		addr := sourceOf(nc)
		m.mu.Lock()
		ok := m.shaking.add(addr, m.o.MaxHandshakes, m.o.MaxHandshakesPerAddr)
		if ok {
			m.conns[nc] = struct{}{}
		}
		m.mu.Unlock()
		if !ok {
			nc.Close()
			m.refuse(addr, errors.New("too many connections in their TLS handshake"))
			continue
		}
		wg.Go(func() { m.serve(ctx, cfg, nc, addr) })
	}
}

// serve takes a connection through its handshake and hands it to its handler.
func (m *Mux) serve(ctx context.Context, cfg *tls.Config, nc net.Conn, addr string) {
	defer func() {
		nc.Close()
		m.mu.Lock()
		delete(m.conns, nc)
		m.mu.Unlock()
	}()
	tc, err := Server(ctx, nc, cfg)
	key := addr
	if err == nil {
		if certs := tc.ConnectionState().PeerCertificates; len(certs) > 0 {
			key = string(certs[0].RawSubjectPublicKeyInfo)
		}
	}
	m.mu.Lock()
	m.shaking.remove(addr)
	var f func(context.Context, *tls.Conn)
	if err == nil {
		alpn := tc.ConnectionState().NegotiatedProtocol
		if f = m.handlers[alpn]; f == nil {
			err = fmt.Errorf("protocol %q is not served here", alpn)
		} else if !m.settled.add(key, m.o.MaxConns, m.o.MaxConnsPerPeer) {
			err = errors.New("too many connections")
		}
	}
	m.mu.Unlock()
	if err != nil {
		if ctx.Err() == nil {
			m.refuse(addr, err)
		}
		return
	}
	defer func() {
		m.mu.Lock()
		m.settled.remove(key)
		m.mu.Unlock()
	}()
	f(ctx, tc)
}

// refuse logs a refused connection, with one line a second at most.
func (m *Mux) refuse(addr string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.refused[addr]++
	if time.Since(m.logged) < time.Second && len(m.refused) < 1024 {
		return
	}
	n := 0
	for _, k := range m.refused {
		n += k
	}
	m.logged = time.Now()
	clear(m.refused)
	m.o.Log.Warn("connection refused", "remote", addr, "reason", err, "refused_since_last", n)
}

// closeAll closes every connection and ends every Accept.
func (m *Mux) closeAll() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.listeners {
		l.Close()
	}
	for nc := range m.conns {
		nc.Close()
	}
}

// sourceOf is the address that a connection comes from, without its port.
func sourceOf(nc net.Conn) string {
	addr := nc.RemoteAddr().String()
	if ap, err := netip.ParseAddrPort(addr); err == nil {
		return ap.Addr().Unmap().String()
	}
	if host, _, err := net.SplitHostPort(addr); err == nil {
		return host
	}
	return addr
}

// muxListener is the net.Listener of one protocol.
type muxListener struct {
	addr   net.Addr
	ch     chan net.Conn
	once   sync.Once
	closed chan struct{}
}

// serve hands a connection to Accept and waits until it is closed.
func (l *muxListener) serve(ctx context.Context, tc *tls.Conn) {
	select {
	case l.ch <- tc:
	case <-l.closed:
		return
	case <-ctx.Done():
		return
	}
	select {
	case <-tc.NetConn().(*cork).closed:
	case <-ctx.Done():
	}
}

func (l *muxListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ch:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close ends Accept. Connections that were accepted stay.
func (l *muxListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *muxListener) Addr() net.Addr { return l.addr }
