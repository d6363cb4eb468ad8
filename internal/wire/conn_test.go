package wire

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// pattern is n bytes that can be recognised.
func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7) + byte(i>>8) + seed
	}
	return b
}

// sizes are around every limit where the way of a body through this package changes.
var sizes = []int{
	0, 1, headerSize, 100, directRead - 1, directRead, directRead + 1, copyLimit, copyLimit + 1,
	1<<minClass - 1, 1 << minClass, 1<<minClass + slack, 1<<minClass + slack + 1,
	readBuffer - headerSize - 1, readBuffer - headerSize, readBuffer, readBuffer + 1,
	stallUnit, stallUnit + 1, 1 << 20, MaxBody - 1, MaxBody,
}

func TestBodies(t *testing.T) {
	for _, kind := range transports {
		t.Run(kind, func(t *testing.T) {
			a, b := connPair(t, kind, Options{}, Options{Handler: echo})
			var wg sync.WaitGroup
			for round := range 3 { // the later ones with recycled buffers
				for i, n := range sizes {
					wg.Go(func() {
						body := pattern(n, byte(i+round))
						cut := n / 3
						got, err := a.Call(t.Context(), 9, body[:cut], nil, body[cut:])
						if err != nil {
							t.Errorf("%d bytes: %v", n, err)
						} else if !bytes.Equal(got, body) {
							t.Errorf("%d bytes: came back otherwise", n)
						}
						a.Recycle(got)
					})
				}
				wg.Wait()
			}
			if _, err := a.Call(t.Context(), 9, make([]byte, MaxBody), []byte{1}); !errors.Is(err, ErrTooLong) {
				t.Errorf("body of MaxBody+1: %v, want ErrTooLong", err)
			}
			if a.Err() != nil || b.Err() != nil {
				t.Errorf("connection ended: %v, %v", a.Err(), b.Err())
			}
		})
	}
}

// TestOrder has several goroutines send by all means at once. What each of
// them sent has to arrive in its order.
func TestOrder(t *testing.T) {
	const senders, each = 4, 500
	for _, kind := range transports {
		t.Run(kind, func(t *testing.T) {
			var next [senders]uint32
			done := make(chan struct{})
			total := 0
			h := HandlerFunc(func(c *Conn, m Message) {
				who, n := m.Body[0], binary.LittleEndian.Uint32(m.Body[1:])
				if next[who] != n {
					t.Errorf("sender %d: got %d, want %d", who, n, next[who])
				}
				next[who] = n + 1
				if m.ID != 0 {
					c.Reply(m)
				}
				if total++; total == senders*each {
					close(done)
				}
			})
			a, _ := connPair(t, kind, Options{}, Options{Handler: h})
			var wg sync.WaitGroup
			for who := range senders {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(who), 0))
					for n := range each {
						body := binary.LittleEndian.AppendUint32([]byte{byte(who)}, uint32(n))
						pad := make([]byte, rng.IntN(100))
						if rng.IntN(20) == 0 {
							pad = make([]byte, rng.IntN(100<<10))
						}
						var err error
						switch rng.IntN(4) {
						case 0:
							err = a.Send(1, body, pad)
						case 1:
							err = a.Queue(1, body, pad)
						case 2:
							a.Queue(1, body, pad)
							a.Flush()
						case 3:
							_, err = a.Call(t.Context(), 1, body, pad)
						}
						if err != nil {
							t.Errorf("sender %d: %v", who, err)
							return
						}
					}
				})
			}
			wg.Wait()
			a.Flush()
			<-done
		})
	}
}

// hold is a Handler that keeps calls until they are let go.
type hold struct {
	mu    sync.Mutex
	calls []Message
	got   chan Message
	gone  chan uint64
}

func newHold() *hold {
	return &hold{got: make(chan Message, 10000), gone: make(chan uint64, 10000)}
}

func (h *hold) Message(c *Conn, m Message) { h.got <- m }
func (h *hold) Cancel(c *Conn, id uint64)  { h.gone <- id }

func TestCallConcurrent(t *testing.T) {
	h := newHold()
	a, b := connPair(t, "unix", Options{}, Options{Handler: h})
	const n = 1000
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			got, err := a.Call(t.Context(), 1, fmt.Append(nil, i))
			if err != nil || string(got) != fmt.Sprintf("reply to %d", i) {
				t.Errorf("call %d: %q, %v", i, got, err)
			}
		})
	}
	all := make([]Message, n)
	for i := range all {
		all[i] = <-h.got
	}
	rand.Shuffle(n, func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, m := range all {
		if err := b.Reply(m, []byte("reply to "), m.Body); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
}

// TestCallLimit: a caller waits until the other side takes another call, and
// Go does not wait.
func TestCallLimit(t *testing.T) {
	tests := []struct {
		name string
		o    Options
		size int
		fit  int
	}{
		{"calls", Options{MaxCalls: 20}, 10, 20},
		{"bytes", Options{MaxCallBytes: 3 << 20}, 1 << 20, 3},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHold()
				tt.o.Handler = h
				an, bn, _ := Pipe()
				a, b := New(an, Options{}), New(bn, tt.o)
				run(t, a)
				run(t, b)
				synctest.Wait()
				body := make([]byte, tt.size)
				done := make(chan error, 100)
				for range tt.fit + 2 {
					go func() {
						_, err := a.Call(t.Context(), 1, body)
						done <- err
					}()
				}
				synctest.Wait()
				if len(h.got) != tt.fit {
					t.Errorf("%d calls arrived, want %d", len(h.got), tt.fit)
				}
				if err := a.Go(1, func([]byte, error) {}, body); err != ErrBacklog {
					t.Errorf("Go: %v, want ErrBacklog", err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				if _, err := a.Call(ctx, 1, body); err != context.DeadlineExceeded {
					t.Errorf("Call: %v, want a timeout", err)
				}
				for range tt.fit + 2 {
					b.Reply(<-h.got)
					if err := <-done; err != nil {
						t.Error(err)
					}
				}
				if err := a.Go(1, func([]byte, error) {}, body); err != nil {
					t.Errorf("Go afterwards: %v", err)
				}
			})
		})
	}
}

func TestCanceled(t *testing.T) {
	h := newHold()
	a, b := connPair(t, "unix", Options{}, Options{Handler: h})
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("no longer needed")
	errc := make(chan error)
	go func() {
		_, err := a.Call(ctx, 1, []byte("x"))
		errc <- err
	}()
	m := <-h.got
	cancel(why)
	if err := <-errc; err != why {
		t.Errorf("canceled call: %v, want %v", err, why)
	}
	if id := <-h.gone; id != m.ID {
		t.Errorf("canceled call %d, want %d", id, m.ID)
	}
	// The late reply is dropped, and the connection goes on.
	b.Reply(m, []byte("late"))
	go func() { m := <-h.got; b.Reply(m, []byte("in time")) }()
	if got, err := a.Call(t.Context(), 1); err != nil || string(got) != "in time" {
		t.Errorf("next call: %q, %v", got, err)
	}
}

func TestClosed(t *testing.T) {
	for _, kind := range transports {
		t.Run(kind, func(t *testing.T) {
			h := newHold()
			a, b := connPair(t, kind, Options{}, Options{Handler: h})
			errc, donec := make(chan error, 10), make(chan error, 1)
			for range 10 {
				go func() {
					_, err := a.Call(t.Context(), 1)
					errc <- err
				}()
			}
			if err := a.Go(1, func(_ []byte, err error) { donec <- err }); err != nil {
				t.Fatal(err)
			}
			for range 11 {
				<-h.got
			}
			why := errors.New("enough")
			b.Close(why)
			for range 10 {
				if err := <-errc; !errors.Is(err, ErrPeerClosed) && !isReset(err) {
					t.Errorf("call: %v, want ErrPeerClosed", err)
				}
			}
			if err := <-donec; !errors.Is(err, ErrPeerClosed) && !isReset(err) {
				t.Errorf("Go: %v, want ErrPeerClosed", err)
			}
			<-a.Done()
			if err := b.Err(); err != why {
				t.Errorf("cause %v, want %v", err, why)
			}
			for what, err := range map[string]error{
				"Send": b.Send(1), "Queue": b.Queue(1), "Reply": b.Reply(Message{ID: 1}), "Room": b.Room(t.Context(), 1),
				"Drain": b.Drain(t.Context()), "Go": b.Go(1, func([]byte, error) { t.Error("done called") }),
			} {
				if err != why && what != "Drain" {
					t.Errorf("%s on a closed connection: %v, want %v", what, err, why)
				}
			}
			if _, err := b.Call(t.Context(), 1); err != why {
				t.Errorf("Call on a closed connection: %v", err)
			}
		})
	}
}

func isReset(err error) bool {
	return err != nil && (strings.Contains(err.Error(), "reset") || strings.Contains(err.Error(), "broken pipe"))
}

func TestContextEnds(t *testing.T) {
	an, bn := netPair(t, "unix")
	defer bn.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	c := New(an, Options{})
	errc := make(chan error)
	go func() { errc <- c.Run(ctx) }()
	why := errors.New("shutting down")
	cancel(why)
	if err := <-errc; err != why {
		t.Errorf("Run: %v, want %v", err, why)
	}
}

// TestBacklog fills the queue of a connection that nobody reads from.
func TestBacklog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		an, bn, n := Pipe()
		a := New(an, Options{MaxQueue: 4 << 20, Handler: echo})
		b := New(bn, Options{Handler: HandlerFunc(func(*Conn, Message) {})})
		run(t, a)
		run(t, b)
		synctest.Wait()
		n.Set("a", "b", Fault{Cut: true})
		body := make([]byte, 1<<20)
		sent := 0
		var err error
		for ; err == nil; sent++ {
			err = a.Send(1, body)
			synctest.Wait()
		}
		if err != ErrBacklog || sent != 4 { // the fourth did not fit, with the headers
			t.Errorf("message %d: %v, want ErrBacklog at 4", sent, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := a.Room(ctx, len(body)); err != context.DeadlineExceeded {
			t.Errorf("Room: %v, want a timeout", err)
		}
		if err := a.Drain(ctx); err != context.DeadlineExceeded {
			t.Errorf("Drain: %v, want a timeout", err)
		}
		// A call waits instead, and can be canceled meanwhile.
		if _, err := a.Call(ctx, 1, body); err != context.DeadlineExceeded {
			t.Errorf("Call: %v, want a timeout", err)
		}
		n.Set("a", "b", Fault{})
		if err := a.Drain(t.Context()); err != nil {
			t.Errorf("Drain: %v", err)
		}
		if err := a.Room(t.Context(), len(body)); err != nil {
			t.Errorf("Room: %v", err)
		}
	})
}

// TestReplyBacklog: a reply that cannot be queued must not leave its caller waiting.
func TestReplyBacklog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		an, bn, n := Pipe()
		h := newHold()
		a := New(an, Options{})
		b := New(bn, Options{Handler: h, MaxQueue: 1 << 20})
		run(t, a)
		run(t, b)
		synctest.Wait()
		for range 3 {
			go a.Call(t.Context(), 1)
		}
		synctest.Wait()
		n.Set("b", "a", Fault{Cut: true})
		body := make([]byte, 900<<10)
		if err := b.Reply(<-h.got, body); err != nil {
			t.Errorf("first reply: %v", err)
		}
		if err := b.Reply(<-h.got, body); !errors.Is(err, ErrBacklog) {
			t.Errorf("second reply: %v, want ErrBacklog", err)
		}
		if err := b.Err(); !errors.Is(err, ErrBacklog) {
			t.Errorf("connection: %v, want its end by ErrBacklog", err)
		}
		n.Set("b", "a", Fault{})
	})
}

// TestStalls: an idle connection lives for ever, one that stops in the middle
// of a frame or does not read does not.
func TestStalls(t *testing.T) {
	hi := hello{version: Version, maxCalls: 16, maxBytes: MaxBody, maxBody: MaxBody}
	whole := frame(header{kind: 1}, false, make([]byte, 100<<10))
	tests := []struct {
		name string
		say  func(nc net.Conn)
		want error // nil: it lives on
	}{
		{"idle", func(nc net.Conn) { nc.Write(hi.encode()); nc.Write(whole) }, nil},
		{"silent", func(nc net.Conn) {}, ErrStalled},
		{"half a hello", func(nc net.Conn) { nc.Write(hi.encode()[:9]) }, ErrStalled},
		{"half a header", func(nc net.Conn) { nc.Write(hi.encode()); nc.Write(whole[:9]) }, ErrStalled},
		{"half a body", func(nc net.Conn) { nc.Write(hi.encode()); nc.Write(whole[:50<<10]) }, ErrStalled},
		{"a byte at a time", func(nc net.Conn) {
			nc.Write(hi.encode())
			for i := range whole {
				if _, err := nc.Write(whole[i : i+1]); err != nil {
					return
				}
				time.Sleep(time.Second) // of the bubble's time: this is the slowness under test
			}
		}, ErrStalled},
		{"slow but steady", func(nc net.Conn) {
			nc.Write(hi.encode())
			for b := whole; len(b) > 0; b = b[min(len(b), 8<<10):] {
				nc.Write(b[:min(len(b), 8<<10)])
				time.Sleep(time.Second)
			}
		}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				an, bn, _ := Pipe()
				c := New(an, Options{Handler: HandlerFunc(func(*Conn, Message) {})})
				run(t, c)
				said := make(chan struct{})
				go func() { tt.say(bn); close(said) }()
				time.Sleep(time.Hour) // of the bubble's time
				if err := c.Err(); !errors.Is(err, tt.want) || tt.want == nil && err != nil {
					t.Errorf("after an hour: %v, want %v", err, tt.want)
				}
				c.Close(nil)
				<-said
				bn.Close()
			})
		})
	}
	t.Run("does not read", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			an, bn, _ := Pipe()
			c := New(an, Options{})
			run(t, c)
			bn.Write(hi.encode())
			c.Send(1, make([]byte, 1<<20))
			time.Sleep(time.Minute)
			if err := c.Err(); !errors.Is(err, ErrStalled) {
				t.Errorf("after a minute: %v, want ErrStalled", err)
			}
			bn.Close()
		})
	})
}

// TestRefused has each kind of nonsense end the connection with a line in the log.
func TestRefused(t *testing.T) {
	hi := hello{version: Version, maxCalls: 16, maxBytes: MaxBody, maxBody: MaxBody}
	newer := hi
	newer.version = 2
	checked := hi
	checked.crc = true
	say := func(h hello, frames ...[]byte) []byte { return append(h.encode(), bytes.Join(frames, nil)...) }
	var many [][]byte
	for i := range 21 {
		many = append(many, frame(header{kind: 1, id: uint64(i + 1)}, false, nil))
	}
	tests := []struct {
		name    string
		said    []byte
		handler Handler
		want    string
	}{
		{"version", say(newer), nil, "wire version 2 there, 1 here"},
		{"not mortar", []byte("SSH-2.0-OpenSSH_9.9 and so on\r\n"), nil, "does not speak mortar"},
		{"checksums on one side", say(checked), nil, "one side wants checksums"},
		{"reply to nothing", say(hi, frame(header{kind: 1, id: 5, flags: flagReply}, false, nil)), nil, "reply of kind 1 to no call"},
		{"nobody listens", say(hi, frame(header{kind: 1}, false, nil)), nil, "nothing but replies"},
		{"too long", say(hi, []byte{1, 0, 0x11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}), nil, "body of 1114113 bytes"},
		{"too many calls", say(hi, many...), newHold(), "more than 20 calls"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			an, bn, _ := Pipe()
			defer bn.Close()
			var log bytes.Buffer
			c := New(an, Options{Handler: tt.handler, MaxCalls: 20, Log: slog.New(slog.NewTextHandler(&log, nil))})
			go bn.Write(tt.said)
			err := c.Run(t.Context())
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if !strings.Contains(log.String(), "connection refused") || !strings.Contains(log.String(), tt.want) {
				t.Errorf("log has %q", log.String())
			}
		})
	}
}

// TestGo forwards calls through a middle connection without a goroutine each.
func TestGo(t *testing.T) {
	far, near := connPair(t, "unix", Options{}, Options{Handler: echo})
	middle := HandlerFunc(func(c *Conn, m Message) {
		if err := far.Go(m.Kind, func(body []byte, err error) {
			if err != nil {
				c.Close(err)
				return
			}
			c.Reply(m, body)
		}, m.Body); err != nil {
			t.Error(err)
		}
	})
	a, _ := connPair(t, "unix", Options{}, Options{Handler: middle})
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for range 100 {
				want := pattern(i*i*100, byte(i))
				if got, err := a.Call(t.Context(), 1, want); err != nil || !bytes.Equal(got, want) {
					t.Errorf("call %d: %d bytes, %v", i, len(got), err)
					return
				}
			}
		})
	}
	wg.Wait()
	_ = near
}

// TestPartsAreBack: when Call returns, for whatever reason, nobody reads its
// parts any more. The race detector is the judge.
func TestPartsAreBack(t *testing.T) {
	for _, kind := range append([]string{"mem"}, transports...) {
		t.Run(kind, func(t *testing.T) {
			var an, bn net.Conn
			if kind == "mem" {
				an, bn, _ = Pipe()
			} else {
				an, bn = netPair(t, kind)
			}
			var bad atomic.Int64
			b := New(bn, Options{Handler: HandlerFunc(func(c *Conn, m Message) {
				for _, x := range m.Body {
					if x != m.Body[0] {
						bad.Add(1)
						break
					}
				}
				c.Recycle(m.Body)
				c.Reply(m)
			})})
			a := New(an, Options{MaxQueue: 2 << 20})
			run(t, a)
			run(t, b)
			var wg sync.WaitGroup
			for who := range 4 {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(who), 1))
					body := make([]byte, 300<<10)
					for i := range 60 {
						ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rng.IntN(300))*time.Microsecond)
						for j := range body {
							body[j] = byte(i)
						}
						a.Call(ctx, 1, body)
						cancel()
					}
				})
			}
			wg.Wait()
			if n := bad.Load(); n > 0 || a.Err() != nil || b.Err() != nil {
				t.Errorf("%d bodies were changed under way; %v, %v", n, a.Err(), b.Err())
			}
		})
	}
}

// TestBeforeRun: a connection can be used before Run.
func TestBeforeRun(t *testing.T) {
	an, bn := netPair(t, "unix")
	got := make(chan string, 10)
	a := New(an, Options{})
	b := New(bn, Options{Handler: HandlerFunc(func(c *Conn, m Message) { got <- string(m.Body) })})
	a.Send(1, []byte("one"))
	a.Queue(1, []byte("two"))
	a.Flush()
	if err := a.Go(1, func([]byte, error) {}, []byte("three")); err != nil {
		t.Error(err)
	}
	run(t, b)
	run(t, a)
	for _, want := range []string{"one", "two", "three"} {
		if s := <-got; s != want {
			t.Errorf("got %q, want %q", s, want)
		}
	}
}

// TestDrain: last words arrive.
func TestDrain(t *testing.T) {
	for _, kind := range transports {
		t.Run(kind, func(t *testing.T) {
			n := 0
			ended := make(chan struct{})
			h := HandlerFunc(func(c *Conn, m Message) { n++ })
			an, bn := netPair(t, kind)
			a, b := New(an, Options{}), New(bn, Options{Handler: h})
			run(t, a)
			go func() { b.Run(context.Background()); close(ended) }()
			for range 100 {
				a.Send(1, make([]byte, 20<<10))
			}
			if err := a.Drain(t.Context()); err != nil {
				t.Errorf("Drain: %v", err)
			}
			a.Close(nil)
			<-ended
			if n != 100 {
				t.Errorf("%d of 100 messages arrived", n)
			}
		})
	}
}

// What a reply was made of may be used again as soon as ReplySent has returned.
func TestReplySent(t *testing.T) {
	for _, kind := range transports {
		t.Run(kind, func(t *testing.T) {
			// Waited for after the connections have ended, whose cleanup comes first:
			// only then does nobody add to it any more.
			var wg sync.WaitGroup
			t.Cleanup(wg.Wait)
			memory := sync.Pool{New: func() any { return new([1 << 20]byte) }}
			answer := HandlerFunc(func(c *Conn, m Message) {
				wg.Go(func() {
					n := int(binary.LittleEndian.Uint32(m.Body))
					b := memory.Get().(*[1 << 20]byte)
					copy(b[:n], pattern(n, byte(n)))
					if err := c.ReplySent(context.Background(), m, []byte("head"), b[:n]); err != nil {
						return
					}
					clear(b[:n])
					memory.Put(b)
				})
			})
			a, _ := connPair(t, kind, Options{}, Options{Handler: answer})
			var calls sync.WaitGroup
			for k := range 4 {
				calls.Go(func() {
					for i := range 8 {
						n := (i*37+k)*9001%(1<<20) + 1
						got, err := a.Call(t.Context(), 9, binary.LittleEndian.AppendUint32(nil, uint32(n)))
						if err != nil || string(got[:4]) != "head" || !bytes.Equal(got[4:], pattern(n, byte(n))) {
							t.Errorf("%d bytes came otherwise (%v)", n, err)
						}
					}
				})
			}
			calls.Wait()
		})
	}
}

// Whoever handles a message may close the connection it came on.
func TestCloseFromHandler(t *testing.T) {
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			addr := "127.0.0.1:0"
			if network == "unix" {
				addr = filepath.Join(t.TempDir(), "s")
			}
			l, err := net.Listen(network, addr)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			enough := errors.New("enough")
			ended := make(chan error, 1)
			go func() {
				nc, err := l.Accept()
				if err != nil {
					ended <- err
					return
				}
				ended <- New(nc, Options{Handler: HandlerFunc(func(c *Conn, _ Message) { c.Close(enough) })}).Run(t.Context())
			}()
			nc, err := net.Dial(network, l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			c := New(nc, Options{})
			done := make(chan error, 1)
			go func() { done <- c.Run(t.Context()) }()
			if _, err := c.Call(t.Context(), 1, []byte("x")); !errors.Is(err, ErrPeerClosed) {
				t.Errorf("the call ended with %v", err)
			}
			if err := <-ended; !errors.Is(err, enough) {
				t.Errorf("the handler's side ended with %v", err)
			}
			<-done
		})
	}
}
