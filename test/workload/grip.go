package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// gripped is what came of holding a lock and writing to what it guards.
type gripped struct {
	Written int // times
	Lost    int // times the lock was found to be lost: EIO
	Wrong   []string
}

func (g *gripped) wrong() []string { return g.Wrong }

// grip waits for the lock of a file, which it writes its name to and syncs from then on, until it
// is told to finish. It prints "gripped" once it has the lock, and what came of each
// write. Once it has lost the lock, which EIO says, nothing that it writes may succeed.
func grip(fs *flag.FlagSet, args []string) (verdict, error) {
	dir := fs.String("dir", "", "where the file is, which is called as the kind of lock is")
	lock := fs.String("lock", "flock", "flock or fcntl")
	name := fs.String("name", "", "what is written")
	fs.Parse(args)
	f, err := os.OpenFile(filepath.Join(*dir, *lock), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if *lock == "flock" {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	} else {
		err = unix.FcntlFlock(f.Fd(), unix.F_SETLKW, &unix.Flock_t{Type: unix.F_WRLCK})
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", *lock, err)
	}
	fmt.Fprintln(os.Stderr, "gripped")
	g, done := new(gripped), stopped()
	for i := 0; ; i++ {
		_, err := f.WriteAt(fmt.Appendf(nil, "%-16s", *name), 0)
		if err == nil {
			err = f.Sync()
		}
		fmt.Fprintf(os.Stderr, "%d: %v\n", i, err)
		switch {
		case errors.Is(err, unix.EIO):
			g.Lost++
		case err != nil:
			g.Wrong = append(g.Wrong, fmt.Sprintf("write %d: %v", i, err))
		case g.Lost > 0:
			g.Wrong = append(g.Wrong, fmt.Sprintf("write %d succeeded, and the lock was lost before", i))
		default:
			g.Written++
		}
		select {
		case <-done:
			return g, nil
		case <-time.After(20 * time.Millisecond): // its own pace
		}
	}
}
