package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Stressing is the outcome of stress.
type Stressing struct {
	mu     sync.Mutex
	Ops    map[string]int `json:"ops"`   // that succeeded
	Lost   map[string]int `json:"lost"`  // refused with an error that another's change explains
	Stale  int            `json:"stale"` // met ESTALE, and were carried out when tried again
	Held   int            `json:"held"`  // looks at files that were held open, removed ones among them
	Lists  int            `json:"lists"`
	Worst  float64        `json:"worst_ms"`
	From   string         `json:"worst_of"`
	Faults []string       `json:"faults"`
}

func (s *Stressing) wrong() []string { return s.Faults }

func (s *Stressing) faultf(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.Faults) < 20 {
		s.Faults = append(s.Faults, fmt.Sprintf(format, args...))
	}
}

// On the way to any object a directory can go, or become a file or a ring of links.
var onTheWay = []unix.Errno{unix.ENOENT, unix.ENOTDIR, unix.ELOOP}

// explained are the other errors that the changes of others explain, by operation.
var explained = map[string][]unix.Errno{
	"create":    {unix.EEXIST},
	"open":      {unix.EISDIR},
	"mkdir":     {unix.EEXIST},
	"rename":    {unix.EEXIST, unix.ENOTEMPTY, unix.EISDIR, unix.EINVAL},
	"exchange":  {unix.EINVAL, unix.ENOTEMPTY},
	"noreplace": {unix.EEXIST, unix.EINVAL},
	"link":      {unix.EEXIST, unix.EPERM},
	"symlink":   {unix.EEXIST},
	"readlink":  {unix.EINVAL},
	"unlink":    {unix.EISDIR},
	"rmdir":     {unix.ENOTEMPTY},
	"read":      {unix.EISDIR},
	"list":      nil,
	"stat":      nil,
	"chmod":     nil,
}

// stress does everything to names that can be done, in directories where others
// do the same. Files that it holds open must stay what they are, whatever
// happens to their names; names that nobody touches must be in every listing, once.
func stress(fs *flag.FlagSet, args []string) (verdict, error) {
	dir := fs.String("dir", "", "shared directory, made ready with -make")
	ready := fs.Bool("make", false, "make the directory and the names that stay, and end")
	anchors := fs.Int("anchors", 300, "names that stay in each directory")
	duration := fs.Duration("duration", 5*time.Second, "how long")
	seed := fs.Uint64("seed", 1, "of the choices")
	workers := fs.Int("workers", 2, "how many at once")
	pace := fs.Duration("pace", 0, "pause after each operation")
	lossy := fs.Bool("lossy", false, "mounts stand still: what was written may be lost, if fsync or close says so")
	pause := fs.String("pause", "", "a file: while it is there nothing is done")
	fs.Parse(args)
	s := &Stressing{Ops: map[string]int{}, Lost: map[string]int{}}
	if *ready {
		for _, d := range stressDirs {
			if err := os.MkdirAll(filepath.Join(*dir, d), 0o755); err != nil {
				return nil, err
			}
			for i := range *anchors {
				if err := os.WriteFile(filepath.Join(*dir, d, anchorName(i)), nil, 0o644); err != nil {
					return nil, err
				}
			}
		}
		return s, nil
	}
	var wg sync.WaitGroup
	end := time.Now().Add(*duration)
	asked, over := stopped(), make(chan struct{})
	go func() {
		<-asked
		close(over)
	}()
	for i := range *workers {
		w := &stresser{s: s, root: *dir, lossy: *lossy, anchors: *anchors, id: *seed<<32 | uint64(i)<<24, rng: rand.New(rand.NewPCG(*seed, uint64(i)))}
		wg.Go(func() {
			for time.Now().Before(end) && !closed(over) {
				w.step()
				time.Sleep(*pace)
				for *pause != "" && isThere(*pause) && !closed(over) {
					time.Sleep(50 * time.Millisecond)
				}
			}
			w.end()
		})
	}
	wg.Wait()
	return s, nil
}

// stressDirs are the directories that stay, and have names that stay.
var stressDirs = []string{".", "a", "b"}

const anchorPrefix = "stays-here-all-the-time-"

func anchorName(i int) string { return fmt.Sprintf("%s%04d", anchorPrefix, i) }

type stresser struct {
	s       *Stressing
	root    string
	lossy   bool
	anchors int
	id      uint64 // of the next file
	rng     *rand.Rand
	held    []heldFile
}

// heldFile is a file that this worker made and has open.
type heldFile struct {
	fd   int
	data []byte
}

func (w *stresser) name() string {
	const names = "0123456789"
	d := stressDirs[w.rng.IntN(len(stressDirs))]
	for range w.rng.IntN(3) {
		d = filepath.Join(d, "n"+string(names[w.rng.IntN(4)])) // these are directories, often
	}
	return filepath.Join(w.root, d, "n"+string(names[w.rng.IntN(len(names))]))
}

// stalePatience is longer than a rename takes on a machine that does much else.
const stalePatience = 3 * time.Second

// do carries out one system call that may lose a race.
func (w *stresser) do(op, what string, f func() error) bool {
	begin := time.Now()
	err := f()
	took := time.Since(begin)
	if errors.Is(err, unix.ESTALE) {
		w.s.mu.Lock()
		w.s.Stale++
		w.s.mu.Unlock()
	}
	for errors.Is(err, unix.ESTALE) && time.Since(begin) < stalePatience {
		// Linux says so of a directory that another machine moved, if the locks to move
		// it in its caches are taken, see doc/mount.md. Who looks and tries again gets on, when
		// the rename is over that has them.
		for _, path := range strings.Fields(what) {
			var st unix.Stat_t
			_ = unix.Lstat(path, &st)
		}
		if err = f(); errors.Is(err, unix.ESTALE) {
			time.Sleep(time.Millisecond)
		}
	}
	var e unix.Errno
	known := errors.As(err, &e) && (slices.Contains(onTheWay, e) || slices.Contains(explained[op], e))
	if err != nil && !known {
		w.s.faultf("%s %s: %v after %v", op, strings.ReplaceAll(what, w.root+"/", ""), err, took)
	}
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	if ms := float64(took.Microseconds()) / 1000; ms > w.s.Worst {
		w.s.Worst, w.s.From = ms, op+" "+what+" at "+begin.Format("15:04:05.000")
	}
	if err == nil {
		w.s.Ops[op]++
	} else if known {
		w.s.Lost[op]++
	}
	return err == nil
}

func (w *stresser) step() {
	a, b := w.name(), w.name()
	two := a + " " + b
	at := func(flags uint) func() error {
		return func() error { return unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, flags) }
	}
	switch w.rng.IntN(23) {
	case 0, 1, 2, 3:
		w.create(a)
	case 4, 5:
		w.do("mkdir", a, func() error { return unix.Mkdir(a, 0o755) })
	case 6, 7:
		w.do("rename", two, at(0))
	case 8:
		w.do("exchange", two, at(unix.RENAME_EXCHANGE))
	case 9:
		w.do("noreplace", two, at(unix.RENAME_NOREPLACE))
	case 10:
		w.do("link", two, func() error { return unix.Link(a, b) })
	case 11:
		w.do("symlink", a, func() error { return unix.Symlink(filepath.Base(b), a) })
	case 12:
		w.do("readlink", a, func() error { _, err := unix.Readlink(a, make([]byte, 100)); return err })
	case 13, 14, 15:
		w.do("unlink", a, func() error { return unix.Unlink(a) })
	case 16, 17:
		w.do("rmdir", a, func() error { return unix.Rmdir(a) })
	case 18:
		w.do("stat", a, func() error { var st unix.Stat_t; return unix.Stat(a, &st) })
	case 19:
		w.do("chmod", a, func() error { return unix.Chmod(a, 0o700+uint32(w.rng.IntN(2))*0o55) })
	case 20:
		w.open(a)
	case 21:
		w.list(filepath.Join(w.root, stressDirs[w.rng.IntN(len(stressDirs))]))
	case 22:
		w.look()
	}
}

// stressData is what a file has that says it is number id.
func stressData(id uint64, size int) []byte {
	b := fmt.Appendf(nil, "%016x %08d\n", id, size)
	return append(b, contents(id, size)...)
}

const stressHeader = 16 + 1 + 8 + 1

// create makes a file and holds it for a while. Nothing may go wrong with a
// file that was made, whatever becomes of its name.
func (w *stresser) create(path string) {
	fd := -1
	if !w.do("create", path, func() (err error) {
		fd, err = unix.Open(path, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC, 0o644)
		return err
	}) {
		return
	}
	w.id++
	size := w.rng.IntN(3000)
	if w.rng.IntN(20) == 0 {
		size = 90000
	}
	data := stressData(w.id, size)
	if n, err := unix.Write(fd, data); err != nil || n != len(data) {
		w.s.faultf("write of new file %s: %d of %d bytes, %v", path, n, len(data), err)
	}
	if w.rng.IntN(3) > 0 {
		if err := unix.Close(fd); err != nil && !w.told(err) {
			w.s.faultf("close of new file %s: %v", path, err)
		}
		return
	}
	if w.held = append(w.held, heldFile{fd, data}); len(w.held) > 8 {
		w.look()
		w.drop(0)
	}
}

// drop closes a file that was held.
func (w *stresser) drop(i int) {
	if err := unix.Close(w.held[i].fd); err != nil && !w.told(err) {
		w.s.faultf("close of a file that was held: %v", err)
	}
	w.held = slices.Delete(w.held, i, i+1)
}

// told reports whether an error of close or fsync says that writes are lost, which may be.
func (w *stresser) told(err error) bool {
	if !w.lossy || !errors.Is(err, unix.EIO) {
		return false
	}
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	w.s.Lost["write"]++
	return true
}

// look reads the files that are held.
func (w *stresser) look() {
	for i := 0; i < len(w.held); i++ {
		h := w.held[i]
		var st unix.Stat_t
		serr := unix.Fstat(h.fd, &st)
		got := make([]byte, len(h.data)+1)
		n, err := unix.Pread(h.fd, got, 0)
		if serr != nil || err != nil || st.Size != int64(len(h.data)) || !bytes.Equal(got[:max(n, 0)], h.data) {
			if w.told(unix.Fsync(h.fd)) {
				w.drop(i)
				i--
				continue
			}
			w.s.faultf("a file that is held, %d links: size %d, %v; read %d bytes, %v; want %d", st.Nlink, st.Size, serr, n, err, len(h.data))
		}
		w.s.mu.Lock()
		w.s.Held++
		w.s.mu.Unlock()
	}
}

func (w *stresser) end() {
	w.look()
	for len(w.held) > 0 {
		w.drop(0)
	}
}

// open reads whatever is at path: the beginning of what its maker wrote.
func (w *stresser) open(path string) {
	fd := -1
	if !w.do("open", path, func() (err error) {
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	}) {
		return
	}
	defer unix.Close(fd)
	got := make([]byte, 100000)
	n := 0
	if !w.do("read", path, func() (err error) { n, err = unix.Read(fd, got); return err }) || n < stressHeader {
		return
	}
	var id uint64
	var size int
	if _, err := fmt.Sscanf(string(got[:stressHeader]), "%x %d\n", &id, &size); err != nil || size < 0 || size > 90000 ||
		!bytes.HasPrefix(stressData(id, size), got[:n]) {
		w.s.faultf("%s: %d bytes that nobody wrote: %.40q", path, n, got[:n])
	}
}

// list goes through a directory with a small buffer, so that others get to
// change it meanwhile.
func (w *stresser) list(path string) {
	fd := -1
	if !w.do("list", path, func() (err error) {
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		return err
	}) {
		return
	}
	defer unix.Close(fd)
	count := map[string]int{}
	buf := make([]byte, 2048)
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil {
			w.s.faultf("getdents %s: %v", path, err)
			return
		}
		if n == 0 {
			break
		}
		var names []string
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
		for _, name := range names {
			count[name]++
		}
	}
	for name, n := range count {
		if n > 1 {
			w.s.faultf("%s is in the listing of %s %d times", name, path, n)
		}
	}
	for i := range w.anchors {
		if count[anchorName(i)] == 0 {
			w.s.faultf("%s is missing in the listing of %s, which has %d names", anchorName(i), path, len(count))
		}
	}
	w.s.mu.Lock()
	w.s.Lists++
	w.s.mu.Unlock()
}
