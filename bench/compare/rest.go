package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// What counts as rest: what a machine does by itself. One that is busy with anything else measures that too.
const (
	restDirty = 8 << 20 // bytes that wait to be written
	restIO    = 1 << 20 // bytes read and written in a second, all disks
	restBusy  = 0.05    // of the machine's processor time
)

// rest waits until the machine has been at rest for a second, before anything is measured, whatever it is: what one
// product left to be written, freed or compacted, and what another does when it starts, is not to be the next figure.
// It says what was still being done if that does not end.
func rest(ctx context.Context, most time.Duration) error {
	was, err := loadNow()
	if err != nil {
		return err
	}
	for begin := time.Now(); ; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
		is, err := loadNow()
		if err != nil {
			return err
		}
		why := is.since(was)
		if why == "" {
			return nil
		}
		if time.Since(begin) > most {
			fmt.Fprintf(os.Stderr, "after %v the machine is not at rest: %s\n", most, why)
			return nil
		}
		was = is
	}
}

// load is what the machine has done since it booted, and has yet to do.
type load struct {
	at           time.Time
	dirty, moved int64 // bytes: to be written, read and written so far
	flying       int64 // reads and writes under way
	busy         time.Duration
}

// since says why the machine was not at rest between two looks, or nothing.
func (l load) since(was load) string {
	took := l.at.Sub(was.at).Seconds()
	var why []string
	if l.dirty > restDirty {
		why = append(why, fmt.Sprintf("%d MB wait to be written", l.dirty/1e6))
	}
	if moved := float64(l.moved-was.moved) / took; l.flying > 0 || moved > restIO {
		why = append(why, fmt.Sprintf("the disks move %.1f MB/s, %d requests are under way", moved/1e6, l.flying))
	}
	if busy := (l.busy - was.busy).Seconds() / took / float64(runtime.NumCPU()); busy > restBusy {
		why = append(why, fmt.Sprintf("%.0f %% of its processors are busy", 100*busy))
	}
	return strings.Join(why, ", ")
}

func loadNow() (load, error) {
	text := map[string]string{}
	for _, f := range []string{"meminfo", "diskstats", "stat"} {
		b, err := os.ReadFile("/proc/" + f)
		if err != nil {
			return load{}, err
		}
		text[f] = string(b)
	}
	return parseLoad(time.Now(), text["meminfo"], text["diskstats"], text["stat"]), nil
}

// parseLoad reads what proc(5) says of the files meminfo, diskstats and stat.
func parseLoad(at time.Time, meminfo, diskstats, stat string) load {
	l := load{at: at}
	number := func(f []string, i int) int64 {
		if i >= len(f) {
			return 0
		}
		n, _ := strconv.ParseInt(f[i], 10, 64)
		return n
	}
	for line := range strings.Lines(meminfo) {
		if f := strings.Fields(line); len(f) > 1 && (f[0] == "Dirty:" || f[0] == "Writeback:") {
			l.dirty += number(f, 1) << 10
		}
	}
	for line := range strings.Lines(diskstats) {
		f := strings.Fields(line)
		l.moved += (number(f, 5) + number(f, 9)) * 512
		l.flying += number(f, 11)
	}
	if f := strings.Fields(strings.SplitN(stat, "\n", 2)[0]); len(f) > 0 && f[0] == "cpu" {
		for _, i := range []int{1, 2, 3, 6, 7} { // user nice system irq softirq
			l.busy += time.Duration(number(f, i)) * 10 * time.Millisecond
		}
	}
	return l
}
