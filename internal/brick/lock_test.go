package brick

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"mortar/internal/brick/meta"
	"mortar/internal/cluster"
	"mortar/internal/fsop"
)

// FuzzLocks: whatever ranges owners lock and unlock, the locks of a file are what
// a byte-by-byte account says, and in as few pieces as can be.
func FuzzLocks(f *testing.F) {
	f.Add([]byte{0x10, 0, 63, 0x20, 10, 5, 0x00, 20, 1})
	f.Add([]byte{0x21, 0, 255, 0x01, 10, 5, 0x12, 3, 9, 0x22, 12, 0})
	f.Fuzz(func(t *testing.T, script []byte) {
		const span = 64 // bytes that are accounted for; the last stands for all beyond
		var held []meta.Lock
		want := map[cluster.SessionID]*[span]fsop.LockType{}
		for len(script) >= 3 {
			session := cluster.SessionID(script[0]&3 + 1)
			l := meta.Lock{Session: session}
			l.Type = []fsop.LockType{fsop.LockUnlock, fsop.LockRead, fsop.LockWrite}[script[0]>>4%3]
			l.Start = uint64(script[1] % span)
			l.End = l.Start + uint64(script[2])
			if l.End >= span-1 {
				l.End = lockEnd
			}
			script = script[3:]
			if l.Type != fsop.LockUnlock && conflict(held, &l) != nil {
				continue
			}
			before := slices.Clone(held)
			after, _ := setLock(held, &l)
			if !slices.Equal(held, before) {
				t.Fatal("setLock changed what it was given")
			}
			held = after
			own := want[session]
			if own == nil {
				own = new([span]fsop.LockType)
				for i := range own {
					own[i] = fsop.LockUnlock
				}
				want[session] = own
			}
			for i := l.Start; i <= min(l.End, span-1); i++ {
				own[i] = l.Type
			}
		}
		got := map[cluster.SessionID]*[span]fsop.LockType{}
		pieces := map[cluster.SessionID]int{}
		for s := range want {
			got[s] = new([span]fsop.LockType)
			for i := range got[s] {
				got[s][i] = fsop.LockUnlock
			}
		}
		for _, h := range held {
			if h.Start > h.End {
				t.Fatalf("a lock of nothing: %+v", h)
			}
			pieces[h.Session]++
			for i := h.Start; i <= min(h.End, span-1); i++ {
				if got[h.Session][i] != fsop.LockUnlock {
					t.Fatalf("two locks of one owner on byte %d: %+v", i, held)
				}
				got[h.Session][i] = h.Type
			}
		}
		for s, w := range want {
			if *got[s] != *w {
				t.Fatalf("session %v has %v, want %v", s, *got[s], *w)
			}
			need := 0
			for i := range w {
				if w[i] != fsop.LockUnlock && (i == 0 || w[i-1] != w[i]) {
					need++
				}
			}
			if pieces[s] != need {
				t.Fatalf("session %v has %d locks where %d would do: %+v", s, pieces[s], need, held)
			}
		}
	})
}

// A session that held ten thousand locks and is gone lets go of all of them in one
// change, which takes a moment and not more.
func TestManyLocksOfADeadSession(t *testing.T) {
	o := newBrick(t)
	run := func(session cluster.SessionID, number uint64, op fsop.Op) {
		t.Helper()
		e := o.entry(op)
		e.Session, e.Number = session, number
		if number > 0 {
			e.Acked = number - 1
		}
		if _, err := o.Execute(e, nil); err != nil {
			t.Fatalf("%s: %v", fsop.String(op), err)
		}
	}
	run(7, 0, &fsop.OpenSession{Client: "dies"})
	run(8, 0, &fsop.OpenSession{Client: "waits"})
	const n = 10000
	var inos []fsop.Ino
	for i := range n {
		inos = append(inos, o.create(fsop.RootIno, fmt.Sprint(i)))
		run(7, uint64(i+1), &fsop.Setlk{Ino: inos[i], Lock: fsop.Lock{Type: fsop.LockWrite, End: lockEnd, Owner: 1}})
	}
	began := time.Now()
	run(0, 0, &fsop.CloseSession{Session: 7})
	if took := time.Since(began); took > 10*time.Second { // tens of milliseconds on a quiet machine
		t.Errorf("it took %v", took)
	}
	for i := range n {
		run(8, uint64(i+1), &fsop.Setlk{Ino: inos[i], Lock: fsop.Lock{Type: fsop.LockWrite, End: lockEnd, Owner: 1}})
	}
}

// Ranges that make no sense are refused, and a file has no more locks than it may
// have, also where an unlocking would make two of one.
func TestLockLimits(t *testing.T) {
	o := newBrick(t)
	f := o.create(fsop.RootIno, "f")
	open := o.entry(&fsop.OpenSession{Client: "test"})
	open.Session = 7
	if _, err := o.Execute(open, nil); err != nil {
		t.Fatal(err)
	}
	number := uint64(0)
	set := func(want error, typ fsop.LockType, start, end uint64) {
		t.Helper()
		number++
		e := o.entry(&fsop.Setlk{Ino: f, Lock: fsop.Lock{Type: typ, Start: start, End: end, Owner: 1}})
		e.Session, e.Number, e.Acked = 7, number, number-1
		if _, err := o.Execute(e, nil); err != want {
			t.Fatalf("type %d from %d to %d: %v, want %v", typ, start, end, err, want)
		}
	}
	set(fsop.EINVAL, fsop.LockWrite, 5, 4)
	set(fsop.EINVAL, fsop.LockWrite, 1<<63, 1<<64-1)
	set(nil, fsop.LockWrite, 0, 1<<64-1) // to the end, wherever that is
	set(nil, fsop.LockUnlock, 1, 1)      // two of one
	if n := len(o.locks[f]); n != 2 {
		t.Fatalf("%d locks, want 2", n)
	}
	// As if that had been done again and again.
	last := o.locks[f][1]
	for i := uint64(3); len(o.locks[f]) < maxInoLocks; i += 2 {
		l := last
		l.Start, l.End = i-1, i-1
		o.locks[f] = slices.Insert(o.locks[f], len(o.locks[f])-1, l)
		o.locks[f][len(o.locks[f])-1].Start = i + 1
	}
	set(fsop.ENOLCK, fsop.LockUnlock, 1<<40, 1<<40)
	set(nil, fsop.LockUnlock, 0, 0) // which leaves one less
	set(nil, fsop.LockUnlock, 1<<40, 1<<40)
	set(nil, fsop.LockUnlock, 0, 1<<64-1)
	if n := len(o.locks[f]); n != 0 {
		t.Errorf("%d locks are left", n)
	}
}

// A session of which nobody hears keeps nobody out. What another has locked
// meanwhile is lost to it: it changes the file no more until it has let go. What
// nobody wanted it has again when it comes back.
func TestLostLocks(t *testing.T) {
	o := newBrick(t)
	a, b := o.create(fsop.RootIno, "a"), o.create(fsop.RootIno, "b")
	const old, other = cluster.SessionID(1), cluster.SessionID(2)
	number := uint64(0)
	do := func(id cluster.SessionID, want error, op fsop.Op) *Result {
		t.Helper()
		number++
		r, err := o.as(id, number, 0, op)
		if err != want {
			t.Errorf("session %d: %s: %v, want %v", id, fsop.String(op), err, want)
		}
		return r
	}
	lock := func(id cluster.SessionID, ino fsop.Ino, flock bool, typ fsop.LockType, start, end uint64, want error) *Result {
		t.Helper()
		return do(id, want, &fsop.Setlk{Ino: ino, Lock: fsop.Lock{Owner: uint64(id) * 10, Flock: flock, Type: typ, Start: start, End: end}})
	}
	const w, r, u = fsop.LockWrite, fsop.LockRead, fsop.LockUnlock
	for _, flock := range []bool{false, true} {
		do(old, nil, &fsop.OpenSession{Client: "c"})
		do(other, nil, &fsop.OpenSession{Client: "c"})
		info, _ := o.info(old)
		lock(old, a, flock, w, 0, lockEnd, nil)
		lock(old, b, flock, r, 0, lockEnd, nil)
		lock(other, a, flock, w, 0, lockEnd, fsop.EAGAIN)
		if res := do(0, nil, &fsop.CloseSession{Session: uint64(old), Away: true}); len(res.Released) != 2 {
			t.Errorf("released %v", res.Released)
		}
		lock(other, a, flock, w, 3, 3, nil)
		lock(other, b, flock, r, 0, lockEnd, nil) // which a lock for reading does not mind
		do(other, nil, &fsop.Write{Ino: a, Data: []byte("new")})
		lock(other, a, flock, u, 0, lockEnd, nil)

		reopen := func() { do(old, nil, &fsop.OpenSession{Client: "c", Opened: info.Opened}) }
		reopen()
		if err := o.store.Locks(func(l meta.Lock) error { // as it will be after a crash
			if !slices.Contains(o.locks[l.Ino], l) {
				t.Errorf("the metadata has %+v", l)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		write := &fsop.Write{Ino: a, Data: []byte("old")}
		do(old, fsop.EIO, write)
		do(old, fsop.EIO, &fsop.Setattr{Ino: a, Valid: fsop.SetSize})
		do(old, fsop.EIO, &fsop.Fallocate{Ino: a, Len: 10})
		lock(old, a, flock, w, 100, 200, fsop.EIO)
		do(old, nil, &fsop.Setattr{Ino: a, Valid: fsop.SetMode, Mode: 0o600})
		do(old, nil, &fsop.Write{Ino: b, Data: []byte("old")})
		lock(other, b, flock, w, 0, lockEnd, fsop.EAGAIN)
		if got := string(o.contents(a)); got != "new" {
			t.Errorf("contents %q", got)
		}
		lock(old, a, flock, u, 0, lockEnd, nil)
		do(old, nil, write)
		lock(old, a, flock, w, 0, lockEnd, nil)
		do(0, nil, &fsop.CloseSession{Session: uint64(old)})
		do(0, nil, &fsop.CloseSession{Session: uint64(other)})
		if n := len(o.locks); n != 0 {
			t.Errorf("locks of no session: %v", o.locks)
		}
	}
}
