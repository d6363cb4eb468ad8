package main

import (
	"strings"
	"testing"
	"time"

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

func TestRest(t *testing.T) {
	const (
		mem  = "MemTotal: 1 kB\nDirty: 100 kB\nWriteback: 0 kB\n"
		disk = " 254 0 vda 10 0 1000 5 20 0 2000 7 0 9 12\n   7 0 loop0 1 0 8 0 1 0 8 0 0 0 0\n"
		stat = "cpu  100 0 50 9000 3 0 0 0 0 0\ncpu0 1 1 1 1\n"
	)
	var now time.Time
	was := parseLoad(now, mem, disk, stat)
	for _, c := range []struct{ name, old, new, want string }{
		{"rest", "", "", ""},
		{"a little of everything", " 2000 7 0 ", " 3000 7 0 ", ""},
		{"dirty pages", "Dirty: 100 kB", "Dirty: 20000 kB", "20 MB wait to be written"},
		{"pages on their way", "Writeback: 0 kB", "Writeback: 20000 kB", "20 MB wait to be written"},
		{"reads", " 1000 5 ", " 9000 5 ", "4.1 MB/s"},
		{"writes", " 8 0 0 0 0\n", " 9008 0 0 0 0\n", "4.6 MB/s"},
		{"one write that takes long", " 7 0 9 12", " 7 1 9 12", "1 requests are under way"},
		{"a busy process", "cpu  100 0 50", "cpu  9100 0 50", "processors are busy"},
	} {
		all := strings.Join([]string{mem, disk, stat}, "|")
		if !strings.Contains(all, c.old) {
			t.Fatalf("%s: no %q", c.name, c.old)
		}
		f := strings.Split(strings.Replace(all, c.old, c.new, 1), "|")
		why := parseLoad(now.Add(time.Second), f[0], f[1], f[2]).since(was)
		if (why == "") != (c.want == "") || !strings.Contains(why, c.want) {
			t.Errorf("%s: %q, want %q", c.name, why, c.want)
		}
	}
}
