package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// Version is the version of hello and frame. Sides of different versions
// refuse each other.
const Version = 1

const (
	// MaxBody bounds the body of one frame: 1 MiB of payload and what describes it.
	MaxBody = 1<<20 + 64<<10

	// leastCalls is the least that a hello may allow, so that a connection can be
	// used before the other side's hello is there.
	leastCalls = 16

	helloSize  = 24
	headerSize = 20
	magic      = "mortar\r\n"
)

// Flags of a hello.
const helloCRC = 1 << 0 // frames carry a CRC

// Flags of a frame.
const (
	flagReply  = 1 << 0 // the answer to the call with that id
	flagCancel = 1 << 1 // the caller no longer waits for the call with that id
	flagsKnown = flagReply | flagCancel
)

var (
	// ErrFrame is wrapped by the cause of a connection that ended because the
	// other side broke the rules of this package.
	ErrFrame = errors.New("bad frame")
	// ErrVersion is wrapped when the other side speaks another version, or not
	// this protocol at all.
	ErrVersion = errors.New("incompatible")
	// ErrBacklog says that the other side does not keep up: more than
	// Options.MaxQueue bytes wait to be sent. The message was not queued.
	ErrBacklog = errors.New("too much is waiting to be sent on the connection")
	// ErrClosed is the cause of a connection that this side closed without
	// giving another.
	ErrClosed = errors.New("connection closed")
	// ErrPeerClosed is wrapped when the other side closed the connection.
	ErrPeerClosed = errors.New("the other side closed the connection")
	// ErrTooLong says that a message exceeds MaxBody. It was not queued.
	ErrTooLong = errors.New("message too long")
	// ErrStalled is wrapped when the other side stopped in the middle of a
	// frame, or stopped reading, for longer than Options.StallTimeout.
	ErrStalled = errors.New("the other side stopped")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header is the decoded head of a frame.
type header struct {
	length int
	crc    uint32
	id     uint64
	kind   uint8
	flags  uint8
}

// encode writes h into b.
func (h *header) encode(b *[headerSize]byte) {
	binary.LittleEndian.PutUint32(b[0:], uint32(h.length))
	binary.LittleEndian.PutUint32(b[4:], h.crc)
	binary.LittleEndian.PutUint64(b[8:], h.id)
	b[16], b[17], b[18], b[19] = h.kind, h.flags, 0, 0
}

// sum computes the checksum of a frame with the parts as its body.
func (h *header) sum(parts ...[]byte) uint32 {
	var b [headerSize]byte
	clean := *h
	clean.crc = 0
	clean.encode(&b)
	sum := ^uint32(0)
	for _, v := range b { // crc32.Update would have b on the heap
		sum = castagnoli[byte(sum)^v] ^ sum>>8
	}
	sum = ^sum
	for _, p := range parts {
		sum = crc32.Update(sum, castagnoli, p)
	}
	return sum
}

// parseHeader decodes and checks everything about a frame that can be checked
// without its body. b has at least headerSize bytes.
func parseHeader(b []byte, crc bool) (header, error) {
	h := header{
		crc:   binary.LittleEndian.Uint32(b[4:]),
		id:    binary.LittleEndian.Uint64(b[8:]),
		kind:  b[16],
		flags: b[17],
	}
	n := binary.LittleEndian.Uint32(b[0:])
	switch {
	case n > MaxBody:
		return h, fmt.Errorf("%w: body of %d bytes, %d allowed", ErrFrame, n, MaxBody)
	case h.flags&^flagsKnown != 0 || h.flags == flagsKnown:
		return h, fmt.Errorf("%w: flags %#x", ErrFrame, h.flags)
	case h.flags != 0 && h.id == 0:
		return h, fmt.Errorf("%w: flags %#x on a one-way message", ErrFrame, h.flags)
	case h.kind == 0:
		return h, fmt.Errorf("%w: kind 0", ErrFrame)
	case b[18] != 0 || b[19] != 0:
		return h, fmt.Errorf("%w: reserved bytes are not zero", ErrFrame)
	case !crc && h.crc != 0:
		return h, fmt.Errorf("%w: checksum where none was agreed", ErrFrame)
	case h.flags == flagCancel && n != 0:
		return h, fmt.Errorf("%w: a cancellation with a body", ErrFrame)
	}
	h.length = int(n)
	return h, nil
}

// check verifies the checksum of a whole frame.
func (h *header) check(body []byte) error {
	if sum := h.sum(body); sum != h.crc {
		return fmt.Errorf("%w: checksum %08x, computed %08x", ErrFrame, h.crc, sum)
	}
	return nil
}

// hello is what each side says first.
type hello struct {
	version  uint16
	crc      bool
	maxCalls uint32
	maxBytes uint32
	maxBody  uint32
}

func (h *hello) encode() []byte {
	b := make([]byte, 0, helloSize)
	b = append(b, magic...)
	b = binary.LittleEndian.AppendUint16(b, h.version)
	var flags uint16
	if h.crc {
		flags |= helloCRC
	}
	b = binary.LittleEndian.AppendUint16(b, flags)
	b = binary.LittleEndian.AppendUint32(b, h.maxCalls)
	b = binary.LittleEndian.AppendUint32(b, h.maxBytes)
	return binary.LittleEndian.AppendUint32(b, h.maxBody)
}

// parseHello decodes the other side's hello and says why it is refused. b has
// helloSize bytes.
func parseHello(b []byte) (hello, error) {
	if string(b[:len(magic)]) != magic {
		return hello{}, fmt.Errorf("%w: the other side does not speak mortar's protocol, it began with %q; check the address and port", ErrVersion, b[:len(magic)])
	}
	h := hello{
		version:  binary.LittleEndian.Uint16(b[8:]),
		maxCalls: binary.LittleEndian.Uint32(b[12:]),
		maxBytes: binary.LittleEndian.Uint32(b[16:]),
		maxBody:  binary.LittleEndian.Uint32(b[20:]),
	}
	if h.version != Version {
		return h, fmt.Errorf("%w: wire version %d there, %d here; run the same release of mortar on both machines", ErrVersion, h.version, Version)
	}
	flags := binary.LittleEndian.Uint16(b[10:])
	if flags&^helloCRC != 0 {
		return h, fmt.Errorf("%w: hello with flags %#x", ErrFrame, flags)
	}
	h.crc = flags&helloCRC != 0
	if h.maxCalls < leastCalls || h.maxBytes < MaxBody || h.maxBody != MaxBody {
		return h, fmt.Errorf("%w: hello with limits %d, %d, %d", ErrFrame, h.maxCalls, h.maxBytes, h.maxBody)
	}
	return h, nil
}
