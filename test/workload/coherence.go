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
	"time"

	"golang.org/x/sys/unix"
)

// Coherence is the outcome of coherence: how many rounds of each kind, and what was stale.
type Coherence struct {
	Rounds int            `json:"rounds"`
	Kinds  map[string]int `json:"kinds"`
	Stale  map[string]int `json:"stale"`
	First  []string       `json:"first"` // in words, the first few
	Worst  float64        `json:"worst_ms"`
}

func (c *Coherence) wrong() []string {
	if len(c.Stale) == 0 {
		return nil
	}
	return append([]string{fmt.Sprintf("stale answers: %v", c.Stale)}, c.First...)
}

// A turn prepares something on the mount at the directory `there` so that its
// caches have an opinion, changes it at `here`, and looks again at once.
// It returns what was stale, or an error if a system call failed that must not.
type turn func(r *round) (stale string, err error)

type round struct {
	here, there string // the same directory through two mounts
	n           int
	rng         *rand.Rand
}

// at is the path of an object of this round through a mount.
func (r *round) at(mount, name string) string {
	return filepath.Join(mount, fmt.Sprintf("%s-%d", name, r.n))
}

var turns = map[string]turn{
	"absent, then created":      absentThenCreated,
	"removed":                   removed,
	"renamed directory":         renamedDirectory,
	"replaced by rename":        replaced,
	"size":                      sized,
	"mode and owner":            moded,
	"times":                     timed,
	"extended attribute":        xattred,
	"contents of a cached page": paged,
	"listing of a directory":    listed,
	"target of a link":          linked,
	"number of links":           counted,
}

// coherence plays turns between the directories, each the same one through another mount.
func coherence(fs *flag.FlagSet, args []string) (verdict, error) {
	rounds := fs.Int("rounds", 1000, "how many")
	seed := fs.Uint64("seed", uint64(time.Now().UnixNano()), "of the choices")
	only := fs.String("only", "", "play only this kind of turn")
	fs.Parse(args)
	dirs := fs.Args()
	if len(dirs) < 2 {
		return nil, errors.New("want two directories or more: one directory through several mounts")
	}
	var names []string
	for name := range turns {
		if *only == "" || *only == name {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("no kind of turn %q", *only)
	}
	// Maps have no order; the seed's choices must.
	slices.Sort(names)
	c := &Coherence{Kinds: map[string]int{}, Stale: map[string]int{}}
	rng := rand.New(rand.NewPCG(*seed, 7))
	for n := range *rounds {
		a := rng.IntN(len(dirs))
		b := (a + 1 + rng.IntN(len(dirs)-1)) % len(dirs)
		name := names[rng.IntN(len(names))]
		r := &round{here: dirs[a], there: dirs[b], n: n, rng: rng}
		begin := time.Now()
		stale, err := turns[name](r)
		if err != nil {
			return nil, fmt.Errorf("seed %d, round %d, %s, from %s to %s: %w", *seed, n, name, r.here, r.there, err)
		}
		c.Worst = max(c.Worst, float64(time.Since(begin).Microseconds())/1000)
		c.Rounds++
		c.Kinds[name]++
		if stale != "" {
			c.Stale[name]++
			if len(c.First) < 10 {
				c.First = append(c.First, fmt.Sprintf("seed %d, round %d, %s, from %s to %s: %s", *seed, n, name, r.here, r.there, stale))
			}
		}
	}
	return c, nil
}

func exists(path string) (bool, error) {
	var st unix.Stat_t
	switch err := unix.Lstat(path, &st); err {
	case nil:
		return true, nil
	case unix.ENOENT:
		return false, nil
	default:
		return false, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
}

func absentThenCreated(r *round) (string, error) {
	name := r.at(r.there, "new")
	for range 2 { // the second answer comes from the kernel's cache
		if there, err := exists(name); there || err != nil {
			return "", fmt.Errorf("%s before it is made: %v, %v", name, there, err)
		}
	}
	here := r.at(r.here, "new")
	var err error
	var how string
	switch r.rng.IntN(5) {
	case 0:
		how, err = "create", os.WriteFile(here, []byte("x"), 0o644)
	case 1:
		how, err = "mkdir", os.Mkdir(here, 0o755)
	case 2:
		how, err = "symlink", os.Symlink("target", here)
	case 3:
		if err = os.WriteFile(here+".old", nil, 0o644); err == nil {
			how, err = "link", os.Link(here+".old", here)
		}
	case 4:
		if err = os.WriteFile(here+".old", nil, 0o644); err == nil {
			how, err = "rename", os.Rename(here+".old", here)
		}
	}
	if err != nil {
		return "", err
	}
	there, err := exists(name)
	if err != nil || there {
		return "", errors.Join(err, os.RemoveAll(here), os.RemoveAll(here+".old"))
	}
	return "still absent after " + how, nil
}

func removed(r *round) (string, error) {
	here, name := r.at(r.here, "old"), r.at(r.there, "old")
	isDir := r.rng.IntN(2) == 0
	if isDir {
		if err := os.Mkdir(here, 0o755); err != nil {
			return "", err
		}
	} else if err := os.WriteFile(here, []byte("x"), 0o644); err != nil {
		return "", err
	}
	for range 2 {
		if there, err := exists(name); !there || err != nil {
			return "just made, and absent", err
		}
	}
	if err := os.Remove(here); err != nil {
		return "", err
	}
	if r.rng.IntN(2) == 0 && !isDir {
		f, err := os.Open(name)
		if err == nil {
			f.Close()
			return "a removed file can be opened", nil
		}
		if !errors.Is(err, unix.ENOENT) {
			return "", err
		}
		return "", nil
	}
	there, err := exists(name)
	if there {
		return "still there", err
	}
	return "", err
}

func renamedDirectory(r *round) (string, error) {
	here, name := r.at(r.here, "dir"), r.at(r.there, "dir")
	if err := os.Mkdir(here, 0o755); err != nil {
		return "", err
	}
	if err := os.WriteFile(here+"/file", []byte("x"), 0o644); err != nil {
		return "", err
	}
	f, err := os.Open(name + "/file")
	if err != nil {
		return "", err
	}
	defer f.Close()
	if there, err := exists(name + ".to/file"); there || err != nil {
		return "", fmt.Errorf("%s.to/file before the rename: %v, %v", name, there, err)
	}
	if err := os.Rename(here, here+".to"); err != nil {
		return "", err
	}
	checks := []struct {
		path string
		want bool
	}{{name + "/file", false}, {name + ".to/file", true}, {name, false}}
	r.rng.Shuffle(len(checks), func(i, j int) { checks[i], checks[j] = checks[j], checks[i] })
	for _, c := range checks {
		got, err := exists(c.path)
		if err != nil {
			return "", err
		}
		if got != c.want {
			return fmt.Sprintf("after the rename, %s exists: %v", filepath.Base(c.path), got), nil
		}
	}
	buf := make([]byte, 2)
	if n, err := f.ReadAt(buf, 0); n != 1 || buf[0] != 'x' {
		return fmt.Sprintf("the open file reads %d bytes, %v", n, err), nil
	}
	return "", os.RemoveAll(here + ".to")
}

func replaced(r *round) (string, error) {
	here, name := r.at(r.here, "conf"), r.at(r.there, "conf")
	if err := os.WriteFile(here, []byte("old contents"), 0o644); err != nil {
		return "", err
	}
	if got, err := os.ReadFile(name); err != nil || string(got) != "old contents" {
		return fmt.Sprintf("just written, reads %q", got), err
	}
	if err := os.WriteFile(here+".tmp", []byte("new contents"), 0o644); err != nil {
		return "", err
	}
	if err := os.Rename(here+".tmp", here); err != nil {
		return "", err
	}
	got, err := os.ReadFile(name)
	if err != nil {
		return "", err
	}
	if string(got) != "new contents" {
		return fmt.Sprintf("reads %q", got), nil
	}
	return "", os.Remove(here)
}

func sized(r *round) (string, error) {
	here, name := r.at(r.here, "size"), r.at(r.there, "size")
	if err := os.WriteFile(here, make([]byte, 1000), 0o644); err != nil {
		return "", err
	}
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	size := func() (int64, error) {
		if r.rng.IntN(2) == 0 {
			st, err := f.Stat()
			if err != nil {
				return 0, err
			}
			return st.Size(), nil
		}
		st, err := os.Stat(name)
		if err != nil {
			return 0, err
		}
		return st.Size(), nil
	}
	if n, err := size(); n != 1000 || err != nil {
		return fmt.Sprintf("just written, size %d, want 1000", n), err
	}
	want := int64(r.rng.IntN(100000))
	if want < 1000 || r.rng.IntN(2) == 0 {
		if err := os.Truncate(here, want); err != nil {
			return "", err
		}
	} else {
		w, err := os.OpenFile(here, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return "", err
		}
		_, err = w.Write(make([]byte, want-1000))
		if err := errors.Join(err, w.Close()); err != nil {
			return "", err
		}
	}
	got, err := size()
	if err != nil {
		return "", err
	}
	if got != want {
		return fmt.Sprintf("size %d, want %d", got, want), nil
	}
	return "", os.Remove(here)
}

func moded(r *round) (string, error) {
	here, name := r.at(r.here, "mode"), r.at(r.there, "mode")
	if err := os.WriteFile(here, nil, 0o644); err != nil {
		return "", err
	}
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		return "", err
	}
	mode, uid, gid := uint32(r.rng.IntN(0o1000)), r.rng.IntN(1000), r.rng.IntN(1000)
	if err := unix.Chown(here, uid, gid); err != nil {
		return "", err
	}
	if err := unix.Chmod(here, mode); err != nil {
		return "", err
	}
	if err := unix.Stat(name, &st); err != nil {
		return "", err
	}
	if st.Mode&0o7777 != mode || st.Uid != uint32(uid) || st.Gid != uint32(gid) {
		return fmt.Sprintf("mode %o owner %d:%d, want %o %d:%d", st.Mode&0o7777, st.Uid, st.Gid, mode, uid, gid), nil
	}
	return "", os.Remove(here)
}

func timed(r *round) (string, error) {
	here, name := r.at(r.here, "time"), r.at(r.there, "time")
	if err := os.WriteFile(here, nil, 0o644); err != nil {
		return "", err
	}
	if _, err := os.Stat(name); err != nil {
		return "", err
	}
	want := time.Unix(int64(r.rng.IntN(2e9)), int64(r.rng.IntN(1e9)))
	if err := os.Chtimes(here, want, want); err != nil {
		return "", err
	}
	st, err := os.Stat(name)
	if err != nil {
		return "", err
	}
	if !st.ModTime().Equal(want) {
		return fmt.Sprintf("modification time %v, want %v", st.ModTime(), want), nil
	}
	return "", os.Remove(here)
}

func xattred(r *round) (string, error) {
	here, name := r.at(r.here, "xattr"), r.at(r.there, "xattr")
	if err := os.WriteFile(here, nil, 0o644); err != nil {
		return "", err
	}
	if err := unix.Setxattr(here, "user.mark", []byte("old"), 0); err != nil {
		return "", &os.PathError{Op: "setxattr", Path: here, Err: err}
	}
	buf := make([]byte, 100)
	n, err := unix.Getxattr(name, "user.mark", buf)
	if err != nil {
		return "", &os.PathError{Op: "getxattr", Path: name, Err: err}
	}
	if string(buf[:n]) != "old" {
		return fmt.Sprintf("just set, reads %q", buf[:n]), nil
	}
	if err := unix.Setxattr(here, "user.mark", []byte("new value"), 0); err != nil {
		return "", &os.PathError{Op: "setxattr", Path: here, Err: err}
	}
	if n, err = unix.Getxattr(name, "user.mark", buf); err != nil {
		return "", &os.PathError{Op: "getxattr", Path: name, Err: err}
	}
	if string(buf[:n]) != "new value" {
		return fmt.Sprintf("reads %q, want the new value", buf[:n]), nil
	}
	return "", os.Remove(here)
}

func paged(r *round) (string, error) {
	here, name := r.at(r.here, "page"), r.at(r.there, "page")
	const pages = 8
	old := bytes.Repeat([]byte{'o'}, pages*4096)
	if err := os.WriteFile(here, old, 0o644); err != nil {
		return "", err
	}
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	buf := make([]byte, len(old))
	for range 2 {
		if n, err := f.ReadAt(buf, 0); n != len(buf) || !bytes.Equal(buf, old) {
			return fmt.Sprintf("just written, %d bytes, %s", n, difference(old, buf)), ignoreEOF(err)
		}
	}
	w, err := os.OpenFile(here, os.O_WRONLY, 0)
	if err != nil {
		return "", err
	}
	defer w.Close()
	want := bytes.Clone(old)
	off := r.rng.IntN(len(old) - 100)
	copy(want[off:], bytes.Repeat([]byte{'n'}, 100))
	if _, err := w.WriteAt(want[off:off+100], int64(off)); err != nil {
		return "", err
	}
	if r.rng.IntN(2) == 0 { // through another descriptor
		f.Close()
		if f, err = os.Open(name); err != nil {
			return "", err
		}
		defer f.Close()
	}
	if n, err := f.ReadAt(buf, 0); n != len(buf) {
		return fmt.Sprintf("%d bytes", n), ignoreEOF(err)
	}
	if !bytes.Equal(buf, want) {
		return fmt.Sprintf("%d bytes written at %d: %s", 100, off, difference(want, buf)), nil
	}
	return "", os.Remove(here)
}

func ignoreEOF(err error) error {
	if err != nil && err.Error() == "EOF" {
		return nil
	}
	return err
}

func listed(r *round) (string, error) {
	here, name := r.at(r.here, "list"), r.at(r.there, "list")
	if err := os.Mkdir(here, 0o755); err != nil {
		return "", err
	}
	if err := os.WriteFile(here+"/a", nil, 0o644); err != nil {
		return "", err
	}
	list := func() (string, error) {
		entries, err := os.ReadDir(name)
		var s string
		for _, e := range entries {
			s += e.Name()
		}
		return s, err
	}
	for range 2 {
		if got, err := list(); got != "a" || err != nil {
			return fmt.Sprintf("just made, lists %q", got), err
		}
	}
	if err := os.WriteFile(here+"/b", nil, 0o644); err != nil {
		return "", err
	}
	if got, err := list(); got != "ab" || err != nil {
		return fmt.Sprintf("lists %q, want ab", got), err
	}
	if err := os.Remove(here + "/a"); err != nil {
		return "", err
	}
	if got, err := list(); got != "b" || err != nil {
		return fmt.Sprintf("lists %q, want b", got), err
	}
	return "", os.RemoveAll(here)
}

func linked(r *round) (string, error) {
	here, name := r.at(r.here, "link"), r.at(r.there, "link")
	if err := os.Symlink("old", here); err != nil {
		return "", err
	}
	if got, err := os.Readlink(name); got != "old" || err != nil {
		return fmt.Sprintf("just made, points to %q", got), err
	}
	if err := os.Symlink("new", here+".tmp"); err != nil {
		return "", err
	}
	if err := os.Rename(here+".tmp", here); err != nil {
		return "", err
	}
	if got, err := os.Readlink(name); got != "new" || err != nil {
		return fmt.Sprintf("points to %q, want new", got), err
	}
	return "", os.Remove(here)
}

func counted(r *round) (string, error) {
	here, name := r.at(r.here, "links"), r.at(r.there, "links")
	if err := os.WriteFile(here, nil, 0o644); err != nil {
		return "", err
	}
	links := func() (uint64, error) {
		var st unix.Stat_t
		err := unix.Stat(name, &st)
		return uint64(st.Nlink), err
	}
	if n, err := links(); n != 1 || err != nil {
		return fmt.Sprintf("just made, %d links", n), err
	}
	if err := os.Link(here, here+".2"); err != nil {
		return "", err
	}
	if n, err := links(); n != 2 || err != nil {
		return fmt.Sprintf("%d links, want 2", n), err
	}
	if err := os.Remove(here + ".2"); err != nil {
		return "", err
	}
	if n, err := links(); n != 1 || err != nil {
		return fmt.Sprintf("%d links, want 1 again", n), err
	}
	return "", os.Remove(here)
}
