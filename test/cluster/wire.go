package cluster

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// wire is a switch in user space whose cables have a length and a width, for
// kernels without netem: each host's eth0 is a TAP device whose other end is
// here. Frames keep their virtio header, so the kernel hands over and takes
// whole TCP segments of up to 64 KiB and bulk traffic stays cheap.
type wire struct {
	delay time.Duration
	rate  int64 // bits/s of a port in each direction; 0: no limit

	mu    sync.RWMutex
	ports map[string]*port
	macs  map[[6]byte]*port
	cuts  map[[2]string]bool // from, to; "" for any
}

type port struct {
	host string
	fd   int
	down bool       // guarded by wire.mu
	tx   time.Time  // when the cable towards the switch is free again; the reader's
	out  chan frame // towards the host
}

type frame struct {
	due  time.Time // when its first bit reaches the host
	data []byte
}

const (
	virtioHeader = 10
	// queueLimit is how far behind a port may fall before it drops, as a switch
	// with a full buffer does.
	queueLimit = 100 * time.Millisecond
	// What Ethernet adds to a frame: preamble, checksum and gap.
	wireOverhead = 24
)

func newWire(delay time.Duration, rate int64) *wire {
	return &wire{delay: delay, rate: rate, ports: map[string]*port{}, macs: map[[6]byte]*port{}, cuts: map[[2]string]bool{}}
}

func (w *wire) port(host string, pid int) error {
	fd, err := tapIn(pid, "eth0")
	if err != nil {
		return fmt.Errorf("make a TAP device in %s: %w", host, err)
	}
	p := &port{host: host, fd: fd, out: make(chan frame, 4096)}
	w.mu.Lock()
	w.ports[host] = p
	w.mu.Unlock()
	go w.read(p)
	go w.write(p)
	return nil
}

// tapIn makes a TAP device in the network namespace of a process.
func tapIn(pid int, name string) (int, error) {
	type result struct {
		fd  int
		err error
	}
	res := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // the thread changes its namespace and is thrown away
		fd, err := func() (int, error) {
			ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
			if err != nil {
				return -1, err
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return -1, err
			}
			fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return -1, err
			}
			ifr, err := unix.NewIfreq(name)
			if err != nil {
				return -1, err
			}
			ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
			if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
				return -1, err
			}
			const offloads = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
			return fd, unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads)
		}()
		res <- result{fd, err}
	}()
	r := <-res
	return r.fd, r.err
}

// span is how long the bytes of a frame occupy a cable.
func (w *wire) span(data []byte) time.Duration {
	if w.rate == 0 {
		return 0
	}
	bytes := len(data) - virtioHeader + wireOverhead
	if size := int(binary.LittleEndian.Uint16(data[4:])); size > 0 { // gso_size: it is many frames
		head := int(binary.LittleEndian.Uint16(data[2:]))
		if n := (len(data) - virtioHeader - head) / size; n > 0 {
			bytes += n * (head + wireOverhead)
		}
	}
	return time.Duration(int64(bytes) * 8 * int64(time.Second) / w.rate)
}

func (w *wire) read(p *port) {
	runtime.LockOSThread()
	buf := make([]byte, 1<<17)
	for {
		n, err := unix.Read(p.fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return // the host is gone
		}
		if n < virtioHeader+14 {
			continue
		}
		now := time.Now()
		data := append([]byte(nil), buf[:n]...)
		if p.tx.Before(now) {
			p.tx = now
		}
		if p.tx.Sub(now) > queueLimit {
			continue
		}
		due := p.tx.Add(w.delay)
		p.tx = p.tx.Add(w.span(data))
		w.forward(p, frame{due, data})
	}
}

func (w *wire) forward(from *port, f frame) {
	var dst, src [6]byte
	copy(dst[:], f.data[virtioHeader:])
	copy(src[:], f.data[virtioHeader+6:])
	w.mu.RLock()
	known := w.macs[src] == from
	to := w.macs[dst]
	w.mu.RUnlock()
	if !known {
		w.mu.Lock()
		w.macs[src] = from
		w.mu.Unlock()
	}
	w.mu.RLock()
	defer w.mu.RUnlock()
	if to != nil && dst[0]&1 == 0 {
		w.send(from, to, f)
		return
	}
	for _, p := range w.ports {
		w.send(from, p, f)
	}
}

// send queues a frame; w.mu is held.
func (w *wire) send(from, to *port, f frame) {
	if from == to || from.down || to.down ||
		w.cuts[[2]string{from.host, ""}] || w.cuts[[2]string{"", to.host}] || w.cuts[[2]string{from.host, to.host}] {
		return
	}
	select {
	case to.out <- f:
	default:
	}
}

func (w *wire) write(p *port) {
	runtime.LockOSThread()
	var free time.Time // when the cable towards the host is free again
	for f := range p.out {
		if free.Sub(f.due) > queueLimit {
			continue
		}
		if free.Before(f.due) {
			free = f.due
		}
		free = free.Add(w.span(f.data))
		for {
			d := time.Until(free)
			if d <= 0 {
				break
			}
			ts := unix.NsecToTimespec(int64(d))
			unix.Nanosleep(&ts, nil)
		}
		unix.Write(p.fd, f.data) // fails while the host's device is down, as a cable does
	}
}

func (w *wire) link(host string, up bool) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := w.ports[host]
	if p == nil {
		return fmt.Errorf("no port %s", host)
	}
	p.down = !up
	carrier := 0
	if up {
		carrier = 1
	}
	return unix.IoctlSetPointerInt(p.fd, unix.TUNSETCARRIER, carrier)
}

func (w *wire) drop(from, to string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cuts[[2]string{from, to}] = true
	return nil
}

func (w *wire) mend() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	clear(w.cuts)
	return nil
}
