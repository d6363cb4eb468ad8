package control

import (
	"slices"
	"time"

	"github.com/hashicorp/raft"

	"mortar/internal/cluster"
)

// standEvery is the time between the candidacies of two voters after a certain
// death: long enough for an election.
const standEvery = 60 * time.Millisecond

// LeaderDied tells that the daemon of a peer has certainly ended, because its
// machine's kernel or the daemon itself said so. If that peer led the pool, the
// others need not wait until its silence is long enough: the first of the
// remaining voters stands for election at once, and the next if nothing came of
// that. A mere lost connection is no such proof. LeaderDied does not block.
func (c *Control) LeaderDied(peer cluster.PeerID) {
	led := func() bool {
		leader, ok := c.Leader()
		return !ok || leader == peer
	}
	if leader, ok := c.Leader(); !ok || leader != peer || peer == c.cfg.Self {
		return
	}
	voters := slices.DeleteFunc(c.Status().Voters, func(id cluster.PeerID) bool { return id == peer })
	turn := slices.Index(voters, c.cfg.Self)
	if turn < 0 {
		return
	}
	c.trans.after(time.Duration(turn)*standEvery, func() {
		if led() && c.raft.State() == raft.Follower && c.recalled() {
			c.trans.inject(raft.RPC{
				Command:  &raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax}},
				RespChan: make(chan raft.RPCResponse, 1),
			})
		}
	})
}
