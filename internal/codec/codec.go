// Package codec turns structs into bytes and back with one method per struct.
//
// A type describes its fields once, in order, as calls on a Coder; the same
// description encodes and decodes, so the two can never disagree:
//
//	func (l *Lookup) Code(c *codec.Coder) { c.U64((*uint64)(&l.Parent)); c.String(&l.Name, 255) }
//
// Integers are little-endian and of fixed size. Byte strings carry a 32-bit
// length, and every length is checked against a bound given by the caller and
// against what is left of the input before anything is allocated: nothing that
// comes from a wire or a disk is believed.
package codec

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// ErrMalformed is wrapped by every decoding error.
var ErrMalformed = errors.New("malformed message")

// A Coded type describes its fields to a Coder. Code must make the same calls
// for the same values of the fields already coded, whichever way it runs.
type Coded interface{ Code(*Coder) }

// Coder walks over the fields of a Coded value, writing or reading them.
// The first error sticks; after it the remaining calls do nothing.
type Coder struct {
	buf      []byte // encoding: the output; decoding: what is left of the input
	decoding bool
	err      error

	// Of Parts:
	least int // byte strings of so many bytes are parts of their own; 0: none
	parts [][]byte
	from  int // buf[from:] is not in parts yet
}

// Append appends the encoding of v to b. It panics only if v describes a field
// longer than the bound it states itself, which is a bug in the caller.
func Append(b []byte, v Coded) []byte {
	c := Coder{buf: b}
	v.Code(&c)
	if c.err != nil {
		panic(fmt.Sprintf("codec: encoding %T: %v", v, c.err))
	}
	return c.buf
}

// Parts encodes v in parts that are to be put together, without copying byte strings
// (Coder.Bytes) of least bytes and more: they are parts themselves.
func Parts(v Coded, least int) [][]byte {
	c := Coder{least: least}
	v.Code(&c)
	if c.err != nil {
		panic(fmt.Sprintf("codec: encoding %T: %v", v, c.err))
	}
	c.part()
	return c.parts
}

// part makes a part of what was encoded since the last one.
func (c *Coder) part() {
	if n := len(c.buf); n > c.from {
		c.parts = append(c.parts, c.buf[c.from:n:n])
		c.from = n
	}
}

// Decode reads v from b, which it must fill exactly. Byte slices decoded into v
// alias b.
func Decode(b []byte, v Coded) error {
	rest, err := DecodePrefix(b, v)
	if err != nil {
		return err
	}
	if len(rest) != 0 {
		return fmt.Errorf("%w: %d bytes after the end of %T", ErrMalformed, len(rest), v)
	}
	return nil
}

// DecodePrefix reads v from the front of b and returns what follows it.
func DecodePrefix(b []byte, v Coded) (rest []byte, err error) {
	c := Coder{buf: b, decoding: true}
	v.Code(&c)
	if c.err != nil {
		return nil, fmt.Errorf("%T: %w", v, c.err)
	}
	return c.buf, nil
}

// Decoding reports which way the Coder runs.
func (c *Coder) Decoding() bool { return c.decoding }

// Err returns the first error met.
func (c *Coder) Err() error { return c.err }

// Fail records a decoding error found by the caller, such as a value out of range.
func (c *Coder) Fail(format string, args ...any) {
	if c.err == nil {
		c.err = fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, args...))
	}
}

// take returns the next n bytes of the input, or nil after an error.
func (c *Coder) take(n int) []byte {
	if c.err != nil {
		return nil
	}
	if n > len(c.buf) {
		c.Fail("%d bytes missing", n-len(c.buf))
		return nil
	}
	b := c.buf[:n:n]
	c.buf = c.buf[n:]
	return b
}

func (c *Coder) U8(p *uint8) {
	if !c.decoding {
		c.buf = append(c.buf, *p)
	} else if b := c.take(1); b != nil {
		*p = b[0]
	}
}

func (c *Coder) U16(p *uint16) {
	if !c.decoding {
		c.buf = binary.LittleEndian.AppendUint16(c.buf, *p)
	} else if b := c.take(2); b != nil {
		*p = binary.LittleEndian.Uint16(b)
	}
}

func (c *Coder) U32(p *uint32) {
	if !c.decoding {
		c.buf = binary.LittleEndian.AppendUint32(c.buf, *p)
	} else if b := c.take(4); b != nil {
		*p = binary.LittleEndian.Uint32(b)
	}
}

func (c *Coder) U64(p *uint64) {
	if !c.decoding {
		c.buf = binary.LittleEndian.AppendUint64(c.buf, *p)
	} else if b := c.take(8); b != nil {
		*p = binary.LittleEndian.Uint64(b)
	}
}

func (c *Coder) I64(p *int64) {
	v := uint64(*p)
	c.U64(&v)
	*p = int64(v)
}

// Bool codes one byte, 0 or 1; any other byte is malformed.
func (c *Coder) Bool(p *bool) {
	var v uint8
	if *p {
		v = 1
	}
	c.U8(&v)
	if v > 1 {
		c.Fail("%d for a truth value", v)
	}
	*p = v == 1
}

// Array codes exactly len(p) bytes, such as an ID.
func (c *Coder) Array(p []byte) {
	if !c.decoding {
		c.buf = append(c.buf, p...)
	} else if b := c.take(len(p)); b != nil {
		copy(p, b)
	}
}

// Bytes codes a byte string of at most limit bytes. When decoding, *p aliases
// the input; nil and empty are both decoded as nil.
func (c *Coder) Bytes(p *[]byte, limit int) {
	n := c.Len(len(*p), limit)
	if !c.decoding {
		if c.least > 0 && len(*p) >= c.least {
			c.part()
			c.parts = append(c.parts, *p)
			return
		}
		c.buf = append(c.buf, *p...)
		return
	}
	*p = nil
	if n > 0 {
		*p = c.take(n)
	}
}

// String codes a string of at most limit bytes.
func (c *Coder) String(p *string, limit int) {
	n := c.Len(len(*p), limit)
	if !c.decoding {
		c.buf = append(c.buf, *p...)
		return
	}
	*p = string(c.take(n))
}

// Len codes the 32-bit count of what follows, at most limit elements of at
// least one byte each, and returns it.
func (c *Coder) Len(n, limit int) int {
	v := uint32(n)
	c.U32(&v)
	if c.err != nil {
		return 0
	}
	if int64(v) > int64(limit) || n > limit {
		c.Fail("length %d exceeds %d", max(int64(v), int64(n)), limit)
		return 0
	}
	if c.decoding && int(v) > len(c.buf) {
		c.Fail("length %d exceeds the %d bytes left", v, len(c.buf))
		return 0
	}
	return int(v)
}

// Slice codes a slice of at most limit elements with one, which codes a single element.
func Slice[T any](c *Coder, p *[]T, limit int, one func(*Coder, *T)) {
	n := c.Len(len(*p), limit)
	if c.decoding {
		*p = nil
		for range n { // grows by what was really decoded, not by what was announced
			var v T
			if one(c, &v); c.err != nil {
				return
			}
			*p = append(*p, v)
		}
		return
	}
	for i := range *p {
		one(c, &(*p)[i])
	}
}
