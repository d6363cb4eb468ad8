package dockervol

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
)

// wish is what somebody asks for: a volume, and what he said of it.
type wish struct {
	Volume
	replica int             // 0: any
	said    map[string]bool // by option
}

// options are all there are, and how each is read.
var options = map[string]func(w *wish, value string) (want string){
	"volume": func(w *wish, v string) string {
		w.Volume.Volume = v
		if v == "" || strings.ContainsAny(v, "/ ") {
			return "the name of a volume of the pool; \"mortar volume list\" shows them"
		}
		return ""
	},
	"size": func(w *wish, v string) string {
		n, ok := parseSize(v)
		w.Size = n
		if !ok || n == 0 {
			return "a size such as 500MB or 10GB"
		}
		return ""
	},
	"replica": func(w *wish, v string) string {
		n, err := strconv.Atoi(v)
		w.replica = n
		if err != nil || n < 1 {
			return "the number of copies that the volume of the pool keeps, such as 3"
		}
		return ""
	},
	"uid": func(w *wish, v string) string {
		return number(&w.UID, v, 10, 1<<32-2, "the number of a user, such as 33")
	},
	"gid": func(w *wish, v string) string {
		return number(&w.GID, v, 10, 1<<32-2, "the number of a group, such as 33")
	},
	"mode": func(w *wish, v string) string {
		return number(&w.Mode, v, 8, 0o7777, "octal permissions such as 0775")
	},
	"subdir": func(w *wish, v string) string {
		w.Dir = strings.Trim(path.Clean("/"+v), "/")
		w.Own = false
		if w.Dir == "" || slices.Contains(strings.Split(v, "/"), "..") || strings.ContainsAny(v, "\x00\n") {
			return "a directory below the root of the volume, such as sites/one"
		}
		return ""
	},
	"ro": func(w *wish, v string) string {
		if v == "" {
			v = "true"
		}
		on, err := strconv.ParseBool(v)
		w.ReadOnly = on
		if err != nil {
			return "true or false"
		}
		return ""
	},
}

func number(to *uint32, v string, base int, most uint64, want string) string {
	n, err := strconv.ParseUint(strings.TrimPrefix(v, "0o"), base, 32)
	if err != nil || n > most {
		return want
	}
	*to = uint32(n)
	return ""
}

// parseSize reads a number of bytes with a unit of powers of two.
func parseSize(s string) (uint64, bool) {
	s = strings.ToUpper(strings.TrimSpace(s))
	s = strings.TrimSuffix(strings.TrimSuffix(s, "B"), "I")
	shift := 0
	if i := strings.IndexAny(s, "KMGTP"); i >= 0 && i == len(s)-1 {
		shift = 10 * (1 + strings.IndexByte("KMGTP", s[i]))
		s = strings.TrimSpace(s[:i])
	}
	n, err := strconv.ParseFloat(s, 64)
	if err != nil || !(n >= 0) || n*float64(uint64(1)<<shift) >= 1<<62 {
		return 0, false
	}
	return uint64(n * float64(uint64(1)<<shift)), true
}

// parseOptions reads what came with a request.
func parseOptions(name string, given map[string]string) (*wish, error) {
	w := &wish{Volume: Volume{Name: name, Dir: name, Own: true, Mode: 0o755}, said: map[string]bool{}}
	for _, key := range slices.Sorted(maps.Keys(given)) {
		read, ok := options[key]
		if !ok {
			return nil, fmt.Errorf("Docker volume %s: there is no option %q; there are %s", name, key, strings.Join(slices.Sorted(maps.Keys(options)), ", "))
		}
		if want := read(w, given[key]); want != "" {
			return nil, fmt.Errorf("Docker volume %s: option %s=%q: want %s", name, key, given[key], want)
		}
		w.said[key] = true
	}
	if w.said["subdir"] {
		for _, key := range []string{"size", "uid", "gid", "mode"} {
			if w.said[key] {
				return nil, fmt.Errorf("Docker volume %s: option %s is for a directory that is made, and subdir shows one that is there: give one or the other", name, key)
			}
		}
	}
	return w, nil
}

// same says whether a volume that is there is what is asked for. What was not said
// is not compared.
func (w *wish) same(have *Volume) error {
	for key, pair := range map[string][2]any{
		"volume": {w.Volume.Volume, have.Volume}, "size": {w.Size, have.Size}, "uid": {w.UID, have.UID}, "gid": {w.GID, have.GID},
		"mode": {w.Mode, have.Mode}, "subdir": {w.Dir, have.Dir}, "ro": {w.ReadOnly, have.ReadOnly},
	} {
		if w.said[key] && pair[0] != pair[1] {
			return fmt.Errorf("there is a Docker volume %s already, and its %s is %v and not %v", w.Name, key, pair[1], pair[0])
		}
	}
	if have.State == Removing {
		return fmt.Errorf("the Docker volume %s that there was is still being removed: run \"docker volume rm %s\" again", w.Name, w.Name)
	}
	return nil
}

// choose finds the volume of the pool that is to hold a Docker volume: the one that
// was named; else the daemon's default; else the only one that there is. Only
// such with as many copies as were asked for count.
func (w *wish) choose(all []Backing, preset string) (string, error) {
	fail := func(format string, args ...any) (string, error) {
		return "", fmt.Errorf("Docker volume %s: "+format, append([]any{w.Name}, args...)...)
	}
	name := w.Volume.Volume
	if name == "" {
		name = preset
	}
	var fit []string
	for _, b := range all {
		matches := w.replica == 0 || w.replica == b.Replica
		if name == b.Name {
			switch {
			case !matches && w.said["volume"]:
				return fail("volume %s keeps %d copies and not %d", name, b.Replica, w.replica)
			case !b.Started:
				return fail("volume %s is not started: \"mortar volume start %s\" starts it", name, name)
			case matches:
				return name, nil
			}
			// The default does not fit: what was asked for counts more.
		}
		if matches && b.Started {
			fit = append(fit, b.Name)
		}
	}
	slices.Sort(fit)
	of := ""
	if w.replica > 0 {
		of = fmt.Sprintf(" with replica %d", w.replica)
	}
	switch {
	case w.said["volume"]:
		return fail("there is no volume %s in the pool; \"mortar volume list\" shows what there is", name)
	case len(fit) == 1 && (preset == "" || w.replica > 0):
		return fit[0], nil
	case preset != "" && w.replica == 0:
		return fail("the daemon's docker-volume is %s, and the pool has no volume of that name", preset)
	case len(fit) == 0:
		return fail("the pool has no started volume%s that could hold it: make one with \"mortar volume create\"", of)
	}
	return fail("the pool has %d volumes%s: say which is to hold it with -o volume=NAME (%s), or set docker-volume for the daemon", len(fit), of, strings.Join(fit, ", "))
}
