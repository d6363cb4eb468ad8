package fsx

import (
	"fmt"
	"math/rand/v2"
)

// Kind is what an operation does.
type Kind int

const (
	Read Kind = iota
	Write
	Append        // through a descriptor with O_APPEND
	ReadDirect    // through one with O_DIRECT
	WriteDirect   //
	Truncate      // through the descriptor
	TruncatePath  //
	Punch         //
	Zero          // FALLOC_FL_ZERO_RANGE, the size may grow
	ZeroKeep      // the size stays
	Allocate      // fallocate, the size may grow
	MapRead       // through a new shared mapping
	MapWrite      // the same, with msync
	MapWriteClose // the same, with munmap and close only; one mount
	KeptStore     // through a mapping that stays, without msync; one mount
	KeptLoad      //
	Copy          // copy_file_range within the file
	CopyOut       // to a second file, which is then compared
	Seek          // SEEK_DATA and SEEK_HOLE through the whole file
	Sync          // fsync
	Reopen        // close and open
	ReopenTrunc   // close, and open with O_TRUNC
	Whole         // open anew and read all
	kinds
)

var kindNames = [kinds]string{
	"read", "write", "append", "read-direct", "write-direct", "truncate", "truncate-path",
	"punch", "zero", "zero-keep", "allocate", "map-read", "map-write", "map-write-close",
	"kept-store", "kept-load", "copy", "copy-out", "seek", "fsync", "reopen", "reopen-trunc", "whole",
}

func (k Kind) String() string { return kindNames[k] }

// weights are how often each kind comes, among their sum.
var weights = [kinds]int{
	Read: 10, Write: 16, Append: 5, ReadDirect: 3, WriteDirect: 4, Truncate: 5, TruncatePath: 3,
	Punch: 5, Zero: 3, ZeroKeep: 2, Allocate: 2, MapRead: 6, MapWrite: 7, MapWriteClose: 3,
	KeptStore: 6, KeptLoad: 3, Copy: 4, CopyOut: 2, Seek: 3, Sync: 3, Reopen: 3, ReopenTrunc: 1, Whole: 3,
}

// Op is one operation. What it cannot do to a file as small as the one it
// finds, it does not do: so a sequence stays one if others are left out.
type Op struct {
	Kind Kind
	Off  int // where
	Len  int // how much; of Truncate the new size
	From int // of Copy: from where
	Fill uint64
	On   int // through which mount
	See  int // through which it is verified
}

func (o Op) String() string {
	s := fmt.Sprintf("%s %d+%d", o.Kind, o.Off, o.Len)
	switch o.Kind {
	case Truncate, TruncatePath:
		s = fmt.Sprintf("%s %d", o.Kind, o.Len)
	case Copy:
		s += fmt.Sprintf(" from %d", o.From)
	case Sync, Reopen, ReopenTrunc, Whole, Seek:
		s = o.Kind.String()
	}
	return fmt.Sprintf("%s (through mount %d, seen through %d)", s, o.On, o.See)
}

func generate(rng *rand.Rand, o *Options) []Op {
	sum := 0
	for _, w := range weights {
		sum += w
	}
	ops := make([]Op, o.Ops)
	for i := range ops {
		op := &ops[i]
		for x := rng.IntN(sum); x >= weights[op.Kind]; op.Kind++ {
			x -= weights[op.Kind]
		}
		if len(o.Dirs) > 1 {
			switch op.Kind { // what is not promised to be seen elsewhere at once
			case MapWriteClose:
				op.Kind = MapWrite
			case KeptStore:
				op.Kind = Write
			case KeptLoad:
				op.Kind = Read
			}
			if o.Turns {
				op.On = rng.IntN(len(o.Dirs))
			}
			op.See = (op.On + 1 + rng.IntN(len(o.Dirs)-1)) % len(o.Dirs)
		}
		op.Off, op.Len = place(rng, o.MaxSize)
		op.From, _ = place(rng, o.MaxSize)
		op.Fill = rng.Uint64()
		switch op.Kind {
		case ReadDirect, WriteDirect:
			op.Off &^= directAlign - 1
			op.Len = max(op.Len&^(directAlign-1), directAlign)
		case Truncate, TruncatePath:
			op.Len, _ = place(rng, o.MaxSize)
			op.Off = 0
		}
		op.Len = min(op.Len, o.MaxSize-op.Off)
	}
	return ops
}

// directAlign is what every disk takes for O_DIRECT.
const directAlign = 4096

// place chooses a part of the file: mostly small ones, every fourth time on
// boundaries of pages, and sometimes larger than what goes through one request.
func place(rng *rand.Rand, size int) (off, n int) {
	off = rng.IntN(size)
	n = 1 + rng.IntN([]int{64, 5000, 5000, 40 << 10, 200 << 10, size}[rng.IntN(6)])
	switch rng.IntN(4) {
	case 0:
		off &^= 4095
	case 1:
		off = min(off, rng.IntN(16<<10)) // where the small file is
	}
	if rng.IntN(4) == 0 {
		n = max(n&^4095, 4096)
	}
	return off, max(0, min(n, size-off))
}
