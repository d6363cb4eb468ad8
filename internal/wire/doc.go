// Package wire moves messages between two mortar processes over one byte
// stream: a unix socket, TCP, or TLS. It knows frames, requests and their
// replies, and bounds; it does not know what a kind means (package proto does).
//
// # Frames
//
// A connection begins with one hello from each side, sent without waiting for
// the other's:
//
//	 0            8         10        12            16            20          24
//	+------------+---------+---------+-------------+-------------+-----------+
//	| "mortar\r\n" version |  flags  |  max calls  | max bytes   | max body  |
//	+------------+---------+---------+-------------+-------------+-----------+
//
// Then come frames, in both directions and independently of each other:
//
//	 0         4         8                 16     17      18       20
//	+---------+---------+-----------------+------+-------+--------+----------
//	| length  | crc32c  |   request id    | kind | flags |   0    | body ...
//	+---------+---------+-----------------+------+-------+--------+----------
//
// Integers are little-endian. length counts the body alone. crc32c (Castagnoli)
// is over header, with the field itself zero, and body; it is there only if both
// hellos said so, which they do on a stream with no integrity of its own (TCP in
// the clear), and zero elsewhere. A request id is chosen by whoever calls and is
// unique on the connection in that direction; 0 marks a one-way message. Flag 1
// marks a reply, flag 2 withdraws a call. Everything else is a bad frame: the
// connection ends with a logged reason, and nothing of the frame is believed.
//
// # Order and bounds
//
// Frames arrive in the order in which they were queued. The read loop hands
// each to the Handler before it looks at the next one. max calls and max bytes of
// a hello say how many unanswered calls, and how many bytes in their bodies, the
// sender of the hello puts up with; Call waits for its turn. What is queued for
// the network is bounded by Options.MaxQueue.
//
// # Who writes
//
// Messages are put into one buffer under a lock. Whoever finds nobody writing
// takes the whole buffer and writes it, without waiting if the socket is full:
// so a Call or Reply on a quiet connection costs one system call and no switch
// of goroutines, and on a busy one it joins the next write. What the socket did
// not take, and what Send queued, is the writer goroutine's. Over TLS the
// records of one such write are collected and leave in one system call, too.
package wire
