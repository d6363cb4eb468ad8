package pki

import (
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"mortar/internal/cluster"
)

// Why a certificate is refused. Errors of Verify wrap one of them.
var (
	ErrNoCert  = errors.New("no certificate")
	ErrCert    = errors.New("malformed certificate")
	ErrKey     = errors.New("not an Ed25519 key")
	ErrOtherCA = errors.New("certificate of another pool")
	ErrRole    = errors.New("certificate for another role")
	ErrExpired = errors.New("certificate expired")
	ErrEarly   = errors.New("certificate not valid yet")
	ErrPeer    = errors.New("another peer answered")
)

// PeerIDFromKey is the identity of the owner of a key.
func PeerIDFromKey(key ed25519.PrivateKey) cluster.PeerID {
	id, err := peerID(key.Public().(ed25519.PublicKey))
	if err != nil {
		panic(err) // marshaling an Ed25519 key cannot fail
	}
	return id
}

// PeerIDFromCert is the identity of a certificate's owner. It depends on the
// key alone, so it stays when the certificate is renewed.
func PeerIDFromCert(cert *x509.Certificate) cluster.PeerID {
	return idOf(cert.RawSubjectPublicKeyInfo)
}

func peerID(pub ed25519.PublicKey) (cluster.PeerID, error) {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return cluster.PeerID{}, err
	}
	return idOf(spki), nil
}

func idOf(spki []byte) (id cluster.PeerID) {
	sum := sha256.Sum256(spki)
	copy(id[:], sum[:])
	return id
}

// RoleFromCert is the role that a certificate names. Only Verify makes it true.
func RoleFromCert(cert *x509.Certificate) (Role, error) {
	s := cert.Subject
	if len(s.Organization) != 1 || s.Organization[0] != organization || len(s.OrganizationalUnit) != 1 {
		return "", fmt.Errorf("%w: its subject %q names no role", ErrCert, s)
	}
	switch r := Role(s.OrganizationalUnit[0]); r {
	case RolePeer, RoleClient, roleProbe:
		return r, nil
	}
	return "", fmt.Errorf("%w: its role %q is unknown here", ErrRole, s.OrganizationalUnit[0])
}

// Verify says whether cert was signed by ca, is valid now, and is for one of
// the roles; nil if so. The error says what to do about it.
func Verify(cert, ca *x509.Certificate, now time.Time, roles ...Role) error {
	who := fmt.Sprintf("certificate of %s", PeerIDFromCert(cert))
	if _, ok := cert.PublicKey.(ed25519.PublicKey); !ok {
		return fmt.Errorf("%w: the certificate of %q has one of type %v; mortar's certificates come from \"mortar join\" alone", ErrKey, cert.Subject, cert.PublicKeyAlgorithm)
	}
	if err := cert.CheckSignatureFrom(ca); err != nil {
		return fmt.Errorf("%w: the %s is not signed by the CA of this pool (digest %s); a machine is in one pool only: detach it from the other (\"mortar peer detach\" there) and let it join this one", ErrOtherCA, who, shortDigest(ca))
	}
	if cert.IsCA || len(cert.UnhandledCriticalExtensions) > 0 || cert.Subject.CommonName != PeerIDFromCert(cert).String() {
		return fmt.Errorf("%w: the %s is not one that a pool's CA signs", ErrCert, who)
	}
	role, err := RoleFromCert(cert)
	if err != nil {
		return err
	}
	if !slices.Contains(roles, role) {
		return fmt.Errorf("%w: the %s is for a %s, and this is for a %s", ErrRole, who, role, join(roles))
	}
	if now.Before(cert.NotBefore) {
		return fmt.Errorf("%w: the %s is valid from %s, and here it is %s; set the clocks of both machines (timedatectl)", ErrEarly, who, date(cert.NotBefore), date(now))
	}
	if now.After(cert.NotAfter) {
		return fmt.Errorf("%w: the %s expired on %s, and here it is %s; if the clocks are right, run \"mortar peer invite\" on a peer of the pool and \"mortar join\" with its token on the machine with the expired certificate", ErrExpired, who, date(cert.NotAfter), date(now))
	}
	return nil
}

func join(roles []Role) string {
	s := make([]string, len(roles))
	for i, r := range roles {
		s[i] = string(r)
	}
	return strings.Join(s, " or ")
}

// date prints a time for people, to the minute and in UTC.
func date(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }

func shortDigest(ca *x509.Certificate) string {
	d := Digest(ca)
	return fmt.Sprintf("%x…", d[:8])
}
