package wire

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// tlsPair returns both ends of a TLS connection over loopback TCP.
func tlsPair(t *testing.T, server, client *tls.Config) (s, c *tls.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		nc, err := l.Accept()
		if err == nil {
			s, err = Server(t.Context(), nc, server)
		}
		if err != nil {
			t.Error(err)
		}
	}()
	c, err = Dial(t.Context(), l.Addr().String(), client)
	<-done
	if err != nil || s == nil {
		t.Fatal(err)
	}
	return s, c
}

// TestPlain: the connection goes on in the clear if both sides want that, and
// not a byte of either phase is taken for the other's, whoever is how fast.
func TestPlain(t *testing.T) {
	server, client := testTLS(t)
	for _, tt := range []struct {
		name         string
		s, c, inward bool
	}{
		{"both", true, true, true},
		{"server only", true, false, false},
		{"client only", false, true, false},
		{"neither", false, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for range 20 {
				s, c := tlsPair(t, server, client)
				var wg sync.WaitGroup
				// Each side talks as soon as it may, from several goroutines at once.
				side := func(tc *tls.Conn, isClient, want bool) {
					nc, err := Plain(t.Context(), tc, isClient, want)
					if err != nil {
						t.Error(err)
						return
					}
					if clear := nc != net.Conn(tc); clear != tt.inward {
						t.Errorf("in the clear: %v, want %v", clear, tt.inward)
					}
					conn := New(nc, Options{Handler: echo})
					if conn.o.Integrity != tt.inward {
						t.Errorf("checksums: %v, want %v", conn.o.Integrity, tt.inward)
					}
					var calls, ended sync.WaitGroup
					for i := range 4 {
						calls.Go(func() {
							body := pattern(i*i*i*3000, byte(i))
							for range 3 {
								got, err := conn.Call(t.Context(), 1, body)
								if err != nil || !bytes.Equal(got, body) {
									t.Errorf("call: %d bytes, %v", len(got), err)
								}
							}
						})
					}
					ended.Go(func() { conn.Run(context.Background()) })
					calls.Wait()
					// The other side may still be asking.
					conn.Call(t.Context(), 1, []byte("done"))
					conn.Drain(t.Context())
					t.Cleanup(func() { conn.Close(nil); ended.Wait() })
				}
				wg.Go(func() { side(s, false, tt.s) })
				wg.Go(func() { side(c, true, tt.c) })
				wg.Wait()
			}
		})
	}
}

// TestPlainIsPlain looks at the bytes on the wire.
func TestPlainIsPlain(t *testing.T) {
	server, client := testTLS(t)
	secret := []byte("not so secret after all")
	for _, want := range []bool{true, false} {
		an, bn, _ := Pipe()
		tap := &tap{Conn: an}
		got := make(chan []byte, 1)
		go func() {
			tc, err := Server(t.Context(), bn, server)
			if err != nil {
				t.Error(err)
				return
			}
			nc, err := Plain(t.Context(), tc, false, want)
			if err != nil {
				t.Error(err)
				return
			}
			c := New(nc, Options{Handler: HandlerFunc(func(c *Conn, m Message) { got <- m.Body })})
			run(t, c)
		}()
		tc, err := Client(t.Context(), tap, client)
		if err != nil {
			t.Fatal(err)
		}
		nc, err := Plain(t.Context(), tc, true, want)
		if err != nil {
			t.Fatal(err)
		}
		c := New(nc, Options{})
		run(t, c)
		c.Send(1, secret)
		if b := <-got; !bytes.Equal(b, secret) {
			t.Errorf("got %q", b)
		}
		if seen := tap.has(secret); seen != want {
			t.Errorf("with Plain %v the message was visible: %v", want, seen)
		}
	}
}

// tap keeps what is written.
type tap struct {
	net.Conn
	mu  sync.Mutex
	log []byte
}

func (t *tap) Write(b []byte) (int, error) {
	t.mu.Lock()
	t.log = append(t.log, b...)
	t.mu.Unlock()
	return t.Conn.Write(b)
}

func (t *tap) has(b []byte) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return bytes.Contains(t.log, b)
}

// TestPlainFails: a side that says something else, or nothing.
func TestPlainFails(t *testing.T) {
	server, client := testTLS(t)
	for _, tt := range []struct {
		name string
		say  func(tc *tls.Conn, cancel func())
		want error
	}{
		{"something else", func(tc *tls.Conn, _ func()) { tc.Write([]byte("mortar plain?X")) }, ErrFrame},
		{"a frame", func(tc *tls.Conn, _ func()) { tc.Write(make([]byte, 100)) }, ErrFrame},
		{"goodbye", func(tc *tls.Conn, _ func()) { tc.Close() }, ErrPeerClosed},
		{"nothing, and is not waited for", func(_ *tls.Conn, cancel func()) { cancel() }, context.Canceled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, c := tlsPair(t, server, client)
			defer c.Close()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			tt.say(c, cancel)
			if _, err := Plain(ctx, s, false, true); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

// TestPlainLost: damage on the clear wire is noticed.
func TestPlainLost(t *testing.T) {
	a, b := netPair(t, "plain")
	h := hello{version: Version, crc: true, maxCalls: 16, maxBytes: MaxBody, maxBody: MaxBody}
	bad := frame(header{kind: 1}, true, []byte("some bytes"))
	bad[headerSize+3] ^= 1
	go func() {
		a.Write(h.encode())
		a.Write(bad)
	}()
	c := New(b, Options{Handler: HandlerFunc(func(*Conn, Message) { t.Error("a damaged frame was delivered") })})
	if err := c.Run(t.Context()); !errors.Is(err, ErrFrame) || !strings.Contains(err.Error(), "checksum") {
		t.Errorf("got %v, want ErrFrame for the checksum", err)
	}
	a.Close()
}

func TestHandshakeFails(t *testing.T) {
	server, _ := testTLS(t)
	_, stranger := testTLS(t)
	t.Run("unknown CA", func(t *testing.T) {
		an, bn, _ := Pipe()
		go Server(t.Context(), an, server)
		if _, err := Client(t.Context(), bn, stranger); err == nil || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("got %v", err)
		}
		if _, err := bn.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("the connection is still open: %v", err)
		}
	})
	t.Run("not TLS", func(t *testing.T) {
		an, bn, _ := Pipe()
		go bn.Write([]byte("SSH-2.0-OpenSSH_9.9\r\n"))
		if _, err := Server(t.Context(), an, server); err == nil || !strings.Contains(err.Error(), "TLS with") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("canceled", func(t *testing.T) {
		an, _, _ := Pipe()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := Server(ctx, an, server); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("silent", func(t *testing.T) {
		an, _, _ := Pipe()
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := Server(ctx, an, server); !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}
