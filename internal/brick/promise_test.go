package brick

import (
	"math/rand/v2"
	"testing"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

// TestPromise checks that an epoch that was promised survives a loss of power,
// and that no older one takes its place.
func TestPromise(t *testing.T) {
	o := newBrick(t)
	if e := o.Promised(); e != 0 {
		t.Errorf("a new brick has promised epoch %d", e)
	}
	for _, e := range []cluster.Epoch{7, 3} {
		if err := o.Promise(e); err != nil {
			t.Fatal(err)
		}
	}
	fs := o.opts.FS.(*disk.Mem).Crash(rand.New(rand.NewPCG(1, 1)))
	o.Close(false)
	opts := o.opts
	opts.FS = fs
	if e := openBrick(t, opts).Promised(); e != 7 {
		t.Errorf("after a loss of power the brick remembers epoch %d, want 7", e)
	}
}
