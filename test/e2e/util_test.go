package e2e

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// need skips a test for want of a program.
func need(t *testing.T, program string) {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		t.Skipf("SKIPPED: the program %s is not installed (test/install-packages installs it)", program)
	}
}

func setXattr(path, name, value string) error {
	err := unix.Setxattr(path, name, []byte(value), 0)
	if errors.Is(err, unix.ENOTSUP) { // the machine's own file system has none: then nothing has
		return nil
	}
	return err
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func readFile(path string) string {
	b, _ := os.ReadFile(path)
	return string(b)
}

// as makes a subtest the one that fails.
func (p *pool) as(t *testing.T) {
	outer := p.t
	p.t = t
	t.Cleanup(func() { p.t = outer })
}

// async starts a program on a host and returns a function that waits for its end.
func (p *pool) async(i int, limit time.Duration, argv ...string) func() error {
	done := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		_, err := p.Host(i).Run(ctx, argv...)
		done <- err
	}()
	return func() error { return <-done }
}
