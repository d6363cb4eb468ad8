package mount

import (
	"encoding/binary"
	"runtime"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
)

// Operation codes of linux/fuse.h that may be answered at once.
const (
	opOpen    = 14
	opRelease = 18
)

// Lengths of these requests: the header, struct fuse_open_in, struct fuse_release_in.
const (
	openLength    = inHeaderSize + 8
	releaseLength = inHeaderSize + 24
)

// settleIno is go-fuse's number for the file of settle, which it answers for itself.
const settleIno = ^fsop.Ino(0)

// maxQuick is after how many requests in a row that were answered at once others get to run. Nothing
// interrupts who has the turn while there is always one more.
const maxQuick = 16

// quick answers a request that whoever has the turn can answer at once: nobody is asked for it, nothing is waited for, and
// it is over before the next one is read. So neither the turn need be passed on nor anything be kept of it, and no memory
// is allocated. It reports whether it was one. out is memory for the answer.
//
// They are the open and close of files that are only read or written in place, the only requests that remain of reading
// a file again and again.
func (s *server) quick(in, out []byte) bool {
	if s.fs == nil || s.again != nil {
		return false
	}
	ino := fsop.Ino(binary.NativeEndian.Uint64(in[16:]))
	if ino == settleIno {
		return false
	}
	word := func(off int) uint32 { return binary.NativeEndian.Uint32(in[off:]) }
	long := func(off int) uint64 { return binary.NativeEndian.Uint64(in[off:]) }
	n, st := outHeaderSize, fuse.OK
	switch op := opcode(in); {
	case op == opOpen && len(in) == openLength && word(inHeaderSize)&unix.O_TRUNC == 0:
		var o fuse.OpenOut
		if st = s.fs.openKept(ino, word(inHeaderSize), word(32), &o); st.Ok() {
			binary.NativeEndian.PutUint64(out[n:], o.Fh)
			binary.NativeEndian.PutUint32(out[n+8:], o.OpenFlags)
			binary.NativeEndian.PutUint32(out[n+12:], uint32(o.BackingID))
			n += 16
		}
	case op == opRelease && len(in) == releaseLength:
		s.fs.released(ino, long(inHeaderSize), word(inHeaderSize+12))
	default:
		return false
	}
	binary.NativeEndian.PutUint32(out[0:], uint32(n))
	binary.NativeEndian.PutUint32(out[4:], uint32(-int32(st)))
	binary.NativeEndian.PutUint64(out[8:], unique(in))
	s.answer(in, out[:n])
	if s.quickly++; s.quickly%maxQuick == 0 {
		runtime.Gosched()
	}
	return true
}
