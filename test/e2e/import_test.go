package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mortar/test/tree"
)

// imported is what "mortar import gluster --json" says.
type imported struct {
	Brick    bool
	Entries  int
	Copied   int
	Bytes    int64
	Verified int
	Problems []struct{ Path, What string }
}

// importGluster imports on machine 1; it must succeed.
func (p *pool) importGluster(from, to string) (r imported) {
	p.t.Helper()
	begin := time.Now()
	out, err := p.Host(1).Run(p.ctx(5*time.Minute), mortar, "import", "gluster", from, to, "--json")
	if jerr := json.Unmarshal([]byte(out.Stdout), &r); err != nil || jerr != nil {
		p.t.Fatalf("%v, %v: %.2000s %+v", err, jerr, out.Stderr, r.Problems)
	}
	p.t.Logf("%s to %s: %d names, %d copied, %.1f MB, %d compared, in %.1f s", from, to, r.Entries, r.Copied, float64(r.Bytes)/1e6, r.Verified, time.Since(begin).Seconds())
	return r
}

// TestImportGluster brings a volume of real GlusterFS over: WordPress, with everything else
// that a file can have, from a brick and from a mount. It is killed on the way, and so is
// the daemon of the machine that it writes to.
func TestImportGluster(t *testing.T) {
	if !long {
		t.Skip("LEFT OUT without MORTAR_TEST_LONG=1: a volume of GlusterFS, filled with WordPress and imported four times")
	}
	for _, program := range []string{"glusterd", "glusterfsd", "mount.glusterfs"} {
		need(t, program)
	}
	// GlusterFS's daemon has the port that mortar's wants; its bricks and mounts do
	// without it once they run.
	p := start(t, setup{alone: true})
	p.daemons[0].Signal(syscall.SIGTERM)
	if err := p.daemons[0].Wait(p.ctx(patience)); err != nil {
		t.Fatal(err)
	}
	p.run(1, "sh", "-c", "mkdir -p /run/gluster /var/log/glusterfs /mnt/old /bricks/g1 /bricks/g2 && glusterd")
	until := func(what, script string) {
		t.Helper()
		p.within(patience, what, func() error { _, err := p.Host(1).Run(p.ctx(patience), "sh", "-c", script); return err })
	}
	const g = "gluster --mode=script "
	until("glusterd answers", g+"volume list")
	p.run(1, "sh", "-c", g+"volume create gv0 replica 2 n1:/bricks/g1/gv0 n1:/bricks/g2/gv0 force && "+g+"volume start gv0")
	until("the volume is mounted", "mount -t glusterfs -o acl n1:/gv0 /mnt/old && touch /mnt/old/here && rm /mnt/old/here")
	// stop ends a program of GlusterFS's.
	stop := func(name string) {
		t.Helper()
		p.within(patience, name+" ends", func() error {
			var left error
			for _, proc := range p.Host(1).Processes() {
				if proc.Name == name {
					left = errors.Join(fmt.Errorf("%+v", proc), syscall.Kill(proc.Pid, syscall.SIGKILL))
				}
			}
			return left
		})
	}
	defer func() {
		p.run(1, "umount", "-l", "/mnt/old")
		for _, name := range []string{"glusterd", "glusterfs", "glusterfsd"} {
			stop(name)
		}
	}()

	old := p.outside(1, "/mnt/old")
	fill(t, old)
	p.run(1, "sh", "-c", "cd /mnt/old && setfacl -m u:33:rw wp/index.php && mknod wp/null c 1 3 && mkfifo wp/pipe && chown -h 33:34 wp/link && chmod 4750 wp/index.php && sync")
	stop("glusterd")
	p.startDaemon(1)
	p.waitDaemon(1)
	p.join(2)
	p.join(3)
	p.createVolume()
	p.mount(1)
	p.mount(2)

	// Killed three times, and the daemon with it once.
	p.mortar(1, "subvolume", "create", "wp/site")
	names := func() (n int) {
		filepath.WalkDir(p.outside(2, "/mnt/wp/site"), func(string, os.DirEntry, error) error { n++; return nil })
		return n
	}
	for round := range 3 {
		j, err := p.Host(1).Spawn("import", mortar, "import", "gluster", "n1:/bricks/g1/gv0", "wp/site")
		if err != nil {
			t.Fatal(err)
		}
		before := names()
		p.within(patience, "it goes on", func() error {
			if n := names(); n < before+300 {
				return fmt.Errorf("%d names, %d before", n, before)
			}
			return nil
		})
		if round == 1 {
			p.killDaemon(1)
			p.startDaemon(1)
			p.waitDaemon(1)
			after := names()
			p.within(patience, "it goes on without its daemon", func() error {
				if n := names(); n < after+100 {
					return fmt.Errorf("%d names, %d before", n, after)
				}
				return nil
			})
		}
		j.Kill()
	}
	r := p.importGluster("n1:/bricks/g1/gv0", "wp/site")
	if !r.Brick || r.Copied == 0 || r.Copied >= r.Entries-800 || r.Verified != r.Entries+1 {
		t.Errorf("after three that were killed: %+v", r)
	}
	p.within(patience, "the mount that was made for it is gone", func() error {
		if left, _ := filepath.Glob(p.outside(1, "/run/mortar/import/*site")); len(left) > 0 {
			return fmt.Errorf("%q", left)
		}
		return nil
	})
	// Another machine has what the mount of GlusterFS shows, times and all; so the mount brings nothing more.
	same := func() {
		t.Helper()
		a, b := p.manifest(1, "/mnt/old"), p.manifest(2, "/mnt/wp/site")
		if diff := tree.Diff(a, b, 20); len(diff) > 0 {
			t.Fatalf("GlusterFS's mount and mortar's on n2 differ:\n%s", strings.Join(diff, "\n"))
		}
	}
	same()
	if r := p.importGluster("/mnt/old", "/mnt/wp/site"); r.Brick || r.Copied != 0 || r.Verified != r.Entries+1 {
		t.Errorf("from the mount, after the brick: %+v", r)
	}
	// What has changed since comes over, and nothing else.
	if err := errors.Join(os.WriteFile(old+"/wp/index.php", []byte("<?php // new"), 0o644), os.WriteFile(old+"/wp/more.php", []byte("<?php"), 0o644)); err != nil {
		t.Fatal(err)
	}
	p.run(1, "sync")
	if r := p.importGluster("/bricks/g2/gv0", "/mnt/wp/site"); r.Copied != 3 { // one of them has two names
		t.Errorf("after two changes: %+v", r)
	}
	same()
	p.refuse(2, []string{"import", "gluster", "n1:/bricks/g1/gv0", "/mnt/wp/site"}, "n1 is another machine", "mortar import gluster /bricks/g1/gv0 wp/site")
	p.mortar(1, "subvolume", "create", "wp/again")
	if r := p.importGluster("/mnt/old", "wp/again"); r.Copied != r.Entries {
		t.Errorf("from the mount: %+v", r)
	}
	p.identical(1)
}

// fill puts WordPress into a directory, and what else files can have.
func fill(t *testing.T, dir string) {
	t.Helper()
	from := tree.WordPress()
	if from == "" {
		from = filepath.Join(t.TempDir(), "wp")
		if err := tree.Make(from, 1); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("cp", "-a", from, dir+"/wp").CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
	err := os.Mkdir(dir+"/two", 0o2775)
	err = errors.Join(err, os.Link(dir+"/wp/index.php", dir+"/two/same.php"), os.Symlink("index.php", dir+"/wp/link"), os.Symlink("/nowhere", dir+"/wp/dangling"),
		unix.Setxattr(dir+"/wp/index.php", "user.note", []byte("kept"), 0), unix.Setxattr(dir+"/wp", "user.dir", bytes.Repeat([]byte("x"), 1000), 0))
	if err != nil {
		t.Fatal(err)
	}
	random := make([]byte, 3<<20+17)
	rng := rand.NewChaCha8([32]byte{1})
	rng.Read(random)
	f, err := os.Create(dir + "/sparse")
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(random, 100<<20)
	if err = errors.Join(err, f.Truncate(300<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		name := filepath.Join(dir, "files", strings.Repeat("d/", i%7), fmt.Sprintf("name %d ä\n", i))
		err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o750), os.WriteFile(name, random[:i*37], 0o640))
		when := []unix.Timespec{{Sec: int64(1e9 + i), Nsec: int64(i * 1001)}, {Sec: int64(1e9 - i), Nsec: 999999999}}
		if err = errors.Join(err, os.Lchown(name, i, i+1), unix.UtimesNanoAt(unix.AT_FDCWD, name, when, 0)); err != nil {
			t.Fatal(err)
		}
	}
}
