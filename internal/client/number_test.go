package client

import (
	"context"
	"testing"
	"testing/synctest"

	"mortar/internal/proto"
)

// TestAhead has one change go without an answer. The others go on until the replicas
// might forget them, then wait, and go on when it is answered; behind a wait for a lock
// nobody waits.
func TestAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n numbers
		n.init()
		begin := func(wait bool) uint64 {
			t.Helper()
			number, err := n.begin(t.Context(), wait)
			if err != nil {
				t.Fatal(err)
			}
			return number
		}
		lock := begin(true)
		stuck := begin(false)
		last := stuck
		for range proto.MaxAhead - 1 {
			last = begin(false)
			n.end(last)
		}
		if last != stuck+proto.MaxAhead-1 || n.acked() != lock {
			t.Fatalf("%d was begun while %d has no answer; answered are those below %d", last, stuck, n.acked())
		}
		ctx, cancel := context.WithCancel(t.Context())
		gaveUp, went := make(chan error, 1), make(chan uint64, 2)
		go func() { _, err := n.begin(ctx, false); gaveUp <- err }()
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
		n.end(stuck)
		synctest.Wait()
		if len(went) != 2 || <-went+<-went != 2*last+3 {
			t.Fatal("the next two did not begin when that was answered")
		}
		// The lock alone is no reason to wait.
		n.end(last + 1)
		n.end(last + 2)
		for range 2 * proto.MaxAhead {
			n.end(begin(false))
		}
		if n.acked() != lock {
			t.Errorf("answered are those below %d, and %d is not", n.acked(), lock)
		}
		n.end(lock)
		if next := begin(false); n.acked() != next {
			t.Errorf("answered are those below %d, and the next is %d", n.acked(), next)
		}
	})
}
