package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"mortar/internal/client"
	"mortar/internal/cluster"
	"mortar/internal/estate"
	"mortar/internal/fsop"
	"mortar/internal/mount"
	"mortar/internal/pki"
	"mortar/internal/proto"
)

// MountConfig says what to mount where, and how to find it.
type MountConfig struct {
	Volume string
	// Hosts are machines of the pool, host or host:port, to ask while the daemon
	// of this machine does not answer. They may be empty.
	Hosts []string
	Dir   string
	// Subdir is the directory of the volume to show at Dir; empty: all.
	Subdir string
	// Mount has the options of the mount itself. Its CacheTimeout counts if it
	// is not 0, else the volume's option.
	Mount mount.Options
	// StateDir and RunDir are those of the daemon on this machine.
	StateDir, RunDir string
	// Wait is how long to wait for the volume to be served: at boot, daemons and
	// mounts start together.
	Wait time.Duration
	// Ready is called once the mount answers.
	Ready func()
	// Before is what the process before this one of the same mount left. nil: this is the first.
	Before *MountBefore
	// Serving, if set, is called once the mount can be handed on, before Ready, and with Before before anything
	// is served; what it returns is called when the mount has ended.
	Serving func(s *MountServing) (ended func())
	Log     *slog.Logger
}

// RunMount mounts a volume and serves it until it is unmounted or ctx ends,
// which unmounts it. It is a process of its own: it outlives restarts of the
// daemon, and while the daemon is down it goes on with other machines of the
// pool, as the peer that this machine is.
func RunMount(ctx context.Context, cfg MountConfig) error {
	if cfg.Before == nil { // else whoever looks would have to be answered by this very process
		if err := checkMountPoint(cfg.Dir); err != nil {
			return err
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	e, err := estate.New()
	if err != nil {
		cfg.Log.Warn("this mount cannot be handed on to another process", "error", err)
		e = estate.Private()
	}
	defer e.Close()
	k := new(lateKernel)
	deaths := &certifier{ctx: ctx, log: cfg.Log}
	defer deaths.wg.Wait()
	c, err := newClient(cfg, mountClient(host, cfg.Dir), k, deaths, e)
	if err != nil {
		return err
	}
	var m *mount.Mount
	if cfg.Before != nil {
		if m, err = adopt(cfg, c, k, e); err != nil {
			return err
		}
	}
	ended := func() {}
	serving := func() {
		if cfg.Serving != nil {
			ended = cfg.Serving(&MountServing{m: m, c: c, e: e})
		}
	}
	if m != nil {
		// Before anything is done under new numbers: should this process end now, the
		// next one must begin with what this one leaves, not with what the one before did.
		serving()
	}
	g, ctx := errgroup.WithContext(ctx)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// The session ends after the mount, whatever ends that.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	refused := make(chan error, 1)
	g.Go(func() error {
		err := c.Run(life)
		if life.Err() != nil {
			return nil
		}
		refused <- err
		cancel()
		return nil
	})
	g.Go(func() error {
		defer end()
		dir := cfg.Dir
		if m == nil {
			if err := await(ctx, c, cfg, refused); err != nil {
				return err
			}
			o := mountOptions(cfg, c, k, e)
			if cfg.Subdir != "" {
				// The whole volume is mounted out of sight first.
				var err error
				if dir, err = os.MkdirTemp(cfg.RunDir, "mount-"); err != nil {
					return err
				}
				defer os.Remove(dir)
			}
			m = mount.New(o)
			k.mount.Store(m)
		}
		g.Go(func() error {
			select {
			case <-m.Ready():
			case <-ctx.Done():
				return nil
			}
			if cfg.Subdir != "" && cfg.Before == nil {
				// A subvolume that is mounted is not deleted by mistake.
				use := func(ino uint64) error {
					err := c.Use(ctx, fsop.Ino(ino))
					if errors.Is(err, fsop.EROFS) {
						cfg.Log.Warn("the set takes no changes now, so it does not know that the subvolume is mounted", "dir", cfg.Dir)
						return nil
					}
					return err
				}
				if err := m.Narrow(cfg.Subdir, cfg.Dir, use); err != nil {
					return err
				}
			}
			if cfg.Before == nil {
				serving()
			}
			if cfg.Ready != nil {
				cfg.Ready()
			}
			return nil
		})
		defer cancel()
		return m.Serve(ctx, dir, c)
	})
	err = g.Wait()
	ended()
	select {
	case rerr := <-refused:
		if rerr != nil {
			return rerr
		}
	default:
	}
	return err
}

// mountClient is what a mount is called in sessions.
func mountClient(host, dir string) string { return host + ":" + dir }

// mountOptions are those of the mount itself.
func mountOptions(cfg MountConfig, c *client.Client, k *lateKernel, e *estate.Estate) mount.Options {
	o := cfg.Mount
	if o.CacheTimeout == 0 {
		o.CacheTimeout = k.cacheTimeout()
	}
	if o.FsName == "" {
		o.FsName = strings.Join(cfg.Hosts, ",") + ":/" + cfg.Volume
	}
	o.Log, o.Leased, o.Estate = cfg.Log, c.Leased, e
	return o
}

// await waits until the volume answers.
func await(ctx context.Context, c *client.Client, cfg MountConfig, refused chan error) error {
	var limit <-chan time.Time
	if cfg.Wait > 0 {
		timer := time.NewTimer(cfg.Wait)
		defer timer.Stop()
		limit = timer.C
	}
	select {
	case <-c.Ready():
		return nil
	case <-limit:
		return fmt.Errorf("volume %s does not answer within %v: is mortar running (mortar peer status), and has the volume a brick in sync (mortar volume status %s)?", cfg.Volume, cfg.Wait, cfg.Volume)
	case err := <-refused:
		refused <- err
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Session opens a session of a volume without mounting it, has f use it, and
// closes it.
func Session(ctx context.Context, cfg MountConfig, f func(ctx context.Context, h fsop.Handler) error) error {
	c, err := newClient(cfg, "command line", nil, nil, nil)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	refused := make(chan error, 1)
	var g errgroup.Group
	g.Go(func() error {
		err := c.Run(life)
		if life.Err() == nil {
			refused <- err
			cancel()
		}
		return nil
	})
	err = await(ctx, c, cfg, refused)
	if err == nil {
		err = f(ctx, c)
	}
	end()
	g.Wait()
	return err
}

// newClient makes the session's client, which finds the volume by way of the
// daemon on this machine or, with the identity of this machine, of others. deaths, if not
// nil, is told when it loses its home here.
func newClient(cfg MountConfig, name string, k client.Kernel, deaths *certifier, e *estate.Estate) (*client.Client, error) {
	dirs := Config{StateDir: cfg.StateDir, RunDir: cfg.RunDir, Listen: ":0", Name: "mount"}
	if err := dirs.validate(); err != nil {
		return nil, err
	}
	cc := client.Config{Volume: cfg.Volume, Name: name, Local: dirs.DataSocket(), Kernel: k, Log: cfg.Log, Estate: e,
		// Without FLUSH there is no close that could wait for what is in a window.
		Windows: k != nil && !cfg.Mount.LocksNode && !cfg.Mount.ReadOnly,
	}
	if deaths != nil {
		deaths.stateDir, deaths.runDir = dirs.StateDir, dirs.RunDir
		cc.HomeLost = deaths.homeLost
	}
	if cfg.Before != nil {
		cc.Left = cfg.Before.Left
	}
	if late, ok := k.(*lateKernel); ok {
		cc.Options = late.options
	}
	path := filepath.Join(dirs.StateDir, identityFile)
	id, err := pki.Load(path)
	switch _, serr := os.Lstat(cc.Local); {
	case err == nil && id.Cert != nil:
		cc.Dial = func(ctx context.Context, peer cluster.PeerID, addr string) (net.Conn, error) {
			return dialAsPeer(ctx, path, peer, addr)
		}
		cc.Addrs = peerAddrs(filepath.Join(dirs.StateDir, mapFile), id.ID())
		for _, h := range cfg.Hosts {
			if a, err := hostPort(h, ""); err == nil && h != "localhost" {
				cc.Addrs = append(cc.Addrs, a)
			}
		}
	case serr == nil: // the daemon is there, and who we are is its business
	case err == nil || errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("no mortar daemon runs on this machine (%s does not exist), and the machine belongs to no pool (%s): "+
			"start the daemon with \"systemctl start mortar\" or \"mortar server\", and join a pool with \"mortar join\"", cc.Local, dirs.StateDir)
	default:
		return nil, fmt.Errorf("the identity of this machine: %w", err)
	}
	return client.New(cc), nil
}

// dialAsPeer connects to another machine as the peer that this machine is.
func dialAsPeer(ctx context.Context, path string, peer cluster.PeerID, addr string) (net.Conn, error) {
	keeper, err := machineKeeper(path)
	if err != nil {
		return nil, err
	}
	tc, err := dial(ctx, addr, keeper.ClientTo(alpnData, peer))
	if err != nil {
		return nil, err
	}
	return tc, nil
}

// machineKeeper is for a process beside the daemon that speaks as this machine. The identity
// is read each time: the daemon renews it.
func machineKeeper(path string) (*pki.Keeper, error) {
	id, err := pki.Load(path)
	if err != nil {
		return nil, err
	}
	return pki.NewKeeper(id, pki.KeeperOptions{})
}

// peerAddrs are the addresses of the other peers in a saved map.
func peerAddrs(path string, self cluster.PeerID) []string {
	known, err := loadMap(path)
	if err != nil {
		return nil
	}
	var addrs []string
	for _, p := range known.Peers {
		if p.ID != self {
			addrs = append(addrs, p.Addrs...)
		}
	}
	return addrs
}

// checkMountPoint refuses places where a mount would do harm.
func checkMountPoint(dir string) error {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if abs == "/" {
		return errors.New("Cannot mount over root")
	}
	fi, err := os.Stat(abs)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("mount point %s does not exist; make it with mkdir", dir)
	case err != nil:
		return fmt.Errorf("mount point %s: %w", dir, err)
	case !fi.IsDir():
		return fmt.Errorf("mount point %s is not a directory", dir)
	}
	for d := abs; ; d = filepath.Dir(d) {
		if isBrick(d) {
			return fmt.Errorf("ERROR: %s is in use as a brick of a mortar volume", d)
		}
		if d == "/" {
			return nil
		}
	}
}

// lateKernel is the mount as the session's client sees it, which comes first.
// Until the mount is there, nothing is cached.
type lateKernel struct {
	mount   atomic.Pointer[mount.Mount]
	timeout atomic.Int64
	follows atomic.Bool // the mount's cache timeout is the volume's, which it did not know when it was made
}

var _ client.Kernel = (*lateKernel)(nil)

func (k *lateKernel) Invalidate(ctx context.Context, seq uint64, effects []proto.Effect) error {
	if m := k.mount.Load(); m != nil {
		return m.Invalidate(ctx, seq, effects)
	}
	return nil
}

func (k *lateKernel) DropAll(ctx context.Context) error {
	if m := k.mount.Load(); m != nil {
		return m.DropAll(ctx)
	}
	return nil
}

func (k *lateKernel) Holds() []proto.Hold {
	if m := k.mount.Load(); m != nil {
		return m.Holds()
	}
	return nil
}

func (k *lateKernel) Forgotten() []proto.Hold {
	if m := k.mount.Load(); m != nil {
		return m.Forgotten()
	}
	return nil
}

func (k *lateKernel) Changed(dir fsop.Ino, seq uint64) {
	if m := k.mount.Load(); m != nil {
		m.Changed(dir, seq)
	}
}

func (k *lateKernel) Vacant(dir fsop.Ino, name string) bool {
	m := k.mount.Load()
	return m != nil && m.Vacant(dir, name)
}

// options takes the volume's options. The cache timeout counts for mounts that are made
// later, and for one that follows it.
func (k *lateKernel) options(all map[string]string) {
	v := cluster.Volume{Options: all}
	k.timeout.Store(int64(v.EffectiveOptions().CacheTimeout))
	if m := k.mount.Load(); m != nil && k.follows.Load() {
		m.SetCacheTimeout(k.cacheTimeout())
	}
}

// cacheTimeout is the volume's, in the words of mount.Options.
func (k *lateKernel) cacheTimeout() time.Duration {
	if d := time.Duration(k.timeout.Load()); d > 0 {
		return d
	}
	return -1
}
