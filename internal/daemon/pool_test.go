package daemon

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"mortar/internal/api"
)

func TestProbe(t *testing.T) {
	first := newNode(t, "gfs1", nil)
	second := newNode(t, "gfs2", func(c *Config) { c.AcceptProbe = true })
	shy := newNode(t, "gfs3", nil)
	ctx := t.Context()
	probe := func(host string) (*api.ProbeReply, error) { return first.api.Probe(ctx, api.ProbeRequest{Host: host}) }

	r, err := probe(second.cfg.Listen)
	if err != nil || r.Result != api.ProbeAdded || r.Peer != second.ID().String() {
		t.Fatalf("probe of a fresh machine: %+v, %v", r, err)
	}
	first.connected(2)
	second.connected(2)
	if r, err := probe(second.cfg.Listen); err != nil || r.Result != api.ProbeAlready {
		t.Errorf("probe again: %+v, %v", r, err)
	}
	if r, err := probe(first.cfg.Listen); err != nil || r.Result != api.ProbeLocalhost {
		t.Errorf("probe of itself: %+v, %v", r, err)
	}
	// A pool of its own is not taken over.
	other := newNode(t, "other", func(c *Config) { c.AcceptProbe = true })
	if _, err := other.api.Invite(ctx, api.InviteRequest{}); err != nil {
		t.Fatal(err)
	}
	nobody := reserve(t)
	for _, c := range []struct{ host, want string }{
		{shy.cfg.Listen, "was not started to be probed. Start it there with \"mortar server --accept-probe\""},
		{other.cfg.Listen, "127.0.0.1 is either already part of another cluster or having volumes configured"},
		{nobody, "Probe returned with Transport endpoint is not connected (from this machine, gfs1: cannot connect to " + nobody},
		{"a b", "\"a b\" is an invalid address"},
		{"", "\"\" is an invalid address"},
	} {
		if _, err := probe(c.host); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("probe %s: %v; want %q", c.host, err, c.want)
		}
	}
}

// forward listens and passes connections on to addr, as a NAT would.
func forward(t *testing.T, addr string) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			a, err := ln.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", addr)
			if err != nil {
				a.Close()
				continue
			}
			t.Cleanup(func() { a.Close(); b.Close() })
			go func() { io.Copy(a, b); a.Close() }()
			go func() { io.Copy(b, a); b.Close() }()
		}
	}()
	t.Cleanup(func() { ln.Close(); <-done })
	return ln.Addr().String()
}

func TestJoinRefused(t *testing.T) {
	first := newNode(t, "n1", nil)
	second := newNode(t, "n2", nil)
	ctx := t.Context()
	inv, err := first.api.Invite(ctx, api.InviteRequest{})
	if err != nil {
		t.Fatal(err)
	}
	join := func(n *testNode, token string, hosts ...string) error {
		_, err := n.api.Join(ctx, api.JoinRequest{Token: token, Hosts: hosts})
		return err
	}
	stranger := newNode(t, "stranger", nil)
	strange, err := stranger.api.Invite(ctx, api.InviteRequest{})
	if err != nil {
		t.Fatal(err)
	}
	nobody := reserve(t)
	wrong := inv.Token[:len(inv.Token)-3] + "000" // another secret
	for _, c := range []struct {
		what, token string
		hosts       []string
		want        string
	}{
		{"no token", "SWMTKN-1-x-y", inv.Hosts, "not a join token"},
		{"cut off", inv.Token[:40], inv.Hosts, "not a join token"},
		{"wrong secret", wrong, inv.Hosts, "the token is not known to the pool, was used, or has expired"},
		{"another pool's", strange.Token, inv.Hosts, "the token is not one of that machine's pool"},
		{"nobody there", inv.Token, []string{nobody}, "from this machine (n2) the pool cannot be reached: cannot connect to " + nobody},
		{"no hosts", inv.Token, nil, "give the address of a machine of the pool"},
		{"itself", inv.Token, []string{second.cfg.Listen}, "from this machine (n2) the pool cannot be reached"},
	} {
		if err := join(second, c.token, c.hosts...); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", c.what, err, c.want)
		}
	}
	// The pool must be able to connect back.
	blocked := newNode(t, "n4", func(c *Config) { c.Advertise = []string{nobody} })
	blocked.port = netip.MustParseAddrPort(nobody).Port() // as if a firewall let nothing in
	if err := join(blocked, inv.Token, inv.Hosts...); err == nil ||
		!strings.Contains(err.Error(), "n4 can reach n1, and not the other way round: from n1 ") || !strings.Contains(err.Error(), "--advertise") {
		t.Errorf("blocked: %v", err)
	}
	// None of this has used the token up; one use does.
	if err := join(second, inv.Token, inv.Hosts...); err != nil {
		t.Fatal(err)
	}
	third := newNode(t, "n3", nil)
	if err := join(third, inv.Token, inv.Hosts...); !api.IsCode(err, api.Forbidden) {
		t.Errorf("used token: %v", err)
	}
	// A member of a pool of two does not join another.
	if err := join(second, strange.Token, strange.Hosts...); !api.IsCode(err, api.Conflict) ||
		!strings.Contains(err.Error(), "is either already part of another cluster or having volumes configured") {
		t.Errorf("join from a pool: %v", err)
	}
	// A machine with a pool of its own, in which there is nothing, does.
	if err := join(stranger, mustInvite(t, first), inv.Hosts...); err != nil {
		t.Error(err)
	}
	stranger.connected(3)
}

func mustInvite(t *testing.T, n *testNode) string {
	t.Helper()
	inv, err := n.api.Invite(t.Context(), api.InviteRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return inv.Token
}

func TestDetach(t *testing.T) {
	nodes := newPool(t, 3)
	ctx := t.Context()
	newVolume(t, nodes[:2], "v")
	for _, c := range []struct {
		host string
		want string
	}{
		{"n1", "n1 is localhost"},
		{"n2", "Peer n2 hosts one or more bricks."},
		{"n9", "n9 is not part of cluster"},
	} {
		if err := nodes[0].api.Detach(ctx, c.host, false); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("detach %s: %v; want %q", c.host, err, c.want)
		}
	}
	if err := nodes[0].api.Detach(ctx, "n3", false); err != nil {
		t.Fatal(err)
	}
	nodes[0].connected(2)
	// The detached machine is a fresh one again, and may come back.
	eventually(t, "n3 belongs to no pool", func() error {
		p, err := nodes[2].api.Pool(ctx)
		if err != nil {
			return err
		}
		if p.ID != "" || len(p.Peers) != 1 {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
	hosts := []string{nodes[0].cfg.Listen}
	if _, err := nodes[2].api.Join(ctx, api.JoinRequest{Token: mustInvite(t, nodes[0]), Hosts: hosts}); err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		n.connected(3)
	}
	// One that is down when it is detached hears of it when it is back.
	nodes[2].halt()
	eventually(t, "n3 is seen to be down", func() error {
		p, err := nodes[0].api.Pool(ctx)
		if err == nil && p.Peers[2].Connected {
			err = fmt.Errorf("%+v", p.Peers[2])
		}
		return err
	})
	if err := nodes[0].api.Detach(ctx, "n3", false); !api.IsCode(err, api.NodeDown) {
		t.Errorf("detach of a peer that is down: %v", err)
	}
	if err := nodes[0].api.Detach(ctx, "n3", true); err != nil {
		t.Fatal(err)
	}
	nodes[2].start()
	eventually(t, "n3 belongs to no pool", func() error {
		p, err := nodes[2].api.Pool(ctx)
		if err != nil {
			return err
		}
		if p.ID != "" {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
}

// A peer that has not heard yet of what another one was asked for a moment ago detaches all the same:
// it is nobody's mistake that it is behind.
func TestDetachByAPeerThatIsBehind(t *testing.T) {
	nodes := newPool(t, 3)
	ctx := t.Context()
	for i, n := range nodes[:2] { // one of the two does not lead
		other := nodes[1-i]
		if err := n.api.Undrain(ctx, "n3"); err != nil {
			t.Fatal(err)
		}
		if _, err := n.api.Drain(ctx, "n3"); err != nil {
			t.Fatal(err)
		}
		if err := other.api.Detach(ctx, "n3", false); err != nil {
			t.Fatalf("drained by %s, detached by %s: %v", n.cfg.Name, other.cfg.Name, err)
		}
		eventually(t, "n3 belongs to no pool", func() error {
			p, err := nodes[2].api.Pool(ctx)
			if err == nil && p.ID != "" {
				err = fmt.Errorf("%+v", p)
			}
			return err
		})
		if _, err := nodes[2].api.Join(ctx, api.JoinRequest{Token: mustInvite(t, nodes[0]), Hosts: []string{nodes[0].cfg.Listen}}); err != nil {
			t.Fatal(err)
		}
		for _, n := range nodes {
			n.connected(3)
		}
	}
}

// copyDir copies a directory, as somebody who clones a machine does.
func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	filepath.Walk(to, func(path string, fi os.FileInfo, err error) error { // CopyFS widens modes
		if err == nil && !fi.IsDir() {
			os.Chmod(path, 0o600)
		}
		return err
	})
}

func TestClone(t *testing.T) {
	nodes := newPool(t, 3)
	ctx := t.Context()
	third := nodes[2]
	dir, err := os.MkdirTemp("", "mortar-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	third.halt()
	copyDir(t, third.cfg.StateDir, filepath.Join(dir, "state"))
	third.start()
	third.connected(3)
	clone := newNode(t, "n3", func(c *Config) { c.StateDir = filepath.Join(dir, "state") })
	eventually(t, "the copy is refused", func() error {
		_, err := clone.api.Invite(ctx, api.InviteRequest{})
		if !api.IsCode(err, api.Cloned) || !strings.Contains(err.Error(), "--new-identity") {
			return fmt.Errorf("invite on the copy: %v", err)
		}
		return nil
	})
	// The original goes on.
	for _, n := range nodes {
		n.connected(3)
	}
	if _, err := third.api.Invite(ctx, api.InviteRequest{}); err != nil {
		t.Errorf("the original: %v", err)
	}
	// With an identity of its own the copy is a machine like any other.
	clone.halt()
	clone.cfg.NewIdentity, clone.cfg.Name = true, "n4"
	clone.start()
	if _, err := clone.api.Join(ctx, api.JoinRequest{Token: mustInvite(t, nodes[0]), Hosts: []string{nodes[0].cfg.Listen}}); err != nil {
		t.Fatal(err)
	}
	clone.connected(4)
}

// TestMove: a machine that comes back with another address is found, and its
// new address becomes known to all.
func TestMove(t *testing.T) {
	nodes := newPool(t, 3)
	third := nodes[2]
	third.halt()
	third.cfg.Listen = reserve(t)
	third.start()
	for _, n := range nodes {
		n.connected(3)
	}
	eventually(t, "the new address is recorded", func() error {
		p, err := nodes[0].api.Pool(t.Context())
		if err != nil {
			return err
		}
		if got := p.Peers[2]; len(got.Addrs) == 0 || got.Addrs[0] != third.cfg.Listen {
			return fmt.Errorf("%+v, want %s first", got, third.cfg.Listen)
		}
		return nil
	})
}

// TestNAT: a machine that is reached by way of a forwarded port says so.
func TestNAT(t *testing.T) {
	first := newNode(t, "n1", nil)
	second := newNode(t, "n2", nil)
	second.halt()
	second.cfg.Advertise = []string{forward(t, second.cfg.Listen)}
	second.start()
	inv, err := first.api.Invite(t.Context(), api.InviteRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := second.api.Join(t.Context(), api.JoinRequest{Token: inv.Token, Hosts: inv.Hosts}); err != nil {
		t.Fatal(err)
	}
	p, err := first.api.Pool(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := p.Peers[1].Addrs[0]; got != second.cfg.Advertise[0] {
		t.Errorf("first address %s, want %s", got, second.cfg.Advertise[0])
	}
}

func TestQuorum(t *testing.T) {
	nodes := newPool(t, 3)
	ctx := t.Context()
	eventually(t, "all three vote", func() error {
		p, err := nodes[0].api.Pool(ctx)
		if err != nil {
			return err
		}
		for _, x := range p.Peers {
			if !x.Voter {
				return fmt.Errorf("%s does not vote", x.Name)
			}
		}
		return nil
	})
	nodes[1].halt()
	nodes[2].halt()
	// What is known can still be looked at; what must be decided cannot be.
	p, err := nodes[0].api.Pool(ctx)
	if err != nil || len(p.Peers) != 3 {
		t.Errorf("pool without quorum: %+v, %v", p, err)
	}
	eventually(t, "the loss is noticed", func() error {
		_, err := nodes[0].api.Invite(ctx, api.InviteRequest{})
		if !api.IsCode(err, api.NoQuorum) {
			return fmt.Errorf("invite: %v", err)
		}
		return nil
	})
	nodes[1].start()
	eventually(t, "two of three decide again", func() error {
		_, err := nodes[0].api.Invite(ctx, api.InviteRequest{})
		return err
	})
}

func TestInviteBounds(t *testing.T) {
	n := newNode(t, "n1", nil)
	for _, r := range []api.InviteRequest{{TTL: -1}, {TTL: 31 * 24 * 3600}, {Uses: -1}, {Uses: 1001}} {
		if _, err := n.api.Invite(t.Context(), r); !api.IsCode(err, api.Invalid) {
			t.Errorf("%+v: %v", r, err)
		}
	}
	// Nothing was founded by nonsense.
	if p, err := n.api.Pool(t.Context()); err != nil || p.ID != "" {
		t.Errorf("%+v, %v", p, err)
	}
	if got, want := n.port, strconv.Itoa(int(n.port)); want != n.cfg.Listen[strings.LastIndex(n.cfg.Listen, ":")+1:] {
		t.Errorf("port %d of %s", got, n.cfg.Listen)
	}
}

func TestLeave(t *testing.T) {
	nodes := newPool(t, 3)
	ctx := t.Context()
	newVolume(t, nodes[:2], "v")
	if err := nodes[1].api.Leave(ctx); !api.IsCode(err, api.Conflict) || !strings.Contains(err.Error(), "hosts one or more bricks") {
		t.Errorf("leave with bricks: %v", err)
	}
	if err := nodes[2].api.Leave(ctx); err != nil {
		t.Fatal(err)
	}
	if p, err := nodes[2].api.Pool(ctx); err != nil || p.ID != "" {
		t.Errorf("%+v, %v", p, err)
	}
	nodes[0].connected(2)
	if err := nodes[2].api.Leave(ctx); !api.IsCode(err, api.Conflict) {
		t.Errorf("leave twice: %v", err)
	}
	// A pool of one with a volume is not thrown away; without one it is.
	if _, err := nodes[2].api.CreateVolume(ctx, api.VolumeCreate{Name: "own", Force: true, Bricks: []string{"n3:" + filepath.Join(filepath.Dir(nodes[2].cfg.StateDir), "own")}}); err != nil {
		t.Fatal(err)
	}
	if err := nodes[2].api.Leave(ctx); !api.IsCode(err, api.Conflict) {
		t.Errorf("leave with a volume: %v", err)
	}
	if err := nodes[2].api.DeleteVolume(ctx, "own"); err != nil {
		t.Fatal(err)
	}
	if err := nodes[2].api.Leave(ctx); err != nil {
		t.Error(err)
	}
	if _, err := nodes[2].api.Join(ctx, api.JoinRequest{Token: mustInvite(t, nodes[0]), Hosts: []string{nodes[0].cfg.Listen}}); err != nil {
		t.Error(err)
	}
	nodes[0].connected(3)
}
