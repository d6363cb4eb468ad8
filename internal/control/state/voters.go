package state

import (
	"slices"

	"mortar/internal/cluster"
)

// Server is one peer as the consensus group sees it.
type Server struct {
	Peer  cluster.PeerID
	Voter bool
}

// StepKind is one kind of change to the consensus group.
type StepKind int

const (
	StepNone     StepKind = iota
	StepAdd               // as a non-voter
	StepPromote           // to a voter
	StepDemote            // to a non-voter
	StepRemove            //
	StepTransfer          // the leader hands its office to another voter
)

func (k StepKind) String() string {
	return [...]string{"none", "add", "promote", "demote", "remove", "transfer"}[k]
}

// Step is the next change that brings the group closer to what it should be.
type Step struct {
	Kind StepKind
	Peer cluster.PeerID // for StepTransfer, zero
}

// Voters returns how many of n peers that may vote do: an odd number, so that one more
// machine never makes the pool weaker.
func Voters(n int) int {
	switch {
	case n < 3:
		return 1
	case n < 5:
		return 3
	}
	return 5
}

// MayVote returns how many peers of a map may vote. Clients never do, however many they are.
func MayVote(m *cluster.Map) (n int) {
	for _, p := range m.Peers {
		if !p.NoVote {
			n++
		}
	}
	return n
}

// VotersOf returns how many peers of a map vote.
func VotersOf(m *cluster.Map) int { return Voters(MayVote(m)) }

// Group is what the next change of the consensus group depends on.
type Group struct {
	Map     *cluster.Map
	Servers []Server
	Leader  cluster.PeerID
	// Reachable tells which servers answer the leader now, Ready those
	// non-voters whose copy is up to date, Lost those that have been silent for
	// so long that another peer should vote in their place.
	Reachable, Ready, Lost func(cluster.PeerID) bool
}

// NextStep compares the consensus group with the peers of the map and returns
// one change, or StepNone. It never proposes a change after which the reachable
// voters would be no majority: such a change could not be committed, and would
// leave a pool that can decide nothing.
func (g *Group) NextStep() Step {
	m, group, leader, reachable, ready := g.Map, g.Servers, g.Leader, g.Reachable, g.Ready
	in := func(id cluster.PeerID) bool {
		return slices.ContainsFunc(group, func(s Server) bool { return s.Peer == id })
	}
	for _, p := range m.Peers {
		if !in(p.ID) {
			return Step{StepAdd, p.ID}
		}
	}
	alive := func(id cluster.PeerID) bool { return id == leader || reachable(id) }
	// safe reports whether the voters left after a change still are a majority
	// with those that can be reached.
	safe := func(change Step) bool {
		voters, up := 0, 0
		for _, s := range group {
			v := s.Voter
			if s.Peer == change.Peer {
				v = change.Kind == StepPromote
			}
			if !v {
				continue
			}
			voters++
			if alive(s.Peer) {
				up++
			}
		}
		return up >= voters/2+1
	}
	var gone, stay, spare []Server // voters not in the map, voters in it, peers that could vote
	for _, s := range group {
		switch {
		case m.Peer(s.Peer) == nil && s.Voter:
			gone = append(gone, s)
		case m.Peer(s.Peer) == nil:
			return Step{StepRemove, s.Peer}
		case s.Voter:
			stay = append(stay, s)
		case !m.Peer(s.Peer).NoVote:
			spare = append(spare, s)
		}
	}
	want := VotersOf(m)
	canVote := func(s Server) bool { return reachable(s.Peer) && ready(s.Peer) }

	// Too few: promote, if the whole way up can be gone. Half of it (two voters)
	// would be worse than nothing.
	if len(stay) < want {
		var able []Server
		for _, s := range spare {
			if canVote(s) {
				able = append(able, s)
			}
		}
		missing := want - len(stay)
		if len(able) >= missing || len(gone) > 0 && len(able) > 0 || len(stay)%2 == 0 && len(able) > 0 {
			if st := (Step{StepPromote, able[0].Peer}); safe(st) {
				return st
			}
		}
	}
	// Voters that left the pool: the silent ones first, the leader last of all.
	slices.SortStableFunc(gone, func(a, b Server) int { return rank(a, leader, alive) - rank(b, leader, alive) })
	for _, s := range gone {
		if s.Peer == leader {
			if slices.ContainsFunc(stay, func(v Server) bool { return reachable(v.Peer) }) {
				return Step{Kind: StepTransfer}
			}
			continue
		}
		if st := (Step{StepRemove, s.Peer}); safe(st) {
			return st
		}
	}
	// Too many: demote, the silent ones first, never the leader.
	if len(stay) > want {
		order := slices.Clone(stay)
		slices.Reverse(order) // the oldest peers keep their vote
		slices.SortStableFunc(order, func(a, b Server) int { return rank(a, leader, alive) - rank(b, leader, alive) })
		for _, s := range order {
			if s.Peer == leader {
				continue
			}
			if st := (Step{StepDemote, s.Peer}); safe(st) {
				return st
			}
		}
	}
	// The right number, but one is silent and another peer could vote for it.
	if len(stay) == want && want > 1 {
		silent := slices.IndexFunc(stay, func(s Server) bool { return !alive(s.Peer) && g.Lost(s.Peer) })
		if able := slices.IndexFunc(spare, canVote); silent >= 0 && able >= 0 {
			if st := (Step{StepPromote, spare[able].Peer}); safe(st) {
				return st
			}
		}
	}
	return Step{}
}

// rank orders voters by how gladly the group does without them.
func rank(s Server, leader cluster.PeerID, alive func(cluster.PeerID) bool) int {
	switch {
	case s.Peer == leader:
		return 2
	case alive(s.Peer):
		return 1
	}
	return 0
}
