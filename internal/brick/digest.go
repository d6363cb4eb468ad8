package brick

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"

	"mortar/internal/brick/meta"
	"mortar/internal/cluster"
)

// Digest is a checksum of a brick's logical state.
type Digest struct {
	Pos    cluster.Pos
	Sum    [16]byte
	Inodes uint64
	Bytes  uint64 // of contents, holes not counted
}

// digestBacklog is how many times Options.Backlog may wait to be settled while a
// digest is made, which holds settling up.
const digestBacklog = 16

// Digest computes the checksum of the whole state as of one position: names,
// attributes, contents, locks, sessions and their replies. Two bricks of a set
// that are at the same position have the same digest.
func (b *Brick) Digest(ctx context.Context) (d Digest, err error) {
	if !b.Whole() {
		return d, fmt.Errorf("the contents of brick %s are not known: it is being healed", b.opts.Dir)
	}
	h, err := b.hold(true)
	if err != nil {
		return d, err
	}
	defer h.close(ErrClosed)
	sum := sha256.New()
	err = h.use(ctx, func(ctx context.Context, v meta.View) error {
		d.Pos = h.state.Pos
		sum.Write(meta.EncodeState(&h.state))
		return v.Records(meta.Replicated.Lo, meta.Replicated.Hi, func(k, val []byte) (bool, error) {
			if err := ctx.Err(); err != nil {
				return false, context.Cause(ctx)
			}
			hashRecord(sum, k, val)
			n, ok, err := meta.RecordInode(k, val)
			if err != nil || !ok {
				return true, err
			}
			d.Inodes++
			if n.IsRegular() && n.Blocks > 0 {
				err = b.digestContents(ctx, v, n, sum, &d)
			}
			return true, err
		})
	})
	if err = damage(err); errors.Is(err, ErrDamaged) && !b.lost(err) {
		return d, b.failWith(err)
	}
	copy(d.Sum[:], sum.Sum(nil))
	return d, err
}

func (b *Brick) digestContents(ctx context.Context, v meta.View, n *meta.Inode, sum hash.Hash, d *Digest) error {
	rs, err := allocated(v, n)
	if err != nil {
		return err
	}
	c, err := b.pinnedContents(v, n)
	if err != nil {
		return err
	}
	defer c.close()
	buf := make([]byte, min(n.Size, healBlock))
	checked := uint64(0) // 1 + the block that was checked last
	for _, r := range rs {
		for at, end := r.Start*blockSize, min(r.End*blockSize, n.Size); at < end; {
			if err := ctx.Err(); err != nil {
				return context.Cause(ctx)
			}
			if b.backlog.load.Load() > digestBacklog*b.opts.Backlog {
				return fmt.Errorf("too much is being written to brick %s for a digest; try again at a quieter time", b.opts.Dir)
			}
			if k := at / sumSize; k+1 != checked {
				// What has rotted is not taken for what the file has.
				checked = k + 1
				found, err := b.checkBlock(n.Ino, k)
				if err != nil {
					return err
				}
				if found == blockRotten {
					return fmt.Errorf("bytes %d to %d of inode %d have rotted on brick %s; \"mortar volume scrub VOLUME status\" shows what becomes of them", k*sumSize, (k+1)*sumSize, n.Ino, b.opts.Dir)
				}
			}
			p := buf[:min(uint64(len(buf)), end-at, sumSize-at%sumSize)]
			if err := c.readAt(p, at); err != nil {
				return err
			}
			sum.Write(p)
			at += uint64(len(p))
			d.Bytes += uint64(len(p))
		}
	}
	return nil
}

// hashRecord adds a key and its value to a sum.
func hashRecord(h hash.Hash, k, v []byte) {
	var n [8]byte
	binary.LittleEndian.PutUint32(n[:], uint32(len(k)))
	binary.LittleEndian.PutUint32(n[4:], uint32(len(v)))
	h.Write(n[:])
	h.Write(k)
	h.Write(v)
}
