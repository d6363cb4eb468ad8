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

// until is up to when some client may still answer from a cache, as a page says.
func until(t *testing.T, runDir string) int64 {
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
	return lastLease(b)
}

// says fails the test unless a page waits for what began at some time since then, and not
// later than now, and lasts for d.
func says(t *testing.T, runDir, what string, then int64, d time.Duration) {
	t.Helper()
	now, end := clock(), until(t, runDir)
	if end < then+int64(d) || end > now+int64(d) {
		t.Errorf("%s: %v left, want %v of which at most %v are over", what, time.Duration(end-now), d, time.Duration(now-then))
	}
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
	then := clock()
	p := fresh(t, dir, 1, 0)
	says(t, dir, "a first life waits for what came before it", then, cluster.LeaseGuard)
	settled(t, p)
	if end := until(t, dir); end > clock() {
		t.Errorf("nobody has a lease, and the page says %v", time.Duration(end-clock()))
	}
	var a, b, again lessee
	give := func(l *lessee, id cluster.SessionID, d time.Duration) {
		t.Helper()
		if err := p.gives(l, id, d); err != nil {
			t.Fatal(err)
		}
	}
	then = clock()
	give(&a, 7, time.Hour)
	give(&a, 7, time.Second) // it never gets shorter
	give(&b, 8, time.Minute)
	give(&again, 7, 2*time.Hour) // the same session on another connection
	says(t, dir, "the longest", then, 2*time.Hour)
	if err := p.lapsed(&again); err != nil {
		t.Fatal(err)
	}
	says(t, dir, "after the second connection's word the first's", then, time.Hour)
	if err := p.lapsed(&a); err != nil {
		t.Fatal(err)
	}
	says(t, dir, "the other's", then, time.Minute)
	// More clients than there are slots count together.
	var many [pageSlots + 3]lessee
	for i := range many {
		then = clock()
		give(&many[i], cluster.SessionID(100+i), 3*time.Minute+time.Duration(i)*time.Second)
	}
	for i := range many {
		if err := p.lapsed(&many[i]); err != nil {
			t.Fatal(err)
		}
	}
	says(t, dir, "the last one's of those that had no slot", then, 3*time.Minute+(pageSlots+2)*time.Second)
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
			then, d := clock(), 500*time.Millisecond
			if err := p.gives(new(lessee), 7, d); err != nil {
				t.Fatal(err)
			}
			c.spoil(t, p)
			if !c.end {
				then, d = clock(), cluster.LeaseGuard
			}
			fresh(t, dir, 3, c.former)
			says(t, dir, "it waits", then, d)
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
