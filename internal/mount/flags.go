package mount

import (
	"encoding/binary"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
)

// Requests of ioctl_iflags(2), and the older and the newer form of what they are about.
const (
	fsGetXattr = 0x801c581f // FS_IOC_FSGETXATTR
	fsSetXattr = 0x401c5820 // FS_IOC_FSSETXATTR
	fsxLen     = 28         // struct fsxattr, its first field are flags
)

// xflags are the flags of struct fsxattr, by those of FS_IOC_GETFLAGS.
var xflags = map[fsop.Flag]uint32{
	fsop.FlagImmutable: 0x08, fsop.FlagAppend: 0x10, fsop.FlagNoAtime: 0x40, fsop.FlagNoDump: 0x80,
}

// Ioctl implements fuse.RawFileSystem. The kernel has checked who asks, and that
// the object is a file or directory.
func (f *fileSystem) Ioctl(cancel <-chan struct{}, in *fuse.IoctlIn, data []byte, _ *fuse.IoctlOut, out []byte) fuse.Status {
	r := f.begin(cancel, &in.InHeader)
	defer f.inflight.remove(r)
	ino, ne := fsop.Ino(in.NodeId), binary.NativeEndian
	switch {
	case in.Cmd == unix.FS_IOC_GETFLAGS && len(out) >= 4:
		flags, err := f.flags(r, ino)
		if err != nil {
			return f.status(r, err)
		}
		ne.PutUint32(out, uint32(flags))
		return fuse.OK
	case in.Cmd == fsGetXattr && len(out) >= fsxLen:
		flags, err := f.flags(r, ino)
		if err != nil {
			return f.status(r, err)
		}
		var x uint32
		for flag, bit := range xflags {
			if flags&flag != 0 {
				x |= bit
			}
		}
		clear(out)
		ne.PutUint32(out, x)
		return fuse.OK
	case in.Cmd == unix.FS_IOC_SETFLAGS && len(data) >= 4:
		return f.setFlags(r, ino, fsop.Flag(ne.Uint32(data)))
	case in.Cmd == fsSetXattr && len(data) >= fsxLen:
		x := ne.Uint32(data)
		var flags fsop.Flag
		for flag, bit := range xflags {
			if x&bit != 0 {
				flags |= flag
			}
			x &^= bit
		}
		for _, b := range data[4:fsxLen] { // extent sizes and projects: there are none
			x |= uint32(b)
		}
		if x != 0 {
			return fuse.Status(syscall.EOPNOTSUPP)
		}
		return f.setFlags(r, ino, flags)
	}
	return fuse.Status(syscall.ENOTTY)
}

func (f *fileSystem) flags(r *request, ino fsop.Ino) (fsop.Flag, error) {
	reply, err := f.handler.Do(r, &fsop.Getattr{Ino: ino})
	if err != nil {
		return 0, err
	}
	return reply.Attr.Flags & fsop.UserFlags, nil
}

func (f *fileSystem) setFlags(r *request, ino fsop.Ino, flags fsop.Flag) fuse.Status {
	f.inflight.changing(ino) // the kernel holds its lock
	defer f.inflight.doneChanging(ino)
	reply, err := f.handler.Do(r, &fsop.Setattr{Ino: ino, Valid: fsop.SetFlags, Flags: flags})
	if err != nil {
		return f.status(r, err)
	}
	f.nodes.changed(ino, &reply.Attr, reply.Seq, r.began)
	// The kernel does not take it for a change.
	if err := f.dev.invalAttr(ino); err != nil {
		f.log.Debug("mount: taking attributes back after a change of flags", "ino", uint64(ino), "err", err)
	}
	return fuse.OK
}

// mayOpenFlagged says whether the flags of a file let it be opened so. The kernel
// does not know them. It has asked for the attributes if they were not current.
func (f *fileSystem) mayOpenFlagged(ino fsop.Ino, flags uint32) bool {
	if flags&syscall.O_ACCMODE == syscall.O_RDONLY && flags&syscall.O_TRUNC == 0 {
		return true
	}
	m := f.nodes.marksOf(ino)
	return m&immutable == 0 && (m&appendOnly == 0 || flags&syscall.O_APPEND != 0 && flags&syscall.O_TRUNC == 0)
}
