package oplog

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

// damaged makes a log of three segments, all of it synced and closed, for a
// test to damage.
func damaged(t *testing.T) (*disk.Mem, *rig) {
	t.Helper()
	m := disk.NewMem()
	r := newRig(t, m, 64<<10)
	for len(r.l.segments) < 3 || len(r.records) < 90 {
		r.append(1, 2000, 0)
		must(t, r.l.SyncAll())
	}
	must(t, r.l.Close())
	return m, r
}

func (r *rig) path(seg uint64) string { return r.opt.Dir + "/" + segmentName(seg) }

func TestDamage(t *testing.T) {
	flip := func(b []byte) { b[len(b)/2] ^= 1 }
	file := func(t *testing.T, fs disk.FS, name string) disk.File {
		f, err := fs.OpenFile(name, os.O_RDWR)
		must(t, err)
		t.Cleanup(func() { f.Close() })
		return f
	}
	last := func(r *rig) entry { return r.records[len(r.records)-1] }
	for name, c := range map[string]struct {
		do     func(t *testing.T, m *disk.Mem, r *rig) Loc // what is wrong, where
		atOpen bool                                        // found by Open, not only by reading
		reason string
	}{
		"a bit in a durable record of the last segment": {
			func(t *testing.T, m *disk.Mem, r *rig) Loc {
				loc := r.records[len(r.records)-3].loc
				damage(t, m, loc, flip)
				return Loc{loc.Segment, loc.Off - recordHeader, 0}
			}, true, "checksum of record",
		},
		"a bit in the header of a durable record": {
			func(t *testing.T, m *disk.Mem, r *rig) Loc {
				loc := r.records[len(r.records)-3].loc
				loc.Off -= recordHeader
				loc.Len = recordHeader
				damage(t, m, loc, flip)
				return loc
			}, true, "no record header",
		},
		"zeros over a block of durable records": {
			func(t *testing.T, m *disk.Mem, r *rig) Loc {
				first := r.records[0]
				for _, e := range r.records {
					if first = e; e.loc.Segment == last(r).loc.Segment && e.loc.Off > 2*disk.BlockSize {
						break
					}
				}
				must(t, file(t, m, r.path(first.loc.Segment)).PunchHole(first.loc.Off-recordHeader, 4096))
				return Loc{first.loc.Segment, first.loc.Off - recordHeader, 0}
			}, true, "no record header",
		},
		"a record of a sealed segment": {
			func(t *testing.T, m *disk.Mem, r *rig) Loc {
				loc := r.records[5].loc
				damage(t, m, loc, flip)
				return Loc{loc.Segment, loc.Off - recordHeader, 0}
			}, false, "checksum of record",
		},
		"a sealed segment cut short": {
			func(t *testing.T, m *disk.Mem, r *rig) Loc {
				loc := r.records[5].loc
				must(t, file(t, m, r.path(loc.Segment)).Truncate(loc.Off-recordHeader))
				return Loc{loc.Segment, loc.Off - recordHeader, 0}
			}, false, "the segment ends after record 1.5",
		},
		"records of one segment in another": {
			func(t *testing.T, m *disk.Mem, r *rig) Loc {
				b := make([]byte, 64<<10-disk.BlockSize)
				_, err := file(t, m, r.path(1)).ReadAt(b, disk.BlockSize)
				must(t, err)
				_, err = file(t, m, r.path(2)).WriteAt(b, disk.BlockSize)
				must(t, err)
				return Loc{2, disk.BlockSize, 0}
			}, false, "no record header",
		},
		"a segment header": {
			func(t *testing.T, m *disk.Mem, r *rig) Loc {
				damage(t, m, Loc{2, 0, 64}, flip)
				return Loc{Segment: 2}
			}, true, "checksum of the segment header",
		},
		"the length of a segment header": {
			func(t *testing.T, m *disk.Mem, r *rig) Loc {
				damage(t, m, Loc{2, 12, 4}, func(b []byte) { copy(b, "\xff\xff\xff\xff") })
				return Loc{Segment: 2}
			}, true, "length of the segment header",
		},
		"a newer format": {
			func(t *testing.T, m *disk.Mem, r *rig) Loc {
				damage(t, m, Loc{3, 7, 1}, func(b []byte) { b[0]++ })
				return Loc{Segment: 3}
			}, true, "another version of mortar",
		},
		"something else": {
			func(t *testing.T, m *disk.Mem, r *rig) Loc {
				damage(t, m, Loc{1, 0, 64}, func(b []byte) { clear(b) })
				return Loc{Segment: 1}
			}, true, "no segment header",
		},
		"an empty file": {
			func(t *testing.T, m *disk.Mem, r *rig) Loc {
				must(t, file(t, m, r.path(3)).Truncate(0))
				return Loc{Segment: 3}
			}, true, "shorter than a segment header",
		},
		"a segment missing in the middle": {
			func(t *testing.T, m *disk.Mem, r *rig) Loc {
				must(t, m.Remove(r.path(2)))
				return Loc{Segment: 3}
			}, true, "0000000000000002.log, which is missing",
		},
		"a segment under another one's name": {
			func(t *testing.T, m *disk.Mem, r *rig) Loc {
				must(t, m.Rename(r.path(1), r.path(2)))
				return Loc{Segment: 2}
			}, true, "renamed or copied",
		},
	} {
		t.Run(name, func(t *testing.T) {
			m, r := damaged(t)
			want := c.do(t, m, r)
			must(t, m.SyncDir(r.opt.Dir))
			before := m.Used()
			l, err := Open(r.opt)
			if c.atOpen == (err == nil) {
				t.Fatalf("Open: %v", err)
			}
			if err == nil {
				err = l.Verify(t.Context())
				l.Close()
			}
			var bad *ErrCorrupt
			if !errors.As(err, &bad) {
				t.Fatalf("got %v, want an ErrCorrupt", err)
			}
			if bad.File != r.path(want.Segment) || bad.Offset != want.Off || !strings.Contains(bad.Error(), c.reason) {
				t.Errorf("got %+v, want %s at %d: …%s…", bad, r.path(want.Segment), want.Off, c.reason)
			}
			if c.atOpen && m.Used() != before {
				t.Error("the damaged log was changed")
			}
		})
	}
}

// TestTruncatedByAMachine cuts the last segment at every place: what is left is
// a prefix, since nothing behind the cut says what was durable.
func TestTruncatedByAMachine(t *testing.T) {
	m, r := damaged(t)
	last := r.records[len(r.records)-1].loc.Segment
	st, err := m.Stat(r.path(last))
	must(t, err)
	for size := st.Size(); size >= disk.BlockSize; size -= 777 {
		r.opt.FS = m.Crash(rand.New(rand.NewPCG(1, 1))) // a copy: all is synced
		f, err := r.opt.FS.OpenFile(r.path(last), os.O_RDWR)
		must(t, err)
		must(t, f.Truncate(size))
		must(t, f.Close())
		l, err := Open(r.opt)
		must(t, err)
		got := (&rig{t: t, l: l}).readAll(0, 1<<20)
		for i, g := range got {
			if !bytes.Equal(g.payload, r.records[i].payload) {
				t.Fatalf("cut at %d: record %v differs", size, g.pos)
			}
		}
		must(t, l.Close())
	}
}

func TestReadOnly(t *testing.T) {
	m := disk.NewMem()
	r := newRig(t, m, 64<<10)
	if _, err := Open(Options{FS: m, Dir: "/nowhere", ReadOnly: true}); err == nil {
		t.Error("a log that is not there was opened")
	}
	for range 50 {
		r.append(3, 2000, 0)
	}
	must(t, r.l.SyncAll())
	r.append(3, 2000, 0)
	r.append(3, 2000, 0)
	must(t, r.l.Flush())
	torn := r.records[50].loc
	must(t, r.l.Close())
	damage(t, m, torn, func(b []byte) { clear(b) })
	before := m.String()
	r.opt.ReadOnly = true
	r.open()
	r.records = r.records[:50]
	r.check()
	for name, err := range map[string]error{
		"append": func() error {
			_, err := r.l.Append(cluster.Pos{Epoch: 3, Seq: 51}, nil, 0)
			return err
		}(),
		"truncate": r.l.TruncateAfter(3),
		"trim":     r.l.TrimBefore(40),
		"reset":    r.l.Reset(cluster.Pos{}, nil),
	} {
		if !errors.Is(err, ErrReadOnly) {
			t.Errorf("%s of a read-only log: %v", name, err)
		}
	}
	must(t, r.l.Sync(context.Background(), 50))
	must(t, r.l.Close())
	if after := m.String(); before != after {
		t.Errorf("the disk was changed from\n%sto\n%s", before, after)
	}
}

// FuzzOpen gives Open any file for a log: it must refuse it, or find a log that
// works.
func FuzzOpen(f *testing.F) {
	m := disk.NewMem()
	l, err := Open(Options{FS: m, Dir: "/log", SegmentSize: 16 << 10})
	must(f, err)
	for seq := range uint64(6) {
		_, err := l.Append(cluster.Pos{Epoch: 1 + cluster.Epoch(seq/4), Seq: seq + 1}, payload(seq, int(100*seq)), 0)
		must(f, err)
	}
	must(f, l.Close())
	valid, err := disk.ReadFile(m, "/log/"+segmentName(1), 1<<20)
	must(f, err)
	f.Add(valid[:disk.BlockSize+2000])
	f.Add(valid[:disk.BlockSize])
	f.Add(valid[:100])
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte("mR"), 4000))
	f.Fuzz(func(t *testing.T, file []byte) {
		fs := disk.NewMem()
		must(t, fs.MkdirAll("/log", 0o700))
		must(t, disk.WriteFile(fs, "/log/"+segmentName(1), file))
		useLog(t, Options{FS: fs, Dir: "/log", SegmentSize: 16 << 10})
	})
}

// useLog opens a log that may be damaged and, if it can be, uses it.
func useLog(t *testing.T, o Options) (found []entry) {
	t.Helper()
	l, err := Open(o)
	if err != nil {
		return nil
	}
	ps, poss, _, err := l.Read(l.Base().Seq, 1<<20)
	if err != nil {
		l.Close()
		return nil
	}
	for i := range ps {
		found = append(found, entry{pos: poss[i], payload: ps[i]})
	}
	tail := l.Tail()
	if tail.Seq < 1<<62 && tail.Epoch < 1<<62 {
		_, err = l.Append(cluster.Pos{Epoch: tail.Epoch + 1, Seq: tail.Seq + 1}, []byte("more"), 0)
		must(t, err)
		tail = l.Tail()
	}
	must(t, l.Close())
	l, err = Open(o)
	must(t, err)
	if l.Tail() != tail {
		t.Fatalf("tail %v after opening again, was %v", l.Tail(), tail)
	}
	must(t, l.Close())
	return found
}

// FuzzDamage changes bytes of a log: every record that it then still has must be
// one that was written.
func FuzzDamage(f *testing.F) {
	o := Options{Dir: "/log", SegmentSize: 8 << 10}
	m := disk.NewMem()
	o.FS = m
	l, err := Open(o)
	must(f, err)
	var want [][]byte
	for seq := range uint64(20) {
		p := payload(seq+1, int(97*seq))
		want = append(want, p)
		_, err := l.Append(cluster.Pos{Epoch: 1, Seq: seq + 1}, p, 0)
		must(f, err)
		if seq%3 == 0 {
			must(f, l.SyncAll())
		}
	}
	must(f, l.Close())
	names, err := m.List("/log")
	must(f, err)
	files := map[string][]byte{}
	for _, name := range names {
		if files[name], err = disk.ReadFile(m, "/log/"+name, 1<<20); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(uint8(0), uint32(16), []byte{9})
	f.Add(uint8(1), uint32(4096+41), []byte("zz"))
	f.Add(uint8(3), uint32(4096), make([]byte, 512))
	f.Fuzz(func(t *testing.T, which uint8, off uint32, change []byte) {
		fs := disk.NewMem()
		must(t, fs.MkdirAll("/log", 0o700))
		for i, name := range names {
			b := bytes.Clone(files[name])
			if i == int(which)%len(names) && len(change) > 0 && len(b) > 0 {
				copy(b[int(off)%len(b):], change)
			}
			must(t, disk.WriteFile(fs, "/log/"+name, b))
		}
		o := o
		o.FS = fs
		for _, e := range useLog(t, o) {
			if e.pos.Seq > uint64(len(want)) || !bytes.Equal(e.payload, want[e.pos.Seq-1]) {
				t.Fatalf("record %v is not what was written", e.pos)
			}
		}
	})
}
