package state

import "fmt"

// Code is the kind of a refusal. Codes travel between machines and appear in
// the API; they are never renamed.
type Code string

// The refusals. Their texts are made where they are decided, in the words of
// the gluster command where it has some.
const (
	CodeBadCommand     Code = "bad-command"     // not a command that this version knows
	CodeNoPool         Code = "no-pool"         // this machine belongs to no pool
	CodePoolExists     Code = "pool-exists"     // it belongs to one already
	CodeConflict       Code = "conflict"        // somebody changed the thing meanwhile: look and try again
	CodeBadPeer        Code = "bad-peer"        // a peer's name, id or address is not possible
	CodePeerExists     Code = "peer-exists"     // already in the pool
	CodeNoPeer         Code = "no-peer"         // not in the pool
	CodePeerInUse      Code = "peer-in-use"     // it hosts bricks
	CodeNeeded         Code = "peer-needed"     // a set would be too small without its bricks
	CodeDrained        Code = "peer-drained"    // its bricks take part in nothing
	CodeCloned         Code = "cloned"          // two live machines claim one identity
	CodeBadName        Code = "bad-name"        // not a volume name
	CodeVolumeExists   Code = "volume-exists"   //
	CodeNoVolume       Code = "no-volume"       //
	CodeStarted        Code = "volume-started"  // must be stopped for this
	CodeNotStarted     Code = "volume-stopped"  // must be started for this
	CodeBadReplica     Code = "bad-replica"     // counts that do not fit
	CodeNotSupported   Code = "not-supported"   //
	CodeBadBrick       Code = "bad-brick"       // a brick that cannot be used
	CodeBrickPlacement Code = "brick-placement" // unwise, possible with force
	CodeBadOption      Code = "bad-option"      // name or value
	CodeStaleEpoch     Code = "stale-epoch"     // the set has another configuration by now
	CodeBadConfig      Code = "bad-config"      // a set configuration that breaks an invariant
	CodeNoToken        Code = "no-token"        // unknown, used or expired
	CodeNoLeader       Code = "no-leader"       // the pool cannot decide now
	CodeDetached       Code = "detached"        // this peer is not in the pool any more
	CodeUnsafe         Code = "unsafe-failover" // no brick can lead without losing data
	CodeRecovered      Code = "recovered-pool"  // the pool was recovered without this peer's copy
	CodeInUse          Code = "in-use"          // something depends on it
	CodeNoDocker       Code = "no-docker"       // no such Docker volume
	CodeBroken         Code = "control-failed"  // the control store of the leader failed
)

// opErrno has the numbers of the gluster command's XML output; what is not here
// is 30800, an internal error.
var opErrno = map[Code]int{
	CodeNotSupported: 30801,
	CodeConflict:     30802,
	CodeNoVolume:     30806,
	CodeStarted:      30809,
	CodeNotStarted:   30810,
	CodeVolumeExists: 30811,
}

// Number returns the gluster error number of the code.
func (c Code) Number() int {
	if n, ok := opErrno[c]; ok {
		return n
	}
	return 30800
}

// Error is a refusal: a kind for programs and a sentence for people. It is the
// same on every peer, and survives being sent.
type Error struct {
	Code Code   `json:"code"`
	Text string `json:"text"`
}

func (e *Error) Error() string { return e.Text }

// Is makes errors.Is compare kinds: errors.Is(err, &state.Error{Code: c}).
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code && (t.Text == "" || t.Text == e.Text)
}

// Refusal returns an *Error.
func Refusal(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Text: fmt.Sprintf(format, args...)}
}

// The kinds that callers act on, for errors.Is.
var (
	ErrConflict   = &Error{Code: CodeConflict}
	ErrNoPool     = &Error{Code: CodeNoPool}
	ErrNoPeer     = &Error{Code: CodeNoPeer}
	ErrPeerExists = &Error{Code: CodePeerExists}
	ErrNoVolume   = &Error{Code: CodeNoVolume}
	ErrStaleEpoch = &Error{Code: CodeStaleEpoch}
	ErrNoToken    = &Error{Code: CodeNoToken}
	ErrNoLeader   = &Error{Code: CodeNoLeader}
	ErrDetached   = &Error{Code: CodeDetached}
	ErrCloned     = &Error{Code: CodeCloned}
	ErrUnsafe     = &Error{Code: CodeUnsafe}
	ErrRecovered  = &Error{Code: CodeRecovered}
)
