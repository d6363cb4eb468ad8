package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Counting is the outcome of counter.
type Counting struct {
	Rounds int     `json:"rounds"`
	Last   int     `json:"last"` // what this process wrote last
	Worst  float64 `json:"worst_ms"`
}

func (*Counting) wrong() []string { return nil }

// numberLen is the length of the file with the number, and a newline.
const numberLen = 11

// counter increments the number in a file under a lock, a number of times.
func counter(fs *flag.FlagSet, args []string) (verdict, error) {
	path := fs.String("file", "", "file with the number; made if need be")
	kind := fs.String("lock", "flock", "flock, fcntl or ofd")
	rounds := fs.Int("rounds", 100, "how many increments")
	mapped := fs.Bool("mapped", false, "read and write the number through a shared mapping")
	fs.Parse(args)
	f, err := os.OpenFile(*path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fd := int(f.Fd())
	set := func(lock bool) (err error) {
		how, typ := unix.LOCK_UN, int16(unix.F_UNLCK)
		if lock {
			how, typ = unix.LOCK_EX, unix.F_WRLCK
		}
		for {
			switch *kind {
			case "flock":
				err = unix.Flock(fd, how)
			case "fcntl":
				err = unix.FcntlFlock(uintptr(fd), unix.F_SETLKW, &unix.Flock_t{Type: typ})
			case "ofd":
				err = unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLKW, &unix.Flock_t{Type: typ})
			default:
				return fmt.Errorf("unknown kind of lock %q", *kind)
			}
			if err != unix.EINTR { // the Go runtime's own signals
				break
			}
		}
		if err != nil {
			return &os.PathError{Op: *kind, Path: *path, Err: err}
		}
		return nil
	}
	read, write := f.ReadAt, f.WriteAt
	if *mapped {
		if err := f.Truncate(numberLen); err != nil { // as all of them do
			return nil, err
		}
		m, err := unix.Mmap(fd, 0, numberLen, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return nil, err
		}
		defer unix.Munmap(m)
		read = func(p []byte, _ int64) (int, error) {
			return len(bytes.TrimRight(p[:copy(p, m)], "\x00")), nil
		}
		write = func(p []byte, _ int64) (int, error) { return copy(m, p), nil }
	}
	c := &Counting{}
	buf := make([]byte, 20)
	for range *rounds {
		begin := time.Now()
		if err := set(true); err != nil {
			return nil, err
		}
		n, err := read(buf, 0)
		if err != nil && err != io.EOF {
			return nil, err
		}
		value := 0
		if n > 0 {
			if value, err = strconv.Atoi(strings.TrimSpace(string(buf[:n]))); err != nil {
				return nil, err
			}
		}
		c.Last = value + 1
		if _, err := write(fmt.Appendf(nil, "%*d\n", numberLen-1, c.Last), 0); err != nil {
			return nil, err
		}
		if err := set(false); err != nil {
			return nil, err
		}
		c.Rounds++
		c.Worst = max(c.Worst, float64(time.Since(begin).Microseconds())/1000)
	}
	return c, nil
}

// Appending is the outcome of append.
type Appending struct {
	Records int      `json:"records"`
	Faults  []string `json:"faults"`
}

func (a *Appending) wrong() []string { return a.Faults }

// A record is "id number length crc padding\n"; the checksum is the padding's.
func recordOf(id, number, size int) []byte {
	pad := make([]byte, 0, size)
	for i := range size {
		pad = append(pad, 'a'+byte((id+number+i)%26))
	}
	return fmt.Appendf(nil, "%d %d %d %08x %s\n", id, number, size, crc32.ChecksumIEEE(pad), pad)
}

// appendRecords appends records to a file with O_APPEND, or checks that all
// of all writers are there, whole, once, and each writer's in order.
func appendRecords(fs *flag.FlagSet, args []string) (verdict, error) {
	path := fs.String("file", "", "file to append to")
	id := fs.Int("id", 0, "number of this writer")
	n := fs.Int("n", 1000, "records of each writer")
	check := fs.Int("check", 0, "check the records of that many writers instead of writing")
	fs.Parse(args)
	a := &Appending{}
	if *check > 0 {
		data, err := os.ReadFile(*path)
		if err != nil {
			return nil, err
		}
		next := make([]int, *check)
		for i, line := range bytes.SplitAfter(data, []byte("\n")) {
			if len(line) == 0 {
				continue
			}
			var id, number, size int
			_, err := fmt.Sscanf(string(line), "%d %d %d", &id, &number, &size)
			switch {
			case err != nil || id < 0 || id >= *check || size < 0 || size > len(line) || !bytes.Equal(line, recordOf(id, number, size)):
				a.Faults = append(a.Faults, fmt.Sprintf("line %d is torn: %.60q", i+1, line))
			case number != next[id]:
				a.Faults = append(a.Faults, fmt.Sprintf("line %d: record %d of writer %d, want its %d", i+1, number, id, next[id]))
				next[id] = number + 1
			default:
				next[id]++
				a.Records++
			}
		}
		for id, got := range next {
			if got != *n {
				a.Faults = append(a.Faults, fmt.Sprintf("writer %d: the last record is %d of %d", id, got, *n))
			}
		}
		if len(a.Faults) > 10 {
			a.Faults = append(a.Faults[:10], fmt.Sprintf("... %d in all", len(a.Faults)))
		}
		return a, nil
	}
	f, err := os.OpenFile(*path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	rng := rand.New(rand.NewPCG(uint64(*id), 8))
	for i := range *n {
		rec := recordOf(*id, i, rng.IntN(300))
		if got, err := f.Write(rec); err != nil || got != len(rec) {
			return nil, fmt.Errorf("wrote %d of %d bytes: %w", got, len(rec), err)
		}
		a.Records++
	}
	return a, f.Close()
}

// Racing is the outcome of race.
type Racing struct {
	Ops    map[string]int `json:"ops"`  // that succeeded
	Lost   map[string]int `json:"lost"` // to another's earlier change, which is no fault
	Worst  float64        `json:"worst_ms"`
	Faults []string       `json:"faults"`
}

func (r *Racing) wrong() []string { return r.Faults }

// race creates, renames and removes a few names in a directory where others do the same.
func race(fs *flag.FlagSet, args []string) (verdict, error) {
	dir := fs.String("dir", "", "shared directory")
	duration := fs.Duration("duration", 5*time.Second, "how long")
	names := fs.Int("names", 20, "how many names are fought for")
	seed := fs.Uint64("seed", 1, "of the choices")
	deep := fs.Bool("deep", false, "fill the directories that are made, and empty those that are removed")
	fs.Parse(args)
	rng := rand.New(rand.NewPCG(*seed, 9))
	name := func() string { return filepath.Join(*dir, fmt.Sprintf("name-%d", rng.IntN(*names))) }
	r := &Racing{Ops: map[string]int{}, Lost: map[string]int{}}
	for end := time.Now().Add(*duration); time.Now().Before(end); {
		a, b := name(), name()
		var op string
		var err error
		var expected []unix.Errno
		begin := time.Now()
		switch rng.IntN(8) {
		case 0, 1:
			op, expected = "create", []unix.Errno{unix.EEXIST}
			var f *os.File
			if f, err = os.OpenFile(a, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644); err == nil {
				_, err = f.WriteString(a)
				err = errors.Join(err, f.Close())
			}
		case 2:
			op, expected = "mkdir", []unix.Errno{unix.EEXIST}
			if err = unix.Mkdir(a, 0o755); err == nil && *deep {
				r.Ops[op]++
				op, expected = "fill", nil
				err = fillDirectory(a, rng)
			}
		case 3, 4:
			op, expected = "rename", []unix.Errno{unix.ENOENT, unix.EISDIR, unix.ENOTDIR, unix.ENOTEMPTY, unix.EEXIST}
			err = unix.Rename(a, b)
		case 5:
			op, expected = "rmdir", []unix.Errno{unix.ENOENT, unix.ENOTDIR}
			if *deep {
				if err = clearDirectory(a); err != nil {
					break
				}
				expected = append(expected, unix.ENOTEMPTY)
			}
			err = unix.Rmdir(a)
		case 6:
			op, expected = "unlink", []unix.Errno{unix.ENOENT, unix.EISDIR}
			err = unix.Unlink(a)
		case 7:
			op, expected = "link", []unix.Errno{unix.ENOENT, unix.EEXIST, unix.EPERM}
			err = unix.Link(a, b)
		}
		r.Worst = max(r.Worst, float64(time.Since(begin).Microseconds())/1000)
		lost := false
		for _, e := range expected {
			lost = lost || errors.Is(err, e)
		}
		switch {
		case err == nil:
			r.Ops[op]++
		case lost:
			r.Lost[op]++
		default:
			r.Faults = append(r.Faults, fmt.Sprintf("%s %s: %v", op, filepath.Base(a), err))
			if len(r.Faults) > 10 {
				return r, nil
			}
		}
	}
	return r, nil
}

// fillDirectory makes files in a directory that others may rename, fill, empty and
// remove at any moment. Once a file is open nothing may fail.
func fillDirectory(dir string, rng *rand.Rand) error {
	for range rng.IntN(12) {
		name := filepath.Join(dir, fmt.Sprintf("file-%d", rng.IntN(20)))
		fd, err := unix.Open(name, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC|rng.IntN(2)*unix.O_EXCL, 0o644)
		switch {
		case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR): // the directory is another
			return nil
		case errors.Is(err, unix.EEXIST):
			continue
		case err != nil:
			return fmt.Errorf("open: %w", err)
		}
		for range rng.IntN(3) {
			if _, err = unix.Write(fd, make([]byte, []int{1, 4096, 70000}[rng.IntN(3)])); err != nil {
				err = fmt.Errorf("write: %w", err)
				break
			}
		}
		if err == nil && rng.IntN(8) == 0 {
			if err = unix.Fsync(fd); err != nil {
				err = fmt.Errorf("fsync: %w", err)
			}
		}
		if cerr := unix.Close(fd); cerr != nil {
			err = errors.Join(err, fmt.Errorf("close: %w", cerr))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// clearDirectory removes what is in a directory, if it is one.
func clearDirectory(dir string) error {
	list, err := os.ReadDir(dir)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list: %w", err)
	}
	for _, e := range list {
		err := unix.Unlink(filepath.Join(dir, e.Name()))
		if err != nil && err != unix.ENOENT && err != unix.ENOTDIR && err != unix.EISDIR {
			return fmt.Errorf("unlink: %w", err)
		}
	}
	return nil
}

// Filling is the outcome of fill.
type Filling struct {
	Bytes int64   `json:"bytes"` // written before the disk was full
	Error string  `json:"error"`
	Worst float64 `json:"worst_ms"` // of the writes, and the one that failed
}

func (f *Filling) wrong() []string {
	if f.Error != unix.ENOSPC.Error() {
		return []string{fmt.Sprintf("the disk was never full; after %d bytes: %q", f.Bytes, f.Error)}
	}
	return nil
}

// fill writes one file until there is no space, and says how that was told.
func fill(fs *flag.FlagSet, args []string) (verdict, error) {
	path := fs.String("file", "", "file to make")
	most := fs.Int64("most", 1<<40, "bytes to write at most")
	fs.Parse(args)
	out := &Filling{}
	f, err := os.Create(*path)
	if errors.Is(err, unix.ENOSPC) {
		out.Error = rootErrno(err)
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	for out.Bytes < *most {
		p := contents(uint64(out.Bytes), 128<<10)
		begin := time.Now()
		n, err := f.Write(p)
		out.Worst = max(out.Worst, float64(time.Since(begin).Microseconds())/1000)
		out.Bytes += int64(n)
		if err != nil {
			out.Error = rootErrno(err)
			break
		}
	}
	begin := time.Now()
	if err := f.Close(); err != nil && out.Error == "" {
		out.Error = rootErrno(err)
	}
	out.Worst = max(out.Worst, float64(time.Since(begin).Microseconds())/1000)
	// What was taken and could not be kept after all, the close has told.
	st, err := os.Stat(*path)
	if err != nil {
		return nil, err
	}
	out.Bytes = min(out.Bytes, st.Size())
	return out, nil
}

func rootErrno(err error) string {
	var e unix.Errno
	if errors.As(err, &e) {
		return e.Error()
	}
	return err.Error()
}
