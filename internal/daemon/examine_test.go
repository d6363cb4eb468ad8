package daemon

import (
	"fmt"
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
	look := func() (map[string]api.PeerExamination, error) {
		x, err := nodes[0].api.Examine(t.Context())
		if err != nil {
			return nil, err
		}
		if x.Self != "n1" || len(x.Peers) != 3 {
			return nil, fmt.Errorf("found %+v", x)
		}
		all := map[string]api.PeerExamination{}
		for _, p := range x.Peers {
			all[p.Name] = p
		}
		return all, nil
	}
	// Whoever is asked has a bound of its own, which a slow machine may miss now and then.
	eventually(t, "all reach all", func() error {
		all, err := look()
		if err != nil {
			return err
		}
		for name, p := range all {
			// One clock, so it is off by no more than the question took.
			if p.Problem != "" || p.Protocol == 0 || max(p.Ahead, -p.Ahead) > p.Trip+1 {
				return fmt.Errorf("%s: %+v", name, p)
			}
			reached := map[string]bool{}
			for _, r := range p.Reach {
				reached[r.Peer] = reached[r.Peer] || r.Problem == ""
			}
			if len(reached) != 2 || reached[name] {
				return fmt.Errorf("%s has tried %v", name, p.Reach)
			}
			for peer, ok := range reached {
				if !ok {
					return fmt.Errorf("%s does not reach %s: %v", name, peer, p.Reach)
				}
			}
		}
		return nil
	})

	nodes[2].halt()
	eventually(t, "the one that is gone is missed from every side", func() error {
		all, err := look()
		if err != nil {
			return err
		}
		if all["n3"].Problem == "" {
			return fmt.Errorf("%+v", all["n3"])
		}
		for _, name := range []string{"n1", "n2"} {
			for _, r := range all[name].Reach {
				if refused := strings.Contains(r.Problem, "nothing listens there"); refused != (r.Peer == "n3") {
					return fmt.Errorf("%s to %s: %q", name, r.Peer, r.Problem)
				}
			}
		}
		return nil
	})
}
