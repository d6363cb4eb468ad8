package fsx

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// wrong is a difference between the file and the model.
type wrong struct{ text string }

func (w *wrong) Error() string { return w.text }

func wrongf(format string, args ...any) error { return &wrong{fmt.Sprintf(format, args...)} }

// run is a run in progress: the model, and what is open of the file on each mount.
type run struct {
	o     *Options
	res   *Result
	model []byte // as long as the file may become; zero beyond size
	size  int
	buf   []byte // as long, aligned for O_DIRECT

	views []view
	other []string // the second file, by mount
	no    map[Kind]bool
}

// view is the file through one mount.
type view struct {
	path   string
	fd     int
	direct int    // −1: O_DIRECT is not known here
	app    int    // with O_APPEND
	kept   []byte // a mapping that stays
}

func newRun(o *Options) (_ *run, err error) {
	r := &run{
		o:     o,
		res:   &Result{Kinds: map[string]int{}, Skipped: map[string]int{}},
		model: make([]byte, o.MaxSize),
		other: o.paths("copy"),
		no:    map[Kind]bool{},
	}
	// A mapping of its own is aligned to a page, and stays where it is.
	if r.buf, err = unix.Mmap(-1, 0, o.MaxSize+directAlign, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	fd, err := unix.Open(o.paths("file")[0], unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, &os.PathError{Op: "create", Path: o.paths("file")[0], Err: err}
	}
	unix.Close(fd)
	for _, path := range o.paths("file") {
		r.views = append(r.views, view{path: path, fd: -1, direct: -1, app: -1})
		if err := r.views[len(r.views)-1].open(0); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func (r *run) close() {
	for i := range r.views {
		r.views[i].close()
	}
	if len(r.views) > 0 {
		os.Remove(r.views[0].path)
		os.Remove(r.other[0])
	}
	unix.Munmap(r.buf)
}

func (v *view) open(flags int) (err error) {
	if v.fd, err = unix.Open(v.path, unix.O_RDWR|unix.O_CLOEXEC|flags, 0); err != nil {
		return &os.PathError{Op: "open", Path: v.path, Err: err}
	}
	if v.app, err = unix.Open(v.path, unix.O_WRONLY|unix.O_APPEND|unix.O_CLOEXEC, 0); err != nil {
		return &os.PathError{Op: "open for appending", Path: v.path, Err: err}
	}
	v.direct, err = unix.Open(v.path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EINVAL) {
		v.direct = -1
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "open with O_DIRECT", Path: v.path, Err: err}
	}
	return nil
}

func (v *view) close() error {
	var errs []error
	if v.kept != nil {
		errs = append(errs, unix.Munmap(v.kept))
		v.kept = nil
	}
	for _, fd := range []*int{&v.fd, &v.app, &v.direct} {
		if *fd >= 0 {
			errs = append(errs, unix.Close(*fd))
		}
		*fd = -1
	}
	return errors.Join(errs...)
}

// step does an operation to the file and to the model, and compares.
func (r *run) step(op Op, number int) error {
	if r.no[op.Kind] {
		r.res.Skipped[op.Kind.String()]++
		return nil
	}
	err := r.do(op)
	switch {
	case errors.Is(err, errUnknown):
		r.no[op.Kind] = true
		r.res.Skipped[op.Kind.String()]++
		return nil
	case err != nil:
		var w *wrong
		if !errors.As(err, &w) {
			err = wrongf("%v: %v", op.Kind, err) // no operation of a run may fail
		}
		return err
	}
	r.res.Kinds[op.Kind.String()]++
	if r.o.after != nil {
		r.o.after(op, r.views[op.On].path)
	}
	return r.verify(op, number)
}

// errUnknown is the error of an operation that a file system need not know.
var errUnknown = errors.New("not known to this file system")

// fill is the data that an operation writes.
func fill(p []byte, seed uint64) {
	for i := 0; i < len(p); i += 8 {
		seed += 0x9e3779b97f4a7c15
		x := seed
		x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
		x ^= x >> 27
		for k := i; k < min(i+8, len(p)); k++ {
			p[k] = byte(x) | 1 // never zero: what is not written must not look as if it were
			x >>= 8
		}
	}
}

func (r *run) do(op Op) error {
	v := &r.views[op.On]
	data := r.buf[:op.Len]
	switch op.Kind {
	case MapRead, MapWrite, Copy, CopyOut:
		// As programs do. A kernel that has not been asked for the size since another
		// machine made the file longer maps and copies nothing behind the old end.
		var st unix.Stat_t
		if err := unix.Fstat(v.fd, &st); err != nil {
			return err
		}
	}
	switch op.Kind {
	case Read:
		return r.pread(v.fd, op.Off, op.Len, "read")
	case ReadDirect:
		if v.direct < 0 {
			return errUnknown
		}
		return r.pread(v.direct, op.Off, op.Len, "read with O_DIRECT")
	case Write, WriteDirect:
		fd := v.fd
		if op.Kind == WriteDirect {
			fd = v.direct
			if op.Len = min(op.Len, (len(r.model)-op.Off)&^(directAlign-1)); op.Len <= 0 {
				return nil
			}
			data = data[:op.Len]
			if fd < 0 {
				return errUnknown
			}
		}
		fill(data, op.Fill)
		for done := 0; done < len(data); {
			n, err := unix.Pwrite(fd, data[done:], int64(op.Off+done))
			if err != nil {
				return err
			}
			done += n
		}
		r.put(op.Off, data)
	case Append:
		data = data[:min(len(data), len(r.model)-r.size)]
		fill(data, op.Fill)
		n, err := unix.Write(v.app, data)
		if err != nil {
			return err
		}
		if n != len(data) {
			return wrongf("appended %d of %d bytes", n, len(data))
		}
		r.put(r.size, data)
	case Truncate, TruncatePath:
		var err error
		if op.Kind == Truncate {
			err = unix.Ftruncate(v.fd, int64(op.Len))
		} else {
			err = unix.Truncate(v.path, int64(op.Len))
		}
		if err != nil {
			return err
		}
		r.resize(op.Len)
	case Punch, Zero, ZeroKeep, Allocate:
		if op.Len == 0 {
			return nil
		}
		mode := map[Kind]uint32{
			Punch:    unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE,
			Zero:     unix.FALLOC_FL_ZERO_RANGE,
			ZeroKeep: unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE,
		}[op.Kind]
		switch err := unix.Fallocate(v.fd, mode, int64(op.Off), int64(op.Len)); err {
		case nil:
		case unix.EOPNOTSUPP:
			return errUnknown
		default:
			return err
		}
		if (op.Kind == Zero || op.Kind == Allocate) && op.Off+op.Len > r.size {
			r.size = op.Off + op.Len
		}
		if op.Kind != Allocate && op.Off < r.size {
			clear(r.model[op.Off:min(op.Off+op.Len, r.size)])
		}
	case MapRead, MapWrite, MapWriteClose:
		if op.Len = min(op.Len, r.size-op.Off); op.Len <= 0 {
			return nil
		}
		return r.mapped(v, op)
	case KeptStore, KeptLoad:
		if op.Len = min(op.Len, r.size-op.Off); op.Len <= 0 {
			return nil
		}
		return r.kept(v, op)
	case Copy:
		op.Len = min(op.Len, r.size-op.From, len(r.model)-op.Off)
		if op.Len <= 0 || op.Off < op.From+op.Len && op.From < op.Off+op.Len {
			return nil
		}
		if err := copyRange(v.fd, op.From, v.fd, op.Off, op.Len); err != nil {
			return err
		}
		r.put(op.Off, r.model[op.From:op.From+op.Len])
	case CopyOut:
		return r.copyOut(v, op)
	case Seek:
		return r.seek(v)
	case Sync:
		return unix.Fsync(v.fd)
	case Reopen, ReopenTrunc:
		if err := v.close(); err != nil {
			return fmt.Errorf("close: %w", err)
		}
		flags := 0
		if op.Kind == ReopenTrunc {
			flags = unix.O_TRUNC
			r.resize(0)
		}
		return v.open(flags)
	case Whole:
		got, err := os.ReadFile(v.path)
		if err != nil {
			return err
		}
		return r.compare("read anew", 0, got, r.size)
	}
	return nil
}

// put writes to the model.
func (r *run) put(off int, data []byte) {
	if len(data) == 0 {
		return
	}
	copy(r.model[off:], data)
	r.size = max(r.size, off+len(data))
}

func (r *run) resize(n int) {
	if n < r.size {
		clear(r.model[n:r.size])
	}
	r.size = n
}

// compare compares what was read at off with the model; want is how much it must be.
func (r *run) compare(how string, off int, got []byte, want int) error {
	if len(got) != want {
		return wrongf("%s at %d: %d bytes, want %d (the file has %d)", how, off, len(got), want, r.size)
	}
	model := r.model[off : off+want]
	if bytes.Equal(got, model) {
		return nil
	}
	first, last, count := -1, 0, 0
	for i := range got {
		if got[i] != model[i] {
			if first < 0 {
				first = i
			}
			last = i
			count++
		}
	}
	return wrongf("%s at %d, %d bytes: %d differ, from %d to %d; the first are % x, want % x (the file has %d)", how, off, want,
		count, off+first, off+last, got[first:min(first+8, len(got))], model[first:min(first+8, len(model))], r.size)
}

func (r *run) pread(fd, off, n int, how string) error {
	want := max(0, min(n, r.size-off))
	got := 0
	for got < n {
		m, err := unix.Pread(fd, r.buf[got:n], int64(off+got))
		if err != nil {
			return err
		}
		if got += m; m == 0 || got%directAlign != 0 { // the end, of one with O_DIRECT too
			break
		}
	}
	return r.compare(how, min(off, r.size), r.buf[:got], want)
}

// mapped reads or writes through a new shared mapping of the pages around.
func (r *run) mapped(v *view, op Op) (err error) {
	page := os.Getpagesize()
	from := op.Off &^ (page - 1)
	prot := unix.PROT_READ
	if op.Kind != MapRead {
		prot |= unix.PROT_WRITE
	}
	m, err := unix.Mmap(v.fd, int64(from), op.Off+op.Len-from, prot, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer func() {
		if err2 := unix.Munmap(m); err == nil && err2 != nil {
			err = err2
		}
	}()
	part := m[op.Off-from:]
	if op.Kind == MapRead {
		if err := guarded(func() { copy(r.buf, part) }); err != nil {
			return err
		}
		if err := r.compare("read through a mapping", op.Off, r.buf[:op.Len], op.Len); err != nil {
			return err
		}
		// What is left of the last page reads as zeros.
		end := op.Off + op.Len
		if end != r.size || end%page == 0 {
			return nil
		}
		return guarded(func() {
			tail := unsafe.Slice(unsafe.SliceData(m), (len(m)+page-1)&^(page-1))[len(m):]
			for i, b := range tail {
				if b != 0 {
					err = wrongf("a mapping shows %#x behind the file's end, at %d; the file has %d", b, end+i, r.size)
					return
				}
			}
		}, &err)
	}
	data := r.buf[:op.Len]
	fill(data, op.Fill)
	if err := guarded(func() { copy(part, data) }); err != nil {
		return err
	}
	r.put(op.Off, data)
	if op.Kind == MapWrite {
		return unix.Msync(m, unix.MS_SYNC)
	}
	return nil
}

// kept stores or loads through a mapping that stays between operations.
func (r *run) kept(v *view, op Op) (err error) {
	if v.kept == nil {
		if v.kept, err = unix.Mmap(v.fd, 0, len(r.model), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
			return fmt.Errorf("mmap: %w", err)
		}
	}
	part := v.kept[op.Off : op.Off+op.Len]
	if op.Kind == KeptLoad {
		if err := guarded(func() { copy(r.buf, part) }); err != nil {
			return err
		}
		return r.compare("read through a mapping that stayed", op.Off, r.buf[:op.Len], op.Len)
	}
	data := r.buf[:op.Len]
	fill(data, op.Fill)
	if err := guarded(func() { copy(part, data) }); err != nil {
		return err
	}
	r.put(op.Off, data)
	return nil
}

// guarded runs f, which touches mapped pages, and returns what faults it met,
// or what f left in result.
func guarded(f func(), result ...*error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = wrongf("touching a mapped page: %v", p)
		}
	}()
	f()
	for _, r := range result {
		err = *r
	}
	return err
}

func copyRange(from, fromOff, to, toOff, n int) error {
	for n > 0 {
		in, out := int64(fromOff), int64(toOff)
		m, err := unix.CopyFileRange(from, &in, to, &out, n, 0)
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
			return errUnknown
		}
		if err != nil {
			return err
		}
		if m == 0 {
			return wrongf("copy_file_range copied nothing from %d, %d bytes were left", fromOff, n)
		}
		fromOff, toOff, n = fromOff+m, toOff+m, n-m
	}
	return nil
}

// copyOut copies a part to a second file, where it is read through the mount
// that verifies.
func (r *run) copyOut(v *view, op Op) error {
	if op.Len = min(op.Len, r.size-op.Off); op.Len <= 0 {
		return nil
	}
	fd, err := unix.Open(r.other[op.On], unix.O_CREAT|unix.O_TRUNC|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	err = copyRange(v.fd, op.Off, fd, 0, op.Len)
	if err2 := unix.Close(fd); err == nil {
		err = err2
	}
	if err != nil {
		return err
	}
	got, err := os.ReadFile(r.other[op.See])
	if err != nil {
		return err
	}
	if !bytes.Equal(got, r.model[op.Off:op.Off+op.Len]) {
		return wrongf("a copy of %d bytes from %d has %d bytes or others", op.Len, op.Off, len(got))
	}
	return nil
}

// seek walks through data and holes: whatever is in a hole must be zero.
func (r *run) seek(v *view) error {
	for at := int64(0); at < int64(r.size); {
		data, err := unix.Seek(v.fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			data = int64(r.size)
		} else if err != nil {
			return fmt.Errorf("SEEK_DATA from %d: %w", at, err)
		}
		if data < at || data > int64(r.size) {
			return wrongf("SEEK_DATA from %d says %d, the file has %d", at, data, r.size)
		}
		for i, b := range r.model[at:data] {
			if b != 0 {
				return wrongf("SEEK_DATA from %d says %d, and there is data at %d", at, data, int(at)+i)
			}
		}
		if data == int64(r.size) {
			break
		}
		hole, err := unix.Seek(v.fd, data, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("SEEK_HOLE from %d: %w", data, err)
		}
		if hole <= data || hole > int64(r.size) {
			return wrongf("SEEK_HOLE from %d, where there is data, says %d, the file has %d", data, hole, r.size)
		}
		at = hole
	}
	return nil
}

// verify compares the file with the model after an operation: its size always,
// what was touched and a bit around it; through another mount everything, if it is small.
func (r *run) verify(op Op, number int) error {
	for _, i := range []int{op.On, op.See} {
		v := &r.views[i]
		var st unix.Stat_t
		if err := unix.Fstat(v.fd, &st); err != nil {
			return wrongf("fstat: %v", err)
		}
		if st.Size != int64(r.size) {
			return wrongf("fstat through mount %d says %d bytes, want %d", i, st.Size, r.size)
		}
		if err := unix.Stat(v.path, &st); err != nil {
			return wrongf("stat: %v", err)
		}
		if st.Size != int64(r.size) {
			return wrongf("stat through mount %d says %d bytes, want %d", i, st.Size, r.size)
		}
	}
	if op.See == op.On {
		if number%64 == 0 {
			return r.seen(r.views[op.On].fd, 0, r.size, op)
		}
		return nil
	}
	fd := r.views[op.See].fd
	if r.size <= 64<<10 || number%16 == 0 {
		if err := r.seen(fd, 0, len(r.model), op); err != nil {
			return err
		}
	} else {
		from := max(0, op.Off-5000)
		if err := r.seen(fd, from, min(op.Off+op.Len+5000, len(r.model))-from, op); err != nil {
			return err
		}
	}
	if op.Kind == MapWrite && op.Len > 0 && op.Off < r.size {
		return r.mappedSoon(op)
	}
	return nil
}

func (r *run) seen(fd, off, n int, op Op) error {
	return r.pread(fd, off, n, fmt.Sprintf("read through mount %d", op.See))
}

// mappedSoon looks through a mapping on another mount, where changes may take a
// moment to be seen.
func (r *run) mappedSoon(op Op) error {
	op.Kind = MapRead
	op.Len = min(op.Len, r.size-op.Off)
	for limit := time.Now().Add(2 * time.Second); ; {
		err := r.mapped(&r.views[op.See], op)
		if err == nil || time.Now().After(limit) {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}
