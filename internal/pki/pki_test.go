package pki

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"mortar/internal/cluster"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// epoch is the time of most tests.
var epoch = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func newCA(t testing.TB) *CA {
	t.Helper()
	ca, err := NewCA(cluster.NewID(), epoch)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// member makes an identity with a certificate of ca.
func member(t testing.TB, ca *CA, s Subject, now time.Time) *Identity {
	t.Helper()
	id, err := NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := id.CSR()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.Sign(csr, s, now)
	if err != nil {
		t.Fatal(err)
	}
	if id, err = id.With(cert, ca.Cert); err != nil {
		t.Fatal(err)
	}
	return id
}

// forge makes a certificate that differs from a good one as f says.
func forge(t testing.TB, ca *CA, pub any, f func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := template(RolePeer, idOf(spki).String(), epoch, CertLife)
	tmpl.KeyUsage = x509.KeyUsageDigitalSignature
	f(tmpl)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.Cert, pub, ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// badCert is a certificate that must not be believed, and why.
type badCert struct {
	name string
	cert *x509.Certificate
	key  any
	now  time.Time
	want error
	text string
}

// badCerts are all the ways in which a certificate can be wrong.
func badCerts(t testing.TB, ca *CA) []badCert {
	other := newCA(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := forge(t, ca, pub, func(*x509.Certificate) {})
	same := func(*x509.Certificate) {}
	client := member(t, ca, Subject{Role: RoleClient}, epoch)
	selfSigned := func() *x509.Certificate {
		tmpl := template(RolePeer, PeerIDFromKey(key).String(), epoch, CertLife)
		c, err := create(tmpl, tmpl, pub, key)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}()
	// A member that signs for others: its certificate is no CA's.
	minion := func() *x509.Certificate {
		parent := member(t, ca, Subject{Role: RolePeer}, epoch)
		tmpl := template(RolePeer, PeerIDFromKey(key).String(), epoch, CertLife)
		c, err := create(tmpl, parent.Cert, pub, parent.Key)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}()
	day := 24 * time.Hour
	return []badCert{
		{"expired", good, key, epoch.Add(90*day + time.Second), ErrExpired, "expired on 2026-05-30 12:00 UTC, and here it is 2026-05-30 12:00 UTC"},
		{"long expired", good, key, epoch.Add(400 * day), ErrExpired, `run "mortar peer invite"`},
		{"not yet valid", good, key, epoch.Add(-Backdate - time.Second), ErrEarly, "valid from 2026-03-01 11:00 UTC, and here it is 2026-03-01 10:59 UTC; set the clocks"},
		{"other pool", forge(t, other, pub, same), key, epoch, ErrOtherCA, "not signed by the CA of this pool"},
		{"self-signed", selfSigned, key, epoch, ErrOtherCA, "not signed by"},
		{"signed by a member", minion, key, epoch, ErrOtherCA, "not signed by"},
		{"client", client.Cert, client.Key, epoch, ErrRole, "is for a client, and this is for a peer"},
		{"the CA itself", ca.Cert, ca.Key, epoch, ErrCert, "not one that"},
		{"a CA below", forge(t, ca, pub, func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage = x509.KeyUsageCertSign }), key, epoch, ErrCert, "not one that a pool's CA signs"},
		{"RSA", forge(t, ca, &rsaKey.PublicKey, same), rsaKey, epoch, ErrKey, "RSA"},
		{"ECDSA", forge(t, ca, &ecKey.PublicKey, same), ecKey, epoch, ErrKey, "ECDSA"},
		{"no role", forge(t, ca, pub, func(c *x509.Certificate) { c.Subject.OrganizationalUnit = nil }), key, epoch, ErrCert, "no role"},
		{"two roles", forge(t, ca, pub, func(c *x509.Certificate) { c.Subject.OrganizationalUnit = []string{"client", "peer"} }), key, epoch, ErrCert, "no role"},
		{"unknown role", forge(t, ca, pub, func(c *x509.Certificate) { c.Subject.OrganizationalUnit = []string{"god"} }), key, epoch, ErrRole, "unknown"},
		{"role in capitals", forge(t, ca, pub, func(c *x509.Certificate) { c.Subject.OrganizationalUnit = []string{"PEER"} }), key, epoch, ErrRole, "unknown"},
		{"role with NUL", forge(t, ca, pub, func(c *x509.Certificate) { c.Subject.OrganizationalUnit = []string{"peer\x00client"} }), key, epoch, ErrRole, "unknown"},
		{"role of a CA", forge(t, ca, pub, func(c *x509.Certificate) { c.Subject.OrganizationalUnit = []string{"ca"} }), key, epoch, ErrRole, "unknown"},
		{"probe", forge(t, ca, pub, func(c *x509.Certificate) { c.Subject.OrganizationalUnit = []string{"probe"} }), key, epoch, ErrRole, "for a probe"},
		{"other organization", forge(t, ca, pub, func(c *x509.Certificate) { c.Subject.Organization = []string{"acme"} }), key, epoch, ErrCert, "no role"},
		{"in another's name", forge(t, ca, pub, func(c *x509.Certificate) { c.Subject.CommonName = cluster.NewID().String() }), key, epoch, ErrCert, "not one that"},
		{"critical extension", forge(t, ca, pub, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}), key, epoch, ErrCert, "not one that"},
	}
}

func TestVerify(t *testing.T) {
	ca := newCA(t)
	id := member(t, ca, Subject{Role: RolePeer}, epoch)
	for _, now := range []time.Time{epoch, epoch.Add(-Backdate), epoch.Add(CertLife)} {
		if err := Verify(id.Cert, ca.Cert, now, RolePeer); err != nil {
			t.Errorf("good certificate at %v: %v", now, err)
		}
	}
	if err := Verify(id.Cert, ca.Cert, epoch, RoleClient); !errors.Is(err, ErrRole) {
		t.Errorf("a peer for a client: %v", err)
	}
	for _, tt := range badCerts(t, ca) {
		err := Verify(tt.cert, ca.Cert, tt.now, RolePeer)
		if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: got %v, want %v with %q", tt.name, err, tt.want, tt.text)
		}
	}
}

// handshake connects two TLS configurations and returns what each side thinks of it.
func handshake(t *testing.T, server, client *tls.Config) (serr, cerr error, sstate, cstate tls.ConnectionState) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		nc, err := l.Accept()
		if err != nil {
			serr = err
			return
		}
		defer nc.Close()
		tc := tls.Server(nc, server)
		if serr = tc.Handshake(); serr == nil {
			sstate = tc.ConnectionState()
			tc.Write([]byte{1})
			tc.Read(make([]byte, 1)) // until the client is done
		}
	}()
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	tc := tls.Client(nc, client)
	if cerr = tc.Handshake(); cerr == nil {
		cstate = tc.ConnectionState()
		_, cerr = tc.Read(make([]byte, 1)) // in TLS 1.3 the client learns here that it was refused
	}
	nc.Close()
	<-done
	return
}

func keeper(t testing.TB, id *Identity, o KeeperOptions) *Keeper {
	t.Helper()
	if o.Now == nil {
		o.Now = func() time.Time { return epoch }
	}
	k, err := NewKeeper(id, o)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

var rules = []Rule{
	{"mortar-raft/1", []Role{RolePeer}},
	{"mortar-data/1", []Role{RolePeer, RoleClient}},
	{"http/1.1", nil},
}

func TestTLS(t *testing.T) {
	ca := newCA(t)
	peer := keeper(t, member(t, ca, Subject{Role: RolePeer}, epoch), KeeperOptions{})
	peer2 := keeper(t, member(t, ca, Subject{Role: RolePeer}, epoch), KeeperOptions{})
	client := keeper(t, member(t, ca, Subject{Role: RoleClient}, epoch), KeeperOptions{})
	stranger := keeper(t, member(t, newCA(t), Subject{Role: RolePeer}, epoch), KeeperOptions{})
	anonymous := baseTLS()
	anonymous.NextProtos = []string{"mortar-data/1"}
	web := anonymous.Clone()
	web.NextProtos = []string{"http/1.1"}
	old := anonymous.Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	server := peer.Server(rules...)

	tests := []struct {
		name   string
		server *tls.Config
		client *tls.Config
		serr   error // what the server's error is; nil with a client error: not looked at
		cerr   string
	}{
		{"peer, raft", server, peer2.Client("mortar-raft/1"), nil, ""},
		{"peer, data", server, peer2.Client("mortar-data/1"), nil, ""},
		{"peer, http", server, peer2.Client("http/1.1"), nil, ""},
		{"that very peer", server, peer2.ClientTo("mortar-data/1", peer.ID()), nil, ""},
		{"another peer", server, peer2.ClientTo("mortar-data/1", peer2.ID()), nil, "another peer answered"},
		{"client, data", server, client.Client("mortar-data/1"), nil, ""},
		{"client, raft", server, client.Client("mortar-raft/1"), ErrRole, "bad certificate"},
		{"anonymous, data", server, anonymous, ErrNoCert, "bad certificate"},
		{"anonymous, http", server, web, nil, ""},
		{"stranger calls", server, stranger.Client("mortar-data/1"), nil, "not signed by the CA of this pool"},
		{"client as server", client.Server(rules...), peer.Client("mortar-data/1"), nil, "is for a client, and this is for a peer"},
		{"unknown protocol", server, peer2.Client("mortar-data/2"), nil, "no application protocol"},
		{"no protocol", server, func() *tls.Config { c := peer2.Client(""); c.NextProtos = nil; return c }(), nil, "bad certificate"},
		{"TLS 1.2", server, old, nil, "protocol version"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			serr, cerr, sstate, cstate := handshake(t, tt.server, tt.client)
			if tt.cerr == "" {
				if serr != nil || cerr != nil {
					t.Fatalf("refused: %v, %v", serr, cerr)
				}
				if sstate.NegotiatedProtocol != tt.client.NextProtos[0] || PeerIDFromCert(cstate.PeerCertificates[0]) != peer.ID() {
					t.Errorf("protocol %q with %v", sstate.NegotiatedProtocol, PeerIDFromCert(cstate.PeerCertificates[0]))
				}
				return
			}
			if cerr == nil || !strings.Contains(cerr.Error(), tt.cerr) || tt.serr != nil && !errors.Is(serr, tt.serr) {
				t.Errorf("server: %v\nclient: %v\nwant %v, %q", serr, cerr, tt.serr, tt.cerr)
			}
		})
	}
	// Every bad certificate with every protocol, from either side.
	for _, tt := range badCerts(t, ca) {
		t.Run(tt.name, func(t *testing.T) {
			now := func() time.Time { return tt.now }
			shown := tls.Certificate{Certificate: [][]byte{tt.cert.Raw, ca.Cert.Raw}, PrivateKey: tt.key}
			for _, alpn := range []string{"mortar-raft/1", "mortar-data/1", "http/1.1"} {
				if tt.name == "client" && alpn != "mortar-raft/1" {
					continue
				}
				good := keeper(t, peer.Identity(), KeeperOptions{Now: now})
				c := anonymous.Clone()
				c.NextProtos = []string{alpn}
				c.Certificates = []tls.Certificate{shown}
				if serr, _, _, _ := handshake(t, good.Server(rules...), c); !errors.Is(serr, tt.want) {
					t.Errorf("%s, as client: %v, want %v", alpn, serr, tt.want)
				}
				s := baseTLS()
				s.NextProtos = []string{alpn}
				s.Certificates = []tls.Certificate{shown}
				if _, cerr, _, _ := handshake(t, s, good.Client(alpn)); !errors.Is(cerr, tt.want) {
					t.Errorf("%s, as server: %v, want %v", alpn, cerr, tt.want)
				}
			}
		})
	}
}

// TestStolen: a certificate without its key is worth nothing.
func TestStolen(t *testing.T) {
	ca := newCA(t)
	peer := keeper(t, member(t, ca, Subject{Role: RolePeer}, epoch), KeeperOptions{})
	_, key, _ := ed25519.GenerateKey(rand.Reader)
	c := baseTLS()
	c.NextProtos = []string{"mortar-data/1"}
	c.Certificates = []tls.Certificate{{Certificate: [][]byte{peer.Identity().Cert.Raw}, PrivateKey: key}}
	if serr, _, _, _ := handshake(t, peer.Server(rules...), c); serr == nil {
		t.Error("accepted")
	}
}

func TestAllow(t *testing.T) {
	ca := newCA(t)
	removed := errors.New("that peer was removed from the pool")
	gone := keeper(t, member(t, ca, Subject{Role: RolePeer}, epoch), KeeperOptions{})
	peer := keeper(t, member(t, ca, Subject{Role: RolePeer}, epoch), KeeperOptions{Allow: func(c *x509.Certificate) error {
		if PeerIDFromCert(c) == gone.ID() {
			return removed
		}
		return nil
	}})
	if serr, _, _, _ := handshake(t, peer.Server(rules...), gone.Client("mortar-data/1")); !errors.Is(serr, removed) {
		t.Errorf("server side: %v", serr)
	}
	if _, cerr, _, _ := handshake(t, gone.Server(rules...), peer.Client("mortar-data/1")); !errors.Is(cerr, removed) {
		t.Errorf("client side: %v", cerr)
	}
}

// TestJoin goes the whole way of a machine into a pool.
func TestJoin(t *testing.T) {
	ca := newCA(t)
	host := keeper(t, member(t, ca, Subject{Role: RolePeer}, epoch), KeeperOptions{})
	token, err := ParseJoinToken(NewJoinToken(ca.Cert).String())
	if err != nil {
		t.Fatal(err)
	}
	now := func() time.Time { return epoch }
	serr, cerr, _, cstate := handshake(t, host.Server(rules...), JoinClient(token.CA, "http/1.1", now))
	if serr != nil || cerr != nil {
		t.Fatal(serr, cerr)
	}
	pinned := cstate.PeerCertificates[1]
	if !pinned.Equal(ca.Cert) {
		t.Error("the CA is not the pool's")
	}
	me, err := NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	csr, _ := me.CSR()
	cert, err := ca.Sign(csr, Subject{Role: RolePeer}, epoch)
	if err != nil {
		t.Fatal(err)
	}
	joined, err := me.With(cert, pinned)
	if err != nil {
		t.Fatal(err)
	}
	if joined.ID() != me.ID() || PeerIDFromCert(cert) != me.ID() {
		t.Error("the identity changed by joining")
	}
	if serr, cerr, _, _ := handshake(t, host.Server(rules...), keeper(t, joined, KeeperOptions{}).Client("mortar-raft/1")); serr != nil || cerr != nil {
		t.Error(serr, cerr)
	}

	wrong := func(name string, server *tls.Config, want error, text string) {
		t.Helper()
		if _, cerr, _, _ := handshake(t, server, JoinClient(token.CA, "http/1.1", now)); !errors.Is(cerr, want) || !strings.Contains(cerr.Error(), text) {
			t.Errorf("%s: %v, want %v with %q", name, cerr, want, text)
		}
	}
	other := newCA(t)
	wrong("another pool", keeper(t, member(t, other, Subject{Role: RolePeer}, epoch), KeeperOptions{}).Server(rules...), ErrOtherCA, "check the address")
	wrong("a client of the pool", keeper(t, member(t, ca, Subject{Role: RoleClient}, epoch), KeeperOptions{}).Server(rules...), ErrRole, "")
	probe, err := ProbeServer(me, epoch, "http/1.1")
	if err != nil {
		t.Fatal(err)
	}
	wrong("a fresh machine", probe, ErrOtherCA, "belongs to no pool itself")
	// Somebody in between, who shows the real CA behind a certificate of his own.
	liar := member(t, other, Subject{Role: RolePeer}, epoch)
	cfg := baseTLS()
	cfg.NextProtos = []string{"http/1.1"}
	cfg.Certificates = []tls.Certificate{{Certificate: [][]byte{liar.Cert.Raw, ca.Cert.Raw}, PrivateKey: liar.Key}}
	wrong("somebody in between", cfg, ErrOtherCA, "not signed by")
}

func TestProbe(t *testing.T) {
	fresh, err := NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	server, err := ProbeServer(fresh, epoch, "http/1.1")
	if err != nil {
		t.Fatal(err)
	}
	serr, cerr, _, cstate := handshake(t, server, ProbeClient("http/1.1"))
	if serr != nil || cerr != nil {
		t.Fatal(serr, cerr)
	}
	if PeerIDFromCert(cstate.PeerCertificates[0]) != fresh.ID() {
		t.Error("not the machine's identity")
	}
	member := keeper(t, member(t, newCA(t), Subject{Role: RolePeer}, epoch), KeeperOptions{})
	if _, cerr, _, _ := handshake(t, member.Server(rules...), ProbeClient("http/1.1")); !errors.Is(cerr, ErrMember) || !strings.Contains(cerr.Error(), member.ID().String()) {
		t.Errorf("a member: %v", cerr)
	}
	if _, cerr, _, _ := handshake(t, server, member.Client("http/1.1")); !errors.Is(cerr, ErrOtherCA) {
		t.Errorf("a fresh machine among members: %v", cerr)
	}
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: epoch.Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	web := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	if _, cerr, _, _ := handshake(t, web, ProbeClient("http/1.1")); !errors.Is(cerr, ErrKey) {
		t.Errorf("a web server: %v", cerr)
	}
}

func TestSign(t *testing.T) {
	ca := newCA(t)
	id, _ := NewIdentity()
	csr, _ := id.CSR()
	rsaKey, _ := rsa.GenerateKey(rand.Reader, 2048)
	rsaCSR, err := x509.CreateCertificateRequest(rand.Reader, new(x509.CertificateRequest), rsaKey)
	if err != nil {
		t.Fatal(err)
	}
	tampered := bytes.Clone(csr)
	tampered[len(tampered)-1] ^= 1
	// A request that asks for more than it gets.
	greedy, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:  pkix.Name{Organization: []string{organization}, OrganizationalUnit: []string{"peer"}, CommonName: cluster.NewID().String()},
		DNSNames: []string{"bank.example"},
	}, id.Key)
	if err != nil {
		t.Fatal(err)
	}
	grants := []Grant{{"web", false}, {"db", true}, {"a-b.c_d", true}}

	tests := []struct {
		name string
		csr  []byte
		s    Subject
		now  time.Time
		want string
	}{
		{"peer", csr, Subject{Role: RolePeer}, epoch, ""},
		{"client", csr, Subject{Role: RoleClient, Grants: grants}, epoch, ""},
		{"greedy", greedy, Subject{Role: RoleClient}, epoch, ""},
		{"near the CA's end", csr, Subject{Role: RolePeer}, ca.Cert.NotAfter.Add(-time.Hour), ""},
		{"after the CA's end", csr, Subject{Role: RolePeer}, ca.Cert.NotAfter.Add(time.Hour), "the pool's CA expired"},
		{"peer with grants", csr, Subject{Role: RolePeer, Grants: grants}, epoch, "grants"},
		{"CA", csr, Subject{Role: roleCA}, epoch, "role"},
		{"no role", csr, Subject{}, epoch, "role"},
		{"RSA", rsaCSR, Subject{Role: RolePeer}, epoch, "RSA"},
		{"tampered", tampered, Subject{Role: RolePeer}, epoch, "signing request"},
		{"cut off", csr[:len(csr)-1], Subject{Role: RolePeer}, epoch, "signing request"},
		{"empty", nil, Subject{Role: RolePeer}, epoch, "signing request"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cert, err := ca.Sign(tt.csr, tt.s, tt.now)
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got %v, want %q", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := Verify(cert, ca.Cert, tt.now, tt.s.Role); err != nil {
				t.Error(err)
			}
			s, err := SubjectFromCert(cert)
			if err != nil || s.Role != tt.s.Role || !slices.Equal(s.Grants, tt.s.Grants) {
				t.Errorf("subject %+v, %v, want %+v", s, err, tt.s)
			}
			if slices.Contains(cert.DNSNames, "bank.example") || cert.NotAfter.After(ca.Cert.NotAfter) {
				t.Errorf("names %v, until %v", cert.DNSNames, cert.NotAfter)
			}
			if !cert.NotBefore.Equal(tt.now.Add(-time.Hour)) || cert.SerialNumber.BitLen() < 64 {
				t.Errorf("from %v, serial %v", cert.NotBefore, cert.SerialNumber)
			}
		})
	}
}

func TestMayMount(t *testing.T) {
	client := Subject{Role: RoleClient, Grants: []Grant{{"web", false}, {"db", true}}}
	for _, tt := range []struct {
		s      Subject
		volume string
		write  bool
		want   bool
	}{
		{Subject{Role: RolePeer}, "any", true, true},
		{client, "web", false, true},
		{client, "web", true, false},
		{client, "db", false, true},
		{client, "db", true, true},
		{client, "mail", false, false},
		{client, "", false, false},
		{Subject{}, "web", false, false},
	} {
		if got := tt.s.MayMount(tt.volume, tt.write); got != tt.want {
			t.Errorf("%+v, %q, write %v: %v", tt.s, tt.volume, tt.write, got)
		}
	}
}

func TestIdentityFiles(t *testing.T) {
	ca := newCA(t)
	id := member(t, ca, Subject{Role: RolePeer}, epoch)
	dir := t.TempDir()
	path := filepath.Join(dir, "identity.pem")

	if _, err := Load(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	for _, want := range []*Identity{{Key: id.Key}, id} {
		if err := want.Save(path); err != nil {
			t.Fatal(err)
		}
		got, err := Load(path)
		if err != nil {
			t.Fatal(err)
		}
		if !got.Key.Equal(want.Key) || (got.Cert == nil) != (want.Cert == nil) || want.Cert != nil && (!got.Cert.Equal(want.Cert) || !got.CA.Equal(want.CA)) {
			t.Error("loaded something else")
		}
	}
	capath := filepath.Join(dir, "ca.pem")
	if err := ca.Save(capath); err != nil {
		t.Fatal(err)
	}
	if got, err := LoadCA(capath); err != nil || !got.Key.Equal(ca.Key) || !got.Cert.Equal(ca.Cert) {
		t.Errorf("CA: %v", err)
	}
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		fi, _ := e.Info()
		if fi.Mode() != 0o600 || len(entries) != 2 {
			t.Errorf("%s has mode %v, %d files", e.Name(), fi.Mode(), len(entries))
		}
	}

	good, _ := os.ReadFile(path)
	other := member(t, newCA(t), Subject{Role: RolePeer}, epoch)
	second := member(t, ca, Subject{Role: RolePeer}, epoch)
	join := func(b ...[]byte) []byte { return bytes.Join(b, nil) }
	tests := []struct {
		name string
		b    []byte
		want string
	}{
		{"empty", nil, "no private key"},
		{"text", []byte("hello\n"), "not in PEM form"},
		{"cut off", good[:len(good)-30], "not in PEM form"},
		{"no key", CertPEM(id.Cert), "no private key"},
		{"two keys", join(pemKey(id.Key), pemKey(id.Key)), "more than one"},
		{"certificate of another key", join(pemKey(id.Key), CertPEM(second.Cert), CertPEM(ca.Cert)), "the key here is that of"},
		{"CA of another pool", join(pemKey(id.Key), CertPEM(id.Cert), CertPEM(other.CA)), "not signed by the CA"},
		{"no CA", join(pemKey(id.Key), CertPEM(id.Cert)), "1 certificates"},
		{"CA twice", join(good, CertPEM(ca.Cert)), "3 certificates"},
		{"something else", join(good, []byte("-----BEGIN THING-----\nAAAA\n-----END THING-----\n")), "unknown PEM block"},
		{"too long", bytes.Repeat([]byte("\n"), maxPEM+1), "longer than"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := os.WriteFile(path, tt.b, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Load(path); err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v, want %q and the path", err, tt.want)
			}
		})
	}
	os.WriteFile(path, good, 0o600)
	for _, mode := range []fs.FileMode{0o640, 0o604, 0o660, 0o777} {
		os.Chmod(path, mode)
		if _, err := Load(path); err == nil || !strings.Contains(err.Error(), "chmod 600 "+path) {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
	os.Chmod(path, 0o400)
	if _, err := Load(path); err != nil {
		t.Errorf("mode 0400: %v", err)
	}
	link := filepath.Join(dir, "link")
	os.Symlink(path, link)
	if _, err := Load(link); err == nil {
		t.Error("followed a symbolic link")
	}
	if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a directory: %v", err)
	}
	if err := id.Save(filepath.Join(dir, "missing", "identity.pem")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("saving into a missing directory: %v", err)
	}
	if err := id.Save(dir); err == nil {
		t.Error("saved over a directory")
	}
	if n, _ := filepath.Glob(filepath.Join(filepath.Dir(dir), ".*")); len(n) > 0 {
		t.Errorf("left over: %v", n)
	}
}

func TestCheck(t *testing.T) {
	id := member(t, newCA(t), Subject{Role: RolePeer}, epoch)
	if err := id.Check(epoch); err != nil {
		t.Error(err)
	}
	for _, tt := range []struct {
		id   *Identity
		now  time.Time
		want error
		text string
	}{
		{&Identity{Key: id.Key}, epoch, ErrNoCert, `run "mortar join"`},
		{id, epoch.Add(CertLife + time.Minute), ErrExpired, `the certificate of this machine (` + id.ID().String() + `) expired on 2026-05-30 12:00 UTC, and here it is 2026-05-30 12:01 UTC; if the clock is right, run "mortar peer invite"`},
		{id, epoch.Add(-2 * time.Hour), ErrEarly, "set the clock"},
	} {
		if err := tt.id.Check(tt.now); !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("got %v, want %v with %q", err, tt.want, tt.text)
		}
	}
}

func TestJoinToken(t *testing.T) {
	ca := newCA(t)
	token := NewJoinToken(ca.Cert)
	s := token.String()
	if len(s) != 85 || !strings.HasPrefix(s, "MORTAR-1-") {
		t.Errorf("text form %q", s)
	}
	for _, form := range []string{s, " " + s + "\n", strings.ToLower(s), strings.ToUpper(s)} {
		if got, err := ParseJoinToken(form); err != nil || got != token {
			t.Errorf("%q: %v, %v", form, got, err)
		}
	}
	zero, full := JoinToken{}, JoinToken{}
	for i := range full.CA {
		full.CA[i] = 0xff
	}
	for i := range full.Secret {
		full.Secret[i] = 0xff
	}
	for _, tt := range []JoinToken{zero, full} {
		if got, err := ParseJoinToken(tt.String()); err != nil || got != tt || len(tt.String()) != 85 {
			t.Errorf("%v: %v, %v", tt, got, err)
		}
	}
	for _, bad := range []string{
		"", "MORTAR", "MORTAR-1-", "MORTAR-2-" + s[9:], "SWMTKN-1-" + s[9:], s[:len(s)-1], s + "0", s + "-0",
		s[:20] + s[21:], s[:len(s)-26] + s[len(s)-25:],
		"MORTAR-1-" + strings.Repeat("z", 50) + "-" + s[len(s)-25:], // beyond 256 bits
		s[:len(s)-25] + strings.Repeat("z", 25),                     // beyond 128
		s[:len(s)-1] + "_", s[:len(s)-1] + "ü", "MORTAR-1-+" + s[10:], "MORTAR-1--" + s[10:], strings.Repeat("a", 1<<20),
	} {
		if got, err := ParseJoinToken(bad); !errors.Is(err, ErrToken) || !strings.Contains(err.Error(), "copy the whole line") {
			t.Errorf("%.100q: %v, %v", bad, got, err)
		}
	}
	hash := token.Hash()
	if !token.Matches(hash) || NewJoinToken(ca.Cert).Matches(hash) || token.Matches("") || token.Matches(hash[1:]) || zero.Matches(hash) {
		t.Error("Matches")
	}
	if other := (JoinToken{CA: [32]byte{1}, Secret: token.Secret}); other.Matches(hash) {
		t.Error("the same secret of another pool matches")
	}
	if strings.Contains(hash, s[len(s)-25:]) {
		t.Error("the hash tells the secret")
	}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("invited", "token", token)
	if strings.Contains(log.String(), s[len(s)-25:]) || !json.Valid(log.Bytes()) {
		t.Errorf("the log has the secret: %s", log.String())
	}
}

func FuzzParseJoinToken(f *testing.F) {
	f.Add("")
	f.Add("MORTAR-1-")
	f.Add(JoinToken{}.String())
	f.Add(JoinToken{CA: [32]byte{31: 1}, Secret: [16]byte{1}}.String())
	f.Fuzz(func(t *testing.T, s string) {
		token, err := ParseJoinToken(s)
		if err == nil && !strings.EqualFold(token.String(), strings.TrimSpace(s)) {
			t.Errorf("%q was read as %q", s, token)
		}
	})
}

func FuzzParseIdentity(f *testing.F) {
	ca := newCA(f)
	id := member(f, ca, Subject{Role: RoleClient, Grants: []Grant{{"v", true}}}, epoch)
	f.Add(id.PEM())
	f.Add(pemKey(id.Key))
	f.Add(ca.PEM())
	f.Fuzz(func(t *testing.T, b []byte) {
		if id, err := ParseIdentity(b); err == nil {
			if again, err := ParseIdentity(id.PEM()); err != nil || again.ID() != id.ID() {
				t.Errorf("%v, %v", again, err)
			}
		}
		ParseCA(b)
	})
}

func TestRenew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, err := NewCA(cluster.NewID(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "identity.pem")
		first := member(t, ca, Subject{Role: RolePeer}, time.Now())
		k, err := NewKeeper(first, KeeperOptions{Path: path})
		if err != nil {
			t.Fatal(err)
		}
		server := k.Server(rules...)
		var mu sync.Mutex // guards asked and fail
		var asked []time.Duration
		start := time.Now()
		fail := 3
		sign := func(ctx context.Context, csr []byte) (*x509.Certificate, error) {
			mu.Lock()
			defer mu.Unlock()
			asked = append(asked, time.Since(start))
			if fail--; fail >= 0 {
				return nil, errors.New("no leader")
			}
			return ca.Sign(csr, Subject{Role: RolePeer}, time.Now())
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- k.Run(ctx, sign) }()

		after := func(d time.Duration) []time.Duration {
			time.Sleep(d)
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(asked)
		}
		if asked := after(44 * 24 * time.Hour); len(asked) != 0 {
			t.Errorf("renewed after %v", asked)
		}
		if asked := after(2 * 24 * time.Hour); len(asked) != 4 || asked[3]-asked[0] > 15*time.Minute || k.Identity().Cert.Equal(first.Cert) {
			t.Errorf("asked after %v", asked)
		}
		if asked := after(100 * 24 * time.Hour); len(asked) != 6 || k.Identity().Check(time.Now()) != nil || k.ID() != first.ID() {
			t.Errorf("after 146 days: asked after %v, %v", asked, k.Identity().Check(time.Now()))
		}
		saved, err := Load(path)
		if err != nil || !saved.Cert.Equal(k.Identity().Cert) {
			t.Errorf("saved: %v", err)
		}
		// Configurations made before show the new certificate.
		if c, err := server.GetCertificate(nil); err != nil || !c.Leaf.Equal(saved.Cert) {
			t.Errorf("the configuration shows another certificate: %v", err)
		}
		cancel()
		if err := <-done; err != context.Canceled {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestRenewRefused: what is not a good certificate for this key changes nothing.
func TestRenewRefused(t *testing.T) {
	ca := newCA(t)
	id := member(t, ca, Subject{Role: RolePeer}, epoch)
	k := keeper(t, id, KeeperOptions{Path: filepath.Join(t.TempDir(), "none", "x")})
	other := member(t, ca, Subject{Role: RolePeer}, epoch)
	for name, sign := range map[string]func(context.Context, []byte) (*x509.Certificate, error){
		"refused":   func(context.Context, []byte) (*x509.Certificate, error) { return nil, errors.New("no") },
		"another's": func(context.Context, []byte) (*x509.Certificate, error) { return other.Cert, nil },
		"of another CA": func(_ context.Context, csr []byte) (*x509.Certificate, error) {
			return newCA(t).Sign(csr, Subject{Role: RolePeer}, epoch)
		},
		"expired": func(_ context.Context, csr []byte) (*x509.Certificate, error) {
			return ca.Sign(csr, Subject{Role: RolePeer}, epoch.Add(-2*CertLife))
		},
		"cannot be kept": func(_ context.Context, csr []byte) (*x509.Certificate, error) {
			return ca.Sign(csr, Subject{Role: RolePeer}, epoch)
		},
	} {
		if err := k.Renew(t.Context(), sign); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if k.Identity() != id {
			t.Errorf("%s: the identity changed", name)
		}
	}
	if _, err := NewKeeper(&Identity{Key: id.Key}, KeeperOptions{}); !errors.Is(err, ErrNoCert) {
		t.Errorf("a keeper of nothing: %v", err)
	}
}

func ExampleJoinToken() {
	fmt.Println(JoinToken{CA: [32]byte{31: 35}, Secret: [16]byte{15: 1}})
	// Output: MORTAR-1-0000000000000000000000000000000000000000000000000z-0000000000000000000000001
}
