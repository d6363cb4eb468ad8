package brick

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"mortar/internal/brick/data"
	"mortar/internal/cluster"
	"mortar/internal/disk"
	"mortar/internal/fsop"
	"mortar/internal/oplog"
)

func TestIdentity(t *testing.T) {
	fs := disk.NewMem()
	if _, err := Open(testOptions(fs)); !errors.Is(err, ErrNoBrick) || !strings.Contains(err.Error(), "mounted") {
		t.Errorf("no directory: %v", err)
	}
	if err := Format(fs, "/b", testID); err == nil {
		t.Error("formatted a directory that does not exist")
	}
	format(t, fs, "/b")
	if err := Format(fs, "/b", testID); !errors.Is(err, ErrExists) {
		t.Errorf("formatted twice: %v", err)
	}
	if id, err := ReadIdentity(fs, "/b"); err != nil || id.Volume != testID.Volume || id.Format != FormatVersion {
		t.Errorf("identity: %+v, %v", id, err)
	}
	for name, change := range map[string]func(*Identity){
		"pool":   func(i *Identity) { i.Pool[0]++ },
		"volume": func(i *Identity) { i.Volume[0]++ },
		"set":    func(i *Identity) { i.Set++ },
		"brick":  func(i *Identity) { i.Brick[0]++ },
	} {
		o := testOptions(fs)
		o.Identity = testID
		change(&o.Identity)
		if _, err := Open(o); !errors.Is(err, ErrOtherBrick) {
			t.Errorf("other %s: %v", name, err)
		}
	}
	for name, c := range map[string]struct{ text, says string }{
		"damaged":       {"{", "damaged"},
		"newer":         {fmt.Sprintf(`{"format": %d, "what": "is this"}`, FormatVersion+1), fmt.Sprintf("format %d, ", FormatVersion+1)},
		"too old":       {fmt.Sprintf(`{"format": %d}`, oldestFormat-1), fmt.Sprintf("format %d, ", oldestFormat-1)},
		"unknown field": {fmt.Sprintf(`{"format": %d, "what": "is this"}`, FormatVersion), "unknown field"},
	} {
		if err := disk.WriteFile(fs, "/b/.mortar/brick.json", []byte(c.text)); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(testOptions(fs)); err == nil || errors.Is(err, ErrNoBrick) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
		if err := Format(fs, "/b", testID); !errors.Is(err, ErrExists) {
			t.Errorf("%s, formatted: %v", name, err)
		}
	}
	if err := fs.Remove("/b/.mortar/brick.json"); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(testOptions(fs)); !errors.Is(err, ErrNoBrick) {
		t.Errorf("without brick.json: %v", err)
	}
}

// TestOlderFormat opens a brick of the format before there were checksums. Whoever
// serves it raises the format, or does not serve it; who looks at it does not.
func TestOlderFormat(t *testing.T) {
	o := newBrick(t)
	want := bytes.Repeat([]byte("mortar"), sumSize)
	ino := o.create(fsop.RootIno, "f")
	o.write(ino, 0, want)
	o.settleAll()
	if err := o.Close(true); err != nil {
		t.Fatal(err)
	}
	old := testID
	old.Format = oldestFormat
	if err := writeIdentity(o.opts.FS, o.opts.Dir, old); err != nil {
		t.Fatal(err)
	}
	expect := func(format int, when string) {
		t.Helper()
		if id, err := ReadIdentity(o.opts.FS, o.opts.Dir); err != nil || id.Format != format || id.Brick != testID.Brick {
			t.Fatalf("%s: identity %+v, %v; want format %d", when, id, err, format)
		}
	}
	off, err := OpenOffline(OfflineOptions{FS: o.opts.FS, Dir: o.opts.Dir})
	if err != nil {
		t.Fatal(err)
	}
	if got := off.Identity().Format; got != oldestFormat {
		t.Errorf("looked at, it says format %d", got)
	}
	off.Close()
	expect(oldestFormat, "looked at")
	inTheWay := o.path(identity) + ".tmp"
	if err := o.opts.FS.MkdirAll(inTheWay, 0o700); err != nil {
		t.Fatal(err)
	}
	if b, err := Open(o.opts); err == nil || !strings.Contains(err.Error(), "raising its format") {
		if err == nil {
			b.Close(false)
		}
		t.Errorf("opened although its format cannot be raised: %v", err)
	}
	expect(oldestFormat, "refused")
	if err := o.opts.FS.RemoveAll(inTheWay); err != nil {
		t.Fatal(err)
	}
	o = openBrick(t, o.opts)
	expect(FormatVersion, "served")
	if o.Identity().Format != FormatVersion || !o.Clean() {
		t.Errorf("served as %+v, clean: %v", o.Identity(), o.Clean())
	}
	if !bytes.Equal(o.contents(ino), want) {
		t.Error("the file has other bytes")
	}
	if s := o.scrubAll(); s.Made == 0 {
		t.Errorf("its blocks got no checksums: %+v", s)
	}
}

func TestOpenTwice(t *testing.T) {
	o := newBrick(t)
	if _, err := Open(o.opts); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("opened twice: %v", err)
	}
}

// TestCleanMark checks when a brick claims to have kept all.
func TestCleanMark(t *testing.T) {
	o := newBrick(t)
	reopen := func(clean bool) {
		t.Helper()
		if err := o.Close(clean); err != nil {
			t.Fatal(err)
		}
		o = openBrick(t, o.opts)
	}
	expect := func(want bool, when string) {
		t.Helper()
		if o.Clean() != want {
			t.Errorf("%s: clean is %v", when, o.Clean())
		}
	}
	expect(false, "a new brick")
	o.create(fsop.RootIno, "f")
	reopen(true)
	expect(true, "closed cleanly")
	reopen(false)
	expect(true, "opened, not changed, not closed cleanly")
	o.create(fsop.RootIno, "g")
	reopen(false)
	expect(false, "changed and not closed cleanly")
	reopen(true)
	expect(true, "closed cleanly again")
	o.create(fsop.RootIno, "h")
	reopen(true)
	o.must(&fsop.Noop{})
	if err := o.Sync(context.Background(), o.Tail().Seq); err != nil {
		t.Fatal(err)
	}
	fs := o.opts.FS.(*disk.Mem).Crash(rand.New(rand.NewPCG(1, 1)))
	o.Close(false)
	opts := o.opts
	opts.FS = fs
	o = openBrick(t, opts)
	expect(false, "changed, then a crash")
	if err := o.Rewind(cluster.Pos{Epoch: 1, Seq: o.Tail().Seq - 1}); err != nil {
		t.Fatal(err)
	}
	reopen(true)
	expect(true, "rewound and closed")
	if err := o.Distrust(); err != nil {
		t.Fatal(err)
	}
	if o.Whole() {
		t.Error("whole after Distrust")
	}
	if err := o.Close(true); err != nil {
		t.Fatal(err)
	}
	b, err := Open(o.opts)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close(false)
	if b.Whole() || b.Clean() {
		t.Errorf("after a restart: whole %v, clean %v", b.Whole(), b.Clean())
	}
}

// TestNotReplayed checks that a brick does nothing before it was told how far
// its log goes.
func TestNotReplayed(t *testing.T) {
	o := newBrick(t)
	for i := range 5 {
		o.create(fsop.RootIno, fmt.Sprint(i))
	}
	if err := o.Sync(context.Background(), o.Tail().Seq); err != nil {
		t.Fatal(err)
	}
	o.Close(false)
	b, err := Open(o.opts)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close(false)
	if b.Tail().Seq != 5 || b.Applied().Seq != 0 || !b.Whole() {
		t.Errorf("tail %v, applied %v", b.Tail(), b.Applied())
	}
	if _, err := (&opened{Brick: b, t: t}).do(&fsop.Noop{}); err == nil {
		t.Error("executed on top of a log that was not replayed")
	}
	if _, err := b.Source(); err == nil {
		t.Error("a source that was not replayed")
	}
	if err := b.Rewind(cluster.Pos{Epoch: 2, Seq: 3}); err == nil || errors.Is(err, ErrTooFar) {
		t.Errorf("rewound to a position of another history: %v", err)
	}
	if err := b.Rewind(cluster.Pos{Epoch: 1, Seq: 3}); err != nil {
		t.Fatal(err)
	}
	if b.Tail().Seq != 3 || b.Applied().Seq != 3 {
		t.Errorf("tail %v, applied %v, want 3", b.Tail(), b.Applied())
	}
	if err := b.Rewind(cluster.Pos{Epoch: 1, Seq: 4}); err == nil {
		t.Error("rewound to what was undone")
	}
}

// TestRewindTooFar checks that what is durable is not undone.
func TestRewindTooFar(t *testing.T) {
	o := newBrick(t)
	f := o.create(fsop.RootIno, "f")
	o.write(f, 0, []byte("one"))
	before := o.Tail()
	o.write(f, 0, []byte("two"))
	if err := o.store.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	after := o.Tail()
	if err := o.Rewind(before); !errors.Is(err, ErrTooFar) {
		t.Errorf("rewind behind the durable position: %v", err)
	}
	if o.Tail() != after || o.Applied() != after || string(o.contents(f)) != "two" || o.Err() != nil {
		t.Errorf("the refused rewind changed the brick: %v, %v, %v", o.Tail(), o.Applied(), o.Err())
	}
}

// TestLogLost opens bricks whose log does not fit their metadata.
func TestLogLost(t *testing.T) {
	lose := func(name string, change func(t *testing.T, fs disk.FS)) {
		t.Run(name, func(t *testing.T) {
			o := newBrick(t)
			f := o.create(fsop.RootIno, "f")
			o.write(f, 0, bytes.Repeat([]byte("x"), 50000))
			if err := o.Close(true); err != nil {
				t.Fatal(err)
			}
			change(t, o.opts.FS)
			b, err := Open(o.opts)
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close(false)
			if b.Whole() || b.Clean() {
				t.Errorf("whole %v, clean %v", b.Whole(), b.Clean())
			}
			// Another brick can help.
			from := newBrick(t)
			from.write(from.create(fsop.RootIno, "g"), 0, []byte("y"))
			heal(t, from.Brick, b)
			if da, db := digest(t, from.Brick), digest(t, b); da != db {
				t.Errorf("digests differ: %+v, %+v", da, db)
			}
		})
	}
	lose("all of it", func(t *testing.T, fs disk.FS) {
		if err := fs.RemoveAll("/b/.mortar/log"); err != nil {
			t.Fatal(err)
		}
	})
	lose("its end", func(t *testing.T, fs disk.FS) {
		l, err := oplog.Open(oplog.Options{FS: fs, Dir: "/b/.mortar/log"})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.TruncateAfter(1); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	})
	lose("its beginning", func(t *testing.T, fs disk.FS) {
		l, err := oplog.Open(oplog.Options{FS: fs, Dir: "/b/.mortar/log"})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Reset(cluster.Pos{Epoch: 1, Seq: 700}, []cluster.Pos{{Epoch: 1, Seq: 1}}); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestFailures has the disk fail at some call, and checks that the brick then
// refuses everything, and comes back with what was durable.
func TestFailures(t *testing.T) {
	for _, op := range []disk.Op{disk.OpWrite, disk.OpSync} {
		for nth := range 60 {
			mem := disk.NewMem()
			format(t, mem, "/b")
			faulty := disk.NewFaulty(mem)
			opts := testOptions(faulty)
			opts.Retain = -1
			b, err := Open(opts)
			if err != nil {
				t.Fatal(err)
			}
			if err := b.Rewind(b.Tail()); err != nil {
				t.Fatal(err)
			}
			o := &opened{Brick: b, t: t}
			faulty.Add(disk.Fault{Op: op, Skip: nth, Times: 1, Err: syscall.EIO, Torn: true})
			var durable uint64
			for i := range 30 {
				r, err := o.do(&fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: fmt.Sprint(i)}})
				if err == nil {
					_, err = o.do(&fsop.Write{Ino: r.Reply.Attr.Ino, Data: make([]byte, 30000)})
				}
				if err == nil {
					err = o.Sync(context.Background(), o.Tail().Seq)
					if err == nil {
						durable = o.Tail().Seq
					}
				}
				if err == nil && i%3 == 0 {
					o.Commit(o.Tail().Seq)
					err = o.settleCycle(context.Background(), true)
				}
				if err != nil {
					break
				}
			}
			faulty.Clear()
			failed := b.Err() != nil
			if failed {
				if _, err := o.do(&fsop.Noop{}); err == nil {
					t.Errorf("%v %d: a failed brick executes", op, nth)
				}
				if _, _, err := b.Read(context.Background(), &fsop.Getattr{Ino: fsop.RootIno}); err == nil {
					t.Errorf("%v %d: a failed brick reads", op, nth)
				}
			}
			crashed := mem.Crash(rand.New(rand.NewPCG(uint64(nth), 1)))
			b.Close(true)
			opts.FS = crashed
			back := openBrick(t, opts)
			if back.Tail().Seq < durable {
				t.Errorf("%v %d: %d was durable, the log ends at %v", op, nth, durable, back.Tail())
			}
			if !back.Whole() {
				t.Errorf("%v %d: not whole", op, nth)
			}
			back.Close(false)
		}
	}
}

// TestAvailIsGiven: what statfs says is available can be reserved a moment later, although
// others write to the disk; and it is what the set can take, not this brick alone.
func TestAvailIsGiven(t *testing.T) {
	fs := disk.NewMem()
	fs.SetLimit(1 << 30)
	format(t, fs, "/b")
	opts := testOptions(fs)
	opts.SegmentSize = 0
	o := openBrick(t, opts)
	avail := func() uint64 { return o.get(&fsop.StatfsOp{Ino: fsop.RootIno}).Statfs.Avail }
	f := o.must(&fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: "f"}, Excl: true}).Attr.Ino
	promised := avail()
	if err := disk.WriteFile(fs, "/other", make([]byte, 2<<20)); err != nil {
		t.Fatal(err)
	}
	o.space.at = time.Time{} // as a second later
	if err := o.Admit(&fsop.Fallocate{Ino: f, Len: promised}); err != nil {
		t.Errorf("%d bytes were available: %v", promised, err)
	}
	o.SetRoom(100 << 20)
	if got := avail(); got > 100<<20 || got < 50<<20 {
		t.Errorf("of 100 MiB that the set can take, %d bytes are available", got)
	}
	o.SetRoom(0)
	if got := avail(); got != 0 {
		t.Errorf("%d bytes are available of nothing that the set can take", got)
	}
}

// TestPunchesCost: a hole costs the same in a file with many as in one with few.
func TestPunchesCost(t *testing.T) {
	o := newBrick(t)
	f := o.must(&fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: "f"}, Excl: true}).Attr.Ino
	const holes = 4000
	o.must(&fsop.Fallocate{Ino: f, Len: 2 * holes * 4096})
	var before, after runtime.MemStats
	cost := func(from, to int) uint64 {
		runtime.ReadMemStats(&before)
		for i := from; i < to; i++ {
			o.must(&fsop.Fallocate{Ino: f, Mode: fsop.FallocPunchHole | fsop.FallocKeepSize, Off: uint64(2*i) * 4096, Len: 4096})
		}
		runtime.ReadMemStats(&after)
		return after.TotalAlloc - before.TotalAlloc
	}
	few := cost(0, 200)
	cost(200, holes-200)
	if many := cost(holes-200, holes); many > 5*few {
		t.Errorf("200 holes took %d bytes of memory, and the last 200 of %d %d", few, holes, many)
	}
	if got := o.get(&fsop.Getattr{Ino: f}).Attr.Blocks; got != holes*8 {
		t.Errorf("%d blocks are left, want %d", got, holes*8)
	}
}

// TestNoRoom fills a small disk.
func TestNoRoom(t *testing.T) {
	fs := disk.NewMem()
	fs.SetLimit(64 << 20)
	format(t, fs, "/b")
	opts := testOptions(fs)
	opts.SegmentSize = 0
	opts.Backlog = 4 << 20
	opts.Reserve = 0.02
	o := openBrick(t, opts)
	chunk := make([]byte, 256<<10)
	for i := range chunk {
		chunk[i] = byte(i * 31)
	}
	// admit gives the brick time to shorten its log before it believes a refusal.
	admit := func(op fsop.Op) bool {
		err := o.Admit(op)
		for range 3 {
			if err == nil {
				return true
			}
			if !errors.Is(err, fsop.ENOSPC) {
				t.Fatal(err)
			}
			o.settle.tight.Store(true)
			o.settleAll()
			err = o.Admit(op)
		}
		return err == nil
	}
	fill := func() (files []fsop.Ino) {
		for i := 0; ; i++ {
			op := &fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: fmt.Sprint(i)}, Excl: true}
			if !admit(op) {
				break
			}
			f := o.must(op).Attr.Ino
			files = append(files, f)
			w := &fsop.Write{Ino: f, Data: chunk}
			if !admit(w) {
				break
			}
			o.must(w)
			o.Commit(o.Tail().Seq)
		}
		if err := o.Err(); err != nil {
			t.Fatalf("after %d files: %v", len(files), err)
		}
		return files
	}
	files := fill()
	st := o.get(&fsop.StatfsOp{}).Statfs
	t.Logf("%d files of %d KiB; %+v", len(files), len(chunk)>>10, st)
	if len(files) < 80 || st.Avail > 1<<20 || st.Total != 64<<20 || st.Free < st.Avail {
		t.Errorf("full with %d files: %+v", len(files), st)
	}
	for _, f := range files[:len(files)-1] {
		if !bytes.Equal(o.contents(f), chunk) {
			t.Fatalf("contents of %d are wrong on a full disk", f)
		}
	}
	// There is always room to delete, and then to write again.
	for i, f := range files {
		for _, op := range []fsop.Op{
			&fsop.Unlink{Parent: fsop.RootIno, Name: fmt.Sprint(i)}, &fsop.Reap{Inos: []fsop.Ino{f}},
		} {
			if err := o.Admit(op); err != nil {
				t.Fatalf("%s: %v", fsop.String(op), err)
			}
			o.must(op)
		}
	}
	o.settleAll()
	o.settleAll()
	o.settleAll()
	if again := fill(); len(again) < len(files)*9/10 {
		t.Errorf("%d files fit, after deleting only %d", len(files), len(again))
	}
}

// TestSweep checks that data files that nothing refers to go after a crash.
func TestSweep(t *testing.T) {
	o := newBrick(t)
	f := o.create(fsop.RootIno, "f")
	o.write(f, 0, make([]byte, 100000))
	o.settleAll()
	o.Close(false)
	files := data.New(o.opts.FS, "/b/.mortar/data", 1)
	for _, n := range []data.Name{{Ino: f, Incarnation: 1}, {Ino: 99, Incarnation: 2}} {
		d, err := files.Create(n)
		if err != nil {
			t.Fatal(err)
		}
		d.Release()
	}
	files.CloseAll()
	back := openBrick(t, o.opts)
	back.settleAll()
	var left []data.Name
	if err := back.data.List(func(n data.Name) error {
		left = append(left, n)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if len(left) != 1 || left[0].Ino != f || left[0].Incarnation == 1 {
		t.Errorf("data files: %+v", left)
	}
	if got := back.contents(f); len(got) != 100000 {
		t.Errorf("%d bytes", len(got))
	}
}
