package pki

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"mortar/internal/cluster"
)

// Identity is who this machine is: a key, and, once it belongs to a pool, the
// certificate that the pool's CA gave it. It is not changed after it was made;
// a renewed certificate makes a new one.
type Identity struct {
	Key  ed25519.PrivateKey
	Cert *x509.Certificate // nil before joining
	CA   *x509.Certificate // the pool's; nil before joining
}

// NewIdentity makes an identity that belongs to no pool yet.
func NewIdentity() (*Identity, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	return &Identity{Key: key}, nil
}

// ID is the identity's name in the pool.
func (id *Identity) ID() cluster.PeerID { return PeerIDFromKey(id.Key) }

// CSR is a signing request for the key, in DER.
func (id *Identity) CSR() ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, new(x509.CertificateRequest), id.Key)
	if err != nil {
		return nil, fmt.Errorf("making a signing request: %w", err)
	}
	return der, nil
}

// With returns the identity with a certificate that was signed for it, and
// refuses one that was not. ca is the pool's; the time is not looked at.
func (id *Identity) With(cert, ca *x509.Certificate) (*Identity, error) {
	if PeerIDFromCert(cert) != id.ID() {
		return nil, fmt.Errorf("%w: it is for %s, and the key here is that of %s", ErrCert, PeerIDFromCert(cert), id.ID())
	}
	if err := Verify(cert, ca, cert.NotAfter, RolePeer, RoleClient); err != nil {
		return nil, err
	}
	return &Identity{Key: id.Key, Cert: cert, CA: ca}, nil
}

// Check says whether the identity can be used now: it has a certificate and
// that is valid. The error says what to do.
func (id *Identity) Check(now time.Time) error {
	switch {
	case id.Cert == nil:
		return fmt.Errorf("%w: this machine belongs to no pool; run \"mortar join\" with a token from \"mortar peer invite\"", ErrNoCert)
	case now.After(id.Cert.NotAfter):
		return fmt.Errorf("%w: the certificate of this machine (%s) expired on %s, and here it is %s; if the clock is right, run \"mortar peer invite\" on a peer of the pool and \"mortar join\" with its token here",
			ErrExpired, id.ID(), date(id.Cert.NotAfter), date(now))
	case now.Before(id.Cert.NotBefore):
		return fmt.Errorf("%w: the certificate of this machine (%s) is valid from %s, and here it is %s; set the clock (timedatectl)",
			ErrEarly, id.ID(), date(id.Cert.NotBefore), date(now))
	}
	return nil
}

// The PEM blocks of identities and CAs.
const (
	blockKey  = "PRIVATE KEY"
	blockCert = "CERTIFICATE"
)

// PEM is the identity as text: key, certificate and CA, the latter two if it
// has them. It is secret.
func (id *Identity) PEM() []byte {
	b := pemKey(id.Key)
	if id.Cert != nil {
		b = append(b, CertPEM(id.Cert)...)
		b = append(b, CertPEM(id.CA)...)
	}
	return b
}

// ParseIdentity reads what PEM wrote.
func ParseIdentity(b []byte) (*Identity, error) {
	key, certs, err := parsePEM(b)
	if err != nil {
		return nil, err
	}
	id := &Identity{Key: key}
	switch len(certs) {
	case 0:
		return id, nil
	case 2:
		return id.With(certs[0], certs[1])
	}
	return nil, fmt.Errorf("%d certificates where the machine's and the CA's are due", len(certs))
}

// PEM is the CA as text, certificate and key. It is as secret as anything in
// the pool gets.
func (ca *CA) PEM() []byte { return append(pemKey(ca.Key), CertPEM(ca.Cert)...) }

// ParseCA reads what PEM wrote.
func ParseCA(b []byte) (*CA, error) {
	key, certs, err := parsePEM(b)
	if err != nil {
		return nil, fmt.Errorf("CA: %w", err)
	}
	if len(certs) != 1 || !certs[0].IsCA || PeerIDFromCert(certs[0]) != PeerIDFromKey(key) {
		return nil, errors.New("CA: the key and one certificate of a CA are due")
	}
	return &CA{Cert: certs[0], Key: key}, nil
}

// CertPEM is a certificate as text.
func CertPEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: blockCert, Bytes: c.Raw})
}

// ParseCert reads what CertPEM wrote.
func ParseCert(b []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(b)
	if block == nil || block.Type != blockCert || len(rest) != 0 {
		return nil, errors.New("not one certificate in PEM")
	}
	return x509.ParseCertificate(block.Bytes)
}

func pemKey(key ed25519.PrivateKey) []byte {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		panic(err) // marshaling an Ed25519 key cannot fail
	}
	return pem.EncodeToMemory(&pem.Block{Type: blockKey, Bytes: der})
}

// parsePEM reads one key and any certificates.
func parsePEM(b []byte) (key ed25519.PrivateKey, certs []*x509.Certificate, err error) {
	for len(b) > 0 {
		block, rest := pem.Decode(b)
		if block == nil {
			return nil, nil, errors.New("not in PEM form, or cut off")
		}
		switch block.Type {
		case blockKey:
			k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, nil, err
			}
			if key != nil {
				return nil, nil, errors.New("more than one private key")
			}
			var ok bool
			if key, ok = k.(ed25519.PrivateKey); !ok {
				return nil, nil, fmt.Errorf("%w: it is a %T", ErrKey, k)
			}
		case blockCert:
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, nil, err
			}
			certs = append(certs, c)
		default:
			return nil, nil, fmt.Errorf("unknown PEM block %q", block.Type)
		}
		b = rest
	}
	if key == nil {
		return nil, nil, errors.New("no private key")
	}
	return key, certs, nil
}

// maxPEM bounds the files that are read.
const maxPEM = 64 << 10

// Load reads an identity from a file that Save wrote. Like ssh it refuses one
// that others than its owner can read. The error wraps fs.ErrNotExist if there is none.
func Load(path string) (*Identity, error) {
	b, err := readSecret(path)
	if err != nil {
		return nil, err
	}
	id, err := ParseIdentity(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return id, nil
}

// Save writes the identity to a file with mode 0600, in whole or not at all,
// and durably.
func (id *Identity) Save(path string) error { return writeSecret(path, id.PEM()) }

// LoadCA reads a CA from a file, as Load does.
func LoadCA(path string) (*CA, error) {
	b, err := readSecret(path)
	if err != nil {
		return nil, err
	}
	ca, err := ParseCA(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return ca, nil
}

// Save writes the CA to a file, as Identity.Save does.
func (ca *CA) Save(path string) error { return writeSecret(path, ca.PEM()) }

// readSecret reads a file that only its owner can.
func readSecret(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !fi.Mode().IsRegular():
		return nil, &fs.PathError{Op: "read", Path: path, Err: errors.New("not a regular file")}
	case fi.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("%s has mode %04o, so others can read the secret key in it: if that cannot have happened, run \"chmod 600 %s\", else remove the machine from its pool and join anew", path, fi.Mode().Perm(), path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxPEM+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxPEM {
		return nil, fmt.Errorf("%s: longer than %d bytes", path, maxPEM)
	}
	return b, nil
}

// writeSecret replaces a file by way of a new one beside it.
func writeSecret(path string, b []byte) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // has mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if _, err = f.Write(b); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
