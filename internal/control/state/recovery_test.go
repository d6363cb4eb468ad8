package state

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"

	"mortar/internal/cluster"
)

// The scripts in testdata/recovery describe one set, and how its bricks stand:
//
//	plan members=(1,2,3) in-sync=(1,2) primary=1 [epoch=…] [floor=…] [chosen=N] [doubted]
//	1 silent
//	2 stands 3.7 [leads] [incomplete]
func TestRecoveryScripts(t *testing.T) {
	datadriven.Walk(t, "testdata/recovery", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			list := func(key string) (ids []cluster.BrickID) {
				for _, a := range d.CmdArgs {
					for _, v := range a.Vals {
						if a.Key == key {
							ids = append(ids, brickID("v", int(num(v))))
						}
					}
				}
				return ids
			}
			one := func(key string) (id cluster.BrickID) {
				if ids := list(key); len(ids) > 0 && ids[0] != brickID("v", 0) {
					return ids[0]
				}
				return id
			}
			r := Recovery{Config: cluster.SetConfig{Epoch: 3, MinInSync: 2, Members: list("members"), InSync: list("in-sync"), Primary: one("primary")}, Chosen: one("chosen")}
			r.Config.Doubted = d.HasArg("doubted")
			var s string
			if d.MaybeScanArgs(t, "epoch", &s) {
				r.Config.Epoch = cluster.Epoch(num(s))
			}
			if d.MaybeScanArgs(t, "floor", &s) {
				r.Config.Floor = parsePos(s)
			}
			for line := range strings.SplitSeq(strings.TrimSpace(d.Input), "\n") {
				w := strings.Fields(line)
				if len(w) < 3 || w[1] != "stands" {
					continue
				}
				r.Bricks = append(r.Bricks, Standing{
					Brick: brickID("v", int(num(w[0]))), Answers: true, Tail: parsePos(w[2]),
					Leads: slices.Contains(w, "leads"), Whole: !slices.Contains(w, "incomplete"),
				})
			}
			name := func(text string) string {
				for i := range 9 {
					text = strings.ReplaceAll(text, brickID("v", i).String(), fmt.Sprint(i))
				}
				return text
			}
			p, refusal := r.Decide()
			if refusal != nil {
				return "refused: " + name(refusal.Text) + "\n"
			}
			if err := checkConfig(&r.Config, &p.Next, true); err != nil {
				t.Fatalf("the plan would be refused: %v", err)
			}
			if err := checkConfig(&r.Config, &p.Next, false); err == nil && !r.Config.Doubted {
				t.Fatal("the plan needs nobody's decision")
			}
			out := describe(&p.Next) + "\n"
			if p.Missing > 0 {
				out += fmt.Sprintf("missing at least %d\n", p.Missing)
			}
			for _, l := range p.Lost {
				out += "lost: " + name(l.String()) + "\n"
			}
			return out
		})
	})
}

func TestPoolRecovery(t *testing.T) {
	id := func(n byte) cluster.PeerID { return cluster.ID{15: n} }
	m := &cluster.Map{}
	for i := range byte(5) {
		m.Peers = append(m.Peers, &cluster.Peer{ID: id(i + 1), Name: fmt.Sprintf("n%d", i+1)})
	}
	three := []cluster.PeerID{id(1), id(2), id(3)}
	for _, c := range []struct {
		name   string
		r      PoolRecovery
		silent []cluster.PeerID
		want   string // part of the refusal
	}{
		{"two of three voters are lost", PoolRecovery{Self: id(3), Voters: three, Applied: 9, Heard: []PeerCopy{{Peer: id(4), Applied: 9}}}, []cluster.PeerID{id(1), id(2)}, ""},
		{"all voters are lost", PoolRecovery{Self: id(4), Voters: three, Applied: 9}, three, ""},
		{"the first of two is lost", PoolRecovery{Self: id(2), Voters: three[:1], Applied: 9}, three[:1], ""},
		{"a leader", PoolRecovery{Self: id(3), Voters: three, Leader: id(2)}, nil, "n2 leads it"},
		{"enough voters", PoolRecovery{Self: id(3), Voters: three, Heard: []PeerCopy{{Peer: id(2)}}}, nil, "2 of the 3 voting peers answer"},
		{"another knows more", PoolRecovery{Self: id(3), Voters: three, Applied: 9, Heard: []PeerCopy{{Peer: id(4), Applied: 10}}}, nil, "n4 answers and knows more"},
		{"recovered elsewhere", PoolRecovery{Self: id(3), Voters: three, Applied: 9, Heard: []PeerCopy{{Peer: id(4), Generation: 1}}}, nil, "recovered already"},
		{"no pool", PoolRecovery{Self: id(9)}, nil, "not in a pool"},
	} {
		c.r.Map = m
		silent, err := c.r.Decide()
		if !slices.Equal(silent, c.silent) && err == nil || (err != nil) != (c.want != "") || err != nil && !strings.Contains(err.Text, c.want) {
			t.Errorf("%s: %v, %v", c.name, silent, err)
		}
	}
}

// What is remembered of recoveries is bounded.
func TestRecoveriesAreBounded(t *testing.T) {
	s := New()
	must := func(cmd Command) {
		t.Helper()
		if err := s.Apply(cmd); err != nil {
			t.Fatal(err)
		}
	}
	peer := cluster.Peer{ID: peerID("n1"), Name: "n1"}
	must(Command{Init: &Init{Pool: cluster.ID{0: 1}, Peer: peer}})
	must(Command{CreateVolume: &CreateVolume{ID: volumeID("v"), Name: "v", Replica: 1, Bricks: []cluster.Brick{{ID: brickID("v", 1), Peer: peer.ID, Host: "n1", Path: "/b"}}}})
	must(Command{StartVolume: &StartVolume{Volume: volumeID("v")}})
	for i := range maxRecoveries + 3 {
		next := s.Map.Volumes[0].Sets[0].Clone()
		next.Epoch++
		next.Primary, next.Doubted = brickID("v", 1), false
		must(Command{SetConfig: &SetConfig{Config: next, Force: true, At: int64(i), By: peer.ID}})
		s.Recover(int64(i), peer.ID)
	}
	v := s.Map.Volumes[0]
	if n := len(v.Recoveries); n != maxRecoveries || v.Recoveries[0].At != 3 || v.Recoveries[n-1].At != maxRecoveries+2 {
		t.Errorf("%d recoveries of the volume: %+v", n, v.Recoveries)
	}
	if n := len(s.Map.Recoveries); n != maxRecoveries || s.Map.Recoveries[n-1].Generation != maxRecoveries+3 {
		t.Errorf("%d recoveries of the pool: %+v", n, s.Map.Recoveries)
	}
	if !v.Sets[0].Doubted {
		t.Error("what a recovered pool takes for in sync is not doubted")
	}
	if _, err := Decode(s.Encode()); err != nil {
		t.Error(err)
	}
}
