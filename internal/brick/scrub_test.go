package brick

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mortar/internal/brick/data"
	"mortar/internal/brick/meta"
	"mortar/internal/disk"
	"mortar/internal/fsop"
)

// atOnce scrubs as fast as it can, and takes every file for quiet.
var atOnce = ScrubOptions{Wait: func(ctx context.Context, _ int) error { return context.Cause(ctx) }}

// scrubAll has a whole round made.
func (o *opened) scrubAll() Scrubbed {
	o.t.Helper()
	if err := o.BeginScrub(); err != nil {
		o.t.Fatal(err)
	}
	if err := o.Scrub(context.Background(), atOnce); err != nil {
		o.t.Fatal(err)
	}
	return o.Scrubbed()
}

// rot changes n bytes of a data file behind everybody's back.
func (o *opened) rot(ino fsop.Ino, off int64, n int) {
	o.t.Helper()
	change(o.t, o.opts.FS, o.dataFile(ino), func(f disk.File) error {
		p := make([]byte, n)
		if _, err := f.ReadAt(p, off); err != nil {
			return err
		}
		for i := range p {
			p[i] ^= 0x40
		}
		_, err := f.WriteAt(p, off)
		return err
	})
}

// askOf has a brick ask others for what has rotted.
func askOf(others ...func() *Brick) Others {
	return func(ctx context.Context, ino fsop.Ino, k uint64, use func(Block) bool) error {
		err := errNobody
		for _, o := range others {
			got, oerr := o().Block(ctx, ino, k)
			if oerr != nil {
				err = oerr
				continue
			}
			if use(got) {
				return nil
			}
			err = errors.New("it has something else")
		}
		return err
	}
}

// repairAll repairs what is rotten and returns the last error.
func (o *opened) repairAll() (err error) {
	some, _ := o.Rotten(1000)
	for _, r := range some {
		if rerr := o.Repair(context.Background(), r); rerr != nil {
			err = rerr
		}
	}
	return err
}

func noise(n int, seed uint64) []byte {
	r := rand.NewPCG(seed, 9)
	p := make([]byte, 0, n+8)
	for len(p) < n {
		p = binary.LittleEndian.AppendUint64(p, r.Uint64()|0x0101010101010101)
	}
	return p[:n]
}

// pair are two bricks with one large file, settled, which ask each other.
func pair(t *testing.T, size int) (a, b *opened, ino fsop.Ino, want []byte) {
	t.Helper()
	want = noise(size, 1)
	ask := func(o **opened) func(*Options) {
		return func(opts *Options) { opts.Others = askOf(func() *Brick { return (*o).Brick }) }
	}
	a, b = newBrick(t, ask(&b)), newBrick(t, ask(&a))
	for _, o := range []*opened{a, b} {
		ino = o.create(fsop.RootIno, "file")
		for at := 0; at < size; at += fsop.MaxData {
			o.write(ino, uint64(at), want[at:min(size, at+fsop.MaxData)])
		}
		o.settleAll()
	}
	return a, b, ino, want
}

// Rot is found by a scrub, shown to nobody, and repaired from the brick that has
// what the checksum asks for, whichever of the two that is.
func TestScrubRepairs(t *testing.T) {
	a, b, ino, want := pair(t, 5<<20+1000)
	for _, o := range []*opened{a, b} {
		s := o.scrubAll()
		if s.Made != 41 || s.Checked != 0 || s.Running || s.Ended.IsZero() {
			t.Fatalf("first round: %+v", s)
		}
		if s = o.scrubAll(); s.Checked != 41 || s.Made != 0 || s.Bad != 0 || s.Bytes != 5<<20+1000 {
			t.Fatalf("second round: %+v", s)
		}
	}
	for i, o := range []*opened{a, b} {
		o.rot(ino, 3*sumSize+5, 1)
		o.rot(ino, 4<<20+300<<10, 4000)
		o.rot(ino, 5<<20+999, 1)
		if s := o.scrubAll(); s.Bad != 3 || s.Rotten != 3 || s.Found != 3 {
			t.Fatalf("brick %d: %+v", i, s)
		}
		if got := o.contents(ino); !bytes.Equal(got, want) {
			t.Fatalf("brick %d shows rot, or less: %d bytes", i, len(got))
		}
		if err := o.repairAll(); err != nil {
			t.Fatal(err)
		}
		if s := o.scrubAll(); s.Bad != 0 || s.Rotten != 0 || s.Repaired != 3 || s.Checked != 41 {
			t.Fatalf("brick %d, repaired: %+v", i, s)
		}
		p, err := disk.ReadFile(o.opts.FS, o.dataFile(ino), 10<<20)
		if err != nil || !bytes.Equal(p, want) {
			t.Fatalf("brick %d: its data file has %d bytes, %v", i, len(p), err)
		}
	}
	if da, db := digest(t, a.Brick), digest(t, b.Brick); da != db {
		t.Errorf("digests differ: %+v, %+v", da, db)
	}
}

// Both bricks have rotted, in different blocks of one file, and neither takes
// anything wrong from the other.
func TestScrubBothRotten(t *testing.T) {
	a, b, ino, want := pair(t, 600<<10)
	a.scrubAll()
	b.scrubAll()
	a.rot(ino, 10, 5)
	b.rot(ino, 200<<10, 5)
	a.rot(ino, 300<<10, 1) // this one everywhere
	b.rot(ino, 301<<10, 1)
	for _, o := range []*opened{a, b} {
		if s := o.scrubAll(); s.Rotten != 2 {
			t.Fatalf("%+v", s)
		}
		if err := o.repairAll(); err == nil {
			t.Error("what nobody has was repaired")
		}
	}
	for _, o := range []*opened{a, b} {
		if s := o.Scrubbed(); s.Rotten != 1 || s.Repaired != 1 {
			t.Errorf("%+v", s)
		}
		if r := o.get(&fsop.Read{Ino: ino, Off: 0, Len: 256 << 10}); !bytes.Equal(r.Data, want[:256<<10]) {
			t.Error("what is good elsewhere is not read")
		}
		o.opts.Alone = func() bool { return true } // do not wait for others
		if _, _, err := o.Read(context.Background(), &fsop.Read{Ino: ino, Off: 300 << 10, Len: 10}); !errors.Is(err, fsop.EIO) {
			t.Errorf("what nobody has is read: %v", err)
		}
		if err := o.Err(); err != nil {
			t.Errorf("the brick ended: %v", err)
		}
		if _, err := o.Digest(context.Background()); err == nil || !bytes.Contains([]byte(err.Error()), []byte("rotted")) {
			t.Errorf("digest of what has rotted: %v", err)
		}
	}
	// Written anew it is as good as any.
	for _, o := range []*opened{a, b} {
		o.write(ino, 256<<10, want[256<<10:384<<10])
		o.settleAll()
		if s := o.scrubAll(); s.Rotten != 0 {
			t.Errorf("written anew: %+v", s)
		}
		if got := o.contents(ino); !bytes.Equal(got, want) {
			t.Error("written anew, it differs")
		}
	}
}

// A write over a part of a block that has rotted unnoticed does not make the rest
// good: it is noticed then, and the block gets what the other brick has.
func TestWriteOverRot(t *testing.T) {
	for name, known := range map[string]bool{"unnoticed": false, "known": true} {
		t.Run(name, func(t *testing.T) {
			a, b, ino, want := pair(t, 600<<10)
			a.scrubAll()
			a.rot(ino, 130<<10, 100)
			if known {
				a.scrubAll()
			}
			for _, o := range []*opened{a, b} {
				o.write(ino, 200<<10, []byte("some bytes more"))
				o.settleAll()
			}
			copy(want[200<<10:], "some bytes more")
			if s := a.Scrubbed(); s.Rotten != 1 || s.Found != 1 {
				t.Fatalf("%+v", s)
			}
			if got := a.contents(ino); !bytes.Equal(got, want) {
				t.Error("rot is shown")
			}
			if err := a.repairAll(); err != nil {
				t.Fatal(err)
			}
			if s := a.scrubAll(); s.Rotten != 0 || s.Repaired != 1 || s.Bad != 0 {
				t.Errorf("%+v", s)
			}
			p, err := disk.ReadFile(a.opts.FS, a.dataFile(ino), 10<<20)
			if err != nil || !bytes.Equal(p, want) {
				t.Errorf("the data file has %d bytes, %v", len(p), err)
			}
			if da, db := digest(t, a.Brick), digest(t, b.Brick); da != db {
				t.Errorf("digests differ: %+v, %+v", da, db)
			}
		})
	}
}

// A brick that another one is healed from gives no rot away, found before or not;
// what it lacks it takes from the very brick that is being healed.
func TestHealFromRotten(t *testing.T) {
	a, b, ino, want := pair(t, 1<<20)
	a.scrubAll()
	a.rot(ino, 500<<10, 1)
	// What the two differ in is elsewhere in the file, so it is copied.
	a.write(ino, 10, []byte("changed"))
	copy(want[10:], "changed")
	a.settleAll()
	if err := b.Distrust(); err != nil {
		t.Fatal(err)
	}
	heal(t, a.Brick, b.Brick)
	if got := b.contents(ino); !bytes.Equal(got, want) {
		t.Error("rot was spread")
	}
	if s := a.Scrubbed(); s.Rotten != 1 {
		t.Errorf("not noticed: %+v", s)
	}
	b.Commit(b.Tail().Seq)
	if err := a.repairAll(); err != nil {
		t.Error(err)
	}
	if da, db := digest(t, a.Brick), digest(t, b.Brick); da != db {
		t.Errorf("digests differ: %+v, %+v", da, db)
	}
	// With nobody to ask, the comparison does not end well, and spreads nothing.
	b.scrubAll()
	b.opts.Others = nil
	b.rot(ino, 500<<10, 1)
	b.write(ino, 10, []byte("CHANGED"))
	b.settleAll()
	if err := a.Distrust(); err != nil {
		t.Fatal(err)
	}
	a.rot(ino, 510<<10, 1) // its own is no better
	b.Commit(b.Tail().Seq)
	src, err := b.Source()
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	if err := a.Heal(context.Background(), src.Pos(), src.Serve, nil); err == nil || a.Whole() {
		t.Errorf("healed from rot: %v", err)
	}
}

// A crash at any time leaves no checksum of what a data file no longer has: a brick
// whose disk keeps what was synced has no rot.
func TestSumsCrash(t *testing.T) {
	ctx := context.Background()
	for seed := range uint64(5) {
		r := rand.New(rand.NewPCG(seed, 4))
		mem := disk.NewMem()
		format(t, mem, "/b")
		opts := testOptions(mem)
		opts.MemTable, opts.group = 1<<20, 256<<10
		for life := range 4 {
			o := openBrick(t, opts)
			if o.Tail().Seq == 0 {
				for i := range 3 {
					o.create(fsop.RootIno, fmt.Sprint(i))
				}
			}
			if s := o.scrubAll(); s.Bad != 0 {
				t.Fatalf("seed %d, life %d: %+v", seed, life, s)
			}
			for range r.IntN(25) {
				ino := fsop.Ino(2 + r.Uint64N(3))
				switch r.IntN(10) {
				case 0, 1, 2:
					o.write(ino, r.Uint64N(600<<10), noise(r.IntN(300<<10)+1, r.Uint64()))
				case 3:
					o.must(&fsop.Setattr{Ino: ino, Valid: fsop.SetSize, Size: r.Uint64N(600 << 10)})
				case 4:
					o.must(&fsop.Fallocate{Ino: ino, Off: r.Uint64N(600 << 10), Len: r.Uint64N(200<<10) + 1, Mode: fsop.FallocPunchHole | fsop.FallocKeepSize})
				case 5, 6:
					o.settleAll()
				case 7:
					if err := o.store.Flush(ctx); err != nil {
						t.Fatal(err)
					}
				case 8:
					if s := o.scrubAll(); s.Bad != 0 {
						t.Fatalf("seed %d, life %d: %+v", seed, life, s)
					}
				case 9:
					o.must(&fsop.Setattr{Ino: ino, Valid: fsop.SetSize, Size: 0})
				}
			}
			before := map[fsop.Ino][]byte{}
			o.Sync(ctx, o.Tail().Seq)
			for i := range 3 {
				before[fsop.Ino(2+i)] = o.contents(fsop.Ino(2 + i))
			}
			opts.FS = mem.Crash(r)
			mem = opts.FS.(*disk.Mem)
			o.Close(false)
			o = openBrick(t, opts)
			if s := o.scrubAll(); s.Bad != 0 || s.Found != 0 {
				t.Fatalf("seed %d, life %d, after the crash: %+v", seed, life, s)
			}
			for ino, want := range before {
				if got := o.contents(ino); !bytes.Equal(got, want) {
					t.Fatalf("seed %d, life %d: inode %d differs", seed, life, ino)
				}
			}
			o.Close(r.IntN(2) == 0)
		}
	}
}

// Where a round was is remembered.
func TestScrubGoesOn(t *testing.T) {
	o := newBrick(t)
	for i := range 5 {
		o.write(o.create(fsop.RootIno, fmt.Sprint(i)), 0, noise(200<<10, uint64(i)))
	}
	o.settleAll()
	o.scrubAll()
	ctx, cancel := context.WithCancelCause(context.Background())
	stop := errors.New("stop")
	reads := 0
	slow := ScrubOptions{Wait: func(ctx context.Context, n int) error {
		if n == sumSize {
			if reads++; reads == 5 {
				cancel(stop)
			}
		}
		return context.Cause(ctx)
	}}
	if err := o.BeginScrub(); err != nil {
		t.Fatal(err)
	}
	if err := o.Scrub(ctx, slow); !errors.Is(err, stop) {
		t.Fatal(err)
	}
	was := o.Scrubbed()
	if !was.Running || was.Checked != 4 || was.Percent <= 0 || was.Percent >= 100 {
		t.Fatalf("%+v", was)
	}
	o.Close(true)
	o = openBrick(t, o.opts)
	if s := o.Scrubbed(); s != was {
		t.Fatalf("forgotten: %+v, was %+v", s, was)
	}
	if err := o.Scrub(context.Background(), atOnce); err != nil {
		t.Fatal(err)
	}
	if s := o.Scrubbed(); s.Running || s.Checked != 10 || s.Percent != 100 {
		t.Errorf("%+v", s)
	}
}

// Files get their checksums when they have been quiet for a while, and no sooner.
func TestSignFresh(t *testing.T) {
	o := newBrick(t)
	f := o.create(fsop.RootIno, "f")
	content := noise(300<<10, 1)
	now := time.Now().UnixNano()
	e := o.entry(&fsop.Write{Ino: f, Data: content})
	e.Time = now
	if _, err := o.Execute(e, nil); err != nil {
		t.Fatal(err)
	}
	o.settleAll()
	has := func() uint32 {
		base, err := o.store.Base(f, false)
		if err != nil {
			t.Fatal(err)
		}
		s, err := o.store.Sums(f, base.Incarnation, 0)
		if err != nil {
			t.Fatal(err)
		}
		return s.Has
	}
	hour := atOnce
	hour.Quiet = time.Hour
	if err := o.SignFresh(context.Background(), hour); err != nil || has() != 0 {
		t.Fatalf("too soon: %x, %v", has(), err)
	}
	if err := o.SignFresh(context.Background(), atOnce); err != nil || has() != 7 {
		t.Fatalf("%x, %v", has(), err)
	}
	o.write(f, 140<<10, []byte("x"))
	if has() != 7 {
		t.Error("forgotten too early")
	}
	o.settleAll()
	if has() != 5 {
		t.Errorf("after a change of the second block: %x", has())
	}
	// Emptied, the checksums go with the data file.
	o.must(&fsop.Setattr{Ino: f, Valid: fsop.SetSize, Size: 0})
	o.settleAll()
	o.settleAll()
	n := 0
	if err := o.store.Records([]byte{'c'}, []byte{'d'}, func(_, _ []byte) (bool, error) { n++; return true, nil }); err != nil || n != 0 {
		t.Errorf("%d records of checksums are left, %v", n, err)
	}
	if len(o.rotten) != 0 {
		t.Error("rotten")
	}
}

// A checksum that was made of a later state than the file's is none.
func TestSumsOfAnotherHistory(t *testing.T) {
	o := newBrick(t)
	f := o.create(fsop.RootIno, "f")
	o.write(f, 0, noise(100<<10, 1))
	o.settleAll()
	o.scrubAll()
	base, err := o.store.Base(f, false)
	if err != nil {
		t.Fatal(err)
	}
	s, err := o.store.Sums(f, base.Incarnation, 0)
	if err != nil || s.Has != 1 {
		t.Fatalf("%+v, %v", s, err)
	}
	s.Made.Seq += 100
	s.Sum[0]++
	func() {
		defer o.lockAll()()
		if err := o.commitSums(data.Name{Ino: f, Incarnation: base.Incarnation}, 0, &s, nil); err != nil {
			t.Fatal(err)
		}
	}()
	if got := o.scrubAll(); got.Bad != 0 || got.Made != 1 {
		t.Errorf("%+v", got)
	}
	var again meta.Sums
	if again, err = o.store.Sums(f, base.Incarnation, 0); err != nil || again.Sum[0] != s.Sum[0]-1 {
		t.Errorf("%+v, %v", again, err)
	}
}

// A block that the disk cannot read is as good as rotten, and does not keep the scrub
// from the others.
func TestScrubUnreadable(t *testing.T) {
	a, b, ino, want := pair(t, 600<<10)
	a.scrubAll()
	a.Close(true)
	faulty := disk.NewFaulty(a.opts.FS)
	a.opts.FS = faulty
	a.Brick = openBrick(t, a.opts).Brick
	name := a.dataFile(ino)
	faulty.Add(disk.Fault{Op: disk.OpRead, Path: name[strings.LastIndexByte(name, '/')+1:], Times: 2, Err: syscall.EIO})
	if s := a.scrubAll(); s.Rotten != 1 || s.Checked != 5 || s.Running {
		t.Fatalf("%+v", s)
	}
	if err := a.repairAll(); err != nil {
		t.Fatal(err)
	}
	if s := a.scrubAll(); s.Rotten != 0 || s.Bad != 0 || s.Repaired != 1 || !bytes.Equal(a.contents(ino), want) {
		t.Errorf("%+v", s)
	}
	b.Commit(b.Tail().Seq)
}

// What has rotted is seen by those who look at a brick alone.
func TestCheckRotten(t *testing.T) {
	o := newBrick(t)
	f := o.create(fsop.RootIno, "f")
	o.write(f, 0, noise(300<<10, 1))
	o.settleAll()
	o.scrubAll()
	o.rot(f, 140<<10, 1)
	o.Close(true)
	off, err := OpenOffline(OfflineOptions{FS: o.opts.FS, Dir: "/b"})
	if err != nil {
		t.Fatal(err)
	}
	defer off.Close()
	var said []string
	got, err := off.Check(context.Background(), true, func(p Problem) { said = append(said, p.String()) })
	if err != nil || got.Problems != 1 || !strings.Contains(said[0], "bytes 131072 to 262144 have rotted") {
		t.Errorf("%+v, %v, %q", got, err, said)
	}
}

// TestScrubOfSlowDisk has scrubbing wait for the disk with contents that are in the KV.
// Nobody else does.
func TestScrubOfSlowDisk(t *testing.T) {
	var slow *disk.Faulty
	o := newBrick(t, func(o *Options) {
		slow = disk.NewFaulty(o.FS)
		o.FS = slow
		o.Alone = func() bool { return false }
	})
	ino := o.create(fsop.RootIno, "small")
	o.write(ino, 0, bytes.Repeat([]byte("small"), 2000))
	o.settleAll()
	if err := o.store.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	waits, answer := make(chan struct{}), make(chan struct{})
	var once sync.Once
	slow.Observe(func(op disk.Op, name string) {
		if op == disk.OpRead && strings.HasSuffix(name, ".blob") {
			once.Do(func() { close(waits) })
		}
	})
	slow.Add(disk.Fault{Op: disk.OpRead, Path: "*.blob", Until: answer})
	if err := o.BeginScrub(); err != nil {
		t.Fatal(err)
	}
	scrubbed, made := make(chan error, 1), make(chan error, 1)
	go func() { scrubbed <- o.Scrub(context.Background(), atOnce) }()
	select {
	case <-waits:
	case err := <-scrubbed:
		t.Fatalf("scrubbing did not read the file's contents: %v", err)
	}
	go func() {
		_, err := o.do(&fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: "another", Mode: 0o644}})
		made <- err
	}()
	select {
	case err := <-made:
		if err != nil {
			t.Error(err)
		}
		close(answer)
	case <-time.After(time.Minute):
		t.Error("a file cannot be made while scrubbing waits for the disk")
		close(answer)
		<-made
	}
	if err := <-scrubbed; err != nil {
		t.Error(err)
	}
}
