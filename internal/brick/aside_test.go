package brick

import (
	"testing"
	"testing/synctest"
	"time"
)

// Settling stands aside for those who sync, as long as there is not too much of it.
func TestDue(t *testing.T) { synctest.Test(t, testDue) } // no time passes between the sync and the question

func testDue(t *testing.T) {
	const backlog = 1 << 20
	long := 10 * aside
	for _, c := range []struct {
		name   string
		load   int64
		since  time.Duration // the last sync
		moving bool
		due    bool
		waits  bool
	}{
		{"too little", backlog - 1, long, true, false, false},
		{"enough", backlog, long, true, true, false},
		{"nothing that may be settled", backlog, long, false, false, false},
		{"somebody syncs", backlog, aside / 2, true, false, true},
		{"somebody syncs, and much waits", 2 * backlog, aside / 2, true, true, false},
	} {
		b := &Brick{began: time.Now().Add(-time.Hour)}
		b.opts.Backlog = backlog
		b.backlog.load.Store(c.load)
		b.backlog.idle = !c.moving
		b.synced.Store(int64(time.Since(b.began) - c.since))
		due, again := b.due()
		if due != c.due || again > 0 != c.waits || again > aside {
			t.Errorf("%s: due is %v, again in %v; want %v, and waiting %v", c.name, due, again, c.due, c.waits)
		}
	}
}

// What was not settled because somebody synced is settled without anything else happening.
func TestSettlesAfterSyncs(t *testing.T) {
	const backlog = 256 << 10
	b := newBrick(t, func(o *Options) { o.Backlog = backlog })
	ino := b.create(1, "f")
	for k := range 6 {
		b.write(ino, uint64(k)<<16, make([]byte, 1<<16))
		if err := b.Sync(t.Context(), b.Tail().Seq); err != nil {
			t.Fatal(err)
		}
		b.Commit(b.Tail().Seq)
	}
	// On a slow machine settling may have begun between two syncs; less than the backlog then stays.
	for deadline := time.Now().Add(time.Minute); b.backlog.load.Load() >= backlog; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes still wait to be settled", b.backlog.load.Load())
		}
	}
}
