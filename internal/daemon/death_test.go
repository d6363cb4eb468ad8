package daemon

import (
	"context"
	"encoding/binary"
	"log/slog"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mortar/internal/cluster"
)

// left is for how long some client may still answer from a cache, as a page says.
func left(t *testing.T, runDir string) time.Duration {
	t.Helper()
	f, err := os.Open(pagePath(runDir))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := readPage(f)
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration(lastLease(b) - clock())
}

// fresh is a page of a life that no other came before.
func fresh(t *testing.T, dir string, boot, former uint64) *page {
	t.Helper()
	p, err := newPage(dir, boot, former)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.close)
	return p
}

// settled makes a page forget the time that former lives need.
func settled(t *testing.T, p *page) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.writeLocked(16, 0); err != nil {
		t.Fatal(err)
	}
}

// What a daemon leaves behind names every lease that it has given, until its client says
// that it has dropped what it had cached, or the time is over.
func TestPage(t *testing.T) {
	dir := t.TempDir()
	p := fresh(t, dir, 1, 0)
	if d := left(t, dir); d <= cluster.Lease || d > cluster.LeaseGuard {
		t.Errorf("a first life waits %v for what came before it, want %v", d, cluster.LeaseGuard)
	}
	settled(t, p)
	if d := left(t, dir); d > 0 {
		t.Errorf("nobody has a lease, and the page says %v", d)
	}
	var a, b, again lessee
	give := func(l *lessee, id cluster.SessionID, d time.Duration) {
		t.Helper()
		if err := p.gives(l, id, d); err != nil {
			t.Fatal(err)
		}
	}
	give(&a, 7, time.Hour)
	give(&a, 7, time.Second) // it never gets shorter
	give(&b, 8, time.Minute)
	give(&again, 7, 2*time.Hour) // the same session on another connection
	if d := left(t, dir); d < 119*time.Minute {
		t.Errorf("%v left, want two hours", d)
	}
	if err := p.lapsed(&again); err != nil {
		t.Fatal(err)
	}
	if d := left(t, dir); d < 59*time.Minute || d > time.Hour {
		t.Errorf("%v left after the second connection's word, want the first's hour", d)
	}
	if err := p.lapsed(&a); err != nil {
		t.Fatal(err)
	}
	if d := left(t, dir); d < 59*time.Second || d > time.Minute {
		t.Errorf("%v left, want the other's minute", d)
	}
	// More clients than there are slots count together.
	var many [pageSlots + 3]lessee
	for i := range many {
		give(&many[i], cluster.SessionID(100+i), 3*time.Minute+time.Duration(i)*time.Second)
	}
	for i := range many {
		if err := p.lapsed(&many[i]); err != nil {
			t.Fatal(err)
		}
	}
	if d := left(t, dir); d < 3*time.Minute {
		t.Errorf("%v left of those that had no slot, want the last one's", d)
	}
}

// The next life waits for the clients of the last one no longer than that one's page says,
// if it is that one's, of this clock, and over.
func TestFormerLeases(t *testing.T) {
	for _, c := range []struct {
		name   string
		former uint64
		spoil  func(t *testing.T, p *page)
		end    bool // the page counts
	}{
		{"the last life's", 1, func(t *testing.T, p *page) { p.close() }, true},
		{"that of another state directory", 2, func(t *testing.T, p *page) { p.close() }, false},
		{"of an unknown life", 0, func(t *testing.T, p *page) { p.close() }, false},
		{"of one that lives", 1, func(*testing.T, *page) {}, false},
		{"of before the machine was started", 1, func(t *testing.T, p *page) {
			if err := p.writeLocked(pageKernel, 1); err != nil {
				t.Fatal(err)
			}
			p.close()
		}, false},
		{"no page", 1, func(t *testing.T, p *page) {
			if err := p.f.Truncate(pageSize - 1); err != nil {
				t.Fatal(err)
			}
			p.close()
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			p := fresh(t, dir, 1, 0)
			settled(t, p)
			if err := p.gives(new(lessee), 7, 500*time.Millisecond); err != nil {
				t.Fatal(err)
			}
			c.spoil(t, p)
			fresh(t, dir, 3, c.former)
			if d := left(t, dir); (d <= 500*time.Millisecond) != c.end {
				t.Errorf("it waits %v", d)
			}
		})
	}
}

// A mount certifies nothing as long as the daemon lives, or one of its clients may answer
// from a cache, and takes back its own leases only.
func TestCertify(t *testing.T) {
	dir := t.TempDir()
	p := fresh(t, dir, 5, 0)
	settled(t, p)
	for id := range cluster.SessionID(2) {
		if err := p.gives(new(lessee), 7+id, 10*time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	c := &certifier{stateDir: t.TempDir(), runDir: dir, log: slog.New(slog.DiscardHandler), ctx: t.Context()}
	try := func() string {
		t.Helper()
		f, err := os.OpenFile(pagePath(dir), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := clearSlot(f, 7); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*lookEvery)
		defer cancel()
		return c.certify(ctx, f).Error()
	}
	if why := try(); why != "it lives" {
		t.Errorf("of a daemon that lives: %s", why)
	}
	p.close()
	if why := try(); why != "its clients have leases" {
		t.Errorf("of a daemon with a client that is elsewhere: %s", why)
	}
	f, err := os.OpenFile(pagePath(dir), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := clearSlot(f, 8); err != nil {
		t.Fatal(err)
	}
	// Now it would say so, if this machine belonged to a pool.
	if why := try(); why == "it lives" || why == "its clients have leases" {
		t.Errorf("of a dead daemon without clients: %s", why)
	}
	if b, err := readPage(f); err != nil || binary.LittleEndian.Uint64(b[8:]) != 5 {
		t.Errorf("the page is no longer life 5's: %v", err)
	}
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		t.Error("somebody holds the lock of a dead daemon")
	}
}

// A certificate counts only against the life that was let in last.
func TestDiedIsOfOneLife(t *testing.T) {
	l := &links{lives: map[cluster.PeerID]uint64{}}
	peer := cluster.NewID()
	told := 0
	say := func(boot uint64) bool { return l.died(peer, boot, func() { told++ }) }
	if say(0) || say(1) {
		t.Error("the death of a peer counts that nobody has heard of")
	}
	l.lives[peer] = 1
	if !say(1) || told != 1 {
		t.Error("the death of the last life does not count")
	}
	l.lives[peer] = 2
	if say(1) || told != 1 {
		t.Error("the death of a former life counts against the next")
	}
}
