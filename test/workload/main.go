// Workload does to a mounted volume what the end-to-end tests need done by a
// process of its own: because it must be killed with a host, because it may
// hang, or because it reaches into the mounts of several hosts at once.
//
//	workload record    write and read for as long as told, log what was acknowledged
//	workload verify    compare a directory with the log of record
//	workload manifest  print every object of a tree to the last bit
//	workload coherence change on one mount, look on another, at once
//	workload counter   increment a number in a file under a lock
//	workload append    append records to a shared file; with -check, judge it
//	workload race      create, rename and remove in a shared directory
//	workload ring      create at once what every other mount has cached as absent
//	workload files     make many small files
//	workload large     make, list or remove the entries of a large directory
//	workload fill      write until the disk is full
//	workload stress    do everything to names in shared directories
//	workload history   judge what clients on several mounts are told
//	workload hold      hold files, locks and maps while the mount changes its process
//	workload grip      hold a lock, and write to what it guards
//	workload fsx       compare a file with a model, operation by operation
//
// Each prints one JSON object on standard output (manifest: lines) and exits
// with 1 if it found something wrong, with 2 if it could not do its work.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"mortar/test/tree"
)

// verdict is what a command prints.
type verdict interface {
	// wrong says in words what is not as it must be; nil if all is.
	wrong() []string
}

var commands = map[string]func(fs *flag.FlagSet, args []string) (verdict, error){
	"record":    record,
	"verify":    verify,
	"manifest":  manifest,
	"coherence": coherence,
	"counter":   counter,
	"append":    appendRecords,
	"race":      race,
	"ring":      ring,
	"files":     files,
	"fill":      fill,
	"fsx":       exercise,
	"grip":      grip,
	"history":   history,
	"hold":      hold,
	"large":     large,
	"stress":    stress,
}

func main() {
	runtime.GOMAXPROCS(8) // threads block in the kernel, and must not keep each other waiting
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: workload record|verify|manifest|coherence|counter|append|race|ring|files|large|fill|fsx|stress|history|hold|grip [flags]")
		os.Exit(2)
	}
	v, err := commands[os.Args[1]](flag.NewFlagSet("workload "+os.Args[1], flag.ExitOnError), os.Args[2:])
	if err != nil {
		fmt.Fprintf(os.Stderr, "workload %s: %v\n", os.Args[1], err)
		os.Exit(2)
	}
	if v == nil {
		return
	}
	out := json.NewEncoder(os.Stdout)
	out.SetIndent("", " ")
	out.Encode(v)
	if w := v.wrong(); len(w) > 0 {
		fmt.Fprintf(os.Stderr, "workload %s: %s\n", os.Args[1], strings.Join(w, "\n"))
		os.Exit(1)
	}
}

// stopped is closed when the process is asked to finish (SIGTERM).
func stopped() <-chan os.Signal {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM)
	return c
}

func manifest(fs *flag.FlagSet, args []string) (verdict, error) {
	fs.Parse(args)
	lines, err := tree.Manifest(fs.Arg(0))
	for _, l := range lines {
		fmt.Println(l)
	}
	return nil, err
}
