package meta

import (
	"encoding/binary"
	"fmt"

	"github.com/cespare/xxhash/v2"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
)

// The tables. A key is the table's letter and the fields below, integers
// big-endian so that keys sort by them. Upper case tables are the replicated
// state: two bricks at one position have the same keys and values in them.
// Lower case tables are this brick's own.
//
//	D dir(8) cookie(8) name      directory entry      Dentry
//	I ino(8)                     inode                Inode
//	K ino(8) kind(1) session(8) owner(8) start(8)
//	                             advisory lock        Lock
//	M ino(8) block(8)            run of allocated blocks of a sparse file
//	O ino(8)                     inode without a name
//	R session(8) number(8)       reply to a request   Reply
//	S session(8)                 session              Session
//	U ino(8)                     subvolume            Subvolume
//	X ino(8) name                extended attribute
//	Y ino(8)                     target of a symbolic link
//
//	b ino(8)                     settled contents     Base
//	c ino(8) incarnation(8) chunk(8)
//	                             checksums of blocks  Sums
//	e ino(8) offset(8)           contents in the log  Extent
//	g ino(8) incarnation(8)      data file to remove
//	h ino(8)                     contents in doubt
//	p                            position and counters  State
//	r ino(8) incarnation(8) block(8)
//	                             rotten block         Rotten
//	s                            how far scrubbing is ScrubState
const (
	tableDentry  = 'D'
	tableInode   = 'I'
	tableLock    = 'K'
	tableRun     = 'M'
	tableOrphan  = 'O'
	tableReply   = 'R'
	tableSession = 'S'
	tableSubvol  = 'U'
	tableXattr   = 'X'
	tableTarget  = 'Y'

	tableBase    = 'b'
	tableSums    = 'c'
	tableExtent  = 'e'
	tableGarbage = 'g'
	tableDoubt   = 'h'
	tableState   = 'p'
	tableRotten  = 'r'
	tableScrub   = 's'
)

// Replicated bounds the keys of the replicated tables: from Lo to below Hi.
var Replicated = struct{ Lo, Hi []byte }{[]byte{'A'}, []byte{'Z' + 1}}

// Names bounds the keys of directory entries.
var Names = struct{ Lo, Hi []byte }{[]byte{tableDentry}, []byte{tableDentry + 1}}

// A Cookie is the place of a name in its directory, and what a listing goes on
// from: a hash, so that it is the same on every replica and for all the
// entry's life. Cookies below 3 are never used: 0 is the start of a listing,
// 1 and 2 are left to "." and "..".
type Cookie uint64

const cookieMask = 1<<63 - 1 // off_t is signed

// Hash makes the cookie of a name. Salt is the volume's, so that nobody can
// prepare names that collide everywhere.
func Hash(salt uint64, name string) Cookie {
	d := xxhash.Digest{}
	d.ResetWithSeed(salt)
	d.WriteString(name)
	c := Cookie(d.Sum64() & cookieMask)
	if c < 3 {
		c += 3
	}
	return c
}

func key1(table byte, a uint64) []byte {
	return binary.BigEndian.AppendUint64(append(make([]byte, 0, 9), table), a)
}

func key2(table byte, a, b uint64) []byte {
	k := binary.BigEndian.AppendUint64(append(make([]byte, 0, 17), table), a)
	return binary.BigEndian.AppendUint64(k, b)
}

func putKey1(k []byte, table byte, a uint64) []byte {
	k[0] = table
	binary.BigEndian.PutUint64(k[1:], a)
	return k
}

func putKey2(k []byte, table byte, a, b uint64) []byte {
	putKey1(k, table, a)
	binary.BigEndian.PutUint64(k[9:], b)
	return k
}

// after1 is the first key that does not begin with table and a.
func after1(table byte, a uint64) []byte {
	if a == 1<<64-1 {
		return []byte{table + 1}
	}
	return key1(table, a+1)
}

// after2 is the first key that does not begin with table, a and b.
func after2(table byte, a, b uint64) []byte {
	if b == 1<<64-1 {
		return after1(table, a)
	}
	return key2(table, a, b+1)
}

func dentryKey(dir fsop.Ino, c Cookie, name string) []byte {
	k := make([]byte, 17+len(name))
	putKey2(k, tableDentry, uint64(dir), uint64(c))
	copy(k[17:], name)
	return k
}

func xattrKey(ino fsop.Ino, name string) []byte {
	k := make([]byte, 9+len(name))
	putKey1(k, tableXattr, uint64(ino))
	copy(k[9:], name)
	return k
}

const lockKeyLen = 1 + 8 + 1 + 8 + 8 + 8

func lockKey(l *Lock) []byte {
	k := make([]byte, 0, lockKeyLen)
	k = binary.BigEndian.AppendUint64(append(k, tableLock), uint64(l.Ino))
	if l.Flock {
		k = append(k, 1)
	} else {
		k = append(k, 0)
	}
	k = binary.BigEndian.AppendUint64(k, uint64(l.Session))
	k = binary.BigEndian.AppendUint64(k, l.Owner)
	return binary.BigEndian.AppendUint64(k, l.Start)
}

var stateKey = []byte{tableState}

// checkKey says whether k could have been made by this package, of a
// replicated table. Keys that come from another brick are checked by it.
func checkKey(k []byte) error {
	if len(k) == 0 {
		return fmt.Errorf("%w: empty key", ErrFormat)
	}
	ok := false
	switch k[0] {
	case tableDentry:
		ok = len(k) > 17 && len(k) <= 17+fsop.MaxName && fsop.CheckName(string(k[17:])) == nil
	case tableInode, tableOrphan, tableSession, tableSubvol, tableTarget:
		ok = len(k) == 9
	case tableLock:
		ok = len(k) == lockKeyLen && k[9] <= 1
	case tableRun, tableReply:
		ok = len(k) == 17
	case tableXattr:
		ok = len(k) > 9 && len(k) <= 9+fsop.MaxName
	}
	if !ok {
		return fmt.Errorf("%w: key %q", ErrFormat, k)
	}
	return nil
}

func keyIno(k []byte) fsop.Ino { return fsop.Ino(binary.BigEndian.Uint64(k[1:])) }

func keySession(k []byte) cluster.SessionID {
	return cluster.SessionID(binary.BigEndian.Uint64(k[1:]))
}
