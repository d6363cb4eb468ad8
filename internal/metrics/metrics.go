// Package metrics shows numbers to Prometheus. It has a registry of its own and
// one collector, which asks for a snapshot when it is scraped: nothing is
// counted twice, and a daemon that nobody scrapes pays nothing.
package metrics

import (
	"context"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Snapshot is what there is to show at one moment.
type Snapshot struct {
	Version string
	Leader  bool // this peer leads the control plane
	Quorum  bool // the control plane has a leader
	Peers   []Peer
	Mounts  int // connections of mounts
	Bricks  []Brick
}

// Peer is another peer.
type Peer struct {
	Name      string
	Connected bool
}

// Brick is a brick on this machine.
type Brick struct {
	Volume, Brick string
	Online        bool
	Primary       bool
	InSync        bool
	Epoch         uint64
	Tail, Commit  uint64 // sequence numbers
	Free, Total   uint64 // bytes of the disk
}

// scrapeTimeout bounds the making of a snapshot.
const scrapeTimeout = 3 * time.Second

// Registry is the registry of one node.
type Registry struct{ reg *prometheus.Registry }

// New makes a registry that shows what snapshot returns.
func New(snapshot func(ctx context.Context) Snapshot) *Registry {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), &collector{snapshot})
	return &Registry{reg}
}

// Handler serves the text format.
func (r *Registry) Handler() http.Handler {
	return promhttp.HandlerFor(r.reg, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: 2})
}

var (
	brickLabels = []string{"volume", "brick"}

	info      = prometheus.NewDesc("mortar_build_info", "The version that runs.", []string{"version"}, nil)
	quorum    = prometheus.NewDesc("mortar_pool_has_leader", "1 if the control plane has a leader.", nil, nil)
	leader    = prometheus.NewDesc("mortar_pool_is_leader", "1 if this peer is that leader.", nil, nil)
	connected = prometheus.NewDesc("mortar_peer_connected", "1 if the peer is connected.", []string{"peer"}, nil)
	mounts    = prometheus.NewDesc("mortar_mounts", "Mounts that are served here.", nil, nil)
	online    = prometheus.NewDesc("mortar_brick_online", "1 if the brick is served.", brickLabels, nil)
	primary   = prometheus.NewDesc("mortar_brick_primary", "1 if the brick is its set's primary.", brickLabels, nil)
	inSync    = prometheus.NewDesc("mortar_brick_in_sync", "1 if the brick is in sync.", brickLabels, nil)
	epoch     = prometheus.NewDesc("mortar_brick_epoch", "Epoch of the last change in the brick's log.", brickLabels, nil)
	tail      = prometheus.NewDesc("mortar_brick_log_position", "Sequence number of the last change in the brick's log.", brickLabels, nil)
	commit    = prometheus.NewDesc("mortar_brick_acknowledged_position", "Sequence number up to which changes are acknowledged.", brickLabels, nil)
	free      = prometheus.NewDesc("mortar_brick_disk_free_bytes", "Free bytes of the disk under the brick.", brickLabels, nil)
	total     = prometheus.NewDesc("mortar_brick_disk_size_bytes", "Size of the disk under the brick.", brickLabels, nil)
)

// collector implements prometheus.Collector.
type collector struct {
	snapshot func(ctx context.Context) Snapshot
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{info, quorum, leader, connected, mounts, online, primary, inSync, epoch, tail, commit, free, total} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	s := c.snapshot(ctx)
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(info, 1, s.Version)
	gauge(quorum, truth(s.Quorum))
	gauge(leader, truth(s.Leader))
	gauge(mounts, float64(s.Mounts))
	for _, p := range s.Peers {
		gauge(connected, truth(p.Connected), p.Name)
	}
	for _, b := range s.Bricks {
		gauge(online, truth(b.Online), b.Volume, b.Brick)
		gauge(free, float64(b.Free), b.Volume, b.Brick)
		gauge(total, float64(b.Total), b.Volume, b.Brick)
		if !b.Online {
			continue // the rest would be old
		}
		gauge(primary, truth(b.Primary), b.Volume, b.Brick)
		gauge(inSync, truth(b.InSync), b.Volume, b.Brick)
		gauge(epoch, float64(b.Epoch), b.Volume, b.Brick)
		gauge(tail, float64(b.Tail), b.Volume, b.Brick)
		gauge(commit, float64(b.Commit), b.Volume, b.Brick)
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
