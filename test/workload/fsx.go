package main

import (
	"errors"
	"flag"
	"time"

	"mortar/test/fsx"
)

// Exercise is the outcome of fsx.
type Exercise struct {
	Seeds   int            `json:"seeds"`
	Ops     int            `json:"ops"`
	Kinds   map[string]int `json:"kinds"`
	Skipped map[string]int `json:"skipped,omitempty"`
	Faults  []string       `json:"faults"`
}

func (e *Exercise) wrong() []string { return e.Faults }

// exercise does runs of package fsx, in the directories that are its arguments:
// the same one, as several mounts show it.
func exercise(fs *flag.FlagSet, args []string) (verdict, error) {
	seed := fs.Uint64("seed", 1, "the first one")
	seeds := fs.Int("seeds", 1, "how many, however long that takes")
	ops := fs.Int("ops", 1000, "operations of each seed")
	duration := fs.Duration("duration", 0, "go on with further seeds until then")
	turns := fs.Bool("turns", false, "work through all mounts in turn")
	shrink := fs.Duration("shrink", 20*time.Second, "for how long to shorten a sequence that fails")
	fs.Parse(args)
	e := &Exercise{Kinds: map[string]int{}, Skipped: map[string]int{}}
	o := fsx.Options{Dirs: fs.Args(), Turns: *turns, Ops: *ops, Shrink: *shrink}
	until := time.Now().Add(*duration)
	for i := 0; i < *seeds || time.Now().Before(until); i++ {
		if i >= *seeds {
			o.Until = until
		}
		o.Seed = *seed + uint64(i)
		r, err := fsx.Run(o)
		if r != nil {
			e.Seeds++
			e.Ops += r.Ops
			for k, n := range r.Kinds {
				e.Kinds[k] += n
			}
			for k, n := range r.Skipped {
				e.Skipped[k] += n
			}
		}
		var f *fsx.Failure
		if errors.As(err, &f) {
			e.Faults = append(e.Faults, f.Error())
			break
		}
		if err != nil {
			return nil, err
		}
	}
	return e, nil
}
