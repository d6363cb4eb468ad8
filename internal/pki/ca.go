package pki

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"time"

	"mortar/internal/cluster"
)

const (
	// CALife is how long a pool's CA is valid.
	CALife = 20 * 365 * 24 * time.Hour
	// CertLife is how long a certificate is valid. It is renewed at half of it.
	CertLife = 90 * 24 * time.Hour
	// Backdate is how far the clock of a machine may be behind that of the one
	// that signed its certificate.
	Backdate = time.Hour

	organization = "mortar"
	serverName   = "mortar"
)

// Role is what a certificate entitles its owner to be.
type Role string

const (
	RolePeer   Role = "peer"   // a machine of the pool
	RoleClient Role = "client" // mounts volumes, and nothing else
	roleProbe  Role = "probe"  // self-signed, of a machine that waits for its pool
	roleCA     Role = "ca"
)

// Grant allows a client to mount a volume.
type Grant struct {
	Volume string
	Write  bool
}

// Subject is what a certificate says of its owner, besides the key.
type Subject struct {
	Role   Role
	Grants []Grant // of a client
}

// CA is a pool's certificate authority with its private key.
type CA struct {
	Cert *x509.Certificate
	Key  ed25519.PrivateKey
}

// NewCA makes the CA of a new pool.
func NewCA(pool cluster.ID, now time.Time) (*CA, error) {
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the pool's key: %w", err)
	}
	t := template(roleCA, pool.String(), now, CALife)
	t.IsCA = true
	t.BasicConstraintsValid = true
	t.MaxPathLenZero = true
	t.KeyUsage = x509.KeyUsageCertSign
	cert, err := create(t, t, pub, key)
	if err != nil {
		return nil, fmt.Errorf("making the pool's certificate: %w", err)
	}
	return &CA{Cert: cert, Key: key}, nil
}

// Digest is the digest of a CA's certificate, by which join tokens pin it.
func Digest(ca *x509.Certificate) [sha256.Size]byte { return sha256.Sum256(ca.Raw) }

// Sign makes a certificate for the key that made the signing request, which is
// DER as CSR returns it. Of the request only the key counts.
func (ca *CA) Sign(csr []byte, s Subject, now time.Time) (*x509.Certificate, error) {
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("signing request: %w", err)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("signing request: %w", err)
	}
	pub, ok := req.PublicKey.(ed25519.PublicKey)
	if !ok {
		return nil, fmt.Errorf("signing request: %w: it has a key of type %v", ErrKey, req.PublicKeyAlgorithm)
	}
	if now.After(ca.Cert.NotAfter) {
		return nil, fmt.Errorf("%w: the pool's CA expired on %s", ErrExpired, date(ca.Cert.NotAfter))
	}
	id, err := peerID(pub)
	if err != nil {
		return nil, err
	}
	t := template(s.Role, id.String(), now, CertLife)
	t.NotAfter = earlier(t.NotAfter, ca.Cert.NotAfter)
	t.KeyUsage = x509.KeyUsageDigitalSignature
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	switch s.Role {
	case RolePeer:
		if len(s.Grants) > 0 {
			return nil, errors.New("grants are for clients")
		}
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
		t.DNSNames = []string{serverName}
	case RoleClient:
		for _, g := range s.Grants {
			t.URIs = append(t.URIs, g.url())
		}
	default:
		return nil, fmt.Errorf("no certificates are made for role %q", s.Role)
	}
	cert, err := create(t, ca.Cert, pub, ca.Key)
	if err != nil {
		return nil, fmt.Errorf("signing a certificate: %w", err)
	}
	return cert, nil
}

func template(role Role, name string, now time.Time, life time.Duration) *x509.Certificate {
	serial := make([]byte, 16)
	rand.Read(serial) // never fails, crypto/rand
	serial[0] &= 0x7f
	return &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial),
		Subject: pkix.Name{
			Organization:       []string{organization},
			OrganizationalUnit: []string{string(role)},
			CommonName:         name,
		},
		NotBefore:             now.Add(-Backdate),
		NotAfter:              now.Add(life),
		BasicConstraintsValid: true,
	}
}

func create(t, parent *x509.Certificate, pub ed25519.PublicKey, key ed25519.PrivateKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, parent, pub, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// url is how a Grant is written into a certificate.
func (g Grant) url() *url.URL {
	access := "ro"
	if g.Write {
		access = "rw"
	}
	return &url.URL{Scheme: "mortar", Host: "volume", Path: "/" + g.Volume, RawQuery: "access=" + access}
}

// SubjectFromCert reads what a verified certificate says of its owner.
func SubjectFromCert(cert *x509.Certificate) (Subject, error) {
	role, err := RoleFromCert(cert)
	if err != nil {
		return Subject{}, err
	}
	s := Subject{Role: role}
	for _, u := range cert.URIs {
		volume, ok := strings.CutPrefix(u.Path, "/")
		access := u.RawQuery
		if u.Scheme != "mortar" || u.Host != "volume" || !ok || volume == "" || access != "access=ro" && access != "access=rw" {
			return Subject{}, fmt.Errorf("%w: it has a grant that makes no sense: %s", ErrCert, u)
		}
		s.Grants = append(s.Grants, Grant{Volume: volume, Write: access == "access=rw"})
	}
	return s, nil
}

// MayMount says whether the subject may mount a volume: a peer may mount any,
// a client those that it was granted.
func (s Subject) MayMount(volume string, write bool) bool {
	return s.Role == RolePeer || s.Role == RoleClient && slices.ContainsFunc(s.Grants, func(g Grant) bool {
		return g.Volume == volume && (g.Write || !write)
	})
}
