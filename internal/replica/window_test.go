package replica_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// holder is a client that holds windows. It gives them back after a while.
type holder struct {
	client
	takes   time.Duration // to give a window back; 0: it never does
	recalls atomic.Int64
	recall  chan fsop.Ino
}

// Recall implements replica.Recaller.
func (h *holder) Recall(m *proto.Recall) error {
	h.recalls.Add(1)
	select {
	case h.recall <- m.Ino:
	default:
	}
	return nil
}

// attach is client's, with h for its Sink.
func (h *holder) attach(ctx context.Context) bool {
	s, reply := h.w.nodes[h.w.order[h.home]].live().Attach(ctx, "", &proto.Attach{Version: proto.Version, Set: h.w.set, Session: h.id, Client: "holder"}, h)
	h.s.Store(s)
	return reply.Status == proto.OK
}

// run renews the lease and gives back what is asked for, until ctx ends.
func (h *holder) run(ctx context.Context) {
	beat := time.NewTicker(cluster.Lease / 4)
	defer beat.Stop()
	h.s.Load().Ping(&proto.Ping{})
	for {
		select {
		case <-ctx.Done():
			return
		case <-beat.C:
			h.s.Load().Ping(&proto.Ping{})
		case ino := <-h.recall:
			if h.takes > 0 {
				late := time.After(h.takes)
				for waiting := true; waiting; {
					select {
					case <-late:
						waiting = false
					case <-beat.C:
						h.s.Load().Ping(&proto.Ping{})
					case <-ctx.Done():
						return
					}
				}
				_, _ = h.do(ctx, &fsop.CloseWindow{Ino: ino, Session: uint64(h.id)})
			}
		}
	}
}

// withHolder runs f with the holder of the windows of inodes 5 and 6, whose home
// is not the primary.
func withHolder(t *testing.T, takes time.Duration, f func(t *testing.T, w *world, h *holder, die func())) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2)
		h := &holder{client: client{w: w, id: 1, home: 1}, takes: takes, recall: make(chan fsop.Ino, 8)}
		if !h.attach(t.Context()) {
			t.Fatal("not attached")
		}
		for _, ino := range []fsop.Ino{5, 6} {
			if r, err := h.do(t.Context(), &fsop.Write{Ino: ino, Window: fsop.WindowAsk}); err != nil || !r.Window {
				t.Fatalf("asking for a window: %+v, %v", r, err)
			}
		}
		ctx, die := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() {
			h.run(ctx)
			close(done)
		}()
		f(t, w, h, die)
		die()
		<-done
	})
}

// looks are what a directory's window keeps others from.
var looks = []struct {
	what string
	op   fsop.Op
	want error
}{
	{"a look for a name", &fsop.Lookup{Parent: 5, Name: "n"}, fsop.ENOENT},
	{"attributes", &fsop.Getattr{Ino: 5}, nil},
	{"a new name", &fsop.Create{Node: fsop.Node{Parent: 5, Name: "n"}}, nil},
	{"an extended attribute", &fsop.Setxattr{Ino: 5, Name: "n"}, nil},
}

func TestWindowOfADirectory(t *testing.T) {
	for _, look := range looks {
		withHolder(t, 50*time.Millisecond, func(t *testing.T, w *world, h *holder, _ func()) {
			other := &client{w: w, id: 2, home: 2}
			began := time.Now()
			if _, err := other.do(t.Context(), look.op); !errors.Is(err, look.want) {
				t.Errorf("%s: %v, want %v", look.what, err, look.want)
			}
			if d := time.Since(began); d < 50*time.Millisecond || d > 100*time.Millisecond {
				t.Errorf("%s took %v; the window was given back after 50ms", look.what, d)
			}
			if h.recalls.Load() == 0 {
				t.Errorf("%s: the holder was not asked", look.what)
			}
		})
	}
}

// Who removes a directory by name does not know that it is one in which this very
// session tells of files: the name may lead to another directory than its kernel
// believes. So the window is closed first, and what was told of is there by then.
func TestOwnWindowOfWhatGoes(t *testing.T) {
	for _, tc := range []struct {
		what string
		op   fsop.Op
		held bool // the window may stay
	}{
		{"rmdir", &fsop.Rmdir{Parent: 1, Name: "directory 5"}, false},
		{"rename over it", &fsop.Rename{Parent: 1, Name: "a", NewParent: 1, NewName: "directory 5"}, false},
		{"rename of it", &fsop.Rename{Parent: 1, Name: "directory 5", NewParent: 1, NewName: "a"}, true},
		{"exchange", &fsop.Rename{Parent: 1, Name: "a", NewParent: 1, NewName: "directory 5", Flags: fsop.RenameExchange}, true},
		{"rmdir of something in it", &fsop.Rmdir{Parent: 5, Name: "n"}, true},
	} {
		withHolder(t, 50*time.Millisecond, func(t *testing.T, w *world, h *holder, _ func()) {
			began := time.Now()
			if _, err := h.do(t.Context(), tc.op); err != nil {
				t.Errorf("%s: %v", tc.what, err)
			}
			if waited := time.Since(began) >= 50*time.Millisecond; waited == tc.held || tc.held != (h.recalls.Load() == 0) {
				t.Errorf("%s took %v, and its own session was asked for windows %d times", tc.what, time.Since(began), h.recalls.Load())
			}
		})
	}
}

// A holder that is alive and has much to send is given more time than a lease.
func TestSlowHolderKeepsItsWindow(t *testing.T) {
	withHolder(t, 3*cluster.LeaseGuard, func(t *testing.T, w *world, h *holder, _ func()) {
		other := &client{w: w, id: 2, home: 2}
		began := time.Now()
		if _, err := other.do(t.Context(), looks[0].op); err != fsop.ENOENT {
			t.Error(err)
		}
		if d := time.Since(began); d < 3*cluster.LeaseGuard {
			t.Errorf("the window was taken from a holder that is alive, after %v", d)
		}
	})
}

// One that never gives back what it holds does not keep others waiting for ever.
func TestStubbornHolder(t *testing.T) {
	withHolder(t, 0, func(t *testing.T, w *world, h *holder, _ func()) {
		other := &client{w: w, id: 2, home: 2}
		began := time.Now()
		if _, err := other.do(t.Context(), looks[0].op); err != fsop.ENOENT {
			t.Error(err)
		}
		if d := time.Since(began); d < cluster.SessionTimeout || d > cluster.SessionTimeout+time.Second {
			t.Errorf("it took %v", d)
		}
	})
}

// A dead holder costs the time of its lease once, and not once for every window.
func TestDeadHolder(t *testing.T) {
	withHolder(t, 0, func(t *testing.T, w *world, h *holder, die func()) {
		die()
		h.s.Load().Detach()
		other := &client{w: w, id: 2, home: 2}
		began := time.Now()
		if _, err := other.do(t.Context(), looks[0].op); err != fsop.ENOENT {
			t.Error(err)
		}
		if d := time.Since(began); d > cluster.LeaseGuard+cluster.Lease/4+200*time.Millisecond {
			t.Errorf("it took %v", d)
		}
		began = time.Now()
		if _, err := other.do(t.Context(), &fsop.Getattr{Ino: 6}); err != nil {
			t.Error(err)
		}
		if d := time.Since(began); d > 10*time.Millisecond {
			t.Errorf("the second window took %v", d)
		}
	})
}

// The window of a directory that is there already is given when every session has forgotten what
// it knows of the directory's names, absent ones too, or of its attributes.
func TestWindowOfADirectoryThatOthersKnow(t *testing.T) {
	for _, know := range []struct {
		what  string
		op    fsop.Op
		tells bool
	}{
		{"an absent name", &fsop.Lookup{Parent: 7, Name: "n"}, true},
		{"the attributes", &fsop.Getattr{Ino: 7}, true},
		{"another directory", &fsop.Lookup{Parent: 8, Name: "n"}, false},
	} {
		for _, ignores := range []bool{false, true} {
			withHolder(t, 50*time.Millisecond, func(t *testing.T, w *world, h *holder, _ func()) {
				other := &client{w: w, id: 2, home: 2}
				if _, err := other.do(t.Context(), know.op); err != nil && !errors.Is(err, fsop.ENOENT) {
					t.Fatal(err)
				}
				other.ignores.Store(ignores)
				began := time.Now()
				r, err := h.do(t.Context(), &fsop.OpenWindow{Ino: 7})
				if err != nil || !r.Window {
					t.Fatalf("%s: asking for the window: %+v, %v", know.what, r, err)
				}
				took := time.Since(began)
				if told := other.invals.Load() > 0; told != know.tells {
					t.Errorf("who knows %s was told: %v, want %v", know.what, told, know.tells)
				}
				if waits := took > cluster.Lease/2; waits != (ignores && know.tells) {
					t.Errorf("%s, a client that says nothing %v: the window was given after %v", know.what, ignores, took)
				}
			})
		}
	}
}
