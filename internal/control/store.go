package control

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
)

// The control store is one append-only file, log.mortar, with everything that
// consensus must not forget: the log of commands, the current term and the vote.
//
//	offset 0    8 bytes   magic "MORTARCL"
//	       8    4 bytes   format version, 1
//	      12    4 bytes   CRC-32C of the 12 bytes before
//	      16    records, one after another:
//	              u32  length of the body
//	              u32  CRC-32C of the length
//	              u32  CRC-32C of the body
//	              body u8 kind, then
//	                 1 entries   repeated: u64 index, u64 term, u8 type, i64 time (ns),
//	                             u32 length, data, u32 length, extensions
//	                 2 cut       u64 index: entries from here on are void
//	                 3 value     u32 length, key, u32 length, value
//	                 and at its end u8 0xA5, so that no whole record ends in zeros
//	       …    zeros up to the end of the file, which is allocated ahead
//
// All integers are little-endian. The whole content is small (some thousand
// commands at most, since snapshots take the old ones away) and is kept in
// memory; the file is read once, at start, and rewritten beside and renamed
// when old entries are dropped.
//
// Every record is on disk (fdatasync) before the call that wrote it returns, so
// a crash can spoil only the last record, and nobody was told that it is there.
// A spoilt last record shows zeros where the disk had not got to, for the space
// was allocated empty; it is cut off. Anything else that does not fit its
// checksum is damage, and is refused: a voter that has forgotten something it
// promised could make two leaders.
const (
	storeMagic   = "MORTARCL"
	storeVersion = 1
	headerLen    = 16
	recordHead   = 12
	recordEnd    = 0xA5

	recEntries = 1
	recCut     = 2
	recValue   = 3

	// storeChunk is how much is allocated at a time.
	storeChunk = 1 << 20
	// storeReserve is kept for terms and votes when the disk is full: a peer that
	// cannot write a command says so and goes on; one that cannot write its vote
	// is out.
	storeReserve = 64 << 10
	// maxRecord bounds what is read back: many commands in one record.
	maxRecord = 64 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// DamageError says that the control store cannot be used as it is on disk.
type DamageError struct {
	File   string
	Detail string
}

func (e *DamageError) Error() string {
	return fmt.Sprintf("the control store of this peer is damaged: %s: %s. The other peers have the same information: move the directory %s away and start mortar again, and this peer fetches a fresh copy from them; with no other peer alive, restore the directory from a backup",
		e.File, e.Detail, filepath.Dir(e.File))
}

// store implements raft.LogStore and raft.StableStore.
type store struct {
	path string
	lock *os.File // held as long as the store is open
	// failed is called once, with the first write error. From then on nothing is
	// written any more: after a failed write or flush nobody knows what is on
	// the disk.
	failed func(error)
	// abandoned is closed when the owner has cut all connections, so that what
	// the consensus machine still does has no effect outside.
	abandoned chan struct{}
	abandon   sync.Once

	mu     sync.Mutex // guards all below
	hint   *os.File   // commit.mortar
	commit uint64
	f      *os.File
	off    int64 // end of the records
	size   int64 // allocated
	err    error // poison
	first  uint64
	logs   []*raft.Log // first, first+1, …; entries are never changed
	values map[string][]byte
}

var (
	_ raft.LogStore          = (*store)(nil)
	_ raft.StableStore       = (*store)(nil)
	_ raft.MonotonicLogStore = (*store)(nil)
)

// openStore opens or makes the store in dir. It refuses a second opener.
func openStore(dir string, failed func(error)) (_ *store, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("control store: %w", err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	s := &store{path: filepath.Join(dir, "log.mortar"), lock: lock, failed: failed, abandoned: make(chan struct{}), values: map[string][]byte{}}
	defer func() {
		if err != nil {
			s.closeFiles()
		}
	}()
	if err := s.openHint(); err != nil {
		return nil, err
	}
	_, err = os.Stat(s.path)
	if errors.Is(err, os.ErrNotExist) {
		s.commit = 0
		s.values[forgetfulKey] = []byte{1}
		return s, s.rewriteLocked()
	}
	if err != nil {
		return nil, fmt.Errorf("control store: %w", err)
	}
	return s, s.load()
}

// How much of the log is known to be decided is kept in a file of its own,
// commit.mortar: u64 index, u32 CRC-32C. It is written over without being
// flushed. It is only a hint, for what can be shown before a leader is there: one
// that is lost or old takes nothing away, and one that is damaged is ignored.

func (s *store) openHint() (err error) {
	s.hint, err = os.OpenFile(filepath.Join(filepath.Dir(s.path), "commit.mortar"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("control store: %w", err)
	}
	var b [12]byte
	if n, _ := s.hint.ReadAt(b[:], 0); n == len(b) && sum(b[:8]) == binary.LittleEndian.Uint32(b[8:]) {
		s.commit = binary.LittleEndian.Uint64(b[:])
	}
	return nil
}

// noteCommit remembers that everything up to index is decided.
func (s *store) noteCommit(index uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if index <= s.commit || s.err != nil {
		return
	}
	s.commit = index
	b := binary.LittleEndian.AppendUint64(nil, index)
	_, _ = s.hint.WriteAt(binary.LittleEndian.AppendUint32(b, sum(b)), 0) // a hint
}

// committed returns up to where the log is known to be decided.
func (s *store) committed() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return min(s.commit, s.lastLocked())
}

// lockDir takes the lock of a store's directory, or says who has it.
func lockDir(dir string) (*os.File, error) {
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("control store: %w", err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("control store %s is in use by another process: is a mortar server running already?", dir)
	}
	return lock, nil
}

// load reads the whole file.
func (s *store) load() error {
	f, err := os.OpenFile(s.path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("control store: %w", err)
	}
	s.f = f
	b, err := io.ReadAll(f)
	if err != nil {
		return &DamageError{s.path, fmt.Sprintf("it cannot be read: %v", err)}
	}
	s.size = int64(len(b))
	if len(b) >= headerLen && len(b)%storeChunk != 0 {
		return &DamageError{s.path, fmt.Sprintf("it was cut short: it is %d bytes long and should be a multiple of %d", len(b), storeChunk)}
	}
	off, err := s.parse(b)
	if err != nil {
		return err
	}
	s.off = int64(off)
	// Whatever a torn record left must be gone before the next one is written
	// over it, or its rest could pass for damage later.
	if bytes.Count(b[off:], []byte{0}) != len(b)-off {
		if _, err = f.WriteAt(make([]byte, len(b)-off), s.off); err == nil {
			err = f.Sync()
		}
		if err != nil {
			return fmt.Errorf("control store: %w", err)
		}
	}
	return nil
}

// parse reads the content of the file into memory. It returns where the records
// end.
func (s *store) parse(b []byte) (end int, err error) {
	if len(b) < headerLen || string(b[:8]) != storeMagic || sum(b[:12]) != binary.LittleEndian.Uint32(b[12:]) {
		return 0, &DamageError{s.path, "its first 16 bytes are not those of a control store"}
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != storeVersion {
		return 0, fmt.Errorf("control store %s has format %d and this program knows format %d: run the version of mortar that wrote it, or a newer one", s.path, v, storeVersion)
	}
	off := headerLen
	for {
		body, next, err := readRecord(b, off)
		switch {
		case err == errEnd, err == nil && body == nil:
			return off, nil
		case err == nil:
			err = s.replay(body)
		}
		if err != nil {
			return 0, &DamageError{s.path, fmt.Sprintf("at offset %d: %v", off, err)}
		}
		off = next
	}
}

var errEnd = errors.New("end of records")

// sum is the checksum of the store.
func sum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// recordAt returns the body of the whole record that begins at off, or nil, and
// where the record ends, if its length can be believed, or 0.
func recordAt(b []byte, off int) (body []byte, end int) {
	rest := b[off:]
	if len(rest) < recordHead || sum(rest[:4]) != binary.LittleEndian.Uint32(rest[4:]) {
		return nil, 0
	}
	n := binary.LittleEndian.Uint32(rest)
	if n < 2 || n > maxRecord {
		return nil, 0
	}
	end = off + recordHead + int(n)
	if end > len(b) {
		return nil, end
	}
	body = b[off+recordHead : end]
	if sum(body) != binary.LittleEndian.Uint32(rest[8:]) || body[n-1] != recordEnd {
		return nil, end
	}
	return body[:n-1], end
}

// readRecord returns the body of the record at off and where the next begins;
// errEnd after the last; a nil body for a torn last record.
func readRecord(b []byte, off int) (body []byte, next int, err error) {
	if bytes.Count(b[off:], []byte{0}) == len(b)-off {
		return nil, 0, errEnd
	}
	body, end := recordAt(b, off)
	if body != nil {
		return body, end, nil
	}
	if torn(b, off, end) {
		return nil, off, nil
	}
	return nil, 0, errors.New("a record does not fit its checksum")
}

// torn reports whether what is at off can be the remains of an append that a
// crash interrupted. Such an append is the last thing in the file, and some
// sector of it was never written: it is zero. stop is where the record ends, 0 if
// that is not known.
func torn(b []byte, off, stop int) bool {
	last := len(b) // behind the last byte that is not zero
	for last > off && b[last-1] == 0 {
		last--
	}
	if stop == 0 {
		// Its head is not whole. In a torn record that is because a sector with a
		// part of it is missing.
		stop = off + recordHead
		for i := off + 1; i < last; i++ {
			if body, _ := recordAt(b, i); body != nil {
				return false
			}
		}
	} else if stop < last {
		return false // something was written after it, so it was whole once
	}
	if stop > len(b) {
		return false // room is allocated before anything is written to it
	}
	for from := off; from < stop; { // the first sector and the last are partial
		to := min((from/512+1)*512, stop)
		if len(bytes.Trim(b[from:to], "\x00")) == 0 {
			return true
		}
		from = to
	}
	return false
}

// replay applies one record to the content in memory.
func (s *store) replay(body []byte) error {
	r := fields{b: body[1:]}
	switch body[0] {
	case recEntries:
		for len(r.b) > 0 && !r.bad {
			l := &raft.Log{Index: r.u64(), Term: r.u64(), Type: raft.LogType(r.u8())}
			if ns := int64(r.u64()); ns != 0 {
				l.AppendedAt = time.Unix(0, ns)
			}
			l.Data, l.Extensions = r.bytes(), r.bytes()
			if r.bad {
				break
			}
			if err := s.putLocked(l); err != nil {
				return err
			}
		}
	case recCut:
		s.cutLocked(r.u64())
	case recValue:
		k := string(r.bytes())
		s.values[k] = r.bytes()
	default:
		return fmt.Errorf("a record of unknown kind %d", body[0])
	}
	if r.bad || len(r.b) != 0 {
		return errors.New("a record whose fields do not fit its length")
	}
	return nil
}

// fields reads the fields of a record.
type fields struct {
	b   []byte
	bad bool
}

func (r *fields) take(n uint64) []byte {
	if r.bad || n > uint64(len(r.b)) {
		r.bad = true
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

func (r *fields) u8() uint8 {
	if v := r.take(1); v != nil {
		return v[0]
	}
	return 0
}

func (r *fields) u64() uint64 {
	if v := r.take(8); v != nil {
		return binary.LittleEndian.Uint64(v)
	}
	return 0
}

func (r *fields) bytes() []byte {
	v := r.take(4)
	if v == nil {
		return nil
	}
	n := uint64(binary.LittleEndian.Uint32(v))
	if n == 0 {
		return nil
	}
	return bytes.Clone(r.take(n))
}

func appendBytes(b, v []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(len(v)))
	return append(b, v...)
}

func entryBody(body []byte, l *raft.Log) []byte {
	body = binary.LittleEndian.AppendUint64(body, l.Index)
	body = binary.LittleEndian.AppendUint64(body, l.Term)
	body = append(body, byte(l.Type))
	var ns int64
	if !l.AppendedAt.IsZero() {
		ns = l.AppendedAt.UnixNano()
	}
	body = binary.LittleEndian.AppendUint64(body, uint64(ns))
	return appendBytes(appendBytes(body, l.Data), l.Extensions)
}

func valueBody(key string, value []byte) []byte {
	return appendBytes(appendBytes([]byte{recValue}, []byte(key)), value)
}

// appendRecord appends the record with that body to b.
func appendRecord(b, body []byte) []byte {
	at := len(b)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(body)+1))
	b = binary.LittleEndian.AppendUint32(b, sum(b[at:at+4]))
	b = append(b, 0, 0, 0, 0)
	b = append(append(b, body...), recordEnd)
	binary.LittleEndian.PutUint32(b[at+8:], sum(b[at+recordHead:]))
	return b
}

// writeLocked appends one record durably. reserve is what must stay free behind it.
func (s *store) writeLocked(body []byte, reserve int64) error {
	if s.err != nil {
		return s.err
	}
	rec := appendRecord(nil, body)
	if need := s.off + int64(len(rec)) + reserve; need > s.size {
		size := (need + storeChunk - 1) / storeChunk * storeChunk
		if err := allocate(s.f, s.size, size-s.size); err != nil {
			if reserve == 0 {
				return s.poisonLocked(err)
			}
			// Nothing was written: the store is as good as before.
			return fmt.Errorf("control store %s: %w", s.path, err)
		}
		s.size = size
	}
	_, err := s.f.WriteAt(rec, s.off)
	if err == nil {
		err = syscall.Fdatasync(int(s.f.Fd()))
	}
	if err != nil {
		return s.poisonLocked(err)
	}
	s.off += int64(len(rec))
	return nil
}

// allocate makes room in a file, filled with zeros. The file's size grows in one
// step, or not at all.
func allocate(f *os.File, off, n int64) error {
	err := syscall.Fallocate(int(f.Fd()), 0, off, n)
	if errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.ENOSYS) {
		if err = f.Truncate(off + n); err == nil {
			_, err = f.WriteAt(make([]byte, n), off)
		}
	}
	if err == nil {
		err = f.Sync()
	}
	return err
}

func (s *store) poisonLocked(err error) error {
	s.err = fmt.Errorf("control store %s: %w; nothing more is written to it until mortar is restarted", s.path, err)
	if s.failed != nil {
		s.failed(s.err)
	}
	return s.err
}

// rewriteLocked writes the content in memory to a new file and puts it in place.
func (s *store) rewriteLocked() error {
	b := make([]byte, 0, 4096)
	b = append(b, storeMagic...)
	b = binary.LittleEndian.AppendUint32(b, storeVersion)
	b = binary.LittleEndian.AppendUint32(b, sum(b[:12]))
	for _, k := range slices.Sorted(maps.Keys(s.values)) {
		b = appendRecord(b, valueBody(k, s.values[k]))
	}
	for _, l := range s.logs {
		b = appendRecord(b, entryBody([]byte{recEntries}, l))
	}
	end := int64(len(b))
	size := (end + storeReserve + storeChunk - 1) / storeChunk * storeChunk
	fail := func(err error) error { return fmt.Errorf("control store %s: %w", s.path, err) }

	tmp := s.path + ".new"
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fail(err)
	}
	if err = allocate(f, 0, size); err == nil {
		_, err = f.WriteAt(b, 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = os.Rename(tmp, s.path)
	}
	if err != nil {
		f.Close()
		os.Remove(tmp)
		return fail(err)
	}
	if s.f != nil {
		s.f.Close()
	}
	s.f, s.off, s.size = f, end, size
	if err := syncDir(filepath.Dir(s.path)); err != nil {
		return s.poisonLocked(err) // which of the two files is there after a crash?
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// close ends the store. Calls that are blocked because of a failure return.
func (s *store) close() {
	s.release()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closeFiles()
}

// release lets calls go that are blocked because of a failure.
func (s *store) release() { s.abandon.Do(func() { close(s.abandoned) }) }

func (s *store) closeFiles() {
	if s.f != nil {
		s.f.Close()
	}
	if s.hint != nil {
		s.hint.Close()
	}
	if s.err == nil {
		s.err = errors.New("control store: closed")
	}
	s.lock.Close()
}

// IsMonotonic implements raft.MonotonicLogStore: entries are without gaps.
func (s *store) IsMonotonic() bool { return true }

// FirstIndex implements raft.LogStore.
func (s *store) FirstIndex() (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.logs) == 0 {
		return 0, nil
	}
	return s.first, nil
}

// LastIndex implements raft.LogStore.
func (s *store) LastIndex() (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lastLocked(), nil
}

func (s *store) lastLocked() uint64 {
	if len(s.logs) == 0 {
		return 0
	}
	return s.first + uint64(len(s.logs)) - 1
}

// GetLog implements raft.LogStore.
func (s *store) GetLog(index uint64, l *raft.Log) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.logs) == 0 || index < s.first || index > s.lastLocked() {
		return raft.ErrLogNotFound
	}
	*l = *s.logs[index-s.first]
	return nil
}

// StoreLog implements raft.LogStore.
func (s *store) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore.
func (s *store) StoreLogs(logs []*raft.Log) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(logs) == 0 {
		return nil
	}
	next := s.lastLocked() + 1
	body := []byte{recEntries}
	for i, l := range logs {
		if (len(s.logs) > 0 || i > 0) && l.Index != next {
			return fmt.Errorf("control store: entry %d does not follow entry %d", l.Index, next-1)
		}
		next = l.Index + 1
		body = entryBody(body, l)
	}
	if err := s.writeLocked(body, storeReserve); err != nil {
		return err
	}
	for _, l := range logs {
		c := *l
		if err := s.putLocked(&c); err != nil {
			return err
		}
	}
	return nil
}

func (s *store) putLocked(l *raft.Log) error {
	if len(s.logs) == 0 {
		s.first = l.Index
	} else if want := s.lastLocked() + 1; l.Index != want {
		return fmt.Errorf("entry %d follows entry %d", l.Index, want-1)
	}
	s.logs = append(s.logs, l)
	return nil
}

func (s *store) cutLocked(from uint64) {
	if len(s.logs) == 0 || from > s.lastLocked() {
		return
	}
	keep := uint64(0)
	if from > s.first {
		keep = from - s.first
	}
	clear(s.logs[keep:])
	s.logs = s.logs[:keep]
}

// DeleteRange implements raft.LogStore. What it is asked to delete is a suffix
// (another leader's entries that never counted) or a prefix (in a snapshot by
// now).
func (s *store) DeleteRange(lo, hi uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.logs) == 0 || lo > hi {
		return nil
	}
	switch {
	case hi >= s.lastLocked() && lo > s.first:
		if err := s.writeLocked(binary.LittleEndian.AppendUint64([]byte{recCut}, lo), storeReserve); err != nil {
			return err
		}
		s.cutLocked(lo)
	case lo <= s.first:
		if s.err != nil {
			return s.err
		}
		oldLogs, oldFirst := s.logs, s.first
		drop := min(hi, s.lastLocked()) + 1 - s.first
		s.logs = append([]*raft.Log(nil), s.logs[drop:]...)
		s.first += drop
		if err := s.rewriteLocked(); err != nil {
			if s.err == nil {
				s.logs, s.first = oldLogs, oldFirst
			}
			return err
		}
	default:
		return fmt.Errorf("control store: cannot delete entries %d to %d from the middle of %d to %d", lo, hi, s.first, s.lastLocked())
	}
	return nil
}

var errNotFound = errors.New("not found") // raft compares the text

// Set implements raft.StableStore. The consensus machine gives up the process
// when a term or vote cannot be stored. The owner was told of the failure
// already and ends it in order; until then the machine is held here, where it
// can promise nothing to anybody.
func (s *store) Set(key, val []byte) error {
	if err := s.put(string(key), val); err != nil {
		<-s.abandoned
	}
	return nil
}

// put stores a value durably.
func (s *store) put(key string, val []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.writeLocked(valueBody(key, val), 0)
	if err == nil {
		s.values[key] = bytes.Clone(val)
	}
	return err
}

// Get implements raft.StableStore.
func (s *store) Get(key []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.values[string(key)]
	if !ok {
		return nil, errNotFound
	}
	return bytes.Clone(v), nil
}

// SetUint64 implements raft.StableStore.
func (s *store) SetUint64(key []byte, val uint64) error {
	return s.Set(key, binary.LittleEndian.AppendUint64(nil, val))
}

// GetUint64 implements raft.StableStore.
func (s *store) GetUint64(key []byte) (uint64, error) {
	v, err := s.Get(key)
	if err != nil {
		return 0, err
	}
	if len(v) != 8 {
		return 0, fmt.Errorf("control store %s: value %q has %d bytes and not 8", s.path, key, len(v))
	}
	return binary.LittleEndian.Uint64(v), nil
}
