package meta

import (
	"encoding/binary"

	"mortar/internal/fsop"
)

// The other tables that Parse tells apart.
const (
	TableXattr   = tableXattr
	TableTarget  = tableTarget
	TableOrphan  = tableOrphan
	TableRun     = tableRun
	TableReply   = tableReply
	TableSession = tableSession
	TableSubvol  = tableSubvol
)

// Parsed is what a record says about an inode.
type Parsed struct {
	Table  byte
	Ino    fsop.Ino // whom the record is about; nonsense in replies and sessions
	Dentry Dentry   // of a TableDentry
	Run    Run      // of a TableRun
	Xattr  uint64   // of a TableXattr: bytes of its name and value
	Subvol Subvolume
}

// Parse takes apart a record that CheckRecord has let pass.
func Parse(k, val []byte) (p Parsed) {
	p.Table, p.Ino = k[0], keyIno(k)
	switch p.Table {
	case tableDentry:
		p.Dentry = Dentry{Cookie: Cookie(binary.BigEndian.Uint64(k[9:])), Name: string(k[17:])}
		_ = getDentry(val, &p.Dentry) // was checked
	case tableRun:
		_ = getRun(k, val, &p.Run) // was checked
	case tableXattr:
		p.Xattr = uint64(len(k) - 9 + len(val) - 1)
	case tableSubvol:
		_ = getSubvolume(k, val, &p.Subvol) // was checked
	}
	return p
}
