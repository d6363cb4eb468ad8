package wire

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func TestNetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNetwork(1)
		l, err := n.Listen("b:1")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.Listen("b:1"); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("second listener: %v", err)
		}
		if _, err := n.Dial(t.Context(), "a", "b:2"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("nobody listens: %v", err)
		}
		dial := func() (x, y net.Conn) {
			t.Helper()
			x, err := n.Dial(t.Context(), "a", "b:1")
			if err != nil {
				t.Fatal(err)
			}
			if y, err = l.Accept(); err != nil {
				t.Fatal(err)
			}
			return x, y
		}
		buf := make([]byte, 10)
		took := func(f func()) time.Duration {
			from := time.Now()
			f()
			return time.Since(from)
		}
		read := func(c net.Conn, want string) time.Duration {
			t.Helper()
			return took(func() {
				if k, err := io.ReadFull(c, buf[:len(want)]); err != nil || string(buf[:k]) != want {
					t.Errorf("read %q, %v, want %q", buf[:k], err, want)
				}
			})
		}

		x, y := dial()
		if x.LocalAddr().String() != y.RemoteAddr().String() || y.LocalAddr().String() != "b:1" {
			t.Errorf("addresses: %v %v", x.LocalAddr(), y.LocalAddr())
		}
		x.Write([]byte("one"))
		if d := read(y, "one"); d != 0 {
			t.Errorf("a perfect link took %v", d)
		}

		n.Set("a", "b", Fault{Delay: time.Second})
		x.Write([]byte("two"))
		y.Write([]byte("back"))
		if d := read(x, "back"); d != 0 {
			t.Errorf("the other direction took %v", d)
		}
		if d := read(y, "two"); d != time.Second {
			t.Errorf("a delay of 1 s took %v", d)
		}
		x.Write([]byte("s"))
		n.Set("a", "b", Fault{})
		x.Write([]byte("f"))
		if d := read(y, "sf"); d != time.Second {
			t.Errorf("the fast byte overtook the slow one: %v", d)
		}

		n.Set("a", "b", Fault{Loss: 1})
		x.Write([]byte("l"))
		if d := read(y, "l"); d != RetransmitDelay {
			t.Errorf("a loss took %v", d)
		}

		n.Isolate("b", true)
		if k, err := x.Write([]byte("late")); k != 4 || err != nil {
			t.Errorf("write into a cut link: %d, %v", k, err)
		}
		y.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := y.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read from a cut link: %v", err)
		}
		y.SetReadDeadline(time.Time{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := n.Dial(ctx, "a", "b:1"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("dial over a cut link: %v", err)
		}
		x.SetWriteDeadline(time.Now().Add(time.Second))
		if k, err := x.Write(make([]byte, 1<<20)); k != memWindow-4 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a full window took %d more bytes, %v", k, err)
		}
		n.Set("a", "b", Fault{}) // by name, it is not cut
		go func() { time.Sleep(time.Hour); n.Isolate("b", false) }()
		if d := read(y, "late"); d != time.Hour {
			t.Errorf("a link cut for an hour took %v", d)
		}

		x.Close()
		io.Copy(io.Discard, y) // to the end
		if _, err := y.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("write to a closed end: %v", err)
		}
		if _, err := x.Read(buf); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read from a closed end: %v", err)
		}

		synctest.Wait()
		x, y = dial()
		n.Kill("b")
		for _, c := range []net.Conn{x, y} {
			if _, err := c.Read(buf); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("read after a kill: %v", err)
			}
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("accept after a kill: %v", err)
		}
		if _, err := n.Dial(t.Context(), "a", "b:1"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial after a kill: %v", err)
		}
	})
}

// TestCutIsSilent: a power cut is noticed by nobody.
func TestCutIsSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, y, n := Pipe()
		n.SetBoth("a", "b", Fault{Cut: true})
		n.Kill("b")
		x.SetReadDeadline(time.Now().Add(time.Hour))
		if _, err := x.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the other side of a cut: %v", err)
		}
		if _, err := y.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the killed side: %v", err)
		}
		n.SetBoth("a", "b", Fault{})
		if _, err := x.Write([]byte{1}); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("after mending: %v", err)
		}
	})
}
