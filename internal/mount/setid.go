package mount

import (
	"bufio"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
)

// The set-id bits go when somebody without privileges changes what a file has in it, or anybody
// whose it is. The kernel says when, but not of the set-group-id bit without execution by the group:
// that goes, since Linux 6.2, if the caller is not in the file's group, and FUSE's flags are
// for what goes from everybody. So it is found out here who the caller is.

// killSGID is what a change of a file that takes the set-id bits away has to say
// besides: fsop.SetKillSGID, or nothing.
func (f *fileSystem) killSGID(r *request, ino fsop.Ino, h *fuse.InHeader) uint32 {
	if f.nodes.marksOf(ino)&(setID|unsized) == 0 { // unsized: others changed it, and may have given it the bit
		return 0
	}
	a, _, ok := f.nodes.attr(ino)
	if !ok || !f.leased() || f.inflight.isChanging(ino) {
		reply, err := f.handler.Do(r, &fsop.Getattr{Ino: ino})
		if err != nil {
			return 0 // the change itself will say so
		}
		a = reply.Attr
	}
	if a.Mode&(unix.S_ISGID|unix.S_IXGRP) != unix.S_ISGID || a.IsDir() || h.Gid == a.GID || isMember(h.Pid, a.GID, h.Uid == 0) {
		return 0
	}
	return fsop.SetKillSGID
}

// isMember says whether a thread has gid among its supplementary groups, or the right to do as if
// it had (CAP_FSETID). What it says of one that cannot be looked at, since it is of
// another namespace, is otherwise.
func isMember(tid, gid uint32, otherwise bool) bool {
	status, err := os.Open("/proc/" + strconv.FormatUint(uint64(tid), 10) + "/status")
	if tid == 0 || err != nil {
		return otherwise
	}
	defer status.Close()
	for s := bufio.NewScanner(status); s.Scan(); {
		switch name, value, _ := strings.Cut(s.Text(), ":"); name {
		case "Groups":
			if slices.Contains(strings.Fields(value), strconv.FormatUint(uint64(gid), 10)) {
				return true
			}
		case "CapEff":
			caps, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			return err == nil && caps&(1<<unix.CAP_FSETID) != 0
		}
	}
	return otherwise
}

// lostSetID has the kernel ask for the mode of a file whose set-id bits went with
// what was written to it: by itself it asks again for times and size only.
func (m *Mount) lostSetID(ino fsop.Ino) {
	if err := m.dev.invalAttr(ino); err != nil && err != unix.ENOENT && err != unix.ENOTCONN {
		m.log.Warn("mount: a file's mode", "ino", uint64(ino), "err", err)
	}
}
