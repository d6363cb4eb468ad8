package mountinfo

import (
	"os"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	const table = `22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw,errors=remount-ro
40 22 8:17 / /bricks/my\040disk rw,noatime shared:2 - xfs /dev/sdb1 rw,nobarrier
41 22 8:33 / /bricks rw - ext4 /dev/sdc1 rw
rubbish
`
	m := Parse(table)
	if len(m) != 3 {
		t.Fatalf("%d mounts", len(m))
	}
	for path, want := range map[string]string{
		"/bricks/my disk/v": "/dev/sdb1", "/bricks/my disk": "/dev/sdb1", "/bricks/my diskette": "/dev/sdc1", "/brick": "/dev/root", "/": "/dev/root",
	} {
		if got := Under(m, path); got == nil || got.Source != want {
			t.Errorf("%s is under %+v, want %s", path, got, want)
		}
	}
	if got := Under(m, "/bricks/my disk"); strings.Join(got.Options, " ") != "rw noatime rw nobarrier" || got.Type != "xfs" || got.Device != "8:17" {
		t.Errorf("%+v", got)
	}
}

func TestSelf(t *testing.T) {
	self, err := Self()
	if err != nil || Under(self, "/proc/self") == nil || Under(self, "/proc/self").Type != "proc" {
		t.Errorf("%+v, %v", self, err)
	}
	if of, err := Of(os.Getpid()); err != nil || len(of) != len(self) {
		t.Errorf("%d mounts of this process, and %d: %v", len(of), len(self), err)
	}
}
