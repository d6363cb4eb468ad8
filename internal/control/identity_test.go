package control

import (
	"errors"
	"os"
	"strings"
	"testing"
	"testing/synctest"

	"mortar/internal/cluster"
	"mortar/internal/control/state"
)

func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

// A machine that was cloned from a live one is refused, and the live one does
// not notice.
func TestClone(t *testing.T) { synctest.Test(t, testClone) }

func testClone(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	for _, what := range []string{"follower", "leader"} {
		lead := w.settled(nodes...)
		orig := lead
		if what == "follower" {
			orig = others(nodes, lead)[0]
		}
		clone := &node{w: w, id: orig.id, name: orig.name + "-clone", dir: orig.dir + "-clone-" + what, bricks: map[cluster.BrickID]*fakeBrick{}}
		copyDir(t, orig.dir, clone.dir)
		clone.start()
		select {
		case err := <-clone.over:
			if !errors.Is(err, state.ErrCloned) || !strings.Contains(err.Error(), "identity of peer "+orig.name) {
				t.Errorf("clone of the %s ends with %v", what, err)
			}
			clone.over <- nil
		case <-w.ctx().Done():
			t.Fatalf("the clone of the %s was never refused", what)
		}
		clone.kill()
		if now := w.settled(nodes...); now != lead {
			t.Errorf("the clone of the %s made %s leader instead of %s", what, now.name, lead.name)
		}
		if orig.c.Incarnation() != 1 {
			t.Errorf("%s has start %d", orig.name, orig.c.Incarnation())
		}
	}
}

// A machine of two leads again sooner than the other one counts its former life
// as dead: it is not taken for a clone of that.
func TestBackAtOnce(t *testing.T) { synctest.Test(t, testBackAtOnce) }

func testBackAtOnce(t *testing.T) {
	w := newWorld(t, 2)
	nodes := w.pool()
	first, other := w.settled(nodes...), nodes[1]
	if first == other {
		t.Fatal("the second of two leads")
	}
	for range 3 {
		if err := first.kill(); err != nil {
			t.Fatal(err)
		}
		first.start()
		w.until("the other one hears the new life", func() bool {
			select {
			case err := <-first.over:
				first.over <- err // for the clean-up
				t.Fatalf("back at once, it ends with %v", err)
			default:
			}
			return other.c.trans.stream.bootOf(first.id) == first.c.boot
		})
		w.settled(nodes...)
	}
}

// A voter whose store was emptied votes for nobody before it knows again what
// it had promised.
func TestForgetfulVoter(t *testing.T) { synctest.Test(t, testForgetfulVoter) }

func testForgetfulVoter(t *testing.T) {
	w := newWorld(t, 3)
	nodes := w.pool()
	lead := w.settled(nodes...)
	rest := others(nodes, lead)
	empty, stale := rest[0], rest[1]
	stale.kill()
	w.volume("decided", lead) // by the leader and the one that will forget
	lead.kill()
	empty.kill()
	if _, err := Discard(empty.dir); err != nil {
		t.Fatal(err)
	}
	empty.start()
	stale.start()
	// These two are a majority, and must not go on without what was decided.
	w.until("a vote was asked for and not given", func() bool { return empty.c.abstained.Load() > 1 })
	if st := stale.c.Status(); st.Leading {
		t.Fatal("a leader without the last decisions was elected")
	}
	lead.start()
	w.settled(nodes...)
	if stale.c.Map().Volume("decided") == nil || empty.c.Map().Volume("decided") == nil {
		t.Error("a decision was lost")
	}
	// It votes again.
	now := w.settled(nodes...)
	if now == empty {
		now = lead
	}
	w.silent(now, true)
	left := others(nodes, now)
	w.until("another leader", func() bool { return left[0].c.Status().Leading || left[1].c.Status().Leading })
	w.silent(now, false)
}
