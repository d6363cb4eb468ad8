package estate

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"testing"
)

type kernelRequest struct {
	context.Context
	unique uint64
}

func (r kernelRequest) KernelRequest() uint64 { return r.unique }
func (r kernelRequest) Value(k any) any {
	if k == (RequestKey{}) {
		return r
	}
	return nil
}

func begin(t *testing.T, n *Numbers, c Change) Given {
	t.Helper()
	g, err := n.Begin(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// handOver returns the numbers of a process that comes after e's, and what it has to void.
func handOver(t *testing.T, e *Estate) (next *Estate, void *[]Again) {
	t.Helper()
	if err := e.SetInit([]byte("in"), []byte("out")); err != nil {
		t.Fatal(err)
	}
	left, err := Read(e.Fd())
	if err != nil {
		t.Fatal(err)
	}
	next, void = newEstate(t), new([]Again)
	next.Numbers.Inherit(left, func(_ uint64, a Again) { *void = append(*void, a) })
	return next, void
}

// What a request had carried out before the process was killed it gets again under the same number;
// what nobody asks for again is voided; and no number is given twice.
func TestNumbersSurvive(t *testing.T) {
	e := newEstate(t)
	n := e.Numbers
	ask := func(request uint64) uint64 { return begin(t, n, Change{Request: request, Session: 77, Ino: 5}).Number }

	answered := ask(10) // carried out, and the kernel has the answer
	n.End(answered, true)
	n.Answered(10)
	waits := ask(12) // carried out, and the kernel has no answer
	n.End(waits, true)
	open := ask(14) // not answered by the set
	own := ask(0)   // of no request
	failed := ask(16)
	n.End(failed, false) // which may be tried again
	told := ask(18)      // carried out; the kernel got the answer, and nobody noted that
	n.End(told, true)
	if got := n.Acked(); got != waits {
		t.Fatalf("acknowledged below %d while %d has no answer", got, waits)
	}
	last := told

	next, void := handOver(t, e)
	n = next.Numbers
	if got := n.Acked(); got != waits {
		t.Errorf("the next process acknowledges below %d, want %d", got, waits)
	}
	if !slices.Equal(*void, []Again{{own, 77, 5}}) {
		t.Errorf("voided at once: %v, want only %d, which is of no request", *void, own)
	}
	n.ResentAre(map[uint64]bool{12: true, 14: true, 16: true})
	if len(*void) != 2 || (*void)[1].Number != told {
		t.Errorf("voided: %v, want %d, whose request has its answer", *void, told)
	}
	for request, want := range map[uint64]uint64{12: waits, 14: open} {
		got := begin(t, n, Change{Request: RequestOf(kernelRequest{context.Background(), request | 1<<63}), Session: 78, Ino: 5})
		if (got != Given{want, 77, true}) {
			t.Errorf("request %d comes again under %+v; want %d, 77", request, got, want)
		}
	}
	anew := begin(t, n, Change{Request: 16, Session: 78, Ino: 5})
	fresh := anew.Number
	if fresh <= last || anew.Session != 78 || anew.Again {
		t.Errorf("a change that had failed begins again as %+v", anew)
	}
	for _, number := range []uint64{waits, open, fresh} {
		n.End(number, true)
	}
	for _, number := range []uint64{own, told} {
		n.End(number, false)
	}
	for _, request := range []uint64{12, 14, 16} {
		n.Answered(request | 1<<63)
	}
	if got := n.Acked(); got != fresh+1 {
		t.Errorf("in the end all below %d are answered, want %d", got, fresh+1)
	}
	if n.open.Len() > 0 || len(n.requests) > 0 {
		t.Errorf("%d numbers and %d requests stay", n.open.Len(), len(n.requests))
	}

	third, void := handOver(t, next)
	if number := begin(t, third.Numbers, Change{Request: 20, Session: 78}).Number; number != fresh+1 || len(*void) > 0 {
		t.Errorf("the third process begins with %d and voids %v", number, *void)
	}
}

// A caller who gives up lets his change go on: it belongs to no request from then on.
func TestGivenUp(t *testing.T) {
	e := newEstate(t)
	number := begin(t, e.Numbers, Change{Request: 10, Session: 77, Ino: 5}).Number
	e.Numbers.Answered(10)
	if _, void := handOver(t, e); len(*void) != 1 || (*void)[0].Number != number {
		t.Errorf("voided: %v, want %d", *void, number)
	}
	e.Numbers.End(number, true)
	if got := e.Numbers.Acked(); got != number+1 {
		t.Errorf("acknowledged below %d", got)
	}
}

// A write that was acknowledged before it was sent is not sent a second time.
func TestTaken(t *testing.T) {
	e := newEstate(t)
	for _, request := range []uint64{10, 12, 14} {
		e.Numbers.Take(request)
	}
	e.Numbers.Answered(12)
	next, _ := handOver(t, e)
	next.Numbers.ResentAre(map[uint64]bool{10: true, 12: true})
	for request, want := range map[uint64]bool{10: true, 12: false, 14: false, 0: false} {
		if got := next.Numbers.Took(request); got != want {
			t.Errorf("request %d: taken %v, want %v", request, got, want)
		}
	}
	next.Numbers.Answered(10)
	if next.Numbers.Took(10) {
		t.Error("taken after it was answered")
	}
}

// What is read is not believed: whatever bytes there are, they are refused by name or read within bounds.
func TestReadRefuses(t *testing.T) {
	e := newEstate(t)
	if _, err := Read(e.Fd()); err == nil {
		t.Error("an estate that was not finished is read")
	}
	if err := e.SetInit([]byte("in"), []byte("out")); err != nil {
		t.Fatal(err)
	}
	e.Nodes[0].Put(9, 1, 2)
	if left, err := Read(e.Fd()); err != nil || len(left.Nodes[0]) != 1 || string(left.Init) != "in" || string(left.InitAnswer) != "out" {
		t.Fatalf("%+v, %v", left, err)
	}
	for word, values := range map[int][]uint64{
		wordMagic:      {0, 1},
		wordInit:       {initMax + 1, 1 << 63},
		wordInit2:      {initMax + 1, 1 << 63},
		wordTables:     {1, 1<<40 | 3, 3<<40 | 0xffffffff<<8 | 3, 3<<40 | 4, 1<<63 | 3, 0xfffff<<40 | 1<<16<<8 | 3},
		wordTables + 1: {^uint64(0)},
	} {
		was := e.header[word]
		for _, v := range values {
			e.header[word] = v
			if _, err := Read(e.Fd()); err == nil {
				t.Errorf("word %d is %#x, and it is read", word, v)
			}
		}
		e.header[word] = was
	}
	e.header[wordVersion] = Version + 1
	if _, err := Read(e.Fd()); !errors.Is(err, ErrVersion) {
		t.Errorf("another version: %v", err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if _, err := Read(int(null.Fd())); err == nil {
		t.Error("a device is read")
	}
}

func FuzzParse(f *testing.F) {
	mem := make([]byte, 5*page)
	for word, v := range map[int]uint64{wordMagic: magic, wordVersion: Version, wordMade: 1, wordNext: 4,
		wordTables: 3<<40 | 16<<8 | 3, wordTables + tableNumbers: 4<<40 | 16<<8 | 4} {
		binary.NativeEndian.PutUint64(mem[8*word:], v)
	}
	binary.NativeEndian.PutUint64(mem[3*page:], 5)
	f.Add(mem[:page], mem[3*page:])
	f.Fuzz(func(t *testing.T, header, body []byte) {
		mem := make([]byte, 5*page)
		copy(mem[:page], header)
		copy(mem[3*page:], body)
		left, err := parse(mem)
		if err != nil {
			return
		}
		n := Private().Numbers
		n.Inherit(left, func(uint64, Again) {})
		n.ResentAre(nil)
	})
}
