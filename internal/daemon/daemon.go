// Package daemon builds one node of mortar and owns its lifetime: it opens the
// state directory, listens, takes part in the pool's control plane, keeps the
// connections to the other peers, serves the bricks of this machine, and
// answers mounts, the command line and other peers. What these things do is
// decided in the packages that they come from; here they are introduced to
// each other, started in order and stopped in the reverse order.
//
// A Node lives as long as its process. Its membership of a pool (see member)
// may begin and end meanwhile: a fresh machine belongs to no pool until the
// first command that needs one, and "mortar join" replaces the membership.
package daemon

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"mortar/internal/api"
	"mortar/internal/cluster"
	"mortar/internal/control"
	"mortar/internal/dockervol"
	"mortar/internal/httpd"
	"mortar/internal/metrics"
	"mortar/internal/pki"
	"mortar/internal/proto"
	"mortar/internal/wire"
)

// Node is one mortar daemon.
type Node struct {
	// constant after New
	cfg       Config
	named     bool // the administrator chose Config.Name
	log       *slog.Logger
	boot      uint64
	lock      *os.File
	page      *page
	port      uint16
	tcp       net.Listener
	apiSocket net.Listener
	data      net.Listener
	docker    net.Listener // nil: no volume driver
	driver    atomic.Pointer[dockervol.Driver]
	metrics   *metrics.Registry
	rest      *httpd.Server

	ctx   context.Context // of Run; members live in it
	group *errgroup.Group

	joining sync.Mutex // held while the membership is being changed
	enrolls chan struct{}

	mu       sync.Mutex // guards the fields below
	identity *pki.Identity
	outsider *tls.Config // while there is no member
	member   *member     // nil: this machine belongs to no pool
	fault    error       // why it serves nothing although it belongs to one
}

// Files in the state directory.
const (
	identityFile = "identity.pem"
	controlDir   = "control"
	mapFile      = "map.json"
	goneFile     = "detached.json"
)

// New opens the state directory and all listeners, so that what is wrong with
// them is known at once. Close, or Run and its end, lets go of them.
func New(cfg Config) (_ *Node, err error) {
	named := cfg.Name != ""
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	n := &Node{cfg: cfg, named: named, log: cfg.Log, enrolls: make(chan struct{}, 4)}
	var b [8]byte
	rand.Read(b[:])
	n.boot = binary.LittleEndian.Uint64(b[:])
	defer func() {
		if err != nil {
			n.Close()
		}
	}()
	var former uint64
	if n.lock, former, err = lockState(cfg.StateDir, n.boot); err != nil {
		return nil, err
	}
	if cfg.NewIdentity {
		if err := os.Remove(n.path(identityFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("--new-identity: %w", err)
		}
	}
	if n.identity, err = loadIdentity(n.path(identityFile)); err != nil {
		return nil, err
	}
	if n.identity.Cert == nil {
		if err := n.forgetPool(); err != nil {
			return nil, err
		}
	}
	if n.outsider, err = outsiderTLS(n.identity, cfg.AcceptProbe); err != nil {
		return nil, err
	}
	if n.tcp, err = listenTCP(context.Background(), cfg.Listen); err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(n.tcp.Addr().String())
	if err != nil {
		return nil, err
	}
	p, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, err
	}
	n.port = uint16(p)
	if n.apiSocket, err = listenUnix(cfg.APISocket(), true); err != nil {
		return nil, fmt.Errorf("socket for commands: %w", err)
	}
	if n.data, err = listenUnix(cfg.DataSocket(), false); err != nil {
		return nil, fmt.Errorf("socket for mounts: %w", err)
	}
	if n.docker, err = n.listenDocker(); err != nil {
		return nil, err
	}
	if n.page, err = newPage(cfg.RunDir, n.boot, former); err != nil {
		return nil, err
	}
	n.metrics = metrics.New(n.measure)
	n.rest = httpd.New(httpd.Config{Pool: n, Volumes: n, Local: n, Metrics: n.metrics.Handler(), Log: n.log.With("part", "api")})
	return n, nil
}

var (
	_ httpd.Pool    = (*Node)(nil)
	_ httpd.Volumes = (*Node)(nil)
	_ httpd.Local   = (*Node)(nil)
)

// path is a file in the state directory.
func (n *Node) path(name string) string { return filepath.Join(n.cfg.StateDir, name) }

// Addr is where the node listens for other machines.
func (n *Node) Addr() net.Addr { return n.tcp.Addr() }

// ID is the identity of the machine.
func (n *Node) ID() cluster.PeerID {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.identity.ID()
}

// Close lets go of a node that was not run. It may be called twice.
func (n *Node) Close() {
	for _, l := range []net.Listener{n.tcp, n.apiSocket, n.data, n.docker} {
		if l != nil {
			l.Close()
		}
	}
	if n.page != nil {
		n.page.close()
	}
	if n.lock != nil {
		n.lock.Close()
	}
}

// loadIdentity reads the machine's key, or makes one.
func loadIdentity(path string) (*pki.Identity, error) {
	id, err := pki.Load(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return id, err
	}
	if id, err = pki.NewIdentity(); err != nil {
		return nil, err
	}
	return id, id.Save(path)
}

// Run serves until ctx ends; then it hands over what it leads and stops. The
// error says why it could not go on.
func (n *Node) Run(ctx context.Context) error {
	defer n.Close()
	// The members end before the doors through which they are reached.
	inner, endInner := context.WithCancel(context.WithoutCancel(ctx))
	defer endInner()
	g, gctx := errgroup.WithContext(ctx)
	n.ctx, n.group = gctx, g
	doors, dctx := errgroup.WithContext(inner)

	if n.identity.Cert != nil {
		if err := n.identity.Check(time.Now()); err != nil {
			n.log.Error("this machine cannot take part in its pool", "error", err)
		}
		if _, err := n.startMember(n.identity); err != nil {
			return err
		}
	}
	mux := wire.NewMux(n.tcp, &tls.Config{GetConfigForClient: n.tlsFor}, wire.MuxOptions{Log: n.log})
	n.handle(mux)
	doors.Go(func() error { return n.door(mux.Run(dctx)) })
	doors.Go(func() error { return n.serveHTTP(dctx, n.apiSocket, unixDoor) })
	for alpn, door := range map[string]httpd.Door{alpnHTTP: httpd.Peer, alpnJoin: httpd.Joiner, alpnProbe: httpd.Prober} {
		ln := opaque{mux.Listener(alpn)}
		doors.Go(func() error { return n.serveHTTP(dctx, ln, func(net.Conn) httpd.Door { return door }) })
	}
	doors.Go(func() error { return n.serveData(dctx) })
	if n.docker != nil {
		doors.Go(func() error { return n.serveDocker(dctx) })
	}
	// A door that fails ends the node.
	g.Go(func() error {
		select {
		case <-dctx.Done():
			return context.Cause(dctx)
		case <-gctx.Done():
			return nil
		}
	})
	n.log.Info("mortar is up", "version", version(), "peer", n.ID(), "listen", n.tcp.Addr().String(), "socket", n.cfg.APISocket())
	if n.cfg.Ready != nil {
		n.cfg.Ready()
	}
	err := g.Wait()
	endInner()
	if derr := doors.Wait(); err == nil && derr != nil && !errors.Is(derr, context.Canceled) {
		err = derr
	}
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	n.log.Info("mortar is down", "error", err)
	return err
}

// door makes the planned end of a door no error.
func (n *Node) door(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// tlsFor chooses the configuration of one incoming connection.
func (n *Node) tlsFor(*tls.ClientHelloInfo) (*tls.Config, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.member != nil {
		return n.member.tls, nil
	}
	return n.outsider, nil
}

// handle registers what is spoken on the one port besides REST.
func (n *Node) handle(mux *wire.Mux) {
	// whole runs serve for a connection if this machine is in a pool.
	whole := func(alpn string, serve func(m *member, ctx context.Context, c *tls.Conn)) {
		mux.Handle(alpn, func(ctx context.Context, c *tls.Conn) {
			if m := n.current(); m != nil {
				serveAs(m, ctx, c, serve)
			}
		})
	}
	whole(alpnPeer, func(m *member, ctx context.Context, c *tls.Conn) { m.links.serve(ctx, c, secure) })
	whole(alpnPlain, func(m *member, ctx context.Context, c *tls.Conn) { m.links.serve(ctx, c, plain) })
	whole(alpnRaft, func(m *member, ctx context.Context, c *tls.Conn) { m.raft.serve(ctx, c) })
	whole(alpnData, func(m *member, ctx context.Context, c *tls.Conn) {
		if certs := c.ConnectionState().PeerCertificates; len(certs) > 0 { // the rules let nobody in without one
			m.serveMount(ctx, c, subjectOf(c), pki.PeerIDFromCert(certs[0]))
		}
	})
	mux.Handle(alpnIdentity, func(context.Context, *tls.Conn) {}) // the handshake has said it all
}

func subjectOf(c *tls.Conn) pki.Subject {
	var cert *x509.Certificate
	if certs := c.ConnectionState().PeerCertificates; len(certs) > 0 {
		cert = certs[0]
	} else {
		return pki.Subject{}
	}
	s, err := pki.SubjectFromCert(cert)
	if err != nil {
		return pki.Subject{}
	}
	return s
}

// unixDoor tells who asks on the socket for commands.
func unixDoor(c net.Conn) httpd.Door {
	if u, ok := c.(*net.UnixConn); ok && trusted(u) {
		return httpd.Admin
	}
	return httpd.Reader
}

// opaque hides from net/http that its connections are TLS: it would refuse
// protocols that it has not heard of.
type opaque struct{ net.Listener }

func (o opaque) Accept() (net.Conn, error) {
	c, err := o.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return struct{ net.Conn }{c}, nil
}

func (n *Node) serveHTTP(ctx context.Context, ln net.Listener, door func(net.Conn) httpd.Door) error {
	srv := n.rest.HTTP(door)
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return n.door(err)
	}
	return nil
}

// serveData accepts mounts on this machine.
func (n *Node) serveData(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { n.data.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := n.data.Accept()
		if err != nil {
			return n.door(err)
		}
		if !trusted(c) { // the mode of the socket says so already
			c.Close()
			continue
		}
		wg.Go(func() {
			defer c.Close()
			m := n.current()
			if m == nil {
				refuseMount(ctx, c, "this machine belongs to no pool")
				return
			}
			serveAs(m, ctx, c, func(m *member, ctx context.Context, c net.Conn) {
				m.serveMount(ctx, c, pki.Subject{Role: pki.RolePeer}, m.keeper.ID())
			})
		})
	}
}

// current is the membership, nil while there is none.
func (n *Node) current() *member {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.member
}

func (n *Node) setFault(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.fault = err
}

// need returns the membership, or why there is none to work with.
func (n *Node) need() (*member, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.member == nil {
		return nil, api.Errorf(api.Conflict, "this machine belongs to no pool: run \"mortar peer invite\" on a machine of the pool, and here what it prints; or make a volume here (mortar volume create), which begins a pool")
	}
	if err := n.faultLocked(); err != nil {
		return nil, apiError(err)
	}
	return n.member, nil
}

// faultLocked is why the machine cannot take part in the pool that it belongs to.
func (n *Node) faultLocked() error {
	if n.fault != nil || n.member == nil {
		return n.fault
	}
	return n.member.keeper.Identity().Check(time.Now())
}

// startMember begins a membership. Its end is handled here too.
func (n *Node) startMember(id *pki.Identity) (*member, error) {
	m, err := newMember(n, id)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	n.identity = id
	n.member = m
	n.mu.Unlock()
	n.group.Go(func() error {
		err := m.run()
		var gone *goneError
		var fault *faultError
		switch {
		case n.ctx.Err() != nil:
			return err
		case errors.As(err, &fault):
			// It must not take part, and its administrator must hear why.
			n.log.Error("this machine takes no part in its pool", "error", err)
			n.setFault(err)
			return nil
		case errors.As(err, &gone):
			n.log.Warn("this machine belongs to no pool any more", "reason", err)
			return n.leave(m)
		case errors.Is(err, errReplaced):
			return nil // whoever replaces it goes on
		}
		return err
	})
	return m, nil
}

// leave makes the machine one that belongs to no pool, after m has ended.
func (n *Node) leave(m *member) error {
	id := &pki.Identity{Key: m.keeper.Identity().Key}
	outsider, err := outsiderTLS(id, n.cfg.AcceptProbe)
	if err != nil {
		return err
	}
	// First the certificate: without one, what is left of the pool counts for
	// nothing at the next start.
	if err := id.Save(n.path(identityFile)); err != nil {
		return err
	}
	if err := n.forgetPool(); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.identity, n.outsider, n.fault = id, outsider, nil
	if n.member == m {
		n.member = nil
	}
	return nil
}

// forgetPool moves what this machine knew of a pool out of the way.
func (n *Node) forgetPool() error {
	if _, err := os.Lstat(n.path(controlDir)); err == nil {
		moved, err := control.Discard(n.path(controlDir))
		if err != nil {
			return err
		}
		n.log.Info("what this machine knew of its pool is kept aside", "at", moved)
	}
	for _, name := range []string{mapFile, goneFile} {
		if err := os.Remove(n.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Version implements httpd.Pool.
func (n *Node) Version() api.Version {
	return api.Version{Version: version(), Go: runtime.Version(), Protocol: proto.Version, PID: os.Getpid()}
}

// version is the version of the program, as its build recorded it.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "devel"
	}
	return info.Main.Version
}

// Version is the version of this program.
func Version() string { return version() }
