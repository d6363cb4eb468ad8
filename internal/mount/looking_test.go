package mount

import (
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
	"mortar/internal/pacer"
	"mortar/internal/proto"
)

// TestListingWhileLookedUp lists a directory of which a name is being looked up:
// neither the listing nor what takes back what it said may wait for the answer,
// which may wait for them.
func TestListingWhileLookedUp(t *testing.T) {
	const late = 500 * time.Millisecond // far from quick, and from appearLimit
	for _, tc := range []struct {
		name  string
		after bool // the look begins when the listing was put together already
	}{{"before", false}, {"after", true}} {
		t.Run(tc.name, func(t *testing.T) {
			mem := memfs.New()
			other := mem.Session(nil)
			var inos []fsop.Ino
			for i := range 8 {
				r, err := other.Do(t.Context(), &fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: fmt.Sprint("f", i), Mode: 0o644}})
				if err != nil {
					t.Fatal(err)
				}
				inos = append(inos, r.Attr.Ino)
			}
			g := &gate{}
			var telling atomic.Pointer[func()]
			m := newMount(t, mem, Options{telling: func() {
				if f := telling.Swap(nil); f != nil {
					(*f)()
				}
			}}, gated(g))
			held, release := holdOnce(g, func(op fsop.Op) bool {
				l, ok := op.(*fsop.Lookup)
				return ok && l.Name == "f0"
			})
			looked := make(chan error, 1)
			look := func() {
				go func() {
					_, err := os.Lstat(filepath.Join(m.dir, "f0"))
					looked <- err
				}()
				<-held
			}
			taken := make(chan struct{}, 1)
			takeBack := func() {
				go func() {
					if err := m.Invalidate(t.Context(), 1<<40, []proto.Effect{{Ino: inos[0]}, {Ino: inos[7]}}); err != nil {
						t.Error(err)
					}
					taken <- struct{}{}
				}()
			}
			if !tc.after {
				look()
			}
			first := func() {
				takeBack()
				for known := true; known && tc.after; { // until it has noted that it comes
					_, _, known = m.nodes.attr(inos[0])
				}
				if tc.after {
					look()
				}
			}
			telling.Store(&first)
			listed := make(chan error, 1)
			go func() {
				list, err := os.ReadDir(m.dir)
				if err == nil && len(list) != len(inos) {
					err = fmt.Errorf("%d names listed, want %d", len(list), len(inos))
				}
				listed <- err
			}()
			timeout := pacer.New(t).After(t, late)
			for range 2 {
				select {
				case err := <-listed:
					if err != nil {
						t.Error(err)
					}
				case <-taken:
				case <-timeout:
					release()
					t.Fatal("still waiting for the look")
				}
			}
			if !tc.after {
				release()
			}
			if err := <-looked; err != nil {
				t.Errorf("the look: %v", err)
			}
			for i := range inos {
				writeVia(t, other, fmt.Sprint("f", i), "longer")
				m.Invalidate(t.Context(), 1<<41, []proto.Effect{{Ino: inos[i]}})
				var st syscall.Stat_t
				if err := syscall.Lstat(filepath.Join(m.dir, fmt.Sprint("f", i)), &st); err != nil || st.Size != 6 {
					t.Errorf("f%d: size %d, want 6; %v", i, st.Size, err)
				}
			}
			if tc.after {
				release()
			}
		})
	}
}

// TestCutSparesOthers has only those LOOKUPs give way that can be in the way.
func TestCutSparesOthers(t *testing.T) {
	s := newLookings()
	look := func(dir fsop.Ino, name string) *request {
		r := &request{}
		s.begin(r, dir, name)
		return r
	}
	before := look(1, "a")
	s.tell(1, []toldEntry{{10, "a"}, {11, "b"}})
	in, out, elsewhere := look(1, "a"), look(1, "c"), look(2, "a")
	s.cut(12)
	if in.gaveWay() {
		t.Error("gave way for an inode that the listing did not tell of")
	}
	s.cut(11)
	if !in.gaveWay() || in.Err() == nil {
		t.Error("did not give way")
	}
	for i, r := range []*request{before, out, elsewhere} {
		if r.gaveWay() || r.Err() != nil {
			t.Errorf("number %d gave way", i)
		}
	}
	again := look(1, "b")
	s.cut(11)
	if again.gaveWay() {
		t.Error("gave way again at once")
	}
}
