package cli

import (
	"slices"
	"strings"
	"testing"

	"mortar/internal/fstab"
	"mortar/internal/migrate"
)

// What the mount command does with an option of GlusterFS's and what is said of it are two
// tables: no option is taken without a word about it, none is said to be known that is refused,
// and what is written in its place is a line that mounts without a warning.
func TestExplainedOptions(t *testing.T) {
	var words []string
	words = append(append(words, ignoredFlags...), unhandledFlags...)
	for _, key := range ignoredValues {
		words = append(words, key+"=1")
	}
	for w := range mountFlags {
		words = append(words, w)
	}
	words = append(words, "ro", "backup-volfile-servers=a:b", "backupvolfile-server=a", "log-level=INFO", "log-file=/var/log/x", "halo-enabled=1", "x-systemd.automount")
	for _, w := range words {
		r, err := migrate.Explain("fstab", migrate.Fstab, []byte("gfs1:/gv0 /mnt/gv0 glusterfs "+w+" 0 0\n"), nil)
		if err != nil || len(r.Changes) != 1 || len(r.Changes[0].Write) != 1 {
			t.Fatalf("%s: %+v, %v", w, r, err)
		}
		c := r.Changes[0]
		if said := strings.Join(append(c.Notes, c.Lost...), "\n"); strings.Contains(said, "mortar does not know it") {
			t.Errorf("%s is taken by mount, and said to be unknown: %s", w, said)
		}
		e := fstab.Parse(c.Write[0])[0]
		if _, volume, _, err := parseSource(e.Source); err != nil || volume != "gv0" || !e.Ours() {
			t.Errorf("%s: %q, %v", w, c.Write[0], err)
		}
		// mount(8) keeps nofail to itself.
		options := slices.DeleteFunc(e.Options, func(o string) bool { return o == "nofail" })
		o, err := parseMountOptions(options, false)
		if err != nil || len(o.warnings) > 0 {
			t.Errorf("%s: %q: %v %v", w, c.Write[0], o, err)
		}
	}
}
