// Package mount puts a fsop.Handler under the kernel: a FUSE mount.
//
// Everything that is peculiar to FUSE and Linux is here and nowhere else: what
// the kernel asks and when, what it may keep, how it is made to forget, which
// error numbers mean what to it. The handler sees operations on inodes, and
// tells what others changed by calling Invalidate.
//
// # What may be cached
//
// The kernel may use names (absent ones too), attributes and pages for
// Options.CacheTimeout without asking. When Invalidate(seq, effects) has returned,
// no system call that begins later may see what the effects made untrue. What
// can go wrong is time: a reply that was made before the change may still be on
// its way, in the handler, in this package, written to /dev/fuse, or read by
// nobody yet but the thread that asked and has not run since.
//
// Attributes. INVAL_INODE takes no lock that a request could hold. The kernel
// numbers its inodes' attributes (fi->attr_version): a reply whose request began
// before an INVAL_INODE of that inode is ignored. That leaves three holes.
//
//  1. The kernel does not have the inode: a reply that introduces it is on its
//     way. Invalidate first notes seq at the inode (nodes.invalidated), then
//     notifies. A reply is counted (nodes.named) and compared with the noted seq in
//     one step, before it is written. So either the note came first, and an
//     older reply gets no time-out; or the count came first, and Invalidate knows
//     that the kernel is about to have the inode: on ENOENT it tries again until
//     the inode is there, or forgotten (Mount.invalAttr).
//  2. Replies to SETATTR, CREATE, MKNOD, MKDIR, SYMLINK and LINK are applied
//     whatever their number. Those about an inode that the kernel has get no
//     time-out for attributes: its next question is answered from what they
//     said (nodes.changed), if nothing came in between. A new inode is like any
//     that is introduced (hole 1). Nobody can have introduced it under another
//     name meanwhile: the change that made that name is not committed, and not
//     read by anybody, before the Invalidate here that it causes has returned,
//     and that waits until the kernel has the inode.
//  3. When the answer to the question before a read(2) is ignored, because
//     another change came or a write of the same file ended meanwhile, the kernel
//     reads the pages it has, up to the size that it has. The pages are gone: Invalidate drops those that nobody
//     has locked before it returns, the others are dropped in the background, and
//     that question is not answered before (GetAttr). The size is made right before
//     that question is answered, by having the kernel ask a second one (sizes).
//
// Pages. AUTO_INVAL_DATA has the kernel ask for attributes, once they were
// invalidated, before it uses a page, and drop all pages if size or modification
// time is another; times grow strictly from change to change. A page is in
// the kernel's mapping, locked, before its READ is sent, so a READ overtaken by a
// change is dropped by that, too.
//
// What this mount's own writes past the pages (O_DIRECT) spoil the kernel drops itself, but for
// pages that are read while an asynchronous one is under way: the mount has it do that, before
// it answers (Mount.wroteAround).
//
// Names. INVAL_ENTRY waits for the directory's lock, which a LOOKUP of an unknown
// name, a READDIRPLUS and every change in the directory hold until the kernel has
// digested the reply; so it comes after replies that were made before. A LOOKUP
// that only renews a known name holds no lock, but INVAL_ENTRY unhashes what it
// would renew. INC_EPOCH (Linux 6.16) takes no lock, and the kernel compares the
// epoch at which a request began; but see below of what is mounted inside. Most names were never asked for here, and
// need neither (givenNames): a reply adds the name to the set, then compares seq;
// Invalidate notes seq, then looks into the set; so one of them sees the other.
//
// Besides, a reply older than the last change of its directory lets no name be
// cached, whatever the kernel would make of it.
//
// DropAll is the same for everything at once: dropGen is the seq.
//
// # What is known here
//
// The kernel asks for more than it would have to: for the target of every rename,
// for every name that it is to make, for attributes after it has read a file. As
// long as the lease holds, and nothing was invalidated, the mount answers from
// what it was told: names, absent ones too, from entries, attributes from
// nodes.told. What its own changes leave is told by their replies. A directory that
// this mount made, and that nobody else has changed, has no names but those made
// here, so it is also known what it has not.
//
// That is as coherent as the kernel's caches, and by the same argument. A reply is
// compared with the noted seq and remembered in one step; Invalidate notes seq and
// forgets in one step, before it looks what the kernel was given; and an answer
// from memory counts as given (givenNames, nodes.again) before it is looked for a
// second time. A change of this mount that is in flight may have been carried out,
// and seen, so meanwhile the replica is asked; one that was answered before it is
// carried out takes away what was remembered, and lets no attributes be remembered,
// here or by the kernel, that were asked for before it was answered (told.unknown).
// When it has been carried out its position is noted like that of any change (Changed).
//
// # Waiting in rings
//
// A change is acknowledged when all mounts have forgotten what it made untrue. A
// mount where a request holds the directory's lock cannot forget the name yet,
// and that request may wait, through another mount, for this very change. So
// Invalidate does not wait for locks: at once if a change in that directory is
// known to be in flight here, else after 3 ms, it increments the epoch. Where
// that must not be, and on older kernels, it has the kernel drop all names that are
// not in use, by reconfiguring the file system (device.shrink), which needs no lock either.
// Pages under READ and WRITE are never waited for.
//
// # What is mounted inside
//
// When the kernel finds a name untrue it detaches everything that is mounted on it
// or below, in every mount namespace. What is written there afterwards lands in the
// volume. For a name that another machine moved or removed that is so with every file system;
// but a kernel whose epoch was incremented finds all names untrue, when they are used next. So
// the epoch is incremented only if certainly nothing is mounted inside (Mount.epochs,
// mountinfo.Nested). Nor is it if a directory is mounted besides what is above it: in there something can be
// mounted by whoever never passes the names above, which would be of an older epoch.
//
// Names that may still lead to what they led to, a file's with another owner and all of them in
// DropAll, are then not taken back but expire: the kernel looks them up before it
// uses them, and detaches nothing if it finds what it has. A LOOKUP that renews a name
// holds no lock, and could make it count again whose answer was on its way. If the mount
// gives that answer later, it lets nothing be kept that was overtaken (Mount.found); if it has given
// it within the last 3 ms, the thread that asked is given the rest of them
// first (Mount.digested).
//
// # Locks and shared mappings
//
// Programs that store through a shared mapping under a lock expect of the file system
// what the page cache of one machine gives them: that the next one who has the lock
// sees it. The kernel tells the mount of neither mapping nor store, and writes the
// page when it likes. So before a lock is given up that may have guarded
// stores (one that nobody shares, of a file that was opened for reading and writing), the mount has
// the kernel write what is dirty (Mount.writeOut); and whoever gets a lock is answered
// after the pages are gone that others' changes have spoilt. Nothing is dropped for it. Such an
// unlock costs a question to another process, mostly lost in what else differs from run to
// run, 0.2 ms in one: guessing which files are mapped would save that, and a guess is wrong the first time.
//
// # Lifetimes
//
// Replies that name an inode are counted, like the kernel and the replica count
// them (proto.Hold); Forgotten and Holds tell. The replica does not count what
// was answered from memory (node.here), and is not told when that is forgotten. An entry of a listing that was
// fetched ahead and never asked for counts as forgotten.
package mount
