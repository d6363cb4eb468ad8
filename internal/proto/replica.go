package proto

import (
	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
)

// Kinds of the conversation between the replicas of a set. Every one of them
// is wrapped in an Envelope, which says which brick talks to which.
const (
	// Calls.
	KindForward  uint8 = 32 // Forward → DoReply: a home hands a request to the primary
	KindSeal     uint8 = 33 // Seal → SealReply: the control plane takes an epoch away
	KindHeal     uint8 = 34 // opaque → opaque: the comparison of two bricks (package brick)
	KindHealOpen uint8 = 35 // HealOpen → HealOpenReply
	KindDigest   uint8 = 36 // Digest → DigestReply
	KindBlock    uint8 = 37 // Block → BlockReply: what has rotted on one brick is asked of another

	// One-way.
	KindProbe     uint8 = 48 // primary → backup: where does your log stand?
	KindProbeAck  uint8 = 49
	KindAppend    uint8 = 50 // primary → backup: entries
	KindAppendAck uint8 = 51
	KindBeat      uint8 = 52 // primary → backup: heartbeat, commit and lease
	KindBeatAck   uint8 = 53
	KindSync      uint8 = 54 // primary → backup: make durable
	KindSyncAck   uint8 = 55
	KindReapAsk   uint8 = 56 // primary → backup: who holds these inodes?
	KindReapTell  uint8 = 57
	KindCommitAsk uint8 = 58 // backup → primary: tell me when this is committed
	KindHealOrder uint8 = 59 // primary → backup: your log cannot be continued, compare
	KindRelease   uint8 = 60 // former primary → new one: I hold no lease any more
	KindRecallAsk uint8 = 61 // backup → primary: have the window of a file closed
	KindRecallAll uint8 = 62 // primary → backup: tell the session, if it is yours
	KindRecalling uint8 = 63 // backup → primary: it is mine, its lease holds, and it was told
)

// Envelope is in front of every message between replicas.
type Envelope struct {
	Set      cluster.SetID
	From, To cluster.BrickID
}

func (m *Envelope) Code(c *codec.Coder) {
	SetID(c, &m.Set)
	ID(c, &m.From)
	ID(c, &m.To)
}

// MaxHistory bounds the epochs that a log remembers.
const MaxHistory = 4096

// history codes the first positions of the epochs of a log.
func history(c *codec.Coder, h *[]cluster.Pos) { codec.Slice(c, h, MaxHistory, Pos) }

// Forward carries a client's request from its home to the primary of the epoch. Turn is
// that of the session's Attach there: once the client has asked through a newer home,
// what an older one forwarded is not carried out any more.
type Forward struct {
	Session cluster.SessionID
	Turn    uint64
	Do      Do
}

func (m *Forward) Code(c *codec.Coder) {
	c.U64((*uint64)(&m.Session))
	c.U64(&m.Turn)
	m.Do.Code(c)
}

// Seal asks a brick to accept nothing more of Epoch and its elders, so that a
// new configuration can be made. With Planned the brick does not insist that
// its primary has been silent.
type Seal struct {
	Epoch   cluster.Epoch
	Planned bool
}

func (m *Seal) Code(c *codec.Coder) { c.U64((*uint64)(&m.Epoch)); c.Bool(&m.Planned) }

// SealReply answers Seal.
type SealReply struct {
	Sealed bool
	Text   string      // why not
	Tail   cluster.Pos // the end of the brick's log, which no longer moves
	// Trusted is true if the brick has kept every change it acknowledged: it has
	// not restarted uncleanly since it was last in sync.
	Trusted bool
	// Unfit is true if the brick is not sealed because it does not know its own
	// contents: it cannot lead, and nothing can be committed with it either.
	Unfit bool
}

func (m *SealReply) Code(c *codec.Coder) {
	c.Bool(&m.Sealed)
	c.String(&m.Text, 4096)
	Pos(c, &m.Tail)
	c.Bool(&m.Trusted)
	c.Bool(&m.Unfit)
}

// HealOpen asks the primary for a snapshot to compare with.
type HealOpen struct{ Epoch cluster.Epoch }

func (m *HealOpen) Code(c *codec.Coder) { c.U64((*uint64)(&m.Epoch)) }

// HealOpenReply names the snapshot.
type HealOpenReply struct {
	Status Status
	Text   string
	Handle uint64 // prefix of every Heal message about this snapshot
	Pos    cluster.Pos
}

func (m *HealOpenReply) Code(c *codec.Coder) {
	c.U8((*uint8)(&m.Status))
	c.String(&m.Text, 4096)
	c.U64(&m.Handle)
	Pos(c, &m.Pos)
}

// Digest asks a replica for the digest of its state at position At.
type Digest struct {
	Epoch cluster.Epoch
	At    uint64
}

func (m *Digest) Code(c *codec.Coder) { c.U64((*uint64)(&m.Epoch)); c.U64(&m.At) }

// DigestReply answers Digest.
type DigestReply struct {
	Status Status
	Text   string
	At     cluster.Pos
	Sum    [16]byte
	Inodes uint64
	Bytes  uint64
}

func (m *DigestReply) Code(c *codec.Coder) {
	c.U8((*uint8)(&m.Status))
	c.String(&m.Text, 4096)
	Pos(c, &m.At)
	c.Array(m.Sum[:])
	c.U64(&m.Inodes)
	c.U64(&m.Bytes)
}

// Block asks a replica for one block of a file's contents.
type Block struct {
	Ino   fsop.Ino
	Block uint64
}

func (m *Block) Code(c *codec.Coder) { m.Ino.Code(c); c.U64(&m.Block) }

// MaxBlock bounds the bytes of a block.
const MaxBlock = 128 << 10

// BlockReply answers Block.
type BlockReply struct {
	Status  Status
	Text    string
	Content cluster.Pos // of the file whose contents these are; zero: not known
	Data    []byte      // less what is behind the file's end
}

func (m *BlockReply) Code(c *codec.Coder) {
	c.U8((*uint8)(&m.Status))
	c.String(&m.Text, 4096)
	Pos(c, &m.Content)
	c.Bytes(&m.Data, MaxBlock)
}

// Probe opens a conversation with a backup, once per connection and epoch.
type Probe struct {
	Config cluster.SetConfig // the primary's; a backup that knows only an older one adopts it
	Round  uint64            // echoed; answers to older rounds are ignored
	Tail   cluster.Pos
}

func (m *Probe) Code(c *codec.Coder) {
	setConfig(c, &m.Config)
	c.U64(&m.Round)
	Pos(c, &m.Tail)
}

// MaxReplicas bounds the bricks of one set.
const MaxReplicas = 16

func setConfig(c *codec.Coder, s *cluster.SetConfig) {
	SetID(c, &s.Set)
	c.U64((*uint64)(&s.Epoch))
	ID(c, &s.Primary)
	codec.Slice(c, &s.Members, MaxReplicas, ID)
	codec.Slice(c, &s.InSync, MaxReplicas, ID)
	n := uint8(s.MinInSync)
	c.U8(&n)
	s.MinInSync = int(n)
	Pos(c, &s.Floor)
	codec.Slice(c, &s.Drained, MaxReplicas, ID)
}

// ProbeAck tells the primary where the backup's log stands.
type ProbeAck struct {
	Epoch   cluster.Epoch
	Round   uint64
	Tail    cluster.Pos
	History []cluster.Pos // first position of each epoch in the log, oldest first
	// Whole is false while the brick's contents are unknown (new, damaged, or in
	// the middle of a comparison): only a comparison can bring it back.
	Whole bool
}

func (m *ProbeAck) Code(c *codec.Coder) {
	c.U64((*uint64)(&m.Epoch))
	c.U64(&m.Round)
	Pos(c, &m.Tail)
	history(c, &m.History)
	c.Bool(&m.Whole)
}

// Append streams entries. Prev is the position just before the first of them;
// a backup whose log has something else there says so with a ProbeAck.
type Append struct {
	Epoch  cluster.Epoch
	Round  uint64
	Prev   cluster.Pos
	Commit uint64
	// Entries are encoded Entry values. An entry with no bytes stands for a
	// request that this very backup forwarded: it makes the entry from Stub and
	// the request it still has, so payload crosses the wire once.
	Entries []AppendEntry
}

// AppendEntry is one entry of an Append, whole or as a stub.
type AppendEntry struct {
	Raw  []byte // encoded Entry; nil for a stub
	Stub Stub
}

// Stub is an entry less its op.
type Stub struct {
	Pos     cluster.Pos
	Time    int64
	Session cluster.SessionID
	Number  uint64
	Acked   uint64
}

func (m *Append) Code(c *codec.Coder) {
	c.U64((*uint64)(&m.Epoch))
	c.U64(&m.Round)
	Pos(c, &m.Prev)
	c.U64(&m.Commit)
	codec.Slice(c, &m.Entries, 1<<16, func(c *codec.Coder, e *AppendEntry) {
		c.Bytes(&e.Raw, MaxEntry)
		if len(e.Raw) > 0 {
			return
		}
		s := &e.Stub
		Pos(c, &s.Pos)
		c.I64(&s.Time)
		c.U64((*uint64)(&s.Session))
		c.U64(&s.Number)
		c.U64(&s.Acked)
	})
}

// MaxEntry bounds one encoded Entry: a full Write, and its head.
const MaxEntry = fsop.MaxData + 4096

// AppendAck says that the backup has logged and applied everything up to Seq,
// and that no cache of its sessions contradicts it.
type AppendAck struct {
	Epoch cluster.Epoch
	Round uint64
	Seq   uint64
}

func (m *AppendAck) Code(c *codec.Coder) {
	c.U64((*uint64)(&m.Epoch))
	c.U64(&m.Round)
	c.U64(&m.Seq)
}

// Beat is the primary's heartbeat. It asks for a lease and grants one.
type Beat struct {
	Epoch  cluster.Epoch
	Round  uint64
	Stamp  uint64 // the primary's own clock, opaque to the backup
	Commit uint64
	Tail   uint64
	// Grant, in nanoseconds, is for how long after it sent the BeatAck with the
	// Stamp Echo the backup may serve reads; 0 if the primary does not count it
	// as in sync. It never outlives the primary's own lease, counted from when
	// the BeatAck arrived, so whoever outwaits the primary outwaits its backups.
	Grant uint64
	Echo  uint64 // Stamp of the last BeatAck the primary received
	Room  uint64 // how many bytes every in-sync brick can still take; 0: the primary does not know
}

func (m *Beat) Code(c *codec.Coder) {
	c.U64((*uint64)(&m.Epoch))
	c.U64(&m.Round)
	c.U64(&m.Stamp)
	c.U64(&m.Commit)
	c.U64(&m.Tail)
	c.U64(&m.Grant)
	c.U64(&m.Echo)
	c.U64(&m.Room)
}

// BeatAck answers Beat: the primary may serve reads until cluster.Lease after
// it sent the Beat with that Stamp, as far as this backup is concerned.
type BeatAck struct {
	Epoch    cluster.Epoch
	Round    uint64
	Echo     uint64 // Stamp of the Beat
	Stamp    uint64 // the backup's own clock, opaque to the primary
	Applied  uint64
	Acked    uint64              // as in AppendAck, which may have been lost
	Sessions []cluster.SessionID // attached here and alive
	Free     uint64              // bytes that the brick can still take
}

func (m *BeatAck) Code(c *codec.Coder) {
	c.U64((*uint64)(&m.Epoch))
	c.U64(&m.Round)
	c.U64(&m.Echo)
	c.U64(&m.Stamp)
	c.U64(&m.Applied)
	c.U64(&m.Acked)
	codec.Slice(c, &m.Sessions, 1<<20, func(c *codec.Coder, s *cluster.SessionID) { c.U64((*uint64)(s)) })
	c.U64(&m.Free)
}

// Sync asks a backup to make its log durable up to Seq.
type Sync struct {
	Epoch cluster.Epoch
	Seq   uint64
	// Alone says that nobody waits for the entries before this message but those
	// who wait for the flush: their AppendAck may come with the SyncAck.
	Alone bool
}

func (m *Sync) Code(c *codec.Coder) {
	c.U64((*uint64)(&m.Epoch))
	c.U64(&m.Seq)
	c.Bool(&m.Alone)
}

// SyncAck says that everything up to Seq is durable on the backup.
type SyncAck struct {
	Epoch cluster.Epoch
	Seq   uint64
}

func (m *SyncAck) Code(c *codec.Coder) { c.U64((*uint64)(&m.Epoch)); c.U64(&m.Seq) }

// ReapAsk asks which of these unlinked inodes the backup's sessions hold.
type ReapAsk struct {
	Epoch cluster.Epoch
	Round uint64
	Inos  []fsop.Ino
}

func (m *ReapAsk) Code(c *codec.Coder) {
	c.U64((*uint64)(&m.Epoch))
	c.U64(&m.Round)
	codec.Slice(c, &m.Inos, 1<<16, func(c *codec.Coder, i *fsop.Ino) { i.Code(c) })
}

// ReapTell answers ReapAsk.
type ReapTell struct {
	Epoch    cluster.Epoch
	Round    uint64
	Sessions []cluster.SessionID // attached here
	Held     []fsop.Ino          // of those asked about
}

func (m *ReapTell) Code(c *codec.Coder) {
	c.U64((*uint64)(&m.Epoch))
	c.U64(&m.Round)
	codec.Slice(c, &m.Sessions, 1<<20, func(c *codec.Coder, s *cluster.SessionID) { c.U64((*uint64)(s)) })
	codec.Slice(c, &m.Held, 1<<16, func(c *codec.Coder, i *fsop.Ino) { i.Code(c) })
}

// CommitAsk asks the primary for a Beat as soon as Seq is committed.
type CommitAsk struct {
	Epoch cluster.Epoch
	Seq   uint64
}

func (m *CommitAsk) Code(c *codec.Coder) { c.U64((*uint64)(&m.Epoch)); c.U64(&m.Seq) }

// HealOrder tells a backup that its log and the primary's have nothing in
// common that the primary still has: it must compare the two bricks.
type HealOrder struct {
	Epoch cluster.Epoch
	Round uint64
}

func (m *HealOrder) Code(c *codec.Coder) { c.U64((*uint64)(&m.Epoch)); c.U64(&m.Round) }

// Release says that its sender holds no lease of any epoch up to Epoch.
type Release struct{ Epoch cluster.Epoch }

func (m *Release) Code(c *codec.Coder) { c.U64((*uint64)(&m.Epoch)) }

// RecallAsk asks the primary to have the window of a file or directory closed.
type RecallAsk struct {
	Epoch cluster.Epoch
	Ino   fsop.Ino
}

func (m *RecallAsk) Code(c *codec.Coder) { c.U64((*uint64)(&m.Epoch)); m.Ino.Code(c) }

// RecallAll asks the home of Session to send it a Recall.
type RecallAll struct {
	Epoch   cluster.Epoch
	Ino     fsop.Ino
	Session cluster.SessionID
}

func (m *RecallAll) Code(c *codec.Coder) {
	c.U64((*uint64)(&m.Epoch))
	m.Ino.Code(c)
	c.U64((*uint64)(&m.Session))
}

// Recalling answers a RecallAll: the session, whose home this is, is alive and was told.
type Recalling struct {
	Epoch   cluster.Epoch
	Ino     fsop.Ino
	Session cluster.SessionID
}

func (m *Recalling) Code(c *codec.Coder) {
	c.U64((*uint64)(&m.Epoch))
	m.Ino.Code(c)
	c.U64((*uint64)(&m.Session))
}
