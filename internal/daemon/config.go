package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"

	"mortar/internal/api"
	"mortar/internal/cluster"
)

// Where things are unless somebody says otherwise.
const (
	DefaultConfig   = "/etc/mortar/mortar.toml"
	DefaultStateDir = "/var/lib/mortar"
	DefaultRunDir   = "/run/mortar"
)

// Config is what an administrator can say about one node: in the file, key by
// key as tagged, or with the flag of the same name, which wins.
type Config struct {
	// StateDir keeps the identity of the node and its copy of the pool's state.
	StateDir string `toml:"state-dir"`
	// RunDir holds the sockets for programs on this machine.
	RunDir string `toml:"run-dir"`
	// Listen is the one TCP address for everything between machines, host:port;
	// the host may be empty for all addresses of the machine.
	Listen string `toml:"listen"`
	// Advertise are addresses (host or host:port) where others reach this
	// machine, if it is not the address its connections come from.
	Advertise []string `toml:"advertise"`
	// Name is what the pool shall call this machine; the host name by default.
	// It counts when the machine joins.
	Name string `toml:"name"`
	// Witness makes the node vote and hold no bricks. It counts when the machine joins.
	Witness bool `toml:"witness"`
	// Client makes the node neither vote nor hold bricks, and with that a Witness too.
	// It counts when the machine joins.
	Client bool `toml:"client"`
	// AcceptProbe lets a peer of another pool bring this machine in with "peer
	// probe" as long as it belongs to no pool of its own.
	AcceptProbe bool `toml:"accept-probe"`
	// LogLevel is debug, info, warn or error.
	LogLevel string `toml:"log-level"`
	// MemoryLimit is how much memory the process should do with, such as 96MB. As
	// it comes near, garbage is collected more and more often, with up to half of
	// the processor time; it is not a limit that anything fails at. Empty: none.
	MemoryLimit string `toml:"memory-limit"`

	// DockerSocket is where the volume driver listens for the Docker engine of this
	// machine; "off": nowhere. Empty: where engines look for it, if RunDir is the usual one.
	DockerSocket string `toml:"docker-socket"`
	// DockerVolume is the volume that holds Docker volumes for which none is named;
	// empty: the only one of the pool.
	DockerVolume string `toml:"docker-volume"`

	// NewIdentity, once and by flag only, makes a cloned machine another one.
	NewIdentity bool `toml:"-"`
	// Ready is called once programs on this machine can ask the node, Docker's
	// engine included.
	Ready func() `toml:"-"`
	// Log gets what happens. nil: discarded.
	Log *slog.Logger `toml:"-"`
}

// DefaultPort is the one TCP port between machines.
const DefaultPort = api.DefaultPort

// ReadConfig reads the file over what c holds already. Keys that it does not
// know are refused. A file that does not exist is an error.
func (c *Config) ReadConfig(path string) error {
	meta, err := toml.DecodeFile(path, c)
	if errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var parse toml.ParseError
	if errors.As(err, &parse) {
		return fmt.Errorf("%s: line %d: %s", path, parse.Position.Line, parse.Message)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return fmt.Errorf("%s: there is no setting %q", path, unknown[0].String())
	}
	return nil
}

// leastMemory is what a daemon without bricks needs.
const leastMemory = 32 << 20

// MemoryBytes is MemoryLimit in bytes, 0 for none.
func (c *Config) MemoryBytes() (int64, error) {
	if c.MemoryLimit == "" {
		return 0, nil
	}
	n, ok := cluster.ParseSize(c.MemoryLimit)
	if !ok || n < leastMemory {
		return 0, fmt.Errorf("memory-limit = %q: want a size of at least %s, such as 96MB", c.MemoryLimit, cluster.FormatSize(leastMemory))
	}
	return n, nil
}

// validate fills in defaults and says what cannot be.
func (c *Config) validate() error {
	if c.StateDir == "" {
		c.StateDir = DefaultStateDir
	}
	if c.RunDir == "" {
		c.RunDir = DefaultRunDir
	}
	if c.Listen == "" {
		c.Listen = ":" + strconv.Itoa(DefaultPort)
	}
	c.Witness = c.Witness || c.Client
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	for _, d := range []*string{&c.StateDir, &c.RunDir} {
		abs, err := filepath.Abs(*d)
		if err != nil {
			return err
		}
		*d = abs
	}
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return fmt.Errorf("listen = %q: want host:port or :port: %w", c.Listen, err)
	}
	// Linux allows 107 bytes for the path of a socket.
	if p := c.DataSocket(); len(p) > 107 {
		return fmt.Errorf("run-dir = %q: the path of a socket in it would be %d bytes long, more than the 107 that Linux allows", c.RunDir, len(p))
	}
	if c.DockerSocket != "" && c.DockerSocket != DockerOff && (!filepath.IsAbs(c.DockerSocket) || len(c.DockerSocket) > 107) {
		return fmt.Errorf("docker-socket = %q: want an absolute path of at most 107 bytes, or %s", c.DockerSocket, DockerOff)
	}
	for i, a := range c.Advertise {
		hp, err := hostPort(a, c.Listen)
		if err != nil {
			return fmt.Errorf("advertise: %w", err)
		}
		c.Advertise[i] = hp
	}
	if c.Name == "" {
		name, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("the machine has no name: %w; give it one with --name", err)
		}
		c.Name = name
	}
	if err := checkName(c.Name); err != nil {
		return fmt.Errorf("name = %q: %w", c.Name, err)
	}
	if c.LogLevel == "" {
		c.LogLevel = "info"
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return fmt.Errorf("log-level = %q: want debug, info, warn or error", c.LogLevel)
	}
	_, err := c.MemoryBytes()
	return err
}

// APISocket is the path of the socket that the command line asks.
func (c *Config) APISocket() string { return filepath.Join(c.RunDir, "mortar.sock") }

// DataSocket is the path of the socket that mounts on this machine use.
func (c *Config) DataSocket() string { return filepath.Join(c.RunDir, "data.sock") }

// hostPort completes host, host:port or [v6]:port with the port of listen,
// or the default one.
func hostPort(s, listen string) (string, error) {
	host, port := s, ""
	if h, p, err := net.SplitHostPort(s); err == nil {
		host, port = h, p
	} else if strings.ContainsAny(s, ":[]") && net.ParseIP(s) == nil {
		return "", fmt.Errorf("%q is no address: want host or host:port", s)
	}
	if host == "" {
		return "", fmt.Errorf("%q is no address: the host is missing", s)
	}
	if port == "" {
		if _, p, err := net.SplitHostPort(listen); err == nil && p != "0" {
			port = p
		} else {
			port = strconv.Itoa(DefaultPort)
		}
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return "", fmt.Errorf("%q is no address: port %q", s, port)
	}
	return net.JoinHostPort(host, port), nil
}

// checkName says what is wrong with s as the name of a machine. Bricks are
// written NAME:/path, so a name has neither of these two characters unless it
// is an IPv6 address.
func checkName(s string) error {
	if net.ParseIP(s) != nil {
		return nil
	}
	if s == "" || len(s) > 253 {
		return errors.New("want 1 to 253 characters")
	}
	for _, r := range s {
		if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '-' || r == '_') {
			return fmt.Errorf("a name has letters, digits, dots, dashes and underscores, not %q", r)
		}
	}
	if s[0] == '-' || s[0] == '.' {
		return fmt.Errorf("a name begins with a letter or digit")
	}
	return nil
}
