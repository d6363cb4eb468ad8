package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/hashicorp/raft"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
)

// Discard moves a control store out of the way, so that the machine belongs to
// no pool. It returns where the store is now. No Control may be open on it.
func Discard(dir string) (moved string, err error) {
	lock, err := lockDir(dir)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	dir = filepath.Clean(dir)
	for i := 1; ; i++ {
		moved = fmt.Sprintf("%s.old-%d", dir, i)
		if _, err := os.Lstat(moved); errors.Is(err, os.ErrNotExist) {
			break
		}
	}
	if err := os.Rename(dir, moved); err != nil {
		return "", fmt.Errorf("control store: %w", err)
	}
	return moved, syncDir(filepath.Dir(dir))
}

// Recover makes this peer the only voter of its pool, when so many voters are
// lost for good that the pool can decide nothing any more. It works on a store
// that no Control has open. Whatever this peer has not heard of is lost, so it
// is to be run on one peer, the one that knows most.
//
// The pool gets a new generation: peers of the old one, should they come back,
// can neither vote nor lead in it, and are told what to do. Every set gets an
// epoch far above whatever the lost ones may have decided alone, and waits for
// a new primary among the bricks that answer.
//
// at, in Unix seconds, is recorded.
func Recover(dir string, self cluster.PeerID, at int64) error {
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("control store: %w", err)
	}
	st, err := openStore(dir, nil)
	if err != nil {
		return err
	}
	defer st.close()
	snaps, err := openSnapshots(dir)
	if err != nil {
		return err
	}
	rc := raft.DefaultConfig()
	rc.LocalID = serverID(self)
	rc.Logger = newRaftLog(slog.New(slog.DiscardHandler))
	_, trans := raft.NewInmemTransport(raft.ServerAddress(rc.LocalID))
	defer trans.Close()
	f := &recovery{st: state.New(), self: self, at: at}
	only := raft.Configuration{Servers: []raft.Server{{ID: rc.LocalID, Address: raft.ServerAddress(rc.LocalID)}}}
	if err := raft.RecoverCluster(rc, f, st, st, snaps, trans, only); err != nil {
		return fmt.Errorf("recover the pool from %s: %w", dir, err)
	}
	if err := st.put(pooledKey, pooled{f.st.Map.Pool, f.st.Generation}.encode()); err != nil {
		return err
	}
	return st.put(forgetfulKey, []byte{0})
}

// PoolRecovery gathers what the decision to recover the pool on this peer depends on.
func (c *Control) PoolRecovery(ctx context.Context) *state.PoolRecovery {
	r := &state.PoolRecovery{Map: c.Map(), Self: c.cfg.Self, Generation: c.generation()}
	for _, a := range c.askAll(ctx) {
		if a.err == nil {
			r.Heard = append(r.Heard, state.PeerCopy{Peer: a.peer.ID, Applied: a.status.Applied, Generation: a.status.Generation})
		}
	}
	st := c.Status()
	r.Leader, r.Voters, r.Applied = st.Leader, st.Voters, st.Applied
	return r
}

// recovery is the state machine that Recover replays the log into.
type recovery struct {
	self    cluster.PeerID
	at      int64
	st      *state.State
	applied uint64
}

func (r *recovery) Apply(l *raft.Log) any {
	cmd, err := state.DecodeCommand(l.Data)
	if err == nil {
		err = r.st.Apply(cmd)
	}
	r.applied = l.Index
	return err
}

func (r *recovery) Restore(rc io.ReadCloser) error {
	defer rc.Close()
	b, err := io.ReadAll(rc)
	if err != nil {
		return err
	}
	r.applied, r.st, err = decodeSnapshot(b)
	return err
}

func (r *recovery) Snapshot() (raft.FSMSnapshot, error) {
	if r.st.Map.Peer(r.self) == nil {
		return nil, fmt.Errorf("peer %v is not in the pool that this store is of", r.self)
	}
	r.st.Recover(r.at, r.self)
	return snapshot(encodeSnapshot(r.applied, r.st)), nil
}
