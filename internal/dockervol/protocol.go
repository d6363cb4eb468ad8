package dockervol

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The protocol is Docker's: POST with a JSON body, the answer likewise, and a
// field Err that says what went wrong; empty if nothing did.
const contentType = "application/vnd.docker.plugins.v1.2+json"

// maxRequest bounds a request's body.
const maxRequest = 1 << 20

// request has the fields of all requests.
type request struct {
	Name string
	Opts map[string]string
	ID   string
}

// description is a volume as engines are told of it.
type description struct {
	Name       string
	Mountpoint string         `json:",omitempty"`
	CreatedAt  string         `json:",omitempty"`
	Status     map[string]any `json:",omitempty"`
}

// reply has the fields of all answers.
type reply struct {
	Implements   []string       `json:",omitempty"`
	Capabilities map[string]any `json:",omitempty"`
	Mountpoint   string         `json:",omitempty"`
	Volume       *description   `json:",omitempty"`
	Volumes      []*description `json:",omitempty"`
	Err          string
}

// engineKey is the context's key of the process that asks.
type engineKey struct{}

// calls are the nine calls.
func (d *Driver) calls() map[string]func(ctx context.Context, r *request) (reply, error) {
	return map[string]func(ctx context.Context, r *request) (reply, error){
		"Plugin.Activate": func(context.Context, *request) (reply, error) {
			return reply{Implements: []string{"VolumeDriver"}}, nil
		},
		"VolumeDriver.Capabilities": func(context.Context, *request) (reply, error) {
			return reply{Capabilities: map[string]any{"Scope": "global"}}, nil
		},
		"VolumeDriver.Create": func(ctx context.Context, r *request) (reply, error) {
			return reply{}, d.Create(ctx, r.Name, r.Opts)
		},
		"VolumeDriver.Remove": func(ctx context.Context, r *request) (reply, error) {
			return reply{}, d.Remove(ctx, r.Name)
		},
		"VolumeDriver.Mount": func(ctx context.Context, r *request) (reply, error) {
			engine, _ := ctx.Value(engineKey{}).(int)
			dir, err := d.Mount(ctx, r.Name, r.ID, engine)
			return reply{Mountpoint: dir}, err
		},
		"VolumeDriver.Unmount": func(ctx context.Context, r *request) (reply, error) {
			return reply{}, d.Unmount(ctx, r.Name, r.ID)
		},
		"VolumeDriver.Path": func(ctx context.Context, r *request) (reply, error) {
			dir, err := d.Path(ctx, r.Name)
			return reply{Mountpoint: dir}, err
		},
		"VolumeDriver.Get": func(ctx context.Context, r *request) (reply, error) {
			v, err := d.Get(ctx, r.Name)
			return reply{Volume: v}, err
		},
		"VolumeDriver.List": func(context.Context, *request) (reply, error) {
			all, err := d.List()
			return reply{Volumes: all}, err
		},
	}
}

// quiet are the calls that engines make all the time.
var quiet = map[string]bool{"Plugin.Activate": true, "VolumeDriver.Capabilities": true, "VolumeDriver.Path": true, "VolumeDriver.Get": true, "VolumeDriver.List": true}

// handler answers engines.
func (d *Driver) handler() http.Handler {
	mux := http.NewServeMux()
	for name, call := range d.calls() {
		mux.HandleFunc("POST /"+name, func(w http.ResponseWriter, hr *http.Request) {
			start := time.Now()
			var r request
			// Some calls have no body.
			err := json.NewDecoder(http.MaxBytesReader(w, hr.Body, maxRequest)).Decode(&r)
			if errors.Is(err, io.EOF) {
				err = nil
			}
			if err != nil {
				err = fmt.Errorf("%s: the request is not JSON as Docker's plugins get it: %w", name, err)
			}
			var out reply
			if err == nil {
				out, err = call(hr.Context(), &r)
			}
			if err != nil {
				out = reply{Err: "mortar: " + err.Error()}
			}
			switch {
			case quiet[name]:
				d.cfg.Log.Debug(name, "volume", r.Name, "error", err)
			case err != nil:
				d.cfg.Log.Warn(name, "volume", r.Name, "id", r.ID, "took", time.Since(start).Round(time.Millisecond), "error", err)
			default:
				d.cfg.Log.Info(name, "volume", r.Name, "id", r.ID, "took", time.Since(start).Round(time.Millisecond))
			}
			w.Header().Set("Content-Type", contentType)
			if err := json.NewEncoder(w).Encode(&out); err != nil {
				d.cfg.Log.Debug("the engine did not wait for the answer", "call", name, "error", err)
			}
		})
	}
	return mux
}

// Serve answers engines that connect to ln until ctx ends.
func (d *Driver) Serve(ctx context.Context, ln net.Listener) error {
	srv := &http.Server{
		Handler:           d.handler(),
		ReadHeaderTimeout: 10 * time.Second,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, engineKey{}, callerOf(c))
		},
	}
	var tending sync.WaitGroup
	tctx, end := context.WithCancel(ctx)
	tending.Go(func() { d.tend(tctx) })
	tending.Go(func() { d.greet(tctx) })
	defer tending.Wait()
	defer end()
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		// What is under way has heard of it; engines ask again for what was cut off.
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			srv.Close()
		}
	})
	err := srv.Serve(ln)
	if stop() {
		return err
	}
	<-ended
	return nil
}

// callerOf is the process at the other end, 0 if it is not to be seen.
func callerOf(c net.Conn) int {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}
