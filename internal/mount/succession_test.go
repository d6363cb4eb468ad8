package mount

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mortar/internal/estate"
	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
)

// One Mount goes on where another has ended: an open file stays open, and a request that the one before
// had read and not answered is answered by the next one.
func TestSuccession(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	fs := memfs.New()
	release, begun := make(chan struct{}), make(chan uint64, 1)
	serve := func(e *estate.Estate, slow bool) (m *Mount, h fsop.Handler) {
		m = New(Options{AllowOther: true, Estate: e})
		inner := fs.Session(m)
		return m, fsop.HandlerFunc(func(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
			if mk, ok := op.(*fsop.Mkdir); ok && mk.Name == "slow" {
				begun <- estate.RequestOf(ctx)
				if slow {
					<-release
					return nil, fsop.EIO
				}
			}
			return inner.Do(ctx, op)
		})
	}
	newEstate := func() *estate.Estate {
		e, err := estate.New()
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	e1, e2 := newEstate(), newEstate()
	defer e1.Close()
	defer e2.Close()

	first, h := serve(e1, true)
	ended := make(chan error, 2)
	go func() { ended <- first.Serve(context.Background(), dir, h) }()
	select {
	case <-first.Ready():
	case err := <-ended:
		t.Fatal(err)
	}
	if !first.Features().Resend {
		unix.Unmount(dir, unix.MNT_DETACH)
		skip(t, "this kernel does not send requests again")
	}
	f, err := os.Create(dir + "/f")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("before, "); err != nil {
		t.Fatal(err)
	}
	made := make(chan error, 1)
	go func() { made <- os.Mkdir(dir+"/slow", 0o700) }()
	request := <-begun
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	resume, err := first.Pause(ctx)
	cancel()
	if err != nil {
		t.Fatal(err)
	}
	left, err := estate.Read(e1.Fd())
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.FcntlInt(uintptr(first.Fuse(-1)), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}

	second, h := serve(e2, false)
	if err := second.Adopt(fd, dir, left); err != nil {
		t.Fatal(err)
	}
	if got, want := len(second.Holds()), len(first.Holds()); got != want {
		t.Errorf("the second process knows %d inodes, the first knew %d", got, want)
	}
	life, end := context.WithCancel(context.Background())
	defer end()
	go func() { ended <- second.Serve(life, dir, h) }()
	if again := <-begun; again != request {
		t.Errorf("the request comes again as %d, and was %d", again, request)
	}
	select {
	case err := <-made:
		if err != nil {
			t.Errorf("mkdir: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("a minute later nobody has answered the request")
	}
	if _, err := f.WriteString("after"); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(dir + "/f"); err != nil || string(got) != "before, after" {
		t.Errorf("%q, %v", got, err)
	}
	end()
	resume()
	close(release)
	for range 2 {
		select {
		case err := <-ended:
			if err != nil && !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		case <-time.After(time.Minute):
			t.Fatal("a Mount has not ended a minute after it was unmounted")
		}
	}
}

// A program that would have agreed upon something else with the kernel is refused before anything happens.
func TestCheck(t *testing.T) {
	e, err := estate.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() }) // after the mount's end
	newMount(t, memfs.New(), Options{Estate: e})
	left, err := estate.Greeting(e.Fd())
	if err != nil {
		t.Fatal(err)
	}
	if err := Check(Options{}, left); err != nil {
		t.Errorf("the same program: %v", err)
	}
	was := *left
	of := New(Options{}).protocols()
	for i, p := range of {
		was.InitAnswer, _, _ = (&server{proto: p}).greet(left.Init)
		if err := Check(Options{}, &was); err != nil {
			t.Errorf("what version %d before this one agreed upon: %v", i, err)
		}
		if same := bytes.Equal(was.InitAnswer, left.InitAnswer); same != (i == 0) {
			t.Errorf("version %d before this one agreed upon the same as this one: %v", i, same)
		}
	}
	if err := Check(Options{LocksNode: true}, left); !errors.Is(err, errGreeting) {
		t.Errorf("one that asks the kernel for less: %v", err)
	}
	left.Init = left.Init[:8]
	if err := Check(Options{}, left); err == nil {
		t.Error("a greeting that was cut is accepted")
	}
}
