package sim_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"

	"mortar/internal/brick"
	"mortar/internal/cluster"
	"mortar/internal/codec"
	"mortar/internal/disk"
	"mortar/internal/fsop"
	"mortar/internal/proto"
	"mortar/internal/replica"
)

// store is a brick as a replica wants it.
type store struct{ *brick.Brick }

func (s store) Execute(e *proto.Entry, raw []byte) (*replica.Result, error) {
	r, err := s.Brick.Execute(e, raw)
	return (*replica.Result)(r), err
}

func (s store) Rewind(pos cluster.Pos) error {
	err := s.Brick.Rewind(pos)
	if errors.Is(err, brick.ErrTooFar) {
		return replica.ErrTooFar
	}
	return err
}

func (s store) Entries(after uint64, n int) ([][]byte, error) {
	all, err := s.Brick.Entries(after, n)
	if errors.Is(err, brick.ErrTrimmed) {
		return nil, replica.ErrTrimmed
	}
	return all, err
}

func (s store) Sessions() []replica.SessionInfo {
	var out []replica.SessionInfo
	for _, x := range s.Brick.Sessions() {
		out = append(out, replica.SessionInfo(x))
	}
	return out
}

func (s store) Source() (replica.Source, error) { return s.Brick.Source() }

func (s store) Heal(ctx context.Context, pos cluster.Pos, call func(context.Context, []byte) ([]byte, error), p func(replica.HealProgress)) error {
	return s.Brick.Heal(ctx, pos, call, func(brick.HealProgress) {})
}

func (s store) Block(ctx context.Context, ino fsop.Ino, k uint64) (replica.Block, error) {
	b, err := s.Brick.Block(ctx, ino, k)
	return replica.Block(b), err
}

func (s store) Digest(ctx context.Context) (replica.Digest, error) {
	d, err := s.Brick.Digest(ctx)
	return replica.Digest(d), err
}

// set is a replica set whose bricks talk by function calls.
type set struct {
	bricks []cluster.BrickID
	reps   map[cluster.BrickID]*replica.Replica
	stop   func()
}

type link struct {
	s    *set
	self cluster.BrickID
}

func (l link) Send(to cluster.BrickID, kind uint8, parts ...[]byte) error {
	var env proto.Envelope
	if err := codec.Decode(parts[0], &env); err != nil {
		return err
	}
	l.s.reps[to].Message(env, kind, join(parts[1:]), nil)
	return nil
}

func (l link) Flush(cluster.BrickID) {}

func join(parts [][]byte) []byte {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

func (l link) Call(ctx context.Context, to cluster.BrickID, kind uint8, parts ...[]byte) ([]byte, error) {
	var env proto.Envelope
	if err := codec.Decode(parts[0], &env); err != nil {
		return nil, err
	}
	return l.s.reps[to].Call(ctx, env, kind, join(parts[1:]))
}

func (l link) Propose(context.Context, cluster.SetConfig) error { return replica.ErrRefused }
func (l link) Suspect(context.Context, cluster.SetID, cluster.Epoch, cluster.BrickID) error {
	return nil
}

type sink struct{}

func (sink) Invalidate(*proto.Inval) error { return nil }
func (sink) Detached(string)               {}

func newSet(t testing.TB, n int) *set {
	s := &set{reps: map[cluster.BrickID]*replica.Replica{}}
	id := cluster.SetID{Volume: cluster.NewID()}
	pool := cluster.NewID()
	for range n {
		s.bricks = append(s.bricks, cluster.NewID())
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	log := slog.New(slog.DiscardHandler)
	var all []*brick.Brick
	for _, b := range s.bricks {
		dir := t.TempDir()
		ident := brick.Identity{Format: brick.FormatVersion, Pool: pool, Volume: id.Volume, Brick: b}
		if err := brick.Format(disk.OS, dir, ident); err != nil {
			t.Fatal(err)
		}
		br, err := brick.Open(brick.Options{FS: disk.OS, Dir: dir, Identity: ident, Log: log})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, br)
		r, err := replica.New(replica.Config{Set: id, Brick: b, Store: store{br}, Transport: link{s, b}, Control: link{s, b}, Log: log})
		if err != nil {
			t.Fatal(err)
		}
		s.reps[b] = r
	}
	cfg := cluster.SetConfig{Set: id, Epoch: 1, Primary: s.bricks[0], Members: s.bricks, InSync: s.bricks, MinInSync: 1}
	for _, b := range s.bricks {
		r := s.reps[b]
		wg.Go(func() {
			if err := r.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		for _, o := range s.bricks {
			if o != b {
				r.Connected(o)
			}
		}
		r.Configure(cfg)
	}
	s.stop = func() {
		cancel()
		wg.Wait()
		for _, b := range all {
			if err := b.Close(false); err != nil {
				t.Error(err)
			}
		}
	}
	return s
}

func (s *set) attach(t testing.TB, i int, id cluster.SessionID) *replica.Session {
	for {
		ses, reply := s.reps[s.bricks[i]].Attach(t.Context(), "", &proto.Attach{Version: proto.Version, Session: id}, sink{})
		if reply.Status == proto.OK {
			ses.Ping(&proto.Ping{})
			return ses
		}
	}
}

func BenchmarkCreateWrite(b *testing.B) {
	for home := range 2 {
		b.Run(fmt.Sprint("home", home), func(b *testing.B) {
			s := newSet(b, 3)
			defer s.stop()
			ses := s.attach(b, home, 7)
			n := uint64(0)
			do := func(op fsop.Op) *fsop.Reply {
				d := proto.Do{Epoch: 1, Op: op}
				if op.Kind().Mutates() {
					n++
					d.Number, d.Acked = n, n
				}
				r := ses.Do(b.Context(), &d)
				if r.Status != 0 || r.Errno != 0 {
					b.Fatal(r.Status, r.Errno, fsop.String(op))
				}
				return &r.Reply
			}
			data := make([]byte, 4096)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				r := do(&fsop.Create{Node: fsop.Node{Parent: 1, Name: fmt.Sprintf("f%07d", i), Mode: 0o644}, Excl: true, Window: fsop.WindowAsk})
				do(&fsop.Write{Ino: r.Attr.Ino, Data: data, Window: fsop.WindowHeld | fsop.WindowDone})
			}
		})
	}
}
