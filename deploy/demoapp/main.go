// Demoapp is the application of deploy/swarm/demoapp.yml: small enough to be an
// image by itself, and large enough to show what a volume that is the same
// everywhere is good for.
//
//	demoapp app DIR            serves DIR's files, and keeps a guest book in it
//	demoapp web HOST:PORT      hands requests to everything that the name HOST stands for
//	demoapp write FILE TEXT    writes a file, as a one-off container
//	demoapp check URL          succeeds if it is there, for health checks
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const listen = ":8080"

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "demoapp:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "app":
		return serve(app(args[1]))
	case len(args) == 2 && args[0] == "web":
		return serve(web(args[1]))
	case len(args) == 3 && args[0] == "write":
		return write(args[1], args[2]+"\n", os.O_TRUNC)
	case len(args) == 2 && args[0] == "check":
		return check(args[1])
	}
	return errors.New("want app DIR, web HOST:PORT, write FILE TEXT or check URL")
}

// serve answers until it is told to end, and then what it has been asked.
func serve(h http.Handler) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	srv := &http.Server{Addr: listen, Handler: h, ReadHeaderTimeout: 10 * time.Second}
	ended := make(chan error, 1)
	go func() {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		ended <- srv.Shutdown(grace)
	}()
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-ended
}

// app serves a directory. POST /guests writes a line into its guest book, which
// is on the disk of every machine when the answer comes.
func app(dir string) http.Handler {
	host, err := os.Hostname()
	if err != nil {
		host = err.Error()
	}
	book := filepath.Join(dir, "guests")
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{file...}", func(w http.ResponseWriter, r *http.Request) {
		name := filepath.Clean("/" + r.PathValue("file"))
		if name == "/" {
			name = "/index.html"
		}
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		w.Header().Set("X-Container", host)
		w.Write(text)
	})
	mux.HandleFunc("GET /healthy", func(w http.ResponseWriter, r *http.Request) {
		if _, err := os.Stat(dir); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("POST /guests", func(w http.ResponseWriter, r *http.Request) {
		who, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1000))
		if err == nil {
			err = write(book, strings.ReplaceAll(string(who), "\n", " ")+"\n", os.O_APPEND)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("X-Container", host)
		w.WriteHeader(http.StatusCreated)
	})
	return mux
}

// write writes a file and returns when it is safe.
func write(file, text string, how int) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|how, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Sync(), f.Close())
}

// errNobody is that no container listens, as far as the engine of this machine knows.
var errNobody = errors.New("nobody is there")

// web hands each request to one of the addresses that a name has now, and to the
// next one if nobody is there. If none is left it says 503, and 502 if one was reached and did not answer.
func web(backend string) http.Handler {
	dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
		host, port, err := net.SplitHostPort(backend)
		if err != nil {
			return nil, err
		}
		lookup, cancel := context.WithTimeout(ctx, 5*time.Second)
		addrs, err := net.DefaultResolver.LookupHost(lookup, host)
		cancel()
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errNobody, err)
		}
		rand.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
		all := errNobody
		for _, a := range addrs {
			d := net.Dialer{Timeout: time.Second}
			c, err := d.DialContext(ctx, network, net.JoinHostPort(a, port))
			if err == nil {
				return c, nil
			}
			all = errors.Join(all, err)
		}
		return nil, all
	}
	return &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", backend },
		Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true, ResponseHeaderTimeout: 10 * time.Second},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			status := http.StatusBadGateway
			if errors.Is(err, errNobody) {
				status = http.StatusServiceUnavailable
			}
			http.Error(w, err.Error(), status)
		},
	}
}

func check(url string) error {
	c := http.Client{Timeout: 2 * time.Second}
	resp, err := c.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	return nil
}
