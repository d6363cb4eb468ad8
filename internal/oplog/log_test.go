package oplog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"go.uber.org/goleak"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a log on a disk in memory and what should be in it.
type rig struct {
	t   *testing.T
	fs  disk.FS
	l   *Log
	opt Options

	base    cluster.Pos
	records []entry
}

type entry struct {
	pos     cluster.Pos
	payload []byte
	loc     Loc
}

func newRig(t *testing.T, fs disk.FS, segmentSize int64) *rig {
	t.Helper()
	r := &rig{t: t, fs: fs, opt: Options{FS: fs, Dir: "/brick/log", SegmentSize: segmentSize}}
	if err := fs.MkdirAll("/brick", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := fs.SyncDir("/"); err != nil {
		t.Fatal(err)
	}
	r.open()
	t.Cleanup(func() { r.l.Close() })
	return r
}

func (r *rig) open() {
	r.t.Helper()
	l, err := Open(r.opt)
	if err != nil {
		r.t.Fatal(err)
	}
	r.l = l
}

func (r *rig) reopen() {
	r.t.Helper()
	if err := r.l.Close(); err != nil {
		r.t.Fatal(err)
	}
	r.open()
}

// payload makes n bytes that tell their sequence.
func payload(seq uint64, n int) []byte {
	return bytes.Repeat([]byte(fmt.Sprintf("<%d>", seq)), n/3+1)[:n]
}

func (r *rig) tail() cluster.Pos {
	if n := len(r.records); n > 0 {
		return r.records[n-1].pos
	}
	return r.base
}

// append adds a record of n bytes, of which align are aligned.
func (r *rig) append(epoch cluster.Epoch, n, align int) {
	r.t.Helper()
	pos := cluster.Pos{Epoch: epoch, Seq: r.tail().Seq + 1}
	p := payload(pos.Seq, n)
	loc, err := r.l.Append(pos, p, align)
	if err != nil {
		r.t.Fatalf("append %v: %v", pos, err)
	}
	if loc.Len != n {
		r.t.Fatalf("append %v: %+v for %d bytes", pos, loc, n)
	}
	if align > 0 && (loc.Off+int64(n-align))%disk.BlockSize != 0 {
		r.t.Fatalf("append %v: aligned tail of %d at %+v", pos, align, loc)
	}
	r.records = append(r.records, entry{pos, p, loc})
}

// check compares all that the log says with what it should say.
func (r *rig) check() {
	r.t.Helper()
	if got, want := r.l.Tail(), r.tail(); got != want {
		r.t.Fatalf("tail %v, want %v", got, want)
	}
	base := r.l.Base()
	want := r.records
	for len(want) > 0 && want[0].pos.Seq <= base.Seq {
		want = want[1:]
	}
	if len(want) > 0 && r.l.First() != want[0].pos.Seq || len(want) == 0 && r.l.First() != 0 {
		r.t.Fatalf("first %d, base %v, %d records", r.l.First(), base, len(want))
	}
	got := r.readAll(base.Seq, 10_000)
	if len(got) != len(want) {
		r.t.Fatalf("%d records, want %d", len(got), len(want))
	}
	for i, g := range got {
		if w := want[i]; g.pos != w.pos || g.loc != w.loc || !bytes.Equal(g.payload, w.payload) {
			r.t.Fatalf("record %v at %+v of %d bytes, want %v at %+v of %d bytes", g.pos, g.loc, len(g.payload), w.pos, w.loc, len(w.payload))
		}
	}
	for _, e := range want {
		p := make([]byte, len(e.payload))
		if err := r.l.ReadAt(e.loc.Segment, p, e.loc.Off); err != nil || !bytes.Equal(p, e.payload) {
			r.t.Fatalf("ReadAt %+v of %v: %v, equal %v", e.loc, e.pos, err, bytes.Equal(p, e.payload))
		}
	}
	if err := r.l.Verify(context.Background()); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) readAll(after uint64, maxBytes int) (got []entry) {
	r.t.Helper()
	for {
		ps, poss, locs, err := r.l.Read(after, maxBytes)
		if err != nil {
			r.t.Fatal(err)
		}
		if len(ps) == 0 {
			return got
		}
		for i := range ps {
			got = append(got, entry{poss[i], ps[i], locs[i]})
		}
		after = poss[len(poss)-1].Seq
	}
}

func TestAppendAndRead(t *testing.T) {
	r := newRig(t, disk.NewMem(), 1<<20)
	r.check()
	sizes := []struct{ n, align int }{{1, 0}, {0, 0}, {7, 7}, {100, 0}, {5000, 4096}, {4200, 4096}, {70000, 0}, {131200, 131072}, {65536, 65536}, {300000, 0}, {90, 0}}
	for range 6 {
		for _, s := range sizes {
			r.append(1, s.n, s.align)
		}
		r.check()
	}
	if err := r.l.Flush(); err != nil {
		t.Fatal(err)
	}
	r.check()
	r.reopen()
	r.check()
	r.append(2, 10, 0)
	r.check()
}

func TestRandomLives(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		r := newRig(t, disk.NewMem(), 256<<10)
		epoch := cluster.Epoch(1)
		for range 300 {
			switch rng.IntN(20) {
			case 0:
				epoch++
			case 1:
				r.reopen()
			case 2:
				r.check()
			case 3:
				if err := r.l.SyncAll(); err != nil {
					t.Fatal(err)
				}
				if got := r.l.Durable(); got != r.tail().Seq {
					t.Fatalf("durable %d, want %d", got, r.tail().Seq)
				}
			case 4:
				keep := rng.IntN(len(r.records)+1) / 2
				seq := r.tail().Seq - uint64(min(keep, 5))
				if seq < r.l.Base().Seq {
					if err := r.l.TruncateAfter(seq); !errors.Is(err, ErrTrimmed) {
						t.Fatalf("truncating after %d, base %v: %v", seq, r.l.Base(), err)
					}
					continue
				}
				if err := r.l.TruncateAfter(seq); err != nil {
					t.Fatal(err)
				}
				for len(r.records) > 0 && r.tail().Seq > seq {
					r.records = r.records[:len(r.records)-1]
				}
				epoch = max(1, epoch) + 1
			case 5:
				if err := r.l.TrimBefore(r.l.Base().Seq + uint64(rng.IntN(40))); err != nil {
					t.Fatal(err)
				}
			default:
				n := []int{10, 200, 5000, 70000}[rng.IntN(4)] + rng.IntN(100)
				r.append(epoch, n, rng.IntN(2)*rng.IntN(n))
			}
		}
		r.check()
		r.reopen()
		r.check()
	}
}
