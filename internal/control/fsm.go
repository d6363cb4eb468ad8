package control

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/hashicorp/raft"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
)

// fsm is Control in its part as the consensus library's state machine.
type fsm Control

var (
	_ raft.FSM                = (*fsm)(nil)
	_ raft.ConfigurationStore = (*fsm)(nil)
)

// StoreConfiguration implements raft.ConfigurationStore. The library keeps the
// members of the group itself; being told of them makes it count them as
// applied, without which it would take no snapshot after a change of the group.
func (f *fsm) StoreConfiguration(uint64, raft.Configuration) {}

// Apply implements raft.FSM. What it returns reaches the proposer: nil, or the
// refusal.
func (f *fsm) Apply(l *raft.Log) any {
	c := (*Control)(f)
	c.mu.Lock()
	defer c.mu.Unlock()
	cmd, err := state.DecodeCommand(l.Data)
	if err != nil {
		// The leader checked it, so it is from a newer version. To skip it would
		// make this copy differ from the others.
		err = fmt.Errorf("control: command %d of the pool: %w: update mortar on this machine", l.Index, err)
		c.fail(err)
		return err
	}
	select {
	case <-c.failed:
		return c.failErr // an undecodable command came before: nothing after it counts
	default:
	}
	err = c.live.Apply(cmd)
	c.appliedLocked(l.Index)
	if err != nil {
		return err
	}
	return nil
}

// appliedLocked is called when live has become the state at index.
func (c *Control) appliedLocked(index uint64) {
	c.liveIndex = index
	c.store.noteCommit(index)
	if index < c.applied {
		return // the log is replayed after a start, and st is further already
	}
	c.st, c.applied = c.live, index
	if id := (pooled{c.st.Map.Pool, c.st.Generation}); id != c.pooled {
		if err := c.store.put(pooledKey, id.encode()); err != nil {
			c.fail(err)
			return
		}
		c.pooled = id
	}
	self := c.st.Map.Peer(c.cfg.Self)
	if self != nil && c.incarnation != 0 && self.Incarnation > c.incarnation {
		c.fail(clonedError(self))
	}
	// What was decided before this store joined is about a former life of this peer, however late it is read.
	detached := slices.Contains(c.st.Detached, c.cfg.Self) && index >= c.behind.Load()
	if detached && !c.detached {
		c.log.Warn("this peer was detached from the pool", "pool", c.st.Map.Pool)
	}
	c.detached = detached
	c.trans.committed(index)
	c.wakeLocked()
}

// pooled is the pool and the generation of it that a store belongs to. It is
// kept apart from the state, which is complete only when a leader has said how
// much of the log counts: who may talk to this peer must be known before.
type pooled struct {
	Pool       cluster.ID
	Generation uint64
}

const pooledKey = "Pool"

func (p pooled) encode() []byte {
	return binary.LittleEndian.AppendUint64(append([]byte(nil), p.Pool[:]...), p.Generation)
}

func (s *store) pooled() (p pooled) {
	if v, err := s.Get([]byte(pooledKey)); err == nil && len(v) == 24 {
		copy(p.Pool[:], v)
		p.Generation = binary.LittleEndian.Uint64(v[16:])
	}
	return p
}

// preview makes what the store knows to be decided visible, before a leader is
// there: a peer that starts while the pool has no quorum can at least tell what
// it knew. The consensus machine replays the same commands later, into live.
func (c *Control) preview() error {
	st, err := state.Decode(c.live.Encode())
	if err != nil {
		return err
	}
	commit := c.store.committed()
	last := c.applied
	for index := last + 1; index <= commit; index++ {
		var l raft.Log
		if err := c.store.GetLog(index, &l); err != nil {
			if errors.Is(err, raft.ErrLogNotFound) {
				continue // in the snapshot
			}
			return err
		}
		if l.Type != raft.LogCommand {
			continue
		}
		cmd, err := state.DecodeCommand(l.Data)
		if err != nil {
			break // live will meet it and say so
		}
		_ = st.Apply(cmd) // refused again if it was
		last = index
	}
	c.st, c.applied = st, last
	c.pooled = c.store.pooled()
	c.detached = slices.Contains(st.Detached, c.cfg.Self) && !c.forgetful.Load() // see appliedLocked
	return nil
}

// clonedError says that another process acts under this peer's identity.
func clonedError(p *cluster.Peer) error {
	return state.Refusal(state.CodeCloned, "another machine runs with the identity of peer %s (%v), known at %v: this disk or that one is a copy. Stop mortar on the copy, remove its state directory and let it join as a new peer", p.Name, p.ID, p.Addrs)
}

// Snapshot implements raft.FSM.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	c := (*Control)(f)
	c.mu.Lock()
	defer c.mu.Unlock()
	return snapshot(encodeSnapshot(c.liveIndex, c.live)), nil
}

// saved is a snapshot: the state, and the index of the last command in it.
type saved struct {
	Applied uint64          `json:"applied"`
	State   json.RawMessage `json:"state"`
}

func encodeSnapshot(applied uint64, st *state.State) []byte {
	b, err := json.Marshal(saved{applied, st.Encode()})
	if err != nil {
		panic(fmt.Sprintf("control: encoding a snapshot: %v", err)) // no field can fail
	}
	return b
}

func decodeSnapshot(b []byte) (applied uint64, st *state.State, err error) {
	var s saved
	if err := json.Unmarshal(b, &s); err != nil {
		return 0, nil, err
	}
	st, err = state.Decode(s.State)
	return s.Applied, st, err
}

// Restore implements raft.FSM.
func (f *fsm) Restore(r io.ReadCloser) error {
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	applied, st, err := decodeSnapshot(b)
	if err != nil {
		return err
	}
	c := (*Control)(f)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.live = st
	c.appliedLocked(applied)
	return nil
}

// snapshot is an encoded state.
type snapshot []byte

func (s snapshot) Persist(sink raft.SnapshotSink) error {
	if _, err := sink.Write(s); err != nil {
		sink.Cancel()
		return err
	}
	return sink.Close()
}

func (snapshot) Release() {}
