package brick

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"mortar/internal/brick/data"
	"mortar/internal/brick/meta"
	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// TestErrno has the refusals as Linux makes them on its own file systems, in
// the order in which it looks for reasons.
func TestErrno(t *testing.T) {
	o := newBrick(t)
	const root = fsop.RootIno
	d, e := o.mkdir(root, "d"), o.mkdir(root, "e")
	full := o.mkdir(root, "full")
	deep := o.mkdir(full, "deep")
	f := o.create(root, "f")
	ff := o.create(full, "ff")
	link := o.must(&fsop.Symlink{Node: fsop.Node{Parent: root, Name: "l"}, Target: "f"}).Attr.Ino
	o.must(&fsop.Setxattr{Ino: f, Name: "user.x", Value: []byte("1")})
	gone := o.mkdir(root, "gone")
	o.must(&fsop.Rmdir{Parent: root, Name: "gone"})
	const none = fsop.Ino(9999)
	node := func(dir fsop.Ino, name string) fsop.Node { return fsop.Node{Parent: dir, Name: name, Mode: 0o644} }
	long := strings.Repeat("x", 256)

	for _, c := range []struct {
		want fsop.Errno
		op   fsop.Op
	}{
		{fsop.EEXIST, &fsop.Create{Node: node(root, "f"), Excl: true}},
		{fsop.EEXIST, &fsop.Create{Node: node(root, "d"), Excl: true}},
		{fsop.EISDIR, &fsop.Create{Node: node(root, "d")}},
		{fsop.ENOTDIR, &fsop.Create{Node: node(f, "x")}},
		{fsop.ESTALE, &fsop.Create{Node: node(none, "x")}},
		{fsop.ENOENT, &fsop.Create{Node: node(gone, "x")}},
		{fsop.ENAMETOOLONG, &fsop.Create{Node: node(root, long)}},
		{fsop.EINVAL, &fsop.Create{Node: node(root, "a/b")}},
		{fsop.EEXIST, &fsop.Mkdir{Node: node(root, "f")}},
		{fsop.EEXIST, &fsop.Mknod{Node: node(root, "f")}},
		{fsop.EPERM, &fsop.Mknod{Node: fsop.Node{Parent: root, Name: "n", Mode: syscall.S_IFDIR}}},
		{fsop.EINVAL, &fsop.Mknod{Node: fsop.Node{Parent: root, Name: "n", Mode: syscall.S_IFLNK}}},
		{fsop.EEXIST, &fsop.Symlink{Node: node(root, "f"), Target: "x"}},
		{fsop.ENOENT, &fsop.Symlink{Node: node(root, "n")}},

		{fsop.EEXIST, &fsop.Link{Ino: d, Parent: root, Name: "f"}},
		{fsop.EPERM, &fsop.Link{Ino: d, Parent: root, Name: "n"}},
		{fsop.ENOENT, &fsop.Link{Ino: f, Parent: gone, Name: "n"}},
		{fsop.ESTALE, &fsop.Link{Ino: none, Parent: root, Name: "n"}},

		{fsop.EISDIR, &fsop.Unlink{Parent: root, Name: "d"}},
		{fsop.ENOENT, &fsop.Unlink{Parent: root, Name: "n"}},
		{fsop.ENOTDIR, &fsop.Unlink{Parent: f, Name: "n"}},
		{fsop.ENOTDIR, &fsop.Rmdir{Parent: root, Name: "f"}},
		{fsop.ENOTDIR, &fsop.Rmdir{Parent: root, Name: "l"}},
		{fsop.ENOTEMPTY, &fsop.Rmdir{Parent: root, Name: "full"}},
		{fsop.ENOENT, &fsop.Rmdir{Parent: root, Name: "n"}},

		{fsop.ENOENT, &fsop.Rename{Parent: root, Name: "n", NewParent: root, NewName: "m"}},
		{fsop.ENOTDIR, &fsop.Rename{Parent: root, Name: "d", NewParent: root, NewName: "f"}},
		{fsop.EISDIR, &fsop.Rename{Parent: root, Name: "f", NewParent: root, NewName: "d"}},
		{fsop.ENOTEMPTY, &fsop.Rename{Parent: root, Name: "d", NewParent: root, NewName: "full"}},
		{fsop.EINVAL, &fsop.Rename{Parent: root, Name: "full", NewParent: deep, NewName: "n"}},
		{fsop.EINVAL, &fsop.Rename{Parent: root, Name: "full", NewParent: full, NewName: "n"}},
		{fsop.ENOTEMPTY, &fsop.Rename{Parent: full, Name: "ff", NewParent: root, NewName: "full"}},
		{fsop.ENOTEMPTY, &fsop.Rename{Parent: full, Name: "deep", NewParent: root, NewName: "full"}},
		{fsop.ENOENT, &fsop.Rename{Parent: root, Name: "f", NewParent: gone, NewName: "n"}},
		{fsop.ENOTDIR, &fsop.Rename{Parent: root, Name: "d", NewParent: f, NewName: "n"}},
		{fsop.EEXIST, &fsop.Rename{Parent: root, Name: "f", NewParent: root, NewName: "f", Flags: fsop.RenameNoReplace}},
		{fsop.EEXIST, &fsop.Rename{Parent: root, Name: "f", NewParent: root, NewName: "d", Flags: fsop.RenameNoReplace}},
		{fsop.ENOENT, &fsop.Rename{Parent: root, Name: "f", NewParent: root, NewName: "n", Flags: fsop.RenameExchange}},
		{fsop.EINVAL, &fsop.Rename{Parent: root, Name: "f", NewParent: root, NewName: "d", Flags: fsop.RenameExchange | fsop.RenameNoReplace}},
		{fsop.EINVAL, &fsop.Rename{Parent: root, Name: "f", NewParent: root, NewName: "d", Flags: fsop.RenameExchange | fsop.RenameWhiteout}},
		{fsop.EINVAL, &fsop.Rename{Parent: root, Name: "f", NewParent: root, NewName: "d", Flags: 8}},
		{fsop.EINVAL, &fsop.Rename{Parent: full, Name: "deep", NewParent: root, NewName: "full", Flags: fsop.RenameExchange}},

		{fsop.EISDIR, &fsop.Setattr{Ino: d, Valid: fsop.SetSize}},
		{fsop.EINVAL, &fsop.Setattr{Ino: link, Valid: fsop.SetSize}},
		{fsop.EFBIG, &fsop.Setattr{Ino: f, Valid: fsop.SetSize, Size: 1 << 63}},
		{fsop.EOPNOTSUPP, &fsop.Setattr{Ino: link, Valid: fsop.SetMode}},
		{fsop.ESTALE, &fsop.Setattr{Ino: none, Valid: fsop.SetMode}},
		{fsop.EISDIR, &fsop.Write{Ino: d, Data: []byte("x")}},
		{fsop.EFBIG, &fsop.Write{Ino: f, Off: 1<<63 - 1, Data: []byte("x")}},
		{fsop.EFBIG, &fsop.Write{Ino: f, Off: 1<<64 - 1, Data: []byte("xy")}},
		{fsop.EINVAL, &fsop.Write{Ino: link, Data: []byte("x")}},
		{fsop.EINVAL, &fsop.Fallocate{Ino: f}},
		{fsop.EISDIR, &fsop.Fallocate{Ino: d, Len: 1}},
		{fsop.Errno(syscall.ENODEV), &fsop.Fallocate{Ino: link, Len: 1}},
		{fsop.EFBIG, &fsop.Fallocate{Ino: f, Off: 1<<63 - 1, Len: 1 << 20}},
		{fsop.EOPNOTSUPP, &fsop.Fallocate{Ino: f, Len: 1, Mode: fsop.FallocPunchHole}},
		{fsop.EOPNOTSUPP, &fsop.Fallocate{Ino: f, Len: 1, Mode: 8}},

		{fsop.EEXIST, &fsop.Setxattr{Ino: f, Name: "user.x", Flags: fsop.XattrCreate}},
		{fsop.ENODATA, &fsop.Setxattr{Ino: f, Name: "user.y", Flags: fsop.XattrReplace}},
		{fsop.EINVAL, &fsop.Setxattr{Ino: f, Name: "user.y", Flags: 8}},
		{fsop.E2BIG, &fsop.Setxattr{Ino: f, Name: "user.y", Value: make([]byte, fsop.MaxXattr+1)}},
		{fsop.ERANGE, &fsop.Setxattr{Ino: f, Name: "user." + long}},
		{fsop.ERANGE, &fsop.Setxattr{Ino: f}},
		{fsop.EOPNOTSUPP, &fsop.Setxattr{Ino: f, Name: "system.posix_acl_other"}},
		{fsop.EOPNOTSUPP, &fsop.Setxattr{Ino: f, Name: "x"}},
		{fsop.ENODATA, &fsop.Removexattr{Ino: f, Name: "user.y"}},
		{fsop.ESTALE, &fsop.Removexattr{Ino: none, Name: "user.y"}},
		{fsop.EINVAL, &fsop.Setlk{Ino: f}}, // of no session
		{fsop.EINVAL, &fsop.OpenSession{}},
		{fsop.EINVAL, &fsop.Getattr{Ino: f}}, // which nobody logs
	} {
		o.fails(c.want, c.op)
	}
	for _, c := range []struct {
		want fsop.Errno
		op   fsop.Op
	}{
		{fsop.ENOENT, &fsop.Lookup{Parent: root, Name: "n"}},
		{fsop.ENOTDIR, &fsop.Lookup{Parent: f, Name: "n"}},
		{fsop.ESTALE, &fsop.Lookup{Parent: none, Name: "n"}},
		{fsop.ENAMETOOLONG, &fsop.Lookup{Parent: root, Name: long}},
		{fsop.EINVAL, &fsop.Readlink{Ino: f}},
		{fsop.EISDIR, &fsop.Read{Ino: d, Len: 1}},
		{fsop.EINVAL, &fsop.Read{Ino: link, Len: 1}},
		{fsop.EINVAL, &fsop.Read{Ino: f, Len: fsop.MaxData + 1}},
		{fsop.ENOTDIR, &fsop.Readdir{Ino: f}},
		{fsop.ENODATA, &fsop.Getxattr{Ino: f, Name: "user.n"}},
		{fsop.ENODATA, &fsop.Getxattr{Ino: d, Name: "user.n"}},
		{fsop.EINVAL, &fsop.Seek{Ino: f, Whence: 0}},
		{fsop.ENXIO, &fsop.Seek{Ino: f, Whence: seekData}},
		{fsop.ESTALE, &fsop.Getlk{Ino: none}},
		{fsop.EINVAL, &fsop.Fsync{Ino: f}},
	} {
		if _, _, err := o.Read(context.Background(), c.op); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", fsop.String(c.op), err, c.want)
		}
	}
	_, _ = e, ff
}

// TestNoChange has the operations that succeed and are not worth an entry.
func TestNoChange(t *testing.T) {
	o := newBrick(t)
	const root = fsop.RootIno
	f := o.create(root, "f")
	o.must(&fsop.Link{Ino: f, Parent: root, Name: "g"})
	before := o.Tail()
	for _, op := range []fsop.Op{
		&fsop.Create{Node: fsop.Node{Parent: root, Name: "f"}},
		&fsop.Rename{Parent: root, Name: "f", NewParent: root, NewName: "g"},
		&fsop.Rename{Parent: root, Name: "f", NewParent: root, NewName: "f"},
		&fsop.Write{Ino: f},
		&fsop.Setattr{Ino: f},
		&fsop.Reap{Inos: []fsop.Ino{f, 77}},
		&fsop.CloseSession{Session: 5},
	} {
		r, err := o.do(op)
		if err != nil || r.Raw != nil || o.Tail() != before {
			t.Errorf("%s: %+v, %v", fsop.String(op), r, err)
		}
		if _, ok := op.(*fsop.Create); ok && r.Reply.Attr.Ino != f {
			t.Errorf("%s: reply %+v", fsop.String(op), r.Reply)
		}
	}
}

func TestLinkLimit(t *testing.T) {
	if testing.Short() {
		t.Skip("makes 65,000 links")
	}
	o := newBrick(t)
	f := o.create(fsop.RootIno, "f")
	for i := range fsop.MaxLinks - 1 {
		o.must(&fsop.Link{Ino: f, Parent: fsop.RootIno, Name: fmt.Sprint(i)})
	}
	o.fails(fsop.EMLINK, &fsop.Link{Ino: f, Parent: fsop.RootIno, Name: "one too many"})
	o.must(&fsop.Unlink{Parent: fsop.RootIno, Name: "f"})
	o.must(&fsop.Link{Ino: f, Parent: fsop.RootIno, Name: "again"})
}

func TestXattrNames(t *testing.T) {
	o := newBrick(t)
	f := o.create(fsop.RootIno, "f")
	long := strings.Repeat("x", 240)
	n := 0
	for ; ; n++ {
		_, err := o.do(&fsop.Setxattr{Ino: f, Name: fmt.Sprintf("user.%s%06d", long, n), Value: []byte("v")})
		if errors.Is(err, fsop.ENOSPC) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	list := o.get(&fsop.Listxattr{Ino: f}).Data
	if len(list) > maxXattrNames || len(list) < maxXattrNames-300 || bytes.Count(list, []byte{0}) != n {
		t.Errorf("%d attributes in a list of %d bytes", n, len(list))
	}
}

// TestCookiesCollide lists a directory in which all names have one cookie.
func TestCookiesCollide(t *testing.T) {
	o := newBrick(t)
	d := o.mkdir(fsop.RootIno, "d")
	batch := o.store.NewBatch()
	defer batch.Close()
	const n = 50
	for i := range n {
		batch.SetDentry(d, &meta.Dentry{Ino: fsop.RootIno, Type: syscall.S_IFDIR, Name: fmt.Sprint(i), Cookie: 4711})
	}
	batch.SetDentry(d, &meta.Dentry{Ino: fsop.RootIno, Type: syscall.S_IFDIR, Name: "before", Cookie: 9})
	batch.SetDentry(d, &meta.Dentry{Ino: fsop.RootIno, Type: syscall.S_IFDIR, Name: "behind", Cookie: 4712})
	if err := o.store.Commit(batch); err != nil {
		t.Fatal(err)
	}
	var got []int
	for cookie := uint64(0); ; {
		r := o.get(&fsop.Readdir{Ino: d, Cookie: cookie, Max: 100})
		if len(r.Entries) == 0 {
			break
		}
		got = append(got, len(r.Entries))
		cookie = r.Entries[len(r.Entries)-1].Cookie
	}
	if fmt.Sprint(got) != fmt.Sprint([]int{1 + n, 1}) {
		t.Errorf("replies of %v entries", got)
	}
}

// TestLocks has the cases of fcntl(2) that split, join and change ranges.
func TestLocks(t *testing.T) {
	o := newBrick(t)
	f := o.create(fsop.RootIno, "f")
	session := func(id cluster.SessionID, op fsop.Op) (*Result, error) {
		e := o.entry(op)
		e.Session = id
		return o.Execute(e, nil)
	}
	for id := cluster.SessionID(1); id <= 2; id++ {
		if _, err := session(id, &fsop.OpenSession{Client: "c"}); err != nil {
			t.Fatal(err)
		}
	}
	lock := func(id cluster.SessionID, owner uint64, typ fsop.LockType, start, end uint64) error {
		_, err := session(id, &fsop.Setlk{Ino: f, Lock: fsop.Lock{Owner: owner, Type: typ, Start: start, End: end}})
		return err
	}
	held := func(want string) {
		t.Helper()
		var got []string
		o.store.Locks(func(l meta.Lock) error {
			got = append(got, fmt.Sprintf("%d/%d:%d-%d=%d", l.Session, l.Owner, l.Start, l.End, l.Type))
			return nil
		})
		if s := strings.Join(got, " "); s != want {
			t.Errorf("locks %s, want %s", s, want)
		}
	}
	const r, w, u = fsop.LockRead, fsop.LockWrite, fsop.LockUnlock
	check := func(got, want error) {
		t.Helper()
		if !errors.Is(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	}
	check(lock(1, 8, w, 0, 99), nil)
	check(lock(2, 8, r, 99, 200), fsop.EAGAIN)
	check(lock(2, 8, r, 100, 200), nil)
	check(lock(1, 8, u, 40, 49), nil)
	held("1/8:0-39=1 1/8:50-99=1 2/8:100-200=0")
	check(lock(1, 8, r, 30, 60), nil)
	held("1/8:0-29=1 1/8:30-60=0 1/8:61-99=1 2/8:100-200=0")
	check(lock(1, 8, r, 61, 110), nil)
	held("1/8:0-29=1 1/8:30-110=0 2/8:100-200=0")
	check(lock(1, 9, w, 30, 30), fsop.EAGAIN)
	check(lock(1, 8, w, 30, 99), nil)
	held("1/8:0-99=1 1/8:100-110=0 2/8:100-200=0")
	check(lock(2, 8, u, 150, lockEnd), nil)
	if got := o.get(&fsop.Getlk{Ino: f, Lock: fsop.Lock{Owner: 5, Type: r, Start: 50, End: 60}}).Lock; got.Type != w || got.Start != 0 || got.End != 99 {
		t.Errorf("getlk: %+v", got)
	}
	if got := o.get(&fsop.Getlk{Ino: f, Lock: fsop.Lock{Owner: 5, Type: r, Start: 100, End: 1000}}).Lock; got.Type != u {
		t.Errorf("getlk: %+v", got)
	}
	// Unlocking what is not locked, as every close does, costs no entry.
	if res, err := session(2, &fsop.Setlk{Ino: f, Lock: fsop.Lock{Owner: 77, Type: u, End: lockEnd}}); err != nil || res.Raw != nil {
		t.Errorf("unlocking nothing: %+v, %v", res, err)
	}
	res, err := session(0, &fsop.CloseSession{Session: 1})
	if err != nil || fmt.Sprint(res.Released) != fmt.Sprint([]fsop.Ino{f}) {
		t.Errorf("closing a session: %+v, %v", res, err)
	}
	held("2/8:100-149=0")
	if _, err := session(1, &fsop.Noop{}); !errors.Is(err, fsop.ENOTCONN) {
		t.Errorf("an entry of a closed session: %v", err)
	}
}

// TestReplies checks that replies are kept until they are acknowledged, but not
// without end, and that nothing is executed twice.
func TestReplies(t *testing.T) {
	o := newBrick(t)
	const id = cluster.SessionID(7)
	do := func(number, acked uint64, op fsop.Op) (*Result, error) {
		e := o.entry(op)
		e.Session, e.Number, e.Acked = id, number, acked
		return o.Execute(e, nil)
	}
	if _, err := do(0, 0, &fsop.OpenSession{Client: "c"}); err != nil {
		t.Fatal(err)
	}
	create := func(n uint64) fsop.Op {
		return &fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: fmt.Sprint(n), Mode: 0o600}, Excl: true}
	}
	first, err := do(1, 1, create(1))
	if err != nil {
		t.Fatal(err)
	}
	again, err := do(1, 1, create(1))
	if err != nil || !again.Dup || again.Raw != nil || again.Reply.Attr != first.Reply.Attr {
		t.Errorf("again: %+v, %v", again, err)
	}
	// A refused request was not executed; with the same number it may succeed later.
	if _, err := do(2, 1, create(1)); !errors.Is(err, fsop.EEXIST) {
		t.Errorf("refused: %v", err)
	}
	if r, err := do(2, 1, create(2)); err != nil || r.Dup {
		t.Errorf("after a refusal: %+v, %v", r, err)
	}
	if _, err := do(3, 3, create(3)); err != nil {
		t.Fatal(err)
	}
	if _, err := do(1, 1, create(1)); !errors.Is(err, fsop.ESTALE) {
		t.Errorf("a request whose reply was acknowledged: %v", err)
	}
	// One request waits; all others go on without acknowledging.
	const waiting = 4
	last := uint64(waiting + maxReplies + 100)
	for n := uint64(waiting + 1); n <= last; n++ {
		if _, err := do(n, waiting, create(n)); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(o.sessions[id].replies); n != maxReplies {
		t.Errorf("%d replies are kept", n)
	}
	if r, err := do(last-10, waiting, create(0)); err != nil || !r.Dup {
		t.Errorf("a recent request again: %+v, %v", r, err)
	}
	if r, ok, err := o.Answered(id, last-10); err != nil || !ok || r.Attr.Ino == 0 {
		t.Errorf("the answer to a recent request: %+v, %v, %v", r, ok, err)
	}
	for _, n := range []uint64{waiting, waiting + 1, last + 1} {
		if _, ok, err := o.Answered(id, n); ok || err != nil {
			t.Errorf("an answer to %d: %v, %v", n, ok, err)
		}
	}
	if _, err := do(waiting+1, waiting, create(0)); !errors.Is(err, fsop.ESTALE) {
		t.Errorf("a request whose reply was forgotten: %v", err)
	}
	if r, err := do(waiting, waiting, &fsop.Setlk{Ino: first.Reply.Attr.Ino, Lock: fsop.Lock{Type: fsop.LockWrite}}); err != nil || r.Dup {
		t.Errorf("the one that waited: %+v, %v", r, err)
	}
	// All of that survives.
	o.settleAll()
	want := o.sessions[id]
	o.Close(true)
	back := openBrick(t, o.opts)
	got := back.sessions[id]
	if got.acked != want.acked || len(got.replies) != len(want.replies) || got.Client != "c" {
		t.Errorf("after a restart: acked %d, %d replies; want %d, %d", got.acked, len(got.replies), want.acked, len(want.replies))
	}
}

// TestSetid has the rules by which set-user-id and set-group-id come and go.
func TestSetid(t *testing.T) {
	o := newBrick(t)
	mode := func(ino fsop.Ino) uint32 { return o.get(&fsop.Getattr{Ino: ino}).Attr.Mode & 0o7777 }
	d := o.mkdir(fsop.RootIno, "d")
	o.must(&fsop.Setattr{Ino: d, Valid: fsop.SetMode | fsop.SetGID, Mode: 0o2775, GID: 50})
	a := o.must(&fsop.Create{Node: fsop.Node{Parent: d, Name: "f", Mode: 0o644, UID: 7, GID: 7}}).Attr
	if a.GID != 50 || a.UID != 7 {
		t.Errorf("in a set-group-id directory: %+v", a)
	}
	sub := o.must(&fsop.Mkdir{Node: fsop.Node{Parent: d, Name: "s", Mode: 0o755, GID: 7}}).Attr
	if sub.GID != 50 || sub.Mode&syscall.S_ISGID == 0 {
		t.Errorf("a directory in it: %+v", sub)
	}
	for _, c := range []struct {
		before, after uint32
		op            func(fsop.Ino) fsop.Op
	}{
		{0o6755, 0o0755, func(i fsop.Ino) fsop.Op { return &fsop.Write{Ino: i, KillPriv: true, Data: []byte("x")} }},
		{0o6755, 0o6755, func(i fsop.Ino) fsop.Op { return &fsop.Write{Ino: i, Data: []byte("x")} }},
		{0o2644, 0o2644, func(i fsop.Ino) fsop.Op { return &fsop.Write{Ino: i, KillPriv: true, Data: []byte("x")} }},
		{0o6755, 0o0755, func(i fsop.Ino) fsop.Op { return &fsop.Setattr{Ino: i, Valid: fsop.SetUID, UID: 3} }},
		{0o6755, 0o0755, func(i fsop.Ino) fsop.Op { return &fsop.Setattr{Ino: i, Valid: fsop.SetSize | fsop.SetKillPriv} }},
		{0o6644, 0o0644, func(i fsop.Ino) fsop.Op {
			return &fsop.Setattr{Ino: i, Valid: fsop.SetKillPriv | fsop.SetKillSGID}
		}},
		{0o6755, 0o6711, func(i fsop.Ino) fsop.Op {
			return &fsop.Setattr{Ino: i, Valid: fsop.SetUID | fsop.SetMode, Mode: 0o6711}
		}},
	} {
		o.must(&fsop.Setattr{Ino: a.Ino, Valid: fsop.SetMode, Mode: c.before})
		o.must(&fsop.Setxattr{Ino: a.Ino, Name: capsXattr, Value: []byte("caps")})
		op := c.op(a.Ino)
		o.must(op)
		if got := mode(a.Ino); got != c.after {
			t.Errorf("%o and %s: %o, want %o", c.before, fsop.String(op), got, c.after)
		}
		if n := len(o.get(&fsop.Listxattr{Ino: a.Ino}).Data); n != 0 {
			t.Errorf("%s left the capabilities", fsop.String(op))
		}
	}
	// Directories keep theirs.
	o.must(&fsop.Setattr{Ino: d, Valid: fsop.SetUID, UID: 9})
	if got := mode(d); got != 0o2775 {
		t.Errorf("a directory after chown: %o", got)
	}
}

// TestOrphan follows a file that is unlinked while somebody has it open.
func TestOrphan(t *testing.T) {
	o := newBrick(t)
	f := o.create(fsop.RootIno, "f")
	o.write(f, 0, bytes.Repeat([]byte("x"), 100000))
	o.settleAll()
	if a := o.must(&fsop.Unlink{Parent: fsop.RootIno, Name: "f"}).Attr; a.Ino != f || a.Nlink != 0 {
		t.Errorf("unlink: %+v", a)
	}
	o.write(f, 50, []byte("still"))
	if got := o.contents(f); len(got) != 100000 || !bytes.Equal(got[50:55], []byte("still")) {
		t.Error("contents of an unlinked file")
	}
	if got := o.Orphans(0, 10); len(got) != 1 || got[0] != f {
		t.Errorf("orphans: %v", got)
	}
	o.settleAll()
	o.must(&fsop.Reap{Inos: []fsop.Ino{f, f}})
	if _, _, err := o.Read(context.Background(), &fsop.Read{Ino: f, Len: 1}); !errors.Is(err, fsop.ESTALE) {
		t.Errorf("after Reap: %v", err)
	}
	files := func() (n int) {
		o.data.List(func(data.Name) error { n++; return nil })
		return n
	}
	if files() != 1 {
		t.Errorf("%d data files before the metadata has forgotten them", files())
	}
	o.settleAll()
	if files() != 0 {
		t.Errorf("%d data files are left", files())
	}
	if st := o.state; st.Inodes != 1 || st.Blocks != 0 {
		t.Errorf("usage: %+v", st)
	}
}

// TestRefusesOrder has entries that must not be executed.
func TestRefusesOrder(t *testing.T) {
	o := newBrick(t)
	o.create(fsop.RootIno, "f")
	for name, change := range map[string]func(*proto.Entry){
		"a gap":          func(e *proto.Entry) { e.Pos.Seq++ },
		"a repetition":   func(e *proto.Entry) { e.Pos.Seq-- },
		"an old epoch":   func(e *proto.Entry) { e.Pos.Epoch = 0 },
		"an early time":  func(e *proto.Entry) { e.Time = o.LastTime() },
		"an empty entry": func(e *proto.Entry) { *e = proto.Entry{Op: &fsop.Noop{}} },
	} {
		e := o.entry(&fsop.Noop{})
		change(e)
		var errno fsop.Errno
		if _, err := o.Execute(e, nil); err == nil || errors.As(err, &errno) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if o.Err() != nil {
		t.Errorf("the brick failed: %v", o.Err())
	}
	o.must(&fsop.Noop{})
}
