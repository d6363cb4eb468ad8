package mount

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
)

// mappedPages is how long the file of TestStoresUnderLocks is, mappedAt where in it is stored.
const mappedPages = 3

var mappedAt = [2]int{0, 2*os.Getpagesize() + 7}

// runMapped does as the lines of standard input say to a file that it has mapped, and
// answers each: fcntl|ofd|flock TYPE, store VALUE, look. It is a program of its own because a
// thread that waits for a page cannot be told to make way for the mount.
func runMapped(fd int) error {
	m, err := unix.Mmap(fd, 0, mappedPages*os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	in := bufio.NewScanner(os.Stdin)
	for n := 1; in.Scan(); n++ {
		what, arg, _ := strings.Cut(in.Text(), " ")
		v, _ := strconv.Atoi(arg)
		switch typ := int16(v); what {
		case "store":
			m[mappedAt[0]], m[mappedAt[1]] = byte(v), byte(v)
		case "flock":
			err = unix.Flock(fd, map[int16]int{unix.F_WRLCK: unix.LOCK_EX, unix.F_RDLCK: unix.LOCK_SH, unix.F_UNLCK: unix.LOCK_UN}[typ])
		case "fcntl":
			err = unix.FcntlFlock(uintptr(fd), unix.F_SETLKW, &unix.Flock_t{Type: typ})
		case "ofd":
			err = unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLKW, &unix.Flock_t{Type: typ})
		}
		if err != nil {
			return fmt.Errorf("%s: %w", in.Text(), err)
		}
		fmt.Printf("%d: %d %d.\n", n, m[mappedAt[0]], m[mappedAt[1]])
	}
	return in.Err()
}

// mapping is a program that runs runMapped.
type mapping struct {
	*helper
	t    *testing.T
	said int
}

// do has it do something, and checks what its mapping shows then.
func (m *mapping) do(what string, arg int, want byte) {
	m.t.Helper()
	fmt.Fprintln(m.in, what, arg)
	m.said++
	eventually(m.t, fmt.Sprint(what, " ", arg, " is answered"), func() bool { return m.out.count(".\n") == m.said })
	if answer := fmt.Sprintf("%d: %d %d.\n", m.said, want, want); !m.out.has(answer) {
		m.t.Fatalf("after %s %d: the mapping does not show %q; all it said:\n%s", what, arg, answer, m.out.text)
	}
}

// TestStoresUnderLocks: what is stored through a shared mapping under a lock is there for
// whoever takes the lock next on another mount, in his mapping, too; and that costs nobody his pages.
func TestStoresUnderLocks(t *testing.T) {
	for _, how := range []string{"fcntl", "ofd", "flock"} {
		for _, typ := range []int{unix.F_UNLCK, unix.F_RDLCK} {
			for _, asker := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s/type=%d/asker=%v", how, typ, asker), func(t *testing.T) {
					storesUnderLocks(t, how, typ, asker)
				})
			}
		}
	}
}

func storesUnderLocks(t *testing.T, how string, typ int, asker bool) {
	mem := memfs.New()
	var reads atomic.Int32
	counted := func(h fsop.Handler) fsop.Handler {
		return fsop.HandlerFunc(func(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
			if _, ok := op.(*fsop.Read); ok {
				reads.Add(1)
			}
			return h.Do(ctx, op)
		})
	}
	mounts := [2]*mounted{newMount(t, mem, Options{}, counted), newMount(t, mem, Options{})}
	if !asker {
		a := mounts[0].asker
		a.mu.Lock()
		a.command = nil
		a.mu.Unlock()
	}
	if err := os.WriteFile(filepath.Join(mounts[0].dir, "f"), make([]byte, mappedPages*os.Getpagesize()), 0o644); err != nil {
		t.Fatal(err)
	}
	var maps [2]*mapping
	for i, m := range mounts {
		maps[i] = &mapping{startHelper(t, "mapped", filepath.Join(m.dir, "f")), t, 0}
		maps[i].do("look", 0, 0) // the pages are there from now on
	}
	next := unix.F_WRLCK
	if typ == unix.F_RDLCK {
		next = typ
	}
	for round := byte(1); round < 10; round++ {
		maps[0].do(how, unix.F_WRLCK, round-1)
		maps[0].do("store", int(round), round)
		before := reads.Load()
		maps[0].do(how, typ, round)
		if n := reads.Load() - before; asker && n != 0 {
			t.Errorf("round %d: pages were read again, %d times, after the unlock", round, n)
		}
		maps[1].do(how, next, round)
		maps[1].do(how, unix.F_UNLCK, round)
	}
}
