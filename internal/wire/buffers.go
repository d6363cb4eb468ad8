package wire

import (
	"math/bits"
	"sync"
	"unsafe"
)

// Buffers recycles message bodies. Without it each large body is memory that
// the runtime has to clear before use and collect after; with it a stream of
// them goes through a few buffers. It never holds more than what the last two
// garbage collections saw in use.
//
// The zero value is ready to use and safe for concurrent use.
type Buffers struct {
	class [maxClass - minClass + 1]sync.Pool // of *byte, the first of classSize(i)
}

// Bodies of 2^minClass bytes and more come from classes of 2^k bytes and some
// slack, because a body is usually a power of two of data and a small head.
const (
	minClass = 14
	maxClass = 20
	slack    = 4 << 10
)

func classSize(i int) int {
	if i == maxClass-minClass {
		return MaxBody
	}
	return 1<<(minClass+i) + slack
}

// classOf is the smallest class that holds n bytes, -1 if n is not for a class.
func classOf(n int) int {
	if n < 1<<minClass || n > MaxBody {
		return -1
	}
	return min(max(bits.Len(uint(max(n-slack, 1)-1)), minClass), maxClass) - minClass
}

// get returns n bytes of any content.
func (p *Buffers) get(n int) []byte {
	i := classOf(n)
	if i < 0 {
		return make([]byte, n)
	}
	if b, ok := p.class[i].Get().(*byte); ok {
		return unsafe.Slice(b, classSize(i))[:n]
	}
	return make([]byte, n, classSize(i))
}

// put takes back what get returned. Memory from elsewhere is welcome only if
// its capacity is that of a class, and otherwise left to the garbage collector.
func (p *Buffers) put(b []byte) {
	i := classOf(cap(b))
	if i < 0 || cap(b) != classSize(i) {
		return
	}
	p.class[i].Put(unsafe.SliceData(b[:1]))
}
