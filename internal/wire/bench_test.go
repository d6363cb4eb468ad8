package wire

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"net"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// transports are the kinds of connection that mortar uses.
var transports = []string{"unix", "tcp", "tls", "plain"}

// netPair returns both ends of a connection of that kind.
func netPair(tb testing.TB, kind string) (a, b net.Conn) {
	tb.Helper()
	network, addr := "tcp", "127.0.0.1:0"
	if kind == "unix" {
		network, addr = "unix", filepath.Join(tb.TempDir(), "s")
	}
	l, err := net.Listen(network, addr)
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	type accepted struct {
		nc  net.Conn
		err error
	}
	ch := make(chan accepted)
	server, client := testTLS(tb)
	go func() {
		nc, err := l.Accept()
		if err == nil && (kind == "tls" || kind == "plain") {
			var tc *tls.Conn
			tc, err = Server(context.Background(), nc, server)
			nc = tc
			if err == nil && kind == "plain" {
				nc, err = Plain(context.Background(), tc, false, true)
			}
		}
		ch <- accepted{nc, err}
	}()
	a, err = net.Dial(network, l.Addr().String())
	if err == nil && (kind == "tls" || kind == "plain") {
		var tc *tls.Conn
		tc, err = Client(context.Background(), a, client)
		a = tc
		if err == nil && kind == "plain" {
			a, err = Plain(context.Background(), tc, true, true)
		}
	}
	r := <-ch
	if err != nil || r.err != nil {
		tb.Fatal(err, r.err)
	}
	return a, r.nc
}

// testTLS makes configurations of two sides that trust each other.
func testTLS(tb testing.TB) (server, client *tls.Config) {
	tb.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		DNSNames:     []string{"mortar"},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, pub, key)
	if err != nil {
		tb.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	cert := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	server = &tls.Config{
		Certificates:                []tls.Certificate{cert},
		MinVersion:                  tls.VersionTLS13,
		NextProtos:                  []string{"mortar-data/1", "mortar-raft/1"},
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true,
	}
	client = server.Clone()
	client.RootCAs = roots
	client.ServerName = "mortar"
	return server, client
}

// connPair returns two running Conns that are ended with the test.
func connPair(tb testing.TB, kind string, ao, bo Options) (a, b *Conn) {
	tb.Helper()
	an, bn := netPair(tb, kind)
	a, b = New(an, ao), New(bn, bo)
	run(tb, a)
	run(tb, b)
	return a, b
}

// run runs c until the end of the test.
func run(tb testing.TB, c *Conn) {
	done := make(chan struct{})
	go func() { c.Run(context.Background()); close(done) }()
	tb.Cleanup(func() { c.Close(nil); <-done })
}

var echo = HandlerFunc(func(c *Conn, m Message) { c.Reply(m, m.Body) })

func cpuTime() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// reportCPU reports the CPU time of the whole process, both sides, per operation.
func reportCPU(b *testing.B, from time.Duration) {
	b.ReportMetric(float64(cpuTime()-from)/float64(b.N)/1e3, "cpu-us/op")
}

// BenchmarkCall is one caller waiting for each reply: the latency of a
// metadata operation.
func BenchmarkCall(b *testing.B) {
	for _, kind := range transports {
		for _, size := range []int{100, 4096} {
			b.Run(fmt.Sprintf("%s/%d", kind, size), func(b *testing.B) {
				c, _ := connPair(b, kind, Options{}, Options{Handler: echo})
				body := make([]byte, size)
				b.ReportAllocs()
				b.ResetTimer()
				cpu := cpuTime()
				for range b.N {
					if _, err := c.Call(b.Context(), 1, body); err != nil {
						b.Fatal(err)
					}
				}
				reportCPU(b, cpu)
			})
		}
	}
}

// BenchmarkCallParallel is 16 callers at once on one connection.
func BenchmarkCallParallel(b *testing.B) {
	for _, kind := range transports {
		b.Run(kind, func(b *testing.B) {
			c, _ := connPair(b, kind, Options{}, Options{Handler: echo})
			body := make([]byte, 100)
			b.SetParallelism(8)
			b.ReportAllocs()
			b.ResetTimer()
			cpu := cpuTime()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err := c.Call(b.Context(), 1, body); err != nil {
						b.Error(err)
						return
					}
				}
			})
			reportCPU(b, cpu)
		})
	}
}

// BenchmarkSend is a stream of one-way messages, as fast as the other side takes them.
func BenchmarkSend(b *testing.B) {
	for _, kind := range transports {
		for _, size := range []int{100, 64 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("%s/%d", kind, size), func(b *testing.B) {
				var got atomic.Int64
				all := make(chan struct{})
				c, _ := connPair(b, kind, Options{}, Options{Handler: HandlerFunc(func(c *Conn, m Message) {
					c.Recycle(m.Body)
					if got.Add(1) == int64(b.N) {
						close(all)
					}
				})})
				body := make([]byte, size)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				b.ResetTimer()
				cpu := cpuTime()
				for range b.N {
					for {
						err := c.Send(1, body)
						if err == nil {
							break
						}
						if err != ErrBacklog {
							b.Fatal(err)
						}
						c.Room(b.Context(), size+100)
					}
				}
				<-all
				reportCPU(b, cpu)
			})
		}
	}
}
