package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"mortar/internal/pki"
	"mortar/internal/wire"
)

// The protocols on the one port, told apart by TLS ALPN.
const (
	alpnRaft     = "mortar-raft/1"  // the control plane's own
	alpnPeer     = "mortar-peer/1"  // between daemons, encrypted
	alpnPlain    = "mortar-plain/1" // between daemons, encryption given up after the handshake
	alpnData     = "mortar-data/1"  // mounts
	alpnHTTP     = "http/1.1"       // the REST API, for peers
	alpnJoin     = "mortar-join/1"  // the REST API, for machines with a token
	alpnProbe    = "mortar-probe/1" // the REST API of a machine that waits to be probed
	alpnIdentity = "mortar-id/1"    // nothing but a handshake: who is there?
)

// rules says who may use which protocol once this machine belongs to a pool.
var rules = []pki.Rule{
	{ALPN: alpnRaft, Roles: []pki.Role{pki.RolePeer}},
	{ALPN: alpnPeer, Roles: []pki.Role{pki.RolePeer}},
	{ALPN: alpnPlain, Roles: []pki.Role{pki.RolePeer}},
	{ALPN: alpnData, Roles: []pki.Role{pki.RolePeer, pki.RoleClient}},
	{ALPN: alpnHTTP, Roles: []pki.Role{pki.RolePeer}},
	{ALPN: alpnJoin},
	{ALPN: alpnProbe},
	{ALPN: alpnIdentity},
}

// outsiderTLS is the configuration of a machine that belongs to no pool: it
// tells who it is to those who check that they can reach it, and if it was
// started to be probed it can be.
func outsiderTLS(id *pki.Identity, acceptProbe bool) (*tls.Config, error) {
	alpn := []string{alpnIdentity}
	if acceptProbe {
		alpn = append(alpn, alpnProbe)
	}
	return pki.ProbeServer(id, time.Now(), alpn...)
}

// dialTimeout bounds the way to another machine, TLS included. Within a rack it
// takes a millisecond; a lost packet costs a second.
const dialTimeout = 1500 * time.Millisecond

// How long the other end of a connection may be silent at the TCP level. The
// data path notices sooner by itself; this is for connections that carry nothing.
const (
	keepIdle     = 2 * time.Second
	keepInterval = time.Second
	keepCount    = 3
	userTimeout  = 5 * time.Second
)

// socketOptions sets them. On a listening socket, those that it accepts inherit them.
func socketOptions(_, _ string, c syscall.RawConn) error {
	var err error
	set := func(fd uintptr, level, opt, value int) {
		if err == nil {
			err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), level, opt, value))
		}
	}
	ctlErr := c.Control(func(fd uintptr) {
		set(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
		set(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(keepIdle/time.Second))
		set(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(keepInterval/time.Second))
		set(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepCount)
		set(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout/time.Millisecond))
	})
	return errors.Join(err, ctlErr)
}

// keepAlive keeps Go from putting its own values over those of socketOptions.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: keepIdle, Interval: keepInterval, Count: keepCount}

// listenTCP opens the one port.
func listenTCP(ctx context.Context, addr string) (net.Listener, error) {
	lc := net.ListenConfig{Control: socketOptions, KeepAliveConfig: keepAlive}
	ln, err := lc.Listen(ctx, "tcp", addr)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("port %s is in use: is another mortar daemon, or a glusterd, running? (ss -ltnp shows it; --listen chooses another port)", addr)
	}
	return ln, err
}

// dial connects to one address and does the handshake.
func dial(ctx context.Context, addr string, cfg *tls.Config) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	d := net.Dialer{Control: socketOptions, KeepAliveConfig: keepAlive}
	nc, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, unreachable(addr, err)
	}
	return wire.Client(ctx, nc, cfg)
}

// unreachable says which address and port could not be reached, and why, and
// what to look at.
func unreachable(addr string, err error) error {
	var dns *net.DNSError
	hint := ""
	switch {
	case errors.As(err, &dns):
		return fmt.Errorf("%s: the name cannot be resolved (%s); use an address", addr, dns.Err)
	case errors.Is(err, syscall.ECONNREFUSED):
		hint = "nothing listens there: is mortar running on that machine, and on this port?"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		hint = "no answer: is the machine up, and does its firewall let the port through?"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		hint = "there is no way to it: check address and routes"
	default:
		return fmt.Errorf("cannot connect to %s: %w", addr, err)
	}
	return fmt.Errorf("cannot connect to %s: %s", addr, hint)
}
