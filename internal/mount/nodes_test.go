package mount

import (
	"syscall"
	"testing"

	"mortar/internal/estate"
	"mortar/internal/fsop"
)

// TestTold has a reply arrive after a change of the same file that was answered
// before it was carried out: it may be from before the change.
func TestTold(t *testing.T) {
	nodes := newNodes(estate.Private())
	a := fsop.Attr{Ino: 7, Mode: syscall.S_IFREG, Nlink: 1}
	knows := func() bool { _, _, ok := nodes.attr(7); return ok }
	nodes.named(&a, 10, nodes.begin())
	if !knows() {
		t.Error("what was told is not known")
	}
	asked := nodes.begin()
	nodes.changed(7, &fsop.Attr{}, 0, nodes.begin())
	if knows() {
		t.Error("what was told is known after a change")
	}
	nodes.read(&a, 11, asked)
	if knows() {
		t.Error("attributes that were asked for before the change are believed")
	}
	for i := range fsop.Ino(toldPerShard * nodeShards * 8) { // it is not remembered for ever
		other := a
		other.Ino = 1000 + i
		nodes.named(&other, 10, nodes.begin())
	}
	nodes.read(&a, 11, asked)
	if knows() {
		t.Error("attributes that were asked for before a change that is forgotten are believed")
	}
	nodes.read(&a, 11, nodes.begin())
	if !knows() {
		t.Error("attributes that were asked for after the change are not known")
	}
	n := 0
	for i := range nodes.shards {
		n += len(nodes.shards[i].told)
	}
	if n > toldPerShard*nodeShards {
		t.Errorf("attributes of %d files are remembered", n)
	}
}

// TestTouched has answers about a directory arrive after a file was foretold in it, and
// after it was made: they may be from before the file, and the kernel must not keep them.
func TestTouched(t *testing.T) {
	nodes := newNodes(estate.Private())
	dir := fsop.Attr{Ino: 7, Mode: syscall.S_IFDIR, Nlink: 2}
	nodes.named(&dir, 10, nodes.begin())
	asked := nodes.begin()
	nodes.touched(7, 0) // foretold
	if nodes.read(&dir, 11, asked) || nodes.named(&dir, 11, asked) {
		t.Error("attributes that were asked for before a file was foretold may be kept")
	}
	asked = nodes.begin()
	nodes.touched(7, 13) // made
	if nodes.read(&dir, 12, asked) || nodes.named(&dir, 12, asked) {
		t.Error("attributes from before a file was made may be kept")
	}
	nodes.changed(7, &dir, 12, asked)
	if _, _, ok := nodes.attr(7); ok {
		t.Error("attributes from before a file was made are believed")
	}
	if !nodes.read(&dir, 13, asked) {
		t.Error("attributes that the file is in may not be kept")
	}
}

// TestEntriesBounds fills directories with more names than are kept.
func TestEntriesBounds(t *testing.T) {
	e := newEntries()
	for dir := range fsop.Ino(2 * maxDirs) {
		e.begin(dir + 2)
		for _, name := range []string{"a", "b", "c", "d"} {
			e.set(dir+2, name, 5)
		}
	}
	name := func(i int) string { return string([]byte{byte(i), byte(i >> 8), byte(i >> 16)}) }
	for i := range 2 * maxNames {
		e.set(1, name(i), 5)
	}
	names := 0
	for _, d := range e.dirs {
		names += len(d.leads)
	}
	if names != e.names || names > maxNames || len(e.dirs) > maxDirs {
		t.Errorf("%d names, counted as %d, in %d directories", names, e.names, len(e.dirs))
	}
	if got := e.look(1, name(2*maxNames-1)); got != 5 && names > 0 {
		t.Errorf("the last name leads to %d", got)
	}
}
