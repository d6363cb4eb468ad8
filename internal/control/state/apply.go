package state

import (
	"fmt"
	"maps"
	"net"
	"path"
	"slices"
	"strconv"
	"strings"

	"mortar/internal/cluster"
)

// Bounds of what a pool can hold: far above what it is made for, and low enough
// that nobody fills the memory of every peer by asking.
const (
	MaxPeers     = 1000
	MaxVolumes   = 10000
	MaxTokens    = 10000
	maxAddrs     = 16
	maxHost      = 255
	maxPath      = 4096
	maxAuthority = 64 << 10
)

// Apply carries out one command. A refusal is an *Error and changes nothing.
func (s *State) Apply(cmd Command) error {
	if !cmd.ID.IsZero() && slices.Contains(s.Recent, cmd.ID) {
		return nil
	}
	next := s.Clone()
	m := *s.Map // shallow: whoever changes a peer or volume replaces it
	m.Peers, m.Volumes = slices.Clone(m.Peers), slices.Clone(m.Volumes)
	next.Map = &m
	mapChanged, err := next.dispatch(cmd)
	if err != nil {
		return err
	}
	if mapChanged {
		m.Version++
	} else {
		next.Map = s.Map
	}
	if !cmd.ID.IsZero() {
		if len(next.Recent) >= recentLimit {
			next.Recent = slices.Delete(next.Recent, 0, len(next.Recent)-recentLimit+1)
		}
		next.Recent = append(next.Recent, cmd.ID)
	}
	*s = *next
	return nil
}

// dispatch changes s, which is a copy that is thrown away after an error. It
// tells whether the Map was changed.
func (s *State) dispatch(cmd Command) (mapChanged bool, err error) {
	if n := cmd.count(); n != 1 {
		return false, Refusal(CodeBadCommand, "a request must ask for one thing and this one asks for %d", n)
	}
	if cmd.Init != nil {
		return true, s.init(cmd.Init)
	}
	if s.Map.Pool.IsZero() {
		return false, Refusal(CodeNoPool, "this machine belongs to no pool yet: start it as the first of a new one, or let it join one with \"mortar join\"")
	}
	switch {
	case cmd.AddPeer != nil:
		return true, s.addPeer(cmd.AddPeer)
	case cmd.UpdatePeer != nil:
		return true, s.updatePeer(cmd.UpdatePeer, cmd.Seen)
	case cmd.RemovePeer != nil:
		return true, s.removePeer(cmd.RemovePeer, cmd.Seen)
	case cmd.DrainPeer != nil:
		return true, s.drainPeer(cmd.DrainPeer, cmd.Seen)
	case cmd.Incarnate != nil:
		return true, s.incarnate(cmd.Incarnate)
	case cmd.CreateVolume != nil:
		return true, s.createVolume(cmd.CreateVolume)
	case cmd.StartVolume != nil:
		return true, s.startVolume(cmd.StartVolume, cmd.Seen)
	case cmd.StopVolume != nil:
		return true, s.stopVolume(cmd.StopVolume, cmd.Seen)
	case cmd.DeleteVolume != nil:
		return true, s.deleteVolume(cmd.DeleteVolume, cmd.Seen)
	case cmd.SetOptions != nil:
		return true, s.setOptions(cmd.SetOptions, cmd.Seen)
	case cmd.ResetOptions != nil:
		return true, s.resetOptions(cmd.ResetOptions, cmd.Seen)
	case cmd.SetConfig != nil:
		return true, s.setConfig(cmd.SetConfig)
	case cmd.AddToken != nil:
		return false, s.addToken(cmd.AddToken)
	case cmd.UseToken != nil:
		_, err := s.useToken(cmd.UseToken.Hash, cmd.UseToken.Role, cmd.UseToken.Now)
		return false, err
	case cmd.DropToken != nil:
		return false, s.dropToken(cmd.DropToken)
	case cmd.PutDocker != nil:
		return true, s.putDocker(&cmd.PutDocker.Volume)
	case cmd.DropDocker != nil:
		return true, s.dropDocker(cmd.DropDocker)
	default:
		return false, s.setAuthority(cmd.SetAuthority)
	}
}

// count returns how many of the pointers are set.
func (c *Command) count() int {
	n := 0
	for _, set := range []bool{c.Init != nil, c.AddPeer != nil, c.UpdatePeer != nil, c.RemovePeer != nil, c.DrainPeer != nil, c.Incarnate != nil,
		c.CreateVolume != nil, c.StartVolume != nil, c.StopVolume != nil, c.DeleteVolume != nil, c.SetOptions != nil,
		c.ResetOptions != nil, c.SetConfig != nil, c.AddToken != nil, c.UseToken != nil, c.DropToken != nil, c.SetAuthority != nil,
		c.PutDocker != nil, c.DropDocker != nil} {
		if set {
			n++
		}
	}
	return n
}

// seen refuses a command whose proposer had not seen the last change of the thing.
func (s *State) seen(id cluster.ID, seen uint64, what string) error {
	if seen != 0 && s.Changed[id] > seen {
		return Refusal(CodeConflict, "%s was changed by somebody else meanwhile: look at it again and repeat the command if it is still wanted", what)
	}
	return nil
}

// touch notes an administrator's change, which the next Map version will carry.
func (s *State) touch(id cluster.ID) { s.Changed[id] = s.Map.Version + 1 }

// --- peers ---

func (s *State) init(c *Init) error {
	if !s.Map.Pool.IsZero() {
		return Refusal(CodePoolExists, "this machine belongs to pool %v already", s.Map.Pool)
	}
	if c.Pool.IsZero() {
		return Refusal(CodeBadCommand, "a new pool needs an id")
	}
	if err := checkAuthority(c.Authority); err != nil {
		return err
	}
	if err := checkPeer(&c.Peer); err != nil {
		return err
	}
	if role := c.Peer.Role(); role != "" {
		return Refusal(CodeBadPeer, "a %s cannot be the only peer of a pool: start this machine without --%s, or let it join a pool", role, role)
	}
	s.Map.Pool = c.Pool
	s.Map.Peers = []*cluster.Peer{clonePeer(&c.Peer)}
	s.Authority = slices.Clone(c.Authority)
	s.AuthorityVersion = 1
	s.touch(c.Peer.ID)
	return nil
}

func clonePeer(p *cluster.Peer) *cluster.Peer {
	c := *p
	c.Addrs = slices.Clone(p.Addrs)
	return &c
}

// printable reports whether s is text that can be shown on one line and typed
// as one word.
func printable(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || r == 0x7f || r == '\uFFFD' || r >= 0x80 && r < 0xa0 || r == '\u2028' || r == '\u2029'
	})
}

func checkPeer(p *cluster.Peer) error {
	if p.ID.IsZero() {
		return Refusal(CodeBadPeer, "a peer needs an id")
	}
	if err := checkPeerName(p.Name); err != nil {
		return err
	}
	return checkAddrs(p.Addrs)
}

func checkPeerName(name string) error {
	if len(name) > maxHost || !printable(name) || strings.ContainsAny(name, "/\\,\"'") || name[0] == '-' {
		return Refusal(CodeBadPeer, "%s is an invalid address", quoteShort(name))
	}
	return nil
}

func checkAddrs(addrs []string) error {
	if len(addrs) > maxAddrs {
		return Refusal(CodeBadPeer, "a peer has at most %d addresses and this one has %d", maxAddrs, len(addrs))
	}
	for _, a := range addrs {
		host, port, err := net.SplitHostPort(a)
		n, perr := strconv.ParseUint(port, 10, 16)
		if err != nil || perr != nil || n == 0 || len(host) > maxHost || !printable(host) {
			return Refusal(CodeBadPeer, "%s is an invalid address: it should be HOST:PORT", quoteShort(a))
		}
	}
	return nil
}

// quoteShort shows what somebody typed: as it is if harmless, quoted and cut if not.
func quoteShort(s string) string {
	if len(s) > 100 {
		s = s[:100] + "..."
	}
	if printable(s) {
		return s
	}
	return strconv.Quote(s)
}

func (s *State) addPeer(c *AddPeer) error {
	if err := checkPeer(&c.Peer); err != nil {
		return err
	}
	for _, p := range s.Map.Peers {
		if p.ID == c.Peer.ID {
			return Refusal(CodePeerExists, "Host %s port %s already in peer list", p.Name, peerPort(p))
		}
		if p.Name == c.Peer.Name {
			return Refusal(CodePeerExists, "another machine is in the pool as %s already: give this one another name or address, or detach the other with \"mortar peer detach %s\" if it is gone for good", p.Name, p.Name)
		}
	}
	if len(s.Map.Peers) >= MaxPeers {
		return Refusal(CodeBadPeer, "the pool has %d peers and cannot have more", MaxPeers)
	}
	if c.Token != "" {
		if _, err := s.useToken(c.Token, "peer", c.Now); err != nil {
			return err
		}
	}
	s.Map.Peers = append(s.Map.Peers, clonePeer(&c.Peer))
	s.Detached = slices.DeleteFunc(s.Detached, func(id cluster.PeerID) bool { return id == c.Peer.ID })
	s.touch(c.Peer.ID)
	return nil
}

// peerPort is the port on which a peer is found, for messages.
func peerPort(p *cluster.Peer) string {
	for _, a := range p.Addrs {
		if _, port, err := net.SplitHostPort(a); err == nil {
			return port
		}
	}
	return "24007"
}

// editPeer replaces the peer by a copy and returns the copy.
func (s *State) editPeer(id cluster.PeerID) (*cluster.Peer, error) {
	for i, p := range s.Map.Peers {
		if p.ID == id {
			s.Map.Peers[i] = clonePeer(p)
			return s.Map.Peers[i], nil
		}
	}
	return nil, Refusal(CodeNoPeer, "%v is not part of cluster", id)
}

func (s *State) updatePeer(c *UpdatePeer, seen uint64) error {
	p, err := s.editPeer(c.Peer)
	if err != nil {
		return err
	}
	if err := s.seen(c.Peer, seen, "peer "+p.Name); err != nil {
		return err
	}
	if c.Name != nil {
		if err := checkPeerName(*c.Name); err != nil {
			return err
		}
		for _, q := range s.Map.Peers {
			if q.ID != p.ID && q.Name == *c.Name {
				return Refusal(CodePeerExists, "another peer of the pool is called %s already", q.Name)
			}
		}
		p.Name = *c.Name
	}
	if c.Addrs != nil {
		if err := checkAddrs(c.Addrs); err != nil {
			return err
		}
		p.Addrs = slices.Clone(c.Addrs)
	}
	if c.Witness != nil && *c.Witness != p.Witness {
		if *c.Witness && s.hosts(p.ID) != nil {
			return Refusal(CodePeerInUse, "%s hosts bricks and cannot be a witness, which holds none", p.Name)
		}
		p.Witness = *c.Witness
	}
	s.touch(p.ID)
	return nil
}

// hosts returns a brick on the peer, or nil.
func (s *State) hosts(id cluster.PeerID) *cluster.Brick {
	for _, v := range s.Map.Volumes {
		for i := range v.Bricks {
			if v.Bricks[i].Peer == id {
				return &v.Bricks[i]
			}
		}
	}
	return nil
}

func (s *State) removePeer(c *RemovePeer, seen uint64) error {
	p := s.Map.Peer(c.Peer)
	if p == nil {
		return Refusal(CodeNoPeer, "%v is not part of cluster", c.Peer)
	}
	if err := s.seen(c.Peer, seen, "peer "+p.Name); err != nil {
		return err
	}
	if s.hosts(p.ID) != nil {
		return Refusal(CodePeerInUse, "Peer %s hosts one or more bricks. If the peer is in not recoverable state then use either replace-brick or remove-brick command with force to remove all bricks from the peer and attempt the peer detach again.", p.Name)
	}
	if !slices.ContainsFunc(s.Map.Peers, func(q *cluster.Peer) bool { return q.ID != p.ID && !q.Witness }) {
		return Refusal(CodePeerInUse, "%s is the last peer of the pool that may hold bricks and cannot be detached", p.Name)
	}
	s.Map.Peers = slices.DeleteFunc(s.Map.Peers, func(q *cluster.Peer) bool { return q.ID == c.Peer })
	delete(s.Changed, c.Peer)
	if len(s.Detached) >= MaxPeers {
		s.Detached = slices.Delete(s.Detached, 0, len(s.Detached)-MaxPeers+1)
	}
	s.Detached = append(s.Detached, c.Peer)
	return nil
}

func (s *State) incarnate(c *Incarnate) error {
	p, err := s.editPeer(c.Peer)
	if err != nil {
		return err
	}
	if p.Incarnation != c.Past {
		return Refusal(CodeConflict, "peer %s was started elsewhere at the same time (start %d, and not %d, was its last)", p.Name, p.Incarnation, c.Past)
	}
	p.Incarnation++
	return nil
}

// --- volumes ---

// FindVolume returns the volume of that name, or a refusal in GlusterFS's words.
func FindVolume(m *cluster.Map, name string) (*cluster.Volume, error) {
	if v := m.Volume(name); v != nil {
		return v, nil
	}
	return nil, Refusal(CodeNoVolume, "Volume %s does not exist", quoteShort(name))
}

// FindPeer returns the peer that is called so or has that address or id, or a
// refusal in GlusterFS's words.
func FindPeer(m *cluster.Map, host string) (*cluster.Peer, error) {
	for _, p := range m.Peers {
		if p.Name == host || p.ID.String() == host {
			return p, nil
		}
	}
	for _, p := range m.Peers {
		for _, a := range p.Addrs {
			if h, _, err := net.SplitHostPort(a); a == host || err == nil && h == host {
				return p, nil
			}
		}
	}
	return nil, Refusal(CodeNoPeer, "%s is not part of cluster", quoteShort(host))
}

// editVolume replaces the volume by a copy and returns the copy.
func (s *State) editVolume(id cluster.VolumeID) (*cluster.Volume, error) {
	for i, v := range s.Map.Volumes {
		if v.ID != id {
			continue
		}
		c := *v
		c.Bricks = slices.Clone(v.Bricks)
		c.Sets = slices.Clone(v.Sets)
		for k := range c.Sets {
			c.Sets[k] = c.Sets[k].Clone()
		}
		c.Options = maps.Clone(v.Options)
		s.Map.Volumes[i] = &c
		return &c, nil
	}
	return nil, Refusal(CodeNoVolume, "Volume %v does not exist", id)
}

// editVolumeSeen is editVolume with the comparison.
func (s *State) editVolumeSeen(id cluster.VolumeID, seen uint64) (*cluster.Volume, error) {
	v, err := s.editVolume(id)
	if err == nil {
		err = s.seen(id, seen, "volume "+v.Name)
	}
	return v, err
}

// minInSync is the MinInSync that the volume's sets must have.
func minInSync(v *cluster.Volume) int { return v.EffectiveOptions().MinInSync }

func (s *State) createVolume(c *CreateVolume) error {
	if err := CheckCreate(s.Map, c); err != nil {
		return err
	}
	v := &cluster.Volume{ID: c.ID, Name: c.Name, Status: cluster.VolumeCreated, Replica: c.Replica, Bricks: slices.Clone(c.Bricks)}
	if err := putOptions(v, c.Options); err != nil {
		return err
	}
	for i := range len(c.Bricks) / c.Replica {
		set := cluster.SetConfig{Set: cluster.SetID{Volume: c.ID, Index: cluster.SetIndex(i)}, MinInSync: minInSync(v)}
		for _, b := range c.Bricks[i*c.Replica : (i+1)*c.Replica] {
			set.Members = append(set.Members, b.ID)
		}
		v.Sets = append(v.Sets, set)
	}
	s.Map.Volumes = append(s.Map.Volumes, v)
	s.touch(v.ID)
	return nil
}

// CheckCreate says what a map alone can say against a new volume. The daemon
// calls it too, before it makes any directory.
func CheckCreate(m *cluster.Map, c *CreateVolume) error {
	if err := cluster.CheckVolumeName(c.Name); err != nil {
		return &Error{Code: CodeBadName, Text: err.Error()}
	}
	if m.Volume(c.Name) != nil {
		return Refusal(CodeVolumeExists, "Volume %s already exists", c.Name)
	}
	if c.ID.IsZero() || m.VolumeByID(c.ID) != nil {
		return Refusal(CodeBadCommand, "a new volume needs an id that no other volume has")
	}
	if len(m.Volumes) >= MaxVolumes {
		return Refusal(CodeBadCommand, "the pool has %d volumes and cannot have more", MaxVolumes)
	}
	n := len(c.Bricks)
	switch {
	case n == 0:
		return Refusal(CodeBadReplica, "No bricks specified")
	case c.Replica < 1 || c.Replica > cluster.MaxReplica:
		return Refusal(CodeBadReplica, "replica count should be from 1 to %d, and %d was asked for", cluster.MaxReplica, c.Replica)
	case n%c.Replica != 0:
		return Refusal(CodeBadReplica, "number of bricks is not a multiple of replica count")
	case n > c.Replica:
		or := ""
		if n <= cluster.MaxReplica {
			or = fmt.Sprintf(", or say replica %d to have every file on all of them", n)
		}
		return Refusal(CodeNotSupported, "%d bricks with replica %d would make %d sets; distributed volumes are not supported yet: give exactly %d brick(s)%s", n, c.Replica, n/c.Replica, c.Replica, or)
	}
	ids := map[cluster.BrickID]bool{}
	for i := range c.Bricks {
		b := &c.Bricks[i]
		if b.ID.IsZero() || ids[b.ID] {
			return Refusal(CodeBadCommand, "brick %s needs an id of its own", quoteShort(b.String()))
		}
		ids[b.ID] = true
		if err := checkBrick(m, b); err != nil {
			return err
		}
		for _, o := range c.Bricks[:i] {
			if o.Peer != b.Peer {
				continue
			}
			if o.Path == b.Path {
				return Refusal(CodeBadBrick, "Found duplicate exports %s", b)
			}
			if overlap(o.Path, b.Path) {
				return Refusal(CodeBadBrick, "Brick: %s not available. Brick may be containing or be contained by an existing brick.", b)
			}
		}
	}
	if !c.Force && c.Replica > 1 {
		peers := map[cluster.PeerID]bool{}
		for _, b := range c.Bricks {
			if peers[b.Peer] {
				return Refusal(CodeBrickPlacement, "Multiple bricks of a replicate volume are present on the same server. This setup is not optimal. Bricks should be on different nodes to have best fault tolerant configuration. Use 'force' at the end of the command if you want to override this behavior.")
			}
			peers[b.Peer] = true
		}
	}
	probe := cluster.Volume{Replica: c.Replica}
	return putOptions(&probe, c.Options)
}

// checkBrick checks a new brick against the pool.
func checkBrick(m *cluster.Map, b *cluster.Brick) error {
	if len(b.Host) > maxHost || !printable(b.Host) || len(b.Path) > maxPath || strings.ContainsFunc(b.Path, func(r rune) bool { return r < ' ' || r == 0x7f }) ||
		!strings.HasPrefix(b.Path, "/") || path.Clean(b.Path) != b.Path {
		return Refusal(CodeBadBrick, "Wrong brick type: %s, use <HOSTNAME>:<export-dir-abs-path>", quoteShort(b.String()))
	}
	if b.Path == "/" {
		return Refusal(CodeBadBrick, "The brick %s is the whole root file system: give a directory of its own, such as %s:/bricks/b1", b, b.Host)
	}
	p := m.Peer(b.Peer)
	if p == nil {
		return Refusal(CodeNoPeer, "Host %s is not in 'Peer in Cluster' state", b.Host)
	}
	if p.Witness {
		return Refusal(CodeBadBrick, "Host %s is a %s, which holds no bricks: name another peer for %s", p.Name, p.Role(), b)
	}
	if p.Drained {
		return Refusal(CodeDrained, "Host %s is drained, so that nothing depends on it: name another peer for %s, or run \"mortar peer undrain %s\" first", p.Name, b, p.Name)
	}
	for _, v := range m.Volumes {
		for i := range v.Bricks {
			o := &v.Bricks[i]
			switch {
			case o.ID == b.ID:
				return Refusal(CodeBadCommand, "brick %s needs an id of its own", b)
			case o.Peer != b.Peer:
			case o.Path == b.Path:
				return Refusal(CodeBadBrick, "%s is already part of a volume", b)
			case overlap(o.Path, b.Path):
				return Refusal(CodeBadBrick, "Brick: %s not available. Brick may be containing or be contained by an existing brick.", b)
			}
		}
	}
	return nil
}

// overlap reports whether one of two clean absolute paths contains the other.
func overlap(a, b string) bool {
	return strings.HasPrefix(a, strings.TrimSuffix(b, "/")+"/") || strings.HasPrefix(b, strings.TrimSuffix(a, "/")+"/")
}

func (s *State) startVolume(c *StartVolume, seen uint64) error {
	v, err := s.editVolumeSeen(c.Volume, seen)
	if err != nil {
		return err
	}
	if v.Status == cluster.VolumeStarted && !c.Force {
		return Refusal(CodeStarted, "Volume %s already started", v.Name)
	}
	if len(c.Primary) > len(v.Sets) {
		return Refusal(CodeBadConfig, "volume %s has %d set(s) and %d primaries were named", v.Name, len(v.Sets), len(c.Primary))
	}
	for i := range v.Sets {
		set := &v.Sets[i]
		if set.Epoch > 0 {
			continue // Failover finds its primary, or it has one
		}
		set.Primary = set.Members[0]
		if i < len(c.Primary) && !c.Primary[i].IsZero() {
			if !set.IsMember(c.Primary[i]) {
				return Refusal(CodeBadConfig, "brick %v is not one of volume %s", c.Primary[i], v.Name)
			}
			set.Primary = c.Primary[i]
		}
		set.Epoch = 1
		set.InSync = slices.Clone(set.Members)
	}
	v.Status = cluster.VolumeStarted
	s.touch(v.ID)
	return nil
}

func (s *State) stopVolume(c *StopVolume, seen uint64) error {
	v, err := s.editVolumeSeen(c.Volume, seen)
	if err != nil {
		return err
	}
	if v.Status != cluster.VolumeStarted {
		if c.Force {
			return nil
		}
		return Refusal(CodeNotStarted, "Volume %s is not in the started state", v.Name)
	}
	for i := range v.Sets {
		v.Sets[i].Epoch++
		v.Sets[i].Primary = cluster.BrickID{}
	}
	v.Status = cluster.VolumeStopped
	s.touch(v.ID)
	return nil
}

func (s *State) deleteVolume(c *DeleteVolume, seen uint64) error {
	v, err := s.editVolumeSeen(c.Volume, seen)
	if err != nil {
		return err
	}
	if v.Status == cluster.VolumeStarted {
		return Refusal(CodeStarted, "Volume %s has been started.Volume needs to be stopped before deletion.", v.Name)
	}
	if d := s.dockerOf(v.ID); d != nil {
		return Refusal(CodeInUse, "Volume %s holds the Docker volume %s: remove that first with \"docker volume rm %s\", and any others", v.Name, d.Name, d.Name)
	}
	s.Map.Volumes = slices.DeleteFunc(s.Map.Volumes, func(w *cluster.Volume) bool { return w.ID == c.Volume })
	delete(s.Changed, c.Volume)
	return nil
}

// putOptions sets options of v, which is a copy.
func putOptions(v *cluster.Volume, set map[string]string) error {
	for _, name := range slices.Sorted(maps.Keys(set)) {
		o, err := cluster.FindOption(name)
		if err != nil {
			return &Error{Code: CodeBadOption, Text: err.Error()}
		}
		value, err := o.Canonical(set[name])
		if err != nil {
			return &Error{Code: CodeBadOption, Text: err.Error()}
		}
		if v.Options == nil {
			v.Options = map[string]string{}
		}
		v.Options[name] = value
	}
	if n := minInSync(v); n > v.Replica {
		return Refusal(CodeBadOption, "option %s: %d is more than the %d brick(s) of a set: it could never take a write", cluster.OptMinInSync, n, v.Replica)
	}
	return nil
}

// renewMinInSync carries a changed option into the sets' configurations.
func renewMinInSync(v *cluster.Volume) {
	n := minInSync(v)
	for i := range v.Sets {
		if set := &v.Sets[i]; set.MinInSync != n {
			set.MinInSync = n
			if set.Epoch > 0 {
				set.Epoch++ // an epoch is one configuration, for ever
			}
		}
	}
}

func (s *State) setOptions(c *SetOptions, seen uint64) error {
	v, err := s.editVolumeSeen(c.Volume, seen)
	if err != nil {
		return err
	}
	if len(c.Options) == 0 {
		return Refusal(CodeBadOption, "no option was named")
	}
	if err := putOptions(v, c.Options); err != nil {
		return err
	}
	renewMinInSync(v)
	s.touch(v.ID)
	return nil
}

func (s *State) resetOptions(c *ResetOptions, seen uint64) error {
	v, err := s.editVolumeSeen(c.Volume, seen)
	if err != nil {
		return err
	}
	if len(c.Names) == 0 {
		v.Options = nil
	}
	for _, name := range c.Names {
		if _, err := cluster.FindOption(name); err != nil {
			return &Error{Code: CodeBadOption, Text: err.Error()}
		}
		delete(v.Options, name)
	}
	renewMinInSync(v)
	s.touch(v.ID)
	return nil
}

// --- replica sets ---

// sameSet reports whether two lists without repetitions have the same members.
func sameSet(a, b []cluster.BrickID) bool { return len(a) == len(b) && subset(a, b) }

// subset reports whether every element of a is in b.
func subset(a, b []cluster.BrickID) bool {
	return !slices.ContainsFunc(a, func(x cluster.BrickID) bool { return !slices.Contains(b, x) })
}

func (s *State) setConfig(c *SetConfig) error {
	next := c.Config
	v, err := s.editVolume(next.Set.Volume)
	if err != nil {
		return err
	}
	if int(next.Set.Index) >= len(v.Sets) {
		return Refusal(CodeBadConfig, "volume %s has no set %d", v.Name, next.Set.Index)
	}
	if v.Status != cluster.VolumeStarted {
		return Refusal(CodeNotStarted, "Volume %s is not started", v.Name)
	}
	if err := checkConfig(&v.Sets[next.Set.Index], &next, c.Force); err != nil {
		err.Text = fmt.Sprintf("volume %s, set %d: %s", v.Name, next.Set.Index, err.Text)
		return err
	}
	if c.Force {
		record(v, &v.Sets[next.Set.Index], &next, c.At, c.By)
	}
	v.Sets[next.Set.Index] = next.Clone()
	return nil
}

// checkConfig holds the invariants that tie one configuration of a set to the
// one before it. Everything that replication promises rests on them.
func checkConfig(old, next *cluster.SetConfig, force bool) *Error {
	bad := func(format string, args ...any) *Error { return Refusal(CodeBadConfig, format, args...) }
	if next.Epoch != old.Epoch+1 {
		return Refusal(CodeStaleEpoch, "the proposal is for epoch %d and the next is %d: the set was reconfigured meanwhile", next.Epoch, old.Epoch+1)
	}
	if !slices.Equal(next.Members, old.Members) {
		return bad("the members of a set cannot be changed this way")
	}
	if next.MinInSync != old.MinInSync {
		return bad("min-in-sync is %d and the proposal says %d", old.MinInSync, next.MinInSync)
	}
	if !sameSet(next.Drained, old.Drained) {
		return bad("a proposal cannot change which bricks are drained")
	}
	seen := map[cluster.BrickID]bool{}
	for _, b := range next.InSync {
		if seen[b] || !next.IsMember(b) {
			return bad("brick %v is in the in-sync set twice, or is no member of the set", b)
		}
		seen[b] = true
	}
	if next.Chosen != old.Chosen && (next.Chosen != next.Epoch || len(next.InSync) != 1) {
		return bad("a primary that may lack something leads its own epoch, and alone")
	}
	if force {
		if next.Primary.IsZero() || next.Doubted || !slices.Equal(next.InSync, []cluster.BrickID{next.Primary}) {
			return bad("a forced configuration has one in-sync brick, its primary")
		}
		return nil
	}
	for _, b := range next.InSync {
		if next.IsDrained(b) && !old.IsInSync(b) && !old.Doubted {
			return Refusal(CodeDrained, "brick %v is on a drained peer and does not come into the in-sync set", b)
		}
	}
	if next.Floor.Compare(old.Floor) < 0 {
		return bad("the known durable position would go back from %v to %v", old.Floor, next.Floor)
	}
	if next.Doubted != (old.Doubted && next.Primary.IsZero()) {
		return bad("a set whose in-sync bricks are in doubt stays so until one of them leads")
	}
	if next.Primary.IsZero() {
		if !sameSet(next.InSync, old.InSync) {
			return bad("without a primary the in-sync set stays as it is: those bricks have the data")
		}
		return nil
	}
	if !next.IsInSync(next.Primary) {
		return bad("primary %v is not in the in-sync set", next.Primary)
	}
	if old.Doubted {
		if len(next.InSync) != 1 {
			return bad("a set whose in-sync bricks are in doubt begins with its primary alone")
		}
		return nil
	}
	if !old.IsInSync(next.Primary) {
		return bad("brick %v was not in sync and cannot become primary", next.Primary)
	}
	if next.Primary != old.Primary && !subset(next.InSync, old.InSync) {
		return bad("a new primary begins with bricks that were in sync before it")
	}
	return nil
}

// --- tokens and authority ---

func isHash(h string) bool {
	return len(h) == 64 && strings.Trim(h, "0123456789abcdef") == ""
}

func (s *State) addToken(c *AddToken) error {
	t := c.Token
	if !isHash(t.Hash) || t.Uses < 1 || t.Role != "peer" && t.Role != "client" || len(t.Note) > 1024 || len(t.Volume) > cluster.MaxVolumeName || len(t.Rights) > 16 {
		return Refusal(CodeBadCommand, "not a token that can be registered")
	}
	if t.Expires <= c.Now {
		return Refusal(CodeBadCommand, "the token would have expired before it can be used")
	}
	s.expireTokens(c.Now)
	i, found := s.findToken(t.Hash)
	if found {
		return Refusal(CodeConflict, "the token is registered already")
	}
	if len(s.Tokens) >= MaxTokens {
		return Refusal(CodeBadCommand, "%d tokens are outstanding: wait until some have expired", MaxTokens)
	}
	s.Tokens = slices.Insert(s.Tokens, i, t)
	return nil
}

func (s *State) expireTokens(now int64) {
	s.Tokens = slices.DeleteFunc(s.Tokens, func(t Token) bool { return t.Expires <= now })
}

// useToken spends one use and returns the token as it was.
func (s *State) useToken(hash, role string, now int64) (Token, error) {
	i, found := s.findToken(hash)
	if !found || s.Tokens[i].Role != role {
		return Token{}, Refusal(CodeNoToken, "the token is not known: it was used already, has expired or was revoked; make a new one with \"mortar peer invite\"")
	}
	t := s.Tokens[i]
	if t.Expires <= now {
		return Token{}, Refusal(CodeNoToken, "the token has expired: make a new one with \"mortar peer invite\"")
	}
	if s.Tokens[i].Uses--; s.Tokens[i].Uses < 1 {
		s.Tokens = slices.Delete(s.Tokens, i, i+1)
	}
	return t, nil
}

func (s *State) dropToken(c *DropToken) error {
	if c.Hash == "" {
		s.expireTokens(c.Now)
		return nil
	}
	i, found := s.findToken(c.Hash)
	if !found {
		return Refusal(CodeNoToken, "there is no such token: it was used already, has expired or was revoked")
	}
	s.Tokens = slices.Delete(s.Tokens, i, i+1)
	return nil
}

func checkAuthority(b []byte) error {
	if len(b) > maxAuthority {
		return Refusal(CodeBadCommand, "a certificate authority of %d bytes is not possible", len(b))
	}
	return nil
}

func (s *State) setAuthority(c *SetAuthority) error {
	if err := checkAuthority(c.Authority); err != nil {
		return err
	}
	if c.Version != s.AuthorityVersion {
		return Refusal(CodeConflict, "the certificate authority was replaced by somebody else meanwhile: look again before you replace it")
	}
	s.Authority = slices.Clone(c.Authority)
	s.AuthorityVersion++
	return nil
}
