package crew

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// All functions run, none waits for another, and the goroutines are used again.
func TestCrew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(2)
		var ran atomic.Int32
		var mu sync.Mutex
		on := map[string]bool{} // goroutines
		for range 100 {
			c.Go(func() {
				mu.Lock()
				on[number()] = true
				mu.Unlock()
				ran.Add(1)
			})
			synctest.Wait()
		}
		if ran.Load() != 100 || len(on) != 1 {
			t.Errorf("one after the other: %d functions by %d goroutines", ran.Load(), len(on))
		}
		gate := make(chan struct{})
		for range 50 {
			c.Go(func() { <-gate; ran.Add(1) })
		}
		synctest.Wait()
		close(gate)
		synctest.Wait()
		if ran.Load() != 150 || c.resting.Load() != 2 {
			t.Errorf("side by side: %d functions, %d rest", ran.Load(), c.resting.Load())
		}
		c.Wait()
		c.Go(func() { ran.Add(1) })
		c.Wait()
		if ran.Load() != 151 {
			t.Error("after the end nothing ran")
		}
	})
}

// A function that ends its goroutine ends nothing else.
func TestGoexit(t *testing.T) {
	c := New(1)
	c.Go(runtime.Goexit)
	done := make(chan struct{})
	c.Go(func() { close(done) })
	<-done
	c.Wait()
}

// number is this goroutine's, as a stack trace has it.
func number() string {
	buf := make([]byte, 32)
	return string(buf[:runtime.Stack(buf, false)])
}
