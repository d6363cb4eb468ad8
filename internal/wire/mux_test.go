package wire

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// lockedBuffer is a log that a test may read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// startMux runs a Mux until the end of the test.
func startMux(t *testing.T, m *Mux) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := m.Run(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
}

func withALPN(cfg *tls.Config, alpn ...string) *tls.Config {
	cfg = cfg.Clone()
	cfg.NextProtos = alpn
	return cfg
}

func TestMux(t *testing.T) {
	server, client := testTLS(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	log := new(lockedBuffer)
	m := NewMux(l, server, MuxOptions{Log: slog.New(slog.NewTextHandler(log, nil))})
	m.Handle("mortar-data/1", func(ctx context.Context, tc *tls.Conn) {
		New(tc, Options{Handler: echo}).Run(ctx)
	})
	hl := m.Listener("http/1.1")
	web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS == nil {
			t.Error("the server does not see that it is TLS")
		}
		io.WriteString(w, "hello from "+r.URL.Path)
	})}
	served := make(chan error)
	go func() { served <- web.Serve(hl) }()
	t.Cleanup(func() {
		if err := <-served; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Serve: %v", err)
		}
		web.Close()
	})
	startMux(t, m)
	addr := m.Addr().String()

	t.Run("data", func(t *testing.T) {
		tc, err := Dial(t.Context(), addr, withALPN(client, "mortar-data/1"))
		if err != nil {
			t.Fatal(err)
		}
		c := New(tc, Options{})
		run(t, c)
		if got, err := c.Call(t.Context(), 1, []byte("x")); err != nil || string(got) != "x" {
			t.Errorf("got %q, %v", got, err)
		}
	})
	t.Run("http", func(t *testing.T) {
		tr := &http.Transport{TLSClientConfig: withALPN(client, "http/1.1")}
		defer tr.CloseIdleConnections()
		for range 3 {
			r, err := (&http.Client{Transport: tr}).Get("https://" + addr + "/path")
			if err != nil {
				t.Fatal(err)
			}
			b, _ := io.ReadAll(r.Body)
			r.Body.Close()
			if string(b) != "hello from /path" {
				t.Errorf("got %q", b)
			}
		}
	})
	t.Run("unknown protocol", func(t *testing.T) {
		if _, err := Dial(t.Context(), addr, withALPN(client, "mortar-data/99")); err == nil || !strings.Contains(err.Error(), "no application protocol") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no protocol", func(t *testing.T) {
		tc, err := Dial(t.Context(), addr, withALPN(client))
		if err == nil {
			if _, err = tc.Read(make([]byte, 1)); err == nil {
				t.Error("served")
			}
			tc.Close()
		}
	})
	// Who was refused may know it sooner than the log.
	for deadline := time.Now().Add(time.Minute); !strings.Contains(log.String(), "connection refused"); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("log: %q", log.String())
		}
	}
}

// TestMuxBounds: connections that do nothing are bounded in number and time,
// and do not keep others out for long.
func TestMuxBounds(t *testing.T) {
	server, client := testTLS(t)
	now := time.Now()
	server.Time = func() time.Time { return now } // the bubble begins in 2000
	client.Time = server.Time
	synctest.Test(t, func(t *testing.T) {
		n := NewNetwork(1)
		l, err := n.Listen("server:24007")
		if err != nil {
			t.Fatal(err)
		}
		m := NewMux(l, withALPN(server), MuxOptions{MaxHandshakes: 10, MaxHandshakesPerAddr: 4, MaxConns: 8, MaxConnsPerPeer: 3})
		m.Handle("x", func(ctx context.Context, tc *tls.Conn) { New(tc, Options{Handler: echo}).Run(ctx) })
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan struct{})
		go func() { m.Run(ctx); close(ended) }()
		defer func() { cancel(); <-ended }()

		open := func(host string, k int) (open int) {
			var all []net.Conn
			for range k {
				nc, err := n.Dial(t.Context(), host, "server:24007")
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, nc)
			}
			synctest.Wait()
			for _, nc := range all {
				nc.SetReadDeadline(time.Now().Add(time.Millisecond))
				if _, err := nc.Read(make([]byte, 1)); errors.Is(err, io.EOF) {
					nc.Close()
				} else {
					open++
					t.Cleanup(func() { nc.Close() })
				}
			}
			return open
		}
		good := func(host string) (*Conn, error) {
			nc, err := n.Dial(t.Context(), host, "server:24007")
			if err != nil {
				return nil, err
			}
			tc, err := Client(t.Context(), nc, withALPN(client, "x"))
			if err != nil {
				return nil, err
			}
			c := New(tc, Options{})
			done := make(chan struct{})
			go func() { c.Run(context.Background()); close(done) }()
			t.Cleanup(func() { c.Close(nil); <-done })
			_, err = c.Call(t.Context(), 1)
			return c, err
		}
		if got := open("evil", 50); got != 4 {
			t.Errorf("%d half-open connections of one host, want 4", got)
		}
		if got := open("evil2", 50) + open("evil3", 50); got != 6 {
			t.Errorf("%d half-open connections of two more, want 6", got)
		}
		if _, err := good("friend"); err == nil {
			t.Error("got in beyond the bound")
		}
		time.Sleep(HandshakeTimeout + time.Second) // of the bubble's time
		var friends []*Conn
		for range 3 {
			c, err := good("friend")
			if err != nil {
				t.Fatalf("after the time-out: %v", err)
			}
			friends = append(friends, c)
		}
		if _, err := good("friend"); err == nil {
			t.Error("a fourth connection of one host")
		}
		friends[0].Close(nil)
		synctest.Wait()
		if _, err := good("friend"); err != nil {
			t.Errorf("after one was closed: %v", err)
		}
		m.mu.Lock()
		if m.shaking.n != 0 || len(m.shaking.key) != 0 || m.settled.n != 3 || len(m.settled.key) != 1 || len(m.conns) != 3 {
			t.Errorf("account: %+v, %+v, %d connections", m.shaking, m.settled, len(m.conns))
		}
		m.mu.Unlock()
	})
}

// brokenListener fails a few times before it works.
type brokenListener struct {
	net.Listener
	n int
}

func (l *brokenListener) Accept() (net.Conn, error) {
	if l.n++; l.n < 4 {
		return nil, errors.New("too many open files")
	}
	return l.Listener.Accept()
}

func TestMuxAcceptFails(t *testing.T) {
	server, client := testTLS(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	log := new(lockedBuffer)
	m := NewMux(&brokenListener{Listener: l}, server, MuxOptions{Log: slog.New(slog.NewTextHandler(log, nil))})
	m.Handle("x", func(ctx context.Context, tc *tls.Conn) { New(tc, Options{Handler: echo}).Run(ctx) })
	startMux(t, m)
	tc, err := Dial(t.Context(), l.Addr().String(), withALPN(client, "x"))
	if err != nil {
		t.Fatal(err)
	}
	c := New(tc, Options{})
	run(t, c)
	if _, err := c.Call(t.Context(), 1); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "too many open files") {
		t.Errorf("log: %q", log.String())
	}
}

func TestMuxListenerClosed(t *testing.T) {
	server, _ := testTLS(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := NewMux(l, server, MuxOptions{})
	m.Handle("x", func(context.Context, *tls.Conn) {})
	l.Close()
	if err := m.Run(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v", err)
	}
}
