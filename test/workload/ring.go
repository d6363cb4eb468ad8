package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Ringing is the outcome of ring.
type Ringing struct {
	Rounds int      `json:"rounds"`
	Worst  float64  `json:"worst_ms"`
	Faults []string `json:"faults"`
}

func (r *Ringing) wrong() []string { return r.Faults }

// ring lets every mount cache the others' new names as absent, and then all
// create at once: the names' own directory is locked in each kernel by the
// create in flight, while the other's invalidation wants that lock. Every third
// round all want the same name, which exactly one must get.
func ring(fs *flag.FlagSet, args []string) (verdict, error) {
	rounds := fs.Int("rounds", 300, "how many")
	fs.Parse(args)
	dirs := fs.Args()
	if len(dirs) < 2 {
		return nil, errors.New("want two directories or more: one directory through several mounts")
	}
	out := &Ringing{}
	fault := func(format string, v ...any) {
		if len(out.Faults) < 10 {
			out.Faults = append(out.Faults, fmt.Sprintf(format, v...))
		}
	}
	for n := range *rounds {
		same := n%3 == 2
		name := func(k int) string {
			if same {
				k = 0
			}
			return fmt.Sprintf("ring-%d-%d", n, k)
		}
		for _, dir := range dirs {
			for k := range dirs {
				if there, err := exists(filepath.Join(dir, name(k))); there || err != nil {
					return nil, fmt.Errorf("round %d: %s before it is made: %v, %w", n, name(k), there, err)
				}
			}
		}
		var wg sync.WaitGroup
		errs := make([]error, len(dirs))
		took := make([]time.Duration, len(dirs))
		begin := make(chan struct{})
		for k, dir := range dirs {
			path := filepath.Join(dir, name(k))
			wg.Go(func() {
				<-begin
				start := time.Now()
				switch {
				case same || n%2 == 0:
					var fd int
					if fd, errs[k] = unix.Open(path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644); errs[k] == nil {
						unix.Close(fd)
					}
				default:
					errs[k] = unix.Mkdir(path, 0o755)
				}
				took[k] = time.Since(start)
			})
		}
		close(begin)
		wg.Wait()
		won := 0
		for k, err := range errs {
			out.Worst = max(out.Worst, float64(took[k].Microseconds())/1000)
			switch {
			case err == nil:
				won++
			case !same || err != unix.EEXIST:
				fault("round %d: creating %s: %v", n, name(k), err)
			}
		}
		if want := len(dirs); same && won != 1 || !same && won != want {
			fault("round %d: %d mounts made their file", n, won)
		}
		for _, dir := range dirs {
			for k := range dirs {
				if there, err := exists(filepath.Join(dir, name(k))); !there || err != nil {
					fault("round %d: %s is not seen in %s: %v", n, name(k), dir, err)
				}
			}
		}
		for k := range dirs {
			if err := os.Remove(filepath.Join(dirs[len(dirs)-1-k], name(k))); err != nil && !(same && errors.Is(err, unix.ENOENT)) {
				fault("round %d: %v", n, err)
			}
		}
		out.Rounds++
	}
	return out, nil
}

// Making is the outcome of files.
type Making struct {
	Files   int     `json:"files"`
	Seconds float64 `json:"seconds"`
}

func (*Making) wrong() []string { return nil }

// files makes many small files, a hundred in a directory.
func files(fs *flag.FlagSet, args []string) (verdict, error) {
	dir := fs.String("dir", "", "directory to make and fill")
	n := fs.Int("n", 1000, "how many files")
	size := fs.Int("size", 4096, "bytes of each")
	fs.Parse(args)
	if err := os.Mkdir(*dir, 0o755); err != nil {
		return nil, err
	}
	begin := time.Now()
	for i := range *n {
		sub := filepath.Join(*dir, fmt.Sprint(i/100))
		if i%100 == 0 {
			if err := os.Mkdir(sub, 0o755); err != nil {
				return nil, err
			}
		}
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprint(i)), contents(uint64(i), *size), 0o644); err != nil {
			return nil, err
		}
	}
	return &Making{*n, time.Since(begin).Seconds()}, nil
}
