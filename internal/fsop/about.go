package fsop

import "fmt"

// What can be said of an operation without carrying it out.

// Introduces says whether the reply to op tells of an inode, in Attr, as looking it
// up does: whoever gets it holds the inode from then on.
func Introduces(op Op) bool {
	switch op.(type) {
	case *Lookup, *Create, *Make, *Tmpfile, *Mkdir, *Mknod, *Symlink, *Link:
		return true
	}
	return false
}

// Place is a name in a directory.
type Place struct {
	Dir  Ino
	Name string
}

// Places lists the names that op looks up, makes or takes away; of a rename the old one, then the new one.
func Places(op Op) []Place {
	switch op := op.(type) {
	case *Lookup:
		if op.ByNumber() {
			return nil
		}
		return []Place{{op.Parent, op.Name}}
	case *Create:
		return []Place{{op.Parent, op.Name}}
	case *Make:
		return []Place{{op.Parent, op.Name}}
	case *Mkdir:
		return []Place{{op.Parent, op.Name}}
	case *Mknod:
		return []Place{{op.Parent, op.Name}}
	case *Symlink:
		return []Place{{op.Parent, op.Name}}
	case *Link:
		return []Place{{op.Parent, op.Name}}
	case *Unlink:
		return []Place{{op.Parent, op.Name}}
	case *Rmdir:
		return []Place{{op.Parent, op.Name}}
	case *Rename:
		return []Place{{op.Parent, op.Name}, {op.NewParent, op.NewName}}
	}
	return nil
}

// String prints an operation the way traces and test scripts show it.
func String(op Op) string {
	if m, ok := op.(*Make); ok {
		return fmt.Sprintf("make {Parent:%d Name:%q Ino:%d %d bytes}", m.Parent, m.Name, m.First.Ino, len(m.First.Data))
	}
	if w, ok := op.(*Write); ok {
		return fmt.Sprintf("write {Ino:%d Off:%d Append:%v %d bytes}", w.Ino, w.Off, w.Append, len(w.Data))
	}
	return fmt.Sprintf("%v %+v", op.Kind(), op)
}

// opSpace is what an operation without payload takes at most in a brick's log
// and metadata, in bytes.
const opSpace = 4096

// Space says how many bytes of a brick's disk op takes at most, and whether it
// helps to give some back.
func Space(op Op) (need uint64, frees bool) {
	switch op := op.(type) {
	case *Write:
		// Once in the log, once where it is settled. Both are whole blocks.
		blocks := (uint64(len(op.Data)) + opSpace - 1) / opSpace
		return (2*blocks + 1) * opSpace, false
	case *Make:
		need, _ = Space(&op.First)
		return need + opSpace, false
	case *Fallocate:
		if op.Mode&(FallocPunchHole|FallocZeroRange) != 0 {
			return opSpace, true
		}
		return op.Len + opSpace, false
	case *Setxattr:
		return 4*uint64(len(op.Value)) + opSpace, false
	case *Symlink:
		return 4*uint64(len(op.Target)) + opSpace, false
	case *Create, *Tmpfile, *Mkdir, *Mknod, *Link, *MakeSubvolume:
		return opSpace, false
	}
	return opSpace, true
}
