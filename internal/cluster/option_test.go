package cluster

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestOptionsTable(t *testing.T) {
	names := map[string]bool{}
	for _, o := range Options() {
		if names[o.Name] {
			t.Errorf("option %s is there twice", o.Name)
		}
		names[o.Name] = true
		if o.Description == "" || strings.Contains(o.Description, "\n") {
			t.Errorf("option %s: description %q", o.Name, o.Description)
		}
		got, err := o.Canonical(o.Default)
		if err != nil || got != o.Default {
			t.Errorf("option %s: the default %q is %q, %v", o.Name, o.Default, got, err)
		}
		if found, err := FindOption(o.Name); err != nil || found.Name != o.Name {
			t.Errorf("option %s is not found: %v", o.Name, err)
		}
	}
	for _, n := range []string{OptEncryption, OptCacheTimeout, OptMinInSync, OptIOTimeout, OptReserve, OptAuthAllow, OptRetentionSize,
		"nfs.disable", "network.ping-timeout", "cluster.quorum-type", "performance.cache-size", "transport.address-family"} {
		if !names[n] {
			t.Errorf("option %s is missing", n)
		}
	}
}

// An option that is taken changes something, or says that it does not.
func TestOptionsHaveAnEffect(t *testing.T) {
	other := map[OptionKind]string{KindBool: "off", KindInt: "3", KindPercent: "7%", KindSize: "128MB", KindDuration: "7m", KindAccess: "10.0.0.7"}
	plain := (&Volume{Replica: 3}).EffectiveOptions()
	for _, o := range Options() {
		v := &Volume{Replica: 3, Options: map[string]string{o.Name: other[o.Kind]}}
		if o.Ignored == "" && reflect.DeepEqual(v.EffectiveOptions(), plain) {
			t.Errorf("option %s has no effect, and does not say so", o.Name)
		}
	}
	if o, err := FindOption("log-retention-time"); err != nil || !strings.Contains(o.Ignored, OptRetentionSize) {
		t.Errorf("log-retention-time: %+v, %v", o, err)
	}
}

func TestFindOptionSuggests(t *testing.T) {
	for name, want := range map[string]string{
		"ping-timeout":            "network.ping-timeout",
		"cache-timout":            "cache-timeout",
		"Cache-Timeout":           "cache-timeout",
		"cache_timeout":           "cache-timeout",
		"transport.encrypt":       "transport.encryption",
		"performance.cachesize":   "performance.cache-size",
		"storage.resrve":          "storage.reserve",
		"zzz":                     "",
		"":                        "",
		strings.Repeat("x", 9999): "",
	} {
		o, err := FindOption(name)
		if o != nil || !errors.Is(err, ErrOption) {
			t.Fatalf("%q: %v, %v", name, o, err)
		}
		text := err.Error()
		_, got, _ := strings.Cut(text, "\nDid you mean ")
		if got = strings.TrimSuffix(got, "?"); got != want {
			t.Errorf("%.40q: suggests %q, want %q", name, got, want)
		}
		if len(text) > 600 {
			t.Errorf("%.40q: a text of %d bytes", name, len(text))
		}
	}
	_, err := FindOption("a\x1b[31m")
	if strings.Contains(err.Error(), "\x1b") {
		t.Errorf("a control character reaches the terminal: %q", err)
	}
}

func TestCanonical(t *testing.T) {
	for _, c := range []struct{ name, value, want string }{
		{OptEncryption, "OFF", "off"}, {OptEncryption, "yes", "on"}, {OptEncryption, "1", "on"}, {OptEncryption, "maybe", ""}, {OptEncryption, "", ""},
		{OptCacheTimeout, "30", "30s"}, {OptCacheTimeout, "90s", "90s"}, {OptCacheTimeout, "1m", "60s"}, {OptCacheTimeout, "2m", "2m"}, {OptCacheTimeout, "1h", "1h"},
		{OptCacheTimeout, "0", "0s"}, {OptCacheTimeout, "-1", ""}, {OptCacheTimeout, "25h", ""}, {OptCacheTimeout, "1d", "24h"},
		{OptCacheTimeout, "100us", ""}, {OptCacheTimeout, "1.5s", "1.5s"}, {OptCacheTimeout, "99999999999999999999", ""}, {OptCacheTimeout, "9223372036854775807", ""},
		{OptMinInSync, "auto", "auto"}, {OptMinInSync, "AUTO", "auto"}, {OptMinInSync, "2", "2"}, {OptMinInSync, "0", ""}, {OptMinInSync, "6", ""}, {OptMinInSync, "two", ""},
		{OptReserve, "5", "5%"}, {OptReserve, "5%", "5%"}, {OptReserve, "0", "0%"}, {OptReserve, "51%", ""}, {OptReserve, "-1%", ""}, {OptReserve, "%", ""},
		{OptRetentionSize, "512m", "512MB"}, {OptRetentionSize, "1GiB", "1GB"}, {OptRetentionSize, "1.5GB", "1536MB"}, {OptRetentionSize, "1", ""},
		{OptRetentionSize, "2TB", ""}, {OptRetentionSize, "9999999999TB", ""}, {OptRetentionSize, "NaN", ""}, {OptRetentionSize, "-1GB", ""}, {OptRetentionSize, "1QB", ""},
		{OptAuthAllow, "*", "*"}, {OptAuthAllow, " 10.0.0.7 , 10.1.0.0/16,fe80::/10,", "10.0.0.7,10.1.0.0/16,fe80::/10"}, {OptAuthAllow, "192.168.*", "192.168.*"},
		{OptAuthAllow, "", ""}, {OptAuthAllow, ",", ""}, {OptAuthAllow, "host", ""}, {OptAuthAllow, "10.0.0.300", ""}, {OptAuthAllow, "/dir(10.0.0.1)", ""},
		{"nfs.disable", "whatever", "whatever"}, {"nfs.disable", "a\nb", ""}, {"nfs.disable", strings.Repeat("x", 5000), ""},
	} {
		o, err := FindOption(c.name)
		if err != nil {
			t.Fatal(err)
		}
		got, err := o.Canonical(c.value)
		if (err != nil) != (c.want == "") || got != c.want {
			t.Errorf("%s = %.50q: %q, %v; want %q", c.name, c.value, got, err, c.want)
		}
		if err != nil && (!errors.Is(err, ErrOption) || !strings.Contains(err.Error(), c.name) || len(err.Error()) > 500) {
			t.Errorf("%s = %.50q: error %v", c.name, c.value, err)
		}
		if err == nil {
			if again, err := o.Canonical(got); err != nil || again != got {
				t.Errorf("%s: canonical %q becomes %q, %v", c.name, got, again, err)
			}
		}
	}
}

func TestAccess(t *testing.T) {
	for _, c := range []struct {
		list    string
		yes, no []string
	}{
		{"*", []string{"10.0.0.1", "::1"}, nil},
		{"10.0.0.0/8,192.168.1.7", []string{"10.1.2.3", "192.168.1.7", "::ffff:10.0.0.1"}, []string{"11.0.0.1", "192.168.1.8", "::1"}},
		{"192.168.*", []string{"192.168.0.1", "192.168.255.255"}, []string{"192.16.80.1", "1.192.168.1"}},
		{"10.*.0.1,fd00:*", []string{"10.9.0.1", "10.0.0.1", "fd00::1"}, []string{"10.9.0.2", "fe80::1"}},
		{"*" + strings.Repeat("*1", 500), nil, []string{"10.0.0.1", "1.1.1.1"}},
	} {
		a, err := ParseAccess(c.list)
		if err != nil {
			t.Fatal(err)
		}
		for _, ip := range c.yes {
			if !a.Allows(netip.MustParseAddr(ip)) {
				t.Errorf("%.30s does not allow %s", c.list, ip)
			}
		}
		for _, ip := range c.no {
			if a.Allows(netip.MustParseAddr(ip)) {
				t.Errorf("%.30s allows %s", c.list, ip)
			}
		}
	}
}

func TestEffectiveOptions(t *testing.T) {
	v := Volume{Replica: 3}
	e := v.EffectiveOptions()
	if !e.Encryption || e.CacheTimeout != time.Minute || e.MinInSync != 2 || e.IOTimeout != 0 || e.Reserve != 1 || e.RetentionSize != 1<<30 || !e.Access.Allows(netip.MustParseAddr("1.2.3.4")) {
		t.Errorf("defaults: %+v", e)
	}
	for replica, want := range map[int]int{1: 1, 2: 1, 3: 2, 5: 2} {
		v := Volume{Replica: replica}
		if got := v.EffectiveOptions().MinInSync; got != want {
			t.Errorf("min-in-sync of replica %d is %d", replica, got)
		}
	}
	v.Options = map[string]string{OptEncryption: "off", OptMinInSync: "3", OptReserve: "7%", OptRetentionSize: "128MB", OptAuthAllow: "10.0.0.1", OptCacheTimeout: "garbage"}
	e = v.EffectiveOptions()
	if e.Encryption || e.MinInSync != 3 || e.Reserve != 7 || e.RetentionSize != 128<<20 || e.Access.Allows(netip.MustParseAddr("1.2.3.4")) || e.CacheTimeout != time.Minute {
		t.Errorf("set: %+v", e)
	}
	if s, def := v.Option(OptReserve); s != "7%" || def {
		t.Errorf("Option: %q, %v", s, def)
	}
	if s, def := v.Option(OptIOTimeout); s != "0s" || !def {
		t.Errorf("Option: %q, %v", s, def)
	}
}

func TestCheckVolumeName(t *testing.T) {
	for _, ok := range []string{"wp", "staging-gfs", "a_b", "0", "V", strings.Repeat("x", 255)} {
		if err := CheckVolumeName(ok); err != nil {
			t.Errorf("%.20q: %v", ok, err)
		}
	}
	for _, bad := range append([]string{"", ".", "..", "a/b", "/x", "a b", "a\x00", "a\n", "-rf", "é", "а", strings.Repeat("x", 256), "a\xff"}, reservedNames...) {
		err := CheckVolumeName(bad)
		if err == nil {
			t.Errorf("%.20q is taken", bad)
		} else if strings.ContainsAny(err.Error(), "\x00\x1b") {
			t.Errorf("%.20q: error %q", bad, err)
		}
	}
	if got, want := CheckVolumeName("a.b").Error(), "Volume name should not contain \".\" character.\nVolume names can onlycontain alphanumeric, '-' and '_' characters."; got != want {
		t.Errorf("got %q", got)
	}
}

func FuzzCanonical(f *testing.F) {
	f.Add(OptRetentionSize, "1.5GB")
	f.Add(OptCacheTimeout, "1m30s")
	f.Add(OptAuthAllow, "10.*")
	f.Add(OptMinInSync, "auto")
	f.Fuzz(func(t *testing.T, name, value string) {
		o, err := FindOption(name)
		if err != nil {
			if len(err.Error()) > 2000 {
				t.Fatalf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		got, err := o.Canonical(value)
		if err != nil {
			return
		}
		if again, err := o.Canonical(got); err != nil || again != got {
			t.Fatalf("%s: %q is %q and that is %q, %v", name, value, got, again, err)
		}
		v := Volume{Replica: 3, Options: map[string]string{name: got}}
		v.EffectiveOptions()
	})
}

func FuzzVolumeName(f *testing.F) {
	f.Add("wp")
	f.Add("..")
	f.Add("a/b")
	f.Fuzz(func(t *testing.T, name string) {
		if CheckVolumeName(name) != nil {
			return
		}
		if len(name) > 255 || strings.ContainsFunc(name, func(r rune) bool {
			return !slices.Contains([]rune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"), r)
		}) {
			t.Fatalf("%q passed", name)
		}
	})
}
