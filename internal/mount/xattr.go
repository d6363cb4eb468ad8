package mount

import (
	"bytes"
	"slices"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"mortar/internal/fsop"
)

// GetXAttr implements fuse.RawFileSystem.
func (f *fileSystem) GetXAttr(cancel <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	if !hasSpace(name) {
		return 0, fuse.Status(syscall.EOPNOTSUPP)
	}
	ino := fsop.Ino(h.NodeId)
	if name == capability && f.nodes.noCap(ino) ||
		(name == fsop.XattrACL || name == fsop.XattrDefaultACL) && f.nodes.marksOf(ino)&noACL != 0 {
		return 0, fuse.ENODATA
	}
	return f.xattr(cancel, h, dest, &fsop.Getxattr{Ino: ino, Name: name})
}

// spaces are the kinds of attributes that there are.
var spaces = []string{"user.", "trusted.", "security."}

// hasSpace says whether an attribute of that name can be.
func hasSpace(name string) bool {
	return name == fsop.XattrACL || name == fsop.XattrDefaultACL || slices.ContainsFunc(spaces, func(s string) bool { return strings.HasPrefix(name, s) })
}

// capability is asked for by the kernel before it writes to a file whose
// attributes it has just been told, to take it away.
const capability = "security.capability"

// ListXAttr implements fuse.RawFileSystem.
func (f *fileSystem) ListXAttr(cancel <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	return f.xattr(cancel, h, dest, &fsop.Listxattr{Ino: fsop.Ino(h.NodeId)})
}

func (f *fileSystem) xattr(cancel <-chan struct{}, h *fuse.InHeader, dest []byte, op fsop.Op) (uint32, fuse.Status) {
	r := f.begin(cancel, h)
	defer f.inflight.remove(r)
	reply, err := f.handler.Do(r, op)
	if err != nil {
		if x, ok := op.(*fsop.Getxattr); ok && err == fsop.ENODATA && x.Name == capability {
			f.nodes.setNoCap(x.Ino, seqOf(reply), r.began)
		}
		return 0, f.status(r, err)
	}
	data := reply.Data
	if _, list := op.(*fsop.Listxattr); list && h.Uid != 0 {
		data = withoutTrusted(data)
	}
	n := uint32(len(data))
	if len(data) > len(dest) {
		return n, fuse.ERANGE // go-fuse makes a success of it if only the size was asked for
	}
	copy(dest, data)
	return n, fuse.OK
}

// withoutTrusted takes the names out of a list that only root is shown.
func withoutTrusted(list []byte) []byte {
	var shown []byte
	for name := range bytes.SplitAfterSeq(list, []byte{0}) {
		if !bytes.HasPrefix(name, []byte("trusted.")) {
			shown = append(shown, name...)
		}
	}
	return shown
}

// SetXAttr implements fuse.RawFileSystem.
func (f *fileSystem) SetXAttr(cancel <-chan struct{}, in *fuse.SetXAttrIn, name string, value []byte) fuse.Status {
	if !hasSpace(name) {
		return fuse.Status(syscall.EOPNOTSUPP)
	}
	if len(value) > fsop.MaxXattr {
		return fuse.Status(syscall.E2BIG)
	}
	op := &fsop.Setxattr{Ino: fsop.Ino(in.NodeId), Name: name, Value: value, Flags: in.Flags}
	if in.SetXAttrFlags&fuse.SETXATTR_ACL_KILL_SGID != 0 {
		op.Flags |= fsop.XattrKillSGID
	}
	return f.setXattr(cancel, &in.InHeader, op)
}

// RemoveXAttr implements fuse.RawFileSystem.
func (f *fileSystem) RemoveXAttr(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	if !hasSpace(name) {
		return fuse.Status(syscall.EOPNOTSUPP)
	}
	return f.setXattr(cancel, h, &fsop.Removexattr{Ino: fsop.Ino(h.NodeId), Name: name})
}

func (f *fileSystem) setXattr(cancel <-chan struct{}, h *fuse.InHeader, op fsop.Op) fuse.Status {
	r := f.begin(cancel, h)
	defer f.inflight.remove(r)
	ino := fsop.Ino(h.NodeId)
	f.inflight.changing(ino) // of a directory, the kernel holds the lock
	defer f.inflight.doneChanging(ino)
	f.nodes.setXattr(ino)
	reply, err := f.handler.Do(r, op)
	f.nodes.setXattr(ino) // what was read meanwhile may be from before
	if err != nil {
		return f.status(r, err)
	}
	f.nodes.touched(ino, reply.Seq)
	f.nodes.changed(ino, &reply.Attr, reply.Seq, r.began)
	return fuse.OK
}
