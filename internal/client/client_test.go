package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/estate"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

func createOp(name string) fsop.Op {
	return &fsop.Create{Node: fsop.Node{Parent: 1, Name: name}, Excl: true}
}

// TestExactlyOnce makes files through connections that are cut at any moment, by
// daemons that come and go. Each is made once, and each caller is told so.
func TestExactlyOnce(t *testing.T) { synctest.Test(t, testExactlyOnce) }

func testExactlyOnce(t *testing.T) {
	s := newSet(t, 3)
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(1, 1))
	s.cutReply = func(do *proto.Do) bool {
		mu.Lock()
		defer mu.Unlock()
		return do.Number != 0 && rng.IntN(30) == 0
	}
	c := newClient(t, s, &fakeKernel{})
	awaitReady(t, c)
	stop := make(chan struct{})
	var cutter sync.WaitGroup
	cutter.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(30 * time.Millisecond):
				s.daemons[i%3].cut()
			}
		}
	})
	const workers, each = 8, 50
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				name := fmt.Sprintf("%d-%d", w, i)
				if _, err := c.Do(t.Context(), createOp(name)); err != nil {
					t.Errorf("create %s: %v", name, err)
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	cutter.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.names) != workers*each {
		t.Errorf("%d files, want %d", len(s.names), workers*each)
	}
	for n, times := range s.executed {
		if times != 1 {
			t.Errorf("number %d carried out %d times", n, times)
		}
	}
}

// TestGivenUp gives up changes while their answers are being cut off. They are
// resolved without their callers, and the numbers behind them are acknowledged.
func TestGivenUp(t *testing.T) { synctest.Test(t, testGivenUp) }

func testGivenUp(t *testing.T) {
	s := newSet(t, 2)
	k := &fakeKernel{}
	c := newClient(t, s, k)
	awaitReady(t, c)
	for _, d := range s.daemons {
		d.set(func() { d.mute = true })
	}
	ctx, cancel := context.WithCancel(t.Context())
	data := bytes.Repeat([]byte("x"), 100000)
	errs := make(chan error, 2)
	go func() { _, err := c.Do(ctx, createOp("given-up")); errs <- err }()
	go func() { _, err := c.Do(ctx, &fsop.Write{Ino: 5, Data: data}); errs <- err }()
	eventually(t, "both sent", func() bool {
		c.mu.Lock()
		h := c.home
		c.mu.Unlock()
		return h == nil || h.inflight.Load() == 2
	})
	cancel()
	for range 2 {
		if err := <-errs; !errors.Is(err, context.Canceled) {
			t.Errorf("given up: %v", err)
		}
	}
	for i := range data {
		data[i] = 'y' // the caller's buffer is his again
	}
	for _, d := range s.daemons {
		d.set(func() { d.mute = false })
		d.cut()
	}
	eventually(t, "resolved", func() bool { return c.numbers.Acked() == 3 })
	s.mu.Lock()
	made := maps.Clone(s.names)
	var wrote []byte
	for _, r := range s.answers {
		if r.Reply.Attr.Ino == 5 {
			wrote = r.Reply.Data
		}
	}
	s.mu.Unlock()
	if len(made) != 1 {
		t.Errorf("names: %v", made)
	}
	if wrote != nil && wrote[0] != 'x' {
		t.Error("the write took bytes that its caller had taken back")
	}
	// The kernel, which was told nothing, forgets what it believed of the name.
	eventually(t, "taken back", func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		return slices.Contains(k.effects, proto.Effect{Ino: 1, Name: "given-up"})
	})
	// The inode that nobody was told of is forgotten.
	eventually(t, "forgotten", func() bool {
		for _, d := range s.daemons {
			d.mu.Lock()
			n := len(d.forgets)
			d.mu.Unlock()
			if n > 0 {
				return true
			}
		}
		return false
	})
}

// TestLockTakenBack gives up a wait for a lock. The set is asked for the same without
// waiting, under the same number, so that nothing waits for nobody; and whoever gave up
// is told if he has the lock.
func TestLockTakenBack(t *testing.T) {
	for _, c := range []struct {
		name  string
		errno fsop.Errno
		cut   bool // the connection, when the first copy of the second question has come
		want  error
	}{
		{"refused", fsop.EAGAIN, false, context.Canceled},
		{"granted", 0, false, nil},
		{"refused over a lost connection", fsop.EAGAIN, true, context.Canceled},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSet(t, 1)
				type asked struct {
					op     fsop.Setlk
					number uint64
				}
				var all []asked
				cut := c.cut
				s.setlk = func(op *fsop.Setlk, number uint64) (fsop.Errno, bool) {
					all = append(all, asked{*op, number})
					if op.Wait || cut {
						if cut && !op.Wait {
							cut = false
							go s.daemons[0].cut()
						}
						return 0, true
					}
					return c.errno, false
				}
				cl := newClient(t, s, &fakeKernel{})
				awaitReady(t, cl)
				ctx, cancel := context.WithCancel(t.Context())
				op := fsop.Setlk{Ino: 7, Lock: fsop.Lock{Owner: 3, Type: fsop.LockWrite, Start: 5, End: 9}, Wait: true}
				result := make(chan error, 1)
				go func() { _, err := cl.Do(ctx, &op); result <- err }()
				count := func() int { s.mu.Lock(); defer s.mu.Unlock(); return len(all) }
				eventually(t, "it waits", func() bool { return count() == 1 })
				cancel()
				if err := <-result; !errors.Is(err, c.want) {
					t.Errorf("%v, want %v", err, c.want)
				}
				if !op.Wait {
					t.Error("the caller's operation was changed")
				}
				s.mu.Lock()
				defer s.mu.Unlock()
				want := op
				want.Wait = false
				for i, a := range all[1:] {
					if a.op != want || a.number != all[0].number {
						t.Errorf("asked for the %d. time: %+v", i+2, a)
					}
				}
				if n := len(all); n != 2 && !c.cut || n != 3 && c.cut {
					t.Errorf("asked %d times", n)
				}
				if n := cl.numbers.Acked(); n != all[0].number+1 {
					t.Errorf("all below %d are answered", n)
				}
			})
		})
	}
}

// TestAbandonedTmpfile gives up the making of a file without a name. Nobody will ever
// use it, so nobody else closes its window, without which it is not removed.
func TestAbandonedTmpfile(t *testing.T) { synctest.Test(t, testAbandonedTmpfile) }

func testAbandonedTmpfile(t *testing.T) {
	s := newSet(t, 1)
	c := newClient(t, s, &fakeKernel{})
	awaitReady(t, c)
	d := s.daemons[0]
	d.set(func() { d.mute = true })
	ctx, cancel := context.WithCancel(t.Context())
	errs := make(chan error, 1)
	go func() { _, err := c.chain.Do(ctx, &fsop.Tmpfile{Node: fsop.Node{Parent: 1}}); errs <- err }()
	eventually(t, "sent", func() bool { return c.home.inflight.Load() == 1 })
	cancel()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	d.set(func() { d.mute = false })
	d.cut()
	eventually(t, "the window is given up, and the file forgotten", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		d.mu.Lock()
		defer d.mu.Unlock()
		return slices.Equal(s.given, []fsop.Ino{1001}) && slices.Equal(d.forgets, []proto.Hold{{Ino: 1001, N: 1}})
	})
	if _, err := c.Do(t.Context(), &fsop.Tmpfile{Node: fsop.Node{Parent: 1}}); err != fsop.EOPNOTSUPP {
		t.Errorf("by a client without windows: %v, want EOPNOTSUPP", err)
	}
}

// TestAbandonedLookup gives up a lookup: the hold that its answer counts goes back.
func TestAbandonedLookup(t *testing.T) { synctest.Test(t, testAbandonedLookup) }

func testAbandonedLookup(t *testing.T) {
	s := newSet(t, 1)
	c := newClient(t, s, &fakeKernel{})
	awaitReady(t, c)
	if _, err := c.Do(t.Context(), createOp("a")); err != nil {
		t.Fatal(err)
	}
	d := s.daemons[0]
	block := make(chan struct{})
	d.set(func() { d.block = block })
	ctx, cancel := context.WithCancel(t.Context())
	errs := make(chan error, 1)
	go func() { _, err := c.Do(ctx, &fsop.Lookup{Parent: 1, Name: "a"}); errs <- err }()
	eventually(t, "sent", func() bool { return c.home.inflight.Load() == 1 })
	cancel()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	d.set(func() { d.block = nil })
	close(block)
	eventually(t, "forgotten", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return len(d.forgets) == 1 && d.forgets[0] == proto.Hold{Ino: 1001, N: 1}
	})
}

// TestHomes has a session leave homes that end, fall silent, fall out of sync
// and send it away, with what its kernel holds, dropping its caches each time.
func TestHomes(t *testing.T) { synctest.Test(t, testHomes) }

func testHomes(t *testing.T) {
	s := newSet(t, 2)
	k := &fakeKernel{}
	for i := range 70000 {
		k.holds = append(k.holds, proto.Hold{Ino: fsop.Ino(i + 2), N: 1})
	}
	c := newClient(t, s, k)
	awaitReady(t, c)
	at := func() int {
		for i, d := range s.daemons {
			if d.attachedConns() == 1 {
				return i
			}
		}
		return -1
	}
	if at() != 0 {
		t.Fatalf("the first home is %d", at())
	}
	for _, leave := range []struct {
		name         string
		break_, mend func(d *fakeDaemon)
	}{
		{"ended", func(d *fakeDaemon) { d.stop() }, func(d *fakeDaemon) { d.start() }},
		{"silent", func(d *fakeDaemon) { d.set(func() { d.mute = true }) }, func(d *fakeDaemon) { d.set(func() { d.mute = false }) }},
		{"out of sync", func(d *fakeDaemon) { d.set(func() { d.inSync = false }) }, func(d *fakeDaemon) { d.set(func() { d.inSync = true }) }},
		{"no lease", func(d *fakeDaemon) { d.set(func() { d.serving = false }) }, func(d *fakeDaemon) { d.set(func() { d.serving = true }) }},
	} {
		was := at()
		drops := k.dropCount()
		began := time.Now()
		s.daemons[was].set(func() {
			s.daemons[was].goodbye = func() {
				if k.dropCount() == drops {
					t.Errorf("%s: it says good-bye before it has dropped its caches", leave.name)
				}
			}
		})
		leave.break_(s.daemons[was])
		eventually(t, leave.name+": another home", func() bool {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			if _, err := c.Do(ctx, &fsop.Getattr{Ino: 1}); err != nil {
				t.Fatalf("%s: %v", leave.name, err)
			}
			return at() >= 0 && at() != was
		})
		if d := time.Since(began); d > 2*time.Second {
			t.Errorf("%s: %v until the next home", leave.name, d)
		}
		if k.dropCount() == drops {
			t.Errorf("%s: caches were not dropped", leave.name)
		}
		d := s.daemons[at()]
		d.mu.Lock()
		a := d.attaches[len(d.attaches)-1]
		d.mu.Unlock()
		if len(a.Holds) != len(k.holds) || a.Session != c.Session() {
			t.Errorf("%s: attached with %d holds, want %d", leave.name, len(a.Holds), len(k.holds))
		}
		leave.mend(s.daemons[was])
		if leave.name != "out of sync" {
			continue // nobody is there to be told
		}
		eventually(t, "the home that sent it away is told that nothing is cached any more", func() bool {
			d := s.daemons[was]
			d.mu.Lock()
			defer d.mu.Unlock()
			return d.goodbyes == 1
		})
	}
}

// A home that knows an older epoch of the set than its client does is asked nothing: it would
// refuse what may be carried out in an epoch of which it has not heard.
func TestHomeIsBehind(t *testing.T) { synctest.Test(t, testHomeIsBehind) }

func testHomeIsBehind(t *testing.T) {
	s := newSet(t, 2)
	ahead, behind := s.daemons[0], s.daemons[1]
	ahead.set(func() { ahead.epoch = 3 })
	behind.set(func() { behind.epoch = 2 })
	c := newClient(t, s, &fakeKernel{})
	awaitReady(t, c)
	if n := ahead.attachedConns(); n != 1 {
		t.Fatalf("%d connections to the first home", n)
	}
	ahead.stop()
	made := make(chan error, 1)
	go func() {
		_, err := c.Do(t.Context(), &fsop.Create{Node: fsop.Node{Parent: 1, Name: "x"}})
		made <- err
	}()
	came := func() (n int) {
		behind.set(func() { n = len(behind.attaches) })
		return n
	}
	eventually(t, "it comes, goes and comes again", func() bool { return came() >= 2 })
	select {
	case err := <-made:
		t.Fatalf("a home that is behind was asked: %v", err)
	default:
	}
	behind.set(func() { behind.epoch = 3 })
	if err := <-made; err != nil {
		t.Error(err)
	}
}

// The next process of a mount knows the newest epoch that the one before it had heard of: changes that it asked
// for may be carried out in that one.
func TestHomeIsBehindWhatWasLeft(t *testing.T) { synctest.Test(t, testHomeIsBehindWhatWasLeft) }

func testHomeIsBehindWhatWasLeft(t *testing.T) {
	s := newSet(t, 1)
	home := s.daemons[0]
	home.set(func() { home.epoch = 3 })
	e, err := estate.New()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if err := e.SetInit(nil, nil); err != nil {
		t.Fatal(err)
	}
	before := New(Config{Volume: "v", Name: "test", Kernel: &fakeKernel{}, Dial: dialerOf(s), Addrs: []string{home.name + ":1"}, Estate: e})
	ctx, kill := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- before.Run(ctx) }()
	awaitReady(t, before)
	kill()
	<-ended
	left, err := estate.Read(e.Fd())
	if err != nil {
		t.Fatal(err)
	}

	came := func() (n int) {
		home.set(func() { n = len(home.attaches) })
		return n
	}
	home.set(func() { home.epoch = 2 }) // it was started again, from an older copy of the pool's state
	already := came()
	c := newClient(t, s, &fakeKernel{}, func(cfg *Config) { cfg.Left = left })
	eventually(t, "it comes, goes and comes again", func() bool { return came() >= already+2 })
	select {
	case <-c.Ready():
		t.Fatal("a home is taken that is behind what the former process had heard")
	default:
	}
	home.set(func() { home.epoch = 3 })
	awaitReady(t, c)
}

// TestGoesHome has a session begin elsewhere because its own machine's brick is
// not in sync, and go home when it is.
func TestGoesHome(t *testing.T) {
	s := newSet(t, 2)
	local := filepath.Join(t.TempDir(), "data.sock")
	l, err := net.Listen("unix", local)
	if err != nil {
		t.Fatal(err)
	}
	d := s.daemons[1]
	d.accept(l)
	d.set(func() { d.inSync = false })
	c := newClient(t, s, &fakeKernel{}, func(cfg *Config) { cfg.Local = local })
	awaitReady(t, c)
	if s.daemons[0].attachedConns() != 1 {
		t.Fatal("not at the replica in sync")
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for w := range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := c.Do(t.Context(), createOp(fmt.Sprint(w, "-", i))); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	looks := func() int { d.mu.Lock(); defer d.mu.Unlock(); return d.useless }
	asked := func() int { d.mu.Lock(); defer d.mu.Unlock(); return d.refused }
	// It looks, and need not ask: the daemon fails the test if it does. One look is over
	// when the next begins.
	s.mu.Lock()
	s.useless = true
	s.mu.Unlock()
	for n := range 2 {
		s.pushMap()
		eventually(t, "a look", func() bool { return looks() > n })
	}
	s.mu.Lock()
	s.useless = false
	s.mu.Unlock()
	first := asked()
	s.pushMap() // it looks, and is refused
	eventually(t, "asked", func() bool { return asked() > first })
	d.set(func() { d.inSync = true })
	s.pushMap()
	eventually(t, "home", func() bool { return d.attachedConns() == 1 && s.daemons[0].attachedConns() == 0 })
	eventually(t, "the home that was left is told that nothing is cached any more", func() bool {
		d := s.daemons[0]
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.goodbyes == 1
	})
	close(stop)
	wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	for n, times := range s.executed {
		if times != 1 {
			t.Errorf("number %d carried out %d times", n, times)
		}
	}
}

// TestDropBeforeAnswer holds DropAll up after a change of home: nothing is
// answered before it has returned.
func TestDropBeforeAnswer(t *testing.T) { synctest.Test(t, testDropBeforeAnswer) }

func testDropBeforeAnswer(t *testing.T) {
	s := newSet(t, 1)
	k := &fakeKernel{}
	c := newClient(t, s, k)
	awaitReady(t, c)
	gate := make(chan struct{})
	k.mu.Lock()
	k.inDrop = gate
	drops := k.drops
	k.mu.Unlock()
	s.daemons[0].cut()
	answered := make(chan error, 1)
	go func() { _, err := c.Do(t.Context(), &fsop.Getattr{Ino: 1}); answered <- err }()
	eventually(t, "dropping", func() bool { return k.dropCount() > drops })
	select {
	case err := <-answered:
		t.Fatalf("answered (%v) while caches were being dropped", err)
	case <-time.After(50 * time.Millisecond):
	}
	k.mu.Lock()
	k.inDrop = nil
	k.mu.Unlock()
	close(gate)
	if err := <-answered; err != nil {
		t.Fatal(err)
	}
}

// TestLease lets the lease run out at a home that goes on answering: the caches
// are dropped in time, and answers are not to be cached until the lease is back.
func TestLease(t *testing.T) { synctest.Test(t, testLease) }

func testLease(t *testing.T) {
	s := newSet(t, 1)
	k := &fakeKernel{}
	c := newClient(t, s, k)
	awaitReady(t, c)
	r, err := c.Do(t.Context(), &fsop.Getattr{Ino: 1})
	if err != nil || r.Seq == 0 {
		t.Fatalf("with a lease: %+v, %v", r, err)
	}
	d := s.daemons[0]
	drops := k.dropCount()
	d.set(func() { d.mute = true })
	silenced := monotonic()
	eventually(t, "dropped", func() bool { return k.dropCount() > drops })
	k.mu.Lock()
	late := k.droppedAt[len(k.droppedAt)-1] - silenced
	k.mu.Unlock()
	if late > cluster.LeaseGuard {
		t.Errorf("caches dropped %v after the last answer, the home waits %v", late, cluster.LeaseGuard)
	}
	d.set(func() { d.mute, d.serving = false, true })
	eventually(t, "a lease again", func() bool {
		r, err := c.Do(t.Context(), &fsop.Getattr{Ino: 1})
		return err == nil && r.Seq != 0
	})
}

// TestUncached asks before a pong and is answered after it: the answer may be
// older than what the home takes back, so it is not to be cached.
func TestUncached(t *testing.T) { synctest.Test(t, testUncached) }

func testUncached(t *testing.T) {
	s := newSet(t, 1)
	c := newClient(t, s, &fakeKernel{})
	awaitReady(t, c)
	d := s.daemons[0]
	block := make(chan struct{})
	d.set(func() { d.block = block })
	type answer struct {
		r   *fsop.Reply
		err error
	}
	got := make(chan answer, 1)
	go func() { r, err := c.Do(t.Context(), &fsop.Getattr{Ino: 1}); got <- answer{r, err} }()
	eventually(t, "sent", func() bool { return c.home.inflight.Load() == 1 })
	c.lapse("test") // and at the next pong the lease is back
	eventually(t, "granted", func() bool { return c.Leased() })
	d.set(func() { d.block = nil })
	close(block)
	a := <-got
	if a.err != nil || a.r.Seq != 0 {
		t.Errorf("got %+v, %v; want Seq 0", a.r, a.err)
	}
}

// TestInvals has invalidations carried out beside each other, each acknowledged
// by its own number when it is done and not before.
func TestInvals(t *testing.T) { synctest.Test(t, testInvals) }

func testInvals(t *testing.T) {
	s := newSet(t, 1)
	k := &fakeKernel{hold: make(chan struct{})}
	c := newClient(t, s, k)
	awaitReady(t, c)
	d := s.daemons[0]
	eventually(t, "attached", func() bool { return d.attachedConns() == 1 })
	d.inval(&proto.Inval{Seq: 7, Effects: []proto.Effect{{Ino: 1, Name: "a"}}})
	acks := func() int { d.mu.Lock(); defer d.mu.Unlock(); return len(d.acks) }
	if _, err := c.Do(t.Context(), &fsop.Getattr{Ino: 1}); err != nil { // in order behind it
		t.Fatal(err)
	}
	// The worker that carries it out need not have got that far.
	eventually(t, "7 is held", func() bool { k.mu.Lock(); defer k.mu.Unlock(); return k.begun == 1 })
	if acks() != 0 {
		t.Fatal("acknowledged before it was done")
	}
	eventually(t, "7 is being carried out", func() bool { k.mu.Lock(); defer k.mu.Unlock(); return k.held == 1 })
	k.mu.Lock()
	hold := k.hold
	k.hold = nil
	k.mu.Unlock()
	d.inval(&proto.Inval{Seq: 8, Effects: []proto.Effect{{Ino: 1, Name: "b"}}})
	eventually(t, "8 overtakes 7", func() bool { return acks() == 1 })
	close(hold)
	eventually(t, "7 acknowledged", func() bool { return acks() == 2 })
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.acks[0] != 8 || d.acks[1] != 7 {
		t.Errorf("acknowledged %v", d.acks)
	}
}

// TestForgets tells the home what the kernel forgot.
func TestForgets(t *testing.T) { synctest.Test(t, testForgets) }

func testForgets(t *testing.T) {
	s := newSet(t, 1)
	k := &fakeKernel{}
	c := newClient(t, s, k)
	awaitReady(t, c)
	k.mu.Lock()
	for i := range 40000 {
		k.forgot = append(k.forgot, proto.Hold{Ino: fsop.Ino(i + 2), N: 3})
	}
	k.mu.Unlock()
	d := s.daemons[0]
	eventually(t, "told", func() bool { d.mu.Lock(); defer d.mu.Unlock(); return len(d.forgets) == 40000 })
}

// TestLimit has the volume's io-timeout end what waits for a set that is away,
// and change with the map.
func TestLimit(t *testing.T) { synctest.Test(t, testLimit) }

func testLimit(t *testing.T) {
	s := newSet(t, 1)
	s.options = []proto.Option{{Key: cluster.OptIOTimeout, Value: "50ms"}}
	var mu sync.Mutex
	var told []map[string]string
	c := newClient(t, s, &fakeKernel{}, func(cfg *Config) {
		cfg.Options = func(o map[string]string) { mu.Lock(); told = append(told, o); mu.Unlock() }
	})
	awaitReady(t, c)
	d := s.daemons[0]
	d.set(func() { d.inSync = false })
	d.cut()
	if _, err := c.Do(t.Context(), &fsop.Getattr{Ino: 1}); err != fsop.EIO {
		t.Errorf("read: %v, want EIO", err)
	}
	if _, err := c.Do(t.Context(), createOp("late")); err != fsop.EIO {
		t.Errorf("change: %v, want EIO", err)
	}
	d.set(func() { d.inSync = true })
	eventually(t, "answers again", func() bool {
		_, err := c.Do(t.Context(), &fsop.Getattr{Ino: 1})
		return err == nil
	})
	s.mu.Lock()
	s.options = []proto.Option{{Key: cluster.OptIOTimeout, Value: "0s"}}
	s.mu.Unlock()
	s.pushMap()
	eventually(t, "the option is gone", func() bool { return c.ioLimit.Load() == 0 })
	mu.Lock()
	defer mu.Unlock()
	if len(told) != 2 || told[1][cluster.OptIOTimeout] != "0s" {
		t.Errorf("told of options: %v", told)
	}
}

// TestRefused ends Run when a volume cannot be mounted at all, and waits when
// time may help.
func TestRefused(t *testing.T) {
	for _, tc := range []struct {
		status proto.Status
		ends   bool
	}{{proto.UnknownSet, true}, {proto.Refused, true}, {proto.NotServing, false}} {
		t.Run(statusText(tc.status), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSet(t, 1)
				s.status = tc.status
				c := New(Config{Volume: "v", Addrs: []string{"d0:1"}, Dial: dialerOf(s)})
				ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
				defer cancel()
				err := c.Run(ctx)
				var r *refusal
				if ended := errors.As(err, &r); ended != tc.ends {
					t.Errorf("Run: %v", err)
				}
				if _, err := c.Do(t.Context(), &fsop.Getattr{Ino: 1}); err != ErrClosed {
					t.Errorf("Do after Run: %v", err)
				}
			})
		})
	}
}

// TestCloses closes the session when Run ends.
func TestCloses(t *testing.T) { synctest.Test(t, testCloses) }

func testCloses(t *testing.T) {
	s := newSet(t, 1)
	c := New(Config{Volume: "v", Addrs: []string{"d0:1"}, Dial: dialerOf(s)})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	awaitReady(t, c)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Run: %v", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		t.Error("the session was left open")
	}
}
