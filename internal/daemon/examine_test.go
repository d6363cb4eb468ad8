package daemon

import (
	"strings"
	"testing"

	"mortar/internal/api"
)

// TestExamine: every peer tells whom it reaches and what its clock says; one that
// is gone is missed from every side.
func TestExamine(t *testing.T) {
	alone := newNode(t, "alone", nil)
	if x, err := alone.api.Examine(t.Context()); err != nil || x.Self != "" || len(x.Peers) != 0 {
		t.Errorf("in no pool: %+v, %v", x, err)
	}
	nodes := newPool(t, 3)
	look := func() map[string]api.PeerExamination {
		t.Helper()
		x, err := nodes[0].api.Examine(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if x.Self != "n1" || len(x.Peers) != 3 {
			t.Fatalf("found %+v", x)
		}
		all := map[string]api.PeerExamination{}
		for _, p := range x.Peers {
			all[p.Name] = p
		}
		return all
	}
	for name, p := range look() {
		// One clock, so it is off by no more than the question took.
		if p.Problem != "" || p.Protocol == 0 || max(p.Ahead, -p.Ahead) > p.Trip+1 {
			t.Errorf("%s: %+v", name, p)
		}
		reached := map[string]bool{}
		for _, r := range p.Reach {
			reached[r.Peer] = reached[r.Peer] || r.Problem == ""
		}
		if len(reached) != 2 || reached[name] {
			t.Errorf("%s has tried %v", name, p.Reach)
		}
		for peer, ok := range reached {
			if !ok {
				t.Errorf("%s does not reach %s: %v", name, peer, p.Reach)
			}
		}
	}

	nodes[2].halt()
	all := look()
	if all["n3"].Problem == "" {
		t.Errorf("the peer that is gone: %+v", all["n3"])
	}
	for _, name := range []string{"n1", "n2"} {
		for _, r := range all[name].Reach {
			if refused := strings.Contains(r.Problem, "nothing listens there"); refused != (r.Peer == "n3") {
				t.Errorf("%s to %s: %q", name, r.Peer, r.Problem)
			}
		}
	}
}
