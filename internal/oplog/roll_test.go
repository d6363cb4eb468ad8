package oplog

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

// across appends until the log has another segment, and a little more.
func (r *rig) across() {
	r.t.Helper()
	for n := len(r.l.segments); len(r.l.segments) == n; {
		r.append(1, 3000, 0)
	}
	r.append(1, 100, 0)
	must(r.t, r.l.Flush())
}

// unnamed makes a log of which the first segment is full and not synced before until is closed, and
// then fails to be: the second one has records and no name.
func unnamed(t *testing.T) (mem *disk.Mem, r *rig, until chan struct{}) {
	t.Helper()
	mem, until = disk.NewMem(), make(chan struct{})
	fs := disk.NewFaulty(mem)
	r = newRig(t, fs, 64<<10)
	fs.Add(disk.Fault{Op: disk.OpSync, Path: segmentName(1), Err: errBoom, Until: until})
	r.across()
	return mem, r, until
}

// TestRollDoesNotWait fills a segment on a disk that does not answer: appends go on in the
// next one, and nothing there counts as durable before all before it does.
func TestRollDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := disk.NewFaulty(disk.NewMem())
		r := newRig(t, fs, 64<<10)
		until := make(chan struct{})
		fs.Add(disk.Fault{Op: disk.OpSync, Path: segmentName(1), Until: until})
		r.across()
		r.check()
		synced := make(chan error, 1)
		go func() { synced <- r.l.SyncAll() }()
		synctest.Wait()
		select {
		case err := <-synced:
			t.Fatalf("synced before the segment that hangs: %v", err)
		default:
		}
		if n := r.l.Durable(); n != 0 {
			t.Errorf("%d is durable", n)
		}
		if _, err := fs.Stat(r.path(2)); err == nil {
			t.Error("a segment has its name before the one before it is synced")
		}
		must(t, r.l.TrimBefore(r.tail().Seq))
		if r.l.First() != 1 {
			t.Error("the segment before one without a name was trimmed")
		}
		close(until)
		must(t, <-synced)
		if n := r.l.Durable(); n != r.tail().Seq {
			t.Errorf("%d is durable of %d", n, r.tail().Seq)
		}
		r.check()
		r.reopen()
		r.check()
	})
}

// TestKilledBeforeTheName ends a process that has begun a segment which has no name yet: what it had
// flushed is there, also for those who only look.
func TestKilledBeforeTheName(t *testing.T) {
	mem, r, until := unnamed(t)
	killed := r.l
	defer killed.Close()
	defer close(until)
	r.opt.FS = mem

	before, err := mem.List(r.opt.Dir)
	must(t, err)
	r.opt.ReadOnly = true
	r.open()
	r.check()
	must(t, r.l.Close())
	after, err := mem.List(r.opt.Dir)
	must(t, err)
	if !slices.Equal(before, after) {
		t.Errorf("looking made %v of %v", after, before)
	}

	r.opt.ReadOnly = false
	r.open()
	r.check()
	if _, err := mem.Stat(r.path(2)); err != nil {
		t.Error(err)
	}
	r.across()
	must(t, r.l.SyncAll())
	r.reopen()
	r.check()
}

// TestPowerCutBeforeTheName loses the end of a segment, and not what goes on from it without a name. That is
// forgotten, and does not come back when the log has come to the same place with other records.
func TestPowerCutBeforeTheName(t *testing.T) {
	mem, r, until := unnamed(t)
	defer close(until)
	base := r.l.segments[1].base.Seq
	f, err := mem.OpenFile(r.opt.Dir+"/"+nextName, 2)
	must(t, err)
	must(t, f.Sync()) // the kernel wrote it early
	must(t, f.Close())
	must(t, mem.SyncDir(r.opt.Dir))
	lost, kept := 0, 0
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 1))
		c := &rig{t: t, fs: mem.Crash(rng), opt: r.opt}
		c.opt.FS = c.fs
		c.open()
		if c.l.Tail().Seq >= base {
			kept++
			c.records = r.records
			c.check()
			must(t, c.l.Close())
			continue
		}
		c.records = slices.Clone(r.records[:c.l.Tail().Seq])
		c.check()
		if len(c.l.segments) > 1 { // a torn end was cut
			must(t, c.l.Close())
			continue
		}
		lost++
		for c.l.Tail().Seq < base {
			pos := cluster.Pos{Epoch: 1, Seq: c.l.Tail().Seq + 1}
			p := bytes.Repeat([]byte("!"), len(r.records[pos.Seq-1].payload))
			loc, err := c.l.Append(pos, p, 0)
			must(t, err)
			c.records = append(c.records, entry{pos, p, loc})
		}
		must(t, c.l.SyncAll())
		again := &rig{t: t, fs: c.fs.(*disk.Mem).Crash(rng), opt: c.opt, records: c.records}
		must(t, c.l.Close())
		again.opt.FS = again.fs
		again.open()
		again.check()
		must(t, again.l.Close())
	}
	t.Logf("%d crashes that lost the end, %d that kept all", lost, kept)
	if lost == 0 || kept == 0 {
		t.Error("the test tests nothing")
	}
}

// TestWhatTheNextOneKnows damages a record of which only the segment without a name says that it was durable.
func TestWhatTheNextOneKnows(t *testing.T) {
	mem := disk.NewMem()
	fs := disk.NewFaulty(mem)
	r := newRig(t, fs, 64<<10)
	for r.l.active().end < 61<<10 {
		r.append(1, 3000, 0)
	}
	must(t, r.l.SyncAll())
	until := make(chan struct{})
	fs.Add(disk.Fault{Op: disk.OpSync, Path: nextName, Err: errBoom, Until: until})
	last := r.records[len(r.records)-1].loc
	r.across()
	defer close(until)
	damage(t, mem, last, func(b []byte) { b[7] ^= 1 })
	r.opt.FS = mem
	_, err := Open(r.opt)
	var corrupt *ErrCorrupt
	if !errors.As(err, &corrupt) || corrupt.File != r.path(1) || corrupt.Offset != last.Off-recordHeader {
		t.Errorf("opened with damage in a durable record: %v", err)
	}
}
