// Package cluster holds the words of the cluster: the identities, positions,
// options and the versioned map that every other package speaks in.
//
// It is a leaf: it knows nothing of how any of this is decided, stored or
// sent. doc/nomenclature.md explains the words to people.
package cluster

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
)

// ID is a 128-bit identity. Peers, volumes and bricks have one each; the text
// form is that of a UUID, which is what the gluster command prints.
type ID [16]byte

type (
	// PeerID names a peer: the first 16 bytes of the SHA-256 of its public key
	// (see pki). Names and addresses are attributes of a peer, never its identity.
	PeerID = ID
	// VolumeID names a volume for ever; the volume's name may be reused.
	VolumeID = ID
	// BrickID names one brick. It is written to brick.json when the brick is made.
	BrickID = ID
)

// NewID returns a random ID (a version 4 UUID, RFC 9562).
func NewID() ID {
	var id ID
	rand.Read(id[:]) // never fails, crypto/rand
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	return id
}

// IsZero reports whether id is the zero ID, which names nothing.
func (id ID) IsZero() bool { return id == ID{} }

// String returns the canonical UUID text, 36 characters.
func (id ID) String() string {
	h := hex.EncodeToString(id[:])
	return h[0:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:32]
}

var errID = errors.New("not an id of the form xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx")

// ParseID reads the text form that String writes.
func ParseID(s string) (ID, error) {
	var id ID
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return ID{}, fmt.Errorf("%q is %w", s, errID)
	}
	raw, err := hex.DecodeString(s[0:8] + s[9:13] + s[14:18] + s[19:23] + s[24:36])
	if err != nil {
		return ID{}, fmt.Errorf("%q is %w", s, errID)
	}
	copy(id[:], raw)
	return id, nil
}

// MarshalText implements encoding.TextMarshaler.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *ID) UnmarshalText(b []byte) (err error) {
	*id, err = ParseID(string(b))
	return err
}

// SetIndex numbers the replica sets of a volume from 0.
type SetIndex uint16

// SetID names one replica set of one volume.
type SetID struct {
	Volume VolumeID
	Index  SetIndex
}

func (s SetID) String() string { return fmt.Sprintf("%s/%d", s.Volume, s.Index) }

// Epoch numbers the configurations of one replica set, from 1. A message with
// an older epoch is refused, always.
type Epoch uint64

// Pos is the position of a change in a set's op log. Seq counts changes from 1
// without gaps and without regard to epochs; Epoch tells which primary gave the
// position. Two logs that agree on a Pos agree on everything before it.
// The zero Pos is the start of the log, before any change.
type Pos struct {
	Epoch Epoch
	Seq   uint64
}

// Compare orders positions by epoch, then sequence: −1, 0 or +1.
func (p Pos) Compare(q Pos) int {
	switch {
	case p.Epoch != q.Epoch:
		if p.Epoch < q.Epoch {
			return -1
		}
		return 1
	case p.Seq != q.Seq:
		if p.Seq < q.Seq {
			return -1
		}
		return 1
	}
	return 0
}

func (p Pos) String() string { return fmt.Sprintf("%d.%d", p.Epoch, p.Seq) }

// SessionID names one client session of a set. It is random, chosen by the
// client, and bound to the TLS identity or socket credentials that opened it.
type SessionID uint64

func (s SessionID) String() string { return fmt.Sprintf("%016x", uint64(s)) }
