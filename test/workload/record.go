package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A step is one change that record makes. It stands in the log twice: before
// it is tried, and again once the system calls that make it have returned. A
// step that was begun and not acknowledged may or may not have happened.
type step struct {
	Ack  bool   `json:"ack,omitempty"`
	Op   string `json:"op"` // create, overwrite, replace, extend, remove, mkdir
	Path string `json:"path"`
	// Seed makes the contents, of Size bytes at Off.
	Seed uint64 `json:"seed,omitempty"`
	Size int    `json:"size,omitempty"`
	Off  int64  `json:"off,omitempty"`
}

// contents are size bytes that only this seed makes.
func contents(seed uint64, size int) []byte {
	b := make([]byte, (size+7)&^7)
	x := seed
	for i := 0; i < len(b); i += 8 {
		// splitmix64, so that every block of every step is unlike any other
		x += 0x9e3779b97f4a7c15
		z := x
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		binary.LittleEndian.PutUint64(b[i:], z^z>>31)
	}
	return b[:size]
}

// histogram counts how long operations of one kind took.
type histogram struct {
	Count   int     `json:"count"`
	P50     float64 `json:"p50_ms"`
	P99     float64 `json:"p99_ms"`
	Max     float64 `json:"max_ms"`
	MaxFrom string  `json:"max_from"` // when the longest began

	times []time.Duration
	slow  []slow // those that took long
}

// slow is an operation that took long.
type slow struct {
	index int // in times
	begin time.Time
}

// slowFrom is from when on it matters when an operation began.
const slowFrom = 50 * time.Millisecond

func (h *histogram) add(begin time.Time, took time.Duration) {
	if took >= slowFrom {
		h.slow = append(h.slow, slow{len(h.times), begin})
	}
	h.times = append(h.times, took)
}

// recorder is the state of one record run.
type recorder struct {
	dir   string
	flush bool

	mu     sync.Mutex // guards what follows
	log    *bufio.Writer
	kinds  map[string]*histogram
	errors []string
	nerr   int
	files  []*file // made by create, what readers look at

	stop atomic.Bool
}

// file is what a reader compares with. Its lock is held while it changes.
type file struct {
	mu   sync.Mutex
	path string
	data []byte
	gone bool
}

// Recording is the outcome of record.
type Recording struct {
	Seconds float64               `json:"seconds"`
	Kinds   map[string]*histogram `json:"kinds"`
	Errors  []string              `json:"errors"` // the first of them
	NErrors int                   `json:"n_errors"`
	Worst   float64               `json:"worst_ms"`   // the longest of all operations
	Stalled float64               `json:"stalled_ms"` // of the machine itself; taken off the operations' times
}

func (r *Recording) wrong() []string {
	var w []string
	if r.NErrors > 0 {
		w = append(w, fmt.Sprintf("%d operations failed, first: %s", r.NErrors, strings.Join(r.Errors, "; ")))
	}
	return w
}

// record works in a directory until the time is over or SIGTERM comes, and logs.
func record(fs *flag.FlagSet, args []string) (verdict, error) {
	dir := fs.String("dir", "", "directory to make and to work in")
	logName := fs.String("log", "", "log file, on another file system")
	duration := fs.Duration("duration", time.Hour, "how long at most")
	writers := fs.Int("writers", 2, "number of writers, each in a directory of its own")
	readers := fs.Int("readers", 1, "number of readers of what the writers left")
	flush := fs.Bool("fsync", false, "flush every file and its directory before it counts as acknowledged")
	pace := fs.Duration("pace", time.Millisecond, "rest of a worker between operations")
	fs.Parse(args)
	if *dir == "" || *logName == "" {
		return nil, errors.New("-dir and -log are needed")
	}
	if err := os.Mkdir(*dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(*logName, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r := &recorder{dir: *dir, flush: *flush, log: bufio.NewWriter(f), kinds: map[string]*histogram{}}
	end := stopped()
	begin := time.Now()
	fmt.Fprintln(os.Stderr, "recording")
	var machine stalls
	ctx, unwatch := context.WithCancel(context.Background())
	var watch sync.WaitGroup
	watch.Go(func() { machine.watch(ctx) })
	defer watch.Wait()
	defer unwatch()
	var wg sync.WaitGroup
	for i := range *writers {
		wg.Go(func() { r.write(i, *pace) })
	}
	for i := range *readers {
		wg.Go(func() { r.read(i, *pace) })
	}
	select {
	case <-end:
	case <-time.After(*duration):
	}
	r.stop.Store(true)
	wg.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.log.Flush(); err != nil {
		return nil, err
	}
	out := &Recording{Seconds: time.Since(begin).Seconds(), Kinds: r.kinds, Errors: r.errors, NErrors: r.nerr,
		Stalled: float64(machine.during(begin, time.Now()).Microseconds()) / 1000}
	for _, h := range r.kinds {
		h.finish(&machine)
		out.Worst = max(out.Worst, h.Max)
	}
	return out, nil
}

// finish computes what is shown, without the machine's own stalls.
func (h *histogram) finish(machine *stalls) {
	var longest time.Duration
	var worst time.Time
	for _, s := range h.slow {
		took := &h.times[s.index]
		*took -= machine.during(s.begin, s.begin.Add(*took))
		if *took >= longest {
			longest, worst = *took, s.begin
		}
	}
	sort.Slice(h.times, func(i, j int) bool { return h.times[i] < h.times[j] })
	h.Count = len(h.times)
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	h.P50, h.P99, h.Max = ms(h.times[h.Count/2]), ms(h.times[h.Count*99/100]), ms(h.times[h.Count-1])
	if !worst.IsZero() {
		h.MaxFrom = worst.Format("15:04:05.000")
	}
}

// do times one operation.
func (r *recorder) do(kind string, f func() error) error {
	begin := time.Now()
	err := f()
	took := time.Since(begin)
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.kinds[kind]
	if h == nil {
		h = &histogram{}
		r.kinds[kind] = h
	}
	h.add(begin, took)
	if err != nil {
		r.nerr++
		if len(r.errors) < 10 {
			r.errors = append(r.errors, begin.Format("15:04:05.000 ")+kind+": "+err.Error())
		}
	}
	return err
}

// note writes a step to the log, in full, before the next thing happens.
func (r *recorder) note(s step) {
	b, _ := json.Marshal(s)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log.Write(append(b, '\n'))
	r.log.Flush()
}

// change makes a step: logs it, does it, and logs that it was done.
func (r *recorder) change(s step, f func(path string) error) bool {
	r.note(s)
	if r.do(s.Op, func() error { return f(filepath.Join(r.dir, s.Path)) }) != nil {
		return false
	}
	s.Ack = true
	r.note(s)
	return true
}

// write makes changes in a directory of the worker's own.
func (r *recorder) write(worker int, pace time.Duration) {
	rng := rand.New(rand.NewPCG(uint64(worker), 5))
	base := fmt.Sprintf("w%d", worker)
	if !r.change(step{Op: "mkdir", Path: base}, func(p string) error { return unix.Mkdir(p, 0o755) }) {
		return
	}
	// One file that only grows, and one whose blocks are overwritten.
	grow, over := &file{path: base + "/grow"}, &file{path: base + "/blocks"}
	const block, blocks = 4096, 64
	for _, f := range []*file{grow, over} {
		size := 0
		if f == over {
			size = block * blocks
		}
		f.data = contents(rng.Uint64(), 0)
		s := step{Op: "create", Path: f.path, Seed: rng.Uint64(), Size: size}
		if !r.change(s, func(p string) error { return r.put(p, unix.O_CREAT|unix.O_EXCL, contents(s.Seed, size)) }) {
			return
		}
		f.data = contents(s.Seed, size)
	}
	r.mu.Lock()
	r.files = append(r.files, grow, over)
	r.mu.Unlock()
	var own []*file
	for n := 0; !r.stop.Load(); n++ {
		s := step{Seed: rng.Uint64(), Size: 4096}
		switch k := rng.IntN(10); {
		case k < 4 || len(own) == 0: // a new file
			s.Op, s.Path = "create", fmt.Sprintf("%s/f%d", base, n)
			f := &file{path: s.Path, data: contents(s.Seed, s.Size)}
			if r.change(s, func(p string) error { return r.put(p, unix.O_CREAT|unix.O_EXCL, f.data) }) {
				own = append(own, f)
				r.mu.Lock()
				r.files = append(r.files, f)
				r.mu.Unlock()
			}
		case k < 6: // a file replaced by rename
			f := own[rng.IntN(len(own))]
			f.mu.Lock()
			s.Op, s.Path = "replace", f.path
			data := contents(s.Seed, s.Size)
			if r.change(s, func(p string) error {
				tmp := filepath.Join(filepath.Dir(p), "tmp")
				if err := r.put(tmp, unix.O_CREAT|unix.O_TRUNC, data); err != nil {
					return err
				}
				if err := unix.Rename(tmp, p); err != nil {
					return &os.LinkError{Op: "rename", Old: tmp, New: p, Err: err}
				}
				return r.flushDir(p)
			}) {
				f.data = data
			}
			f.mu.Unlock()
		case k < 7: // a block overwritten in place
			over.mu.Lock()
			s.Op, s.Path, s.Off = "overwrite", over.path, rng.Int64N(blocks)*block
			if r.change(s, func(p string) error { return r.at(p, unix.O_WRONLY, contents(s.Seed, s.Size), s.Off) }) {
				copy(over.data[s.Off:], contents(s.Seed, s.Size))
			}
			over.mu.Unlock()
		case k < 8: // a record appended
			grow.mu.Lock()
			s.Op, s.Path, s.Size, s.Off = "extend", grow.path, 200, int64(len(grow.data))
			if r.change(s, func(p string) error { return r.at(p, unix.O_WRONLY|unix.O_APPEND, contents(s.Seed, s.Size), -1) }) {
				grow.data = append(grow.data, contents(s.Seed, s.Size)...)
			}
			grow.mu.Unlock()
		default: // a file removed
			i := rng.IntN(len(own))
			f := own[i]
			f.mu.Lock()
			s = step{Op: "remove", Path: f.path}
			if r.change(s, func(p string) error {
				if err := unix.Unlink(p); err != nil {
					return &fs.PathError{Op: "unlink", Path: p, Err: err}
				}
				return r.flushDir(p)
			}) {
				f.gone = true
				own[i] = own[len(own)-1]
				own = own[:len(own)-1]
			}
			f.mu.Unlock()
		}
		time.Sleep(pace)
	}
}

// read looks at files as the writers left them.
func (r *recorder) read(seed int, pace time.Duration) {
	rng := rand.New(rand.NewPCG(uint64(seed), 6))
	for !r.stop.Load() {
		time.Sleep(pace)
		r.mu.Lock()
		var f *file
		if len(r.files) > 0 {
			i := rng.IntN(len(r.files))
			f = r.files[i]
			if f.gone {
				r.files[i] = r.files[len(r.files)-1]
				r.files = r.files[:len(r.files)-1]
			}
		}
		r.mu.Unlock()
		if f == nil || !f.mu.TryLock() {
			continue
		}
		path := filepath.Join(r.dir, f.path)
		switch {
		case f.gone:
			r.do("stat of a removed file", func() error {
				var st unix.Stat_t
				if err := unix.Stat(path, &st); err != unix.ENOENT {
					return fmt.Errorf("%s was removed, stat says %v", path, err)
				}
				return nil
			})
		default:
			r.do("read", func() error {
				got, err := os.ReadFile(path)
				if err == nil && !bytes.Equal(got, f.data) {
					err = fmt.Errorf("%s: wrong contents: %s", path, difference(f.data, got))
				}
				return err
			})
			r.do("stat", func() error {
				var st unix.Stat_t
				err := unix.Stat(path, &st)
				if err == nil && st.Size != int64(len(f.data)) {
					err = fmt.Errorf("size %d, want %d", st.Size, len(f.data))
				}
				if err != nil {
					return &fs.PathError{Op: "stat", Path: path, Err: err}
				}
				return nil
			})
		}
		f.mu.Unlock()
	}
}

func difference(want, got []byte) string {
	if len(want) != len(got) {
		return fmt.Sprintf("%d bytes, want %d", len(got), len(want))
	}
	for i := range want {
		if want[i] != got[i] {
			return fmt.Sprintf("differs at %d", i)
		}
	}
	return "equal"
}

func (r *recorder) put(path string, flags int, data []byte) error {
	if err := r.at(path, flags|unix.O_WRONLY, data, -1); err != nil {
		return err
	}
	if flags&unix.O_EXCL != 0 {
		return r.flushDir(path)
	}
	return nil
}

// at writes data to a file, at an offset or (−1) where the file says, and closes it.
func (r *recorder) at(path string, flags int, data []byte, off int64) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	for len(data) > 0 && err == nil {
		var n int
		if off < 0 {
			n, err = unix.Write(fd, data)
		} else {
			n, err = unix.Pwrite(fd, data, off)
			off += int64(n)
		}
		data = data[max(n, 0):]
	}
	if err == nil && r.flush {
		err = unix.Fsync(fd)
	}
	if err2 := unix.Close(fd); err == nil {
		err = err2
	}
	if err != nil {
		return &fs.PathError{Op: "write", Path: path, Err: err}
	}
	return nil
}

// flushDir makes a name durable, if that is asked for.
func (r *recorder) flushDir(path string) error {
	if !r.flush {
		return nil
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Verification is the outcome of verify.
type Verification struct {
	Files     int      `json:"files"`
	Steps     int      `json:"steps"`     // acknowledged
	Uncertain int      `json:"uncertain"` // begun and never acknowledged
	Faults    []string `json:"faults"`
}

func (v *Verification) wrong() []string { return v.Faults }

// states are the contents that a path may have; nil stands for "not there".
type states [][]byte

// verify replays a log and compares what it finds with what must be.
func verify(fs *flag.FlagSet, args []string) (verdict, error) {
	dir := fs.String("dir", "", "directory that record worked in")
	logName := fs.String("log", "", "its log")
	fs.Parse(args)
	f, err := os.Open(*logName)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	v := &Verification{}
	expect := map[string]states{}
	dirs := map[string]bool{}
	apply := func(s step, old []byte) []byte {
		switch s.Op {
		case "remove":
			return nil
		case "create", "replace":
			return contents(s.Seed, s.Size)
		}
		data := bytes.Clone(old)
		if need := int(s.Off) + s.Size; need > len(data) {
			data = append(data, make([]byte, need-len(data))...)
		}
		copy(data[s.Off:], contents(s.Seed, s.Size))
		return data
	}
	in := bufio.NewScanner(f)
	for in.Scan() {
		var s step
		if err := json.Unmarshal(in.Bytes(), &s); err != nil {
			break // the last line of a writer that was killed
		}
		if s.Op == "mkdir" {
			dirs[s.Path] = dirs[s.Path] || s.Ack
			continue
		}
		old, known := expect[s.Path]
		if !known {
			old = states{nil}
		}
		if s.Ack {
			v.Steps++
			v.Uncertain--
			expect[s.Path] = old[len(old)-1:] // the state that the beginning of the step added
			continue
		}
		v.Uncertain++
		next := append(states{}, old...)
		if s.Op == "create" {
			next = append(next, []byte{}) // made, and not yet written
		}
		expect[s.Path] = append(next, apply(s, old[len(old)-1]))
	}
	for d, acked := range dirs {
		entries, err := os.ReadDir(filepath.Join(*dir, d))
		if err != nil {
			if acked {
				v.Faults = append(v.Faults, err.Error())
			}
			continue
		}
		for _, e := range entries {
			path := filepath.Join(d, e.Name())
			if _, known := expect[path]; !known && e.Name() != "tmp" {
				v.Faults = append(v.Faults, path+" is there, nobody made it")
			}
		}
	}
	for path, want := range expect {
		got, err := os.ReadFile(filepath.Join(*dir, path))
		there := err == nil
		if err != nil && !errors.Is(err, unix.ENOENT) {
			v.Faults = append(v.Faults, err.Error())
			continue
		}
		ok := false
		for _, w := range want {
			ok = ok || (w != nil) == there && bytes.Equal(w, got)
		}
		if there {
			v.Files++
		}
		if !ok {
			last := want[len(want)-1]
			switch {
			case !there:
				v.Faults = append(v.Faults, path+" is missing")
			case last == nil:
				v.Faults = append(v.Faults, path+" was removed and is there")
			default:
				v.Faults = append(v.Faults, path+" has wrong contents: "+difference(last, got))
			}
		}
	}
	sort.Strings(v.Faults)
	if len(v.Faults) > 20 {
		v.Faults = append(v.Faults[:20], fmt.Sprintf("... %d in all", len(v.Faults)))
	}
	return v, in.Err()
}
