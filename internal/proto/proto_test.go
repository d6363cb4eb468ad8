package proto_test

import (
	"bytes"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"math/rand/v2"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/codec/codectest"
	"mortar/internal/fsop"
	"mortar/internal/proto"
)

// kinds are all kinds of messages, with what a frame of that kind has in it:
// for a call, the request and the reply. nil stands for bytes that others define,
// or for none.
var kinds = []struct {
	name     string
	kind     uint8
	enclosed bool // in an Envelope
	messages []codec.Coded
}{
	{"KindAttach", proto.KindAttach, false, []codec.Coded{new(proto.Attach), new(proto.AttachReply)}},
	{"KindDo", proto.KindDo, false, []codec.Coded{new(proto.Do), new(proto.DoReply)}},
	{"KindPing", proto.KindPing, false, []codec.Coded{new(proto.Ping), new(proto.Pong)}},
	{"KindGetMap", proto.KindGetMap, false, []codec.Coded{new(proto.GetMap), new(proto.VolumeMap)}},
	{"KindDied", proto.KindDied, false, []codec.Coded{new(proto.Died)}},
	{"KindForget", proto.KindForget, false, []codec.Coded{new(proto.Forget)}},
	{"KindLapsed", proto.KindLapsed, false, nil},
	{"KindHold", proto.KindHold, false, []codec.Coded{new(proto.Forget)}},
	{"KindInvalAck", proto.KindInvalAck, false, []codec.Coded{new(proto.InvalAck)}},
	{"KindInval", proto.KindInval, false, []codec.Coded{new(proto.Inval)}},
	{"KindVolumeMap", proto.KindVolumeMap, false, []codec.Coded{new(proto.VolumeMap)}},
	{"KindDetached", proto.KindDetached, false, []codec.Coded{new(proto.Detached)}},
	{"KindRecall", proto.KindRecall, false, []codec.Coded{new(proto.Recall)}},

	{"KindForward", proto.KindForward, true, []codec.Coded{new(proto.Forward), new(proto.DoReply)}},
	{"KindSeal", proto.KindSeal, true, []codec.Coded{new(proto.Seal), new(proto.SealReply)}},
	{"KindHeal", proto.KindHeal, true, nil},
	{"KindHealOpen", proto.KindHealOpen, true, []codec.Coded{new(proto.HealOpen), new(proto.HealOpenReply)}},
	{"KindDigest", proto.KindDigest, true, []codec.Coded{new(proto.Digest), new(proto.DigestReply)}},
	{"KindBlock", proto.KindBlock, true, []codec.Coded{new(proto.Block), new(proto.BlockReply)}},
	{"KindProbe", proto.KindProbe, true, []codec.Coded{new(proto.Probe)}},
	{"KindProbeAck", proto.KindProbeAck, true, []codec.Coded{new(proto.ProbeAck)}},
	{"KindAppend", proto.KindAppend, true, []codec.Coded{new(proto.Append)}},
	{"KindAppendAck", proto.KindAppendAck, true, []codec.Coded{new(proto.AppendAck)}},
	{"KindBeat", proto.KindBeat, true, []codec.Coded{new(proto.Beat)}},
	{"KindBeatAck", proto.KindBeatAck, true, []codec.Coded{new(proto.BeatAck)}},
	{"KindSync", proto.KindSync, true, []codec.Coded{new(proto.Sync)}},
	{"KindSyncAck", proto.KindSyncAck, true, []codec.Coded{new(proto.SyncAck)}},
	{"KindReapAsk", proto.KindReapAsk, true, []codec.Coded{new(proto.ReapAsk)}},
	{"KindReapTell", proto.KindReapTell, true, []codec.Coded{new(proto.ReapTell)}},
	{"KindCommitAsk", proto.KindCommitAsk, true, []codec.Coded{new(proto.CommitAsk)}},
	{"KindHealOrder", proto.KindHealOrder, true, []codec.Coded{new(proto.HealOrder)}},
	{"KindRelease", proto.KindRelease, true, []codec.Coded{new(proto.Release)}},
	{"KindRecallAsk", proto.KindRecallAsk, true, []codec.Coded{new(proto.RecallAsk)}},
	{"KindRecallAll", proto.KindRecallAll, true, []codec.Coded{new(proto.RecallAll)}},
	{"KindRecalling", proto.KindRecalling, true, []codec.Coded{new(proto.Recalling)}},

	{"KindHello", proto.KindHello, false, []codec.Coded{new(proto.Hello), new(proto.HelloReply)}},
	{"KindAlive", proto.KindAlive, false, nil},
	{"KindControl", proto.KindControl, false, nil},
}

// parts are messages that only occur inside others, or on disk.
var parts = []codec.Coded{new(proto.Entry), new(proto.Effect), new(proto.Envelope), new(proto.Hold)}

// messages are one zero value of every type.
func messages() []codec.Coded {
	var all []codec.Coded
	seen := make(map[reflect.Type]bool)
	add := func(list []codec.Coded) {
		for _, m := range list {
			if t := reflect.TypeOf(m); !seen[t] {
				seen[t] = true
				all = append(all, m)
			}
		}
	}
	for _, k := range kinds {
		add(k.messages)
	}
	add(parts)
	return all
}

// fresh is another zero value of m's type.
func fresh(m codec.Coded) codec.Coded {
	return reflect.New(reflect.TypeOf(m).Elem()).Interface().(codec.Coded)
}

// ops are one of every operation.
var ops = func() (all []fsop.Op) {
	for k := range 256 {
		var a fsop.Any
		if _, err := codec.DecodePrefix(append([]byte{byte(k)}, make([]byte, 256)...), &a); err == nil {
			all = append(all, a.Op)
		}
	}
	return all
}()

// special fills what cannot be just anything.
func special(rng *rand.Rand) func(reflect.Value) bool {
	var f func(reflect.Value) bool
	f = func(v reflect.Value) bool {
		switch p := v.Addr().Interface().(type) {
		case *fsop.Op:
			op := ops[rng.IntN(len(ops))]
			*p = reflect.New(reflect.TypeOf(op).Elem()).Interface().(fsop.Op)
			codectest.Fill(rng, *p, f)
		case *fsop.LockType:
			*p = fsop.LockType(rng.IntN(int(fsop.LockUnlock) + 1))
		case *fsop.Window:
			*p = fsop.Window(rng.IntN(8))
		case *fsop.Reply: // package fsop tests its parts
			*p = fsop.Reply{Seq: rng.Uint64(), Off: rng.Uint64(), Data: []byte("data"), Attr: fsop.Attr{Ino: 5, Size: rng.Uint64()}}
		case *cluster.SetConfig:
			n := rng.IntN(proto.MaxReplicas + 1)
			*p = cluster.SetConfig{Epoch: cluster.Epoch(rng.Uint64()), MinInSync: rng.IntN(proto.MaxReplicas)}
			for range n {
				p.Members = append(p.Members, cluster.NewID())
			}
			p.InSync = append(p.InSync, p.Members...)
		case *proto.AttachReply:
			*p = proto.AttachReply{Status: proto.Status(rng.IntN(int(proto.Anew) + 1)), Text: "text", Seq: rng.Uint64(), Opened: int64(rng.Uint64())}
			if p.Status != proto.WrongVersion {
				p.Epoch = cluster.Epoch(rng.Uint64())
			}
		case *proto.AppendEntry:
			if rng.IntN(2) == 1 {
				p.Raw = []byte("an encoded entry")
			} else {
				codectest.Fill(rng, &p.Stub, f)
			}
		default:
			return false
		}
		return true
	}
	return f
}

func TestRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, m := range messages() {
		t.Run(strings.TrimPrefix(fmt.Sprintf("%T", m), "*proto."), func(t *testing.T) {
			for range 100 {
				v := fresh(m)
				codectest.Fill(rng, v, special(rng))
				codectest.RoundTrip(t, v)
			}
		})
	}
}

// TestWrongVersion: what a daemon of version 5 says to a mount of another version is
// understood, and so will be what is said now.
func TestWrongVersion(t *testing.T) {
	said := append([]byte{4, 3, 0, 0, 0, 'o', 'l', 'd'}, make([]byte, 16)...)
	want := proto.AttachReply{Status: proto.WrongVersion, Text: "old"}
	var got proto.AttachReply
	if err := codec.Decode(said, &got); err != nil || got != want {
		t.Errorf("read as %+v, %v", got, err)
	}
	if b := codec.Append(nil, &want); !bytes.Equal(b, said) {
		t.Errorf("written as %x", b)
	}
}

// TestComplete: every kind and every message of the package is in the tables
// above, and no kind has the number of another.
func TestComplete(t *testing.T) {
	listed := make(map[string]bool)
	numbers := make(map[uint8]string)
	for _, k := range kinds {
		listed[k.name] = true
		if other, ok := numbers[k.kind]; ok {
			t.Errorf("%s and %s have the number %d", k.name, other, k.kind)
		}
		if k.kind == 0 {
			t.Errorf("%s has the number 0, which package wire refuses", k.name)
		}
		numbers[k.kind] = k.name
	}
	for _, m := range messages() {
		listed[reflect.TypeOf(m).Elem().Name()] = true
	}
	pkgs, err := parser.ParseDir(token.NewFileSet(), ".", func(fi fs.FileInfo) bool { return !strings.HasSuffix(fi.Name(), "_test.go") }, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	ast.Inspect(pkgs["proto"], func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ValueSpec:
			for i, name := range n.Names {
				if !strings.HasPrefix(name.Name, "Kind") {
					continue
				}
				found++
				if !listed[name.Name] {
					t.Errorf("%s is not in the table of kinds", name)
				}
				if len(n.Values) > i {
					v, _ := strconv.Atoi(n.Values[i].(*ast.BasicLit).Value)
					if numbers[uint8(v)] != name.Name {
						t.Errorf("%s is %d, the table has %q for that", name, v, numbers[uint8(v)])
					}
				}
			}
		case *ast.FuncDecl:
			if n.Recv != nil && n.Name.Name == "Code" {
				if name := n.Recv.List[0].Type.(*ast.StarExpr).X.(*ast.Ident).Name; !listed[name] {
					t.Errorf("%s is in neither table", name)
				}
			}
		}
		return true
	})
	if found != len(kinds) {
		t.Errorf("%d kinds in the package, %d in the table", found, len(kinds))
	}
}

// TestLimits: every bound on a length is kept, at the limit and around it.
func TestLimits(t *testing.T) {
	text := func(n int) string { return strings.Repeat("t", n) }
	for _, tt := range []struct {
		name  string
		m     codec.Coded
		limit int
		at    int // where the length is; -1: the last four bytes of a zero message
		set   func(m codec.Coded, n int)
	}{
		{"Attach.Client", new(proto.Attach), 1024, 2 + 18 + 8 + 8 + 8, func(m codec.Coded, n int) { m.(*proto.Attach).Client = text(n) }},
		{"Attach.Holds", new(proto.Attach), 4 << 20, -1, func(m codec.Coded, n int) { m.(*proto.Attach).Holds = make([]proto.Hold, n) }},
		{"AttachReply.Text", new(proto.AttachReply), 4096, 1, func(m codec.Coded, n int) { m.(*proto.AttachReply).Text = text(n) }},
		{"Forget.Holds", new(proto.Forget), 1 << 20, -1, func(m codec.Coded, n int) { m.(*proto.Forget).Holds = make([]proto.Hold, n) }},
		{"Inval.Effects", new(proto.Inval), 1 << 16, -1, func(m codec.Coded, n int) { m.(*proto.Inval).Effects = make([]proto.Effect, n) }},
		{"Effect.Name", new(proto.Effect), fsop.MaxName, -1, func(m codec.Coded, n int) { m.(*proto.Effect).Name = text(n) }},
		{"GetMap.Volume", new(proto.GetMap), 255, -1, func(m codec.Coded, n int) { m.(*proto.GetMap).Volume = text(n) }},
		{"VolumeMap.Text", new(proto.VolumeMap), 4096, 1, func(m codec.Coded, n int) { m.(*proto.VolumeMap).Text = text(n) }},
		{"VolumeMap.Options", new(proto.VolumeMap), 1000, 1 + 4 + 8 + 16, func(m codec.Coded, n int) { m.(*proto.VolumeMap).Options = make([]proto.Option, n) }},
		{"VolumeMap.Bricks", new(proto.VolumeMap), 10000, -1, func(m codec.Coded, n int) { m.(*proto.VolumeMap).Bricks = make([]proto.BrickAddr, n) }},
		{"Detached.Text", new(proto.Detached), 4096, -1, func(m codec.Coded, n int) { m.(*proto.Detached).Text = text(n) }},
		{"SealReply.Text", new(proto.SealReply), 4096, 1, func(m codec.Coded, n int) { m.(*proto.SealReply).Text = text(n) }},
		{"HealOpenReply.Text", new(proto.HealOpenReply), 4096, 1, func(m codec.Coded, n int) { m.(*proto.HealOpenReply).Text = text(n) }},
		{"DigestReply.Text", new(proto.DigestReply), 4096, 1, func(m codec.Coded, n int) { m.(*proto.DigestReply).Text = text(n) }},
		{"Probe.Members", new(proto.Probe), proto.MaxReplicas, 18 + 8 + 16, func(m codec.Coded, n int) { m.(*proto.Probe).Config.Members = make([]cluster.BrickID, n) }},
		{"Probe.InSync", new(proto.Probe), proto.MaxReplicas, 18 + 8 + 16 + 4, func(m codec.Coded, n int) { m.(*proto.Probe).Config.InSync = make([]cluster.BrickID, n) }},
		{"ProbeAck.History", new(proto.ProbeAck), proto.MaxHistory, 8 + 8 + 16, func(m codec.Coded, n int) { m.(*proto.ProbeAck).History = make([]cluster.Pos, n) }},
		{"BeatAck.Sessions", new(proto.BeatAck), 1 << 20, 6 * 8, func(m codec.Coded, n int) { m.(*proto.BeatAck).Sessions = make([]cluster.SessionID, n) }},
		{"ReapAsk.Inos", new(proto.ReapAsk), 1 << 16, -1, func(m codec.Coded, n int) { m.(*proto.ReapAsk).Inos = make([]fsop.Ino, n) }},
		{"ReapTell.Sessions", new(proto.ReapTell), 1 << 20, 16, func(m codec.Coded, n int) { m.(*proto.ReapTell).Sessions = make([]cluster.SessionID, n) }},
		{"ReapTell.Held", new(proto.ReapTell), 1 << 16, -1, func(m codec.Coded, n int) { m.(*proto.ReapTell).Held = make([]fsop.Ino, n) }},
		{"Append.Entries", new(proto.Append), 1 << 16, -1, func(m codec.Coded, n int) { m.(*proto.Append).Entries = make([]proto.AppendEntry, n) }},
		{"Append.Raw", new(proto.Append), proto.MaxEntry, 8 + 8 + 16 + 8 + 4, func(m codec.Coded, n int) {
			m.(*proto.Append).Entries = []proto.AppendEntry{{Raw: make([]byte, n)}}
		}},
		{"HelloReply.Text", new(proto.HelloReply), 4096, 1, func(m codec.Coded, n int) { m.(*proto.HelloReply).Text = text(n) }},
		{"HelloReply.Seen", new(proto.HelloReply), 255, -1, func(m codec.Coded, n int) { m.(*proto.HelloReply).Seen = text(n) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			at := tt.at
			if at == -1 {
				at = len(codec.Append(nil, tt.m)) - 4
			}
			codectest.Limits(t, tt.m, tt.limit, at, func(n int) { tt.set(tt.m, n) })
		})
	}
}

// TestPayloadLast: of an entry that writes, the data is the tail of the
// encoding, which is what lets a brick find it inside its log.
func TestPayloadLast(t *testing.T) {
	data := []byte("the payload")
	for _, m := range []codec.Coded{
		&proto.Entry{Op: &fsop.Write{Ino: 5, Data: data}},
		&proto.Do{Op: &fsop.Write{Ino: 5, Data: data}},
		&proto.Forward{Do: proto.Do{Op: &fsop.Write{Ino: 5, Data: data}}},
		&proto.DoReply{Reply: fsop.Reply{Data: data}},
	} {
		if b := codec.Append(nil, m); !bytes.HasSuffix(b, data) {
			t.Errorf("%T does not end with its data", m)
		}
	}
	head := len(codec.Append(nil, &proto.Entry{Op: new(fsop.Write)}))
	if head > proto.MaxEntry-fsop.MaxData {
		t.Errorf("the head of an entry takes %d bytes, MaxEntry has room for %d", head, proto.MaxEntry-fsop.MaxData)
	}
}

func TestEntryString(t *testing.T) {
	e := proto.Entry{Pos: cluster.Pos{Epoch: 3, Seq: 17}, Session: 0xabc, Number: 5, Op: &fsop.Unlink{Parent: 1, Name: "x"}}
	if got, want := e.String(), "3.17 0000000000000abc#5 unlink "; !strings.HasPrefix(got, want) {
		t.Errorf("got %q, want %q…", got, want)
	}
}

func TestAnswer(t *testing.T) {
	join := func(parts [][]byte) []byte { return bytes.Join(parts, nil) }
	for _, body := range [][]byte{nil, {}, {0}, {1}, []byte("body"), make([]byte, 1<<20)} {
		if got, err := proto.ParseAnswer(join(proto.Answer(body, nil))); err != nil || !bytes.Equal(got, body) {
			t.Errorf("%d bytes: %d bytes, %v", len(body), len(got), err)
		}
	}
	for _, text := range []string{"no such brick", "\x00", strings.Repeat("x", 4096)} {
		if body, err := proto.ParseAnswer(join(proto.Answer([]byte("body"), errors.New(text)))); err == nil || err.Error() != text || body != nil {
			t.Errorf("%q: %q, %v", text, body, err)
		}
	}
	if _, err := proto.ParseAnswer(join(proto.Answer(nil, errors.New("")))); err == nil {
		t.Error("an error without text is lost")
	}
	if _, err := proto.ParseAnswer(join(proto.Answer(nil, errors.New(strings.Repeat("x", 1<<20))))); err == nil || len(err.Error()) != 4096 {
		t.Error("a long error is not cut")
	}
	for _, b := range [][]byte{nil, {}, {1}, {2}, {2, 3}, {255}} {
		if body, err := proto.ParseAnswer(b); !errors.Is(err, codec.ErrMalformed) {
			t.Errorf("%x: %q, %v", b, body, err)
		}
	}
}
