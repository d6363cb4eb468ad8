package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestCodes(t *testing.T) {
	for _, c := range Codes() {
		e := Errorf(c, "text %d", 1)
		if s := e.Status(); s < 400 || s > 599 || e.Errno == 0 || e.Error() != "text 1" {
			t.Errorf("%s: status %d, %+v", c, s, e)
		}
		if !IsCode(fmt.Errorf("wrapped: %w", e), c) || AsError(fmt.Errorf("wrapped: %w", e)) != e {
			t.Errorf("%s is not found when it is wrapped", c)
		}
	}
	// The numbers that gluster's scripts know.
	for c, want := range map[Code]int{NoVolume: 30806, VolumeStarted: 30809, VolumeStopped: 30810, VolumeExists: 30811, NotSupported: 30801, Internal: 30800} {
		if got := Errorf(c, "x").Errno; got != want {
			t.Errorf("%s has number %d, want %d", c, got, want)
		}
	}
	if e := AsError(errors.New("x")); e.Code != Internal || e.Message != "x" {
		t.Errorf("another's error: %+v", e)
	}
	if s := (&Error{Code: "of a later version"}).Status(); s != http.StatusInternalServerError {
		t.Errorf("unknown code: status %d", s)
	}
}

// TestStrangeAnswers: what is not an answer of ours is an error that says so.
func TestStrangeAnswers(t *testing.T) {
	for _, c := range []struct {
		status int
		body   string
		want   string
	}{
		{200, "<html>", "the answer to GET /pool is not what was expected"},
		{502, "<html>", "GET /pool: the daemon answered 502 Bad Gateway"},
		{404, `{"code":"no_volume","op_errno":30806,"message":"Volume x does not exist"}`, "Volume x does not exist"},
		{500, `{}`, "GET /pool: the daemon answered 500 Internal Server Error"},
	} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Host != "mortar" || r.URL.Path != "/v1/pool" {
				t.Errorf("asked %s of %s", r.URL.Path, r.Host)
			}
			w.WriteHeader(c.status)
			io.WriteString(w, c.body)
		}))
		client := New("http://mortar", func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", srv.Listener.Addr().String())
		})
		if _, err := client.Pool(t.Context()); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%d %s: %v; want %q", c.status, c.body, err, c.want)
		}
		client.Close()
		srv.Close()
	}
}

func TestPeerState(t *testing.T) {
	for s, want := range map[PeerState]string{PeerInCluster: "Peer in Cluster", PeerRejected: "Peer Rejected", 99: "Unknown", -1: "Unknown"} {
		if got := s.String(); got != want {
			t.Errorf("PeerState(%d) = %q, want %q", int(s), got, want)
		}
	}
}
