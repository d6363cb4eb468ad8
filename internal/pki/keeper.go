package pki

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"mortar/internal/cluster"
)

// KeeperOptions says how a Keeper behaves.
type KeeperOptions struct {
	// Path is where renewed identities are saved; "" for nowhere.
	Path string
	// Allow, if set, is asked about every certificate that is otherwise in
	// order: a peer that was removed from the pool still has one.
	Allow func(cert *x509.Certificate) error
	Now   func() time.Time // nil: time.Now
	Log   *slog.Logger     // nil: discard
}

// Keeper keeps this machine's identity up to date and makes TLS configurations
// of it. Configurations follow: what was made before a renewal uses the new certificate.
type Keeper struct {
	o    KeeperOptions
	id   atomic.Pointer[Identity]
	name cluster.PeerID
}

// NewKeeper keeps id, which has a certificate.
func NewKeeper(id *Identity, o KeeperOptions) (*Keeper, error) {
	if id.Cert == nil {
		return nil, id.Check(time.Time{})
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	k := &Keeper{o: o, name: id.ID()}
	k.id.Store(id)
	return k, nil
}

// Identity returns the current identity.
func (k *Keeper) Identity() *Identity { return k.id.Load() }

// ID is the identity's name, which never changes.
func (k *Keeper) ID() cluster.PeerID { return k.name }

// Replace makes id, which has the same key, the current identity, and saves it.
func (k *Keeper) Replace(id *Identity) error {
	if id.Cert == nil || id.ID() != k.ID() {
		return fmt.Errorf("%w: it is not a certificate of %s", ErrCert, k.ID())
	}
	if k.o.Path != "" {
		if err := id.Save(k.o.Path); err != nil {
			return fmt.Errorf("saving the renewed certificate: %w", err)
		}
	}
	k.id.Store(id)
	return nil
}

// Rule is who may connect with a protocol.
type Rule struct {
	ALPN  string
	Roles []Role // nil: anybody, also without a certificate; but one that is shown must be good
}

// Server is the configuration of a listener for those protocols. The
// certificate that a connection shows is checked by the rule for its protocol.
func (k *Keeper) Server(rules ...Rule) *tls.Config {
	cfg := k.base()
	for _, r := range rules {
		cfg.NextProtos = append(cfg.NextProtos, r.ALPN)
	}
	cfg.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return k.Identity().tls(), nil }
	cfg.ClientAuth = tls.RequestClientCert // which of them are needed is known once the protocol is
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		for _, r := range rules {
			if r.ALPN == cs.NegotiatedProtocol {
				return k.admit(cs, r.Roles)
			}
		}
		return fmt.Errorf("protocol %q is not served here", cs.NegotiatedProtocol)
	}
	return cfg
}

// admit applies a rule's roles to a connection.
func (k *Keeper) admit(cs tls.ConnectionState, roles []Role) error {
	if len(cs.PeerCertificates) == 0 {
		if roles == nil {
			return nil
		}
		return fmt.Errorf("%w: %s is for machines of this pool", ErrNoCert, cs.NegotiatedProtocol)
	}
	if roles == nil {
		roles = []Role{RolePeer, RoleClient}
	}
	return k.verify(cs.PeerCertificates[0], roles...)
}

func (k *Keeper) verify(cert *x509.Certificate, roles ...Role) error {
	if err := Verify(cert, k.Identity().CA, k.o.Now(), roles...); err != nil {
		return err
	}
	if k.o.Allow != nil {
		return k.o.Allow(cert)
	}
	return nil
}

// Client is the configuration to dial any peer of the pool with.
func (k *Keeper) Client(alpn string) *tls.Config { return k.ClientTo(alpn, cluster.PeerID{}) }

// ClientTo is the configuration to dial that very peer with: addresses are
// hints, and somebody else may have this one by now. A zero id stands for any peer.
func (k *Keeper) ClientTo(alpn string, id cluster.PeerID) *tls.Config {
	cfg := k.base()
	cfg.NextProtos = []string{alpn}
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return k.Identity().tls(), nil }
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) == 0 {
			return ErrNoCert
		}
		cert := cs.PeerCertificates[0]
		if err := k.verify(cert, RolePeer); err != nil {
			return err
		}
		if got := PeerIDFromCert(cert); !id.IsZero() && got != id {
			return fmt.Errorf("%w: %s, where %s was looked for", ErrPeer, got, id)
		}
		return nil
	}
	return cfg
}

func (k *Keeper) base() *tls.Config {
	cfg := baseTLS()
	cfg.Time = k.o.Now
	return cfg
}

// baseTLS is what all configurations have in common. Certificates are checked
// by VerifyConnection, since names play no part and the roots are one CA.
func baseTLS() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		ServerName:         serverName,
		InsecureSkipVerify: true,
		// Tickets would be words of TLS after the handshake, and save nothing on
		// connections that live for days.
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true,
	}
}

// tls is the identity as TLS shows it: with the CA, for those who know only its digest.
func (id *Identity) tls() *tls.Certificate {
	return &tls.Certificate{
		Certificate: [][]byte{id.Cert.Raw, id.CA.Raw},
		PrivateKey:  id.Key,
		Leaf:        id.Cert,
	}
}

// JoinClient is the configuration of a machine that has nothing but a token:
// it trusts the peer whose CA has the token's digest. After the handshake the CA is
// the second of the connection's PeerCertificates. now is time.Now if nil.
func JoinClient(digest [32]byte, alpn string, now func() time.Time) *tls.Config {
	if now == nil {
		now = time.Now
	}
	cfg := baseTLS()
	cfg.NextProtos = []string{alpn}
	cfg.Time = now
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) > 0 {
			if role, err := RoleFromCert(cs.PeerCertificates[0]); err == nil && role == roleProbe {
				return fmt.Errorf("%w: that machine belongs to no pool itself; give the address of the peer that made the token", ErrOtherCA)
			}
		}
		if len(cs.PeerCertificates) != 2 {
			return fmt.Errorf("%w: the other side is not a peer of a pool", ErrNoCert)
		}
		cert, ca := cs.PeerCertificates[0], cs.PeerCertificates[1]
		if Digest(ca) != digest {
			return fmt.Errorf("%w: the token is not one of that machine's pool (CA digest %s); check the address, and that nobody listens in between", ErrOtherCA, shortDigest(ca))
		}
		return Verify(cert, ca, now(), RolePeer)
	}
	return cfg
}

// ProbeServer is the configuration of a machine that was started to accept
// being probed: it shows its key by a certificate that it signed itself.
func ProbeServer(id *Identity, now time.Time, alpn ...string) (*tls.Config, error) {
	t := template(roleProbe, id.ID().String(), now, CertLife)
	t.KeyUsage = x509.KeyUsageDigitalSignature
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	t.DNSNames = []string{serverName}
	cert, err := create(t, t, id.Key.Public().(ed25519.PublicKey), id.Key)
	if err != nil {
		return nil, fmt.Errorf("making a certificate to be probed with: %w", err)
	}
	cfg := baseTLS()
	cfg.NextProtos = alpn
	cfg.Certificates = []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: id.Key, Leaf: cert}}
	return cfg, nil
}

// ErrMember is wrapped when a machine that is to be probed belongs to a pool.
var ErrMember = errors.New("already in a pool")

// ProbeClient is the configuration to probe a machine with. There is nothing
// to recognise the machine by but that it says it wants to be probed; its identity is
// that of the connection's certificate (PeerIDFromCert). The error wraps ErrMember
// if the machine is in a pool, whichever.
func ProbeClient(alpn string) *tls.Config {
	cfg := baseTLS()
	cfg.NextProtos = []string{alpn}
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) == 0 {
			return ErrNoCert
		}
		cert := cs.PeerCertificates[0]
		if _, ok := cert.PublicKey.(ed25519.PublicKey); !ok {
			return fmt.Errorf("%w: something else than mortar listens there", ErrKey)
		}
		role, err := RoleFromCert(cert)
		switch {
		case err != nil:
			return err
		case role == RolePeer && len(cs.PeerCertificates) > 1:
			return fmt.Errorf("%w: peer %s of the pool with CA digest %s", ErrMember, PeerIDFromCert(cert), shortDigest(cs.PeerCertificates[1]))
		case role != roleProbe:
			return fmt.Errorf("%w: %s, where a machine started with --accept-probe is due", ErrRole, role)
		case cert.Subject.CommonName != PeerIDFromCert(cert).String():
			return fmt.Errorf("%w: it is not in the name of its key", ErrCert)
		}
		return cert.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature)
	}
	return cfg
}

// How often a renewal that failed is tried again.
const (
	renewFirst = time.Minute
	renewMost  = time.Hour
)

// Run renews the certificate at half of its life, until ctx ends, and returns
// ctx's cause. sign has a signing request signed by the pool. Failures are logged and
// tried again; there are 45 days for that.
func (k *Keeper) Run(ctx context.Context, sign func(ctx context.Context, csr []byte) (*x509.Certificate, error)) error {
	retry := renewFirst
	timer := time.NewTimer(k.due())
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timer.C:
		}
		if k.due() > 0 { // a long sleep may end early by the wall clock
			timer.Reset(k.due())
			continue
		}
		err := k.Renew(ctx, sign)
		switch {
		case err == nil:
			retry = renewFirst
			timer.Reset(k.due())
			k.o.Log.Info("certificate renewed", "valid_until", k.Identity().Cert.NotAfter)
		case ctx.Err() != nil:
			return context.Cause(ctx)
		default:
			k.o.Log.Warn("renewing this machine's certificate failed; it is tried again",
				"err", err, "next_try_in", retry, "valid_until", k.Identity().Cert.NotAfter)
			// Not all machines of a pool at the same moment.
			timer.Reset(retry + rand.N(retry/4))
			retry = min(2*retry, renewMost)
		}
	}
}

// Renew has a new certificate signed for the same key, at once.
func (k *Keeper) Renew(ctx context.Context, sign func(ctx context.Context, csr []byte) (*x509.Certificate, error)) error {
	id := k.Identity()
	csr, err := id.CSR()
	if err != nil {
		return err
	}
	cert, err := sign(ctx, csr)
	if err != nil {
		return err
	}
	next, err := id.With(cert, id.CA)
	if err != nil {
		return err
	}
	if err := next.Check(k.o.Now()); err != nil {
		return err
	}
	return k.Replace(next)
}

// due is how long the certificate is not to be renewed yet. At most a day: the
// wall clock, which dates go by, may be set meanwhile.
func (k *Keeper) due() time.Duration {
	c := k.Identity().Cert
	half := c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore) / 2)
	return min(half.Sub(k.o.Now()), 24*time.Hour)
}
