package wire

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// frame encodes a frame as a correct sender does.
func frame(h header, crc bool, body []byte) []byte {
	h.length = len(body)
	if crc {
		h.crc = h.sum(body)
	}
	var head [headerSize]byte
	h.encode(&head)
	return append(head[:], body...)
}

func TestParseHeader(t *testing.T) {
	good := frame(header{kind: 7, id: 3}, false, make([]byte, 10))
	change := func(at int, v byte) []byte {
		b := bytes.Clone(good)
		b[at] = v
		return b
	}
	length := func(n uint32) []byte {
		b := bytes.Clone(good)
		binary.LittleEndian.PutUint32(b, n)
		return b
	}
	tests := []struct {
		name string
		b    []byte
		want string // part of the error, "" for none
	}{
		{"good", good, ""},
		{"empty body", length(0), ""},
		{"limit-1", length(MaxBody - 1), ""},
		{"limit", length(MaxBody), ""},
		{"limit+1", length(MaxBody + 1), "body of 1114113 bytes"},
		{"2^31", length(1 << 31), "body of"},
		{"2^32-1", length(1<<32 - 1), "body of"},
		{"kind 0", change(16, 0), "kind 0"},
		{"unknown kind is the handler's business", change(16, 255), ""},
		{"reply", change(17, flagReply), ""},
		{"unknown flag", change(17, 4), "flags 0x4"},
		{"two flags", change(17, 3), "flags 0x3"},
		{"reply to nothing", frame(header{kind: 1, flags: flagReply}, false, nil), "one-way"},
		{"cancel nothing", frame(header{kind: 1, flags: flagCancel}, false, nil), "one-way"},
		{"cancel with body", change(17, flagCancel), "body"},
		{"reserved", change(18, 1), "reserved"},
		{"reserved too", change(19, 1), "reserved"},
		{"checksum where there is none", change(4, 1), "checksum"},
		{"all zero", make([]byte, headerSize), "kind 0"},
		{"text", []byte("GET / HTTP/1.1\r\nHost: x\r\n"), "body of"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := parseHeader(tt.b, false)
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("got %v, want no error", err)
			case tt.want != "" && (!errors.Is(err, ErrFrame) || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %v, want ErrFrame with %q", err, tt.want)
			}
		})
	}
}

func TestChecksum(t *testing.T) {
	body := []byte("some bytes")
	good := frame(header{kind: 7, id: 3}, true, body)
	for at := range good {
		b := bytes.Clone(good)
		b[at] ^= 0x40
		h, err := parseHeader(b, true)
		if err == nil && h.length == len(body) {
			err = h.check(b[headerSize:])
		} else if err == nil {
			continue // a wrong length: the checksum fails with the bytes that follow
		}
		if !errors.Is(err, ErrFrame) {
			t.Errorf("byte %d changed: got %v, want ErrFrame", at, err)
		}
	}
	h, err := parseHeader(good, true)
	if err != nil || h.check(body) != nil {
		t.Errorf("good frame: %v, %v", err, h.check(body))
	}
}

func TestParseHello(t *testing.T) {
	good := hello{version: Version, maxCalls: 16, maxBytes: MaxBody, maxBody: MaxBody}
	with := func(f func(*hello)) []byte {
		h := good
		f(&h)
		return h.encode()
	}
	tests := []struct {
		name string
		b    []byte
		is   error
		want string
	}{
		{"good", good.encode(), nil, ""},
		{"with checksums", with(func(h *hello) { h.crc = true }), nil, ""},
		{"older", with(func(h *hello) { h.version = 0 }), ErrVersion, "wire version 0 there, 1 here"},
		{"newer", with(func(h *hello) { h.version = 9 }), ErrVersion, "wire version 9 there, 1 here"},
		{"web", []byte("GET / HTTP/1.1\r\nHost: localhost\r\n"), ErrVersion, `"GET / HT"`},
		{"zeros", make([]byte, helloSize), ErrVersion, "does not speak"},
		{"unknown flag", append(append([]byte(magic), 1, 0, 2, 0), good.encode()[12:]...), ErrFrame, "flags 0x2"},
		{"too few calls", with(func(h *hello) { h.maxCalls = 15 }), ErrFrame, "limits"},
		{"too few bytes", with(func(h *hello) { h.maxBytes = MaxBody - 1 }), ErrFrame, "limits"},
		{"other body", with(func(h *hello) { h.maxBody = 2 * MaxBody }), ErrFrame, "limits"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := parseHello(tt.b)
			if !errors.Is(err, tt.is) || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %v with %q", err, tt.is, tt.want)
			}
		})
	}
}

// script is a connection whose other side says something fixed, and listens to nothing.
type script struct {
	r    io.Reader
	done chan struct{}
}

func (s *script) Read(b []byte) (int, error)       { return s.r.Read(b) }
func (s *script) Write(b []byte) (int, error)      { return len(b), nil }
func (s *script) Close() error                     { return nil }
func (s *script) LocalAddr() net.Addr              { return memAddr{"here", "1"} }
func (s *script) RemoteAddr() net.Addr             { return memAddr{"there", "1"} }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// slowly gives its bytes in pieces of n.
type slowly struct {
	r io.Reader
	n int
}

func (s *slowly) Read(b []byte) (int, error) { return s.r.Read(b[:min(len(b), s.n)]) }

// FuzzFrame reads arbitrary bytes as a stream of frames. Whatever they are,
// the connection ends with an error, and what was delivered before is exactly what the
// stream began with.
func FuzzFrame(f *testing.F) {
	whole := func(frames ...[]byte) []byte { return bytes.Join(frames, nil) }
	big := bytes.Repeat([]byte("x"), 70<<10)
	for _, crc := range []bool{false, true} {
		f.Add([]byte{}, crc, 1)
		f.Add(frame(header{kind: 1}, crc, nil), crc, 1)
		f.Add(frame(header{kind: 1}, !crc, []byte("abc")), crc, 7)
		f.Add(whole(frame(header{kind: 2, id: 1}, crc, []byte("call")), frame(header{kind: 3}, crc, []byte("one-way"))), crc, 19)
		f.Add(whole(frame(header{kind: 2, id: 9}, crc, nil), frame(header{kind: 2, id: 9, flags: flagCancel}, crc, nil)), crc, 100)
		f.Add(frame(header{kind: 2, id: 9, flags: flagReply}, crc, nil), crc, 100)
		f.Add(whole(frame(header{kind: 5}, crc, big), frame(header{kind: 6}, crc, big[:100])), crc, 40<<10)
		f.Add(frame(header{kind: 5}, crc, big)[:60<<10], crc, 9<<10)
		f.Add(bytes.Repeat([]byte{0xff}, 64), crc, 64)
		f.Add(make([]byte, 64), crc, 64)
	}
	f.Fuzz(func(t *testing.T, stream []byte, crc bool, piece int) {
		if piece < 1 || piece > 1<<20 {
			piece = 1
		}
		var again []byte
		h := HandlerFunc(func(c *Conn, m Message) {
			again = append(again, frame(header{kind: m.Kind, id: m.ID}, crc, m.Body)...)
			c.Recycle(m.Body)
		})
		hi := hello{version: Version, crc: crc, maxCalls: 16, maxBytes: MaxBody, maxBody: MaxBody}
		r := &slowly{bytes.NewReader(append(hi.encode(), stream...)), piece}
		c := New(&script{r: r}, Options{Handler: h, Integrity: crc})
		err := c.Run(context.Background())
		if err == nil {
			t.Fatal("the connection did not end")
		}
		if !errors.Is(err, ErrFrame) && !errors.Is(err, ErrPeerClosed) && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("unexpected end: %v", err)
		}
		// A cancellation delivers nothing, so only streams without can be compared.
		if !bytes.Contains(stream, []byte{flagCancel, 0, 0}) && !bytes.HasPrefix(stream, again) {
			t.Errorf("delivered %x of %x", again, stream)
		}
	})
}
