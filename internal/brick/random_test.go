package brick

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"mortar/internal/brick/meta"
	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/disk"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// tester is what *testing.T and *rapid.T have in common.
type tester interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

// machine drives a brick and the model with the same random entries, and lets
// settling, crashes and undone entries come in between.
type machine struct {
	tb   tester
	fs   *disk.Mem
	opts Options
	b    *Brick
	m    *model

	epoch    cluster.Epoch
	parity   cluster.Epoch // of all epochs but the first: two machines never lead the same
	now      int64
	commit   uint64
	synced   uint64
	past     map[uint64]*model // the model after every sequence that can still come back
	sent     []proto.Entry     // of sessions, to be sent again
	number   map[cluster.SessionID]uint64
	maxWrite int
}

func newMachine(tb tester, change ...func(*Options)) *machine {
	fs := disk.NewMem()
	format(tb, fs, "/b")
	m := &machine{
		tb: tb, fs: fs, opts: testOptions(fs), m: newModel(), epoch: 1, now: 1e18,
		past: map[uint64]*model{}, number: map[cluster.SessionID]uint64{}, maxWrite: 20000,
	}
	m.opts.Inline = 4096
	m.opts.SegmentSize = 64 << 10
	m.opts.Retain = -1
	m.opts.Inodes = 8
	m.opts.group = 15000
	for _, c := range change {
		c(&m.opts)
	}
	m.past[0] = m.m.clone()
	m.open()
	m.rewind(m.b.Tail())
	return m
}

func (m *machine) open() {
	b, err := Open(m.opts)
	if err != nil {
		m.tb.Fatalf("open: %+v", err)
	}
	m.b = b
}

func (m *machine) rewind(to cluster.Pos) {
	if err := m.b.Rewind(to); err != nil {
		m.tb.Fatalf("rewind to %v: %v", to, err)
	}
}

func (m *machine) close() { m.b.Close(false) }

var (
	someNames  = []string{"a", "b", "c", "d"}
	someXattrs = []string{"user.x", "user.y", "security.capability", "system.other", "trusted.t"}
)

// op draws an operation.
func (m *machine) op(r *rand.Rand) fsop.Op {
	inos := slices.Sorted(maps.Keys(m.m.inodes))
	ino := func() fsop.Ino {
		if r.IntN(30) == 0 {
			return fsop.Ino(r.IntN(int(m.m.next) + 2))
		}
		return inos[r.IntN(len(inos))]
	}
	kind := func(want func(*mInode) bool) fsop.Ino {
		for range 4 {
			if i := ino(); m.m.inodes[i] != nil && want(m.m.inodes[i]) {
				return i
			}
		}
		return ino()
	}
	dir := func() fsop.Ino { return kind(func(n *mInode) bool { return n.attr.IsDir() }) }
	file := func() fsop.Ino { return kind(func(n *mInode) bool { return n.attr.IsRegular() }) }
	name := func() string {
		if r.IntN(60) == 0 {
			return []string{"", ".", "..", "x/y", strings.Repeat("n", 255)}[r.IntN(5)]
		}
		return someNames[r.IntN(len(someNames))]
	}
	node := func() fsop.Node {
		modes := []uint32{0o644, 0o755, 0o4755, 0o2755, 0o6711, 0o2644}
		return fsop.Node{Parent: dir(), Name: name(), Mode: modes[r.IntN(len(modes))], UID: uint32(r.IntN(3)), GID: uint32(r.IntN(3))}
	}
	size := func() uint64 {
		switch r.IntN(5) {
		case 0:
			return 0
		case 1:
			return uint64(r.IntN(10)) * 4096
		case 2:
			return uint64(r.IntN(5000))
		}
		return uint64(r.IntN(2 * m.maxWrite))
	}
	switch p := r.IntN(126); {
	case p >= 122:
		return &fsop.OpenWindow{Ino: dir()}
	case p >= 108:
		return m.subvolOp(r, node(), ino)
	case p >= 100 && p < 107:
		return m.foretold(r, node(), size()/2)
	case p >= 107:
		i := dir()
		id := uint64(r.IntN(4))
		if n := m.m.inodes[i]; n != nil && r.IntN(2) == 0 {
			id = n.attr.Window
		}
		return &fsop.CloseWindow{Ino: i, Session: id}
	case p < 10:
		return &fsop.Create{Node: node(), Excl: r.IntN(2) == 0}
	case p < 15:
		return &fsop.Mkdir{Node: node(), Window: fsop.Window(r.IntN(2))}
	case p < 17:
		n := node()
		n.Mode |= []uint32{0, 0o100000, 0o010000, 0o020000, 0o060000, 0o140000, 0o040000, 0o120000}[r.IntN(8)]
		return &fsop.Mknod{Node: n, Rdev: uint32(r.IntN(5))}
	case p < 18:
		return &fsop.Tmpfile{Node: node(), Excl: r.IntN(4) == 0}
	case p < 19:
		return &fsop.Symlink{Node: node(), Target: []string{"", "t", "/a/b/c"}[r.IntN(3)]}
	case p < 22:
		return &fsop.Link{Ino: ino(), Parent: dir(), Name: name()}
	case p < 29:
		return &fsop.Unlink{Parent: dir(), Name: name()}
	case p < 33:
		return &fsop.Rmdir{Parent: dir(), Name: name()}
	case p < 42:
		flags := []uint32{0, 0, 0, 0, 1, 2, 2, 4, 5, 3, 8}[r.IntN(11)]
		return &fsop.Rename{Parent: dir(), Name: name(), NewParent: dir(), NewName: name(), Flags: flags}
	case p < 60:
		data := make([]byte, size()/2)
		for i := range data {
			data[i] = byte(r.IntN(255) + 1)
		}
		return &fsop.Write{Ino: file(), Off: size(), Append: r.IntN(3) == 0, KillPriv: r.IntN(2) == 0, Data: data}
	case p < 70:
		valid := uint32(r.IntN(512) | r.IntN(2)*int(fsop.SetKillSGID))
		if r.IntN(2) == 0 {
			valid = fsop.SetSize
		}
		return &fsop.Setattr{
			Ino: file(), Valid: valid, Mode: uint32(r.IntN(0o10000)), UID: uint32(r.IntN(3)), GID: uint32(r.IntN(3)),
			Size: size(), Atime: int64(r.IntN(100)), Mtime: int64(r.IntN(100)),
		}
	case p < 77:
		modes := []uint32{0, 1, 3, 3, 16, 17, 2}
		return &fsop.Fallocate{Ino: file(), Mode: modes[r.IntN(len(modes))], Off: size(), Len: size()}
	case p < 81:
		return &fsop.Setxattr{Ino: ino(), Name: someXattrs[r.IntN(len(someXattrs))], Value: make([]byte, r.IntN(10)), Flags: uint32(r.IntN(3))}
	case p < 83:
		return &fsop.Removexattr{Ino: ino(), Name: someXattrs[r.IntN(len(someXattrs))]}
	case p < 91:
		l := fsop.Lock{Owner: uint64(r.IntN(2)), Flock: r.IntN(4) == 0, Type: fsop.LockType(r.IntN(3)), PID: 7}
		l.Start = uint64(r.IntN(lockBytes))
		l.End = l.Start + uint64(r.IntN(lockBytes))
		if l.End >= lockBytes-1 {
			l.End = lockEnd
		}
		return &fsop.Setlk{Ino: file(), Lock: l}
	case p < 92:
		return &fsop.Reserve{}
	case p < 94:
		o := &fsop.OpenSession{Client: "c", Owner: "me"}
		if r.IntN(8) == 0 {
			o.Owner = "somebody else"
		}
		if s := m.m.sessions[cluster.SessionID(r.IntN(3)+1)]; s != nil && r.IntN(2) == 0 {
			o.Opened = s.opened
		}
		return o
	case p < 95:
		return &fsop.CloseSession{Session: uint64(r.IntN(3) + 1), Away: r.IntN(2) == 0}
	case p < 99:
		return &fsop.Reap{Inos: []fsop.Ino{ino(), ino(), ino(), ino()}}
	}
	return &fsop.Noop{}
}

// subvolOp draws an operation on subvolumes.
func (m *machine) subvolOp(r *rand.Rand, node fsop.Node, any func() fsop.Ino) fsop.Op {
	limits := func() (size, inodes uint64) { return uint64(r.IntN(12)) * 4096, uint64(r.IntN(6)) }
	top := func() fsop.Ino {
		if all := slices.Sorted(maps.Keys(m.m.subvols)); len(all) > 0 && r.IntN(6) > 0 {
			return all[r.IntN(len(all))]
		}
		return any()
	}
	switch r.IntN(14) {
	case 0, 1, 2, 3:
		if r.IntN(3) > 0 {
			node.Parent = fsop.RootIno
		}
		op := &fsop.MakeSubvolume{Node: node, Token: uint64(r.IntN(3))}
		op.Size, op.Inodes = limits()
		return op
	case 4, 5, 6:
		op := &fsop.LimitSubvolume{Ino: top(), Valid: uint32(r.IntN(8))}
		op.Size, op.Inodes = limits()
		return op
	case 7, 8:
		return &fsop.Use{Ino: any(), Done: r.IntN(2) == 0}
	case 9, 10:
		op := &fsop.RemoveSubvolume{Parent: node.Parent, Name: node.Name, Ino: top(), Force: r.IntN(2) == 0}
		for _, ino := range slices.Sorted(maps.Keys(m.m.inodes)) {
			for _, name := range slices.Sorted(maps.Keys(m.m.inodes[ino].entries)) {
				if m.m.inodes[ino].entries[name] == op.Ino && r.IntN(8) > 0 {
					op.Parent, op.Name = ino, name
				}
			}
		}
		return op
	}
	return &fsop.Sweep{Ino: top()}
}

// foretold draws a Make, one that is mostly allowed to its directory's holder.
func (m *machine) foretold(r *rand.Rand, node fsop.Node, size uint64) fsop.Op {
	for _, ino := range slices.Sorted(maps.Keys(m.m.inodes)) {
		if n := m.m.inodes[ino]; n.attr.IsDir() && n.attr.Window != 0 && r.IntN(2) == 0 {
			node.Parent = ino
		}
	}
	ino := fsop.Ino(r.IntN(int(m.m.next) + 2))
	if d := m.m.inodes[node.Parent]; d != nil && d.attr.Window != 0 && r.IntN(8) > 0 {
		if free := m.m.sessions[cluster.SessionID(d.attr.Window)].free; len(free) > 0 {
			if f := free[r.IntN(len(free))]; len(f) > 0 {
				ino = f[r.IntN(len(f))]
			}
		}
	}
	w := fsop.Write{Ino: ino, Off: uint64(r.IntN(3)) * 1000, KillPriv: r.IntN(2) == 0, Window: fsop.Window(r.IntN(2)), Append: r.IntN(20) == 0}
	if r.IntN(2) == 0 {
		w.Told = max(1, m.now+int64(r.IntN(40))-30) // some too late, and some from before the window
	}
	w.Data = bytes.Repeat([]byte{byte(r.IntN(255) + 1)}, int(size))
	if r.IntN(2) == 0 {
		w.Then = fsop.Setattr{
			Valid: uint32(r.IntN(512)|r.IntN(2)*int(fsop.SetKillSGID)) &^ fsop.SetSize, Mode: uint32(r.IntN(0o10000)), UID: uint32(r.IntN(3)), GID: uint32(r.IntN(3)),
			Atime: int64(r.IntN(100)), Mtime: int64(r.IntN(100)),
		}
	}
	return &fsop.Make{Node: node, First: w}
}

// step executes one random entry and compares.
func (m *machine) step(r *rand.Rand) {
	m.tb.Helper()
	m.now += 1 + int64(r.IntN(5))
	e := proto.Entry{Pos: cluster.Pos{Epoch: m.epoch, Seq: m.m.pos.Seq + 1}, Time: m.now, Op: m.op(r)}
	if r.IntN(3) > 0 {
		e.Session = cluster.SessionID(r.IntN(3) + 1)
		if op, ok := e.Op.(*fsop.Make); ok {
			if d := m.m.inodes[op.Parent]; d != nil && d.attr.Window != 0 && r.IntN(8) > 0 {
				e.Session = cluster.SessionID(d.attr.Window)
			}
		}
		m.number[e.Session]++
		e.Number = m.number[e.Session]
		e.Acked = e.Number - min(e.Number, uint64(r.IntN(6)))
	}
	if len(m.sent) > 0 && r.IntN(15) == 0 {
		old := m.sent[r.IntN(len(m.sent))]
		old.Pos, old.Time = e.Pos, e.Time
		e = old
	}
	m.execute(&e)
	if e.Session != 0 {
		m.sent = append(m.sent, e)
	}
}

func (m *machine) execute(e *proto.Entry) {
	m.tb.Helper()
	before := m.m.clone()
	want, wantErr := m.m.do(e)
	var raw []byte
	if e.Time%2 == 0 {
		raw = codec.Append(nil, e)
	}
	got, err := m.b.Execute(e, raw)
	if !errors.Is(err, wantErr) {
		m.tb.Fatalf("%v: got error %v, want %v", e, err, wantErr)
	}
	if err != nil {
		return
	}
	// Who holds a window is for reads to tell.
	if diff := cmp.Diff(want.reply, got.Reply, cmpopts.IgnoreFields(fsop.Attr{}, "Window")); diff != "" {
		m.tb.Fatalf("%v: reply (-want +got):\n%s", e, diff)
	}
	if got.Dup != want.dup || (got.Raw != nil) != want.changed {
		m.tb.Fatalf("%v: dup %v, logged %v; want %v, %v", e, got.Dup, got.Raw != nil, want.dup, want.changed)
	}
	slices.Sort(got.Released)
	slices.Sort(want.released)
	if !slices.Equal(got.Released, want.released) {
		m.tb.Fatalf("%v: released %v, want %v", e, got.Released, want.released)
	}
	if got.Raw != nil {
		if !bytes.Equal(got.Raw, codec.Append(nil, e)) {
			m.tb.Fatalf("%v: logged something else", e)
		}
		m.past[e.Pos.Seq] = m.m.clone()
	}
	m.checkEffects(e, before, got.Effects)
}

// checkEffects demands that caches are told of all that changed.
func (m *machine) checkEffects(e *proto.Entry, before *model, got []proto.Effect) {
	m.tb.Helper()
	need := func(f proto.Effect) {
		if !slices.Contains(got, f) {
			m.tb.Fatalf("%v: effect %v is missing in %v", e, f, got)
		}
	}
	for ino, n := range m.m.inodes {
		old := before.inodes[ino]
		if old == nil {
			continue
		}
		if n.attr.IsDir() && n.attr.Window != 0 && old.attr.Window == 0 {
			need(proto.Effect{Ino: ino, Names: true})
		}
		was, is := old.attrs(), n.attrs()
		was.Window = is.Window // is not cached
		if was != is && ino != fsop.RootIno || !bytes.Equal(old.data, n.data) {
			need(proto.Effect{Ino: ino, Rights: was.UID != is.UID || was.GID != is.GID ||
				is.IsDir() && (was.Mode^is.Mode)&syscall.S_ISVTX != 0})
		}
		for name := range n.entries {
			if old.entries[name] != n.entries[name] {
				need(proto.Effect{Ino: ino, Name: name})
			}
		}
		for name := range old.entries {
			if _, ok := n.entries[name]; !ok {
				need(proto.Effect{Ino: ino, Name: name})
			}
		}
	}
}

// compare checks everything that can be read.
func (m *machine) compare(r *rand.Rand) {
	m.tb.Helper()
	checkNames(m.tb, m.b)
	compareBrick(m.tb, m.b, m.m, r)
}

func compareBrick(tb tester, b *Brick, m *model, r *rand.Rand) {
	tb.Helper()
	ctx := context.Background()
	if got := b.Applied(); got != m.pos {
		tb.Fatalf("the brick stands at %v, the model at %v", got, m.pos)
	}
	for ino := fsop.Ino(0); ino <= fsop.Ino(m.next); ino++ {
		n := m.inodes[ino]
		if n == nil && ino > 64 && r.IntN(16) > 0 { // many are only reserved
			continue
		}
		reply, dep, err := b.Read(ctx, &fsop.Getattr{Ino: ino})
		if n == nil {
			if !errors.Is(err, fsop.ESTALE) {
				tb.Fatalf("inode %d: got %v, want ESTALE", ino, err)
			}
			continue
		}
		if err != nil {
			tb.Fatalf("inode %d: %v", ino, err)
		}
		if diff := cmp.Diff(n.attrs(), reply.Attr); diff != "" {
			tb.Fatalf("at %v, inode %d (-want +got):\n%s", m.pos, ino, diff)
		}
		if dep != n.attr.Change || reply.Seq != m.pos.Seq {
			tb.Fatalf("inode %d: dep %d, seq %d, want %d and %d", ino, dep, reply.Seq, n.attr.Change, m.pos.Seq)
		}
		switch {
		case n.attr.IsRegular():
			compareFile(tb, b, ino, n, r)
		case n.attr.IsDir():
			compareDir(tb, b, ino, n, m, r)
		case n.target != "":
			reply, _, err := b.Read(ctx, &fsop.Readlink{Ino: ino})
			if err != nil || string(reply.Data) != n.target {
				tb.Fatalf("link %d: %q, %v; want %q", ino, reply.Data, err, n.target)
			}
		}
		var names []string
		for _, name := range slices.Sorted(maps.Keys(n.xattrs)) {
			names = append(names, name+"\x00")
			reply, _, err := b.Read(ctx, &fsop.Getxattr{Ino: ino, Name: name})
			if err != nil || string(reply.Data) != n.xattrs[name] {
				tb.Fatalf("xattr %s of %d: %q, %v; want %q", name, ino, reply.Data, err, n.xattrs[name])
			}
		}
		reply, _, err = b.Read(ctx, &fsop.Listxattr{Ino: ino})
		if err != nil || string(reply.Data) != strings.Join(names, "") {
			tb.Fatalf("xattrs of %d: %q, %v; want %q", ino, reply.Data, err, names)
		}
	}
	var orphans []fsop.Ino
	for ino, n := range m.inodes {
		if n.attr.Nlink == 0 && (n.attr.IsDir() || n.attr.Window == 0) {
			orphans = append(orphans, ino)
		}
	}
	slices.Sort(orphans)
	if got := b.Orphans(0, 1000); !slices.Equal(got, orphans) {
		tb.Fatalf("orphans %v, want %v", got, orphans)
	}
	if got := len(b.Sessions()); got != len(m.sessions) {
		tb.Fatalf("%d sessions, want %d", got, len(m.sessions))
	}
	for _, got := range b.Sessions() {
		s := m.sessions[got.ID]
		if s == nil || got != (SessionInfo{got.ID, s.client, s.owner, s.opened, s.away}) {
			tb.Fatalf("session %+v, want %+v", got, s)
		}
	}
	compareUsage(tb, b, m)
}

func compareUsage(tb tester, b *Brick, m *model) {
	tb.Helper()
	var blocks uint64
	for _, n := range m.inodes {
		blocks += n.attrs().Blocks
	}
	compareSubvolumes(tb, b, m)
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.state.Inodes != uint64(len(m.inodes)) || b.state.Blocks != blocks || b.state.NextIno != m.next {
		tb.Fatalf("usage: %+v; want %d inodes, %d blocks, next %d", b.state, len(m.inodes), blocks, m.next)
	}
}

func compareSubvolumes(tb tester, b *Brick, m *model) {
	tb.Helper()
	used := m.account()
	want := map[fsop.Ino]meta.Subvolume{}
	paths := map[fsop.Ino]string{}
	for ino, s := range m.subvols {
		want[ino] = meta.Subvolume{
			Ino: ino, Size: s.size, Inodes: s.inodes, UsedSize: used[ino].bytes, UsedInodes: used[ino].inodes,
			Made: s.made, Used: s.used, Token: s.token, Removed: s.removed,
		}
		if n := m.inodes[ino]; n != nil && n.attr.Nlink > 0 && !s.removed {
			paths[ino] = m.path(ino)
		}
	}
	got := map[fsop.Ino]meta.Subvolume{}
	b.mu.RLock()
	for ino, s := range b.subvols {
		got[ino] = *s
	}
	b.mu.RUnlock()
	if diff := cmp.Diff(want, got); diff != "" {
		tb.Fatalf("at %v, subvolumes (-want +got):\n%s", m.pos, diff)
	}
	all, err := b.Subvolumes(0)
	if err != nil {
		tb.Fatalf("listing subvolumes: %v", err)
	}
	listed := map[fsop.Ino]string{}
	for _, s := range all {
		listed[s.Ino] = s.Path
		var users []cluster.SessionID
		for id, x := range m.sessions {
			if x.uses[s.Ino] && !x.away {
				users = append(users, id)
			}
		}
		slices.Sort(users)
		var gotUsers []cluster.SessionID
		for _, u := range s.Users {
			gotUsers = append(gotUsers, u.ID)
		}
		if !slices.Equal(users, gotUsers) || s.Attr != m.inodes[s.Ino].attrs() {
			tb.Fatalf("subvolume %s: %+v; want the users %v", s.Path, s, users)
		}
	}
	if diff := cmp.Diff(paths, listed); diff != "" {
		tb.Fatalf("at %v, names of subvolumes (-want +got):\n%s", m.pos, diff)
	}
}

func (m *model) path(ino fsop.Ino) string {
	p := ""
	for ; ino != fsop.RootIno; ino = m.inodes[ino].parent {
		for name, i := range m.inodes[m.inodes[ino].parent].entries {
			if i == ino {
				p = strings.TrimSuffix(name+"/"+p, "/")
			}
		}
	}
	return p
}

func compareFile(tb tester, b *Brick, ino fsop.Ino, n *mInode, r *rand.Rand) {
	tb.Helper()
	ctx := context.Background()
	var got []byte
	for {
		reply, _, err := b.Read(ctx, &fsop.Read{Ino: ino, Off: uint64(len(got)), Len: fsop.MaxData})
		if err != nil {
			tb.Fatalf("reading %d: %v", ino, err)
		}
		if len(reply.Data) == 0 {
			break
		}
		got = append(got, reply.Data...)
	}
	if !bytes.Equal(got, n.data) {
		for i := range n.data {
			if i >= len(got) || n.data[i] != got[i] {
				tb.Fatalf("file %d: %d bytes, want %d; first difference at %d", ino, len(got), len(n.data), i)
			}
		}
		tb.Fatalf("file %d: %d bytes, want %d", ino, len(got), len(n.data))
	}
	size := len(n.data)
	off := r.IntN(size + 10)
	part := r.IntN(5000)
	reply, _, err := b.Read(ctx, &fsop.Read{Ino: ino, Off: uint64(off), Len: uint32(part)})
	if err != nil || !bytes.Equal(reply.Data, n.data[min(off, size):min(off+part, size)]) {
		tb.Fatalf("file %d: part of %d bytes from %d differs (%v)", ino, part, off, err)
	}
	for _, whence := range []uint32{seekData, seekHole} {
		want, wantErr := off, error(nil)
		for want < size && n.blocks[uint64(want/4096)] != (whence == seekData) {
			want = want/4096*4096 + 4096
		}
		if off >= size || want >= size && whence == seekData {
			wantErr = fsop.ENXIO
		}
		reply, _, err := b.Read(ctx, &fsop.Seek{Ino: ino, Off: uint64(off), Whence: whence})
		if !errors.Is(err, wantErr) || err == nil && reply.Off != uint64(min(want, size)) {
			tb.Fatalf("file %d of %d bytes: seek %d from %d: %+v, %v; want %d, %v; blocks %v", ino, size, whence, off, reply, err, min(want, size), wantErr, n.blocks)
		}
	}
}

func compareDir(tb tester, b *Brick, ino fsop.Ino, n *mInode, m *model, r *rand.Rand) {
	tb.Helper()
	ctx := context.Background()
	got := map[string]fsop.Ino{}
	var cookie uint64
	plus := r.IntN(2) == 0
	for {
		reply, dep, err := b.Read(ctx, &fsop.Readdir{Ino: ino, Cookie: cookie, Max: uint32(r.IntN(300)), Plus: plus})
		if err != nil {
			tb.Fatalf("listing %d: %v", ino, err)
		}
		if len(reply.Entries) == 0 {
			break
		}
		for _, e := range reply.Entries {
			if _, twice := got[e.Name]; twice || e.Cookie <= cookie && e.Cookie != cookie {
				tb.Fatalf("directory %d lists %q again", ino, e.Name)
			}
			got[e.Name] = e.Ino
			cookie = e.Cookie
			if e.Type != m.inodes[e.Ino].attr.Type() {
				tb.Fatalf("entry %q of %d has type %o", e.Name, ino, e.Type)
			}
			if plus && (e.Attr != m.inodes[e.Ino].attrs() || dep < e.Attr.Change) {
				tb.Fatalf("entry %q of %d has attributes %+v", e.Name, ino, e.Attr)
			}
		}
	}
	if !maps.Equal(got, n.entries) && len(got)+len(n.entries) > 0 {
		tb.Fatalf("directory %d has %v, want %v", ino, got, n.entries)
	}
	for _, name := range someNames {
		reply, dep, err := b.Read(ctx, &fsop.Lookup{Parent: ino, Name: name})
		child, ok := n.entries[name]
		if !ok {
			if !errors.Is(err, fsop.ENOENT) || dep != n.attr.Change {
				tb.Fatalf("lookup of %q in %d: %v, dep %d; want ENOENT, %d", name, ino, err, dep, n.attr.Change)
			}
			continue
		}
		if err != nil || reply.Attr != m.inodes[child].attrs() {
			tb.Fatalf("lookup of %q in %d: %+v, %v; want %+v", name, ino, reply, err, m.inodes[child].attrs())
		}
	}
}

// settle commits up to some entry and settles.
func (m *machine) settle(r *rand.Rand) {
	m.tb.Helper()
	m.commit = max(m.commit, m.m.pos.Seq-min(m.m.pos.Seq, uint64(r.IntN(5))))
	m.b.Commit(m.commit)
	if err := m.b.settleCycle(context.Background(), true); err != nil {
		m.tb.Fatalf("settling: %v", err)
	}
}

// crash cuts the power.
func (m *machine) crash(r *rand.Rand) {
	m.tb.Helper()
	m.synced = m.b.Durable()
	fs := m.fs.Crash(r)
	m.b.Close(false)
	m.fs, m.opts.FS = fs, fs
	m.open()
	tail := m.b.Tail()
	if tail.Seq < m.synced || tail.Seq > m.m.pos.Seq {
		m.tb.Fatalf("after the crash the log ends at %v; %d was durable, %v written", tail, m.synced, m.m.pos)
	}
	if !m.b.Whole() {
		m.tb.Fatalf("after the crash the brick is not whole")
	}
	m.rewind(tail)
	m.restore(tail.Seq)
}

// restore takes the model back.
func (m *machine) restore(seq uint64) {
	m.m = m.past[seq].clone()
	maps.DeleteFunc(m.past, func(s uint64, _ *model) bool { return s > seq })
	m.commit = min(m.commit, seq)
	m.newEpoch(m.epoch)
	m.sent = nil
}

// newEpoch begins one after old.
func (m *machine) newEpoch(old cluster.Epoch) {
	m.epoch = old + 1
	if m.epoch%2 != m.parity {
		m.epoch++
	}
}

// undo takes back entries that were not committed.
func (m *machine) undo(r *rand.Rand) {
	m.tb.Helper()
	to := m.m.pos.Seq - min(m.m.pos.Seq-m.commit, uint64(r.IntN(8)))
	pos := m.past[to].pos
	err := m.b.Rewind(pos)
	if errors.Is(err, ErrTooFar) {
		return // and nothing changed, which compare will find
	}
	if err != nil {
		m.tb.Fatalf("rewind to %v: %v", pos, err)
	}
	m.restore(to)
}

// run takes n random steps.
func (m *machine) run(r *rand.Rand, n int) {
	m.tb.Helper()
	for range n {
		switch r.IntN(60) {
		case 0, 1, 2:
			m.settle(r)
		case 3:
			m.compare(r)
		case 4:
			m.undo(r)
		case 5:
			m.crash(r)
			m.compare(r)
		case 6:
			if err := m.b.Sync(context.Background(), m.m.pos.Seq); err != nil {
				m.tb.Fatal(err)
			}
		case 7:
			if err := m.b.store.Flush(context.Background()); err != nil {
				m.tb.Fatal(err)
			}
		default:
			m.step(r)
		}
	}
	m.compare(r)
}

// TestModel compares a brick with the model over random histories with
// settling, power cuts and undone entries.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		n := rapid.IntRange(1, 600).Draw(t, "steps")
		m := newMachine(t)
		defer func() { m.close() }()
		m.run(rand.New(rand.NewPCG(seed, 1)), n)
	})
}

// TestCrashInside cuts the power in the middle of what the disk is told to do,
// in settling, flushing, trimming and removing as much as in writing, and checks
// that the brick comes back at a position between what was durable and what had
// been executed, with the state of that position.
func TestCrashInside(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 6))
		at := rapid.IntRange(1, 3000).Draw(t, "call")
		var image atomic.Pointer[disk.Mem]
		var brick atomic.Pointer[Brick]
		var durable atomic.Uint64
		var calls atomic.Int32
		m := newMachine(t, func(o *Options) {
			f := disk.NewFaulty(o.FS)
			mem := o.FS.(*disk.Mem)
			crash := rand.New(rand.NewPCG(r.Uint64(), 7))
			f.Observe(func(op disk.Op, name string) {
				if op != disk.OpRead && op != disk.OpStat && calls.Add(1) == int32(at) {
					if b := brick.Load(); b != nil {
						durable.Store(b.log.Durable())
					}
					image.Store(mem.Crash(crash))
				}
			})
			o.FS = f
			o.MemTable = 64 << 10
			o.SettleAfter = time.Millisecond
		})
		brick.Store(m.b)
		for range 400 {
			switch r.IntN(12) {
			case 0, 1, 2:
				m.settle(r)
			case 3:
				if err := m.b.Sync(context.Background(), m.m.pos.Seq); err != nil {
					t.Fatal(err)
				}
			default:
				m.step(r)
			}
			if image.Load() != nil {
				break
			}
		}
		executed := m.m.pos.Seq
		m.close()
		if image.Load() == nil {
			return
		}
		m.fs = image.Load()
		m.opts.FS = m.fs
		m.open()
		defer m.close()
		tail := m.b.Tail()
		if !m.b.Whole() || tail.Seq < durable.Load() || tail.Seq > executed {
			t.Fatalf("whole %v, the log ends at %v; %d was durable, %d executed", m.b.Whole(), tail, durable.Load(), executed)
		}
		m.rewind(tail)
		m.restore(tail.Seq)
		m.compare(r)
		m.run(r, 100)
	})
}
