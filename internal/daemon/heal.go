package daemon

import (
	"context"
	"encoding/hex"
	"time"

	"mortar/internal/api"
	"mortar/internal/cluster"
	"mortar/internal/proto"
	"mortar/internal/replica"
)

// HealInfo implements httpd.Volumes.
func (n *Node) HealInfo(ctx context.Context, name string) (*api.HealInfo, error) {
	m, v, err := n.started(ctx, name)
	if err != nil {
		return nil, err
	}
	if v.Replica < 2 {
		return nil, api.Errorf(api.Invalid, "Volume %s is not of type replicate or disperse", v.Name)
	}
	all, fails := m.gather(ctx, v, false)
	rows := m.statuses(v, all, fails)
	info := &api.HealInfo{Volume: v.Name}
	for i, row := range rows {
		hb := api.HealBrick{Name: row.Name, Connected: row.Online, InSync: row.InSync, Heal: row.Heal, Problem: row.Problem, Entries: -1}
		// What a brick lacks is the distance to what its set has acknowledged,
		// which the primary knows.
		first := i / v.Replica * v.Replica
		for _, p := range rows[first : first+v.Replica] {
			if p.Role != "primary" || !row.Online {
				continue
			}
			hb.Entries = max(0, int64(p.Commit)-int64(row.Tail))
			if row.InSync && row.Heal == nil {
				hb.Entries = 0 // what is under way is not lacking
			} else if hb.Entries == 0 && !row.InSync && !row.Drained {
				hb.Entries = 1 // not yet trusted to have everything
			}
		}
		switch {
		case hb.Entries < 0:
			info.Pending = -1
		case info.Pending >= 0:
			info.Pending += hb.Entries
		}
		info.Bricks = append(info.Bricks, hb)
	}
	return info, nil
}

// Heal implements httpd.Volumes. Bricks heal by themselves; asking for it makes
// those that gave up try again at once. A full heal compares the replicas.
func (n *Node) Heal(ctx context.Context, name string, r api.HealRequest) (*api.HealReply, error) {
	m, v, err := n.started(ctx, name)
	if err != nil {
		return nil, err
	}
	if v.Replica < 2 {
		return nil, api.Errorf(api.Invalid, "Volume %s is not of type replicate or disperse", v.Name)
	}
	m.retry(ctx, v)
	reply := &api.HealReply{Same: true}
	if !r.Verify && !r.Full {
		return reply, nil
	}
	for i := range v.Sets {
		part, err := m.verify(ctx, v, i)
		if err != nil {
			return nil, apiError(err)
		}
		reply.Digests = append(reply.Digests, part.Digests...)
		reply.Same = reply.Same && part.Same
	}
	if !r.Verify && !reply.Same {
		return nil, api.Errorf(api.Conflict, "the replicas differ; \"volume heal %s full --verify\" shows where", v.Name)
	}
	return reply, nil
}

// verify has the primary of a set compare its bricks. Around a fail-over it
// takes a moment until everybody agrees who that is.
func (m *member) verify(ctx context.Context, v *cluster.Volume, set int) (*api.HealReply, error) {
	const patience = 5 * time.Second
	for began := time.Now(); ; {
		reply, err := m.verifyOnce(ctx, v, set)
		if err == nil || !api.IsCode(err, api.BrickDown) || time.Since(began) > patience {
			return reply, err
		}
		if v = m.later(ctx, v, 200*time.Millisecond); v == nil {
			return nil, err
		}
	}
}

// later is a volume as it is known after a while, as before if it is not any more; nil if
// ctx has ended.
func (m *member) later(ctx context.Context, v *cluster.Volume, after time.Duration) *cluster.Volume {
	if !pause(ctx, after) {
		return nil
	}
	if now := m.view.Load().VolumeByID(v.ID); now != nil {
		return now
	}
	return v
}

// pause waits between two attempts; false: ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (m *member) verifyOnce(ctx context.Context, v *cluster.Volume, set int) (*api.HealReply, error) {
	b := v.Brick(v.Sets[set].Primary)
	if b == nil {
		return nil, api.Errorf(api.BrickDown, "set %d of volume %s has no primary now", set, v.Name)
	}
	return at(ctx, m, b.Peer,
		func() (*api.HealReply, error) { return m.n.LocalVerify(ctx, v.Name) },
		func(c *api.Client) (*api.HealReply, error) { return c.LocalVerify(ctx, v.Name) })
}

// LocalVerify implements httpd.Local.
func (n *Node) LocalVerify(ctx context.Context, name string) (*api.HealReply, error) {
	m, v, err := n.started(ctx, name)
	if err != nil {
		return nil, err
	}
	reply := &api.HealReply{Same: true}
	for i := range v.Sets {
		config := &v.Sets[i]
		b := v.Brick(config.Primary)
		if b == nil || b.Peer != m.keeper.ID() {
			return nil, api.Errorf(api.BrickDown, "another machine leads set %d of volume %s now", i, v.Name)
		}
		rep := m.bricks.replica(b.ID)
		if rep == nil {
			return nil, api.Errorf(api.BrickDown, "brick %s is not served now", b)
		}
		digests, err := rep.Verify(ctx)
		if err != nil {
			return nil, api.Errorf(api.BrickDown, "%w", err)
		}
		part := compare(v, config, digests)
		reply.Digests = append(reply.Digests, part.Digests...)
		reply.Same = reply.Same && part.Same
	}
	return reply, nil
}

// compare puts the digests of a set side by side.
func compare(v *cluster.Volume, config *cluster.SetConfig, digests map[cluster.BrickID]proto.DigestReply) *api.HealReply {
	reply := &api.HealReply{Same: true}
	want, known := digests[config.Primary]
	known = known && want.Status == proto.OK
	for _, id := range config.Members {
		d := api.BrickDigest{Brick: v.Brick(id).String()}
		switch r, ok := digests[id]; {
		case !ok:
			d.Problem = "not in sync"
			reply.Same = false
		case r.Status != proto.OK:
			d.Problem = r.Text
			reply.Same = false
		default:
			d.At, d.Sum, d.Inodes, d.Bytes = r.At.String(), hex.EncodeToString(r.Sum[:]), r.Inodes, r.Bytes
			reply.Same = reply.Same && known && r.Sum == want.Sum
		}
		reply.Digests = append(reply.Digests, d)
	}
	return reply
}

// pace is how fast a comparison goes.
type pace struct {
	began time.Time
	start uint64 // bytes done then
	at    time.Time
	bytes uint64
	rate  float64 // bytes per second
}

// pace notes how far a comparison has come and returns its rate.
func (r *brickRun) pace(p replica.HealProgress) pace {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	h := &r.healPace
	if h.began.IsZero() || p.BytesDone < h.bytes {
		*h = pace{began: now, start: p.BytesDone, at: now, bytes: p.BytesDone}
	}
	if dt := now.Sub(h.began).Seconds(); dt > 0 {
		h.rate = float64(p.BytesDone-h.start) / dt
	}
	h.at, h.bytes = now, p.BytesDone
	return *h
}

// healState is a comparison's progress for people.
func healState(at pace, p replica.HealProgress) *api.HealState {
	h := &api.HealState{Phase: "compare", Bytes: p.BytesDone, Rate: at.rate, ETASeconds: -1}
	done, total := p.KeysDone+p.FilesDone, p.KeysTotal+p.FilesTotal
	switch {
	case p.BytesTotal > 0:
		h.Percent = 100 * float64(p.BytesDone) / float64(p.BytesTotal)
		if at.rate > 0 {
			h.ETASeconds = float64(p.BytesTotal-min(p.BytesDone, p.BytesTotal)) / at.rate
		}
	case total > 0:
		h.Percent = 100 * float64(done) / float64(total)
	}
	h.Percent = min(h.Percent, 100)
	return h
}

// retry has the volume's bricks that are not served tried again, on whichever machines they are. Of a machine that
// cannot be asked the status speaks.
func (m *member) retry(ctx context.Context, v *cluster.Volume) {
	_, fails := askPeers(ctx, m, v, func(ctx context.Context, peer cluster.PeerID) (*struct{}, error) {
		return at(ctx, m, peer,
			func() (*struct{}, error) { return nil, m.n.LocalRetry(ctx, v.Name) },
			func(c *api.Client) (*struct{}, error) { return nil, c.LocalRetry(ctx, v.Name) })
	})
	for peer, err := range fails {
		m.log.Info("a peer's bricks are not tried again", "volume", v.Name, "peer", peer, "error", err)
	}
}

// LocalRetry implements httpd.Local.
func (n *Node) LocalRetry(ctx context.Context, name string) error {
	m, v, err := n.started(ctx, name)
	if err == nil {
		m.bricks.retryAll(v)
	}
	return err
}

// retryAll has the volume's bricks on this machine that are not served tried again.
func (b *bricks) retryAll(v *cluster.Volume) {
	for _, br := range v.Bricks {
		if run := b.run(br.ID); run != nil && run.current() == nil {
			run.again()
		}
	}
}
