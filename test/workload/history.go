package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anishathalye/porcupine"
	"golang.org/x/sys/unix"
)

// History is the outcome of history.
type History struct {
	Ops    map[string]int `json:"ops"`
	Parts  int            `json:"parts"` // objects, each judged on its own
	Lost   int            `json:"lost"`  // objects that were not, since close said that what was written to them is lost
	Worst  float64        `json:"worst_ms"`
	Faults []string       `json:"faults"`
}

func (h *History) wrong() []string { return h.Faults }

// deed is one operation as it was asked for, and answer what came back. Both are
// about one object: a register, a journal, a lock or a directory of a few names.
type deed struct {
	second     int // in which the object is used
	object, op string
	a, b       int // names, or the value
	client     int
	looked     bool // the rest of a rename, after its look at the source
}

type answer struct {
	err   unix.Errno
	value string
}

// history has clients on several mounts read and change a few objects at once,
// and judges what they were told: there must be an order of all operations, each
// between its call and its return, in which every answer is that of a plain
// object in memory. Its arguments are the same directory as the mounts show it.
func history(fs *flag.FlagSet, args []string) (verdict, error) {
	duration := fs.Duration("duration", 5*time.Second, "how long")
	seed := fs.Uint64("seed", 1, "of the choices")
	each := fs.Int("clients", 2, "clients on each mount")
	pace := fs.Duration("pace", time.Millisecond, "pause after each operation, to bound the judge's work")
	cached := fs.Bool("cached", true, "read journals through the page cache, not past it")
	of := fs.String("of", strings.Join(historyKinds, ","), "kinds of objects")
	keep := fs.String("keep", "", "a directory for the histories that have no order")
	pause := fs.String("pause", "", "a file: while it is there nothing is done")
	tidy := fs.Bool("tidy", false, "remove objects that have been judged")
	lossy := fs.Bool("lossy", false, "mounts stand still: what was written may be lost, if close says so")
	spoil := fs.Int("spoil", 0, "falsify every so many answers, to see that it is noticed")
	fs.Parse(args)
	kinds := strings.Split(*of, ",")
	for _, k := range kinds {
		if !slices.Contains(historyKinds, k) {
			return nil, fmt.Errorf("-of %s: the kinds are %v", k, historyKinds)
		}
	}
	if *each*fs.NArg() > historyClients {
		return nil, fmt.Errorf("%d clients, want %d at most", *each*fs.NArg(), historyClients)
	}
	h := &History{Ops: map[string]int{}}
	book := &ledger{h: h, keep: *keep, lossy: *lossy, open: map[int]map[string][]porcupine.Operation{}, lost: map[string]bool{}, at: make([]atomic.Int64, *each*fs.NArg()), shut: make([]atomic.Int64, *each*fs.NArg())}
	if *tidy {
		book.dir = fs.Arg(0)
	}
	asked := stopped()
	over := make(chan struct{}) // closed when it is time to end
	go func() {
		defer close(over)
		select {
		case <-asked:
		case <-time.After(*duration):
		}
	}()
	var wg sync.WaitGroup
	var historians []*historian
	begin := time.Now()
	for i := range book.at {
		c := &historian{id: i, book: book, kinds: kinds, cached: *cached, dir: fs.Arg(i % fs.NArg()), rng: rand.New(rand.NewPCG(*seed, uint64(i))), files: map[fileKey]int{}}
		historians = append(historians, c)
		wg.Go(func() {
			defer book.at[i].Store(math.MaxInt64)
			var worst time.Duration
			var fault string
			for n := 1; fault == "" && !closed(over); n++ {
				// New objects every second: the judge's work grows with a history's length.
				second := int(time.Since(begin) / time.Second)
				book.at[i].Store(int64(second))
				oldest := oldest(book.at)
				c.close(oldest)
				book.shut[i].Store(int64(oldest))
				d := c.choose(second)
				call := time.Since(begin)
				ans, err := c.do(d)
				ret := time.Since(begin)
				if err != nil {
					fault = fmt.Sprintf("%s of %s: %v", d.op, d.object, err)
					break
				}
				if *spoil > 0 && n%*spoil == 0 && d.op == "read" {
					ans.value += "!"
				}
				book.add(porcupine.Operation{ClientId: i, Input: d, Output: ans, Call: int64(call), Return: int64(ret)})
				worst = max(worst, ret-call)
				time.Sleep(*pace)
				for *pause != "" && isThere(*pause) && !closed(over) {
					time.Sleep(50 * time.Millisecond)
				}
			}
			book.mu.Lock()
			defer book.mu.Unlock()
			if fault != "" {
				book.fault(fault)
			}
			h.Worst = max(h.Worst, float64(worst.Microseconds())/1000)
		})
	}
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()
	// What nobody will use any more is judged at once: an hour's history is too long to keep.
	for !closed(done) {
		select {
		case <-done:
		case <-time.After(time.Second):
		}
		if err := book.judge(); err != nil {
			return nil, err
		}
	}
	for i, c := range historians { // not before all are done: a lock would go with it
		c.close(math.MaxInt)
		book.shut[i].Store(math.MaxInt64)
	}
	return h, book.judge()
}

// isThere reports whether a file is there.
func isThere(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// closed reports whether a channel is.
func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// ledger has the operations that have not been judged yet.
type ledger struct {
	keep  string         // where to write what has no order; "": nowhere
	dir   string         // where to remove the objects that have been judged; "": nowhere
	lossy bool           // close may say that what was written is lost
	at    []atomic.Int64 // of whose objects each client is using one: of this second or a later one
	shut  []atomic.Int64 // of before which second each client has no object open

	mu   sync.Mutex
	h    *History                                 // guarded by mu
	open map[int]map[string][]porcupine.Operation // by second and object; guarded by mu
	lost map[string]bool                          // objects with writes that are lost; guarded by mu
}

// oldest is the first second of those that clients have come to.
func oldest(of []atomic.Int64) int {
	low := int64(math.MaxInt)
	for i := range of {
		low = min(low, of[i].Load())
	}
	return int(low)
}

// closed takes down what the last close of an object's file said.
func (l *ledger) closed(object string, err error) {
	if err == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lossy && errors.Is(err, unix.EIO) {
		l.lost[object] = true
		return
	}
	l.fault(fmt.Sprintf("close of %s: %v", object, err))
}

func (l *ledger) add(op porcupine.Operation) {
	d := op.Input.(deed)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.h.Ops[d.op]++
	of := l.open[d.second]
	if of == nil {
		of = map[string][]porcupine.Operation{}
		l.open[d.second] = of
	}
	of[d.object] = append(of[d.object], op)
}

// fault takes down what is wrong. l.mu is held.
func (l *ledger) fault(text string) {
	l.h.Faults = append(l.h.Faults, text)
	fmt.Fprintf(os.Stderr, "%s: %s\n", time.Now().Format(time.TimeOnly), text) // whoever waits for an hour wants to know now
}

// judge judges the objects that nobody will use any more.
func (l *ledger) judge() error {
	before := oldest(l.shut)
	ready := map[string][]porcupine.Operation{}
	l.mu.Lock()
	for second, of := range l.open {
		if second < before {
			maps.Copy(ready, of)
			delete(l.open, second)
		}
	}
	// What was acknowledged and not sent is lost with a mount that stood still just then (doc/semantics.md). Where
	// that was told, nothing is known of what came between.
	lost := map[string]bool{}
	for object := range ready {
		if l.lost[object] {
			lost[object] = true
			delete(l.lost, object)
		}
	}
	l.h.Parts += len(ready) - len(lost)
	l.h.Lost += len(lost)
	l.mu.Unlock()
	for object, ops := range ready {
		fault, result := "", porcupine.Ok
		if !lost[object] {
			result = judge(ops)
		}
		switch result {
		case porcupine.Illegal:
			fault = fmt.Sprintf("no order explains the %d operations on %s", len(ops), object)
		case porcupine.Unknown:
			fault = fmt.Sprintf("the %d operations on %s were not judged in time", len(ops), object)
		default:
			if l.dir == "" {
				continue
			}
			if err := os.RemoveAll(filepath.Join(l.dir, object)); err == nil {
				continue
			} else {
				fault = fmt.Sprintf("removing %s: %v", object, err)
			}
		}
		l.mu.Lock()
		l.fault(fault)
		l.mu.Unlock()
		if l.keep != "" {
			if err := os.WriteFile(filepath.Join(l.keep, object), transcript(ops), 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// judge looks for an order of operations on one object: for one in which each
// happens at one moment, and if there is none and names are renamed, for one in which a
// rename is what Linux makes of it.
func judge(ops []porcupine.Operation) porcupine.CheckResult {
	const patience = 20 * time.Second
	result := porcupine.CheckOperationsTimeout(plain, ops, patience)
	if result == porcupine.Ok {
		return result
	}
	var parts []porcupine.Operation
	for _, op := range ops {
		d := op.Input.(deed)
		if d.op == "rename" || d.op == "noreplace" {
			look := op
			look.Input, look.Output = deed{object: d.object, op: "seek", a: d.a, client: d.client}, answer{}
			parts = append(parts, look)
			d.looked = true
			op.Input = d
		}
		parts = append(parts, op)
	}
	if len(parts) == len(ops) {
		return result
	}
	return porcupine.CheckOperationsTimeout(linux, parts, patience)
}

// transcript is a history for people.
func transcript(ops []porcupine.Operation) []byte {
	slices.SortFunc(ops, func(x, y porcupine.Operation) int { return cmp.Compare(x.Call, y.Call) })
	var b bytes.Buffer
	for _, op := range ops {
		d, ans := op.Input.(deed), op.Output.(answer)
		fmt.Fprintf(&b, "%12.3f to %12.3f ms, client %d: %s %d %d: %q", float64(op.Call)/1e6, float64(op.Return)/1e6, op.ClientId, d.op, d.a, d.b, ans.value)
		if ans.err != 0 {
			fmt.Fprintf(&b, " %v", ans.err)
		}
		b.WriteByte('\n')
	}
	return b.Bytes()
}

// historyKinds are the kinds of objects.
var historyKinds = []string{"register", "journal", "lock", "names"}

const (
	historyNames   = 3 // that a directory has
	historyClients = 8
)

// state is a plain object in memory, whichever it is.
type state struct {
	value string            // of a register or journal
	names [historyNames]int // of a directory: what each leads to, 0: nothing
	owner int               // of a lock, 0: nobody
	// sought is what renames that are under way found at their source, by client; one more.
	sought [historyClients]int
}

var plain = porcupine.Model{
	Init: func() any { return state{} },
	Step: func(s, input, output any) (bool, any) {
		now, d, ans := s.(state), input.(deed), output.(answer)
		want := now.answer(&d)
		return ans == want, now
	},
}

// linux is plain but for renames. Linux looks at both names of one before it asks
// the file system to carry it out, first at the old, then at the new name, and at one
// moment each. From what it saw it knows some answers that are not true at any
// one moment if others change the names in between:
//
//   - rename says that it has succeeded, and does nothing, if both names lead to
//     the same file. They do not at any moment here, where a file has one name,
//     but may have led to it one after the other.
//   - RENAME_NOREPLACE says EEXIST if it saw something at both names.
//
// A local file system under Linux does not show this: there nobody else changes the
// names while a rename holds the directory's lock. That lock is the machine's.
var linux = (&porcupine.NondeterministicModel{
	Init: func() []any { return []any{state{}} },
	Step: func(s, input, output any) []any {
		now, d, ans := s.(state), input.(deed), output.(answer)
		if d.op == "seek" {
			now.sought[d.client] = now.names[d.a] + 1
			return []any{now}
		}
		if !d.looked {
			if now.answer(&d) != ans {
				return nil
			}
			return []any{now}
		}
		if now.sought[d.client] == 0 {
			return nil // the look comes first
		}
		saw := now.sought[d.client] - 1
		now.sought[d.client] = 0
		switch {
		case saw == 0 && ans.err == unix.ENOENT,
			saw != 0 && d.op == "noreplace" && now.names[d.b] != 0 && ans.err == unix.EEXIST:
			return []any{now}
		case saw == 0:
			return nil
		}
		var next []any
		if d.op == "rename" && now.names[d.b] == saw && ans.err == 0 {
			next = append(next, now)
		}
		if done := now; done.answer(&d) == ans {
			next = append(next, done)
		}
		return next
	},
}).ToModel()

// answer carries d out.
func (s *state) answer(d *deed) answer {
	switch d.op {
	case "write":
		s.value = strconv.Itoa(d.a)
	case "append":
		s.value += strconv.Itoa(d.a) + " "
	case "read":
		return answer{value: s.value}
	case "lock":
		if s.owner != 0 && s.owner != d.client+1 {
			return answer{err: unix.EAGAIN}
		}
		s.owner = d.client + 1
	case "unlock":
		if s.owner == d.client+1 {
			s.owner = 0
		}
	case "make":
		if s.names[d.a] != 0 {
			return answer{err: unix.EEXIST}
		}
		s.names[d.a] = d.b
	case "look":
		if s.names[d.a] == 0 {
			return answer{err: unix.ENOENT}
		}
		return answer{value: strconv.Itoa(s.names[d.a])}
	case "remove":
		if s.names[d.a] == 0 {
			return answer{err: unix.ENOENT}
		}
		s.names[d.a] = 0
	case "rename", "noreplace":
		switch {
		case s.names[d.a] == 0:
			return answer{err: unix.ENOENT}
		case d.op == "noreplace" && s.names[d.b] != 0:
			return answer{err: unix.EEXIST}
		}
		s.names[d.b], s.names[d.a] = s.names[d.a], 0
	}
	return answer{}
}

// historian is one client on one mount.
type historian struct {
	id     int
	book   *ledger
	kinds  []string
	dir    string
	cached bool
	rng    *rand.Rand
	n      int
	files  map[fileKey]int // descriptors
}

// fileKey says what a descriptor is of.
type fileKey struct {
	second int
	object string
	flags  int
}

// close closes the files of objects of before a second.
func (c *historian) close(before int) {
	for key, fd := range c.files {
		if key.second < before {
			c.book.closed(key.object, unix.Close(fd))
			delete(c.files, key)
		}
	}
}

// choose thinks of an operation on one of the objects of second t.
func (c *historian) choose(t int) deed {
	c.n++
	unique := c.id + 1 + 100*c.n
	pick := func(ops ...string) string { return ops[c.rng.IntN(len(ops))] }
	switch pick(c.kinds...) {
	case "register":
		return deed{second: t, object: fmt.Sprintf("register-%d-%d", t, c.rng.IntN(3)), op: pick("read", "write"), a: unique}
	case "journal":
		return deed{second: t, object: fmt.Sprintf("journal-%d-%d", t, c.rng.IntN(2)), op: pick("read", "append"), a: unique}
	case "lock":
		return deed{second: t, object: fmt.Sprintf("lock-%d-%d", t, c.rng.IntN(2)), op: pick("lock", "lock", "unlock"), client: c.id}
	}
	d := deed{second: t, object: fmt.Sprintf("names-%d-%d", t, c.rng.IntN(2)), op: pick("make", "make", "look", "look", "remove", "rename", "noreplace"), a: c.rng.IntN(historyNames), client: c.id}
	switch d.op {
	case "make":
		d.b = unique
	case "rename", "noreplace":
		d.b = (d.a + 1 + c.rng.IntN(historyNames-1)) % historyNames
	}
	return d
}

// file opens a file, and keeps it open.
//
// Writers and readers have a descriptor each. Through one that is for both, the
// kernel puts what is written in its page cache before it sends it: others on that
// machine see it sooner than any other machine (doc/semantics.md).
func (c *historian) file(d deed, flags int) (int, error) {
	key := fileKey{d.second, d.object, flags}
	if fd, ok := c.files[key]; ok {
		return fd, nil
	}
	fd, err := unix.Open(filepath.Join(c.dir, d.object), unix.O_CREAT|unix.O_CLOEXEC|flags, 0o644)
	if err == nil {
		c.files[key] = fd
	}
	return fd, err
}

// do carries out d. An error that is no answer ends the client: no fault that a
// test makes may be seen by an application.
func (c *historian) do(d deed) (answer, error) {
	switch d.op {
	case "write", "append", "read":
		flags := unix.O_RDONLY
		switch {
		case d.op == "write":
			flags = unix.O_WRONLY
		case d.op == "append" || d.object[0] == 'j' && !c.cached:
			flags = unix.O_RDWR | unix.O_APPEND
		}
		fd, err := c.file(d, flags)
		if err != nil {
			return answer{}, err
		}
		switch d.op {
		case "write":
			_, err = unix.Pwrite(fd, binary.BigEndian.AppendUint64(nil, uint64(d.a)), 0)
			return answer{}, err
		case "append":
			_, err = unix.Write(fd, []byte(strconv.Itoa(d.a)+" "))
			return answer{}, err
		}
		buf := make([]byte, 64<<10)
		n, err := unix.Pread(fd, buf, 0)
		if err != nil || n == 0 {
			return answer{}, err
		}
		if d.object[0] == 'r' {
			if n != 8 {
				return answer{}, fmt.Errorf("a register of %d bytes", n)
			}
			return answer{value: strconv.FormatUint(binary.BigEndian.Uint64(buf), 10)}, nil
		}
		if i := bytes.IndexByte(buf[:n], 0); i >= 0 {
			return answer{}, fmt.Errorf("byte %d of %d is one that nobody wrote", i, n)
		}
		// A record that is being appended on this machine may be there in part. FUSE does
		// not tell the kernel where an append went, which takes the file to be as long as it
		// believed, plus the record; if others have appended meanwhile, that is in the middle of one.
		return answer{value: string(buf[:bytes.LastIndexByte(buf[:n], ' ')+1])}, nil
	case "lock", "unlock":
		fd, err := c.file(d, unix.O_RDWR)
		if err != nil {
			return answer{}, err
		}
		l := unix.Flock_t{Type: unix.F_WRLCK}
		if d.op == "unlock" {
			l.Type = unix.F_UNLCK
		}
		return answered(unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l), unix.EAGAIN)
	}
	dir := filepath.Join(c.dir, d.object)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return answer{}, err
	}
	a, b := filepath.Join(dir, strconv.Itoa(d.a)), filepath.Join(dir, strconv.Itoa(d.b))
	switch d.op {
	case "make": // a symbolic link: it is there with what it leads to, or not at all
		return answered(unix.Symlink(strconv.Itoa(d.b), a), unix.EEXIST)
	case "look":
		buf := make([]byte, 100)
		n, err := unix.Readlink(a, buf)
		ans, err := answered(err, unix.ENOENT)
		if err == nil && ans.err == 0 {
			ans.value = string(buf[:n])
		}
		return ans, err
	case "remove":
		return answered(unix.Unlink(a), unix.ENOENT)
	case "rename":
		return answered(unix.Rename(a, b), unix.ENOENT)
	}
	return answered(unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_NOREPLACE), unix.ENOENT, unix.EEXIST)
}

// answered makes an answer of an error that is one.
func answered(err error, answers ...unix.Errno) (answer, error) {
	for _, e := range answers {
		if errors.Is(err, e) {
			return answer{err: e}, nil
		}
	}
	return answer{}, err
}
