package state

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"mortar/internal/cluster"
	"mortar/internal/proto"
)

// anyCommand draws a command that has a fair chance to be carried out.
func anyCommand(t *rapid.T, s *State) Command {
	pick := func(label string, n int) int { return rapid.IntRange(0, n-1).Draw(t, label) }
	var cmd Command
	if rapid.Bool().Draw(t, "with id") {
		cmd.ID = cluster.ID{15: byte(pick("id", 200))}
	}
	if pick("compare", 4) == 0 {
		cmd.Seen = uint64(pick("seen", int(s.Map.Version)+2))
	}
	peerName := func() string { return fmt.Sprintf("n%d", 1+pick("peer", 6)) }
	peer := func() cluster.Peer {
		n := peerName()
		return cluster.Peer{ID: peerID(n), Name: n, Addrs: []string{n + ":1"}, Witness: pick("witness", 5) == 0}
	}
	volume := func() string { return string(rune('a' + pick("volume", 4))) }
	token := func() string { return tokenHash(string(rune('a' + pick("token", 4)))) }
	now := func() int64 { return int64(pick("now", 100)) }
	switch pick("kind", 20) {
	case 0:
		cmd.Init = &Init{Pool: cluster.ID{0: 1}, Peer: peer()}
	case 1, 2:
		cmd.AddPeer = &AddPeer{Peer: peer()}
		if rapid.Bool().Draw(t, "with token") {
			cmd.AddPeer.Token, cmd.AddPeer.Now = token(), now()
		}
	case 3:
		n, w := peerName(), rapid.Bool().Draw(t, "witness")
		cmd.UpdatePeer = &UpdatePeer{Peer: peerID(peerName()), Name: &n, Witness: &w}
	case 4:
		cmd.RemovePeer = &RemovePeer{Peer: peerID(peerName())}
	case 5:
		cmd.Incarnate = &Incarnate{Peer: peerID(peerName()), Past: uint64(pick("past", 3))}
	case 6, 7:
		name := volume()
		c := &CreateVolume{ID: volumeID(name), Name: name, Replica: 1 + pick("replica", 4), Force: rapid.Bool().Draw(t, "force")}
		for i := range c.Replica {
			host := peerName()
			c.Bricks = append(c.Bricks, cluster.Brick{ID: brickID(name, i+1), Peer: peerID(host), Host: host, Path: "/" + []string{"x", "x/y", "z", name}[pick("path", 4)]})
		}
		cmd.CreateVolume = c
	case 8:
		cmd.StartVolume = &StartVolume{Volume: volumeID(volume()), Force: rapid.Bool().Draw(t, "force")}
	case 9:
		cmd.StopVolume = &StopVolume{Volume: volumeID(volume())}
	case 10:
		cmd.DeleteVolume = &DeleteVolume{Volume: volumeID(volume())}
	case 11:
		cmd.SetOptions = &SetOptions{Volume: volumeID(volume()), Options: map[string]string{
			[]string{"min-in-sync", "cache-timeout", "nonsense"}[pick("option", 3)]: []string{"1", "2", "9", "auto"}[pick("value", 4)]}}
	case 12:
		cmd.ResetOptions = &ResetOptions{Volume: volumeID(volume())}
	case 13, 14:
		name := volume()
		c := cluster.SetConfig{Set: cluster.SetID{Volume: volumeID(name)}, Epoch: 1}
		if v := s.Map.Volume(name); v != nil {
			c = v.Sets[0].Clone()
			c.Epoch += cluster.Epoch(1 + pick("epoch", 5)/4)
			some := func(label string) (out []cluster.BrickID) {
				for _, b := range c.Members {
					if rapid.Bool().Draw(t, label) {
						out = append(out, b)
					}
				}
				return out
			}
			if rapid.Bool().Draw(t, "other in-sync") {
				c.InSync = some("in-sync")
			}
			if rapid.Bool().Draw(t, "other primary") {
				c.Primary = cluster.BrickID{}
				if len(c.Members) > 0 && pick("none", 4) > 0 {
					c.Primary = c.Members[pick("primary", len(c.Members))]
				}
			}
			c.Floor.Seq += uint64(pick("floor", 3))
			c.Floor.Seq -= uint64(min(pick("back", 2), int(c.Floor.Seq)))
		}
		cmd.SetConfig = &SetConfig{Config: c, Force: pick("force", 6) == 0}
	case 15:
		cmd.AddToken = &AddToken{Token: Token{Hash: token(), Role: "peer", Expires: int64(pick("expires", 100)), Uses: 1 + pick("uses", 2)}, Now: now()}
	case 16:
		if rapid.Bool().Draw(t, "use") {
			cmd.UseToken = &UseToken{Hash: token(), Role: "peer", Now: now()}
		} else {
			cmd.DropToken = &DropToken{Hash: token()}
		}
	case 17, 18:
		name := []string{"demo", "app", "a"}[pick("docker volume", 3)]
		d := cluster.DockerVolume{ID: cluster.ID{15: byte(1 + pick("docker id", 2))}, Name: name, Volume: volumeID(volume()),
			Dir: []string{name, "x", "x/y", ""}[pick("dir", 4)], Own: rapid.Bool().Draw(t, "own")}
		if have := s.Map.DockerVolume(name); have != nil && pick("other", 4) > 0 {
			d = *have
		}
		d.State = []cluster.DockerState{cluster.DockerMaking, cluster.DockerReady, cluster.DockerRemoving, "nonsense"}[pick("docker state", 4)]
		cmd.PutDocker = &PutDocker{Volume: d}
	case 19:
		cmd.DropDocker = &DropDocker{Name: []string{"demo", "app"}[pick("docker volume", 2)], ID: cluster.ID{15: byte(1 + pick("docker id", 2))}}
	}
	return cmd
}

// checkState holds what must be true of every state.
func checkState(t *rapid.T, s *State) {
	m := s.Map
	bricks, names, paths := map[cluster.BrickID]bool{}, map[string]bool{}, map[string]bool{}
	for i, p := range m.Peers {
		for _, q := range m.Peers[:i] {
			if p.ID == q.ID || p.Name == q.Name {
				t.Fatalf("two peers %s", p.Name)
			}
		}
	}
	for _, v := range m.Volumes {
		if names[v.Name] {
			t.Fatalf("two volumes %s", v.Name)
		}
		names[v.Name] = true
		if len(v.Bricks) != v.Replica*len(v.Sets) {
			t.Fatalf("volume %s has %d bricks", v.Name, len(v.Bricks))
		}
		for _, b := range v.Bricks {
			where := b.Peer.String() + b.Path
			if bricks[b.ID] || paths[where] {
				t.Fatalf("brick %v is used twice", b)
			}
			bricks[b.ID], paths[where] = true, true
			if p := m.Peer(b.Peer); p == nil || p.Witness {
				t.Fatalf("brick %v is on no peer, or on a witness", b)
			}
		}
		for i := range v.Sets {
			c := &v.Sets[i]
			if len(c.Members) != v.Replica || c.MinInSync < 1 || c.MinInSync > v.Replica {
				t.Fatalf("volume %s: %s", v.Name, describe(c))
			}
			if !subset(c.InSync, c.Members) || (c.Epoch > 0) != (len(c.InSync) > 0) {
				t.Fatalf("volume %s: in-sync set: %s", v.Name, describe(c))
			}
			if !c.Primary.IsZero() && (!c.IsInSync(c.Primary) || v.Status != cluster.VolumeStarted) {
				t.Fatalf("volume %s (%s): primary: %s", v.Name, v.Status, describe(c))
			}
			if (c.Epoch == 0) != (v.Status == cluster.VolumeCreated) {
				t.Fatalf("volume %s (%s): %s", v.Name, v.Status, describe(c))
			}
		}
	}
	for i, d := range m.Docker {
		if m.VolumeByID(d.Volume) == nil {
			t.Fatalf("Docker volume %s is in no volume", d.Name)
		}
		if m.DockerVolume(d.Name) != d {
			t.Fatalf("Docker volume %s is not found", d.Name)
		}
		for _, o := range m.Docker[:i] {
			if o.Volume == d.Volume && o.Dir == d.Dir && (o.Own || d.Own) {
				t.Fatalf("Docker volumes %s and %s own one directory", o.Name, d.Name)
			}
		}
	}
	if !slices.IsSortedFunc(s.Tokens, func(a, b Token) int { return bytes.Compare([]byte(a.Hash), []byte(b.Hash)) }) {
		t.Fatalf("tokens are not sorted")
	}
}

// TestApplyProperties: any commands in any order leave a state that is sound, the
// same on every peer, the same after a snapshot, and untouched by refusals; maps
// that were handed out stay as they were.
func TestApplyProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		one, two := New(), New()
		if err := one.Apply(Command{Init: &Init{Pool: cluster.ID{0: 1}, Peer: cluster.Peer{ID: peerID("n1"), Name: "n1"}}}); err != nil {
			t.Fatal(err)
		}
		two, err := Decode(one.Encode())
		if err != nil {
			t.Fatal(err)
		}
		for range rapid.IntRange(1, 40).Draw(t, "commands") {
			cmd := anyCommand(t, one)
			raw, err := cmd.Encode()
			if err != nil {
				t.Fatal(err)
			}
			sent, err := DecodeCommand(raw)
			if err != nil {
				t.Fatal(err)
			}
			handedOut, before := one.Map, one.Encode()
			mapBefore, _ := json.Marshal(handedOut)
			seenBefore := slices.Contains(one.Recent, cmd.ID)

			err1, err2 := one.Apply(cmd), two.Apply(sent)
			if fmt.Sprint(err1) != fmt.Sprint(err2) {
				t.Fatalf("one peer says %v, the other %v", err1, err2)
			}
			if !bytes.Equal(one.Encode(), two.Encode()) {
				t.Fatalf("two peers differ after %s:\n%s\n%s", raw, one.Encode(), two.Encode())
			}
			if err1 != nil && !bytes.Equal(before, one.Encode()) {
				t.Fatalf("refused (%v) and changed", err1)
			}
			if mapAfter, _ := json.Marshal(handedOut); !bytes.Equal(mapBefore, mapAfter) {
				t.Fatalf("a map that was handed out was changed by %s", raw)
			}
			switch {
			case err1 != nil || seenBefore:
			case one.Map != handedOut && one.Map.Version != handedOut.Version+1:
				t.Fatalf("version %d follows %d", one.Map.Version, handedOut.Version)
			}
			checkEpochs(t, handedOut, one.Map, cmd)
			checkState(t, one)
			if rapid.IntRange(0, 9).Draw(t, "restart") == 0 {
				if two, err = Decode(two.Encode()); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

// checkEpochs holds what must be true of two successive configurations of a set.
func checkEpochs(t *rapid.T, before, after *cluster.Map, cmd Command) {
	for _, v := range after.Volumes {
		old := before.VolumeByID(v.ID)
		if old == nil {
			continue
		}
		a, b := &old.Sets[0], &v.Sets[0]
		if a.Epoch == b.Epoch {
			x, _ := json.Marshal(a)
			y, _ := json.Marshal(b)
			if a.Epoch > 0 && !bytes.Equal(x, y) {
				t.Fatalf("epoch %d has two configurations:\n%s\n%s", a.Epoch, describe(a), describe(b))
			}
			continue
		}
		if b.Epoch != a.Epoch+1 {
			t.Fatalf("epoch %d follows %d", b.Epoch, a.Epoch)
		}
		force := cmd.SetConfig != nil && cmd.SetConfig.Force
		if force || a.Epoch == 0 {
			continue
		}
		if !b.Primary.IsZero() && !a.IsInSync(b.Primary) {
			t.Fatalf("a brick that was not in sync became primary:\n%s\n%s", describe(a), describe(b))
		}
		if b.Primary != a.Primary && !subset(b.InSync, a.InSync) {
			t.Fatalf("a new primary came with new bricks:\n%s\n%s", describe(a), describe(b))
		}
		if b.Floor.Compare(a.Floor) < 0 {
			t.Fatalf("the floor went back:\n%s\n%s", describe(a), describe(b))
		}
	}
}

// TestFailoverProperties: whatever bricks answer, a decision never breaks an
// invariant, never loses what a trusted brick has kept, and comes as soon as
// anything safe is possible.
func TestFailoverProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 5).Draw(t, "members")
		f := Failover{Config: cluster.SetConfig{Epoch: 5, MinInSync: 1}, Elapsed: time.Duration(rapid.IntRange(0, 4000).Draw(t, "ms")) * time.Millisecond}
		for i := range n {
			f.Config.Members = append(f.Config.Members, brickID("v", i+1))
		}
		for i, b := range f.Config.Members {
			if i == 0 || rapid.Bool().Draw(t, "in sync") {
				f.Config.InSync = append(f.Config.InSync, b)
			}
		}
		if rapid.Bool().Draw(t, "has primary") {
			f.Config.Primary = rapid.SampledFrom(f.Config.InSync).Draw(t, "primary")
		}
		f.Config.Floor = cluster.Pos{Epoch: 4, Seq: uint64(rapid.IntRange(0, 10).Draw(t, "floor"))}
		if rapid.IntRange(0, 3).Draw(t, "planned") == 0 {
			f.Leaving = rapid.SampledFrom(f.Config.Members).Draw(t, "leaving")
		}
		f.Insisted = rapid.Bool().Draw(t, "insisted")
		for _, b := range f.Config.Members {
			f.Results = append(f.Results, SealResult{Brick: b, Answered: rapid.Bool().Draw(t, "answered"), Reply: proto.SealReply{
				Sealed: rapid.IntRange(0, 4).Draw(t, "sealed") > 0, Trusted: rapid.Bool().Draw(t, "trusted"), Text: "no",
				Tail: cluster.Pos{Epoch: cluster.Epoch(rapid.IntRange(3, 5).Draw(t, "epoch")), Seq: uint64(rapid.IntRange(0, 20).Draw(t, "seq"))}}})
		}
		v := f.Decide()
		kept := func(r SealResult) bool { return r.Reply.Trusted && r.Reply.Tail.Compare(f.Config.Floor) >= 0 }
		trusted, refused := 0, false
		for _, r := range f.Results {
			if !r.Answered || !f.Config.IsInSync(r.Brick) {
				continue
			}
			refused = refused || !r.Reply.Sealed
			if r.Reply.Sealed && kept(r) && r.Brick != f.Leaving {
				trusted++
			}
		}
		if v.Next == nil {
			if v.Reason == "" {
				t.Fatal("no decision and no reason")
			}
			if trusted > 0 && (!refused || f.Insisted) {
				t.Fatalf("%d bricks could lead and none does: %s", trusted, v.Reason)
			}
			return
		}
		if err := checkConfig(&f.Config, v.Next, false); err != nil {
			t.Fatal(err)
		}
		lead := f.result(v.Next.Primary)
		switch {
		case !lead.Answered || !lead.Reply.Sealed:
			t.Fatal("a brick leads that was not sealed")
		case lead.Brick == f.Leaving || v.Next.IsInSync(f.Leaving) && !f.Leaving.IsZero():
			t.Fatal("a brick that leaves is counted on")
		case trusted > 0 && len(v.Next.InSync) != trusted:
			t.Fatalf("%d bricks are known to have everything and %d are in sync", trusted, len(v.Next.InSync))
		case trusted == 0 && len(v.Next.InSync) != 1:
			t.Fatal("bricks that may differ are in sync")
		case lead.Reply.Tail.Compare(f.Config.Floor) < 0:
			t.Fatal("a brick leads that lacks what was durable")
		}
		for _, b := range v.Next.InSync {
			r := f.result(b)
			if !r.Reply.Sealed || trusted > 0 && !kept(r) || r.Reply.Tail.Compare(lead.Reply.Tail) > 0 {
				t.Fatalf("brick %v should not be in sync", b)
			}
		}
		if refused && !f.Insisted {
			t.Fatal("decided against a brick that keeps its primary")
		}
	})
}

// TestVoterProperties: from any group that can decide, with any of its members
// down, the steps end, each can be committed, and when nothing is down the
// number of voters is right.
func TestVoterProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 9).Draw(t, "machines")
		g := groupModel{m: &cluster.Map{}}
		quiet := rapid.Bool().Draw(t, "nothing down")
		voters, alive := 0, 0
		for i := range n {
			id := cluster.ID{15: byte(i + 1)}
			if i == 0 {
				g.leader = id
			}
			if i == 0 || rapid.IntRange(0, 4).Draw(t, "in group") > 0 {
				s := Server{Peer: id, Voter: i == 0 || rapid.Bool().Draw(t, "votes")}
				g.servers = append(g.servers, s)
				up := true
				if i > 0 && !quiet && rapid.IntRange(0, 2).Draw(t, "down") == 0 {
					up = false
					if rapid.Bool().Draw(t, "for long") {
						g.lost = append(g.lost, id)
					} else {
						g.down = append(g.down, id)
					}
				}
				if s.Voter {
					voters++
					if up {
						alive++
					}
				}
			}
			if i == n-1 && len(g.m.Peers) == 0 || rapid.IntRange(0, 4).Draw(t, "in map") > 0 {
				voter := slices.Contains(g.servers, Server{Peer: id, Voter: true})
				g.m.Peers = append(g.m.Peers, &cluster.Peer{ID: id, NoVote: len(g.m.Peers) > 0 && !voter && rapid.IntRange(0, 3).Draw(t, "client") == 0})
			}
			if !quiet && rapid.IntRange(0, 4).Draw(t, "late") == 0 {
				g.late = append(g.late, id)
			}
		}
		if alive < voters/2+1 {
			return // no leader could be there to take steps
		}
		for i := 0; ; i++ {
			step, err := g.step()
			if err != nil {
				t.Fatalf("%v: %v", step.Kind, err)
			}
			if step.Kind == StepNone {
				break
			}
			if i > 5*n {
				t.Fatalf("no end: still %v %v", step.Kind, step.Peer)
			}
		}
		if !quiet {
			return
		}
		voters, could := 0, 0
		for _, s := range g.servers {
			p := g.m.Peer(s.Peer)
			if p == nil {
				t.Fatalf("%v is still in the group", s.Peer)
			}
			if !p.NoVote {
				could++
			}
			if s.Voter {
				voters++
			}
			if s.Voter && p.NoVote {
				t.Fatalf("%v is a client and votes", s.Peer)
			}
		}
		if len(g.servers) != len(g.m.Peers) || voters != Voters(could) {
			t.Fatalf("%d voters of %d peers that may", voters, could)
		}
	})
}

// FuzzDecodeCommand: whatever arrives is refused or applied, and nothing panics.
func FuzzDecodeCommand(f *testing.F) {
	f.Add([]byte(`{"init":{"pool":"00000000-0000-0000-0000-000000000001","peer":{"id":"00000000-0000-0000-0000-000000000002","name":"a","addrs":null}}}`))
	f.Add([]byte(`{"create_volume":{"id":"00000000-0000-0000-0000-000000000001","name":"v","replica":1,"bricks":[{"id":"00000000-0000-0000-0000-000000000009","peer":"00000000-0000-0000-0000-000000000002","host":"a","path":"/b"}]}}`))
	f.Add([]byte(`{"start_volume":{"volume":"00000000-0000-0000-0000-000000000001","primary":[null]}}`))
	f.Add([]byte(`{"set_config":{"config":{"set":{"Volume":"00000000-0000-0000-0000-000000000001"},"epoch":2}}}`))
	f.Add([]byte(`{"add_peer":{}}`))
	f.Add([]byte(`{"set_options":{"volume":"00000000-0000-0000-0000-000000000001","options":{"storage.reserve":"-1%"}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		cmd, err := DecodeCommand(b)
		if err != nil {
			return
		}
		s := New()
		for _, c := range []Command{
			{Init: &Init{Pool: cluster.ID{15: 1}, Peer: cluster.Peer{ID: cluster.ID{15: 2}, Name: "a"}}},
			{CreateVolume: &CreateVolume{ID: cluster.ID{15: 1}, Name: "w", Replica: 1, Bricks: []cluster.Brick{{ID: cluster.ID{15: 3}, Peer: cluster.ID{15: 2}, Host: "a", Path: "/w"}}}},
			{StartVolume: &StartVolume{Volume: cluster.ID{15: 1}}},
		} {
			if err := s.Apply(c); err != nil {
				t.Fatal(err)
			}
		}
		_ = s.Apply(cmd)
		if _, err := Decode(s.Encode()); err != nil {
			t.Fatalf("%s leaves a state that cannot be read: %v", b, err)
		}
	})
}

// FuzzDecode: a damaged snapshot is refused, or is a state that works.
func FuzzDecode(f *testing.F) {
	s := New()
	_ = s.Apply(Command{Init: &Init{Pool: cluster.ID{15: 1}, Peer: cluster.Peer{ID: cluster.ID{15: 2}, Name: "a"}}})
	f.Add(s.Encode())
	f.Add([]byte(`{"format":1,"map":{"peers":[null]}}`))
	f.Add([]byte(`{"format":2}`))
	f.Add(bytes.Replace(s.Encode(), []byte(`"volumes":null`), []byte(`"volumes":[{"name":"v","replica":1,"sets":[{}],"bricks":[{}]}]`), 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Decode(b)
		if err != nil {
			return
		}
		_ = s.Apply(Command{AddPeer: &AddPeer{Peer: cluster.Peer{ID: cluster.ID{15: 9}, Name: "b"}}})
		_ = s.Apply(Command{RemovePeer: &RemovePeer{Peer: cluster.ID{15: 2}}})
		for _, v := range s.Map.Volumes {
			_ = s.Apply(Command{StartVolume: &StartVolume{Volume: v.ID}})
			_ = s.Apply(Command{StopVolume: &StopVolume{Volume: v.ID}})
		}
		s.Recover(1, cluster.ID{15: 2})
	})
}
