package client

import (
	"time"

	"mortar/internal/fsop"
)

// Windows of directories that are there already.
//
// The window of a directory comes with making it (mkdir). That of another one is
// asked for when files are made in it one after the other. To give it, the set has
// every other session forget all names of the directory, so that is worth it only
// if nobody else looks at them meanwhile: after each recall it is longer until this
// session asks again.

// wish is what is remembered of a directory whose window is not held.
type wish struct {
	last   time.Time     // when a file was made in it
	asking bool          // OpenWindow is under way
	until  time.Time     // the window is not asked for before
	pause  time.Duration // what a recall adds to that
}

const (
	firstPause = time.Second
	mostPause  = time.Minute
	maxWishes  = 1024
)

// wishLocked is called when a file is made in a directory whose window is not held.
func (w *windows) wishLocked(dir fsop.Ino) {
	now := time.Now()
	x := w.wishOfLocked(dir, now)
	again := now.Sub(x.last) < windowIdle
	x.last = now
	if f := w.files[dir]; f != nil && f.closing {
		return // which of the two the set carries out first, its answer does not tell
	}
	if !again || x.asking || now.Before(x.until) || now.Sub(w.failed) < shyness || w.life.Err() != nil {
		return
	}
	x.asking = true
	asked, lives := w.closings, w.lives
	w.wg.Go(func() {
		reply, err := w.next.Do(w.life, &fsop.OpenWindow{Ino: dir})
		w.mu.Lock()
		defer w.mu.Unlock()
		x.asking = false
		switch {
		case err != nil || !reply.Window: // somebody else has it, or a limit is near
			x.until = time.Now().Add(firstPause)
		case lives != w.lives: // the set may have ended the session meanwhile
			w.disownLocked(dir)
		default:
			w.directoryLocked(&reply.Attr, asked)
		}
	})
}

// recalledLocked is called when another session wants to see a directory whose window
// this one has had since given.
func (w *windows) recalledLocked(dir fsop.Ino, given time.Time) {
	now := time.Now()
	x := w.wishOfLocked(dir, now)
	if x.pause == 0 || now.Sub(given) > mostPause {
		x.pause = firstPause
	}
	x.until = now.Add(x.pause)
	x.pause = min(2*x.pause, mostPause)
}

func (w *windows) wishOfLocked(dir fsop.Ino, now time.Time) *wish {
	x := w.wishes[dir]
	if x != nil {
		return x
	}
	if len(w.wishes) >= maxWishes {
		for ino, o := range w.wishes {
			if !o.asking && now.Sub(o.last) > windowIdle && now.Sub(o.until) > mostPause {
				delete(w.wishes, ino)
			}
		}
	}
	x = &wish{}
	if len(w.wishes) < maxWishes { // what is not remembered is not asked for
		w.wishes[dir] = x
	}
	return x
}
