package e2e

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// ping_pong of ctdb, the usual test of a cluster file system's locks: each process in turn locks the next
// byte of a file and counts that byte up. It tells by how much a byte has grown since it saw it last,
// whenever that changes: by one for each process, unless somebody is shown what is old.
func TestPingPong(t *testing.T) {
	if !long {
		t.Skip("LEFT OUT without MORTAR_TEST_LONG=1: ping_pong of ctdb; TestCounters looks for the same")
	}
	program, err := exec.LookPath("ping_pong")
	if err != nil {
		t.Skip("SKIPPED: the program ping_pong is not installed (apt-get install ctdb)")
	}
	p := start(t, setup{})
	for _, how := range []string{"-rw", "-rwm"} { // read(2) and write(2), and a shared map
		for mounts := 2; mounts <= 3; mounts++ {
			name := fmt.Sprintf("ping_pong%s-%d", how, mounts)
			t.Run(name, func(t *testing.T) {
				p.as(t)
				p.run(1, "touch", "/mnt/wp/"+name)
				for i := 1; i <= mounts; i++ {
					c, err := p.Host(i).Spawn(name, program, how, "/mnt/wp/"+name, fmt.Sprint(mounts+1))
					if err != nil {
						t.Fatal(err)
					}
					defer c.Kill()
				}
				increments := func(i int) []string {
					return strings.Split(strings.ReplaceAll(p.Host(i).Log(name), "\r", "\n"), "data increment = ")[1:]
				}
				told := 0 // by all
				p.within(time.Minute, "all count", func() error {
					told = 0
					for i := 1; i <= mounts; i++ {
						all := increments(i)
						if told += len(all); len(all) == 0 || !strings.HasPrefix(all[len(all)-1], fmt.Sprintln(mounts)) {
							return fmt.Errorf("n%d was told %q", i, all)
						}
					}
					return nil
				})
				time.Sleep(10 * time.Second) // to be looked at for that long is the test
				for i := 1; i <= mounts; i++ {
					told -= len(increments(i))
				}
				if told != 0 {
					for i := 1; i <= mounts; i++ {
						t.Errorf("n%d was told of another increment after that: %q", i, increments(i))
					}
				}
			})
		}
	}
	p.identical(1)
}
