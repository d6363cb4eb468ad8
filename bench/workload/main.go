// Workload runs file system workloads in a directory, of any file system, and
// says how fast they were: small files, a WordPress tree, a PHP-like request
// loop, large files, and flushed writes.
//
//	workload -dir /mnt/wp [-only small,tree] [-rounds 5] [-cold 'remount command'] [-json]
//
// What is measured is the time of system calls; programs are run only where the
// program is the workload (tar, git, sqlite3). Every figure says what it counts,
// and the median, least and greatest of the rounds.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"mortar/bench/figure"
	"mortar/test/tree"
)

// bench is one run.
type bench struct {
	dir     string // of this round, on the file system under test
	tmp     string // elsewhere
	tree    string // WordPress's
	archive string // tree as a tar file
	cold    string // command that empties caches, besides the kernel's
	cpu     bool
	scale   float64
	only    *regexp.Regexp
	figures []*figure.Figure
}

// n scales a number of operations.
func (b *bench) n(n int) int { return max(1, int(float64(n)*b.scale)) }

func main() {
	runtime.GOMAXPROCS(max(4, runtime.NumCPU())) // workers block in the kernel
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "workload:", err)
		os.Exit(1)
	}
}

func run() error {
	b := &bench{}
	var only string
	var rounds int
	var asJSON, list bool
	flag.StringVar(&b.dir, "dir", "", "directory to work in; a sub-directory is made and removed")
	flag.StringVar(&b.tree, "tree", "", "WordPress tree (default: the installed one, else one of its shape is made)")
	flag.StringVar(&b.cold, "cold", "", "shell command that empties the file system's own caches, a remount say; the kernel's are dropped as well")
	flag.StringVar(&only, "only", "", "comma-separated groups to run: "+groupNames())
	flag.IntVar(&rounds, "rounds", 1, "how often to run everything")
	flag.Float64Var(&b.scale, "scale", 1, "multiplies the numbers of files and operations")
	flag.BoolVar(&b.cpu, "cpu", false, "also measure the processor time of the whole machine")
	flag.BoolVar(&asJSON, "json", false, "print JSON")
	flag.BoolVar(&list, "list", false, "list the groups and what they measure")
	flag.Parse()
	if list {
		for _, g := range groups {
			fmt.Printf("%-8s %s\n", g.name, g.about)
		}
		return nil
	}
	switch {
	case flag.NArg() > 0:
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	case b.dir == "":
		return errors.New("-dir is missing: the directory to work in")
	case rounds < 1 || b.scale <= 0:
		return errors.New("-rounds and -scale must be more than 0")
	}
	chosen := groups
	if only != "" {
		chosen = nil
		for _, name := range strings.Split(only, ",") {
			i := slices.IndexFunc(groups, func(g group) bool { return g.name == name })
			if i < 0 {
				return fmt.Errorf("no group %q, there are: %s", name, groupNames())
			}
			chosen = append(chosen, groups[i])
		}
	}
	var err error
	if b.tmp, err = os.MkdirTemp("", "workload-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.tmp)
	if err := b.makeArchive(); err != nil {
		return err
	}
	top := b.dir
	for i := range rounds {
		b.dir = filepath.Join(top, fmt.Sprintf("workload-%d-%d", os.Getpid(), i))
		if err := os.Mkdir(b.dir, 0o755); err != nil {
			return err
		}
		for _, g := range chosen {
			if err := g.run(b); err != nil {
				return fmt.Errorf("%s: %w", g.name, err)
			}
		}
		if err := os.RemoveAll(b.dir); err != nil {
			return err
		}
	}
	for _, f := range b.figures {
		f.Median = figure.Median(f.Rounds)
		f.CPU = figure.Median(f.CPURounds)
	}
	if asJSON {
		out := json.NewEncoder(os.Stdout)
		out.SetIndent("", " ")
		return out.Encode(b.figures)
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, f := range b.figures {
		fmt.Fprintf(w, "%s\t%s\t%s\t(%s to %s)\t", f.Name, figure.Number(f.Median), f.Unit, figure.Number(slices.Min(f.Rounds)), figure.Number(slices.Max(f.Rounds)))
		if b.cpu {
			fmt.Fprintf(w, "%s ms CPU\t", figure.Number(f.CPU))
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}

func groupNames() string {
	var names []string
	for _, g := range groups {
		names = append(names, g.name)
	}
	return strings.Join(names, ",")
}

// makeArchive packs the tree, made up if need be, outside of what is measured.
func (b *bench) makeArchive() error {
	if b.tree == "" {
		b.tree = tree.WordPress()
	}
	if b.tree == "" {
		fmt.Fprintln(os.Stderr, "workload: no WordPress here, a tree of its shape is made up")
		b.tree = filepath.Join(b.tmp, "tree")
		if err := tree.Make(b.tree, 1); err != nil {
			return err
		}
	}
	b.archive = filepath.Join(b.tmp, "tree.tar")
	f, err := os.Create(b.archive)
	if err != nil {
		return err
	}
	return errors.Join(tree.Tar(f, b.tree), f.Close())
}

// time measures how long f takes.
func (b *bench) time(name string, f func() error) error { return b.rate(name, "s", 1, f) }

// rate measures f, which does amount of something, in units per second.
func (b *bench) rate(name, unit string, amount float64, f func() error) error {
	busy := busyTime()
	begin := time.Now()
	if err := f(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	took := time.Since(begin).Seconds()
	i := slices.IndexFunc(b.figures, func(f *figure.Figure) bool { return f.Name == name })
	if i < 0 {
		i = len(b.figures)
		b.figures = append(b.figures, &figure.Figure{Name: name, Unit: unit})
	}
	fig := b.figures[i]
	value := amount / took
	if unit == "s" {
		value = took
	}
	fig.Rounds = append(fig.Rounds, value)
	if b.cpu {
		fig.CPURounds = append(fig.CPURounds, float64((busyTime()-busy).Microseconds())/1000/amount)
	}
	return nil
}

// busyTime is the processor time that the machine has spent since it booted
// (proc(5), /proc/stat), the kernel's own threads included.
func busyTime() time.Duration {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	f := strings.Fields(strings.SplitN(string(b), "\n", 2)[0])
	var ticks int64
	for _, i := range []int{1, 2, 3, 6, 7} { // user nice system irq softirq
		if i < len(f) {
			n, _ := strconv.ParseInt(f[i], 10, 64)
			ticks += n
		}
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// dropCaches makes the next reads cold: everything is written out, the kernel
// drops its caches, and the file system is asked to drop its own.
func (b *bench) dropCaches() error {
	if err := exec.Command("sync").Run(); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	if b.cold != "" {
		if out, err := exec.Command("sh", "-c", b.cold).CombinedOutput(); err != nil {
			return fmt.Errorf("-cold command: %w: %s", err, out)
		}
	}
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return fmt.Errorf("cold reads need root: %w", err)
	}
	return nil
}

// program runs a program that is itself the workload.
func program(argv ...string) error {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, out)
	}
	return nil
}
