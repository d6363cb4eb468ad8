package daemon

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"mortar/internal/api"
	"mortar/internal/mountinfo"
)

func TestPlace(t *testing.T) {
	dir := t.TempDir()
	mk := func(parts ...string) string {
		p := filepath.Join(append([]string{dir}, parts...)...)
		if err := os.MkdirAll(p, 0o755); err != nil {
			t.Fatal(err)
		}
		return p
	}
	brick := mk("brick")
	mk("brick", ".mortar")
	mk("brick", "sub")
	for _, f := range []string{filepath.Join(brick, ".mortar", "brick.json"), filepath.Join(dir, "file")} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(brick, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	state := mk("state")
	open := mk("open")
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	otherDisk := func(t *testing.T, path string) {
		a, errA := statx(path)
		root, errB := statx("/")
		if errA != nil || errB != nil || a.device == root.device {
			t.Skipf("%s is not on a disk of its own", path)
		}
	}
	for _, c := range []struct {
		name, path string
		force      bool
		disk       string // must be another one than the root's
		want       string // part of the error; "": good
	}{
		{name: "good", path: mk("good"), force: true},
		{name: "to be made", path: filepath.Join(dir, "a", "b", "c"), force: true},
		{name: "relative", path: "b", force: true, want: "Wrong brick type: b, use <HOSTNAME>:<export-dir-abs-path>"},
		{name: "root", path: "/..", force: true, want: "The root directory cannot be a brick"},
		{name: "control characters", path: "/a\nb", force: true, want: `The path "/a\nb" has control characters`},
		{name: "long", path: "/" + strings.Repeat("x", 3800), force: true, want: "The path of a brick can have 3800 bytes"},
		{name: "file", path: filepath.Join(dir, "file"), force: true, want: "The provided path " + dir + "/file which is already present, is not a directory"},
		{name: "below a file", path: filepath.Join(dir, "file", "x"), force: true, want: "Failed to create brick directory for brick h:" + dir + "/file/x. Reason : not a directory"},
		{name: "link", path: filepath.Join(dir, "link"), force: true, want: "is a symbolic link"},
		{name: "a brick", path: brick, force: true, want: brick + " is already part of a volume"},
		{name: "in a brick", path: filepath.Join(brick, "sub"), force: true, want: "parent directory " + brick + " is already part of a volume"},
		{name: "working directory", path: state, force: true, want: "Brick isn't allowed to be created inside mortar's working directory."},
		{name: "in it", path: filepath.Join(state, "x"), force: true, want: "Brick isn't allowed"},
		{name: "around it", path: dir, force: true, want: "Brick isn't allowed"},
		{name: "beside it", path: state + "-2", force: true},
		{name: "root partition", path: "/mortar-test-brick", want: "The brick h:/mortar-test-brick is being created in the root partition. It is recommended that you don't use the system's root partition for storage backend. Or use 'force' at the end of the command if you want to override this behavior."},
		{name: "mount point", path: "/dev/shm", disk: "/dev/shm", want: "The brick h:/dev/shm is a mount point. Please create a sub-directory under the mount point and use that as the brick directory. Or use 'force' at the end of the command if you want to override this behavior."},
		{name: "mount point by force", path: "/dev/shm", disk: "/dev/shm", force: true},
		{name: "below a mount point", path: "/dev/shm/mortar-test-brick", disk: "/dev/shm"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.disk != "" {
				otherDisk(t, c.disk)
			}
			err := place{host: "h", path: c.path, force: c.force, state: state}.check()
			switch {
			case c.want == "" && err != nil:
				t.Error(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %v, want %q", err, c.want)
			case c.want != "" && !api.IsCode(err, api.Invalid):
				t.Errorf("%v has another code than %s", err, api.Invalid)
			}
		})
	}
	// Nothing of this has made anything.
	if _, err := os.Lstat(filepath.Join(dir, "a")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a check has made %s: %v", filepath.Join(dir, "a"), err)
	}
}

func TestPlaceMake(t *testing.T) {
	dir := t.TempDir()
	p := place{host: "h", path: filepath.Join(dir, "a", "b")}
	made, err := p.make()
	if err != nil || made != filepath.Join(dir, "a") {
		t.Fatalf("made %q, %v", made, err)
	}
	if made, err := p.make(); made != "" || err != nil {
		t.Errorf("again: %q, %v", made, err)
	}
	// What was made is taken back, what is in use is not.
	if err := os.WriteFile(filepath.Join(dir, "a", "keep"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	removeEmpty(p.path, made)
	if _, err := os.Stat(filepath.Join(dir, "a", "keep")); err != nil {
		t.Error(err)
	}
}

func TestMountOf(t *testing.T) {
	const info = `22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw,discard
40 22 8:1 / /bricks rw,noatime shared:7 - xfs /dev/sda1 rw,attr2
41 40 8:2 / /bricks/my\040disk rw - xfs /dev/sdb1 rw
42 22 8:3 / /brick rw - xfs /dev/sdc1 rw
43 40 8:4 / /bricks ro - ext4 /dev/sdd1 ro
nonsense
`
	for path, want := range map[string]api.DiskStatus{
		"/bricks/b1":          {FileSystem: "ext4", Device: "/dev/sdd1", MountOptions: "ro,ro"}, // mounted over the other
		"/bricks/my disk/b":   {FileSystem: "xfs", Device: "/dev/sdb1", MountOptions: "rw,rw"},
		"/brick":              {FileSystem: "xfs", Device: "/dev/sdc1", MountOptions: "rw,rw"},
		"/bricksandmore/here": {FileSystem: "ext4", Device: "/dev/root", MountOptions: "rw,relatime,rw,discard"},
	} {
		var got api.DiskStatus
		mountOf(mountinfo.Parse(info), path, &got)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s:\n%s", path, diff)
		}
	}
}

func TestBrickName(t *testing.T) {
	for _, c := range []struct{ in, host, path, want string }{
		{in: "gfs1:/bricks/b1/wp", host: "gfs1", path: "/bricks/b1/wp"},
		{in: "gfs1:/bricks//b1/./wp/", host: "gfs1", path: "/bricks/b1/wp"},
		{in: "10.0.0.1:/b", host: "10.0.0.1", path: "/b"},
		{in: "[2001:db8::1]:/b", host: "2001:db8::1", path: "/b"},
		{in: "gfs1:/", want: "The root directory cannot be a brick"},
		{in: "gfs1:b", want: "Wrong brick type: gfs1:b, use"},
		{in: ":/b", want: "Wrong brick type: :/b, use"},
		{in: "gf s1:/b", want: "does not conform to standards"},
		{in: "gfs1\x1b:/b", want: "does not conform to standards"},
		{in: "gfs1:/a/../../b", host: "gfs1", path: "/b"},
	} {
		host, path, err := brickName(c.in)
		if c.want == "" && (err != nil || host != c.host || path != c.path) || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%q: %q, %q, %v", c.in, host, path, err)
		}
	}
}

func TestReadConfig(t *testing.T) {
	file := filepath.Join(t.TempDir(), "mortar.toml")
	for _, c := range []struct{ text, want string }{
		{"", ""},
		{"listen = \":24008\"\nadvertise = [\"gfs1\", \"[::1]:7\"]\nname = \"gfs1\"\nwitness = true\n", ""},
		{"lisen = \":24008\"\n", `there is no setting "lisen"`},
		{"[log]\nlevel = 1\n", `there is no setting "log"`},
		{"listen = 5\n", "listen"},
		{"listen = \n", "line 1"},
		{"listen = \"nowhere\"\n", "want host:port or :port"},
		{"advertise = [\"a:b:c\"]\n", "\"a:b:c\" is no address"},
		{"advertise = [\"a:99999\"]\n", "port \"99999\""},
		{"name = \"a b\"\n", "a name has letters"},
		{"name = \"-x\"\n", "begins with a letter"},
		{"log-level = \"loud\"\n", "want debug, info, warn or error"},
		{"memory-limit = \"96MB\"\n", ""},
		{"memory-limit = \"much\"\n", `memory-limit = "much": want a size of at least 32MB`},
		{"memory-limit = \"1MB\"\n", "want a size of at least 32MB"},
		{"run-dir = \"/" + strings.Repeat("x", 100) + "\"\n", "more than the 107 that Linux allows"},
	} {
		if err := os.WriteFile(file, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		var cfg Config
		err := cfg.ReadConfig(file)
		if err == nil {
			err = cfg.validate()
		}
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%q: %v; want %q", c.text, err, c.want)
		}
		if strings.Contains(c.text, "24008\"\nadv") {
			if diff := cmp.Diff([]string{"gfs1:24008", "[::1]:7"}, cfg.Advertise); diff != "" {
				t.Error(diff)
			}
		}
	}
	if err := new(Config).ReadConfig(file + "-none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestLock(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	f, _, err := lockState(dir, 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := lockState(dir, 1); err == nil || !strings.Contains(err.Error(), "another mortar daemon (pid ") || !strings.Contains(err.Error(), "already runs on "+dir) {
		t.Errorf("second daemon: %v", err)
	}
	f.Close()
	f, _, err = lockState(dir, 1)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
}

// A daemon that was killed may hold the lock a moment longer than it lives.
func TestLockOfTheDead(t *testing.T) {
	for _, reaped := range []bool{true, false} {
		dir := t.TempDir()
		f, _, err := lockState(dir, 1)
		if err != nil {
			t.Fatal(err)
		}
		child := exec.Command("true")
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		pid := strconv.Itoa(child.Process.Pid)
		if reaped {
			child.Wait()
		}
		for !ended(pid) {
			time.Sleep(time.Millisecond)
		}
		f.Truncate(0)
		if _, err := f.WriteAt([]byte(pid+"\n"), 0); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(50*time.Millisecond, func() { f.Close() })
		if f, _, err := lockState(dir, 1); err != nil {
			t.Errorf("the lock of a process that has ended (reaped: %v) was not waited for: %v", reaped, err)
		} else {
			f.Close()
		}
		if !reaped {
			child.Wait()
		}
	}
}

func TestListenUnix(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "run", "s")
	ln, err := listenUnix(path, true)
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Lstat(path)
	if err != nil || fi.Mode().Type() != fs.ModeSocket || fi.Mode().Perm()&0o007 != 0 {
		t.Errorf("mode %v, %v; others may not use it", fi.Mode(), err)
	}
	if _, err := listenUnix(path, true); err == nil || !strings.Contains(err.Error(), "another daemon listens on "+path) {
		t.Errorf("second listener: %v", err)
	}
	done := make(chan bool)
	go func() {
		c, err := ln.Accept()
		ok := err == nil && trusted(c)
		if err == nil {
			c.Close()
		}
		done <- ok
	}()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if !<-done {
		t.Error("this very user is not trusted")
	}
	c.Close()
	ln.Close()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a closed socket remains: %v", err)
	}
	// What a daemon that died has left there is replaced.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	if ln, err = listenUnix(path, false); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	ln.Close()
	// Anything else is not touched: a link could lead anywhere.
	target := filepath.Join(dir, "target")
	for what, plant := range map[string]func() error{
		"link":          func() error { return os.Symlink(target, path) },
		"file":          func() error { return os.WriteFile(path, []byte("x"), 0o600) },
		"dangling link": func() error { return os.Symlink(target+"-none", path) },
	} {
		if err := os.WriteFile(target, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		os.Remove(path)
		if err := plant(); err != nil {
			t.Fatal(err)
		}
		if ln, err := listenUnix(path, true); err == nil {
			ln.Close()
			t.Errorf("%s: not refused", what)
		}
		if b, err := os.ReadFile(target); err != nil || string(b) != "precious" {
			t.Errorf("%s: its target is %q, %v", what, b, err)
		}
	}
	os.Remove(path)
	if err := os.Symlink(dir, filepath.Join(dir, "linked")); err != nil {
		t.Fatal(err)
	}
	if ln, err := listenUnix(filepath.Join(dir, "linked", "s"), true); err == nil {
		ln.Close()
		t.Error("a directory that is a link is not refused")
	}
}

func TestHostPort(t *testing.T) {
	for in, want := range map[string]string{
		"gfs1": "gfs1:24007", "gfs1:1": "gfs1:1", "10.0.0.1": "10.0.0.1:24007", "[::1]:5": "[::1]:5", "::1": "[::1]:24007",
		"": "", ":5": "", "a:0": "", "a:65536": "", "a:x": "", "[::1": "",
	} {
		got, err := hostPort(in, "")
		if got != want || (err != nil) != (want == "") {
			t.Errorf("hostPort(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
	if got, _ := hostPort("a", ":7"); got != "a:7" {
		t.Errorf("the port of listen counts: %s", got)
	}
}
