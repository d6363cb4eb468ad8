package client

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"mortar/internal/fsop"
	"mortar/internal/fsop/memfs"
	"mortar/internal/proto"
)

// commons is a set that several sessions share. It keeps windows as replicas and
// their primary do, and takes its time.
type commons struct {
	t       *testing.T
	mu      sync.Mutex
	changed sync.Cond
	held    map[fsop.Ino]uint64
	members map[uint64]*member
	free    map[uint64][]map[fsop.Ino]bool // numbers that are reserved, by session
	rng     *rand.Rand
	fail    error         // of the next Make
	scarce  bool          // a limit is near: windows are not to be had
	opened  int           // windows given by OpenWindow
	slow    bool          // some answers take seconds
	wait    chan struct{} // the next Make waits for it, if set
	ops     map[fsop.Kind]int
	asked   int // recalls
	wg      sync.WaitGroup
}

// member is one session: its windows, and what its mount would know of names.
type member struct {
	c     *commons
	id    uint64
	below fsop.Handler // its session of the file system
	w     *windows
	lost  []proto.Effect

	mu     sync.Mutex
	whole  map[fsop.Ino]map[string]bool
	absent map[fsop.Place]bool        // names that a look did not find, and nobody has made since; true: about to be made here
	gone   int                        // counts what was taken back
	locks  map[fsop.Ino]chan struct{} // of directories, as the kernel has them; held with a token in it
}

// Invalidate implements memfs.Cache.
func (m *member) Invalidate(_ context.Context, _ uint64, effects []proto.Effect) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.gone++
	for _, e := range effects {
		delete(m.whole, e.Ino)
		for p := range m.absent {
			if p.Dir == e.Ino && (e.Names || p.Name == e.Name) {
				delete(m.absent, p)
			}
		}
	}
	return nil
}

// vacant is as Kernel's.
func (m *member) vacant(dir fsop.Ino, name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.whole[dir] != nil || m.absent[fsop.Place{Dir: dir, Name: name}]
}

// look looks a name up, as the kernel does before it makes a file.
func (m *member) look(dir fsop.Ino, name string) {
	m.mu.Lock()
	known, gone := m.whole[dir] != nil, m.gone
	m.mu.Unlock()
	if known {
		return
	}
	_, err := m.do(&fsop.Lookup{Parent: dir, Name: name})
	m.mu.Lock()
	defer m.mu.Unlock()
	if errors.Is(err, fsop.ENOENT) && m.gone == gone {
		m.absent[fsop.Place{Dir: dir, Name: name}] = false
	}
}

func withCommons(t *testing.T, seed uint64, n int, f func(c *commons, m []*member)) {
	synctest.Test(t, func(t *testing.T) {
		c := &commons{
			t: t, held: map[fsop.Ino]uint64{}, members: map[uint64]*member{}, free: map[uint64][]map[fsop.Ino]bool{},
			rng: rand.New(rand.NewPCG(seed, 5)), ops: map[fsop.Kind]int{},
		}
		c.changed.L = &c.mu
		ctx, cancel := context.WithCancel(context.Background())
		fs := memfs.New()
		var wg sync.WaitGroup
		var all []*member
		for i := range n {
			m := &member{c: c, id: uint64(i + 1), whole: map[fsop.Ino]map[string]bool{}, absent: map[fsop.Place]bool{}, locks: map[fsop.Ino]chan struct{}{}}
			m.below = fs.Session(m)
			m.w = newWindows(fsop.HandlerFunc(m.ask), func() uint64 { return m.id })
			m.w.hooks.vacant = m.vacant
			m.w.hooks.lost = func(e []proto.Effect) { m.lost = append(m.lost, e...) }
			c.members[m.id] = m
			all = append(all, m)
			wg.Go(func() { _ = m.w.Run(ctx) })
		}
		f(c, all)
		for _, m := range all {
			m.w.drainAll(ctx)
		}
		c.wg.Wait()
		cancel()
		wg.Wait()
	})
}

// count returns how often each operation came since the last count.
func (c *commons) count() map[fsop.Kind]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.ops
	c.ops = map[fsop.Kind]int{}
	return n
}

func (c *commons) pause() {
	c.mu.Lock()
	d := time.Duration(c.rng.IntN(2000)) * time.Microsecond
	if c.slow && c.rng.IntN(200) == 0 {
		d = 3 * time.Second // an answer may be overtaken by anything
	}
	c.mu.Unlock()
	time.Sleep(d)
}

// ask is what the session asks of the set.
func (m *member) ask(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
	m.c.pause()
	if op.Kind() == fsop.KindMake {
		m.c.mu.Lock()
		wait := m.c.wait
		m.c.wait = nil
		m.c.mu.Unlock()
		if wait != nil {
			<-wait
		}
	}
	reply, err := m.c.do(ctx, m, op)
	m.c.pause()
	return reply, err
}

func (c *commons) do(ctx context.Context, m *member, op fsop.Op) (*fsop.Reply, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ops[op.Kind()]++
	for {
		ino := c.shut(ctx, m, op)
		if ino == 0 {
			break
		}
		holder := c.members[c.held[ino]]
		c.asked++
		c.wg.Go(func() { holder.w.Recall(ino) })
		stop := time.AfterFunc(200*time.Millisecond, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.changed.Broadcast()
		})
		c.changed.Wait()
		stop.Stop()
	}
	var window fsop.Window
	switch op := op.(type) {
	case *fsop.OpenWindow:
		r, err := m.below.Do(ctx, &fsop.Getattr{Ino: op.Ino})
		if err != nil {
			return nil, err
		}
		switch h := c.held[op.Ino]; {
		case c.scarce:
		case h == 0:
			for _, o := range c.members {
				if o != m {
					_ = o.Invalidate(ctx, 0, []proto.Effect{{Ino: op.Ino, Names: true}})
				}
			}
			c.opened++
			c.held[op.Ino] = m.id
			r.Window = true
		default:
			r.Window = h == m.id
		}
		return r, nil
	case *fsop.CloseWindow:
		if c.held[op.Ino] == m.id {
			delete(c.held, op.Ino)
			c.changed.Broadcast()
		}
		return &fsop.Reply{}, nil
	case *fsop.Make:
		if c.fail != nil {
			err := c.fail
			c.fail = nil
			return nil, err
		}
		ok := false
		for _, r := range c.free[m.id] {
			ok = ok || r[op.First.Ino]
			delete(r, op.First.Ino)
		}
		if !ok || c.held[op.Parent] != m.id {
			c.t.Errorf("%s: number reserved %v, window held %v", fsop.String(op), ok, c.held[op.Parent] == m.id)
			return nil, fsop.EIO
		}
		window = op.First.Window
	case *fsop.Create:
		window = op.Window
	case *fsop.Mkdir:
		window = op.Window
	case *fsop.Write:
		window = op.Window
		if window&fsop.WindowHeld != 0 && c.held[op.Ino] != m.id {
			c.t.Errorf("%s: its window is not held", fsop.String(op))
			return nil, fsop.EIO
		}
	case *fsop.Setattr:
		window = op.Window
	}
	// The lock of the commons stands for the order of the log.
	reply, err := m.below.Do(ctx, op)
	if err != nil {
		return nil, err
	}
	ino := reply.Attr.Ino
	if op.Kind() == fsop.KindMkdir {
		m.mu.Lock()
		m.whole[ino] = map[string]bool{} // until somebody else changes it
		m.mu.Unlock()
	}
	switch {
	case op.Kind() == fsop.KindMake:
		if window&fsop.WindowAsk != 0 {
			c.held[ino] = m.id
		}
		reply.Window = !c.scarce
	case op.Kind() == fsop.KindReserve:
		r := map[fsop.Ino]bool{}
		for i := range fsop.ReserveCount {
			r[fsop.Ino(reply.Off)+fsop.Ino(i)] = true
		}
		all := append(c.free[m.id], r)
		c.free[m.id] = all[max(0, len(all)-fsop.ReserveKept):]
	case window&fsop.WindowDone != 0 && c.held[ino] == m.id:
		delete(c.held, ino)
		c.changed.Broadcast()
	case window&fsop.WindowAsk != 0 && !c.scarce && (c.held[ino] == 0 || c.held[ino] == m.id):
		c.held[ino] = m.id
		reply.Window = true
	}
	return reply, nil
}

// shut returns what keeps op from being carried out.
func (c *commons) shut(ctx context.Context, m *member, op fsop.Op) fsop.Ino {
	var inos, gone []fsop.Ino
	child := func(dir fsop.Ino, name string, to *[]fsop.Ino) {
		if r, err := m.below.Do(ctx, &fsop.Lookup{Parent: dir, Name: name}); err == nil {
			*to = append(*to, r.Attr.Ino)
		}
	}
	switch op := op.(type) {
	case *fsop.Lookup:
		inos = append(inos, op.Parent)
		child(op.Parent, op.Name, &inos)
	case *fsop.Create:
		inos = append(inos, op.Parent)
	case *fsop.Mkdir:
		inos = append(inos, op.Parent)
	case *fsop.Unlink:
		inos = append(inos, op.Parent)
	case *fsop.Rmdir:
		inos = append(inos, op.Parent)
		child(op.Parent, op.Name, &gone)
	case *fsop.Rename:
		inos = append(inos, op.Parent, op.NewParent)
		child(op.NewParent, op.NewName, &gone)
	case *fsop.Readdir:
		inos = append(inos, op.Ino)
		if r, err := m.below.Do(ctx, op); err == nil {
			for _, e := range r.Entries {
				inos = append(inos, e.Ino)
			}
		}
	case *fsop.Getattr:
		inos = append(inos, op.Ino)
	case *fsop.Write:
		inos = append(inos, op.Ino)
	case *fsop.Setattr:
		inos = append(inos, op.Ino)
	}
	for _, ino := range inos {
		if h := c.held[ino]; h != 0 && h != m.id {
			return ino
		}
	}
	for _, ino := range gone { // its own session does not know which directory it is
		if c.held[ino] != 0 {
			return ino
		}
	}
	return 0
}

// lock is what the kernel does to directories while it changes them.
func (m *member) lock(dirs ...fsop.Ino) (unlock func()) {
	slices.Sort(dirs)
	dirs = slices.Compact(dirs)
	var locks []chan struct{}
	m.mu.Lock()
	for _, d := range dirs {
		if m.locks[d] == nil {
			m.locks[d] = make(chan struct{}, 1)
		}
		locks = append(locks, m.locks[d])
	}
	m.mu.Unlock()
	for _, l := range locks {
		l <- struct{}{}
	}
	return func() {
		for _, l := range locks {
			<-l
		}
	}
}

func (m *member) do(op fsop.Op) (*fsop.Reply, error) { return m.w.Do(context.Background(), op) }

// note notes that a name may be in a directory from now on, and reports whether it
// was certainly absent.
func (m *member) note(dir fsop.Ino, name string) (absent bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	names := m.whole[dir]
	if names == nil {
		p := fsop.Place{Dir: dir, Name: name}
		making, found := m.absent[p]
		if delete(m.absent, p); found && !making {
			m.absent[p] = true
			return true
		}
		return false
	}
	was := names[name]
	names[name] = true
	return !was
}

func (m *member) mkdir(dir fsop.Ino, name string) (fsop.Ino, error) {
	defer m.lock(dir)()
	m.note(dir, name)
	reply, err := m.do(&fsop.Mkdir{Node: fsop.Node{Parent: dir, Name: name, Mode: 0o755}})
	if err != nil {
		return 0, err
	}
	return reply.Attr.Ino, nil
}

// create makes a file as the kernel and a mount do.
func (m *member) create(dir fsop.Ino, name string) (ino fsop.Ino, foretold bool, err error) {
	defer m.lock(dir)()
	node := fsop.Node{Parent: dir, Name: name, Mode: 0o644}
	var op fsop.Op = &fsop.Create{Node: node, Excl: true}
	m.look(dir, name)
	if m.note(dir, name) {
		op = &fsop.Make{Node: node}
	}
	if m.c.slow { // much may happen between the two
		m.c.pause()
	}
	reply, err := m.do(op)
	if err != nil {
		return 0, false, err
	}
	return reply.Attr.Ino, reply.Attr.Change == 0, nil
}

func (m *member) save(dir fsop.Ino, name string, size int) error {
	ino, _, err := m.create(dir, name)
	if err != nil {
		return err
	}
	return m.fill(ino, size)
}

// fill writes to a file and closes it.
func (m *member) fill(ino fsop.Ino, size int) error {
	for off := 0; off < size; off += 40000 {
		if _, err := m.do(&fsop.Write{Ino: ino, Off: uint64(off), Data: make([]byte, min(size-off, 40000))}); err != nil {
			return fmt.Errorf("write: %w", err)
		}
	}
	if _, err := m.do(&fsop.Flush{Ino: ino}); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	return nil
}

// ownDir makes a directory in which m can foretell files.
func (m *member) ownDir(t *testing.T, name string) fsop.Ino {
	t.Helper()
	d, err := m.mkdir(fsop.RootIno, name)
	if err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	time.Sleep(10 * time.Second) // numbers are reserved
	m.w.mu.Lock()
	m.w.dirs[d].room(true)
	m.w.mu.Unlock()
	return d
}

func TestForetoldFileIsOneOperation(t *testing.T) {
	withCommons(t, 1, 1, func(c *commons, m []*member) {
		d := m[0].ownDir(t, "d")
		c.count()
		for i := range 600 { // more than two ranges
			began := time.Now()
			ino, foretold, err := m[0].create(d, fmt.Sprint(i))
			if err != nil || !foretold || time.Since(began) != 0 {
				t.Fatalf("file %d: foretold %v after %v, %v", i, foretold, time.Since(began), err)
			}
			// The kernel asks before it has opened the file.
			if r, err := m[0].do(&fsop.Getattr{Ino: ino}); err != nil || r.Attr.Mode&0o7777 != 0o644 || r.Seq != 0 {
				t.Fatalf("attributes of a foretold file: %+v, %v; want some that are not to be cached", r, err)
			}
			m[0].do(&fsop.Setattr{Ino: ino, Valid: fsop.SetMode, Mode: 0o600})
			r, err := m[0].do(&fsop.Flush{Ino: ino})
			if err != nil || r.Seq == 0 || r.Attr.Mode&0o7777 != 0o600 || r.Dir.Ino != d || r.Dir.Size != uint64(i+1) {
				t.Fatalf("close tells %+v, %v; want what it left of file and directory", r, err)
			}
		}
		if n := c.count(); n[fsop.KindMake] != 600 || n[fsop.KindSetattr]+n[fsop.KindWrite]+n[fsop.KindCreate]+n[fsop.KindCloseWindow] != 0 {
			t.Errorf("operations: %v", n)
		}
		r, err := m[0].below.Do(context.Background(), &fsop.Lookup{Parent: d, Name: "7"})
		if err != nil || r.Attr.Mode&0o7777 != 0o600 {
			t.Errorf("got %+v, %v", r, err)
		}
		if err := m[0].save(d, "large", 1<<20); err != nil {
			t.Fatal(err)
		}
		if r, err := m[0].below.Do(context.Background(), &fsop.Lookup{Parent: d, Name: "large"}); err != nil || r.Attr.Size != 1<<20 {
			t.Errorf("got %+v, %v", r, err)
		}
	})
}

// A number is not given up by the set while the Make that has it is on its way.
func TestNumbersWaitForTheirMake(t *testing.T) {
	withCommons(t, 7, 1, func(c *commons, m []*member) {
		d := m[0].ownDir(t, "d")
		wait := make(chan struct{})
		c.mu.Lock()
		c.wait = wait
		c.mu.Unlock()
		ino, foretold, err := m[0].create(d, "late")
		if err != nil || !foretold {
			t.Fatalf("foretold %v, %v", foretold, err)
		}
		time.Sleep(time.Second) // its Make is on its way
		plain := 0
		for i := range 3 * fsop.ReserveCount {
			ino, foretold, err := m[0].create(d, fmt.Sprint(i))
			if err == nil {
				err = m[0].fill(ino, 0)
			}
			if err != nil {
				t.Fatal(err)
			}
			if !foretold {
				plain++
			}
		}
		if plain == 0 {
			t.Error("all were foretold: the test shows nothing")
		}
		close(wait)
		if err := m[0].fill(ino, 10); err != nil {
			t.Error(err)
		}
	})
}

// What this machine asks about a foretold file, its name or its directory comes after its Make.
func TestForetoldIsSeenHere(t *testing.T) {
	for _, op := range []func(d, f fsop.Ino) (fsop.Op, error){
		func(d, f fsop.Ino) (fsop.Op, error) { return &fsop.Lookup{Parent: d, Name: "f"}, nil },
		func(d, f fsop.Ino) (fsop.Op, error) { return &fsop.Getattr{Ino: f}, nil },
		func(d, f fsop.Ino) (fsop.Op, error) { return &fsop.Unlink{Parent: d, Name: "f"}, nil },
		func(d, f fsop.Ino) (fsop.Op, error) {
			return &fsop.Rename{Parent: d, Name: "f", NewParent: fsop.RootIno, NewName: "g"}, nil
		},
		func(d, f fsop.Ino) (fsop.Op, error) { return &fsop.Link{Ino: f, Parent: d, Name: "g"}, nil },
		func(d, f fsop.Ino) (fsop.Op, error) { return &fsop.Setattr{Ino: f, Valid: fsop.SetSize}, nil },
		func(d, f fsop.Ino) (fsop.Op, error) {
			return &fsop.Create{Node: fsop.Node{Parent: d, Name: "f"}, Excl: true}, fsop.EEXIST
		},
		func(d, f fsop.Ino) (fsop.Op, error) {
			return &fsop.Mkdir{Node: fsop.Node{Parent: d, Name: "f"}}, fsop.EEXIST
		},
		func(d, f fsop.Ino) (fsop.Op, error) {
			return &fsop.Rmdir{Parent: fsop.RootIno, Name: "d"}, fsop.ENOTEMPTY
		},
		func(d, f fsop.Ino) (fsop.Op, error) {
			return &fsop.Rename{Parent: fsop.RootIno, Name: "e", NewParent: fsop.RootIno, NewName: "d"}, fsop.ENOTEMPTY
		},
	} {
		withCommons(t, 2, 1, func(c *commons, m []*member) {
			d := m[0].ownDir(t, "d")
			if _, err := m[0].mkdir(fsop.RootIno, "e"); err != nil {
				t.Fatal(err)
			}
			f, foretold, err := m[0].create(d, "f")
			if err != nil || !foretold {
				t.Fatalf("foretold %v, %v", foretold, err)
			}
			op, want := op(d, f)
			if _, err := m[0].do(op); !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", fsop.String(op), err, want)
			}
		})
	}
	withCommons(t, 3, 1, func(c *commons, m []*member) {
		d := m[0].ownDir(t, "d")
		m[0].create(d, "f")
		r, err := m[0].do(&fsop.Readdir{Ino: d, Max: 1000, Plus: true})
		if err != nil || len(r.Entries) != 1 {
			t.Errorf("listing: %+v, %v", r, err)
		}
		m[0].create(d, "g")
		r, err = m[0].do(&fsop.Getattr{Ino: d})
		if err != nil || r.Attr.Size != 2 {
			t.Errorf("the directory: %+v, %v", r, err)
		}
		// What says how the directory was before is not to be cached.
		m[0].create(d, "h")
		r, err = m[0].do(&fsop.Lookup{Parent: fsop.RootIno, Name: "d"})
		if err != nil || r.Seq != 0 {
			t.Errorf("attributes of a directory of foretold files may be cached: %+v, %v", r, err)
		}
	})
}

// Another session's look has everything told of sent first, and nothing more is
// foretold afterwards.
func TestForetoldIsSeenElsewhere(t *testing.T) {
	withCommons(t, 4, 2, func(c *commons, m []*member) {
		d := m[0].ownDir(t, "d")
		var inos []fsop.Ino
		for i := range 10 {
			ino, foretold, err := m[0].create(d, fmt.Sprint(i))
			if err != nil || !foretold {
				t.Fatalf("foretold %v, %v", foretold, err)
			}
			inos = append(inos, ino)
		}
		r, err := m[1].do(&fsop.Readdir{Ino: d, Max: 10000})
		if err != nil || len(r.Entries) != 10 {
			t.Errorf("seen elsewhere: %d entries, %v", len(r.Entries), err)
		}
		if _, foretold, err := m[0].create(d, "later"); err != nil || foretold {
			t.Errorf("after a recall: foretold %v, %v", foretold, err)
		}
		for _, ino := range inos {
			if err := m[0].fill(ino, 100); err != nil {
				t.Error(err)
			}
		}
	})
}

// When a limit is near, whoever makes a file waits for the answer.
func TestScarceRoomIsNotForetold(t *testing.T) {
	withCommons(t, 10, 1, func(c *commons, m []*member) {
		d := m[0].ownDir(t, "d")
		time.Sleep(2 * windowIdle)
		next := 0
		save := func() (foretold bool) {
			t.Helper()
			next++
			ino, foretold, err := m[0].create(d, fmt.Sprint(next))
			if err == nil {
				err = m[0].fill(ino, 100000)
			}
			if err != nil {
				t.Fatal(err)
			}
			return foretold
		}
		if save() {
			t.Error("foretold although the set had said for long nothing of limits")
		}
		if !save() {
			t.Error("not foretold although there is room")
		}
		c.mu.Lock()
		c.scarce = true
		c.mu.Unlock()
		if !save() {
			t.Error("not foretold although nobody had said that a limit is near")
		}
		for range 3 {
			if save() {
				t.Error("foretold although a limit is near")
			}
		}
		c.mu.Lock()
		c.scarce = false
		c.mu.Unlock()
		if save() || !save() {
			t.Error("want files foretold again from the second on, when there is room again")
		}
	})
}

// Another session may want a new directory's window back before its maker hears that
// it is there: nothing is foretold in it, however soon the maker goes on.
func TestRecallOvertakesTheReplyToMkdir(t *testing.T) {
	withCommons(t, 9, 1, func(c *commons, m []*member) {
		m[0].ownDir(t, "first")
		inner := m[0].w.next
		m[0].w.next = fsop.HandlerFunc(func(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
			r, err := inner.Do(ctx, op)
			if op.Kind() == fsop.KindMkdir && err == nil {
				m[0].w.Recall(r.Attr.Ino)
			}
			return r, err
		})
		for i := range 100 {
			d, err := m[0].mkdir(fsop.RootIno, fmt.Sprint(i))
			if err != nil {
				t.Fatal(err)
			}
			ino, foretold, err := m[0].create(d, "a")
			if err == nil {
				err = m[0].fill(ino, 10)
			}
			if foretold || err != nil {
				t.Fatalf("directory %d: foretold %v, %v", i, foretold, err)
			}
		}
	})
}

// A Make that fails is reported by close, and the kernel is told to forget.
func TestMakeFails(t *testing.T) {
	withCommons(t, 5, 1, func(c *commons, m []*member) {
		d := m[0].ownDir(t, "d")
		c.mu.Lock()
		c.fail = fsop.ENOSPC
		c.mu.Unlock()
		ino, foretold, err := m[0].create(d, "f")
		if err != nil || !foretold {
			t.Fatalf("foretold %v, %v", foretold, err)
		}
		if _, err := m[0].do(&fsop.Write{Ino: ino, Data: []byte("x")}); err != nil {
			t.Fatal(err)
		}
		if _, err := m[0].do(&fsop.Flush{Ino: ino}); err != fsop.ENOSPC {
			t.Errorf("close: %v", err)
		}
		if !slices.Contains(m[0].lost, proto.Effect{Ino: d, Name: "f"}) || !slices.Contains(m[0].lost, proto.Effect{Ino: ino}) {
			t.Errorf("the kernel was told to forget %v", m[0].lost)
		}
		if _, foretold, err := m[0].create(d, "g"); err != nil || foretold {
			t.Errorf("right after a failure: foretold %v, %v", foretold, err)
		}
	})
}

// A session that has moved does not rely on what it held before.
func TestForetoldMoves(t *testing.T) {
	withCommons(t, 6, 1, func(c *commons, m []*member) {
		d := m[0].ownDir(t, "d")
		ino, foretold, err := m[0].create(d, "f")
		if err != nil || !foretold {
			t.Fatalf("foretold %v, %v", foretold, err)
		}
		unused := 0
		m[0].w.hooks.unused = func(fsop.Ino) { unused++ }
		m[0].w.moved([]proto.Hold{{Ino: ino, N: 1}})
		if err := m[0].fill(ino, 10); err != nil {
			t.Error(err)
		}
		if unused != 1 {
			t.Errorf("a file that the kernel holds once was counted %d times too often", unused)
		}
		if _, foretold, err := m[0].create(d, "g"); err != nil || foretold {
			t.Errorf("after a move: foretold %v, %v", foretold, err)
		}
	})
}

// What an answer says of a directory may be from before a file that was made in it while
// the answer was on its way. Whoever caches it hears of the file first.
func TestDirectoryOfForetoldFiles(t *testing.T) {
	withCommons(t, 11, 1, func(c *commons, m []*member) {
		d := m[0].ownDir(t, "d")
		if err := m[0].save(d, "x", 0); err != nil {
			t.Fatal(err)
		}
		changed := uint64(0)
		m[0].w.hooks.made = func(dir fsop.Ino, seq uint64) {
			if dir == d {
				changed = max(changed, seq)
			}
		}
		done, late := make(chan struct{}), make(chan struct{})
		inner := m[0].w.next
		m[0].w.next = fsop.HandlerFunc(func(ctx context.Context, op fsop.Op) (*fsop.Reply, error) {
			r, err := inner.Do(ctx, op)
			if op.Kind() == fsop.KindUnlink {
				close(done)
				<-late
			}
			return r, err
		})
		ino, foretold, err := m[0].create(d, "f")
		if err != nil || !foretold {
			t.Fatalf("foretold %v, %v", foretold, err)
		}
		got := make(chan fsop.Attr)
		go func() {
			r, err := m[0].w.do(context.Background(), &fsop.Unlink{Parent: d, Name: "x"})
			if err != nil {
				t.Error(err)
			}
			got <- r.Dir
		}()
		<-done
		if err := m[0].fill(ino, 10); err != nil {
			t.Fatal(err)
		}
		close(late)
		if dir := <-got; dir.Ino != d || dir.Change >= changed {
			t.Errorf("the directory as the late answer has it, %+v, counts as of now: a file that was made at %d is not in it", dir, changed)
		}
	})
}

// TestCommons has three sessions make, rename and remove names in common
// directories. Nothing may fail but what the operation allows, and what was
// closed is there.
func TestCommons(t *testing.T) {
	seeds := 40
	if s := os.Getenv("COMMONS"); s != "" {
		seeds = 1000
	}
	foretold, asked, opened := 0, 0, 0
	for seed := range seeds {
		withCommons(t, uint64(seed), 3, func(c *commons, m []*member) {
			c.slow = true
			var mu sync.Mutex
			kept := map[string]fsop.Ino{} // names that nobody removes, and their directories
			dirs := []fsop.Ino{fsop.RootIno}
			var wg sync.WaitGroup
			for i := range 6 {
				me, rng := m[i%3], rand.New(rand.NewPCG(uint64(seed), uint64(i)))
				wg.Go(func() {
					dir := func() fsop.Ino {
						mu.Lock()
						defer mu.Unlock()
						return dirs[max(0, len(dirs)-1-rng.IntN(6))]
					}
					name := func() string { return string(rune('a' + rng.IntN(5))) }
					check := func(what string, err error, allowed ...fsop.Errno) {
						if err != nil && !slices.ContainsFunc(allowed, func(e fsop.Errno) bool { return errors.Is(err, e) }) {
							t.Errorf("seed %d: %s: %v", seed, what, err)
						}
					}
					for n := range 60 {
						if rng.IntN(15) == 0 { // and then somebody may be alone for a while
							time.Sleep(time.Duration(rng.IntN(4)) * time.Second)
						}
						switch k := rng.IntN(100); {
						case k < 8:
							d, err := me.mkdir(dir(), fmt.Sprintf("d%d-%d", i, n))
							check("mkdir", err, fsop.ENOENT)
							if err == nil {
								mu.Lock()
								dirs = append(dirs, d)
								mu.Unlock()
							}
						case k < 45:
							d, own := dir(), fmt.Sprintf("%d-%d", i, n)
							ino, early, err := me.create(d, own)
							check("create", err, fsop.ENOENT)
							if err != nil {
								continue
							}
							time.Sleep(time.Duration(rng.IntN(3)*rng.IntN(30)) * time.Millisecond)
							size := rng.IntN(3) * rng.IntN(50000)
							err = me.fill(ino, size)
							check("closing "+own, err)
							r, err := m[rng.IntN(3)].do(&fsop.Lookup{Parent: d, Name: own})
							check("looking "+own+" up", err)
							if err == nil && (r.Attr.Ino != ino || r.Attr.Size != uint64(size)) {
								t.Errorf("seed %d: %s is %d of %d bytes, want %d of %d", seed, own, r.Attr.Ino, r.Attr.Size, ino, size)
							}
							mu.Lock()
							kept[own] = d
							if early {
								foretold++
							}
							mu.Unlock()
						case k < 60:
							ino, _, err := me.create(dir(), name())
							check("make", err, fsop.EEXIST, fsop.ENOENT)
							if err == nil {
								check("filling", me.fill(ino, rng.IntN(5000)), fsop.ENOENT)
							}
						case k < 70:
							d := dir()
							func() {
								defer me.lock(d)()
								_, err := me.do(&fsop.Unlink{Parent: d, Name: name()})
								check("unlink", err, fsop.ENOENT)
							}()
						case k < 80:
							a, b, to := dir(), dir(), name()
							func() {
								defer me.lock(a, b)()
								me.note(b, to)
								_, err := me.do(&fsop.Rename{Parent: a, Name: name(), NewParent: b, NewName: to})
								check("rename", err, fsop.ENOENT)
							}()
						case k < 90:
							_, err := me.do(&fsop.Readdir{Ino: dir(), Max: 1 << 16, Plus: true})
							check("readdir", err)
						default:
							_, err := me.do(&fsop.Getattr{Ino: dir()})
							check("getattr", err)
						}
					}
				})
			}
			wg.Wait()
			for name, d := range kept {
				if _, err := m[0].do(&fsop.Lookup{Parent: d, Name: name}); err != nil {
					t.Errorf("seed %d: %s was closed: %v", seed, name, err)
				}
			}
			c.mu.Lock() // a window that was asked for last may just be given
			defer c.mu.Unlock()
			asked += c.asked
			opened += c.opened
		})
	}
	if foretold < 10*seeds || asked < 10*seeds || opened < 5*seeds {
		t.Errorf("%d files foretold, %d recalls, %d windows of directories that were there: the test shows nothing", foretold, asked, opened)
	}
}
