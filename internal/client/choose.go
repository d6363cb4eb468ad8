package client

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/proto"
)

// candidate is a daemon that may have a replica to be home.
type candidate struct {
	local bool
	peer  cluster.PeerID // zero: whoever answers at addrs
	addrs []string
}

func (k candidate) String() string {
	if k.local {
		return "this machine"
	}
	return fmt.Sprint(k.addrs)
}

// candidates lists where to look for a home, best first.
func (c *Client) candidates() []candidate {
	var all []candidate
	if c.cfg.Local != "" {
		all = append(all, candidate{local: true})
	}
	c.mu.Lock()
	vm := c.vm
	c.mu.Unlock()
	seen := map[string]bool{}
	if vm != nil {
		bricks := slices.Clone(vm.Bricks)
		slices.SortStableFunc(bricks, func(a, b proto.BrickAddr) int {
			switch {
			case a.InSync && !b.InSync:
				return -1
			case b.InSync && !a.InSync:
				return 1
			}
			return 0
		})
		for _, b := range bricks {
			if len(b.Addrs) > 0 {
				all = append(all, candidate{peer: b.Peer, addrs: b.Addrs})
			}
			for _, a := range b.Addrs {
				seen[a] = true
			}
		}
	}
	for _, a := range c.cfg.Addrs {
		if !seen[a] {
			all = append(all, candidate{addrs: []string{a}})
		}
	}
	return all
}

// dial connects to a candidate, at the first of its addresses that answers.
func (c *Client) dial(ctx context.Context, k candidate) (net.Conn, error) {
	if k.local {
		return new(net.Dialer).DialContext(ctx, "unix", c.cfg.Local)
	}
	if c.cfg.Dial == nil {
		return nil, errors.New("only the local daemon is to be asked")
	}
	var errs []error
	for _, a := range k.addrs {
		nc, err := c.cfg.Dial(ctx, k.peer, a)
		if err == nil {
			return nc, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", a, err))
	}
	return nil, errors.Join(errs...)
}

// connect connects to a candidate and asks it for the volume's map.
func (c *Client) connect(ctx context.Context, k candidate) (*home, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	nc, err := c.dial(ctx, k)
	if err != nil {
		return nil, err
	}
	h := c.newHome(k, nc)
	vm := new(proto.VolumeMap)
	err = h.call(ctx, proto.KindGetMap, &proto.GetMap{Volume: c.cfg.Volume}, vm)
	if err == nil && vm.Status != proto.OK {
		err = &refusal{vm.Status, vm.Text}
	}
	if err != nil {
		h.close(err)
		return nil, err
	}
	h.serves = vm.Serves
	c.newMap(vm)
	return h, nil
}

// newMap takes a volume's map from a daemon.
func (c *Client) newMap(vm *proto.VolumeMap) {
	if vm.Status != proto.OK {
		return // a home that serves a volume no longer says so itself
	}
	c.mu.Lock()
	if c.vm != nil && c.vm.Version >= vm.Version {
		c.mu.Unlock()
		return
	}
	old := c.vm
	c.vm = vm
	c.mu.Unlock()
	options := optionsOf(vm)
	if old == nil || !maps.Equal(optionsOf(old), options) {
		d, _ := time.ParseDuration(options[cluster.OptIOTimeout])
		c.ioLimit.Store(int64(d))
		if c.cfg.Options != nil {
			c.cfg.Options(options)
		}
	}
	select {
	case c.mapped <- struct{}{}:
	default:
	}
}

func optionsOf(vm *proto.VolumeMap) map[string]string {
	m := make(map[string]string, len(vm.Options))
	for _, o := range vm.Options {
		m[o.Key] = o.Value
	}
	return m
}

// set is the replica set that the session is of.
func (c *Client) set() cluster.SetID {
	c.mu.Lock()
	defer c.mu.Unlock()
	return cluster.SetID{Volume: c.vm.Volume}
}

// backoff between rounds of asking everybody.
const (
	backoffFirst = 10 * time.Millisecond
	backoffMost  = 250 * time.Millisecond
)

// findHome asks until some candidate is home. Before the session ever had a
// home, a volume that does not exist or is not for this client is an error.
func (c *Client) findHome(ctx context.Context, lost *home) (*home, error) {
	pause := backoffFirst
	last := ""
	for {
		all := c.candidates()
		if lost != nil && len(all) > 1 {
			i := slices.IndexFunc(all, lost.from.same)
			if i >= 0 { // it is the least likely to answer
				all = append(slices.Delete(all, i, i+1), lost.from)
			}
			lost = nil
		}
		h, errs := c.askAll(ctx, all)
		if h != nil {
			return h, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		err := errors.Join(errs...)
		if err == nil {
			return nil, errors.New("no daemon to ask: neither a local socket nor addresses are configured")
		}
		if !c.wasReady() && c.cfg.Left == nil && final(errs) {
			return nil, err
		}
		if text := err.Error(); text != last {
			last = text
			c.log.Warn("no replica to be home", "err", err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		pause = min(2*pause, backoffMost)
	}
}

// headStart is for how long a candidate is asked alone, before the next one is
// asked as well: a machine that is gone does not say so.
const headStart = 150 * time.Millisecond

// askAll asks the candidates in their order. The first that agrees is home.
func (c *Client) askAll(ctx context.Context, all []candidate) (*home, []error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type answer struct {
		k   candidate
		h   *home
		err error
	}
	answers := make(chan answer)
	asked, open := 0, 0
	ask := func() {
		k := all[asked]
		asked++
		open++
		c.wg.Go(func() {
			h, err := c.connect(ctx, k)
			answers <- answer{k, h, err}
		})
	}
	var errs []error
	var chosen *home
	timer := time.NewTimer(headStart)
	defer timer.Stop()
	for {
		if open == 0 {
			if chosen != nil || asked == len(all) || ctx.Err() != nil {
				return chosen, errs
			}
			ask()
			timer.Reset(headStart)
		}
		select {
		case <-timer.C:
			if chosen == nil && asked < len(all) {
				ask()
				timer.Reset(headStart)
			}
		case a := <-answers:
			open--
			if chosen != nil {
				if a.h != nil {
					a.h.close(errors.New("another replica was faster"))
				}
				continue
			}
			if a.err == nil {
				if a.err = a.h.settle(ctx); a.err == nil {
					chosen = a.h
					cancel()
					continue
				}
				a.h.close(a.err)
			}
			errs = append(errs, fmt.Errorf("%v: %w", a.k, a.err))
			if open > 0 && asked < len(all) {
				ask()
				timer.Reset(headStart)
			}
		}
	}
}

// same says whether two candidates are the same daemon.
func (k candidate) same(o candidate) bool {
	return k.local == o.local && k.peer == o.peer && slices.Equal(k.addrs, o.addrs)
}

func (c *Client) wasReady() bool {
	select {
	case <-c.ready:
		return true
	default:
		return false
	}
}

// final says whether asking again is useless: somebody said no for good, and
// nobody said something else that time may change.
func final(errs []error) bool {
	no := false
	for _, err := range errs {
		var r *refusal
		if !errors.As(err, &r) {
			continue // out of reach
		}
		switch r.status {
		case proto.Refused, proto.WrongVersion, proto.UnknownSet:
			no = true
		default:
			return false
		}
	}
	return no
}

// settle makes a connected daemon's replica home, and begins the lease.
func (h *home) settle(ctx context.Context) error {
	if err := h.attach(ctx, h.c.set()); err != nil {
		return err
	}
	return h.firstPing(ctx)
}

// firstPing begins the lease.
func (h *home) firstPing(ctx context.Context) error {
	for began := monotonic(); ; {
		serving, err := h.ping(ctx)
		if serving || err != nil {
			return err
		}
		if monotonic()-began > silence {
			return &refusal{proto.NotServing, "the replica is out of touch with its primary"}
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-h.ctx.Done():
			return context.Cause(h.ctx)
		}
	}
}

// How soon a session away from its own machine looks whether it can go back, after the map
// has changed and it could not, and how often at least. The daemon here may hear of a
// change later than the one there.
const (
	returnFirst    = 100 * time.Millisecond
	returnInterval = 5 * time.Second
)

// keepHome is what Run does.
func (c *Client) keepHome(ctx context.Context) error {
	var lost *home
	pause := backoffFirst
	for {
		h, err := c.findHome(ctx, lost)
		if err != nil {
			return err
		}
		began := monotonic()
		for h != nil {
			c.log.Info("home", "replica", h.from.String())
			c.setHome(h)
			lost = h
			h, err = c.stay(ctx, h)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		c.log.Info("home lost", "why", err)
		if monotonic()-began > time.Second {
			pause = backoffFirst
			continue
		}
		// It takes sessions and then sends them away: not in a tight circle.
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		pause = min(2*pause, backoffMost)
	}
}

// stay lives at h until it is lost, or until a better home is found, which it
// returns. It closes h.
func (c *Client) stay(ctx context.Context, h *home) (better *home, why error) {
	lost := make(chan error, 1)
	h.wg.Go(func() { lost <- h.keep() })
	pause := returnInterval
	away := time.NewTimer(pause)
	defer away.Stop()
	for {
		select {
		case why = <-lost:
			c.setHome(nil)
			h.close(why)
			if h.from.local && c.cfg.HomeLost != nil {
				c.lapse("the home is lost")
				c.cfg.HomeLost(h.as)
			}
			return nil, why
		case <-ctx.Done():
			c.setHome(nil)
			h.drain(context.Background())
			h.closeSession()
			h.close(context.Cause(ctx))
			return nil, context.Cause(ctx)
		case <-c.mapped:
			pause = returnFirst
		case <-away.C:
			pause = min(2*pause, returnInterval)
		}
		away.Reset(pause)
		if c.cfg.Local != "" && !h.from.local {
			if better := c.goHome(ctx, h); better != nil {
				h.tellLapsed() // it was dropped before the better one was asked
				h.close(errors.New("the session went to its own machine"))
				return better, nil
			}
			c.setHome(h)
		}
	}
}

// goHome moves the session from h to this machine, if the replica here takes it.
// Operations pause meanwhile.
func (c *Client) goHome(ctx context.Context, h *home) *home {
	k := candidate{local: true}
	n, err := c.connect(ctx, k)
	if err != nil {
		return nil
	}
	if !n.serves { // to ask it would cost what is cached
		n.close(errors.New("it has no brick in sync"))
		return nil
	}
	c.setHome(nil)
	h.drain(ctx)
	if err = n.settle(ctx); err != nil {
		n.close(err)
		c.leasesFrom(h, "the session stays")
		c.log.Debug("staying away", "why", err)
		return nil
	}
	return n
}
