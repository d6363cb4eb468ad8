package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"

	"mortar/bench/figure"
)

// table collects the figures of all rounds.
type table struct {
	delay   time.Duration
	rate    float64
	rounds  int
	targets []*target

	names []string                        // workloads, in the order they ran
	units map[string]string               // of a workload
	value map[string]map[string][]float64 // workload → target → one a round
	cpu   map[string]map[string][]float64 // the same, ms of processor time per operation
	use   map[string]usage
}

func (t *table) add(target string, figures []figure.Figure, use usage) {
	if t.units == nil {
		t.units, t.use = map[string]string{}, map[string]usage{}
		t.value, t.cpu = map[string]map[string][]float64{}, map[string]map[string][]float64{}
	}
	for _, f := range figures {
		if t.units[f.Name] == "" {
			t.names = append(t.names, f.Name)
			t.units[f.Name] = f.Unit
			t.value[f.Name], t.cpu[f.Name] = map[string][]float64{}, map[string][]float64{}
		}
		t.value[f.Name][target] = append(t.value[f.Name][target], f.Median)
		t.cpu[f.Name][target] = append(t.cpu[f.Name][target], f.CPU)
	}
	if use.rss > 0 {
		t.use[target] = use
	}
}

// floor is how fast mortar means to be at least, without encryption.
type floor struct {
	times float64 // as fast as GlusterFS
	node  float64 // as fast as GlusterFS, mounted with locks=node; 0: nothing asked
	local float64 // as fast as the local disk; where node is set, mounted with locks=node; 0: nothing asked
}

var floors = map[string]floor{
	"create 4 KiB":                            {times: 4},
	"rewrite in place":                        {times: 5},
	"rename over":                             {times: 5},
	"delete":                                  {times: 4},
	"untar WordPress":                         {times: 5},
	"git clone":                               {times: 5},
	"open-read-close, warm":                   {times: 1.5, node: 8, local: 0.5},
	"stat, 1.5 s later":                       {times: 100, local: 0.5},
	"absent name, again":                      {times: 100, local: 0.5},
	"PHP-like request, warm":                  {times: 3},
	"PHP-like request, absent names, warm":    {times: 15},
	"sequential write, 4 KiB":                 {times: 1},
	"sequential write, 128 KiB":               {times: 1},
	"sequential write, 1 MiB":                 {times: 1},
	"sequential read, 4 KiB, cold":            {times: 1.2},
	"sequential read, 128 KiB, cold":          {times: 1.2},
	"sequential read, 1 MiB, cold":            {times: 1.2},
	"random write, 4 KiB":                     {times: 2},
	"8 KiB write + fdatasync":                 {times: 2},
	"8 KiB write + fdatasync, 4 workers":      {times: 4},
	"WordPress page, php-fpm":                 {local: 0.8},
	"MariaDB, sysbench write-only, 4 threads": {times: 1.3},
}

// slowFloors are the floors over links with delay.
var slowFloors = map[string]floor{
	"create 4 KiB":              {times: 2},
	"sequential write, 4 KiB":   {times: 1},
	"sequential write, 128 KiB": {times: 1},
	"sequential write, 1 MiB":   {times: 1},
	"stat, 1.5 s later":         {local: 0.5},
	"absent name, again":        {local: 0.5},
}

// judge says of each floor of a workload whether it was kept. ratio gives how
// many times as good one target is as another, 0 if that was not measured.
func judge(f floor, ratio func(a, b string) float64) string {
	var out []string
	say := func(what string, want, got float64) {
		if want == 0 || got == 0 {
			return
		}
		verdict := "kept"
		if got < want {
			verdict = "**MISSED**"
		}
		out = append(out, fmt.Sprintf("%s ≥ %s × %s", what, figure.Number(want), verdict))
	}
	say("", f.times, ratio("mortar", "gluster"))
	say("locks=node", f.node, ratio("mortar,node", "gluster"))
	if f.node > 0 {
		say("locks=node, of local", f.local, ratio("mortar,node", "local"))
	} else {
		say("of local", f.local, ratio("mortar", "local"))
	}
	return strings.TrimSpace(strings.Join(out, "; "))
}

func (t *table) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Measured %s on %s.\n", time.Now().UTC().Format("2 January 2006"), machine())
	fmt.Fprintf(&b, "Three machines made of namespaces on it, bricks on XFS loop images; medians of %d interleaved rounds, each product alone on the machines while it is measured.\n", t.rounds)
	if t.delay > 0 || t.rate > 0 {
		fmt.Fprintf(&b, "Links: %v one way, %.0f Mbit/s.\n", t.delay, t.rate/1e6)
	}
	b.WriteString("\n")
	for _, x := range t.targets {
		fmt.Fprintf(&b, "- **%s**: %s\n", x.name, x.about)
	}
	b.WriteString("\n| workload |")
	for _, x := range t.targets {
		fmt.Fprintf(&b, " %s |", x.name)
	}
	b.WriteString(" mortar : gluster | floor | mortar : local | CPU per operation, gluster / mortar |\n|---|")
	b.WriteString(strings.Repeat("---|", len(t.targets)+4) + "\n")
	limits := floors
	if t.delay > 0 {
		limits = slowFloors
	}
	for _, name := range t.names {
		unit, v := t.units[name], t.value[name]
		fmt.Fprintf(&b, "| %s |", name)
		for _, x := range t.targets {
			if len(v[x.name]) == 0 {
				b.WriteString(" |")
				continue
			}
			fmt.Fprintf(&b, " %s %s |", figure.Number(figure.Median(v[x.name])), unit)
		}
		ratio := func(a, c string) float64 {
			if len(v[a]) == 0 || len(v[c]) == 0 {
				return 0
			}
			return figure.Times(unit, figure.Median(v[a]), figure.Median(v[c]))
		}
		show := func(r float64) string {
			if r == 0 {
				return ""
			}
			return figure.Number(r) + " ×"
		}
		cpu := ""
		if g, m := t.cpu[name]["gluster"], t.cpu[name]["mortar"]; len(g) > 0 && len(m) > 0 {
			cpu = figure.Number(figure.Median(g)) + " / " + figure.Number(figure.Median(m)) + " ms"
		}
		fmt.Fprintf(&b, " %s | %s | %s | %s |\n", show(ratio("mortar", "gluster")), judge(limits[name], ratio), show(ratio("mortar", "local")), cpu)
	}
	b.WriteString("\n| when the work is done | memory of all processes on the machine that mounts it | idle processor time of a machine |\n|---|---|---|\n")
	for _, x := range t.targets {
		if u, ok := t.use[x.name]; ok {
			fmt.Fprintf(&b, "| %s | %d MB | %.2f %% of a core |\n", x.name, u.rss/1e6, u.idle*100)
		}
	}
	return b.String()
}

// machine describes what this runs on.
func machine() string {
	cpu := "an unknown processor"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for _, line := range strings.Split(string(b), "\n") {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				cpu = strings.TrimSpace(v)
				break
			}
		}
	}
	memory := ""
	if b, err := os.ReadFile("/proc/meminfo"); err == nil {
		if f := strings.Fields(string(b)); len(f) > 1 {
			kb, _ := strconv.ParseFloat(f[1], 64)
			memory = fmt.Sprintf(", %.0f GB of memory", kb/1e6)
		}
	}
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	out := fmt.Sprintf("%d cores of %s%s, Linux %s, %s", runtime.NumCPU(), cpu, memory, strings.TrimSpace(string(kernel)), runtime.Version())
	if text, err := exec.Command("glusterfsd", "--version").Output(); err == nil {
		out += ", " + strings.SplitN(string(text), "\n", 2)[0]
	}
	return out
}
