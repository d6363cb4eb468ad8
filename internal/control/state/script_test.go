package state

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"mortar/internal/cluster"
	"mortar/internal/proto"
)

// The scripts in testdata/apply drive a State with one command per line:
//
//	init n1 | add-peer n2 [witness|client] [token=LETTER now=N] | update-peer n2 [name=…] [addr=…] [witness=…]
//	remove-peer n2 | drain n2 | undrain n2 | incarnate n2 past=0
//	create v replica=3 n1:/a n2:/b n3:/c [force] [option=value …]
//	start v [primary=N] [force] | stop v [force] | delete v
//	set v option=value … | reset v [option …]
//	config v epoch=2 primary=1 in-sync=1,2 [floor=1.5] [chosen=2] [min=…] [members=…] [set=…] [force]
//	add-token LETTER [role=…] expires=N now=N [uses=N] | use-token LETTER [role=…] now=N | drop-token [LETTER] [now=N]
//	authority TEXT version=N | show [pool|volumes|tokens|all]
//
// A leading seen=N sets Command.Seen, a leading id=N the command's id. Peers are
// n1, n2, …; bricks are numbered from 1 within their volume.
type script struct {
	t *testing.T
	s *State
}

func TestApplyScripts(t *testing.T) {
	datadriven.Walk(t, "testdata/apply", func(t *testing.T, path string) {
		sc := &script{t: t, s: New()}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			if d.Cmd != "run" {
				d.Fatalf(t, "unknown directive %q", d.Cmd)
			}
			var out strings.Builder
			for line := range strings.SplitSeq(strings.TrimSpace(d.Input), "\n") {
				if line = strings.TrimSpace(line); line != "" {
					out.WriteString(sc.line(line))
				}
			}
			return out.String()
		})
	})
}

func peerID(name string) cluster.PeerID {
	n, _ := strconv.Atoi(strings.TrimPrefix(name, "n"))
	return cluster.ID{15: byte(n)}
}

func volumeID(name string) (id cluster.ID) {
	id[0] = 0xee
	copy(id[1:], name)
	return id
}

func brickID(volume string, n int) cluster.BrickID {
	id := volumeID(volume)
	id[0], id[15] = 0xbb, byte(n)
	return id
}

func tokenHash(letter string) string { return strings.Repeat(letter, 64)[:64] }

// args splits "word word key=value" into words and values.
func args(line string) (words []string, values map[string]string) {
	values = map[string]string{}
	for _, f := range strings.Fields(line) {
		if k, v, ok := strings.Cut(f, "="); ok {
			values[k] = v
		} else {
			words = append(words, f)
		}
	}
	return words, values
}

func num(s string) int64 {
	n, _ := strconv.ParseInt(s, 10, 64)
	return n
}

func parsePos(s string) cluster.Pos {
	e, q, _ := strings.Cut(s, ".")
	return cluster.Pos{Epoch: cluster.Epoch(num(e)), Seq: uint64(num(q))}
}

func (sc *script) line(line string) string {
	words, val := args(line)
	var cmd Command
	if v, ok := val["seen"]; ok {
		cmd.Seen = uint64(num(v))
		delete(val, "seen")
	}
	if v, ok := val["id"]; ok {
		cmd.ID = cluster.ID{15: byte(num(v))}
		delete(val, "id")
	}
	force := slices.Contains(words, "force")
	arg := func(i int) string {
		if i < len(words) {
			return words[i]
		}
		return ""
	}
	ids := func(volume, list string) (out []cluster.BrickID) {
		for f := range strings.SplitSeq(list, ",") {
			if f != "" {
				out = append(out, brickID(volume, int(num(f))))
			}
		}
		return out
	}
	peer := func(name string) cluster.Peer {
		return cluster.Peer{ID: peerID(name), Name: name, Addrs: []string{name + ":24007"}, Witness: slices.Contains(words, "witness") || slices.Contains(words, "client"), NoVote: slices.Contains(words, "client")}
	}
	switch words[0] {
	case "show":
		return sc.show(arg(1))
	case "init":
		cmd.Init = &Init{Pool: cluster.ID{0: 1}, Peer: peer(arg(1)), Authority: []byte("ca")}
	case "add-peer":
		p := peer(arg(1))
		if v, ok := val["name"]; ok {
			p.Name = v
		}
		if v, ok := val["addr"]; ok {
			p.Addrs = []string{v}
		}
		cmd.AddPeer = &AddPeer{Peer: p, Now: num(val["now"])}
		if v := val["token"]; v != "" {
			cmd.AddPeer.Token = tokenHash(v)
		}
	case "update-peer":
		u := &UpdatePeer{Peer: peerID(arg(1))}
		if v, ok := val["name"]; ok {
			u.Name = &v
		}
		if v, ok := val["addr"]; ok {
			u.Addrs = []string{v}
		}
		if v, ok := val["witness"]; ok {
			b := v == "true"
			u.Witness = &b
		}
		cmd.UpdatePeer = u
	case "remove-peer":
		cmd.RemovePeer = &RemovePeer{Peer: peerID(arg(1))}
	case "drain", "undrain":
		cmd.DrainPeer = &DrainPeer{Peer: peerID(arg(1)), Undo: words[0] == "undrain"}
	case "incarnate":
		cmd.Incarnate = &Incarnate{Peer: peerID(arg(1)), Past: uint64(num(val["past"]))}
	case "create":
		c := &CreateVolume{ID: volumeID(arg(1)), Name: arg(1), Replica: int(num(val["replica"])), Force: force}
		delete(val, "replica")
		n := 0
		for _, w := range words[2:] {
			if w == "force" {
				continue
			}
			n++
			host, path, _ := strings.Cut(w, ":")
			c.Bricks = append(c.Bricks, cluster.Brick{ID: brickID(arg(1), n), Peer: peerID(host), Host: host, Path: path})
		}
		c.Options = val
		cmd.CreateVolume = c
	case "start":
		cmd.StartVolume = &StartVolume{Volume: volumeID(arg(1)), Force: force, Primary: ids(arg(1), val["primary"])}
	case "stop":
		cmd.StopVolume = &StopVolume{Volume: volumeID(arg(1)), Force: force}
	case "delete":
		cmd.DeleteVolume = &DeleteVolume{Volume: volumeID(arg(1))}
	case "set":
		cmd.SetOptions = &SetOptions{Volume: volumeID(arg(1)), Options: val}
	case "reset":
		cmd.ResetOptions = &ResetOptions{Volume: volumeID(arg(1)), Names: words[2:]}
	case "config":
		name := arg(1)
		c := cluster.SetConfig{Set: cluster.SetID{Volume: volumeID(name), Index: cluster.SetIndex(num(val["set"]))}, Epoch: cluster.Epoch(num(val["epoch"]))}
		if v := sc.s.Map.Volume(name); v != nil {
			c.Members, c.MinInSync, c.Floor, c.Drained = v.Sets[0].Members, v.Sets[0].MinInSync, v.Sets[0].Floor, v.Sets[0].Drained
		}
		if n := num(val["primary"]); n != 0 {
			c.Primary = brickID(name, int(n))
		}
		c.InSync = ids(name, val["in-sync"])
		if v, ok := val["members"]; ok {
			c.Members = ids(name, v)
		}
		if v, ok := val["min"]; ok {
			c.MinInSync = int(num(v))
		}
		if v, ok := val["floor"]; ok {
			c.Floor = parsePos(v)
		}
		if v, ok := val["chosen"]; ok {
			c.Chosen = cluster.Epoch(num(v))
		}
		cmd.SetConfig = &SetConfig{Config: c, Force: force}
	case "add-token":
		role := val["role"]
		if role == "" {
			role = "peer"
		}
		uses := 1
		if v, ok := val["uses"]; ok {
			uses = int(num(v))
		}
		cmd.AddToken = &AddToken{Token: Token{Hash: tokenHash(arg(1)), Role: role, Expires: num(val["expires"]), Uses: uses}, Now: num(val["now"])}
	case "use-token":
		role := val["role"]
		if role == "" {
			role = "peer"
		}
		cmd.UseToken = &UseToken{Hash: tokenHash(arg(1)), Role: role, Now: num(val["now"])}
	case "drop-token":
		d := &DropToken{Now: num(val["now"])}
		if arg(1) != "" {
			d.Hash = tokenHash(arg(1))
		}
		cmd.DropToken = d
	case "authority":
		cmd.SetAuthority = &SetAuthority{Authority: []byte(arg(1)), Version: uint64(num(val["version"]))}
	case "nothing":
	default:
		sc.t.Fatalf("unknown command %q", words[0])
	}
	return sc.apply(cmd)
}

// apply applies a command as it would arrive: encoded and decoded.
func (sc *script) apply(cmd Command) string {
	raw, err := cmd.Encode()
	if err != nil {
		sc.t.Fatal(err)
	}
	if cmd, err = DecodeCommand(raw); err != nil {
		sc.t.Fatal(err)
	}
	before := string(sc.s.Encode())
	if err := sc.s.Apply(cmd); err != nil {
		var e *Error
		if !errors.As(err, &e) {
			sc.t.Fatalf("a refusal that is no *Error: %v", err)
		}
		if after := string(sc.s.Encode()); after != before {
			sc.t.Fatalf("a refused command changed the state from\n%s\nto\n%s", before, after)
		}
		return fmt.Sprintf("%s: %s\n", e.Code, e.Text)
	}
	if string(sc.s.Encode()) == before {
		return "ok, as before\n"
	}
	return "ok\n"
}

func (sc *script) show(what string) string {
	var b strings.Builder
	m := sc.s.Map
	if what == "" || what == "pool" || what == "all" {
		fmt.Fprintf(&b, "version %d\n", m.Version)
		for _, p := range m.Peers {
			fmt.Fprintf(&b, "peer %s at %s", p.Name, strings.Join(p.Addrs, " "))
			if role := p.Role(); role != "" {
				b.WriteString(", " + role)
			}
			fmt.Fprintf(&b, ", start %d\n", p.Incarnation)
		}
	}
	if what == "" || what == "volumes" || what == "all" {
		for _, v := range m.Volumes {
			fmt.Fprintf(&b, "volume %s %s %s", v.Name, v.Type(), v.Status)
			for _, o := range cluster.Options() {
				if val, ok := v.Options[o.Name]; ok {
					fmt.Fprintf(&b, " %s=%s", o.Name, val)
				}
			}
			b.WriteString("\n")
			for i := range v.Sets {
				b.WriteString("  " + describe(&v.Sets[i]) + "\n")
			}
		}
	}
	if what == "tokens" || what == "all" {
		for _, t := range sc.s.Tokens {
			fmt.Fprintf(&b, "token %c role %s expires %d uses %d\n", t.Hash[0], t.Role, t.Expires, t.Uses)
		}
		fmt.Fprintf(&b, "authority %q version %d\n", sc.s.Authority, sc.s.AuthorityVersion)
	}
	return b.String()
}

// describe prints a configuration with bricks by number.
func describe(c *cluster.SetConfig) string {
	primary := "none"
	if !c.Primary.IsZero() {
		primary = fmt.Sprint(c.Primary[15])
	}
	list := func(ids []cluster.BrickID) string {
		var f []string
		for _, id := range ids {
			f = append(f, fmt.Sprint(id[15]))
		}
		return "{" + strings.Join(f, " ") + "}"
	}
	doubted := ""
	if c.Doubted {
		doubted = " doubted"
	}
	if c.Epoch > 0 && c.Chosen == c.Epoch {
		doubted += " chosen"
	}
	drained := ""
	if len(c.Drained) > 0 {
		drained = " drained " + list(c.Drained)
	}
	return fmt.Sprintf("epoch %d primary %s in-sync %s of %s min %d floor %v%s", c.Epoch, primary, list(c.InSync), list(c.Members), c.MinInSync, c.Floor, doubted+drained)
}

// The scripts in testdata/failover describe one set and what its bricks answer:
//
//	decide members=1,2,3 in-sync=1,2,3 primary=1 [epoch=…] [floor=…] [elapsed=…] [leaving=N] [insisted] [doubted]
//	1 silent
//	2 sealed 3.7
//	3 unclean 3.9
//	2 refuses
func TestFailoverScripts(t *testing.T) {
	datadriven.Walk(t, "testdata/failover", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			f := Failover{Config: cluster.SetConfig{Epoch: 3, MinInSync: 1}}
			number := func(key string) int {
				n := 0
				d.MaybeScanArgs(t, key, &n)
				return n
			}
			list := func(key string) (ids []cluster.BrickID) {
				for _, a := range d.CmdArgs {
					if a.Key == key {
						for _, v := range a.Vals {
							ids = append(ids, brickID("v", int(num(v))))
						}
					}
				}
				return ids
			}
			f.Config.Members, f.Config.InSync = list("members"), list("in-sync")
			if n := number("primary"); n != 0 {
				f.Config.Primary = brickID("v", n)
			}
			if n := number("leaving"); n != 0 {
				f.Leaving = brickID("v", n)
			}
			if n := number("epoch"); n != 0 {
				f.Config.Epoch = cluster.Epoch(n)
			}
			var s string
			if d.MaybeScanArgs(t, "floor", &s) {
				f.Config.Floor = parsePos(s)
			}
			if d.MaybeScanArgs(t, "elapsed", &s) {
				f.Elapsed, _ = time.ParseDuration(s)
			}
			f.Insisted, f.Config.Doubted = d.HasArg("insisted"), d.HasArg("doubted")
			for line := range strings.SplitSeq(strings.TrimSpace(d.Input), "\n") {
				w := strings.Fields(line)
				if len(w) < 2 {
					continue
				}
				r := SealResult{Brick: brickID("v", int(num(w[0]))), Answered: true}
				switch w[1] {
				case "silent":
					r.Answered = false
				case "sealed", "unclean":
					r.Reply = proto.SealReply{Sealed: true, Trusted: w[1] == "sealed", Tail: parsePos(w[2])}
				case "refuses":
					r.Reply = proto.SealReply{Text: "it heard from it 0.1 s ago"}
				default:
					d.Fatalf(t, "unknown answer %q", w[1])
				}
				f.Results = append(f.Results, r)
			}
			v := f.Decide()
			if v.Next != nil {
				if err := checkConfig(&f.Config, v.Next, false); err != nil {
					d.Fatalf(t, "the decision breaks an invariant: %v", err)
				}
				return describe(v.Next) + "\n"
			}
			var what []string
			if v.Again {
				what = append(what, "again")
			} else {
				what = append(what, "refused")
			}
			if v.Insist {
				what = append(what, "insist")
			}
			text := v.Reason
			for i := range 9 { // ids as numbers
				text = strings.ReplaceAll(text, brickID("v", i).String(), fmt.Sprint(i))
			}
			return fmt.Sprintf("%s: %s\n", strings.Join(what, ", "), text)
		})
	})
}

// The scripts in testdata/voters describe a consensus group and print the steps
// that follow, each carried out before the next is asked for:
//
//	steps peers=1,2,3 [clients=…] voters=1 others=2 leader=1 [down=…] [lost=…] [late=…]
func TestVoterScripts(t *testing.T) {
	datadriven.Walk(t, "testdata/voters", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			list := func(key string) (ids []cluster.PeerID) {
				for _, a := range d.CmdArgs {
					if a.Key == key {
						for _, v := range a.Vals {
							ids = append(ids, peerID("n"+v))
						}
					}
				}
				return ids
			}
			m := &cluster.Map{}
			for _, id := range list("peers") {
				m.Peers = append(m.Peers, &cluster.Peer{ID: id, NoVote: slices.Contains(list("clients"), id)})
			}
			g := groupModel{m: m, leader: list("leader")[0], down: list("down"), lost: list("lost"), late: list("late")}
			for _, id := range list("voters") {
				g.servers = append(g.servers, Server{id, true})
			}
			for _, id := range list("others") {
				g.servers = append(g.servers, Server{id, false})
			}
			var out strings.Builder
			for range 30 {
				step, err := g.step()
				if step.Kind == StepNone {
					break
				}
				fmt.Fprintf(&out, "%v", step.Kind)
				if step.Kind != StepTransfer {
					fmt.Fprintf(&out, " %d", step.Peer[15])
				} else {
					fmt.Fprintf(&out, " to %d", g.leader[15])
				}
				out.WriteString("\n")
				if err != nil {
					d.Fatalf(t, "%v", err)
				}
			}
			var voters []string
			for _, s := range g.servers {
				if s.Voter {
					voters = append(voters, fmt.Sprint(s.Peer[15]))
				}
			}
			slices.Sort(voters)
			return out.String() + fmt.Sprintf("voters %s of %d\n", strings.Join(voters, " "), len(g.servers))
		})
	})
}

// groupModel is a consensus group that carries out steps.
type groupModel struct {
	m                *cluster.Map
	servers          []Server
	leader           cluster.PeerID
	down, lost, late []cluster.PeerID
}

// step carries out the next step. The error says that it was one that could not
// have been committed.
func (g *groupModel) step() (Step, error) {
	up := func(id cluster.PeerID) bool { return !slices.Contains(g.down, id) && !slices.Contains(g.lost, id) }
	gr := Group{
		Map: g.m, Servers: g.servers, Leader: g.leader,
		Reachable: up,
		Ready:     func(id cluster.PeerID) bool { return !slices.Contains(g.late, id) },
		Lost:      func(id cluster.PeerID) bool { return slices.Contains(g.lost, id) },
	}
	step := gr.NextStep()
	at := slices.IndexFunc(g.servers, func(s Server) bool { return s.Peer == step.Peer })
	g.servers = slices.Clone(g.servers)
	switch step.Kind {
	case StepNone:
		return step, nil
	case StepAdd:
		if at >= 0 {
			return step, fmt.Errorf("%v is in the group already", step.Peer)
		}
		g.servers = append(g.servers, Server{Peer: step.Peer})
	case StepPromote:
		if g.servers[at].Voter || !up(step.Peer) || slices.Contains(g.late, step.Peer) {
			return step, fmt.Errorf("%v should not be promoted", step.Peer)
		}
		g.servers[at].Voter = true
	case StepDemote:
		if step.Peer == g.leader {
			return step, errors.New("the leader was demoted")
		}
		g.servers[at].Voter = false
	case StepRemove:
		if step.Peer == g.leader || g.m.Peer(step.Peer) != nil {
			return step, fmt.Errorf("%v should not be removed", step.Peer)
		}
		g.servers = slices.Delete(g.servers, at, at+1)
	case StepTransfer:
		i := slices.IndexFunc(g.servers, func(s Server) bool {
			return s.Voter && s.Peer != g.leader && up(s.Peer) && g.m.Peer(s.Peer) != nil
		})
		if i < 0 {
			return step, errors.New("nobody can take over")
		}
		g.leader = g.servers[i].Peer
	}
	voters, alive := 0, 0
	for _, s := range g.servers {
		if s.Voter {
			voters++
			if s.Peer == g.leader || up(s.Peer) {
				alive++
			}
		}
	}
	if alive < voters/2+1 {
		return step, fmt.Errorf("after %v %v only %d of %d voters can be reached", step.Kind, step.Peer, alive, voters)
	}
	return step, nil
}
