package dockervol

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// lazy is an engine that has to be told.
type lazy struct {
	mu    sync.Mutex // guards the fields below
	pid   int
	fail  error
	looks int
}

func (l *lazy) PID() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pid
}

func (l *lazy) Look(context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.looks++
	return l.fail
}

// TestGreet: every engine that is started is told of the driver, once; one that
// does not answer yet is told later.
func TestGreet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := testWorld(t)
		d := w.daemon(t)
		e := new(lazy)
		d.cfg.Engine = e
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { d.greet(ctx) })
		time.Sleep(greetEvery / 2)
		for _, c := range []struct {
			what    string
			pid     int
			process string
			fail    error
			want    int
		}{
			{"none runs", 0, "", nil, 0},
			{"one is started", 7, "7@1", errors.New("connection refused"), 10},
			{"it answers", 7, "7@1", nil, 11},
			{"it goes on", 7, "7@1", nil, 11},
			{"another has its number", 7, "7@2", nil, 12},
			{"its file is left", 7, "", nil, 12},
		} {
			e.mu.Lock()
			e.pid, w.engine, e.fail = c.pid, c.process, c.fail
			e.mu.Unlock()
			time.Sleep(10 * greetEvery)
			synctest.Wait()
			e.mu.Lock()
			if e.looks != c.want {
				t.Errorf("%s: asked %d times, want %d", c.what, e.looks, c.want)
			}
			e.mu.Unlock()
		}
		cancel()
		wg.Wait()
	})
}

// TestDockerd: the file is believed only if it has a number, and the engine's
// refusal is an error.
func TestDockerd(t *testing.T) {
	dir := t.TempDir()
	d := Dockerd{Socket: filepath.Join(dir, "docker.sock"), PIDFile: filepath.Join(dir, "docker.pid")}
	for text, want := range map[string]int{"": 0, "x": 0, "-1": 0, "0": 0, "12": 12, "12\n": 12} {
		if err := os.WriteFile(d.PIDFile, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := d.PID(); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
	if err := os.Remove(d.PIDFile); err != nil || d.PID() != 0 {
		t.Errorf("without a file: %d, %v", d.PID(), err)
	}
	if err := d.Look(t.Context()); err == nil {
		t.Error("without an engine: no error")
	}
	ln, err := net.Listen("unix", d.Socket)
	if err != nil {
		t.Fatal(err)
	}
	status, asked := 200, ""
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = r.Method + " " + r.URL.Path
		w.WriteHeader(status)
	})}
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(ln) })
	defer wg.Wait()
	defer srv.Close()
	if err := d.Look(t.Context()); err != nil || asked != "GET /volumes" {
		t.Errorf("%q, %v", asked, err)
	}
	status = 503
	if err := d.Look(t.Context()); err == nil || !strings.Contains(err.Error(), strconv.Itoa(status)) {
		t.Errorf("an engine that refuses: %v", err)
	}
}
