// Package oplog is a brick's op log: the one place where every change is
// written first, in the order of its position. What is in it and synced
// survives anything but the loss of the disk; all else that a brick keeps can
// be made from it again.
//
// A log is a chain of segment files. A segment is a header, which says after
// which position it goes on, and records; a record is a header and a payload,
// which this package does not look into.
//
//	<dir>/0000000000000001.log                          64 MiB, more if one record is larger
//	+----------------+--------+-----+---------+---+--------+---------+---+---------- - - --+
//	| segment header | record | pad | payload | a | record | payload | a |  zeros          |
//	| n x 4 KiB      | header |     |         |   | header |         |   |                 |
//	+----------------+--------+-----+---------+---+--------+---------+---+---------- - - --+
//	                 ^ multiple of 8    ^ its end or its   ^ the next multiple of 8
//	                                      aligned tail on
//	                                      a multiple of 4 KiB
//
// All integers are little-endian; checksums are CRC-32C.
//
//	segment header                              record header
//	 0  8  "MORTLOG" and the version, '1'        0  2  0x526d, "mR"
//	 8  4  checksum of bytes 12 to the end       2  2  bytes of pad
//	12  4  length, a multiple of 4096            4  4  checksum of the other 36 bytes, the
//	16  8  number, as in the file's name               segment's number and salt, and the offset
//	24  8  number of the segment continued       8  4  checksum of the payload
//	32  8  salt, random                         12  4  length of the payload, at most 4 MiB
//	40 16  base: epoch and sequence             16  8  sequence
//	56  4  epochs in the history, n             24  8  epoch
//	64 16n history: epoch, first sequence       32  8  sequence that was durable when this was made
//
// # Where a log ends
//
// Records follow each other with sequences that grow by one and epochs that do
// not fall. The log ends before the first place of the last segment that has no
// such record. What may be found behind that place decides what it is:
//
//   - No record header: the end.
//   - Record headers, none of which says that the place was durable: a torn
//     tail. The disk kept later writes and lost earlier ones, as it may with
//     what was not synced. Nothing there was ever acknowledged as durable.
//   - A record header which says that a sequence at or behind the place was
//     durable: corruption. The brick is refused, and healed from another one.
//
// Only the last segment can be torn: the next one gets its name when all of it is
// synced. The other segments end with the base of their successor, and whatever
// follows there means nothing.
//
// A segment takes records before it has its name, lest whoever appends wait for a
// disk that is slow: it is next.tmp then. No record in it counts as durable, and no
// third one is begun. A process that is killed leaves all of it, and Open names it;
// without power, it is forgotten if what it goes on from is not complete.
//
// Old bytes are never taken for records. A record's checksum covers where it
// lies, and a salt that is new for every segment, so neither what a former file
// left in the same blocks nor a copy of a log inside a payload is valid.
//
// # How a log is undone
//
// TruncateAfter, Reset and the cutting of a torn tail overwrite nothing. They
// write a new segment that continues segment s after position p:
//
//	3: base 1.200 <-- 4: base 1.310 <-- 5: base 2.417
//	                       ^
//	                       +----------- 6: base 2.350, continues 4
//
// The log is the chain from the segment with the highest number back: 3, 4 up
// to sequence 350, 6. Segment 5 and the rest of 4 are void from the moment that 6
// has its name, and are then removed. A segment gets its name, by rename, when
// its header is synced, so each of these is done or not done. Reset writes a
// segment that continues none.
//
// # When a crash can come, and what it leaves
//
//	while records are written       a torn tail, or a prefix of them
//	while a segment is prepared     next.tmp without a header, which is removed
//	between header and rename       next.tmp, which is named, or removed if the segment before it is torn
//	after the rename                an empty segment, or void ones, which are removed
//	while segments are trimmed      some of those to be trimmed: the log begins earlier
//
// A failed write or sync poisons the log for good, since after it the kernel's
// memory and the disk may differ (what is called dirty can be marked clean
// without having been written). Open therefore syncs, drops what the kernel
// remembers of the last segment and reads it from the disk.
//
// # How fast it is
//
// Append copies a record into a buffer; one write call hands all that was
// buffered to the kernel, one fdatasync serves all who wait. Files are
// preallocated, and written with zeros a little ahead of the records, so that an
// fdatasync has no metadata to write: doc/decisions/0012-log-preallocation.md
// has the figures.
package oplog
