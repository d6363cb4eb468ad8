package brick

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"testing"

	"mortar/internal/brick/data"
	"mortar/internal/disk"
	"mortar/internal/fsop"
	"mortar/internal/oplog"
)

// twins are two bricks with the same contents, all of it settled: large and
// small files, with holes, longer and shorter than they once were.
func twins(t *testing.T) (a, b *opened, large fsop.Ino) {
	a, b = newBrick(t), newBrick(t)
	content := make([]byte, 300<<10)
	for i := range content {
		content[i] = byte(i*7>>3) | 1
	}
	for _, o := range []*opened{a, b} {
		large = o.create(fsop.RootIno, "large")
		o.write(large, 0, content)
		for i := range 20 {
			f := o.create(fsop.RootIno, fmt.Sprint(i))
			o.write(f, 0, content[:1000*(i+1)])
			o.write(o.create(fsop.RootIno, fmt.Sprint("large", i)), uint64(i)<<20, content[:100<<10])
		}
		o.settleAll()
		// What the end of a data file is after it was cut and made longer.
		for i := range 6 {
			f := o.must(&fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: fmt.Sprint("cut", i)}}).Attr.Ino
			o.write(f, 0, content[:200<<10])
			o.settleAll()
			o.must(&fsop.Setattr{Ino: f, Valid: fsop.SetSize, Size: uint64(50+i*20) << 10})
			if i%2 == 0 {
				o.must(&fsop.Setattr{Ino: f, Valid: fsop.SetSize, Size: 250 << 10})
			}
			if i%3 == 0 {
				o.must(&fsop.Fallocate{Ino: f, Off: 100 << 10, Len: 300 << 10})
			}
			o.settleAll()
		}
		o.settleAll()
	}
	return a, b, large
}

// dataFile is where the contents of a file are.
func (o *opened) dataFile(ino fsop.Ino) string {
	o.t.Helper()
	base, err := o.store.Base(ino, false)
	if err != nil || base.Incarnation == 0 {
		o.t.Fatalf("%+v, %v", base, err)
	}
	return o.data.Path(data.Name{Ino: ino, Incarnation: base.Incarnation})
}

// change opens a file of the brick's disk.
func change(t testing.TB, fs disk.FS, name string, do func(f disk.File) error) {
	t.Helper()
	f, err := fs.OpenFile(name, os.O_RDWR)
	if err == nil {
		err = do(f)
	}
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}

// A data file that was cut or removed is noticed by whoever reads it, and never
// read as something else; the brick notes which file it was, and a comparison
// copies that one and no other.
func TestDamagedDataFile(t *testing.T) {
	ctx := context.Background()
	damages := map[string]func(t *testing.T, fs disk.FS, file string){
		"cut": func(t *testing.T, fs disk.FS, file string) {
			change(t, fs, file, func(f disk.File) error { return f.Truncate(200 << 10) })
		},
		"empty": func(t *testing.T, fs disk.FS, file string) {
			change(t, fs, file, func(f disk.File) error { return f.Truncate(0) })
		},
		"missing": func(t *testing.T, fs disk.FS, file string) {
			if err := fs.Remove(file); err != nil {
				t.Fatal(err)
			}
		},
	}
	finds := map[string]func(b *opened, large fsop.Ino) error{
		"read": func(b *opened, large fsop.Ino) error {
			_, _, err := b.Read(ctx, &fsop.Read{Ino: large, Off: 190 << 10, Len: 50 << 10})
			return err
		},
		"digest": func(b *opened, _ fsop.Ino) error {
			_, err := b.Digest(ctx)
			return err
		},
		"settle": func(b *opened, large fsop.Ino) error {
			b.write(large, 10<<10, []byte("changed"))
			b.Commit(b.Tail().Seq)
			err := b.settleCycle(ctx, true)
			if err != nil {
				err = b.failWith(err)
			}
			return err
		},
		"source": func(b *opened, large fsop.Ino) error {
			b.Commit(b.Tail().Seq)
			src, err := b.Source()
			if err != nil {
				b.t.Fatal(err)
			}
			defer src.Close()
			_, err = src.Serve(ctx, encode(&healRequest{Kind: healBlocks, Ino: large, Blocks: []uint64{1}}))
			return err
		},
	}
	for damage, harm := range damages {
		for way, find := range finds {
			t.Run(damage+", "+way, func(t *testing.T) {
				a, b, large := twins(t)
				file := b.dataFile(large)
				if err := b.Close(true); err != nil {
					t.Fatal(err)
				}
				harm(t, b.opts.FS, file)
				b = openBrick(t, b.opts)
				b.epoch = a.epoch
				if !b.Clean() || !b.Whole() {
					t.Fatal("noticed too early: this test tests nothing")
				}
				err := find(b, large)
				if !errors.Is(err, ErrDamaged) || !errors.Is(err, ErrDamagedFile) || !strings.Contains(err.Error(), file) {
					t.Fatalf("%v", err)
				}
				if !errors.Is(b.Err(), ErrDamagedFile) {
					t.Errorf("the brick goes on: %v", b.Err())
				}
				if _, _, err := b.Read(ctx, &fsop.Getattr{Ino: fsop.RootIno}); !errors.Is(err, ErrDamagedFile) {
					t.Errorf("the brick goes on to answer: %v", err)
				}
				b.Close(false)
				again, err := Open(b.opts)
				if err != nil {
					t.Fatal(err)
				}
				defer again.Close(false)
				if again.Whole() || again.Clean() {
					t.Fatalf("whole %v, clean %v", again.Whole(), again.Clean())
				}
				var last HealProgress
				a.Commit(a.Tail().Seq)
				src, err := a.Source()
				if err != nil {
					t.Fatal(err)
				}
				defer src.Close()
				if err := again.Heal(ctx, src.Pos(), src.Serve, func(p HealProgress) { last = p }); err != nil {
					t.Fatal(err)
				}
				if last.FilesTotal != 1 || last.BytesTotal > 400<<10 {
					t.Errorf("more was copied than had to be: %+v", last)
				}
				if da, db := digest(t, a.Brick), digest(t, again); da != db {
					t.Errorf("digests differ: %+v, %+v", da, db)
				}
			})
		}
	}
}

// A brick that nobody can help goes on with what can be read.
func TestDamagedAlone(t *testing.T) {
	ctx := context.Background()
	_, b, large := twins(t)
	file := b.dataFile(large)
	if err := b.Close(true); err != nil {
		t.Fatal(err)
	}
	change(t, b.opts.FS, file, func(f disk.File) error { return f.Truncate(200 << 10) })
	alone := true
	b.opts.Alone = func() bool { return alone }
	b = openBrick(t, b.opts)
	if r := b.get(&fsop.Read{Ino: large, Off: 100 << 10, Len: 100 << 10}); len(r.Data) != 100<<10 || r.Data[0] == 0 {
		t.Errorf("what is there reads as %d bytes", len(r.Data))
	}
	for range 2 {
		if _, _, err := b.Read(ctx, &fsop.Read{Ino: large, Off: 150 << 10, Len: 100 << 10}); err != fsop.EIO {
			t.Errorf("what is not reads: %v", err)
		}
	}
	if _, err := b.Digest(ctx); !errors.Is(err, ErrDamagedFile) {
		t.Errorf("digest: %v", err)
	}
	if err := b.Err(); err != nil || !b.Whole() {
		t.Errorf("whole %v, %v", b.Whole(), err)
	}
	b.write(b.create(fsop.RootIno, "more"), 0, []byte("more"))
	alone = false // another one is in sync by now
	if _, _, err := b.Read(ctx, &fsop.Read{Ino: large, Off: 150 << 10, Len: 100 << 10}); !errors.Is(err, ErrDamagedFile) || b.Whole() {
		t.Errorf("with a peer: %v, whole %v", err, b.Whole())
	}
}

// What settling has begun and a crash undone is no damage.
func TestCutBySettling(t *testing.T) {
	for seed := range uint64(20) {
		mem := disk.NewMem()
		format(t, mem, "/b")
		o := openBrick(t, testOptions(mem))
		f := o.create(fsop.RootIno, "f")
		content := bytes.Repeat([]byte("x"), 300<<10)
		o.write(f, 0, content)
		o.settleAll()
		o.must(&fsop.Setattr{Ino: f, Valid: fsop.SetSize, Size: 100 << 10})
		if err := o.store.Flush(context.Background()); err != nil {
			t.Fatal(err)
		}
		o.settleAll() // cuts the data file; the KV's knowledge of it is lost
		opts := o.opts
		opts.FS = mem.Crash(rand.New(rand.NewPCG(seed, 1)))
		o.Close(false)
		back := openBrick(t, opts)
		if got := back.contents(f); !bytes.Equal(got, content[:100<<10]) {
			t.Fatalf("seed %d: %d bytes", seed, len(got))
		}
		digest(t, back.Brick)
		back.write(f, 50<<10, []byte("more"))
		back.settleAll()
		digest(t, back.Brick)
		if err := back.Err(); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

// Damage of log or KV is told as such, and a brick that was renewed is healed by
// a comparison.
func TestRenew(t *testing.T) {
	dir := func(t *testing.T, fs disk.FS, name, suffix string) (files []string) {
		names, err := fs.List("/b/.mortar/" + name)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			if strings.Contains(n, suffix) {
				files = append(files, "/b/.mortar/"+name+"/"+n)
			}
		}
		if len(files) == 0 {
			t.Fatalf("no file %s in %q", suffix, names)
		}
		return files
	}
	flip := func(f disk.File) error {
		st, err := f.Stat()
		if err != nil {
			return err
		}
		p := make([]byte, st.Size())
		if _, err := f.ReadAt(p, 0); err != nil {
			return err
		}
		_, err = f.WriteAt([]byte("DAMAGE"), int64(len(bytes.TrimRight(p, "\x00"))/2))
		return err
	}
	for name, c := range map[string]struct {
		harm func(t *testing.T, fs disk.FS)
		want string
	}{
		"log flipped": {func(t *testing.T, fs disk.FS) {
			l, err := oplog.Open(oplog.Options{FS: fs, Dir: "/b/.mortar/log", ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			_, _, locs, err := l.Read(l.Tail().Seq-3, 1)
			if err != nil {
				t.Fatal(err)
			}
			change(t, fs, fmt.Sprintf("/b/.mortar/log/%016x.log", locs[0].Segment), func(f disk.File) error {
				_, err := f.WriteAt([]byte("DAMAGE"), locs[0].Off)
				return err
			})
		}, "/log/"},
		"tables flipped": {func(t *testing.T, fs disk.FS) {
			for _, f := range dir(t, fs, "meta", ".sst") {
				change(t, fs, f, flip)
			}
		}, "/meta"},
		"tables cut": {func(t *testing.T, fs disk.FS) {
			for _, f := range dir(t, fs, "meta", ".sst") {
				change(t, fs, f, func(f disk.File) error { return f.Truncate(100) })
			}
		}, "/meta"},
		"tables missing": {func(t *testing.T, fs disk.FS) {
			for _, f := range dir(t, fs, "meta", ".sst") {
				if err := fs.Remove(f); err != nil {
					t.Fatal(err)
				}
			}
		}, "/meta"},
		"manifest missing": {func(t *testing.T, fs disk.FS) {
			for _, f := range dir(t, fs, "meta", "MANIFEST-") {
				if strings.Contains(f, "marker") {
					continue
				}
				if err := fs.Remove(f); err != nil {
					t.Fatal(err)
				}
			}
		}, "/meta"},
	} {
		t.Run(name, func(t *testing.T) {
			a, b, _ := twins(t)
			for range 3 { // some log that is not settled and whose end is durable
				for _, o := range []*opened{a, b} {
					o.write(2, 5, bytes.Repeat([]byte("late"), 500))
					if err := o.Sync(context.Background(), o.Tail().Seq); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := b.store.Flush(context.Background()); err != nil {
				t.Fatal(err)
			}
			b.Close(false)
			c.harm(t, b.opts.FS)
			// It is found when the brick is opened, or replayed, or read.
			damaged, err := Open(b.opts)
			if err == nil {
				if err = damaged.Rewind(damaged.Tail()); err == nil {
					_, err = damaged.Digest(context.Background())
				}
				damaged.Close(false)
			}
			if !errors.Is(err, ErrDamaged) || errors.Is(err, ErrDamagedFile) || !strings.Contains(err.Error(), "/b/.mortar"+c.want) {
				t.Fatalf("%v", err)
			}
			other := b.opts
			other.Identity = testID
			other.Identity.Brick[0]++
			if err := Renew(other); !errors.Is(err, ErrOtherBrick) {
				t.Errorf("renewing another brick: %v", err)
			}
			if err := Renew(b.opts); err != nil {
				t.Fatal(err)
			}
			back, err := Open(b.opts)
			if err != nil {
				t.Fatal(err)
			}
			defer back.Close(false)
			if back.Whole() || back.Clean() || back.Tail().Seq != 0 || back.Identity().Brick != testID.Brick {
				t.Errorf("whole %v, clean %v, ends at %v", back.Whole(), back.Clean(), back.Tail())
			}
			if err := Renew(b.opts); err == nil || !strings.Contains(err.Error(), "in use") {
				t.Errorf("renewing an open brick: %v", err)
			}
			heal(t, a.Brick, back)
			if da, db := digest(t, a.Brick), digest(t, back); da != db {
				t.Errorf("digests differ: %+v, %+v", da, db)
			}
		})
	}
}

// A renewal that ends anywhere leaves a brick that is damaged as before, or not
// whole; never one that is trusted.
func TestRenewInterrupted(t *testing.T) {
	for _, op := range []disk.Op{disk.OpRemove, disk.OpSync, disk.OpWrite} {
		for nth := range 8 {
			mem := disk.NewMem()
			format(t, mem, "/b")
			o := openBrick(t, testOptions(mem))
			o.write(o.create(fsop.RootIno, "f"), 0, bytes.Repeat([]byte("x"), 100000))
			o.settleAll()
			if err := o.Close(true); err != nil {
				t.Fatal(err)
			}
			faulty := disk.NewFaulty(mem, disk.Fault{Op: op, Skip: nth, Times: 100, Err: syscall.EIO})
			opts := o.opts
			opts.FS = faulty
			err := Renew(opts)
			opts.FS = mem.Crash(rand.New(rand.NewPCG(uint64(nth), uint64(op))))
			b, oerr := Open(opts)
			if oerr != nil {
				continue // it says so
			}
			if b.Whole() && b.Tail().Seq != o.Tail().Seq {
				t.Errorf("%v %d: whole, and ends at %v; renewed: %v", op, nth, b.Tail(), err)
			}
			if err == nil && b.Whole() {
				t.Errorf("%v %d: renewed and whole", op, nth)
			}
			b.Close(false)
		}
	}
}

// Disks that fail or are full are not damage: emptying the brick would help nobody.
func TestFailuresAreNoDamage(t *testing.T) {
	for _, fail := range []error{syscall.EIO, syscall.ENOSPC, syscall.EROFS} {
		for _, op := range []disk.Op{disk.OpWrite, disk.OpSync, disk.OpRead} {
			o := newBrick(t, func(o *Options) { o.FS = disk.NewFaulty(o.FS) })
			faulty := o.opts.FS.(*disk.Faulty)
			f := o.create(fsop.RootIno, "f")
			o.write(f, 0, bytes.Repeat([]byte("x"), 100000))
			o.settleAll()
			fault := disk.Fault{Op: op, Times: 1000, Err: fail}
			if op != disk.OpRead {
				fault.Path = "*.log" // the KV's library gives up when its manifest fails, and leaves goroutines behind
			}
			faulty.Add(fault)
			_, err := o.do(&fsop.Write{Ino: f, Data: bytes.Repeat([]byte("y"), 100000)})
			if err == nil {
				err = o.Sync(context.Background(), o.Tail().Seq)
			}
			if err == nil {
				o.Commit(o.Tail().Seq)
				err = o.settleCycle(context.Background(), true)
			}
			if err == nil {
				o.data.CloseAll()
				_, _, err = o.Read(context.Background(), &fsop.Read{Ino: f, Len: 1000})
			}
			if err != nil {
				err = o.failWith(err)
			}
			if errors.Is(err, ErrDamaged) {
				t.Errorf("%v at %v: %v", fail, op, err)
			}
			faulty.Clear()
			o.Close(false)
		}
	}
}

// A brick whose log cannot be sent any more goes on as long as nobody else has what it
// has, and is made anew afterwards.
func TestDamagedLogOfALeader(t *testing.T) {
	alone := true
	o := newBrick(t, func(o *Options) { o.Alone = func() bool { return alone } })
	f := o.create(fsop.RootIno, "f")
	for range 5 {
		o.write(f, 0, bytes.Repeat([]byte("x"), 5000))
	}
	if err := o.Sync(context.Background(), o.Tail().Seq); err != nil {
		t.Fatal(err)
	}
	_, _, locs, err := o.log.Read(o.Tail().Seq-3, 1)
	if err != nil {
		t.Fatal(err)
	}
	change(t, o.opts.FS, fmt.Sprintf("/b/.mortar/log/%016x.log", locs[0].Segment), func(f disk.File) error {
		_, err := f.WriteAt([]byte("DAMAGE"), locs[0].Off)
		return err
	})
	o.Reconsider()
	if _, err := o.Entries(0, 1<<20); err == nil {
		_, err = o.Entries(o.Tail().Seq-3, 1<<20)
		if err == nil {
			t.Fatal("not noticed")
		}
	}
	o.Reconsider()
	if err := o.Err(); err != nil {
		t.Fatalf("it ended although nobody else has what it has: %v", err)
	}
	alone = false
	o.Reconsider()
	if err := o.Err(); !errors.Is(err, ErrDamaged) || errors.Is(err, ErrDamagedFile) {
		t.Errorf("%v", err)
	}
}
