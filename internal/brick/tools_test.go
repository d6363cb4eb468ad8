package brick

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"mortar/internal/disk"
	"mortar/internal/fsop"
	"mortar/internal/oplog"
)

// populate makes some of everything in a brick.
func populate(o *opened) {
	o.t.Helper()
	dir := o.mkdir(fsop.RootIno, "dir")
	sub := o.mkdir(dir, "sub")
	small := o.create(dir, "small")
	o.write(small, 0, []byte("hello\n"))
	big := o.create(sub, "big")
	for i := range 5 {
		o.write(big, uint64(i)<<18, bytes.Repeat([]byte{byte('a' + i)}, 1<<18))
	}
	sparse := o.create(sub, "sparse")
	o.write(sparse, 1<<20, []byte("after a hole"))
	o.must(&fsop.Link{Ino: small, Parent: sub, Name: "hard"})
	o.must(&fsop.Symlink{Node: fsop.Node{Parent: dir, Name: "sym"}, Target: "../dir/small"})
	o.must(&fsop.Mknod{Node: fsop.Node{Parent: dir, Name: "fifo", Mode: syscall.S_IFIFO | 0o640}})
	o.must(&fsop.Setxattr{Ino: small, Name: "user.color", Value: []byte("blue")})
	o.must(&fsop.Setxattr{Ino: dir, Name: "user.empty"})
	o.create(fsop.RootIno, "name with\nnewline")
	gone := o.create(fsop.RootIno, "unlinked")
	o.write(gone, 0, []byte("still open somewhere"))
	o.must(&fsop.Unlink{Parent: fsop.RootIno, Name: "unlinked"})
	for i := range 300 {
		o.create(sub, fmt.Sprintf("many-%03d", i))
	}
}

// killed leaves a populated brick as the kill of its daemon would, part of it
// settled and flushed, the rest in the log alone.
func killed(t *testing.T, fs disk.FS, dir string) {
	t.Helper()
	opt := testOptions(fs)
	opt.Dir = dir
	format(t, fs, dir)
	b, err := Open(opt)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Rewind(b.Tail()); err != nil {
		t.Fatal(err)
	}
	o := &opened{Brick: b, t: t, epoch: 1}
	populate(o)
	o.Commit(o.Tail().Seq)
	for range 2 { // the second makes durable that the first has settled
		if err := o.settleCycle(t.Context(), true); err != nil {
			t.Fatal(err)
		}
	}
	f := o.create(fsop.RootIno, "late")
	o.write(f, 0, bytes.Repeat([]byte("late "), 50_000))
	o.write(o.lookup(t, "dir/sub/big"), 1<<18, bytes.Repeat([]byte("X"), 1<<18))
	if err := o.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(false); err != nil {
		t.Fatal(err)
	}
}

func (o *opened) lookup(t *testing.T, name string) fsop.Ino {
	t.Helper()
	ino := fsop.RootIno
	for _, e := range strings.Split(name, "/") {
		r, _, err := o.Read(t.Context(), &fsop.Lookup{Parent: ino, Name: e})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		ino = r.Attr.Ino
	}
	return ino
}

func offline(t *testing.T, fs disk.FS, dir string, salvage bool) *Offline {
	t.Helper()
	off, err := OpenOffline(OfflineOptions{FS: fs, Dir: dir, Salvage: salvage})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { off.Close() })
	return off
}

// tree is everything below a directory, as lines.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		fmt.Fprintf(&b, "%q mode %o links %d mtime %d", strings.TrimPrefix(p, dir), st.Mode, st.Nlink, st.Mtim.Nano())
		switch st.Mode & syscall.S_IFMT {
		case syscall.S_IFREG:
			c, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " size %d sum %x", st.Size, checksum(c))
		case syscall.S_IFLNK:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " -> %s", target)
		}
		v := make([]byte, 100)
		if n, err := unix.Lgetxattr(p, "user.color", v); err == nil {
			fmt.Fprintf(&b, " color %s", v[:n])
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func checksum(b []byte) (sum uint64) {
	for _, c := range b {
		sum = sum*31 + uint64(c)
	}
	return sum
}

func noProblem(t *testing.T) func(Problem) {
	return func(p Problem) {
		t.Helper()
		if os.Geteuid() != 0 && errors.Is(p.Err, fs.ErrPermission) {
			return // owners and device files need root
		}
		t.Errorf("problem: %v", p)
	}
}

func TestOffline(t *testing.T) {
	m := disk.NewMem()
	killed(t, m, "/b")
	before := m.String()
	off := offline(t, m, "/b", false)
	if len(off.Notes()) != 0 {
		t.Errorf("notes %q", off.Notes())
	}
	if off.Identity().Volume != testID.Volume {
		t.Errorf("identity %+v", off.Identity())
	}

	t.Run("list", func(t *testing.T) {
		var got []string
		err := off.List(t.Context(), "/dir", func(o Object) error {
			got = append(got, fmt.Sprintf("%s %o %s", o.Path, o.Attr.Mode, o.Target))
			return nil
		})
		want := []string{"/dir/fifo 10640 ", "/dir/small 100644 ", "/dir/sub 40755 ", "/dir/sym 120777 ../dir/small"}
		if err != nil || strings.Join(got, "\n") != strings.Join(want, "\n") {
			t.Errorf("%v\n%s", err, strings.Join(got, "\n"))
		}
		n := 0
		err = off.List(t.Context(), "dir/sub/", func(Object) error { n++; return nil })
		if err != nil || n != 303 {
			t.Errorf("%d entries, %v", n, err)
		}
		for _, name := range []string{"/no", "/dir/no/way", "/late/x", "/unlinked"} {
			if err := off.List(t.Context(), name, func(Object) error { return nil }); !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
	t.Run("cat", func(t *testing.T) {
		var b bytes.Buffer
		if err := off.Cat(t.Context(), "/late", &b); err != nil || b.Len() != 250_000 || !strings.HasPrefix(b.String(), "late late") {
			t.Errorf("%d bytes, %v", b.Len(), err)
		}
		if err := off.Cat(t.Context(), "/dir", &b); err == nil {
			t.Error("a directory has contents")
		}
	})
	t.Run("check", func(t *testing.T) {
		c, err := off.Check(t.Context(), true, noProblem(t))
		if err != nil || c.Problems != 0 || c.Inodes < 300 || c.Bytes < 1<<20 {
			t.Errorf("%+v, %v", c, err)
		}
	})
	t.Run("dump", func(t *testing.T) {
		var log, kv bytes.Buffer
		if err := DumpLog(t.Context(), m, "/b", 0, &log); err != nil {
			t.Error(err)
		}
		if err := off.DumpMeta(t.Context(), &kv); err != nil {
			t.Error(err)
		}
		for what, in := range map[string]string{"setxattr": log.String(), "create": log.String(), `"late"`: kv.String(), "\nI ": kv.String()} {
			if !strings.Contains(in, what) {
				t.Errorf("nothing about %s in the dump:\n%.1000s", what, in)
			}
		}
		if strings.Contains(log.String(), "blue") {
			t.Error("the dump has users' data in it")
		}
	})
	if after := m.String(); after != before {
		t.Errorf("the brick was changed from\n%sto\n%s", before, after)
	}
	if _, err := Open(testOptions(m)); err == nil {
		t.Error("the brick was opened while somebody looks at it")
	}
	if err := off.Close(); err != nil {
		t.Fatal(err)
	}
	b := openBrick(t, testOptions(m)) // it is as good as ever
	if _, err := OpenOffline(OfflineOptions{FS: m, Dir: "/b"}); err == nil {
		t.Error("a brick in use was opened to look at")
	}
	b.Close(true)
	if _, err := OpenOffline(OfflineOptions{FS: m, Dir: "/"}); !errors.Is(err, ErrNoBrick) {
		t.Errorf("no brick: %v", err)
	}
}

func TestExport(t *testing.T) {
	dir := t.TempDir()
	brickDir, dest := filepath.Join(dir, "brick"), filepath.Join(dir, "out")
	killed(t, disk.OS, brickDir)
	off := offline(t, disk.OS, brickDir, false)
	n := 0
	x, err := off.Export(t.Context(), "/", dest, noProblem(t), func(Exported) { n++ })
	if err != nil || x.Objects < 300 || uint64(n) != x.Objects {
		t.Fatalf("%+v, told %d times: %v", x, n, err)
	}
	got := tree(t, dest)
	for _, want := range []string{
		`"/dir/sub/big" mode 100644 links 1`, `"/dir/small" mode 100644 links 2`, `"/dir/sub/hard" mode 100644 links 2`,
		` size 6 sum`, `-> ../dir/small`, `"/dir/fifo" mode 10640`, ` color blue`, `"/name with\nnewline"`, `size 1048588`, `size 250000`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("nothing like %s in\n%.1500s", want, got)
		}
	}
	big, err := os.ReadFile(filepath.Join(dest, "dir/sub/big"))
	if err != nil || len(big) != 5<<18 || big[0] != 'a' || big[1<<18] != 'X' || big[2<<18] != 'c' || big[len(big)-1] != 'e' {
		t.Errorf("big: %d bytes, %v", len(big), err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dest, "dir/sub/sparse"), &st); err != nil || st.Blocks > 64 {
		t.Errorf("the sparse file takes %d blocks, %v", st.Blocks, err)
	}
	o, err := off.Stat("/dir/sub")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(filepath.Join(dest, "dir/sub"), &st); err != nil || st.Mtim.Nano() != o.Attr.Mtime {
		t.Errorf("mtime of a directory %d, want %d: %v", st.Mtim.Nano(), o.Attr.Mtime, err)
	}

	part := filepath.Join(dir, "part")
	if _, err := off.Export(t.Context(), "/dir/sub", part, noProblem(t), nil); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(part, "hard")); err != nil || string(b) != "hello\n" {
		t.Errorf("%q, %v", b, err)
	}
	for what, to := range map[string]string{"/": dest, "/late": filepath.Join(dir, "x"), "/no": filepath.Join(dir, "y")} {
		if _, err := off.Export(t.Context(), what, to, noProblem(t), nil); err == nil {
			t.Errorf("export of %s to %s: no error", what, to)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := off.Export(ctx, "/", filepath.Join(dir, "z"), func(Problem) {}, func(Exported) { cancel() }); !errors.Is(err, context.Canceled) {
		t.Errorf("an export that was cancelled: %v", err)
	}
}

// TestOfflineReadOnly looks at a brick whose disk takes no writes.
func TestOfflineReadOnly(t *testing.T) {
	m := disk.NewMem()
	killed(t, m, "/b")
	ro := disk.NewFaulty(m)
	for _, op := range []disk.Op{disk.OpWrite, disk.OpSync, disk.OpResize, disk.OpRemove, disk.OpRename, disk.OpSyncDir} {
		ro.Add(disk.Fault{Op: op, Err: syscall.EROFS})
	}
	ro.Add(disk.Fault{Op: disk.OpOpen, Path: lockName, Err: syscall.EROFS})
	off := offline(t, ro, "/b", false)
	if c, err := off.Check(t.Context(), true, noProblem(t)); err != nil || c.Problems != 0 {
		t.Errorf("%+v, %v", c, err)
	}
	if len(off.Notes()) != 1 || !strings.Contains(off.Notes()[0], "locked") {
		t.Errorf("notes %q", off.Notes())
	}
}

// TestSalvage shows what is left of damaged bricks.
func TestSalvage(t *testing.T) {
	names := func(off *Offline) (n int) {
		err := off.List(t.Context(), "/", func(Object) error { n++; return nil })
		if err != nil {
			t.Error(err)
		}
		return n
	}
	segments := func(m *disk.Mem) []string {
		l, err := m.List("/b/.mortar/log")
		if err != nil {
			t.Fatal(err)
		}
		var s []string
		for _, n := range l {
			if strings.HasSuffix(n, ".log") {
				s = append(s, "/b/.mortar/log/"+n)
			}
		}
		return s
	}
	change := func(m *disk.Mem, name string, do func(f disk.File) error) {
		f, err := m.OpenFile(name, os.O_RDWR)
		if err == nil {
			err = do(f)
		}
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	t.Run("log damaged in the middle", func(t *testing.T) {
		m := disk.NewMem()
		killed(t, m, "/b")
		l, err := oplog.Open(oplog.Options{FS: m, Dir: "/b/.mortar/log", ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		tail := l.Tail().Seq
		_, _, locs, err := l.Read(tail-2, 1) // the creation of late
		l.Close()
		if err != nil {
			t.Fatal(err)
		}
		change(m, fmt.Sprintf("/b/.mortar/log/%016x.log", locs[0].Segment), func(f disk.File) error {
			_, err := f.WriteAt([]byte("damage"), locs[0].Off)
			return err
		})
		_, err = OpenOffline(OfflineOptions{FS: m, Dir: "/b"})
		var bad *oplog.ErrCorrupt
		if err != nil && !errors.As(err, &bad) {
			t.Fatal(err)
		}
		off := offline(t, m, "/b", true)
		if n := names(off); n < 2 {
			t.Errorf("%d names are left, notes %q", n, off.Notes())
		}
	})
	t.Run("metadata lost, log whole", func(t *testing.T) {
		m := disk.NewMem()
		format(t, m, "/b")
		o := openBrick(t, testOptions(m))
		populate(o)
		o.Close(true)
		names, err := m.List("/b/.mortar/meta")
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			if n != "LOCK" {
				change(m, "/b/.mortar/meta/"+n, func(f disk.File) error { return f.Truncate(3) })
			}
		}
		if _, err := OpenOffline(OfflineOptions{FS: m, Dir: "/b"}); err == nil {
			t.Fatal("damaged metadata were accepted")
		}
		off := offline(t, m, "/b", true)
		if len(off.Notes()) == 0 {
			t.Error("no note about it")
		}
		if c, err := off.Check(t.Context(), true, noProblem(t)); err != nil || c.Problems != 0 || c.Inodes < 300 {
			t.Errorf("%+v, %v", c, err)
		}
	})
	t.Run("log lost", func(t *testing.T) {
		m := disk.NewMem()
		killed(t, m, "/b")
		for _, s := range segments(m) {
			if err := m.Remove(s); err != nil {
				t.Fatal(err)
			}
		}
		off := offline(t, m, "/b", true)
		if len(off.Notes()) == 0 {
			t.Error("no note about it")
		}
		if n := names(off); n < 2 {
			t.Errorf("%d names are left, notes %q", n, off.Notes())
		}
		problems := 0
		if _, err := off.Export(t.Context(), "/", filepath.Join(t.TempDir(), "x"), func(Problem) { problems++ }, nil); err != nil {
			t.Errorf("export: %v", err)
		}
	})
	t.Run("data file lost", func(t *testing.T) {
		m := disk.NewMem()
		killed(t, m, "/b")
		if err := m.RemoveAll("/b/.mortar/data"); err != nil {
			t.Fatal(err)
		}
		off := offline(t, m, "/b", false)
		found := 0
		c, err := off.Check(t.Context(), true, func(p Problem) {
			if strings.Contains(p.Err.Error(), "data file") || errors.Is(p.Err, fs.ErrNotExist) {
				found++
			}
		})
		if err != nil || c.Problems == 0 || found == 0 {
			t.Errorf("%+v, %v", c, err)
		}
		dest := filepath.Join(t.TempDir(), "x")
		var told []Problem
		x, err := off.Export(t.Context(), "/", dest, func(p Problem) { told = append(told, p) }, nil)
		if err != nil || x.Problems == 0 || uint64(len(told)) != x.Problems {
			t.Errorf("%+v, %v, told %v", x, err, told)
		}
		b, err := os.ReadFile(filepath.Join(dest, "dir/sub/big"))
		if err != nil || len(b) != 5<<18 || b[1<<18] != 'X' || b[0] != 0 {
			t.Errorf("%d bytes, %v: what is in the log is to be had", len(b), err)
		}
	})
}

// TestCheckFinds damages metadata and expects to be told.
func TestCheckFinds(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range 40 {
		m := disk.NewMem()
		format(t, m, "/b")
		o := openBrick(t, testOptions(m))
		dir := o.mkdir(fsop.RootIno, "dir")
		f := o.create(dir, "f")
		o.write(f, 8192, []byte("sparse"))
		o.must(&fsop.Setxattr{Ino: f, Name: "user.x", Value: []byte("y")})
		o.must(&fsop.Symlink{Node: fsop.Node{Parent: dir, Name: "s"}, Target: "f"})
		o.Close(true)
		off := offline(t, m, "/b", false)
		var keys [][]byte
		err := off.b.store.Records([]byte{'A'}, []byte{'Z'}, func(k, _ []byte) (bool, error) {
			if bytes.IndexByte([]byte("DIMXY"), k[0]) >= 0 {
				keys = append(keys, bytes.Clone(k))
			}
			return true, nil
		})
		if err != nil || len(keys) < 8 {
			t.Fatalf("%d records, %v", len(keys), err)
		}
		k := keys[rng.IntN(len(keys))]
		batch := off.b.store.NewBatch()
		batch.DeleteRecord(k)
		if err := off.b.store.Commit(batch); err != nil {
			t.Fatal(err)
		}
		batch.Close()
		found := 0
		if _, err := off.Check(t.Context(), false, func(Problem) { found++ }); err != nil || found == 0 {
			t.Errorf("record %q was removed: %d problems, %v", k, found, err)
		}
		off.Close()
	}
}
