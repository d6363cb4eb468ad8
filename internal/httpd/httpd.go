// Package httpd serves the REST API: it turns HTTP requests into calls of the
// interfaces that it defines, and their answers into JSON. What a request means
// is decided behind the interfaces; who may ask what is decided here, in one
// table of routes.
package httpd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"path"
	"strconv"
	"strings"
	"time"

	"mortar/internal/api"
)

// Pool is what the handlers ask about machines.
type Pool interface {
	Version() api.Version
	Pool(ctx context.Context) (*api.Pool, error)
	Invite(ctx context.Context, r api.InviteRequest) (*api.Invitation, error)
	Join(ctx context.Context, r api.JoinRequest) (*api.JoinReply, error)
	Probe(ctx context.Context, r api.ProbeRequest) (*api.ProbeReply, error)
	Detach(ctx context.Context, host string, force bool) error
	Drain(ctx context.Context, host string) (*api.DrainReply, error)
	Undrain(ctx context.Context, host string) error
	Leave(ctx context.Context) error
	PoolRecovery(ctx context.Context) (*api.PoolRecovery, error)
	RecoverPool(ctx context.Context, r api.PoolRecover) error
	Examine(ctx context.Context) (*api.Examination, error)
	// Enroll makes the machine behind conn a peer; Invited joins the pool that
	// the machine behind conn speaks for.
	Enroll(ctx context.Context, conn Ends, r api.EnrollRequest) (*api.EnrollReply, error)
	Invited(ctx context.Context, conn Ends, r api.InvitedRequest) (*api.JoinReply, error)
}

// Volumes is what the handlers ask about volumes.
type Volumes interface {
	Volumes(ctx context.Context) ([]api.Volume, error)
	Volume(ctx context.Context, name string) (*api.Volume, error)
	CreateVolume(ctx context.Context, r api.VolumeCreate) (*api.Volume, error)
	DeleteVolume(ctx context.Context, name string) error
	StartVolume(ctx context.Context, name string, force bool) error
	StopVolume(ctx context.Context, name string, force bool) error
	VolumeStatus(ctx context.Context, name string, detail bool) (*api.VolumeStatus, error)
	Options(ctx context.Context, volume string) ([]api.Option, error)
	SetOptions(ctx context.Context, volume string, options []api.Option) (*api.OptionsReply, error)
	ResetOptions(ctx context.Context, volume string, keys []string) error
	OptionHelp() []api.OptionHelp
	HealInfo(ctx context.Context, volume string) (*api.HealInfo, error)
	Heal(ctx context.Context, volume string, r api.HealRequest) (*api.HealReply, error)
	Scrub(ctx context.Context, volume string) (*api.ScrubReply, error)
	VolumeRecovery(ctx context.Context, volume, brick string) (*api.VolumeRecovery, error)
	RecoverVolume(ctx context.Context, volume string, r api.VolumeRecover) error
	Subvolumes(ctx context.Context, volume string) ([]api.Subvolume, error)
	Subvolume(ctx context.Context, volume, name string) (*api.Subvolume, error)
	CreateSubvolume(ctx context.Context, volume string, r api.SubvolumeCreate) (*api.Subvolume, error)
	ChangeSubvolume(ctx context.Context, volume, name string, r api.SubvolumeChange) (*api.Subvolume, error)
	DeleteSubvolume(ctx context.Context, volume, name string, force bool) error
}

// Local is what peers ask of each other.
type Local interface {
	PrepareBrick(ctx context.Context, r api.BrickPrepare) error
	LocalBricks(ctx context.Context, volume string, detail bool) (*api.LocalBricks, error)
	LocalVerify(ctx context.Context, volume string) (*api.HealReply, error)
	LocalScrub(ctx context.Context, volume string) (*api.ScrubReply, error)
	LocalRetry(ctx context.Context, volume string) error
	LocalReach(ctx context.Context) (*api.LocalReach, error)
	LocalSubvolumes(ctx context.Context, r api.SubvolumeRequest) ([]api.Subvolume, error)
	LocalDocker(ctx context.Context, name string) (*api.LocalDocker, error)
}

// Ends are the two ends of a connection.
type Ends struct{ Local, Remote net.Addr }

// Door says through which door a request came, and so what it may ask.
type Door uint8

const (
	Admin  Door = 1 << iota // the unix socket, as root or the daemon's own user
	Reader                  // the unix socket, as a member of its group
	Peer                    // TLS with the certificate of a peer
	Joiner                  // TLS without a certificate, with a token
	Prober                  // TLS without a certificate, while the machine waits to be probed
)

// read are the doors that may look at everything.
const read = Admin | Reader | Peer

func (d Door) String() string {
	switch d {
	case Admin:
		return "admin"
	case Reader:
		return "reader"
	case Peer:
		return "peer"
	case Joiner:
		return "joiner"
	case Prober:
		return "prober"
	}
	return fmt.Sprintf("Door(%d)", uint8(d))
}

// Config is what a Server is made of.
type Config struct {
	Pool    Pool
	Volumes Volumes
	Local   Local
	Metrics http.Handler // GET /metrics; nil: none
	Log     *slog.Logger
}

// Server has the handlers. One Server stands behind all doors.
type Server struct {
	cfg    Config
	routes map[string]map[string]route // path pattern, then method
	mux    *http.ServeMux
}

// route is one thing that can be asked.
type route struct {
	doors Door // who may
	serve func(r *request) (any, error)
}

// request is an HTTP request on its way through a route.
type request struct {
	*http.Request
	body []byte
}

// New makes a Server.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg, mux: http.NewServeMux()}
	s.routes = s.table()
	for pattern, methods := range s.routes {
		s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { s.serve(w, r, methods) })
	}
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.answer(w, r, nil, api.Errorf(api.NotFound, "there is no %s in this API; see doc/openapi.yaml", clip(r.URL.Path)))
	})
	if cfg.Metrics != nil {
		s.mux.HandleFunc("/metrics", s.metrics)
	}
	return s
}

// table lists every path, every method and who may use it.
func (s *Server) table() map[string]map[string]route {
	pool, volumes, local := s.cfg.Pool, s.cfg.Volumes, s.cfg.Local
	t := map[string]map[string]route{
		"/version": {
			"GET": {read, func(r *request) (any, error) { return pool.Version(), nil }},
		},
		"/pool": {
			"GET": {read, func(r *request) (any, error) { return pool.Pool(r.Context()) }},
		},
		"/pool/invite": {
			"POST": {Admin, with(func(r *request, in api.InviteRequest) (any, error) { return pool.Invite(r.Context(), in) })},
		},
		"/pool/join": {
			"POST": {Admin, with(func(r *request, in api.JoinRequest) (any, error) { return pool.Join(r.Context(), in) })},
		},
		"/pool/leave": {
			"POST": {Admin, func(r *request) (any, error) { return nil, pool.Leave(r.Context()) }},
		},
		"/pool/recovery": {
			"GET":  {read, func(r *request) (any, error) { return pool.PoolRecovery(r.Context()) }},
			"POST": {Admin, with(func(r *request, in api.PoolRecover) (any, error) { return nil, pool.RecoverPool(r.Context(), in) })},
		},
		"/pool/enroll": {
			"POST": {Joiner, with(func(r *request, in api.EnrollRequest) (any, error) {
				return pool.Enroll(r.Context(), ends(r.Context()), in)
			})},
		},
		"/pool/invited": {
			"POST": {Prober, with(func(r *request, in api.InvitedRequest) (any, error) {
				return pool.Invited(r.Context(), ends(r.Context()), in)
			})},
		},
		"/peers": {
			"POST": {Admin, with(func(r *request, in api.ProbeRequest) (any, error) { return pool.Probe(r.Context(), in) })},
		},
		"/pool/examination": {
			"GET": {Admin | Reader, func(r *request) (any, error) { return pool.Examine(r.Context()) }},
		},
		"/peers/{host}": {
			"DELETE": {Admin, forced(func(r *request, force bool) (any, error) {
				return nil, pool.Detach(r.Context(), r.PathValue("host"), force)
			})},
		},
		"/peers/{host}/drain": {
			"POST":   {Admin, func(r *request) (any, error) { return pool.Drain(r.Context(), r.PathValue("host")) }},
			"DELETE": {Admin, func(r *request) (any, error) { return nil, pool.Undrain(r.Context(), r.PathValue("host")) }},
		},
		"/options": {
			"GET": {read, func(r *request) (any, error) { return volumes.OptionHelp(), nil }},
		},
		"/volumes": {
			"GET": {read, func(r *request) (any, error) { return volumes.Volumes(r.Context()) }},
			"POST": {Admin, with(func(r *request, in api.VolumeCreate) (any, error) {
				return volumes.CreateVolume(r.Context(), in)
			})},
		},
		"/volumes/{name}": {
			"GET": {read, func(r *request) (any, error) { return volumes.Volume(r.Context(), r.PathValue("name")) }},
			"DELETE": {Admin, func(r *request) (any, error) {
				return nil, volumes.DeleteVolume(r.Context(), r.PathValue("name"))
			}},
		},
		"/volumes/{name}/start": {
			"POST": {Admin, forced(func(r *request, force bool) (any, error) {
				return nil, volumes.StartVolume(r.Context(), r.PathValue("name"), force)
			})},
		},
		"/volumes/{name}/stop": {
			"POST": {Admin, forced(func(r *request, force bool) (any, error) {
				return nil, volumes.StopVolume(r.Context(), r.PathValue("name"), force)
			})},
		},
		"/volumes/{name}/status": {
			"GET": {read, func(r *request) (any, error) {
				detail, err := r.truth("detail")
				if err != nil {
					return nil, err
				}
				return volumes.VolumeStatus(r.Context(), r.PathValue("name"), detail)
			}},
		},
		"/volumes/{name}/options": {
			"GET": {read, func(r *request) (any, error) { return volumes.Options(r.Context(), r.PathValue("name")) }},
			"PUT": {Admin, with(func(r *request, in api.OptionsChange) (any, error) {
				return volumes.SetOptions(r.Context(), r.PathValue("name"), in.Options)
			})},
			"DELETE": {Admin, with(func(r *request, in api.OptionsChange) (any, error) {
				var keys []string
				for _, o := range in.Options {
					keys = append(keys, o.Key)
				}
				return nil, volumes.ResetOptions(r.Context(), r.PathValue("name"), keys)
			})},
		},
		"/volumes/{name}/heal": {
			"GET": {read, func(r *request) (any, error) { return volumes.HealInfo(r.Context(), r.PathValue("name")) }},
			"POST": {Admin, with(func(r *request, in api.HealRequest) (any, error) {
				return volumes.Heal(r.Context(), r.PathValue("name"), in)
			})},
		},
		"/volumes/{name}/scrub": {
			"POST": {Admin, func(r *request) (any, error) { return volumes.Scrub(r.Context(), r.PathValue("name")) }},
		},
		"/volumes/{name}/recovery": {
			"GET": {read, func(r *request) (any, error) {
				return volumes.VolumeRecovery(r.Context(), r.PathValue("name"), r.URL.Query().Get("brick"))
			}},
			"POST": {Admin, with(func(r *request, in api.VolumeRecover) (any, error) {
				return nil, volumes.RecoverVolume(r.Context(), r.PathValue("name"), in)
			})},
		},
		"/volumes/{name}/subvolumes": {
			"GET": {read, func(r *request) (any, error) { return volumes.Subvolumes(r.Context(), r.PathValue("name")) }},
			"POST": {Admin, with(func(r *request, in api.SubvolumeCreate) (any, error) {
				return volumes.CreateSubvolume(r.Context(), r.PathValue("name"), in)
			})},
		},
		"/volumes/{name}/subvolumes/{subvolume}": {
			"GET": {read, func(r *request) (any, error) {
				return volumes.Subvolume(r.Context(), r.PathValue("name"), r.PathValue("subvolume"))
			}},
			"PUT": {Admin, with(func(r *request, in api.SubvolumeChange) (any, error) {
				return volumes.ChangeSubvolume(r.Context(), r.PathValue("name"), r.PathValue("subvolume"), in)
			})},
			"DELETE": {Admin, forced(func(r *request, force bool) (any, error) {
				return nil, volumes.DeleteSubvolume(r.Context(), r.PathValue("name"), r.PathValue("subvolume"), force)
			})},
		},
		"/local/bricks": {
			"GET": {Admin | Peer, func(r *request) (any, error) {
				detail, err := r.truth("detail")
				if err != nil {
					return nil, err
				}
				return local.LocalBricks(r.Context(), r.URL.Query().Get("volume"), detail)
			}},
			"POST": {Peer, with(func(r *request, in api.BrickPrepare) (any, error) {
				return nil, local.PrepareBrick(r.Context(), in)
			})},
		},
		"/local/subvolumes": {
			"POST": {Peer, with(func(r *request, in api.SubvolumeRequest) (any, error) {
				all, err := local.LocalSubvolumes(r.Context(), in)
				if all == nil {
					all = []api.Subvolume{}
				}
				return all, err
			})},
		},
		"/local/scrub": {
			"POST": {Peer, func(r *request) (any, error) {
				return local.LocalScrub(r.Context(), r.URL.Query().Get("volume"))
			}},
		},
		"/local/docker": {
			"GET": {Peer, func(r *request) (any, error) { return local.LocalDocker(r.Context(), r.URL.Query().Get("name")) }},
		},
		"/local/retry": {
			"POST": {Peer, func(r *request) (any, error) {
				return nil, local.LocalRetry(r.Context(), r.URL.Query().Get("volume"))
			}},
		},
		"/local/reach": {
			"GET": {Peer, func(r *request) (any, error) { return local.LocalReach(r.Context()) }},
		},
		"/local/verify": {
			"POST": {Peer, func(r *request) (any, error) {
				return local.LocalVerify(r.Context(), r.URL.Query().Get("volume"))
			}},
		},
	}
	full := make(map[string]map[string]route, len(t))
	for path, methods := range t {
		full[api.Prefix+path] = methods
	}
	return full
}

// with decodes the body for a route that has one.
func with[T any](serve func(r *request, in T) (any, error)) func(*request) (any, error) {
	return func(r *request) (any, error) {
		var in T
		if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
			// A page in a browser cannot send this type to another origin unasked.
			return nil, api.Errorf(api.Invalid, "the body of %s %s must have the Content-Type application/json", r.Method, r.URL.Path)
		}
		d := json.NewDecoder(bytes.NewReader(r.body))
		d.DisallowUnknownFields()
		if err := d.Decode(&in); err != nil {
			return nil, api.Errorf(api.Invalid, "the body of %s %s: %w", r.Method, r.URL.Path, err)
		}
		if _, err := d.Token(); err != io.EOF {
			return nil, api.Errorf(api.Invalid, "the body of %s %s: something follows the JSON value", r.Method, r.URL.Path)
		}
		return serve(r, in)
	}
}

// forced reads ?force= for a route that knows it.
func forced(serve func(r *request, force bool) (any, error)) func(*request) (any, error) {
	return func(r *request) (any, error) {
		force, err := r.truth("force")
		if err != nil {
			return nil, err
		}
		return serve(r, force)
	}
}

// truth reads a query parameter that is true, false or absent.
func (r *request) truth(name string) (bool, error) {
	v := r.URL.Query().Get(name)
	if v == "" {
		return false, nil
	}
	on, err := strconv.ParseBool(v)
	if err != nil {
		return false, api.Errorf(api.Invalid, "?%s=%s: want true or false", name, strconv.Quote(clip(v)))
	}
	return on, nil
}

// clip shortens what a stranger sent before it goes into a text.
func clip(s string) string {
	if len(s) > 100 {
		return s[:100] + "…"
	}
	return s
}

func (s *Server) serve(w http.ResponseWriter, hr *http.Request, methods map[string]route) {
	rt, ok := methods[hr.Method]
	if !ok {
		var allow []string
		for m := range methods {
			allow = append(allow, m)
		}
		w.Header().Set("Allow", strings.Join(allow, ", "))
		s.answer(w, hr, nil, api.Errorf(api.Method, "%s has no method %s", hr.URL.Path, clip(hr.Method)))
		return
	}
	door, _ := hr.Context().Value(doorKey{}).(Door)
	if door&rt.doors == 0 {
		s.cfg.Log.Warn("refused a request", "door", door, "method", hr.Method, "path", clip(hr.URL.Path), "from", hr.RemoteAddr)
		text := "as a " + door.String()
		if door == Reader {
			text = "without being root"
		}
		s.answer(w, hr, nil, api.Errorf(api.Forbidden, "%s %s is not allowed %s", hr.Method, hr.URL.Path, text))
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, hr.Body, api.MaxBody))
	if err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			err = api.Errorf(api.TooLarge, "the body of %s %s is larger than %d bytes", hr.Method, hr.URL.Path, api.MaxBody)
		} else {
			err = api.Errorf(api.Invalid, "the body of %s %s: %w", hr.Method, hr.URL.Path, err)
		}
		s.answer(w, hr, nil, err)
		return
	}
	out, err := rt.serve(&request{Request: hr, body: body})
	if hr.Method != "GET" {
		if err != nil {
			s.cfg.Log.Info("request failed", "door", door, "method", hr.Method, "path", hr.URL.Path, "error", err)
		} else {
			s.cfg.Log.Info("request", "door", door, "method", hr.Method, "path", hr.URL.Path)
		}
	}
	s.answer(w, hr, out, err)
}

// metrics is the one page that is not JSON.
func (s *Server) metrics(w http.ResponseWriter, r *http.Request) {
	if door, _ := r.Context().Value(doorKey{}).(Door); door&read == 0 {
		s.answer(w, r, nil, api.Errorf(api.Forbidden, "GET /metrics is not allowed as a %s", door))
		return
	}
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		s.answer(w, r, nil, api.Errorf(api.Method, "/metrics has no method %s", clip(r.Method)))
		return
	}
	s.cfg.Metrics.ServeHTTP(w, r)
}

// answer writes out, or err, as JSON.
func (s *Server) answer(w http.ResponseWriter, hr *http.Request, out any, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if err != nil {
		e := api.AsError(err)
		w.WriteHeader(e.Status())
		out = e
	} else if out == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	if err := json.NewEncoder(w).Encode(out); err != nil {
		s.cfg.Log.Debug("an answer did not arrive", "path", hr.URL.Path, "error", err)
	}
}

type (
	doorKey struct{}
	endsKey struct{}
)

// ends are the two ends of the connection that a request came on.
func ends(ctx context.Context) Ends {
	e, _ := ctx.Value(endsKey{}).(Ends)
	return e
}

// Handler is the Server as one door shows it.
func (s *Server) Handler(door func(net.Conn) Door) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, _ := r.Context().Value(connKey{}).(net.Conn)
		ctx := context.WithValue(r.Context(), doorKey{}, door(conn))
		if conn != nil {
			ctx = context.WithValue(ctx, endsKey{}, Ends{conn.LocalAddr(), conn.RemoteAddr()})
		}
		if err := checkOrigin(r); err != nil {
			s.cfg.Log.Warn("refused a request", "host", clip(r.Host), "origin", clip(r.Header.Get("Origin")), "from", r.RemoteAddr)
			s.answer(w, r, nil, err)
			return
		}
		if path.Clean(r.URL.Path) != r.URL.Path { // ServeMux would redirect
			s.answer(w, r, nil, api.Errorf(api.NotFound, "there is no %s in this API", clip(r.URL.Path)))
			return
		}
		s.mux.ServeHTTP(w, r.WithContext(ctx))
	})
}

// checkOrigin keeps browsers out: a page must not reach a daemon by DNS
// rebinding (the Host is then the page's) nor by a request across origins.
func checkOrigin(r *http.Request) error {
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if host != "mortar" && host != "localhost" {
		return api.Errorf(api.Forbidden, "the Host of a request must be mortar or localhost, not %q", clip(r.Host))
	}
	if r.Header.Get("Origin") != "" || r.Header.Get("Sec-Fetch-Site") != "" {
		return api.Errorf(api.Forbidden, "this API is not for web pages")
	}
	return nil
}

type connKey struct{}

// HTTP returns an http.Server for one door, with the limits that keep a slow or
// greedy client from holding on to the daemon.
func (s *Server) HTTP(door func(net.Conn) Door) *http.Server {
	return &http.Server{
		Handler:           s.Handler(door),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
}
