package mount

import (
	"bytes"
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
)

// message is a request of the kernel.
func message(op uint32, ino fsop.Ino, words ...uint32) []byte {
	in := make([]byte, inHeaderSize+4*len(words))
	binary.NativeEndian.PutUint32(in, uint32(len(in)))
	binary.NativeEndian.PutUint32(in[4:], op)
	binary.NativeEndian.PutUint64(in[8:], 77)
	binary.NativeEndian.PutUint64(in[16:], uint64(ino))
	for i, w := range words {
		binary.NativeEndian.PutUint32(in[inHeaderSize+4*i:], w)
	}
	return in
}

// What is answered at once is answered as it would be otherwise, and costs no memory; what has to ask somebody is not.
func TestQuick(t *testing.T) {
	for _, kind := range kinds[:2] {
		t.Run(kind.name, func(t *testing.T) {
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fds[1])
			m := New(kind.o)
			s, err := m.newServer(fds[0])
			if err != nil {
				t.Fatal(err)
			}
			defer s.file.Close()
			out, got := make([]byte, smallBuffer), make([]byte, smallBuffer)
			init := message(opInit, 0, 7, 45, 1<<20, 0, 0)
			s.greet(append(init, make([]byte, 44)...))

			const ino, flagged = 5, 6
			m.nodes.mark(flagged, immutable)
			for _, c := range []struct {
				name  string
				in    []byte
				quick bool
			}{
				{"open to read", message(opOpen, ino, unix.O_RDONLY, 0), true},
				{"open to write", message(opOpen, ino, unix.O_WRONLY, 0), true},
				{"open to append", message(opOpen, ino, unix.O_RDWR|unix.O_APPEND, 0), true},
				{"open what must not change", message(opOpen, flagged, unix.O_WRONLY, 0), true},
				{"open and truncate", message(opOpen, flagged, unix.O_WRONLY|unix.O_TRUNC, 0), false},
				{"close", message(opRelease, ino, 9, 0, unix.O_RDONLY, 0, 0, 0), true},
				{"flush", message(25, ino, 9, 0, 0, 0, 0, 0), false},
				{"open of go-fuse's own file", message(opOpen, settleIno, unix.O_RDONLY, 0), false},
				{"a short open", message(opOpen, ino, unix.O_RDONLY), false},
			} {
				if is := s.quick(c.in, out); is != c.quick {
					t.Errorf("%s: quick is %v, want %v", c.name, is, c.quick)
				}
				if !c.quick {
					continue
				}
				n, err := unix.Read(fds[1], got)
				if err != nil {
					t.Fatal(err)
				}
				want := make([]byte, smallBuffer)
				w, st := s.proto.HandleRequest([][]byte{c.in}, [][]byte{want})
				if !st.Ok() {
					t.Fatalf("%s: %v", c.name, st)
				}
				if opcode(c.in) == opOpen && w > outHeaderSize { // each open has its own number
					fh := binary.NativeEndian.Uint64(want[outHeaderSize:])
					binary.NativeEndian.PutUint64(want[outHeaderSize:], fh-1)
				}
				if !bytes.Equal(got[:n], want[:w]) {
					t.Errorf("%s: answered at once %x, otherwise %x", c.name, got[:n], want[:w])
				}
			}

			open := message(opOpen, ino, unix.O_RDONLY, 0)
			if n := testing.AllocsPerRun(100, func() { s.quick(open, out); unix.Read(fds[1], got) }); n > 0 {
				t.Errorf("%v allocations for an open", n)
			}
			s.again = map[uint64]bool{}
			if s.quick(open, out) {
				t.Error("answered at once while requests come again, each of which is to be taken note of")
			}
		})
	}
}

// BenchmarkOpenClose measures what an open and a close cost the mount, but for reading them from the kernel.
func BenchmarkOpenClose(b *testing.B) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fds[1])
	s, err := New(Options{}).newServer(fds[0])
	if err != nil {
		b.Fatal(err)
	}
	defer s.file.Close()
	s.greet(append(message(opInit, 0, 7, 45, 1<<20, 0, 0), make([]byte, 44)...))
	out, got := make([]byte, smallBuffer), make([]byte, smallBuffer)
	both := [][]byte{message(opOpen, 5, unix.O_RDONLY, 0), message(opRelease, 5, 9, 0, unix.O_RDONLY, 0, 0, 0)}
	for name, answer := range map[string]func(in []byte){
		"at once":   func(in []byte) { s.quick(in, out) },
		"as others": func(in []byte) { s.begin(in); s.serve(in, out) },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				for _, in := range both {
					answer(in)
					unix.Read(fds[1], got)
				}
			}
		})
	}
}
