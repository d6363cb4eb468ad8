package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"mortar/internal/api"
)

func newDemo(a *app) *cobra.Command {
	var peers int
	c := verb("demo", "run a pool of three peers on this machine, to see and to break it", 0, 0, func(ctx context.Context, _ []string) error {
		return runDemo(ctx, a, peers)
	})
	c.Flags().IntVar(&peers, "peers", 3, "how many peers, 1 to 5")
	return c
}

// demo is a pool on one machine: a child process per peer and per mount, all
// below one directory that is gone at the end.
type demo struct {
	*app
	self  string // this program
	dir   string
	peers []*demoPeer
	ended chan *demoChild
}

// demoPeer is one peer.
type demoPeer struct {
	name, dir, addr string
	api             *api.Client
	server, mount   *demoChild
}

// demoChild is a process of the demo.
type demoChild struct {
	what string
	peer *demoPeer
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when it has ended
}

const (
	demoVolume = "demo"
	// demoRest is how long a peer that was killed stays dead.
	demoRest = 10 * time.Second
)

func runDemo(ctx context.Context, a *app, count int) (err error) {
	if count < 1 || count > 5 {
		return &usageError{text: "--peers: from 1 to 5"}
	}
	// The children die with the thread that started them, should this process be
	// killed. It stays this goroutine's to the end.
	runtime.LockOSThread()
	d := &demo{app: a, ended: make(chan *demoChild, 16)}
	if d.self, err = os.Executable(); err != nil {
		return err
	}
	if d.dir, err = os.MkdirTemp("", "mortar-demo-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.clean()) }()
	if err := d.start(ctx, count); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	d.tell()
	return d.watch(ctx)
}

// start brings everything up.
func (d *demo) start(ctx context.Context, count int) error {
	for i := range count {
		addr, err := freeAddr()
		if err != nil {
			return err
		}
		p := &demoPeer{name: fmt.Sprintf("n%d", i+1), addr: addr}
		p.dir = filepath.Join(d.dir, p.name)
		p.api = api.Unix(d.socket(p))
		d.peers = append(d.peers, p)
		if err := os.MkdirAll(filepath.Join(p.dir, "mnt"), 0o755); err != nil {
			return err
		}
		if err := d.serve(ctx, p); err != nil {
			return err
		}
	}
	d.Errorf("%d daemons run; they become a pool…", count)
	first := d.peers[0]
	inv, err := first.api.Invite(ctx, api.InviteRequest{Uses: count})
	if err != nil {
		return err
	}
	create := api.VolumeCreate{Name: demoVolume, Replica: count, Force: true}
	for i, p := range d.peers {
		if i > 0 {
			if _, err := p.api.Join(ctx, api.JoinRequest{Token: inv.Token, Hosts: inv.Hosts}); err != nil {
				return err
			}
		}
		create.Bricks = append(create.Bricks, p.name+":"+filepath.Join(p.dir, "brick"))
	}
	if err := until(ctx, func() error {
		_, err := first.api.CreateVolume(ctx, create)
		return err
	}); err != nil {
		return err
	}
	if err := first.api.StartVolume(ctx, demoVolume, false); err != nil {
		return err
	}
	if !canMount() {
		return nil
	}
	for _, p := range d.peers {
		if err := d.doMount(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) socket(p *demoPeer) string { return filepath.Join(p.dir, "run", "mortar.sock") }

// freeAddr is an address that nobody listens on.
func freeAddr() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}

// canMount reports whether this user can mount FUSE file systems.
func canMount() bool {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	f.Close()
	return os.Geteuid() == 0
}

// errEnded is what need not be waited for any more.
var errEnded = errors.New("it has ended")

// until tries something for half a minute.
func until(ctx context.Context, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		err := try()
		if err == nil || errors.Is(err, errEnded) {
			return err
		}
		select {
		case <-time.After(250 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// serve starts a peer's daemon and waits until it answers.
func (d *demo) serve(ctx context.Context, p *demoPeer) error {
	c, err := d.child(p, "daemon", "server", "--config", os.DevNull, "--state-dir", filepath.Join(p.dir, "state"), "--run-dir", filepath.Join(p.dir, "run"),
		"--listen", p.addr, "--name", p.name)
	if err != nil {
		return err
	}
	p.server = c
	return d.await(ctx, c, func() error {
		_, err := p.api.Version(ctx)
		return err
	})
}

// doMount mounts the volume through a peer.
func (d *demo) doMount(ctx context.Context, p *demoPeer) error {
	dir := filepath.Join(p.dir, "mnt")
	c, err := d.child(p, "mount", "mount", "-f", p.addr+":/"+demoVolume, dir,
		"--state-dir", filepath.Join(p.dir, "state"), "--run-dir", filepath.Join(p.dir, "run"))
	if err != nil {
		return err
	}
	p.mount = c
	return d.await(ctx, c, func() error {
		there, err := mounted(dir)
		if err == nil && !there {
			err = errors.New("not yet mounted")
		}
		return err
	})
}

// await waits until a child is ready, or has ended.
func (d *demo) await(ctx context.Context, c *demoChild, ready func() error) error {
	return until(ctx, func() error {
		select {
		case <-c.done:
			return fmt.Errorf("%s's %s: %w (%v); its log says: %s", c.peer.name, c.what, errEnded, c.cmd.ProcessState, tail(c.log))
		default:
			return ready()
		}
	})
}

// child starts a process that ends with this one.
func (d *demo) child(p *demoPeer, what string, args ...string) (*demoChild, error) {
	c := &demoChild{what: what, peer: p, log: filepath.Join(p.dir, what+".log"), done: make(chan struct{})}
	out, err := os.OpenFile(c.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	c.cmd = exec.Command(d.self, args...)
	c.cmd.Args[0] = "mortar"
	c.cmd.Stdout, c.cmd.Stderr = out, out
	// A group of its own: Ctrl-C is for the demo, which stops its children in order.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { // ends with the child, which clean waits for
		c.cmd.Wait()
		close(c.done)
		d.ended <- c
	}()
	return c, nil
}

// tail is the last line of a log.
func tail(path string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
	return lines[len(lines)-1]
}

// tell says what there is and what to try.
func (d *demo) tell() {
	first, last := d.peers[0], d.peers[len(d.peers)-1]
	d.Printf("A pool of %s runs on this machine, with a volume %q that each of them has a copy of:\n", count(len(d.peers), "peer"), demoVolume)
	var rows [][]string
	for _, p := range d.peers {
		mnt := "-"
		if p.mount != nil {
			mnt = filepath.Join(p.dir, "mnt")
		}
		rows = append(rows, []string{p.name, strconv.Itoa(p.server.cmd.Process.Pid), p.addr, mnt, filepath.Join(p.dir, "brick")})
	}
	d.Table([]string{"PEER", "PID", "ADDRESS", "MOUNT", "BRICK"}, rows)
	d.Printf("\nIn another terminal:\n")
	d.Printf("  export MORTAR_SOCKET=%s", d.socket(first))
	d.Printf("  %s peer status", d.self)
	d.Printf("  %s volume status %s", d.self, demoVolume)
	if first.mount != nil {
		d.Printf("  echo hello > %s/hello; cat %s/hello", filepath.Join(first.dir, "mnt"), filepath.Join(last.dir, "mnt"))
	} else {
		d.Printf("  echo hello | %s file put %s /hello", d.self, demoVolume)
		d.Printf("  %s file cat %s /hello --socket %s", d.self, demoVolume, d.socket(last))
		d.Printf("(This user cannot mount FUSE file systems here; root can, where there is a /dev/fuse.)")
	}
	if len(d.peers) > 1 {
		d.Printf("  kill -9 %d    # a peer dies; write on, read on; it is back after %v and heals:", last.server.cmd.Process.Pid, demoRest)
		d.Printf("  %s volume heal %s info", d.self, demoVolume)
		d.Printf("  %s volume heal %s full --verify", d.self, demoVolume)
	}
	d.Printf("\nCtrl-C ends it and leaves nothing behind.")
}

// watch brings back what was killed, until ctx ends.
func (d *demo) watch(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case c := <-d.ended:
			if c.what != "daemon" {
				d.Printf("%s's mount has ended (%v).", c.peer.name, c.cmd.ProcessState)
				continue
			}
			d.Printf("%s is dead (%v). It comes back in %v.", c.peer.name, c.cmd.ProcessState, demoRest)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(demoRest):
			}
			if err := d.serve(ctx, c.peer); err != nil {
				if ctx.Err() != nil {
					return nil
				}
				return err
			}
			d.Printf("%s is back (pid %d).", c.peer.name, c.peer.server.cmd.Process.Pid)
		}
	}
}

// clean ends all children, mounts first, and removes everything.
func (d *demo) clean() error {
	var errs []error
	end := func(c *demoChild) {
		if c == nil {
			return
		}
		c.cmd.Process.Signal(syscall.SIGTERM)
	}
	wait := func(c *demoChild) {
		if c == nil {
			return
		}
		select {
		case <-c.done:
		case <-time.After(15 * time.Second):
			c.cmd.Process.Kill()
			<-c.done
			errs = append(errs, fmt.Errorf("%s's %s did not stop and was killed; its log said: %s", c.peer.name, c.what, tail(c.log)))
		}
	}
	for _, p := range d.peers {
		end(p.mount)
	}
	for _, p := range d.peers {
		wait(p.mount)
		syscall.Unmount(filepath.Join(p.dir, "mnt"), syscall.MNT_DETACH) // of a mount that was killed
	}
	for _, p := range d.peers {
		end(p.server)
	}
	for _, p := range d.peers {
		wait(p.server)
		p.api.Close()
	}
	return errors.Join(append(errs, os.RemoveAll(d.dir))...)
}
