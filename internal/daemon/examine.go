package daemon

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"mortar/internal/api"
	"mortar/internal/cluster"
	"mortar/internal/proto"
)

const (
	reachTimeout   = 2 * time.Second              // of one attempt to connect
	examineTimeout = reachTimeout + 3*time.Second // of a peer that tries all others
	reachAtOnce    = 16                           // attempts under way
)

// Examine implements httpd.Pool.
func (n *Node) Examine(ctx context.Context) (*api.Examination, error) {
	x := &api.Examination{Peers: []api.PeerExamination{}}
	m := n.current()
	if m == nil {
		return x, nil
	}
	ctx, cancel := context.WithTimeout(ctx, examineTimeout)
	defer cancel()
	var (
		mu sync.Mutex
		wg sync.WaitGroup
	)
	for _, peer := range m.latest().Peers {
		if peer.ID == m.keeper.ID() {
			x.Self = peer.Name
		}
		wg.Go(func() {
			p := n.examinePeer(ctx, m, peer)
			mu.Lock()
			defer mu.Unlock()
			x.Peers = append(x.Peers, p)
		})
	}
	wg.Wait()
	slices.SortFunc(x.Peers, func(a, b api.PeerExamination) int { return cmp.Compare(a.Name, b.Name) })
	return x, nil
}

func (n *Node) examinePeer(ctx context.Context, m *member, peer *cluster.Peer) api.PeerExamination {
	p := api.PeerExamination{Name: peer.Name, Reach: []api.Reach{}}
	if up, _, problem := m.links.state(peer.ID); peer.ID != m.keeper.ID() && !up {
		p.Problem = fmt.Sprintf("not connected%s", because(problem))
		return p
	}
	asked := time.Now()
	r, err := at(ctx, m, peer.ID,
		func() (*api.LocalReach, error) { return n.LocalReach(ctx) },
		func(c *api.Client) (*api.LocalReach, error) { return c.LocalReach(ctx) })
	answered := time.Now()
	if err != nil {
		p.Problem = fmt.Sprintf("it does not answer: %v", err)
		return p
	}
	// What its attempts took is not time under way. Of the rest, half was the way back.
	trip := max(0, answered.Sub(asked)-time.Duration(r.Took)*time.Millisecond)
	p.Trip = trip.Milliseconds()
	p.Ahead = r.Time.Add(trip / 2).Sub(answered).Milliseconds()
	p.Version, p.Protocol, p.Reach = r.Version, r.Protocol, r.Reach
	return p
}

// LocalReach implements httpd.Local.
func (n *Node) LocalReach(ctx context.Context) (*api.LocalReach, error) {
	m, err := n.need()
	if err != nil {
		return nil, apiError(err)
	}
	r := &api.LocalReach{Version: version(), Protocol: proto.Version, Reach: []api.Reach{}}
	begun := time.Now()
	var (
		mu sync.Mutex
		g  errgroup.Group
	)
	g.SetLimit(reachAtOnce)
	for _, peer := range m.latest().Peers {
		if peer.ID == m.keeper.ID() {
			continue
		}
		for _, addr := range peer.Addrs {
			g.Go(func() error {
				ctx, cancel := context.WithTimeout(ctx, reachTimeout)
				defer cancel()
				there, err := whoIs(ctx, addr)
				tried := api.Reach{Peer: peer.Name, Addr: addr}
				switch {
				case err != nil:
					tried.Problem = err.Error()
				case there != peer.ID:
					tried.Problem = fmt.Sprintf("another machine (%s) answers", there)
				}
				mu.Lock()
				defer mu.Unlock()
				r.Reach = append(r.Reach, tried)
				return nil
			})
		}
	}
	g.Wait() // nothing fails as a whole
	slices.SortFunc(r.Reach, func(a, b api.Reach) int {
		return cmp.Or(cmp.Compare(a.Peer, b.Peer), cmp.Compare(a.Addr, b.Addr))
	})
	r.Took, r.Time = time.Since(begun).Milliseconds(), time.Now()
	return r, nil
}
