package estate

import (
	"context"
	"testing"
	"testing/synctest"
)

// TestAhead has one change go without an answer. The others go on until the replicas
// might forget them, then wait, and go on when it is answered; behind a wait for a lock
// nobody waits.
func TestAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const ahead = 4096
		n := Private().Numbers
		n.Ahead = ahead
		begin := func(wait bool) uint64 {
			t.Helper()
			g, err := n.Begin(t.Context(), Change{Wait: wait})
			if err != nil {
				t.Fatal(err)
			}
			return g.Number
		}
		lock := begin(true)
		stuck := begin(false)
		last := stuck
		for range ahead - 1 {
			last = begin(false)
			n.End(last, true)
		}
		if last != stuck+ahead-1 || n.Acked() != lock {
			t.Fatalf("%d was begun while %d has no answer; answered are those below %d", last, stuck, n.Acked())
		}
		ctx, cancel := context.WithCancel(t.Context())
		gaveUp, went := make(chan error, 1), make(chan uint64, 2)
		go func() { _, err := n.Begin(ctx, Change{}); gaveUp <- err }()
		for range 2 {
			go func() { went <- begin(false) }()
		}
		synctest.Wait()
		if len(went)+len(gaveUp) > 0 {
			t.Fatalf("a change was begun further ahead of %d", stuck)
		}
		cancel()
		synctest.Wait()
		if len(gaveUp) != 1 || <-gaveUp != context.Canceled || len(went) > 0 {
			t.Fatal("one who gave up still waits, or let others begin")
		}
		n.End(stuck, true)
		synctest.Wait()
		if len(went) != 2 || <-went+<-went != 2*last+3 {
			t.Fatal("the next two did not begin when that was answered")
		}
		// The lock alone is no reason to wait.
		n.End(last+1, true)
		n.End(last+2, true)
		for range 2 * ahead {
			n.End(begin(false), true)
		}
		if n.Acked() != lock {
			t.Errorf("answered are those below %d, and %d is not", n.Acked(), lock)
		}
		n.End(lock, true)
		if next := begin(false); n.Acked() != next {
			t.Errorf("answered are those below %d, and the next is %d", n.Acked(), next)
		}
	})
}
