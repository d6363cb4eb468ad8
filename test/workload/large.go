package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Directory is the outcome of large.
type Directory struct {
	Entries int       `json:"entries"`
	Seconds float64   `json:"seconds"`
	Tenths  []float64 `json:"tenths"` // seconds for each tenth of the entries, in the order in which they were done
	Faults  []string  `json:"faults"`
}

func (d *Directory) wrong() []string { return d.Faults }

// large makes, lists or removes the entries of one large directory, and says how
// long each tenth of that took.
func large(fs *flag.FlagSet, args []string) (verdict, error) {
	dir := fs.String("dir", "", "the directory")
	do := fs.String("do", "make", "make, list or remove (the directory as well)")
	n := fs.Int("n", 1000, "how many entries: -do list fails if there are others")
	workers := fs.Int("workers", 4, "how many make or remove at once")
	fs.Parse(args)
	d := &Directory{Entries: *n}
	begin := time.Now()
	last, tenth := begin, max(*n/10, 1)
	done := func(count int) {
		if count%tenth == 0 {
			d.Tenths = append(d.Tenths, time.Since(last).Seconds())
			last = time.Now()
		}
	}
	defer func() { d.Seconds = time.Since(begin).Seconds() }()
	name := func(i int) string { return filepath.Join(*dir, fmt.Sprintf("entry-%07d", i)) }
	each := func(f func(i int) error) error {
		var next, count atomic.Int64
		var mu sync.Mutex
		var wg sync.WaitGroup
		var failed error
		for range *workers {
			wg.Go(func() {
				for i := int(next.Add(1) - 1); i < *n; i = int(next.Add(1) - 1) {
					err := f(i)
					mu.Lock()
					failed = errors.Join(failed, err)
					stop := failed != nil
					done(int(count.Add(1)))
					mu.Unlock()
					if stop {
						return
					}
				}
			})
		}
		wg.Wait()
		return failed
	}
	switch *do {
	case "make":
		if err := os.Mkdir(*dir, 0o755); err != nil {
			return nil, err
		}
		return d, each(func(i int) error {
			fd, err := unix.Open(name(i), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
			if err != nil {
				return &os.PathError{Op: "create", Path: name(i), Err: err}
			}
			return unix.Close(fd)
		})
	case "remove":
		if err := each(func(i int) error { return unix.Unlink(name(i)) }); err != nil {
			return nil, err
		}
		return d, unix.Rmdir(*dir)
	case "list":
		seen := make([]bool, *n)
		count := 0
		err := names(*dir, func(name []byte) {
			var i int
			if _, err := fmt.Sscanf(string(name), "entry-%d", &i); err != nil || i < 0 || i >= *n {
				d.Faults = append(d.Faults, fmt.Sprintf("%q is listed", name))
				return
			}
			if seen[i] {
				d.Faults = append(d.Faults, fmt.Sprintf("%q is listed twice", name))
			}
			seen[i] = true
			count++
			done(count)
		})
		if count != *n {
			d.Faults = append(d.Faults, fmt.Sprintf("%d of %d entries are listed", count, *n))
		}
		return d, err
	}
	return nil, fmt.Errorf("do what? %q", *do)
}

// names reads a directory as readdir(3) does, without keeping it in memory.
func names(dir string, f func(name []byte)) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	buf := make([]byte, 32<<10)
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil {
			return &os.PathError{Op: "getdents", Path: dir, Err: err}
		}
		if n == 0 {
			return nil
		}
		for p := buf[:n]; len(p) > 0; {
			const header = 19 // of struct linux_dirent64
			size := binary.NativeEndian.Uint16(p[16:])
			if int(size) > len(p) || size < header {
				return io.ErrUnexpectedEOF
			}
			name, _, _ := bytes.Cut(p[header:size], []byte{0})
			if s := string(name); s != "." && s != ".." {
				f(name)
			}
			p = p[size:]
		}
	}
}
