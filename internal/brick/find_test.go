package brick

import (
	"testing"

	"mortar/internal/fsop"
)

// TestFind looks inodes up by number, as handles do.
func TestFind(t *testing.T) {
	o := newBrick(t)
	make := func(op fsop.Op) fsop.Attr { t.Helper(); return o.must(op).Attr }
	dir := make(&fsop.Mkdir{Node: fsop.Node{Parent: fsop.RootIno, Name: "d", Mode: 0o755}})
	sub := make(&fsop.Mkdir{Node: fsop.Node{Parent: dir.Ino, Name: "s", Mode: 0o755}})
	file := make(&fsop.Create{Node: fsop.Node{Parent: sub.Ino, Name: "f", Mode: 0o644}})
	other := make(&fsop.Create{Node: fsop.Node{Parent: sub.Ino, Name: "g", Mode: 0o644}})
	o.must(&fsop.Rename{Parent: dir.Ino, Name: "s", NewParent: fsop.RootIno, NewName: "moved"})
	o.must(&fsop.Unlink{Parent: sub.Ino, Name: "g"})
	for _, c := range []struct {
		what string
		ino  fsop.Ino
		name string
		want fsop.Ino
		err  error
	}{
		{"a file", file.Ino, fsop.Self, file.Ino, nil},
		{"a directory", sub.Ino, fsop.Self, sub.Ino, nil},
		{"the root", fsop.RootIno, fsop.Self, fsop.RootIno, nil},
		{"above one that was moved", sub.Ino, fsop.Above, fsop.RootIno, nil},
		{"above the root", fsop.RootIno, fsop.Above, fsop.RootIno, nil},
		{"above a file", file.Ino, fsop.Above, 0, fsop.ENOTDIR},
		{"without a name", other.Ino, fsop.Self, 0, fsop.ESTALE},
		{"never there", other.Ino + 100, fsop.Self, 0, fsop.ESTALE},
	} {
		r, _, err := o.Read(t.Context(), &fsop.Lookup{Parent: c.ino, Name: c.name})
		if err != c.err || err == nil && r.Attr.Ino != c.want {
			t.Errorf("%s: %+v, %v; want inode %d, %v", c.what, r, err, c.want, c.err)
		}
	}
}
