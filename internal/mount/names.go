package mount

import (
	"context"
	"encoding/binary"
	"hash/maphash"
	"sync"
	"time"

	"mortar/internal/fsop"
)

// givenNames is the set of names that the kernel may have cached, existing or
// not. Forgetting a name takes the directory's lock in the kernel, or all names
// of the mount; most names that another mount makes were never asked for here,
// and cost nothing.
//
// It keeps hashes; two names with one hash are forgotten for each other. A name
// stays for at least as long as the kernel may use it without asking again.
type givenNames struct {
	seed   maphash.Seed
	shards [16]givenShard
}

type givenShard struct {
	mu       sync.Mutex
	now, old map[uint64]bool // true: an existing name
	turned   time.Time       // when now became old and a new one began
	all      time.Time       // until when the kernel may have any name
}

// givenSlack is for clocks and ticks that are not the kernel's.
const givenSlack = 5 * time.Second

func newGivenNames() *givenNames {
	g := &givenNames{seed: maphash.MakeSeed()}
	for i := range g.shards {
		g.shards[i].now = make(map[uint64]bool)
		g.shards[i].turned = time.Now()
	}
	return g
}

func (g *givenNames) hash(dir fsop.Ino, name string) (uint64, *givenShard) {
	h := hashName(g.seed, dir, name)
	return h, &g.shards[h>>60]
}

func hashName(seed maphash.Seed, dir fsop.Ino, name string) uint64 {
	return maphash.String(seed, name) ^ uint64(dir)*0x9e3779b97f4a7c15
}

// add is called before it is decided for how long the kernel may keep the name;
// see the package documentation for why before.
func (g *givenNames) add(dir fsop.Ino, name string, exists bool, timeout time.Duration) {
	if timeout <= 0 {
		return
	}
	h, s := g.hash(dir, name)
	s.mu.Lock()
	defer s.mu.Unlock()
	if was, ok := s.now[h]; ok && (was || !exists) {
		return
	}
	if t := time.Now(); t.Sub(s.turned) > timeout+givenSlack {
		s.old, s.now, s.turned = s.now, make(map[uint64]bool), t
	}
	s.now[h] = s.now[h] || exists
}

// has says whether the kernel may have the name cached, and whether it may have
// it as existing.
func (g *givenNames) has(dir fsop.Ino, name string) (cached, exists bool) {
	h, s := g.hash(dir, name)
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.all.IsZero() && time.Now().Before(s.all) {
		return true, true
	}
	now, ok := s.now[h]
	old, was := s.old[h]
	return ok || was, now || old
}

// all notes that the kernel may have any name cached, from the process before this one.
func (g *givenNames) all(timeout time.Duration) {
	for i := range g.shards {
		s := &g.shards[i]
		s.mu.Lock()
		s.all = time.Now().Add(timeout + givenSlack)
		s.mu.Unlock()
	}
}

// nameCache has the names of known inodes, for which the kernel can be made to ask one
// by one. An inode's names are one string, since most have one: for each the
// directory in eight bytes, the length of the name in one, and the name.
type nameCache struct {
	mu    sync.Mutex
	names map[fsop.Ino]packedNames
}

func newNameCache() *nameCache { return &nameCache{names: make(map[fsop.Ino]packedNames)} }

func (c *nameCache) add(ino, dir fsop.Ino, name string) {
	if ino == 0 || tooLong(name) {
		return
	}
	var buf [nameHead + fsop.MaxName]byte
	packed := packName(buf[:0], dir, name)
	c.mu.Lock()
	defer c.mu.Unlock()
	if all := c.names[ino]; all.find(packed) < 0 {
		c.names[ino] = all + packedNames(packed)
	}
}

// remove says that the kernel has moved a name of ino to another one.
func (c *nameCache) remove(ino, dir fsop.Ino, name string) {
	var buf [nameHead + fsop.MaxName]byte
	packed := packName(buf[:0], dir, name)
	c.mu.Lock()
	defer c.mu.Unlock()
	all := c.names[ino]
	if at := all.find(packed); at >= 0 {
		c.names[ino] = all[:at] + all[at+len(packed):]
	}
}

// exchanged says that the kernel has moved ino from one name to the other, and what
// had that to the one.
func (c *nameCache) exchanged(ino fsop.Ino, one, other dirName) {
	var buf [nameHead + fsop.MaxName]byte
	packed := packName(buf[:0], other.dir, other.name)
	c.mu.Lock()
	var back []fsop.Ino
	for has, all := range c.names {
		if has != ino && all.find(packed) >= 0 {
			back = append(back, has)
		}
	}
	c.mu.Unlock()
	for _, has := range back {
		c.add(has, one.dir, one.name)
	}
}

func (c *nameCache) forget(ino fsop.Ino) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.names, ino)
}

// of returns the names of an inode.
func (c *nameCache) of(ino fsop.Ino) []dirName {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.names[ino].appendTo(nil)
}

func (c *nameCache) all() (all []dirName) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, names := range c.names {
		all = names.appendTo(all)
	}
	return all
}

type packedNames string

const nameHead = 8 + 1

func packName(buf []byte, dir fsop.Ino, name string) []byte {
	return append(append(binary.NativeEndian.AppendUint64(buf, uint64(dir)), byte(len(name))), name...)
}

// find returns where a name stands, -1 if it does not.
func (p packedNames) find(packed []byte) int {
	for at := 0; at < len(p); {
		end := at + nameHead + int(p[at+nameHead-1])
		if string(p[at:end]) == string(packed) {
			return at
		}
		at = end
	}
	return -1
}

func (p packedNames) appendTo(all []dirName) []dirName {
	for len(p) > 0 {
		end := nameHead + int(p[nameHead-1])
		all = append(all, dirName{fsop.Ino(binary.NativeEndian.Uint64([]byte(p[:8]))), string(p[nameHead:end])})
		p = p[end:]
	}
	return all
}

// answers are the names that LOOKUP was answered for in the last moments. Whoever asked
// again for a name that the kernel has, which holds no lock, may not have taken the
// answer in yet: then he does so after the name has been expired, and it counts
// again. So a name is expired when that has had its time.
type answers struct {
	seed  maphash.Seed
	began time.Time
	mu    sync.Mutex
	last  [512]answer
	next  int
}

type answer struct {
	name uint64
	at   time.Duration // since began
}

// digestPatience is how long a thread may take from the answer to its request to
// what it does with it.
const digestPatience = 3 * time.Millisecond

func newAnswers() *answers { return &answers{seed: maphash.MakeSeed(), began: time.Now()} }

// add is called before it is decided whether the answer may be kept.
func (a *answers) add(dir fsop.Ino, name string) {
	h := hashName(a.seed, dir, name)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.last[a.next] = answer{h, time.Since(a.began)}
	a.next = (a.next + 1) % len(a.last)
}

// fresh is how long ago the last answer for one of the names was, at most digestPatience.
func (a *answers) fresh(names []*entryJob) time.Duration {
	of := make(map[uint64]bool, len(names))
	for _, j := range names {
		if j.same {
			of[hashName(a.seed, j.dir, j.name)] = true
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	now, ago := time.Since(a.began), digestPatience
	for i := range a.last {
		l := &a.last[i]
		// The oldest may be all that is left of many.
		if since := now - l.at; since < ago && l.at > 0 && (of[l.name] || i == a.next) {
			ago = since
		}
	}
	return ago
}

// digested returns when the answers for names that are to be expired have been taken in.
func (m *Mount) digested(ctx context.Context, names []*entryJob) error {
	left := digestPatience - m.answers.fresh(names)
	if left <= 0 {
		return nil
	}
	t := time.NewTimer(left)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
