package mount

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
)

func TestMain(m *testing.M) {
	if w := os.Getenv(workloadEnv); w != "" {
		if err := runWorkload(w); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if len(os.Args) == 2 && os.Args[1] == askerArg {
		if err := Ask(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if w := os.Getenv(helperEnv); w != "" {
		if err := runHelper(w); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// askerArg has the test binary be the program of Options.Asker.
const askerArg = "mount-asker"

// needFUSE skips the test, in print, where nothing can be mounted.
func needFUSE(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		skip(t, "mounting needs root")
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR, 0)
	if err != nil {
		skip(t, fmt.Sprintf("mounting needs /dev/fuse: %v", err))
	}
	unix.Close(fd)
}

func skip(t testing.TB, why string) {
	t.Helper()
	fmt.Fprintf(os.Stderr, "SKIP %s: %s\n", t.Name(), why)
	t.Skip(why)
}

type mounted struct {
	*Mount
	dir string
}

// newMount mounts a session of fs, or what wrap makes of it.
func newMount(t testing.TB, fs *memfs.FS, o Options, wrap ...func(fsop.Handler) fsop.Handler) *mounted {
	t.Helper()
	return mountHandler(t, o, func(m *Mount) fsop.Handler {
		var h fsop.Handler = fs.Session(m)
		for _, w := range wrap {
			h = w(h)
		}
		return h
	})
}

// mountHandler mounts what of makes.
func mountHandler(t testing.TB, o Options, of func(*Mount) fsop.Handler) *mounted {
	t.Helper()
	needFUSE(t)
	dir := t.TempDir()
	o.AllowOther = true
	o.ids = testIDs
	o.Asker = []string{"/proc/self/exe", askerArg}
	if testing.Verbose() {
		o.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
	}
	m := New(o)
	h := of(m)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Serve(ctx, dir, h) }()
	select {
	case <-m.Ready():
	case err := <-done:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil && !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		case <-time.After(time.Minute):
			t.Error("Serve did not return after unmounting")
		}
	})
	if o.FsName == nestedName {
		mountInside(t, dir, newNamespace(t)) // on all of it, so that no test sees it
		if !m.nestedMay() {
			t.Fatal("it is not seen that something is mounted inside")
		}
	}
	return &mounted{m, dir}
}

// sub makes a directory in m for one test.
func (m *mounted) sub(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(m.dir, "t")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}
