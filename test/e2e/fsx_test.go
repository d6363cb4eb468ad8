package e2e

import (
	"fmt"
	"testing"
	"time"
)

// One file under random operations of every kind is at each step what a model
// in memory says (package fsx): through one mount, written on one and seen on
// another, and from all in turn.
func TestFsx(t *testing.T) {
	p := start(t, setup{})
	p.run(1, "mkdir", "/mnt/wp/fsx")
	for i, c := range []struct {
		name  string
		dirs  []string
		flags []string
	}{
		{"one mount", p.mountsOf("/mnt/wp/fsx")[:1], nil},
		{"written on one, seen on another", p.mountsOf("/mnt/wp/fsx"), nil},
		{"from all in turn", p.mountsOf("/mnt/wp/fsx"), []string{"-turns"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p.as(t)
			// One seed is done whole, however slow the machine is; a fast one has time for more. Of
			// many, some run beside each other: what one does is mostly to wait.
			ops, seeds, abreast := pick(500, 100_000), pick(1, 5), pick(1, 4)
			var waits []func(any) error
			for k := range abreast {
				args := []string{"fsx", "-ops", fmt.Sprint(ops), "-seeds", fmt.Sprint(seeds), "-seed", fmt.Sprint(1 + 100*i + k*seeds)}
				if !long {
					args = append(args, "-duration", "3s")
				}
				waits = append(waits, p.startWorkload(0, pick(4*time.Minute, 3*time.Hour), append(append(args, c.flags...), c.dirs...)...))
			}
			for _, wait := range waits {
				var r struct {
					Seeds, Ops     int
					Kinds, Skipped map[string]int
				}
				if err := wait(&r); err != nil {
					t.Fatal(err)
				}
				t.Logf("%d operations, %d seeds: %v", r.Ops, r.Seeds, r.Kinds)
				if r.Ops < ops*seeds || len(r.Skipped) > 0 {
					t.Errorf("%d operations, not known: %v", r.Ops, r.Skipped)
				}
			}
			p.identical(1)
		})
	}
}
