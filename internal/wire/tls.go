package wire

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// HandshakeTimeout bounds a TLS handshake, on both sides.
const HandshakeTimeout = 5 * time.Second

// cork is the socket under a TLS connection. From hold on it keeps what TLS
// writes in memory, for tlsSink to write.
type cork struct {
	net.Conn
	closed chan struct{}
	once   sync.Once // closes closed

	mu      sync.Mutex // guards the fields below; TLS may write from its read side, too
	holding bool
	held    []byte
}

func newCork(nc net.Conn) *cork { return &cork{Conn: nc, closed: make(chan struct{})} }

// Close implements net.Conn.
func (c *cork) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// Write implements net.Conn.
func (c *cork) Write(b []byte) (int, error) {
	c.mu.Lock()
	if c.holding {
		c.held = append(c.held, b...)
		c.mu.Unlock()
		return len(b), nil
	}
	c.mu.Unlock()
	return c.Conn.Write(b)
}

func (c *cork) hold() {
	c.mu.Lock()
	c.holding = true
	c.mu.Unlock()
}

// take returns what TLS wrote since the last take, and lets it use the memory
// of empty for what comes.
func (c *cork) take(empty []byte) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.held
	c.held = empty[:0]
	return b
}

// Client makes a TLS connection of nc and completes the handshake within
// HandshakeTimeout. It closes nc if that fails.
func Client(ctx context.Context, nc net.Conn, cfg *tls.Config) (*tls.Conn, error) {
	return handshake(ctx, nc, tls.Client(newCork(nc), cfg))
}

// Server is the other side of Client.
func Server(ctx context.Context, nc net.Conn, cfg *tls.Config) (*tls.Conn, error) {
	return handshake(ctx, nc, tls.Server(newCork(nc), cfg))
}

func handshake(ctx context.Context, nc net.Conn, tc *tls.Conn) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, HandshakeTimeout,
		fmt.Errorf("%w: no TLS handshake within %v", ErrStalled, HandshakeTimeout))
	defer cancel()
	if err := tc.HandshakeContext(ctx); err != nil {
		nc.Close()
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("TLS with %v: %w", nc.RemoteAddr(), explain(err))
	}
	return tc, nil
}

// Dial connects to a TCP address and makes TLS of it.
func Dial(ctx context.Context, addr string, cfg *tls.Config) (*tls.Conn, error) {
	nc, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return Client(ctx, nc, cfg)
}

// plainConn is a connection that Plain took out of TLS.
type plainConn struct{ net.Conn }

// NetConn returns the socket.
func (c *plainConn) NetConn() net.Conn { return c.Conn }

// What the sides say to each other, inside TLS, about going on without it.
const (
	plainAsk   = "mortar plain?"
	plainYes   = 'P'
	plainNo    = 'E'
	plainBytes = len(plainAsk) + 1
)

// Plain comes right after the handshake of a connection whose data need not be
// encrypted: both sides say, inside TLS, whether they want that, and if both do
// they go on in the clear, with checksums in their frames. It returns the
// connection to go on with, tc itself if either side wants encryption. The handshake has
// authenticated the sides; from then on the network itself is trusted.
// Both sides have to call it, with client true on the one that dialed.
//
// TLS reads ahead, and must not read what is meant to be clear. So the client
// asks and keeps silent, the server answers and keeps silent, and the client's first clear
// byte tells the server that TLS is over on both sides. It needs TLS 1.3 without
// session tickets, else TLS has words of its own to say.
func Plain(ctx context.Context, tc *tls.Conn, client, want bool) (net.Conn, error) {
	if v := tc.ConnectionState().Version; v != tls.VersionTLS13 {
		return nil, fmt.Errorf("%w: %s, where TLS 1.3 is needed", ErrVersion, tls.VersionName(v))
	}
	tc.SetDeadline(time.Now().Add(HandshakeTimeout))
	stop := context.AfterFunc(ctx, func() { tc.SetDeadline(time.Unix(1, 0)) })
	raw := rawConn(tc)
	if c, ok := raw.(*cork); ok {
		raw = c.Conn
	}
	theirs, err := plainExchange(tc, client, want)
	clear := want && theirs
	if err == nil && clear {
		err = plainBegin(raw, client)
	}
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		raw.Close()
		return nil, fmt.Errorf("agreeing on encryption with %v: %w", tc.RemoteAddr(), explain(err))
	}
	if err := tc.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	if !clear {
		return tc, nil
	}
	return &plainConn{raw}, nil
}

// plainBegin sends or receives the first clear byte.
func plainBegin(raw net.Conn, client bool) error {
	b := []byte{plainYes}
	if client {
		_, err := raw.Write(b)
		return err
	}
	if _, err := raw.Read(b); err != nil {
		return err
	}
	if b[0] != plainYes {
		return fmt.Errorf("%w: %q for the first clear byte", ErrFrame, b)
	}
	return nil
}

// plainExchange says want and returns what the other side wants.
func plainExchange(tc *tls.Conn, client, want bool) (bool, error) {
	mine := append([]byte(plainAsk), plainNo)
	if want {
		mine[len(plainAsk)] = plainYes
	}
	if client {
		if _, err := tc.Write(mine); err != nil {
			return false, err
		}
	}
	var b [plainBytes]byte
	if _, err := io.ReadFull(tc, b[:]); err != nil {
		return false, err
	}
	theirs := b[len(plainAsk)]
	if string(b[:len(plainAsk)]) != plainAsk || theirs != plainYes && theirs != plainNo {
		return false, fmt.Errorf("%w: %q where the word about encryption is due", ErrFrame, b)
	}
	if !client {
		if _, err := tc.Write(mine); err != nil {
			return false, err
		}
	}
	return theirs == plainYes, nil
}
