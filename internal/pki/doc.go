// Package pki knows who is who. Every machine has an Ed25519 key, and the hash
// of its public half is the machine's identity; the pool's CA says of a key that
// it belongs to the pool and in which role; TLS 1.3 proves that the other side has it.
//
// Names and addresses play no part: machines are renamed and renumbered, and a
// certificate that depends on either is an outage waiting to happen. What is
// checked instead, on both sides of every connection, is that the certificate was
// signed by this pool's CA, that it is for one of the roles that the protocol
// asks for, and that now is within its dates (see Verify).
//
// A machine gets its certificate by a JoinToken, which has two parts. The
// digest of the CA's certificate lets the newcomer recognise the pool before it
// trusts anything, and the secret lets the pool recognise the newcomer. It then
// sends a signing request (CSR) and gets a certificate for CertLife, which a Keeper
// renews at half of that while the machine runs.
package pki
