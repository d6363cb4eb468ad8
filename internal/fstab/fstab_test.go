package fstab

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestFstab(t *testing.T) {
	const table = "# comment\nUUID=1 / ext4 errors=remount-ro 0 1\n\n" +
		`gfs2:/wp /var/www/my\040site/ mortar defaults,_netdev 0 0` + "\nhalf"
	got := Parse(table)
	want := []Entry{
		{Line: 2, Source: "UUID=1", Dir: "/", Type: "ext4", Options: []string{"errors=remount-ro"}},
		{Line: 4, Source: "gfs2:/wp", Dir: "/var/www/my site", Type: "mortar", Options: []string{"defaults", "_netdev"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}

	// What is added is read as it was meant, once, and taken out again.
	line := Line("a,b:/v", "/mnt/two words#1", []string{"ro,_netdev", "defaults"})
	if want := `a,b:/v /mnt/two\040words\0431 mortar ro,_netdev,x-systemd.automount,x-systemd.after=mortar.service,x-systemd.mount-timeout=2min 0 0` + "\n"; line != want {
		t.Errorf("line %q, want %q", line, want)
	}
	if e := Parse(line); len(e) != 1 || e[0].Dir != "/mnt/two words#1" || !e[0].Ours() || !e[0].Has("ro") || e[0].Has("rw") || !e[0].Has("x-systemd.after=") {
		t.Errorf("read as %+v", e)
	}
	added, err := Add("fstab", table, line)
	if err != nil || added != table+"\n"+line {
		t.Errorf("added: %q, %v", added, err)
	}
	if again, err := Add("fstab", added, line); err != nil || again != added {
		t.Errorf("added twice: %q, %v", again, err)
	}
	if _, err := Add("fstab", added, Line("c:/v", "/mnt/two words#1", nil)); err == nil || !strings.Contains(err.Error(), "fstab, line 6: a,b:/v is to be mounted at /mnt/two words#1 already") {
		t.Errorf("another source: %v", err)
	}
	if removed, found := Remove(added, "/mnt/two words#1"); !found || removed != table+"\n" {
		t.Errorf("removed: %v, %q", found, removed)
	}
	if same, found := Remove(added, "/"); found || same != added {
		t.Errorf("another's entry was removed: %q", same)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("a:/b /c mortar defaults 0 0\n# x\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, e := range Parse(text) {
			if _, found := Remove(text, e.Dir); found != e.Ours() && !found {
				t.Errorf("%+v is not found", e)
			}
		}
		line := Line("h:/v", "/"+text, nil)
		if e := Parse(line); len(e) != 1 || e[0].Source != "h:/v" {
			t.Errorf("%q is read as %+v", line, e)
		}
	})
}
