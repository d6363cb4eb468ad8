package mount

import (
	"sort"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"

	"mortar/internal/fsop/memfs"
)

// TestPosix runs go-fuse's collection of POSIX checks on a mount of each kind.
func TestPosix(t *testing.T) {
	for _, kind := range []struct {
		name string
		o    Options
	}{
		{"locks=cluster", Options{}},
		{"locks=node", Options{LocksNode: true}},
		{"no epoch", Options{noEpoch: true}},
		{"uncached", Options{CacheTimeout: -1}},
	} {
		t.Run(kind.name, func(t *testing.T) {
			m := newMount(t, memfs.New(), kind.o)
			var names []string
			for name := range posixtest.All {
				// It wants a process's own fcntl locks to exclude each other, which
				// POSIX does not; go-fuse does not run it on the local disk either.
				if name != "FcntlFlockLocksFile" {
					names = append(names, name)
				}
			}
			sort.Strings(names)
			for _, name := range names {
				t.Run(name, func(t *testing.T) {
					posixtest.All[name](t, m.sub(t))
				})
			}
		})
	}
}
