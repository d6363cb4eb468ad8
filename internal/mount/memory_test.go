package mount

import (
	"fmt"
	"runtime"
	"syscall"
	"testing"
	"time"

	"mortar/internal/estate"
	"mortar/internal/fsop"
)

// TestMemory bounds what a hundred thousand known files cost.
func TestMemory(t *testing.T) {
	const files = 100_000
	heap := func() uint64 {
		var s runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&s)
		return s.HeapAlloc
	}
	before := heap()
	nodes, given, names := newNodes(estate.Private()), newGivenNames(), newNameCache()
	for i := range files {
		a := fsop.Attr{Ino: fsop.Ino(i + 2), Mode: syscall.S_IFREG | 0o644, Nlink: 1}
		nodes.named(&a, 1, nodes.begin())
		given.add(1, fmt.Sprint("file number ", i), true, time.Minute)
	}
	bare := heap() - before
	for i := range files {
		names.add(fsop.Ino(i+2), 1, fmt.Sprint("file number ", i))
	}
	used := heap() - before
	t.Logf("%d known files: %d KiB, %d bytes each, %d of them for names", files, used>>10, used/files, (used-bare)/files)
	if bare > 12<<20 || used-bare > 8<<20 {
		t.Errorf("%d MiB for %d files", used>>20, files)
	}
	for i := range files {
		nodes.forgot(fsop.Ino(i+2), 1)
	}
	nodes.takeForgotten()
	runtime.KeepAlive(given)
	runtime.KeepAlive(names)
}
