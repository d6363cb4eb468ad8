package brick

import (
	"bytes"
	"context"
	"errors"
	"syscall"
	"testing"

	"mortar/internal/fsop"
)

// xattr reads an attribute, nil if there is none.
func (o *opened) xattr(ino fsop.Ino, name string) []byte {
	o.t.Helper()
	r, _, err := o.Read(context.Background(), &fsop.Getxattr{Ino: ino, Name: name})
	if errors.Is(err, fsop.ENODATA) {
		return nil
	}
	if err != nil {
		o.t.Fatal(err)
	}
	return r.Data
}

// TestACL: a list changes the mode and the mode the list; what is made in a
// directory with a default list has what that makes of its mode.
func TestACL(t *testing.T) {
	o := newBrick(t)
	const root = fsop.RootIno
	list := fsop.ACL{{Tag: fsop.ACLUserObj, Perm: 7}, {Tag: fsop.ACLUser, Perm: 6, ID: 1000}, {Tag: fsop.ACLGroupObj, Perm: 5}, {Tag: fsop.ACLMask, Perm: 7}, {Tag: fsop.ACLOther}}
	value := list.Append(nil)
	f, d := o.create(root, "f"), o.mkdir(root, "d")
	set := func(ino fsop.Ino, name string, v []byte) fsop.Attr {
		t.Helper()
		return o.must(&fsop.Setxattr{Ino: ino, Name: name, Value: v}).Attr
	}
	if a := set(f, fsop.XattrACL, value); a.Mode&0o777 != 0o770 || a.Flags != fsop.FlagACL {
		t.Errorf("with an ACL: mode %o, flags %#x", a.Mode, a.Flags)
	}
	if got := o.xattr(f, fsop.XattrACL); !bytes.Equal(got, value) {
		t.Errorf("the ACL is %x, want %x", got, value)
	}
	a := o.must(&fsop.Setattr{Ino: f, Valid: fsop.SetMode, Mode: 0o640}).Attr
	want := append(fsop.ACL{}, list...)
	want.Chmod(0o640)
	if got := o.xattr(f, fsop.XattrACL); a.Mode&0o777 != 0o640 || !bytes.Equal(got, want.Append(nil)) {
		t.Errorf("after chmod: mode %o, ACL %x, want %x", a.Mode, got, want.Append(nil))
	}
	simple := fsop.ACL{{Tag: fsop.ACLUserObj, Perm: 6}, {Tag: fsop.ACLGroupObj, Perm: 4}, {Tag: fsop.ACLOther, Perm: 4}}
	if a := set(f, fsop.XattrACL, simple.Append(nil)); a.Mode&0o777 != 0o644 || a.Flags != 0 || o.xattr(f, fsop.XattrACL) != nil {
		t.Errorf("with an ACL that is a mode: mode %o, flags %#x, ACL %x", a.Mode, a.Flags, o.xattr(f, fsop.XattrACL))
	}
	o.must(&fsop.Setattr{Ino: f, Valid: fsop.SetMode, Mode: 0o2755})
	r := o.must(&fsop.Setxattr{Ino: f, Name: fsop.XattrACL, Value: value, Flags: fsop.XattrKillSGID})
	if r.Attr.Mode&0o7777 != 0o770 {
		t.Errorf("an ACL by a stranger to the group: mode %o", r.Attr.Mode)
	}
	o.must(&fsop.Removexattr{Ino: f, Name: fsop.XattrACL})
	if o.xattr(f, fsop.XattrACL) != nil {
		t.Error("a removed ACL is there")
	}
	o.must(&fsop.Removexattr{Ino: f, Name: fsop.XattrACL}) // none is no error
	o.fails(fsop.EACCES, &fsop.Setxattr{Ino: f, Name: fsop.XattrDefaultACL, Value: value})
	o.fails(fsop.EINVAL, &fsop.Setxattr{Ino: f, Name: fsop.XattrACL, Value: []byte("x")})

	if a := set(d, fsop.XattrDefaultACL, value); a.Mode&0o777 != 0o755 || a.Flags != fsop.FlagDefaultACL {
		t.Errorf("with a default ACL: mode %o, flags %#x", a.Mode, a.Flags)
	}
	node := func(name string, mode uint32) fsop.Node {
		return fsop.Node{Parent: d, Name: name, Mode: mode, Umask: 0o077}
	}
	a = o.must(&fsop.Create{Node: node("f", 0o664), Excl: true}).Attr
	want = append(fsop.ACL{}, list...)
	if mode := want.Inherit(0o664); a.Mode&0o777 != mode || mode != 0o660 || !bytes.Equal(o.xattr(a.Ino, fsop.XattrACL), want.Append(nil)) {
		t.Errorf("a new file: mode %o, want %o, ACL %x", a.Mode, mode, o.xattr(a.Ino, fsop.XattrACL))
	}
	a = o.must(&fsop.Mkdir{Node: node("d", 0o777)}).Attr
	if a.Flags != fsop.FlagACL|fsop.FlagDefaultACL || !bytes.Equal(o.xattr(a.Ino, fsop.XattrDefaultACL), value) {
		t.Errorf("a new directory: flags %#x, default ACL %x", a.Flags, o.xattr(a.Ino, fsop.XattrDefaultACL))
	}
	a = o.must(&fsop.Symlink{Node: fsop.Node{Parent: d, Name: "l"}, Target: "x"}).Attr
	if a.Mode&0o777 != 0o777 || a.Flags != 0 {
		t.Errorf("a new link: mode %o, flags %#x", a.Mode, a.Flags)
	}
	o.must(&fsop.Removexattr{Ino: d, Name: fsop.XattrDefaultACL})
	if a = o.must(&fsop.Create{Node: node("g", 0o666), Excl: true}).Attr; a.Mode&0o777 != 0o600 {
		t.Errorf("a file made under umask 077: mode %o", a.Mode)
	}
}

// TestFlags: what is immutable stays, what is append-only grows and does nothing else.
func TestFlags(t *testing.T) {
	o := newBrick(t)
	const root = fsop.RootIno
	f, g, d := o.create(root, "f"), o.create(root, "g"), o.mkdir(root, "d")
	in := o.create(d, "in")
	o.must(&fsop.Write{Ino: f, Data: []byte("one")})
	flag := func(ino fsop.Ino, flags fsop.Flag) {
		t.Helper()
		if a := o.must(&fsop.Setattr{Ino: ino, Valid: fsop.SetFlags, Flags: flags}).Attr; a.Flags != flags {
			t.Errorf("flags %#x, want %#x", a.Flags, flags)
		}
	}
	refused := func(ops ...fsop.Op) {
		t.Helper()
		for _, op := range ops {
			o.fails(fsop.EPERM, op)
		}
	}
	still := []fsop.Op{
		&fsop.Write{Ino: f, Data: []byte("x")},
		&fsop.Setattr{Ino: f, Valid: fsop.SetSize},
		&fsop.Setattr{Ino: f, Valid: fsop.SetMode, Mode: 0o600},
		&fsop.Setattr{Ino: f, Valid: fsop.SetUID, UID: 1},
		&fsop.Setattr{Ino: f, Valid: fsop.SetMtime},
		&fsop.Setxattr{Ino: f, Name: "user.a"},
		&fsop.Setxattr{Ino: f, Name: fsop.XattrACL},
		&fsop.Removexattr{Ino: f, Name: "user.a"},
		&fsop.Fallocate{Ino: f, Len: 1, Mode: fsop.FallocPunchHole | fsop.FallocKeepSize},
		&fsop.Unlink{Parent: root, Name: "f"},
		&fsop.Link{Ino: f, Parent: root, Name: "l"},
		&fsop.Rename{Parent: root, Name: "f", NewParent: root, NewName: "h"},
		&fsop.Rename{Parent: root, Name: "g", NewParent: root, NewName: "f"},
		&fsop.Rename{Parent: root, Name: "g", NewParent: root, NewName: "f", Flags: fsop.RenameExchange},
	}
	for _, flags := range []fsop.Flag{fsop.FlagImmutable, fsop.FlagAppend, fsop.FlagImmutable | fsop.FlagAppend} {
		flag(f, flags)
		refused(still...)
	}
	flag(f, fsop.FlagImmutable)
	refused(&fsop.Write{Ino: f, Append: true, Data: []byte("x")}, &fsop.Setattr{Ino: f, Valid: fsop.SetMtimeNow}, &fsop.Fallocate{Ino: f, Len: 10})
	flag(f, fsop.FlagAppend)
	o.must(&fsop.Write{Ino: f, Append: true, Data: []byte("two")})
	o.must(&fsop.Write{Ino: f, Off: 6, Data: []byte("three")}) // an append whose place the session knew
	flag(f, 0)
	o.must(&fsop.Unlink{Parent: root, Name: "f"})

	node := fsop.Node{Parent: d, Name: "new", Mode: 0o644}
	out := []fsop.Op{
		&fsop.Unlink{Parent: d, Name: "in"},
		&fsop.Rename{Parent: d, Name: "in", NewParent: root, NewName: "in"},
		&fsop.Rename{Parent: d, Name: "in", NewParent: d, NewName: "other"},
		&fsop.Rename{Parent: root, Name: "g", NewParent: d, NewName: "in"},
		&fsop.Rmdir{Parent: root, Name: "d"},
	}
	flag(d, fsop.FlagImmutable)
	refused(out...)
	refused(&fsop.Create{Node: node, Excl: true}, &fsop.Mkdir{Node: node}, &fsop.Mknod{Node: node}, &fsop.Symlink{Node: node, Target: "x"},
		&fsop.Link{Ino: g, Parent: d, Name: "l"}, &fsop.Rename{Parent: root, Name: "g", NewParent: d, NewName: "n"})
	o.must(&fsop.Write{Ino: in, Data: []byte("x")})
	flag(d, fsop.FlagAppend)
	refused(out...)
	if a := o.must(&fsop.Create{Node: node, Excl: true}).Attr; a.Flags != 0 || a.Type() != syscall.S_IFREG {
		t.Errorf("a file made in an append-only directory: flags %#x, mode %o", a.Flags, a.Mode)
	}
	o.fails(fsop.EOPNOTSUPP, &fsop.Setattr{Ino: g, Valid: fsop.SetFlags, Flags: 1})
}
