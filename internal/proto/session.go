package proto

import (
	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
)

// Kinds of the conversation between a client and the daemon of its home replica.
const (
	// Calls by the client.
	KindAttach uint8 = 1 // Attach → AttachReply
	KindDo     uint8 = 2 // Do → DoReply
	KindPing   uint8 = 3 // Ping → Pong
	KindGetMap uint8 = 4 // GetMap → VolumeMap
	KindDied   uint8 = 5 // Died → nothing: the daemon of the client's machine has ended
	// One-way, by the client.
	KindForget   uint8 = 8  // Forget
	KindInvalAck uint8 = 9  // InvalAck
	KindHold     uint8 = 10 // Forget, before an Attach: more Holds than fit into it
	KindLapsed   uint8 = 11 // no body: the client leaves, and has dropped what it had cached
	// One-way, by the daemon.
	KindInval     uint8 = 16 // Inval
	KindVolumeMap uint8 = 17 // VolumeMap, whenever it changes
	KindDetached  uint8 = 18 // Detached: this replica serves the session no longer
	KindRecall    uint8 = 19 // Recall: somebody wants to see a file whose window the session holds
)

// Attach binds a session to a replica, which becomes its home. A new session is
// opened. One that was opened before, and that the set does not remember, is
// refused (SessionEnded): what it did not get an answer to may have been carried out.
type Attach struct {
	Version uint16
	Set     cluster.SetID
	Session cluster.SessionID
	Opened  int64  // as AttachReply said; 0: the session is new
	Turn    uint64 // counts what the client has asked: one that a later one has overtaken is refused
	Client  string // host and mount point, for people
	// Holds are the inodes that the client's kernel still knows: unlinked ones
	// among them must live on. They replace what this replica knew of the session.
	Holds []Hold
}

// Hold counts how often an inode was given to a client: once for every reply
// that named it as its result (Lookup, Create, Mkdir, Mknod, Symlink, Link, and
// each entry of a Readdir with Plus), exactly as the kernel counts lookups
// (fuse_forget_in.nlookup). A replica and its client count alike, so a Forget
// that crosses a reply on the wire takes away only what it had seen.
type Hold struct {
	Ino fsop.Ino
	N   uint64
}

// Code implements codec.Coded.
func (h *Hold) Code(c *codec.Coder) { h.Ino.Code(c); c.U64(&h.N) }

func (m *Attach) Code(c *codec.Coder) {
	c.U16(&m.Version)
	SetID(c, &m.Set)
	c.U64((*uint64)(&m.Session))
	c.I64(&m.Opened)
	c.U64(&m.Turn)
	c.String(&m.Client, 1024)
	codec.Slice(c, &m.Holds, 4<<20, func(c *codec.Coder, h *Hold) { h.Code(c) })
}

// Status says why a request was not carried out, or that it was.
type Status uint8

const (
	OK           Status = 0
	Refused      Status = 1 // see Text; asking again is useless
	NotServing   Status = 2 // this replica cannot serve now; try another, or this one later
	UnknownSet   Status = 3 // no such set or brick here; fetch the map again
	WrongVersion Status = 4 // see Text
	SessionEnded Status = 5 // the session is no more; a new one may be opened
	Anew         Status = 6 // what was asked in an older epoch ends with it; ask again here, in the one that is said
)

// AttachReply answers Attach. On success the client drops every cache it has
// kept from another home. What says WrongVersion has been laid out like this since
// version 5 and stays so: a client of any other version has to read it.
type AttachReply struct {
	Status Status
	Text   string // for people, when not OK
	Seq    uint64 // the replica's position; nothing cached may be older
	Opened int64  // when the session was opened, by the primary's clock; for the next Attach
	Epoch  cluster.Epoch
}

func (m *AttachReply) Code(c *codec.Coder) {
	c.U8((*uint8)(&m.Status))
	c.String(&m.Text, 4096)
	c.U64(&m.Seq)
	c.I64(&m.Opened)
	if m.Status != WrongVersion {
		c.U64((*uint64)(&m.Epoch))
	}
}

// Do asks for one operation. Number counts the session's mutations from 1;
// it is 0 for operations that change nothing.
type Do struct {
	Number uint64
	Acked  uint64 // replies to all numbers below this have arrived
	// Epoch is the set's as this home said last. A change is carried out in the epoch in
	// which it was asked for, or never.
	Epoch cluster.Epoch
	Op    fsop.Op
}

// MaxAhead is how far a session's numbers may run ahead of the oldest change that has no
// answer, waits for locks not counted. Replicas remember at least so many answers.
const MaxAhead = 4096

func (m *Do) Code(c *codec.Coder) {
	c.U64(&m.Number)
	c.U64(&m.Acked)
	c.U64((*uint64)(&m.Epoch))
	fsop.Code(c, &m.Op)
}

// DoReply answers Do.
type DoReply struct {
	Status Status
	Epoch  cluster.Epoch // to ask in, if Status is Anew
	Errno  fsop.Errno    // of the file system, if Status is OK
	Reply  fsop.Reply    // if Errno is 0; Seq also with an errno
}

func (m *DoReply) Code(c *codec.Coder) {
	c.U8((*uint8)(&m.Status))
	c.U64((*uint64)(&m.Epoch))
	c.U16((*uint16)(&m.Errno))
	m.Reply.Code(c)
}

// Ping renews the session's cache lease: if the answer arrives, the client may
// answer from its caches for as long as the answer says, from when it sent the Ping.
type Ping struct{ Stamp uint64 }

func (m *Ping) Code(c *codec.Coder) { c.U64(&m.Stamp) }

// Pong answers Ping. Serving is false when the replica has no lease itself; the
// client's is then not renewed.
type Pong struct {
	Stamp   uint64
	Serving bool
	// Lease, in nanoseconds, is what is left of the replica's own, and at most cluster.Lease:
	// who outwaits the replica outwaits its clients.
	Lease uint64
}

func (m *Pong) Code(c *codec.Coder) { c.U64(&m.Stamp); c.Bool(&m.Serving); c.U64(&m.Lease) }

// Died certifies that the life Boot (Hello.Boot) of the daemon of the client's own machine has
// ended, and that no client of that daemon answers from a cache any more. A client says
// it to the daemons of other machines; it has the key of its own.
type Died struct{ Boot uint64 }

func (m *Died) Code(c *codec.Coder) { c.U64(&m.Boot) }

// Forget takes N from the count of each inode. At zero the client's kernel no
// longer knows it, nor any name in it. A reply that the client dropped instead
// of giving it to its kernel is forgotten at once.
type Forget struct{ Holds []Hold }

func (m *Forget) Code(c *codec.Coder) {
	codec.Slice(c, &m.Holds, 1<<20, func(c *codec.Coder, h *Hold) { h.Code(c) })
}

// Inval tells a session what of its caches is no longer true. The change is
// acknowledged to whoever made it only after the session's InvalAck (or the end
// of its lease). Invals reach a session in the order of Seq.
type Inval struct {
	Seq     uint64
	Effects []Effect
}

func (m *Inval) Code(c *codec.Coder) {
	c.U64(&m.Seq)
	codec.Slice(c, &m.Effects, 1<<16, func(c *codec.Coder, e *Effect) { e.Code(c) })
}

// InvalAck says that the Inval with that very Seq has been carried out.
type InvalAck struct{ Seq uint64 }

func (m *InvalAck) Code(c *codec.Coder) { c.U64(&m.Seq) }

// GetMap asks for what a client needs to know of a volume.
type GetMap struct{ Volume string }

func (m *GetMap) Code(c *codec.Coder) { c.String(&m.Volume, 255) }

// VolumeMap tells a client where a volume's replicas are.
type VolumeMap struct {
	Status  Status
	Text    string
	Version uint64 // of the cluster map
	Volume  cluster.VolumeID
	Options []Option
	Serves  bool // who says it has a brick in sync, and can be home
	Bricks  []BrickAddr
}

// Option is one effective volume option that concerns clients.
type Option struct{ Key, Value string }

// BrickAddr says where a brick is served.
type BrickAddr struct {
	Set    cluster.SetIndex
	Brick  cluster.BrickID
	Peer   cluster.PeerID
	Addrs  []string // host:port, best first
	InSync bool
}

func (m *VolumeMap) Code(c *codec.Coder) {
	c.U8((*uint8)(&m.Status))
	c.String(&m.Text, 4096)
	c.U64(&m.Version)
	ID(c, &m.Volume)
	codec.Slice(c, &m.Options, 1000, func(c *codec.Coder, o *Option) {
		c.String(&o.Key, 255)
		c.String(&o.Value, 4096)
	})
	c.Bool(&m.Serves)
	codec.Slice(c, &m.Bricks, 10000, func(c *codec.Coder, b *BrickAddr) {
		c.U16((*uint16)(&b.Set))
		ID(c, &b.Brick)
		ID(c, &b.Peer)
		codec.Slice(c, &b.Addrs, 16, func(c *codec.Coder, s *string) { c.String(s, 255) })
		c.Bool(&b.InSync)
	})
}

// Detached ends the replica's service to the session, with the reason.
type Detached struct{ Text string }

func (m *Detached) Code(c *codec.Coder) { c.String(&m.Text, 4096) }

// Recall asks the session to send everything it has written to a file, or has
// told of new files in a directory, and to close the window (fsop.Window).
type Recall struct{ Ino fsop.Ino }

func (m *Recall) Code(c *codec.Coder) { m.Ino.Code(c) }
