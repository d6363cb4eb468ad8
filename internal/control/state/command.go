package state

import (
	"bytes"
	"encoding/json"
	"fmt"

	"mortar/internal/cluster"
)

// Command is one change of the state. Exactly one of the pointers is set.
type Command struct {
	// ID, if set, makes the command apply once however often it is proposed.
	ID cluster.ID `json:"id,omitzero"`
	// Seen is the version of the Map that the proposer looked at. If the peer or
	// volume that the command is about was changed by an administrator after
	// that, the command is refused with CodeConflict. 0 compares nothing.
	Seen uint64 `json:"seen,omitempty"`

	Init         *Init         `json:"init,omitempty"`
	AddPeer      *AddPeer      `json:"add_peer,omitempty"`
	UpdatePeer   *UpdatePeer   `json:"update_peer,omitempty"`
	RemovePeer   *RemovePeer   `json:"remove_peer,omitempty"`
	DrainPeer    *DrainPeer    `json:"drain_peer,omitempty"`
	Incarnate    *Incarnate    `json:"incarnate,omitempty"`
	CreateVolume *CreateVolume `json:"create_volume,omitempty"`
	StartVolume  *StartVolume  `json:"start_volume,omitempty"`
	StopVolume   *StopVolume   `json:"stop_volume,omitempty"`
	DeleteVolume *DeleteVolume `json:"delete_volume,omitempty"`
	SetOptions   *SetOptions   `json:"set_options,omitempty"`
	ResetOptions *ResetOptions `json:"reset_options,omitempty"`
	SetConfig    *SetConfig    `json:"set_config,omitempty"`
	AddToken     *AddToken     `json:"add_token,omitempty"`
	UseToken     *UseToken     `json:"use_token,omitempty"`
	DropToken    *DropToken    `json:"drop_token,omitempty"`
	SetAuthority *SetAuthority `json:"set_authority,omitempty"`
	PutDocker    *PutDocker    `json:"put_docker,omitempty"`
	DropDocker   *DropDocker   `json:"drop_docker,omitempty"`
}

// Init makes a pool of one peer.
type Init struct {
	Pool      cluster.ID   `json:"pool"`
	Peer      cluster.Peer `json:"peer"`
	Authority []byte       `json:"authority,omitempty"`
}

// AddPeer takes a machine into the pool. With a Token, that is used up by it,
// in one step.
type AddPeer struct {
	Peer  cluster.Peer `json:"peer"`
	Token string       `json:"token,omitempty"` // hash
	Now   int64        `json:"now,omitempty"`   // Unix seconds, with a Token
}

// UpdatePeer changes attributes of a peer; nil leaves one as it is.
type UpdatePeer struct {
	Peer    cluster.PeerID `json:"peer"`
	Name    *string        `json:"name,omitempty"`
	Addrs   []string       `json:"addrs,omitempty"`
	Witness *bool          `json:"witness,omitempty"`
}

// RemovePeer takes a peer that hosts no bricks out of the pool.
type RemovePeer struct {
	Peer cluster.PeerID `json:"peer"`
}

// DrainPeer has a peer hand over what its bricks do and take part in nothing, or,
// with Undo, take part again.
type DrainPeer struct {
	Peer cluster.PeerID `json:"peer"`
	Undo bool           `json:"undo,omitempty"`
}

// Incarnate is said by a peer's daemon when it starts: the incarnation it found
// and that is now past.
type Incarnate struct {
	Peer cluster.PeerID `json:"peer"`
	Past uint64         `json:"past"`
}

// CreateVolume makes a volume. What can only be seen on the bricks' machines is
// checked by their daemons before it is proposed.
type CreateVolume struct {
	ID      cluster.VolumeID  `json:"id"`
	Name    string            `json:"name"`
	Replica int               `json:"replica"`
	Bricks  []cluster.Brick   `json:"bricks"`
	Options map[string]string `json:"options,omitempty"`
	// Force allows a placement that is possible and unwise.
	Force bool `json:"force,omitempty"`
}

// StartVolume starts a volume. The first start makes epoch 1 of its sets, led
// by the Primary given for each, or by its first brick where none is given. A
// later start leaves the sets without a primary, for Failover to find the brick
// that is furthest.
type StartVolume struct {
	Volume  cluster.VolumeID  `json:"volume"`
	Primary []cluster.BrickID `json:"primary,omitempty"`
	Force   bool              `json:"force,omitempty"` // one that is started already is no error
}

// StopVolume stops a volume: every set gets an epoch without a primary.
type StopVolume struct {
	Volume cluster.VolumeID `json:"volume"`
	Force  bool             `json:"force,omitempty"` // one that is not started is no error
}

// DeleteVolume forgets a stopped volume. What is on its bricks stays there.
type DeleteVolume struct {
	Volume cluster.VolumeID `json:"volume"`
}

// SetOptions sets options of a volume, all or none.
type SetOptions struct {
	Volume  cluster.VolumeID  `json:"volume"`
	Options map[string]string `json:"options"`
}

// ResetOptions gives options their default value: those named, or all.
type ResetOptions struct {
	Volume cluster.VolumeID `json:"volume"`
	Names  []string         `json:"names,omitempty"`
}

// SetConfig gives a replica set its next configuration. Config.Epoch is one
// more than the epoch that the proposer saw, which is the comparison.
type SetConfig struct {
	Config cluster.SetConfig `json:"config"`
	// Force is an operator's decision to go on with one brick although what it
	// holds may not be everything: the only way out when no brick may lead.
	Force bool `json:"force,omitempty"`
	// At (Unix seconds) and By are recorded with a forced one.
	At int64          `json:"at,omitempty"`
	By cluster.PeerID `json:"by,omitzero"`
}

// AddToken registers a join token.
type AddToken struct {
	Token Token `json:"token"`
	Now   int64 `json:"now"` // Unix seconds
}

// UseToken spends one use of a token.
type UseToken struct {
	Hash string `json:"hash"`
	Role string `json:"role"`
	Now  int64  `json:"now"` // Unix seconds
}

// DropToken revokes a token, or with an empty Hash every token that expired.
type DropToken struct {
	Hash string `json:"hash,omitempty"`
	Now  int64  `json:"now,omitempty"`
}

// SetAuthority replaces the certificate authority.
type SetAuthority struct {
	Authority []byte `json:"authority"`
	Version   uint64 `json:"version"` // the one that is replaced
}

// PutDocker registers a Docker volume, or takes one that is registered to another
// state of its life.
type PutDocker struct {
	Volume cluster.DockerVolume `json:"volume"`
}

// DropDocker forgets a Docker volume that is being removed.
type DropDocker struct {
	Name string     `json:"name"`
	ID   cluster.ID `json:"id"`
}

// MaxCommand bounds an encoded command.
const MaxCommand = 1 << 20

// Encode writes a command.
func (c *Command) Encode() ([]byte, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode command: %w", err)
	}
	if len(b) > MaxCommand {
		return nil, Refusal(CodeBadCommand, "the request is %d bytes long and at most %d are possible", len(b), MaxCommand)
	}
	return b, nil
}

// DecodeCommand reads what Encode wrote. Fields that it does not know are
// refused, since ignoring one would apply half a command.
func DecodeCommand(b []byte) (Command, error) {
	var c Command
	if len(b) > MaxCommand {
		return c, Refusal(CodeBadCommand, "the request is %d bytes long and at most %d are possible", len(b), MaxCommand)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return Command{}, Refusal(CodeBadCommand, "not a command that this version of mortar knows: %v", err)
	}
	return c, nil
}
