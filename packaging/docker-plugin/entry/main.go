// Entry is process 1 of the managed plugin: it runs the machine's daemon as the
// settings say, makes the machine a peer of the pool when it is none yet, and waits
// for processes that nobody else waits for, as mounts are.
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

const (
	program = "/mortar"
	socket  = "/run/docker/plugins/mortar.sock" // where the engine looks
	uses    = "/var/lib/mortar/docker.json"
	joined  = "/var/lib/mortar/plugin-joined" // keeps which token was used
)

func main() {
	code, err := run(os.Getenv)
	if err != nil {
		fmt.Fprintln(os.Stderr, "entry:", err)
	}
	os.Exit(code)
}

// server is the daemon's command line.
func server(env func(string) string, host string) ([]string, error) {
	argv := []string{program, "server", "--docker-socket", socket}
	switch role := env("MORTAR_ROLE"); role {
	case "client", "":
		argv = append(argv, "--client")
	case "witness":
		argv = append(argv, "--witness")
	case "peer":
	default:
		return nil, fmt.Errorf("MORTAR_ROLE=%s: want client, witness or peer (docker plugin set NAME MORTAR_ROLE=client)", role)
	}
	if name := env("MORTAR_NAME"); name != "" {
		host = name
	}
	for _, f := range [][2]string{{"--name", host}, {"--listen", env("MORTAR_LISTEN")}, {"--docker-volume", env("MORTAR_VOLUME")}, {"--log-level", env("MORTAR_LOG_LEVEL")}} {
		if f[1] != "" {
			argv = append(argv, f[0], f[1])
		}
	}
	return argv, nil
}

func run(env func(string) string) (code int, err error) {
	// Every mount ended with the process 1 before this one, so no container uses one.
	if err := os.Remove(uses); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 1, err
	}
	host, err := os.Hostname()
	if err != nil {
		return 1, err
	}
	argv, err := server(env, host)
	if err != nil {
		return 1, err
	}
	signals := make(chan os.Signal, 10)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGCHLD)
	daemon, err := start(argv)
	if err != nil {
		return 1, err
	}
	token, hosts := env("MORTAR_TOKEN"), strings.TrimSpace(env("MORTAR_HOSTS"))
	join := 0 // the process that joins, while one does
	tries := time.NewTicker(time.Second)
	defer tries.Stop()
	if token == "" || hosts == "" || before(token) {
		tries.Stop()
	}
	for {
		select {
		case <-tries.C:
			if join == 0 {
				if join, err = start([]string{program, "join", token, hosts}); err != nil {
					return 1, err
				}
			}
		case s := <-signals:
			if s != syscall.SIGCHLD {
				syscall.Kill(daemon, s.(syscall.Signal))
				continue
			}
			for {
				var status syscall.WaitStatus
				pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
				if pid <= 0 || err != nil {
					break
				}
				switch pid {
				case daemon:
					return status.ExitStatus(), nil
				case join: // what went wrong is in the log, and is tried again
					join = 0
					if status.ExitStatus() != 0 {
						continue
					}
					tries.Stop()
					if err := os.WriteFile(joined, []byte(digest(token)+"\n"), 0o600); err != nil {
						return 1, err
					}
				}
			}
		}
	}
}

// start starts a program, and returns its process, which the loop above waits for.
func start(argv []string) (pid int, err error) {
	return syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}})
}

// before reports whether the machine has joined with this token already. Tokens are
// for once, and settings stay.
func before(token string) bool {
	raw, err := os.ReadFile(joined)
	return err == nil && strings.TrimSpace(string(raw)) == digest(token)
}

func digest(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}
