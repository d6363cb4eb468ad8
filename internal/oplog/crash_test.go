package oplog

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

// world is one thing that a log may be found to be after a crash: the records
// after base, of which any number at the end may be missing down to durable.
type world struct {
	base    cluster.Pos
	records []entry
	durable uint64
}

// holds reports whether the log found is of this world.
func (w *world) holds(base cluster.Pos, found []entry) bool {
	tail := base.Seq + uint64(len(found))
	if base.Seq < w.base.Seq || tail < w.durable || tail > w.base.Seq+uint64(len(w.records)) {
		return false
	}
	from := w.records[base.Seq-w.base.Seq:]
	for i, f := range found {
		if f.pos != from[i].pos || f.loc != from[i].loc || !bytes.Equal(f.payload, from[i].payload) {
			return false
		}
	}
	if base.Seq == w.base.Seq {
		return base == w.base
	}
	return base == w.records[base.Seq-w.base.Seq-1].pos
}

// photo is a crashed disk and the worlds it may be in.
type photo struct {
	disk   *disk.Mem
	worlds []world
	at     string // the call that the crash came before
}

// life runs a log on a disk that crashes at every step it takes.
type life struct {
	t    *testing.T
	seed uint64
	mem  *disk.Mem

	mu     sync.Mutex // the keeper of the log takes photos too
	rng    *rand.Rand
	worlds []world // what is; while it is being changed also what will be
	photos []photo
}

func (f *life) now() *world { return &f.worlds[0] }

// observe takes photos: at every call that makes something durable or changes
// names or sizes, and at some of the writes.
func (f *life) observe(op disk.Op, name string) {
	f.mu.Lock()
	slow := (op == disk.OpSync || op == disk.OpRename) && f.rng.IntN(3) == 0
	f.mu.Unlock()
	if slow { // more than a few changes come meanwhile
		time.Sleep(300 * time.Microsecond)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch op {
	case disk.OpRead, disk.OpStat:
		return
	case disk.OpWrite:
		if f.rng.IntN(4) != 0 {
			return
		}
	}
	if len(f.photos) > 60 && f.rng.IntN(4) != 0 {
		return
	}
	worlds := slices.Clone(f.worlds)
	for i := range worlds {
		worlds[i].records = slices.Clone(worlds[i].records)
	}
	f.photos = append(f.photos, photo{f.mem.Crash(f.rng), worlds, fmt.Sprintf("%v %s", op, name)})
}

// set changes the worlds.
func (f *life) set(worlds ...world) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.worlds = worlds
}

func (f *life) durable(seq uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now().durable = max(f.now().durable, seq)
}

func (f *life) fatalf(format string, args ...any) {
	f.t.Helper()
	f.t.Fatalf("seed %d: %s", f.seed, fmt.Sprintf(format, args...))
}

// check opens the disk of a photo and returns the world it turned out to be in.
func (f *life) check(p photo) world {
	f.t.Helper()
	l, err := Open(Options{FS: p.disk, Dir: "/brick/log", SegmentSize: crashSegment})
	if err != nil {
		f.fatalf("open after a crash before %s: %v\n%v", p.at, err, p.disk)
	}
	defer l.Close()
	r := &rig{t: f.t, l: l}
	found := r.readAll(l.Base().Seq, 10_000)
	if len(found) > 0 && found[len(found)-1].pos != l.Tail() || len(found) == 0 && l.Tail() != l.Base() {
		f.fatalf("after a crash before %s: base %v, tail %v, %d records", p.at, l.Base(), l.Tail(), len(found))
	}
	i := slices.IndexFunc(p.worlds, func(w world) bool { return w.holds(l.Base(), found) })
	if i < 0 {
		f.fatalf("a crash before %s left base %v and %d records to %v, of worlds\n%v", p.at, l.Base(), len(found), l.Tail(), p.worlds)
	}
	checkEpochs(f, l, found)
	return world{base: l.Base(), records: found, durable: l.Tail().Seq}
}

// checkEpochs compares the history with the records.
func checkEpochs(f *life, l *Log, found []entry) {
	f.t.Helper()
	var want []cluster.Pos
	for _, e := range found {
		if n := len(want); n == 0 || want[n-1].Epoch != e.pos.Epoch {
			want = append(want, e.pos)
		}
	}
	got := l.History()
	if base := l.Base(); base != (cluster.Pos{}) {
		if len(got) == 0 || got[0].Epoch != base.Epoch || got[0].Seq > base.Seq {
			f.fatalf("history %v of a log after %v", got, base)
		}
		if len(want) == 0 || want[0].Epoch != base.Epoch {
			got = got[1:]
		} else {
			got = slices.Clone(got)
			got[0] = want[0]
		}
	}
	if !slices.Equal(got, want) {
		f.fatalf("history %v, the records say %v", l.History(), want)
	}
}

const crashSegment = 32 << 10

// run lives for n steps and returns the photos taken.
func (f *life) run(n int) {
	fs := disk.NewFaulty(f.mem)
	fs.Observe(f.observe)
	l, err := Open(Options{FS: fs, Dir: "/brick/log", SegmentSize: crashSegment})
	if err != nil {
		f.fatalf("open: %v", err)
	}
	defer l.Close()
	rng := rand.New(rand.NewPCG(f.seed, uint64(len(f.now().records))))
	epoch := l.Tail().Epoch + 1
	for range n {
		now := *f.now()
		tail := l.Tail()
		switch rng.IntN(24) {
		case 0:
			epoch++
		case 1, 2, 3:
			if err := l.Flush(); err != nil {
				f.fatalf("%v", err)
			}
		case 4, 5, 6:
			seq := tail.Seq
			if err := l.Sync(f.t.Context(), seq); err != nil {
				f.fatalf("%v", err)
			}
			f.durable(seq)
		case 7:
			seq := l.Base().Seq + uint64(rng.IntN(int(tail.Seq-l.Base().Seq)+1))
			if seq < tail.Seq-min(tail.Seq, 20) {
				seq = tail.Seq - 20
			}
			old, cut := now, now
			old.durable = min(now.durable, seq)
			f.set(old)
			if err := l.TruncateAfter(seq); err != nil {
				f.fatalf("truncate after %d: %v", seq, err)
			}
			if seq < tail.Seq {
				cut.records, cut.durable = slices.Clone(now.records[:seq-now.base.Seq]), seq
				f.set(cut)
			} else {
				f.set(now)
			}
			epoch++
		case 8:
			if err := l.TrimBefore(l.Base().Seq + uint64(rng.IntN(200))); err != nil {
				f.fatalf("%v", err)
			}
		case 9:
			if rng.IntN(5) != 0 {
				continue
			}
			empty := world{base: cluster.Pos{Epoch: epoch, Seq: tail.Seq + uint64(rng.IntN(100))}}
			empty.durable = empty.base.Seq
			f.set(now, empty)
			if err := l.Reset(empty.base, []cluster.Pos{empty.base}); err != nil {
				f.fatalf("%v", err)
			}
			f.set(empty)
		default:
			size := []int{10, 300, 5000, 12000}[rng.IntN(4)]
			if rng.IntN(40) == 0 {
				size = 70000
			}
			pos := cluster.Pos{Epoch: epoch, Seq: tail.Seq + 1}
			p := payload(pos.Seq*100+uint64(epoch), size+rng.IntN(100))
			// It may be found from the moment the log knows of it; where it
			// lies is known only afterwards.
			e := entry{pos, p, f.predict(l, p)}
			next := now
			next.records = append(slices.Clip(now.records), e)
			f.set(next)
			loc, err := l.Append(pos, p, 0)
			if err != nil {
				f.fatalf("%v", err)
			}
			if loc != e.loc {
				f.fatalf("record at %+v, expected at %+v", loc, e.loc)
			}
		}
	}
	f.observe(disk.OpSync, "the end")
}

// predict says where the next record goes.
func (f *life) predict(l *Log, p []byte) Loc {
	l.mu.Lock()
	defer l.mu.Unlock()
	rec := record{length: uint32(len(p))}
	if l.fits(rec) {
		return Loc{l.active().num, rec.payload(l.active().end), len(p)}
	}
	head := segmentHeader{history: l.history}
	return Loc{l.next, rec.payload(head.size()), len(p)}
}

// TestCrashAnywhere crashes logs at every step that they take on the disk, looks
// at what is left, and lets one of the remains live on, several times.
func TestCrashAnywhere(t *testing.T) {
	seeds := uint64(12)
	if testing.Short() {
		seeds = 5
	}
	crashes, lost := 0, 0
	for seed := range seeds {
		f := &life{t: t, seed: seed, mem: disk.NewMem(), rng: rand.New(rand.NewPCG(seed, 99)), worlds: make([]world, 1)}
		must(t, f.mem.MkdirAll("/brick", 0o700))
		must(t, f.mem.SyncDir("/"))
		for range 4 {
			f.photos = nil
			f.run(80)
			photos := f.photos
			go_on := photos[f.rng.IntN(len(photos))]
			for _, p := range photos {
				// Looking repairs the disk, so look at copies.
				w := f.check(photo{p.disk.Crash(f.rng), p.worlds, p.at})
				crashes++
				if last := p.worlds[0]; len(w.records) < len(last.records) {
					lost++
				}
			}
			f.mem = go_on.disk
			f.set(f.check(go_on))
		}
	}
	if lost == 0 || lost == crashes {
		t.Errorf("%d of %d crashes lost something: the test tests nothing", lost, crashes)
	}
	t.Logf("%d crashes, %d of them lost records that were not synced", crashes, lost)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestTornTailIsForgotten has records behind a hole in the tail: they were
// written but not synced, and the disk kept the later one. They must be gone,
// for good.
func TestTornTailIsForgotten(t *testing.T) {
	m := disk.NewMem()
	r := newRig(t, m, 64<<10)
	for range 5 {
		r.append(1, 1000, 0)
	}
	must(t, r.l.SyncAll())
	r.append(1, 1000, 0)
	r.append(1, 1000, 0)
	r.append(1, 1000, 0)
	must(t, r.l.Flush())
	hole := r.records[5].loc
	r.l.Close()
	damage(t, m, hole, func(b []byte) { clear(b) })
	r.open()
	r.records = r.records[:5]
	r.check()
	// A record of the same size takes the place of the lost one: what followed
	// that must not follow this one.
	r.append(1, 1000, 0)
	must(t, r.l.SyncAll())
	r.reopen()
	r.check()
}

// damage changes len bytes at loc.
func damage(t *testing.T, fs disk.FS, loc Loc, change func(b []byte)) {
	t.Helper()
	f, err := fs.OpenFile("/brick/log/"+segmentName(loc.Segment), 2)
	must(t, err)
	defer f.Close()
	b := make([]byte, loc.Len)
	_, err = f.ReadAt(b, loc.Off)
	must(t, err)
	change(b)
	_, err = f.WriteAt(b, loc.Off)
	must(t, err)
	must(t, f.Sync())
}
