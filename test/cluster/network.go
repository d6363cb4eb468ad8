package cluster

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// fabric carries packets between the hosts' eth0. Each port is called after its host.
type fabric interface {
	port(host string, pid int) error // gives the host an eth0
	link(host string, up bool) error // the cable
	drop(from, to string) error      // packets from one host ("" for any) to another
	mend() error                     // undoes every drop
}

// runKeeper holds the switch, and sees to it that nothing stays when the
// cluster's maker has ended, however it ended.
func runKeeper(s spec, conn net.Conn) {
	var f fabric
	var err error
	if s.Delay > 0 || s.Rate > 0 {
		f = newWire(s.Delay, s.Rate)
	} else {
		f, err = newBridge()
	}
	var inits []int // pidfds
	serve(conn, err, func(r request) error {
		switch r.Verb {
		case "port":
			fd, err := unix.PidfdOpen(r.Pid, 0)
			if err != nil {
				return err
			}
			inits = append(inits, fd)
			return f.port(r.Host, r.Pid)
		case "plug":
			return f.link(r.Host, true)
		case "unplug":
			return f.link(r.Host, false)
		case "isolate":
			return errors.Join(f.drop(r.Host, ""), f.drop("", r.Host))
		case "deafen":
			return f.drop("", r.Host)
		case "mute":
			return f.drop(r.Host, "")
		case "part":
			return errors.Join(f.drop(r.Host, r.Peer), f.drop(r.Peer, r.Host))
		case "mend":
			return f.mend()
		}
		return fmt.Errorf("unknown request %q", r.Verb)
	})
	for _, fd := range inits {
		unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 15000)
	}
	// Images are busy until the kernel has unmounted what the hosts had.
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if os.RemoveAll(s.Dir) == nil {
			return
		}
	}
}

// bridge is the kernel's switch, in the keeper's network namespace.
type bridge struct{}

func newBridge() (bridge, error) {
	rules := `table bridge cut {
		set from { type ifname; }
		set to { type ifname; }
		set pair { type ifname . ifname; }
		chain forward { type filter hook forward priority 0; policy accept;
			iifname @from drop
			oifname @to drop
			iifname . oifname @pair drop
		}
	}`
	return bridge{}, errors.Join(
		run("ip", "link", "add", "br0", "type", "bridge"),
		run("ip", "link", "set", "br0", "up"),
		run("nft", rules))
}

func (bridge) port(host string, pid int) error {
	return errors.Join(
		run("ip", "link", "add", "p-"+host, "type", "veth", "peer", "name", "eth0", "netns", fmt.Sprint(pid)),
		run("ip", "link", "set", "p-"+host, "master", "br0", "up"))
}

func (bridge) link(host string, up bool) error {
	state := "down"
	if up {
		state = "up"
	}
	return run("ip", "link", "set", "p-"+host, state)
}

func (bridge) drop(from, to string) error {
	switch {
	case to == "":
		return run("nft", "add element bridge cut from { \"p-"+from+"\" }")
	case from == "":
		return run("nft", "add element bridge cut to { \"p-"+to+"\" }")
	}
	return run("nft", "add element bridge cut pair { \"p-"+from+"\" . \"p-"+to+"\" }")
}

func (bridge) mend() error {
	return run("nft", "flush set bridge cut from; flush set bridge cut to; flush set bridge cut pair")
}
