package mount

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
)

// TestNotificationThatWaits: a notification can wait for a request in flight, as that for pages does
// which a process sends that has just taken a mount over. Meanwhile its keeper comes for
// the descriptor, and the process has more to tell the kernel before it can answer the request.
func TestNotificationThatWaits(t *testing.T) {
	reads, answer := make(chan fsop.Ino, 1), make(chan struct{})
	m := newMount(t, memfs.New(), Options{}, func(h fsop.Handler) fsop.Handler {
		return fsop.HandlerFunc(func(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
			if op, ok := op.(*fsop.Read); ok {
				reads <- op.Ino
				<-answer
			}
			return h.Do(ctx, op)
		})
	})
	path := filepath.Join(m.dir, "f")
	if err := os.WriteFile(path, []byte("contents"), 0o644); err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(path)
		read <- err
	}()
	ino := <-reads
	told := make(chan error, 1)
	go func() { told <- m.dev.invalPages(ino, false) }()
	for m.dev.mu.TryLock() { // until it is on its way
		m.dev.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
	went := make(chan error, 1)
	go func() {
		m.Fuse(0)
		went <- m.dev.invalAttr(ino)
	}()
	select {
	case err := <-went:
		if err != nil {
			t.Error(err)
		}
	case err := <-told:
		t.Errorf("the pages of a read in flight were not waited for (%v): the test shows nothing", err)
	case <-time.After(20 * time.Second):
		t.Error("whoever comes for the descriptor waits for the read, and so does everybody who notifies")
	}
	close(answer)
	if err := <-read; err != nil {
		t.Error(err)
	}
	if err := <-told; err != nil {
		t.Error(err)
	}
}
