package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
)

// request is what Handle understands: one of the first six.
type request struct {
	Propose  json.RawMessage `json:"propose,omitempty"` // an encoded state.Command
	Suspect  *suspicion      `json:"suspect,omitempty"`
	Handover *handover       `json:"handover,omitempty"`
	Status   bool            `json:"status,omitempty"`
	Problems bool            `json:"problems,omitempty"`
	Recent   bool            `json:"recent,omitempty"`
	Boot     uint64          `json:"boot,omitempty"` // of the asking process
}

// suspicion reports that a set's primary does not do its work.
type suspicion struct {
	Set   cluster.SetID   `json:"set"`
	Epoch cluster.Epoch   `json:"epoch"`
	From  cluster.BrickID `json:"from"`
}

// handover asks that a brick which goes away leads no longer.
type handover struct {
	Set     cluster.SetID   `json:"set"`
	Epoch   cluster.Epoch   `json:"epoch"`
	Leaving cluster.BrickID `json:"leaving"`
}

// answer is what Handle says.
type answer struct {
	// Retry asks the other side to find the leader and ask that.
	Retry bool `json:"retry,omitempty"`
	// Index is where in the log a command was applied, or for Recent, the last one.
	Index  uint64       `json:"index,omitempty"`
	Err    *state.Error `json:"err,omitempty"`
	Status *peerStatus  `json:"status,omitempty"`
	// Problems is the answer to the request of that name.
	Problems []Problem `json:"problems,omitempty"`
}

// peerStatus is what peers tell each other about themselves.
type peerStatus struct {
	Generation  uint64         `json:"generation"`
	Leader      cluster.PeerID `json:"leader"`
	LeaderBoot  uint64         `json:"leader_boot,omitempty"` // of the process that was heard as leader just now
	Applied     uint64         `json:"applied"`
	Incarnation uint64         `json:"incarnation"`
	Boot        uint64         `json:"boot"`
	Forgetful   bool           `json:"forgetful,omitempty"`
}

// maxRequest bounds what Handle reads: a command, and its wrapping.
const maxRequest = state.MaxCommand + 4096

// Propose has the pool carry out a command and returns when this peer has
// applied it: nil, or the refusal (*state.Error). It may be called on any peer.
// A command is carried out once, whatever happens to leaders and connections
// meanwhile; if ctx ends first, it may be carried out or not.
func (c *Control) Propose(ctx context.Context, cmd state.Command) error {
	if cmd.ID.IsZero() {
		cmd.ID = cluster.NewID()
	}
	raw, err := cmd.Encode()
	if err != nil {
		return err
	}
	a, err := c.ask(ctx, &request{Propose: raw, Boot: c.boot})
	if err != nil {
		return err
	}
	return c.awaitApplied(ctx, a.Index)
}

// Suspect reports, on behalf of brick from, that the primary of a set does not
// do its work in that epoch. It returns when the leader has taken note; what
// comes of it is seen in the Map. Reports that are outdated are ignored.
func (c *Control) Suspect(ctx context.Context, set cluster.SetID, epoch cluster.Epoch, from cluster.BrickID) error {
	_, err := c.ask(ctx, &request{Suspect: &suspicion{set, epoch, from}})
	return err
}

// Handover has brick leaving, which is about to go away, replaced as primary of
// the set and taken out of its in-sync bricks. It returns when the new
// configuration is decided, or with the reason why it cannot be.
func (c *Control) Handover(ctx context.Context, set cluster.SetID, epoch cluster.Epoch, leaving cluster.BrickID) error {
	_, err := c.ask(ctx, &request{Handover: &handover{set, epoch, leaving}})
	return err
}

// CatchUp returns when this peer has applied everything that was decided before
// it was called: what anybody was told was done, on any peer, shows in Map.
func (c *Control) CatchUp(ctx context.Context) error {
	a, err := c.ask(ctx, &request{Recent: true})
	if err != nil {
		return err
	}
	return c.awaitApplied(ctx, a.Index)
}

// Problems returns the replica sets that wait for a primary, and why, as the
// leader knows them. It may be called on any peer.
func (c *Control) Problems(ctx context.Context) ([]Problem, error) {
	a, err := c.ask(ctx, &request{Problems: true})
	if err != nil {
		return nil, err
	}
	return a.Problems, nil
}

// ForcePrimary carries out an operator's decision to go on with one brick of a
// set although it may lack something. What it lacks is lost, so the brick must
// still be where the plan, to which the operator agreed, says. at, in Unix
// seconds, is recorded.
func (c *Control) ForcePrimary(ctx context.Context, plan *state.Plan, at int64) error {
	next := plan.Next
	m := c.Map()
	v := m.VolumeByID(next.Set.Volume)
	if v == nil || int(next.Set.Index) >= len(v.Sets) {
		return state.Refusal(state.CodeNoVolume, "there is no replica set %v", next.Set)
	}
	b := v.Brick(next.Primary)
	if b == nil {
		return state.Refusal(state.CodeBadBrick, "brick %v is not one of volume %s", next.Primary, v.Name)
	}
	sctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	r, err := c.cfg.Sets.Seal(sctx, *b, next.Set, next.Epoch-1, true)
	if err != nil {
		return fmt.Errorf("brick %s does not answer and cannot lead: %w", b, err)
	}
	if !r.Sealed {
		return state.Refusal(state.CodeUnsafe, "brick %s cannot lead: %s", b, r.Text)
	}
	if r.Tail != next.Floor {
		return state.Refusal(state.CodeConflict, "brick %s was at %v and is at %v now: look again at what would be lost", b, next.Floor, r.Tail)
	}
	return c.Propose(ctx, state.Command{SetConfig: &state.SetConfig{Config: next, Force: true, At: at, By: c.cfg.Self}})
}

// retryEvery is the pause before the leader is looked for again.
const retryEvery = 50 * time.Millisecond

// ask brings a request to the leader, whoever that is, and its answer back.
func (c *Control) ask(ctx context.Context, req *request) (*answer, error) {
	raw, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	var last error
	for {
		moved := c.leaderMoves()
		if err := c.Detached(); err != nil {
			return nil, err
		}
		select {
		case <-c.failed:
			return nil, c.failErr
		default:
		}
		a, err := c.askOnce(ctx, moved, req, raw)
		if err == nil && !a.Retry {
			if a.Err != nil {
				return nil, a.Err
			}
			return a, nil
		}
		if err != nil {
			last = err
		}
		timer := time.NewTimer(retryEvery)
		select {
		case <-timer.C:
		case <-moved:
		case <-c.failed:
		case <-ctx.Done():
			timer.Stop()
			return nil, fmt.Errorf("%w (%w)", c.noLeader(last), context.Cause(ctx))
		}
	}
}

// askOnce tries it with the leader that is known now, as long as it is that.
func (c *Control) askOnce(ctx context.Context, moved <-chan struct{}, req *request, raw []byte) (*answer, error) {
	if c.raft.State() == raft.Leader {
		return c.serve(ctx, c.cfg.Self, req), nil
	}
	// A leader that has died silently must not hold the request, nor must a peer
	// that is asked who leads: soon nobody hears of it any more, and another is
	// elected. Whether the first did anything with the request does not matter,
	// since commands are carried out once.
	cctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	over := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-moved:
			cancel()
		case <-over:
		}
	})
	defer watch.Wait()
	defer close(over)
	to, ok := c.Leader()
	if !ok {
		to, ok = c.hearsay(cctx)
	}
	if !ok || to == c.cfg.Self {
		return &answer{Retry: true}, nil
	}
	b, err := c.cfg.Call(cctx, to, raw)
	if err != nil {
		return nil, err
	}
	var a answer
	if err := json.Unmarshal(b, &a); err != nil {
		return nil, fmt.Errorf("control: the leader's answer: %w", err)
	}
	return &a, nil
}

// hearsayEvery is the least time between two rounds of asking who leads.
const hearsayEvery = 500 * time.Millisecond

// hearsay asks the other peers who leads. A leader makes itself known to the
// members of its group; one that it cannot reach, or a copy of a member, hears
// of it only this way.
func (c *Control) hearsay(ctx context.Context) (cluster.PeerID, bool) {
	c.mu.Lock()
	if time.Since(c.lastAsked) < hearsayEvery {
		c.mu.Unlock()
		return cluster.PeerID{}, false
	}
	c.lastAsked = time.Now()
	c.mu.Unlock()
	for _, a := range c.askAll(ctx) {
		if a.err == nil && !a.status.Leader.IsZero() && a.status.Leader != c.cfg.Self {
			return a.status.Leader, true
		}
	}
	return cluster.PeerID{}, false
}

// noLeader says why nothing can be decided.
func (c *Control) noLeader(last error) error {
	m := c.Map()
	if m.Pool.IsZero() {
		return state.Refusal(state.CodeNoPool, "this machine belongs to no pool yet: start it as the first of a new one, or let it join one with \"mortar join\"")
	}
	voters := c.Status().Voters
	names := ""
	for i, id := range voters {
		if i > 0 {
			names += ", "
		}
		if p := m.Peer(id); p != nil {
			names += p.Name
		} else {
			names += id.String()
		}
	}
	text := fmt.Sprintf("Quorum not met. The pool cannot decide anything now: it needs %d of its %d voting peer(s) (%s), and they do not elect a leader. Start those that are down, or see to the network between them", len(voters)/2+1, len(voters), names)
	if to, ok := c.Leader(); ok && last != nil {
		name := to.String()
		if p := m.Peer(to); p != nil {
			name = p.Name
		}
		text = fmt.Sprintf("the pool's leader %s does not answer: %v. Start mortar there, or see to the network between it and this machine", name, last)
	}
	return state.Refusal(state.CodeNoLeader, "%s", text)
}

// awaitApplied waits until this peer has applied the command at index.
func (c *Control) awaitApplied(ctx context.Context, index uint64) error {
	for {
		c.mu.Lock()
		applied, changed := c.applied, c.changed
		c.mu.Unlock()
		if applied >= index {
			return nil
		}
		select {
		case <-changed:
		case <-c.failed:
			return c.failErr
		case <-ctx.Done():
			return fmt.Errorf("the pool has decided, and this peer has not heard of it yet: %w", context.Cause(ctx))
		}
	}
}

// Handle answers a request that another peer's Control made through Config.Call.
// from is who asks, as its certificate says. The answer is meant for that peer;
// an error means that the request was not one.
func (c *Control) Handle(ctx context.Context, from cluster.PeerID, raw []byte) ([]byte, error) {
	if len(raw) > maxRequest {
		return nil, fmt.Errorf("control: a request of %d bytes", len(raw))
	}
	var req request
	if err := json.Unmarshal(raw, &req); err != nil {
		return nil, fmt.Errorf("control: not a request: %w", err)
	}
	a := c.refuseStranger(from, req.Status)
	if a == nil {
		a = c.serve(ctx, from, &req)
	}
	return json.Marshal(a)
}

// refuseStranger refuses who is not in the pool. A detached peer that has still
// to leave the consensus group may ask for the status.
func (c *Control) refuseStranger(from cluster.PeerID, status bool) *answer {
	member := status && c.Member(from)
	c.mu.Lock()
	defer c.mu.Unlock()
	if member {
		return nil
	}
	if slices.Contains(c.st.Detached, from) {
		return &answer{Err: state.Refusal(state.CodeDetached, "peer %v was detached from pool %v", from, c.st.Map.Pool)}
	}
	if c.st.Map.Peer(from) == nil && !c.st.Map.Pool.IsZero() {
		return &answer{Err: state.Refusal(state.CodeNoPeer, "%v is not part of cluster", from)}
	}
	return nil
}

// serve answers a request, on the leader or with Retry.
func (c *Control) serve(ctx context.Context, from cluster.PeerID, req *request) *answer {
	if req.Status {
		return &answer{Status: c.ownStatus()}
	}
	if c.raft.State() != raft.Leader {
		return &answer{Retry: true}
	}
	switch {
	case req.Propose != nil:
		return c.decide(ctx, from, req)
	case req.Suspect != nil:
		if l := c.leading(); l != nil {
			l.suspect(req.Suspect)
			return &answer{}
		}
	case req.Handover != nil:
		if l := c.leading(); l != nil {
			err := l.handover(ctx, req.Handover)
			switch {
			case errors.Is(err, errAgain):
				return &answer{Retry: true}
			case err != nil:
				return &answer{Err: asRefusal(err)}
			}
			return &answer{}
		}
	case req.Recent:
		if l := c.leading(); l != nil {
			if index, ok := l.recent(ctx); ok {
				return &answer{Index: index}
			}
		}
	case req.Problems:
		if l := c.leading(); l != nil {
			return &answer{Problems: l.problems()}
		}
	default:
		return &answer{Err: state.Refusal(state.CodeBadCommand, "a request that this version of mortar does not know")}
	}
	return &answer{Retry: true}
}

func (c *Control) ownStatus() *peerStatus {
	leader, _ := c.Leader()
	forgetful := !c.recalled()
	c.mu.Lock()
	defer c.mu.Unlock()
	return &peerStatus{Generation: c.pooled.Generation, Leader: leader, LeaderBoot: c.trans.stream.bootOf(leader), Applied: c.applied, Incarnation: c.incarnation, Boot: c.boot, Forgetful: forgetful}
}

// asRefusal makes any error one that can be sent.
func asRefusal(err error) *state.Error {
	var e *state.Error
	if errors.As(err, &e) {
		return e
	}
	return state.Refusal(state.CodeBroken, "%v", err)
}

// decide has the group apply a command that arrived at the leader.
func (c *Control) decide(ctx context.Context, from cluster.PeerID, req *request) *answer {
	cmd, err := state.DecodeCommand(req.Propose)
	if err != nil {
		return &answer{Err: asRefusal(err)}
	}
	if cmd.Incarnate != nil {
		if cmd.Incarnate.Peer != from {
			return &answer{Err: state.Refusal(state.CodeBadCommand, "a peer can only announce its own start")}
		}
		if err := c.checkClone(ctx, from, req.Boot); err != nil {
			return &answer{Err: asRefusal(err)}
		}
	}
	index, err := c.apply(req.Propose)
	if errors.Is(err, errAgain) {
		return &answer{Retry: true}
	}
	if err != nil {
		return &answer{Err: asRefusal(err)}
	}
	return &answer{Index: index}
}

var errAgain = errors.New("control: not the leader, or not any more")

// apply appends a command to the group's log and waits for its outcome. errAgain
// means that it may or may not be applied; commands have ids for that.
func (c *Control) apply(raw []byte) (index uint64, err error) {
	f := c.raft.Apply(raw, time.Second)
	if err := f.Error(); err != nil {
		c.log.Debug("control: a command was not committed", "error", err)
		return 0, errAgain
	}
	if err, ok := f.Response().(error); ok {
		return 0, err
	}
	return f.Index(), nil
}
