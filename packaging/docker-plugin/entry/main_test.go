package main

import (
	"slices"
	"testing"
)

// TestServer: what the settings make of the daemon's command line.
func TestServer(t *testing.T) {
	for _, c := range []struct {
		env  map[string]string
		want []string // nil: refused
	}{
		{nil, []string{"--client", "--name", "host"}},
		{map[string]string{"MORTAR_ROLE": "client", "MORTAR_NAME": "n3"}, []string{"--client", "--name", "n3"}},
		{map[string]string{"MORTAR_ROLE": "witness"}, []string{"--witness", "--name", "host"}},
		{map[string]string{"MORTAR_ROLE": "peer", "MORTAR_VOLUME": "wp", "MORTAR_LISTEN": ":7"}, []string{"--name", "host", "--listen", ":7", "--docker-volume", "wp"}},
		{map[string]string{"MORTAR_ROLE": "boss"}, nil},
	} {
		got, err := server(func(key string) string { return c.env[key] }, "host")
		if (err != nil) != (c.want == nil) {
			t.Errorf("%v: %v", c.env, err)
		}
		if c.want != nil && !slices.Equal(got, append([]string{program, "server", "--docker-socket", socket}, c.want...)) {
			t.Errorf("%v: %q", c.env, got)
		}
	}
}
