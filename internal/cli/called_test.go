package cli

import (
	"slices"
	"testing"
)

// What a command line means depends on the name by which the program is called; a mount that
// mount(8) has made starts its asker under that name, too.
func TestCalled(t *testing.T) {
	for _, c := range []struct {
		args, words     []string
		gluster, helper bool
	}{
		{args: []string{"mortar", "volume", "list"}, words: []string{"volume", "list"}},
		{args: []string{"/usr/sbin/gluster", "volume", "list"}, words: []string{"volume", "list"}, gluster: true},
		{args: []string{"/sbin/mount.mortar", "n1:/v", "/mnt"}, words: []string{"mount", "n1:/v", "/mnt"}, helper: true},
		{args: []string{"mount.glusterfs"}, words: []string{"mount"}, helper: true},
		{args: []string{"/sbin/mount.mortar", askerCommand}, words: []string{askerCommand}},
		{args: []string{"mortar", askerCommand}, words: []string{askerCommand}},
	} {
		a := new(app)
		if words := a.called(c.args); !slices.Equal(words, c.words) || a.gluster != c.gluster || a.helper != c.helper {
			t.Errorf("%q is %q, gluster %v, helper %v; want %q, %v, %v", c.args, words, a.gluster, a.helper, c.words, c.gluster, c.helper)
		}
	}
}
