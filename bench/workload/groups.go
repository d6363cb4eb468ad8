package main

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// group is a number of workloads that build on each other's files.
type group struct {
	name, about string
	run         func(*bench) error
}

var groups = []group{
	{"small", "4 KiB files: create, read, stat, absent names, rewrite, rename over, create and fsync, delete", (*bench).small},
	{"tree", "a WordPress tree: untar, ls -lR, PHP-like requests, git clone and status, delete", (*bench).wordpress},
	{"large", "one large file: sequential and random, read and write, 4 KiB, 128 KiB and 1 MiB", (*bench).large},
	{"sync", "flushed writes: 8 KiB + fdatasync, append + fsync, sqlite3", (*bench).sync},
	{"php", "pages of WordPress by nginx and php-fpm, and what they send over the network", (*bench).php},
	{"db", "transactions that write, by sysbench on a MariaDB with its data there", (*bench).db},
}

// workers runs f(0) to f(n-1), shared out to w goroutines in runs, and returns the first error.
func workers(w, n int, f func(int) error) error {
	if w == 1 {
		for i := range n {
			if err := f(i); err != nil {
				return err
			}
		}
		return nil
	}
	errs := make([]error, w)
	var wg sync.WaitGroup
	for k := range w {
		wg.Go(func() {
			for i := n * k / w; i < n*(k+1)/w && errs[k] == nil; i++ {
				errs[k] = f(i)
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func fail(op, path string, err error) error { return &fs.PathError{Op: op, Path: path, Err: err} }

// put writes a whole file: open with the flags, write, fsync if asked, close.
func put(path string, flags int, data []byte, flush bool) error {
	fd, err := unix.Open(path, flags|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return fail("open", path, err)
	}
	if n, err := unix.Write(fd, data); err != nil || n != len(data) {
		unix.Close(fd)
		return fail("write", path, err)
	}
	if flush {
		if err := unix.Fsync(fd); err != nil {
			unix.Close(fd)
			return fail("fsync", path, err)
		}
	}
	if err := unix.Close(fd); err != nil {
		return fail("close", path, err)
	}
	return nil
}

// get reads a whole file: open, read until the end, close.
func get(path string, buf []byte) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fail("open", path, err)
	}
	total := 0
	for {
		n, err := unix.Read(fd, buf)
		if err != nil {
			unix.Close(fd)
			return total, fail("read", path, err)
		}
		total += n
		if n < len(buf) { // a regular file's end
			break
		}
	}
	if err := unix.Close(fd); err != nil {
		return total, fail("close", path, err)
	}
	return total, nil
}

func stat(path string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fail("stat", path, err)
	}
	return nil
}

func absent(path string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != unix.ENOENT {
		return fail("stat of an absent name", path, err)
	}
	return nil
}

// block is size bytes that differ with the seed.
func block(size int, seed int) []byte {
	b := make([]byte, size)
	rng := rand.New(rand.NewPCG(uint64(seed), 2))
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func (b *bench) small() error {
	n := b.n(1000)
	dir := filepath.Join(b.dir, "small")
	for _, d := range []string{dir, dir + "/p", dir + "/s"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	name := func(i int) string { return fmt.Sprintf("%s/file-%06d", dir, i) }
	missing := func(i int) string { return fmt.Sprintf("%s/absent-%06d", dir, i) }
	data, other := block(4096, 1), block(4096, 2)
	buf := make([]byte, 64<<10)
	read := func(w int) error {
		return workers(w, n, func(i int) error {
			buf := buf
			if w > 1 {
				buf = make([]byte, 8<<10)
			}
			got, err := get(name(i), buf)
			if err == nil && got != len(data) {
				err = fmt.Errorf("%s has %d bytes, want %d", name(i), got, len(data))
			}
			return err
		})
	}
	all := func(f func(string) error, of func(int) string) func() error {
		return func() error { return workers(1, n, func(i int) error { return f(of(i)) }) }
	}
	steps := []struct {
		name  string
		times int // how often f goes over all files
		f     func() error
	}{
		{"create 4 KiB", 1, func() error {
			return workers(1, n, func(i int) error { return put(name(i), unix.O_CREAT|unix.O_EXCL, data, false) })
		}},
		{"", 0, b.dropCaches},
		{"open-read-close, cold", 1, func() error { return read(1) }},
		{"open-read-close, warm", 10, func() error {
			for range 10 {
				if err := read(1); err != nil {
					return err
				}
			}
			return nil
		}},
		{"open-read-close, warm, 4 workers", 10, func() error {
			for range 10 {
				if err := read(4); err != nil {
					return err
				}
			}
			return nil
		}},
		{"stat, just read", 1, all(stat, name)},
		{"", 0, func() error { time.Sleep(1500 * time.Millisecond); return nil }}, // longer than caches that only time out
		{"stat, 1.5 s later", 1, all(stat, name)},
		{"absent name, first", 1, all(absent, missing)},
		{"absent name, again", 1, all(absent, missing)},
		{"rewrite in place", 1, func() error {
			return workers(1, n, func(i int) error { return put(name(i), unix.O_TRUNC, other, false) })
		}},
		{"rename over", 1, func() error {
			return workers(1, n, func(i int) error {
				if err := put(name(i)+".tmp", unix.O_CREAT|unix.O_EXCL, data, false); err != nil {
					return err
				}
				if err := unix.Rename(name(i)+".tmp", name(i)); err != nil {
					return fail("rename", name(i), err)
				}
				return nil
			})
		}},
		{"delete", 1, all(func(f string) error {
			if err := unix.Unlink(f); err != nil {
				return fail("unlink", f, err)
			}
			return nil
		}, name)},
		{"create 4 KiB, 4 workers", 1, func() error {
			return workers(4, n, func(i int) error {
				return put(fmt.Sprintf("%s/p/file-%06d", dir, i), unix.O_CREAT|unix.O_EXCL, data, false)
			})
		}},
		{"create 4 KiB + fsync", 1, func() error {
			return workers(1, n, func(i int) error {
				return put(fmt.Sprintf("%s/s/file-%06d", dir, i), unix.O_CREAT|unix.O_EXCL, data, true)
			})
		}},
	}
	for _, s := range steps {
		var err error
		if s.name == "" {
			err = s.f()
		} else {
			err = b.rate(s.name, "/s", float64(n*s.times), s.f)
		}
		if err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

func (b *bench) wordpress() error {
	dir := filepath.Join(b.dir, "wp")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if err := b.time("untar WordPress", func() error { return program("tar", "-xf", b.archive, "-C", dir) }); err != nil {
		return err
	}
	if err := b.dropCaches(); err != nil {
		return err
	}
	for _, state := range []string{"cold", "warm"} {
		if err := b.time("ls -lR, "+state, func() error { return listAll(dir) }); err != nil {
			return err
		}
	}
	var php []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && strings.HasSuffix(path, ".php") {
			php = append(php, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	if len(php) < 100 {
		return fmt.Errorf("the tree has %d PHP files, want 100 and more", len(php))
	}
	rand.New(rand.NewPCG(1, 3)).Shuffle(len(php), func(i, j int) { php[i], php[j] = php[j], php[i] })
	if err := b.dropCaches(); err != nil {
		return err
	}
	for _, p := range []struct {
		name     string
		requests int
		absent   bool
	}{
		{"PHP-like request, cold", b.n(8), false},
		{"", 0, false},
		{"PHP-like request, warm", b.n(500), false},
		{"PHP-like request, absent names, first", b.n(8), true},
		{"", 0, true},
		{"PHP-like request, absent names, warm", b.n(200), true},
	} {
		if p.name == "" { // what is measured next has been seen before, all of it
			err = workers(4, len(php), func(i int) error { return seen(php[i], p.absent) })
		} else {
			err = b.rate(p.name, "/s", float64(p.requests), func() error {
				return workers(4, p.requests, func(i int) error { return request(php, i, p.absent) })
			})
		}
		if err != nil {
			return err
		}
	}
	if err := b.git(); err != nil {
		return err
	}
	return b.time("rm -r WordPress", func() error { return program("rm", "-r", dir) })
}

// request does what PHP does for one page: 400 stats and 100 files opened, read
// and closed. With absent names, 200 of the stats look for files along an
// include path where they are not.
func request(php []string, i int, missing bool) error {
	buf := make([]byte, 64<<10)
	for k := range 400 {
		path := php[(i*7+k)%len(php)]
		if missing && k%2 == 1 {
			if err := absent(elsewhere(path)); err != nil {
				return err
			}
			continue
		}
		if err := stat(path); err != nil {
			return err
		}
	}
	for k := range 100 {
		if _, err := get(php[(i*7+k*3)%len(php)], buf); err != nil {
			return err
		}
	}
	return nil
}

// elsewhere is where a file of an include path is looked for, and is not.
func elsewhere(path string) string { return filepath.Dir(path) + "/vendor-" + filepath.Base(path) }

// seen looks once at all that a request may look at.
func seen(path string, missing bool) error {
	if missing {
		return absent(elsewhere(path))
	}
	if err := stat(path); err != nil {
		return err
	}
	_, err := get(path, make([]byte, 64<<10))
	return err
}

// listAll does what ls -lR does: every directory read, every entry's attributes looked at.
func listAll(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := dir + "/" + e.Name()
		if err := stat(path); err != nil {
			return err
		}
		if e.IsDir() {
			if err := listAll(path); err != nil {
				return err
			}
		}
	}
	return nil
}

// git clones a repository of the tree that lies elsewhere.
func (b *bench) git() error {
	if _, err := exec.LookPath("git"); err != nil {
		fmt.Fprintln(os.Stderr, "workload: git is not installed, its workloads are left out")
		return nil
	}
	repo, clone := filepath.Join(b.tmp, "repo"), filepath.Join(b.dir, "clone")
	if _, err := os.Stat(repo); err != nil {
		if err := os.Mkdir(repo, 0o755); err != nil {
			return err
		}
		for _, argv := range [][]string{
			{"tar", "-xf", b.archive, "-C", repo},
			{"git", "-C", repo, "init", "-q"},
			{"git", "-C", repo, "add", "-A", "-f"},
			{"git", "-C", repo, "-c", "user.name=w", "-c", "user.email=w@example.org", "commit", "-q", "-m", "all"},
		} {
			if err := program(argv...); err != nil {
				return err
			}
		}
	}
	if err := b.time("git clone", func() error {
		return program("git", "clone", "-q", "--no-hardlinks", repo, clone)
	}); err != nil {
		return err
	}
	if err := b.time("git status", func() error { return program("git", "-C", clone, "status", "--short") }); err != nil {
		return err
	}
	return os.RemoveAll(clone)
}

// large works on one file, written anew for each block size.
func (b *bench) large() error {
	path := filepath.Join(b.dir, "large")
	size := b.n(128) << 20
	mb := float64(size) / 1e6
	sizes := []struct {
		name   string
		bytes  int
		random int // accesses of the random workloads
	}{{"4 KiB", 4 << 10, b.n(2000)}, {"128 KiB", 128 << 10, b.n(400)}, {"1 MiB", 1 << 20, b.n(64)}}
	for _, s := range sizes {
		data := block(s.bytes, s.bytes)
		part := size
		if s.bytes < 128<<10 {
			part = size / 4 // its speed shows sooner
		}
		os.Remove(path)
		if err := b.rate("sequential write, "+s.name, "MB/s", float64(part)/1e6, func() error {
			return stream(path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, part, func(fd int) (int, error) { return unix.Write(fd, data) }, true)
		}); err != nil {
			return err
		}
	}
	for _, s := range sizes {
		buf := make([]byte, s.bytes)
		if err := b.dropCaches(); err != nil {
			return err
		}
		for _, state := range []string{"cold", "warm"} {
			if err := b.rate("sequential read, "+s.name+", "+state, "MB/s", mb, func() error {
				return stream(path, unix.O_RDONLY, size, func(fd int) (int, error) { return unix.Read(fd, buf) }, false)
			}); err != nil {
				return err
			}
		}
	}
	for _, s := range sizes {
		data := block(s.bytes, 9)
		offsets := func(seed uint64) func() int64 {
			rng := rand.New(rand.NewPCG(seed, uint64(s.bytes)))
			return func() int64 { return rng.Int64N(int64(size/s.bytes)) * int64(s.bytes) }
		}
		if err := b.dropCaches(); err != nil {
			return err
		}
		at := offsets(1)
		buf := make([]byte, s.bytes)
		if err := b.rate("random read, "+s.name+", cold", "/s", float64(s.random), func() error {
			return random(path, unix.O_RDONLY, s.random, func(fd int) (int, error) { return unix.Pread(fd, buf, at()) }, s.bytes)
		}); err != nil {
			return err
		}
		at = offsets(2)
		if err := b.rate("random write, "+s.name, "/s", float64(s.random), func() error {
			return random(path, unix.O_WRONLY, s.random, func(fd int) (int, error) { return unix.Pwrite(fd, data, at()) }, s.bytes)
		}); err != nil {
			return err
		}
	}
	return os.Remove(path)
}

// stream moves size bytes through a file, and flushes it if asked.
func stream(path string, flags, size int, move func(fd int) (int, error), flush bool) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return fail("open", path, err)
	}
	for done := 0; done < size; {
		n, err := move(fd)
		if err != nil || n == 0 {
			unix.Close(fd)
			return fail(fmt.Sprintf("move bytes at %d of %d", done, size), path, err)
		}
		done += n
	}
	if flush {
		if err := unix.Fsync(fd); err != nil {
			unix.Close(fd)
			return fail("fsync", path, err)
		}
	}
	if err := unix.Close(fd); err != nil {
		return fail("close", path, err)
	}
	return nil
}

// random accesses a file n times, a whole block each.
func random(path string, flags, n int, access func(fd int) (int, error), size int) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail("open", path, err)
	}
	for range n {
		if got, err := access(fd); err != nil || got != size {
			unix.Close(fd)
			return fail(fmt.Sprintf("access (%d bytes)", got), path, err)
		}
	}
	if err := unix.Close(fd); err != nil {
		return fail("close", path, err)
	}
	return nil
}

func (b *bench) sync() error {
	dir := filepath.Join(b.dir, "sync")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	n := b.n(3000) // a few hundred would be over before the disks have settled what was written first
	data := block(8192, 5)
	const span = 16 << 20 // the file that a worker writes into
	for _, w := range []int{1, 4} {
		fds := make([]int, w)
		for k := range fds {
			path := fmt.Sprintf("%s/db-%d", dir, k)
			f, err := os.Create(path)
			if err != nil {
				return err
			}
			defer f.Close()
			for range span >> 20 {
				if _, err := f.Write(block(1<<20, k)); err != nil {
					return err
				}
			}
			if err := f.Sync(); err != nil {
				return err
			}
			fds[k] = int(f.Fd())
		}
		name := "8 KiB write + fdatasync"
		if w > 1 {
			name += fmt.Sprintf(", %d workers", w)
		}
		if err := b.rate(name, "/s", float64(n), func() error {
			return workers(w, n, func(i int) error {
				k := i * w / n
				off := int64(rand.New(rand.NewPCG(uint64(i), 4)).Uint64()%(span/8192)) * 8192
				if _, err := unix.Pwrite(fds[k], data, off); err != nil {
					return fail("pwrite", dir, err)
				}
				if err := unix.Fdatasync(fds[k]); err != nil {
					return fail("fdatasync", dir, err)
				}
				return nil
			})
		}); err != nil {
			return err
		}
	}
	line := block(1024, 6)
	for _, flush := range []bool{false, true} {
		name, times := "append 1 KiB", b.n(4000)
		if flush {
			name, times = "append 1 KiB + fsync", n
		}
		path := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
		fd, err := unix.Open(path, unix.O_CREAT|unix.O_WRONLY|unix.O_APPEND|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return fail("open", path, err)
		}
		err = b.rate(name, "/s", float64(times), func() error {
			for range times {
				if _, err := unix.Write(fd, line); err != nil {
					return fail("write", path, err)
				}
				if flush {
					if err := unix.Fsync(fd); err != nil {
						return fail("fsync", path, err)
					}
				}
			}
			return nil
		})
		unix.Close(fd)
		if err != nil {
			return err
		}
	}
	if _, err := exec.LookPath("sqlite3"); err != nil {
		fmt.Fprintln(os.Stderr, "workload: sqlite3 is not installed, its workload is left out")
		return os.RemoveAll(dir)
	}
	var sql strings.Builder
	sql.WriteString("CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT);\n")
	for i := range b.n(200) {
		fmt.Fprintf(&sql, "BEGIN; INSERT INTO t VALUES (%d, 'value %d'); COMMIT;\n", i, i)
	}
	script := filepath.Join(b.tmp, "transactions.sql")
	if err := os.WriteFile(script, []byte(sql.String()), 0o644); err != nil {
		return err
	}
	if err := b.time("sqlite3, 200 transactions", func() error {
		return program("sqlite3", "-bail", "-init", script, filepath.Join(dir, "db"), ".quit")
	}); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}
