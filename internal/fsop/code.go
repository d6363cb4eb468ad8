package fsop

import "mortar/internal/codec"

type coded = codec.Coded

// The kinds. Reads are below firstMutation.
const (
	KindLookup    Kind = 1
	KindGetattr   Kind = 2
	KindReadlink  Kind = 3
	KindRead      Kind = 4
	KindReaddir   Kind = 5
	KindStatfs    Kind = 6
	KindGetxattr  Kind = 7
	KindListxattr Kind = 8
	KindSeek      Kind = 9
	KindGetlk     Kind = 10
	KindFsync     Kind = 11
	KindFlush     Kind = 12

	firstMutation Kind = 32

	KindSetattr     Kind = 32
	KindCreate      Kind = 33
	KindMkdir       Kind = 34
	KindMknod       Kind = 35
	KindSymlink     Kind = 36
	KindLink        Kind = 37
	KindUnlink      Kind = 38
	KindRmdir       Kind = 39
	KindRename      Kind = 40
	KindWrite       Kind = 41
	KindFallocate   Kind = 42
	KindSetxattr    Kind = 43
	KindRemovexattr Kind = 44
	KindSetlk       Kind = 45
	KindCloseWindow Kind = 46
	KindReserve     Kind = 47
	KindMake        Kind = 48
	KindUse         Kind = 49
	KindTmpfile     Kind = 50
	KindOpenWindow  Kind = 51

	// Operations of the system itself, never accepted from a mount.
	KindOpenSession  Kind = 64
	KindCloseSession Kind = 65
	KindReap         Kind = 66
	KindNoop         Kind = 67

	KindMakeSubvolume   Kind = 68
	KindLimitSubvolume  Kind = 69
	KindRemoveSubvolume Kind = 70
	KindSweep           Kind = 71
)

var kinds = [...]struct {
	name string
	make func() Op
}{
	KindLookup:       {"lookup", func() Op { return new(Lookup) }},
	KindGetattr:      {"getattr", func() Op { return new(Getattr) }},
	KindReadlink:     {"readlink", func() Op { return new(Readlink) }},
	KindRead:         {"read", func() Op { return new(Read) }},
	KindReaddir:      {"readdir", func() Op { return new(Readdir) }},
	KindStatfs:       {"statfs", func() Op { return new(StatfsOp) }},
	KindGetxattr:     {"getxattr", func() Op { return new(Getxattr) }},
	KindListxattr:    {"listxattr", func() Op { return new(Listxattr) }},
	KindSeek:         {"seek", func() Op { return new(Seek) }},
	KindGetlk:        {"getlk", func() Op { return new(Getlk) }},
	KindFsync:        {"fsync", func() Op { return new(Fsync) }},
	KindFlush:        {"flush", func() Op { return new(Flush) }},
	KindSetattr:      {"setattr", func() Op { return new(Setattr) }},
	KindCreate:       {"create", func() Op { return new(Create) }},
	KindMkdir:        {"mkdir", func() Op { return new(Mkdir) }},
	KindMknod:        {"mknod", func() Op { return new(Mknod) }},
	KindSymlink:      {"symlink", func() Op { return new(Symlink) }},
	KindLink:         {"link", func() Op { return new(Link) }},
	KindUnlink:       {"unlink", func() Op { return new(Unlink) }},
	KindRmdir:        {"rmdir", func() Op { return new(Rmdir) }},
	KindRename:       {"rename", func() Op { return new(Rename) }},
	KindWrite:        {"write", func() Op { return new(Write) }},
	KindFallocate:    {"fallocate", func() Op { return new(Fallocate) }},
	KindSetxattr:     {"setxattr", func() Op { return new(Setxattr) }},
	KindRemovexattr:  {"removexattr", func() Op { return new(Removexattr) }},
	KindSetlk:        {"setlk", func() Op { return new(Setlk) }},
	KindCloseWindow:  {"close-window", func() Op { return new(CloseWindow) }},
	KindReserve:      {"reserve", func() Op { return new(Reserve) }},
	KindMake:         {"make", func() Op { return new(Make) }},
	KindUse:          {"use", func() Op { return new(Use) }},
	KindTmpfile:      {"tmpfile", func() Op { return new(Tmpfile) }},
	KindOpenWindow:   {"open-window", func() Op { return new(OpenWindow) }},
	KindOpenSession:  {"open-session", func() Op { return new(OpenSession) }},
	KindCloseSession: {"close-session", func() Op { return new(CloseSession) }},
	KindReap:         {"reap", func() Op { return new(Reap) }},
	KindNoop:         {"noop", func() Op { return new(Noop) }},

	KindMakeSubvolume:   {"make-subvolume", func() Op { return new(MakeSubvolume) }},
	KindLimitSubvolume:  {"limit-subvolume", func() Op { return new(LimitSubvolume) }},
	KindRemoveSubvolume: {"remove-subvolume", func() Op { return new(RemoveSubvolume) }},
	KindSweep:           {"sweep", func() Op { return new(Sweep) }},
}

// Code codes an operation with its kind in front.
func Code(c *codec.Coder, op *Op) {
	var k uint8
	if !c.Decoding() {
		k = uint8((*op).Kind())
	}
	c.U8(&k)
	if c.Decoding() {
		if c.Err() != nil {
			return
		}
		if int(k) >= len(kinds) || kinds[k].make == nil {
			c.Fail("unknown operation %d", k)
			return
		}
		*op = kinds[k].make()
	}
	(*op).Code(c)
}

// Any is an Op as a codec.Coded value, kind included.
type Any struct{ Op Op }

// Code implements codec.Coded.
func (a *Any) Code(c *codec.Coder) { Code(c, &a.Op) }

// Append appends op, kind included, to b.
func Append(b []byte, op Op) []byte { return codec.Append(b, &Any{op}) }

// Decode reads an operation that fills b exactly. Its byte slices alias b.
func Decode(b []byte) (Op, error) {
	var a Any
	if err := codec.Decode(b, &a); err != nil {
		return nil, err
	}
	return a.Op, nil
}

func (*Lookup) Kind() Kind       { return KindLookup }
func (*Getattr) Kind() Kind      { return KindGetattr }
func (*Readlink) Kind() Kind     { return KindReadlink }
func (*Read) Kind() Kind         { return KindRead }
func (*Readdir) Kind() Kind      { return KindReaddir }
func (*StatfsOp) Kind() Kind     { return KindStatfs }
func (*Getxattr) Kind() Kind     { return KindGetxattr }
func (*Listxattr) Kind() Kind    { return KindListxattr }
func (*Seek) Kind() Kind         { return KindSeek }
func (*Getlk) Kind() Kind        { return KindGetlk }
func (*Fsync) Kind() Kind        { return KindFsync }
func (*Flush) Kind() Kind        { return KindFlush }
func (*OpenWindow) Kind() Kind   { return KindOpenWindow }
func (*CloseWindow) Kind() Kind  { return KindCloseWindow }
func (*Reserve) Kind() Kind      { return KindReserve }
func (*Make) Kind() Kind         { return KindMake }
func (*Setattr) Kind() Kind      { return KindSetattr }
func (*Create) Kind() Kind       { return KindCreate }
func (*Mkdir) Kind() Kind        { return KindMkdir }
func (*Mknod) Kind() Kind        { return KindMknod }
func (*Symlink) Kind() Kind      { return KindSymlink }
func (*Link) Kind() Kind         { return KindLink }
func (*Unlink) Kind() Kind       { return KindUnlink }
func (*Rmdir) Kind() Kind        { return KindRmdir }
func (*Rename) Kind() Kind       { return KindRename }
func (*Write) Kind() Kind        { return KindWrite }
func (*Fallocate) Kind() Kind    { return KindFallocate }
func (*Setxattr) Kind() Kind     { return KindSetxattr }
func (*Removexattr) Kind() Kind  { return KindRemovexattr }
func (*Setlk) Kind() Kind        { return KindSetlk }
func (*OpenSession) Kind() Kind  { return KindOpenSession }
func (*CloseSession) Kind() Kind { return KindCloseSession }
func (*Reap) Kind() Kind         { return KindReap }
func (*Noop) Kind() Kind         { return KindNoop }
func (*Use) Kind() Kind          { return KindUse }
func (*Tmpfile) Kind() Kind      { return KindTmpfile }

func (*MakeSubvolume) Kind() Kind   { return KindMakeSubvolume }
func (*LimitSubvolume) Kind() Kind  { return KindLimitSubvolume }
func (*RemoveSubvolume) Kind() Kind { return KindRemoveSubvolume }
func (*Sweep) Kind() Kind           { return KindSweep }

func (o *Lookup) Code(c *codec.Coder)   { o.Parent.Code(c); c.String(&o.Name, MaxName) }
func (o *Getattr) Code(c *codec.Coder)  { o.Ino.Code(c) }
func (o *Readlink) Code(c *codec.Coder) { o.Ino.Code(c) }
func (o *Read) Code(c *codec.Coder)     { o.Ino.Code(c); c.U64(&o.Off); c.U32(&o.Len) }
func (o *Readdir) Code(c *codec.Coder) {
	o.Ino.Code(c)
	c.U64(&o.Cookie)
	c.U32(&o.Max)
	c.Bool(&o.Plus)
}
func (o *StatfsOp) Code(c *codec.Coder)    { o.Ino.Code(c) }
func (o *Getxattr) Code(c *codec.Coder)    { o.Ino.Code(c); c.String(&o.Name, MaxName) }
func (o *Listxattr) Code(c *codec.Coder)   { o.Ino.Code(c) }
func (o *Seek) Code(c *codec.Coder)        { o.Ino.Code(c); c.U64(&o.Off); c.U32(&o.Whence) }
func (o *Getlk) Code(c *codec.Coder)       { o.Ino.Code(c); o.Lock.Code(c) }
func (o *Fsync) Code(c *codec.Coder)       { o.Ino.Code(c) }
func (o *Flush) Code(c *codec.Coder)       { o.Ino.Code(c) }
func (o *OpenWindow) Code(c *codec.Coder)  { o.Ino.Code(c) }
func (o *CloseWindow) Code(c *codec.Coder) { o.Ino.Code(c); c.U64(&o.Session) }
func (w *Window) code(c *codec.Coder) {
	c.U8((*uint8)(w))
	w.check(c)
}

func (w *Window) check(c *codec.Coder) {
	if *w&^(WindowAsk|WindowHeld|WindowDone) != 0 {
		c.Fail("window %d", *w)
	}
}

func (o *Setattr) Code(c *codec.Coder) {
	o.Ino.Code(c)
	c.U32(&o.Valid)
	c.U32(&o.Mode)
	c.U32(&o.UID)
	c.U32(&o.GID)
	c.U64(&o.Size)
	c.I64(&o.Atime)
	c.I64(&o.Mtime)
	c.U32((*uint32)(&o.Flags))
	o.Window.code(c)
}
func (n *Node) code(c *codec.Coder) {
	n.Parent.Code(c)
	c.String(&n.Name, MaxName)
	c.U32(&n.Mode)
	c.U32(&n.Umask)
	c.U32(&n.UID)
	c.U32(&n.GID)
}
func (o *Create) Code(c *codec.Coder)  { o.code(c); c.Bool(&o.Excl); o.Window.code(c) }
func (o *Tmpfile) Code(c *codec.Coder) { o.code(c); c.Bool(&o.Excl) }
func (o *Mkdir) Code(c *codec.Coder)   { o.code(c); o.Window.code(c) }
func (o *Reserve) Code(*codec.Coder)   {}
func (o *Make) Code(c *codec.Coder)    { o.code(c); o.First.Code(c) }
func (o *Mknod) Code(c *codec.Coder)   { o.code(c); c.U32(&o.Rdev) }
func (o *Symlink) Code(c *codec.Coder) { o.code(c); c.String(&o.Target, MaxTarget) }
func (o *Link) Code(c *codec.Coder)    { o.Ino.Code(c); o.Parent.Code(c); c.String(&o.Name, MaxName) }
func (o *Unlink) Code(c *codec.Coder)  { o.Parent.Code(c); c.String(&o.Name, MaxName) }
func (o *Rmdir) Code(c *codec.Coder)   { o.Parent.Code(c); c.String(&o.Name, MaxName) }
func (o *Rename) Code(c *codec.Coder) {
	o.Parent.Code(c)
	c.String(&o.Name, MaxName)
	o.NewParent.Code(c)
	c.String(&o.NewName, MaxName)
	c.U32(&o.Flags)
}

// Code puts the data last, so that a log record's payload is its tail.
func (o *Write) Code(c *codec.Coder) {
	o.Ino.Code(c)
	c.U64(&o.Off)
	c.Bool(&o.Append)
	c.Bool(&o.KillPriv)
	o.codeTold(c)
	c.Bool(&o.Sync)
	o.Then.Code(c)
	c.Bytes(&o.Data, MaxData)
}

// hasTold is set in the byte of Window if Told follows: it is rare, and logs from
// before there was such a thing are read as ever.
const hasTold = 0x80

func (o *Write) codeTold(c *codec.Coder) {
	b := uint8(o.Window)
	if o.Told != 0 {
		b |= hasTold
	}
	c.U8(&b)
	if w := Window(b &^ hasTold); w != o.Window { // whoever encodes shares it with others
		o.Window = w
	}
	o.Window.check(c)
	if b&hasTold != 0 {
		c.I64(&o.Told)
		if o.Told == 0 {
			c.Fail("a time that was told is missing")
		}
	}
}

func (o *Fallocate) Code(c *codec.Coder) {
	o.Ino.Code(c)
	c.U32(&o.Mode)
	c.U64(&o.Off)
	c.U64(&o.Len)
}
func (o *Setxattr) Code(c *codec.Coder) {
	o.Ino.Code(c)
	c.String(&o.Name, MaxName)
	c.Bytes(&o.Value, MaxXattr)
	c.U32(&o.Flags)
}
func (o *Removexattr) Code(c *codec.Coder) { o.Ino.Code(c); c.String(&o.Name, MaxName) }
func (o *Setlk) Code(c *codec.Coder)       { o.Ino.Code(c); o.Lock.Code(c); c.Bool(&o.Wait) }
func (o *OpenSession) Code(c *codec.Coder) {
	c.String(&o.Client, 1024)
	c.String(&o.Owner, 255)
	c.I64(&o.Opened)
}
func (o *CloseSession) Code(c *codec.Coder) { c.U64(&o.Session); c.Bool(&o.Away) }
func (o *Reap) Code(c *codec.Coder) {
	codec.Slice(c, &o.Inos, 1<<16, func(c *codec.Coder, i *Ino) { i.Code(c) })
}
func (o *Noop) Code(*codec.Coder) {}

func (o *Use) Code(c *codec.Coder) { o.Ino.Code(c); c.Bool(&o.Done) }
func (o *MakeSubvolume) Code(c *codec.Coder) {
	o.code(c)
	c.U64(&o.Size)
	c.U64(&o.Inodes)
	c.U64(&o.Token)
}
func (o *LimitSubvolume) Code(c *codec.Coder) {
	o.Ino.Code(c)
	c.U32(&o.Valid)
	c.U64(&o.Size)
	c.U64(&o.Inodes)
}
func (o *RemoveSubvolume) Code(c *codec.Coder) {
	o.Parent.Code(c)
	c.String(&o.Name, MaxName)
	o.Ino.Code(c)
	c.Bool(&o.Force)
}
func (o *Sweep) Code(c *codec.Coder) { o.Ino.Code(c) }

// Code implements codec.Coded.
func (i *Ino) Code(c *codec.Coder) { c.U64((*uint64)(i)) }

// Code implements codec.Coded.
func (l *Lock) Code(c *codec.Coder) {
	c.U64(&l.Owner)
	c.Bool(&l.Flock)
	c.U8((*uint8)(&l.Type))
	if l.Type > LockUnlock {
		c.Fail("lock type %d", l.Type)
	}
	c.U64(&l.Start)
	c.U64(&l.End)
	c.U32(&l.PID)
}

// Code implements codec.Coded.
func (a *Attr) Code(c *codec.Coder) {
	a.Ino.Code(c)
	c.U32(&a.Mode)
	c.U32(&a.Nlink)
	c.U32(&a.UID)
	c.U32(&a.GID)
	c.U32(&a.Rdev)
	c.U64(&a.Size)
	c.U64(&a.Blocks)
	c.I64(&a.Atime)
	c.I64(&a.Mtime)
	c.I64(&a.Ctime)
	c.U64(&a.Change)
	c.U32((*uint32)(&a.Flags))
}

// Which parts of a Reply are present on the wire.
const (
	hasAttr uint8 = 1 << iota
	hasEntries
	hasPlus
	hasStatfs
	hasLock
	hasDir
	hasWindow
	hasAll = 1<<iota - 1
)

// Code implements codec.Coded. Parts that are zero take no bytes; Data is last.
func (r *Reply) Code(c *codec.Coder) {
	var has uint8
	if !c.Decoding() {
		if r.Attr.Ino != 0 {
			has |= hasAttr
		}
		if len(r.Entries) > 0 {
			has |= hasEntries
			if r.Entries[0].Attr.Ino != 0 {
				has |= hasPlus
			}
		}
		if r.Statfs != (Statfs{}) {
			has |= hasStatfs
		}
		if r.Lock != (Lock{}) {
			has |= hasLock
		}
		if r.Dir.Ino != 0 {
			has |= hasDir
		}
		if r.Window {
			has |= hasWindow
		}
	}
	c.U8(&has)
	if has > hasAll {
		c.Fail("reply with parts %#x", has)
	}
	r.Window = has&hasWindow != 0
	c.U64(&r.Seq)
	c.U64(&r.Off)
	if has&hasAttr != 0 {
		r.Attr.Code(c)
	}
	if has&hasDir != 0 {
		r.Dir.Code(c)
	}
	if has&hasEntries != 0 {
		codec.Slice(c, &r.Entries, MaxEntries, func(c *codec.Coder, d *Dirent) {
			d.Ino.Code(c)
			c.String(&d.Name, MaxName)
			c.U32(&d.Type)
			c.U64(&d.Cookie)
			if has&hasPlus != 0 {
				d.Attr.Code(c)
			}
		})
	}
	if has&hasStatfs != 0 {
		s := &r.Statfs
		for _, p := range []*uint64{&s.Total, &s.Free, &s.Avail, &s.Files, &s.FilesFree} {
			c.U64(p)
		}
	}
	if has&hasLock != 0 {
		r.Lock.Code(c)
	}
	c.Bytes(&r.Data, MaxData)
}
