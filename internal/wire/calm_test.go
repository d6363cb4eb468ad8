package wire

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// calmPair returns both ends of a unix connection, one of them calm.
func calmPair(t *testing.T) (*calm, net.Conn) {
	t.Helper()
	a, b := netPair(t, "unix")
	c, ok := calmed(a).(*calm)
	if !ok {
		t.Fatal("a unix socket was left as it was")
	}
	t.Cleanup(func() { c.Close(); b.Close() })
	return c, b
}

// TestCalmHearsOfNoRoom looks at what this process's epoll descriptors wait for: nobody for
// room in the socket of a connection, or each read of the other side would wake this one.
func TestCalmHearsOfNoRoom(t *testing.T) {
	an, bn := netPair(t, "unix")
	before := socketOf(t, an)
	if !waited(t, before)[unix.EPOLLOUT] {
		t.Fatal("the runtime does not wait for room in a socket: this test sees nothing")
	}
	a, b := New(an, Options{}), New(bn, Options{Handler: echo})
	run(t, a)
	run(t, b)
	for i := range 3 {
		if got, err := a.Call(t.Context(), 1, fmt.Append(nil, i)); err != nil || string(got) != fmt.Sprint(i) {
			t.Fatalf("call %d: %q, %v", i, got, err)
		}
	}
	c, ok := a.Net().(*calm)
	if !ok {
		t.Fatalf("a connection over a unix socket uses %T", a.Net())
	}
	c.mu.RLock()
	fd := c.fd
	c.mu.RUnlock()
	if is := waited(t, fd); is[unix.EPOLLOUT] || !is[unix.EPOLLIN] {
		t.Errorf("epolls wait for %v of the socket, want for it to be readable and not for room", is)
	}
}

func socketOf(t *testing.T, nc net.Conn) (fd int) {
	rc, err := nc.(*net.UnixConn).SyscallConn()
	if err == nil {
		err = rc.Control(func(f uintptr) { fd = int(f) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

var watchedLine = regexp.MustCompile(`tfd: +(\d+) events: +([0-9a-f]+)`)

// waited is what this process's epolls wait for of a descriptor.
func waited(t *testing.T, fd int) map[int]bool {
	t.Helper()
	infos, err := filepath.Glob("/proc/self/fdinfo/*")
	if err != nil {
		t.Fatal(err)
	}
	events := map[int]bool{}
	for _, path := range infos {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // closed meanwhile
		}
		for _, m := range watchedLine.FindAllStringSubmatch(string(text), -1) {
			if m[1] != strconv.Itoa(fd) {
				continue
			}
			mask, err := strconv.ParseUint(m[2], 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range []int{unix.EPOLLIN, unix.EPOLLOUT} {
				events[e] = events[e] || mask&uint64(e) != 0
			}
		}
	}
	return events
}

// TestCalmMovesMuch: more than the sockets hold goes through, both ways at once.
func TestCalmMovesMuch(t *testing.T) {
	c, far := calmPair(t)
	data := make([]byte, 8<<20)
	rand.Read(data)
	errs := make(chan error)
	for _, nc := range []net.Conn{c, far} {
		go func() {
			n, err := nc.Write(data)
			if err == nil && n != len(data) {
				err = io.ErrShortWrite
			}
			errs <- err
		}()
		go func() {
			got := make([]byte, len(data))
			_, err := io.ReadFull(nc, got)
			if err == nil && !bytes.Equal(got, data) {
				err = errors.New("other bytes arrived")
			}
			errs <- err
		}()
	}
	for range 4 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	far.Close()
	if n, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after the other side has closed: %d bytes, %v", n, err)
	}
	if _, err := c.Write(data); !errors.Is(err, unix.EPIPE) {
		t.Errorf("writing to whom has closed: %v", err)
	}
}

// TestCalmWaitsEnd: a time limit and Close end both waits, and Write says how much went.
func TestCalmWaitsEnd(t *testing.T) {
	c, far := calmPair(t)
	full := make([]byte, 64<<20)
	if err := c.SetDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read: %v", err)
	}
	sent, err := c.Write(full)
	if !errors.Is(err, os.ErrDeadlineExceeded) || sent == 0 || sent == len(full) {
		t.Errorf("write: %d bytes, %v", sent, err)
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	errs := make(chan error)
	go func() { _, err := c.Read(make([]byte, 1)); errs <- err }()
	go func() { _, err := c.Write(full); errs <- err }()
	if n, err := io.CopyN(io.Discard, far, int64(sent)+1); err != nil { // the write has gone on
		t.Fatalf("%d bytes of %d arrived: %v", n, sent+1, err)
	}
	c.Close()
	for range 2 {
		if err := <-errs; err == nil || !strings.Contains(err.Error(), "closed") {
			t.Errorf("waiting for a socket that was closed: %v", err)
		}
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("read from a closed socket")
	}
	if err := c.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed twice: %v", err)
	}
}
