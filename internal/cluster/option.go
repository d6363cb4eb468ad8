package cluster

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// OptionKind is the type of an option's value.
type OptionKind int

const (
	KindBool     OptionKind = iota // on, off and their synonyms
	KindInt                        // a whole number from Min to Max
	KindSize                       // bytes, with an optional unit KB, MB, GB, TB (powers of 1024)
	KindDuration                   // seconds, or a number with ms, s, m or h
	KindPercent                    // a whole percentage from Min to Max
	KindEnum                       // one of Values
	KindAccess                     // addresses that may mount
)

func (k OptionKind) String() string {
	switch k {
	case KindBool:
		return "on or off"
	case KindInt:
		return "number"
	case KindSize:
		return "size"
	case KindDuration:
		return "time"
	case KindPercent:
		return "percentage"
	case KindEnum:
		return "word"
	case KindAccess:
		return "address list"
	}
	return fmt.Sprintf("OptionKind(%d)", int(k))
}

// OptionScope tells which programs an option concerns.
type OptionScope int

const (
	ScopeBrick  OptionScope = iota // the daemons that serve the volume's bricks
	ScopeClient                    // the mounts: sent to them, and again when it changes
	ScopeBoth
)

// Option describes one volume option: what "volume set help" prints and what a
// value is checked against.
type Option struct {
	Name        string
	Default     string // in canonical form
	Description string
	Kind        OptionKind
	Scope       OptionScope
	// Min and Max bound a KindInt, KindPercent, KindSize (bytes) or KindDuration
	// (nanoseconds).
	Min, Max int64
	Values   []string // of a KindEnum; of the others, words accepted besides
	// Ignored is set on options of GlusterFS that are accepted so that scripts
	// and tutorials work, and change nothing. It says why none is needed.
	Ignored string
}

// ErrOption is wrapped by every complaint about an option's name or value.
var ErrOption = errors.New("invalid option")

// optionError carries the text alone: it is what the user is shown.
type optionError string

func (e optionError) Error() string   { return string(e) }
func (e optionError) Is(t error) bool { return t == ErrOption }

// The names of the options that have an effect.
const (
	OptEncryption    = "transport.encryption"
	OptCacheTimeout  = "cache-timeout"
	OptMinInSync     = "min-in-sync"
	OptIOTimeout     = "io-timeout"
	OptReserve       = "storage.reserve"
	OptAuthAllow     = "auth.allow"
	OptRetentionSize = "log-retention-size"
	OptScrub         = "scrub"
	OptScrubInterval = "scrub-interval"
	OptScrubQuiet    = "scrub-quiet"
	OptScrubRate     = "scrub-rate"
)

// optRetentionTime had an effect in no version, and may be set in a pool.
const (
	optRetentionTime    = "log-retention-time"
	retentionTimeReason = "a brick keeps its change log by size, however old it is; see " + OptRetentionSize
)

// MaxReplica is the largest number of bricks in a set.
const MaxReplica = 5

// options has every option, sorted by name. It is never changed.
var options = makeOptions()

func makeOptions() []Option {
	o := []Option{
		{Name: OptEncryption, Default: "on", Kind: KindBool, Scope: ScopeBoth,
			Description: "Encrypt file data between machines. Off keeps authentication and checksums and saves the cost of encrypting, for a network that is trusted."},
		{Name: OptCacheTimeout, Default: "60s", Kind: KindDuration, Scope: ScopeClient, Min: 0, Max: int64(24 * time.Hour),
			Description: "How long a kernel may keep names and attributes without asking again. Caches are invalidated by every change, so this bounds only what a machine whose mount process hangs can still see. 0 switches the kernel's caches of names and attributes off."},
		{Name: OptMinInSync, Default: "auto", Kind: KindInt, Scope: ScopeBrick, Min: 1, Max: MaxReplica, Values: []string{"auto"},
			Description: "The fewest in-sync bricks with which a set takes writes; with fewer it is read-only. auto is 2 with three or more replicas, else 1."},
		{Name: OptIOTimeout, Default: "0s", Kind: KindDuration, Scope: ScopeClient, Min: 0, Max: int64(24 * time.Hour),
			Description: "How long an operation waits for a set that cannot serve before it fails with EIO. 0 waits for ever, which is what databases want; waiting operations can be killed."},
		{Name: OptReserve, Default: "1%", Kind: KindPercent, Scope: ScopeBrick, Min: 0, Max: 50,
			Description: "Part of each brick's disk that is kept free; writes fail with ENOSPC before they use it, deletions always work."},
		{Name: OptAuthAllow, Default: "*", Kind: KindAccess, Scope: ScopeBoth,
			Description: "Addresses from which the volume may be mounted: a comma-separated list of addresses (10.0.0.7), networks (10.0.0.0/8) and patterns (10.0.*). Peers of the pool may always."},
		{Name: OptRetentionSize, Default: "1GB", Kind: KindSize, Scope: ScopeBrick, Min: 64 << 20, Max: 1 << 40,
			Description: "How much of its change log each brick keeps at least, so that a brick that was away catches up from the log and needs no comparison."},
		{Name: optRetentionTime, Default: "1h", Kind: KindEnum, Scope: ScopeBrick, Ignored: retentionTimeReason,
			Description: "Accepted, without effect: " + retentionTimeReason + "."},
		{Name: OptScrub, Default: "on", Kind: KindBool, Scope: ScopeBrick,
			Description: "Whether bricks look for what has rotted on their disks. Off is what \"volume scrub VOLUME pause\" sets: no file is looked at and no checksums are made; what is known to be rotten is still repaired."},
		{Name: OptScrubInterval, Default: "336h", Kind: KindDuration, Scope: ScopeBrick, Min: 0, Max: int64(365 * 24 * time.Hour),
			Description: "How long after one round of scrubbing has ended each brick begins the next. 0: only when told to (\"volume scrub VOLUME start\")."},
		{Name: OptScrubQuiet, Default: "2m", Kind: KindDuration, Scope: ScopeBrick, Min: 0, Max: int64(24 * time.Hour),
			Description: "How long a file must not have been changed before its blocks get checksums. What rots before that is taken for what was written; a file that is changed again soon got them in vain."},
		{Name: OptScrubRate, Default: "16MB", Kind: KindSize, Scope: ScopeBrick, Min: 64 << 10, Max: 1 << 34,
			Description: "How many bytes per second each brick reads at most for scrubbing. It is a quarter of that while clients write."},
	}
	o = append(o, ignoredOptions()...)
	slices.SortFunc(o, func(a, b Option) int { return strings.Compare(a.Name, b.Name) })
	return o
}

// ignoredOptions are well-known names of GlusterFS, by the reason why they have
// nothing to act on here.
func ignoredOptions() []Option {
	var all []Option
	add := func(reason string, names ...string) {
		for _, n := range names {
			name, def, _ := strings.Cut(n, "=")
			all = append(all, Option{Name: name, Default: def, Kind: KindEnum, Scope: ScopeBrick, Ignored: reason,
				Description: "Accepted for compatibility with GlusterFS, without effect: " + reason + "."})
		}
	}
	add("a set takes writes only with "+OptMinInSync+" in-sync bricks, and split-brain cannot happen",
		"cluster.quorum-type=auto", "cluster.quorum-count=0", "cluster.server-quorum-type=off", "cluster.server-quorum-ratio=51",
		"cluster.favorite-child-policy=none", "cluster.consistent-metadata=no")
	add("bricks heal by themselves, from the change log",
		"cluster.self-heal-daemon=on", "cluster.data-self-heal=off", "cluster.metadata-self-heal=off", "cluster.entry-self-heal=off",
		"cluster.granular-entry-heal=on", "cluster.heal-timeout=600", "cluster.shd-max-threads=1", "cluster.shd-wait-qlength=1024",
		"cluster.background-self-heal-count=8", "cluster.data-self-heal-algorithm=diff")
	add("every read is answered by the local replica",
		"cluster.choose-local=true", "cluster.read-hash-mode=1", "cluster.read-subvolume=")
	add("a change is on every in-sync brick before it is acknowledged",
		"cluster.eager-lock=on", "cluster.ensure-durability=on", "cluster.post-op-delay-secs=1")
	add("files are placed by the volume's layout",
		"cluster.lookup-optimize=on", "cluster.lookup-unhashed=on", "cluster.min-free-disk=10%", "cluster.readdir-optimize=off", "cluster.rebal-throttle=normal",
		"features.shard=off", "features.shard-block-size=64MB")
	add("caches are kept coherent by invalidation; see "+OptCacheTimeout,
		"performance.cache-invalidation=off", "performance.md-cache-timeout=1", "performance.stat-prefetch=on", "performance.nl-cache=off",
		"performance.nl-cache-timeout=60", "performance.nl-cache-limit=131072", "performance.quick-read=on", "performance.io-cache=off",
		"performance.cache-size=32MB", "performance.cache-max-file-size=0", "performance.cache-min-file-size=0", "performance.cache-refresh-timeout=1",
		"performance.cache-samba-metadata=off", "performance.read-ahead=off", "performance.readdir-ahead=off", "performance.parallel-readdir=off",
		"performance.rda-cache-limit=10MB", "performance.open-behind=on", "performance.lazy-open=yes", "performance.write-behind=on",
		"performance.flush-behind=on", "performance.write-behind-window-size=1MB", "performance.strict-o-direct=off", "performance.force-readdirp=true",
		"features.cache-invalidation=off", "features.cache-invalidation-timeout=60", "network.inode-lru-limit=16384", "network.remote-dio=disable")
	add("there are no threads to tune",
		"performance.client-io-threads=off", "performance.io-thread-count=16", "performance.high-prio-threads=16", "performance.normal-prio-threads=16",
		"performance.low-prio-threads=16", "performance.least-prio-threads=1", "client.event-threads=2", "server.event-threads=2",
		"server.outstanding-rpc-limit=64", "config.brick-threads=16", "config.client-threads=16")
	add("a dead machine costs its clients at most two seconds, by leases that are not tunable",
		"network.ping-timeout=42", "network.frame-timeout=1800", "client.tcp-user-timeout=0", "server.tcp-user-timeout=42",
		"client.keepalive-time=20", "client.keepalive-interval=2", "client.keepalive-count=9", "server.keepalive-time=20",
		"server.keepalive-interval=2", "server.keepalive-count=9", "server.keepalive=1")
	add("connections between machines are always authenticated; see "+OptEncryption,
		"client.ssl=off", "server.ssl=off", "auth.ssl-allow=*", "ssl.cipher-list=", "server.allow-insecure=on")
	add("there is one port and any address family",
		"transport.address-family=inet", "nfs.disable=on", "nfs.transport-type=tcp", "config.transport=tcp")
	add("contents are checksummed and times are kept by the volume itself",
		"storage.fips-mode-rchecksum=on", "features.ctime=on", "storage.health-check-interval=30", "storage.health-check-timeout=20")
	add("bricks scrub by themselves; see "+OptScrub+", "+OptScrubInterval+" and "+OptScrubRate,
		"features.bitrot=on", "features.scrub=Active", "features.scrub-freq=biweekly", "features.scrub-throttle=lazy")
	add("logs and latencies are the daemon's own; see its configuration and /metrics",
		"diagnostics.brick-log-level=INFO", "diagnostics.client-log-level=INFO", "diagnostics.brick-sys-log-level=CRITICAL",
		"diagnostics.client-sys-log-level=CRITICAL", "diagnostics.latency-measurement=off", "diagnostics.count-fop-hits=off")
	return all
}

// Options returns every option, sorted by name. The slice is shared: read only.
func Options() []Option { return options }

// FindOption returns the option of that exact name, or an error that suggests
// the nearest one, in GlusterFS's words.
func FindOption(name string) (*Option, error) {
	i, ok := slices.BinarySearchFunc(options, name, func(o Option, n string) int { return strings.Compare(o.Name, n) })
	if ok {
		return &options[i], nil
	}
	text := fmt.Sprintf("option : %s does not exist", quoteOdd(name))
	if near := nearestOption(name); near != "" {
		text += fmt.Sprintf("\nDid you mean %s?", near)
	}
	return nil, optionError(text)
}

// quoteOdd quotes what would disturb a terminal or be too long for one.
func quoteOdd(s string) string {
	if len(s) > 256 {
		s = s[:256] + "..."
	}
	if q := strconv.Quote(s); q[1:len(q)-1] != s {
		return q
	}
	return s
}

// nearestOption finds what the user may have meant: a name that ends in what
// was typed, or else one a few letters away.
func nearestOption(name string) string {
	if name == "" || len(name) > 64 {
		return ""
	}
	low := strings.ReplaceAll(strings.ToLower(name), "_", "-")
	best, dist := "", 4
	for i := range options {
		o := options[i].Name
		if o == low || strings.HasSuffix(o, "."+low) {
			return o
		}
		if d := editDistance(low, o); d < dist && d < len(low) {
			best, dist = o, d
		}
	}
	return best
}

// editDistance counts the letters to insert, delete or replace.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost++
			}
			diag = row[j+1]
			row[j+1] = min(cost, diag+1, row[j]+1)
		}
	}
	return row[len(b)]
}

// Canonical checks a value and returns the form in which it is stored and
// shown. The error says what would be right.
func (o *Option) Canonical(value string) (string, error) {
	bad := func(want string) (string, error) {
		return "", optionError(fmt.Sprintf("option %s: %s is not %s", o.Name, strconv.Quote(trunc(value)), want))
	}
	v := strings.TrimSpace(value)
	if len(v) > 4096 || strings.ContainsFunc(v, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return bad("printable text of at most 4096 bytes")
	}
	if o.Ignored != "" {
		return v, nil
	}
	if slices.Contains(o.Values, strings.ToLower(v)) {
		return strings.ToLower(v), nil
	}
	also := ""
	if len(o.Values) > 0 {
		also = ", or " + strings.Join(o.Values, ", ")
	}
	switch o.Kind {
	case KindBool:
		b, ok := parseBool(v)
		if !ok {
			return bad("on or off")
		}
		if b {
			return "on", nil
		}
		return "off", nil
	case KindInt:
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < o.Min || n > o.Max {
			return bad(fmt.Sprintf("a whole number from %d to %d%s", o.Min, o.Max, also))
		}
		return strconv.FormatInt(n, 10), nil
	case KindPercent:
		n, err := strconv.ParseInt(strings.TrimSuffix(v, "%"), 10, 64)
		if err != nil || n < o.Min || n > o.Max {
			return bad(fmt.Sprintf("a percentage from %d%% to %d%%%s", o.Min, o.Max, also))
		}
		return strconv.FormatInt(n, 10) + "%", nil
	case KindSize:
		n, ok := ParseSize(v)
		if !ok || n < o.Min || n > o.Max {
			return bad(fmt.Sprintf("a size from %s to %s, such as 512MB%s", FormatSize(o.Min), FormatSize(o.Max), also))
		}
		return FormatSize(n), nil
	case KindDuration:
		d, ok := parseDuration(v)
		if !ok || int64(d) < o.Min || int64(d) > o.Max {
			return bad(fmt.Sprintf("a time from %s to %s, such as 90s or 2m%s", formatDuration(time.Duration(o.Min)), formatDuration(time.Duration(o.Max)), also))
		}
		return formatDuration(d), nil
	case KindAccess:
		if _, err := ParseAccess(v); err != nil {
			return "", optionError(fmt.Sprintf("option %s: %v", o.Name, err))
		}
		return strings.Join(splitList(v), ","), nil
	}
	return bad("one of " + strings.Join(o.Values, ", "))
}

// trunc keeps a complaint about a value shorter than the value may be.
func trunc(s string) string {
	if len(s) > 100 {
		return s[:100] + "..."
	}
	return s
}

func parseBool(s string) (value, ok bool) {
	switch strings.ToLower(s) {
	case "on", "yes", "true", "enable", "1":
		return true, true
	case "off", "no", "false", "disable", "0":
		return false, true
	}
	return false, false
}

// parseDuration reads seconds, or a number with a unit. Fractions of less than
// a millisecond mean nothing here and are refused.
func parseDuration(s string) (time.Duration, bool) {
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		if n < 0 || n > math.MaxInt64/int64(time.Second) {
			return 0, false
		}
		return time.Duration(n) * time.Second, true
	}
	if n, ok := strings.CutSuffix(s, "d"); ok {
		days, err := strconv.ParseInt(n, 10, 32)
		return time.Duration(days) * 24 * time.Hour, err == nil && days >= 0 && days < 36500
	}
	d, err := time.ParseDuration(s)
	return d, err == nil && d >= 0 && d%time.Millisecond == 0
}

// formatDuration writes a time in the largest unit that leaves it whole; a
// minute is written as 60s, as people do.
func formatDuration(d time.Duration) string {
	switch {
	case d != 0 && d%time.Hour == 0:
		return fmt.Sprintf("%dh", d/time.Hour)
	case d > time.Minute && d%time.Minute == 0:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d%time.Second == 0:
		return fmt.Sprintf("%ds", d/time.Second)
	}
	return d.String()
}

var sizeUnits = []struct {
	name  string
	shift uint
}{{"TB", 40}, {"GB", 30}, {"MB", 20}, {"KB", 10}, {"B", 0}}

// ParseSize reads a number of bytes with an optional unit, such as 10GB, 1GiB,
// 512m or 4096. Units are powers of 1024, as in GlusterFS. A fraction is fine
// (1.5GB).
func ParseSize(s string) (int64, bool) {
	i := strings.IndexFunc(s, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	num, unit := s, ""
	if i >= 0 {
		num, unit = s[:i], strings.ToUpper(strings.TrimSpace(s[i:]))
	}
	unit = strings.Replace(unit, "IB", "B", 1)
	var shift uint
	if unit != "" {
		if len(unit) == 1 && unit != "B" {
			unit += "B"
		}
		k := slices.IndexFunc(sizeUnits, func(u struct {
			name  string
			shift uint
		}) bool {
			return u.name == unit
		})
		if k < 0 {
			return 0, false
		}
		shift = sizeUnits[k].shift
	}
	if n, err := strconv.ParseInt(num, 10, 64); err == nil {
		if n < 0 || n > math.MaxInt64>>shift {
			return 0, false
		}
		return n << shift, true
	}
	f, err := strconv.ParseFloat(num, 64)
	if err != nil || !(f >= 0) || f*float64(uint64(1)<<shift) >= math.MaxInt64 {
		return 0, false
	}
	return int64(f * float64(uint64(1)<<shift)), true
}

// FormatSize writes a number of bytes with the largest unit that leaves it whole.
func FormatSize(n int64) string {
	for _, u := range sizeUnits {
		if n != 0 && n%(1<<u.shift) == 0 {
			return strconv.FormatInt(n>>u.shift, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10) + "B"
}

// Access is the meaning of auth.allow.
type Access struct {
	all      bool
	prefixes []netip.Prefix
	patterns []string // with '*', matched against the address's text
}

func splitList(s string) []string {
	var out []string
	for f := range strings.SplitSeq(s, ",") {
		if f = strings.TrimSpace(f); f != "" {
			out = append(out, f)
		}
	}
	return out
}

// ParseAccess reads a comma-separated list of addresses, networks and patterns.
func ParseAccess(s string) (Access, error) {
	var a Access
	list := splitList(s)
	if len(list) == 0 {
		return a, fmt.Errorf("an empty list would let nobody mount; use * for everybody")
	}
	for _, f := range list {
		if f == "*" {
			a.all = true
			continue
		}
		if p, err := netip.ParsePrefix(f); err == nil {
			a.prefixes = append(a.prefixes, p.Masked())
			continue
		}
		if ip, err := netip.ParseAddr(f); err == nil && ip.Zone() == "" {
			ip = ip.Unmap()
			a.prefixes = append(a.prefixes, netip.PrefixFrom(ip, ip.BitLen()))
			continue
		}
		if strings.Contains(f, "*") && strings.Trim(f, "0123456789abcdefABCDEF.:*") == "" {
			a.patterns = append(a.patterns, strings.ToLower(f))
			continue
		}
		return Access{}, fmt.Errorf("%s is not an address (10.0.0.7), a network (10.0.0.0/8) or a pattern (10.0.*); host names are not accepted, because who answers for a name can change", strconv.Quote(trunc(f)))
	}
	return a, nil
}

// Allows reports whether ip may mount.
func (a Access) Allows(ip netip.Addr) bool {
	ip = ip.Unmap().WithZone("")
	if a.all {
		return true
	}
	for _, p := range a.prefixes {
		if p.Contains(ip) {
			return true
		}
	}
	text := ip.String()
	return slices.ContainsFunc(a.patterns, func(p string) bool { return globMatch(p, text) })
}

// globMatch matches '*' against any run of characters. Each part between stars
// may be taken where it is first found, so the time is bounded by the lengths.
func globMatch(pattern, s string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == s
	}
	first, last := parts[0], parts[len(parts)-1]
	if !strings.HasPrefix(s, first) {
		return false
	}
	s = s[len(first):]
	for _, part := range parts[1 : len(parts)-1] {
		i := strings.Index(s, part)
		if i < 0 {
			return false
		}
		s = s[i+len(part):]
	}
	return strings.HasSuffix(s, last)
}

// VolumeOptions are the options of a volume in typed form, defaults filled in.
type VolumeOptions struct {
	Encryption    bool
	CacheTimeout  time.Duration
	MinInSync     int // "auto" resolved for the volume's replica count
	IOTimeout     time.Duration
	Reserve       int // percent of the disk
	Access        Access
	RetentionSize int64 // bytes
	Scrub         bool
	ScrubInterval time.Duration
	ScrubQuiet    time.Duration
	ScrubRate     int64 // bytes per second
}

// Option returns the effective value of the option in canonical form, and
// whether it is the default.
func (v *Volume) Option(name string) (value string, isDefault bool) {
	if s, ok := v.Options[name]; ok {
		return s, false
	}
	o, err := FindOption(name)
	if err != nil {
		return "", true
	}
	return o.Default, true
}

// EffectiveOptions returns the volume's options in typed form.
func (v *Volume) EffectiveOptions() VolumeOptions {
	// Values were checked when they were set; one that cannot be read (written
	// by another version, say) counts as its default, which always can.
	get := func(name string, use func(string) bool) {
		s, _ := v.Option(name)
		if !use(s) {
			o, _ := FindOption(name)
			use(o.Default)
		}
	}
	duration := func(p *time.Duration) func(string) bool {
		return func(s string) (ok bool) { *p, ok = parseDuration(s); return ok }
	}
	var e VolumeOptions
	get(OptEncryption, func(s string) (ok bool) { e.Encryption, ok = parseBool(s); return ok })
	get(OptCacheTimeout, duration(&e.CacheTimeout))
	get(OptIOTimeout, duration(&e.IOTimeout))
	get(OptRetentionSize, func(s string) (ok bool) { e.RetentionSize, ok = ParseSize(s); return ok })
	get(OptScrub, func(s string) (ok bool) { e.Scrub, ok = parseBool(s); return ok })
	get(OptScrubInterval, duration(&e.ScrubInterval))
	get(OptScrubQuiet, duration(&e.ScrubQuiet))
	get(OptScrubRate, func(s string) (ok bool) { e.ScrubRate, ok = ParseSize(s); return ok })
	get(OptReserve, func(s string) bool {
		n, err := strconv.Atoi(strings.TrimSuffix(s, "%"))
		e.Reserve = n
		return err == nil
	})
	get(OptAuthAllow, func(s string) bool {
		a, err := ParseAccess(s)
		e.Access = a
		return err == nil
	})
	get(OptMinInSync, func(s string) bool {
		if s == "auto" {
			e.MinInSync = 1
			if v.Replica >= 3 {
				e.MinInSync = 2
			}
			return true
		}
		n, err := strconv.Atoi(s)
		e.MinInSync = n
		return err == nil
	})
	return e
}

// MaxVolumeName is the longest volume name, in bytes (a file name's limit).
const MaxVolumeName = 255

// reservedNames cannot name a volume: they are words of the command line.
var reservedNames = []string{"volume", "type", "help", "subvolumes", "option", "end-volume", "all", "volume_not_in_ring",
	"description", "force", "snap-max-hard-limit", "snap-max-soft-limit", "auto-delete", "activate-on-create"}

// CheckVolumeName says what is wrong with name as the name of a volume, in
// GlusterFS's words where it has them.
func CheckVolumeName(name string) error {
	if name == "" {
		return errors.New("A volume needs a name.") //nolint:staticcheck // shown to users as it is
	}
	for _, r := range name {
		if !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '-' || r == '_') {
			return fmt.Errorf("Volume name should not contain \"%s\" character.\nVolume names can onlycontain alphanumeric, '-' and '_' characters.", quoteRune(r))
		}
	}
	if len(name) > MaxVolumeName {
		return fmt.Errorf("Volume name is %d characters long; at most %d are possible.", len(name), MaxVolumeName)
	}
	if name[0] == '-' {
		return fmt.Errorf("Volume name %q should not begin with \"-\": commands would take it for an option.", name)
	}
	if slices.Contains(reservedNames, name) {
		return fmt.Errorf("\"%s\" cannot be the name of a volume.", name)
	}
	return nil
}

// quoteRune shows a character without letting it act on a terminal.
func quoteRune(r rune) string {
	q := strconv.QuoteRune(r)
	return q[1 : len(q)-1]
}
