package migrate

import (
	"slices"
	"strings"
)

// fate is what becomes of an option of a mount.
type fate int

const (
	keep   fate = iota // it is the same
	goes               // nothing has to be said for it
	misses             // mortar has no counterpart
	host               // its value are hosts more
)

// what becomes of an option, and why.
type what struct {
	fate fate
	why  string
}

const (
	coherent = "what another machine changes is taken back from this one's caches at once; cache-timeout=SECONDS bounds how long they are used at all"
	inner    = "mortar has no part of this kind to be tuned"
	plain    = "the kernel's own"
)

// Options of mount.glusterfs, and those of mount(8) for which there is something to
// say. Those with a value end in =.
var options = map[string]what{
	"acl":               {goes, "ACLs are always on"},
	"allow_other":       {goes, "that is always so"},
	"async":             {goes, "that is always so: fsync and close say when"},
	"no-root-squash":    {goes, "that is always so"},
	"root-squash":       {misses, "root of a machine of the pool is root in the volume"},
	"sync":              {misses, "a file is on all machines when close or fsync return, not at each write"},
	"selinux":           {misses, "labels of SELinux are not handed on"},
	"worm":              {misses, "there are no write-once mounts; ro is there"},
	"mand":              {misses, "Linux has no mandatory locks any more"},
	"nomand":            {goes, "that is always so"},
	"loud":              {goes, plain},
	"silent":            {goes, plain},
	"remount":           {goes, plain},
	"enable-ino32":      {misses, "inode numbers have 64 bits"},
	"mem-accounting":    {goes, inner},
	"aux-gfid-mount":    {misses, "files are not reached by GlusterFS's ids"},
	"thin-client":       {goes, inner},
	"resolve-gids":      {goes, "groups are the caller's, however many"},
	"global-threading":  {goes, inner},
	"localtime-logging": {misses, "logs have UTC"},

	"backup-volfile-servers=": {host, ""},
	"backupvolfile-server=":   {host, ""},

	"transport=":                  {goes, "TCP is what there is"},
	"server-port=":                {goes, "the pool knows the ports of its machines"},
	"fetch-attempts=":             {goes, "a mount waits for the volume, a minute by itself"},
	"volfile-max-fetch-attempts=": {goes, "a mount waits for the volume, a minute by itself"},
	"attribute-timeout=":          {goes, coherent},
	"entry-timeout=":              {goes, coherent},
	"negative-timeout=":           {goes, coherent},
	"auto-invalidation=":          {goes, coherent},
	"fopen-keep-cache":            {goes, coherent},
	"fopen-keep-cache=":           {goes, coherent},
	"attr-times-granularity=":     {goes, "times are in nanoseconds"},
	"gid-timeout=":                {goes, "groups are the caller's, at each call"},
	"direct-io-mode=":             {goes, "pages are cached, and O_DIRECT is the program's to say"},
	"kernel-writeback-cache=":     {misses, "the kernel is not to keep writes that others cannot see"},
	"use-readdirp=":               {goes, "listings bring attributes where that helps"},
	"lru-limit=":                  {goes, inner},
	"inode-table-size=":           {goes, inner},
	"invalidate-limit=":           {goes, inner},
	"background-qlen=":            {goes, inner},
	"congestion-threshold=":       {goes, inner},
	"reader-thread-count=":        {goes, inner},
	"event-history=":              {goes, inner},
	"io-engine=":                  {goes, inner},
	"process-name=":               {goes, inner},
	"oom-score-adj=":              {misses, "a mount's process has the score of who mounts"},
	"dump-fuse=":                  {misses, "requests are not recorded"},
	"xlator-option=":              {misses, "there are no translators; what a volume can be told, \"mortar volume set help\" lists"},
	"fuse-mountopts=":             {misses, "options of mount(8) stand for themselves"},
	"volume-name=":                {misses, "the volume stands in the source, HOST:/VOLUME"},
	"volume-id=":                  {misses, "the volume stands in the source, HOST:/VOLUME"},
	"subdir-mount=":               {misses, "the directory stands in the source, HOST:/VOLUME/DIR"},
	"context=":                    {misses, "labels of SELinux are not handed on"},
	"fscontext=":                  {misses, "labels of SELinux are not handed on"},
	"defcontext=":                 {misses, "labels of SELinux are not handed on"},
	"rootcontext=":                {misses, "labels of SELinux are not handed on"},
}

// kept are options that mean to mortar, mount(8) or systemd what they meant.
var kept = []string{"defaults", "ro", "rw", "_netdev", "auto", "noauto", "nofail", "user", "users", "nouser", "owner", "group",
	"noatime", "atime", "nodiratime", "diratime", "relatime", "norelatime", "strictatime", "nodev", "dev", "nosuid", "suid", "noexec", "exec", "dirsync"}

// option says what becomes of one.
func option(word string) what {
	key, value, has := strings.Cut(word, "=")
	if has {
		key += "="
	}
	o, known := options[key]
	switch {
	case known && key == "transport=" && value != "tcp" && value != "socket":
		return what{misses, "TCP is what there is"}
	case known:
		return o
	case slices.Contains(kept, word), strings.HasPrefix(word, "x-"), key == "comment=", key == "log-level=":
		return what{fate: keep}
	case key == "log-file=" && strings.Contains(value, "gluster"):
		return what{goes, "a mount logs to /var/log/mortar, unless it is told another place"}
	case key == "log-file=":
		return what{fate: keep}
	case strings.HasPrefix(key, "halo-"):
		return what{misses, "all machines in sync have every change; a read asks the nearest"}
	}
	return what{misses, "mortar does not know it, and refuses it"}
}

// mount translates what is mounted and how. The options that are left are those for mortar.
func (c *Change) mount(s *source, words []string) (left []string) {
	for _, w := range words {
		if w = strings.TrimSpace(w); w == "" {
			continue
		}
		switch o := option(w); o.fate {
		case keep:
			left = append(left, w)
		case goes:
			c.note("%s goes: %s", w, o.why)
		case misses:
			c.lost("%s: %s", w, o.why)
		case host:
			_, value, _ := strings.Cut(w, "=")
			s.addHosts(strings.FieldsFunc(value, func(r rune) bool { return r == ':' || r == ',' })...)
			c.note("%s: these hosts are named with the first one, separated by commas; a machine asks its own daemon first in any case", w)
		}
	}
	return left
}
