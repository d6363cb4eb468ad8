package gluster

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// DefaultState is where GlusterFS's daemon keeps what it knows.
const DefaultState = "/var/lib/glusterd"

// Attributes on a brick.
const (
	volumeID = "trusted.glusterfs.volume-id" // of its top directory
	// timesAttr has the times that mounts show (features.ctime): those of the client that made
	// a change, the same on all bricks. The file's own are when the brick carried it out.
	timesAttr = "trusted.glusterfs.mdata"
)

// shown are the times of a file as a mount has them.
type shown struct{ mtime, atime unix.Timespec }

// parseTimes reads the attribute: a version, flags, and the times of the last change of
// the inode, of the contents, and of reading, each as seconds and nanoseconds, big endian.
func parseTimes(b []byte) (s shown, ok bool) {
	const size = 1 + 7*8
	if len(b) != size || b[0] != 1 {
		return s, false
	}
	at := func(k int) unix.Timespec {
		return unix.Timespec{Sec: int64(binary.BigEndian.Uint64(b[1+8*k:])), Nsec: int64(binary.BigEndian.Uint64(b[9+8*k:]))}
	}
	s = shown{mtime: at(3), atime: at(5)}
	sane := func(t unix.Timespec) bool { return t.Nsec >= 0 && t.Nsec < 1e9 }
	return s, sane(s.mtime) && sane(s.atime)
}

// keepsTimes reports whether a volume's mounts show the times of the attribute. They do
// unless its options say no; the attribute is there then as well, from before. The options
// are known to the daemon of any machine with a brick of it.
func keepsTimes(state string, id []byte) (bool, error) {
	if len(id) != 16 {
		return true, nil
	}
	want := fmt.Sprintf("volume-id=%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
	files, err := filepath.Glob(filepath.Join(state, "vols/*/info"))
	if err != nil {
		return false, err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return false, err
		}
		ours, keeps := false, true
		for line := range strings.Lines(string(text)) {
			switch key, value, _ := strings.Cut(strings.TrimSpace(line), "="); {
			case key+"="+value == want:
				ours = true
			case key == "features.ctime":
				keeps = value != "off" && value != "no" && value != "false" && value != "0" && value != "disable"
			}
		}
		if ours {
			return keeps, nil
		}
	}
	return true, nil
}
