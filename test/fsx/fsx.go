// Package fsx exercises one file with random operations and compares it, step
// by step, with a model in memory: every way to read, write, cut, punch and map
// it, through one mount or through several that must agree.
//
// A run maps the file into memory: the mounts must be those of another process,
// since a Go program that waits for a page from itself waits for ever.
//
// The operations of a run follow from its seed alone. A run that fails is done
// again with ever fewer of them, and says what was left (see Failure).
package fsx

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Options say what to do. Dirs and Ops are needed.
type Options struct {
	// Dirs is one directory, as seen through each of the mounts. A run makes
	// its files in it, and removes them.
	Dirs []string
	// Turns has every step work through any of the mounts; else all steps work
	// through the first. With several mounts, each step is verified through another.
	Turns bool
	Seed  uint64
	Ops   int
	// MaxSize bounds the file; 0: a size that follows from the seed.
	MaxSize int
	// Until, if set, ends the run early.
	Until time.Time
	// Shrink is for how long a failing sequence may be tried to be shortened; 0: not at all.
	Shrink time.Duration

	// after is called when a step was carried out and before it is verified:
	// the package's tests damage the file with it.
	after func(op Op, path string)
}

// Failure is the error of a run that found the file other than it must be.
type Failure struct {
	Seed     uint64
	Step     int    // from 0, in the full sequence
	What     string // is wrong
	Sequence []Op   // that fails, the failing operation last
	Short    bool   // Sequence was shortened, and fails on its own
}

func (f *Failure) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d, step %d: %s\n", f.Seed, f.Step, f.What)
	if f.Short {
		fmt.Fprintf(&b, "these %d operations suffice:\n", len(f.Sequence))
	} else {
		b.WriteString("the last operations were:\n")
	}
	for _, op := range f.Sequence {
		fmt.Fprintf(&b, "  %v\n", op)
	}
	return b.String()
}

// Result counts what a run did.
type Result struct {
	Ops     int            `json:"ops"`
	Kinds   map[string]int `json:"kinds"`
	Skipped map[string]int `json:"skipped,omitempty"` // that the file system does not know
}

// Run carries out a sequence. The error is a *Failure if the file was found wrong.
func Run(o Options) (*Result, error) {
	rng := rand.New(rand.NewPCG(o.Seed, 1))
	if o.MaxSize == 0 {
		// About what a file system treats differently: contents kept with the
		// metadata, small and large writes.
		o.MaxSize = []int{16 << 10, 256 << 10, 256 << 10, 3 << 20}[rng.IntN(4)]
	}
	ops := generate(rng, &o)
	res, fail, err := o.play(ops, o.Until)
	if fail == nil || err != nil {
		return res, err
	}
	ops = ops[:fail.Step+1]
	fail.Sequence = ops[max(0, len(ops)-20):]
	if o.Shrink > 0 {
		if short, what := o.shorten(ops, time.Now().Add(o.Shrink)); short != nil {
			fail.Sequence, fail.Short, fail.What = short, true, what
		}
	}
	return res, fail
}

// play does a sequence on a new file.
func (o *Options) play(ops []Op, until time.Time) (*Result, *Failure, error) {
	r, err := newRun(o)
	if err != nil {
		return nil, nil, err
	}
	defer r.close()
	for i, op := range ops {
		if !until.IsZero() && time.Now().After(until) {
			break
		}
		if err := r.step(op, i); err != nil {
			var w *wrong
			if errors.As(err, &w) {
				return r.res, &Failure{Seed: o.Seed, Step: i, What: w.Error()}, nil
			}
			return r.res, nil, fmt.Errorf("fsx: seed %d, step %d, %v: %w", o.Seed, i, op, err)
		}
		r.res.Ops++
	}
	return r.res, nil, nil
}

// shorten leaves out ever smaller parts of a failing sequence, as long as it
// still fails. It returns nil if the whole does not fail again.
func (o *Options) shorten(ops []Op, limit time.Time) ([]Op, string) {
	fails := func(ops []Op) (int, string) {
		_, f, err := o.play(ops, limit)
		if f == nil || err != nil {
			return -1, ""
		}
		return f.Step, f.What
	}
	at, what := fails(ops)
	if at < 0 {
		return nil, ""
	}
	ops = ops[:at+1]
	for part := len(ops) / 2; part > 0 && time.Now().Before(limit); {
		smaller := false
		for from := 0; from < len(ops) && time.Now().Before(limit); {
			rest := append(append([]Op(nil), ops[:from]...), ops[min(from+part, len(ops)):]...)
			if at, w := fails(rest); at >= 0 {
				ops, what, smaller = rest[:at+1], w, true
				continue
			}
			from += part
		}
		if !smaller || part > len(ops) {
			part /= 2
		}
	}
	return ops, what
}

// files of a run: the one that is worked on and one to copy from and to.
func (o *Options) paths(name string) []string {
	var out []string
	for _, d := range o.Dirs {
		out = append(out, filepath.Join(d, fmt.Sprintf("fsx-%d-%d-%s", os.Getpid(), o.Seed, name)))
	}
	return out
}
