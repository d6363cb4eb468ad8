package daemon

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	"mortar/internal/api"
	"mortar/internal/cluster"
)

// peerAPI returns a client of another peer's REST API, over the connection's TLS.
func (m *member) peerAPI(id cluster.PeerID) *api.Client {
	return api.New("http://mortar", func(ctx context.Context) (net.Conn, error) {
		tc, _, err := dialAny(ctx, m.links.addrsOf(id), m.keeper.ClientTo(alpnHTTP, id))
		if err != nil {
			return nil, err
		}
		return tc, nil
	})
}

// at asks one peer, this one or another, as a peer.
func at[T any](ctx context.Context, m *member, id cluster.PeerID, here func() (T, error), there func(c *api.Client) (T, error)) (T, error) {
	if id == m.keeper.ID() {
		return here()
	}
	c := m.peerAPI(id)
	defer c.Close()
	return there(c)
}

func because(problem string) string {
	if problem == "" {
		return ""
	}
	return ": " + problem
}

// askTimeout is how long another peer may take to tell of its bricks.
const askTimeout = 2 * time.Second

// askPeers asks every peer that has bricks of a volume.
func askPeers[T any](ctx context.Context, m *member, v *cluster.Volume, ask func(context.Context, cluster.PeerID) (*T, error)) (map[cluster.PeerID]*T, map[cluster.PeerID]error) {
	var peers []cluster.PeerID
	for _, b := range v.Bricks {
		peers = append(peers, b.Peer)
	}
	return askEach(ctx, m, peers, ask)
}

// askEach asks each of the peers once, all at the same time. One that cannot be asked has an
// error in place of an answer.
func askEach[T any](ctx context.Context, m *member, peers []cluster.PeerID, ask func(context.Context, cluster.PeerID) (*T, error)) (map[cluster.PeerID]*T, map[cluster.PeerID]error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var (
		mu    sync.Mutex
		wg    sync.WaitGroup
		all   = map[cluster.PeerID]*T{}
		fails = map[cluster.PeerID]error{}
	)
	asked := map[cluster.PeerID]bool{}
	for _, peer := range peers {
		if asked[peer] {
			continue
		}
		asked[peer] = true
		wg.Go(func() {
			up, _, problem := m.links.state(peer)
			var r *T
			err := fmt.Errorf("its peer is not connected%s", because(problem))
			if up || peer == m.keeper.ID() {
				r, err = ask(ctx, peer)
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				fails[peer] = err
				return
			}
			all[peer] = r
		})
	}
	wg.Wait()
	return all, fails
}
