package metrics

import (
	"context"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestHandler(t *testing.T) {
	r := New(func(ctx context.Context) Snapshot {
		if _, bounded := ctx.Deadline(); !bounded {
			t.Error("a scrape must end")
		}
		return Snapshot{
			Version: "v1", Quorum: true, Mounts: 2, Peers: []Peer{{"gfs2", true}, {"gfs3", false}},
			Bricks: []Brick{
				{Volume: "wp", Brick: "gfs1:/b", Online: true, Primary: true, InSync: true, Epoch: 3, Tail: 10, Commit: 9, Free: 1 << 30, Total: 1 << 31},
				{Volume: "wp", Brick: "gfs1:/c"},
			},
		}
	})
	w := httptest.NewRecorder()
	r.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	body := w.Body.String()
	for _, want := range []string{
		`mortar_build_info{version="v1"} 1`,
		"mortar_pool_has_leader 1",
		"mortar_pool_is_leader 0",
		"mortar_mounts 2",
		`mortar_peer_connected{peer="gfs3"} 0`,
		`mortar_brick_online{brick="gfs1:/c",volume="wp"} 0`,
		`mortar_brick_log_position{brick="gfs1:/b",volume="wp"} 10`,
		`mortar_brick_disk_free_bytes{brick="gfs1:/b",volume="wp"} 1.073741824e+09`,
		"go_goroutines ",
	} {
		if !strings.Contains(body, "\n"+want) {
			t.Errorf("%s is missing", want)
		}
	}
	if strings.Contains(body, `mortar_brick_epoch{brick="gfs1:/c"`) {
		t.Error("a brick that is offline has no epoch to show")
	}
}
