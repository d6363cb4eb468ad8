package brick

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/cespare/xxhash/v2"

	"mortar/internal/brick/meta"
	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// The conversation of a comparison. The brick that is to be healed asks, the
// Source answers; whoever carries the messages does not look into them. Every
// request is one byte of kind and the fields below.
//
// Metadata is read from a snapshot at one position. Contents are read as they
// are when they are asked for, which may be newer: whoever healed goes on with
// the entries after the position, and what they wrote is written again. Only
// committed contents are given away, because what is undone later would not be
// written again.
const (
	healVersion = 1

	healBlock  = 128 << 10 // unit in which large files are compared
	healReply  = 960 << 10 // about the largest reply
	chunkKeys  = 256       // records under one sum
	chunkBytes = 256 << 10 // of records under one sum, unless it is one record
	maxChunks  = 512       // in one reply
	maxFiles   = 1024      // in one request for contents
	maxBlocks  = 4096      // block sums in one reply
	maxKey     = 1024
	maxValue   = 128 << 10
)

type healKind uint8

const (
	healHello    healKind = 1
	healSums     healKind = 2
	healRecords  healKind = 3
	healContents healKind = 4
	healBlockSum healKind = 5
	healBlocks   healKind = 6
)

// A healRequest is everything that can be asked.
type healRequest struct {
	Kind   healKind
	Hello  helloRequest
	Seed   uint64     // Sums, BlockSums: of the sums
	Lo, Hi []byte     // Sums from Lo; Records from Lo to below Hi
	Inos   []fsop.Ino // Contents
	Ino    fsop.Ino   // BlockSums, Blocks
	First  uint64     // BlockSums
	Count  uint32     // BlockSums
	Blocks []uint64   // Blocks
}

type helloRequest struct {
	Version uint16
	Volume  cluster.VolumeID
	Set     cluster.SetIndex
}

func (q *healRequest) Code(c *codec.Coder) {
	c.U8((*uint8)(&q.Kind))
	switch q.Kind {
	case healHello:
		c.U16(&q.Hello.Version)
		proto.ID(c, &q.Hello.Volume)
		c.U16((*uint16)(&q.Hello.Set))
	case healSums:
		c.U64(&q.Seed)
		c.Bytes(&q.Lo, maxKey)
	case healRecords:
		c.Bytes(&q.Lo, maxKey)
		c.Bytes(&q.Hi, maxKey)
	case healContents:
		codec.Slice(c, &q.Inos, maxFiles, func(c *codec.Coder, i *fsop.Ino) { i.Code(c) })
	case healBlockSum:
		c.U64(&q.Seed)
		q.Ino.Code(c)
		c.U64(&q.First)
		c.U32(&q.Count)
	case healBlocks:
		q.Ino.Code(c)
		codec.Slice(c, &q.Blocks, maxBlocks, func(c *codec.Coder, n *uint64) { c.U64(n) })
	default:
		c.Fail("request %d", q.Kind)
	}
}

// helloReply answers Hello.
type helloReply struct {
	Pos     cluster.Pos
	History []cluster.Pos
	State   []byte
}

func (r *helloReply) Code(c *codec.Coder) {
	proto.Pos(c, &r.Pos)
	codec.Slice(c, &r.History, proto.MaxHistory, proto.Pos)
	c.Bytes(&r.State, 1024)
}

// A chunk is a range of records: from the end of the chunk before it.
type chunk struct {
	End   []byte
	Count uint32
	Sum   uint64
}

func (k *chunk) Code(c *codec.Coder) {
	c.Bytes(&k.End, maxKey)
	c.U32(&k.Count)
	c.U64(&k.Sum)
}

// sumsReply answers Sums. The last chunk ends at the end of all if the reply is
// the last one.
type sumsReply struct{ Chunks []chunk }

func (r *sumsReply) Code(c *codec.Coder) {
	codec.Slice(c, &r.Chunks, maxChunks, func(c *codec.Coder, k *chunk) { k.Code(c) })
}

type healRecord struct{ Key, Value []byte }

// recordsReply answers Records: what there is from Lo to below End.
type recordsReply struct {
	End     []byte
	Records []healRecord
}

func (r *recordsReply) Code(c *codec.Coder) {
	c.Bytes(&r.End, maxKey)
	codec.Slice(c, &r.Records, 1<<16, func(c *codec.Coder, k *healRecord) {
		c.Bytes(&k.Key, maxKey)
		c.Bytes(&k.Value, maxValue)
	})
}

// contentsReply answers Contents, for as many of the inodes from the first on as
// fit. What a file had not when it was read, or a file that is gone, is empty.
type contentsReply struct{ Files [][]byte }

func (r *contentsReply) Code(c *codec.Coder) {
	codec.Slice(c, &r.Files, maxFiles, func(c *codec.Coder, p *[]byte) { c.Bytes(p, fsop.MaxData) })
}

// blockSum is 0 for a block of zeros.
const zeroSum = 0

// blockSumsReply answers BlockSums: the size of the file and the sums from First
// on, up to its end or Count.
type blockSumsReply struct {
	Size uint64
	Sums []uint64
}

func (r *blockSumsReply) Code(c *codec.Coder) {
	c.U64(&r.Size)
	codec.Slice(c, &r.Sums, maxBlocks, func(c *codec.Coder, n *uint64) { c.U64(n) })
}

// blocksReply answers Blocks, for as many from the first on as fit. A block
// behind the end is empty, the last one short.
type blocksReply struct{ Blocks [][]byte }

func (r *blocksReply) Code(c *codec.Coder) {
	codec.Slice(c, &r.Blocks, maxBlocks, func(c *codec.Coder, p *[]byte) { c.Bytes(p, healBlock) })
}

// Source is this brick, at one position, as another one compares itself with.
type Source struct {
	h       *held
	history []cluster.Pos
}

// Source takes a snapshot to compare with. It ends with Close, or when the brick
// is taken back or closed.
func (b *Brick) Source() (*Source, error) {
	if err := b.Err(); err != nil {
		return nil, err
	}
	for {
		if !b.Whole() {
			return nil, errors.New("the brick's own contents are not known")
		}
		before := b.log.Tail()
		history := b.log.History()
		h, err := b.hold(false)
		if err != nil {
			return nil, err
		}
		if h.state.Pos == before {
			return &Source{h: h, history: history}, nil
		}
		// An entry came in between, or the log is not replayed.
		behind := h.state.Pos.Seq < before.Seq
		h.close(ErrClosed)
		if behind {
			return nil, fmt.Errorf("the brick stands at %v and its log at %v", h.state.Pos, before)
		}
	}
}

// Pos returns the position of the snapshot.
func (s *Source) Pos() cluster.Pos { return s.h.state.Pos }

// Close ends the snapshot. What is being served at this moment is served first.
func (s *Source) Close() { s.h.close(ErrClosed) }

// Serve answers a request of a brick that is being healed.
func (s *Source) Serve(ctx context.Context, req []byte) (reply []byte, err error) {
	var q healRequest
	if err := codec.Decode(req, &q); err != nil {
		return nil, err
	}
	err = s.h.use(ctx, func(ctx context.Context, v meta.View) error {
		var r codec.Coded
		switch q.Kind {
		case healHello:
			r, err = s.hello(&q.Hello)
		case healSums:
			r, err = s.sums(v, &q)
		case healRecords:
			r, err = s.records(v, &q)
		case healContents:
			r, err = s.contents(ctx, &q)
		case healBlockSum:
			r, err = s.blockSums(ctx, &q)
		case healBlocks:
			r, err = s.blocks(ctx, &q)
		}
		if err == nil {
			reply = codec.Append(nil, r)
		}
		return err
	})
	return reply, err
}

func (s *Source) hello(q *helloRequest) (*helloReply, error) {
	id := s.h.b.id
	switch {
	case q.Version != healVersion:
		return nil, fmt.Errorf("comparison of version %d asked for, this brick knows %d: update both to the same version of mortar", q.Version, healVersion)
	case q.Volume != id.Volume || q.Set != id.Set:
		return nil, fmt.Errorf("%w: a brick of volume %s, set %d asks a brick of volume %s, set %d", ErrOtherBrick, q.Volume, q.Set, id.Volume, id.Set)
	}
	return &helloReply{Pos: s.Pos(), History: s.history, State: meta.EncodeState(&s.h.state)}, nil
}

// summing adds records up to chunks.
type summing struct {
	h     *xxhash.Digest
	count uint32
	bytes int
}

func (s *summing) add(k, v []byte) {
	hashRecord(s.h, k, v)
	s.count++
	s.bytes += len(k) + len(v)
}

func (s *Source) sums(v meta.View, q *healRequest) (*sumsReply, error) {
	if !meta.InReplicated(q.Lo, meta.Replicated.Hi) {
		return nil, fmt.Errorf("%w: sums from key %q", codec.ErrMalformed, q.Lo)
	}
	r := &sumsReply{}
	sum := summing{h: xxhash.NewWithSeed(q.Seed)}
	end := func(k []byte) {
		r.Chunks = append(r.Chunks, chunk{bytes.Clone(k), sum.count, sum.h.Sum64()})
		sum.h.ResetWithSeed(q.Seed)
		sum.count, sum.bytes = 0, 0
	}
	err := v.Records(q.Lo, meta.Replicated.Hi, func(k, val []byte) (bool, error) {
		if sum.count > 0 && (sum.count >= chunkKeys || sum.bytes+len(k)+len(val) > chunkBytes) {
			if end(k); len(r.Chunks) == maxChunks-1 {
				return false, nil
			}
		}
		sum.add(k, val)
		return true, nil
	})
	if len(r.Chunks) < maxChunks-1 {
		end(meta.Replicated.Hi)
	}
	return r, err
}

func (s *Source) records(v meta.View, q *healRequest) (*recordsReply, error) {
	if !meta.InReplicated(q.Lo, q.Hi) {
		return nil, fmt.Errorf("%w: records from %q to %q", codec.ErrMalformed, q.Lo, q.Hi)
	}
	r := &recordsReply{End: q.Hi}
	size := 0
	err := v.Records(q.Lo, q.Hi, func(k, val []byte) (bool, error) {
		size += len(k) + len(val) + 8
		if len(r.Records) > 0 && (size > healReply || len(r.Records) == 1<<16) {
			r.End = bytes.Clone(k)
			return false, nil
		}
		r.Records = append(r.Records, healRecord{bytes.Clone(k), bytes.Clone(val)})
		return true, nil
	})
	return r, err
}

// read reads committed contents of a file, from the start of a block on; n is nil if
// it is gone. Blocks that have rotted are found: what is given away here is believed.
func (s *Source) read(ctx context.Context, ino fsop.Ino, off uint64, size uint32) (p []byte, n *meta.Inode, err error) {
	if _, err := s.h.b.checkBlock(ino, off/sumSize); err != nil {
		if s.h.b.lost(err) {
			return nil, nil, fsop.EIO
		}
		return nil, nil, s.h.b.failWith(err)
	}
	return s.h.b.readCommitted(ctx, ino, off, size)
}

// readCommitted reads committed contents of a file; n is nil if it is gone.
func (b *Brick) readCommitted(ctx context.Context, ino fsop.Ino, off uint64, size uint32) (p []byte, n *meta.Inode, err error) {
	for {
		if err := ctx.Err(); err != nil {
			return nil, nil, context.Cause(ctx)
		}
		before, err := b.regular(ino)
		if before == nil || err != nil {
			return nil, nil, err
		}
		if err := b.waitCommitted(ctx, before.Content.Seq); err != nil {
			return nil, nil, err
		}
		r, _, err := b.Read(ctx, &fsop.Read{Ino: ino, Off: off, Len: size})
		if errors.Is(err, fsop.ESTALE) {
			return nil, nil, nil
		}
		if err != nil {
			return nil, nil, err
		}
		after, err := b.regular(ino)
		if err != nil {
			return nil, nil, err
		}
		if after != nil && after.Content == before.Content {
			return r.Data, after, nil
		}
	}
}

// regular returns a regular file's inode as it is now, nil if there is none.
func (b *Brick) regular(ino fsop.Ino) (*meta.Inode, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.closed.Load() {
		return nil, ErrClosed
	}
	n, err := b.inode(ino)
	if errors.Is(err, fsop.ESTALE) {
		return nil, nil
	}
	if err != nil || !n.IsRegular() {
		return nil, err
	}
	return &n.Inode, nil
}

func (s *Source) contents(ctx context.Context, q *healRequest) (*contentsReply, error) {
	r := &contentsReply{}
	size := 0
	for _, ino := range q.Inos {
		p, n, err := s.read(ctx, ino, 0, smallFile)
		if err != nil {
			return nil, err
		}
		if n == nil {
			p = nil
		}
		if size += len(p) + 4; len(r.Files) > 0 && size > healReply {
			break
		}
		r.Files = append(r.Files, p)
	}
	return r, nil
}

func (s *Source) blockSums(ctx context.Context, q *healRequest) (*blockSumsReply, error) {
	r := &blockSumsReply{}
	count := min(q.Count, maxBlocks)
	for i := q.First; i < q.First+uint64(count); i++ {
		if i >= fsop.MaxSize/healBlock {
			break
		}
		p, n, err := s.read(ctx, q.Ino, i*healBlock, healBlock)
		if err != nil {
			return nil, err
		}
		if n == nil {
			return &blockSumsReply{}, nil
		}
		r.Size = n.Size
		if len(p) == 0 {
			break
		}
		r.Sums = append(r.Sums, sumBlock(q.Seed, p))
	}
	return r, nil
}

// sumBlock returns the sum of a block, zeroSum if it is all zeros.
func sumBlock(seed uint64, p []byte) uint64 {
	if allZero(p) {
		return zeroSum
	}
	d := xxhash.Digest{}
	d.ResetWithSeed(seed)
	d.Write(p)
	if s := d.Sum64(); s != zeroSum {
		return s
	}
	return 1
}

func allZero(p []byte) bool {
	for len(p) > 0 && p[0] == 0 {
		n := min(len(p), len(zeros))
		if !bytes.Equal(p[:n], zeros[:n]) {
			return false
		}
		p = p[n:]
	}
	return len(p) == 0
}

var zeros [4096]byte

func (s *Source) blocks(ctx context.Context, q *healRequest) (*blocksReply, error) {
	r := &blocksReply{}
	size := 0
	for _, i := range q.Blocks {
		if i >= fsop.MaxSize/healBlock {
			return nil, fmt.Errorf("%w: block %d", codec.ErrMalformed, i)
		}
		p, _, err := s.read(ctx, q.Ino, i*healBlock, healBlock)
		if err != nil {
			return nil, err
		}
		if size += len(p) + 4; len(r.Blocks) > 0 && size > healReply {
			break
		}
		r.Blocks = append(r.Blocks, p)
	}
	return r, nil
}
