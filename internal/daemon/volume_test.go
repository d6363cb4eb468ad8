package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"mortar/internal/api"
	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/control/state"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica"
	"mortar/internal/wire"
)

// newVolume makes and starts a volume with a brick on each node.
func newVolume(t *testing.T, nodes []*testNode, name string) {
	t.Helper()
	r := api.VolumeCreate{Name: name, Replica: len(nodes), Force: true}
	for _, n := range nodes {
		r.Bricks = append(r.Bricks, n.cfg.Name+":"+filepath.Join(filepath.Dir(n.cfg.StateDir), "bricks", name))
	}
	if _, err := nodes[0].api.CreateVolume(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if err := nodes[0].api.StartVolume(t.Context(), name, false); err != nil {
		t.Fatal(err)
	}
	inSync(t, nodes, name)
}

// inSync waits until all bricks are online and in sync, as the first node sees it.
func inSync(t *testing.T, nodes []*testNode, name string) {
	t.Helper()
	eventually(t, "volume "+name+" is in sync", func() error {
		st, err := nodes[0].api.VolumeStatus(t.Context(), name, false)
		if err != nil {
			return err
		}
		for _, b := range st.Bricks {
			if !b.Online || !b.InSync {
				return fmt.Errorf("brick %s: online %v, in sync %v: %s", b.Name, b.Online, b.InSync, b.Problem)
			}
		}
		if s := st.Sets[0]; s.Primary == "" || !s.Writable {
			return fmt.Errorf("set: %+v", s)
		}
		return nil
	})
}

// mountless is a session on a node's data socket, without a kernel.
type mountless struct {
	t      *testing.T
	conn   *wire.Conn
	ended  chan error
	number uint64
}

func attach(t *testing.T, n *testNode, volume string, id cluster.SessionID) *mountless {
	t.Helper()
	nc, err := net.Dial("unix", n.cfg.DataSocket())
	if err != nil {
		t.Fatal(err)
	}
	s := &mountless{t: t, ended: make(chan error, 1)}
	s.conn = wire.New(nc, wire.Options{Handler: wire.HandlerFunc(func(c *wire.Conn, m wire.Message) {
		if m.Kind == proto.KindInval {
			var i proto.Inval
			if codec.Decode(m.Body, &i) == nil {
				c.Send(proto.KindInvalAck, codec.Append(nil, &proto.InvalAck{Seq: i.Seq}))
			}
		}
	})})
	go func() { s.ended <- s.conn.Run(context.Background()) }()
	t.Cleanup(s.close)
	var vm proto.VolumeMap
	s.call(proto.KindGetMap, &proto.GetMap{Volume: volume}, &vm)
	if vm.Status != proto.OK {
		t.Fatalf("map of %s: %s", volume, vm.Text)
	}
	eventually(t, "attach to "+n.cfg.Name, func() error {
		var r proto.AttachReply
		s.call(proto.KindAttach, &proto.Attach{Version: proto.Version, Set: cluster.SetID{Volume: vm.Volume}, Session: id, Client: "test"}, &r)
		if r.Status != proto.OK {
			return errors.New(r.Text)
		}
		return nil
	})
	var pong proto.Pong
	s.call(proto.KindPing, &proto.Ping{Stamp: 1}, &pong)
	return s
}

func (s *mountless) close() {
	if s.conn != nil {
		s.conn.Close(nil)
		<-s.ended
		s.conn = nil
	}
}

func (s *mountless) call(kind uint8, q, r codec.Coded) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	body, err := s.conn.Call(ctx, kind, codec.Append(nil, q))
	if err == nil {
		err = codec.Decode(body, r)
	}
	if err != nil {
		s.t.Fatalf("call of kind %d: %v", kind, err)
	}
}

// do runs an operation until the set can serve it.
func (s *mountless) do(op fsop.Op) (*fsop.Reply, error) {
	s.t.Helper()
	q := &proto.Do{Op: op}
	if op.Kind().Mutates() {
		s.number++
		q.Number, q.Acked = s.number, s.number
	}
	var r proto.DoReply
	eventually(s.t, fsop.String(op), func() error {
		r = proto.DoReply{}
		s.call(proto.KindDo, q, &r)
		if r.Status == proto.Anew {
			q.Epoch = r.Epoch
		}
		if r.Status != proto.OK {
			return fmt.Errorf("status %d", r.Status)
		}
		return nil
	})
	if r.Errno != 0 {
		return nil, r.Errno
	}
	return &r.Reply, nil
}

// write makes a file with that content; read reads it.
func (s *mountless) write(name, content string) {
	s.t.Helper()
	r, err := s.do(&fsop.Create{Node: fsop.Node{Parent: fsop.RootIno, Name: name, Mode: 0o644}})
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.do(&fsop.Write{Ino: r.Attr.Ino, Data: []byte(content)}); err != nil {
		s.t.Fatal(err)
	}
}

func (s *mountless) read(name string) (string, error) {
	s.t.Helper()
	r, err := s.do(&fsop.Lookup{Parent: fsop.RootIno, Name: name})
	if err != nil {
		return "", err
	}
	r, err = s.do(&fsop.Read{Ino: r.Attr.Ino, Len: 1 << 16})
	if err != nil {
		return "", err
	}
	return string(r.Data), nil
}

func TestVolume(t *testing.T) {
	nodes := newPool(t, 3)
	newVolume(t, nodes, "wp")
	v, err := nodes[2].api.Volume(t.Context(), "wp")
	if err != nil {
		t.Fatal(err)
	}
	if v.Type != "Replicate" || v.StatusText != "Started" || len(v.Bricks) != 3 {
		t.Errorf("volume %+v", v)
	}
	a, b := attach(t, nodes[0], "wp", 1), attach(t, nodes[1], "wp", 2)
	if _, err := b.read("hello"); err != fsop.ENOENT {
		t.Errorf("before: %v, want ENOENT", err)
	}
	a.write("hello", "world")
	if got, err := b.read("hello"); got != "world" || err != nil {
		t.Errorf("on the other node: %q, %v", got, err)
	}
	a.close()
	b.close()

	// The primary dies a planned death; the others go on.
	st, err := nodes[0].api.VolumeStatus(t.Context(), "wp", true)
	if err != nil {
		t.Fatal(err)
	}
	var lost *testNode
	var rest []*testNode
	for i, row := range st.Bricks {
		if row.Disk == nil || row.Disk.Total == 0 || row.Disk.FileSystem == "" {
			t.Errorf("brick %s: disk %+v", row.Name, row.Disk)
		}
		if row.Role == "primary" {
			lost = nodes[i]
		} else {
			rest = append(rest, nodes[i])
		}
	}
	if lost == nil {
		t.Fatalf("no primary in %+v", st)
	}
	lost.halt()
	c := attach(t, rest[0], "wp", 3)
	c.write("second", "file")
	if got, err := attach(t, rest[1], "wp", 4).read("second"); got != "file" || err != nil {
		t.Errorf("after the primary is gone: %q, %v", got, err)
	}
	lost.start()
	inSync(t, rest, "wp")
	if got, err := attach(t, lost, "wp", 5).read("second"); got != "file" || err != nil {
		t.Errorf("on the node that came back: %q, %v", got, err)
	}
	eventually(t, "nothing to heal", func() error {
		info, err := rest[0].api.HealInfo(t.Context(), "wp")
		if err != nil {
			return err
		}
		for _, b := range info.Bricks {
			if !b.Connected || b.Entries != 0 {
				return fmt.Errorf("%+v", b)
			}
		}
		return nil
	})
}

func TestVolumeRefusals(t *testing.T) {
	nodes := newPool(t, 2)
	n := nodes[0]
	dir := filepath.Dir(n.cfg.StateDir)
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(dir, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	newVolume(t, nodes[:1], "one")
	ctx := t.Context()
	for _, c := range []struct {
		bricks []string
		force  bool
		want   string
	}{
		{[]string{"n9:/b"}, true, "Host n9 is not in 'Peer in Cluster' state"},
		{[]string{"127.0.0.1:/b"}, true, "Please provide a valid hostname/ip other than localhost"},
		{[]string{"n1:" + dir + "/file"}, true, "which is already present, is not a directory"},
		{[]string{"n1:" + dir + "/link"}, true, "is a symbolic link"},
		{[]string{"n1:" + dir + "/bricks/one"}, true, "is already part of a volume"},
		{[]string{"n1:" + dir + "/bricks/one/sub"}, true, "Brick may be containing or be contained by an existing brick."},
		{[]string{"n1:" + n.cfg.StateDir + "/x"}, true, "Brick isn't allowed to be created inside mortar's working directory."},
		{[]string{"n1:" + dir + "/a", "n1:" + dir + "/a"}, true, "Found duplicate exports"},
		{[]string{"n1:/"}, true, "root"},
		{[]string{"n1:/proc/self/x"}, true, "Failed to create brick directory for brick n1:/proc/self/x. Reason : "},
	} {
		_, err := nodes[1].api.CreateVolume(ctx, api.VolumeCreate{Name: "two", Replica: len(c.bricks), Bricks: c.bricks, Force: c.force})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v; want %q", c.bricks, err, c.want)
		}
	}
	if vs, err := n.api.Volumes(ctx); err != nil || len(vs) != 1 {
		t.Errorf("volumes %v, %v: nothing may have been made", vs, err)
	}
	// A good brick is taken back when its sibling is not.
	_, err := n.api.CreateVolume(ctx, api.VolumeCreate{Name: "two", Replica: 2, Force: true,
		Bricks: []string{"n1:" + dir + "/fresh/brick", "n2:" + dir + "/bricks/one"}})
	if err == nil {
		t.Error("a volume with another's brick was made")
	}
	if _, err := os.Stat(filepath.Join(dir, "fresh", "brick", ".mortar")); err == nil {
		t.Error("the brick of a refused volume remains")
	}
	for _, c := range []struct {
		what string
		err  error
		code api.Code
		want string
	}{
		{"start twice", n.api.StartVolume(ctx, "one", false), api.VolumeStarted, "Volume one already started"},
		{"delete started", n.api.DeleteVolume(ctx, "one"), api.VolumeStarted, "Volume one has been started.Volume needs to be stopped before deletion."},
		{"start unknown", n.api.StartVolume(ctx, "none", false), api.NoVolume, "Volume none does not exist"},
		{"stop", n.api.StopVolume(ctx, "one", false), "", ""},
		{"stop twice", n.api.StopVolume(ctx, "one", false), api.VolumeStopped, "Volume one is not in the started state"},
		{"delete", n.api.DeleteVolume(ctx, "one"), "", ""},
	} {
		switch {
		case c.code == "" && c.err != nil:
			t.Errorf("%s: %v", c.what, c.err)
		case c.code != "" && (!api.IsCode(c.err, c.code) || c.err.Error() != c.want):
			t.Errorf("%s: %#v, want %s: %s", c.what, c.err, c.code, c.want)
		}
	}
	// The data stay, and their directory is not used again.
	_, err = n.api.CreateVolume(ctx, api.VolumeCreate{Name: "one", Bricks: []string{"n1:" + dir + "/bricks/one"}, Force: true})
	if err == nil || !strings.Contains(err.Error(), "is already part of a volume") {
		t.Errorf("re-use: %v", err)
	}
}

// TestPlain: a volume without encryption, and one that changes over while it is used.
func TestPlain(t *testing.T) {
	nodes := newPool(t, 2)
	newVolume(t, nodes, "v")
	a, b := attach(t, nodes[0], "v", 1), attach(t, nodes[1], "v", 2)
	for i, value := range []string{"on", "off", "on", "off"} {
		if _, err := nodes[i%2].api.SetOptions(t.Context(), "v", []api.Option{{Key: cluster.OptEncryption, Value: value}}); err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("file-%d", i)
		a.write(name, value)
		if got, err := b.read(name); got != value || err != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		inSync(t, nodes, "v")
	}
	eventually(t, "the connection in the clear is up", func() error {
		for i, n := range nodes {
			if n.current().links.conn(nodes[1-i].ID(), plain) == nil {
				return fmt.Errorf("%s has none", n.cfg.Name)
			}
		}
		return nil
	})
}

// TestAnyPeerAtOnce: what was done through one peer can be gone on with through
// any other at once.
func TestAnyPeerAtOnce(t *testing.T) {
	nodes := newPool(t, 3)
	ctx := t.Context()
	for round := range 6 {
		at := func(i int) *testNode { return nodes[(round+i)%3] }
		name := fmt.Sprintf("v%d", round)
		r := api.VolumeCreate{Name: name, Bricks: []string{"n1:" + filepath.Join(filepath.Dir(nodes[0].cfg.StateDir), "bricks", name)}, Force: true}
		if _, err := at(0).api.CreateVolume(ctx, r); err != nil {
			t.Fatal(err)
		}
		for i := range 6 {
			value := fmt.Sprintf("%ds", 30+i)
			if _, err := at(i+1).api.SetOptions(ctx, name, []api.Option{{Key: cluster.OptCacheTimeout, Value: value}}); err != nil {
				t.Fatal(err)
			}
			if i%2 == 0 {
				continue // the next knows only what it hears by itself
			}
			v, err := at(i+2).api.Volume(ctx, name)
			if err != nil {
				t.Fatal(err)
			}
			if len(v.Options) != 1 || v.Options[0].Value != value {
				t.Errorf("another peer knows of %v, not of %s", v.Options, value)
			}
		}
		var all sync.WaitGroup
		for i, o := range []api.Option{{Key: cluster.OptCacheTimeout, Value: "1m0s"}, {Key: cluster.OptIOTimeout, Value: "1m0s"}, {Key: cluster.OptAuthAllow, Value: "10.*"}} {
			all.Go(func() {
				if _, err := at(i).api.SetOptions(ctx, name, []api.Option{o}); err != nil {
					t.Errorf("three peers at once: %v", err)
				}
			})
		}
		all.Wait()
		if err := at(1).api.StartVolume(ctx, name, false); err != nil {
			t.Fatal(err)
		}
		attach(t, nodes[0], name, 1).close()
		for i := range 3 {
			if v, err := at(i).api.Volume(ctx, name); err != nil || v.Status != int(cluster.VolumeStarted) {
				t.Errorf("after the start: %+v, %v", v, err)
			}
		}
		if err := at(2).api.StopVolume(ctx, name, false); err != nil {
			t.Fatal(err)
		}
		if err := at(0).api.DeleteVolume(ctx, name); err != nil {
			t.Fatal(err)
		}
		if vs, err := at(1).api.Volumes(ctx); err != nil || len(vs) != 0 {
			t.Errorf("after the deletion: %+v, %v", vs, err)
		}
		for i := range 3 { // each has heard of the change before by itself, or not yet
			if _, err := at(i).api.Drain(ctx, "n2"); err != nil {
				t.Errorf("drained through a peer: %v", err)
			}
			if err := at(i+1).api.Undrain(ctx, "n2"); err != nil {
				t.Errorf("undrained through another at once: %v", err)
			}
		}
	}
}

// That an epoch has been decided is no refusal: it may have been by an earlier proposal of the same brick.
func TestDecidedIsNotRefused(t *testing.T) {
	nodes := newPool(t, 1)
	newVolume(t, nodes, "v")
	m := nodes[0].current()
	now := m.latest().Volume("v").Sets[0].Clone()
	if err := (setControl{m}).Propose(t.Context(), now); !errors.Is(err, state.ErrStaleEpoch) || errors.Is(err, replica.ErrRefused) {
		t.Errorf("what is decided already: %v", err)
	}
	wrong := now.Clone()
	wrong.Epoch++
	wrong.MinInSync++
	if err := (setControl{m}).Propose(t.Context(), wrong); !errors.Is(err, replica.ErrRefused) {
		t.Errorf("what cannot be: %v", err)
	}
}

// TestVerify: replicas that were written to, and one that was away, are identical.
func TestVerify(t *testing.T) {
	nodes := newPool(t, 3)
	newVolume(t, nodes, "v")
	s := attach(t, nodes[0], "v", 1)
	s.write("one", "1")
	nodes[2].halt()
	s.write("two", strings.Repeat("2", 100000))
	nodes[2].start()
	inSync(t, nodes, "v")
	r, err := nodes[1].api.Heal(t.Context(), "v", api.HealRequest{Full: true, Verify: true})
	if err != nil {
		t.Fatal(err)
	}
	if !r.Same || len(r.Digests) != 3 {
		t.Errorf("%+v", r)
	}
	for _, d := range r.Digests {
		if d.Sum == "" || d.Sum != r.Digests[0].Sum || d.At != r.Digests[0].At || d.Inodes != 3 || d.Bytes != 100001 {
			t.Errorf("%+v", d)
		}
	}
}

// TestLostDisk: a brick whose disk is not mounted is not served, says why, and
// is served as soon as the disk is there.
func TestLostDisk(t *testing.T) {
	nodes := newPool(t, 2)
	newVolume(t, nodes, "v")
	second := nodes[1]
	home := filepath.Join(filepath.Dir(second.cfg.StateDir), "bricks", "v", ".mortar")
	second.halt()
	if err := os.Rename(home, home+"-away"); err != nil {
		t.Fatal(err)
	}
	second.start()
	status := func() (api.BrickStatus, error) {
		st, err := nodes[0].api.VolumeStatus(t.Context(), "v", false)
		if err != nil {
			return api.BrickStatus{}, err
		}
		return st.Bricks[1], nil
	}
	eventually(t, "the reason is shown", func() error {
		b, err := status()
		if err == nil && (b.Online || !strings.Contains(b.Problem, "brick.json is missing; is the disk mounted")) {
			err = fmt.Errorf("%+v", b)
		}
		return err
	})
	if _, err := os.Lstat(home); err == nil {
		t.Error("a brick was made where the disk is missing")
	}
	if err := os.Rename(home+"-away", home); err != nil {
		t.Fatal(err)
	}
	if err := second.api.StartVolume(t.Context(), "v", true); err != nil {
		t.Fatal(err)
	}
	inSync(t, nodes, "v")
}
