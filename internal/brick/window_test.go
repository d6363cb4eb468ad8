package brick

import (
	"testing"

	"mortar/internal/fsop"
)

// What a window's holder told of a file's times is what they are, unless it cannot be
// so; the directory's times are the primary's in any case.
func TestTimesThatWereTold(t *testing.T) {
	o := newBrick(t)
	if _, err := o.as(1, 0, 0, &fsop.OpenSession{Client: "c"}); err != nil {
		t.Fatal(err)
	}
	var number uint64
	var at int64 // of the last entry
	do := func(op fsop.Op) fsop.Reply {
		t.Helper()
		number++
		r, err := o.as(1, number, 1000, op)
		if err != nil {
			t.Fatal(err)
		}
		at = o.LastTime()
		return r.Reply
	}
	d := do(&fsop.Mkdir{Node: fsop.Node{Parent: fsop.RootIno, Name: "d", Mode: 0o755}, Window: fsop.WindowAsk}).Attr
	since := d.Ctime
	next := fsop.Ino(do(&fsop.Reserve{}).Off)
	do(&fsop.Noop{})
	expect := func(what string, a *fsop.Attr, atime, mtime, ctime int64) {
		t.Helper()
		if a.Atime != atime || a.Mtime != mtime || a.Ctime != ctime {
			t.Errorf("%s: times %d, %d, %d; want %d, %d, %d", what, a.Atime, a.Mtime, a.Ctime, atime, mtime, ctime)
		}
	}
	save := func(name string, first fsop.Write) fsop.Reply {
		t.Helper()
		first.Ino, next = next, next+1
		r := do(&fsop.Make{Node: fsop.Node{Parent: d.Ino, Name: name}, First: first})
		if r.Dir.Ino == d.Ino && (r.Dir.Mtime != at || r.Dir.Ctime != at) {
			t.Errorf("%s: the directory's times are %d and %d, want the entry's, %d", name, r.Dir.Mtime, r.Dir.Ctime, at)
		}
		return r
	}
	told := o.LastTime()
	a := save("told", fsop.Write{Data: []byte("x"), Told: told}).Attr
	expect("made as told", &a, told, told, told)
	a = save("empty", fsop.Write{Told: told}).Attr
	expect("made empty as told", &a, told, told, told)
	a = save("older than the window", fsop.Write{Told: since - 1}).Attr
	expect("made before the window was given", &a, since, since, since)
	a = save("later", fsop.Write{Told: at + 1e9}).Attr
	expect("made later than now", &a, at, at, at)
	a = save("set", fsop.Write{Data: []byte("x"), Told: told, Then: fsop.Setattr{Valid: fsop.SetMtime | fsop.SetAtimeNow, Mtime: 5}}).Attr
	expect("made as told, and set", &a, told, 5, told)

	a = do(&fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: "f", Mode: 0o644}, Window: fsop.WindowAsk}).Attr
	made := at
	do(&fsop.Noop{})
	told = o.LastTime()
	a = do(&fsop.Write{Ino: a.Ino, Data: []byte("x"), Window: fsop.WindowHeld | fsop.WindowAsk, Told: told}).Attr
	expect("written as told", &a, made, told, told)
	a = do(&fsop.Write{Ino: a.Ino, Data: []byte("x"), Window: fsop.WindowHeld | fsop.WindowAsk, Told: told - 1}).Attr
	expect("written before it was changed", &a, made, told, told)
	a = do(&fsop.Write{Ino: a.Ino, Data: []byte("x"), Told: told}).Attr
	expect("written by one who does not rely on a window", &a, made, at, at)
	told = at + 5
	a = do(&fsop.Write{Ino: a.Ino, Data: []byte("x"), Window: fsop.WindowHeld | fsop.WindowDone, Told: told}).Attr
	expect("written a moment ago, with the last of the window", &a, made, told, told)
}

// A directory that went with its subvolume goes for good, although a session could
// foretell files in it.
func TestRemovedDirectoryWithAWindow(t *testing.T) {
	o := newBrick(t)
	if _, err := o.as(1, 0, 0, &fsop.OpenSession{Client: "c"}); err != nil {
		t.Fatal(err)
	}
	top := o.subvolume("s", 0, 0)
	r, err := o.as(1, 1, 0, &fsop.Mkdir{Node: fsop.Node{Parent: top, Name: "d", Mode: 0o755}, Window: fsop.WindowAsk})
	if err != nil || !r.Reply.Window {
		t.Fatalf("%+v, %v; want a window", r, err)
	}
	o.must(&fsop.RemoveSubvolume{Parent: fsop.RootIno, Name: "s", Ino: top, Force: true})
	o.must(&fsop.Sweep{Ino: top})
	if all := o.Orphans(0, 10); len(all) != 2 {
		t.Errorf("%v are left to be reaped, want %v and %v", all, top, r.Reply.Attr.Ino)
	}
}
