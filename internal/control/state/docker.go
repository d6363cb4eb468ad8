package state

import (
	"cmp"
	"path"
	"slices"
	"strings"

	"mortar/internal/cluster"
)

// MaxDocker is how many Docker volumes a pool can have.
const MaxDocker = 10000

func byName(a, b *cluster.DockerVolume) int { return cmp.Compare(a.Name, b.Name) }

// CheckDockerName says what is wrong with the name of a Docker volume. What Docker
// allows is allowed; it is also the name of a directory.
func CheckDockerName(name string) error {
	bad := strings.ContainsFunc(name, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_.-", r))
	})
	if len(name) < 2 || len(name) > 255 || bad || strings.ContainsRune("_.-", rune(name[0])) {
		return Refusal(CodeBadName, "%s cannot be the name of a Docker volume: it has 2 to 255 letters, digits, dots, dashes and underscores, and begins with a letter or digit", quoteShort(name))
	}
	return nil
}

// dockerOf returns a Docker volume in that volume, or nil.
func (s *State) dockerOf(id cluster.VolumeID) *cluster.DockerVolume {
	for _, d := range s.Map.Docker {
		if d.Volume == id {
			return d
		}
	}
	return nil
}

// steps are what may follow a state. Nothing follows the last but to be forgotten.
var steps = map[cluster.DockerState][]cluster.DockerState{
	"":                     {cluster.DockerMaking, cluster.DockerReady},
	cluster.DockerMaking:   {cluster.DockerReady, cluster.DockerRemoving},
	cluster.DockerReady:    {cluster.DockerRemoving},
	cluster.DockerRemoving: {cluster.DockerReady, cluster.DockerMaking}, // somebody still uses it
}

func (s *State) putDocker(d *cluster.DockerVolume) error {
	if err := CheckDockerName(d.Name); err != nil {
		return err
	}
	v := s.Map.VolumeByID(d.Volume)
	switch {
	case d.ID.IsZero():
		return Refusal(CodeBadCommand, "a Docker volume needs an id")
	case v == nil:
		return Refusal(CodeNoVolume, "Docker volume %s: its volume does not exist", d.Name)
	case d.Dir == "" || len(d.Dir) > maxPath || path.Clean("/"+d.Dir) != "/"+d.Dir || strings.ContainsRune(d.Dir, 0):
		return Refusal(CodeBadName, "Docker volume %s: %s is not a directory below the root of a volume", d.Name, quoteShort(d.Dir))
	case d.Mode&^0o7777 != 0:
		return Refusal(CodeBadOption, "Docker volume %s: mode %o", d.Name, d.Mode)
	}
	i, found := slices.BinarySearchFunc(s.Map.Docker, d, byName)
	var before cluster.DockerState
	if found {
		have := *s.Map.Docker[i]
		if have.ID != d.ID {
			return Refusal(CodeConflict, "there is a Docker volume %s already", d.Name)
		}
		before, have.State = have.State, d.State
		if have != *d {
			return Refusal(CodeBadCommand, "Docker volume %s: only its state can change", d.Name)
		}
	} else {
		if len(s.Map.Docker) >= MaxDocker {
			return Refusal(CodeBadCommand, "the pool has %d Docker volumes and cannot have more", MaxDocker)
		}
		for _, o := range s.Map.Docker {
			if o.Volume == d.Volume && (o.Own || d.Own) && (o.Dir == d.Dir || strings.HasPrefix(o.Dir, d.Dir+"/") || strings.HasPrefix(d.Dir, o.Dir+"/")) {
				return Refusal(CodeInUse, "directory %s of volume %s is that of Docker volume %s, or one of them is in the other", d.Dir, v.Name, o.Name)
			}
		}
	}
	if before != d.State && !slices.Contains(steps[before], d.State) {
		return Refusal(CodeConflict, "Docker volume %s is %s and cannot become %s", d.Name, cmp.Or(string(before), "not there"), quoteShort(string(d.State)))
	}
	c := *d
	s.Map.Docker = slices.Clone(s.Map.Docker)
	if found {
		s.Map.Docker[i] = &c
	} else {
		s.Map.Docker = slices.Insert(s.Map.Docker, i, &c)
	}
	return nil
}

func (s *State) dropDocker(c *DropDocker) error {
	d := s.Map.DockerVolume(c.Name)
	if d == nil || d.ID != c.ID {
		return Refusal(CodeNoDocker, "there is no Docker volume %s", quoteShort(c.Name))
	}
	if d.State != cluster.DockerRemoving {
		return Refusal(CodeConflict, "Docker volume %s is %s: it is not being removed", d.Name, d.State)
	}
	s.Map.Docker = slices.DeleteFunc(slices.Clone(s.Map.Docker), func(o *cluster.DockerVolume) bool { return o == d })
	return nil
}
