package daemon

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"mortar/internal/api"
	"mortar/internal/cluster"
	"mortar/internal/control/state"
	"mortar/internal/dockervol"
	"mortar/internal/fsop"
)

// DefaultDockerSocket is where engines look for a volume driver named mortar.
const DefaultDockerSocket = "/run/docker/plugins/mortar.sock"

// DockerOff is what Config.DockerSocket says for no driver.
const DockerOff = "off"

// Files of the volume driver.
const (
	dockerFile = "docker.json" // in the state directory
	dockerDir  = "docker"      // of mount points, in the run directory
)

// DriverSocket is where the volume driver listens, empty if there is to be none.
func (c *Config) DriverSocket() string {
	switch {
	case c.DockerSocket == DockerOff:
		return ""
	case c.DockerSocket != "":
		return c.DockerSocket
	case c.RunDir == DefaultRunDir:
		return DefaultDockerSocket
	}
	return "" // one daemon of several on this machine
}

// listenDocker opens the socket of the volume driver, nil if there is to be none. By
// default a daemon that cannot have it does without.
func (n *Node) listenDocker() (net.Listener, error) {
	path := n.cfg.DriverSocket()
	if path == "" {
		return nil, nil
	}
	ln, err := listenUnix(path, false)
	if err != nil && n.cfg.DockerSocket == "" {
		n.log.Warn("there is no volume driver for Docker on this machine", "error", err)
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("socket for Docker: %w", err)
	}
	return ln, nil
}

// serveDocker answers the engines of this machine.
func (n *Node) serveDocker(ctx context.Context) error {
	log := n.log.With("part", "docker")
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	d, err := dockervol.New(dockervol.Config{
		Pool: dockerPool{n}, Mounter: dockerMounter{n}, Kernel: dockervol.Linux{Log: log},
		Engine: dockervol.Dockerd{Socket: "/run/docker.sock", PIDFile: "/run/docker.pid"},
		Dir:    filepath.Join(n.cfg.RunDir, dockerDir), File: n.path(dockerFile), Boot: string(bytes.TrimSpace(boot)),
		Default: n.cfg.DockerVolume, Patience: dockervol.Patience, Log: log,
	})
	if err != nil {
		// The machine's bricks are worth more; engines find nobody, and say so.
		log.Error("there is no volume driver for Docker on this machine", "error", err)
		n.docker.Close()
		return nil
	}
	n.driver.Store(d)
	return n.door(d.Serve(ctx, n.docker))
}

// dockerPool is the pool as the volume driver sees it.
type dockerPool struct{ n *Node }

var _ dockervol.Pool = dockerPool{}

var dockerStates = map[cluster.DockerState]dockervol.State{
	cluster.DockerMaking: dockervol.Making, cluster.DockerReady: dockervol.Ready, cluster.DockerRemoving: dockervol.Removing,
}

func dockerOf(known *cluster.Map, d *cluster.DockerVolume) *dockervol.Volume {
	v := &dockervol.Volume{
		Name: d.Name, Dir: d.Dir, Own: d.Own, Size: d.Size, UID: d.UID, GID: d.GID, Mode: d.Mode, ReadOnly: d.ReadOnly,
		Created: time.Unix(d.Created, 0), State: dockerStates[d.State],
	}
	if in := known.VolumeByID(d.Volume); in != nil {
		v.Volume = in.Name
	}
	return v
}

// Find implements dockervol.Pool.
func (p dockerPool) Find(name string) *dockervol.Volume {
	known := p.n.known()
	if d := known.DockerVolume(name); d != nil {
		return dockerOf(known, d)
	}
	return nil
}

// List implements dockervol.Pool.
func (p dockerPool) List() []dockervol.Volume {
	known := p.n.known()
	var all []dockervol.Volume
	for _, d := range known.Docker {
		all = append(all, *dockerOf(known, d))
	}
	return all
}

// Backings implements dockervol.Pool.
func (p dockerPool) Backings() ([]dockervol.Backing, error) {
	if _, err := p.n.need(); err != nil {
		return nil, err
	}
	var all []dockervol.Backing
	for _, v := range p.n.known().Volumes {
		all = append(all, dockervol.Backing{Name: v.Name, Replica: v.Replica, Started: v.Status == cluster.VolumeStarted})
	}
	return all, nil
}

// Refresh implements dockervol.Pool.
func (p dockerPool) Refresh(ctx context.Context) { p.n.knownNow(ctx) }

// patiently does something until the pool can. The error is the last one.
func patiently(ctx context.Context, do func(ctx context.Context) error) error {
	for {
		err := do(ctx)
		wait := api.IsCode(err, api.NoQuorum) || api.IsCode(err, api.BrickDown) || api.IsCode(err, api.Unavailable) || api.IsCode(err, api.NodeDown)
		if err == nil || !wait {
			return err
		}
		if !pause(ctx, 200*time.Millisecond) {
			return err
		}
	}
}

// put proposes a state of a Docker volume.
func (p dockerPool) put(ctx context.Context, d cluster.DockerVolume, next cluster.DockerState) error {
	d.State = next
	m, err := p.n.need()
	if err != nil {
		return err
	}
	return apiError(m.propose(ctx, state.Command{PutDocker: &state.PutDocker{Volume: d}}))
}

func (p dockerPool) drop(ctx context.Context, d *cluster.DockerVolume) error {
	m, err := p.n.need()
	if err != nil {
		return err
	}
	err = apiError(m.propose(ctx, state.Command{DropDocker: &state.DropDocker{Name: d.Name, ID: d.ID}}))
	if api.IsCode(err, api.NotFound) {
		return nil // another machine was faster
	}
	return err
}

// Create implements dockervol.Pool. The pool hears of the volume before its
// directory is made, so a crash leaves none that nobody knows of; the directory is
// made under the volume's id, so whoever goes on makes no second one and takes none
// that is not its own.
func (p dockerPool) Create(ctx context.Context, v dockervol.Volume) error {
	return patiently(ctx, func(ctx context.Context) error {
		known := p.n.known()
		d := known.DockerVolume(v.Name)
		if d == nil {
			in, err := state.FindVolume(known, v.Volume)
			if err != nil {
				return apiError(err)
			}
			d = &cluster.DockerVolume{
				ID: cluster.NewID(), Name: v.Name, Volume: in.ID, Dir: v.Dir, Own: v.Own, Size: v.Size,
				UID: v.UID, GID: v.GID, Mode: v.Mode, ReadOnly: v.ReadOnly, Created: time.Now().Unix(),
			}
			err = p.put(ctx, *d, cluster.DockerMaking)
			if api.IsCode(err, api.Busy) { // another machine was faster
				known = p.n.knownNow(ctx)
				if other := known.DockerVolume(v.Name); other != nil {
					d, err = other, nil
				}
			}
			if err != nil {
				return err
			}
		}
		if have := dockerOf(known, d); !alike(have, &v) {
			return api.Errorf(api.Exists, "another machine has made a Docker volume %s with other options just now", v.Name)
		}
		if d.State == cluster.DockerReady {
			return nil
		}
		if err := p.make(ctx, v.Volume, d); err != nil {
			if api.IsCode(err, api.Exists) || api.IsCode(err, api.NotFound) || api.IsCode(err, api.Invalid) || api.IsCode(err, api.Conflict) {
				// It cannot be made, so it is not to be.
				if derr := errors.Join(p.put(ctx, *d, cluster.DockerRemoving), p.drop(ctx, d)); derr != nil {
					return derr
				}
			}
			return err
		}
		return p.put(ctx, *d, cluster.DockerReady)
	})
}

// alike reports whether two Docker volumes are the same thing.
func alike(a, b *dockervol.Volume) bool {
	x, y := *a, *b
	x.Created, x.State = y.Created, y.State
	return x == y
}

// make makes the directory of a Docker volume, or sees that it is there.
func (p dockerPool) make(ctx context.Context, volume string, d *cluster.DockerVolume) error {
	if !d.Own {
		return p.n.checkDirectory(ctx, volume, d.Dir)
	}
	token := max(1, binary.LittleEndian.Uint64(d.ID[:8]))
	mode := d.Mode
	_, err := p.n.subvolumes(ctx, api.SubvolumeRequest{Volume: volume, Name: d.Dir, Token: token,
		Create: &api.SubvolumeCreate{Name: d.Dir, Size: d.Size, UID: d.UID, GID: d.GID, Mode: &mode}})
	if api.IsCode(err, api.Exists) {
		return api.Errorf(api.Exists, "volume %s has something called %s already, which was not made for Docker: \"-o subdir=%s\" shares that", volume, d.Dir, d.Dir)
	}
	return err
}

// checkDirectory says why a path of a volume is no directory.
func (n *Node) checkDirectory(ctx context.Context, volume, dir string) error {
	cfg := MountConfig{Volume: volume, StateDir: n.cfg.StateDir, RunDir: n.cfg.RunDir, Wait: decideTimeout}
	err := Session(ctx, cfg, func(ctx context.Context, h fsop.Handler) error {
		at, err := fsop.Resolve(ctx, h, dir)
		switch {
		case errors.Is(err, fsop.ENOENT):
			return api.Errorf(api.NotFound, "volume %s has no directory %s: make it in a mount of the volume", volume, dir)
		case errors.Is(err, fsop.ENOTDIR), err == nil && !at.IsDir():
			return api.Errorf(api.Invalid, "%s of volume %s is not a directory", dir, volume)
		}
		return err
	})
	var known *api.Error
	if err != nil && !errors.As(err, &known) {
		return api.Errorf(api.Unavailable, "%w", err)
	}
	return err
}

// lastWord is how long the mount of a container that has ended may take to close its session.
const lastWord = 2 * time.Second

// Remove implements dockervol.Pool. Nobody begins to use the volume once the pool
// has heard that it goes; whoever uses it then is known to the bricks, which say so.
func (p dockerPool) Remove(ctx context.Context, name string) error {
	return patiently(ctx, func(ctx context.Context) error {
		known := p.n.knownNow(ctx)
		d := known.DockerVolume(name)
		if d == nil {
			return nil
		}
		was := d.State
		if was != cluster.DockerRemoving {
			if err := p.put(ctx, *d, cluster.DockerRemoving); err != nil {
				return err
			}
		}
		if d.Own {
			err := p.n.DeleteSubvolume(ctx, dockerOf(known, d).Volume, d.Dir, false)
			// A mount that has ended just now tells the bricks a moment later.
			for end := time.Now().Add(lastWord); api.IsCode(err, api.Busy) && time.Now().Before(end) && pause(ctx, lastWord/20); {
				err = p.n.DeleteSubvolume(ctx, dockerOf(known, d).Volume, d.Dir, false)
			}
			if api.IsCode(err, api.NotFound) {
				err = nil // it was deleted, or never made
			}
			if api.IsCode(err, api.Busy) {
				err = fmt.Errorf("Docker volume %s: %w", name, err)
				return errors.Join(err, p.put(ctx, *d, cluster.DockerReady))
			}
			if err != nil {
				return err
			}
		} else if by := p.users(ctx, known, name); by != "" {
			err := api.Errorf(api.Busy, "Docker volume %s is in use by %s", name, by)
			return errors.Join(err, p.put(ctx, *d, cluster.DockerReady))
		}
		return p.drop(ctx, d)
	})
}

// users names the machines of the pool with containers that use a Docker volume. Of a directory that was not made for
// it, the bricks do not know. A machine that does not answer may use it still; it keeps its mount, and the directory stays.
func (p dockerPool) users(ctx context.Context, known *cluster.Map, name string) string {
	m := p.n.current()
	if m == nil {
		return ""
	}
	var peers []cluster.PeerID
	for _, peer := range known.Peers {
		peers = append(peers, peer.ID)
	}
	all, fails := askEach(ctx, m, peers, func(ctx context.Context, id cluster.PeerID) (*api.LocalDocker, error) {
		return at(ctx, m, id,
			func() (*api.LocalDocker, error) { return p.n.LocalDocker(ctx, name) },
			func(c *api.Client) (*api.LocalDocker, error) { return c.LocalDocker(ctx, name) })
	})
	var by []string
	for _, peer := range known.Peers {
		if err := fails[peer.ID]; err != nil {
			p.n.log.Info("whether a machine uses a Docker volume that is removed is not known", "volume", name, "peer", peer.Name, "error", err)
		} else if r := all[peer.ID]; r.Containers > 0 {
			by = append(by, fmt.Sprintf("%s (%d)", peer.Name, r.Containers))
		}
	}
	return strings.Join(by, ", ")
}

// LocalDocker implements httpd.Local. Who asks has told the pool that the volume goes. With this machine's copy of that
// up to date, nobody here begins to use it after he was counted.
func (n *Node) LocalDocker(ctx context.Context, name string) (*api.LocalDocker, error) {
	r := new(api.LocalDocker)
	n.knownNow(ctx)
	if d := n.driver.Load(); d != nil {
		r.Containers = d.InUse(name)
	}
	return r, nil
}

// dockerMounter makes the mounts of Docker volumes: "mortar mount", a process of
// its own, which goes on whatever becomes of the daemon.
type dockerMounter struct{ n *Node }

// Ended implements dockervol.Mounter. Mounts are known to the set by machine and directory.
func (m dockerMounter) Ended(ctx context.Context, v *dockervol.Volume, dir string) error {
	s, err := m.n.Subvolume(ctx, v.Volume, v.Dir)
	if api.IsCode(err, api.NotFound) {
		return nil // no subvolume: nothing waits for the mount
	}
	if err != nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	self := m.n.known().Peer(m.n.ID())
	var ended []uint64
	for _, u := range s.Users {
		if self != nil && u.Peer == self.Name && u.Client == mountClient(host, dir) {
			ended = append(ended, u.Session)
		}
	}
	if len(ended) == 0 {
		return nil
	}
	_, err = m.n.subvolumes(ctx, api.SubvolumeRequest{Volume: v.Volume, Name: v.Dir, Ended: ended})
	return err
}

// Mount implements dockervol.Mounter.
func (m dockerMounter) Mount(ctx context.Context, v *dockervol.Volume, dir string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// A program that was replaced while it ran is named so; the new one does as well.
	self = strings.TrimSuffix(self, " (deleted)")
	wait := dockervol.Patience
	if end, ok := ctx.Deadline(); ok {
		wait = time.Until(end) - 2*time.Second // what is left for saying why not
	}
	args := []string{"mount", "localhost:/" + v.Volume + "/" + v.Dir, dir,
		"--wait", max(time.Second, wait).Round(time.Millisecond).String(), "--state-dir", m.n.cfg.StateDir, "--run-dir", m.n.cfg.RunDir}
	if v.ReadOnly {
		args = append(args, "-o", "ro")
	}
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 3 * time.Second
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		text := strings.TrimSpace(said.String())
		if text == "" {
			text = err.Error()
		}
		return errors.New(text)
	}
	return nil
}
