package client

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"mortar/internal/fsop"
)

// commonDir makes a directory of which m[1] has the window, and then nobody.
func commonDir(t *testing.T, m []*member) fsop.Ino {
	t.Helper()
	d := m[1].ownDir(t, "common")
	m[0].ownDir(t, "numbers") // are reserved
	if _, err := m[0].do(&fsop.Readdir{Ino: d, Max: 1000}); err != nil {
		t.Fatal(err)
	}
	return d
}

// hasWindow waits until m knows that it has the window of d.
func hasWindow(t *testing.T, m *member, d fsop.Ino) {
	t.Helper()
	eventually(t, "the window was given", func() bool {
		m.w.mu.Lock()
		defer m.w.mu.Unlock()
		return m.w.dirs[d] != nil
	})
}

// saveOne makes a file and closes it, and reports whether it was foretold.
func saveOne(t *testing.T, m *member, d fsop.Ino, name string) (foretold bool) {
	t.Helper()
	ino, foretold, err := m.create(d, name)
	if err == nil {
		err = m.fill(ino, 10)
	}
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return foretold
}

// Who makes files in a directory that is there already is given its window, and from
// then on they are foretold.
func TestWindowOfADirectoryThatIsThere(t *testing.T) {
	withCommons(t, 1, 2, func(c *commons, m []*member) {
		d := commonDir(t, m)
		for i := range 2 {
			if saveOne(t, m[0], d, fmt.Sprint(i)) {
				t.Errorf("file %d was foretold, and nobody had asked for the window", i)
			}
		}
		hasWindow(t, m[0], d)
		c.count()
		for i := range 5 {
			if !saveOne(t, m[0], d, fmt.Sprint("then ", i)) {
				t.Errorf("file %d was not foretold", i)
			}
		}
		if n := c.count(); n[fsop.KindMake] != 5 || n[fsop.KindLookup] != 5 || n[fsop.KindCreate]+n[fsop.KindWrite]+n[fsop.KindOpenWindow] != 0 {
			t.Errorf("operations: %v, want a look and a Make for each of 5 files", n)
		}
		r, err := m[1].do(&fsop.Readdir{Ino: d, Max: 1000})
		if err != nil || len(r.Entries) != 7 {
			t.Errorf("seen elsewhere: %+v, %v", r, err)
		}
	})
}

// Files that are made now and then are not worth a window.
func TestNoWindowForAFileNowAndThen(t *testing.T) {
	withCommons(t, 2, 2, func(c *commons, m []*member) {
		d := commonDir(t, m)
		for i := range 20 {
			saveOne(t, m[0], d, fmt.Sprint(i))
			time.Sleep(windowIdle)
		}
		if n := c.count(); n[fsop.KindOpenWindow] != 0 {
			t.Errorf("operations: %v", n)
		}
	})
}

// A name that was found absent before the window was given may have been made by somebody
// else in between.
func TestAbsentBeforeTheWindow(t *testing.T) {
	withCommons(t, 3, 2, func(c *commons, m []*member) {
		d := commonDir(t, m)
		m[0].look(d, "x")
		if !m[0].note(d, "x") {
			t.Fatal("x is not known to be absent")
		}
		saveOne(t, m[1], d, "x") // and m[0] is on its way with a Make
		saveOne(t, m[0], d, "a")
		saveOne(t, m[0], d, "b")
		hasWindow(t, m[0], d)
		if !saveOne(t, m[0], d, "c") {
			t.Fatal("the window was not given: the test shows nothing")
		}
		r, err := m[0].do(&fsop.Make{Node: fsop.Node{Parent: d, Name: "x", Mode: 0o644}})
		if !errors.Is(err, fsop.EEXIST) {
			t.Errorf("x, which is there: %+v, %v; want EEXIST", r, err)
		}
	})
}

// Another session may want the window back before the answer that gives it has come, or when the
// session has moved meanwhile: nothing is foretold then.
func TestWindowOfADirectoryIsNotBelieved(t *testing.T) {
	for what, meanwhile := range map[string]func(w *windows, d fsop.Ino){
		"recalled": func(w *windows, d fsop.Ino) { w.Recall(d) },
		"moved":    func(w *windows, d fsop.Ino) { w.moved(nil) },
	} {
		withCommons(t, 4, 2, func(c *commons, m []*member) {
			d := commonDir(t, m)
			inner, given := m[0].w.next, 0
			m[0].w.next = fsop.HandlerFunc(func(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
				r, err := inner.Do(ctx, op)
				if op.Kind() == fsop.KindOpenWindow && err == nil && r.Window {
					given++
					meanwhile(m[0].w, d)
				}
				return r, err
			})
			for i := range 5 {
				if saveOne(t, m[0], d, fmt.Sprint(i)) {
					t.Errorf("%s: file %d was foretold", what, i)
				}
				synctest.Wait()
				time.Sleep(200 * time.Millisecond)
			}
			if given == 0 || what == "recalled" && given > 1 {
				t.Errorf("%s: a window was given %d times within a second, want once", what, given)
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.held[d] != 0 {
				t.Errorf("%s: the window was not given back", what)
			}
		})
	}
}

// While a window is being given back it is not asked for: the answer to the one may be from before the other.
func TestWindowIsNotAskedForWhileItIsGivenBack(t *testing.T) {
	withCommons(t, 7, 2, func(c *commons, m []*member) {
		d := commonDir(t, m)
		w, inner, given := m[0].w, m[0].w.next, 0
		closing := make(chan struct{})
		w.next = fsop.HandlerFunc(func(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
			if op, ok := op.(*fsop.CloseWindow); ok && op.Ino == d {
				<-closing
			}
			r, err := inner.Do(ctx, op)
			if op.Kind() == fsop.KindOpenWindow && err == nil && r.Window {
				if given++; given == 1 { // some file's window was given up meanwhile, and which it was is forgotten
					w.mu.Lock()
					w.closings++
					w.forgot = w.closings
					w.mu.Unlock()
				}
			}
			return r, err
		})
		for i := range 5 {
			if saveOne(t, m[0], d, fmt.Sprint(i)) {
				t.Errorf("file %d was foretold", i)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if given != 1 {
			t.Errorf("the window was given %d times before it was given back, want once", given)
		}
		close(closing)
		eventually(t, "the window was given back", func() bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			f := w.files[d]
			return f == nil || !f.closing
		})
		saveOne(t, m[0], d, "again")
		hasWindow(t, m[0], d)
		if !saveOne(t, m[0], d, "foretold") {
			t.Error("the window was not given again")
		}
	})
}

// A directory that somebody else looks at all the time has its window asked for ever less often.
func TestWindowThatOthersWantBack(t *testing.T) {
	withCommons(t, 5, 2, func(c *commons, m []*member) {
		d := commonDir(t, m)
		n := 0
		asked := func(minutes int) int {
			for range minutes * 600 {
				n++
				saveOne(t, m[0], d, fmt.Sprint(n))
				if _, err := m[1].do(&fsop.Getattr{Ino: d}); err != nil {
					t.Fatal(err)
				}
				time.Sleep(100 * time.Millisecond)
			}
			return c.count()[fsop.KindOpenWindow]
		}
		if got := asked(2); got < 4 || got > 10 {
			t.Errorf("asked %d times in two minutes and a bit, want after 1, 2, 4, 8, 16, 32 s", got)
		}
		if got := asked(5); got < 4 || got > 7 {
			t.Errorf("then asked %d times in five minutes and a bit, want once a minute", got)
		}
		time.Sleep(time.Minute)
		saveOne(t, m[0], d, "one")
		saveOne(t, m[0], d, "two")
		synctest.Wait()
		time.Sleep(3 * time.Minute) // nobody else wants it
		if !saveOne(t, m[0], d, "three") && !saveOne(t, m[0], d, "four") {
			t.Fatal("no window was given: the test shows nothing")
		}
		if _, err := m[1].do(&fsop.Getattr{Ino: d}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * firstPause)
		c.count()
		saveOne(t, m[0], d, "five")
		saveOne(t, m[0], d, "six")
		synctest.Wait()
		if got := c.count()[fsop.KindOpenWindow]; got != 1 {
			t.Errorf("after minutes in which nobody else wanted it: asked %d times, want 1", got)
		}
	})
}

// No more directories are remembered than is sensible.
func TestWishesAreForgotten(t *testing.T) {
	withCommons(t, 6, 1, func(c *commons, m []*member) {
		w := m[0].w
		w.mu.Lock()
		defer w.mu.Unlock()
		for i := range 3 * maxWishes {
			w.wishLocked(fsop.Ino(1000 + i))
		}
		if len(w.wishes) > maxWishes {
			t.Errorf("%d directories are remembered", len(w.wishes))
		}
		w.mu.Unlock()
		time.Sleep(2 * mostPause)
		w.mu.Lock()
		w.wishLocked(1)
		if len(w.wishes) != 1 {
			t.Errorf("%d directories are remembered for long", len(w.wishes))
		}
	})
}
