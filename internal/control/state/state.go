// Package state is what a pool must decide once: its peers, its volumes and the
// configuration of every replica set, its join tokens and its certificate
// authority. It is a deterministic machine without clock, goroutine or I/O.
//
// Package control replicates it: every peer applies the same commands in the
// same order and so holds the same State. Therefore Apply must be total (any
// command gives a new state or a refusal, never a panic), atomic (a refused
// command changes nothing) and a function of the state and the command alone:
// ids, times and secrets are chosen by whoever proposes and travel inside.
//
// The two decisions that need more than the state, which brick leads after a
// failure (Failover) and which peers vote (Voters), are pure functions here too;
// what they decide comes back as commands.
package state

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"mortar/internal/cluster"
)

// Format is the version of the snapshot and of the commands' meaning. A peer
// refuses a snapshot of a newer one.
const Format = 1

// State is the replicated state of a pool. The zero State is a machine that
// belongs to no pool; Init makes it one. Only Apply changes it.
type State struct {
	Format int `json:"format"`
	// Map is what everybody may know. It is replaced, never changed, so a Map
	// that was handed out stays as it was.
	Map *cluster.Map `json:"map"`
	// Generation counts the recoveries of the pool by hand. A peer that still
	// lives in an older generation is refused by the others.
	Generation uint64 `json:"generation,omitempty"`
	// Authority is the pool's certificate authority, certificate and key, as
	// package pki wrote it. AuthorityVersion counts its replacements.
	Authority        []byte `json:"authority,omitempty"`
	AuthorityVersion uint64 `json:"authority_version,omitempty"`
	// Tokens are the unused join tokens, sorted by hash.
	Tokens []Token `json:"tokens,omitempty"`
	// Changed holds, for every peer and volume, the map version of its last
	// change by an administrator: what compare-and-set compares.
	Changed map[cluster.ID]uint64 `json:"changed,omitempty"`
	// Detached are the peers that were taken out of the pool, oldest first, so
	// that one that was away at the time can be told.
	Detached []cluster.PeerID `json:"detached,omitempty"`
	// Recent are the ids of the last commands that were applied, oldest first: a
	// command proposed twice because an answer was lost is applied once.
	Recent []cluster.ID `json:"recent,omitempty"`
}

// recentLimit bounds Recent. A proposer repeats a command for some seconds;
// this many commands are not decided in that time.
const recentLimit = 256

// Token is a one-use secret that lets a machine join or a client mount, less
// the secret: only its hash is kept.
type Token struct {
	Hash    string     `json:"hash"` // lower-case hex of the SHA-256 of the secret
	Role    string     `json:"role"` // "peer" or "client"
	Volume  string     `json:"volume,omitempty"`
	Expires int64      `json:"expires"`          // Unix seconds
	Uses    int        `json:"uses"`             // left
	By      cluster.ID `json:"by"`               // the peer on which it was made
	Note    string     `json:"note,omitempty"`   // for people
	Rights  string     `json:"rights,omitempty"` // of a client: "ro" or "rw"
}

// New returns the empty state of a machine that belongs to no pool.
func New() *State {
	return &State{Format: Format, Map: &cluster.Map{}, Changed: map[cluster.ID]uint64{}}
}

// Token returns the token with that hash, or nil. It may have expired.
func (s *State) Token(hash string) *Token {
	if i, ok := s.findToken(hash); ok {
		t := s.Tokens[i]
		return &t
	}
	return nil
}

func (s *State) findToken(hash string) (int, bool) {
	return slices.BinarySearchFunc(s.Tokens, hash, func(t Token, h string) int { return strings.Compare(t.Hash, h) })
}

// Clone returns a copy that shares nothing that Apply changes.
func (s *State) Clone() *State {
	c := *s
	c.Tokens = slices.Clone(s.Tokens)
	c.Recent = slices.Clone(s.Recent)
	c.Detached = slices.Clone(s.Detached)
	c.Changed = make(map[cluster.ID]uint64, len(s.Changed))
	for k, v := range s.Changed {
		c.Changed[k] = v
	}
	return &c
}

// Encode writes the state for a snapshot. Equal states give equal bytes.
func (s *State) Encode() []byte {
	b, err := json.Marshal(s)
	if err != nil {
		panic(fmt.Sprintf("state: encoding: %v", err)) // no field can fail
	}
	return b
}

// Decode reads what Encode wrote.
func Decode(b []byte) (*State, error) {
	var head struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return nil, fmt.Errorf("control state: %w", err)
	}
	if head.Format != Format {
		return nil, fmt.Errorf("control state has format %d and this program reads format %d: run the version of mortar that wrote it, or a newer one", head.Format, Format)
	}
	s := New()
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(s); err != nil {
		return nil, fmt.Errorf("control state: %w", err)
	}
	if err := s.sound(); err != nil {
		return nil, fmt.Errorf("control state: %w", err)
	}
	if s.Changed == nil {
		s.Changed = map[cluster.ID]uint64{}
	}
	return s, nil
}

// sound reports what would make Apply stumble. A state that was encoded is
// sound; one that was tampered with need not be.
func (s *State) sound() error {
	if s.Map == nil {
		return errors.New("it has no map")
	}
	if slices.Contains(s.Map.Peers, nil) || slices.Contains(s.Map.Volumes, nil) {
		return errors.New("a peer or volume is empty")
	}
	if slices.Contains(s.Map.Docker, nil) || !slices.IsSortedFunc(s.Map.Docker, byName) {
		return errors.New("its Docker volumes are not in order")
	}
	for _, v := range s.Map.Volumes {
		if v.Replica < 1 || len(v.Sets) == 0 || len(v.Bricks) != v.Replica*len(v.Sets) {
			return fmt.Errorf("volume %q has %d bricks in %d sets of %d", v.Name, len(v.Bricks), len(v.Sets), v.Replica)
		}
		for i := range v.Sets {
			if len(v.Sets[i].Members) != v.Replica {
				return fmt.Errorf("volume %q: set %d has %d members", v.Name, i, len(v.Sets[i].Members))
			}
		}
	}
	if !slices.IsSortedFunc(s.Tokens, func(a, b Token) int { return strings.Compare(a.Hash, b.Hash) }) {
		return errors.New("its tokens are not in order")
	}
	return nil
}

// epochLeap is far more than the number of configurations that a set can have
// been given by peers that a recovery left behind.
const epochLeap = 1 << 32

// Recover turns the state into the first of a new generation, at that time and
// by that peer, see control.Recover. It is the one change that is no command:
// there is nobody to decide it.
func (s *State) Recover(at int64, by cluster.PeerID) {
	next := s.Clone()
	m := *s.Map
	m.Volumes = slices.Clone(m.Volumes)
	next.Map = &m
	for _, v := range s.Map.Volumes {
		v, _ := next.editVolume(v.ID)
		for i := range v.Sets {
			if set := &v.Sets[i]; set.Epoch > 0 {
				set.Epoch += epochLeap
				set.Primary = cluster.BrickID{}
				set.Doubted = true
			}
		}
	}
	next.Generation++
	m.Recoveries = append(slices.Clone(m.Recoveries), cluster.PoolRecovery{Generation: next.Generation, At: at, By: by})
	if n := len(m.Recoveries) - maxRecoveries; n > 0 {
		m.Recoveries = slices.Delete(m.Recoveries, 0, n)
	}
	m.Version++
	*s = *next
}
