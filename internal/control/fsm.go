package control

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"

	"github.com/hashicorp/raft"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
)

// fsm is Control in its part as the consensus library's state machine.
type fsm Control

var _ raft.FSM = (*fsm)(nil)

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
	err = c.st.Apply(cmd)
	c.appliedLocked(l.Index)
	if err != nil {
		return err
	}
	return nil
}

// appliedLocked is called when the state may have changed.
func (c *Control) appliedLocked(index uint64) {
	c.applied = index
	self := c.st.Map.Peer(c.cfg.Self)
	if self != nil && c.incarnation != 0 && self.Incarnation > c.incarnation {
		c.fail(clonedError(self))
	}
	detached := slices.Contains(c.st.Detached, c.cfg.Self)
	if detached && !c.detached {
		c.log.Warn("this peer was detached from the pool", "pool", c.st.Map.Pool)
	}
	c.detached = detached
	c.trans.committed(index)
	c.wakeLocked()
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
	return snapshot(encodeSnapshot(c.applied, c.st)), nil
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
	c.st = st
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
