package brick

import (
	"context"
	"errors"
	"testing"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
)

// as executes op for a session, under a number, a while after the last entry.
func (o *opened) as(id cluster.SessionID, number uint64, after time.Duration, op fsop.Op) (*Result, error) {
	e := o.entry(op)
	e.Session, e.Number, e.Time = id, number, e.Time+int64(after)
	return o.Execute(e, nil)
}

// info is what the brick says of a session.
func (o *opened) info(id cluster.SessionID) (SessionInfo, bool) {
	for _, s := range o.Sessions() {
		if s.ID == id {
			return s, true
		}
	}
	return SessionInfo{}, false
}

// A session that nobody has heard of loses its locks and windows, but not the
// memory of what it was answered. One that has ended is never opened again.
func TestSessionThatWasAway(t *testing.T) {
	b := newBrick(t)
	open := func(id cluster.SessionID, opened int64, owner string) error {
		_, err := b.as(id, 0, 0, &fsop.OpenSession{Client: "c", Owner: owner, Opened: opened})
		return err
	}
	if err := open(1, 0, "me"); err != nil {
		t.Fatal(err)
	}
	info, _ := b.info(1)
	made, err := b.as(1, 1, 0, &fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: "f", Mode: 0o644}, Window: fsop.WindowAsk})
	if err != nil || !made.Reply.Window {
		t.Fatalf("%+v, %v; want a window", made, err)
	}
	ino := made.Reply.Attr.Ino
	windows := func() (all []uint64) {
		t.Helper()
		for _, op := range []fsop.Op{&fsop.Getattr{Ino: ino}, &fsop.Lookup{Parent: fsop.RootIno, Name: "f"}, &fsop.Getlk{Ino: ino}} {
			r, _, err := b.Read(context.Background(), op)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, r.Attr.Window)
		}
		for range 2 { // from the KV, and from the cache
			r, _, err := b.Read(context.Background(), &fsop.Readdir{Ino: fsop.RootIno, Plus: true, Max: 1 << 16})
			if err != nil || len(r.Entries) != 1 {
				t.Fatalf("%+v, %v", r, err)
			}
			all = append(all, r.Entries[0].Attr.Window)
		}
		return all
	}
	expect := func(when string, want uint64) {
		t.Helper()
		for i, w := range windows() {
			if w != want {
				t.Errorf("%s, answer %d says that session %d holds the window, want %d", when, i, w, want)
			}
		}
	}
	expect("at first", 1)
	if _, err := b.as(0, 0, 0, &fsop.CloseSession{Session: 1, Away: true}); err != nil {
		t.Fatal(err)
	}
	expect("while the session is away", 0)
	b.cache.clear()
	expect("while the session is away, from the KV", 0)
	if _, err := b.as(1, 2, 0, &fsop.Mkdir{Node: fsop.Node{Parent: fsop.RootIno, Name: "d", Mode: 0o755}}); !errors.Is(err, fsop.ENOTCONN) {
		t.Errorf("a session that is away may do something: %v", err)
	}
	if err := open(1, info.Opened, "another"); !errors.Is(err, fsop.EPERM) {
		t.Errorf("opened by another client: %v, want EPERM", err)
	}
	if err := open(1, info.Opened+1, "me"); !errors.Is(err, fsop.ESTALE) {
		t.Errorf("opened as another session of that id: %v, want ESTALE", err)
	}
	if err := open(1, info.Opened, "me"); err != nil {
		t.Fatal(err)
	}
	expect("after it came back", 0)
	again, err := b.as(1, 1, 0, &fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: "f", Mode: 0o644}, Excl: true})
	if err != nil || !again.Dup || again.Reply.Attr.Ino != ino {
		t.Errorf("what it asked before: %+v, %v; want the old answer", again, err)
	}
	if now, _ := b.info(1); now != info {
		t.Errorf("it is %+v now, and was %+v", now, info)
	}
	// For a day it is remembered; then others take its room.
	if _, err := b.as(0, 0, 0, &fsop.CloseSession{Session: 1, Away: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.as(2, 0, 23*time.Hour, &fsop.OpenSession{Client: "c"}); err != nil {
		t.Fatal(err)
	}
	if now, known := b.info(1); !known || !now.Away {
		t.Errorf("after 23 hours: %+v, %v", now, known)
	}
	if _, err := b.as(3, 0, 2*time.Hour, &fsop.OpenSession{Client: "c"}); err != nil {
		t.Fatal(err)
	}
	if now, known := b.info(1); known {
		t.Errorf("after 25 hours: %+v", now)
	}
	if err := open(1, info.Opened, "me"); !errors.Is(err, fsop.ESTALE) {
		t.Errorf("an ended session was opened again: %v", err)
	}
}

// However many sessions go away, a bounded number is remembered, the latest.
func TestManySessionsAway(t *testing.T) {
	b := newBrick(t)
	for i := range awayMost + 20 {
		id := cluster.SessionID(i + 1)
		if _, err := b.as(id, 0, 0, &fsop.OpenSession{Client: "c"}); err != nil {
			t.Fatal(err)
		}
		if _, err := b.as(0, 0, 0, &fsop.CloseSession{Session: uint64(id), Away: true}); err != nil {
			t.Fatal(err)
		}
	}
	all := b.Sessions()
	if len(all) > awayMost+1 || all[len(all)-1].ID != awayMost+20 {
		t.Errorf("%d sessions are remembered, the last is %+v", len(all), all[len(all)-1])
	}
}
