package httpd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"mortar/internal/api"
)

type (
	pool    = Pool
	volumes = Volumes
	local   = Local
)

// fake answers like a node and notes what it was asked.
type fake struct {
	pool
	volumes
	local
	asked []string
	err   error
}

func (f *fake) Version() api.Version { return api.Version{Version: "1"} }

func (f *fake) Detach(ctx context.Context, host string, force bool) error {
	f.asked = append(f.asked, "detach "+host)
	if force {
		f.asked = append(f.asked, "by force")
	}
	return f.err
}

func (f *fake) CreateVolume(ctx context.Context, r api.VolumeCreate) (*api.Volume, error) {
	f.asked = append(f.asked, "create "+r.Name)
	return &api.Volume{Name: r.Name}, f.err
}

func (f *fake) Enroll(ctx context.Context, conn Ends, r api.EnrollRequest) (*api.EnrollReply, error) {
	f.asked = append(f.asked, "enroll "+r.Name)
	return &api.EnrollReply{}, nil
}

func (f *fake) Invited(ctx context.Context, conn Ends, r api.InvitedRequest) (*api.JoinReply, error) {
	f.asked = append(f.asked, "invited "+conn.Remote.String())
	return &api.JoinReply{}, nil
}

func newFake() (*fake, *Server) {
	f := &fake{}
	metrics := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "up 1\n") })
	return f, New(Config{Pool: f, Volumes: f, Local: f, Metrics: metrics, Log: slog.New(slog.DiscardHandler)})
}

func TestRequests(t *testing.T) {
	const jsonType = "application/json"
	create := `{"name":"v","bricks":["a:/b"]}`
	for _, c := range []struct {
		name         string
		door         Door
		method, path string
		body         string
		header       map[string]string
		host         string
		status       int
		code         api.Code // of the error
		asked        string
	}{
		{name: "reader reads", door: Reader, method: "GET", path: "/v1/version", status: 200},
		{name: "admin acts", door: Admin, method: "DELETE", path: "/v1/peers/gfs2", status: 204, asked: "detach gfs2"},
		{name: "name with a slash", door: Admin, method: "DELETE", path: "/v1/peers/a%2Fb?force=true", status: 204, asked: "detach a/b,by force"},
		{name: "bad force", door: Admin, method: "DELETE", path: "/v1/peers/a?force=maybe", status: 400, code: api.Invalid},
		{name: "reader acts", door: Reader, method: "DELETE", path: "/v1/peers/gfs2", status: 403, code: api.Forbidden},
		{name: "peer acts as admin", door: Peer, method: "DELETE", path: "/v1/peers/gfs2", status: 403, code: api.Forbidden},
		{name: "peer creates a volume", door: Peer, method: "POST", path: "/v1/volumes", body: create, status: 403, code: api.Forbidden},
		{name: "joiner reads", door: Joiner, method: "GET", path: "/v1/pool", status: 403, code: api.Forbidden},
		{name: "joiner reads metrics", door: Joiner, method: "GET", path: "/metrics", status: 403, code: api.Forbidden},
		{name: "joiner enrolls", door: Joiner, method: "POST", path: "/v1/pool/enroll", body: `{"name":"n"}`, status: 200, asked: "enroll n"},
		{name: "prober enrolls", door: Prober, method: "POST", path: "/v1/pool/enroll", body: `{}`, status: 403, code: api.Forbidden},
		{name: "prober invites", door: Prober, method: "POST", path: "/v1/pool/invited", body: `{}`, status: 200, asked: "invited 192.0.2.1:5"},
		{name: "peer reads metrics", door: Peer, method: "GET", path: "/metrics", status: 200},
		{name: "metrics have no POST", door: Admin, method: "POST", path: "/metrics", status: 405, code: api.Method},
		{name: "nobody's door", method: "GET", path: "/v1/version", status: 403, code: api.Forbidden},
		{name: "create", door: Admin, method: "POST", path: "/v1/volumes", body: create, status: 200, asked: "create v"},
		{name: "unknown path", door: Admin, method: "GET", path: "/v1/nothing", status: 404, code: api.NotFound},
		{name: "path tricks", door: Admin, method: "GET", path: "/v1/../../etc/passwd", status: 404, code: api.NotFound},
		{name: "unknown method", door: Admin, method: "PATCH", path: "/v1/volumes", status: 405, code: api.Method},
		{name: "unknown field", door: Admin, method: "POST", path: "/v1/volumes", body: `{"name":"v","colour":"red"}`, status: 400, code: api.Invalid},
		{name: "two values", door: Admin, method: "POST", path: "/v1/volumes", body: create + create, status: 400, code: api.Invalid},
		{name: "no value", door: Admin, method: "POST", path: "/v1/volumes", body: "", status: 400, code: api.Invalid},
		{name: "form of a page", door: Admin, method: "POST", path: "/v1/volumes", body: create, header: map[string]string{"Content-Type": "text/plain"}, status: 400, code: api.Invalid},
		{name: "huge body", door: Admin, method: "POST", path: "/v1/volumes", body: strings.Repeat(" ", api.MaxBody+1), status: 413, code: api.TooLarge},
		{name: "largest body", door: Admin, method: "POST", path: "/v1/volumes", body: create + strings.Repeat(" ", api.MaxBody-len(create)), status: 200, asked: "create v"},
		{name: "rebound host", door: Admin, method: "GET", path: "/v1/version", host: "evil.example", status: 403, code: api.Forbidden},
		{name: "host with port", door: Admin, method: "GET", path: "/v1/version", host: "localhost:80", status: 200},
		{name: "other origin", door: Admin, method: "GET", path: "/v1/version", header: map[string]string{"Origin": "http://evil.example"}, status: 403, code: api.Forbidden},
		{name: "null origin", door: Admin, method: "GET", path: "/v1/version", header: map[string]string{"Origin": "null"}, status: 403, code: api.Forbidden},
		{name: "from a page", door: Admin, method: "GET", path: "/v1/version", header: map[string]string{"Sec-Fetch-Site": "cross-site"}, status: 403, code: api.Forbidden},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, s := newFake()
			r := httptest.NewRequest(c.method, c.path, strings.NewReader(c.body))
			r.Host = "mortar"
			if c.host != "" {
				r.Host = c.host
			}
			if c.body != "" {
				r.Header.Set("Content-Type", jsonType)
			}
			for k, v := range c.header {
				r.Header.Set(k, v)
			}
			r = r.WithContext(context.WithValue(r.Context(), connKey{}, net.Conn(fakeConn{})))
			w := httptest.NewRecorder()
			s.Handler(func(net.Conn) Door { return c.door }).ServeHTTP(w, r)
			if w.Code != c.status {
				t.Errorf("status %d, want %d; body %s", w.Code, c.status, w.Body)
			}
			if c.code != "" {
				var e api.Error
				if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil || e.Code != c.code || e.Message == "" {
					t.Errorf("error %s (%v), want code %s and a message", w.Body, err, c.code)
				}
			}
			if got := strings.Join(f.asked, ","); got != c.asked {
				t.Errorf("the node was asked %q, want %q", got, c.asked)
			}
		})
	}
}

type fakeConn struct{ net.Conn }

func (fakeConn) LocalAddr() net.Addr  { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 2), Port: 24007} }
func (fakeConn) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 5} }

// TestErrors: what the node says arrives at the api.Client as it was said.
func TestErrors(t *testing.T) {
	for _, c := range []struct {
		err  error
		want api.Error
	}{
		{api.Errorf(api.NoVolume, "Volume %s does not exist", "<b>"), api.Error{Code: api.NoVolume, Errno: 30806, Message: "Volume <b> does not exist"}},
		{errors.New("disk on fire"), api.Error{Code: api.Internal, Errno: 30800, Message: "disk on fire"}},
	} {
		f, s := newFake()
		f.err = c.err
		ln := serve(t, s, Admin)
		client := api.New("http://mortar", func(ctx context.Context) (net.Conn, error) {
			return net.Dial(ln.Addr().Network(), ln.Addr().String())
		})
		defer client.Close()
		err := client.Detach(t.Context(), "x", true)
		var e *api.Error
		if !errors.As(err, &e) || *e != c.want {
			t.Errorf("got %#v, want %#v", err, c.want)
		}
		if got := strings.Join(f.asked, ","); got != "detach x,by force" {
			t.Errorf("asked %q", got)
		}
	}
}

// serve runs s on a unix socket until the test ends.
func serve(t *testing.T, s *Server, door Door) net.Listener {
	t.Helper()
	ln, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	h := s.HTTP(func(net.Conn) Door { return door })
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.Serve(ln)
	}()
	t.Cleanup(func() {
		h.Close()
		<-done
	})
	return ln
}

func TestClientWithoutDaemon(t *testing.T) {
	c := api.Unix(t.TempDir() + "/nothing")
	if _, err := c.Pool(t.Context()); !errors.Is(err, api.ErrConnect) {
		t.Errorf("got %v, want an error that wraps ErrConnect", err)
	}
}

// FuzzRequest: no request makes the server panic, and every answer of an error is JSON.
func FuzzRequest(f *testing.F) {
	f.Add("POST", "/v1/volumes", []byte(`{"name":"v","replica":3,"bricks":["a:/b"]}`))
	f.Add("DELETE", "/v1/peers/x?force=1", []byte(nil))
	f.Add("PUT", "/v1/volumes/v/options", []byte(`{"options":[{"key":"a","value":"b"}]}`))
	f.Add("GET", "/v1/volumes/%00/heal", []byte(nil))
	f.Fuzz(func(t *testing.T, method, path string, body []byte) {
		r, err := http.NewRequest(method, "http://mortar"+path, bytes.NewReader(body))
		if err != nil || !strings.HasPrefix(path, "/") {
			t.Skip()
		}
		r.Header.Set("Content-Type", "application/json")
		_, s := newFake()
		w := httptest.NewRecorder()
		s.Handler(func(net.Conn) Door { return 0 }).ServeHTTP(w, r)
		if w.Code >= 400 && w.Header().Get("Content-Type") == "application/json" && !json.Valid(w.Body.Bytes()) {
			t.Errorf("%s %q: %d with body %q", method, path, w.Code, w.Body)
		}
	})
}
