// Package proto has every message that crosses a process border between mortar
// programs, and nothing that acts on them. doc/protocol.md tells the
// conversations; this package is the dictionary.
//
// A message is a codec.Coded struct. Its kind is a byte in the frame (package
// wire), from the lists below; a kind is never reused for something else. What
// changes the meaning of a message changes Version, and peers of different
// versions refuse each other by name of both versions.
package proto

import (
	"fmt"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
)

// Version is the version of everything in this package.
const Version uint16 = 8

// Entry is one change in a set's op log: what is logged, streamed to backups,
// and applied. Everything that apply needs to be deterministic is in it.
type Entry struct {
	Pos     cluster.Pos
	Time    int64             // the primary's clock, ns since 1970; grows strictly with Seq
	Session cluster.SessionID // who asked; 0 for the system itself
	Number  uint64            // the session's number for the request
	Acked   uint64            // the session has the replies to all its numbers below this
	Op      fsop.Op
}

// Code implements codec.Coded. The op is last, and of a Write its data, so the
// payload is the tail of an encoded entry.
func (e *Entry) Code(c *codec.Coder) {
	Pos(c, &e.Pos)
	c.I64(&e.Time)
	c.U64((*uint64)(&e.Session))
	c.U64(&e.Number)
	c.U64(&e.Acked)
	fsop.Code(c, &e.Op)
}

func (e *Entry) String() string {
	return fmt.Sprintf("%v %v#%d %s", e.Pos, e.Session, e.Number, fsop.String(e.Op))
}

// Effect is something that caches may hold and an entry made untrue.
type Effect struct {
	Ino fsop.Ino // its attributes, contents or entries changed
	// Name, if set, is an entry of directory Ino that came, went or now means
	// another inode.
	Name string
	// Rights: Ino has another owner or group, or is a directory that became sticky
	// or ceased to be. Kernels check some rights against what they last knew of
	// those, without asking whether it is still true.
	Rights bool
	// Names: nobody tells any more what becomes of the entries of directory Ino, absent
	// ones included: another session has its window.
	Names bool
}

// Code implements codec.Coded.
func (e *Effect) Code(c *codec.Coder) {
	e.Ino.Code(c)
	c.Bool(&e.Rights)
	c.Bool(&e.Names)
	c.String(&e.Name, fsop.MaxName)
}

// Pos codes a position.
func Pos(c *codec.Coder, p *cluster.Pos) {
	c.U64((*uint64)(&p.Epoch))
	c.U64(&p.Seq)
}

// ID codes an identity.
func ID(c *codec.Coder, id *cluster.ID) { c.Array(id[:]) }

// SetID codes the name of a replica set.
func SetID(c *codec.Coder, s *cluster.SetID) {
	ID(c, &s.Volume)
	c.U16((*uint16)(&s.Index))
}
