package brick

import (
	"slices"
	"testing"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
)

// TestTmpfile: a file without a name is not reaped before its session has the
// answer, gets one name at most, and none with O_EXCL.
func TestTmpfile(t *testing.T) {
	o := newBrick(t)
	const me = cluster.SessionID(1)
	number := uint64(0)
	try := func(op fsop.Op) (*Result, error) {
		number++
		return o.as(me, number, 0, op)
	}
	must := func(op fsop.Op) *fsop.Reply {
		t.Helper()
		r, err := try(op)
		if err != nil {
			t.Fatalf("%s: %v", fsop.String(op), err)
		}
		return &r.Reply
	}
	must(&fsop.OpenSession{Client: "c"})
	make := func(excl bool) fsop.Ino {
		t.Helper()
		r := must(&fsop.Tmpfile{Node: fsop.Node{Parent: fsop.RootIno, Mode: 0o640}, Excl: excl})
		if r.Attr.Nlink != 0 || !r.Attr.IsRegular() || !r.Window {
			t.Fatalf("%+v", r)
		}
		return r.Attr.Ino
	}
	orphans := func(when string, want ...fsop.Ino) {
		t.Helper()
		if got := o.Orphans(0, 10); !slices.Equal(got, want) {
			t.Errorf("%s: to be reaped %v, want %v", when, got, want)
		}
	}
	link := func(ino fsop.Ino, name string, want error) {
		t.Helper()
		if _, err := try(&fsop.Link{Ino: ino, Parent: fsop.RootIno, Name: name}); err != want {
			t.Errorf("linking %d as %s: %v, want %v", ino, name, err, want)
		}
	}

	before := o.get(&fsop.Getattr{Ino: fsop.RootIno}).Attr
	a, b, excl := make(false), make(false), make(true)
	if now := o.get(&fsop.Getattr{Ino: fsop.RootIno}).Attr; now != before {
		t.Errorf("the directory was %+v and is %+v", before, now)
	}
	orphans("at first")
	must(&fsop.CloseWindow{Ino: b, Session: uint64(me)})
	orphans("one without a window", b)
	link(excl, "excl", fsop.ENOENT)
	link(b, "b", nil)
	orphans("with a name")
	must(&fsop.Unlink{Parent: fsop.RootIno, Name: "b"})
	link(b, "again", fsop.ENOENT)
	orphans("without it", b)
	if after := o.Orphans(b, 10); len(after) != 0 {
		t.Errorf("after the last one: %v", after)
	}
	if _, err := o.as(0, 0, 0, &fsop.CloseSession{Session: uint64(me), Away: true}); err != nil {
		t.Fatal(err)
	}
	orphans("when nobody hears of the session", a, b, excl)
	o.must(&fsop.Reap{Inos: []fsop.Ino{a, b, excl}})
	orphans("in the end")
}
