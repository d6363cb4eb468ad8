package gluster

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// brick makes a directory as GlusterFS 10 leaves one. As root: trusted attributes.
func brick(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	check(t, os.MkdirAll(at(".glusterfs/ab"), 0o700))
	check(t, os.WriteFile(at(".glusterfs/health_check"), nil, 0o600))
	check(t, os.MkdirAll(at("wp/uploads"), 0o755))
	check(t, os.WriteFile(at("wp/index.php"), []byte("<?php"), 0o640))
	check(t, os.Chown(at("wp/index.php"), 33, 33))
	check(t, os.Chmod(at("wp/index.php"), 0o4750))
	if err := unix.Setxattr(at("wp/index.php"), "trusted.gfid", make([]byte, 16), 0); errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM) {
		t.Skip("needs trusted attributes: ", err)
	}
	check(t, unix.Setxattr(at("wp/index.php"), "trusted.afr.wp-client-1", make([]byte, 12), 0))
	check(t, unix.Setxattr(at("wp/index.php"), "user.kept", []byte("yes"), 0))
	check(t, os.Link(at("wp/index.php"), at(".glusterfs/ab/handle")))
	check(t, os.Link(at("wp/index.php"), at("wp/same.php")))
	check(t, os.Symlink("index.php", at("wp/link")))
	check(t, os.Lchown(at("wp/link"), 33, 33))
	check(t, unix.Mkfifo(at("wp/pipe"), 0o600))
	check(t, unix.Mknod(at("wp/null"), unix.S_IFCHR|0o666, 1<<8|3))
	// A pointer of distribution's, and a file that only looks like one.
	check(t, os.WriteFile(at("wp/elsewhere"), nil, 0o600))
	check(t, unix.Setxattr(at("wp/elsewhere"), "trusted.glusterfs.dht.linkto", []byte("wp-client-0\x00"), 0))
	check(t, unix.Chmod(at("wp/elsewhere"), 0o1000))
	check(t, os.WriteFile(at("wp/sticky"), nil, 0o600))
	check(t, unix.Chmod(at("wp/sticky"), 0o1000))
	f, err := os.Create(at("wp/sparse"))
	check(t, err)
	_, err = f.WriteAt([]byte("end"), 8<<20)
	check(t, err)
	check(t, f.Close())
	when := []unix.Timespec{{Sec: 1e9, Nsec: 123456789}, {Sec: 1e9, Nsec: 987654321}}
	for _, name := range []string{"wp/index.php", "wp/link", "wp/uploads", "wp/sparse", "wp"} {
		check(t, unix.UtimesNanoAt(unix.AT_FDCWD, at(name), when, unix.AT_SYMLINK_NOFOLLOW))
	}
	return dir
}

func stat(t *testing.T, path string) (st unix.Stat_t) {
	t.Helper()
	check(t, unix.Lstat(path, &st))
	return st
}

// at sets the times that GlusterFS keeps for its mounts.
func at(t *testing.T, path string, mtime, atime unix.Timespec) {
	t.Helper()
	b := []byte{1}
	for _, v := range []int64{0, 0, 0, mtime.Sec, mtime.Nsec, atime.Sec, atime.Nsec} {
		b = binary.BigEndian.AppendUint64(b, uint64(v))
	}
	check(t, unix.Lsetxattr(path, "trusted.glusterfs.mdata", b, 0))
}

// TestTimes: a brick has the times that a mount of the volume shows, if the volume
// keeps them.
func TestTimes(t *testing.T) {
	from := brick(t)
	id := []byte{0x69, 0x33, 0xa6, 0xcb, 0xfb, 0x0b, 0x42, 0x71, 0x9b, 0x6f, 0xf6, 0xbd, 0x6f, 0xc3, 0x88, 0xcc}
	check(t, unix.Setxattr(from, "trusted.glusterfs.volume-id", id, 0))
	shown := unix.Timespec{Sec: 1234567890, Nsec: 111}
	read := unix.Timespec{Sec: 1334567890, Nsec: 222}
	for _, name := range []string{"wp/index.php", "wp/link", "wp"} {
		at(t, filepath.Join(from, name), shown, read)
	}
	check(t, unix.Setxattr(from+"/wp/sticky", "trusted.glusterfs.mdata", []byte{2, 0}, 0)) // of a later version
	state := t.TempDir()
	check(t, os.MkdirAll(state+"/vols/other", 0o755))
	check(t, os.MkdirAll(state+"/vols/wp", 0o755))
	check(t, os.WriteFile(state+"/vols/other/info", []byte("volume-id=00000000-0000-0000-0000-000000000000\nfeatures.ctime=off\n"), 0o600))
	info := "type=2\nvolume-id=6933a6cb-fb0b-4271-9b6f-f6bd6fc388cc\n"
	for _, c := range []struct {
		options string
		kept    bool
	}{{"", true}, {"features.ctime=on\n", true}, {"features.ctime=off\n", false}} {
		check(t, os.WriteFile(state+"/vols/wp/info", []byte(info+c.options), 0o600))
		to := t.TempDir()
		r, err := Import(t.Context(), Config{Source: from, Target: to, State: state})
		check(t, err)
		if len(r.Problems) > 0 {
			t.Fatalf("%+v", r.Problems)
		}
		for _, name := range []string{"wp/index.php", "wp/link", "wp", "wp/sparse", "wp/sticky"} {
			want := stat(t, filepath.Join(from, name)).Mtim
			if c.kept && name != "wp/sparse" && name != "wp/sticky" {
				want = shown
			}
			if got := stat(t, filepath.Join(to, name)); got.Mtim != want {
				t.Errorf("%q: %s has the time %v, want %v", c.options, name, got.Mtim, want)
			}
		}
	}
}

func TestParseTimes(t *testing.T) {
	full := make([]byte, 57)
	full[0] = 1
	if _, ok := parseTimes(full); !ok {
		t.Error("an attribute as GlusterFS 10 writes it is refused")
	}
	huge := bytes.Clone(full)
	huge[33] = 0xff // more nanoseconds than a second has
	for _, b := range [][]byte{nil, full[:56], append(bytes.Clone(full), 0), append([]byte{2}, full[1:]...), huge} {
		if _, ok := parseTimes(b); ok {
			t.Errorf("%x is taken for times", b)
		}
	}
}

func TestImport(t *testing.T) {
	from, to := brick(t), t.TempDir()
	r, err := Import(t.Context(), Config{Source: from, Target: to})
	check(t, err)
	if len(r.Problems) > 0 || !r.Brick {
		t.Fatalf("%+v", r)
	}
	if r.Copied != r.Entries || r.Verified != r.Entries+1 { // and the root
		t.Errorf("%+v", r)
	}
	for _, name := range []string{".glusterfs", "wp/elsewhere"} {
		if _, err := os.Lstat(filepath.Join(to, name)); err == nil {
			t.Errorf("%s was brought over", name)
		}
	}
	for _, name := range []string{"wp", "wp/index.php", "wp/link", "wp/pipe", "wp/null", "wp/sticky", "wp/sparse", "wp/uploads"} {
		a, b := stat(t, filepath.Join(from, name)), stat(t, filepath.Join(to, name))
		if a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid || a.Mtim != b.Mtim || a.Rdev != b.Rdev {
			t.Errorf("%s: %+v, want %+v", name, b, a)
		}
	}
	if a, b := stat(t, to+"/wp/index.php"), stat(t, to+"/wp/same.php"); a.Ino != b.Ino || a.Nlink != 2 {
		t.Errorf("two names of one file are %+v and %+v", a, b)
	}
	if st := stat(t, to+"/wp/sparse"); st.Size != 8<<20+3 || st.Blocks > 1000 {
		t.Errorf("the sparse file has %d blocks, %d bytes", st.Blocks, st.Size)
	}
	x, err := xattrs(to + "/wp/index.php")
	check(t, err)
	if string(x["user.kept"]) != "yes" || x["trusted.gfid"] != nil || x["trusted.afr.wp-client-1"] != nil {
		t.Errorf("attributes %q", x)
	}

	// Again: nothing is copied, all is compared.
	r, err = Import(t.Context(), Config{Source: from, Target: to})
	check(t, err)
	if r.Copied != 0 || len(r.Problems) > 0 || r.Verified != r.Entries+1 {
		t.Errorf("again: %+v", r)
	}
	// A newer file in the target is left alone; an older one is not.
	check(t, os.WriteFile(to+"/wp/sparse", []byte("mine"), 0o600))
	check(t, os.Remove(to+"/wp/pipe"))
	r, err = Import(t.Context(), Config{Source: from, Target: to})
	check(t, err)
	if r.Copied != 1 || len(r.Problems) != 1 || r.Problems[0].Path != "wp/sparse" || !strings.Contains(r.Problems[0].What, "newer") {
		t.Errorf("with a newer one: %+v", r)
	}
}

// TestInterrupted: wherever it stops, it can be begun again, and no name ever leads to half a file.
func TestInterrupted(t *testing.T) {
	from := brick(t)
	big := make([]byte, 3<<20)
	for i := range big {
		big[i] = byte(i * 7)
	}
	for _, n := range []string{"a", "b", "c"} {
		check(t, os.WriteFile(filepath.Join(from, n), big, 0o644))
	}
	to := t.TempDir()
	stopped := errors.New("stopped")
	for after := 0; ; after++ {
		ctx, stop := context.WithCancelCause(t.Context())
		looks := 0
		r, err := Import(&counted{Context: ctx, look: func() {
			if looks++; looks > after {
				stop(stopped)
			}
		}}, Config{Source: from, Target: to})
		stop(nil)
		for _, n := range []string{"a", "b", "c"} {
			if st, err := os.Stat(filepath.Join(to, n)); err == nil && st.Size() != int64(len(big)) {
				t.Fatalf("%s has %d bytes", n, st.Size())
			}
		}
		if err == nil {
			if len(r.Problems) > 0 || r.Verified != r.Entries+1 {
				t.Fatalf("%+v", r)
			}
			break
		}
		if !errors.Is(err, stopped) {
			t.Fatal(err)
		}
	}
	if _, err := os.Lstat(filepath.Join(to, temporary)); err == nil {
		t.Error("a temporary file is left")
	}
}

// counted tells each time somebody looks whether it has ended.
type counted struct {
	context.Context
	look func()
}

func (c *counted) Err() error        { c.look(); return c.Context.Err() }
func (c *counted) Value(key any) any { c.look(); return c.Context.Value(key) }

func TestRefused(t *testing.T) {
	from, to := brick(t), t.TempDir()
	check(t, unix.Setxattr(from+"/wp/index.php", "trusted.afr.wp-client-1", []byte{0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0}, 0))
	check(t, os.MkdirAll(from+"/.shard", 0o700))
	check(t, os.MkdirAll(to+"/wp/link", 0o700))
	r, err := Import(t.Context(), Config{Source: from, Target: to})
	check(t, err)
	got := map[string]string{}
	for _, p := range r.Problems {
		got[p.Path] = p.What
	}
	for path, want := range map[string]string{".shard": "shards", "wp/index.php": "heal the volume first", "wp/same.php": "heal the volume first", "wp/link": "a directory is in its place"} {
		if !strings.Contains(got[path], want) {
			t.Errorf("%s: %q, want %q", path, got[path], want)
		}
	}
	if len(got) != 4 {
		t.Errorf("%q", got)
	}
	check(t, unix.Setxattr(from, "trusted.ec.version", []byte{1}, 0))
	if _, err := Import(t.Context(), Config{Source: from, Target: to}); err == nil || !strings.Contains(err.Error(), "dispersed") {
		t.Errorf("a dispersed volume: %v", err)
	}
}

// TestSourceChanges: what changes while it is read is told.
func TestSourceChanges(t *testing.T) {
	from, to := brick(t), t.TempDir()
	changed := false
	r, err := Import(t.Context(), Config{Source: from, Target: to, Progress: func(r Report) {
		if r.Verify && !changed {
			changed = true
			// As long as before, and with the same time: only the contents tell.
			st := stat(t, from+"/wp/index.php")
			check(t, os.WriteFile(from+"/wp/index.php", []byte("?????"), 0))
			check(t, unix.UtimesNanoAt(unix.AT_FDCWD, from+"/wp/index.php", []unix.Timespec{st.Atim, st.Mtim}, 0))
		}
	}})
	check(t, err)
	if len(r.Problems) != 1 || !strings.HasPrefix(r.Problems[0].Path, "wp/") || !strings.Contains(r.Problems[0].What, "contents differ; the source was changed during the import") {
		t.Errorf("%+v", r.Problems)
	}
}
