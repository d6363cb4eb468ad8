package footprint

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const smaps = `00400000-00e51000 r-xp 00000000 fe:00 1572 /usr/bin/mortar
Size:              10564 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
00e51000-01c51000 r--p 00a51000 fe:00 1572 /usr/bin/mortar
Anonymous:             0 kB
01c51000-01c61000 r--p 00b51000 fe:00 1572 /usr/bin/mortar
Anonymous:             4 kB
01c61000-01c71000 rw-p 00b61000 fe:00 1572 /usr/bin/mortar
Anonymous:             0 kB
c000000000-c000400000 r--p 00000000 00:00 0 
Anonymous:             0 kB
7f0000000000-7f0000001000 rw-s 00000000 00:01 1024 /memfd:estate (deleted)
Anonymous:             0 kB
7f0000001000-7f0000002000 r--p 00000000 fe:00 99 /usr/lib/a-name:Anonymous
Anonymous:             0 kB
7f0000002000-7f0000003000 ---p 00000000 fe:00 99 /usr/lib/a-name
Anonymous:             0 kB
`

func TestUnchanged(t *testing.T) {
	got, err := unchanged(strings.NewReader(smaps))
	if err != nil {
		t.Fatal(err)
	}
	want := []span{{0x400000, 0xe51000}, {0xe51000, 0x1c51000}, {0x7f0000001000, 0x7f0000002000}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%x, want %x", got, want)
	}
	if _, err := unchanged(strings.NewReader("0-x r-xp 0 0:0 1\n")); err == nil {
		t.Error("a line that makes no sense is taken")
	}
}

// mapped is how much of files this process has in its memory, in KiB.
func mapped(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "RssFile:")
	n, err := strconv.Atoi(strings.Fields(rest + " ?")[0])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// What a file holds is mapped no more, and what was changed in memory stays.
func TestSleep(t *testing.T) {
	const size = 8 << 20
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(bytes.Repeat([]byte("file"), size/4)); err != nil {
		t.Fatal(err)
	}
	mmap := func(prot int) []byte {
		b, err := unix.Mmap(int(f.Fd()), 0, size, prot, unix.MAP_PRIVATE)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Munmap(b) })
		return b
	}
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	same, changed := mmap(unix.PROT_READ), mmap(unix.PROT_READ|unix.PROT_WRITE)
	copy(changed[size/2:], "mine")
	if err := unix.Mprotect(changed, unix.PROT_READ); err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(same, []byte("file")); n != size/4 { // all of it is mapped now
		t.Fatal(n)
	}
	before, after := mapped(t), 0
	if err := Sleep(func() { after = mapped(t) }); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d KiB of files before, %d after", before, after)
	if before-after < size>>10*7/8 {
		t.Errorf("%d KiB of files are mapped, %d before", after, before)
	}
	if percent := debug.SetGCPercent(100); percent != 100 {
		t.Errorf("garbage is collected at %d %% afterwards", percent)
	}
	if got := string(same[size/2:][:4]) + string(changed[size/2:][:4]); got != "filemine" {
		t.Errorf("%q is there", got)
	}
}
