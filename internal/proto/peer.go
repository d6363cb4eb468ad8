package proto

import (
	"errors"

	"mortar/internal/cluster"
	"mortar/internal/codec"
)

// Kinds of the conversation between the daemons of two peers, besides those of
// the replicas that they carry. Every reply to a call on such a connection is an
// answer (see Answer), also to a replica's call.
const (
	// Calls.
	KindHello   uint8 = 64 // Hello → HelloReply: the first of every connection
	KindAlive   uint8 = 65 // nothing → nothing: are you there?
	KindControl uint8 = 66 // opaque → opaque: what packages control say to each other
)

// Hello says who dialed. The peer's id is that of its certificate.
type Hello struct {
	Version uint16
	Pool    cluster.ID
	// Boot is a random number of this run of the daemon. Two connections of one
	// peer with different ones come from a restart, or from a clone.
	Boot uint64
	Port uint16 // where the daemon listens
}

func (m *Hello) Code(c *codec.Coder) {
	c.U16(&m.Version)
	ID(c, &m.Pool)
	c.U64(&m.Boot)
	c.U16(&m.Port)
}

// HelloStatus is what becomes of a connection.
type HelloStatus uint8

const (
	Welcome      HelloStatus = 0
	HelloRefused HelloStatus = 1 // see Text
	HelloCloned  HelloStatus = 2 // another live machine has the same identity; see Text
	HelloGone    HelloStatus = 3 // the pool has detached this peer
)

// HelloReply answers Hello.
type HelloReply struct {
	Status  HelloStatus
	Text    string
	Version uint16
	Boot    uint64 // of the answering daemon
	// Map is the version of the cluster map that the answer goes by. A peer that
	// knows a newer one does not believe what is said about its membership.
	Map uint64
	// Seen is the address that the connection came from, as the answering side sees it.
	Seen string
}

func (m *HelloReply) Code(c *codec.Coder) {
	c.U8((*uint8)(&m.Status))
	c.String(&m.Text, 4096)
	c.U16(&m.Version)
	c.U64(&m.Boot)
	c.U64(&m.Map)
	c.String(&m.Seen, 255)
}

// Answer puts the outcome of a call between peers into the parts of its reply:
// a byte that is 0 and the body, or 1 and the text of the error.
func Answer(body []byte, err error) [][]byte {
	if err == nil {
		return [][]byte{{0}, body}
	}
	text := err.Error()
	if text == "" {
		text = "unknown error"
	}
	if len(text) > 4096 {
		text = text[:4096]
	}
	return [][]byte{{1}, []byte(text)}
}

// ParseAnswer takes an answer apart again. The body aliases b.
func ParseAnswer(b []byte) (body []byte, err error) {
	switch {
	case len(b) > 0 && b[0] == 0:
		return b[1:], nil
	case len(b) > 1 && b[0] == 1:
		return nil, errors.New(string(b[1:]))
	}
	return nil, codec.ErrMalformed
}
