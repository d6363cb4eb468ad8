// Package estate is what a mount's process leaves to the next one.
//
// The kernel's side of a mount outlives the process that serves it, as long as
// somebody has /dev/fuse open. What the process knows and nobody else does lives
// in an Estate: memory in a file of its own (memfd_create), which whoever comes next
// has open too. It is kept there and nowhere else, not written down at the end,
// so it is the same whether the process gives way to a newer program or is killed.
//
//   - which inodes the kernel knows, and how often it was told of each (Nodes): what
//     keeps an unlinked file alive
//   - which session of the volume this is, and which numbers of changes it has given (Numbers)
//   - the newest epoch of the set that was heard of, in which the changes were asked for
//   - which of them belong to which request of the kernel: the kernel sends requests
//     without an answer again, and under the number that it had before a change is not
//     carried out twice
//   - which files have acknowledged writes that are on no brick yet (Unsent): if the
//     process is killed they are lost, and whoever closes the file is told
//   - which locks belong to which open file (Locks)
//
// All else is a cache, and begins empty.
//
// A process reads the estate of the one before it (Read) and takes what is in it
// into one of its own (New), so it has to know formats of older programs to read them
// only.
package estate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Version is the format that this program writes, and the only one that it reads.
const Version = 1

// ErrVersion is returned for an estate that another program has left.
var ErrVersion = errors.New("estate: left by a program whose format is not known here")

const (
	magic = 0x6574617473656d6d
	// size is the length of the memory, of which what was never used costs nothing.
	size = 4 << 30
	page = 4096
	// headerPages are set aside for the header: its words, then what was said at the
	// beginning of the kernel's connection.
	headerPages = 3
	initAt      = 1 * page
	initMax     = 1 * page // of request and answer each
)

// Words of the header.
const (
	wordMagic = iota
	wordVersion
	wordSession
	wordOpened
	wordNext // the next number
	wordHandle
	wordUse
	wordInit  // length of the request
	wordInit2 // and of the answer
	wordMade  // 1 when all of the above is there
	wordTables
	wordEpoch = wordTables + tables // 0 if a program left it that did not say
)

// The tables.
const (
	tableNumbers = NodeShards + iota
	tableTaken
	tableUnsent
	tableLocks
	tables
)

// NodeShards is into how many parts the table of inodes is divided, each to be guarded by
// its own lock.
const NodeShards = 64

// Widths of the tables' records, with the key.
var widths = func() (w [tables]int) {
	for i := range NodeShards {
		w[i] = 3
	}
	w[tableNumbers], w[tableTaken], w[tableUnsent], w[tableLocks] = 4, 2, 2, 5
	return w
}()

// Estate is one process's.
type Estate struct {
	fd     int // -1: nobody can come after
	mem    []byte
	header []uint64

	Nodes   [NodeShards]*Table // by inode: two words of package mount's
	Numbers *Numbers
	Locks   *Table // by any number: inode, owner, open file, kind

	mu   sync.Mutex // guards the fields below
	next uint64     // page
	free map[int][]uint64

	unsentMu sync.Mutex
	unsent   *Table
}

// New returns an empty estate.
func New() (*Estate, error) {
	fd, err := unix.MemfdCreate("mortar-mount", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memory for what a mount leaves: %w", err)
	}
	if err := unix.Ftruncate(fd, size); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("memory for what a mount leaves: %w", err)
	}
	mem, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("memory for what a mount leaves: %w", err)
	}
	e := &Estate{fd: fd, mem: mem, next: headerPages, free: make(map[int][]uint64)}
	e.header = words(mem[:page])
	e.store(wordMagic, magic)
	e.store(wordVersion, Version)
	e.store(wordNext, 1)
	e.empty(e)
	return e, nil
}

// Private returns an estate in memory that nobody else sees: nobody comes after.
func Private() *Estate {
	e := &Estate{fd: -1, header: make([]uint64, page/8)}
	e.empty(nil)
	return e
}

// empty makes what is in e, in the memory of an Estate; nil: in memory that nobody else sees.
func (e *Estate) empty(in *Estate) {
	table := func(i int) *Table { return &Table{e: in, dir: wordTables + i, width: widths[i]} }
	for i := range e.Nodes {
		e.Nodes[i] = table(i)
	}
	e.Numbers = newNumbers(in, table(tableNumbers), table(tableTaken))
	e.unsent, e.Locks = table(tableUnsent), table(tableLocks)
}

func words(b []byte) []uint64 {
	return unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/8)
}

func (e *Estate) store(word int, v uint64) { atomic.StoreUint64(&e.header[word], v) }

// Fd is the descriptor of the memory.
func (e *Estate) Fd() int { return e.fd }

// Close gives the memory back. Nothing of the estate may be used after it.
func (e *Estate) Close() error {
	if e.fd < 0 {
		return nil
	}
	return errors.Join(unix.Munmap(e.mem), unix.Close(e.fd))
}

// pagesFor is how many pages hold n words: a power of two.
func pagesFor(n int) int {
	pages := 1
	for pages*page < 8*n {
		pages *= 2
	}
	return pages
}

// allocate returns cleared memory for n words, and the page where it begins.
func (e *Estate) allocate(n int) ([]uint64, uint64) {
	pages := pagesFor(n)
	e.mu.Lock()
	defer e.mu.Unlock()
	at := e.next
	if f := e.free[pages]; len(f) > 0 {
		at, e.free[pages] = f[len(f)-1], f[:len(f)-1]
	} else {
		if (at+uint64(pages))*page > size {
			panic("estate: more than 4 GiB of inodes that the kernel knows")
		}
		e.next += uint64(pages)
	}
	return words(e.mem[at*page:])[:n:n], at
}

// release takes memory of n words back.
func (e *Estate) release(at uint64, n int) {
	if n == 0 {
		return
	}
	pages := pagesFor(n)
	b := e.mem[at*page : (at+uint64(pages))*page]
	if unix.Madvise(b, unix.MADV_REMOVE) != nil {
		clear(b)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.free[pages] = append(e.free[pages], at)
}

// SetSession notes whose session of the volume this is.
func (e *Estate) SetSession(session uint64, opened int64) {
	e.store(wordSession, session)
	e.store(wordOpened, uint64(opened))
}

// Epoch is the newest epoch of the set that was heard of.
func (e *Estate) Epoch() uint64 { return atomic.LoadUint64(&e.header[wordEpoch]) }

// RaiseEpoch notes that there is an epoch, and returns the newest.
func (e *Estate) RaiseEpoch(to uint64) uint64 {
	for {
		was := e.Epoch()
		if was >= to {
			return was
		}
		if atomic.CompareAndSwapUint64(&e.header[wordEpoch], was, to) {
			return to
		}
	}
}

// NextHandle returns a number for an open file that no other has.
func (e *Estate) NextHandle() uint64 { return atomic.AddUint64(&e.header[wordHandle], 1) }

// SetHandle notes that the numbers of open files up to fh are taken.
func (e *Estate) SetHandle(fh uint64) { e.store(wordHandle, fh) }

// SetUse notes the inode of the subvolume that is mounted.
func (e *Estate) SetUse(ino uint64) { e.store(wordUse, ino) }

// SetInit notes what the kernel and the mount agreed upon. The estate is complete then.
func (e *Estate) SetInit(request, answer []byte) error {
	if e.fd < 0 {
		return nil
	}
	if len(request) > initMax || len(answer) > initMax {
		return fmt.Errorf("estate: a greeting of %d and %d bytes", len(request), len(answer))
	}
	copy(e.mem[initAt:], request)
	copy(e.mem[initAt+initMax:], answer)
	e.store(wordInit, uint64(len(request)))
	e.store(wordInit2, uint64(len(answer)))
	e.store(wordMade, 1)
	return nil
}

// SetUnsent notes whether a file has writes that were acknowledged and are on no brick.
func (e *Estate) SetUnsent(ino uint64, is bool) {
	e.unsentMu.Lock()
	defer e.unsentMu.Unlock()
	if is {
		e.unsent.Put(ino, 1)
	} else {
		e.unsent.Delete(ino)
	}
}

// Left is what was in an estate.
type Left struct {
	Session    uint64
	Opened     int64
	Epoch      uint64
	Next       uint64 // number of a change that was not given yet
	Handle     uint64
	Use        uint64
	Init       []byte
	InitAnswer []byte
	Nodes      [NodeShards][]Record
	Numbers    []Record // values: session, request, inode
	Taken      []Record
	Unsent     []Record
	Locks      []Record // values: as in Estate.Locks
}

// Record is one of a table.
type Record struct {
	Key    uint64
	Values []uint64
}

// Read reads the estate behind a descriptor, which stays open. Nobody may be changing it.
func Read(fd int) (*Left, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("estate: %w", err)
	}
	if st.Size < headerPages*page {
		return nil, fmt.Errorf("estate: %d bytes", st.Size)
	}
	mem, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("estate: %w", err)
	}
	defer unix.Munmap(mem)
	return parse(mem)
}

// Greeting reads what was said at the beginning of the kernel's connection from the estate behind a descriptor, which
// may be in use, if this program can read the estate at all.
func Greeting(fd int) (*Left, error) {
	var head [headerPages * page]byte
	if n, err := unix.Pread(fd, head[:], 0); err != nil || n != len(head) {
		return nil, fmt.Errorf("estate: %d bytes: %w", n, errors.Join(err, errors.New("too few")))
	}
	clear(head[8*wordTables : page])
	return parse(head[:])
}

// parse reads an estate. It believes nothing: what is read decides what a kernel is told.
func parse(mem []byte) (*Left, error) {
	word := func(i int) uint64 { return binary.NativeEndian.Uint64(mem[8*i:]) }
	switch {
	case len(mem) < headerPages*page || word(wordMagic) != magic:
		return nil, errors.New("estate: this is none")
	case word(wordVersion) != Version:
		return nil, fmt.Errorf("%w: version %d, known is %d", ErrVersion, word(wordVersion), Version)
	case word(wordMade) != 1:
		return nil, errors.New("estate: whoever left it had not finished making it")
	case word(wordInit) > initMax || word(wordInit2) > initMax:
		return nil, errors.New("estate: the greeting is too long")
	}
	l := &Left{
		Session: word(wordSession), Opened: int64(word(wordOpened)), Epoch: word(wordEpoch), Next: word(wordNext),
		Handle: word(wordHandle), Use: word(wordUse),
		Init:       append([]byte(nil), mem[initAt:initAt+word(wordInit)]...),
		InitAnswer: append([]byte(nil), mem[initAt+initMax:initAt+initMax+word(wordInit2)]...),
	}
	for i := range tables {
		all, err := parseTable(mem, word(wordTables+i), widths[i])
		if err != nil {
			return nil, fmt.Errorf("estate: table %d: %w", i, err)
		}
		switch {
		case i < NodeShards:
			l.Nodes[i] = all
		case i == tableNumbers:
			l.Numbers = all
		case i == tableTaken:
			l.Taken = all
		case i == tableUnsent:
			l.Unsent = all
		case i == tableLocks:
			l.Locks = all
		}
	}
	return l, nil
}

func parseTable(mem []byte, dir uint64, width int) (all []Record, err error) {
	if dir == 0 {
		return nil, nil
	}
	at, records, w := dir>>placeAt, dir>>recordsAt&0xffffffff, int(dir&0xff)
	if w != width || at < headerPages || at > uint64(len(mem))/page {
		return nil, fmt.Errorf("a place %#x that cannot be", dir)
	}
	n := uint64(8*width) * records
	if n > uint64(len(mem))-at*page {
		return nil, fmt.Errorf("a place %#x beyond the end", dir)
	}
	b := mem[at*page : at*page+n]
	seen := make(map[uint64]bool)
	for ; len(b) > 0; b = b[8*width:] {
		key := binary.NativeEndian.Uint64(b)
		if key == 0 || seen[key] { // seen: it was being moved
			continue
		}
		seen[key] = true
		r := Record{Key: key, Values: make([]uint64, width-1)}
		for i := range r.Values {
			r.Values[i] = binary.NativeEndian.Uint64(b[8*(i+1):])
		}
		all = append(all, r)
	}
	return all, nil
}
