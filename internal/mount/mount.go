package mount

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"mortar/internal/estate"
	"mortar/internal/fsop"
	"mortar/internal/mountinfo"
)

// Options say how a file system is mounted. The zero Options is usable.
type Options struct {
	// FsName is shown as the source of the mount, host:/volume by custom.
	FsName string
	// CacheTimeout is for how long the kernel may use names, absent ones too,
	// and attributes without asking. 0 means 60 s; negative, not at all.
	CacheTimeout time.Duration
	// LocksNode keeps flock and fcntl locks within this machine. In return the
	// kernel opens and closes files without a request.
	LocksNode bool
	// NoXattr has the kernel know of no extended attributes. In return it does
	// not ask for one before the first write to a file.
	NoXattr bool
	// OwnProcess says that this process serves the mount and opens nothing in it. It
	// then ends when it is killed, whatever it waits for (device.apart). A process
	// that also uses the mount would keep its own files open for longer than it knows.
	OwnProcess bool
	// Asker is a command that runs Ask, in a process of its own, and is at hand as
	// long as the mount is. Without one, a read can end where the file ended before changes
	// that were acknowledged, if another change overtakes it (see sizes).
	Asker []string
	// ReadOnly mounts read-only.
	ReadOnly bool
	// AllowOther lets users other than the mounting one in.
	AllowOther bool
	// Flags are more flags of mount(2), such as unix.MS_NODEV and unix.MS_NOSUID.
	Flags uintptr
	// Leased, if set, says whether at this moment what was read earlier may be
	// believed: whether others wait for this mount before they change it.
	Leased func() bool
	// Estate is what the next process of this mount is left. nil: there is none.
	Estate *estate.Estate
	// Log gets what went wrong; nil: nothing does.
	Log *slog.Logger

	noEpoch      bool           // tests: as if the kernel were older than 6.16
	ids          *mountinfo.IDs // tests: shared, since there are several mounts in one process
	telling      func()         // tests: called before a listing with attributes is given to the kernel
	movePatience time.Duration  // tests: how long changes under way are waited for at least, see movePatience
}

// Features are what the running kernel can do, of what not every kernel can.
type Features struct {
	Minor         uint32 // of the FUSE protocol, 7.Minor
	Epoch         bool   // FUSE_NOTIFY_INC_EPOCH, Linux 6.16
	KillPrivV2    bool   // writes need no getxattr, Linux 5.12
	DirectIOMmap  bool   // shared mappings of files opened for appending, Linux 6.6
	CacheSymlinks bool   // Linux 4.20
	Resend        bool   // FUSE_NOTIFY_RESEND, Linux 6.9
}

// Mount is one FUSE mount. It answers the kernel's requests from a
// fsop.Handler, and takes back what the kernel cached when told to; see
// Invalidate, DropAll, Holds and Forgotten, which are safe to call at any time.
type Mount struct {
	o        Options
	log      *slog.Logger
	timeout  atomic.Int64 // nanoseconds
	nodes    *nodes
	inflight *inflight
	listings *listings
	lookings *lookings
	places   *places
	locks    *lockTable
	pages    *pageQueue
	given    *givenNames
	names    *nameCache
	answers  *answers
	behind   behind
	sizes    *sizes
	asker    *asker
	estate   *estate.Estate
	ready    chan struct{} // closed when mounted

	// Set by Serve before ready is closed, and not changed afterwards.
	handler  fsop.Handler
	dev      *device
	features Features
	nested   *mountinfo.Nested
	srv      *server
	loose    []lockKey  // of the process before this one, which nobody has any more
	late     []fsop.Ino // that it had told the kernel of, which did not know them yet

	served  atomic.Bool
	entries chan *entryJob
	stop    chan struct{}   // closed when the last request was answered
	life    context.Context // ends with stop
	helpers sync.WaitGroup
}

// New returns a Mount that is not mounted yet.
func New(o Options) *Mount {
	e := o.Estate
	if e == nil {
		e = estate.Private()
	}
	m := &Mount{
		o:        o,
		log:      o.Log,
		estate:   e,
		nodes:    newNodes(e),
		inflight: newInflight(),
		listings: newListings(),
		lookings: newLookings(),
		places:   newPlaces(),
		locks:    newLockTable(e),
		given:    newGivenNames(),
		names:    newNameCache(),
		answers:  newAnswers(),
		sizes:    &sizes{of: make(map[fsop.Ino]*sizing)},
		ready:    make(chan struct{}),
		entries:  make(chan *entryJob, 1024),
		stop:     make(chan struct{}),
	}
	m.pages = newPageQueue(m.inflight.isChanging)
	m.asker = &asker{command: o.Asker, dir: m.dir}
	m.SetCacheTimeout(o.CacheTimeout)
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	if m.o.FsName == "" {
		m.o.FsName = "mortar"
	}
	return m
}

// SetCacheTimeout changes Options.CacheTimeout for what the kernel is told from
// now on. What it was told before keeps its time, or goes when it changes.
func (m *Mount) SetCacheTimeout(d time.Duration) {
	if d == 0 {
		d = 60 * time.Second
	}
	m.timeout.Store(int64(max(d, 0)))
}

func (m *Mount) cacheTimeout() time.Duration { return time.Duration(m.timeout.Load()) }

// Ready is closed when the file system is mounted and answers.
func (m *Mount) Ready() <-chan struct{} { return m.ready }

// Features says what the kernel can do. It is known once Ready is closed.
func (m *Mount) Features() Features {
	select {
	case <-m.ready:
		return m.features
	default:
		return Features{}
	}
}

// Serve mounts the file system on dir and answers the kernel from h until it
// is unmounted, or until ctx ends: then it unmounts. Whoever still has files
// open when ctx ends gets ENOTCONN. A Mount serves once.
func (m *Mount) Serve(ctx context.Context, dir string, h fsop.Handler) error {
	if !m.served.CompareAndSwap(false, true) {
		return errors.New("mount: served before")
	}
	adopted := m.dev != nil
	if !adopted {
		if err := m.open(dir); err != nil {
			return err
		}
	}
	dev, srv := m.dev, m.srv
	defer dev.close()
	m.handler = h
	life, end := context.WithCancel(context.Background())
	m.life = life

	m.start(func() { m.inflight.watch(m.stop, dev.dead) })
	for range entryWorkers {
		m.start(m.runEntries)
	}
	unmounted := make(chan struct{})
	if adopted {
		m.goOn()
	}
	go func() { // waited for below
		srv.run()
		close(unmounted)
	}()
	if !adopted {
		if err := settle(dir); err != nil {
			m.log.Warn("mount: first look at the file system", "dir", dir, "err", err)
		}
		if err := setReadahead(dir, fsop.MaxData); err != nil {
			m.log.Debug("mount: read-ahead stays at the kernel's default", "err", err)
		}
	}
	close(m.ready)
	select {
	case <-unmounted:
	case <-ctx.Done():
		if err := dev.unmount(); err != nil {
			m.log.Error("mount: " + err.Error())
		}
		<-unmounted
	}
	close(m.stop)
	end()
	m.asker.close()
	m.helpers.Wait()
	m.pages.wait()
	return nil
}

// open mounts the file system.
func (m *Mount) open(dir string) error {
	dev, fd, err := openDevice(dir, &m.o)
	if err != nil {
		return err
	}
	m.dev = dev
	if m.srv, err = m.newServer(fd); err == nil {
		if err = m.probe(m.srv); err != nil {
			m.srv.file.Close()
		}
	}
	if err != nil {
		dev.close()
		unix.Unmount(dir, unix.MNT_DETACH)
		return fmt.Errorf("mount %s: %w", dir, err)
	}
	return nil
}

func (m *Mount) newServer(fd int) (*server, error) {
	srv, err := newServer(fd, m.protocols(), m.log)
	if err == nil {
		srv.estate = m.estate
		srv.fs = m.fileSystem()
	}
	return srv, err
}

func (m *Mount) fileSystem() *fileSystem { return &fileSystem{fuse.NewDefaultRawFileSystem(), m} }

// protocols has one for each of agreements.
func (m *Mount) protocols() (all []*fuse.ProtocolServer) {
	fs := m.fileSystem()
	for _, o := range m.agreements() {
		all = append(all, fuse.NewProtocolServer(fs, o))
	}
	return all
}

// DeviceOf returns the number of the file system that is mounted on dir, without asking whoever serves it.
func DeviceOf(dir string) (uint64, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_STATX_DONT_SYNC, unix.STATX_BASIC_STATS, &st); err != nil {
		return 0, err
	}
	return unix.Mkdev(st.Dev_major, st.Dev_minor), nil
}

// dir is where the file system is mounted now.
func (m *Mount) dir() string { return m.dev.place() }

// start runs f; Serve waits for it.
func (m *Mount) start(f func()) {
	m.helpers.Go(f)
}

// serverOptions are go-fuse's. What it cannot ask the kernel for by an option
// of its own, ExtraCapabilities can.
func (m *Mount) serverOptions() *fuse.MountOptions {
	extra := uint64(fuse.CAP_HANDLE_KILLPRIV_V2 | fuse.CAP_NO_OPENDIR_SUPPORT |
		fuse.CAP_ASYNC_DIO | fuse.CAP_DIRECT_IO_ALLOW_MMAP | fuse.CAP_EXPORT_SUPPORT)
	if !m.o.NoXattr {
		// What a default ACL decides, the umask does not; who sets an ACL loses the
		// set-group-id bit if the kernel says so.
		extra |= fuse.CAP_DONT_MASK | fuse.CAP_SETXATTR_EXT
	}
	if !m.o.LocksNode {
		extra |= fuse.CAP_ATOMIC_O_TRUNC // needs OPEN
	}
	return &fuse.MountOptions{
		Name:                 "mortar",
		FsName:               m.o.FsName,
		MaxWrite:             fsop.MaxData,
		MaxReadAhead:         fsop.MaxData,
		MaxBackground:        maxBackground,
		EnableLocks:          !m.o.LocksNode,
		EnableSymlinkCaching: true,
		EnableAcl:            !m.o.NoXattr,
		DisableXAttrs:        m.o.NoXattr,
		ExtraCapabilities:    extra,
		// Replies are byte slices; a pipe in between would only cost.
		DisableSplice: true,
		Logger:        log.New(logWriter{m.log}, "", 0),
	}
}

// agreements are all options with which this program can go on where another one ended: its own
// first, then what earlier versions agreed upon with the kernel. Those asked for less, and whoever serves
// what more there is serves less as well: without CAP_EXPORT_SUPPORT the kernel never looks
// an inode up by its number.
func (m *Mount) agreements() []*fuse.MountOptions {
	now, before := m.serverOptions(), m.serverOptions()
	before.ExtraCapabilities &^= fuse.CAP_EXPORT_SUPPORT
	return []*fuse.MountOptions{now, before}
}

// maxBackground bounds the reads ahead in flight, and with them the memory
// they can take: that many times a MiB, twice.
const maxBackground = 16

// probe finds out what the kernel can do.
func (m *Mount) probe(srv *server) error {
	minor, flags, err := srv.init()
	if err != nil {
		return err
	}
	m.can(minor, flags)
	return nil
}

// can notes what the kernel says it can do, and tries what it does not say.
func (m *Mount) can(minor uint32, flags uint64) {
	f := &m.features
	f.Minor = minor
	f.KillPrivV2 = flags&fuse.CAP_HANDLE_KILLPRIV_V2 != 0
	f.DirectIOMmap = flags&fuse.CAP_DIRECT_IO_ALLOW_MMAP != 0
	f.CacheSymlinks = flags&fuse.CAP_CACHE_SYMLINKS != 0
	f.Epoch = !m.o.noEpoch && minor >= 44 // to try it could detach what the last process had mounted inside
	f.Resend = flags&fuse.CAP_HAS_RESEND != 0

	ids := m.o.ids
	if ids == nil {
		ids = new(mountinfo.IDs)
	}
	var err error
	if m.asker.dev, err = DeviceOf(m.dev.dir); err != nil {
		m.log.Warn("mount: the file system's number", "dir", m.dev.dir, "err", err)
	}
	m.nested = mountinfo.NewNested(m.asker.dev, ids)
	if !mountinfo.Ours(m.asker.dev) { // something is mounted over it
		m.nested = mountinfo.NewNested(0, ids)
	}
}

// nestedMay reports whether something may be mounted inside the file system, in whatever mount namespace.
func (m *Mount) nestedMay() bool { return m.o.noEpoch || m.nested.May() }

// epochs reports whether the kernel's epoch may be incremented. It makes the kernel throw names away when they
// are used next, and what is mounted on them or below with them.
func (m *Mount) epochs() bool { return m.features.Epoch && !m.nestedMay() }

// settle makes the kernel ask once whether files here can be polled, which no
// file system of ours can. Go programs ask for every file they open, in a way
// that would hang this very process if it did so while it is the server.
func settle(dir string) error {
	fd, err := unix.Open(dir+"/.go-fuse-epoll-hack", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return err
}

// logWriter brings go-fuse's lines to the log.
type logWriter struct{ log *slog.Logger }

func (w logWriter) Write(b []byte) (int, error) {
	w.log.Debug("fuse: " + string(b))
	return len(b), nil
}
