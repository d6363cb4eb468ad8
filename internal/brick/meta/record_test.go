package meta

import (
	"bytes"
	"errors"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/fsop"
)

func inodeAgain(k, v []byte) ([]byte, error) {
	var n Inode
	err := getInode(v, keyIno(k), &n)
	out := make([]byte, inodeSize(&n))
	putInode(out, &n)
	return out, err
}

// codings has every kind of value: how it is read from a key and bytes, and
// written again. The seeds are one good value each.
var codings = []struct {
	name string
	key  []byte
	good func() []byte
	// again decodes v and encodes what it found.
	again func(k, v []byte) ([]byte, error)
}{
	{"inode", key1(tableInode, 5), func() []byte {
		v := make([]byte, inodeLen)
		putInode(v, &Inode{
			Attr: fsop.Attr{
				Ino: 5, Mode: 0o100644, Nlink: 2, UID: 3, GID: 4, Rdev: 5, Size: 6, Blocks: 8,
				Atime: -1, Mtime: 2, Ctime: 3, Change: 9, Window: 7,
			},
			Parent: 1, Content: cluster.Pos{Epoch: 2, Seq: 9}, Xattrs: 1, XattrNames: 7, Flags: Caps, WindowSince: 4,
		})
		return v
	}, inodeAgain},
	{"inode of a subvolume", key1(tableInode, 5), func() []byte {
		v := make([]byte, inodeSubvolLen)
		putInode(v, &Inode{Attr: fsop.Attr{Ino: 5, Mode: 0o100644, Size: 6}, Subvolume: 4})
		return v
	}, inodeAgain},
	{"subvolume", key1(tableSubvol, 5), func() []byte {
		v := make([]byte, subvolLen)
		putSubvolume(v, &Subvolume{Size: 1, Inodes: 2, UsedSize: 3, UsedInodes: 4, Made: 5, Used: 6, Token: 7, Removed: true})
		return v
	}, func(k, v []byte) ([]byte, error) {
		var s Subvolume
		err := getSubvolume(k, v, &s)
		out := make([]byte, subvolLen)
		putSubvolume(out, &s)
		return out, err
	}},
	{"dentry", dentryKey(1, 77, "name"), func() []byte {
		v := make([]byte, dentryLen)
		putDentry(v, &Dentry{Ino: 7, Type: 0o100000})
		return v
	}, func(_, v []byte) ([]byte, error) {
		var d Dentry
		err := getDentry(v, &d)
		out := make([]byte, dentryLen)
		putDentry(out, &d)
		return out, err
	}},
	{"state", stateKey, func() []byte {
		return EncodeState(&State{Pos: cluster.Pos{Epoch: 1, Seq: 2}, Time: 3, NextIno: 4, Inodes: 5, Blocks: 6})
	}, func(_, v []byte) ([]byte, error) {
		var s State
		err := DecodeState(v, &s)
		return EncodeState(&s), err
	}},
	{"lock", lockKey(&Lock{Ino: 5, Session: 6, Lock: fsop.Lock{Owner: 7, Start: 8}}), func() []byte {
		v := make([]byte, lockLen)
		putLock(v, &Lock{Lock: fsop.Lock{Type: fsop.LockWrite, Start: 8, End: 9, PID: 10}})
		return v
	}, func(k, v []byte) ([]byte, error) {
		var l Lock
		err := getLock(k, v, &l)
		out := make([]byte, lockLen)
		putLock(out, &l)
		return out, err
	}},
	{"session", key1(tableSession, 5), func() []byte {
		return codec.Append(nil, &Session{Client: "host:/mnt", Opened: 5, Reserved: []Reserved{{First: 9, Used: [4]uint64{1, 2, 3, 4}}}})
	}, func(_, v []byte) ([]byte, error) {
		var s Session
		err := codec.Decode(v, &s)
		if err != nil {
			err = errors.Join(ErrFormat, err)
			return nil, err
		}
		return codec.Append(nil, &s), nil
	}},
	{"session with uses", key1(tableSession, 5), func() []byte {
		return codec.Append(nil, &Session{Client: "host:/mnt", Opened: 5, Uses: []fsop.Ino{3, 7}})
	}, nil},
	{"reply", key2(tableReply, 5, 6), func() []byte {
		return codec.Append(nil, &Reply{Acked: 4, Reply: fsop.Reply{Off: 5, Attr: fsop.Attr{Ino: 3}}})
	}, func(k, v []byte) ([]byte, error) {
		var r Reply
		if err := getReply(k, v, &r); err != nil {
			return nil, err
		}
		return codec.Append(nil, &r), nil
	}},
	{"base", key1(tableBase, 5), func() []byte {
		b := Base{Kind: BaseFile, Len: 100, Incarnation: 7}
		v := make([]byte, baseLen(&b))
		putBase(v, &b)
		return v
	}, func(_, v []byte) ([]byte, error) {
		var b Base
		if err := getBase(v, &b); err != nil {
			return nil, err
		}
		out := make([]byte, baseLen(&b))
		putBase(out, &b)
		return out, nil
	}},
	{"inline", key1(tableBase, 5), func() []byte {
		b := Base{Kind: BaseInline, Len: 3, Data: []byte("abc")}
		v := make([]byte, baseLen(&b))
		putBase(v, &b)
		return v
	}, nil},
	{"extent", key2(tableExtent, 5, 4096), func() []byte {
		v := make([]byte, extentLen)
		putExtent(v, &Extent{Off: 4096, Len: 5, Seq: 6, Segment: 7, LogOff: 8})
		return v
	}, func(k, v []byte) ([]byte, error) {
		var ino fsop.Ino
		var e Extent
		err := getExtent(k, v, &ino, &e)
		out := make([]byte, extentLen)
		putExtent(out, &e)
		return out, err
	}},
	{"run", key2(tableRun, 5, 6), func() []byte {
		v := make([]byte, runLen)
		putRun(v, Run{6, 9})
		return v
	}, func(k, v []byte) ([]byte, error) {
		var r Run
		err := getRun(k, v, &r)
		out := make([]byte, runLen)
		putRun(out, r)
		return out, err
	}},
}

// again decodes v as whatever k says it is, and encodes it.
func again(i int, k, v []byte) ([]byte, error) {
	if codings[i].again == nil {
		i-- // another form of the kind before it
	}
	return codings[i].again(k, v)
}

func TestValues(t *testing.T) {
	for i, c := range codings {
		v := c.good()
		got, err := again(i, c.key, v)
		if err != nil || !bytes.Equal(got, v) {
			t.Errorf("%s: %x, %v; want %x", c.name, got, err, v)
		}
		for name, bad := range map[string][]byte{
			"nothing": nil, "short": v[:len(v)-1], "other version": append([]byte{versionSubvol + 1}, v[1:]...),
		} {
			if name == "short" && c.name == "inline" {
				continue // contents are of any length
			}
			if _, err := again(i, c.key, bad); !errors.Is(err, ErrFormat) {
				t.Errorf("%s, %s: %v", c.name, name, err)
			}
		}
	}
}

// FuzzValues feeds anything to the decoders: they refuse it, or what they found
// is encoded to the same bytes.
func FuzzValues(f *testing.F) {
	for i, c := range codings {
		f.Add(byte(i), c.key, c.good())
	}
	f.Fuzz(func(t *testing.T, i byte, k, v []byte) {
		c := codings[int(i)%len(codings)]
		if len(k) != len(c.key) {
			k = c.key
		}
		got, err := again(int(i)%len(codings), k, v)
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Errorf("%s: %v", c.name, err)
			}
			return
		}
		if !bytes.Equal(got, v) {
			t.Errorf("%s: %x became %x", c.name, v, got)
		}
	})
}

// FuzzRecord feeds any record, as another brick might send it.
func FuzzRecord(f *testing.F) {
	for _, c := range codings {
		f.Add(c.key, c.good())
	}
	f.Add(xattrKey(5, "user.x"), []byte{version, 'v'})
	f.Add(key1(tableTarget, 5), []byte{version, 't'})
	f.Fuzz(func(t *testing.T, k, v []byte) {
		if err := CheckRecord(k, v); err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Error(err)
			}
			return
		}
		if !InReplicated(k, Replicated.Hi) {
			t.Errorf("key %q is let pass and is not replicated", k)
		}
		if _, _, err := RecordInode(k, v); err != nil {
			t.Error(err)
		}
	})
}

func TestHash(t *testing.T) {
	seen := map[Cookie]bool{}
	for _, salt := range []uint64{0, 1} {
		for _, name := range []string{"a", "b", "index.php", ""} {
			c := Hash(salt, name)
			if c < 3 || c > 1<<63-1 || seen[c] || c != Hash(salt, name) {
				t.Errorf("cookie of %q: %d", name, c)
			}
			seen[c] = true
		}
	}
	// The cookies are on disk and in the hands of readers: they must never change.
	if c := Hash(1, "index.php"); c != wantHash {
		t.Errorf("the cookie of index.php became %d", c)
	}
}

const wantHash = 9157449541579052928

func TestSub(t *testing.T) {
	e := Extent{Off: 100, Len: 50, Seq: 1, Segment: 2, LogOff: 1000}
	want := Extent{Off: 110, Len: 20, Seq: 1, Segment: 2, LogOff: 1010}
	if diff := cmp.Diff(want, e.Sub(110, 130)); diff != "" {
		t.Error(diff)
	}
	z := Extent{Off: 100, Len: 50, Seq: 1, Zero: true}
	if got := z.Sub(110, 130); !reflect.DeepEqual(got, Extent{Off: 110, Len: 20, Seq: 1, Zero: true}) {
		t.Errorf("%+v", got)
	}
}
