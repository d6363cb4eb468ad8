// Package api is the language that the command line, the web page and other
// programs speak to a daemon: the REST requests and answers as structs, the
// error codes, and a client.
//
// It decides nothing: package httpd serves these structs and package daemon
// knows what they mean. doc/openapi.yaml describes the same for people who
// write other clients; a test in httpd keeps the two together.
//
// All bodies are JSON. Times are RFC 3339, durations and sizes are in the unit
// that the field says. Fields are only ever added.
package api

import "time"

// Prefix is in front of every path; it changes only with the meaning of one.
const Prefix = "/v1"

// MaxBody bounds the body of a request, in bytes.
const MaxBody = 1 << 20

// DefaultPort is the one TCP port between machines.
const DefaultPort = 24007

// DefaultSocket is where a daemon listens for the command line on its machine.
const DefaultSocket = "/run/mortar/mortar.sock"

// Version says what runs.
type Version struct {
	Version  string `json:"version"`  // of the program
	Go       string `json:"go"`       // that built it
	Protocol uint16 `json:"protocol"` // between machines; both sides need the same
	PID      int    `json:"pid"`
}

// Pool is what a daemon knows of its pool.
type Pool struct {
	ID      string `json:"id"`
	Version uint64 `json:"version"` // of the cluster map; grows with every change
	Self    string `json:"self"`    // id of the peer that answers
	Leader  string `json:"leader"`  // id of the peer that leads the control plane; empty: none now
	Peers   []Peer `json:"peers"`   // by name; the answering peer among them
	// Problem says why the pool can decide nothing now, and what to do; empty if it can.
	Problem    string          `json:"problem,omitempty"`
	Recoveries []PoolRecovered `json:"recoveries,omitempty"` // by hand, oldest first
}

// PoolRecovered records that one peer was made the only voter of its pool by hand.
type PoolRecovered struct {
	Generation uint64    `json:"generation"`
	Time       time.Time `json:"time"`
	Peer       string    `json:"peer"` // name
}

// PoolRecovery is what recovering the pool on this machine would do, for an
// administrator to agree to.
type PoolRecovery struct {
	// Rejoin: the pool was recovered elsewhere while this machine was away, and
	// this machine would take over a fresh copy of the configuration in place of its own.
	Rejoin bool `json:"rejoin"`
	// Silent are the voting peers that do not answer, by name. What they have
	// decided, and this machine has not heard of, would be lost.
	Silent     []string `json:"silent"`
	Version    uint64   `json:"version"`    // of the map that would be kept
	Generation uint64   `json:"generation"` // of the pool at present
}

// PoolRecover asks for the recovery that was agreed to: its fields are those of
// the PoolRecovery that was seen.
type PoolRecover struct {
	Version    uint64 `json:"version"`
	Generation uint64 `json:"generation"`
}

// PeerState is the state of a membership; the numbers are those of gluster's
// peer status.
type PeerState int

const (
	PeerProbed     PeerState = 1 // "Accepted peer request": known, has not yet been seen
	PeerInCluster  PeerState = 3
	PeerRejected   PeerState = 6 // a clone, or removed
	peerStateCount           = 7
)

var peerStates = [peerStateCount]string{
	PeerProbed:    "Accepted peer request",
	PeerInCluster: "Peer in Cluster",
	PeerRejected:  "Peer Rejected",
}

func (s PeerState) String() string {
	if s >= 0 && s < peerStateCount && peerStates[s] != "" {
		return peerStates[s]
	}
	return "Unknown"
}

// Peer is one machine of the pool as the answering peer sees it.
type Peer struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	Addrs     []string  `json:"addrs"` // host:port, best first
	Self      bool      `json:"self"`
	Connected bool      `json:"connected"`
	State     PeerState `json:"state"`
	StateText string    `json:"state_text"`
	Voter     bool      `json:"voter"`
	Witness   bool      `json:"witness"` // holds no bricks
	Client    bool      `json:"client"`  // and never votes
	// Drained: nothing is to depend on the peer. Its bricks neither lead nor are in
	// sync, but for those that Holds names, which must wait.
	Drained bool     `json:"drained"`
	Holds   []string `json:"holds,omitempty"`
	// Problem says why the peer is not connected, in words, where known.
	Problem string `json:"problem,omitempty"`
}

// DrainReply tells how far a drained peer is.
type DrainReply struct {
	Peer string `json:"peer"` // its name
	// Holds says in words what still depends on the peer, and why. Empty: nothing does.
	Holds []string `json:"holds"`
}

// InviteRequest asks for a token that lets one machine join.
type InviteRequest struct {
	TTL  int `json:"ttl_seconds"` // 0: the default, one hour
	Uses int `json:"uses"`        // machines that may use it; 0: one
}

// Invitation is the answer to an InviteRequest. It is shown once: the pool
// keeps only a hash of the token.
type Invitation struct {
	Token string `json:"token"`
	// Command is what to run on the machine that is to join. It says HOST where
	// this peer does not know how others reach it.
	Command string    `json:"command"`
	Hosts   []string  `json:"hosts"` // addresses of this peer to join through, best first
	Expires time.Time `json:"expires"`
	Uses    int       `json:"uses"`
}

// JoinRequest tells a daemon to leave its own empty pool and join another.
type JoinRequest struct {
	Token string   `json:"token"`
	Hosts []string `json:"hosts"` // host or host:port, tried in order
	Name  string   `json:"name"`  // what the pool shall call this machine; empty: the daemon's own choice
}

// JoinReply says which pool was joined.
type JoinReply struct {
	Pool string `json:"pool"`
	Peer string `json:"peer"` // this machine's id
	Name string `json:"name"`
}

// EnrollRequest is what a joining machine sends, over TLS pinned by the token's
// CA digest, to a peer of the pool.
type EnrollRequest struct {
	Token   string   `json:"token"`
	CSR     []byte   `json:"csr"` // DER; carries the machine's public key
	Name    string   `json:"name"`
	Port    int      `json:"port"`            // TCP port where the machine listens
	Addrs   []string `json:"addrs,omitempty"` // where it says it can be reached; empty: where it comes from
	Witness bool     `json:"witness"`
	Client  bool     `json:"client,omitempty"`
	Version uint16   `json:"version"` // of the protocol
}

// EnrollReply makes the joining machine a peer.
type EnrollReply struct {
	Cert []byte `json:"cert"` // DER
	CA   []byte `json:"ca"`   // DER
	Pool string `json:"pool"`
	Name string `json:"name"` // what the pool calls the machine
	// Map is the cluster map, JSON of cluster.Map: where to find the others.
	Map []byte `json:"map"`
}

// ProbeRequest asks for a fresh machine to be brought into the pool.
type ProbeRequest struct {
	Host string `json:"host"` // host or host:port
}

// ProbeResult is how a probe ended well.
type ProbeResult string

const (
	ProbeAdded     ProbeResult = "added"
	ProbeAlready   ProbeResult = "already"   // it is a peer of this pool
	ProbeLocalhost ProbeResult = "localhost" // it is the very machine that was asked
)

// ProbeReply answers ProbeRequest.
type ProbeReply struct {
	Result ProbeResult `json:"result"`
	Host   string      `json:"host"`
	Port   int         `json:"port"`
	Peer   string      `json:"peer"`
}

// InvitedRequest is what a probing peer hands to the fresh machine: join us.
type InvitedRequest struct {
	Token string   `json:"token"`
	Hosts []string `json:"hosts"`
	Name  string   `json:"name"` // what the probing administrator called the machine
}

// VolumeCreate asks for a new volume.
type VolumeCreate struct {
	Name    string   `json:"name"`
	Replica int      `json:"replica"` // bricks per set; 0 or 1: no copies
	Bricks  []string `json:"bricks"`  // HOST:/absolute/path, sets in the order given
	Force   bool     `json:"force"`   // accept mount points, the root partition, several bricks of a set on one machine
}

// Option is one volume option.
type Option struct {
	Key     string `json:"key"`
	Value   string `json:"value"`
	Default bool   `json:"default,omitempty"` // not set by anybody
}

// OptionHelp describes one option that can be set.
type OptionHelp struct {
	Key         string `json:"key"`
	Default     string `json:"default"`
	Description string `json:"description"`
}

// OptionsChange sets (PUT) options, or with Reset (DELETE) takes them back.
type OptionsChange struct {
	Options []Option `json:"options"`
}

// OptionsReply answers an OptionsChange.
type OptionsReply struct {
	Notes []string `json:"notes,omitempty"` // what was accepted but does nothing here, and why
}

// Brick is one brick of a volume.
type Brick struct {
	ID   string `json:"id"`
	Name string `json:"name"` // HOST:/path, as it was given
	Peer string `json:"peer"` // id
}

// Volume is the configuration of a volume.
type Volume struct {
	ID         string   `json:"id"`
	Name       string   `json:"name"`
	Type       string   `json:"type"`   // Distribute, Replicate, Distributed-Replicate
	Status     int      `json:"status"` // 0 created, 1 started, 2 stopped
	StatusText string   `json:"status_text"`
	Snapshots  int      `json:"snapshots"`
	Replica    int      `json:"replica"`
	Sets       int      `json:"sets"`
	Bricks     []Brick  `json:"bricks"`
	Options    []Option `json:"options"` // only those that were set, by key
	// Recoveries are the last decisions to go on with less than everything, oldest first.
	Recoveries []VolumeRecovered `json:"recoveries,omitempty"`
}

// VolumeRecovered records that a set was made to go on with one brick, by hand.
type VolumeRecovered struct {
	Set   int       `json:"set"`
	Epoch uint64    `json:"epoch"` // that began with it
	Time  time.Time `json:"time"`
	Peer  string    `json:"peer"`  // name of the peer on which it was asked for
	Brick string    `json:"brick"` // name
	Kept  string    `json:"kept"`  // position of the last change that the brick had
	Known string    `json:"known"` // position up to which the set was known to be durable
	Lost  []string  `json:"lost"`  // names of the bricks that had been in sync
}

// VolumeRecovery is what recovering a volume would do, for an administrator to
// agree to.
type VolumeRecovery struct {
	Volume string        `json:"volume"`
	Sets   []SetRecovery `json:"sets"` // those that cannot go on by themselves
}

// SetRecovery is what would become of one set.
type SetRecovery struct {
	Set       int         `json:"set"`
	Epoch     uint64      `json:"epoch"`             // of the set at present
	Brick     string      `json:"brick"`             // name of the brick that it would go on with
	Kept      string      `json:"kept"`              // position of that brick's last change
	Changed   *time.Time  `json:"changed,omitempty"` // when that was made, as the primary's clock said
	Known     string      `json:"known"`             // position up to which the set was known to be durable
	Missing   uint64      `json:"missing"`           // changes that are certainly lost; there may be more
	Lost      []LostBrick `json:"lost"`
	InSync    int         `json:"in_sync"`     // after it
	MinInSync int         `json:"min_in_sync"` // with fewer in sync the set is read-only
}

// LostBrick is a brick that has, or may have, what would be lost.
type LostBrick struct {
	Brick  string `json:"brick"`
	InSync bool   `json:"in_sync"` // it had everything that was acknowledged
	Online bool   `json:"online"`
	Ahead  uint64 `json:"ahead"` // changes that it is known to have more
	// Problem says why it does not answer.
	Problem string `json:"problem,omitempty"`
}

// VolumeRecover asks for a recovery. Brick chooses the brick to go on with in its
// set, and may be empty.
type VolumeRecover struct {
	Brick string `json:"brick,omitempty"`
	// Agreed is the VolumeRecovery that was seen; nothing else is done.
	Agreed []AgreedSet `json:"agreed"`
}

// AgreedSet are the fields of a SetRecovery that make it what it is.
type AgreedSet struct {
	Set   int    `json:"set"`
	Epoch uint64 `json:"epoch"`
	Brick string `json:"brick"`
	Kept  string `json:"kept"`
}

// VolumeStatus is how a started volume does.
type VolumeStatus struct {
	Name   string        `json:"name"`
	Bricks []BrickStatus `json:"bricks"`
	Peers  []ServiceRow  `json:"peers"` // the daemons that heal and serve, the answering one first
	Sets   []SetStatus   `json:"sets"`
}

// ServiceRow is a daemon that takes part in the volume.
type ServiceRow struct {
	Host   string `json:"host"` // "localhost" for the answering peer
	Online bool   `json:"online"`
	PID    int    `json:"pid"`
}

// SetStatus is the state of one replica set.
type SetStatus struct {
	Index     int    `json:"index"`
	Epoch     uint64 `json:"epoch"`
	Primary   string `json:"primary"` // brick name; empty: none
	InSync    int    `json:"in_sync"`
	Members   int    `json:"members"`
	MinInSync int    `json:"min_in_sync"`
	Writable  bool   `json:"writable"`
	// Problem is why it takes no changes now, or serves nothing at all; empty if it does.
	Problem string `json:"problem"`
}

// BrickStatus is how one brick does.
type BrickStatus struct {
	Brick
	Online bool `json:"online"`
	Port   int  `json:"port"` // TCP; 0 if offline
	PID    int  `json:"pid"`  // of the daemon; 0 if offline
	// Role is "primary", "backup" or "out" (not in the in-sync set).
	Role   string `json:"role"`
	InSync bool   `json:"in_sync"`
	// Drained: its peer is drained (peer drain), so it is to be out.
	Drained bool   `json:"drained,omitempty"`
	Epoch   uint64 `json:"epoch"`
	Tail    uint64 `json:"tail"`   // sequence number of the last change in its log
	Commit  uint64 `json:"commit"` // sequence number up to which changes are acknowledged
	Whole   bool   `json:"whole"`  // its contents are complete: no comparison is under way
	// Changed is when the last change in its log was made, by the clock of the
	// primary of that time.
	Changed *time.Time `json:"changed,omitempty"`
	// Problem says why the brick is offline or not in sync, in words.
	Problem string      `json:"problem,omitempty"`
	Heal    *HealState  `json:"heal,omitempty"` // while it is being brought up to date
	Scrub   *ScrubState `json:"scrub,omitempty"`
	Disk    *DiskStatus `json:"disk,omitempty"` // with ?detail=true
}

// ScrubState is how far a brick has come with looking for what its disk has lost.
type ScrubState struct {
	// State is "idle", "running", "waiting" (for the brick to be in sync) or "paused".
	State   string     `json:"state"`
	Began   *time.Time `json:"began,omitempty"` // the round that runs or was the last
	Ended   *time.Time `json:"ended,omitempty"` // the last round that ended
	Percent float64    `json:"percent"`         // of the round, 0 to 100
	Bytes   uint64     `json:"bytes"`           // of data files, read in the round
	Checked uint64     `json:"checked"`         // blocks compared with their checksums in the round
	Signed  uint64     `json:"signed"`          // blocks that got a checksum in the round
	Bad     uint64     `json:"bad"`             // blocks found to be rotten in the round
	// Since the brick was made: blocks found to be rotten, by the scrub or by whoever
	// came across them, and blocks repaired.
	Found    uint64   `json:"found"`
	Repaired uint64   `json:"repaired"`
	Rotten   int      `json:"rotten"`           // blocks that are rotten now
	Blocks   []Rotten `json:"blocks,omitempty"` // the first hundred of them
}

// Rotten is a part of a file that a brick has lost.
type Rotten struct {
	Path     string    `json:"path"` // from the volume's root; empty: not known, or it has none
	Inode    uint64    `json:"inode"`
	From     uint64    `json:"from"` // bytes of the file
	To       uint64    `json:"to"`
	DataFile string    `json:"data_file"` // on the brick's machine
	Found    time.Time `json:"found"`
	// Problem says why it was not repaired when that was tried last; empty: not tried yet.
	Problem string `json:"problem,omitempty"`
}

// ScrubReply tells which bricks have begun a round of scrubbing.
type ScrubReply struct {
	Bricks []string `json:"bricks"`
	Missed []string `json:"missed,omitempty"` // those that have not, with the reason
}

// DiskStatus describes the file system under a brick.
type DiskStatus struct {
	FileSystem   string `json:"file_system"`
	Device       string `json:"device"`
	MountOptions string `json:"mount_options"`
	InodeSize    int    `json:"inode_size"` // bytes; 0: unknown
	Free         uint64 `json:"free"`       // bytes
	Total        uint64 `json:"total"`      // bytes
	Inodes       uint64 `json:"inodes"`
	FreeInodes   uint64 `json:"free_inodes"`
}

// HealState is a heal in progress.
type HealState struct {
	Phase      string  `json:"phase"`       // "catch-up" or "compare"
	Percent    float64 `json:"percent"`     // done, 0 to 100
	Bytes      uint64  `json:"bytes"`       // copied so far
	Rate       float64 `json:"rate"`        // bytes per second, lately
	ETASeconds float64 `json:"eta_seconds"` // −1: unknown
}

// HealInfo tells per brick what it lacks.
type HealInfo struct {
	Volume string `json:"volume"`
	// Pending is the sum of what the bricks lack; −1 while some brick's lack is
	// unknown, 0 only when every brick is in sync.
	Pending int64       `json:"pending"`
	Bricks  []HealBrick `json:"bricks"`
}

// HealBrick is a brick's row of HealInfo.
type HealBrick struct {
	Name      string `json:"name"`
	Connected bool   `json:"connected"`
	InSync    bool   `json:"in_sync"`
	// Entries counts the changes, or after a long absence the objects, that the
	// brick still lacks; −1: unknown, because the brick or its primary is down.
	Entries int64      `json:"entries"`
	Heal    *HealState `json:"heal,omitempty"`
	Problem string     `json:"problem,omitempty"`
}

// HealRequest asks for a heal to be started now, or (Verify) for proof that the
// replicas are identical.
type HealRequest struct {
	Full   bool `json:"full"`
	Verify bool `json:"verify"`
}

// HealReply answers a HealRequest.
type HealReply struct {
	Digests []BrickDigest `json:"digests,omitempty"` // with Verify
	Same    bool          `json:"same"`              // all digests of each set are equal
}

// BrickDigest is the digest of a brick's logical contents at a position of its set.
type BrickDigest struct {
	Brick  string `json:"brick"`
	At     string `json:"at"`  // epoch.sequence
	Sum    string `json:"sum"` // hex
	Inodes uint64 `json:"inodes"`
	Bytes  uint64 `json:"bytes"`
	// Problem says why there is no digest: out of sync, say.
	Problem string `json:"problem,omitempty"`
}

// Subvolume is a directory of a volume with limits and an account of its own.
type Subvolume struct {
	Volume string `json:"volume"`
	Name   string `json:"name"`   // path in the volume, without a slash in front
	Inode  uint64 `json:"inode"`  // of its top directory; never used again
	Size   uint64 `json:"size"`   // limit, bytes; 0: none
	Inodes uint64 `json:"inodes"` // limit; 0: none
	// UsedSize is the sum of the blocks (as du shows them) and of the extended
	// attributes of all its inodes, in bytes. Unlinked files count until they are closed.
	UsedSize   uint64    `json:"used_size"`
	UsedInodes uint64    `json:"used_inodes"` // its top directory is one
	UID        uint32    `json:"uid"`         // of its top directory
	GID        uint32    `json:"gid"`
	Mode       uint32    `json:"mode"` // permission bits
	Created    time.Time `json:"created"`
	// Used is when it was last known to be used: what it uses changed, or a mount
	// of it began or ended.
	Used  time.Time       `json:"used"`
	Users []SubvolumeUser `json:"users"` // that have it mounted now
}

// SubvolumeUser is a mount of a subvolume.
type SubvolumeUser struct {
	Peer    string `json:"peer"`   // name; empty: it is not of the pool
	Client  string `json:"client"` // host and mount point
	Session uint64 `json:"session"`
}

// LocalDocker is what a peer tells another of the uses of a Docker volume on its machine.
type LocalDocker struct {
	Containers int `json:"containers"`
}

// SubvolumeCreate asks for a new subvolume.
type SubvolumeCreate struct {
	Name   string  `json:"name"`   // path in the volume; what is above it must exist
	Size   uint64  `json:"size"`   // 0: no limit
	Inodes uint64  `json:"inodes"` // 0: no limit
	UID    uint32  `json:"uid"`
	GID    uint32  `json:"gid"`
	Mode   *uint32 `json:"mode,omitempty"` // absent: 0755
}

// SubvolumeChange changes what it has of a subvolume.
type SubvolumeChange struct {
	Size   *uint64 `json:"size,omitempty"`   // 0: no limit
	Inodes *uint64 `json:"inodes,omitempty"` // 0: no limit
	Name   string  `json:"name,omitempty"`   // the new one
	// Adopt makes a subvolume of a directory that is none; it must be empty.
	Adopt bool `json:"adopt,omitempty"`
}

// SubvolumeRequest is what peers ask each other: to list, with Name to describe
// one, or to do what is set.
type SubvolumeRequest struct {
	Volume string           `json:"volume"`
	Name   string           `json:"name,omitempty"`
	Create *SubvolumeCreate `json:"create,omitempty"`
	Token  uint64           `json:"token,omitempty"` // of Create: sent again it means the same
	Change *SubvolumeChange `json:"change,omitempty"`
	Delete uint64           `json:"delete,omitempty"` // the inode of what had the name
	Inode  uint64           `json:"inode,omitempty"`  // of Change likewise; 0: whatever has the name
	Force  bool             `json:"force,omitempty"`
	Ended  []uint64         `json:"ended,omitempty"` // sessions whose mounts have ended for good
}

// BrickPrepare asks a peer to check and make the directory of a new brick.
// Peers ask each other; nobody else may.
type BrickPrepare struct {
	Pool    string `json:"pool"`
	Volume  string `json:"volume"` // id
	Set     int    `json:"set"`
	Brick   string `json:"brick"` // id
	Host    string `json:"host"`  // as the user wrote it, for messages
	Path    string `json:"path"`
	Force   bool   `json:"force"`
	DryRun  bool   `json:"dry_run"` // check only, make nothing
	Discard bool   `json:"discard"` // take back what an earlier prepare made
}

// LocalBricks is what a peer tells another of its own bricks.
type LocalBricks struct {
	PID    int           `json:"pid"`
	Bricks []BrickStatus `json:"bricks"`
}

// Examination is what a daemon finds when it looks at its pool: who reaches whom,
// and whose clock is where.
type Examination struct {
	Self  string            `json:"self"`  // name of the peer that answers; empty: it is in no pool
	Peers []PeerExamination `json:"peers"` // by name, the answering one among them
}

// PeerExamination is what one peer has answered.
type PeerExamination struct {
	Name string `json:"name"`
	// Problem says why it was not asked, or did not answer; then nothing else is known.
	Problem string `json:"problem,omitempty"`
	// Ahead is how far its clock is ahead of that of the peer that asked, in
	// milliseconds, give or take Trip.
	Ahead int64 `json:"ahead"`
	// Trip is how long the question and its answer were under way, in milliseconds.
	Trip     int64   `json:"trip"`
	Version  string  `json:"version"`
	Protocol uint16  `json:"protocol"`
	Reach    []Reach `json:"reach"` // what became of its connections to the others
}

// LocalReach is what a peer tells another of its own connections and clock.
type LocalReach struct {
	Time     time.Time `json:"time"` // when it was done
	Took     int64     `json:"took"` // how long that took it, milliseconds
	Version  string    `json:"version"`
	Protocol uint16    `json:"protocol"`
	Reach    []Reach   `json:"reach"`
}

// Reach is an attempt to connect to a peer at one of the addresses that the pool knows of it.
type Reach struct {
	Peer    string `json:"peer"` // name
	Addr    string `json:"addr"`
	Problem string `json:"problem,omitempty"` // empty: that peer answered
}
