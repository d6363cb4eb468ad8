package control

import (
	"errors"

	"github.com/hashicorp/raft"
)

// A voter promises two things: to keep every entry that it acknowledged, and to
// vote once per term. A peer whose store was lost and begins again with an empty
// one has forgotten both, while the others still count on it: with its vote a
// leader could be elected that lacks decisions which the lost store had helped
// to make.
//
// So a store that was made empty is marked, and while it is marked the peer
// votes for nobody. The mark goes when the log has reached the commit index that
// the leader sent: from then on it holds all that the old one could have
// acknowledged. (A second vote in the very term of that leader would need a
// candidate that stayed one while the leader was at work; it gives up at the
// leader's first heartbeat.) Peers that join a pool pass through the same door,
// before they become voters.

const forgetfulKey = "Forgetful"

// forgetful reports whether the store bears the mark.
func (s *store) forgetful() bool {
	v, err := s.Get([]byte(forgetfulKey))
	return err == nil && len(v) > 0 && v[0] == 1
}

var errForgetful = errors.New("this peer's control store is new and does not know yet what the old one had promised")

// amnesia refuses requests for votes as long as the peer may have forgotten
// something.
func (c *Control) amnesia(rpc raft.RPC) error {
	if c.recalled() {
		return nil
	}
	switch req := rpc.Command.(type) {
	case *raft.AppendEntriesRequest:
		c.noteDecided(req.LeaderCommitIndex)
	case *raft.InstallSnapshotRequest:
		c.noteDecided(req.LastLogIndex)
	case *raft.RequestVoteRequest, *raft.RequestPreVoteRequest, *raft.TimeoutNowRequest:
		c.abstained.Add(1)
		return errForgetful
	}
	return nil
}

// noteDecided notes that the pool has decided what is at index.
func (c *Control) noteDecided(index uint64) {
	for {
		known := c.behind.Load()
		if index <= known || c.behind.CompareAndSwap(known, index) {
			return
		}
	}
}

// recalled takes the mark away if it is time, and reports whether it is gone.
func (c *Control) recalled() bool {
	if !c.forgetful.Load() {
		return true
	}
	if behind := c.behind.Load(); behind == 0 || c.raft.LastIndex() < behind {
		return false
	}
	return c.remember() == nil
}

// remember takes the mark away.
func (c *Control) remember() error {
	if !c.forgetful.Load() {
		return nil
	}
	if err := c.store.put(forgetfulKey, []byte{0}); err != nil {
		return err
	}
	c.forgetful.Store(false)
	return nil
}
