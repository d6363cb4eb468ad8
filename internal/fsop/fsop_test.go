package fsop

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"math/rand/v2"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"mortar/internal/codec"
	"mortar/internal/codec/codectest"
)

// special fills what cannot be just anything.
func special(rng *rand.Rand) func(reflect.Value) bool {
	return func(v reflect.Value) bool {
		switch p := v.Addr().Interface().(type) {
		case *Short: // does not cross the wire
		case *LockType:
			*p = LockType(rng.IntN(int(LockUnlock) + 1))
		case *Window:
			*p = Window(rng.IntN(8))
		case *Attr:
			if rng.IntN(2) == 1 {
				fillAttr(rng, p)
			}
		case *[]Dirent:
			plus := rng.IntN(2) == 1
			for range rng.IntN(4) {
				d := Dirent{Ino: Ino(rng.Uint64()), Name: "name", Type: rng.Uint32(), Cookie: rng.Uint64()}
				if plus {
					fillAttr(rng, &d.Attr)
				}
				*p = append(*p, d)
			}
		default:
			return false
		}
		return true
	}
}

// fillAttr fills what crosses the wire.
func fillAttr(rng *rand.Rand, a *Attr) {
	codectest.Fill(rng, a, nil)
	a.Ino |= 1
	a.Window = 0
}

func TestOps(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	names := make(map[string]bool)
	for k, kind := range kinds {
		if kind.make == nil {
			if Kind(k).String() != fmt.Sprintf("Kind(%d)", k) {
				t.Errorf("kind %d has the name %q and no operation", k, Kind(k))
			}
			continue
		}
		t.Run(kind.name, func(t *testing.T) {
			if names[kind.name] {
				t.Errorf("two operations have this name")
			}
			names[kind.name] = true
			if got := kind.make().Kind(); got != Kind(k) {
				t.Errorf("kind %d makes a %v", k, got)
			}
			for range 50 {
				op := kind.make()
				codectest.Fill(rng, op, special(rng))
				codectest.RoundTrip(t, &Any{op})
				got, err := Decode(Append(nil, op))
				if err != nil || !reflect.DeepEqual(got, op) {
					t.Errorf("got %v, %v, want %v", got, err, op)
				}
			}
		})
	}
	for k := len(kinds); k < 256; k++ {
		if _, err := Decode([]byte{byte(k)}); !errors.Is(err, codec.ErrMalformed) {
			t.Errorf("kind %d: %v", k, err)
		}
	}
}

// TestComplete: every operation of the package is in the table.
func TestComplete(t *testing.T) {
	made := make(map[string]bool)
	for _, k := range kinds {
		if k.make != nil {
			made[reflect.TypeOf(k.make()).Elem().Name()] = true
		}
	}
	f, err := parser.ParseFile(token.NewFileSet(), "code.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, d := range f.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok || fn.Recv == nil || fn.Name.Name != "Kind" {
			continue
		}
		n++
		if name := fn.Recv.List[0].Type.(*ast.StarExpr).X.(*ast.Ident).Name; !made[name] {
			t.Errorf("%s is not in the table of kinds", name)
		}
	}
	if n != len(made) {
		t.Errorf("%d operations in the file, %d in the table", n, len(made))
	}
}

func TestMutates(t *testing.T) {
	reads := map[Kind]bool{
		KindLookup: true, KindGetattr: true, KindReadlink: true, KindRead: true, KindReaddir: true, KindStatfs: true,
		KindGetxattr: true, KindListxattr: true, KindSeek: true, KindGetlk: true, KindFsync: true, KindFlush: true,
	}
	for k, kind := range kinds {
		if kind.make != nil && Kind(k).Mutates() == reads[Kind(k)] {
			t.Errorf("%v: Mutates is %v", Kind(k), Kind(k).Mutates())
		}
	}
}

func TestLimits(t *testing.T) {
	name := func(n int) string { return strings.Repeat("n", n) }
	const ino = 1 + 8 // the kind and an inode number
	for _, tt := range []struct {
		op    Op
		limit int
		at    int
		set   func(op Op, n int)
	}{
		{new(Lookup), MaxName, ino, func(op Op, n int) { op.(*Lookup).Name = name(n) }},
		{new(Getxattr), MaxName, ino, func(op Op, n int) { op.(*Getxattr).Name = name(n) }},
		{new(Create), MaxName, ino, func(op Op, n int) { op.(*Create).Name = name(n) }},
		{new(Mkdir), MaxName, ino, func(op Op, n int) { op.(*Mkdir).Name = name(n) }},
		{new(Mknod), MaxName, ino, func(op Op, n int) { op.(*Mknod).Name = name(n) }},
		{new(Symlink), MaxName, ino, func(op Op, n int) { op.(*Symlink).Name = name(n) }},
		{new(Symlink), MaxTarget, ino + 4 + 16, func(op Op, n int) { op.(*Symlink).Target = name(n) }},
		{new(Link), MaxName, ino + 8, func(op Op, n int) { op.(*Link).Name = name(n) }},
		{new(Unlink), MaxName, ino, func(op Op, n int) { op.(*Unlink).Name = name(n) }},
		{new(Rmdir), MaxName, ino, func(op Op, n int) { op.(*Rmdir).Name = name(n) }},
		{new(Rename), MaxName, ino, func(op Op, n int) { op.(*Rename).Name = name(n) }},
		{new(Rename), MaxName, ino + 4 + 8, func(op Op, n int) { op.(*Rename).NewName = name(n) }},
		{new(Setxattr), MaxName, ino, func(op Op, n int) { op.(*Setxattr).Name = name(n) }},
		{new(Setxattr), MaxXattr, ino + 4, func(op Op, n int) { op.(*Setxattr).Value = make([]byte, n) }},
		{new(Removexattr), MaxName, ino, func(op Op, n int) { op.(*Removexattr).Name = name(n) }},
		{new(Write), MaxData, len(Append(nil, new(Write))) - 4, func(op Op, n int) { op.(*Write).Data = make([]byte, n) }},
		{new(OpenSession), 1024, 1, func(op Op, n int) { op.(*OpenSession).Client = name(n) }},
		{new(Reap), 1 << 16, 1, func(op Op, n int) { op.(*Reap).Inos = make([]Ino, n) }},
	} {
		t.Run(tt.op.Kind().String(), func(t *testing.T) {
			codectest.Limits(t, &Any{tt.op}, tt.limit, tt.at, func(n int) { tt.set(tt.op, n) })
		})
	}
	r := new(Reply)
	codectest.Limits(t, r, MaxData, len(codec.Append(nil, r))-4, func(n int) { r.Data = make([]byte, n) })
	r = new(Reply)
	codectest.Limits(t, r, MaxEntries, 1+8+8, func(n int) { r.Entries = make([]Dirent, n) })
}

func TestReply(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	codectest.RoundTrip(t, new(Reply))
	for range 200 {
		r := new(Reply)
		codectest.Fill(rng, r, special(rng))
		codectest.RoundTrip(t, r)
	}
	if n := len(codec.Append(nil, &Reply{Seq: 1})); n > 32 {
		t.Errorf("a reply of nothing takes %d bytes", n)
	}
}

func TestBadValues(t *testing.T) {
	lock := Append(nil, &Setlk{Lock: Lock{Type: LockUnlock}})
	lock[1+8+8+1]++ // the type
	flock := Append(nil, &Getlk{})
	flock[1+8+8] = 2 // a truth value
	window := Append(nil, &Create{Window: 7})
	window[len(window)-1]++
	if err := codec.Decode(append([]byte{0x80}, make([]byte, 20)...), new(Reply)); !errors.Is(err, codec.ErrMalformed) {
		t.Errorf("a reply with unknown parts: %v", err)
	}
	for name, b := range map[string][]byte{"empty": {}, "lock type": lock, "truth": flock, "window": window} {
		if op, err := Decode(b); !errors.Is(err, codec.ErrMalformed) {
			t.Errorf("%s: %v, %v", name, op, err)
		}
	}
}

func TestCheckName(t *testing.T) {
	for name, want := range map[string]error{
		"a": nil, "...": nil, ".a": nil, "-rf": nil, " ": nil, "\n": nil, "\xff\xfe": nil, strings.Repeat("n", MaxName): nil,
		"": EINVAL, ".": EINVAL, "..": EINVAL, "/": EINVAL, "a/b": EINVAL, "../x": EINVAL, "a\x00": EINVAL,
		strings.Repeat("n", MaxName+1): ENAMETOOLONG, strings.Repeat("/", MaxName+1): ENAMETOOLONG,
	} {
		if err := CheckName(name); err != want {
			t.Errorf("%.20q: %v, want %v", name, err, want)
		}
	}
}

// FuzzName: what CheckName lets through can be a directory entry, and nothing else can.
func FuzzName(f *testing.F) {
	for _, s := range []string{"a", ".", "..", "a/b", "a\x00", "\xff", strings.Repeat("n", MaxName), strings.Repeat("n", MaxName+1)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		possible := name != "" && name != "." && name != ".." && len(name) <= MaxName && !strings.ContainsAny(name, "/\x00")
		if err := CheckName(name); (err == nil) != possible {
			t.Errorf("%q: %v", name, err)
		}
	})
}

func TestIno(t *testing.T) {
	for _, tt := range []struct {
		set  uint16
		n    uint64
		want Ino
	}{{0, 1, RootIno}, {0, 1<<48 - 1, 1<<48 - 1}, {1, 0, 1 << 48}, {0xffff, 5, 0xffff<<48 | 5}, {2, 1 << 48, 2 << 48}} {
		if got := MakeIno(tt.set, tt.n); got != tt.want || got.Set() != tt.set {
			t.Errorf("MakeIno(%d, %d) is %x of set %d", tt.set, tt.n, got, got.Set())
		}
	}
}

func TestErrno(t *testing.T) {
	var err error = fmt.Errorf("looking up: %w", ENOENT)
	var e Errno
	if !errors.As(err, &e) || e != ENOENT || e.Error() != syscall.ENOENT.Error() || syscall.Errno(e) != syscall.ENOENT {
		t.Errorf("%v as %d", err, e)
	}
}

func TestString(t *testing.T) {
	secret := "do not log me"
	if s := String(&Write{Ino: 5, Off: 7, Data: []byte(secret)}); strings.Contains(s, secret) || !strings.Contains(s, "13 bytes") {
		t.Errorf("write prints as %q", s)
	}
	if s := String(&Lookup{Parent: 1, Name: "x"}); !strings.HasPrefix(s, "lookup ") || !strings.Contains(s, "Name:x") {
		t.Errorf("lookup prints as %q", s)
	}
}

func TestHandlerFunc(t *testing.T) {
	var h Handler = HandlerFunc(func(_ context.Context, op Op) (*Reply, error) { return &Reply{Off: uint64(op.Kind())}, nil })
	if r, err := h.Do(t.Context(), new(Noop)); err != nil || r.Off != uint64(KindNoop) {
		t.Errorf("%v, %v", r, err)
	}
}

func FuzzDecode(f *testing.F) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, kind := range kinds {
		if kind.make != nil {
			f.Add(Append(nil, kind.make()))
			op := kind.make()
			codectest.Fill(rng, op, special(rng))
			f.Add(Append(nil, op))
		}
	}
	f.Add([]byte{255})
	f.Fuzz(func(t *testing.T, b []byte) {
		var a Any
		if codectest.Decode(t, b, &a) == nil {
			_ = String(a.Op)
		}
	})
}

func FuzzReply(f *testing.F) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range 20 {
		r := new(Reply)
		codectest.Fill(rng, r, special(rng))
		f.Add(codec.Append(nil, r))
	}
	f.Fuzz(func(t *testing.T, b []byte) { codectest.Decode(t, b, new(Reply)) })
}

func TestResolve(t *testing.T) {
	names := map[Ino]map[string]Ino{RootIno: {"a": 2}, 2: {"b": 3}}
	h := HandlerFunc(func(_ context.Context, op Op) (*Reply, error) {
		switch op := op.(type) {
		case *Getattr:
			return &Reply{Attr: Attr{Ino: op.Ino}}, nil
		case *Lookup:
			if ino := names[op.Parent][op.Name]; ino != 0 {
				return &Reply{Attr: Attr{Ino: ino}}, nil
			}
			return nil, ENOENT
		}
		return nil, ENOSYS
	})
	for path, want := range map[string]Ino{"": RootIno, "/": RootIno, "a": 2, "/a/": 2, "a/b": 3, "a//b": 3} {
		if at, err := Resolve(t.Context(), h, path); err != nil || at.Ino != want {
			t.Errorf("%q leads to %d, %v; want %d", path, at.Ino, err, want)
		}
	}
	for _, path := range []string{"b", "a/b/c"} {
		if at, err := Resolve(t.Context(), h, path); !errors.Is(err, ENOENT) {
			t.Errorf("%q leads to %d, %v", path, at.Ino, err)
		}
	}
}
