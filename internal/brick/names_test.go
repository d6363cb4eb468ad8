package brick

import (
	"fmt"
	"testing"

	"mortar/internal/fsop"
)

// checkNames says that the cache of names has nothing but what the KV has.
func checkNames(tb tester, b *Brick) {
	tb.Helper()
	b.mu.RLock()
	defer b.mu.RUnlock()
	b.names.mu.Lock()
	defer b.names.mu.Unlock()
	for _, gen := range []map[nameKey]entry{b.names.old, b.names.young} {
		if len(gen) > b.names.limit {
			tb.Fatalf("%d names in a generation of %d", len(gen), b.names.limit)
		}
		for k, e := range gen {
			if _, newer := b.names.young[k]; newer {
				e = b.names.young[k]
			}
			d, ok, err := b.store.Dentry(k.dir, b.cookie(k.name), k.name)
			if err != nil {
				tb.Fatal(err)
			}
			if !ok {
				d.Ino, d.Type = 0, 0
			}
			if e.ino != d.Ino || e.typ != d.Type {
				tb.Fatalf("%q in directory %d is said to be inode %d of type %o, and is %d of type %o", k.name, k.dir, e.ino, e.typ, d.Ino, d.Type)
			}
		}
	}
}

func TestNames(t *testing.T) {
	c := newNames(4) // two generations of two
	c.put(1, "a", entry{10, 0o100000})
	c.put(1, "b", entry{})
	if e, known := c.get(1, "a"); !known || e.ino != 10 {
		t.Errorf("a: %v %v", e, known)
	}
	if e, known := c.get(1, "b"); !known || e.ino != 0 {
		t.Errorf("a name that is known to be absent: %v %v", e, known)
	}
	if _, known := c.get(2, "a"); known {
		t.Error("another directory has the name")
	}
	c.put(1, "c", entry{12, 0}) // a and b are old now
	c.get(1, "a")               // and a is young again
	c.put(1, "d", entry{13, 0}) // b goes
	for name, want := range map[string]bool{"a": true, "b": false, "c": true, "d": true} {
		if _, known := c.get(1, name); known != want {
			t.Errorf("%s is known: %v, want %v", name, known, want)
		}
	}
	c.clear()
	if _, known := c.get(1, "a"); known {
		t.Error("known after clear")
	}
}

// BenchmarkTemporaryName makes a file under one name again and again and renames
// it over others, as programs do that replace files. A name has many past lives then.
func BenchmarkTemporaryName(b *testing.B) {
	o := benchBrick(b)
	do := benchSession(b, o)
	for i := range 100 {
		do(&fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: fmt.Sprintf("f%d", i), Mode: 0o644}})
	}
	defer cpu(b)()
	b.ResetTimer()
	for i := range b.N {
		do(&fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: "tmp", Mode: 0o644}, Excl: true})
		do(&fsop.Rename{Parent: fsop.RootIno, Name: "tmp", NewParent: fsop.RootIno, NewName: fmt.Sprintf("f%d", i%100)})
	}
}
