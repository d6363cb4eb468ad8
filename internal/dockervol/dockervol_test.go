package dockervol

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"mortar/internal/mountinfo"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// engine speaks to a driver as Docker's does.
type engine struct {
	t    *testing.T
	http *http.Client
}

func serve(t *testing.T, d *Driver) *engine {
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := d.Serve(ctx, ln); err != nil {
			t.Error(err)
		}
	})
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", ln.Addr().String())
	}}
	t.Cleanup(func() { tr.CloseIdleConnections(); cancel(); wg.Wait() })
	return &engine{t, &http.Client{Transport: tr}}
}

// call makes a call and returns the answer as it is, less spaces.
func (e *engine) call(name, body string) string {
	e.t.Helper()
	resp, err := e.http.Post("http://plugin/"+name, "application/vnd.docker.plugins.v1.2+json", strings.NewReader(body))
	if err != nil {
		e.t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		e.t.Fatal(err)
	}
	if resp.StatusCode != 200 {
		return resp.Status
	}
	var out bytes.Buffer
	if err := json.Compact(&out, raw); err != nil {
		e.t.Fatalf("%s: %q", name, raw)
	}
	return out.String()
}

// TestProtocol: the nine calls, from nothing to nothing.
func TestProtocol(t *testing.T) {
	w := testWorld(t)
	e := serve(t, w.daemon(t))
	for _, step := range []struct{ call, body, want string }{
		{"Plugin.Activate", ``, `{"Implements":["VolumeDriver"],"Err":""}`},
		{"VolumeDriver.Capabilities", `{}`, `{"Capabilities":{"Scope":"global"},"Err":""}`},
		{"VolumeDriver.List", `{}`, `{"Err":""}`},
		{"VolumeDriver.Get", `{"Name":"demo"}`, `{"Err":"mortar: there is no Docker volume demo: make it with \"docker volume create -d mortar demo\""}`},
		{"VolumeDriver.Create", `{"Name":"demo","Opts":{"color":"red"}}`, `{"Err":"mortar: Docker volume demo: there is no option \"color\"; there are gid, mode, replica, ro, size, subdir, uid, volume"}`},
		{"VolumeDriver.Create", `{"Name":"demo","Opts":{"uid":"33"}}`, `{"Err":""}`},
		{"VolumeDriver.Create", `{"Name":"demo"}`, `{"Err":""}`},
		{"VolumeDriver.Create", `{"Name":"demo","Opts":{"uid":"34"}}`, `{"Err":"mortar: there is a Docker volume demo already, and its uid is 33 and not 34"}`},
		{"VolumeDriver.Path", `{"Name":"demo"}`, `{"Err":"mortar: Docker volume demo is not mounted on this machine: no container here uses it"}`},
		{"VolumeDriver.Mount", `{"Name":"demo","ID":""}`, `{"Err":"mortar: the engine gave no id for the mount"}`},
		{"VolumeDriver.Mount", `{"Name":"other","ID":"a"}`, `{"Err":"mortar: there is no Docker volume other: make it with \"docker volume create -d mortar other\""}`},
		{"VolumeDriver.Mount", `{"Name":"demo","ID":"a"}`, `{"Mountpoint":"/mnt/demo","Err":""}`},
		{"VolumeDriver.Mount", `{"Name":"demo","ID":"a"}`, `{"Mountpoint":"/mnt/demo","Err":""}`},
		{"VolumeDriver.Mount", `{"Name":"demo","ID":"b"}`, `{"Mountpoint":"/mnt/demo","Err":""}`},
		{"VolumeDriver.Path", `{"Name":"demo"}`, `{"Mountpoint":"/mnt/demo","Err":""}`},
		{"VolumeDriver.Get", `{"Name":"demo"}`, `{"Volume":{"Name":"demo","Mountpoint":"/mnt/demo","CreatedAt":"0001-01-01T00:00:00Z","Status":{"containers":2,"directory":"/demo","state":"ready","volume":"wp"}},"Err":""}`},
		{"VolumeDriver.Unmount", `{"Name":"demo","ID":"a"}`, `{"Err":""}`},
		{"VolumeDriver.Unmount", `{"Name":"demo","ID":"a"}`, `{"Err":""}`},
		{"VolumeDriver.Path", `{"Name":"demo"}`, `{"Mountpoint":"/mnt/demo","Err":""}`},
		{"VolumeDriver.Unmount", `{"Name":"demo","ID":"b"}`, `{"Err":""}`},
		{"VolumeDriver.List", `{}`, `{"Volumes":[{"Name":"demo","CreatedAt":"0001-01-01T00:00:00Z","Status":{"containers":0,"directory":"/demo","state":"ready","volume":"wp"}}],"Err":""}`},
		{"VolumeDriver.Remove", `{"Name":"demo"}`, `{"Err":""}`},
		{"VolumeDriver.Remove", `{"Name":"demo"}`, `{"Err":"mortar: there is no Docker volume demo: make it with \"docker volume create -d mortar demo\""}`},
		{"VolumeDriver.Remove", `nonsense`, `{"Err":"mortar: VolumeDriver.Remove: the request is not JSON as Docker's plugins get it: invalid character 'o' in literal null (expecting 'u')"}`},
		{"VolumeDriver.Dance", `{}`, `404 Not Found`},
	} {
		if got := e.call(step.call, step.body); got != step.want {
			t.Errorf("%s %s\ngot  %s\nwant %s", step.call, step.body, got, step.want)
		}
	}
	if len(w.mounts) > 0 {
		t.Errorf("mounted at the end: %v", w.mounts)
	}
}

// TestMountFails: the engine hears why, and nothing stays.
func TestMountFails(t *testing.T) {
	w := testWorld(t, "demo")
	d := w.daemon(t)
	for _, c := range []struct {
		what string
		edit func()
		want string
	}{
		{"the mount fails", func() { w.fail = errors.New("no brick in sync") }, "no brick in sync"},
		{"the engine does not see it", func() { w.blind = true }, "does not see it"},
		{"it is being removed", func() { w.volumes["demo"].State = Removing }, "is being removed"},
	} {
		c.edit()
		dir, err := d.Mount(t.Context(), "demo", "a", 1)
		if err == nil || !strings.Contains(err.Error(), c.want) || dir != "" {
			t.Errorf("%s: %q, %v", c.what, dir, err)
		}
		if len(w.mounts) > 0 || len(w.prepared) > 0 || len(d.uses.Held) > 0 || d.InUse("demo") > 0 {
			t.Errorf("%s: mounts %v at %v, uses %v", c.what, w.mounts, w.prepared, d.uses.Held)
		}
		w.blind = false
	}
}

// TestHalfMade: a volume that somebody died over is finished before it is mounted.
func TestHalfMade(t *testing.T) {
	w := testWorld(t, "demo")
	w.volumes["demo"].State = Making
	d := w.daemon(t)
	if _, err := d.Mount(t.Context(), "demo", "a", 1); err != nil {
		t.Fatal(err)
	}
	if len(w.made) != 1 || w.made[0].Name != "demo" {
		t.Errorf("made: %v", w.made)
	}
}

// slow is a world in which a mount takes a while.
type slow struct {
	*world
	takes time.Duration
	calls int
}

func (s *slow) Mount(ctx context.Context, v *Volume, dir string) error {
	s.calls++
	select {
	case <-time.After(s.takes):
		return s.world.Mount(ctx, v, dir)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// TestTogether: requests for one volume share one mount; while it is made the
// volume counts as used, other calls are answered at once, and who waits in vain
// hears it.
func TestTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := testWorld(t, "demo", "app")
		d := w.daemon(t)
		s := &slow{world: w, takes: 30 * time.Second}
		d.cfg.Mounter, d.cfg.Patience = s, Patience
		var wg sync.WaitGroup
		for _, id := range []string{"a", "b", "c"} {
			wg.Go(func() {
				if _, err := d.Mount(t.Context(), "demo", id, 1); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		before := time.Now()
		if n := d.InUse("demo"); n != 3 {
			t.Errorf("%d uses while it is mounted", n)
		}
		if all, err := d.List(); err != nil || len(all) != 2 || time.Since(before) > 0 {
			t.Errorf("%v after %v", all, time.Since(before))
		}
		wg.Wait()
		if s.calls != 1 || d.InUse("demo") != 3 {
			t.Errorf("%d mounts, %d uses", s.calls, d.InUse("demo"))
		}
		// The pool is silent.
		s.takes = time.Hour
		before = time.Now()
		if _, err := d.Mount(t.Context(), "app", "a", 1); err == nil || time.Since(before) > 2*time.Minute {
			t.Errorf("%v after %v", err, time.Since(before))
		}
		if len(d.slots) > 0 {
			t.Errorf("slots %v", d.slots)
		}
	})
}

func TestChoose(t *testing.T) {
	wp, one, off := Backing{"wp", 3, true}, Backing{"one", 1, true}, Backing{"off", 3, false}
	for _, c := range []struct {
		opts   map[string]string
		all    []Backing
		preset string
		want   string // of the volume, or part of the error
	}{
		{nil, []Backing{wp}, "", "wp"},
		{nil, nil, "", "make one with"},
		{nil, []Backing{off}, "", "no started volume"},
		{nil, []Backing{wp, off}, "", "wp"},
		{nil, []Backing{wp, one}, "", "-o volume=NAME (one, wp)"},
		{nil, []Backing{wp, one}, "wp", "wp"},
		{nil, []Backing{wp, one}, "gone", "the daemon's docker-volume is gone"},
		{nil, []Backing{wp}, "gone", "the daemon's docker-volume is gone"},
		{map[string]string{"volume": "one"}, []Backing{wp, one}, "wp", "one"},
		{map[string]string{"volume": "two"}, []Backing{wp, one}, "wp", "there is no volume two"},
		{map[string]string{"volume": "off"}, []Backing{wp, off}, "", "is not started"},
		{map[string]string{"replica": "1"}, []Backing{wp, one}, "wp", "one"},
		{map[string]string{"replica": "2"}, []Backing{wp, one}, "", "no started volume with replica 2"},
		{map[string]string{"replica": "1", "volume": "wp"}, []Backing{wp, one}, "", "keeps 3 copies and not 1"},
		{map[string]string{"replica": "3", "volume": "wp"}, []Backing{wp, one}, "", "wp"},
	} {
		w, err := parseOptions("demo", c.opts)
		if err != nil {
			t.Fatal(err)
		}
		got, err := w.choose(c.all, c.preset)
		if err != nil {
			got = err.Error()
		}
		if got != c.want && (err == nil || !strings.Contains(got, c.want)) {
			t.Errorf("%v of %v with %q: %q, want %q", c.opts, c.all, c.preset, got, c.want)
		}
	}
}

func TestOptions(t *testing.T) {
	w, err := parseOptions("demo", map[string]string{"size": "1.5GB", "uid": "33", "gid": "34", "mode": "2775", "ro": ""})
	if err != nil {
		t.Fatal(err)
	}
	if want := (Volume{Name: "demo", Dir: "demo", Own: true, Size: 3 << 29, UID: 33, GID: 34, Mode: 0o2775, ReadOnly: true}); w.Volume != want {
		t.Errorf("%+v", w.Volume)
	}
	w, err = parseOptions("demo", map[string]string{"subdir": "/sites/one/", "ro": "false"})
	if err != nil || w.Dir != "sites/one" || w.Own || w.ReadOnly {
		t.Errorf("%+v, %v", w, err)
	}
	for key, values := range map[string][]string{
		"size": {"", "0", "-1", "big", "1e30", "NaN", "9999999P", "1GG"}, "replica": {"0", "x"}, "uid": {"-1", "root", "4294967295"},
		"mode": {"rwx", "99999", "8"}, "subdir": {"", "/", "..", "a/../..", "a/../b"}, "ro": {"maybe"}, "volume": {"", "a/b"}, "Size": {"1GB"},
	} {
		for _, v := range values {
			if _, err := parseOptions("demo", map[string]string{key: v}); err == nil || !strings.Contains(err.Error(), key) {
				t.Errorf("%s=%q: %v", key, v, err)
			}
		}
	}
	if _, err := parseOptions("demo", map[string]string{"subdir": "x", "size": "1GB"}); err == nil {
		t.Error("subdir with size")
	}
}

func TestMountPoints(t *testing.T) {
	got := ours(mountinfo.Parse("25 30 0:23 / /sys rw shared:7 - sysfs sysfs rw\n" +
		"90 30 0:55 /demo /run/mortar/docker/de\\040mo rw,nosuid shared:44 master:1 - fuse.mortar localhost:/wp rw,user_id=0\n" +
		"91 30 0:56 / /run/mortar/docker/x rw - fuse.other x rw\n- \n"))
	if len(got) != 1 || !got["/run/mortar/docker/de mo"] {
		t.Errorf("%v", got)
	}
}

func TestElsewhere(t *testing.T) {
	const dir = "/run/mortar/docker/demo"
	own := "90 30 0:55 /demo " + dir + " rw - fuse.mortar x rw\n"
	if got := deviceAt(mountinfo.Parse("80 30 0:20 / /run rw - tmpfs x rw\n"+own), dir); got != "0:55" {
		t.Errorf("device %q", got)
	}
	if shownElsewhere(mountinfo.Parse(own), "0:55", dir) {
		t.Error("a copy of the namespace is no container")
	}
	if !shownElsewhere(mountinfo.Parse("7 6 0:55 /demo /data rw - fuse.mortar x rw\n"), "0:55", dir) || shownElsewhere(mountinfo.Parse("7 6 0:56 /demo /data rw - fuse.mortar x rw\n"), "0:55", dir) {
		t.Error("a container's mount")
	}
	k := Linux{}
	self := k.Process(os.Getpid())
	if self == "" || k.Gone(self) || !k.Gone(self+"0") || k.Process(0) != "" {
		t.Errorf("this process is %q", self)
	}
}
