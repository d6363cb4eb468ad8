package client

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"mortar/internal/fsop"
)

// git looks at each file between the last write and close, and believes what it saw.
func TestLookBeforeClose(t *testing.T) {
	withCommons(t, 3, 1, func(c *commons, m []*member) {
		d := m[0].ownDir(t, "d")
		for i := range 2 {
			ino, foretold, err := m[0].create(d, fmt.Sprint(i))
			if err != nil || !foretold {
				t.Fatalf("foretold %v, %v", foretold, err)
			}
			if _, err := m[0].do(&fsop.Write{Ino: ino, Data: make([]byte, 5000)}); err != nil {
				t.Fatal(err)
			}
			c.count()
			began := time.Now()
			told, err := m[0].do(&fsop.Getattr{Ino: ino})
			if err != nil || told.Attr.Size != 5000 || told.Attr.Blocks != 16 || told.Seq != 0 || time.Since(began) != 0 || len(c.count()) != 0 {
				t.Errorf("%+v after %v, %v; want what it is to be, at once", told, time.Since(began), err)
			}
			time.Sleep(5 * time.Millisecond)
			if again, err := m[0].do(&fsop.Getattr{Ino: ino}); err != nil || again.Attr != told.Attr {
				t.Errorf("%+v, %v; want %+v once more", again, err, told)
			}
			left, err := m[0].do(&fsop.Flush{Ino: ino})
			if n := c.count(); err != nil || n[fsop.KindMake] != 1 || len(n) != 1 {
				t.Errorf("close: %v, %v; want one operation", n, err)
			}
			is, err := m[0].below.Do(context.Background(), &fsop.Getattr{Ino: ino})
			if err != nil {
				t.Fatal(err)
			}
			if left.Attr != is.Attr || left.Seq == 0 {
				t.Errorf("close tells %+v, want %+v", left, is.Attr)
			}
			was := told.Attr
			was.Change = is.Attr.Change
			if was != is.Attr {
				t.Errorf("told %+v\n  is %+v", was, is.Attr)
			}
		}
	})
}

// Of a file that the set knows nothing is told that may have changed: its names are
// removed without a word about its window.
func TestLookAfterUnlink(t *testing.T) {
	withCommons(t, 3, 2, func(c *commons, m []*member) {
		d := m[0].ownDir(t, "d")
		for i, dir := range []fsop.Ino{d, fsop.RootIno} {
			for who := range m {
				name := fmt.Sprint(i, who)
				ino, _, err := m[0].create(dir, name)
				if err != nil {
					t.Fatal(err)
				}
				write := func() {
					t.Helper()
					if _, err := m[0].do(&fsop.Write{Ino: ino, Data: make([]byte, 5000)}); err != nil {
						t.Fatal(err)
					}
				}
				write()
				if _, err := m[who].do(&fsop.Unlink{Parent: dir, Name: name}); err != nil {
					t.Fatal(err)
				}
				write()
				if r, err := m[0].do(&fsop.Getattr{Ino: ino}); err != nil || r.Attr.Nlink != 0 {
					t.Errorf("removed by %d: %+v, %v", who, r, err)
				}
			}
		}
	})
}

// What an application was told of a file stays, until something is done to the file; and
// no time is from the future, or from before the file was last seen.
func TestTimesThatWereToldStay(t *testing.T) {
	for seed := range uint64(60) {
		withCommons(t, seed, 1, func(c *commons, m []*member) {
			d := m[0].ownDir(t, "d")
			rng := rand.New(rand.NewPCG(seed, 8))
			for i := range 20 {
				dir := d
				if rng.IntN(3) == 0 {
					dir = fsop.RootIno
				}
				ino, _, err := m[0].create(dir, fmt.Sprint(i))
				if err != nil {
					t.Fatal(err)
				}
				seen := fsop.Attr{}
				written, changed := false, false // since seen was seen
				look := func(h fsop.Handler, when string) {
					t.Helper()
					r, err := h.Do(context.Background(), &fsop.Getattr{Ino: ino})
					if err != nil {
						t.Fatal(err)
					}
					is := r.Attr
					is.Change, is.Window = 0, 0
					ok := true
					was := seen
					if written {
						ok = ok && is.Ctime > was.Ctime && (is.Mtime > was.Mtime || is.Mtime == 7)
						was.Size, was.Blocks, was.Atime, was.Mtime, was.Ctime = is.Size, is.Blocks, is.Atime, is.Mtime, is.Ctime
					}
					if changed {
						ok = ok && is.Ctime > seen.Ctime && (is.Mtime == was.Mtime || is.Mtime == 7)
						was.Mode, was.Mtime, was.Ctime = is.Mode, is.Mtime, is.Ctime
					}
					if seen.Ino != 0 && (!ok || was != is) {
						t.Fatalf("seed %d, file %d, %s (written %v, changed %v): it was\n%+v, is\n%+v", seed, i, when, written, changed, seen, is)
					}
					if now := time.Now().UnixNano(); is.Ctime > now+1e3 || is.Mtime != 7 && is.Mtime > now+1e3 { // the set's clock ticks with every change
						t.Fatalf("seed %d, file %d, %s: from the future: %+v at %d", seed, i, when, is, now)
					}
					seen, written, changed = is, false, false
				}
				for range rng.IntN(8) {
					time.Sleep(time.Microsecond)
					switch rng.IntN(6) {
					case 0, 1:
						off := seen.Size
						if rng.IntN(4) == 0 {
							off = uint64(rng.IntN(60000))
						}
						if _, err := m[0].do(&fsop.Write{Ino: ino, Off: off, Data: make([]byte, 1+rng.IntN(70000))}); err != nil {
							t.Fatal(err)
						}
						written = true
					case 2:
						set := &fsop.Setattr{Ino: ino, Valid: fsop.SetMode, Mode: uint32(rng.IntN(0o1000))}
						if rng.IntN(3) == 0 {
							set = &fsop.Setattr{Ino: ino, Valid: fsop.SetMtime, Mtime: 7}
						}
						if _, err := m[0].do(set); err != nil {
							t.Fatal(err)
						}
						changed = true
					case 3:
						time.Sleep(time.Duration(rng.IntN(30)) * time.Millisecond)
					default:
						look(m[0].w, "before it is closed")
					}
				}
				if _, err := m[0].do(&fsop.Flush{Ino: ino}); err != nil {
					t.Fatal(err)
				}
				look(m[0].w, "closed")
				look(m[0].below, "in the set")
			}
		})
	}
}

func TestClock(t *testing.T) {
	var c clock
	if at := c.tell(); at != 0 {
		t.Errorf("told %d before anything was heard", at)
	}
	c.hear(1000)
	first := c.tell()
	if first <= 1000 {
		t.Errorf("told %d after 1000 was heard", first)
	}
	c.hear(500)
	if at := c.tell(); at <= first {
		t.Errorf("told %d after %d", at, first)
	}
	c.hear(1 << 60)
	if at := c.tell(); at <= 1<<60 || at > 1<<60+int64(time.Minute) {
		t.Errorf("told %d after %d was heard", at, int64(1)<<60)
	}
}
