package brick

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"mortar/internal/disk"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// harms are what is done to a file: where, of its written length, and how.
var harms = []struct {
	name string
	do   func(f disk.File, written int64) error
}{
	{"flipped in front", flipAt(0)},
	{"flipped in the middle", flipAt(50)},
	{"flipped at the end", flipAt(100)},
	{"zeroed in the middle", func(f disk.File, n int64) error {
		_, err := f.WriteAt(make([]byte, min(4096, n/2)), n/3)
		return err
	}},
	{"cut to a half", func(f disk.File, n int64) error { return f.Truncate(n / 2) }},
	{"emptied", func(f disk.File, n int64) error { return f.Truncate(0) }},
}

func flipAt(percent int64) func(disk.File, int64) error {
	return func(f disk.File, n int64) error {
		at := min(n*percent/100, n-1)
		p := make([]byte, 1)
		if _, err := f.ReadAt(p, at); err != nil {
			return err
		}
		p[0] ^= 0x11
		_, err := f.WriteAt(p, at)
		return err
	}
}

// keptFiles are all files of a brick, with their contents.
func keptFiles(t *testing.T, fs disk.FS, dir string, all map[string][]byte) {
	t.Helper()
	names, err := fs.List(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		path := fs.PathJoin(dir, n)
		st, err := fs.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if st.IsDir() {
			keptFiles(t, fs, path, all)
		} else if all[path], err = disk.ReadFile(fs, path, 64<<20); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCorruption does everything that disks do to every file that a brick keeps, and
// looks at what becomes of the brick beside a good one. Either nothing that anybody
// needs was touched, or the damage is found and named; then the brick is made good from
// the other one, or says that a person has to. It never shows nor gives away anything else
// than what was written, and it never ends in a loop.
func TestCorruption(t *testing.T) {
	ctx := context.Background()
	// Two bricks with the same past: data files and small files, settled and signed, a
	// log that was not settled, a promise, and a clean end.
	var old map[string][]byte
	build := func(o *opened, half func()) {
		if err := o.Promise(12); err != nil {
			t.Fatal(err)
		}
		for i := range 2 {
			o.write(o.create(fsop.RootIno, fmt.Sprint(i)), 0, noise(40<<10+i*100<<10, uint64(i)))
			o.write(o.create(fsop.RootIno, fmt.Sprint("small", i)), 0, noise(3000*i+100, uint64(i)))
		}
		o.settleAll()
		o.scrubAll()
		half()
		o.write(2, 100, []byte("changed"))
		o.settleAll()
		o.scrubAll()
		if err := o.Promise(123); err != nil {
			t.Fatal(err)
		}
		o.write(o.create(fsop.RootIno, "late"), 0, noise(50<<10, 9))
		if err := o.Sync(ctx, o.Tail().Seq); err != nil {
			t.Fatal(err)
		}
	}
	small := func(o *Options) { o.SegmentSize, o.MemTable, o.Cache = 256<<10, 256<<10, 256<<10 }
	a := newBrick(t, small)
	build(a, func() {})
	a.Commit(a.Tail().Seq)
	b := newBrick(t, small)
	mem := b.opts.FS.(*disk.Mem)
	pcg := rand.New(rand.NewPCG(1, 1)) // nothing is left to chance: all of it is synced
	build(b, func() {
		if err := b.store.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		old = map[string][]byte{}
		keptFiles(t, mem, "/b/.mortar", old)
	})
	if err := b.Close(true); err != nil {
		t.Fatal(err)
	}
	opts := b.opts
	opts.Others = askOf(func() *Brick { return a.Brick })
	mem = mem.Crash(pcg)
	now := map[string][]byte{}
	keptFiles(t, mem, "/b/.mortar", now)

	want := digest(t, a.Brick)
	outcomes := map[string]int{}
	run := func(file, what string, harm func(fs disk.FS) error) {
		fs := mem.Crash(pcg)
		if err := harm(fs); err != nil {
			t.Fatalf("%s %s: %v", file, what, err)
		}
		o := opts
		o.FS = fs
		got, err := survive(ctx, a.Brick, want, o, file)
		if err != nil {
			t.Errorf("%s %s: %v", file, what, err)
			return
		}
		if (got == "left to a person") != (kindOf(file) == "brick.json") && got != "nothing needed" {
			t.Errorf("%s %s: %s", file, what, got)
		}
		outcomes[got]++
		if testing.Verbose() {
			t.Logf("%s %s: %s", file, what, got)
		}
	}
	kinds := map[string]bool{}
	for _, file := range slices.Sorted(maps.Keys(now)) {
		if strings.HasSuffix(file, "LOCK") || strings.HasSuffix(file, "/lock") {
			continue // nothing is ever read from them
		}
		written := int64(len(bytes.TrimRight(now[file], "\x00")))
		kinds[kindOf(file)] = true
		for _, h := range harms {
			if written == 0 {
				continue
			}
			run(file, h.name, func(fs disk.FS) error {
				f, err := fs.OpenFile(file, os.O_RDWR)
				if err != nil {
					return err
				}
				defer f.Close()
				return h.do(f, written)
			})
		}
		run(file, "removed", func(fs disk.FS) error { return fs.Remove(file) })
		if was, ok := old[file]; ok && !bytes.Equal(was, now[file]) {
			run(file, "as it once was", func(fs disk.FS) error {
				f, err := fs.OpenFile(file, os.O_RDWR|os.O_TRUNC)
				if err != nil {
					return err
				}
				defer f.Close()
				_, err = f.WriteAt(was, 0)
				return err
			})
		}
	}
	t.Logf("%d files of %d kinds: %v", len(now), len(kinds), outcomes)
	for _, kind := range []string{"brick.json", "epoch", "clean", "log", "data", "sst", "MANIFEST"} {
		if !kinds[kind] {
			t.Errorf("no file of kind %s among %v", kind, slices.Sorted(maps.Keys(now)))
		}
	}
}

func kindOf(file string) string {
	rel := strings.TrimPrefix(file, "/b/.mortar/")
	switch {
	case strings.HasPrefix(rel, "log/"):
		return "log"
	case strings.HasPrefix(rel, "data/"):
		return "data"
	case strings.Contains(rel, "MANIFEST"):
		return "MANIFEST"
	case strings.HasPrefix(rel, "meta/"):
		return rel[strings.LastIndexByte(rel, '.')+1:]
	}
	return rel
}

// survive has a damaged brick live on as its daemon would, and says how it went. What it
// shows is compared with good at every step.
func survive(ctx context.Context, good *Brick, want Digest, opts Options, file string) (string, error) {
	how := "nothing needed"
	for life := range 4 {
		b, err := Open(opts)
		if err == nil {
			err = replayAndLook(ctx, good, b, want, &how)
			b.Close(false)
			if err == nil {
				return how, nil
			}
		}
		var lie *shownWrong
		if errors.As(err, &lie) {
			return "", err
		}
		switch {
		case errors.Is(err, ErrDamagedFile):
			how = "a file was healed"
		case errors.Is(err, ErrDamaged):
			if !strings.Contains(err.Error(), "/b/.mortar/") {
				return "", fmt.Errorf("the damage is not named: %w", err)
			}
			if err := Renew(opts); err != nil {
				return "", fmt.Errorf("life %d: %w", life, err)
			}
			how = "the brick was made anew"
		default:
			if !strings.Contains(err.Error(), file) {
				return "", fmt.Errorf("the file is not named: %w", err)
			}
			return "left to a person", nil
		}
	}
	return "", errors.New("it is damaged again and again")
}

// shownWrong says that a brick showed something else than was written.
type shownWrong struct{ what string }

func (e *shownWrong) Error() string { return e.what }

// replayAndLook brings a brick up to the good one, looks at everything, scrubs and
// repairs it, and demands that both are equal then.
func replayAndLook(ctx context.Context, good, b *Brick, want Digest, how *string) error {
	if b.Promised() < 123 && b.Whole() {
		return &shownWrong{fmt.Sprintf("it goes back to epoch %d, and takes itself for closed in order", b.Promised())}
	}
	if b.Whole() {
		if err := b.Rewind(b.Tail()); err != nil && !errors.Is(err, ErrTooFar) {
			return err
		}
	}
	if b.Whole() && b.Tail().Seq < good.Tail().Seq { // what it lost of its log comes again
		if b.Clean() {
			return &shownWrong{fmt.Sprintf("its log ends at %v, and it takes itself for closed in order", b.Tail())}
		}
		*how = "caught up"
		raws, err := good.Entries(b.Tail().Seq, 64<<20)
		if err != nil {
			return err
		}
		for _, raw := range raws {
			var e proto.Entry
			err := decodeEntry(raw, &e)
			if err == nil {
				_, err = b.Execute(&e, raw)
			}
			if err != nil {
				return err
			}
		}
	}
	if !b.Whole() {
		src, err := good.Source()
		if err != nil {
			return err
		}
		defer src.Close()
		if err := b.Heal(ctx, src.Pos(), src.Serve, nil); err != nil {
			return err
		}
		if *how == "nothing needed" {
			*how = "compared"
		}
	}
	b.Commit(b.Tail().Seq)
	if err := b.settleCycle(ctx, true); err != nil {
		return b.failWith(err)
	}
	if err := b.BeginScrub(); err != nil {
		return err
	}
	if err := b.Scrub(ctx, atOnce); err != nil {
		return err
	}
	if some, n := b.Rotten(100); n > 0 {
		*how = "blocks were repaired"
		for _, r := range some {
			// Read before and after.
			if err := sameRead(ctx, good, b, r.Ino); err != nil {
				return err
			}
			if err := b.Repair(ctx, r); err != nil {
				return err
			}
		}
	}
	for ino := fsop.Ino(2); ino < 8; ino++ {
		if err := sameRead(ctx, good, b, ino); err != nil {
			return err
		}
	}
	d, err := b.Digest(ctx)
	if err != nil {
		return err
	}
	if d != want {
		return &shownWrong{fmt.Sprintf("digests differ: %+v, %+v", d, want)}
	}
	return nil
}

// sameRead compares what two bricks show of a file.
func sameRead(ctx context.Context, good, b *Brick, ino fsop.Ino) error {
	x, _, err := good.Read(ctx, &fsop.Read{Ino: ino, Len: fsop.MaxData})
	if err != nil {
		return nil // there is no such file
	}
	y, _, err := b.Read(ctx, &fsop.Read{Ino: ino, Len: fsop.MaxData})
	if err != nil {
		return err
	}
	if !bytes.Equal(x.Data, y.Data) {
		return &shownWrong{fmt.Sprintf("inode %d reads as something else", ino)}
	}
	return nil
}
