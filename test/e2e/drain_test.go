package e2e

import (
	"fmt"
	"syscall"
	"testing"
	"time"
)

// A machine is drained, restarted and taken back while applications on it and elsewhere
// work: it costs them next to nothing, and what stands against it is said.
func TestDrain(t *testing.T) {
	p := start(t, setup{})
	inSync := func(i int, want bool) {
		t.Helper()
		p.within(30*time.Second, fmt.Sprintf("in sync on n%d: %v", i, want), func() error {
			var all []struct {
				Bricks []struct {
					Name, Role, Problem string
					InSync              bool `json:"in_sync"`
					Drained, Online     bool
				}
			}
			p.json(&all, p.other(i), "volume", "status", "wp", "--json")
			b := all[0].Bricks[i-1]
			if b.InSync != want || b.Drained == want || !b.Online || !want && b.Role != "out" {
				return fmt.Errorf("%+v", b)
			}
			return nil
		})
	}
	const planned = time.Second // what a busy machine is allowed; bench/stall says what it is
	i := p.primary(1)
	k := p.other(i)
	home := p.startLoadOn(i, "home", planned)
	away := p.startLoadOn(k, "away", planned)
	p.mortar(k, "peer", "drain", p.Host(i).Name)
	p.mortar(k, "peer", "drain", p.Host(i).Name)
	inSync(i, false)
	if at := p.primary(k); at == i {
		t.Errorf("n%d is drained and leads", i)
	}
	p.refuse(k, []string{"peer", "drain", p.Host(k).Name}, "volume wp", "1 of 3 bricks would be in sync", "min-in-sync is 2")
	var peers []struct {
		Name    string
		Drained bool
		Holds   []string
	}
	p.json(&peers, k, "peer", "status", "--json")
	for _, peer := range peers {
		if peer.Drained != (peer.Name == p.Host(i).Name) || len(peer.Holds) > 0 {
			t.Errorf("peer status: %+v", peer)
		}
	}
	home.goesOn(10 * time.Second)
	// It stays so, whatever is restarted.
	p.daemons[i-1].Signal(syscall.SIGTERM)
	if err := p.daemons[i-1].Wait(p.ctx(10 * time.Second)); err != nil {
		t.Error(err)
	}
	home.goesOn(10 * time.Second)
	away.goesOn(10 * time.Second)
	p.startDaemon(i)
	p.waitDaemon(i)
	inSync(i, false)
	p.mortar(i, "peer", "undrain", p.Host(i).Name)
	inSync(i, true)
	home.goesOn(10 * time.Second)
	away.goesOn(10 * time.Second)
	for _, l := range []*load{home, away} {
		l.end()
		l.check(1, 2, 3)
	}
}
