package daemon

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"mortar/internal/api"
	"mortar/internal/brick"
	"mortar/internal/cluster"
	"mortar/internal/control/state"
	"mortar/internal/fsop"
	"mortar/internal/replica"
)

// Subvolumes are file-system state of the volume's first set, where its root
// directory is (doc/subvolumes.md). So every question goes to a brick of that set:
// this machine's if it serves one in sync, else another's.

// Subvolumes implements httpd.Volumes.
func (n *Node) Subvolumes(ctx context.Context, volume string) ([]api.Subvolume, error) {
	return n.subvolumes(ctx, api.SubvolumeRequest{Volume: volume})
}

// Subvolume implements httpd.Volumes.
func (n *Node) Subvolume(ctx context.Context, volume, name string) (*api.Subvolume, error) {
	return one(n.subvolumes(ctx, api.SubvolumeRequest{Volume: volume, Name: name}))
}

// CreateSubvolume implements httpd.Volumes.
func (n *Node) CreateSubvolume(ctx context.Context, volume string, r api.SubvolumeCreate) (*api.Subvolume, error) {
	return one(n.subvolumes(ctx, api.SubvolumeRequest{Volume: volume, Name: r.Name, Create: &r, Token: max(1, rand.Uint64())}))
}

// ChangeSubvolume implements httpd.Volumes.
func (n *Node) ChangeSubvolume(ctx context.Context, volume, name string, r api.SubvolumeChange) (*api.Subvolume, error) {
	q := api.SubvolumeRequest{Volume: volume, Name: name, Change: &r}
	if r.Name != "" {
		// Sent again after a fail-over, it may have another name already.
		s, err := n.Subvolume(ctx, volume, name)
		if err != nil {
			return nil, err
		}
		q.Inode = s.Inode
	}
	return one(n.subvolumes(ctx, q))
}

// DeleteSubvolume implements httpd.Volumes.
func (n *Node) DeleteSubvolume(ctx context.Context, volume, name string, force bool) error {
	// Sent again after a fail-over, it means the one that had the name at first.
	s, err := n.Subvolume(ctx, volume, name)
	if err != nil {
		return err
	}
	_, err = n.subvolumes(ctx, api.SubvolumeRequest{Volume: volume, Name: name, Delete: s.Inode, Force: force})
	return err
}

func one(all []api.Subvolume, err error) (*api.Subvolume, error) {
	if err != nil {
		return nil, err
	}
	if len(all) != 1 {
		return nil, api.Errorf(api.Internal, "%d subvolumes in an answer about one", len(all))
	}
	return &all[0], nil
}

// subvolumes asks the bricks of the volume until one answers.
func (n *Node) subvolumes(ctx context.Context, r api.SubvolumeRequest) ([]api.Subvolume, error) {
	if (r.Name != "" || r.Create != nil || r.Change != nil) && !validPath(r.Name) {
		return nil, api.Errorf(api.Invalid, "%q cannot be the name of a subvolume: it is a path in the volume, without a slash at its ends, and no part of it may be empty, \".\" or \"..\"", r.Name)
	}
	ctx, cancel := context.WithTimeout(ctx, decideTimeout)
	defer cancel()
	v, err := state.FindVolume(n.known(), r.Volume)
	if err != nil { // made a moment ago, perhaps
		if v, err = state.FindVolume(n.knownNow(ctx), r.Volume); err != nil {
			return nil, apiError(err)
		}
	}
	m, err := n.need()
	if err != nil {
		return nil, err
	}
	for {
		if v.Status != cluster.VolumeStarted {
			return nil, api.Errorf(api.VolumeStopped, "Volume %s is not started", v.Name)
		}
		all, err := m.askSubvolumes(ctx, v, r)
		if err == nil || !elsewhere(err) {
			return all, err
		}
		if v = m.later(ctx, v, 100*time.Millisecond); v == nil {
			return nil, err
		}
	}
}

// elsewhere reports whether another brick may do what one has refused.
func elsewhere(err error) bool {
	return errors.Is(err, api.ErrConnect) || api.IsCode(err, api.BrickDown) || api.IsCode(err, api.Unavailable)
}

// askSubvolumes asks every brick of the first set once, the nearest first.
func (m *member) askSubvolumes(ctx context.Context, v *cluster.Volume, r api.SubvolumeRequest) ([]api.Subvolume, error) {
	set := v.Sets[0]
	bricks := slices.Clone(set.InSync)
	rank := func(id cluster.BrickID) int {
		switch b := v.Brick(id); {
		case b != nil && b.Peer == m.keeper.ID():
			return 0
		case id == set.Primary:
			return 1
		}
		return 2
	}
	slices.SortStableFunc(bricks, func(a, b cluster.BrickID) int { return rank(a) - rank(b) })
	var last error = api.Errorf(api.BrickDown, "no brick of volume %s is in sync; look at \"mortar volume status %s\"", v.Name, v.Name)
	for _, id := range bricks {
		b := v.Brick(id)
		if b == nil {
			continue
		}
		all, err := at(ctx, m, b.Peer,
			func() ([]api.Subvolume, error) { return m.n.LocalSubvolumes(ctx, r) },
			func(c *api.Client) ([]api.Subvolume, error) { return c.LocalSubvolumes(ctx, r) })
		if err == nil || !elsewhere(err) {
			return all, err
		}
		last = err
		if ctx.Err() != nil {
			break
		}
	}
	return nil, last
}

func validPath(name string) bool {
	return !slices.ContainsFunc(strings.Split(name, "/"), func(part string) bool { return fsop.CheckName(part) != nil })
}

// LocalSubvolumes implements httpd.Local: it asks the brick of this machine.
func (n *Node) LocalSubvolumes(ctx context.Context, r api.SubvolumeRequest) ([]api.Subvolume, error) {
	m, err := n.need()
	if err != nil {
		return nil, err
	}
	known := m.latest()
	v, err := state.FindVolume(known, r.Volume)
	if err != nil {
		return nil, apiError(err)
	}
	rep, b := m.bricks.served(cluster.SetID{Volume: v.ID})
	if rep == nil {
		return nil, api.Errorf(api.BrickDown, "no brick of volume %s is served on this machine", v.Name)
	}
	w := &subvolumes{ctx: ctx, known: known, volume: v.Name, rep: rep, brick: b}
	return w.do(&r)
}

// subvolumes carries out one request about subvolumes with one brick.
type subvolumes struct {
	ctx    context.Context
	known  *cluster.Map
	volume string
	rep    *replica.Replica
	brick  *brick.Brick
}

func (w *subvolumes) do(r *api.SubvolumeRequest) ([]api.Subvolume, error) {
	switch {
	case r.Name == "":
		// What is committed, and that this brick may say so, the root directory tells.
		if _, err := w.rep.System(w.ctx, &fsop.Getattr{Ino: fsop.RootIno}); err != nil {
			return nil, w.failed("", err)
		}
		return w.list(0)
	case r.Delete != 0:
		return nil, w.remove(r)
	case len(r.Ended) > 0:
		return nil, w.end(r)
	case r.Create != nil:
		return w.create(r)
	case r.Change != nil:
		return w.change(r)
	}
	top, err := w.walk(r.Name)
	if err != nil {
		return nil, w.failed(r.Name, err)
	}
	return w.named(r.Name, top)
}

// walk finds the inode of a path.
func (w *subvolumes) walk(name string) (fsop.Ino, error) {
	at, err := fsop.Resolve(w.ctx, fsop.HandlerFunc(w.rep.System), name)
	return at.Ino, err
}

// split takes the last part off a path.
func split(name string) (dir, base string) {
	i := strings.LastIndexByte(name, '/')
	return name[:max(i, 0)], name[i+1:]
}

func (w *subvolumes) create(r *api.SubvolumeRequest) ([]api.Subvolume, error) {
	c := r.Create
	dir, base := split(r.Name)
	parent, err := w.walk(dir)
	if err != nil {
		return nil, w.failed(dir, err)
	}
	mode := uint32(0o755)
	if c.Mode != nil {
		mode = *c.Mode
	}
	if mode&^0o7777 != 0 {
		return nil, api.Errorf(api.Invalid, "mode %o: want permission bits, at most 7777", mode)
	}
	op := &fsop.MakeSubvolume{
		Node: fsop.Node{Parent: parent, Name: base, Mode: mode, UID: c.UID, GID: c.GID},
		Size: c.Size, Inodes: c.Inodes, Token: r.Token,
	}
	reply, err := w.rep.System(w.ctx, op)
	switch {
	case errors.Is(err, fsop.EEXIST):
		return nil, api.Errorf(api.Exists, "%s/%s exists", w.volume, r.Name)
	case errors.Is(err, fsop.EINVAL):
		return nil, api.Errorf(api.Invalid, "%s/%s would be in a subvolume: make it beside that", w.volume, r.Name)
	case err != nil:
		return nil, w.failed(r.Name, err)
	}
	return w.named(r.Name, reply.Attr.Ino)
}

func (w *subvolumes) change(r *api.SubvolumeRequest) ([]api.Subvolume, error) {
	c := r.Change
	top, err := w.walk(r.Name)
	if errors.Is(err, fsop.ENOENT) && c.Name != "" {
		// Perhaps it was renamed by the same request, whose answer got lost.
		if again, aerr := w.walk(c.Name); aerr == nil && uint64(again) == r.Inode && r.Inode != 0 {
			return w.named(c.Name, again)
		}
	}
	if err != nil {
		return nil, w.failed(r.Name, err)
	}
	op := &fsop.LimitSubvolume{Ino: top}
	if c.Size != nil {
		op.Valid, op.Size = op.Valid|fsop.LimitSize, *c.Size
	}
	if c.Inodes != nil {
		op.Valid, op.Inodes = op.Valid|fsop.LimitInodes, *c.Inodes
	}
	if c.Adopt {
		op.Valid |= fsop.LimitAdopt
	}
	_, err = w.rep.System(w.ctx, op)
	switch {
	case errors.Is(err, fsop.EINVAL) && c.Adopt:
		return nil, api.Errorf(api.Invalid, "%s/%s cannot be a subvolume: it is in one, or has one in it, or it is the whole volume", w.volume, r.Name)
	case errors.Is(err, fsop.EINVAL):
		return nil, w.none(r.Name)
	case errors.Is(err, fsop.E2BIG):
		return nil, api.Errorf(api.Conflict, "%s/%s has more than %d files and directories in it, too many to be counted in one step: "+
			"make a subvolume (mortar subvolume create) and move the contents there", w.volume, r.Name, fsop.AdoptMost)
	case errors.Is(err, fsop.EXDEV):
		return nil, api.Errorf(api.Conflict, "%s/%s has a file in it that has another name outside (a hard link), so it belongs to both: "+
			"remove one of them (find DIR -links +1 shows such files)", w.volume, r.Name)
	case err != nil:
		return nil, w.failed(r.Name, err)
	}
	name := r.Name
	if c.Name != "" && c.Name != r.Name {
		if !validPath(c.Name) {
			return nil, api.Errorf(api.Invalid, "%q cannot be the name of a subvolume", c.Name)
		}
		fromDir, from := split(r.Name)
		toDir, to := split(c.Name)
		mv := &fsop.Rename{Name: from, NewName: to, Flags: fsop.RenameNoReplace}
		if mv.Parent, err = w.walk(fromDir); err != nil {
			return nil, w.failed(fromDir, err)
		}
		if mv.NewParent, err = w.walk(toDir); err != nil {
			return nil, w.failed(toDir, err)
		}
		_, err = w.rep.System(w.ctx, mv)
		switch {
		case errors.Is(err, fsop.EEXIST):
			return nil, api.Errorf(api.Exists, "%s/%s exists", w.volume, c.Name)
		case errors.Is(err, fsop.EXDEV), errors.Is(err, fsop.EINVAL):
			return nil, api.Errorf(api.Invalid, "%s/%s would be in a subvolume", w.volume, c.Name)
		case err != nil:
			return nil, w.failed(r.Name, err)
		}
		name = c.Name
	}
	return w.named(name, top)
}

func (w *subvolumes) remove(r *api.SubvolumeRequest) error {
	dir, base := split(r.Name)
	parent, err := w.walk(dir)
	if err != nil {
		return w.failed(dir, err)
	}
	_, err = w.rep.System(w.ctx, &fsop.RemoveSubvolume{Parent: parent, Name: base, Ino: fsop.Ino(r.Delete), Force: r.Force})
	if errors.Is(err, fsop.EBUSY) {
		by := "a mount"
		if all, lerr := w.named(r.Name, fsop.Ino(r.Delete)); lerr == nil {
			var names []string
			for _, u := range all[0].Users {
				names = append(names, u.Client)
			}
			by = strings.Join(names, ", ")
		}
		return api.Errorf(api.Busy, "subvolume %s/%s is in use by %s: unmount it there, or delete it with force", w.volume, r.Name, by)
	}
	if err != nil {
		return w.failed(r.Name, err)
	}
	return nil
}

// end has the set take sessions for gone that have ended without a word, and not wait
// until nobody has heard of them for long. One that lives after all comes back, without its locks.
func (w *subvolumes) end(r *api.SubvolumeRequest) error {
	for _, id := range r.Ended {
		if _, err := w.rep.System(w.ctx, &fsop.CloseSession{Session: id, Away: true}); err != nil {
			return w.failed(r.Name, err)
		}
	}
	return nil
}

// named describes the subvolume that a name leads to.
func (w *subvolumes) named(name string, top fsop.Ino) ([]api.Subvolume, error) {
	all, err := w.list(top)
	if err == nil && len(all) != 1 {
		return nil, w.none(name)
	}
	return all, err
}

func (w *subvolumes) none(name string) error {
	return api.Errorf(api.NotFound, "%s/%s is not a subvolume", w.volume, name)
}

// list describes the subvolumes of the brick, or the one with that top directory.
func (w *subvolumes) list(top fsop.Ino) ([]api.Subvolume, error) {
	infos, err := w.brick.Subvolumes(top)
	if err != nil {
		return nil, api.Errorf(api.BrickDown, "%w", err)
	}
	all := make([]api.Subvolume, 0, len(infos))
	for i := range infos {
		s := &infos[i]
		out := api.Subvolume{
			Volume: w.volume, Name: s.Path, Inode: uint64(s.Ino),
			Size: s.Size, Inodes: s.Inodes, UsedSize: s.UsedSize, UsedInodes: s.UsedInodes,
			UID: s.Attr.UID, GID: s.Attr.GID, Mode: s.Attr.Mode & 0o7777,
			Created: time.Unix(0, s.Made).UTC(), Used: time.Unix(0, s.Used).UTC(), Users: []api.SubvolumeUser{},
		}
		for _, u := range s.Users {
			user := api.SubvolumeUser{Client: u.Client, Session: uint64(u.ID)}
			if id, err := cluster.ParseID(u.Owner); err == nil {
				if p := w.known.Peer(id); p != nil {
					user.Peer = p.Name
				}
			}
			out.Users = append(out.Users, user)
		}
		all = append(all, out)
	}
	return all, nil
}

// failed says what went wrong with a name.
func (w *subvolumes) failed(name string, err error) error {
	var errno fsop.Errno
	switch {
	case errors.Is(err, replica.ErrNotServing):
		return api.Errorf(api.BrickDown, "volume %s: %w", w.volume, err)
	case errors.Is(err, fsop.ENOENT):
		return api.Errorf(api.NotFound, "%s/%s does not exist", w.volume, name)
	case errors.Is(err, fsop.EROFS):
		return api.Errorf(api.BrickDown, "volume %s takes no changes now: too few of its bricks are in sync; look at \"mortar volume status %s\"", w.volume, w.volume)
	case errors.Is(err, fsop.ENOTDIR):
		return api.Errorf(api.Invalid, "%s/%s: a part of it is not a directory", w.volume, name)
	case errors.As(err, &errno):
		return api.Errorf(api.Conflict, "%s/%s: %w", w.volume, name, errno)
	}
	return api.Errorf(api.Internal, "%w", fmt.Errorf("%s/%s: %w", w.volume, name, err))
}
