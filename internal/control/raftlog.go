package control

import (
	"context"
	"io"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// newRaftLog gives the consensus library a logger that writes to log, at debug
// level whatever the library thinks of it: what matters to people (a new
// leader, a peer lost or found) is said by this package, once.
func newRaftLog(log *slog.Logger) hclog.Logger {
	if !log.Enabled(context.Background(), slog.LevelDebug) {
		return hclog.NewNullLogger()
	}
	l := hclog.NewInterceptLogger(&hclog.LoggerOptions{Level: hclog.Off, Output: io.Discard})
	l.RegisterSink(slogSink{log})
	return l
}

// slogSink implements hclog.SinkAdapter.
type slogSink struct{ log *slog.Logger }

func (s slogSink) Accept(_ string, _ hclog.Level, msg string, args ...any) {
	s.log.Debug("raft: "+msg, args...)
}
