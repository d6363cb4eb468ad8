package dockervol

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

// Engine is the engine of this machine, as far as it is to be spoken to first. An
// engine loads a driver when somebody asks for a volume of it, and until then a
// Swarm's managers hear that its machine has no such driver, and send it no
// container that wants one. So it is asked.
type Engine interface {
	// PID is the engine's process, 0 if none runs.
	PID() int
	// Look has the engine look for its volume drivers.
	Look(ctx context.Context) error
}

// Dockerd is an engine with its socket and the file that has its process's number.
// The socket alone would not do: connecting to it can start an engine that was stopped.
type Dockerd struct{ Socket, PIDFile string }

var _ Engine = Dockerd{}

// PID implements Engine.
func (d Dockerd) PID() int {
	raw, err := os.ReadFile(d.PIDFile)
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil || pid < 1 {
		return 0
	}
	return pid
}

// Look implements Engine: to list volumes, an engine asks every driver that there is.
func (d Dockerd) Look(ctx context.Context) error {
	tr := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", d.Socket)
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker/volumes", nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the engine at %s, asked for its volumes: %s", d.Socket, resp.Status)
	}
	return nil
}

// greetEvery is how often the driver looks whether a new engine runs.
const greetEvery = 2 * time.Second

// greet sees to it, until ctx ends, that every engine that is started on this
// machine knows the driver.
func (d *Driver) greet(ctx context.Context) {
	tick := time.NewTicker(greetEvery)
	defer tick.Stop()
	known, failed := "", ""
	for {
		if p := d.cfg.Kernel.Process(d.cfg.Engine.PID()); p != "" && p != known {
			lctx, cancel := context.WithTimeout(ctx, brief)
			err := d.cfg.Engine.Look(lctx)
			cancel()
			switch {
			case err == nil:
				known = p
			case failed != p && ctx.Err() == nil: // it may only be starting
				failed = p
				d.cfg.Log.Info("Docker's engine does not know the driver yet, and is asked again", "error", err)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
