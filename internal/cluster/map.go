package cluster

import (
	"cmp"
	"fmt"
	"slices"
)

// Peer is one machine of the pool.
type Peer struct {
	ID PeerID `json:"id"`
	// Name is how the administrator called the machine when it joined: a host
	// name or an address. It is what lists show and bricks are written with.
	Name string `json:"name"`
	// Addrs are "host:port" hints where the peer was last reachable, best first.
	Addrs   []string `json:"addrs"`
	Witness bool     `json:"witness,omitempty"` // holds no bricks
	NoVote  bool     `json:"no_vote,omitempty"` // never votes
	// Incarnation counts the starts of the peer's daemon. Two live daemons with
	// one id differ in it, which is how a cloned disk is found out.
	Incarnation uint64 `json:"incarnation"`
	// Drained is set while an administrator wants nothing to depend on the peer: its
	// bricks neither lead nor are in sync.
	Drained bool `json:"drained,omitempty"`
}

// Role is what the peer is called for what it does not do: a witness holds no
// bricks, a client does not vote either. Empty: it does both.
func (p *Peer) Role() string {
	switch {
	case p.NoVote:
		return "client"
	case p.Witness:
		return "witness"
	}
	return ""
}

// Brick is a directory on a peer.
type Brick struct {
	ID   BrickID `json:"id"`
	Peer PeerID  `json:"peer"`
	Host string  `json:"host"` // as the user wrote it
	Path string  `json:"path"` // absolute
}

// String is the brick as commands write it, HOST:/path.
func (b Brick) String() string { return b.Host + ":" + b.Path }

// VolumeStatus is the life of a volume. The numbers are those of the gluster
// XML output.
type VolumeStatus int

const (
	VolumeCreated VolumeStatus = 0
	VolumeStarted VolumeStatus = 1
	VolumeStopped VolumeStatus = 2
)

func (s VolumeStatus) String() string {
	switch s {
	case VolumeCreated:
		return "Created"
	case VolumeStarted:
		return "Started"
	case VolumeStopped:
		return "Stopped"
	}
	return fmt.Sprintf("VolumeStatus(%d)", int(s))
}

// Volume is a named file system made of replica sets.
type Volume struct {
	ID      VolumeID          `json:"id"`
	Name    string            `json:"name"`
	Status  VolumeStatus      `json:"status"`
	Replica int               `json:"replica"` // bricks per set
	Bricks  []Brick           `json:"bricks"`  // in the order given; set i is Bricks[i*Replica:(i+1)*Replica]
	Sets    []SetConfig       `json:"sets"`
	Options map[string]string `json:"options,omitempty"` // only those set by the user; see Option
	// Recoveries are the last decisions of operators to go on with less than
	// everything, oldest first.
	Recoveries []Recovery `json:"recoveries,omitempty"`
}

// Recovery records that a set was made to go on with one brick although that had
// not everything.
type Recovery struct {
	Set   SetIndex  `json:"set"`
	Epoch Epoch     `json:"epoch"` // that began with it
	At    int64     `json:"at"`    // Unix seconds
	By    PeerID    `json:"by"`    // the peer on which it was asked for
	Brick BrickID   `json:"brick"` // that the set went on with
	Kept  Pos       `json:"kept"`  // the last change that it had
	Known Pos       `json:"known"` // the last change that the set was known to have made durable
	Lost  []BrickID `json:"lost"`  // the other bricks that had been in sync, or may have been
}

// PoolRecovery records that one peer was made the only voter of the pool.
type PoolRecovery struct {
	Generation uint64 `json:"generation"`
	At         int64  `json:"at"` // Unix seconds
	By         PeerID `json:"by"` // that became the voter
}

// Type is the volume type as "volume info" prints it.
func (v *Volume) Type() string {
	switch {
	case v.Replica == 1:
		return "Distribute"
	case len(v.Sets) <= 1:
		return "Replicate"
	}
	return "Distributed-Replicate"
}

// Brick returns the brick with that id, or nil.
func (v *Volume) Brick(id BrickID) *Brick {
	for i := range v.Bricks {
		if v.Bricks[i].ID == id {
			return &v.Bricks[i]
		}
	}
	return nil
}

// Map is the whole configuration of a pool at one version: every peer has a
// copy. A Map that was handed out is never changed.
type Map struct {
	Version uint64    `json:"version"` // grows with every change
	Pool    ID        `json:"pool"`
	Peers   []*Peer   `json:"peers"`
	Volumes []*Volume `json:"volumes"`
	// Recoveries are the last recoveries of the pool by hand, oldest first.
	Recoveries []PoolRecovery `json:"recoveries,omitempty"`
	// Docker are the Docker volumes, by name.
	Docker []*DockerVolume `json:"docker,omitempty"`
}

// DockerState is the life of a Docker volume.
type DockerState string

const (
	// DockerMaking: its directory is being made. A node that dies leaves it so,
	// and whoever is asked for it next finishes that.
	DockerMaking DockerState = "making"
	// DockerReady: it may be mounted.
	DockerReady DockerState = "ready"
	// DockerRemoving: it may not be mounted any more, and its directory goes.
	DockerRemoving DockerState = "removing"
)

// DockerVolume is what the engines of the pool's machines know as a volume: a
// directory of a volume. It is here and not in the volume so that every machine can say
// what there is although no brick answers.
type DockerVolume struct {
	ID     ID       `json:"id"` // of this one, should the name be used again
	Name   string   `json:"name"`
	Volume VolumeID `json:"volume"`
	// Dir is the directory from the volume's root, without a slash in front.
	Dir string `json:"dir"`
	// Own tells that the directory was made for it and goes with it.
	Own      bool        `json:"own"`
	Size     uint64      `json:"size,omitempty"` // bytes; 0: no limit
	UID      uint32      `json:"uid"`
	GID      uint32      `json:"gid"`
	Mode     uint32      `json:"mode"`
	ReadOnly bool        `json:"read_only,omitempty"`
	Created  int64       `json:"created"` // Unix seconds
	State    DockerState `json:"state"`
}

// DockerVolume returns the Docker volume of that name, or nil.
func (m *Map) DockerVolume(name string) *DockerVolume {
	i, ok := slices.BinarySearchFunc(m.Docker, name, func(d *DockerVolume, name string) int { return cmp.Compare(d.Name, name) })
	if !ok {
		return nil
	}
	return m.Docker[i]
}

// Peer returns the peer with that id, or nil.
func (m *Map) Peer(id PeerID) *Peer {
	i := slices.IndexFunc(m.Peers, func(p *Peer) bool { return p.ID == id })
	if i < 0 {
		return nil
	}
	return m.Peers[i]
}

// Volume returns the volume of that name, or nil.
func (m *Map) Volume(name string) *Volume {
	i := slices.IndexFunc(m.Volumes, func(v *Volume) bool { return v.Name == name })
	if i < 0 {
		return nil
	}
	return m.Volumes[i]
}

// VolumeByID returns the volume with that id, or nil.
func (m *Map) VolumeByID(id VolumeID) *Volume {
	i := slices.IndexFunc(m.Volumes, func(v *Volume) bool { return v.ID == id })
	if i < 0 {
		return nil
	}
	return m.Volumes[i]
}
