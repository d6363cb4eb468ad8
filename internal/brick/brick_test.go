package brick

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mortar/internal/cluster"
	"mortar/internal/disk"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var testID = Identity{Pool: cluster.ID{1}, Volume: cluster.ID{2, 7}, Brick: cluster.ID{3}}

// opened is a brick under test with the clock and the position of a primary.
type opened struct {
	*Brick
	t     testing.TB
	epoch cluster.Epoch
	next  uint64
}

// testOptions settle only when told to.
func testOptions(fs disk.FS) Options {
	return Options{FS: fs, Dir: "/b", SegmentSize: 1 << 20, MemTable: 1 << 20, Cache: 1 << 20, SettleAfter: time.Hour}
}

func format(t tester, fs disk.FS, dir string) {
	t.Helper()
	if err := fs.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := fs.SyncDir("/"); err != nil {
		t.Fatal(err)
	}
	if err := Format(fs, dir, testID); err != nil {
		t.Fatal(err)
	}
}

// newBrick formats and opens a brick on a disk of its own.
func newBrick(t testing.TB, change ...func(*Options)) *opened {
	t.Helper()
	fs := disk.NewMem()
	format(t, fs, "/b")
	o := testOptions(fs)
	for _, c := range change {
		c(&o)
	}
	return openBrick(t, o)
}

// openBrick opens a brick and replays its log. It is closed with the test.
func openBrick(t testing.TB, o Options) *opened {
	t.Helper()
	b, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close(false) })
	if err := b.Rewind(b.Tail()); err != nil {
		t.Fatal(err)
	}
	return &opened{Brick: b, t: t, epoch: 1}
}

// entry makes the next entry.
func (o *opened) entry(op fsop.Op) *proto.Entry {
	return &proto.Entry{
		Pos:  cluster.Pos{Epoch: max(o.epoch, o.Tail().Epoch), Seq: o.Tail().Seq + 1},
		Time: max(o.LastTime(), 1e18) + 1, Op: op,
	}
}

// do executes op as the next entry.
func (o *opened) do(op fsop.Op) (*Result, error) { return o.Execute(o.entry(op), nil) }

// must is do that must succeed.
func (o *opened) must(op fsop.Op) *fsop.Reply {
	o.t.Helper()
	r, err := o.do(op)
	if err != nil {
		o.t.Fatalf("%s: %v", fsop.String(op), err)
	}
	return &r.Reply
}

// fails checks that op is refused with the errno, and changes nothing.
func (o *opened) fails(want fsop.Errno, op fsop.Op) {
	o.t.Helper()
	before := o.Tail()
	_, err := o.do(op)
	if !errors.Is(err, want) {
		o.t.Errorf("%s: got %v, want %v", fsop.String(op), err, want)
	}
	if o.Tail() != before {
		o.t.Errorf("%s: was logged", fsop.String(op))
	}
}

func (o *opened) create(dir fsop.Ino, name string) fsop.Ino {
	o.t.Helper()
	return o.must(&fsop.Create{Node: fsop.Node{Parent: dir, Name: name, Mode: 0o644}, Excl: true}).Attr.Ino
}

func (o *opened) mkdir(dir fsop.Ino, name string) fsop.Ino {
	o.t.Helper()
	return o.must(&fsop.Mkdir{Node: fsop.Node{Parent: dir, Name: name, Mode: 0o755}}).Attr.Ino
}

func (o *opened) write(ino fsop.Ino, off uint64, data []byte) {
	o.t.Helper()
	o.must(&fsop.Write{Ino: ino, Off: off, Data: data})
}

// get reads with an operation that must succeed.
func (o *opened) get(op fsop.Op) *fsop.Reply {
	o.t.Helper()
	r, _, err := o.Read(context.Background(), op)
	if err != nil {
		o.t.Fatalf("%s: %v", fsop.String(op), err)
	}
	return r
}

// contents reads a whole file.
func (o *opened) contents(ino fsop.Ino) (p []byte) {
	o.t.Helper()
	for {
		r := o.get(&fsop.Read{Ino: ino, Off: uint64(len(p)), Len: fsop.MaxData})
		if len(r.Data) == 0 {
			return p
		}
		p = append(p, r.Data...)
	}
}

// settleAll settles everything there is, as if it were committed.
func (o *opened) settleAll() {
	o.t.Helper()
	o.Commit(o.Tail().Seq)
	if err := o.settleCycle(context.Background(), true); err != nil {
		o.t.Fatal(err)
	}
}

func TestSmoke(t *testing.T) {
	b := newBrick(t)
	d := b.mkdir(fsop.RootIno, "dir")
	f := b.create(d, "file")
	b.write(f, 0, []byte("hello"))
	b.write(f, 10000, bytes.Repeat([]byte("x"), 100000))
	b.write(f, 3, []byte("p me"))
	want := make([]byte, 110000)
	copy(want, "help me")
	copy(want[10000:], bytes.Repeat([]byte("x"), 100000))
	check := func(when string) {
		t.Helper()
		if got := b.contents(f); !bytes.Equal(got, want) {
			t.Errorf("%s: contents differ (%d bytes, want %d)", when, len(got), len(want))
		}
	}
	check("in the log")
	b.settleAll()
	if b.backlog.load.Load() != 0 {
		t.Errorf("%d bytes are left after settling", b.backlog.load.Load())
	}
	check("settled")
	b.must(&fsop.Setattr{Ino: f, Valid: fsop.SetSize, Size: 20000})
	want = want[:20000]
	check("cut")
	b.must(&fsop.Setattr{Ino: f, Valid: fsop.SetSize, Size: 30000})
	want = append(want, make([]byte, 10000)...)
	check("grown")
	b.settleAll()
	check("settled again")
	if a := b.get(&fsop.Lookup{Parent: d, Name: "file"}).Attr; a.Size != 30000 || a.Ino != f {
		t.Errorf("lookup: %+v", a)
	}
}

func benchBrick(b *testing.B, change ...func(*Options)) *opened {
	o := Options{FS: disk.OS, Dir: b.TempDir()}
	if err := Format(o.FS, o.Dir, testID); err != nil {
		b.Fatal(err)
	}
	for _, c := range change {
		c(&o)
	}
	return openBrick(b, o)
}

// Memory of large replies is used again, and holes have nothing that would be
// read over what was there before.
func TestHolesInUsedMemory(t *testing.T) {
	b := newBrick(t)
	f := b.create(fsop.RootIno, "file")
	b.write(f, 900<<10, []byte("end"))
	for range 5 {
		r := b.get(&fsop.Read{Ino: f, Len: 512 << 10})
		if r.Free == nil {
			t.Fatal("a large reply cannot be given back")
		}
		if n := len(bytes.TrimLeft(r.Data, "\x00")); n != 0 || len(r.Data) != 512<<10 {
			t.Fatalf("%d bytes of a hole, %d of them are not zero", len(r.Data), n)
		}
		for i := range r.Data {
			r.Data[i] = 0xff
		}
		r.Free()
	}
	if r := b.get(&fsop.Read{Ino: f, Off: 900 << 10, Len: fsop.MaxData}); string(r.Data) != "end" {
		t.Errorf("read %q", r.Data)
	}
}
