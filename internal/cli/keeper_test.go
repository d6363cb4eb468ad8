package cli

import (
	"net"
	"os"
	"testing"
	"time"

	"mortar/internal/daemon"
)

// Where a mount has ended another one may listen already, for the same device, and goes on listening.
func TestListenAgain(t *testing.T) {
	s := &succession{cfg: daemon.MountConfig{Dir: t.TempDir(), RunDir: t.TempDir()}}
	first, err := s.listen()
	if err != nil {
		t.Fatal(err)
	}
	second, err := s.listen()
	if err != nil {
		t.Fatal(err)
	}
	path := first.Addr().String()
	first.Close()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the second does not listen any more: %v", err)
	}
	conn.Close()
	second.Close()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the second leaves its socket: %v", err)
	}
}

// A keeper that cannot start the next process does not outlive the mount.
func TestKeeperSeesTheEnd(t *testing.T) {
	r, w, err := os.Pipe() // as /dev/fuse does, it says that the other end is gone
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	k := &keeper{fuse: r}
	if k.gone(10 * time.Millisecond) {
		t.Error("gone before the end")
	}
	go w.Close()
	if !k.gone(time.Minute) {
		t.Error("the end was not seen")
	}
}
