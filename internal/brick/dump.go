package brick

import (
	"bufio"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"time"

	"mortar/internal/brick/meta"
	"mortar/internal/codec"
	"mortar/internal/disk"
	"mortar/internal/fsop"
	"mortar/internal/oplog"
	"mortar/internal/proto"
)

// DumpLog prints the op log of a brick, a line per entry, from behind sequence
// after. It looks at nothing but the log, and so can be used on a brick that
// cannot be opened. Damage ends it with the error; what was before is printed.
func DumpLog(ctx context.Context, fsys disk.FS, dir string, after uint64, w io.Writer) error {
	l, err := oplog.Open(oplog.Options{FS: fsys, Dir: fsys.PathJoin(dir, homeName, logName), ReadOnly: true})
	if err != nil {
		return err
	}
	defer l.Close()
	out := bufio.NewWriter(w)
	defer out.Flush()
	fmt.Fprintf(out, "# base %v, tail %v, epochs %v\n", l.Base(), l.Tail(), l.History())
	after = max(after, l.Base().Seq)
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		raws, poss, locs, err := l.Read(after, replayBytes)
		if err != nil {
			return err
		}
		if len(raws) == 0 {
			return out.Flush()
		}
		for i, raw := range raws {
			after = poss[i].Seq
			var e proto.Entry
			if err := codec.Decode(raw, &e); err != nil {
				fmt.Fprintf(out, "%v segment %d offset %d: %v\n", poss[i], locs[i].Segment, locs[i].Off, err)
				continue
			}
			fmt.Fprintf(out, "%v %s segment %d offset %d length %d session %v#%d %s\n", poss[i],
				time.Unix(0, e.Time).UTC().Format(time.RFC3339Nano), locs[i].Segment, locs[i].Off, locs[i].Len, e.Session, e.Number, describe(e.Op))
		}
		if err := out.Flush(); err != nil {
			return err
		}
	}
}

// describe prints an operation without the users' data in it.
func describe(op fsop.Op) string {
	if s, ok := op.(*fsop.Setxattr); ok {
		return fmt.Sprintf("setxattr {Ino:%d Name:%q %d bytes}", s.Ino, s.Name, len(s.Value))
	}
	return fsop.String(op)
}

// dumpValue is how many bytes of a value are printed.
const dumpValue = 64

// DumpMeta prints the records of the KV as they are after the log was replayed:
// the table's letter, the key's other bytes and the start of the value, in
// hexadecimal, and of inodes and names what they say. The tables are described
// in doc/on-disk.md.
func (off *Offline) DumpMeta(ctx context.Context, w io.Writer) error {
	out := bufio.NewWriter(w)
	defer out.Flush()
	fmt.Fprintf(out, "# position %v\n", off.Pos())
	err := off.b.store.Records([]byte{0}, []byte{0xff}, func(k, val []byte) (bool, error) {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		more := ""
		if len(val) > dumpValue {
			more = fmt.Sprintf("… (%d bytes)", len(val))
		}
		fmt.Fprintf(out, "%c %s = %s%s%s\n", meta.RecordTable(k), hex.EncodeToString(k[1:]), hex.EncodeToString(val[:min(len(val), dumpValue)]), more, explain(k, val))
		return true, nil
	})
	if err != nil {
		return err
	}
	return out.Flush()
}

// explain says what people want to know of the most usual records.
func explain(k, val []byte) string {
	if meta.RecordTable(k) == meta.TableDentry && len(k) > 17 {
		return fmt.Sprintf(" # %q", k[17:])
	}
	n, ok, err := meta.RecordInode(k, val)
	switch {
	case err != nil:
		return " # " + err.Error()
	case ok:
		return fmt.Sprintf(" # inode %d mode %o links %d owner %d:%d size %d", n.Ino, n.Mode, n.Nlink, n.UID, n.GID, n.Size)
	}
	return ""
}
