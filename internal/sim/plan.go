package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Plan is everything that a run depends on. Equal plans give equal runs.
type Plan struct {
	Seed    uint64 // of delays, drifts and whatever else is left to chance
	Bricks  int    // 1 to 5
	Clients int
	Regs    int           // registers that the clients share
	Min     int           // min-in-sync
	For     time.Duration // when the faults stop
	Slow    bool          // the network is slow and uneven
	Actions []Action      // in order of time
}

// Action is something that is done to the set, or asked of it, at a time.
// Those that make no sense at that time (to start a brick that is up) do nothing.
type Action struct {
	At   time.Duration
	Verb string
	Args []int // by the verb, see verbs
	D    time.Duration
}

// Nodes of the network, as arguments of actions: bricks from 0, the control
// plane, then clients.
const (
	planeNode   = 8
	firstClient = 9
)

// verbs has what every verb is followed by: b brick, n node, c client, r
// register, k a number, d a duration.
var verbs = map[string]string{
	"write": "cr", "read": "cr", "fsync": "cr", "move": "cb",
	"kill":     "b",              // the process dies: what it gave to the kernel stays
	"power":    "b",              // the machine dies: what is not synced may be lost
	"blackout": "",               // all bricks lose their power at once
	"start":    "b", "stop": "b", // stop is planned: handed over, closed cleanly
	"wipe":  "b",                // the disk is replaced by an empty one
	"pause": "bd",               // SIGSTOP, SIGCONT
	"cut":   "nn", "mend": "nn", // one way
	"reset":   "nn", // a connection breaks
	"slow":    "bd", // how long a flush of the disk takes
	"hang":    "bd", // for so long no flush of the disk ends; longer than the faults last: for ever
	"full":    "bd", // for so long the brick, should it lead, has no room for what is new
	"flushkv": "b", "trim": "b", "sync": "b",
	"leader": "d",                 // the control plane has another leader after a while without one
	"min":    "k",                 // the option min-in-sync
	"halt":   "d",                 // the volume is stopped, and started again
	"drain":  "b", "undrain": "b", // peer drain
}

func (a Action) String() string {
	s := fmt.Sprintf("%v %s", a.At, a.Verb)
	i := 0
	for _, k := range verbs[a.Verb] {
		if k == 'd' {
			s += " " + a.D.String()
			continue
		}
		s += " " + nodeName(k, a.Args[i])
		i++
	}
	return s
}

func nodeName(kind rune, n int) string {
	switch {
	case kind == 'b' || kind == 'n' && n < planeNode:
		return "b" + strconv.Itoa(n)
	case kind == 'n' && n == planeNode:
		return "plane"
	case kind == 'n':
		return "c" + strconv.Itoa(n-firstClient)
	case kind == 'c' || kind == 'r':
		return string(kind) + strconv.Itoa(n)
	}
	return strconv.Itoa(n)
}

// String writes the plan as a script that Parse reads.
func (p *Plan) String() string {
	var s strings.Builder
	fmt.Fprintf(&s, "set seed=%d bricks=%d clients=%d regs=%d min=%d for=%v slow=%t\n", p.Seed, p.Bricks, p.Clients, p.Regs, p.Min, p.For, p.Slow)
	for _, a := range p.Actions {
		s.WriteString(a.String())
		s.WriteByte('\n')
	}
	return s.String()
}

// Parse reads what String wrote.
func Parse(text string) (*Plan, error) {
	p := new(Plan)
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		if err := p.parseLine(strings.Fields(line)); err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
	}
	if p.Bricks < 1 || p.Bricks > 5 || p.Clients > 8 || p.Regs < 1 || p.Regs > maxRegs || p.Clients < 0 {
		return nil, fmt.Errorf("a set of %d bricks, %d clients and %d registers is not possible", p.Bricks, p.Clients, p.Regs)
	}
	return p, nil
}

func (p *Plan) parseLine(f []string) error {
	if f[0] == "set" {
		for _, kv := range f[1:] {
			k, v, _ := strings.Cut(kv, "=")
			n, err := strconv.ParseUint(v, 10, 64)
			switch k {
			case "seed":
				p.Seed = n
			case "bricks":
				p.Bricks = int(n)
			case "clients":
				p.Clients = int(n)
			case "regs":
				p.Regs = int(n)
			case "min":
				p.Min = int(n)
			case "for":
				p.For, err = time.ParseDuration(v)
			case "slow":
				p.Slow, err = strconv.ParseBool(v)
			default:
				return fmt.Errorf("nothing is called %s", k)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	at, err := time.ParseDuration(f[0])
	if err != nil {
		return err
	}
	if len(f) < 2 {
		return fmt.Errorf("a time and no verb")
	}
	a := Action{At: at, Verb: f[1]}
	kinds, ok := verbs[a.Verb]
	if !ok || len(f)-2 != len(kinds) {
		return fmt.Errorf("not a verb, or not its arguments")
	}
	for i, k := range kinds {
		arg := f[2+i]
		if k == 'd' {
			if a.D, err = time.ParseDuration(arg); err != nil {
				return err
			}
			continue
		}
		base := 0
		switch {
		case arg == "plane":
			arg, base = "", planeNode
		case arg[0] == 'c' && k == 'n':
			arg, base = arg[1:], firstClient
		case strings.ContainsRune("bcr", rune(arg[0])):
			arg = arg[1:]
		}
		n := 0
		if arg != "" {
			if n, err = strconv.Atoi(arg); err != nil {
				return err
			}
		}
		n += base
		if limit := map[rune]int{'b': p.Bricks, 'c': p.Clients, 'r': p.Regs, 'n': firstClient + p.Clients, 'k': 6}[k]; n < 0 || n >= limit {
			return fmt.Errorf("there is no %s", f[2+i])
		}
		a.Args = append(a.Args, n)
	}
	p.Actions = append(p.Actions, a)
	return nil
}

// forEver is longer than the faults of any plan last.
const forEver = time.Hour

// Generate makes the plan of a seed. Which faults there are, and how many, is
// drawn for every seed: a fault that is rare everywhere hides what needs many of
// it, and one that is frequent everywhere hides what needs calm.
func Generate(seed uint64) *Plan {
	r := rand.New(rand.NewPCG(seed, 1))
	p := &Plan{
		Seed: seed, Bricks: []int{1, 2, 2, 3, 3, 3, 3, 3, 4, 5}[r.IntN(10)], Clients: 1 + r.IntN(4), Regs: 1 + r.IntN(maxRegs),
		Min: 1, For: time.Duration(5+r.IntN(30)) * time.Second, Slow: r.IntN(4) == 0,
	}
	if r.IntN(4) == 0 {
		p.Min = 1 + r.IntN(p.Bricks)
	}
	brick := func() int { return r.IntN(p.Bricks) }
	node := func() int {
		switch n := r.IntN(p.Bricks*2 + 1 + p.Clients); {
		case n < p.Bricks*2:
			return n % p.Bricks
		case n == p.Bricks*2:
			return planeNode
		default:
			return firstClient + n - p.Bricks*2 - 1
		}
	}
	at := func() time.Duration { return time.Duration(r.Int64N(int64(p.For))).Round(time.Microsecond) }
	add := func(a Action) { p.Actions = append(p.Actions, a) }

	// What clients ask for.
	pace := []time.Duration{10, 30, 100, 300}[r.IntN(4)] * time.Millisecond
	for c := range p.Clients {
		for t := time.Duration(r.Int64N(int64(time.Second))); t < p.For; t += time.Duration(r.Int64N(int64(2 * pace))).Round(time.Microsecond) {
			verb := []string{"write", "write", "write", "read", "read", "read", "read", "fsync"}[r.IntN(8)]
			add(Action{At: t, Verb: verb, Args: []int{c, r.IntN(p.Regs)}})
		}
		if r.IntN(2) == 0 {
			for range r.IntN(6) {
				add(Action{At: at(), Verb: "move", Args: []int{c, brick()}})
			}
		}
	}

	// How many of each fault: none of most.
	times := func() int {
		switch r.IntN(5) {
		case 0:
			return 1 + r.IntN(3)
		case 1:
			return 3 + r.IntN(20)
		}
		return 0
	}
	rest := func(t time.Duration) time.Duration {
		return t + time.Duration(r.Int64N(int64([]time.Duration{500 * time.Millisecond, 2 * time.Second, 8 * time.Second}[r.IntN(3)]))).Round(time.Microsecond)
	}
	for _, verb := range []string{"kill", "power", "stop"} {
		for range times() {
			b, t := brick(), at()
			add(Action{At: t, Verb: verb, Args: []int{b}})
			add(Action{At: rest(t), Verb: "start", Args: []int{b}})
		}
	}
	for range min(times(), 4) {
		t := at()
		add(Action{At: t, Verb: "blackout"})
		for b := range p.Bricks {
			add(Action{At: rest(t), Verb: "start", Args: []int{b}})
		}
	}
	for range times() {
		b, t := brick(), at()
		add(Action{At: t, Verb: "wipe", Args: []int{b}})
		add(Action{At: rest(t), Verb: "start", Args: []int{b}})
	}
	for range times() {
		add(Action{At: at(), Verb: "pause", Args: []int{brick()}, D: (rest(0) / 2).Round(time.Microsecond)})
	}
	for range times() {
		a, b, t := node(), node(), at()
		if a == b {
			continue
		}
		both := r.IntN(2) == 0
		end := rest(t)
		add(Action{At: t, Verb: "cut", Args: []int{a, b}})
		add(Action{At: end, Verb: "mend", Args: []int{a, b}})
		if both {
			add(Action{At: t, Verb: "cut", Args: []int{b, a}})
			add(Action{At: end, Verb: "mend", Args: []int{b, a}})
		}
	}
	for range times() { // a partition: some nodes here, the others there
		t := at()
		end := rest(t)
		var side [16]bool
		all := []int{planeNode}
		for b := range p.Bricks {
			all = append(all, b)
		}
		for c := range p.Clients {
			all = append(all, firstClient+c)
		}
		for _, n := range all {
			side[n] = r.IntN(2) == 0
		}
		for _, a := range all {
			for _, b := range all {
				if side[a] != side[b] {
					add(Action{At: t, Verb: "cut", Args: []int{a, b}})
					add(Action{At: end, Verb: "mend", Args: []int{a, b}})
				}
			}
		}
	}
	for range 2 * times() {
		if a, b := brick(), brick(); a != b {
			add(Action{At: at(), Verb: "reset", Args: []int{a, b}})
		}
	}
	for range times() {
		add(Action{At: at(), Verb: "slow", Args: []int{brick()}, D: time.Duration(r.Int64N(int64(300 * time.Millisecond))).Round(time.Microsecond)})
	}
	for _, verb := range []string{"flushkv", "trim", "sync"} {
		for range 5 * times() {
			add(Action{At: at(), Verb: verb, Args: []int{brick()}})
		}
	}
	for range times() {
		add(Action{At: at(), Verb: "leader", D: (rest(0) / 4).Round(time.Microsecond)})
	}
	if r.IntN(4) == 0 {
		for range 1 + r.IntN(3) {
			add(Action{At: at(), Verb: "min", Args: []int{1 + r.IntN(p.Bricks)}})
		}
	}
	if r.IntN(6) == 0 {
		add(Action{At: at(), Verb: "halt", D: (rest(0) / 2).Round(time.Microsecond)})
	}
	for range times() {
		b, t := brick(), at()
		add(Action{At: t, Verb: "drain", Args: []int{b}})
		add(Action{At: rest(t), Verb: "undrain", Args: []int{b}})
	}
	for range times() {
		add(Action{At: at(), Verb: "full", Args: []int{brick()}, D: (rest(0) / 2).Round(time.Microsecond)})
	}
	// A change that is refused while a copy of it is still on its way: held up between a home that
	// its client has left and the primary, or by a connection that breaks.
	for range times() {
		c, home, to, next, t := r.IntN(p.Clients), brick(), brick(), brick(), at()
		if home == to {
			continue
		}
		soon := func(d time.Duration) time.Duration {
			t += time.Duration(r.Int64N(int64(d))).Round(time.Microsecond)
			return t
		}
		add(Action{At: t, Verb: "move", Args: []int{c, home}})
		add(Action{At: soon(300 * time.Millisecond), Verb: "full", Args: []int{to}, D: (rest(0) / 2).Round(time.Microsecond)})
		if r.IntN(2) == 0 {
			add(Action{At: soon(time.Millisecond), Verb: "write", Args: []int{c, r.IntN(p.Regs)}})
			add(Action{At: soon(time.Millisecond), Verb: "reset", Args: []int{home, to}})
			continue
		}
		add(Action{At: t, Verb: "cut", Args: []int{home, to}})
		add(Action{At: soon(time.Millisecond), Verb: "write", Args: []int{c, r.IntN(p.Regs)}})
		add(Action{At: soon(20 * time.Millisecond), Verb: "move", Args: []int{c, next}})
		add(Action{At: soon(600 * time.Millisecond), Verb: "mend", Args: []int{home, to}})
		add(Action{At: soon(time.Second), Verb: "kill", Args: []int{to}})
		add(Action{At: rest(t), Verb: "start", Args: []int{to}})
	}
	// Disks that crawl, or hang. Drawn apart, so that all else is what it was for its seed.
	r = rand.New(rand.NewPCG(seed, 2))
	if r.IntN(4) == 0 {
		for range 1 + r.IntN(4) {
			b, t := brick(), at()
			switch r.IntN(4) {
			case 0:
				add(Action{At: t, Verb: "hang", Args: []int{b}, D: forEver})
			case 1:
				add(Action{At: t, Verb: "hang", Args: []int{b}, D: rest(0)})
			default:
				add(Action{At: t, Verb: "slow", Args: []int{b}, D: time.Duration(r.Int64N(int64(4 * time.Second))).Round(time.Microsecond)})
				add(Action{At: rest(t), Verb: "slow", Args: []int{b}})
			}
		}
	}
	slices.SortStableFunc(p.Actions, func(a, b Action) int { return int(min(1, max(-1, a.At-b.At))) })
	return p
}
