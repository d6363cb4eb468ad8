// Package footprint has a process that is about to sleep for long give back the memory that
// sleeping does not take. A process of this program that only waits has run a few
// hundred kilobytes of it, but the kernel maps what lies around each page that is touched, too, and
// what packages made when the program began is there whether they are used or not.
package footprint

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
)

// Shed gives back what garbage takes, and maps nothing of the program's file any more. What is needed again is
// mapped again when it is, from the page cache as a rule; that takes some hundred microseconds for all of it.
func Shed() error {
	debug.FreeOSMemory()
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return err
	}
	defer f.Close()
	spans, err := unchanged(f)
	if err != nil {
		return err
	}
	for _, s := range spans {
		// One that is locked stays.
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, s.from, s.to-s.from, unix.MADV_DONTNEED); errno != 0 && errno != unix.EINVAL {
			return fmt.Errorf("madvise: %w", errno)
		}
	}
	return nil
}

// Sleep calls wait, which waits for long, with as little memory as can be. Nor is garbage collected meanwhile: the
// runtime does so every two minutes, though nothing is left to be collected, and has the program mapped again for it.
func Sleep(wait func()) error {
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	err := Shed()
	wait()
	return err
}

// span is a part of the address space.
type span struct{ from, to uintptr }

// unchanged finds, in the text of smaps (proc(5)), the mappings of files that hold what the files do: that cannot be written to, and
// of which no page is this process's own. (Of a program that can lie anywhere, what the loader has changed
// cannot be written to either.)
func unchanged(smaps io.Reader) ([]span, error) {
	var (
		out  []span
		last span // zero: not of a file, or can be written to
	)
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		line := lines.Text()
		key, value, _ := strings.Cut(line, ":")
		if strings.Contains(key, "-") { // 00400000-00e51000 r-xp 00000000 fe:00 1572 /usr/bin/mortar; the device has a colon
			var from, to uint64
			var mode, dev string
			var offset, inode uint64
			if n, err := fmt.Sscanf(line, "%x-%x %s %x %s %d", &from, &to, &mode, &offset, &dev, &inode); err != nil {
				return nil, fmt.Errorf("%q: %d words: %w", line, n, err)
			}
			last = span{}
			if inode != 0 && len(mode) == 4 && mode[0] == 'r' && mode[1] == '-' && from < to && to <= uint64(^uintptr(0)) {
				last = span{uintptr(from), uintptr(to)}
			}
			continue
		}
		if key == "Anonymous" && last != (span{}) && strings.TrimSpace(value) == "0 kB" {
			out = append(out, last)
		}
	}
	return out, lines.Err()
}
