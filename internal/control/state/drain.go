package state

import (
	"fmt"
	"slices"
	"strings"

	"mortar/internal/cluster"
)

// drainPeer wants nothing to depend on a peer any more, or undoes that. It decides what
// shall be; the bricks themselves leave their in-sync sets in order (replica/core), so
// that nobody waits for them. Draining what is drained is no error.
func (s *State) drainPeer(c *DrainPeer, seen uint64) error {
	p, err := s.editPeer(c.Peer)
	if err != nil {
		return err
	}
	if err := s.seen(c.Peer, seen, "peer "+p.Name); err != nil {
		return err
	}
	if p.Drained == !c.Undo {
		return nil
	}
	p.Drained = !c.Undo
	if against := Needed(s.Map, p); p.Drained && len(against) > 0 {
		return Refusal(CodeNeeded, "Peer %s cannot be drained: %s", p.Name, strings.Join(against, "; "))
	}
	for _, v := range s.Map.Volumes {
		for i := range v.Sets {
			if err := s.renewDrained(v, i); err != nil {
				return err
			}
		}
	}
	s.touch(p.ID)
	return nil
}

// renewDrained carries what is drained into the configuration of a set.
func (s *State) renewDrained(v *cluster.Volume, i int) error {
	var drained []cluster.BrickID
	for _, id := range v.Sets[i].Members {
		if b := v.Brick(id); b != nil && onDrained(s.Map, b) {
			drained = append(drained, id)
		}
	}
	if slices.Equal(drained, v.Sets[i].Drained) {
		return nil
	}
	v, err := s.editVolume(v.ID)
	if err != nil {
		return err
	}
	set := &v.Sets[i]
	set.Drained = drained
	if set.Epoch > 0 {
		set.Epoch++ // an epoch is one configuration, for ever
	}
	return nil
}

func onDrained(m *cluster.Map, b *cluster.Brick) bool {
	p := m.Peer(b.Peer)
	return p != nil && p.Drained
}

// Needed says for which sets the bricks of a peer are needed in sync, and what to do
// about it: without those on drained peers, too few would be.
func Needed(m *cluster.Map, p *cluster.Peer) (against []string) {
	for _, v := range m.Volumes {
		for i := range v.Sets {
			set := &v.Sets[i]
			var mine *cluster.Brick
			stay := 0
			for _, id := range set.InSync {
				b := v.Brick(id)
				if b != nil && b.Peer == p.ID {
					mine = b
				} else if b == nil || !onDrained(m, b) {
					stay++
				}
			}
			if mine == nil || stay >= max(set.MinInSync, 1) {
				continue
			}
			text := fmt.Sprintf("volume %s: without %s, ", v.Name, mine)
			switch {
			case len(set.Members) == 1:
				text += "its only brick, nobody has the data"
			case len(set.InSync) < len(set.Members):
				text += fmt.Sprintf("%d of %d bricks would be in sync, and min-in-sync is %d; wait until the others have healed (\"mortar volume heal %s info\"), or bring them back", stay, len(set.Members), set.MinInSync, v.Name)
			default:
				text += fmt.Sprintf("%d of %d bricks would be in sync, and min-in-sync is %d; undrain another peer, or lower it (\"mortar volume set %s min-in-sync %d\")", stay, len(set.Members), set.MinInSync, v.Name, max(stay, 1))
			}
			against = append(against, text)
		}
	}
	return against
}
