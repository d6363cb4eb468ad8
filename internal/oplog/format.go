package oplog

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"

	"mortar/internal/cluster"
	"mortar/internal/disk"
)

// The numbers of the format. doc.go has the picture.
const (
	magic        = "MORTLOG1" // the last byte is the version of the format
	segmentFixed = 64         // bytes of a segment header before the history
	maxHistory   = 1 << 16    // epochs in one segment header

	recordMagic  = 0x526d // "mR"
	recordHeader = 40     // bytes
	recordAlign  = 8      // records start on multiples of it
)

// MaxPayload is the largest payload of a record, in bytes.
const MaxPayload = 4 << 20

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var le = binary.LittleEndian

// segmentHeader opens every segment file. It is written and synced before the
// file gets its name, and never changes.
type segmentHeader struct {
	num  uint64 // the segment's number, as in its name
	prev uint64 // the number of the segment that this one continues; 0: it starts the log
	salt uint64 // random, mixed into the checksum of every record: what an earlier use of the same blocks left there is never valid here
	base cluster.Pos
	// history has the first position of each epoch, from base's own on, oldest
	// first. It is empty only if base is zero.
	history []cluster.Pos

	seed uint32 // of the checksums of records, from num and salt
}

func (h *segmentHeader) setSeed() {
	var b [16]byte
	le.PutUint64(b[0:], h.num)
	le.PutUint64(b[8:], h.salt)
	h.seed = crc32.Checksum(b[:], castagnoli)
}

// size is where the first record goes: the header is padded to whole blocks.
func (h *segmentHeader) size() int64 {
	return roundUp(segmentFixed+16*int64(len(h.history)), disk.BlockSize)
}

// encode returns the header as it is written.
func (h *segmentHeader) encode() []byte {
	b := make([]byte, h.size())
	copy(b, magic)
	le.PutUint32(b[12:], uint32(len(b)))
	le.PutUint64(b[16:], h.num)
	le.PutUint64(b[24:], h.prev)
	le.PutUint64(b[32:], h.salt)
	le.PutUint64(b[40:], uint64(h.base.Epoch))
	le.PutUint64(b[48:], h.base.Seq)
	le.PutUint32(b[56:], uint32(len(h.history)))
	for i, p := range h.history {
		le.PutUint64(b[segmentFixed+16*i:], uint64(p.Epoch))
		le.PutUint64(b[segmentFixed+16*i+8:], p.Seq)
	}
	le.PutUint32(b[8:], crc32.Checksum(b[12:], castagnoli))
	return b
}

// headerSize reads from the first block of a segment how long its header is. It
// returns a reason if that block cannot be the start of one.
func headerSize(block []byte) (size int64, reason string) {
	switch {
	case len(block) < disk.BlockSize:
		return 0, "the file is shorter than a segment header"
	case string(block[:7]) != magic[:7]:
		return 0, "no segment header"
	case block[7] != magic[7]:
		return 0, fmt.Sprintf("segment format %q, this program knows %q: it was written by another version of mortar", block[7], magic[7])
	}
	size = int64(le.Uint32(block[12:]))
	n := int64(le.Uint32(block[56:]))
	if n > maxHistory || size != roundUp(segmentFixed+16*n, disk.BlockSize) {
		return 0, "the length of the segment header is wrong"
	}
	return size, ""
}

// decode reads the header from b, which has as many bytes as headerSize said.
func (h *segmentHeader) decode(b []byte) (reason string) {
	if crc32.Checksum(b[12:], castagnoli) != le.Uint32(b[8:]) {
		return "the checksum of the segment header is wrong"
	}
	h.num = le.Uint64(b[16:])
	h.prev = le.Uint64(b[24:])
	h.salt = le.Uint64(b[32:])
	h.base = cluster.Pos{Epoch: cluster.Epoch(le.Uint64(b[40:])), Seq: le.Uint64(b[48:])}
	h.setSeed()
	h.history = nil
	for i := range int(le.Uint32(b[56:])) {
		h.history = append(h.history, cluster.Pos{
			Epoch: cluster.Epoch(le.Uint64(b[segmentFixed+16*i:])),
			Seq:   le.Uint64(b[segmentFixed+16*i+8:]),
		})
	}
	if err := checkHistory(h.base, h.history); err != nil {
		return err.Error()
	}
	return ""
}

// checkHistory refuses a history that cannot belong to a log that ends at base.
func checkHistory(base cluster.Pos, history []cluster.Pos) error {
	if base == (cluster.Pos{}) && len(history) == 0 {
		return nil
	}
	if len(history) == 0 || len(history) > maxHistory {
		return fmt.Errorf("a history of %d epochs for a log that ends at %v", len(history), base)
	}
	for i, p := range history {
		if p.Epoch == 0 || p.Seq > base.Seq || i > 0 && (p.Epoch <= history[i-1].Epoch || p.Seq <= history[i-1].Seq) {
			return fmt.Errorf("history %v of a log that ends at %v is not in order", history, base)
		}
	}
	if last := history[len(history)-1]; last.Epoch != base.Epoch {
		return fmt.Errorf("history ends with epoch %d, the log with %v", last.Epoch, base)
	}
	return nil
}

// record is a record's header.
type record struct {
	pos     cluster.Pos
	durable uint64 // the highest sequence that was synced when the record was made
	length  uint32 // of the payload
	pad     uint16 // bytes between header and payload
	sum     uint32 // CRC-32C of the payload
}

// payload returns where the payload lies if the header lies at off.
func (r *record) payload(off int64) int64 { return off + recordHeader + int64(r.pad) }

// end returns where the next record starts.
func (r *record) end(off int64) int64 {
	return roundUp(r.payload(off)+int64(r.length), recordAlign)
}

// put writes the header into b. Its checksum covers where it is: the same bytes
// are valid nowhere else.
func (r *record) put(b []byte, h *segmentHeader, off int64) {
	le.PutUint16(b[0:], recordMagic)
	le.PutUint16(b[2:], r.pad)
	le.PutUint32(b[8:], r.sum)
	le.PutUint32(b[12:], r.length)
	le.PutUint64(b[16:], r.pos.Seq)
	le.PutUint64(b[24:], uint64(r.pos.Epoch))
	le.PutUint64(b[32:], r.durable)
	le.PutUint32(b[4:], recordSum(b, h, off))
}

// get reads the header from b and reports whether it is one that was written to
// this place of this segment.
func (r *record) get(b []byte, h *segmentHeader, off int64) bool {
	if len(b) < recordHeader || le.Uint16(b) != recordMagic || recordSum(b, h, off) != le.Uint32(b[4:]) {
		return false
	}
	*r = record{
		pos:     cluster.Pos{Epoch: cluster.Epoch(le.Uint64(b[24:])), Seq: le.Uint64(b[16:])},
		durable: le.Uint64(b[32:]),
		length:  le.Uint32(b[12:]),
		pad:     le.Uint16(b[2:]),
		sum:     le.Uint32(b[8:]),
	}
	return r.length <= MaxPayload && r.pad < disk.BlockSize
}

// recordSum computes the checksum that belongs into b[4:8]: of the other bytes
// of the header, with the offset in the sum's own place, from a seed that only
// this segment has. It leaves b as it was.
func recordSum(b []byte, h *segmentHeader, off int64) uint32 {
	was := le.Uint32(b[4:])
	le.PutUint32(b[4:], uint32(off))
	sum := crc32.Update(h.seed, castagnoli, b[:recordHeader])
	le.PutUint32(b[4:], was)
	return sum
}

func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

const suffix = ".log"

func segmentName(num uint64) string { return fmt.Sprintf("%016x", num) + suffix }

// parseSegmentName returns 0 for names that are not of a segment.
func parseSegmentName(name string) uint64 {
	hex, ok := strings.CutSuffix(name, suffix)
	if !ok || len(hex) != 16 {
		return 0
	}
	num, err := strconv.ParseUint(hex, 16, 64)
	if err != nil || segmentName(num) != name {
		return 0
	}
	return num
}
