package brick

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
)

// TestReadersSeeWholeEntries has readers look at what one entry changes in
// several places, while entries, settling and trimming go on.
func TestReadersSeeWholeEntries(t *testing.T) {
	for _, inline := range []int{-1, 1 << 20} {
		t.Run(fmt.Sprint("inline", inline), func(t *testing.T) {
			o := newBrick(t, func(o *Options) {
				o.Inline = inline
				o.SegmentSize = 256 << 10
				o.Backlog = 200 << 10
				o.Retain = -1
				o.SettleAfter = time.Millisecond
				o.Inodes = 2
			})
			const size = 40000
			f := o.create(fsop.RootIno, "f")
			data := make([]byte, size)
			stamp := func(n uint64) {
				for i := 0; i+8 <= size; i += 8 {
					binary.LittleEndian.PutUint64(data[i:], n)
				}
			}
			stamp(o.Tail().Seq + 1)
			o.write(f, 0, data)
			a, d := o.mkdir(fsop.RootIno, "a"), o.mkdir(fsop.RootIno, "d")
			o.create(a, "x")

			ctx, stop := context.WithCancel(context.Background())
			var wg sync.WaitGroup
			var reads atomic.Int64
			check := func(fn func(r *rand.Rand) error) {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(1, uint64(reads.Load())))
					for ctx.Err() == nil {
						if err := fn(r); err != nil {
							t.Error(err)
							stop()
						}
						reads.Add(1)
					}
				})
			}
			check(func(*rand.Rand) error {
				r, dep, err := o.Read(context.Background(), &fsop.Read{Ino: f, Len: size})
				if err != nil {
					return err
				}
				first := binary.LittleEndian.Uint64(r.Data)
				for i := 8; i+8 <= size; i += 8 {
					if n := binary.LittleEndian.Uint64(r.Data[i:]); n != first {
						return fmt.Errorf("torn: entry %d at %d, %d at 0", n, i, first)
					}
				}
				if first != dep || r.Seq < dep {
					return fmt.Errorf("contents of entry %d, dep %d, seq %d", first, dep, r.Seq)
				}
				return nil
			})
			check(func(*rand.Rand) error {
				// The name is in exactly one of two directories, and a listing with
				// attributes has their sizes.
				ra, _, erra := o.Read(context.Background(), &fsop.Readdir{Ino: fsop.RootIno, Max: 1 << 20, Plus: true})
				if erra != nil {
					return erra
				}
				n := uint64(0)
				for _, e := range ra.Entries {
					if e.Attr.IsDir() {
						n += e.Attr.Size
					}
				}
				if n != 1 {
					return fmt.Errorf("%d names in the two directories", n)
				}
				return nil
			})
			least, most := time.Now().Add(time.Second), time.Now().Add(time.Minute)
			for ctx.Err() == nil && (time.Now().Before(least) || reads.Load() < 100 || o.First() <= 1 && time.Now().Before(most)) {
				stamp(o.Tail().Seq + 1)
				o.write(f, 0, data)
				o.must(&fsop.Rename{Parent: a, Name: "x", NewParent: d, NewName: "x"})
				a, d = d, a
				o.Commit(o.Tail().Seq)
			}
			stop()
			wg.Wait()
			t.Logf("%d entries, %d reads, log begins at %d", o.Tail().Seq, reads.Load(), o.First())
			if o.First() <= 1 {
				t.Error("the log was never trimmed")
			}
		})
	}
}

// TestBackpressure checks that writes wait for settling when it can go on, and
// do not when it cannot.
func TestBackpressure(t *testing.T) {
	o := newBrick(t, func(o *Options) { o.Backlog = 64 << 10 })
	f := o.create(fsop.RootIno, "f")
	data := make([]byte, 32<<10)
	// Nothing is committed: nothing may be settled, and nobody waits for it.
	for i := range 32 {
		o.write(f, uint64(i)*uint64(len(data)), data)
	}
	if n := o.backlog.load.Load(); n < 1<<20 {
		t.Errorf("%d bytes wait to be settled, want all", n)
	}
	o.Commit(o.Tail().Seq)
	for i := range 200 {
		o.write(f, uint64(i)*uint64(len(data)), data)
		o.Commit(o.Tail().Seq)
		if n := o.backlog.load.Load(); i > 100 && n > 5*o.opts.Backlog {
			t.Fatalf("%d bytes wait to be settled", n)
		}
	}
}

// TestCloseDuringReads lets readers and a closing brick meet.
func TestCloseDuringReads(t *testing.T) {
	o := newBrick(t)
	f := o.create(fsop.RootIno, "f")
	o.write(f, 0, bytes.Repeat([]byte("x"), 100000))
	o.settleAll()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				r, _, err := o.Read(context.Background(), &fsop.Read{Ino: f, Len: 100000})
				if errors.Is(err, ErrClosed) {
					return
				}
				if err != nil || len(r.Data) != 100000 {
					t.Errorf("%v", err)
					return
				}
			}
		})
	}
	if err := o.Close(true); err != nil {
		t.Error(err)
	}
	wg.Wait()
	if _, err := o.do(&fsop.Noop{}); !errors.Is(err, ErrClosed) {
		t.Errorf("executing after Close: %v", err)
	}
	if _, err := o.Source(); !errors.Is(err, ErrClosed) {
		t.Errorf("Source after Close: %v", err)
	}
	if err := o.Rewind(cluster.Pos{}); !errors.Is(err, ErrClosed) {
		t.Errorf("Rewind after Close: %v", err)
	}
	if err := o.Close(true); err != nil {
		t.Error(err)
	}
}
