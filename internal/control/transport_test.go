package control

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/hashicorp/raft"

	"mortar/internal/cluster"
)

// sentPipe records what a pipeline would send.
type sentPipe struct {
	raft.AppendPipeline
	mu   sync.Mutex
	sent []string
	more chan struct{}
}

func (p *sentPipe) AppendEntries(args *raft.AppendEntriesRequest, _ *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sent = append(p.sent, fmt.Sprintf("term %d after %d.%d entries %d commit %d", args.Term, args.PrevLogTerm, args.PrevLogEntry, len(args.Entries), args.LeaderCommitIndex))
	p.more <- struct{}{}
	return nil, nil
}

func (p *sentPipe) Close() error { return nil }

// A pipeline leaves out what says nothing, adds the commit index when it moves,
// and never claims more to be decided than it has sent.
func TestPipe(t *testing.T) {
	tr := &transport{links: map[raft.ServerID]*link{"x": {}}, pipes: map[*pipe]struct{}{}, released: make(chan struct{})}
	rec := &sentPipe{more: make(chan struct{}, 100)}
	p := &pipe{AppendPipeline: rec, t: tr, id: "x", wake: make(chan struct{}, 1), stop: make(chan struct{}), stopped: make(chan struct{})}
	tr.pipes[p] = struct{}{}
	go p.run()
	send := func(prev, commit uint64, entries ...uint64) {
		t.Helper()
		req := &raft.AppendEntriesRequest{Term: 5, PrevLogEntry: prev, PrevLogTerm: 4, LeaderCommitIndex: commit}
		for _, i := range entries {
			req.Entries = append(req.Entries, &raft.Log{Index: i, Term: 5})
		}
		if _, err := p.AppendEntries(req, new(raft.AppendEntriesResponse)); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(want ...string) {
		t.Helper()
		for range want {
			<-rec.more
		}
		rec.mu.Lock()
		defer rec.mu.Unlock()
		if !slices.Equal(rec.sent, want) {
			t.Fatalf("sent %q, want %q", rec.sent, want)
		}
		rec.sent = nil
	}
	send(10, 8)                                     // the first is always sent
	expect("term 5 after 4.10 entries 0 commit 8")  //
	tr.committed(10)                                // moved: told at once
	expect("term 5 after 4.10 entries 0 commit 10") //
	send(10, 10)                                    // says nothing new
	tr.committed(14)                                // decided by others; not sent here yet
	send(10, 14)                                    // nor does the library's own say more
	send(10, 14, 11, 12)                            // entries
	expect("term 5 after 4.10 entries 2 commit 14") // the library may: the peer has them by then
	send(12, 14)                                    //
	tr.committed(15)                                //
	send(12, 15, 13, 14, 15)                        //
	expect("term 5 after 4.12 entries 3 commit 15") //
	send(15, 15)                                    //
	send(15, 15)                                    //
	tr.mu.Lock()                                    // the connection to the peer breaks
	tr.links["x"].breaks++                          //
	tr.mu.Unlock()                                  //
	if _, err := p.AppendEntries(new(raft.AppendEntriesRequest), nil); err == nil {
		t.Error("a pipeline from before the break is still used")
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	expect()
}

func TestHello(t *testing.T) {
	h := hello{Pool: testID(1), Generation: 2, From: testID(3), Boot: 4, Incarnation: 5}
	got, err := decodeHello(h.encode())
	if err != nil || got != h {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, b := range [][]byte{nil, make([]byte, helloLen), h.encode()[1:], append(h.encode(), 0)} {
		if _, err := decodeHello(b); err == nil {
			t.Errorf("%x was taken", b)
		}
	}
}

// FuzzHello: a greeting is taken whole and as it is, or not at all.
func FuzzHello(f *testing.F) {
	h := hello{Pool: testID(1), Generation: 2, From: testID(3), Boot: 4, Incarnation: 5}
	f.Add(h.encode())
	f.Add(h.encode()[1:])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := decodeHello(b); err == nil && string(h.encode()) != string(b) {
			t.Errorf("%x was taken for %+v", b, h)
		}
	})
}

func TestCheckHello(t *testing.T) { synctest.Test(t, testCheckHello) }

func testCheckHello(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	c := nodes[0].c
	good := nodes[1].c.hello()
	if err := c.checkHello(good); err != nil {
		t.Errorf("a peer: %v", err)
	}
	newcomer := good
	newcomer.From = testID(77) // this copy may be late
	if err := c.checkHello(newcomer); err != nil {
		t.Errorf("a newcomer: %v", err)
	}
	for what, change := range map[string]func(*hello){
		"another pool":        func(h *hello) { h.Pool = testID(9) },
		"no pool":             func(h *hello) { h.Pool = cluster.ID{} },
		"an older generation": func(h *hello) { h.Generation = 1 << 40 },
	} {
		h := good
		change(&h)
		if err := c.checkHello(h); err == nil {
			t.Errorf("%s is let in", what)
		}
	}
	nodes[1].kill()
	nodes[1].start()
	w.settled(nodes...)
	if err := c.checkHello(good); err == nil {
		t.Error("a process of before the last start is let in")
	}
	// Two processes with one identity: the one that speaks is believed.
	s := c.trans.stream
	old := hello{From: testID(50), Boot: 1}
	if _, err := s.admit(old); err != nil {
		t.Fatal(err)
	}
	if _, err := s.admit(hello{From: testID(50), Boot: 2}); err == nil {
		t.Error("a second process is let in while the first is alive")
	}
	s.mu.Lock()
	s.heard[testID(50)].last.Store(s.now() - 2*int64(aliveFor))
	s.mu.Unlock()
	if _, err := s.admit(hello{From: testID(50), Boot: 2}); err != nil {
		t.Errorf("a restarted process: %v", err)
	}
}
