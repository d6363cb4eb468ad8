package mount

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/pprof"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mortar/internal/fsop/memfs"
)

// Benchmarks run their system calls in a process of their own: this one is the
// server.
const workloadEnv = "MORTAR_MOUNT_WORKLOAD"

// workloads are loops of system calls on files f0, f1, … of a directory.
var workloads = []struct {
	name string
	make bool // the files exist before
	warm bool // and were read once
	op   func(p string, buf []byte) error
}{
	{"stat cached", true, true, func(p string, _ []byte) error { var st unix.Stat_t; return unix.Stat(p, &st) }},
	{"stat first", true, false, func(p string, _ []byte) error { var st unix.Stat_t; return unix.Stat(p, &st) }},
	{"stat absent first", false, false, func(p string, _ []byte) error {
		var st unix.Stat_t
		if err := unix.Stat(p, &st); err != unix.ENOENT {
			return fmt.Errorf("stat: %v", err)
		}
		return nil
	}},
	{"open read close cached", true, true, readWorkload},
	{"open read close first", true, false, readWorkload},
	{"create write close", false, false, createWorkload(unix.O_CREAT | unix.O_EXCL | unix.O_WRONLY)},
	{"rewrite", true, true, createWorkload(unix.O_TRUNC | unix.O_WRONLY)},
	{"append", true, true, createWorkload(unix.O_APPEND | unix.O_WRONLY)},
	{"unlink", true, true, func(p string, _ []byte) error { return unix.Unlink(p) }},
}

func readWorkload(p string, buf []byte) error {
	fd, err := unix.Open(p, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	if n, err := unix.Read(fd, buf); n != len(buf) {
		return fmt.Errorf("read %d: %v", n, err)
	}
	return unix.Close(fd)
}

func createWorkload(flags int) func(string, []byte) error {
	return func(p string, buf []byte) error {
		fd, err := unix.Open(p, flags, 0o644)
		if err != nil {
			return err
		}
		if n, err := unix.Write(fd, buf); n != len(buf) {
			return fmt.Errorf("write %d: %v", n, err)
		}
		return unix.Close(fd)
	}
}

// runWorkload is the other process: DIR N NUMBER.
func runWorkload(arg string) error {
	f := strings.Fields(arg)
	n, _ := strconv.Atoi(f[1])
	which, _ := strconv.Atoi(f[2])
	w := workloads[which]
	buf := make([]byte, 4096)
	paths := make([]string, n)
	for i := range paths {
		paths[i] = filepath.Join(f[0], fmt.Sprint("f", i))
		if w.warm {
			if err := readWorkload(paths[i], buf); err != nil {
				return err
			}
			var st unix.Stat_t
			unix.Stat(paths[i], &st)
		}
	}
	began := time.Now()
	for _, p := range paths {
		if err := w.op(p, buf); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	fmt.Println(time.Since(began).Nanoseconds() / int64(n))
	return nil
}

// BenchmarkMount measures one system call sequence on an in-memory file system.
// MORTAR_MOUNT_PROFILE=FILE writes a CPU profile of the serving process.
func BenchmarkMount(b *testing.B) {
	for _, kind := range kinds[:2] {
		for i, w := range workloads {
			b.Run(kind.name+"/"+w.name, func(b *testing.B) {
				mem := memfs.New()
				m := newMount(b, mem, kind.o)
				const n = 4000
				var total int64
				for range b.N {
					dir, err := os.MkdirTemp(m.dir, "b")
					if err != nil {
						b.Fatal(err)
					}
					if w.make {
						for k := range n {
							if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("f", k)), make([]byte, 4096), 0o644); err != nil {
								b.Fatal(err)
							}
						}
						if err := m.DropAll(b.Context()); err != nil {
							b.Fatal(err)
						}
					}
					if p := os.Getenv("MORTAR_MOUNT_PROFILE"); p != "" {
						f, err := os.Create(p)
						if err != nil {
							b.Fatal(err)
						}
						pprof.StartCPUProfile(f)
					}
					cmd := exec.Command("/proc/self/exe")
					cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %d", workloadEnv, dir, n, i))
					cmd.Stderr = os.Stderr
					out, err := cmd.Output()
					pprof.StopCPUProfile()
					if err != nil {
						b.Fatalf("%v: %s", err, out)
					}
					ns, err := strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
					if err != nil {
						b.Fatal(err)
					}
					total += ns
				}
				b.ReportMetric(float64(total)/float64(b.N)/1000, "µs/op")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}
