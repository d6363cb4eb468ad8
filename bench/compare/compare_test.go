package main

import (
	"strings"
	"testing"

	"mortar/bench/figure"
)

func TestChoose(t *testing.T) {
	for list, want := range map[string]string{
		"local":                    "local",
		"mortar,node":              "mortar,node",
		"mortar,mortar,node,local": "mortar mortar,node local",
		"local,gluster,mortar+tls": "local gluster mortar+tls",
		"ceph":                     "",
		"":                         "",
		"local,":                   "local",
		"localhost":                "",
		"mortar,nodes":             "",
	} {
		got, err := choose(list)
		var names []string
		for _, g := range got {
			names = append(names, g.name)
		}
		if strings.Join(names, " ") != want || (err == nil) != (want != "") {
			t.Errorf("choose(%q) = %q, %v; want %q", list, names, err, want)
		}
	}
}

// Every target is measured once in every round, and none follows the same other in all of them.
func TestOrder(t *testing.T) {
	for n := 1; n <= len(targets); n++ {
		after := map[[2]string]int{}
		const rounds = 4
		for r := range rounds {
			seen := map[string]bool{}
			all := order(targets[:n], r)
			for i, tg := range all {
				seen[tg.name] = true
				if i > 0 {
					after[[2]string{all[i-1].name, tg.name}]++
				}
			}
			if len(seen) != n {
				t.Errorf("round %d of %d targets measures %d", r, n, len(seen))
			}
		}
		for pair, times := range after {
			if times == rounds || n == 5 && times > 1 {
				t.Errorf("of %d targets %s follows %s in %d rounds", n, pair[1], pair[0], times)
			}
		}
	}
}

func TestTable(t *testing.T) {
	chosen, _ := choose("local,gluster,mortar")
	tab := table{rounds: 2, targets: chosen}
	for r := range 2 {
		for target, v := range map[string]float64{"local": 1000, "gluster": 10, "mortar": 45} {
			tab.add(target, []figure.Figure{
				{Name: "create 4 KiB", Unit: "/s", Median: v + float64(r), CPU: 5},
				{Name: "untar WordPress", Unit: "s", Median: 1000 / v},
			}, usage{rss: 50e6, idle: 0.001})
		}
	}
	text := tab.markdown()
	for _, want := range []string{
		"| create 4 KiB | 1000 /s | 10.5 /s | 45.5 /s | 4.33 × | ≥ 4 × kept | 0.0455 × | 5 / 5 ms |",
		"| untar WordPress | 1 s | 100 s | 22.2 s | 4.5 × | ≥ 5 × **MISSED** | 0.045 × |",
		"| mortar | 50 MB | 0.10 % of a core |",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no line %q in\n%s", want, text)
		}
	}
}
