package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
)

// Everybody proposes at once: all that is not contradictory happens, and of what
// is, one thing.
func TestConcurrentProposals(t *testing.T) { synctest.Test(t, testConcurrentProposals) }

func testConcurrentProposals(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	v := w.volume("v", nodes...)
	seen := nodes[0].c.Map().Version
	for _, nd := range nodes {
		w.waitSet(nd, "v", func(c *cluster.SetConfig) bool { return c.Epoch == 1 })
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for i, nd := range nodes {
		wg.Go(func() {
			// Each has seen the same version: one of them was first.
			err := nd.c.Propose(w.ctx(), state.Command{Seen: seen, SetOptions: &state.SetOptions{Volume: v.ID, Options: map[string]string{cluster.OptReserve: fmt.Sprint(i + 2)}}})
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
			} else if !errors.Is(err, state.ErrConflict) {
				t.Errorf("%s: %v", nd.name, err)
			}
		})
		for k := range 10 {
			wg.Go(func() {
				tok := state.Token{Hash: fmt.Sprintf("%064x", 1000*i+k), Role: "peer", Expires: 100, Uses: 1}
				if err := nd.c.Propose(w.ctx(), state.Command{AddToken: &state.AddToken{Token: tok, Now: 1}}); err != nil {
					t.Errorf("%s: token %d: %v", nd.name, k, err)
				}
			})
		}
	}
	wg.Wait()
	if won != 1 {
		t.Errorf("%d of three contradictory commands were carried out", won)
	}
	w.until("all know all tokens", func() bool {
		for _, nd := range nodes {
			if len(nd.c.Tokens()) != 30 {
				return false
			}
		}
		return true
	})
	// A set's configuration: one epoch, one winner.
	next := nodes[0].c.Map().Volume("v").Sets[0].Clone()
	next.Epoch++
	won = 0
	for i, nd := range nodes {
		wg.Go(func() {
			mine := next.Clone()
			mine.InSync = slices.Delete(mine.InSync, 1+i%2, 2+i%2)
			err := nd.c.Propose(w.ctx(), state.Command{SetConfig: &state.SetConfig{Config: mine}})
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
			} else if !errors.Is(err, state.ErrStaleEpoch) {
				t.Errorf("%s: %v", nd.name, err)
			}
		})
	}
	wg.Wait()
	if won != 1 {
		t.Errorf("epoch 2 was decided %d times", won)
	}
}

// Commands are carried out once, however leaders come and go meanwhile.
func TestExactlyOnce(t *testing.T) { synctest.Test(t, testExactlyOnce) }

func testExactlyOnce(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	accepted := 0
	for i, nd := range nodes {
		wg.Go(func() {
			for k := 0; ; k++ {
				select {
				case <-stop:
					return
				default:
				}
				// A token that is there twice is refused: a command that was carried
				// out again would show.
				tok := state.Token{Hash: fmt.Sprintf("%064x", 100000*i+k), Role: "peer", Expires: 100, Uses: 1}
				if err := nd.c.Propose(w.ctx(), state.Command{AddToken: &state.AddToken{Token: tok, Now: 1}}); err != nil {
					t.Errorf("%s: command %d: %v", nd.name, k, err)
					return
				}
				mu.Lock()
				accepted++
				mu.Unlock()
				time.Sleep(time.Millisecond) // of the bubble's time, which stands while anybody is busy
			}
		})
	}
	for round := range 4 {
		lead := w.settled(nodes...)
		if round%2 == 0 {
			_ = lead.c.raft.LeadershipTransfer().Error()
		} else {
			w.silent(lead, true)
			rest := others(nodes, lead)
			w.until("another leader", func() bool { return rest[0].c.Status().Leading || rest[1].c.Status().Leading })
			w.silent(lead, false)
		}
		w.until("commands after it", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return accepted > 20*(round+1)
		})
	}
	close(stop)
	wg.Wait()
	w.until("all know all", func() bool {
		for _, nd := range nodes {
			if len(nd.c.Tokens()) != accepted {
				return false
			}
		}
		return true
	})
}

// What a stranger asks is refused, and so is what is no request.
func TestHandleRefuses(t *testing.T) { synctest.Test(t, testHandleRefuses) }

func testHandleRefuses(t *testing.T) {
	w := newWorld(t, 1)
	nd := w.pool()[0]
	for _, req := range []string{"", "{", "[]", `{"propose":5}`, `{"propose":{"nonsense":1}}`, `{}`, `{"suspect":{}}`, `{"handover":{}}`, strings.Repeat("x", maxRequest+1)} {
		b, err := nd.c.Handle(w.ctx(), nd.id, []byte(req))
		if err == nil && !strings.Contains(string(b), `"code"`) && req != `{"suspect":{}}` {
			t.Errorf("%.30q: %s", req, b)
		}
	}
	b, err := nd.c.Handle(w.ctx(), testID(66), []byte(`{"status":true}`))
	if err != nil || !strings.Contains(string(b), string(state.CodeNoPeer)) {
		t.Errorf("a stranger gets %s, %v", b, err)
	}
	b, err = nd.c.Handle(w.ctx(), testID(66), []byte(`{"propose":{"incarnate":{"peer":"`+nd.id.String()+`","past":1}}}`))
	if err != nil || !strings.Contains(string(b), `"code"`) {
		t.Errorf("a stranger gets %s, %v", b, err)
	}
}

// FuzzHandle: whatever another peer asks of the leader is answered, and what it
// proposes leaves a state that can be saved and loaded.
func FuzzHandle(f *testing.F) {
	w := newWorld(f, 1)
	nd := w.pool()[0]
	for _, cmd := range []state.Command{
		{UpdatePeer: &state.UpdatePeer{Peer: nd.id, Addrs: []string{"n1:1"}}}, {RemovePeer: &state.RemovePeer{Peer: nd.id}},
		{Incarnate: &state.Incarnate{Peer: nd.id, Past: 1}}, {SetConfig: &state.SetConfig{Force: true}}, {AddToken: &state.AddToken{}},
	} {
		raw, err := cmd.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(append(append([]byte(`{"propose":`), raw...), '}'))
	}
	f.Add([]byte(`{"status":true}`))
	f.Add([]byte(`{"problems":true,"boot":18446744073709551615}`))
	f.Add([]byte(`{"suspect":{"epoch":1},"handover":{"epoch":1}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if b, err := nd.c.Handle(ctx, nd.id, raw); err == nil && !json.Valid(b) {
			t.Errorf("answered with %q", b)
		}
		nd.c.mu.Lock()
		saved := nd.c.live.Encode()
		nd.c.mu.Unlock()
		if _, err := state.Decode(saved); err != nil {
			t.Error(err)
		}
	})
}
