package sim

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
	"mortar/internal/proto"
)

// plane is the control plane: the replicated state as if it were one, and the
// work of its leader (package control). Consensus itself is not simulated: what
// is applied is decided. Bricks hear of it late, and a machine that starts may
// know less than it did before.
type plane struct {
	w       *world
	r       *rand.Rand
	st      *state.State
	volume  cluster.VolumeID
	decided []cluster.SetConfig
	// blind are the epochs whose primary was chosen although it may lack what was
	// acknowledged and not synced, since there was no better.
	blind    map[cluster.Epoch]bool
	trouble  *trouble
	leader   int
	vacant   time.Duration // no leader before this
	stopped  bool
	restarts int
}

// trouble is the search for a primary.
type trouble struct {
	epoch    cluster.Epoch
	since    time.Duration
	insisted bool
	pause    time.Duration
	leader   int
	over     bool
}

func newPlane(w *world) *plane {
	return &plane{w: w, r: w.stream(1), st: state.New(), blind: map[cluster.Epoch]bool{}}
}

// begin makes a pool and a volume of one set.
func (p *plane) begin() {
	p.volume = cluster.ID{0: 0xee, 15: 1}
	must := func(c state.Command) {
		if err := p.st.Apply(c); err != nil {
			panic(fmt.Sprintf("the set cannot be made: %v", err))
		}
	}
	peer := func(i int) cluster.Peer {
		return cluster.Peer{ID: peerID(i), Name: "n" + strconv.Itoa(i), Addrs: []string{"n" + strconv.Itoa(i) + ":24007"}}
	}
	must(state.Command{Init: &state.Init{Pool: cluster.ID{15: 9}, Peer: peer(0)}})
	create := &state.CreateVolume{ID: p.volume, Name: "v", Replica: p.w.plan.Bricks, Options: map[string]string{cluster.OptMinInSync: strconv.Itoa(p.w.plan.Min)}}
	for i := range p.w.plan.Bricks {
		if i > 0 {
			must(state.Command{AddPeer: &state.AddPeer{Peer: peer(i)}})
		}
		create.Bricks = append(create.Bricks, cluster.Brick{ID: brickID(i), Peer: peer(i).ID, Host: "n" + strconv.Itoa(i), Path: "/b"})
	}
	must(state.Command{CreateVolume: create})
	p.apply(state.Command{StartVolume: &state.StartVolume{Volume: p.volume}})
	for _, b := range p.w.bricks {
		p.watch(b)
	}
}

// config is the configuration of the set.
func (p *plane) config() *cluster.SetConfig {
	return &p.st.Map.VolumeByID(p.volume).Sets[0]
}

// apply decides a command.
func (p *plane) apply(c state.Command) error {
	err := p.st.Apply(c)
	if err != nil {
		p.w.say("plane refuses: %v", err)
		return err
	}
	cfg := p.config()
	if n := len(p.decided); n > 0 && p.decided[n-1].Epoch == cfg.Epoch {
		return nil
	}
	if n := len(p.decided); n > 0 {
		for _, id := range cfg.InSync {
			if cfg.IsDrained(id) && !p.decided[n-1].IsInSync(id) {
				p.w.fail("epoch %d takes %s in, which is drained", cfg.Epoch, p.w.name(id))
			}
		}
	}
	p.w.say("plane decides epoch %d: primary %s, in sync %s, min %d, floor %v", cfg.Epoch, p.w.name(cfg.Primary), p.w.names(cfg.InSync), cfg.MinInSync, cfg.Floor)
	p.decided = append(p.decided, cfg.Clone())
	for _, b := range p.w.bricks {
		p.tell(b)
	}
	return nil
}

// tell sends a brick the configuration.
func (p *plane) tell(b *brick) {
	cfg := p.decided[len(p.decided)-1]
	p.w.net.call(planeNode, b.i, func() {
		if b.up && b.seen < cfg.Epoch {
			b.seen = cfg.Epoch
			b.do(func() { b.m.Configure(b.now(), cfg) })
		}
	})
}

// watch has a brick hear sooner or later of what was decided.
func (p *plane) watch(b *brick) {
	p.w.after(time.Duration(100+p.r.IntN(100))*time.Millisecond, func() {
		cfg := p.config()
		if b.up && b.seen < cfg.Epoch {
			p.tell(b)
		}
		if b.i == 0 && cfg.Primary.IsZero() && !p.stopped {
			p.suspect(cfg.Epoch)
		}
		p.watch(b)
	})
}

// atStart is the configuration that a brick's machine knows when it starts: its
// copy of the plane's state is as old as its last snapshot, until it hears more.
func (p *plane) atStart(b *brick) (cfg cluster.SetConfig, known bool) {
	i := -1
	for k := range p.decided {
		if p.decided[k].Epoch <= b.seen {
			i = k
		}
	}
	if i < 0 {
		return cfg, false
	}
	if p.r.IntN(3) == 0 {
		i = p.r.IntN(i + 1)
	}
	b.seen = p.decided[i].Epoch
	return p.decided[i], true
}

// propose brings a configuration to the plane. answered is called once.
func (p *plane) propose(b *brick, next cluster.SetConfig, answered func(accepted, refused bool)) {
	once := false
	answer := func(accepted, refused bool) {
		if !once {
			once = true
			answered(accepted, refused)
		}
	}
	p.w.after(2*time.Second, func() { answer(false, false) })
	var decide func()
	decide = func() {
		if p.w.now < p.vacant {
			// The next leader takes it, though nobody may wait any more.
			p.w.at(p.vacant+p.w.net.delay(), decide)
			return
		}
		p.w.after(time.Duration(p.r.IntN(3000))*time.Microsecond, func() {
			err := p.apply(state.Command{SetConfig: &state.SetConfig{Config: next}})
			var refusal *state.Error
			refused := errors.As(err, &refusal) && refusal.Code != state.CodeStaleEpoch
			p.w.net.call(planeNode, b.i, func() { answer(err == nil, refused) })
		})
	}
	p.w.net.call(b.i, planeNode, decide)
}

// suspect takes a report that an epoch has no primary.
func (p *plane) suspect(epoch cluster.Epoch) {
	if p.w.now < p.vacant || p.stopped || p.config().Epoch != epoch {
		return
	}
	if t := p.trouble; t != nil && !t.over && t.epoch >= epoch && t.leader == p.leader {
		return
	}
	p.trouble = &trouble{epoch: epoch, since: p.w.now, pause: 50 * time.Millisecond, leader: p.leader}
	p.round(p.trouble)
}

// round seals the in-sync bricks and decides.
func (p *plane) round(t *trouble) {
	if t.over {
		return
	}
	cfg := p.config()
	if cfg.Epoch != t.epoch || p.stopped {
		t.over = true
		return
	}
	if t.leader != p.leader && p.r.IntN(2) == 0 {
		t.over = true
		return
	}
	now := *cfg
	results := make([]state.SealResult, len(now.InSync))
	closed, left := false, len(results)
	end := func() {
		if !closed {
			closed = true
			p.decide(t, now, results)
		}
	}
	for i, id := range now.InSync {
		b := p.w.brick(id)
		results[i].Brick = id
		p.w.net.call(planeNode, b.i, func() {
			b.do(func() {
				r := b.m.Seal(b.now(), proto.Seal{Epoch: now.Epoch, Planned: t.insisted})
				b.act() // what the machine keeps of it is kept before it answers
				p.w.net.call(b.i, planeNode, func() {
					if closed {
						return
					}
					results[i].Answered, results[i].Reply = true, r
					if left--; left == 0 {
						end()
					}
				})
			})
		})
	}
	p.w.after(state.SealTimeout, end)
}

func (p *plane) decide(t *trouble, cfg cluster.SetConfig, results []state.SealResult) {
	if t.over {
		return
	}
	f := state.Failover{Config: cfg, Results: results, Elapsed: p.w.now - t.since, Insisted: t.insisted}
	v := f.Decide()
	if v.Next != nil {
		p.w.after(time.Duration(p.r.IntN(5000))*time.Microsecond, func() {
			blind := false
			for _, r := range results {
				if r.Brick == v.Next.Primary && !r.Reply.Trusted {
					blind = true
				}
			}
			if p.config().Epoch+1 == v.Next.Epoch && blind {
				p.blind[v.Next.Epoch] = true
			}
			p.apply(state.Command{SetConfig: &state.SetConfig{Config: *v.Next}})
			t.over = true
		})
		return
	}
	p.w.say("plane: %s", v.Reason)
	if !v.Again {
		t.over = true
		return
	}
	t.insisted = v.Insist
	p.w.after(t.pause, func() { p.round(t) })
	t.pause = min(2*t.pause, time.Second)
}

func (p *plane) newLeader(vacant time.Duration) {
	p.leader++
	p.vacant = max(p.vacant, p.w.now+vacant)
}

func peerID(brick int) cluster.PeerID { return cluster.ID{0: 0xa, 15: byte(brick + 1)} }

// drain wants nothing to depend on the machine of a brick any more, or undoes that.
func (p *plane) drain(brick int, undo bool) {
	p.apply(state.Command{DrainPeer: &state.DrainPeer{Peer: peerID(brick), Undo: undo}})
}

func (p *plane) setMin(n int) {
	p.apply(state.Command{SetOptions: &state.SetOptions{Volume: p.volume, Options: map[string]string{cluster.OptMinInSync: strconv.Itoa(n)}}})
}

// halt stops the volume for a while: its bricks are closed cleanly.
func (p *plane) halt(d time.Duration) {
	if p.stopped || p.apply(state.Command{StopVolume: &state.StopVolume{Volume: p.volume}}) != nil {
		return
	}
	p.stopped = true
	p.restarts++
	n := p.restarts
	for _, b := range p.w.bricks {
		p.w.after(p.w.net.delay(), func() {
			if p.stopped && p.restarts == n && b.up && !b.paused {
				b.close()
				b.wanted = true
			}
		})
	}
	p.w.after(d, func() {
		if p.restarts == n {
			p.restart()
		}
	})
}

func (p *plane) restart() {
	if !p.stopped {
		return
	}
	p.stopped = false
	p.apply(state.Command{StartVolume: &state.StartVolume{Volume: p.volume}})
	for _, b := range p.w.bricks {
		if b.wanted {
			b.start()
		}
	}
}

func (p *plane) quiet() {
	p.vacant = 0
	p.restart()
}
