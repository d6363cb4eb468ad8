package codec_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"mortar/internal/codec"
	"mortar/internal/codec/codectest"
)

// all has a field of every kind that a Coder knows.
type all struct {
	A uint8
	B uint16
	C uint32
	D uint64
	E int64
	F bool
	G [5]byte
	H []byte
	I string
	J []pair
}

type pair struct {
	K uint16
	V string
}

const (
	maxH = 1000
	maxI = 300
	maxJ = 10
)

func (a *all) Code(c *codec.Coder) {
	c.U8(&a.A)
	c.U16(&a.B)
	c.U32(&a.C)
	c.U64(&a.D)
	c.I64(&a.E)
	c.Bool(&a.F)
	c.Array(a.G[:])
	c.Bytes(&a.H, maxH)
	c.String(&a.I, maxI)
	codec.Slice(c, &a.J, maxJ, func(c *codec.Coder, p *pair) {
		c.U16(&p.K)
		c.String(&p.V, maxI)
	})
}

func TestLayout(t *testing.T) {
	a := all{
		A: 1, B: 0x0203, C: 0x04050607, D: 0x08090a0b0c0d0e0f, E: -2, F: true, G: [5]byte{1, 2, 3, 4, 5},
		H: []byte("bytes"), I: "text", J: []pair{{1, "x"}, {2, ""}},
	}
	want := "\x01" + "\x03\x02" + "\x07\x06\x05\x04" + "\x0f\x0e\x0d\x0c\x0b\x0a\x09\x08" +
		"\xfe\xff\xff\xff\xff\xff\xff\xff" + "\x01" + "\x01\x02\x03\x04\x05" +
		"\x05\x00\x00\x00bytes" + "\x04\x00\x00\x00text" +
		"\x02\x00\x00\x00" + "\x01\x00\x01\x00\x00\x00x" + "\x02\x00\x00\x00\x00\x00"
	if got := codec.Append([]byte("before"), &a); string(got) != "before"+want {
		t.Errorf("got  %x\nwant %x", got, "before"+want)
	}
	codectest.RoundTrip(t, &a)
}

func TestRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range 100 {
		var a all
		codectest.Fill(rng, &a, nil)
		codectest.RoundTrip(t, &a)
	}
	codectest.RoundTrip(t, &all{})
}

func TestLimits(t *testing.T) {
	const atH = 1 + 2 + 4 + 8 + 8 + 1 + 5
	a := new(all)
	codectest.Limits(t, a, maxH, atH, func(n int) { a.H = make([]byte, n) })
	a = new(all)
	codectest.Limits(t, a, maxI, atH+4, func(n int) { a.I = strings.Repeat("x", n) })
	a = new(all)
	codectest.Limits(t, a, maxJ, atH+8, func(n int) { a.J = make([]pair, n) })
}

// coded is a Coded made of a function.
type coded func(*codec.Coder)

func (f coded) Code(c *codec.Coder) { f(c) }

// TestAnnounced: memory is taken for what is there, not for what is announced.
func TestAnnounced(t *testing.T) {
	b := binary.LittleEndian.AppendUint32(nil, 1<<30)
	b = append(b, make([]byte, 100)...)
	for name, f := range map[string]coded{
		"bytes":  func(c *codec.Coder) { var p []byte; c.Bytes(&p, 1<<31-1) },
		"string": func(c *codec.Coder) { var p string; c.String(&p, 1<<31-1) },
		"slice": func(c *codec.Coder) {
			var p []all
			codec.Slice(c, &p, 1<<31-1, func(c *codec.Coder, a *all) { a.Code(c) })
		},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := codec.DecodePrefix(b, f)
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 64<<10 || !errors.Is(err, codec.ErrMalformed) {
			t.Errorf("%s of 2^30 announced, 100 bytes there: %d bytes allocated, %v", name, n, err)
		}
	}
}

func TestBool(t *testing.T) {
	for b := range 256 {
		var p bool
		err := codec.Decode([]byte{byte(b)}, coded(func(c *codec.Coder) { c.Bool(&p) }))
		if b < 2 && (err != nil || p != (b == 1)) || b >= 2 && !errors.Is(err, codec.ErrMalformed) {
			t.Errorf("%d: %v, %v", b, p, err)
		}
	}
}

// TestSticks: after the first error nothing is decoded any more.
func TestSticks(t *testing.T) {
	v, w := uint64(7), uint8(7)
	_, err := codec.DecodePrefix([]byte{1, 2, 3}, coded(func(c *codec.Coder) {
		c.U64(&v)
		c.U8(&w)
		c.Fail("later")
		if !c.Decoding() || c.Err() == nil {
			t.Error("the error is gone")
		}
	}))
	if v != 7 || w != 7 || err == nil || strings.Contains(err.Error(), "later") {
		t.Errorf("%d, %d, %v", v, w, err)
	}
}

func TestPrefix(t *testing.T) {
	var v uint16
	one := coded(func(c *codec.Coder) { c.U16(&v) })
	rest, err := codec.DecodePrefix([]byte{1, 2, 3, 4}, one)
	if err != nil || v != 0x0201 || !bytes.Equal(rest, []byte{3, 4}) {
		t.Errorf("%x, rest %x, %v", v, rest, err)
	}
	if err := codec.Decode([]byte{1, 2, 3}, one); !errors.Is(err, codec.ErrMalformed) || !strings.Contains(err.Error(), "1 bytes after the end") {
		t.Errorf("trailing byte: %v", err)
	}
}

// TestAlias: decoded bytes are those of the input, and appending to them does
// not overwrite what follows.
func TestAlias(t *testing.T) {
	in := []byte("\x02\x00\x00\x00ab\x02\x00\x00\x00cd")
	var x, y []byte
	if err := codec.Decode(in, coded(func(c *codec.Coder) { c.Bytes(&x, 9); c.Bytes(&y, 9) })); err != nil {
		t.Fatal(err)
	}
	if &x[0] != &in[4] {
		t.Error("the bytes were copied")
	}
	_ = append(x, "overwritten"...)
	if string(y) != "cd" || string(in) != "\x02\x00\x00\x00ab\x02\x00\x00\x00cd" {
		t.Errorf("appending changed the input: %q", in)
	}
}

// TestParts: put together they are the encoding, and what is long was not copied.
func TestParts(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	for range 100 {
		var a all
		codectest.Fill(rng, &a, nil)
		for _, least := range []int{1, 100, maxH + 1} {
			parts := codec.Parts(&a, least)
			if got, want := bytes.Join(parts, nil), codec.Append(nil, &a); !bytes.Equal(got, want) {
				t.Fatalf("of %d: %x\nwant %x", least, got, want)
			}
			own := 0
			for _, p := range parts {
				if len(a.H) > 0 && &p[0] == &a.H[0] {
					own++
				}
			}
			if own == 1 != (len(a.H) >= least) {
				t.Errorf("%d bytes, of which %d are a part: %d parts of %d are those bytes", len(a.H), least, own, len(parts))
			}
		}
	}
	var x, y = []byte("abc"), []byte("defg")
	parts := codec.Parts(coded(func(c *codec.Coder) { c.Bytes(&x, 9); c.Bytes(&y, 9) }), 3)
	if len(parts) != 4 || string(bytes.Join(parts, nil)) != "\x03\x00\x00\x00abc\x04\x00\x00\x00defg" {
		t.Errorf("%q", parts)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{})
	f.Add(codec.Append(nil, &all{}))
	f.Add(codec.Append(nil, &all{F: true, H: []byte("bytes"), I: "text", J: []pair{{1, "x"}, {2, "y"}}}))
	f.Add(bytes.Repeat([]byte{0xff}, 100))
	f.Fuzz(func(t *testing.T, b []byte) {
		var a all
		if codectest.Decode(t, b, &a) == nil && !bytes.Equal(codec.Append(nil, &a), b) {
			t.Errorf("%x is another encoding of %+v", b, a)
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	a := all{H: make([]byte, 100), I: "name", J: []pair{{1, "x"}}}
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		buf = codec.Append(buf[:0], &a)
	}
}

func BenchmarkDecode(b *testing.B) {
	buf := codec.Append(nil, &all{H: make([]byte, 100), I: "name", J: []pair{{1, "x"}}})
	var a all
	b.ReportAllocs()
	for b.Loop() {
		if err := codec.Decode(buf, &a); err != nil {
			b.Fatal(err)
		}
	}
}
