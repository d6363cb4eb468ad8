package pki

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"strings"
)

// JoinToken lets a machine or a client into a pool. Its text form is
//
//	MORTAR-1-<digest of the CA certificate>-<secret>
//
// with both parts in base 36, 50 and 25 digits. Whoever has it can join, until
// it is used or expires; the pool itself keeps only its Hash.
type JoinToken struct {
	CA     [sha256.Size]byte // see Digest
	Secret [16]byte
}

const (
	tokenPrefix  = "MORTAR-1-"
	digestDigits = 50
	secretDigits = 25
)

// ErrToken is wrapped by errors of ParseJoinToken.
var ErrToken = errors.New("not a join token")

// NewJoinToken makes a token with a new secret.
func NewJoinToken(ca *x509.Certificate) JoinToken {
	t := JoinToken{CA: Digest(ca)}
	rand.Read(t.Secret[:]) // never fails, crypto/rand
	return t
}

// String is the token as people pass it on. It contains the secret.
func (t JoinToken) String() string {
	return tokenPrefix + base36(t.CA[:], digestDigits) + "-" + base36(t.Secret[:], secretDigits)
}

// LogValue implements slog.LogValuer: logs never have the secret.
func (t JoinToken) LogValue() slog.Value {
	return slog.StringValue(tokenPrefix + base36(t.CA[:], digestDigits) + "-…")
}

// ParseJoinToken reads the text form. White space around it and the case of
// letters do not matter.
func ParseJoinToken(s string) (JoinToken, error) {
	var t JoinToken
	s = strings.TrimSpace(s)
	rest, ok := cutPrefixFold(s, tokenPrefix)
	if !ok {
		return t, fmt.Errorf("%w: one begins with %s; copy the whole line that \"mortar peer invite\" printed", ErrToken, tokenPrefix)
	}
	digest, secret, ok := strings.Cut(rest, "-")
	if !ok || !unbase36(t.CA[:], digest, digestDigits) || !unbase36(t.Secret[:], secret, secretDigits) {
		return JoinToken{}, fmt.Errorf("%w: it has %d characters where %d are due, or one that cannot be right; copy the whole line that \"mortar peer invite\" printed",
			ErrToken, len(s), len(tokenPrefix)+digestDigits+1+secretDigits)
	}
	return t, nil
}

// Hash is what is stored of a token: it recognises the secret and does not
// tell it. The secret is random and long, so a plain hash will do.
func (t JoinToken) Hash() string {
	h := sha256.New()
	h.Write([]byte("mortar join token\x00"))
	h.Write(t.CA[:])
	h.Write(t.Secret[:])
	return hex.EncodeToString(h.Sum(nil))
}

// Matches reports whether hash is that of the token, in a time that does not
// depend on where they differ.
func (t JoinToken) Matches(hash string) bool {
	return subtle.ConstantTimeCompare([]byte(t.Hash()), []byte(hash)) == 1
}

func cutPrefixFold(s, prefix string) (string, bool) {
	if len(s) < len(prefix) || !strings.EqualFold(s[:len(prefix)], prefix) {
		return s, false
	}
	return s[len(prefix):], true
}

// base36 writes b as a number of exactly that many digits.
func base36(b []byte, digits int) string {
	s := new(big.Int).SetBytes(b).Text(36)
	return strings.Repeat("0", digits-len(s)) + s
}

// unbase36 reads what base36 wrote into b, which it must fit.
func unbase36(b []byte, s string, digits int) bool {
	if len(s) != digits {
		return false
	}
	for _, c := range []byte(s) { // SetString takes signs and underscores, too
		if (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'z') {
			return false
		}
	}
	n, ok := new(big.Int).SetString(s, 36)
	if !ok || n.BitLen() > 8*len(b) {
		return false
	}
	n.FillBytes(b)
	return true
}
