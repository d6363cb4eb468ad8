package brick

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/disk"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// heal makes to equal to from.
func heal(t tester, from, to *Brick) {
	t.Helper()
	from.Commit(from.Tail().Seq)
	src, err := from.Source()
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	if err := to.Heal(context.Background(), src.Pos(), src.Serve, nil); err != nil {
		t.Fatal(err)
	}
	if !to.Whole() || to.Tail() != src.Pos() || to.Applied() != src.Pos() {
		t.Fatalf("healed: whole %v, log ends at %v, applied %v; want %v", to.Whole(), to.Tail(), to.Applied(), src.Pos())
	}
	if !slices.Equal(src.history, to.History()) {
		t.Fatalf("history %v, want %v", to.History(), src.history)
	}
}

func digest(t tester, b *Brick) Digest {
	t.Helper()
	d, err := b.Digest(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestHealRandom heals a brick with a history of its own from another one.
func TestHealRandom(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 2))
		large := func(o *Options) { o.Inline = rapid.SampledFrom([]int{-1, 4096, 16384}).Draw(t, "inline") }
		a, b := newMachine(t, large), newMachine(t, large)
		defer func() { a.close() }()
		defer func() { b.close() }()
		a.maxWrite, b.maxWrite = 150000, 150000
		// A common past, then two different ones.
		seed := r.Uint64()
		common := rapid.IntRange(0, 60).Draw(t, "common")
		for _, m := range []*machine{a, b} {
			r := rand.New(rand.NewPCG(seed, 3))
			for range common {
				m.step(r)
			}
		}
		if da, db := digest(t, a.b), digest(t, b.b); da != db {
			t.Fatalf("digests after the same entries differ: %+v, %+v", da, db)
		}
		a.diverge(0)
		b.diverge(1)
		a.run(r, rapid.IntRange(0, 200).Draw(t, "source"))
		b.run(r, rapid.IntRange(0, 200).Draw(t, "target"))
		heal(t, a.b, b.b)
		if da, db := digest(t, a.b), digest(t, b.b); da != db {
			t.Fatalf("digests differ: %+v, %+v", da, db)
		}
		// The healed brick is as good as any: it goes on like the model.
		b.adopt(a)
		b.compare(r)
		b.run(r, 100)
	})
}

// diverge has m lead epochs of its own from now on.
func (m *machine) diverge(parity cluster.Epoch) {
	m.parity = parity
	m.newEpoch(m.epoch)
}

// adopt makes the model of m that of a brick it was healed from.
func (m *machine) adopt(from *machine) {
	m.m = from.m.clone()
	m.past = map[uint64]*model{m.m.pos.Seq: m.m.clone()}
	m.commit = m.m.pos.Seq
	m.newEpoch(max(m.epoch, from.epoch))
	m.now = max(m.now, from.now)
	m.sent = nil
	for id, n := range from.number {
		m.number[id] = max(m.number[id], n)
	}
}

// TestHealInterrupted lets the source, the target or the power fail at random
// points of a comparison, changes the source in between, and checks that the
// last comparison makes the two equal.
func TestHealInterrupted(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 4))
		a, b := newMachine(t), newMachine(t)
		defer func() { a.close() }()
		defer func() { b.close() }()
		a.maxWrite, b.maxWrite = 300000, 300000
		a.diverge(0)
		b.diverge(1)
		b.run(r, 100)
		a.run(r, 100)
		for range rapid.IntRange(1, 4).Draw(t, "interruptions") {
			a.b.Commit(a.m.pos.Seq)
			a.commit = a.m.pos.Seq
			src, err := a.b.Source()
			if err != nil {
				t.Fatal(err)
			}
			var left atomic.Int32
			left.Store(int32(r.IntN(25)))
			lost := errors.New("connection lost")
			err = b.b.Heal(context.Background(), src.Pos(), func(ctx context.Context, q []byte) ([]byte, error) {
				if left.Add(-1) < 0 {
					return nil, lost
				}
				return src.Serve(ctx, q)
			}, nil)
			src.Close()
			if err == nil {
				b.adopt(a)
			} else if !errors.Is(err, lost) {
				t.Fatalf("interrupted: %v", err)
			} else if left.Load() < -1 && b.b.Whole() {
				t.Fatal("whole after half a comparison")
			}
			if r.IntN(2) == 0 {
				fs := b.fs.Crash(r)
				b.b.Close(false)
				b.fs, b.opts.FS = fs, fs
				b.open()
				if err == nil && !b.b.Whole() {
					t.Fatal("the crash after a comparison undid it")
				}
			}
			a.run(r, 20)
		}
		heal(t, a.b, b.b)
		if da, db := digest(t, a.b), digest(t, b.b); da != db {
			t.Fatalf("digests differ: %+v, %+v", da, db)
		}
		b.adopt(a)
		b.compare(r)
	})
}

// TestHealWhileWriting changes the source all the time, and lets the target
// execute afterwards what came after the position that it was healed to.
func TestHealWhileWriting(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 5))
		a, b := newMachine(t, func(o *Options) { o.Retain = 1 << 40 }), newMachine(t)
		defer func() { a.close() }()
		defer func() { b.close() }()
		a.maxWrite, b.maxWrite = 200000, 200000
		b.diverge(1)
		b.run(r, 50)
		for range 100 {
			a.step(r)
		}
		a.b.Commit(a.m.pos.Seq)
		src, err := a.b.Source()
		if err != nil {
			t.Fatal(err)
		}
		err = b.b.Heal(context.Background(), src.Pos(), func(ctx context.Context, q []byte) ([]byte, error) {
			b.b.interrupt.Load() // the calls come from several goroutines
			mixing.Lock()
			for range r.IntN(6) {
				a.step(r)
			}
			a.b.Commit(a.m.pos.Seq)
			if r.IntN(3) == 0 {
				a.settle(r)
			}
			mixing.Unlock()
			return src.Serve(ctx, q)
		}, nil)
		src.Close()
		if err != nil {
			t.Fatal(err)
		}
		from := b.b.Tail().Seq
		raws, err := a.b.Entries(from, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		for _, raw := range raws {
			var e proto.Entry
			if err := decodeEntry(raw, &e); err != nil {
				t.Fatal(err)
			}
			if res, err := b.b.Execute(&e, raw); err != nil || res.Raw == nil {
				t.Fatalf("%v after a heal: %+v, %v", &e, res, err)
			}
			if r.IntN(10) == 0 {
				b.b.Commit(e.Pos.Seq)
				if err := b.b.settleCycle(context.Background(), true); err != nil {
					t.Fatal(err)
				}
			}
		}
		if da, db := digest(t, a.b), digest(t, b.b); da != db {
			t.Fatalf("digests differ: %+v, %+v", da, db)
		}
		compareBrick(t, b.b, a.m, r)
	})
}

// TestHealCopiesLittle checks that only what differs is copied, and that a
// second comparison copies nothing.
func TestHealCopiesLittle(t *testing.T) {
	a, b := newBrick(t), newBrick(t)
	big := make([]byte, 20<<20)
	for i := range big {
		big[i] = byte(i * 7 >> 3)
	}
	for _, o := range []*opened{a, b} {
		f := o.create(fsop.RootIno, "big")
		for off := 0; off < len(big); off += fsop.MaxData {
			o.write(f, uint64(off), big[off:off+fsop.MaxData])
		}
		for i := range 3000 {
			o.write(o.create(fsop.RootIno, fmt.Sprint(i)), 0, []byte("the same"))
		}
		o.settleAll()
	}
	b.epoch = 2
	b.write(2, 0, []byte("wrong"))
	a.write(2, 15<<20, []byte("right"))
	a.must(&fsop.Setattr{Ino: 17, Valid: fsop.SetMode, Mode: 0o600})
	a.must(&fsop.Unlink{Parent: fsop.RootIno, Name: "1000"})
	a.Commit(a.Tail().Seq)
	count := func() (calls, bytes int) {
		src, err := a.Source()
		if err != nil {
			t.Fatal(err)
		}
		defer src.Close()
		var last HealProgress
		err = b.Heal(context.Background(), src.Pos(), func(ctx context.Context, q []byte) ([]byte, error) {
			r, err := src.Serve(ctx, q)
			calls++
			bytes += len(r)
			return r, err
		}, func(p HealProgress) { last = p })
		if err != nil {
			t.Fatal(err)
		}
		if last.KeysDone != last.KeysTotal || last.FilesDone != last.FilesTotal || last.BytesDone != last.BytesTotal || last.KeysTotal == 0 {
			t.Errorf("progress ends at %+v", last)
		}
		return calls, bytes
	}
	calls, bytes := count()
	t.Logf("first comparison: %d calls, %d bytes", calls, bytes)
	if calls > 20 || bytes > 700<<10 {
		t.Errorf("the comparison took %d calls and %d bytes", calls, bytes)
	}
	if da, db := digest(t, a.Brick), digest(t, b.Brick); da != db {
		t.Errorf("digests differ: %+v, %+v", da, db)
	}
	calls, bytes = count()
	if calls > 3 || bytes > 10<<10 {
		t.Errorf("comparing equal bricks took %d calls and %d bytes", calls, bytes)
	}
}

func TestHealRefuses(t *testing.T) {
	ctx := context.Background()
	a := newBrick(t)
	a.create(fsop.RootIno, "f")
	a.Commit(a.Tail().Seq)
	src, err := a.Source()
	if err != nil {
		t.Fatal(err)
	}
	fs := disk.NewMem()
	if err := fs.MkdirAll("/b", 0o700); err != nil {
		t.Fatal(err)
	}
	other := testID
	other.Volume = cluster.ID{9}
	if err := Format(fs, "/b", other); err != nil {
		t.Fatal(err)
	}
	o := openBrick(t, testOptions(fs))
	if err := o.Heal(ctx, src.Pos(), src.Serve, nil); !errors.Is(err, ErrOtherBrick) {
		t.Errorf("healing from another volume: %v", err)
	}
	b := newBrick(t)
	if err := b.Heal(ctx, cluster.Pos{Epoch: 1, Seq: 77}, src.Serve, nil); err == nil {
		t.Error("healing to a position that the source does not have")
	}
	if !o.Whole() || !b.Whole() {
		t.Error("a refused heal left the brick not whole")
	}
	// Nonsense from the source is an error, not a panic, and fails nothing here.
	for _, reply := range [][]byte{nil, {1}, bytes.Repeat([]byte{0xff}, 100)} {
		calls := 0
		err := b.Heal(ctx, src.Pos(), func(ctx context.Context, q []byte) ([]byte, error) {
			if calls++; calls == 1 {
				return src.Serve(ctx, q)
			}
			return reply, nil
		}, nil)
		if err == nil || b.Err() != nil {
			t.Errorf("reply %x: %v, brick %v", reply, err, b.Err())
		}
	}
	if b.Whole() {
		t.Error("whole after a heal that failed")
	}
	if err := b.Rewind(b.Tail()); !errors.Is(err, ErrTooFar) {
		t.Errorf("rewinding a brick that is not whole: %v", err)
	}
	if _, err := b.do(&fsop.Noop{}); err == nil {
		t.Error("a brick that is not whole executes")
	}
	// A source ends with its brick being taken back, and a waiting call with it.
	served := make(chan error, 1)
	a.write(2, 0, []byte("not committed"))
	go func() {
		_, err := src.Serve(ctx, encode(&healRequest{Kind: healContents, Inos: []fsop.Ino{2}}))
		served <- err
	}()
	select {
	case err := <-served:
		t.Fatalf("contents that are not committed were served (%v)", err)
	case <-time.After(20 * time.Millisecond):
	}
	if err := a.Rewind(src.Pos()); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err == nil {
		t.Error("served after the brick was taken back")
	}
	if _, err := src.Serve(ctx, encode(&healRequest{Kind: healSums, Lo: []byte{'A'}})); err == nil {
		t.Error("an ended source serves")
	}
	src.Close()
	src.Close()
}

// mixing keeps the steps that several goroutines take apart.
var mixing sync.Mutex

func decodeEntry(raw []byte, e *proto.Entry) error { return codec.Decode(raw, e) }

func encode(v codec.Coded) []byte { return codec.Append(nil, v) }

// FuzzServe feeds a source anything: it answers or refuses, and stays usable.
func FuzzServe(f *testing.F) {
	for _, q := range []healRequest{
		{Kind: healHello, Hello: helloRequest{healVersion, testID.Volume, 0}},
		{Kind: healSums, Lo: []byte{'A'}},
		{Kind: healRecords, Lo: []byte{'A'}, Hi: []byte{'J'}},
		{Kind: healContents, Inos: []fsop.Ino{1, 2, 3}},
		{Kind: healBlockSum, Ino: 2, First: 1, Count: 7},
		{Kind: healBlocks, Ino: 2, Blocks: []uint64{0, 9, 1 << 60}},
	} {
		f.Add(encode(&q))
	}
	o := newBrick(f)
	o.write(o.create(fsop.RootIno, "f"), 1000, make([]byte, 300000))
	o.Commit(o.Tail().Seq)
	src, err := o.Source()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, q []byte) {
		r, err := src.Serve(context.Background(), q)
		if err == nil && len(r) > fsop.MaxData {
			t.Errorf("a reply of %d bytes", len(r))
		}
		if o.Err() != nil {
			t.Fatal(o.Err())
		}
	})
}
