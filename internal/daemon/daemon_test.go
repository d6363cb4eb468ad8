package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mortar/internal/api"
	"mortar/internal/wire/wiretest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testNode is a node that runs until it is stopped.
type testNode struct {
	*Node
	t    *testing.T
	cfg  Config
	api  *api.Client
	stop context.CancelFunc
	done chan error
}

// reserve returns an address that nobody else is given before the test ends, also while nobody
// listens there.
func reserve(t *testing.T) string {
	t.Helper()
	addr, release, err := wiretest.Reserve()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release)
	return addr
}

// newNode starts a node with a directory of its own under the test's.
func newNode(t *testing.T, name string, change func(*Config)) *testNode {
	t.Helper()
	// The path of a socket is short, that of a test's directory is not always.
	dir, err := os.MkdirTemp("", "mortar-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg := Config{
		StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run"),
		Listen: reserve(t), Name: name, Log: testLog(t, name),
	}
	if change != nil {
		change(&cfg)
	}
	n := &testNode{t: t, cfg: cfg}
	n.start()
	return n
}

// start starts the node, again with the same directories and port if it ran before.
func (n *testNode) start() {
	n.t.Helper()
	node, err := New(n.cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	n.cfg.Listen = node.Addr().String()
	n.cfg.NewIdentity = false
	n.Node = node
	ctx, stop := context.WithCancel(context.Background())
	n.stop, n.done = stop, make(chan error, 1)
	go func() { n.done <- node.Run(ctx) }()
	n.api = api.Unix(node.cfg.APISocket())
	n.t.Cleanup(n.halt)
}

// halt stops the node as a signal would, once.
func (n *testNode) halt() {
	if n.stop == nil {
		return
	}
	n.stop()
	n.stop = nil
	n.api.Close()
	select {
	case err := <-n.done:
		if err != nil {
			n.t.Errorf("%s: Run: %v", n.cfg.Name, err)
		}
	case <-time.After(time.Minute):
		n.t.Fatalf("%s does not stop", n.cfg.Name)
	}
}

// testLog logs to the test.
func testLog(t *testing.T, name string) *slog.Logger {
	level := slog.LevelInfo
	if os.Getenv("MORTAR_TEST_DEBUG") != "" {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: level})).With("node", name)
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSuffix(string(b), "\n"))
	return len(b), nil
}

// eventually waits until f returns nil.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// newPool starts nodes n1, n2, … in one pool, the first of which the others join.
func newPool(t *testing.T, size int) []*testNode {
	t.Helper()
	var nodes []*testNode
	for i := range size {
		nodes = append(nodes, newNode(t, fmt.Sprintf("n%d", i+1), nil))
	}
	inv, err := nodes[0].api.Invite(t.Context(), api.InviteRequest{Uses: max(size-1, 1)})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes[1:] {
		if _, err := n.api.Join(t.Context(), api.JoinRequest{Token: inv.Token, Hosts: inv.Hosts}); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range nodes {
		n.connected(size)
	}
	return nodes
}

// connected waits until the node sees that many peers, all of them connected.
func (n *testNode) connected(count int) {
	n.t.Helper()
	eventually(n.t, n.cfg.Name+" sees the pool", func() error {
		p, err := n.api.Pool(n.t.Context())
		if err != nil {
			return err
		}
		up := 0
		for _, x := range p.Peers {
			if x.Connected {
				up++
			}
		}
		if up != count || len(p.Peers) != count {
			return fmt.Errorf("%d peers, %d connected, want %d", len(p.Peers), up, count)
		}
		return nil
	})
}

func TestJoin(t *testing.T) {
	nodes := newPool(t, 3)
	ids := map[string]bool{}
	for _, n := range nodes {
		p, err := n.api.Pool(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ids[p.ID] = true
		var names []string
		for _, x := range p.Peers {
			names = append(names, x.Name)
			if x.Self != (x.Name == n.cfg.Name) {
				t.Errorf("%s: peer %s has self %v", n.cfg.Name, x.Name, x.Self)
			}
		}
		if got := strings.Join(names, " "); got != "n1 n2 n3" {
			t.Errorf("%s sees %s", n.cfg.Name, got)
		}
		if p.Leader == "" {
			t.Errorf("%s knows no leader", n.cfg.Name)
		}
	}
	if len(ids) != 1 {
		t.Errorf("pools %v, want one", ids)
	}
	// A restart changes nothing.
	nodes[0].halt()
	nodes[0].start()
	for _, n := range nodes {
		n.connected(3)
	}
}

// TestDriverSocket: of several daemons on a machine, the one with the usual directory
// is Docker's, unless others are told to be.
func TestDriverSocket(t *testing.T) {
	for _, c := range []struct{ runDir, setting, want string }{
		{DefaultRunDir, "", DefaultDockerSocket},
		{DefaultRunDir, "/x.sock", "/x.sock"},
		{DefaultRunDir, DockerOff, ""},
		{"/tmp/n1", "", ""},
		{"/tmp/n1", "/x.sock", "/x.sock"},
		{"/tmp/n1", DockerOff, ""},
	} {
		if got := (&Config{RunDir: c.runDir, DockerSocket: c.setting}).DriverSocket(); got != c.want {
			t.Errorf("run-dir %s, docker-socket %q: %q, want %q", c.runDir, c.setting, got, c.want)
		}
	}
}
