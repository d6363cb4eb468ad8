package daemon

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/pki"
	"mortar/internal/proto"
	"mortar/internal/wire"
)

// A daemon that is killed tells nobody that its leases are over. The mounts of its machine
// do (doc/decisions/0023-certified-death.md): that it has ended is known from a lock,
// which the kernel takes from it when nothing of it runs any more, and what its clients
// may still have cached from a page that it leaves behind.
//
// The page is a file in the directory of the sockets, which a daemon makes anew when it
// starts and keeps locked. It has the number of its life, and until when each of its clients
// may answer from a cache, by the machine's monotonic clock. A lease stands there before its client
// hears of it. A mount that has lost its home here drops its caches and clears its own
// slot, no other.
type page struct {
	f *os.File

	mu   sync.Mutex // guards the fields below
	ends [pageSlots]int64
	by   [pageSlots]*lessee // the last one whose it was
	rest int64              // the end of the last lease that found no slot
}

// lessee is a client's connection, as far as the page knows it. One session may have two
// for a moment.
type lessee struct{ slot int }

// Layout of the page: magic, boot, end of the leases of former lives, end of those without a
// slot, all 8 bytes long and little-endian; since when the clock runs, as the kernel calls
// it; then the slots, session and end, 8 bytes each.
const (
	pageMagic  = 0x316566694c72744d // "MtrLife1"
	pageKernel = 32
	pageHeader = 80
	pageSlot   = 16
	pageSlots  = 1019
	pageSize   = pageHeader + pageSlots*pageSlot
)

// pagePath is where the page of the daemon is that runs, or ran last, on this machine.
func pagePath(runDir string) string { return filepath.Join(runDir, "life") }

// clock is the machine's monotonic clock, which processes share.
func clock() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err) // there is no Linux without it
	}
	return ts.Nano()
}

// kernelBoot names this run of the kernel, and with it of the clock.
func kernelBoot() (id [pageHeader - pageKernel]byte) {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	copy(id[:], b)
	return id
}

// formerLease is when the last lease of former lives ends. The page of the last one says it,
// if it is that one's, and if its clock was this one.
func formerLease(runDir string, former uint64) int64 {
	end := clock() + int64(cluster.LeaseGuard)
	f, err := os.Open(pagePath(runDir))
	if err != nil {
		return end
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil {
		return end
	}
	b, err := readPage(f)
	boot := kernelBoot()
	if err != nil || former == 0 || binary.LittleEndian.Uint64(b[8:]) != former || boot[0] == 0 || !bytes.Equal(b[pageKernel:pageHeader], boot[:]) {
		return end
	}
	return min(end, lastLease(b))
}

// newPage makes the page of life boot. Nobody else may be alive in the same directory.
func newPage(runDir string, boot, former uint64) (*page, error) {
	f, err := os.CreateTemp(runDir, ".life-*")
	if err != nil {
		return nil, err
	}
	b := make([]byte, pageSize) // all of it now: later there may be no room
	binary.LittleEndian.PutUint64(b, pageMagic)
	binary.LittleEndian.PutUint64(b[8:], boot)
	binary.LittleEndian.PutUint64(b[16:], uint64(formerLease(runDir, former)))
	kernel := kernelBoot()
	copy(b[pageKernel:], kernel[:])
	if _, err = f.Write(b); err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err == nil {
		err = os.Rename(f.Name(), pagePath(runDir))
	}
	if err != nil {
		os.Remove(f.Name())
		f.Close()
		return nil, fmt.Errorf("page of leases: %w", err)
	}
	return &page{f: f}, nil
}

// close ends the life, as far as the page knows. It may be called twice.
func (p *page) close() { p.f.Close() }

// gives notes that a session may answer from its caches for d from now.
func (p *page) gives(l *lessee, id cluster.SessionID, d time.Duration) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := clock()
	end := now + int64(d)
	if p.by[l.slot] != l {
		i := slices.IndexFunc(p.ends[:], func(end int64) bool { return end <= now })
		if i < 0 {
			p.rest = max(p.rest, end)
			return p.writeLocked(24, uint64(p.rest))
		}
		l.slot, p.by[i], p.ends[i] = i, l, 0
	}
	p.ends[l.slot] = max(p.ends[l.slot], end)
	return p.writeLocked(pageHeader+int64(l.slot)*pageSlot, uint64(id), uint64(p.ends[l.slot]))
}

// lapsed notes that a client has dropped what it had cached.
func (p *page) lapsed(l *lessee) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.by[l.slot] != l {
		return nil
	}
	p.by[l.slot], p.ends[l.slot] = nil, 0
	return p.writeLocked(pageHeader+int64(l.slot)*pageSlot+8, 0)
}

func (p *page) writeLocked(at int64, words ...uint64) error {
	var b []byte
	for _, w := range words {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	_, err := p.f.WriteAt(b, at)
	return err
}

// peerDied takes a peer's word that a life of its own daemon has ended.
func (m *member) peerDied(peer cluster.PeerID, boot uint64) {
	if !m.links.died(peer, boot, func() { m.bricks.peerDied(peer) }) {
		m.log.Info("a peer's daemon is said to have ended, of which this one has heard nothing since", "peer", peer)
		return
	}
	m.log.Info("a peer's daemon has ended", "peer", peer)
	if plane := m.plane.Load(); plane != nil {
		plane.LeaderDied(peer)
	}
}

// certifier is a mount's part: it tells the other peers when the daemon of its machine has died.
type certifier struct {
	stateDir, runDir string
	log              *slog.Logger
	ctx              context.Context
	wg               sync.WaitGroup
}

// Times of a certificate.
const (
	lookEvery  = 3 * time.Millisecond
	deathLimit = 2 * time.Second // as long as a lease; then it is of no use any more
)

// homeLost is called when a session has lost its home here, and has dropped its caches.
func (c *certifier) homeLost(id cluster.SessionID) {
	f, err := os.OpenFile(pagePath(c.runDir), os.O_RDWR|syscall.O_NOFOLLOW, 0)
	if err != nil {
		c.log.Info("whether the daemon has died is not known", "error", err)
		return
	}
	// Whatever life's page this is, no lease from it is used any more.
	if err := clearSlot(f, id); err != nil {
		c.log.Info("the page of leases was not changed", "error", err)
	}
	c.wg.Go(func() {
		defer f.Close()
		ctx, cancel := context.WithTimeout(c.ctx, deathLimit)
		defer cancel()
		if err := c.certify(ctx, f); err != nil && c.ctx.Err() == nil {
			c.log.Debug("the daemon's death was not certified", "reason", err)
		}
	})
}

// clearSlot ends a session's leases.
func clearSlot(f *os.File, id cluster.SessionID) error {
	b, err := readPage(f)
	if err != nil {
		return err
	}
	for at := pageHeader; at < pageSize; at += pageSlot {
		if cluster.SessionID(binary.LittleEndian.Uint64(b[at:])) == id {
			if _, err := f.WriteAt(make([]byte, 8), int64(at)+8); err != nil {
				return err
			}
		}
	}
	return nil
}

func readPage(f *os.File) ([]byte, error) {
	b := make([]byte, pageSize)
	if _, err := io.ReadFull(io.NewSectionReader(f, 0, pageSize), b); err != nil {
		return nil, err
	}
	if binary.LittleEndian.Uint64(b) != pageMagic {
		return nil, errors.New("it is no page of leases")
	}
	return b, nil
}

// lastLease is when the last lease in a page ends.
func lastLease(b []byte) int64 {
	last := max(int64(binary.LittleEndian.Uint64(b[16:])), int64(binary.LittleEndian.Uint64(b[24:])))
	for at := pageHeader; at < pageSize; at += pageSlot {
		last = max(last, int64(binary.LittleEndian.Uint64(b[at+8:])))
	}
	return last
}

// certify waits until the life that the page is of has ended, and all the leases in it are
// over, and then says so to the other peers.
func (c *certifier) certify(ctx context.Context, f *os.File) error {
	wait := func(why string) error {
		select {
		case <-time.After(lookEvery):
			return nil
		case <-ctx.Done():
			return errors.New(why)
		}
	}
	for unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil {
		if err := wait("it lives"); err != nil {
			return err
		}
	}
	var b []byte
	for {
		var err error
		if b, err = readPage(f); err != nil {
			return err
		}
		if clock() >= lastLease(b) {
			break
		}
		if err := wait("its clients have leases"); err != nil {
			return err
		}
	}
	return c.tell(ctx, &proto.Died{Boot: binary.LittleEndian.Uint64(b[8:])})
}

// tell says it to every other peer.
func (c *certifier) tell(ctx context.Context, died *proto.Died) error {
	keeper, err := machineKeeper(filepath.Join(c.stateDir, identityFile))
	if err != nil {
		return err
	}
	known, err := loadMap(filepath.Join(c.stateDir, mapFile))
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	for _, p := range known.Peers {
		if p.ID == keeper.ID() {
			continue
		}
		wg.Go(func() {
			err := tellDied(ctx, keeper, p, died)
			c.log.Info("the daemon of this machine has died", "told", p.Name, "error", err)
		})
	}
	wg.Wait()
	return nil
}

// tellDied says it to one.
func tellDied(ctx context.Context, keeper *pki.Keeper, p *cluster.Peer, died *proto.Died) error {
	tc, _, err := dialAny(ctx, p.Addrs, keeper.ClientTo(alpnData, p.ID))
	if err != nil {
		return err
	}
	conn := wire.New(tc, wire.Options{})
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() { // waited for below
		defer close(ended)
		_ = conn.Run(ctx)
	}()
	_, err = conn.Call(ctx, proto.KindDied, codec.Append(nil, died))
	cancel()
	<-ended
	return err
}
