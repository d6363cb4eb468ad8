package brick

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"mortar/internal/brick/meta"
	"mortar/internal/disk"
	"mortar/internal/fsop"
)

func (o *opened) subvolume(name string, size, inodes uint64) fsop.Ino {
	o.t.Helper()
	return o.must(&fsop.MakeSubvolume{Node: fsop.Node{Parent: fsop.RootIno, Name: name, Mode: 0o755}, Size: size, Inodes: inodes}).Attr.Ino
}

// uses checks the account of a subvolume.
func (o *opened) uses(ino fsop.Ino, bytes, inodes uint64) {
	o.t.Helper()
	all, err := o.Subvolumes(ino)
	if err != nil || len(all) != 1 {
		o.t.Fatalf("%+v, %v", all, err)
	}
	if all[0].UsedSize != bytes || all[0].UsedInodes != inodes {
		o.t.Errorf("%d bytes and %d inodes are used, want %d and %d", all[0].UsedSize, all[0].UsedInodes, bytes, inodes)
	}
}

// TestAccount has an example of everything that counts, in numbers, and of what does not.
func TestAccount(t *testing.T) {
	fs := disk.NewMem()
	format(t, fs, "/b")
	o := openBrick(t, testOptions(fs))
	top := o.subvolume("s", 0, 0)
	o.uses(top, 0, 1)
	f := o.create(top, "f")
	o.uses(top, 0, 2)
	o.write(f, 0, []byte("x"))
	o.uses(top, 4096, 2)
	o.write(f, 4095, []byte("xx"))
	o.uses(top, 8192, 2)
	o.write(f, 1<<20, []byte("behind a hole"))
	o.uses(top, 3*4096, 2)
	o.must(&fsop.Fallocate{Ino: f, Mode: fsop.FallocKeepSize, Off: 1 << 21, Len: 10 * 4096})
	o.uses(top, 13*4096, 2)
	o.must(&fsop.Fallocate{Ino: f, Mode: fsop.FallocKeepSize | fsop.FallocPunchHole, Off: 0, Len: 4096})
	o.uses(top, 12*4096, 2)
	o.must(&fsop.Setattr{Ino: f, Valid: fsop.SetSize, Size: 5000})
	o.uses(top, 4096, 2)
	o.must(&fsop.Setattr{Ino: f, Valid: fsop.SetSize, Size: 1 << 40})
	o.uses(top, 4096, 2)
	o.must(&fsop.Setxattr{Ino: f, Name: "user.x", Value: make([]byte, 100)})
	o.uses(top, 4096+106, 2)
	o.must(&fsop.Setxattr{Ino: f, Name: "user.x", Value: make([]byte, 10)})
	o.uses(top, 4096+16, 2)
	o.must(&fsop.Removexattr{Ino: f, Name: "user.x"})
	o.uses(top, 4096, 2)
	o.must(&fsop.Setxattr{Ino: f, Name: "security.capability", Value: make([]byte, 20)})
	o.uses(top, 4096+39, 2)
	o.write(f, 4096, []byte("x")) // takes it away
	o.uses(top, 4096, 2)
	o.must(&fsop.Link{Ino: f, Parent: top, Name: "again"})
	o.must(&fsop.Symlink{Node: fsop.Node{Parent: top, Name: "sym"}, Target: "a long target"})
	o.uses(top, 4096, 3)
	sub := o.mkdir(top, "dir")
	o.must(&fsop.Rename{Parent: top, Name: "f", NewParent: sub, NewName: "f"})
	o.uses(top, 4096, 4)
	outside := o.mkdir(fsop.RootIno, "outside")
	g := o.create(outside, "g")
	o.write(g, 0, make([]byte, 4096))
	o.uses(top, 4096, 4)

	// Borders.
	o.fails(fsop.EXDEV, &fsop.Rename{Parent: sub, Name: "f", NewParent: outside, NewName: "f"})
	o.fails(fsop.EXDEV, &fsop.Rename{Parent: outside, Name: "g", NewParent: sub, NewName: "g"})
	o.fails(fsop.EXDEV, &fsop.Rename{Parent: fsop.RootIno, Name: "outside", NewParent: sub, NewName: "o"})
	o.fails(fsop.EXDEV, &fsop.Rename{Parent: outside, Name: "g", NewParent: sub, NewName: "f", Flags: fsop.RenameExchange})
	o.fails(fsop.EXDEV, &fsop.Link{Ino: g, Parent: sub, Name: "g"})
	o.fails(fsop.EXDEV, &fsop.Link{Ino: f, Parent: outside, Name: "f"})
	o.fails(fsop.EINVAL, &fsop.MakeSubvolume{Node: fsop.Node{Parent: sub, Name: "in", Mode: 0o755}})
	o.fails(fsop.EINVAL, &fsop.LimitSubvolume{Ino: sub, Valid: fsop.LimitAdopt})
	o.must(&fsop.Rename{Parent: fsop.RootIno, Name: "s", NewParent: outside, NewName: "t"})
	if all, err := o.Subvolumes(0); err != nil || len(all) != 1 || all[0].Path != "outside/t" {
		t.Errorf("%+v, %v", all, err)
	}

	// Gone is what is reaped, not what has no name.
	o.must(&fsop.Unlink{Parent: sub, Name: "f"})
	o.must(&fsop.Unlink{Parent: top, Name: "again"})
	o.uses(top, 4096, 4)
	o.must(&fsop.Reap{Inos: []fsop.Ino{f}})
	o.uses(top, 0, 3)
}

// TestAdopt: a directory becomes a subvolume with all that is in it, which is counted; or not at all, if
// somebody else has a part of it or it is too much for one change.
func TestAdopt(t *testing.T) {
	fs := disk.NewMem()
	format(t, fs, "/b")
	o := openBrick(t, testOptions(fs))
	web := o.mkdir(fsop.RootIno, "web")
	f := o.create(web, "f")
	o.write(f, 0, make([]byte, 5000))
	o.must(&fsop.Setxattr{Ino: f, Name: "user.x", Value: make([]byte, 10)})
	deep := o.mkdir(o.mkdir(web, "a"), "b")
	o.must(&fsop.Symlink{Node: fsop.Node{Parent: deep, Name: "sym"}, Target: "a long target"})
	o.must(&fsop.Link{Ino: f, Parent: deep, Name: "again"})
	gone := o.create(web, "gone")
	o.write(gone, 0, make([]byte, 4096))
	o.must(&fsop.Unlink{Parent: web, Name: "gone"})
	adopt := &fsop.LimitSubvolume{Ino: web, Valid: fsop.LimitAdopt | fsop.LimitSize, Size: 4096}

	o.must(&fsop.Link{Ino: f, Parent: fsop.RootIno, Name: "outside"})
	o.fails(fsop.EXDEV, adopt)
	o.must(&fsop.Unlink{Parent: fsop.RootIno, Name: "outside"})
	o.must(&fsop.MakeSubvolume{Node: fsop.Node{Parent: deep, Name: "nested", Mode: 0o755}})
	o.fails(fsop.EINVAL, adopt)
	o.must(&fsop.Rmdir{Parent: deep, Name: "nested"})
	o.must(adopt)
	o.uses(web, 2*4096+16, 5) // web, f, a, b, sym
	o.must(&fsop.Reap{Inos: []fsop.Ino{gone}})
	o.uses(web, 2*4096+16, 5)

	// From now on it is like any other.
	o.fails(fsop.EDQUOT, &fsop.Write{Ino: f, Off: 5000, Data: make([]byte, 4096)})
	o.fails(fsop.EXDEV, &fsop.Rename{Parent: deep, Name: "again", NewParent: fsop.RootIno, NewName: "again"})
	o.must(&fsop.Setattr{Ino: f, Valid: fsop.SetSize, Size: 4096})
	o.uses(web, 4096+16, 5)
	o.create(deep, "new")
	o.uses(web, 4096+16, 6)
	o.fails(fsop.EINVAL, &fsop.LimitSubvolume{Ino: deep, Valid: fsop.LimitAdopt})

	large := o.mkdir(fsop.RootIno, "large")
	for i := range fsop.AdoptMost {
		o.create(large, fmt.Sprint(i))
	}
	o.fails(fsop.E2BIG, &fsop.LimitSubvolume{Ino: large, Valid: fsop.LimitAdopt})
	o.must(&fsop.Unlink{Parent: large, Name: "0"})
	began := time.Now()
	o.must(&fsop.LimitSubvolume{Ino: large, Valid: fsop.LimitAdopt})
	t.Logf("%d inodes took %v", fsop.AdoptMost, time.Since(began).Round(time.Millisecond))
	o.uses(large, 0, fsop.AdoptMost)
	checked(t, o, fs)
}

// TestAccountOfACLs: access control lists count where they are kept, inherited ones too.
func TestAccountOfACLs(t *testing.T) {
	fs := disk.NewMem()
	format(t, fs, "/b")
	o := openBrick(t, testOptions(fs))
	top := o.subvolume("s", 0, 0)
	list := fsop.ACL{{Tag: fsop.ACLUserObj, Perm: 7}, {Tag: fsop.ACLUser, Perm: 6, ID: 1000}, {Tag: fsop.ACLGroupObj, Perm: 5}, {Tag: fsop.ACLMask, Perm: 7}, {Tag: fsop.ACLOther}}
	of := func(name string) uint64 { return uint64(len(name) + len(list.Append(nil))) }
	o.must(&fsop.Setxattr{Ino: top, Name: fsop.XattrDefaultACL, Value: list.Append(nil)})
	o.uses(top, of(fsop.XattrDefaultACL), 1)
	f := o.create(top, "f")
	o.uses(top, of(fsop.XattrDefaultACL)+of(fsop.XattrACL), 2)
	o.must(&fsop.Setattr{Ino: f, Valid: fsop.SetMode, Mode: 0o600})
	o.uses(top, of(fsop.XattrDefaultACL)+of(fsop.XattrACL), 2)
	o.must(&fsop.Removexattr{Ino: f, Name: fsop.XattrACL})
	o.uses(top, of(fsop.XattrDefaultACL), 2)
	o.mkdir(top, "d")
	o.uses(top, 2*of(fsop.XattrDefaultACL)+of(fsop.XattrACL), 3)
	o.must(&fsop.LimitSubvolume{Ino: top, Valid: fsop.LimitSize, Size: 1})
	o.fails(fsop.EDQUOT, &fsop.Create{Node: fsop.Node{Parent: top, Name: "g", Mode: 0o644}})
	checked(t, o, fs)
}

// TestLimits: what fits is taken to the last block and inode, what does not is
// refused and changes nothing, and what gives back is not refused.
func TestLimits(t *testing.T) {
	fs := disk.NewMem()
	format(t, fs, "/b")
	o := openBrick(t, testOptions(fs))
	top := o.subvolume("s", 3*4096, 3)
	f := o.create(top, "f")
	o.write(f, 0, make([]byte, 2*4096))
	g := o.create(top, "g")
	o.fails(fsop.EDQUOT, &fsop.Create{Node: fsop.Node{Parent: top, Name: "h"}})
	o.fails(fsop.EDQUOT, &fsop.Mkdir{Node: fsop.Node{Parent: top, Name: "h"}})
	o.fails(fsop.EDQUOT, &fsop.Rename{Parent: top, Name: "f", NewParent: top, NewName: "f2", Flags: fsop.RenameWhiteout})
	o.fails(fsop.EDQUOT, &fsop.Write{Ino: g, Data: make([]byte, 4097)})
	o.fails(fsop.EDQUOT, &fsop.Fallocate{Ino: g, Len: 2 * 4096})
	o.write(g, 0, make([]byte, 4096))
	o.uses(top, 3*4096, 3)
	o.fails(fsop.EDQUOT, &fsop.Setxattr{Ino: g, Name: "user.x"})
	o.fails(fsop.EDQUOT, &fsop.Write{Ino: g, Off: 4096, Data: []byte("x")})
	o.write(g, 4000, make([]byte, 96))
	if st := o.get(&fsop.StatfsOp{Ino: g}).Statfs; st != (fsop.Statfs{Total: 3 * 4096, Files: 3}) {
		t.Errorf("df of a full one: %+v", st)
	}
	o.must(&fsop.LimitSubvolume{Ino: top, Valid: fsop.LimitSize | fsop.LimitInodes, Size: 4096, Inodes: 1})
	if st := o.get(&fsop.StatfsOp{Ino: top}).Statfs; st != (fsop.Statfs{Total: 4096, Files: 1}) {
		t.Errorf("df of one that has too much: %+v", st)
	}
	o.must(&fsop.Setattr{Ino: f, Valid: fsop.SetSize, Size: 4096})
	o.write(f, 0, make([]byte, 4096))
	o.must(&fsop.Unlink{Parent: top, Name: "g"})
	o.must(&fsop.Reap{Inos: []fsop.Ino{g}})
	o.uses(top, 4096, 2)
	if st := o.get(&fsop.StatfsOp{Ino: fsop.RootIno}).Statfs; st.Total <= 1<<20 {
		t.Errorf("df of the volume: %+v", st)
	}
}

// TestWindowNearTheLimit: near its limit nobody may tell of writes before they are there.
func TestWindowNearTheLimit(t *testing.T) {
	fs := disk.NewMem()
	format(t, fs, "/b")
	o := openBrick(t, testOptions(fs))
	top := o.subvolume("s", 1<<20, 0)
	e := o.entry(&fsop.OpenSession{Client: "c"})
	e.Session, e.Number = 1, 1
	if _, err := o.Execute(e, nil); err != nil {
		t.Fatal(err)
	}
	number := uint64(1)
	do := func(op fsop.Op) *fsop.Reply {
		t.Helper()
		number++
		e := o.entry(op)
		e.Session, e.Number = 1, number
		r, err := o.Execute(e, nil)
		if err != nil {
			t.Fatal(err)
		}
		return &r.Reply
	}
	r := do(&fsop.Create{Node: fsop.Node{Parent: top, Name: "f"}, Window: fsop.WindowAsk})
	if !r.Window {
		t.Error("no window although there is room")
	}
	f := r.Attr.Ino
	if r := do(&fsop.Write{Ino: f, Data: make([]byte, 3<<18), Window: fsop.WindowHeld | fsop.WindowAsk}); !r.Window {
		t.Error("the window is to be given up although there was room")
	}
	if r := do(&fsop.Write{Ino: f, Off: 3 << 18, Data: make([]byte, 4096), Window: fsop.WindowHeld | fsop.WindowAsk}); !r.Window {
		t.Error("the window is to be given up when exactly a quarter was left")
	}
	if r := do(&fsop.Write{Ino: f, Data: make([]byte, 4096), Window: fsop.WindowHeld | fsop.WindowAsk}); r.Window {
		t.Error("the window may be kept although the limit is near")
	}
	if r := do(&fsop.Create{Node: fsop.Node{Parent: top, Name: "g"}, Window: fsop.WindowAsk}); r.Window {
		t.Error("a window although the limit is near")
	}

	// The same for files that are told of before they are made, where inodes are few.
	dir := func(name string) *fsop.Mkdir {
		return &fsop.Mkdir{Node: fsop.Node{Parent: fsop.RootIno, Name: name}, Window: fsop.WindowAsk}
	}
	if r = do(dir("in no subvolume")); !r.Window {
		t.Fatal("no window of a new directory")
	}
	few := o.subvolume("few", 0, fewInodes+3)
	in := dir("d")
	in.Parent = few
	if r = do(in); !r.Window {
		t.Fatal("no window of a directory although there is room")
	}
	d, first := r.Attr.Ino, fsop.Ino(do(&fsop.Reserve{}).Off)
	save := func(i int) *fsop.Reply {
		return do(&fsop.Make{Node: fsop.Node{Parent: d, Name: fmt.Sprint(i)}, First: fsop.Write{Ino: first + fsop.Ino(i), Window: fsop.WindowAsk}})
	}
	for i := range 3 {
		r := save(i)
		if want := i < 2; r.Window != want {
			t.Errorf("file %d: %v that more can be told of, want %v", i, r.Window, want)
		}
		if r.Attr.Window != 1 {
			t.Errorf("file %d: its maker, who may have written more of it, does not hold its window", i)
		}
	}
	in.Name = "e"
	if r := do(in); r.Window {
		t.Error("a window of a directory although the limit is near")
	}
}

// checked closes the brick, looks for contradictions in it, and opens it again.
func checked(t *testing.T, o *opened, fs *disk.Mem) *opened {
	t.Helper()
	o.Close(false)
	off := offline(t, fs, "/b", false)
	if _, err := off.Check(t.Context(), true, func(p Problem) { t.Errorf("%v", p) }); err != nil {
		t.Fatal(err)
	}
	off.Close()
	return openBrick(t, testOptions(fs))
}

// TestSweepOfASubvolume removes a subvolume of many names and deep directories, in steps, with
// power cuts between them.
func TestSweepOfASubvolume(t *testing.T) {
	fs := disk.NewMem()
	format(t, fs, "/b")
	o := openBrick(t, testOptions(fs))
	top := o.subvolume("s", 0, 0)
	dir := top
	for i := range 700 {
		dir = o.mkdir(dir, "deep")
		if i == 300 {
			o.create(dir, "half way")
		}
	}
	for d := range 3 {
		wide := o.mkdir(top, fmt.Sprint("wide", d))
		for i := range 400 {
			o.create(wide, fmt.Sprint(i))
		}
	}
	held := o.create(top, "held")
	o.write(held, 0, make([]byte, 4096))
	o.must(&fsop.Unlink{Parent: top, Name: "held"})
	o.uses(top, 4096, 1+701+3*401+1)

	remove := &fsop.RemoveSubvolume{Parent: fsop.RootIno, Name: "s", Ino: top}
	o.fails(fsop.ENOENT, &fsop.RemoveSubvolume{Parent: fsop.RootIno, Name: "t", Ino: top})
	o.must(remove)
	if r := o.must(remove); r.Attr.Ino != 0 {
		t.Errorf("again: %+v", r)
	}
	o.fails(fsop.ENOENT, &fsop.Create{Node: fsop.Node{Parent: dir, Name: "late"}})
	o.subvolume("s", 0, 0) // the name is free
	if all, err := o.Subvolumes(0); err != nil || len(all) != 1 || all[0].Ino == top {
		t.Errorf("listed: %+v, %v", all, err)
	}
	steps := 0
	rng := rand.New(rand.NewPCG(1, 1))
	for len(o.Swept(1)) > 0 {
		orphans := len(o.Orphans(0, 1<<16))
		o.must(&fsop.Sweep{Ino: top})
		if n := len(o.Orphans(0, 1<<16)) - orphans; n > fsop.SweepMost+1 || n == 0 {
			t.Errorf("step %d removed %d names", steps, n)
		}
		steps++
		if steps == 2 {
			if err := o.Sync(t.Context(), o.Tail().Seq); err != nil {
				t.Fatal(err)
			}
			fs = fs.Crash(rng)
			o.Close(false)
			o = checked(t, openBrick(t, testOptions(fs)), fs)
		}
		if steps > 20 {
			t.Fatal("it does not end")
		}
	}
	if want := (701 + 3*401 + fsop.SweepMost - 1) / fsop.SweepMost; steps != want {
		t.Errorf("%d steps, want %d", steps, want)
	}
	if r, err := o.do(&fsop.Sweep{Ino: top}); err != nil || r.Raw != nil {
		t.Errorf("a step too much: %+v, %v", r, err)
	}
	o = checked(t, o, fs)
	orphans := o.Orphans(0, 1<<16)
	o.must(&fsop.Reap{Inos: slices.DeleteFunc(orphans, func(i fsop.Ino) bool { return i == held })})
	o = checked(t, o, fs)
	if s := o.subvols[top]; s == nil || s.UsedInodes != 1 || s.UsedSize != 4096 {
		t.Errorf("with a file that is held: %+v", s)
	}
	o.must(&fsop.Reap{Inos: []fsop.Ino{held}})
	if s := o.subvols[top]; s != nil || o.state.Inodes != 2 || o.state.Blocks != 0 {
		t.Errorf("in the end: %+v, %+v", s, o.state)
	}
	checked(t, o, fs)
}

// TestCheckFindsWrongAccounts: the check counts anew.
func TestCheckFindsWrongAccounts(t *testing.T) {
	for name, spoil := range map[string]func(b *meta.Batch, s *meta.Subvolume, f *meta.Inode){
		"bytes":           func(b *meta.Batch, s *meta.Subvolume, _ *meta.Inode) { s.UsedSize++; b.SetSubvolume(s) },
		"inodes":          func(b *meta.Batch, s *meta.Subvolume, _ *meta.Inode) { s.UsedInodes--; b.SetSubvolume(s) },
		"no record":       func(b *meta.Batch, s *meta.Subvolume, _ *meta.Inode) { b.DeleteSubvolume(s.Ino) },
		"another's inode": func(b *meta.Batch, _ *meta.Subvolume, f *meta.Inode) { f.Subvolume = 0; b.SetInode(f) },
	} {
		t.Run(name, func(t *testing.T) {
			fs := disk.NewMem()
			format(t, fs, "/b")
			o := openBrick(t, testOptions(fs))
			top := o.subvolume("s", 0, 0)
			f := o.create(top, "f")
			o.write(f, 0, make([]byte, 4096))
			o.must(&fsop.Setxattr{Ino: f, Name: "user.x", Value: []byte("y")})
			o.Close(true)
			off := offline(t, fs, "/b", false)
			s := *off.b.subvols[top]
			var n meta.Inode
			if ok, err := off.b.store.Inode(f, &n); !ok || err != nil {
				t.Fatal(ok, err)
			}
			problems := 0
			count := func(Problem) { problems++ }
			if _, err := off.Check(t.Context(), false, count); err != nil || problems != 0 {
				t.Fatalf("%d problems before, %v", problems, err)
			}
			batch := off.b.store.NewBatch()
			defer batch.Close()
			spoil(batch, &s, &n)
			if err := off.b.store.Commit(batch); err != nil {
				t.Fatal(err)
			}
			if _, err := off.Check(t.Context(), false, count); err != nil || problems == 0 {
				t.Errorf("%d problems, %v", problems, err)
			}
		})
	}
}
