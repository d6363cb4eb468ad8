package mount

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
)

// serveAndHang mounts on dir a file system whose writes get no answer, and drops
// all caches once there is one: that waits for the write's page.
func serveAndHang(dir string) error {
	m := New(Options{AllowOther: true, OwnProcess: true})
	fs := memfs.New().Session(m)
	begun := make(chan struct{}, 1)
	h := fsop.HandlerFunc(func(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
		if _, ok := op.(*fsop.Write); ok {
			begun <- struct{}{}
			select {} // as when no set has a primary
		}
		return fs.Do(ctx, op)
	})
	served := make(chan error, 1)
	go func() { served <- m.Serve(context.Background(), dir, h) }()
	select {
	case <-m.Ready():
	case err := <-served:
		return err
	}
	fmt.Println("mounted")
	<-begun
	if err := m.DropAll(context.Background()); err != nil {
		return err
	}
	for { // until a thread is stuck in the kernel
		m.pages.mu.Lock()
		n := m.pages.workers
		m.pages.mu.Unlock()
		if n > 0 {
			fmt.Println("dropping")
			return <-served
		}
		time.Sleep(time.Millisecond)
	}
}

// A mount that is killed while it takes back pages of a file that is being written
// ends, and so does who was writing.
func TestKilledWhileItWaits(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	server := startHelper(t, "serve", dir)
	var f *os.File
	t.Cleanup(func() {
		_ = unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH) // frees whoever waits, if the test fails
		if f != nil {
			f.Close()
		}
	})
	eventually(t, "mounted", func() bool { return server.out.has("mounted") })
	var err error
	if f, err = os.Create(dir + "/f"); err != nil {
		t.Fatal(err)
	}
	wrote := make(chan error, 1)
	go func() {
		_, err := f.Write([]byte("part of a page, which the kernel locks until the answer"))
		wrote <- err
	}()
	eventually(t, "the pages are taken back", func() bool { return server.out.has("dropping") })
	eventually(t, "a thread waits in the kernel", func() bool { return uninterruptible(server.cmd.Process.Pid) })
	ended := make(chan error, 1)
	if err := server.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	go func() { ended <- server.cmd.Wait() }()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal("a minute after it was killed the mount's process has not ended")
	}
	select {
	case err := <-wrote:
		if err == nil {
			t.Error("a write without an answer succeeded")
		}
	case <-time.After(time.Minute):
		t.Fatal("a minute after the mount was killed the write has not ended")
	}
}

// uninterruptible reports whether a thread of a process waits in the kernel for
// something that no signal ends.
func uninterruptible(pid int) bool {
	stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, path := range stats {
		raw, _ := os.ReadFile(path) // the thread may have ended
		if _, rest, ok := strings.Cut(string(raw), ") "); ok && strings.HasPrefix(rest, "D") {
			return true
		}
	}
	return false
}

// The threads that wait apart end, and the process keeps its descriptors.
func TestThreadsApart(t *testing.T) {
	m := newMount(t, memfs.New(), Options{OwnProcess: true})
	count := func(what string) int {
		t.Helper()
		entries, err := os.ReadDir("/proc/self/" + what)
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before, threads := count("fd"), count("task")
	for range 500 {
		if err := m.dev.invalPages(1<<40, true); err != unix.ENOENT {
			t.Fatalf("pages of an inode that the kernel does not know: %v, want ENOENT", err)
		}
	}
	for range 50 { // Go's runtime does anything there that it does elsewhere
		if err := m.dev.apart(func(int) error { runtime.GC(); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if after := count("fd"); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
	eventually(t, "the threads have ended", func() bool { return count("task") <= threads+8 })
}
