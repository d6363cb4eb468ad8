package meta

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/cespare/xxhash/v2"

	"mortar/internal/cluster"
	"mortar/internal/fsop"
)

// Checksums of the blocks of data files. They are this brick's own, and are of what
// a data file has, not of what the file reads as: extents lie above both. The key has
// the data file's incarnation, which is never used for another file, and a block is
// changed only after it is durable that it has no checksum any more (see brick,
// sums.go). So a checksum that is found is of this block as it was last written.
const (
	// SumBlock is how many bytes of a data file are under one checksum.
	SumBlock = 128 << 10
	// SumChunk is how many checksums share a record.
	SumChunk = 32
)

// SumOf is the checksum of a block: the xxHash-64 of its bytes less the zeros at
// their end. So it does not matter whether zeros are in the file or behind its end.
func SumOf(p []byte) uint64 {
	for len(p) >= 8 && binary.LittleEndian.Uint64(p[len(p)-8:]) == 0 {
		p = p[:len(p)-8]
	}
	for len(p) > 0 && p[len(p)-1] == 0 {
		p = p[:len(p)-1]
	}
	return xxhash.Sum64(p)
}

// Sums are the checksums of SumChunk blocks of a data file, as far as they have been made.
type Sums struct {
	// Made is the inode's Content when the last of them was made. One that the inode
	// has not reached says that the record is of another history.
	Made cluster.Pos
	Has  uint32 // a bit for each block
	Sum  [SumChunk]uint64
}

const sumsHead = 1 + 8 + 8 + 4

func (s *Sums) encode(v []byte) {
	le := binary.LittleEndian
	v[0] = version
	le.PutUint64(v[1:], uint64(s.Made.Epoch))
	le.PutUint64(v[9:], s.Made.Seq)
	le.PutUint32(v[17:], s.Has)
	v = v[sumsHead:]
	for i := range s.Sum {
		if s.Has>>i&1 != 0 {
			le.PutUint64(v, s.Sum[i])
			v = v[8:]
		}
	}
}

func getSums(v []byte, s *Sums) error {
	if err := check(v, "checksums", -1); err != nil {
		return err
	}
	le := binary.LittleEndian
	if len(v) >= sumsHead {
		s.Made = cluster.Pos{Epoch: cluster.Epoch(le.Uint64(v[1:])), Seq: le.Uint64(v[9:])}
		s.Has = le.Uint32(v[17:])
		if s.Has != 0 && len(v) == sumsHead+8*bits.OnesCount32(s.Has) {
			v = v[sumsHead:]
			for i := range s.Sum {
				if s.Sum[i] = 0; s.Has>>i&1 != 0 {
					s.Sum[i], v = le.Uint64(v), v[8:]
				}
			}
			return nil
		}
	}
	return fmt.Errorf("%w: checksums of %d bytes", ErrFormat, len(v))
}

// A Rotten block of a data file is one of which the file has other bytes than were
// once written, or none that can be read.
type Rotten struct {
	// Sum is the checksum of what it should be, if Known.
	Sum   uint64
	Known bool
	Found int64 // when, ns since 1970
}

const rottenLen = 1 + 1 + 8 + 8

func getRotten(k, v []byte, ino *fsop.Ino, inc, block *uint64, r *Rotten) error {
	if err := check(v, "rotten block", rottenLen); err != nil {
		return err
	}
	if len(k) != 25 || v[1] > 1 {
		return fmt.Errorf("%w: key %x of a rotten block, %x", ErrFormat, k, v)
	}
	*ino, *inc, *block = keyIno(k), binary.BigEndian.Uint64(k[9:]), binary.BigEndian.Uint64(k[17:])
	*r = Rotten{Known: v[1] == 1, Sum: binary.LittleEndian.Uint64(v[2:]), Found: int64(binary.LittleEndian.Uint64(v[10:]))}
	return nil
}

// ScrubState is how far a brick has come with going over its data files.
type ScrubState struct {
	Running bool
	Next    fsop.Ino // the first inode that is still to be looked at
	Block   uint64   // and the first of its blocks
	Began   int64    // the round that runs or was the last, ns since 1970; 0: none yet
	Ended   int64    // the last round that ended; 0: none yet
	// Of that round: blocks with a checksum, those that got one, and what was wrong.
	Bytes, Checked, Made, Bad uint64
	// Of all rounds.
	Found, Repaired uint64
}

const scrubLen = 1 + 1 + 10*8

func getScrub(v []byte, s *ScrubState) error {
	if err := check(v, "scrub", scrubLen); err != nil {
		return err
	}
	if v[1] > 1 {
		return fmt.Errorf("%w: scrub %x", ErrFormat, v)
	}
	s.Running = v[1] == 1
	next := uint64(s.Next)
	began, ended := uint64(s.Began), uint64(s.Ended)
	for i, p := range []*uint64{&next, &s.Block, &began, &ended, &s.Bytes, &s.Checked, &s.Made, &s.Bad, &s.Found, &s.Repaired} {
		*p = binary.LittleEndian.Uint64(v[2+8*i:])
	}
	s.Next, s.Began, s.Ended = fsop.Ino(next), int64(began), int64(ended)
	return nil
}

func key3(table byte, a, b, c uint64) []byte {
	return binary.BigEndian.AppendUint64(key2(table, a, b), c)
}

// Sums reads the checksums of a chunk; Has is 0 if there are none.
func (v View) Sums(ino fsop.Ino, incarnation, chunk uint64) (s Sums, err error) {
	val, c, err := v.get(key3(tableSums, uint64(ino), incarnation, chunk))
	if val == nil || err != nil {
		return s, err
	}
	defer c.Close()
	return s, getSums(val, &s)
}

// SumChunks calls fn for the chunks of a data file that have checksums, from one on.
func (v View) SumChunks(ino fsop.Ino, incarnation, from uint64, fn func(chunk uint64, s *Sums) (bool, error)) error {
	return v.scan(key3(tableSums, uint64(ino), incarnation, from), after2(tableSums, uint64(ino), incarnation), func(k, val []byte) (bool, error) {
		var s Sums
		if err := getSums(val, &s); err != nil {
			return false, err
		}
		if len(k) != 25 {
			return false, fmt.Errorf("%w: key %x of checksums", ErrFormat, k)
		}
		return fn(binary.BigEndian.Uint64(k[17:]), &s)
	})
}

// Rotten calls fn for all blocks that are known to be rotten.
func (v View) Rotten(fn func(ino fsop.Ino, incarnation, block uint64, r Rotten) error) error {
	return v.scan([]byte{tableRotten}, []byte{tableRotten + 1}, func(k, val []byte) (bool, error) {
		var ino fsop.Ino
		var inc, block uint64
		var r Rotten
		if err := getRotten(k, val, &ino, &inc, &block, &r); err != nil {
			return false, err
		}
		return true, fn(ino, inc, block, r)
	})
}

// Scrub reads how far scrubbing has come.
func (v View) Scrub() (s ScrubState, err error) {
	val, c, err := v.get([]byte{tableScrub})
	if val == nil || err != nil {
		return s, err
	}
	defer c.Close()
	return s, getScrub(val, &s)
}

// SetSums writes the checksums of a chunk.
func (b *Batch) SetSums(ino fsop.Ino, incarnation, chunk uint64, s *Sums) {
	key := key3(tableSums, uint64(ino), incarnation, chunk)
	if s.Has == 0 {
		b.b.Delete(key, nil)
		return
	}
	k, v := b.set(len(key), sumsHead+8*bits.OnesCount32(s.Has))
	copy(k, key)
	s.encode(v)
}

// DropSums forgets all checksums and rotten blocks of a data file, of which v knows.
func (b *Batch) DropSums(v View, ino fsop.Ino, incarnation uint64) error {
	for _, table := range []byte{tableSums, tableRotten} {
		err := v.scan(key2(table, uint64(ino), incarnation), after2(table, uint64(ino), incarnation), func(k, _ []byte) (bool, error) {
			b.b.Delete(k, nil)
			return true, nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// SetRotten notes a rotten block.
func (b *Batch) SetRotten(ino fsop.Ino, incarnation, block uint64, r Rotten) {
	key := key3(tableRotten, uint64(ino), incarnation, block)
	k, v := b.set(len(key), rottenLen)
	copy(k, key)
	v[0], v[1] = version, 0
	if r.Known {
		v[1] = 1
	}
	binary.LittleEndian.PutUint64(v[2:], r.Sum)
	binary.LittleEndian.PutUint64(v[10:], uint64(r.Found))
}

// DeleteRotten takes the note back.
func (b *Batch) DeleteRotten(ino fsop.Ino, incarnation, block uint64) {
	b.b.Delete(key3(tableRotten, uint64(ino), incarnation, block), nil)
}

// SetScrub writes how far scrubbing has come.
func (b *Batch) SetScrub(s *ScrubState) {
	k, v := b.set(1, scrubLen)
	k[0] = tableScrub
	v[0], v[1] = version, 0
	if s.Running {
		v[1] = 1
	}
	for i, n := range []uint64{uint64(s.Next), s.Block, uint64(s.Began), uint64(s.Ended), s.Bytes, s.Checked, s.Made, s.Bad, s.Found, s.Repaired} {
		binary.LittleEndian.PutUint64(v[2+8*i:], n)
	}
}
