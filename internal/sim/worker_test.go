package sim_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"time"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica"
)

// wholeClient is a session that sends everything again, under its number, until it is answered.
type wholeClient struct {
	w      *whole
	id     cluster.SessionID
	number uint64
	turn   uint64
	at     *life
	s      *replica.Session
	epoch  cluster.Epoch
}

// workerID is the session of the one that changes things, which ends with the power of all.
const workerID = 1

// dark is panicked with by the worker when all have lost their power.
type dark struct{}

func (c *wholeClient) do(op fsop.Op) *fsop.Reply {
	do := proto.Do{Op: op}
	if op.Kind().Mutates() {
		c.number++
		do.Number, do.Acked = c.number, c.number
	}
	for began := time.Now(); time.Since(began) < time.Minute; {
		if c.w.dark.Load() && c.id == workerID {
			panic(dark{})
		}
		if c.s == nil && !c.attach() {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		do.Epoch = c.epoch
		ctx, cancel := context.WithTimeout(c.w.over, 2*time.Second)
		r := c.s.Do(ctx, &do)
		cancel()
		switch {
		case c.w.dark.Load() && c.id == workerID:
			panic(dark{})
		case c.at.dead.Load() || r.Status != proto.OK && r.Status != proto.Anew:
			c.s.Detach()
			c.s = nil
		case r.Status == proto.Anew:
			c.epoch = r.Epoch
		case r.Errno != 0:
			c.w.t.Errorf("%s: %v", fsop.String(op), r.Errno)
			return &fsop.Reply{}
		default:
			return &r.Reply
		}
	}
	c.w.t.Fatalf("%s: no answer for a minute; the set is %+v", fsop.String(op), c.w.config())
	return nil
}

func (c *wholeClient) attach() bool {
	c.turn++
	for i := range c.w.nodes {
		l := c.w.nodes[(i+int(c.turn))%len(c.w.nodes)].life()
		if l == nil {
			continue
		}
		ctx, cancel := context.WithTimeout(c.w.over, 2*time.Second)
		s, r := l.rep.Attach(ctx, "me", &proto.Attach{Session: c.id, Turn: c.turn, Client: "c"}, sink{})
		cancel()
		if r.Status == proto.OK && !l.dead.Load() {
			c.at, c.s, c.epoch = l, s, r.Epoch
			return true
		}
	}
	return false
}

// tree is every file with its contents, as a client sees them.
func (c *wholeClient) tree() string {
	var lines []string
	var list func(dir fsop.Ino, at string)
	list = func(dir fsop.Ino, at string) {
		for cookie := uint64(0); ; {
			r := c.do(&fsop.Readdir{Ino: dir, Cookie: cookie, Max: 64 << 10, Plus: true})
			if len(r.Entries) == 0 {
				return
			}
			for _, e := range r.Entries {
				cookie = e.Cookie
				name := path.Join(at, e.Name)
				if e.Attr.IsDir() {
					lines = append(lines, name+"/")
					list(e.Attr.Ino, name)
					continue
				}
				var data []byte
				for uint64(len(data)) < e.Attr.Size {
					part := c.do(&fsop.Read{Ino: e.Attr.Ino, Off: uint64(len(data)), Len: 1 << 20}).Data
					if len(part) == 0 {
						break
					}
					data = append(data, part...)
				}
				lines = append(lines, line(name, string(data)))
			}
		}
	}
	list(fsop.RootIno, "/")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// line is a file as a tree shows it.
func line(name, data string) string { return fmt.Sprintf("%s %d %08x", name, len(data), crc(data)) }

func crc(s string) (h uint32) {
	for i := range len(s) {
		h = h*16777619 ^ uint32(s[i])
	}
	return h
}

// wholeModel is what there should be.
type wholeModel struct {
	files map[string]string
	dirs  map[string]fsop.Ino
	inos  map[string]fsop.Ino
}

func (m *wholeModel) tree() string {
	var lines []string
	for name, data := range m.files {
		lines = append(lines, line(name, data))
	}
	for name := range m.dirs {
		if name != "/" {
			lines = append(lines, name+"/")
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// worker changes the file system, one change after the other, and remembers what it was after each.
type worker struct {
	c      *wholeClient
	m      wholeModel
	r      *rand.Rand
	past   []string // the tree after every change that was acknowledged, and the one under way
	acked  int      // so many of them
	synced int      // so many of them certainly survive everything
}

func newWorker(w *whole, r *rand.Rand) *worker {
	return &worker{
		c: &wholeClient{w: w, id: workerID}, r: r, past: []string{""}, acked: 1,
		m: wholeModel{files: map[string]string{}, dirs: map[string]fsop.Ino{"/": fsop.RootIno}, inos: map[string]fsop.Ino{}},
	}
}

// change carries out op, after which the tree is as the model says.
func (k *worker) change(op fsop.Op) fsop.Ino {
	k.past = append(k.past, k.m.tree())
	ino := k.c.do(op).Attr.Ino
	k.acked = len(k.past)
	return ino
}

func (k *worker) parent(name string) fsop.Node {
	return fsop.Node{Parent: k.m.dirs[path.Dir(name)], Name: path.Base(name), Mode: 0o755}
}

func (k *worker) mkdir(name string) {
	k.m.dirs[name] = 0
	k.m.dirs[name] = k.change(&fsop.Mkdir{Node: k.parent(name)})
}

func (k *worker) create(name string) {
	k.m.files[name] = ""
	k.m.inos[name] = k.change(&fsop.Create{Node: k.parent(name), Excl: true})
}

func (k *worker) write(name string, off, n int, sync bool) {
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(k.r.Uint32())
	}
	old := []byte(k.m.files[name])
	if len(old) < off+n {
		old = append(old, make([]byte, off+n-len(old))...)
	}
	copy(old[off:], data)
	k.m.files[name] = string(old)
	k.change(&fsop.Write{Ino: k.m.inos[name], Off: uint64(off), Data: data, Sync: sync})
	if sync {
		k.synced = k.acked
	}
}

func (k *worker) truncate(name string, n int) {
	k.m.files[name] = k.m.files[name][:n]
	k.change(&fsop.Setattr{Ino: k.m.inos[name], Valid: fsop.SetSize, Size: uint64(n)})
}

func (k *worker) fsync(name string) {
	k.c.do(&fsop.Fsync{Ino: k.m.inos[name]})
	k.synced = k.acked
}

func (k *worker) rename(from, to string) {
	a, b := k.parent(from), k.parent(to)
	k.m.files[to], k.m.inos[to] = k.m.files[from], k.m.inos[from]
	delete(k.m.files, from)
	delete(k.m.inos, from)
	k.change(&fsop.Rename{Parent: a.Parent, Name: a.Name, NewParent: b.Parent, NewName: b.Name})
}

func (k *worker) unlink(name string) {
	n := k.parent(name)
	delete(k.m.files, name)
	delete(k.m.inos, name)
	k.change(&fsop.Unlink{Parent: n.Parent, Name: n.Name})
}
