package mountinfo

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// elsewhere runs f in a mount namespace of its own, and again what f returns when the test asks for it.
func elsewhere(t *testing.T, f func() (undo func())) (end func()) {
	t.Helper()
	began, ended := make(chan error, 1), make(chan struct{})
	stop := make(chan struct{})
	var run func()
	run = func() {
		runtime.LockOSThread()              // never unlocked: the thread ends with the namespace
		if unix.Gettid() == unix.Getpid() { // whose namespace is taken for the process's
			go run() // gets another
			<-ended
			runtime.UnlockOSThread()
			return
		}
		defer close(ended)
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			began <- err
			return
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			began <- err
			return
		}
		undo := f()
		began <- nil
		<-stop
		undo()
	}
	go run()
	if err := <-began; err != nil {
		t.Fatal(err)
	}
	return func() { close(stop); <-ended }
}

func TestNested(t *testing.T) {
	if os.Geteuid() != 0 {
		fmt.Fprintf(os.Stderr, "SKIP %s: mounting needs root\n", t.Name())
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	mount := func(source, on, kind string, flags uintptr) {
		t.Helper()
		if err := unix.Mount(source, on, kind, flags, ""); err != nil {
			t.Fatal(err)
		}
	}
	unmount := func(on string) {
		if err := unix.Unmount(on, 0); err != nil {
			t.Error(err)
		}
	}
	mount("none", dir, "tmpfs", 0)
	defer unmount(dir)
	if err := unix.Mount("", dir, "", unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	sub, other := filepath.Join(dir, "sub"), t.TempDir()
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	m := &machine{dev: st.Dev}
	for _, way := range []struct {
		name string
		look func() (bool, error)
	}{
		{"all namespaces", func() (bool, error) { return (&machine{dev: st.Dev}).look(true) }},
		{"changed namespaces", func() (bool, error) { return m.look(false) }},
		{"threads", func() (bool, error) { return nestedAmong(st.Dev) }},
	} {
		t.Run(way.name, func(t *testing.T) {
			want := func(want bool) {
				t.Helper()
				got, err := way.look()
				if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.ENOSYS) || errors.Is(err, errHidden) {
					fmt.Fprintf(os.Stderr, "SKIP %s: %v\n", t.Name(), err)
					t.Skip(err)
				}
				if err != nil || got != want {
					t.Errorf("%v, %v; want %v", got, err, want)
				}
			}
			want(false)
			mount(dir, other, "", unix.MS_BIND) // the whole of it, once more
			want(false)
			unmount(other)
			mount("none", sub, "tmpfs", 0)
			want(true)
			unmount(sub)
			want(false)
			mount(sub, other, "", unix.MS_BIND)
			want(true)
			end := elsewhere(t, func() func() { // where only the lower one is mounted
				if err := unix.Unmount(dir, 0); err != nil {
					t.Error(err)
				}
				return func() { unix.Unmount(other, unix.MNT_DETACH) }
			})
			unmount(other)
			want(true)
			end()
			want(false)
			end = elsewhere(t, func() func() {
				if err := unix.Mount("none", sub, "tmpfs", 0, ""); err != nil {
					t.Error(err)
				}
				return func() { unix.Unmount(sub, unix.MNT_DETACH) }
			})
			want(true)
			end()
		})
	}
}

// What was mounted since the last look is seen, and nobody looks as long as nothing was.
func TestNestedLooks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id, looks, all, mounted := uint64(100), 0, 0, false
		n := NewNested(1, &IDs{newID: func() (uint64, error) { id++; return id, nil }})
		took := 100 * time.Microsecond
		n.look = func(everything bool) (bool, error) {
			looks++
			if everything {
				all++
				time.Sleep(9 * took)
			}
			time.Sleep(took)
			return mounted, nil
		}
		may := func(want bool, wantLooks int) {
			t.Helper()
			if got := n.May(); got != want || looks != wantLooks {
				t.Errorf("%v after %d looks, want %v after %d", got, looks, want, wantLooks)
			}
		}
		may(false, 1)
		for range 1000 {
			may(false, 1)
		}
		// At everything soon after the first, and less and less often.
		for range 4 {
			time.Sleep(restLong)
			n.May()
		}
		all = 0
		for range 10 {
			time.Sleep(restLong / 10)
			n.May()
		}
		if all != 1 {
			t.Errorf("%d looks at everything in a second", all)
		}
		// Others mount something all the time, or ask.
		looks, all = 0, 0
		for i := range 1000 {
			id++
			may(false, i+1)
			time.Sleep(restLong / 1000)
		}
		if all == 0 || all > 60 {
			t.Errorf("%d looks at everything in a second in which others mounted something", all)
		}
		// If looks are dear there are not as many.
		took = 2 * time.Millisecond
		time.Sleep(restLong)
		looks = 0
		may(false, 1)
		id++
		may(false, 2)
		id++
		mounted = true
		may(true, 2)
		time.Sleep(50 * time.Millisecond)
		may(true, 3)
		mounted = false
		may(true, 3)
		time.Sleep(restLong)
		may(false, 4)
		// What was mounted before is moved.
		mounted = true
		time.Sleep(restLong)
		may(true, 5)
	})
}

// Where it cannot be known, something may be mounted inside.
func TestNestedUnknown(t *testing.T) {
	n := NewNested(1, &IDs{newID: func() (uint64, error) { return 0, unix.EPERM }})
	if !n.May() {
		t.Error("nothing is mounted inside, says who cannot know")
	}
	n = NewNested(1, &IDs{newID: func() (uint64, error) { return 7, nil }})
	n.look = func(bool) (bool, error) { return false, errHidden }
	if !n.May() {
		t.Error("nothing is mounted inside, says who does not see all")
	}
}

func BenchmarkNested(b *testing.B) {
	b.Run("nothing mounted since", func(b *testing.B) {
		n := NewNested(1, new(IDs))
		for b.Loop() {
			n.May()
		}
	})
	for _, everything := range []bool{true, false} {
		b.Run(fmt.Sprintf("look, everything %v", everything), func(b *testing.B) {
			m := &machine{dev: 1}
			for b.Loop() {
				if _, err := m.look(everything); err != nil {
					b.Skip(err)
				}
			}
		})
	}
	b.Run("look at processes", func(b *testing.B) {
		var st unix.Stat_t
		unix.Stat("/", &st)
		for b.Loop() {
			nestedAmong(st.Dev)
		}
	})
}
