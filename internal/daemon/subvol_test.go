package daemon

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"mortar/internal/api"
	"mortar/internal/codec"
	"mortar/internal/fsop"
	"mortar/internal/pacer"
	"mortar/internal/proto"
)

func ptr[T any](v T) *T { return &v }

// TestSubvolumes: a subvolume that is made on one machine has its limits for the
// clients of all, is known on all, those without a brick too, is not deleted while it is
// used, and gives back what it had when it is.
func TestSubvolumes(t *testing.T) {
	nodes := newPool(t, 3)
	newVolume(t, nodes[:2], "vol")
	ctx := t.Context()
	eventually(t, "the third peer knows of the volume", func() error {
		_, err := nodes[2].api.Subvolumes(ctx, "vol")
		return err
	})

	s, err := nodes[2].api.CreateSubvolume(ctx, "vol", api.SubvolumeCreate{Name: "web", Size: 10 * 4096, Inodes: 4, UID: 33, GID: 34, Mode: ptr[uint32](0o750)})
	if err != nil {
		t.Fatal(err)
	}
	if s.Name != "web" || s.Size != 10*4096 || s.Inodes != 4 || s.UID != 33 || s.GID != 34 || s.Mode != 0o750 || s.UsedSize != 0 || s.UsedInodes != 1 || len(s.Users) != 0 {
		t.Errorf("made %+v", s)
	}
	for i, n := range nodes {
		all, err := n.api.Subvolumes(ctx, "vol")
		if err != nil || len(all) != 1 || all[0].Inode != s.Inode || time.Since(all[0].Created).Abs() > time.Minute {
			t.Errorf("node %d lists %+v, %v", i, all, err)
		}
	}
	if _, err := nodes[0].api.CreateSubvolume(ctx, "vol", api.SubvolumeCreate{Name: "web"}); !api.IsCode(err, api.Exists) {
		t.Errorf("made twice: %v", err)
	}
	if _, err := nodes[0].api.CreateSubvolume(ctx, "vol", api.SubvolumeCreate{Name: "web/in"}); !api.IsCode(err, api.Invalid) {
		t.Errorf("made in another: %v", err)
	}
	for _, name := range []string{"", ".", "a/../b", "/a", "a/", strings.Repeat("n", 256)} {
		if _, err := nodes[0].api.CreateSubvolume(ctx, "vol", api.SubvolumeCreate{Name: name}); !api.IsCode(err, api.Invalid) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	if _, err := nodes[0].api.Subvolume(ctx, "vol", "nothing"); !api.IsCode(err, api.NotFound) {
		t.Errorf("one that is not there: %v", err)
	}

	// The limits are exact, whoever writes.
	top := fsop.Ino(s.Inode)
	one, two := attach(t, nodes[0], "vol", 1), attach(t, nodes[1], "vol", 2)
	file, err := one.do(&fsop.Create{Node: fsop.Node{Parent: top, Name: "f", Mode: 0o644}})
	if err != nil {
		t.Fatal(err)
	}
	wrote := 0
	for i := range 20 {
		w := []*mountless{one, two}[i%2]
		_, err := w.do(&fsop.Write{Ino: file.Attr.Ino, Off: uint64(i) * 4096, Data: make([]byte, 4096)})
		if errors.Is(err, fsop.EDQUOT) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		wrote++
	}
	if wrote != 10 {
		t.Errorf("%d blocks fitted into 10", wrote)
	}
	made := 1
	for i := range 10 {
		w := []*mountless{one, two}[i%2]
		if _, err := w.do(&fsop.Mkdir{Node: fsop.Node{Parent: top, Name: fmt.Sprint("d", i), Mode: 0o755}}); errors.Is(err, fsop.EDQUOT) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		made++
	}
	if made != 3 { // and the top itself
		t.Errorf("%d inodes fitted below the top, with a limit of 4", made)
	}
	df, err := two.do(&fsop.StatfsOp{Ino: file.Attr.Ino})
	if want := (fsop.Statfs{Total: 10 * 4096, Files: 4}); err != nil || df.Statfs != want {
		t.Errorf("df says %+v, %v", df, err)
	}
	if s, err = nodes[1].api.ChangeSubvolume(ctx, "vol", "web", api.SubvolumeChange{Size: ptr[uint64](11 * 4096)}); err != nil || s.Size != 11*4096 || s.Inodes != 4 || s.UsedSize != 10*4096 {
		t.Errorf("resized: %+v, %v", s, err)
	}
	if _, err := one.do(&fsop.Write{Ino: file.Attr.Ino, Off: 10 * 4096, Data: make([]byte, 4096)}); err != nil {
		t.Errorf("into the new room: %v", err)
	}

	// A name is a name.
	if s, err = nodes[0].api.ChangeSubvolume(ctx, "vol", "web", api.SubvolumeChange{Name: "site"}); err != nil || s.Name != "site" {
		t.Errorf("renamed: %+v, %v", s, err)
	}
	outside, err := one.do(&fsop.Mkdir{Node: fsop.Node{Parent: fsop.RootIno, Name: "plain", Mode: 0o755}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := one.do(&fsop.Rename{Parent: top, Name: "f", NewParent: outside.Attr.Ino, NewName: "f"}); !errors.Is(err, fsop.EXDEV) {
		t.Errorf("rename out of it: %v", err)
	}
	if _, err := one.do(&fsop.Link{Ino: file.Attr.Ino, Parent: outside.Attr.Ino, Name: "f"}); !errors.Is(err, fsop.EXDEV) {
		t.Errorf("link out of it: %v", err)
	}
	if _, err := nodes[0].api.ChangeSubvolume(ctx, "vol", "plain", api.SubvolumeChange{Size: ptr[uint64](1)}); !api.IsCode(err, api.NotFound) {
		t.Errorf("limits of a plain directory: %v", err)
	}
	if _, err := nodes[0].api.ChangeSubvolume(ctx, "vol", "plain", api.SubvolumeChange{Size: ptr[uint64](4096), Adopt: true}); err != nil {
		t.Errorf("limits of an empty directory: %v", err)
	}
	if all, err := nodes[2].api.Subvolumes(ctx, "vol"); err != nil || len(all) != 2 || all[0].Name != "plain" || all[1].Name != "site" {
		t.Errorf("listed %+v, %v", all, err)
	}

	// Nobody's subvolume is deleted under them.
	if _, err := two.do(&fsop.Use{Ino: file.Attr.Ino}); err != nil {
		t.Fatal(err)
	}
	err = nodes[2].api.DeleteSubvolume(ctx, "vol", "site", false)
	if !api.IsCode(err, api.Busy) || !strings.Contains(err.Error(), "test") {
		t.Errorf("deleted while it is in use: %v", err)
	}
	if s, err := nodes[0].api.Subvolume(ctx, "vol", "site"); err != nil || len(s.Users) != 1 || s.Users[0].Peer != nodes[1].cfg.Name || s.Users[0].Client != "test" || s.Users[0].Session == 0 {
		t.Errorf("in use: %+v, %v", s, err)
	}
	if _, err := two.do(&fsop.Use{Ino: file.Attr.Ino, Done: true}); err != nil {
		t.Fatal(err)
	}
	if err := nodes[2].api.DeleteSubvolume(ctx, "vol", "site", false); err != nil {
		t.Fatal(err)
	}
	if all, err := nodes[1].api.Subvolumes(ctx, "vol"); err != nil || len(all) != 1 {
		t.Errorf("after it was deleted: %+v, %v", all, err)
	}
	if _, err := one.do(&fsop.Create{Node: fsop.Node{Parent: top, Name: "late"}}); !errors.Is(err, fsop.ENOENT) && !errors.Is(err, fsop.ESTALE) {
		t.Errorf("a new file in it: %v", err)
	}
	// What is not in use any more goes, on every brick. The file is held by who made it.
	one.forget(file.Attr.Ino, 1)
	two.forget(file.Attr.Ino, 1)
	gone := []fsop.Ino{top, file.Attr.Ino}
	for _, s := range []*mountless{one, two} {
		eventually(t, "everything of it is gone", func() error {
			if i := slices.IndexFunc(gone, func(i fsop.Ino) bool {
				_, err := s.do(&fsop.Getattr{Ino: i})
				return !errors.Is(err, fsop.ESTALE)
			}); i >= 0 {
				return fmt.Errorf("inode %d is there", gone[i])
			}
			return nil
		})
	}
}

// forget tells that n holds of an inode are given up.
func (s *mountless) forget(ino fsop.Ino, n uint64) {
	s.t.Helper()
	if err := s.conn.Send(proto.KindForget, codec.Append(nil, &proto.Forget{Holds: []proto.Hold{{Ino: ino, N: n}}})); err != nil {
		s.t.Fatal(err)
	}
}

// TestManySubvolumes: a thousand are listed within a second.
func TestManySubvolumes(t *testing.T) {
	nodes := newPool(t, 1)
	newVolume(t, nodes, "vol")
	const count = 1000
	g, ctx := errgroup.WithContext(t.Context())
	g.SetLimit(8)
	for i := range count {
		g.Go(func() error {
			_, err := nodes[0].api.CreateSubvolume(ctx, "vol", api.SubvolumeCreate{Name: fmt.Sprintf("s%03d", i), Size: 1 << 30})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	given := pacer.New(t)
	began := given.Now()
	all, err := nodes[0].api.Subvolumes(t.Context(), "vol")
	took := given.Now() - began
	if err != nil || len(all) != count || all[7].Name != "s007" {
		t.Errorf("%d subvolumes, %v", len(all), err)
	}
	if took > time.Second {
		t.Errorf("listing %d subvolumes took %v", count, took)
	}
	t.Logf("listed in %v", took)
}
